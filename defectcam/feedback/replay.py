"""The replay pack: crops of photos that the weights learnt from, for `defectcam adapt` to learn them again beside new ones.

A user who adapts weights does not have the photos that made them. Without such photos, the weights forget old sites a little. A
pack is small, and holds parts of photos that everybody may have. It lies beside the weights, laid out as a set for training:

WEIGHTS/replay/DEFECT/images/*.jpg, masks/DEFECT/*.png

The photos are spread evenly over the train photos that show the defect. Each gives a square around a pixel of the defect. Its
side is between CROP_PX and the photo's height or width, and it is reduced to CROP_PX.

Example:
    defectcam replay --defect crack --data ../shared/data --sets uav_kaggle315 --out weights
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from defectcam.command_line import command_parser
from defectcam.paths import file_name, write_image, write_rgb
from defectcam.training.calibrate import say, spread
from defectcam.training.clicks import patch_bounds
from defectcam.training.config import TrainConfig, names
from defectcam.training.dataset import PhotoLabels, on_disk
from defectcam.training.labels import UNKNOWN, add_label_option
from defectcam.training.sources import gather, read_all

FOLDER = "replay"
CROP_PX = 320
CROPS = 24  # of a defect, one megabyte


def read_pack(weights: Path, defect: str) -> list[PhotoLabels]:
    """The crops of a defect with their outlines; none where the weights have no pack."""
    name = file_name(defect)
    if not (weights / FOLDER / name).is_dir():
        return []
    return list(read_all(gather(TrainConfig(defect, weights / FOLDER, sets=(name,)), "train"), "replay pack"))


def crop_of(photo: PhotoLabels, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A square around a pixel of the defect, (CROP_PX, CROP_PX, 3) uint8 RGB, and its mask, 255 the defect.

    A smaller photo gives its largest square.
    """
    height, width = photo.outline.shape
    most = min(height, width)
    size = round(float(np.exp(rng.uniform(*np.log([min(CROP_PX, most), most])))))
    y, x = divmod(int(rng.choice(np.flatnonzero(photo.outline == 255))), width)
    part = slice(*patch_bounds(y, size, height)), slice(*patch_bounds(x, size, width))
    image_rgb, mask = photo.image_rgb[part], np.where(photo.outline[part] == 255, np.uint8(255), np.uint8(0))
    if size > CROP_PX:
        image_rgb, mask = (cv2.resize(array, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA) for array in (image_rgb, mask))
    return np.ascontiguousarray(image_rgb), np.where(mask > 127, np.uint8(255), np.uint8(0))


def write_pack(config: TrainConfig, out: Path) -> int:
    """Make the pack of a defect anew from the train photos of some sets; returns the number of crops.

    Raises:
        ValueError, FileNotFoundError: labels that cannot be read right, or that show the defect nowhere.
    """
    found = [photo for photo in on_disk(read_all(gather(config, "train"), "photos")) if photo.shows_defect]
    if not found:
        raise ValueError(f"no train photo of {', '.join(config.sets)} shows {config.defect!r}: name other --sets")
    if any((photo.outline == UNKNOWN).any() for photo in found):
        raise ValueError(f"photos of {', '.join(config.sets)} are finished in part only: a pack needs whole ones")
    folder, rng = out / FOLDER / file_name(config.defect), np.random.default_rng(config.seed)
    shutil.rmtree(folder, ignore_errors=True)
    chosen = spread(found, CROPS)
    for number, photo in enumerate(chosen):
        image_rgb, mask = crop_of(photo, rng)
        write_rgb(folder / "images" / f"{number:02}.jpg", image_rgb)
        write_image(folder / "masks" / config.defect / f"{number:02}.png", mask)
    return len(chosen)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam replay`."""
    parser = command_parser("replay", __doc__)
    parser.add_argument("--defect", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets")
    parser.add_argument("--sets", type=names, required=True, help="sets with the defect's outlines that everybody may have")
    add_label_option(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the weights folder")
    args = parser.parse_args(argv)
    if not (args.out / "manifest.json").is_file():
        parser.error(f"--out {args.out} has no manifest.json: name a weights folder")
    try:
        config = TrainConfig(args.defect, args.data, sets=tuple(args.sets), label_names=args.label_names, seed=args.seed)
        say(f"written: {write_pack(config, args.out)} crops of {args.defect} in {args.out / FOLDER}")
    except (ValueError, OSError) as error:
        sys.exit(str(error))
