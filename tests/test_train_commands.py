"""From clicks and masks to calibrated weights: every command of training on a small set."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defectcam import __main__
from defectcam.evaluation.figures import painted
from defectcam.evaluation.kept import ArrayFile
from defectcam.evaluation.measures import iou
from defectcam.evaluation.photos import labelled_photos
from defectcam.licences import NOT_STATED
from defectcam.postprocess import Cleaning, regions
from defectcam.predict import Predictor
from defectcam.proposals import Component
from defectcam.pyramid import ENLARGED, PhotoMaps, Pyramid, Reading
from defectcam.training import calibrate, pseudo_labels, train
from defectcam.training.calibrate import (
    Calibration,
    few,
    fit_platt,
    least_confidence,
    random_pixels,
    regions_with_features,
    spread,
)
from defectcam.training.click_judge import overlap_of_clicks
from defectcam.training.clicks import Click, write_clicks
from defectcam.training.confidence import reliability_of
from defectcam.training.config import TrainConfig, parse_config
from defectcam.training.dark_lines import dark_lines
from defectcam.training.grabcut import grabcut
from defectcam.training.labels import UNKNOWN, read_photo_rgb
from defectcam.training.pseudo_labels import pseudo_mask
from defectcam.training.sources import gather, regions_without
from defectcam.training.start import start_network
from defectcam.weights import load_weights
from tests.conftest import ROOT, dark_wall, little_training


OWN = {"licence": "own photos", "terms": "free", "source": "us"}


@pytest.fixture(scope="module", autouse=True)
def little_work():
    with little_training(val_crops=32):
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Photos of 96 x 160: six walls with a dark spot, the defect "spalling", and three without in a set of theirs."""
    folder = tmp_path_factory.mktemp("data")
    stems = {"walls": [f"spall{i}" for i in range(6)], "plain": [f"plain{i}" for i in range(3)]}
    (folder / "walls" / "masks" / "spalling").mkdir(parents=True)
    for set_name, own in stems.items():
        (folder / set_name / "images").mkdir(parents=True)
        for i, stem in enumerate(own):
            photo, mask = dark_wall([(40 + 12 * i, 48, 22)] if set_name == "walls" else [], seed=i)
            cv2.imwrite(str(folder / set_name / "images" / f"{stem}.png"), photo[..., ::-1])
            if mask.any():
                cv2.imwrite(str(folder / set_name / "masks" / "spalling" / f"{stem}.png"), mask * np.uint8(255))
    splits = {
        "walls": {"train": stems["walls"][:4], "val": stems["walls"][4:]},
        "plain": {"train": stems["plain"][:1], "val": stems["plain"][1:]},
    }
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def test_pseudo_masks_keep_what_was_clicked_on():
    outline = np.zeros((60, 140), bool)
    outline[15:20, 12:38] = outline[15:20, 48:60] = True  # clicked on, and what a gap of 10 px parts from it
    outline[15:20, 80:84] = True  # 20 px from that
    outline[45:48, 85:105] = True  # a false proposal
    mask = pseudo_mask(outline, [(20, 9), (120, 10)])  # the first 6 px beside its outline
    assert (mask[15:20, 12:38] == 255).all() and (mask[15:20, 48:60] == 255).all()
    assert (mask == 255).sum() == 5 * (26 + 12)
    assert (mask[14, 12:38] == UNKNOWN).all() and not mask[:14, :60].any()  # next to the outline, farther off
    assert not mask[40:55, 80:110].any()
    assert (mask[10, 104:137] == UNKNOWN).all() and not mask[10, :104].any()  # a defect that the map missed
    assert pseudo_mask(outline, []).max() == 0


def test_of_a_region_around_a_crack_its_dark_line_is_kept():
    photo, crack = dark_wall([], 200, 200)[0], np.zeros((200, 200), np.uint8)
    cv2.line(crack, (20, 60), (180, 130), 1, 3)
    photo[crack > 0] = 70
    wide = pseudo_labels.grown(crack > 0, 15)
    lines = dark_lines(photo, wide)
    assert iou(lines, crack > 0) > 0.6 and iou(wide, crack > 0) < 0.2
    assert not dark_lines(photo, np.zeros_like(wide)).any() and not dark_lines(dark_wall([], 200, 200)[0], wide).any()


