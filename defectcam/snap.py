"""Outlines that follow the image inside the region the climbed map proposes (beyond the paper).

The activation map of a crack is a band of some 40 px around 3 px of crack: it says where the crack is and how far
the proposal reaches, the image says where its edge is. Five ways to read the edge, a defect's manifest names its
one: `network` (the outline network, read per pixel), `dark_ridges`, `network_ridges` (the evidence of both
added up: the network knows a crack from a joint, the ridge is there where a crack grows faint), `grabcut`,
`superpixels`.

Every rule is local, so a crop of a photo and the photo itself agree: it looks no farther around a pixel than its
neighbourhood (`dark_ridges`, the networks) or its region (`grabcut`, `superpixels`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import cv2
import numpy as np
from skimage.segmentation import slic

from defectcam.postprocess import drop_small
from defectcam.tiling import TimeLimitError, tile_grid

WINDOW_PX = 151  # neighbourhood whose texture a ridge must stand out from
FAINTEST_GREY_LEVELS = 6.0  # darker than the surroundings by less than this nobody sees
HIGHEST_RIDGE = 6.0  # standard deviations; beyond it a line is no more certain
SURE_LOGIT = 1.5  # a line found by network and ridge reaches as much more evidence somewhere
HALF_WIDTH = np.ones((7, 7), np.uint8)  # in which a ridge's flanks are told from its top
GRABCUT_ROUNDS = 3
NETWORK_METHODS = ("network", "network_ridges")  # need the outline network
# Fields of the manifest's `snap` for each method, beside "method" itself.
FIELDS = {
    "network": ("probability", "margin_px", "min_area_px"),
    "network_ridges": ("probability", "ridge_weight", "width_px", "closing_radius_px", "min_area_px"),
    "dark_ridges": ("width_px", "sharpness", "closing_radius_px", "min_area_px"),
    "grabcut": ("sure_share", "margin_px", "min_area_px"),
    "superpixels": ("size_px", "share", "margin_px", "min_area_px"),
}


def snap(
    image_rgb: np.ndarray,
    region: np.ndarray,
    parameters: dict,
    outline_logits: Callable[[np.ndarray], np.ndarray] | None = None,
    deadline: float = math.inf,
) -> np.ndarray:
    """Outline of the defect in and around a region.

    Args:
        image_rgb: (H, W, 3) uint8.
        region: (H, W) bool, where the climbed map proposes the defect.
        parameters: the manifest's `snap`: {"method": ..., and the method's FIELDS}.
        outline_logits: for NETWORK_METHODS: from where logits are wanted, (H, W) bool, to the outline network's
            logits, (H, W) float; elsewhere they may be anything.
        deadline: on the clock of time.monotonic, s.

    Returns:
        (H, W) bool, a subset of the region, grown by `margin_px` for the methods that have it.

    Raises:
        TimeLimitError: the deadline passed.
    """
    if not region.any():
        return np.zeros_like(region)
    if parameters["method"] == "dark_ridges":
        heights = _ridge_heights(image_rgb, region, parameters["width_px"])
        mask = region & _lines(heights, region, parameters["sharpness"] / 2, parameters["sharpness"], parameters)
    elif parameters["method"] == "network_ridges":
        logits = outline_logits(region)
        heights = _ridge_heights(image_rgb, region, parameters["width_px"])
        # A line ends at half its height, as a peak's width is measured; not where the network itself is certain.
        line = region & ((heights >= 0.5 * cv2.dilate(heights, HALF_WIDTH)) | (logits > 0))
        evidence = logits + parameters["ridge_weight"] * np.minimum(heights, HIGHEST_RIDGE)
        least = _logit(parameters["probability"])
        mask = region & _lines(evidence, line, least, least + SURE_LOGIT, parameters)
    else:
        allowed = grown(region, parameters["margin_px"])
        if parameters["method"] == "network":
            mask = allowed & (outline_logits(allowed) > _logit(parameters["probability"]))
        elif parameters["method"] == "grabcut":
            mask = _grabcut(image_rgb, region, allowed, parameters["sure_share"], deadline)
        else:
            mask = allowed & _superpixels(image_rgb, region, parameters["size_px"], parameters["share"])
    return drop_small(mask, parameters["min_area_px"])


def check_parameters(parameters: dict) -> None:
    """Raise ValueError, naming the field, for parameters that `snap` could not work with."""
    method = parameters.get("method")
    if method not in FIELDS:
        raise ValueError(f"snap method must be one of {sorted(FIELDS)}, not {method!r}")
    if set(parameters) != {"method", *FIELDS[method]}:
        raise ValueError(f"snap {method} must have the fields {sorted(FIELDS[method])}, not {sorted(parameters)}")
    for name in FIELDS[method]:
        value, most = parameters[name], 1000
        what, types = "a number", (int, float)
        if name in ("probability", "sure_share", "share"):
            most = 1
        elif name.endswith("_px"):  # sizes of OpenCV's kernels
            what, types = "an integer", (int,)
        if type(value) not in types or not 0 <= value <= most:  # True is no number
            raise ValueError(f"snap {name} must be {what} from 0 to {most}, not {value!r}")
        if name == "probability" and not 0 < value < 1:
            raise ValueError(f"snap probability must lie between 0 and 1, not {value!r}")
        if name in ("size_px", "width_px") and value < 2:
            raise ValueError(f"snap {name} must be at least 2, not {value!r}")


def grown(region: np.ndarray, margin_px: int) -> np.ndarray:
    """A mask (H, W) bool with a margin around it."""
    if margin_px == 0:
        return region
    size = 2 * int(margin_px) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.dilate(region.astype(np.uint8), disc) > 0


def _grabcut(
    image_rgb: np.ndarray, region: np.ndarray, allowed: np.ndarray, sure_share: float, deadline: float
) -> np.ndarray:
    """GrabCut of every region by itself: its inmost `sure_share` is defect, all outside `allowed` is not.

    Each works on its own box with as much surroundings, so that one region does not colour another's models.
    """
    mask = np.zeros(region.shape, bool)
    image_bgr = np.ascontiguousarray(image_rgb[..., ::-1])
    depth = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(allowed.astype(np.uint8), connectivity=8)
    for index in range(1, count):
        if time.monotonic() > deadline:
            raise TimeLimitError
        left, top, width, height = (int(value) for value in stats[index, :4])
        y0, x0 = max(top - height // 2 - 8, 0), max(left - width // 2 - 8, 0)
        box = (slice(y0, top + height + height // 2 + 8), slice(x0, left + width + width // 2 + 8))
        own = labels[box] == index
        inside = own & region[box]
        if not inside.any() or own.all():
            mask[box] |= inside
            continue
        depths = depth[box][inside]
        state = np.full(own.shape, cv2.GC_BGD, np.uint8)
        state[own] = cv2.GC_PR_BGD
        state[inside] = cv2.GC_PR_FGD
        state[inside & (depth[box] >= np.quantile(depths, 1 - sure_share))] = cv2.GC_FGD
        cv2.setRNGSeed(0)  # its colour models start from random clusters
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(np.ascontiguousarray(image_bgr[box]), state, None, *models, GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
        mask[box] |= own & ((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD))
    return mask


def _superpixels(image_rgb: np.ndarray, region: np.ndarray, size_px: int, share: float) -> np.ndarray:
    """The superpixels (SLIC) of which the region covers at least `share`."""
    count = max(1, region.size // int(size_px) ** 2)
    labels = slic(image_rgb, n_segments=count, compactness=10, start_label=0, channel_axis=-1)
    covered = np.bincount(labels.ravel(), region.ravel()) / np.bincount(labels.ravel())
    return (covered >= share)[labels]


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _lines(evidence: np.ndarray, where: np.ndarray, least: float, sure: float, parameters: dict) -> np.ndarray:
    """Lines, (H, W) bool: a pixel of `where` belongs to one if its evidence (H, W) reaches `least` and it hangs
    together with one that reaches `sure` (hysteresis); small gaps are closed."""
    weak = where & (evidence >= least)
    count, labels = cv2.connectedComponents(weak.astype(np.uint8), connectivity=8)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[weak & (evidence >= sure)])] = True
    keep[0] = False
    lines = keep[labels].astype(np.uint8)
    if parameters["closing_radius_px"] > 0:
        size = 2 * parameters["closing_radius_px"] + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
        lines = cv2.morphologyEx(lines, cv2.MORPH_CLOSE, disc)
    return lines > 0


def _ridge_heights(image_rgb: np.ndarray, region: np.ndarray, width_px: int) -> np.ndarray:
    """`_ridge_height` tile by tile where the region is, 0 in tiles without it, (H, W) float32."""
    heights = np.zeros(region.shape, np.float32)
    for tile in tile_grid(*region.shape, halo_px=_reach_px(width_px), stride_px=1):
        (y0, y1, x0, x1), (top, bottom, left, right) = tile.core, tile.outer
        if region[y0:y1, x0:x1].any():
            heights[y0:y1, x0:x1] = tile.core_of(_ridge_height(image_rgb[top:bottom, left:right], width_px))
    return heights


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


def _reach_px(width_px: int) -> int:
    """How far around a pixel its ridge height looks: the neighbourhood, the top-hat twice, the smoothing."""
    return WINDOW_PX // 2 + 2 * (width_px // 2) + 4
