"""What the try-out page keeps of its photos, so that its sliders need no network: pixels and maps, in memory.

Each defect's network reads a photo once, and one climb gives the maps of all STEPS. Of the maps only the parts stay where
a probability is above LEAST_THETA. So whatever threshold and theta the page asks for, the proposals are those of the
deployed function, and they are there at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from defectcam.deadline import NO_DEADLINE, Deadline
from defectcam.handler import ModelHandler, photo_key
from defectcam.image import decode_image, image_size
from defectcam.memory import check_memory
from defectcam.predict import CELL_PX, STEPS, any_of_cells, climb_around, extended, find_cores
from defectcam.proposal_log import image_hash
from defectcam.proposals import LEVELS_ASKED, Component, Proposal, find_components, probability
from defectcam.pyramid import UNREAD_LOGIT, PhotoMaps, Pyramid
from defectcam.settings import RequestError, Settings
from defectcam.weights import DefectConfig

LEAST_THETA = 0.1  # or a defect's own, where that is lower
HEAT_PX = 1600  # longer side of heat maps
STORE_MB = 1500  # of all photos; the one that was asked for last stays, however large


class Cancelled(Exception):
    """The browser has cancelled the request."""


class Gone(LookupError):
    """A photo that was never sent, or dropped."""


class Job(Deadline):
    """Work without a time limit that tells how far it is and can be cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled, self.total_px, self.done_px = False, 0.0, 0.0

    @property
    def share(self) -> float:
        """What is done of the work that is known of, 0..1."""
        return min(self.done_px / self.total_px, 1.0) if self.total_px else 0.0

    def check(self) -> None:
        """Raise Cancelled where that is due."""
        if self.cancelled:
            raise Cancelled

    def planned(self, tile_px: float) -> None:
        self.total_px += tile_px

    def done(self, tile_px: float) -> None:
        self.done_px += tile_px
        self.check()


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a photo with possible regions; `find_cores` and `extended` take it for a photo's maps.

    Attributes:
        left, top: of its upper left corner in the photo, px.
        logits: T -> merged map (h, w) float32, UNREAD_LOGIT where another part begins.
        levels: scale -> plain map of a level of the pyramid, as far as confidences need it.
    """

    left: int
    top: int
    logits: Mapping[int, np.ndarray]
    levels: Mapping[float, np.ndarray]
    deadline = NO_DEADLINE

    def merged(self, steps: int = 0) -> np.ndarray:
        return self.logits[steps]

    def in_photo(self, one: Proposal) -> Proposal:
        """A proposal of this part in the photo's coordinates."""
        component = one.component
        return Proposal(Component(component.mask, component.left + self.left, component.top + self.top), one.confidence)

    @property
    def size_bytes(self) -> int:
        return sum(values.nbytes for values in (*self.logits.values(), *self.levels.values()))


