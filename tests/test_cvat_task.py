"""T set on the task in CVAT: a small server replays what a real CVAT answered, and misbehaves as real ones do."""

import base64
import http.server
import io
import json
import logging
import threading
import time
from dataclasses import replace
from datetime import datetime, timezone
from types import SimpleNamespace

import nuclio_sdk
import numpy as np
import pytest
import yaml
from PIL import Image

import main
from defectcam import cvat_runs, cvat_task
from defectcam.cvat_runs import Defaults, Run, frames_at
from defectcam.cvat_task import CvatTask, TaskSetting
from defectcam.proposal_log import ProposalLog, read_proposal_log
from defectcam.settings import RequestError
from tests.conftest import DATA, ROOT, dark_wall, dark_weights

EXCHANGES = DATA / "cvat_exchanges"
LOG = logging.getLogger("test")
TOKEN = "0123456789abcdef0123456789abcdef01234567"
RUNS, LABELS, META = "/api/lambda/requests", "/api/labels?task_id=7", "/api/tasks/7/data/meta"
DEFAULT = {"crack": 0, "spalling": 2}

# Of the answers of a CVAT 2.15 to a function called det-attrs, what matters here; a test compares them with the whole.
FINISHED = {
    "id": "228ce3ee-6b81-4f65-bad5-500d21447e03", "function": {"id": "det-attrs", "task": 7, "threshold": None},
    "status": "finished", "progress": 100, "enqueued": "2026-11-22T21:12:40.275180Z",
    "started": "2026-11-22T21:12:40.304068Z", "ended": "2026-11-22T21:12:49.402091Z", "exc_info": None,
}  # fmt: skip
STARTED = {
    "id": "8c84f14f-4a3c-4126-ae06-5d19ebe2c27d", "function": {"id": "det-attrs", "task": 7, "threshold": None},
    "status": "started", "progress": 33, "enqueued": "2026-11-22T21:13:52.626772Z",
    "started": "2026-11-22T21:13:52.647030Z", "ended": None, "exc_info": None,
}  # fmt: skip
# CVAT 2.73 calls all runs of a task the same, and has no progress before the first frame is done.
NEWER = {"id": "action=autoannotate&target=task&target_id=7", "progress": None}
SELECT = {
    "id": 22, "name": "note", "mutable": True, "input_type": "select", "default_value": "b", "values": ["a", "b", "c"],
}  # fmt: skip
NAMES = ("train_7Q3A9060-1.jpg", "train_7Q3A9064-20.jpg", "train_IMG74.jpg")
PHOTOS = [{"width": 544, "height": 384, "name": name, "related_files": 0, "has_related_context": False} for name in NAMES]
FRAMES = {"size": 3, "start_frame": 0, "stop_frame": 2, "frames": PHOTOS, "deleted_frames": []}
JOB = {"id": 7, "task_id": 7, "frame_count": 3, "start_frame": 0, "stop_frame": 2, "type": "annotation", "state": "new"}


def test_the_answers_above_are_those_of_a_real_cvat():
    if not EXCHANGES.exists():
        pytest.skip("the recorded exchanges (../shared/data/cvat_exchanges) are not on this machine")

    def recorded(number: int) -> object:
        (path,) = EXCHANGES.glob(f"{number:02}_*.json")
        return json.loads(path.read_text())["response"]["body"]

    runs, labels = recorded(35), recorded(37)
    assert FINISHED in runs and STARTED in runs
    assert SELECT in labels["results"][0]["attributes"] and "next" in labels
    assert FRAMES.items() <= recorded(10).items() and JOB.items() <= recorded(9)["results"][0].items()


def frame_path(number: int, task: int = 7) -> str:
    return f"/api/tasks/{task}/data?type=frame&quality=original&number={number}"


def encoded(image_rgb: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, kind)
    return buffer.getvalue()


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)


