"""`defectcam export`: the graph computes what the network computes, stores each tensor once, and is in the manifest."""

import json
import shutil
import sys

import onnx
import pytest
import torch

from defectcam.training import export
from defectcam.weights import load_weights, sha256_of
from tests.conftest import ROOT, dark_network, dark_weights, random_network
from tests.test_evaluate import write_weights


def manifest_of(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def run(folder) -> None:
    export.main(["--weights", str(folder)])


def test_the_command_adds_the_graph_and_makes_a_new_version(exported_weights, tmp_path):
    before, after = manifest_of(dark_weights(tmp_path / "weights")), manifest_of(exported_weights)
    assert after["version"] != before["version"]
    added = {"graph": "crack.onnx", "graph_sha256": sha256_of(exported_weights / "crack.onnx")}
    assert after["defects"] == {"crack": before["defects"]["crack"] | added}
    weights = load_weights(exported_weights)
    assert weights.graph("crack") == (exported_weights / "crack.onnx").read_bytes()
    assert sorted(path.name for path in exported_weights.iterdir()) == ["crack.onnx", "crack.safetensors", "manifest.json"]


def test_every_tensor_is_stored_once_and_none_is_in_another_file(exported_weights):
    model = onnx.load(exported_weights / "crack.onnx", load_external_data=False)
    tensors = model.graph.initializer
    stored = {(tuple(one.dims), one.data_type, one.raw_data) for one in tensors}
    assert len(stored) == len(tensors) > 50 and not any(one.external_data for one in tensors)
    size = (exported_weights / "crack.safetensors").stat().st_size
    assert (exported_weights / "crack.onnx").stat().st_size < 1.2 * size, "not the weights of each pass"
    onnx.checker.check_model(model)


def test_nothing_of_the_machine_that_exported_is_in_the_graph(exported_weights):
    graph = (exported_weights / "crack.onnx").read_bytes()
    for trace in (str(ROOT), sys.prefix, "site-packages", "stack_trace", ".py"):
        assert trace.encode() not in graph, trace


def test_the_graph_is_for_images_of_any_size(exported_weights):
    model = onnx.load(exported_weights / "crack.onnx")
    (images,), (score, gradient) = model.graph.input, model.graph.output
    assert images.name == "images" and model.opset_import[0].version == export.OPSET
    for value, ranks in ((images, 4), (score, 3), (gradient, 4)):
        sizes = value.type.tensor_type.shape.dim
        assert len(sizes) == ranks and all(size.dim_param for size in sizes[-2:]), "sizes have names, not numbers"


def test_a_graph_that_is_not_the_network_is_refused(exported_weights, monkeypatch):
    graph = (exported_weights / "crack.onnx").read_bytes()
    monkeypatch.setattr(export, "_exported", lambda network: (network.head.weight.zero_(), graph)[1])  # its copy alone
    other, right = random_network(0, 4, torch.float32, "efficientnet-lite0", "log-mean-exp"), dark_network()
    with pytest.raises(RuntimeError, match="the graph is not the network: maps differ by .*, gradients at .*% of the pixels"):
        export.graph_of(other)
    before = {name: value.clone() for name, value in right.state_dict().items()}
    assert export.graph_of(right) == graph
    assert right.state_dict().keys() == before.keys(), "nothing is folded"
    assert all(torch.equal(value, before[name]) for name, value in right.state_dict().items())


def test_weights_of_the_paper_s_encoder_stay_without_a_graph(tmp_path, capsys):
    write_weights(tmp_path / "w")
    before = manifest_of(tmp_path / "w")
    run(tmp_path / "w")
    assert "spalling: resnet34 has no graph, PyTorch runs it" in capsys.readouterr().out
    assert manifest_of(tmp_path / "w")["defects"] == before["defects"]
    assert not list((tmp_path / "w").glob("*.onnx")) and load_weights(tmp_path / "w").configs["spalling"].graph == ""
    with pytest.raises(ValueError, match="resnet34 has no graph, only efficientnet-lite0"):
        export.graph_of(load_weights(tmp_path / "w").configs["spalling"].build_network().eval())


def test_what_the_weights_come_from_is_kept(tmp_path):
    write_weights(tmp_path / "w")
    manifest = manifest_of(tmp_path / "w") | {"parent": {"version": "2026-01-01-abcdef"}}
    (tmp_path / "w" / "manifest.json").write_text(json.dumps(manifest))
    run(tmp_path / "w")
    assert manifest_of(tmp_path / "w")["parent"] == {"version": "2026-01-01-abcdef"}


def test_weights_that_must_not_be_used_get_no_new_manifest(tmp_path, exported_weights):
    folder = shutil.copytree(exported_weights, tmp_path / "weights")
    tensors = bytearray((folder / "crack.safetensors").read_bytes())
    tensors[len(tensors) // 2] ^= 1
    (folder / "crack.safetensors").write_bytes(tensors)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match="crack.safetensors was truncated, altered or swapped"):
        run(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(SystemExit, match="no weights in .*nowhere"):
        run(tmp_path / "nowhere")


def test_a_folder_must_be_named(capsys):
    with pytest.raises(SystemExit):
        export.main([])
    assert "--weights" in capsys.readouterr().err
