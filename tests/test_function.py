"""The function with its shipped weights over real HTTP, with what CVAT sends and what it never would."""

import base64
import gc
import io
import json
import logging
import os
import re
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import cv2
import httpx
import nuclio_sdk
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from defectcam import proposals
from defectcam.cam import score_sums, window_logits
from defectcam.feedback.harvest import proposals_of_record
from defectcam.network import DefectNet
from defectcam.pace import SAMPLE_PX
from defectcam.proposal_log import ProposalLog, read_proposal_log
from defectcam.proposals import Component
from defectcam.request import Request, RequestError, Settings, parse_request
from defectcam.serve import load_main
from defectcam.tiling import TimeLimitError
from defectcam.time_needed import PLACE_PX, PLACES
from defectcam.weights import OUTLINE_PREFIX
from model_handler import ModelHandler, OnDemand, out_of_memory
from tests.conftest import ROOT, running_function

LOG = logging.getLogger("test")


def encoded(image_rgb: np.ndarray, kind: str = "PNG", **options) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def sample_rgb() -> np.ndarray:
    """The part of the sample photo with its crack, small enough for a CPU."""
    return np.asarray(Image.open(ROOT / "docs" / "sample.jpg").convert("RGB"))


@pytest.fixture(scope="module")
def url():
    """A running server of the real function."""
    with running_function() as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def spec():
    """Labels of function.yaml: name -> (type, {attribute: (input type, values)})."""
    import yaml

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


@pytest.mark.parametrize("path", ["", "anything/else"])
def test_get_tells_what_runs_here(client, path):
    answer = client.get(path).json()
    assert "crack" in answer["defects"] and answer["device"] in ("cpu", "cuda")
    assert answer["version"] and answer["weights"]
    assert answer["defaults"]["crack"]["iterations"] in range(51)
    assert answer["limits"]["max_megapixels"] >= 50


def test_a_detector_request_as_cvat_sends_it(client, spec, sample_rgb):
    body = {"image": encoded(sample_rgb, "JPEG", quality=95)}
    answers = [client.post("", json=body) for _ in range(2)]
    assert all(answer.status_code == 200 for answer in answers)
    assert answers[0].content == answers[1].content  # the same answer for the same input
    assert answers[0].headers["content-type"] == "application/json"
    height, width = sample_rgb.shape[:2]
    check_answer(answers[0].json(), spec, width, height)
    assert any(shape["label"] == "crack" for shape in answers[0].json())


def test_iterations_shape_and_defects_of_the_request_hold(client, spec, sample_rgb):
    crop = np.ascontiguousarray(sample_rgb[:512, :640])
    body = {"image": encoded(crop), "iterations": 1, "shape": "mask", "defects": ["crack"], "threshold": 0.01}
    answer = client.post("", json=body).json()
    check_answer(answer, spec, 640, 512)
    assert answer and {shape["type"] for shape in answer} == {"mask"}
    for shape in answer:
        assert {"name": "iterations", "value": "1"} in shape["attributes"]


def test_a_head_request_is_answered_as_get_without_the_body(client):
    asked, head = client.get(""), client.head("")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == asked.headers["content-length"]


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "text/plain", None], ids=str
)
def test_any_content_type_will_do(client, content_type):
    small = {"image": encoded(np.full((40, 50, 3), 128, np.uint8)), "iterations": 0}
    headers = {"content-type": content_type} if content_type else {}
    answer = client.post("", content=json.dumps(small).encode(), headers=headers)
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
        (b'{"image": "aGk=", "threshold": 1.5}', ["threshold", "1.5", "0 to 1"]),
        (b'{"image": "aGk=", "threshold": NaN}', ["threshold", "nan"]),
        (b'{"image": "aGk=", "defects": ["graffiti"]}', ["defects", "graffiti", "crack"]),
        (b'{"image": "aGk=", "shape": "circle"}', ["shape", "circle", "polygon"]),
        (b'{"image": "aGk=", "snap": false}', ["snap", "removed", "cam_threshold", "leave it out"]),
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
    body = json.dumps({"image": encoded(np.zeros((8, 8, 3), np.uint8))})
    answer = client.request(method, "", content=body)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert answer.json() == {"error": f"method is {method}, but must be GET or POST"}


