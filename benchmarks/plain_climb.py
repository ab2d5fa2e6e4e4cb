"""Anti-adversarial climbing as it is usually written: what `defectcam.climb` and its engine are compared with.

The loop of AdvCAM (Lee, Kim, Yoon, CVPR 2021) on this project's network: Grad-CAM by hooks with a backward pass of
its own, a second backward pass for the step, both with the gradients of all parameters, one tile at a time, every
tile of the photo. The maps are those of `PaperClimb`, which tests/test_bench.py proves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from defectcam.climb import PaperClimb
from defectcam.encoders import normalised
from defectcam.network import ScoreNet
from defectcam.tiling import Tile, cut


class GradCam:
    """Grad-CAM of the decoder's features, from hooks that keep them and their gradient.

    A context manager: the hooks are removed at its end.
    """

    def __init__(self, network: ScoreNet) -> None:
        self.network = network
        self.hook = network.decoder.register_forward_hook(self._keep)

    def __enter__(self) -> GradCam:
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()

    def _keep(self, _module, _inputs, features: Tensor) -> None:
        self.features = features
        features.register_hook(lambda gradient: setattr(self, "gradient", gradient))

    def __call__(self, image: Tensor, retain_graph: bool) -> tuple[Tensor, Tensor]:
        """Map (H, W) and logit of one image (1, 3, H, W); the map has a graph through the features."""
        self.network.zero_grad()
        logit = self.network(image)[0]
        logit.backward(retain_graph=retain_graph)
        # Grad-CAM takes the mean. The sum is H * W times as much: the unit in which the penalty is weighed.
        weights = self.gradient.sum(dim=(2, 3), keepdim=True)
        return (weights * self.features).sum(dim=1)[0].relu(), logit


def plain_climbed_map(
    network: ScoreNet, image_rgb: np.ndarray, tiles: Iterable[Tile], steps: int, climb: PaperClimb
) -> np.ndarray:
    """The sum of the T + 1 maps of a whole photo, (H, W) float32.

    Args:
        network: in eval mode, its parameters with gradients.
        image_rgb: (H, W, 3) uint8.
        tiles: cover the photo.
        steps: T >= 0.
    """
    stitched = np.zeros(image_rgb.shape[:2], np.float32)
    with GradCam(network) as grad_cam:
        for tile in tiles:
            y0, y1, x0, x1 = tile.core
            total = _sum_of_maps(grad_cam, network_input(network, image_rgb, tile), steps, climb)
            stitched[y0:y1, x0:x1] = tile.core_of(total).cpu().numpy()
    return stitched


def network_input(network: ScoreNet, image_rgb: np.ndarray, tile: Tile) -> Tensor:
    """What the network sees of a tile, (1, 3, h, w) in -1..1, on its device."""
    pixels = normalised(np.ascontiguousarray(cut(image_rgb, tile.outer).transpose(2, 0, 1)))
    return torch.from_numpy(pixels)[None].to(network.head.weight)


def _sum_of_maps(grad_cam: GradCam, image: Tensor, steps: int, climb: PaperClimb) -> Tensor:
    low, high = image.min(), image.max()
    first_map, total = None, 0
    for step in range(steps + 1):
        image = image.detach().requires_grad_(True)
        current_map, logit = grad_cam(image, retain_graph=step < steps)
        total = total + current_map.detach()
        if step == steps:
            return total
        if first_map is None:
            first_map = current_map.detach()
        salient = current_map.detach() > climb.salient_share * current_map.detach().max()
        penalty = (salient * (current_map - first_map).abs()).mean()
        grad_cam.network.zero_grad()
        image.grad = None
        (logit - climb.penalty_weight * penalty).backward()
        image = image.detach() + climb.xi * image.grad / (image.grad.abs().max() + 1e-12)
        image = torch.minimum(torch.maximum(image, low), high)
