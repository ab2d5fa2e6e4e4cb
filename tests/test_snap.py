"""Snapping follows dark lines, inside the region only, and by what is near alone."""

import cv2
import numpy as np
import pytest

from defectcam.snap import check_parameters, snap

PARAMETERS = {"method": "dark_ridges", "width_px": 17, "sharpness": 2.0, "closing_radius_px": 2, "min_area_px": 40}


@pytest.fixture(scope="module")
def wall():
    """(700, 900, 3) concrete-like noise with two cracks, and the cracks' mask."""
    rng = np.random.default_rng(0)
    grey = 150 + cv2.GaussianBlur(rng.normal(0, 25, (700, 900)), (0, 0), 1.5)
    mask = np.zeros((700, 900), np.uint8)
    for points in ([(50, 60), (300, 200), (820, 260)], [(100, 600), (400, 420), (850, 500)]):
        cv2.polylines(mask, [np.array(points)], False, 1, 4)
    grey[mask > 0] = 60
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2), mask > 0


def band(mask, radius_px=20):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * radius_px + 1,) * 2, np.uint8)) > 0


def test_the_outline_is_the_crack_not_the_band(wall):
    image, crack = wall
    region = band(crack)
    found = snap(image, region, PARAMETERS)
    assert not (found & ~region).any()
    assert (found & crack).sum() / (found | crack).sum() > 0.6 > 0.2 > crack.sum() / region.sum()


def test_a_region_without_a_line_gives_nothing(wall):
    image, _ = wall
    region = np.zeros(image.shape[:2], bool)
    assert not snap(image, region, PARAMETERS).any()
    region[300:380, 700:880] = True  # noise alone
    assert snap(image, region, PARAMETERS).sum() < 0.05 * region.sum()


def test_one_region_does_not_change_what_another_gives(wall):
    image, crack = wall
    upper, lower = band(crack), band(crack)
    upper[330:], lower[:330] = False, False
    both = snap(image, upper | lower, PARAMETERS)
    assert np.array_equal(both, snap(image, upper, PARAMETERS) | snap(image, lower, PARAMETERS))


def test_a_crop_gives_what_the_photo_gives(wall):
    image, crack = wall
    full = snap(image, band(crack), PARAMETERS)
    crop = snap(image[40:640, 30:800], band(crack)[40:640, 30:800], PARAMETERS)
    inner = (slice(100, -100), slice(100, -100))
    assert np.array_equal(crop[inner], full[40:640, 30:800][inner])


def test_network_and_ridge_find_together_what_neither_finds_alone(wall):
    """The network knows half of the upper crack, calls the lower one a joint and sees nothing else."""
    image, crack = wall
    upper, lower = crack.copy(), crack.copy()
    upper[330:], lower[:330] = False, False
    known = upper.copy()
    known[:, 450:] = False
    logits = np.full(crack.shape, -4.0)
    logits[known], logits[band(lower, 6)] = 3.0, -12.0
    both = {"method": "network_ridges", "probability": 0.3, "ridge_weight": 1.5, "width_px": 9, "closing_radius_px": 2}
    network = {"method": "network", "probability": 0.3, "margin_px": 0, "min_area_px": 40}
    found = snap(image, band(crack), both | {"min_area_px": 40}, lambda wanted: logits)
    alone = snap(image, band(crack), network, lambda wanted: logits)
    assert (alone & upper).sum() < 0.6 * upper.sum() < 0.9 * upper.sum() < (found & band(upper, 2) & upper).sum()
    assert not (found & band(lower, 2)).any()
    assert found.sum() < 2 * upper.sum()


@pytest.mark.parametrize(
    "change",
    [{"method": "magic"}, {"width_px": -1}, {"width_px": 17.5}, {"closing_radius_px": 2.5}, {"min_area_px": True},
     {"sharpness": "high"}, {"sharpness": True}, {"extra": 1}],
)  # fmt: skip
def test_parameters_it_cannot_work_with_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        check_parameters(PARAMETERS | change)
    check_parameters(PARAMETERS)
