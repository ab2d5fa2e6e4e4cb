"""Tiles with a halo on one level of the pyramid: large photos in bounded memory (paper 4.1: 5K x 5K).

A tile is a core, whose result is kept, and its surroundings. What of these lies beyond the level repeats the level's
edge. Tiles and cores start at multiples of the network's stride, so the stitched map is the whole level's but for what
lies beyond the halo and hardly counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from defectcam.climb import Climb
from defectcam.deadline import NO_DEADLINE, Deadline
from defectcam.encoders import normalised
from defectcam.engine import Engine

LARGEST_TILE_PX = 768  # with a halo of 64 px 1.5 times the arithmetic of no halo; a climb takes about 1 GB
EDGE_PX = 32  # beyond the level's edge, which is repeated there; crops in training have nothing beyond theirs


@dataclass(frozen=True)
class Tile:
    """Half-open boxes (y0, y1, x0, x1) in the level: the core, and what the network sees, which may leave the level."""

    core: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the outer box."""
        top, bottom, left, right = self.outer
        return bottom - top, right - left

    @property
    def pixels(self) -> int:
        """Pixels of the outer box."""
        return self.size[0] * self.size[1]

    def core_of(self, outer_map: np.ndarray) -> np.ndarray:
        """Cut the core out of a map (..., H, W) of the outer box."""
        (y0, y1, x0, x1), (top, _, left, _) = self.core, self.outer
        return outer_map[..., y0 - top : y1 - top, x0 - left : x1 - left]


def cut(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A half-open box (y0, y1, x0, x1) of an image (H, W, ...), the image's edge repeated beyond it."""
    top, bottom, left, right = box
    height, width = image.shape[:2]
    inside = image[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    borders = max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0)
    return cv2.copyMakeBorder(inside, *borders, cv2.BORDER_REPLICATE) if any(borders) else inside


def tile_grid(height: int, width: int, halo_px: int, stride_px: int, largest_px: int = LARGEST_TILE_PX) -> list[Tile]:
    """Tiles of one size that cover a level exactly.

    Every core has `halo_px` of surroundings inside the level. Beyond its edge the level is extended by EDGE_PX, or the
    halo where that is less, once its sides are multiples of the stride: by the same pixels in every tiling.
    """
    edge_px = min(halo_px, EDGE_PX)

    def spans(length: int) -> list[tuple[int, int, int, int]]:
        end = -(-length // stride_px) * stride_px + edge_px
        inner = max(end + edge_px - 2 * halo_px, stride_px)
        count = -(-inner // (largest_px - 2 * halo_px))
        core = -(-inner // (count * stride_px)) * stride_px
        outer = min(core + 2 * halo_px, end + edge_px)
        tops = [*(index * core - edge_px for index in range(count - 1)), end - outer]
        starts = [0, *(index * core - edge_px + halo_px for index in range(1, count)), length]
        return [(start, stop, top, top + outer) for start, stop, top in zip(starts, starts[1:], tops)]

    return [
        Tile((y0, y1, x0, x1), (top, bottom, left, right))
        for y0, y1, top, bottom in spans(height)
        for x0, x1, left, right in spans(width)
    ]


def tile_maps(
    engine: Engine,
    climb: Climb,
    pixels_of: Callable[[tuple[int, int, int, int]], np.ndarray],
    tiles: Iterable[Tile],
    wanted: Sequence[int],
    batch: int = 1,
    deadline: Deadline = NO_DEADLINE,
) -> Iterator[tuple[Tile, dict[int, np.ndarray]]]:
    """Yield every tile with the maps M_T of its core, T -> (h, w) float32, for the T wanted.

    Args:
        pixels_of: from an outer box to its pixels (h, w, 3) uint8, beyond the level its edge repeated.
        wanted: the T, each >= 0.
        batch: tiles at once; changes speed and memory, not the result.

    Raises:
        TimeLimitError: the deadline passed.
    """
    by_size: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        by_size.setdefault(tile.size, []).append(tile)
    for alike in by_size.values():
        engine.release_memory()
        for start in range(0, len(alike), batch):
            some = alike[start : start + batch]
            images = normalised(np.stack([pixels_of(tile.outer).transpose(2, 0, 1) for tile in some]))
            cores: list[dict[int, np.ndarray]] = [{} for _ in some]
            for steps, maps in enumerate(climb.maps(engine, images, max(wanted))):
                deadline.check()
                if steps not in wanted:
                    continue
                for tile, own, outer_map in zip(some, cores, maps):
                    own[steps] = tile.core_of(outer_map).copy()
            yield from zip(some, cores)
    engine.release_memory()
