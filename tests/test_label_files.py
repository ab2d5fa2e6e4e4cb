"""Label files of COCO, LabelMe, YOLO and CVAT are read to the very mask that was drawn, on the right photo."""

import base64
import io
import json
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pytest
from PIL import Image

from defectcam.evaluation.photos import labelled_photos
from defectcam.feedback.audit import photos_of_sets
from defectcam.paths import write_image
from defectcam.training.clicks import simulate_clicks
from defectcam.training.labels import LabelledSet

HEIGHT, WIDTH = 60, 80


def crack(stem):
    """Where "t1" or "v1" shows a crack: a line and a spot, which polygons can have in two rings, (H, W) bool."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.line(mask, (5, 10), (70, 40 if stem == "t1" else 15), 1, 3)
    cv2.circle(mask, (20, 45), 8, 1, -1)
    return mask > 0


def rust():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[40:55, 50:75] = True
    return mask


def rings(mask):
    """The outlines of a mask's pieces, each [x, y, ...]."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour.ravel().tolist() for contour in contours]


def runs(flat):
    """Run lengths, the first counting zeros."""
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    return ([0] if flat[0] else []) + np.diff([0, *edges, len(flat)]).tolist()


def compressed(counts):
    """COCO's compressed run lengths, as pycocotools writes them."""
    text = ""
    for index, count in enumerate(counts):
        value = count - (counts[index - 2] if index > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | 32 if more else bits) + 48)
            if not more:
                break
    return text


def make_photos(data, stems=("t1", "v1"), suffix=".png"):
    """A data folder of the set "mine", with a train and a val photo and no labels; its folder."""
    for stem in stems:
        write_image(data / "mine" / "images" / f"{stem}{suffix}", np.full((HEIGHT, WIDTH, 3), 150, np.uint8))
    (data / "splits.json").write_text(json.dumps({"mine": {"train": [stems[0]], "val": [stems[1]]}}))
    return data / "mine"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(segmentations, names=("t1.png", "v1.png"), categories=("rust", "crack"), **image):
    """COCO instances; `segmentations` of a mask gives a list of them."""
    numbered = [{"id": 7 * number, "name": name} for number, name in enumerate(categories, start=1)]
    content = {"images": [], "annotations": [], "categories": numbered}
    for number, name in enumerate(names, start=11):
        content["images"].append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} | image)
        for category, mask in ((7, rust()), (14, crack(name[-6:-4]))):
            for segmentation in segmentations(mask):
                content["annotations"].append(
                    {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category,
                     "segmentation": segmentation, "iscrowd": int(isinstance(segmentation, dict))}
                )  # fmt: skip
    return content


def one_by_one(mask):
    return [[ring] for ring in rings(mask)]


def column_runs(mask):
    return [{"size": [HEIGHT, WIDTH], "counts": runs(mask.ravel(order="F"))}]


def column_text(mask):
    return [{"size": [HEIGHT, WIDTH], "counts": compressed(runs(mask.ravel(order="F")))}]


def labelme(shapes, stem="v1", **head):
    """A file of LabelMe; `shapes` of a mask gives (shape_type, points, more) of each."""
    found = []
    for label, mask in (("rust", rust()), ("crack", crack(stem))):
        for kind, points, more in shapes(mask):
            found.append({"label": label, "points": points, "shape_type": kind, "flags": {}, "group_id": None} | more)
    content = {"version": "5.4.1", "flags": {}, "shapes": found, "imagePath": f"{stem}.png", "imageData": None}
    return content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | head


def drawn_polygons(mask):
    return [("polygon", np.reshape(ring, (-1, 2)).tolist(), {}) for ring in rings(mask)]


def drawn_mask(mask):
    ys, xs = np.nonzero(mask)
    box = [[int(xs.min()), int(ys.min())], [int(xs.max()), int(ys.max())]]
    file = io.BytesIO()
    Image.fromarray(mask[box[0][1] : box[1][1] + 1, box[0][0] : box[1][0] + 1]).save(file, "PNG")
    return [("mask", box, {"mask": base64.b64encode(file.getvalue()).decode()})]


def yolo(stem):
    """The text of a photo: label 0 is rust, 1 is a crack."""
    lines = []
    for label, mask in ((0, rust()), (1, crack(stem))):
        for ring in rings(mask):
            shares = (np.reshape(ring, (-1, 2)) / (WIDTH, HEIGHT)).ravel()
            lines.append(f"{label} " + " ".join(f"{share:.6f}" for share in shares))
    return "\n".join(lines) + "\n"


