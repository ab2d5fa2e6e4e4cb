"""From the normalised map to a region: low threshold, closing, no small components (paper 3.1, Fig. 5)."""

from __future__ import annotations

import cv2
import numpy as np


def binarise(normalised_map: np.ndarray, cam_threshold: float, closing_radius_px: int, min_area_px: int) -> np.ndarray:
    """The paper's three steps on a normalised map.

    Args:
        normalised_map: (H, W) float, >= 0.
        cam_threshold: theta; 0.1 in the paper. Strictly above it counts, so that 0 leaves out empty regions.
        closing_radius_px: radius of the closing's disc; 0 for none. Joins a thin defect's broken parts.
        min_area_px: components of fewer pixels are dropped.

    Returns:
        (H, W) bool.
    """
    mask = (normalised_map > cam_threshold).astype(np.uint8)
    if closing_radius_px > 0 and mask.any():
        size = 2 * closing_radius_px + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disc)
    return drop_small(mask.astype(bool), min_area_px)


def drop_small(mask: np.ndarray, min_area_px: int) -> np.ndarray:
    """The mask (H, W) bool without its 8-connected components of fewer than `min_area_px` pixels."""
    if not mask.any():  # OpenCV crashes the process on an array without pixels
        return np.zeros_like(mask)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False
    return keep[labels]
