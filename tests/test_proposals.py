"""Components of a mask, what their confidence is made of, and ids that stay."""

import math

import numpy as np
import pytest

from defectcam.proposals import (
    FEATURES,
    LARGEST_LOGIT,
    component_confidence,
    component_features,
    find_components,
    logit,
    probability,
    proposal_id,
)
from tests.test_polygons import MASKS, alone, blobs, checkerboard, disc, empty, line, nested, ring


@pytest.fixture(params=MASKS, ids=str)
def mask(request: pytest.FixtureRequest) -> np.ndarray:
    return MASKS[request.param]


def test_they_are_the_mask_in_order(mask):
    components = find_components(mask)
    rebuilt = np.zeros(mask.shape, int)
    for component in components:
        assert component.mask.dtype == bool and component.area_px == component.mask.sum()
        assert component.mask[0].any() and component.mask[-1].any()
        assert component.mask[:, 0].any() and component.mask[:, -1].any()
        rebuilt += alone(component, mask)
    assert np.array_equal(rebuilt, mask)
    order = [(component.top, component.left, component.area_px) for component in components]
    assert order == sorted(order)


def test_corners_join_and_gaps_part():
    assert len(find_components(checkerboard())) == 1
    stripes = empty()
    stripes[:, ::2] = True
    assert len(find_components(stripes)) == 40


def test_a_part_inside_a_hole_is_its_own():
    assert [component.area_px for component in find_components(nested())] == [
        ring().sum(),
        nested().sum() - ring().sum(),
    ]


def test_an_empty_mask_has_none_and_a_wrong_one_is_refused():
    assert find_components(empty()) == []
    with pytest.raises(ValueError, match="two dimensions"):
        find_components(np.ones((2, 2, 3), bool))


def test_numbers_count_as_masks():
    grey = ring().astype(np.uint8) * 255
    assert np.array_equal(find_components(grey)[0].mask, find_components(ring())[0].mask)


def features_of(mask: np.ndarray, logits: np.ndarray | float = 1.0, levels=None) -> tuple[float, ...]:
    (component,) = find_components(mask)
    logits = np.broadcast_to(np.float32(logits), mask.shape)
    return component_features(component, logits, levels or {1.0: logits})


def test_features_are_the_map_s_evidence_inside_the_component():
    mask = ring()
    logits = np.random.default_rng(0).normal(0, 3, mask.shape).astype(np.float32)
    inside = np.clip(logits[mask], -LARGEST_LOGIT, LARGEST_LOGIT)
    assert (np.abs(logits[mask]) > LARGEST_LOGIT).any()
    found = features_of(mask, logits)
    assert len(found) == FEATURES
    assert found[0] == pytest.approx(inside.mean(), abs=1e-5) and found[1] == pytest.approx(np.quantile(inside, 0.9), abs=1e-5)
    logits[~mask] = 1000
    assert features_of(mask, logits) == found, "the hole and the surroundings do not count"


def test_features_are_size_and_shape():
    diagonal, width, aspect, *_ = features_of(line(slice(10, 14), slice(5, 65)))[2:]
    assert diagonal == pytest.approx(math.log2(math.hypot(4, 60))) and width == pytest.approx(math.log2(240) - diagonal)
    assert aspect == pytest.approx(math.log2(4 / 60), abs=0.01)
    turned = features_of(line(slice(5, 55), slice(10, 14)))
    assert turned[4] == pytest.approx(math.log2(4 / 50), abs=0.01)
    full = empty()
    disc(full, (40, 30), 20)
    assert features_of(full)[4] == pytest.approx(0, abs=0.01)
    diagonal_line = np.eye(50, dtype=bool)
    assert features_of(diagonal_line)[4] < -4 < features_of(blobs(3, 4.0) | (blobs(3, 4.0, level=-9)))[4]
    assert all(map(math.isfinite, features_of(line(slice(7, 8), slice(9, 10)))))


def test_features_are_what_the_three_finest_levels_say_and_whether_they_agree():
    mask = line(slice(10, 14), slice(5, 65))
    height, width = mask.shape
    levels = {scale: np.full((math.ceil(height * scale), math.ceil(width * scale)), -50, np.float32) for scale in (1.0, 0.5, 0.25, 0.125)}
    levels[1.0][10:14, 5:65] = 5
    levels[0.5][5:7, 2:33] = 2  # the same region at half the size
    levels[0.25][2:4, 1:17] = -1
    *_, mean, deviation = features_of(mask, levels=levels)
    assert mean == pytest.approx(2) and deviation == pytest.approx(np.std([5, 2, -1]))
    del levels[1.0], levels[0.125]  # of a network that begins at half the size
    assert features_of(mask, levels=levels)[5:] == pytest.approx((0.5, 1.5))
    assert features_of(mask)[5:] == (1.0, 0.0), "one level agrees with itself"
    last = empty()
    last[-1, -1] = True  # of an odd size the coarse levels are rounded up
    assert all(map(math.isfinite, features_of(last, levels=levels)))


def test_confidence_is_a_logistic_regression():
    features, weights = (0.5, -1.0, 2.0, 3.0, -0.25, 1.0, 0.5), (1.0, 2.0, 0.5, -0.1, 4.0, 0.2, -2.0, 0.3)
    total = 0.5 - 2.0 + 1.0 - 0.3 - 1.0 + 0.2 - 1.0 + 0.3
    assert component_confidence(features, weights) == pytest.approx(1 / (1 + math.exp(-total)))
    assert component_confidence(features, (1e6,) * 7 + (0.0,)) == 1.0 and component_confidence(features, (0.0,) * 8) == 0.5


def test_probability_and_its_inverse():
    assert probability(np.array([-1e9, 0.0, 1e9])).tolist() == [0.0, 0.5, 1.0]
    for value in (0.001, 0.3, 0.5, 0.99):
        assert probability(logit(value)) == pytest.approx(value)
    assert logit(0) == pytest.approx(-logit(1)) == pytest.approx(math.log(1e-6), rel=1e-6)


def test_ids_are_short_unique_and_stable():
    ids = [proposal_id(digest, defect, rank) for digest in "de" for defect in ("crack", "rust") for rank in range(200)]
    assert len(set(ids)) == len(ids) == 800
    assert all(len(name) == 8 and int(name, 16) >= 0 for name in ids)
    assert ids[0] == proposal_id("d", "crack", 0)
