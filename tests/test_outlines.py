"""From masks and clicks to an outline network, calibrated weights and the table: every command on a small set."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defectcam.evaluation.measures import iou
from defectcam.evaluation.survey import LabelledPhoto, figures, labelled_photos
from defectcam.network import DefectNet
from defectcam.outline_network import OutlineNet
from defectcam.training import calibrate, outline, pseudo, train
from defectcam.training.calibrate import Choice, least_confidence, spread
from defectcam.training.outline import (
    UNKNOWN,
    OutlineDataset,
    OutlineLoss,
    OutlinePhoto,
    load_outline_photo,
)
from defectcam.training.pseudo import pseudo_mask
from defectcam.weights import load_weights
from tests.conftest import ROOT, random_network


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Photos of 96 x 128, noise; six with a dark blob, the defect "spalling", and three without in a set of theirs."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    stems = {"walls": [f"spall{i}" for i in range(6)], "plain": [f"plain{i}" for i in range(3)]}
    for set_name, names in stems.items():
        (folder / set_name / "images").mkdir(parents=True)
        (folder / set_name / "masks" / "spalling").mkdir(parents=True)
        for i, stem in enumerate(names):
            photo = rng.integers(120, 180, (96, 128, 3), np.uint8)
            if set_name == "walls":
                mask = np.zeros((96, 128), np.uint8)
                cv2.ellipse(mask, (40 + 8 * i, 48), (22, 14), 0, 0, 360, 255, -1)
                photo[mask > 0] = rng.integers(20, 60, (int((mask > 0).sum()), 3), np.uint8)
                cv2.imwrite(str(folder / set_name / "masks" / "spalling" / f"{stem}.png"), mask)
            cv2.imwrite(str(folder / set_name / "images" / f"{stem}.png"), photo)
    splits = {
        "walls": {"train": stems["walls"][:4], "val": stems["walls"][4:]},
        "plain": {"train": stems["plain"][:1], "val": stems["plain"][1:]},
    }
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def outline_photo(data_dir, stem="spall0", scale=1.0):
    wall = data_dir / "walls"
    return load_outline_photo(wall / "images" / f"{stem}.png", wall / "masks" / "spalling" / f"{stem}.png", scale)


def test_masks_shrink_with_their_photos_and_the_unknown_stays_unknown(data_dir, tmp_path):
    full, half = outline_photo(data_dir), outline_photo(data_dir, scale=0.5)
    assert half.image_rgb.shape == (48, 64, 3) and half.coverage.shape == half.known.shape == (48, 64)
    assert abs(half.coverage.mean() - full.coverage.mean()) < 2  # a pixel that is half defect says so
    assert full.known.all()
    values = np.zeros((96, 128), np.uint8)
    values[:, 64:], values[:48, :64] = UNKNOWN, 255
    cv2.imwrite(str(tmp_path / "mask.png"), values)
    photo = load_outline_photo(data_dir / "walls" / "images" / "spall0.png", tmp_path / "mask.png", 0.5)
    assert not photo.known[:, 33:].any() and photo.known[:, :31].all()
    assert (photo.coverage[:23, :31] == 255).all() and not photo.coverage[25:].any()


def test_a_mask_that_does_not_fit_its_photo_is_refused(data_dir, tmp_path):
    photo = data_dir / "walls" / "images" / "spall0.png"
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((5, 5), np.uint8))
    with pytest.raises(ValueError, match=r"mask.png is \(5, 5\), its photo \(96, 128\)"):
        load_outline_photo(photo, tmp_path / "mask.png", 1.0)
    with pytest.raises(FileNotFoundError, match="none.png"):
        load_outline_photo(photo, tmp_path / "none.png", 1.0)


def test_crops_and_their_masks_move_together(data_dir):
    crops = OutlineDataset([outline_photo(data_dir)], [], 48, seed=0)
    shares = []
    for draw in range(30):
        image, coverage, known = crops[draw]
        assert image.shape == (3, 48, 48) and coverage.shape == known.shape == (48, 48)
        if 0.1 < float(coverage.mean()) < 0.9:  # the blob is dark whatever turn, flip, scale and light
            assert image.float().mean(0)[coverage > 0.9].mean() < image.float().mean(0)[coverage < 0.1].mean() - 20
        shares.append(float(coverage.mean()))
    assert min(shares) < 0.05 and max(shares) > 0.3
    again = OutlineDataset([outline_photo(data_dir)], [], 48, seed=0)[7]
    assert all(torch.equal(one, other) for one, other in zip(again, crops[7]))


def test_one_crop_in_five_is_of_a_photo_without_the_defect(data_dir):
    photo = outline_photo(data_dir)
    plain = OutlinePhoto(np.full_like(photo.image_rgb, 255), np.zeros_like(photo.coverage), np.ones_like(photo.known))
    crops = OutlineDataset([photo], [plain], 32, seed=0)
    assert [bool((crops[draw][0] > 190).all()) for draw in range(10)] == ([False] * 4 + [True]) * 2
    with pytest.raises(ValueError, match="photos with the defect, got none"):
        OutlineDataset([], [plain], 32, 0)


def test_the_loss_is_the_formula_over_known_pixels():
    network = random_network(dtype=torch.float32)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 255, (2, 3, 16, 16), np.uint8))
    coverage = torch.from_numpy(rng.random((2, 16, 16)).astype(np.float32))
    known = torch.from_numpy((rng.random((2, 16, 16)) > 0.3).astype(np.float32))
    found = OutlineLoss(network)(images, coverage, known)
    score = network.score_map(network.normalise(images)) + network.head.bias
    p = 1 / (1 + np.exp(-score.double().numpy()))
    c, k = coverage.double().numpy(), known.numpy() > 0
    entropy = -(c * np.log(p) + (1 - c) * np.log(1 - p))[k].mean()
    dice = 1 - (2 * (p * c)[k].sum() + 1) / (p[k].sum() + c[k].sum() + 1)
    assert float(found) == pytest.approx(entropy + dice, rel=1e-4)
    coverage[known == 0] = 0.123  # what nobody vouches for changes nothing
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


def test_the_threshold_leaves_healthy_photos_in_peace_and_few_misses():
    peaks = [0.0] * 90 + [0.4] * 5 + [0.7] * 5
    quiet_set = [[0.3]] * 10 + [[]] * 90
    threshold = least_confidence(peaks, [quiet_set])
    assert 0.4 < threshold < 0.7 and np.mean(np.array(peaks) < threshold) >= 0.9
    busy_set = [[0.8] * 5 + [0.75]] * 30 + [[]] * 70  # 1.5 misses a photo above 0.75
    busy = least_confidence(peaks, [quiet_set, busy_set])
    assert 0.75 < busy < 0.8
    assert least_confidence([0.0] * 10, [[[]]]) == 0.05
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1, 2], 5) == [1, 2]


def test_of_what_serves_as_well_but_for_chance_what_saves_most_is_kept():
    def trial(quiet, merit, saved):
        return calibrate.Trial(quiet, merit, saved, Choice(0, 0.1, 3, None), (), 0.5, [])

    noisy, best, worth, poor = trial(False, 0.9, 0.9), trial(True, 0.72, 0.58), trial(True, 0.712, 0.6), trial(True, 0.7, 0.65)
    assert calibrate.chosen([noisy, best, worth, poor]) is worth
    assert calibrate.chosen([noisy]) is noisy


def test_a_mask_of_another_size_than_its_photo_does_not_judge(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    mask = sorted((tmp_path / "data" / "walls" / "masks" / "spalling").iterdir())[0]
    for path in mask.parent.iterdir():
        cv2.imwrite(str(path), cv2.imread(str(path), 0)[1:])
    with pytest.raises(ValueError, match="mask .* its photo .*: both must be the same"):
        list(labelled_photos(tmp_path / "data", ["walls"], [], "val", "spalling"))


def test_figures_of_a_set():
    truth = np.zeros((50, 60), bool)
    truth[10:30, 10:40] = True
    image = np.zeros((50, 60, 3), np.uint8)
    right, wrong = truth.copy(), np.zeros_like(truth)
    wrong[45:49, 50:58] = True
    photos = [LabelledPhoto("s", name, image, which) for name, which in [("a", truth), ("b", truth), ("c", None)]]
    found = figures("rust", list(zip(photos, [right, wrong, wrong])))
    assert found["photos"] == 2 and found["instances"] == 2
    assert found["iou"] == pytest.approx(600 / (1200 + 32), abs=1e-3)
    assert found["false_components"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["mean_saved"] == 0.5 and found["eq3"] == pytest.approx(0.475) and found["eq3_found"] == 0.95
    assert found["f1_2px"] == 0.5 and found["f1_2px_all"] == pytest.approx(2 / (632 / 600 + 1200 / 600), abs=1e-3)
    assert found["quiet_share"] == 0 and found["healthy_photos"] == 1
    assert figures("rust", [(photos[2], np.zeros_like(truth))])["quiet_share"] == 1


def run(*arguments, processes=1):
    """A command as a person types it; torchrun in front of it for several processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, "defectcam", *map(str, arguments)], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


