"""Train a network from masks, read per pixel, at random scale (paper, conclusion; beyond it).

It learns from masks, in one of two arms that every table names:

clicks      masks are proposals of a network that learnt from clicks (`defectcam pseudo-masks`): nothing but clicks.
outlines    masks are finished outlines: those of the data sets, or the shapes of completed CVAT jobs.

Example:
    defectcam train-outline --arm outlines --defect crack --data ../shared/data --sets deepcrack,uav75 \\
        --encoder efficientnet-lite0 --encoder-weights imagenet --scales 0.35,2.5 --lr 5e-4 --steps 2600 --out out/train/crack
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage.filters import rank
from skimage.morphology import disk
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from defectcam.encoders import normalised
from defectcam.network import ScoreNet
from defectcam.training.clicks import split_stems
from defectcam.training.crops import on_disk, read_photo_rgb, turned, varied_colours
from defectcam.training.labels import UNKNOWN, LabelledSet, read_own_mask
from defectcam.training.mistakes import ALL_LEVELS, ONE_LEVEL, mistaken_pixels, plain_map
from defectcam.training.train import add_common_arguments, fit, mistakes_fact, names, network_from, parsed

ON_DEFECT_SHARE = 0.5  # of the crops are around a defect's pixel, the others anywhere
LIKELIEST_SHARE = 0.25  # of an outline that runs wide is taken for the defect: what is 2 to 5 times too thick holds that much
SMALLEST_WINDOW_PX = 24  # of the photo: what is enlarged from less shows no defect
RIM_PX = 4  # around the regions of another defect
AROUND_PX = 15  # radius in which the likeliest pixels are looked for: a faint stretch of a crack has its own


@dataclass(frozen=True)
class OutlinePhoto:
    """A photo with what is known of it.

    Attributes:
        image_rgb: (H, W, 3) uint8.
        coverage: (H, W) uint8, the defect's share of each pixel, 255 = all of it.
        known: (H, W) bool, False where the mask says nothing.
    """

    image_rgb: np.ndarray
    coverage: np.ndarray
    known: np.ndarray


def load_outline_photo(photo: Path, mask: Path | None) -> OutlinePhoto:
    """Read a photo and its mask that this project wrote (None: it has no defect), of values 0, 255 and UNKNOWN.

    Raises:
        FileNotFoundError: naming the photo that is not there.
        ValueError: where one of them cannot be read, or both differ in size.
    """
    image_rgb = read_photo_rgb(photo)
    size = image_rgb.shape[:2]
    return _outlined(image_rgb, np.zeros(size, np.uint8) if mask is None else read_own_mask(mask, *size))


def load_labelled_photo(files: LabelledSet, stem: str) -> OutlinePhoto:
    """Read a photo of a data set and its mask; without one it has no defect. Errors as of `LabelledSet`."""
    image_rgb = read_photo_rgb(files.photo(stem))
    mask = files.read_mask(stem, *image_rgb.shape[:2])
    return _outlined(image_rgb, np.zeros(image_rgb.shape[:2], np.uint8) if mask is None else mask * np.uint8(255))


def _outlined(image_rgb: np.ndarray, values: np.ndarray) -> OutlinePhoto:
    coverage = np.where(values > UNKNOWN, 255, 0).astype(np.uint8)
    return OutlinePhoto(on_disk(image_rgb), on_disk(coverage), on_disk(values != UNKNOWN))


def narrowed(network: ScoreNet, photo: OutlinePhoto) -> OutlinePhoto:
    """The same photo; inside its outlines the likeliest pixels count as the defect, the others as unknown.

    For masks that hold the defect, but run wide of its edge. What lies outside them stays known to be without it.

    Args:
        network: read per pixel; of the pixels inside a mask within AROUND_PX of each other those with the highest
            logits are kept, LIKELIEST_SHARE of them.
    """
    inside = photo.coverage > UNKNOWN
    if not inside.any():
        return photo
    logits = plain_map(network, photo.image_rgb, ONE_LEVEL)
    levels = np.interp(logits, (-8, 8), (0, 255)).round().astype(np.uint8)
    least = rank.percentile(levels, disk(AROUND_PX), mask=inside, p0=1 - LIKELIEST_SHARE)
    likely = inside & (levels >= least)
    coverage = np.where(likely, 255, 0).astype(np.uint8)
    return OutlinePhoto(photo.image_rgb, on_disk(coverage), on_disk(photo.known & (likely | (photo.coverage == 0))))


class OutlineDataset(Dataset):
    """An endless sequence of crops with their masks: draw k is always the same one.

    Args:
        with_defect, without: photos with the defect and without it. Crops of these are 3 in 10 of the draws, 4 in 10
            with `mistakes`. Every photo has the same chance: were it larger for large photos, small ones would nearly
            always show the defect, and the network would learn how a small photo looks.
        crop_px: side of the square crops.
        seed: together with the draw's number fixes every crop.
        mistakes: of each photo without the defect the pixels (flat indices) of which half of these draws are made.
        scales: least and largest factor by which what a crop shows is resized, drawn log-uniformly: a spall may be
            40 or 4000 px wide. A crop shows at most the largest square of the photo.

    Items: (image_rgb (3, crop_px, crop_px) uint8, coverage (crop_px, crop_px) float 0..1, known, the same, 0 or 1).
    """

    def __init__(
        self,
        with_defect: Sequence[OutlinePhoto],
        without: Sequence[OutlinePhoto],
        crop_px: int,
        seed: int,
        mistakes: Sequence[np.ndarray] = (),
        scales: tuple[float, float] = (0.7, 1.4),
    ) -> None:
        if not with_defect:
            raise ValueError("training outlines needs photos with the defect, got none")
        self.mistakes, self.mistaken = mistakes, [index for index, pixels in enumerate(mistakes) if len(pixels)]
        self.with_defect, self.without = with_defect, without
        self.crop_px, self.seed, self.scales = crop_px, seed, scales
        self.defect_pixels = [
            on_disk(np.flatnonzero(photo.coverage > UNKNOWN).astype(np.int32)) for photo in with_defect
        ]

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, draw))
        on_pixel = rng.random() < ON_DEFECT_SHARE
        if self.without and draw % 10 >= (6 if self.mistaken else 7):
            some = self.mistaken if self.mistaken and on_pixel else range(len(self.without))
            index = some[int(rng.integers(len(some)))]
            photo, pixels = self.without[index], self.mistakes[index] if self.mistaken else np.empty(0)
        else:
            epoch, position = divmod(draw, len(self.with_defect))
            index = np.random.default_rng((self.seed, epoch)).permutation(len(self.with_defect))[position]
            photo, pixels = self.with_defect[index], self.defect_pixels[index]
        height, width = photo.coverage.shape
        if len(pixels) and on_pixel:
            y, x = divmod(int(pixels[rng.integers(len(pixels))]), width)
        else:
            y, x = int(rng.integers(height)), int(rng.integers(width))
        scale = float(np.exp(rng.uniform(*np.log(self.scales))))
        size = min(max(round(self.crop_px / scale), SMALLEST_WINDOW_PX), height, width)
        x0, y0 = (
            min(max(center + int(rng.uniform(-0.4, 0.4) * size) - size // 2, 0), length - size)
            for center, length in ((x, width), (y, height))
        )
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))

        def cut(array: np.ndarray, interpolation: int) -> np.ndarray:
            part = array[y0 : y0 + size, x0 : x0 + size]
            return turned(cv2.resize(part, (self.crop_px, self.crop_px), interpolation=interpolation), turns, mirrored)

        smooth = cv2.INTER_AREA if size > self.crop_px else cv2.INTER_LINEAR
        image = torch.from_numpy(cut(photo.image_rgb, smooth)).permute(2, 0, 1)
        coverage = torch.from_numpy(cut(photo.coverage, smooth)).float() / 255
        known = torch.from_numpy(cut(photo.known.astype(np.uint8), cv2.INTER_NEAREST)).float()
        return noisy(varied_colours(image, int(rng.integers(2**31))), rng), coverage, known


def noisy(image_rgb: Tensor, rng: np.random.Generator) -> Tensor:
    """The image (3, H, W) uint8, in 3 of 10 draws with the noise of a sensor."""
    if rng.random() >= 0.3:
        return image_rgb
    noise = torch.from_numpy(rng.normal(0, rng.uniform(2, 8), image_rgb.shape).astype(np.float32))
    return (image_rgb + noise).round().clamp(0, 255).to(torch.uint8)


class OutlineLoss(nn.Module):
    """Binary cross-entropy plus soft Dice over the known pixels of a batch.

    Cross-entropy makes the probabilities honest, Dice keeps thin defects from being outvoted by their background.
    """

    def __init__(self, network: ScoreNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_rgb: Tensor, coverage: Tensor, known: Tensor) -> Tensor:
        """Scalar loss; images (N, 3, H, W) uint8, coverage (N, H, W) 0..1, known (N, H, W) 0 or 1."""
        logits = self.network.score_map(normalised(images_rgb)).float()
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, coverage, reduction="none")
        found, wanted = logits.sigmoid() * known, coverage * known
        dice = 1 - (2 * (found * wanted).sum() + 1) / (found.sum() + wanted.sum() + 1)
        return (entropy * known).sum() / known.sum().clamp(min=1) + dice


def pixel_iou(network: ScoreNet, photos: Sequence[OutlinePhoto]) -> float:
    """Intersection over union of all photos' pixels together, at logit 0 of the merged map.

    What is found on photos without the defect counts as found in the wrong place.
    """
    both = either = 0
    for photo in photos:
        found = plain_map(network, photo.image_rgb, ALL_LEVELS) > 0
        wanted = photo.coverage > UNKNOWN
        both += int((found & wanted & photo.known).sum())
        either += int(((found | wanted) & photo.known).sum())
    return both / max(either, 1)


def gather_photos(
    args: argparse.Namespace, sets: Sequence[str], split: str, masks: Path | None
) -> list[OutlinePhoto]:
    """Photos of some sets; `masks` is a folder of <set>/<stem>.png, None for the sets' own masks."""
    photos = []
    for set_name in sets:
        files, stems = LabelledSet(args.data, set_name, args.defect), split_stems(args.data, set_name, split)
        may_lack = args.arm == "clicks" or set_name in args.none_sets  # no click says that the defect is there
        if not masks and set_name not in args.none_sets:
            files.check_masks(stems)
        for stem in tqdm(stems, desc=f"{set_name} {split}", unit="photo"):
            if masks:
                mask = masks / set_name / f"{stem}.png"
                if mask.exists() or may_lack:  # else not known: no mask was made for it
                    photos.append(load_outline_photo(files.photo(stem), mask if mask.exists() else None))
            elif files.mask(stem) or may_lack:
                photos.append(load_labelled_photo(files, stem))
            else:
                raise FileNotFoundError(
                    f"{files.photo(stem)} has no mask of {args.defect}: a photo without it has an all black one"
                )
    return photos


