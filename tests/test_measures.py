"""The measures against reference masks with known results, slow versions of their own, and the paper's own table."""

import json

import cv2
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.morphology import skeletonize

from defectcam.evaluation import measures
from defectcam.proposals import find_components
from tests.conftest import DATA

VECTORS = DATA / "measure_vectors"
EIGHT = np.ones((3, 3), bool)


@pytest.mark.skipif(not VECTORS.exists(), reason="../shared/data/measure_vectors is not on this machine")
def test_agrees_with_the_reference_vectors():
    expected = json.loads((VECTORS / "expected.json").read_text())
    assert len(expected) == 56
    wrong = []
    for name, wanted in expected.items():
        truth, proposed = (cv2.imread(str(VECTORS / f"{name}_{kind}.png"), 0) > 127 for kind in ("gt", "pred"))
        saved = measures.saved_per_component(proposed, truth, name.split("_")[1])
        found = [
            measures.iou(proposed, truth),
            measures.f1_2px(proposed, truth),
            measures.false_components(proposed, truth),
            measures.relative_time_saving(saved),
            *saved,
        ]
        keys = ("iou", "f1_2px", "false_components", "saved_eq3")
        target = [*(wanted[key] for key in keys), *wanted["saved_per_component"]]
        if len(found) != len(target) or np.abs(np.subtract(found, target)).max() > 0.02:
            wrong.append((name, np.round(found, 3).tolist(), np.round(target, 3).tolist()))
    assert wrong == []


@pytest.mark.parametrize(
    "instances, groups, percent",
    [(111, (19, 40, 30), 57), (65, (17, 19, 14), 58), (89, (22, 14, 9), 40), (265, (58, 73, 53), 51)],
    ids=["crack", "spalling", "rust", "all"],
)
def test_table_2_of_the_paper(instances, groups, percent):
    assert round(100 * measures.relative_time_saving_of_groups(instances, groups)) == percent
    saved = [share for share, count in zip((0.97, 0.8, 0.6), groups) for _ in range(count)]
    saved += [0.4] * (instances - len(saved))
    assert round(100 * measures.relative_time_saving(saved)) == percent


def test_empty_masks():
    empty = np.zeros((10, 12), bool)
    assert measures.iou(empty, empty) == measures.f1_2px(empty, empty) == 1.0
    assert measures.saved_per_component(empty, empty, "crack") == []
    assert measures.relative_time_saving([]) == 0.0
    assert measures.centreline_counts(empty, empty) == (0, 0, 0)
    nothing = measures.match_instances([], empty, "crack")
    assert len(nothing.found_iou) == len(nothing.right) == 0
    assert measures.reliability([], []) == ([], 0.0)


def blobs(rng: np.random.Generator, height: int, width: int, sigma_px: float, share: float) -> np.ndarray:
    """Random regions, (height, width) bool, that cover a share of the picture."""
    field = ndimage.gaussian_filter(rng.standard_normal((height, width)), sigma_px)
    return field > np.quantile(field, 1 - share)


def pairs_of_masks():
    """(proposed, truth) of many kinds: wider, shifted or in pieces, all with holes and false parts, some at the edge."""
    rng = np.random.default_rng(0)
    for number in range(24):
        height, width = rng.integers(30, 90, 2)
        truth = blobs(rng, height, width, (1.5, 3.0, 6.0)[number % 3], (0.05, 0.2, 0.5)[number % 4 % 3])
        noise = blobs(rng, height, width, 2.0, 0.1)
        kinds = ndimage.binary_dilation(truth), np.roll(truth, 3, (0, 1)), truth & blobs(rng, height, width, 4.0, 0.6)
        yield kinds[number // 3 % 3] ^ noise, truth


def lines_of(mask: np.ndarray) -> list[np.ndarray]:
    """Contours, (n, 1, 2) x, y."""
    return list(cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0])


def vertices_of(mask: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(point[0]) for line in lines_of(mask) for point in cv2.approxPolyDP(line, 2.0, True)]


def distances(points_xy: list, mask: np.ndarray) -> np.ndarray:
    """From points to the nearest boundary pixel of a mask, pair by pair."""
    boundary = mask & ~ndimage.binary_erosion(mask, EIGHT)
    if not boundary.any() or not len(points_xy):
        return np.full(len(points_xy), np.inf)
    return cdist(np.array(points_xy, float), np.argwhere(boundary)[:, ::-1].astype(float)).min(axis=1)


