"""Settings of the CVAT task itself: T is the default of the attribute `iterations` of its labels, and labels of type mask
ask for masks.

Never a wrong task's setting: a call need not belong to the run that is listed (several runs may be started, and
single frames from CVAT's "AI tools" are listed nowhere). A run's setting counts only if the photo in hand is the
frame the run has come to, pixel by pixel; that is looked at only where the setting would change anything.

Never another setting without a word: where CVAT cannot be asked, a run that was under way keeps its own. Otherwise the
deployment's T is used, the proposals are polygons, and a notice tells the annotator, once per run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np

from defectcam.credentials import address_from
from defectcam.cvat_runs import Changes, CvatRuns, Defaults, LookUpError, Run, listed
from defectcam.settings import RequestError

PATIENCE_S = 6.0  # for which a CVAT that does not answer is asked again: it may be restarting
PAUSE_S = 5.0  # after an answer CVAT sends the run's next photo sooner: a later one may be of another run


@dataclass
class _Outage:
    """Calls in turn whose task is not known: of one run, as far as that can be told."""

    photos: set[int] = field(default_factory=set)  # hashes of their files
    told: bool = False


@dataclass(frozen=True)
class TaskSetting:
    """What the task that a photo is annotated for asks for.

    Attributes:
        changes: T and shape per defect where they are others than the deployment's.
        notice: what an annotator must be told on this photo, the most important words first; "" for nothing.
    """

    changes: Changes
    notice: str = ""
    about: Run | _Outage | None = None  # what the notice is about


class CvatTask:
    """Looks up the task that a call is for, and what its labels ask for.

    Args:
        url, token, function: as in `CvatRuns`.
        logger: with `info` and `warn`.
    """

    def __init__(self, url: str, token: str, function: str, logger) -> None:
        self.cvat = CvatRuns(url, token, function)
        self.logger = logger
        self.runs: dict[tuple, Run] = {}  # started ones only
        self.current: Run | None = None  # of the last call, if no other run was started
        self.outage: _Outage | None = None  # that the last call belongs to
        self.answered_s = -math.inf  # end of the last answer, on the clock of time.monotonic
        self.problem: dict | None = None  # the last one, for `describe`

    @classmethod
    def from_env(cls, environ: Mapping[str, str], logger) -> CvatTask | None:
        """From ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN, None without them; RequestError names variable and remedy."""
        url, token = address_from(environ)
        function = environ.get("NUCLIO_FUNCTION_NAME", "").strip()
        if not url and not token:
            return None
        for variable, value in [("ADVCAM_CVAT_URL", url), ("ADVCAM_CVAT_TOKEN", token)]:
            if not value:
                raise RequestError(f"{variable} is not set; set ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN, or neither")
        if not function:
            raise RequestError("NUCLIO_FUNCTION_NAME is not set, the name CVAT lists; outside Nuclio set it yourself")
        return cls(url, token, function, logger)

    def describe(self) -> dict:
        """Which CVAT is asked, and the last problem: reason, since when and until when (UTC), whether it is over."""
        return {"url": self.cvat.url, "last_problem": self.problem}

    def setting(
        self, file: bytes, image_rgb: np.ndarray, default: Defaults, arrived_s: float, deadline: float
    ) -> TaskSetting:
        """What the task that this photo is annotated for asks for. Raises nothing.

        Takes 2 s at the most. Where CVAT does not answer, it is asked again for 6 s, but not for more than a quarter
        of the time left, and not at every photo of a run.

        Args:
            file: the photo as it was received.
            image_rgb: the same photo, (H, W, 3) uint8.
            default: what is in force where the task asks for nothing.
            arrived_s: when the request came, on the clock of time.monotonic.
            deadline: for the whole answer, on the same clock.
        """
        photo = hash(file)
        if arrived_s - self.answered_s > PAUSE_S or self.outage and photo in self.outage.photos:
            self.current = self.outage = None  # another run, perhaps: none shows a photo twice
        patience_s = 0 if self.outage else min(PATIENCE_S, (deadline - time.monotonic()) / 4)
        try:
            found = self.cvat.ask(file, image_rgb, default, self.runs, patience_s)
        except LookUpError as error:
            return self._without_cvat(error, photo, default)
        self.runs, called = found.runs, []
        for key, frame in found.frames.items():
            if frame is not None:
                self.runs[key].last = frame
                called.append(self.runs[key])
        self.current = called[0] if called and len(self.runs) == 1 else None
        if found.compared and not called:
            tasks = " or ".join(str(run.task) for run in self.runs.values())
            reason = f"unknown photo: it is not the frame that the run of task {tasks} has come to; labels of a task count"
            return self._unknown(f"{reason} for runs over whole photos, not for single frames", photo, default)
        if found.compared and any(run.wanted(default) != called[0].wanted(default) for run in called):
            reason = "several runs have come to this very photo and ask for different settings; start them one after another"
            return self._unknown(reason, photo, default)
        self.outage = None
        wanted = called[0].wanted(default) if found.compared else {}
        if wanted:
            self.logger.info(f"set on the task in CVAT: {wanted}")
        wrong = next((run for run in called if run.wrong(default)), None)
        self._note(wrong and wrong.wrong(default))
        return TaskSetting(wanted, wrong.wrong(default) if wrong and not wrong.told else "", wrong)

    def answered(self, setting: TaskSetting | None = None) -> None:
        """To be called after each answer, with its setting if it shows the annotator the notice."""
        self.answered_s = time.monotonic()
        if setting and setting.about:
            setting.about.told = True

    def _without_cvat(self, error: LookUpError, photo: int, default: Defaults) -> TaskSetting:
        """CVAT cannot be asked: the settings of the run that was under way, if it goes on."""
        run = self.current
        frame = run and run.next_frame()
        if frame is None:
            self.current = None
            reason = f"{error}; run again when CVAT works" if error.passes else str(error)
            return self._unknown(reason, photo, default)
        run.last = frame
        self.outage = self.outage or _Outage()
        self.outage.photos.add(photo)
        self._note(f"settings of the run so far used: {error}")
        return TaskSetting(run.wanted(default))

    def _unknown(self, reason: str, photo: int, default: Defaults) -> TaskSetting:
        """The deployment's settings for want of the task, and the notice that says so, once."""
        self.outage = self.outage or _Outage()
        self.outage.photos.add(photo)
        polygons = "; shapes are polygons, whatever the type of the labels" if default.shape is None else ""
        notice = f"T={listed(default.iterations.values())} used: {reason}{polygons}"
        self._note(notice)
        return TaskSetting({}, "" if self.outage.told else notice, self.outage)

    def _note(self, reason: str | None) -> None:
        """Log a problem and keep it for `describe`; None for a call without one."""
        if reason is None:
            self.problem = self.problem and self.problem | {"over": True}
            return
        self.logger.warn(f"settings of the task in CVAT ({self.cvat.url}): {reason}")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        since = now if self.problem is None or self.problem["over"] else self.problem["since"]
        self.problem = {"reason": reason, "since": since, "until": now, "over": False}

