"""How silent are the weights on photos of the mission's size? Mosaics of val photos without the defect.

Half of the mosaics hold the photos at their own size and half at four times it. Counted are false proposals per megapixel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.evaluation.kept import KeptPhoto
from defectcam.evaluation.measures import bootstrap_sums, interval_95
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.paths import file_name, write_image
from defectcam.predict import Predictor, proposals_for
from defectcam.pyramid import Pyramid

MOSAICS = 8
SIDE_PX = 5000
FACTORS = (1, 4)  # size of the photos in every other mosaic
STEPS = (0, 2, 8)


@dataclass(frozen=True, eq=False)
class Mosaic:
    """A picture (SIDE_PX, SIDE_PX, 3) uint8 of photos at `factor` times their size, and where each one lies.

    Attributes:
        places: (name of the photo, half-open box y0, y1, x0, x1).
    """

    image_rgb: np.ndarray
    factor: int
    places: list[tuple[str, tuple[int, int, int, int]]]

    def photo_at(self, y: int, x: int) -> str:
        """Name of the photo that a pixel belongs to."""
        return next(name for name, (y0, y1, x0, x1) in self.places if y0 <= y < y1 and x0 <= x < x1)


def mosaics_of(photos: Sequence[LabelledPhoto | KeptPhoto], count: int) -> Iterator[Mosaic]:
    """Mosaics of photos in random order, the same at every call; every photo is taken before any is repeated.

    A row holds photos of one set, the sets by turns, all cropped to the height of the row's lowest.
    """
    rng, by_set = np.random.default_rng(0), {}
    for photo in photos:
        by_set.setdefault(photo.set_name, []).append(photo)
    endless = [_endless(of_set, rng) for of_set in by_set.values()]
    row_number = 0
    for number in range(count):
        factor, top = FACTORS[number % len(FACTORS)], 0
        image_rgb, places = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8), []
        while top < SIDE_PX:
            row, width = [], 0
            while width < SIDE_PX:
                row.append(next(endless[row_number % len(endless)]))
                width += factor * row[-1].image_rgb.shape[1]
            row_number += 1
            bottom = min(top + factor * min(photo.image_rgb.shape[0] for photo in row), SIDE_PX)
            left = 0
            for photo in row:
                large = cv2.resize(photo.image_rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
                right = min(left + large.shape[1], SIDE_PX)
                image_rgb[top:bottom, left:right] = large[: bottom - top, : right - left]
                places.append((f"{photo.set_name}/{photo.stem}", (top, bottom, left, right)))
                left = right
            top = bottom
        yield Mosaic(image_rgb, factor, places)


def _endless(photos: Sequence[LabelledPhoto | KeptPhoto], rng: np.random.Generator) -> Iterator[LabelledPhoto | KeptPhoto]:
    while True:
        yield from (photos[index] for index in rng.permutation(len(photos)))


def measure_mosaics(
    predictor: Predictor, defect: str, photos: Sequence[LabelledPhoto | KeptPhoto], count: int, pictures: Path
) -> dict:
    """False proposals per megapixel by T and size of the photos; the mosaics with proposals are drawn to `pictures`.

    Args:
        photos: without the defect.
        count: number of mosaics.

    Returns:
        defect, rows ([{"factor", "T", "mosaics", "megapixels", "false_per_mp", "false_per_mp_95"}]) and fired: photo ->
        number of proposals on it at the last T. Photos that fire have to be looked at: an unlabelled defect is no fault.

    Raises:
        ValueError: there is no photo without the defect.
    """
    if not photos:
        raise ValueError(f"no val photo without {defect} in these sets: name others with --healthy-sets")
    config, counts, fired = predictor.weights.configs[defect], {}, Counter()
    mosaics = tqdm(mosaics_of(photos, count), desc=f"{defect}: mosaics", total=count)
    for number, mosaic in enumerate(mosaics):
        found = proposals_for(predictor.maps(Pyramid(mosaic.image_rgb), defect), config, STEPS)
        for steps in STEPS:
            of_all = counts.setdefault((mosaic.factor, steps), [])
            of_all.append((len(found[steps]), mosaic.image_rgb[..., 0].size / 1e6))
        last = [one.component for one in found[STEPS[-1]]]
        for one in last:
            fired[mosaic.photo_at(one.top, one.left + int(np.argmax(one.mask[0])))] += 1
        if last:
            drawn = mosaic.image_rgb[..., ::-1].copy()
            for one in last:
                x0, y0, x1, y1 = one.box_xyxy
                drawn[y0 : y1 + 1, x0 : x1 + 1][one.mask] = (0, 0, 230)
            half = cv2.resize(drawn, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            write_image(pictures / file_name(f"{defect}_{number}", ".jpg"), half)
    rows = []
    for (factor, steps), of_all in sorted(counts.items()):
        table = np.array(of_all)
        false, megapixels = table.sum(axis=0)
        draws = bootstrap_sums(table)
        rows.append({"factor": factor, "T": steps, "mosaics": len(table), "megapixels": round(float(megapixels), 2),
                     "false_per_mp": round(float(false / megapixels), 4),
                     "false_per_mp_95": interval_95(draws[:, 0] / draws[:, 1])})  # fmt: skip
    return {"defect": defect, "rows": rows, "fired": dict(fired.most_common())}


def mosaics_lines(result: dict) -> list[str]:
    """The result as text."""
    lines = [f"{result['defect']}: false proposals per megapixel on mosaics of photos without it",
             f"{'size':>4} {'T':>3} {'mosaics':>7} {'MP':>7} {'false/MP':>9}  95 %"]  # fmt: skip
    for row in result["rows"]:
        low, high = row["false_per_mp_95"]
        lines.append(
            f"{row['factor']:>4} {row['T']:>3} {row['mosaics']:>7} {row['megapixels']:>7g} {row['false_per_mp']:>9.3f}  "
            f"{low:.3f} - {high:.3f}"
        )
    if result["fired"]:
        lines.append("look at: " + ", ".join(f"{name} ({count})" for name, count in result["fired"].items()))
    return lines
