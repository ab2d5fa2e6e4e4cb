"""The loop's proof: what simulated annotators do is what they are said to do, and the whole runs from clicks to table."""

import json

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

from defectcam import encoders
from defectcam.deadline import NO_DEADLINE
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.feedback import loop
from defectcam.feedback.harvest import proposals_of_record
from defectcam.feedback.loop import Annotator, as_many, half_data
from defectcam.feedback.match import match
from defectcam.proposals import Proposal, find_components
from defectcam.training import calibrate, config, train
from defectcam.training.clicks import Click, split_stems
from model_handler import cvat_shape
from tests.conftest import dark_network, dark_wall

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
    effective = {"iterations": 0, "shape": "polygon", "tolerance_px": 1.0, "hole_share": 0.02}
    return cvat_shape(Proposal(component, 0.5), "spalling", "12345678", effective, (HEIGHT, WIDTH), NO_DEADLINE)


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
    """Photos of 96 x 160: walls with a dark spot, the defect "spalling", and as many plain ones."""
    folder = tmp_path_factory.mktemp("data")
    stems = {"walls": [f"spall{i}" for i in range(6)], "plain": [f"plain{i}" for i in range(6)]}
    (folder / "walls" / "masks" / "spalling").mkdir(parents=True)
    for set_name, own in stems.items():
        (folder / set_name / "images").mkdir(parents=True)
        for i, stem in enumerate(own):
            photo, mask = dark_wall([(40 + 8 * i, 48, 22)] if set_name == "walls" else [], seed=i)
            cv2.imwrite(str(folder / set_name / "images" / f"{stem}.png"), photo[..., ::-1])
            if mask.any():
                cv2.imwrite(str(folder / set_name / "masks" / "spalling" / f"{stem}.png"), mask * np.uint8(255))
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


def test_all_arms_run_and_are_told_apart(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoders, "LARGEST_HALO_PX", 16)  # of photos that fit into one tile
    monkeypatch.setattr(train, "VAL_CROPS", 4)
    monkeypatch.setitem(config.DECODERS, "efficientnet-lite0", (16, 16, 8, 8))
    monkeypatch.setattr(calibrate, "ENCODERS_WITH_GRAPH", ())  # every arm has networks of its own to export, 10 s each
    monkeypatch.setattr(calibrate, "STEP_LENGTHS", (0.01,))
    monkeypatch.setattr(calibrate, "CLIMB_PHOTOS", 1)
    monkeypatch.setattr(loop, "LR", 1e-5)
    monkeypatch.setattr(loop, "HEAD_LR", 1e-5)
    monkeypatch.setattr(loop, "ITERATIONS", 0)
    init = tmp_path / "init.safetensors"
    save_file(dark_network().state_dict(), init)
    options = ["--defect=spalling", f"--data={data_dir}", "--sets=walls", "--none-sets=plain", f"--init={init}"]
    options += ["--first-steps=1", "--steps=1", "--photos=1", "--crop-px=16", "--batch=4", "--error=0", f"--out={tmp_path / 'out'}"]
    loop.main(options)
    found = json.loads((tmp_path / "out" / "loop.json").read_text())
    assert tuple(found["arms"]) == loop.ARMS
    assert all(set(arm["val"]) == {"walls", "plain"} for arm in found["arms"].values())
    outcomes = found["annotators"]
    assert sum(outcomes.get(kind, 0) for kind in ("accepted", "modified", "miss")) == 1  # spots on the photos shown
    assert found["clicks"]["loop"]["positive"] == 1 == found["clicks"]["plain_clicks"]["positive"]
    records = {arm: tmp_path / "out" / arm / "network" / "record.json" for arm in loop.ARMS}
    assert len({json.loads(record.read_text())["labels_sha256"] for record in records.values()}) == 4
    page = (tmp_path / "out" / "loop.md").read_text()
    assert all(page.count(f"| {arm} |") == 2 for arm in loop.ARMS) and (tmp_path / "out" / "loop.png").exists()
    capsys.readouterr()
    trained = (tmp_path / "out" / "loop" / "network" / "best.safetensors").stat().st_mtime_ns
    loop.main(options)  # what is done is not done again
    assert (tmp_path / "out" / "loop" / "network" / "best.safetensors").stat().st_mtime_ns == trained
    assert json.loads((tmp_path / "out" / "loop.json").read_text()) == found
    with pytest.raises(SystemExit, match="other arguments"):
        loop.main([*options, "--error=0.5"])


def test_what_makes_no_sense_is_refused(tmp_path):
    for options, named in ((["--error", "2"], "--error is 2.0"), ([], "no splits.json")):
        with pytest.raises(SystemExit):
            loop.main([f"--data={tmp_path}", "--sets=a", "--none-sets=b", *options])
