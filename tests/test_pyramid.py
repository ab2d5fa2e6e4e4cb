"""The pyramid's levels, and maps of a photo that are merged as the formula says, whatever was climbed when."""

from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
from scipy.ndimage import grey_opening

from defectcam import pyramid
from defectcam.climb import LocalClimb
from defectcam.deadline import Deadline, TimeLimitError
from defectcam.pyramid import PhotoMaps, Pyramid, Reading, enlarged_to, halved, level_scales
from defectcam.tiling import tile_grid
from defectcam.torch_engine import TorchEngine
from tests.conftest import SmallNetwork, textured
from tests.test_tiling import whole_map

CLIMBS = (LocalClimb(0.1, 0.5), LocalClimb(0.1, 2.0))  # the finest level's, and that of all others
CELL_PX = 16


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 px, so that small photos have many."""
    monkeypatch.setattr(pyramid, "tile_grid", partial(tile_grid, largest_px=128))
    monkeypatch.setattr(pyramid, "SMALL_TILE_PX", 128)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(SmallNetwork())


def maps_of(engine, image_rgb, finest=1.0, levels=3, sharpness=0.7, climbs=CLIMBS, **given) -> PhotoMaps:
    return PhotoMaps(engine, Reading(finest, levels, sharpness, climbs), Pyramid(image_rgb), **given)


def all_cells(maps: PhotoMaps) -> np.ndarray:
    return np.ones((-(-maps.height // CELL_PX), -(-maps.width // CELL_PX)), bool)


def of_cells(cells: np.ndarray, maps: PhotoMaps) -> np.ndarray:
    """The pixels (H, W) bool of some cells."""
    return np.kron(cells, np.ones((CELL_PX, CELL_PX), bool))[: maps.height, : maps.width]


def mean_of_four(image: np.ndarray) -> np.ndarray:
    """Half the size, rounded up, the last row and column of odd sizes repeated; float64."""
    height, width = image.shape[:2]
    even = np.pad(image.astype(float), ((0, height % 2), (0, width % 2)) + ((0, 0),) * (image.ndim - 2), mode="edge")
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4


def bilinear(level_map: np.ndarray, factor: int, height: int, width: int) -> np.ndarray:
    """Enlarged by a factor, between the centres of the pixels; beyond the outer centres constant."""
    for axis, length in ((0, height), (1, width)):
        at = np.clip((np.arange(length) + 0.5) / factor - 0.5, 0, level_map.shape[axis] - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, level_map.shape[axis] - 1), at - low
        share = share[:, None] if axis == 0 else share
        level_map = np.take(level_map, low, axis) * (1 - share) + np.take(level_map, high, axis) * share
    return level_map


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4, 3), (4, 6, 3), (5, 7, 3), (150, 203, 3), (9, 8)])
def test_half_the_size_is_the_mean_of_four(shape):
    image = np.random.default_rng(0).integers(0, 256, shape)
    wanted = mean_of_four(image)
    small = halved(image.astype(np.uint8))
    assert small.dtype == np.uint8 and small.shape == wanted.shape and np.abs(small - wanted).max() <= 0.5
    np.testing.assert_allclose(halved(image.astype(np.float32)), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "height, width, finest, levels, scales",
    [
        (100, 128, 1.0, 16, [1]),
        (129, 60, 1.0, 16, [1, 1 / 2]),
        (5000, 3000, 1.0, 16, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64]),
        (5000, 3000, 0.5, 3, [1 / 2, 1 / 4, 1 / 8]),
        (600, 60, 2.0, 16, [1, 1 / 2, 1 / 4, 1 / 8]),
        (600, 600, 0.25, 1, [1 / 4]),
        (60, 60, 0.25, 16, [1 / 4]),
    ],
)
def test_levels_go_on_until_the_longer_side_is_128_px(height, width, finest, levels, scales):
    assert level_scales(height, width, finest, levels) == scales


def test_a_level_is_the_photo_halved_so_often():
    photo = textured(150, 203)
    levels = Pyramid(photo)
    assert levels.level(1.0).image_rgb is photo and levels.level(1.0).size == (150, 203)
    eighth = levels.level(1 / 8)  # the first that is asked for
    assert eighth.size == eighth.image_rgb.shape[:2] == (19, 26)
    assert np.array_equal(eighth.image_rgb, halved(halved(halved(photo))))
    assert levels.level(1 / 2).size == (75, 102) and levels.level(2.0).size == (300, 406)
    box = (-4, 30, 8, 40)
    assert np.array_equal(levels.level(1 / 2).pixels(box), np.pad(halved(photo), ((4, 0), (0, 0), (0, 0)), "edge")[:34, 8:40])


@pytest.mark.parametrize("box", [(0, 300, 0, 406), (100, 228, 60, 188), (-12, 116, 280, 408), (-96, 544, -96, 544)])
def test_a_part_of_the_enlarged_level_is_that_of_the_whole(box):
    photo = textured(150, 203)
    padded = np.pad(photo, ((200, 200), (200, 200), (0, 0)), mode="edge")
    whole = cv2.resize(padded, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    top, bottom, left, right = (400 + number for number in box)
    found = Pyramid(photo).level(2.0).pixels(box)
    assert np.array_equal(found, whole[top:bottom, left:right])


@pytest.mark.parametrize("finest, first", [(2.0, 1.0), (1.0, 1.0), (0.5, 0.5)])
def test_levels_climb_as_the_reading_says(finest, first):
    reading = Reading(finest, 8, 1.0, ("a", "b", "c"))
    scales = [first / 2**index for index in range(5)]
    assert [reading.climb(scale) for scale in scales] == ["a", "b", "c", "c", "c"]
    assert reading.climb(2.0) == "a"


@pytest.mark.parametrize(
    "height, width, finest, read, climbing",
    [
        (257, 60, 0.5, 0.5, 0.5),
        (60, 256, 0.5, 1.0, 0.5),
        (60, 60, 0.25, 1.0, 1.0),
        (300, 300, 0.25, 0.5, 0.25),
        (60, 200, 0.25, 1.0, 0.5),
        (60, 60, 2.0, 2.0, 1.0),
        (60, 60, 1.0, 1.0, 1.0),
    ],
)
def test_to_a_photo_that_would_have_one_level_alone_a_finer_one_is_added(engine, height, width, finest, read, climbing):
    """What climbs does so as on larger photos; the level that was added climbs where it is the only one."""
    reading = Reading(finest, 16, 1.0, (LocalClimb(0.05, 0.3), None)).of_photo(height, width)
    assert reading.finest == read and reading.of_photo(height, width) == reading
    maps = maps_of(engine, textured(height, width), finest)
    assert maps.scales[0] == min(read, 1.0) and maps.reading.finest == read
    assert [scale for scale in maps.scales if reading.climb(scale)] == [climbing]
    alone = Reading(finest, 1, 1.0, (LocalClimb(0.05, 0.3),)).of_photo(height, width)
    assert alone.climb(min(read, 1.0))  # of the only level that is read


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_maps_are_enlarged_between_pixel_centres(factor):
    level_map = np.random.default_rng(0).normal(size=(13, 9)).astype(np.float32)
    height, width = 13 * factor - 1, 9 * factor - factor + 1
    found = enlarged_to(level_map, 1 / factor, height, width)
    np.testing.assert_allclose(found, bilinear(level_map, factor, height, width), rtol=0, atol=1e-5)
    assert np.array_equal(enlarged_to(level_map, 1.0, 13, 9), level_map)


@pytest.mark.parametrize("finest, sharpness", [(1.0, 0.7), (0.5, 3.0), (0.25, 1.0)])
def test_plain_maps_are_merged_as_the_formula_says(small_tiles, engine, finest, sharpness):
    photo = textured(250, 303)
    maps = maps_of(engine, photo, finest, 3, sharpness)
    scales = {1.0: [1, 1 / 2, 1 / 4], 0.5: [1 / 2, 1 / 4], 0.25: [1 / 2, 1 / 4]}[finest]
    assert maps.scales == scales
    levels = [whole_map(engine, Pyramid(photo).level(scale).image_rgb, engine.halo_px) for scale in scales]
    total = sum(
        np.exp(sharpness * bilinear(level, round(1 / scale), 250, 303).astype(float))
        for level, scale in zip(levels, scales)
    )
    found = maps.merged()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log(total / len(scales)) / sharpness, rtol=0, atol=1e-4)


def test_so_many_levels_and_no_more(engine):
    photo = textured(300, 280)
    assert maps_of(engine, photo, levels=1).scales == [1.0]
    np.testing.assert_allclose(
        maps_of(engine, photo, levels=1).merged(), whole_map(engine, photo, engine.halo_px), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("height, width", [(1, 1), (1, 300), (3, 2)])
@pytest.mark.parametrize("finest", [2.0, 1.0, 0.25])
def test_the_smallest_photos_have_maps(engine, monkeypatch, height, width, finest):
    monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", -np.inf)
    maps = maps_of(engine, textured(height, width), finest, 8)
    maps.climb([1], all_cells(maps), CELL_PX)
    for steps in (0, 1):
        assert maps.merged(steps).shape == (height, width) and np.isfinite(maps.merged(steps)).all()


def test_scores_beyond_all_bounds_stay_finite():
    network = SmallNetwork()
    network.head.weight.mul_(1e4)
    merged = maps_of(TorchEngine(network), textured(150, 203)).merged()
    assert np.isfinite(merged).all() and merged.min() < -50 and merged.max() > 50


def with_enlarged(others: np.ndarray, enlarged: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Two levels merged, and an enlarged one, of which the wide counts no more than the others; sharpness 0.7, float64."""
    wide = grey_opening(np.where(possible, enlarged, -80.0), (pyramid.HAIRLINE_PX,) * 2)
    thin = enlarged - np.maximum(wide - others, 0)
    return np.log((2 * np.exp(0.7 * others.astype(float)) + np.exp(0.7 * thin)) / 3) / 0.7


