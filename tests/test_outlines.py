"""From clicks and masks to calibrated weights: every command of training on a small set."""

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defectcam import __main__
from defectcam.encoders import normalised
from defectcam.evaluation.figures import painted
from defectcam.evaluation.measures import iou
from defectcam.postprocess import Cleaning, regions
from defectcam.predict import Predictor
from defectcam.training import calibrate, outline, pseudo, train
from defectcam.training.calibrate import Calibration, fit_platt, least_confidence, regions_with_features, spread
from defectcam.training.dark_lines import dark_lines
from defectcam.training.labels import UNKNOWN
from defectcam.training.outline import OutlineDataset, OutlineLoss, OutlinePhoto, load_outline_photo
from defectcam.training.pseudo import pseudo_mask
from defectcam.weights import load_weights
from tests.conftest import ROOT, dark_wall, little_training, random_network
from tests.test_evaluate import darkness_network


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


def outline_photo(data_dir, stem="spall0"):
    wall = data_dir / "walls"
    return load_outline_photo(wall / "images" / f"{stem}.png", wall / "masks" / "spalling" / f"{stem}.png")


def photo_of(image_rgb, coverage=0):
    """A photo of which everything is known; `coverage` 0..255."""
    coverage = np.broadcast_to(np.uint8(coverage), image_rgb.shape[:2]).copy()
    return OutlinePhoto(image_rgb, coverage, np.ones(coverage.shape, bool))


def test_a_mask_says_what_is_the_defect_and_what_is_unknown(data_dir, tmp_path):
    whole = outline_photo(data_dir)
    assert whole.image_rgb.shape == (96, 160, 3) and whole.coverage.shape == whole.known.shape == (96, 160)
    assert whole.known.all() and set(np.unique(whole.coverage)) == {0, 255}
    assert whole.image_rgb[whole.coverage > 0].max() < 60 and whole.image_rgb[whole.coverage == 0].min() >= 120
    values = np.zeros((96, 160), np.uint8)
    values[:, 64:], values[:48, :64] = UNKNOWN, 255
    cv2.imwrite(str(tmp_path / "mask.png"), values)
    photo = load_outline_photo(data_dir / "walls" / "images" / "spall0.png", tmp_path / "mask.png")
    assert not photo.known[:, 64:].any() and photo.known[:, :64].all()
    assert (photo.coverage[:48, :64] == 255).all() and not photo.coverage[48:].any()
    without = load_outline_photo(data_dir / "plain" / "images" / "plain0.png", None)
    assert without.known.all() and not without.coverage.any()


def test_a_mask_that_does_not_fit_its_photo_is_refused(data_dir, tmp_path):
    photo = data_dir / "walls" / "images" / "spall0.png"
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((5, 5), np.uint8))
    with pytest.raises(ValueError, match="mask.png is 5 x 5 px, its photo 160 x 96 px"):
        load_outline_photo(photo, tmp_path / "mask.png")
    with pytest.raises(ValueError, match="cannot read the mask .*none.png"):
        load_outline_photo(photo, tmp_path / "none.png")


def test_crops_and_their_masks_move_together(data_dir):
    crops = OutlineDataset([outline_photo(data_dir)], [], 48, seed=0)
    shares = []
    for draw in range(30):
        image, coverage, known = crops[draw]
        assert image.shape == (3, 48, 48) and coverage.shape == known.shape == (48, 48)
        if 0.1 < float(coverage.mean()) < 0.9:  # the spot is dark whatever turn, flip, scale and light
            assert image.float().mean(0)[coverage > 0.9].mean() < image.float().mean(0)[coverage < 0.1].mean() - 20
        shares.append(float(coverage.mean()))
    assert min(shares) < 0.05 and max(shares) > 0.3
    again = OutlineDataset([outline_photo(data_dir)], [], 48, seed=0)[7]
    assert all(torch.equal(one, other) for one, other in zip(again, crops[7]))


