"""Crops of photos with what is known of them: the training images (paper 4.1).

A photo may be labelled by an outline, by clicks, or by both, and only in part. Whatever the label, a crop is an image with
what is known of its pixels. Crops are drawn around clicks and around pixels of outlined defects, at random scale: a spall may
be 40 or 4000 px wide. A crop that is larger than its photo shows all of it, the photo's edge repeated beyond, as the pyramid's
coarse levels do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from defectcam.tiling import cut
from defectcam.training.clicks import Click, patch_bounds
from defectcam.training.labels import UNKNOWN

ON_CLICK_SHARE = 0.5  # of the crops without the defect are around negative clicks, the others on photos without it
SMALLEST_WINDOW_PX = 24  # of the photo: what is enlarged from less shows no defect
LARGEST_WINDOW = 2.0  # times the photo's longer side: of a larger crop less than a quarter would be photo
DEFECT_PIXELS = 20_000  # of each photo, to draw crops around
NOISE_SHARE = 0.3  # of the crops get the noise of a sensor
COLOURS = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(brightness=0.35, contrast=0.6, saturation=0.3, hue=0.02)], 0.8),
        v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.5))], 0.2),
    ]
)


@dataclass(frozen=True, eq=False)
class PhotoLabels:
    """A photo with what is known of it for one defect.

    Attributes:
        image_rgb: (H, W, 3) uint8.
        outline: (H, W) uint8, 255 the defect, 0 not, UNKNOWN where nothing is known; None where there are only clicks.
        clicks: on this photo; positive ones are of this defect.
    """

    image_rgb: np.ndarray
    outline: np.ndarray | None = None
    clicks: tuple[Click, ...] = ()

    @property
    def positive(self) -> tuple[Click, ...]:
        """Clicks on the defect."""
        return tuple(click for click in self.clicks if click.defect != "none")

    @property
    def negative(self) -> tuple[Click, ...]:
        """Clicks where it is not."""
        return tuple(click for click in self.clicks if click.defect == "none")

    @property
    def shows_defect(self) -> bool:
        """Whether the outline says so."""
        return self.outline is not None and bool((self.outline == 255).any())


def on_disk(photos: Iterable[PhotoLabels], folder: Path | None = None) -> list[PhotoLabels]:
    """The same photos, their arrays mapped from one temporary file: hundreds of 25 megapixels do not fit in memory.

    Args:
        folder: where the file lies, None for the system's. It has no name and goes with the photos.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        shapes, clicks = [], []
        for photo in photos:
            file.write(np.ascontiguousarray(photo.image_rgb).data)
            if photo.outline is not None:
                file.write(np.ascontiguousarray(photo.outline).data)
            shapes.append((photo.image_rgb.shape, photo.outline is not None))
            clicks.append(photo.clicks)
        file.flush()
        pixels = np.memmap(file, np.uint8, "r", shape=(file.tell(),)) if shapes else np.empty(0, np.uint8)
    start, found = 0, []
    for ((height, width, _), outlined), own in zip(shapes, clicks):
        area = height * width
        image_rgb = pixels[start : start + 3 * area].reshape(height, width, 3)
        start += 3 * area
        outline = pixels[start : start + area].reshape(height, width) if outlined else None
        start += area * outlined
        found.append(PhotoLabels(image_rgb, outline, own))
    return found


