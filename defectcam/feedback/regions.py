"""The pixels that CVAT's shapes stand for, and how far an annotator changed them.

A region is a `Component`: a tight boolean crop and where it lies in the photo. Polygons are painted as the proposals
are made (`defectcam.proposals`: border included), so a proposal that nobody touched has the very same region.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from defectcam.evaluation.measures import OUTLINE_TOLERANCE_PX, saved_per_component
from defectcam.proposals import Component

AREA_TYPES = ("polygon", "mask", "rectangle", "ellipse", "polyline", "points")
SAME_OUTLINE_PX = 1  # outlines no farther apart count as the same
MORPHOLOGY_MARGIN_PX = 12  # what the simulated annotator's erosion and dilation may need around a shape


def region_of(
    kind: str, points: Sequence[float], width: int, height: int, rotation: float = 0.0
) -> Component | None:
    """The pixels of a shape inside its photo.

    Args:
        kind: one of AREA_TYPES.
        points: as CVAT stores them, px: [x, y, ...]; of a rectangle two corners, of an ellipse its centre and the
            right and upper ends (right x, upper y), of a mask run lengths, the first counting zeros, and
            inclusive box.
        width, height: of the photo, px; what lies outside is cut off.
        rotation: of rectangle and ellipse around their centre, degrees, clockwise.

    Returns:
        The region, or None where no pixel is left: CVAT stores whatever it is sent.
    """
    values = np.asarray(points, float)
    if not np.isfinite(values).all():
        return None
    if kind == "mask":
        return _mask_region(values, width, height)
    values = values[: len(values) // 2 * 2].reshape(-1, 2)
    if kind in ("rectangle", "ellipse"):
        if len(values) != 2:
            return None
        values = _outline_xy(kind, values, rotation)
    if len(values) < {"polygon": 3}.get(kind, 1):
        return None
    # Painting is exact on a canvas that holds the whole shape; coordinates far outside are cut to keep it small.
    low, high = -np.array([width, height]), 2 * np.array([width, height])
    pixels = np.rint(np.clip(values, low, high)).astype(np.int32)
    origin = pixels.min(axis=0)
    size = pixels.max(axis=0) - origin + 1
    canvas = np.zeros(size[::-1], np.uint8)
    if kind == "points":
        canvas[tuple((pixels - origin).T[::-1])] = 1
    elif kind == "polyline":
        cv2.polylines(canvas, [pixels - origin], False, 1)
    else:
        cv2.fillPoly(canvas, [pixels - origin], 1)
    return _tight(canvas > 0, int(origin[0]), int(origin[1]), width, height)


def run_lengths(region: Component) -> list[int]:
    """A region as CVAT stores masks: run lengths, the first counting zeros, then x0, y0, x1, y1 inclusive."""
    flat = region.mask.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)])
    return [0] * bool(flat[0]) + runs.tolist() + list(region.box_xyxy)


def resized(region: Component, factor_x: float, factor_y: float, width: int, height: int) -> Component | None:
    """The region on a photo that was resized by the factors to width x height."""
    x0, y0, x1, y1 = region.box_xyxy
    left, top = round(x0 * factor_x), round(y0 * factor_y)
    size = max(1, round((x1 + 1) * factor_x) - left), max(1, round((y1 + 1) * factor_y) - top)
    mask = cv2.resize(region.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return _tight(mask > 0, left, top, width, height)


def merged(regions: Sequence[Component]) -> Component:
    """The union of one or more regions."""
    masks, left, top = on_one_crop(regions)
    return Component(np.logical_or.reduce(masks), left, top)


def on_one_crop(regions: Sequence[Component], margin_px: int = 0) -> tuple[list[np.ndarray], int, int]:
    """The regions as (h, w) bool masks of the box around all of them, and that box's left and top, px."""
    boxes = np.array([region.box_xyxy for region in regions])
    left, top = boxes[:, :2].min(axis=0) - margin_px
    right, bottom = boxes[:, 2:].max(axis=0) + margin_px
    masks = []
    for region, (x0, y0, x1, y1) in zip(regions, boxes):
        mask = np.zeros((bottom - top + 1, right - left + 1), bool)
        mask[y0 - top : y1 - top + 1, x0 - left : x1 - left + 1] = region.mask
        masks.append(mask)
    return masks, int(left), int(top)


