"""From trained networks to weights that can be deployed: everything the manifest needs, chosen on val.

1. `cam_max`: median over some photos with the defect of the largest value of the summed maps.
2. xi and lambda: the pair whose map at T = 2 fits best (at its best theta).
3. Outline: every way of `snap.py` on the plain map; the one that serves best.
4. T: on some photos with that outline, every T; the one that serves best.
5. Confidence: logistic regression on the proposals, hit or miss, from the mean logit of the windows along a proposal,
   its length, the mean of the outline network's logits and its straightness. Windows are as large as the crops the
   classifier was trained on: with the paper's 320 px, in which a crack is a small part, hits and misses look alike.
6. Threshold: the lowest confidence that leaves 90 % of the photos without the defect without proposals, and of every
   set the photos with it no more than 1.5 misses on average.
7. The outline's own parameters: 5 and 6 for the best of every way, and for the best way with all its parameters, each
   at its best theta; what serves best after its threshold is kept, of those that leave 90 % in peace if any does. A
   way that finds everything, edges of structures too, serves nobody.

"Fit" is the mean over photos of F1 with 2 px tolerance for cracks, of IoU for other defects; "saved" is the simulated
annotator's mean share of clicks saved. What serves best has the largest mean of both: few instances are saved in
part, so that alone is coarse, and a fit alone has no regard for who must correct the rest. It is looked for among the
choices that fit best.

Example:
    defectcam calibrate --defect crack --classifier out/train/crack --outline out/train/crack-outline \\
        --data ../shared/data --sets deepcrack,uav75 --healthy-sets steelbridge440 --version 2 --out out/weights
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import cv2
import numpy as np
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from tqdm import tqdm

from defectcam.cam import score_sums
from defectcam.climb import ClimbParameters
from defectcam.evaluation.measures import f1_2px, iou, saved_per_component
from defectcam.evaluation.survey import LabelledPhoto, SurveyedPhoto, figures, labelled_photos, survey
from defectcam.network import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, DefectNet
from defectcam.outline_network import OutlineNet
from defectcam.paths import file_name
from defectcam.postprocess import binarise
from defectcam.proposals import Component, component_confidence, component_features, find_components
from defectcam.snap import NETWORK_METHODS, snap
from defectcam.training.train import names
from defectcam.weights import OUTLINE_ENCODERS, OUTLINE_PREFIX, read_manifest, write_manifest

GATE = 0.5
STEPS = (0, 1, 2, 4)
THETAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
CLIMBS = tuple(ClimbParameters(xi, weight, 0.5) for xi, weight in product((0.02, 0.08, 0.3), (0.7, 7.0, 70.0)))
REFERENCE_CLIMB = ClimbParameters(xi=0.08, penalty_weight=7.0, salient_share=0.5)  # AdvCAM's defaults
CLIMB_PHOTOS = 8  # for xi and lambda, which cost a climb each
WORTH_A_LOOK = 0.5  # of what the best way serves: with less no threshold makes up for it
FINALISTS = 4  # choices that fit best, of which is seen what they save: that takes a hundred times as long
TRIAL_PHOTOS = 8  # for T, which is slow
CHANCE = 0.01  # what figures of so few photos differ by for no reason
HEALTHY_SHARE = 0.9
FALSE_PER_PHOTO = 1.5
MIN_AREA_PX = {"crack": 24}
OTHER_MIN_AREA_PX = 16  # at working scale


@dataclass(frozen=True)
class Choice:
    """One way from maps to a mask; see `DefectWeights` for the fields."""

    iterations: int
    cam_threshold: float
    closing_radius_px: int
    snap: dict | None

    def mask(self, photo: SurveyedPhoto, cam_max: dict[int, float], min_area_px: int) -> np.ndarray:
        """The defect's pixels of a photo, (h, w) bool at working scale."""
        normalised = photo.maps[self.iterations] / np.float32(cam_max[self.iterations])
        mask = binarise(normalised, self.cam_threshold, self.closing_radius_px, min_area_px)
        if self.snap:
            mask = snap(photo.working_image, mask, self.snap, photo.outline_logits)
        return mask