def labels_with(masks=(), **default: str) -> dict:
    """The labels of a task, these with a select `iterations` of that default; `masks`: those of type mask."""
    results = []
    for name in ("crack", "spalling", "unprocessed"):
        own = SELECT | {"name": "iterations", "values": ["0", "1", "2", "8", "auto"]}
        attributes = [own | {"default_value": default[name]}] if name in default else []
        kind = "mask" if name in masks else "polygon"
        results.append({"id": len(results), "name": name, "type": kind, "attributes": [SELECT, *attributes]})
    return {"count": len(results), "next": None, "previous": None, "results": results}


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
    server.test_over = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield SimpleNamespace(
        routes=routes, asked=asked, headers=headers, url=f"http://127.0.0.1:{server.server_address[1]}"
    )
    server.test_over.set()
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
    cvat.routes |= {RUNS: [FINISHED, STARTED], LABELS: labels_with(crack="8"), META: FRAMES}
    cvat.routes |= {frame_path(number): encoded(photo(number)) for number in range(3)}
    return cvat


def task_of(server, function: str = "det-attrs") -> CvatTask:
    return CvatTask(server.url, TOKEN, function, LOG)


def setting(task: CvatTask, image_rgb: np.ndarray, file: bytes | None = None, default=DEFAULT, seconds=0.0) -> TaskSetting:
    """What is asked for at a call that is answered at once; `seconds` are left for it. `default`: T, or Defaults."""
    now, default = time.monotonic(), default if isinstance(default, Defaults) else Defaults(default)
    found = task.setting(file or image_rgb.tobytes(), image_rgb, default, now, now + seconds)
    task.answered(found)
    return found


def steps_of(found: TaskSetting) -> dict:
    """T per defect, where nothing else is asked for."""
    assert all(set(own) == {"iterations"} for own in found.changes.values())
    return {defect: own["iterations"] for defect, own in found.changes.items()}


def look_up(task: CvatTask, image_rgb: np.ndarray, file: bytes | None = None, default=DEFAULT) -> dict:
    return steps_of(setting(task, image_rgb, file, default))


def notices(task: CvatTask, photos, **more) -> list[str]:
    return [setting(task, one, **more).notice for one in photos]


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- what a task asks for ----


def test_default_on_the_label_of_the_started_runs_task_is_the_setting(running, caplog):
    found = setting(task_of(running), photo(1), encoded(photo(1)))
    assert (steps_of(found), found.notice) == ({"crack": 8}, "")
    assert running.asked == [RUNS, LABELS, META, frame_path(1)]
    assert {entry["Authorization"] for entry in running.headers} == {f"Token {TOKEN}"}
    assert not warnings(caplog)


def test_a_personal_access_token_is_sent_as_newer_versions_want_it(running):
    look_up(CvatTask(running.url, "abc.DEF_1", "det-attrs", LOG), photo(1))
    assert running.headers[0]["Authorization"] == "Bearer abc.DEF_1"


def test_each_defect_has_its_own(running):
    running.routes[LABELS] = labels_with(crack="auto", spalling="1")
    assert look_up(task_of(running), photo(1)) == {"crack": "auto", "spalling": 1}


@pytest.mark.parametrize("progress", [0, None, "missing"], ids=["2.15", "2.73", "missing"])
def test_the_first_frame_of_a_run_has_the_tasks_setting(running, progress):
    run = STARTED | NEWER | {"progress": progress}
    if progress == "missing":
        del run["progress"]
    running.routes[RUNS] = [FINISHED, run]
    assert look_up(task_of(running), photo(0)) == {"crack": 8}
    running.routes[META] = FRAMES | {"size": 1, "stop_frame": 0}  # a task of one photo
    assert look_up(task_of(running), photo(0)) == {"crack": 8}
    running.routes[META] = FRAMES | {"deleted_frames": [0, 1]}
    assert look_up(task_of(running), photo(2)) == {"crack": 8}


@pytest.mark.parametrize("progress", [33, "33", 33.4, "33.0"])
def test_progress_may_be_any_number(running, progress):
    running.routes[RUNS] = [STARTED | {"progress": progress}]
    assert look_up(task_of(running), photo(1)) == {"crack": 8}


@pytest.mark.parametrize("progress", ["half", [33], float("nan"), float("inf"), ""])
def test_progress_that_is_no_number_is_told(running, progress):
    running.routes[RUNS] = json.dumps([STARTED | {"progress": progress}]).encode()
    found = setting(task_of(running), photo(1))
    assert steps_of(found) == {} and found.notice.startswith("T=0/2 used: CVAT ")


