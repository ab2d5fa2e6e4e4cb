"""ModelHandler: weights -> networks; image and settings -> CVAT shapes. One photo, one direction:

pixels -> score map -> gate -> climb -> normalised map -> theta, closing, area -> snap -> components -> shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from defectcam import __version__
from defectcam.cam import score_sums
from defectcam.cvat_task import CvatTask, TaskSetting
from defectcam.interactor import outline_clicked
from defectcam.memory import keep_freed_memory
from defectcam.network import DefectNet
from defectcam.pace import Pace
from defectcam.postprocess import binarise
from defectcam.proposal_log import ProposalLog, image_hash
from defectcam.proposals import (
    Component,
    component_confidence,
    component_features,
    cvat_shape,
    find_components,
    outline_length_px,
)
from defectcam.request import (
    ITERATIONS_MAX,
    ImageError,
    Request,
    RequestError,
    Settings,
    decode_image,
    image_size,
    settings_from_env,
)
from defectcam.snap import snap
from defectcam.tiling import (
    OUTLINE_CORE_PX,
    TimeLimitError,
    at_photo_scale,
    at_working_scale,
    climbed_map,
    outer_px,
    stitched_score_map,
    tile_grid,
)
from defectcam.time_needed import check_photo, check_size, plain_px
from defectcam.weights import DefectWeights, load_weights, read_manifest

WEIGHTS_DIR = Path(__file__).parent / "weights"
MAX_MEGAPIXELS = 64  # 8000 x 8000
TIME_LIMIT_S = 100  # CVAT gives up after 120 s, and the answer must travel too
IDLE_S = 300  # longer than between two photos of a run or two clicks of an annotator
MAX_OUTLINE_PX = 500_000  # longer outlines of one component take minutes to simplify and no one could edit them
MAX_MASK_PIXELS = 32_000_000  # of all boxes together: CVAT's masks are lists of numbers, 2 bytes each in JSON
PILLOW_LIMIT_MP = 178  # Pillow refuses larger images by itself
BATCH = {"cpu": 1, "cuda": 8}  # tiles at once: a CPU gains nothing from more


@dataclass(frozen=True)
class Maps:
    """What the network says of one photo and defect, at working scale: score map and climbed, normalised map,
    (H, W) float32."""

    score: np.ndarray
    climbed: np.ndarray


class OnDemand:
    """Networks that are on their device only while they are in use, and on the CPU once nobody asked for a while.

    So deployments of one image share a GPU, although only some of them are busy. What a process keeps there in
    any case, once it has used it, is CUDA's own context. Moving changes no bit of the weights.

    A context manager: inside `with`, in any number of threads at once, the networks are on the device.

    Args:
        networks: on the CPU.
        device: where they are used.
        idle_s: seconds after the last use at which they leave the device.
    """

    def __init__(self, networks: Iterable[torch.nn.Module], device: str, idle_s: float) -> None:
        self.networks = list(networks)
        self.device = device
        self.idle_s = idle_s
        self.users = 0
        self.lock = threading.Lock()
        self.timer = threading.Timer(0, self._leave)

    def __enter__(self) -> None:
        with self.lock:
            self.timer.cancel()
            self.users += 1
            try:
                if self.users == 1:
                    self._move(self.device)
            except BaseException:  # out of memory half-way: what did arrive must leave again
                self._release()
                raise

    def __exit__(self, *_) -> None:
        with self.lock:
            self._release()

    def _release(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.timer = threading.Timer(self.idle_s, self._leave)
            self.timer.daemon = True  # nobody waits for it at the end of the process
            self.timer.start()

    def _leave(self) -> None:
        with self.lock:
            # A timer may have run out just before it was cancelled: then it is no longer the one that counts.
            if self.users == 0 and threading.current_thread() is self.timer:
                self._move("cpu")
                torch.cuda.empty_cache()  # does nothing in a process that has not used a GPU

    def _move(self, device: str) -> None:
        for network in self.networks:
            network.to(device)


class ModelHandler:
    """All defects' networks, used on one device, and the deployment's settings.

    Args:
        weights_dir: folder with manifest.json, see `defectcam.weights`.
        device: "cuda" or "cpu".
        settings: of the deployment; the request's come before them, the manifest's after.
        max_pixels: larger photos are not processed.
        time_limit_s: a photo whose answer takes longer, from its arrival on, gets no proposals but the reason.
        logger: with `info`, `warn` and `error`, as Nuclio's.
        idle_s: see `OnDemand`.
        cvat_task: who to ask for the climbing steps set on the task in CVAT.
        proposal_log: where every answer to a detector's request is written to.

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
        idle_s: float = IDLE_S,
        cvat_task: CvatTask | None = None,
        proposal_log: ProposalLog | None = None,
    ) -> None:
        # The same photo must give the same answer, and proposals keep their names: no TF32, no search for the
        # fastest algorithm of the day.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        keep_freed_memory()
        self.weights = load_weights(weights_dir, "cpu")
        networks = [*self.weights.networks.values(), *self.weights.outlines.values()]
        self.networks_on_device = OnDemand(networks, device, idle_s)
        self.device = device
        self.settings = settings
        self.max_pixels = max_pixels
        self.time_limit_s = time_limit_s
        self.logger = logger
        self.cvat_task = cvat_task
        self.proposal_log = proposal_log
        self.batch = BATCH[device]
        outlines = {f"{defect} outline": network for defect, network in self.weights.outlines.items()}
        self.pace = Pace(self.weights.networks | outlines)
        if device == "cpu":  # a GPU's is learnt from the first photo: nothing goes there before
            for name in self.pace.networks:
                self.pace.measure(name)

    @classmethod
    def from_env(cls, environ: Mapping[str, str], logger) -> ModelHandler:
        """Configure from ADVCAM_* variables; a bad value raises RequestError naming variable and remedy."""
        folder = Path(environ.get("ADVCAM_WEIGHTS") or WEIGHTS_DIR)
        _, facts = read_manifest(folder)
        settings = settings_from_env(environ, list(facts))
        max_pixels = int(1e6 * positive_number(environ, "ADVCAM_MAX_MEGAPIXELS", MAX_MEGAPIXELS, PILLOW_LIMIT_MP))
        time_limit_s = positive_number(environ, "ADVCAM_TIME_LIMIT", TIME_LIMIT_S, 86_400)
        idle_s = positive_number(environ, "ADVCAM_IDLE_SECONDS", IDLE_S, 86_400)
        cvat_task = CvatTask.from_env(environ, logger)
        log_dir = environ.get("ADVCAM_LOG_DIR")
        try:
            proposal_log = ProposalLog(Path(log_dir), logger) if log_dir else None
        except OSError as error:
            raise RequestError(
                f"ADVCAM_LOG_DIR is {log_dir!r}, which cannot be written to ({error.strerror}); mount a folder there "
                "that the function's user may write to, or unset it"
            ) from error
        return cls(
            folder, choose_device(environ), settings, logger, max_pixels, time_limit_s, idle_s, cvat_task, proposal_log
        )

    @property
    def defects(self) -> list[str]:
        """The defects there are weights for, in the manifest's order."""
        return list(self.weights.facts)

    def describe(self) -> dict:
        """What runs here: version, weights, defects, device, defaults and limits in force, CVAT as far as it is asked."""
        return {
            "function": "advcam-defects",
            "version": __version__,
            "weights": self.weights.version,
            "defects": self.defects,
            "device": self.device,
            "defaults": {defect: self.effective(defect, self.settings) for defect in self.defects},
            "limits": {
                "max_megapixels": self.max_pixels / 1e6,
                "time_limit_s": self.time_limit_s,
                "iterations": [0, ITERATIONS_MAX],
            },
            "cvat": self.cvat_task.describe() if self.cvat_task else None,  # the last: deploy.sh leaves it out
        }

    def answer(self, request: Request, waited_s: float = 0.0) -> list[dict] | dict:
        """CVAT's answer to a parsed request: a detector's, or an interactor's where it has clicks.

        A photo that cannot be processed gives one `unprocessed` tag; an annotator's click on it costs no run, so
        that is a RequestError. A tag `notice` beside the proposals says that T is not the task's.

        Args:
            waited_s: how long ago the request arrived; the time limit counts from then, as CVAT's does.
        """
        if request.ignored:
            self.logger.warn(f"unknown keys ignored: {', '.join(request.ignored)}")
        started = time.monotonic()
        deadline = started + self.time_limit_s - waited_s
        try:
            if started > deadline:
                raise TimeLimitError
            height, width = image_size(request.image_bytes, self.max_pixels)
            if not request.clicks:
                check_size(self, height, width, request.settings.defects or self.defects, deadline)
            image_rgb = decode_image(request.image_bytes, self.max_pixels)
            if request.clicks:
                answer = outline_clicked(self, image_rgb, request.clicks, request.settings, deadline)
            else:
                task = self.task_setting(request, image_rgb, started - waited_s, deadline)
                answer = self.propose(image_rgb, request.settings, deadline, task.iterations)
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
        if self.proposal_log and not request.clicks:
            in_force = {
                defect: self.effective(defect, with_iterations(request.settings, defect, task.iterations))
                for defect in request.settings.defects or self.defects
            }
            pixels = image_hash(np.ascontiguousarray(image_rgb))
            try:
                self.proposal_log.append(pixels, width, height, self.weights.version, in_force, answer)
            except Exception as error:  # memory for a line of many masks: the answer itself is there
                self.logger.error(f"proposal log: this answer is not logged: {error!r}")
        what = "outline clicked" if request.clicks else f"{sum(s['type'] != 'tag' for s in answer)} proposals"
        self.logger.info(f"{what} on {width} x {height} in {time.monotonic() - started:.1f} s")
        if self.cvat_task and not request.clicks:
            self.cvat_task.answered(task)
            answer += _tag("notice", task.notice) if task.notice else []
        return answer

    def reason(self, error: Exception, waited_s: float = 0.0) -> str | None:
        """Why a photo cannot be processed, in words for its annotator; None for an error of the program."""
        if isinstance(error, ImageError):
            return str(error)
        if isinstance(error, TimeLimitError):
            needed_s = self.time_limit_s - waited_s + error.late_s
            if waited_s > self.time_limit_s / 2 and needed_s <= self.time_limit_s:
                return (
                    f"busy: {waited_s:.0f} of {self.time_limit_s:g} s went by before its turn; send fewer photos at "
                    "once, or give the function a GPU or more workers"
                )
            needed = math.ceil(needed_s) if error.late_s else ""
            fitting = f"{error.fitting} would fit; " if error.fitting else ""
            return f"too slow {needed}>{self.time_limit_s:g} s; {fitting}use a GPU, a smaller photo or fewer iterations"
        return "out of memory; use a smaller photo" if out_of_memory(error) else None

    def task_setting(
        self, request: Request, image_rgb: np.ndarray, arrived_s: float, deadline: float
    ) -> TaskSetting:
        """T per defect where the task in CVAT asks for its own and the request does not."""
        if self.cvat_task is None or request.iterations_given:
            return TaskSetting({})
        wanted = request.settings.defects or self.defects
        default = {defect: self.effective(defect, request.settings)["iterations"] for defect in wanted}
        return self.cvat_task.setting(request.image_bytes, image_rgb, default, arrived_s, deadline)

    def unprocessed(self, reason: str) -> list[dict]:
        """The tag that tells an annotator which frame was not processed and why."""
        return _tag("unprocessed", reason)

    def propose(
        self,
        image_rgb: np.ndarray,
        settings: Settings,
        deadline: float = math.inf,
        iterations: Mapping[str, int | str] | None = None,
    ) -> list[dict]:
        """Proposals for one photo as CVAT shapes, defect by defect, each from top to bottom.

        What could not be used is left out, and a tag `notice` says so: components with outlines too ragged to edit,
        and of masks that are too large together the less confident ones.

        Args:
            image_rgb: (H, W, 3) uint8.
            settings: None fields mean the manifest's value for each defect.
            deadline: on the clock of time.monotonic, s.
            iterations: T for some of the defects, before that of the settings.

        Raises:
            ImageError: out of memory even with one tile at a time.
            TimeLimitError: the deadline passed.
        """
        height, width = image_rgb.shape[:2]
        pixels_digest = hashlib.blake2s(np.ascontiguousarray(image_rgb), digest_size=16).hexdigest()
        found: list[tuple[Component, float, str, dict, str]] = []
        ragged: Counter = Counter()
        wanted = settings.defects or self.defects
        own_settings = {defect: with_iterations(settings, defect, iterations or {}) for defect in wanted}
        in_force = {defect: self.effective(defect, own) for defect, own in own_settings.items()}
        check_photo(self, image_rgb, in_force, deadline)
        least_s = [self.pace.fastest.get(defect, 0.0) * plain_px(self, defect, height, width) for defect in wanted]
        for index, defect in enumerate(wanted):
            own, effective = own_settings[defect], in_force[defect]
            digest = json.dumps([pixels_digest, image_rgb.shape, self.weights.facts[defect].sha256, effective])
            for component, confidence in self.components(image_rgb, defect, own, deadline - sum(least_s[index + 1 :])):
                if time.monotonic() > deadline:
                    raise TimeLimitError
                if outline_length_px(component.mask) > MAX_OUTLINE_PX:
                    ragged[defect] += 1
                else:
                    found.append((component, confidence, defect, effective, digest))
        fitting = [one for one, fits in zip(found, _masks_that_fit(found)) if fits]
        shapes = [
            cvat_shape(
                component,
                defect=defect,
                confidence=confidence,
                iterations=effective["iterations"],
                digest=digest,
                shape=effective["shape"],
                tolerance_px=effective["tolerance_px"],
                hole_share=effective["hole_share"],
                image_width=width,
                image_height=height,
                deadline=deadline,
            )
            for component, confidence, defect, effective, digest in fitting
        ]
        left_out = []
        if ragged:
            left_out.append(f"{ragged.total()} too ragged: {', '.join(ragged)}; raise cam_threshold")
        if len(fitting) < len(found):
            left_out.append(f"{len(found) - len(fitting)} masks too large: use shape polygon")
        return shapes + (_tag("notice", ". ".join(left_out)) if left_out else [])

    def components(
        self, image_rgb: np.ndarray, defect: str, settings: Settings, deadline: float = math.inf
    ) -> list[tuple[Component, float]]:
        """Components of one defect with their confidence (0..1), those below the threshold left out."""
        effective = self.effective(defect, settings)
        fact, bias = self.weights.facts[defect], self.weights.networks[defect].head.bias.item()
        working_image = at_working_scale(image_rgb, fact.working_scale)
        maps = self.maps(working_image, defect, effective, deadline)
        outline_logits = self.outline_logits(working_image, defect, deadline)
        mask = defect_mask(working_image, maps.climbed, fact, effective, outline_logits, deadline)
        logits = outline_logits(mask) if outline_logits and mask.any() else None
        mask = at_photo_scale(mask, *image_rgb.shape[:2])
        return confident_components(mask, maps.score, bias, fact, effective["threshold"], logits)

    def mask(
        self, working_image: np.ndarray, climbed: np.ndarray, defect: str, effective: dict, deadline: float = math.inf
    ) -> np.ndarray:
        """`defect_mask` with the defect's outline network."""
        outline_logits = self.outline_logits(working_image, defect, deadline)
        return defect_mask(working_image, climbed, self.weights.facts[defect], effective, outline_logits, deadline)

    def outline_logits(
        self, working_image: np.ndarray, defect: str, deadline: float = math.inf
    ) -> Callable[[np.ndarray], np.ndarray] | None:
        """From where they are wanted, (H, W) bool, to the outline network's logits (H, W); None without a network.

        They are computed once, for what is asked first: later regions must lie within the first.
        """
        outline = self.weights.outlines.get(defect)
        if outline is None:
            return None

        computed: list[np.ndarray] = []

        def seconds(tile_px: float) -> float:
            return self.pace.seconds(f"{defect} outline", tile_px, deadline - time.monotonic())

        def logits(wanted: np.ndarray) -> np.ndarray:
            if not computed:
                with self.networks_on_device:
                    scores = stitched_score_map(
                        outline,
                        working_image,
                        core_px=OUTLINE_CORE_PX,
                        deadline=deadline,
                        region=wanted,
                        seconds=seconds,
                    )
                computed.append(scores + outline.head.bias.item())
            return computed[0]

        return logits

    def maps(self, image_rgb: np.ndarray, defect: str, effective: dict, deadline: float = math.inf) -> Maps:
        """Score map and climbed map of a photo at working scale; halves the batch as long as memory does not suffice."""
        network: DefectNet = self.weights.networks[defect]
        fact: DefectWeights = self.weights.facts[defect]
        gate, batch = self.gate(defect, effective), self.batch
        tile_px = outer_px(tile_grid(*image_rgb.shape[:2], network.halo_px, network.stride_px))

        def seconds(tile_px: float) -> float:
            return self.pace.seconds(defect, tile_px, deadline - time.monotonic())

        while True:
            try:
                with self.networks_on_device:
                    started = time.monotonic()
                    score = stitched_score_map(network, image_rgb, batch, deadline=deadline, seconds=seconds)
                    self.pace.learn(defect, time.monotonic() - started, tile_px)
                    climbed = climbed_map(
                        network,
                        image_rgb,
                        score,
                        effective["iterations"],
                        fact.climb_parameters,
                        fact.cam_max,
                        effective["cam_threshold"],
                        fact.window_px,
                        gate,
                        batch,
                        deadline=deadline,
                        seconds=seconds,
                    )
                return Maps(score, climbed)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # Here, and not above, the failed attempt's tensors are gone.
            if self.device == "cuda":
                torch.cuda.empty_cache()
            if batch == 1:
                raise ImageError(f"out of memory on {self.device}, one tile at a time; use a smaller photo")
            batch //= 2
            self.logger.warn(f"out of memory: once more with {batch} tiles at once")

    def gate(self, defect: str, effective: dict) -> float:
        """From which probability of a window on its tile is climbed, 0..1."""
        fact = self.weights.facts[defect]
        # Whoever asks for fainter proposals than the manifest has fainter places climbed too.
        return fact.gate * min(1.0, effective["threshold"] / max(fact.threshold, 1e-6))

    def effective(self, defect: str, settings: Settings) -> dict:
        """Settings in force for one defect: the given ones, else the manifest's."""
        fact = self.weights.facts[defect]
        manifest = {
            "iterations": fact.iterations,
            "threshold": fact.threshold,
            "cam_threshold": fact.cam_threshold,
            "shape": "polygon",
            "tolerance_px": fact.tolerance_px,
            "hole_share": fact.hole_share,
        }
        given = {key: value for key, value in asdict(settings).items() if key in manifest and value is not None}
        return manifest | given


