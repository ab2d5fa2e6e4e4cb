"""Weights of all defects: one safetensors file each and a manifest that says what they are and how to use them.

    weights/manifest.json           {"version", "defects": {<defect>: {...}}}, the fields of `DefectWeights`
    weights/<defect>.safetensors    the network's tensors

Loading verifies before it trusts: checksum, names and shapes of all tensors, finite values. Nothing is unpickled.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from defectcam.climb import Climb, LocalClimb, PaperClimb
from defectcam.network import ScoreNet, fold_batchnorm, fold_upsampling
from defectcam.postprocess import Cleaning
from defectcam.proposals import FEATURES, logit
from defectcam.pyramid import FINEST_SCALES, Reading


class WeightsError(RuntimeError):
    """Weights that must not be used; the message names the file, the reason and what to do."""


@dataclass(frozen=True)
class DefectWeights:
    """What the manifest says of one defect; every constant was chosen on validation photos.

    Attributes:
        file, sha256: the safetensors file beside the manifest and its checksum.
        encoder, decoder_channels, downsamplings, pooling: the network, see `ScoreNet`.
        finest_scale, levels, sharpness: how it reads the pyramid, see `Reading`.
        climb: {"form": "local", "xi", "g_ref": one per level} or {"form": "paper", "xi", "penalty_weight",
            "salient_share"}, see `defectcam.climb`.
        platt: (a, c), the probability of a pixel is sigmoid(a * M + c), M the merged map.
        cam_threshold: theta, the probability above which a pixel counts.
        closing_radius_px, gap_px, min_area_px: see `Cleaning`.
        confidence_weights: see `component_confidence`.
        threshold: minimum confidence of a proposal, 0..1.
        iterations: T where the request, the task and the deployment do not set it.
        tolerance_px, hole_share: polygon simplification, see `polygons`.
        training: the record of how the weights were made.
    """

    file: str
    sha256: str
    encoder: str
    decoder_channels: tuple[int, ...]
    downsamplings: int
    pooling: str
    finest_scale: float
    levels: int
    sharpness: float
    climb: dict
    platt: tuple[float, float]
    cam_threshold: float
    closing_radius_px: int
    gap_px: int
    min_area_px: int
    confidence_weights: tuple[float, ...]
    threshold: float
    iterations: int
    tolerance_px: float
    hole_share: float
    training: dict

    @property
    def reading(self) -> Reading:
        """How the network reads a pyramid."""
        return Reading(self.finest_scale, self.levels, self.sharpness, climbs_of(self.climb))

    @property
    def cleaning(self) -> Cleaning:
        """From the thresholded map to regions."""
        return Cleaning(self.closing_radius_px, self.gap_px, self.min_area_px)

    def least_logit(self, cam_threshold: float) -> float:
        """The value of the merged map at which a pixel's probability is `cam_threshold`."""
        slope, intercept = self.platt
        return (logit(cam_threshold) - intercept) / slope

    def build_network(self) -> ScoreNet:
        """An untrained network of this architecture."""
        return ScoreNet(self.encoder, self.decoder_channels, self.downsamplings, self.pooling)


def climbs_of(climb: dict) -> tuple[Climb, ...]:
    """The climb of each level, from the manifest's `climb`."""
    if climb["form"] == "paper":
        return (PaperClimb(climb["xi"], climb["penalty_weight"], climb["salient_share"]),)
    return tuple(LocalClimb(climb["xi"], g_ref) for g_ref in climb["g_ref"])


@dataclass(frozen=True)
class Weights:
    """A verified folder of weights: its version and, per defect in the manifest's order, facts and network."""

    version: str
    facts: dict[str, DefectWeights]
    networks: dict[str, ScoreNet]


def load_weights(folder: Path) -> Weights:
    """Verify and load a weights folder; networks come frozen, folded and in eval mode, on the CPU.

    Raises:
        WeightsError: for a missing, truncated, swapped or altered file, or a manifest that does not fit.
    """
    version, facts = read_manifest(folder)
    networks = {}
    for defect, fact in facts.items():
        network = fact.build_network()
        _load_verified(network, folder / fact.file, fact.sha256)
        networks[defect] = fold_upsampling(fold_batchnorm(network.requires_grad_(False).eval()))
    return Weights(version, facts, networks)


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
        if isinstance(entry, dict) and "cam_max" in entry:
            raise WeightsError(
                f"{path}, defect {defect!r}: these weights were made for an earlier version of this function, with two "
                "networks; take the weights folder that came with this version, or train and calibrate again"
            )
        try:
            entry = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
            facts[defect] = DefectWeights(**entry)
            _check_facts(facts[defect])
        except (TypeError, AttributeError, ValueError) as error:
            reason = str(error).replace("DefectWeights.__init__() ", "")
            raise WeightsError(f"{path}, defect {defect!r}: {reason}") from error
    return version, facts


