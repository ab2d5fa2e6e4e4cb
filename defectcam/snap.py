"""Outlines that follow the image inside the region the climbed map proposes (beyond the paper).

The activation map of a crack is a band of some 40 px around 3 px of crack: it says where the crack is, the image
says where its edge is. Every rule here is local (it looks at most WINDOW_PX / 2 around a pixel), so a crop of a
photo and the photo itself agree.
"""

from __future__ import annotations

import cv2
import numpy as np

from defectcam.postprocess import drop_small

WINDOW_PX = 151  # neighbourhood whose texture a ridge must stand out from
FAINTEST_GREY_LEVELS = 6.0  # darker than the surroundings by less than this nobody sees


def snap(image_rgb: np.ndarray, region: np.ndarray, parameters: dict) -> np.ndarray:
    """Outline of the defect inside a region.

    Args:
        image_rgb: (H, W, 3) uint8.
        region: (H, W) bool, where the climbed map proposes the defect.
        parameters: the manifest's `snap`: {"method": "dark_ridges", "width_px", "sharpness", "closing_radius_px",
            "min_area_px"}.

    Returns:
        (H, W) bool, a subset of the region (up to the closing of gaps within it).

    Raises:
        ValueError: for a method that is not known.
    """
    if parameters["method"] != "dark_ridges":
        raise ValueError(f"snap method must be 'dark_ridges', not {parameters['method']!r}")
    if not region.any():
        return region
    snapped = np.zeros_like(region)
    margin = WINDOW_PX // 2 + parameters["width_px"]
    for y0, y1, x0, x1 in _boxes(region, margin):
        part = region[y0:y1, x0:x1]
        snapped[y0:y1, x0:x1] |= _dark_ridges(image_rgb[y0:y1, x0:x1], part, parameters)
    return drop_small(snapped, parameters["min_area_px"])


def _dark_ridges(image_rgb: np.ndarray, region: np.ndarray, parameters: dict) -> np.ndarray:
    """Dark lines up to `width_px` wide that stand out from the texture around them, by hysteresis.

    The response is a black top-hat (closing minus image) of the smoothed grey image, in units of its standard
    deviation in the neighbourhood: a pixel belongs to a line if it reaches half of `sharpness` and hangs together
    with one that reaches all of it.
    """
    grey = cv2.GaussianBlur(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (parameters["width_px"],) * 2)
    response = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, disc).astype(np.float32)
    mean = cv2.blur(response, (WINDOW_PX, WINDOW_PX))
    deviation = np.sqrt(np.maximum(cv2.blur(response * response, (WINDOW_PX, WINDOW_PX)) - mean * mean, 0))
    height = (response - mean) / (deviation + 1)
    height[(response < FAINTEST_GREY_LEVELS) | ~region] = 0
    weak = (height >= parameters["sharpness"] / 2).astype(np.uint8)
    count, labels = cv2.connectedComponents(weak, connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[height >= parameters["sharpness"]])] = True
    keep[0] = False
    lines = keep[labels]
    if parameters["closing_radius_px"] > 0:
        size = 2 * parameters["closing_radius_px"] + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        lines = (cv2.morphologyEx(lines.astype(np.uint8), cv2.MORPH_CLOSE, disc) > 0) & region
    return lines


def _boxes(region: np.ndarray, margin_px: int) -> list[tuple[int, int, int, int]]:
    """(y0, y1, x0, x1) around every component of a region, with a margin: what lies between them is not looked at."""
    height, width = region.shape
    _, _, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    return [
        (max(y - margin_px, 0), min(y + h + margin_px, height), max(x - margin_px, 0), min(x + w + margin_px, width))
        for x, y, w, h, _ in stats[1:].tolist()
    ]
