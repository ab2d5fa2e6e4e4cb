"""How fast the engines are here, so that a photo which cannot be done in time is refused before it is begun."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np

from defectcam.engine import Engine

SAMPLE_PX = 192  # side of the tile that is timed: large enough for a stable timing
GRADIENT_COST = 1.3  # of a backward pass to the image alone, in forward passes


class Throughput:
    """Seconds per pixel of a tile that one forward pass takes, per defect: the fastest that was seen.

    The fastest, since everything else that runs makes a pass slower, never faster: so nothing is refused because
    of a busy moment at the start.

    Args:
        engines: defect -> engine.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)
        self.fastest: dict[str, float] = {}

    def measure(self, defect: str) -> None:
        """Time a small tile, after a first pass that warms up."""
        grey = np.zeros((1, 3, SAMPLE_PX, SAMPLE_PX), np.float32)
        for _ in range(2):
            started = time.monotonic()
            self.engines[defect].score(grey)
            elapsed_s = time.monotonic() - started
        self.learn(defect, elapsed_s, SAMPLE_PX**2)

    def learn(self, defect: str, elapsed_s: float, tile_px: float) -> None:
        """Take in what passes over tiles of `tile_px` pixels together took."""
        if tile_px:
            self.fastest[defect] = min(elapsed_s / tile_px, self.fastest.get(defect, float("inf")))

    def seconds(self, tile_px: Mapping[str, float], left_s: float = math.inf) -> float:
        """What forward passes over so many pixels take, by defect; measured anew before it says longer than `left_s`.

        0 where nothing was measured yet.
        """
        total_s = 0.0
        for defect, px in tile_px.items():
            if defect in self.fastest and self.fastest[defect] * px > left_s - total_s:
                self.measure(defect)
            total_s += self.fastest.get(defect, 0.0) * px
        return total_s


def climb_passes(steps: int) -> float:
    """Forward passes that a climb of T steps costs."""
    return 1 + steps * (1 + GRADIENT_COST) if steps else 0.0
