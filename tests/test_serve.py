"""The HTTP host keeps to Nuclio's contract: a tiny handler behind a real server, asked over real sockets."""

import base64
import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from nuclio_sdk import Response
from PIL import Image

from defectcam import serve
from tests.conftest import ROOT

JSON = {"Content-Type": "application/json"}
LIMIT = 100_000


def echo(context, event):
    """What reached the handler, as JSON."""
    body = event.body
    seen = {
        "type": type(body).__name__,
        "body": body.decode() if isinstance(body, bytes) else body,
        "method": event.method,
        "path": event.path,
        "content_type": event.content_type,
        "fields": event.fields,
        "headers": event.headers,
        "user_data": context.user_data.started,
    }
    return context.Response(body=json.dumps(seen), content_type="application/json")


def start(context):
    context.user_data.started = context.worker_id


@contextmanager
def serving(handler, init_context=start, **limits):
    """Base URL of a server on a free port that runs the handler."""
    module = SimpleNamespace(init_context=init_context, handler=handler)
    app = serve.create_app(module, **limits)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def echo_url():
    with serving(echo, max_body_bytes=LIMIT) as url:
        yield url


@pytest.mark.parametrize(
    "content_type, body, kind, value",
    [
        ("application/json", '{"a": 1}', "dict", {"a": 1}),
        ("application/json", "[1, 2]", "list", [1, 2]),
        ("application/json", "null", "NoneType", None),
        ("application/json", '{"a": ', "bytes", '{"a": '),  # does not parse
        ("application/json", "", "bytes", ""),
        ("application/json; charset=utf-8", '{"a": 1}', "bytes", '{"a": 1}'),
        ("Application/JSON", '{"a": 1}', "bytes", '{"a": 1}'),
        ("text/plain", '{"a": 1}', "bytes", '{"a": 1}'),
        (None, '{"a": 1}', "bytes", '{"a": 1}'),
    ],
)
def test_body_is_parsed_only_for_exactly_application_json(echo_url, content_type, body, kind, value):
    headers = {"Content-Type": content_type} if content_type else {}
    answer = httpx.post(echo_url, content=body, headers=headers)
    assert answer.status_code == 200
    assert (answer.json()["type"], answer.json()["body"]) == (kind, value)
    assert answer.json()["content_type"] == (content_type or "")


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/some/where", "/with%20blank/"])
def test_any_method_and_path_reaches_the_handler(echo_url, method, path):
    seen = httpx.request(method, echo_url + path + "?a=b").json()
    assert (seen["method"], seen["path"]) == (method, path.replace("%20", " "))
    assert (seen["type"], seen["body"], seen["fields"]) == ("bytes", "", {"a": "b"})


def test_event_carries_canonical_headers_and_the_context_what_init_context_left(echo_url):
    seen = httpx.post(echo_url, content="{}", headers=JSON | {"x-nuclio-path": "/"}).json()
    assert seen["headers"]["Content-Type"] == "application/json"
    assert seen["headers"]["X-Nuclio-Path"] == "/"
    assert seen["user_data"] == "0"


def payload(size, chunked):
    """A body of the size, whose length is declared, or without a length in chunks of up to 10 kB."""
    if not chunked:
        return b"x" * size
    return (b"x" * min(10_000, size - start) for start in range(0, size, 10_000))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [LIMIT + 1, 50 * LIMIT])
def test_too_long_body_never_reaches_the_handler(echo_url, size, chunked):
    answer = httpx.post(echo_url, content=payload(size, chunked))
    assert (answer.status_code, answer.text) == (400, "Error when parsing request")


@pytest.mark.parametrize("chunked", [False, True])
def test_body_of_just_the_limit_reaches_the_handler(echo_url, chunked):
    answer = httpx.post(echo_url, content=payload(LIMIT, chunked))
    assert answer.status_code == 200
    assert len(answer.json()["body"]) == LIMIT


