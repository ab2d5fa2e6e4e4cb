"""A network as a graph for OpenVINO: score map and gradient in one ONNX file, for images of any size.

The graph has the input `images` (1, 3, H, W), H and W multiples of the network's stride, and two outputs: the score map
S (1, H, W) and the gradient (1, 3, H, W) of sum(sg(sigmoid(S)) * S) towards the image. It is the traced backward pass of
the network as it is used, BatchNorms folded. What ONNX has no word for is replaced by what it comes to: the gradient of a
convolution by a convolution, that of an activation by a mask.

Only EfficientNet-Lite0: ResNet34's max pooling has no such replacement, so PyTorch runs it.

Example:
    defectcam export --weights weights
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from defectcam.command_line import command_parser
from defectcam.network import ScoreNet, fold_batchnorm, fold_upsampling
from defectcam.openvino_engine import OpenVinoEngine
from defectcam.torch_engine import TorchEngine
from defectcam.weights import DefectConfig, WeightsError, load_tensors, read_manifest, write_manifest

aten = torch.ops.aten
ENCODERS_WITH_GRAPH = ("efficientnet-lite0",)
TRACED_PX = (256, 384)  # any multiples of the stride: the graph is for all
MOST_CELLS = 512  # of the stride, per side
OPSET = 18
SAME_LOGIT = 1e-4
SAME_GRADIENT = 1e-2  # of the largest; a pixel at a kink of an activation may fall on either side


class TransposedBlock(nn.Module):
    """A decoder's block whose doubling and first convolution are one transposed convolution.

    PyTorch is faster with `DoublingBlock`, compiled graphs are with this.

    Args:
        block: of segmentation-models-pytorch, without BatchNorms.
        channels: of the map that is doubled.
    """

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        conv, *rest = block.conv1
        self.after = nn.Sequential(*rest, block.conv2, block.attention2)
        self.bias, self.skip_weight = conv.bias, conv.weight[:, channels:].clone()
        # A pixel becomes 2 x 2 of them, and each of these reaches the 3 x 3 around it: 4 x 4 in all.
        around = conv.weight[:, :channels].flip(2, 3).transpose(0, 1)
        self.weight = torch.zeros(*around.shape[:2], 4, 4)
        for row in (0, 1):
            for column in (0, 1):
                self.weight[:, :, row : row + 3, column : column + 3] += around

    def forward(self, feature_map: Tensor, _height: int, _width: int, skip_connection: Tensor | None = None) -> Tensor:
        """The block's output; maps (N, C, H, W)."""
        doubled = nn.functional.conv_transpose2d(feature_map, self.weight, stride=2, padding=1)
        if skip_connection is None:
            return self.after(doubled + self.bias[:, None, None])
        return self.after(doubled + nn.functional.conv2d(skip_connection, self.skip_weight, self.bias, padding=1))


