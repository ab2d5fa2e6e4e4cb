"""The runs that CVAT has under way, the photos they have come to, and what the labels of their tasks ask for.

Stock CVAT sends a function no task and no setting. But it lists the runs under way (`GET /api/lambda/requests`:
function, task, progress) and shows a task's labels: their types, and their attributes' defaults
(`GET /api/labels?task_id=`).
So a function that knows its own name and has a token can look up which task it is called for.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import numpy as np
from pydantic import TypeAdapter, ValidationError

from defectcam import cvat_answers
from defectcam.credentials import http_client
from defectcam.cvat_answers import Called, Data, Job, Label, Page, T
from defectcam.image import ImageError, decode_image
from defectcam.settings import ITERATIONS_MAX
from defectcam.validation import first_problem

ATTRIBUTE = "iterations"
LIMIT_S = 2.0  # of one look-up, whatever CVAT does
ASK_AGAIN_S = 1.0
REMEDIES = {  # of answers that stay the same however often CVAT is asked
    401: "the function's token is not valid any more: have it deployed with a new ADVCAM_CVAT_TOKEN",
    403: "the function's token may not see this task: make its user the task's assignee, or an administrator",
}

MASK = "mask"  # a label's type, and the shape of its proposals

Changes = dict[str, dict[str, int | str]]  # defect -> `iterations` and `shape`, where a label asks for them


class LookUpError(RuntimeError):
    """CVAT did not say what was asked; the message is the reason, its most important words first.

    Attributes:
        passes: whether CVAT may answer if it is asked again.
    """

    def __init__(self, reason: str, passes: bool = True) -> None:
        super().__init__(reason)
        self.passes = passes


@dataclass(frozen=True)
class Defaults:
    """What is in force where a task asks for nothing.

    Attributes:
        iterations: T per defect.
        shape: "polygon" or "mask" where it is given, None where the type of a label decides.
    """

    iterations: Mapping[str, int | str]
    shape: str | None = None


@dataclass
class Run:
    """A started run: what its task's labels ask for, and what is needed to tell which frame it has come to."""

    task: int
    labels: dict[str, tuple[object, str]]  # label -> default of its `iterations`, any text, and the values it may have
    size: int  # frames of the task
    deleted: frozenset[int]  # frames that CVAT skips
    frames: range  # of the task or the job
    masks: frozenset[str] = frozenset()  # labels of type mask
    last: int = -1  # frame of the last call known to be of this run
    told: bool = False  # whether an annotator knows what is wrong with the labels

    def wanted(self, default: Defaults) -> Changes:
        """What the labels ask for where it differs from `default`."""
        found: Changes = {}
        for defect, steps in default.iterations.items():
            asked = _steps(self.labels[defect][0]) if defect in self.labels else None
            own = {} if asked in (None, steps) else {"iterations": asked}
            if default.shape is None and defect in self.masks:
                own["shape"] = MASK
            if own:
                found[defect] = own
        return found

    def wrong(self, default: Defaults) -> str:
        """The notice about defaults that are no T, of any text: CVAT's raw editor of labels checks nothing."""
        steps = default.iterations
        labels = [name for name in steps if name in self.labels and _steps(self.labels[name][0]) is None]
        if not labels:
            return ""
        what = [f"{self.labels[name][0]!r:.40} on label {name}" for name in labels]
        hidden = [name for name in labels if str(steps[name]) not in self.labels[name][1]]
        shown = f"; the shapes of {', '.join(hidden)} show that default instead of T" if hidden else ""
        return (
            f"T={listed(steps[name] for name in labels)} used: bad T {', '.join(what)} of task {self.task}, must be "
            f'0 to {ITERATIONS_MAX}{shown}; choose another default of {ATTRIBUTE} and run again'
        )

    def next_frame(self) -> int | None:
        """The frame that follows the last one; None after the run's end."""
        return next((frame for frame in self.frames if frame > self.last and frame not in self.deleted), None)


