"""ModelHandler: a request -> the Predictor -> CVAT shapes, or a click -> an outline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from defectcam import __version__
from defectcam.cvat_labels import NOTICE, UNPROCESSED, check_label_name
from defectcam.cvat_runs import MASK, Changes, Defaults
from defectcam.cvat_task import CvatTask, TaskSetting
from defectcam.deadline import NO_DEADLINE, Deadline, TimeLimitError
from defectcam.image import ImageError, decode_image, image_size, pixel_limit
from defectcam.interactor import ClickSettings, outline_clicked
from defectcam.memory import check_memory, keep_freed_memory
from defectcam.polygons import mask_crop, outline_length_px, polygon_points_xy
from defectcam.predict import Predictor, device_and_engine, proposals_for
from defectcam.proposal_log import ProposalLog, image_hash
from defectcam.proposals import Proposal, proposal_id
from defectcam.pyramid import Pyramid
from defectcam.request import Request
from defectcam.settings import (
    MAX_MEGAPIXELS,
    MAX_PROPOSALS,
    SETTINGS,
    TIME_LIMIT_S,
    RequestError,
    Settings,
    read_variable,
    settings_from_env,
    unknown_variables,
)
from defectcam.weights import WeightsError, load_weights, read_manifest, weights_folder

MAX_OUTLINE_PX = 500_000  # longer outlines of one component take minutes to simplify and no one could edit them
MAX_MASK_PIXELS = 32_000_000  # of all boxes together: CVAT's masks are lists of numbers, 2 bytes each in JSON


class ModelHandler:
    """All defects' networks, used on one device, and the deployment's settings.

    Args:
        weights_dir: folder with manifest.json, see `defectcam.weights`.
        device, engine: see `Predictor`.
        settings: of the deployment; the request's come before them, the manifest's after.
        max_pixels: larger photos are not processed.
        time_limit_s: a photo whose answer takes longer, from its arrival on, gets no proposals but the reason.
        logger: with `info`, `warn` and `error`, as Nuclio's.
        cvat_task: who to ask for T and the types of the labels of the task in CVAT.
        proposal_log: where every answer to a detector's request is written to.

    Attributes:
        masks: the defects that get masks where no setting names a shape: those of whose task's label it is known that it
            is of type mask. All others get polygons.

    Raises:
        WeightsError: weights that must not be used.
    """

    def __init__(
        self,
        weights_dir: Path,
        device: str,
        settings: Settings,
        logger,
        max_pixels: int = MAX_MEGAPIXELS * 1_000_000,
        time_limit_s: float = TIME_LIMIT_S,
        cvat_task: CvatTask | None = None,
        proposal_log: ProposalLog | None = None,
        engine: str | None = None,
    ) -> None:
        keep_freed_memory()
        self.predictor = Predictor(load_weights(weights_dir), device, engine)
        self.weights = self.predictor.weights
        for defect in self.weights.configs:
            try:
                check_label_name(defect)
            except ValueError as error:
                raise WeightsError(f"{Path(weights_dir) / 'manifest.json'}: {error}") from error
        self.device = device
        self.settings = settings
        self.max_pixels = max_pixels
        self.time_limit_s = time_limit_s
        self.logger = logger
        self.cvat_task = cvat_task
        self.proposal_log = proposal_log
        self.masks: frozenset[str] = frozenset()

    @classmethod
    def from_env(cls, environ: Mapping[str, str], logger) -> ModelHandler:
        """Configure from ADVCAM_* variables; a bad value raises RequestError naming variable and remedy."""
        for warning in unknown_variables(environ):
            logger.warn(warning)
        folder = weights_folder(environ)
        _, configs = read_manifest(folder)
        settings = settings_from_env(environ, list(configs))
        max_pixels = pixel_limit(environ)
        time_limit_s = read_variable(environ, "ADVCAM_TIME_LIMIT") or TIME_LIMIT_S
        cvat_task = CvatTask.from_env(environ, logger)
        log_dir = read_variable(environ, "ADVCAM_LOG_DIR")
        try:
            proposal_log = ProposalLog(Path(log_dir), logger) if log_dir else None
        except OSError as error:
            raise RequestError(
                f"ADVCAM_LOG_DIR is {log_dir!r}, which cannot be written to ({error.strerror}); mount a folder there "
                "that the function's user may write to, or unset it"
            ) from error
        device, engine = device_and_engine(environ)
        return cls(folder, device, settings, logger, max_pixels, time_limit_s, cvat_task, proposal_log, engine)

    @property
    def defects(self) -> list[str]:
        """The defects there are weights for, in the manifest's order."""
        return self.predictor.defects

    def describe(self) -> dict:
        """What runs here: version, weights, their terms, defects, device, defaults, limits, CVAT as far as it is asked."""
        return {
            "function": "advcam-defects",
            "version": __version__,
            "weights": self.weights.version,
            "terms": {
                "overall": self.weights.terms,
                "defects": {defect: config.terms for defect, config in self.weights.configs.items()},
            },
            "defects": self.defects,
            "device": self.device,
            "engines": {defect: engine.name for defect, engine in self.predictor.engines.items()},
            "defaults": {defect: self.effective(defect, self.settings) for defect in self.defects},
            "limits": {
                "max_megapixels": self.max_pixels / 1e6,
                "time_limit_s": self.time_limit_s,
                **{setting.key: setting.rule.limits for setting in SETTINGS if setting.key and setting.rule.limits},
            },
            "cvat": self.cvat_task.describe() if self.cvat_task else None,  # the last: deploy.sh leaves it out
        }

    def answer(self, request: Request, waited_s: float = 0.0, logged: bool = True) -> list[dict] | dict:
        """CVAT's answer to a parsed request: a detector's, or an interactor's where it has clicks.

        A photo that cannot be processed gives one `unprocessed` tag; an annotator's click on it costs no run, so
        that is a RequestError. A tag `notice` beside the proposals says that the settings are not the task's.

        Args:
            waited_s: how long ago the request arrived; the time limit counts from then, as CVAT's does.
            logged: whether the proposal log gets the answer; not that of a part of a photo.
        """
        if request.ignored:
            self.logger.warn(f"unknown keys ignored: {', '.join(request.ignored)}")
        started = time.monotonic()
        deadline = Deadline(self.time_limit_s - waited_s)
        try:
            deadline.check()
            height, width = image_size(request.image_bytes, self.max_pixels)
            check_memory(height, width)
            if not request.clicks:
                deadline = self.predictor.check_time(height, width, request.settings.defects or self.defects, deadline)
            image_rgb = decode_image(request.image_bytes, self.max_pixels)
            if request.clicks:
                answer, _ = self.outline(image_rgb, request, deadline)
            else:
                task = self.task_setting(request, image_rgb, started - waited_s, deadline)
                answer = self.propose(image_rgb, request.settings, deadline, task.changes)
        except Exception as error:
            reason = self.reason(error, waited_s)
            if reason is None:
                raise
            self.logger.error(f"unprocessed: {reason} ({error!r})")
            if request.clicks:
                raise RequestError(reason) from error
            if self.cvat_task:
                self.cvat_task.answered()
            return self.unprocessed(reason)
        height, width = image_rgb.shape[:2]
        if logged and not request.clicks:
            self.log(image_rgb, request.settings, task.changes, answer)
        what = "outline clicked" if request.clicks else f"{sum(s['type'] != 'tag' for s in answer)} proposals"
        self.logger.info(f"{what} on {width} x {height} in {time.monotonic() - started:.1f} s")
        if self.cvat_task and not request.clicks:
            self.cvat_task.answered(task)
            answer += _tag(NOTICE, task.notice) if task.notice else []
        return answer

    def log(self, image_rgb: np.ndarray, settings: Settings, changes: Changes, answer: list[dict]) -> None:
        """Write the answer for a photo (H, W, 3) uint8 to the proposal log, if there is one; arguments as of `propose`."""
        if not self.proposal_log:
            return
        in_force = {
            defect: self.effective(defect, changed(settings, changes.get(defect, {})))
            for defect in settings.defects or self.defects
        }
        height, width = image_rgb.shape[:2]
        pixels = image_hash(np.ascontiguousarray(image_rgb))
        try:
            self.proposal_log.append(pixels, width, height, self.weights.version, in_force, answer)
        except Exception as error:  # memory for a line of many masks: the answer itself is there
            self.logger.error(f"proposal log: this answer is not logged: {error!r}")

    def reason(self, error: Exception, waited_s: float = 0.0) -> str | None:
        """Why a photo cannot be processed, in words for its annotator; None for an error of the program."""
        if isinstance(error, ImageError):
            return str(error)
        if isinstance(error, TimeLimitError):
            needed_s = self.time_limit_s - waited_s + error.overrun_s
            if waited_s > self.time_limit_s / 2 and needed_s <= self.time_limit_s:
                return (
                    f"busy: {waited_s:.0f} of {self.time_limit_s:g} s went by before its turn; send fewer photos at "
                    "once, or give the function a GPU or more workers"
                )
            needed = math.ceil(needed_s) if error.overrun_s else ""
            fitting = f"{error.fitting} would fit; " if error.fitting else ""
            return f"too slow {needed}>{self.time_limit_s:g} s; {fitting}use a GPU, a smaller photo or fewer iterations"
        if not out_of_memory(error):
            return None
        what = str(error) if str(error).startswith("out of memory: ") else "out of memory"
        return f"{what}; use a smaller photo, or give the function more memory"

    def task_setting(
        self, request: Request, image_rgb: np.ndarray, arrived_s: float, deadline: Deadline
    ) -> TaskSetting:
        """T and shape per defect where the task in CVAT asks for its own. CVAT never sends T: a request with it has no task."""
        if self.cvat_task is None or request.iterations_given:
            return TaskSetting({})
        wanted = request.settings.defects or self.defects
        steps = {defect: self.effective(defect, request.settings)["iterations"] for defect in wanted}
        default = Defaults(steps, request.settings.shape)
        return self.cvat_task.setting(request.image_bytes, image_rgb, default, arrived_s, deadline.at)

    def unprocessed(self, reason: str) -> list[dict]:
        """The tag that tells an annotator which frame was not processed and why."""
        return _tag(UNPROCESSED, reason)

    def outline(self, image_rgb: np.ndarray, request: Request, deadline: Deadline = NO_DEADLINE) -> tuple[dict, str]:
        """The interactor's answer to a request with clicks, and the defect that was outlined, see `outline_clicked`.

        T is the request's or the deployment's, else 0: an annotator waits for a click.
        """
        settings = {}
        for defect in request.settings.defects or self.defects:
            effective = self.effective(defect, request.settings)
            steps = request.settings.iterations or 0
            own = (effective[name] for name in ("cam_threshold", "tolerance_px", "hole_share"))
            settings[defect] = ClickSettings(steps, *own)
        answer, defect = outline_clicked(self.predictor, image_rgb, request.clicks, settings, deadline)
        self.logger.info(f"{defect} clicked")
        return answer, defect

    def propose(
        self,
        image_rgb: np.ndarray,
        settings: Settings,
        deadline: Deadline = NO_DEADLINE,
        changes: Changes | None = None,
    ) -> list[dict]:
        """Proposals for one photo as CVAT shapes, defect by defect, the surest and largest first.

        What could not be used is left out, and a tag `notice` says so: proposals beyond `max_proposals`, those with
        outlines too ragged to edit, and of masks that are too large together the less confident ones.

        Args:
            image_rgb: (H, W, 3) uint8.
            settings: None fields mean the manifest's value for each defect.
            changes: T and shape of some of the defects, before those of the settings; T "auto" for the manifest's.

        Raises:
            ImageError: out of memory even with one tile at a time.
            TimeLimitError: the deadline passed, or would.
        """
        wanted = settings.defects or self.defects
        changes = changes or {}
        in_force = {defect: self.effective(defect, changed(settings, changes.get(defect, {}))) for defect in wanted}
        names = ("iterations", "threshold", "cam_threshold")
        how = {defect: tuple(effective[name] for name in names) for defect, effective in in_force.items()}
        self.predictor.check_all(image_rgb, how, deadline)
        deadline.begin()
        found = self.within_memory(lambda: self._found(image_rgb, how, deadline))
        return self.shapes(found, in_force, photo_key(image_rgb), image_rgb.shape[:2], deadline)

    def shapes(
        self,
        found: Mapping[str, Sequence[Proposal]],
        in_force: Mapping[str, dict],
        photo: tuple[str, tuple[int, ...]],
        image_size: tuple[int, int],
        deadline: Deadline = NO_DEADLINE,
    ) -> list[dict]:
        """Proposals as `propose` answers them.

        Args:
            found: of every defect, the surest and largest first.
            in_force: settings of every defect.
            photo: its `photo_key`.
            image_size: height and width, px.

        Raises:
            TimeLimitError: the deadline passed.
        """
        chosen: list[tuple[Proposal, str, str]] = []
        left_out = []
        for defect, effective in in_force.items():
            smooth = [one for one in found[defect] if outline_length_px(one.component.mask) <= MAX_OUTLINE_PX]
            if len(smooth) < len(found[defect]):
                left_out.append(f"{len(found[defect]) - len(smooth)} too ragged: {defect}; raise cam_threshold")
            most = effective["max_proposals"]
            if len(smooth) > most:
                left_out.append(f"{len(smooth) - most} more {defect}; raise threshold or max_proposals")
            digest = self.name_digest(photo, defect, effective)
            for rank, proposal in enumerate(smooth[:most]):
                chosen.append((proposal, defect, proposal_id(digest, defect, rank)))
        fitting = [one for one, fits in zip(chosen, masks_that_fit(chosen, in_force)) if fits]
        if len(fitting) < len(chosen):
            left_out.append(f"{len(chosen) - len(fitting)} masks too large: use shape polygon")
        shapes = [cvat_shape(*one, in_force[one[1]], image_size, deadline) for one in fitting]
        return shapes + (_tag(NOTICE, ". ".join(left_out)) if left_out else [])

    def name_digest(self, photo: tuple[str, tuple[int, ...]], defect: str, effective: dict) -> str:
        """What the names of a defect's proposals on a photo are made of, see `proposal_id`.

        Args:
            photo: its `photo_key`.
            effective: settings in force for the defect.
        """
        return json.dumps([*photo, self.weights.configs[defect].sha256, effective])

    def _found(
        self, image_rgb: np.ndarray, how: Mapping[str, tuple[int, float, float]], deadline: Deadline
    ) -> dict[str, list[Proposal]]:
        """Proposals of every defect; `how`: T, minimum confidence, theta."""
        pyramid, found = Pyramid(image_rgb), {}
        for defect, (steps, threshold, cam_threshold) in how.items():
            maps = self.predictor.maps(pyramid, defect, deadline)
            config = self.weights.configs[defect]
            found[defect] = proposals_for(maps, config, [steps], threshold, cam_threshold)[steps]
        return found

    def within_memory(self, work):
        """What `work` returns; it is done again with half the tiles at once as long as memory does not suffice."""
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # Here, and not above, the failed attempt's tensors are gone.
            self.predictor.release_memory()
            if self.predictor.batch == 1:
                raise ImageError(f"out of memory on {self.device}, one tile at a time; use a smaller photo")
            self.predictor.batch //= 2
            self.logger.warn(f"out of memory: once more with {self.predictor.batch} tiles at once")

    def effective(self, defect: str, settings: Settings) -> dict:
        """Settings in force for one defect: the given ones, else the label's shape and the manifest's values."""
        config = self.weights.configs[defect]
        manifest = {
            "iterations": config.iterations,
            "threshold": config.threshold,
            "cam_threshold": config.cam_threshold,
            "shape": MASK if defect in self.masks else "polygon",
            "tolerance_px": config.tolerance_px,
            "hole_share": config.hole_share,
            "max_proposals": MAX_PROPOSALS,
        }
        given = dataclasses.asdict(settings)
        return manifest | {key: given[key] for key in manifest if given[key] is not None}


