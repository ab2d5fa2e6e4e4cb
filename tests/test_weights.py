"""Weights are verified before they are trusted: what is wrong is named, with the file and the field."""

import datetime
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defectcam.climb import LocalClimb, PaperClimb
from defectcam.network import ScoreNet
from defectcam.postprocess import Cleaning
from defectcam.pyramid import Reading
from defectcam.weights import (
    DefectConfig,
    WeightsError,
    load_weights,
    read_manifest,
    sha256_of,
    write_defect,
    write_manifest,
)
from tests.conftest import ROOT, random_network, tiny_weights


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"), ("crack", "rust"))


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "weights")


def entries_of(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())["defects"]


def rewrite(folder, defect="crack", without=(), **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["defects"][defect] | changes
    manifest["defects"][defect] = {name: value for name, value in entry.items() if name not in without}
    path.write_text(json.dumps(manifest))


def test_they_load_in_order_frozen_folded_and_in_eval_mode(sound):
    weights = load_weights(sound)
    assert list(weights.configs) == ["crack", "rust"] and weights.folder == sound
    original = random_network(0, 4, torch.float32, "efficientnet-lite0", "log-mean-exp")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    for network in map(weights.network, weights.configs):
        assert isinstance(network, ScoreNet) and not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(weights.network("crack")(images), original(images), rtol=1e-3, atol=1e-3)


def test_a_manifest_says_how_to_read_climb_and_clean(folder):
    rewrite(folder, finest_scale=0.5, levels=3, sharpness=2.0, closing_radius_px=7, gap_px=9, min_area_px=33,
            climb={"form": "local", "xi": 0.03, "g_ref": [1.5, 2]}, platt=[2.0, -1.0])  # fmt: skip
    rewrite(folder, "rust", climb={"form": "paper", "xi": 0.08, "penalty_weight": 7, "salient_share": 0.5})
    version, configs = read_manifest(folder)
    crack, rust = configs["crack"], configs["rust"]
    assert version == json.loads((folder / "manifest.json").read_text())["version"]
    assert crack.reading == Reading(0.5, 3, 2.0, (LocalClimb(0.03, 1.5), LocalClimb(0.03, 2)))
    assert rust.reading.climbs == (PaperClimb(0.08, 7, 0.5),)
    assert crack.cleaning == Cleaning(7, 9, 33)
    for theta in (0.1, 0.5, 0.9):
        assert 1 / (1 + np.exp(-(2.0 * crack.least_logit(theta) - 1.0))) == pytest.approx(theta)


def spoil_missing(folder):
    (folder / "crack.safetensors").unlink()


def spoil_truncated(folder):
    path = folder / "crack.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_altered(folder):
    path = folder / "crack.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_swapped(folder):
    shutil.copy(folder / "rust.safetensors", folder / "crack.safetensors")


def spoil_not_safetensors(folder):
    (folder / "crack.safetensors").write_bytes(b"not a safetensors file")
    rewrite(folder, sha256=sha256_of(folder / "crack.safetensors"))


def edit_tensors(folder, edit):
    path = folder / "crack.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    rewrite(folder, sha256=sha256_of(path))


def spoil_tensor_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("head.bias"))


def spoil_tensor_extra(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"head.extra": torch.zeros(1)}))


def spoil_tensor_shape(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"head.bias": torch.zeros(2)}))


def spoil_tensor_nan(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"head.bias": torch.full((1,), float("nan"))}))


