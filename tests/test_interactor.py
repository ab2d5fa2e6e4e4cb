"""The click tool: the function over real HTTP with its shipped weights, with clicks as CVAT sends them."""

import base64
import io
import json
import logging
import re
import shutil
import time
from types import SimpleNamespace

import cv2
import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from defectcam.interactor import DISC_PX, MARGIN_PX, WINDOW_PX, _grown, _windows, outline_clicked, to_json
from defectcam.proposals import find_components
from defectcam.request import Clicks, RequestError, Settings, parse_request
from defectcam.tiling import TimeLimitError
from defectcam.weights import sha256_of
from model_handler import Maps, ModelHandler
from tests.conftest import DATA, ROOT, running_function

LOG = logging.getLogger("test")


def encoded(image_rgb: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def as_cvat_sends(image_rgb: np.ndarray, pos_points, neg_points=(), obj_bbox=None) -> dict:
    """The four keys of a real server's call, no others."""
    clicks = {"pos_points": list(pos_points), "neg_points": list(neg_points), "obj_bbox": obj_bbox}
    return {"image": encoded(image_rgb), **clicks}


@pytest.fixture(scope="module")
def sample_rgb() -> np.ndarray:
    return np.asarray(Image.open(ROOT / "docs" / "sample.jpg").convert("RGB"))


@pytest.fixture(scope="module")
def crop_rgb(sample_rgb) -> np.ndarray:
    """(240, 320, 3), smaller than a window, with cracks."""
    return np.ascontiguousarray(sample_rgb[330:570, 480:800])


@pytest.fixture(scope="module")
def model() -> ModelHandler:
    return ModelHandler(ROOT / "weights", "cpu", Settings(defects=("crack",)), LOG)


@pytest.fixture(scope="module")
def cracks(model, crop_rgb):
    """All components that the detector has on the crop, as masks of the crop, largest first."""
    masks = []
    for component, _ in model.components(crop_rgb, "crack", Settings(threshold=0.0)):
        x0, y0, x1, y1 = component.box_xyxy
        masks.append(np.zeros(crop_rgb.shape[:2], bool))
        masks[-1][y0 : y1 + 1, x0 : x1 + 1] = component.mask
    assert len(masks) >= 2
    return sorted(masks, key=np.count_nonzero, reverse=True)


@pytest.fixture(scope="module")
def client():
    """A client of a running server of the real function, deployed for cracks."""
    with running_function(ADVCAM_DEFECTS="crack", ADVCAM_DEVICE="cpu") as url:
        with httpx.Client(base_url=url, timeout=300) as client:
            yield client


@pytest.fixture
def changed_weights(tmp_path):
    """Function (fields of crack's manifest, bias to add to rust's head) -> handler; with a bias there is rust too,
    which has crack's tensors and half its scale."""

    def build(crack: dict | None = None, rust_bias: float | None = None) -> ModelHandler:
        manifest = json.loads((ROOT / "weights" / "manifest.json").read_text())
        entry = manifest["defects"]["crack"] | (crack or {})
        shutil.copy(ROOT / "weights" / entry["file"], tmp_path)
        manifest["defects"] = {"crack": entry}
        if rust_bias is not None:
            tensors = load_file(tmp_path / entry["file"])
            tensors["head.bias"] = tensors["head.bias"] + rust_bias
            save_file(tensors, tmp_path / "rust.safetensors")
            rust = {"file": "rust.safetensors", "sha256": sha256_of(tmp_path / "rust.safetensors")}
            manifest["defects"]["rust"] = entry | rust | {"working_scale": entry["working_scale"] / 2}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return ModelHandler(tmp_path, "cpu", Settings(), LOG)

    return build


def middle_xy(mask: np.ndarray, share: float = 0.5) -> list[float]:
    """A click in the middle of the mask's pixel at this share of the way from its top to its bottom."""
    ys, xs = np.nonzero(mask)
    number = int(share * (len(ys) - 1))
    return [xs[number] + 0.5, ys[number] + 0.5]


def has(mask: np.ndarray, xy) -> bool:
    return bool(mask[int(xy[1]), int(xy[0])])


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
    x0, y0, x1, y1 = largest.box_xyxy
    painted = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [np.rint(points).astype(np.int32)], 1).astype(bool)
    region = np.zeros_like(mask)
    region[y0 : y1 + 1, x0 : x1 + 1] = largest.mask
    assert (painted & region).sum() / (painted | region).sum() > 0.7
    return mask


