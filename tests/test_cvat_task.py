"""T set on the task in CVAT: a small server replays what a real CVAT answered, and misbehaves as real ones do."""

import base64
import copy
import http.server
import io
import json
import logging
import threading
import time
from types import SimpleNamespace

import nuclio_sdk
import numpy as np
import pytest
from PIL import Image

import main
from defectcam.cvat_task import CvatTask, _frames_at, _Run
from defectcam.request import RequestError
from tests.conftest import DATA, ROOT

EXCHANGES = DATA / "cvat_exchanges"
LOG = logging.getLogger("test")
TOKEN = "0123456789abcdef0123456789abcdef01234567"
RUNS, LABELS, META = "/api/lambda/requests", "/api/labels?task_id=7", "/api/tasks/7/data/meta"
DEFAULT = {"crack": 0, "spalling": 2}

pytestmark = pytest.mark.skipif(
    not EXCHANGES.exists(), reason="the recorded exchanges (../shared/data/cvat_exchanges) are not on this machine"
)


def recorded(number: int) -> object:
    """Body of a recorded answer."""
    (path,) = EXCHANGES.glob(f"{number:02}_*.json")
    return json.loads(path.read_text())["response"]["body"]


def frame_path(number: int, task: int = 7) -> str:
    return f"/api/tasks/{task}/data?type=frame&quality=original&number={number}"


def encoded(image_rgb: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, kind)
    return buffer.getvalue()


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)


def labels_with(**default: str) -> dict:
    """The recorded labels of task 7 after the default of a select was changed, that select being `iterations`."""
    answer = recorded(37)
    attribute = next(entry for entry in answer["results"][0]["attributes"] if entry["input_type"] == "select")
    for label in answer["results"]:
        if label["name"] in default:
            own = attribute | {"name": "iterations", "values": ["0", "1", "2", "8", "auto"]}
            label["attributes"] = [*label["attributes"], own | {"default_value": default[label["name"]]}]
    return answer


