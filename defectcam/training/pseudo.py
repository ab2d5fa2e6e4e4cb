"""Pseudo-masks: a network's own proposals on the train photos, cleaned by the clicks on them (paper, conclusion).

What the clicks arm learns from. Nothing but clicks goes in: what the network proposes (with `--dark-lines` the dark
lines in it, for cracks) is kept where its pieces, from gap to gap, lead to a click, and dropped elsewhere. The pixels
next to that outline are unknown, and so are those around a click that no outline comes near; all else is not the
defect, inside the region too, which reaches far beyond it.

Example:
    defectcam pseudo-masks --weights out/weights --defect crack --data ../shared/data --sets deepcrack,uav75 \\
        --dark-lines --out out/pseudo
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.paths import write_image
from defectcam.predict import Predictor, device_and_engine, paste
from defectcam.training.clicks import Click, simulate_clicks
from defectcam.training.crops import read_photo_rgb
from defectcam.training.dark_lines import dark_lines
from defectcam.training.labels import UNKNOWN
from defectcam.training.train import names
from defectcam.weights import load_weights

RECORD = "pseudo.json"  # beside the masks: what they were made of, and whether all are there
GAP_PX = 16  # px: pieces of one outline lie no farther apart, nor a click from its outline by half of it
AROUND_CLICK_PX = 16  # px: as far as the unknown reaches around a click without an outline
EDGE_PX = 1  # px: so far outside an outline its edge may lie in truth; of more, networks learn wide outlines


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


def grown(region: np.ndarray, margin_px: int) -> np.ndarray:
    """A mask (H, W) bool with a margin around it."""
    size = 2 * margin_px + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return cv2.dilate(region.astype(np.uint8), disc) > 0


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
    parser.add_argument("--dark-lines", action="store_true", help="of the proposals the dark lines alone, for cracks")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated clicks, as in training")
    parser.add_argument("--out", type=Path, required=True, help="folder of <set>/<stem>.png to write")
    args = parser.parse_args(argv)
    predictor = Predictor(load_weights(args.weights), *device_and_engine(os.environ))
    if args.defect not in predictor.defects:
        sys.exit(f"{args.weights} has no weights for {args.defect!r}; there are {predictor.defects}")
    facts = {
        "defect": args.defect, "weights": predictor.weights.facts[args.defect].sha256, "sets": args.sets,
        "dark_lines": args.dark_lines, "seed": args.seed,
    }  # fmt: skip
    record = args.out / RECORD
    if record.exists() and json.loads(record.read_text())["facts"] != facts:
        sys.exit(f"{args.out} holds masks of {json.loads(record.read_text())['facts']}: choose another --out, or remove it")
    args.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"facts": facts, "finished": False}))
    photos = 0
    for set_name in args.sets:
        try:
            clicks = simulate_clicks(args.data, set_name, "train", args.defect, 1, 0, args.seed, shows_defect=True)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(str(error))
        by_photo: dict[str, list[Click]] = {}
        for click in clicks:
            by_photo.setdefault(click.image, []).append(click)
        photos += len(by_photo)
        for path, of_photo in tqdm(sorted(by_photo.items()), desc=set_name, unit="photo"):
            out = args.out / f"{of_photo[0].photo_group}.png"
            if out.exists():
                continue
            photo = read_photo_rgb(path)
            outline = np.zeros(photo.shape[:2], bool)
            for proposal in predictor.propose(photo, args.defect, threshold=0.0):
                paste(outline, proposal.component)
            if args.dark_lines:
                outline = dark_lines(photo, outline)
            mask = pseudo_mask(outline, [(click.x, click.y) for click in of_photo])
            write_image(out, mask)
    if not photos:
        sys.exit(f"there is no click on {args.defect} in the train photos of {', '.join(args.sets)}: no masks to write")
    record.write_text(json.dumps({"facts": facts, "finished": True}))
    print(f"{photos} masks written: {args.out}")
