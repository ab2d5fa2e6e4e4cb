"""The loop's proof: what simulated annotators do is what they are said to do, and the whole runs from clicks to table."""

import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from defectcam.evaluation.survey import LabelledPhoto
from defectcam.feedback import loop
from defectcam.feedback.harvest import proposals_of_record
from defectcam.feedback.loop import Annotator, as_many, half_data
from defectcam.feedback.match import match
from defectcam.network import DefectNet
from defectcam.proposals import cvat_shape, find_components
from defectcam.training import train
from defectcam.training.clicks import Click, split_stems
from defectcam.training.crops import read_photo_rgb

WIDTH, HEIGHT = 200, 150


def photo_with(*boxes):
    truth = np.zeros((HEIGHT, WIDTH), bool)
    for x0, y0, x1, y1 in boxes:
        truth[y0:y1, x0:x1] = True
    return LabelledPhoto("walls", "one", np.zeros((HEIGHT, WIDTH, 3), np.uint8), truth if boxes else None)


def proposal(*corners):
    return proposal_of(photo_with(corners).truth)


def proposal_of(mask):
    (component,) = find_components(mask)
    return cvat_shape(
        component, defect="spalling", confidence=0.5, iterations=0, digest="d", shape="polygon", tolerance_px=1.0,
        hole_share=0.02, image_width=WIDTH, image_height=HEIGHT,
    )  # fmt: skip


def outcomes(photo, proposed, error=0.0, seed=0):
    """What the annotator did, as `harvest` sees it: sorted outcomes."""
    shapes = Annotator(error, seed).shapes(photo, proposed, "spalling")
    record = {"image": "0" * 32, "width": WIDTH, "height": HEIGHT, "shapes": proposed, "settings": {}}
    interactions, strangers = match(proposals_of_record(record), shapes, WIDTH, HEIGHT)
    assert not strangers
    return sorted(interaction.outcome for interaction in interactions)


def test_a_proposal_that_fits_is_accepted():
    assert outcomes(photo_with((20, 20, 80, 70)), [proposal(20, 20, 80, 70)]) == ["accepted"]


def test_a_proposal_that_fits_in_part_is_corrected_to_the_true_outline():
    steps = [(20 * i, 20 * i, 180, 20 * i + 20) for i in range(1, 7)]  # of stairs; the proposal lacks the widest one
    photo, proposed = photo_with(*steps), [proposal_of(photo_with(*steps[1:]).truth)]
    assert outcomes(photo, proposed) == ["modified"]
    (shape,) = Annotator(0.0, 0).shapes(photo, proposed, "spalling")
    region = loop.merged([loop.region_of_answer(proposed[0], WIDTH, HEIGHT)])
    assert shape.proposal and shape.kind == "mask" and sum(shape.points[1:-4:2]) == photo.truth.sum() != region.area_px


def test_a_false_proposal_is_rejected_and_a_missed_defect_is_drawn():
    assert outcomes(photo_with((20, 20, 80, 70)), [proposal(120, 90, 150, 120)]) == ["miss", "rejected"]
    assert outcomes(photo_with(), [proposal(120, 90, 150, 120)]) == ["rejected"]


def test_annotators_who_always_err_overlook_and_accept():
    photo, proposed = photo_with((20, 20, 80, 70)), [proposal(120, 90, 150, 120)]
    assert outcomes(photo, proposed, error=1.0) == ["accepted"]


def test_the_same_annotator_does_the_same_again():
    photo = photo_with((5, 5, 30, 30), (50, 5, 80, 30), (100, 5, 130, 30), (5, 60, 30, 90), (60, 60, 90, 90))
    of_seeds = [[len(Annotator(0.5, seed).shapes(photo, [], "spalling")) for _ in range(2)] for seed in range(8)]
    assert all(first == second for first, second in of_seeds) and len({first for first, _ in of_seeds}) > 1


def test_the_arm_without_the_loop_gets_as_many_clicks_of_either_kind():
    given = [Click("p", i, 0, "spalling" if i < 5 else "none") for i in range(20)]
    wanted = [Click("p", 0, 0, "spalling")] * 3 + [Click("p", 0, 0, "none")] * 40
    chosen = as_many(given, wanted, seed=0)
    assert len(set(chosen)) == len(chosen) == 3 + 15
    assert sum(click.defect == "none" for click in chosen) == 15


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Photos of 96 x 128: walls with a dark blob, the defect "spalling", and as many plain ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    stems = {"walls": [f"spall{i}" for i in range(6)], "plain": [f"plain{i}" for i in range(6)]}
    for set_name, own in stems.items():
        (folder / set_name / "images").mkdir(parents=True)
        (folder / set_name / "masks" / "spalling").mkdir(parents=True)
        for i, stem in enumerate(own):
            photo = rng.integers(120, 180, (96, 128, 3), np.uint8)
            if set_name == "walls":
                mask = np.zeros((96, 128), np.uint8)
                cv2.ellipse(mask, (40 + 8 * i, 48), (22, 14), 0, 0, 360, 255, -1)
                photo[mask > 0] = rng.integers(20, 60, (int((mask > 0).sum()), 3), np.uint8)
                cv2.imwrite(str(folder / set_name / "masks" / "spalling" / f"{stem}.png"), mask)
            cv2.imwrite(str(folder / set_name / "images" / f"{stem}.png"), photo)
    (folder / "splits.json").write_text(json.dumps({k: {"train": own[:4], "val": own[4:]} for k, own in stems.items()}))
    return folder


