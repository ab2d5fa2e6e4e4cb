"""Pseudo-masks: the function's own proposals on the train photos, cleaned by the clicks on them (paper, conclusion).

What the clicks arm of the outline network learns from. Nothing but clicks goes in: the outline that follows the
image inside the climbed region is kept where its pieces, from gap to gap, lead to a click, and dropped elsewhere.
Nobody vouches for the pixels next to that outline, nor for those around a click that no outline comes near; all else
is not the defect, inside the region too, which reaches far beyond it.

Example:
    defectcam pseudo-masks --weights out/weights --defect crack --data ../shared/data --sets deepcrack,uav75 \\
        --way dark_ridges --out out/pseudo
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.paths import write_image
from defectcam.postprocess import binarise
from defectcam.snap import grown, snap
from defectcam.tiling import at_photo_scale, at_working_scale, climbed_map, stitched_score_map
from defectcam.training.calibrate import MIN_AREA_PX, OTHER_MIN_AREA_PX, ways
from defectcam.training.clicks import SMALLEST_CLICKED_PX, Click, simulate_clicks
from defectcam.training.crops import read_photo_rgb
from defectcam.training.outline import UNKNOWN
from defectcam.training.train import names
from defectcam.weights import load_weights

RECORD = "pseudo.json"  # beside the masks: what they were made of, and whether all are there
GAP_PX = 16  # at working scale: pieces of one outline lie no farther apart, nor a click from its outline by half of it
AROUND_CLICK_PX = 16  # at working scale: as far as the unknown reaches around a click without an outline
EDGE_PX = 1  # at working scale: so far outside an outline its edge may lie in truth; of more, networks learn wide outlines


def pseudo_mask(outline: np.ndarray, clicks_xy: list[tuple[int, int]]) -> np.ndarray:
    """Grey levels 0 (not the defect), UNKNOWN and 255 (the defect) for training.

    Args:
        outline: (H, W) bool, the proposed defect.
        clicks_xy: the positive clicks, px.

    Returns:
        (H, W) uint8.
    """
    _, chains = cv2.connectedComponents(grown(outline, GAP_PX // 2).astype(np.uint8), connectivity=8)
    clicked = {int(chains[y, x]) for x, y in clicks_xy} - {0}
    defect = outline & np.isin(chains, list(clicked))
    result = np.where(grown(defect, EDGE_PX), np.uint8(UNKNOWN), np.uint8(0))
    for x, y in clicks_xy:
        if chains[y, x] == 0:
            cv2.circle(result, (x, y), AROUND_CLICK_PX, UNKNOWN, -1)
    result[defect] = 255
    return result


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam pseudo-masks`."""
    parser = argparse.ArgumentParser(
        prog="defectcam pseudo-masks",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder from `defectcam calibrate`")
    parser.add_argument("--defect", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, required=True, help="sets whose train photos get masks")
    parser.add_argument("--way", required=True, help="cam, dark_ridges, grabcut or superpixels")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated clicks, as in training")
    parser.add_argument("--out", type=Path, required=True, help="folder of <set>/<stem>.png to write")
    args = parser.parse_args(argv)
    weights = load_weights(args.weights, "cpu")
    if args.defect not in weights.facts:
        sys.exit(f"{args.weights} has no weights for {args.defect!r}; there are {list(weights.facts)}")
    fact, network = weights.facts[args.defect], weights.networks[args.defect]
    options = ways(args.defect, False, MIN_AREA_PX.get(args.defect, OTHER_MIN_AREA_PX))
    if args.way not in options:
        sys.exit(f"--way is {args.way!r}; allowed are {sorted(options)}")
    closing_px, parameters = options[args.way][-1]  # the sharpest ridges, the surest core: precise rather than whole
    smallest_px = round(SMALLEST_CLICKED_PX / fact.working_scale**2)
    facts = {
        "defect": args.defect, "weights": fact.sha256, "sets": args.sets, "way": args.way, "seed": args.seed,
        "closing_radius_px": closing_px, "snap": parameters,
    }  # fmt: skip
    record = args.out / RECORD
    if record.exists() and json.loads(record.read_text())["facts"] != facts:
        sys.exit(f"{args.out} holds masks of {json.loads(record.read_text())['facts']}: choose another --out, or remove it")
    args.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"facts": facts, "finished": False}))
    photos = 0
    for set_name in args.sets:
        clicks = simulate_clicks(args.data, set_name, "train", args.defect, 1, 0, args.seed, smallest_px)
        by_photo: dict[str, list[Click]] = {}
        for click in clicks:
            by_photo.setdefault(click.image, []).append(click)
        photos += len(by_photo)
        for path, of_photo in tqdm(sorted(by_photo.items()), desc=set_name, unit="photo"):
            out = args.out / f"{of_photo[0].photo_group}.png"
            if out.exists():
                continue
            photo = read_photo_rgb(path)
            image = at_working_scale(photo, fact.working_scale)
            score = stitched_score_map(network, image)
            climbed = climbed_map(
                network, image, score, fact.iterations, fact.climb_parameters, fact.cam_max, fact.cam_threshold,
                fact.window_px, fact.gate,
            )  # fmt: skip
            region = binarise(climbed, fact.cam_threshold, closing_px, fact.min_area_px)
            outline = snap(image, region, parameters) if parameters else region
            scaled = [(int(click.x * fact.working_scale), int(click.y * fact.working_scale)) for click in of_photo]
            mask = pseudo_mask(outline, scaled)
            defect, unknown = (at_photo_scale(mask == value, *photo.shape[:2]) for value in (255, UNKNOWN))
            write_image(out, np.where(defect, 255, np.where(unknown, UNKNOWN, 0)).astype(np.uint8))
    if not photos:
        sys.exit(f"nobody clicked on {args.defect} in the train photos of {', '.join(args.sets)}: no masks to write")
    record.write_text(json.dumps({"facts": facts, "finished": True}))
    print(f"{photos} masks written: {args.out}")
