"""Crops of outlined and clicked photos: what they show, what is known of them, and in which order they come."""

import dataclasses
import os
import resource

import numpy as np
import pytest
import torch

from defectcam.training.clicks import Click
from defectcam.training.dataset import CropDataset, PhotoLabels, on_disk
from defectcam.training.labels import UNKNOWN
from tests.conftest import dark_wall


def outlined(*spots, seed=0, height=96, width=160):
    """A wall with dark spots (x, y, radius) and its outline."""
    image_rgb, mask = dark_wall(list(spots), height, width, seed=seed)
    return PhotoLabels(image_rgb, mask.astype(np.uint8) * np.uint8(255))


def plain(grey, height=64, width=64, clicks=(), outline=True):
    """A photo of one grey without the defect."""
    image_rgb = np.full((height, width, 3), grey, np.uint8)
    return PhotoLabels(image_rgb, np.zeros((height, width), np.uint8) if outline else None, tuple(clicks))


def clicked(*clicks, grey=120, size=128):
    return plain(grey, size, size, clicks, outline=False)


def positive(x, y, weight=1.0):
    return Click("p", x, y, "crack", weight=weight)


def negative(x, y, patch_px=32, weight=1.0):
    return Click("p", x, y, "none", "crack", weight=weight, patch_px=patch_px)


def test_crops_and_their_outlines_move_together():
    crops = CropDataset([outlined((60, 48, 22))], 48, seed=0, scales=(0.7, 1.4))
    shares = []
    for draw in range(30):
        image, coverage, known, clicked_on, holds, weight = crops[draw]
        assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
        assert coverage.shape == known.shape == clicked_on.shape == (48, 48)
        assert known.all() and not clicked_on.any() and (holds, weight) == (-1, 1)
        if 0.1 < float(coverage.mean()) < 0.9:  # the spot is dark whatever turn, flip, scale and light
            assert image.float().mean(0)[coverage > 0.9].mean() < image.float().mean(0)[coverage < 0.1].mean() - 20
        shares.append(float(coverage.mean()))
    assert min(shares) < 0.05 and max(shares) > 0.3


def test_a_draw_is_always_the_same_and_another_seed_gives_another():
    photos = [outlined((60, 48, 22)), clicked(positive(40, 40), negative(100, 100)), plain(200)]
    first, again, other = (CropDataset(photos, 32, seed, (0.5, 2.0)) for seed in (0, 0, 1))
    for draw in range(12):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first[draw], again[draw]))
    assert any(not torch.equal(first[draw][0], other[draw][0]) for draw in range(12))


def test_crops_are_of_every_scale_asked_for():
    photo = outlined((200, 200, 3), height=400, width=400)
    crops = CropDataset([photo], 128, seed=0, scales=(0.5, 4.0))
    covered = np.stack([crops[draw][1].numpy() for draw in range(300)])
    rim = covered.copy()
    rim[:, 1:-1, 1:-1] = 0
    whole = covered[(rim.max(axis=(1, 2)) == 0) & (covered.max(axis=(1, 2)) > 0)]  # the spot lies in the crop
    scales = np.sqrt(whole.sum(axis=(1, 2)) / (photo.outline > 0).sum())
    assert scales.min() == pytest.approx(0.5, rel=0.1) and scales.max() == pytest.approx(4, rel=0.1)
    assert np.histogram(np.log2(scales), [-1.2, 0, 1, 2.2])[0].min() > 0.15 * len(scales)
    half = ((whole > 0.2) & (whole < 0.8)).any(axis=(1, 2))
    assert half.mean() > 0.8  # a pixel that is half defect says so, but where the scale is a whole number


