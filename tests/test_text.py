"""Text files as editors and spreadsheets save them, in the reader and through what reads lists and tables."""

import json
import shutil

import cv2
import numpy as np
import pytest

from defectcam.feedback.next_images import photo_paths
from defectcam.licences import read_licences
from defectcam.text import read_lines, read_text
from defectcam.training.clicks import read_clicks, split_stems
from defectcam.training.labels import LabelledSet
from defectcam.weights import read_manifest
from tests.conftest import ROOT, dark_weights

SAVED = {
    "unix": lambda text: text.encode(),
    "windows": lambda text: text.replace("\n", "\r\n").encode(),
    "mark": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "old mac": lambda text: text.replace("\n", "\r").encode(),
    "utf-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "utf-16 big": lambda text: b"\xfe\xff" + text.replace("\n", "\r\n").encode("utf-16-be"),
}
NAME = "Brücke 裂\u2028缝\x85 1"  # str.splitlines would divide it


@pytest.fixture(params=SAVED)
def saved(request):
    return SAVED[request.param]


def test_lines_are_the_same_however_they_were_saved(tmp_path, saved):
    (tmp_path / "a.txt").write_bytes(saved(f"{NAME}\n\nb \n\n"))
    assert read_lines(tmp_path / "a.txt") == [NAME, "", "b"]
    assert read_text(tmp_path / "a.txt") == f"{NAME}\n\nb \n\n"


@pytest.mark.parametrize("content, line", [
    (b"a\nb\xfc\n", 2), (b"\xff\xd8\xff\xe0", 1), ("a\nb".encode("utf-16-le"), 1), (b"a\r\n\r\nb\0", 3),
    ("a\nb".encode("utf-32"), 1), (b"\xff\xfea", 1),
])  # fmt: skip
def test_what_is_no_text_is_named_with_its_line(tmp_path, content, line):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt line {line} is no text in UTF-8: save the file in UTF-8"):
        read_lines(tmp_path / "a.txt")


def test_lists_of_photos(tmp_path, saved):
    paths = [tmp_path / f"{NAME}.jpg", tmp_path / "b.jpg"]
    (tmp_path / "list.txt").write_bytes(saved("".join(f"{path}\n" for path in paths)))
    assert photo_paths(tmp_path / "list.txt") == paths


def data_folder(folder, saved, labels):
    """A set of two photos whose names are hard, with splits.json; `labels` writes its labels."""
    (folder / "pier" / "images").mkdir(parents=True)
    for stem in (NAME, "b"):
        cv2.imwrite(str(folder / "pier" / "images" / f"{stem}.png"), np.zeros((40, 60, 3), np.uint8))
    splits = {"pier": {"train": [NAME], "val": ["b"]}}
    (folder / "splits.json").write_bytes(saved(json.dumps(splits, ensure_ascii=False)))
    labels(folder / "pier")
    return folder


def yolo(names_file, names):
    def write(folder, saved):
        (folder / "labels").mkdir()
        (folder / "labels" / f"{NAME}.txt").write_bytes(saved("1 0.1 0.1 0.5 0.1 0.5 0.5\n"))
        (folder / "labels" / "b.txt").write_bytes(b"")
        (folder / names_file).write_bytes(saved(names))

    return write


def cvat_masks(folder, saved):
    (folder / "masks" / "crack").mkdir(parents=True)
    for stem in (NAME, "b"):
        mask = np.zeros((40, 60, 3), np.uint8)
        mask[4:20, 6:30] = (0, 0, 200) if stem == NAME else 0
        cv2.imwrite(str(folder / "masks" / "crack" / f"{stem}.png"), mask)
    (folder / "masks" / "labelmap.txt").write_bytes(saved("# label:color\nbackground:0,0,0::\nRiß:200,0,0::\n"))


@pytest.mark.parametrize("labels", [yolo("classes.txt", "Rost\nRiß\n"), yolo("data.yaml", "names: [Rost, Riß]\n"), cvat_masks])
def test_splits_and_names_of_labels(tmp_path, saved, labels):
    data = data_folder(tmp_path, saved, lambda folder: labels(folder, saved))
    files = LabelledSet(data, "pier", "crack", {"riß": "crack"})
    (stem,) = split_stems(data, "pier", "train")
    assert stem == NAME and files.read_mask(NAME, 40, 60)[6, 15] and not files.read_mask("b", 40, 60).any()


def test_tables_and_files_of_json(tmp_path, saved):
    (tmp_path / "clicks.csv").write_bytes(saved(f'image;x;y;defect\n"{NAME}.png";101,5;2;crack\n'))
    (click,) = read_clicks(tmp_path / "clicks.csv")
    assert (click.image, click.x, click.defect) == (f"{NAME}.png", 101, "crack")
    weights = dark_weights(tmp_path / "w")
    shutil.copyfile(ROOT / "weights" / "licences.json", weights / "licences.json")
    for name in ("manifest.json", "licences.json"):
        (weights / name).write_bytes(saved((weights / name).read_text()))
    assert list(read_manifest(weights)[1]) == ["crack"] and read_licences(weights / "licences.json")
