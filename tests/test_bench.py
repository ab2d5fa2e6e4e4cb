"""What the benchmarks compare is the same work, and they write what they promise."""

import copy
import json
import math
import os
import time
from importlib import metadata

import numpy as np
import pytest
import torch

from defectcam import pyramid
from defectcam.climb import PaperClimb
from defectcam.tiling import LARGEST_TILE_PX, Tile, cut, tile_grid, tile_maps
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


@pytest.mark.parametrize("side_px", [384, LARGEST_TILE_PX])
@pytest.mark.parametrize("halo_px", [16, 64])
def test_photos_of_tiles_are_cut_into_whole_tiles(side_px, halo_px):
    photo = bench.photo_of_tiles((3, 2), side_px, halo_px)
    tiles = tile_grid(*photo.shape[:2], halo_px, 16, side_px)
    assert [tile.size for tile in tiles] == 6 * [(side_px, side_px)]


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    """Weights without a graph: PyTorch runs them."""
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(tiny_weights(tmp_path / "weights", ["crack"])))


@pytest.fixture
def small_work(exported_weights, tmp_path, monkeypatch):
    """Weights that OpenVINO runs, and small photos and tiles."""
    bench.Image.open(bench.SAMPLE).crop((0, 0, 320, 320)).save(tmp_path / "sample.jpg")
    monkeypatch.setattr(bench, "SAMPLE", tmp_path / "sample.jpg")
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(exported_weights))
    monkeypatch.setattr(bench, "SIDE_PX", 96)
    for module in (bench, pyramid):
        monkeypatch.setattr(module, "SMALL_TILE_PX", 256)
    monkeypatch.setattr(bench, "LARGEST_TILE_PX", 256)
    monkeypatch.setattr(bench, "TILES_XY", (2, 1))
    monkeypatch.setattr(bench, "CONVOLUTIONS", [(16, 32), (32, 16)])


FIGURES = ["openvino_forward_speedup", "openvino_step_speedup", "climb_speedup", "climb_speedup_all_tiles",
           "grad_cam_speedup", "floor_share", "floor_share_folded", "outside_network_share", "log_share", "click_s",
           "start_s", "first_answer_s", "cpu_install_mb"]  # fmt: skip


def test_a_run_writes_all_it_measures_and_a_quick_one_has_no_large_photos(small_work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "REPETITIONS", 1)
    done = {}
    for name in ("compare_networks", "time_answers", "time_start"):
        monkeypatch.setattr(bench, name, remembered(getattr(bench, name), done))
    bench.main(["--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench.json").read_text())
    for key in FIGURES:
        assert math.isfinite(results[key]) and results[key] > 0, key
    measured = dict.fromkeys(["1", "4"], ["0", "2", "8"]) | dict.fromkeys(["12", "25"], ["0", "2"])
    for key, name in (("answer_s", "answer"), ("answer_all_tiles_s", "answer_all_tiles")):
        assert {size: [*of_photo] for size, of_photo in results[key].items()} == measured
        assert bench.Image.open(tmp_path / "bench" / f"{name}_12mp.jpg").size == (4 * 96, 3 * 96)
        assert bench.Image.open(tmp_path / "bench" / f"{name}_25mp.jpg").size == (5 * 96, 5 * 96)
        assert all(0 < seconds < math.inf for of_photo in results[key].values() for seconds in of_photo.values())
    assert results["answer_s"]["1"] == results["answer_all_tiles_s"]["1"]
    assert results["outside_network_share"] < 1 and results["start_s"] < results["first_answer_s"]
    assert results["engines"] == {"crack": "openvino"}
    assert results["machine"]["threads"] == torch.get_num_threads() and results["defects"]
    of_photos = results["answer_all_tiles_s"]
    assert results["growth_25mp"] == of_photos["25"]["2"] / of_photos["1"]["2"]
    assert 50 < results["peak_host_mb_25mp"] < 100_000 and "peak_gpu_mb" not in results
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(key in printed for key in FIGURES)
    assert printed.count("1 MP, T = 8 ") == 1 and "4 MP, T = 8, defects in a third " in printed
    assert "4 MP, T = 0, defects everywhere " in printed
    assert "25 MP, T = 2, defects in a third " in printed and bench.AIMS.keys() <= {*printed.split()}
    assert "ADVCAM_TIME_LIMIT" not in os.environ

    bench.main(["--quick", "--out", str(tmp_path / "quick")])
    quick = json.loads((tmp_path / "quick" / "bench.json").read_text())
    assert quick["quick"] and quick.keys() == results.keys() - {"growth_25mp", "peak_host_mb_25mp"}
    for key in ("answer_s", "answer_all_tiles_s"):
        assert quick[key] == {size: results[key][size] for size in ("1", "4")}
    assert (tmp_path / "quick" / "bench.png").stat().st_size > 10_000


def remembered(measure, done: dict):
    """The measurement, but what a run has measured is the next run's too."""
    return lambda *given: done.get(measure) or done.setdefault(measure, measure(*given))