def test_grabcut_finds_the_edges_of_clicked_spalls_and_those_that_the_map_overlooked():
    photo, spall = dark_wall([], 300, 400)[0], np.zeros((300, 400), np.uint8)
    for x, y in ((150, 140), (330, 60)):
        cv2.ellipse(spall, (x, y), (40, 28), 20, 0, 360, 1, -1)
    stain = np.zeros_like(spall)
    cv2.circle(stain, (330, 230), 25, 1, -1)
    photo[spall > 0], photo[stain > 0] = photo[spall > 0] // 2, photo[stain > 0] // 2
    seen = np.zeros(spall.shape, bool)
    seen[100:180, 90:210] = True  # around the first spall, far too wide
    clicks, patches = [(150, 140), (330, 60)], [(20, 20, 60, 60), (20, 240, 60, 280), (310, 210, 350, 250)]
    cut = grabcut(photo, seen, clicks, patches)
    assert iou(cut, spall > 0) > 0.75 and (cut == grabcut(photo, seen, clicks, patches)).all()
    assert grabcut(photo, seen, clicks, patches[:2])[225:235, 325:335].any() and not cut[225:235, 325:335].any()  # the stain
    mask = pseudo_mask(cut, clicks, patches)
    assert (mask[spall > 0] == 255).mean() > 0.9 and not mask[210:250, 310:350].any()  # a negative click on the stain
    assert not grabcut(photo, seen, [], patches).any()
    assert grabcut(photo, np.ones_like(seen), clicks, []).all()  # no colour is left for what is not the defect
    large = cv2.resize(photo, None, fx=6, fy=6), cv2.resize(seen.astype(np.uint8), None, fx=6, fy=6) > 0
    times_six = [(6 * x, 6 * y) for x, y in clicks], [tuple(6 * value for value in patch) for patch in patches]
    assert iou(cv2.resize(grabcut(*large, *times_six).astype(np.uint8), (400, 300)) > 0, spall > 0) > 0.75


def test_the_least_confidence_keeps_to_what_annotators_bear_on_every_set():
    """0.5 false proposals per megapixel, or one, without the defect, together and on each set; 1.5 per photo with it."""
    quiet = [("a", 500_000, [0.9, 0.3])] + [("a", 500_000, [0.1])] * 9  # 5 megapixels: 2 are allowed
    assert least_confidence(quiet, []) == pytest.approx(0.101)
    assert least_confidence(quiet + [("a", 500_000, [0.25])], []) == pytest.approx(0.251)
    busy = quiet + [("b", 500_000, [0.6])]  # one is allowed on the set, but two on all together
    assert least_confidence(busy, []) == pytest.approx(0.301)
    many = [("b", 50_000, [0.6, 0.5])] + [("b", 50_000, [])] * 19  # 1 megapixel
    large = [("a", 30_000_000, [0.9])]  # 15 are allowed on all together, but one on the set of many photos
    assert least_confidence(large + many, []) == pytest.approx(0.501)
    assert least_confidence(large + many[:-1], []) == 0.05
    wrong = [("w", [0.8, 0.75, 0.7])] * 2  # 2 photos: 3 are allowed
    assert least_confidence(busy, wrong) == pytest.approx(0.751)
    assert least_confidence([("a", 100, [])], [("w", [])]) == 0.05
    assert least_confidence([("a", 100, [0.999, 0.999])], []) == 0.95  # something can still be proposed
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1, 2], 5) == [1, 2]


def test_the_climb_is_chosen_on_photos_of_every_set():
    sizes = {"small": [(200, 200)] * 100, "large": [(3000, 4000)] * 9, "rare": [(500, 500)] * 20}
    photos = [SimpleNamespace(set_name=name, stem=number, image_rgb=np.broadcast_to(np.uint8(0), (*size, 3)))
              for name, some in sizes.items() for number, size in enumerate(some)]  # fmt: skip
    for finest, of_small, of_rare in ((2.0, 37, 6), (1.0, 37, 6), (0.5, 100, 20)):
        chosen = few(photos, Reading(finest, 16, 0.5, (None,)))
        assert Counter(photo.set_name for photo in chosen) == {"small": of_small, "large": 4, "rare": of_rare}
    assert [photo.stem for photo in chosen if photo.set_name == "large"] == [0, 2, 5, 8]


