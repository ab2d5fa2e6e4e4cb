"""Is T a dial? What T changes on val photos with the defect, beside a lower threshold and two controls.

Precision, recall and IoU are of the pixels of all photos, at the shipped thresholds. Beside every T stands the precision
that T = 0 has at the lower theta of equal recall; both extend the same regions and invent none. Controls: with a step of
0, and with the gradient's pixels shuffled, climbing must do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from defectcam.climb import PaperClimb
from defectcam.engine import Engine
from defectcam.evaluation.figures import painted
from defectcam.evaluation.measures import bootstrap_sums, interval_95, iou
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.predict import STEPS, Predictor, extended, proposals_for
from defectcam.proposals import Proposal, logit, probability
from defectcam.pyramid import PhotoMaps, Pyramid
from defectcam.weights import DefectConfig

STILL_STEPS = (1, 2)  # the image does not move at all, so more steps would only repeat the same map
LOWER_LOGITS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)  # of theta, below the shipped one
LEAST_RISE = 0.08  # of recall from T = 0 to 8
LARGEST_LOSS = 0.05  # of precision against the threshold of equal recall
LARGEST_SHUFFLED_SHARE = 0.1  # of the recall that climbing gains
LEAST_DIFFERING_SHARE = 0.9  # of the photos with proposals
SAME_IOU = 0.999  # of two answers that differ by rounding alone


class ShuffledEngine:
    """An engine whose gradients have lost their places: every image's pixels in random order, the same each time."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine, self.random = engine, np.random.default_rng(seed)
        self.name, self.stride_px, self.halo_px = engine.name, engine.stride_px, engine.halo_px

    def score(self, images: np.ndarray) -> np.ndarray:
        """As the engine gives it."""
        return self.engine.score(images)

    def release_memory(self) -> None:
        """As the engine does."""
        self.engine.release_memory()

    def score_and_gradient(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The engine's score, and its gradient (N, 3, H, W) with the pixels of every image shuffled."""
        score, gradient = self.engine.score_and_gradient(images)
        flat = gradient.reshape(*gradient.shape[:2], -1)
        shuffled = [one[:, self.random.permutation(one.shape[1])] for one in flat]
        return score, np.stack(shuffled).reshape(gradient.shape)


def _counts(mask: np.ndarray, truth: np.ndarray) -> list[int]:
    """Pixels of a photo: both, proposed, true."""
    return [np.count_nonzero(mask & truth), np.count_nonzero(mask), np.count_nonzero(truth)]


def _figures(counts: Sequence[list[int]]) -> dict:
    """precision, recall and iou of the pixels of all photos, each with its interval `<name>_95`."""
    table = np.array(counts, float)
    values, draws = _ratios(table.sum(axis=0)), _ratios(bootstrap_sums(table))
    result = {name: round(float(value), 4) for name, value in values.items()}
    return result | {f"{name}_95": interval_95(draws[name]) for name in values}


def _ratios(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Counts (..., 3) -> precision, recall and iou; 0 of nothing."""
    both, proposed, true = np.moveaxis(counts, -1, 0)
    return {
        "precision": both / np.maximum(proposed, 1),
        "recall": both / np.maximum(true, 1),
        "iou": both / np.maximum(proposed + true - both, 1),
    }


def counts_at_lower_theta(
    maps: PhotoMaps, config: DefectConfig, accepted: list[Proposal], truth: np.ndarray
) -> list[list[int]]:
    """What a lower theta does in place of T: of a photo's proposals at T = 0, extended at each theta of LOWER_LOGITS.

    Args:
        accepted: the proposals at T = 0.
        truth: (H, W) bool.

    Returns:
        Per theta the numbers of pixels: both, proposed, true.
    """
    if not accepted:
        return [_counts(np.zeros_like(truth), truth)] * len(LOWER_LOGITS)
    thetas = [float(probability(logit(config.cam_threshold) - lower)) for lower in LOWER_LOGITS]
    return [_counts(_mask(extended(maps, config, 0, accepted, theta), truth.shape), truth) for theta in thetas]


def measure_dial(predictor: Predictor, defect: str, photos: Iterable[LabelledPhoto]) -> dict:
    """The table over T and the conditions under which T is a dial.

    Args:
        photos: val photos; those without the defect are left out.

    Returns:
        defect, photos, rows (per T precision, recall, iou and their intervals, threshold_precision), shuffled_recall,
        conditions ([{"condition", "found", "holds"}]) and is_dial.

    Raises:
        ValueError: no photo has the defect, or the weights climb in the paper's form, which has no such engine calls.
    """
    config, engine = predictor.weights.configs[defect], predictor.engines[defect]
    if any(isinstance(climb, PaperClimb) for climb in config.reading.climbs):
        raise ValueError(f"--dial needs the local form of climbing; the weights of {defect} climb in the paper's form")
    still = replace(config.reading, climbs=tuple(climb and replace(climb, xi=0.0) for climb in config.reading.climbs))
    wanted = sorted({*STEPS, config.iterations})
    by_steps: dict[int, list[list[int]]] = {steps: [] for steps in wanted}
    by_theta: list[list[list[int]]] = []  # of every photo
    shuffled: list[list[int]] = []
    judged = proposed = differing = moved = 0
    for photo in photos:
        if photo.truth is None:
            continue
        judged += 1
        pyramid, shape = Pyramid(photo.image_rgb), photo.truth.shape
        maps = predictor.maps(pyramid, defect)
        found = proposals_for(maps, config, wanted)
        masks = {steps: _mask(found[steps], shape) for steps in wanted}
        for steps in wanted:
            by_steps[steps].append(_counts(masks[steps], photo.truth))
        by_theta.append(counts_at_lower_theta(maps, config, found[0], photo.truth))
        if not found[0]:
            shuffled.append(by_steps[0][-1])
            continue
        proposed += 1
        differing += bool((masks[0] != masks[max(STEPS)]).any())
        of_shuffled = PhotoMaps(ShuffledEngine(engine), config.reading, pyramid, predictor.batch)
        last = proposals_for(of_shuffled, config, [max(STEPS)])[max(STEPS)]
        shuffled.append(_counts(_mask(last, shape), photo.truth))
        of_still = proposals_for(PhotoMaps(engine, still, pyramid, predictor.batch), config, STILL_STEPS)
        moved += any(iou(_mask(of_still[steps], shape), masks[0]) < SAME_IOU for steps in STILL_STEPS)
    if not judged:
        raise ValueError(f"no val photo with {defect} in these sets: name others with --sets")
    rows = [{"T": steps, **_figures(by_steps[steps])} for steps in wanted]
    lower = [_figures(counts) for counts in zip(*by_theta)]
    for row in rows:
        row["threshold_precision"] = _precision_at(row["recall"], lower)
    shuffled_recall = _figures(shuffled)["recall"]
    conditions = _conditions(rows, config.iterations, shuffled_recall, moved, proposed, differing)
    return {
        "defect": defect,
        "photos": judged,
        "rows": rows,
        "shuffled_recall": shuffled_recall,
        "conditions": conditions,
        "is_dial": all(one["holds"] for one in conditions),
    }


def _mask(proposals: list[Proposal], shape: tuple[int, int]) -> np.ndarray:
    return painted([one.component for one in proposals], shape)


def _precision_at(recall: float, lower: list[dict]) -> float:
    """Precision of the highest threshold that has a recall, interpolated; `lower` are figures from high to low thresholds."""
    reached = np.maximum.accumulate([one["recall"] for one in lower])
    index = min(int(np.searchsorted(reached, recall)), len(lower) - 1)
    first = max(index - 1, 0)
    return round(float(np.interp(recall, reached[[first, index]], [lower[first]["precision"], lower[index]["precision"]])), 4)


def _conditions(
    rows: list[dict], default: int, shuffled_recall: float, moved: int, proposed: int, differing: int
) -> list[dict]:
    """The conditions of a dial, what was found, and whether each holds."""
    by_steps = {row["T"]: row for row in rows}
    recalls, last = [row["recall"] for row in rows], max(STEPS)
    rise = by_steps[last]["recall"] - by_steps[0]["recall"]
    shuffled_rise = shuffled_recall - by_steps[0]["recall"]
    loss = max(row["threshold_precision"] - row["precision"] for row in rows)
    best = max(rows, key=lambda row: (row["iou"], row["T"] == default))["T"]
    share = differing / max(proposed, 1)
    return [
        {"condition": condition, "found": found, "holds": bool(holds)}
        for condition, found, holds in (
            ("with a step of 0 every T gives the answer of T = 0", f"{moved} of {proposed} photos differ", not moved),
            (
                f"with the gradient shuffled recall rises by less than {LARGEST_SHUFFLED_SHARE:g} of what climbing gives",
                f"{shuffled_rise:+.3f} against {rise:+.3f}",
                shuffled_rise < LARGEST_SHUFFLED_SHARE * rise,
            ),
            (
                f"precision is at most {LARGEST_LOSS:g} below that of a threshold of equal recall",
                f"{loss:.3f} below at worst",
                loss <= LARGEST_LOSS,
            ),
            (f"recall rises by {LEAST_RISE:g} or more from T = 0 to {last}", f"{rise:+.3f}", rise >= LEAST_RISE),
            (
                "recall never falls",
                ", ".join(f"{recall:.3f}" for recall in recalls),
                all(more >= less for less, more in zip(recalls, recalls[1:])),
            ),
            (f"IoU is best at the default T = {default}", f"best at T = {best}", best == default),
            (
                f"the answers of T = 0 and {last} differ on {LEAST_DIFFERING_SHARE:.0%} of the photos with proposals",
                f"{share:.0%} of {proposed}",
                share >= LEAST_DIFFERING_SHARE,
            ),
        )
    ]


def dial_lines(result: dict) -> list[str]:
    """The result as text."""
    lines = [
        f"{result['defect']}: {result['photos']} val photos",
        f"{'T':>3} {'precision':>9} {'recall':>7} {'IoU':>6}  95 % of IoU    precision of a threshold of equal recall",
    ]
    for row in result["rows"]:
        low, high = row["iou_95"]
        lines.append(
            f"{row['T']:>3} {row['precision']:>9.3f} {row['recall']:>7.3f} {row['iou']:>6.3f}  {low:.3f} - {high:.3f}"
            f"  {row['threshold_precision']:>6.3f}"
        )
    lines += [
        f"  {'holds' if one['holds'] else 'FAILS'}: {one['condition']} ({one['found']})" for one in result["conditions"]
    ]
    failing = [one["condition"] for one in result["conditions"] if not one["holds"]]
    return [*lines, f"T is a dial: {'no, since these fail: ' + '; '.join(failing) if failing else 'yes'}"]
