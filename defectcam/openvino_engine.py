"""OpenVINO's engine: the same maps and gradients on processors, faster than PyTorch and without it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import openvino

from defectcam.memory import return_freed_memory

CPU_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))  # cgroup v2, v1
ONE_SIZE_PX = 512 * 512  # from this size of an image on the gradient is compiled for it: a quarter faster, in 0.2 s
MODELS_KEPT = 6  # two for any size
CHECK_PX = 64  # side of the tile that the gradient is checked on
CHECK_STEP = 1e-5  # of a pixel on average, on the scale -1..1; along longer steps a right gradient changes too
LARGEST_CHECK_ERROR = 0.1  # relative; a wrong graph is off by a factor


class OpenVinoEngine:
    """A network's graph on the processor, in 32-bit floats.

    Args:
        graph: the ONNX file, as `defectcam export` writes it, for images of any size.
        stride_px, halo_px: of the network, see `Engine`.

    Raises:
        RuntimeError: the graph's gradient is wrong on this machine.
    """

    name = "openvino"

    def __init__(self, graph: bytes, stride_px: int, halo_px: int) -> None:
        self.stride_px, self.halo_px = stride_px, halo_px
        self.lock = threading.Lock()  # several threads would only compete for memory
        self._core = openvino.Core()
        both = self._core.read_model(graph, b"")
        self._graphs = {"score": openvino.Model([both.outputs[0]], both.get_parameters()), "both": both}
        # Of (graph, size or None for any), the one that was used last at the end.
        self._compiled: dict[tuple[str, tuple[int, int] | None], openvino.CompiledModel] = {}
        self._check()

    def score(self, images: np.ndarray) -> np.ndarray:
        """See `Engine.score`."""
        (score,) = self._run("score", images)
        return score

    def score_and_gradient(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.score_and_gradient`."""
        height, width = images.shape[2:]
        score, gradient = self._run("both", images, (height, width) if height * width >= ONE_SIZE_PX else None)
        return score, gradient

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        with self.lock:
            for model in self._compiled.values():
                model.release_memory()
        return_freed_memory()

    def _run(self, graph: str, images: np.ndarray, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """The graph's outputs for a batch, image by image; ValueError for a size that it would not take."""
        height, width = images.shape[2:]
        if height % self.stride_px or width % self.stride_px:
            raise ValueError(f"images of {height} x {width} px: both must be multiples of {self.stride_px}")
        images = np.ascontiguousarray(images, np.float32)
        with self.lock:
            try:
                model = self._model(graph, size)
                outputs = [self._outputs(model, image[None]) for image in images]
            except Exception:
                self._compiled.clear()  # where memory ran out, they are left with the sizes of several images
                raise
        return [np.concatenate(maps) for maps in zip(*outputs)]

    def _outputs(self, model: openvino.CompiledModel, image: np.ndarray) -> list[np.ndarray]:
        request = model.create_infer_request()
        request.start_async([image], share_inputs=True)
        request.wait()  # `infer` keeps errors of a single thread to itself, and gives the maps of the image before
        return [output.data.copy() for output in request.output_tensors]  # while the request, whose memory it is, lives

    def _model(self, graph: str, size: tuple[int, int] | None) -> openvino.CompiledModel:
        """A graph compiled for one size, or for any."""
        model = self._compiled.pop((graph, size), None)
        if model is None:
            sized = self._graphs[graph]
            if size:
                sized = sized.clone()
                sized.reshape([1, 3, *size])
            settings = {
                "INFERENCE_PRECISION_HINT": "f32",  # some processors would be given 16-bit floats by default
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": processors(),
                "ENABLE_CPU_PINNING": False,  # two processes would be given the same core
            }
            model = self._core.compile_model(sized, "CPU", settings)
        self._compiled[graph, size] = model
        if len(self._compiled) > MODELS_KEPT:
            del self._compiled[next(iter(self._compiled))]
        return model

    def _check(self) -> None:
        """Compare the gradient with differences of the score map along it.

        Graph compilers have had faults on some processors alone, and a climb along a wrong gradient looks plausible.
        """
        image = np.random.default_rng(0).uniform(-0.9, 0.9, (1, 3, CHECK_PX, CHECK_PX)).astype(np.float32)
        score, gradient = self.score_and_gradient(image)
        length = float(np.linalg.norm(gradient))
        if length == 0:  # nothing to climb: a network that says the same of every image
            return
        step = np.float32(CHECK_STEP * np.sqrt(gradient.size) / length) * gradient
        rise = (self.score(image + step) - self.score(image - step)).astype(np.float64)
        weights = 0.5 * (1 + np.tanh(0.5 * score.astype(np.float64)))
        found, wanted = float((weights * rise).sum()), 2 * float((step * gradient).sum(dtype=np.float64))
        if abs(found - wanted) > LARGEST_CHECK_ERROR * wanted:
            raise RuntimeError(
                f"OpenVINO's gradient is wrong on this processor: {wanted:.3g} where the map rises by {found:.3g}; "
                "set ADVCAM_ENGINE=torch"
            )


def processors() -> int:
    """Processors that this process may use: of the machine, by its container's limit and by OMP_NUM_THREADS."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        found.append(int(os.environ["OMP_NUM_THREADS"]))
    for path in CPU_QUOTAS:
        if not path.exists():
            continue
        words = path.read_text().split()
        period = int(words[1]) if len(words) > 1 else int(path.with_name("cpu.cfs_period_us").read_text())
        if words[0].isdecimal():  # else "max" or -1: no limit
            found.append(int(words[0]) // period)
    return max(1, min(found))