def test_probabilities_are_the_share_of_pixels_that_are_the_defect():
    rng = np.random.default_rng(0)
    maps = [rng.normal(-1, 3, (200, 300)).astype(np.float32) for _ in range(4)]
    truths = [rng.random(one.shape) < 1 / (1 + np.exp(-(0.5 * one - 1))) for one in maps]
    samples = [random_pixels(logits, truth, rng) for logits, truth in zip(maps, truths)]
    assert fit_platt(samples) == pytest.approx((0.5, -1), abs=0.1)
    without = random_pixels(np.full((200, 300), -9, np.float32), None, rng)  # a photo without the defect
    slope, intercept = fit_platt([*samples, without])
    assert 1 / (1 + np.exp(9 * slope - intercept)) < 0.02


def test_a_region_is_right_where_most_of_it_lies_near_the_truth():
    logits, truth = np.full((60, 90), -5, np.float32), np.zeros((60, 90), bool)
    truth[10:30, 10:30] = True
    logits[9:31, 9:31] = 5  # a little larger
    logits[40:50, 60:80] = 3  # elsewhere
    maps = SimpleNamespace(levels={1.0: logits})
    found = regions_with_features(maps, logits, 0, Cleaning(0, 0, 1), truth)
    assert [(features[0], right) for features, right in found] == [(5, True), (3, False)]
    assert [right for _, right in regions_with_features(maps, logits, 0, Cleaning(0, 0, 1), None)] == [False, False]


