"""Clicks, crops and a training run on a small set made here; a killed run goes on as if nothing had happened."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import cv2
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from defectcam.encoders import normalised
from defectcam.training import train
from defectcam.training.clicks import Click, patch_bounds, read_clicks, simulate_clicks, write_clicks
from defectcam.training.crops import CROPS_PER_CLICK, CropDataset, on_disk
from tests.conftest import ROOT, random_network


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Eight photos, 96 x 128, of noise; the six called crack* have a dark line and its mask."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "walls" / "images").mkdir(parents=True)
    (folder / "walls" / "masks" / "crack").mkdir(parents=True)
    rng = np.random.default_rng(0)
    stems = [f"crack{i}" for i in range(6)] + ["plain0", "plain1"]
    for i, stem in enumerate(stems):
        photo = rng.integers(120, 180, (96, 128, 3), np.uint8)
        mask = np.zeros((96, 128), np.uint8)
        if stem.startswith("crack"):
            cv2.line(mask, (20 + 5 * i, 0), (40, 95), 255, 3)
            photo[mask > 0] = 20
        cv2.imwrite(str(folder / "walls" / "images" / f"{stem}.png"), photo)
        cv2.imwrite(str(folder / "walls" / "masks" / "crack" / f"{stem}.png"), mask)
    splits = {"walls": {"train": stems[:4] + stems[6:7], "val": stems[4:6] + stems[7:]}}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def clicks_of(data_dir, split="train", seed=0):
    return simulate_clicks(data_dir, "walls", split, "crack", patch_px=32, none_per_photo=5, seed=seed)


def mask_of(data_dir, click):
    stem = click.photo_group.split("/")[1]
    return cv2.imread(str(data_dir / "walls" / "masks" / "crack" / f"{stem}.png"), 0) > 0


def test_simulated_clicks_say_what_a_person_would(data_dir):
    clicks = clicks_of(data_dir)
    positives = [click for click in clicks if click.defect == "crack"]
    assert [click.photo_group for click in positives] == [f"walls/crack{i}" for i in range(4)]  # one per component
    assert all(mask_of(data_dir, click)[click.y, click.x] for click in positives)
    nones = [click for click in clicks if click.defect == "none"]
    assert len(nones) > 10 and {click.absent for click in nones} == {"crack"}
    for click in nones:
        x0, x1 = patch_bounds(click.x, 32, 128)
        y0, y1 = patch_bounds(click.y, 32, 96)
        assert (x1 - x0, y1 - y0) == (32, 32)
        assert not mask_of(data_dir, click)[y0:y1, x0:x1].any()
    assert clicks == clicks_of(data_dir) and clicks != clicks_of(data_dir, seed=1)


def test_clicks_survive_writing_and_reading(data_dir, tmp_path):
    write_clicks(tmp_path / "clicks.csv", clicks_of(data_dir))
    assert read_clicks(tmp_path / "clicks.csv") == clicks_of(data_dir)
    (tmp_path / "own.csv").write_text("image,x,y,defect\na.jpg,3,4,crack\nb.jpg,many,4,none\n")
    with pytest.raises(ValueError, match="own.csv line 3.*many"):
        read_clicks(tmp_path / "own.csv")
    (tmp_path / "own.csv").write_text("image,x,y,defect\na.jpg,3,4,crack\n")
    assert read_clicks(tmp_path / "own.csv") == [Click("a.jpg", 3, 4, "crack")]


def test_crops_hold_their_click_and_negatives_hold_no_defect(data_dir):
    crops = CropDataset(clicks_of(data_dir), 32, seed=0, augment=False)
    labels = [crops[draw][1] for draw in range(40)]
    assert labels == [1.0, 0.0] * 20
    for draw in range(40):
        image, label, _ = crops[draw]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert (image.min() < 60) == bool(label)  # the line is dark, nothing else is


def test_every_positive_click_gives_five_crops_an_epoch(data_dir):
    crops = CropDataset(clicks_of(data_dir), 32, seed=0, augment=False)
    assert crops.draws_per_epoch == 2 * CROPS_PER_CLICK * 4
    assert not torch.equal(crops[0][0], crops[crops.draws_per_epoch][0])  # the next epoch has other positions


def test_augmented_crops_differ_but_are_the_same_for_the_same_seed(data_dir):
    first, again, other = (CropDataset(clicks_of(data_dir), 32, seed, True) for seed in (0, 0, 1))
    for draw in range(10):
        assert torch.equal(first[draw][0], again[draw][0])
    assert any(not torch.equal(first[draw][0], other[draw][0]) for draw in range(10))


def test_a_photo_smaller_than_the_crop_is_scaled_up_to_it(data_dir):
    crops = CropDataset(clicks_of(data_dir), 160, seed=0, augment=False)
    assert crops[0][0].shape == (3, 160, 160)


def test_clicks_of_one_kind_alone_are_refused(data_dir):
    with pytest.raises(ValueError, match="none-clicks; got 4 and 0"):
        CropDataset([click for click in clicks_of(data_dir) if click.defect == "crack"], 32, 0, False)


def test_crops_weigh_what_their_clicks_weigh_against_the_mean_of_their_kind(data_dir):
    clicks = clicks_of(data_dir)
    positives = [click for click in clicks if click.defect == "crack"]
    weights = {click: 1 + 0.5 * i for i, click in enumerate(positives)} | {c: 2.0 for c in clicks if c.defect == "none"}
    weighted = CropDataset([dataclasses.replace(c, weight=weights[c]) for c in clicks], 32, 0, True)
    plain = CropDataset(clicks, 32, 0, True)
    seen = []
    for draw in range(plain.draws_per_epoch):
        (image, label, weight), (same, _, one) = weighted[draw], plain[draw]
        assert torch.equal(image, same) and one == 1 and (label or weight == 1)
        seen.append(weight)
    mean = np.mean([weights[click] for click in positives])
    assert sorted(set(seen[::2])) == pytest.approx([weights[click] / mean for click in positives])
    assert np.mean(seen[::2]) == pytest.approx(1)  # so the two kinds stay balanced
    with pytest.raises(ValueError, match="all clicks of a kind weigh 0.*'none': 0"):
        CropDataset([dataclasses.replace(c, weight=float(c.defect == "crack")) for c in clicks], 32, 0, True)


def test_equal_weights_give_the_plain_loss_and_no_weight_no_gradient():
    network = random_network(dtype=torch.float32).requires_grad_(True)
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1.0, 0, 1, 0])

    def loss_and_gradients(loss):
        network.zero_grad()
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in network.parameters()]

    def plain(count):
        logits = network(normalised(images[:count]))
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[:count])

    def weighted(*weights):
        return train.ClassifierLoss(network)(images, labels, torch.tensor(weights))

    loss, gradients = loss_and_gradients(plain(4))
    same, same_gradients = loss_and_gradients(weighted(1.0, 1.0, 1.0, 1.0))
    assert same == loss and all(torch.equal(*pair) for pair in zip(same_gradients, gradients))
    _, without = loss_and_gradients(weighted(1.0, 1.0, 1.0, 0.0))
    for found, wanted in zip(without, loss_and_gradients(plain(3) * 3 / 4)[1]):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)  # batches of 3 and of 4 round otherwise
    assert loss_and_gradients(weighted(2.0, 1.0, 1.0, 1.0))[0] != loss


def test_weights_below_zero_are_refused_and_old_runs_keep_their_hash(tmp_path):
    (tmp_path / "own.csv").write_text("image,x,y,defect,weight\na.jpg,3,4,crack,-1\n")
    with pytest.raises(ValueError, match="own.csv line 2.*weight -1.0"):
        read_clicks(tmp_path / "own.csv")
    clicks = [Click("a.jpg", 3, 4, "crack", "", "a"), Click("b.jpg", 5, 6, "none", "crack", "b")]
    labels = [("a", 3, 4, "crack"), ("b", 5, 6, "none")]
    assert train.clicks_sha256(clicks) == hashlib.sha256(repr(labels).encode()).hexdigest()
    assert train.clicks_sha256([dataclasses.replace(clicks[0], weight=2.0), clicks[1]]) != train.clicks_sha256(clicks)


def test_f_measure():
    assert train.f_measure(np.array([1.0, 2, -1, 3]), np.array([1.0, 0, 1, 1])) == pytest.approx(2 / 3)
    assert train.f_measure(np.array([-1.0]), np.array([1.0])) == 0


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "VAL_CROPS", 8)

    def arguments_of(data_dir, out):
        arguments = f"--defect crack --data {data_dir} --sets walls --crop-px 32 --batch 4 --steps 6 --lr 1e-3"
        return f"{arguments} --decoder 8,8,8 --val-every 3 --head-lr 1e-2 --out {out}"

    def run(out, steps_before_the_kill=None):
        args = train.parse_args(arguments_of(data_dir, out).split())
        if steps_before_the_kill is None:
            return train.train(args)
        monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)
        monkeypatch.setattr(train, "tqdm", KilledAfter(steps_before_the_kill))
        with pytest.raises(KeyboardInterrupt):
            train.train(args)
        monkeypatch.undo()
        monkeypatch.setattr(train, "VAL_CROPS", 8)

    class KilledAfter(train.tqdm):
        def __init__(self, *args, **kwargs):
            if args and isinstance(args[0], int):
                self.limit = args[0]
            else:
                super().__init__(*args, **kwargs)

        def __call__(self, loader, **kwargs):
            bar = KilledAfter(loader, **kwargs)
            bar.limit = self.limit
            return bar

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == self.limit:
                    raise KeyboardInterrupt
                yield batch

    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", steps_before_the_kill=4)
    assert not (tmp_path / "killed" / "record.json").exists()
    resumed = run(tmp_path / "killed")
    assert [entry["step"] for entry in resumed["history"]] == [3, 6]
    for name, value in load_file(tmp_path / "whole" / "last.safetensors").items():
        other = load_file(tmp_path / "killed" / "last.safetensors")[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)
    assert whole["clicks_sha256"] == resumed["clicks_sha256"]
    with pytest.raises(SystemExit, match="other clicks_sha256, seed"):  # never goes on with another run's checkpoint
        train.train(train.parse_args(f"{arguments_of(data_dir, tmp_path / 'whole')} --seed 1".split()))
    assert json.loads((tmp_path / "whole" / "record.json").read_text())["seed"] == 0


def test_a_run_killed_while_it_judges_loses_no_step_and_judges_again(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "VAL_CROPS", 8)
    arguments = f"--defect crack --data {data_dir} --sets walls --crop-px 32 --batch 4 --steps 4 --lr 1e-3"
    args = train.parse_args(f"{arguments} --decoder 8,8,8 --val-every 2 --out {tmp_path}".split())
    judges = train.val_figures

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "val_figures", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(args)
    seen = []
    monkeypatch.setattr(train, "val_figures", lambda *given: (seen.append(1), judges(*given))[1])
    done = train.train(args)
    assert [row["step"] for row in done["history"]] == [2, 4] and len(seen) == 2
    assert done["history"][0]["loss"] is None and (tmp_path / "best.safetensors").exists()


def test_without_imagenets_weights_the_encoder_starts_from_scratch_and_the_record_says_so(
    data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "VAL_CROPS", 8)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    arguments = f"--defect crack --data {data_dir} --sets walls --crop-px 32 --batch 4 --steps 1 --decoder 8,8,8"
    done = train.train(train.parse_args(f"{arguments} --encoder-weights imagenet --out {tmp_path / 'out'}".split()))
    assert done["encoder_weights"] is None and "training from scratch" in capsys.readouterr().err


def test_photos_on_disk_are_the_photos_and_may_be_written_on():
    photo = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    for array in (photo, photo[:, ::-1], photo[..., 0] > 99):
        kept = on_disk(array)
        assert kept.dtype == array.dtype and np.array_equal(kept, array)
        kept[0, 0] = 0
        assert not kept[0, 0].any()


@pytest.mark.parametrize("command", ["", "demo", "serve", "train", "calibrate"])
def test_every_command_helps_with_an_example(command):
    arguments = [sys.executable, "-m", "defectcam", *([command] if command else []), "--help"]
    out = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert out.returncode == 0 and "xample" in out.stdout and "defectcam" in out.stdout


def test_an_unknown_command_is_named():
    out = subprocess.run([sys.executable, "-m", "defectcam", "dance"], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode != 0 and "dance" in out.stderr and "serve" in out.stderr


WANTED = [Click("a.jpg", 312, 4, "crack"), Click("a.jpg", 9, 4, "none")]
COMMAS = "image,x,y,defect\na.jpg,312.7,4,crack \na.jpg,9,4,None\n"


@pytest.mark.parametrize("name, content", [
    ("excel.csv", COMMAS.encode("utf-8-sig")),
    ("utf16.csv", COMMAS.encode("utf-16")),
    ("semicolons.csv", COMMAS.replace(",", ";").encode()),
    ("decimal commas.csv", COMMAS.replace(",", ";").replace("312.7", "312,7").encode()),
    ("tabs.csv", COMMAS.replace(",", "\t").replace("\n", "\r\n").encode()),
    ("names.csv", b" Image , X,Y ,DEFECT,\n" + COMMAS.split("\n", 1)[1].replace("\n", ",\n\n").encode()),
    ("clicks.jsonl", b'{"image": "a.jpg", "x": 312, "y": 4.2, "defect": "crack"}\n\n'
                     b'{"Image": "a.jpg", "X": 9, "y": 4, "defect": "none"}\n'),
])  # fmt: skip
def test_clicks_are_read_as_people_save_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_clicks(tmp_path / name) == WANTED


@pytest.mark.parametrize("name, content, message", [
    ("own.csv", b"image;x;defect\na.jpg;1;crack\n", "own.csv line 1 has the columns image, x, defect, but not y: "),
    ("own.csv", b"", "own.csv line 1 has the columns , but not image, x, y, defect"),
    ("own.csv", b"image,x,y,defect\na.jpg,3,5,4,2,crack\n", "own.csv line 2 has 6 fields, its header 4: .*semicolons"),
    ("own.csv", b'image,x,y,defect\na.jpg,"3,5",4,crack\n', "own.csv line 2: .*3,5.*a click needs image, x, y .numbers."),
    ("own.csv", b"image,x,y,defect\n\xfcber.jpg,3,5,crack\n", "own.csv line 2 is not UTF-8: save it as CSV in UTF-8"),
    ("own.csv", "image,x".encode("utf-16-le"), "own.csv line 1 is no text in UTF-8"),
    ("own.csv", b"image,x,y,defect\na.jpg,1,0,crack\na.jpg,0.25,0.5,none\n",
     "own.csv line 3: x 0.25 and y 0.5.* beyond 1: these look like shares .*multiply x by the photo's width"),
    ("own.csv", b"image,x,y,defect\na.jpg,100,0,crack\na.jpg,25.5,50,none\n",
     "own.csv line 3: x 25.5 and y 50.* beyond 100: these look like percent .*divide by 100"),
    ("own.jsonl", b'{"image": "a.jpg", "x": 3, "y": 4, "defect": "crack"}\n{"image": "a.jpg", "x": -3, "y": 4, "defect": "crack"}\n',
     r"own.jsonl line 2.*\(-3, 4\)"),
    ("own.jsonl", b'[1]\n', "own.jsonl line 1.*a JSON object with image, x, y and defect needed"),
    ("own.jsonl", b'{"image": "a.jpg", "x": 3}\n', "own.jsonl line 1: KeyError..y"),
])  # fmt: skip
def test_clicks_that_cannot_be_read_right_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_clicks(tmp_path / name)


def test_a_click_lies_in_its_upright_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (80, 60)).save(tmp_path / "turned.jpg", exif=exif)
    clicks = tmp_path / "own.csv"
    clicks.write_text(f"image,x,y,defect\n{tmp_path / 'turned.jpg'},59,79,crack\n")
    assert len(read_clicks(clicks, with_photos=True)) == 1
    clicks.write_text(clicks.read_text() + f"{tmp_path / 'turned.jpg'},79,59,crack\n")
    with pytest.raises(ValueError, match=r"own.csv line 3: the click at \(79, 59\) lies outside its photo .*turned.jpg of 60 x 80 px"):
        read_clicks(clicks, with_photos=True)


def own_clicks(data_dir, tmp_path, rows, val_photo):
    """Arguments of a training on clicks of one's own: (photo's stem, x, y, defect) beside a good one of every kind."""
    photos = sorted((data_dir / "walls" / "images").iterdir())
    lines = [f"{photos[0]},{x},20,{defect}" for x, defect in ((30, "crack"), (90, "none"))]
    (tmp_path / "own.csv").write_text("\n".join(["image,x,y,defect", *lines, *(f"{photos[1]},{row}" for row in rows)]) + "\n")
    val = val_photo or photos[2]
    (tmp_path / "val.csv").write_text(f"image,x,y,defect\n{val},30,20,crack\n{val},90,20,none\n")
    given = f"--defect crack --clicks {tmp_path / 'own.csv'} --val-clicks {tmp_path / 'val.csv'} --decoder 8,8,8 --crop-px 32"
    return f"{given} --batch 4 --steps 20 --out {tmp_path / 'out'}".split(), photos


def test_clicks_on_another_defect_are_not_this_ones(data_dir, tmp_path):
    given, _ = own_clicks(data_dir, tmp_path, ["40,20,rust", "50,20,none"], None)
    clicks, _ = train.gather_clicks(train.parse_args(given), "train")
    assert sorted(click.defect for click in clicks) == ["crack", "none", "none"]
    with pytest.raises(SystemExit, match="--clicks .*own.csv has no click on 'spalling'; its defects are .*'crack', 'none', 'rust'"):
        train.main(["--defect", "spalling", *given[2:]])
    with pytest.raises(SystemExit, match=r"own.csv has no click on 'rusty' \(did you mean 'rust'\?\)"):
        train.main(["--defect", "rusty", *given[2:]])
    in_capitals, _ = train.gather_clicks(train.parse_args(["--defect", "Crack", *given[2:]]), "train")
    assert [(c.defect.lower(), c.x) for c in in_capitals] == [(c.defect, c.x) for c in clicks]
    assert {c.defect for c in in_capitals} == {"Crack", "none"}


@pytest.mark.parametrize("kept, message", [("crack", "no none-click"), ("none", "has no click on 'crack'")])
def test_val_clicks_of_one_kind_are_named(data_dir, tmp_path, kept, message):
    given, _ = own_clicks(data_dir, tmp_path, [], None)
    val = tmp_path / "val.csv"
    val.write_text("".join(line for line in val.read_text().splitlines(True) if line.endswith((f"{kept}\n", "defect\n"))))
    with pytest.raises(SystemExit, match=f"--val-clicks .*val.csv.*{message}"):
        train.main(given)


def test_bad_clicks_of_a_persons_own_end_with_a_message(data_dir, tmp_path):
    given, photos = own_clicks(data_dir, tmp_path, ["5000,20,crack"], None)
    with pytest.raises(SystemExit, match=r"own.csv line 4: the click at \(5000, 20\) lies outside its photo .*crack1.png of 128 x 96 px"):
        train.main(given)
    given, _ = own_clicks(data_dir, tmp_path, [], photos[0])
    with pytest.raises(SystemExit, match="is among the photos to train on and those to judge by"):
        train.main(given)
    given, _ = own_clicks(data_dir, tmp_path, [], tmp_path / "gone.png")
    with pytest.raises(SystemExit, match="val.csv line 2: there is no photo .*gone.png"):
        train.main(given)
    with pytest.raises(SystemExit, match="cannot read the clicks .*gone.csv: No such file"):
        train.main([part.replace("own.csv", "gone.csv") for part in given])
    words = f"--defect crack --data {data_dir} --sets walls --crop-px 2048 --out {tmp_path / 'o'}"
    (tmp_path / "walls").symlink_to(data_dir / "walls")
    (tmp_path / "splits.json").write_text('{"walls": {"train": ["crack0"], "val": ["crack1"]}}')
    with pytest.raises(SystemExit, match="train photos of walls: there is no none-click.* 2048 px .*smaller --crop-px"):
        train.main(words.replace(str(data_dir), str(tmp_path)).split())
    with pytest.raises(SystemExit, match="has no train photos of 'beams'; its sets are"):
        train.main(["--defect", "crack", "--data", str(data_dir), "--sets", "beams", "--out", str(tmp_path / "o")])
