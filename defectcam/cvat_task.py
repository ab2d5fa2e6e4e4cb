"""Climbing steps T set on the CVAT task itself: the default of the attribute `iterations` of the task's labels.

Stock CVAT sends a function no task and no setting. But it lists the runs under way (`GET /api/lambda/requests`:
function, task, progress) and shows a task's labels with their attributes' defaults (`GET /api/labels?task_id=`).
So a function that knows its own name and has a token can look up what the task that it is called for asks for.

Never a wrong task's setting: a call need not belong to the run that is listed (several runs may be started, and
single frames from CVAT's "AI tools" are listed nowhere). A run's setting counts only if the photo in hand is the
frame the run has come to, pixel by pixel; that is looked at only where the setting would change anything.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from defectcam import __version__
from defectcam.request import ITERATIONS_MAX, ImageError, RequestError, decode_image

ATTRIBUTE = "iterations"
LIMIT_S = 2.0  # of one look-up, whatever CVAT does: then the deployment's own setting is used


class LookUpError(RuntimeError):
    """CVAT did not say what was asked; the message is the reason, for the log."""


@dataclass
class _Run:
    """A started run: what its task's labels ask for, and what is needed to tell which frame it has come to."""

    iterations: dict[str, int | str]  # label -> T
    size: int  # frames of the task
    deleted: frozenset[int]  # frames that CVAT skips
    first: int  # frame the run begins with
    last_seen: int = -1  # frame of the last call known to be of this run


