"""Outlines that follow the image inside the region the climbed map proposes (beyond the paper).

The activation map of a crack is a band of some 40 px around 3 px of crack: it says where the crack is, the image
says where its edge is. Every rule here is local (it looks at most WINDOW_PX / 2 around a pixel), so a crop of a
photo and the photo itself agree.
"""

from __future__ import annotations

import cv2
import numpy as np

from defectcam.postprocess import drop_small
from defectcam.tiling import tile_grid

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
        (H, W) bool, a subset of the region: a pixel belongs to a line if it reaches half of `sharpness` and hangs
        together with one that reaches all of it (hysteresis); small gaps are closed.
    """
    weak, strong = np.zeros(region.shape, np.uint8), np.zeros(region.shape, bool)
    for tile in tile_grid(*region.shape, halo_px=_reach_px(parameters), stride_px=1):
        (y0, y1, x0, x1), (top, bottom, left, right) = tile.core, tile.outer
        inside = region[y0:y1, x0:x1]
        if inside.any():
            height = tile.core_of(_ridge_height(image_rgb[top:bottom, left:right], parameters["width_px"]))
            weak[y0:y1, x0:x1] = inside & (height >= parameters["sharpness"] / 2)
            strong[y0:y1, x0:x1] = inside & (height >= parameters["sharpness"])
    count, labels = cv2.connectedComponents(weak, connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[strong])] = True
    keep[0] = False
    lines = keep[labels].astype(np.uint8)
    if parameters["closing_radius_px"] > 0:
        size = 2 * parameters["closing_radius_px"] + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        lines = cv2.morphologyEx(lines, cv2.MORPH_CLOSE, disc)
    return drop_small((lines > 0) & region, parameters["min_area_px"])


def check_parameters(parameters: dict) -> None:
    """Raise ValueError, naming the field, for parameters that `snap` could not work with."""
    wanted = {"method", "width_px", "sharpness", "closing_radius_px", "min_area_px"}
    if set(parameters) != wanted:
        raise ValueError(f"snap must have the fields {sorted(wanted)}, not {sorted(parameters)}")
    if parameters["method"] != "dark_ridges":
        raise ValueError(f"snap method must be 'dark_ridges', not {parameters['method']!r}")
    for name in sorted(wanted - {"method"}):
        if not isinstance(parameters[name], (int, float)) or not 0 <= parameters[name] < 1000:
            raise ValueError(f"snap {name} must be a number from 0 to 1000, not {parameters[name]!r}")


def _ridge_height(image_rgb: np.ndarray, width_px: int) -> np.ndarray:
    """How far a dark line up to `width_px` wide stands out from the texture around it, (H, W) float32.

    The black top-hat (closing minus image) of the smoothed grey image, in units of its standard deviation in the
    neighbourhood; 0 where the line is too faint to be seen.
    """
    grey = cv2.GaussianBlur(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width_px, width_px))
    response = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, disc).astype(np.float32)
    mean = cv2.blur(response, (WINDOW_PX, WINDOW_PX))
    deviation = np.sqrt(np.maximum(cv2.blur(response * response, (WINDOW_PX, WINDOW_PX)) - mean * mean, 0))
    height = (response - mean) / (deviation + 1)
    height[response < FAINTEST_GREY_LEVELS] = 0
    return height


def _reach_px(parameters: dict) -> int:
    """How far around a pixel its ridge height looks: the neighbourhood, the top-hat twice, the smoothing."""
    return WINDOW_PX // 2 + 2 * (parameters["width_px"] // 2) + 4
