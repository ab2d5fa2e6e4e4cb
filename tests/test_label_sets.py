"""Names of labels, finished parts of photos and splits.json: in data sets, and in the commands that read them."""

import argparse
import json

import cv2
import numpy as np
import pytest

from defectcam.evaluation.photos import labelled_photos
from defectcam.feedback import audit
from defectcam.feedback.audit import photos_of_sets
from defectcam.paths import write_image
from defectcam.training import calibrate
from defectcam.training.clicks import simulate_clicks, split_stems
from defectcam.training.labels import LabelledSet, add_label_option
from tests.conftest import dark_wall, dark_weights
from tests.test_evaluate import dark_spot, run, write_weights
from tests.test_label_files import HEIGHT, WIDTH, compressed, crack, cvat, cvat_shapes, make_photos, runs, rust, write

# ---- names of labels ----


def test_labels_may_have_other_names(tmp_path):
    mine = make_photos(tmp_path)
    write(mine / "a.xml", cvat("mask").replace("crack", "Riss"))
    for labels in ({"Riss": "crack"}, {" RISS": "Crack"}):
        (photo,) = labelled_photos(tmp_path, ["mine"], [], "val", "crack", labels=labels)
        assert np.array_equal(photo.truth, crack("v1"))
    (photo, _) = photos_of_sets(tmp_path, ["mine"], ["val", "train"], "crack", {"riss": "crack"})
    assert photo.stem == "v1" and len(photo.shapes) == 2
    assert not LabelledSet(tmp_path, "mine", "rust", {"rust": "corrosion"}).mask("v1")


def test_a_label_that_is_nearly_the_defect_is_not_passed_over_in_silence(tmp_path, capsys):
    mine = make_photos(tmp_path)
    write(mine / "a.xml", cvat("mask").replace("rust", "Cracks"))
    LabelledSet(tmp_path, "mine", "crack")
    assert "a.xml: the label 'Cracks' does not count as crack; if it is, say so by --label Cracks=crack" in capsys.readouterr().err
    both = LabelledSet(tmp_path, "mine", "crack", {"cracks": "crack"}).read_mask("v1", HEIGHT, WIDTH)
    assert np.array_equal(both, crack("v1") | rust())
    LabelledSet(tmp_path, "mine", "crack", {"cracks": "dark line"})
    assert not capsys.readouterr().err


def test_the_option_label(capsys):
    parser = argparse.ArgumentParser()
    add_label_option(parser)
    assert parser.parse_args([]).label_names == {}
    assert parser.parse_args(["--label", "Riss=crack", "--label", "a = b"]).label_names == {"Riss": "crack", "a": "b"}
    assert parser.parse_args([]).label_names == {}
    for wrong, message in ((["Riss"], "is not LABEL=DEFECT"), (["=crack"], "is not"), (["a=b", "A=c"], "names 'A' twice")):
        with pytest.raises(SystemExit):
            parser.parse_args([word for one in wrong for word in ("--label", one)])
        assert message in capsys.readouterr().err


# ---- finished parts ----


def finished(tmp_path, text, encoding="utf-8"):
    mine = make_photos(tmp_path)
    write(mine / "a.xml", cvat("mask"))
    (mine / "finished.csv").write_bytes(text.encode(encoding))
    return mine


BOXES = "photo,x0,y0,x1,y1\nv1.png,0,0,40,30\nv1.png,10,30,80,60\n"


@pytest.mark.parametrize("text, encoding", [
    (BOXES, "utf-8"), (BOXES, "utf-8-sig"), (BOXES.replace(",", ";"), "utf-16"),
    (BOXES.replace("v1.png", "images/v1.JPG"), "utf-8"),
    ("note;Photo;X0;Y0;X1;Y1\n\n;v1;0,0;0;40,0;30\n;v1;10;30;80;60\n", "utf-8"),
])  # fmt: skip
def test_finished_parts_are_judged_and_nothing_beside_them(tmp_path, text, encoding):
    finished(tmp_path, text, encoding)
    files = LabelledSet(tmp_path, "mine", "crack")
    assert files.finished_boxes("v1") == [(0, 0, 40, 30), (10, 30, 80, 60)] and files.finished_boxes("t1") is None
    one, two = labelled_photos(tmp_path, ["mine"], [], "val", "crack", 1)
    assert (one.stem, two.stem) == ("v1 (0,0,40,30)", "v1 (10,30,80,60)")
    assert one.image_rgb.shape == (30, 40, 3) and two.image_rgb.shape == (30, 70, 3)
    assert np.array_equal(one.truth, crack("v1")[:30, :40]) and np.array_equal(two.truth, crack("v1")[30:, 10:])