def test_labels_are_read_once_per_run_and_again_for_the_next(running):
    task = task_of(running)
    assert look_up(task, photo(1)) == look_up(task, photo(1)) == {"crack": 8}
    assert running.asked.count(LABELS) == running.asked.count(META) == 1
    running.routes[LABELS] = labels_with(crack="1")
    assert look_up(task, photo(1)) == {"crack": 8}
    running.routes[RUNS] = [STARTED | {"id": "the next one"}]
    assert look_up(task, photo(1)) == {"crack": 1}
    assert len(task.runs) == 1


def test_the_next_run_of_a_task_is_another_one_though_newer_versions_call_it_the_same(running):
    task, first = task_of(running), STARTED | NEWER
    running.routes[RUNS] = [first]
    assert look_up(task, photo(0)) == {"crack": 8}
    running.routes |= {RUNS: [first | {"enqueued": "2026-11-22T21:20:00Z"}], LABELS: labels_with(crack="1")}
    assert look_up(task, photo(0)) == {"crack": 1}


def test_labels_on_further_pages_are_read(running):
    first, second = labels_with(crack="8"), labels_with(crack="8")
    first["results"], second["results"] = first["results"][1:], first["results"][:1]
    first["next"] = "http://elsewhere.invalid/api/labels?page=2"
    running.routes |= {LABELS: first, f"{LABELS}&page=2": second}
    assert look_up(task_of(running), photo(1)) == {"crack": 8}


@pytest.mark.parametrize(
    "labels, default",
    [
        (labels_with(), DEFAULT),  # the task has no attribute `iterations`
        (labels_with(crack="0"), DEFAULT),  # it asks for what would be used anyway
        (labels_with(crack="8"), {"rust": 0}),  # a label that is not asked for
    ],
)
def test_a_task_that_changes_nothing_costs_no_frame(running, caplog, labels, default):
    running.routes[LABELS] = labels
    found = setting(task_of(running), photo(1), default=default)
    assert (steps_of(found), found.notice) == ({}, "")
    assert running.asked == [RUNS, LABELS, META] and not warnings(caplog)


def test_labels_of_type_mask_ask_for_masks_unless_a_shape_is_given(running, caplog):
    running.routes[LABELS] = labels_with(masks=["crack", "unprocessed"], spalling="8")
    found = setting(task_of(running), photo(1))
    assert found.changes == {"crack": {"shape": "mask"}, "spalling": {"iterations": 8}} and not found.notice
    for shape in ("polygon", "mask"):
        assert look_up(task_of(running), photo(1), default=Defaults(DEFAULT, shape)) == {"spalling": 8}
    running.routes[LABELS] = labels_with(masks=["crack"], crack="8")
    task = task_of(running)
    both = {"crack": {"iterations": 8, "shape": "mask"}}
    assert setting(task, photo(1)).changes == both
    running.routes[RUNS] = status(503)
    assert setting(task, photo(2)).changes == both, "of the run that was under way"
    running.routes |= {RUNS: [STARTED], LABELS: labels_with(masks=["crack"])}
    running.asked.clear()
    assert setting(task_of(running), photo(1), default=Defaults(DEFAULT, "mask")).changes == {}
    assert running.asked == [RUNS, LABELS, META], "it changes nothing"
    polygons = "shapes are polygons, whatever the type of the labels"
    assert setting(task_of(running), photo(9)).notice.endswith(f"not for single frames; {polygons}")
    running.routes[RUNS] = status(401)
    assert setting(task_of(running), photo(1)).notice.endswith(f"; {polygons}")
    assert polygons not in setting(task_of(running), photo(1), default=Defaults(DEFAULT, "mask")).notice


# ---- never a wrong task's setting ----


def test_other_functions_and_finished_runs_do_not_count(running, caplog):
    assert notices(task_of(running, "det-plain"), [photo(1)]) == [""]
    running.routes[RUNS] = [FINISHED]
    assert look_up(task_of(running), photo(1)) == {}
    assert running.asked == [RUNS, RUNS] and not warnings(caplog)


def test_a_photo_that_is_not_the_runs_frame_gets_the_deployments_setting_and_one_notice_says_so(running, caplog):
    task = task_of(running)
    others = (photo(0), photo(2), photo(9), photo(1)[:20], np.zeros((300, 400, 3), np.uint8))
    assert [look_up(task, other, encoded(other)) for other in others] == [{}] * 5
    assert all("not the frame" in line for line in warnings(caplog)) and len(warnings(caplog)) == 5
    (first, *rest) = notices(task_of(running), others)
    assert first.startswith("T=0/2 used: unknown ") and "task 7" in first and rest == [""] * 4


