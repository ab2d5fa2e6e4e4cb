"""Weights for one campaign: what is learnt, mixed, chosen, written and refused, on small walls with dark spots."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defectcam.feedback import adapt, replay
from defectcam.feedback.adapt import Choice, covered_share, mixed, outline_of_clicks, overlap, window_of
from defectcam.postprocess import regions
from defectcam.training.clicks import Click, write_clicks
from defectcam.training.config import TrainConfig
from defectcam.training.dataset import PhotoLabels
from defectcam.training.hard_negatives import merged_map
from defectcam.training.labels import UNKNOWN
from defectcam.weights import load_weights, read_manifest
from tests.conftest import dark_wall, dark_weights, little_training
from tests.test_retrain import contents


@pytest.fixture(scope="module", autouse=True)
def little_work():
    with little_training(val_crops=4), pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "CROP_PX", 32)
        patch.setattr(adapt, "BATCH", 4)
        patch.setattr(adapt, "ENCODERS_WITH_GRAPH", ())  # to export takes 10 s
        yield


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("running"), ["spalling", "rust"], training={"network": {"sets": ["walls"]}})


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Four finished photos, three of them with the defect; there is no splits.json."""
    folder = tmp_path_factory.mktemp("campaign")
    for part in ("images", "masks/spalling"):
        (folder / "bridge" / part).mkdir(parents=True)
    for number in range(4):
        photo, mask = dark_wall([(50 + 15 * number, 48, 24)] if number else [], seed=10 + number)
        cv2.imwrite(str(folder / "bridge" / "images" / f"pier{number}.png"), photo[..., ::-1])
        cv2.imwrite(str(folder / "bridge" / "masks" / "spalling" / f"pier{number}.png"), mask * np.uint8(255))
    return folder


def words(campaign, running, out, *more):
    given = ["--defect", "spalling", "--weights", running, "--data", campaign, "--sets", "bridge", "--steps", 2, "--out", out]
    return [str(one) for one in (*given, *more)]


@pytest.fixture(scope="module")
def adapted(campaign, running, tmp_path_factory):
    out, before = tmp_path_factory.mktemp("adapted") / "next", contents(running)
    adapt.main(words(campaign, running, out))
    assert contents(running) == before
    return out


def test_the_new_weights_load_name_their_parent_and_leave_other_defects_alone(adapted, running):
    weights, (parent, before) = load_weights(adapted), read_manifest(running)
    assert json.loads((adapted / "manifest.json").read_text())["parent"]["version"] == parent != weights.version
    assert list(weights.configs) == ["spalling", "rust"]
    assert (adapted / "rust.safetensors").read_bytes() == (running / "rust.safetensors").read_bytes()
    config, old = weights.configs["spalling"], before["spalling"]
    (record,) = config.training["adapted"]
    assert record["parent"] == parent and record["photos"] == 4 and record["verdict"] in ("better", "same")
    assert record["config"]["init"].endswith("spalling.safetensors") and record["config"]["frozen_batchnorm"] is True
    assert config.training["network"] == old.training["network"] and config.confidence_weights == old.confidence_weights
    moved = config.least_logit(config.cam_threshold) - old.least_logit(old.cam_threshold)
    assert moved == pytest.approx(record["shift"], abs=0.01)


def test_all_of_the_network_learns_but_the_statistics_of_batchnorms(adapted, running):
    old, new = (load_file(folder / "spalling.safetensors") for folder in (running, adapted))
    after = load_file(adapted / "work" / "all" / "best.safetensors")
    share = adapt.SHARE
    for name, value in new.items():
        frozen = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, old[name]) == frozen, name
        torch.testing.assert_close(value, torch.lerp(old[name], after[name], share) if not frozen else value)