@pytest.mark.parametrize("method, status", [(None, 400), (b"POST", 400), (b"GET", 200), (b"PUT", 405)])
def test_the_method_may_be_missing_or_bytes_as_some_processors_hand_it_over(method, status):
    main, context = load_main(), nuclio_sdk.Context(nuclio_sdk.Logger(logging.WARNING))
    context.user_data.model = SimpleNamespace(settings=Settings(), defects=["crack"], describe=dict)
    answer = main.handler(context, nuclio_sdk.Event(body=b"no JSON", method=method))
    assert answer.status_code == status


def test_photos_that_cannot_be_processed_get_a_tag_with_the_reason(client, spec):
    good = base64.b64decode(encoded(np.zeros((64, 64, 3), np.uint8)))
    for data, word in [(b"hello", "unknown format"), (good[: len(good) // 2], "broken"), (bomb(), "too large")]:
        answer = client.post("", json={"image": base64.b64encode(data).decode()})
        assert answer.status_code == 200
        (tag,) = answer.json()
        check_answer([tag], spec, 64, 64)
        assert tag["type"] == "tag" and word in tag["attributes"][0]["value"]


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


def test_ten_at_once_wait_for_their_turn(url, sample_rgb):
    bodies = [
        {"image": encoded(np.ascontiguousarray(sample_rgb[i : i + 96, 200:360])), "iterations": 1, "threshold": 0.01}
        for i in range(10)
    ]
    with httpx.Client(base_url=url, timeout=300) as client:
        alone = [client.post("", json=body).json() for body in bodies]
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

    send(60)
    before = resident_mb()
    send(300)
    assert resident_mb() - before < 60


def test_out_of_memory_halves_the_batch_and_then_gives_up_on_the_photo_alone(monkeypatch):
    import model_handler

    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG)
    model.batch = 8
    batches = []
    real = model_handler.stitched_score_map

    def short_of_memory(network, image_rgb, batch, **more):
        batches.append(batch)
        if batch > limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")
        return real(network, image_rgb, batch, **more)

    monkeypatch.setattr(model_handler, "stitched_score_map", short_of_memory)
    image = np.full((32, 32, 3), 90, np.uint8)
    request = Request(base64.b64decode(encoded(image)), Settings(iterations=0, defects=("crack",)), ())
    limit = 2
    assert model.answer(request) == []
    assert batches == [8, 4, 2]
    limit = 0
    (tag,) = model.answer(request)
    assert tag["label"] == "unprocessed" and "out of memory" in tag["attributes"][0]["value"]
    limit = 2
    assert model.answer(request) == []  # the worker lives on


def test_waiting_in_the_queue_counts_as_time():
    """One request holds the worker for longer than the time limit; the next one is told so and costs nothing."""
    import main

    held, body = threading.Event(), {"image": encoded(np.zeros((8, 8, 3), np.uint8)), "iterations": 0}

    def handler(context, event):
        if event.path == "/hold":
            held.set()
            time.sleep(6)
        return main.handler(context, event)

    with running_function(handler, ADVCAM_TIME_LIMIT="5") as url, ThreadPoolExecutor(1) as pool:
        holder = pool.submit(httpx.get, url + "hold", timeout=60)
        assert held.wait(30)
        (tag,) = httpx.post(url, json=body, timeout=60).json()
        assert re.match(r"busy: \d+ of 5 s went by .* fewer photos at once.* workers", tag["attributes"][0]["value"])
        assert holder.result().status_code == 200
        assert httpx.post(url, json=body, timeout=60).json() == []


def test_what_waiting_left_too_little_time_for_is_said_to_be_busy():
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, time_limit_s=100)
    assert model.reason(TimeLimitError(60), waited_s=70).startswith("busy: 70 of 100 s ")
    assert model.reason(TimeLimitError(60), waited_s=10).startswith("too slow 150>100 s; ")
    assert model.reason(TimeLimitError(), waited_s=70).startswith("busy")
    assert model.reason(TimeLimitError(), waited_s=10).startswith("too slow >100 s; ")
    assert model.reason(TimeLimitError(0.5), waited_s=1).startswith("too slow 100>100 s; ")  # 99 s were work
    assert model.reason(TimeLimitError(9), waited_s=40).startswith("too slow 69>100 s; ")
    assert "; about 20 clicks would fit; " in model.reason(TimeLimitError(400, "about 20 clicks"))


def test_reasons_say_what_matters_in_what_cvat_shows_of_them_and_name_nothing_that_an_older_cvat_lacks():
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, max_pixels=64_000_000)
    good = base64.b64decode(encoded(np.zeros((64, 64, 3), np.uint8)))
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
        if isinstance(cause, bytes):
            (tag,) = model.answer(Request(cause, Settings(), ()))
            reason = tag["attributes"][0]["value"]
        else:
            reason = model.reason(cause)
        assert reason[:20].startswith(words), reason
    assert model.reason(TimeLimitError(), waited_s=70)[:20].startswith("busy: 70 of 100 s")
    programs = [*ROOT.glob("*.py"), *(ROOT / "defectcam").rglob("*.py")]
    assert len(programs) > 30
    for path in programs:
        assert "region of interest" not in path.read_text(), f"{path}: CVAT 2.15 has none"