def test_a_frame_is_known_by_its_pixels_where_its_file_differs(running):
    running.routes[frame_path(1)] = encoded(photo(1), "BMP")
    assert look_up(task_of(running), photo(1), encoded(photo(1))) == {"crack": 8}


@pytest.fixture
def two_running(running):
    """A second run of the same function, on task 9, whose crack label asks for `auto`."""
    other = STARTED | {"id": "second", "progress": 66, "function": STARTED["function"] | {"task": 9}}
    running.routes[RUNS] = [STARTED, other]
    running.routes |= {"/api/labels?task_id=9": labels_with(crack="auto"), "/api/tasks/9/data/meta": FRAMES}
    running.routes |= {frame_path(number, 9): encoded(photo(100 + number)) for number in range(3)}
    return running


def test_several_runs_are_told_apart_by_their_frames(two_running):
    task = task_of(two_running)
    assert look_up(task, photo(1)) == {"crack": 8}
    assert look_up(task, photo(102)) == {"crack": "auto"}


def test_several_runs_that_have_only_begun_are_told_apart_by_their_frames(two_running):
    two_running.routes[RUNS] = [run | {"progress": None} for run in two_running.routes[RUNS]]
    task = task_of(two_running)
    assert look_up(task, photo(100)) == {"crack": "auto"}
    assert look_up(task, photo(0)) == {"crack": 8}
    assert look_up(task, photo(1)) == {}


def test_several_runs_that_cannot_be_told_apart_get_the_deployments_setting(two_running, caplog):
    two_running.routes[frame_path(2, 9)] = encoded(photo(1))
    found = setting(task_of(two_running), photo(1))
    assert steps_of(found) == {} and found.notice.startswith("T=0/2 used: several runs")
    two_running.routes["/api/labels?task_id=9"] = labels_with(crack="8")
    assert look_up(task_of(two_running), photo(1)) == {"crack": 8}  # they ask for the same


@pytest.mark.parametrize("first_progress", [0, None])
@pytest.mark.parametrize("size, deleted, frames", [
    (1, (), range(1)), (3, (), range(3)), (3, (0, 1), range(3)), (7, (2, 3, 6), range(7)), (1000, (), range(1000)),
    (1000, tuple(range(5, 40)), range(1000)), (100, (), range(30, 60)), (100, (30, 31), range(30, 60)),
    (29, (), range(29)), (4321, (), range(1000, 1300)), (3, (1, 2), range(2, 3)), (2, (0, 1), range(2)), (0, (), range(0)),
])  # fmt: skip
def test_the_frame_of_every_call_is_among_the_candidates_and_soon_the_first(size, deleted, frames, first_progress):
    run = Run(7, {}, size, frozenset(deleted), frames)
    progress = first_progress  # as CVAT counts it, frame by frame
    for frame in frames:
        if frame in deleted:
            continue
        assert frames_at(progress, run)[0] == run.next_frame() == frame
        run.last = frame
        progress = int((frame + 1) / size * 100)
    assert run.next_frame() is None


@pytest.mark.parametrize("progress", [0, None])
def test_a_job_begins_with_its_own_first_frame(running, progress):
    run = STARTED | {"progress": progress, "function": STARTED["function"] | {"job": 12}}
    running.routes |= {RUNS: [run], "/api/jobs/12": JOB | {"id": 12, "start_frame": 1, "stop_frame": 2}}
    assert look_up(task_of(running), photo(1)) == {"crack": 8}
    running.routes[META] = FRAMES | {"deleted_frames": [1]}
    assert look_up(task_of(running), photo(2)) == {"crack": 8}


# ---- CVAT down, slow, refusing ----


def drop(handler):
    handler.close_connection = True


def sleep(handler):
    handler.server.test_over.wait(30)
    reply(handler, 200, STARTED)


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    trickle_headers(handler, b" ")


def trickle_headers(handler, byte=b"H"):
    for _ in range(300):
        handler.wfile.write(byte)
        handler.wfile.flush()
        if handler.server.test_over.wait(0.1):
            return


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
    "nothing in braces": {},
    "an object": {"results": []},
    "other keys": [{"status": "started"}],
    "a text": ["started"],
}


