"""Weights of all defects: a manifest that says what they are and how to use them, and two files for each.

    weights/manifest.json           {"version", "defects": {<defect>: {...}}}, the fields of `DefectConfig`
    weights/<defect>.safetensors    the network's tensors, for PyTorch
    weights/<defect>.onnx           the same network and its gradient as a graph, for OpenVINO; not of every encoder

Nothing else in the folder is looked at, such as the picture <defect>-reliability.png that calibration writes.

Loading verifies before it trusts: checksums, names and shapes of all tensors, finite values. Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from defectcam.climb import Climb, LocalClimb, PaperClimb
from defectcam.encoders import check_architecture
from defectcam.licences import check_licences, licences_of, strictest
from defectcam.paths import file_name
from defectcam.postprocess import Cleaning
from defectcam.proposals import FEATURES, logit
from defectcam.pyramid import FINEST_SCALES, Reading
from defectcam.settings import read_variable
from defectcam.validation import STRICT, first_problem

if TYPE_CHECKING:
    from defectcam.network import ScoreNet

REMEDY = "take the weights folder as it was published, or deploy another version"
TORCH_REMEDY = "set ADVCAM_ENGINE=torch, and build the CPU's image with --build-arg ENGINE=torch"


class WeightsError(RuntimeError):
    """Weights that must not be used; the message names the file, the reason and what to do."""


def _without_folders(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"must be a name without folders, not {name!r}")
    return name


FileName = Annotated[str, AfterValidator(_without_folders)]
Share = Annotated[float, Field(ge=0, le=1)]
Constant = Annotated[float, Field(ge=-1e6, le=1e6)]


def climbs_of(climb: dict) -> tuple[Climb | None, ...]:
    """The climb of each level, from the manifest's `climb`; None of a level that does not climb.

    Raises:
        ValueError: naming what does not fit.
    """
    match climb:
        case {"form": "local", "xi": xi, "g_ref": [*levels], **others} if any(levels) and not others:
            return tuple(None if g_ref is None else LocalClimb(xi=xi, g_ref=g_ref) for g_ref in levels)
        case {"form": "paper", **constants}:
            return (PaperClimb(**constants),)
    raise ValueError(
        "must have form 'local' with xi and g_ref, a list with a number for at least one level, or form 'paper' with xi, "
        f"penalty_weight and salient_share, not {climb!r:.200}"
    )


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class DefectConfig:
    """What the manifest says of one defect; every constant was chosen on validation photos.

    Attributes:
        file, sha256: the safetensors file beside the manifest and its checksum.
        encoder, decoder_channels, downsamplings, pooling: the network, see `ScoreNet`.
        finest_scale, levels, sharpness: how it reads the pyramid, see `Reading`.
        climb: {"form": "local", "xi", "g_ref": one per level, the last for all coarser ones, None of levels that do
            not climb} or {"form": "paper", "xi", "penalty_weight", "salient_share"}, see `defectcam.climb`.
        platt: (a, c), the probability of a pixel is sigmoid(a * M + c), M the merged map.
        cam_threshold: theta, the probability above which a pixel counts.
        closing_radius_px, gap_px, min_area_px: see `Cleaning`.
        confidence_weights: see `component_confidence`.
        threshold: minimum confidence of a proposal, 0..1.
        iterations: T where the request, the task and the deployment do not set it.
        tolerance_px, hole_share: polygon simplification, see `polygons`.
        training: the record of how the weights were made; its `licences` are those of the data sets.
        graph, graph_sha256: the ONNX file beside the manifest and its checksum; empty where there is none.
    """

    file: FileName
    sha256: str
    encoder: str
    decoder_channels: tuple[Annotated[int, Field(ge=1, le=4096)], ...]
    downsamplings: int
    pooling: str
    finest_scale: float
    levels: Annotated[int, Field(ge=1, le=16)]
    sharpness: Annotated[float, Field(ge=0.1, le=4)]
    climb: Annotated[dict, AfterValidator(lambda climb: climbs_of(climb) and climb)]
    platt: tuple[Annotated[float, Field(gt=0, le=1e6)], Constant]
    cam_threshold: Share
    closing_radius_px: Annotated[int, Field(ge=0, le=1000)]
    gap_px: Annotated[int, Field(ge=0, le=100)]
    min_area_px: Annotated[int, Field(ge=0, le=10**9)]
    confidence_weights: tuple[Constant, ...]
    threshold: Share
    iterations: Annotated[int, Field(ge=0, le=50)]
    tolerance_px: Annotated[float, Field(ge=1, le=20)]  # unasked for, no annotator gets an outline full of dots
    hole_share: Share
    training: dict
    graph: FileName = ""
    graph_sha256: str = ""

    def __post_init__(self) -> None:
        check_licences(self.training.get("licences", {}))
        if self.finest_scale not in FINEST_SCALES:
            raise ValueError(f"finest_scale must be one of {', '.join(map(str, FINEST_SCALES))}, not {self.finest_scale}")
        if len(self.confidence_weights) != FEATURES + 1:
            numbers = list(self.confidence_weights)
            raise ValueError(
                f"confidence_weights must have {FEATURES + 1} numbers, not {numbers}: calibrate again (defectcam calibrate)"
            )
        check_architecture(self.encoder, self.decoder_channels, self.downsamplings, self.pooling)

    @property
    def reading(self) -> Reading:
        """How the network reads a pyramid."""
        return Reading(self.finest_scale, self.levels, self.sharpness, climbs_of(self.climb))

    @property
    def cleaning(self) -> Cleaning:
        """From the thresholded map to regions."""
        return Cleaning(self.closing_radius_px, self.gap_px, self.min_area_px)

    @property
    def licences(self) -> dict[str, dict]:
        """Licence, terms and source of every data set that these weights know, see `defectcam.licences`."""
        recorded = self.training.get("licences", {})
        return licences_of(self.training, recorded) | recorded

    @property
    def terms(self) -> str:
        """What the data sets allow: the strictest of their terms."""
        return strictest(licence["terms"] for licence in self.licences.values())

    def least_logit(self, cam_threshold: float) -> float:
        """The value of the merged map at which a pixel's probability is `cam_threshold`."""
        slope, intercept = self.platt
        return (logit(cam_threshold) - intercept) / slope

    def build_network(self) -> ScoreNet:
        """An untrained network of this architecture, with the same numbers every time; needs PyTorch."""
        architecture = self.encoder, self.decoder_channels, self.downsamplings, self.pooling
        return copy.deepcopy(_network_built_once(*architecture))  # six times as fast as to build another one


