"""Threshold, closing, bridging and area against what they are for."""

import cv2
import numpy as np
import pytest

from defectcam import postprocess
from defectcam.deadline import Deadline, TimeLimitError
from defectcam.postprocess import Cleaning, bridged, drop_small, regions

AS_IT_IS = Cleaning(0, 0, 0)


def pieces(mask: np.ndarray) -> int:
    """How many 8-connected regions a mask has."""
    return cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0] - 1 if mask.size else 0


def line(columns: list[tuple[int, int]], rows: slice = slice(19, 22), width: int = 120) -> np.ndarray:
    """(40, width) bool: parts of one horizontal line, from and to these columns."""
    mask = np.zeros((40, width), bool)
    for start, end in columns:
        mask[rows, start:end] = True
    return mask


def test_only_what_is_above_the_threshold_counts():
    logits = np.array([[-1, 0.5, 0.50001]], np.float32)
    assert regions(logits, np.float32(0.5), AS_IT_IS).tolist() == [[False, False, True]]
    assert not regions(np.zeros((20, 20), np.float32), 0.0, Cleaning(3, 3, 0)).any()


def test_closing_joins_what_is_nearer_than_its_disc_and_small_noise_goes():
    mask = line([(5, 38), (41, 75)])  # a crack with a gap of 3 px
    mask[5:7, 5:7] = True  # noise of 4 px
    logits = np.where(mask, 3, -3).astype(np.float32)
    closed = regions(logits, 0, Cleaning(4, 0, 10))
    assert closed[20, 5:75].all() and not closed[:10].any() and pieces(closed) == 1
    assert not regions(logits, 0, Cleaning(0, 0, 10))[20, 39]
    assert (closed | ~mask)[10:].all(), "closing takes nothing away"


def test_at_the_edge_closing_takes_nothing_away():
    mask = np.random.default_rng(0).random((30, 40)) > 0.7
    closed = regions(np.where(mask, 1, -1).astype(np.float32), 0, Cleaning(5, 0, 0))
    assert closed[mask].all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("gap_px", [1, 2, 5, 12])
def test_gaps_of_at_most_gap_px_are_bridged(gap_px, turned):
    mask = line([(5, 40), (40 + gap_px, 90)])
    logits = np.where(mask, 2, -2).astype(np.float32)
    if turned:
        mask, logits = np.ascontiguousarray(mask.T), np.ascontiguousarray(logits.T)
    joined = bridged(mask, logits, gap_px)
    assert pieces(joined) == 1 and joined[mask].all()
    added = joined & ~mask
    assert gap_px <= added.sum() <= 3 * gap_px + 6, "a joint is a line of 3 px"
    assert np.array_equal(bridged(mask, logits, gap_px - 1), mask)


def test_a_joint_follows_the_map_s_ridge_however_high_its_ends_are():
    """The ridge leaves the straight line by 3 px; it is fainter than the pieces by far."""
    ys = 20 + np.rint(3 * np.sin(np.linspace(0, np.pi, 12))).astype(int)
    for piece_logit in (0.5, 12.0):
        mask = line([(5, 40), (52, 90)], rows=slice(20, 21))
        logits = np.where(mask, piece_logit, -6).astype(np.float32)
        logits[ys, np.arange(40, 52)] = -1.5
        joined = bridged(mask, logits, 12)
        assert pieces(joined) == 1
        ridge = np.zeros_like(mask)
        ridge[ys, np.arange(40, 52)] = True
        assert joined[ridge].all()
        assert not (joined & ~mask & ~cv2.dilate(ridge.view(np.uint8), np.ones((3, 3))).view(bool)).any()


def test_a_chain_of_pieces_becomes_one():
    columns = [(start, start + 6) for start in range(3, 110, 10)]
    mask = line(columns)
    assert pieces(mask) == 11 and pieces(bridged(mask, mask.astype(np.float32), 4)) == 1
    assert pieces(bridged(mask, mask.astype(np.float32), 3)) == 11


def test_shorter_gaps_are_bridged_first_and_no_ring_is_closed():
    """Three pieces: A and C are each 3 px from B, and 9 px from each other. Two joints are enough."""
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:14] = True  # A
    mask[10:14, 17:35] = True  # B, beside A's upper end
    mask[17:50, 23:27] = True  # C, below B; 9 px to the right of A
    joined = bridged(mask, np.zeros(mask.shape, np.float32), 12)
    assert pieces(joined) == 1
    assert not (joined & ~mask)[20:].any(), "A and C are joined by B already"
    alone = mask.copy()
    alone[:17, 17:] = False  # without B they are joined directly
    assert pieces(bridged(alone, np.zeros(mask.shape, np.float32), 12)) == 1
    assert pieces(bridged(alone, np.zeros(mask.shape, np.float32), 8)) == 2


