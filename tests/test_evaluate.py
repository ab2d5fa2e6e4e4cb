"""`defectcam evaluate` on synthetic photos, with a network whose every score is known: the darker a pixel, the likelier."""

import gc
import json
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from defectcam.climb import PaperClimb
from defectcam.encoders import normalised
from defectcam.evaluation import evaluate, mosaics
from defectcam.evaluation.dial import STEPS, ShuffledEngine, dial_lines, measure_dial
from defectcam.evaluation.figures import figures, painted, photo_figures, set_figures
from defectcam.evaluation.photos import LabelledPhoto, labelled_photos
from defectcam.evaluation.scale import measure_scale, scale_lines, scaled
from defectcam.network import ScoreNet
from defectcam.predict import Predictor
from defectcam.proposals import find_components
from defectcam.pyramid import Pyramid
from defectcam.tiling import cut
from defectcam.torch_engine import TorchEngine
from defectcam.weights import DefectConfig, Weights, load_weights, write_manifest

SLOPE, MIDDLE = 8.0, -0.5  # S = SLOPE * (MIDDLE - grey), grey in -1..1


def darkness_network() -> ScoreNet:
    """Every channel of the paper's U-Net is 0 but one, which carries 1 - grey from the input to the head."""
    network = ScoreNet("resnet34", (2, 2), downsamplings=1)
    for parameter in network.parameters():
        parameter.data.zero_()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_((1 + module.eps) ** 0.5)
    first, (coarse, fine) = network.encoder.conv1, network.decoder.blocks
    first.weight.data[0, :, 3, 3] = -1 / 3 / network.scale_rgb.flatten()
    network.encoder.bn1.bias.data[0] = 1 + (network.shift_rgb / network.scale_rgb).mean()
    skipped = coarse.conv1[0].weight.shape[1] - first.out_channels
    coarse.conv1[0].weight.data[0, skipped, 1, 1] = 1
    for conv in (coarse.conv2[0], fine.conv1[0], fine.conv2[0]):
        conv.weight.data[0, 0, 1, 1] = 1
    network.head.weight.data[0, 0], network.head.bias.data[0] = SLOPE, SLOPE * (MIDDLE - 1)
    return network.requires_grad_(False).eval()


@cache
def darkness_tensors() -> dict[str, Tensor]:
    return darkness_network().state_dict()


def grey_of(image_rgb: np.ndarray) -> np.ndarray:
    return image_rgb.mean(axis=2) / 127.5 - 1


class DarknessEngine:
    """The same function without a network, for what needs no more than an engine's two calls."""

    name, halo_px, stride_px = "darkness", 0, 1

    def score(self, images):
        return (SLOPE * (MIDDLE - images.mean(axis=1))).astype(np.float32)

    def score_and_gradient(self, images):
        score = self.score(images)
        gradient = -SLOPE / 3 / (1 + np.exp(-score))
        return score, np.repeat(gradient[:, None], 3, axis=1)

    def release_memory(self):
        pass


ENTRY = {
    "file": "spalling.safetensors", "sha256": "", "encoder": "resnet34", "decoder_channels": (2, 2), "downsamplings": 1,
    "pooling": "average", "finest_scale": 1.0, "levels": 1, "sharpness": 1.0,
    "climb": {"form": "local", "xi": 0.1, "g_ref": [SLOPE / 30]}, "platt": (1.0, 0.0), "cam_threshold": 0.5,
    "closing_radius_px": 0, "gap_px": 0, "min_area_px": 10, "confidence_weights": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0),
    "threshold": 0.5, "iterations": 2, "tolerance_px": 1.0, "hole_share": 0.02,
    "training": {"sets": ["walls"], "healthy_sets": ["plain"]},
}  # fmt: skip


def write_weights(folder, **fields):
    """A weights folder of the network."""
    folder.mkdir()
    save_file(darkness_tensors(), folder / "spalling.safetensors")
    write_manifest(folder, {"spalling": ENTRY | fields})