def test_crops_are_of_every_scale_asked_for():
    photo = photo_of(np.full((400, 400, 3), 128, np.uint8))
    photo.coverage[dark_wall([(200, 200, 3)], 400, 400)[1]] = 255
    crops = OutlineDataset([photo], [], 128, seed=0, scales=(0.5, 4.0))
    covered = np.stack([crops[draw][1].numpy() for draw in range(300)])
    rim = covered.copy()
    rim[:, 1:-1, 1:-1] = 0
    whole = covered[(rim.max(axis=(1, 2)) == 0) & (covered.max(axis=(1, 2)) > 0)]  # the spot lies in the crop
    scales = np.sqrt(whole.sum(axis=(1, 2)) / (photo.coverage > 0).sum())
    assert scales.min() == pytest.approx(0.5, rel=0.1) and scales.max() == pytest.approx(4, rel=0.1)
    assert np.histogram(np.log2(scales), [-1.2, 0, 1, 2.2])[0].min() > 0.15 * len(scales)
    half = ((whole > 0.2) & (whole < 0.8)).any(axis=(1, 2))
    assert half.mean() > 0.8  # a pixel that is half defect says so, but where the scale is a whole number


def test_crops_never_leave_the_photo():
    """One that would is moved inside; one larger than the photo shows its largest square."""
    coverage = np.repeat(np.arange(60, dtype=np.uint8) * 4, 40).reshape(60, 40).T  # grows from left to right
    photo = OutlinePhoto(np.full((40, 60, 3), 200, np.uint8), np.ascontiguousarray(coverage), np.ones((40, 60), bool))
    photo.coverage[20, 59] = 255  # every second crop is around it, at the photo's edge
    shown = []
    for crop_px, scale in ((40, 0.25), (40, 1.0), (30, 1.0)):
        crops = OutlineDataset([photo], [], crop_px, seed=0, scales=(scale, scale))
        for draw in range(30):
            image, covered, known = crops[draw]
            assert (known == 1).all() and image.shape == (3, crop_px, crop_px)
            least, most = round(float(covered.min()) * 255 / 4), round(float(covered.quantile(0.99)) * 255 / 4)
            assert most - least == min(crop_px, 40) - 1 and 0 <= least and most <= 59, "as many columns of the photo"
            shown.append(least)
    assert min(shown) == 0 and max(shown) == 30, "its edges are seen too"


def test_every_photo_without_the_defect_has_the_same_chance():
    """Whatever its size and however much of it the network takes for the defect."""
    spotted = photo_of(np.full((40, 40, 3), 128, np.uint8))
    spotted.coverage[10:20, 10:20] = 255
    small, large = (photo_of(np.full((side, side, 3), grey, np.uint8)) for side, grey in ((32, 250), (320, 5)))
    one_pixel, all_pixels = np.array([7], np.int32), np.arange(320 * 320, dtype=np.int32)
    for mistakes, first in (([], 7), ([one_pixel, all_pixels], 6)):
        crops = OutlineDataset([spotted], [small, large], 16, 0, mistakes)
        bright = [float(crops[draw][0].float().mean()) > 128 for draw in range(600) if draw % 10 >= first]
        assert 0.4 < np.mean(bright) < 0.6


def test_three_crops_in_ten_are_of_photos_without_the_defect(data_dir):
    photo = outline_photo(data_dir)
    plain = photo_of(np.full_like(photo.image_rgb, 255))
    crops = OutlineDataset([photo], [plain], 32, seed=0)
    assert [bool((crops[draw][0] > 190).all()) for draw in range(20)] == ([False] * 7 + [True] * 3) * 2
    with pytest.raises(ValueError, match="photos with the defect, got none"):
        OutlineDataset([], [plain], 32, 0)


