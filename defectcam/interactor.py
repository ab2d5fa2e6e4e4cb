"""Clicks -> one outline: CVAT's interactor. Of every level of the pyramid only tiles near the clicks are read.

A person has clicked, so the question is not whether there is a defect but how far it reaches: no confidence is
asked for, and the answer is never empty. For every positive click the first of these that has something there:

1. the region of the map above the threshold that the clicks ask for;
2. the region above what the map says at the click itself, in the surroundings of the click: for a defect that the
   network overlooks;
3. a small disc at the click, for the annotator to see that nothing was found and to go on by hand.

The threshold of a region is theta, unless clicks ask for another one:

- A positive click outside of all regions lowers the threshold of a region that has another one. It is the highest at which
  both lie in one region, not far below theta. If there is none, the click counts by itself.
- A negative click in a region with positive ones raises its threshold as little as possible: until the positive ones lie in
  one region and no negative one does. If there is no such threshold, as where all of them are on the same ridge of the map,
  theta stays: what is nearer to the negative clicks is cut off, and what still hangs together with a positive one stays.

A region without a positive click is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from defectcam.deadline import NO_DEADLINE, Deadline, Progress
from defectcam.polygons import polygon_points_xy
from defectcam.postprocess import Cleaning, regions
from defectcam.predict import Predictor
from defectcam.proposals import find_components
from defectcam.pyramid import Pyramid
from defectcam.request import Clicks
from defectcam.settings import RequestError

NEAR_PX = 96  # so far around a click every level is read at the least, in px of the level
OVERLOOKED_RADIUS_PX = 64  # around a click where the network finds nothing
MOST_OF_RIM = 0.5  # of the rim of these surroundings; a crack crosses it in two places
OVERLOOKED_LOGITS = 1.0  # below what the map says there, a pixel may belong to it
# How far from a defect a click still means it, of the photo's longer side: 3 px of a screen that shows all of it.
REACH_SHARE = 1 / 500
LEAST_REACH_PX = 4
WIDEN_LOGITS = 2.0  # so far below theta, as log-odds, clicks lower the threshold at the most
STEP_LOGITS = 0.1  # of the thresholds that are tried, as log-odds
SEARCH_PX = 640  # larger regions are made so small for the search
BOX_SPACING_PX = 128  # of the points in a box that are looked at like clicks

Pixel = tuple[int, int]  # x, y
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in the photo, half-open, px


@dataclass(frozen=True)
class ClickSettings:
    """What is in force for one defect: T, theta, and the polygon's simplification."""

    iterations: int
    cam_threshold: float
    tolerance_px: float
    hole_share: float