def test_bridging_is_the_same_wherever_pieces_lie():
    """What joins two pieces depends on what is near, not on the rest of the photo nor on its frame."""
    rng = np.random.default_rng(0)
    logits = cv2.GaussianBlur(rng.normal(size=(150, 160)).astype(np.float32), (0, 0), 2)
    mask = logits > np.quantile(logits, 0.85)
    large, large_logits = np.zeros((300, 330), bool), np.full((300, 330), -9, np.float32)
    large[100:250, 90:250], large_logits[100:250, 90:250] = mask, logits
    large[:80] = rng.random((80, 330)) > 0.9
    framed = np.full((170, 180), -9, np.float32)
    framed[10:-10, 10:-10] = logits
    small = bridged(np.pad(mask, 10), framed, 6)
    assert np.array_equal(bridged(large, large_logits, 6)[90:260, 80:260], small)
    assert pieces(small) < pieces(mask) - 10


@pytest.mark.parametrize("rows", [1, 7, 59, 60, 61])
def test_gaps_are_found_in_whatever_strips_they_are_sought(monkeypatch, rows):
    """Gaps lie across the strips in every direction."""
    logits = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(60, 90)).astype(np.float32), (0, 0), 1.5)
    mask = logits > np.quantile(logits, 0.85)
    monkeypatch.setattr(postprocess, "ROWS_AT_ONCE", 1000)
    whole = bridged(mask, logits, 6)
    assert pieces(whole) < pieces(mask) - 10
    monkeypatch.setattr(postprocess, "ROWS_AT_ONCE", rows)
    assert np.array_equal(bridged(mask, logits, 6), whole)


def test_small_pieces_that_join_are_kept_and_others_dropped():
    columns = [(start, start + 5) for start in range(3, 110, 8)]  # of 15 px each
    mask = line(columns)
    mask[2:5, 30:35] = True  # as small, and alone
    logits = np.where(mask, 2, -2).astype(np.float32)
    found = regions(logits, 0, Cleaning(0, 3, 100))
    assert pieces(found) == 1 and found[19:22][mask[19:22]].all() and not found[:10].any()
    assert not regions(logits, 0, Cleaning(0, 2, 100)).any()


def test_drop_small_counts_diagonal_neighbours_and_keeps_the_rest_as_it_is():
    mask = np.zeros((30, 30), bool)
    mask[range(8), range(8)] = True  # 8 px, connected by corners
    mask[20:22, 20:23] = True  # 6 px
    assert np.array_equal(drop_small(mask, 8), mask & (np.arange(30)[:, None] < 10))
    assert np.array_equal(drop_small(mask, 0), mask)
    assert not drop_small(np.zeros((0, 0), bool), 5).any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (1, 1), (1, 9), (9, 1), (2, 2), (3, 40)])
def test_the_smallest_images(shape):
    cleaning = Cleaning(3, 5, 1)
    assert not regions(np.full(shape, -1, np.float32), 0, cleaning).any()
    assert regions(np.full(shape, 1, np.float32), 0, cleaning).all()
    apart = np.full(shape, -1, np.float32)
    apart[:1, :1] = apart[-1:, -1:] = 1
    found = regions(apart, 0, Cleaning(0, 50, 1))
    assert found.shape == shape and found.dtype == bool and pieces(found) == (apart.size > 0)


def test_a_large_map_of_noise_is_done_or_given_up_in_time():
    logits = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(400, 500)).astype(np.float32), (0, 0), 1.5)
    threshold, cleaning = float(np.quantile(logits, 0.9)), Cleaning(1, 6, 24)
    mask = logits > threshold
    joined = bridged(mask, logits, 6)
    assert pieces(mask) > 1000 and pieces(joined) < pieces(mask) / 4 and joined[mask].all()
    with pytest.raises(TimeLimitError):
        regions(logits, threshold, cleaning, deadline=Deadline(0))


def test_a_large_mask_of_few_pieces():
    logits = np.full((3000, 4000), -4, np.float32)
    logits[200:2800, 100:1990] = logits[200:2800, 1995:3900] = 3
    found = regions(logits, 0, Cleaning(2, 10, 1000))
    assert pieces(found) == 1 and 2600 * 1890 < found.sum() - 2600 * 1905 < 2600 * 1890 + 100


@pytest.mark.parametrize("radius, gap", [(0, 0), (3, 0), (0, 8), (4, 6)])
def test_what_lies_beyond_the_reach_does_not_matter(radius, gap):
    """So far and no farther a climb must go around a region."""
    cleaning = Cleaning(radius, gap, 1)
    rng = np.random.default_rng(radius + gap)
    for _ in range(20):
        logits = cv2.GaussianBlur(rng.normal(size=(120, 120)).astype(np.float32), (0, 0), 2)
        threshold = float(np.quantile(logits, 0.9))
        labels = cv2.connectedComponents(regions(logits, threshold, cleaning).view(np.uint8))[1]
        region = labels == labels[60, 60] if labels[60, 60] else labels == 1
        size = 2 * cleaning.reach_px + 1
        near = cv2.dilate(region.view(np.uint8), np.ones((size, size), np.uint8)).view(bool)
        other = np.where(near, logits, np.roll(logits, (40, 50), (0, 1)))
        found = cv2.connectedComponents(regions(other, threshold, cleaning).view(np.uint8))[1]
        labels_there = np.unique(found[region])
        assert len(labels_there) == 1 and np.array_equal(found == labels_there[0], region)
