"""Labels as people save them: every mask and photo is read right, or refused with its file, what is in it and a remedy."""

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from defectcam.evaluation.photos import labelled_photos
from defectcam.feedback.audit import photos_of_sets
from defectcam.image import ImageError, decode_image
from defectcam.proposals import Component
from defectcam.training.clicks import photo_path, simulate_clicks
from defectcam.training.labels import read_photo_rgb
from defectcam.training.labels import UNKNOWN, LabelledSet, photo_size, read_own_mask
from defectcam.training.config import TrainConfig
from defectcam.training.sources import gather

HEIGHT, WIDTH = 60, 80
CRACK, RUST = (250, 50, 83), (51, 221, 255)  # colours that CVAT gives to labels
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nCrack:250,50,83::\nrust:51,221,255::\n"


def truth_of(stem):
    """Where "t1" or "v1" shows a crack, (H, W) bool."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.line(mask, (5, 10), (70, 50 if stem == "t1" else 15), 1, 3)
    return mask > 0


def other_place():
    """Where both show rust."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[35:55, 5:25] = True
    return mask


def coloured(mask, colour=CRACK):
    return np.where(mask[..., None], np.uint8(colour), np.uint8(0))


def both_coloured(mask):
    return np.where(other_place()[..., None], np.uint8(RUST), coloured(mask))


def palette(mask, colour=(128, 0, 0)):
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putdata(mask.ravel().tolist())
    image.putpalette([0, 0, 0, *colour])
    return image


def save(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_set(folder, mask=lambda truth: truth * np.uint8(255), name="{}.png", defect="crack", **options):
    """A data folder of one set with a train and a val photo."""
    for stem in ("t1", "v1"):
        save(folder / "mine" / "images" / f"{stem}.png", np.full((HEIGHT, WIDTH, 3), 150, np.uint8))
        save(folder / "mine" / "masks" / defect / name.format(stem), mask(truth_of(stem)), **options)
    (folder / "splits.json").write_text(json.dumps({"mine": {"train": ["t1"], "val": ["v1"]}}))
    return folder


def read_val(data):
    (photo,) = labelled_photos(data, ["mine"], [], "val", "crack")
    return photo.truth


GOOD = {
    "0 and 255": {},
    "0 and 1": {"mask": lambda truth: truth.astype(np.uint8)},
    "one bit": {"mask": lambda truth: truth},
    "16 bit": {"mask": lambda truth: truth * np.uint16(65535)},
    "16 bit, 0 and 1": {"mask": lambda truth: truth.astype(np.uint16)},
    "grey as RGB": {"mask": lambda truth: coloured(truth, (255, 255, 255))},
    "one colour": {"mask": coloured},
    "palette": {"mask": palette},
    "transparent background": {
        "mask": lambda truth: np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), truth * np.uint8(255)])
    },
    "JPEG": {"name": "{}.JPG"},
    "JPEG of low quality": {"name": "{}.jpeg", "quality": 30},
    "colour JPEG": {"mask": coloured, "name": "{}.jpg", "quality": 95},
    "TIFF": {"name": "{}.TIF"},
    "BMP": {"name": "{}.bmp"},
    "WebP": {"name": "{}.webp", "lossless": True},
    "name with _mask": {"name": "{}_mask.png"},
    "name with the defect": {"name": "{}_Crack.PNG"},
    "folder in capital letters": {"defect": "CRACK"},
}


@pytest.mark.parametrize("how", GOOD)
def test_masks_are_read_right_however_they_were_saved(tmp_path, how):
    data = make_set(tmp_path, **GOOD[how])
    assert np.array_equal(read_val(data), truth_of("v1"))
    (source,) = gather(TrainConfig("crack", data, ("mine",)), "train")
    assert np.array_equal(source.read().outline, truth_of("t1") * np.uint8(255))
    clicks = simulate_clicks(data, "mine", "train", "crack", 9, 3, 0, shows_defect=True)
    assert [click.defect for click in clicks] == ["crack", "none", "none", "none"] and truth_of("t1")[clicks[0].y, clicks[0].x]
    photos = {photo.stem: photo.shapes for photo in photos_of_sets(data, ["mine"], ["train", "val"], "crack")}
    (shape,) = photos["t1"]
    assert isinstance(shape, Component) and shape.mask.sum() == truth_of("t1").sum()


