"""Weak labels as people give them: one click per defect, clicks where there is none (paper 3, 4.1).

`Click` is one such label and `read_clicks` / `write_clicks` keep them as CSV. `simulate_clicks` derives clicks
from ground-truth masks for experiments; it is the only way a mask reaches the classifier.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from defectcam.paths import inside, not_read, photo_files
from defectcam.training.labels import LabelledSet, only_photo, photo_size, stem_of
from defectcam.training.tables import number_of, table_rows

NEEDED = ("image", "x", "y", "defect")
SMALLEST_CLICKED_PX = 30  # people do not see smaller defects


@dataclass(frozen=True)
class Click:
    """One click: at pixel (x, y) of `image` there is `defect`, or none of `negative_for` within the patch around it.

    Attributes:
        image: path of the photo.
        x, y: pixel, 0-based from the upper left corner.
        defect: the defect clicked on, or "none".
        negative_for: for a negative click the defect that was looked for; "" for a positive click.
        photo_group: what is never split between train and val, and what a sampler balances over.
        weight: how much it counts against the other clicks, 0 or more; more where the proposals were worse.
        interaction: id of what an annotator did that it was derived from (`feedback.store`); "" of a click by hand.
        patch_px: side of the square around a negative click that is free of the defect; 0: as large as a crop of training.
    """

    image: str
    x: int
    y: int
    defect: str
    negative_for: str = ""
    photo_group: str = ""
    weight: float = 1.0
    interaction: str = ""
    patch_px: int = 0


def write_clicks(path: Path, clicks: list[Click]) -> None:
    """Write clicks as CSV with a header line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Click)])
        writer.writeheader()
        writer.writerows(asdict(click) for click in clicks)


def read_clicks(path: Path, with_photos: bool = False) -> list[Click]:
    """Read clicks from CSV, or from JSONL by the file's ending: image, x, y, defect; the others may be left out.

    Names of columns may have any case. CSV has commas, semicolons or tabs between, and is UTF-8 or, with its mark,
    UTF-16. Fractions of a pixel are cut off; between semicolons or tabs they may have a decimal comma.

    Args:
        with_photos: whether a click must lie in its photo, each of which is opened for its size.

    Raises:
        ValueError: naming file, line, what is wrong with it and the remedy; so too where all positions look like shares
            or percent of the photo, and for a photo that cannot be read.
        FileNotFoundError: the file or, with photos, one of them is not there.
    """
    rows, decimal_comma = table_rows(path, NEEDED, "clicks")
    clicks: list[Click] = []
    lines: list[int] = []
    positions: list[tuple[float, float]] = []
    for line, row in rows:
        try:
            weight = number_of(row.get("weight") or 1.0, decimal_comma)
            if not 0 <= weight < math.inf:
                raise ValueError(f"weight {weight} is not a number from 0")
            xy = number_of(row["x"], decimal_comma), number_of(row["y"], decimal_comma)
            x, y, defect = *map(int, xy), row["defect"].strip()
            if min(xy) < 0 or not defect:
                raise ValueError(f"({x}, {y}) {defect!r} is no place in a photo with a defect, or none")
            clicks.append(
                Click(
                    row["image"].strip(),
                    x,
                    y,
                    "none" if defect.lower() == "none" else defect,
                    (row.get("negative_for") or row.get("absent") or "").strip(),  # `absent` in files of earlier versions
                    row.get("photo_group") or "",
                    weight,
                    row.get("interaction") or "",
                    int(row.get("patch_px") or 0),
                )
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} line {line}: {error!r}; a click needs image, x, y (numbers) and defect") from error
        lines.append(line)
        positions.append(xy)
    _check_unit(path, lines, positions)
    if with_photos:
        _check_places(path, lines, clicks)
    return clicks


