"""The confidence of regions, and whether regions of a confidence are right as often as it says."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize

from defectcam.evaluation.measures import reliability
from defectcam.proposals import component_confidence

MOST_FOLDS = 5
PART = re.compile(r" \(\d+,\d+,\d+,\d+\)$")  # the box behind a photo's name, see `labelled_photos`


def fit_logistic(x: np.ndarray, y: np.ndarray, start: Sequence[float]) -> tuple[float, ...]:
    """Weights of a logistic regression of y (n,), 0 or 1, on x (n, k), the intercept last."""
    columns = np.column_stack([x, np.ones(len(x))])

    def loss(weights: np.ndarray) -> float:
        logits = columns @ weights
        return float((np.logaddexp(0, logits) - y * logits).mean() + 1e-4 * (weights**2).sum())

    return tuple(float(f"{weight:.5g}") for weight in minimize(loss, start).x)


def reliability_of(
    defect: str, found: Mapping[tuple[str, str], Sequence[tuple[tuple[float, ...], bool]]], threshold: float
) -> tuple[dict, bytes]:
    """Confidence of all regions of T = 0, from a fit without their photo, against the share that is right.

    Args:
        found: (set, photo) -> features of its regions, and whether they are right. Finished parts of a photo count as one.
        threshold: minimum confidence of a proposal, for the picture; all regions count.

    Returns:
        The record {"folds", "regions", "right", "error": expected calibration error, "bins": see `reliability`}, and the
        picture as PNG. There are no folds and no bins if all regions are on one photo.
    """
    photos: dict[tuple[str, str], list[tuple[tuple[float, ...], bool]]] = {}
    for (set_name, stem), some in found.items():
        if some:
            photos.setdefault((set_name, PART.sub("", stem)), []).extend(some)
    by_photo = sorted(photos.values(), key=lambda some: not any(right for _, right in some))  # both kinds in every fold
    folds = [by_photo[first::MOST_FOLDS] for first in range(min(MOST_FOLDS, len(by_photo)))]
    folds = [[one for some in fold for one in some] for fold in folds] if len(folds) > 1 else []
    judged: list[tuple[float, bool]] = []
    for fold in folds:
        others = [one for other in folds if other is not fold for one in other]
        x, y = np.array([features for features, _ in others]), np.array([right for _, right in others], float)
        weights = fit_logistic(x, y, np.zeros(x.shape[1] + 1))
        judged += [(component_confidence(features, weights), right) for features, right in fold]
    bins, error = reliability(*zip(*judged)) if judged else ([], 0.0)
    record = {
        "folds": len(folds),
        "regions": len(judged),
        "right": sum(right for _, right in judged),
        "error": round(error, 4),
        "bins": [{name: round(value, 4) for name, value in row.items()} for row in bins],
    }
    return record, _picture(defect, record, threshold)


def _picture(defect: str, record: dict, threshold: float) -> bytes:
    """The record as a curve over a histogram, PNG."""
    figure, bins = Figure(figsize=(5, 6), dpi=120, layout="constrained"), record["bins"]
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot((0, 1), (0, 1), "--", color="grey", label="as often as it says")
    curve.plot([row["confidence"] for row in bins], [row["right"] for row in bins], "o-", label="found")
    curve.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of right regions")
    title = f"{defect}: {record['regions']} regions of T = 0, calibration error {record['error']:.3f}"
    curve.set_title(textwrap.fill(title, 60), parse_math=False)  # its own wrapping would read $ as mathematics
    heights = [row["proposals"] for row in bins]
    counts.bar_label(counts.bar([row["from"] for row in bins], heights, 0.1, align="edge", edgecolor="white"))
    counts.set(xlabel="confidence, fitted without the photo", ylabel="regions")
    counts.margins(y=0.25)
    for axes in (curve, counts):
        axes.axvline(threshold, color="red", lw=1, label="minimum confidence")
    curve.legend(loc="upper left")
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