COMMON = "--defect spalling --decoder 8,8,8 --working-scale 0.5 --lr 3e-3 --seed 0".split()


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Folder with everything the commands write, one after the other."""
    out = tmp_path_factory.mktemp("out")
    data = ["--data", data_dir, "--sets", "walls", "--none-sets", "plain"]
    run("train", *COMMON, *data, "--crop-px", 16, "--batch", 16, "--head-lr", "1e-2", "--steps", 120,
        "--val-every", 60, "--out", out / "classifier")  # fmt: skip
    start = ["--init", out / "classifier" / "best.safetensors", "--crop-px", 32, "--batch", 4, "--steps", 80,
             "--val-every", 40]  # fmt: skip
    run("train-outline", "--arm", "outlines", *COMMON, *data, *start, "--out", out / "outline", processes=2)
    choose = ["--data", data_dir, "--sets", "walls", "--healthy-sets", "plain", "--classifier", out / "classifier"]
    run("calibrate", "--defect", "spalling", *choose, "--choose-climb", "--version", "one", "--out", out / "plain")
    masks = ["--data", data_dir, "--sets", "walls", "--way", "grabcut", "--out", out / "pseudo"]
    run("pseudo-masks", "--weights", out / "plain", "--defect", "spalling", *masks)
    run("train-outline", "--arm", "clicks", "--masks", out / "pseudo", *COMMON, *data, *start, "--out", out / "clicks")
    other = ["--encoder", "efficientnet-lite0", "--encoder-weights", "imagenet", *start[2:]]
    run("train-outline", "--arm", "outlines", *COMMON, *data, *other, "--out", out / "lite")
    for arm in ("outline", "clicks", "lite"):
        run("calibrate", "--defect", "spalling", *choose, "--outline", out / arm, "--way", "network",
            "--version", arm, "--out", out / f"weights-{arm}")  # fmt: skip
    return out


def test_two_processes_train_one_network_and_write_one_record(trained):
    record = json.loads((trained / "outline" / "record.json").read_text())
    assert record["processes"] == 2 and record["arm"] == "outlines" and record["batch"] == 4
    assert [row["step"] for row in record["history"]] == [40, 80]
    assert record["best_val"] > 0.6 and record["photos"] == 4 and record["photos_without"] == 1
    assert cv2.imread(str(trained / "outline" / "curves.png")) is not None


def test_processes_share_a_batch_without_overlap():
    alone = [list(draws) for draws in train.own_draws(3, 6, 8, 0, 1)]
    shared = [list(train.own_draws(3, 6, 8, process, 2)) for process in range(2)]
    assert [sorted([*one, *other]) for one, other in zip(*shared)] == alone == [list(range(8 * s, 8 * s + 8)) for s in (3, 4, 5)]


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
    record = json.loads((trained / "clicks" / "record.json").read_text())
    truth_record = json.loads((trained / "outline" / "record.json").read_text())
    assert record["arm"] == "clicks" and record["masks_sha256"] != truth_record["masks_sha256"]


def test_calibrated_weights_load_and_say_how_they_were_made(trained):
    weights = load_weights(trained / "weights-outline", "cpu")
    fact = weights.facts["spalling"]
    assert weights.version == "outline" and fact.working_scale == 0.5 and fact.window_px == 16
    assert fact.snap["method"] == "network" and "spalling" in weights.outlines
    assert set(fact.training["outlines_tried"]) == {"network"}
    assert fact.training["outline"]["arm"] == "outlines" and fact.training["classifier"]["steps"] == 120
    plain = load_weights(trained / "plain", "cpu").facts["spalling"]
    assert set(plain.training["outlines_tried"]) == {"cam", "superpixels", "grabcut"}
    assert plain.snap is None or plain.snap["method"] in ("superpixels", "grabcut")


def test_an_outline_network_with_another_encoder_ships_beside_the_same_classifier(trained, data_dir, tmp_path):
    shared, lite = (load_weights(trained / f"weights-{arm}", "cpu") for arm in ("outline", "lite"))
    assert type(shared.outlines["spalling"]) is DefectNet and shared.facts["spalling"].outline_encoder == "resnet34"
    assert type(lite.outlines["spalling"]) is OutlineNet and type(lite.networks["spalling"]) is DefectNet
    entry = json.loads((trained / "weights-lite" / "manifest.json").read_text())["defects"]["spalling"]
    assert entry["outline_encoder"] == "efficientnet-lite0" == entry["training"]["outline"]["encoder"]
    assert entry["training"]["outline"]["best_val"] > 0.6
    assert entry["training"]["val"]["walls"]["iou"] > 0.5

    def start(init, out):
        given = ["--data", data_dir, "--sets", "walls", "--init", init, "--out", out]
        more = ["--arm", "outlines", "--encoder", "efficientnet-lite0", "--crop-px", "32", "--batch", "2", "--steps", "1"]
        return outline.parse_args([*COMMON, *more, *map(str, given)])

    deployed = trained / "weights-lite" / "spalling.safetensors"
    found, wanted = outline.outline_network_from(start(deployed, tmp_path)), load_file(trained / "lite" / "best.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    with pytest.raises(SystemExit, match="best.safetensors holds no outline network with encoder efficientnet-lite0"):
        outline.outline_network_from(start(trained / "classifier" / "best.safetensors", tmp_path))


def test_the_table_has_a_row_per_set_method_and_number_of_steps(trained, data_dir, tmp_path):
    out = run("evaluate", "--weights", trained / "weights-outline", "--compare", f"clicks={trained / 'weights-clicks'}",
              "--data", data_dir, "--out", tmp_path)  # fmt: skip
    assert "57 %" in out and "58 %" in out and "40 %" in out and "51 %" in out
    rows = json.loads((tmp_path / "evaluate.json").read_text())
    methods = {(row["method"], row["T"]) for row in rows if row["set"] == "walls"}
    for name in ("weights", "clicks"):
        assert {(f"{name}: ours", str(steps)) for steps in (0, 1, 2, 4, 8, "auto")} <= methods
        assert {(f"{name}: CAM", "0"), (f"{name}: paper", "2"), (f"{name}: outline network alone", "-")} <= methods
    ours = next(row for row in rows if row["method"] == "weights: ours" and row["set"] == "walls")
    assert ours["photos"] == 2 and ours["iou"] > 0.5
    healthy = [row for row in rows if row["set"] == "plain" and row["method"] == "weights: ours"]
    assert healthy and all(row["healthy_photos"] == 2 for row in healthy)
    page = (tmp_path / "evaluate.html").read_text()
    pictures = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "evaluate").rglob("*.*")}
    assert pictures == {"evaluate/cases_spalling.png", *re.findall('src="([^"]*)"', page)} and len(pictures) == 5


def test_a_choice_is_what_the_function_does(trained, data_dir):
    """Calibration judges masks; the function must propose the same ones."""
    from defectcam.evaluation.evaluate import Judge

    judge = Judge("weights", trained / "weights-outline")
    fact = judge.handler.weights.facts["spalling"]
    photo = LabelledPhoto("walls", "x", cv2.imread(str(data_dir / "walls" / "images" / "spall4.png")), np.ones((96, 128), bool))
    surveyed = judge.survey(photo, "spalling")
    (judged,) = [
        mask for method, steps, mask in judge.masks(surveyed, "spalling") if "ours" in method and steps == fact.iterations
    ]
    proposed = np.zeros_like(judged)
    from defectcam.request import Settings

    for component, _ in judge.handler.components(photo.image_rgb, "spalling", Settings()):
        x0, y0, x1, y1 = component.box_xyxy
        proposed[y0 : y1 + 1, x0 : x1 + 1] |= component.mask
    assert np.array_equal(judged, proposed)
    choice = Choice(fact.iterations, fact.cam_threshold, fact.closing_radius_px, fact.snap)
    summed = {fact.iterations: fact.cam_max[fact.iterations] * surveyed.maps[fact.iterations]}
    same_photo = dataclasses.replace(surveyed, maps=summed)
    mask = choice.mask(same_photo, dict(enumerate(fact.cam_max)), fact.min_area_px)
    calibrated = surveyed.at_photo_scale(mask)
    assert not (proposed & ~calibrated).any() and iou(proposed, calibrated) > 0.5


def test_networks_that_do_not_belong_together_are_refused(trained, data_dir, tmp_path, capsys):
    record = json.loads((trained / "outline" / "record.json").read_text())
    (tmp_path / "outline").mkdir()
    given = ["--classifier", trained / "classifier", "--outline", tmp_path / "outline", "--data", data_dir, "--sets", "walls"]
    for other, message in (
        ({"working_scale": 1.0}, "trained with working_scale 1.0, --classifier .* with 0.5"),
        ({"decoder": [4, 4, 4]}, r"trained with decoder \[4, 4, 4\], --classifier .* with \[8, 8, 8\]"),
    ):
        (tmp_path / "outline" / "record.json").write_text(json.dumps(record | other))
        with pytest.raises(SystemExit, match=message):
            calibrate.main(["--defect", "spalling", "--version", "x", "--out", str(tmp_path / "w"), *map(str, given)])
    other = ["--arm", "outlines", "--init", str(trained / "weights-lite" / "spalling.safetensors"), "--data", str(data_dir)]
    args = outline.parse_args([*COMMON, *other, "--sets", "walls", "--out", str(tmp_path / "o")])
    assert type(outline.outline_network_from(args)) is DefectNet  # its outline network is another's: from the classifier
    args.decoder = (4, 4, 4)
    with pytest.raises(ValueError, match="holds no network with --decoder 4,4,4"):
        outline.outline_network_from(args)


def test_pseudo_masks_of_other_facts_or_half_of_them_are_no_ones(trained, data_dir, tmp_path, capsys):
    given = ["--weights", str(trained / "plain"), "--defect", "spalling", "--data", str(data_dir), "--sets", "walls"]
    with pytest.raises(SystemExit, match="pseudo holds masks of .*grabcut.*: choose another --out"):
        pseudo.main([*given, "--way", "cam", "--out", str(trained / "pseudo")])
    with pytest.raises(SystemExit, match="nobody clicked on spalling in the train photos of plain"):
        pseudo.main([*given[:-1], "plain", "--way", "cam", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        outline.parse_args([*COMMON, "--arm", "clicks", "--masks", str(tmp_path / "none"), "--data", str(data_dir), "--sets", "walls", "--out", str(tmp_path / "o")])
    assert "none is not complete" in capsys.readouterr().err


def test_found_instances_are_those_with_a_proposal_also_one_that_saves_nothing():
    truth, proposed = np.zeros((60, 90), bool), np.zeros((60, 90), bool)
    for x in (5, 35, 65):
        truth[10:30, x : x + 15] = True
    proposed[10:30, 5:20] = True  # as it is
    proposed[32:55, 35:85] = True  # touches the second and the third, useless
    proposed[:, 62:] = False  # and now the second alone
    photos = [(LabelledPhoto("s", "a", np.zeros((60, 90, 3), np.uint8), truth), proposed)]
    found = figures("rust", photos)
    assert found["instances"] == 3 and found["eq3"] == pytest.approx(0.95 / 3, abs=1e-3)
    assert found["eq3_found"] == pytest.approx(0.95 / 2)


class Darkness(torch.nn.Module):
    """A network whose logits are known: the darker a pixel, the likelier."""

    halo_px, stride_px = 4, 4

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        self.head.bias.data.fill_(0.5)

    def normalise(self, images_rgb):
        return images_rgb.float()

    def score_map(self, images):
        return (128 - images.mean(1)) / 16


def test_of_outlines_that_run_wide_the_likeliest_pixels_are_learnt_and_nothing_else_of_them():
    image_rgb = np.full((80, 120, 3), 200, np.uint8)
    image_rgb[39:42, :60], image_rgb[39:42, 60:] = 60, 160  # a crack, its second half faint
    coverage = np.zeros((80, 120), np.uint8)
    coverage[34:46] = 255  # four times as wide
    known = np.ones((80, 120), bool)
    known[:, :5] = False
    photo = outline.narrowed(Darkness(), OutlinePhoto(image_rgb, coverage, known))
    assert (photo.coverage[39:42] == 255).all() and photo.known[39:42, 5:].all()
    assert not photo.coverage[:39].any() and not photo.coverage[42:].any()
    assert not photo.known[34:39].any() and not photo.known[42:46].any() and not photo.known[:, :5].any()
    assert photo.known[:34, 5:].all() and photo.known[46:, 5:].all()
    empty = OutlinePhoto(image_rgb, np.zeros_like(coverage), known)
    assert outline.narrowed(Darkness(), empty) is empty


def test_wide_outlines_need_a_network_that_can_tell(data_dir, capsys):
    words = "--arm outlines --defect spalling --sets walls --wide-sets plain --out x --data".split()
    with pytest.raises(SystemExit):
        outline.parse_args([*words, str(data_dir)])
    assert "--wide-sets needs --init" in capsys.readouterr().err


def test_wide_sets_are_learnt_from_beside_the_others(data_dir, tmp_path):
    torch.manual_seed(0)
    train.save_weights(OutlineNet(), tmp_path / "start.safetensors")
    words = f"--arm outlines --defect spalling --data {data_dir} --wide-sets walls --encoder efficientnet-lite0".split()
    args = outline.parse_args([*words, "--init", str(tmp_path / "start.safetensors"), "--sets", "plain", "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="plain0"):  # a set with the defect needs masks
        outline.train_photos(args)
    args.sets = []
    photos = outline.train_photos(args)
    assert len(photos) == 4
    for photo in photos:
        inside = (photo.coverage > UNKNOWN) | ~photo.known
        assert 0.2 < (photo.coverage > UNKNOWN).sum() / inside.sum() < 0.4
