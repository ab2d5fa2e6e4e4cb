"""Photos with their truth, as the data sets' splits name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.training.clicks import mask_path, photo_path, split_stems
from defectcam.training.crops import read_photo_rgb


@dataclass(frozen=True, eq=False)
class LabelledPhoto:
    """A photo and the defect's mask, (H, W) bool; None where the photo is free of the defect."""

    set_name: str
    stem: str
    image_rgb: np.ndarray
    truth: np.ndarray | None


def labelled_photos(
    data_dir: Path, sets: Sequence[str], healthy_sets: Sequence[str], split: str, defect: str, limit: int | None = None
) -> Iterator[LabelledPhoto]:
    """All photos of `sets`, and those of `healthy_sets` without the defect, `limit` of each set at most.

    Of a healthy set no mask is judged by: there may be none, or only a coarse one. A set that is named in both is judged
    by its masks.

    Raises:
        ValueError: a mask and its photo differ in size.
        FileNotFoundError: a photo of the split that is missing or no photo.
    """
    for set_name in dict.fromkeys([*sets, *healthy_sets]):
        taken = 0
        for stem in tqdm(split_stems(data_dir, set_name, split), desc=f"{defect}: {set_name}", unit="photo"):
            if limit is not None and taken >= limit:
                break
            path = mask_path(data_dir / set_name, defect, stem)
            truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127 if path.exists() else None
            if truth is not None and not truth.any():
                truth = None
            if set_name not in sets and truth is not None:
                continue
            taken += 1
            photo = read_photo_rgb(str(photo_path(data_dir / set_name, stem)))
            if truth is not None and truth.shape != photo.shape[:2]:
                raise ValueError(f"mask {path} is {truth.shape}, its photo {photo.shape[:2]}: both must be the same")
            yield LabelledPhoto(set_name, stem, photo, truth)