def test_the_time_since_arrival_is_0_where_it_cannot_be_told():
    from main import waited_s

    now = datetime.now(timezone.utc)
    ago = now - timedelta(seconds=20)
    assert waited_s(ago) == pytest.approx(20, abs=5)
    assert waited_s(ago.replace(tzinfo=None)) == pytest.approx(20, abs=5)  # as nuclio_sdk gives it
    for arrival in (None, 0, "now", now + timedelta(hours=1), now - timedelta(days=1), datetime.fromtimestamp(0)):
        assert waited_s(arrival) == 0


@pytest.mark.parametrize("place", ["main.parse_request", "main.json.dumps"])
def test_memory_that_ends_while_json_is_read_or_written_costs_the_photo_alone(client, spec, monkeypatch, place):
    import main

    real = {"main.parse_request": main.parse_request, "main.json.dumps": json.dumps}[place]
    calls = []

    def short_of_memory(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return real(*arguments, **named)

    body = json.dumps({"image": encoded(np.zeros((8, 8, 3), np.uint8))}).encode()
    monkeypatch.setattr(place, short_of_memory)
    answer = client.post("", content=body)
    assert answer.status_code == 200
    check_answer(answer.json(), spec, 8, 8)
    assert answer.json()[0]["attributes"][0]["value"].startswith("out of memory")
    assert client.post("", content=body).json() == []  # the worker lives on


def answer_and_pixels(model, image_rgb, **settings):
    """A photo's answer, and how many pixels the crack network saw for it."""
    seen = []
    encoder = model.weights.networks["crack"].encoder
    hook = encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 0].numel()))
    try:
        answer = model.answer(Request(base64.b64decode(encoded(image_rgb)), Settings(**settings), ()))
    finally:
        hook.remove()
    return answer, sum(seen)


def test_a_photo_that_takes_too_long_is_refused_before_it_is_begun(monkeypatch):
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, time_limit_s=0.5)
    sample_px = 2 * SAMPLE_PX**2  # the pace is measured once more before a photo is refused
    with monkeypatch.context() as patches:
        patches.setattr("model_handler.decode_image", lambda *_: pytest.fail("decoded"))
        answer, seen_px = answer_and_pixels(model, np.full((3000, 3000, 3), 120, np.uint8), iterations=0)
    (tag,) = answer
    assert re.match(r"too slow \d+>0.5 s; (about \d megapixels would fit; )?use", reason_of(tag))
    assert seen_px == sample_px
    answer, seen_px = answer_and_pixels(model, np.full((16, 16, 3), 120, np.uint8), iterations=0)
    assert (answer, seen_px) == ([], 256)


