"""Crops around clicks: the classifier's training images (paper 4.1).

Five crops around every positive click and as many negative ones, drawn evenly from the none-clicks and, where there
are any, half of them from the network's mistakes; a binary set per defect. The paper's crops are 320 px; the network is fully convolutional, so smaller ones train it where
arithmetic is dear. A photo smaller than the crop gives the whole photo, scaled up to the crop's size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from defectcam.request import decode_image
from defectcam.training.clicks import Click, patch_bounds
from defectcam.training.labels import MAX_PIXELS, photo_bytes

CROPS_PER_CLICK = 5
COLOURS = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(brightness=0.35, contrast=0.6, saturation=0.3, hue=0.02)], 0.8),
        v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.5))], 0.2),
    ]
)


class CropDataset(Dataset):
    """An endless sequence of crops: draw k is always the same crop, and every epoch draws other positions.

    Draws 0, 2, 4, ... are positive, 1, 3, 5, ... negative, so any even number of neighbours is balanced; a run
    that was cut off goes on at its next draw.

    Args:
        clicks: positive and none-clicks of one defect.
        crop_px: side of the square crops.
        seed: together with the draw's number fixes every crop.
        augment: flips, quarter turns, scale, brightness, contrast, colour, blur, noise; off for validation.

    Attributes:
        mistakes: none-clicks of which every second negative draw is made, where there are any; none at first.

    Items: (image_rgb (3, crop_px, crop_px) uint8 tensor, label 0.0 or 1.0, weight 0.0 or more). A crop weighs as
    much as its click does against the mean of its kind, so the kinds stay balanced and equal weights are all 1.

    Raises:
        ValueError: one of the two kinds has no clicks, or only clicks of weight 0.
    """

    def __init__(
        self,
        clicks: list[Click],
        crop_px: int,
        seed: int,
        augment: bool,
    ) -> None:
        self.mistakes: Sequence[Click] = ()
        self.positives = [click for click in clicks if click.defect != "none"]
        self.negatives = [click for click in clicks if click.defect == "none"]
        if not self.positives or not self.negatives:
            raise ValueError(
                f"training needs clicks on the defect and none-clicks; got {len(self.positives)} and "
                f"{len(self.negatives)}"
            )
        self.mean_weight = {
            kind: sum(click.weight for click in own) / len(own)
            for kind, own in (("defect", self.positives), ("none", self.negatives))
        }
        if not all(self.mean_weight.values()):
            raise ValueError(f"all clicks of a kind weigh 0, mean weights are {self.mean_weight}: nothing to learn from")
        self.crop_px = crop_px
        self.seed = seed
        self.augment = augment
        self._photos: dict[str, np.ndarray] = {}

    @property
    def draws_per_epoch(self) -> int:
        """Five crops for every positive click and as many negative ones."""
        return 2 * CROPS_PER_CLICK * len(self.positives)

    def photo_rgb(self, path: str) -> np.ndarray:
        """The photo as (H, W, 3) uint8 RGB, decoded at the first look."""
        if path not in self._photos:
            self._photos[path] = on_disk(read_photo_rgb(path))
        return self._photos[path]

    def __getitem__(self, draw: int) -> tuple[torch.Tensor, float, float]:
        rng = np.random.default_rng((self.seed, draw))
        positive = draw % 2 == 0
        mean_weight = self.mean_weight["defect" if positive else "none"]
        if positive:
            epoch, position = divmod(draw, self.draws_per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.draws_per_epoch // 2)
            click = self.positives[order[position // 2] // CROPS_PER_CLICK]
        elif self.mistakes and draw % 4 == 1:
            click, mean_weight = self.mistakes[int(rng.integers(len(self.mistakes)))], 1.0
        else:  # evenly from the none-clicks: every photo's turn comes, whatever its number of clicks
            click = self.negatives[int(rng.integers(len(self.negatives)))]
        weight = click.weight / mean_weight
        photo = self.photo_rgb(click.image)
        x, y, size = click.x, click.y, self.crop_px
        if self.augment and positive:
            size = int(round(size * rng.uniform(0.75, 1.25)))
        elif self.augment:  # a none-click says something of its patch alone: never look beyond it
            size = int(round(size * rng.uniform(0.75, 1.0)))
        # A positive crop may have its click anywhere but at its rim; a negative one stays around its click.
        reach = 0.4 * size if positive else 0.0
        x += int(rng.uniform(-reach, reach))
        y += int(rng.uniform(-reach, reach))
        height, width = photo.shape[:2]
        x0, x1 = patch_bounds(x, size, width)
        y0, y1 = patch_bounds(y, size, height)
        crop = photo[y0:y1, x0:x1]
        if crop.shape[:2] != (self.crop_px, self.crop_px):
            shrinks = crop.shape[0] >= self.crop_px
            crop = cv2.resize(
                crop, (self.crop_px, self.crop_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            )
        if not self.augment:
            return torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1), float(positive), weight
        crop = turned(crop, int(rng.integers(4)), bool(rng.integers(2)))
        image = varied_colours(torch.from_numpy(crop).permute(2, 0, 1), int(rng.integers(2**31)))
        return image, float(positive), weight


def read_photo_rgb(path: Path | str) -> np.ndarray:
    """A photo as (H, W, 3) uint8 RGB, as the deployed function sees it: upright, deep grey scaled by its maximum.

    Raises:
        FileNotFoundError: there is none, or no access to it.
        ImageError: it cannot be decoded; the message begins with its path.
    """
    with photo_bytes(path) as file:
        return decode_image(file, MAX_PIXELS)


def on_disk(array: np.ndarray) -> np.ndarray:
    """The same array, mapped from a temporary file that goes with it.

    Hundreds of photos of 25 megapixels do not fit in memory: like this as many stay there as there is room for.
    """
    with tempfile.TemporaryFile() as file:
        array.tofile(file)
        return np.memmap(file, array.dtype, "c", shape=array.shape)


def turned(array: np.ndarray, quarter_turns: int, mirrored: bool) -> np.ndarray:
    """A photo or mask (H, W, ...) turned, and mirrored if so; contiguous."""
    array = np.rot90(array, quarter_turns)
    return np.ascontiguousarray(array[:, ::-1] if mirrored else array)


def varied_colours(image_rgb: torch.Tensor, seed: int) -> torch.Tensor:
    """The image (3, H, W) uint8 under another light and lens: colours, contrast, blur."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return COLOURS(image_rgb)