@pytest.fixture
def cvat():
    """A server on a real port: `routes` (path -> JSON, bytes or a function of the handler), `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.path)
            headers.append(dict(self.headers))
            body = routes.get(self.path, routes.get("*"))
            if callable(body):
                return body(self)
            reply(self, 404 if body is None else 200, body)

        def log_message(self, *_):
            pass

    routes, asked, headers = {}, [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(
        routes=routes, asked=asked, headers=headers, url=f"http://127.0.0.1:{server.server_address[1]}"
    )
    server.shutdown()
    server.server_close()


def reply(handler, status: int, body: object, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def running(cvat):
    """The recorded moment: det-attrs is started on task 7 and has done the first of three frames."""
    cvat.routes |= {RUNS: recorded(35), LABELS: labels_with(crack="8"), META: recorded(10)}
    cvat.routes |= {frame_path(number): encoded(photo(number)) for number in range(3)}
    return cvat


def task_of(server, function: str = "det-attrs") -> CvatTask:
    return CvatTask(server.url, TOKEN, function, LOG)


def look_up(task: CvatTask, image_rgb: np.ndarray, file: bytes = b"another file", default=DEFAULT) -> dict:
    return task.iterations(file, image_rgb, default)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- what a task asks for ----


def test_default_on_the_label_of_the_started_runs_task_is_the_setting(running, caplog):
    assert look_up(task_of(running), photo(1), encoded(photo(1))) == {"crack": 8}
    assert running.asked == [RUNS, LABELS, META, frame_path(1)]
    assert {entry["Authorization"] for entry in running.headers} == {f"Token {TOKEN}"}
    assert not warnings(caplog)


def test_a_personal_access_token_is_sent_as_newer_versions_want_it(running):
    look_up(CvatTask(running.url, "abc.DEF_1", "det-attrs", LOG), photo(1))
    assert running.headers[0]["Authorization"] == "Bearer abc.DEF_1"


def test_each_defect_has_its_own(running):
    running.routes[LABELS] = labels_with(crack="auto", spalling="1")
    assert look_up(task_of(running), photo(1)) == {"crack": "auto", "spalling": 1}


def test_labels_are_read_once_per_run_and_again_for_the_next(running):
    task = task_of(running)
    assert look_up(task, photo(1)) == look_up(task, photo(1)) == {"crack": 8}
    assert running.asked.count(LABELS) == running.asked.count(META) == 1
    running.routes[LABELS] = labels_with(crack="1")
    assert look_up(task, photo(1)) == {"crack": 8}
    runs = recorded(35)
    next(run for run in runs if run["status"] == "started")["id"] = "the next one"
    running.routes[RUNS] = runs
    assert look_up(task, photo(1)) == {"crack": 1}
    assert list(task.runs) == ["the next one"]


def test_labels_on_further_pages_are_read(running):
    first, second = labels_with(crack="8"), labels_with(crack="8")
    first["results"], second["results"] = first["results"][1:], first["results"][:1]
    first["next"] = "http://elsewhere.invalid/api/labels?page=2"
    running.routes |= {LABELS: first, f"{LABELS}&page=2": second}
    assert look_up(task_of(running), photo(1)) == {"crack": 8}


@pytest.mark.parametrize(
    "labels, default",
    [
        (lambda: recorded(37), DEFAULT),  # the task has no attribute `iterations`
        (lambda: labels_with(crack="0"), DEFAULT),  # it asks for what would be used anyway
        (lambda: labels_with(crack="8"), {"rust": 0}),  # a label that is no defect of the weights
    ],
)
def test_a_task_that_changes_nothing_costs_no_frame(running, caplog, labels, default):
    running.routes[LABELS] = labels()
    assert look_up(task_of(running), photo(1), default=default) == {}
    assert running.asked == [RUNS, LABELS, META] and not warnings(caplog)


@pytest.mark.parametrize("text", ["99", "51", "-1", "2.5", "", " 8", "viel", "٣", "x" * 5000, "Auto"])
def test_a_default_that_is_no_count_is_logged_and_the_others_hold(running, caplog, text):
    running.routes[LABELS] = labels_with(crack=text, spalling="8")
    assert look_up(task_of(running), photo(1)) == {"spalling": 8}
    (line,) = warnings(caplog)
    assert "label crack of task 7" in line and "0 to 50" in line and len(line) < 300


# ---- never a wrong task's setting ----


def test_other_functions_and_finished_runs_do_not_count(running, caplog):
    assert look_up(task_of(running, "det-plain"), photo(1)) == {}
    assert running.asked == [RUNS] and not warnings(caplog)


def test_a_photo_that_is_not_the_runs_frame_gets_the_deployments_setting(running, caplog):
    task = task_of(running)
    for other in (photo(0), photo(2), photo(9), photo(1)[:20], np.zeros((300, 400, 3), np.uint8)):
        assert look_up(task, other, encoded(other)) == {}
    assert all("not the frame" in line for line in warnings(caplog)) and len(warnings(caplog)) == 5


def test_a_frame_is_known_by_its_pixels_where_its_file_differs(running):
    running.routes[frame_path(1)] = encoded(photo(1), "BMP")
    assert look_up(task_of(running), photo(1), encoded(photo(1))) == {"crack": 8}


@pytest.fixture
def two_running(running):
    """A second run of the same function, on task 9, whose crack label asks for `auto`."""
    runs, labels = recorded(35), labels_with(crack="auto")
    started = next(run for run in runs if run["status"] == "started")
    other = copy.deepcopy(started) | {"id": "second", "progress": 66}
    other["function"]["task"] = 9
    running.routes |= {RUNS: [*runs, other], "/api/labels?task_id=9": labels, "/api/tasks/9/data/meta": recorded(10)}
    running.routes |= {frame_path(number, 9): encoded(photo(100 + number)) for number in range(3)}
    return running


def test_several_runs_are_told_apart_by_their_frames(two_running):
    task = task_of(two_running)
    assert look_up(task, photo(1)) == {"crack": 8}
    assert look_up(task, photo(102)) == {"crack": "auto"}


def test_several_runs_that_cannot_be_told_apart_get_the_deployments_setting(two_running, caplog):
    two_running.routes[frame_path(2, 9)] = encoded(photo(1))
    assert look_up(task_of(two_running), photo(1)) == {}
    assert "several runs" in warnings(caplog)[0]
    two_running.routes["/api/labels?task_id=9"] = labels_with(crack="8")
    assert look_up(task_of(two_running), photo(1)) == {"crack": 8}  # they ask for the same


@pytest.mark.parametrize("size, deleted, frames", [
    (1, (), range(1)), (3, (), range(3)), (3, (0, 1), range(3)), (7, (2, 3, 6), range(7)), (1000, (), range(1000)),
    (1000, tuple(range(5, 40)), range(1000)), (100, (), range(30, 60)), (100, (30, 31), range(30, 60)),
    (29, (), range(29)), (4321, (), range(1000, 1300)),
])  # fmt: skip
def test_the_frame_of_every_call_is_among_the_candidates_and_soon_the_first(size, deleted, frames):
    run = _Run({}, size, frozenset(deleted), frames[0])
    progress = 0  # as CVAT counts it, frame by frame
    for frame in frames:
        if frame in deleted:
            continue
        assert _frames_at(progress, run)[0] == frame
        run.last_seen = frame
        progress = int((frame + 1) / size * 100)


def test_a_job_begins_with_its_own_first_frame(running):
    runs = recorded(35)
    started = next(run for run in runs if run["status"] == "started")
    started["function"]["job"], started["progress"] = 12, 0
    job = recorded(9)["results"][0] | {"id": 12, "start_frame": 2, "stop_frame": 2}
    running.routes |= {RUNS: runs, "/api/jobs/12": job}
    assert look_up(task_of(running), photo(2)) == {"crack": 8}


# ---- CVAT down, slow, refusing ----


def drop(handler):
    handler.connection.close()


def sleep(handler):
    time.sleep(6)
    reply(handler, 200, [])


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def trickle_headers(handler):
    for _ in range(60):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.1)


def status(code):
    return lambda handler: reply(handler, code, {"detail": "no"})


SLOW = {"slow": sleep, "drop by drop": trickle, "headers drop by drop": trickle_headers}
ANSWERS = {
    "dropped": drop,
    "401": status(401),
    "403": status(403),
    "404": status(404),
    "500": status(500),
    "503": status(503),
    "page": b"<html>CVAT</html>",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe",
    "null": b"null",
    "a number": 3,
    "an object": {"results": []},
    "other keys": [{"status": "started"}],
    "a text": ["started"],
}


@pytest.mark.parametrize("path", [RUNS, LABELS, META, frame_path(1)])
@pytest.mark.parametrize("name", ANSWERS)
def test_whatever_cvat_answers_costs_one_log_line(running, caplog, path, name):
    running.routes[path] = ANSWERS[name]
    assert look_up(task_of(running), photo(1)) == {}
    (line,) = warnings(caplog)
    assert running.url in line and TOKEN not in line and "deployment" in line


@pytest.mark.parametrize("path", [RUNS, frame_path(1)])
@pytest.mark.parametrize("name", SLOW)
def test_however_slowly_cvat_answers_it_costs_two_seconds(running, caplog, path, name):
    running.routes[path] = SLOW[name]
    started = time.monotonic()
    assert look_up(task_of(running), photo(1)) == {}
    assert time.monotonic() - started < 2.6
    (line,) = warnings(caplog)
    assert running.url in line and TOKEN not in line and "deployment" in line


def test_a_cvat_that_is_down_costs_one_log_line(caplog):
    task = CvatTask("http://127.0.0.1:9", TOKEN, "det-attrs", LOG)
    assert look_up(task, photo(1)) == {}
    assert "cannot be reached" in warnings(caplog)[0]
    assert look_up(CvatTask("http://cvat.invalid", TOKEN, "det-attrs", LOG), photo(1)) == {}


def test_the_token_goes_nowhere_else(running, caplog):
    elsewhere = f"{running.url}/elsewhere"
    running.routes[RUNS] = lambda handler: reply(handler, 302, b"", Location=elsewhere)
    assert look_up(task_of(running), photo(1)) == {}
    assert running.asked == [RUNS] and "302" in warnings(caplog)[0]


def test_after_a_bad_moment_the_setting_holds_again(running):
    task = task_of(running)
    good = running.routes[LABELS]
    running.routes[LABELS] = status(500)
    assert look_up(task, photo(1)) == {}
    running.routes[LABELS] = good
    assert look_up(task, photo(1)) == {"crack": 8}


# ---- the deployment ----


@pytest.mark.parametrize("changes, words", [
    ({"ADVCAM_CVAT_TOKEN": ""}, ["ADVCAM_CVAT_TOKEN is not set"]),
    ({"ADVCAM_CVAT_URL": " "}, ["ADVCAM_CVAT_URL is not set"]),
    ({"ADVCAM_CVAT_URL": "cvat:8080"}, ["ADVCAM_CVAT_URL", "cvat:8080", "http://"]),
    ({"ADVCAM_CVAT_URL": "file:///etc/passwd"}, ["ADVCAM_CVAT_URL", "http://"]),
    ({"ADVCAM_CVAT_TOKEN": "sec ret"}, ["ADVCAM_CVAT_TOKEN", "blanks"]),
    ({"ADVCAM_CVAT_TOKEN": "sec\nret"}, ["ADVCAM_CVAT_TOKEN", "blanks"]),
    ({"NUCLIO_FUNCTION_NAME": ""}, ["NUCLIO_FUNCTION_NAME"]),
])  # fmt: skip
def test_a_wrong_deployment_does_not_start(changes, words):
    environ = {"ADVCAM_CVAT_URL": "http://cvat:8080", "ADVCAM_CVAT_TOKEN": TOKEN, "NUCLIO_FUNCTION_NAME": "f"}
    assert CvatTask.from_env(environ, LOG).function == "f"
    with pytest.raises(RequestError) as error:
        CvatTask.from_env(environ | changes, LOG)
    assert all(word in str(error.value) for word in words) and "ret" not in str(error.value)


def test_without_url_and_token_nobody_is_asked():
    assert CvatTask.from_env({"NUCLIO_FUNCTION_NAME": "f"}, LOG) is None


def test_the_handler_uses_the_tasks_setting_and_the_requests_own_wins(running, monkeypatch):
    """One frame as CVAT sends it, through the Nuclio handler with the shipped weights."""
    sample = np.asarray(Image.open(ROOT / "docs" / "sample.jpg").convert("RGB"))
    file = encoded(np.ascontiguousarray(sample[420:580, 760:920]))
    running.routes[frame_path(1)] = file
    environ = {"ADVCAM_CVAT_URL": running.url, "ADVCAM_CVAT_TOKEN": TOKEN, "NUCLIO_FUNCTION_NAME": "det-attrs"}
    environ |= {"ADVCAM_DEVICE": "cpu", "ADVCAM_DEFECTS": "crack", "ADVCAM_THRESHOLD": "0.01"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.INFO))
    main.init_context(context)

    def shown(**given) -> set[str]:
        body = {"image": base64.b64encode(file).decode(), **given}
        event = nuclio_sdk.Event(body=body, content_type="application/json", method="POST")
        shapes = json.loads(main.handler(context, event).body)
        assert shapes
        return {entry["value"] for shape in shapes for entry in shape["attributes"] if entry["name"] == "iterations"}

    default = str(context.user_data.model.weights.facts["crack"].iterations)
    asked_for = "1" if default != "1" else "2"
    running.routes[LABELS] = labels_with(crack=asked_for)
    assert shown() == {asked_for}
    asked = len(running.asked)
    assert shown(iterations=3) == {"3"}
    assert len(running.asked) == asked  # nobody need be asked
    running.routes[RUNS] = []
    assert shown() == {default}
    running.routes[RUNS] = status(403)
    assert shown() == {default}