def _check_unit(path: Path, lines: Sequence[int], positions: Sequence[tuple[float, float]]) -> None:
    """ValueError where positions look like shares or percent: none is beyond 1 or 100, and one is no whole number."""
    most = max((max(xy) for xy in positions), default=0)
    fraction = next((at for at in zip(lines, positions) if any(value % 1 for value in at[1])), None)
    if fraction is None or most > 100:
        return
    what, remedy = ("shares", "multiply x by the photo's width and y by its height") if most <= 1 else (
        "percent", "multiply x by the photo's width and y by its height, and divide by 100"
    )  # fmt: skip
    line, (x, y) = fraction
    raise ValueError(
        f"{path} line {line}: x {x:g} and y {y:g}, and no position of the file is beyond {1 if most <= 1 else 100}: these look "
        f"like {what} of the photo's size, but pixels are needed: {remedy}. If they are pixels, write whole numbers"
    )


def _check_places(path: Path, lines: Sequence[int], clicks: Sequence[Click]) -> None:
    """FileNotFoundError or ValueError where a click's photo is not there, or the click lies outside of it."""
    sizes: dict[str, tuple[int, int]] = {}
    for line, click in zip(lines, clicks):
        try:
            height, width = sizes[click.image] = sizes.get(click.image) or photo_size(click.image)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{path} line {line}: {error}; paths count from the folder that the command runs in") from None
        if click.x >= width or click.y >= height:
            raise ValueError(
                f"{path} line {line}: the click at ({click.x}, {click.y}) lies outside its photo {click.image} of "
                f"{width} x {height} px"
            )


def photo_path(set_dir: Path, stem: str) -> Path:
    """Path of a photo of a data set laid out as images/<stem> with any of PHOTO_SUFFIXES, in any case of letters.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are two, or the name leads out of the data set.
    """
    path = inside(set_dir / "images", stem)
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    return only_photo(set_dir / "images", stem, [path.parent / name for name in names if stem_of(name) == path.name])


def split_stems(data_dir: Path, set_name: str, split: str) -> list[str]:
    """File stems of a set's "train" or "val" photos, from splits.json; groups of photos are never split there.

    Where there is no such file, all photos of the set are "train" photos.

    Raises:
        ValueError: it is no JSON of that kind; naming the sets there are, where this is none of them; a name that leads
            out of the data folder.
    """
    path = data_dir / "splits.json"
    if not path.exists():
        if split == "train":
            return all_stems(inside(data_dir, set_name) / "images")
        raise FileNotFoundError(
            f'{path} is not there; it says which photos judge: {{"{set_name}": {{"train": ["<photo>", ...], "val": [...]}}}}'
        )
    try:
        splits = json.loads(path.read_bytes())  # of bytes, json finds out about UTF-8 with a mark, and UTF-16
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; save it as JSON in UTF-8") from None
    if not isinstance(splits, dict) or not all(isinstance(of_set, dict) for of_set in splits.values()):
        raise ValueError(f'{path} must hold {{"<set>": {{"train": ["<photo>", ...], "val": [...]}}}}')
    if split not in splits.get(set_name, ()):
        raise ValueError(f"{data_dir / 'splits.json'} has no {split} photos of {set_name!r}; its sets are {sorted(splits)}")
    stems = splits[set_name][split]
    if not isinstance(stems, list) or not all(isinstance(stem, str) for stem in stems):
        raise ValueError(f"{path}: the {split} photos of {set_name!r} must be a list of names")
    for stem in stems:
        inside(inside(data_dir, set_name), stem)
    return stems


def all_stems(images: Path) -> list[str]:
    """Names of all photos in a folder and those below it, without suffix.

    Raises:
        FileNotFoundError: there is none.
    """
    paths, others = photo_files(images)
    if not paths:
        also = f" (not read: {not_read(others)})" if others else ""
        raise FileNotFoundError(f"there is no photo in {images}{also}: the photos of a set lie in its folder images")
    return [path.relative_to(images).with_suffix("").as_posix() for path in paths]