def reason_of(tag: dict) -> str:
    return tag["attributes"][0]["value"]


PLACES_PX = PLACES**2 * PLACE_PX**2  # what is looked at of a photo that may be late


@pytest.fixture
def slow_model(monkeypatch):
    """A handler on a machine that takes so many seconds a pixel, per network, and is given a minute."""
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, time_limit_s=60)
    monkeypatch.setattr(model.pace, "measure", lambda name: None)
    monkeypatch.setattr(model.pace, "learn", lambda *_: None)

    def slowed(**seconds) -> ModelHandler:
        model.pace.fastest = dict.fromkeys(model.pace.fastest, 1e-9) | {n.replace("_", " "): s for n, s in seconds.items()}
        return model

    return slowed


def test_a_photo_whose_climb_would_be_late_is_refused_after_a_look_at_a_few_places(slow_model, sample_rgb):
    model = slow_model(crack=1e-6)  # a second for the plain map, two for a step
    photo = np.tile(sample_rgb, (2, 2, 1))
    answer, seen_px = answer_and_pixels(model, photo, iterations=50, threshold=0.0, defects=("crack",))
    assert re.match(r"too slow \d+>60 s; (about 1 megapixels would fit; )?", reason_of(answer[0]))
    assert 0 < seen_px <= PLACES_PX < photo[..., 0].size / 4


def test_a_photo_whose_outlines_would_be_late_is_refused_after_the_same_look(slow_model, sample_rgb):
    model, photo = slow_model(crack_outline=1e-4), np.tile(sample_rgb, (2, 2, 1))
    answer, seen_px = answer_and_pixels(model, photo, iterations=0, defects=("crack",))
    assert re.match(r"too slow \d+>60 s", reason_of(answer[0])) and 0 < seen_px <= PLACES_PX


def test_a_photo_on_which_nothing_will_be_climbed_or_outlined_is_not_refused_for_it(slow_model):
    model, photo = slow_model(crack_outline=1e-4), np.full((900, 1000, 3), 128, np.uint8)
    answer, seen_px = answer_and_pixels(model, photo, iterations=50, defects=("crack",))
    assert answer == [] and PLACES_PX / 2 < seen_px < 2 * photo[..., 0].size + PLACES_PX


def test_nothing_is_looked_at_where_there_is_time_for_everything(slow_model, monkeypatch, sample_rgb):
    monkeypatch.setattr("defectcam.time_needed._shares", lambda *_: pytest.fail("looked at"))
    crop = np.ascontiguousarray(sample_rgb[:200, :200])
    assert answer_and_pixels(slow_model(), crop, iterations=1, defects=("crack",))[1] > 0


def test_outlines_that_would_be_late_are_not_begun(slow_model, sample_rgb, monkeypatch):
    """Also where the look said that there are hardly any."""
    model, seen = slow_model(crack_outline=1.0), []
    monkeypatch.setattr("defectcam.time_needed._shares", lambda *_: (0.0, 0.0))
    model.weights.outlines["crack"].encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    (tag,) = model.answer(Request(base64.b64decode(encoded(sample_rgb)), Settings(defects=("crack",), iterations=0), ()))
    assert re.match(r"too slow \d+>60 s", reason_of(tag)) and not seen


def test_a_deadline_that_passes_is_said_too(sample_rgb):
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, time_limit_s=1e-6)
    model.pace.fastest.clear()  # as on a GPU before its first photo
    answer, _ = answer_and_pixels(model, sample_rgb, iterations=0)
    assert reason_of(answer[0]).startswith("too slow >1e-06 s")


