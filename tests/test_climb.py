"""Both climbs equal their formulas, written a second time here: slowly, literally, one image at a time."""

import numpy as np
import pytest
import torch

from defectcam.climb import LocalClimb, PaperClimb
from defectcam.torch_engine import TorchEngine
from tests.conftest import random_network
from tests.test_engine import images_like

LOCAL = LocalClimb(xi=0.1, g_ref=5.0)
PAPER = PaperClimb(xi=0.3, penalty_weight=5.0, salient_share=0.3)
both = pytest.mark.parametrize("climb", [LOCAL, PAPER], ids=["local", "paper"])


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(random_network())


def maps_of(climb, engine, images, steps) -> np.ndarray:
    """M_0 .. M_steps, (steps + 1, N, H, W)."""
    return np.stack(list(climb.maps(engine, images, steps)))


def score_of(network, image):
    """S (H, W) of one image (3, H, W): features, then the head's weights channel by channel."""
    features = network.decoder(network.encoder((image * network.scale_rgb[0] + network.shift_rgb[0])[None]))[0]
    return network.head.bias[0] + sum(w * one for w, one in zip(network.head.weight[0], features))


def literal_local(network, image, steps, xi, g_ref):
    """The maps M_0 .. M_steps of one image (3, H, W), as the local climb's formula says."""
    x, scores = image.clone(), []
    for _ in range(steps + 1):
        x = x.detach().clone().requires_grad_(True)
        s = score_of(network, x)
        scores.append(s.detach())
        weights = 1 / (1 + torch.exp(-s.detach()))
        (weights * s).sum().backward()
        x = torch.clip(x.detach() + xi * torch.clip(x.grad / g_ref, -1, 1), -1, 1)
    return torch.stack([torch.stack(scores[: t + 1]).sum(0) / (t + 1) for t in range(steps + 1)]).numpy()


def literal_paper(network, image, steps, xi, penalty_weight, tau):
    """The maps M_0 .. M_steps of one image (3, H, W), as the paper's formula says."""
    low, high = image.min().item(), image.max().item()
    x, activations = image.clone(), []
    for _ in range(steps + 1):
        x = x.detach().clone().requires_grad_(True)
        s = score_of(network, x)
        y, a = s.mean(), torch.clip(s - network.head.bias[0], min=0)
        activations.append(a.detach())
        peak, penalty = a.max().item(), 0.0
        for row, column in (a.detach() > tau * peak).nonzero().tolist():
            penalty = penalty + (a[row, column] - activations[0][row, column]).abs()
        (y - penalty_weight * penalty / a.numel()).backward()
        x = (x.detach() + xi * x.grad / (x.grad.abs().max() + 1e-12)).clamp(low, high)
    return torch.stack([torch.stack(activations[: t + 1]).sum(0) / (t + 1) for t in range(steps + 1)]).numpy()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_local_climb_equals_the_literal_formula(engine, steps):
    images = images_like(1)
    maps = maps_of(LOCAL, engine, images, steps)
    for index, image in enumerate(images):
        wanted = literal_local(random_network(), torch.from_numpy(image).double(), steps, LOCAL.xi, LOCAL.g_ref)
        np.testing.assert_allclose(maps[:, index], wanted, rtol=1e-4, atol=1e-4)
    if steps:  # the climb moves and clamping matters, or this test would show nothing
        assert np.abs(maps[0] - maps[-1]).mean() > 0.1
        score, gradient = engine.score_and_gradient(images)
        assert 0.01 < (np.abs(gradient) > LOCAL.g_ref).mean() < 0.5


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_paper_s_climb_equals_the_literal_formula(engine, steps):
    images = images_like(1)
    maps = maps_of(PAPER, engine, images, steps)
    arguments = steps, PAPER.xi, PAPER.penalty_weight, PAPER.salient_share
    for index, image in enumerate(images):
        wanted = literal_paper(random_network(), torch.from_numpy(image).double(), *arguments)
        assert wanted.max() > 1
        np.testing.assert_allclose(maps[:, index], wanted, rtol=1e-5, atol=1e-6)
    if steps:
        assert not np.allclose(maps[0], maps[-1], rtol=1e-2)
        free = maps_of(PaperClimb(PAPER.xi, 0.0, PAPER.salient_share), engine, images, steps)
        assert steps == 1 or not np.allclose(maps[-1], free[-1], rtol=1e-3)