@dataclass(frozen=True)
class LookUp:
    """What CVAT says at a call.

    Attributes:
        runs: those that are started, by id and time: newer versions use an id again.
        frames: the frame of each run that the photo in hand is, None if it is none that the run may have come to.
        compared: whether photos were compared for that. They are not where no run asks for anything; then the frames
            are what the runs have most likely come to.
    """

    runs: dict[tuple, Run]
    frames: dict[tuple, int | None]
    compared: bool


class CvatRuns:
    """Asks a CVAT for the started runs of one function.

    Args:
        url: where CVAT answers this function, http or https, e.g. http://cvat-server:8080.
        token: of a user who sees the runs: an administrator, or the tasks' owner or assignee. A personal access token
            of newer versions, or a key of 40 hexadecimal digits (`POST /api/auth/login`).
        function: the name under which CVAT lists this function.
    """

    def __init__(self, url: str, token: str, function: str) -> None:
        self.url, self.token, self.function = url.rstrip("/"), token.encode(), function
        self.client = http_client(self.url, token, "ADVCAM_CVAT_URL")

    def ask(
        self, file: bytes, image_rgb: np.ndarray, default: Defaults, known: Mapping[tuple, Run], patience_s: float
    ) -> LookUp:
        """Which runs are started and which of their frames a photo is. Takes 2 s and the patience at the most.

        Args:
            file: the photo as it was received.
            image_rgb: the same photo, (H, W, 3) uint8.
            default: what is in force where the task asks for nothing.
            known: runs of earlier answers; only what is new is asked for.
            patience_s: how long a CVAT that does not answer is asked again.

        Raises:
            LookUpError: it does not answer as it must.
        """
        until = time.monotonic() + patience_s
        while True:
            # In a thread, since no timeout of httpx bounds a whole call: not the look-up of a host's name, not an answer
            # that comes byte by byte. A thread that is late changes nothing.
            answer: Future = Future()
            arguments = (answer, file, image_rgb, default, known, time.monotonic() + LIMIT_S)
            threading.Thread(target=self._answer, args=arguments, name="cvat-task", daemon=True).start()
            try:
                return answer.result(timeout=LIMIT_S)
            except TimeoutError:
                error = LookUpError(f"CVAT slow: no answer within {LIMIT_S:g} s")
            except LookUpError as told:
                error = told
            except Exception as odd:  # whatever CVAT, or what stands in its place, answers: never the photo's answer
                error = LookUpError(f"CVAT answers what is not understood: {odd!r:.200}")
            if not error.passes or time.monotonic() + ASK_AGAIN_S > until:
                raise error
            time.sleep(ASK_AGAIN_S)

    def _answer(self, answer: Future, *arguments) -> None:
        try:
            answer.set_result(self._look_up(*arguments))
        except Exception as error:
            answer.set_exception(error)

    def _look_up(
        self, file: bytes, image_rgb: np.ndarray, default: Defaults, known: Mapping[tuple, Run], deadline: float
    ) -> LookUp:
        started = {}
        for run in self._read("/api/lambda/requests", list[cvat_answers.Run], deadline):
            if run.status == "started" and run.function.id == self.function:
                started[run.id, run.enqueued] = run
        runs = {key: known.get(key) or self._read_run(run.function, deadline) for key, run in started.items()}
        compared = any(run.wanted(default) or run.wrong(default) and not run.told for run in runs.values())
        frames = {}
        for key, run in runs.items():
            candidates = frames_at(started[key].progress, run)
            if compared:
                candidates = (n for n in candidates if self._is_frame(run.task, n, file, image_rgb, deadline))
            frames[key] = next(iter(candidates), None)
        return LookUp(runs, frames, compared)

    def _read_run(self, called: Called, deadline: float) -> Run:
        """Ask for the labels and the frames of a run's task."""
        labels = list(self._labels(called.task, deadline))
        masks = frozenset(label.name for label in labels if label.type == MASK)
        data = self._read(f"/api/tasks/{called.task}/data/meta", Data, deadline)
        frames = range(data.size)
        if called.job is not None:
            job = self._read(f"/api/jobs/{called.job}", Job, deadline)
            frames = range(job.start_frame, job.stop_frame + 1)
        return Run(called.task, iterations_of(labels), data.size, frozenset(data.deleted_frames), frames, masks)

    def _labels(self, task: int, deadline: float) -> Iterator[Label]:
        """All labels of a task, page by page."""
        path, page = f"/api/labels?task_id={task}", 1
        while True:
            answer = self._read(path if page == 1 else f"{path}&page={page}", Page[Label], deadline)
            yield from answer.results
            if not answer.next:  # its address may be the one that browsers use: not followed
                return
            page += 1

    def _is_frame(self, task: int, frame: int, file: bytes, image_rgb: np.ndarray, deadline: float) -> bool:
        """Whether a photo is this frame of a task."""
        theirs = self._get(f"/api/tasks/{task}/data?type=frame&quality=original&number={frame}", deadline)
        try:
            return theirs == file or np.array_equal(decode_image(theirs, image_rgb[..., 0].size), image_rgb)
        except ImageError:  # larger, or no picture
            return False

    def _read(self, path: str, kind: type[T], deadline: float) -> T:
        """CVAT's answer, which must be of a kind of `cvat_answers`."""
        try:
            return TypeAdapter(kind).validate_json(self._get(path, deadline).replace(self.token, b"..."))
        except ValidationError as error:
            raise LookUpError(f"CVAT sends an odd answer to {urlsplit(path).path}: {first_problem(error)}") from None

    def _get(self, path: str, deadline: float) -> bytes:
        """The body of CVAT's answer; a redirection counts as an error, since it would carry the token elsewhere."""
        where = urlsplit(path).path
        try:
            with self.client.stream("GET", path, timeout=max(deadline - time.monotonic(), 0.001)) as response:
                if response.status_code != 200:
                    what = REMEDIES.get(response.status_code, "no answer")
                    passes = response.status_code not in REMEDIES
                    raise LookUpError(f"CVAT {response.status_code}: {what} ({where})", passes)
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("not a whole answer")
                return bytes(body)
        except httpx.TimeoutException:
            raise LookUpError(f"CVAT slow: no whole answer to {where} within {LIMIT_S:g} s") from None
        except httpx.HTTPError as error:
            raise LookUpError(f"CVAT unreachable: {error}") from None


