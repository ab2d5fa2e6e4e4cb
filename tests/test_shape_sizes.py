"""Sizes of drawn shapes of known length and width."""

import math

import cv2
import numpy as np
import pytest

from defectcam.bulk.measures import CORE_PX, ShapeSize, shape_size
from defectcam.proposals import Component, find_components


def measured(mask: np.ndarray) -> ShapeSize:
    (component,) = find_components(mask)
    return shape_size(component)


def bar(length_px: float, width_px: float, degrees: float, side: int = 400) -> np.ndarray:
    """(side, side) bool: pixels whose middle lies in a slanting rectangle."""
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2 - 0.13
    along = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
    across = y * math.cos(math.radians(degrees)) - x * math.sin(math.radians(degrees))
    return (abs(along) <= length_px / 2) & (abs(across) <= width_px / 2)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 12])
def test_a_straight_crack_has_its_length_and_width_to_half_a_pixel(width):
    mask = np.zeros((60, 340), bool)
    mask[20 : 20 + width, 20:320] = True
    for one in (mask, mask.T):
        size = measured(one)
        assert size.area_px == 300 * width
        assert size.length_px == pytest.approx(300, abs=0.51)
        assert size.mean_width_px == pytest.approx(width, abs=0.05) and size.largest_width_px == width


@pytest.mark.parametrize("width", [2, 3, 7, 20])
@pytest.mark.parametrize("degrees", [5, 10, 30, 45, 80])
def test_a_slanting_crack_is_as_long_and_wide(width, degrees):
    mask = bar(300, width, degrees)
    size = measured(mask)
    assert size.length_px == pytest.approx(300, rel=0.03)
    assert size.mean_width_px == pytest.approx(mask.sum() / 300, rel=0.1)
    assert size.largest_width_px == pytest.approx(mask.sum() / 300, rel=0.1, abs=0.8)


def test_curves_branches_rings_and_steps_of_width():
    x = np.arange(50.0, 950)
    wave = np.stack([x, 300 + 100 * np.sin(x / 60)], axis=1)
    canvas = np.zeros((600, 1000), np.uint8)
    cv2.polylines(canvas, [np.rint(wave).astype(np.int32)], False, 1, 3)
    length = np.hypot(*np.diff(wave, axis=0).T).sum()
    assert measured(canvas).length_px == pytest.approx(length, rel=0.02)
    branches = np.zeros((600, 600), np.uint8)
    branches[298:303, 50:550] = branches[50:303, 298:303] = 1
    assert measured(branches).length_px == pytest.approx(500 + 250, rel=0.01)
    y, x = np.mgrid[:500, :500] - 250
    ring = measured(abs(np.hypot(x, y) - 200) <= 2.5)
    assert ring.length_px == pytest.approx(2 * math.pi * 200, rel=0.02) and ring.mean_width_px == pytest.approx(5, rel=0.1)
    steps = np.zeros((60, 440), bool)
    steps[27:33, 20:220] = steps[29:31, 220:420] = True  # half of it is 6 px wide, half 2 px
    size = measured(steps)
    assert size.mean_width_px == pytest.approx(4, rel=0.02) and size.largest_width_px == 6
    assert size.length_px == pytest.approx(400, abs=4)


def test_blocks_join_without_a_seam_and_wide_shapes_are_measured_too():
    side = 3 * CORE_PX
    long = bar(4 * CORE_PX, 5, 41, side)
    long_px = min(4 * CORE_PX, side / math.cos(math.radians(41)))  # it leaves the photo
    assert measured(long).length_px == pytest.approx(long_px, rel=0.01)
    disc = np.hypot(*(np.mgrid[:900, :900] - 450)) <= 400
    size = measured(disc)
    assert size.largest_width_px == pytest.approx(800, rel=0.03)
    small = shape_size(Component(np.ones((1, 1), bool), 7, 9))
    assert small.area_px == small.mean_width_px == small.largest_width_px == 1 and small.length_px <= 1.5


def test_millimetres():
    assert ShapeSize(100, 50.0, 2.0, 3.0).in_mm(0.5) == (25.0, 25.0, 1.0, 1.5)
