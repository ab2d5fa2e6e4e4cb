"""Tiles cover a level once, see it as a whole would, and their maps are the climb's."""

import numpy as np
import pytest
import torch

from defectcam.climb import LocalClimb
from defectcam.deadline import Deadline, TimeLimitError
from defectcam.encoders import normalised
from defectcam.tiling import EDGE_PX, Tile, cut, tile_grid, tile_maps
from defectcam.torch_engine import TorchEngine
from tests.conftest import SmallNetwork, random_network, textured

CLIMB = LocalClimb(xi=0.1, g_ref=0.5)


def whole_map(engine, image_rgb, margin_px) -> np.ndarray:
    """The score map (H, W) of the whole image at once, its edge repeated up to multiples of the stride and then by `margin_px`."""
    height, width = image_rgb.shape[:2]
    margin = min(margin_px, EDGE_PX)
    below, right = (margin - length % -engine.stride_px for length in (height, width))
    padded = np.pad(image_rgb, ((margin, below), (margin, right), (0, 0)), mode="edge")
    score = engine.score(normalised(padded.transpose(2, 0, 1)[None]))[0]
    return score[margin : margin + height, margin : margin + width]


def stitched(engine, image_rgb, steps=0, largest_px=768, **given) -> list[np.ndarray]:
    """The maps M_0 .. M_steps of an image, each (H, W)."""
    height, width = image_rgb.shape[:2]
    tiles = tile_grid(height, width, engine.halo_px, engine.stride_px, largest_px)
    maps = np.full((steps + 1, height, width), np.nan, np.float32)
    for tile, cores in tile_maps(engine, CLIMB, lambda box: cut(image_rgb, box), tiles, range(steps + 1), **given):
        y0, y1, x0, x1 = tile.core
        maps[:, y0:y1, x0:x1] = [cores[step] for step in range(steps + 1)]
    return list(maps)


@pytest.mark.parametrize("halo_px, stride_px", [(24, 2), (60, 4), (96, 8), (96, 16)])
@pytest.mark.parametrize("height, width", [(1, 1), (511, 513), (5000, 5000), (1025, 640), (3, 4000), (577, 576)])
@pytest.mark.parametrize("largest_px", [256, 768])
def test_cores_cover_every_pixel_once_and_tiles_keep_to_the_grid(height, width, halo_px, stride_px, largest_px):
    covered = np.zeros((height, width), np.uint8)
    tiles = tile_grid(height, width, halo_px, stride_px, largest_px)
    for tile in tiles:
        (y0, y1, x0, x1), (top, bottom, left, right) = tile.core, tile.outer
        covered[y0:y1, x0:x1] += 1
        assert all(number % stride_px == 0 for number in (y0, x0, top, left))
        for start, end, first, last, length in ((y0, y1, top, bottom, height), (x0, x1, left, right, width)):
            edge_px = min(halo_px, EDGE_PX)
            assert start - first >= halo_px if start else first == -edge_px
            assert last - end >= halo_px if end < length else last == length - length % -stride_px + edge_px
            assert (last - first) % stride_px == 0 and last - first <= largest_px
        assert tile.pixels == tile.size[0] * tile.size[1]
    assert (covered == 1).all()
    assert len({tile.size for tile in tiles}) == 1


def test_a_core_is_cut_out_of_the_outer_map():
    tile = Tile((4, 9, 8, 10), (0, 16, 4, 20))
    outer_map = np.arange(2 * 16 * 16).reshape(2, 16, 16)
    assert np.array_equal(tile.core_of(outer_map), outer_map[:, 4:9, 4:6])


@pytest.mark.parametrize("box", [(3, 9, 2, 11), (-5, 4, 6, 20), (-3, 30, -40, 33), (0, 12, 0, 15)])
def test_beyond_the_image_its_edge_is_repeated(box):
    image = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    top, bottom, left, right = box
    ys, xs = np.clip(np.arange(top, bottom), 0, 11), np.clip(np.arange(left, right), 0, 14)
    assert np.array_equal(cut(image, box), image[ys][:, xs])


@pytest.mark.parametrize(
    "downsamplings, height, width, largest_px",
    [(1, 150, 203, 128), (2, 149, 202, 256), (2, 33, 61, 256), (2, 1, 1, 256), (1, 1, 203, 128), (1, 150, 2, 128)],
)
def test_plain_maps_of_tiles_are_the_whole_image_s(textured_image, downsamplings, height, width, largest_px):
    engine = TorchEngine(random_network(downsamplings=downsamplings, dtype=torch.float32))
    image = textured_image[:height, :width]
    whole = whole_map(engine, image, engine.halo_px)
    (found,) = stitched(engine, image, largest_px=largest_px)
    assert np.abs(found - whole).max() <= 1e-5 * np.abs(whole).max()


def test_climbed_maps_of_a_tile_are_the_climb_s():
    engine = TorchEngine(SmallNetwork())
    image = textured(90, 101)
    images = normalised(cut(image, (-6, 96, -6, 108)).transpose(2, 0, 1)[None])
    wanted = [one[0, 6:96, 6:107] for one in CLIMB.maps(engine, images, 3)]
    found = stitched(engine, image, 3)
    np.testing.assert_array_equal(found, wanted)
    assert all(np.abs(one - other).mean() > 0.05 for one, other in zip(found, found[1:]))


@pytest.mark.parametrize("steps", [0, 2])
def test_batch_and_order_of_tiles_do_not_matter(steps):
    engine = TorchEngine(SmallNetwork())
    image = textured(230, 340)
    tiles = tile_grid(230, 340, engine.halo_px, 2, 128) + tile_grid(230, 340, engine.halo_px, 2, 256)

    def maps(tiles, batch):
        found = tile_maps(engine, CLIMB, lambda box: cut(image, box), tiles, [0, steps], batch)
        return {tile: np.stack([cores[0], cores[steps]]) for tile, cores in found}

    one = maps(tiles, 1)
    assert len({tile.size for tile in one}) == 2
    for other in (maps(tiles, 5), maps(tiles[::-1], 1)):
        assert one.keys() == other.keys() == set(tiles)
        for tile in tiles:
            np.testing.assert_allclose(one[tile], other[tile], rtol=0, atol=1e-4)


def test_a_climbed_pixel_depends_on_what_is_near_alone():
    """No maximum or sum of a tile is in it; every step lets what lies beyond the halo come nearer by two reaches."""
    network, image, steps = SmallNetwork(), textured(230, 340), 2
    one, many = (stitched(TorchEngine(network), image, steps, largest_px) for largest_px in (384, 128))
    far, margin = np.zeros((230, 340), bool), (2 * steps + 1) * network.reach_px - network.halo_px
    for tile in tile_grid(230, 340, network.halo_px, 2, 128):
        y0, y1, x0, x1 = tile.core
        far[y0 + margin : y1 - margin, x0 + margin : x1 - margin] = True
    assert 0.3 < far.mean() < 0.9
    difference = np.abs(one[steps] - many[steps])
    assert difference[far].max() <= 1e-5 and difference[~far].max() > 1e-2


def test_no_tile_is_begun_after_the_deadline(monkeypatch):
    network = SmallNetwork()
    engine, passes = TorchEngine(network), []
    original = network.score_map
    monkeypatch.setattr(network, "score_map", lambda images: (passes.append(1), original(images))[1])
    with pytest.raises(TimeLimitError):
        stitched(engine, textured(300, 300), 50, largest_px=128, deadline=Deadline(0))
    assert len(passes) == 1
    stitched(engine, textured(60, 60), 1, deadline=Deadline(1000))