def test_a_finished_part_without_the_defect_is_one_of_a_healthy_set(tmp_path):
    finished(tmp_path, "photo,x0,y0,x1,y1\nv1,0,0,40,30\nv1,40,30,80,60\n")
    (part,) = labelled_photos(tmp_path, [], ["mine"], "val", "crack")
    assert part.stem == "v1 (40,30,80,60)" and part.truth is None


@pytest.mark.parametrize("line, message", [
    ("v1,10,10,81,20", r"finished.csv line 2: the box \(10, 10, 81, 20\) leaves the photo v1 of 80 x 60 px"),
    ("v1,10,10,20,61", r"line 2: the box \(10, 10, 20, 61\) leaves the photo v1"),
    ("v1,-1,10,20,20", r"line 2: the box \(-1, 10, 20, 20\) leaves the photo v1"),
    ("v1,10,10,10,20", r"line 2: the box \(10, 10, 10, 20\) of v1 is empty: x1 and y1 must be larger"),
    ("v1,10,20,20,10", "line 2: the box .* is empty"),
    ("v1,0.1,0.1,0.5,0.5", "line 2: .* are no whole pixels of the upright photo"),
    ("v1,10,,20,20", "line 2: could not convert"),
    ("v1,10,10", "line 2: KeyError.*; photo, x0, y0, x1 and y1 are needed"),
    ("v2,10,10,20,20", "line 2: there is no photo 'v2' in .*images"),
])  # fmt: skip
def test_boxes_that_are_no_part_of_a_photo_are_refused(tmp_path, line, message):
    finished(tmp_path, f"photo,x0,y0,x1,y1\n{line}\n")
    with pytest.raises(ValueError, match=message):
        list(labelled_photos(tmp_path, ["mine"], [], "val", "crack"))


def test_a_table_of_finished_parts_needs_its_columns(tmp_path):
    finished(tmp_path, "photo,x,y\nv1,1,2\n")
    with pytest.raises(ValueError, match="finished.csv line 1 has the columns photo, x, y, but not x0, y0, x1, y1: it must"):
        LabelledSet(tmp_path, "mine", "crack")


def test_clicks_are_simulated_in_finished_parts_alone(tmp_path):
    finished(tmp_path, "photo,x0,y0,x1,y1\nt1,0,32,40,60\n")
    clicks = simulate_clicks(tmp_path, "mine", "train", "crack", 5, 20, 0)
    assert [click.defect for click in clicks].count("crack") == 1 and len(clicks) > 5
    assert all(click.x < 40 and click.y >= 32 for click in clicks)


# ---- the commands ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "w")
    return folder / "w"


def spots(data, how):
    """Set "walls" with two val photos of a dark disc and a plain set, labelled in one of the formats."""
    discs = {name: dark_spot(70, 80, centre, 16) for name, centre in (("a", (30, 30)), ("b", (45, 50)))}
    for name, (image_rgb, disc) in discs.items():
        write_image(data / "walls" / "images" / f"{name}.png", image_rgb)
        if how == "masks":
            write_image(data / "walls" / "masks" / "spalling" / f"{name}.png", disc * np.uint8(255))
    write_image(data / "plain" / "images" / "c.png", dark_spot(70, 80, (0, 0), 0, 210)[0])
    (data / "splits.json").write_text(json.dumps({"walls": {"train": [], "val": ["a", "b"]}, "plain": {"val": ["c"]}}))
    if how == "COCO":
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "Abplatzung"}]}
        for number, (name, (_, disc)) in enumerate(discs.items()):
            content["images"].append({"id": number, "file_name": f"{name}.png", "width": 80, "height": 70})
            segmentation = {"size": [70, 80], "counts": compressed(runs(disc.ravel(order="F")))}
            content["annotations"].append({"id": number, "image_id": number, "category_id": 1, "segmentation": segmentation})
        write(data / "walls" / "annotations" / "instances_default.json", content)
    if how == "CVAT":
        images = "".join(
            f'<image id="{9 * n}" name="{name}.png" width="80" height="70">{cvat_shapes(disc, "Abplatzung", "mask")}</image>'
            for n, (name, (_, disc)) in enumerate(discs.items())
        )
        write(data / "walls" / "annotations.xml", f"<annotations>{images}</annotations>")
    return data


