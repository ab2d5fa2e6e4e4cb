"""Photos with their truth, as the data sets' splits name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from defectcam.training.clicks import split_stems
from defectcam.training.crops import read_photo_rgb
from defectcam.training.labels import LabelledSet, photo_size


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
        ValueError: a mask that cannot be read right, or a photo that cannot be read at all; see `LabelledSet`.
        FileNotFoundError: a photo of the split is missing.
    """
    for set_name in dict.fromkeys([*sets, *healthy_sets]):
        taken, files, stems = 0, LabelledSet(data_dir, set_name, defect), split_stems(data_dir, set_name, split)
        if set_name in sets:
            files.check_masks(stems)
        for stem in tqdm(stems, desc=f"{defect}: {set_name}", unit="photo"):
            if limit is not None and taken >= limit:
                break
            path = files.photo(stem)
            truth = files.read_mask(stem, *photo_size(path))
            if truth is not None and not truth.any():
                truth = None
            if set_name not in sets and truth is not None:
                continue
            taken += 1
            yield LabelledPhoto(set_name, stem, read_photo_rgb(path), truth)
