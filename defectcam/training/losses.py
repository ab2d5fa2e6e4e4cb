"""What a network is taught by: one loss per kind of label, summed (paper 4.1, 4.2 and beyond).

| what is known of a crop                      | loss                                                              |
|----------------------------------------------|-------------------------------------------------------------------|
| it holds the defect, or not (clicks)         | binary cross-entropy of the pooled logit: the paper's only loss   |
| single pixels (clicks on the defect)         | binary cross-entropy of these pixels                              |
| pixels (outlines, patches without the defect)| binary cross-entropy of these pixels                              |
| every pixel                                  | soft Dice, so that thin defects are not outvoted                  |
| not every pixel                              | gated conditional random field: neighbours of one colour agree    |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from defectcam.encoders import normalised
from defectcam.network import ScoreNet

CLICK_WEIGHT = 0.5
CRF_WEIGHT = 0.1
CRF_REACH = 3  # neighbours in each direction: a window of 7 x 7,
CRF_SPACING_PX = 2  # of which every second pixel is compared
CRF_SPACE_PX = 6.0  # standard deviation of the distance
CRF_COLOUR = 0.1  # standard deviation of the colours, which are 0..1


class PartialLabelLoss(nn.Module):
    """The loss of a batch; a module, so that several processes can share its gradients.

    Args:
        network: what is taught.
        pixels: whether single pixels are taught. Without them only the pooled logit is, as in the paper.
    """

    def __init__(self, network: ScoreNet, pixels: bool = True) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(
        self, images_rgb: Tensor, coverage: Tensor, known: Tensor, clicked: Tensor, holds: Tensor, weights: Tensor
    ) -> Tensor:
        """Scalar loss.

        Args:
            images_rgb: (N, 3, H, W) uint8.
            coverage: (N, H, W) 0..1, the defect's share of each pixel.
            known: (N, H, W) 0 or 1, where `coverage` is known.
            clicked: (N, H, W) 0 or 1, pixels that were clicked on as the defect.
            holds: (N,) 1 where the crop holds the defect, 0 where not, -1 where the pooled logit is not taught.
            weights: (N,) 0 or more, 1 on average.
        """
        score_map = self.network.score_map(normalised(images_rgb)).float()
        loss = pooled_loss(self.network.logit(score_map), holds, weights)
        if not self.pixels:
            return loss
        each = weights[:, None, None]
        loss = loss + pixel_loss(score_map, coverage, known, each)
        loss = loss + CLICK_WEIGHT * pixel_loss(score_map, torch.ones_like(coverage), clicked, each)
        whole = known.flatten(1).amin(dim=1) > 0
        if whole.any():
            loss = loss + dice_loss(score_map[whole], coverage[whole])
        if not whole.all():
            loss = loss + CRF_WEIGHT * gated_crf_loss(score_map[~whole], images_rgb[~whole])
        return loss


def pooled_loss(logits: Tensor, holds: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy of pooled logits (N,) where `holds` (N,) is 0 or 1, not -1; 0 if that is nowhere."""
    taught = (holds >= 0).float()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, holds.clamp(min=0).float(), reduction="none")
    # The sum goes by N, not by the batch's weights: a heavy crop must not weigh less beside other heavy ones.
    return (entropy * weights * taught).sum() / taught.sum().clamp(min=1)


def pixel_loss(score_map: Tensor, coverage: Tensor, known: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross-entropy over the known pixels of a batch; 0 if there are none. All (N, H, W), or broadcast."""
    entropy = nn.functional.binary_cross_entropy_with_logits(score_map, coverage, reduction="none")
    return (entropy * known * weights).sum() / known.sum().clamp(min=1)


def dice_loss(score_map: Tensor, coverage: Tensor) -> Tensor:
    """1 - the soft Dice coefficient over all pixels of a batch (N, H, W); 0 if none of them is the defect."""
    if not coverage.any():
        return score_map.sum() * 0
    found = score_map.sigmoid()
    return 1 - (2 * (found * coverage).sum() + 1) / (found.sum() + coverage.sum() + 1)


def gated_crf_loss(score_map: Tensor, images_rgb: Tensor) -> Tensor:
    """Mean disagreement of neighbouring pixels, weighted by how near and how alike they are (gated CRF); 0..1.

    Args:
        score_map: (N, H, W) logits.
        images_rgb: (N, 3, H, W) uint8.

    Returns:
        sum k_ij (p_i (1 - p_j) + p_j (1 - p_i)) / sum k_ij over all pixels i and j in the window around i without i, with
        k_ij = exp(-|x_i - x_j|^2 / (2 CRF_SPACE_PX^2) - |c_i - c_j|^2 / (2 CRF_COLOUR^2)).
    """
    probability, colours = score_map.sigmoid(), images_rgb.float() / 255
    height, width = score_map.shape[1:]
    reach = CRF_REACH * CRF_SPACING_PX
    total, pairs = score_map.sum() * 0, 0.0
    for down in range(0, reach + 1, CRF_SPACING_PX):
        for right in range(-reach, reach + 1, CRF_SPACING_PX):
            if (down, right) <= (0, 0) or down >= height or abs(right) >= width:
                continue  # every pair once: the other half of the window is these pairs seen from the other side
            one = (..., slice(0, height - down), slice(max(0, -right), width - max(0, right)))
            other = (..., slice(down, height), slice(max(0, right), width + min(0, right)))
            with torch.no_grad():
                apart = (colours[one] - colours[other]).square().sum(dim=1) / (2 * CRF_COLOUR**2)
                alike = torch.exp(-apart) * math.exp(-(down**2 + right**2) / (2 * CRF_SPACE_PX**2))
            p, q = probability[one], probability[other]
            total, pairs = total + (alike * (p + q - 2 * p * q)).sum(), pairs + float(alike.sum())
    return total / max(pairs, 1.0)
