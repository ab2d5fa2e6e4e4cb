"""What the benchmarks compare is the same work, and they write what they promise."""

import copy
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from benchmarks import answers, bench
from benchmarks.plain_climb import plain_climbed_map
from defectcam.climb import ClimbParameters
from defectcam.tiling import cam_max_at, climbed_map, stitched_score_map, tile_grid
from tests.conftest import ROOT, random_network

PARAMETERS = ClimbParameters(xi=0.3, penalty_weight=5.0, salient_share=0.3)
CORE_PX = 32  # three tiles of the strip, none of which sees all of it
CAM_MAX = (2.0, 3.0, 5.0)


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture
def strip_rgb(textured_image):
    """(8, 96, 3) uint8: for double precision, without which the climb's comparisons fall either way, small."""
    return textured_image[:8, :96]


def our_map(network, image_rgb, steps):
    score = stitched_score_map(network, image_rgb, core_px=CORE_PX)
    return climbed_map(network, image_rgb, score, steps, PARAMETERS, CAM_MAX, 0.1, 64, 0.0, core_px=CORE_PX)


@pytest.mark.parametrize("steps", [0, 2])
def test_the_plain_ports_maps_are_ours(network, strip_rgb, steps):
    ours = our_map(network, strip_rgb, steps) * cam_max_at(CAM_MAX, steps)
    trainable = copy.deepcopy(network).requires_grad_(True)
    plain = plain_climbed_map(trainable, strip_rgb, steps, PARAMETERS, CORE_PX)
    assert plain.max() > 0
    np.testing.assert_allclose(plain, ours, rtol=0, atol=1e-3 * plain.max())
    assert not trainable.decoder._forward_hooks


def test_pytorch_grad_cams_map_is_ours_up_to_its_scaling(network, strip_rgb):
    ours = our_map(network, strip_rgb, 0)
    tiles = tile_grid(*strip_rgb.shape[:2], network.halo_px, network.stride_px)  # one: every tile is scaled by itself
    theirs = bench.grad_cam_maps(copy.deepcopy(network).requires_grad_(True), strip_rgb, tiles)
    low, high = ours.min(), ours.max()
    np.testing.assert_allclose(theirs, (ours - low) / (high - low), rtol=0, atol=1e-2)


def test_the_floor_counts_forward_and_backward_passes(network):
    network = copy.deepcopy(network).float()
    tiles = tile_grid(64, 64, network.halo_px, network.stride_px)
    forward = bench.flops_of(lambda: network(torch.zeros(1, 3, 64, 64)))
    climb = bench.climb_flops(network, tiles)
    # A backward pass to the input has the operations of a forward one, but for the last layer that is not asked for.
    assert climb == pytest.approx((2 * bench.STEPS + 1) * forward, rel=0.1)


def test_a_quick_run_writes_all_it_measures(tmp_path, monkeypatch, capsys):
    manifest = json.loads((ROOT / "weights" / "manifest.json").read_text())
    for entry in manifest["defects"].values():
        entry["window_px"] = 8  # as small as the tiles, or the windows of neighbours are the same
        shutil.copy(ROOT / "weights" / entry["file"], tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("ADVCAM_DEFECTS", "crack")
    monkeypatch.setattr(bench, "SIDE_PX", 96)
    monkeypatch.setattr(bench, "CPU_CORE_PX", 16)
    monkeypatch.setattr(bench, "TILES_XY", (10, 1))
    monkeypatch.setattr(bench, "CONVOLUTIONS", [(16, 32), (32, 16)])
    bench.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench.json").read_text())
    measured = ["climb_speedup", "climb_speedup_all_tiles", "grad_cam_speedup", "floor_share", "outside_network_share", "log_share",
                "growth_4mp", "seconds_1mp", "seconds_click"]  # fmt: skip
    for key in measured:
        assert math.isfinite(results[key]) and results[key] > 0, key
    assert results["outside_network_share"] < 1
    assert results["machine"]["threads"] == torch.get_num_threads() and results["defects"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(key in printed for key in measured)
    assert "ADVCAM_TIME_LIMIT" not in os.environ


def test_the_largest_photo_is_answered_by_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SIDE_PX", 32)
    results = bench.time_large_answer(tmp_path, "cpu", seconds_1mp=0.1)
    assert results["growth_25mp"] == pytest.approx(10 * results["seconds_25mp"])
    assert 0 < results["seconds_25mp"] < math.inf and results["answer_bytes_25mp"] >= 2
    assert 100 < results["peak_host_mb"] < 100_000  # PyTorch alone has more than 100
    assert bench.Image.open(tmp_path / "photo_25mp.jpg").size == (160, 160)


def test_a_photo_that_is_not_processed_ends_the_benchmark(tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(RuntimeError, match="unknown format"):
        answers.Function().answer(tmp_path / "text.jpg", {})


def test_larger_photos_have_the_same_defects_without_seams(tmp_path):
    image_rgb, _ = bench.make_sample(96, 96)
    doubled = np.asarray(bench.Image.open(bench.write_photo(image_rgb, 2, tmp_path)))
    assert doubled.shape == (192, 192, 3)
    assert np.abs(doubled[:96, :96].astype(int) - doubled[:96, :95:-1]).mean() < 3  # but for the JPEG