def run(*arguments):
    """A command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["defectcam", *map(str, arguments)])
        __main__.main()


def run_in_two_processes(*arguments):
    """A command as a person types it, with torchrun in front of it. Forks of this process could wait for its threads for ever."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "defectcam"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *map(str, arguments)], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMMON = "--defect spalling --encoder efficientnet-lite0 --decoder 8,8,8,8 --pooling log-mean-exp --seed 0".split()


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Folder with everything the commands write, one after the other."""
    out = tmp_path_factory.mktemp("out")
    data = ["--data", data_dir, "--sets", "walls", "--none-sets", "plain"]
    run("train", *COMMON, *data, "--labels", "clicks", "--encoder-weights", "imagenet", "--crop-px", 32, "--batch", 8,
        "--lr", "1e-3", "--head-lr", "1e-2", "--steps", 40, "--val-every", 20, "--out", out / "clicks")  # fmt: skip
    start = ["--init", out / "clicks" / "best.safetensors", "--crop-px", 64, "--batch", 4, "--lr", "5e-3",
             "--steps", 30, "--val-every", 15]  # fmt: skip
    run_in_two_processes("train", *COMMON, *data, *start, "--out", out / "outlines")
    choose = ["--defect", "spalling", "--data", data_dir, "--sets", "walls", "--healthy-sets", "plain"]

    def run_calibrate(arm, *more):
        with pytest.MonkeyPatch.context() as patch:
            if arm != "outlines":  # one graph is enough here: to export takes 10 s
                patch.setattr(calibrate, "ENCODERS_WITH_GRAPH", ())
            run("calibrate", *choose, "--network", out / arm, *more, "--out", out / f"weights-{arm}")

    run_calibrate("clicks")
    masks = ["--defect", "spalling", "--data", data_dir, "--sets", "walls", "--unlabelled-sets", "plain"]
    run("pseudo-labels", "--weights", out / "weights-clicks", *masks, "--iterations", 1, "--out", out / "pseudo")
    run("train", *COMMON, *data, *start, "--labels", "clicks", "--masks", out / "pseudo", "--out", out / "second")
    (out / "licences.json").write_text(json.dumps({"walls": OWN, "elsewhere": OWN}))
    run_calibrate("outlines", "--iterations", 1, "--licences", out / "licences.json")
    run_calibrate("second", "--iterations", 1)
    return out


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def test_calibrated_weights_say_what_their_sets_allow(trained):
    """What they began with counts as a set, and its terms are unknown."""
    config = load_weights(trained / "weights-outlines").configs["spalling"]
    start = f"start {config.training['network']['init_sha256'][:12]}"
    assert set(config.training["licences"]) == {"walls", "plain", start}
    assert config.licences["walls"] == OWN and config.licences["plain"] == config.licences[start] == NOT_STATED
    without = load_weights(trained / "weights-second").configs["spalling"]
    assert set(without.licences) == {"walls", "plain", start} and without.licences["walls"] == NOT_STATED


@pytest.mark.parametrize("options, reason", [
    (["--defect", "notice"], "'notice' is the tag 'notice' of the function: give it another name"),
    (["--defect", "moss", "--licences", "nowhere.json"], "nowhere.json cannot be read"),
])  # fmt: skip
def test_calibration_refuses_names_and_licences_before_any_work(tmp_path, options, reason):
    rest = ["--network", tmp_path, "--data", tmp_path, "--sets", "walls", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=reason):
        calibrate.main([*options, *map(str, rest)])


def test_two_processes_train_one_network_and_write_one_record(trained):
    record = record_of(trained / "outlines")
    assert record["processes"] == 2 and record["labels"] == "outlines" and record["batch"] == 4
    assert [row["step"] for row in record["history"]] == [15, 30]
    assert record["best_val"] > 0.6 and record["photos"] == 5 and record["photos_without"] == 1


def test_processes_share_a_batch_without_overlap():
    alone = [list(draws) for draws in train.own_draws(3, 6, 8, 0, 1)]
    shared = [list(train.own_draws(3, 6, 8, process, 2)) for process in range(2)]
    together = [sorted([*one, *other]) for one, other in zip(*shared)]
    assert together == alone == [list(range(8 * step, 8 * step + 8)) for step in (3, 4, 5)]


def test_clicks_teach_where_the_defect_is_and_the_second_round_learns_from_nothing_but_clicks(trained, data_dir):
    """Its masks come from the first network's proposals, and they are good enough here to learn from."""
    masks = sorted((trained / "pseudo" / "walls").iterdir())
    assert len(masks) == 4
    agreements = []
    for path in masks:
        found = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        truth = cv2.imread(str(data_dir / "walls" / "masks" / "spalling" / path.name), cv2.IMREAD_GRAYSCALE) > 127
        assert set(np.unique(found)) <= {0, UNKNOWN, 255}
        agreements.append(iou(found == 255, truth))
    assert np.mean(agreements) > 0.25
    (plain,) = (trained / "pseudo" / "plain").iterdir()  # nothing was clicked on there: sure proposals alone count
    assert (cv2.imread(str(plain), cv2.IMREAD_GRAYSCALE) == 255).mean() < 0.05
    first, second, with_truth = (record_of(trained / arm) for arm in ("clicks", "second", "outlines"))
    assert first["positive_clicks"] == 4 and first["negative_clicks"] > 4 and "val_f" in first["history"][0]
    assert second["labels"] == "clicks" and second["labels_sha256"] != with_truth["labels_sha256"]
    assert "val_iou" in second["history"][0] and "val_iou" in with_truth["history"][0]