def iterations_of(labels: Iterable[Label]) -> dict[str, tuple[object, str]]:
    """Label -> default of its `iterations` and the values that it may have, of the labels that have one."""
    return {
        label.name: (attribute.default_value, "\n".join(attribute.values))
        for label in labels
        for attribute in label.attributes
        if attribute.name == ATTRIBUTE
    }


def _steps(text: object) -> int | str | None:
    """T as the labels' select says it: digits, or "auto" of labels of earlier versions; None for anything else."""
    if text == "auto":
        return text
    in_range = isinstance(text, str) and re.fullmatch("[0-9]{1,2}", text) and int(text) <= ITERATIONS_MAX
    return int(text) if in_range else None


def listed(steps: Iterable[int | str]) -> str:
    """Each T once: "0", "0/2"."""
    return "/".join(dict.fromkeys(map(str, steps)))


def frames_at(progress: float | None, run: Run) -> list[int]:
    """Frames that a run may send now, the likeliest first.

    CVAT counts: after frame f of n the progress is int((f + 1) / n * 100), so of a large task several frames share
    a percentage, and frames that were deleted are passed over without counting. Before the first frame is done it is
    0, and None in newer versions.
    """
    percent = int(progress or 0)
    counted = [frame for frame in run.frames if int(frame / run.size * 100) == percent and progress is not None]
    frames = []
    for frame in [*run.frames[: percent == 0], *counted]:
        while frame in run.deleted:
            frame += 1
        if frame in run.frames and frame not in frames:
            frames.append(frame)
    return sorted(frames, key=lambda frame: frame <= run.last)  # stable: those to come, then the others
