"""Extend, never invent: what T and the threshold do to the proposals, and that climbing only around them is enough."""

import importlib.util
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest

from defectcam import pyramid
from defectcam.deadline import Deadline, TimeLimitError
from defectcam.postprocess import regions
from defectcam.predict import Predictor, device_and_engine, find_cores, pixels_of, proposals_for
from defectcam.proposals import Proposal, component_confidence, component_features, find_components, probability
from defectcam.pyramid import PhotoMaps, Pyramid
from defectcam.settings import ENGINES, RequestError
from defectcam.throughput import climb_passes
from defectcam.tiling import tile_grid
from defectcam.torch_engine import TorchEngine
from defectcam.weights import DefectConfig, WeightsError, load_weights
from tests.conftest import SmallNetwork, dark_wall, dark_weights, textured, tiny_weights

CONFIG = DefectConfig(
    file="crack.safetensors", sha256="", encoder="resnet34", decoder_channels=(8, 8, 8), downsamplings=2, pooling="average",
    finest_scale=1.0, levels=3, sharpness=1.0,
    climb={"form": "local", "xi": 0.1, "g_ref": [0.5, 1.0]},
    platt=(0.5, -0.2), cam_threshold=0.5, closing_radius_px=0, gap_px=0, min_area_px=4,
    confidence_weights=(0.8, 0.0, 0.3, 0.0, 0.0, 0.1, -0.1, -2.0), threshold=0.5, iterations=2,
    tolerance_px=1.0, hole_share=0.02, training={},
)  # fmt: skip


class Case:
    """A photo that has structure here and there, and theta and threshold at which some of its cores are accepted.

    Its tiles are of 128 px, so that there are many that need not climb.
    """

    def __init__(self, seed, monkeypatch, closing_radius_px=0, gap_px=0, accepted=3, share=0.01, **fields):
        monkeypatch.setattr(pyramid, "tile_grid", partial(tile_grid, largest_px=128))
        self.photo = np.full((240, 350, 3), 128, np.uint8)
        for top, bottom, left, right in [(15, 110, 10, 130), (30, 60, 240, 340), (140, 230, 200, 300)]:
            self.photo[top:bottom, left:right] = textured(bottom - top, right - left, seed)
        self.photo = cv2.GaussianBlur(self.photo, (0, 0), 1.5)
        self.engine = TorchEngine(SmallNetwork(seed))
        self.config = replace(CONFIG, closing_radius_px=closing_radius_px, gap_px=gap_px, **fields)
        logits = self.maps().merged()
        monkeypatch.setattr(pyramid, "POSSIBLE_LOGIT", float(np.quantile(logits, 0.98)))
        slope, intercept = self.config.platt
        self.theta = float(probability(slope * float(np.quantile(logits, 1 - share)) + intercept))
        self.cores = find_cores(self.maps(), self.config, self.theta)
        self.threshold = sorted(core.confidence for core in self.cores)[-accepted]
        self.accepted = [core for core in self.cores if core.confidence >= self.threshold]
        assert accepted <= len(self.accepted) < len(self.cores)

    def maps(self, batch=1) -> PhotoMaps:
        return PhotoMaps(self.engine, self.config.reading, Pyramid(self.photo), batch)

    def proposals(self, wanted, maps=None, **given) -> dict[int, list[Proposal]]:
        return proposals_for(maps or self.maps(), self.config, wanted, self.threshold, self.theta, **given)


def pixels_in(proposal: Proposal, shape: tuple[int, int]) -> np.ndarray:
    """The pixels (H, W) bool of a proposal."""
    pixels = np.zeros(shape, bool)
    x0, y0, x1, y1 = proposal.component.box_xyxy
    pixels[y0 : y1 + 1, x0 : x1 + 1] = proposal.component.mask
    return pixels


def told(proposals: list[Proposal]) -> list[tuple]:
    """All that proposals say, in their order, for comparing."""
    return [(one.component.box_xyxy, one.component.mask.tobytes(), one.confidence) for one in proposals]


