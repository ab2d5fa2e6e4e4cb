"""Area, length and width of a shape in px, for the engineer who judges how severe a defect is.

- Area: the number of pixels.
- Length: that of the centre line, the skeleton of the shape, with all its branches. A branch that is no longer than the shape is
  wide where it begins comes from an uneven outline and is left out. Steps of pixels are smoothed (Douglas-Peucker, 0.75 px), so
  that a slanting line is not longer than it is. At each free end half of the width there is added, which thinning takes away.
- Width at a point of the centre line: twice its distance from the outline. The mean and the largest are over all its pixels.

Of straight lines 2 to 20 px wide in any direction the length is right to 3 %, the widths to 10 % or 1 px.
The length of a crack is that of its course. Of a compact shape such as a spall the centre line means little: there the largest
width is the diameter of the largest circle in it, and so is the length if no branch is left.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple, dataclass

import cv2
import numpy as np
import shapely
from skimage.morphology import skeletonize

from defectcam.proposals import Component

LARGEST_HALF_PX = 32  # half of the width up to which shapes are measured at full resolution: thinning takes a pass per px
SMOOTHING = 1.5  # in pixels of half the size
CORE_PX = 256  # of the blocks that are thinned by themselves; those without a pixel cost nothing


@dataclass(frozen=True)
class ShapeSize:
    """What `shape_size` measures, in px², then px."""

    area_px: int
    length_px: float
    mean_width_px: float
    largest_width_px: float

    def in_mm(self, mm_per_px: float) -> tuple[float, ...]:
        """Area in mm², then length, mean and largest width in mm."""
        area_px, *lengths_px = astuple(self)
        return area_px * mm_per_px**2, *(value * mm_per_px for value in lengths_px)


def shape_size(region: Component) -> ShapeSize:
    """Measure a region as told at the top of this module.

    The mask is measured at twice its resolution: a straight line then has an even number of pixels across, and the distance
    of its centre line to the next pixel outside, in pixels of half the size, is its width in px. Shapes more than 64 px wide
    are made smaller first.
    """
    mask = np.pad(region.mask, 1).view(np.uint8)
    half_px = float(cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_3).max())  # roughly: it is fast
    factor = min(1.0, LARGEST_HALF_PX / half_px)
    if factor < 1:
        size = [max(3, round(side * factor)) for side in mask.shape[::-1]]
        mask = np.pad((cv2.resize(255 * mask, size, interpolation=cv2.INTER_AREA) > 0).view(np.uint8), 1)
    points_xy, widths = _centre_points(mask, min(half_px, LARGEST_HALF_PX))
    width_at = dict(zip(map(tuple, points_xy.tolist()), widths.tolist()))
    lines = _without_spurs(_lines(points_xy), width_at)
    if not lines:
        length = mean = largest = max(widths)
    else:
        length = math.fsum(map(_smooth_length, lines)) / 2
        length += sum(width_at[point] / 2 for point, count in _ends(lines).items() if count == 1)
        kept = [width_at[tuple(point)] for point in np.unique(shapely.get_coordinates(lines).astype(int), axis=0).tolist()]
        mean, largest = math.fsum(kept) / len(kept), max(kept)
    return ShapeSize(region.area_px, *(round(float(value) / factor, 2) for value in (length, mean, largest)))


def _centre_points(mask: np.ndarray, half_px: float) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of the skeleton of a mask (H, W) uint8 at twice its resolution, block by block.

    Returns:
        (N, 2) int of x and y in pixels of half the size, and (N,) the width there in px.
    """
    halo = int(2 * half_px) + 4  # farther no pixel has a say: each pass of thinning looks 2 px around, at twice the resolution
    core = max(CORE_PX, 4 * halo)
    points, widths = [], []
    for top in range(0, mask.shape[0], core):
        for left in range(0, mask.shape[1], core):
            if not mask[top : top + core, left : left + core].any():
                continue
            y, x = max(0, top - halo), max(0, left - halo)
            block = mask[y : top + core + halo, x : left + core + halo].repeat(2, axis=0).repeat(2, axis=1)
            distance = cv2.distanceTransform(block, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            inner = np.s_[2 * (top - y) : 2 * (top - y + core), 2 * (left - x) : 2 * (left - x + core)]
            rows, columns = np.nonzero(skeletonize(block > 0)[inner])
            points.append(np.stack([columns + 2 * left, rows + 2 * top], axis=1))
            widths.append(distance[inner][rows, columns].round(3))  # OpenCV's last digits change from run to run
    return np.concatenate(points), np.concatenate(widths)


def _lines(points_xy: np.ndarray) -> list[shapely.LineString]:
    """The lines through the pixels of a skeleton, (N, 2) int, between its ends and crossings."""
    stride = int(points_xy[:, 0].max()) + 3
    places = points_xy[:, 0] + 1 + stride * points_xy[:, 1]

    def there(dx: int, dy: int) -> np.ndarray:
        return np.isin(places + dx + stride * dy, places)

    steps = []
    for dx, dy in ((1, 0), (0, 1), (1, 1), (-1, 1)):
        joined = there(dx, dy)
        if dx and dy:  # not where two straight steps lead there: crossings would be small triangles
            joined &= ~there(dx, 0) & ~there(0, dy)
        steps.append(np.stack([points_xy[joined], points_xy[joined] + (dx, dy)], axis=1))
    return _joined(list(shapely.linestrings(np.concatenate(steps))))


def _smooth_length(line: shapely.LineString) -> float:
    """Length of a line without its steps; that of a ring does not depend on where GEOS lets it begin."""
    points = line.coords[:]
    if line.is_closed:
        first = points.index(min(points))
        line = shapely.LineString([*points[first:-1], *points[:first], points[first]])
    return line.normalize().simplify(SMOOTHING).length


def _without_spurs(
    lines: list[shapely.LineString], width_at: dict[tuple[int, int], float]
) -> list[shapely.LineString]:
    """The lines without branches that are no longer than the shape is wide where they begin, joined again."""
    while True:
        ends = _ends(lines)

        def is_spur(line: shapely.LineString) -> bool:
            first, last = _end_points(line)
            if (ends[first] == 1) == (ends[last] == 1):
                return False
            return line.length / 2 <= width_at[last if ends[first] == 1 else first]

        kept = [line for line in lines if not is_spur(line)]
        if len(kept) == len(lines):
            return lines
        lines = _joined(kept)


def _joined(lines: list[shapely.LineString]) -> list[shapely.LineString]:
    return list(shapely.get_parts(shapely.line_merge(shapely.multilinestrings(lines)))) if lines else []


def _ends(lines: list[shapely.LineString]) -> Counter[tuple[int, int]]:
    """How many lines end at a point (x, y)."""
    return Counter(point for line in lines for point in _end_points(line))


def _end_points(line: shapely.LineString) -> tuple[tuple[int, int], tuple[int, int]]:
    (first_x, first_y), (last_x, last_y) = line.coords[0], line.coords[-1]
    return (int(first_x), int(first_y)), (int(last_x), int(last_y))