def slow_saved(proposed: np.ndarray, truth: np.ndarray, defect: str) -> list[float]:
    """The simulated annotator word by word, every component over the whole photo."""
    tau = max(3, (0.005 if defect == "crack" else 0.01) * max(truth.shape))
    count, labels = cv2.connectedComponents(truth.astype(np.uint8))
    best = None
    for radius in (0, -10, -6, -3, -1, 1, 3, 6):
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(radius) + 1,) * 2)
        morph = cv2.erode if radius < 0 else cv2.dilate
        morphed = morph(proposed.astype(np.uint8), disc) > 0 if radius else proposed
        parts, _ = ndimage.label(morphed, EIGHT)
        shares = []
        for label in range(1, count):
            own = labels == label
            if own.sum() < 30:
                continue
            near = ndimage.binary_dilation(own, np.ones((7, 7)))
            touching = np.isin(parts, [part for part in np.unique(parts[near]) if part])
            points = vertices_of(own)
            if not touching.any():
                shares.append(0.0)
                continue
            cost = int((distances(points, touching) > tau).sum()) + (radius != 0)
            for line in lines_of(touching):
                far = (distances([tuple(point[0]) for point in line], truth) > tau).tolist()
                starts = sum(one and not before for before, one in zip([far[-1], *far], far))
                cost += 2 * (1 if all(far) else starts)
            shares.append(min(max(1 - cost / max(3, len(points)), 0.0), 1.0))
        if best is None or sum(shares) > sum(best):
            best = shares
    return best


def test_the_simulated_annotator_equals_a_slow_one():
    for proposed, truth in pairs_of_masks():
        for defect in ("crack", "rust"):
            assert measures.saved_per_component(proposed, truth, defect) == pytest.approx(slow_saved(proposed, truth, defect))


def test_the_simulated_annotator_equals_a_slow_one_where_regions_are_large_or_many():
    rng = np.random.default_rng(1)
    for sigma_px, share in ((9.0, 0.1), (25.0, 0.3)):
        truth = blobs(rng, 200, 640, sigma_px, share)
        proposed = truth & blobs(rng, 200, 640, 3.0, 0.7) | blobs(rng, 200, 640, 20.0, 0.05)
        assert measures.saved_per_component(proposed, truth, "rust") == pytest.approx(slow_saved(proposed, truth, "rust"))


def test_of_nothing_proposed_nothing_is_saved():
    truth = np.zeros((40, 60), bool)
    truth[5:15, 5:15] = truth[20:30, 30:50] = truth[35, 2:5] = True
    assert measures.saved_per_component(np.zeros_like(truth), truth, "crack") == [0.0, 0.0]


def slow_instances(parts: list[np.ndarray], truth: np.ndarray, defect: str):
    """Found IoU, pieces, right and vertex ratio from whole masks, pair by pair."""
    count, labels = cv2.connectedComponents(truth.astype(np.uint8))
    components = [labels == label for label in range(1, count) if (labels == label).sum() >= 30]
    found_iou, right, ratio = [[] for _ in components], [], []
    pieces = [0] * len(components)
    for part in parts:
        finds = []
        grown = ndimage.binary_dilation(part, np.ones((5, 5)))
        for index, component in enumerate(components):
            overlap = (part & component).sum() / (part | component).sum()
            line = skeletonize(component)
            is_found = (grown & line).sum() / line.sum() >= 0.7 if defect == "crack" else overlap >= 0.5
            if is_found:
                found_iou[index].append(overlap)
            finds.append(is_found)
            pieces[index] += bool((ndimage.binary_dilation(component, np.ones((5, 5))) & part).any())
        right.append(any(finds) or (part & truth).sum() >= 0.7 * part.sum())
        its = [component for component in components if (component & part).any()]
        counts = [max(3, len(vertices_of(mask))) for mask in (part, *its)]
        ratio.append(counts[0] / sum(counts[1:]) if its else np.nan)
    return [max(some, default=np.nan) for some in found_iou], pieces, right, ratio


@pytest.mark.parametrize("defect", ["crack", "spalling"])
def test_found_instances_pieces_and_vertices_equal_a_slow_count(defect):
    seen = []
    for proposed, truth in pairs_of_masks():
        proposals = find_components(proposed)
        found = measures.match_instances(proposals, truth, defect)
        parts = []
        for one in proposals:
            x0, y0, x1, y1 = one.box_xyxy
            parts.append(np.zeros_like(truth))
            parts[-1][y0 : y1 + 1, x0 : x1 + 1] = one.mask
        found_iou, pieces, right, ratio = slow_instances(parts, truth, defect)
        assert found.found_iou == pytest.approx(found_iou, nan_ok=True)
        assert found.pieces.tolist() == pieces and found.right.tolist() == right
        assert found.vertex_ratio == pytest.approx(ratio, nan_ok=True)
        assert found.holes.tolist() == [len(lines_of(part)) - 1 for part in parts]
        seen += found_iou
    assert 5 < np.isfinite(seen).sum() < len(seen) - 5  # found ones and others


