"""Clicks, options and training runs on a small set made here; a killed run goes on as if nothing had happened."""

import json
import re
import subprocess
import sys

import cv2
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from defectcam.__main__ import COMMANDS, main
from defectcam.training import train
from defectcam.training.clicks import Click, patch_bounds, read_clicks, simulate_clicks, write_clicks
from defectcam.training.config import TrainConfig, parse_config, recorded
from defectcam.training.sources import gather
from tests.conftest import ROOT


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
    assert len(nones) > 10 and {click.negative_for for click in nones} == {"crack"}
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


def test_weights_below_zero_are_refused(tmp_path):
    (tmp_path / "own.csv").write_text("image,x,y,defect,weight\na.jpg,3,4,crack,-1\n")
    with pytest.raises(ValueError, match="own.csv line 2.*weight -1.0"):
        read_clicks(tmp_path / "own.csv")


def test_f_measure():
    assert train.f_measure(np.array([1.0, 2, -1, 3]), np.array([1.0, 0, 1, 1])) == pytest.approx(2 / 3)
    assert train.f_measure(np.array([-1.0]), np.array([1.0])) == 0


def config_of(data_dir, **changes):
    """A small training from clicks."""
    given = {"labels": "clicks", "sets": ("walls",), "crop_px": 32, "batch": 4, "lr": 1e-3, "head_lr": 1e-2, "steps": 6,
             "val_every": 3, "decoder": (8, 8, 8, 8), "encoder_weights": None}  # fmt: skip
    return TrainConfig("crack", data_dir, **given | changes)


class KilledAfter(train.tqdm):
    """A progress bar whose process is killed at a step."""

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


