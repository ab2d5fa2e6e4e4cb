"""How good proposals are, and what they save an annotator (paper 4.3, Eq. 3, and a simulated annotator).

All masks are (H, W) bool, and components are 8-connected. Ground truth of fewer than 30 px counts as pixels, not as an
instance. The simulated annotator counts clicks: drawing a component takes one per vertex of its simplified outline;
correcting proposals takes one per vertex that must be drawn, two per stretch of outline that must be cut, one if all
proposals of the photo are first eroded or dilated at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from defectcam.proposals import Component

SMALLEST_COMPONENT_PX = 30
OUTLINE_TOLERANCE_PX = 2.0
FEWEST_VERTICES = 3
F1_TOLERANCE_PX = 2
SKELETON_TOLERANCE_PX = 4  # of clIoU, as in OmniCrack30k
TOUCHING_PX = 3  # a proposal this near a component is taken for a proposal of it
MORPHOLOGY_RADII_PX = (0, -10, -6, -3, -1, 1, 3, 6)
GROUPS = (0.95, 0.75, 0.5)  # Eq. 3: shares of time saved that the groups start at and weigh
FINDING_IOU = 0.5
FINDING_SKELETON_SHARE = 0.7
WIDE_PX = 33  # skeletons of regions that hold such a square are made one by one
INSIDE_SHARE = 0.7  # a proposal of which this much lies within ground truth is right
CONFIDENCE_BINS = 10
BOOTSTRAP_DRAWS = 1000


# Pixels


def iou(proposed: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of pixels; 1 where both are empty."""
    union = np.count_nonzero(proposed | truth)
    return np.count_nonzero(proposed & truth) / union if union else 1.0


def tolerant_counts(proposed: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int]:
    """What F1 with 2 px tolerance is made of: proposed pixels that are right and all, true pixels that are met and all.

    A pixel is right or met within a 5 x 5 dilation of the other mask.
    """
    right = np.count_nonzero(proposed & _dilated(truth, F1_TOLERANCE_PX))
    met = np.count_nonzero(truth & _dilated(proposed, F1_TOLERANCE_PX))
    return right, np.count_nonzero(proposed), met, np.count_nonzero(truth)


def f1_of_counts(right: int, proposed: int, met: int, true: int) -> float:
    """F1 of the counts of one mask or the summed ones of several; 1 where both are empty."""
    if not proposed or not true:
        return float(not proposed and not true)
    precision, recall = right / proposed, met / true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def f1_2px(proposed: np.ndarray, truth: np.ndarray) -> float:
    """F1 with 2 px tolerance of one photo; 1 where both masks are empty."""
    return f1_of_counts(*tolerant_counts(proposed, truth))


def false_components(proposed: np.ndarray, truth: np.ndarray) -> int:
    """Proposed components that touch no ground truth dilated by 2 px."""
    count, labels = cv2.connectedComponents(proposed.astype(np.uint8), connectivity=8)
    touching = np.zeros(count, bool)
    touching[labels[_dilated(truth, F1_TOLERANCE_PX) & proposed]] = True
    return count - 1 - int(touching.sum())


