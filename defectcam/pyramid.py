"""The pyramid: a photo is read at several scales and the maps are merged (beyond the paper).

A spall may be 40 or 4000 px wide and a network knows the sizes it was trained on. So it reads the photo at scales 1,
1/2, 1/4, ... until the longer side is at most 128 px, or from 1/2 on, as the weights say. The coarse levels together cost a
third of the finest. A small photo would have one level alone. It gets a finer level, too, which does not climb: on small
photos its climb made proposals too large. An enlarged level of scale 2 sees hairline cracks, but costs four
times the first: it is read only around what the others take for possible, and does not climb.

Every other level climbs by itself, if the weights say that it does: of a network that has not learnt what coarse levels
show, whole blocks of the photo grow. Its maps are enlarged bilinearly to the photo's size and merged there:

    M = log(mean over levels of exp(r * M_level)) / r.

A mean and no sum: a larger photo has more levels, which shall not make it more of a defect.

A defect whose enlarged level is read is a line, such as a crack. Enlarged, a dark stain beside a crack looks like the inside
of a wide crack, and climbing makes more of it. So where a map says more than another one, only thin structures count:

    thin(M, other) = M - max(0, opening of M with a square - other).

It limits the enlarged map by the merged map of the other levels, and the climbed map of scale 1 by the plain one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import cv2
import numpy as np

from defectcam.climb import Climb, LocalClimb
from defectcam.deadline import NO_DEADLINE, Deadline
from defectcam.engine import Engine
from defectcam.throughput import climb_passes
from defectcam.tiling import Tile, cut, tile_grid, tile_maps

ENLARGED = 2.0  # scale of the level for hairlines
FINEST_SCALES = (ENLARGED, 1.0, 0.5, 0.25)
SMALLEST_LEVEL_PX = 128
LARGEST_EXPONENT = 60.0  # of e, in float32
UNREAD_LOGIT = -80.0  # where no tile was read
POSSIBLE_LOGIT = -2.0  # of the merged map: below it the enlarged level is not asked
POSSIBLE_RADIUS_PX = 16
HAIRLINE_PX = 11  # of the photo: what is wider needs no enlarged level; 7 to 17 are nearly as good on val, 25 is not
GROWTH_PX = 25  # of the photo: the climb of a line adds nothing wider; with 11 small photos gain, but wide cracks grow no more
SMALL_TILE_PX = 384  # of tiles around clicks, and of the enlarged level, of which a crack asks for a narrow band
ENLARGED_HALO_PX = 48  # half as many px of the photo; wider halos change no figure of quality, and cost a third more
NO_CLIMB = LocalClimb(0.0, 1.0)  # for T = 0
CUBIC_REACH_PX = 4  # of the interpolation that enlarges, in photo px
ROWS_AT_ONCE = 64  # of a map that is merged: so many stay in a processor's cache, which halves the time


def level_scales(height: int, width: int, finest: float, levels: int) -> list[float]:
    """Scales of the levels that a photo is read at, `levels` at most, without the enlarged one."""
    scales = [min(finest, 1.0)]
    while max(height, width) * scales[-1] > SMALLEST_LEVEL_PX and len(scales) < levels:
        scales.append(scales[-1] / 2)
    return scales


def halved(image: np.ndarray) -> np.ndarray:
    """An image (H, W, ...) at half its size, rounded up: every pixel the mean of four."""
    height, width = image.shape[:2]
    even = cut(image, (0, height + height % 2, 0, width + width % 2))
    return cv2.resize(even, (even.shape[1] // 2, even.shape[0] // 2), interpolation=cv2.INTER_AREA)


@dataclass(frozen=True, eq=False)
class Level:
    """One scale of a photo; its coordinates are the photo's times the scale.

    Attributes:
        scale: of the photo.
        image_rgb: (h, w, 3) uint8 at that scale; of the enlarged level the photo itself.
    """

    scale: float
    image_rgb: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width at this scale."""
        height, width = self.image_rgb.shape[:2]
        return (2 * height, 2 * width) if self.scale == ENLARGED else (height, width)

    def pixels(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """The pixels (h, w, 3) uint8 of a half-open box (y0, y1, x0, x1), the photo's edge repeated beyond it."""
        if self.scale != ENLARGED:
            return cut(self.image_rgb, box)
        y0, y1, x0, x1 = (number // 2 for number in box)
        margin = CUBIC_REACH_PX
        part = cut(self.image_rgb, (y0 - margin, y1 + margin, x0 - margin, x1 + margin))
        large = cv2.resize(part, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        return large[2 * margin : -2 * margin, 2 * margin : -2 * margin]


class Pyramid:
    """The levels of one photo, made once for all defects.

    Args:
        image_rgb: (H, W, 3) uint8.
    """

    def __init__(self, image_rgb: np.ndarray) -> None:
        self.image_rgb = image_rgb
        self._reduced = [image_rgb]

    def level(self, scale: float) -> Level:
        """The level of a scale: 2, 1, 1/2, 1/4, ..."""
        if scale == ENLARGED:
            return Level(scale, self.image_rgb)
        index = round(-np.log2(scale))
        while len(self._reduced) <= index:
            self._reduced.append(halved(self._reduced[-1]))
        return Level(scale, self._reduced[index])


@dataclass(frozen=True)
class Reading:
    """How a defect's network reads a pyramid.

    Attributes:
        finest: scale of the finest level, one of FINEST_SCALES.
        levels: so many levels at most, the enlarged one not counted; 1 of the paper's preset.
        sharpness: r of the merging, above 0; the larger, the more the surest level decides alone.
        climbs: of every level from the finest of the photo's size on, coarser ones like the last; None of a level that
            does not climb.
    """

    finest: float
    levels: int
    sharpness: float
    climbs: tuple[Climb | None, ...]

    @property
    def of_lines(self) -> bool:
        """Whether the defect is a line, such as a crack: its enlarged level is read."""
        return self.finest == ENLARGED

    def of_photo(self, height: int, width: int) -> Reading:
        """How a photo of so many px is read. Where it would have one level alone, a finer one is added, which does not climb."""
        finest, climbs = self.finest, self.climbs
        while finest < 1 and max(height, width) * finest <= SMALLEST_LEVEL_PX:
            finest *= 2
            if len(level_scales(height, width, finest, self.levels)) > 1:
                climbs = (None, *climbs)
        return replace(self, finest=finest, climbs=climbs)

    def climb(self, scale: float) -> Climb | None:
        """The climb of a level, None where it does not climb."""
        index = max(0, round(np.log2(min(self.finest, 1.0) / scale)))
        return self.climbs[min(index, len(self.climbs) - 1)]


def tiles_of_level(
    height: int, width: int, scale: float, engine: Engine, near: Sequence[tuple[int, int]] | None = None, near_px: int = 0
) -> list[Tile]:
    """The tiles of one level of a photo of so many px; `near`, `near_px`: see `PhotoMaps`."""
    size = [math.ceil(length * scale) for length in (height, width)]
    halo_px = min(engine.halo_px, ENLARGED_HALO_PX) if scale == ENLARGED else engine.halo_px
    if near is None and scale != ENLARGED:
        return tile_grid(*size, halo_px, engine.stride_px)
    small = tile_grid(*size, halo_px, engine.stride_px, largest_px=SMALL_TILE_PX)
    return [tile for tile in small if near is None or any(_is_near(tile, x * scale, y * scale, near_px) for x, y in near)]


def level_tiles(
    height: int,
    width: int,
    reading: Reading,
    engine: Engine,
    near: Sequence[tuple[int, int]] | None = None,
    near_px: int = 0,
) -> dict[float, list[Tile]]:
    """The tiles of all levels but the enlarged one, by scale."""
    scales = level_scales(height, width, reading.of_photo(height, width).finest, reading.levels)
    return {scale: tiles_of_level(height, width, scale, engine, near, near_px) for scale in scales}


def thin(values: np.ndarray, others: np.ndarray, side_px: int) -> np.ndarray:
    """A map, of which structures wider than `side_px` count no more than in another one; all (h, w) float32."""
    wide = cv2.morphologyEx(values, cv2.MORPH_OPEN, np.ones((side_px, side_px), np.uint8))
    wide -= others
    return values - np.maximum(wide, 0, out=wide)


def possible_region(logits: np.ndarray) -> np.ndarray:
    """Where the enlarged level counts, (H, W) bool, by the merged map (H, W) of the other levels."""
    size = 2 * POSSIBLE_RADIUS_PX + 1
    return cv2.dilate((logits > POSSIBLE_LOGIT).view(np.uint8), np.ones((size, size), np.uint8)).view(bool)


def touching(tiles: Sequence[Tile], region: np.ndarray) -> list[Tile]:
    """The tiles of the enlarged level whose core touches a region of the photo, (H, W) bool."""
    return [tile for tile in tiles if region[_photo_slices(tile, ENLARGED)].any()]


@dataclass(frozen=True, eq=False)
class PlainMaps:
    """What one network has read of a photo without climbing.

    Attributes:
        levels: scale -> plain map, (h, w) float32; of the enlarged level at the photo's size.
        enlarged: tiles of the enlarged level that were read.
    """

    levels: MutableMapping[float, np.ndarray] = field(default_factory=dict)
    enlarged: set[Tile] = field(default_factory=set)


class PhotoMaps:
    """The maps of one photo and one defect, level by level: plain ones at once, climbed ones where asked for.

    Args:
        engine: with the defect's network.
        reading: how it reads the pyramid.
        pyramid: of the photo.
        batch: tiles at once.
        deadline: of all work here.
        near: pixels (x, y) of the photo: at every level only tiles within `near_px` of one are read, and what was not
            read at any level counts as no defect. None for all of it.
        plain: what the engine has read of the photo before, for all of it; what is read here is added.

    Raises:
        TimeLimitError: the deadline passed; so do all methods.
    """

    def __init__(
        self,
        engine: Engine,
        reading: Reading,
        pyramid: Pyramid,
        batch: int = 1,
        deadline: Deadline = NO_DEADLINE,
        near: Sequence[tuple[int, int]] | None = None,
        near_px: int = 0,
        plain: PlainMaps | None = None,
    ) -> None:
        self.height, self.width = pyramid.image_rgb.shape[:2]
        self.engine, self.reading, self.pyramid = engine, reading.of_photo(self.height, self.width), pyramid
        self.batch, self.deadline, self.near, self.near_px = batch, deadline, near, near_px
        self._plain = plain or PlainMaps()
        self._begin()

    def _begin(self) -> None:
        """Read the levels whose plain maps are not there yet; nothing has climbed."""
        self._merged: tuple[int, np.ndarray] | None = None  # T and the map that was merged last, while nothing more is read
        self.tiles = level_tiles(self.height, self.width, self.reading, self.engine, self.near, self.near_px)
        self.scales = list(self.tiles)
        self.climbing = {scale: tiles if self.reading.climb(scale) else [] for scale, tiles in self.tiles.items()}
        self._maps: dict[int, dict[float, np.ndarray]] = {0: {}}  # T -> scale -> map of the level
        self._climbed: dict[float, set[Tile]] = {scale: set() for scale in self.scales}
        for scale, tiles in self.tiles.items():
            if scale in self._plain.levels:
                self._maps[0][scale] = self._plain.levels[scale]
                continue
            self._maps[0][scale] = np.full(self.pyramid.level(scale).size, UNREAD_LOGIT, np.float32)
            self._read(scale, tiles, (0,))
            self._plain.levels[scale] = self._maps[0][scale]

    def widen(self, near_px: int) -> None:
        """Read what lies within so many px of the points, too."""
        known, self.near_px = self.tiles, near_px
        self.tiles = level_tiles(self.height, self.width, self.reading, self.engine, self.near, near_px)
        self.climbing = {scale: tiles if self.reading.climb(scale) else [] for scale, tiles in self.tiles.items()}
        due = {scale: [tile for tile in tiles if tile not in known[scale]] for scale, tiles in self.tiles.items()}
        self.deadline.planned(sum(tile.pixels for tiles in due.values() for tile in tiles))
        for scale, tiles in due.items():
            self._read(scale, tiles, (0,))
        self.__dict__.pop("possible", None)
        self._merged = None

    def read_as(self, reading: Reading) -> PhotoMaps:
        """The same photo read in another way; plain maps of levels that both have are shared."""
        other = copy.copy(self)
        other.__dict__.pop("possible", None)
        other.reading = reading.of_photo(self.height, self.width)
        other._begin()
        return other

    @cached_property
    def possible(self) -> np.ndarray | None:
        """Where the enlarged level counts, (H, W) bool; None where it is not asked at all."""
        return self._read_enlarged(self._merged_levels(0)) if self.reading.of_lines else None

    def _read_enlarged(self, others: np.ndarray) -> np.ndarray | None:
        """Read the enlarged level where it counts; `others`: the merged map of the other levels."""
        near = possible_region(others)
        if not near.any():
            return None
        grid = tiles_of_level(self.height, self.width, ENLARGED, self.engine, self.near, self.near_px)
        due = [tile for tile in touching(grid, near) if tile not in self._plain.enlarged]
        if ENLARGED not in self._plain.levels:
            self._plain.levels[ENLARGED] = np.zeros((self.height, self.width), np.float32)  # kept at the photo's size
        self._maps[0][ENLARGED] = self._plain.levels[ENLARGED]
        self.deadline.planned(sum(tile.pixels for tile in due))
        self._read(ENLARGED, due, (0,))
        self._plain.enlarged.update(due)
        return near

    @property
    def levels(self) -> dict[float, np.ndarray]:
        """The plain map of every level but the enlarged one, (h, w) float32, by scale."""
        return {scale: self._maps[0][scale] for scale in self.scales}

    def merged(self, steps: int = 0) -> np.ndarray:
        """The photo's map M_T, (H, W) float32 logits, read-only; tiles that were not climbed have their plain map."""
        if self._merged and self._merged[0] == steps:
            return self._merged[1]
        self._merged = None  # before the next one is made, which is as large
        result = self._merged_levels(steps)
        if steps == 0 and self.reading.of_lines and "possible" not in self.__dict__:
            self.possible = self._read_enlarged(result)  # what the property would merge once more
        possible = self.possible
        if possible is not None:
            levels = len(self.scales)
            enlarged = thin(np.where(possible, self._maps[0][ENLARGED], np.float32(UNREAD_LOGIT)), result, HAIRLINE_PX)
            powers = levels * self._powers(result[possible]) + self._powers(enlarged[possible])
            result[possible] = np.log(powers / (levels + 1)) / self.reading.sharpness
        result.flags.writeable = False
        self._merged = steps, result
        return result

    def climb(self, wanted: Sequence[int], cells: np.ndarray, cell_px: int) -> None:
        """Climb all tiles of all levels that touch some cells of the photo and were not climbed yet.

        Args:
            wanted: the T, all above 0, the same in every call.
            cells: (ceil(H / cell_px), ceil(W / cell_px)) bool.

        Raises:
            ValueError: other T than before: tiles that have climbed would lack their maps.
        """
        before = self._maps.keys() - {0}
        if before and before != set(wanted):
            raise ValueError(f"these maps were climbed for T {sorted(before)}, not {sorted(wanted)}: make new ones")
        for steps in wanted:
            if steps not in self._maps:
                maps = self._maps[0]
                self._maps[steps] = {scale: maps[scale].copy() if self.climbing[scale] else maps[scale] for scale in self.scales}
        self.deadline.planned(climb_passes(max(wanted)) * self.pixels_to_climb(cells, cell_px))
        for scale, due in self._due(cells, cell_px).items():
            self._read(scale, due, wanted)
            self._climbed[scale].update(due)

    def is_climbed(self, cell_px: int) -> np.ndarray:
        """The cells of which every pixel has climbed at every level, bool as in `climb`."""
        result = np.ones((-(-self.height // cell_px), -(-self.width // cell_px)), bool)
        for scale, tiles in self.climbing.items():
            for tile in tiles:
                if tile not in self._climbed[scale]:
                    result[self._cells_of(tile, scale, cell_px)] = False
        return result

    def pixels_to_climb(self, cells: np.ndarray, cell_px: int) -> int:
        """Pixels of the tiles, halos included, that `climb` would climb."""
        return sum(tile.pixels for tiles in self._due(cells, cell_px).values() for tile in tiles)

    def _due(self, cells: np.ndarray, cell_px: int) -> dict[float, list[Tile]]:
        """The tiles of every level that touch some cells and were not climbed yet."""
        return {
            scale: [t for t in tiles if t not in self._climbed[scale] and cells[self._cells_of(t, scale, cell_px)].any()]
            for scale, tiles in self.climbing.items()
        }

    def _cells_of(self, tile: Tile, scale: float, cell_px: int) -> tuple[slice, slice]:
        """The rows and columns of the photo's cells whose merged map depends on a tile that climbs."""
        if scale == 1:
            return _photo_slices(tile, scale, cell_px, GROWTH_PX if self.reading.of_lines else 0)
        return _photo_slices(tile, scale, cell_px, 1)  # a coarse pixel's value reaches its neighbours

    def _read(self, scale: float, tiles: Sequence[Tile], wanted: Sequence[int]) -> None:
        """Write the cores of some tiles into the maps of all T wanted."""
        self._merged = None
        level, climb = self.pyramid.level(scale), self.reading.climb(scale) or NO_CLIMB
        passes = max(1.0, climb_passes(max(wanted)))
        for tile, maps in tile_maps(self.engine, climb, level.pixels, tiles, wanted, self.batch, self.deadline):
            self.deadline.done(passes * tile.pixels)
            for steps, core in maps.items():
                y0, y1, x0, x1 = tile.core
                if scale == ENLARGED:
                    core, (y0, y1, x0, x1) = halved(core), (number // 2 for number in tile.core)
                self._maps[steps][scale][y0:y1, x0:x1] = core

    def _merged_levels(self, steps: int) -> np.ndarray:
        """The levels' maps but the enlarged one's at the photo's size, merged; (H, W) float32."""
        total = np.zeros((self.height, self.width), np.float32)
        for scale in self.scales:
            level_map = self._maps[steps][scale]
            if steps and scale == 1 and self.reading.of_lines:
                level_map = thin(level_map, self._maps[0][scale], GROWTH_PX)
            logits = enlarged_to(level_map, scale, self.height, self.width)
            for top in range(0, self.height, ROWS_AT_ONCE):
                total[top : top + ROWS_AT_ONCE] += self._powers(logits[top : top + ROWS_AT_ONCE])
        for top in range(0, self.height, ROWS_AT_ONCE):
            some = total[top : top + ROWS_AT_ONCE]
            some /= len(self.scales)
            np.log(some, out=some)
            some /= np.float32(self.reading.sharpness)
        return total

    def _powers(self, logits: np.ndarray) -> np.ndarray:
        """What is added up over levels."""
        scaled = logits * np.float32(self.reading.sharpness)
        return np.exp(np.clip(scaled, -LARGEST_EXPONENT, LARGEST_EXPONENT, out=scaled), out=scaled)


def enlarged_to(level_map: np.ndarray, scale: float, height: int, width: int) -> np.ndarray:
    """A level's map at the photo's size, bilinearly; (height, width) float32, of scale 1 the level's map itself."""
    if scale == 1:
        return level_map
    factor = round(1 / scale)
    size = level_map.shape[1] * factor, level_map.shape[0] * factor
    return cv2.resize(level_map, size, interpolation=cv2.INTER_LINEAR)[:height, :width]


def _is_near(tile: Tile, x: float, y: float, near_px: int) -> bool:
    """Whether the tile's core comes within `near_px` of a point of its level."""
    y0, y1, x0, x1 = tile.core
    return x0 - near_px <= x < x1 + near_px and y0 - near_px <= y < y1 + near_px


def _photo_slices(tile: Tile, scale: float, cell_px: int = 1, margin: int = 0) -> tuple[slice, slice]:
    """The rows and columns of the photo's cells that a tile's core touches, with a margin in pixels of the level."""
    y0, y1, x0, x1 = tile.core

    def span(start: int, end: int) -> slice:
        first, last = (start - margin) / scale, (end + margin) / scale
        return slice(max(int(first // cell_px), 0), int(-(-last // cell_px)))

    return span(y0, y1), span(x0, x1)
