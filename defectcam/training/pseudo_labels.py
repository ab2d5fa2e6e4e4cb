"""Pseudo-labels: a trained network's own proposals as the labels of a second round (paper, conclusion).

Photos with clicks: what the network proposes at T steps is kept where its pieces, from gap to gap, lead to a click, and
dropped elsewhere. The pixels next to that outline are unknown, and so are those around a click that no outline comes near.
All else is not the defect, so every defect of such a photo needs a click. Nothing but clicks goes in. `--refine` first brings
the proposals to the edges that the photo shows, since they are too wide after training from clicks: `dark-lines` for cracks,
`grabcut` for spalls.

Photos without any label (`--unlabelled-sets`): sure proposals are the defect, all others and the pixels next to any are
unknown, and all else is not the defect.

Example:
    defectcam pseudo-labels --weights out/weights --defect crack --clicks train.csv --refine dark-lines --out out/pseudo
    defectcam train --defect crack --clicks train.csv --val-clicks val.csv --masks out/pseudo --out out/train/crack2
    defectcam pseudo-labels --weights out/weights --defect spalling --data ../shared/data --sets phinet_labelled \\
        --refine grabcut --iterations 2 --out out/pseudo
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.paths import write_image
from defectcam.predict import Predictor, open_weights, paste
from defectcam.proposals import Proposal
from defectcam.settings import ITERATIONS_MAX
from defectcam.training.clicks import Click, patch_xyxy, simulate_clicks, split_stems
from defectcam.training.config import names
from defectcam.training.dark_lines import dark_lines
from defectcam.training.grabcut import grabcut
from defectcam.training.labels import UNKNOWN, LabelledSet, add_label_option, read_photo_rgb
from defectcam.training.sources import PSEUDO_RECORD, mask_of_clicked, own_clicks

GAP_PX = 16  # px: pieces of one outline lie no farther apart, nor a click from its outline by half of it
AROUND_CLICK_PX = 16  # px: as far as the unknown reaches around a click without an outline
SURE_CONFIDENCE = 0.8  # of a proposal that is taken for the defect without any label
NEGATIVE_CLICKS = 4  # simulated per photo, as many as the clicks arm of weights/README.md trains with,
NEGATIVE_PX = 16  # px, the side of their squares
UNSTATED_PX = 32  # px: so much around a negative click has nothing of the defect, where the click does not say how much
CORE_SHARE = 0.2  # GrabCut begins with what the network is sure of: theta raised by this share of the way to 1
EDGE_PX = 1  # px: so far outside an outline its edge may lie in truth; of more, networks learn wide outlines


def pseudo_mask(
    outline: np.ndarray, clicks_xy: Sequence[tuple[int, int]], patches_xyxy: Sequence[tuple[int, int, int, int]] = ()
) -> np.ndarray:
    """Grey levels 0 (not the defect), UNKNOWN and 255 (the defect) for training.

    Args:
        outline: (H, W) bool, the proposed defect.
        clicks_xy: the positive clicks, px.
        patches_xyxy: boxes of the negative clicks, half-open, px.

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
    for x0, y0, x1, y1 in patches_xyxy:
        result[y0:y1, x0:x1] = 0
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
        """The mask of a photo, (H, W) uint8, from its clicks, positive and negative, or None where it was never looked at."""
        args, size = self.args, image_rgb.shape[:2]
        if clicks is None:
            return sure_mask(self.proposals(image_rgb), size)
        clicks_xy = [(click.x, click.y) for click in clicks if click.defect != "none"]
        patches_xyxy = [patch_xyxy(click, UNSTATED_PX, *size) for click in clicks if click.defect == "none"]
        if args.refine == "grabcut":
            theta = self.predictor.weights.configs[args.defect].cam_threshold
            core = self.outline(image_rgb, theta + CORE_SHARE * (1 - theta))
            outline = grabcut(image_rgb, core, clicks_xy, patches_xyxy)
        else:
            outline = self.outline(image_rgb)
            if args.refine == "dark-lines":
                outline = dark_lines(image_rgb, outline)
        return pseudo_mask(outline, clicks_xy, patches_xyxy)

    def proposals(self, image_rgb: np.ndarray, theta: float | None = None) -> list[Proposal]:
        """All proposals, however doubtful; theta is the weights' own unless given."""
        return self.predictor.propose(
            image_rgb, self.args.defect, steps=self.args.iterations, threshold=0.0, cam_threshold=theta
        )

    def outline(self, image_rgb: np.ndarray, theta: float | None = None) -> np.ndarray:
        """The pixels of all proposals, (H, W) bool."""
        outline = np.zeros(image_rgb.shape[:2], bool)
        for proposal in self.proposals(image_rgb, theta):
            paste(outline, proposal.component)
        return outline

    def write_set(self, set_name: str, labelled: bool) -> int:
        """Write the masks of a set's train photos that are not there yet; returns the number of photos.

        Raises:
            ValueError, FileNotFoundError: naming what cannot be read right.
        """
        args = self.args
        files, by_photo = LabelledSet(args.data, set_name, args.defect, args.label_names), None
        if labelled:
            by_photo = clicks_by_photo(
                simulate_clicks(
                    args.data, set_name, "train", args.defect, NEGATIVE_PX, NEGATIVE_CLICKS, args.seed,
                    shows_defect=True, label_names=args.label_names,
                )
            )  # fmt: skip
        photos = {files.photo(stem): args.out / set_name / f"{stem}.png" for stem in split_stems(args.data, set_name, "train")}
        return self.write(photos, by_photo, set_name)

    def write_clicked(self) -> int:
        """Write the masks of the photos of `--clicks` that have one on the defect; as `write_set`.

        Of a photo with negative clicks alone nothing more is known.
        """
        by_photo = clicks_by_photo(own_clicks(self.args.clicks, "--clicks", self.args.defect))
        by_photo = {photo: clicks for photo, clicks in by_photo.items() if any(click.defect != "none" for click in clicks)}
        photos = {Path(photo): mask_of_clicked(self.args.out, Path(photo)) for photo in by_photo}
        return self.write(photos, by_photo, self.args.clicks.name)

    def write(self, photos: Mapping[Path, Path], by_photo: Mapping[str, Sequence[Click]] | None, what: str) -> int:
        """Write the masks that are not there yet; returns the number of photos.

        Args:
            photos: photo -> mask.
            by_photo: the clicks of each; None where no photo has labels.
            what: for the progress.
        """
        for path, mask in tqdm(photos.items(), desc=what, unit="photo"):
            if not mask.exists():
                clicks = None if by_photo is None else by_photo.get(str(path), [])
                write_image(mask, self.mask(read_photo_rgb(path), clicks))
        return len(photos)


