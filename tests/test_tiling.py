"""Stitched maps equal whole-photo maps; windows, gate and grid against slow versions."""

import numpy as np
import pytest
import torch

from defectcam.cam import probability, score_sums, window_logits
from defectcam.climb import ClimbParameters, climb
from defectcam.tiling import CORE_PX, cam_max_at, climbed_map, climbed_maps, stitched_score_map, tile_grid, tiles_to_climb
from tests.conftest import random_network

PARAMETERS = ClimbParameters(xi=0.1, penalty_weight=5.0, salient_share=0.5)


def whole_score_map(network, image_rgb):
    images = torch.from_numpy(image_rgb).permute(2, 0, 1)[None]
    with torch.no_grad():
        return network.score_map(network.normalise(images))[0].numpy()


@pytest.mark.parametrize(
    "downsamplings, height, width, core_px",
    [
        (2, 150, 203, 64),
        (2, 149, 202, 90),
        (2, 33, 61, 64),
        (2, 1, 1, 64),
        (2, 1, 203, 64),
        (2, 150, 2, 64),
        (1, 150, 203, 64),
        (3, 150, 203, 128),
    ],
)
def test_stitched_equals_whole(textured_image, downsamplings, height, width, core_px):
    network = random_network(downsamplings=downsamplings, dtype=torch.float32)
    image = np.ascontiguousarray(textured_image[:height, :width])
    whole = whole_score_map(network, image)
    stitched = stitched_score_map(network, image, batch=3, core_px=core_px)
    assert np.abs(stitched - whole).max() <= 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize("height, width", [(1, 1), (511, 513), (5000, 5000), (1025, 640), (3, 4000)])
def test_cores_cover_every_pixel_once(height, width):
    covered = np.zeros((height, width), np.uint8)
    for tile in tile_grid(height, width, halo_px=60, stride_px=4):
        y0, y1, x0, x1 = tile.core
        covered[y0:y1, x0:x1] += 1
        assert y0 % 4 == 0 and x0 % 4 == 0 and tile.outer[0] % 4 == 0 and tile.outer[2] % 4 == 0
        assert y1 - y0 <= CORE_PX and x1 - x0 <= CORE_PX
    assert (covered == 1).all()


