"""Does a defect's size in the photo matter? The same val photos enlarged and reduced, read by the same weights.

Measured is the IoU of all pixels, of cracks F1 with 2 px tolerance, mean over photos, at the default T. In a photo 4 times as
large, 2 px are half a pixel of the photo before. So the answer for the photo itself, enlarged with it, is measured beside it: a
network that found the same at every size would have that figure.
"""

from __future__ import annotations

from collections.abc import Iterable

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
        return image, enlarged_mask(photo.truth, width, height)
    image = cv2.resize(photo.image_rgb, (width, height), interpolation=cv2.INTER_AREA)
    covered = cv2.resize(photo.truth.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return image, covered > 1e-6 if defect == "crack" else covered >= 0.5


def enlarged_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask (H, W) bool at a larger size, (height, width) bool."""
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0


def measure_scale(predictor: Predictor, defect: str, photos: Iterable[LabelledPhoto]) -> dict:
    """The figure per set and factor, and whether it holds.

    Args:
        photos: val photos; those without the defect are left out.

    Returns:
        defect, figure (its name), rows ([{"set", "factor", "photos", figure, figure_95, "same", "holds"}]) and holds; "same"
        is the figure that the answer for factor 1 has, enlarged, None where nothing is.

    Raises:
        ValueError: no photo has the defect.
    """
    # Per photo what the figure is the ratio of: of the answer, and of the answer for factor 1.
    counts: dict[tuple[str, float], list[tuple[float, float]]] = {}
    counts_of_same: dict[tuple[str, float], list[tuple[float, float]]] = {}

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
            mask = painted([one.component for one in predictor.propose(image_rgb, defect)], truth.shape)
            counts.setdefault((photo.set_name, factor), []).append(counted(mask, truth))
            if factor == 1:
                first_mask = mask
            elif factor > 1:
                same = enlarged_mask(first_mask, *truth.shape[::-1])
                counts_of_same.setdefault((photo.set_name, factor), []).append(counted(same, truth))
    if not counts:
        raise ValueError(f"no val photo with {defect} in these sets: name others with --sets")
    figure, rows = "f1_2px" if defect == "crack" else "iou", []
    for (set_name, factor), of_photos in counts.items():
        table = np.array(of_photos, float)
        value, draws = _ratio(table.sum(axis=0)), _ratio(bootstrap_sums(table))
        same = counts_of_same.get((set_name, factor))
        rows.append({"set": set_name, "factor": factor, "photos": len(table), figure: round(float(value), 4),
                     f"{figure}_95": interval_95(draws),
                     "same": same and round(float(_ratio(np.sum(same, axis=0))), 4)})  # fmt: skip
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
        f"{result['defect']}: {figure} by size of the photos; same: of the answer for factor 1, enlarged",
        f"{'set':18} {'factor':>6} {'photos':>6} {figure:>7}  {'95 %':13}  same",
    ]
    for row in result["rows"]:
        low, high = row[f"{figure}_95"]
        fails = "" if row["holds"] else f"  FAILS: more than {LARGEST_LOSS[row['factor']]:g} below factor 1"
        lines.append(
            f"{row['set'][:18]:18} {row['factor']:>6g} {row['photos']:>6} {row[figure]:>7.3f}  {low:.3f} - {high:.3f}  "
            f"{'' if row['same'] is None else format(row['same'], '.3f'):5}{fails}".rstrip()
        )
    failing = [f"{row['set']} at {row['factor']:g}" for row in result["rows"] if not row["holds"]]
    return [*lines, f"Scale is held: {'no: ' + ', '.join(failing) if failing else 'yes'}"]
