"""`docker stop` and Ctrl-C: the process ends in time. An answer under way is still given if it is short.

Docker kills after 10 s, and Nuclio's processor takes 5 of them for itself.
"""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from defectcam import function, serve
from tests.conftest import ROOT, dark_wall

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Nuclio's processor runs on Linux only")

# What Nuclio's wrapper does with a handler: one event after another in an event loop, which looks at the processor's
# signal between two of them and then calls the termination callback, but goes on.
WRAPPER = """
import asyncio, json, logging, signal, sys
import nuclio_sdk
import main
from defectcam import function

function.LAST_ANSWER_S = float(sys.argv[1])

async def wrapper():
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 30)
    context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.CRITICAL), nuclio_sdk.Platform("local"))
    main.init_context(context)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    ended, waiting = [], None

    def on_signal():
        ended.append(True)
        if waiting:
            waiting.cancel()

    loop.add_signal_handler(signal.SIGUSR1, on_signal)
    print("ready", flush=True)
    while True:
        try:
            waiting = loop.create_task(reader.readline())
            body, waiting = await waiting, None
            print("begun", flush=True)
            print(main.handler(context, nuclio_sdk.Event(body=body, method="POST")).status_code, flush=True)
        except asyncio.CancelledError:
            pass
        finally:
            if ended:
                ended.clear()
                context.platform._on_signal("termination")

asyncio.run(wrapper())
"""


@contextmanager
def wrapped(weights, last_answer_s: float):
    """A worker process that has said "ready"."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "ADVCAM_DEVICE": "cpu", "ADVCAM_TIME_LIMIT": "80000"}
    environ["ADVCAM_WEIGHTS"] = str(weights)
    command = [sys.executable, "-c", WRAPPER, str(last_answer_s)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def request(side_px: int, iterations: int) -> str:
    """A request, on one line, for a square photo full of dark spots, so that all of it climbs."""
    centres = range(30, side_px, 100)
    photo_rgb, _ = dark_wall([(x, y, 12) for x in centres for y in centres], side_px, side_px)
    out = io.BytesIO()
    Image.fromarray(photo_rgb).save(out, "PNG")
    image = base64.b64encode(out.getvalue()).decode()
    return json.dumps({"image": image, "threshold": 0.001, "iterations": iterations}) + "\n"


def begin(process, side_px: int, iterations: int) -> None:
    process.stdin.write(request(side_px, iterations))
    process.stdin.flush()
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)  # for the handler itself to be called


def test_a_worker_does_not_wait_for_a_long_answer(exported_weights):
    with wrapped(exported_weights, last_answer_s=1) as process:
        begin(process, 1200, iterations=50)  # a minute
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0
        assert process.stdout.read() == ""


def test_a_worker_gives_a_short_answer_before_it_ends(exported_weights):
    """And then ends at once, as an idle one does."""
    with wrapped(exported_weights, last_answer_s=600) as process:
        begin(process, 256, iterations=4)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(90) == 0
        assert process.stdout.read() == "200\n"


def test_the_container_is_gone_before_docker_kills_it():
    processor_s, docker_s = 5, 10
    assert function.LAST_ANSWER_S + processor_s < docker_s and serve.LAST_ANSWER_S < docker_s


SLOW = """
import sys, threading
from defectcam import serve
stop = threading.Event()
def handler(context, event):
    print("begun", flush=True)
    stop.wait({seconds})
    return "done"
serve.function = sys.modules["__main__"]
serve.LAST_ANSWER_S = {last_answer_s}
serve.main()
"""


@contextmanager
def served(folder, seconds: float, last_answer_s: float):
    """`defectcam serve` of a handler that takes so long: its process and URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-c", SLOW.format(seconds=seconds, last_answer_s=last_answer_s), "--port", port]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert any("running on" in line for line in process.stderr)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_does_not_wait_for_a_long_answer(tmp_path, stop):
    with served(tmp_path, seconds=600, last_answer_s=1) as (process, url):
        answers = []
        caller = threading.Thread(target=lambda: answers.append(httpx.get(url, timeout=600).status_code))
        caller.start()
        assert process.stdout.readline() == "begun\n"
        process.send_signal(stop)
        assert process.wait(120) in (0, -stop)
        caller.join()
        assert answers == [500]


def test_the_command_gives_a_short_answer_before_it_ends(tmp_path):
    with served(tmp_path, seconds=1, last_answer_s=600) as (process, url):
        answers = []
        caller = threading.Thread(target=lambda: answers.append(httpx.get(url, timeout=60).text))
        caller.start()
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) in (0, -signal.SIGTERM)
        caller.join()
        assert answers == ["done"]