@pytest.mark.parametrize("path", [RUNS, LABELS, META, frame_path(1)])
@pytest.mark.parametrize("name", ANSWERS)
def test_whatever_cvat_answers_costs_one_log_line_and_is_told(running, caplog, path, name):
    running.routes[path] = ANSWERS[name]
    found = setting(task_of(running), photo(1))
    assert steps_of(found) == {}
    no_picture = path == frame_path(1) and not callable(ANSWERS[name])
    assert found.notice.startswith("T=0/2 used: unknown photo" if no_picture else "T=0/2 used: CVAT ")
    (line,) = warnings(caplog)
    assert running.url in line and TOKEN not in line and found.notice in line


@pytest.mark.parametrize("path", [RUNS, frame_path(1)])
@pytest.mark.parametrize("name", SLOW)
def test_however_slowly_cvat_answers_it_is_not_waited_for(running, caplog, monkeypatch, path, name):
    monkeypatch.setattr(cvat_runs, "LIMIT_S", 0.5)
    running.routes[path] = SLOW[name]
    assert setting(task_of(running), photo(1)).notice.startswith("T=0/2 used: CVAT slow: ")
    (line,) = warnings(caplog)
    assert running.url in line and TOKEN not in line


def test_a_cvat_that_is_down_costs_one_log_line(caplog):
    task = CvatTask("http://127.0.0.1:9", TOKEN, "det-attrs", LOG)
    assert setting(task, photo(1)).notice.startswith("T=0/2 used: CVAT unreachable: ")
    assert len(warnings(caplog)) == 1 and "refused" in warnings(caplog)[0]
    assert look_up(CvatTask("http://cvat.invalid", TOKEN, "det-attrs", LOG), photo(1)) == {}


