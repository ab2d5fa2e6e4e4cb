"""The labelled photos of a training, gathered from sets, masks and files of clicks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.training.clicks import Click, read_clicks, simulate_clicks, split_stems
from defectcam.training.config import TrainConfig
from defectcam.training.dataset import PhotoLabels
from defectcam.training.labels import UNKNOWN, LabelledSet, photo_size, read_own_mask, read_photo_rgb
from defectcam.training.names import suggestion

PSEUDO_RECORD = "pseudo.json"  # beside pseudo-labels: what they were made of, and whether all are there
CLICKED = "clicks"  # folder of the pseudo-labels of photos of --clicks, beside those of the sets
RIM_PX = 4  # around the regions of another defect, which look like a crack

Outline = Callable[[int, int], np.ndarray | None]  # height, width -> (H, W) uint8


@dataclass
class Source:
    """A photo that is not read yet, and where its labels come from.

    Attributes:
        path: of the photo.
        outline: gives `PhotoLabels.outline` for the photo's size; None where only clicks are known.
        clicks: on it.
    """

    path: Path
    outline: Outline | None = None
    clicks: list[Click] = field(default_factory=list)

    def read(self) -> PhotoLabels:
        """The photo with its labels.

        Raises:
            ValueError, FileNotFoundError: naming the photo or mask that cannot be read right.
        """
        image_rgb = read_photo_rgb(self.path)
        outline = self.outline(*image_rgb.shape[:2]) if self.outline else None
        return PhotoLabels(image_rgb, outline, tuple(self.clicks))


def gather(config: TrainConfig, split: str) -> list[Source]:
    """The photos to train on or to judge by.

    Args:
        split: "train" or "val".

    Raises:
        ValueError, FileNotFoundError: naming the set or file that does not give what is needed, with the remedy.
    """
    sources: list[Source] = []
    if config.masks and split == "train":
        _check_complete(config.masks)
    for set_name in config.sets:
        sources += _of_set(config, set_name, split)
    for set_name in config.none_sets:
        sources += _of_none_set(config, set_name, split)
    by_path = {source.path.resolve(): source for source in sources}
    file, option = (config.clicks, "--clicks") if split == "train" else (config.val_clicks, "--val-clicks")
    clicks = own_clicks(file, option, config.defect) if file else []
    masks: dict[Path, Path] = {}
    if config.masks and split == "train":
        masks = {Path(click.image): mask_of_clicked(config.masks, Path(click.image)) for click in clicks}
    if masks and not config.sets and not any(mask.exists() for mask in masks.values()):
        raise ValueError(
            f"--masks {config.masks} has no mask of a photo of --clicks {file}: write them by `defectcam pseudo-labels --clicks`"
        )
    for click in clicks:
        path = Path(click.image)
        key = path.resolve()
        if key not in by_path:
            mask = masks.get(path)
            by_path[key] = Source(path, _reader_of(mask) if mask and mask.exists() else None)
            sources.append(by_path[key])
        by_path[key].clicks.append(click)
    if split == "train":
        for pair in config.none_regions:
            sources += regions_without(config, *pair.split(":", 1))
    return sources


def check_kinds(config: TrainConfig, sources: Sequence[Source], split: str) -> None:
    """Whether clicks alone are of both kinds; outlined photos say more than that.

    Raises:
        ValueError: naming the kind that is missing.
    """
    if any(source.outline for source in sources):
        return
    clicks = [click for source in sources for click in source.clicks]
    negative = sum(click.defect == "none" for click in clicks)
    if negative and negative < len(clicks):
        return
    file = config.clicks if split == "train" else config.val_clicks
    option = f"{'--clicks' if split == 'train' else '--val-clicks'} {file}" if file else ""
    where = option or f"the {split} photos of {', '.join([*config.sets, *config.none_sets])}"
    kind = "click on the defect" if negative else "negative click, which says where the defect is not"
    side_px = config.crops_of_largest_scale_px[0]
    hint = "" if option or negative else f", since nowhere are {side_px} px free of it: try a smaller --crop-px"
    raise ValueError(f"{where}: there is no {kind}, for {config.defect!r}{hint}. Training and val each need both kinds")


def _of_set(config: TrainConfig, set_name: str, split: str) -> Iterator[Source]:
    if config.labels == "clicks" and not config.masks:
        yield from _simulated(config, set_name, split, shows_defect=True)
        return
    files = LabelledSet(config.data, set_name, config.defect, config.label_names)
    stems = split_stems(config.data, set_name, split)
    if config.masks and split == "train":
        masks = {stem: config.masks / set_name / f"{stem}.png" for stem in stems}
        for stem, mask in masks.items():
            if mask.exists():  # of the others nothing is known
                yield Source(files.photo(stem), _reader_of(mask))
        return
    files.check_masks(stems)
    for stem in stems:
        yield Source(files.photo(stem), lambda height, width, stem=stem: _outline(files, stem, height, width))


def _check_complete(masks: Path) -> None:
    """ValueError where not all pseudo-labels are written: a photo without a mask would be left out without a word."""
    record = masks / PSEUDO_RECORD
    if record.exists() and not json.loads(record.read_text())["finished"]:
        raise ValueError(f"--masks {masks} is not complete: run `defectcam pseudo-labels` once more, it goes on there")


def mask_of_clicked(masks: Path, photo: Path) -> Path:
    """Where pseudo-labels of a photo of `--clicks` lie; photos of one name in two folders have two masks."""
    return masks / CLICKED / f"{photo.stem}-{hashlib.sha256(str(photo.resolve()).encode()).hexdigest()[:12]}.png"


def _reader_of(mask: Path) -> Outline:
    """Reads a mask that this project wrote."""
    return lambda height, width: read_own_mask(mask, height, width)


def _outline(files: LabelledSet, stem: str, height: int, width: int) -> np.ndarray:
    mask = files.read_mask(stem, height, width)
    if mask is None:
        raise FileNotFoundError(
            f"{files.photo(stem)} has no mask of {files.defect}: a photo without it has an all black one"
        )
    outline = mask * np.uint8(255)
    outline[files.unfinished(stem, height, width)] = UNKNOWN
    return outline


def _of_none_set(config: TrainConfig, set_name: str, split: str) -> Iterator[Source]:
    """Photos that are marked to have nothing of the defect, or not marked at all."""
    if config.labels == "clicks":
        for source in _simulated(config, set_name, split, shows_defect=False):
            source.clicks = [click for click in source.clicks if click.defect == "none"]
            if source.clicks:
                yield source
        return
    files = LabelledSet(config.data, set_name, config.defect, config.label_names)
    for stem in stems_without(files, split_stems(config.data, set_name, split)):
        yield Source(files.photo(stem), lambda *size, stem=stem: files.unfinished(stem, *size) * np.uint8(UNKNOWN))


def stems_without(files: LabelledSet, stems: Iterable[str]) -> Iterator[str]:
    """Those of the photos that have no mark of the defect; errors as of `LabelledSet`."""
    for stem in stems:
        mask = files.read_mask(stem, *photo_size(files.photo(stem)))
        if mask is None or not mask.any():
            yield stem


def _simulated(config: TrainConfig, set_name: str, split: str, shows_defect: bool) -> Iterator[Source]:
    """What a person's clicks would tell of the photos of a set."""
    least_px, most_px = config.crops_of_largest_scale_px
    clicks = simulate_clicks(
        config.data, set_name, split, config.defect, least_px, config.none_per_photo, config.seed,
        shows_defect=shows_defect, largest_patch_px=most_px if most_px > least_px else None,
        label_names=config.label_names,
    )  # fmt: skip
    by_photo: dict[str, Source] = {}
    for click in clicks:
        by_photo.setdefault(click.image, Source(Path(click.image))).clicks.append(click)
    yield from by_photo.values()