def test_folding_the_networks_changes_no_proposal(sample_rgb):
    crop, settings = sample_rgb[250:670, 480:900], Settings(iterations=1, threshold=0.0)
    fast, plain = (ModelHandler(ROOT / "weights", "cpu", settings, LOG) for _ in range(2))
    for defect, fact in plain.weights.facts.items():
        tensors = load_file(ROOT / "weights" / fact.file)
        for prefix, networks, build in (
            (OUTLINE_PREFIX, plain.weights.outlines, fact.build_outline_network),
            ("", plain.weights.networks, fact.build_network),
        ):
            if defect in networks:
                own = {name: value for name, value in tensors.items() if name.startswith(OUTLINE_PREFIX) == bool(prefix)}
                networks[defect] = build().eval()
                networks[defect].load_state_dict({name.removeprefix(prefix): value for name, value in own.items()})
    one, other = (model.propose(crop, model.settings) for model in (fast, plain))
    assert one and [shape["label"] for shape in one] == [shape["label"] for shape in other]
    for shape, same in zip(one, other):
        drawn, again = (rasterised(points, *crop.shape[:2]) for points in (shape["points"], same["points"]))
        assert (drawn & again).sum() >= 0.99 * (drawn | again).sum()


def rasterised(points, height, width):
    """A polygon's pixels, (H, W) bool."""
    polygon = np.round(np.reshape(points, (-1, 2))).astype(np.int32)
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [polygon], 1) > 0


class Moved(torch.nn.Linear):
    """A real module that says where it was moved to."""

    def __init__(self, moves):
        super().__init__(2, 2)
        self.moves = moves

    def to(self, device, *rest, **named):
        if device == "full":
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 byte")
        self.moves.append(device)
        return super().to("cpu" if device == "used" else device, *rest, **named)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


def test_networks_come_with_the_first_use_and_leave_when_nobody_needs_them():
    moves = []
    on_demand = OnDemand([Moved(moves), Moved(moves)], "used", idle_s=0.05)
    assert moves == []
    for _ in range(2):
        with on_demand, on_demand:
            time.sleep(0.15)
            assert moves == ["used", "used"]  # in use for longer than the idle time
        until(lambda: len(moves) == 4)
        assert moves == ["used", "used", "cpu", "cpu"]
        moves.clear()


def test_networks_stay_between_uses_that_follow_each_other():
    moves = []
    on_demand = OnDemand([Moved(moves)], "used", idle_s=60)
    for _ in range(50):
        with on_demand:
            pass
    assert "cpu" not in moves
    assert on_demand.timer.daemon  # it keeps no process from ending


def test_many_threads_never_find_the_networks_gone():
    moves = []
    on_demand = OnDemand([Moved(moves)], "used", idle_s=0.001)
    gone = []

    def use(number):
        rng = np.random.default_rng(number)
        for _ in range(100):
            with on_demand:
                gone.extend(["gone"] if moves[-1] != "used" else [])
                time.sleep(rng.uniform(0, 0.002))
                gone.extend(["gone"] if moves[-1] != "used" else [])
            time.sleep(rng.uniform(0, 0.004))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    until(lambda: moves[-1] == "cpu")
    assert not gone and on_demand.users == 0


def test_networks_that_did_not_fit_leave_nothing_behind():
    moves = []
    on_demand = OnDemand([Moved(moves)], "full", idle_s=0.01)
    with pytest.raises(RuntimeError, match="out of memory"), on_demand:
        pass
    until(lambda: moves == ["cpu"])
    on_demand.device = "used"
    with on_demand:
        assert moves[-1] == "used"


