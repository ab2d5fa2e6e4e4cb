"""Anti-adversarial climbing: make the image more of the defect, and the map extends with it (paper 3.1, eq. 2).

Two forms, a defect's manifest names its one. T counts climbing steps: T = 0 is the plain map, T steps give T + 1 maps
(AdvCAM's own count of 27 iterations is 27 maps).

`LocalClimb`, which ships. From x_0 = the image in -1..1, for t = 1..T:

    x_t = clamp(x_{t-1} + xi * clamp(g / g_ref, -1, 1), -1, 1),   g = d/dx sum(sg(sigmoid(S)) * S) at x_{t-1},
    M_T = mean of S_0 .. S_T.

`g_ref` is a constant of the weights. Nothing in it is a maximum or a sum over a tile, so tiles, crops and shifts of a
photo agree at every T.

`PaperClimb`, the paper's preset, after AdvCAM (Lee, Kim, Yoon, CVPR 2021):

    x_t = clamp(x_{t-1} + xi * g / max|g|),   g = dL/dx at x_{t-1},
    L   = y - lambda * mean(W * |A(x_{t-1}) - A(x_0)|),   W = 1[A(x_{t-1}) > tau * max A(x_{t-1})],
    M_T = mean of A(x_0) .. A(x_T),

with y the logit, A = relu(S - b) the class activation map, b the head's bias, the clamp to the range of x_0. The
penalty keeps what is salient already from growing further. A binary classifier has no other classes to restrain. The
penalty is a mean where the reference takes a sum over a stride-16 map: at full resolution a sum would drown the logit.
Maxima are those of the crop that climbs, as in the paper, so tiles of a photo need not agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from defectcam.engine import Engine
from defectcam.validation import STRICT

Step = Annotated[float, Field(ge=0, le=2)]


@dataclass(frozen=True, config=STRICT)
class LocalClimb:
    """xi: step in units of the image's -1..1; g_ref: gradient from which a step is a whole xi, above 0."""

    xi: Step
    g_ref: Annotated[float, Field(ge=1e-12, le=1e12)]

    def maps(self, engine: Engine, images: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """Yield M_0, M_1, ..., M_steps of a batch, each (N, H, W) float32.

        Args:
            engine: with the defect's network.
            images: (N, 3, H, W) float32 in -1..1.
            steps: T >= 0.
        """
        mean = np.zeros((len(images), *images.shape[2:]), np.float32)
        for step in range(steps + 1):
            if step == steps:
                score = engine.score(images)
            else:
                score, gradient = engine.score_and_gradient(images)
                gradient *= np.float32(1 / self.g_ref)
                np.clip(gradient, -1, 1, out=gradient)
                gradient *= np.float32(self.xi)
                images = np.clip(images + gradient, -1, 1)
            mean += (score - mean) / np.float32(step + 1)  # of equal maps exactly that map
            yield mean.copy()


@dataclass(frozen=True, config=STRICT)
class PaperClimb:
    """xi: step in units of the image's -1..1; penalty_weight: lambda; salient_share: tau, 0..1."""

    xi: Step
    penalty_weight: Annotated[float, Field(ge=0, le=1e6)]
    salient_share: Annotated[float, Field(ge=0, le=1)]

    def maps(self, engine: Engine, images: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """As `LocalClimb.maps`. Every image of the batch climbs by itself; needs the PyTorch engine."""
        import torch  # here, since the local climb does without it

        network = engine.network
        image = engine.tensor(images)
        low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
        mean, first_map = 0.0, None
        for step in range(steps + 1):
            with engine.lock, torch.set_grad_enabled(step < steps):
                image = image.detach().requires_grad_(step < steps)
                score = network.score_map(image)
                current_map = (score - network.head.bias).relu()  # Grad-CAM, up to a positive factor
            mean = mean + (current_map.detach() - mean) / (step + 1)
            yield mean.float().cpu().numpy()
            if step == steps:
                return
            if first_map is None:
                first_map = current_map.detach()
            with engine.lock, torch.enable_grad():
                peak = current_map.detach().amax(dim=(1, 2), keepdim=True)
                salient = current_map.detach() > self.salient_share * peak
                penalty = (salient * (current_map - first_map).abs()).mean(dim=(1, 2))
                gain = network.logit(score) - self.penalty_weight * penalty
                # One sum over the batch: an image's gradient has no part of another image's gain in it.
                (gradient,) = torch.autograd.grad(gain.sum(), image)
            with torch.no_grad():
                largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
                image = image + self.xi * gradient / (largest + 1e-12)
                image = torch.minimum(torch.maximum(image, low), high)


Climb = LocalClimb | PaperClimb
