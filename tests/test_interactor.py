"""The click tool: the function over real HTTP, with clicks as CVAT sends them; its weights are tiny and see dark spots."""

import base64
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from defectcam.deadline import Deadline, TimeLimitError
from defectcam.handler import ModelHandler
from defectcam.interactor import (
    LEAST_REACH_PX,
    NEAR_PX,
    OVERLOOKED_RADIUS_PX,
    ClickSettings,
    _clicked,
    _RegionMap,
    outline_clicked,
    to_json,
)
from defectcam.postprocess import Cleaning
from defectcam.predict import find_cores, paste
from defectcam.proposals import find_components
from defectcam.pyramid import Pyramid
from defectcam.request import Clicks, parse_request
from defectcam.settings import RequestError, Settings
from tests.conftest import DATA, ROOT, dark_wall, dark_weights, late_tiles, running_function

LOG = logging.getLogger("test")
PLAIN = {"crack": ClickSettings(0, 0.5, 1.0, 0.02)}


def encoded(image_rgb: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def as_cvat_sends(image_rgb: np.ndarray, pos_points, neg_points=(), obj_bbox=None) -> dict:
    """The four keys of a real server's call, no others."""
    clicks = {"pos_points": list(pos_points), "neg_points": list(neg_points), "obj_bbox": obj_bbox}
    return {"image": encoded(image_rgb), **clicks}


def sound(height: int, width: int) -> np.ndarray:
    """A wall without a defect, (height, width, 3) uint8."""
    return np.full((height, width, 3), 150, np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return dark_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def photo_rgb() -> np.ndarray:
    """(96, 160, 3) uint8: a wall with two spots."""
    return dark_wall([(44, 44, 24), (120, 60, 16)], 96, 160)[0]


def handler_with(weights: Path, time_limit_s: float = 80_000) -> ModelHandler:
    return ModelHandler(weights, "cpu", Settings(), LOG, time_limit_s=time_limit_s)


@pytest.fixture(scope="module")
def model(weights) -> ModelHandler:
    return handler_with(weights)


@pytest.fixture(scope="module")
def spots(model, photo_rgb) -> list[np.ndarray]:
    """All regions that the detector has on the photo, as masks of the photo, largest first."""
    masks = []
    for core in find_cores(model.predictor.maps(Pyramid(photo_rgb), "crack"), model.weights.configs["crack"]):
        masks.append(np.zeros(photo_rgb.shape[:2], bool))
        paste(masks[-1], core.component)
    assert len(masks) >= 2
    return sorted(masks, key=np.count_nonzero, reverse=True)


@pytest.fixture(scope="module")
def client(weights):
    """A client of a running server of the real function."""
    with running_function(ADVCAM_WEIGHTS=str(weights), ADVCAM_DEVICE="cpu", ADVCAM_TIME_LIMIT="80000") as url:
        with httpx.Client(base_url=url, timeout=300) as client:
            yield client


def middle_xy(mask: np.ndarray, share: float = 0.5) -> list[float]:
    """A click in the middle of the mask's pixel at this share of the way from its top to its bottom."""
    ys, xs = np.nonzero(mask)
    number = int(share * (len(ys) - 1))
    return [float(xs[number]) + 0.5, float(ys[number]) + 0.5]


def has(mask: np.ndarray, xy) -> bool:
    return bool(mask[int(xy[1]), int(xy[0])])


def farthest_px(mask: np.ndarray, xy) -> float:
    """How far from a point the mask reaches."""
    ys, xs = np.nonzero(mask)
    return float(np.hypot(xs - int(xy[0]), ys - int(xy[1])).max())


def check_answer(answer: dict, height: int, width: int) -> np.ndarray:
    """What CVAT's page needs of an interactor's answer; returns the mask."""
    assert set(answer) == {"mask", "points"}
    assert len(answer["mask"]) == height and {len(row) for row in answer["mask"]} == {width}
    assert set().union(*answer["mask"]) <= {0, 1}
    mask = np.array(answer["mask"], bool)
    assert mask.any()
    points = np.array(answer["points"])
    assert points.ndim == 2 and points.shape[1] == 2 and len(np.unique(points, axis=0)) >= 3
    assert (points >= 0).all() and (points <= [width, height]).all()
    largest = max(find_components(mask), key=lambda component: component.area_px)
    painted = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [np.rint(points).astype(np.int32)], 1).astype(bool)
    region = np.zeros_like(mask)
    paste(region, largest)
    assert (painted & region).sum() / (painted | region).sum() > 0.7
    return mask


def clicked(client, image_rgb, pos_points, neg_points=(), obj_bbox=None) -> np.ndarray:
    answer = client.post("", json=as_cvat_sends(image_rgb, pos_points, neg_points, obj_bbox))
    assert answer.status_code == 200, answer.text
    return check_answer(answer.json(), *image_rgb.shape[:2])


# ---- what a click gets ----


def test_a_click_gets_the_region_under_it_as_the_detector_has_it(client, photo_rgb, spots):
    for mask in spots[:2]:
        assert np.array_equal(clicked(client, photo_rgb, [middle_xy(mask)]), mask)


def test_a_click_beside_a_defect_means_the_defect(client, photo_rgb, spots):
    reach = cv2.dilate(spots[0].astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    beside = middle_xy(reach & ~sum(spots).astype(bool))
    assert np.array_equal(clicked(client, photo_rgb, [beside]), spots[0])


def test_clicks_on_two_regions_get_both(client, photo_rgb, spots):
    found = clicked(client, photo_rgb, [middle_xy(spots[0]), middle_xy(spots[1])])
    assert np.array_equal(found, spots[0] | spots[1])


def test_a_negative_click_leaves_its_region_out(client, photo_rgb, spots):
    ys, xs = np.nonzero(sum(spots))
    box = [[float(xs.min()), float(ys.min())], [float(xs.max() + 1), float(ys.max() + 1)]]
    assert np.array_equal(clicked(client, photo_rgb, [], [], box), sum(spots).astype(bool))
    found = clicked(client, photo_rgb, [], [middle_xy(spots[0])], box)
    assert np.array_equal(found, sum(spots[1:]).astype(bool))


def test_a_negative_click_on_the_same_region_cuts_it(client, photo_rgb, spots):
    positive, negative = middle_xy(spots[0], 0.1), middle_xy(spots[0], 0.9)
    found = clicked(client, photo_rgb, [positive], [negative])
    assert has(found, positive) and not has(found, negative)
    assert not (found & ~spots[0]).any() and 0 < found.sum() < spots[0].sum()
    assert len(find_components(found)) == 1  # what hangs together with the positive click


# ---- the threshold that clicks ask for ----


def bumps(height: int, width: int, *xyhr: tuple[float, float, float, float]) -> np.ndarray:
    """A map (height, width) float32 of -6 with hills: x, y, height, radius."""
    ys, xs = np.mgrid[:height, :width]
    hills = [high * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / radius**2) for x, y, high, radius in xyhr]
    return (-6 + np.max(hills, axis=0)).astype(np.float32)


def chosen_of(logits, positive, negative=(), cleaning=Cleaning(0, 0, 4), slope=1.0, box=None) -> np.ndarray:
    """The pixels that clicks mean at a theta of 0."""
    height, width = logits.shape
    region_map = _RegionMap(logits, box or (0, 0, width, height), 0.0, slope, cleaning, Deadline(600))
    return _clicked(region_map, positive, negative, LEAST_REACH_PX)


@pytest.mark.parametrize("scale", [3, 12])  # the larger one is searched at a fraction of its size
def test_clicks_lower_and_raise_the_threshold_of_their_region(scale):
    """Two hills that are joined by a saddle above theta, and a third one by itself."""
    logits = cv2.resize(bumps(60, 120, (30, 30, 12, 15), (56, 30, 14, 15), (100, 10, 12, 8)), None, fx=scale, fy=scale)
    middle, other, away, outside, low, far_out = (
        (x * scale, y * scale) for x, y in ((30, 30), (56, 30), (100, 10), (30, 45), (30, 40), (30, 55))
    )
    theta = chosen_of(logits, [middle])
    assert has(theta, other) and not has(theta, away) and not has(theta, outside)
    assert np.array_equal(chosen_of(logits, [middle, other, low]), theta), "clicks in one region change nothing"
    wide, at_click = chosen_of(logits, [middle, outside]), float(logits[outside[::-1]])
    assert -2 < at_click < 0 and has(wide, outside) and (wide >= theta).all() and not has(wide, away)
    assert at_click - 0.4 < logits[wide].min() and len(find_components(wide)) == 1, "the highest"
    assert np.array_equal(chosen_of(logits, [middle, far_out]), theta), "too far below theta"
    narrow, at_click = chosen_of(logits, [middle], [low]), float(logits[low[::-1]])
    assert has(narrow, middle) and not has(narrow, low) and (theta >= narrow).all() and len(find_components(narrow)) == 1
    assert at_click <= logits[narrow].min() < at_click + 0.4, "the lowest"
    apart = chosen_of(logits, [middle], [other])
    assert has(apart, middle) and not has(apart, other) and len(find_components(apart)) == 1
    third = chosen_of(logits, [away])
    assert np.array_equal(chosen_of(logits, [middle, away], [low]), narrow | third), "every region has its own threshold"
    assert np.array_equal(chosen_of(logits, [middle, away, outside]), wide | third)
    both = chosen_of(logits, [middle, outside], [low])
    assert has(both, middle) and not has(both, low), "no threshold agrees with all of them"


def test_where_no_threshold_separates_clicks_what_is_nearer_to_the_negative_one_is_cut_off():
    logits = np.full((40, 200), -6.0, np.float32)
    logits[15:25] = 3.0  # a ridge that is as high everywhere
    found = chosen_of(logits, [(40, 20)], [(120, 20)])
    assert np.array_equal(np.flatnonzero(found.any(0)), np.arange(81)) and found[15:25, :80].all()
    logits[:, 100:] += 2  # the negative click lies higher
    assert np.array_equal(chosen_of(logits, [(40, 20)], [(120, 20)]), found)
    boxed = chosen_of(logits, [(40, 20)], [(120, 20)], box=(30, 0, 200, 18))
    assert np.array_equal(boxed, found & (np.arange(200) >= 30) & (np.arange(40) < 18)[:, None])


def test_clicks_narrow_an_outline_of_the_function_without_reading_more(model, photo_rgb, spots):
    """At a low theta the two spots are one region; a click between them parts them."""
    low = {"crack": replace(PLAIN["crack"], cam_threshold=1e-4)}
    first, second = middle_xy(spots[0]), middle_xy(spots[1])

    def outline(positive, negative=()):
        clicks = Clicks(tuple(map(tuple, positive)), tuple(map(tuple, negative)), None)
        with seen_px(model) as seen:
            answer, _ = outline_clicked(model.predictor, photo_rgb, clicks, low)
        return check_answer(json.loads(to_json(answer)), *photo_rgb.shape[:2]), sum(seen)

    whole, seen_once = outline([first])
    assert has(whole, second)
    parted, seen_twice = outline([first], [second])
    assert has(parted, first) and not has(parted, second) and (whole >= parted).all()
    assert seen_twice == seen_once == model.predictor.plain_pixels(*photo_rgb.shape[:2], "crack", [(1, 1)], 1000)


def test_a_box_ends_the_outline(client, photo_rgb, spots):
    x, y = middle_xy(spots[0])
    found = clicked(client, photo_rgb, [[x, y]], [], [[x + 8.2, y + 8.7], [x - 8.2, y - 8.7]])
    ys, xs = np.nonzero(found)
    assert has(found, (x, y)) and xs.min() >= x - 10 and xs.max() <= x + 10 and np.ptp(ys) <= 20
    assert found.sum() < spots[0].sum()
    beyond = middle_xy(spots[0], 0.95)
    assert has(clicked(client, photo_rgb, [[x, y], beyond], [], [[x - 5, y - 5], [x + 5, y + 5]]), beyond)


def test_what_the_network_overlooks_is_what_its_map_says_of_the_click(weights, tmp_path, photo_rgb, spots):
    """At such a probability nothing is proposed anywhere; the map still is highest on the spot."""
    blind = handler_with(dark_weights(tmp_path, platt=[1.0, -60.0]))
    assert not blind.predictor.propose(photo_rgb, "crack", 0, 0.0)
    xy = middle_xy(spots[0])
    answer, _ = outline_clicked(blind.predictor, photo_rgb, Clicks((tuple(xy),), (), None), PLAIN)
    found = check_answer(json.loads(to_json(answer)), *photo_rgb.shape[:2])
    assert has(found, xy) and (found & spots[0]).sum() > 0.5 * found.sum() > np.pi * LEAST_REACH_PX**2


@pytest.mark.parametrize("xy", [[0, 0], [40, 50], [80.0, 60.0], [79.99, 0.01]])
def test_where_nothing_is_to_be_seen_something_small_at_the_click_is_answered(client, xy):
    found, pixel = clicked(client, sound(60, 80), [xy]), (min(xy[0], 79), min(xy[1], 59))
    assert has(found, pixel) and farthest_px(found, pixel) <= OVERLOOKED_RADIUS_PX + 1


def test_a_map_that_says_the_same_all_around_a_click_is_no_defect(client):
    found = clicked(client, sound(300, 300), [[150, 150]])
    assert has(found, [150, 150]) and farthest_px(found, [150, 150]) <= LEAST_REACH_PX + 1


def test_a_box_and_a_negative_click_hold_where_nothing_is_to_be_seen(client):
    assert clicked(client, sound(60, 80), [], [], [[10, 10], [30, 30]])[20, 20]
    assert not clicked(client, sound(60, 80), [], [], [[10, 10], [30, 30]])[:, 31:].any()
    found = clicked(client, sound(60, 80), [[20, 30]], [[60, 30]])
    assert has(found, [20, 30]) and not has(found, [60, 30])


def test_an_outline_climbs_as_far_as_the_request_says_and_not_by_itself(model, photo_rgb, spots, monkeypatch):
    engine = model.predictor.engines["crack"]
    real, calls = engine.score_and_gradient, []
    monkeypatch.setattr(engine, "score_and_gradient", lambda images: (calls.append(len(images)), real(images))[1])
    body = as_cvat_sends(photo_rgb, [middle_xy(spots[1])])
    for given, wanted in (({}, 0), ({"iterations": 3}, 3)):
        calls.clear()
        model.answer(parse_request(body | given, model.settings, model.defects))
        assert len(calls) == wanted * len(model.predictor.maps(Pyramid(photo_rgb), "crack").scales)
    assert model.weights.configs["crack"].iterations == 2


@pytest.mark.parametrize("height, width", [(1, 1), (1, 300), (3, 2)])
def test_tiny_photos_are_answered(client, height, width):
    clicked(client, np.zeros((height, width, 3), np.uint8), [[width / 2, height / 2]])


# ---- which defect ----


@pytest.mark.parametrize("surer, defect", [(-9.0, "crack"), (9.0, "rust")])
def test_the_networks_at_the_click_decide_which_defect_it_is(tmp_path, photo_rgb, spots, surer, defect):
    """Rust has crack's network here and is surer of itself or less sure; where it is less sure, it sees less."""
    folder = dark_weights(tmp_path, ["crack", "rust"])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["defects"]["rust"]["platt"] = [1.0, surer]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    predictor = handler_with(folder).predictor
    both = {name: PLAIN["crack"] for name in predictor.defects}
    for clicks in (Clicks((tuple(middle_xy(spots[0])),), (), None), Clicks((), (), (0.0, 0.0, 160.0, 96.0))):
        answer, found = outline_clicked(predictor, photo_rgb, clicks, both)
        assert found == defect
        alone, _ = outline_clicked(predictor, photo_rgb, clicks, {defect: both[defect]})
        assert to_json(answer) == to_json(alone)


# ---- only around the clicks ----


@contextmanager
def seen_px(model: ModelHandler) -> Iterator[list[int]]:
    """The pixels of each batch that the network sees inside `with`."""
    seen: list[int] = []
    encoder = model.predictor.engines["crack"].network.encoder
    hook = encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 0].numel()))
    yield seen
    hook.remove()