def _tag(label: str, reason: str) -> list[dict]:
    """A tag with a text for the annotator, its most important words first: CVAT shows about 20 characters."""
    attributes = [{"name": "reason", "value": reason[:4096]}]  # CVAT fails a run over a longer text
    return [{"label": label, "type": "tag", "attributes": attributes}]


def with_iterations(settings: Settings, defect: str, iterations: Mapping[str, int | str]) -> Settings:
    """The settings with the defect's own T, where it has one."""
    return replace(settings, iterations=iterations.get(defect, settings.iterations))


def defect_mask(
    working_image: np.ndarray,
    climbed: np.ndarray,
    fact: DefectWeights,
    effective: dict,
    outline_logits: Callable[[np.ndarray], np.ndarray] | None,
    deadline: float = math.inf,
) -> np.ndarray:
    """From the climbed map to the defect's pixels, (H, W) bool at working scale: theta, closing, area, snap."""
    mask = binarise(climbed, effective["cam_threshold"], fact.closing_radius_px, fact.min_area_px)
    return snap(working_image, mask, fact.snap, outline_logits, deadline) if fact.snap else mask


def _masks_that_fit(found: Sequence[tuple[Component, float, str, dict, str]]) -> list[bool]:
    """Which components can be answered, the most confident first: masks take MAX_MASK_PIXELS at the most, polygons all."""
    fits, room = [True] * len(found), MAX_MASK_PIXELS
    for index in sorted(range(len(found)), key=lambda index: -found[index][1]):
        component, _, _, effective, _ = found[index]
        size = component.mask.size if effective["shape"] == "mask" else 0
        fits[index] = size <= room
        room -= size if fits[index] else 0
    return fits