class TestEnlargedLevel:
    """Structure in one corner of a flat photo; the enlarged level counts there alone."""

    @pytest.fixture
    def photo(self, monkeypatch, engine, small_tiles) -> np.ndarray:
        photo = np.full((170, 241, 3), 120, np.uint8)
        photo[:60, :70] = textured(60, 70)
        monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", maps_of(engine, photo).merged()[100:, 100:].max())
        return photo

    def test_it_is_read_only_where_the_others_take_something_for_possible(self, photo, engine):
        plain, maps = maps_of(engine, photo), maps_of(engine, photo, 2.0)
        merged, possible, without = maps.merged(), maps.possible, plain.merged()
        near = cv2.dilate((without > pyramid.POSSIBLE_LOGIT).astype(np.uint8), np.ones((33, 33), np.uint8)).astype(bool)
        assert np.array_equal(possible, near) and 0.05 < possible.mean() < 0.5
        assert 0 < len(maps._plain.enlarged) < len(tile_grid(340, 482, engine.halo_px, 2, 128))
        assert np.array_equal(merged[~possible], without[~possible])
        whole = cv2.resize(photo, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        enlarged = mean_of_four(whole_map(engine, whole, engine.halo_px))
        wanted = with_enlarged(without, enlarged, possible)
        inner = possible.copy()
        inner[:20], inner[:, :20] = False, False  # at the edge, cubic and replication do not commute
        np.testing.assert_allclose(merged[inner], wanted[inner], rtol=0, atol=1e-4)

    def test_it_is_not_read_where_nothing_is_possible(self, photo, engine, monkeypatch):
        monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", 100.0)
        maps = maps_of(engine, photo, 2.0)
        assert maps.possible is None and not maps._plain.enlarged
        assert np.array_equal(maps.merged(), maps_of(engine, photo).merged())
        maps.climb([2], all_cells(maps), CELL_PX)
        assert not maps._plain.enlarged and maps.is_climbed(CELL_PX).all()

    def test_what_it_sees_alone_counts_where_it_is_thin(self, engine, monkeypatch, small_tiles):
        monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", -100.0)
        maps = maps_of(engine, textured(100, 120), 2.0)
        assert maps.possible.all()
        enlarged = maps._maps[0][pyramid.ENLARGED]
        others, enlarged[:] = maps._merged_levels(0), -20.0
        enlarged[20:60, 20:60] = 30.0
        enlarged[70:73, 10:110] = 30.0
        merged = maps.merged()
        np.testing.assert_allclose(merged[20:60, 20:60], others[20:60, 20:60], rtol=0, atol=1e-4)
        assert (merged[70:73, 10:110] > others[70:73, 10:110] + 10).all()

    def test_it_does_not_climb(self, photo, engine):
        maps = maps_of(engine, photo, 2.0)
        possible, enlarged = maps.possible, maps._maps[0][pyramid.ENLARGED].copy()
        maps.climb([2], all_cells(maps), CELL_PX)
        others, merged = maps._merged_levels(2), maps.merged(2)
        assert np.array_equal(merged[~possible], others[~possible])
        np.testing.assert_allclose(merged[possible], with_enlarged(others, enlarged, possible)[possible], rtol=0, atol=1e-4)
        assert np.abs(merged - others)[possible].mean() > 0.01

    def test_another_sharpness_reads_no_tile_twice(self, photo, engine, monkeypatch):
        maps = maps_of(engine, photo, 2.0)
        wanted = maps_of(engine, photo, 2.0, sharpness=2.0).merged()
        maps.merged()
        monkeypatch.setattr(engine, "score", None)
        assert np.array_equal(maps.read_as(replace(maps.reading, sharpness=2.0)).merged(), wanted)


class TestClimbing:
    @pytest.fixture(params=[2.0, 1.0, 0.5], ids="finest {}".format)
    def make(self, request, engine, monkeypatch, small_tiles):
        """Function -> the maps of a photo, some of which the enlarged level is asked for."""
        photo = textured(180, 250)
        monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", np.quantile(maps_of(engine, photo).merged(), 0.9995))
        return partial(maps_of, engine, photo, request.param, 4)

    def test_a_climbed_cell_is_what_it_is_when_all_climb(self, make):
        whole = make()
        whole.climb([1, 2], all_cells(whole), CELL_PX)
        assert whole.is_climbed(CELL_PX).all()
        for row, column in [(0, 0), (6, 9), (11, 15)]:
            maps = make()
            assert not maps.is_climbed(CELL_PX).any()
            cells = np.zeros_like(all_cells(maps))
            cells[row, column] = True
            maps.climb([1, 2], cells, CELL_PX)
            climbed = maps.is_climbed(CELL_PX)
            assert climbed[row, column] and not climbed.all()
            pixels = of_cells(climbed, maps)
            for steps in (1, 2):
                assert np.array_equal(maps.merged(steps)[pixels], whole.merged(steps)[pixels])
        assert np.abs(whole.merged(2) - whole.merged(0)).mean() > 0.05

    def test_what_has_not_climbed_has_its_plain_map(self, small_tiles, engine):
        maps = maps_of(engine, textured(180, 250), levels=1)
        tile, *others = maps.tiles[1.0]
        cells = np.zeros_like(all_cells(maps))
        cells[0, 0] = True
        maps.climb([2], cells, CELL_PX)
        changed = maps.merged(2) != maps.merged(0)
        y0, y1, x0, x1 = tile.core
        assert changed[y0:y1, x0:x1].mean() > 0.9 and len(others) > 2
        changed[y0:y1, x0:x1] = False
        assert not changed.any()

    def test_cells_may_climb_one_after_another_and_in_any_batch(self, make):
        whole, steady, large = make(), make(), make(batch=5)
        for maps in (whole, large):
            maps.climb([2], all_cells(maps), CELL_PX)
        for row in range(len(all_cells(steady)))[::-1]:
            cells = np.zeros_like(all_cells(steady))
            cells[row] = True
            steady.climb([2], cells, CELL_PX)
        for steps in (0, 2):
            assert np.array_equal(steady.merged(steps), whole.merged(steps))
            np.testing.assert_allclose(large.merged(steps), whole.merged(steps), rtol=0, atol=1e-4)

    def test_several_t_are_each_what_they_are_alone(self, make):
        maps = make()
        maps.climb([1, 2], all_cells(maps), CELL_PX)
        for steps in (1, 2):
            alone = make()
            alone.climb([steps], all_cells(alone), CELL_PX)
            assert np.array_equal(alone.merged(steps), maps.merged(steps))
        assert np.array_equal(maps.merged(0), make().merged())

    def test_steps_of_length_0_change_nothing(self, make):
        maps = make(climbs=(LocalClimb(0.0, 0.5),))
        maps.climb([2], all_cells(maps), CELL_PX)
        assert np.array_equal(maps.merged(2), maps.merged(0))

    def test_a_level_that_does_not_climb_keeps_its_plain_map(self, engine, monkeypatch, small_tiles):
        photo, asked = textured(180, 250), []
        maps = maps_of(engine, photo, sharpness=1.0, climbs=(LocalClimb(0.1, 0.5), None))
        original = engine.score_and_gradient
        monkeypatch.setattr(engine, "score_and_gradient", lambda images: (asked.append(images.shape), original(images))[1])
        assert maps.pixels_to_climb(all_cells(maps), CELL_PX) == sum(tile.pixels for tile in maps.tiles[1.0])
        maps.climb([1], all_cells(maps), CELL_PX)
        assert len(asked) == len(maps.tiles[1.0]) and maps.is_climbed(CELL_PX).all()
        alone = maps_of(engine, photo, levels=1, climbs=(LocalClimb(0.1, 0.5),))
        alone.climb([1], all_cells(alone), CELL_PX)
        coarse = maps_of(engine, halved(photo), levels=1).merged()
        wanted = np.log((np.exp(alone.merged(1)) + np.exp(enlarged_to(coarse, 0.5, 180, 250))) / 2)
        assert maps.scales == [1.0, 0.5]
        np.testing.assert_allclose(maps.merged(1), wanted, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("finest", [2.0, 1.0])
    def test_a_line_grows_no_wider_than_a_crack(self, engine, monkeypatch, finest):
        monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", 100.0)
        maps = maps_of(engine, textured(100, 120), finest, 1)
        maps.climb([2], all_cells(maps), CELL_PX)
        maps._maps[0][1.0][:], maps._maps[2][1.0][:] = -5.0, -4.0
        maps._maps[2][1.0][10:50, 10:50] = 3.0
        maps._maps[2][1.0][70:90, 10:110] = 3.0
        merged = maps.merged(2)
        np.testing.assert_allclose(merged[10:50, 10:50], -5.0 if finest == 2 else 3.0, rtol=0, atol=1e-4)
        np.testing.assert_allclose(merged[70:90, 10:110], 2.0 if finest == 2 else 3.0, rtol=0, atol=1e-4)

    def test_a_map_is_merged_anew_when_more_has_been_read(self, make):
        maps = make()
        cells = np.zeros_like(all_cells(maps))
        cells[3, 3] = True
        maps.climb([1], cells, CELL_PX)
        part = maps.merged(1)
        assert maps.merged(1) is part and not part.flags.writeable
        assert np.array_equal(maps.merged(0), make().merged()) and np.array_equal(maps.merged(1), part)
        maps.climb([1], all_cells(maps), CELL_PX)
        assert not np.array_equal(maps.merged(1), part)

    def test_other_t_than_before_are_refused(self, make):
        maps = make()
        maps.climb([2], all_cells(maps), CELL_PX)
        with pytest.raises(ValueError, match=r"T \[2\], not \[4\]"):
            maps.climb([4], all_cells(maps), CELL_PX)


    def test_what_is_due_to_climb_is_told_before(self, make):
        maps = make()
        maps.possible  # noqa: B018: reads the enlarged level, whose tiles count too
        cells = np.zeros_like(all_cells(maps))
        cells[3, 3] = True
        due = sum(tile.pixels for tiles in maps.climbing.values() for tile in tiles)
        assert 0 < maps.pixels_to_climb(cells, CELL_PX) < due == maps.pixels_to_climb(all_cells(maps), CELL_PX)
        maps.climb([1], cells, CELL_PX)
        assert maps.pixels_to_climb(cells, CELL_PX) == 0 < maps.pixels_to_climb(all_cells(maps), CELL_PX) < due

    def test_another_reading_of_the_same_maps_is_as_if_read_anew(self, make, engine):
        maps = make()
        maps.climb([2], all_cells(maps), CELL_PX)
        before = maps.merged(0), maps.merged(2)
        reading = Reading(maps.reading.finest, 2, 2.0, (LocalClimb(0.05, 0.3),))
        other, anew = maps.read_as(reading), PhotoMaps(engine, reading, maps.pyramid)
        assert not other.is_climbed(CELL_PX).any()
        for one in (other, anew):
            one.climb([1], all_cells(one), CELL_PX)
        for steps in (0, 1):
            assert np.array_equal(other.merged(steps), anew.merged(steps))
        assert np.array_equal(maps.merged(0), before[0]) and np.array_equal(maps.merged(2), before[1])


def test_near_clicks_only_tiles_around_them_are_read(engine, monkeypatch):
    monkeypatch.setattr(pyramid, "SMALL_TILE_PX", 128)
    photo = textured(400, 500)
    whole, maps = maps_of(engine, photo, levels=1), maps_of(engine, photo, levels=1, near=[(130, 150), (480, 10)], near_px=40)
    read = maps.merged() > -70
    assert 0.1 < read.mean() < 0.5 and read[110:190, 90:170].all() and read[:50, 440:].all() and not read[-50:].any()
    np.testing.assert_allclose(maps.merged()[read], whole.merged()[read], rtol=0, atol=1e-4)


@pytest.mark.parametrize("finest", [2.0, 1.0])
def test_widened_maps_are_those_read_so_wide_at_once_and_no_tile_is_read_twice(engine, small_tiles, monkeypatch, finest):
    photo, near = textured(400, 500), [(130, 150), (480, 10)]
    monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", float(np.quantile(maps_of(engine, photo).merged(), 0.9)))
    read, score = [], engine.score
    monkeypatch.setattr(engine, "score", lambda images: (read.append(images.shape), score(images))[1])
    at_once = maps_of(engine, photo, finest, near=near, near_px=90)
    wanted, pixels = at_once.merged(), sum(map(np.prod, read))
    read.clear()
    widened = maps_of(engine, photo, finest, near=near, near_px=0)
    narrow = widened.merged()
    widened.widen(90)
    np.testing.assert_allclose(widened.merged(), wanted, rtol=0, atol=1e-5)
    assert np.abs(narrow - wanted).max() > 1 and sum(map(np.prod, read)) == pixels
    widened.climb([1], all_cells(widened), CELL_PX)
    at_once.climb([1], all_cells(at_once), CELL_PX)
    np.testing.assert_allclose(widened.merged(1), at_once.merged(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("finest", [1.0, 0.5])
def test_a_crop_at_multiples_of_128_px_agrees_with_its_photo(engine, finest, steps):
    photo = textured(700, 660)
    levels, coarsest = (3, 0.25) if finest == 1 else (2, 0.25)
    top, left, bottom, right = 128, 256, 640, 640
    whole, crop = maps_of(engine, photo, finest, levels), maps_of(engine, photo[top:bottom, left:right], finest, levels)
    assert whole.scales == crop.scales and whole.scales[-1] == coarsest
    if steps:
        for maps in (whole, crop):
            maps.climb([steps], all_cells(maps), CELL_PX)
    margin = round(((2 * steps + 1) * engine.network.reach_px + 1) / coarsest)
    inner = slice(margin, -margin), slice(margin, -margin)
    found, wanted = crop.merged(steps)[inner], whole.merged(steps)[top:bottom, left:right][inner]
    assert found.size > 10_000
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_deadline_holds_for_reading_and_climbing(engine):
    photo = textured(150, 203)
    with pytest.raises(TimeLimitError):
        maps_of(engine, photo, deadline=Deadline(0))
    maps = maps_of(engine, photo)
    maps.deadline = Deadline(0)
    with pytest.raises(TimeLimitError):
        maps.climb([2], all_cells(maps), CELL_PX)
