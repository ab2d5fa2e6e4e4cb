"""Clicks and masks from what annotators did: each where it belongs, with its weight and where it came from."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from defectcam.feedback import labels, report
from defectcam.feedback.labels import free_pixel_xy
from defectcam.feedback.photos import PhotoFolder, set_and_stem
from defectcam.feedback.store import open_store
from defectcam.proposal_log import image_hash
from defectcam.regions import region_of
from defectcam.training.clicks import Click, read_clicks, write_clicks
from defectcam.training.config import TrainConfig
from defectcam.training.sources import gather
from tests.test_harvest import A, B, C, D, LABELS, Workplace, proposal, square, workplace  # noqa: F401

PATCH_PX = 24


def polygon_mask(*polygons, size=(200, 150)):
    mask = np.zeros(size[::-1], np.uint8)
    for points in polygons:
        cv2.fillPoly(mask, [np.reshape(points, (-1, 2)).astype(np.int32)], 1)
    return mask > 0


def weak_labels(place: Workplace, photos: Path, patch_px=PATCH_PX, options=()):
    out = place.folder / "out"
    arguments = ["--db", place.db, "--photos", photos, "--patch-px", patch_px, "--out", out, *options]
    labels.main([str(argument) for argument in arguments])
    clicks = {path.stem: read_clicks(path) for path in (out / "clicks").glob("*.csv")}
    return out, clicks


def write_photos(place: Workplace, folder: Path, factor=1.0):
    """The photos as a set: <folder>/bridge/images/<stem>.png."""
    for name, image in place.cvat.photos:
        path = folder / "bridge" / "images" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(image, None, fx=factor, fy=factor))
    return folder


@pytest.fixture
def done(workplace):  # noqa: F811
    """A: accepted, B: modified, C: rejected, D: relabelled from crack to rust, and a rust shape drawn by hand."""
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(10, 10)), proposal(B, square(60, 10)), proposal(C, square(160, 110))])
    place.answer(1, [proposal(D, square(100, 60))])
    place.answer(2, [])
    cvat.of(B)["points"][4:6] = [95.0, 45.0]
    cvat.of(B)["source"] = "semi-auto"
    cvat.shapes.remove(cvat.of(C))
    cvat.relabel(cvat.of(D), "rust")
    cvat.add(0, "rust", square(10, 100))
    cvat.state = "completed"
    place.harvest()
    return place


def test_every_interaction_gives_its_click(done):
    out, clicks = weak_labels(done, write_photos(done, done.folder / "data"))
    rows = {row["id"]: row for row in done.rows()}
    by_proposal = {(rows[c.interaction]["proposal"], c.defect): c for own in clicks.values() for c in own}
    assert set(by_proposal) == {(A, "crack"), (B, "crack"), (C, "none"), (D, "none"), (D, "rust"), ("", "rust")}
    assert sum(map(len, clicks.values())) == 6
    assert all(c.defect == "crack" or c.negative_for == "crack" for c in clicks["crack"]), "one file per defect"
    final_b = done.cvat.of(B)["points"]
    places = {(A, "crack"): square(10, 10), (B, "crack"): final_b, (C, "none"): square(160, 110),
              (D, "none"): square(100, 60), (D, "rust"): square(100, 60), ("", "rust"): square(10, 100)}  # fmt: skip
    for key, points in places.items():
        click = by_proposal[key]
        assert polygon_mask(points)[click.y, click.x], key
        name = "two.png" if key[0] == D else "one.png"
        assert Path(click.image) == done.folder / "data" / "bridge" / "images" / name
        assert click.photo_group == f"bridge/{name[:3]}"
    assert {by_proposal[C, "none"].negative_for, by_proposal[D, "none"].negative_for} == {"crack"}


def test_harder_cases_weigh_more(done):
    _, clicks = weak_labels(done, write_photos(done, done.folder / "data"))
    outcome = {row["id"]: row["outcome"] for row in done.rows()}
    on_wall = [click for click in clicks["crack"] if click.image.endswith("one.png")]  # not the relabelled one
    weight = {outcome[click.interaction]: click.weight for click in on_wall}
    assert weight["accepted"] == 1 < weight["modified"] < weight["rejected"] == 2
    (miss,) = [click for click in clicks["rust"] if outcome[click.interaction] == "miss"]
    assert miss.weight == 2


def test_no_negative_click_beside_the_defect(workplace):  # noqa: F811
    """The patch around a negative click is labelled as a whole, so a crack in it forbids the click."""
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(20, 20)), proposal(B, square(41, 20, 60))])
    cvat.shapes.remove(cvat.of(B))
    cvat.state = "completed"
    place.harvest()
    photos = write_photos(place, place.folder / "data")
    _, clicks = weak_labels(place, photos)
    (none,) = [click for click in clicks["crack"] if click.defect == "none"]
    accepted = polygon_mask(square(20, 20))
    half = PATCH_PX // 2
    assert polygon_mask(square(41, 20, 60))[none.y, none.x]
    assert not accepted[none.y - half : none.y + half, none.x - half : none.x + half].any()
    _, clicks = weak_labels(place, photos, patch_px=150)
    assert [click.defect for click in clicks["crack"]] == ["crack"], "no patch of that size is free of the crack"


def test_parts_and_slices_get_a_click_each(workplace):  # noqa: F811
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(10, 10))])
    cvat.shapes.clear()
    for left in (10, 21):
        cvat.add(0, "crack", [left, 10, left + 9, 10, left + 9, 30, left, 30], proposal=A)
    cvat.state = "completed"
    place.harvest()
    _, clicks = weak_labels(place, write_photos(place, place.folder / "data"))
    assert sorted(click.x // 20 for click in clicks["crack"]) == [0, 1]
    assert len({click.interaction for click in clicks["crack"]}) == 1


def test_joined_proposals_give_one_click(workplace):  # noqa: F811
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(10, 10)), proposal(B, square(60, 10))])
    cvat.shapes.clear()
    cvat.add(0, "crack", [10, 10, 80, 10, 80, 30, 10, 30])
    cvat.state = "completed"
    place.harvest()
    _, clicks = weak_labels(place, write_photos(place, place.folder / "data"))
    assert len(clicks["crack"]) == 1


def test_masks_hold_the_finished_outlines_of_photos_somebody_looked_at(done):
    out, _ = weak_labels(done, write_photos(done, done.folder / "data"))
    found = {path.relative_to(out / "masks").as_posix() for path in (out / "masks").rglob("*.png")}
    stems = ("one", "two", "three")
    assert found == {f"{label}/bridge/{stem}.png" for label in ("beam", "crack", "rust") for stem in stems}

    def mask(label, stem):
        return cv2.imread(str(out / "masks" / label / "bridge" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)

    assert mask("crack", "one").dtype == np.uint8 and set(np.unique(mask("crack", "one"))) == {0, 255}
    assert ((mask("crack", "one") > 0) == polygon_mask(square(10, 10), done.cvat.of(B)["points"])).all()
    assert ((mask("rust", "two") > 0) == polygon_mask(square(100, 60))).all()
    assert not mask("crack", "two").any() and not mask("crack", "three").any(), "looked at, and free of cracks"


def test_deleted_photos_and_jobs_not_completed_supervise_nothing(workplace):  # noqa: F811
    place = workplace
    place.answer(0, [proposal(A, square(10, 10))])
    place.cvat.deleted_frames = [1, 2]
    place.harvest("--snapshot")
    photos = write_photos(place, place.folder / "data")
    out, clicks = weak_labels(place, photos)
    assert clicks == {} and not (out / "masks").exists()
    place.cvat.state = "completed"
    place.harvest()
    out, _ = weak_labels(place, photos)
    assert {path.stem for path in (out / "masks").rglob("*.png")} == {"one"}


def test_training_reads_the_masks(done):
    data = write_photos(done, done.folder / "data")
    (data / "splits.json").write_text(json.dumps({"bridge": {"train": ["one", "two", "three"], "val": []}}))
    out, _ = weak_labels(done, data)
    config = TrainConfig("crack", data, ("bridge",), masks=out / "masks" / "crack")
    photos = [source.read() for source in gather(config, "train")]
    assert [photo.shows_defect for photo in photos] == [True, False, False]
    assert all(set(np.unique(photo.outline)) <= {0, 255} for photo in photos)


def test_photos_of_another_size_on_disk(done):
    out, clicks = weak_labels(done, write_photos(done, done.folder / "data", factor=2.0), patch_px=40)
    mask = cv2.imread(str(out / "masks" / "crack" / "bridge" / "one.png"), cv2.IMREAD_GRAYSCALE)
    assert mask.shape == (300, 400)
    wanted = cv2.resize(polygon_mask(square(10, 10), done.cvat.of(B)["points"]).astype(np.uint8), (400, 300)) > 0
    assert np.count_nonzero((mask > 0) & wanted) > 0.9 * np.count_nonzero((mask > 0) | wanted)
    for click in clicks["crack"]:
        assert click.defect == "none" or mask[click.y, click.x]
    (none,) = [click for click in clicks["crack"] if click.defect == "none" and click.image.endswith("one.png")]
    assert polygon_mask(square(160, 110))[none.y // 2, none.x // 2]


def test_photos_that_are_missing_doubled_or_cropped_are_named(done, capsys):
    photos = write_photos(done, done.folder / "data")
    with pytest.raises(SystemExit, match="no photo bridge/three.png below .*--photos"):
        weak_labels(done, done.folder / "log")
    one = photos / "bridge" / "images" / "one.png"
    for folder in ("a", "b"):
        (photos / folder).mkdir()
        (photos / folder / "one.png").write_bytes(one.read_bytes())
    one.rename(photos / "two.other")
    out, clicks = weak_labels(done, photos)  # the other photos are none the worse for it
    assert "left out: 2 photos bridge/one.png" in capsys.readouterr().err
    assert {Path(click.image).name for own in clicks.values() for click in own} == {"two.png"}
    cv2.imwrite(str(photos / "a" / "one.png"), done.cvat.photos[0][1][..., ::-1])
    out, clicks = weak_labels(done, photos)  # only one of them has the pixels that the function saw
    assert {click.image for own in clicks.values() for click in own if "one" in click.image} == {str(photos / "a" / "one.png")}
    (photos / "b" / "one.png").unlink()
    cv2.imwrite(str(photos / "a" / "one.png"), np.zeros((100, 200, 3), np.uint8))
    weak_labels(done, photos)
    assert "200 x 100 px, but CVAT's bridge/one.png 200 x 150" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no database .*nowhere.db"):
        labels.main(["--db", str(done.folder / "nowhere.db"), "--photos", str(photos)])


def test_what_is_gone_leaves_no_labels_behind(done):
    photos = write_photos(done, done.folder / "data")
    out, clicks = weak_labels(done, photos)
    assert set(clicks) == {"crack", "rust"} and (out / "masks" / "crack" / "bridge" / "two.png").exists()
    done.cvat.shapes = [shape for shape in done.cvat.shapes if shape["label_id"] != LABELS["rust"]]
    done.cvat.deleted_frames = [1]
    done.harvest()
    (out / "feedback.db").write_text("not ours to touch")
    out, clicks = weak_labels(done, photos)
    assert set(clicks) == {"crack"} and not (out / "masks" / "crack" / "bridge" / "two.png").exists()
    assert sorted(path.name for path in out.iterdir()) == ["clicks", "feedback.db", "masks"]
    with pytest.raises(SystemExit, match="is a set of photos"):
        labels.main(["--db", str(done.db), "--photos", str(photos), "--out", str(photos / "bridge")])


def test_photos_that_would_share_a_mask_are_named(workplace):  # noqa: F811
    place, cvat = workplace, workplace.cvat
    names = ("site1/cam/1.png", "site2/cam/1.png", "site2/cam/2.png")
    cvat.photos = [(name, image) for name, (_, image) in zip(names, cvat.photos)]
    place.answer(0, [proposal(A, square(10, 10))])
    cvat.state = "completed"
    place.harvest()
    for name, image in cvat.photos:
        (place.folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place.folder / "data" / name), image[..., ::-1])
    with pytest.raises(SystemExit, match="site1/cam/1.png and .*site2/cam/1.png would share the mask cam/1.png"):
        weak_labels(place, place.folder / "data")


def test_of_two_jobs_with_one_photo_the_last_one_counts(workplace):  # noqa: F811
    """Anna accepts the proposal; in the other job, completed later, it is gone and a second one is drawn."""
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(10, 10))])
    drawn = cvat.add(0, "crack", square(100, 100))
    cvat.shapes.remove(drawn)
    cvat.other_jobs = {9: {"shapes": [drawn]}}
    cvat.state = "completed"
    assert [row["job"] for row in place.harvest() if row["outcome"] == "accepted"] == [7]
    out, clicks = weak_labels(place, write_photos(place, place.folder / "data"))
    jobs = {row["id"]: row["job"] for row in place.rows()}
    assert {jobs[click.interaction] for click in clicks["crack"]} == {9}
    assert {click.defect for click in clicks["crack"]} == {"none", "crack"}
    mask = cv2.imread(str(out / "masks" / "crack" / "bridge" / "one.png"), cv2.IMREAD_GRAYSCALE) > 0
    assert (mask == polygon_mask(square(100, 100))).all()
    total = report.Figures(report.read_interactions(open_store(str(place.db))))
    assert (total.proposals, total.rejected, total.missed) == (1, 1.0, 1)


def test_every_part_has_the_click_of_its_own_label(workplace):  # noqa: F811
    """Sliced, and one half relabelled."""
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(10, 10))])
    cvat.shapes.clear()
    cvat.add(0, "crack", [10, 10, 22, 10, 22, 30, 10, 30], proposal=A)
    cvat.add(0, "rust", [23, 10, 30, 10, 30, 30, 23, 30], proposal=A)
    cvat.state = "completed"
    place.harvest()
    _, clicks = weak_labels(place, write_photos(place, place.folder / "data"))
    assert {(name, click.x > 22) for name, own in clicks.items() for click in own} == {("crack", False), ("rust", True)}


def test_clicks_keep_weight_and_interaction_and_older_files_are_read(tmp_path):
    clicks = [Click("a.jpg", 3, 4, "crack", "", "a", 1.25, "00ff00ff00ff"), Click("a.jpg", 5, 6, "none", "crack")]
    write_clicks(tmp_path / "new.csv", clicks)
    assert read_clicks(tmp_path / "new.csv") == clicks
    (tmp_path / "old.csv").write_text("image,x,y,defect,absent,photo_group\na.jpg,3,4,crack,,a\n")
    assert read_clicks(tmp_path / "old.csv") == [Click("a.jpg", 3, 4, "crack", "", "a", 1.0, "")]


def test_free_pixel():
    region = region_of("polygon", square(0, 0, 40), 200, 150)
    occupied = np.zeros((150, 200), bool)
    assert free_pixel_xy(region, occupied, 10) == (20, 20)
    occupied[:, 15:] = True
    x, _ = free_pixel_xy(region, occupied, 10)
    assert x <= 10
    assert free_pixel_xy(region, occupied, 20) is None


@pytest.mark.parametrize(
    "path, names",
    [
        ("data/deepcrack/images/a b.jpg", ("deepcrack", "a b")),
        ("campaign/pier3/x.1.png", ("pier3", "x.1")),
    ],
)
def test_set_and_stem(path, names):
    assert set_and_stem(Path(path)) == names


def test_of_photos_with_one_name_the_one_that_was_proposed_on_is_taken(tmp_path):
    rng = np.random.default_rng(0)
    for folder in (tmp_path, tmp_path / "pier"):
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "IMG_1.png"), rng.integers(0, 256, (15, 20, 3), np.uint8))
    image = image_hash(np.ascontiguousarray(cv2.imread(str(tmp_path / "pier" / "IMG_1.png"))[..., ::-1]))
    assert PhotoFolder(tmp_path).find("IMG_1.png", 20, 15, image).path == tmp_path / "pier" / "IMG_1.png"
    assert PhotoFolder(tmp_path).find("IMG_1.png", 20, 15).path == tmp_path / "IMG_1.png"


def test_a_photo_that_cannot_be_read_does_not_stop_the_others(done, capsys):
    photos = write_photos(done, done.folder / "data")
    (photos / "bridge" / "images" / "one.png").write_bytes(b"")
    _, clicks = weak_labels(done, photos)
    assert "left out: " in (told := capsys.readouterr().err) and "one.png" in told
    assert {Path(click.image).name for own in clicks.values() for click in own} == {"two.png"}


def test_photos_in_the_working_folder_have_a_set_as_well(done, monkeypatch):
    monkeypatch.chdir(write_photos(done, done.folder / "data") / "bridge" / "images")
    out, clicks = weak_labels(done, Path("."))
    assert {click.photo_group for own in clicks.values() for click in own} == {"bridge/one", "bridge/two"}
    assert (out / "masks" / "crack" / "bridge" / "one.png").exists()


# ---- labels that CVAT calls otherwise ----


@pytest.fixture
def called_riss(workplace, monkeypatch):  # noqa: F811
    """A proposal that was accepted as crack, one relabelled to Riss, one drawn as riss beside it, one drawn as Cracks."""
    for number, label in enumerate(("Riss", "Cracks"), start=30):
        monkeypatch.setitem(LABELS, label, number)
    place, cvat = workplace, workplace.cvat
    place.answer(0, [proposal(A, square(10, 10)), proposal(B, square(60, 10))])
    place.answer(1, [proposal(C, square(60, 10))])
    cvat.relabel(cvat.of(B), "Riss")
    cvat.add(0, "Riss", square(100, 60))
    cvat.add(1, "Cracks", square(100, 60))
    cvat.state = "completed"
    return place


def test_labels_may_mean_a_defect_when_they_are_harvested(called_riss, capsys):
    rows = called_riss.by_proposal("--label", "riss=crack")
    assert (rows[A]["outcome"], rows[B]["outcome"], rows[B]["final_defect"]) == ("accepted", "accepted", "crack")
    assert "the label 'Cracks' does not count as crack; if it is, say so by --label Cracks=crack" in capsys.readouterr().err
    _, clicks = weak_labels(called_riss, write_photos(called_riss, called_riss.folder / "data"))
    assert [click.defect for click in clicks["crack"]] == 4 * ["crack"] and "Riss" not in clicks


def test_labels_may_mean_a_defect_when_they_become_weak_labels(called_riss):
    called_riss.harvest()
    before = called_riss.rows(), called_riss.rows("frames", "frame"), called_riss.rows("jobs", "job")
    photos = write_photos(called_riss, called_riss.folder / "data")
    out, clicks = weak_labels(called_riss, photos, options=("--label", "RISS=crack"))
    assert sorted(click.x // 40 for click in clicks["crack"]) == [0, 1, 1, 2] and set(clicks) == {"crack", "Cracks"}
    assert {click.defect for click in clicks["crack"]} == {"crack"}, "what was relabelled to Riss was none"
    assert sorted(path.name for path in (out / "masks").iterdir()) == sorted({"Cracks", *LABELS} - {"Riss"})
    mask = cv2.imread(str(out / "masks" / "crack" / "bridge" / "one.png"), cv2.IMREAD_GRAYSCALE)
    assert mask[20, 20] == mask[20, 70] == mask[70, 110] == 255
    assert before == (called_riss.rows(), called_riss.rows("frames", "frame"), called_riss.rows("jobs", "job"))


def test_a_label_that_is_not_in_the_database_is_named(called_riss, capsys):
    called_riss.harvest()
    photos = write_photos(called_riss, called_riss.folder / "data")
    with pytest.raises(SystemExit, match=r"the database has no label 'Rissx' \(did you mean 'Riss'\?\)"):
        weak_labels(called_riss, photos, options=("--label", "Rissx=moss"))
    called_riss.harvest("--label", "Riss=crack")
    weak_labels(called_riss, photos, options=("--label", "Riss=crack"))  # the harvest has done it already