class PaddedConv(nn.Module):
    """A convolution of stride 2 whose padding TensorFlow's rule would compute anew from every image's size.

    On even sizes it is always the same.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        padding = conv.kernel_size[0] - conv.stride[0]
        self.padding = (padding // 2, padding - padding // 2) * 2

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        padded, conv = nn.functional.pad(images, self.padding), self.conv
        return nn.functional.conv2d(padded, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def _convolution_backward(
    gradient, images, weight, _bias, stride, padding, dilation, transposed, _output_padding, groups, _wanted
):
    """Towards the images alone: weights do not climb.

    A transposed convolution of stride 1 is written as the convolution it is: faster, and one compiler gets it wrong.
    """
    if transposed:
        if weight.shape[0] == weight.shape[1]:
            # OpenVINO would mistake it for the forward pass's weight, which has its channels the other way round: same
            # shape, same numbers. A column of zeros makes it another one.
            weight = aten.cat([aten.zeros_like(weight[..., :1]), weight], 3)
            padding = [padding[0], padding[1] + 1]
        inwards = aten.convolution(gradient, weight, None, stride, padding, dilation, False, [0, 0], groups)
    elif stride[0] == 1:
        turned = weight.flip([2, 3]) if groups > 1 else weight.flip([2, 3]).transpose(0, 1)
        rest = [size - 1 - pad for size, pad in zip(weight.shape[2:], padding)]
        inwards = aten.convolution(gradient, turned, None, stride, rest, dilation, False, [0, 0], groups)
    else:
        inwards = aten.convolution(gradient, weight, None, stride, padding, dilation, True, [0, 0], groups)
    return inwards, None, None


def _padded(images, padding, value=0.0):
    """The backward pass of padding is padding by less than nothing: a cut."""
    if not all(number <= 0 for number in padding):
        return NotImplemented
    left, right, top, bottom = (-number for number in padding)
    rows = aten.slice(images, 2, top, images.shape[2] - bottom)
    return aten.slice(rows, 3, left, images.shape[3] - right)


DECOMPOSITIONS = {
    aten.convolution_backward.default: _convolution_backward,
    aten.constant_pad_nd.default: _padded,
    aten.hardtanh_backward.default: lambda gradient, before, low, high: (
        gradient * (before > low).to(gradient.dtype) * (before < high).to(gradient.dtype)
    ),
    aten.threshold_backward.default: lambda gradient, after, least: gradient * (after > least).to(gradient.dtype),
}


def graph_of(network: ScoreNet) -> bytes:
    """The ONNX file of a network.

    Args:
        network: in eval mode, not folded, on the CPU; left as it is.

    Raises:
        ValueError: an encoder without a graph.
        RuntimeError: the graph's maps or gradients are not the network's.
    """
    if network.encoder_name not in ENCODERS_WITH_GRAPH:
        raise ValueError(f"{network.encoder_name} has no graph, only {', '.join(ENCODERS_WITH_GRAPH)}")
    folded = fold_batchnorm(copy.deepcopy(network).float().requires_grad_(False).eval())
    reference = TorchEngine(fold_upsampling(copy.deepcopy(folded)))
    graph = _exported(folded)
    _compare(OpenVinoEngine(graph, network.stride_px, network.halo_px), reference)
    return graph


def _exported(network: ScoreNet) -> bytes:
    """The ONNX file of a folded network, which is changed."""
    skipped = [*network.encoder.out_channels[-2:0:-1], 0]  # the last block has no skip connection
    for index, (block, channels) in enumerate(zip(network.decoder.blocks, skipped, strict=True)):
        network.decoder.blocks[index] = TransposedBlock(block, block.conv1[0].in_channels - channels)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride[0] == 2:
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, PaddedConv(module))
        if hasattr(module, "inplace"):
            module.inplace = False  # what the backward pass looks at must be there still

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.detach().requires_grad_(True)
        score = network.score_map(images)
        (gradient,) = torch.autograd.grad(score, images, score.detach().sigmoid())
        return score.detach(), gradient

    images, stride = torch.zeros(1, 3, *TRACED_PX), network.stride_px
    with torch.enable_grad():
        traced = make_fx(both, decomposition_table=DECOMPOSITIONS, tracing_mode="symbolic", _allow_non_fake_inputs=True)(images)

    class Traced(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return traced(images)

    rows, columns = (torch.export.Dim(name, min=2, max=MOST_CELLS) for name in ("rows", "columns"))
    sizes = {"images": {2: stride * rows, 3: stride * columns}}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.export.export(Traced(), (images,), dynamic_shapes=sizes, strict=False)
        path = Path(folder) / "graph.onnx"
        # Not optimised: that would store the turned weights of the backward pass beside those they are turned from.
        torch.onnx.export(program, (images,), dynamo=True, opset_version=OPSET, verbose=False, optimize=False).save(path)
        return _without_traces(_without_copies(onnx.load(path))).SerializeToString()


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the exporter's own notes, a tenth of the file with paths of this machine. It is changed."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    return model


def _without_copies(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, with every tensor stored once: both passes have their own copy of the weights. It is changed."""
    first: dict[tuple, str] = {}
    same = {}
    for tensor in list(model.graph.initializer):
        content = tuple(tensor.dims), tensor.data_type, tensor.raw_data
        if content not in first:
            first[content] = tensor.name
            continue
        same[tensor.name] = first[content]
        model.graph.initializer.remove(tensor)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
    for known in list(model.graph.value_info):
        if known.name in same:
            model.graph.value_info.remove(known)
    return model


def _compare(engine: OpenVinoEngine, reference: TorchEngine) -> None:
    """RuntimeError where an engine's maps or gradients are not those of the reference, at two sizes."""
    rng = np.random.default_rng(0)
    for height, width in ((8, 6), (6, 12)):
        size = height * engine.stride_px, width * engine.stride_px
        images = rng.uniform(-1, 1, (1, 3, *size)).astype(np.float32)
        (score, gradient), (wanted_score, wanted_gradient) = (one.score_and_gradient(images) for one in (engine, reference))
        off_score = float(np.abs(score - wanted_score).max() / max(1.0, np.abs(wanted_score).max()))
        off = np.abs(gradient - wanted_gradient) > SAME_GRADIENT * np.abs(wanted_gradient).max()
        if off_score > SAME_LOGIT or off.mean() > SAME_GRADIENT:
            raise RuntimeError(
                f"the graph is not the network: maps differ by {off_score:.2g}, gradients at {off.mean():.0%} of the pixels"
            )


def add_graph(folder: Path, config: DefectConfig) -> str:
    """Write the graph of a defect beside its tensors; returns the file's name, "" where its encoder has no graph.

    Raises:
        WeightsError: for tensors that do not fit the manifest.
    """
    network = config.build_network().eval()
    path = folder / config.file
    load_tensors(network, path, config.sha256)
    if config.encoder not in ENCODERS_WITH_GRAPH:
        return ""
    graph = path.with_suffix(".onnx")
    graph.write_bytes(graph_of(network))
    return graph.name


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam export`."""
    parser = command_parser("export", __doc__)
    parser.add_argument("--weights", type=Path, required=True, help="a weights folder; its manifest gets a new version")
    args = parser.parse_args(argv)
    try:
        _, configs = read_manifest(args.weights)
        path = args.weights / "manifest.json"
        manifest = json.loads(path.read_text())
        for defect, config in configs.items():
            print(f"{defect}: exporting, about 20 s", flush=True)
            graph = add_graph(args.weights, config)
            if graph:
                manifest["defects"][defect]["graph"] = graph
            else:
                print(f"{defect}: {config.encoder} has no graph, PyTorch runs it")
        version = write_manifest(args.weights, manifest["defects"], manifest.get("parent"))
        print(f"written: {path}, version {version}")
    except (WeightsError, ValueError) as error:
        sys.exit(str(error))