def simulate_clicks(
    data_dir: Path,
    set_name: str,
    split: str,
    defect: str,
    patch_px: int,
    none_per_photo: int,
    seed: int,
    smallest_px: int = SMALLEST_CLICKED_PX,
    shows_defect: bool = False,
    largest_patch_px: int | None = None,
    label_names: Mapping[str, str] | None = None,
) -> list[Click]:
    """The clicks a person would give: one per defect component, and negative clicks on patches free of the defect.

    A set without masks of this defect gives negative clicks only: its photos are of another material and are taken
    to be free of it (the caller decides which sets that holds for).

    Args:
        patch_px: side of the patch around a negative click that must be free of the defect (cut at the photo's edges).
        label_names: see `LabelledSet`.
        largest_patch_px: where given, the side is drawn for every negative click, log-uniformly from `patch_px` to this.
        none_per_photo: negative clicks tried per photo; a photo full of defect gives fewer.
        smallest_px: components of fewer pixels get no click.
        shows_defect: whether the set was named as one with the defect, so that it must have masks of it.

    Returns:
        Clicks with `photo_group` = "<set>/<stem>", in the order of the split.

    Raises:
        ValueError, FileNotFoundError: naming the mask or photo that cannot be read right; see `LabelledSet`.
    """
    rng = np.random.default_rng(seed)
    clicks = []
    files, stems = LabelledSet(data_dir, set_name, defect, label_names), split_stems(data_dir, set_name, split)
    if shows_defect:
        files.check_masks(stems)
    for stem in stems:
        path = files.photo(stem)
        size = photo_size(path)
        mask = files.read_mask(stem, *size)
        if mask is None:
            mask = np.zeros(size, bool)
        unknown = files.unfinished(stem, *size)
        group = f"{set_name}/{stem}"
        count, labels, stats, _ = cv2.connectedComponentsWithStats((mask & ~unknown).astype(np.uint8), connectivity=8)
        for component in range(1, count):
            if stats[component, cv2.CC_STAT_AREA] >= smallest_px:
                ys, xs = np.nonzero(labels == component)
                pick = rng.integers(len(xs))
                clicks.append(Click(str(path), int(xs[pick]), int(ys[pick]), defect, "", group))
        height, width = mask.shape
        summed = cv2.integral((mask | unknown).astype(np.uint8))  # no negative click where nothing is known
        for _ in range(none_per_photo):
            side = patch_px
            if largest_patch_px:
                side = round(float(np.exp(rng.uniform(*np.log([patch_px, largest_patch_px])))))
            for _attempt in range(20):
                x, y = int(rng.integers(width)), int(rng.integers(height))
                if patch_is_free(summed, x, y, side):
                    clicks.append(Click(str(path), x, y, "none", defect, group, patch_px=side))
                    break
    return clicks


def patch_bounds(center: int, patch_px: int, size: int) -> tuple[int, int]:
    """Start and end of a patch of `patch_px` around `center`, moved inside 0..size (shorter where size is)."""
    length = min(patch_px, size)
    start = min(max(center - length // 2, 0), size - length)
    return start, start + length


def patch_is_free(summed: np.ndarray, x: int, y: int, patch_px: int) -> bool:
    """Whether the patch around (x, y) has no pixel of a mask (H, W), of which `cv2.integral` made `summed`."""
    height, width = summed.shape[0] - 1, summed.shape[1] - 1
    (x0, x1), (y0, y1) = patch_bounds(x, patch_px, width), patch_bounds(y, patch_px, height)
    return summed[y1, x1] - summed[y0, x1] - summed[y1, x0] + summed[y0, x0] == 0


def patch_xyxy(click: Click, default_px: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The patch around a negative click, half-open box in the photo, px; `default_px` is its side where the click has none."""
    side_px = click.patch_px or default_px
    (x0, x1), (y0, y1) = patch_bounds(click.x, side_px, width), patch_bounds(click.y, side_px, height)
    return x0, y0, x1, y1