def test_the_loss_is_the_formula_over_known_pixels():
    network = random_network(dtype=torch.float32)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 255, (2, 3, 16, 16), np.uint8))
    coverage = torch.from_numpy(rng.random((2, 16, 16)).astype(np.float32))
    known = torch.from_numpy((rng.random((2, 16, 16)) > 0.3).astype(np.float32))
    found = OutlineLoss(network)(images, coverage, known)
    p = 1 / (1 + np.exp(-network.score_map(normalised(images)).double().numpy()))
    c, k = coverage.double().numpy(), known.numpy() > 0
    entropy = -(c * np.log(p) + (1 - c) * np.log(1 - p))[k].mean()
    dice = 1 - (2 * (p * c)[k].sum() + 1) / (p[k].sum() + c[k].sum() + 1)
    assert float(found) == pytest.approx(entropy + dice, rel=1e-4)
    coverage[known == 0] = 0.123  # what is unknown changes nothing
    assert float(OutlineLoss(network)(images, coverage, known)) == pytest.approx(float(found), rel=1e-6)


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
    wide = pseudo.grown(crack > 0, 15)
    lines = dark_lines(photo, wide)
    assert iou(lines, crack > 0) > 0.6 and iou(wide, crack > 0) < 0.2
    assert not dark_lines(photo, np.zeros_like(wide)).any() and not dark_lines(dark_wall([], 200, 200)[0], wide).any()


def test_the_least_confidence_keeps_to_what_annotators_bear_on_every_set():
    """0.4 false proposals per megapixel without the defect, 0.5 or one on each set, 1.5 per photo with it."""
    quiet = [("a", 500_000, [0.9, 0.3])] + [("a", 500_000, [0.1])] * 9  # 5 megapixels: 2 are allowed
    assert least_confidence(quiet, []) == pytest.approx(0.101)
    assert least_confidence(quiet + [("a", 500_000, [0.25])], []) == pytest.approx(0.251)
    busy = quiet + [("b", 500_000, [0.6])]  # one is allowed on the set, but two on all together
    assert least_confidence(busy, []) == pytest.approx(0.301)
    many = [("b", 50_000, [0.6, 0.5])] + [("b", 50_000, [])] * 19  # 1 megapixel
    large = [("a", 30_000_000, [0.9])]  # 12 are allowed on all together, but one on the set of many photos
    assert least_confidence(large + many, []) == pytest.approx(0.501)
    assert least_confidence(large + many[:-1], []) == 0.05
    wrong = [("w", [0.8, 0.75, 0.7])] * 2  # 2 photos: 3 are allowed
    assert least_confidence(busy, wrong) == pytest.approx(0.751)
    assert least_confidence([("a", 100, [])], [("w", [])]) == 0.05
    assert least_confidence([("a", 100, [0.999, 0.999])], []) == 0.95  # something can still be proposed
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1, 2], 5) == [1, 2]


def test_probabilities_are_the_share_of_pixels_that_are_the_defect():
    rng = np.random.default_rng(0)
    maps = [rng.normal(-1, 3, (200, 300)).astype(np.float32) for _ in range(4)]
    truths = [rng.random(one.shape) < 1 / (1 + np.exp(-(0.5 * one - 1))) for one in maps]
    assert fit_platt(maps, truths) == pytest.approx((0.5, -1), abs=0.1)
    slope, intercept = fit_platt([*maps, np.full((200, 300), -9, np.float32)], [*truths, None])  # without the defect
    assert 1 / (1 + np.exp(9 * slope - intercept)) < 0.02


def test_a_region_is_right_where_most_of_it_lies_near_the_truth():
    logits, truth = np.full((60, 90), -5, np.float32), np.zeros((60, 90), bool)
    truth[10:30, 10:30] = True
    logits[9:31, 9:31] = 5  # a little larger
    logits[40:50, 60:80] = 3  # elsewhere
    maps = SimpleNamespace(merged=lambda: logits, levels={1.0: logits})
    found = regions_with_features(maps, 0, Cleaning(0, 0, 1), truth)
    assert [(features[0], right) for features, right in found] == [(5, True), (3, False)]
    assert [right for _, right in regions_with_features(maps, 0, Cleaning(0, 0, 1), None)] == [False, False]