@cache
def _network_built_once(*architecture: object) -> ScoreNet:
    from defectcam.network import ScoreNet

    return ScoreNet(*architecture)


class _Manifest(BaseModel, strict=True):
    version: str
    defects: Annotated[dict[str, Any], Field(min_length=1)]


_CONFIG = TypeAdapter(DefectConfig)  # for JSON, whose lists it makes tuples


@dataclass(frozen=True)
class Weights:
    """A folder of weights whose files are those of the manifest.

    Attributes:
        version: of the manifest.
        configs: per defect, in the manifest's order.
        folder: where they lie.
    """

    version: str
    configs: dict[str, DefectConfig]
    folder: Path

    @property
    def terms(self) -> str:
        """What the data sets of all defects allow: the strictest of their terms."""
        return strictest(config.terms for config in self.configs.values())

    def network(self, defect: str) -> ScoreNet:
        """The network of a defect, frozen, folded and in eval mode, on the CPU; needs PyTorch.

        Raises:
            WeightsError: for a file that does not fit the manifest.
        """
        from defectcam.network import fold_batchnorm, fold_upsampling

        config = self.configs[defect]
        network = config.build_network()
        load_tensors(network, self.folder / config.file, config.sha256)
        return fold_upsampling(fold_batchnorm(network.requires_grad_(False).eval()))

    def graph(self, defect: str) -> bytes:
        """The ONNX file of a defect.

        Raises:
            WeightsError: there is none, or it is not the manifest's.
        """
        config = self.configs[defect]
        if not config.graph:
            raise WeightsError(
                f"the weights in {self.folder} have no graph of {defect!r} for OpenVINO: run `defectcam export --weights "
                f"{self.folder}` where PyTorch is installed, or {TORCH_REMEDY}"
            )
        return _verified(self.folder / config.graph, config.graph_sha256)


def weights_folder(environ: Mapping[str, str]) -> Path:
    """ADVCAM_WEIGHTS, else the folder `weights` beside the package, as in a checkout and in the function's image.

    Raises:
        WeightsError: the variable is not set and there are no weights beside the package.
    """
    if folder := read_variable(environ, "ADVCAM_WEIGHTS"):
        return Path(folder)
    beside = Path(__file__).resolve().parents[1] / "weights"
    if not (beside / "manifest.json").is_file():
        raise WeightsError(
            f"no weights in {beside}: set ADVCAM_WEIGHTS to a folder with manifest.json, such as `weights` of the repository"
        )
    return beside


def add_weights_option(parser: argparse.ArgumentParser, what: str = "weights folder") -> None:
    """`--weights` of the commands that read the running weights; where it is not given, that of `weights_folder`."""

    def folder(text: str) -> Path:
        try:
            return Path(text) if text else weights_folder(os.environ)
        except WeightsError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(  # argparse calls `folder` for a default that is a text, but not for --help
        "--weights", type=folder, default="", metavar="DIR",
        help=f"{what} (default: ADVCAM_WEIGHTS, else the folder weights beside the package)",
    )  # fmt: skip


def load_weights(folder: Path) -> Weights:
    """Verify a weights folder.

    Raises:
        WeightsError: for a missing, truncated, swapped or altered file, or a manifest that does not fit.
    """
    folder = Path(folder)
    version, configs = read_manifest(folder)
    for config in configs.values():
        _verified(folder / config.file, config.sha256)
        if config.graph:
            _verified(folder / config.graph, config.graph_sha256)
    return Weights(version, configs, folder)


