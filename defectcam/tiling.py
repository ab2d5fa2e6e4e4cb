"""Tiles with a halo: large photos in bounded memory, climbing only where a defect may be (paper 4.1: 5K x 5K).

A tile is a core, whose result is kept, and a halo around it, as wide as the network's reach but for what hardly
counts. Cores start at multiples of the network's stride, so the stitched score map equals the whole photo's: a
classifier's to float precision, an outline network's to a ten-thousandth. Climbed tiles are no whole photo's with any
halo and have half of it.

Normalisation across tiles: a tile's own maximum would lift every healthy tile to 1 and a photo's maximum would
let one strong defect erase a weak one, so the maps are divided by constants of the weights: `cam_max[T]`, the
typical maximum that the sum of T + 1 maps reaches on photos with the defect. Healthy photos stay near 0, and a
crop or a shift changes nothing away from its edges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import cv2
import numpy as np
import torch

from defectcam.cam import probability, score_sums, window_logits
from defectcam.climb import ClimbParameters, climb
from defectcam.memory import return_freed_memory
from defectcam.network import DefectNet

CORE_PX = 840  # with the halo 960 px: 1.3 times the arithmetic of no halo, about 0.9 GB
CLIMBED_CORE_PX = 640  # with its halo 704 px; with what is kept for the gradient about as much
OUTLINE_CORE_PX = 896  # with an outline network's halo 1248 px; about 0.9 GB
GRADIENT_COST = 1.3  # of a backward pass to the image alone, in forward passes
AUTO_MAX_STEPS = 8  # "auto": at most so many steps,
AUTO_GROWTH = 0.02  # and no further one after a step that extended a tile's region by less than this share
GATE_SPACING_PX = 32  # the window probability changes slowly: a look every 32 px finds its maximum well enough


class TimeLimitError(RuntimeError):
    """The photo cannot be done before the deadline.

    Attributes:
        late_s: by how much it would be late at the least, as estimated before the work; 0 where the deadline passed.
        fitting: how much could be done in the time left, with its unit; empty where that is not known.
    """

    def __init__(self, late_s: float = 0.0, fitting: str = "") -> None:
        super().__init__("the deadline passed" if late_s == 0 else f"{late_s:.0f} s late at the least")
        self.late_s = late_s
        self.fitting = fitting


@dataclass(frozen=True)
class Tile:
    """Half-open boxes (y0, y1, x0, x1) in the photo: the core, and the core with its halo."""

    core: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]

    def core_of(self, outer_map: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        """Cut the core out of a map (..., H, W) of the outer box."""
        (y0, y1, x0, x1), (top, _, left, _) = self.core, self.outer
        return outer_map[..., y0 - top : y1 - top, x0 - left : x1 - left]


def at_working_scale(image_rgb: np.ndarray, working_scale: float) -> np.ndarray:
    """The photo at the resolution a defect's networks work at.

    Large defects need no fine resolution: half of it is a quarter of the work and twice the surroundings in sight.

    Args:
        image_rgb: (H, W, 3) uint8.
        working_scale: 0 < scale <= 1.

    Returns:
        (ceil(H * scale), ceil(W * scale), 3) uint8.
    """
    if working_scale == 1:
        return image_rgb
    height, width = (math.ceil(size * working_scale) for size in image_rgb.shape[:2])
    return cv2.resize(image_rgb, (width, height), interpolation=cv2.INTER_AREA)


def at_photo_scale(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (h, w) bool of the working scale at the photo's resolution, (height, width) bool."""
    if mask.shape == (height, width):
        return mask
    grey = mask.astype(np.uint8) * 255
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_LINEAR) > 127