def run(*arguments):
    """A command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["defectcam", *map(str, arguments)])
        __main__.main()


def run_in_two_processes(*arguments):
    """A command as a person types it, with torchrun in front of it."""
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
    run("train", *COMMON, *data, "--encoder-weights", "imagenet", "--crop-px", 32, "--batch", 8, "--lr", "1e-3",
        "--head-lr", "1e-2", "--steps", 40, "--val-every", 20, "--out", out / "classifier")  # fmt: skip
    start = ["--init", out / "classifier" / "best.safetensors", "--crop-px", 64, "--batch", 4, "--lr", "5e-3",
             "--steps", 30, "--val-every", 15]  # fmt: skip
    run_in_two_processes("train-outline", "--arm", "outlines", *COMMON, *data, *start, "--out", out / "outlines")
    choose = ["--defect", "spalling", "--data", data_dir, "--sets", "walls", "--healthy-sets", "plain"]

    def run_calibrate(arm, *more):
        with pytest.MonkeyPatch.context() as patch:
            if arm != "outlines":  # one graph is enough here: to export takes 10 s
                patch.setattr(calibrate, "ENCODERS_WITH_GRAPH", ())
            run("calibrate", *choose, "--network", out / arm, *more, "--out", out / f"weights-{arm}")

    run_calibrate("classifier")
    masks = ["--defect", "spalling", "--data", data_dir, "--sets", "walls", "--out", out / "pseudo"]
    run("pseudo-masks", "--weights", out / "weights-classifier", *masks)
    run("train-outline", "--arm", "clicks", "--masks", out / "pseudo", *COMMON, *data, *start, "--out", out / "clicks")
    for arm in ("outlines", "clicks"):
        run_calibrate(arm, "--iterations", 1)
    return out


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def test_two_processes_train_one_network_and_write_one_record(trained):
    record = record_of(trained / "outlines")
    assert record["processes"] == 2 and record["arm"] == "outlines" and record["batch"] == 4
    assert [row["step"] for row in record["history"]] == [15, 30]
    assert record["best_val"] > 0.6 and record["photos"] == 4 and record["photos_without"] == 1
    assert cv2.imread(str(trained / "outlines" / "curves.png")) is not None


def test_processes_share_a_batch_without_overlap():
    alone = [list(draws) for draws in train.own_draws(3, 6, 8, 0, 1)]
    shared = [list(train.own_draws(3, 6, 8, process, 2)) for process in range(2)]
    together = [sorted([*one, *other]) for one, other in zip(*shared)]
    assert together == alone == [list(range(8 * step, 8 * step + 8)) for step in (3, 4, 5)]


def test_the_clicks_arm_learns_from_nothing_but_clicks(trained, data_dir):
    """Its masks come from the classifier's proposals, and they are good enough here to learn from."""
    masks = sorted((trained / "pseudo" / "walls").iterdir())
    assert len(masks) == 4
    agreements = []
    for path in masks:
        found = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        truth = cv2.imread(str(data_dir / "walls" / "masks" / "spalling" / path.name), cv2.IMREAD_GRAYSCALE) > 127
        assert set(np.unique(found)) <= {0, UNKNOWN, 255}
        agreements.append(iou(found == 255, truth))
    assert np.mean(agreements) > 0.25
    record, with_truth = record_of(trained / "clicks"), record_of(trained / "outlines")
    assert record["arm"] == "clicks" and record["masks_sha256"] != with_truth["masks_sha256"]
    assert record["val_masks_sha256"] == with_truth["val_masks_sha256"]


