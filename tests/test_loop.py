"""The proof of adapting: which photos are drawn and judge, and that the whole runs from photos to table, on small walls."""

import json
import shutil

import cv2
import numpy as np
import pytest

from defectcam.feedback import adapt, loop
from defectcam.feedback.loop import campaign_photos, loss_on_old, table, view_of
from defectcam.training.calibrate import spread
from defectcam.training.clicks import split_stems
from tests.conftest import dark_wall, dark_weights, little_training
from tests.test_retrain import data_dir  # noqa: F401, pytest finds fixtures by name


@pytest.fixture(scope="module", autouse=True)
def little_work():
    with little_training(val_crops=4), pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "CROP_PX", 32)
        patch.setattr(adapt, "BATCH", 4)
        patch.setattr(adapt, "SCALES", (1.0, 1.0))
        patch.setattr(adapt, "ENCODERS_WITH_GRAPH", ())  # to export takes 10 s
        yield


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("running"), ["spalling"], training={"network": {"sets": ["walls"]}})


@pytest.fixture(scope="module")
def sets(data_dir, tmp_path_factory):  # noqa: F811
    """The set that the weights know, and a campaign: five photos of which the first is without the defect, two judge."""
    folder = tmp_path_factory.mktemp("sets")
    shutil.copytree(data_dir, folder, dirs_exist_ok=True)
    for part in ("images", "masks/spalling"):
        (folder / "bridge" / part).mkdir(parents=True)
    for number in range(5):
        photo, mask = dark_wall([(50 + 15 * number, 48, 24)] if number else [], seed=10 + number)
        cv2.imwrite(str(folder / "bridge" / "images" / f"pier{number}.png"), photo[..., ::-1])
        cv2.imwrite(str(folder / "bridge" / "masks" / "spalling" / f"pier{number}.png"), mask * np.uint8(255))
    splits = json.loads((folder / "splits.json").read_text())
    splits["bridge"] = {"train": ["pier0", "pier1", "pier2"], "val": ["pier3", "pier4"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def test_photos_that_are_drawn_show_the_defect_and_never_judge(sets, tmp_path):
    assert campaign_photos(sets, "bridge", "spalling", 5) == (["pier1", "pier2"], ["pier3", "pier4"])
    only_val = view_of(sets, tmp_path / "view", {"bridge": {"train": [], "val": ["pier1", "pier2", "pier3", "pier4"]}})
    assert campaign_photos(only_val, "bridge", "spalling", 5) == (["pier1", "pier3"], ["pier2", "pier4"])
    assert spread("abcdefghi", 3) == ["a", "e", "i"] and spread("ab", 5) == ["a", "b"] and not spread("", 3)


def test_all_arms_run_once_and_are_told_apart(sets, running, tmp_path, capsys):
    options = [
        "--defect=spalling", f"--weights={running}", f"--all-weights={running}", f"--data={sets}", "--campaign=bridge",
        "--old-sets=walls", "--photos=1,2", "--clicked=1", "--proposed=1", "--draws=2", "--steps=1", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    loop.main(options)
    found = json.loads((tmp_path / "out" / "spalling-bridge.json").read_text())
    arms = [(arm["kind"], arm["k"], arm["draw"]) for arm in found["arms"]]
    of_draws = [[("outlines", 1, n), ("outlines", 2, n), ("clicks", 1, n)] for n in (0, 1)]
    assert arms == [("before", 0, None), ("all", None, None), *of_draws[0], ("proposed", 1, None), *of_draws[1]]
    for arm in found["arms"]:
        assert set(arm["figures"]) == {"bridge", "walls"} and len(arm["old"]) == len(split_stems(sets, "walls", "val"))
    of_one = next(arm for arm in found["arms"] if (arm["kind"], arm["k"]) == ("outlines", 1))
    of_two = next(arm for arm in found["arms"] if (arm["kind"], arm["k"]) == ("outlines", 2))
    assert of_one["verdict"] == "unchecked" and of_two["verdict"] in ("better", "same", "worse")
    rows = table(found)
    assert [row["arm"] for row in rows] == ["before", "all", "outlines, 1", "outlines, 2", "clicks, 1", "proposed, 1"]
    page = (tmp_path / "out" / "loop.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "out" / "loop.png").stat().st_size > 1000
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "work").rglob("*.json") if "judging" not in str(path)}
    capsys.readouterr()
    loop.main(options)  # what is done is not done again
    changed = [path.name for path, time in written.items() if path.stat().st_mtime_ns != time]
    assert changed == ["arguments.json"] and json.loads((tmp_path / "out" / "spalling-bridge.json").read_text()) == found
    with pytest.raises(SystemExit, match="other arguments"):
        loop.main([*options, "--steps=3"])


def test_the_loss_is_the_mean_over_photos_of_the_fall_of_the_draws_mean():
    before = {"old": [[0.5, 0.8], [0.7, 0.9], [0.2, 0.1]]}
    draws = [{"old": [[0.4, 0.8], [0.7, 0.8], [0.2, 0.1]]}, {"old": [[0.2, 0.8], [0.7, 0.8], [0.2, 0.1]]}]
    lost, low, high = loss_on_old(draws, before, 0)
    assert lost == pytest.approx(0.2 / 3, abs=1e-4) and low == 0 and high == pytest.approx(0.2, abs=1e-4)
    assert loss_on_old(draws, before, 1)[0] == pytest.approx(0.1 / 3, abs=1e-4)


def test_what_makes_no_sense_is_refused(sets, running, tmp_path, capsys):
    given = ["--defect=spalling", f"--weights={running}", "--campaign=bridge", f"--out={tmp_path / 'out'}"]
    for options, named in (
        ([f"--data={sets}", "--draws=0"], "'0' is not a number of 1 or more"),
        ([f"--data={tmp_path}"], "no splits.json"),
        ([f"--data={sets}", "--photos=0"], "'0'"),
        ([f"--data={sets}", "--photos=20"], "--photos 20: bridge has 2 photos to draw from"),
        ([f"--data={sets}", "--campaign=nowhere"], "no train photos of 'nowhere'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            loop.main([*given, *options])
        assert named in capsys.readouterr().err + str(stopped.value), options