@pytest.mark.parametrize("closing_radius_px, gap_px", [(0, 0), (2, 5)])
def test_a_proposal_extends_what_was_accepted_and_none_is_invented(monkeypatch, closing_radius_px, gap_px):
    case = Case(1, monkeypatch, closing_radius_px, gap_px, accepted=6)
    maps = case.maps()
    shape = maps.height, maps.width
    by_steps = case.proposals([0, 1, 2, 8], maps)
    assert sorted(told(by_steps[0])) == sorted(told(case.accepted))
    for steps, proposals in by_steps.items():
        held = []
        for one in proposals:
            pixels = pixels_in(one, shape)
            inside = [core for core in case.accepted if (pixels & pixels_in(core, shape)).any()]
            assert inside, "invented"
            assert all(pixels[pixels_in(core, shape)].all() for core in inside)
            assert one.confidence == max(core.confidence for core in inside)
            held += inside
        assert len(held) == len(case.accepted) == len({id(core) for core in held}), "every core in one proposal"
        assert len(proposals) <= len(by_steps[0])
        order = [one.confidence * one.component.area_px for one in proposals]
        assert order == sorted(order, reverse=True)
    reach = [sum(one.component.area_px for one in by_steps[steps]) for steps in (0, 1, 2, 8)]
    assert reach[0] < reach[1] and reach[0] < reach[2] < reach[3], "T says how far"


def test_a_proposal_is_a_region_of_the_climbed_map(monkeypatch):
    case = Case(2, monkeypatch, 1, 3)
    maps = case.maps()
    proposals = case.proposals([2], maps, everywhere=True)[2]
    core = np.zeros((maps.height, maps.width), bool)
    for one in case.accepted:
        core |= pixels_in(one, core.shape)
    mask = regions(maps.merged(2), case.config.least_logit(case.theta), case.config.cleaning) | core
    wanted = [one for one in find_components(mask) if (pixels_in(Proposal(one, 0.0), core.shape) & core).any()]
    assert {one.component.box_xyxy for one in proposals} == {one.box_xyxy for one in wanted}
    assert sum(one.component.area_px for one in proposals) == sum(one.area_px for one in wanted)


@pytest.mark.parametrize(
    "seed, accepted, share, closing_radius_px, gap_px, finest_scale, levels, wanted, grows",
    [
        (6, 1, 0.01, 0, 0, 1.0, 1, [2], True),
        (8, 2, 0.06, 0, 0, 1.0, 1, [2], True),
        (2, 1, 0.01, 2, 5, 1.0, 3, [1, 3], True),
        (5, 2, 0.06, 0, 9, 1.0, 2, [2], True),
        (6, 1, 0.01, 1, 4, 2.0, 1, [2], True),
        (850, 1, 0.01, 1, 20, 1.0, 1, [1], False),  # over a gap of more than one cell
        (0, 1, 0.01, 3, 0, 0.5, 2, [2], False),
    ],
)
def test_climbing_around_the_accepted_regions_is_enough(
    monkeypatch, seed, accepted, share, closing_radius_px, gap_px, finest_scale, levels, wanted, grows
):
    """What grows beyond the tiles that climbed first is followed; what lies elsewhere does not climb."""
    fields = {"finest_scale": finest_scale, "levels": levels, "climb": CONFIG.climb | {"xi": 0.2}}
    case = Case(seed, monkeypatch, closing_radius_px, gap_px, accepted, share, **fields)
    gated, whole, rounds = case.maps(), case.maps(), []
    climb = gated.climb
    monkeypatch.setattr(gated, "climb", lambda *given: (rounds.append(1), climb(*given)))
    found, expected = case.proposals(wanted, gated), case.proposals(wanted, whole, everywhere=True)
    for steps in wanted:
        assert told(found[steps]) == told(expected[steps]) != told(case.accepted)
    assert whole.is_climbed(16).all() and not gated.is_climbed(16).all()
    assert len(rounds) > 1 or not grows


def test_several_t_at_once_are_each_by_itself(monkeypatch):
    case = Case(3, monkeypatch, 1, 4)
    together = case.proposals([3, 0, 1])
    assert list(together) == [3, 0, 1]
    for steps in (0, 1, 3):
        assert told(together[steps]) == told(case.proposals([steps])[steps])


