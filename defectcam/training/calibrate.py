"""From a trained network to weights that can be deployed: everything the manifest needs, chosen on val.

1. Reading: the finest level and the sharpness of merging whose plain maps overlap best, each at its best threshold; a
   finer level must be better by FINER_GAIN, since it costs four times as much, the enlarged one by ENLARGED_GAIN.
2. Climb. `g_ref` is the 99.9 % quantile of the gradient's magnitude at the finest level of photos with the defect. Two choices
   are tried: which levels climb (the finest alone or every one; of lines the finest alone), and xi, one of STEP_LENGTHS.
   Each is judged at the threshold that is best for its T = 2, against the best overlap of T = 0. Chosen is what comes
   nearest to these conditions: T = 2 gains, or costs at most COST_OF_DEFAULT_T; T = 8 costs at most COST_OF_LARGE_T; the
   recall of pixels rises by LEAST_RISE, of lines by LEAST_RISE_OF_LINES. Every level may climb only where the network
   has learnt what coarse levels show. Any other network adds whole blocks of the photo there.
3. Cleaning: closing, gap and minimum area with the best overlap at the default T, and then the threshold that does; by how
   much T = 0 overlaps better at a threshold counts against it.
4. Platt: the probability of a pixel, by logistic regression of the truth on the merged map; theta is the threshold
   as a probability.
5. Confidence: logistic regression on the regions of T = 0, right or wrong. Right ones lie for the most part within
   2 px of the truth.
6. Minimum confidence: the lowest that leaves at most FALSE_PER_MP false proposals per megapixel (or a single one) on all
   photos without the defect together and on every set with LEAST_PHOTOS of them, and FALSE_PER_PHOTO a photo on those
   with it.

"Fit" is, of each set, the IoU of all pixels, for cracks the mean of it, of F1 with 2 px tolerance (mean over photos)
and of the share of clicks saved (mean over cracks): an outline slightly wide of a crack saves more than one with gaps.
Of several sets it is the mean.

With `--labels clicks`, or `--val-clicks` and no sets, no mask is needed. "Fit" is then the harmonic mean of two shares: of the
positive clicks that lie within CLICK_REACH_PX of a region, and of the patches of negative clicks that hold no pixel of one.
A region is right if a positive click lies on it, wrong if most of it lies in such patches, and otherwise does not count. Clicks
do not tell how wide a defect is, so outlines fit less well than after a calibration from masks.

Beside the weights `<defect>-reliability.png` shows whether regions of a confidence are right as often as it says; the
confidences come from weights that were fitted without their photo, in turn. Photos and maps lie in a file without a name
on the disk of `--out`, so memory does not grow with the number of photos.

Example:
    defectcam calibrate --defect crack --network out/train/crack --data ../shared/data --sets deepcrack,uav75 \\
        --healthy-sets steelbridge440 --out out/weights
    defectcam calibrate --defect spalling --network out/train/spalling --val-clicks val.csv --out out/weights
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.cvat_labels import check_label_name
from defectcam.encoders import normalised
from defectcam.evaluation.kept import ArrayFile, KeptLevels, KeptPhoto
from defectcam.evaluation.measures import f1_2px, saved_per_component
from defectcam.evaluation.photos import labelled_photos
from defectcam.licences import licences_of, read_licences
from defectcam.network import fold_batchnorm, fold_upsampling
from defectcam.openvino_engine import OpenVinoEngine
from defectcam.paths import file_name
from defectcam.postprocess import Cleaning, regions
from defectcam.predict import STEPS
from defectcam.proposals import component_confidence, component_features, find_components, probability
from defectcam.pyramid import ENLARGED, PhotoMaps, PlainMaps, Pyramid, Reading
from defectcam.torch_engine import TorchEngine
from defectcam.training.confidence import fit_logistic, reliability_of
from defectcam.training.click_judge import click_config, clicked_photos, judged_px, negative_area_of, overlap_of_clicks
from defectcam.training.config import LABELS, names
from defectcam.training.export import ENCODERS_WITH_GRAPH, graph_of
from defectcam.training.labels import add_label_option
from defectcam.training.start import trained_network
from defectcam.weights import climbs_of, read_manifest, write_defect, write_whole

PLAIN = Reading(1.0, 16, 1.0, (None,))
FINEST = {"crack": (1.0, ENLARGED)}
OTHER_FINEST = (1.0, 0.5)
SHARPNESSES = (0.5, 3.0)
THRESHOLDS = tuple(range(-4, 5))  # of the merged map; then twice half as far around the best
FIRST_CLEANING = {"crack": Cleaning(1, 10, 24)}
OTHER_FIRST_CLEANING = Cleaning(1, 0, 30)
CLEANINGS = {"crack": [Cleaning(*how) for how in product((0, 1, 2), (6, 10), (24, 48))]}  # 14 px join cracks that are apart
OTHER_CLEANINGS = [Cleaning(closing, 0, area) for closing, area in product((0, 1, 3), (30, 100, 300))]
FINER_GAIN = 0.03  # of overlap, which a level twice as fine must bring: it takes four times as long
ENLARGED_GAIN = 0.01  # which the enlarged level must bring: it is read only near what the others see
STEP_LENGTHS = (0.0025, 0.005, 0.01, 0.02, 0.04)  # xi
HIGHER_THRESHOLDS = tuple(0.5 * index for index in range(9))  # above the best one of T = 0: climbing extends
G_REF_QUANTILE = 0.999
COST_OF_DEFAULT_T, COST_OF_LARGE_T = 0.005, 0.04  # of the overlap of T = 0 that T = 2 and T = 8 may lose
DEFAULT_T_COUNTS = 4  # the weight of what T = 2 loses beyond that: T = 2 is the default
LEAST_RISE = 0.03  # of the recall of pixels from T = 0 to 8; of proposals that extend it is about twice as much
LEAST_RISE_OF_LINES = 0.04  # they grow thin, which costs little
CLIMB_MP, CLIMB_PHOTOS = 1.5, 4  # of each set and of the level, four photos at least: eight steps take as long as thirty plain maps
DEFAULT_T_PHOTOS = 40  # for cleaning and threshold
PIXELS_PER_PHOTO = 4000  # for Platt
FALSE_PER_MP = 0.5
LEAST_PHOTOS = 20  # of fewer, one odd photo decides
FALSE_PER_PHOTO = 1.5


class Calibration:
    """One defect's network and val photos with their plain maps; photos and maps lie in a file, not in memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.defect = args, args.defect
        labels = getattr(args, "label_names", None)  # retraining has no such option: its labels are the defects
        file, record = ArrayFile(args.out), args.network / "record.json"
        if getattr(args, "labels", "outlines") == "clicks":
            found = clicked_photos(click_config(args, json.loads(record.read_text())), args.photos)
        else:
            found = labelled_photos(args.data, args.sets, args.healthy_sets, "val", self.defect, args.photos, labels)
        self.plain = {KeptPhoto(photo, file): PlainMaps(KeptLevels(file)) for photo in found}
        self.healthy = [photo for photo in self.plain if photo.truth is None]
        self.labelled = [photo for photo in self.plain if photo.truth is not None]
        self.judging = self.labelled
        if any(photo.patches_xyxy is not None for photo in self.plain):  # each may have patches without the defect
            self.healthy = self.judging = list(self.plain)
        if not self.healthy or not self.labelled:
            sys.exit(
                f"calibration needs val photos with {self.defect} and without it; there are {len(self.labelled)} and "
                f"{len(self.healthy)}: name other --sets or --healthy-sets"
            )
        network = trained_network(args.network)
        self.record = json.loads(record.read_text())
        self.tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
        self.graph = graph_of(network) if network.encoder_name in ENCODERS_WITH_GRAPH else None
        if self.graph and not torch.cuda.is_available():
            self.engine = OpenVinoEngine(self.graph, network.stride_px, network.halo_px)
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.engine = TorchEngine(fold_upsampling(fold_batchnorm(network)), device)
        for photo in tqdm(self.plain, desc="plain maps", unit="photo"):
            self.maps(photo, PLAIN)

    def maps(self, photo: KeptPhoto, reading: Reading) -> PhotoMaps:
        """The maps of a photo; no level is read twice."""
        return PhotoMaps(self.engine, reading, Pyramid(photo.image_rgb), plain=self.plain[photo])

    def overlap(self, photos: Sequence[KeptPhoto], masks: Iterable[np.ndarray]) -> float:
        """How well masks (H, W) bool agree with the labels of photos of `judging`, 0..1; see above."""
        if self.judging is not self.labelled:
            return overlap_of_clicks(photos, masks)
        by_set: dict[str, list[tuple]] = {}
        for photo, mask in zip(photos, masks, strict=True):
            truth, more = photo.truth, ()
            if self.defect == "crack":
                more = f1_2px(mask, truth), saved_per_component(mask, truth, self.defect)
            pixels = np.count_nonzero(mask & truth), np.count_nonzero(mask | truth)
            by_set.setdefault(photo.set_name, []).append((*pixels, *more))
        found = []
        for of_photos in by_set.values():
            both, either, *more = zip(*of_photos)
            value = sum(both) / max(sum(either), 1)
            if self.defect == "crack":
                f1, saved = more
                value = float(np.mean([value, np.mean(f1), np.mean(sum(saved, []) or [0.0])]))
            found.append(value)
        return float(np.mean(found))

    def best_threshold(
        self,
        photos: Sequence[KeptPhoto],
        logits: Sequence[np.ndarray],
        cleaning: Cleaning,
        plain: Sequence[np.ndarray] | None = None,
    ) -> tuple[float, float]:
        """The largest overlap, and the threshold where it is; of equal ones that nearest to 0, where the network says one half.

        Args:
            plain: the maps of T = 0. By how much they overlap better at a threshold counts against it: the default T shall
                be the best.
        """

        def at(least: float) -> tuple[float, float, float, float]:
            overlap = self.overlap(photos, (regions(one, least, cleaning) for one in logits))
            if plain is None:
                return overlap, -abs(least), overlap, least
            lead = self.overlap(photos, (regions(one, least, cleaning) for one in plain)) - overlap
            return overlap - max(0.0, lead), -abs(least), overlap, least

        found = max(map(at, THRESHOLDS))
        for step in (0.5, 0.25):
            found = max(found, at(found[3] - step), at(found[3] + step))
        return found[2:]

    def choose_reading(self) -> tuple[Reading, float, dict]:
        """The reading with the best overlap, its threshold, and the overlap of all."""
        cleaning = FIRST_CLEANING.get(self.defect, OTHER_FIRST_CLEANING)
        best, report = (-np.inf, 0.0, None), {}
        for finest, sharpness in product(FINEST.get(self.defect, OTHER_FINEST), SHARPNESSES):
            reading = Reading(finest, 16, sharpness, (None,))
            logits = self.climbed(self.judging, reading, 0)
            overlap, least = self.best_threshold(self.judging, logits, cleaning)
            report[f"finest {finest:g}, sharpness {sharpness:g}"] = {"overlap": round(overlap, 4), "threshold": least}
            say(f"reading from level {finest:g}, sharpness {sharpness:g}: overlap {overlap:.3f} at {least:g}")
            worth = overlap - FINER_GAIN * np.log2(min(finest, 1.0)) - ENLARGED_GAIN * reading.of_lines
            best = max(best, (worth, least, reading), key=lambda one: one[0])
        return best[2], best[1], report

    def gradient_reference(self, reading: Reading) -> float:
        """`g_ref` of the finest level."""
        magnitudes = []
        for photo in tqdm(few(self.labelled, reading), desc="gradients", unit="photo"):
            maps = self.maps(photo, reading)
            level = maps.pyramid.level(maps.scales[0])
            for tile in maps.tiles[level.scale]:
                images = normalised(level.pixels(tile.outer).transpose(2, 0, 1)[None])
                _, gradient = self.engine.score_and_gradient(images)
                magnitudes.append(np.abs(tile.core_of(gradient)).ravel()[::7])
        return float(f"{max(np.quantile(np.concatenate(magnitudes), G_REF_QUANTILE), 1e-9):.4g}")

    def choose_climb(self, reading: Reading, least: float) -> tuple[dict, dict]:
        """The manifest's `climb`, and what every one that was tried gives; `least` is the threshold that is best for T = 0."""
        g_ref = self.gradient_reference(reading)
        photos, report, found = few(self.judging, reading), {}, []
        cleaning = replace(FIRST_CLEANING.get(self.defect, OTHER_FIRST_CLEANING), gap_px=0)
        levels = {"finest level": [g_ref, None]} if reading.of_lines else {"finest level": [g_ref, None], "every level": [g_ref]}
        for (which, references), xi in product(levels.items(), STEP_LENGTHS):
            climb, name = {"form": "local", "xi": xi, "g_ref": references}, f"{which}, xi {xi:g}"
            climbing = replace(reading, climbs=climbs_of(climb))
            logits = {steps: ArrayFile(self.args.out) for steps in STEPS}
            for photo in tqdm(photos, desc=f"climb, {name}", unit="photo"):
                maps = self.maps(photo, climbing)
                maps.climb(STEPS[1:], np.ones((1, 1), bool), max(maps.height, maps.width))
                for steps in STEPS:
                    logits[steps].append(maps.merged(steps))

            def overlap(steps: int, threshold: float) -> float:
                return self.overlap(photos, (regions(one, threshold, cleaning) for one in logits[steps]))

            plain = overlap(0, least)
            best, higher = max((overlap(2, least + higher), -higher) for higher in HIGHER_THRESHOLDS)
            threshold = least - higher
            overlaps = {steps: overlap(steps, threshold) for steps in STEPS}
            recalls = {steps: recall(photos, (one > threshold for one in logits[steps])) for steps in STEPS}
            report[name] = {
                "threshold": threshold,
                "plain": round(plain, 4),
                "overlap": {str(steps): round(value, 4) for steps, value in overlaps.items()},
                "recall": {str(steps): round(value, 4) for steps, value in recalls.items()},
            }
            say(f"climb, {name}: {report[name]}")
            gain = best - plain
            cost = DEFAULT_T_COUNTS * max(0.0, -gain - COST_OF_DEFAULT_T) - max(0.0, gain)
            cost += max(0.0, plain - overlaps[8] - COST_OF_LARGE_T)
            least_rise = LEAST_RISE_OF_LINES if reading.of_lines else LEAST_RISE
            lacking = max(0.0, least_rise - (recalls[8] - recalls[0]))
            found.append((cost + lacking, climb))
        return min(found, key=lambda one: one[0])[1], report

    def climbed(self, photos: Sequence[KeptPhoto], reading: Reading, steps: int) -> ArrayFile:
        """The merged maps M_T of some photos, climbed everywhere."""
        found = ArrayFile(self.args.out)
        for photo in tqdm(photos, desc=f"maps at T = {steps}", unit="photo", leave=False):
            maps = self.maps(photo, reading)
            if steps:
                maps.climb([steps], np.ones((1, 1), bool), max(maps.height, maps.width))
            found.append(maps.merged(steps))
        return found

    def choose_cleaning(
        self, photos: Sequence[KeptPhoto], logits: Sequence[np.ndarray], least: float
    ) -> tuple[Cleaning, dict]:
        """The cleaning of the photos' maps with the best overlap at a threshold, and the overlap of all."""
        report = {}
        for cleaning in tqdm(CLEANINGS.get(self.defect, OTHER_CLEANINGS), desc="cleaning", leave=False):
            report[cleaning] = self.overlap(photos, (regions(one, least, cleaning) for one in logits))
        best = max(report, key=report.get)
        return best, {
            f"closing {one.closing_radius_px}, gap {one.gap_px}, area {one.min_area_px}": round(overlap, 4)
            for one, overlap in report.items()
        }


