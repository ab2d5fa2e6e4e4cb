"""GrabCut inside a region: how pseudo-labels of defects with an area get their edges (beyond the paper).

The map of a network that learnt from clicks reaches far past a spall. It says where the spall is, the photo says where its
edge is: GrabCut (Rother, Kolmogorov and Blake, 2004) parts the colours inside the region from those around it.
"""

from __future__ import annotations

import cv2
import numpy as np

SIDE_PX = 400  # a region and what is around it are reduced to this, so that a large one takes no longer than a second
MARGIN = 0.25  # of the region's longer side: what around it counts as not the defect
CLICK_RADIUS = 0.08  # of the root of the region's area: so far around a click all is the defect,
EDGE_SIGMA = 0.06  # so wide is the blur of the cut,
LEAST_SHARE = 0.3  # and so much of the defect must be left after it: an annotator's outline takes in small gaps
NOISE_SIGMA_PX = 1.0
CUTS = 3
LEAST_AROUND_PX = 50  # of fewer pixels around a region nothing can be learnt: it is kept as it is


def grabcut(image_rgb: np.ndarray, outline: np.ndarray, clicks_xy: list[tuple[int, int]]) -> np.ndarray:
    """Of the regions that were clicked on, what has the colours of the defect.

    Args:
        image_rgb: (H, W, 3) uint8.
        outline: (H, W) bool, regions that show the defect and more.
        clicks_xy: positive clicks, px.

    Returns:
        (H, W) bool, a part of `outline`; the same for equal arguments.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(outline.astype(np.uint8), connectivity=8)
    result, (height, width) = np.zeros_like(outline), outline.shape
    for label in range(1, count):
        clicked = [(x, y) for x, y in clicks_xy if labels[y, x] == label]
        if not clicked:
            continue
        x, y, region_width, region_height, area_px = (int(value) for value in stats[label])
        margin = int(MARGIN * max(region_width, region_height)) + 1
        x0, y0 = max(0, x - margin), max(0, y - margin)
        box = np.s_[y0 : min(height, y + region_height + margin), x0 : min(width, x + region_width + margin)]
        inside = [(click_x - x0, click_y - y0) for click_x, click_y in clicked]
        result[box] |= _cut(image_rgb[box], labels[box] == label, inside, area_px**0.5)
    return result


def _cut(image_rgb: np.ndarray, region: np.ndarray, clicks_xy: list[tuple[int, int]], size_px: float) -> np.ndarray:
    """The part of one region, (H, W) bool, that has the colours of the defect; `size_px` is the root of its area."""
    height, width = region.shape
    scale = min(1.0, SIDE_PX / max(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = cv2.GaussianBlur(cv2.resize(image_rgb, small, interpolation=cv2.INTER_AREA), (0, 0), NOISE_SIGMA_PX)
    marks = cv2.resize(region.astype(np.uint8), small, interpolation=cv2.INTER_NEAREST) * np.uint8(cv2.GC_PR_FGD)
    for x, y in clicks_xy:
        cv2.circle(marks, (int(x * scale), int(y * scale)), max(2, int(CLICK_RADIUS * size_px * scale)), int(cv2.GC_FGD), -1)
    if (marks == cv2.GC_BGD).sum() < LEAST_AROUND_PX:
        return region
    cv2.setRNGSeed(0)  # GrabCut's first colours are drawn
    colours = cv2.cvtColor(smooth, cv2.COLOR_RGB2LAB)
    cv2.grabCut(colours, marks, None, np.zeros((1, 65)), np.zeros((1, 65)), CUTS, cv2.GC_INIT_WITH_MASK)
    defect = np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    blurred = cv2.GaussianBlur(defect, (0, 0), max(0.5, EDGE_SIGMA * size_px * scale))
    return region & (cv2.resize(blurred, (width, height)) > LEAST_SHARE)
