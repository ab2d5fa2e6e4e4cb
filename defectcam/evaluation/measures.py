"""How good a proposal is, and what it saves an annotator (paper 4.3, Eq. 3, and a simulated annotator).

All masks are (H, W) bool. The simulated annotator counts clicks: drawing a component takes one per vertex of its
simplified outline; correcting proposals takes one per vertex that must be drawn, two per stretch of outline that
must be cut, one if all proposals of the photo are first eroded or dilated at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

SMALLEST_COMPONENT_PX = 30
OUTLINE_TOLERANCE_PX = 2.0
F1_TOLERANCE_PX = 2
TOUCHING_PX = 3  # a proposal this near a component is taken for a proposal of it
MORPHOLOGY_RADII_PX = (0, -10, -6, -3, -1, 1, 3, 6)
GROUPS = (0.95, 0.75, 0.5)  # Eq. 3: shares of time saved that the groups start at and weigh


def iou(proposed: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of pixels; 1 where both are empty."""
    union = np.count_nonzero(proposed | truth)
    return np.count_nonzero(proposed & truth) / union if union else 1.0


def f1_2px(proposed: np.ndarray, truth: np.ndarray) -> float:
    """F1 with 2 px tolerance: pixels count as right within a 5 x 5 dilation of the other mask; 1 where both are empty."""
    return f1_2px_of_all([proposed], [truth])


def f1_2px_of_all(proposed: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """F1 with 2 px tolerance over the pixels of several photos' masks together."""
    right = found = wanted = met = 0
    for mask, true in zip(proposed, truth, strict=True):
        right += np.count_nonzero(mask & _dilated(true, F1_TOLERANCE_PX))
        met += np.count_nonzero(true & _dilated(mask, F1_TOLERANCE_PX))
        found, wanted = found + np.count_nonzero(mask), wanted + np.count_nonzero(true)
    if not found or not wanted:
        return float(not found and not wanted)
    precision, recall = right / found, met / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def false_components(proposed: np.ndarray, truth: np.ndarray) -> int:
    """Proposed components that touch no ground truth dilated by 2 px."""
    count, labels = cv2.connectedComponents(proposed.astype(np.uint8), connectivity=8)
    touching = np.unique(labels[_dilated(truth, F1_TOLERANCE_PX) & proposed])
    return count - 1 - len(touching)


def boundary_tolerance_px(defect: str, shape: tuple[int, int]) -> float:
    """How near an outline must be: people place those of spalling and rust no finer than 1 % of the photo."""
    return max(3.0, (0.005 if defect == "crack" else 0.01) * max(shape))


def saved_per_component(proposed: np.ndarray, truth: np.ndarray, defect: str) -> list[float]:
    """Share of clicks saved (0..1) for each ground-truth component of at least 30 px, in label order.

    The proposals' morphology is the one that saves the photo's annotator most in all.
    """
    best: list[float] = []
    for radius_px in MORPHOLOGY_RADII_PX:
        saved = _saved(_morphed(proposed, radius_px), truth, defect, extra_clicks=int(radius_px != 0))
        if not best or sum(saved) > sum(best):
            best = saved
    return best


def found_components(proposed: np.ndarray, truth: np.ndarray) -> list[bool]:
    """Whether each ground-truth component of at least 30 px has a proposal, in label order."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(truth.astype(np.uint8), connectivity=8)
    found = set(np.unique(labels[_dilated(proposed, TOUCHING_PX)]).tolist())
    large = stats[:, cv2.CC_STAT_AREA] >= SMALLEST_COMPONENT_PX
    return [component in found for component in range(1, len(stats)) if large[component]]


def relative_time_saving(saved: Sequence[float]) -> float:
    """Eq. 3: groups of instances by the share saved, each weighed with its lower bound; 0 of no instances."""
    counts = [0] * len(GROUPS)
    for share in saved:
        for index, group in enumerate(GROUPS):
            if share >= group:
                counts[index] += 1
                break
    return relative_time_saving_of_groups(len(saved), counts)


def relative_time_saving_of_groups(instances: int, counts: Sequence[int]) -> float:
    """Eq. 3 from the sizes of the groups G95, G75, G50 among `instances`."""
    return sum(group * count for group, count in zip(GROUPS, counts)) / instances if instances else 0.0


def _dilated(mask: np.ndarray, radius_px: int) -> np.ndarray:
    """Grown by a square: every pixel within `radius_px` rows and columns of the mask."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * radius_px + 1,) * 2, np.uint8)) > 0


def _morphed(mask: np.ndarray, radius_px: int) -> np.ndarray:
    if radius_px == 0:
        return mask
    size = 2 * abs(radius_px) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    operation = cv2.erode if radius_px < 0 else cv2.dilate
    return operation(mask.astype(np.uint8), disc) > 0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask that touch its outside; where it meets the image's edge that counts as outside."""
    padded = np.pad(mask.astype(np.uint8), 1)
    return (padded - cv2.erode(padded, np.ones((3, 3), np.uint8)))[1:-1, 1:-1] > 0


def _distance_to(boundary: np.ndarray) -> np.ndarray:
    """Distance in px of every pixel to the boundary; infinite where there is none."""
    if not boundary.any():
        return np.full(boundary.shape, np.inf)
    return cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """All contours, holes too, each (n, 2) int x, y of every boundary pixel in order."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [contour[:, 0] for contour in contours]


def _saved(proposed: np.ndarray, truth: np.ndarray, defect: str, extra_clicks: int) -> list[float]:
    tau = boundary_tolerance_px(defect, truth.shape)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(truth.astype(np.uint8), connectivity=8)
    _, proposed_labels = cv2.connectedComponents(proposed.astype(np.uint8), connectivity=8)
    saved = []
    for component in range(1, count):
        if stats[component, cv2.CC_STAT_AREA] < SMALLEST_COMPONENT_PX:
            continue
        own = labels == component
        outlines = _outlines(own)
        vertices = [cv2.approxPolyDP(line[:, None], OUTLINE_TOLERANCE_PX, True)[:, 0] for line in outlines]
        from_scratch = max(3, sum(map(len, vertices)))
        touching = np.unique(proposed_labels[_dilated(own, TOUCHING_PX)])
        touching = touching[touching > 0]
        if not len(touching):
            saved.append(0.0)
            continue
        proposals = np.isin(proposed_labels, touching)
        to_proposals, to_truth = _distance_to(_boundary(proposals)), _distance_to(_boundary(truth))
        to_draw = sum(np.count_nonzero(to_proposals[line[:, 1], line[:, 0]] > tau) for line in vertices)
        to_cut = sum(_runs(to_truth[line[:, 1], line[:, 0]] > tau) for line in _outlines(proposals))
        cost = to_draw + 2 * to_cut + extra_clicks
        saved.append(float(np.clip(1 - cost / from_scratch, 0, 1)))
    return saved


def _runs(far: np.ndarray) -> int:
    """Stretches of True along a closed line."""
    if far.all():
        return int(len(far) > 0)
    return int(np.count_nonzero(far & ~np.roll(far, 1)))
