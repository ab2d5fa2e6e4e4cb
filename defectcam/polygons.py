"""One region -> the polygon or mask that CVAT stores.

Coordinates. Pixels are (x, y), x to the right, y down, pixel (0, 0) at the upper left. A polygon runs through
the pixels it encloses, border included: a component whose columns are 3..7 has its leftmost points at x = 3.0
and its rightmost ones at x = 7.48. So its points, truncated or rounded, are pixels of the component, and
cv2.fillPoly, which paints the border too, gives the component back; PIL's ImageDraw.polygon all but does.
Rasterisers that sample pixel centres at (x + 0.5, y + 0.5), pycocotools among them, lose the last row and
column of every part, which is much of a thin crack; shape "mask" is exact everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from heapq import heappop, heappush
from itertools import permutations

import cv2
import numpy as np
from shapely import GEOSException, Polygon, constrained_delaunay_triangles, get_coordinates
from skimage.measure import find_contours

from defectcam.deadline import NO_DEADLINE, Deadline
from defectcam.proposals import Component

# The outline passes 0.24 px outside the centres of the component's border pixels, then moves by as much to
# the right and down: it fills [i, i + 0.48] of pixel i, rounds and truncates to i, and never has zero width.
OUTLINE_LEVEL = 0.76
OUTLINE_SHIFT_PX = 0.24

# What a polygon should share with its component. Wide components have it at a tolerance of 1 px or more; cracks
# a few pixels wide do not, so their tolerance shrinks step by step, but never below half of what was asked for:
# an outline with a vertex at every pixel agrees perfectly, but an annotator cannot edit it.
MIN_IOU = 0.95
TOLERANCE_STEP = 0.8
LEAST_TOLERANCE_SHARE = 0.5
FINEST_TOLERANCE_PX = 0.2
MAX_HOLES = 1000  # of a polygon: no one could edit more, and simplifying takes time that grows faster than they do


def outline_length_px(mask: np.ndarray) -> int:
    """Pixel edges between the mask and its outside."""
    inner = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    return inner + sum(np.count_nonzero(rim) for rim in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def polygon_points_xy(
    component: Component,
    tolerance_px: float,
    hole_share: float,
    image_width: int,
    image_height: int,
    deadline: Deadline = NO_DEADLINE,
) -> list[float]:
    """Outlines a component by one polygon; the holes that matter are cut free along zero-width bridges.

    Args:
        component: the region.
        tolerance_px: how far the simplified outline may leave the exact one, px, 0 or more. It is reduced, to
            half at the least, for a component that would otherwise agree with its polygon at an IoU below 0.95;
            further only where the polygon would cross itself.
        hole_share: holes are filled, smallest first, as long as together they have at most this share of the
            component's area; 0 keeps all, infinity none. Above 0.03 that IoU may be missed. Of more than MAX_HOLES
            holes all but the largest are filled.
        image_width: px.
        image_height: px.
        deadline: of the simplification.

    Returns:
        [x0, y0, x1, y1, ...] in px of the image as told at the top of this module, two decimals, inside the
        image. Three points or more, no point twice in a row, the last not the first. Without holes the ring
        is valid; a bridge runs from a point of the outline to a point of the hole and back again.

    Raises:
        ValueError: a negative or undefined tolerance or share, or a component that leaves the image.
        TimeLimitError: the deadline passed.
    """
    if not 0 <= tolerance_px < math.inf or not hole_share >= 0:
        raise ValueError(f"tolerance_px {tolerance_px!r} or hole_share {hole_share!r} is not 0 or more")
    left, top, right, bottom = component.box_xyxy
    if left < 0 or top < 0 or right >= image_width or bottom >= image_height:
        raise ValueError(f"component {component.box_xyxy} leaves the {image_width} x {image_height} image")
    polygon = _simplified(_outline(component.mask, hole_share), component.mask, tolerance_px, deadline)
    points = _single_ring(polygon.normalize())
    return [round(value, 2) for x, y in points for value in (x + left, y + top)]


def mask_crop(component: Component) -> list[int]:
    """The component as CVAT's mask: its box row by row as 0 and 1, then x0, y0, x1, y1 inclusive, px."""
    return component.mask.astype(int).ravel().tolist() + list(component.box_xyxy)