def cvat_shapes(mask, label, how):
    ys, xs = np.nonzero(mask)
    if how == "polygon":
        pairs = [zip(ring[::2], ring[1::2]) for ring in rings(mask)]
        return "".join(
            f'<polygon label="{label}" occluded="0" points="{";".join(f"{x:.2f},{y:.2f}" for x, y in pair)}" z_order="0"/>'
            for pair in pairs
        )
    crop = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    rle = ", ".join(map(str, runs(crop.ravel())))
    box = f'left="{xs.min()}" top="{ys.min()}" width="{crop.shape[1]}" height="{crop.shape[0]}"'
    return f'<mask label="{label}" rle="{rle}" {box} z_order="0"/>'


LABELS = "<labels><label><name>rust</name></label><label><name>crack</name></label></labels>"
META = f"<meta><task><id>7</id>{LABELS}</task></meta>"


def cvat(how="polygon", names=("t1.png", "v1.png"), first_id=0, step=1, more="", attributes="", meta=META):
    """An export of CVAT."""
    images = ""
    for number, name in enumerate(names):
        stem = name.rpartition("/")[2][:2]
        shapes = cvat_shapes(rust(), "rust", how) + cvat_shapes(crack(stem), "crack", how)
        images += (
            f'<image id="{first_id + step * number}" name={quoteattr(name)} width="{WIDTH}" height="{HEIGHT}"{attributes}>'
            f'{shapes}<tag label="crack"/></image>'
        )
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}{images}{more}</annotations>'


def write_labelme(folder, shapes, **head):
    for stem in ("t1", "v1"):
        write(folder / f"{stem}.json", labelme(shapes, stem, **head))


def write_yolo(folder, names="names: [rust, crack]\n", name="data.yaml"):
    write(folder / name, names)
    for stem in ("t1", "v1"):
        write(folder / "labels" / f"{stem}.txt", yolo(stem))


TASKS = "<tasks><task><id>5</id></task><task><id>6</id></task></tasks>"
PROJECT = f"<meta><project><id>1</id>{TASKS}{LABELS}</project></meta>"
JOB = META.replace("task>", "job>")
FORMATS = {
    "COCO, polygons": lambda mine: write(mine / "annotations" / "instances_default.json", coco(one_by_one)),
    "COCO, rings of one instance": lambda mine: write(mine / "all.json", coco(lambda mask: [rings(mask)])),
    "COCO, run lengths": lambda mine: write(mine / "all.json", coco(column_runs)),
    "COCO, compressed run lengths": lambda mine: write(mine / "all.json", coco(column_text)),
    "COCO, a file per split": lambda mine: [
        write(mine / "annotations" / f"{stem}.json", coco(one_by_one, [f"{stem}.png"])) for stem in ("t1", "v1")
    ],
    "COCO, capital letters": lambda mine: write(mine / "all.json", coco(one_by_one, categories=("Rust", "CRACK"))),
    "COCO, other suffix": lambda mine: write(mine / "all.json", coco(one_by_one, ["t1.JPG", "v1.JPG"])),
    "COCO, path of Windows": lambda mine: write(mine / "all.json", coco(one_by_one, ["C:\\x\\t1.png", "images\\v1.png"])),
    "LabelMe, beside the photos": lambda mine: write_labelme(mine / "images", drawn_polygons),
    "LabelMe, masks": lambda mine: write_labelme(mine / "json", drawn_mask),
    "LabelMe, sizes left out": lambda mine: write_labelme(mine / "json", drawn_polygons, imageHeight=None, imageWidth=None),
    "YOLO, data.yaml": write_yolo,
    "YOLO, names by number": lambda mine: write_yolo(mine, "names:\n  0: rust\n  1: crack\n"),
    "YOLO, classes.txt": lambda mine: write_yolo(mine, "rust\ncrack\n", "labels/classes.txt"),
    "YOLO, obj.names": lambda mine: write_yolo(mine, "rust\ncrack\n", "obj.names"),
    "CVAT, polygons": lambda mine: write(mine / "annotations.xml", cvat()),
    "CVAT, masks": lambda mine: write(mine / "annotations.xml", cvat("mask")),
    "CVAT, start frame and step": lambda mine: write(mine / "annotations.xml", cvat(first_id=2, step=2)),
    "CVAT, a job": lambda mine: write(mine / "annotations.xml", cvat(meta=JOB)),
    "CVAT, a project of tasks": lambda mine: write(
        mine / "annotations.xml", cvat(first_id=40, attributes=' subset="Train" task_id="6"', meta=PROJECT)
    ),
}
EXACT = ("COCO, run lengths", "COCO, compressed run lengths", "LabelMe, masks", "CVAT, masks")


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_gives_the_mask_that_was_drawn(tmp_path, how):
    FORMATS[how](make_photos(tmp_path))
    (photo,) = labelled_photos(tmp_path, ["mine"], [], "val", "crack")
    wanted, found = crack("v1"), photo.truth
    assert (found & wanted).sum() > 0.9 * (found | wanted).sum()
    if how in EXACT:
        assert np.array_equal(found, wanted)
    files = LabelledSet(tmp_path, "mine", "rust")
    assert (files.read_mask("t1", HEIGHT, WIDTH) == rust()).mean() > 0.99 and files.mask("t1").is_file()
    stems = {photo.stem: photo.shapes for photo in photos_of_sets(tmp_path, ["mine"], ["train", "val"], "crack")}
    assert set(stems) == {"t1", "v1"} and len(stems["t1"]) == 2
    clicks = simulate_clicks(tmp_path, "mine", "train", "crack", 9, 3, 0, shows_defect=True)
    assert [click.defect for click in clicks[:2]] == ["crack", "crack"] and crack("t1")[clicks[0].y, clicks[0].x]


