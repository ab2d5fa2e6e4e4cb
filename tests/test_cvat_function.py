"""The cvat-sdk function: with cvat-sdk's own driver, against a server on a real port that holds one task."""

import copy
import http.server
import io
import json
import logging
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

from defectcam.polygons import outline_length_px
from defectcam.settings import RequestError
from defectcam.weights import WeightsError
from tests.conftest import ROOT, dark_wall, dark_weights

cvataa = pytest.importorskip("cvat_sdk.auto_annotation", reason="cvat-sdk is not installed: pip install '.[cvat]'")

from cvat_sdk import models  # noqa: E402
from cvat_sdk.auto_annotation.driver import _AnnotationMapper, _DetectionFunctionContextImpl  # noqa: E402
from cvat_sdk.core import Client, Config  # noqa: E402
from cvat_sdk.masks import decode_mask  # noqa: E402

from defectcam.cvat import auto_annotation  # noqa: E402

LOG = logging.getLogger("test")
SPEC = json.loads(yaml.safe_load((ROOT / "function.yaml").read_text())["metadata"]["annotations"]["spec"])


@pytest.fixture(scope="module")
def photo_rgb() -> np.ndarray:
    """(240, 320, 3) uint8 with dark spots, which the weights call cracks, some with more confidence than others."""
    return dark_wall([(70, 60, 40), (220, 80, 24), (120, 180, 12), (280, 200, 7)], 240, 320)[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"), ["crack", "spalling", "rust"])


@pytest.fixture(autouse=True)
def cracks_on_a_cpu(weights, monkeypatch):
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(weights))
    monkeypatch.setenv("ADVCAM_DEVICE", "cpu")
    monkeypatch.setenv("ADVCAM_DEFECTS", "crack")


def task_labels(**changes) -> list[dict]:
    """Labels of a task made "From model", as the server answers them; ids are the task's own."""
    labels = []
    for number, label in enumerate(copy.deepcopy(SPEC)):
        for place, attribute in enumerate(label["attributes"]):
            attribute |= {"id": 100 * number + place + 500, "mutable": False, "default_value": attribute["values"][0]}
        label |= {"id": number + 40, "sublabels": [], "color": "#ffffff", "has_parent": False, "parent_id": None}
        labels.append(label | (changes if label["type"] != "tag" else {}))
    return labels


def as_models(labels: list[dict]) -> list[models.Label]:
    return [models.Label._new_from_openapi_data(**label) for label in labels]


def detected(function, image, *, labels=None, **context):
    """(tags, shapes) as the driver checks them and hands them to the server."""
    conv = context.get("conv_mask_to_poly", False)
    own, tasks = function.spec.labels, as_models(labels or task_labels())
    mapper = _AnnotationMapper(LOG, own, tasks, allow_unmatched_labels=False, conv_mask_to_poly=conv)
    found = function.detect(_DetectionFunctionContextImpl(frame_name="photo.png", **context), image)
    return mapper.validate_and_remap(found, 3)


def attributes(annotation) -> dict[int, str]:
    return {entry.spec_id: entry.value for entry in annotation.attributes}


def test_shapes_pass_the_drivers_checks_with_their_attributes(photo_rgb):
    function = auto_annotation.create(iterations=1, threshold=0.01)
    tags, shapes = detected(function, Image.fromarray(photo_rgb))
    assert shapes and not tags
    for shape in shapes:
        assert (shape.type.value, shape.label_id, shape.frame) == ("polygon", 40, 3)
        confidence, iterations, proposal = (attributes(shape)[number] for number in (500, 501, 502))
        assert 0 <= int(confidence) <= 100 and iterations == "1" and len(proposal) == 8
        assert len(shape.points) >= 6 and max(shape.points[::2]) <= 320 and max(shape.points[1::2]) <= 240


def test_it_answers_what_the_nuclio_handler_answers(photo_rgb):
    function = auto_annotation.create(iterations=0)
    _, shapes = detected(function, Image.fromarray(photo_rgb))
    direct = function.model.propose(photo_rgb, function.model.settings)
    assert [shape.points for shape in shapes] == [shape["points"] for shape in direct]