def centreline_counts(proposed: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """What clIoU is made of, as OmniCrack30k counts: pixels of the skeletons that are found, false and missed.

    Found are those of the truth within 4 px of the proposal's, missed the others; false are those of the proposal
    farther than 4 px from the truth's. clIoU = found / (found + false + missed).
    """
    own, wanted = skeleton(proposed), skeleton(truth)
    found = np.count_nonzero(wanted & _near(own, SKELETON_TOLERANCE_PX))
    false = np.count_nonzero(own & ~_near(wanted, SKELETON_TOLERANCE_PX))
    return found, false, np.count_nonzero(wanted) - found


def skeleton(mask: np.ndarray) -> np.ndarray:
    """The skeleton (H, W) bool that scikit-image gives of a mask (H, W) bool.

    It passes over its picture once per pixel of the widest region, so wide regions are cut out.
    """
    inner = cv2.erode(mask.astype(np.uint8), np.ones((WIDE_PX, WIDE_PX), np.uint8)) > 0
    if not inner.any():
        return skeletonize(mask)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    is_wide = np.zeros(count, bool)
    is_wide[labels[inner]] = True
    result = skeletonize(mask & ~is_wide[labels])
    for label in np.flatnonzero(is_wide).tolist():
        x, y, width, height, _ = stats[label].tolist()
        crop = slice(y, y + height), slice(x, x + width)
        result[crop] |= skeletonize(labels[crop] == label)
    return result


# Instances


@dataclass(frozen=True, eq=False)
class Instances:
    """How a photo's proposals and ground-truth components of at least 30 px belong together.

    Attributes:
        found_iou: (n,) per component, in label order, the largest IoU of a proposal that finds it; NaN where none does.
        pieces: (n,) per component the number of proposals that touch it, dilated by 2 px.
        right: (m,) bool per proposal.
        vertex_ratio: (m,) per proposal its vertices divided by those of the components it overlaps; NaN where it
            overlaps none.
        holes: (m,) per proposal.
    """

    found_iou: np.ndarray
    pieces: np.ndarray
    right: np.ndarray
    vertex_ratio: np.ndarray
    holes: np.ndarray


def match_instances(
    proposals: Sequence[Component], truth: np.ndarray, defect: str, hole_share: float = 0.0
) -> Instances:
    """Which components are found, and by which proposals.

    A proposal finds a component with an IoU of 0.5 or more; of cracks, where it covers 0.7 of the component's skeleton
    within 2 px. It is right if it finds one or if 0.7 of it lies within ground truth.

    Args:
        proposals: regions of the photo.
        hole_share: holes that together have at most this share of a proposal are filled before vertices and holes are
            counted, as they are in its polygon.
    """
    known = _Truth.of(truth)
    vertices = np.array([max(len(own), FEWEST_VERTICES) for own in known.vertices])
    lines = skeleton(truth) if defect == "crack" else np.zeros_like(truth)
    length = np.bincount(known.labels[lines], minlength=known.count)
    found_iou, pieces = np.full(known.count, np.nan), np.zeros(known.count, int)
    right, holes = np.zeros(len(proposals), bool), np.zeros(len(proposals), int)
    ratio = np.full(len(proposals), np.nan)
    for index, one in enumerate(proposals):
        x0, y0, x1, y1 = one.box_xyxy
        around = _grown((y0, y1 + 1, x0, x1 + 1), F1_TOLERANCE_PX, truth.shape)
        labels, near = known.labels[around], np.zeros_like(truth[around])
        top, left = one.top - around[0].start, one.left - around[1].start
        own = slice(top, top + one.mask.shape[0]), slice(left, left + one.mask.shape[1])
        near[own] = one.mask
        near = _dilated(near, F1_TOLERANCE_PX)
        overlap = np.bincount(labels[own][one.mask], minlength=known.count)
        own_iou = overlap / (one.area_px + known.area - overlap)
        if defect == "crack":
            covered = np.bincount(labels[near & lines[around]], minlength=known.count)
            finds = known.large & (covered >= FINDING_SKELETON_SHARE * length)
        else:
            finds = known.large & (own_iou >= FINDING_IOU)
        found_iou[finds] = np.fmax(found_iou[finds], own_iou[finds])
        pieces[np.unique(labels[near])] += 1
        right[index] = finds.any() or overlap[1:].sum() >= INSIDE_SHARE * one.area_px
        filled, holes[index] = without_small_holes(one.mask, hole_share)
        its = known.large & (overlap > 0)
        if its.any():
            ratio[index] = max(sum(map(len, _simplified_outlines(filled))), FEWEST_VERTICES) / vertices[its].sum()
    return Instances(found_iou[known.large], pieces[known.large], right, ratio, holes)


def without_small_holes(mask: np.ndarray, hole_share: float) -> tuple[np.ndarray, int]:
    """A component's mask (h, w) with its smallest holes filled, and how many are left.

    Args:
        hole_share: what is filled has at most this share of the component's pixels in all.
    """
    outside = np.pad(~mask, 1, constant_values=True).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(outside, connectivity=4)
    holes = [label for label in range(1, count) if label != labels[0, 0]]
    holes.sort(key=lambda label: stats[label, cv2.CC_STAT_AREA])
    filled_px = np.cumsum([stats[label, cv2.CC_STAT_AREA] for label in holes])
    small = holes[: np.searchsorted(filled_px, hole_share * np.count_nonzero(mask), side="right")]
    return mask | np.isin(labels[1:-1, 1:-1], small), len(holes) - len(small)


# The simulated annotator


def boundary_tolerance_px(defect: str, shape: tuple[int, int]) -> float:
    """How near an outline must be: people place those of spalling and rust no finer than 1 % of the photo."""
    return max(3.0, (0.005 if defect == "crack" else 0.01) * max(shape))


def saved_per_component(proposed: np.ndarray, truth: np.ndarray, defect: str) -> list[float]:
    """Share of clicks saved (0..1) for each ground-truth component of at least 30 px, in label order.

    The proposals' morphology is the one that saves the photo's annotator most in all.
    """
    known = _Truth.of(truth)
    if not known.large.any() or not proposed.any():
        return [0.0] * np.count_nonzero(known.large)
    tau = boundary_tolerance_px(defect, truth.shape)
    rim = _boundary(truth)
    far = cv2.distanceTransform((~rim).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > tau
    around = _surroundings(known)
    best: list[float] = []
    for radius_px in MORPHOLOGY_RADII_PX:
        saved = _saved(_morphed(proposed, radius_px), known, around, far, tau, extra_clicks=int(radius_px != 0))
        if not best or sum(saved) > sum(best):
            best = saved
    return best


def touched_components(proposed: np.ndarray, truth: np.ndarray) -> list[bool]:
    """Whether each ground-truth component of at least 30 px has a proposal within 3 px, in label order."""
    known = _Truth.of(truth)
    touched = np.bincount(known.labels[_dilated(proposed, TOUCHING_PX)], minlength=known.count) > 0
    return touched[known.large].tolist()


def relative_time_saving(saved: Sequence[float]) -> float:
    """Eq. 3: groups of instances by the share saved, each weighed with its lower bound; 0 of no instances."""
    return float(np.mean(weighed(saved))) if len(saved) else 0.0


def weighed(saved: Sequence[float]) -> list[float]:
    """What Eq. 3 counts every share saved as: the lower bound of its group, 0 below all groups."""
    return [next((group for group in GROUPS if share >= group), 0.0) for share in saved]


def relative_time_saving_of_groups(instances: int, counts: Sequence[int]) -> float:
    """Eq. 3 from the sizes of the groups G95, G75, G50 among `instances`."""
    return sum(group * count for group, count in zip(GROUPS, counts)) / instances if instances else 0.0


# Over photos


def reliability(confidences: Sequence[float], right: Sequence[bool]) -> tuple[list[dict], float]:
    """Whether proposals of confidence c are right in a share c of the cases.

    Returns:
        Per bin of a tenth that has proposals its range, their number, mean confidence and share of right ones; and the
        expected calibration error, the mean over proposals of |mean confidence - share of right ones| of their bin.
    """
    confidences, right = np.asarray(confidences, float), np.asarray(right, float)
    bins = np.minimum((confidences * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    table, error = [], 0.0
    for number in np.unique(bins).tolist():
        inside = bins == number
        row = {
            "from": number / CONFIDENCE_BINS,
            "to": (number + 1) / CONFIDENCE_BINS,
            "proposals": int(inside.sum()),
            "confidence": float(confidences[inside].mean()),
            "right": float(right[inside].mean()),
        }
        error += row["proposals"] / len(bins) * abs(row["confidence"] - row["right"])
        table.append(row)
    return table, error


def bootstrap_sums(counts: np.ndarray) -> np.ndarray:
    """Sums over photos drawn anew, with replacement, BOOTSTRAP_DRAWS times; the same draws for the same shape.

    Args:
        counts: (n, k), a row per photo.

    Returns:
        (BOOTSTRAP_DRAWS, k).
    """
    draws = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), BOOTSTRAP_DRAWS)
    return draws @ counts


def interval_95(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of the bootstrap's values, undefined ones left out; None of none."""
    values = values[np.isfinite(values)]
    return [round(float(end), 4) for end in np.quantile(values, (0.025, 0.975))] if len(values) else None


# Parts


@dataclass(frozen=True, eq=False)
class _Truth:
    """Ground-truth components; lists and arrays are by label, 0 is the background.

    Attributes:
        labels: (H, W) int.
        area: pixels.
        large: bool, whether a component counts as an instance.
        boxes: half-open (y0, y1, x0, x1).
        vertices: (n, 2) int x, y of the simplified outlines.
    """

    labels: np.ndarray
    area: np.ndarray
    large: np.ndarray
    boxes: list[tuple[int, int, int, int]]
    vertices: list[np.ndarray]

    @property
    def count(self) -> int:
        """Number of labels."""
        return len(self.area)

    @classmethod
    def of(cls, truth: np.ndarray) -> _Truth:
        """Of a mask."""
        _, labels, stats, _ = cv2.connectedComponentsWithStats(truth.astype(np.uint8), connectivity=8)
        large = stats[:, cv2.CC_STAT_AREA] >= SMALLEST_COMPONENT_PX
        large[0] = False
        boxes = [(y, y + height, x, x + width) for x, y, width, height, _ in stats.tolist()]
        vertices: list[list[np.ndarray]] = [[] for _ in boxes]
        for line in _simplified_outlines(truth):
            vertices[labels[line[0, 1], line[0, 0]]].append(line)
        points = [np.concatenate(lines) if lines else np.empty((0, 2), int) for lines in vertices]
        return cls(labels, stats[:, cv2.CC_STAT_AREA], large, boxes, points)


def _saved(
    proposed: np.ndarray,
    known: _Truth,
    around: dict[int, np.ndarray],
    far: np.ndarray,
    tau: float,
    extra_clicks: int,
) -> list[float]:
    """`saved_per_component` of one morphology.

    Args:
        around: see `_surroundings`.
        far: (H, W) bool, pixels farther than tau from the truth's boundary.
    """
    count, labels = cv2.connectedComponents(proposed.astype(np.uint8), connectivity=8)
    to_cut = np.zeros(count, int)
    for line in _outlines(proposed):
        to_cut[labels[line[0, 1], line[0, 0]]] += _runs(far[line[:, 1], line[:, 0]])
    rows, columns = np.nonzero(_boundary(proposed))
    part = labels[rows, columns]
    order = np.argsort(part, kind="stable")  # part by part, and of each row by row
    rim, starts = np.column_stack([columns, rows])[order], np.searchsorted(part[order], np.arange(count + 1))
    reach_px, saved = math.ceil(tau), []
    for component, pixels in around.items():
        touching, points = np.zeros(count, bool), known.vertices[component]
        touching[labels.ravel()[pixels]] = True
        parts = 1 + np.flatnonzero(touching[1:])
        if not len(parts):
            saved.append(0.0)
            continue
        # What is farther off than tau from the component's box matters no more.
        y0, y1, x0, x1 = known.boxes[component]
        lines = [rim[starts[one] : starts[one + 1]] for one in parts.tolist()]
        rows_near = (np.searchsorted(line[:, 1], (y0 - reach_px, y1 + reach_px)) for line in lines)
        near = np.concatenate([line[first:end] for line, (first, end) in zip(lines, rows_near)])
        near = near[(near[:, 0] >= x0 - reach_px) & (near[:, 0] < x1 + reach_px)]
        distance_px = cKDTree(near).query(points)[0].astype(np.float32)  # infinite where nothing is near
        cost = np.count_nonzero(distance_px > tau) + 2 * to_cut[parts].sum() + extra_clicks
        saved.append(float(np.clip(1 - cost / max(FEWEST_VERTICES, len(points)), 0, 1)))
    return saved


def _surroundings(known: _Truth) -> dict[int, np.ndarray]:
    """Of every component that counts the pixels within TOUCHING_PX rows and columns of it, (n,) int in the flat photo."""
    found = {}
    for component in np.flatnonzero(known.large).tolist():
        crop = _grown(known.boxes[component], TOUCHING_PX, known.labels.shape)
        rows, columns = np.nonzero(_dilated(known.labels[crop] == component, TOUCHING_PX))
        found[component] = (rows + crop[0].start) * known.labels.shape[1] + columns + crop[1].start
    return found


def _grown(box: tuple[int, int, int, int], margin: int, shape: tuple[int, int]) -> tuple[slice, slice]:
    """A half-open box (y0, y1, x0, x1) with a margin, inside the photo."""
    y0, y1, x0, x1 = box
    return slice(max(y0 - margin, 0), min(y1 + margin, shape[0])), slice(max(x0 - margin, 0), min(x1 + margin, shape[1]))


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


def _near(pixels: np.ndarray, distance_px: int) -> np.ndarray:
    """The pixels (H, W) bool at most so far from some."""
    ys, xs = np.mgrid[-distance_px : distance_px + 1, -distance_px : distance_px + 1]
    disc = (ys**2 + xs**2 <= distance_px**2).astype(np.uint8)
    return cv2.dilate(pixels.astype(np.uint8), disc) > 0


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """All contours, holes too, each (n, 2) int x, y of every boundary pixel in order."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [contour[:, 0] for contour in contours]


def _simplified_outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The contours after Douglas-Peucker with 2 px."""
    return [cv2.approxPolyDP(line[:, None], OUTLINE_TOLERANCE_PX, True)[:, 0] for line in _outlines(mask)]


def _runs(far: np.ndarray) -> int:
    """Stretches of True along a closed line."""
    if far.all():
        return int(len(far) > 0)
    return np.count_nonzero(far[1:] & ~far[:-1]) + int(far[0] and not far[-1])