def test_the_threshold_acts_on_the_confidence_of_the_plain_map_s_regions(monkeypatch):
    case = Case(4, monkeypatch, gap_px=3)
    maps = case.maps()
    for core in case.cores:
        features = component_features(core.component, maps.merged(), maps.levels)
        assert core.confidence == component_confidence(features, case.config.confidence_weights)
    everything = case.proposals([2])[2]
    for threshold in sorted(core.confidence for core in case.cores)[-4:]:
        proposals = proposals_for(case.maps(), case.config, [0, 2], threshold, case.theta)
        assert len(proposals[0]) == sum(core.confidence >= threshold for core in case.cores)
        assert all(one.confidence >= threshold for one in proposals[2])
        assert len(proposals[2]) <= len(everything) or threshold < case.threshold
    assert proposals_for(case.maps(), case.config, [0, 2], 1.0, case.theta) == {0: [], 2: []}


def test_without_an_accepted_region_nothing_climbs(monkeypatch):
    case = Case(5, monkeypatch)
    monkeypatch.setattr(case.engine, "score_and_gradient", lambda images: pytest.fail("it climbed"))
    assert proposals_for(case.maps(), case.config, [8], 1.0, case.theta) == {8: []}
    assert told(case.proposals([0])[0])


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_theta_at_its_ends_is_everything_and_nothing(monkeypatch, theta):
    case = Case(6, monkeypatch)
    found = proposals_for(case.maps(), case.config, [0, 2], 0.0, theta)
    areas = {0.0: [240 * 350], 1.0: []}[theta]
    assert [[one.component.area_px for one in found[steps]] for steps in (0, 2)] == [areas, areas]


def test_steps_of_length_0_give_the_plain_map_s_proposals(monkeypatch):
    case = Case(7, monkeypatch, 2, 4, climb={"form": "local", "xi": 0.0, "g_ref": [1.0]})
    found = case.proposals([0, 1, 8])
    assert told(found[0]) == told(found[1]) == told(found[8])


def test_the_paper_s_climb_keeps_to_the_rule_too(monkeypatch):
    climb = {"form": "paper", "xi": 0.1, "penalty_weight": 0.1, "salient_share": 0.5}
    monkeypatch.setattr(SmallNetwork, "logit", lambda _, score: score.mean(dim=(1, 2)), raising=False)
    case = Case(8, monkeypatch, 1, 3, climb=climb, levels=1)
    gated, whole = case.proposals([0, 2]), case.proposals([0, 2], everywhere=True)
    assert told(gated[2]) == told(whole[2]) != told(gated[0])


def test_no_proposals_are_made_after_the_deadline(monkeypatch):
    case = Case(9, monkeypatch)
    maps = case.maps()
    maps.deadline = Deadline(0)
    with pytest.raises(TimeLimitError):
        case.proposals([2], maps)


EASY = {"min_area_px": 8, "confidence_weights": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0], "threshold": 0.65}  # much is found


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    """With real networks, small and random."""
    return Predictor(load_weights(tiny_weights(tmp_path_factory.mktemp("weights"), ("crack", "rust"), **EASY)))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return textured(60, 80)


def test_the_weights_own_values_count_where_none_are_given(predictor, photo):
    assert predictor.defects == ["crack", "rust"]
    config = predictor.weights.configs["crack"]
    found = told(predictor.propose(photo, "crack"))
    assert found == told(predictor.propose(photo, "crack", config.iterations, config.threshold, config.cam_threshold))
    plain = told(predictor.propose(photo, "crack", 0))
    assert plain and plain != found and found != told(predictor.propose(photo, "rust"))
    assert predictor.propose(photo, "crack", threshold=1.0) == []
    assert told(predictor.propose(photo, "crack", 0, cam_threshold=0.5)) != plain


def test_a_pyramid_made_once_gives_the_same(predictor, photo):
    levels = Pyramid(photo)
    for defect in predictor.defects:
        assert told(predictor.propose(levels, defect, 1)) == told(predictor.propose(photo, defect, 1))


