"""Shared helpers: small networks and weights folders with random numbers, and the real photos where they are."""

from __future__ import annotations

import asyncio
import copy
import fcntl
import gc
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import certifi
import cv2
import numpy as np
import pytest
import torch
import uvicorn
from safetensors.torch import save_file
from torch import nn
from nuclio_sdk.event import _EventDeserializer

from defectcam import function, serve
from defectcam.encoders import normalised
from defectcam.network import ScoreNet
from defectcam.training.clicks import photo_path, split_stems
from defectcam.weights import WeightsError, read_manifest, write_manifest

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"


def random_network(
    seed: int = 0,
    downsamplings: int = 2,
    dtype: torch.dtype = torch.float64,
    encoder: str = "resnet34",
    pooling: str = "average",
) -> ScoreNet:
    """A frozen network whose BatchNorms have seen data, with a third of its scores on such data above 0."""
    return copy.deepcopy(_random_network(seed, downsamplings, encoder, pooling)).to(dtype)


@lru_cache
def _random_network(seed: int, downsamplings: int, encoder: str, pooling: str) -> ScoreNet:
    torch.manual_seed(seed)
    depth = downsamplings + (encoder == "resnet34")
    network = ScoreNet(encoder, (16, 16, 8, 8)[:depth], downsamplings, pooling)
    return _standardised(network)


class SmallNetwork(nn.Module):
    """What an engine takes for a ScoreNet, with so few layers that many tiles can climb; float32, random numbers.

    Attributes:
        reach_px: pixels around a pixel that its score depends on.
    """

    stride_px, halo_px, reach_px = 2, 6, 5

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fine, self.coarse = nn.Conv2d(3, 6, 5, padding=2), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 1)
        _standardised(self)

    def score_map(self, images: torch.Tensor) -> torch.Tensor:
        features = self.fine(images).tanh()
        coarse = self.coarse(nn.functional.avg_pool2d(features, 2)).tanh()
        features = features + nn.functional.interpolate(coarse, scale_factor=2)
        return nn.functional.conv2d(features, self.head.weight[:, :, None, None], self.head.bias)[:, 0]