def test_the_paper_s_map_without_a_step_is_grad_cam_by_autograd(engine):
    images = images_like(2)
    network = random_network()
    x = torch.from_numpy(images).double() * network.scale_rgb + network.shift_rgb
    features = network.decoder(network.encoder(x)).requires_grad_(True)
    y = network.head(features.mean(dim=(2, 3)))[:, 0]
    (gradient,) = torch.autograd.grad(y.sum(), features)
    grad_cam = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(1).relu().detach().numpy()
    (plain,) = PAPER.maps(engine, images, 0)
    assert plain.max() > 1 and (plain == 0).any()
    factors = plain[grad_cam > 0] / grad_cam[grad_cam > 0]
    np.testing.assert_allclose(factors, factors[0], rtol=1e-3)
    assert factors[0] > 0 and not plain[grad_cam == 0].any()


def test_a_climb_raises_what_it_follows(engine):
    images = images_like(3)
    logits = maps_of(PaperClimb(0.02, 0.0, 0.5), engine, images, 4).mean(axis=(2, 3))
    assert (np.diff(logits, axis=0) > 0).all()
    scores = maps_of(LocalClimb(0.02, 20.0), engine, images, 4)
    assert (np.diff((scores * (scores > 0)).sum(axis=(2, 3)), axis=0) > 0).all()


@both
@pytest.mark.parametrize("steps", [1, 3])
def test_without_steps_to_take_every_t_has_the_plain_map(engine, climb, steps):
    images = images_like(4)
    (plain,) = climb.maps(engine, images, 0)
    parts = {name: value for name, value in vars(climb).items() if name != "xi"}
    for one in type(climb)(xi=0.0, **parts).maps(engine, images, steps):
        np.testing.assert_array_equal(one, plain)


@both
def test_the_maps_on_the_way_are_those_of_fewer_steps(engine, climb):
    images = images_like(5)
    np.testing.assert_array_equal(maps_of(climb, engine, images, 3)[:2], maps_of(climb, engine, images, 1))


@both
def test_the_batch_does_not_matter(engine, climb):
    images = images_like(6, count=3)
    images[1] *= 0.01  # a neighbour with other maxima
    together, alone = maps_of(climb, engine, images, 2), maps_of(climb, engine, images[2:], 2)
    np.testing.assert_allclose(together[:, 2:], alone, rtol=1e-5, atol=1e-5)


@both
def test_threads_and_earlier_calls_do_not_matter(climb):
    engine = TorchEngine(random_network(dtype=torch.float32))
    images, threads = images_like(7), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(maps_of(climb, engine, images, 2))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-3 * np.abs(results[0]).max())


@both
def test_network_and_images_stay_as_they_were(engine, climb):
    images = images_like(8)
    before = {name: value.clone() for name, value in engine.network.state_dict().items()}
    copy = images.copy()
    maps = maps_of(climb, engine, images, 3)
    np.testing.assert_array_equal(images, copy)
    for name, value in engine.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in engine.network.parameters())
    assert maps.dtype == np.float32 and len({one.tobytes() for one in maps}) == 4  # none is written over


@pytest.mark.parametrize("climb, low, high", [(LocalClimb(0.5, 1.0), -1, 1), (PaperClimb(2.0, 0.0, 0.5), -0.5, 0.25)])
def test_images_stay_in_their_range_and_reach_its_ends(engine, monkeypatch, climb, low, high):
    images = np.clip(images_like(9), -0.5, 0.25)
    seen, original = [], engine.network.score_map
    monkeypatch.setattr(engine.network, "score_map", lambda x: (seen.append(x.detach().clone()), original(x))[1])
    maps_of(climb, engine, images, 3)
    assert len(seen) == 4
    for x in seen:
        assert x.min() >= low and x.max() <= high
    assert seen[-1].min() == low and seen[-1].max() == high
    if isinstance(climb, LocalClimb):
        assert all((one - other).abs().max() <= 0.5 + 1e-6 for one, other in zip(seen, seen[1:]))


def test_where_nothing_is_salient_the_paper_s_map_is_zero_not_nan():
    network = random_network()
    network.head.weight.fill_(-1.0)  # features are >= 0: the map is empty
    maps = maps_of(PAPER, TorchEngine(network), images_like(10), 2)
    np.testing.assert_array_equal(maps, np.zeros_like(maps))