def test_a_click_reads_the_map_around_it_alone_and_as_the_whole_photo_has_it(model, photo_rgb, spots):
    photo = sound(1024, 1024)
    photo[600:696, 700:860] = photo_rgb
    x, y = middle_xy(spots[0])
    click = (x + 700, y + 600)
    with seen_px(model) as seen:
        body = as_cvat_sends(photo, [click])
        there = np.array(model.answer(parse_request(body, model.settings, ["crack"]))["mask"], bool)
    assert sum(seen) == model.predictor.plain_pixels(1024, 1024, "crack", [click], NEAR_PX)
    cores = find_cores(model.predictor.maps(Pyramid(photo), "crack"), model.weights.configs["crack"])
    masks = [np.zeros(photo.shape[:2], bool) for _ in cores]
    for mask, core in zip(masks, cores):
        paste(mask, core.component)
    (whole,) = (mask for mask in masks if mask[int(click[1]), int(click[0])])
    assert (there & whole).sum() >= 0.95 * (there | whole).sum()
    assert not there[:400].any() and not there[:, :500].any()


def test_a_click_on_a_photo_of_5000_x_5000_is_a_twentieth_of_its_work(model):
    around, everything = (model.predictor.plain_pixels(5000, 5000, "crack", *near) for near in ([[(4000, 3000)], NEAR_PX], []))
    assert 0 < around < everything / 20


