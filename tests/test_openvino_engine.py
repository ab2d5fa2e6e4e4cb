"""OpenVINO's engine gives what PyTorch's gives, which is the definition, and says so where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from defectcam import openvino_engine
from defectcam.openvino_engine import OpenVinoEngine, processors
from defectcam.torch_engine import TorchEngine
from defectcam.weights import load_weights
from tests.conftest import ROOT, answers_of_threads
from tests.test_engine import images_like


@pytest.fixture(scope="module")
def graph(exported_weights) -> bytes:
    return load_weights(exported_weights).graph("crack")


@pytest.fixture(scope="module")
def engine(graph, reference) -> OpenVinoEngine:
    return OpenVinoEngine(graph, reference.stride_px, reference.halo_px)


@pytest.fixture(scope="module")
def reference(exported_weights) -> TorchEngine:
    return TorchEngine(load_weights(exported_weights).network("crack"))


def check_same(found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    """Score maps within 1e-4; gradients within 1 % of the largest, but for a few pixels at an activation's kink."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == np.float32
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-4)
    near = np.abs(found[1] - wanted[1]) <= 1e-2 * np.abs(wanted[1]).max()
    assert near.mean() >= 0.99 and np.abs(wanted[1]).max() > 0.1


@pytest.mark.parametrize("height, width", [(16, 16), (32, 16), (64, 64), (48, 208), (256, 128), (512, 528)])
def test_maps_and_gradients_are_pytorch_s(engine, reference, height, width):
    """The last size is large enough for a graph of its own."""
    images = images_like(0, 1, height, width)
    found = engine.score_and_gradient(images)
    check_same(found, reference.score_and_gradient(images))
    np.testing.assert_allclose(engine.score(images), found[0], rtol=0, atol=1e-5)


def test_large_images_are_compiled_for_their_size_and_the_others_are_not(engine):
    sizes = [(64, 64), (496, 512), (512, 512), (528, 512), (512, 528), (528, 528), (512, 544)]
    for height, width in sizes:
        engine.score(images_like(0, 1, 32, 32))
        engine.score_and_gradient(images_like(0, 1, height, width))
    kept = dict(engine._compiled)
    assert kept.keys() == {("score", None), *(("both", size) for size in sizes[-openvino_engine.MODELS_KEPT + 1 :])}
    engine.score_and_gradient(images_like(1, 1, 528, 528))
    assert engine._compiled == kept and list(engine._compiled)[-1] == ("both", (528, 528))


def test_images_of_a_batch_do_not_know_each_other(engine, reference):
    images = images_like(2, 2, 48, 64)
    together = engine.score_and_gradient(images)
    check_same(together, reference.score_and_gradient(images))
    for index in range(2):
        alone = engine.score_and_gradient(images[index : index + 1])
        for one, other in zip(together, alone):
            np.testing.assert_array_equal(one[index], other[0])
        np.testing.assert_array_equal(engine.score(images)[index], engine.score(images[index : index + 1])[0])


def test_several_threads_and_earlier_calls_change_nothing(engine):
    images = [images_like(seed, 1, 48 + 16 * (seed % 2), 64) for seed in range(6)]
    alone = [engine.score_and_gradient(one) for one in images]
    for wanted, found in zip(alone, answers_of_threads(engine, images), strict=True):
        for one, other in zip(found, wanted):
            np.testing.assert_array_equal(one, other)


def test_images_stay_as_they_were_and_answers_too(engine):
    images = images_like(3, 1, 64, 48)
    images.flags.writeable = False
    copy = images.copy()
    score, gradient = engine.score_and_gradient(images)
    kept = score.copy(), gradient.copy()
    engine.score(images)
    engine.score_and_gradient(-images)
    np.testing.assert_array_equal(images, copy)
    np.testing.assert_array_equal(score, kept[0])
    np.testing.assert_array_equal(gradient, kept[1])


