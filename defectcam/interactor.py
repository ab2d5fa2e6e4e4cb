"""Clicks -> one outline: CVAT's interactor. Of every level of the pyramid only tiles near the clicks are read.

A person has clicked, so the question is not whether there is a defect but how far it reaches: no confidence is
asked for, and the answer is never empty. For every positive click the first of these that has something there:

1. the region of the map above theta;
2. the region above what the map says at the click itself, in the surroundings of the click: for a defect that the
   network overlooks;
3. a small disc at the click, for the annotator to see that nothing was found and to go on by hand.

A region under a negative click is left out. If a positive click is on it as well, what is nearer to the negative ones
is cut off, and what still hangs together with a positive one stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from defectcam.deadline import NO_DEADLINE, Deadline, Progress
from defectcam.polygons import polygon_points_xy
from defectcam.postprocess import regions
from defectcam.predict import Predictor
from defectcam.proposals import find_components
from defectcam.pyramid import Pyramid
from defectcam.request import Clicks, RequestError

NEAR_PX = 96  # so far around a click every level is read at the least, in px of the level
OVERLOOKED_RADIUS_PX = 64  # around a click where the network finds nothing
MOST_OF_RIM = 0.5  # of the rim of these surroundings; a crack crosses it in two places
OVERLOOKED_LOGITS = 1.0  # below what the map says there, a pixel may belong to it
# How far from a defect a click still means it, of the photo's longer side: 3 px of a screen that shows all of it.
REACH_SHARE = 1 / 500
LEAST_REACH_PX = 4
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
    deadline.check_work(predictor.pace.seconds(needed, deadline.left_s()), amount, unit)
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
    fact, chosen_settings = predictor.weights.facts[defect], settings[defect]
    steps = chosen_settings.iterations
    if steps:
        maps.climb([steps], np.ones((1, 1), bool), max(height, width))
    logits = maps.merged(steps)
    found = _cut_off(regions(logits, fact.least_logit(chosen_settings.cam_threshold), fact.cleaning), box)
    chosen = _selected(found, positive, negative, reach_px)
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


def _surest(logits: np.ndarray, predictor: Predictor, defect: str, near: Sequence[Pixel], reach_px: int) -> float:
    """The mean logit of the defect's probability at some pixels, each the largest within reach."""
    slope, intercept = predictor.weights.facts[defect].platt
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
    (x, y), left, top = xy, max(xy[0] - reach_px, 0), max(xy[1] - reach_px, 0)
    near = labels[top : y + reach_px + 1, left : x + reach_px + 1]
    ys, xs = np.nonzero(near)
    squares = (ys + top - y) ** 2 + (xs + left - x) ** 2
    if not len(squares) or squares.min() > reach_px**2:
        return 0
    nearest = squares.argmin()
    return int(near[ys[nearest], xs[nearest]])


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