class CropDataset(Dataset):
    """An endless sequence of crops: draw k is always the same one, so a run that was cut off goes on at its next draw.

    Draws without the defect come at even distances, so every run of draws is balanced. Draws with it go through outlined
    photos and positive clicks in random order, over and over. Draws without it take every photo with the same chance: were
    it larger for large photos, small ones would nearly always show the defect, and the network would learn how a small
    photo looks.

    Args:
        photos: their positive clicks count where they have no outline, their negative clicks always.
        crop_px: side of the square crops.
        seed: together with the draw's number fixes every crop.
        scales: least and largest factor by which what a crop shows is resized, drawn log-uniformly.
        negative_share: of the crops are without the defect, 0..1, if any photo allows it.
        on_defect_share: of the crops of outlined photos are around a pixel of the defect, the others anywhere.
        augment: flips, quarter turns, scale, brightness, contrast, colour, blur, noise; off for validation.

    Items: image_rgb (3, crop_px, crop_px) uint8; coverage, known, clicked (crop_px, crop_px) float; holds, weight: see
    `losses.PartialLabelLoss`. A crop weighs as much as its click does against the mean of its kind.

    Raises:
        ValueError: nothing shows the defect, or all clicks of a kind weigh 0.
    """

    def __init__(
        self,
        photos: Sequence[PhotoLabels],
        crop_px: int,
        seed: int,
        scales: tuple[float, float] = (1.0, 1.0),
        negative_share: float = 0.3,
        on_defect_share: float = 0.5,
        augment: bool = True,
    ) -> None:
        self.photos, self.crop_px, self.seed, self.augment = photos, crop_px, seed, augment
        self.scales, self.negative_share, self.on_defect_share = scales, negative_share, on_defect_share
        self.positives: list[tuple[int, Click | None]] = []  # a photo with an outline, or a click on it
        self.without: list[int] = []
        for index, photo in enumerate(photos):
            if photo.outline is None:
                self.positives += [(index, click) for click in photo.positive]
            else:
                (self.positives.append((index, None)) if photo.shows_defect else self.without.append(index))
        self.clicked = [index for index, photo in enumerate(photos) if photo.negative]
        if not self.positives:
            raise ValueError("training needs photos with the defect, or clicks on it; got none")
        self.mean_weight = {
            kind: _mean_weight(kind, [click for photo in photos for click in getattr(photo, kind)])
            for kind in ("positive", "negative")
        }
        self.defect_pixels = {
            index: _some_pixels(photos[index].outline, seed) for index, click in self.positives if click is None
        }

    def shows(self, draw: int) -> bool:
        """Whether a draw is one with the defect."""
        return self._with_defect_before(draw + 1) > self._with_defect_before(draw)

    def _with_defect_before(self, draw: int) -> int:
        """Number of earlier draws with the defect."""
        share = self.negative_share if self.without or self.clicked else 0.0
        return draw - int(draw * share + 1e-6)

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
        rng = np.random.default_rng((self.seed, draw))
        center = self._positive_center(draw, rng) if self.shows(draw) else self._negative_center(rng)
        index, (x, y), click, jitter = center
        photo = self.photos[index]
        height, width = photo.image_rgb.shape[:2]
        scale = float(np.exp(rng.uniform(*np.log(self.scales)))) if self.augment else 1.0
        size = min(max(round(self.crop_px / scale), SMALLEST_WINDOW_PX), round(LARGEST_WINDOW * max(height, width)))
        if click and click.defect == "none":  # it says something of its patch alone: never look beyond that
            size = min(size, click.patch_px or self.crop_px)
        x0, y0 = (
            patch_bounds(at + int(rng.uniform(-jitter, jitter) * size), size, length)[0]
            if size <= length
            else -int(rng.integers(size - length + 1))
            for at, length in ((x, width), (y, height))
        )
        crop = _Crop(photo, x0, y0, size, self.crop_px)
        arrays = [crop.image_rgb(), *crop.labels()]
        weight, holds = 1.0, -1.0
        if click:
            kind = "negative" if click.defect == "none" else "positive"
            weight = click.weight / self.mean_weight[kind]
            holds = float(kind == "positive") if photo.outline is None else -1.0
        if self.augment:
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            arrays = [rotated_flipped(array, turns, mirrored) for array in arrays]
        image = torch.from_numpy(arrays[0]).permute(2, 0, 1)
        if self.augment:
            image = noisy(colour_jittered(image, int(rng.integers(2**31))), rng)
        return image, *map(torch.from_numpy, arrays[1:]), holds, weight

    def _positive_center(self, draw: int, rng: np.random.Generator) -> tuple[int, tuple[int, int], Click | None, float]:
        """Photo, pixel (x, y), click and jitter of a draw with the defect."""
        epoch, position = divmod(self._with_defect_before(draw), len(self.positives))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.positives))
        index, click = self.positives[order[position]]
        if click:  # it may lie anywhere in the crop but at its rim
            return index, (click.x, click.y), click, 0.4
        height, width = self.photos[index].outline.shape
        if rng.random() < self.on_defect_share:
            pixels = self.defect_pixels[index]
            y, x = divmod(int(pixels[rng.integers(len(pixels))]), width)
        else:
            y, x = int(rng.integers(height)), int(rng.integers(width))
        return index, (x, y), None, 0.4

    def _negative_center(self, rng: np.random.Generator) -> tuple[int, tuple[int, int], Click | None, float]:
        """The same of a draw without it."""
        if self.clicked and (not self.without or rng.random() < ON_CLICK_SHARE):
            index = self.clicked[int(rng.integers(len(self.clicked)))]
            clicks = self.photos[index].negative
            click = clicks[int(rng.integers(len(clicks)))]
            return index, (click.x, click.y), click, 0.0
        index = self.without[int(rng.integers(len(self.without)))]
        height, width = self.photos[index].outline.shape
        return index, (int(rng.integers(width)), int(rng.integers(height))), None, 0.4


