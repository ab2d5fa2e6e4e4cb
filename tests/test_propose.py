"""`defectcam propose` on a folder of photos: its answers, files, resumption and Ray."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from shapely import Polygon

pytest.importorskip("cvat_sdk", reason="cvat-sdk is not installed: pip install '.[bulk]'")

from cvat_sdk.masks import decode_mask  # noqa: E402

from defectcam.bulk import propose  # noqa: E402
from defectcam.bulk.exports import region_of_answer, write_coco, write_cvat_xml  # noqa: E402
from defectcam.bulk.parts import parts_of  # noqa: E402
from defectcam.deadline import NO_DEADLINE  # noqa: E402
from defectcam.feedback.cvat_export import CvatExport  # noqa: E402
from defectcam.handler import cvat_shape  # noqa: E402
from defectcam.proposals import Proposal, find_components  # noqa: E402
from defectcam.regions import region_of  # noqa: E402
from defectcam.request import parse_request  # noqa: E402
from defectcam.settings import SECRETS  # noqa: E402
from tests.conftest import ROOT, dark_wall, dark_weights  # noqa: E402

CRACKED, TWIN, BROKEN = "a/b/crack & 'rüst'.JPG", "same.jpg", "a/broken.jpg"
NAMES = [CRACKED, BROKEN, TWIN, "same.png"]
FEW = dict(ADVCAM_DEFECTS="crack", ADVCAM_DEVICE="cpu", OMP_NUM_THREADS="1", RAY_worker_niceness="0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return dark_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def with_openvino(with_graph, tmp_path_factory) -> dict[str, str]:
    """Environment for weights with a graph: a process that runs OpenVINO starts sooner than one that loads PyTorch."""
    return {"ADVCAM_WEIGHTS": str(with_graph(tmp_path_factory.mktemp("openvino")))}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Four photos in subfolders, one of them cut off, and files that are no photos."""
    folder = tmp_path_factory.mktemp("original") / "photos"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    wall_bgr = dark_wall([(60, 60, 40), (140, 110, 14), (180, 30, 10)], 160, 200)[0][..., ::-1]
    jpeg = cv2.imencode(".jpg", wall_bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    (folder / CRACKED).write_bytes(jpeg)
    (folder / TWIN).write_bytes(cv2.imencode(".jpg", wall_bgr[:64, :96])[1].tobytes())
    (folder / "same.png").write_bytes(cv2.imencode(".png", wall_bgr[-64:, -64:])[1].tobytes())
    (folder / BROKEN).write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "notes.txt").write_text("no photo")
    (folder / ".thumbnails" / "same.jpg").write_bytes(jpeg)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy for tests that change it; times of change are the original's."""
    return shutil.copytree(original, tmp_path / "photos")


@pytest.fixture(autouse=True, scope="module")
def environment(weights):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**FEW, "ADVCAM_WEIGHTS": str(weights)}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def proposer(with_openvino) -> propose.Proposer:
    with patch.dict(os.environ, with_openvino):
        return propose.Proposer({})