def test_a_large_photo_travels_back_as_a_full_mask(client):
    assert clicked(client, sound(1200, 1500), [[1499.5, 600.2]])[600, 1499]


def test_equal_clicks_are_computed_once(model, photo_rgb, spots):
    masks, pixels = [], []
    for count in (1, 100):
        with seen_px(model) as seen:
            clicks = Clicks((tuple(middle_xy(spots[0])),) * count, (), None)
            masks.append(outline_clicked(model.predictor, photo_rgb, clicks, PLAIN)[0]["mask"])
        pixels.append(sum(seen))
    assert np.array_equal(*masks) and pixels[0] == pixels[1] > 0


@pytest.fixture
def slow_model(weights, monkeypatch):
    """Function (seconds per pixel) -> a handler on a machine that takes so long and is given 6000 s."""

    def slowed(seconds_per_px: float) -> ModelHandler:
        model = handler_with(weights, 6000)
        monkeypatch.setattr(model.predictor.throughput, "measure", lambda defect: None)
        monkeypatch.setattr(model.predictor.throughput, "learn", lambda *_: None)
        model.predictor.throughput.fastest = {"crack": seconds_per_px}
        return model

    return slowed


def test_clicks_that_would_be_late_are_refused_before_the_network_is_asked(slow_model):
    photo, clicks = sound(2000, 2000), [(x, y) for x in range(200, 2000, 400) for y in range(200, 2000, 400)]
    model = slow_model(1.0)
    all_px = model.predictor.plain_pixels(2000, 2000, "crack", clicks, NEAR_PX)
    model.predictor.throughput.fastest = {"crack": 18_000 / all_px}
    for body, words in [
        (as_cvat_sends(photo, clicks), r"too slow 1800[01]>6000 s; about 8 clicks would fit; "),
        (as_cvat_sends(photo, clicks) | {"iterations": 1}, r"too slow 7740[01]>6000 s; about 1 clicks would fit; "),
        (as_cvat_sends(photo, [], [], [[0, 0], [2000, 2000]]), r"too slow \d+>6000 s; about 1 megapixels would fit; "),
    ]:
        with seen_px(model) as seen, pytest.raises(RequestError, match=words):
            model.answer(parse_request(body, model.settings, ["crack"]))
        assert not seen