def test_calibrated_weights_load_and_say_how_they_were_made(trained):
    for name, steps, iterations in (("clicks", 40, 2), ("outlines", 30, 1), ("second", 30, 1)):
        weights = load_weights(trained / f"weights-{name}")
        config = weights.configs["spalling"]
        assert config.training["network"] == record_of(trained / name) and config.training["network"]["steps"] == steps
        assert config.training["sets"] == ["walls"] and config.training["healthy_sets"] == ["plain"]
        assert config.training["calibration"].startswith("defectcam calibrate --defect spalling --data ")
        assert (config.encoder, config.decoder_channels) == ("efficientnet-lite0", (8, 8, 8, 8))
        assert (config.iterations, config.pooling) == (iterations, "log-mean-exp")
        tried = config.training["readings_tried"]
        assert len(tried) == len(calibrate.OTHER_FINEST) * len(calibrate.SHARPNESSES)
        assert f"finest {config.finest_scale:g}, sharpness {config.sharpness:g}" in tried
        levels = config.climb["g_ref"]
        assert config.climb["xi"] == 0.012 and levels[0] > 0 and levels[1:] in ([], [None])
        assert set(config.training["climbs_tried"]) == {"finest level, xi 0.012", "every level, xi 0.012"}
        assert config.graph == ("spalling.onnx" if name == "outlines" else "")
        judged = config.training["reliability"]
        assert judged["regions"] == sum(row["proposals"] for row in judged["bins"]) >= judged["right"] > 0 and judged["folds"] > 1
        files = {"manifest.json", "spalling-reliability.png", config.file, config.graph} - {""}
        assert {path.name for path in (trained / f"weights-{name}").iterdir()} == files
        assert cv2.imread(str(trained / f"weights-{name}" / "spalling-reliability.png")) is not None


def test_clicks_alone_calibrate_weights_that_find_what_was_clicked_on(trained, data_dir, tmp_path, monkeypatch):
    """Neither sets nor masks are named; of what lies between the clicks nothing is known."""
    monkeypatch.setattr(calibrate, "ENCODERS_WITH_GRAPH", ())
    masks = data_dir / "walls" / "masks" / "spalling"
    lines, truths = ["image,x,y,defect,patch_px"], {}
    for stem in json.loads((data_dir / "splits.json").read_text())["walls"]["val"]:
        photo = data_dir / "walls" / "images" / f"{stem}.png"
        truths[photo] = cv2.imread(str(masks / f"{stem}.png"), cv2.IMREAD_GRAYSCALE) > 127
        ys, xs = np.nonzero(truths[photo])
        far = np.argwhere(cv2.distanceTransform((~truths[photo]).astype(np.uint8), cv2.DIST_C, 3) > 20)
        lines += [f"{photo},{xs[len(xs) // 2]},{ys[len(ys) // 2]},spalling,", f"{photo},{far[0][1]},{far[0][0]},none,30"]
    (tmp_path / "val.csv").write_text("\n".join(lines))
    run("calibrate", "--defect", "spalling", "--network", trained / "outlines", "--val-clicks", tmp_path / "val.csv",
        "--out", tmp_path / "weights")  # fmt: skip
    predictor = Predictor(load_weights(tmp_path / "weights"), "cpu", "eager")
    found = [painted([one.component for one in predictor.propose(read_photo_rgb(photo), "spalling", steps=0)], truth.shape)
             for photo, truth in truths.items()]  # fmt: skip
    assert np.mean([iou(mask, truth) for mask, truth in zip(found, truths.values())]) > 0.3
    with pytest.raises(SystemExit, match="no negative click"):
        (tmp_path / "val.csv").write_text("\n".join([lines[0], *lines[1::2]]))
        calibrate.main(["--defect=spalling", f"--network={trained / 'outlines'}", f"--val-clicks={tmp_path / 'val.csv'}",
                        f"--out={tmp_path / 'second'}"])  # fmt: skip


def test_the_overlap_of_clicks_is_the_harmonic_mean_of_hit_clicks_and_free_patches():
    truth = np.zeros((60, 60), bool)
    truth[10, 10] = truth[40, 40] = True
    photos = [SimpleNamespace(truth=truth, patches_xyxy=((20, 0, 40, 20), (0, 30, 20, 50))),
              SimpleNamespace(truth=None, patches_xyxy=((0, 0, 60, 60), (5, 5, 10, 10)))]  # fmt: skip
    masks = [np.zeros((60, 60), bool) for _ in photos]
    assert overlap_of_clicks(photos, masks) == 0
    masks[0][5:15, 5:15] = masks[1][30:35, 30:35] = True  # one of two clicks, one of four patches
    assert overlap_of_clicks(photos, masks) == pytest.approx(2 * 0.5 * 0.75 / 1.25)


def calibration_of(trained, data_dir, arm):
    return Calibration(
        argparse.Namespace(
            defect="spalling", network=trained / arm, data=data_dir, sets=["walls"], healthy_sets=["plain"], photos=None,
            out=trained,
        )
    )