def test_a_replay_pack_is_learnt_beside_the_campaign_and_goes_along(campaign, running, tmp_path, monkeypatch):
    weights, drawn = tmp_path / "weights", []
    shutil.copytree(running, weights)
    replay.main(["--defect=spalling", f"--data={campaign}", "--sets=bridge", f"--out={weights}"])
    pack = replay.read_pack(weights, "spalling")
    assert len(pack) == 3 and not replay.read_pack(weights, "rust")
    for photo in pack:  # the spots are dark, whatever the crop
        assert photo.outline.shape == photo.image_rgb.shape[:2] and photo.image_rgb[photo.outline == 255].mean() < 80
        assert photo.image_rgb[photo.outline == 0].mean() > 120
    real = adapt.crops_of
    monkeypatch.setattr(adapt, "crops_of", lambda config, photos: drawn.append(real(config, photos)) or drawn[-1])
    adapt.main(words(campaign, weights, tmp_path / "next"))
    assert read_manifest(tmp_path / "next")[1]["spalling"].training["adapted"][0]["replay"] == 3
    assert contents(tmp_path / "next" / "replay") == contents(weights / "replay")
    first, *trainings = drawn  # the first draws nothing: it checks the labels
    assert len(first.photos) == 4 and len(trainings) == 3
    for crops in trainings:
        replayed = sum(index >= len(crops.photos) - 3 for index, _ in crops.positives)
        assert 0.3 <= replayed / len(crops.positives) <= 0.5


def test_a_pack_needs_weights_and_outlines_of_the_defect(campaign, running, tmp_path, capsys):
    for options, named in (
        (["--sets=bridge", f"--out={tmp_path}"], "has no manifest.json: name a weights folder"),
        (["--sets=nowhere", f"--out={running}"], "nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            replay.main(["--defect=spalling", f"--data={campaign}", *options])
        assert named in capsys.readouterr().err + str(stopped.value)
    assert not (running / "replay").exists()


def test_the_picture_shows_photos_that_were_not_learnt_from(adapted):
    picture = cv2.imread(str(adapted / "before_after.jpg"))
    assert picture.shape[1] == 3 * adapt.PICTURE_PX and picture.shape[0] >= 4 * 200


def test_every_photo_is_judged_once_by_weights_that_did_not_see_it():
    image_rgb, empty = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    shown = empty.copy()
    shown[10:20, 10:20] = 255
    photos = [PhotoLabels(image_rgb, shown if number % 3 else empty) for number in range(7)]
    photos.append(PhotoLabels(image_rgb, None, (Click("p", 5, 5, "crack"),)))  # it teaches, but cannot judge
    folds = list(adapt.Adaptation(None, {}, TrainConfig("crack", clicks=Path("own.csv")), photos, Path()).folds())
    assert len(folds) == 2 and sorted(index for _, judging in folds for index in judging) == list(range(7))
    for learnt, judging in folds:
        assert not set(learnt) & set(judging) and any(photos[index].shows_defect for index in learnt)
    assert sorted(index for learnt, _ in folds for index in learnt) == list(range(8))


def test_theta_rises_for_the_campaign_but_not_at_the_cost_of_old_sites(running):
    config = load_weights(running).configs["rust"]
    image_rgb, outline = np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80), np.uint8)
    outline[20:60, 20:60] = 255
    wide = np.full((80, 80), -9, np.float32)  # finds more than there is at theta, and the defect alone from one logit above it on
    wide[10:70, 10:70] = config.least_logit(config.cam_threshold) + 0.7
    wide[20:60, 20:60] += 1
    judged = [adapt.JudgedPart(image_rgb, outline, wide, wide)] * 2

    class WithMaps(adapt.Adaptation):
        def maps(self, tensors, image_rgb):
            return tensors["map"]

    def shift(pack, of_pack):
        place = WithMaps(config, {}, TrainConfig("rust", clicks=Path("own.csv")), [], Path(), pack)
        return place.choose(judged, {"map": of_pack}).shift

    old = PhotoLabels(image_rgb, outline)
    assert shift([], None) == shift([old], wide) == 1.0
    faint = np.where(outline == 255, config.least_logit(config.cam_threshold) + 0.7, -9).astype(np.float32)
    assert shift([old], faint) == 0.0


def test_one_photo_teaches_but_cannot_judge(campaign, running, tmp_path, capsys):
    shutil.copytree(campaign, tmp_path / "one")
    for number in (0, 2, 3):
        (tmp_path / "one" / "bridge" / "images" / f"pier{number}.png").unlink()
        (tmp_path / "one" / "bridge" / "masks" / "spalling" / f"pier{number}.png").unlink()
    adapt.main(words(tmp_path / "one", running, tmp_path / "next"))
    assert "verdict: unchecked (theta moved by +0)" in capsys.readouterr().out
    assert load_weights(tmp_path / "next").configs and not (tmp_path / "next" / "before_after.jpg").exists()


