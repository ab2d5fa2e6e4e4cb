"""Hard negatives: places without the defect where a network trained so far sees it (beyond the paper).

Nearly all of a photo without the defect is easy: crops drawn evenly from it teach nothing about the few edges,
joints and shadows that become false proposals. What an annotator rejects is such a place; before anybody has
rejected anything, the photos known to be without the defect show them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

from defectcam.cam import score_sums, window_logits
from defectcam.network import DefectNet
from defectcam.tiling import stitched_score_map
from defectcam.training.clicks import Click

LOOKED_AT_PX = 30_000_000  # of all photos together, in a random order: some minutes on a processor
SPACING_PX = 8  # between the windows looked at
PER_PHOTO = 20  # clicks at most; a photo with more is no better teacher


def mistaken_pixels(network: DefectNet, photos_rgb: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Where a network read per pixel says "defect" on photos without it.

    Args:
        photos_rgb: (H, W, 3) uint8 each, at working scale.

    Returns:
        For every photo the flat indices of such pixels, int32; none for photos beyond LOOKED_AT_PX.
    """
    found = [np.empty(0, np.int32) for _ in photos_rgb]
    for index in _some(photos_rgb, seed):
        score_map = stitched_score_map(network, photos_rgb[index])
        found[index] = np.flatnonzero(score_map > -network.head.bias.item()).astype(np.int32)
    return found


def mistaken_clicks(
    network: DefectNet, clicks: Sequence[Click], photos_rgb: Sequence[np.ndarray], window_px: int, working_scale: float, seed: int
) -> list[Click]:
    """None-clicks where the classifier says "defect" on photos without it: what rejected proposals would leave.

    Args:
        clicks: a none-click on each of the photos.
        photos_rgb: (H, W, 3) uint8 each, at working scale.
        window_px: side of the windows, at working scale.

    Returns:
        Clicks at the windows whose logit is above 0, of each photo the surest first, no two within half a window.
    """
    bias, found = network.head.bias.item(), []
    for index in _some(photos_rgb, seed):
        score_map = stitched_score_map(network, photos_rgb[index])
        ys, xs = (np.arange(SPACING_PX // 2, size, SPACING_PX) for size in score_map.shape)
        logits = window_logits(score_sums(score_map), bias, ys[:, None], xs[None], window_px)
        for _ in range(PER_PHOTO):
            row, column = np.unravel_index(np.argmax(logits), logits.shape)
            if logits[row, column] <= 0:
                break
            near = np.maximum(abs(ys[:, None] - ys[row]), abs(xs[None] - xs[column])) < window_px / 2
            logits[near] = -np.inf
            known = clicks[index]
            x, y = (int(value / working_scale) for value in (xs[column], ys[row]))
            found.append(Click(known.image, x, y, "none", known.absent, known.photo_group))
    return found


def _some(photos_rgb: Sequence[np.ndarray], seed: int) -> Iterable[int]:
    """Indices of photos in random order, up to LOOKED_AT_PX."""
    order = np.random.default_rng(seed).permutation(len(photos_rgb))
    pixels = np.cumsum([photos_rgb[index].shape[0] * photos_rgb[index].shape[1] for index in order])
    most = max(LOOKED_AT_PX, *pixels[:1].tolist())  # the first always, however large
    return tqdm(order[pixels <= most].tolist(), desc="mistakes", unit="photo")
