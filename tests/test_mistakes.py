"""Hard negatives: where a network errs is found, and that is what the trainings are shown."""

import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defectcam.encoders import normalised
from defectcam.pyramid import halved
from defectcam.tiling import EDGE_PX, cut
from defectcam.training import mistakes, outline, train
from defectcam.training.clicks import Click
from defectcam.training.crops import CropDataset
from defectcam.training.mistakes import ALL_LEVELS, ONE_LEVEL, mistaken_clicks, mistaken_pixels, plain_map
from defectcam.training.outline import OutlineDataset, OutlineLoss, OutlinePhoto
from defectcam.training.train import save_weights
from tests.conftest import random_network

LITE = {"downsamplings": 4, "encoder": "efficientnet-lite0", "pooling": "log-mean-exp", "dtype": torch.float32}


def score_map(network, image_rgb):
    """The scores (H, W) of a whole photo at its own scale, its edge repeated around it."""
    height, width = image_rgb.shape[:2]
    edge = min(network.halo_px, EDGE_PX)
    size = [length + 2 * edge + -length % network.stride_px for length in (height, width)]
    around = cut(image_rgb, (-edge, size[0] - edge, -edge, size[1] - edge))
    with torch.no_grad():
        score = network.score_map(normalised(torch.from_numpy(around)).permute(2, 0, 1)[None])[0].numpy()
    return score[edge : edge + height, edge : edge + width]


@pytest.fixture
def erring(textured_image):
    """A network whose score map has both signs on the image, and that map, (H, W) float32."""
    network = random_network(dtype=torch.float32)
    with torch.no_grad():
        network.head.bias -= float(np.median(score_map(network, textured_image)))
    return network, score_map(network, textured_image)


def test_the_pixels_taken_for_the_defect_are_found(erring, textured_image):
    """All levels together decide: of a photo of 203 px there are two."""
    network, logits = erring
    (found,) = mistaken_pixels(network, [textured_image], seed=0)
    half = score_map(network, halved(textured_image))
    height, width = logits.shape
    coarse = cv2.resize(half, (2 * half.shape[1], 2 * half.shape[0]), interpolation=cv2.INTER_LINEAR)[:height, :width]
    wanted = np.flatnonzero(np.log((np.exp(logits) + np.exp(coarse)) / 2) > 0)
    assert 1000 < len(wanted) < logits.size - 1000
    assert len(np.setxor1d(found, wanted)) < 1e-3 * logits.size  # folded networks round otherwise
    assert len(np.setxor1d(np.flatnonzero(logits > 0), wanted)) > 1000  # the finest level alone says something else


def test_looking_for_mistakes_leaves_the_network_free_to_learn(textured_image):
    network = random_network(**LITE).requires_grad_(True).train()
    before, text = {name: value.clone() for name, value in network.state_dict().items()}, str(network)
    mistaken_pixels(network, [textured_image], 0)
    mistaken_clicks(network, [Click("p", 0, 0, "none")], [textured_image], 16, 0)
    for reading in (ALL_LEVELS, ONE_LEVEL):
        plain_map(network, textured_image, reading)
    assert network.training and str(network) == text and all(one.requires_grad for one in network.parameters())
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    images = torch.from_numpy(np.ascontiguousarray(textured_image[None, :64, :64].transpose(0, 3, 1, 2)))
    OutlineLoss(network)(images, torch.zeros(1, 64, 64), torch.ones(1, 64, 64)).backward()
    assert all(one.grad is not None for one in network.parameters())


def test_more_photos_than_can_be_looked_at_are_left_out(erring, textured_image, monkeypatch):
    monkeypatch.setattr(mistakes, "LOOKED_AT_PX", 2.5 * textured_image.shape[0] * textured_image.shape[1])
    found = mistaken_pixels(erring[0], [textured_image] * 5, seed=0)
    assert sum(bool(len(pixels)) for pixels in found) == 2


def test_none_clicks_lie_where_the_window_says_defect_the_surest_first(erring, textured_image):
    network, logits = erring
    known = Click("photo.png", 3, 3, "none", "crack", "wall/photo")
    found = mistaken_clicks(network, [known], [textured_image], 16, seed=0)
    assert 1 < len(found) <= mistakes.PER_PHOTO
    told = {(click.image, click.defect, click.absent, click.photo_group) for click in found}
    assert told == {("photo.png", "none", "crack", "wall/photo")}
    around = np.pad(logits, 8, mode="edge")
    means = [around[click.y : click.y + 16, click.x : click.x + 16].mean() for click in found]
    assert min(means) > 0 and all(one >= next_one - 1e-4 for one, next_one in zip(means, means[1:]))
    for i, one in enumerate(found):
        assert all(max(abs(one.x - other.x), abs(one.y - other.y)) >= 8 for other in found[:i])


def test_a_network_that_errs_nowhere_gives_none(erring, textured_image):
    network, _ = erring
    with torch.no_grad():
        network.head.bias.fill_(-1e6)
    assert not len(mistaken_pixels(network, [textured_image], 0)[0])
    assert mistaken_clicks(network, [Click("p", 0, 0, "none")], [textured_image], 16, 0) == []