def test_declared_length_over_the_limit_is_refused_before_the_body_comes(echo_url):
    with connected(echo_url) as caller:
        caller.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
        assert caller.recv(100).startswith(b"HTTP/1.1 400")


def test_too_short_declared_length_cuts_the_body(echo_url):
    with connected(echo_url) as caller:
        caller.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nabcdef")
        assert b'"body": "ab"' in caller.makefile("rb").read()


def test_caller_who_leaves_while_sending_does_no_harm(echo_url):
    with connected(echo_url) as caller:
        caller.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert httpx.get(echo_url).status_code == 200


@contextmanager
def connected(url):
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=5) as caller:
        yield caller


def test_exception_is_a_500_with_the_traceback_and_the_worker_lives_on():
    def handler(context, event):
        if event.method == "POST":
            raise KeyError("no such defect")
        return "alive"

    with serving(handler) as url:
        answer = httpx.post(url)
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "text/plain"
        assert "Traceback" in answer.text and "KeyError: 'no such defect'" in answer.text
        assert httpx.get(url).text == "alive"


OUTPUTS = [  # what the handler returns; status, content type and body that arrive
    (Response(body="[]", content_type="application/json"), 200, "application/json", b"[]"),
    (Response(body={"a": 1}), 200, "application/json", b'{"a": 1}'),
    (Response(body=[1, "a"]), 200, "text/plain", b"[1, 'a']"),  # Python's repr, no JSON
    (Response(body=b"\xff\x00", content_type="image/png"), 200, "image/png", b"\xff\x00"),
    (Response(body="no", status_code=400), 400, "text/plain", b"no"),
    ({"a": 1}, 200, "application/json", b'{"a": 1}'),
    ([1, 2], 200, "application/json", b"[1, 2]"),
    ("text", 200, "text/plain", b"text"),
    (b"bytes", 200, "text/plain", b"bytes"),
    ((201, {"a": 1}), 201, "application/json", b'{"a": 1}'),
    ((404, "nowhere"), 404, "text/plain", b"nowhere"),
    (None, 200, "text/plain", b"None"),
]


def test_outputs_become_what_the_sdk_makes_of_them():
    with serving(lambda context, event: OUTPUTS[int(event.path[1:])][0]) as url, httpx.Client() as client:
        for number, (_, *expected) in enumerate(OUTPUTS):
            answer = client.get(f"{url}/{number}")
            assert [answer.status_code, answer.headers["content-type"], answer.content] == expected


def test_headers_of_the_response_arrive():
    def handler(context, event):
        return context.Response(body="", headers={"X-Steps": 2, "content-type": "a/b"}, content_type="c/d")

    with serving(handler) as url:
        answer = httpx.get(url)
    assert answer.headers["x-steps"] == "2"
    assert answer.headers.get_list("content-type") == ["c/d"]


def test_a_bare_list_is_warned_of(capfd):
    with serving(lambda context, event: []) as url:
        httpx.get(url)
    assert "batch" in capfd.readouterr().err


def test_log_lines_of_the_handler_are_readable(capfd):
    with serving(lambda context, event: context.logger.info_with("done", shapes=3)) as url:
        httpx.get(url)
    assert "[info] done: {'shapes': 3}" in capfd.readouterr().err


def test_ten_at_once_are_served_one_at_a_time():
    inside, most, threads = [], [], set()

    def handler(context, event):
        inside.append(event)
        most.append(len(inside))
        threads.add(threading.get_ident())
        time.sleep(0.02)
        inside.pop()
        return event.path

    with serving(handler, init_context=lambda context: threads.add(threading.get_ident())) as url:
        with ThreadPoolExecutor(10) as callers, httpx.Client() as client:
            answers = list(callers.map(lambda n: client.get(f"{url}/{n}").text, range(10)))
    assert answers == [f"/{n}" for n in range(10)]
    assert most == [1] * 10
    assert len(threads) == 1, "init_context and the handler run in one thread"