def test_evaluate_finds_the_same_on_masks_and_on_label_files(tmp_path, weights, capsys):
    rows = {}
    for how in ("masks", "COCO", "CVAT"):
        data = spots(tmp_path / how, how)
        run(capsys, "--weights", weights, "--data", data, "--label", "abplatzung=spalling", "--steps", "0,1",
            "--out", tmp_path / "out" / how)  # fmt: skip
        rows[how] = json.loads((tmp_path / "out" / how / "evaluate.json").read_text())["rows"]
    assert {row["set"] for row in rows["masks"]} == {"walls", "plain"}
    assert max(row["iou"] for row in rows["masks"] if row["set"] == "walls") > 0.5
    assert rows["COCO"] == rows["masks"] == rows["CVAT"]


def test_evaluate_says_which_label_may_be_meant(tmp_path, weights, capsys):
    with pytest.raises(SystemExit, match=r"json has no label 'spalling'; its labels are \['Abplatzung'\]: .*--label"):
        run(capsys, "--weights", weights, "--data", spots(tmp_path, "COCO"), "--out", tmp_path / "out")


def test_calibrate_takes_the_labels_too(tmp_path):
    data = spots(tmp_path, "COCO")
    arguments = ["--defect", "spalling", "--network", tmp_path, "--data", data, "--sets", "walls", "--out", tmp_path]
    arguments = [str(argument) for argument in arguments]
    with pytest.raises(SystemExit, match="has no label 'spalling'"):
        calibrate.main(arguments)
    with pytest.raises(SystemExit, match="with spalling and without it; there are 2 and 0"):  # so the labels were read
        calibrate.main([*arguments, "--label", "Abplatzung=spalling"])


def test_audit_looks_at_finished_parts_alone(tmp_path):
    """Two spots, of which none is labelled; sound concrete is labelled beside both. One half is finished."""
    photo, _ = dark_wall([(40, 40, 16), (120, 40, 16)], 128, 160)
    mask = np.zeros((128, 160), np.uint8)
    cv2.line(mask, (20, 110), (60, 110), 255, 3)
    cv2.line(mask, (100, 110), (140, 110), 255, 3)
    write_image(tmp_path / "pier" / "images" / "a.png", photo[..., ::-1])
    image = f'<image id="0" name="a.png" width="160" height="128">{cvat_shapes(mask > 0, "Riss", "mask")}</image>'
    write(tmp_path / "pier" / "a.xml", f"<annotations>{image}</annotations>")
    (tmp_path / "splits.json").write_text(json.dumps({"pier": {"train": ["a"], "val": []}}))
    weights = dark_weights(tmp_path / "w", iterations=1)
    arguments = ["--data", tmp_path, "--sets", "pier", "--weights", weights, "--label", "Riss=crack"]

    def doubts(out):
        audit.main([str(argument) for argument in [*arguments, "--out", tmp_path / out]])
        lines = (tmp_path / out / "audit.csv").read_text().splitlines()[1:]
        return sorted((line.split(",")[2], int(line.split(",")[6]) < 80) for line in lines)

    assert doubts("whole") == [("missing", False), ("missing", True), ("no defect", False), ("no defect", True)]
    write(tmp_path / "pier" / "finished.csv", "photo,x0,y0,x1,y1\na,0,0,80,128\n")
    assert doubts("half") == [("missing", True), ("no defect", True)]


# ---- splits.json ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_splits_may_begin_with_a_mark(tmp_path, encoding):
    (tmp_path / "splits.json").write_bytes('{"mine": {"train": ["Brücke"], "val": []}}'.encode(encoding))
    assert split_stems(tmp_path, "mine", "train") == ["Brücke"]


@pytest.mark.parametrize("text, message", [
    ('{"mine": {"train": [', "splits.json cannot be read: .*save it as JSON in UTF-8"),
    ('["mine"]', "splits.json must hold"),
    ('{"mine": ["a"]}', "splits.json must hold"),
    ('{"mine": {"train": "a"}}', "splits.json: the train photos of 'mine' must be a list of names"),
    ('{"mine": {"val": []}}', r"splits.json has no train photos of 'mine'; its sets are \['mine'\]"),
])  # fmt: skip
def test_splits_that_cannot_be_read_are_named(tmp_path, text, message):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        split_stems(tmp_path, "mine", "train")