def test_conf_threshold_comes_before_every_other(photo_rgb):
    function, image = auto_annotation.create(iterations=0, threshold=0.99), Image.fromarray(photo_rgb)
    assert detected(function, image) == ([], [])
    everything = function.model.predictor.propose(photo_rgb, "crack", 0, threshold=0.0)
    confidences = sorted(proposal.confidence for proposal in everything)
    assert len(confidences) >= 2
    for above, least in enumerate(confidences):
        assert len(detected(function, image, conf_threshold=least)[1]) == len(confidences) - above
    assert len(detected(function, image, conf_threshold=0.0)[1]) == len(confidences)
    assert detected(function, image, conf_threshold=1.0) == ([], [])
    for shape in detected(function, image, conf_threshold=0.3)[1]:
        assert int(attributes(shape)[500]) >= 30


def test_masks_are_masks_and_polygons_where_the_driver_wants_them(photo_rgb):
    function, image = auto_annotation.create(iterations=0, shape="mask"), Image.fromarray(photo_rgb)
    _, masks = detected(function, image, labels=task_labels(type="mask"))
    assert masks and {shape.type.value for shape in masks} == {"mask"}
    components = [one.component for one in function.model.predictor.propose(photo_rgb, "crack", 0)]
    for shape, component in zip(masks, components, strict=True):
        x0, y0, x1, y1 = component.box_xyxy
        bitmap = decode_mask(shape.points, image_width=320, image_height=240)
        assert np.array_equal(bitmap[y0 : y1 + 1, x0 : x1 + 1], component.mask) and bitmap.sum() == component.area_px
    _, polygons = detected(function, image, labels=task_labels(), conv_mask_to_poly=True)
    assert len(polygons) == len(masks) and {shape.type.value for shape in polygons} == {"polygon"}
    assert detected(function, image, labels=task_labels(type="any"))[1]
    with pytest.raises(cvataa.BadFunctionError, match="'mask' in the function"):
        detected(function, image, labels=task_labels(type="polygon"))
    with pytest.raises(cvataa.BadFunctionError, match="'polygon' in the function, but 'mask' in the dataset"):
        detected(auto_annotation.create(iterations=0, shape="polygon"), image, labels=task_labels(type="mask"))


def test_without_a_shape_each_label_gets_what_its_type_in_the_task_holds(photo_rgb, monkeypatch):
    monkeypatch.delenv("ADVCAM_DEFECTS")
    function, image = auto_annotation.create(iterations=0, labels="Riss=crack"), Image.fromarray(photo_rgb)
    labels = task_labels()
    labels[0] |= {"name": "Riss", "type": "mask"}
    labels[1]["type"] = "any"
    _, shapes = detected(function, image, labels=labels)
    assert {(shape.label_id, shape.type.value) for shape in shapes} == {(40, "mask"), (41, "polygon"), (42, "polygon")}
    masks = auto_annotation.create(iterations=0, shape="mask", defects="crack", labels="Riss=crack")
    assert [shape for shape in shapes if shape.label_id == 40] == detected(masks, image, labels=labels)[1]
    _, shapes = detected(function, image, labels=[{**labels[0], "type": "polygon"}, *labels[1:]])
    assert {shape.type.value for shape in shapes} == {"polygon"}, "another task"
    with pytest.raises(cvataa.BadFunctionError, match="'polygon' in the function, but 'rectangle' in the dataset"):
        detected(function, image, labels=[{**labels[0], "type": "rectangle"}, *labels[1:]])


def test_the_spec_is_function_yamls_for_the_defects_there_are(monkeypatch):
    monkeypatch.delenv("ADVCAM_DEFECTS")
    function = auto_annotation.create()
    known = {label["name"]: label for label in SPEC}
    assert [label.name for label in function.spec.labels] == [*function.model.defects, "unprocessed"]
    for label in function.spec.labels:
        assert label.type == known[label.name]["type"]
        for attribute, wanted in zip(label.attributes, known[label.name]["attributes"], strict=True):
            assert (attribute.name, attribute.input_type.value) == (wanted["name"], wanted["input_type"])
            assert list(attribute.values) == wanted["values"]


