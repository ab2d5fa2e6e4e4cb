"""Every loss against its formula, written out slowly; what is unknown teaches nothing."""

import math

import numpy as np
import pytest
import torch

from defectcam.encoders import normalised
from defectcam.training import losses
from defectcam.training.losses import PartialLabelLoss, dice_loss, gated_crf_loss, pixel_loss, pooled_loss
from tests.conftest import random_network

RNG = np.random.default_rng(0)
IMAGES = torch.from_numpy(RNG.integers(0, 255, (4, 3, 16, 16), np.uint8))


def entropy(logit, wanted):
    p = 1 / (1 + math.exp(-logit))
    return -(wanted * math.log(p) + (1 - wanted) * math.log(1 - p))


def batch(**changes):
    """A batch of four crops: outlined, clicked on, a negative patch, and one in which half is known."""
    coverage, known, clicked = (torch.zeros(4, 16, 16) for _ in range(3))
    coverage[0] = torch.from_numpy(np.random.default_rng(1).random((16, 16)).astype(np.float32))
    known[0] = known[2] = 1
    known[3, :8] = coverage[3, :4] = 1
    clicked[1, 3, 5] = clicked[1, 9, 9] = 1
    found = {
        "images_rgb": IMAGES, "coverage": coverage, "known": known, "clicked": clicked,
        "holds": torch.tensor([-1.0, 1, 0, -1]), "weights": torch.tensor([1.0, 1.5, 0.5, 1]),
    }  # fmt: skip
    return found | changes


def test_the_pooled_loss_is_weighted_cross_entropy_where_it_is_taught():
    logits, holds, weights = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([1.0, 0, -1]), torch.tensor([1.5, 0.5, 9])
    wanted = (1.5 * entropy(0.5, 1) + 0.5 * entropy(-2, 0)) / 2
    assert float(pooled_loss(logits, holds, weights)) == pytest.approx(wanted, rel=1e-5)
    assert float(pooled_loss(logits, torch.full((3,), -1.0), weights)) == 0


def test_the_pixel_loss_is_the_mean_over_known_pixels():
    scores, coverage = torch.from_numpy(RNG.normal(0, 3, (2, 4, 5))), torch.from_numpy(RNG.random((2, 4, 5)))
    known, weights = torch.from_numpy((RNG.random((2, 4, 5)) > 0.5).astype(float)), torch.tensor([2.0, 0.5])[:, None, None]
    terms = [
        float(weights[n, 0, 0]) * entropy(float(scores[n, y, x]), float(coverage[n, y, x]))
        for n in range(2) for y in range(4) for x in range(5) if known[n, y, x]
    ]  # fmt: skip
    assert float(pixel_loss(scores, coverage, known, weights)) == pytest.approx(np.mean(terms), rel=1e-6)
    assert float(pixel_loss(scores, coverage, torch.zeros_like(known), weights)) == 0


def test_dice_is_one_minus_the_overlap_and_silent_where_there_is_no_defect():
    scores, coverage = RNG.normal(0, 2, (2, 6, 6)), RNG.random((2, 6, 6))
    p = 1 / (1 + np.exp(-scores))
    wanted = 1 - (2 * (p * coverage).sum() + 1) / (p.sum() + coverage.sum() + 1)
    assert float(dice_loss(torch.from_numpy(scores), torch.from_numpy(coverage))) == pytest.approx(wanted, rel=1e-6)
    assert float(dice_loss(torch.from_numpy(scores), torch.zeros(2, 6, 6))) == 0


def test_the_conditional_random_field_is_its_sum_over_all_pairs():
    scores = torch.from_numpy(RNG.normal(0, 2, (2, 15, 17)))
    images = torch.from_numpy(RNG.integers(90, 130, (2, 3, 15, 17), np.uint8))
    p, colours, total, pairs = scores.sigmoid().numpy(), images.numpy() / 255, 0.0, 0.0
    offsets = [2 * step for step in range(-3, 4)]
    for n in range(2):
        for y in range(15):
            for x in range(17):
                for down in offsets:
                    for right in offsets:
                        if (down, right) == (0, 0) or not (0 <= y + down < 15 and 0 <= x + right < 17):
                            continue
                        other = n, y + down, x + right
                        apart = ((colours[n, :, y, x] - colours[n, :, y + down, x + right]) ** 2).sum() / (2 * 0.1**2)
                        alike = math.exp(-(down**2 + right**2) / (2 * 6.0**2) - apart)
                        pairs += alike
                        total += alike * (p[n, y, x] * (1 - p[other]) + p[other] * (1 - p[n, y, x]))
    assert float(gated_crf_loss(scores, images)) == pytest.approx(total / pairs, rel=1e-5)


def test_neighbours_of_one_colour_agree_and_those_across_an_edge_need_not():
    image = torch.zeros(1, 3, 12, 24, dtype=torch.uint8)
    image[..., 12:] = 200
    along, across = torch.full((1, 12, 24), -6.0), torch.full((1, 12, 24), -6.0)
    along[..., 12:] = across[..., 5:17] = 6.0
    assert float(gated_crf_loss(along, image)) < 0.1 * float(gated_crf_loss(across, image))


def test_the_loss_of_a_batch_is_the_sum_of_what_its_labels_teach():
    network = random_network(dtype=torch.float32)
    given = batch()
    found = float(PartialLabelLoss(network)(**given))
    scores = network.score_map(normalised(IMAGES))
    each, whole = given["weights"][:, None, None], [0, 2]
    wanted = pooled_loss(network.logit(scores), given["holds"], given["weights"])
    wanted = wanted + pixel_loss(scores, given["coverage"], given["known"], each)
    wanted = wanted + 0.5 * pixel_loss(scores, torch.ones(4, 16, 16), given["clicked"], each)
    wanted = wanted + dice_loss(scores[whole], given["coverage"][whole])
    wanted = wanted + 0.1 * gated_crf_loss(scores[[1, 3]], IMAGES[[1, 3]])
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert (losses.CLICK_WEIGHT, losses.CRF_WEIGHT) == (0.5, 0.1)


def test_what_is_unknown_changes_nothing():
    network = random_network(dtype=torch.float32)
    before = float(PartialLabelLoss(network)(**batch()))
    changed = batch()["coverage"].clone()
    changed[1], changed[3, 8:] = 0.7, 0.3
    assert float(PartialLabelLoss(network)(**batch(coverage=changed))) == pytest.approx(before, rel=1e-6)


def test_the_papers_loss_is_that_of_the_classifier_alone():
    network = random_network(dtype=torch.float32)
    given = batch()
    logits = network(normalised(IMAGES))
    wanted = pooled_loss(logits, given["holds"], given["weights"])
    assert float(PartialLabelLoss(network, pixels=False)(**given)) == pytest.approx(float(wanted), rel=1e-6)


def test_a_crop_of_no_weight_gives_no_gradient():
    network = random_network(dtype=torch.float32).requires_grad_(True)

    def gradients(weight):
        network.zero_grad()
        holds, weights = torch.tensor([-1.0, 1, 0, -1]), torch.tensor([1.0, weight, 1, 1])
        PartialLabelLoss(network, pixels=False)(**batch(holds=holds, weights=weights)).backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    network.zero_grad()
    logits = network(normalised(IMAGES))
    (entropy_of_the_other := torch.nn.functional.binary_cross_entropy_with_logits(logits[2:3], torch.zeros(1)) / 2).backward()
    assert entropy_of_the_other > 0
    alone = [parameter.grad.clone() for parameter in network.parameters()]
    for found, wanted in zip(gradients(0.0), alone):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(*pair) for pair in zip(gradients(1.0), alone))
