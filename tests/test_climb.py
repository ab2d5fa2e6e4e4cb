"""The climb equals its formula, written a second time here: slowly, literally, one image at a time."""

import numpy as np
import pytest
import torch

from defectcam.cam import activation
from defectcam.climb import ClimbParameters, climb
from tests.conftest import random_network

PARAMETERS = ClimbParameters(xi=0.3, penalty_weight=5.0, salient_share=0.3)


def literal_maps(network, image, steps, xi, penalty_weight, tau):
    """The formula for one image (3, H, W): features, Grad-CAM by hooks and loops, plain autograd."""

    def forward(x):
        features = network.decoder(network.encoder(x[None]))[0]  # (C, H, W)
        weights, bias = network.head.weight[0], network.head.bias[0]
        channels, height, width = features.shape
        y = bias + sum(weights[k] * features[k].sum() / (height * width) for k in range(channels))
        a = torch.clamp(sum(weights[k] * features[k] for k in range(channels)), min=0)
        return y, a

    low, high = image.min().item(), image.max().item()
    x, maps, a_first = image.clone(), [], None
    for t in range(steps + 1):
        x = x.detach().clone().requires_grad_(True)
        y, a = forward(x)
        maps.append(a.detach().clone())
        if a_first is None:
            a_first = a.detach().clone()
        if t == steps:
            break
        peak, height, width = a.detach().max().item(), *a.shape
        penalty = torch.zeros((), dtype=a.dtype)
        for row in range(height):
            for column in range(width):
                if a[row, column].item() > tau * peak:
                    penalty = penalty + (a[row, column] - a_first[row, column]).abs()
        (y - penalty_weight * penalty / (height * width)).backward()
        g = x.grad
        x = (x.detach() + xi * g / (g.abs().max() + 1e-12)).clamp(low, high)
    return torch.stack(maps)


def images_like(seed, count=2, size=(24, 28)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equals_the_literal_formula(network, steps):
    images = images_like(1)
    maps = torch.stack(list(climb(network, images, steps, PARAMETERS)))
    for index, image in enumerate(images):
        wanted = literal_maps(network, image, steps, 0.3, 5.0, 0.3)
        assert wanted.max() > 0
        torch.testing.assert_close(maps[:, index], wanted, rtol=1e-9, atol=1e-12)
    if steps:  # the climb moves and its penalty matters, or this test would show nothing
        assert not torch.allclose(maps[0], maps[-1], rtol=1e-3)
        free = torch.stack(list(climb(network, images, steps, ClimbParameters(0.3, 0.0, 0.3))))
        assert steps == 1 or not torch.allclose(maps[-1], free[-1], rtol=1e-6)


def test_no_step_is_grad_cam_by_autograd(network):
    images = images_like(2)
    features = network.decoder(network.encoder(images)).requires_grad_(True)
    y = network.head(features.mean(dim=(2, 3)))[:, 0]
    (gradient,) = torch.autograd.grad(y.sum(), features)
    grad_cam = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(1).relu()
    (plain,) = climb(network, images, 0, PARAMETERS)
    assert plain.max() > 0
    torch.testing.assert_close(plain / plain.amax((1, 2), True), grad_cam / grad_cam.amax((1, 2), True))


def test_more_steps_raise_the_logit(network):
    images = images_like(3)
    free = ClimbParameters(xi=0.05, penalty_weight=0.0, salient_share=0.5)
    means = torch.stack([a.mean(dim=(1, 2)) for a in climb(network, images, 4, free)])
    assert (means.diff(dim=0) > 0).all()


def test_does_not_depend_on_the_batch(network):
    images = images_like(4, count=3)
    images[1] *= 50  # a neighbour with other maxima
    together = torch.stack(list(climb(network, images, 2, PARAMETERS)))
    alone = torch.stack(list(climb(network, images[2:], 2, PARAMETERS)))
    torch.testing.assert_close(together[:, 2:], alone, rtol=1e-9, atol=1e-12)


def test_does_not_depend_on_threads_or_earlier_calls():
    network = random_network(dtype=torch.float32)
    images = images_like(5).float()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(torch.stack(list(climb(network, images, 2, PARAMETERS))))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4 * float(results[0].max()))


def test_leaves_network_and_image_as_they_were(network):
    images = images_like(6)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy = images.clone()
    list(climb(network, images, 3, PARAMETERS))
    assert torch.equal(images, copy)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())


def test_stays_within_the_range_of_the_image(network, monkeypatch):
    images = images_like(7)
    seen = []
    original = network.score_map
    monkeypatch.setattr(network, "score_map", lambda x: (seen.append(x.detach().clone()), original(x))[1])
    list(climb(network, images, 3, ClimbParameters(5.0, 0.0, 0.5)))
    assert len(seen) == 4
    for x in seen:
        assert (x.amin((1, 2, 3)) >= images.amin((1, 2, 3))).all()
        assert (x.amax((1, 2, 3)) <= images.amax((1, 2, 3))).all()


def test_nothing_salient_gives_zeros_not_nan(network):
    torch.nn.init.constant_(network.head.weight, -1.0)  # features are >= 0: the map is empty
    maps = torch.stack(list(climb(network, images_like(8), 2, PARAMETERS)))
    assert torch.equal(maps, torch.zeros_like(maps))


def test_training_mode_is_refused(network):
    with pytest.raises(ValueError, match="eval"):
        next(climb(network.train(), images_like(9), 1, PARAMETERS))


def test_activation_is_the_positive_part():
    assert np.array_equal(activation(torch.tensor([-2.0, 0.0, 3.0])), [0, 0, 3])