def test_photos_and_maps_in_the_file_are_those_of_the_photos(trained, data_dir):
    """Also when a photo is read once more, in another way, after others."""
    work = calibration_of(trained, data_dir, "outlines")
    photos = list(labelled_photos(data_dir, ["walls"], ["plain"], "val", "spalling"))
    assert [(one.set_name, one.stem) for one in work.plain] == [(one.set_name, one.stem) for one in photos]
    for finest, sharpness in ((1.0, 0.5), (ENLARGED, 3.0), (0.5, 3.0), (ENLARGED, 0.5), (1.0, 3.0)):
        reading = Reading(finest, 16, sharpness, (None,))
        for kept, photo in zip(work.plain, photos):
            assert np.array_equal(kept.image_rgb, photo.image_rgb)
            assert (kept.truth is None) == (photo.truth is None)
            assert photo.truth is None or np.array_equal(kept.truth, photo.truth)
            maps, wanted = work.maps(kept, reading), PhotoMaps(work.engine, reading, Pyramid(photo.image_rgb))
            assert np.array_equal(maps.merged(), wanted.merged()) and maps.levels.keys() == wanted.levels.keys()
    assert any(one.enlarged for one in work.plain.values())
    own = load_weights(trained / "weights-outlines").configs["spalling"].reading
    climbed, reading = [], replace(reading, climbs=own.climbs[:1])
    for photo in photos:
        maps = PhotoMaps(work.engine, reading, Pyramid(photo.image_rgb))
        maps.climb([2], np.ones((1, 1), bool), 160)
        climbed.append(maps.merged(2))
    for found, wanted in zip(work.climbed(list(work.plain), reading, 2), climbed, strict=True):
        assert np.array_equal(found, wanted)


def test_what_lies_in_a_file_takes_no_memory_and_leaves_no_file(tmp_path):
    file = ArrayFile(tmp_path / "not" / "there")
    rng, arrays = np.random.default_rng(0), []
    for shape, dtype in (((3, 5), bool), ((7, 2, 3), np.uint8), ((4, 4), np.float32), ((2,), np.float64)):
        arrays.append(rng.integers(0, 2, shape).astype(dtype))
        assert file.append(arrays[-1][..., ::-1]) == len(arrays) - 1
    for found, array in zip(file, arrays, strict=True):
        assert found.dtype == array.dtype and np.array_equal(found, array[..., ::-1]) and found.flags.aligned
    file[2][1] = 5
    assert (file[2][1] == 5).all() and np.array_equal(file[3], arrays[3][::-1])
    assert list(tmp_path.iterdir()) == []

    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory of this process is read from Linux")

    def resident_mb():
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024

    before = resident_mb()
    for _ in range(12):
        file.append(np.full((2500, 2500), 1, np.float32))  # 25 MB
        assert file[len(file) - 1].sum() == 2500**2
    assert resident_mb() - before < 100


def test_reliability_is_of_regions_on_photos_that_the_fit_did_not_see():
    """The feature tells the photo, and nothing else: a fit with the photo would be sure and right."""
    rng, found = np.random.default_rng(0), {}
    for photo in range(10):
        own = np.eye(10)[photo]
        found["walls", f"a{photo} (0,0,9,9)"] = found["walls", f"a{photo} (9,0,18,9)"] = [((*own,), photo % 2 == 0)] * 20
    record, picture = reliability_of("spalling", found, 0.5)
    assert record["folds"] == 5 and record["regions"] == 400 and record["right"] == 200
    assert all(0.2 < row["confidence"] < 0.8 for row in record["bins"])
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape[2] == 3

    for photo in range(30):  # the feature is the logit of being right
        logits = rng.normal(0, 2, 60)
        right = rng.random(60) < 1 / (1 + np.exp(-logits))
        found["plain", str(photo)] = [((one, *np.zeros(9)), bool(is_right)) for one, is_right in zip(logits, right)]
    honest = {key: some for key, some in found.items() if key[0] == "plain"}
    record, _ = reliability_of("sp/a$ll<b>", honest, 0.5)
    assert record["error"] < 0.06 and len(record["bins"]) == 10
    alone, picture = reliability_of("spalling", {("plain", "1"): honest["plain", "1"], ("plain", "2"): []}, 0.5)
    assert alone["folds"] == alone["regions"] == 0 and alone["bins"] == [] and picture