def test_the_token_goes_nowhere_else(running, caplog, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert look_up(task_of(running), photo(1)) == {"crack": 8}, "no proxy of the environment is asked"
    running.asked.clear()
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


# ---- never another T without a word ----


@pytest.fixture
def impatient(monkeypatch):
    """Asks again after 20 ms rather than 1 s."""
    monkeypatch.setattr(cvat_runs, "ASK_AGAIN_S", 0.02)


def fails_first(running, count: int, failure=status(503)) -> None:
    """The list of runs, but for the first so many questions."""
    runs = running.routes[RUNS]

    def answer(handler):
        reply(handler, 200, runs) if running.asked.count(RUNS) > count else failure(handler)

    running.routes[RUNS] = answer


def begins(running, task: CvatTask, progress=33) -> None:
    """The run on task 7 sends its second frame of ten, then CVAT's web server goes down."""
    running.routes[META] = FRAMES | {"size": 10, "stop_frame": 9}
    running.routes[RUNS] = [STARTED | {"progress": 10}]
    assert look_up(task, photo(1)) == {"crack": 8}
    running.asked.clear()


DOWN = {
    "502": status(502),
    "503": status(503),
    "504": status(504),
    "404 of its proxy": status(404),
    "dropped": drop,
    "page": lambda handler: reply(handler, 200, b"<html>CVAT</html>"),
    "braces": lambda handler: reply(handler, 200, {}),
}


@pytest.mark.parametrize("name", DOWN)
def test_a_cvat_that_restarts_is_asked_again(running, impatient, name):
    fails_first(running, 3, DOWN[name])
    found = setting(task_of(running), photo(1), seconds=100)
    assert (steps_of(found), found.notice) == ({"crack": 8}, "")
    assert running.asked.count(RUNS) == 4


@pytest.mark.parametrize("code", [401, 403])
def test_a_token_that_is_refused_is_not_tried_again(running, code):
    running.routes[RUNS] = status(code)
    found = setting(task_of(running), photo(1), seconds=100)
    assert running.asked == [RUNS]
    assert steps_of(found) == {} and found.notice.startswith(f"T=0/2 used: CVAT {code}: the function's token ")


def test_asking_again_ends_and_is_done_once_per_run(running, monkeypatch):
    monkeypatch.setattr(cvat_task, "PATIENCE_S", 1)
    monkeypatch.setattr(cvat_runs, "ASK_AGAIN_S", 0.2)
    running.routes[RUNS] = status(503)
    task = task_of(running)
    assert setting(task, photo(1), seconds=100).changes == {}
    asked = len(running.asked)
    assert 1 < asked <= 6
    assert setting(task, photo(2), seconds=100).changes == {}
    assert len(running.asked) == asked + 1


def test_asking_again_takes_a_quarter_of_the_time_that_is_left_at_the_most(running, impatient):
    running.routes[RUNS] = status(503)
    setting(task_of(running), photo(1), seconds=0.4)
    assert 1 <= len(running.asked) <= 6
    running.asked.clear()
    setting(task_of(running), photo(1), seconds=-1)
    assert len(running.asked) == 1


@pytest.mark.parametrize("failure", [401, 503])
def test_a_run_keeps_its_t_when_cvat_can_no_longer_be_asked(running, caplog, failure):
    task = task_of(running)
    begins(running, task)
    running.routes[RUNS] = status(failure)
    for number in range(2, 10):
        found = setting(task, photo(number))
        assert (steps_of(found), found.notice) == ({"crack": 8}, "")
    assert len(warnings(caplog)) == 8 and f"settings of the run so far used: CVAT {failure}" in warnings(caplog)[0]
    found = setting(task, photo(10))  # its frames were ten: this is another run
    assert steps_of(found) == {} and found.notice.startswith(f"T=0/2 used: CVAT {failure}")


def test_a_run_that_asks_for_nothing_else_goes_on_without_a_notice(running):
    task = task_of(running)
    running.routes |= {RUNS: [STARTED | {"progress": 0}], LABELS: labels_with(crack="0")}
    assert notices(task, [photo(0)]) == [""]
    running.routes[RUNS] = status(503)
    (*rest, another) = notices(task, [photo(1), photo(2), photo(3)])
    assert rest == ["", ""] and another


def paused(task):
    task.answered_s -= cvat_task.PAUSE_S + 1


@pytest.mark.parametrize("between", ["a pause", "a photo of another task", "no run", "a second run"])
def test_t_is_kept_only_for_the_run_that_was_under_way_alone(running, between):
    task = task_of(running)
    begins(running, task)
    if between == "a pause":
        paused(task)
    elif between == "a photo of another task":
        assert look_up(task, photo(99)) == {}
    elif between == "no run":
        running.routes[RUNS] = [FINISHED]
        assert look_up(task, photo(99)) == {}
    else:
        running.routes[RUNS] = [STARTED | {"progress": 20}, STARTED | {"id": "second", "progress": 20}]
        assert look_up(task, photo(2)) == {"crack": 8}
    running.routes[RUNS] = status(503)
    assert look_up(task, photo(3)) == {}


def test_a_photo_that_comes_again_is_of_another_run(running):
    task = task_of(running)
    begins(running, task)
    running.routes[RUNS] = status(503)
    assert look_up(task, photo(2)) == {"crack": 8}
    found = setting(task, photo(2))
    assert steps_of(found) == {} and found.notice


def test_each_run_has_one_notice_however_many_of_its_frames_fail(running):
    task = task_of(running)
    running.routes[RUNS] = status(401)
    frames = [photo(number) for number in range(3)]
    (first, *rest) = notices(task, frames)
    assert first.startswith("T=0/2 used: CVAT 401") and rest == ["", ""]
    assert notices(task, frames) == [first, "", ""]  # the same photos again
    paused(task)
    assert notices(task, [photo(5), photo(6)]) == [first, ""]  # another task's, later
    running.routes[RUNS] = [STARTED]
    assert notices(task, [photo(1)]) == [""]
    running.routes[RUNS] = status(401)
    assert notices(task, [photo(2), photo(7), photo(8)]) == ["", first, ""]  # the run's last frame, then another run's


def test_the_notice_of_a_photo_that_is_not_processed_comes_on_the_next(running):
    task = task_of(running)
    running.routes[RUNS] = status(401)
    now = time.monotonic()
    assert task.setting(b"1", photo(1), Defaults(DEFAULT), now, now).notice
    task.answered()
    assert notices(task, [photo(2), photo(3)])[0] and not notices(task, [photo(4)])[0]


@pytest.mark.parametrize("text", ["99", "51", "-1", "2.5", "", " 8", "viel", "٣", "x" * 5000, "Auto", None, 8])
def test_a_default_that_is_no_count_is_told_once_per_run_and_the_others_hold(running, caplog, text):
    running.routes |= {LABELS: labels_with(crack=text, spalling="8"), RUNS: [STARTED | {"progress": 0}]}
    task = task_of(running)
    first = setting(task, photo(0))
    assert steps_of(first) == {"spalling": 8}
    assert first.notice.startswith("T=0 used: bad T ") and "label crack of task 7" in first.notice
    assert "0 to 50" in first.notice and len(first.notice) < 300 and "instead of T" not in first.notice
    running.routes[RUNS] = [STARTED | {"progress": 33}]
    second = setting(task, photo(1))
    assert (steps_of(second), second.notice) == ({"spalling": 8}, "")
    running.routes[RUNS] = [STARTED | {"progress": 0, "id": "next"}]
    assert setting(task, photo(0)).notice == first.notice


def test_a_t_that_the_select_lacks_is_told_where_cvat_would_show_another(running):
    running.routes[LABELS] = labels_with(crack="viel")
    found = setting(task_of(running), photo(1), default={"crack": 4})
    assert found.notice.startswith("T=4 used: bad T 'viel'") and "shapes of crack show that default" in found.notice


def test_a_bad_default_on_a_task_is_not_told_on_other_photos(running):
    running.routes[LABELS] = labels_with(crack="viel")
    assert "bad T" not in setting(task_of(running), photo(9)).notice


def test_a_get_says_the_last_problem_and_when_it_was(running):
    task = task_of(running)
    assert task.describe() == {"url": running.url, "last_problem": None}
    running.routes[RUNS] = status(401)
    notices(task, [photo(0), photo(1)])
    problem = task.describe()["last_problem"]
    assert problem["reason"].startswith("T=0/2 used: CVAT 401") and problem["over"] is False
    times = [datetime.fromisoformat(problem[key]) for key in ("since", "until")]
    assert times[0] <= times[1] <= datetime.now(timezone.utc)
    running.routes[RUNS] = [STARTED]
    notices(task, [photo(1)])
    assert task.describe()["last_problem"] == problem | {"over": True}


# ---- the deployment ----


@pytest.mark.parametrize("changes, words", [
    ({"ADVCAM_CVAT_TOKEN": ""}, ["ADVCAM_CVAT_TOKEN is not set"]),
    ({"ADVCAM_CVAT_URL": " "}, ["ADVCAM_CVAT_URL is not set"]),
    ({"ADVCAM_CVAT_URL": "cvat:8080"}, ["ADVCAM_CVAT_URL", "cvat:8080", "http://"]),
    ({"ADVCAM_CVAT_URL": "file:///etc/passwd"}, ["ADVCAM_CVAT_URL", "http://"]),
    ({"ADVCAM_CVAT_URL": "http://cvat:8080:1"}, ["ADVCAM_CVAT_URL is 'http://cvat:8080:1', which is no address"]),
    ({"ADVCAM_CVAT_TOKEN": "sec ret"}, ["ADVCAM_CVAT_TOKEN", "blanks"]),
    ({"ADVCAM_CVAT_TOKEN": "sec\nret"}, ["ADVCAM_CVAT_TOKEN", "blanks"]),
    ({"NUCLIO_FUNCTION_NAME": ""}, ["NUCLIO_FUNCTION_NAME"]),
])  # fmt: skip
def test_a_wrong_deployment_does_not_start(changes, words):
    environ = {"ADVCAM_CVAT_URL": "http://cvat:8080", "ADVCAM_CVAT_TOKEN": TOKEN, "NUCLIO_FUNCTION_NAME": "f"}
    assert CvatTask.from_env(environ, LOG).cvat.function == "f"
    with pytest.raises(RequestError) as error:
        CvatTask.from_env(environ | changes, LOG)
    assert all(word in str(error.value) for word in words) and "ret" not in str(error.value)


def test_without_url_and_token_no_server_is_asked():
    assert CvatTask.from_env({"NUCLIO_FUNCTION_NAME": "f"}, LOG) is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def handled(running, weights, monkeypatch):
    """The Nuclio handler, which asks that server; answers to a frame with a spot as CVAT sends it."""
    file = encoded(dark_wall([(40, 30, 18)], 64, 96)[0])
    running.routes[frame_path(1)] = file
    environ = {"ADVCAM_CVAT_URL": running.url, "ADVCAM_CVAT_TOKEN": TOKEN, "NUCLIO_FUNCTION_NAME": "det-attrs"}
    environ |= {"ADVCAM_DEVICE": "cpu", "ADVCAM_WEIGHTS": str(weights), "ADVCAM_TIME_LIMIT": "80000"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cvat_task, "PATIENCE_S", 0)
    context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.INFO))
    main.init_context(context)

    def answer(method="POST", image=file, **given):
        body = {"image": base64.b64encode(image).decode(), **given}
        event = nuclio_sdk.Event(body=body, content_type="application/json", method=method)
        return json.loads(main.handler(context, event).body)

    return SimpleNamespace(answer=answer, cvat=running, model=context.user_data.model)