def test_a_crack_is_found_by_its_skeleton_and_a_spall_by_its_area():
    truth, wide, part = (np.zeros((60, 200), bool) for _ in range(3))
    truth[29:32, 10:190] = True
    wide[20:41, 10:190] = True  # covers the crack, seven times as wide
    part[29:32, 10:120] = True  # six tenths of it, exact
    for mask, defect, is_found, is_right in [
        (wide, "crack", True, True),
        (wide, "rust", False, False),
        (part, "crack", False, True),  # most of it lies within the truth
        (part, "rust", True, True),
    ]:
        match = measures.match_instances(find_components(mask), truth, defect)
        assert bool(np.isfinite(match.found_iou[0])) is is_found and bool(match.right[0]) is is_right
        assert match.pieces.tolist() == [1]


def test_small_holes_are_filled_the_smallest_first():
    mask = np.ones((20, 50), bool)
    mask[5, 5], mask[10:12, 10:12], mask[5:15, 20:40], mask[0, 45] = False, False, False, False  # 1, 4, 200 px, no hole
    area = mask.sum()
    for share, left in [(0, 3), (0.9 / area, 3), (1 / area, 2), (4.9 / area, 2), (5 / area, 1), (1.0, 0)]:
        filled, holes = measures.without_small_holes(mask, share)
        assert holes == left and filled.sum() - area == {3: 0, 2: 1, 1: 5, 0: 205}[left]
        assert not filled[0, 45]
    truth = np.ones((20, 50), bool)
    for share, holes in [(0.0, 3), (0.01, 1)]:
        match = measures.match_instances(find_components(mask), truth, "rust", share)
        assert match.holes.tolist() == [holes]
    assert match.vertex_ratio[0] == pytest.approx(len(vertices_of(measures.without_small_holes(mask, 0.01)[0])) / 4)


def test_centrelines_equal_a_slow_count():
    for proposed, truth in pairs_of_masks():
        own, wanted = np.argwhere(skeletonize(proposed)), np.argwhere(skeletonize(truth))
        gaps = cdist(own, wanted)
        found = int((gaps.min(axis=0) <= 4).sum())
        expected = found, int((gaps.min(axis=1) > 4).sum()), len(wanted) - found
        assert measures.centreline_counts(proposed, truth) == expected
    line, nothing = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    line[20, 5:35] = True
    assert measures.centreline_counts(line, nothing) == (0, 30, 0)
    assert measures.centreline_counts(nothing, line) == (0, 0, 30)
    assert measures.centreline_counts(np.roll(line, 4, axis=0), line) == (30, 0, 0)
    assert measures.centreline_counts(np.roll(line, 5, axis=0), line) == (0, 30, 30)


def test_skeletons_are_those_of_the_whole_mask():
    rng = np.random.default_rng(2)
    for sigma_px, share in ((2.0, 0.3), (12.0, 0.2), (25.0, 0.5), (40.0, 0.8)):
        mask = blobs(rng, 300, 400, sigma_px, share) | blobs(rng, 300, 400, 1.5, 0.05)
        assert np.array_equal(measures.skeleton(mask), skeletonize(mask))
    assert measures.skeleton(np.ones((90, 70), bool)).any()


def test_reliability_is_a_table_of_tenths():
    confidences = [0.05, 0.15, 0.15, 0.19, 0.95, 1.0]
    right = [False, True, False, False, True, True]
    table, error = measures.reliability(confidences, right)
    assert [(row["from"], row["proposals"]) for row in table] == [(0.0, 1), (0.1, 3), (0.9, 2)]
    assert [row["right"] for row in table] == pytest.approx([0, 1 / 3, 1])
    assert error == pytest.approx((1 * 0.05 + 3 * abs(0.49 / 3 - 1 / 3) + 2 * abs(0.975 - 1)) / 6)


def test_bootstrap_draws_photos_with_replacement():
    rng = np.random.default_rng(1)
    counts = np.column_stack([np.ones(40), rng.random(40)])
    drawn = measures.bootstrap_sums(counts)
    assert drawn.shape == (measures.BOOTSTRAP_DRAWS, 2) and (drawn[:, 0] == 40).all()
    assert np.array_equal(drawn, measures.bootstrap_sums(counts))
    means = [rng.choice(counts[:, 1], 40).mean() for _ in range(4000)]  # the textbook's way
    assert measures.interval_95(drawn[:, 1] / 40) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)
    assert measures.interval_95(np.array([np.nan, 0.5, np.inf])) == [0.5, 0.5]
    assert measures.interval_95(np.array([np.nan])) is None