def shadowed_wall(seed):
    """A wall with two dark spots and a shadow, for which nothing but its colour tells that it is none: photo, spots' mask, shadow."""
    x, y = 60 + 10 * (seed % 5), 40 + 6 * (seed % 4)
    photo, mask = dark_wall([(x - 30, y, 11), (x + 20, 90 - y, 9)], 128, 224, seed=seed)
    photo[y : y + 24, 150:206] = photo[y : y + 24, 150:206] * np.array([0.25, 0.35, 0.6])
    return photo, mask, (178, y + 12)


def test_clicks_and_rejections_alone_leave_theta_and_do_no_harm(running, tmp_path, capsys, monkeypatch):
    """Of five photos one click on a spot is known, and that the proposal of the shadow was rejected."""
    monkeypatch.setattr(adapt, "CROP_PX", 64)
    clicks = []
    for seed in range(5):
        photo, mask, shadow_xy = shadowed_wall(seed)
        y, x = np.argwhere(mask)[np.count_nonzero(mask) // 2].tolist()
        clicks.append(Click(f"{tmp_path}/pier{seed}.png", x, y, "spalling"))
        clicks.append(Click(f"{tmp_path}/pier{seed}.png", *shadow_xy, "none", "spalling", weight=2.0, patch_px=24))
        cv2.imwrite(clicks[-1].image, photo[..., ::-1])
    write_clicks(tmp_path / "own.csv", clicks)
    options = ["--defect", "spalling", "--weights", running, "--steps", 16, "--clicks", tmp_path / "own.csv"]
    adapt.main([str(one) for one in (*options, "--out", tmp_path / "next")])
    assert "verdict: unchecked" in capsys.readouterr().out
    new, old = (load_weights(folder).configs["spalling"] for folder in (tmp_path / "next", running))
    (record,) = new.training["adapted"]
    assert record["photos"] == 5 and new.cam_threshold == old.cam_threshold
    walls = [shadowed_wall(seed)[:2] for seed in (7, 8, 11)]

    def overlap_of(weights, config):
        network = config.build_network()
        network.load_state_dict(load_file(weights / config.file))
        maps = [merged_map(network, image_rgb, config.reading) for image_rgb, _ in walls]
        masks = [regions(one, config.least_logit(config.cam_threshold), config.cleaning) for one in maps]
        return overlap("spalling", [(mask, truth * np.uint8(255)) for mask, (_, truth) in zip(masks, walls)])

    assert not torch.equal(*(load_file(one / "spalling.safetensors")["head.weight"] for one in (running, tmp_path / "next")))
    assert overlap_of(tmp_path / "next", new) > overlap_of(running, old) - adapt.NOISE_MARGIN
    for kind, own, missing in (("rejections", clicks[1::2], "click on the defect"), ("clicks", clicks[::2], "negative click")):
        write_clicks(tmp_path / "own.csv", own)
        with pytest.raises(SystemExit, match=f"own.csv: there is no {missing}"):
            adapt.main([str(one) for one in (*options, "--out", tmp_path / kind)])


def test_of_a_clicked_photo_the_running_weights_tell_how_far_the_defect_reaches():
    clicks = (Click("p", 20, 20, "crack"), Click("p", 70, 20, "crack"), Click("p", 20, 80, "none", "crack", patch_px=20))
    found = np.zeros((100, 100), bool)
    found[15:25, 10:30] = found[75:85, 10:30] = found[45:55, 10:30] = True  # clicked on, rejected, without a click
    without = np.zeros((100, 100), bool)
    without[:, 60:] = True
    outline = outline_of_clicks(PhotoLabels(np.zeros((100, 100, 3), np.uint8), None, clicks), found, without)
    assert (outline[15:25, 10:30] == 255).all() and (outline[70:90, 10:30] == 0).all()
    assert (outline[45:55, 10:30] == UNKNOWN).all()
    assert outline[20, 70] == 255 and (outline[20, [74, 82]] == UNKNOWN).all()  # overlooked: its extent is not known
    assert outline[20, 90] == 0 and outline[50, 70] == 0 and outline[30, 40] == UNKNOWN


def test_weights_that_are_worse_are_kept_back(campaign, running, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adapt.Adaptation, "choose", lambda self, judged, tensors: Choice(0.0, 0.8, 0.7))
    with pytest.raises(SystemExit) as error:
        adapt.main(words(campaign, running, tmp_path / "next"))
    assert error.value.code == 3 and "verdict: worse: overlap 0.800 before, 0.700 after" in capsys.readouterr().out
    assert not (tmp_path / "next" / "manifest.json").exists()
    assert load_weights(tmp_path / "next" / "rejected").configs


def test_bad_input_is_named_before_anything_is_trained(campaign, running, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    before = contents(tmp_path)
    for given, message in (
        (words(campaign, running, tmp_path / "full"), "full exists and is not empty: choose another --out"),
        (words(campaign, running, tmp_path / "o", "--defect", "algae"), "has no weights for 'algae', only for .*'spalling', 'rust'"),
        (words(campaign, running, tmp_path / "o", "--sets", "pier"), "there is no photo in .*pier/images"),
        (words(campaign, running, tmp_path / "o", "--defect", "rust"), "pier0.png has no mask of rust: a photo without it has an all black one"),
    ):
        with pytest.raises(SystemExit, match=message):
            adapt.main(given)
    with pytest.raises(SystemExit):
        adapt.main(words(campaign, running, tmp_path / "o", "--masks", tmp_path / "m", "--labels", "clicks"))
    assert "--masks gives outlines: leave out --labels clicks" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_photos_without_the_defect_alone_teach_nothing(campaign, running, tmp_path):
    shutil.copytree(campaign, tmp_path / "plain")
    for number in (1, 2, 3):
        (tmp_path / "plain" / "bridge" / "images" / f"pier{number}.png").unlink()
        (tmp_path / "plain" / "bridge" / "masks" / "spalling" / f"pier{number}.png").unlink()
    with pytest.raises(SystemExit, match="training needs photos with the defect, or clicks on it; got none"):
        adapt.main(words(tmp_path / "plain", running, tmp_path / "next"))


def test_the_verdict_needs_a_clear_difference():
    assert Choice(0).verdict == "unchecked"
    verdicts = [Choice(0, 0.5, after).verdict for after in (0.48, 0.495, 0.505, 0.52)]
    assert verdicts == ["worse", "same", "same", "better"]


def test_the_mean_of_two_networks_is_between_them():
    one, two = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}, {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(9)}
    assert torch.equal(mixed(one, two, 0.25)["w"], torch.tensor([0.25, 3.5])) and int(mixed(one, two, 0.25)["n"]) == 3


def test_the_overlap_counts_known_pixels_alone():
    outline = np.zeros((10, 20), np.uint8)
    outline[2:6, 2:6], outline[:, 10:] = 255, UNKNOWN
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:8] = mask[0:5, 12:18] = True
    assert overlap("spalling", [(mask, outline)]) == pytest.approx(8 / 24)
    assert overlap("crack", [(outline == 255, outline)]) == 1 and 0.3 < overlap("crack", [(mask, outline)]) < 1
    assert overlap("spalling", [(np.zeros_like(mask), np.zeros_like(outline))]) == 1
    assert covered_share([PhotoLabels(np.zeros((10, 20, 3), np.uint8), outline)]) == pytest.approx(16 / 200)


def test_a_large_photo_is_judged_by_a_part_that_shows_the_defect():
    outline = np.zeros((3000, 2500), np.uint8)
    outline[2900:2990, 40:90] = 255
    part = window_of(PhotoLabels(np.zeros((3000, 2500, 3), np.uint8), outline), 0)
    assert outline[part].shape == (1024, 1024) and (outline[part] == 255).any()
    small = PhotoLabels(np.zeros((300, 200, 3), np.uint8), np.zeros((300, 200), np.uint8))
    assert small.outline[window_of(small, 0)].shape == (300, 200)