def clicked(client, image_rgb, pos_points, neg_points=(), obj_bbox=None) -> np.ndarray:
    answer = client.post("", json=as_cvat_sends(image_rgb, pos_points, neg_points, obj_bbox))
    assert answer.status_code == 200, answer.text
    return check_answer(answer.json(), *image_rgb.shape[:2])


# ---- what a click gets ----


def test_a_click_gets_the_component_under_it_as_the_detector_has_it(client, crop_rgb, cracks):
    for mask in cracks[:2]:
        assert np.array_equal(clicked(client, crop_rgb, [middle_xy(mask)]), mask)


def test_a_click_beside_a_thin_crack_means_the_crack(client, crop_rgb, cracks):
    reach = cv2.dilate(cracks[0].astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    beside = middle_xy(reach & ~sum(cracks).astype(bool))
    assert np.array_equal(clicked(client, crop_rgb, [beside]), cracks[0])


def test_clicks_on_two_components_get_both(client, crop_rgb, cracks):
    found = clicked(client, crop_rgb, [middle_xy(cracks[0]), middle_xy(cracks[1])])
    assert np.array_equal(found, cracks[0] | cracks[1])


def test_a_negative_click_leaves_its_component_out(client, crop_rgb, cracks):
    ys, xs = np.nonzero(sum(cracks))
    box = [[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]]
    box = [[float(number) for number in corner] for corner in box]
    everything = clicked(client, crop_rgb, [], [], box)
    assert np.array_equal(everything, sum(cracks).astype(bool))
    found = clicked(client, crop_rgb, [], [middle_xy(cracks[0])], box)
    assert np.array_equal(found, sum(cracks[1:]).astype(bool))


def test_a_negative_click_on_the_same_component_cuts_it(client, crop_rgb, cracks):
    positive, negative = middle_xy(cracks[0], 0.1), middle_xy(cracks[0], 0.9)
    found = clicked(client, crop_rgb, [positive], [negative])
    assert has(found, positive) and not has(found, negative)
    assert not (found & ~cracks[0]).any() and 0 < found.sum() < cracks[0].sum()
    assert len(find_components(found)) == 1  # what hangs together with the positive click


def test_a_box_ends_the_outline(client, crop_rgb, cracks):
    x, y = middle_xy(cracks[0])
    found = clicked(client, crop_rgb, [[x, y]], [], [[x + 20.2, y + 20.7], [x - 20.2, y - 20.7]])
    ys, xs = np.nonzero(found)
    assert has(found, (x, y)) and xs.min() >= x - 22 and xs.max() <= x + 22 and np.ptp(ys) <= 44
    beyond = middle_xy(cracks[0], 0.95)
    assert has(clicked(client, crop_rgb, [[x, y], beyond], [], [[x - 5, y - 5], [x + 5, y + 5]]), beyond)


@pytest.mark.parametrize("xy", [[0, 0], [40, 50], [80.0, 60.0], [79.99, 0.01]])
def test_where_nothing_is_found_a_small_disc_is_answered(client, xy):
    plain = np.full((60, 80, 3), 128, np.uint8)
    found = clicked(client, plain, [xy])
    assert has(found, (min(xy[0], 79), min(xy[1], 59))) and found.sum() < 80
    assert clicked(client, plain, [], [], [[10, 10], [30, 30]])[20, 20]


def test_what_the_classifier_overlooks_is_taken_from_the_image(changed_weights, crop_rgb, cracks):
    """Divided by such a maximum the map proposes nothing anywhere; snapping still finds the crack in the disc."""
    blind = changed_weights(crack={"cam_max": [1e8]})
    assert not blind.components(crop_rgb, "crack", Settings(threshold=0.0, iterations=0))
    x, y = middle_xy(cracks[0])
    answer = outline_clicked(blind, crop_rgb, Clicks(((x, y),), (), None), Settings(iterations=0))
    found = check_answer(answer, *crop_rgb.shape[:2])
    assert (found & cracks[0]).sum() > 0.5 * found.sum() > 25  # the small disc would have 49 px
    ys, xs = np.nonzero(found)
    fact = blind.weights.facts["crack"]
    farthest = (DISC_PX + 2 + fact.snap.get("margin_px", 0)) / fact.working_scale
    assert max(abs(xs - x).max(), abs(ys - y).max()) <= farthest


@pytest.mark.parametrize("height, width", [(1, 1), (1, 300), (3, 2)])
def test_tiny_photos_are_answered(client, height, width):
    clicked(client, np.zeros((height, width, 3), np.uint8), [[width / 2, height / 2]])


def test_on_a_real_photo_a_click_gets_the_crack(photos, model):
    hits = 0
    for _, image_rgb, mask in photos("deepcrack", "val", "crack", limit=3):
        image_rgb, mask = np.ascontiguousarray(image_rgb[:320, :320]), mask[:320, :320]
        if not mask.any():
            continue
        xy = middle_xy(mask)
        answer = outline_clicked(model, image_rgb, Clicks((tuple(xy),), (), None), model.settings)
        found = check_answer(answer, *image_rgb.shape[:2])
        wide = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
        hits += (found & wide).sum() > 0.5 * found.sum()
    assert hits >= 2


# ---- which defect ----


@pytest.mark.parametrize("bias, defect", [(-30.0, "crack"), (30.0, "rust")])
def test_the_classifiers_at_the_click_decide_which_defect_it_is(
    changed_weights, crop_rgb, cracks, caplog, bias, defect
):
    """Rust has crack's network here, at half its scale, and a classifier that is surer of itself or less sure."""
    handler = changed_weights(rust_bias=bias)
    click, anything = Clicks((tuple(middle_xy(cracks[0])),), (), None), Settings()
    caplog.set_level(logging.INFO)
    answer = outline_clicked(handler, crop_rgb, click, anything)
    assert f"{defect} clicked" in caplog.text
    answer = to_json(answer)
    check_answer(json.loads(answer), *crop_rgb.shape[:2])
    assert answer == to_json(outline_clicked(handler, crop_rgb, click, Settings(defects=(defect,))))
    other = {"crack": "rust", "rust": "crack"}[defect]
    assert answer != to_json(outline_clicked(handler, crop_rgb, click, Settings(defects=(other,))))
    caplog.clear()
    in_box = outline_clicked(handler, crop_rgb, Clicks((), (), (0.0, 0.0, 320.0, 240.0)), anything)
    assert f"{defect} clicked" in caplog.text and np.any(in_box["mask"])


# ---- only around the clicks ----


def test_a_click_on_a_photo_of_5000_x_5000_leaves_the_rest_alone(model, crop_rgb, cracks):
    photo = np.full((5000, 5000, 3), 128, np.uint8)
    photo[3000:3240, 4000:4320] = crop_rgb
    seen_px = []
    hook = model.weights.networks["crack"].encoder.register_forward_pre_hook(
        lambda _, inputs: seen_px.append(inputs[0].shape[2] * inputs[0].shape[3])
    )
    x, y = middle_xy(cracks[0])
    body = as_cvat_sends(photo, [[x + 4000, y + 3000]])
    started = time.monotonic()
    answer = model.answer(parse_request(json.dumps(body), model.settings, ["crack"]))
    hook.remove()
    assert time.monotonic() - started < 60  # a hundredth of the photo, and its decoding
    assert 0 < sum(seen_px) < 0.03 * 25e6
    there = np.array(answer["mask"], bool)
    assert there.shape == (5000, 5000) and not there[:2700].any() and not there[:, :3700].any()
    overlap = there[3000:3240, 4000:4320] & cracks[0]
    assert overlap.sum() > 0.6 * cracks[0].sum()  # the crop sees no edge where the photo turns grey
    part = as_cvat_sends(photo[2552:3752, 3552:4752], [[x + 448, y + 448]])
    same = np.array(model.answer(parse_request(json.dumps(part), model.settings, ["crack"]))["mask"], bool)
    assert np.array_equal(there[2552:3752, 3552:4752], same)
    assert json.loads(json.dumps(answer["points"])) == [list(point) for point in answer["points"]]


def test_a_photo_of_5000_x_5000_travels_back_as_a_full_mask(client):
    mask = clicked(client, np.full((5000, 5000, 3), 128, np.uint8), [[4999.5, 2500.2]])
    assert mask[2500, 4999]


def test_windows_cover_the_clicks_and_little_else():
    rng = np.random.default_rng(4)
    assert _windows([(10, 10), (4990, 4990)], 1.0, 5000, 5000) == [(0, 0, 272, 272), (4728, 4728, 5000, 5000)]
    assert len(_windows([(1000, 1000), (1100, 1050), (1200, 1000)], 1.0, 5000, 5000)) == 1
    for scale in (1.0, 0.5, 0.3):
        side = WINDOW_PX / scale + 40
        clicks = [tuple(int(number) for number in xy) for xy in rng.integers(0, 5000, (30, 2))]
        windows = _windows(clicks, scale, 5000, 5000)
        for x, y in clicks:
            assert any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in windows)
        assert sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in windows) <= len(clicks) * side**2