def common_px(one: Component, other: Component) -> int:
    """Number of pixels in both regions."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one.box_xyxy, other.box_xyxy
    x0, y0, x1, y1 = max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1)
    if x0 > x1 or y0 > y1:
        return 0
    first = one.mask[y0 - ay0 : y1 - ay0 + 1, x0 - ax0 : x1 - ax0 + 1]
    second = other.mask[y0 - by0 : y1 - by0 + 1, x0 - bx0 : x1 - bx0 + 1]
    return int(np.count_nonzero(first & second))


def region_iou(one: Component, other: Component) -> float:
    """Intersection over union of two regions, 0..1."""
    both = common_px(one, other)
    return both / (one.area_px + other.area_px - both)


def edited_share(before: Component, after: Component) -> float:
    """Share (0..1) of both outlines' pixels that are farther than 1 px from the other outline.

    0: nobody moved anything; 1: nothing of the old outline is left. An added part counts, and so does a part that
    was cut away.
    """
    (old, new), _, _ = on_one_crop([before, after], margin_px=SAME_OUTLINE_PX + 1)
    old, new = _outline(old), _outline(new)
    near = np.ones((2 * SAME_OUTLINE_PX + 1,) * 2, np.uint8)
    far = np.count_nonzero(old & ~(cv2.dilate(new.astype(np.uint8), near) > 0))
    far += np.count_nonzero(new & ~(cv2.dilate(old.astype(np.uint8), near) > 0))
    return float(far / (np.count_nonzero(old) + np.count_nonzero(new)))  # databases take no numpy numbers


def saved_share(before: Component, after: Component, defect: str, width: int, height: int) -> float:
    """Share (0..1) of clicks that starting from `before` saved whoever drew `after` (paper 4.3, Eq. 3's groups).

    Counted as for simulated annotators (`defectcam.evaluation.measures`), with the outline the annotator left as
    the truth; of regions too small for that the share of the outline that was not edited.

    Args:
        width, height: of the photo, px: how exact an outline must be depends on its longer side.
    """
    (old, new), _, _ = on_one_crop([before, after], margin_px=MORPHOLOGY_MARGIN_PX)
    missing = max(0, max(width, height) - max(old.shape))  # so that the crop's longer side is the photo's
    padding = ((0, missing), (0, 0)) if old.shape[0] > old.shape[1] else ((0, 0), (0, missing))
    saved = saved_per_component(np.pad(old, padding), np.pad(new, padding), defect)
    return float(np.mean(saved)) if saved else 1 - edited_share(before, after)


def vertices(region: Component) -> int:
    """Clicks it takes to draw a region from nothing: the vertices of its outlines simplified at 2 px, 3 at least."""
    contours, _ = cv2.findContours(region.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return max(3, sum(len(cv2.approxPolyDP(contour, OUTLINE_TOLERANCE_PX, True)) for contour in contours))


def innermost_xy(region: Component) -> tuple[int, int]:
    """The region's pixel that is farthest from its outside."""
    depth = cv2.distanceTransform(np.pad(region.mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return region.left + int(x) - 1, region.top + int(y) - 1


def _mask_region(values: np.ndarray, width: int, height: int) -> Component | None:
    if len(values) < 5:
        return None
    *runs, left, top, right, bottom = values.astype(int)
    columns, rows = right - left + 1, bottom - top + 1
    # CVAT checks neither the box nor the lengths: no more is painted than of polygons.
    if min(columns, rows) < 1 or min(runs) < 0 or columns > 3 * width or rows > 3 * height:
        return None
    runs = np.diff(np.minimum(np.cumsum(runs), columns * rows), prepend=0)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = np.zeros(columns * rows, bool)
    mask[: len(flat)] = flat
    return _tight(mask.reshape(rows, columns), int(left), int(top), width, height)


def _outline_xy(kind: str, values: np.ndarray, rotation: float) -> np.ndarray:
    """Corners of a rectangle, or points around an ellipse, turned around its centre."""
    if kind == "ellipse":
        (center_x, center_y), (right_x, upper_y) = values
        angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        radii = np.abs([right_x - center_x, center_y - upper_y])
        around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
        center = values[0]
    else:
        (x0, y0), (x1, y1) = values
        center = values.mean(axis=0)
        around = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) - center
    turn = np.deg2rad(rotation)
    return around @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + center


def _tight(mask: np.ndarray, left: int, top: int, width: int, height: int) -> Component | None:
    """The region of a mask at (left, top), cut to the photo and to its pixels."""
    x, y = max(0, -left), max(0, -top)
    mask = mask[y : max(y, height - top), x : max(x, width - left)]
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    tight = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Component(np.ascontiguousarray(tight), left + x + int(columns[0]), top + y + int(rows[0]))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch its outside; the mask keeps clear of its crop's rim."""
    return mask & ~(cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
