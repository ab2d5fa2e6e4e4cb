"""The labels that people bring: which file is the mask of which photo, and which of its pixels are the defect.

A mask is read right or refused, never taken for "no defect" because it was saved otherwise than expected. It may have

- the values 0 and 255, or 0 and 1, or one colour on black;
- the colours of a `labelmap.txt` beside it or in a folder above, as CVAT's "Segmentation mask 1.1" has them;
- the blurred rims that JPEG makes.

In place of masks a set may have label files with shapes (`defectcam.training.label_files`).

A label's number or a second colour says nothing of which defect it is, so masks with these are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from defectcam.image import FORMATS, PHOTO_SUFFIXES, SAVE_ANEW, ImageError, decode_image, pixel_limit, upright_size
from defectcam.paths import inside, not_read, photo_files, tell_not_read
from defectcam.text import read_lines
from defectcam.training.finished import FINISHED, Box, read_finished
from defectcam.training.names import NEAR, LabelNames, PhotoNames, near_name, stem_of
from defectcam.training.shapes import DefectShapes

UNKNOWN = 127  # grey level of pixels of which nothing is known, in masks that this project wrote
LABELMAP = "labelmap.txt"
BLACK = (0, 0, 0)
LEAST_GREY = 128  # of a defect, if not 1: what is darker may be a label's number
LEAST_LOSSY = 100  # brightest channel of a defect in a JPEG: what is darker may be a label's number, or noise
LOSSY_BLACK = 4  # largest value of an all black mask in a JPEG of low quality
RIM_SHARE = 0.25  # of the defect's brightness: a JPEG's grey lies farther from it and from black in rims alone
TINT_SHARE = 0.45  # the same for colours, which JPEG keeps at half the resolution
SAME_COLOUR = 60  # of a channel, by which JPEG changes a colour at most
VALUES_SHOWN = 6
NAMING = "a mask is called as its photo, such as {stem}.png, {stem}_mask.png or {stem}_{defect}.png"

Colour = tuple[int, int, int]


def add_label_option(parser: argparse.ArgumentParser) -> None:
    """`--label Riss=crack`, as often as needed: `label_names` of the arguments is then what `LabelledSet` takes."""

    class Named(argparse.Action):
        def __call__(self, parser, namespace, text, option=None) -> None:
            label, _, defect = (part.strip() for part in text.partition("="))
            if not label or not defect:
                parser.error(f"--label {text!r} is not LABEL=DEFECT, such as Riss=crack")
            labels = {**namespace.label_names, label: defect}
            if len({one.casefold() for one in labels}) < len(namespace.label_names) + 1:
                parser.error(f"--label names {label!r} twice")
            namespace.label_names = labels

    parser.add_argument("--label", dest="label_names", action=Named, default={}, metavar="LABEL=DEFECT",
                        help="what a label of a file or of CVAT is called here; may be given several times")  # fmt: skip


@contextlib.contextmanager
def photo_bytes(path: Path | str) -> Iterator[bytes]:
    """A photo's file; an ImageError inside gets its path in front.

    Raises:
        FileNotFoundError: there is none, or no access to it.
    """
    try:
        yield Path(path).read_bytes()
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no photo {path}") from None
    except OSError as error:
        raise FileNotFoundError(f"cannot read the photo {path}: {error.strerror}") from None


def photo_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of a photo in px, upright; from its header where its format allows. Errors as `read_photo_rgb`."""
    with photo_bytes(path) as file:
        return upright_size(file, pixel_limit())


def read_photo_rgb(path: Path | str) -> np.ndarray:
    """A photo as (H, W, 3) uint8 RGB, as the deployed function sees it: upright, deep grey scaled by its maximum.

    Raises:
        FileNotFoundError: there is none, or no access to it.
        ImageError: it cannot be decoded; the message begins with its path.
    """
    with photo_bytes(path) as file:
        return decode_image(file, pixel_limit())


def only_photo(images: Path, stem: str, found: Sequence[Path]) -> Path:
    """The photo of a name, of those that were found in `images`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are two.
    """
    if not found:
        others = [path for path in photo_files((images / stem).parent)[1] if path.with_suffix("") == images / stem]
        also = f", but {others[0].name}, which is not read: {SAVE_ANEW}" if others else ""
        raise FileNotFoundError(f"no photo {stem} with {' or '.join(PHOTO_SUFFIXES)} in {images}{also}")
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are two photos of the name {stem}: rename or remove one")
    return found[0]