def test_pixels_of_the_plain_maps_are_known_before(predictor):
    assert predictor.plain_pixels(130, 700, "crack") == pixels_of(predictor.maps(Pyramid(textured(130, 700)), "crack").tiles)


@pytest.mark.parametrize("height, width", [(150, 200), (300, 400)])
def test_pixels_of_a_climb_are_known_before(predictor, monkeypatch, height, width):
    """Also of the level that is added for a small photo and does not climb."""
    monkeypatch.setitem(predictor.weights.configs, "crack", replace(predictor.weights.configs["crack"], finest_scale=0.5))
    maps = predictor.maps(Pyramid(textured(height, width)), "crack")
    climbing = maps.pixels_to_climb(np.ones((1, 1), bool), width)
    assert bool(maps.climbing[maps.scales[0]]) == (width > 256) and 0 < climbing <= pixels_of(maps.tiles)
    assert predictor.pixels_with_climb(height, width, "crack", 2) == pixels_of(maps.tiles) + climb_passes(2) * climbing


def test_the_predictor_keeps_to_the_deadline(predictor, photo):
    with pytest.raises(TimeLimitError):
        predictor.propose(photo, "crack", deadline=Deadline(0))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 70), (5, 3)])
def test_the_smallest_photos_get_an_answer(predictor, height, width):
    for steps in (0, 2):
        predictor.propose(np.full((height, width, 3), 90, np.uint8), "crack", steps, 0.0, 0.0)


# Engines