def test_four_outline_crops_in_ten_are_of_photos_without_and_half_of_them_at_mistakes():
    def photo(grey, covered):
        image = np.full((100, 400, 3), grey, np.uint8)
        return OutlinePhoto(image, np.full((100, 400), 255 * covered, np.uint8), np.ones((100, 400), bool))

    plain = photo(200, False)
    plain.image_rgb[:, 360:] = (250, 60, 60)  # where the network errs
    pixels = np.flatnonzero((plain.image_rgb[..., 1] == 60)).astype(np.int32)
    crops = OutlineDataset([photo(20, True)], [plain], 16, 0, [pixels])
    images = [crops[draw][0].float() for draw in range(400)]
    of_plain = [bool(image.amax() > 100) for image in images]
    assert [draw for draw in range(10) if of_plain[draw]] == [6, 7, 8, 9]
    red = [bool((image[0] - image[1]).amax() > 60) for image in images]
    assert 0.4 < np.mean(np.array(red)[of_plain]) < 0.7  # of evenly drawn crops one in ten shows that tenth of the photo
    without = OutlineDataset([photo(20, True)], [plain], 16, 0, [np.empty(0, np.int32)])
    assert [draw for draw in range(10) if without[draw][0].float().amax() > 100] == [7, 8, 9]


def test_every_second_negative_crop_is_of_a_mistake(tmp_path):
    paths = {}
    for name, grey in (("defect", 20), ("easy", 200), ("mistake", 120)):
        paths[name] = str(tmp_path / f"{name}.png")
        cv2.imwrite(paths[name], np.full((40, 40, 3), grey, np.uint8))
    clicks = [Click(paths["defect"], 20, 20, "crack"), Click(paths["easy"], 20, 20, "none", "crack")]
    crops = CropDataset(clicks, 16, 0, False)
    crops.mistakes = [Click(paths["mistake"], 20, 20, "none", "crack")]
    assert [int(crops[draw][0][0, 0, 0]) for draw in range(8)] == [20, 120, 20, 200] * 2


def test_only_photos_that_show_nothing_of_the_defect_are_looked_at(tmp_path, monkeypatch):
    """A set made for another defect has photos that show this one too: what the network sees there may be right."""
    rng = np.random.default_rng(0)
    for set_name, shown in (("walls", (True, True)), ("beams", (True, False))):
        (tmp_path / set_name / "images").mkdir(parents=True)
        (tmp_path / set_name / "masks" / "crack").mkdir(parents=True)
        for number, cracked in enumerate(shown * 2):
            photo = rng.integers(90, 160, (80, 80, 3), np.uint8)
            cv2.imwrite(str(tmp_path / set_name / "images" / f"{number}.png"), photo)
            mask = np.zeros((80, 80), np.uint8)
            mask[30:40, 10 : 10 + 60 * cracked] = 255
            cv2.imwrite(str(tmp_path / set_name / "masks" / "crack" / f"{number}.png"), mask)
    splits = {name: {"train": ["0", "1"], "val": ["2", "3"]} for name in ("walls", "beams")}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    init = tmp_path / "init.safetensors"
    save_weights(random_network(**LITE), init)
    common = [f"--data={tmp_path}", "--defect=crack", "--sets=walls", "--none-sets=beams", "--crop-px=32", "--batch=4",
              "--encoder=efficientnet-lite0", "--decoder=16,16,8,8", "--steps=2", "--val-every=2", f"--init={init}",
              "--mistakes"]  # fmt: skip
    args = train.parse_args([*common, f"--out={tmp_path / 'run'}"])
    clicks, healthy = train.gather_clicks(args, "train")
    assert {click.photo_group for click in healthy} == {"beams/1"}
    none_clicks = {click.photo_group for click in clicks if click.defect == "none"}
    assert none_clicks == {"walls/0", "walls/1", "beams/0", "beams/1"}
    monkeypatch.setattr(train, "VAL_CROPS", 4)
    assert train.train(args)["mistakes"] is True
    outlines = outline.parse_args([*common, "--arm=outlines", f"--out={tmp_path / 'outlines'}"])
    record = outline.train_outline(outlines, outline.train_photos(outlines))
    assert record["photos"] == 2 and record["photos_without"] == 1 and record["mistakes"] is True
    started = load_file(init)
    names = [name for name, _ in random_network(**LITE).named_parameters()]
    for run in ("run", "outlines"):
        trained = load_file(tmp_path / run / "last.safetensors")
        assert all(not trained[f"model.{name}"].equal(started[name]) for name in names), "all of it has learnt"


def test_mistakes_without_a_network_or_photos_are_refused(capsys):
    for missing in (["--none-sets=b"], ["--init=x"]):
        with pytest.raises(SystemExit):
            train.parse_args(["--defect=crack", "--data=d", "--sets=a", "--out=o", "--mistakes", *missing])
        assert "--mistakes needs --init" in capsys.readouterr().err