def test_images_in_another_order_of_memory_are_the_same_images(engine):
    images = images_like(4, 1, 32, 48)
    turned = np.asfortranarray(images.astype(np.float64))
    for one, other in zip(engine.score_and_gradient(turned), engine.score_and_gradient(images)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("height, width", [(24, 32), (32, 40), (520, 528)])
def test_sizes_that_the_network_would_pad_unevenly_are_refused(engine, height, width):
    images = images_like(0, 1, height, width)
    for call in (engine.score, engine.score_and_gradient):
        with pytest.raises(ValueError, match=f"images of {height} x {width} px: both must be multiples of 16"):
            call(images)
    engine.score(images_like(0, 1, 32, 32))  # the next call is answered


def test_memory_that_was_released_changes_nothing(engine):
    images = images_like(5, 1, 64, 64)
    wanted = engine.score_and_gradient(images)
    for _ in range(2):
        engine.release_memory()
    for one, other in zip(engine.score_and_gradient(images), wanted):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(engine.score(images), wanted[0])


SHORT_OF_MEMORY = """
import resource, sys
import numpy as np
from defectcam.memory import _bytes_of, keep_freed_memory
from defectcam.openvino_engine import OpenVinoEngine
from defectcam.handler import out_of_memory

keep_freed_memory()
engine = OpenVinoEngine(open(sys.argv[1], "rb").read(), 16, 96)
random = np.random.default_rng(0)
sizes = (64, 64), (256, 256), (528, 512), (256, 256)
photos = [random.uniform(-1, 1, (1, 3, *size)).astype(np.float32) for size in sizes]
wanted = [engine.score_and_gradient(one) for one in photos]
for megabytes in (10, 40, None):
    engine.release_memory()
    limit = _bytes_of("/proc/self/status")["VmData"] + (megabytes << 20) if megabytes else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    said = []
    for photo, maps in zip(photos, wanted):
        try:
            found = engine.score_and_gradient(photo)
            said.append("right" if all(map(np.array_equal, found, maps)) else "wrong")
        except Exception as error:
            said.append("out of memory" if out_of_memory(error) else repr(error))
    print(*said, sep=",", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_where_memory_ends_it_says_so_and_the_next_images_have_their_own_maps(exported_weights, threads):
    """OpenVINO can keep such an error to itself, and gives the maps of an earlier image."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, exported_weights / "crack.onnx"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
    )
    *short, last = (line.split(",") for line in done.stdout.splitlines())
    assert len(short) == 2, done.stderr
    said = {word for words in short for word in words}
    assert "out of memory" in said <= {"right", "out of memory"} and last == ["right"] * 4


def with_gradient_times(graph: bytes, factor: float) -> bytes:
    """The graph, with its gradient multiplied."""
    model = onnx.load_from_string(graph)
    gradient = model.graph.output[1].name
    for node in model.graph.node:
        node.output[:] = ["gradient as it was" if name == gradient else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(factor), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["gradient as it was", "factor"], [gradient]))
    return model.SerializeToString()


@pytest.mark.parametrize("factor", [-1.0, 0.5, 2.0])
def test_a_graph_whose_gradient_is_wrong_is_refused_at_the_start(graph, factor):
    with pytest.raises(RuntimeError, match="OpenVINO's gradient is wrong on this processor: .*ADVCAM_ENGINE=torch"):
        OpenVinoEngine(with_gradient_times(graph, factor), 16, 96)


def test_a_graph_whose_gradient_is_right_is_not_refused(graph):
    OpenVinoEngine(with_gradient_times(graph, 1.0), 16, 96)


def test_a_network_that_says_the_same_of_every_image_is_not_refused(graph):
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))
    score, gradient = OpenVinoEngine(model.SerializeToString(), 16, 96).score_and_gradient(images_like(6, 1, 32, 32))
    assert not score.any() and not gradient.any()


# Processors


@pytest.fixture
def quotas(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The files that say how much processor time a container gets, of both kinds; a machine with 8 processors."""
    monkeypatch.setattr(openvino_engine, "CPU_QUOTAS", (tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"))
    monkeypatch.setattr(openvino_engine.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"


def test_without_a_limit_all_processors_are_used(quotas):
    assert processors() == 8


@pytest.mark.parametrize("text, wanted", [("3", 3), ("99", 8), ("0", 1), ("", 8), ("4,2", 8)])
def test_omp_num_threads_counts(quotas, monkeypatch, text, wanted):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert processors() == wanted


@pytest.mark.parametrize(
    "quota, wanted", [("max", 8), ("400000", 4), ("150000", 1), ("50000", 1), ("9900000", 8), ("250000", 2)]
)
def test_a_container_s_limit_counts(quotas, quota, wanted):
    quotas[0].write_text(f"{quota} 100000\n")
    assert processors() == wanted


@pytest.mark.parametrize("quota, wanted", [("-1", 8), ("300000", 3), ("50000", 1)])
def test_a_container_s_limit_counts_on_older_systems(quotas, quota, wanted):
    quotas[1].write_text(f"{quota}\n")
    quotas[1].with_name("cpu.cfs_period_us").write_text("100000\n")
    assert processors() == wanted


def test_the_least_of_all_limits_counts(quotas, monkeypatch):
    quotas[0].write_text("400000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert processors() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert processors() == 4