def _standardised(network: nn.Module) -> nn.Module:
    """The network frozen, with scores of mean -1 and standard deviation 2 on images like `textured`."""
    coarse = nn.functional.interpolate(2 * torch.rand(8, 3, 6, 6) - 1, size=(64, 64), mode="bicubic")
    images = (coarse + 0.3 * (2 * torch.rand(8, 3, 64, 64) - 1)).clamp(-1, 1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        network.train().score_map(images)
        score = network.eval().score_map(images)
        scale = 2 / score.std()
        network.head.bias.sub_(score.mean()).mul_(scale).sub_(1)
        network.head.weight.mul_(scale)
    return network.requires_grad_(False)


def tiny_weights(
    folder: Path,
    defects: Sequence[str] = ("crack", "spalling", "rust"),
    trained: ScoreNet | None = None,
    **fields: object,
) -> Path:
    """Write a weights folder of small random networks, or of one trained network (`dark_network`) for all defects.

    Args:
        fields: in place of every entry's own.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for seed, defect in enumerate(defects):
        network = trained or random_network(seed, 4, torch.float32, "efficientnet-lite0", "log-mean-exp")
        save_file(network.state_dict(), folder / f"{defect}.safetensors")
        entries[defect] = {
            "file": f"{defect}.safetensors",
            "encoder": "efficientnet-lite0",
            "decoder_channels": [16, 16, 8, 8],
            "downsamplings": 4,
            "pooling": "log-mean-exp",
            "finest_scale": 1.0,
            "levels": 8,
            "sharpness": 1.0,
            "climb": {"form": "local", "xi": 0.04, "g_ref": [500.0]},
            "platt": [1.0, 0.0],
            "cam_threshold": 0.8,
            "closing_radius_px": 1,
            "gap_px": 4,
            "min_area_px": 16,
            "confidence_weights": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0],
            "threshold": 0.5,
            "iterations": 2,
            "tolerance_px": 1.0,
            "hole_share": 0.02,
            "training": {},
        } | fields
    write_manifest(folder, entries)
    return folder


def pytest_collection_finish():
    """All that is imported by now stays: the garbage collector would look through half a million objects again and again."""
    gc.freeze()


def pytest_unconfigure():
    """Libraries would tell of objects that are still there when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def own_environment():
    """What a test's commands set in the environment of this process ends with the test."""
    with patch.dict(os.environ):
        yield


GRAPHS: list[Path] = []  # the folder of the graphs of this run of the tests


@pytest.fixture(scope="session", autouse=True)
def graphs(tmp_path_factory):
    """Give the tests a folder for graphs, all processes of pytest-xdist the same one."""
    base = tmp_path_factory.getbasetemp()
    GRAPHS[:] = [(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"]
    GRAPHS[0].mkdir(exist_ok=True)


def graph_once(network: ScoreNet) -> bytes:
    """The ONNX file of a network, exported once in a run of the tests, since that takes 10 s."""
    from defectcam.training import export  # not at the top: few tests need what it takes long to import

    tensors = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        tensors.update(name.encode() + tensor.numpy().tobytes())
    path = GRAPHS[0] / tensors.hexdigest()
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(export.graph_of(network))
    return path.read_bytes()


@contextmanager
def little_training(val_crops: int):
    """Trainings judge `val_crops` crops, not 400; one step of the climb is tried, on one photo; photos fit into one tile.

    A network that has its graph is not exported once more. Curves, which `test_training` looks at, are not drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defectcam.encoders.LARGEST_HALO_PX", 16)
        patch.setattr("defectcam.training.train.VAL_CROPS", val_crops)
        patch.setattr("defectcam.training.train.draw_curves", lambda history, path: None)
        patch.setattr("defectcam.training.calibrate.graph_of", graph_once)
        patch.setattr("defectcam.training.calibrate.STEP_LENGTHS", (0.012,))
        patch.setattr("defectcam.training.calibrate.few", lambda photos, reading: photos[:1])
        yield


def answers_of_threads(engine, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Score maps and gradients of batches that as many threads ask for at once."""
    found = {}

    def work(index: int) -> None:
        with torch.no_grad():  # a caller's own setting
            found[index] = engine.score_and_gradient(images[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(images))]


def late_tiles(monkeypatch, engine, clock: SimpleNamespace, seconds: float) -> list[np.ndarray]:
    """From now on the engine takes so many seconds for a tile, by a clock with `now`; returns where its tiles are noted."""
    done = []

    def score(images):
        clock.now += seconds
        done.append(images)
        return np.full((len(images), *images.shape[2:]), -9, np.float32)

    monkeypatch.setattr(engine, "score", score)
    return done


@contextmanager
def running_function(handler=None, **environ: str):
    """URL of a server of the real function, started with these variables; `handler` in place of its own."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in environ.items():
            environment.setenv(name, value)
        app = serve.create_app(SimpleNamespace(init_context=function.init_context, handler=handler or function.handler))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session", autouse=True)
def quick_clients(tmp_path_factory):
    """Clients load one certificate authority, not all known ones (30 ms), and try a connection twice, not four times."""
    known = Path(certifi.where()).read_text()
    end = "-----END CERTIFICATE-----\n"
    path = tmp_path_factory.mktemp("authority") / "one.pem"
    path.write_text(known[: known.index(end)] + end)
    os.environ["SSL_CERT_FILE"] = str(path)
    with patch("defectcam.cvat.client.CONNECT_RETRIES", 1):
        yield


@pytest.fixture(scope="module", autouse=True)
def sdk_as_installed():
    """`init_context` changes how nuclio_sdk reads bodies in its process; not for the next file of tests."""
    as_installed = _EventDeserializer._try_deserialize_json
    yield
    _EventDeserializer._try_deserialize_json = staticmethod(as_installed)


@pytest.fixture
def network() -> ScoreNet:
    return random_network()


@pytest.fixture(scope="session")
def shipped_weights() -> Path:
    """The repository's weights folder."""
    try:
        read_manifest(ROOT / "weights")
    except WeightsError as error:
        pytest.skip(str(error))
    return ROOT / "weights"


@pytest.fixture(scope="session")
def photos():
    """Function (set, split, defect or None) -> [(stem, image_rgb, mask or None)] of the real photos."""
    if not DATA.exists():
        pytest.skip("the real photos (../shared/data) are not on this machine")

    def load(set_name: str, split: str = "val", defect: str | None = None, limit: int | None = None):
        found = []
        for stem in split_stems(DATA, set_name, split)[:limit]:
            image = cv2.cvtColor(cv2.imread(str(photo_path(DATA / set_name, stem))), cv2.COLOR_BGR2RGB)
            path = DATA / set_name / "masks" / str(defect) / f"{stem}.png"
            mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127 if path.exists() else None
            found.append((stem, image, mask))
        return found

    return load


def textured(height: int, width: int, seed: int = 5) -> np.ndarray:
    """(height, width, 3) uint8 RGB with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 12 or 1, width // 12 or 1, 3), np.uint8)
    noise = rng.integers(-40, 40, (height, width, 3))
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def textured_image() -> np.ndarray:
    """(150, 203, 3) uint8 RGB with structure at several scales."""
    return textured(150, 203)


def dark_wall(spots_xyr: Sequence[tuple[int, int, int]], height: int = 96, width: int = 160, seed: int = 0):
    """A photo (height, width, 3) uint8 RGB of a light wall with dark spots, and the spots' mask, bool."""
    rng = np.random.default_rng(seed)
    photo, mask = rng.integers(120, 180, (height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    for x, y, radius in spots_xyr:
        cv2.ellipse(mask, (x, y), (radius, 2 * radius // 3), 0, 0, 360, 1, -1)
    photo[mask > 0] = rng.integers(20, 60, (np.count_nonzero(mask), 3), np.uint8)
    return photo, mask > 0


@lru_cache
def dark_network(decoder_channels: tuple[int, ...] = (16, 16, 8, 8)) -> ScoreNet:
    """A network that has learnt to see dark spots, in a few steps."""
    torch.manual_seed(0)
    network = ScoreNet("efficientnet-lite0", decoder_channels, 4, "log-mean-exp").train()
    walls = [dark_wall([(20 + 12 * i, 30, 16), (52, 10 * i, 6)], 64, 64, seed=i) for i in range(3)]
    images = torch.stack([normalised(torch.from_numpy(photo)).permute(2, 0, 1) for photo, _ in walls])
    truth = torch.stack([torch.from_numpy(mask).float() for _, mask in walls])
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(25):
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network.score_map(images), truth).backward()
        optimiser.step()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        network.score_map(images)
    return network.requires_grad_(False).eval()


def dark_weights(folder: Path, defects: Sequence[str] = ("crack",), **fields: object) -> Path:
    """Write a weights folder whose networks see dark spots, with `fields` in place of every entry's; returns it."""
    fields = {"cam_threshold": 0.5, "confidence_weights": [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0]} | fields
    return tiny_weights(folder, defects, dark_network(), **fields)


@pytest.fixture(scope="session")
def exported_weights(tmp_path_factory) -> Path:
    """`dark_weights` for cracks, to which `defectcam export` has added the graph."""
    from defectcam.training import export

    folder = dark_weights(tmp_path_factory.mktemp("exported"))
    graph = graph_once(dark_network())
    with patch.object(export, "graph_of", lambda network: graph):
        export.main(["--weights", str(folder)])
    return folder


@pytest.fixture(scope="session")
def with_graph(exported_weights):
    """Function (folder, fields of the manifest) -> `dark_weights` for cracks in that folder, with their graph."""

    def make(folder: Path, **fields: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(exported_weights / "crack.onnx", folder / "crack.onnx")
        return dark_weights(folder, graph="crack.onnx", **fields)

    return make