@pytest.fixture(scope="module")
def finished(original, with_openvino, tmp_path_factory) -> tuple[Path, str, str]:
    """(--out, what was printed, what was printed as errors) of a run in one go."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as errors:
        with patch.dict(os.environ, with_openvino):
            assert run(original, "--out", out, "--iterations", 1) == 1, "one photo is broken"
    return out, printed.getvalue(), errors.getvalue()


def run(*arguments) -> int | str:
    """What the command ends with in this process: a status, or the message of an error."""
    with pytest.raises(SystemExit) as end:
        propose.main([str(argument) for argument in arguments])
    return end.value.code


def files(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Relative path -> checksum of all files below."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def record(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.json").read_text())


def test_every_photo_gets_the_functions_answer_and_a_picture(original, finished, proposer):
    out, printed, errors = finished
    names = {f"{name}.json" for name in NAMES} | {f"overlays/{name}.jpg" for name in NAMES if name != BROKEN}
    assert set(files(out)) == names | {"cvat.xml", "coco.json", "labels.json", "shapes.csv", "summary.json"}
    for name in NAMES:
        body = {"image": base64.b64encode((original / name).read_bytes()).decode(), "iterations": 1}
        request = parse_request(body, proposer.model.settings, proposer.model.defects)
        assert record(out, name)["shapes"] == proposer.model.answer(request)
    cracked = record(out, CRACKED)
    assert cracked["shapes"] and (cracked["width"], cracked["height"]) == (200, 160)
    overlay, photo = (cv2.imread(str(path)) for path in (out / "overlays" / f"{CRACKED}.jpg", original / CRACKED))
    assert overlay.shape == photo.shape and np.abs(overlay.astype(int) - photo).max() > 60
    reason = record(out, BROKEN)["shapes"][0]["attributes"][0]["value"]
    summary = json.loads((out / "summary.json").read_text())
    count = sum(len(record(out, name)["shapes"]) for name in NAMES if name != BROKEN)
    assert summary == {
        "photos": 4, "proposals": {"crack": count}, "unprocessed": {BROKEN: reason}, "notice": {}, "not read": {}
    }  # fmt: skip
    assert f"{count} crack" in printed and "same.*" in printed
    assert f"{BROKEN}: {reason}" in errors and "cut off" in reason


def test_a_run_goes_on_where_it_was_killed(original, finished, with_openvino, tmp_path):
    os.environ |= with_openvino
    out = tmp_path / "out"
    command = [sys.executable, "-m", "defectcam", "propose", original, "-o", out, "--iterations", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = out / f"{CRACKED}.json"
    while not first.exists():
        assert process.poll() is None, "it ended without results"
        time.sleep(0.01)
    process.kill()
    process.wait()
    half = out / f"{TWIN}.json.part"
    half.write_text('{"name": "sa')  # what a kill in the middle of writing leaves
    before = first.stat().st_mtime_ns
    assert run(original, "-o", out, "--iterations", 1) == 1
    assert first.stat().st_mtime_ns == before, "what was done is not done again"
    assert files(out) == files(finished[0]), "half a file is overwritten"


def test_what_is_done_again(folder, weights, tmp_path, monkeypatch):
    """What counts are the photo, weights and settings; a photo that could not be processed is always tried again."""
    out = tmp_path / "out"
    (folder / CRACKED).unlink()

    def redone(*arguments) -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
        run(folder, "--out", out, *arguments)
        return {name for name in NAMES if (path := out / f"{name}.json").exists() and path.stat().st_mtime_ns != before.get(path)}

    good = {TWIN, "same.png"}
    assert redone("--iterations", 0) == good | {BROKEN}
    assert redone("--iterations", 0) == {BROKEN}
    monkeypatch.setenv("ADVCAM_CAM_THRESHOLD", "0.2")
    assert redone("--iterations", 0) == good | {BROKEN}
    others = shutil.copytree(weights, tmp_path / "weights")
    manifest = json.loads((others / "manifest.json").read_text())
    manifest["defects"]["crack"]["threshold"] = 0.45
    (others / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(others))
    assert redone("--iterations", 0) == good | {BROKEN}
    os.utime(folder / TWIN, ns=(1, 1))
    (folder / BROKEN).write_bytes((folder / TWIN).read_bytes())
    assert redone("--iterations", 0) == {TWIN, BROKEN}
    (out / f"{TWIN}.json").write_text("[1]")
    assert redone("--iterations", 0) == {TWIN}
    (folder / TWIN).unlink()
    assert run(folder, "--out", out, "--iterations", 0) == 0, "now all are processed"
    assert TWIN not in (out / "cvat.xml").read_text(), "photos that are gone are left out"


def test_ctrl_c_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    store = propose.Results.store

    def store_one_and_interrupt(results, made):
        store(results, made)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(propose.Results, "store", store_one_and_interrupt)
        assert run(folder, "--out", tmp_path / "out", "--iterations", 0) == 130
    assert "4 of 4 photos left; the same command goes on" in capsys.readouterr().err


def watch_processes(told: set[bytes], stop: threading.Event) -> None:
    """Collect command lines and environments of all processes until it is time to stop."""
    while not stop.wait(0.1):
        for path in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                told.add(path.read_bytes())


def test_rays_workers_make_the_very_same_files(original, finished, with_openvino, tmp_path, monkeypatch):
    """And neither their command lines and environments nor Ray's logs have a secret of this process."""
    os.environ |= with_openvino
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[bulk]'")
    secret = secrets.token_hex()  # which no other run of these tests has
    for name in SECRETS:
        monkeypatch.setenv(name, secret)
    told, stop = set(), threading.Event()
    watch = threading.Thread(target=watch_processes, args=(told, stop))
    with tempfile.TemporaryDirectory() as logs:  # no longer path: sockets lie there
        monkeypatch.setenv("RAY_TMPDIR", logs)
        watch.start()
        try:
            end = run(original, "--out", tmp_path / "out", "--iterations", 1, "--workers", 1)
        finally:
            stop.set()
            watch.join()
        written = b"".join(path.read_bytes() for path in Path(logs).rglob("*") if path.is_file())
    lines = [line for line in told if b"ray" in line]
    assert not [text for text in told if secret.encode() in text] and secret.encode() not in written
    if "timed out during startup" in str(end):
        pytest.skip(f"Ray gives itself 30 s to start, too few on a machine as busy as this: {end}")
    assert end == 1
    assert any(b"runtime_env" in line or b"ray::" in line for line in lines) and b"ADVCAM_DEFECTS" in written
    assert files(tmp_path / "out") == files(finished[0])


