"""Photos with their truth and everything the networks say of them, computed once and judged many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.climb import ClimbParameters
from defectcam.evaluation.measures import (
    f1_2px,
    f1_2px_of_all,
    false_components,
    found_components,
    iou,
    relative_time_saving,
    saved_per_component,
)
from defectcam.network import DefectNet
from defectcam.tiling import at_photo_scale, at_working_scale, climbed_maps, stitched_score_map
from defectcam.training.clicks import mask_path, photo_path, split_stems
from defectcam.training.crops import read_photo_rgb


@dataclass(frozen=True, eq=False)
class LabelledPhoto:
    """A photo and the defect's mask, (H, W) bool; None where the photo is free of the defect."""

    set_name: str
    stem: str
    image_rgb: np.ndarray
    truth: np.ndarray | None


@dataclass(frozen=True, eq=False)
class SurveyedPhoto:
    """A labelled photo with what the networks say of it, at working scale.

    Attributes:
        labelled: the photo and its truth.
        working_image: (h, w, 3) uint8.
        score: signed score map, (h, w) float32.
        maps: climbed, normalised maps per T, (h, w) float32.
        outline: the outline network; None where there is none.
    """

    labelled: LabelledPhoto
    working_image: np.ndarray
    score: np.ndarray
    maps: dict[int | str, np.ndarray]
    outline: DefectNet | None

    def outline_logits(self, wanted: np.ndarray) -> np.ndarray:
        """The outline network's logits, (h, w) float32, at least where `wanted` (h, w) bool says so."""
        if self.labelled.truth is not None:
            return self._all_outline_logits
        # Large photos without the defect need little of it.
        logits = self._some_outline_logits
        missing = wanted & np.isneginf(logits)
        if missing.any():
            more = stitched_score_map(self.outline, self.working_image, region=missing) + self.outline.head.bias.item()
            np.maximum(logits, more, out=logits)
        return logits

    @cached_property
    def _some_outline_logits(self) -> np.ndarray:
        return np.full(self.score.shape, -np.inf, np.float32)

    @cached_property
    def _all_outline_logits(self) -> np.ndarray:
        return stitched_score_map(self.outline, self.working_image) + self.outline.head.bias.item()

    def at_photo_scale(self, mask: np.ndarray) -> np.ndarray:
        """A mask of the working scale at the photo's."""
        return at_photo_scale(mask, *self.labelled.image_rgb.shape[:2])


def labelled_photos(
    data_dir: Path, sets: Sequence[str], healthy_sets: Sequence[str], split: str, defect: str, limit: int | None = None
) -> Iterator[LabelledPhoto]:
    """All photos of `sets`, and those of `healthy_sets` without the defect, `limit` of each set at most.

    Of a healthy set no mask is judged by: there may be none, or only a coarse one.

    Raises:
        ValueError: a mask and its photo differ in size.
        FileNotFoundError: a photo of the split that is missing or no photo.
    """
    for set_name in [*sets, *healthy_sets]:
        taken = 0
        for stem in tqdm(split_stems(data_dir, set_name, split), desc=f"{defect}: {set_name}", unit="photo"):
            if limit is not None and taken >= limit:
                break
            path = mask_path(data_dir / set_name, defect, stem)
            truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127 if path.exists() else None
            if truth is not None and not truth.any():
                truth = None
            if set_name in healthy_sets and truth is not None:
                continue
            taken += 1
            photo = read_photo_rgb(str(photo_path(data_dir / set_name, stem)))
            if truth is not None and truth.shape != photo.shape[:2]:
                raise ValueError(f"mask {path} is {truth.shape}, its photo {photo.shape[:2]}: both must be the same")
            yield LabelledPhoto(set_name, stem, photo, truth)


def survey(
    photo: LabelledPhoto,
    network: DefectNet,
    outline: DefectNet | None,
    working_scale: float,
    steps: Sequence[int | str],
    parameters: ClimbParameters,
    cam_max: Sequence[float],
    cam_threshold: float,
    window_px: int,
    gate: float,
) -> SurveyedPhoto:
    """Everything the networks say of one photo; for the arguments see `climbed_maps`."""
    image = at_working_scale(photo.image_rgb, working_scale)
    score = stitched_score_map(network, image)
    maps = climbed_maps(network, image, score, steps, parameters, cam_max, cam_threshold, window_px, gate)
    return SurveyedPhoto(photo, image, score, maps, outline)


def figures(defect: str, judged: Sequence[tuple[LabelledPhoto, np.ndarray]]) -> dict[str, float]:
    """All measures of a set of photos and their proposed masks (H, W) bool, at photo scale.

    Returns:
        photos, iou (all pixels), iou_photo_mean, f1_2px (photo mean), f1_2px_all (all pixels), false_components (per
        photo), eq3 and mean_saved over the instances, eq3_found without those that got no proposal; of the photos without the
        defect: healthy_photos, quiet_share. Figures of nothing are left out.
    """
    with_defect = [(photo.truth, mask) for photo, mask in judged if photo.truth is not None]
    healthy = [mask for photo, mask in judged if photo.truth is None]
    result: dict[str, float] = {"photos": len(with_defect)}
    wrong = sum(false_components(mask, truth) for truth, mask in with_defect)
    wrong += sum(cv2.connectedComponents(mask.astype(np.uint8))[0] - 1 for mask in healthy)
    if judged:
        result["false_components"] = wrong / len(judged)
    if with_defect:
        both = sum(np.count_nonzero(truth & mask) for truth, mask in with_defect)
        either = sum(np.count_nonzero(truth | mask) for truth, mask in with_defect)
        saved = [share for truth, mask in with_defect for share in saved_per_component(mask, truth, defect)]
        has_proposal = [one for truth, mask in with_defect for one in found_components(mask, truth)]
        found = [share for share, one in zip(saved, has_proposal, strict=True) if one]
        result |= {
            "iou": both / max(either, 1),
            "iou_photo_mean": float(np.mean([iou(mask, truth) for truth, mask in with_defect])),
            "f1_2px": float(np.mean([f1_2px(mask, truth) for truth, mask in with_defect])),
            "f1_2px_all": f1_2px_of_all([mask for _, mask in with_defect], [truth for truth, _ in with_defect]),
            "instances": len(saved),
            "eq3": relative_time_saving(saved),
            "mean_saved": float(np.mean(saved)) if saved else 0.0,
            "eq3_found": relative_time_saving(found),
        }
    if healthy:
        result |= {
            "healthy_photos": len(healthy),
            "quiet_share": float(np.mean([not mask.any() for mask in healthy])),
        }
    return {name: value if isinstance(value, int) else round(value, 4) for name, value in result.items()}
