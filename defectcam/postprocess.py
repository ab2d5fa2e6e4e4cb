"""From a map of probabilities to regions: threshold, closing, gap bridging, minimum area (paper 3.1, Fig. 5).

A hairline crack breaks into many pieces at any threshold. Pieces that face each other over a short gap are joined
along the ridge of the map, before small regions are dropped: one crack, one proposal.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from skimage.graph import route_through_array

from defectcam.deadline import NO_DEADLINE, Deadline

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # each pair of 8-neighbours once
PATH_MARGIN_PX = 4  # around a gap: so far a path may swerve
ROWS_AT_ONCE = 64  # that are searched for gaps: so many stay in a processor's cache


@dataclass(frozen=True)
class Cleaning:
    """closing_radius_px: of the closing's disc, 0 for none; gap_px: longest gap that is bridged, 0 for none;
    min_area_px: regions of fewer pixels are dropped."""

    closing_radius_px: int
    gap_px: int
    min_area_px: int

    @property
    def reach_px(self) -> int:
        """How far from a pixel another one can matter for which region it belongs to."""
        return 2 * self.closing_radius_px + self.gap_px + PATH_MARGIN_PX + 1


def regions(
    logits: np.ndarray,
    threshold: float,
    cleaning: Cleaning,
    deadline: Deadline = NO_DEADLINE,
) -> np.ndarray:
    """The defect's pixels.

    Args:
        logits: (H, W) float32, the merged map.
        threshold: logits above it count.
        deadline: of the bridging: noise has many thousand pieces.

    Returns:
        (H, W) bool.

    Raises:
        TimeLimitError: the deadline passed.
    """
    mask = logits > threshold
    if not mask.any():  # OpenCV crashes the process on an array without pixels
        return mask
    if cleaning.closing_radius_px > 0:
        size = 2 * cleaning.closing_radius_px + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        mask = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, disc).view(bool)
    if cleaning.gap_px > 0:
        mask = bridged(mask, logits, cleaning.gap_px, deadline)
    return drop_small(mask, cleaning.min_area_px)


def bridged(mask: np.ndarray, logits: np.ndarray, gap_px: int, deadline: Deadline = NO_DEADLINE) -> np.ndarray:
    """The mask with its pieces joined where they are at most `gap_px` apart, shortest gaps first.

    Each joint is the path through the gap on which the map is highest, as wide as the map's ridge is likely to be: its
    pixel and the four beside it.

    Args:
        mask: (H, W) bool.
        logits: (H, W) float32.
        deadline: checked at every joint.

    Returns:
        (H, W) bool.

    Raises:
        TimeLimitError: the deadline passed.
    """
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    if count <= 2:
        return mask
    # For every pixel the nearest piece and its distance; where the nearest one changes, two pieces face each other.
    distance, nearest = cv2.distanceTransformWithLabels(
        (~mask).view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    inside = np.flatnonzero(mask)
    pixel_of = np.zeros(len(inside) + 1, np.int64)
    pixel_of[nearest.ravel()[inside]] = inside
    piece_of = labels.ravel()[pixel_of]
    height, width = mask.shape
    found: dict[tuple[int, int], list] = {pair: [] for pair in NEIGHBOURS}
    for top in range(0, height, ROWS_AT_ONCE):
        apart, closest = (of_all[top : top + ROWS_AT_ONCE + 1] for of_all in (distance, nearest))  # and the row below
        if apart.min() > gap_px:
            continue
        piece = piece_of[closest]
        for down, right in NEIGHBOURS:
            rows, columns = min(ROWS_AT_ONCE, len(apart) - down), slice(max(-right, 0), width - max(right, 0))
            here = slice(0, rows), columns
            there = slice(down, rows + down), slice(max(right, 0), width + min(right, 0))
            facing = np.nonzero((piece[here] != piece[there]) & (apart[here] + apart[there] <= gap_px))
            lengths = apart[here][facing] + apart[there][facing]
            found[down, right].append((lengths, closest[here][facing], closest[there][facing]))
    by_pair = (of_strip for of_strips in found.values() for of_strip in of_strips)
    lengths, starts, ends = (np.concatenate(parts) for parts in zip(*by_pair))
    first, second = np.sort([piece_of[starts], piece_of[ends]], axis=0).astype(np.int64)
    pairs = first * count + second
    order = np.lexsort((pairs, lengths))
    shortest = order[np.sort(np.unique(pairs[order], return_index=True)[1])]  # gap of every pair
    parent = list(range(count))

    def root(piece: int) -> int:
        while parent[piece] != piece:
            parent[piece] = piece = parent[parent[piece]]
        return piece

    result = mask.view(np.uint8).copy()
    for gap in shortest:
        one, other = root(int(first[gap])), root(int(second[gap]))
        if one == other:
            continue
        deadline.check()
        parent[one] = other
        ends_yx = np.array([np.divmod(pixel_of[end[gap]], width) for end in (starts, ends)])
        ys, xs = _ridge(logits, mask, *ends_yx).T
        result[ys, xs] = 1
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            result[np.clip(ys + dy, 0, height - 1), np.clip(xs + dx, 0, width - 1)] = 1
    return result.view(bool)


def _ridge(logits: np.ndarray, mask: np.ndarray, start_yx: np.ndarray, end_yx: np.ndarray) -> np.ndarray:
    """The pixels (n, 2) y, x of the path between two pieces of the mask on which the map is highest."""
    top, left = np.maximum(np.minimum(start_yx, end_yx) - PATH_MARGIN_PX, 0)
    bottom, right = np.maximum(start_yx, end_yx) + PATH_MARGIN_PX + 1
    part, outside = logits[top:bottom, left:right], ~mask[top:bottom, left:right]
    # A path on the ridge may be longer than the straight one; how high the pieces are does not matter.
    costs = np.exp(np.clip(part[outside].max() - part, 0, 8) / 2)
    path, _ = route_through_array(costs, start_yx - (top, left), end_yx - (top, left), geometric=True)
    return np.array(path) + (top, left)


def drop_small(mask: np.ndarray, min_area_px: int) -> np.ndarray:
    """The mask (H, W) bool without its 8-connected components of fewer than `min_area_px` pixels."""
    if not mask.any():
        return np.zeros_like(mask)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False
    return keep[labels]