@pytest.fixture
def seen_px(model):
    """Pixels that the networks have seen so far, per network."""
    seen = {"classifier": 0, "outline": 0}
    hooks = [
        network.encoder.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: seen[name] + inputs[0][0, 0].numel()})
        )
        for name, network in (("classifier", model.weights.networks["crack"]), ("outline", model.weights.outlines["crack"]))
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_equal_clicks_and_clicks_of_one_place_are_computed_once(model, crop_rgb, cracks, seen_px):
    def clicked_xy(points) -> np.ndarray:
        seen_px.update(classifier=0, outline=0)
        return outline_clicked(model, crop_rgb, Clicks(tuple(map(tuple, points)), (), None), model.settings)["mask"]

    for xy in (middle_xy(cracks[0]), [1.5, 1.5]):  # on a crack, and where only the disc is left
        once = clicked_xy([xy])
        one_px = dict(seen_px)
        assert np.array_equal(clicked_xy([xy] * 100), once) and seen_px == one_px
    grid = [[x + 0.5, y + 0.5] for x in range(0, 320, 32) for y in range(0, 240, 24)]
    found = clicked_xy(grid)
    assert all(found[int(y), int(x)] or found[max(0, int(y) - 5) : int(y) + 6, max(0, int(x) - 5) : int(x) + 6].any()
               for x, y in grid)  # fmt: skip
    assert seen_px["classifier"] <= one_px["classifier"] and seen_px["outline"] < 4 * crop_rgb[..., 0].size


