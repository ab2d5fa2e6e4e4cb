"""Anti-adversarial climbing: make the image more of the defect, and the map extends with it (paper 3.1, eq. 2).

After AdvCAM (Lee, Kim, Yoon, CVPR 2021). From x_0 = image, for t = 1..T:

    x_t = clamp(x_{t-1} + xi * g / max|g|),   g = dL/dx at x_{t-1},
    L   = y - lambda * mean(M * |A(x_{t-1}) - A(x_0)|),   M = 1[A(x_{t-1}) > tau * max A(x_{t-1})],

with y the logit, A the class activation map, the clamp to the range of x_0. The penalty keeps what is salient
already from growing further, so that new regions are found. A binary classifier has no other classes to
restrain. T counts climbing steps: T = 0 is the plain CAM, T steps give T + 1 maps (AdvCAM's own count of 27
iterations is 27 maps). The penalty is a mean where the reference takes a sum over a stride-16 map: at full
resolution a sum would drown the logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from defectcam.cam import activation
from defectcam.memory import return_freed_memory
from defectcam.network import DefectNet


@dataclass(frozen=True)
class ClimbParameters:
    """xi: step in normalised units; penalty_weight: lambda; salient_share: tau, 0..1."""

    xi: float
    penalty_weight: float
    salient_share: float


def climb(network: DefectNet, images: Tensor, steps: int, parameters: ClimbParameters) -> Iterator[Tensor]:
    """Yield the maps A(x_0), A(x_1), ..., A(x_steps) of a batch, each (N, H, W) and without gradient.

    Every image of the batch climbs by itself: the result does not depend on the others. Parameters and buffers
    of the network are left as they are; running means of the maps are the caller's.

    Args:
        network: in eval mode.
        images: (N, 3, H, W) from `network.normalise`.
        steps: T >= 0.

    Raises:
        ValueError: if the network is in training mode (its BatchNorm would drift and mix the batch).
    """
    if network.training:
        raise ValueError("climb needs the network in eval mode: call network.eval() first")
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    high = images.amax(dim=(1, 2, 3), keepdim=True)
    image, first_map = images.detach(), None
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            image = image.requires_grad_(step < steps)
            score = network.score_map(image)
            current_map = activation(score)
        yield current_map.detach()
        if step == steps:
            return
        if first_map is None:
            first_map = current_map.detach()
        with torch.enable_grad():
            peak = current_map.detach().amax(dim=(1, 2), keepdim=True)
            salient = current_map.detach() > parameters.salient_share * peak
            penalty = (salient * (current_map - first_map).abs()).mean(dim=(1, 2))
            gain = network.logit(score) - parameters.penalty_weight * penalty
            return_freed_memory()  # else what the forward pass has left over adds a tenth to the backward pass's peak
            # One sum over the batch: an image's gradient has no part of another image's gain in it.
            (gradient,) = torch.autograd.grad(gain.sum(), image)
        with torch.no_grad():
            largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
            image = image + parameters.xi * gradient / (largest + 1e-12)
            image = torch.minimum(torch.maximum(image, low), high)