def test_crops_stay_inside_a_photo_that_is_larger():
    """One that would leave it is moved inside."""
    image_rgb = np.repeat(np.repeat(np.arange(60, dtype=np.uint8)[None, :, None] * 4, 40, 0), 3, 2)  # grows to the right
    outline = np.zeros((40, 60), np.uint8)
    outline[20, 59] = 255  # every second crop is around it, at the photo's edge
    crops = CropDataset([PhotoLabels(image_rgb, outline)], 30, seed=0, augment=False)
    shown = []
    for draw in range(30):
        image, _, known, *_ = crops[draw]
        assert (known == 1).all() and image.shape == (3, 30, 30)
        assert int(image.max()) // 4 - int(image.min()) // 4 == 29, "as many columns of the photo"
        shown.append(int(image.min()) // 4)
    assert min(shown) == 0 and max(shown) == 30, "its edges are seen too"


def test_crops_larger_than_the_photo_show_all_of_it_and_repeat_its_edge():
    image_rgb = np.full((30, 60, 3), 100, np.uint8)
    image_rgb[:, 0], image_rgb[10, 30] = 0, 250
    outline = np.zeros((30, 60), np.uint8)
    outline[:, 0] = 255
    crops, tops = CropDataset([PhotoLabels(image_rgb, outline)], 90, seed=0, scales=(1.0, 1.0), augment=False), set()
    for draw in range(30):
        image, coverage, known, *_ = crops[draw]
        ((top, left),) = np.argwhere(image[0].numpy() == 250)
        assert top >= 10 and left >= 30 and (image[0, :, : left - 29] == 0).all() and (image[0, :, left - 29 :] >= 100).all()
        assert torch.equal(coverage, (image[0] == 0).float()) and known.all(), "labels are repeated, too"
        tops.add(int(top))
    assert len(tops) > 10, "the photo lies anywhere in the crop"
    small = CropDataset([PhotoLabels(image_rgb, outline)], 300, seed=0, scales=(1.0, 1.0), augment=False)[0][0]
    assert (small[0] > 150).sum() >= 4, "a crop is twice the photo's longer side at most, here 2.5 times enlarged"


def test_every_photo_without_the_defect_has_the_same_chance():
    """Whatever its size."""
    small, large = plain(250, 32, 32), plain(5, 320, 320)
    crops = CropDataset([outlined((30, 30, 8)), small, large], 16, 0, negative_share=0.3)
    bright = [float(crops[draw][0].float().mean()) > 128 for draw in range(2000) if not crops.shows(draw)]
    assert 0.45 < np.mean(bright) < 0.55


@pytest.mark.parametrize("share", [0.3, 0.5, 0.25])
def test_crops_without_the_defect_come_at_even_distances(share):
    crops = CropDataset([outlined((60, 48, 22)), plain(255)], 32, seed=0, negative_share=share, augment=False)
    shown = [bool((crops[draw][0] == 255).all()) for draw in range(40)]
    assert [not shows for shows in shown] == [crops.shows(draw) for draw in range(40)]
    assert sum(shown) == 40 * share
    for start in range(30):
        assert abs(sum(shown[start : start + 10]) - 10 * share) < 1
    assert all(CropDataset([outlined((60, 48, 22))], 32, 0, negative_share=share).shows(draw) for draw in range(20))


def test_half_of_the_crops_without_the_defect_are_around_negative_clicks():
    photo = plain(200, 100, 400, [Click("p", 380, 50, "none", "crack", patch_px=24)])
    photo.image_rgb[:, 360:] = 90
    crops = CropDataset([outlined((60, 48, 22)), photo], 16, 0, negative_share=0.5, augment=False)
    dark = [int(crops[draw][0].max()) == 90 for draw in range(600) if not crops.shows(draw)]
    assert 0.5 < np.mean(dark) < 0.65  # half, and of the others one in ten
    for draw in range(60):
        image, coverage, known, _, holds, _ = crops[draw]
        if not crops.shows(draw):  # an outline knows every pixel, so the pooled logit need not be taught
            assert not coverage.any() and known.all() and holds == -1


def test_positive_clicks_take_turns_and_lie_in_their_crops():
    clicks = [positive(20 + 30 * index, 30) for index in range(3)]
    crops = CropDataset([clicked(*clicks, negative(60, 100))], 32, seed=0, negative_share=0.5)
    found = [crops[draw] for draw in range(60)]
    assert [crop[4] for crop in found] == [1.0, 0.0] * 30
    assert all(crop[3].sum() == 1 and not crop[2][crop[3] > 0].any() for crop in found[::2]), "one pixel was clicked on"
    assert not any(crop[3].any() for crop in found[1::2])
    seen = [crops.positives[order][1] for order in np.random.default_rng((0, 0)).permutation(3)]
    assert sorted(click.x for click in seen) == [20, 50, 80]


def test_a_negative_click_says_something_of_its_patch_alone():
    photo = clicked(positive(20, 20), negative(90, 90, patch_px=24))
    photo.image_rgb[78:102, 78:102] = 30
    crops = CropDataset([photo], 48, seed=0, scales=(0.5, 2.0), negative_share=0.5, augment=True)
    for draw in range(1, 41, 2):
        image, coverage, known, _, holds, _ = crops[draw]
        assert holds == 0 and known.all() and not coverage.any()
    still = CropDataset([photo], 48, seed=0, negative_share=0.5, augment=False)
    assert all(int(still[draw][0].max()) == 30 for draw in range(1, 21, 2)), "no pixel beyond the patch"
    near = clicked(positive(60, 60), negative(80, 60, patch_px=20))
    image, coverage, known, clicked_on, holds, _ = CropDataset([near], 64, 0, negative_share=0.5, augment=False)[0]
    assert known.sum() == 20 * 20 and holds == 1 and not coverage.any(), "beside a positive click the patch is known"


def test_of_a_partial_outline_the_rest_is_unknown():
    photo = outlined((60, 48, 22))
    photo.outline[:, 80:] = UNKNOWN
    crops = CropDataset([photo], 96, seed=0, augment=False)
    for draw in range(10):
        _, coverage, known, *_ = crops[draw]
        assert not coverage[known == 0].any() and known.any() and not known.all()


def test_crops_weigh_what_their_clicks_weigh_against_the_mean_of_their_kind():
    clicks = [positive(20, 20, 1.0), positive(60, 20, 2.0), negative(30, 100, weight=3.0), negative(90, 100, weight=1.0)]
    crops = CropDataset([clicked(*clicks)], 32, 0, negative_share=0.5)
    weights = [crops[draw][5] for draw in range(400)]
    assert sorted(set(weights[::2])) == pytest.approx([1 / 1.5, 2 / 1.5]) and np.mean(weights[::2]) == pytest.approx(1)
    assert sorted(set(weights[1::2])) == pytest.approx([0.5, 1.5])
    silent = [dataclasses.replace(click, weight=0.0) if click.defect == "none" else click for click in clicks]
    with pytest.raises(ValueError, match="all negative clicks have the weight 0"):
        CropDataset([clicked(*silent)], 32, 0)


def test_labels_without_the_defect_alone_are_refused():
    with pytest.raises(ValueError, match="photos with the defect, or clicks on it; got none"):
        CropDataset([plain(200), clicked(negative(30, 30))], 32, 0)


def test_photos_on_disk_are_the_photos():
    photos = [outlined((60, 48, 22)), clicked(positive(4, 5)), PhotoLabels(outlined().image_rgb[:, ::-1], None)]
    kept = on_disk(photos)
    for one, other in zip(photos, kept, strict=True):
        assert np.array_equal(one.image_rgb, other.image_rgb) and one.clicks == other.clicks
        assert (one.outline is None) == (other.outline is None)
        assert one.outline is None or np.array_equal(one.outline, other.outline)
    assert on_disk([]) == []


def test_a_thousand_photos_need_no_more_files_than_one():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))  # by other tests of this process, too
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 50, hard))
    try:
        photos = on_disk(plain(index % 256, 8, 8) for index in range(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(photo.image_rgb[7, 7, 0]) for photo in photos] == [index % 256 for index in range(1000)]