@pytest.mark.parametrize("quality", [8, 23, 70, 95])
def test_a_black_jpeg_is_free_of_the_defect_though_it_is_not_quite_black(tmp_path, quality):
    data = make_set(tmp_path, lambda truth: np.zeros((HEIGHT, WIDTH), np.uint8), "{}.jpg", quality=quality)
    assert read_val(data) is None


@pytest.mark.parametrize("place", ["", "mine", "mine/masks", "mine/masks/crack"])
def test_a_labelmap_says_which_colour_is_the_defect(tmp_path, place):
    data = make_set(tmp_path, both_coloured)
    (data / place / "labelmap.txt").write_text(LABELMAP)
    assert np.array_equal(read_val(data), truth_of("v1") & ~other_place())


@pytest.mark.parametrize("colour, shows_it", [(CRACK, True), (RUST, False)])
def test_a_labelmap_goes_with_jpegs_of_one_label_too(tmp_path, colour, shows_it):
    data = make_set(tmp_path, lambda truth: coloured(truth, colour), "{}.jpg", quality=95)
    (data / "mine" / "labelmap.txt").write_text(LABELMAP)
    found = read_val(data)
    assert np.array_equal(found, truth_of("v1")) if shows_it else found is None


BAD = {
    "several colours": (
        {"mask": both_coloured},
        r"v1.png has 2 colours beside black, \(51, 221, 255\), \(250, 50, 83\).*labelmap.txt",
    ),
    "smooth edges": (
        {"mask": lambda truth: cv2.blur(truth * np.uint8(255), (3, 3))},
        "v1.png has the grey values 0, 28, .* more, but must have 0 and 255, or 0 and 1",
    ),
    "label numbers": ({"mask": lambda truth: truth + 2 * other_place().astype(np.uint8)}, "v1.png has the grey values 0, 1, 2, .*label"),
    "a label number": ({"mask": lambda truth: truth * np.uint8(3)}, "v1.png has the grey values 0, 3, "),
    "what is unknown": (
        {"mask": lambda truth: np.where(other_place(), UNKNOWN, truth * 255).astype(np.uint8)},
        "v1.png has the grey values 0, 127, 255, ",
    ),
    "shape in transparency": (
        {"mask": lambda truth: np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), truth * np.uint8(255)])},
        "v1.png is black and differs in transparency alone",
    ),
    "a black palette": ({"mask": lambda truth: palette(truth, (0, 0, 0))}, "v1.png has a palette in which all is black"),
    "another size": ({"mask": lambda truth: truth[:50, :70]}, "v1.png is 70 x 50 px, its photo 80 x 60 px"),
    "label numbers in a JPEG": (
        {"mask": lambda truth: np.where(other_place(), 128, truth * 255).astype(np.uint8), "name": "{}.jpg"},
        "v1.jpg has the values .*save it as PNG",
    ),
    "0 and 1 in a JPEG": ({"mask": lambda truth: (truth | other_place()).astype(np.uint8), "name": "{}.jpg", "quality": 100},
                          "v1.jpg has the values 0, 1, .*save it as PNG"),
    "two colours in a JPEG": ({"mask": both_coloured, "name": "{}.jpg", "quality": 95}, "v1.jpg has the values .*save it as PNG"),
    "foreign names": ({"name": "{}_label.png"}, "t1_label.png is the mask of no photo .*: a mask is called as its photo, such as"),
    "a foreign format": ({"name": "{}.gif"}, "t1.gif is in no format for masks"),
    "plural folder": ({"defect": "cracks"}, "no folder masks/crack: rename .*masks/cracks to that"),
    "no folder": ({"defect": ""}, "no folder masks/crack: put the masks there"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_masks_that_cannot_be_read_right_are_refused(tmp_path, how):
    making, message = BAD[how]
    data = make_set(tmp_path, **making)
    with pytest.raises(ValueError, match=message):
        read_val(data)


@pytest.mark.parametrize("labelmap, mask, message", [
    ("crack:250,50,83::\n", both_coloured, r"v1.png has the colour \(51, 221, 255\), which .*labelmap.txt does not have"),
    (LABELMAP, lambda truth: truth * np.uint8(255), r"v1.png has the colour \(255, 255, 255\), which .*labelmap.txt does not"),
    ("Cracks:250,50,83::\n", coloured, r"labelmap.txt has no label 'crack' \(did you mean 'Cracks'\?\); its labels are"),
    ("crack 250 50 83\n", coloured, "labelmap.txt line 1 is 'crack 250 50 83', but must be label:r,g,b:parts:actions"),
    ("crack:1,2,3::\nrust:1,2,3::\n", coloured, r"has the colour \(1, 2, 3\) for crack and for another label"),
])  # fmt: skip
def test_a_labelmap_that_does_not_fit_is_refused(tmp_path, labelmap, mask, message):
    data = make_set(tmp_path, mask)
    (data / "mine" / "labelmap.txt").write_text(labelmap)
    with pytest.raises(ValueError, match=message):
        read_val(data)


def test_another_colour_on_another_photo_may_be_another_defect(tmp_path):
    data = make_set(tmp_path, coloured)
    save(data / "mine" / "masks" / "crack" / "t1.png", coloured(truth_of("t1"), RUST))
    files = LabelledSet(data, "mine", "crack")
    files.read_mask("v1", HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"t1.png shows the defect in the colour \(51, 221, 255\), .*v1.png in \(250, 50, 83\)"):
        files.read_mask("t1", HEIGHT, WIDTH)


def test_two_masks_of_a_photo_and_a_broken_one_are_refused(tmp_path):
    data = make_set(tmp_path)
    masks = data / "mine" / "masks" / "crack"
    (masks / "v1_mask.png").write_bytes((masks / "v1.png").read_bytes())
    with pytest.raises(ValueError, match="v1.png and .*v1_mask.png are two masks of the photo v1"):
        read_val(data)
    (masks / "v1_mask.png").unlink()
    (masks / "v1.png").write_bytes((masks / "v1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot read the mask .*v1.png .*save it anew"):
        read_val(data)


def test_notes_and_hidden_files_beside_masks_do_not_matter(tmp_path):
    data = make_set(tmp_path)
    for name in ("v1.json", "._v1.png", "Thumbs.db", "README.txt"):
        (data / "mine" / "masks" / "crack" / name).write_text("{}")
    assert np.array_equal(read_val(data), truth_of("v1"))


def test_a_name_that_is_a_photos_own_is_its_masks_first(tmp_path):
    data = make_set(tmp_path)
    (data / "mine" / "images" / "v1.png").rename(data / "mine" / "images" / "t1_mask.png")
    (data / "mine" / "masks" / "crack" / "v1.png").rename(data / "mine" / "masks" / "crack" / "t1_mask.png")
    files = LabelledSet(data, "mine", "crack")
    assert [files.mask(stem).name for stem in ("t1", "t1_mask")] == ["t1.png", "t1_mask.png"]


def test_a_photo_may_lack_a_mask_but_not_all_of_a_split_may(tmp_path):
    data = make_set(tmp_path)
    (data / "mine" / "masks" / "crack" / "v1.png").unlink()
    (photo,) = labelled_photos(data, [], ["mine"], "val", "crack")
    assert photo.truth is None
    with pytest.raises(ValueError, match="crack has files such as t1.png, but no mask of any photo that is needed, such as v1: .*v1_mask.png"):
        read_val(data)


def test_only_masks_that_the_project_wrote_may_say_unknown(tmp_path):
    data = make_set(tmp_path, lambda truth: np.where(truth, 255, UNKNOWN).astype(np.uint8))
    found = read_own_mask(data / "mine" / "masks" / "crack" / "v1.png", HEIGHT, WIDTH)
    assert np.array_equal(found == 255, truth_of("v1")) and np.array_equal(found == UNKNOWN, ~truth_of("v1"))
    save(tmp_path / "ones.png", truth_of("v1").astype(np.uint8))
    with pytest.raises(ValueError, match=r"ones.png has the values 0, 1, but .*write 0, 127 and 255"):
        read_own_mask(tmp_path / "ones.png", HEIGHT, WIDTH)


# ---- photos ----


def deep_photo():
    rng = np.random.default_rng(0)
    return rng.integers(0, 4096, (31, 47), np.uint16)  # 12 bits in 16


def photo_rgb():
    return np.random.default_rng(1).integers(0, 256, (31, 47, 3), np.uint8)


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


PHOTOS = {
    "a.JPG": lambda: (photo_rgb(), {"format": "JPEG", "exif": with_orientation(6)}),
    "b.1.tif": lambda: (photo_rgb(), {"exif": with_orientation(8)}),
    "c.png": lambda: (deep_photo(), {}),
    "d.PNG": lambda: (photo_rgb(), {"exif": with_orientation(5)}),
    "e.webp": lambda: (photo_rgb(), {"exif": with_orientation(3)}),
    "f.mpo": lambda: (photo_rgb(), {"save_all": True, "append_images": [Image.fromarray(photo_rgb())]}),
    "g.Jpeg": lambda: (Image.fromarray(photo_rgb()).convert("CMYK"), {"format": "JPEG"}),
    "h.bmp": lambda: (photo_rgb()[..., 0], {}),
    "i.tiff": lambda: (deep_photo(), {}),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_training_sees_what_the_function_sees(tmp_path, name):
    pixels, options = PHOTOS[name]()
    save(tmp_path / "mine" / "images" / name, pixels, **options)
    stem = name.rpartition(".")[0]
    path = photo_path(tmp_path / "mine", stem)
    assert path.name == name and LabelledSet(tmp_path, "mine", "crack").photo(stem) == path
    seen = decode_image(path.read_bytes(), 10**9)
    assert np.array_equal(read_photo_rgb(str(path)), seen) and photo_size(path) == seen.shape[:2]
    if pixels is not None and getattr(pixels, "dtype", None) == np.uint16:
        assert seen.max() == 255  # not the upper 8 of 16 bits, of which 12 are used


def test_photos_that_cannot_be_read_are_named(tmp_path):
    images = tmp_path / "mine" / "images"
    save(images / "a.jpg", photo_rgb())
    save(images / "a.PNG", photo_rgb())
    (images / "b.jpg").write_bytes(b"no photo")
    for find in (lambda stem: photo_path(tmp_path / "mine", stem), LabelledSet(tmp_path, "mine", "crack").photo):
        with pytest.raises(ValueError, match="a.PNG and .*a.jpg are two photos of the name a"):
            find("a")
        with pytest.raises(FileNotFoundError, match="no photo c with .jpg or .jpeg .* in .*images"):
            find("c")
    for read in (read_photo_rgb, photo_size):
        with pytest.raises(ImageError, match="b.jpg: unknown format"):
            read(images / "b.jpg")
        with pytest.raises(FileNotFoundError, match="there is no photo .*gone.jpg"):
            read(images / "gone.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_the_size_of_a_photo_with_broken_exif_is_that_of_its_pixels(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(photo_rgb()).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09broken")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert photo_size(tmp_path / "a.jpg") == read_photo_rgb(tmp_path / "a.jpg").shape[:2]