@dataclass(frozen=True)
class Trial:
    """A choice with its confidence and threshold, and what it answers.

    Attributes:
        quiet: whether it leaves HEALTHY_SHARE of the photos without the defect in peace.
        merit: mean of fit and saved.
        saved: the simulated annotator's mean share of clicks saved.
        answers: photos, those with the defect first, and masks (H, W) bool at photo scale.
    """

    quiet: bool
    merit: float
    saved: float
    choice: Choice
    confidence_weights: tuple[float, ...]
    threshold: float
    answers: list[tuple[LabelledPhoto, np.ndarray]]


def ways(defect: str, has_network: bool, min_area_px: int) -> dict[str, list[tuple[int, dict | None]]]:
    """The ways to an outline, each with what there is to choose: closing radius and parameters of `snap`."""
    area = {"min_area_px": min_area_px}
    found: dict[str, list[tuple[int, dict | None]]] = {
        "cam": [(closing, None) for closing in (0, 3)],
        "superpixels": [
            (3, {"method": "superpixels", "size_px": 8, "share": 0.5, "margin_px": 8, **area}),
        ],
    }
    if defect != "crack":  # whose colour is its surroundings'
        found["grabcut"] = [
            (3, {"method": "grabcut", "sure_share": share, "margin_px": 6, **area}) for share in (0.1, 0.3)
        ]
    else:
        lines = {"method": "dark_ridges", "width_px": 17, "closing_radius_px": 2, **area}
        found["dark_ridges"] = [
            (closing, {"sharpness": sharpness, **lines}) for sharpness, closing in product((2.0, 3.0), (3, 12))
        ]
    if has_network:
        found["network"] = [
            (3, {"method": "network", "probability": probability, "margin_px": margin, **area})
            for probability, margin in product((0.1, 0.25, 0.5), (4, 12))
        ]
    if has_network and defect == "crack":
        ridges = {"method": "network_ridges", "width_px": 9, "closing_radius_px": 1, **area}
        found["network_ridges"] = [
            (12, {"probability": probability, "ridge_weight": weight, **ridges})
            for probability, weight in product((0.05, 0.1, 0.2, 0.4, 0.6, 0.85), (0.5, 1.0, 2.0))
        ]
    return found


def fit_of(defect: str, photos: Sequence[SurveyedPhoto], masks: Sequence[np.ndarray]) -> float:
    """Mean over photos of how well masks fit the truth, 0..1."""
    measure = f1_2px if defect == "crack" else iou
    return float(np.mean([measure(mask, photo.labelled.truth) for photo, mask in zip(photos, masks)]))


def saved_by(defect: str, photos: Sequence[SurveyedPhoto], masks: Sequence[np.ndarray]) -> float:
    """Mean share of clicks saved over all instances, 0..1."""
    saved = [s for photo, mask in zip(photos, masks) for s in saved_per_component(mask, photo.labelled.truth, defect)]
    return float(np.mean(saved)) if saved else 0.0