class Busy:
    """A handler that works on /hold until it is released, and is done at once with everything else."""

    def __init__(self):
        self.entered, self.release, self.done = threading.Event(), threading.Event(), []

    def __call__(self, context, event):
        if event.path == "/hold":
            self.entered.set()
            assert self.release.wait(10)
        self.done.append(event.path)
        return "done"


def test_who_waits_too_long_gets_503_and_the_worker_goes_on():
    busy = Busy()
    with serving(busy, queue_seconds=0.1) as url, ThreadPoolExecutor(1) as callers:
        holder = callers.submit(httpx.get, url + "/hold")
        assert busy.entered.wait(5)
        refused = httpx.get(url + "/late")
        busy.release.set()
        assert (refused.status_code, refused.content) == (503, b"")
        assert holder.result().text == "done"
        assert httpx.get(url + "/after").text == "done"
    assert busy.done == ["/hold", "/after"]


def test_callers_who_leave_do_not_wedge_the_worker():
    busy = Busy()
    with serving(busy) as url:
        for path in ("/hold", "/waiting"):  # one leaves while it is served, one while it waits
            with connected(url) as caller:
                caller.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert busy.entered.wait(5)
                time.sleep(0.2)  # for the second one to get into the queue
        busy.release.set()
        assert httpx.get(url + "/after").text == "done"
    assert busy.done[0] == "/hold" and busy.done[-1] == "/after"


def test_failing_init_context_ends_the_start():
    def init_context(context):
        raise RuntimeError("weights/crack.safetensors: checksum differs")

    with pytest.raises(RuntimeError, match="checksum differs") as failure:
        serve.create_app(SimpleNamespace(init_context=init_context, handler=echo))
    assert failure.traceback[-1].name == "init_context"


def test_command_serves_and_fails_with_the_traceback(tmp_path):
    def command(handler, *arguments):
        code = f"import sys\nfrom defectcam import serve\n{handler}\nserve.function = sys.modules['__main__']\nserve.main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    assert "example:" in command("", "--help").communicate(timeout=30)[0]

    server = command("def handler(context, event): return 'hello'", "--port", "0")
    lines = []
    try:
        for line in server.stderr:
            lines.append(line)
            if "running on" in line:
                break
        url = lines[-1].split("running on ")[1].split()[0]
        assert httpx.get(url).text == "hello"
    finally:
        server.terminate()
        server.communicate(timeout=30)

    server = command("def handler(): pass\ndef init_context(context): raise OSError('no weights')", "--port", "0")
    assert "OSError: no weights" in server.communicate(timeout=30)[1]
    assert server.returncode == 1


def test_a_memory_hungry_request_over_http_costs_its_photo_alone(with_graph, tmp_path):
    """The real function in a process of its own, whose memory is limited for good: it answers, and goes on."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "ADVCAM_TIME_LIMIT": "80000"}
    environ |= {"ADVCAM_WEIGHTS": str(with_graph(tmp_path, threshold=1.0, iterations=1))}
    command = [sys.executable, "-m", "defectcam", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "running on" in line)
            url = line.split("running on ")[1].split()[0]
            small, huge = envelope_of_flat_photo(64, 64), envelope_of_flat_photo(7000, 7000)
            assert httpx.post(url, json=small, timeout=120).json() == []
            status = Path(f"/proc/{process.pid}/status").read_text()
            taken = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1])
            resource.prlimit(process.pid, resource.RLIMIT_AS, (taken + 400_000_000,) * 2)
            answer = httpx.post(url, json=huge, timeout=300)
            assert answer.status_code == 200
            (tag,) = answer.json()
            assert tag["label"] == "unprocessed" and "memory" in tag["attributes"][0]["value"]
            assert httpx.post(url, json=small, timeout=120).json() == []
        finally:
            process.terminate()


def envelope_of_flat_photo(width: int, height: int) -> dict:
    """A request whose photo is small as PNG and large in memory."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (140, 140, 140)).save(out, "PNG")
    return {"image": base64.b64encode(out.getvalue()).decode()}
