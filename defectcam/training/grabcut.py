"""GrabCut: how pseudo-labels of defects with an area get their edges (beyond the paper).

The map of a network that learnt from clicks reaches far past a spall, and overlooks others. It says about where spalls are, the
clicks say surely where one is and where none is, and the photo says where the edges are: GrabCut (Rother, Kolmogorov and
Blake, 2004) parts the colours of the one from those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

SIDE_PX = 600  # larger photos are reduced to this, where the cut takes about a second
CLICK_RADIUS = 0.03  # of the photo's longer side: so far around a click all is the defect,
EDGE_SIGMA = 0.02  # so wide is the blur of the cut,
LEAST_SHARE = 0.3  # and so much of the defect must be left after it: an annotator's outline takes in small gaps
NOISE_SIGMA_PX = 1.0
CUTS = 3


def grabcut(
    image_rgb: np.ndarray,
    likely: np.ndarray,
    clicks_xy: Sequence[tuple[int, int]],
    patches_xyxy: Sequence[tuple[int, int, int, int]],
) -> np.ndarray:
    """What has the colours of the defect.

    Args:
        image_rgb: (H, W, 3) uint8.
        likely: (H, W) bool, where a network sees the defect.
        clicks_xy: positive clicks, px.
        patches_xyxy: boxes without the defect, half-open, px.

    Returns:
        (H, W) bool; nothing without positive clicks. The same for equal arguments.
    """
    height, width = likely.shape
    if not clicks_xy:
        return np.zeros_like(likely)
    scale = min(1.0, SIDE_PX / max(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    longer_px = max(small)
    marks = np.full(small[::-1], cv2.GC_PR_BGD, np.uint8)
    marks[cv2.resize(likely.astype(np.uint8), small, interpolation=cv2.INTER_NEAREST) > 0] = cv2.GC_PR_FGD
    for x0, y0, x1, y1 in patches_xyxy:
        marks[int(y0 * scale) : int(y1 * scale) + 1, int(x0 * scale) : int(x1 * scale) + 1] = cv2.GC_BGD
    for x, y in clicks_xy:
        cv2.circle(marks, (int(x * scale), int(y * scale)), max(1, int(CLICK_RADIUS * longer_px)), int(cv2.GC_FGD), -1)
    if np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)).all():  # no colour is left that is not the defect
        return np.ones_like(likely)
    cv2.setRNGSeed(0)  # GrabCut draws the colours that it begins with
    smooth = cv2.GaussianBlur(cv2.resize(image_rgb, small, interpolation=cv2.INTER_AREA), (0, 0), NOISE_SIGMA_PX)
    colours = cv2.cvtColor(smooth, cv2.COLOR_RGB2LAB)
    cv2.grabCut(colours, marks, None, np.zeros((1, 65)), np.zeros((1, 65)), CUTS, cv2.GC_INIT_WITH_MASK)
    defect = np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    blurred = cv2.GaussianBlur(defect, (0, 0), EDGE_SIGMA * longer_px)
    return cv2.resize(blurred, (width, height)) > LEAST_SHARE