@pytest.mark.parametrize("window_px", [1, 5, 20, 500])
def test_window_logits_are_means_of_windows_moved_inside(window_px):
    score = np.random.default_rng(0).normal(size=(40, 57)).astype(np.float32)
    sums = score_sums(score)
    for y, x in [(0, 0), (39, 56), (20, 20), (3, 55)]:
        h, w = min(window_px, 40), min(window_px, 57)
        top, left = min(max(y - h // 2, 0), 40 - h), min(max(x - w // 2, 0), 57 - w)
        wanted = 0.25 + score[top : top + h, left : left + w].astype(np.float64).mean()
        assert window_logits(sums, 0.25, np.array(y), np.array(x), window_px) == pytest.approx(wanted, abs=1e-9)


def test_window_probability_is_the_classifiers_own(network, textured_image):
    score = whole_score_map(network, textured_image)
    images = torch.from_numpy(textured_image).permute(2, 0, 1)[None]
    with torch.no_grad():
        wanted = torch.sigmoid(network(network.normalise(images)))[0].item()
    bias = network.head.bias[0].item()
    found = probability(window_logits(score_sums(score), bias, np.array(7), np.array(9), 320))
    assert found == pytest.approx(wanted, abs=1e-6)


def test_probability_does_not_overflow():
    assert probability(np.array([-1e9, 0.0, 1e9])).tolist() == [0.0, 0.5, 1.0]


def test_only_tiles_where_a_defect_may_be_are_climbed(monkeypatch, textured_image):
    network = random_network(dtype=torch.float32)
    score = np.full(textured_image.shape[:2], -8.0, np.float32)
    score[100:140, 150:200] = 30.0  # one defect, lower right
    bias = float(network.head.bias[0])
    tiles = tile_grid(*score.shape, network.climb_halo_px, network.stride_px, core_px=64)
    chosen = tiles_to_climb(tiles, score_sums(score), bias, window_px=32, gate=0.5)
    assert 0 < len(chosen) < len(tiles)
    for tile in tiles:
        y0, y1, x0, x1 = tile.core
        touches = y1 > 90 and x1 > 140
        assert (tile in chosen) <= touches
    climbed = climbed_map(network, textured_image, score, 1, PARAMETERS, (2.0, 4.0), 0.1, 32, 0.5, core_px=64)
    plain = np.maximum(score, 0) / 2
    for tile in tiles:
        y0, y1, x0, x1 = tile.core
        same = np.array_equal(climbed[y0:y1, x0:x1], plain[y0:y1, x0:x1])
        assert same == (tile not in chosen)


def test_climbed_tile_is_the_sum_of_its_maps(textured_image):
    network = random_network()
    image = np.ascontiguousarray(textured_image[:60, :80])  # one tile
    score = stitched_score_map(network, image)
    images = network.normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
    wanted = sum(climb(network, images, 3, PARAMETERS))[0].numpy() / 40
    found = climbed_map(network, image, score, 3, PARAMETERS, (10.0, 20.0, 30.0, 40.0), 0.1, 320, gate=0.0)
    assert wanted.max() > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * wanted.max())


def test_auto_is_one_of_the_fixed_results_and_the_first_that_adds_hardly_anything(textured_image):
    network = random_network(dtype=torch.float32)
    image = np.ascontiguousarray(textured_image[:60, :80])  # one tile
    score = stitched_score_map(network, image)
    theta, cam_max = 0.2 * float(score.max()), (1.0, 2.0)

    def result(iterations):
        return climbed_map(network, image, score, iterations, PARAMETERS, cam_max, theta, 320, gate=0.0)

    fixed = [result(steps) for steps in range(9)]
    areas = [np.count_nonzero(one > theta) for one in fixed]
    stop = next((t for t in range(1, 9) if areas[t] <= 1.02 * areas[t - 1]), 8)
    assert np.array_equal(result("auto"), fixed[stop])


@pytest.mark.parametrize("iterations", [2, "auto"])
def test_batch_of_tiles_changes_nothing(textured_image, iterations):
    network = random_network()  # float64: a random network magnifies the rounding of float32
    image = np.ascontiguousarray(textured_image[:80, :90])
    score = stitched_score_map(network, image, core_px=40)
    arguments = (iterations, PARAMETERS, (1.0, 2.0, 3.0), 0.1, 320, 0.0)
    one = climbed_map(network, image, score, *arguments, batch=1, core_px=40)
    five = climbed_map(network, image, score, *arguments, batch=5, core_px=40)
    assert np.abs(one - five).max() <= 1e-6 * one.max()


@pytest.mark.parametrize("wanted", [[2, 0, "auto"], ["auto", 0, 2], [0, 2]])
def test_several_t_at_once_are_each_by_itself(textured_image, wanted):
    network = random_network(dtype=torch.float32)
    image = np.ascontiguousarray(textured_image[:80, :90])
    score = stitched_score_map(network, image, core_px=40)
    before = score.copy()
    arguments = (PARAMETERS, (1.0, 2.0, 3.0), 0.1, 320, 0.0)
    found = climbed_maps(network, image, score, wanted, *arguments, core_px=40)
    for steps in wanted:
        assert np.array_equal(found[steps], climbed_map(network, image, score, steps, *arguments, core_px=40))
    assert np.array_equal(score, before) and not np.array_equal(found[0], found[2])


def test_cam_max_goes_on_in_a_straight_line():
    assert [float(cam_max_at((1.0, 3.0, 6.0), steps)) for steps in (0, 2, 3, 5)] == [1.0, 6.0, 9.0, 15.0]