def clicks_by_photo(clicks: Sequence[Click]) -> dict[str, list[Click]]:
    """Photo -> its clicks."""
    by_photo: dict[str, list[Click]] = {}
    for click in clicks:
        by_photo.setdefault(click.image, []).append(click)
    return by_photo


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam pseudo-labels`."""
    parser = command_parser("pseudo-labels", __doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder from `defectcam calibrate`")
    parser.add_argument("--defect", required=True)
    parser.add_argument("--clicks", type=Path, help="your own clicks, the file that `defectcam train --clicks` learnt from")
    parser.add_argument("--data", type=Path, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, default=[], help="sets whose train photos have clicks, simulated from their masks")
    parser.add_argument("--unlabelled-sets", type=names, default=[], help="sets whose train photos have no labels")
    add_label_option(parser)
    parser.add_argument("--iterations", type=int, help="climbing steps T (default: that of the weights)")
    parser.add_argument(
        "--refine", choices=("dark-lines", "grabcut"),
        help="bring outlines on photos with clicks to what the photo shows: dark lines (cracks), or other colours (spalls)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the simulated clicks")
    parser.add_argument("--out", type=Path, required=True, help="folder of <set>/<stem>.png to write")
    args = parser.parse_args(argv)
    if not args.sets and not args.unlabelled_sets and not args.clicks:
        parser.error("name photos with --clicks, --sets or --unlabelled-sets")
    if (args.sets or args.unlabelled_sets) and not args.data:
        parser.error("--sets and --unlabelled-sets need --data, the folder of the sets")
    if args.clicks and not args.clicks.is_file():
        parser.error(f"--clicks {args.clicks} is not there")
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
        "clicks_sha256": hashlib.sha256(args.clicks.read_bytes()).hexdigest() if args.clicks else None,
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
        photos += labeller.write_clicked() if args.clicks else 0
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    record.write_text(json.dumps({"identity": identity, "finished": True}))
    print(f"{photos} masks written: {args.out}")
