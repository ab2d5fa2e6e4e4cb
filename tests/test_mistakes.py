"""Hard negatives: where a network errs is found, and that is what the trainings are shown."""

import argparse
import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from defectcam.training import mistakes, outline, train
from defectcam.training.clicks import Click
from defectcam.training.crops import CropDataset
from defectcam.training.mistakes import mistaken_clicks, mistaken_pixels
from defectcam.training.outline import OutlineDataset, OutlinePhoto
from defectcam.training.train import network_from, save_weights
from defectcam.weights import OUTLINE_PREFIX
from tests.conftest import random_network


@pytest.fixture
def erring(textured_image):
    """A network whose score map has both signs on the image, and that map, (H, W) float32, bias included."""
    network = random_network(dtype=torch.float32)
    image = torch.from_numpy(textured_image).permute(2, 0, 1)[None]
    with torch.no_grad():
        network.head.bias.fill_(float(-network.score_map(network.normalise(image)).median()))
        logits = network.score_map(network.normalise(image))[0] + network.head.bias
    return network, logits.numpy()


def test_the_pixels_taken_for_the_defect_are_found(erring, textured_image):
    network, logits = erring
    (found,) = mistaken_pixels(network, [textured_image], seed=0)
    wanted = np.flatnonzero(logits > 0)
    assert 0 < len(wanted) < logits.size
    assert len(np.setxor1d(found, wanted)) < 1e-3 * logits.size  # tiles round otherwise than the whole


def test_more_photos_than_can_be_looked_at_are_left_out(erring, textured_image, monkeypatch):
    monkeypatch.setattr(mistakes, "LOOKED_AT_PX", 2.5 * textured_image.shape[0] * textured_image.shape[1])
    found = mistaken_pixels(erring[0], [textured_image] * 5, seed=0)
    assert sum(bool(len(pixels)) for pixels in found) == 2