def regions_without(config: TrainConfig, set_name: str, other: str) -> Iterator[Source]:
    """Photos with regions of another defect: these and their rims are known to be without this one, the rest is unknown.

    The rim of a spall looks like a crack but is not a crack. The concrete beside it may have cracks without a mark.
    """
    files = LabelledSet(config.data, set_name, other, config.label_names)

    def outline(stem: str, height: int, width: int) -> np.ndarray:
        inside = files.read_mask(stem, height, width).astype(np.uint8)
        around = cv2.dilate(inside, np.ones((2 * RIM_PX + 1, 2 * RIM_PX + 1), np.uint8)) > 0
        return np.where(around, np.uint8(0), np.uint8(UNKNOWN))

    for stem in split_stems(config.data, set_name, "train"):
        if files.mask(stem):
            yield Source(files.photo(stem), lambda height, width, stem=stem: outline(stem, height, width))


def own_clicks(file: Path, option: str, defect: str) -> list[Click]:
    """A person's own clicks on a defect or on its absence.

    Args:
        option: that named the file, for errors.

    Raises:
        ValueError, FileNotFoundError: naming the file and what is wrong with it; see `read_clicks`.
    """
    read = read_clicks(file, with_photos=True)
    clicks = [own for click in read if (own := click_on(click, defect))]
    others = sorted({click.defect for click in read if not click_on(click, defect)})
    if others and not any(click.defect == defect for click in clicks):
        raise ValueError(f"{option} {file} has no click on {defect!r}{suggestion(defect, others)}; its defects are {others}")
    return clicks


def click_on(click: Click, defect: str) -> Click | None:
    """What a click says of a defect, which it may call in other capital letters; None if nothing."""
    if click.defect == "none":
        return click if click.negative_for.casefold() in ("", defect.casefold()) else None
    return dataclasses.replace(click, defect=defect) if click.defect.casefold() == defect.casefold() else None


def read_all(sources: Sequence[Source], what: str) -> Iterator[PhotoLabels]:
    """The photos of some sources, one after the other, with progress."""
    for source in tqdm(sources, desc=what, unit="photo"):
        yield source.read()


def labels_sha256(photos: Sequence[PhotoLabels]) -> str:
    """Hash of what a run learns from, hexadecimal: outlines and clicks, not the paths of photos."""
    found = hashlib.sha256()
    for photo in photos:
        if photo.outline is not None:
            found.update(np.ascontiguousarray(photo.outline))
        found.update(repr([(c.x, c.y, c.defect, c.weight, c.patch_px) for c in photo.clicks]).encode())
    return found.hexdigest()