def test_calibrated_weights_load_and_say_how_they_were_made(trained):
    for name, steps, iterations in (("classifier", 40, 2), ("outlines", 30, 1), ("clicks", 30, 1)):
        weights = load_weights(trained / f"weights-{name}")
        fact = weights.facts["spalling"]
        assert fact.training["network"] == record_of(trained / name) and fact.training["network"]["steps"] == steps
        assert fact.training["sets"] == ["walls"] and fact.training["healthy_sets"] == ["plain"]
        assert fact.training["calibration"].startswith("defectcam calibrate --defect spalling --data ")
        assert (fact.encoder, fact.decoder_channels) == ("efficientnet-lite0", (8, 8, 8, 8))
        assert (fact.iterations, fact.pooling) == (iterations, "log-mean-exp")
        tried = fact.training["readings_tried"]
        assert len(tried) == len(calibrate.OTHER_FINEST) * len(calibrate.SHARPNESSES)
        assert f"finest {fact.finest_scale:g}, sharpness {fact.sharpness:g}" in tried
        assert fact.climb["xi"] == 0.012 and fact.climb["g_ref"][0] > 0 and fact.climb["g_ref"][1] is None
        assert fact.graph == ("spalling.onnx" if name == "outlines" else "")


def calibration_of(trained, data_dir, arm):
    return Calibration(
        argparse.Namespace(
            defect="spalling", network=trained / arm, data=data_dir, sets=["walls"], healthy_sets=["plain"], photos=None
        )
    )


def test_the_function_proposes_what_calibration_judged(trained, data_dir):
    """Theta is a probability, calibration thresholds the map; the function climbs around its regions alone."""
    work = calibration_of(trained, data_dir, "outlines")
    predictor = Predictor(load_weights(trained / "weights-outlines"))
    fact = predictor.weights.facts["spalling"]
    climbed = work.climbed(work.labelled, fact.reading, fact.iterations)
    fit, least = work.best_threshold(work.labelled, climbed, fact.cleaning)
    assert fact.least_logit(fact.cam_threshold) == pytest.approx(least, abs=0.05)
    assert fit > 0.6
    for photo, logits in zip(work.labelled, climbed):
        judged = regions(logits, least, fact.cleaning)
        proposals = predictor.propose(photo.image_rgb, "spalling")
        assert iou(painted([one.component for one in proposals], judged.shape), judged) > 0.95
    for photo in work.healthy:
        assert predictor.propose(photo.image_rgb, "spalling") == []