def values(answer: list[dict], attribute: str) -> set[str]:
    return {entry["value"] for element in answer for entry in element["attributes"] if entry["name"] == attribute}


def test_the_handler_uses_the_tasks_setting_and_the_requests_own_wins(handled):
    default = str(handled.model.weights.configs["crack"].iterations)
    asked_for = "1" if default != "1" else "2"
    handled.cvat.routes[LABELS] = labels_with(crack=asked_for)
    assert values(handled.answer(), "iterations") == {asked_for}
    asked = len(handled.cvat.asked)
    assert values(handled.answer(iterations=3), "iterations") == {"3"}
    assert len(handled.cvat.asked) == asked  # CVAT is not asked
    handled.cvat.routes[RUNS] = []
    assert values(handled.answer(), "iterations") == {default}


def test_the_handler_answers_masks_for_labels_of_type_mask_and_names_and_logs_them_so(handled, tmp_path):
    handled.model.proposal_log = ProposalLog(tmp_path, LOG)
    handled.cvat.routes[LABELS] = labels_with(masks=["crack"])
    polygons, masks = handled.answer(iterations=2), handled.answer()
    assert {shape["type"] for shape in polygons} == {"polygon"} and {shape["type"] for shape in masks} == {"mask"}
    assert masks == handled.answer(shape="mask", iterations=2), "down to the proposals' names"
    assert handled.answer(shape="polygon") == polygons, "the request's shape decides"
    logged = [record["settings"]["crack"]["shape"] for record in read_proposal_log(tmp_path)]
    assert logged == ["polygon", "mask", "mask", "polygon"]
    handled.cvat.routes[RUNS] = []
    assert handled.answer() == polygons, "no task can be read"


