"""Weak labels as people give them: one click per defect, clicks where there is none (paper 3, 4.1).

`Click` is one such label and `read_clicks` / `write_clicks` keep them as CSV. `simulate_clicks` derives clicks
from ground-truth masks for experiments; it is the only way a mask reaches the classifier.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from defectcam.paths import inside

IMAGE_SUFFIXES = (".jpg", ".png")
SMALLEST_CLICKED_PX = 30  # smaller defects nobody would see, let alone click


@dataclass(frozen=True)
class Click:
    """One click: at pixel (x, y) of `image` there is `defect`, or none of `absent` within the patch around it.

    Attributes:
        image: path of the photo.
        x, y: pixel, 0-based from the upper left corner.
        defect: the defect clicked on, or "none".
        absent: for a none-click the defect that was looked for; "" for a positive click.
        photo_group: what is never split between train and val, and what a sampler balances over.
        weight: how much it counts against the other clicks, 0 or more; more where the proposals were worse.
        interaction: id of what an annotator did that it was derived from (`feedback.store`); "" of a click by hand.
    """

    image: str
    x: int
    y: int
    defect: str
    absent: str = ""
    photo_group: str = ""
    weight: float = 1.0
    interaction: str = ""


def write_clicks(path: Path, clicks: list[Click]) -> None:
    """Write clicks as CSV with a header line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Click)])
        writer.writeheader()
        writer.writerows(asdict(click) for click in clicks)


def read_clicks(path: Path) -> list[Click]:
    """Read clicks from CSV, or from JSONL by the file's ending: image, x, y, defect; the others may be left out.

    Raises:
        ValueError: naming file, line and what is wrong with it.
    """
    clicks = []
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel puts a mark before the first column's name
        lines = file.read().splitlines() if path.suffix == ".jsonl" else csv.DictReader(file)
        for number, line in enumerate(lines, start=1 if path.suffix == ".jsonl" else 2):
            try:
                row = json.loads(line) if isinstance(line, str) else line
                weight = float(row.get("weight") or 1.0)
                if not 0 <= weight < math.inf:
                    raise ValueError(f"weight {weight} is not a number from 0")
                x, y, defect = int(float(row["x"])), int(float(row["y"])), row["defect"].strip()
                if x < 0 or y < 0 or not defect:
                    raise ValueError(f"({x}, {y}) {defect!r} is no place in a photo with a defect, or none")
                clicks.append(
                    Click(
                        row["image"],
                        x,
                        y,
                        "none" if defect.lower() == "none" else defect,
                        row.get("absent") or "",
                        row.get("photo_group") or "",
                        weight,
                        row.get("interaction") or "",
                    )
                )
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{path} line {number}: {error!r}; a click needs image, x, y (numbers) and defect"
                ) from error
    return clicks


def photo_path(set_dir: Path, stem: str) -> Path:
    """Path of a photo of a data set laid out as images/<stem>.jpg|png.

    Raises:
        FileNotFoundError: where there is none.
    """
    for suffix in IMAGE_SUFFIXES:
        path = inside(set_dir / "images", f"{stem}{suffix}")
        if path.exists():
            return path
    raise FileNotFoundError(f"no photo {stem} with {' or '.join(IMAGE_SUFFIXES)} in {set_dir / 'images'}")


def mask_path(set_dir: Path, defect: str, stem: str) -> Path:
    """Path of a photo's mask in a data set laid out as masks/<defect>/<stem>.png; there may be none.

    Raises:
        ValueError: the path would lead out of the data set.
    """
    return inside(set_dir / "masks", f"{defect}/{stem}.png")


def split_stems(data_dir: Path, set_name: str, split: str) -> list[str]:
    """File stems of a set's "train" or "val" photos, from splits.json; groups of photos are never split there.

    Raises:
        ValueError: naming the sets there are, where this is none of them; a name that leads out of the data folder.
    """
    splits = json.loads((data_dir / "splits.json").read_text())
    if split not in splits.get(set_name, ()):
        raise ValueError(f"{data_dir / 'splits.json'} has no {split} photos of {set_name!r}; its sets are {sorted(splits)}")
    for stem in splits[set_name][split]:
        inside(inside(data_dir, set_name), stem)
    return splits[set_name][split]


def simulate_clicks(
    data_dir: Path,
    set_name: str,
    split: str,
    defect: str,
    patch_px: int,
    none_per_photo: int,
    seed: int,
    smallest_px: int = SMALLEST_CLICKED_PX,
) -> list[Click]:
    """The clicks a person would give: one per defect component, and none-clicks on patches free of the defect.

    A set without masks of this defect gives none-clicks only: its photos are of another material and are taken
    to be free of it (the caller decides which sets that holds for).

    Args:
        patch_px: side of the patch around a none-click that must be free of the defect (cut at the photo's edges).
        none_per_photo: none-clicks tried per photo; a photo full of defect gives fewer.
        smallest_px: components of fewer pixels get no click.

    Returns:
        Clicks with `photo_group` = "<set>/<stem>", in the order of the split.
    """
    rng = np.random.default_rng(seed)
    set_dir = data_dir / set_name
    clicks = []
    for stem in split_stems(data_dir, set_name, split):
        path = photo_path(set_dir, stem)
        own_mask = mask_path(set_dir, defect, stem)
        if own_mask.exists():
            mask = cv2.imread(str(own_mask), cv2.IMREAD_GRAYSCALE) > 127
        else:
            mask = np.zeros(cv2.imread(str(path)).shape[:2], bool)
        group = f"{set_name}/{stem}"
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        for component in range(1, count):
            if stats[component, cv2.CC_STAT_AREA] >= smallest_px:
                ys, xs = np.nonzero(labels == component)
                pick = rng.integers(len(xs))
                clicks.append(Click(str(path), int(xs[pick]), int(ys[pick]), defect, "", group))
        height, width = mask.shape
        summed = cv2.integral(mask.astype(np.uint8))
        for _ in range(none_per_photo):
            for _attempt in range(20):
                x, y = int(rng.integers(width)), int(rng.integers(height))
                x0, x1 = patch_bounds(x, patch_px, width)
                y0, y1 = patch_bounds(y, patch_px, height)
                if summed[y1, x1] - summed[y0, x1] - summed[y1, x0] + summed[y0, x0] == 0:
                    clicks.append(Click(str(path), x, y, "none", defect, group))
                    break
    return clicks


def patch_bounds(center: int, patch_px: int, size: int) -> tuple[int, int]:
    """Start and end of a patch of `patch_px` around `center`, moved inside 0..size (shorter where size is)."""
    length = min(patch_px, size)
    start = min(max(center - length // 2, 0), size - length)
    return start, start + length
