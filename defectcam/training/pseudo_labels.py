"""Pseudo-labels: a trained network's own proposals as the labels of a second round (paper, conclusion).

Photos with clicks: what the network proposes at T steps is kept where its pieces, from gap to gap, lead to a click, and
dropped elsewhere. The pixels next to that outline are unknown, and so are those around a click that no outline comes near.
All else is not the defect. Nothing but clicks goes in. `--refine` first brings the proposals, which are too wide after training
from clicks, to the edges that the photo shows: `dark-lines` for cracks, `grabcut` for spalls.

Photos without any label (`--unlabelled-sets`): sure proposals are the defect, all others and the pixels next to any are
unknown, and all else is not the defect.

Example:
    defectcam pseudo-labels --weights out/weights --defect crack --data ../shared/data --sets deepcrack,uav75 \\
        --refine dark-lines --iterations 2 --out out/pseudo
    defectcam train --defect crack --data ../shared/data --sets deepcrack,uav75 --masks out/pseudo --out out/train/crack
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.paths import write_image
from defectcam.predict import Predictor, open_weights, paste
from defectcam.proposals import Proposal
from defectcam.settings import ITERATIONS_MAX
from defectcam.training.clicks import Click, simulate_clicks, split_stems
from defectcam.training.config import names
from defectcam.training.dark_lines import dark_lines
from defectcam.training.grabcut import grabcut
from defectcam.training.labels import UNKNOWN, LabelledSet, add_label_option, read_photo_rgb
from defectcam.training.sources import PSEUDO_RECORD

GAP_PX = 16  # px: pieces of one outline lie no farther apart, nor a click from its outline by half of it
AROUND_CLICK_PX = 16  # px: as far as the unknown reaches around a click without an outline
SURE_CONFIDENCE = 0.8  # of a proposal that is taken for the defect without any label
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


def sure_mask(proposals: Sequence[Proposal], size: tuple[int, int]) -> np.ndarray:
    """Grey levels as of `pseudo_mask` for a photo without any label; (H, W) uint8.

    Args:
        proposals: all, however doubtful.
        size: height and width of the photo, px.
    """
    sure, any_of_them = np.zeros(size, bool), np.zeros(size, bool)
    for proposal in proposals:
        paste(any_of_them, proposal.component)
        if proposal.confidence >= SURE_CONFIDENCE:
            paste(sure, proposal.component)
    result = np.where(grown(any_of_them, EDGE_PX), np.uint8(UNKNOWN), np.uint8(0))
    result[sure] = 255
    return result


class Labeller:
    """Writes the pseudo-labels of sets with one network at one T."""

    def __init__(self, predictor: Predictor, args: argparse.Namespace) -> None:
        self.predictor, self.args = predictor, args

    def mask(self, image_rgb: np.ndarray, clicks: Sequence[Click] | None) -> np.ndarray:
        """The mask of a photo, (H, W) uint8, from the clicks on the defect, or None where it was never looked at."""
        args, size = self.args, image_rgb.shape[:2]
        proposals = self.predictor.propose(image_rgb, args.defect, steps=args.iterations, threshold=0.0)
        if clicks is None:
            return sure_mask(proposals, size)
        outline = np.zeros(size, bool)
        for proposal in proposals:
            paste(outline, proposal.component)
        clicks_xy = [(click.x, click.y) for click in clicks]
        if args.refine == "dark-lines":
            outline = dark_lines(image_rgb, outline)
        elif args.refine == "grabcut":
            outline = grabcut(image_rgb, outline, clicks_xy)
        return pseudo_mask(outline, clicks_xy)

    def write_set(self, set_name: str, labelled: bool) -> int:
        """Write the masks of a set's train photos that are not there yet; returns the number of photos.

        Raises:
            ValueError, FileNotFoundError: naming what cannot be read right.
        """
        args = self.args
        files, by_photo = LabelledSet(args.data, set_name, args.defect, args.label_names), {}
        if labelled:
            clicks = simulate_clicks(
                args.data, set_name, "train", args.defect, 1, 0, args.seed, shows_defect=True, label_names=args.label_names
            )
            for click in clicks:
                by_photo.setdefault(click.image, []).append(click)
        stems = split_stems(args.data, set_name, "train")
        for stem in tqdm(stems, desc=set_name, unit="photo"):
            out, path = args.out / set_name / f"{stem}.png", files.photo(stem)
            if not out.exists():
                write_image(out, self.mask(read_photo_rgb(path), by_photo.get(str(path), []) if labelled else None))
        return len(stems)


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam pseudo-labels`."""
    parser = command_parser("pseudo-labels", __doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder from `defectcam calibrate`")
    parser.add_argument("--defect", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, default=[], help="sets whose train photos have clicks, simulated from their masks")
    parser.add_argument("--unlabelled-sets", type=names, default=[], help="sets whose train photos have no labels")
    add_label_option(parser)
    parser.add_argument("--iterations", type=int, help="climbing steps T (default: that of the weights)")
    parser.add_argument(
        "--refine", choices=("dark-lines", "grabcut"),
        help="of the proposals on photos with clicks what the photo shows: the dark lines (cracks), or the parts whose colours "
        "differ from what is around (spalls)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the simulated clicks, as in training")
    parser.add_argument("--out", type=Path, required=True, help="folder of <set>/<stem>.png to write")
    args = parser.parse_args(argv)
    if not args.sets and not args.unlabelled_sets:
        parser.error("name sets with --sets, --unlabelled-sets or both")
    if args.iterations is not None and not 0 <= args.iterations <= ITERATIONS_MAX:
        parser.error(f"--iterations is {args.iterations}; allowed is 0 to {ITERATIONS_MAX}")
    predictor = open_weights(args.weights)
    if args.defect not in predictor.defects:
        sys.exit(f"{args.weights} has no weights for {args.defect!r}; there are {predictor.defects}")
    if args.iterations is None:
        args.iterations = predictor.weights.configs[args.defect].iterations
    identity = {
        "defect": args.defect, "weights": predictor.weights.configs[args.defect].sha256, "sets": args.sets,
        "unlabelled_sets": args.unlabelled_sets, "label_names": args.label_names,
        "iterations": args.iterations, "refine": args.refine, "seed": args.seed,
    }  # fmt: skip
    record = args.out / PSEUDO_RECORD
    if record.exists() and (other := json.loads(record.read_text()).get("identity")) != identity:
        sys.exit(f"{args.out} holds masks of {other or 'an earlier version'}: choose another --out, or remove it")
    args.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"identity": identity, "finished": False}))
    labeller = Labeller(predictor, args)
    try:
        photos = sum(labeller.write_set(name, labelled=True) for name in args.sets)
        photos += sum(labeller.write_set(name, labelled=False) for name in args.unlabelled_sets)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    record.write_text(json.dumps({"identity": identity, "finished": True}))
    print(f"{photos} masks written: {args.out}")
