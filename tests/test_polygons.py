"""What the outlines promise: the component back from its polygon or mask, and sound geometry."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from shapely import LineString, Polygon, polygonize

from defectcam.deadline import Deadline, TimeLimitError
from defectcam.polygons import MAX_HOLES, mask_crop, outline_length_px, polygon_points_xy
from defectcam.proposals import Component, find_components
from tests.conftest import DATA

SETTINGS = {"tolerance_px": 1.0, "hole_share": 0.02}


def blobs(seed: int, sigma_px: float, height: int = 120, width: int = 150, level: float = 0.0) -> np.ndarray:
    """(height, width) bool: a smoothed random field above a level in its own standard deviations."""
    field = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    field = cv2.GaussianBlur(field, (0, 0), sigma_px)
    return field > level * field.std()


def disc(mask: np.ndarray, centre_xy: tuple[int, int], radius_px: int, value: bool = True) -> None:
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    mask[(x - centre_xy[0]) ** 2 + (y - centre_xy[1]) ** 2 <= radius_px**2] = value


def empty(height: int = 60, width: int = 80) -> np.ndarray:
    return np.zeros((height, width), bool)


def ring() -> np.ndarray:
    mask = empty()
    disc(mask, (40, 30), 25)
    disc(mask, (43, 28), 14, False)
    return mask


def sieve() -> np.ndarray:
    mask = empty(100, 100)
    mask[5:95, 5:95] = True
    for x in range(15, 95, 20):
        for y in range(15, 95, 20):
            disc(mask, (x + y // 15, y), 6, False)
    return mask


def nested() -> np.ndarray:
    mask = ring()
    disc(mask, (43, 28), 9)
    disc(mask, (43, 28), 4, False)
    return mask


def spiral() -> np.ndarray:
    mask = empty(120, 120).astype(np.uint8)
    angle = np.linspace(0, 8 * math.pi, 400)
    points = np.stack([60 + 2 * angle * np.cos(angle), 60 + 2 * angle * np.sin(angle)], 1)
    return cv2.polylines(mask, [points.round().astype(np.int32)], False, 1, 2).astype(bool)


def diagonal_chain() -> np.ndarray:
    mask = empty()
    mask[range(10, 40), range(10, 40)] = True
    mask[range(40, 20, -1), range(40, 60)] = True
    return mask


def line(rows: slice, columns: slice) -> np.ndarray:
    mask = empty()
    mask[rows, columns] = True
    return mask


def checkerboard() -> np.ndarray:
    return np.indices((12, 12)).sum(0) % 2 == 0


MASKS = {
    "one pixel": line(slice(7, 8), slice(9, 10)),
    "two pixels": line(slice(7, 8), slice(9, 11)),
    "row": line(slice(7, 8), slice(3, 70)),
    "column": line(slice(3, 50), slice(9, 10)),
    "corner pixel": line(slice(59, 60), slice(79, 80)),
    "whole image": np.ones((40, 50), bool),
    "one-pixel image": np.ones((1, 1), bool),
    "diagonal chain": diagonal_chain(),
    "checkerboard": checkerboard(),
    "spiral": spiral(),
    "ring": ring(),
    "sieve": sieve(),
    "nested": nested(),
    **{f"blobs {seed}": blobs(seed, 1.0 + seed) for seed in range(4)},
    "noise": blobs(9, 0.6, 40, 40),
}


@pytest.fixture(params=MASKS, ids=str)
def mask(request: pytest.FixtureRequest) -> np.ndarray:
    return MASKS[request.param]


def polygon_of(component: Component, mask: np.ndarray, **changes: float) -> np.ndarray:
    """(n, 2) float64 points of a component of the mask, with the defaults unless changed."""
    height, width = mask.shape
    points = polygon_points_xy(component, **(SETTINGS | changes), image_width=width, image_height=height)
    return np.array(points).reshape(-1, 2)


def painted(points_xy: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return cv2.fillPoly(np.zeros(mask.shape, np.uint8), [np.rint(points_xy).astype(np.int32)], 1).astype(bool)


def alone(component: Component, mask: np.ndarray) -> np.ndarray:
    """The mask with this component only."""
    left, top, right, bottom = component.box_xyxy
    full = np.zeros_like(mask)
    full[top : bottom + 1, left : right + 1] = component.mask
    return full


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return np.count_nonzero(first & second) / np.count_nonzero(first | second)


def signed_area_px(points_xy: np.ndarray) -> float:
    x, y = points_xy.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)


def edges_of(points_xy: np.ndarray) -> set[frozenset]:
    points = [tuple(point) for point in points_xy.tolist()]
    return {frozenset(edge) for edge in zip(points, points[1:] + points[:1])}


def bridges(points_xy: np.ndarray) -> set[frozenset]:
    """The edges that a ring runs along in both directions."""
    points = [tuple(point) for point in points_xy.tolist()]
    edges = set(zip(points, points[1:] + points[:1]))
    return {frozenset(edge) for edge in edges if edge[::-1] in edges}


def assert_sound(points_xy: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    assert len(points_xy) >= 3
    assert np.isfinite(points_xy).all() and (points_xy >= 0).all() and (points_xy < (width, height)).all()
    assert np.array_equal(points_xy, points_xy.round(2))
    assert (points_xy != np.roll(points_xy, -1, axis=0)).any(axis=1).all(), "twice in a row, or closed"


def half_width_px(component):
    """Radius of the largest disc inside the component."""
    return cv2.distanceTransform(np.pad(component.mask, 1).astype(np.uint8), cv2.DIST_L2, 5).max()


@pytest.mark.parametrize("name, edges", [("one pixel", 4), ("row", 2 * 67 + 2), ("whole image", 180), ("nested", None)])
def test_outline_length_counts_every_edge_once(name, edges):
    padded = np.pad(MASKS[name], 1).astype(int)
    wanted = sum(np.abs(np.diff(padded, axis=axis)).sum() for axis in (0, 1))
    assert edges in (None, wanted)
    components = find_components(MASKS[name])
    assert sum(outline_length_px(component.mask) for component in components) == wanted


class TestPolygon:
    def test_the_exact_outline_gives_the_component_back(self, mask):
        for component in find_components(mask):
            points = polygon_of(component, mask, tolerance_px=0, hole_share=0)
            assert_sound(points, mask)
            expected = alone(component, mask)
            assert np.array_equal(painted(points, mask), expected)
            assert np.array_equal(painted(np.trunc(points), mask), expected)

    @pytest.mark.parametrize("name", ["one pixel", "row", "ring", "spiral", "blobs 3", "whole image"])
    def test_pil_gives_it_back_too(self, name):
        mask = MASKS[name]
        for component in find_components(mask):
            points = polygon_of(component, mask, tolerance_px=0, hole_share=0)
            image = Image.new("1", mask.shape[::-1])
            ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=1, outline=1)
            assert iou(np.array(image), alone(component, mask)) >= 0.98

    @pytest.mark.parametrize("tolerance_px", [0.25, 0.5, 1.0, 2.0, 10.0])
    def test_a_simplified_one_agrees(self, mask, tolerance_px):
        for component in find_components(mask):
            points = polygon_of(component, mask, tolerance_px=tolerance_px)
            assert_sound(points, mask)
            # What is thinner than the tolerance cannot agree at it, and it shrinks to half at the least.
            if tolerance_px <= 0.25 or half_width_px(component) >= 5 * tolerance_px:
                assert iou(painted(points, mask), alone(component, mask)) >= 0.95

    def test_one_without_holes_is_valid_and_starts_and_turns_alike(self, mask):
        for component in find_components(mask):
            points = polygon_of(component, mask, hole_share=math.inf)
            assert Polygon(points).is_valid and len(np.unique(points, axis=0)) == len(points)
            assert signed_area_px(points) < 0 and tuple(points[0]) == min(map(tuple, points))

    def test_simplifying_saves_points(self):
        (component,) = find_components(ring())
        counts = [len(polygon_of(component, ring(), tolerance_px=tolerance)) for tolerance in (0, 0.5, 1, 2)]
        assert counts == sorted(counts, reverse=True) and counts[2] < counts[0] / 4

    @pytest.mark.parametrize("tolerance_px", [0, 1.0])
    def test_neighbours_stay_apart(self, tolerance_px):
        mask = blobs(5, 2.0)
        parts = [
            Polygon(polygon_of(component, mask, tolerance_px=tolerance_px, hole_share=math.inf)).exterior
            for component in find_components(mask)
        ]
        assert len(parts) > 3
        assert not any(one.intersects(other) for index, one in enumerate(parts) for other in parts[:index])

    @pytest.mark.parametrize("shift_xy", [(0, 0), (13, 7)])
    def test_it_moves_with_the_component(self, shift_xy):
        (component,) = find_components(ring())
        moved = Component(component.mask, component.left + shift_xy[0], component.top + shift_xy[1])
        large = empty(200, 200)
        assert np.allclose(polygon_of(moved, large) - shift_xy, polygon_of(component, large), atol=1e-9)

    @pytest.mark.parametrize(
        "changes",
        [{"tolerance_px": -1}, {"tolerance_px": math.nan}, {"tolerance_px": math.inf}, {"hole_share": -0.1},
         {"hole_share": math.nan}, {"image_width": 60}, {"image_height": 50}],
    )  # fmt: skip
    def test_what_cannot_be_is_refused(self, changes):
        (component,) = find_components(ring())
        with pytest.raises(ValueError):
            polygon_points_xy(component, **(SETTINGS | {"image_width": 80, "image_height": 60} | changes))


class TestHoles:
    @pytest.mark.parametrize("name, holes", [("ring", 1), ("sieve", 16), ("checkerboard", 50)])
    @pytest.mark.parametrize("tolerance_px", [0, 1.0])
    def test_bridges_cut_every_hole_free(self, name, holes, tolerance_px):
        mask = MASKS[name]
        (component,) = find_components(mask)
        cut = polygon_of(component, mask, hole_share=0, tolerance_px=tolerance_px)
        links = [LineString(sorted(link)) for link in bridges(cut)]
        assert len(links) == holes
        assert not any(one.crosses(other) for index, one in enumerate(links) for other in links[:index])

    @pytest.mark.parametrize("tolerance_px", [0, 1.0])
    def test_area_is_the_shell_less_the_holes(self, tolerance_px):
        (component,) = find_components(sieve())
        cut = polygon_of(component, sieve(), hole_share=0, tolerance_px=tolerance_px)
        rings = polygonize([LineString(sorted(edge)) for edge in edges_of(cut) - bridges(cut)])
        part = max(rings.geoms, key=lambda ring: ring.area)
        assert len(part.interiors) == 16 and part.is_valid
        shell_px, *holes_px = (Polygon(ring).area for ring in (part.exterior, *part.interiors))
        assert abs(signed_area_px(cut)) == pytest.approx(shell_px - sum(holes_px))

    def test_small_ones_are_filled_within_their_share(self):
        mask = empty()
        mask[5:55, 5:75] = True
        mask[10:30, 10:40] = False
        mask[40, 20] = mask[45, 50] = False
        (component,) = find_components(mask)
        for share, kept in [(0, 3), (0.02, 1), (0.5, 0)]:
            assert len(bridges(polygon_of(component, mask, hole_share=share))) == kept

    def test_of_very_many_the_largest_are_kept_in_time(self):
        mask = np.ones((450, 450), bool)
        mask[2::4, 2::4] = False  # 12 544 holes
        mask[100:103, 200:203] = mask[301:304, 301:304] = False
        (component,) = find_components(mask)
        points = polygon_of(component, mask)
        assert_sound(points, mask)
        assert len(bridges(points)) == MAX_HOLES
        filled = painted(points, mask)
        assert not filled[101, 201] and not filled[302, 302]

    def test_the_deadline_holds_for_an_outline_too(self):
        (component,) = find_components(sieve())
        with pytest.raises(TimeLimitError):
            polygon_of(component, sieve(), deadline=Deadline(0))

    def test_many_small_ones_are_not_all_lost(self):
        mask = empty(101, 101)
        mask[::4] = mask[:, ::4] = True
        (component,) = find_components(mask)
        assert iou(painted(polygon_of(component, mask), mask), mask) >= 0.95


def test_a_mask_decodes_to_the_component(mask):
    for component in find_components(mask):
        *values, left, top, right, bottom = mask_crop(component)
        assert (left, top, right, bottom) == component.box_xyxy
        decoded = np.array(values).reshape(bottom - top + 1, right - left + 1)
        assert np.array_equal(decoded.astype(bool), component.mask) and set(values) <= {0, 1}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real masks are not beside this checkout")
@pytest.mark.parametrize(
    "folder, least_iou",
    [
        ("deepcrack/masks/crack", 0.92),
        ("uav75/masks/crack", 0.85),  # 1 to 3 px wide: half a pixel of tolerance is much of that
        ("phinet_labelled/masks/spalling", 0.95),
        ("steelbridge440/masks/rust", 0.95),
    ],
)
def test_real_masks(folder, least_iou):
    agreements, areas_px = [], []
    for path in sorted((DATA / folder).glob("*.png"))[:6]:
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
        for component in find_components(mask):
            points = polygon_of(component, mask)
            assert_sound(points, mask)
            agreements.append(iou(painted(points, mask), alone(component, mask)))
            areas_px.append(component.area_px)
    assert np.min(agreements) >= least_iou
    if "uav75" not in folder:
        assert np.average(agreements, weights=areas_px) >= 0.95