def parts_of(
    merged: Mapping[int, np.ndarray], levels: Mapping[float, np.ndarray], config: DefectConfig, theta: float
) -> list[Part]:
    """The parts of a photo in which a region at `theta` or higher may lie.

    Args:
        merged: T -> merged map of the photo, (H, W) float32.
        levels: as `PhotoMaps.levels`.
    """
    cells = np.logical_or.reduce([any_of_cells(one > config.least_logit(theta)) for one in merged.values()])
    margin = -(-config.cleaning.reach_px // CELL_PX)
    near = cv2.dilate(cells.view(np.uint8), np.ones((2 * margin + 1, 2 * margin + 1), np.uint8))
    found = []
    for component in find_components(near):
        x0, y0 = component.left * CELL_PX, component.top * CELL_PX
        ends = zip((y0, x0), component.mask.shape, merged[0].shape)
        y1, x1 = (min(start + CELL_PX * count, end) for start, count, end in ends)
        inside = component.mask.repeat(CELL_PX, 0).repeat(CELL_PX, 1)[: y1 - y0, : x1 - x0]
        logits = {T: np.where(inside, one[y0:y1, x0:x1], np.float32(UNREAD_LOGIT)) for T, one in merged.items()}
        asked = {
            scale: levels[scale][int(y0 * scale) : int(np.ceil(y1 * scale)), int(x0 * scale) : int(np.ceil(x1 * scale))].copy()
            for scale in sorted(levels, reverse=True)[:LEVELS_ASKED]  # CELL_PX is a multiple of their pixels
        }
        found.append(Part(x0, y0, logits, asked))
    return found


@dataclass(eq=False)
class Photo:
    """A photo of the page.

    Attributes:
        id: its `image_hash`.
        file_bytes: its file.
        image_rgb: (H, W, 3) uint8.
        key: its `photo_key`.
        parts: defect -> the parts of its maps; empty before it was read.
        steps: defect -> the T that these have.
        heat: (defect, T) -> probability in 1/255, (h, w) uint8, reduced.
    """

    id: str
    file_bytes: bytes
    image_rgb: np.ndarray
    key: tuple
    parts: dict[str, list[Part]] = field(default_factory=dict)
    steps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    heat: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.image_rgb.shape[:2]

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        parts = (part.size_bytes for parts in self.parts.values() for part in parts)
        return len(self.file_bytes) + self.image_rgb.nbytes + sum(parts) + sum(one.nbytes for one in self.heat.values())

    def proposals(self, defect: str, config: DefectConfig, steps: int, threshold: float, theta: float) -> list[Proposal]:
        """As `predict.proposals_for` of the whole photo."""
        found = []
        for part in self.parts[defect]:
            cores = [core for core in find_cores(part, config, theta) if core.confidence >= threshold]
            own = extended(part, config, steps, cores, theta) if steps and cores else cores
            found += [part.in_photo(one) for one in own]
        found.sort(key=lambda one: (one.component.top, one.component.left, one.component.area_px))  # as `find_components`
        return sorted(found, key=lambda one: -one.confidence * one.component.area_px)

    def surest_pixel(self, defect: str, region: Component) -> tuple[int, int]:
        """The pixel (x, y) of a region with the highest plain map: what stays the same of it when settings change."""
        x0, y0, x1, y1 = region.box_xyxy
        best, place = -np.inf, (x0, y0)
        for part in self.parts[defect]:
            height, width = part.logits[0].shape
            top, left = y0 - part.top, x0 - part.left
            if 0 <= top and 0 <= left and y1 - part.top < height and x1 - part.left < width:
                inside = np.where(region.mask, part.logits[0][top : top + y1 - y0 + 1, left : left + x1 - x0 + 1], -np.inf)
                if inside.max() > best:
                    best, (y, x) = inside.max(), np.unravel_index(inside.argmax(), inside.shape)
                    place = x0 + int(x), y0 + int(y)
        return place


class Photos:
    """The photos of the page, the last asked for at the end; those asked for longest ago are dropped where memory is short.

    Args:
        model: the running function.
    """

    def __init__(self, model: ModelHandler, most_mb: int = STORE_MB) -> None:
        self.model, self.most_mb = model, most_mb
        self._photos: OrderedDict[str, Photo] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, photo_id: str) -> Photo:
        """A photo by its id.

        Raises:
            Gone: there is none.
        """
        with self._lock:
            if photo_id not in self._photos:
                raise Gone
            self._photos.move_to_end(photo_id)
            return self._photos[photo_id]

    def add(self, image_bytes: bytes) -> Photo:
        """Decode a photo; one that is known already keeps its maps.

        Raises:
            ImageError, MemoryError: it cannot be used.
        """
        check_memory(*image_size(image_bytes, self.model.max_pixels))
        image_rgb = np.ascontiguousarray(decode_image(image_bytes, self.model.max_pixels))
        photo = Photo(image_hash(image_rgb), image_bytes, image_rgb, photo_key(image_rgb))
        with self._lock:
            photo = self._photos.setdefault(photo.id, photo)
            self._photos.move_to_end(photo.id)
        self._drop()
        return photo

    def stages(self, photo: Photo, job: Job) -> Iterator[tuple[str, Callable[[], None]]]:
        """The work on a photo, stage by stage: (name, what does it). First all plain maps, then all climbs."""
        due = [defect for defect in self.model.defects if photo.steps.get(defect) != STEPS]
        pyramid, read = Pyramid(photo.image_rgb), {}

        def plain(defect: str) -> None:
            job.planned(self.model.predictor.plain_pixels(*photo.size, defect))
            read[defect] = self.model.predictor.maps(pyramid, defect, job)
            self._keep(photo, defect, read[defect], STEPS[:1])

        def climb(defect: str) -> None:
            maps, config, theta = read.pop(defect), self.model.weights.configs[defect], self.least_theta(defect)
            climb_around(maps, config, STEPS[1:], find_cores(maps, config, theta), theta)
            self._keep(photo, defect, maps, STEPS)

        for work, name in ((plain, "looking for {}"), (climb, "climbing for {}")):
            for defect in due:
                job.total_px = job.done_px = 0.0
                yield name.format(defect), lambda: work(defect)  # noqa: B023

    def least_theta(self, defect: str) -> float:
        """The lowest theta that the page can ask for."""
        return min(LEAST_THETA, self.model.effective(defect, self.model.settings)["cam_threshold"])

    def shapes(self, photo: Photo, steps: int, settings: Settings) -> list[dict]:
        """The function's answer to a photo at T = `steps`; settings of None are the deployment's or the weights'.

        Raises:
            RequestError: a theta below `least_theta`, or T that the photo has not been climbed to.
        """
        in_force, found = {}, {}
        for defect in settings.defects or self.model.defects:
            own = self.model.effective(defect, replace(settings, iterations=steps, shape="polygon"))
            if steps not in photo.steps.get(defect, ()):
                raise RequestError(f"the photo has no map of {defect} at T = {steps} yet")
            least = self.least_theta(defect)
            if own["cam_threshold"] < least:
                raise RequestError(f"cam_threshold is {own['cam_threshold']}, but must be {least} or more on this page")
            how = steps, own["threshold"], own["cam_threshold"]
            in_force[defect], found[defect] = own, photo.proposals(defect, self.model.weights.configs[defect], *how)
        return self.model.shapes(found, in_force, photo.key, photo.size)

    def _keep(self, photo: Photo, defect: str, maps: PhotoMaps, steps: tuple[int, ...]) -> None:
        config = self.model.weights.configs[defect]
        slope, intercept = config.platt
        scale = min(1.0, HEAT_PX / max(photo.size))
        merged = {T: maps.merged(T) for T in steps}
        for T, logits in merged.items():
            small = cv2.resize(logits, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            photo.heat[defect, T] = np.rint(255 * probability(slope * small + intercept)).astype(np.uint8)
        photo.parts[defect] = parts_of(merged, maps.levels, config, self.least_theta(defect))
        photo.steps[defect] = steps
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            while len(self._photos) > 1 and sum(one.size_bytes for one in self._photos.values()) > self.most_mb * 1e6:
                self._photos.popitem(last=False)