def _outline(mask: np.ndarray, hole_share: float) -> Polygon:
    """The exact outline of a component's (h, w) mask in crop coordinates, without the holes to be filled."""
    # "high" joins pixels that touch at a corner, so an 8-connected component has exactly one outer ring.
    rings_yx = find_contours(np.pad(mask, 1).view(np.uint8), OUTLINE_LEVEL, fully_connected="high")
    rings = [Polygon(np.round(ring[:, ::-1] - 1 + OUTLINE_SHIFT_PX, 2)) for ring in rings_yx]
    *holes, shell = sorted(rings, key=lambda ring: ring.area)
    filled_px = np.cumsum([hole.area for hole in holes])
    first = np.searchsorted(filled_px, hole_share * np.count_nonzero(mask), side="right")
    first = max(first, len(holes) - MAX_HOLES)
    return Polygon(shell.exterior, [hole.exterior for hole in holes[first:]])


def _simplified(outline: Polygon, mask: np.ndarray, tolerance_px: float, deadline: Deadline) -> Polygon:
    """The outline at the largest tolerance, tolerance_px at most, that is sound and agrees with the mask."""
    # Where the holes filled have used up the promise, simplifying still gets a share of its own.
    enough = min(MIN_IOU, _iou(outline, mask) - 0.02)
    finest_px = LEAST_TOLERANCE_SHARE * tolerance_px
    while tolerance_px >= FINEST_TOLERANCE_PX:
        deadline.check()
        polygon = outline.simplify(tolerance_px, preserve_topology=True)
        # Rings may touch in a valid polygon, but then a point would not tell its ring.
        if polygon.is_valid and polygon.boundary.is_simple:
            if tolerance_px * TOLERANCE_STEP < finest_px or _iou(polygon, mask) >= enough:
                return polygon
        tolerance_px *= TOLERANCE_STEP
    return outline.simplify(0, preserve_topology=True)


def _iou(polygon: Polygon, mask: np.ndarray) -> float:
    """Intersection over union, 0..1, of a polygon in crop coordinates, painted, and the (h, w) mask."""
    rings_xy = (get_coordinates(ring) for ring in (polygon.exterior, *polygon.interiors))
    rings = [np.rint(ring_xy).astype(np.int32) for ring_xy in rings_xy]
    painted = cv2.fillPoly(np.zeros(mask.shape, np.uint8), rings, 1).view(bool)
    return np.count_nonzero(painted & mask) / np.count_nonzero(painted | mask)


def _single_ring(polygon: Polygon) -> list[tuple[float, float]]:
    """The polygon's points as one open ring, each hole tied in by the shortest way there and back."""
    shell, *holes = (list(ring.coords)[:-1] for ring in (polygon.exterior, *polygon.interiors))
    if not holes:
        return shell
    # Edges of a triangulation cross neither each other nor a ring and lead from each ring to its neighbours.
    ring_of = {point: number for number, ring in enumerate([shell, *holes]) for point in ring}
    links = defaultdict(set)
    try:
        triangles = constrained_delaunay_triangles(polygon).geoms
    except GEOSException:  # it gives up on some rings full of tiny holes: better an outline without the smaller half
        kept = sorted(polygon.interiors, key=lambda ring: Polygon(ring).area)[len(holes) // 2 + 1 :]
        return _single_ring(Polygon(polygon.exterior, kept))
    for triangle in triangles:
        for start, end in permutations(triangle.exterior.coords[:3], 2):
            if ring_of[start] != ring_of[end]:
                links[ring_of[start]].add((math.dist(start, end), start, end))
    joined, reachable = {0}, sorted(links[0])
    detours = defaultdict(list)  # from a point: to a hole, once around it, and back
    while len(joined) <= len(holes):
        _, start, end = heappop(reachable)
        number = ring_of[end]
        if number in joined:
            continue
        joined.add(number)
        for link in links[number]:
            heappush(reachable, link)
        hole = holes[number - 1]
        first = hole.index(end)
        detours[start].append([*hole[first:], *hole[: first + 1], start])
    path, ways = [], [iter(shell)]
    while ways:
        for point in ways[-1]:
            path.append(point)
            if point in detours:  # first these, then on from here
                ways += map(iter, detours.pop(point))
                break
        else:
            ways.pop()
    return path
