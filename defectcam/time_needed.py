"""How much work a photo or a click is, so that what cannot be done in time is refused before it is begun."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from defectcam.cam import score_sums
from defectcam.pace import Progress
from defectcam.postprocess import binarise
from defectcam.tiling import (
    CLIMBED_CORE_PX,
    GRADIENT_COST,
    OUTLINE_CORE_PX,
    Tile,
    TimeLimitError,
    at_working_scale,
    outer_px,
    tile_grid,
    tiles_to_climb,
)

if TYPE_CHECKING:
    from model_handler import ModelHandler

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in the photo, half-open, px

# Of a large photo, to tell how much of it will be climbed and outlined: places in a row and in a column, and their side
# at working scale.
PLACES = 3
PLACE_PX = 320


def plain_px(handler: ModelHandler, defect: str, height: int, width: int) -> int:
    """Pixels of the tiles that the classifier sees for the plain map of a part of the photo of so many px."""
    network = handler.weights.networks[defect]
    return outer_px(tile_grid(*_working_size(handler, defect, height, width), network.halo_px, network.stride_px))


def climb_px(handler: ModelHandler, defect: str, height: int, width: int, steps: int | str) -> float:
    """The same for climbing all of that part by T steps, in forward passes; with "auto" the one step that is certain."""
    if steps == 0:
        return 0.0
    network, size = handler.weights.networks[defect], _working_size(handler, defect, height, width)
    tiles = tile_grid(*size, network.climb_halo_px, network.stride_px, CLIMBED_CORE_PX)
    return outer_px(tiles) * (1 + (1 if steps == "auto" else steps) * (1 + GRADIENT_COST))


def outline_px(handler: ModelHandler, defect: str, height: int, width: int) -> int:
    """The same for the defect's outline network; 0 where there is none."""
    if (outline := handler.weights.outlines.get(defect)) is None:
        return 0
    size = _working_size(handler, defect, height, width)
    return outer_px(tile_grid(*size, outline.halo_px, outline.stride_px, OUTLINE_CORE_PX))


def check_size(handler: ModelHandler, height: int, width: int, defects: Sequence[str], deadline: float) -> None:
    """Refuse a photo whose plain maps alone would be late, by its size in px.

    Raises:
        TimeLimitError: they would.
    """
    needed = {defect: plain_px(handler, defect, height, width) for defect in defects}
    _check(handler, needed, deadline, height * width / 1e6, "megapixels")


def check_photo(
    handler: ModelHandler, image_rgb: np.ndarray, effective: Mapping[str, dict], deadline: float
) -> None:
    """Refuse a photo that would be late, by its size and a look at a few places of it.

    How much of a photo is climbed and outlined shows on its plain maps, which may take most of the time themselves. Where
    there is time to climb and outline all of it, nothing is looked at.

    Args:
        image_rgb: (H, W, 3) uint8.
        effective: defect -> settings in force.
        deadline: on the clock of time.monotonic, s.

    Raises:
        TimeLimitError: it would be late.
    """
    height, width = image_rgb.shape[:2]

    def check(shares: Mapping[str, tuple[float, float]]) -> None:
        needed = {}
        for defect, (climbed, outlined) in shares.items():
            climbing_px = climb_px(handler, defect, height, width, effective[defect]["iterations"])
            needed[defect] = plain_px(handler, defect, height, width) + climbed * climbing_px
            needed[f"{defect} outline"] = outlined * outline_px(handler, defect, height, width)
        _check(handler, needed, deadline, height * width / 1e6, "megapixels")

    try:
        check(dict.fromkeys(effective, (1.0, 1.0)))
    except TimeLimitError:
        check({defect: _shares(handler, image_rgb, defect, effective[defect], deadline) for defect in effective})


def window_px(handler: ModelHandler, defect: str, window: Box, steps: int | str = 0) -> float:
    """Pixels of the tiles in the forward passes for the map of a window, all of it climbed by T steps."""
    left, top, right, bottom = window
    size = bottom - top, right - left
    return plain_px(handler, defect, *size) + climb_px(handler, defect, *size, steps)


def check_clicks(
    handler: ModelHandler,
    looked_at: Mapping[str, Sequence[Box]],
    climbed: Mapping[str, Sequence[Box]],
    effective: Mapping[str, dict],
    deadline: float,
    amount: float,
    unit: str,
) -> Progress:
    """Refuse clicks whose maps would be late.

    Args:
        looked_at: defect -> windows whose plain maps are needed, of every defect.
        climbed: defect -> windows that are climbed, of one of the defects.
        effective: defect -> settings in force.
        deadline, amount, unit: as in `Pace.check`.

    Returns:
        To be told of every window that is done.

    Raises:
        TimeLimitError: they would.
    """

    def total_px(defect: str, windows: Sequence[Box], steps: int | str) -> float:
        return sum(window_px(handler, defect, window, steps) for window in windows)

    needed = {defect: total_px(defect, windows, 0) for defect, windows in looked_at.items()}
    more = {defect: total_px(defect, windows, effective[defect]["iterations"]) for defect, windows in climbed.items()}
    least = min(more, key=lambda defect: handler.pace.fastest.get(defect, 0.0) * more[defect])
    needed[least] = needed.get(least, 0) + more[least]
    _check(handler, needed, deadline, amount, unit)
    return Progress(sum(needed.values()), deadline, amount, unit)


def _shares(
    handler: ModelHandler, image_rgb: np.ndarray, defect: str, effective: dict, deadline: float
) -> tuple[float, float]:
    """Which share of a few places would be climbed, and of which the plain map proposes something to outline; 0..1.

    The shares of the tiles, which are larger than the places, are at least as large.
    """
    network, fact = handler.weights.networks[defect], handler.weights.facts[defect]
    (height, width), side_px = image_rgb.shape[:2], round(PLACE_PX / fact.working_scale)
    climbed, outlined = [], []
    for row, column in np.ndindex(PLACES, PLACES):
        middle_y, middle_x = (2 * row + 1) * height // (2 * PLACES), (2 * column + 1) * width // (2 * PLACES)
        top, left = max(0, middle_y - side_px // 2), max(0, middle_x - side_px // 2)
        place = np.ascontiguousarray(image_rgb[top : top + side_px, left : left + side_px])
        place = at_working_scale(place, fact.working_scale)
        maps = handler.maps(place, defect, effective | {"iterations": 0}, deadline)
        tile = Tile(*[(0, place.shape[0], 0, place.shape[1])] * 2)
        sums, bias, gate = score_sums(maps.score), network.head.bias.item(), handler.gate(defect, effective)
        climbed.append(bool(tiles_to_climb([tile], sums, bias, fact.window_px, gate)))
        region = binarise(maps.climbed, effective["cam_threshold"], fact.closing_radius_px, fact.min_area_px)
        outlined.append(bool(region.any()))
    return float(np.mean(climbed)), float(np.mean(outlined))


def _check(handler: ModelHandler, tile_px: Mapping[str, float], deadline: float, amount: float, unit: str) -> None:
    with handler.networks_on_device:  # where their pace is measured anew
        handler.pace.check(tile_px, deadline, amount, unit)


def _working_size(handler: ModelHandler, defect: str, height: int, width: int) -> tuple[int, int]:
    scale = handler.weights.facts[defect].working_scale
    return math.ceil(height * scale), math.ceil(width * scale)