def test_a_count_that_the_select_has_not_is_refused_unless_the_task_has_it(photo_rgb):
    function, image = auto_annotation.create(iterations=3, threshold=0.01), Image.fromarray(photo_rgb[:160, :160])
    with pytest.raises(cvataa.BadFunctionError, match="'iterations'"):
        detected(function, image)
    labels = task_labels()
    labels[0]["attributes"][1]["values"].append("3")
    _, shapes = detected(function, image, labels=labels)
    assert shapes and all(attributes(shape)[501] == "3" for shape in shapes)


@pytest.mark.parametrize("more", [["16"], ["16", "auto"], ["3", "12"]])
def test_a_tasks_select_may_have_more_values_than_the_functions(photo_rgb, more):
    function, labels = auto_annotation.create(iterations=4, threshold=0.01), task_labels()
    labels[0]["attributes"][1]["values"][1:1] = more
    _, shapes = detected(function, Image.fromarray(photo_rgb[:160, :160]), labels=labels)
    assert shapes and all(attributes(shape)[501] == "4" for shape in shapes)
    known = next(label for label in SPEC if label["name"] == "crack")["attributes"][1]["values"]
    assert list(function.spec.labels[0].attributes[1].values) == known, "another task's values are its own"


def test_what_else_differs_from_the_functions_attributes_is_refused_as_before(photo_rgb):
    function, image = auto_annotation.create(iterations=4), Image.fromarray(photo_rgb[:160, :160])
    for place, change in ((1, {"values": ["0", "4", "16"]}), (1, {"input_type": "radio"}), (0, {"values": ["0", "1", "1"]})):
        labels = task_labels()
        labels[0]["attributes"][place] |= change
        with pytest.raises(cvataa.BadFunctionError, match="confidence" if place == 0 else "iterations"):
            detected(function, image, labels=labels)


@pytest.mark.parametrize("defect", ["Exposed rebar", "Überzug \"x\" 🧱"])
def test_a_defect_that_function_yaml_has_no_label_for(photo_rgb, tmp_path, monkeypatch, defect):
    """Its label is that of the others; with ours the driver accepts a task made from the deployed function's labels."""
    weights = dark_weights(tmp_path / "w", ["crack"])
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["defects"][defect] = manifest["defects"]["crack"]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.delenv("ADVCAM_DEFECTS")
    function = auto_annotation.create(weights=str(weights), iterations=1, threshold=0.01)
    crack, own, tag = function.spec.labels
    assert (own.name, own.type, tag.name) == (defect, "polygon", "unprocessed")
    assert own.attributes == crack.attributes
    labels = task_labels()
    labels.append(copy.deepcopy(labels[0]) | {"id": 77, "name": defect})
    _, shapes = detected(function, Image.fromarray(photo_rgb), labels=labels)
    assert {shape.label_id for shape in shapes} == {40, 77}
    with pytest.raises(cvataa.BadFunctionError, match="is not in dataset"):
        detected(function, Image.fromarray(photo_rgb))


def test_a_task_may_call_the_defects_otherwise(photo_rgb, monkeypatch):
    monkeypatch.delenv("ADVCAM_DEFECTS")
    function = auto_annotation.create(iterations=0, threshold=0.01, labels=" Riss = Crack, Abplatzung=spalling,")
    assert [label.name for label in function.spec.labels] == ["Riss", "Abplatzung", "rust", "unprocessed"]
    labels = task_labels()
    for label, name in zip(labels, ("Riss", "Abplatzung")):
        label["name"] = name
    _, shapes = detected(function, Image.fromarray(photo_rgb), labels=labels)
    own = detected(auto_annotation.create(iterations=0, threshold=0.01), Image.fromarray(photo_rgb))[1]
    assert shapes == own and {shape.label_id for shape in shapes} == {40, 41, 42}
    with pytest.raises(cvataa.BadFunctionError, match="'Riss' is not in dataset"):
        detected(function, Image.fromarray(photo_rgb))


