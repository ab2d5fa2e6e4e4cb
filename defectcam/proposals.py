"""From a defect's regions to proposals: components, their confidence, names and order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

LARGEST_LOGIT = 6.0  # surer than that no network is
PIXEL_VARIANCE = 1 / 12  # of a uniform distribution one pixel wide
FEATURES = 7
LEVELS_ASKED = 3  # the finest: photos of all sizes have them


@dataclass(frozen=True, eq=False)
class Component:
    """One 8-connected region of a mask.

    Attributes:
        mask: (h, w) bool, the tight crop around the region; holes are False.
        left: column of the crop's first column in the image, px.
        top: row of the crop's first row in the image, px.
    """

    mask: np.ndarray
    left: int
    top: int

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """First column, first row, last column, last row in the image, all inclusive, px."""
        height, width = self.mask.shape
        return self.left, self.top, self.left + width - 1, self.top + height - 1


def find_components(mask: np.ndarray) -> list[Component]:
    """Splits a mask into its 8-connected components.

    Args:
        mask: (height, width) bool, or any numbers where non-zero means defect.

    Returns:
        The components, sorted by top, left and area.

    Raises:
        ValueError: the mask has not two dimensions.
    """
    mask = np.ascontiguousarray(mask, dtype=bool)
    if mask.ndim != 2:
        raise ValueError(f"a mask has two dimensions, not {mask.ndim}")
    if not mask.any():
        return []
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    components = []
    for index in range(1, count):
        left, top, width, height = (int(value) for value in stats[index, :4])
        crop = labels[top : top + height, left : left + width] == index
        components.append(Component(crop, left, top))
    return sorted(components, key=lambda component: (component.top, component.left, component.area_px))


@dataclass(frozen=True, eq=False)
class Proposal:
    """One region that may be a defect, with its confidence (0..1)."""

    component: Component
    confidence: float


def component_features(
    component: Component, logits: np.ndarray, levels: Mapping[float, np.ndarray]
) -> tuple[float, ...]:
    """What a component's confidence is made of: the map's evidence, size and shape, and whether the levels agree.

    Edges of structures and joints are as dark and thin as cracks, but straight. What only one level takes for a defect
    is seldom one.

    Args:
        component: a region of the plain map, T = 0.
        logits: (H, W) float32, that map.
        levels: scale, 1 or less -> plain map of that level of the pyramid. The LEVELS_ASKED finest count.

    Returns:
        FEATURES numbers: mean and 0.9 quantile of the logits inside; log2 of the box's diagonal in px; log2 of the mean
        width in px (area over diagonal); log2 of the minor axis over the major axis of the ellipse with the component's
        second moments: 0 of a disc, the lower, the straighter; mean and standard deviation of what the levels say: the
        mean logit inside of each. Logits count within -LARGEST_LOGIT..LARGEST_LOGIT.
    """
    x0, y0, x1, y1 = component.box_xyxy
    inside = np.clip(logits[y0 : y1 + 1, x0 : x1 + 1][component.mask], -LARGEST_LOGIT, LARGEST_LOGIT)
    diagonal_px = math.hypot(*component.mask.shape)
    rows, columns = np.nonzero(component.mask)
    said = []
    for scale in sorted(levels, reverse=True)[:LEVELS_ASKED]:
        there = levels[scale][((y0 + rows) * scale).astype(int), ((x0 + columns) * scale).astype(int)]
        said.append(np.clip(there, -LARGEST_LOGIT, LARGEST_LOGIT).mean())
    return (
        float(inside.mean()),
        float(np.quantile(inside, 0.9)),
        math.log2(diagonal_px),
        math.log2(len(inside) / diagonal_px),
        _log2_aspect(component.mask),
        float(np.mean(said)),
        float(np.std(said)),
    )


def _log2_aspect(mask: np.ndarray) -> float:
    moments = cv2.moments(mask.view(np.uint8), binaryImage=True)
    along_x, along_y, mixed = (moments[name] / moments["m00"] for name in ("mu20", "mu02", "mu11"))
    along_x, along_y = along_x + PIXEL_VARIANCE, along_y + PIXEL_VARIANCE
    middle, radius = (along_x + along_y) / 2, math.hypot((along_x - along_y) / 2, mixed)
    return 0.5 * math.log2(max(middle - radius, PIXEL_VARIANCE) / (middle + radius))


def component_confidence(features: Sequence[float], weights: Sequence[float]) -> float:
    """Probability (0..1) that a component is a defect: logistic regression fitted on val proposals.

    Args:
        features: of `component_features`.
        weights: of the features in their order, and the intercept.
    """
    return float(probability(np.dot(weights, (*features, 1.0))))


def probability(logits: np.ndarray) -> np.ndarray:
    """Logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def logit(probability_: float) -> float:
    """Its inverse; 0 and 1 are taken for 1e-6 and 1 - 1e-6."""
    clipped = min(max(probability_, 1e-6), 1 - 1e-6)
    return math.log(clipped / (1 - clipped))


def proposal_id(digest: str, defect: str, rank: int) -> str:
    """Names a proposal: 8 hex digits, the same whenever all arguments are.

    Args:
        digest: stands for the photo's pixels, the weights and the settings.
        defect: the label.
        rank: among the proposals of that defect on the photo.
    """
    return hashlib.blake2s(repr((digest, defect, rank)).encode(), digest_size=4).hexdigest()