def spoil_architecture(folder):
    rewrite(folder, decoder_channels=[16, 16, 8, 4])


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (spoil_missing, "cannot be read"),
        (spoil_truncated, "truncated, altered or swapped"),
        (spoil_altered, "truncated, altered or swapped"),
        (spoil_swapped, "truncated, altered or swapped"),
    ],
)
def test_spoilt_files_stop_the_start_and_are_named(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(WeightsError, match=reason) as error:
        load_weights(folder)
    assert "crack.safetensors" in str(error.value) and "take the weights folder as it was published" in str(error.value)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (spoil_not_safetensors, "not a safetensors file"),
        (spoil_tensor_missing, "head.bias is missing"),
        (spoil_tensor_extra, "head.extra belongs to another architecture"),
        (spoil_tensor_shape, r"head.bias has shape \(2,\), the manifest's architecture needs \(1,\)"),
        (spoil_tensor_nan, "head.bias has values that are not finite"),
        (spoil_architecture, r"has shape \(8, 8, 3, 3\), the manifest's architecture needs \(4, 8, 3, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_stop_the_network_and_are_named(folder, spoil, reason):
    """Their checksums are right, so the fault shows only when PyTorch loads them."""
    spoil(folder)
    weights = load_weights(folder)
    with pytest.raises(WeightsError, match=reason) as error:
        weights.network("crack")
    assert "crack.safetensors" in str(error.value) and "take the weights folder as it was published" in str(error.value)


def test_a_file_that_is_altered_after_the_start_is_not_taken(folder):
    weights = load_weights(folder)
    spoil_altered(folder)
    with pytest.raises(WeightsError, match="crack.safetensors was truncated, altered or swapped"):
        weights.network("crack")


def add_graph(folder) -> bytes:
    """Give crack a file that is not looked into before an engine reads it."""
    content = b"a graph"
    (folder / "crack.onnx").write_bytes(content)
    entries = entries_of(folder)
    entries["crack"]["graph"] = "crack.onnx"
    write_manifest(folder, entries)
    return content


def test_a_graph_is_verified_as_the_tensors_are(folder):
    before = load_weights(folder).version
    content = add_graph(folder)
    weights = load_weights(folder)
    assert weights.graph("crack") == content and weights.version != before
    assert weights.configs["crack"].graph_sha256 == hashlib.sha256(content).hexdigest()
    (folder / "crack.onnx").write_bytes(b"another")
    for take in (lambda: load_weights(folder), lambda: weights.graph("crack")):
        with pytest.raises(WeightsError, match="crack.onnx was truncated, altered or swapped: .*; take the weights folder"):
            take()
    (folder / "crack.onnx").unlink()
    for take in (lambda: load_weights(folder), lambda: weights.graph("crack")):
        with pytest.raises(WeightsError, match="crack.onnx cannot be read .*; take the weights folder"):
            take()


def test_weights_without_a_graph_say_how_to_get_one(folder):
    add_graph(folder)
    with pytest.raises(WeightsError, match="no graph of 'rust' .*`defectcam export --weights .*ADVCAM_ENGINE=torch"):
        load_weights(folder).graph("rust")


LOCAL = {"form": "local", "xi": 0.1, "g_ref": [1.0]}
PAPER = {"form": "paper", "xi": 0.1, "penalty_weight": 1.0, "salient_share": 0.5}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"file": "../crack.safetensors"}, "file must be a name without folders, not '../crack.safetensors'"),
        ({"file": None}, "file must be a valid string, not None"),
        ({"sha256": None}, "sha256 must be a valid string, not None"),
        ({"graph": "../crack.onnx"}, "graph must be a name without folders, not '../crack.onnx'"),
        ({"graph": None}, "graph must be a valid string, not None"),
        ({"graph": "crack.onnx", "graph_sha256": 7}, "graph_sha256 must be a valid string, not 7"),
        ({"encoder": "vgg"}, "encoder must be one of resnet34, efficientnet-lite0, not 'vgg'"),
        ({"encoder": {}}, "encoder must be a valid string, not {}"),
        ({"pooling": "max"}, "pooling must be one of average, log-mean-exp, not 'max'"),
        ({"decoder_channels": 64}, "decoder_channels must be a valid array, not 64"),
        ({"decoder_channels": [16, 16, 8]}, r"decoder_channels needs 4 numbers .*not \(16, 16, 8\)"),
        ({"decoder_channels": [16, 16, 8, 0]}, r"decoder_channels\[3\] must be greater than or equal to 1, not 0"),
        ({"decoder_channels": []}, r"decoder_channels needs 4 numbers .*not \(\)"),
        ({"downsamplings": 9}, "downsamplings of efficientnet-lite0 must be 4, not 9"),
        ({"downsamplings": 2}, "downsamplings of efficientnet-lite0 must be 4, not 2"),
        ({"finest_scale": 0.3}, r"finest_scale must be one of 2.0, 1.0, 0.5, 0.25, not 0.3"),
        ({"finest_scale": True}, "finest_scale must be a valid number, not True"),
        ({"finest_scale": [1.0]}, r"finest_scale must be a valid number, not \[1.0\]"),
        ({"levels": 0}, "levels must be greater than or equal to 1, not 0"),
        ({"levels": 2.0}, "levels must be a valid integer, not 2.0"),
        ({"sharpness": 0}, "sharpness must be greater than or equal to 0.1, not 0"),
        ({"sharpness": float("nan")}, "sharpness must be a finite number, not nan"),
        ({"climb": "local"}, "climb must be an object, not 'local'"),
        ({"climb": {}}, "climb must have form 'local' with xi and g_ref, .*form 'paper' with .*, not {}"),
        ({"climb": LOCAL | {"form": "global"}}, "climb must have form .*'global'"),
        ({"climb": LOCAL | {"form": ["local"]}}, "climb must have form .*local"),
        ({"climb": LOCAL | {"penalty_weight": 1.0}}, "climb must have form .*penalty_weight"),
        ({"climb": LOCAL | {"xi": "0.08"}}, "climb.xi must be a valid number, not '0.08'"),
        ({"climb": LOCAL | {"xi": 3}}, "climb.xi must be less than or equal to 2, not 3"),
        ({"climb": LOCAL | {"g_ref": 1.0}}, "g_ref, a list with a number for at least one level, .*'g_ref': 1.0"),
        ({"climb": LOCAL | {"g_ref": []}}, r"g_ref, a list with a number for at least one level, .*'g_ref': \[\]"),
        ({"climb": LOCAL | {"g_ref": [None]}}, r"g_ref, a list with a number for at least one level, .*\[None\]"),
        ({"climb": LOCAL | {"g_ref": [1.0, 0]}}, "climb.g_ref must be greater than or equal to 0.000000000001, not 0"),
        ({"climb": PAPER | {"penalty_weight": float("nan")}}, "climb.penalty_weight must be a finite number, not nan"),
        ({"climb": PAPER | {"salient_share": 1.5}}, "climb.salient_share must be less than or equal to 1, not 1.5"),
        ({"climb": PAPER | {"g_ref": [1.0]}}, "'climb.g_ref' is no field that is known"),
        ({"climb": {"form": "paper", "xi": 0.1}}, "'climb.penalty_weight' is missing"),
        ({"platt": 1.0}, "platt must be a valid array, not 1.0"),
        ({"platt": [1.0]}, r"'platt\[1\]' is missing"),
        ({"platt": [1.0, 1.0, 1.0]}, "platt: .* at most 2 items .*, not 3"),
        ({"platt": [0.0, 1.0]}, r"platt\[0\] must be greater than 0, not 0.0"),
        ({"platt": [1.0, None]}, r"platt\[1\] must be a valid number, not None"),
        ({"cam_threshold": 1.5}, "cam_threshold must be less than or equal to 1, not 1.5"),
        ({"closing_radius_px": -1}, "closing_radius_px must be greater than or equal to 0, not -1"),
        ({"gap_px": 101}, "gap_px must be less than or equal to 100, not 101"),
        ({"gap_px": True}, "gap_px must be a valid integer, not True"),
        ({"min_area_px": "24"}, "min_area_px must be a valid integer, not '24'"),
        ({"confidence_weights": {}}, "confidence_weights must be a valid array, not {}"),
        ({"confidence_weights": [1.0, 2, 3, 4]}, r"confidence_weights must have 8 .*\[1.0, 2.0, 3.0, 4.0\]: calibrate again"),
        ({"confidence_weights": [1.0, 2, 3, 4, 5, 6, 7, "6"]}, r"confidence_weights\[7\] must be a valid number, not '6'"),
        ({"threshold": -0.1}, "threshold must be greater than or equal to 0, not -0.1"),
        ({"threshold": [0.5]}, r"threshold must be a valid number, not \[0.5\]"),
        ({"iterations": 51}, "iterations must be less than or equal to 50, not 51"),
        ({"iterations": 2.5}, "iterations must be a valid integer, not 2.5"),
        ({"iterations": "auto"}, "iterations must be a valid integer, not 'auto'"),
        ({"iterations": [2]}, r"iterations must be a valid integer, not \[2\]"),
        ({"iterations": []}, r"iterations must be a valid integer, not \[\]"),
        ({"tolerance_px": 0.5}, "tolerance_px must be greater than or equal to 1, not 0.5"),
        ({"hole_share": 2}, "hole_share must be less than or equal to 1, not 2"),
        ({"training": "long"}, "training must be an object, not 'long'"),
        ({"surprise": 1}, "'surprise' is no field that is known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_manifest_that_does_not_fit_names_defect_and_field(folder, changes, reason):
    rewrite(folder, **changes)
    with pytest.raises(WeightsError, match=reason) as error:
        load_weights(folder)
    assert "manifest.json" in str(error.value) and "'crack'" in str(error.value)


OPTIONAL = {field.name for field in fields(DefectConfig) if field.default is not MISSING}


@pytest.mark.parametrize("field", [field.name for field in fields(DefectConfig) if field.name not in OPTIONAL])
def test_a_field_that_is_missing_is_named(folder, field):
    rewrite(folder, without=[field])
    with pytest.raises(WeightsError, match=f"'crack': .*'{field}'"):
        read_manifest(folder)


def test_the_graph_is_all_that_may_be_missing(folder):
    assert OPTIONAL == {"graph", "graph_sha256"}
    rewrite(folder, without=OPTIONAL)
    _, configs = read_manifest(folder)
    assert (configs["crack"].graph, configs["crack"].graph_sha256) == ("", "")


def test_weights_of_an_earlier_version_are_refused(folder):
    rewrite(folder, cam_max=[1.0, 2.0], gate=0.5, without=["platt", "pooling"])
    with pytest.raises(WeightsError, match="'crack': these weights were made for an earlier version .*calibrate again"):
        load_weights(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": "1"}', '{"version": "1", "defects": {}}', '{"version": 1, "defects": {"a": {}}}']
)
def test_no_manifest_at_all(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(WeightsError, match="is not a manifest of weights"):
        load_weights(folder)


def test_an_entry_that_is_no_object_is_named(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(json.dumps(json.loads(text) | {"defects": {"crack": 3}}))
    with pytest.raises(WeightsError, match="'crack'"):
        load_weights(folder)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(WeightsError, match="no weights in .*nothing"):
        load_weights(tmp_path / "nothing")


def test_an_entry_about_to_be_replaced_is_not_looked_at(folder):
    rewrite(folder, levels=0)
    assert list(read_manifest(folder, but_for="crack")[1]) == ["rust"]


def test_a_version_is_its_day_and_the_first_letters_of_its_checksum(folder):
    entries = entries_of(folder)
    before = datetime.date.today().isoformat()
    version = write_manifest(folder, entries)
    day, letters = version[:10], version[11:]
    assert before <= day <= datetime.date.today().isoformat() and re.fullmatch("[0-9a-f]{6}", letters)
    assert load_weights(folder).version == version == write_manifest(folder, entries_of(folder)), "the same content"
    entries["crack"]["training"]["licences"] = {"mine": {"licence": "CC0", "terms": "free", "source": "us"}}
    assert write_manifest(folder, entries) == version, "licences make no other weights"
    assert load_weights(folder).configs["crack"].terms == "free"
    entries["crack"]["iterations"] = 5
    other = write_manifest(folder, entries)
    assert other[:11] == version[:11] and other != version, "another calibration"
    edit_tensors(folder, lambda tensors: tensors["head.bias"].add_(1))
    changed = write_manifest(folder, entries_of(folder), parent={"version": other})
    assert changed not in (version, other), "another network"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parent"] == {"version": other} and manifest["version"] == changed
    assert manifest["defects"]["crack"]["sha256"] == sha256_of(folder / "crack.safetensors")
    assert load_weights(folder).version == changed


def test_a_manifest_is_there_whole_or_not_at_all(folder, monkeypatch):
    before = (folder / "manifest.json").read_text()

    def interrupted(path, content):
        path.open("wb").write(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(folder, entries_of(folder) | {})
    assert (folder / "manifest.json").read_text() == before
    monkeypatch.undo()
    write_manifest(folder, entries_of(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["crack.safetensors", "manifest.json", "rust.safetensors"]


KILLED = """
import json, os, pathlib, signal, sys
from defectcam.weights import write_defect

def counted(real):
    def call(path, *more):
        global calls
        calls += 1
        if calls == number:
            if real.__name__ == "write_bytes":
                real(path, more[0][:20])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *more)
    return call

for name in ("write_bytes", "replace", "unlink"):
    setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
tensors, graph = (pathlib.Path(path).read_bytes() for path in sys.argv[1:3])
for number, folder in enumerate(sys.argv[4:], 1):
    calls, process = 0, os.fork()
    if not process:
        write_defect(pathlib.Path(folder), "crack", json.loads(sys.argv[3]), tensors, graph)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_a_folder_can_be_loaded_whenever_the_writing_of_a_defect_is_killed(folder, tmp_path):
    """Before every step of it: it has the weights of before or the new ones, whole; and later nothing is left over."""
    entry = entries_of(folder)["crack"]
    for name in ("file", "sha256", "graph", "graph_sha256"):
        entry.pop(name, None)
    write_defect(folder, "crack", entry, (folder / "crack.safetensors").read_bytes(), b"old graph")
    edit_tensors(shutil.copytree(folder, tmp_path / "new"), lambda tensors: tensors["head.bias"].add_(1))
    (tmp_path / "new.onnx").write_bytes(b"new graph")
    new = (tmp_path / "new" / "crack.safetensors").read_bytes(), b"new graph"
    old = (folder / "crack.safetensors").read_bytes(), b"old graph"
    given = [tmp_path / "new" / "crack.safetensors", tmp_path / "new.onnx", json.dumps(entry | {"iterations": 7})]
    copies = [shutil.copytree(folder, tmp_path / str(number)) for number in range(1, 17)]
    command = [sys.executable, "-c", KILLED, *given, *copies]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    seen = []
    for copy, status in zip(copies, map(int, killed), strict=True):
        weights = load_weights(copy)
        config = weights.configs["crack"]
        is_new = config.iterations == 7
        assert ((copy / config.file).read_bytes(), weights.graph("crack")) == (new if is_new else old)
        assert is_new or (config.file, config.graph) == ("crack.safetensors", "crack.onnx")
        seen.append(is_new)
        if status != -signal.SIGKILL:
            break
        write_defect(copy, "crack", entry | {"iterations": 8}, new[0], None)
        names = ["crack.safetensors", "manifest.json", "rust.safetensors"]
        assert sorted(path.name for path in copy.iterdir()) == names
        assert load_weights(copy).configs["crack"].iterations == 8
    assert status == 0 and len(seen) == 15 and seen == sorted(seen)
    names = ["crack.onnx", "crack.safetensors", "manifest.json", "rust.safetensors"]
    assert sorted(path.name for path in copy.iterdir()) == names


def test_what_ships_is_small_and_nothing_is_a_pickle():
    for path in (path for path in (ROOT / "weights").rglob("*") if path.is_file()):
        assert path.suffix in (".safetensors", ".onnx", ".json", ".md", ".jpg", ".png"), path
        assert path.stat().st_size < 16e6


def test_the_open_weights_have_seen_free_photos_alone_and_lack_spalling():
    weights = load_weights(ROOT / "weights" / "open")
    assert list(weights.configs) == ["crack", "rust"] and weights.terms == "free"
    for defect, config in weights.configs.items():
        assert set(config.licences) == {"uav_kaggle315", "cis_corrosion"} and not config.training["network"]["init_sha256"]
        assert weights.graph(defect)