def test_run_lengths_are_those_of_pycocotools(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:31, 5:60], mask[15:20, 20:30], mask[40:58, 70:80], mask[0, 0] = True, False, True, True
    text = (  # what pycocotools 2.0 encodes that mask to
        "01e9d0bG0000000000000000000000000000@nN6R1JnN6R1JnN6R1JnN6R1JnN6R1JnN6R1JnN6R1JnN6R1JnN6R1JnN6R1:00000000000000000"
        "00000000000000000000000000000000000000000fc0M]\\O00000000000000000hN"
    )
    mine = make_photos(tmp_path)
    write(mine / "a.json", coco(lambda _: [{"size": [HEIGHT, WIDTH], "counts": text}]))
    assert np.array_equal(LabelledSet(tmp_path, "mine", "crack").read_mask("v1", HEIGHT, WIDTH), mask)


def square(xs, ys):
    return (abs(xs - 20) <= 10) & (abs(ys - 30) <= 10)


CORNERS = [[10, 20], [30, 20], [30, 40], [10, 40]]


@pytest.mark.parametrize("shape, wanted", [
    (("rectangle", [[30, 40], [10, 20]]), square),
    (("rectangle", CORNERS), square),
    (("circle", [[40, 30], [40, 45]]), lambda xs, ys: np.hypot(xs - 40, ys - 30) <= 15.5),
    ((None, CORNERS), square),
])  # fmt: skip
def test_other_shapes_of_labelme(tmp_path, shape, wanted):
    mine = make_photos(tmp_path)
    write(mine / "v1.json", labelme(lambda _: [(*shape, {})]))
    found = LabelledSet(tmp_path, "mine", "crack").read_mask("v1", HEIGHT, WIDTH)
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    assert (found & wanted(xs, ys)).sum() > 0.95 * (found | wanted(xs, ys)).sum()


@pytest.mark.parametrize("shape, wanted", [
    ('<box label="crack" xtl="10" ytl="20" xbr="30" ybr="40"/>', square),
    ('<box label="crack" xtl="10" ytl="25" xbr="50" ybr="35" rotation="90"/>',
     lambda xs, ys: (abs(xs - 30) <= 5) & (abs(ys - 30) <= 20)),
    ('<ellipse label="crack" cx="40" cy="30" rx="25" ry="8" rotation="90"/>',
     lambda xs, ys: ((xs - 40) / 8.5) ** 2 + ((ys - 30) / 25.5) ** 2 <= 1),
])  # fmt: skip
def test_other_shapes_of_cvat(tmp_path, shape, wanted):
    mine = make_photos(tmp_path)
    image = f'<image id="0" name="v1.png" width="{WIDTH}" height="{HEIGHT}">{shape}</image>'
    write(mine / "a.xml", f"<annotations>{image}</annotations>")
    found = LabelledSet(tmp_path, "mine", "crack").read_mask("v1", HEIGHT, WIDTH)
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    assert (found & wanted(xs, ys)).sum() > 0.93 * (found | wanted(xs, ys)).sum()


