"""The audit of old labels on the sample photo: its true crack, one that is none, and one that was forgotten."""

import csv
import json
import re
import sys

import cv2
import numpy as np
import pytest

from defectcam.feedback import audit
from defectcam.feedback.cvat import CvatExport
from defectcam.feedback.labels import PhotoError, PhotoFolder
from tests.conftest import ROOT

SIDE = 448


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A set of two crops of the sample photo. On `wrong` a label lies on sound concrete; on `empty` there is none."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_sample import make_sample
    finally:
        sys.path.pop(0)
    truth = make_sample()[1]["crack"].astype(np.uint8)
    photo = cv2.imread(str(ROOT / "docs" / "sample.jpg"))
    ys, xs = np.nonzero(truth)
    x, y = int(np.clip(np.median(xs) - SIDE // 2, 0, 1200 - SIDE)), int(np.clip(np.median(ys) - SIDE // 2, 0, 900 - SIDE))
    photo, truth = photo[y : y + SIDE, x : x + SIDE], truth[y : y + SIDE, x : x + SIDE] * 255
    distance = cv2.distanceTransform(255 - truth, cv2.DIST_L2, 5)
    _, _, _, (sound_x, sound_y) = cv2.minMaxLoc(distance[30:-30, 30:-30])
    wrong = truth.copy()
    cv2.line(wrong, (sound_x + 10, sound_y + 30), (sound_x + 50, sound_y + 30), 255, 3)
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "pier" / "images").mkdir(parents=True)
    (folder / "pier" / "masks" / "crack").mkdir(parents=True)
    for stem, mask in (("wrong", wrong), ("empty", np.zeros_like(truth))):
        cv2.imwrite(str(folder / "pier" / "images" / f"{stem}.png"), photo)
        cv2.imwrite(str(folder / "pier" / "masks" / "crack" / f"{stem}.png"), mask)
    (folder / "splits.json").write_text(json.dumps({"pier": {"train": ["wrong"], "val": ["empty"]}}))
    return folder, (sound_x + 30, sound_y + 30)


@pytest.fixture(scope="module")
def audited(campaign, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    weights = ROOT / "weights"
    if "crack" not in json.loads((weights / "manifest.json").read_text())["defects"]:
        pytest.skip("the shipped weights know no cracks")
    arguments = ["--data", campaign[0], "--sets", "pier", "--defects", "crack", "--weights", weights, "--top", 3, "--out", out]
    audit.main([str(argument) for argument in arguments])
    return out, list(csv.DictReader(open(out / "audit.csv")))


def test_a_label_on_sound_concrete_is_doubted_more_than_the_crack(campaign, audited):
    _, rows = audited
    x, y = campaign[1]

    def lies_there(row):
        left, top, width, height = (int(row[name]) for name in ("x", "y", "width", "height"))
        return left <= x < left + width and top <= y < top + height and int(row["height"]) < 20

    (fake,) = [row for row in rows if row["stem"] == "wrong" and row["kind"] != "missing" and lies_there(row)]
    labels = [row for row in rows if row["stem"] == "wrong" and row["kind"] != "missing" and row is not fake]
    longest = max(labels, key=lambda row: max(int(row["width"]), int(row["height"])))
    assert fake["kind"] == "no defect"
    assert float(fake["disagreement"]) > float(longest["disagreement"])
    assert float(fake["confidence"]) < float(longest["confidence"])


def test_a_crack_that_nobody_outlined_is_reported_as_missing(audited):
    _, rows = audited
    of_empty = [row for row in rows if row["stem"] == "empty"]
    assert of_empty and {row["kind"] for row in of_empty} == {"missing"}
    assert all(row["disagreement"] == row["confidence"] for row in of_empty)


def test_worst_first_with_pictures(audited):
    out, rows = audited
    disagreements = [float(row["disagreement"]) for row in rows]
    assert disagreements == sorted(disagreements, reverse=True) and [int(row["rank"]) for row in rows] == [
        rank for rank in range(1, len(rows) + 1)
    ]
    page = (out / "index.html").read_text()
    shown = re.findall(r'<img src="(pictures/\d+\.jpg)"', page)
    assert len(shown) == min(3, len(rows)) == len(list((out / "pictures").iterdir()))
    for name in shown:
        picture = cv2.imread(str(out / name))
        half = picture.shape[1] // 2
        assert np.abs(picture[:, :half].astype(int) - picture[:, half:]).max() > 60, "outlines are drawn on the right"


def test_an_export_of_cvat_is_audited_as_well(campaign, audited, tmp_path):
    """The same labels as polygons of a CVAT task."""
    folder, _ = campaign
    images = []
    for number, stem in enumerate(("empty", "wrong")):
        mask = cv2.imread(str(folder / "pier" / "masks" / "crack" / f"{stem}.png"), cv2.IMREAD_GRAYSCALE)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        shapes = "".join(
            '<polygon label="crack" source="manual" points="{}"/>'.format(";".join(f"{x:.2f},{y:.2f}" for [[x, y]] in contour))
            for contour in contours
            if len(contour) > 2
        )
        images.append(f'<image id="{number}" name="{stem}.png" width="{SIDE}" height="{SIDE}">{shapes}</image>')
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><id>1</id><labels><label><name>crack</name><type>polygon</type></label></labels>"
        "<segments><segment><id>1</id><start>0</start><stop>1</stop><url>http://c/api/jobs/1</url></segment></segments>"
        f"</task></meta>{''.join(images)}</annotations>"
    )
    arguments = ["--export", tmp_path / "annotations.xml", "--photos", folder, "--defects", "crack", "--out", tmp_path / "out"]
    audit.main([str(argument) for argument in [*arguments, "--weights", ROOT / "weights"]])
    rows = list(csv.DictReader(open(tmp_path / "out" / "audit.csv")))
    wanted = [(row["kind"], row["stem"]) for row in audited[1] if row["kind"] == "missing"]
    # The photos are the same, so what both miss ranks the same and comes in the order of the photos.
    assert sorted((row["kind"], row["stem"]) for row in rows if row["kind"] == "missing") == sorted(wanted)
    assert {row["set"] for row in rows} == {"pier"}


def test_photos_of_overlapping_jobs_are_audited_once(campaign, tmp_path):
    folder, _ = campaign
    segments = "".join(
        f"<segment><id>{job}</id><start>{start}</start><stop>1</stop><url>http://c/api/jobs/{job}</url></segment>"
        for job, start in ((1, 0), (2, 1))
    )
    images = "".join(
        f'<image id="{n}" name="{stem}.png" width="{SIDE}" height="{SIDE}"/>' for n, stem in enumerate(("empty", "wrong"))
    )
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><id>1</id><labels><label><name>crack</name><type>polygon</type></label></labels>"
        f"<segments>{segments}</segments></task></meta>{images}</annotations>"
    )
    export = CvatExport(tmp_path / "annotations.xml", None)
    assert [photo.stem for photo in audit.photos_of_export(export, PhotoFolder(folder), "crack")] == ["empty", "wrong"]