def tile_grid(height: int, width: int, halo_px: int, stride_px: int, core_px: int = CORE_PX) -> list[Tile]:
    """Tiles of about equal cores (at most `core_px`, rounded up to the stride) that cover a photo exactly."""

    def spans(size: int) -> list[tuple[int, int, int, int]]:
        count = -(-size // core_px)
        length = -(-size // (count * stride_px)) * stride_px
        starts = range(0, size, length)
        return [
            (start, min(start + length, size), max(start - halo_px, 0), min(start + length + halo_px, size))
            for start in starts
        ]

    return [
        Tile((y0, y1, x0, x1), (top, bottom, left, right))
        for y0, y1, top, bottom in spans(height)
        for x0, x1, left, right in spans(width)
    ]


def outer_px(tiles: Iterable[Tile]) -> int:
    """Pixels that a network sees of some tiles, halos included."""
    return sum((bottom - top) * (right - left) for top, bottom, left, right in (tile.outer for tile in tiles))


def _batches(image_rgb: np.ndarray, tiles: Sequence[Tile], batch: int, network: DefectNet) -> Iterator:
    """Yield ([tiles], normalised (N, 3, h, w)); tiles of one batch share their outer size."""
    device = network.head.weight.device

    def outer_size(tile: Tile) -> tuple[int, int]:
        top, bottom, left, right = tile.outer
        return bottom - top, right - left

    pending: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        pending.setdefault(outer_size(tile), []).append(tile)
    for group in pending.values():
        return_freed_memory()
        for start in range(0, len(group), batch):
            some = group[start : start + batch]
            pixels = np.stack([image_rgb[t.outer[0] : t.outer[1], t.outer[2] : t.outer[3]] for t in some])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
            yield some, network.normalise(images)
    return_freed_memory()


@torch.no_grad()
def stitched_score_map(
    network: DefectNet,
    image_rgb: np.ndarray,
    batch: int = 1,
    core_px: int = CORE_PX,
    deadline: float = math.inf,
    region: np.ndarray | None = None,
    seconds: Callable[[float], float] = lambda _: 0.0,
) -> np.ndarray:
    """Signed score map of a whole photo, tile by tile.

    Args:
        image_rgb: (H, W, 3) uint8.
        batch: tiles at once; changes speed and memory, not the result.
        region: (H, W) bool; tiles in which it is empty are left out, their scores are -inf.
        deadline: on the clock of time.monotonic, s.
        seconds: of forward passes over so many pixels, see `defectcam.pace`; what would be late is not begun.

    Returns:
        (H, W) float32.

    Raises:
        TimeLimitError: the deadline passed, or would.
    """
    height, width = image_rgb.shape[:2]
    stitched = np.full((height, width), -np.inf, np.float32)
    tiles = tile_grid(height, width, network.halo_px, network.stride_px, core_px)
    if region is not None:
        tiles = [tile for tile in tiles if region[slice(*tile.core[:2]), slice(*tile.core[2:])].any()]
    _check_time(deadline, seconds(outer_px(tiles)))
    for some, images in _batches(image_rgb, tiles, batch, network):
        _check_time(deadline)
        _paste(stitched, some, network.score_map(images))
    return stitched


def tiles_to_climb(tiles: Sequence[Tile], sums: np.ndarray, bias: float, window_px: int, gate: float) -> list[Tile]:
    """The tiles in whose core some window's probability reaches `gate` (0..1): where a defect may be."""

    def positions(start: int, end: int) -> np.ndarray:
        return np.append(np.arange(start, end, GATE_SPACING_PX), end - 1)

    kept = []
    for tile in tiles:
        y0, y1, x0, x1 = tile.core
        logits = window_logits(sums, bias, positions(y0, y1)[:, None], positions(x0, x1)[None], window_px)
        if probability(logits.max()) >= gate:
            kept.append(tile)
    return kept


def climbed_map(
    network: DefectNet, image_rgb: np.ndarray, score_map: np.ndarray, iterations: int | str, *how, **more
) -> np.ndarray:
    """`climbed_maps` for one T, or "auto": (H, W) float32; `how` and `more` are its further arguments."""
    return climbed_maps(network, image_rgb, score_map, [iterations], *how, **more)[iterations]


def climbed_maps(
    network: DefectNet,
    image_rgb: np.ndarray,
    score_map: np.ndarray,
    wanted: Sequence[int | str],
    parameters: ClimbParameters,
    cam_max: Sequence[float],
    cam_threshold: float,
    window_px: int,
    gate: float,
    batch: int = 1,
    core_px: int = CLIMBED_CORE_PX,
    deadline: float = math.inf,
    seconds: Callable[[float], float] = lambda _: 0.0,
) -> dict[int | str, np.ndarray]:
    """Climbed activation maps of a whole photo, on a scale where 1 is the typical maximum of a defect.

    One climb for all: the sums on the way to T are those of every smaller T. Tiles that the gate leaves out keep
    their plain map, in the same units.

    Args:
        score_map: from `stitched_score_map`.
        wanted: the T; with "auto" each tile climbs until a step extends its region above `cam_threshold` by less
            than AUTO_GROWTH, AUTO_MAX_STEPS steps at most.
        cam_max: divisor of the sum of T + 1 maps at index T; continued in a straight line beyond its end.
        window_px, gate: see `tiles_to_climb`.
        deadline: on the clock of time.monotonic, s.
        seconds: of forward passes over so many pixels, see `defectcam.pace`; what would be late is not begun.

    Returns:
        T -> (H, W) float32, >= 0.

    Raises:
        TimeLimitError: the deadline passed, or would.
    """
    plain = np.maximum(score_map, 0)
    plain /= np.float32(cam_max[0])
    result = {wanted[0]: plain} | {steps: plain.copy() for steps in wanted[1:]}
    climbing = [steps for steps in wanted if steps != 0]
    if not climbing:
        return result
    most = max(AUTO_MAX_STEPS if steps == "auto" else steps for steps in climbing)
    tiles = tile_grid(*score_map.shape, network.climb_halo_px, network.stride_px, core_px)
    bias = network.head.bias.item()
    tiles = tiles_to_climb(tiles, score_sums(score_map), bias, window_px, gate)
    certain = max(1 if steps == "auto" else steps for steps in climbing)
    _check_time(deadline, seconds(outer_px(tiles) * (1 + certain * (1 + GRADIENT_COST))))
    for some, images in _batches(image_rgb, tiles, batch, network):
        maps = climb(network, images, most, parameters)
        summed = _normalised_sums(_in_time(maps, deadline), cam_max)
        if "auto" in climbing and len(climbing) > 1:
            summed = list(summed)
        if "auto" in climbing:
            _paste(result["auto"], some, _until_it_adds_nothing(iter(summed), cam_threshold))
        if climbing != ["auto"]:
            for steps, normalised in enumerate(summed):
                if steps in climbing:
                    _paste(result[steps], some, normalised)
        maps.close()  # one that stopped early would keep all that its next step needs
    return result


def _paste(stitched: np.ndarray, tiles: Sequence[Tile], maps: torch.Tensor) -> None:
    """Write the cores of the tiles' maps (N, h, w) into a photo's map."""
    for tile, outer_map in zip(tiles, maps):
        y0, y1, x0, x1 = tile.core
        stitched[y0:y1, x0:x1] = tile.core_of(outer_map).float().cpu().numpy()


def _check_time(deadline: float, needed_s: float = 0.0) -> None:
    late_s = time.monotonic() + needed_s - deadline
    if late_s > 0:
        raise TimeLimitError(late_s if needed_s else 0.0)


def _in_time(maps: Iterable[torch.Tensor], deadline: float) -> Iterator[torch.Tensor]:
    """The same maps, with a look at the clock before each step."""
    for current_map in maps:
        _check_time(deadline)
        yield current_map


def _normalised_sums(maps: Iterable[torch.Tensor], cam_max: Sequence[float]) -> Iterator[torch.Tensor]:
    """The result for T = 0, 1, ...: the sum of the maps up to T in units of its typical maximum, (N, H, W)."""
    for steps, total in enumerate(accumulate(maps)):
        yield total / float(cam_max_at(cam_max, steps))


def _until_it_adds_nothing(results: Iterator[torch.Tensor], cam_threshold: float) -> torch.Tensor:
    """For every image of the batch its result at the first step that extends its region by hardly anything."""
    chosen = next(results)
    area = (chosen > cam_threshold).sum(dim=(1, 2))
    climbing = torch.ones_like(area, dtype=torch.bool)
    for result in results:
        chosen = torch.where(climbing[:, None, None], result, chosen)
        larger = (result > cam_threshold).sum(dim=(1, 2))
        climbing &= larger > (1 + AUTO_GROWTH) * area
        area = larger
        if not climbing.any():
            break
    return chosen


def cam_max_at(cam_max: Sequence[float], steps: int) -> np.float32:
    """The divisor for T = `steps`; beyond the list's end every step adds what the last one did."""
    if steps < len(cam_max):
        return np.float32(cam_max[steps])
    growth = cam_max[-1] - cam_max[-2] if len(cam_max) > 1 else cam_max[0]
    return np.float32(cam_max[-1] + growth * (steps - len(cam_max) + 1))
