"""Label files that cannot be read right are refused with file, place and remedy; files that do not matter do not."""

import numpy as np
import pytest

from defectcam.evaluation.photos import labelled_photos
from defectcam.paths import write_image
from defectcam.training.labels import LabelledSet
from tests.test_label_files import (
    HEIGHT,
    META,
    WIDTH,
    coco,
    column_runs,
    crack,
    cvat,
    drawn_mask,
    drawn_polygons,
    labelme,
    make_photos,
    one_by_one,
    rust,
    write,
    write_labelme,
    write_yolo,
    yolo,
)


def altered(content, **change):
    """The same COCO file with other values in the annotations of cracks."""
    for one in content["annotations"]:
        if one["category_id"] == 14:
            one.update(change)
    return content


def replaced(shape):
    """CVAT's export with another shape in place of its cracks' masks."""
    return cvat("mask").replace('<mask label="crack"', f'{shape}<mask label="other"')


def broken_yolo(line, **names):
    def make(mine):
        write_yolo(mine, **names)
        write(mine / "labels" / "v1.txt", yolo("v1") + line + "\n")

    return make


def missing(make, name):
    return lambda mine: (make(mine), (mine / name).unlink())


DOCTYPE = '<!DOCTYPE annotations [<!ENTITY e SYSTEM "/etc/hostname">]>'
BAD = {
    "COCO, a box": (lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation=[])),
                    "a.json: annotation 5 of the photo v1.png, 'crack', is a box, which is no region: draw it as a polygon"),
    "COCO, two points": (lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation=[[1, 2, 3, 4]])),
                         "annotation 5 .* is a ring of 4 numbers, which is no region: three points or more are needed"),
    "COCO, odd numbers": (
        lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation=[[1, 2, 3, 4, 5, 6, 7]])),
        "annotation 5 .* is a ring of 7 numbers"),
    "COCO, run lengths of another size": (
        lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation={"size": [80, 60], "counts": [4800]})),
        "annotation 5 .* has run lengths for 60 x 80 px, but its photo has 80 x 60 px"),
    "COCO, too few run lengths": (
        lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation={"size": [60, 80], "counts": [10, 5]})),
        "annotation 5 .* has run lengths of 15 px together, but its photo has 4800 px"),
    "COCO, no compressed run lengths": (
        lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation={"size": [60, 80], "counts": "0 1"})),
        "annotation 5 .* compressed run lengths with the character ' '"),
    "COCO, outside": (
        lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation=[[100, 5, 130, 5, 130, 9]])),
        "annotation 5 .* has no pixel in the photo of 80 x 60 px: remove or mend it"),
    "COCO, empty run lengths": (
        lambda mine: write(mine / "a.json", altered(coco(one_by_one), segmentation={"size": [60, 80], "counts": [4800]})),
        "annotation 5 .* has no pixel in the photo"),
    "COCO, unknown category": (lambda mine: write(mine / "a.json", altered(coco(one_by_one), category_id=9)),
                               "annotation 2 names the image 11 and the category 9, but .* does not have that category"),
    "COCO, unknown image": (lambda mine: write(mine / "a.json", altered(coco(one_by_one), image_id=99)),
                            "a.json: annotation 2 names the image 99 .* does not have that image"),
    "COCO, no categories": (lambda mine: write(mine / "a.json", {"images": [], "annotations": []}),
                            'a.json has "images" and "annotations" but no "categories"'),
    "COCO, another size": (lambda mine: write(mine / "a.json", coco(one_by_one, width=90)),
                           "a.json was made for a photo v1.png of 90 x 60 px, but .*v1.png has 80 x 60 px: both must be"),
    "COCO, another turn": (lambda mine: write(mine / "a.json", coco(one_by_one, width=60, height=80)),
                           r"of 60 x 80 px, but .* has 80 x 60 px \(was it labelled without its turn by EXIF\?\)"),
    "COCO, a photo that is not listed": (
        lambda mine: write(mine / "a.json", coco(one_by_one, ["t1.png"])),
        "the labels of the photo v1 are unknown: .*a.json does not list it; export it .*, or take it out of splits.json"),
    "COCO, a photo twice": (lambda mine: write(mine / "a.json", coco(one_by_one, ["v1.png", "v1.JPG"])),
                            "two entries of .*a.json both have crack on the photo v1"),
    "COCO, no such label": (
        lambda mine: write(mine / "a.json", coco(one_by_one, categories=("rust", "Cracks"))),
        r"a.json has no label 'crack' \(did you mean 'Cracks'\?\); its labels are \['Cracks', 'rust'\]: .*Cracks=crack"),
    "broken JSON": (lambda mine: write(mine / "a.json", '{"images": ['), "a.json cannot be read as JSON .*export it anew"),
    "LabelMe, a line": (lambda mine: write(mine / "v1.json", labelme(lambda _: [("linestrip", [[1, 2], [9, 9]], {})])),
                        "v1.json: shape 2 of the photo v1.png, 'crack', is of the kind linestrip, which is no region"),
    "LabelMe, a point": (lambda mine: write(mine / "v1.json", labelme(lambda _: [("point", [[1, 2]], {})])),
                         "shape 2 .* is of the kind point, which is no region"),
    "LabelMe, one point of a circle": (lambda mine: write(mine / "v1.json", labelme(lambda _: [("circle", [[1, 2]], {})])),
                                       "shape 2 .* is a circle of 1 points, which is no region: two are needed"),
    "LabelMe, a mask for another box": (
        lambda mine: write(mine / "v1.json", labelme(lambda m: [("mask", [[1, 1], [5, 5]], drawn_mask(m)[0][2])])),
        r"shape 2 .* is a mask of \d+ x \d+ px for a box of 5 x 5 px"),
    "LabelMe, a broken mask": (
        lambda mine: write(mine / "v1.json", labelme(lambda _: [("mask", [[1, 1], [5, 5]], {"mask": "QUJD"})])),
        "shape 2 .* is a mask whose picture cannot be read"),
    "LabelMe, another size": (lambda mine: write(mine / "v1.json", labelme(drawn_polygons, imageWidth=81)),
                              "v1.json was made for a photo v1.png of 81 x 60 px, but .*v1.png has 80 x 60 px"),
    "LabelMe, no file": (missing(lambda mine: write_labelme(mine, drawn_polygons), "v1.json"),
                         "labels of the photo v1 are unknown: no JSON file of LabelMe names it; .* save one without"),
    "LabelMe, no such label": (lambda mine: write_labelme(mine, lambda _: []),
                               r"set .*mine \(LabelMe\) has no label 'crack'"),
    "YOLO, a box": (broken_yolo("1 0.5 0.5 0.1 0.1"),
                    "v1.txt: line 4 of the photo v1, 'crack', is a box, .*export YOLO segmentation"),
    "YOLO, pixels": (broken_yolo("1 10 10 30 10 30 20"), "v1.txt: line 4 .* is an outline with 30, .*0 to 1"),
    "YOLO, odd numbers": (broken_yolo("1 .1 .1 .3 .1 .3 .2 .4"), "v1.txt: line 4 .* is an outline of 7 numbers"),
    "YOLO, no numbers": (broken_yolo("crack .1 .1 .3 .1 .3 .2"),
                         "v1.txt line 4 is 'crack .1 .*, but must be a label's number"),
    "YOLO, unknown number": (broken_yolo("2 .1 .1 .3 .1 .3 .2"),
                             "v1.txt line 4 has the label 2, which .*data.yaml does not name"),
    "YOLO, no text": (missing(write_yolo, "labels/v1.txt"),
                      "labels of the photo v1 are unknown: there is no .*labels/v1.txt; .* an empty file of that name"),
    "YOLO, no names": (missing(write_yolo, "data.yaml"),
                       "labels has outlines of YOLO, but no names of labels: put data.yaml"),
    "YOLO, two lists of names": (lambda mine: (write_yolo(mine), write(mine / "classes.txt", "crack\nrust\n")),
                                 "classes.txt and .*data.yaml name other labels, or in another order: remove one"),
    "YOLO, data.yaml without names": (lambda mine: write_yolo(mine, "nc: 2\n"),
                                      r"data.yaml has no names of labels .*names: \[crack"),
    "CVAT, a polyline": (lambda mine: write(mine / "a.xml", replaced('<polyline label="crack" points="1,1;9,9"/>')),
                         "a.xml: polyline 2 of the photo v1.png, 'crack', is of the kind polyline, which is no region"),
    "CVAT, points": (lambda mine: write(mine / "a.xml", replaced('<points label="crack" points="1,1;9,9"/>')),
                     "points 2 .* is of the kind points, which is no region"),
    "CVAT, run lengths of another box": (
        lambda mine: write(mine / "a.xml", replaced('<mask label="crack" rle="9,99" left="1" top="1" width="5" height="5"/>')),
        "mask 2 .* is a mask of 108 px in a smaller box, which is no region: export it anew"),
    "CVAT, a tag alone": (lambda mine: write(mine / "a.xml", replaced("")),
                          "a.xml: a tag of the photo v1.png, 'crack', is without an outline, .*: draw one, or remove the tag"),
    "CVAT, a label for tags": (
        lambda mine: write(mine / "a.xml", replaced("").replace("<name>crack</name>", "<name>crack</name><type>tag</type>")),
        r"a.xml has no label 'crack'; its labels are \['other', 'rust'\]"),
    "CVAT, two points": (lambda mine: write(mine / "a.xml", replaced('<polygon label="crack" points="1,1;9,9"/>')),
                         "polygon 2 .* is a polygon of 4 numbers"),
    "CVAT, a number lacks": (lambda mine: write(mine / "a.xml", replaced('<box label="crack" xtl="1" ytl="2" xbr="3"/>')),
                             "box 2 .* is a box with .*: export it anew"),
    "CVAT, another size": (lambda mine: write(mine / "a.xml", cvat().replace('width="80"', 'width="100"')),
                           "a.xml was made for a photo v1.png of 100 x 60 px, but .*v1.png has 80 x 60 px"),
    "CVAT, a photo that is not listed": (lambda mine: write(mine / "a.xml", cvat(names=["t1.png"])),
                                         "labels of the photo v1 are unknown: .*a.xml does not list it"),
    "CVAT, a video": (lambda mine: write(mine / "a.xml", f'<annotations>{META}<track id="0" label="crack"/></annotations>'),
                      "a.xml is a video's export: export a task of photos"),
    "CVAT, no name": (lambda mine: write(mine / "a.xml", cvat().replace('name="v1.png"', "")),
                      "a.xml has an image 1 without a name"),
    "CVAT, no such label": (lambda mine: write(mine / "a.xml", cvat().replace("crack", "Riss")),
                            r"a.xml has no label 'crack'; its labels are \['Riss', 'rust'\]: .*--label Riss=crack"),
    "broken XML": (lambda mine: write(mine / "a.xml", cvat()[:300]), "a.xml is no XML that can be read: .*export it anew"),
    "an entity of another file": (
        lambda mine: write(mine / "a.xml", cvat().replace("<annotations><version>", f"{DOCTYPE}<annotations><version>&e;")),
        "a.xml is no XML that can be read: undefined entity"),
    "COCO and masks": (
        lambda mine: (write(mine / "a.json", coco(one_by_one)),
                      write_image(mine / "masks" / "crack" / "v1.png", crack("v1") * np.uint8(255))),
        "masks/crack and .*a.json both have labels of crack: which count"),
    "COCO and CVAT": (lambda mine: (write(mine / "a.json", coco(one_by_one)), write(mine / "a.xml", cvat())),
                      r"a.json \(COCO\) and .*a.xml \(CVAT XML\) both have labels of crack: which count"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_what_cannot_be_read_right_is_refused(tmp_path, how):
    make, message = BAD[how]
    make(make_photos(tmp_path))
    with pytest.raises(ValueError, match=message):
        list(labelled_photos(tmp_path, ["mine"], [], "val", "crack"))


def test_odd_shapes_of_other_labels_do_not_matter(tmp_path):
    mine = make_photos(tmp_path)
    write(mine / "a.json", altered(coco(column_runs), segmentation=[]))
    write(mine / "a.xml", cvat("mask").replace("rust", "other"))
    write_image(mine / "masks" / "spalling" / "v1.png", crack("v1") * np.uint8(255))
    assert np.array_equal(LabelledSet(tmp_path, "mine", "rust").read_mask("v1", HEIGHT, WIDTH), rust())
    assert np.array_equal(LabelledSet(tmp_path, "mine", "spalling").read_mask("v1", HEIGHT, WIDTH), crack("v1"))


def test_other_files_in_a_set_do_not_matter(tmp_path):
    mine = make_photos(tmp_path)
    write_image(mine / "masks" / "crack" / "v1.png", crack("v1") * np.uint8(255))
    for name, text in (("masks/crack/v1.json", "{}"), ("camera.json", "[1, 2]"), ("info.xml", "<photos/>"),
                       ("labels/notes.txt", "cracked at the left"), (".cache/a.json", "{")):  # fmt: skip
        write(mine / name, text)
    (photo,) = labelled_photos(tmp_path, ["mine"], [], "val", "crack")
    assert np.array_equal(photo.truth, crack("v1"))


@pytest.mark.parametrize("label", ["crack", "rust"])
def test_of_a_track_among_shapes_the_rest_is_taken_and_the_track_is_named(tmp_path, capsys, label):
    mine = make_photos(tmp_path)
    track = f'<track id="3" label="{label}"><box frame="0" xtl="1" ytl="1" xbr="5" ybr="5" outside="0"/></track>'
    write(mine / "a.xml", cvat("mask", more=track))
    (photo,) = labelled_photos(tmp_path, ["mine"], [], "val", "crack")
    assert np.array_equal(photo.truth, crack("v1"))
    assert ("left out: track 3 of" in capsys.readouterr().err) == (label == "crack")


def test_a_set_named_as_without_the_defect_has_none_if_its_files_lack_the_label(tmp_path):
    write(make_photos(tmp_path) / "a.json", coco(one_by_one))
    (photo,) = labelled_photos(tmp_path, [], ["mine"], "val", "spalling")
    assert photo.truth is None
    assert LabelledSet(tmp_path, "mine", "spalling").mask("v1") is None
    assert not list(labelled_photos(tmp_path, [], ["mine"], "val", "crack"))
    with pytest.raises(ValueError, match="a.json has no label 'spalling'; its labels are"):
        list(labelled_photos(tmp_path, ["mine"], [], "val", "spalling"))