def test_a_cluster_that_is_not_there_is_named(folder, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[bulk]'")
    monkeypatch.setenv("RAY_ADDRESS", "no-scheme://nowhere")
    end = run(folder, "--out", tmp_path / "out", "--iterations", 0, "--workers", 1)
    assert "RAY_ADDRESS" in end and "no-scheme" in end


def test_workers_get_a_gpu_each_or_a_cpu_each_but_no_more_than_there_are():
    assert propose.resources_of_worker({"CPU": 16.0, "GPU": 4.0}, 4, None) == {"num_gpus": 1}
    assert propose.resources_of_worker({"CPU": 16.0, "GPU": 4.0}, 16, "cpu") == {"num_cpus": 1}
    assert propose.resources_of_worker({"CPU": 16.0}, 16, None) == {"num_cpus": 1}
    for there, kind in (({"CPU": 16.0, "GPU": 4.0}, "4 GPUs"), ({"CPU": 4.0}, "4 CPUs")):
        with pytest.raises(propose.ProposeError, match=f"--workers is 5, but Ray has {kind}: give fewer"):
            propose.resources_of_worker(there, 5, None)


def test_without_ray_the_remedy_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert ".[bulk]" in run(folder, "--out", tmp_path / "out", "--workers", 2)


@pytest.mark.parametrize("given, words", [
    (["{}/missing"], ["missing", "no folder"]),
    (["{}/empty"], ["no photo below", ".jpg"]),
    (["{}/photos", "--out", "{}/photos"], ["--out", "photos", "a folder of its own"]),
    (["{}/photos", "--out", "{}"], ["--out", "a folder of its own"]),
    (["{}/photos", "--iterations", "51"], ["ITERATIONS", "51", "0 to 50"]),
    (["{}/photos", "--defects", "moss"], ["DEFECTS", "moss", "crack"]),
    (["{}/photos", "--workers", "0"], ["--workers", "'0'", "from 1 on"]),
    (["{}/photos", "--mm-per-px", "0"], ["--mm-per-px", "'0'", "above 0"]),
    (["{}/raw"], ["no photo below", "not read: 1 DNG", "save it as JPEG"]),
])  # fmt: skip
def test_bad_input_is_named(folder, tmp_path, capsys, given, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "DJI_0001.DNG").write_bytes(b"II*\0")
    assert run(*(argument.format(tmp_path) for argument in given)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_what_was_left_out_is_told_beside_the_proposals(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("defectcam.handler.MAX_OUTLINE_PX", 230)  # the largest spot's is longer
    (folder / BROKEN).unlink()
    out = tmp_path / "out"
    assert run(folder, "--out", out, "--iterations", 0) == 0, "the photo is processed"
    shapes = record(out, CRACKED)["shapes"]
    *proposals, notice = shapes
    reason = notice["attributes"][0]["value"]
    assert proposals and {shape["label"] for shape in proposals} == {"crack"} and notice["label"] == "notice"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["notice"][CRACKED] == reason and "too ragged: crack" in reason and summary["unprocessed"] == {}
    total = sum(shape["type"] != "tag" for name in NAMES if name != BROKEN for shape in record(out, name)["shapes"])
    assert summary["proposals"] == {"crack": total}
    assert f"note: {CRACKED}: {reason}" in capsys.readouterr().out
    (tag,) = [tag for tag in ElementTree.parse(out / "cvat.xml").getroot().iter("tag") if tag.get("label") == "notice"]
    assert tag.findtext("attribute") == reason
    assert len(json.loads((out / "coco.json").read_text())["annotations"]) == total
    assert (out / "overlays" / f"{CRACKED}.jpg").exists()
    before = (out / f"{CRACKED}.json").stat().st_mtime_ns
    run(folder, "--out", out, "--iterations", 0)
    assert (out / f"{CRACKED}.json").stat().st_mtime_ns == before, "such a photo is done"


def test_a_defect_of_ones_own_has_its_label_in_every_file(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(dark_weights(tmp_path / "weights", ["Überzug & <1>"])))
    monkeypatch.delenv("ADVCAM_DEFECTS")
    out = tmp_path / "out"
    assert run(folder, "--out", out) in (0, 1)
    assert "label" not in capsys.readouterr().err
    labels = json.loads((out / "labels.json").read_text())
    assert [label["name"] for label in labels] == ["Überzug & <1>", "unprocessed", "notice"]
    assert labels[0]["color"].startswith("#") and len(labels[0]["attributes"]) == 3
    xml = ElementTree.parse(out / "cvat.xml")
    assert [name.text for name in xml.iterfind("meta/task/labels/label/name")][0] == "Überzug & <1>"
    coco = json.loads((out / "coco.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["Überzug & <1>"]
    shown = {polygon.get("label") for polygon in xml.iterfind("image/polygon")}
    assert shown == {"Überzug & <1>"} and coco["annotations"]


def test_names_that_no_xml_can_hold_are_refused(folder, tmp_path, capsys):
    (folder / "new\nline.jpg").write_bytes(b"x")
    assert run(folder, "--out", tmp_path / "out") == 2
    assert "rename" in capsys.readouterr().err


def test_results_within_the_folder_are_no_photos(folder):
    out = folder / "results"
    (out / "overlays").mkdir(parents=True)
    shutil.copy(folder / TWIN, out / "overlays" / "old.jpg")
    photos, others = propose.find_photos(folder, out)
    assert [photo.name for photo in photos] == NAMES and others == []


def shown(out: Path, name: str) -> np.ndarray:
    """Where a photo of `out` has proposals, (H, W) bool."""
    photo = record(out, name)
    regions = [region_of_answer(shape, photo["width"], photo["height"]) for shape in photo["shapes"] if "points" in shape]
    mask = np.zeros((photo["height"], photo["width"]), bool)
    for region in regions:
        x0, y0, x1, y1 = region.box_xyxy
        mask[y0 : y1 + 1, x0 : x1 + 1] |= region.mask
    return mask


@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_a_photo_larger_than_the_function_takes_is_processed_in_parts(finished, original, tmp_path, monkeypatch, shape):
    """The large spot lies across the parts and is one shape; all files have the photo in its full size."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    shutil.copy(original / CRACKED, folder / "large.jpg")
    monkeypatch.setenv("ADVCAM_MAX_MEGAPIXELS", "0.015")  # the photo has 0.032
    monkeypatch.setenv("ADVCAM_SHAPE", shape)
    monkeypatch.setenv("ADVCAM_LOG_DIR", str(tmp_path / "log"))
    assert run(folder, "--out", out, "--iterations", 1) == 0
    whole, parts = shown(finished[0], CRACKED), shown(out, "large.jpg")
    assert (whole & parts).sum() / (whole | parts).sum() > 0.8
    assert len(record(out, "large.jpg")["shapes"]) == len(record(finished[0], CRACKED)["shapes"])
    names = [attribute["value"] for one in record(out, "large.jpg")["shapes"] for attribute in one["attributes"]][2::3]
    assert len(set(names)) == len(names)
    image = ElementTree.parse(out / "cvat.xml").find("image")
    assert (image.get("width"), image.get("height")) == ("200", "160") and image.find(shape) is not None
    assert cv2.imread(str(out / "overlays" / "large.jpg.jpg")).shape == (160, 200, 3)
    (line,) = "".join(path.read_text() for path in (tmp_path / "log").iterdir()).splitlines()
    assert json.loads(line)["width"] == 200, "the log has the photo, not its parts"


def test_parts_cover_a_photo_and_overlap():
    for height, width, most in ((160, 200, 15_000), (9000, 21_000, 64_000_000), (300, 100_000, 1_000_000), (7, 1000, 100)):
        boxes = parts_of(height, width, most)
        covered = np.zeros((height, width), np.uint8)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and (x1 - x0) * (y1 - y0) <= most
            covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1 and len(boxes) < 4 * height * width / most + 4
        assert covered.max() > 1


def test_photos_beyond_all_limits_and_files_that_are_not_read_are_told(tmp_path, capsys, monkeypatch):
    """A header of 400 megapixels without pixels, as a panorama that was cut off: its frame in CVAT gets the tag."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    head = struct.pack(">IIBBBBB", 40_000, 10_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    (folder / "panorama.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 99) + b"IDAT")
    for name in ("DJI_1.DNG", "DJI_2.dng", "map.jp2"):
        (folder / name).write_bytes(b"x")
    (folder / "._IMG_1.jpg").write_bytes(b"what macOS puts beside photos")
    with monkeypatch.context() as patch:
        patch.setattr(propose, "check_memory", lambda *_: None)  # a test machine may have less
        patch.setattr(propose, "LARGEST_PX", 10**8)  # nor is it to be decoded here
        assert run(folder, "--out", out, "--iterations", 0) == 1
    image = ElementTree.parse(out / "cvat.xml").find("image")
    assert (image.get("name"), image.get("width"), image.get("height")) == ("panorama.png", "40000", "10000")
    assert image.find("tag").get("label") == "unprocessed"
    errors = capsys.readouterr().err
    assert f"not read in {folder}: 2 DNG, 1 JP2: save it as JPEG, PNG or TIFF" in errors
    assert json.loads((out / "summary.json").read_text())["not read"] == {".dng": 2, ".jp2": 1}
    table = (out / "shapes.csv").read_text(encoding="utf-8-sig").splitlines()
    assert table[1:] == ["panorama.png,unprocessed,,,,,,"]


def test_the_table_has_every_shape_in_px_and_mm(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, "--out", out, "--iterations", 0, "--mm-per-px", 0.5)
    rows = list(csv.DictReader((out / "shapes.csv").read_text(encoding="utf-8-sig").splitlines()))
    shapes = [(name, shape) for name in NAMES for shape in record(out, name)["shapes"]]
    assert len(rows) == len(shapes) > 3
    for row, (name, shape) in zip(rows, shapes):
        assert (row["photo"], row["defect"]) == (name, shape["label"])
        if shape["type"] == "tag":
            assert name == BROKEN and set(list(row.values())[2:]) == {""}
            continue
        photo = record(out, name)
        area = region_of_answer(shape, photo["width"], photo["height"]).area_px
        assert int(row["area_px"]) == area and float(row["area_mm2"]) == area / 4
        assert float(row["largest_width_mm"]) == pytest.approx(float(row["largest_width_px"]) / 2, abs=0.03)
        assert 0 < float(row["mean_width_px"]) <= float(row["largest_width_px"]) and row["proposal"] and row["confidence"]
        assert float(row["length_mm"]) == pytest.approx(float(row["length_px"]) / 2, abs=0.03)
    run(folder, "--out", out, "--iterations", 0)
    assert "mm" not in (out / "shapes.csv").read_text(), "the scale is no part of an answer"


# ---- the files for CVAT, read by other readers ----


def ring_mask() -> np.ndarray:
    """(90, 120) bool: a ring, whose hole makes a bridge, a wide bar at the photo's edge and a crack of 3 px."""
    canvas = np.zeros((90, 120), np.uint8)
    cv2.ellipse(canvas, (60, 45), (30, 20), 20, 0, 360, 1, 9)
    canvas[60:90, 0:12] = 1
    cv2.line(canvas, (100, 5), (115, 85), 1, 3)
    return canvas > 0


@pytest.fixture(params=["polygon", "mask"])
def exported(request, tmp_path, proposer):
    """(shape type, record, components, path of the XML, path of the JSON): one photo with shapes and others with tags."""
    components = find_components(ring_mask())
    settings = {"iterations": 4, "shape": request.param, "tolerance_px": 1.0, "hole_share": 0.0}
    shapes = [
        cvat_shape(Proposal(component, 0.8), "crack", f"{rank:08x}", settings, (90, 120), NO_DEADLINE)
        for rank, component in enumerate(components)
    ]
    reason = {"name": "reason", "value": 'too large: 70 MP & "more"'}
    tag = {"label": "unprocessed", "type": "tag", "attributes": [reason]}
    records = [
        {"name": "a & b/ä.jpg", "width": 120, "height": 90, "shapes": shapes},
        {"name": "b.jpg", "width": 9000, "height": 8000, "shapes": [tag]},
        {"name": "broken.jpg", "width": None, "height": None, "shapes": [tag]},
    ]
    write_cvat_xml(tmp_path / "cvat.xml", proposer.labels, records)
    write_coco(tmp_path / "coco.json", proposer.labels, lambda: records)
    return request.param, records[0], components, tmp_path / "cvat.xml", tmp_path / "coco.json"


def test_cvats_xml_has_the_same_shapes(exported):
    kind, expected, components, path, _ = exported
    root = ElementTree.parse(path).getroot()
    images = root.findall("image")
    assert [(image.get("name"), image.get("width"), image.get("height")) for image in images] == [
        ("a & b/ä.jpg", "120", "90"), ("b.jpg", "9000", "8000"),
    ], "CVAT has no frame of a photo without a header, and refuses a file that names it"  # fmt: skip
    assert root.findtext("version") == "1.1"
    shapes = images[0].findall(kind)
    assert len(shapes) == len(components) == 3
    for element, shape, component in zip(shapes, expected["shapes"], components):
        found = {child.get("name"): child.text for child in element}
        assert found == {attribute["name"]: attribute["value"] for attribute in shape["attributes"]}
        assert element.get("label") == "crack" and element.get("source") == "auto"
        if kind == "polygon":
            assert [float(n) for pair in element.get("points").split(";") for n in pair.split(",")] == shape["points"]
        else:
            left, top, width, height = (int(element.get(key)) for key in ("left", "top", "width", "height"))
            runs = [*map(int, element.get("rle").split(",")), left, top, left + width - 1, top + height - 1]
            bitmap = decode_mask(runs, image_width=120, image_height=90)
            assert np.array_equal(bitmap[top : top + height, left : left + width], component.mask)
    assert images[1].find("tag").get("label") == "unprocessed"
    assert images[1].findtext("tag/attribute") == 'too large: 70 MP & "more"'


def test_the_labels_are_those_of_the_function(exported, proposer):
    root = ElementTree.parse(exported[3]).getroot()
    labels = {label.findtext("name"): label for label in root.iterfind("meta/task/labels/label")}
    assert set(labels) == {"crack", "unprocessed", "notice"} and labels["unprocessed"].findtext("type") == "tag"
    found = {a.findtext("name"): a for a in labels["crack"].iterfind("attributes/attribute")}
    assert found["confidence"].findtext("input_type") == "number"
    (values,) = [a["values"] for a in proposer.labels[0]["attributes"] if a["name"] == "iterations"]
    assert found["iterations"].findtext("values").split("\n") == values and {"0", "2", "8"} <= set(values)


def test_coco_is_the_same_region_for_another_reader(exported):
    kind, _, components, _, path = exported
    coco = json.loads(path.read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a & b/ä.jpg", "b.jpg"]
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert len(coco["annotations"]) == len(components)
    for number, (annotation, component) in enumerate(zip(coco["annotations"], components), start=1):
        assert (annotation["id"], annotation["image_id"], names[annotation["category_id"]]) == (number, 1, "crack")
        assert annotation["attributes"]["confidence"] == "80" and annotation["attributes"]["iterations"] == "4"
        truth = np.zeros((90, 120), bool)
        x0, y0, x1, y1 = component.box_xyxy
        truth[y0 : y1 + 1, x0 : x1 + 1] = component.mask
        has_hole = len(find_components(np.pad(~component.mask, 1, constant_values=True))) > 1
        if kind == "mask" or has_hole:
            runs = annotation["segmentation"]
            assert runs["size"] == [90, 120] and sum(runs["counts"]) == 90 * 120
            values = np.repeat(np.arange(len(runs["counts"])) % 2, runs["counts"])
            painted = values.reshape(120, 90).T > 0
        else:
            assert Polygon(np.reshape(annotation["segmentation"][0], (-1, 2))).is_valid
            picture = Image.new("1", (120, 90))
            ImageDraw.Draw(picture).polygon(annotation["segmentation"][0], fill=1, outline=1)
            painted = np.asarray(picture)
        iou = (painted & truth).sum() / (painted | truth).sum()
        assert iou == 1 if kind == "mask" else iou > 0.9
        left, top, width, height = annotation["bbox"]
        assert np.allclose([left, top, left + width - 1, top + height - 1], component.box_xyxy, atol=1)
        assert annotation["area"] == (component.area_px if kind == "mask" else pytest.approx(component.area_px, rel=0.06))


def test_regions_of_answers_and_export_agree_with_the_feedback_reader(exported):
    """The file has the same pixels after it was imported, exported and harvested."""
    kind, expected, _, path, _ = exported
    job = "<job><id>1</id><segments><segment><id>1</id><start>0</start><stop>9999999</stop><url/></segment></segments></job>"
    path.write_text(path.read_text().replace("</meta>", f"{job}</meta>"))
    export = CvatExport(path, None)
    frames = export.frames(next(export.jobs()))
    assert [frame.name for frame in frames] == ["a & b/ä.jpg", "b.jpg"]
    for found, shape in zip(frames[0].shapes, expected["shapes"], strict=True):
        one, other = region_of(found.kind, found.points, 120, 90), region_of_answer(shape, 120, 90)
        assert one.box_xyxy == other.box_xyxy and np.array_equal(one.mask, other.mask)
        assert found.attributes["proposal"] and found.source == "auto"
