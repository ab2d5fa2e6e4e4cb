"""Weights are verified before they are trusted: what is wrong is named, with the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from defectcam.weights import WeightsError, load_weights, sha256_of
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ROOT / "weights", tmp_path / "weights")


def rewrite(folder, defect="crack", **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["defects"][defect] |= changes
    path.write_text(json.dumps(manifest))


def test_shipped_weights_load_frozen_and_in_eval_mode():
    weights = load_weights(ROOT / "weights", "cpu")
    assert list(weights.networks) == list(weights.facts) and "crack" in weights.networks
    for network in weights.networks.values():
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_files_are_small_and_nothing_is_a_pickle():
    for path in (ROOT / "weights").iterdir():
        assert path.suffix in (".safetensors", ".json", ".md", ".jpg", ".png"), path
        assert path.stat().st_size < 16e6


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
    path = folder / "crack.safetensors"
    tensors = {name: value + 0.5 for name, value in load_file(path).items() if value.is_floating_point()}
    save_file(tensors, path)


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


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (spoil_missing, "cannot be read"),
        (spoil_truncated, "truncated, altered or swapped"),
        (spoil_altered, "truncated, altered or swapped"),
        (spoil_swapped, "truncated, altered or swapped"),
        (spoil_not_safetensors, "not a safetensors file"),
        (spoil_tensor_missing, "head.bias is missing"),
        (spoil_tensor_extra, "head.extra belongs to another architecture"),
        (spoil_tensor_shape, r"head.bias has shape \(2,\)"),
        (spoil_tensor_nan, "not finite"),
    ],
)
def test_spoilt_files_stop_the_start_and_are_named(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(WeightsError, match=reason) as error:
        load_weights(folder, "cpu")
    assert "crack.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"gate": 1.5}, "gate must be a number in 0..1, not 1.5"),
        ({"cam_max": []}, "cam_max must be numbers that do not decrease"),
        ({"cam_max": [2.0, 1.0]}, "cam_max must be numbers that do not decrease"),
        ({"cam_max": [1.0, float("nan")]}, "cam_max must be a number in .*nan"),
        ({"xi": "0.08"}, "xi must be a number"),
        ({"penalty_weight": float("nan")}, "penalty_weight"),
        ({"std_rgb": [0, 0, 0]}, "std_rgb"),
        ({"mean_rgb": [0.5]}, "mean_rgb must have 3"),
        ({"mean_rgb": 0.5}, "mean_rgb must be a list, not 0.5"),
        ({"cam_max": 3.0}, "cam_max must be a list, not 3.0"),
        ({"decoder_channels": 64}, "decoder_channels must be a list, not 64"),
        ({"decoder_channels": [64, 32]}, r"decoder_channels must have 3 numbers, not \[64, 32\]"),
        ({"sha256": None}, "sha256 must be a text, not None"),
        ({"training": "long"}, "training must be an object, not 'long'"),
        ({"snap": "dark_ridges"}, "snap must be an object or null, not 'dark_ridges'"),
        ({"confidence_weights": [1.0, 2, 3, 4]}, "confidence_weights must have 5 .* calibrated again"),
        ({"tolerance_px": 0.5}, "tolerance_px must be a number in 1..20, not 0.5"),
        ({"outline_encoder": "vgg"}, "outline_encoder must be one of resnet34, efficientnet-lite0, not 'vgg'"),
        ({"snap": {}}, "snap method must be one of"),
        ({"iterations": 2.5}, "iterations must be an integer in 0..50, not 2.5"),
        ({"file": "../crack.safetensors"}, "file must be a name without folders"),
        ({"downsamplings": 9}, "downsamplings must be an integer in 1..3"),
        ({"iterations": 51}, "iterations must be an integer in 0..50, not 51"),
        ({"window_px": "wide"}, "window_px must be an integer .*wide"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_that_does_not_fit_names_defect_and_field(folder, changes, reason):
    rewrite(folder, **changes)
    with pytest.raises(WeightsError, match=reason) as error:
        load_weights(folder, "cpu")
    assert "manifest.json" in str(error.value) and "'crack'" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1"}', '{"version": "1", "defects": {}}'])
def test_no_manifest_at_all(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(WeightsError, match="manifest"):
        load_weights(folder, "cpu")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(WeightsError, match="no weights in .*nothing"):
        load_weights(tmp_path / "nothing", "cpu")
