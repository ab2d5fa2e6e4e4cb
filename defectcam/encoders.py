"""What is known of an encoder without building it: how far it sees, and the grid its images must fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_HALO_PX = 64  # the pyramid gives context; against 192 px it changes 1 % of the pixels of defects in large tiles


@dataclass(frozen=True)
class Encoder:
    """What an encoder needs to be known for.

    Attributes:
        smp_name: of segmentation-models-pytorch.
        reach_px: pixels around a region that its score map depends on, per number of down-samplings.
        mean_rgb, std_rgb: what its ImageNet weights were trained with, on the scale 0..1.
    """

    smp_name: str
    reach_px: dict[int, int]
    mean_rgb: tuple[float, float, float]
    std_rgb: tuple[float, float, float]


ENCODERS = {
    # The paper's: its first blocks, the first convolution with stride 1.
    "resnet34": Encoder("resnet34", {1: 24, 2: 60, 3: 168}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Halves the resolution from its first convolution on: sees four times as far for a tenth of the arithmetic.
    # Without squeeze-and-excitation, whose global means would let tiles disagree.
    "efficientnet-lite0": Encoder("tu-tf_efficientnet_lite0", {4: 214}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

POOLINGS = ("average", "log-mean-exp")


def check_architecture(encoder: str, decoder_channels: tuple[int, ...], downsamplings: int, pooling: str) -> int:
    """Depth of the encoder in stages; the arguments are those of `ScoreNet`.

    Raises:
        ValueError: arguments that do not fit each other; the message names them.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, not {encoder!r}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
    known = ENCODERS[encoder]
    if downsamplings not in known.reach_px:
        allowed = " or ".join(map(str, known.reach_px))
        raise ValueError(f"downsamplings of {encoder} must be {allowed}, not {downsamplings!r}")
    depth = downsamplings + 1 if encoder == "resnet34" else downsamplings
    if len(decoder_channels) != depth:
        raise ValueError(
            f"decoder_channels needs {depth} numbers for {downsamplings} down-samplings of {encoder}, "
            f"not {decoder_channels!r}"
        )
    return depth


def stride_px(downsamplings: int) -> int:
    """Spacing of the coarsest grid: height and width of every image are its multiples."""
    return 2**downsamplings


def halo_px(encoder: str, downsamplings: int) -> int:
    """Pixels of surroundings that a tile is given: the reach, a multiple of the stride, LARGEST_HALO_PX at most."""
    stride = stride_px(downsamplings)
    return min(-(-ENCODERS[encoder].reach_px[downsamplings] // stride) * stride, LARGEST_HALO_PX)


def normalised(images_rgb: np.ndarray) -> np.ndarray:
    """RGB of 0..255, any shape and dtype -> -1..1, the networks' input, float32; of a torch tensor a tensor."""
    floats = images_rgb.astype(np.float32) if isinstance(images_rgb, np.ndarray) else images_rgb.float()
    return floats / 127.5 - 1