class LabelledSet:
    """The photos of a data set and their labels of one defect; the folders are listed once.

    Photos lie in images/. Labels are masks in masks/<defect>/, in any case of letters, or label files anywhere in the set.
    A mask is called as its photo, or that with _mask or _<defect> behind it. finished.csv may say of which parts of a photo
    the labels are known.

    Attributes:
        set_dir, defect: what it is made of.
        mask_dir: folder of the masks; None where the set has none of this defect.

    Args:
        labels: what labels of files and of labelmap.txt are called here, such as {"Riss": "crack"}.

    Raises:
        ValueError: two folders for one defect, a file that is no photo's mask, a labelmap.txt without the defect; a
            name that leads out of the data folder; a label file that cannot be read, labels from two sources; a line of
            finished.csv that is no part of a photo.
    """

    def __init__(self, data_dir: Path, set_name: str, defect: str, labels: Mapping[str, str] | None = None) -> None:
        self.set_dir, self.defect = inside(data_dir, set_name), defect
        self._names = LabelNames(defect, labels or {})
        self._photos: dict[str, list[Path]] = {}
        images = self.set_dir / "images"
        photos, others = photo_files(images)
        tell_not_read(images, not_read(others))
        for path in photos:
            self._photos.setdefault(path.relative_to(images).with_suffix("").as_posix(), []).append(path)
        self.mask_dir = self._mask_dir()
        self._masks = self._masks_by_photo() if self.mask_dir else {}
        self._labelmap = self._read_labelmap(data_dir) if self.mask_dir else None
        photo_names = PhotoNames(self._photos)
        self._shapes = DefectShapes(self.set_dir, self._names, photo_names)
        if self._shapes and self.mask_dir:
            raise ValueError(
                f"{self.mask_dir} and {self._shapes.source} both have labels of {defect}: which count? Move one out of "
                f"{self.set_dir}"
            )
        self._finished = read_finished(self.set_dir / FINISHED, photo_names)
        self._first_colour: tuple[Colour, Path] | None = None

    def photo(self, stem: str) -> Path:
        """Path of a photo; errors as `only_photo`."""
        return only_photo(self.set_dir / "images", stem, self._photos.get(stem, []))

    def mask(self, stem: str) -> Path | None:
        """Path of the file with a photo's labels: its mask, or the label file; None where it has no mask.

        Raises:
            ValueError: there are two, or the set's label files do not know the photo.
        """
        if self._shapes:
            return self._shapes.path(stem)
        found = self._masks.get(stem, [])
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are two masks of the photo {stem}: remove one")
        return found[0] if found else None

    def read_mask(self, stem: str, height: int, width: int) -> np.ndarray | None:
        """Where a photo of that size shows the defect, (H, W) bool; None where it has no mask.

        Of a photo in finished.csv only the pixels in its `finished_boxes` are known.

        Raises:
            ValueError: naming the file, what was found in it, and the remedy.
        """
        if self._shapes:
            return self._shapes.mask(stem, self.photo(stem), height, width)
        path = self.mask(stem)
        if path is None:
            return None
        defect, colour = _read(path, self._labelmap)
        _check_size(path, defect.shape, (height, width))
        if colour:  # red is the crack on one photo, and blue on another: then one of them is another label
            first, where = self._first_colour = self._first_colour or (colour, path)
            if np.abs(np.subtract(colour, first)).max() > SAME_COLOUR:
                raise ValueError(
                    f"{path} shows the defect in the colour {_shown([colour])}, {where} in {_shown([first])}: which is "
                    f"{self.defect}? Put the {LABELMAP} of the export into {self.mask_dir}, or write one mask per defect"
                )
        return defect

    def finished_boxes(self, stem: str) -> list[Box] | None:
        """The parts of a photo of which the labels are known, as x0, y0, x1, y1 in px, x1 and y1 exclusive; None: all of it.

        Raises:
            ValueError: naming the line of finished.csv whose box leaves the photo; as `photo_size` and `photo`.
        """
        lines = self._finished.get(stem)
        if lines is None:
            return None
        height, width = photo_size(self.photo(stem))
        for line, box in lines:
            if box[2] > width or box[3] > height:
                raise ValueError(
                    f"{self.set_dir / FINISHED} line {line}: the box {box} leaves the photo {stem} of {width} x {height} px"
                )
        return [box for _, box in lines]

    def unfinished(self, stem: str, height: int, width: int) -> np.ndarray:
        """Where nothing is known of a photo of that size, (H, W) bool; errors as of `finished_boxes`."""
        boxes = self.finished_boxes(stem)
        unknown = np.full((height, width), boxes is not None)
        for x0, y0, x1, y1 in boxes or ():
            unknown[y0:y1, x0:x1] = False
        return unknown

    def check_masks(self, stems: Iterable[str]) -> None:
        """Of a set that was named as one with the defect: whether its labels can be those of these photos.

        Raises:
            ValueError: the set has no labels of the defect, or they have another name, or no photo of many masks is among
                these.
        """
        if self._shapes:
            return
        if self.mask_dir is None:
            self._shapes.check_labels()
        masks = self.set_dir / "masks"
        if self.mask_dir is None:
            folders = [path.name for path in sorted(masks.iterdir()) if path.is_dir()] if masks.is_dir() else []
            near = near_name(self.defect, folders, NEAR)
            if near or not folders:  # among folders of other defects it may well be a set without this one
                raise ValueError(
                    f"{self.set_dir} was named as a set with {self.defect}, but has no folder masks/{self.defect}: "
                    f"{f'rename {masks / near} to that' if near else 'put the masks there, or a label file into the set'}, or name the set with "
                    "--none-sets or --healthy-sets"
                )
            return
        stems = list(stems)
        example = next((path for path in sorted(self.mask_dir.rglob("*")) if not path.name.startswith(".")), None)
        if example and stems and not any(map(self._masks.get, stems)):
            raise ValueError(
                f"{self.mask_dir} has files such as {example.name}, but no mask of any photo that is needed, such as "
                f"{stems[0]}: {self._naming(stems[0])}"
            )

    def _naming(self, stem: str) -> str:
        return NAMING.format(stem=stem, defect=self.defect)

    def _mask_dir(self) -> Path | None:
        inside(self.set_dir / "masks", self.defect)
        found = [self.set_dir / "masks"]
        for part in self.defect.split("/"):
            inner = [path for folder in found if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_dir()]
            found = [path for path in inner if path.name.casefold() == part.casefold()]
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are both the folder of {self.defect}'s masks: move all to one")
        return found[0] if found else None

    def _masks_by_photo(self) -> dict[str, list[Path]]:
        masks: dict[str, list[Path]] = {}
        others: dict[str, Path] = {}  # files of other formats that are called as a photo: notes beside a mask, or a mask
        endings = ("_mask", f"_{self.defect.split('/')[-1].casefold()}")
        for folder in sorted({Path(stem).parent for stem in self._photos} | {Path()}):
            inner = sorted((self.mask_dir / folder).iterdir()) if (self.mask_dir / folder).is_dir() else []
            for path in inner:
                if path.name.startswith(".") or path.is_dir():
                    continue
                stem = os.path.splitext(path.name)[0]
                cut = [stem[: -len(end)] for end in endings if stem.casefold().endswith(end)]
                owner = next((s for name in (stem, *cut) if (s := (folder / name).as_posix()) in self._photos), None)
                if stem_of(path.name) is None:
                    others[owner or ""] = path
                elif owner is None:
                    example = next(iter(self._photos), "pier_1")
                    raise ValueError(
                        f"{path} is the mask of no photo in {self.set_dir / 'images'}: {self._naming(example)}"
                    )
                else:
                    masks.setdefault(owner, []).append(path)
        for owner, path in others.items():
            if owner and owner not in masks:
                raise ValueError(f"{path} is in no format for masks: {' or '.join(PHOTO_SUFFIXES)} needed")
        return masks

    def _read_labelmap(self, data_dir: Path) -> tuple[Path, set[Colour], set[Colour]] | None:
        """The nearest labelmap.txt with the colours of the defect, and those of all other labels."""
        folders = [self.mask_dir, *self.mask_dir.parents]
        for folder in folders[: folders.index(data_dir) + 1]:
            if (folder / LABELMAP).is_file():
                return folder / LABELMAP, *_colours_of(folder / LABELMAP, self._names)
        return None


