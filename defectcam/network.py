"""The classifier: a U-Net on the first blocks of a ResNet34, global average pooling and one linear layer.

Paper 3.1, Fig. 3 (the network) and Fig. 4 (one, two or three down-samplings). The decoder's output has the
input's height and width, so its class activation map does too. One binary network per defect (paper 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval

# What ResNet34's published ImageNet weights were trained with; the default for networks from scratch as well.
IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)


class DefectNet(nn.Module):
    """Binary defect classifier whose features keep the input's resolution.

    Args:
        decoder_channels: width of the decoder's stages, coarse to fine; `downsamplings` + 1 numbers.
        downsamplings: how often the encoder halves the resolution, 1, 2 (the paper's choice) or 3.
        encoder_weights: "imagenet" to start from the published encoder weights (downloaded by
            segmentation-models-pytorch), None to start from random ones.
        mean_rgb, std_rgb: normalisation constants of the input, on the scale 0..1.
    """

    def __init__(
        self,
        decoder_channels: tuple[int, ...] = (64, 32, 16),
        downsamplings: int = 2,
        encoder_weights: str | None = None,
        mean_rgb: tuple[float, ...] = IMAGENET_MEAN_RGB,
        std_rgb: tuple[float, ...] = IMAGENET_STD_RGB,
    ) -> None:
        super().__init__()
        if downsamplings not in (1, 2, 3):
            raise ValueError(f"downsamplings must be 1, 2 or 3, not {downsamplings!r}")
        if len(decoder_channels) != downsamplings + 1:
            raise ValueError(
                f"decoder_channels needs {downsamplings + 1} numbers for {downsamplings} down-samplings, "
                f"not {decoder_channels!r}"
            )
        self.downsamplings = downsamplings
        unet = smp.Unet(
            "resnet34",
            encoder_weights=encoder_weights,
            encoder_depth=downsamplings + 1,
            decoder_channels=tuple(decoder_channels),
        )
        self.encoder = unet.encoder
        self.encoder.conv1.stride = (1, 1)  # paper 3.1: stride 1 instead of 2, for resolution
        for stage in range(downsamplings + 1, 5):  # never run at this depth: 19.9 M of 22 M parameters
            delattr(self.encoder, f"layer{stage}")
        self.decoder = unet.decoder
        self.head = nn.Linear(decoder_channels[-1], 1)
        self.register_buffer("mean_rgb", torch.tensor(mean_rgb).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_rgb", torch.tensor(std_rgb).view(1, 3, 1, 1), persistent=False)

    @property
    def halo_px(self) -> int:
        """Pixels around a region that its score map depends on, rounded up to a multiple of `stride_px`.

        The convolutions reach 21, 57 and 161 px; a test checks that by differentiating through the network.
        """
        return {1: 24, 2: 60, 3: 168}[self.downsamplings]

    @property
    def climb_halo_px(self) -> int:
        """Half of that, in whole strides: enough around a climbed tile, whose edges are no neighbour's equals anyway.

        The outermost pixels of that reach hardly count, and no halo would make climbed tiles one photo: every step
        reaches farther, and a tile's gradient is scaled by its own largest.
        """
        return {1: 12, 2: 32, 3: 88}[self.downsamplings]

    @property
    def stride_px(self) -> int:
        """Spacing of the coarsest grid: tiles that start at its multiples see the same pixels pooled together."""
        return 2**self.downsamplings

    def normalise(self, images_rgb: Tensor) -> Tensor:
        """(N, 3, H, W) RGB on the scale 0..255, any dtype -> the network's input, channels last."""
        images = (images_rgb.to(self.mean_rgb.dtype) / 255 - self.mean_rgb) / self.std_rgb
        return images.contiguous(memory_format=torch.channels_last)

    def score_map(self, images: Tensor) -> Tensor:
        """Signed score map S = sum_k w_k F_k, without the bias.

        Args:
            images: (N, 3, H, W) from `normalise`; any H, W >= 1.

        Returns:
            (N, H, W). Its mean over an image plus the head's bias is that image's logit.
        """
        features = self.decoder(self.encoder(images))  # (N, C, H, W)
        return nn.functional.conv2d(features, self.head.weight[:, :, None, None])[:, 0]

    def logit(self, score_map: Tensor) -> Tensor:
        """Logits (N,) of score maps (N, H, W): global average pooling, then the linear layer's bias."""
        return score_map.mean(dim=(1, 2)) + self.head.bias[0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,) of normalised images (N, 3, H, W)."""
        return self.logit(self.score_map(images))


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """The same function with every BatchNorm inside the convolution before it; for use, not for training.

    A tenth less time and half the memory of a climb, since nothing is kept for the BatchNorms' gradients.

    Args:
        network: in eval mode; it is changed and returned.

    Raises:
        ValueError: in training mode, in which a BatchNorm depends on the batch.
    """
    if network.training:
        raise ValueError("only a network in eval mode can be folded: call network.eval() first")
    for module in list(network.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))  # timm's do two steps in one
    return network


class DoublingBlock(nn.Module):
    """A decoder's block that convolves before it doubles: the same function for less than half the arithmetic.

    Of a 3 x 3 window on a map whose every pixel was doubled, two rows and two columns see the same pixel. So each of
    the four pixels that one becomes is a 2 x 2 convolution of the map before, and all four are one convolution.

    Args:
        block: of segmentation-models-pytorch, without BatchNorms (`fold_batchnorm`); its convolutions are kept.
        channels: of the map that is doubled.
    """

    def __init__(self, block: UnetDecoderBlock, channels: int) -> None:
        super().__init__()
        self.block = block
        conv, *rest = block.conv1
        self.after = nn.Sequential(*rest, block.conv2, block.attention2)
        self.skip_weight = nn.Parameter(conv.weight[:, channels:].detach().clone(), requires_grad=False)
        weight = conv.weight[:, :channels].detach()
        # What the rows of a window, above, at and below a pixel, add up to on the rows of the map before.
        first = torch.stack([weight[..., 0, :], weight[..., 1, :] + weight[..., 2, :]], -2)
        second = torch.stack([weight[..., 0, :] + weight[..., 1, :], weight[..., 2, :]], -2)
        phases = []
        for rows in (first, second):
            phases.append(torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], -1))
            phases.append(torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], -1))
        self.phase_weight = nn.Parameter(torch.cat(phases), requires_grad=False)

    def forward(self, feature_map: Tensor, target_height: int, target_width: int, skip_connection: Tensor | None) -> Tensor:
        """The block's output; maps (N, C, H, W)."""
        height, width = feature_map.shape[2:]
        if (target_height, target_width) == (height, width) and skip_connection is None:  # DefectNet's last: nothing to double
            return self.after(self.block.conv1[0](feature_map))
        if (target_height, target_width) != (2 * height, 2 * width):
            return self.block(feature_map, target_height, target_width, skip_connection)
        doubled = _Interleave.apply(nn.functional.conv2d(feature_map, self.phase_weight, padding=1))
        bias = self.block.conv1[0].bias
        if skip_connection is None:
            return self.after(doubled.add_(bias[:, None, None]))
        return self.after(doubled.add_(nn.functional.conv2d(skip_connection, self.skip_weight, bias, padding=1)))


class _Interleave(torch.autograd.Function):
    """Four maps become every second row and column of one; (N, 4 C, H + 1, W + 1) -> (N, C, 2 H, 2 W).

    Map (y, x) loses its last row where y is 0, else its first, and so its columns. With a backward pass of its own,
    since that of slicing fills a map of zeros for every slice: a fifth of a climb's time.
    """

    @staticmethod
    def forward(_, coarse: Tensor) -> Tensor:
        count, channels, height, width = coarse.shape
        size = count, channels // 4, 2 * (height - 1), 2 * (width - 1)
        doubled = torch.empty(size, dtype=coarse.dtype, device=coarse.device, memory_format=torch.channels_last)
        for part, every_second in _phases(coarse, doubled):
            every_second.copy_(part)
        return doubled

    @staticmethod
    @once_differentiable
    def backward(_, gradient: Tensor) -> Tensor:
        count, channels, height, width = gradient.shape
        size = count, 4 * channels, height // 2 + 1, width // 2 + 1
        coarse = torch.empty(size, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last).zero_()
        for part, every_second in _phases(coarse, gradient):
            part.copy_(every_second)
        return coarse


def _phases(coarse: Tensor, doubled: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each of the four maps the part that is used, and where it belongs, both (N, H, W, C).

    A pixel's channels lie together in memory, so they are moved together.
    """
    height, width = (size // 2 for size in doubled.shape[2:])
    phases, doubled = coarse.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1)), doubled.permute(0, 2, 3, 1)
    for y, x in product((0, 1), (0, 1)):
        yield phases[:, y : y + height, x : x + width, y, x], doubled[:, y::2, x::2]


def fold_upsampling(network: nn.Module) -> nn.Module:
    """The same function with every doubling in the decoder after the convolution that follows it; for use, not training.

    Args:
        network: a U-Net from `fold_batchnorm`, with `encoder` and `decoder`; it is changed and returned.
    """
    skipped = [*network.encoder.out_channels[-2:0:-1], 0]  # the last block has no skip connection
    blocks = network.decoder.blocks
    for index, (block, channels) in enumerate(zip(blocks, skipped, strict=True)):
        blocks[index] = DoublingBlock(block, block.conv1[0].in_channels - channels)
    return network