def test_a_process_of_its_own_tells_its_start_and_its_memory_and_needs_no_pytorch(exported_weights, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('PyTorch was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(exported_weights))
    photos = [tmp_path / "large.png", tmp_path / "small.png"]
    for photo, size in zip(photos, [(320, 320), (64, 96)]):
        bench.Image.fromarray(textured(*size)).save(photo)
    started = time.monotonic()
    result = bench.answers_of_process(photos, [0, 2], "cpu")
    elapsed_s = time.monotonic() - started
    names = [str(photo) for photo in photos for _ in range(2)]
    assert [(answer["photo"], answer["iterations"]) for answer in result["answers"]] == [*zip(names, [0, 2, 0, 2])]
    assert all(0 < answer["network_seconds"] < answer["seconds"] for answer in result["answers"])
    assert 0 < result["start_s"] < elapsed_s - sum(answer["seconds"] for answer in result["answers"])
    peaks = [answer["peak_host_mb"] for answer in result["answers"]]
    assert peaks == sorted(peaks) and 100 < peaks[0] < peaks[-1] + 1 < 100_000  # OpenVINO alone has more than 100


def test_a_photo_that_is_not_processed_ends_the_benchmark(deployed, tmp_path):
    function = answers.Function()
    bench.Image.fromarray(textured(64, 96)).save(tmp_path / "photo.png")
    answer = function.answer(tmp_path / "photo.png", {"iterations": 2})
    assert 0 < answer["network_seconds"] < answer["seconds"]
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(RuntimeError, match="unknown format"):
        function.answer(tmp_path / "text.jpg", {})


def test_larger_photos_have_the_same_defects_without_seams(monkeypatch):
    assert bench.sample_photo(1000, 1300).shape == (1000, 1300, 3)
    monkeypatch.setattr(bench, "SIDE_PX", 96)
    doubled = bench.photo_of_squares(2, 2, everywhere=True)
    assert doubled.shape == (192, 192, 3) and np.array_equal(doubled[:96, :96], bench.sample_photo(96, 96))
    assert np.array_equal(doubled, doubled[::-1, ::-1]) and doubled.std() > 1


def test_a_third_of_the_squares_are_the_sample_the_others_sound(monkeypatch):
    side_px = 400
    monkeypatch.setattr(bench, "SIDE_PX", side_px)
    sample, sound = bench.sample_photo(side_px, side_px), bench.sound_concrete(side_px, side_px)
    photo = bench.photo_of_squares(3, 4, everywhere=False)
    assert photo.shape == (3 * side_px, 4 * side_px, 3)
    for row in range(3):
        for column in range(4):
            square = photo[row * side_px : (row + 1) * side_px, column * side_px : (column + 1) * side_px]
            assert np.array_equal(square, sample if (row + column) % 3 == 0 else sound)
    assert np.array_equal(sound[:300, :300], sample[18:318, 18:318])
    assert np.array_equal(sound[300:], sound[200:300][::-1])
    for rows, columns in bench.SQUARES.values():
        of_sample = sum((row + column) % 3 == 0 for row in range(rows) for column in range(columns))
        assert abs(of_sample - rows * columns / 3) < 1


def test_an_install_is_the_files_of_all_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def distribution(name: str, size: int, *needed: str) -> int:
        """Install a distribution with one file of so many bytes; the bytes of all its files."""
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1", *(f"Requires-Dist: {one}" for one in needed)]
        files = {f"{name}.bin": "0" * size, f"{name}-1.dist-info/METADATA": "\n".join(lines) + "\n"}
        record = f"{name}-1.dist-info/RECORD"
        files[record] = "".join(f"{path},,\n" for path in (*files, record, f"{name}-removed.pyc"))
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        return sum(map(len, files.values()))

    needed = ["small.part ; extra == 'run'", "unused ; extra == 'other'", "old ; extra == 'run' and python_version < '3'"]
    distribution("whole", 10_000, *needed)
    distribution("unused", 10_000)
    expected = distribution("small_part", 1000, "small_base[extra]>=1")
    expected += distribution("small_base", 2000, "small_more ; extra == 'extra'", "small-part")
    expected += distribution("small_more", 4000)
    assert bench.install_mb("whole", "run") == pytest.approx(expected / 1e6)
    distribution("whole", 10_000, "not-installed ; extra == 'run'")
    with pytest.raises(metadata.PackageNotFoundError, match="not-installed"):
        bench.install_mb("whole", "run")


def test_the_install_for_cpus_has_openvino_and_not_pytorch():
    def mb(name: str) -> float:
        return sum(file.locate().stat().st_size for file in metadata.files(name) if file.locate().exists()) / 1e6

    cpu_install_mb = bench.install_mb("defectcam", "runtime-cpu")
    assert mb("openvino") + mb("opencv-python") < cpu_install_mb
    assert bench.install_mb("defectcam", "runtime") > cpu_install_mb - mb("openvino") + mb("torch")