class Calibration:
    """One defect's networks and val photos, and what has been chosen for them so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.defect = args, args.defect
        self.record = json.loads((args.classifier / "record.json").read_text())
        self.network = self._load(args.classifier)
        self.outline_record = json.loads((args.outline / "record.json").read_text()) if args.outline else None
        shared = ["defect", "working_scale"]
        if self.outline_encoder == OUTLINE_ENCODERS[0]:  # the manifest has one architecture for both
            shared += ["decoder", "downsamplings"]
        for name in shared:
            if self.outline_record and self.outline_record[name] != self.record[name]:
                sys.exit(
                    f"--outline {args.outline} was trained with {name} {self.outline_record[name]!r}, --classifier "
                    f"{args.classifier} with {self.record[name]!r}: both must be the same"
                )
        self.outline = self._load(args.outline) if args.outline else None
        self.window_px, self.working_scale = self.record["crop_px"], self.record["working_scale"]
        self.min_area_px = MIN_AREA_PX.get(self.defect, OTHER_MIN_AREA_PX)
        photos = labelled_photos(args.data, args.sets, args.healthy_sets, "val", self.defect, args.photos)
        photos = list(photos)
        self.healthy = [photo for photo in photos if photo.truth is None]
        self.labelled = [photo for photo in photos if photo.truth is not None]
        if not self.healthy or not self.labelled:
            sys.exit(
                f"calibration needs val photos with {self.defect} and without it; there are {len(self.labelled)} and "
                f"{len(self.healthy)}: name other --sets or --healthy-sets"
            )

    @property
    def outline_encoder(self) -> str:
        return (self.outline_record or {}).get("encoder", OUTLINE_ENCODERS[0])

    def _load(self, folder: Path) -> DefectNet | OutlineNet:
        network = DefectNet(tuple(self.record["decoder"]), self.record["downsamplings"])
        if folder == self.args.outline and self.outline_encoder != OUTLINE_ENCODERS[0]:
            network = OutlineNet()
        network.load_state_dict(load_file(folder / "best.safetensors"))
        return network.requires_grad_(False).eval()

    def surveyed(
        self, photos: Sequence[LabelledPhoto], steps: Sequence[int], climb: ClimbParameters, gate: float, outline: bool
    ) -> list[SurveyedPhoto]:
        """Photos with the sums of their maps, not normalised."""
        ones = [1.0] * (max(steps) + 1)
        network = self.outline if outline else None
        return [
            survey(photo, self.network, network, self.working_scale, steps, climb, ones, 0.1, self.window_px, gate)
            for photo in tqdm(photos, desc=f"maps, T = {max(steps)}", unit="photo")
        ]

    def fits(
        self, photos: Sequence[SurveyedPhoto], choices: Sequence[Choice], cam_max: dict[int, float]
    ) -> list[float]:
        """How well every choice fits, 0..1, all that it proposes counted."""
        bar = tqdm(choices, desc="fits", leave=False)
        return [fit_of(self.defect, photos, self._masks(choice, photos, cam_max)) for choice in bar]

    def _masks(
        self, choice: Choice, photos: Sequence[SurveyedPhoto], cam_max: dict[int, float]
    ) -> list[np.ndarray]:
        return [photo.at_photo_scale(choice.mask(photo, cam_max, self.min_area_px)) for photo in photos]

    def best(
        self, photos: Sequence[SurveyedPhoto], choices: Sequence[Choice], cam_max: dict[int, float]
    ) -> tuple[float, Choice, dict[str, float]]:
        """Of the choices that fit best the one that serves best: its merit, itself, fit and saved."""
        fits, finalists = self.fits(photos, choices, cam_max), []
        for index in np.argsort(fits)[::-1][:FINALISTS].tolist():
            saved = saved_by(self.defect, photos, self._masks(choices[index], photos, cam_max))
            figures = {"fit": round(fits[index], 3), "mean_saved": round(saved, 3)}
            finalists.append(((fits[index] + saved) / 2, choices[index], figures))
        return max(finalists, key=lambda finalist: finalist[0])

    def choose_climb(self) -> ClimbParameters:
        """xi and lambda by the plain map at T = 2, on a few photos."""
        some = spread(self.labelled, CLIMB_PHOTOS)
        fits = {}
        for climb in CLIMBS:
            photos = self.surveyed(some, (2,), climb, 0.0, outline=False)
            cam_max = typical_maxima(photos, (2,))
            _, choice, found = self.best(photos, [Choice(2, theta, 3, None) for theta in THETAS], cam_max)
            fits[climb] = found["fit"]
            say(f"xi {climb.xi}, lambda {climb.penalty_weight}: fit {fits[climb]:.3f} at theta {choice.cam_threshold}")
        return max(CLIMBS, key=lambda climb: fits[climb] + CHANCE * (climb == REFERENCE_CLIMB))

    def choose_way(
        self, photos: Sequence[SurveyedPhoto], cam_max: dict[int, float]
    ) -> tuple[str, list[Choice], dict]:
        """The way to an outline that serves best on the plain maps, the best of others worth a look, all figures."""
        best_of, report = {}, {}
        for way in ways(self.defect, self.outline is not None, self.min_area_px):
            if self.args.way not in (None, way):
                continue
            merit, choice, found = self.best(photos, self.choices(way, 0), cam_max)
            best_of[way] = merit, choice
            report[way] = found | {"cam_threshold": choice.cam_threshold}
            say(f"outline by {way}: {report[way]} {choice.snap}")
        if not report:
            sys.exit(f"--way is {self.args.way!r}, which there is not for {self.defect} and these networks")
        best = max(best_of, key=lambda way: best_of[way][0])
        least = best_of.pop(best)[0] * WORTH_A_LOOK
        return best, [choice for merit, choice in best_of.values() if merit >= least], report

    def with_best_theta(
        self, photos: Sequence[SurveyedPhoto], way: str, steps: int, cam_max: dict[int, float]
    ) -> list[Choice]:
        """A way with all its parameters, each at the theta that fits best."""
        choices = self.choices(way, steps)
        found: dict[str, tuple[float, Choice]] = {}
        for fit, choice in zip(self.fits(photos, choices, cam_max), choices):
            parameters = repr((choice.closing_radius_px, choice.snap))
            if fit > found.get(parameters, (-1.0,))[0]:
                found[parameters] = fit, choice
        return [choice for _, choice in found.values()]

    def choose_steps(self, photos: Sequence[SurveyedPhoto], way: str, cam_max: dict[int, float]) -> tuple[int, dict]:
        """T, and the figures for every T."""
        best, report = (-1.0, 0), {}
        for steps in STEPS:
            merit, choice, found = self.best(photos, self.choices(way, steps), cam_max)
            report[steps] = found | {"cam_threshold": choice.cam_threshold}
            say(f"T {steps}: {report[steps]} {choice.snap}")
            if merit > best[0] + CHANCE:  # a further step must be worth its time
                best = merit, steps
        return best[1], report

    def judged(
        self, choice: Choice, photos: Sequence[SurveyedPhoto], healthy: Sequence[SurveyedPhoto], cam_max: dict[int, float]
    ) -> Trial | None:
        """What a choice answers once its confidence and threshold are fitted; None for one that proposes nothing."""
        bias, found = self.network.head.bias.item(), {}
        # As it will be deployed: only with these ways the outline network is shipped.
        with_logits = choice.snap is not None and choice.snap["method"] in NETWORK_METHODS
        for photo in tqdm([*photos, *healthy], desc="confidence", unit="photo", leave=False):
            mask = choice.mask(photo, cam_max, self.min_area_px)
            found[photo.labelled] = with_features(
                photo, mask, bias, self.window_px, self.working_scale, with_logits
            )
        every = [component for components in found.values() for component in components]
        if not every:
            return None
        weights = fit_confidence([features for _, features, _ in every], [hit for _, _, hit in every])
        peaks = [
            max((component_confidence(features, weights) for _, features, _ in found[photo.labelled]), default=0.0)
            for photo in healthy
        ]
        misses: dict[str, list[list[float]]] = {}
        for photo in photos:
            wrong = [component_confidence(features, weights) for _, features, hit in found[photo.labelled] if not hit]
            misses.setdefault(photo.labelled.set_name, []).append(wrong)
        threshold = least_confidence(peaks, list(misses.values()))
        answers = []
        for photo, components in found.items():
            mask = np.zeros(photo.image_rgb.shape[:2], bool)
            for component, features, _ in components:
                if component_confidence(features, weights) >= threshold:
                    x0, y0, x1, y1 = component.box_xyxy
                    mask[y0 : y1 + 1, x0 : x1 + 1] |= component.mask
            answers.append((photo, mask))
        masks = [mask for _, mask in answers[: len(photos)]]
        fit, saved = fit_of(self.defect, photos, masks), saved_by(self.defect, photos, masks)
        quiet = float(np.mean(np.less(peaks, threshold)))
        say(f"{choice}: after the threshold {threshold:.3f} fit {fit:.3f}, saved {saved:.3f}, quiet {quiet:.2f}")
        return Trial(quiet >= HEALTHY_SHARE, (fit + saved) / 2, saved, choice, weights, threshold, answers)

    def choices(self, way: str, steps: int) -> list[Choice]:
        """Everything there is to choose for a way to an outline and T."""
        options = ways(self.defect, self.outline is not None, self.min_area_px)[way]
        return [Choice(steps, theta, *option) for theta, option in product(THETAS, options)]


def chosen(judged: Sequence[Trial]) -> Trial:
    """The one that saves most of those that serve as well as the best, but for chance; quiet ones where there are any."""
    eligible = [one for one in judged if one.quiet] or judged
    best = max(one.merit for one in eligible)
    return max((one for one in eligible if one.merit >= best - CHANCE), key=lambda one: one.saved)


def typical_maxima(photos: Sequence[SurveyedPhoto], steps: Sequence[int]) -> dict[int, float]:
    """Median over photos of the largest value of the summed maps, per T."""
    return {t: max(float(np.median([photo.maps[t].max() for photo in photos])), 1e-6) for t in steps}


def spread(items: Sequence, count: int) -> list:
    """`count` of the items at even distances."""
    return [items[index] for index in np.unique(np.linspace(0, len(items) - 1, count).astype(int))]


def with_features(
    photo: SurveyedPhoto, mask: np.ndarray, bias: float, window_px: int, working_scale: float, with_logits: bool
) -> list[tuple[Component, tuple[float, ...], bool]]:
    """Components of a mask (h, w) at working scale, at photo scale, with their features, and whether each is a hit.

    A hit lies for the most part within 2 px of the truth. `with_logits` says whether the outline network's are a feature.
    """
    logits = photo.outline_logits(mask) if with_logits and mask.any() else None
    mask = photo.at_photo_scale(mask)
    sums, truth, found = score_sums(photo.score), photo.labelled.truth, []
    near = None if truth is None else cv2.dilate(truth.astype(np.uint8), np.ones((5, 5), np.uint8))
    for component in find_components(mask):
        x0, y0, x1, y1 = component.box_xyxy
        hit = near is not None and near[y0 : y1 + 1, x0 : x1 + 1][component.mask].mean() > 0.5
        found.append((component, component_features(component, sums, bias, window_px, working_scale, logits), hit))
    return found


def fit_confidence(features: Sequence[tuple[float, ...]], hits: Sequence[bool]) -> tuple[float, ...]:
    """The weights of `component_confidence`."""
    x, y = np.column_stack([np.array(features), np.ones(len(features))]), np.array(hits, float)

    def loss(weights: np.ndarray) -> float:
        logits = x @ weights
        return float((np.logaddexp(0, logits) - y * logits).mean() + 1e-4 * (weights**2).sum())

    weights = minimize(loss, [0.5, 0.5, 0.5, 0.0, -3.0]).x
    say(f"confidence: {int(y.sum())} hits, {int((1 - y).sum())} misses, weights {np.round(weights, 3).tolist()}")
    return tuple(float(f"{weight:.5g}") for weight in weights)


def least_confidence(peaks: Sequence[float], misses: Sequence[Sequence[Sequence[float]]]) -> float:
    """The lowest confidence that leaves HEALTHY_SHARE of healthy photos in peace and, of every set, the photos with
    the defect no more than FALSE_PER_PHOTO misses on average.

    Args:
        peaks: of every photo without the defect the largest confidence of its proposals, 0 without any.
        misses: per set, per photo with the defect, the confidences of its proposals that are no hits.
    """
    needed = float(np.quantile(peaks, HEALTHY_SHARE, method="higher"))
    for of_set in misses:
        allowed, ranked = int(FALSE_PER_PHOTO * len(of_set)), sorted(chain.from_iterable(of_set), reverse=True)
        needed = max([needed, *ranked[allowed : allowed + 1]])
    return float(np.clip(needed + 1e-3, 0.05, 0.95))


def calibrate(args: argparse.Namespace) -> None:
    """Choose everything on val and write weights and manifest.

    Raises:
        WeightsError: for a manifest in `--out` whose other defects nobody could work with; before any work.
    """
    if (args.out / "manifest.json").exists():
        read_manifest(args.out, but_for=args.defect)  # never build on a manifest that is broken
    work = Calibration(args)
    climb = work.choose_climb() if args.choose_climb else REFERENCE_CLIMB
    some = work.surveyed(spread(work.labelled, TRIAL_PHOTOS), STEPS, climb, 0.0, outline=True)
    cam_max = typical_maxima(some, STEPS)
    photos = work.surveyed(work.labelled, (0,), climb, 0.0, outline=True)
    way, others, way_report = work.choose_way(photos, cam_max)
    steps, step_report = work.choose_steps(some, way, cam_max)
    if steps:
        photos = work.surveyed(work.labelled, (steps,), climb, 0.0, outline=True)
    healthy = work.surveyed(work.healthy, (steps,), climb, GATE, outline=True)
    if steps:  # tiles that are not climbed keep the plain map, in its own units
        for photo in healthy:
            plain = np.maximum(photo.score, 0)
            untouched = photo.maps[steps] == plain
            photo.maps[steps][untouched] *= cam_max[steps] / cam_max[0]
    choices = work.with_best_theta(photos, way, steps, cam_max) + [replace(one, iterations=steps) for one in others]
    judged = [one for choice in choices if (one := work.judged(choice, photos, healthy, cam_max))]
    if not judged:
        sys.exit("the network proposes nothing on any val photo, so there is nothing to calibrate: train it longer")
    best = chosen(judged)
    say(f"chosen: {best.choice}, minimum confidence {best.threshold:.3f}")

    of_sets: dict[str, list] = {}
    for photo, mask in best.answers:
        of_sets.setdefault(photo.set_name, []).append((photo, mask))
    val = {set_name: figures(work.defect, of_set) for set_name, of_set in of_sets.items()}
    print(json.dumps(val, indent=1))
    record = {
        "calibration": "defectcam " + shlex.join(sys.argv[1:]),
        "sets": args.sets,
        "healthy_sets": args.healthy_sets,
        "classifier": work.record,
        "outline": work.outline_record,
        "outlines_tried": way_report,
        "steps_tried": step_report,
        "val": val,
    }
    write(work, climb, cam_max, best, record)


def write(
    work: Calibration,
    climb: ClimbParameters,
    cam_max: dict[int, float],
    best: Trial,
    record: dict,
) -> None:
    """Write the defect's file and its entry of the manifest, the other defects' entries left as they are."""
    args, choice = work.args, best.choice
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"": work.network}
    if choice.snap and choice.snap["method"] in NETWORK_METHODS:
        parts[OUTLINE_PREFIX] = work.outline
    tensors = {
        prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.state_dict().items()
    }
    path = args.out / file_name(work.defect, ".safetensors")
    save_file(tensors, path)
    entry = {
        "file": path.name,
        "decoder_channels": work.record["decoder"],
        "downsamplings": work.record["downsamplings"],
        "outline_encoder": work.outline_encoder if OUTLINE_PREFIX in parts else OUTLINE_ENCODERS[0],
        "mean_rgb": list(IMAGENET_MEAN_RGB),
        "std_rgb": list(IMAGENET_STD_RGB),
        "working_scale": work.working_scale,
        "window_px": work.window_px,
        "gate": GATE,
        "confidence_weights": list(best.confidence_weights),
        "threshold": round(best.threshold, 4),
        "iterations": choice.iterations,
        "xi": climb.xi,
        "penalty_weight": climb.penalty_weight,
        "salient_share": climb.salient_share,
        "cam_max": increasing(np.interp(range(max(STEPS) + 1), STEPS, [cam_max[t] for t in STEPS])),
        "cam_threshold": choice.cam_threshold,
        "closing_radius_px": choice.closing_radius_px,
        "min_area_px": work.min_area_px,
        "snap": choice.snap,
        "tolerance_px": 1.0,
        "hole_share": 0.02,
        "training": record,
    }
    defects = {}
    if (args.out / "manifest.json").exists():
        defects = json.loads((args.out / "manifest.json").read_text())["defects"]
    write_manifest(args.out, args.version, defects | {work.defect: entry})
    print(f"written: {path} and {args.out / 'manifest.json'}")


def increasing(values: Sequence[float]) -> list[float]:
    """The values to five digits, none below the one before it."""
    return [float(f"{value:.5g}") for value in np.maximum.accumulate(values)]


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam calibrate`."""
    parser = argparse.ArgumentParser(
        prog="defectcam calibrate",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--defect", required=True)
    parser.add_argument("--classifier", type=Path, required=True, help="folder from `defectcam train`")
    parser.add_argument("--outline", type=Path, help="folder from `defectcam train-outline`")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, required=True, help="sets whose masks judge")
    parser.add_argument("--healthy-sets", type=names, default=[], help="sets that give photos without the defect")
    parser.add_argument("--photos", type=int, help="photos of each set at most (default: all)")
    parser.add_argument("--way", help="try this way to an outline alone (cam, network, grabcut, ...)")
    parser.add_argument("--choose-climb", action="store_true", help="choose xi and lambda too; else AdvCAM's defaults")
    parser.add_argument("--version", required=True, help="name of this version of the weights")
    parser.add_argument("--out", type=Path, required=True, help="the weights folder")
    args = parser.parse_args(argv)
    try:
        calibrate(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
