"""Retraining on a small set: from clicks to weights that can be deployed or are kept back, and nothing is overwritten."""

import argparse
import json
import re
import shutil
import subprocess
from dataclasses import replace
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defectcam.evaluation.photos import LabelledPhoto
from defectcam.feedback import retrain
from defectcam.feedback.compare import ComparedPhoto, changes_of, figures_of, most_different, no_worse, picture_of
from defectcam.feedback.retrain import merged_clicks
from defectcam.feedback.versions import NOT_PROMOTED, assemble
from defectcam.paths import file_name
from defectcam.training import calibrate, train
from defectcam.training.clicks import Click, read_clicks, write_clicks
from defectcam.training.dataset import CropDataset
from defectcam.weights import WeightsError, load_weights, read_manifest, write_manifest
from tests.conftest import ROOT, dark_network, dark_wall, little_training

TRAIN, VAL = slice(0, 3), slice(3, None)
RECORD = {"encoder": "efficientnet-lite0", "decoder": [16, 16, 8, 8], "downsamplings": 4, "pooling": "log-mean-exp"}


@pytest.fixture(scope="module", autouse=True)
def little_work():
    with little_training(val_crops=4):
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Photos of 96 x 160: four walls with a dark spot, the defect "spalling", and four without in a set of theirs."""
    folder = tmp_path_factory.mktemp("data")
    stems = {"walls": [f"spall{i}" for i in range(4)], "plain": [f"plain{i}" for i in range(4)]}
    (folder / "walls" / "masks" / "spalling").mkdir(parents=True)
    for set_name, own in stems.items():
        (folder / set_name / "images").mkdir(parents=True)
        for i, stem in enumerate(own):
            photo, mask = dark_wall([(40 + 8 * i, 48, 22)] if set_name == "walls" else [], seed=i)
            cv2.imwrite(str(folder / set_name / "images" / f"{stem}.png"), photo[..., ::-1])
            if mask.any():
                cv2.imwrite(str(folder / set_name / "masks" / "spalling" / f"{stem}.png"), mask * np.uint8(255))
    splits = {name: {"train": own[TRAIN], "val": own[VAL]} for name, own in stems.items()}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def calibrate_spalling(data_dir, run, out):
    """`defectcam calibrate` of the network in a folder."""
    calibrate.calibrate(
        argparse.Namespace(
            defect="spalling", network=run, data=data_dir, sets=["walls"], healthy_sets=["plain"], photos=None,
            iterations=1, out=out,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(data_dir, tmp_path_factory):
    """Weights for spalling, calibrated on that set, and for rust, which has no clicks."""
    folder = tmp_path_factory.mktemp("running")
    (folder / "run").mkdir()
    save_file(dark_network().state_dict(), folder / "run" / "best.safetensors")
    record = RECORD | {"crop_px": 32, "batch": 4}  # it does not tell its sets
    record |= {"arm": "outlines", "scales": [0.9, 1.1], "none_regions": ["plain:spalling"]}
    (folder / "run" / "record.json").write_text(json.dumps(record))
    weights = folder / "weights"
    calibrate_spalling(data_dir, folder / "run", weights)
    (entry,) = json.loads((weights / "manifest.json").read_text())["defects"].values()
    for suffix in (".safetensors", ".onnx"):
        shutil.copyfile(weights / f"spalling{suffix}", weights / f"rust{suffix}")
    rust = entry | {"file": "rust.safetensors", "graph": "rust.onnx", "threshold": 0.4}
    write_manifest(weights, {"spalling": entry, "rust": rust})
    return weights


@pytest.fixture(scope="module")
def new(data_dir, tmp_path_factory):
    """What weak-labels writes: clicks on three train photos and, by mistake, on a val photo; masks of all of them."""
    folder = tmp_path_factory.mktemp("feedback")
    (folder / "clicks").mkdir()
    clicks = []
    for i in (0, 1, 2, 3):
        clicks.append(Click(str(data_dir / "walls" / "images" / f"spall{i}.png"), 40 + 8 * i, 48, "spalling", "",
                            f"walls/spall{i}", 1 + i / 4, f"interaction{i}"))  # fmt: skip
    plain = data_dir / "plain" / "images" / "plain0.png"
    clicks.append(Click(str(plain), 60, 40, "none", "spalling", "plain/plain0", 2.0, "interaction4"))
    write_clicks(folder / "clicks" / "spalling.csv", clicks)
    shutil.copytree(data_dir / "walls" / "masks" / "spalling", folder / "masks" / "spalling" / "walls")
    (folder / "masks" / "spalling" / "plain").mkdir()
    cv2.imwrite(str(folder / "masks" / "spalling" / "plain" / "plain0.png"), np.zeros((96, 160), np.uint8))
    return folder


def test_weights_of_an_earlier_version_are_calibrated_again_beside_sound_ones_alone(data_dir, running, tmp_path):
    weights = shutil.copytree(running, tmp_path / "weights")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(weights / "spalling.safetensors", run / "best.safetensors")
    (run / "record.json").write_text(json.dumps(RECORD))

    def spoil(defect):
        manifest = json.loads((weights / "manifest.json").read_text())
        manifest["defects"][defect]["confidence_weights"].pop()
        (weights / "manifest.json").write_text(json.dumps(manifest))

    spoil("spalling")
    with pytest.raises(WeightsError, match="'spalling'"):
        read_manifest(weights)
    calibrate_spalling(data_dir, run, weights)
    assert load_weights(weights).configs.keys() == {"spalling", "rust"}

    spoil("rust")
    before = contents(weights)
    with pytest.raises(WeightsError, match="'rust': confidence_weights must have 8 numbers"):
        calibrate_spalling(data_dir, run, weights)
    assert contents(weights) == before


def arguments(data_dir, running, new, out, *more):
    options = ["--data", data_dir, "--weights", running, "--new", new, "--out", out, "--steps", 3, *more]
    return [str(option) for option in options]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def no_new_graphs(patch):
    """Networks that are trained here get no graph: to export one takes 10 s."""
    patch.setattr(calibrate, "ENCODERS_WITH_GRAPH", ())


@pytest.fixture(scope="module")
def promoted(data_dir, running, new, tmp_path_factory):
    """OUT of a run that may be worse by anything."""
    out, before = tmp_path_factory.mktemp("promoted") / "two", contents(running)
    with pytest.MonkeyPatch.context() as patch:
        no_new_graphs(patch)
        retrain.main(arguments(data_dir, running, new, out, "--margin", 1))
    assert contents(running) == before
    return out


def test_promoted_weights_load_and_name_their_parent(promoted, running):
    weights, (running_version, running_configs) = load_weights(promoted), read_manifest(running)
    assert weights.version != running_version and list(weights.configs) == ["spalling", "rust"]
    parent = json.loads((promoted / "manifest.json").read_text())["parent"]
    assert parent["version"] == running_version and len(parent["manifest_sha256"]) == 64
    config, before = weights.configs["spalling"], running_configs["spalling"]
    record = config.training["network"]
    assert (record["steps"], record["crop_px"], record["batch"]) == (3, 32, 4) and config.training["sets"] == ["walls"]
    assert record["init_sha256"] == before.sha256 != config.sha256
    assert {name: record[name] for name in RECORD} == RECORD and config.iterations == before.iterations == 1
    began_with = {name: record[name] for name in ("labels", "scales", "none_regions")}  # for the next retraining
    assert began_with == {"labels": "outlines", "scales": [0.9, 1.1], "none_regions": ["plain:spalling"]}
    assert json.loads((promoted / "retrain.json").read_text())["promoted"] is True
    assert not (promoted / "rejected").exists()


def test_deploy_takes_the_folder(promoted):
    done = subprocess.run(
        [ROOT / "deploy.sh", "weights", promoted, "--dry-run"], capture_output=True, text=True, cwd=ROOT
    )
    assert "no weights in" not in done.stderr + done.stdout


def test_altered_running_weights_stop_the_run_before_anything_is_trained(data_dir, running, new, tmp_path):
    altered = shutil.copytree(running, tmp_path / "altered")
    (altered / "rust.safetensors").write_bytes((altered / "rust.safetensors").read_bytes()[:-4])
    with pytest.raises(SystemExit, match="rust.safetensors was truncated"):
        retrain.main(arguments(data_dir, altered, new, tmp_path / "two"))
    assert not (tmp_path / "two" / "work").exists()


def test_a_defect_without_new_clicks_stays_as_it_was(promoted, running):
    for file in ("rust.safetensors", "rust.onnx"):
        assert (promoted / file).read_bytes() == (running / file).read_bytes()
    old, new = (json.loads((folder / "manifest.json").read_text())["defects"]["rust"] for folder in (running, promoted))
    assert old == new and new["threshold"] == 0.4


def test_clicks_on_val_photos_are_left_out(promoted):
    clicks = read_clicks(promoted / "clicks" / "spalling.csv")
    assert [click.interaction for click in clicks] == ["interaction0", "interaction1", "interaction2", "interaction4"]
    assert [click.weight for click in clicks] == [1, 1.25, 1.5, 2]
    identity = json.loads((promoted / "retrain.json").read_text())["identity"]["defects"]["spalling"]
    assert (identity["new_clicks"], identity["on_val"]) == (4, 1)
    record = json.loads((promoted / "work" / "spalling" / "network" / "record.json").read_text())
    assert record["positive_clicks"] == 3 and record["photos"] >= 3  # people's; of the sets the outlines are learnt


def test_the_report_shows_figures_and_pictures(promoted):
    page = (promoted / "report.html").read_text()
    assert "<b>Promoted.</b>" in page and "against the running ones, " in page and "As they were: rust." in page
    assert page.count("<td>walls") == page.count("<td>all") == 2 and "1 clicks on val photos" in page
    pictures = [path for path in (promoted / "pictures").rglob("*") if path.is_file()]
    for path in pictures:
        assert path.relative_to(promoted).as_posix() in page and cv2.imread(str(path)).shape[1] == 3 * 360
    assert 0 < len(pictures) <= 4


def test_a_defect_with_a_name_that_no_file_can_have(data_dir, running, new, tmp_path, monkeypatch):
    """The sets' masks lie in folders called so; files that the commands write are called otherwise."""
    graph = (running / "spalling.onnx").read_bytes()  # of another network, since to export takes 10 s
    monkeypatch.setattr("defectcam.training.calibrate.graph_of", lambda network: graph)
    odd = "sp/$x^$ <b>"
    data, weights, feedback = (shutil.copytree(folder, tmp_path / folder.name) for folder in (data_dir, running, new))
    (data / "walls" / "masks" / odd).parent.mkdir()
    (data / "walls" / "masks" / "spalling").rename(data / "walls" / "masks" / odd)
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["defects"] = {odd: manifest["defects"]["spalling"]}
    (weights / "manifest.json").write_text(json.dumps(manifest))
    clicks = [replace(click, negative_for=click.negative_for and odd, defect=odd if click.defect == "spalling" else click.defect)
              for click in read_clicks(feedback / "clicks" / "spalling.csv")]  # fmt: skip
    write_clicks(feedback / "clicks" / file_name(odd, ".csv"), clicks)
    (feedback / "masks" / "spalling").rename(feedback / "masks" / file_name(odd))
    before = contents(tmp_path)
    out = tmp_path / "two"
    retrain.main(arguments(data, weights, feedback, out, "--margin", 1, "--steps", 1, "--val-photos", 1))
    config = load_weights(out).configs[odd]
    assert (config.file, config.graph) == ("sp%2F$x^$ %3Cb%3E.safetensors", "sp%2F$x^$ %3Cb%3E.onnx")
    assert len(read_clicks(out / "clicks" / file_name(odd, ".csv"))) == 4
    assert before.keys() == {path for path in contents(tmp_path) if path.parts[0] != "two"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "sp/$x^$ &lt;b&gt;: 4 new clicks" in page
    for picture in re.findall('src="([^"]*)"', page):
        assert cv2.imread(str(out / unquote(picture))) is not None


def test_every_defect_keeps_a_file_of_its_own(running, tmp_path):
    """The running weights call one defect's file as the new weights call another's."""
    weights, new = shutil.copytree(running, tmp_path / "weights"), shutil.copytree(running, tmp_path / "new")
    manifest = json.loads((weights / "manifest.json").read_text())
    spalling, rust = manifest["defects"]["spalling"], manifest["defects"]["rust"]
    for field, suffix in (("file", ".safetensors"), ("graph", ".onnx")):
        (weights / f"rust{suffix}").rename(weights / f"old{suffix}")
        (weights / f"spalling{suffix}").rename(weights / f"rust{suffix}")
        (weights / f"old{suffix}").rename(weights / f"spalling{suffix}")
        spalling[field], rust[field] = rust[field], spalling[field]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    (new / "spalling.onnx").write_bytes(b"of the new weights")
    tensors = {name: value + 1 for name, value in load_file(new / "spalling.safetensors").items()}
    save_file(tensors, new / "spalling.safetensors")
    (tmp_path / "out" / "work").mkdir(parents=True)
    folder = assemble(weights, {"spalling": new}, tmp_path / "out" / "work" / "candidate")
    configs = read_manifest(folder)[1]
    assert (folder / configs["spalling"].file).read_bytes() == (new / "spalling.safetensors").read_bytes()
    assert (folder / configs["rust"].file).read_bytes() == (weights / "spalling.safetensors").read_bytes()
    assert load_weights(folder).graph("spalling") == b"of the new weights"
    assert (folder / configs["rust"].graph).read_bytes() == (weights / "spalling.onnx").read_bytes()


def test_the_same_command_again_changes_nothing(promoted, data_dir, running, new, capsys):
    before = contents(promoted)
    retrain.main(arguments(data_dir, running, new, promoted, "--margin", 1))
    assert "deploy.sh weights" in capsys.readouterr().out
    assert contents(promoted) == before
    with pytest.raises(SystemExit, match="holds a run with other margin, steps: choose another --out"):
        retrain.main(arguments(data_dir, running, new, promoted, "--steps", 4))
    assert contents(promoted) == before


def test_weights_that_are_not_good_enough_are_kept_back(data_dir, running, new, tmp_path, capsys, monkeypatch):
    """With outlines: trained on the finished ones and the sets', and nothing is lost with the rejection."""
    no_new_graphs(monkeypatch)
    out, before = tmp_path / "two", contents(running)
    with pytest.raises(SystemExit) as error:
        own = {"walls": {"licence": "our own photos", "terms": "free", "source": "2026"}}
        (tmp_path / "licences.json").write_text(json.dumps(own))
        options = ["--margin", -1, "--outlines", "--licences", tmp_path / "licences.json"]
        retrain.main(arguments(data_dir, running, new, out, *options))
    assert error.value.code == NOT_PROMOTED == 3
    assert "not promoted" in capsys.readouterr().out
    assert contents(running) == before
    assert not {*out.glob("*.safetensors"), *out.glob("*.onnx")} and not (out / "manifest.json").exists()
    assert "Not promoted." in (out / "rejected" / "report.html").read_text()
    record = json.loads((out / "work" / "spalling" / "network" / "record.json").read_text())
    assert record["labels"] == "outlines" and record["positive_clicks"] == 0
    assert (record["photos"], record["photos_without"]) == (3 + 3 + 1 + 3, 1 + 3)  # people's and the sets'
    assert (record["scales"], record["crop_px"]) == ([0.9, 1.1], 32)
    weights = load_weights(out / "rejected")
    assert weights.configs["spalling"].training["network"] == record
    licences = weights.configs["spalling"].licences
    assert licences["walls"] == own["walls"] and licences["plain"]["terms"] == "unknown"


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(promoted, data_dir, running, new, tmp_path, monkeypatch):
    no_new_graphs(monkeypatch)
    out = tmp_path / "two"
    options = arguments(data_dir, running, new, out, "--margin", 1)
    crop = CropDataset.__getitem__

    def killed_at_the_third_step(self, draw):
        if self.augment and draw >= 8:
            raise KeyboardInterrupt
        return crop(self, draw)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", -1)
        patch.setattr(CropDataset, "__getitem__", killed_at_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            retrain.main(options)
    assert (out / "work" / "spalling" / "network" / "last.safetensors").exists()
    assert not (out / "manifest.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "compare", killed)
        with pytest.raises(KeyboardInterrupt):
            retrain.main(options)
    calibration = out / "work" / "spalling" / "weights" / "manifest.json"
    written = calibration.stat().st_mtime_ns
    retrain.main(options)
    assert calibration.stat().st_mtime_ns == written  # what was done is not done again
    tensors, whole = load_file(out / "spalling.safetensors"), load_file(promoted / "spalling.safetensors")
    assert tensors.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-4)
    found, wanted = (read_manifest(folder)[1]["spalling"] for folder in (out, promoted))
    for name in ("iterations", "finest_scale", "cleaning", "climb"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.threshold == pytest.approx(wanted.threshold, abs=0.01)


@pytest.mark.parametrize(
    "prepare, options, reason",
    [
        (lambda out: (out.mkdir(), (out / "mine.txt").touch()), [], "holds no run of defectcam retrain"),
        (None, ["--sets", "bridges"], "no set 'bridges' for spalling.*--sets"),
        (None, ["--defects", "rust"], "nothing to learn"),
        (None, ["--defects", "algae"], "--defects names algae.*spalling"),
        (None, ["--old-clicks", "broken"], "broken/spalling.csv has a click on 'rust'"),
        (None, ["--licences", "gone.json"], "gone.json cannot be read"),
        (None, ["--old-clicks", "gone"], "gone/spalling.csv line 2: there is no photo nowhere.png"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(data_dir, running, new, tmp_path, monkeypatch, prepare, options, reason):
    monkeypatch.chdir(tmp_path)
    photo = str(data_dir / "walls" / "images" / "spall0.png")
    for folder, click in (("broken", Click(photo, 1, 1, "rust")), ("gone", Click("nowhere.png", 1, 1, "spalling"))):
        (tmp_path / folder).mkdir()
        write_clicks(tmp_path / folder / "spalling.csv", [click])
    if prepare:
        prepare(tmp_path / "two")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=reason):
        retrain.main(arguments(data_dir, running, new, tmp_path / "two", *options))
    assert contents(tmp_path) == before


def test_a_later_harvest_replaces_what_an_earlier_one_said():
    old = [Click("a", 1, 1, "rust", interaction="one"), Click("a", 9, 9, "rust", interaction="two"), Click("b", 5, 5, "none")]
    new = [Click("a", 2, 2, "rust", interaction="one"), Click("a", 3, 3, "rust", interaction="one")]
    assert merged_clicks(old, new) == [*old[1:], *new]


def test_interactions_that_are_gone_are_learnt_from_no_more(tmp_path):
    by_hand, elsewhere = Click("a", 1, 1, "rust", "", "wall/a"), Click("c", 1, 1, "rust", "", "wall/c", 1.0, "three")
    gone = Click("a", 9, 9, "rust", "", "wall/a", 1.0, "two")
    (tmp_path / "wall").mkdir()
    (tmp_path / "wall" / "a.png").touch()
    harvested = retrain.harvested_groups(tmp_path)
    assert harvested == {"wall/a"} and merged_clicks([by_hand, gone, elsewhere], [], harvested) == [by_hand, elsewhere]


def test_without_new_feedback_there_is_nothing_to_learn(data_dir, running, new, tmp_path):
    with pytest.raises(SystemExit, match="nothing to learn: no new clicks"):
        retrain.main(arguments(data_dir, running, new, tmp_path / "three", "--old-clicks", new / "clicks"))
    assert not (tmp_path / "three").exists()


def test_the_verdict_counts_misses_and_false_proposals():
    truth = np.zeros((50, 60), bool)
    truth[10:30, 10:40] = True
    nothing, image = np.zeros_like(truth), np.zeros((50, 60, 3), np.uint8)
    wall, plain = LabelledPhoto("walls", "a", image, truth), LabelledPhoto("plain", "b", image, None)
    same = figures_of("rust", [ComparedPhoto(wall, truth, truth), ComparedPhoto(plain, nothing, nothing)])
    assert set(same) == {"walls", "plain", "all"} and changes_of(same["all"]) == {"mean_saved": 0, "iou": 0}
    missed = changes_of(figures_of("rust", [ComparedPhoto(wall, truth, nothing)])["all"])
    assert missed == {"mean_saved": -1, "iou": -1}
    flooded = changes_of(figures_of("rust", [ComparedPhoto(wall, truth, truth), ComparedPhoto(plain, nothing, ~nothing)])["all"])
    assert flooded["mean_saved"] == 0 and flooded["iou"] == pytest.approx(600 / 3600 - 1, abs=1e-3)
    assert no_worse({"mean_saved": -0.02, "iou": 0.5}, 0.02) and not no_worse({"mean_saved": -0.0201, "iou": 0.5}, 0.02)


def test_the_photos_that_differ_most_come_first():
    masks = [np.zeros((20, 20), bool) for _ in range(3)]
    masks[1][:10], masks[2][:9] = True, True
    photo = LabelledPhoto("walls", "a", np.zeros((20, 20, 3), np.uint8), masks[1])
    far, near = ComparedPhoto(photo, masks[1], masks[0]), ComparedPhoto(photo, masks[1], masks[2])
    assert most_different([ComparedPhoto(photo, masks[1], masks[1]), near, far]) == [far, near]
    assert picture_of(near).shape == (360, 3 * 360, 3)