def test_none_clicks_lie_where_the_window_says_defect_the_surest_first(erring, textured_image):
    network, logits = erring
    known = Click("photo.png", 3, 3, "none", "crack", "wall/photo")
    found = mistaken_clicks(network, [known], [textured_image], 16, 0.5, seed=0)
    assert 1 < len(found) <= mistakes.PER_PHOTO
    assert {(c.image, c.defect, c.absent, c.photo_group) for c in found} == {("photo.png", "none", "crack", "wall/photo")}
    at_scale = [(click.x // 2, click.y // 2) for click in found]
    height, width = logits.shape
    means = []
    for x, y in at_scale:
        x0, y0 = min(max(x - 8, 0), width - 16), min(max(y - 8, 0), height - 16)
        means.append(logits[y0 : y0 + 16, x0 : x0 + 16].mean())
    assert min(means) > 0 and all(one >= next_one - 1e-4 for one, next_one in zip(means, means[1:]))
    for i, (x, y) in enumerate(at_scale):
        assert all(max(abs(x - u), abs(y - v)) >= 8 for u, v in at_scale[:i])


def test_a_network_that_errs_nowhere_gives_none(erring, textured_image):
    network, _ = erring
    with torch.no_grad():
        network.head.bias.fill_(-1e6)
    assert not len(mistaken_pixels(network, [textured_image], 0)[0])
    assert mistaken_clicks(network, [Click("p", 0, 0, "none")], [textured_image], 16, 1.0, 0) == []


def test_two_outline_crops_in_five_are_of_photos_without_and_half_of_them_at_mistakes():
    def photo(grey, covered):
        image = np.full((100, 400, 3), grey, np.uint8)
        return OutlinePhoto(image, np.full((100, 400), 255 * covered, np.uint8), np.ones((100, 400), bool))

    plain = photo(200, False)
    plain.image_rgb[:, 360:] = (250, 60, 60)  # where the network errs
    pixels = np.flatnonzero((plain.image_rgb[..., 1] == 60)).astype(np.int32)
    crops = OutlineDataset([photo(20, True)], [plain], 16, 0, [pixels])
    images = [crops[draw][0].float() for draw in range(400)]
    of_plain = [bool(image.amax() > 100) for image in images]
    assert [draw for draw in range(10) if of_plain[draw]] == [1, 4, 6, 9]
    red = [bool((image[0] - image[1]).amax() > 60) for image in images]
    assert 0.4 < np.mean(np.array(red)[of_plain]) < 0.7  # evenly drawn crops show that tenth of the photo in one case of ten
    without = OutlineDataset([photo(20, True)], [plain], 16, 0, [np.empty(0, np.int32)])
    assert [draw for draw in range(10) if without[draw][0].float().amax() > 100] == [4, 9]


def test_every_second_negative_crop_is_of_a_mistake(tmp_path):
    paths = {}
    for name, grey in (("defect", 20), ("easy", 200), ("mistake", 120)):
        paths[name] = str(tmp_path / f"{name}.png")
        cv2.imwrite(paths[name], np.full((40, 40, 3), grey, np.uint8))
    clicks = [Click(paths["defect"], 20, 20, "crack"), Click(paths["easy"], 20, 20, "none", "crack")]
    crops = CropDataset(clicks, 16, 0, False)
    crops.mistakes = [Click(paths["mistake"], 20, 20, "none", "crack")]
    assert [int(crops[draw][0][0, 0, 0]) for draw in range(8)] == [20, 120, 20, 200] * 2


def test_training_starts_from_the_right_one_of_two_networks_in_a_weights_file(tmp_path):
    classifier, other = random_network(0, dtype=torch.float32), random_network(1, dtype=torch.float32)
    both = dict(classifier.state_dict()) | {OUTLINE_PREFIX + k: v for k, v in other.state_dict().items()}
    save_file({name: value.contiguous() for name, value in both.items()}, tmp_path / "both.safetensors")
    save_weights(classifier, tmp_path / "one.safetensors")
    for file, wants_outline, wanted in (("both", False, classifier), ("both", True, other), ("one", True, classifier)):
        args = argparse.Namespace(
            seed=0, decoder=(16, 16, 8), downsamplings=2, encoder_weights=None, init=tmp_path / f"{file}.safetensors"
        )
        network = network_from(args, wants_outline)
        assert torch.equal(network.head.weight, wanted.head.weight)


def test_only_photos_that_show_nothing_of_the_defect_are_looked_at(tmp_path):
    """A set made for another defect has photos that show this one too: what the network sees there may be right."""
    rng = np.random.default_rng(0)
    for set_name, shown in (("walls", (True, True)), ("beams", (True, False))):
        (tmp_path / set_name / "images").mkdir(parents=True)
        (tmp_path / set_name / "masks" / "crack").mkdir(parents=True)
        for number, cracked in enumerate(shown * 2):
            cv2.imwrite(str(tmp_path / set_name / "images" / f"{number}.png"), rng.integers(90, 160, (80, 80, 3), np.uint8))
            mask = np.zeros((80, 80), np.uint8)
            mask[30:40, 10 : 10 + 60 * cracked] = 255
            cv2.imwrite(str(tmp_path / set_name / "masks" / "crack" / f"{number}.png"), mask)
    splits = {name: {"train": ["0", "1"], "val": ["2", "3"]} for name in ("walls", "beams")}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    init = tmp_path / "init.safetensors"
    save_weights(random_network(dtype=torch.float32), init)
    common = [f"--data={tmp_path}", "--defect=crack", "--sets=walls", "--none-sets=beams", "--crop-px=16", "--batch=4",
              "--decoder=16,16,8", "--steps=2", "--val-every=2", f"--init={init}", "--mistakes"]  # fmt: skip
    args = train.parse_args([*common, f"--out={tmp_path / 'run'}"])
    clicks, healthy = train.gather_clicks(args, "train")
    assert {click.photo_group for click in healthy} == {"beams/1"}
    assert {click.photo_group for click in clicks if click.defect == "none"} == {"walls/0", "walls/1", "beams/0", "beams/1"}
    train.VAL_CROPS, val_crops = 4, train.VAL_CROPS
    try:
        assert train.train(args)["mistakes"] is True
    finally:
        train.VAL_CROPS = val_crops
    outlines = outline.parse_args([*common, "--arm=outlines", f"--out={tmp_path / 'outlines'}"])
    record = outline.train_outline(outlines, outline.train_photos(outlines))
    assert record["photos"] == 2 and record["photos_without"] == 1 and record["mistakes"] is True


def test_mistakes_of_nobody_or_nowhere_are_refused(capsys):
    for missing in (["--none-sets=b"], ["--init=x"]):
        with pytest.raises(SystemExit):
            train.parse_args(["--defect=crack", "--data=d", "--sets=a", "--out=o", "--mistakes", *missing])
        assert "--mistakes needs --init" in capsys.readouterr().err