class CvatTask:
    """Looks up the task that a call is for, and the T set on its labels.

    Args:
        url: where CVAT answers this function, http or https, e.g. http://cvat-server:8080.
        token: of a user who sees the runs: an administrator, or the tasks' owner or assignee. A key of 40
            hexadecimal digits (`POST /api/auth/login`) or a personal access token of newer versions.
        function: the name under which CVAT lists this function.
        logger: with `info` and `warn`.
    """

    def __init__(self, url: str, token: str, function: str, logger) -> None:
        self.url = url.rstrip("/")
        scheme = "Token" if re.fullmatch("[0-9a-f]{40}", token) else "Bearer"
        self.headers = {"Authorization": f"{scheme} {token}", "User-Agent": f"defectcam/{__version__}"}
        self.function = function
        self.logger = logger
        self.runs: dict[str, _Run] = {}  # started ones only, by their ids

    @classmethod
    def from_env(cls, environ: Mapping[str, str], logger) -> CvatTask | None:
        """From ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN, None without them; RequestError names variable and remedy."""
        url, token = (environ.get(f"ADVCAM_CVAT_{name}", "").strip() for name in ("URL", "TOKEN"))
        function = environ.get("NUCLIO_FUNCTION_NAME", "").strip()
        if not url and not token:
            return None
        for variable, value in [("ADVCAM_CVAT_URL", url), ("ADVCAM_CVAT_TOKEN", token)]:
            if not value:
                raise RequestError(f"{variable} is not set; set ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN, or neither")
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
            raise RequestError(f"ADVCAM_CVAT_URL is {url!r}, but must be like http://cvat-server:8080")
        if not re.fullmatch("[!-~]+", token):  # its value is nobody's business in a log
            raise RequestError("ADVCAM_CVAT_TOKEN must be letters, digits and signs without blanks in between")
        if not function:
            raise RequestError("NUCLIO_FUNCTION_NAME is not set, the name CVAT lists; outside Nuclio set it yourself")
        return cls(url, token, function, logger)

    def iterations(
        self, image: object, image_rgb: np.ndarray, default: Mapping[str, int | str]
    ) -> dict[str, int | str]:
        """T per defect where the task that this photo is annotated for asks for another one than `default`.

        Takes 2 s at the most and raises nothing: where CVAT does not answer, nothing is asked for, and the log
        says so.

        Args:
            image: the photo's file as it was received, bytes.
            image_rgb: the same photo, (H, W, 3) uint8.
            default: T per defect where no task asks for anything.
        """
        # In a thread of its own, since no timeout of the standard library bounds a whole call: not the look-up of
        # a host's name, not an answer that comes byte by byte. Only this side logs: Nuclio's logger is not made
        # for two threads.
        answer: Future = Future()
        arguments = (answer, image, image_rgb, default, time.monotonic() + LIMIT_S)
        threading.Thread(target=self._answer, args=arguments, name="cvat-task", daemon=True).start()
        try:
            found, remarks = answer.result(timeout=LIMIT_S)
        except TimeoutError:
            found, remarks = {}, [f"no answer within {LIMIT_S:g} s"]
        except Exception as error:  # whatever CVAT, or what stands in its place, answers: never the photo's answer
            found, remarks = {}, [str(error) if isinstance(error, LookUpError) else repr(error)]
        for remark in remarks:
            self.logger.warn(f"iterations set on the task in CVAT ({self.url}): {remark}; the deployment's are used")
        if found:
            self.logger.info(f"iterations set on the task in CVAT: {found}")
        return found

    def _answer(self, answer: Future, *arguments) -> None:
        try:
            answer.set_result(self._look_up(*arguments))
        except Exception as error:
            answer.set_exception(error)

    def _look_up(
        self, image: object, image_rgb: np.ndarray, default: Mapping[str, int | str], deadline: float
    ) -> tuple[dict[str, int | str], list[str]]:
        """What is asked for, and remarks for the log."""
        started, remarks = {}, []
        for run in self._get_json("/api/lambda/requests", deadline):
            if run["status"] == "started" and run["function"]["id"] == self.function:
                started[run["id"]] = run
        known = {}
        for run_id, run in started.items():
            known[run_id] = self.runs.get(run_id) or self._read_run(run["function"], default, remarks, deadline)
        self.runs = known  # those that have ended are forgotten

        def differing(run: _Run) -> dict[str, int | str]:
            return {defect: steps for defect, steps in run.iterations.items() if steps != default[defect]}

        if not any(differing(run) for run in known.values()):
            return {}, remarks
        asked = []
        for run_id, run in known.items():
            frame = self._frame_in_hand(started[run_id], run, image, image_rgb, deadline)
            if frame is not None:
                run.last_seen = frame
                asked.append(differing(run))
        if not asked:
            remarks.append("the photo is not the frame that a started run has come to (a single frame by AI tools?)")
        elif any(other != asked[0] for other in asked):
            remarks.append("several runs have come to this very photo and ask for different iterations")
        else:
            return asked[0], remarks
        return {}, remarks

    def _read_run(
        self, function: dict, default: Mapping[str, int | str], remarks: list[str], deadline: float
    ) -> _Run:
        """Ask for the labels and the frames of a run's task."""
        task, iterations = int(function["task"]), {}
        for label in self._labels(task, deadline):
            asked = [entry["default_value"] for entry in label["attributes"] if entry["name"] == ATTRIBUTE]
            if label["name"] in default and asked:
                steps = _steps(asked[0])  # of any text: CVAT's raw editor of labels checks nothing
                if steps is None:
                    what = f"{ATTRIBUTE} of label {label['name']} of task {task} is {asked[0]!r:.80}"
                    remarks.append(f'{what}, but must be 0 to {ITERATIONS_MAX} or "auto"')
                else:
                    iterations[label["name"]] = steps
        meta = self._get_json(f"/api/tasks/{task}/data/meta", deadline)
        first = 0
        if function.get("job") is not None:
            first = int(self._get_json(f"/api/jobs/{int(function['job'])}", deadline)["start_frame"])
        return _Run(iterations, int(meta["size"]), frozenset(meta["deleted_frames"]), first)

    def _labels(self, task: int, deadline: float) -> Iterator[dict]:
        """All labels of a task, page by page."""
        path, page = f"/api/labels?task_id={task}", 1
        while True:
            answer = self._get_json(path if page == 1 else f"{path}&page={page}", deadline)
            yield from answer["results"]
            if not answer["next"]:  # its address may be the one that browsers use: not followed
                return
            page += 1

    def _frame_in_hand(
        self, run: dict, known: _Run, image: object, image_rgb: np.ndarray, deadline: float
    ) -> int | None:
        """The frame of a run's task that this photo is, among those the run may have come to; None if none."""
        task, progress = int(run["function"]["task"]), int(run["progress"])
        for frame in _frames_at(progress, known):
            path = f"/api/tasks/{task}/data?type=frame&quality=original&number={frame}"
            file = self._get(path, deadline)
            try:
                if file == image or np.array_equal(decode_image(file, image_rgb[..., 0].size), image_rgb):
                    return frame
            except ImageError:  # not this one: larger, or no picture
                continue
        return None

    def _get_json(self, path: str, deadline: float) -> object:
        return json.loads(self._get(path, deadline))

    def _get(self, path: str, deadline: float) -> bytes:
        """The body of CVAT's answer."""
        where = urlsplit(path).path
        request = urllib.request.Request(self.url + path, headers=self.headers)
        try:
            with _OPENER.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
                body = bytearray()
                while chunk := response.read1(1 << 16):
                    body += chunk
                    if time.monotonic() > deadline:
                        raise LookUpError(f"no whole answer to {where} within {LIMIT_S:g} s")
                return bytes(body)
        except urllib.error.HTTPError as error:
            with error:
                raise LookUpError(f"{where} was answered with {error.code} {error.reason}") from None
        except OSError as error:
            raise LookUpError(f"{where} cannot be reached ({error})") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the token to wherever it points: it counts as an error instead."""

    def redirect_request(self, *_) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _steps(text: object) -> int | str | None:
    """T as the labels' select says it: digits or "auto"; None for anything else."""
    if text == "auto":
        return text
    in_range = isinstance(text, str) and re.fullmatch("[0-9]{1,2}", text) and int(text) <= ITERATIONS_MAX
    return int(text) if in_range else None


def _frames_at(progress: int, run: _Run) -> list[int]:
    """Frames that a run at so many percent may send now, the likeliest first.

    CVAT counts: after frame f of n the progress is int((f + 1) / n * 100), so of a large task several frames share
    a percentage, and frames that were deleted are passed over without counting.
    """
    counted = [frame for frame in range(run.size) if int(frame / run.size * 100) == progress]
    frames = []
    for frame in [run.first] * (progress == 0) + counted:
        while frame in run.deleted:
            frame += 1
        if frame < run.size and frame not in frames:
            frames.append(frame)
    return sorted(frames, key=lambda frame: frame <= run.last_seen)  # stable: those to come, then the others