class _Crop:
    """The square of `size` px at (x0, y0) of a photo, resized to `crop_px`."""

    def __init__(self, photo: PhotoLabels, x0: int, y0: int, size: int, crop_px: int) -> None:
        self.photo, self.x0, self.y0, self.size, self.crop_px = photo, x0, y0, size, crop_px
        self.smooth = cv2.INTER_AREA if size > crop_px else cv2.INTER_LINEAR

    def _cut(self, array: np.ndarray) -> np.ndarray:
        return cut(array, (self.y0, self.y0 + self.size, self.x0, self.x0 + self.size))

    def _resized(self, part: np.ndarray, interpolation: int) -> np.ndarray:
        if self.size == self.crop_px:
            return np.ascontiguousarray(part)
        return cv2.resize(part, (self.crop_px, self.crop_px), interpolation=interpolation)

    def image_rgb(self) -> np.ndarray:
        """(crop_px, crop_px, 3) uint8."""
        return self._resized(self._cut(self.photo.image_rgb), self.smooth)

    def labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coverage, known and clicked, (crop_px, crop_px) float32 each."""
        coverage, known, clicked = (np.zeros((self.crop_px, self.crop_px), np.float32) for _ in range(3))
        if self.photo.outline is not None:
            values = self._cut(self.photo.outline)
            defect = (values == 255).astype(np.uint8) * np.uint8(255)
            coverage = self._resized(defect, self.smooth).astype(np.float32) / 255
            known = self._resized((values != UNKNOWN).astype(np.uint8), cv2.INTER_NEAREST).astype(np.float32)
            return coverage, known, clicked
        height, width = self.photo.image_rgb.shape[:2]
        for click in self.photo.negative:
            patch = click.patch_px or self.crop_px
            left, right = (self._inside(x - self.x0) for x in patch_bounds(click.x, patch, width))
            top, bottom = (self._inside(y - self.y0) for y in patch_bounds(click.y, patch, height))
            known[top:bottom, left:right] = 1
        for click in self.photo.positive:
            x, y = click.x - self.x0, click.y - self.y0
            if 0 <= x < self.size and 0 <= y < self.size:
                row, column = (int((at + 0.5) * self.crop_px / self.size) for at in (y, x))
                clicked[row, column], known[row, column] = 1, 0
        return coverage, known, clicked

    def _inside(self, at: int) -> int:
        return round(min(max(at, 0), self.size) * self.crop_px / self.size)


def _mean_weight(kind: str, clicks: Sequence[Click]) -> float:
    mean = float(np.mean([click.weight for click in clicks])) if clicks else 1.0
    if not mean:
        raise ValueError(f"all {kind} clicks have the weight 0: nothing can be learnt from them")
    return mean


def _some_pixels(outline: np.ndarray, seed: int) -> np.ndarray:
    """Flat indices of pixels of the defect, DEFECT_PIXELS at most."""
    pixels = np.flatnonzero(outline == 255)
    if len(pixels) > DEFECT_PIXELS:
        pixels = np.random.default_rng(seed).choice(pixels, DEFECT_PIXELS, replace=False)
    return pixels


def noisy(image_rgb: Tensor, rng: np.random.Generator) -> Tensor:
    """The image (3, H, W) uint8, in some draws with the noise of a sensor."""
    if rng.random() >= NOISE_SHARE:
        return image_rgb
    noise = torch.from_numpy(rng.normal(0, rng.uniform(2, 8), image_rgb.shape).astype(np.float32))
    return (image_rgb + noise).round().clamp(0, 255).to(torch.uint8)


def rotated_flipped(array: np.ndarray, quarter_turns: int, mirrored: bool) -> np.ndarray:
    """A photo or mask (H, W, ...) turned, and mirrored if so; contiguous."""
    array = np.rot90(array, quarter_turns)
    return np.ascontiguousarray(array[:, ::-1] if mirrored else array)


def colour_jittered(image_rgb: Tensor, seed: int) -> Tensor:
    """The image (3, H, W) uint8 under another light and lens: colours, contrast, blur."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return COLOURS(image_rgb)
