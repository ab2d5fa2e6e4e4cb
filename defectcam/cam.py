"""The class activation map and the window probability, both from the signed score map (paper 3.1).

With the logit y = b + mean(S), S = sum_k w_k F_k, Grad-CAM of the last features is relu(S) up to a positive
factor: no hooks, no backward pass. And since the mean of S over any window plus b is that window's logit, sums
over S tell the classifier's probability for the window around every pixel.
"""

from __future__ import annotations

import cv2
import numpy as np
from torch import Tensor


def activation(score_map: Tensor) -> Tensor:
    """CAM (Grad-CAM up to a positive factor) of a signed score map: its positive part, any shape."""
    return score_map.relu()


def score_sums(score_map: np.ndarray) -> np.ndarray:
    """Summed-area table of a score map (H, W): (H + 1, W + 1) float64, for `window_logits`."""
    return cv2.integral(score_map, sdepth=cv2.CV_64F)


def window_logits(
    sums: np.ndarray, bias: float, ys: np.ndarray, xs: np.ndarray, window_px: int
) -> np.ndarray:
    """The classifier's logit for the window around each pixel (ys[i], xs[i]).

    At the image's edges the window is moved inside, as the training crops are; an image smaller than the window
    is the window.

    Args:
        sums: from `score_sums`.
        ys, xs: integer arrays that broadcast against each other.

    Returns:
        Float64 array of their broadcast shape.
    """
    y0, y1 = _window_bounds(ys, window_px, sums.shape[0] - 1)
    x0, x1 = _window_bounds(xs, window_px, sums.shape[1] - 1)
    total = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return bias + total / ((y1 - y0) * (x1 - x0))


def probability(logits: np.ndarray) -> np.ndarray:
    """Logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _window_bounds(centers: np.ndarray, window_px: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    length = min(window_px, size)
    starts = np.clip(np.asarray(centers) - length // 2, 0, size - length)
    return starts, starts + length
