"""Folders as they come from a phone, a drone and CVAT: what evaluate, train and the function read of them."""

import json
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pytest
from PIL import Image

from defectcam.bulk.propose import find_photos
from defectcam.evaluation.photos import labelled_photos
from defectcam.feedback.next_images import photo_paths
from defectcam.image import ImageError, decode_image, pixel_limit
from defectcam.paths import write_image
from defectcam.training.config import TrainConfig
from defectcam.training.sources import gather

HEIGHT, WIDTH = 90, 120  # of the upright photos
MAKE, MODEL, ORIENTATION, GPS = 0x010F, 0x0110, 0x0112, 0x8825


def wall_rgb(seed):
    """A grey wall with a dark bar in its upper left corner: turned or mirrored it lies elsewhere."""
    rgb = np.random.default_rng(seed).integers(150, 180, (HEIGHT, WIDTH, 3), np.uint8)
    rgb[10:20, 5:60] = 30
    return rgb


def mask():
    marked = np.zeros((HEIGHT, WIDTH), np.uint8)
    marked[10:20, 5:60] = 255
    return marked


def save(path, rgb, file_format, turned=1, make="", **options):
    """Save as cameras do: the pixels turned, and EXIF that says how to turn them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE], exif[MODEL] = turned, make, "made up"
    exif.get_ifd(GPS).update({1: "N", 2: (48.0, 8.0, 15.5)})
    stored = Image.fromarray({1: rgb, 3: rgb[::-1, ::-1], 6: rgb.swapaxes(0, 1)[::-1], 8: rgb.swapaxes(0, 1)[:, ::-1]}[turned])
    stored.save(path, file_format, exif=exif, **options)


def phone(folder):
    """Turned JPEGs, one of two pictures, a HEIC, and what phones and macOS put beside them."""
    save(folder / "images" / "IMG_0001.JPG", wall_rgb(1), "JPEG", 6, "Phone", quality=95)
    second = Image.fromarray(wall_rgb(9)[:45, :60])
    save(folder / "images" / "100APPLE" / "IMG_0002.JPEG", wall_rgb(2), "MPO", 8, "Phone", save_all=True, append_images=[second])
    save(folder / "images" / "Screenshot 3.png", wall_rgb(3), "PNG", 3, "Phone")
    save(folder / "images" / "signal-4.webp", wall_rgb(4), "WEBP", 6, "Phone", lossless=True)
    for name in ("._IMG_0001.JPG", ".trashed-1.jpg", "IMG_0001.MOV", "IMG_0001.AAE"):
        (folder / "images" / name).write_bytes(b"no photo")
    (folder / "images" / "IMG_0005.CR3").write_bytes(b"\0\0\0\x18ftypcrx ")
    return ["IMG_0001", "100APPLE/IMG_0002", "Screenshot 3", "signal-4"], "1 CR3"


def drone(folder):
    """JPEG and raw of one photo, an infrared TIFF of 14 bits, a map of four bands, and files that no photo is."""
    images = folder / "images" / "DCIM" / "100MEDIA"
    save(images / "DJI_0001.JPG", wall_rgb(1), "JPEG", 1, "Drone", quality=95)
    (images / "DJI_0001.DNG").write_bytes(b"II*\0")
    heat = (wall_rgb(2)[..., 0].astype(np.uint16) + 7000) * 2
    cv2.imwrite(str(images / "DJI_0002_T.TIFF"), heat)
    bands = np.dstack([wall_rgb(3)[..., ::-1].astype(np.uint16) * 16, np.full((HEIGHT, WIDTH), 900, np.uint16)])
    cv2.imwrite(str(images / "ortho.tif"), bands)
    (images / "DJI_0001.MRK").write_text("1 2 3")
    (images / "map.jp2").write_bytes(b"\0\0\0\x0cjP  ")
    return [f"DCIM/100MEDIA/{stem}" for stem in ("DJI_0001", "DJI_0002_T", "ortho")], "1 DNG, 1 JP2"


def cvat(folder):
    """An export "CVAT for images 1.1" with its photos; one task's names have folders."""
    names = ["IMG 1.jpg", "pier/ä_2.png"]
    frames = []
    for number, name in enumerate(names):
        save(folder / "images" / name, wall_rgb(number), "PNG" if name.endswith("png") else "JPEG", 1)
        points = "5.00,10.00;59.00,10.00;59.00,19.00;5.00,19.00"
        frames.append(
            f'<image id="{number}" name={quoteattr(name)} width="{WIDTH}" height="{HEIGHT}">'
            f'<polygon label="crack" source="manual" occluded="0" points="{points}" z_order="0"/></image>'
        )
    labels = "<labels><label><name>crack</name></label></labels>"
    text = f"<annotations><version>1.1</version><meta><task>{labels}</task></meta>{''.join(frames)}</annotations>"
    (folder / "annotations.xml").write_text(text, encoding="utf-8")
    return ["IMG 1", "pier/ä_2"], ""


