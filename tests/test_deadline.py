"""A deadline lets through what can be done in time, and says by how much the rest would be late and what would fit."""

import math
import time

import pytest

from defectcam import deadline as deadline_module
from defectcam.deadline import NO_DEADLINE, Deadline, Progress, TimeLimitError


def test_without_a_deadline_all_work_may_begin():
    assert Deadline().left_s() == NO_DEADLINE.left_s() == math.inf
    NO_DEADLINE.check()
    NO_DEADLINE.check_work(1e9, 64, "megapixels")


def test_work_that_fits_may_begin_and_other_work_is_late_by_the_rest():
    deadline = Deadline(100)
    assert 99 < deadline.left_s() <= 100 and deadline.at == pytest.approx(time.monotonic() + deadline.left_s(), abs=1)
    deadline.check()
    deadline.check_work(90, 64, "megapixels")
    with pytest.raises(TimeLimitError, match="100 s late at the least") as error:
        deadline.check_work(200, 64, "megapixels")
    assert error.value.overrun_s == pytest.approx(100, abs=1) and error.value.fitting in ("about 31 megapixels", "about 32 megapixels")


def test_once_it_passed_nothing_may_begin():
    deadline = Deadline(-5)
    assert deadline.left_s() < 0
    with pytest.raises(TimeLimitError, match="the deadline passed") as error:
        deadline.check()
    assert error.value.overrun_s == 0 and error.value.fitting == ""
    with pytest.raises(TimeLimitError) as error:
        deadline.check_work(20, 64, "megapixels")
    assert error.value.overrun_s == pytest.approx(25, abs=1) and error.value.fitting == ""


def test_work_that_turns_out_to_be_late_is_refused_while_it_is_done(monkeypatch):
    monkeypatch.setattr(deadline_module, "SETTLED_S", 0)
    progress = Progress(Deadline(100), 1000, 50, "megapixels")
    assert 99 < progress.left_s() <= 100
    progress.started -= 10
    progress.done(200)  # in 10 s: 40 s for the rest
    progress.started -= 20
    with pytest.raises(TimeLimitError, match="s late at the least") as error:
        progress.done(10)  # 210 in 30 s: 113 s for the rest, 100 are left
    assert error.value.overrun_s == pytest.approx(13, abs=1)
    progress.done(900)  # all of it is done