def test_clicks_that_would_be_late_are_refused_before_any_network_is_asked(model, monkeypatch, seen_px):
    """A hundred clicks all over a photo of 16 megapixels, where a window takes five seconds."""
    monkeypatch.setattr(model.pace, "measure", lambda name: None)
    monkeypatch.setattr(model.pace, "fastest", dict.fromkeys(model.pace.fastest, 5 / (WINDOW_PX + 2 * MARGIN_PX) ** 2))
    photo = np.full((4000, 4000, 3), 128, np.uint8)
    everywhere = [[x * 400 + 200, y * 400 + 200] for x in range(10) for y in range(10)]
    body = as_cvat_sends(photo, everywhere)
    with pytest.raises(RequestError, match=r"too slow \d+>100 s; about \d+ clicks would") as told:
        model.answer(parse_request(body, model.settings, ["crack"]))
    fitting = int(re.search(r"about (\d+) clicks", str(told.value))[1])
    assert 20 < fitting < 60 and seen_px == {"classifier": 0, "outline": 0}
    box = as_cvat_sends(photo, [], [], [[0, 0], [4000, 4000]])
    with pytest.raises(RequestError, match=r"too slow \d+>\d+ s; about \d+ megapixels of the box would fit"):
        model.answer(parse_request(box, model.settings, ["crack"]))
    assert seen_px["classifier"] == 0
    model.answer(parse_request(as_cvat_sends(photo, [[5, 5]] * 100), model.settings, ["crack"]))