def recall(photos: Sequence[KeptPhoto], masks: Iterable[np.ndarray]) -> float:
    """Share of the truth's pixels that are found, over all photos."""
    found = pixels = 0
    for photo, mask in zip(photos, masks, strict=True):
        if photo.truth is not None:
            found, pixels = found + np.count_nonzero(mask & photo.truth), pixels + np.count_nonzero(photo.truth)
    return float(found / max(pixels, 1))


def spread(items: Sequence, count: int) -> list:
    """`count` of the items at even distances, all of them if there are fewer."""
    return [items[index] for index in np.unique(np.linspace(0, len(items) - 1, count).astype(int))] if items else []


def few(photos: Sequence[KeptPhoto], reading: Reading) -> list[KeptPhoto]:
    """Photos of every set at even distances: CLIMB_MP of the finest level that climbs, but CLIMB_PHOTOS photos at least."""
    found = []
    for set_name in dict.fromkeys(photo.set_name for photo in photos):
        of_set = [photo for photo in photos if photo.set_name == set_name]
        pixels = np.mean([photo.image_rgb.size / 3 for photo in of_set]) * min(reading.finest, 1.0) ** 2
        found += spread(of_set, max(CLIMB_PHOTOS, int(CLIMB_MP * 1e6 / pixels)))
    return found