def hide(monkeypatch, *names: str) -> None:
    """As if these packages were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else find(name, *more))


@pytest.fixture(scope="module")
def weights(with_graph, tmp_path_factory):
    """With a graph; every step of the climb shows."""
    climb = {"form": "local", "xi": 0.05, "g_ref": [2.0]}
    return load_weights(with_graph(tmp_path_factory.mktemp("graph"), climb=climb, gap_px=0, closing_radius_px=0))


def test_both_engines_propose_the_same(weights):
    image_rgb, _ = dark_wall([(40, 40, 18), (150, 60, 12), (120, 160, 25)], 220, 300)
    found, areas = {}, []
    for name in ENGINES:
        predictor = Predictor(weights, "cpu", name)
        assert predictor.engines["crack"].name == name
        found[name] = proposals_for(predictor.maps(Pyramid(image_rgb), "crack"), weights.configs["crack"], [0, 2, 8])
    for steps in (0, 2, 8):
        one, other = (
            sorted(found[name][steps], key=lambda proposal: proposal.component.box_xyxy[:2]) for name in ENGINES
        )
        assert len(one) == len(other) > 0
        areas.append(sum(proposal.component.area_px for proposal in one))
        for mine, theirs in zip(one, other):
            first, second = pixels_in(mine, image_rgb.shape[:2]), pixels_in(theirs, image_rgb.shape[:2])
            assert (first & second).sum() / (first | second).sum() >= 0.98
            assert mine.confidence == pytest.approx(theirs.confidence, abs=1e-3)
    assert areas[0] < areas[1] < areas[2]


PAPER = {"form": "paper", "xi": 0.1, "penalty_weight": 0.1, "salient_share": 0.5}


def test_openvino_runs_what_it_can_where_none_is_asked_for(weights, with_graph, tmp_path, monkeypatch):
    def engine_of(weights, *given):
        return Predictor(weights, *given).engines["crack"].name

    without, paper = (
        load_weights(make(tmp_path / name, **fields))
        for name, make, fields in (("without", dark_weights, {}), ("paper", with_graph, {"climb": PAPER, "levels": 1}))
    )
    assert [engine_of(one) for one in (weights, without, paper)] == ["openvino", "torch", "torch"]
    assert engine_of(weights, "cpu", "torch") == "torch"
    with pytest.raises(WeightsError, match="no graph of 'crack' .*`defectcam export --weights .*or set ADVCAM_ENGINE=torch"):
        engine_of(without, "cpu", "openvino")
    with pytest.raises(WeightsError, match="climb of 'crack' has the paper's form, which needs PyTorch: set ADVCAM_ENGINE=torch"):
        engine_of(paper, "cpu", "openvino")
    hide(monkeypatch, "openvino")
    assert engine_of(weights) == "torch"


def test_without_pytorch_weights_that_need_it_say_what_to_do(weights, tmp_path, monkeypatch):
    hide(monkeypatch, "torch")
    assert Predictor(weights).engines["crack"].name == "openvino"
    without = load_weights(dark_weights(tmp_path / "without"))
    with pytest.raises(WeightsError, match="run `defectcam export --weights .* build the CPU's image with --build-arg ENGINE="):
        Predictor(without)


def test_pytorch_s_engine_is_there_for_what_it_alone_can(weights):
    predictor = Predictor(weights)
    engine = predictor.torch_engine("crack")
    assert (engine.name, predictor.engines["crack"].name) == ("torch", "openvino")
    assert engine is predictor.torch_engine("crack"), "made once"
    predictor = Predictor(weights, "cpu", "torch")
    assert predictor.torch_engine("crack") is predictor.engines["crack"]


@pytest.mark.parametrize(
    "environ, wanted",
    [
        ({}, ("cpu", None)),
        ({"ADVCAM_DEVICE": "", "ADVCAM_ENGINE": " "}, ("cpu", None)),
        ({"ADVCAM_DEVICE": "cpu"}, ("cpu", None)),
        ({"ADVCAM_ENGINE": "torch"}, ("cpu", "torch")),
        ({"ADVCAM_ENGINE": "openvino"}, ("cpu", "openvino")),
        ({"ADVCAM_ENGINE": " torch\n", "ADVCAM_DEVICE": "cpu"}, ("cpu", "torch")),
    ],
)
def test_device_and_engine_are_the_environment_s(environ, wanted, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_and_engine(environ) == wanted


@pytest.mark.parametrize(
    "environ, wanted",
    [
        ({}, ("cuda", None)),
        ({"ADVCAM_DEVICE": "cuda", "ADVCAM_ENGINE": "torch"}, ("cuda", "torch")),
        ({"ADVCAM_DEVICE": "cpu"}, ("cpu", None)),
        ({"ADVCAM_ENGINE": "openvino"}, ("cpu", "openvino")),
    ],
)
def test_a_gpu_is_used_where_there_is_one_but_not_by_openvino(environ, wanted, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_and_engine(environ) == wanted


@pytest.mark.parametrize(
    "environ, hidden, message",
    [
        ({"ADVCAM_DEVICE": "tpu"}, (), 'ADVCAM_DEVICE is .tpu., but must be "cpu" or "cuda"'),
        ({"ADVCAM_ENGINE": "onnx"}, (), 'ADVCAM_ENGINE is .onnx., but must be "torch" or "openvino"'),
        ({"ADVCAM_DEVICE": "cuda"}, (), "ADVCAM_DEVICE is 'cuda' but torch sees no GPU; set cpu, or give the container a GPU"),
        ({"ADVCAM_ENGINE": "openvino", "ADVCAM_DEVICE": "cuda"}, (), "ADVCAM_ENGINE is 'openvino', .* ADVCAM_DEVICE .*; unset one"),
        ({"ADVCAM_ENGINE": "openvino"}, ("openvino",), "ADVCAM_ENGINE is 'openvino', but openvino is not installed; unset it"),
        ({"ADVCAM_ENGINE": "torch"}, ("torch",), "ADVCAM_ENGINE is 'torch', but torch is not installed; unset it, or install"),
        ({"ADVCAM_DEVICE": "cuda"}, ("torch",), "ADVCAM_DEVICE is 'cuda', but torch is not installed; unset it, or install it"),
    ],
)
def test_a_device_or_engine_that_cannot_be_had_names_variable_and_remedy(environ, hidden, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    hide(monkeypatch, *hidden)
    with pytest.raises(RequestError, match=message):
        device_and_engine(environ)


def test_without_pytorch_there_is_no_gpu_to_ask_for(monkeypatch):
    hide(monkeypatch, "torch")
    assert device_and_engine({}) == ("cpu", None)
