"""The figures of a set of photos. Every photo is counted by itself; the figures are ratios of the summed counts.

So of a photo nothing but its counts is kept, and the bootstrap over photos is a product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defectcam.evaluation.measures import (
    bootstrap_sums,
    centreline_counts,
    f1_of_counts,
    false_components,
    interval_95,
    match_instances,
    saved_per_component,
    tolerant_counts,
    touched_components,
    weighed,
)
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.predict import paste
from defectcam.proposals import Component, find_components

# Figure -> the two counts that it is the ratio of.
RATIOS = {
    "iou": ("both_px", "either_px"),
    "iou_photo_mean": ("iou", "photos"),
    "precision": ("both_px", "proposed_px"),
    "recall": ("both_px", "true_px"),
    "f1_2px": ("f1", "photos"),
    "cl_iou": ("centreline_found", "centreline_all"),
    "cl_iou_photo_mean": ("cl_iou", "photos"),
    "found_recall": ("found", "instances"),
    "found_precision": ("right", "proposals"),
    "found_iou": ("found_iou", "found"),
    "pieces": ("pieces", "found"),
    "eq3": ("weighed", "instances"),
    "eq3_found": ("weighed", "touched"),
    "mean_saved": ("saved", "instances"),
    "holes": ("holes", "overlapping"),
    "false_components": ("false_components", "judged"),
    "false_per_mp": ("false_on_healthy", "healthy_megapixels"),
    "specificity": ("without_proposal", "healthy_photos"),
}
HEADLINES = ("iou", "f1_2px", "cl_iou", "found_recall", "found_precision", "eq3", "false_per_mp")  # with intervals
WITHOUT_TRUTH = ("false_components", "false_per_mp", "specificity")  # what a set without the defect has
ZERO_OF_NO_INSTANCES = ("eq3", "eq3_found", "mean_saved")
# Columns of the tables, and what they mean.
COLUMNS = {
    "photos": "photos with the defect",
    "instances": "their ground-truth components of at least 30 px",
    "iou": "intersection over union of the pixels of all photos",
    "precision": "share of the proposed pixels that are within ground truth, over all photos",
    "recall": "share of the pixels of ground truth that are proposed, over all photos",
    "f1_2px": "F1 of pixels with 2 px tolerance, mean over photos with the defect",
    "cl_iou": "cracks: intersection over union of skeletons with 4 px tolerance, over all photos",
    "found_recall": "share of instances that a proposal finds: IoU >= 0.5; cracks: >= 0.7 of the skeleton within 2 px",
    "found_precision": "share of proposals that find an instance or lie to >= 0.7 within ground truth",
    "found_iou": "mean IoU of the found instances",
    "pieces": "proposals per found instance",
    "eq3": "Eq. 3 of the paper: share of a simulated annotator's work saved, a missed instance saves nothing",
    "eq3_found": "Eq. 3 without the instances that no proposal touches, as in the paper",
    "vertex_ratio": "vertices of a proposal divided by those of its ground truth, both simplified to 2 px, median",
    "vertex_ratio_p95": "the same, 95th percentile",
    "holes": "holes of a proposal, mean",
    "healthy_photos": "photos without the defect",
    "false_per_mp": "proposals per megapixel of the photos without the defect",
    "specificity": "share of the photos without the defect that get no proposal",
}


@dataclass(frozen=True)
class PhotoFigures:
    """What a photo adds to the figures of its set: counts to be summed, and its proposals' vertex ratios."""

    counts: dict[str, float]
    vertex_ratios: list[float]

    @property
    def mean_saved(self) -> float:
        """Share of clicks saved on this photo; without the defect 1 where there is no proposal, else 0."""
        if self.counts.get("instances"):
            return self.counts["saved"] / self.counts["instances"]
        return float(not self.counts["proposals"])


def painted(components: Sequence[Component], shape: tuple[int, int]) -> np.ndarray:
    """The pixels of some components, (H, W) bool."""
    mask = np.zeros(shape, bool)
    for component in components:
        paste(mask, component)
    return mask


