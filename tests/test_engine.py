"""The engine gives the network's own score map and the gradient of the gain as it is written."""


import numpy as np
import pytest
import torch

from defectcam.torch_engine import TorchEngine
from tests.conftest import answers_of_threads, random_network


def images_like(seed: int, count: int = 2, height: int = 24, width: int = 32) -> np.ndarray:
    """Random images (N, 3, H, W) float32 in -1..1."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, height, width)).astype(np.float32)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(random_network())


def test_score_is_the_network_s_map_with_the_head_s_bias(engine):
    images = images_like(0)
    network = random_network()
    x = torch.from_numpy(images).double()
    features = network.decoder(network.encoder(x * network.scale_rgb + network.shift_rgb))
    wanted = torch.einsum("c,nchw->nhw", network.head.weight[0], features) + network.head.bias
    score = engine.score(images)
    assert score.dtype == np.float32 and score.shape == (2, 24, 32)
    np.testing.assert_allclose(score, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert (engine.stride_px, engine.halo_px) == (network.stride_px, network.halo_px)


def test_gradient_is_that_of_the_gain_as_it_is_written(engine):
    images = images_like(1)
    x = torch.from_numpy(images).double().requires_grad_()
    score = random_network().score_map(x)
    constant = 1 / (1 + np.exp(-score.detach().numpy()))
    (wanted,) = torch.autograd.grad((torch.from_numpy(constant) * score).sum(), x)
    found_score, found = engine.score_and_gradient(images)
    assert found.dtype == np.float32 and found.shape == images.shape
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    np.testing.assert_array_equal(found_score, engine.score(images))


def test_images_of_a_batch_do_not_know_each_other(engine):
    images = images_like(2, count=3)
    together = engine.score_and_gradient(images)
    for index in range(3):
        alone = engine.score_and_gradient(images[index : index + 1])
        for one, other in zip(together, alone):
            np.testing.assert_allclose(one[index], other[0], rtol=1e-5, atol=1e-6 * np.abs(one).max())


def test_a_batch_too_large_for_the_memory_is_halved_and_stays_so(engine, monkeypatch):
    """The real network with a limit of its own, since only a GPU raises this error."""
    small, images, tried = TorchEngine(random_network()), images_like(5, count=7), []
    real = small.network.score_map

    def limited(tensor: torch.Tensor) -> torch.Tensor:
        tried.append(len(tensor))
        if len(tensor) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor)

    monkeypatch.setattr(small.network, "score_map", limited)
    for found, wanted in zip(small.score_and_gradient(images), engine.score_and_gradient(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    tried.clear()
    np.testing.assert_allclose(small.score(images), engine.score(images), rtol=1e-5, atol=1e-5)
    assert max(tried) == 1
    monkeypatch.setattr(small.network, "score_map", lambda tensor: limited(tensor.expand(3, -1, -1, -1)))
    with pytest.raises(torch.OutOfMemoryError):
        small.score(images)


def test_several_threads_and_earlier_calls_change_nothing():
    engine = TorchEngine(random_network(dtype=torch.float32))
    images = [images_like(seed, height=32 + 16 * (seed % 2)) for seed in range(6)]
    alone = [engine.score_and_gradient(one) for one in images]
    for wanted, found in zip(alone, answers_of_threads(engine, images), strict=True):
        for one, other in zip(found, wanted):
            np.testing.assert_array_equal(one, other)


def test_network_and_images_stay_as_they_were(engine):
    images = images_like(3)
    before = {name: value.clone() for name, value in engine.network.state_dict().items()}
    copy = images.copy()
    engine.score_and_gradient(images)
    engine.score(images)
    np.testing.assert_array_equal(images, copy)
    for name, value in engine.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(one.grad is None and not one.requires_grad for one in engine.network.parameters())


def test_a_network_in_training_is_refused():
    with pytest.raises(ValueError, match="eval"):
        TorchEngine(random_network().train())
