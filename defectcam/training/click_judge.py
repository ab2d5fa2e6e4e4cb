"""Clicks that judge a network, where there are no val masks: how calibration reads them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.evaluation.kept import KeptPhoto
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.training.clicks import patch_xyxy
from defectcam.training.config import TrainConfig
from defectcam.training.sources import check_kinds, gather

CLICK_REACH_PX = 2  # around a positive click that is the defect: hands are not steadier


def click_config(args: argparse.Namespace, record: dict) -> TrainConfig:
    """Where the clicks of a calibration come from; patches of simulated ones are as large as the training's crops.

    Args:
        record: of the training.
    """
    return TrainConfig(
        args.defect, args.data, sets=tuple(args.sets), none_sets=tuple(args.healthy_sets), labels="clicks",
        clicks=args.val_clicks, val_clicks=args.val_clicks, label_names=getattr(args, "label_names", None) or {},
        crop_px=record["crop_px"], scales=tuple(record.get("scales", (1.0, 1.0))),
    )  # fmt: skip


def clicked_photos(config: TrainConfig, limit: int | None) -> Iterator[LabelledPhoto]:
    """Photos of val with clicks on them, `limit` of each set at most.

    Raises:
        ValueError, FileNotFoundError: naming what does not give what is needed, with the remedy.
    """
    sources = gather(config, "val")
    check_kinds(config, sources, "val")
    taken: dict[str, int] = {}
    for source in tqdm(sources, desc=f"{config.defect}: clicks", unit="photo"):
        # A photo of a set lies in SET/images, one of a person's own clicks anywhere.
        set_name = source.path.parent.parent.name if config.data and config.data in source.path.parents else ""
        taken[set_name] = taken.get(set_name, 0) + 1
        if limit is not None and taken[set_name] > limit:
            continue
        photo = source.read()
        height, width = photo.image_rgb.shape[:2]
        truth = np.zeros((height, width), np.uint8)
        for click in photo.positive:
            cv2.circle(truth, (click.x, click.y), CLICK_REACH_PX, 1, -1)
        patches = tuple(patch_xyxy(click, config.crop_px, height, width) for click in photo.negative)
        stem = source.path.stem if set_name else str(source.path)
        yield LabelledPhoto(set_name, stem, photo.image_rgb, truth > 0 if photo.positive else None, patches)


def overlap_of_clicks(photos: Sequence[KeptPhoto], masks: Iterable[np.ndarray]) -> float:
    """The harmonic mean of the share of positive clicks with a region and of patches without one, 0..1.

    Args:
        masks: (H, W) bool each, in the order of the photos.
    """
    hit, free = [], []
    for photo, mask in zip(photos, masks, strict=True):
        if photo.truth is not None:
            count, labels = cv2.connectedComponents(photo.truth.astype(np.uint8))
            met = set(np.unique(labels[mask]).tolist())
            hit += [label in met for label in range(1, count)]
        free += [not mask[y0:y1, x0:x1].any() for x0, y0, x1, y1 in photo.patches_xyxy]
    shares = [float(np.mean(kind)) if kind else 1.0 for kind in (hit, free)]
    return 2 * shares[0] * shares[1] / max(sum(shares), 1e-9)


def negative_area_of(photo: KeptPhoto) -> np.ndarray | None:
    """Where the defect is known not to be, (H, W) bool; None where every pixel is known."""
    if photo.patches_xyxy is None:
        return None
    negative_area = np.zeros(photo.image_rgb.shape[:2], bool)
    for x0, y0, x1, y1 in photo.patches_xyxy:
        negative_area[y0:y1, x0:x1] = True
    return negative_area


def judged_px(photo: KeptPhoto) -> int:
    """How many pixels of a photo without the defect are known."""
    negative_area = negative_area_of(photo)
    return photo.image_rgb[..., 0].size if negative_area is None else max(1, int(negative_area.sum()))
