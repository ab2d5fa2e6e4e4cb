"""Predictor: a photo -> one defect's map -> proposals. The pipeline that everything else calls.

pixels -> pyramid -> score maps -> merged map -> regions of T = 0 with their confidence -> climb around them -> regions

Extend, never invent: a proposal at T is a region of the climbed map that holds a region of T = 0 whose confidence is at
least the threshold, and has that confidence. So T says how far a proposal reaches, and the threshold how many there
are. What no such region can reach is not climbed, which changes no answer.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from defectcam.deadline import NO_DEADLINE, Deadline, Progress, TimeLimitError
from defectcam.encoders import halo_px, stride_px
from defectcam.engine import Engine
from defectcam.throughput import Throughput, climb_passes
from defectcam.postprocess import regions
from defectcam.proposals import Component, Proposal, component_confidence, component_features, find_components
from defectcam.pyramid import ENLARGED, PhotoMaps, Pyramid, level_tiles, possible_region, tiles_of_level, touching
from defectcam.settings import RequestError, read_variable
from defectcam.tiling import Tile
from defectcam.weights import TORCH_REMEDY, DefectConfig, Weights, WeightsError, load_weights

if TYPE_CHECKING:
    from defectcam.torch_engine import TorchEngine

STEPS = (0, 1, 2, 4, 8)  # the T that are compared wherever one is to be chosen
PLACES, PLACE_PX = 3, 320  # in a row and in a column of a large photo, and their side at its finest level
CELL_PX = 16  # side of the photo's cells that are climbed or not
BATCH = {"cpu": 1, "cuda": 8}  # tiles at once: a CPU gains nothing from more


def make_engine(weights: Weights, defect: str, device: str, name: str | None) -> Engine:
    """The engine of one defect; for the arguments see `Predictor`."""
    config = weights.configs[defect]
    if name is None:
        fits = device == "cpu" and config.graph and config.climb["form"] == "local" and importlib.util.find_spec("openvino")
        name = "openvino" if fits or not importlib.util.find_spec("torch") else "torch"  # whose errors say what to do
    if name == "openvino":
        if config.climb["form"] != "local":
            raise WeightsError(f"the climb of {defect!r} has the paper's form, which needs PyTorch: {TORCH_REMEDY}")
        from defectcam.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(weights.graph(defect), stride_px(config.downsamplings), halo_px(config.encoder, config.downsamplings))
    from defectcam.torch_engine import TorchEngine  # only where it is used: the CPU's image has no PyTorch

    return TorchEngine(weights.network(defect), device)


def device_and_engine(environ: Mapping[str, str]) -> tuple[str, str | None]:
    """ADVCAM_DEVICE, else the GPU where PyTorch sees one, and ADVCAM_ENGINE, as `Predictor` takes them.

    Raises:
        RequestError: naming the variable and the remedy.
    """
    device, engine = read_variable(environ, "ADVCAM_DEVICE"), read_variable(environ, "ADVCAM_ENGINE")
    if engine == "openvino" and device == "cuda":
        raise RequestError("ADVCAM_ENGINE is 'openvino', which runs on the CPU, but ADVCAM_DEVICE is 'cuda'; unset one")
    missing = [name for name in (engine, "torch" if device == "cuda" else None) if name and not importlib.util.find_spec(name)]
    if missing:
        variable = "ADVCAM_ENGINE" if engine else "ADVCAM_DEVICE"
        raise RequestError(f"{variable} is {engine or device!r}, but {missing[0]} is not installed; unset it, or install it")
    if device == "cpu" or engine == "openvino" or not importlib.util.find_spec("torch"):
        return "cpu", engine
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("ADVCAM_DEVICE is 'cuda' but torch sees no GPU; set cpu, or give the container a GPU")
    return "cuda" if torch.cuda.is_available() else "cpu", engine


class Predictor:
    """All defects' engines.

    Args:
        weights: from `load_weights`.
        device: "cpu" or "cuda".
        engine: "torch", "openvino"; None for OpenVINO on a CPU where it is installed and the weights have a graph.

    Raises:
        WeightsError: weights that do not fit, or have no graph although OpenVINO was asked for.
    """

    def __init__(self, weights: Weights, device: str = "cpu", engine: str | None = None) -> None:
        self.weights = weights
        self.engines = {defect: make_engine(weights, defect, device, engine) for defect in weights.configs}
        self._torch_engines: dict[str, TorchEngine] = {}
        self.device, self.batch = device, BATCH[device]
        self.throughput = Throughput(self.engines)
        if device == "cpu":  # a GPU's is learnt from the first photo: nothing goes there before
            for defect in self.engines:
                self.throughput.measure(defect)

    def torch_engine(self, defect: str) -> TorchEngine:
        """PyTorch's engine of a defect: the paper's climb and the encoder's features are its alone."""
        if defect not in self._torch_engines:
            own = self.engines[defect]
            self._torch_engines[defect] = (
                own if own.name == "torch" else make_engine(self.weights, defect, self.device, "torch")
            )
        return self._torch_engines[defect]

    def release_memory(self) -> None:
        """Return the memory that the engines keep for the next tile."""
        for engine in self.engines.values():
            engine.release_memory()

    @property
    def defects(self) -> list[str]:
        """The defects there are weights for, in the manifest's order."""
        return list(self.weights.configs)

    def maps(
        self,
        pyramid: Pyramid,
        defect: str,
        deadline: Deadline = NO_DEADLINE,
        near: Sequence[tuple[int, int]] | None = None,
        near_px: int = 0,
    ) -> PhotoMaps:
        """The plain maps of a photo; for the arguments see `PhotoMaps`."""
        started, reading = time.monotonic(), self.weights.configs[defect].reading
        maps = PhotoMaps(self.engines[defect], reading, pyramid, self.batch, deadline, near, near_px)
        self.throughput.learn(defect, time.monotonic() - started, pixels_of(maps.tiles))
        return maps

    def plain_pixels(
        self, height: int, width: int, defect: str, near: Sequence[tuple[int, int]] | None = None, near_px: int = 0
    ) -> int:
        """Pixels of the tiles, halos included, of the plain maps of a photo of so many px."""
        reading = self.weights.configs[defect].reading
        return pixels_of(level_tiles(height, width, reading, self.engines[defect], near, near_px))

    def pixels_with_climb(
        self, height: int, width: int, defect: str, steps: int, near: Sequence[tuple[int, int]] | None = None, near_px: int = 0
    ) -> float:
        """Pixels of the tiles of all forward passes, or what takes as long, if all of a photo of so many px climbs."""
        reading = self.weights.configs[defect].reading.of_photo(height, width)
        tiles = level_tiles(height, width, reading, self.engines[defect], near, near_px)
        climbing = {scale: some for scale, some in tiles.items() if reading.climb(scale)}
        return pixels_of(tiles) + climb_passes(steps) * pixels_of(climbing)

    def propose(
        self,
        image: np.ndarray | Pyramid,
        defect: str,
        steps: int | None = None,
        threshold: float | None = None,
        cam_threshold: float | None = None,
        deadline: Deadline = NO_DEADLINE,
    ) -> list[Proposal]:
        """Proposals of one defect, by confidence times area, the largest first.

        Args:
            image: (H, W, 3) uint8, or its pyramid where several defects are looked for.
            steps, threshold, cam_threshold: T, the minimum confidence, theta; None for the weights' own.
            deadline: of the whole answer.

        Raises:
            TimeLimitError: the deadline passed.
        """
        config = self.weights.configs[defect]
        steps = config.iterations if steps is None else steps
        pyramid = image if isinstance(image, Pyramid) else Pyramid(image)
        maps = self.maps(pyramid, defect, deadline)
        return proposals_for(maps, config, [steps], threshold, cam_threshold)[steps]

    def check_time(self, height: int, width: int, defects: Sequence[str], deadline: Deadline) -> Deadline:
        """Refuse a photo of so many px whose plain maps, without the enlarged level, cannot be computed in time.

        Returns:
            The deadline to work with: it refuses as soon as the work that is found turns out to be late.

        Raises:
            TimeLimitError: they cannot be computed in time.
        """
        needed = {defect: self.plain_pixels(height, width, defect) for defect in defects}
        amount = height * width / 1e6
        deadline.check_work(self.throughput.seconds(needed, deadline.left_s()), amount, "megapixels")
        return Progress(deadline, sum(needed.values()), amount, "megapixels")

    def check_all(
        self, image_rgb: np.ndarray, settings: Mapping[str, tuple[int, float, float]], deadline: Deadline
    ) -> None:
        """Refuse a photo whose enlarged level and climb cannot finish in time, judged at a few places of it.

        How much of a photo is enlarged and climbed shows on its plain maps, which take long themselves. Where there is
        time for all of it, nothing is looked at.

        Args:
            image_rgb: (H, W, 3) uint8.
            settings: defect -> T, minimum confidence, theta.

        Raises:
            TimeLimitError: it cannot finish in time; with the T that would fit, else the megapixels.
        """
        height, width = image_rgb.shape[:2]

        def needed(shares: Mapping[str, tuple[float, float]], most_steps: int) -> dict[str, float]:
            pixels = {}
            for defect, (steps, *_) in settings.items():
                plain, (enlarged_share, climbing_share) = self.plain_pixels(height, width, defect), shares[defect]
                enlarged = pixels_of({ENLARGED: self._enlarged_tiles(height, width, defect)})
                climb = self.pixels_with_climb(height, width, defect, min(steps, most_steps)) - plain
                pixels[defect] = plain + enlarged_share * enlarged + climbing_share * climb
            return pixels

        most_steps = max(steps for steps, *_ in settings.values())
        left_s = deadline.left_s()
        if self.throughput.seconds(needed(dict.fromkeys(settings, (1.0, 1.0)), most_steps), left_s) <= left_s:
            return
        shares = {defect: self._shares(image_rgb, defect, *how) for defect, how in settings.items()}
        left_s = deadline.left_s()
        needed_s = self.throughput.seconds(needed(shares, most_steps), left_s)
        if needed_s <= left_s:
            return
        for steps in reversed(range(most_steps)):
            if self.throughput.seconds(needed(shares, steps)) <= left_s:
                raise TimeLimitError(needed_s - left_s, f"iterations {steps}")
        deadline.check_work(needed_s, height * width / 1e6, "megapixels")

    def _enlarged_tiles(self, height: int, width: int, defect: str) -> list[Tile]:
        """The tiles of the enlarged level of a photo of so many px, none where the defect does not read it."""
        reads = self.weights.configs[defect].reading.of_lines
        return tiles_of_level(height, width, ENLARGED, self.engines[defect]) if reads else []

    def _shares(
        self, image_rgb: np.ndarray, defect: str, steps: int, threshold: float, cam_threshold: float
    ) -> tuple[float, float]:
        """Of a few places evenly over the photo the shares, 0..1, that the enlarged level is asked for and that climb."""
        config, (height, width) = self.weights.configs[defect], image_rgb.shape[:2]
        if not steps and not self._enlarged_tiles(height, width, defect):
            return 0.0, 0.0
        side_px, enlarged, climbing = round(PLACE_PX / min(config.finest_scale, 1.0)), [], []
        reading = replace(config.reading, finest=min(config.finest_scale, 1.0))  # enlarged, the look itself would take long
        for row, column in np.ndindex(PLACES, PLACES):
            top = max(0, (2 * row + 1) * height // (2 * PLACES) - side_px // 2)
            left = max(0, (2 * column + 1) * width // (2 * PLACES) - side_px // 2)
            place = np.ascontiguousarray(image_rgb[top : top + side_px, left : left + side_px])
            maps = PhotoMaps(self.engines[defect], reading, Pyramid(place), self.batch)
            climbing.append(any(core.confidence >= threshold for core in find_cores(maps, config, cam_threshold)))
            tiles = self._enlarged_tiles(*place.shape[:2], defect)
            enlarged.append(len(touching(tiles, possible_region(maps.merged()))) / max(len(tiles), 1))
        return float(np.mean(enlarged)), float(np.mean(climbing))


def open_weights(folder: Path) -> Predictor:
    """The weights of a folder, on the device and engine that the environment names.

    Raises:
        WeightsError, RequestError: of the folder, or of ADVCAM_DEVICE or ADVCAM_ENGINE.
    """
    return Predictor(load_weights(folder), *device_and_engine(os.environ))


def pixels_of(tiles: Mapping[float, Sequence[Tile]]) -> int:
    """Pixels of the tiles of all levels, halos included."""
    return sum(tile.pixels for of_level in tiles.values() for tile in of_level)


def find_cores(maps: PhotoMaps, config: DefectConfig, cam_threshold: float | None = None) -> list[Proposal]:
    """The regions of a photo's plain map, each with its confidence (0..1)."""
    theta, logits = config.cam_threshold if cam_threshold is None else cam_threshold, maps.merged()
    found = []
    for component in find_components(regions(logits, config.least_logit(theta), config.cleaning, maps.deadline)):
        features = component_features(component, logits, maps.levels)
        found.append(Proposal(component, component_confidence(features, config.confidence_weights)))
    return found


def proposals_for(
    maps: PhotoMaps,
    config: DefectConfig,
    wanted: Sequence[int],
    threshold: float | None = None,
    cam_threshold: float | None = None,
    everywhere: bool = False,
) -> dict[int, list[Proposal]]:
    """The proposals for several T from one climb.

    Args:
        maps: of the photo.
        wanted: the T.
        threshold, cam_threshold: None for the weights' own.
        everywhere: climb all of the photo, which changes no answer; for tests and measurements.

    Returns:
        T -> proposals, by confidence times area, the largest first.
    """
    threshold = config.threshold if threshold is None else threshold
    cam_threshold = config.cam_threshold if cam_threshold is None else cam_threshold
    cores = find_cores(maps, config, cam_threshold)
    accepted = [core for core in cores if core.confidence >= threshold]
    result = {}
    climbing = [steps for steps in wanted if steps > 0]
    if climbing and accepted:
        climb_around(maps, config, climbing, accepted, cam_threshold, everywhere)
    for steps in wanted:
        found = extended(maps, config, steps, accepted, cam_threshold) if steps and accepted else accepted
        result[steps] = sorted(found, key=lambda one: -one.confidence * one.component.area_px)
    return result


def climb_around(
    maps: PhotoMaps,
    config: DefectConfig,
    wanted: Sequence[int],
    accepted: Sequence[Proposal],
    cam_threshold: float,
    everywhere: bool = False,
) -> None:
    """Climb as far as the accepted regions may reach.

    After every climb the regions that hold an accepted one are looked at, in cells of the photo and with the reach of
    closing and bridging around them; where they touch cells that have not climbed, these are next.
    """
    shape = -(-maps.height // CELL_PX), -(-maps.width // CELL_PX)
    if everywhere:
        maps.climb(wanted, np.ones(shape, bool), CELL_PX)
        return
    seeds = np.zeros(shape, bool)
    for one in accepted:
        seeds |= cells_of(one.component, shape)
    margin = -(-config.cleaning.reach_px // CELL_PX)
    around = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    due = cv2.dilate(seeds.view(np.uint8), around).view(bool)
    least = config.least_logit(cam_threshold)
    while True:
        maps.deadline.check()
        maps.climb(wanted, due, CELL_PX)
        reached = seeds.copy()
        for steps in wanted:
            reached |= any_of_cells(maps.merged(steps) > least)
        _, labels = cv2.connectedComponents(cv2.dilate(reached.view(np.uint8), around), connectivity=8)
        held = np.zeros(labels.max() + 1, bool)
        held[labels[seeds]] = True
        held[0] = False
        due = held[labels] & ~maps.is_climbed(CELL_PX)
        if not due.any():
            return


def extended(
    maps: PhotoMaps, config: DefectConfig, steps: int, accepted: Sequence[Proposal], cam_threshold: float
) -> list[Proposal]:
    """The regions of the climbed map that hold an accepted one, with the confidence of the best they hold."""
    mask = regions(maps.merged(steps), config.least_logit(cam_threshold), config.cleaning, maps.deadline)
    for one in accepted:
        paste(mask, one.component)  # after bridging: what was bridged once is not bridged again
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    best: dict[int, float] = {}
    for one in accepted:
        x0, y0, x1, y1 = one.component.box_xyxy
        label = int(labels[y0 : y1 + 1, x0 : x1 + 1][one.component.mask][0])
        best[label] = max(one.confidence, best.get(label, 0.0))
    kept = np.zeros(labels.max() + 1, bool)
    kept[list(best)] = True
    return [
        Proposal(component, best[int(labels[component.top, component.left + int(np.argmax(component.mask[0]))])])
        for component in find_components(kept[labels])
    ]


def paste(mask: np.ndarray, component: Component) -> None:
    """Add a component's pixels to a mask (H, W) bool."""
    x0, y0, x1, y1 = component.box_xyxy
    mask[y0 : y1 + 1, x0 : x1 + 1] |= component.mask


def cells_of(component: Component, shape: tuple[int, int]) -> np.ndarray:
    """The cells (bool, `shape`) that a component has pixels in."""
    cells = np.zeros(shape, bool)
    ys, xs = np.nonzero(component.mask)
    cells[(ys + component.top) // CELL_PX, (xs + component.left) // CELL_PX] = True
    return cells


def any_of_cells(mask: np.ndarray) -> np.ndarray:
    """The cells in which a mask (H, W) bool has a pixel."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % CELL_PX), (0, -width % CELL_PX)))
    rows, columns = padded.shape[0] // CELL_PX, padded.shape[1] // CELL_PX
    return padded.reshape(rows, CELL_PX, columns, CELL_PX).any(axis=(1, 3))
