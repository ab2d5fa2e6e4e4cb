"""The audit of old labels: a true spot, a label where there is none, and a spot that was forgotten."""

import csv
import json
import re
import shutil

import cv2
import numpy as np
import pytest

from defectcam.feedback import audit
from defectcam.feedback.cvat_export import CvatExport
from defectcam.feedback.photos import PhotoFolder
from tests.conftest import dark_wall, dark_weights
from tests.test_cvat_export import ExportedTask, export_text, square_in

WIDTH, HEIGHT = 160, 128
SOUND_XY = (120, 100)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return dark_weights(tmp_path_factory.mktemp("weights"), iterations=1)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A set of one photo twice. On `wrong` its spot is labelled, and sound concrete too; on `empty` there is no label."""
    photo, truth = dark_wall([(50, 50, 20)], HEIGHT, WIDTH)
    wrong = truth.astype(np.uint8) * 255
    cv2.line(wrong, (SOUND_XY[0] - 20, SOUND_XY[1]), (SOUND_XY[0] + 20, SOUND_XY[1]), 255, 3)
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "pier" / "images").mkdir(parents=True)
    (folder / "pier" / "masks" / "crack").mkdir(parents=True)
    for stem, mask in (("wrong", wrong), ("empty", np.zeros_like(wrong))):
        cv2.imwrite(str(folder / "pier" / "images" / f"{stem}.png"), photo[..., ::-1])
        cv2.imwrite(str(folder / "pier" / "masks" / "crack" / f"{stem}.png"), mask)
    (folder / "splits.json").write_text(json.dumps({"pier": {"train": ["wrong"], "val": ["empty"]}}))
    return folder


@pytest.fixture(scope="module")
def audited(campaign, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    arguments = ["--data", campaign, "--sets", "pier", "--weights", weights, "--top", 2, "--out", out]
    audit.main([str(argument) for argument in arguments])
    return out, list(csv.DictReader(open(out / "audit.csv")))


def test_a_label_on_sound_concrete_is_doubted_and_the_true_one_is_not(audited):
    _, rows = audited
    fake, true = [row for row in rows if row["stem"] == "wrong"]
    assert int(fake["y"]) < SOUND_XY[1] < int(fake["y"]) + int(fake["height"])
    assert fake["kind"] == "no defect" and float(fake["disagreement"]) > 0.9
    assert float(true["f1_2px"]) > 0.95 and float(true["disagreement"]) < 0.1
    assert float(fake["confidence"]) < 0.1 and float(true["confidence"]) > 0.5


def test_a_defect_without_a_label_is_reported_as_missing(audited):
    _, rows = audited
    (missing,) = [row for row in rows if row["stem"] == "empty"]
    assert missing["kind"] == "missing" and missing["disagreement"] == missing["confidence"]
    assert int(missing["x"]) < 50 < int(missing["x"]) + int(missing["width"])


def test_worst_first_with_pictures(audited):
    out, rows = audited
    disagreements = [float(row["disagreement"]) for row in rows]
    assert disagreements == sorted(disagreements, reverse=True) and [int(row["rank"]) for row in rows] == [
        rank for rank in range(1, len(rows) + 1)
    ]
    page = (out / "index.html").read_text()
    shown = re.findall(r'<img src="(pictures/\d+\.jpg)"', page)
    assert len(shown) == 2 < len(rows) and 2 == len(list((out / "pictures").iterdir()))
    for name in shown:
        picture = cv2.imread(str(out / name))
        half = picture.shape[1] // 2
        assert np.abs(picture[:, :half].astype(int) - picture[:, half:]).max() > 60, "outlines are drawn on the right"


def test_an_export_of_cvat_is_audited_as_well(campaign, weights, audited, tmp_path):
    """The same labels as polygons of a CVAT task."""
    images = []
    for number, stem in enumerate(("empty", "wrong")):
        mask = cv2.imread(str(campaign / "pier" / "masks" / "crack" / f"{stem}.png"), cv2.IMREAD_GRAYSCALE)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        shapes = "".join(
            '<polygon label="crack" source="manual" points="{}"/>'.format(";".join(f"{x:.2f},{y:.2f}" for [[x, y]] in contour))
            for contour in contours
            if len(contour) > 2
        )
        images.append(f'<image id="{number}" name="{stem}.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>')
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><id>1</id><labels><label><name>crack</name><type>polygon</type></label></labels>"
        "<segments><segment><id>1</id><start>0</start><stop>1</stop><url>http://c/api/jobs/1</url></segment></segments>"
        f"</task></meta>{''.join(images)}</annotations>"
    )
    arguments = ["--export", tmp_path / "annotations.xml", "--photos", campaign, "--out", tmp_path / "out"]
    audit.main([str(argument) for argument in [*arguments, "--weights", weights]])
    rows = list(csv.DictReader(open(tmp_path / "out" / "audit.csv")))
    wanted = [(row["kind"], row["stem"]) for row in audited[1] if row["kind"] == "missing"]
    # The photos are the same, so what both miss ranks the same and comes in the order of the photos.
    assert sorted((row["kind"], row["stem"]) for row in rows if row["kind"] == "missing") == sorted(wanted)
    assert {row["set"] for row in rows} == {"pier"}


def test_photos_of_overlapping_jobs_are_audited_once(campaign, tmp_path):
    segments = "".join(
        f"<segment><id>{job}</id><start>{start}</start><stop>1</stop><url>http://c/api/jobs/{job}</url></segment>"
        for job, start in ((1, 0), (2, 1))
    )
    images = "".join(
        f'<image id="{n}" name="{stem}.png" width="{WIDTH}" height="{HEIGHT}"/>' for n, stem in enumerate(("empty", "wrong"))
    )
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><id>1</id><labels><label><name>crack</name><type>polygon</type></label></labels>"
        f"<segments>{segments}</segments></task></meta>{images}</annotations>"
    )
    export = CvatExport(tmp_path / "annotations.xml", None)
    assert [photo.stem for photo in audit.photos_of_export(export, PhotoFolder(campaign), "crack")] == ["empty", "wrong"]


def test_labels_of_an_export_are_brought_to_the_size_of_the_photo_on_disk(tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((300, 400, 3), np.uint8))
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><id>1</id><labels><label><name>crack</name><type>polygon</type></label></labels>"
        "<segments><segment><id>1</id><start>0</start><stop>0</stop><url>http://c/api/jobs/1</url></segment></segments>"
        '</task></meta><image id="0" name="one.png" width="200" height="150">'
        '<polygon label="crack" source="manual" points="10,20;50,20;50,60;10,60"/></image></annotations>'
    )
    (photo,) = audit.photos_of_export(CvatExport(tmp_path / "annotations.xml", None), PhotoFolder(tmp_path), "crack")
    assert np.abs(np.subtract(photo.shapes[0].box_xyxy, (20, 40, 100, 120))).max() <= 2
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((300, 300, 3), np.uint8))
    assert not list(audit.photos_of_export(CvatExport(tmp_path / "annotations.xml", None), PhotoFolder(tmp_path), "crack"))
    assert "one.png is 300 x 300 px, but CVAT's one.png 200 x 150" in capsys.readouterr().err


CVAT_LABELS = ["Riss", "Cracks", "Rost"]


@pytest.fixture
def export_of_four(campaign, tmp_path):
    """Photos of a campaign that calls its cracks Riss; of the second no file is there, the third is broken."""
    task = ExportedTask(7, ["wrong.png", "gone.png", "broken.png", "empty.png"], [(31, 4, 0, 3)], size=(WIDTH, HEIGHT))
    task.shapes["wrong.png"] = square_in("Riss", 50, 50)
    task.shapes["wrong.png"] += '<skeleton label="Riss" source="manual"><points label="1" points="9,9"/></skeleton>'
    (tmp_path / "annotations.xml").write_text(export_text([task], "task", CVAT_LABELS, '<track id="3" label="Riss"/>'))
    photos = tmp_path / "photos"
    shutil.copytree(campaign / "pier" / "images", photos)
    (photos / "broken.png").write_bytes(b"no photo")
    return tmp_path / "annotations.xml", photos


def test_what_cannot_be_used_is_named_and_the_rest_audited(export_of_four, weights, tmp_path, capsys):
    export, photos = export_of_four
    options = ["--weights", weights, "--label", "riss=Crack", "--out", tmp_path / "out"]
    audit.main([str(argument) for argument in ["--export", export, "--photos", photos, *options]])
    told = capsys.readouterr()
    assert "on 2 photos ranked" in told.out
    for what in ("no photo gone.png below", "broken.png", "a skeleton on wrong.png, 'Riss'", "track 3 ('Riss') is left out"):
        assert told.err.count(what) == 1
    assert "the label 'Cracks'" in told.err and "by --label Cracks=crack" in told.err
    rows = list(csv.DictReader(open(tmp_path / "out" / "audit.csv")))
    assert {(row["stem"], row["kind"]) for row in rows if row["stem"] == "empty"} == {("empty", "missing")}
    assert any(row["stem"] == "wrong" and row["kind"] != "missing" for row in rows), "the labelled spot was judged"


@pytest.mark.parametrize("options, message", [
    ((), "has no label 'crack' (did you mean 'Cracks'?); its labels are ['Cracks', 'Riss', 'Rost']: .*--label Cracks=crack"),
    (("--label", "Ris=crack"), "--label Ris=crack: .* has no label 'Ris' (did you mean 'Riss'?); its labels are"),
    (("--label", "Riss=crak"), "--label Riss=crak: there is no defect 'crak' (did you mean 'crack'?)"),
])  # fmt: skip
def test_labels_that_are_called_otherwise_are_named(export_of_four, weights, tmp_path, options, message):
    export, photos = export_of_four
    arguments = ["--export", export, "--photos", photos, "--weights", weights, "--out", tmp_path / "out", *options]
    with pytest.raises(SystemExit, match=re.escape(message).replace(r"\.\*", ".*")):
        audit.main([str(argument) for argument in arguments])


def test_missing_photos_of_a_set_are_named_and_all_missing_is_an_error(campaign, weights, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(campaign, data)
    (data / "pier" / "images" / "wrong.png").unlink()
    arguments = ["--data", data, "--sets", "pier", "--weights", weights, "--out", tmp_path / "out"]
    (data / "pier" / "masks" / "crack" / "wrong.png").unlink()
    audit.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert "on 1 photos ranked" in told.out and "left out: no photo wrong with" in told.err
    (data / "pier" / "images" / "empty.png").write_bytes(b"no photo")
    with pytest.raises(SystemExit, match="nothing to audit: every photo is left out, the lines above say why"):
        audit.main([str(argument) for argument in arguments])


def test_errors(campaign, weights, tmp_path, capsys):

    def failure(*arguments):
        with pytest.raises(SystemExit) as stopped:
            audit.main([str(argument) for argument in arguments])
        return f"{stopped.value} {capsys.readouterr().err}"

    assert "--data and --sets" in failure("--data", campaign)
    assert "--export and --photos" in failure("--export", campaign)
    assert "manifest.json" in failure("--data", campaign, "--sets", "pier", "--weights", tmp_path)
    options = ("--weights", weights, "--out", tmp_path)
    assert "algae" in failure("--data", campaign, "--sets", "pier", "--defects", "algae", *options)
    assert "nothing to audit" in failure("--data", empty_campaign(tmp_path), "--sets", "pier", *options)


def empty_campaign(folder):
    (folder / "splits.json").write_text(json.dumps({"pier": {"train": [], "val": []}}))
    return folder
