"""Hard negatives: where a network errs is found, and that is what a further training is shown."""

import json

import cv2
import numpy as np
import pytest
import torch

from defectcam.encoders import normalised
from defectcam.pyramid import halved
from defectcam.tiling import EDGE_PX, cut
from defectcam.training import hard_negatives, train
from defectcam.training.clicks import read_clicks
from defectcam.training.hard_negatives import merged_map
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
    """A network whose score map has both signs on the image, and its merged map, (H, W) float32."""
    network = random_network(dtype=torch.float32)
    with torch.no_grad():
        network.head.bias -= float(np.median(score_map(network, textured_image)))
    return network, merged_map(network, textured_image, hard_negatives.ALL_LEVELS)


def test_all_levels_together_decide(erring, textured_image):
    """Of a photo of 203 px there are two."""
    network, merged = erring
    logits, half = score_map(network, textured_image), score_map(network, halved(textured_image))
    height, width = logits.shape
    coarse = cv2.resize(half, (2 * half.shape[1], 2 * half.shape[0]), interpolation=cv2.INTER_LINEAR)[:height, :width]
    assert np.abs(merged - np.log((np.exp(logits) + np.exp(coarse)) / 2)).max() < 1e-3


def test_the_surest_places_come_first_and_keep_their_distance(erring, textured_image):
    network, merged = erring
    known = np.zeros(merged.shape, bool)
    found = hard_negatives.hard_negatives(network, textured_image, known)
    scores = [merged[y, x] for x, y in found]
    assert 1 < len(found) <= hard_negatives.PER_PHOTO and scores[0] == merged.max()
    assert min(scores) > 0 and scores == sorted(scores, reverse=True)
    for index, (x, y) in enumerate(found):
        assert all(max(abs(x - left), abs(y - top)) >= hard_negatives.SPACING_PX for left, top in found[:index])
    unknown = np.zeros(merged.shape, bool)
    unknown[:, : merged.shape[1] // 2] = True
    half = hard_negatives.hard_negatives(network, textured_image, unknown)
    assert half and all(x >= merged.shape[1] // 2 for x, _ in half), "nothing is said of what is not known"
    with torch.no_grad():
        network.head.bias.fill_(-1e6)
    assert hard_negatives.hard_negatives(network, textured_image, known) == []


def test_looking_for_them_leaves_the_network_free_to_learn(textured_image):
    network = random_network(**LITE).requires_grad_(True).train()
    before, text = {name: value.clone() for name, value in network.state_dict().items()}, str(network)
    hard_negatives.hard_negatives(network, textured_image, np.zeros(textured_image.shape[:2], bool))
    assert network.training and str(network) == text and all(one.requires_grad for one in network.parameters())
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture
def data_dir(tmp_path):
    """walls show the defect; of the photos of beams the first does, too."""
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
    return tmp_path


@pytest.mark.parametrize("labels", ["outlines", "clicks"])
def test_a_further_training_learns_from_them(data_dir, tmp_path, monkeypatch, labels):
    """Only photos that show nothing of the defect are looked at: elsewhere the network may be right."""
    monkeypatch.setattr(train, "VAL_CROPS", 4)
    words = [f"--data={data_dir}", "--defect=crack", "--sets=walls", "--none-sets=beams", "--crop-px=32", "--batch=4",
             f"--labels={labels}", "--decoder=8,8,8,8", "--steps=1", "--encoder-weights=none"]  # fmt: skip
    train.main([*words, f"--out={tmp_path / 'first'}"])
    monkeypatch.setattr(hard_negatives, "merged_map", lambda *_: np.arange(6400, dtype=np.float32).reshape(80, 80) - 3000)
    hard_negatives.main([f"--data={data_dir}", "--defect=crack", f"--network={tmp_path / 'first'}", "--none-sets=beams",
                         f"--out={tmp_path / 'hard.csv'}"])  # fmt: skip
    clicks = read_clicks(tmp_path / "hard.csv", with_photos=True)
    assert clicks and {(click.photo_group, click.defect, click.negative_for) for click in clicks} == {("beams/1", "none", "crack")}
    assert {click.patch_px for click in clicks} == {hard_negatives.PATCH_PX}
    train.main([*words, f"--clicks={tmp_path / 'hard.csv'}", f"--init={tmp_path / 'first' / 'best.safetensors'}",
                f"--out={tmp_path / 'second'}"])  # fmt: skip
    first, second = (json.loads((tmp_path / run / "record.json").read_text()) for run in ("first", "second"))
    assert second["negative_clicks"] == first["negative_clicks"] + len(clicks)
    assert second["photos"] == first["photos"], "they are on photos of the set"


def test_a_folder_that_holds_no_training_is_named(data_dir, tmp_path):
    with pytest.raises(SystemExit, match="has not both of best.safetensors, record.json"):
        hard_negatives.main([f"--data={data_dir}", "--defect=crack", f"--network={tmp_path}", "--none-sets=beams", "--out=x.csv"])
