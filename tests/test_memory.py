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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")

CHILD = """
import logging, sys
from pathlib import Path
import nuclio_sdk
import main
from defectcam import memory

memory.CGROUP_LIMITS = (Path(sys.argv[1]), Path("/nowhere"))
context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.ERROR))
main.init_context(context)
for line in sys.stdin:
    print(main.handler(context, nuclio_sdk.Event(body=line, method="POST")).body, flush=True)
"""


def answers(limit_file, *bodies):
    """What the function answers, one after another, in a container with this limit."""
    environ = os.environ | {"ADVCAM_DEVICE": "cpu", "ADVCAM_MAX_MEGAPIXELS": "178", "ADVCAM_TIME_LIMIT": "600"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(limit_file)],
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


def test_a_photo_too_large_for_the_container_costs_itself_alone(tmp_path):
    (tmp_path / "memory.max").write_text(f"{1100 << 20}\n")
    done, (first, large, last) = answers(tmp_path / "memory.max", flat_photo(64), flat_photo(13_000), flat_photo(64))
    assert done.returncode == 0 and first == last == []
    assert large[0]["label"] == "unprocessed" and "memory" in large[0]["attributes"][0]["value"]


def test_a_container_with_too_little_memory_does_not_start(tmp_path):
    (tmp_path / "memory.max").write_text(f"{500 << 20}\n")
    done, _ = answers(tmp_path / "memory.max")
    assert done.returncode == 1 and "give the container more" in done.stderr