@pytest.fixture(autouse=True)
def few_val_crops(monkeypatch):
    monkeypatch.setattr(train, "VAL_CROPS", 8)


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(data_dir, tmp_path, monkeypatch):
    whole = train.train(config_of(data_dir), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", -1)
        patch.setattr(train, "tqdm", KilledAfter(4))
        with pytest.raises(KeyboardInterrupt):
            train.train(config_of(data_dir), tmp_path / "killed")
    assert not (tmp_path / "killed" / "record.json").exists()
    resumed = train.train(config_of(data_dir), tmp_path / "killed")
    assert [entry["step"] for entry in resumed["history"]] == [3, 6]
    assert cv2.imread(str(tmp_path / "killed" / "curves.png")).shape == (240, 3 * 320, 3)  # of three figures
    one, other = (load_file(tmp_path / out / "last.safetensors") for out in ("whole", "killed"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name
    assert whole["labels_sha256"] == resumed["labels_sha256"]
    with pytest.raises(ValueError, match="holds a run with other labels_sha256, seed, val_sha256"):  # never another run's checkpoint
        train.train(config_of(data_dir, seed=1), tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "record.json").read_text())["seed"] == 0


def test_equal_seeds_give_equal_weights_and_other_seeds_others(data_dir, tmp_path):
    for out, seed in (("one", 0), ("two", 0), ("other", 1)):
        train.train(config_of(data_dir, steps=2, val_every=2, seed=seed), tmp_path / out)
    one, two, other = ((tmp_path / out / "best.safetensors").read_bytes() for out in ("one", "two", "other"))
    assert one == two != other


def test_a_finished_run_goes_on_with_more_steps_and_refuses_fewer(data_dir, tmp_path):
    train.train(config_of(data_dir, steps=3), tmp_path)
    more = train.train(config_of(data_dir, steps=6), tmp_path)
    assert [row["step"] for row in more["history"]] == [3, 6] and more["steps"] == 6
    with pytest.raises(ValueError, match="holds a run of 6 steps already, --steps is 5"):
        train.train(config_of(data_dir, steps=5), tmp_path)


def test_a_run_killed_while_it_judges_loses_no_step_and_judges_again(data_dir, tmp_path, monkeypatch):
    config, judges = config_of(data_dir, steps=4, val_every=2), train.val_crop_figures

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "val_crop_figures", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path)
    seen = []
    monkeypatch.setattr(train, "val_crop_figures", lambda *given: (seen.append(1), judges(*given))[1])
    done = train.train(config, tmp_path)
    assert [row["step"] for row in done["history"]] == [2, 4] and len(seen) == 2
    assert done["history"][0]["loss"] is None and (tmp_path / "best.safetensors").exists()


def test_without_imagenets_weights_the_encoder_starts_from_scratch_and_the_record_says_so(
    data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = config_of(data_dir, steps=1, encoder="resnet34", decoder=(8, 8, 8), encoder_weights="imagenet")
    done = train.train(config, tmp_path / "out")
    assert done["encoder_weights"] is None and "training from scratch" in capsys.readouterr().err


def test_the_record_holds_every_option_and_another_run_takes_them_from_it(data_dir, tmp_path):
    given = {"encoder": "resnet34", "decoder": (8, 8, 8), "steps": 1, "scales": (0.7, 1.4), "none_per_photo": 3}
    done = train.train(config_of(data_dir, **given), tmp_path)
    assert tuple(done["decoder"]) == (8, 8, 8)
    words = f"--defect crack --like {tmp_path / 'record.json'} --data {data_dir} --seed 5 --out {tmp_path / 'again'}".split()
    config, run = parse_config(train.__doc__, words)
    assert config == config_of(data_dir, **given, seed=5)
    assert run.out == tmp_path / "again"
    config, _ = parse_config(train.__doc__, [*words, "--paper"])
    assert (config.encoder, config.pixels, config.crop_px, config.batch) == ("resnet34", False, 320, 32)


def test_the_shipped_weights_say_how_they_were_trained(capsys):
    for defect in json.loads((ROOT / "weights" / "manifest.json").read_text())["defects"]:
        fields = recorded(f"{ROOT / 'weights' / 'manifest.json'}:{defect}")
        config = TrainConfig(defect, ROOT, **fields)
        assert config.labels == "outlines" and config.sets and config.steps > 500
        assert config.encoder_weights == "imagenet", "in place of the weights that it began with"
    notes = capsys.readouterr().err
    assert notes.count("began with weights of sha256") == 3 and notes.count("hard negatives") == 2
    assert "weights/manifest.json:spalling learnt from --clicks out/hard-spalling.csv, too: give --clicks" in notes
    with pytest.raises(ValueError, match="--like .*manifest.json:algae: KeyError.*weights/manifest.json:crack"):
        recorded(f"{ROOT / 'weights' / 'manifest.json'}:algae")


@pytest.mark.parametrize("options, message", [
    ("--batch 0", "--batch is 0; 1 or more"),
    ("--steps -3", "--steps is -3; 1 or more"),
    ("--lr 0", "--lr is 0.0; a number above 0"),
    ("--crop-px 50", "--crop-px is 50, but must be a multiple of 16"),
    ("--scales 2,1", "--scales is 2.0,1.0; two factors"),
    ("--negative-share 1", "--negative-share is 1.0; allowed is 0 to below 1"),
    ("--none-regions walls", "--none-regions needs SET:DEFECT"),
    ("--decoder 8,8", "decoder_channels needs 4 numbers"),
    ("--like nothing.json", "--like nothing.json: .*weights/manifest.json:crack"),
])  # fmt: skip
def test_options_that_cannot_be_trained_are_refused(data_dir, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        parse_config(train.__doc__, f"--defect crack --data {data_dir} --sets walls --out {tmp_path} {options}".split())
    assert re.search(message, capsys.readouterr().err)


def test_labels_that_are_missing_are_named(tmp_path, capsys):
    for options, message in (
        ([], "labels are missing"),
        (["--clicks", "own.csv"], "--clicks needs --val-clicks"),
        (["--sets", "walls"], "need --data"),
    ):
        with pytest.raises(SystemExit):
            parse_config(train.__doc__, ["--defect", "crack", "--out", str(tmp_path), *options])
        assert message in capsys.readouterr().err


def test_weights_to_start_from_that_are_none_are_named(data_dir, tmp_path):
    train.train(config_of(data_dir, steps=1), tmp_path / "run")
    torch.save({}, tmp_path / "x.pth")
    for init, message in (
        (tmp_path / "run" / "last.safetensors", "checkpoint of a run that is under way: give best.safetensors"),
        (tmp_path / "x.pth", "x.pth is no safetensors file"),
        (tmp_path / "gone.safetensors", "there is no file .*gone.safetensors"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.train(config_of(data_dir, init=init), tmp_path / "out")
    with pytest.raises(ValueError, match="holds no network with --encoder resnet34"):
        train.train(config_of(data_dir, init=tmp_path / "run" / "best.safetensors", encoder="resnet34", decoder=()), tmp_path / "out")  # fmt: skip


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_helps_with_an_example(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["defectcam", *([command] if command else []), "--help"])
    end = None
    try:
        main()
    except SystemExit as stopped:
        end = stopped.code
    out = capsys.readouterr().out
    assert not end and "xample" in out and f"defectcam {command}" in out


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
    ("own.csv", b"image,x,y,defect\n\xfcber.jpg,3,5,crack\n", "own.csv line 2 is no text in UTF-8: save the file in UTF-8"),
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
    given = f"--defect crack --clicks {tmp_path / 'own.csv'} --val-clicks {tmp_path / 'val.csv'} --encoder resnet34 --decoder 8,8,8"
    return f"{given} --encoder-weights none --crop-px 32 --batch 4 --steps 20 --out {tmp_path / 'out'}".split(), photos


def clicks_to_learn(words):
    config, _ = parse_config(train.__doc__, words)
    return [click for source in gather(config, "train") for click in source.clicks]


def test_clicks_on_another_defect_are_not_this_ones(data_dir, tmp_path):
    given, _ = own_clicks(data_dir, tmp_path, ["40,20,rust", "50,20,none"], None)
    clicks = clicks_to_learn(given)
    assert sorted(click.defect for click in clicks) == ["crack", "none", "none"]
    with pytest.raises(SystemExit, match="--clicks .*own.csv has no click on 'spalling'; its defects are .*'crack', 'rust'"):
        train.main(["--defect", "spalling", *given[2:]])
    with pytest.raises(SystemExit, match=r"own.csv has no click on 'rusty' \(did you mean 'rust'\?\)"):
        train.main(["--defect", "rusty", *given[2:]])
    in_capitals = clicks_to_learn(["--defect", "Crack", *given[2:]])
    assert [(c.defect.lower(), c.x) for c in in_capitals] == [(c.defect, c.x) for c in clicks]
    assert {c.defect for c in in_capitals} == {"Crack", "none"}


@pytest.mark.parametrize("kept, message", [("crack", "no negative click"), ("none", "no click on the defect")])
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
    words = f"--defect crack --data {data_dir} --sets walls --labels clicks --crop-px 2048 --out {tmp_path / 'o'}"
    (tmp_path / "walls").symlink_to(data_dir / "walls")
    (tmp_path / "splits.json").write_text('{"walls": {"train": ["crack0"], "val": ["crack1"]}}')
    with pytest.raises(SystemExit, match="train photos of walls: there is no negative click.* 1024 px .*smaller --crop-px"):
        train.main(words.replace(str(data_dir), str(tmp_path)).split())
    with pytest.raises(SystemExit, match="has no train photos of 'beams'; its sets are"):
        train.main(["--defect", "crack", "--data", str(data_dir), "--sets", "beams", "--out", str(tmp_path / "o")])
