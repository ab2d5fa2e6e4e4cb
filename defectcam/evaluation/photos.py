"""Photos with their truth, as the data sets' splits name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from defectcam.training.clicks import split_stems
from defectcam.training.finished import Box
from defectcam.training.labels import LabelledSet, photo_size, read_photo_rgb


@dataclass(frozen=True, eq=False)
class LabelledPhoto:
    """A photo and the defect's mask, (H, W) bool; None where the photo is free of the defect.

    Attributes:
        stem: its name in the set; of a finished part of a photo with the box behind it, such as "pier_1 (100,200,900,1000)".
        patches_xyxy: half-open boxes without the defect, px, where clicks are all that is known of the photo; `truth` is
            then true around the positive clicks. None where every pixel is known.
    """

    set_name: str
    stem: str
    image_rgb: np.ndarray
    truth: np.ndarray | None
    patches_xyxy: tuple[Box, ...] | None = None


def labelled_photos(
    data_dir: Path,
    sets: Sequence[str],
    healthy_sets: Sequence[str],
    split: str,
    defect: str,
    limit: int | None = None,
    labels: Mapping[str, str] | None = None,
) -> Iterator[LabelledPhoto]:
    """All photos of `sets`, and those of `healthy_sets` without the defect, `limit` of each set at most.

    Of a healthy set no mask is judged by: there may be none, or only a coarse one. A set that is named in both is judged
    by its masks. Of a photo with finished parts these are the photos, each cut out; `limit` counts it once.

    Args:
        labels: what labels of files are called here, as `LabelledSet` takes them.

    Raises:
        ValueError: labels that cannot be read right, or a photo that cannot be read at all; see `LabelledSet`.
        FileNotFoundError: a photo of the split is missing.
    """
    for set_name in dict.fromkeys([*sets, *healthy_sets]):
        taken, files, stems = 0, LabelledSet(data_dir, set_name, defect, labels), split_stems(data_dir, set_name, split)
        if set_name in sets:
            files.check_masks(stems)
        for stem in tqdm(stems, desc=f"{defect}: {set_name}", unit="photo"):
            if limit is not None and taken >= limit:
                break
            path = files.photo(stem)
            truth = files.read_mask(stem, *photo_size(path))
            usable = []
            for name, where in _parts(stem, files.finished_boxes(stem)):
                own = None if truth is None or not truth[where].any() else truth[where]
                if set_name in sets or own is None:
                    usable.append((name, where, own))
            if not usable:
                continue
            taken += 1
            image_rgb = read_photo_rgb(path)
            for name, where, own in usable:
                yield LabelledPhoto(set_name, name, np.ascontiguousarray(image_rgb[where]), own)


def _parts(stem: str, boxes: Sequence[Box] | None) -> list[tuple[str, tuple[slice, slice]]]:
    """Names of the parts of a photo that are known, and where they lie in it."""
    if boxes is None:
        return [(stem, (slice(None), slice(None)))]
    return [(f"{stem} ({x0},{y0},{x1},{y1})", (slice(y0, y1), slice(x0, x1))) for x0, y0, x1, y1 in boxes]