def photo_key(image_rgb: np.ndarray) -> tuple[str, tuple[int, ...]]:
    """Names a photo (H, W, 3) uint8 RGB by its pixels, for `ModelHandler.name_digest`."""
    return hashlib.blake2s(np.ascontiguousarray(image_rgb), digest_size=16).hexdigest(), image_rgb.shape


def cvat_shape(
    proposal: Proposal, defect: str, name: str, effective: dict, image_size: tuple[int, int], deadline: Deadline
) -> dict:
    """One element of the answer to CVAT.

    Args:
        defect: the label.
        name: of the proposal, see `proposal_id`.
        effective: settings in force.
        image_size: height and width, px.

    Returns:
        label, type, points, mask (only for masks, which carry the polygon too, for CVAT's "Convert masks to polygons")
        and attributes, all built-in types ready for JSON. CVAT keeps attribute values only if they are strings and, for
        a number attribute, digits alone.

    Raises:
        TimeLimitError: the deadline passed.
    """
    height, width = image_size
    attributes = {
        "confidence": round(100 * proposal.confidence),
        "iterations": effective["iterations"],
        "proposal": name,
    }
    simplification = effective["tolerance_px"], effective["hole_share"]
    element = {
        "label": defect,
        "type": effective["shape"],
        "points": polygon_points_xy(proposal.component, *simplification, width, height, deadline),
        "attributes": [{"name": key, "value": str(value)} for key, value in attributes.items()],
    }
    if effective["shape"] == "mask":
        element["mask"] = mask_crop(proposal.component)
    return element