def test_the_function_proposes_what_calibration_judged(trained, data_dir):
    """Theta is a probability, calibration thresholds the map; the function climbs around its regions alone."""
    work = calibration_of(trained, data_dir, "outlines")
    predictor = Predictor(load_weights(trained / "weights-outlines"))
    config = predictor.weights.configs["spalling"]
    climbed = work.climbed(work.labelled, config.reading, config.iterations)
    overlap, least = work.best_threshold(work.labelled, climbed, config.cleaning)
    assert config.least_logit(config.cam_threshold) == pytest.approx(least, abs=0.05)
    assert overlap > 0.6
    for photo, logits in zip(work.labelled, climbed):
        judged = regions(logits, least, config.cleaning)
        proposals = predictor.propose(photo.image_rgb, "spalling")
        assert iou(painted([one.component for one in proposals], judged.shape), judged) > 0.95
    for photo in work.healthy:
        assert predictor.propose(photo.image_rgb, "spalling") == []


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
def test_the_paper_s_classifier_has_a_decoder_for_each_of_fig_4_s_resolutions(downsamplings):
    paper = ["--defect", "crack", "--paper", "--data", "d", "--sets", "walls", "--out", "o", "--downsamplings", str(downsamplings)]
    config, _ = parse_config("", paper)
    network = start_network(config)[0]
    assert config.decoder[-2:] == (32, 16) and network.stride_px == 2**downsamplings
    assert network.score_map(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 64)


