"""Anti-adversarial climbing as it is usually written: what `defectcam.climb` and its gate are compared with.

The loop of AdvCAM (Lee, Kim, Yoon, CVPR 2021) on this project's network: Grad-CAM by hooks with a backward pass of
its own, a second backward pass for the step, both with the gradients of all parameters, one tile at a time, every
tile of the photo. The maps are those of `defectcam.climb`, which tests/test_bench.py proves.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from defectcam.climb import ClimbParameters
from defectcam.network import DefectNet
from defectcam.tiling import tile_grid


class GradCam:
    """Grad-CAM of the decoder's features, from hooks that keep them and their gradient.

    A context manager: the hooks are removed at its end.
    """

    def __init__(self, network: DefectNet) -> None:
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
    network: DefectNet, image_rgb: np.ndarray, steps: int, parameters: ClimbParameters, core_px: int
) -> np.ndarray:
    """The sum of the T + 1 maps of a whole photo, (H, W) float32.

    Args:
        network: in eval mode, its parameters with gradients.
        image_rgb: (H, W, 3) uint8.
        steps: T >= 0.
        core_px: of the tiles, see `tile_grid`.
    """
    stitched = np.zeros(image_rgb.shape[:2], np.float32)
    halo_px = network.climb_halo_px if steps else network.halo_px  # as in the function
    with GradCam(network) as grad_cam:
        for tile in tile_grid(*image_rgb.shape[:2], halo_px, network.stride_px, core_px):
            y0, y1, x0, x1 = tile.core
            image = network_input(network, image_rgb, tile.outer)
            total = _sum_of_maps(grad_cam, image, steps, parameters)
            stitched[y0:y1, x0:x1] = tile.core_of(total).cpu().numpy()
    return stitched


def network_input(network: DefectNet, image_rgb: np.ndarray, box: tuple[int, int, int, int]) -> Tensor:
    """The part (y0, y1, x0, x1) of a photo as the network wants it, (1, 3, h, w), on its device."""
    y0, y1, x0, x1 = box
    pixels = torch.from_numpy(np.ascontiguousarray(image_rgb[y0:y1, x0:x1]))
    return network.normalise(pixels.permute(2, 0, 1)[None].to(network.head.weight.device))


def _sum_of_maps(grad_cam: GradCam, image: Tensor, steps: int, parameters: ClimbParameters) -> Tensor:
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
        salient = current_map.detach() > parameters.salient_share * current_map.detach().max()
        penalty = (salient * (current_map - first_map).abs()).mean()
        grad_cam.network.zero_grad()
        image.grad = None
        (logit - parameters.penalty_weight * penalty).backward()
        image = image.detach() + parameters.xi * image.grad / (image.grad.abs().max() + 1e-12)
        image = torch.minimum(torch.maximum(image, low), high)
