"""The try-out page: what its server answers, and the page itself in a real browser."""

import base64
import io
import json
import shutil
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from defectcam.feedback import harvest
from defectcam.feedback.store import InteractionRow, open_store
from defectcam.handler import ModelHandler
from defectcam.predict import proposals_for
from defectcam.proposals import Proposal
from defectcam.pyramid import Pyramid
from defectcam.serve.photos import STEPS, Job, Photos
from defectcam.settings import Settings
from defectcam.training.config import TrainConfig
from defectcam.training.label_files import read_cvat_xml, read_json
from defectcam.training.sources import gather
from tests.conftest import dark_wall, dark_weights, running_function

SPOTS = [(120, 120, 60), (700, 430, 44), (760, 90, 30)]  # x, y, radius of the dark spots on `wall`
# The networks read a thirteenth of the pixels, and are sure that the wall is no defect.
FAST = {"finest_scale": 0.25, "levels": 2, "platt": [2.0, 0.0]}


def encoded(image_rgb: np.ndarray, ending: str = ".png") -> bytes:
    return cv2.imencode(ending, image_rgb[:, :, ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def wall() -> np.ndarray:
    """(560, 880, 3) uint8 RGB with three dark spots, far from one another."""
    return dark_wall(SPOTS, 560, 880)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tryout")


@pytest.fixture(scope="module")
def url(folder):
    """Of the page, with a log."""
    weights = dark_weights(folder / "weights", ["crack"], **FAST)
    with running_function(ADVCAM_WEIGHTS=str(weights), ADVCAM_LOG_DIR=str(folder / "log")) as address:
        yield f"{address}tryout/"


def read(url: str, photo: bytes) -> list[dict]:
    """The lines that the server tells about a photo."""
    with httpx.stream("POST", f"{url}photos", content=photo, timeout=300) as answer:
        return [json.loads(line) for line in answer.iter_lines()]


def test_the_page_gives_the_functions_own_answers_for_every_t_from_one_climb(wall, tmp_path):
    model = ModelHandler(dark_weights(tmp_path, **FAST), "cpu", Settings(), Silent())
    photos, job, defect_config = Photos(model), Job(), model.weights.configs["crack"]
    photo = photos.add(encoded(wall))
    names = [(name, work()) for name, work in photos.stages(photo, job)]
    assert [name for name, _ in names] == ["looking for crack", "climbing for crack"] and job.share > 0.99
    assert len(photo.parts["crack"]) > 1
    counts, areas = set(), set()
    maps = model.predictor.maps(Pyramid(wall), "crack")
    surest = max(one.confidence for one in photo.proposals("crack", defect_config, 0, 0.0, 0.5))
    for threshold, theta in ((surest, 0.5), (0.1, 0.15), (0.6, 0.9)):
        whole = proposals_for(maps, defect_config, STEPS, threshold, theta)
        for steps in STEPS:
            found = photo.proposals("crack", defect_config, steps, threshold, theta)
            assert list(map(as_plain, found)) == list(map(as_plain, whole[steps]))
            counts.add(len(found))
            areas.add(sum(one.component.area_px for one in found))
    assert len(counts) > 1 and len(areas) > 6
    settings = Settings(iterations=1, cam_threshold=0.9)
    assert photos.shapes(photo, 1, settings) == model.propose(wall, settings)


def as_plain(one: Proposal) -> tuple:
    return one.confidence, one.component.box_xyxy, one.component.mask.tobytes()


class Silent:
    info = warn = error = lambda *_: None


def test_answers_in_sentences_headers_and_downloads(url, wall, tmp_path):
    page = httpx.get(url)
    assert "default-src 'none'" in page.headers["content-security-policy"] and "set-cookie" not in page.headers
    assert "unsafe" not in page.headers["content-security-policy"]
    assert all(text not in page.text for text in ("http://", "https://", "<style", "onclick"))
    browser = {"Accept": "text/html"}
    assert httpx.get(url.removesuffix("tryout/"), headers=browser).headers["location"] == "/tryout/"
    assert httpx.get(url.removesuffix("tryout/")).json()["function"] == "advcam-defects"
    assert httpx.post(f"{url}download/cvat", json={}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403

    assert read(url, b"no photo")[-1]["error"].startswith("unknown format: JPEG, PNG")
    *_, last = lines = read(url, encoded(wall))
    assert last["done"] and last["steps"] == list(STEPS)
    assert [0] in [line.get("steps") for line in lines]  # the plain maps can be looked at before the climb ends
    one = f"{url}photos/{lines[0]['id']}"
    refused = httpx.post(f"{one}/proposals", json={"cam_threshold": 7})
    assert refused.status_code == 400 and "cam_threshold is 7" in refused.json()["error"]
    assert httpx.post(f"{one}/proposals", json={"cam_threshold": 0.01}).status_code == 400
    assert httpx.post(f"{url}photos/none/proposals", json={}).json()["gone"]
    assert "must lie in the photo" in httpx.post(f"{one}/click", json={"x": 9000, "y": 1}).json()["error"]
    heat = Image.open(io.BytesIO(httpx.get(f"{one}/heat.png?defect=crack&steps=8").content))
    assert heat.mode == "RGBA" and heat.size == (880, 560) and heat.getpixel((120, 120))[3] > 2 * heat.getpixel((440, 300))[3]

    shapes = httpx.post(f"{one}/proposals", json={"steps": [2], "defects": ["crack"]}).json()["proposals"]["2"]
    record = {"id": lines[0]["id"], "name": "Br\x01cke <€>.png", "width": 880, "height": 560, "shapes": shapes[:2]}
    kinds = ("cvat", "coco", "labelme", "overlay")
    files = {kind: httpx.post(f"{url}download/{kind}", json={"photos": [record]}) for kind in kinds}
    assert {kind: answer.status_code for kind, answer in files.items()} == dict.fromkeys(files, 200)
    for kind, reader in (("cvat", read_cvat_xml), ("coco", read_json), ("labelme", read_json)):
        (tmp_path / kind).write_bytes(files[kind].content)
        (photo,) = reader(tmp_path / kind).photos
        regions = [shape.region(880, 560).area_px for shape in photo.shapes]
        assert photo.name == "Br_cke <€>.png" and regions == [shape["area_px"] for shape in shapes[:2]]
    assert files["labelme"].headers["content-disposition"].endswith("UTF-8''Br_cke%20%253C%E2%82%AC%253E.json")
    assert Image.open(io.BytesIO(files["overlay"].content)).size == (880, 560)
    masks = zipfile.ZipFile(io.BytesIO(httpx.post(f"{url}download/masks", json={"photos": [record]}).content))
    painted = [np.asarray(Image.open(masks.open(name))) for name in sorted(masks.namelist())]
    assert [int((mask == 255).sum()) for mask in painted] == [sum(shape["area_px"] for shape in shapes[:2])]
    assert "nothing is kept" in httpx.post(f"{url}download/coco", json={"photos": []}).json()["error"]
    assert "cvat, coco" in httpx.post(f"{url}download/dance", json={"photos": [record]}).json()["error"]


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser's client is not installed: make install")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        with started.chromium.launch(executable_path=path) as browser:
            yield browser


@pytest.fixture
def page(browser, url):
    with browser.new_context(viewport={"width": 1280, "height": 720}, accept_downloads=True) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if "Content Security" in message.text else None)
        page.goto(url)
        yield page
        assert page.faults == [] and context.cookies() == []


def drop(page, *files: tuple[str, bytes]) -> None:
    """Drop files onto the page as a person does."""
    page.evaluate("window.dropped = new DataTransfer()")
    for name, content in files:
        code = "([name, text]) => dropped.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name))"
        page.evaluate(code, [name, base64.b64encode(content).decode()])
    page.dispatch_event("#stage", "drop", {"dataTransfer": page.evaluate_handle("dropped")})


def wait_for(page, condition: str) -> None:
    """Wait until an expression is true in the page, whose policy forbids what playwright's own way does."""
    deadline = time.monotonic() + 120
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, (condition, page.inner_text("body"))
        page.wait_for_timeout(30)


@contextmanager
def newly_answered(page):
    """Wait until the proposals that are asked for inside are there."""
    before = page.evaluate("current.fresh")
    yield
    wait_for(page, f"current.fresh > {before} && !asked.signal.aborted && canvas.dataset.drawn.endsWith(` ${{current.fresh}}`)")


def test_review_by_keys_and_what_harvest_and_adapt_make_of_it(page, folder, wall, tmp_path):
    wait_for(page, "photos.length === 1 && current.picture")  # the sample is there at once
    assert page.inner_text("#photos").startswith("sample.jpg")
    drop(page, ("<img src=x onerror=alert(1)>.png", encoded(wall)))
    wait_for(page, "current.name.startsWith('<img') && current.state === 'done' && current.shapes.length")
    assert page.locator("#photos img").count() == 0 and "<img src=x onerror" in page.inner_text("#photos")
    wait_for(page, "rows().length === 3 && canvas.dataset.drawn.startsWith('3 ')")

    pixels = "document.getElementById('canvas').toDataURL()"
    drawn = page.evaluate(pixels)
    with newly_answered(page):
        page.focus("#theta")
        page.keyboard.press("End")  # 0.95
    assert page.evaluate(pixels) != drawn and page.inner_text("#theta-value") == "0.95"
    areas = page.evaluate("current.shapes.map((shape) => shape.area_px)")
    with newly_answered(page):
        page.focus("#steps")
        page.keyboard.press("End")  # 8
    assert page.evaluate("current.shapes[0].attributes[1].value") == "8"
    assert page.evaluate("current.shapes.map((shape) => shape.area_px)") != areas
    with newly_answered(page):
        page.focus("#threshold")
        page.keyboard.press("End")
    assert page.evaluate("rows().length") == 0
    page.click("#lines-open")
    assert '"%s", "iterations":8,"threshold":1,"cam_threshold":0.95}' in page.input_value("#line-request")
    assert page.input_value("#line-cvat") == "defectcam cvat set-iterations task:12 8"
    assert "| iterations=8 threshold=1 cam_threshold=0.95'" in page.input_value("#line-deploy")
    page.click("#lines .close")
    with newly_answered(page):
        page.click("#reset")

    page.click("#finish")
    page.wait_for_selector("#error:visible")
    assert "3 proposals are not decided" in page.inner_text("#error")
    page.uncheck("#defects input")
    page.click("#finish")
    wait_for(page, "document.getElementById('error').innerText.includes('crack is switched off')")
    with newly_answered(page):
        page.check("#defects input")
    page.focus("#list")
    drawn = page.evaluate(pixels)
    page.keyboard.press("h")  # the map of crack
    wait_for(page, f"current.heat && {pixels} !== '{drawn}'")
    page.keyboard.press("h")
    for key in "nkrr":  # keeps one, rejects the two others
        page.keyboard.press(key)
    assert page.evaluate("[...current.decided.values()].map((shape) => shape.state).sort()") == ["kept", "rejected", "rejected"]
    x, y = 300, 300  # no defect there, but the click tool always answers
    view = page.evaluate("current.view")
    page.click("#canvas", position={"x": (x - view["x"]) * view["scale"], "y": (y - view["y"]) * view["scale"]})
    wait_for(page, "[...current.decided.values()].some((shape) => shape.state === 'added')")

    with page.expect_download() as download:
        page.click("#download")
    export = tmp_path / download.value.suggested_filename
    download.value.save_as(export)
    page.click("#finish")
    wait_for(page, "current.finished")
    log = folder / "log"
    assert harvested(export, log, tmp_path / "1.db") == {"accepted": 1, "rejected": 2, "miss": 1}
    assert harvested(log / "reviewed" / "cvat.xml", log, tmp_path / "2.db") == {"accepted": 1, "rejected": 2, "miss": 1}

    config = TrainConfig(defect="crack", data=log, sets=("reviewed",))
    (labelled,) = [source.read() for source in gather(config, "train")]
    kept = page.evaluate("decidedAs(current, 'kept', 'added').map((shape) => shape.area_px)")
    assert np.array_equal(labelled.image_rgb, wall) and (labelled.outline == 255).sum() == sum(kept)
    assert not (labelled.outline == 127).any()

    for _ in range(2):  # nothing is left on the photo: which proposals were rejected, its pixels tell
        page.evaluate("choose([...current.decided.values()].find((shape) => shape.state !== 'rejected').key)")
        page.click("#reject")
    page.click("#finish")
    wait_for(page, "current.finished")
    assert harvested(log / "reviewed" / "cvat.xml", log, tmp_path / "3.db") == {"rejected": 3}


def harvested(export: Path, log: Path, database: Path) -> Counter:
    """Outcomes of the interactions that `defectcam harvest` makes of an export of the page."""
    harvest.main(["--export", str(export), "--completed", "1", "--log", str(log), "--db", str(database)])
    with Session(open_store(str(database))) as session:
        return Counter(session.scalars(select(InteractionRow.outcome)))


def test_a_broken_file_two_photos_and_25_megapixels(page, wall):
    wait_for(page, "current?.picture")
    large = cv2.resize(cv2.GaussianBlur(wall, (0, 0), 2), (6200, 4100), interpolation=cv2.INTER_LINEAR)
    drop(page, ("broken.jpg", encoded(wall, ".jpg")[:3000]), ("wall.png", encoded(wall)), ("wall.png", encoded(wall[:, ::-1])))
    wait_for(page, "photos.length === 4 && photos.every((photo) => !['waits', 'read'].includes(photo.state))")
    assert "broken.jpg: broken image" in page.inner_text("#error")
    assert page.evaluate("photos.map((photo) => photo.name)") == ["sample.jpg", "broken.jpg", "wall.png", "wall (2).png"]
    for number, first in ((2, 120), (3, 880 - 120)):
        page.click(f"#photos button:nth-child({number + 1})")
        wait_for(page, "current.fresh > 0 && rows().length")
        xs = page.evaluate("current.shapes[0].points.filter((_, index) => index % 2 === 0)")
        assert min(xs) < first < max(xs)
    page.set_input_files("#files", {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": encoded(large, ".jpg")})
    wait_for(page, "current.name === 'large.jpg' && current.steps.includes(0) && current.shapes.length")
    wait_for(page, "document.querySelector('#stage-name').textContent.includes('climbing')")  # told every quarter of a second
    page.click("#cancel")
    wait_for(page, "current.state === 'cancelled'")
    assert page.evaluate("[current.width, current.height, shownT()]") == [6200, 4100, 0]
    assert page.evaluate("current.picture.width") < 6200
    xs = page.evaluate("current.shapes[0].points.filter((_, index) => index % 2 === 0)")
    assert min(xs) < 120 * 6200 / 880 < max(xs)
    with page.expect_response(lambda answer: "view.jpg?box=" in answer.url and answer.ok):
        page.focus("#canvas")
        for _ in range(6):
            page.keyboard.press("+")
