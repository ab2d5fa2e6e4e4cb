"""File names made of names from outside: on a real file system, and through the commands that write files."""

import json
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from defectcam import demo
from defectcam.feedback import audit, labels, next_images
from defectcam.paths import file_name, inside, relative_path, write_image
from defectcam.training import pseudo_labels
from defectcam.training.clicks import photo_path, read_clicks, split_stems
from defectcam.training.names import stem_of
from defectcam.weights import WeightsError, load_weights
from tests.conftest import dark_wall, dark_weights
from tests.test_harvest import A, LABELS, proposal, square, workplace  # noqa: F401
from tests.test_next_images import weights_dir  # noqa: F401
from tests.test_weak_labels import write_photos

ORDINARY = ["crack", "Riss im Beton", "a & b", "rüst", "裂缝", "🧱", "crack_2.old", ".hidden", "$x^$", "it's", "console", "com10"]
HOSTILE = [
    "../../x", "/etc/x", "..", ".", "...", "", "a\0b", "..\\..\\x", "C:\\x", "x" * 300, "x" * 299 + "y", "ä" * 150,
    "裂" * 100, "裂" * 99 + "缝", "CON", "con", "NUL", "nul.txt", "COM1", "LPT9", "aux ", "a\nb", "a\x1b[2Jb", "\x7f", "a.",
    "a ", "a. .", "a/b", "a%2Fb", "%", "%00", "a<b>|\"c?*", "a\u202eb", "a\ud800b", "%~", "b" * 179 + "é", " ",
]  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".safetensors", ".json.part"])
def test_every_name_becomes_a_file_of_its_own_inside_the_folder(tmp_path, ending):
    folder = tmp_path / "out" / "deep"
    folder.mkdir(parents=True)
    for name in ORDINARY + HOSTILE:
        with open(folder / file_name(name, ending), "x") as file:  # fails where another name has that file
            file.write(repr(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and len(list(folder.parent.iterdir())) == 1
    assert len(list(folder.iterdir())) == len(ORDINARY + HOSTILE)
    assert {(folder / file_name(name, ending)).read_text() for name in HOSTILE} == set(map(repr, HOSTILE))


def test_ordinary_names_stay_as_they_are():
    for name in ORDINARY:
        assert file_name(name) == name
    assert file_name("a/b") == "a%2Fb" and file_name("..") == ".%2E" and file_name("CON") == "%43ON"


def test_names_fit_every_file_system():
    for name in map(file_name, HOSTILE):
        assert 0 < len(name.encode()) <= 180 and name.isprintable() and name[-1] not in ". "
        assert not set(name) & set('<>:"/\\|?*') and name.lower().split(".")[0] not in ("con", "nul", "com1", "lpt9", "aux")
    assert file_name("裂" * 100).startswith("裂" * 50)


def test_photos_in_folders_keep_them_and_stay_inside(tmp_path):
    assert relative_path("a/b c.jpg", ".json").as_posix() == "a/b c.jpg.json"
    names = ["a/b.jpg", "../b.jpg", "/a/b.jpg", "a//b.jpg", "a/../b.jpg", "a/./b.jpg", "./b.jpg", "b.jpg", "a/" + "x" * 300, "a%2Fb.jpg"]
    for name in names:
        write_image(tmp_path / "out" / relative_path(name, ".png"), np.zeros((2, 2), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(names)


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x", "..", "", "a\0b"])
def test_names_of_files_that_are_there_may_not_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match="does not lead to a file below"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/b..c.jpg") == tmp_path / "a" / "b..c.jpg"


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError, match="cannot write the picture"):
        write_image(tmp_path / ("x" * 300 + ".png"), np.zeros((2, 2), np.uint8))


# ---- through the commands ----


@pytest.mark.parametrize("label", ["../../x", "/tmp/x", "a/b", "a\\b", "CON", "x" * 300, "裂" * 100, "a\nb", "..", "a.", "%"])
def test_labels_of_cvat_write_nothing_outside_out(workplace, monkeypatch, label):  # noqa: F811
    monkeypatch.setitem(LABELS, label, 18)
    place = workplace
    place.answer(0, [proposal(A, square(10, 10))])
    place.cvat.add(0, label, square(60, 60))
    place.cvat.state = "completed"
    place.harvest()
    photos = write_photos(place, place.folder / "data")
    before = {path for path in place.folder.parent.rglob("*")}
    labels.main([str(part) for part in ("--db", place.db, "--photos", photos, "--patch-px", 24, "--out", place.folder / "o" / "p")])
    new = {path for path in place.folder.parent.rglob("*")} - before - {place.folder / "o"}
    assert all(path.is_relative_to(place.folder / "o" / "p") for path in new)
    out = place.folder / "o" / "p"
    (click,) = read_clicks(out / "clicks" / file_name(label, ".csv"))
    assert click.defect == label.strip() and 60 <= click.x <= 80
    mask = cv2.imread(str(out / "masks" / file_name(label) / "bridge" / "one.png"), cv2.IMREAD_GRAYSCALE)
    assert mask[70, 70] == 255 and mask[20, 20] == 0
    assert len(list((out / "masks").iterdir())) == len(LABELS), "no label shares the folder of another"


@pytest.mark.parametrize("name", ["../secret.png", "/tmp/secret.png", "a\0b.png", "x" * 300 + ".png", "a/" * 2500 + "x.png"])
def test_photo_names_of_cvat_lead_to_no_photo_elsewhere(workplace, capsys, name):  # noqa: F811
    place, cvat = workplace, workplace.cvat
    photos = write_photos(place, place.folder / "data")
    cv2.imwrite(str(place.folder / "secret.png"), cvat.photos[0][1][..., ::-1])
    cvat.photos[0] = (name, cvat.photos[0][1])
    place.answer(0, [proposal(A, square(10, 10))])
    cvat.state = "completed"
    place.harvest()
    out = place.folder / "out"
    labels.main([str(part) for part in ("--db", place.db, "--photos", photos, "--out", out)])
    assert "left out: " in capsys.readouterr().err
    assert {path.stem for path in (out / "masks").rglob("*.png")} == {"two", "three"}


@pytest.mark.parametrize("splits, named", [
    ({"../up": {"train": ["a"], "val": ["a"]}}, "'../up'"),
    ({"walls": {"train": ["../../a"], "val": ["a"]}}, "'../../a'"),
])  # fmt: skip
def test_sets_and_stems_may_not_lead_out_of_the_data_folder(tmp_path, splits, named):
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match="does not lead to a file below") as error:
        split_stems(tmp_path, next(iter(splits)), "train")
    assert named in str(error.value)
    with pytest.raises(ValueError, match="does not lead to a file below"):
        photo_path(tmp_path, "../a")


def test_photos_of_one_name_in_two_folders_of_a_set_get_a_mask_each(tmp_path, weights_dir):  # noqa: F811
    data = tmp_path / "data"
    for stem in ("one/a", "two/a"):
        write_image(data / "walls" / "images" / f"{stem}.png", np.full((64, 64, 3), 128, np.uint8))
        mask = np.zeros((64, 64), np.uint8)
        mask[10:30, 10:30] = 255
        write_image(data / "walls" / "masks" / "crack" / f"{stem}.png", mask)
    (data / "splits.json").write_text(json.dumps({"walls": {"train": ["one/a", "two/a"], "val": []}}))
    options = ["--weights", weights_dir, "--defect", "crack", "--data", data, "--sets", "walls"]
    pseudo_labels.main([str(part) for part in [*options, "--out", tmp_path / "masks"]])
    found = {path.relative_to(tmp_path / "masks").as_posix() for path in (tmp_path / "masks").rglob("*.png")}
    assert found == {"walls/one/a.png", "walls/two/a.png"}


@pytest.mark.parametrize("file", ["..", ".", "", "../b.safetensors", "/etc/passwd", "a\0b", "x" * 300, "a\ud800"])
def test_a_manifest_names_no_file_elsewhere(tmp_path, file):
    weights = dark_weights(tmp_path / "weights")
    (weights / "crack.safetensors").rename(tmp_path / "b.safetensors")
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["defects"]["crack"]["file"] = file
    (weights / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match="without folders|cannot be read|Invalid JSON"):
        load_weights(weights)


def test_a_photo_with_the_longest_name_is_shown(tmp_path, weights_dir, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ADVCAM_WEIGHTS", str(weights_dir))
    photo = tmp_path / ("x" * 251 + ".png")
    write_image(photo, np.full((64, 64, 3), 128, np.uint8))
    demo.main([str(photo), "--iterations", "0", "--out", str(tmp_path / "out")])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png"}


LONG = ["x" * 245 + ".png", "x" * 244 + "y.png", "裂" * 81 + "ü.jpg"]


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """A set whose photos have the longest names, in a folder whose name is as long, with masks of cracks."""
    data, place = tmp_path_factory.mktemp("data"), "s" * 249
    photo, truth = dark_wall([(30, 30, 16)], 64, 64)
    for name in LONG:
        write_image(data / place / "images" / name, photo[..., ::-1])
        write_image(data / place / "masks" / "crack" / f"{stem_of(name)}.png", truth.astype(np.uint8) * 255)
    (data / "splits.json").write_text(json.dumps({place: {"train": list(map(stem_of, LONG)), "val": []}}))
    return data, place


def test_next_images_takes_the_longest_names(tmp_path, long_names, weights_dir):  # noqa: F811
    data, place = long_names
    (tmp_path / "list.txt").write_bytes("\r\n".join(str(data / place / "images" / name) for name in LONG).encode("utf-16"))
    next_images.main([str(part) for part in (tmp_path / "list.txt", "--weights", weights_dir, "--out", tmp_path / "next")])
    assert all(f"/{name}," in (tmp_path / "next" / "next_images.csv").read_text() for name in LONG)


def test_audit_and_pseudo_labels_take_the_longest_names(tmp_path, long_names, weights_dir):  # noqa: F811
    data, place = long_names
    of_set = ["--weights", weights_dir, "--data", data, "--sets", place]
    audit.main([str(part) for part in (*of_set, "--out", tmp_path / "audit")])
    assert all(f",{stem_of(name)}," in (tmp_path / "audit" / "audit.csv").read_text() for name in LONG)
    options = ("--defect", "crack", "--iterations", 0, "--out", tmp_path / "pseudo")
    pseudo_labels.main([str(part) for part in (*of_set, *options)])
    assert {path.stem for path in (tmp_path / "pseudo").rglob("*.png")} == set(map(stem_of, LONG))


def test_propose_takes_the_longest_names(tmp_path, long_names, weights_dir, monkeypatch):  # noqa: F811
    pytest.importorskip("cvat_sdk")
    from defectcam.bulk import propose

    monkeypatch.setenv("ADVCAM_WEIGHTS", str(weights_dir))
    monkeypatch.setenv("ADVCAM_DEVICE", "cpu")
    images = long_names[0] / long_names[1] / "images"
    with pytest.raises(SystemExit) as left:
        propose.main([str(images), "--iterations", "0", "--out", str(tmp_path / "out")])
    assert left.value.code == 0 and not list((tmp_path / "out").rglob("*.part"))
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == len(LONG)
    found = ElementTree.parse(tmp_path / "out" / "cvat.xml").iter("image")
    assert sorted(image.get("name") for image in found) == sorted(LONG)


@pytest.mark.parametrize("name", LONG)
def test_weak_labels_of_photos_with_the_longest_names(workplace, name):  # noqa: F811
    place, cvat = workplace, workplace.cvat
    cvat.photos[0] = (f"bridge/{name}", cvat.photos[0][1])
    place.answer(0, [proposal(A, square(10, 10))])
    cvat.state = "completed"
    place.harvest("--csv", str(place.folder / "csv"))
    photos = write_photos(place, place.folder / ("d" * 249))
    labels.main([str(part) for part in ("--db", place.db, "--photos", photos, "--out", place.folder / "out")])
    assert (place.folder / "out" / "masks" / "crack" / "bridge" / f"{stem_of(name)}.png").exists()
    (click,) = read_clicks(place.folder / "out" / "clicks" / "crack.csv", with_photos=True)
    assert click.image.endswith(f"/{name}")