@pytest.mark.parametrize("source", [phone, drone, cvat])
def test_every_command_sees_the_same_photos(tmp_path, capsys, source):
    name = source.__name__
    stems, unread = source(tmp_path / name)
    if source is not cvat:
        for stem in stems:
            write_image(tmp_path / name / "masks" / "crack" / f"{stem}.png", mask())
    (tmp_path / "splits.json").write_text(json.dumps({name: {"train": stems, "val": stems}}))
    judged = list(labelled_photos(tmp_path, [name], [], "val", "crack"))
    assert [photo.stem for photo in judged] == stems
    trained = [one.read() for one in gather(TrainConfig(defect="crack", data=tmp_path, sets=[name]), "train")]
    photos, others = find_photos(tmp_path / name / "images", tmp_path / "out")
    assert sorted(photo.name.rpartition(".")[0] for photo in photos) == sorted(stems)
    assert len(photo_paths(tmp_path / name)) == len(stems)
    by_stem = {photo.name.rpartition(".")[0]: photo.path for photo in photos}
    for photo, labels in zip(judged, trained, strict=True):
        with open(by_stem[photo.stem], "rb") as file:
            seen = decode_image(file.read(), pixel_limit({}))
        assert np.array_equal(photo.image_rgb, seen) and np.array_equal(labels.image_rgb, seen)
        assert np.array_equal(photo.truth, mask() > 0) and np.array_equal(labels.outline, mask())
        assert seen.shape == (HEIGHT, WIDTH, 3), "upright"
        assert seen[mask() > 0].mean() < 60 and seen[mask() == 0].mean() > 120, "the dark bar lies where the mask is"
    told = capsys.readouterr().err
    assert (f"not read in {tmp_path / name / 'images'}: {unread}" in told) if unread else "not read" not in told
    assert len(others) == unread.count("1 ")


def test_the_limit_of_megapixels_holds_for_commands(tmp_path, monkeypatch):
    phone(tmp_path / "phone")
    (tmp_path / "splits.json").write_text(json.dumps({"phone": {"train": [], "val": ["IMG_0001"]}}))
    write_image(tmp_path / "phone" / "masks" / "crack" / "IMG_0001.png", mask())
    monkeypatch.setenv("ADVCAM_MAX_MEGAPIXELS", "0.01")
    with pytest.raises(ImageError, match=r"IMG_0001.JPG: too large 0.0108>0.01 MP; .*ADVCAM_MAX_MEGAPIXELS.*defectcam propose"):
        list(labelled_photos(tmp_path, ["phone"], [], "val", "crack"))
    monkeypatch.setenv("ADVCAM_MAX_MEGAPIXELS", "many")
    with pytest.raises(ValueError, match="ADVCAM_MAX_MEGAPIXELS is 'many', but must be a number above 0, at most 178"):
        list(labelled_photos(tmp_path, ["phone"], [], "val", "crack"))