def masks_that_fit(chosen: Sequence[tuple[Proposal, str, str]], in_force: Mapping[str, dict]) -> list[bool]:
    """Which proposals can be answered, the most confident first: masks take MAX_MASK_PIXELS at the most, polygons all."""
    fits, room = [True] * len(chosen), MAX_MASK_PIXELS
    for index in sorted(range(len(chosen)), key=lambda index: -chosen[index][0].confidence):
        proposal, defect, _ = chosen[index]
        size = proposal.component.mask.size if in_force[defect]["shape"] == "mask" else 0
        fits[index] = size <= room
        room -= size if fits[index] else 0
    return fits


def _tag(label: str, reason: str) -> list[dict]:
    """A tag with a text for the annotator, its most important words first: CVAT shows about 20 characters."""
    attributes = [{"name": "reason", "value": reason[:4096]}]  # CVAT fails a run over a longer text
    return [{"label": label, "type": "tag", "attributes": attributes}]


def changed(settings: Settings, changes: Mapping[str, int | str]) -> Settings:
    """The settings with one defect's own T and shape; T "auto", of labels of earlier versions, is the manifest's."""
    return dataclasses.replace(settings, **{key: None if value == "auto" else value for key, value in changes.items()})


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory did not suffice, on the GPU or the host."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    phrases = ("out of memory", "can't alloc", "failed to alloc", "not enough memory", "insufficient memory", "alloc_failed")
    return any(phrase in text for phrase in (*phrases, "bad_alloc", "can't start new thread"))  # a thread's stack is memory too