def test_the_handlers_networks_move_and_the_answer_stays_the_same(monkeypatch, sample_rgb):
    moves = []
    real = DefectNet.to
    monkeypatch.setattr(DefectNet, "to", lambda self, device, **k: (moves.append(device), real(self, device, **k))[1])
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, idle_s=0.05)
    moves.clear()  # of loading
    request = Request(base64.b64decode(encoded(sample_rgb[420:580, 760:920])), Settings(threshold=0.01), ())
    first = model.answer(request)
    assert first and moves and moves[-1] == "cpu"
    until(lambda: not model.networks_on_device.timer.is_alive())
    count = len(moves)
    assert model.answer(request) == first
    assert len(moves) > count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_an_idle_function_holds_no_weights_on_the_gpu(sample_rgb):
    model = ModelHandler(ROOT / "weights", "cuda", Settings(), LOG, idle_s=1)
    assert torch.cuda.memory_allocated() == 0
    request = Request(base64.b64decode(encoded(sample_rgb[420:580, 760:920])), Settings(threshold=0.01), ())
    first = model.answer(request)
    assert torch.cuda.memory_allocated() > 0
    until(lambda: torch.cuda.memory_reserved() < 64 << 20)  # what cuBLAS and cuDNN keep as workspace may remain
    weights = sum(t.numel() * 4 for network in model.weights.networks.values() for t in network.parameters())
    assert torch.cuda.memory_allocated() < weights + (32 << 20)
    assert {t.device.type for network in model.weights.networks.values() for t in network.parameters()} == {"cpu"}
    assert model.answer(request) == first


def answered(monkeypatch, found: dict[str, list[tuple[Component, float]]], shape: str) -> tuple[list[float], list[str]]:
    """Confidences (0..100) of the proposals answered where these components are found, and the reasons of the notices."""
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG)
    monkeypatch.setattr(model, "components", lambda image, defect, *_: found[defect])
    answer = model.propose(np.zeros((6400, 6400, 3), np.uint8), Settings(defects=tuple(found), shape=shape))
    shapes = [element for element in answer if element["type"] != "tag"]
    notices = answer[len(shapes) :]
    assert {element["label"] for element in notices} <= {"notice"}
    return [int(element["attributes"][0]["value"]) for element in shapes], [n["attributes"][0]["value"] for n in notices]


def comb(size: int) -> Component:
    """(size, size): its outline is about size * size px long."""
    mask = np.zeros((size, size), bool)
    mask[::2] = mask[:, 0] = True
    return Component(mask, 0, 0)


def square(side: int) -> Component:
    return Component(np.ones((side, side), bool), 0, 0)


def test_a_ragged_outline_costs_itself_and_not_the_photo(monkeypatch):
    found = {"crack": [(square(20), 0.8), (comb(1400), 0.9), (square(30), 0.7)], "rust": [(square(40), 0.6)]}
    confidences, notices = answered(monkeypatch, found, "polygon")
    assert confidences == [80, 70, 60] and notices == ["1 too ragged: crack; raise cam_threshold"]
    found["rust"] += [(comb(1500), 0.5)]
    assert answered(monkeypatch, found, "mask")[1] == ["2 too ragged: crack, rust; raise cam_threshold"]
    assert answered(monkeypatch, {"crack": [(comb(1400), 0.9)]}, "polygon") == ([], ["1 too ragged: crack; raise cam_threshold"])


def test_of_masks_that_are_too_large_together_the_most_confident_are_answered(monkeypatch):
    found = {"crack": [(square(3000), 0.7), (square(4000), 0.5), (square(100), 0.1)], "rust": [(square(4000), 0.9)]}
    confidences, notices = answered(monkeypatch, found, "mask")
    assert confidences == [70, 10, 90], "in their order, and what is small enough for the room left"
    assert notices == ["1 masks too large: use shape polygon"]
    assert answered(monkeypatch, {"crack": [(square(6000), 0.9)]}, "mask") == ([], notices)
    assert answered(monkeypatch, found, "polygon") == ([70, 50, 10, 90], [])


def test_what_was_left_out_reaches_the_log_and_is_no_proposal_there(monkeypatch, tmp_path):
    log = ProposalLog(tmp_path, LOG)
    model = ModelHandler(ROOT / "weights", "cpu", Settings(defects=("crack",)), LOG, proposal_log=log)
    monkeypatch.setattr(model, "components", lambda *_: [(square(20), 0.8), (comb(1400), 0.9)])
    answer = model.answer(Request(base64.b64decode(encoded(np.zeros((1400, 1400, 3), np.uint8))), model.settings, ()))
    assert [element["label"] for element in answer] == ["crack", "notice"]
    (record,) = read_proposal_log(tmp_path)
    assert record["shapes"] == answer
    assert [one.name for one in proposals_of_record(record)] == [answer[0]["attributes"][2]["value"]]