def test_round_one_and_the_annotators_never_see_the_same_photo(data_dir, tmp_path):
    first = half_data(data_dir, ["walls", "plain"], tmp_path / "first", second=False)
    second = half_data(data_dir, ["walls", "plain"], tmp_path / "second", second=True)
    for name in ("walls", "plain"):
        halves = [split_stems(folder, name, "train") for folder in (first, second)]
        assert sorted(halves[0] + halves[1]) == sorted(split_stems(data_dir, name, "train"))
        assert not set(halves[0]) & set(halves[1])
        assert split_stems(first, name, "val") == split_stems(data_dir, name, "val")


def network_that_sees_dark(data_dir):
    """A network with random features and a head fitted to the blobs: what a training would take minutes for."""
    torch.manual_seed(0)
    network = DefectNet()
    stems = [f"spall{i}" for i in range(2)]
    photos = [read_photo_rgb(str(data_dir / "walls" / "images" / f"{stem}.png")) for stem in stems]
    masks = [cv2.imread(str(data_dir / "walls" / "masks" / "spalling" / f"{stem}.png"), 0) > 0 for stem in stems]
    images = torch.stack([torch.from_numpy(photo).permute(2, 0, 1) for photo in photos])
    with torch.no_grad():
        for _ in range(20):  # BatchNorm's means
            network.train()(network.normalise(images))
        features = network.decoder(network.eval().encoder(network.normalise(images))).permute(0, 2, 3, 1).numpy()
        x = np.concatenate([features, np.ones((*features.shape[:3], 1))], axis=3).reshape(-1, features.shape[3] + 1)
        weight = np.linalg.lstsq(x, np.where(np.stack(masks), 4.0, -4.0).ravel(), rcond=None)[0]
        network.head.weight.copy_(torch.from_numpy(weight[None, :-1]))
        network.head.bias.copy_(torch.from_numpy(weight[-1:]))
    return network


def test_all_arms_run_and_are_told_apart(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "VAL_CROPS", 4)
    monkeypatch.setattr(loop, "LR", 1e-5)
    monkeypatch.setattr(loop, "HEAD_LR", 1e-5)
    init = tmp_path / "init.safetensors"
    save_file(network_that_sees_dark(data_dir).state_dict(), init)
    options = ["--defect=spalling", f"--data={data_dir}", "--sets=walls", "--none-sets=plain", f"--init={init}"]
    options += ["--first-steps=2", "--steps=2", "--crop-px=16", "--batch=4", "--error=0", f"--out={tmp_path / 'out'}"]
    loop.main(options)
    found = json.loads((tmp_path / "out" / "loop.json").read_text())
    assert tuple(found["arms"]) == loop.ARMS
    assert all(set(arm["val"]) == {"walls", "plain"} for arm in found["arms"].values())
    outcomes = found["annotators"]
    assert sum(outcomes.get(kind, 0) for kind in ("accepted", "modified", "miss")) == 2  # blobs on the photos shown
    assert found["clicks"]["loop"]["positive"] == 2 == found["clicks"]["plain_clicks"]["positive"]
    records = {arm: tmp_path / "out" / arm / "classifier" / "record.json" for arm in loop.ARMS[:-1]}
    assert len({json.loads(record.read_text())["clicks_sha256"] for record in records.values()}) == 3
    page = (tmp_path / "out" / "loop.md").read_text()
    assert all(page.count(f"| {arm} |") == 2 for arm in loop.ARMS) and (tmp_path / "out" / "loop.png").exists()
    capsys.readouterr()
    trained = (tmp_path / "out" / "loop" / "classifier" / "best.safetensors").stat().st_mtime_ns
    loop.main(options)  # what is done is not done again
    assert (tmp_path / "out" / "loop" / "classifier" / "best.safetensors").stat().st_mtime_ns == trained
    assert json.loads((tmp_path / "out" / "loop.json").read_text()) == found
    with pytest.raises(SystemExit, match="other arguments"):
        loop.main([*options, "--error=0.5"])


def test_what_makes_no_sense_is_refused(tmp_path):
    for options, named in ((["--error", "2"], "--error is 2.0"), ([], "no splits.json")):
        with pytest.raises(SystemExit):
            loop.main([f"--data={tmp_path}", "--sets=a", "--none-sets=b", *options])
