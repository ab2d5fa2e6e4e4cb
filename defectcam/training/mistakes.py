"""Hard negatives: places without the defect where a network trained so far sees it (beyond the paper).

Nearly all of a photo without the defect is easy: crops drawn evenly from it teach nothing about the few edges,
joints and shadows that become false proposals. What an annotator rejects is such a place; before anybody has
rejected anything, the photos known to be without the defect show them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.network import ScoreNet, fold_batchnorm, fold_upsampling
from defectcam.pyramid import PhotoMaps, Pyramid, Reading
from defectcam.torch_engine import TorchEngine
from defectcam.training.clicks import Click

LOOKED_AT_PX = 30_000_000  # of all photos together, in a random order: some minutes on a processor
SPACING_PX = 8  # between the windows looked at
PER_PHOTO = 20  # clicks at most; a photo with more is no better teacher
ALL_LEVELS = Reading(1.0, 16, 1.0, (None,))
ONE_LEVEL = Reading(1.0, 1, 1.0, (None,))


def mistaken_pixels(network: ScoreNet, photos_rgb: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Where a network read per pixel says "defect" on photos without it.

    Args:
        photos_rgb: (H, W, 3) uint8 each.

    Returns:
        For every photo the flat indices of such pixels, int32; none for photos beyond LOOKED_AT_PX.
    """
    found = [np.empty(0, np.int32) for _ in photos_rgb]
    for index in _some(photos_rgb, seed):
        logits = plain_map(network, photos_rgb[index], ALL_LEVELS)
        found[index] = np.flatnonzero(logits > 0).astype(np.int32)
    return found


def mistaken_clicks(
    network: ScoreNet, clicks: Sequence[Click], photos_rgb: Sequence[np.ndarray], window_px: int, seed: int
) -> list[Click]:
    """None-clicks where the classifier says "defect" on photos without it: what rejected proposals would leave.

    Args:
        clicks: a none-click on each of the photos.
        photos_rgb: (H, W, 3) uint8 each.
        window_px: side of the windows, whose logits are means of the score map.

    Returns:
        Clicks at the windows whose logit is above 0, of each photo the surest first, no two within half a window.
    """
    found = []
    for index in _some(photos_rgb, seed):
        score_map = plain_map(network, photos_rgb[index], ONE_LEVEL)
        ys, xs = (np.arange(SPACING_PX // 2, size, SPACING_PX) for size in score_map.shape)
        logits = cv2.blur(score_map, (window_px, window_px), borderType=cv2.BORDER_REPLICATE)[ys[:, None], xs[None]]
        for _ in range(PER_PHOTO):
            row, column = np.unravel_index(np.argmax(logits), logits.shape)
            if logits[row, column] <= 0:
                break
            near = np.maximum(abs(ys[:, None] - ys[row]), abs(xs[None] - xs[column])) < window_px / 2
            logits[near] = -np.inf
            known = clicks[index]
            found.append(Click(known.image, int(xs[column]), int(ys[row]), "none", known.absent, known.photo_group))
    return found


def plain_map(network: ScoreNet, image_rgb: np.ndarray, reading: Reading) -> np.ndarray:
    """The merged map of T = 0, (H, W) float32; the network is left as it is, free to learn."""
    device = str(network.head.weight.device)
    frozen = fold_upsampling(fold_batchnorm(copy.deepcopy(network).requires_grad_(False).eval()))
    return PhotoMaps(TorchEngine(frozen, device), reading, Pyramid(image_rgb)).merged()


def _some(photos_rgb: Sequence[np.ndarray], seed: int) -> Iterable[int]:
    """Indices of photos in random order, up to LOOKED_AT_PX."""
    order = np.random.default_rng(seed).permutation(len(photos_rgb))
    pixels = np.cumsum([photos_rgb[index].shape[0] * photos_rgb[index].shape[1] for index in order])
    most = max(LOOKED_AT_PX, *pixels[:1].tolist())  # the first always, however large
    return tqdm(order[pixels <= most].tolist(), desc="mistakes", unit="photo")