def regions_without(args: argparse.Namespace) -> list[OutlinePhoto]:
    """Photos with regions of another defect: these and their rims are known to be without this one, the rest is unknown.

    The rim of a spall looks like a crack but is not a crack. The concrete beside it may have cracks without a mark.
    """
    photos = []
    for set_name, other in args.none_regions:
        files = LabelledSet(args.data, set_name, other)
        for stem in tqdm(split_stems(args.data, set_name, "train"), desc=f"{set_name} {other}", unit="photo"):
            if not files.mask(stem):
                continue
            photo = load_labelled_photo(files, stem)
            inside = (photo.coverage > UNKNOWN).astype(np.uint8)
            if inside.any():
                around = cv2.dilate(inside, np.ones((2 * RIM_PX + 1, 2 * RIM_PX + 1), np.uint8)) > 0
                photos.append(OutlinePhoto(photo.image_rgb, on_disk(np.zeros_like(photo.coverage)), on_disk(around)))
    return photos


def train_photos(args: argparse.Namespace) -> list[OutlinePhoto]:
    """The photos to learn from as the arguments say; of the sets without the defect those that show none."""
    photos = gather_photos(args, args.sets, "train", args.masks)
    if args.wide_sets:
        network = network_from(args).eval()
        wide = gather_photos(args, args.wide_sets, "train", args.masks)
        photos += [narrowed(network, photo) for photo in tqdm(wide, desc="wide outlines", unit="photo")]
    none = [photo for photo in gather_photos(args, args.none_sets, "train", args.masks) if not photo.coverage.any()]
    return photos + none + regions_without(args)


