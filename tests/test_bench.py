"""What the benchmarks compare is the same work, and they write what they promise."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch

from defectcam import pyramid
from defectcam.climb import PaperClimb
from defectcam.tiling import Tile, cut, tile_grid, tile_maps
from defectcam.torch_engine import TorchEngine
from benchmarks import answers, bench
from benchmarks.plain_climb import plain_climbed_map
from tests.conftest import random_network, textured, tiny_weights

CLIMB = PaperClimb(xi=0.3, penalty_weight=5.0, salient_share=0.3)


STRIP_RGB = textured(16, 48)
WHOLE = [Tile((0, 16, 0, 48), (-4, 20, -4, 52))]
HALVES = [Tile((0, 16, 0, 24), (-4, 20, -4, 28)), Tile((0, 16, 24, 48), (-4, 20, 20, 52))]


@pytest.fixture(scope="module", params=["average", "log-mean-exp"])
def network(request):
    return random_network(downsamplings=1, pooling=request.param)  # float64, or the climb's comparisons fall either way


def our_map(network, tiles, steps):
    """The mean of the T + 1 maps."""
    stitched = np.zeros(STRIP_RGB.shape[:2], np.float32)
    for tile, maps in tile_maps(TorchEngine(network), CLIMB, lambda box: cut(STRIP_RGB, box), tiles, [steps]):
        y0, y1, x0, x1 = tile.core
        stitched[y0:y1, x0:x1] = maps[steps]
    return stitched


@pytest.mark.parametrize("steps", [0, 2])
def test_the_plain_ports_maps_are_those_of_the_papers_climb(network, steps):
    ours = our_map(network, HALVES, steps) * (steps + 1)
    trainable = copy.deepcopy(network).requires_grad_(True)
    plain = plain_climbed_map(trainable, STRIP_RGB, HALVES, steps, CLIMB)
    assert plain.max() > 0
    np.testing.assert_allclose(plain, ours, rtol=0, atol=1e-3 * plain.max())
    assert not trainable.decoder._forward_hooks


def test_pytorch_grad_cams_map_is_ours_up_to_its_scaling(network):
    ours = our_map(network, WHOLE, 0)
    theirs = bench.grad_cam_maps(copy.deepcopy(network).requires_grad_(True), STRIP_RGB, WHOLE)
    slope, intercept = np.polyfit(ours.ravel(), theirs.ravel(), 1)  # it scales by what lies beyond the strip too
    assert slope > 0
    np.testing.assert_allclose(theirs, slope * ours + intercept, rtol=0, atol=1e-2)


def test_the_floor_counts_forward_and_backward_passes():
    network = random_network(dtype=torch.float32)
    (tile,) = tile_grid(64, 64, network.halo_px, network.stride_px)
    forward = bench.flops_of(lambda: network(torch.zeros(1, 3, *tile.size)))
    climb = bench.climb_flops(network, [tile])
    # A backward pass to the input has the operations of a forward one, but for the last layer that is not asked for.
    assert climb == pytest.approx((2 * bench.STEPS + 1) * forward, rel=0.1)


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(tiny_weights(tmp_path / "weights", ["crack"])))


def test_a_quick_run_writes_all_it_measures(exported_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(exported_weights))
    monkeypatch.setattr(bench, "SIDE_PX", 96)
    for module in (bench, pyramid):
        monkeypatch.setattr(module, "NEAR_TILE_PX", 256)
    monkeypatch.setattr(bench, "LARGEST_TILE_PX", 256)
    monkeypatch.setattr(bench, "TILES_XY", (2, 1))
    monkeypatch.setattr(bench, "CONVOLUTIONS", [(16, 32), (32, 16)])
    bench.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench.json").read_text())
    measured = ["openvino_forward_speedup", "openvino_step_speedup", "climb_speedup", "climb_speedup_all_tiles",
                "grad_cam_speedup", "floor_share", "outside_network_share", "log_share", "growth_4mp", "seconds_1mp_t0",
                "seconds_1mp", "seconds_click"]  # fmt: skip
    for key in measured:
        assert math.isfinite(results[key]) and results[key] > 0, key
    assert results["outside_network_share"] < 1
    assert results["engines"] == {"crack": "openvino"}
    assert results["machine"]["threads"] == torch.get_num_threads() and results["defects"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(key in printed for key in measured)
    assert "ADVCAM_TIME_LIMIT" not in os.environ


def test_the_largest_photo_is_answered_by_a_process_of_its_own(deployed, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SIDE_PX", 32)
    results = bench.time_large_answer(tmp_path, "cpu", seconds_1mp=0.1)
    assert results["growth_25mp"] == pytest.approx(10 * results["seconds_25mp"])
    assert 0 < results["seconds_25mp"] < math.inf and results["answer_bytes_25mp"] >= 2
    assert 100 < results["peak_host_mb"] < 100_000  # PyTorch alone has more than 100
    assert bench.Image.open(tmp_path / "photo_25mp.jpg").size == (160, 160)


def test_a_photo_that_is_not_processed_ends_the_benchmark(deployed, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(RuntimeError, match="unknown format"):
        answers.Function().answer(tmp_path / "text.jpg", {})


def test_larger_photos_have_the_same_defects_without_seams(tmp_path):
    assert bench.sample_photo(1000, 1300).shape == (1000, 1300, 3)
    doubled = bench.sample_photo(96, 80, 2)
    assert doubled.shape == (192, 160, 3) and np.array_equal(doubled[:96, :80], bench.sample_photo(96, 80))
    assert np.array_equal(doubled, doubled[::-1, ::-1]) and doubled.std() > 1