@pytest.mark.parametrize("labels, message", [
    ("Riss", "labels has 'Riss', which is not LABEL=DEFECT, such as Riss=crack"),
    ("=crack", "labels has '=crack', which is not LABEL=DEFECT"),
    ("Riss=cracks", "no weights for 'cracks' .did you mean 'crack'.., only for"),
    ("Riss=crack,Fuge=crack", "labels names 'crack' twice"),
    ("spalling=crack", "gives two labels the name 'spalling'"),
    ("notice=crack", "gives two labels the name 'notice'"),
])  # fmt: skip
def test_names_of_labels_that_cannot_be_meant_are_refused(monkeypatch, labels, message):
    monkeypatch.delenv("ADVCAM_DEFECTS")
    with pytest.raises(RequestError, match=message):
        auto_annotation.create(labels=labels)


def test_a_defect_whose_name_cvat_cannot_take_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="manifest.json: the defect's name 'notice' is the tag .*: give it another name"):
        auto_annotation.create(weights=str(dark_weights(tmp_path, ["notice"])), defects="notice")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_any_mode_are_answered(photo_rgb, mode):
    grey = Image.fromarray(photo_rgb[:64, :64]).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    assert image.mode == mode
    assert detected(auto_annotation.create(iterations=0), image)[0] == []


def test_a_frame_that_cannot_be_processed_is_a_tag_with_the_reason():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    image = Image.open(io.BytesIO(buffer.getvalue()[:3000]))  # opened, but its pixels are not there
    (tag,), shapes = detected(auto_annotation.create(), image)
    assert tag.label_id == 43 and "broken" in attributes(tag)[800] and not shapes


def test_a_notice_is_printed_and_needs_no_label_of_the_task(photo_rgb, monkeypatch, capsys):
    function = auto_annotation.create(iterations=0, threshold=0.01)
    _, all_shapes = detected(function, Image.fromarray(photo_rgb))
    proposals = function.model.predictor.propose(photo_rgb, "crack", 0, threshold=0.01)
    lengths = [outline_length_px(proposal.component.mask) for proposal in proposals]
    monkeypatch.setattr("defectcam.handler.MAX_OUTLINE_PX", max(lengths) - 1)
    capsys.readouterr()
    tags, shapes = detected(function, Image.fromarray(photo_rgb))
    assert not tags and capsys.readouterr().err.endswith(": 1 too ragged: crack; raise cam_threshold\n")
    assert len(shapes) == len(all_shapes) - 1 > 0


def test_the_largest_and_surest_are_proposed_where_there_are_too_many(photo_rgb, capsys):
    _, all_shapes = detected(auto_annotation.create(iterations=0), Image.fromarray(photo_rgb))
    capsys.readouterr()
    tags, (shape,) = detected(auto_annotation.create(iterations=0, max_proposals=1), Image.fromarray(photo_rgb))
    told = f": {len(all_shapes) - 1} more crack; raise threshold or max_proposals\n"
    assert not tags and capsys.readouterr().err.endswith(told)
    assert shape.points == all_shapes[0].points and len(all_shapes) > 1


@pytest.mark.parametrize("given, error, words", [
    ({"iterations": 51}, RequestError, ["ITERATIONS", "51", "0 to 50"]),
    ({"iterations": "many"}, RequestError, ["ITERATIONS", "many"]),
    ({"iterations": "auto"}, RequestError, ["ITERATIONS", "auto", "removed"]),
    ({"max_proposals": 0}, RequestError, ["MAX_PROPOSALS", "0"]),
    ({"threshold": 2.0}, RequestError, ["THRESHOLD", "2.0", "0 to 1"]),
    ({"defects": "crack,moss"}, RequestError, ["DEFECTS", "moss", "crack"]),
    ({"shape": "circle"}, RequestError, ["SHAPE", "circle"]),
    ({"device": "tpu"}, RequestError, ["DEVICE", "tpu"]),
    ({"weights": "/nowhere"}, WeightsError, ["/nowhere", "manifest.json"]),
    ({"steps": 4}, TypeError, ["steps"]),
    ({"snap": False}, TypeError, ["snap"]),
])  # fmt: skip
def test_bad_parameters_are_named(given, error, words):
    with pytest.raises(error) as caught:
        auto_annotation.create(**given)
    assert all(word in str(caught.value) for word in words)