def dark_predictor(defect="spalling", **fields):
    """A Predictor that runs the engine without a network."""
    weights = Weights("1", {defect: DefectConfig(**ENTRY | fields)}, Path("no files"))
    with patch("defectcam.predict.make_engine", return_value=DarknessEngine()):
        return Predictor(weights)


def dark_spot(height, width, centre_yx, radius_px, darkest=0, softness_px=0.0, brightest=210):
    """A bright photo with a dark disc, and the disc."""
    ys, xs = np.mgrid[:height, :width]
    disc = np.hypot(ys - centre_yx[0], xs - centre_yx[1]) <= radius_px
    grey = np.where(disc, float(darkest), float(brightest))
    grey = ndimage.gaussian_filter(grey, softness_px) if softness_px else grey
    return np.repeat(grey[..., None], 3, axis=2).round().astype(np.uint8), disc


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Set "walls": two photos with a dark disc, labelled a little larger, and one without; "plain": two without, of which
    one has a dark spot; "other": one photo that is all defect. None has train photos."""
    folder = tmp_path_factory.mktemp("data")
    photos = {"walls": {}, "plain": {}, "other": {}}
    for name, centre in (("a", (30, 30)), ("b", (45, 50))):
        photos["walls"][name] = dark_spot(70, 80, centre, 16)[0], dark_spot(70, 80, centre, 18)[1]
    photos["walls"]["c"] = dark_spot(70, 80, (0, 0), 0, 210)[0], None
    photos["plain"]["d"] = dark_spot(80, 80, (0, 0), 0, 210)[0], None
    photos["plain"]["e"] = dark_spot(80, 80, (40, 40), 6)[0], None
    photos["other"]["f"] = dark_spot(64, 64, (32, 32), 100)
    for set_name, of_set in photos.items():
        (folder / set_name / "images").mkdir(parents=True)
        (folder / set_name / "masks" / "spalling").mkdir(parents=True)
        for stem, (image_rgb, mask) in of_set.items():
            cv2.imwrite(str(folder / set_name / "images" / f"{stem}.png"), image_rgb)
            if mask is not None:
                cv2.imwrite(str(folder / set_name / "masks" / "spalling" / f"{stem}.png"), 255 * mask.astype(np.uint8))
    splits = {set_name: {"train": [], "val": sorted(of_set)} for set_name, of_set in photos.items()}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def run(capsys, *arguments):
    evaluate.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_network_and_the_engine_without_one_score_darkness(tmp_path):
    write_weights(tmp_path / "w")
    image_rgb = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    images = normalised(image_rgb.transpose(2, 0, 1)[None])
    engine = Predictor(load_weights(tmp_path / "w")).engines["spalling"]
    assert engine.score(images)[0] == pytest.approx(SLOPE * (MIDDLE - grey_of(image_rgb)), abs=1e-3)
    for found, wanted in zip(DarknessEngine().score_and_gradient(images), engine.score_and_gradient(images)):
        assert found == pytest.approx(wanted, abs=1e-3)


# Figures


def test_figures_of_a_set():
    truth = np.zeros((50, 60), bool)
    truth[10:30, 10:40] = True
    image = np.zeros((50, 60, 3), np.uint8)
    right, wrong = truth.copy(), np.zeros_like(truth)
    wrong[45:49, 50:58] = True
    photos = [LabelledPhoto("s", name, image, which) for name, which in [("a", truth), ("b", truth), ("c", None)]]
    found = figures("rust", list(zip(photos, [right, wrong, wrong])))
    assert found["photos"] == 2 and found["instances"] == 2
    assert found["iou"] == pytest.approx(600 / (1200 + 32 + 32), abs=1e-4)  # of all photos
    assert found["iou_photo_mean"] == 0.5
    assert found["false_components"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["mean_saved"] == 0.5 and found["eq3"] == pytest.approx(0.475) and found["eq3_found"] == 0.95
    assert found["f1_2px"] == 0.5 and found["f1_2px_all"] == pytest.approx(2 / (664 / 600 + 1200 / 600), abs=1e-3)
    assert found["found_recall"] == 0.5 and found["found_precision"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["found_iou"] == found["pieces"] == found["vertex_ratio"] == 1 and found["holes"] == 0
    assert found["specificity"] == 0 and found["healthy_photos"] == 1
    assert found["false_per_mp"] == pytest.approx(1 / 0.003, abs=1e-3)
    assert "cl_iou" not in found and found["iou_95"][0] == 0
    healthy = figures("rust", [(photos[2], np.zeros_like(truth))])
    assert healthy == {"photos": 0, "false_components": 0, "false_per_mp": 0, "false_per_mp_95": [0, 0], "specificity": 1,
                       "healthy_photos": 1}  # fmt: skip
    assert figures("rust", []) == {"photos": 0}


def test_found_instances_are_those_with_a_proposal_also_one_that_saves_nothing():
    truth, proposed = np.zeros((60, 90), bool), np.zeros((60, 90), bool)
    for x in (5, 35, 65):
        truth[10:30, x : x + 15] = True
    proposed[10:30, 5:20] = True  # as it is
    proposed[32:55, 35:85] = True  # touches the second and the third, useless
    proposed[:, 62:] = False  # and now the second alone
    found = figures("rust", [(LabelledPhoto("s", "a", np.zeros((60, 90, 3), np.uint8), truth), proposed)])
    assert found["instances"] == 3 and found["eq3"] == pytest.approx(0.95 / 3, abs=1e-3)
    assert found["eq3_found"] == pytest.approx(0.95 / 2)


def test_a_crack_in_pieces():
    truth, proposed = np.zeros((60, 200), bool), np.zeros((60, 200), bool)
    truth[30:33, 10:190] = True
    for start, end in ((10, 50), (70, 145), (155, 190)):
        proposed[30:33, start:end] = True
    photo = LabelledPhoto("s", "a", np.zeros((60, 200, 3), np.uint8), truth)
    found = figures("crack", [(photo, proposed)])
    assert found["found_recall"] == 0 and found["found_precision"] == 1 and "pieces" not in found
    assert found["cl_iou"] == found["cl_iou_photo_mean"] == pytest.approx(150 / 178, abs=0.1)
    proposed[31, 50:70] = True  # one gap closed: a proposal covers 0.75 of the crack
    found = figures("crack", [(photo, proposed)])
    assert found["found_recall"] == 1 and found["pieces"] == 2
    healthy = LabelledPhoto("s", "b", photo.image_rgb, None)
    found = figures("crack", [(photo, truth), (healthy, truth)])  # the same line where there is no crack
    assert found["cl_iou"] == 0.5 and found["cl_iou_photo_mean"] == 1 and found["iou"] == 0.5
    assert found["found_precision"] == 0.5 and found["specificity"] == 0


def test_sets_add_up_and_intervals_narrow():
    rng = np.random.default_rng(0)
    judged = []
    for index in range(12):
        truth = ndimage.gaussian_filter(rng.standard_normal((60, 80)), 4) > 0.03
        photo = LabelledPhoto("s", str(index), np.zeros((60, 80, 3), np.uint8), truth)
        judged.append((photo, np.roll(truth, index % 5, axis=1)))
    found = figures("crack", judged)
    both = sum((mask & photo.truth).sum() for photo, mask in judged)
    either = sum((mask | photo.truth).sum() for photo, mask in judged)
    assert found["iou"] == pytest.approx(both / either, abs=1e-4)
    low, high = found["iou_95"]
    assert low < found["iou"] < high
    four_times = figures("crack", 4 * judged)
    assert four_times["iou"] == found["iou"]
    assert four_times["iou_95"][1] - four_times["iou_95"][0] < 0.7 * (high - low)
    each = [photo_figures("crack", photo, find_components(mask)) for photo, mask in judged]
    assert set_figures(each) == found == set_figures([*each])


def test_a_mask_of_another_size_than_its_photo_does_not_judge(data_dir):
    assert len(list(labelled_photos(data_dir, ["walls"], [], "val", "spalling"))) == 3
    mask = data_dir / "walls" / "masks" / "spalling" / "a.png"
    kept = mask.read_bytes()
    cv2.imwrite(str(mask), np.ones((5, 5), np.uint8) * 255)
    with pytest.raises(ValueError, match="mask .*a.png is .*, its photo .*: both must be the same"):
        list(labelled_photos(data_dir, ["walls"], [], "val", "spalling"))
    mask.write_bytes(kept)


def test_of_a_healthy_set_only_photos_without_the_defect_count(data_dir):
    def taken(sets, healthy_sets):
        photos = labelled_photos(data_dir, sets, healthy_sets, "val", "spalling")
        return [(photo.stem, photo.truth is not None) for photo in photos]

    assert taken([], ["walls"]) == [("c", False)]
    assert taken(["walls"], ["plain", "walls"]) == [("a", True), ("b", True), ("c", False), ("d", False), ("e", False)]
    assert [photo.stem for photo in labelled_photos(data_dir, ["walls"], ["plain"], "val", "spalling", 1)] == ["a", "d"]


# The table


def test_the_table_has_a_row_per_set_method_and_number_of_steps(data_dir, tmp_path, capsys):
    write_weights(tmp_path / "w")
    write_weights(tmp_path / "four", iterations=4, threshold=0.9999)
    out = run(capsys, "--weights", tmp_path / "w", "--compare", f"four={tmp_path / 'four'}", "--data", data_dir,
              "--out", tmp_path / "out")  # fmt: skip
    assert "57 %" in out and "58 %" in out and "40 %" in out and "51 %" in out
    found = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    rows = {(row["set"], row["method"], row["T"]): row for row in found["rows"]}
    for name in ("", "four: "):
        methods = [(f"{name}ours", steps) for steps in (0, 1, 2, 4, 8)]
        methods += [(f"{name}plain CAM", 0), (f"{name}paper's setting", 2)]
        for set_name in ("walls", "plain"):
            assert {(set_name, *method) for method in methods} <= set(rows)
    assert len(rows) == 2 * 2 * 7
    assert [key for key, row in rows.items() if row["is_default"] and key[0] == "walls"] == [
        ("walls", "ours", 2), ("walls", "four: ours", 4)]  # fmt: skip

    def discs(radius):
        return [dark_spot(70, 80, centre, radius)[1].sum() for centre in ((30, 30), (45, 50))]

    assert rows["walls", "ours", 0]["iou"] == pytest.approx(sum(discs(16)) / sum(discs(18)), abs=1e-4)
    assert rows["walls", "ours", 0]["photos"] == 2 and rows["walls", "ours", 0]["healthy_photos"] == 1
    assert rows["walls", "four: ours", 0]["iou"] == 0  # no confidence reaches 0.9999
    assert rows["plain", "ours", 8]["healthy_photos"] == 2 and rows["plain", "ours", 8]["specificity"] == 0.5
    assert rows["plain", "ours", 8]["false_per_mp"] == pytest.approx(1 / 0.0128, rel=1e-3)
    (table,) = [one for one in found["confidence"] if one["method"] == "ours"]
    assert sum(row["proposals"] for row in table["bins"]) == 3 and table["bins"][-1]["right"] == pytest.approx(2 / 3)
    page = (tmp_path / "out" / "evaluate.html").read_text()
    pictures = sorted(path.name for path in (tmp_path / "out" / "evaluate").iterdir())
    names = ("plain_d", "plain_e", "walls_a", "walls_b", "walls_c")
    assert pictures == ["cases_spalling.png", "precision_recall_spalling.svg", *(f"spalling_{name}.jpg" for name in names)]
    assert all(name in page for name in pictures[1:])
    parts = ["<h3>Worst cases", "plain e: 0.00 saved", "<h3>Best cases", "walls b: ", "<h3>All others", "walls c: 1.00 saved"]
    assert [*map(page.index, parts)] == sorted(map(page.index, parts))
    plot = (tmp_path / "out" / "evaluate" / "precision_recall_spalling.svg").read_text()
    assert "walls, ours" in plot and "four" not in plot, "of what proposes nothing there is no precision"
    assert all(f">{steps}</text>" in plot for steps in STEPS)
    assert rows["walls", "ours", 0]["recall"] == rows["walls", "ours", 0]["iou"] and rows["walls", "ours", 0]["precision"] == 1


@pytest.mark.parametrize(
    "more", [["--steps", "0,1"], ["--healthy-sets", "plain,walls", "--mosaics"]], ids=["table", "mosaics"]
)
def test_few_photos_are_in_memory_at_a_time(data_dir, tmp_path, capsys, monkeypatch, more):
    write_weights(tmp_path / "w")
    monkeypatch.setattr(mosaics, "SIDE_PX", 100)
    seen, alive = [], []

    def watched(*args, **options):
        for photo in labelled_photos(*args, **options):
            pixels = photo.image_rgb
            seen.append(weakref.ref(pixels if pixels.base is None else pixels.base))
            del pixels
            yield photo
            del photo
            gc.collect()
            alive.append(sum(one() is not None for one in seen))

    monkeypatch.setattr(evaluate, "labelled_photos", watched)
    run(capsys, "--weights", tmp_path / "w", "--data", data_dir, "--sets", "walls", "--out", tmp_path, *more)
    assert len(seen) == len(alive) > 2 and max(alive) <= 2


def test_plain_cam_and_the_papers_setting_are_their_formulas(tmp_path):
    write_weights(tmp_path / "w")
    predictor = Predictor(load_weights(tmp_path / "w"))
    image_rgb, _ = dark_spot(70, 80, (30, 40), 16, softness_px=8, brightest=250)
    maps = predictor.maps(Pyramid(image_rgb), "spalling")
    masks = {method: painted(found, (70, 80)) for method, _, found in evaluate.answers(predictor, maps, "spalling", [0])}
    activation = SLOPE * (1 - grey_of(image_rgb))  # S - b, nowhere below 0
    assert np.array_equal(masks["plain CAM"], activation > 0.1 * activation.max())
    tile = cut(image_rgb, (-24, 104, -24, 104))  # with the network's halo, as one tile
    climb = PaperClimb(xi=0.08, penalty_weight=7.0, salient_share=0.5)
    *_, last = climb.maps(TorchEngine(darkness_network()), normalised(tile.transpose(2, 0, 1)[None]), 2)
    last = last[0, 24:94, 24:104]
    assert np.array_equal(masks["paper's setting"], last > 0.1 * last.max())
    assert masks["plain CAM"].any() and (masks["plain CAM"] != masks["paper's setting"]).any()


def test_sets_come_from_the_record_or_the_command(data_dir, tmp_path, capsys):
    write_weights(tmp_path / "w")
    common = ["--weights", tmp_path / "w", "--data", data_dir, "--out", tmp_path / "out"]
    run(capsys, *common, "--sets", "other", "--healthy-sets", "", "--steps", "0,3")
    rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["rows"]
    assert {row["set"] for row in rows} == {"other"} and rows[0]["iou"] == 1 and rows[0]["eq3"] == 0.95
    assert [row["T"] for row in rows if row["method"] == "ours"] == [0, 3]
    write_weights(tmp_path / "no-record", training={})
    for extra, message in [
        (["--weights", tmp_path / "no-record"], "do not say which sets they were chosen on: name them with --sets"),
        (["--weights", tmp_path / "no-record", "--sets", "walls"], "name them with --healthy-sets"),
        (["--defects", "rust"], "no weights for 'rust' in .*; there are spalling"),
        (["--weights", tmp_path / "none"], "no weights in"),
        (["--data", tmp_path], "no splits.json"),
        (["--dial", "--sets", "plain"], "no val photo with spalling in these sets"),
        (["--scale", "--sets", "plain"], "no val photo with spalling in these sets"),
        (["--mosaics", "--sets", "other", "--healthy-sets", ""], "no val photo without spalling in these sets"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(capsys, *common, *extra)
    for extra, message in [(["--photos", 0], "'0' is not a number of 1 or more"), (["--compare", "x"], "not NAME=FOLDER"),
                           (["--dial", "--compare", "x=y"], "--compare belongs to the table"),
                           (["--dial", "--steps", "0"], "--steps belongs to the table"),
                           (["--steps", "51"], "--steps 51: at most 50"), (["--steps", "x"], "'x' is not a number of steps"),
                           (["--dial", "--scale"], "not allowed with")]:  # fmt: skip
        with pytest.raises(SystemExit):
            run(capsys, *common, *extra)
        assert message in capsys.readouterr().err


# T


def climbed(image_rgb: np.ndarray, steps: int, xi: float = 0.1) -> np.ndarray:
    """M_T of the darkness network, pixel by pixel: every step makes a pixel darker by the gradient of its own score."""
    grey, total = grey_of(image_rgb), 0.0
    for _ in range(steps + 1):
        score = SLOPE * (MIDDLE - grey)
        total = total + score
        grey = np.clip(grey - xi * np.clip(10 / (1 + np.exp(-score)), 0, 1), -1, 1)
    return total / (steps + 1)


def soft_photos(steps: int = 2) -> list[LabelledPhoto]:
    """Discs with soft edges, whose truth is what a climb of `steps` finds, moved by 3 px; and a photo without."""
    photos = []
    for index, radius in enumerate((16, 22, 28)):
        image_rgb, _ = dark_spot(190, 230, (95, 115), radius, softness_px=5)
        photos.append(LabelledPhoto("walls", str(index), image_rgb, np.roll(climbed(image_rgb, steps) > 0, 3, axis=1)))
    return [*photos, LabelledPhoto("walls", "bright", dark_spot(50, 50, (0, 0), 0, 210)[0], None)]


def failing(found: dict) -> list[str]:
    return [one["condition"] for one in found["conditions"] if not one["holds"]]


def test_t_is_a_dial_where_climbing_extends():
    photos = [photo for photo in soft_photos() if photo.truth is not None]
    found = measure_dial(dark_predictor(), "spalling", soft_photos())
    assert [row["T"] for row in found["rows"]] == list(STEPS) and found["photos"] == 3
    for row in found["rows"]:
        masks = [climbed(photo.image_rgb, row["T"]) > 0 for photo in photos]
        both = sum((mask & photo.truth).sum() for mask, photo in zip(masks, photos))
        either = sum((mask | photo.truth).sum() for mask, photo in zip(masks, photos))
        assert row["recall"] == pytest.approx(both / sum(photo.truth.sum() for photo in photos), abs=1e-3)
        assert row["precision"] == pytest.approx(both / sum(mask.sum() for mask in masks), abs=1e-3)
        assert row["iou"] == pytest.approx(both / either, abs=1e-3)
        # Here a pixel's climbed score grows with its plain one, so that a lower threshold is the same mask.
        assert row["threshold_precision"] == pytest.approx(row["precision"], abs=0.03)
    assert found["is_dial"] and failing(found) == []
    assert dial_lines(found)[-1] == "T is a dial: yes"


@pytest.mark.parametrize(
    "fields, truth_steps, wanted",
    [
        ({"climb": {"form": "local", "xi": 0.0, "g_ref": [1.0]}}, 2,
         ["with the gradient shuffled", "recall rises by 0.08", "the answers of T = 0 and 8"]),
        ({"iterations": 4}, 2, ["IoU is best at the default T = 4"]),
        ({"climb": {"form": "local", "xi": 0.05, "g_ref": [1e-6]}}, 2,
         ["with the gradient shuffled"]),
    ],
    ids=["no step", "another default", "steps as large where there is no gradient"],
)  # fmt: skip
def test_the_verdict_names_what_fails(fields, truth_steps, wanted):
    found = measure_dial(dark_predictor(**fields), "spalling", soft_photos(truth_steps))
    assert not found["is_dial"]
    assert all(any(one.startswith(start) for one in failing(found)) for start in wanted)
    assert dial_lines(found)[-1].startswith("T is a dial: no, since these fail: ")


def test_the_papers_climb_has_no_dial_to_measure():
    climb = {"form": "paper", "xi": 0.08, "penalty_weight": 7.0, "salient_share": 0.5}
    with pytest.raises(ValueError, match="--dial needs the local form of climbing; the weights of spalling"):
        measure_dial(dark_predictor(climb=climb), "spalling", soft_photos())


def test_shuffled_gradients_lose_their_places_alone():
    engine = TorchEngine(darkness_network())
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    score, gradient = engine.score_and_gradient(images)
    first, second = (ShuffledEngine(engine).score_and_gradient(images) for _ in range(2))
    assert np.array_equal(first[0], score) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], gradient)
    for one, other in zip(first[1], gradient):  # the same pixels, channels together
        assert np.array_equal(np.sort(one.reshape(3, -1), axis=1), np.sort(other.reshape(3, -1), axis=1))
        assert sorted(map(tuple, one.reshape(3, -1).T)) == sorted(map(tuple, other.reshape(3, -1).T))


# Scale and silence


def test_scaled_photos_and_masks_keep_their_places():
    image_rgb, disc = dark_spot(60, 80, (20, 30), 12)
    photo = LabelledPhoto("walls", "a", image_rgb, disc)
    for factor in (2.0, 4.0, 0.5):
        for defect in ("crack", "rust"):
            image, mask = scaled(photo, factor, defect)
            assert image.shape == (60 * factor, 80 * factor, 3) and mask.shape == image.shape[:2]
            dark = image.mean(axis=2) < 105
            assert (dark & mask).sum() / (dark | mask).sum() > 0.85
    assert scaled(photo, 1.0, "rust") == (photo.image_rgb, photo.truth)
    line = np.zeros((60, 80), bool)
    np.fill_diagonal(line, True)
    thin = LabelledPhoto("walls", "a", image_rgb, line)
    _, mask = scaled(thin, 0.5, "crack")
    assert np.array_equal(mask, line.reshape(30, 2, 40, 2).max(axis=(1, 3)))
    line[::2] = False
    assert scaled(thin, 0.5, "crack")[1].any() and not scaled(thin, 0.5, "rust")[1].any()  # a quarter is covered


def test_scale_is_held_by_what_looks_the_same_at_every_size():
    found = measure_scale(dark_predictor(), "spalling", soft_photos())
    assert [row["factor"] for row in found["rows"]] == [1, 2, 4, 0.5] and {row["photos"] for row in found["rows"]} == {3}
    assert found["figure"] == "iou" and all(row["iou"] > 0.8 for row in found["rows"]) and found["holds"]
    assert scale_lines(found)[-1] == "Scale is held: yes"
    of_one, *larger, reduced = found["rows"]
    assert [row["same"] for row in (of_one, *larger)] == [of_one["iou"]] * 3, "an enlarged answer covers as much"
    assert reduced["same"] == pytest.approx(of_one["iou"], abs=0.02)
    large_only = dark_predictor(min_area_px=700)  # half as large, two of the three discs have fewer pixels
    found = measure_scale(large_only, "spalling", soft_photos())
    assert [row["holds"] for row in found["rows"]] == [True, True, True, False] and not found["holds"]
    assert scale_lines(found)[-1] == "Scale is held: no: walls at 0.5"


def test_hairlines_are_enlarged_only():
    photos = [replace(photo, set_name=name) for photo in soft_photos()[:1] for name in ("walls", "uav75")]
    found = measure_scale(dark_predictor("crack"), "crack", photos)
    assert found["figure"] == "f1_2px"
    assert {(row["set"], row["factor"]) for row in found["rows"]} == {
        *(("walls", factor) for factor in (1, 2, 4, 0.5)), *(("uav75", factor) for factor in (1, 2, 4))}  # fmt: skip
    of_one, twice, four_times, _ = (row for row in found["rows"] if row["set"] == "walls")
    assert of_one["f1_2px"] > twice["same"] > four_times["same"], "2 px are less of a photo that is larger"


def plain_photos() -> list[LabelledPhoto]:
    """Two sets of photos of two sizes, every photo of a grey of its own; one with a dark spot."""
    photos = []
    for index in range(6):
        height, width = ((40, 60), (30, 30))[index % 2]
        image_rgb = np.full((height, width, 3), 150 + 10 * index, np.uint8)
        if index == 4:
            image_rgb[10:18, 10:18] = 0
        photos.append(LabelledPhoto(f"set{index % 2}", str(index), image_rgb, None))
    return photos


def test_mosaics_are_whole_and_take_every_photo(monkeypatch):
    monkeypatch.setattr(mosaics, "SIDE_PX", 200)
    made = list(mosaics.mosaics_of(plain_photos(), 4))
    assert [mosaic.factor for mosaic in made] == [1, 4, 1, 4]
    for mosaic in made:
        assert mosaic.image_rgb.shape == (200, 200, 3)
        covered = np.zeros((200, 200), int)
        for name, (y0, y1, x0, x1) in mosaic.places:
            covered[y0:y1, x0:x1] += 1
            index = int(name.split("/")[1])
            height, width = ((40, 60), (30, 30))[index % 2]
            assert y1 == 200 or y1 - y0 == mosaic.factor * height
            assert x1 == 200 or x1 - x0 == mosaic.factor * width
            assert mosaic.image_rgb[y1 - 1, x1 - 1, 0] == 150 + 10 * index
            assert mosaic.photo_at(y1 - 1, x1 - 1) == name and name == f"set{index % 2}/{index}"
        assert (covered == 1).all()
    assert {name for name, _ in made[0].places} == {f"set{index % 2}/{index}" for index in range(6)}
    again = list(mosaics.mosaics_of(plain_photos(), 2))
    assert all(np.array_equal(one.image_rgb, other.image_rgb) for one, other in zip(made, again))


def test_false_proposals_on_mosaics_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mosaics, "SIDE_PX", 200)
    found = mosaics.measure_mosaics(dark_predictor(), "spalling", plain_photos(), 2, tmp_path / "mosaics")
    spots = []
    for mosaic in mosaics.mosaics_of(plain_photos(), 2):
        spots.append(ndimage.label(mosaic.image_rgb[..., 0] < 60)[1])
    assert spots[0] > 1
    assert [(row["factor"], row["T"]) for row in found["rows"]] == [(f, steps) for f in (1, 4) for steps in (0, 2, 8)]
    for row in found["rows"]:
        assert row["false_per_mp"] == pytest.approx(spots[row["factor"] // 4] / 0.04)
        assert row["megapixels"] == 0.04 and row["mosaics"] == 1
    assert found["fired"] == {"set0/4": sum(spots)}
    drawn = sorted(path.name for path in (tmp_path / "mosaics").iterdir())
    assert drawn == [f"spalling_{number}.jpg" for number in range(2) if spots[number]]
    assert "look at: set0/4" in mosaics.mosaics_lines(found)[-1]


def test_dial_scale_and_mosaics_are_commands(data_dir, tmp_path, capsys, monkeypatch):
    write_weights(tmp_path / "w")
    monkeypatch.setattr(mosaics, "SIDE_PX", 100)
    common = ["--weights", tmp_path / "w", "--data", data_dir, "--out", tmp_path / "out", "--photos", "1"]
    for name, ending in (("dial", "T is a dial: "), ("scale", "Scale is held: "), ("mosaics", "false/MP")):
        out = run(capsys, *common, f"--{name}")
        (result,) = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert ending in out and result["defect"] == "spalling" and result["rows"]
