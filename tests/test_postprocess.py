"""Threshold, closing and area against what they are for."""

import numpy as np

from defectcam.postprocess import binarise, drop_small


def test_closing_joins_a_broken_crack_and_small_noise_goes():
    normalised = np.zeros((60, 80), np.float32)
    normalised[28:33, 5:38] = normalised[28:33, 41:75] = 0.3  # a crack with a gap of 3 px
    normalised[5:7, 5:7] = 0.9  # noise of 4 px
    mask = binarise(normalised, 0.1, closing_radius_px=4, min_area_px=10)
    assert mask[30, 5:75].all()
    assert not mask[:10].any()
    assert not binarise(normalised, 0.1, 0, 10)[30, 39]


def test_threshold_is_exclusive_so_an_empty_map_proposes_nothing():
    assert not binarise(np.zeros((20, 20), np.float32), 0.0, 3, 0).any()
    assert binarise(np.full((20, 20), 0.2, np.float32), 0.1, 0, 1).all()
    assert not binarise(np.full((20, 20), 0.1, np.float32), np.float32(0.1), 0, 1).any()


def test_drop_small_counts_diagonal_neighbours_and_keeps_the_rest_as_it_is():
    mask = np.zeros((30, 30), bool)
    mask[range(8), range(8)] = True  # 8 px, connected by corners
    mask[20:22, 20:23] = True  # 6 px
    assert np.array_equal(drop_small(mask, 8), mask & (np.arange(30)[:, None] < 10))
    assert np.array_equal(drop_small(mask, 0), mask)
    assert not drop_small(np.zeros((0, 0), bool), 5).any()