def random_pixels(
    logits: np.ndarray, truth: np.ndarray | None, rng: np.random.Generator, negative_area: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """PIXELS_PER_PHOTO values of a photo's merged map, (n,) float32, and whether they are the defect, (n,) 0 or 1.

    Args:
        negative_area: (H, W) bool, where the defect is known not to be, of a photo with clicks alone. Half are then drawn from there.
    """
    if negative_area is not None:
        kinds = [np.flatnonzero(kind) for kind in (negative_area, truth) if kind is not None and kind.any()]
        pixels = np.concatenate([rng.choice(kind, PIXELS_PER_PHOTO // 2) for kind in kinds] or [np.empty(0, int)])
    else:
        pixels = rng.integers(logits.size, size=PIXELS_PER_PHOTO)
    return logits.ravel()[pixels], np.zeros(len(pixels)) if truth is None else truth.ravel()[pixels]


def fit_platt(samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """(a, c) of a pixel's probability sigmoid(a * M + c), from the `random_pixels` of every photo."""
    x, y = map(np.concatenate, zip(*samples))
    slope, intercept = fit_logistic(x[:, None], y, (1.0, 0.0))
    return max(slope, 1e-3), intercept


def regions_with_features(
    maps: PhotoMaps,
    logits: np.ndarray,
    least: float,
    cleaning: Cleaning,
    truth: np.ndarray | None,
    negative_area: np.ndarray | None = None,
) -> list[tuple[tuple[float, ...], bool]]:
    """Features of every region of the plain map, and whether it is right; `logits`: merged.

    Right is what lies within 2 px of the truth for the most part. Where clicks are all that is known, `negative_area` (H, W) bool
    says where the defect is not; regions of which nothing is known are left out.
    """
    near = None if truth is None else cv2.dilate(truth.astype(np.uint8), np.ones((5, 5), np.uint8))
    found = []
    for component in find_components(regions(logits, least, cleaning)):
        x0, y0, x1, y1 = component.box_xyxy
        part = slice(y0, y1 + 1), slice(x0, x1 + 1)
        shares = [0.0 if one is None else one[part][component.mask].mean() for one in (near, negative_area)]
        right = shares[0] > (0.5 if negative_area is None else 0)
        if negative_area is not None and not right and shares[1] <= 0.5:
            continue
        found.append((component_features(component, logits, maps.levels), bool(right)))
    return found


def least_confidence(
    healthy: Sequence[tuple[str, int, Sequence[float]]], wrong: Sequence[tuple[str, Sequence[float]]]
) -> float:
    """The lowest confidence that leaves no more false proposals than wanted, see the top of this file.

    Args:
        healthy: per photo without the defect its set, its pixels, and the confidences of its regions.
        wrong: per photo with the defect its set and the confidences of its wrong regions.
    """
    needed = 0.0

    def leave(allowed: float, confidences: Sequence[float]) -> None:
        nonlocal needed
        needed = max([needed, *sorted(confidences, reverse=True)[int(allowed) :][:1]])

    def per_mp(some: Sequence[tuple[str, int, Sequence[float]]]) -> None:
        pixels = sum(size for _, size, _ in some)
        leave(max(1, FALSE_PER_MP * pixels / 1e6), [one for *_, confidences in some for one in confidences])

    per_mp(healthy)
    for set_name in {name for name, *_ in healthy}:
        of_set = [photo for photo in healthy if photo[0] == set_name]
        if len(of_set) >= LEAST_PHOTOS:
            per_mp(of_set)
    for set_name in {name for name, _ in wrong}:
        of_set = [confidences for name, confidences in wrong if name == set_name]
        leave(FALSE_PER_PHOTO * len(of_set), [one for confidences in of_set for one in confidences])
    return float(np.clip(needed + 1e-3, 0.05, 0.95))


def calibrate(args: argparse.Namespace, licences: Mapping[str, dict] | None = None) -> None:
    """Choose everything on val and write weights and manifest.

    Args:
        licences: of data sets, see `defectcam.licences`; those of others are unknown.

    Raises:
        WeightsError: for a manifest in `--out` whose other defects are broken; before any work.
    """
    if (args.out / "manifest.json").exists():
        read_manifest(args.out, but_for=args.defect)  # never build on a manifest that is broken
    work = Calibration(args)
    reading, least, readings = work.choose_reading()
    climb, climbs = work.choose_climb(reading, least)
    photos = spread(work.judging, DEFAULT_T_PHOTOS)
    climbed = work.climbed(photos, replace(reading, climbs=climbs_of(climb)), args.iterations)
    plain = work.climbed(photos, reading, 0)
    cleaning, cleanings = work.choose_cleaning(photos, climbed, least)
    overlap, least = work.best_threshold(photos, climbed, cleaning, plain)
    say(f"T = {args.iterations}: overlap {overlap:.3f} at threshold {least:g} of the merged map, {cleaning}")
    samples, found, rng = [], {}, np.random.default_rng(0)
    for photo in tqdm(work.plain, desc="regions", unit="photo"):
        maps, truth, negative_area = work.maps(photo, reading), photo.truth, negative_area_of(photo)
        logits = maps.merged()
        samples.append(random_pixels(logits, truth, rng, negative_area))
        found[photo] = regions_with_features(maps, logits, least, cleaning, truth, negative_area)
    platt = fit_platt(samples)
    every = [one for some in found.values() for one in some]
    if not any(right for _, right in every):
        sys.exit("the network finds nothing on any val photo, so there is nothing to calibrate: train it longer")
    x, y = np.array([features for features, _ in every]), np.array([right for _, right in every], float)
    confidence_weights = fit_logistic(x, y, np.zeros(x.shape[1] + 1))
    say(f"confidence: {int(y.sum())} right and {int((1 - y).sum())} wrong regions, weights {confidence_weights}")
    sure = {
        photo: [(component_confidence(features, confidence_weights), right) for features, right in some]
        for photo, some in found.items()
    }
    threshold = least_confidence(
        [(photo.set_name, judged_px(photo), [one for one, right in sure[photo] if not right]) for photo in work.healthy],
        [(photo.set_name, [one for one, right in sure[photo] if not right]) for photo in work.labelled],
    )
    kept = [[one for one, right in sure[photo] if right] for photo in work.labelled]
    total = sum(map(len, kept))
    kept_share = sum(one >= threshold for some in kept for one in some) / max(total, 1)
    say(f"minimum confidence {threshold:.3f}: {kept_share:.0%} of {total} right regions stay")
    by_name = {(photo.set_name, photo.stem): some for photo, some in found.items()}
    reliability, picture = reliability_of(args.defect, by_name, threshold)
    say(f"confidence of photos that it was not fitted on: calibration error {reliability['error']:.3f}")
    entry = {
        "encoder": work.record["encoder"],
        "decoder_channels": work.record["decoder"],
        "downsamplings": work.record["downsamplings"],
        "pooling": work.record["pooling"],
        "finest_scale": reading.finest,
        "levels": reading.levels,
        "sharpness": reading.sharpness,
        "climb": climb,
        "platt": list(platt),
        "cam_threshold": round(float(probability(platt[0] * least + platt[1])), 4),
        "closing_radius_px": cleaning.closing_radius_px,
        "gap_px": cleaning.gap_px,
        "min_area_px": cleaning.min_area_px,
        "confidence_weights": list(confidence_weights),
        "threshold": round(threshold, 4),
        "iterations": args.iterations,
        "tolerance_px": 1.0,
        "hole_share": 0.02,
        "training": {
            "calibration": "defectcam " + shlex.join(sys.argv[1:]),
            "sets": args.sets,
            "healthy_sets": args.healthy_sets,
            "network": work.record,
            "readings_tried": readings,
            "climbs_tried": climbs,
            "cleanings_tried": cleanings,
            "reliability": reliability,
        },
    }
    entry["training"]["licences"] = licences_of(entry["training"], licences or {})
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / file_name(f"{args.defect}-reliability", ".png"), picture)
    version = write_defect(args.out, args.defect, entry, save(work.tensors), work.graph)
    print(f"written: weights of {args.defect} in {args.out}, version {version}")


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam calibrate`."""
    parser = command_parser("calibrate", __doc__)
    parser.add_argument("--defect", required=True)
    parser.add_argument("--network", type=Path, required=True, help="folder from `defectcam train`")
    parser.add_argument("--data", type=Path, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, default=[], help="sets whose masks judge")
    parser.add_argument("--healthy-sets", type=names, default=[], help="sets that give photos without the defect")
    parser.add_argument("--labels", choices=LABELS, default="outlines", help="what of the masks judges (default: %(default)s)")
    parser.add_argument("--val-clicks", type=Path, help="your own clicks on val photos: CSV or JSONL; they judge alone")
    add_label_option(parser)
    parser.add_argument("--photos", type=int, help="photos of each set at most (default: all)")
    parser.add_argument("--iterations", type=int, default=2, help="T where it is set nowhere else (default 2, the paper's)")
    parser.add_argument("--licences", type=Path, help="JSON file with the licences of the sets (default: all are unknown)")
    parser.add_argument("--out", type=Path, required=True, help="the weights folder")
    args = parser.parse_args(argv)
    if args.val_clicks:
        args.labels = "clicks"
    elif not (args.data and args.sets):
        parser.error("nothing judges: give --data and --sets, or --val-clicks")
    try:
        check_label_name(args.defect)
        calibrate(args, read_licences(args.licences) if args.licences else None)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