def photo_figures(
    defect: str, photo: LabelledPhoto, proposals: Sequence[Component], hole_share: float = 0.0
) -> PhotoFigures:
    """One photo's counts.

    Args:
        proposals: regions of the photo that do not touch each other.
        hole_share: see `match_instances`.
    """
    shape = photo.image_rgb.shape[:2]
    mask = painted(proposals, shape)
    truth = np.zeros(shape, bool) if photo.truth is None else photo.truth
    match = match_instances(proposals, truth, defect, hole_share)
    pixels = tolerant_counts(mask, truth)
    both, either = np.count_nonzero(mask & truth), np.count_nonzero(mask | truth)
    counts = {
        "judged": 1,
        "both_px": both,
        "either_px": either,
        "false_components": false_components(mask, truth),
        "proposals": len(proposals),
        "right": match.right.sum(),
        **dict(zip(("right_px", "proposed_px", "met_px", "true_px"), pixels, strict=True)),
    }
    if defect == "crack":
        found, false, missed = centreline_counts(mask, truth)
        counts |= {"centreline_found": found, "centreline_all": found + false + missed}
    if photo.truth is None:
        counts |= {
            "healthy_photos": 1,
            "healthy_megapixels": mask.size / 1e6,
            "false_on_healthy": len(proposals),
            "without_proposal": not proposals,
        }
        return PhotoFigures({name: float(value) for name, value in counts.items()}, [])
    saved = saved_per_component(mask, truth, defect)
    is_found, overlaps = np.isfinite(match.found_iou), np.isfinite(match.vertex_ratio)
    counts |= {
        "photos": 1,
        "iou": both / either if either else 1.0,
        "f1": f1_of_counts(*pixels),
        "instances": len(saved),
        "saved": sum(saved),
        "weighed": sum(weighed(saved)),
        "touched": sum(touched_components(mask, truth)),
        "found": is_found.sum(),
        "found_iou": match.found_iou[is_found].sum(),
        "pieces": match.pieces[is_found].sum(),
        "overlapping": overlaps.sum(),
        "holes": match.holes[overlaps].sum(),
    }
    if defect == "crack":
        length = counts["centreline_all"]
        counts["cl_iou"] = counts["centreline_found"] / length if length else 1.0
    ratios = match.vertex_ratio[overlaps].tolist()
    return PhotoFigures({name: float(value) for name, value in counts.items()}, ratios)


def set_figures(photos: Sequence[PhotoFigures]) -> dict:
    """The figures of a set.

    Pixels, proposals and false components are those of all its photos, the ones without the defect included; photo
    means are over the photos with it.

    Returns:
        RATIOS and COLUMNS by name, f1_2px_all (pixels of all photos), and for HEADLINES `<name>_95`: the 95 % bootstrap
        interval over photos, [low, high]. Of a set without the defect no measure that needs it; figures of nothing are
        left out.
    """
    if not photos:
        return {"photos": 0}
    names = sorted({name for one in photos for name in one.counts})
    table = np.array([[one.counts.get(name, 0.0) for name in names] for one in photos])
    sums, drawn = dict(zip(names, table.sum(axis=0))), dict(zip(names, bootstrap_sums(table).T))
    with_defect = int(sums.get("photos", 0))
    result: dict = {"photos": with_defect}
    for name, (part, whole) in RATIOS.items():
        if part not in sums or not sums[whole] or not (with_defect or name in WITHOUT_TRUTH):
            continue
        result[name] = round(float(sums[part] / sums[whole]), 4)
        if name in HEADLINES:
            with np.errstate(divide="ignore", invalid="ignore"):
                result[f"{name}_95"] = interval_95(drawn[part] / drawn[whole])
    for name in ("instances", "healthy_photos"):
        if sums.get(name):
            result[name] = int(sums[name])
    if with_defect:
        result["f1_2px_all"] = round(
            f1_of_counts(*(sums[name] for name in ("right_px", "proposed_px", "met_px", "true_px"))), 4
        )
        result |= {name: 0.0 for name in ZERO_OF_NO_INSTANCES if name not in result}
        ratios = [ratio for one in photos for ratio in one.vertex_ratios]
        if ratios:
            result["vertex_ratio"] = round(float(np.median(ratios)), 2)
            result["vertex_ratio_p95"] = round(float(np.quantile(ratios, 0.95)), 2)
    return result


def figures(defect: str, judged: Sequence[tuple[LabelledPhoto, np.ndarray]]) -> dict:
    """`set_figures` of photos and their proposed masks, (H, W) bool."""
    return set_figures([photo_figures(defect, photo, find_components(mask)) for photo, mask in judged])
