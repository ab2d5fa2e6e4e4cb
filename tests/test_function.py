"""The function over real HTTP, with what CVAT sends and what it never would; its weights are tiny and see dark spots."""

import base64
import gc
import io
import json
import logging
import os
import re
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import nuclio_sdk
import numpy as np
import pytest
import yaml
from PIL import Image

from defectcam import function, predict, pyramid
from defectcam.deadline import Deadline, Progress, TimeLimitError
from defectcam.feedback.shown import proposals_of_record
from defectcam.handler import ModelHandler, out_of_memory
from defectcam.throughput import SAMPLE_PX
from defectcam.proposal_log import ProposalLog, read_proposal_log
from defectcam.proposals import Component, Proposal
from defectcam.request import Request, parse_request
from defectcam.settings import RequestError, Settings
from defectcam.tiling import tile_grid
from tests.conftest import ROOT, dark_wall, dark_weights, late_tiles, running_function

LOG = logging.getLogger("test")
SPOTS = [(40, 40, 18), (100, 60, 12)]


def encoded(image_rgb: np.ndarray, kind: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def sound(height: int, width: int) -> np.ndarray:
    """A wall without a defect, (height, width, 3) uint8."""
    return np.full((height, width, 3), 150, np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return dark_weights(tmp_path_factory.mktemp("weights"), iterations=1)


@pytest.fixture(scope="module")
def spotted_rgb() -> np.ndarray:
    """(96, 128, 3) uint8: a wall with two spots."""
    return dark_wall(SPOTS, 96, 128)[0]


@pytest.fixture
def handler_of(weights):
    """Function (arguments of ModelHandler) -> a handler with these weights on the CPU."""

    def make(settings: Settings = Settings(), time_limit_s: float = 80_000, **more) -> ModelHandler:
        return ModelHandler(weights, "cpu", settings, LOG, time_limit_s=time_limit_s, **more)

    return make


@pytest.fixture
def model(handler_of) -> ModelHandler:
    return handler_of()


@pytest.fixture(scope="module")
def url(weights):
    """A running server of the real function."""
    with running_function(ADVCAM_WEIGHTS=str(weights), ADVCAM_DEVICE="cpu", ADVCAM_TIME_LIMIT="80000") as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def spec():
    """Labels of function.yaml: name -> (type, {attribute: (input type, values)})."""
    labels = json.loads(yaml.safe_load((ROOT / "function.yaml").read_text())["metadata"]["annotations"]["spec"])
    return {
        label["name"]: (label["type"], {a["name"]: (a["input_type"], a["values"]) for a in label["attributes"]})
        for label in labels
    }


def check_answer(answer: object, spec: dict, width: int, height: int) -> None:
    """What CVAT stores without harm, by every rule it is known to have."""
    assert isinstance(answer, list)
    for shape in answer:
        label_type, attributes = spec[shape["label"]]
        for attribute in shape["attributes"]:
            assert isinstance(attribute["value"], str)
            input_type, values = attributes[attribute["name"]]
            if input_type == "number":
                assert attribute["value"].isdecimal() and 0 <= int(attribute["value"]) <= 100
            if input_type == "select":
                assert attribute["value"] in values
        if shape["type"] == "tag":
            assert shape["label"] in ("unprocessed", "notice") and label_type == "tag"
            continue
        assert {a["name"] for a in shape["attributes"]} == {"confidence", "iterations", "proposal"}
        xs, ys = shape["points"][::2], shape["points"][1::2]
        assert len(xs) == len(ys) >= 3 and len(set(zip(xs, ys))) >= 3
        assert all(0 <= x <= width for x in xs) and all(0 <= y <= height for y in ys)
        if shape["type"] == "mask":
            *flat, left, top, right, bottom = shape["mask"]
            assert len(flat) == (right - left + 1) * (bottom - top + 1) and set(flat) <= {0, 1} and any(flat)
            assert 0 <= left <= right < width and 0 <= top <= bottom < height
        else:
            assert shape["type"] == "polygon"


def reason_of(tag: dict) -> str:
    return tag["attributes"][0]["value"]


def request_of(image_rgb: np.ndarray, **settings) -> Request:
    return Request(base64.b64decode(encoded(image_rgb)), Settings(**settings), ())


# ---- what a request gets ----


@pytest.mark.parametrize("path", ["", "anything/else"])
def test_get_tells_what_runs_here(client, weights, path):
    answer = client.get(path).json()
    assert answer["defects"] == ["crack"] and answer["device"] == "cpu" and answer["version"]
    assert answer["weights"] == json.loads((weights / "manifest.json").read_text())["version"]
    assert answer["defaults"]["crack"] == {
        "iterations": 1, "threshold": 0.5, "cam_threshold": 0.5, "shape": "polygon", "tolerance_px": 1.0,
        "hole_share": 0.02, "max_proposals": 200,
    }  # fmt: skip
    assert answer["limits"] == {
        "max_megapixels": 64, "time_limit_s": 80_000, "iterations": [0, 50], "threshold": [0, 1], "cam_threshold": [0, 1],
        "max_proposals": [1, 10_000], "shape": ["polygon", "mask"], "tolerance_px": [0, 20], "hole_share": [0, 1],
    }  # fmt: skip
    assert answer["terms"] == {"overall": "unknown", "defects": {"crack": "unknown"}}


def test_a_head_request_is_answered_as_get_without_the_body(client):
    asked, head = client.get(""), client.head("")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == asked.headers["content-length"]


def test_a_detector_request_as_cvat_sends_it(client, spec, spotted_rgb):
    body = {"image": encoded(spotted_rgb, "JPEG", quality=95)}
    answers = [client.post("", json=body) for _ in range(2)]
    assert all(answer.status_code == 200 for answer in answers)
    assert answers[0].content == answers[1].content  # the same answer for the same input
    assert answers[0].headers["content-type"] == "application/json"
    check_answer(answers[0].json(), spec, 128, 96)
    assert [shape["label"] for shape in answers[0].json()] == ["crack", "crack"]


def test_iterations_shape_and_defects_of_the_request_hold(client, spec, spotted_rgb):
    body = {"image": encoded(spotted_rgb), "iterations": 2, "shape": "mask", "defects": ["crack"]}
    answer = client.post("", json=body).json()
    check_answer(answer, spec, 128, 96)
    assert answer and {shape["type"] for shape in answer} == {"mask"}
    for shape in answer:
        assert {"name": "iterations", "value": "2"} in shape["attributes"]


def test_proposals_beyond_the_most_that_are_wanted_are_counted_in_a_notice(client, spec, spotted_rgb):
    both = client.post("", json={"image": encoded(spotted_rgb)}).json()
    first, notice = client.post("", json={"image": encoded(spotted_rgb), "max_proposals": 1}).json()
    check_answer([first, notice], spec, 128, 96)
    assert first["points"] == both[0]["points"], "the surest and largest"
    assert (notice["label"], reason_of(notice)) == ("notice", "1 more crack; raise threshold or max_proposals")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "text/plain", None], ids=str
)
def test_any_content_type_will_do(client, content_type):
    headers = {"content-type": content_type} if content_type else {}
    body = json.dumps({"image": encoded(sound(40, 50)), "iterations": 0}).encode()
    answer = client.post("", content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (200, [])


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", ["body", "JSON"]),
        (b"{", ["body", "JSON"]),
        (b"[1]", ["body", "JSON"]),
        (b"\xff\xfe", ["body", "JSON"]),
        (b"{}", ["image", "missing"]),
        (b'{"image": "no base64!"}', ["image", "'!' at position 8", "base64"]),
        (b'{"image": "aGk=", "iterations": "abc"}', ["iterations", "abc", "0 to 50"]),
        (b'{"image": "aGk=", "iterations": 51}', ["iterations", "51", "0 to 50"]),
        (b'{"image": "aGk=", "iterations": -1}', ["iterations", "-1"]),
        (b'{"image": "aGk=", "iterations": 2.5}', ["iterations", "2.5"]),
        (b'{"image": "aGk=", "iterations": true}', ["iterations", "True"]),
        (b'{"image": "aGk=", "iterations": "auto"}', ['iterations is "auto", which was removed', "number of steps"]),
        (b'{"image": "aGk=", "snap": false}', ["snap", "removed", "cam_threshold", "leave it out"]),
        (b'{"image": "aGk=", "threshold": 1.5}', ["threshold", "1.5", "0 to 1"]),
        (b'{"image": "aGk=", "threshold": NaN}', ["threshold", "nan"]),
        (b'{"image": "aGk=", "max_proposals": 0}', ["max_proposals", "0", "1 to 10000"]),
        (b'{"image": "aGk=", "defects": ["graffiti"]}', ["defects", "graffiti", "crack"]),
        (b'{"image": "aGk=", "shape": "circle"}', ["shape", "circle", "polygon"]),
        (b'{"image": "data:image/png,abc"}', ["data:image/png,", "data:image/TYPE;base64,"]),
        (b'{"image": "a-_k"}', ["image", "'-' at position 1", "URL-safe"]),
        (b'{"image": "aGk=", "a": [' + b"[]," * 30_000 + b"0]}", ["body", "more than 65536 are beside the image"]),
        (b"[" * 100_000, ["body"]),
    ],
)
def test_impossible_envelopes_get_400_that_names_key_value_and_remedy(client, body, words):
    for content_type in ("application/json", "text/plain"):
        answer = client.post("", content=body, headers={"content-type": content_type})
        assert answer.status_code == 400
        for word in words:
            assert word in answer.json()["error"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused_with_those_that_are_allowed(client, method):
    answer = client.request(method, "", content=json.dumps({"image": encoded(sound(8, 8))}))
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert answer.json() == {"error": f"method is {method}, but must be GET or POST"}


def test_photos_that_cannot_be_processed_get_a_tag_with_the_reason(client, spec):
    good = base64.b64decode(encoded(sound(64, 64)))
    for data, word in [(b"hello", "unknown format"), (good[: len(good) // 2], "broken"), (bomb(), "too large")]:
        answer = client.post("", json={"image": base64.b64encode(data).decode()})
        assert answer.status_code == 200
        (tag,) = answer.json()
        check_answer([tag], spec, 64, 64)
        assert tag["type"] == "tag" and word in reason_of(tag)


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60000 x 60000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("height, width", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_tiny_photos_are_answered(client, spec, height, width):
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    answer = client.post("", json={"image": encoded(image), "iterations": 2, "cam_threshold": 0, "threshold": 0.001})
    assert answer.status_code == 200
    check_answer(answer.json(), spec, width, height)


def test_ten_at_once_wait_for_their_turn(url, spotted_rgb):
    bodies = [{"image": encoded(np.ascontiguousarray(spotted_rgb[:64, i : i + 64])), "iterations": 0} for i in range(10)]
    with httpx.Client(base_url=url, timeout=300) as client:
        alone = [client.post("", json=body).json() for body in bodies]
    assert all(alone)
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda body: httpx.post(url, json=body, timeout=300), bodies))
    assert [answer.status_code for answer in together] == [200] * 10
    assert [answer.json() for answer in together] == alone


def test_many_requests_leave_no_memory_behind(client):
    small = encoded(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
    bodies = [{"image": small, "iterations": 1}, {"image": small[:400]}, {"image": 5}]

    def resident_mb() -> float:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6

    def send(count):
        for number in range(count):
            client.post("", json=bodies[number % 3])

    send(30)
    before = resident_mb()
    send(120)
    assert resident_mb() - before < 60


def test_an_unforeseen_error_costs_the_frame_not_the_run(client, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("defectcam.handler.proposals_for", fail)
    body = {"image": encoded(sound(8, 8))}
    answer = client.post("", json=body)
    assert answer.status_code == 200
    assert answer.json()[0]["label"] == "unprocessed"
    monkeypatch.undo()
    assert client.post("", json=body).json() == []


# ---- memory ----


def test_out_of_memory_halves_the_batch_and_then_gives_up_on_the_photo_alone(model, monkeypatch):
    monkeypatch.setattr(pyramid, "tile_grid", partial(tile_grid, largest_px=256))  # eight tiles, two and one
    batches, engine = [], model.predictor.engines["crack"]

    def short_of_memory(images):
        batches.append(len(images))
        if len(images) > limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")
        return np.full((len(images), *images.shape[2:]), -9, np.float32)

    monkeypatch.setattr(engine, "score", short_of_memory)
    model.predictor.batch, limit = 8, 2
    request = request_of(sound(256, 512))
    assert model.answer(request) == []
    assert batches == [8, 4, 2, 2, 2, 2, 2, 1] and model.predictor.batch == 2
    limit = 0
    (tag,) = model.answer(request)
    assert tag["label"] == "unprocessed" and reason_of(tag).startswith("out of memory")
    limit = 2
    assert model.answer(request) == []  # the worker lives on


@pytest.mark.parametrize("words", ["can't alloc", "Failed to allocate 387957120 bytes of memory", "std::bad_alloc"])
def test_openvino_s_words_for_it_are_known(words):
    assert out_of_memory(RuntimeError(f"Exception from src/inference/src/dev/plugin.cpp:54:\n{words}\n"))


def test_a_thread_that_finds_no_memory_for_its_stack_is_out_of_memory():
    assert out_of_memory(RuntimeError("can't start new thread")) and not out_of_memory(RuntimeError("a bug"))


@pytest.mark.parametrize("place", ["parse_request", "json.dumps"])
def test_memory_that_ends_while_json_is_read_or_written_costs_the_photo_alone(client, spec, monkeypatch, place):
    real = {"parse_request": parse_request, "json.dumps": json.dumps}[place]
    calls = []

    def short_of_memory(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return real(*arguments, **named)

    body = json.dumps({"image": encoded(sound(8, 8))}).encode()
    monkeypatch.setattr(f"defectcam.function.{place}", short_of_memory)
    answer = client.post("", content=body)
    assert answer.status_code == 200
    check_answer(answer.json(), spec, 8, 8)
    assert reason_of(answer.json()[0]).startswith("out of memory")
    assert client.post("", content=body).json() == []  # the worker lives on


# ---- time ----


def test_waiting_in_the_queue_counts_as_time(weights):
    """One request holds the worker for longer than the time limit; the next one is told so and costs nothing."""
    held, body = threading.Event(), {"image": encoded(sound(8, 8)), "iterations": 0}

    def handler(context, event):
        if event.path == "/hold":
            held.set()
            time.sleep(4)
        return function.handler(context, event)

    environ = {"ADVCAM_WEIGHTS": str(weights), "ADVCAM_TIME_LIMIT": "3"}
    with running_function(handler, **environ) as url, ThreadPoolExecutor(1) as pool:
        holder = pool.submit(httpx.get, url + "hold", timeout=60)
        assert held.wait(30)
        (tag,) = httpx.post(url, json=body, timeout=60).json()
        assert re.match(r"busy: \d+ of 3 s went by .* fewer photos at once.* workers", reason_of(tag))
        assert holder.result().status_code == 200
        assert httpx.post(url, json=body, timeout=60).json() == []


def test_what_waiting_left_too_little_time_for_is_said_to_be_busy(handler_of):
    model = handler_of(time_limit_s=100)
    assert model.reason(TimeLimitError(60), waited_s=70).startswith("busy: 70 of 100 s ")
    assert model.reason(TimeLimitError(60), waited_s=10).startswith("too slow 150>100 s; ")
    assert model.reason(TimeLimitError(), waited_s=70).startswith("busy")
    assert model.reason(TimeLimitError(), waited_s=10).startswith("too slow >100 s; ")
    assert model.reason(TimeLimitError(0.5), waited_s=1).startswith("too slow 100>100 s; ")  # 99 s were work
    assert model.reason(TimeLimitError(9), waited_s=40).startswith("too slow 69>100 s; ")
    assert "; about 20 clicks would fit; " in model.reason(TimeLimitError(400, "about 20 clicks"))


def test_reasons_say_what_matters_in_what_cvat_shows_of_them_and_name_nothing_that_an_older_cvat_lacks(handler_of):
    model = handler_of(time_limit_s=100)
    good = base64.b64decode(encoded(sound(64, 64)))
    shown = {
        "too large 3600>64 MP": bomb(),
        "unknown format: JPEG": b"hello",
        "broken image: ": good[: len(good) // 2],
        "broken image: its he": good[:8],
        "too slow 181>100 s; ": TimeLimitError(80.2),
        "too slow >100 s; use": TimeLimitError(),
        "out of memory; use a": MemoryError(),
    }
    for words, cause in shown.items():
        reason = reason_of(model.answer(Request(cause, Settings(), ()))[0]) if isinstance(cause, bytes) else model.reason(cause)
        assert reason[:20].startswith(words), reason
    assert model.reason(TimeLimitError(), waited_s=70)[:20].startswith("busy: 70 of 100 s")
    programs = [*ROOT.glob("*.py"), *(ROOT / "defectcam").rglob("*.py")]
    assert len(programs) > 30
    for path in programs:
        assert "region of interest" not in path.read_text(), f"{path}: CVAT 2.15 has none"


def test_the_time_since_arrival_is_0_where_it_cannot_be_told():
    now = datetime.now(timezone.utc)
    ago = now - timedelta(seconds=20)
    assert function.waited_s(ago) == pytest.approx(20, abs=5)
    assert function.waited_s(ago.replace(tzinfo=None)) == pytest.approx(20, abs=5)  # as nuclio_sdk gives it
    for arrival in (None, 0, "now", now + timedelta(hours=1), now - timedelta(days=1), datetime.fromtimestamp(0)):
        assert function.waited_s(arrival) == 0


def answer_and_pixels(model, image_rgb, **settings):
    """A photo's answer, and how many pixels the network saw for it."""
    seen = []
    encoder = model.predictor.engines["crack"].network.encoder
    hook = encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 0].numel()))
    try:
        answer = model.answer(request_of(image_rgb, **settings))
    finally:
        hook.remove()
    return answer, sum(seen)


@pytest.fixture
def slow_model(handler_of, monkeypatch):
    """Function (seconds per pixel) -> a handler on a machine that takes so long and is given 6000 s."""

    def slowed(seconds_per_px: float) -> ModelHandler:
        model = handler_of(time_limit_s=6000)
        monkeypatch.setattr(model.predictor.throughput, "measure", lambda defect: None)
        monkeypatch.setattr(model.predictor.throughput, "learn", lambda *_: None)
        model.predictor.throughput.fastest = {"crack": seconds_per_px}
        return model

    return slowed


def test_a_photo_that_takes_too_long_is_refused_before_it_is_decoded(slow_model, monkeypatch):
    model = slow_model(1e-3)
    with monkeypatch.context() as patches:
        patches.setattr("defectcam.handler.decode_image", lambda *_: pytest.fail("decoded"))
        (tag,), seen_px = answer_and_pixels(model, sound(3000, 3000), iterations=0)
    assert re.match(r"too slow \d+>6000 s; about [23] megapixels would fit; use a GPU", reason_of(tag))
    assert seen_px == 0
    assert answer_and_pixels(model, sound(16, 16), iterations=0) == ([], 80**2), "with what is repeated around it"


def test_the_pace_is_measured_anew_before_a_photo_is_refused(handler_of):
    """It was first measured at a moment when other programs kept the machine busy."""
    model = handler_of()
    model.predictor.throughput.fastest["crack"] = 1e3
    assert answer_and_pixels(model, sound(16, 16), iterations=0) == ([], 2 * SAMPLE_PX**2 + 80**2)
    assert model.predictor.throughput.fastest["crack"] < 1


PLACE_SEEN_PX = 160**2  # a place of 96 px and what is repeated around it


@pytest.fixture
def small_places(monkeypatch):
    monkeypatch.setattr(predict, "PLACE_PX", 96)


def test_a_photo_whose_climb_would_be_late_is_refused_after_a_look_at_a_few_places(slow_model, small_places):
    photo = np.tile(dark_wall([(24, 24, 14), (72, 72, 14)], 96, 96)[0], (6, 6, 1))
    (tag,), seen_px = answer_and_pixels(slow_model(1e-3), photo, iterations=50)
    assert re.match(r"too slow \d+>6000 s; iterations 3 would fit; ", reason_of(tag))
    assert seen_px == predict.PLACES**2 * PLACE_SEEN_PX, "no map of the photo"
    shapes, _ = answer_and_pixels(slow_model(1e-3), photo, iterations=3)
    assert {shape["label"] for shape in shapes} == {"crack"}


def test_what_the_enlarged_level_will_take_counts_before_it_is_read(slow_model, small_places, monkeypatch):
    photo = np.tile(dark_wall([(24, 24, 14), (72, 72, 14)], 96, 96)[0], (6, 6, 1))
    model = slow_model(5e-3)  # 4500 s for the plain map
    assert answer_and_pixels(model, photo, iterations=0)[0][0]["label"] == "crack"
    (config,) = model.weights.configs.values()
    monkeypatch.setitem(model.weights.configs, "crack", replace(config, finest_scale=2.0))
    monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", 0.0)
    (tag,), seen_px = answer_and_pixels(model, photo, iterations=0)
    assert re.match(r"too slow \d+>6000 s; about \d megapixels would fit|too slow \d+>6000 s; use", reason_of(tag))
    assert seen_px == predict.PLACES**2 * PLACE_SEEN_PX, "and not the enlarged level"
    assert answer_and_pixels(model, sound(576, 576), iterations=0)[0] == [], "there it is not asked for"


def test_a_photo_on_which_nothing_will_climb_is_not_refused_for_it(slow_model, small_places):
    model, photo = slow_model(1e-3), sound(300, 300)
    answer, seen_px = answer_and_pixels(model, photo, iterations=50)
    looked_at = predict.PLACES**2 * PLACE_SEEN_PX
    assert answer == [] and seen_px == looked_at + model.predictor.plain_pixels(300, 300, "crack")


def test_nothing_is_looked_at_where_there_is_time_for_everything(slow_model, spotted_rgb, monkeypatch):
    model = slow_model(1e-9)
    monkeypatch.setattr(model.predictor, "_shares", lambda *_: pytest.fail("looked at"))
    assert len(model.answer(request_of(spotted_rgb))) == 2


def test_a_deadline_that_passes_is_said_too(handler_of, spotted_rgb):
    model = handler_of(time_limit_s=1e-6)
    model.predictor.throughput.fastest.clear()  # as on a GPU before its first photo
    answer, _ = answer_and_pixels(model, spotted_rgb, iterations=0)
    assert reason_of(answer[0]).startswith("too slow >1e-06 s")


def test_work_that_turns_out_to_be_late_is_refused_while_it_is_done(monkeypatch):
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("defectcam.deadline.time", clock)
    deadline = Progress(Deadline(100), total_px=1000, amount=25, unit="megapixels")
    clock.now += 4
    deadline.done(10)  # the first pass is slow: nothing is told from it
    clock.now += 16
    deadline.done(390)  # 20 s for two fifths
    clock.now += 40
    with pytest.raises(TimeLimitError) as told:
        deadline.done(100)  # 60 s for a half: 20 s late
    assert told.value.overrun_s == pytest.approx(20) and told.value.fitting == "about 16 megapixels"
    done = Progress(Deadline(1), total_px=10, amount=1, unit="megapixels")
    clock.now += 50
    done.done(10)  # there is the result, late or not
    with pytest.raises(TimeLimitError):
        done.check()


def test_a_photo_that_turns_out_to_be_late_is_refused_while_it_is_done(slow_model, monkeypatch):
    """What was measured says a second; then a tile takes 3000 s, by the clock."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    for module in ("defectcam.deadline.time", "defectcam.handler.time"):
        monkeypatch.setattr(module, clock)
    monkeypatch.setattr(pyramid, "tile_grid", partial(tile_grid, largest_px=256))
    model = slow_model(1e-6)
    done = late_tiles(monkeypatch, model.predictor.engines["crack"], clock, 3000)
    (tag,) = model.answer(request_of(sound(128, 256), iterations=0))
    assert re.match(r"too slow \d+>6000 s; ", reason_of(tag)) and len(done) == 1, "of two tiles"


# ---- what is answered, and what cannot be ----


def answered(model, monkeypatch, found: list[Proposal], **settings) -> tuple[list[float], list[str]]:
    """Confidences (0..100) of the proposals answered where these are found, and the reasons of the notices."""
    monkeypatch.setattr(model, "_found", lambda image, how, deadline: {defect: found for defect in how})
    monkeypatch.setattr(model.predictor, "check_all", lambda *_: None)
    answer = model.propose(np.zeros((6400, 6400, 3), np.uint8), Settings(**settings))
    shapes = [element for element in answer if element["type"] != "tag"]
    notices = answer[len(shapes) :]
    assert {element["label"] for element in notices} <= {"notice"}
    return [int(reason_of(element)) for element in shapes], [reason_of(notice) for notice in notices]


def comb(size: int) -> Component:
    """(size, size): its outline is about size * size px long."""
    mask = np.zeros((size, size), bool)
    mask[::2] = mask[:, 0] = True
    return Component(mask, 0, 0)


def square(side: int) -> Component:
    return Component(np.ones((side, side), bool), 0, 0)


def test_a_ragged_outline_costs_itself_and_not_the_photo(model, monkeypatch):
    found = [Proposal(square(20), 0.8), Proposal(comb(1400), 0.9), Proposal(square(30), 0.7)]
    confidences, notices = answered(model, monkeypatch, found)
    assert confidences == [80, 70] and notices == ["1 too ragged: crack; raise cam_threshold"]
    assert answered(model, monkeypatch, found[1:2], shape="mask") == ([], notices)
    # What is too ragged does not count among the most that are wanted, and both are told.
    confidences, (notice,) = answered(model, monkeypatch, found, max_proposals=1)
    assert confidences == [80]
    assert notice == "1 too ragged: crack; raise cam_threshold. 1 more crack; raise threshold or max_proposals"


def test_of_masks_that_are_too_large_together_the_most_confident_are_answered(model, monkeypatch):
    sides = [(3000, 0.7), (4000, 0.5), (100, 0.1), (4000, 0.9)]
    found = [Proposal(square(side), confidence) for side, confidence in sides]
    confidences, notices = answered(model, monkeypatch, found, shape="mask")
    assert confidences == [70, 10, 90], "in their order, and what is small enough for the room left"
    assert notices == ["1 masks too large: use shape polygon"]
    assert answered(model, monkeypatch, [Proposal(square(6000), 0.9)], shape="mask") == ([], notices)
    assert answered(model, monkeypatch, found, shape="polygon") == ([70, 50, 10, 90], [])


def test_what_was_left_out_reaches_the_log_and_is_no_proposal_there(handler_of, monkeypatch, tmp_path):
    model = handler_of(proposal_log=ProposalLog(tmp_path, LOG))
    found = [Proposal(square(20), 0.8), Proposal(comb(1400), 0.9)]
    monkeypatch.setattr(model, "_found", lambda *_: {"crack": found})
    monkeypatch.setattr(model.predictor, "check_all", lambda *_: None)
    answer = model.answer(request_of(sound(1400, 1400)))
    assert [element["label"] for element in answer] == ["crack", "notice"]
    (record,) = read_proposal_log(tmp_path)
    assert record["shapes"] == answer
    assert [one.name for one in proposals_of_record(record)] == [answer[0]["attributes"][2]["value"]]


# ---- the deployment ----


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"ADVCAM_ITERATIONS": "many"}, ["ADVCAM_ITERATIONS", "many", "0 to 50"]),
        ({"ADVCAM_ITERATIONS": "auto"}, ['ADVCAM_ITERATIONS is "auto", which was removed', "number of steps"]),
        ({"ADVCAM_SNAP": "false"}, ["ADVCAM_SNAP was removed", "cam_threshold", "unset it"]),
        ({"ADVCAM_IDLE_SECONDS": "300"}, ["ADVCAM_IDLE_SECONDS was removed", "stay on the GPU", "unset it"]),
        ({"ADVCAM_MAX_PROPOSALS": "0"}, ["ADVCAM_MAX_PROPOSALS", "0", "1 to 10000"]),
        ({"ADVCAM_DEVICE": "tpu"}, ["ADVCAM_DEVICE", "tpu", "cpu"]),
        ({"ADVCAM_ENGINE": "onnx"}, ["ADVCAM_ENGINE", "onnx", '"torch" or "openvino"']),
        ({"ADVCAM_ENGINE": "openvino"}, ["no graph of 'crack'", "defectcam export", "ADVCAM_ENGINE=torch"]),
        ({"ADVCAM_MAX_MEGAPIXELS": "-1"}, ["ADVCAM_MAX_MEGAPIXELS", "-1", "178"]),
        ({"ADVCAM_TIME_LIMIT": "soon"}, ["ADVCAM_TIME_LIMIT", "soon"]),
        ({"ADVCAM_CVAT_URL": "http://cvat"}, ["ADVCAM_CVAT_TOKEN is not set"]),
        ({"ADVCAM_WEIGHTS": "/nowhere"}, ["/nowhere", "manifest.json"]),
        ({"ADVCAM_DEFECTS": "crack,moss"}, ["ADVCAM_DEFECTS", "moss", "crack"]),
        ({"ADVCAM_SNAP": "false"}, ["ADVCAM_SNAP was removed", "cam_threshold", "unset it"]),
    ],
)
def test_a_wrong_deployment_does_not_start(weights, environ, words):
    with pytest.raises(Exception) as error:
        ModelHandler.from_env({"ADVCAM_WEIGHTS": str(weights)} | environ, LOG)
    for word in words:
        assert word in str(error.value)


def test_weights_of_an_earlier_version_are_refused_with_what_to_do(weights, tmp_path):
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["defects"]["crack"] = {"file": "crack.safetensors", "window_px": 64, "cam_max": [1.0, 1.5], "gate": 0.1}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    words = "'crack': these weights were made for an earlier version .* two networks; take the weights folder that came with"
    with pytest.raises(RuntimeError, match=words):
        ModelHandler.from_env({"ADVCAM_WEIGHTS": str(tmp_path)}, LOG)


def test_settings_come_from_request_then_env_then_manifest(weights, caplog):
    environ = {"ADVCAM_WEIGHTS": str(weights), "ADVCAM_ITERATIONS": "7", "ADVCAM_DEVICE": "cpu", "ADVCAM_ITERATION": "4"}
    model = ModelHandler.from_env(environ, LOG)
    assert "ADVCAM_ITERATION is no setting and has no effect: did you mean ADVCAM_ITERATIONS?" in caplog.text
    config = model.weights.configs["crack"]
    assert model.describe()["defaults"]["crack"]["iterations"] == 7
    assert model.effective("crack", Settings(iterations=3))["iterations"] == 3
    assert model.effective("crack", Settings())["iterations"] == config.iterations == 1
    assert model.effective("crack", Settings())["cam_threshold"] == config.cam_threshold


def test_runtime_half_imports_nothing_of_the_offline_half():
    code = "import main, sys; print([n for n in sys.modules if n.startswith('defectcam.') and n.count('.') > 1])"
    code += "; print([n for n in ('tqdm.auto', 'defectcam.training', 'defectcam.evaluation') if n in sys.modules])"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=ROOT)
    first, second = out.stdout.split("\n")[:2]
    assert first == "[]" and "defectcam" not in second, out.stderr


WITHOUT_PYTORCH = """
import base64, importlib.util, json, logging, sys

MISSING = ("torch", "torchvision", "segmentation_models_pytorch", "timm", "safetensors", "scipy", "starlette", "uvicorn")


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}")


find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in MISSING else find(name, *more)
sys.meta_path.insert(0, Missing())
import nuclio_sdk
import main

context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.ERROR))
main.init_context(context)
body = {"image": base64.b64encode(open("docs/sample.jpg", "rb").read()).decode(), "iterations": 1, "threshold": 0}
for event in (nuclio_sdk.Event(method="GET"), nuclio_sdk.Event(method="POST", body=body)):
    answer = main.handler(context, event)
    print(answer.status_code, answer.body)
"""


def test_weights_with_a_graph_need_no_pytorch(exported_weights):
    """As in the CPU's image, which holds `runtime-cpu` and no more."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ADVCAM_")}
    environ |= {"PYTHONPATH": str(ROOT), "ADVCAM_WEIGHTS": str(exported_weights), "ADVCAM_TIME_LIMIT": "80000"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYTORCH], capture_output=True, text=True, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (said_status, said), (status, answer) = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert (said_status, status) == ("200", "200")
    assert (json.loads(said)["device"], json.loads(said)["engines"]) == ("cpu", {"crack": "openvino"})
    shapes = [shape for shape in json.loads(answer) if shape["type"] == "polygon"]
    assert shapes and all(shape["label"] == "crack" and len(shape["points"]) >= 6 for shape in shapes)


def test_every_answer_is_logged_where_a_folder_is_named(weights, tmp_path, spotted_rgb):
    environ = {"ADVCAM_LOG_DIR": str(tmp_path / "log"), "ADVCAM_WEIGHTS": str(weights), "ADVCAM_ITERATIONS": "0"}
    model = ModelHandler.from_env(environ, LOG)
    body = {"image": encoded(spotted_rgb), "threshold": 0.05}
    answer = model.answer(parse_request(body, model.settings, model.defects))
    (path,) = (tmp_path / "log").iterdir()
    (line,) = map(json.loads, path.read_text().splitlines())
    assert answer and line["shapes"] == answer and (line["width"], line["height"]) == (128, 96)
    assert line["weights"] == model.weights.version
    assert line["settings"]["crack"]["threshold"] == 0.05 and line["settings"]["crack"]["iterations"] == 0


def test_a_log_that_fails_never_costs_the_answer(handler_of, tmp_path, monkeypatch, caplog):
    model = handler_of(proposal_log=ProposalLog(tmp_path, LOG))

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(model.proposal_log, "append", fail)
    assert model.answer(request_of(sound(8, 8))) == []
    assert "this answer is not logged: MemoryError" in caplog.text


def test_a_log_folder_that_cannot_be_written_to_stops_the_start(weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="ADVCAM_LOG_DIR is .*file/log.*mount a folder"):
        ModelHandler.from_env({"ADVCAM_WEIGHTS": str(weights), "ADVCAM_LOG_DIR": str(tmp_path / "file" / "log")}, LOG)
