"""The architecture keeps its promises: resolution, size, reach, and no dead layers."""

import copy

import pytest
import torch

from defectcam.climb import ClimbParameters, climb
from defectcam.network import DefectNet, _Interleave, fold_batchnorm, fold_upsampling
from defectcam.weights import load_weights
from tests.conftest import ROOT, random_network


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
@pytest.mark.parametrize("height, width", [(1, 1), (5, 3), (64, 64), (101, 77)])
def test_score_map_has_the_input_size(downsamplings, height, width):
    network = random_network(downsamplings=downsamplings)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    assert network.score_map(images).shape == (2, height, width)


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
def test_halo_covers_the_reach_of_every_pixel(downsamplings):
    network = random_network(downsamplings=downsamplings)
    size = 2 * network.halo_px + 40
    assert network.halo_px % network.stride_px == network.climb_halo_px % network.stride_px == 0
    assert network.halo_px / 2 <= network.climb_halo_px < network.halo_px / 2 + network.stride_px
    images = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    score = network.score_map(images)
    centre = size // 2
    for y, x in [(centre, centre), (centre + 1, centre + 3), (centre + 2, centre + 1)]:  # phases of the stride
        (gradient,) = torch.autograd.grad(score[0, y, x], images, retain_graph=True)
        ys, xs = gradient[0].abs().sum(0).nonzero(as_tuple=True)
        reach = max(y - ys.min(), ys.max() - y, x - xs.min(), xs.max() - x)
        assert 0 < reach <= network.halo_px


@pytest.mark.parametrize("defect", ["crack", "spalling", "rust"])
def test_what_lies_beyond_half_the_halo_hardly_counts(defect):
    network = load_weights(ROOT / "weights", "cpu").networks[defect].double()
    images = torch.randn(1, 3, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(network.score_map(images)[0, 100, 101], images)
    influence, halo = gradient[0].abs().sum(0), network.climb_halo_px
    near = influence[100 - halo : 101 + halo, 101 - halo : 102 + halo].sum()
    assert 0 < 1 - near / influence.sum() < 0.05


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (1, 4, 2, 2)])
def test_interleaving_is_every_second_row_and_column_and_has_its_gradient(shape):
    coarse = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    doubled, phases = _Interleave.apply(coarse), coarse.unflatten(1, (2, 2, -1))
    for y, x in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        part = phases[:, y, x, :, y : shape[2] - 1 + y, x : shape[3] - 1 + x]
        torch.testing.assert_close(doubled[:, :, y::2, x::2], part)
    assert torch.autograd.gradcheck(_Interleave.apply, coarse)


def test_every_parameter_is_used():
    network = DefectNet().train()
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == []
    assert sum(parameter.numel() for parameter in network.parameters()) < 2e6


def test_logit_is_the_mean_of_the_score_map_plus_bias_and_equals_pooling_then_linear():
    network = random_network()
    images = torch.randn(3, 3, 40, 52, dtype=torch.float64)
    features = network.decoder(network.encoder(images))
    pooled = network.head(features.mean(dim=(2, 3)))[:, 0]
    torch.testing.assert_close(network(images), pooled)


@pytest.mark.parametrize("arguments", [{"downsamplings": 4}, {"decoder_channels": (8, 8)}])
def test_impossible_architectures_are_refused(arguments):
    with pytest.raises(ValueError, match="downsamplings|decoder_channels"):
        DefectNet(**arguments)


def test_paper_stride():
    assert DefectNet().encoder.conv1.stride == (1, 1)


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
@pytest.mark.parametrize("size", [(64, 96), (67, 90), (1, 5)])  # odd sizes are not doubled exactly
def test_a_folded_network_is_the_same_function(downsamplings, size):
    network = random_network(downsamplings=downsamplings)
    folded = fold_upsampling(fold_batchnorm(copy.deepcopy(network)))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = network.normalise(torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)))
    plain, fast = network.score_map(images), folded.score_map(images)
    assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max()
    parameters = ClimbParameters(xi=0.08, penalty_weight=7.0, salient_share=0.5)
    for one, other in zip(climb(network, images, 2, parameters), climb(folded, images, 2, parameters)):
        assert (one - other).abs().max() <= 1e-3 * one.max()


def test_a_network_in_training_is_not_folded():
    with pytest.raises(ValueError, match="eval"):
        fold_batchnorm(DefectNet().train())