def masks_sha256(photos: Sequence[OutlinePhoto]) -> str:
    """Hash of the photos' masks, hexadecimal."""
    pixels = hashlib.sha256()
    for photo in photos:
        pixels.update(np.ascontiguousarray(photo.coverage))
    return pixels.hexdigest()


def train_outline(args: argparse.Namespace, photos: Sequence[OutlinePhoto]) -> dict:
    """Train on photos as the arguments say; returns and writes the record of the run."""
    with_defect = [photo for photo in photos if (photo.coverage > UNKNOWN).any()]
    without = [photo for photo in photos if not photo.coverage.any()]
    rng = np.random.default_rng(args.seed)
    val = [photo for photo in gather_photos(args, args.sets, "val", None) if (photo.coverage > UNKNOWN).any()]
    val = [val[index] for index in rng.permutation(len(val))[: args.val_photos]]
    network = network_from(args)
    mistakes: list[np.ndarray] = []
    if args.mistakes:
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        found = mistaken_pixels(network.eval(), [photo.image_rgb for photo in without], args.seed)
        mistakes = [pixels[photo.known.ravel()[pixels]] for photo, pixels in zip(without, found)]
        healthy = [photo for photo in gather_photos(args, args.none_sets, "val", None) if not photo.coverage.any()]
        val += [healthy[index] for index in rng.permutation(len(healthy))[: args.val_photos // 2]]
    facts = {"arm": args.arm, "photos": len(with_defect), "photos_without": len(without)}
    facts |= {"masks_sha256": masks_sha256(with_defect), "val_masks_sha256": masks_sha256(val)}
    facts |= {"scales": list(args.scales)} | ({"wide_sets": args.wide_sets} if args.wide_sets else {})
    facts |= ({"none_regions": [":".join(pair) for pair in args.none_regions]} if args.none_regions else {}) | mistakes_fact(args)
    return fit(
        args,
        OutlineLoss(network),
        OutlineDataset(with_defect, without, args.crop_px, args.seed, mistakes, args.scales),
        lambda network: {"val_iou": pixel_iou(network, val)},
        "val_iou",
        facts,
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="defectcam train-outline",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arm", choices=("clicks", "outlines"), required=True)
    parser.add_argument("--masks", type=Path, help="folder of <set>/<photo>.png, from `defectcam pseudo-masks` or `weak-labels`")
    parser.add_argument(
        "--wide-sets",
        type=names,
        default=[],
        help="further sets whose outlines run wide: of these what the network of --init finds likeliest is learnt, the rest not",
    )
    parser.add_argument(
        "--none-regions",
        type=lambda text: [tuple(pair.split(":", 1)) for pair in names(text)],
        default=[],
        help="SET:DEFECT,...: regions of another defect, such as phinet_labelled:spalling, which are none of this one",
    )
    parser.add_argument(
        "--scales",
        type=lambda text: tuple(map(float, text.split(","))),
        default=(0.7, 1.4),
        help="least and largest factor by which a crop is resized, drawn log-uniformly (default 0.7,1.4)",
    )
    parser.add_argument("--val-photos", type=int, default=40, help="photos with the defect that the best checkpoint is chosen on; with --mistakes half as many without, too")
    add_common_arguments(parser, crop_px=96, batch=8, val_every=250)
    args = parsed(parser, argv)
    if len(args.scales) != 2 or not 0.01 <= args.scales[0] <= args.scales[1] <= 10:
        parser.error(f"--scales is {','.join(map(str, args.scales))}; two factors from 0.01 to 10 are needed, the least first")
    if any(len(pair) != 2 for pair in args.none_regions):
        parser.error("--none-regions needs SET:DEFECT, such as phinet_labelled:spalling")
    record = args.masks / "pseudo.json" if args.masks else None
    if record and record.exists() and not json.loads(record.read_text())["finished"]:
        # A photo without a mask would be taken for one without the defect.
        parser.error(f"--masks {args.masks} is not complete: run `defectcam pseudo-masks` once more, it goes on there")
    if args.wide_sets and not args.init:
        parser.error("--wide-sets needs --init: only a trained network can tell what of a wide outline is the defect")
    if args.arm == "clicks" and args.masks is None:
        parser.error("--arm clicks needs --masks: only `--arm outlines` may learn from the sets' own masks")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam train-outline`."""
    args = parse_args(argv)
    try:
        done = train_outline(args, train_photos(args))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"best IoU on val {done['best_val']:.3f} after {done['minutes']} minutes")