def test_clicks_that_turn_out_to_be_late_are_refused_while_they_are_done(model, monkeypatch, crop_rgb, cracks):
    """The pace was measured when nothing else ran; now a window takes 30 s, says the clock."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("defectcam.pace.time", clock)
    done = []

    def maps(image, *_):
        clock.now += 30
        done.append(image)
        return Maps(*[np.zeros(image.shape[:2], np.float32)] * 2)

    monkeypatch.setattr(model, "maps", maps)
    photo = np.full((1200, 4800, 3), 128, np.uint8)
    clicks = Clicks(tuple((x, y) for x in (300.0, 2000.0, 3500.0, 4500.0) for y in (100.0, 1100.0)), (), None)
    with pytest.raises(TimeLimitError) as told:
        outline_clicked(model, photo, clicks, model.settings, deadline=100.0)
    assert len(done) == 1 and told.value.late_s > 30 and re.fullmatch(r"about [1-5] clicks", told.value.fitting)


def test_a_window_of_a_photo_has_the_photos_scores(model, sample_rgb):
    height, width = sample_rgb.shape[:2]
    plain = model.effective("crack", Settings(iterations=0))
    whole = model.maps(np.ascontiguousarray(sample_rgb[200:, 200:]), "crack", plain).score
    x0, y0, x1, y1 = window = (500, 300, 600, 380)
    left, top, right, bottom = _grown(window, MARGIN_PX, 1.0, width - 200, height - 200)
    crop = np.ascontiguousarray(sample_rgb[200 + top : 200 + bottom, 200 + left : 200 + right])
    part = model.maps(crop, "crack", plain).score
    assert np.allclose(part[y0 - top : y1 - top, x0 - left : x1 - left], whole[y0:y1, x0:x1], atol=1e-3)


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
])  # fmt: skip
def test_bad_input_gets_400_that_names_key_value_and_remedy(client, changes, words):
    body = as_cvat_sends(np.full((60, 80, 3), 128, np.uint8), [[10, 10]]) | changes
    answer = client.post("", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert all(word in answer.json()["error"] for word in words), answer.text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_clicks_that_are_nowhere_get_400(client, number):
    image = encoded(np.zeros((8, 8, 3), np.uint8))
    answer = client.post("", content=f'{{"image": "{image}", "pos_points": [[{number}, 3]]}}')
    assert answer.status_code == 400 and "pos_points" in answer.json()["error"]


def test_a_photo_that_cannot_be_processed_gets_400_with_the_reason(client, model):
    broken = base64.b64decode(encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:3000]
    answer = client.post("", json={"image": base64.b64encode(broken).decode(), "pos_points": [[3, 3]]})
    assert answer.status_code == 400 and "broken" in answer.json()["error"]
    hasty = ModelHandler(ROOT / "weights", "cpu", Settings(), LOG, time_limit_s=1e-6)
    body = as_cvat_sends(np.zeros((64, 64, 3), np.uint8), [[3, 3]])
    with pytest.raises(RequestError, match="too slow"):
        hasty.answer(parse_request(body, Settings(), ["crack"]))


def test_an_error_of_the_program_is_not_dressed_up_as_an_outline(client, monkeypatch):
    monkeypatch.setattr("model_handler.binarise", lambda *_: 1 / 0)
    body = as_cvat_sends(np.zeros((8, 8, 3), np.uint8), [[3, 3]])
    answer = client.post("", json=body)
    assert (answer.status_code, list(answer.json())) == (500, ["error"])
    monkeypatch.undo()
    assert client.post("", json=body).status_code == 200


def test_without_positive_clicks_it_is_a_detectors_request(client):
    image = encoded(np.full((40, 50, 3), 128, np.uint8))
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
    detector, interactor = (
        yaml.safe_load((ROOT / name).read_text()) for name in ("function.yaml", "interactor.yaml")
    )
    for key in ("runtime", "handler", "eventTimeout", "readinessTimeoutSeconds", "build", "triggers", "platform"):
        assert interactor["spec"][key] == detector["spec"][key], key
    assert interactor["metadata"]["annotations"]["type"] == "interactor"
    assert all(isinstance(variable["value"], str) for variable in interactor["spec"]["env"])
