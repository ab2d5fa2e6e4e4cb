"""In a container with little memory a photo gets the tag, and the process lives on."""

import base64
import io
import json
import os
import subprocess
import sys
from functools import cache

import pytest
from PIL import Image

from defectcam import memory
from defectcam.request import MAX_BODY_BYTES
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


def answers(container_bytes, process_bytes, *bodies, folder, weights):
    """What the function answers, one after another, in such a container and with such a limit from who starts it."""
    (folder / "memory.max").write_text(f"{container_bytes}\n")
    environ = os.environ | {"ADVCAM_DEVICE": "cpu", "ADVCAM_MAX_MEGAPIXELS": "178", "ADVCAM_TIME_LIMIT": "80000"}
    environ |= {"ADVCAM_WEIGHTS": str(weights)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / "memory.max"), str(process_bytes)],
        input="\n".join(map(json.dumps, bodies)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ | {"PYTHONPATH": str(ROOT)},
    )
    return done, list(map(json.loads, done.stdout.splitlines()))


@cache
def flat_photo(side: int) -> dict:
    out = io.BytesIO()
    Image.new("L", (side, side), 140).save(out, "PNG")
    return {"image": base64.b64encode(out.getvalue()).decode(), "iterations": 1}


@pytest.mark.parametrize(
    ("container_bytes", "process_bytes"),
    [(1412 << 20, resource.RLIM_INFINITY), (1412 << 20, 64 << 30), (64 << 30, 1500 << 20)],
)
def test_a_photo_too_large_for_its_limits_costs_itself_alone(tmp_path, with_graph, container_bytes, process_bytes):
    photos = [flat_photo(side) for side in (64, 13_000, 64)]
    weights = with_graph(tmp_path / "weights", threshold=1.0)
    done, (first, large, last) = answers(container_bytes, process_bytes, *photos, folder=tmp_path, weights=weights)
    assert done.returncode == 0 and first == last == []
    assert large[0]["label"] == "unprocessed"
    assert large[0]["attributes"][0]["value"].startswith("out of memory: needs 5070 MB, "), "it was not decoded"


@pytest.mark.parametrize("process_bytes", [resource.RLIM_INFINITY, 64 << 30])
def test_a_container_with_too_little_memory_does_not_start(tmp_path, exported_weights, process_bytes):
    done, _ = answers(500 << 20, process_bytes, folder=tmp_path, weights=exported_weights)
    assert done.returncode == 1 and "give the container more" in done.stderr


def test_what_the_processor_holds_of_a_body_is_left_free():
    """Two of the longest bodies, its own memory, and code of the libraries."""
    assert memory.MARGIN_BYTES >= 2 * MAX_BODY_BYTES + (150 << 20)


# As Nuclio's wrapper does it: the event is made by the SDK, from a body that came over a socket.
HOSTILE = """
import itertools, logging, sys
import nuclio_sdk
from nuclio_sdk.event import EventDeserializerKinds
import main
from defectcam.memory import _bytes_of

context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.CRITICAL))
main.init_context(context)
size, text = int(sys.argv[1]), b"QUJD"
bodies = {
    "lists": b"[" + b"[]," * (size // 3) + b"1]",
    "lists-beside": b'{"image": "QUJD", "a": [' + b"[]," * (size // 3) + b"1]}",
    "keys": b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
    "endless": b'{"image": "' + text * (size // 4),
    "escapes": b'{"image": "' + b"\\\\u00e9" * (size // 6) + b'"}',
    "wide": b'{"image": "\\\\ud83d\\\\ude00' + text * (size // 4) + b'"}',
    "image": b'{"image": "' + text * (size // 4) + b'"}',
}
message = {"fields": {}, "headers": {}, "id": "1", "method": "POST", "path": "/", "url": "",
           "shard_id": 0, "num_shards": 0, "size": 0, "timestamp": 0, "type": "", "type_version": "", "version": "",
           "trigger": {"kind": "http", "name": "t"}}
for content_type, (name, body) in itertools.product(sys.argv[2:], bodies.items()):
    before = _bytes_of("/proc/self/status")["VmRSS"]
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    given = message | {"body": body, "content_type": content_type}
    event = nuclio_sdk.Event.deserialize(given, kind=EventDeserializerKinds.msgpack)
    status = main.handler(context, event).status_code
    print(name, status, (_bytes_of("/proc/self/status")["VmHWM"] - before) / len(body), flush=True)
"""


def test_no_body_takes_more_memory_than_a_few_times_its_size(exported_weights):
    """Parsed as a whole, lists would take 21 times their size."""
    command = [sys.executable, "-c", HOSTILE, str(24 << 20), "application/json", "text/plain"]
    environ = os.environ | {"ADVCAM_DEVICE": "cpu", "ADVCAM_WEIGHTS": str(exported_weights), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
    lines = [line.split() for line in done.stdout.splitlines()]
    names = ["lists", "lists-beside", "keys", "endless", "escapes", "wide", "image"]
    assert [name for name, *_ in lines] == 2 * names, done.stderr
    assert [status for _, status, _ in lines] == 2 * (["400"] * 6 + ["200"])  # the last one is a photo of no known format
    assert all(float(times) < 5 for _, _, times in lines), lines


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