def test_parameters_come_before_the_environment_before_the_manifest(monkeypatch):
    monkeypatch.setenv("ADVCAM_ITERATIONS", "2")
    monkeypatch.setenv("ADVCAM_CVAT_URL", "http://cvat")  # belongs to the function that CVAT calls
    assert auto_annotation.create(iterations=8).model.settings.iterations == 8
    function = auto_annotation.create(cam_threshold=0.2, max_proposals=5, hole_share=0.5, tolerance_px=2.0)
    effective = function.model.effective("crack", function.model.settings)
    assert (effective["iterations"], effective["max_proposals"], effective["cam_threshold"]) == (2, 5, 0.2)
    assert (effective["hole_share"], effective["tolerance_px"]) == (0.5, 2.0)
    assert effective["threshold"] == function.model.weights.configs["crack"].threshold
    assert function.model.cvat_task is None


# As cvat-cli's loader does it, to which the folder of the file is nothing.
LOADED_BY_CVAT_CLI = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("__cvat_function__", sys.argv[1])
function = importlib.util.module_from_spec(spec)
spec.loader.exec_module(function)
print([label.name for label in function.create(iterations=4).spec.labels])
"""


def test_cvat_cli_can_load_it_from_any_folder(exported_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(exported_weights))  # OpenVINO loads sooner than PyTorch
    command = [sys.executable, "-I", "-c", LOADED_BY_CVAT_CLI, str(ROOT / "cvat_function.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['crack', 'unprocessed']"


# ---- a whole task ----


@pytest.fixture
def server(photo_rgb, tmp_path):
    """One task of two frames, the second deleted, with the addresses that the driver asks for."""
    chunk = io.BytesIO()
    with zipfile.ZipFile(chunk, "w") as archive:
        for number in range(2):
            buffer = io.BytesIO()
            Image.fromarray(photo_rgb).save(buffer, "PNG")
            archive.writestr(f"{number:06}.png", buffer.getvalue())
    uploads, labels = [], task_labels()
    frame = {"width": 320, "height": 240, "name": "photo.png", "related_files": 0, "has_related_context": False}
    meta = {"chunk_size": 2, "size": 2, "image_quality": 70, "start_frame": 0, "stop_frame": 1, "frame_filter": ""}
    meta |= {"frames": [frame, frame], "deleted_frames": [1], "included_frames": None}
    meta["chunks_updated_date"] = "2026-11-22T20:50:45Z"
    link = {"count": 1, "completed": 0, "validation": 0, "url": "http://127.0.0.1/api"}
    task = {"id": 7, "name": "bridge", "mode": "annotation", "size": 2, "data_chunk_size": 2, "jobs": link}
    task |= {"labels": link, "data_original_chunk_type": "imageset", "organization": None}
    task["updated_date"] = "2026-11-22T20:50:45Z"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlsplit(self.path)
            page = {"count": len(labels), "next": None, "previous": None, "results": labels}
            answers = {"/api/tasks/7": task, "/api/tasks/7/data/meta": meta, "/api/labels": page}
            if url.path == "/api/tasks/7/data/" or url.path == "/api/tasks/7/data":
                assert parse_qs(url.query)["type"] == ["chunk"]
                return self.reply(chunk.getvalue(), "application/zip")
            self.reply(json.dumps(answers[url.path.rstrip("/")]).encode(), "application/json")

        def do_PATCH(self):
            uploads.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.reply(b'{"version": 0, "tags": [], "shapes": [], "tracks": []}', "application/json")

        def reply(self, body, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    config = Config(cache_dir=tmp_path, verify_ssl=False)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with Client(url, config=config, check_server_version=False) as client:
        yield SimpleNamespace(client=client, uploads=uploads)
    server.shutdown()
    server.server_close()


def test_the_sdk_annotates_a_whole_task_with_it(server):
    function = auto_annotation.create(iterations=1, threshold=0.3)
    cvataa.annotate_task(server.client, 7, function, allow_unmatched_labels=False)
    ((path, body),) = server.uploads
    assert path.startswith("/api/tasks/7/annotations") and "action=create" in path
    assert body["tags"] == [] and body["shapes"]
    for shape in body["shapes"]:
        assert (shape["frame"], shape["source"], shape["type"], shape["label_id"]) == (0, "auto", "polygon", 40)
        values = {entry["spec_id"]: entry["value"] for entry in shape["attributes"]}
        assert values[501] == "1" and set(values) == {500, 501, 502}
