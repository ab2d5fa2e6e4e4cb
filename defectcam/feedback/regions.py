"""How far an annotator changed a region, and what regions have in common; `defectcam.regions` makes them from shapes."""

from __future__ import annotations

import cv2
import numpy as np

from defectcam.evaluation.measures import OUTLINE_TOLERANCE_PX, saved_per_component
from defectcam.proposals import Component
from defectcam.regions import on_one_crop

SAME_OUTLINE_PX = 1  # outlines no farther apart count as the same
MORPHOLOGY_MARGIN_PX = 12  # what the simulated annotator's erosion and dilation may need around a shape


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

    0: nothing was moved; 1: nothing of the old outline is left. An added part counts, and so does a part that
    was cut away.
    """
    (old, new), _, _ = on_one_crop([before, after], margin_px=SAME_OUTLINE_PX + 1)
    old, new = _outline(old), _outline(new)
    near = np.ones((2 * SAME_OUTLINE_PX + 1,) * 2, np.uint8)
    far = np.count_nonzero(old & ~(cv2.dilate(new.astype(np.uint8), near) > 0))
    far += np.count_nonzero(new & ~(cv2.dilate(old.astype(np.uint8), near) > 0))
    return float(far / (np.count_nonzero(old) + np.count_nonzero(new)))  # databases take no numpy numbers


def saved_share(before: Component, after: Component, defect: str, width: int, height: int) -> float:
    """Share (0..1) of clicks saved: the annotator corrected `before` and did not draw `after` anew (paper 4.3, Eq. 3).

    It is counted as for simulated annotators (`defectcam.evaluation.measures`). The outline that the annotator left is the
    truth. Of a region too small for that, it is the share of the outline that was not edited.

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
    depth = depth_px(region)
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return region.left + int(x), region.top + int(y)


def depth_px(region: Component) -> np.ndarray:
    """How far every pixel of a region's crop is from its outside, (h, w) float32."""
    depth = cv2.distanceTransform(np.pad(region.mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return depth[1:-1, 1:-1]


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch its outside; the mask keeps clear of its crop's rim."""
    return mask & ~(cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