def test_auto_on_a_label_of_an_earlier_version_is_the_weights_own_t(handled):
    handled.model.settings = replace(handled.model.settings, iterations=1)
    handled.cvat.routes[LABELS] = labels_with(crack="auto")
    assert values(handled.answer(), "iterations") == {str(handled.model.weights.configs["crack"].iterations)} == {"2"}
    handled.cvat.routes[RUNS] = []
    assert values(handled.answer(), "iterations") == {"1"}


def test_a_refused_token_is_told_by_a_tag_beside_the_proposals_and_by_get(handled, tmp_path):
    spec = json.loads(yaml.safe_load((ROOT / "function.yaml").read_text())["metadata"]["annotations"]["spec"])
    handled.model.proposal_log = ProposalLog(tmp_path, LOG)
    default = handled.model.weights.configs["crack"].iterations
    handled.cvat.routes[RUNS] = status(401)
    assert [tag["label"] for tag in handled.answer(image=b"no photo")] == ["unprocessed"]
    *shapes, tag = handled.answer()
    assert shapes and values(shapes, "iterations") == {str(default)} and {shape["label"] for shape in shapes} == {"crack"}
    (reason,) = tag.pop("attributes")
    assert tag == {"label": "notice", "type": "tag"} and reason["value"].startswith(f"T={default} used: CVAT 401")
    assert {"name": "notice", "type": "tag"}.items() <= spec[-1].items()
    assert [entry["name"] for entry in spec[-1]["attributes"]] == [reason["name"]]
    other = encoded(np.full((32, 32, 3), 150, np.uint8))
    assert handled.answer(image=other) == []  # one notice for a run
    assert handled.answer("GET")["cvat"]["last_problem"]["reason"] == reason["value"]
    first, second = read_proposal_log(tmp_path)
    assert first["shapes"] == shapes and second["shapes"] == [], "proposals alone"
