"""Dark lines inside a region: how pseudo-labels of cracks get thin (beyond the paper).

The map of a network that learnt from clicks is a band far wider than the crack. It says where the crack is, the image
says where its edge is: a crack is a line darker than the texture around it.
"""

from __future__ import annotations

import cv2
import numpy as np

from defectcam.postprocess import drop_small

WIDTH_PX = 17  # of the widest line
SURE_HEIGHT = 3.0  # standard deviations of the texture that a line reaches somewhere,
LEAST_HEIGHT = 1.5  # and everywhere
CLOSING_RADIUS_PX = 2
MIN_AREA_PX = 24
WINDOW_PX = 151  # neighbourhood whose texture a line must stand out from
FAINTEST_GREY_LEVELS = 6.0  # a line darker than its surroundings by less cannot be seen


def dark_lines(image_rgb: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The dark lines in a region.

    Args:
        image_rgb: (H, W, 3) uint8.
        region: (H, W) bool.

    Returns:
        (H, W) bool.
    """
    height = line_height(image_rgb)
    weak = region & (height >= LEAST_HEIGHT)
    count, labels = cv2.connectedComponents(weak.astype(np.uint8), connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[weak & (height >= SURE_HEIGHT)])] = True
    keep[0] = False
    size = 2 * CLOSING_RADIUS_PX + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    lines = cv2.morphologyEx(keep[labels].astype(np.uint8), cv2.MORPH_CLOSE, disc)
    return drop_small(region & (lines > 0), MIN_AREA_PX)


def line_height(image_rgb: np.ndarray) -> np.ndarray:
    """How far a dark line stands out from the texture around it, (H, W) float32.

    The black top-hat (closing minus image) of the smoothed grey image, in units of its standard deviation in the
    neighbourhood; 0 where the line is too faint to be seen.
    """
    grey = cv2.GaussianBlur(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (WIDTH_PX, WIDTH_PX))
    response = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, disc).astype(np.float32)
    mean = cv2.blur(response, (WINDOW_PX, WINDOW_PX))
    deviation = np.sqrt(np.maximum(cv2.blur(response * response, (WINDOW_PX, WINDOW_PX)) - mean * mean, 0))
    height = (response - mean) / (deviation + 1)
    height[response < FAINTEST_GREY_LEVELS] = 0
    return height