def test_clicks_that_turn_out_to_be_late_are_refused_while_they_are_done(slow_model, monkeypatch):
    """What was measured says a second; then a tile takes 300 s, by the clock."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("defectcam.deadline.time", clock)
    model = slow_model(1e-9)
    done = late_tiles(monkeypatch, model.predictor.engines["crack"], clock, 300)
    clicks = Clicks(tuple((x, y) for x in (300.0, 2000.0, 3500.0, 4500.0) for y in (100.0, 1100.0)), (), None)
    with pytest.raises(TimeLimitError) as told:
        outline_clicked(model.predictor, sound(1200, 4800), clicks, PLAIN, Deadline(6000))
    assert len(done) == 1 and told.value.overrun_s > 300 and re.fullmatch(r"about [1-7] clicks", told.value.fitting)


# ---- bad input ----


@pytest.mark.parametrize("changes, words", [
    ({"pos_points": []}, ["pos_points", "obj_bbox"]),
    ({"pos_points": "10,10"}, ["pos_points", "10,10", "points [x, y]"]),
    ({"pos_points": [[1, 2, 3]]}, ["pos_points", "[x, y]"]),
    ({"pos_points": [[1, "2"]]}, ["pos_points", "[x, y]"]),
    ({"pos_points": [[1, None]]}, ["pos_points"]),
    ({"pos_points": [[True, 1]]}, ["pos_points"]),
    ({"pos_points": [10, 10]}, ["pos_points"]),
    ({"pos_points": [[1, 1]] * 101}, ["pos_points", "100"]),
    ({"pos_points": [[10**400, 1]]}, ["pos_points"]),
    ({"pos_points": [[1e6, 5]]}, ["pos_points has (1000000, 5), but must lie in the photo of 80 x 60 px"]),
    ({"pos_points": [[5, -1e300]]}, ["pos_points has (5, -1e+300), but must lie in the photo of 80 x 60 px"]),
    ({"obj_bbox": [[1e6, 1e6], [2e6, 2e6]]}, ["obj_bbox", "must lie in the photo of 80 x 60 px"]),
    ({"pos_points": [[80.5, 10]]}, ["pos_points", "(80.5, 10)", "80 x 60"]),
    ({"pos_points": [[10, -0.1]]}, ["pos_points", "80 x 60"]),
    ({"neg_points": [[10, 61]]}, ["neg_points", "80 x 60"]),
    ({"neg_points": [[10.2, 10.9]]}, ["pos_points", "neg_points", "(10, 10)"]),
    ({"neg_points": 3}, ["neg_points", "3"]),
    ({"obj_bbox": [[1, 1]]}, ["obj_bbox", "[left, top]"]),
    ({"obj_bbox": [[1, 1], [1, 9]]}, ["obj_bbox", "corners"]),
    ({"obj_bbox": [1, 1, 9, 9]}, ["obj_bbox", "corners"]),
    ({"obj_bbox": [[90, 70], [95, 75]]}, ["obj_bbox", "80 x 60"]),
    ({"iterations": 99}, ["iterations", "99"]),
    ({"snap": True}, ["snap was removed"]),
])  # fmt: skip
def test_bad_input_gets_400_that_names_key_value_and_remedy(client, changes, words):
    body = as_cvat_sends(sound(60, 80), [[10, 10]]) | changes
    answer = client.post("", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert all(word in answer.json()["error"] for word in words), answer.text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_clicks_that_are_nowhere_get_400(client, number):
    image = encoded(sound(8, 8))
    answer = client.post("", content=f'{{"image": "{image}", "pos_points": [[{number}, 3]]}}')
    assert answer.status_code == 400 and "pos_points" in answer.json()["error"]


def test_a_photo_that_cannot_be_processed_gets_400_with_the_reason(client, weights):
    broken = base64.b64decode(encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:3000]
    answer = client.post("", json={"image": base64.b64encode(broken).decode(), "pos_points": [[3, 3]]})
    assert answer.status_code == 400 and "broken" in answer.json()["error"]
    with pytest.raises(RequestError, match="too slow"):
        handler_with(weights, 1e-6).answer(parse_request(as_cvat_sends(sound(64, 64), [[3, 3]]), Settings(), ["crack"]))


def test_an_error_of_the_program_is_not_dressed_up_as_an_outline(client, monkeypatch):
    monkeypatch.setattr("defectcam.interactor.regions", lambda *_: 1 / 0)
    body = as_cvat_sends(sound(8, 8), [[3, 3]])
    answer = client.post("", json=body)
    assert (answer.status_code, list(answer.json())) == (500, ["error"])
    monkeypatch.undo()
    assert client.post("", json=body).status_code == 200


def test_without_positive_clicks_it_is_a_detectors_request(client):
    image = encoded(sound(40, 50))
    for keys in ({"pos_points": None, "neg_points": [[1, 1]]}, {"obj_bbox": [[1, 1], [9, 9]]}):
        assert client.post("", json={"image": image, **keys}).json() == []


def test_the_recorded_call_of_a_real_server_is_answered(client):
    path = DATA / "cvat_exchanges" / "92_function_received_interactor.json"
    photo = DATA / "deepcrack" / "images" / "train_7Q3A9060-1.jpg"
    if not path.exists() or not photo.exists():
        pytest.skip("the recorded exchanges (../shared/data) are not on this machine")
    recorded = json.loads(path.read_text())
    for kind in ("plain", "startswith_box"):
        body = recorded[kind][0]["body"] | {"image": base64.b64encode(photo.read_bytes()).decode()}
        check_answer(client.post("", json=body).json(), 384, 544)


# ---- interactor.yaml ----


def test_the_function_file_is_that_of_the_detector_but_for_what_cvat_shows():
    detector, on_gpu, interactor = (
        yaml.safe_load((ROOT / name).read_text()) for name in ("function.yaml", "function-gpu.yaml", "interactor.yaml")
    )
    for key in ("runtime", "handler", "eventTimeout", "readinessTimeoutSeconds", "triggers", "platform"):
        assert interactor["spec"][key] == detector["spec"][key], key
    assert interactor["spec"]["build"] == on_gpu["spec"]["build"], "it takes the GPU where there is one"
    assert interactor["metadata"]["annotations"]["type"] == "interactor"
    assert all(isinstance(variable["value"], str) for variable in interactor["spec"]["env"])