def read_manifest(folder: Path, but_for: str | None = None) -> tuple[str, dict[str, DefectConfig]]:
    """Version and configs of a weights folder.

    Args:
        but_for: a defect whose entry is not looked at, since it is about to be replaced.

    Raises:
        WeightsError: naming manifest, defect and field.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = _Manifest.model_validate(json.loads(path.read_bytes()))  # which finds out about UTF-16 and a mark, too
    except OSError as error:
        raise WeightsError(f"no weights in {folder}: {path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise WeightsError(f"{path} is not a manifest of weights: {first_problem(error)}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not a manifest of weights: {error}") from error
    configs = {}
    for defect, entry in manifest.defects.items():
        if defect == but_for:
            continue
        if isinstance(entry, dict) and "cam_max" in entry:
            raise WeightsError(
                f"{path}, defect {defect!r}: these weights were made for an earlier version of this function, with two "
                "networks; take the weights folder that came with this version, or train and calibrate again"
            )
        try:
            configs[defect] = _CONFIG.validate_json(json.dumps(entry))
        except ValidationError as error:
            raise WeightsError(f"{path}, defect {defect!r}: {first_problem(error)}") from error
    return manifest.version, configs


def write_manifest(folder: Path, defects: dict[str, dict], parent: dict | None = None) -> str:
    """Write the manifest of a weights folder; `sha256` and `graph_sha256` of each entry are taken from its files.

    Args:
        parent: what names the version that this one was retrained from.

    Returns:
        The version: the day it was made and the first letters of the checksum of all files and values. Licences do not
        count: what is found out about them makes no other weights.
    """
    for entry in defects.values():
        entry["sha256"] = sha256_of(folder / entry["file"])
        if entry.get("graph"):
            entry["graph_sha256"] = sha256_of(folder / entry["graph"])
    counted = {defect: _without_licences(entry) for defect, entry in defects.items()}
    content = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    version = f"{datetime.date.today().isoformat()}-{content[:6]}"
    origin = {"parent": parent} if parent else {}
    text = json.dumps({"version": version, **origin, "defects": defects}, indent=1)
    write_whole(folder / "manifest.json", f"{text}\n".encode())
    return version


def write_defect(folder: Path, defect: str, entry: dict, tensors: bytes, graph: bytes | None) -> str:
    """Put a defect into a weights folder, new or not; the other defects' entries are left as they are.

    The folder can be loaded at any moment, also when this is killed: the files are written under names that no manifest
    had, the manifest names them, then they get their lasting names, and the manifest names these.

    Args:
        entry: the fields of `DefectConfig` without files and checksums.
        tensors, graph: content of the files; None where the encoder has no graph.

    Returns:
        The version, see `write_manifest`.

    Raises:
        OSError: a file cannot be written, or a file of another defect is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    defects = json.loads(path.read_text())["defects"] if path.exists() else {}
    defects |= {defect: {"file": "", **entry}}
    contents = {"file": (".safetensors", tensors)} | ({"graph": (".onnx", graph)} if graph else {})
    for is_last in (False, True):
        for field, (suffix, content) in contents.items():
            letters = "" if is_last else "." + hashlib.sha256(content).hexdigest()[:8]
            defects[defect][field] = file_name(defect, letters + suffix)
            write_whole(folder / defects[defect][field], content)
        version = write_manifest(folder, defects)
    named = {entry.get(field) for entry in defects.values() for field in ("file", "graph")}
    own = re.compile(re.escape(file_name(defect)) + r"(\.[0-9a-f]{8})?\.(safetensors|onnx)(\.tmp)?")
    for path in folder.iterdir():
        if own.fullmatch(path.name) and path.name not in named:  # of the weights before, or of a killed run
            path.unlink()
    return version


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never there in part: under another name first, then moved."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _without_licences(entry: dict) -> dict:
    training = entry.get("training", {})
    if "licences" not in training:
        return entry
    return entry | {"training": {key: value for key, value in training.items() if key != "licences"}}


def sha256_of(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _verified(path: Path, sha256: str) -> bytes:
    """A file's content; WeightsError where it is not the one with this checksum."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        raise WeightsError(f"weights file {path} cannot be read ({getattr(error, 'strerror', error)}); {REMEDY}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"weights file {path} was truncated, altered or swapped: its sha256 is {found}, the manifest says "
            f"{sha256}; {REMEDY}"
        )
    return data


def load_tensors(network: ScoreNet, path: Path, sha256: str) -> None:
    """Fill a network from its file; WeightsError for what does not fit. Needs PyTorch."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _verified(path, sha256)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise WeightsError(f"weights file {path} is not a safetensors file ({error}); {REMEDY}") from error
    wanted = network.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            where = "is missing" if name in wanted else "belongs to another architecture"
            raise WeightsError(f"weights file {path}: tensor {name} {where}; {REMEDY}")
        if tensors[name].shape != wanted[name].shape:
            raise WeightsError(
                f"weights file {path}: tensor {name} has shape {tuple(tensors[name].shape)}, the manifest's "
                f"architecture needs {tuple(wanted[name].shape)}; {REMEDY}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"weights file {path}: tensor {name} has values that are not finite; {REMEDY}")
    network.load_state_dict(tensors)
