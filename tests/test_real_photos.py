"""What the shipped weights do on real photos: quiet where nothing is, the same whatever the frame."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from defectcam.evaluation.measures import f1_2px, iou
from defectcam.request import Settings
from defectcam.tiling import CLIMBED_CORE_PX, tile_grid
from model_handler import ModelHandler, defect_mask
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model():
    return ModelHandler(ROOT / "weights", "cpu", Settings(), logging.getLogger("test"))


def crack_mask(model, image_rgb, **given) -> np.ndarray:
    mask = np.zeros(image_rgb.shape[:2], bool)
    for component, _ in model.components(np.ascontiguousarray(image_rgb), "crack", Settings(**given)):
        x0, y0, x1, y1 = component.box_xyxy
        mask[y0 : y1 + 1, x0 : x1 + 1] |= component.mask
    return mask


@pytest.fixture(scope="module")
def wall(photos) -> np.ndarray:
    """Four real photos of cracked concrete side by side, 1088 x 768: larger than a tile."""
    images = [image for _, image, _ in photos("deepcrack", limit=4)]
    return np.vstack([np.hstack(images[:2]), np.hstack(images[2:])])


def test_photos_without_the_defect_get_no_proposals(model, photos):
    healthy = [image for _, image, mask in photos("phinet_labelled", defect="crack") if not mask.any()]
    assert len(healthy) >= 20
    healthy += [image[:448, :640] for _, image, _ in photos("steelbridge440", limit=10)]
    quiet = sum(not crack_mask(model, image).any() for image in healthy)
    assert quiet >= 0.9 * len(healthy)


# Climbing depends on the grid of tiles, the plain map does not; four photos are long to climb, two will do.
@pytest.mark.parametrize("iterations, height", [(0, 768), (2, 384)])
def test_an_interior_crop_and_the_full_photo_agree(model, wall, iterations, height):
    photo = wall[:height]
    full = crack_mask(model, photo, iterations=iterations)
    top, left = height // 8 + 2, photo.shape[1] // 8 + 2  # no multiples of the network's stride
    crop = crack_mask(model, photo[top:-top, left:-left], iterations=iterations)
    margin = 100  # nearer to its edge a crop cannot know what the photo knows
    inner = crop[margin:-margin, margin:-margin]
    wanted = full[top + margin : -top - margin, left + margin : -left - margin]
    assert wanted.sum() > 500
    assert iou(inner, wanted) >= 0.9


@pytest.mark.parametrize("iterations, height", [(0, 768), (2, 384)])
def test_a_photo_shifted_by_half_a_tile_agrees_with_itself(model, wall, iterations, height):
    photo, network = wall[:height], model.weights.networks["crack"]
    first = tile_grid(*photo.shape[:2], network.climb_halo_px, network.stride_px, CLIMBED_CORE_PX)[0]
    half = (first.core[3] - first.core[2]) // 2
    full = crack_mask(model, photo, iterations=iterations)
    shifted = crack_mask(model, photo[:, half:], iterations=iterations)
    margin = 100
    assert iou(shifted[:, margin:], full[:, half + margin :]) >= 0.9


def test_crack_outlines_are_worth_keeping(model, photos):
    """Far below what the model card states, far above what the plain map gives: a wrong turn shows here."""
    snapped, plain = [], []
    fact, effective = model.weights.facts["crack"], model.effective("crack", Settings(iterations=0))
    for _, image, mask in photos("deepcrack", defect="crack", limit=8):
        snapped.append(f1_2px(crack_mask(model, image), mask))
        climbed = model.maps(image, "crack", effective).climbed
        plain.append(f1_2px(defect_mask(image, climbed, replace(fact, snap=None), effective, None), mask))
    assert np.mean(snapped) >= 0.5 and np.mean(snapped) > np.mean(plain)


def test_results_do_not_depend_on_earlier_requests(model, wall):
    first = crack_mask(model, wall[:384, :544])
    crack_mask(model, wall[384:, 544:])
    assert np.array_equal(first, crack_mask(model, wall[:384, :544]))
