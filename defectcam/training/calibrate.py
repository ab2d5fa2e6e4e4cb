"""From a trained classifier to weights that can be deployed: everything the manifest needs, chosen on val.

1. Head: scale and bias are fitted once more on windows of the paper's 320 px around the train clicks (logistic
   regression of two numbers; the activation map only changes by a factor).
2. `cam_max`: median over val photos with the defect of the largest value of the summed maps.
3. T, theta, closing radius: the best mean F1 with 2 px tolerance (crack) or IoU (other defects) on val, outlines as deployed.
4. Confidence: logistic regression on the val proposals, hit or miss, from the mean logit of the windows along a
   proposal and its length. Windows as small as the training crops tell hits from misses far better than the
   paper's 320 px, in which a crack is a small part.
5. threshold: the lowest confidence that leaves 90 % of the val photos without the defect without proposals. They
   are not climbed, for time; half of theta makes up for it and more.

Example:
    defectcam calibrate --defect crack --init out/train/crack/best.safetensors --data ../shared/data \\
        --sets deepcrack,uav75 --healthy-sets steelbridge440 --record out/train/crack/record.json --out weights
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from tqdm import tqdm

from defectcam.cam import score_sums, window_logits
from defectcam.climb import ClimbParameters
from defectcam.evaluation.measures import f1_2px, false_components, iou
from defectcam.network import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, DefectNet
from defectcam.postprocess import binarise
from defectcam.proposals import Component, component_confidence, component_features, find_components
from defectcam.snap import snap
from defectcam.tiling import climbed_map, stitched_score_map
from defectcam.training.clicks import photo_path, simulate_clicks, split_stems
from defectcam.training.train import names
from defectcam.weights import read_manifest, write_manifest

HEAD_WINDOW_PX = 320  # paper 4.1: the size of crop the paper's classifier judges
WINDOW_PX = 64
GATE = 0.5
STEPS = (0, 2)
THETAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
HEALTHY_SHARE = 0.9
CLIMB = ClimbParameters(xi=0.08, penalty_weight=7.0, salient_share=0.5)  # the reference's defaults
CLOSING_RADII_PX = (3, 12, 20)  # the map may light up the two sides of a crack and leave the crack out
MIN_AREA_PX = 60
SNAP = {
    "crack": {
        "method": "dark_ridges",
        "width_px": 17,
        "sharpness": 2.0,
        "closing_radius_px": 2,
        "min_area_px": MIN_AREA_PX,
    }
}


@dataclass(frozen=True)
class ValPhoto:
    """One photo with its truth (None = without the defect, unlabelled pixels), score map and maps per T."""

    set_name: str
    image_rgb: np.ndarray
    truth: np.ndarray | None
    sums: np.ndarray
    maps: dict[int, np.ndarray]


def fit_head(network: DefectNet, args: argparse.Namespace) -> None:
    """Fit scale and bias of the head on windows of HEAD_WINDOW_PX around the train clicks."""
    clicks = []
    for set_name in [*args.sets, *args.healthy_sets]:
        found = simulate_clicks(args.data, set_name, "train", args.defect, HEAD_WINDOW_PX, 2, args.seed)
        clicks += [c for c in found if c.defect == "none" or set_name in args.sets]
    by_photo: dict[str, list] = {}
    for click in clicks:
        by_photo.setdefault(click.image, []).append(click)
    rng = np.random.default_rng(args.seed)
    chosen = rng.permutation(sorted(by_photo))[: args.head_photos]
    bias = float(network.head.bias[0].detach())
    means, labels = [], []
    for path in tqdm(chosen, desc="head", unit="photo"):
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        sums = score_sums(stitched_score_map(network, image))
        for click in by_photo[path]:
            means.append(window_logits(sums, 0.0, np.array(click.y), np.array(click.x), HEAD_WINDOW_PX))
            labels.append(click.defect != "none")
    x, y = np.array(means, dtype=float), np.array(labels, dtype=float)
    weight = np.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))  # both classes count alike, as in training

    def loss(parameters: np.ndarray) -> float:
        logits = np.exp(parameters[0]) * x + parameters[1]
        return float((weight * (np.logaddexp(0, logits) - y * logits)).mean())

    log_scale, fitted_bias = minimize(loss, [0.0, bias], method="Nelder-Mead").x
    right = float((weight * ((x * np.exp(log_scale) + fitted_bias > 0) == (y > 0))).mean())
    print(
        f"head: {int(y.sum())} windows with the defect, {int((1 - y).sum())} without; scale {np.exp(log_scale):.3g}, "
        f"bias {bias:.3g} -> {fitted_bias:.3g}, balanced accuracy {right:.3f}",
        flush=True,
    )
    network.head.weight.data *= float(np.exp(log_scale))
    network.head.bias.data[:] = float(fitted_bias)


def val_photos(network: DefectNet, args: argparse.Namespace) -> Iterator[ValPhoto]:
    """All val photos of the sets, and of the healthy sets those without the defect, with their maps.

    The maps are sums over T + 1 maps, not normalised yet.
    """
    for set_name in [*args.sets, *args.healthy_sets]:
        for stem in tqdm(split_stems(args.data, set_name, "val"), desc=set_name, unit="photo"):
            mask_path = args.data / set_name / "masks" / args.defect / f"{stem}.png"
            truth = cv2.imread(str(mask_path), cv2.IMREAD_GRAYSCALE) > 127 if mask_path.exists() else None
            healthy = truth is None or not truth.any()
            if set_name in args.healthy_sets and not healthy:
                continue  # its masks are too coarse to judge outlines by
            image = cv2.cvtColor(cv2.imread(str(photo_path(args.data / set_name, stem))), cv2.COLOR_BGR2RGB)
            score = stitched_score_map(network, image)
            maps = {
                steps: climbed_map(network, image, score, steps, CLIMB, [1.0] * (steps + 1), 0.1, WINDOW_PX, 0.0)
                for steps in ((0,) if healthy else STEPS)
            }
            yield ValPhoto(set_name, image, None if healthy else truth, score_sums(score), maps)


def candidates(
    photo: ValPhoto, steps: int, cam_max: float, theta: float, closing_px: int, bias: float, snapping: dict | None
) -> list[tuple[Component, tuple[float, float]]]:
    """Components of one photo as they would be proposed, each with its features."""
    region = binarise(photo.maps[steps] / cam_max, theta, closing_px, MIN_AREA_PX)
    mask = snap(photo.image_rgb, region, snapping) if snapping else region
    return [(c, component_features(c, photo.sums, bias, WINDOW_PX)) for c in find_components(mask)]


def fit_confidence(found: list[tuple[ValPhoto, list]]) -> tuple[float, float, float]:
    """Weights of `component_confidence`: hits (most of the component within 2 px of a crack) against misses."""
    features, hits = [], []
    for photo, components in found:
        near = None if photo.truth is None else cv2.dilate(photo.truth.astype(np.uint8), np.ones((5, 5), np.uint8))
        for component, both in components:
            x0, y0, x1, y1 = component.box_xyxy
            hit = near is not None and near[y0 : y1 + 1, x0 : x1 + 1][component.mask].mean() > 0.5
            features.append((*both, 1.0))
            hits.append(float(hit))
    x, y = np.array(features), np.array(hits)

    def loss(weights: np.ndarray) -> float:
        logits = x @ weights
        return float((np.logaddexp(0, logits) - y * logits).mean() + 1e-4 * (weights**2).sum())

    weights = minimize(loss, [0.5, 0.5, -5.0], method="Nelder-Mead", options={"maxiter": 5000}).x
    print(f"confidence: {int(y.sum())} hits, {int((1 - y).sum())} misses, weights {np.round(weights, 3).tolist()}")
    return tuple(float(f"{weight:.5g}") for weight in weights)


def proposed_mask(photo: ValPhoto, found: list, weights: Sequence[float], threshold: float) -> np.ndarray:
    """The candidates that reach the threshold, painted into one mask."""
    mask = np.zeros(photo.image_rgb.shape[:2], bool)
    for component, features in found:
        if component_confidence(features, weights) >= threshold:
            x0, y0, x1, y1 = component.box_xyxy
            mask[y0 : y1 + 1, x0 : x1 + 1] |= component.mask
    return mask


def calibrate(args: argparse.Namespace) -> None:
    """Choose everything on val and write weights and manifest."""
    if not args.healthy_sets:
        raise SystemExit("calibrate needs --healthy-sets: photos without the defect set the minimum confidence")
    network = DefectNet(args.decoder, args.downsamplings)
    network.load_state_dict(load_file(args.init))
    network.requires_grad_(False).eval()
    fit_head(network, args)
    bias = float(network.head.bias[0])
    photos = list(val_photos(network, args))
    with_defect = [photo for photo in photos if photo.truth is not None]
    healthy = [photo for photo in photos if photo.truth is None]
    cam_max = {steps: float(np.median([p.maps[steps].max() for p in with_defect])) for steps in STEPS}
    snapping = SNAP.get(args.defect)
    quality = f1_2px if args.defect == "crack" else iou

    scores = {}
    for steps, theta, closing_px in product(STEPS, THETAS, CLOSING_RADII_PX):
        masks = [
            proposed_mask(p, candidates(p, steps, cam_max[steps], theta, closing_px, bias, snapping), (0, 0, 0), 0.0)
            for p in with_defect
        ]
        score = float(np.mean([quality(m, p.truth) for m, p in zip(masks, with_defect)]))
        scores[steps, theta, closing_px] = score
        print(f"T {steps} theta {theta} closing {closing_px}: {quality.__name__} {score:.3f}", flush=True)
    # The paper's T = 2 unless another is clearly better.
    steps, theta, closing_px = max(scores, key=lambda key: scores[key] + 0.01 * (key[0] == 2))
    print(f"chosen: T {steps}, theta {theta}, closing {closing_px}")

    chosen = (steps, cam_max[steps], theta, closing_px, bias, snapping)
    healthy_theta = theta / 2 if steps else theta
    of_healthy = [candidates(p, 0, cam_max[0], healthy_theta, closing_px, bias, snapping) for p in healthy]
    weights = fit_confidence([*((p, candidates(p, *chosen)) for p in with_defect), *zip(healthy, of_healthy)])
    peaks = [max((component_confidence(f, weights) for _, f in found), default=0.0) for found in of_healthy]
    threshold = float(np.clip(np.quantile(peaks, HEALTHY_SHARE, method="higher") + 1e-3, 0.05, 0.95))
    figures = {}
    for set_name in args.sets:
        of_set = [photo for photo in with_defect if photo.set_name == set_name]
        for label, t, th, snap_now in [
            ("CAM, T = 0", 0, theta, None),
            ("CAM, T = 2", 2, theta, None),
            ("snapped, T = 0", 0, theta, snapping),
            ("snapped, T = 2", 2, theta, snapping),
        ]:
            masks = [
                proposed_mask(p, candidates(p, t, cam_max[t], th, closing_px, bias, snap_now), weights, threshold)
                for p in of_set
            ]
            truths = [p.truth for p in of_set]
            figures[f"{set_name}, {label}"] = {
                "iou_pixels": round(_pixel_iou(masks, truths), 3),
                "f1_2px_photo_mean": round(float(np.mean([f1_2px(m, t) for m, t in zip(masks, truths)])), 3),
                "false_components_per_photo": round(
                    float(np.mean([false_components(m, t) for m, t in zip(masks, truths)])), 2
                ),
                "photos": len(of_set),
            }
    for set_name in sorted({p.set_name for p in healthy}):
        quiet = [peak < threshold for peak, p in zip(peaks, healthy) if p.set_name == set_name]
        figures[f"{set_name}, healthy"] = {"share_without_proposals": round(float(np.mean(quiet)), 3), "photos": len(quiet)}
    print(json.dumps(figures, indent=1))

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.defect}.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    entry = {
        "file": path.name,
        "decoder_channels": list(args.decoder),
        "downsamplings": args.downsamplings,
        "mean_rgb": list(IMAGENET_MEAN_RGB),
        "std_rgb": list(IMAGENET_STD_RGB),
        "window_px": WINDOW_PX,
        "gate": GATE,
        "confidence_weights": list(weights),
        "threshold": round(threshold, 4),
        "iterations": steps,
        "xi": CLIMB.xi,
        "penalty_weight": CLIMB.penalty_weight,
        "salient_share": CLIMB.salient_share,
        "cam_max": [
            float(f"{value:.5g}") for value in np.interp(range(max(STEPS) + 1), STEPS, [cam_max[t] for t in STEPS])
        ],
        "cam_threshold": theta,
        "closing_radius_px": closing_px,
        "min_area_px": MIN_AREA_PX,
        "snap": snapping,
        "tolerance_px": 1.0,
        "hole_share": 0.02,
        "training": {
            "calibration": "defectcam calibrate " + shlex.join(sys.argv[2:]),
            "runs": [json.loads(record.read_text()) for record in args.record],
            "val": figures,
        },
    }
    defects = {}
    if (args.out / "manifest.json").exists():
        read_manifest(args.out)  # never build on a manifest that is broken
        defects = json.loads((args.out / "manifest.json").read_text())["defects"]
    write_manifest(args.out, args.version, defects | {args.defect: entry})
    print(f"written: {path} and {args.out / 'manifest.json'}")


def _pixel_iou(masks: list[np.ndarray], truths: list[np.ndarray]) -> float:
    both = sum(np.count_nonzero(m & t) for m, t in zip(masks, truths))
    return both / max(1, sum(np.count_nonzero(m | t) for m, t in zip(masks, truths)))


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam calibrate`."""
    parser = argparse.ArgumentParser(
        prog="defectcam calibrate",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--defect", required=True)
    parser.add_argument("--init", type=Path, required=True, help="the classifier's weights, from defectcam train")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, required=True, help="sets whose masks judge")
    parser.add_argument("--healthy-sets", type=names, default=[], help="sets that give photos without the defect")
    parser.add_argument("--head-photos", type=int, default=160, help="train photos the head is fitted on")
    parser.add_argument("--decoder", type=lambda s: tuple(map(int, s.split(","))), default=(64, 32, 16))
    parser.add_argument("--downsamplings", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--record", type=Path, action="append", default=[], help="record.json of a training run")
    parser.add_argument("--version", required=True, help="name of this version of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the weights folder")
    calibrate(parser.parse_args(argv))
