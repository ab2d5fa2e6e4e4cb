"""`defectcam sweep`: contact sheets of real files, whose figures are those of the function."""

import logging
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from defectcam.evaluation import sweep
from defectcam.predict import STEPS
from defectcam.handler import ModelHandler
from defectcam.settings import Settings
from tests.conftest import dark_wall, dark_weights

NUMBERS = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"), ("crack", "rust"))


def test_one_climb_gives_the_functions_answer_at_every_t(weights):
    photo, truth = dark_wall([(60, 50, 30), (130, 40, 8)])
    model = ModelHandler(weights, "cpu", Settings(), logging.getLogger("test"))
    answers = sweep.answers_of_all_steps(model, photo)
    assert [answer.steps for answer in answers] == list(STEPS)
    for answer in (answers[0], answers[2]):
        assert answer.shapes == model.propose(photo, replace(model.settings, iterations=answer.steps))
        assert len(answer.shapes) == answer.proposals > 0
    assert answers[0].areas_px["crack"] == pytest.approx(truth.sum(), rel=0.3)
    for less, more in zip(answers, answers[1:]):
        assert less.seconds < more.seconds and all(less.areas_px[one] <= more.areas_px[one] for one in ("crack", "rust"))
    assert answers[0].areas_px["crack"] < answers[-1].areas_px["crack"]
    sheet = sweep.contact_sheet(photo, answers)
    top, column_px = sweep.GAP_PX, sweep.PANEL_PX + sweep.GAP_PX
    assert sheet.shape[1] == 5 * column_px + sweep.GAP_PX
    enlarged = cv2.resize(photo, (sweep.PANEL_PX, 384), interpolation=cv2.INTER_CUBIC)
    panels = [sheet[top : top + 384, left : left + sweep.PANEL_PX] for left in range(sweep.GAP_PX, 5 * column_px, column_px)]
    assert all((panel != enlarged).any(axis=2).mean() > 0.05 for panel in panels)  # proposals are drawn
    assert (panels[0] != panels[-1]).any()
    assert all(sheet[top + 384 :, left : left + column_px].min() == 0 for left in range(0, 5 * column_px, column_px))
    tall = sweep.contact_sheet(np.ascontiguousarray(photo.transpose(1, 0, 2)), answers)
    assert tall.shape[0] == sheet.shape[0] + sweep.PANEL_PX - 384


def test_photos_of_one_name_have_sheets_of_their_own_and_bad_ones_are_named(weights, tmp_path, capsys, monkeypatch):
    photo, _ = dark_wall([(60, 50, 30)])
    for folder in ("a", "b"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / "wall.png"), photo[..., ::-1])
    (tmp_path / "a" / "inner" / "text.jpg").write_text("no photo")
    (tmp_path / "a" / "raw.dng").write_text("raw")
    given = [tmp_path / "a", tmp_path / "b" / "wall.png", tmp_path / "a" / "wall.png", tmp_path / "gone.jpg"]
    out = tmp_path / "a" / "sheets"
    monkeypatch.setenv("ADVCAM_DEFECTS", "crack")
    with pytest.raises(SystemExit) as ended:
        sweep.main([*map(str, given), "--weights", str(weights), "--out", str(out)])
    told = capsys.readouterr()
    assert ended.value.code == 1 and "4 photos" in told.out and "1 DNG" in told.err
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {"a/wall.png.jpg", "b/wall.png.jpg"}
    assert "not processed: a/inner/text.jpg: unknown format" in told.err
    assert "not processed: gone.jpg: cannot be read: No such file" in told.err
    (line,) = [line for line in told.out.splitlines() if line.startswith("a/wall.png: ")]
    assert len(NUMBERS.findall(line)) == 2 * len(STEPS) and "crack " in line and "rust" not in line
    assert len(sweep.find_photos(given, out)) == 4, "the sheets are no photos"
    for arguments, message in [
        ([tmp_path / "a" / "sheets"], "no photo in"),
        ([tmp_path / "b", "--weights", tmp_path / "none"], "no weights in"),
    ]:
        with pytest.raises(SystemExit) as ended:
            sweep.main([*map(str, arguments), "--out", str(out)])
        assert ended.value.code == 2 and message in capsys.readouterr().err