def test_places_fainter_than_the_manifest_wants_are_climbed_where_they_are_asked_for(monkeypatch):
    import model_handler

    gates = []
    real = model_handler.climbed_map
    monkeypatch.setattr(model_handler, "climbed_map", lambda *a, **k: (gates.append(a[8]), real(*a, **k))[1])
    model = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG)
    image = np.full((16, 16, 3), 90, np.uint8)
    model.propose(image, Settings(defects=("crack",)))
    fact = model.weights.facts["crack"]
    for threshold in (fact.threshold / 4, 0.0, 1.0):
        model.propose(image, Settings(defects=("crack",), threshold=threshold))
    assert gates == pytest.approx([fact.gate, fact.gate / 4, 0, fact.gate])


def test_confidence_comes_from_windows_length_outline_network_and_straightness(monkeypatch):
    rng = np.random.default_rng(3)
    score = rng.normal(size=(60, 70)).astype(np.float32)
    mask = rng.random((20, 30)) > 0.5
    ys, xs = np.nonzero(mask)
    wanted = window_logits(score_sums(score), 0.3, ys + 7, xs + 9, 16).mean()
    logits = rng.normal(size=score.shape) * 3
    logits[20:] = -np.inf  # where the outline network was not asked
    inside = np.clip(logits[ys + 7, xs + 9], -6, 6).mean()
    minor, major = np.sqrt(np.linalg.eigvalsh(np.cov(xs, ys, bias=True) + np.eye(2) / 12))
    for chunk in (1, 50, 10**6):
        monkeypatch.setattr(proposals, "CHUNK_PIXELS", chunk)
        found = proposals.component_features(Component(mask, 9, 7), score_sums(score), 0.3, 16, 1.0, logits)
        assert found == pytest.approx(
            (wanted, np.log2(np.hypot(20, 30)), inside, np.log2(minor / major))
        )
    assert proposals.component_features(Component(mask, 9, 7), score_sums(score), 0.3, 16, 1.0)[2] == 0
    line, disc = np.ones((1, 100), bool), np.hypot(*np.mgrid[-40:41, -40:41]) <= 40
    of_line, of_disc = (proposals._log2_aspect(shape) for shape in (line, disc))
    assert of_line == pytest.approx(np.log2(1 / 100)) and of_disc == pytest.approx(0, abs=1e-6)
    assert proposals.component_confidence((2.0, 8.0, 1.0, -2.0), (0.5, 0.25, 1.0, 0.5, -3.0)) == pytest.approx(0.5)


def test_an_unforeseen_error_costs_the_frame_not_the_run(client, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("model_handler.binarise", fail)
    answer = client.post("", json={"image": encoded(np.zeros((8, 8, 3), np.uint8))})
    assert answer.status_code == 200
    assert answer.json()[0]["label"] == "unprocessed"
    monkeypatch.undo()
    assert client.post("", json={"image": encoded(np.zeros((8, 8, 3), np.uint8))}).json() == []


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"ADVCAM_ITERATIONS": "many"}, ["ADVCAM_ITERATIONS", "many", "0 to 50"]),
        ({"ADVCAM_DEVICE": "tpu"}, ["ADVCAM_DEVICE", "tpu", "cpu"]),
        ({"ADVCAM_MAX_MEGAPIXELS": "-1"}, ["ADVCAM_MAX_MEGAPIXELS", "-1", "178"]),
        ({"ADVCAM_TIME_LIMIT": "soon"}, ["ADVCAM_TIME_LIMIT", "soon"]),
        ({"ADVCAM_IDLE_SECONDS": "0"}, ["ADVCAM_IDLE_SECONDS", "above 0"]),
        ({"ADVCAM_CVAT_URL": "http://cvat"}, ["ADVCAM_CVAT_TOKEN is not set"]),
        ({"ADVCAM_WEIGHTS": "/nowhere"}, ["/nowhere", "manifest.json"]),
        ({"ADVCAM_DEFECTS": "crack,moss"}, ["ADVCAM_DEFECTS", "moss", "crack"]),
        ({"ADVCAM_SNAP": "false"}, ["ADVCAM_SNAP was removed", "cam_threshold", "unset it"]),
    ],
)
def test_a_wrong_deployment_does_not_start(environ, words):
    with pytest.raises(Exception) as error:
        ModelHandler.from_env(environ, LOG)
    for word in words:
        assert word in str(error.value)


