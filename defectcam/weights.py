"""Weights of all defects: one safetensors file each and a manifest that says what they are and how to use them.

    weights/manifest.json        {"version", "defects": {<defect>: {...}}}, the fields of `DefectWeights`
    weights/<defect>.safetensors    the classifier's tensors, and as "outline.*" those of the outline network

Loading verifies before it trusts: checksum, names and shapes of all tensors, finite values. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from defectcam.climb import ClimbParameters
from defectcam.network import DefectNet, fold_batchnorm, fold_upsampling
from defectcam.outline_network import OutlineNet
from defectcam.snap import NETWORK_METHODS, check_parameters


OUTLINE_PREFIX = "outline."
OUTLINE_ENCODERS = ("resnet34", "efficientnet-lite0")


class WeightsError(RuntimeError):
    """Weights that must not be used; the message names the file, the reason and what to do."""


@dataclass(frozen=True)
class DefectWeights:
    """What the manifest says of one defect; every constant was chosen on validation photos.

    Attributes:
        file, sha256: the safetensors file beside the manifest and its checksum.
        decoder_channels, downsamplings, mean_rgb, std_rgb: the classifier, see `DefectNet`.
        outline_encoder: of the outline network: "resnet34", the classifier's U-Net, or "efficientnet-lite0".
        working_scale: the networks see the photo resized by it; every px below but tolerance_px is of that size.
        window_px: side of the window whose probability gates and gives confidences.
        gate: window probability from which a tile is climbed, 0..1.
        confidence_weights: see `component_confidence`.
        threshold: minimum confidence of a proposal, 0..1.
        iterations: T where nobody sets it.
        xi, penalty_weight, salient_share: see `ClimbParameters`.
        cam_max: divisors of the summed maps for T = 0, 1, ..., see `climbed_map`.
        cam_threshold: theta on the normalised map.
        closing_radius_px, min_area_px: see `binarise`.
        snap: parameters of `snap`, or None where outlines stay the map's.
        tolerance_px, hole_share: polygon simplification, see `proposals`.
        training: the record of how the weights were made.
    """

    file: str
    sha256: str
    decoder_channels: tuple[int, ...]
    downsamplings: int
    mean_rgb: tuple[float, ...]
    std_rgb: tuple[float, ...]
    working_scale: float
    window_px: int
    gate: float
    confidence_weights: tuple[float, ...]
    threshold: float
    iterations: int
    xi: float
    penalty_weight: float
    salient_share: float
    cam_max: tuple[float, ...]
    cam_threshold: float
    closing_radius_px: int
    min_area_px: int
    snap: dict | None
    tolerance_px: float
    hole_share: float
    training: dict
    outline_encoder: str = "resnet34"  # manifests of before there was a choice do not name it

    @property
    def has_outline_network(self) -> bool:
        """Whether outlines are read from a network of their own."""
        return self.snap is not None and self.snap["method"] in NETWORK_METHODS

    @property
    def climb_parameters(self) -> ClimbParameters:
        return ClimbParameters(self.xi, self.penalty_weight, self.salient_share)

    def build_network(self) -> DefectNet:
        """An untrained network of this architecture."""
        return DefectNet(self.decoder_channels, self.downsamplings, None, self.mean_rgb, self.std_rgb)

    def build_outline_network(self) -> DefectNet | OutlineNet:
        """The same for the outline network."""
        return OutlineNet() if self.outline_encoder == "efficientnet-lite0" else self.build_network()


@dataclass(frozen=True)
class Weights:
    """A verified folder of weights: its version and, per defect in the manifest's order, facts and networks.

    `networks` are the classifiers, `outlines` the outline networks of the defects that have one.
    """

    version: str
    facts: dict[str, DefectWeights]
    networks: dict[str, DefectNet]
    outlines: dict[str, DefectNet | OutlineNet]


def load_weights(folder: Path, device: str) -> Weights:
    """Verify and load a weights folder; networks come frozen, folded and in eval mode, on `device`.

    Raises:
        WeightsError: for a missing, truncated, swapped or altered file, or a manifest that does not fit.
    """
    version, facts = read_manifest(folder)
    networks, outlines = {}, {}
    for defect, fact in facts.items():
        parts = {"": fact.build_network()}
        if fact.has_outline_network:
            parts[OUTLINE_PREFIX] = fact.build_outline_network()
        _load_verified(parts, folder / fact.file, fact.sha256)
        for network in parts.values():
            fold_upsampling(fold_batchnorm(network.requires_grad_(False).eval()))
            network.to(device, memory_format=torch.channels_last)
        networks[defect] = parts[""]
        if fact.has_outline_network:
            outlines[defect] = parts[OUTLINE_PREFIX]
    return Weights(version, facts, networks, outlines)


def read_manifest(folder: Path, but_for: str | None = None) -> tuple[str, dict[str, DefectWeights]]:
    """Version and facts of a weights folder.

    Args:
        but_for: a defect whose entry is not looked at, since it is about to be replaced.

    Raises:
        WeightsError: naming manifest, defect and field.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version, defects = manifest["version"], manifest["defects"]
        if not isinstance(version, str) or not isinstance(defects, dict) or not defects:
            raise ValueError("'version' must be a text and 'defects' an object with at least one defect")
    except OSError as error:
        raise WeightsError(f"no weights in {folder}: {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not a manifest of weights: {error}") from error
    facts = {}
    for defect, entry in defects.items():
        if defect == but_for:
            continue
        try:
            entry = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
            facts[defect] = DefectWeights(**entry)
            _check_facts(facts[defect])
        except (TypeError, AttributeError, ValueError) as error:
            reason = str(error).replace("DefectWeights.__init__() ", "")
            raise WeightsError(f"{path}, defect {defect!r}: {reason}") from error
    return version, facts