def test_training_starts_from_the_weights_given(trained, data_dir, tmp_path):
    deployed = trained / "weights-outlines" / "spalling.safetensors"
    given = ["--arm", "outlines", "--data", data_dir, "--sets", "walls", "--out", tmp_path, "--init", deployed]
    args = outline.parse_args([*COMMON, *map(str, given)])
    started, wanted = train.network_from(args), load_file(trained / "outlines" / "best.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in started.state_dict().items())
    for changes in ({"decoder": (4, 4, 4, 4)}, {"encoder": "resnet34", "downsamplings": 3}):
        with pytest.raises(ValueError, match="holds no network with --encoder"):
            train.network_from(argparse.Namespace(**vars(args) | changes))


def test_pseudo_masks_of_other_facts_or_half_of_them_are_refused(trained, data_dir, tmp_path, capsys):
    given = ["--weights", trained / "weights-classifier", "--defect", "spalling", "--data", data_dir, "--sets", "walls"]
    given = [str(one) for one in given]
    with pytest.raises(SystemExit, match="pseudo holds masks of .*'dark_lines': False.*: choose another --out"):
        pseudo.main([*given, "--dark-lines", "--out", str(trained / "pseudo")])
    with pytest.raises(SystemExit, match="plain was named as a set with spalling, but has no folder masks/spalling"):
        pseudo.main([*given[:-1], "plain", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="has no weights for 'rust'; there are .*spalling"):
        pseudo.main([*given, "--defect", "rust", "--out", str(tmp_path / "rust")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        words = ["--arm", "clicks", "--masks", str(tmp_path / "none"), "--out", str(tmp_path)]
        outline.parse_args([*COMMON, *given[4:], *words])
    assert "none is not complete" in capsys.readouterr().err


def test_calibration_needs_photos_with_the_defect_and_without(trained, data_dir, tmp_path):
    given = ["--defect", "spalling", "--network", trained / "outlines", "--data", data_dir, "--out", tmp_path / "w"]
    with pytest.raises(SystemExit, match="there are 2 and 0: name other --sets or --healthy-sets"):
        calibrate.main([str(one) for one in (*given, "--sets", "walls")])
    assert not (tmp_path / "w").exists()


def test_of_outlines_that_run_wide_the_likeliest_pixels_are_learnt_and_nothing_else_of_them():
    """With a network whose every score is known: the darker a pixel, the likelier."""
    image_rgb = np.full((80, 120, 3), 200, np.uint8)
    image_rgb[39:42, :60], image_rgb[39:42, 60:] = 60, 160  # a crack, its second half faint
    coverage = np.zeros((80, 120), np.uint8)
    coverage[34:46] = 255  # four times as wide
    known = np.ones((80, 120), bool)
    known[:, :5] = False
    photo = outline.narrowed(darkness_network(), OutlinePhoto(image_rgb, coverage, known))
    assert (photo.coverage[39:42] == 255).all() and photo.known[39:42, 5:].all()
    assert not photo.coverage[:39].any() and not photo.coverage[42:].any()
    assert not photo.known[34:39].any() and not photo.known[42:46].any() and not photo.known[:, :5].any()
    assert photo.known[:34, 5:].all() and photo.known[46:, 5:].all()
    empty = OutlinePhoto(image_rgb, np.zeros_like(coverage), known)
    assert outline.narrowed(darkness_network(), empty) is empty


def test_regions_of_another_defect_are_known_to_be_without_this_one_and_nothing_else_is(data_dir, capsys):
    words = ["--arm", "outlines", "--defect", "crack", "--sets", "plain", "--out", "x", "--data", str(data_dir)]
    args = outline.parse_args([*words, "--none-regions", "walls:spalling"])
    found = outline.regions_without(args)
    stems = [path for path in sorted((data_dir / "walls" / "masks" / "spalling").iterdir())]
    masks = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0 for path in stems]
    assert 0 < len(found) <= sum(mask.any() for mask in masks)
    for photo in found:
        assert not photo.coverage.any() and 0 < photo.known.mean() < 1
        grown = [cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) > 0 for mask in masks]  # 4 px around
        assert any(np.array_equal(photo.known, one) for one in grown if one.shape == photo.known.shape)
    with pytest.raises(SystemExit):
        outline.parse_args([*words, "--none-regions", "walls"])
    assert "SET:DEFECT" in capsys.readouterr().err


def test_wide_outlines_need_a_network_that_can_tell(data_dir, capsys):
    words = "--arm outlines --defect spalling --sets walls --wide-sets plain --out x --data".split()
    with pytest.raises(SystemExit):
        outline.parse_args([*words, str(data_dir)])
    assert "--wide-sets needs --init" in capsys.readouterr().err


def test_wide_sets_are_learnt_from_beside_the_others(trained, data_dir, tmp_path):
    words = ["--arm", "outlines", "--data", data_dir, "--wide-sets", "walls", "--sets", "plain", "--out", tmp_path]
    words += ["--init", trained / "classifier" / "best.safetensors"]
    args = outline.parse_args([*COMMON, *map(str, words)])
    with pytest.raises(ValueError, match="plain was named as a set with spalling, but has no folder masks/spalling"):
        outline.train_photos(args)
    args.sets = []
    photos = outline.train_photos(args)
    assert len(photos) == 4
    for photo in photos:
        inside = (photo.coverage > UNKNOWN) | ~photo.known
        assert 0.2 < (photo.coverage > UNKNOWN).sum() / inside.sum() < 0.4
