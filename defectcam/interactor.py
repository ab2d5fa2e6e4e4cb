"""Clicks -> one outline: CVAT's interactor. Only windows around the clicks go through the networks.

A person has clicked, so the question is not whether there is a defect but how far it reaches: no confidence is
asked for, and the answer is never empty. For every positive click the first of these that has something there:

1. the component of the climbed, snapped mask, as a detector would propose it;
2. what snapping finds in a disc around the click: for a defect that the classifier overlooks;
3. a small disc at the click, for the annotator to see that nothing was found and to go on by hand.

A component under a negative click is left out. If a positive click is on it as well, what is nearer to the
negative ones is cut off, and what still hangs together with a positive one stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

from defectcam.cam import score_sums, window_logits
from defectcam.pace import Progress
from defectcam.proposals import find_components, polygon_points_xy
from defectcam.request import Clicks, RequestError, Settings
from defectcam.tiling import GATE_SPACING_PX, at_photo_scale, at_working_scale
from defectcam.time_needed import Box, check_clicks, window_px

if TYPE_CHECKING:
    from model_handler import ModelHandler

# At working scale: side of the window around a click, its surroundings that the networks and snapping see as
# well, and radius of the disc in which the image alone is asked. Less than a second per map on two cores.
WINDOW_PX = 512
MARGIN_PX = 64
DISC_PX = 32
# How far from a defect a click still means it, of the photo's longer side: 3 px of a screen that shows all of it.
REACH_SHARE = 1 / 500
LEAST_REACH_PX = 4

Pixel = tuple[int, int]  # x, y


def outline_clicked(
    handler: ModelHandler, image_rgb: np.ndarray, clicks: Clicks, settings: Settings, deadline: float = math.inf
) -> dict:
    """CVAT's interactor answer.

    Args:
        handler: networks and settings.
        image_rgb: (H, W, 3) uint8.
        clicks: at least one positive one, or a box. The box ends the outline; a positive click outside widens it.
        settings: `threshold` and `shape` mean nothing here; of `defects` the one the classifiers are surest of at
            the clicks is outlined.
        deadline: on the clock of time.monotonic, s.

    Returns:
        `mask`, (H, W) uint8 0 or 1, not all 0; `points` [[x, y], ...] in px, a simplified polygon of its
        largest component, for annotators who convert masks to polygons.

    Raises:
        RequestError: clicks outside the photo, or a positive and a negative one on the same pixel.
        ImageError, TimeLimitError: as `ModelHandler.propose`.
    """
    height, width = image_rgb.shape[:2]
    positive = _pixels("pos_points", clicks.positive_xy, width, height)
    negative = _pixels("neg_points", clicks.negative_xy, width, height)
    if both := set(positive) & set(negative):
        raise RequestError(f"pos_points and neg_points are both on pixel {min(both)}: keep one of them")
    box = _box(clicks, positive, width, height)
    defects = settings.defects or handler.defects
    in_force = {defect: handler.effective(defect, replace(settings, threshold=0.0)) for defect in defects}
    scales = {defect: handler.weights.facts[defect].working_scale for defect in defects}
    places = [(x, y, x + 1, y + 1) for x, y in positive] or [box]
    looked_at = {defect: _looked_at(handler, defect, places, width, height) for defect in defects if len(defects) > 1}
    parts = {
        defect: [box] if clicks.box_xyxy else _windows(positive, scales[defect], width, height) for defect in defects
    }
    grown = {
        defect: [_grown(part, MARGIN_PX, scales[defect], width, height) for part in parts[defect]] for defect in defects
    }
    amount = (_area(box) / 1e6, "megapixels of the box") if clicks.box_xyxy else (len(positive), "clicks")
    progress, defect = check_clicks(handler, looked_at, grown, in_force, deadline, *amount), defects[0]
    if looked_at:
        defect = _surest_defect(handler, image_rgb, places, looked_at, in_force, deadline, progress)
        progress = check_clicks(handler, {}, {defect: grown[defect]}, in_force, deadline, *amount)
    fact, effective = handler.weights.facts[defect], in_force[defect]
    reach_px = max(LEAST_REACH_PX, round(REACH_SHARE * max(height, width)))

    def outlines(part: Box, discs_xy: Sequence[Pixel] = ()) -> tuple[np.ndarray, Box]:
        """What is found in a part of the photo, as far as the box reaches: by the networks, or in discs by the image.

        Returns:
            (h, w) bool, and where it lies in the photo.
        """
        x0, y0, x1, y1 = _grown(part, MARGIN_PX, fact.working_scale, width, height)
        image = at_working_scale(image_rgb[y0:y1, x0:x1], fact.working_scale)
        if discs_xy:
            climbed = np.zeros(image.shape[:2], np.float32)
        else:
            climbed = handler.maps(image, defect, effective, deadline).climbed
        for x, y in discs_xy:
            centre = [int((x - x0) * fact.working_scale), int((y - y0) * fact.working_scale)]
            cv2.circle(climbed, centre, DISC_PX, 2.0, cv2.FILLED)
        mask = at_photo_scale(handler.mask(image, climbed, defect, effective, deadline), y1 - y0, x1 - x0)
        left, top, right, bottom = inside = *map(max, part[:2], box[:2]), *map(min, part[2:], box[2:])
        return mask[top - y0 : bottom - y0, left - x0 : right - x0], inside

    found = np.zeros((height, width), bool)
    for part, window in zip(parts[defect], grown[defect]):
        mask, (left, top, right, bottom) = outlines(part)
        found[top:bottom, left:right] |= mask
        progress.add(window_px(handler, defect, window, effective["iterations"]))
    chosen = _selected(found, positive, negative, reach_px)
    missed = [xy for xy in positive if not _label_at(chosen, xy, reach_px)]
    if not positive and not chosen.any():
        missed = [((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)]
    for part in _joined(_grown((*xy, *xy), DISC_PX, fact.working_scale, width, height) for xy in missed):
        clicked = [(x, y) for x, y in missed if part[0] <= x < part[2] and part[1] <= y < part[3]]
        mask, (left, top, right, bottom) = outlines(part, clicked)
        here, others = ([(x - left, y - top) for x, y in points] for points in (clicked, negative))
        mask = _selected(mask, here, others, reach_px) if fact.snap else np.zeros_like(mask)
        for xy in here:
            if not _label_at(mask, xy, reach_px):
                disc = _disc(xy, reach_px, *mask.shape)
                mask |= disc & ~_nearer_to(others, [xy], disc)
        chosen[top:bottom, left:right] |= mask
    handler.logger.info(f"{defect} clicked, {len(missed)} times where the networks find nothing")
    largest = max(find_components(chosen), key=lambda component: component.area_px)
    points = polygon_points_xy(largest, effective["tolerance_px"], effective["hole_share"], width, height, deadline)
    return {"mask": chosen.astype(np.uint8), "points": list(zip(points[::2], points[1::2]))}


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


def _looked_at(handler: ModelHandler, defect: str, places: Sequence[Box], width: int, height: int) -> list[Box]:
    """Windows that show the classifier of a defect some places and what they depend on."""
    return _joined(_surroundings(handler, defect, place, width, height) for place in places)


def _surroundings(handler: ModelHandler, defect: str, place: Box, width: int, height: int) -> Box:
    fact = handler.weights.facts[defect]
    return _grown(place, fact.window_px // 2 + MARGIN_PX, fact.working_scale, width, height)


def _surest_defect(
    handler: ModelHandler,
    image_rgb: np.ndarray,
    places: Sequence[Box],
    looked_at: Mapping[str, Sequence[Box]],
    in_force: Mapping[str, dict],
    deadline: float,
    progress: Progress,
) -> str:
    """The defect with the largest mean logit of its classifier's windows at some places.

    Args:
        looked_at: defect -> windows of `_looked_at`.
        progress: is told of every window.
    """
    height, width = image_rgb.shape[:2]

    def logit(defect: str) -> float:
        fact = handler.weights.facts[defect]
        scale, bias = fact.working_scale, handler.weights.networks[defect].head.bias.item()
        step = max(1, int(GATE_SPACING_PX / scale))
        left = {place: _surroundings(handler, defect, place, width, height) for place in places}
        logits = []
        for window in looked_at[defect]:
            x0, y0, x1, y1 = window
            image = at_working_scale(image_rgb[y0:y1, x0:x1], scale)
            sums = score_sums(handler.maps(image, defect, in_force[defect] | {"iterations": 0}, deadline).score)
            progress.add(window_px(handler, defect, window))
            for place in [place for place, around in left.items() if _joint(around, window) == window]:
                del left[place]
                xs = ((np.arange(place[0], place[2], step) - x0) * scale).astype(int)
                ys = ((np.arange(place[1], place[3], step) - y0) * scale).astype(int)
                logits.append(window_logits(sums, bias, ys[:, None], xs[None], fact.window_px).mean())
        return float(np.mean(logits))

    logits = {defect: logit(defect) for defect in looked_at}
    handler.logger.info("logits at the clicks: " + ", ".join(f"{name} {value:.2f}" for name, value in logits.items()))
    return max(logits, key=logits.get)


def _windows(positive: Sequence[Pixel], working_scale: float, width: int, height: int) -> list[Box]:
    """A window around every click."""
    return _joined(_grown((*xy, *xy), WINDOW_PX // 2, working_scale, width, height) for xy in positive)


def _joined(boxes: Iterable[Box]) -> list[Box]:
    """Boxes that cover the given ones, joined as long as that makes no more to do than both alone."""
    windows: list[Box] = []
    for window in boxes:
        others = windows
        while others:
            others = [other for other in windows if _area(_joint(window, other)) <= _area(window) + _area(other)]
            for other in others[:1]:
                windows.remove(other)
                window = _joint(window, other)
        windows.append(window)
    return windows


def _joint(one: Box, other: Box) -> Box:
    return *map(min, one[:2], other[:2]), *map(max, one[2:], other[2:])


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _grown(box: Box, margin_px: int, working_scale: float, width: int, height: int) -> Box:
    """The box with a margin, given in px at working scale, as far as the photo reaches.

    It starts on the grid of the networks' coarsest features, so a window has the scores that the photo has there.
    """
    margin, step = math.ceil(margin_px / working_scale), max(1, round(8 / working_scale))
    x0, y0 = (max(number - margin, 0) // step * step for number in box[:2])
    x1, y1 = (-(-(number + margin) // step) * step for number in box[2:])
    return x0, y0, min(x1, width), min(y1, height)


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
    near = labels[top : max(y + reach_px + 1, 0), left : max(x + reach_px + 1, 0)]  # a click may lie beside a part
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