def write_manifest(folder: Path, version: str, defects: dict[str, dict], parent: dict | None = None) -> None:
    """Write the manifest of a weights folder; `sha256` of each entry is taken from its file.

    Args:
        parent: what names the version that this one was retrained from.
    """
    for entry in defects.values():
        entry["sha256"] = sha256_of(folder / entry["file"])
    origin = {"parent": parent} if parent else {}
    text = json.dumps({"version": version, **origin, "defects": defects}, indent=1)
    (folder / "manifest.json").write_text(text + "\n")


def sha256_of(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_facts(fact: DefectWeights) -> None:
    """Raise ValueError, naming the field, for a value the function could not work with."""

    def need(name: str, values: object, low: float, high: float, kind: type = float) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            right = type(value) is int or (kind is float and type(value) is float)
            if not right or not low <= value <= high:  # NaN lies in no range
                what = "an integer" if kind is int else "a number"
                raise ValueError(f"{name} must be {what} in {low:g}..{high:g}, not {value!r}")

    if not isinstance(fact.file, str) or Path(fact.file).name != fact.file:
        raise ValueError(f"file must be a name without folders, not {fact.file!r}")
    if not isinstance(fact.sha256, str):
        raise ValueError(f"sha256 must be a text, not {fact.sha256!r}")
    for name in ("decoder_channels", "mean_rgb", "std_rgb", "confidence_weights", "cam_max"):
        if not isinstance(getattr(fact, name), tuple):
            raise ValueError(f"{name} must be a list, not {getattr(fact, name)!r}")
    if fact.outline_encoder not in OUTLINE_ENCODERS:
        raise ValueError(f"outline_encoder must be one of {', '.join(OUTLINE_ENCODERS)}, not {fact.outline_encoder!r}")
    for name, optional in (("training", False), ("snap", True)):
        value = getattr(fact, name)
        if not isinstance(value, dict) and not (optional and value is None):
            raise ValueError(f"{name} must be an object{' or null' * optional}, not {value!r}")
    for name in ("gate", "threshold", "cam_threshold", "salient_share", "hole_share", "mean_rgb"):
        need(name, getattr(fact, name), 0, 1)
    need("std_rgb", fact.std_rgb, 1e-3, 1)
    for name, least, most in [
        ("window_px", 1, 100_000),
        ("iterations", 0, 50),
        ("closing_radius_px", 0, 1000),
        ("min_area_px", 0, 10**9),
        ("downsamplings", 1, 3),
        ("decoder_channels", 1, 4096),
    ]:
        need(name, getattr(fact, name), least, most, int)
    need("tolerance_px", fact.tolerance_px, 1, 20)  # unasked for, no annotator gets an outline full of dots
    need("working_scale", fact.working_scale, 0.01, 1)
    for name in ("xi", "penalty_weight"):
        need(name, getattr(fact, name), 0, 1e6)
    need("cam_max", fact.cam_max, 1e-9, 1e9)
    if not fact.cam_max or list(fact.cam_max) != sorted(fact.cam_max):
        raise ValueError(f"cam_max must be numbers that do not decrease, not {fact.cam_max!r}")
    need("confidence_weights", fact.confidence_weights, -1e6, 1e6)
    for name, count, remedy in (
        ("mean_rgb", 3, ""),
        ("std_rgb", 3, ""),
        ("decoder_channels", fact.downsamplings + 1, ": one more than downsamplings"),
        ("confidence_weights", 5, ": weights of an earlier version must be calibrated again (defectcam calibrate)"),
    ):
        if len(getattr(fact, name)) != count:
            raise ValueError(f"{name} must have {count} numbers, not {list(getattr(fact, name))}{remedy}")
    if fact.snap is not None:
        check_parameters(fact.snap)


def _load_verified(parts: dict[str, nn.Module], path: Path, sha256: str) -> None:
    """Fill networks from one file; their tensors' names start with the networks' keys."""
    remedy = "take the weights folder as it was published, or deploy another version"
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        raise WeightsError(f"weights file {path} cannot be read ({getattr(error, 'strerror', error)}); {remedy}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"weights file {path} was truncated, altered or swapped: its sha256 is {found}, the manifest says "
            f"{sha256}; {remedy}"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise WeightsError(f"weights file {path} is not a safetensors file ({error}); {remedy}") from error
    wanted = {prefix + name: value for prefix, part in parts.items() for name, value in part.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            where = "is missing" if name in wanted else "belongs to another architecture"
            raise WeightsError(f"weights file {path}: tensor {name} {where}; {remedy}")
        if tensors[name].shape != wanted[name].shape:
            raise WeightsError(
                f"weights file {path}: tensor {name} has shape {tuple(tensors[name].shape)}, the manifest's "
                f"architecture needs {tuple(wanted[name].shape)}; {remedy}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"weights file {path}: tensor {name} has values that are not finite; {remedy}")
    for prefix, network in parts.items():
        network.load_state_dict({name: tensors[prefix + name] for name in network.state_dict()})