def _colours_of(labelmap: Path, names: LabelNames) -> tuple[set[Colour], set[Colour]]:
    """The colours of a defect and those of all other labels; lines are label:r,g,b:parts:actions.

    Raises:
        ValueError: a line that cannot be read, or no label that is called so.
    """
    colours: dict[str, Colour] = {}
    for number, line in enumerate(read_lines(labelmap), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            label, rgb, *_ = line.rsplit(":", 3)
            red, green, blue = map(int, rgb.split(","))
        except ValueError:
            raise ValueError(f"{labelmap} line {number} is {line!r:.100}, but must be label:r,g,b:parts:actions") from None
        colours[label.strip()] = red, green, blue
    wanted = {colour for label, colour in colours.items() if names.is_defect(label)}
    if not wanted:
        raise ValueError(f"{labelmap} {names.lacking(colours)}")
    others = {colour for label, colour in colours.items() if not names.is_defect(label)} | {BLACK}
    if both := wanted & others:
        raise ValueError(
            f"{labelmap} has the colour {_shown(both)} for {names.defect} and for another label, or the background"
        )
    return wanted, others


def read_own_mask(path: Path, height: int, width: int) -> np.ndarray:
    """A mask that this project wrote, (H, W) uint8 of 0, UNKNOWN and 255.

    Raises:
        ValueError: it cannot be read, or has other values or another size.
    """
    values, _ = _pixels(path)
    _check_size(path, values.shape[:2], (height, width))
    levels = np.unique(values)
    if values.ndim != 2 or not set(levels.tolist()) <= {0, UNKNOWN, 255}:
        raise ValueError(
            f"the mask {path} has the values {_shown(levels)}, but pseudo-labels and weak-labels write 0, {UNKNOWN} and 255: "
            "masks of your own belong in a data set, in masks/<defect>/"
        )
    return values.astype(np.uint8)


def _check_size(path: Path, mask_hw: tuple[int, ...], photo_hw: tuple[int, int]) -> None:
    if tuple(mask_hw) != photo_hw:
        (height, width), (own_height, own_width) = photo_hw, mask_hw
        raise ValueError(
            f"mask {path} is {own_width} x {own_height} px, its photo {width} x {height} px: both must be the same"
        )


def _read(path: Path, labelmap: tuple[Path, set[Colour], set[Colour]] | None) -> tuple[np.ndarray, Colour | None]:
    """A mask, (H, W) bool, and the colour that it has the defect in; None where there is none, or it says nothing.

    Raises:
        ValueError: as `LabelledSet.read_mask`.
    """
    values, lossy = _pixels(path)
    if lossy:
        defect, colour = _of_lossy(path, values)
        if labelmap and colour:
            known = sorted(labelmap[1] | labelmap[2])
            apart = [np.abs(np.subtract(colour, one)).max() for one in known]
            if min(apart) > SAME_COLOUR:
                raise _not_in(labelmap[0], path, [colour])
            return defect & (known[int(np.argmin(apart))] in labelmap[1]), None
        return defect, colour if colour and max(colour) - min(colour) > SAME_COLOUR else None
    if labelmap:
        return _of_colours(path, values, *labelmap), None
    if values.ndim == 2:
        return _of_grey(path, values)
    packed = _packed(values)
    colours = _unpacked(np.unique(packed[packed > 0]))
    if len(colours) > 1:
        raise ValueError(
            f"the mask {path} has {len(colours)} colours beside black, {_shown(colours)}: which is the defect? Export with "
            f"{LABELMAP} and put that beside the masks, or write one mask per defect, 0 and 255"
        )
    return packed > 0, (colours[0] if colours else None)


def _of_grey(path: Path, values: np.ndarray) -> tuple[np.ndarray, Colour | None]:
    """Of a mask (H, W) of grey values, as `_read`."""
    levels = np.unique(values) if values.dtype != np.uint8 else np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    others = levels[levels != 0]
    if not len(others):
        return values != 0, None
    if len(others) > 1 or not (others[0] == 1 or others[0] >= LEAST_GREY):
        raise ValueError(
            f"the mask {path} has the grey values {_shown(levels)}, but must have 0 and 255, or 0 and 1. The numbers of labels "
            "are not known, nor what a grey between is: write one mask per defect, without smooth edges"
        )
    return values != 0, None if others[0] in (1, 255) else 3 * (int(others[0]),)


def _of_colours(path: Path, values: np.ndarray, labelmap: Path, wanted: set[Colour], others: set[Colour]) -> np.ndarray:
    """Where a mask (H, W) or (H, W, 3) has one of the wanted colours, (H, W) bool."""
    rgb = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    packed = _packed(rgb)
    foreign = [colour for colour in _unpacked(np.unique(packed[packed > 0])) if colour not in wanted | others]
    if foreign:
        raise _not_in(labelmap, path, foreign)
    return np.isin(packed, [(red << 16) + (green << 8) + blue for red, green, blue in wanted])


def _not_in(labelmap: Path, path: Path, colours: Sequence[Colour]) -> ValueError:
    return ValueError(
        f"the mask {path} has the colour {_shown(colours)}, which {labelmap} does not have: put the {LABELMAP} into the "
        "folder of the masks that it was exported with"
    )


def _of_lossy(path: Path, values: np.ndarray) -> tuple[np.ndarray, Colour | None]:
    """Of a mask (H, W) or (H, W, 3) uint8 that a JPEG has blurred, as `_read`, with the colour also where it is grey.

    Its brightness is what JPEG keeps best: what is brighter than half of the defect is the defect.
    """
    if values.max() <= LOSSY_BLACK and (values == values[0, 0]).all():
        return np.zeros(values.shape[:2], bool), None
    grey = values if values.ndim == 2 else cv2.cvtColor(values, cv2.COLOR_RGB2GRAY)
    defect = grey > grey.max() / 2
    level, colour = (np.median(one[defect], axis=0).astype(np.uint8) for one in (grey, values))

    def elsewhere(pixels: np.ndarray, own: np.ndarray, share: float, width_px: int) -> bool:
        """Whether pixels (H, W, C) are neither black nor like the defect over more than a rim's width."""
        far = np.minimum(pixels, np.maximum(pixels, own) - np.minimum(pixels, own)).max(axis=2)
        return cv2.erode((far > share * own.max()).astype(np.uint8), np.ones((width_px, width_px))).any()

    if (
        colour.max() < LEAST_LOSSY
        or elsewhere(grey[..., None], level, RIM_SHARE, 3)
        or (values.ndim == 3 and elsewhere(values, colour, TINT_SHARE, 7))
    ):
        found = _shown(np.unique(values)) if values.ndim == 2 else f"{_shown([tuple(map(int, colour))])} and others"
        raise ValueError(
            f"the mask {path} has the values {found}, more than a defect on black and what JPEG blurs, or too dark to tell: "
            "save it as PNG, one mask per defect, 0 and 255"
        )
    return defect, tuple(map(int, np.broadcast_to(colour, 3)))


def _pixels(path: Path) -> tuple[np.ndarray, bool]:
    """A mask's pixels and whether its format blurs them.

    Returns:
        (H, W) of any number type where it is grey, else (H, W, 3) uint8 RGB; what is transparent counts as black.

    Raises:
        ValueError: it cannot be read, or is all black but for transparency or a palette.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            lossy = image.format in ("JPEG", "MPO", "WEBP") or image.info.get("compression") == "jpeg"
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # on broken files Pillow's plug-ins raise whatever their parsing runs into
        raise ValueError(f"cannot read the mask {path} ({error}): save it anew, as PNG") from None
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        return (values * np.uint8(255) if values.dtype == bool else values), lossy and image.mode == "L"
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BLACK, 255)), rgba)
        if not np.asarray(image)[..., :3].any() and len(set(rgba.getchannel("A").getextrema())) > 1:
            raise ValueError(f"the mask {path} is black and differs in transparency alone: save it in black and white")
    rgb = np.asarray(image.convert("RGB"))
    if image.mode == "P" and len(image.getcolors()) > 1 and not rgb.any():
        raise ValueError(f"the mask {path} has a palette in which all is black: save it in black and white")
    grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 1] == rgb[..., 2]).all()
    return (rgb[..., 0] if grey else rgb), lossy


def _packed(rgb: np.ndarray) -> np.ndarray:
    """(H, W) of one number per colour, of (H, W, 3) of three; 0 is black."""
    return (rgb[..., 0].astype(np.uint32) << 16) + (rgb[..., 1].astype(np.uint32) << 8) + rgb[..., 2].astype(np.uint32)


def _unpacked(packed: np.ndarray) -> list[Colour]:
    return [(one >> 16, one >> 8 & 255, one & 255) for one in packed.tolist()]


def _shown(values: Iterable) -> str:
    """Some of the values found, in the words of a message."""
    values = [str(value) if isinstance(value, tuple) else f"{value:g}" for value in values]
    more = f" and {len(values) - VALUES_SHOWN} more" if len(values) > VALUES_SHOWN else ""
    return ", ".join(values[:VALUES_SHOWN]) + more
