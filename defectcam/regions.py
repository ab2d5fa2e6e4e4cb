"""The pixels that shapes of label files and of CVAT stand for.

A region is a `Component`: a tight boolean crop and where it lies in the photo. Polygons are painted as the proposals
are made (`defectcam.proposals`: border included), so a proposal that was not edited has the very same region.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from defectcam.proposals import Component

AREA_TYPES = ("polygon", "mask", "rectangle", "ellipse", "polyline", "points")


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
    return tight_region(canvas > 0, int(origin[0]), int(origin[1]), width, height)


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
    return tight_region(mask > 0, left, top, width, height)


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
    return tight_region(mask.reshape(rows, columns), int(left), int(top), width, height)


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


def tight_region(mask: np.ndarray, left: int, top: int, width: int, height: int) -> Component | None:
    """The region of a mask at (left, top), cut to the photo and to its pixels."""
    x, y = max(0, -left), max(0, -top)
    mask = mask[y : max(y, height - top), x : max(x, width - left)]
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    tight = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Component(np.ascontiguousarray(tight), left + x + int(columns[0]), top + y + int(rows[0]))
