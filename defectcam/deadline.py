"""Until when an answer must be there: work that cannot finish in time is refused before it is begun.

CVAT waits 120 s for an answer and then fails a task's whole run with nothing an annotator could act on.
"""

from __future__ import annotations

import math
import time

SETTLED_S = 5  # after which what is done tells how long the rest takes; a GPU's first pass takes seconds


class TimeLimitError(RuntimeError):
    """The photo cannot be done before the deadline.

    Attributes:
        overrun_s: seconds beyond the deadline that the work needs at the least, as estimated; 0 where the deadline passed.
        fitting: how much could be done in the time left, with its unit; empty where that is not known.
    """

    def __init__(self, overrun_s: float = 0.0, fitting: str = "") -> None:
        super().__init__("the deadline passed" if overrun_s == 0 else f"{overrun_s:.0f} s late at the least")
        self.overrun_s = overrun_s
        self.fitting = fitting


class Deadline:
    """A moment on the clock of time.monotonic.

    Args:
        seconds_left: from now; infinity for none.
    """

    def __init__(self, seconds_left: float = math.inf) -> None:
        self.at = time.monotonic() + seconds_left

    def left_s(self) -> float:
        """Seconds until then; negative once it has passed."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Raise TimeLimitError once it has passed."""
        if self.left_s() < 0:
            raise TimeLimitError

    def check_work(self, needed_s: float, amount: float, unit: str) -> None:
        """Raise TimeLimitError for work that would end too late.

        Args:
            amount, unit: of what all the work is for, such as 64 "megapixels": the error says how much would fit.
        """
        left_s = self.left_s()
        if needed_s > left_s:
            fitting = int(amount * left_s / needed_s)
            raise TimeLimitError(needed_s - left_s, f"about {fitting} {unit}" if fitting > 0 else "")

    def begin(self) -> None:
        """The networks begin now; of interest to `Progress` alone."""

    def planned(self, tile_px: float) -> None:
        """So many more pixels of tiles will go through a network; of interest to `Progress` alone."""

    def done(self, tile_px: float) -> None:
        """So many pixels of tiles have gone through a network; of interest to `Progress` alone."""


class Progress(Deadline):
    """A deadline that refuses work as soon as its speed, or more work that is found, shows that it cannot finish in time.

    Args:
        deadline: the same moment.
        total_px: pixels of tiles in all forward passes that are known of.
        amount, unit: as in `check_work`.
    """

    def __init__(self, deadline: Deadline, total_px: float, amount: float, unit: str) -> None:
        self.at = deadline.at
        self.total_px, self.done_px = total_px, 0.0
        self.amount, self.unit = amount, unit
        self.begin()

    def begin(self) -> None:
        """As in `Deadline`: decoding a photo before it tells nothing of the networks' speed."""
        self.started = time.monotonic()

    def planned(self, tile_px: float) -> None:
        """As in `Deadline`; raises TimeLimitError where the rest cannot finish in time."""
        self.total_px += tile_px
        self._check_rest()

    def done(self, tile_px: float) -> None:
        """As in `Deadline`; raises TimeLimitError where the rest cannot finish in time."""
        self.done_px += tile_px
        self._check_rest()

    def _check_rest(self) -> None:
        passed_s = time.monotonic() - self.started
        if passed_s > SETTLED_S and 0 < self.done_px < self.total_px:
            self.check_work(passed_s * (self.total_px / self.done_px - 1), self.amount, self.unit)


NO_DEADLINE = Deadline()
