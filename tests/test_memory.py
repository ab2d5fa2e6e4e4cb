"""In a container with little memory a photo gets the tag, and the process lives on."""

import base64
import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import ROOT

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")

CHILD = """
import logging, resource, sys
from pathlib import Path
import nuclio_sdk
import main
from defectcam import memory

resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), resource.RLIM_INFINITY))
memory.CGROUP_LIMITS = (Path(sys.argv[1]), Path("/nowhere"))
context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.ERROR))
main.init_context(context)
for line in sys.stdin:
    print(main.handler(context, nuclio_sdk.Event(body=line, method="POST")).body, flush=True)
"""


def answers(container_bytes, process_bytes, *bodies, folder):
    """What the function answers, one after another, in such a container and with such a limit from who starts it."""
    (folder / "memory.max").write_text(f"{container_bytes}\n")
    environ = os.environ | {"ADVCAM_DEVICE": "cpu", "ADVCAM_MAX_MEGAPIXELS": "178", "ADVCAM_TIME_LIMIT": "600"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / "memory.max"), str(process_bytes)],
        input="\n".join(map(json.dumps, bodies)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ | {"PYTHONPATH": str(ROOT)},
    )
    return done, list(map(json.loads, done.stdout.splitlines()))


def flat_photo(side: int) -> dict:
    out = io.BytesIO()
    Image.new("L", (side, side), 140).save(out, "PNG")
    return {"image": base64.b64encode(out.getvalue()).decode(), "iterations": 1}


@pytest.mark.parametrize(
    ("container_bytes", "process_bytes"),
    [(1100 << 20, resource.RLIM_INFINITY), (1100 << 20, 64 << 30), (64 << 30, 1500 << 20)],
)
def test_a_photo_too_large_for_its_limits_costs_itself_alone(tmp_path, container_bytes, process_bytes):
    photos = [flat_photo(side) for side in (64, 13_000, 64)]
    done, (first, large, last) = answers(container_bytes, process_bytes, *photos, folder=tmp_path)
    assert done.returncode == 0 and first == last == []
    assert large[0]["label"] == "unprocessed" and "memory" in large[0]["attributes"][0]["value"]


@pytest.mark.parametrize("process_bytes", [resource.RLIM_INFINITY, 64 << 30])
def test_a_container_with_too_little_memory_does_not_start(tmp_path, process_bytes):
    done, _ = answers(500 << 20, process_bytes, folder=tmp_path)
    assert done.returncode == 1 and "give the container more" in done.stderr


KEEPING = """
import sys
import numpy as np
from defectcam.memory import _bytes_of, keep_freed_memory, return_freed_memory

keep_freed_memory()
before = _bytes_of("/proc/self/status")["VmRSS"]
large, between = [], []
for _ in range(16):
    large.append(np.ones(30 << 17))
    between.append(np.ones(8 << 10))
del large
if sys.argv[1] == "returned":
    return_freed_memory()
print((_bytes_of("/proc/self/status")["VmRSS"] - before) / 1e6)
"""


@pytest.mark.parametrize(("how", "least_mb", "most_mb"), [("returned", -20, 20), ("kept", 450, 550)])
def test_freed_memory_is_kept_until_it_is_returned(how, least_mb, most_mb):
    command = [sys.executable, "-c", KEEPING, how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert least_mb < float(done.stdout) < most_mb
