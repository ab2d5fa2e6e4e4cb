"""Does a defect's size in the photo matter? The same val photos enlarged and reduced, read by the same weights.

Measured is the IoU of all pixels, of cracks F1 with 2 px tolerance, mean over photos, at the default T. When a photo is
enlarged 4 times, 2 px are half a pixel of the original, so F1 falls even if the answer stays the same. Therefore the answer
for the original is measured, too: it is resized with the photo. This figure is called "same".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import cv2
import numpy as np

from defectcam.evaluation.figures import painted
from defectcam.evaluation.measures import bootstrap_sums, f1_2px, interval_95
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.predict import Predictor

FACTORS = (1.0, 2.0, 4.0, 0.5)
ENLARGED_ONLY = ("uav75",)  # cracks of 1 px, which half the size would erase
LARGEST_LOSS = {2.0: 0.05, 4.0: 0.05, 0.5: 0.1}  # against factor 1


def scaled(photo: LabelledPhoto, factor: float, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A photo with the defect and its mask at another size: (h, w, 3) uint8 and (h, w) bool.

    Photos are enlarged cubically and reduced by averaging. Reduced masks of cracks keep every pixel that has some of the
    crack in it, others those that are half covered.
    """
    if factor == 1:
        return photo.image_rgb, photo.truth
    height, width = (round(side * factor) for side in photo.truth.shape)
    if factor > 1:
        image = cv2.resize(photo.image_rgb, (width, height), interpolation=cv2.INTER_CUBIC)
        return image, cv2.resize(photo.truth.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    image = cv2.resize(photo.image_rgb, (width, height), interpolation=cv2.INTER_AREA)
    covered = cv2.resize(photo.truth.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return image, covered > 1e-6 if defect == "crack" else covered >= 0.5


def measure_scale(predictor: Predictor, defect: str, photos: Iterable[LabelledPhoto]) -> dict:
    """The figure per set and factor, and whether it holds.

    Args:
        photos: val photos; those without the defect are left out.

    Returns:
        defect, figure (its name), rows ([{"set", "factor", "photos", figure, figure_95, "same", "holds"}]) and holds.

    Raises:
        ValueError: no photo has the defect.
    """
    # Of every photo the two numbers that the figure is the ratio of: of its answer, and of the answer for factor 1.
    counts: dict[tuple[str, float], list[tuple[float, float, float, float]]] = {}

    def counted(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        if defect == "crack":
            return f1_2px(mask, truth), 1
        return np.count_nonzero(mask & truth), np.count_nonzero(mask | truth)

    for photo in photos:
        if photo.truth is None:
            continue
        for factor in FACTORS:  # 1 is the first
            if factor < 1 and photo.set_name in ENLARGED_ONLY:
                continue
            image_rgb, truth = scaled(photo, factor, defect)
            answer = painted([one.component for one in predictor.propose(image_rgb, defect)], truth.shape)
            if factor == 1:
                answered = replace(photo, truth=answer)
            _, same = scaled(answered, factor, defect)
            counts.setdefault((photo.set_name, factor), []).append((*counted(answer, truth), *counted(same, truth)))
    if not counts:
        raise ValueError(f"no val photo with {defect} in these sets: name others with --sets")
    figure, rows = "f1_2px" if defect == "crack" else "iou", []
    for (set_name, factor), of_photos in counts.items():
        own, same = np.hsplit(np.array(of_photos, float), 2)
        value, draws = _ratio(own.sum(axis=0)), _ratio(bootstrap_sums(own))
        rows.append({"set": set_name, "factor": factor, "photos": len(own), figure: round(float(value), 4),
                     f"{figure}_95": interval_95(draws), "same": round(float(_ratio(same.sum(axis=0))), 4)})  # fmt: skip
    at_one = {row["set"]: row[figure] for row in rows if row["factor"] == 1}
    for row in rows:
        row["holds"] = row["factor"] == 1 or row[figure] >= round(at_one[row["set"]] - LARGEST_LOSS[row["factor"]], 4)
    return {"defect": defect, "figure": figure, "rows": rows, "holds": all(row["holds"] for row in rows)}


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def scale_lines(result: dict) -> list[str]:
    """The result as text."""
    figure = result["figure"]
    lines = [
        f"{result['defect']}: {figure} by size of the photos; same: of the answer for factor 1, resized with the photo",
        f"{'set':18} {'factor':>6} {'photos':>6} {figure:>7}  {'95 %':13}  same",
    ]
    for row in result["rows"]:
        low, high = row[f"{figure}_95"]
        fails = "" if row["holds"] else f"  FAILS: more than {LARGEST_LOSS[row['factor']]:g} below factor 1"
        lines.append(
            f"{row['set'][:18]:18} {row['factor']:>6g} {row['photos']:>6} {row[figure]:>7.3f}  {low:.3f} - {high:.3f}  "
            f"{row['same']:.3f}{fails}"
        )
    failing = [f"{row['set']} at {row['factor']:g}" for row in result["rows"] if not row["holds"]]
    return [*lines, f"Scale is held: {'no: ' + ', '.join(failing) if failing else 'yes'}"]
