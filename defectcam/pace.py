"""How fast the networks are here, so that a photo which cannot be done in time is refused before it is begun.

CVAT waits 120 s for an answer and then fails a task's whole run with nothing an annotator could act on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from defectcam.network import DefectNet

SAMPLE_PX = 192  # side of the tile that is timed: long enough to be told from the clock's and the caches' moods


class Pace:
    """Seconds per pixel of a tile that one forward pass takes, per network: the fastest that was seen.

    The fastest, since everything else that runs makes a pass slower, never faster: so nothing is refused because
    of a busy moment at the start.

    Args:
        networks: name -> network.
    """

    def __init__(self, networks: Mapping[str, DefectNet]) -> None:
        self.networks = dict(networks)
        self.fastest: dict[str, float] = {}

    def measure(self, name: str) -> None:
        """Time a small tile, after a first pass that warms up."""
        network = self.networks[name]
        grey = torch.full((1, 3, SAMPLE_PX, SAMPLE_PX), 127, dtype=torch.uint8, device=network.head.weight.device)
        with torch.no_grad():
            for _ in range(2):
                started = time.monotonic()
                network.score_map(network.normalise(grey)).sum().item()  # a number: a GPU has finished then
                elapsed_s = time.monotonic() - started
        self.learn(name, elapsed_s, SAMPLE_PX**2)

    def learn(self, name: str, elapsed_s: float, tile_px: int) -> None:
        """Take in what passes over tiles of `tile_px` pixels together took."""
        self.fastest[name] = min(elapsed_s / tile_px, self.fastest.get(name, float("inf")))

    def seconds(self, name: str, tile_px: float, left_s: float) -> float:
        """What forward passes over `tile_px` pixels take; measured anew before it says longer than `left_s`.

        0 where nothing was measured yet.
        """
        if name not in self.fastest:
            return 0.0
        if self.fastest[name] * tile_px > left_s:
            self.measure(name)
        return self.fastest[name] * tile_px
