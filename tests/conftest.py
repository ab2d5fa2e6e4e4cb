"""Shared fixtures: a small network with random weights, the shipped weights, the real photos where they are."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
import uvicorn
from nuclio_sdk.event import _EventDeserializer

from defectcam import serve
from defectcam.network import DefectNet
from defectcam.training.clicks import photo_path, split_stems

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"


def random_network(seed: int = 0, downsamplings: int = 2, dtype: torch.dtype = torch.float64) -> DefectNet:
    """A frozen network whose BatchNorm has seen data, so that its maps have structure and positive parts."""
    torch.manual_seed(seed)
    network = DefectNet((16, 16, 8, 8)[: downsamplings + 1], downsamplings)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, 64, 64))
    return network.to(dtype).requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def own_environment():
    """What a test's commands set in the environment of this process ends with the test."""
    with patch.dict(os.environ):
        yield


@contextmanager
def running_function(handler=None, **environ: str):
    """URL of a server of the real function, started with these variables; `handler` in place of its own."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in environ.items():
            environment.setenv(name, value)
        main = serve.load_main()
        app = serve.create_app(SimpleNamespace(init_context=main.init_context, handler=handler or main.handler))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module", autouse=True)
def sdk_as_installed():
    """`main.init_context` changes how nuclio_sdk reads bodies in its process; not for the next file of tests."""
    as_installed = _EventDeserializer._try_deserialize_json
    yield
    _EventDeserializer._try_deserialize_json = staticmethod(as_installed)


@pytest.fixture
def network() -> DefectNet:
    return random_network()


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


@pytest.fixture(scope="session")
def textured_image() -> np.ndarray:
    """(150, 203, 3) uint8 RGB with structure at several scales."""
    rng = np.random.default_rng(5)
    coarse = cv2.resize(rng.integers(0, 255, (12, 16, 3), np.uint8), (203, 150), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-40, 40, (150, 203, 3))
    return np.clip(coarse.astype(int) + noise, 0, 255).astype(np.uint8)