def confident_components(
    mask: np.ndarray,
    score: np.ndarray,
    bias: float,
    fact: DefectWeights,
    threshold: float,
    outline_logits: np.ndarray | None,
) -> list[tuple[Component, float]]:
    """The components of a mask at photo scale with their confidence (0..1), those below `threshold` left out."""
    sums = score_sums(score)
    found = []
    for component in find_components(mask):
        features = component_features(component, sums, bias, fact.window_px, fact.working_scale, outline_logits)
        confidence = component_confidence(features, fact.confidence_weights)
        if confidence >= threshold:
            found.append((component, confidence))
    return found


def choose_device(environ: Mapping[str, str]) -> str:
    """ADVCAM_DEVICE, else the GPU where there is one."""
    wanted = environ.get("ADVCAM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise RequestError(f"ADVCAM_DEVICE is {wanted!r}; allowed are cpu and cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RequestError("ADVCAM_DEVICE is 'cuda' but torch sees no GPU; set cpu, or give the container a GPU")
    return wanted


def positive_number(environ: Mapping[str, str], variable: str, default: float, largest: float) -> float:
    """A number above 0 from the environment, or the default; RequestError for anything else."""
    text = environ.get(variable) or str(default)
    try:
        number = float(text)
        if not 0 < number <= largest:
            raise ValueError
    except ValueError:
        raise RequestError(f"{variable} is {text!r}, but must be a number above 0, at most {largest:g}") from None
    return number


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory did not suffice, on the GPU or the host."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "insufficient memory", "alloc_failed")
    return any(phrase in text for phrase in (*phrases, "can't start new thread"))  # a thread's stack is memory too
