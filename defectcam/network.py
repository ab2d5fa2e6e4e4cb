"""ScoreNet: one network per defect, a U-Net whose signed score map is read per pixel and pooled (paper 3.1, Fig. 3, 4).

The map S has a logit for every pixel of the image. Pooled over a window it is the classifier's logit for that window,
its positive part above the bias is the class activation map, and climbing follows its gradient to the image. One
binary network per defect (paper 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval

from defectcam.encoders import ENCODERS, check_architecture, halo_px, stride_px

LOG_MEAN_EXP_SHARPNESS = 4.0


class ScoreNet(nn.Module):
    """Images -> signed score maps of the same height and width -> logits.

    Args:
        encoder: one of ENCODERS.
        decoder_channels: width of the decoder's stages, coarse to fine: for resnet34 `downsamplings` + 1 numbers, for
            efficientnet-lite0 as many as `downsamplings`.
        downsamplings: how often the encoder halves the resolution: 1, 2 (the paper's choice) or 3 of resnet34, 4 of
            efficientnet-lite0.
        pooling: how the map becomes a logit: "average" (the paper's) or "log-mean-exp", which a defect that covers
            little of the image still moves.
        encoder_weights: "imagenet" to start from ImageNet weights that segmentation-models-pytorch downloads.

    Raises:
        ValueError: arguments that do not fit each other; the message names them.
    """

    def __init__(
        self,
        encoder: str = "resnet34",
        decoder_channels: tuple[int, ...] = (64, 32, 16),
        downsamplings: int = 2,
        pooling: str = "average",
        encoder_weights: str | None = None,
    ) -> None:
        super().__init__()
        depth = check_architecture(encoder, decoder_channels, downsamplings, pooling)
        known = ENCODERS[encoder]
        self.encoder_name, self.downsamplings, self.pooling = encoder, downsamplings, pooling
        self.reach_px = known.reach_px[downsamplings]
        unet = smp.Unet(
            known.smp_name, encoder_depth=depth, encoder_weights=encoder_weights, decoder_channels=tuple(decoder_channels)
        )
        self.encoder, self.decoder = unet.encoder, unet.decoder
        # Stages that never run at this depth go: 19.9 M of ResNet34's 22 M parameters.
        if encoder == "resnet34":
            self.encoder.conv1.stride = (1, 1)  # paper 3.1: stride 1 instead of 2, for resolution
            for stage in range(downsamplings + 1, 5):
                delattr(self.encoder, f"layer{stage}")
        else:
            del self.encoder.model.blocks[depth + 1 :]
        self.head = nn.Linear(decoder_channels[-1], 1)
        # From -1..1 to what the encoder's ImageNet weights expect: x * scale + shift.
        mean, std = np.array(known.mean_rgb), np.array(known.std_rgb)
        for name, values in (("scale_rgb", 0.5 / std), ("shift_rgb", (0.5 - mean) / std)):
            buffer = torch.tensor(values, dtype=torch.get_default_dtype()).view(1, 3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def stride_px(self) -> int:
        """Height and width of every image are its multiples."""
        return stride_px(self.downsamplings)

    @property
    def halo_px(self) -> int:
        """Pixels of surroundings that a tile is given."""
        return halo_px(self.encoder_name, self.downsamplings)

    def score_map(self, images: Tensor) -> Tensor:
        """Signed score map S, the head's bias included.

        Args:
            images: (N, 3, H, W) RGB in -1..1 (`normalised`); H and W multiples of `stride_px`.

        Returns:
            (N, H, W): a logit per pixel.

        Raises:
            ValueError: H or W is no such multiple: strided convolutions would pad it unevenly.
        """
        height, width = images.shape[2:]
        if height % self.stride_px or width % self.stride_px:
            raise ValueError(f"images of {height} x {width} px: both must be multiples of {self.stride_px}")
        features = self.decoder(self.encoder(images * self.scale_rgb + self.shift_rgb))  # (N, C, H, W)
        return nn.functional.conv2d(features, self.head.weight[:, :, None, None], self.head.bias)[:, 0]

    def logit(self, score_map: Tensor) -> Tensor:
        """Logits (N,) of score maps (N, H, W), pooled as the network was built to."""
        if self.pooling == "average":
            return score_map.mean(dim=(1, 2))
        pixels = score_map.shape[1] * score_map.shape[2]
        summed = torch.logsumexp(LOG_MEAN_EXP_SHARPNESS * score_map, dim=(1, 2))
        return (summed - np.log(pixels)) / LOG_MEAN_EXP_SHARPNESS

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N,) of images (N, 3, H, W) in -1..1."""
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
        if (target_height, target_width) == (height, width) and skip_connection is None:  # resnet34's last: nothing to double
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