def test_training_starts_from_the_weights_given(trained):
    deployed = trained / "weights-outlines" / "spalling.safetensors"
    config = TrainConfig("spalling", Path("d"), sets=("walls",), decoder=(8, 8, 8, 8), init=deployed)
    started, wanted = start_network(config)[0], load_file(trained / "outlines" / "best.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in started.state_dict().items())
    for changes in ({"decoder": (4, 4, 4, 4)}, {"encoder": "resnet34", "decoder": (), "downsamplings": 2}):
        with pytest.raises(ValueError, match="holds no network with --encoder"):
            start_network(replace(config, **changes))


def test_pseudo_labels_of_other_facts_or_half_of_them_are_refused(trained, data_dir, tmp_path, capsys):
    given = ["--weights", trained / "weights-clicks", "--defect", "spalling", "--data", data_dir, "--sets", "walls"]
    given = [str(one) for one in given]
    with pytest.raises(SystemExit, match="pseudo holds masks of .*'refine': None.*: choose another --out"):
        pseudo_labels.main([*given, "--refine", "dark-lines", "--out", str(trained / "pseudo")])
    with pytest.raises(SystemExit, match="plain was named as a set with spalling, but has no folder masks/spalling"):
        pseudo_labels.main([*given[:-1], "plain", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        pseudo_labels.main([*given[:4], "--clicks", "gone.csv", "--out", str(tmp_path / "none")])
    assert "--clicks gone.csv is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no weights for 'rust'; there are .*spalling"):
        pseudo_labels.main([*given, "--defect", "rust", "--out", str(tmp_path / "rust")])
    with pytest.raises(SystemExit, match="none is not complete"):
        train.main([*COMMON, *given[4:], "--masks", str(tmp_path / "none"), "--out", str(tmp_path)])


@pytest.mark.parametrize("refine", [[], ["--refine", "dark-lines"], ["--refine", "grabcut"]])
def test_own_clicks_give_pseudo_labels_that_a_training_takes(trained, data_dir, tmp_path, refine):
    photos = [data_dir / "walls" / "images" / f"spall{i}.png" for i in range(3)]
    clicks = [Click(str(photos[i]), 40 + 12 * i, 48, "Spalling") for i in range(2)]
    clicks += [Click(str(photos[0]), 140, 48, "none", patch_px=24), Click(str(photos[2]), 140, 48, "none", patch_px=24)]
    write_clicks(tmp_path / "clicks.csv", clicks)
    config = TrainConfig("spalling", clicks=tmp_path / "clicks.csv", masks=tmp_path / "pseudo")
    with pytest.raises(ValueError, match="pseudo has no mask of a photo of --clicks .*clicks.csv: write them by `defectcam pseudo"):
        gather(config, "train")
    run("pseudo-labels", "--weights", trained / "weights-clicks", "--defect", "spalling", "--clicks", tmp_path / "clicks.csv",
        *refine, "--iterations", 1, "--out", tmp_path / "pseudo")  # fmt: skip
    labels = [source.read() for source in gather(config, "train")]
    assert [len(of_photo.clicks) for of_photo in labels] == [2, 1, 1]
    assert labels[2].outline is None  # a negative click says nothing of the rest of its photo
    for i, of_photo in enumerate(labels[:2]):
        truth = cv2.imread(str(data_dir / "walls" / "masks" / "spalling" / f"spall{i}.png"), 0) > 0
        assert of_photo.outline[48, 40 + 12 * i] in (255, UNKNOWN) and not of_photo.outline[:, :4].any()
        if "dark-lines" in refine:  # there is none, in a spot that is wider than a crack
            assert not (of_photo.outline == 255).any()
        if "grabcut" in refine:
            assert iou(of_photo.outline == 255, truth) > 0.7
    assert not labels[0].outline[36:60, 128:152].any()
    photos[1].with_name("moved.png").write_bytes(photos[1].read_bytes())
    write_clicks(tmp_path / "clicks.csv", [dataclasses.replace(clicks[1], image=str(photos[1].with_name("moved.png")))])
    with pytest.raises(ValueError, match="has no mask of a photo of --clicks"):
        gather(config, "train")
    photos[1].with_name("moved.png").unlink()


def test_sure_proposals_are_the_defect_and_doubtful_ones_unknown():
    def proposal(left, confidence):
        component = Component(np.ones((10, 10), bool), left, 20)
        return SimpleNamespace(component=component, confidence=confidence)

    mask = pseudo_labels.sure_mask([proposal(10, 0.9), proposal(60, 0.5)], (60, 100))
    assert (mask[20:30, 10:20] == 255).all() and (mask == 255).sum() == 100
    assert (mask[20:30, 60:70] == UNKNOWN).all() and mask[19, 15] == UNKNOWN and mask[17, 15] == 0


def test_calibration_needs_photos_with_the_defect_and_without(trained, data_dir, tmp_path):
    given = ["--defect", "spalling", "--network", trained / "outlines", "--data", data_dir, "--out", tmp_path / "w"]
    with pytest.raises(SystemExit, match="there are 2 and 0: name other --sets or --healthy-sets"):
        calibrate.main([str(one) for one in (*given, "--sets", "walls")])
    assert not (tmp_path / "w").exists()


def test_regions_of_another_defect_are_known_to_be_without_this_one_and_nothing_else_is(data_dir):
    config = TrainConfig("crack", data_dir, clicks=Path("own.csv"), val_clicks=Path("val.csv"), none_regions=("walls:spalling",))
    sources = list(regions_without(config, "walls", "spalling"))
    masks = [cv2.imread(str(path), 0) > 0 for path in sorted((data_dir / "walls" / "masks" / "spalling").iterdir())]
    assert len(sources) == 4
    for source in sources:
        outline = source.read().outline
        assert set(np.unique(outline)) == {0, UNKNOWN}
        grown = [cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) > 0 for mask in masks]  # 4 px around
        assert any(np.array_equal(outline == 0, one) for one in grown)


def test_a_photo_of_a_set_with_the_defect_needs_a_mask(data_dir, tmp_path):
    shutil.copytree(data_dir / "walls", tmp_path / "walls")
    shutil.copy(data_dir / "splits.json", tmp_path)
    (tmp_path / "walls" / "masks" / "spalling" / "spall1.png").unlink()
    words = [*COMMON, "--data", str(tmp_path), "--sets", "walls", "--steps", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="spall1.png has no mask of spalling: a photo without it has an all black one"):
        train.main(words)