def test_settings_come_from_request_then_env_then_manifest():
    model = ModelHandler.from_env({"ADVCAM_ITERATIONS": "7", "ADVCAM_DEVICE": "cpu"}, LOG)
    fact = model.weights.facts["crack"]
    assert model.describe()["defaults"]["crack"]["iterations"] == 7
    assert model.effective("crack", Settings(iterations=3))["iterations"] == 3
    assert model.effective("crack", Settings())["iterations"] == fact.iterations
    assert model.effective("crack", Settings())["cam_threshold"] == fact.cam_threshold


def test_defaults_of_the_manifest_are_offered_by_the_function_file(spec):
    model = ModelHandler.from_env({"ADVCAM_DEVICE": "cpu"}, LOG)
    for defect, fact in model.weights.facts.items():
        values = spec[defect][1]["iterations"][1]
        assert values[0] == str(fact.iterations)  # "From model" makes the first one the task's default


def test_runtime_half_imports_nothing_of_the_offline_half():
    import subprocess
    import sys

    code = "import main, sys; print([n for n in sys.modules if n.startswith('defectcam.') and n.count('.') > 1])"
    code += "; print([n for n in ('tqdm.auto', 'defectcam.training', 'defectcam.evaluation') if n in sys.modules])"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=ROOT)
    first, second = out.stdout.split("\n")[:2]
    assert first == "[]" and "defectcam" not in second, out.stderr


def test_every_answer_is_logged_where_a_folder_is_named(tmp_path, sample_rgb):
    environ = {"ADVCAM_LOG_DIR": str(tmp_path / "log"), "ADVCAM_DEFECTS": "crack", "ADVCAM_ITERATIONS": "0"}
    model = ModelHandler.from_env(environ, LOG)
    body = {"image": encoded(np.ascontiguousarray(sample_rgb[300:700, 500:1000])), "threshold": 0.05}
    answer = model.answer(parse_request(body, model.settings, model.defects))
    (path,) = (tmp_path / "log").iterdir()
    (line,) = map(json.loads, path.read_text().splitlines())
    assert answer and line["shapes"] == answer and (line["width"], line["height"]) == (500, 400)
    assert line["weights"] == model.weights.version
    assert line["settings"]["crack"]["threshold"] == 0.05 and line["settings"]["crack"]["iterations"] == 0


def test_a_log_that_fails_never_costs_the_answer(tmp_path, monkeypatch, caplog):
    model = ModelHandler.from_env({"ADVCAM_LOG_DIR": str(tmp_path), "ADVCAM_ITERATIONS": "0"}, LOG)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(model.proposal_log, "append", fail)
    request = Request(base64.b64decode(encoded(np.zeros((8, 8, 3), np.uint8))), model.settings, ())
    assert model.answer(request) == []
    assert "this answer is not logged: MemoryError" in caplog.text


def test_a_log_folder_that_cannot_be_written_to_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="ADVCAM_LOG_DIR is .*file/log.*mount a folder"):
        ModelHandler.from_env({"ADVCAM_LOG_DIR": str(tmp_path / "file" / "log")}, LOG)


def test_a_thread_that_finds_no_memory_for_its_stack_is_out_of_memory():
    assert out_of_memory(RuntimeError("can't start new thread")) and not out_of_memory(RuntimeError("a bug"))