@pytest.mark.parametrize("make", [
    lambda mine: write(mine / "a.json", coco(lambda mask: [] if mask[45, 20] else [[ring] for ring in rings(mask)])),
    lambda mine: write(mine / "a.xml", cvat().replace('label="crack"', 'label="rust"')),
    lambda mine: (write_yolo(mine), write(mine / "labels" / "v1.txt", "")),
    lambda mine: (write_labelme(mine, drawn_polygons), write(mine / "v1.json", labelme(lambda _: []))),
])  # fmt: skip
def test_a_photo_that_is_listed_without_the_defect_has_none(tmp_path, make):
    make(make_photos(tmp_path))
    (photo,) = labelled_photos(tmp_path, ["mine"], [], "val", "crack")
    assert photo.truth is None


# ---- which photo ----


def test_photos_in_folders_are_told_by_path_or_by_a_name_of_their_own(tmp_path):
    mine = make_photos(tmp_path, ("a/t1", "b/t1"))
    write_image(mine / "images" / "b" / "v1.png", np.full((HEIGHT, WIDTH, 3), 150, np.uint8))
    write(mine / "x.json", coco(column_runs, ["b/t1.png", "data/images/a/t1.png", "v1.png"]))
    files = LabelledSet(tmp_path, "mine", "crack")
    assert all(files.mask(stem) for stem in ("a/t1", "b/t1", "b/v1"))
    write(mine / "x.json", coco(column_runs, ["t1.png"]))
    with pytest.raises(ValueError, match=r"x.json: the photo 't1.png' may be 'a/t1' or 'b/t1' of images/: write the path"):
        LabelledSet(tmp_path, "mine", "crack")


def test_labelme_paths_count_from_their_file(tmp_path):
    mine = make_photos(tmp_path, ("a/t1", "b/t1"))
    write(mine / "json" / "1.json", labelme(drawn_mask, "t1", imagePath="..\\images\\a\\t1.png"))
    write(mine / "images" / "b" / "2.json", labelme(lambda _: [], "t1"))
    files = LabelledSet(tmp_path, "mine", "crack")
    assert np.array_equal(files.read_mask("a/t1", HEIGHT, WIDTH), crack("t1"))
    assert not files.read_mask("b/t1", HEIGHT, WIDTH).any()


def test_photos_that_are_not_there_are_named_and_left_out(tmp_path, capsys):
    mine = make_photos(tmp_path)
    path = write(mine / "a.json", coco(column_runs, ["t1.png", "v1.png", "g1.png", "g2.png", "g3.png", "g4.png"]))
    files = LabelledSet(tmp_path, "mine", "crack")
    assert "a.json has labels of photos that are not in" in (err := capsys.readouterr().err)
    assert "images: g1.png, g2.png, g3.png and 1 more" in err
    assert np.array_equal(files.read_mask("v1", HEIGHT, WIDTH), crack("v1"))
    write(path, coco(column_runs, ["g1.png"]))
    with pytest.raises(ValueError, match="a.json has labels of photos that are not in .*images: g1.png: photos are found"):
        LabelledSet(tmp_path, "mine", "crack")


def test_tasks_that_share_a_photo_are_joined_but_two_opinions_are_not(tmp_path):
    mine = make_photos(tmp_path)
    of_rust = cvat(how="mask").replace('<mask label="crack"', '<polyline label="other" points="1,1;2,2"')
    of_rust = of_rust.replace('<tag label="crack"/>', "")
    write(mine / "1.xml", of_rust)
    write(mine / "2.xml", cvat(how="mask").replace('<mask label="rust"', '<polyline label="other" points="1,1;2,2"'))
    for defect, wanted in (("rust", rust()), ("crack", crack("v1"))):
        assert np.array_equal(LabelledSet(tmp_path, "mine", defect).read_mask("v1", HEIGHT, WIDTH), wanted)
    write(mine / "1.xml", cvat())
    with pytest.raises(ValueError, match=r"1.xml and .*2.xml both have crack on the photo v1: which counts\? Remove one"):
        LabelledSet(tmp_path, "mine", "crack").mask("v1")
