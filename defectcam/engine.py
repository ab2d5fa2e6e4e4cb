"""The engine runs a network: score maps of a batch of tiles, and the gradient that climbing follows.

Climbing, tiling and pyramid speak to these two calls alone, in NumPy. `torch_engine` has PyTorch's, which is the
definition; `openvino_engine` has that for processors, which needs no PyTorch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """One network on one device.

    Attributes:
        name: "torch" or "openvino".
        stride_px: height and width of images are its multiples.
        halo_px: surroundings that a tile is given.
    """

    name: str
    stride_px: int
    halo_px: int

    def score(self, images: np.ndarray) -> np.ndarray:
        """Score maps S, (N, H, W) float32, of images (N, 3, H, W) float32 in -1..1, sides multiples of `stride_px`."""

    def score_and_gradient(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """S as `score` gives it, and the gradient (N, 3, H, W) of sum(sg(sigmoid(S)) * S) towards the images.

        sg: taken as a constant. Where the network sees the defect already, more of it is looked for; a pixel's
        gradient depends on its surroundings alone, not on a tile's largest value.
        """

    def release_memory(self) -> None:
        """Return the memory that is kept for the next tile: one of another size would need its own beside it."""