def test_labels_of_an_export_are_brought_to_the_size_of_the_photo_on_disk(tmp_path):
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
    with pytest.raises(PhotoError, match="300 x 300 px, but CVAT's one.png 200 x 150"):
        list(audit.photos_of_export(CvatExport(tmp_path / "annotations.xml", None), PhotoFolder(tmp_path), "crack"))


def test_shapes_that_carry_the_labels_defaults_are_labels_like_all_others(tmp_path):
    """What was drawn by hand has a default of `iterations`, a confidence of 0 and no proposal: it is audited."""
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((150, 200, 3), np.uint8))
    attributes = '<attribute name="iterations">8</attribute><attribute name="confidence">0</attribute><attribute name="proposal"/>'
    shapes = "".join(
        f'<polygon label="crack" source="{source}" points="{x},20;{x + 40},20;{x + 40},60;{x},60">{own}</polygon>'
        for x, source, own in ((10, "manual", attributes), (60, "file", attributes), (110, "semi-auto", attributes), (160, "manual", ""))
    )
    (tmp_path / "annotations.xml").write_text(
        "<annotations><meta><task><id>1</id><labels><label><name>crack</name><type>polygon</type></label></labels>"
        "<segments><segment><id>1</id><start>0</start><stop>0</stop><url>http://c/api/jobs/1</url></segment></segments>"
        f'</task></meta><image id="0" name="one.png" width="200" height="150">{shapes}</image></annotations>'
    )
    out = tmp_path / "out"
    arguments = ["--export", tmp_path / "annotations.xml", "--photos", tmp_path, "--defects", "crack", "--out", out]
    audit.main([str(argument) for argument in [*arguments, "--weights", ROOT / "weights"]])
    rows = [row for row in csv.DictReader(open(out / "audit.csv")) if row["kind"] != "missing"]
    assert sorted(int(row["x"]) for row in rows) == [10, 60, 110, 160]


def test_errors(campaign, tmp_path, capsys):
    folder, _ = campaign

    def failure(*arguments):
        with pytest.raises(SystemExit) as stopped:
            audit.main([str(argument) for argument in arguments])
        return f"{stopped.value} {capsys.readouterr().err}"

    assert "--data and --sets" in failure("--data", folder)
    assert "--export and --photos" in failure("--export", folder)
    assert "manifest.json" in failure("--data", folder, "--sets", "pier", "--weights", tmp_path)
    weights = ("--weights", ROOT / "weights", "--out", tmp_path)
    assert "algae" in failure("--data", folder, "--sets", "pier", "--defects", "algae", *weights)
    assert "nothing to audit" in failure("--data", empty_campaign(tmp_path), "--sets", "pier", *weights)


def empty_campaign(folder):
    (folder / "splits.json").write_text(json.dumps({"pier": {"train": [], "val": []}}))
    return folder