def outline_clicked(
    predictor: Predictor,
    image_rgb: np.ndarray,
    clicks: Clicks,
    settings: Mapping[str, ClickSettings],
    deadline: Deadline = NO_DEADLINE,
) -> tuple[dict, str]:
    """CVAT's interactor answer.

    Args:
        image_rgb: (H, W, 3) uint8.
        clicks: at least one positive one, or a box. The box ends the outline; a positive click outside widens it.
        settings: of every defect that may be meant; the one whose map is surest at the clicks is outlined.

    Returns:
        `mask`, (H, W) uint8 0 or 1, not all 0; `points` [[x, y], ...] in px, a simplified polygon of its
        largest component, for annotators who convert masks to polygons. And the defect.

    Raises:
        RequestError: clicks outside the photo, or a positive and a negative one on the same pixel.
        TimeLimitError: the deadline passed.
    """
    height, width = image_rgb.shape[:2]
    positive = _pixels("pos_points", clicks.positive_xy, width, height)
    negative = _pixels("neg_points", clicks.negative_xy, width, height)
    if both := set(positive) & set(negative):
        raise RequestError(f"pos_points and neg_points are both on pixel {min(both)}: keep one of them")
    box = _box(clicks, positive, width, height)
    reach_px = max(LEAST_REACH_PX, round(REACH_SHARE * max(height, width)))
    near = list(positive)
    if clicks.box_xyxy:
        near += [(x, y) for y in _along(box[1], box[3]) for x in _along(box[0], box[2])]
    pyramid = Pyramid(image_rgb)

    looked_at = {name: predictor.plain_pixels(height, width, name, near) for name in settings if len(settings) > 1}
    # Beside what is looked at anyway.
    least = min(
        predictor.pixels_with_climb(height, width, name, own.iterations, near, NEAR_PX) - looked_at.get(name, 0)
        for name, own in settings.items()
    )
    defect = next(iter(settings))
    needed = looked_at | {defect: looked_at.get(defect, 0) + least}
    amount, unit = (len(positive), "clicks") if positive else ((box[2] - box[0]) * (box[3] - box[1]) / 1e6, "megapixels")
    deadline.check_work(predictor.throughput.seconds(needed, deadline.left_s()), amount, unit)
    known_px = sum(looked_at.values()) or predictor.plain_pixels(height, width, defect, near, NEAR_PX)
    deadline = Progress(deadline, known_px, amount, unit)  # what widens and climbs is planned there
    if looked_at:
        surest = -math.inf
        for name in settings:
            look = predictor.maps(pyramid, name, deadline, near)
            sure = _surest(look.merged(), predictor, name, near, reach_px)
            if sure > surest:
                surest, defect, maps = sure, name, look
        maps.widen(NEAR_PX)
    else:
        maps = predictor.maps(pyramid, defect, deadline, near, NEAR_PX)
    config, chosen_settings = predictor.weights.configs[defect], settings[defect]
    steps = chosen_settings.iterations
    if steps:
        maps.climb([steps], np.ones((1, 1), bool), max(height, width))
    logits = maps.merged(steps)
    region_map = _RegionMap(logits, box, config.least_logit(chosen_settings.cam_threshold), config.platt[0], config.cleaning, deadline)
    chosen = _clicked(region_map, positive, negative, reach_px)
    missed = positive if positive or chosen.any() else [((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)]
    for xy in missed:
        if _label_at(chosen, xy, reach_px):
            continue
        mask = _selected(_cut_off(_overlooked(logits, xy, reach_px), box), [xy], negative, reach_px)
        if not mask.any():
            mask = _cut_off(_disc(xy, reach_px, height, width), box)
            mask &= ~_nearer_to(negative, [xy], mask)
        chosen |= mask
    largest = max(find_components(chosen), key=lambda component: component.area_px)
    points = polygon_points_xy(
        largest, chosen_settings.tolerance_px, chosen_settings.hole_share, width, height, deadline
    )
    return {"mask": chosen.astype(np.uint8), "points": list(zip(points[::2], points[1::2]))}, defect


@dataclass(frozen=True, eq=False)
class _RegionMap:
    """A merged map, or a part of it, in which regions are looked for.

    Attributes:
        logits: (H, W) float32.
        box: where regions may lie.
        theta: logits above it count unless clicks ask for another threshold.
        slope: of the defect's Platt scaling: log-odds per logit of the map.
        cleaning: of the regions.
        deadline: of finding them.
    """

    logits: np.ndarray
    box: Box
    theta: float
    slope: float
    cleaning: Cleaning
    deadline: Deadline

    def labels(self, threshold: float) -> np.ndarray:
        """(H, W) int32, the number of the region above a threshold that each pixel is in, 0 for none."""
        found = _cut_off(regions(self.logits, threshold, self.cleaning, self.deadline), self.box)
        return cv2.connectedComponents(found.view(np.uint8), connectivity=8)[1]

    def part(self, region: np.ndarray) -> tuple[_RegionMap, tuple[slice, slice]]:
        """The map around a region, (H, W) bool, and where it is in this one."""
        left, top, width, height = cv2.boundingRect(region.view(np.uint8))
        margin_px = self.cleaning.reach_px
        x0, y0 = max(left - margin_px, 0), max(top - margin_px, 0)
        where = np.s_[y0 : top + height + margin_px, x0 : left + width + margin_px]
        box = tuple(max(side - start, 0) for side, start in zip(self.box, (x0, y0, x0, y0)))
        return replace(self, logits=self.logits[where], box=box), where

    def reduced(self, factor: int) -> _RegionMap:
        """The map at a fraction of its size, every pixel the largest of factor x factor: no ridge is interrupted."""
        if factor == 1:
            return self
        padding = [(0, -length % factor) for length in self.logits.shape]
        blocks = np.pad(self.logits, padding, mode="edge")
        height, width = (length // factor for length in blocks.shape)
        x0, y0, x1, y1 = self.box
        own, area = self.cleaning, factor * factor
        cleaning = Cleaning(own.closing_radius_px // factor, own.gap_px // factor, own.min_area_px // area)
        return replace(
            self,
            logits=blocks.reshape(height, factor, width, factor).max((1, 3)),
            box=(x0 // factor, y0 // factor, -(-x1 // factor), -(-y1 // factor)),
            cleaning=cleaning,
        )


class _Together:
    """Clicks on one region at some threshold, and what they say of others.

    Args:
        region_map: where the region is.
        region: (H, W) bool.
        anchors, others: positive clicks; all others must be in a region that has one of the anchors.
        negative: clicks that must not be in one of these regions.
    """

    def __init__(
        self,
        region_map: _RegionMap,
        region: np.ndarray,
        anchors: Sequence[Pixel],
        others: Sequence[Pixel],
        negative: Sequence[Pixel],
    ) -> None:
        self.part, self.where = region_map.part(region)
        y0, x0 = (side.start for side in self.where)
        self.clicks = [[(x - x0, y - y0) for x, y in some] for some in (anchors, others, negative)]
        self.factor = -(-max(self.part.logits.shape) // SEARCH_PX)
        self.small = self.part.reduced(self.factor)

    def widened(self, lowest: float) -> np.ndarray | None:
        """The regions above the highest threshold up to theta with which all clicks agree; see `_above`.

        Args:
            lowest: a threshold with which the positive ones agree.
        """
        threshold = self._turning_point(lowest, self.part.theta, lambda one: self._agree(self.small.labels(one), self.factor)[0])
        if self.factor > 1 and not self._agree(self.part.labels(threshold))[0]:  # regions of the reduced map are larger
            threshold = self._turning_point(lowest, threshold, lambda one: self._agree(self.part.labels(one))[0])
        return self._above(threshold)

    def narrowed(self) -> np.ndarray | None:
        """The regions above the lowest threshold from theta on with which all clicks agree; see `_above`."""
        anchors, others, _ = self.clicks
        highest = min(float(self.part.logits[y, x]) for x, y in anchors + others)
        return self._above(
            self._turning_point(highest, self.part.theta, lambda one: self._agree(self.small.labels(one), self.factor)[1])
        )

    def _agree(self, labels: np.ndarray, factor: int = 1) -> tuple[bool, bool]:
        """Whether the positive clicks agree with regions, and whether the negative ones do.

        Args:
            labels: (h, w) of the part, or of it at a fraction of its size.
            factor: by how much it is smaller.
        """
        anchors, others, negative = ({int(labels[y // factor, x // factor]) for x, y in some} for some in self.clicks)
        return others <= anchors - {0} and anchors != {0}, not negative & (anchors - {0})

    def _turning_point(self, right: float, wrong: float, is_right: Callable[[float], bool]) -> float:
        """The threshold that is right and nearest to a wrong one; `right` itself may be wrong, too."""
        while abs(right - wrong) > STEP_LOGITS / self.part.slope:
            middle = (right + wrong) / 2
            right, wrong = (middle, wrong) if is_right(middle) else (right, middle)
        return right

    def _above(self, threshold: float) -> np.ndarray | None:
        """The regions of the part that have the clicks, (h, w) bool; None if the clicks do not agree with the threshold."""
        labels = self.part.labels(threshold)
        if self._agree(labels) != (True, True):
            return None
        anchors, others, _ = self.clicks
        return np.isin(labels, list(_labels_at(labels, others or anchors)))


def _clicked(
    region_map: _RegionMap, positive: Sequence[Pixel], negative: Sequence[Pixel], reach_px: int
) -> np.ndarray:
    """The regions that clicks mean, each above its threshold, (H, W) bool; without positive clicks all but the negative ones'."""
    labels = region_map.labels(region_map.theta)
    chosen = _selected(labels > 0, positive, negative, reach_px)
    on, off = ([_nearest(labels, xy, reach_px) or xy for xy in some] for some in (positive, negative))
    inside, outside = ([(x, y) for x, y in on if bool(labels[y, x]) is wanted] for wanted in (True, False))
    if inside and outside:
        lowest = region_map.theta - WIDEN_LOGITS / region_map.slope
        wide = region_map.labels(lowest)
        for label in _labels_at(wide, outside):
            clicks = [_on_label(wide, some, label) for some in (inside, outside, off)]
            together = _Together(region_map, wide == label, *clicks)
            if clicks[0] and (found := together.widened(lowest)) is not None:
                chosen[together.where] |= found
    # Of regions that were widened none has a negative click.
    for label in _labels_at(labels, inside) & _labels_at(labels, off):
        region, (anchor, *others) = labels == label, _on_label(labels, inside, label)
        together = _Together(region_map, region, [anchor], others, _on_label(labels, off, label))
        if (found := together.narrowed()) is not None:
            chosen &= ~region
            chosen[together.where] |= found
    return chosen


def _labels_at(labels: np.ndarray, clicks: Sequence[Pixel]) -> set[int]:
    """The labels (H, W; 0 for none) that clicks are on."""
    return {int(labels[y, x]) for x, y in clicks} - {0}


def _on_label(labels: np.ndarray, clicks: Sequence[Pixel], label: int) -> list[Pixel]:
    """The clicks that are on a label."""
    return [(x, y) for x, y in clicks if labels[y, x] == label]


def _surest(logits: np.ndarray, predictor: Predictor, defect: str, near: Sequence[Pixel], reach_px: int) -> float:
    """The mean logit of the defect's probability at some pixels, each the largest within reach."""
    slope, intercept = predictor.weights.configs[defect].platt
    largest = [_around(logits, xy, reach_px).max() for xy in near]
    return float(np.mean(np.clip(slope * np.array(largest) + intercept, -30, 30)))


def _overlooked(logits: np.ndarray, xy: Pixel, reach_px: int) -> np.ndarray:
    """The region around a click above a little less than what the map says there, (H, W) bool.

    Empty where it fills most of the surroundings' rim: then the map says the same everywhere, and nothing of a defect.
    """
    disc = _disc(xy, OVERLOOKED_RADIUS_PX, *logits.shape)
    rim = disc & ~_disc(xy, OVERLOOKED_RADIUS_PX - 1, *logits.shape)
    region = (logits > _around(logits, xy, reach_px).max() - OVERLOOKED_LOGITS) & disc
    return region & (np.count_nonzero(region & rim) < MOST_OF_RIM * np.count_nonzero(rim))


def _around(values: np.ndarray, xy: Pixel, reach_px: int) -> np.ndarray:
    """The part of values (H, W) within reach of a pixel."""
    x, y = xy
    return values[max(y - reach_px, 0) : y + reach_px + 1, max(x - reach_px, 0) : x + reach_px + 1]


def _along(start: int, end: int) -> Iterable[int]:
    """Positions from start to end, BOX_SPACING_PX apart at most."""
    return np.linspace(start, end - 1, 2 + (end - start) // BOX_SPACING_PX).astype(int).tolist()


def to_json(answer: dict) -> str:
    """An answer of `outline_clicked` as JSON, the mask as H lists of W numbers.

    Written by hand, since 25 million numbers of a list take the json module seconds while an annotator waits.
    """
    text = np.full((*answer["mask"].shape, 2), ord(","), np.uint8)
    text[..., 0] = answer["mask"] + ord("0")
    rows = "],[".join(row.tobytes()[:-1].decode("ascii") for row in text)
    return f'{{"mask":[[{rows}]],"points":{json.dumps(answer["points"], allow_nan=False)}}}'


def _pixels(key: str, points_xy: Iterable[tuple[float, float]], width: int, height: int) -> list[Pixel]:
    """The pixels that clicks are on, each once."""
    for x, y in points_xy:
        if not (0 <= x <= width and 0 <= y <= height):
            raise RequestError(f"{key} has ({x:.12g}, {y:.12g}), but must lie in the photo of {width} x {height} px")
    return list(dict.fromkeys((min(int(x), width - 1), min(int(y), height - 1)) for x, y in points_xy))


def _box(clicks: Clicks, positive: Sequence[Pixel], width: int, height: int) -> Box:
    """Where the outline may lie: the annotator's box, as far as it is in the photo, and every positive click."""
    if clicks.box_xyxy is None:
        return 0, 0, width, height
    left, top, right, bottom = clicks.box_xyxy
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise RequestError(f"obj_bbox is {clicks.box_xyxy}, but must lie in the photo of {width} x {height} px")
    xs = [max(int(left), 0), min(math.ceil(right), width), *(x for x, _ in positive), *(x + 1 for x, _ in positive)]
    ys = [max(int(top), 0), min(math.ceil(bottom), height), *(y for _, y in positive), *(y + 1 for _, y in positive)]
    return min(xs), min(ys), max(xs), max(ys)


def _cut_off(mask: np.ndarray, box: Box) -> np.ndarray:
    """The mask (H, W) bool, False outside the box."""
    inside = np.zeros_like(mask)
    x0, y0, x1, y1 = box
    inside[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    return inside


def _selected(
    mask: np.ndarray, positive: Sequence[Pixel], negative: Sequence[Pixel], reach_px: int
) -> np.ndarray:
    """The components under the positive clicks (all if there is none) and not under the negative ones."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    on, off = np.zeros(count, bool), np.zeros(count, bool)
    on[[_label_at(labels, xy, reach_px) for xy in positive] if positive else slice(None)] = True
    off[[_label_at(labels, xy, reach_px) for xy in negative]] = True
    on[0] = off[0] = False
    chosen, contested = (on & ~off)[labels], (on & off)[labels]
    if positive and contested.any():
        parts = contested & ~_nearer_to(negative, positive, contested)
        chosen |= _selected(parts, positive, [], reach_px)
    return chosen


def _label_at(labels: np.ndarray, xy: Pixel, reach_px: int) -> int:
    """The label (H, W; 0 for none) nearest to a pixel within reach, 0 if there is none."""
    nearest = _nearest(labels, xy, reach_px)
    return int(labels[nearest[::-1]]) if nearest else 0


def _nearest(labels: np.ndarray, xy: Pixel, reach_px: int) -> Pixel | None:
    """The pixel with a label (H, W; 0 for none) that is nearest to another one within reach."""
    (x, y), left, top = xy, max(xy[0] - reach_px, 0), max(xy[1] - reach_px, 0)
    near = labels[top : y + reach_px + 1, left : x + reach_px + 1]
    ys, xs = np.nonzero(near)
    squares = (ys + top - y) ** 2 + (xs + left - x) ** 2
    if not len(squares) or squares.min() > reach_px**2:
        return None
    nearest = squares.argmin()
    return int(xs[nearest]) + left, int(ys[nearest]) + top


def _nearer_to(some: Sequence[Pixel], others: Sequence[Pixel], region: np.ndarray) -> np.ndarray:
    """The pixels of a region (H, W) bool that are nearer to one of `some` than to any of `others`."""
    ys, xs = np.nonzero(region)

    def squares(points: Sequence[Pixel]) -> np.ndarray:
        least = np.full(len(xs), np.iinfo(np.int64).max)
        for x, y in points:
            least = np.minimum(least, (xs - x) ** 2 + (ys - y) ** 2)
        return least

    nearer = np.zeros_like(region)
    nearer[ys, xs] = squares(some) < squares(others)
    return nearer


def _disc(xy: Pixel, radius_px: int, height: int, width: int) -> np.ndarray:
    """(height, width) bool, a disc around a pixel."""
    return cv2.circle(np.zeros((height, width), np.uint8), xy, radius_px, 1, cv2.FILLED).astype(bool)
