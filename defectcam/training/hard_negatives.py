"""Hard negatives: negative clicks where a network sees the defect on photos without it (beyond the paper).

Nearly all of a photo without the defect is easy: crops drawn evenly from it teach nothing about the few edges, joints and
shadows that become false proposals. What an annotator rejects is such a place. Before anything is rejected, the
photos known to be without the defect show them. The clicks are labels like any others: `defectcam train --clicks`.

Example:
    defectcam hard-negatives --defect crack --network out/train/crack --data ../shared/data \\
        --none-sets steelbridge440,cis_corrosion --out out/hard.csv
    defectcam train --defect crack --clicks out/hard.csv --init out/train/crack/best.safetensors ... --out out/train/crack2
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.network import ScoreNet, fold_batchnorm, fold_upsampling
from defectcam.pyramid import PhotoMaps, Pyramid, Reading
from defectcam.torch_engine import TorchEngine
from defectcam.training.clicks import Click, split_stems, write_clicks
from defectcam.training.config import names
from defectcam.training.labels import LabelledSet, add_label_option, read_photo_rgb
from defectcam.training.sources import stems_without
from defectcam.training.start import trained_network

LOOKED_AT_PX = 30_000_000  # of all photos together, in a random order: some minutes on a processor
PER_PHOTO = 20  # clicks at most; a photo with more is no better teacher
SPACING_PX = 24  # between clicks
PATCH_PX = 48  # what is known around a click
PATCH = np.ones((PATCH_PX + 1, PATCH_PX + 1), np.uint8)
ALL_LEVELS = Reading(1.0, 16, 1.0, (None,))


def hard_negatives(network: ScoreNet, image_rgb: np.ndarray, unknown: np.ndarray) -> list[tuple[int, int]]:
    """Pixels (x, y) where a network read per pixel sees the defect, the surest first, SPACING_PX apart.

    Args:
        image_rgb: (H, W, 3) uint8, a photo without the defect.
        unknown: (H, W) bool, where that is not known.
    """
    logits = np.where(unknown, -np.inf, merged_map(network, image_rgb, ALL_LEVELS))
    found = []
    while len(found) < PER_PHOTO:
        y, x = np.unravel_index(np.argmax(logits), logits.shape)
        if logits[y, x] <= 0:
            break
        found.append((int(x), int(y)))
        logits[max(0, y - SPACING_PX) : y + SPACING_PX, max(0, x - SPACING_PX) : x + SPACING_PX] = -np.inf
    return found


def merged_map(network: ScoreNet, image_rgb: np.ndarray, reading: Reading) -> np.ndarray:
    """The merged map of T = 0, (H, W) float32; the network is left as it is, free to learn."""
    device = str(network.head.weight.device)
    frozen = fold_upsampling(fold_batchnorm(copy.deepcopy(network).requires_grad_(False).eval()))
    return PhotoMaps(TorchEngine(frozen, device), reading, Pyramid(image_rgb)).merged()


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam hard-negatives`."""
    parser = command_parser("hard-negatives", __doc__)
    parser.add_argument("--defect", required=True)
    parser.add_argument("--network", type=Path, required=True, help="folder from `defectcam train`")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--none-sets", type=names, required=True, help="sets without the defect")
    add_label_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the photos, which ends at 30 megapixels")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of negative clicks")
    args = parser.parse_args(argv)
    try:
        network = trained_network(args.network).to("cuda" if torch.cuda.is_available() else "cpu")
        sets = {name: LabelledSet(args.data, name, args.defect, args.label_names) for name in args.none_sets}
        photos = [
            (name, stem) for name, files in sets.items()
            for stem in stems_without(files, split_stems(args.data, name, "train"))
        ]  # fmt: skip
        clicks, pixels = [], 0
        for index in tqdm(np.random.default_rng(args.seed).permutation(len(photos)).tolist(), unit="photo"):
            name, stem = photos[index]
            path = sets[name].photo(stem)
            image_rgb = read_photo_rgb(path)
            pixels += image_rgb.shape[0] * image_rgb.shape[1]
            if pixels > LOOKED_AT_PX and clicks:
                break
            # A patch may not reach into what is unknown either.
            unknown = cv2.dilate(sets[name].unfinished(stem, *image_rgb.shape[:2]).astype(np.uint8), PATCH) > 0
            found = hard_negatives(network, image_rgb, unknown)
            clicks += [Click(str(path), x, y, "none", args.defect, f"{name}/{stem}", patch_px=PATCH_PX) for x, y in found]
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_clicks(args.out, clicks)
    print(f"{len(clicks)} hard negatives on {len({click.image for click in clicks})} photos: {args.out}")
