"""The architecture keeps its promises: resolution, reach, pooling, no dead layers, and the same function when folded."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from defectcam.encoders import ENCODERS, normalised
from defectcam.network import ScoreNet, _Interleave, fold_batchnorm, fold_upsampling
from tests.conftest import random_network

KINDS = [("resnet34", 1), ("resnet34", 2), ("resnet34", 3), ("efficientnet-lite0", 4)]
every_kind = pytest.mark.parametrize("encoder, downsamplings", KINDS)


def images_like(seed: int, *size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random images in -1..1 of such a size (N, 3, H, W)."""
    return 2 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1


@every_kind
def test_score_map_has_the_input_size_and_other_sizes_are_refused(encoder, downsamplings):
    network = random_network(downsamplings=downsamplings, encoder=encoder)
    stride = network.stride_px
    assert stride == 2**downsamplings
    for height, width in [(stride, stride), (3 * stride, 5 * stride)]:
        assert network.score_map(images_like(0, 2, 3, height, width)).shape == (2, height, width)
    for height, width in [(4 * stride - 1, 4 * stride), (4 * stride, 4 * stride + 1)]:
        with pytest.raises(ValueError, match=f"{height} x {width} px: both must be multiples of {stride}"):
            network.score_map(images_like(0, 1, 3, height, width))


@every_kind
def test_reach_is_what_the_gradient_says(encoder, downsamplings):
    network = random_network(downsamplings=downsamplings, encoder=encoder)
    stride, reach = network.stride_px, network.reach_px
    assert network.halo_px % stride == 0 and network.halo_px == min(-(-reach // stride) * stride, 64)
    centre = -(-reach // stride) * stride + stride
    seen = set()
    for turned in (False, True):  # a narrow strip shows the reach along it
        images = images_like(0, 1, 3, stride, 2 * centre)
        images = (images.transpose(2, 3) if turned else images).requires_grad_()
        score = network.score_map(images)
        for phase in range(stride):
            pixels = score[0, centre + phase] if turned else score[0, :, centre + phase]
            (gradient,) = torch.autograd.grad(pixels.sum(), images, retain_graph=True)
            along = gradient[0].abs().sum(dim=(0, 2 if turned else 1)).nonzero()[:, 0] - centre - phase
            seen |= {-int(along.min()), int(along.max())}
    assert 0.85 * reach < max(seen) <= reach


@every_kind
def test_every_parameter_is_used(encoder, downsamplings):
    network = random_network(downsamplings=downsamplings, encoder=encoder).requires_grad_(True)
    network(images_like(0, 2, 3, 32, 32)).sum().backward()
    assert [name for name, one in network.named_parameters() if one.grad is None or not one.grad.any()] == []


def test_the_paper_s_network_is_the_default():
    network = ScoreNet()
    assert network.encoder.conv1.stride == (1, 1) and network.stride_px == 4 and network.pooling == "average"
    assert sum(parameter.numel() for parameter in network.parameters()) < 2e6


@every_kind
def test_images_reach_the_encoder_as_its_weights_expect_them(encoder, downsamplings):
    network = random_network(downsamplings=downsamplings, encoder=encoder)
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images_rgb = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    network.score_map(normalised(images_rgb).double())
    mean, std = (torch.tensor(one)[:, None, None] for one in (ENCODERS[encoder].mean_rgb, ENCODERS[encoder].std_rgb))
    torch.testing.assert_close(seen[0][0].float(), (images_rgb[0] / 255 - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_normalised_is_minus_one_to_one(kind):
    found = normalised(kind(np.array([0, 51, 255], np.uint8)))
    assert str(found.dtype).endswith("float32") and np.allclose(found, [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize("size", [(32, 48), (16, 16)])
@every_kind
def test_a_folded_network_is_the_same_function(encoder, downsamplings, size):
    network = random_network(downsamplings=downsamplings, encoder=encoder)
    folded = fold_upsampling(fold_batchnorm(copy.deepcopy(network)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = images_like(1, 2, 3, *size).requires_grad_()
    plain, fast = network.score_map(images), folded.score_map(images)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(score.square().sum(), images)[0] for score in (plain, fast)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9 * float(gradients[0].abs().max()))


def test_a_network_in_training_is_not_folded():
    with pytest.raises(ValueError, match="eval"):
        fold_batchnorm(ScoreNet().train())


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (1, 4, 2, 2)])
def test_interleaving_is_every_second_row_and_column_and_has_its_gradient(shape):
    coarse = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    doubled, phases = _Interleave.apply(coarse), coarse.unflatten(1, (2, 2, -1))
    for y, x in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        part = phases[:, y, x, :, y : shape[2] - 1 + y, x : shape[3] - 1 + x]
        torch.testing.assert_close(doubled[:, :, y::2, x::2], part)
    assert torch.autograd.gradcheck(_Interleave.apply, coarse)


def test_average_pooling_is_the_mean_and_equals_pooling_then_linear():
    network = random_network()
    images = images_like(2, 3, 3, 40, 52)
    features = network.decoder(network.encoder(images * network.scale_rgb + network.shift_rgb))
    torch.testing.assert_close(network(images), network.head(features.mean(dim=(2, 3)))[:, 0])
    torch.testing.assert_close(network(images), network.score_map(images).mean(dim=(1, 2)))


def test_log_mean_exp_pooling_is_its_formula():
    network = random_network(pooling="log-mean-exp")
    score = torch.randn(3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = np.log(np.exp(4.0 * score.numpy()).mean(axis=(1, 2))) / 4.0
    np.testing.assert_allclose(network.logit(score).numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(network.logit(score + 1000).numpy(), wanted + 1000, rtol=1e-12)  # without overflow
    # A defect that covers a hundredth of the image still decides.
    score = torch.full((1, 100, 100), -5.0)
    score[0, :10, :10] = 5.0
    assert network.logit(score) > 3 and random_network().logit(score) < -4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"encoder": "vgg16"}, "encoder must be one of resnet34, efficientnet-lite0, not 'vgg16'"),
        ({"pooling": "max"}, "pooling must be one of average, log-mean-exp, not 'max'"),
        ({"downsamplings": 4}, "downsamplings of resnet34 must be 1 or 2 or 3, not 4"),
        ({"encoder": "efficientnet-lite0", "downsamplings": 2}, "downsamplings of efficientnet-lite0 must be 4, not 2"),
        ({"decoder_channels": (8, 9)}, r"decoder_channels needs 3 numbers for 2 down-samplings of resnet34, not \(8, 9\)"),
    ],
)
def test_impossible_architectures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreNet(**arguments)
