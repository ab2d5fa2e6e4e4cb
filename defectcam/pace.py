"""How fast the networks are here, so that a photo which cannot be done in time is refused before it is begun.

CVAT waits 120 s for an answer and then fails a task's whole run with nothing an annotator could act on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from defectcam.network import DefectNet
from defectcam.tiling import TimeLimitError

SETTLED_S = 5  # after which what is done tells how long the rest takes; a GPU's first pass takes seconds
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

    def check(self, tile_px: Mapping[str, float], deadline: float, amount: float, unit: str) -> None:
        """Refuse what cannot be done in time, before it is begun.

        Args:
            tile_px: network's name -> pixels of tiles in all its forward passes.
            deadline: on the clock of time.monotonic, s.
            amount, unit: of what all this is for, such as 64 "megapixels": the error says how much would fit.

        Raises:
            TimeLimitError: the passes take longer than is left.
        """
        left_s, needed_s = deadline - time.monotonic(), 0.0
        for name, px in tile_px.items():
            needed_s += self.seconds(name, px, left_s - needed_s)
        _check(needed_s, left_s, amount, unit)


class Progress:
    """Refuses work that turns out to be late while it is done: this machine may be slower now than at its fastest.

    Args:
        total_px: pixels of tiles in all forward passes.
        deadline, amount, unit: as in `Pace.check`.
    """

    def __init__(self, total_px: float, deadline: float, amount: float, unit: str) -> None:
        self.total_px, self.done_px = total_px, 0.0
        self.deadline, self.amount, self.unit = deadline, amount, unit
        self.started = time.monotonic()

    def add(self, tile_px: float) -> None:
        """So much more is done; TimeLimitError where all of it would be late."""
        self.done_px += tile_px
        passed_s = time.monotonic() - self.started
        if passed_s > SETTLED_S:
            needed_s = passed_s * self.total_px / self.done_px
            _check(needed_s, self.deadline - self.started, self.amount, self.unit)


def _check(needed_s: float, left_s: float, amount: float, unit: str) -> None:
    if needed_s > max(left_s, 0):
        fitting = int(amount * left_s / needed_s)
        raise TimeLimitError(needed_s - left_s, f"about {fitting} {unit}" if fitting > 0 else "")