def write_manifest(folder: Path, defects: dict[str, dict], parent: dict | None = None) -> str:
    """Write the manifest of a weights folder; `sha256` of each entry is taken from its file.

    Args:
        parent: what names the version that this one was retrained from.

    Returns:
        The version: the day it was made and the first letters of the checksum of all files.
    """
    for entry in defects.values():
        entry["sha256"] = sha256_of(folder / entry["file"])
    content = hashlib.sha256(json.dumps(defects, sort_keys=True).encode()).hexdigest()
    version = f"{datetime.date.today().isoformat()}-{content[:6]}"
    origin = {"parent": parent} if parent else {}
    text = json.dumps({"version": version, **origin, "defects": defects}, indent=1)
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(text + "\n")
    temporary.replace(folder / "manifest.json")
    return version


def sha256_of(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_facts(fact: DefectWeights) -> None:
    """Raise ValueError, naming the field, for a value the function could not work with."""

    def need(name: str, value: object, low: float, high: float, kind: type = float) -> None:
        right = type(value) is int or (kind is float and type(value) is float)
        if not right or not low <= value <= high:  # NaN lies in no range
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"{name} must be {what} in {low:g}..{high:g}, not {_as_json(value)}")

    for name in ("file", "sha256", "encoder", "pooling"):
        if not isinstance(getattr(fact, name), str):
            raise ValueError(f"{name} must be a text, not {_as_json(getattr(fact, name))}")
    if Path(fact.file).name != fact.file:
        raise ValueError(f"file must be a name without folders, not {fact.file!r}")
    for name in ("decoder_channels", "platt", "confidence_weights"):
        if not isinstance(getattr(fact, name), tuple):
            raise ValueError(f"{name} must be a list, not {getattr(fact, name)!r}")
    for name in ("training", "climb"):
        if not isinstance(getattr(fact, name), dict):
            raise ValueError(f"{name} must be an object, not {_as_json(getattr(fact, name))}")
    if fact.finest_scale not in FINEST_SCALES or isinstance(fact.finest_scale, bool):
        allowed = ", ".join(map(str, FINEST_SCALES))
        raise ValueError(f"finest_scale must be one of {allowed}, not {_as_json(fact.finest_scale)}")
    for name in ("threshold", "cam_threshold", "hole_share"):
        need(name, getattr(fact, name), 0, 1)
    for name, least, most in [
        ("iterations", 0, 50),
        ("levels", 1, 16),
        ("closing_radius_px", 0, 1000),
        ("gap_px", 0, 100),
        ("min_area_px", 0, 10**9),
        ("downsamplings", 1, 4),
    ]:
        need(name, getattr(fact, name), least, most, int)
    need("tolerance_px", fact.tolerance_px, 1, 20)  # unasked for, no annotator gets an outline full of dots
    need("sharpness", fact.sharpness, 0.1, 4)
    for channels in fact.decoder_channels:
        need("decoder_channels", channels, 1, 4096, int)
    for name, count, remedy in (
        ("platt", 2, ""),
        ("confidence_weights", FEATURES + 1, ": calibrate again (defectcam calibrate)"),
    ):
        numbers = getattr(fact, name)
        for number in numbers:
            need(name, number, -1e6, 1e6)
        if len(numbers) != count:
            raise ValueError(f"{name} must have {count} numbers, not {list(numbers)}{remedy}")
    if fact.platt[0] <= 0:
        raise ValueError(f"platt must begin with a number above 0, not {fact.platt[0]!r}")
    fields = {"local": {"form", "xi", "g_ref"}, "paper": {"form", "xi", "penalty_weight", "salient_share"}}
    if fact.climb.keys() != fields.get(str(fact.climb.get("form"))):
        raise ValueError(
            "climb must have form 'local' with xi, g_ref or 'paper' with xi, penalty_weight, salient_share, "
            f"not {fact.climb!r}"
        )
    for name, least, most in (("xi", 0, 2), ("penalty_weight", 0, 1e6), ("salient_share", 0, 1)):
        need(f"climb {name}", fact.climb.get(name, least), least, most)
    g_ref = fact.climb.get("g_ref", [1.0])
    if not isinstance(g_ref, list) or not g_ref:
        raise ValueError(f"climb g_ref must be a list of numbers, one per level, not {g_ref!r}")
    for number in g_ref:
        need("climb g_ref", number, 1e-12, 1e12)
    fact.build_network()


def _as_json(value: object) -> str:
    """A value as the manifest has it: lists were made tuples."""
    return repr(list(value) if isinstance(value, tuple) else value)


def _load_verified(network: ScoreNet, path: Path, sha256: str) -> None:
    """Fill a network from its file."""
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
    wanted = network.state_dict()
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
    network.load_state_dict(tensors)
