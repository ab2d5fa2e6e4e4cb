"""What a training is defined by: `TrainConfig`, its command line, and how a record of it is repeated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from defectcam.command_line import command_parser
from defectcam.encoders import ENCODERS, POOLINGS, check_architecture, stride_px
from defectcam.training.labels import add_label_option
from defectcam.weights import DefectConfig

DECODERS = {"resnet34": (128, 64, 32, 16), "efficientnet-lite0": (64, 48, 32, 16)}  # of the most down-samplings, coarse to fine
DOWNSAMPLINGS = {"resnet34": 2, "efficientnet-lite0": 4}
LABELS = ("outlines", "clicks")
# Paper 3.1, 4.1, 4.2: classifier alone, crops of 320 px around clicks at the photo's scale, balanced.
PAPER = {
    "labels": "clicks", "pixels": False, "encoder": "resnet34", "pooling": "average", "encoder_weights": None,
    "scales": (1.0, 1.0), "crop_px": 320, "batch": 32, "lr": 1e-4, "negative_share": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """One training. It is written whole into the run's record and from there into the manifest.

    Attributes:
        defect: name of what is learnt.
        data: folder of sets with splits.json.
        sets: whose train photos show the defect. none_sets: whose photos without a mark of it are without it.
        none_regions: "SET:DEFECT", regions of another defect that are not this one.
        labels: what of the sets' masks is used: "outlines", every pixel, or "clicks", what a click would tell.
        clicks, val_clicks: files with people's own clicks.
        masks: folder from `pseudo-labels` or `weak-labels`: <set>/<photo>.png in place of the sets' own masks, and the masks of
            photos of `clicks`.
        label_names: names of labels in the sets' files -> defect.
        pixels: whether single pixels are taught, or only the pooled logit as in the paper.
        encoder, decoder, downsamplings, pooling: see `ScoreNet`.
        encoder_weights: "imagenet" to start from published weights of the encoder, else None.
        init: weights to start from.
        scales: least and largest factor by which a crop is resized.
        crop_px, batch, lr, steps, seed: side of a crop, crops per step, peak rate, steps, and what all chance comes from.
        head_lr: peak rate of the head; None: `lr`.
        negative_share: of the crops without the defect.
        on_defect_share: of the crops of outlined photos, those around a pixel of the defect; the others are anywhere.
        frozen_batchnorm: whether BatchNorms keep their statistics, as a few photos of one place want it.
        none_per_photo: simulated negative clicks per photo.
        val_every, val_photos: steps between validations, and photos of them.
    """

    defect: str
    data: Path | None = None
    sets: tuple[str, ...] = ()
    none_sets: tuple[str, ...] = ()
    none_regions: tuple[str, ...] = ()
    labels: str = "outlines"
    clicks: Path | None = None
    val_clicks: Path | None = None
    masks: Path | None = None
    label_names: dict[str, str] = dataclasses.field(default_factory=dict)
    pixels: bool = True
    encoder: str = "efficientnet-lite0"
    decoder: tuple[int, ...] = ()
    downsamplings: int = 0
    pooling: str = "log-mean-exp"
    encoder_weights: str | None = "imagenet"
    init: Path | None = None
    scales: tuple[float, float] = (0.5, 2.0)
    crop_px: int = 192
    batch: int = 8
    lr: float = 5e-4
    head_lr: float | None = None
    steps: int = 2000
    seed: int = 0
    negative_share: float = 0.3
    on_defect_share: float = 0.5
    frozen_batchnorm: bool = False
    none_per_photo: int = 6
    val_every: int = 500
    val_photos: int = 20

    def __post_init__(self) -> None:
        """Fill in what depends on the encoder; refuse what cannot be trained.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        if self.encoder in ENCODERS:
            object.__setattr__(self, "downsamplings", self.downsamplings or DOWNSAMPLINGS[self.encoder])
            stages = self.downsamplings + (self.encoder == "resnet34")
            object.__setattr__(self, "decoder", tuple(self.decoder) or DECODERS[self.encoder][-stages:])
        check_architecture(self.encoder, self.decoder, self.downsamplings, self.pooling)
        stride = stride_px(self.downsamplings)
        if self.crop_px < stride or self.crop_px % stride:
            raise ValueError(f"--crop-px is {self.crop_px}, but must be a multiple of {stride}, the network's stride")
        for name in ("batch", "steps", "val_every", "val_photos"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; 1 or more is needed")
        for name in ("lr", "head_lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; a number above 0 is needed")
        if self.labels not in LABELS:
            raise ValueError(f"--labels is {self.labels!r}; allowed are {' and '.join(LABELS)}")
        if len(self.scales) != 2 or not 0.01 <= self.scales[0] <= self.scales[1] <= 10:
            found = ",".join(map(str, self.scales))
            raise ValueError(f"--scales is {found}; two factors from 0.01 to 10 are needed, the least first")
        if not 0 <= self.negative_share < 1:
            raise ValueError(f"--negative-share is {self.negative_share}; allowed is 0 to below 1")
        if any(not all(pair.partition(":")[::2]) for pair in self.none_regions):
            raise ValueError("--none-regions needs SET:DEFECT, such as phinet_labelled:spalling")
        if (self.sets or self.none_sets or self.none_regions) and not self.data:
            raise ValueError("--sets, --none-sets and --none-regions need --data, the folder of the sets")
        if not self.sets and not self.clicks:
            raise ValueError("labels are missing: give --data and --sets, or --clicks and --val-clicks")

    @property
    def crops_of_largest_scale_px(self) -> tuple[int, int]:
        """Sides of the smallest and of the largest square of a photo that a crop shows."""
        return round(self.crop_px / self.scales[1]), round(self.crop_px / self.scales[0])

    def record(self) -> dict:
        """Every field, as JSON has it."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def names(text: str) -> list[str]:
    """"a,b" -> ["a", "b"]."""
    return [name for name in text.split(",") if name]


def architecture_of(defect_config: DefectConfig) -> dict:
    """The fields of `TrainConfig` that say what the network is, from a manifest's entry."""
    return {
        "encoder": defect_config.encoder,
        "decoder": defect_config.decoder_channels,
        "downsamplings": defect_config.downsamplings,
        "pooling": defect_config.pooling,
    }


def labels_of(record: dict) -> str:
    """What a recorded training used of its sets' masks; older records call it their arm."""
    return record.get("labels", record.get("arm", "clicks"))


def recorded(place: str) -> dict:
    """The fields of an earlier training: MANIFEST:DEFECT, or a run's record.json.

    Files of labels and weights are left out: they may lie elsewhere by now.

    Raises:
        ValueError: naming what cannot be read.
    """
    path, _, defect = place.rpartition(":") if not Path(place).exists() else (place, "", "")
    try:
        found = json.loads(Path(path).read_text())
        if defect:
            found = found["defects"][defect]["training"]["network"]
        fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
        kept = {name: found[name] for name in fields if name in found}
        kept["labels"] = labels_of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--like {place}: {error!r}; a manifest and a defect of it are needed, such as weights/manifest.json:crack, or the "
            "record.json of a training"
        ) from None
    dropped = ["data", "clicks", "val_clicks", "masks", "init", "defect"]
    if found.get("init_sha256"):  # it did not begin with published weights, since it began with those
        dropped.append("encoder_weights")
        print(f"note: {place} began with weights of sha256 {found['init_sha256']}: --init repeats that", file=sys.stderr)
    if found.get("mistakes"):
        print(f"note: {place} learnt from hard negatives, too: see defectcam hard-negatives", file=sys.stderr)
    for name in ("clicks", "masks"):
        if found.get(name):
            print(f"note: {place} learnt from --{name} {found[name]}, too: give --{name} to repeat that", file=sys.stderr)
    for name in dropped:
        kept.pop(name, None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}


def parse_config(description: str, argv: Sequence[str] | None) -> tuple[TrainConfig, argparse.Namespace]:
    """The training that a command line asks for, and its other options: `out`, `workers`.

    Args:
        description: help text, with the examples from the word "Example" on.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    parser = command_parser("train", description, argument_default=argparse.SUPPRESS)

    def add(option: str, kind, text: str, **more) -> None:
        default = defaults.get(option.replace("-", "_"))
        shown = "" if default in ((), None) or default is dataclasses.MISSING else f" (default: {_shown(default)})"
        parser.add_argument(f"--{option}", type=kind, help=text + shown, **more)

    add("defect", str, "crack, spalling, rust, or your own", required=True)
    add("like", str, "take all options from an earlier training: MANIFEST:DEFECT, or its record.json")
    parser.add_argument("--paper", action="store_true", help="the paper's classifier: " + _paper_options())
    add("data", Path, "folder of sets with splits.json")
    add("sets", names, "sets in which the defect is labelled")
    add("none-sets", names, "sets without the defect")
    add("none-regions", names, "SET:DEFECT,...: regions of another defect, such as phinet_labelled:spalling, which are none")
    add("labels", str, "what of the sets' masks is learnt: outlines, or only what clicks would tell", choices=LABELS)
    add_label_option(parser)
    add("clicks", Path, "your own clicks: CSV or JSONL with image, x, y, defect")
    add("val-clicks", Path, "clicks on other photos, to choose the best checkpoint by")
    add("masks", Path, "folder from pseudo-labels or weak-labels: masks in place of the sets' own, and of photos of --clicks")
    add("encoder", str, "of the U-Net", choices=tuple(ENCODERS))
    add("decoder", lambda text: tuple(map(int, text.split(","))), "widths, coarse to fine (default: suits the encoder)")
    add("downsamplings", int, "paper Fig. 4 (default: 2 of resnet34, 4 of efficientnet-lite0)", choices=(1, 2, 3, 4))
    add("pooling", str, "from map to logit", choices=POOLINGS)
    add("encoder-weights", lambda text: None if text == "none" else text, "published encoder weights", choices=("imagenet", None), metavar="{imagenet,none}")  # fmt: skip
    add("init", Path, "start from these weights (safetensors)")
    add("scales", lambda text: tuple(map(float, text.split(","))), "least and largest factor of a crop's size")
    add("crop-px", int, "side of a crop")
    add("batch", int, "crops per step")
    add("lr", float, "peak learning rate; the paper's is 1e-4")
    add("head-lr", float, "peak learning rate of the head (default: --lr)")
    add("steps", int, "steps of training; more than before, and a finished run goes on")
    add("negative-share", float, "of the crops without the defect")
    add("none-per-photo", int, "simulated negative clicks per photo")
    add("val-every", int, "steps between validations")
    add("val-photos", int, "val photos with the defect that the best checkpoint is chosen on, and half as many without")
    add("seed", int, "all chance comes from it")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare crops (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curves and the record")
    given = vars(parser.parse_args(argv))
    run = argparse.Namespace(out=given.pop("out"), workers=given.pop("workers"))
    if not given["label_names"]:  # those of --like stay
        del given["label_names"]
    like, paper = given.pop("like", None), given.pop("paper", False)
    try:
        options = (recorded(like) if like else {}) | (PAPER if paper else {}) | given
        if options.get("labels") == "clicks" and "negative_share" not in options:
            options["negative_share"] = 0.5
        for name in ("sets", "none_sets", "none_regions"):
            options[name] = tuple(options.get(name, ()))
        config = TrainConfig(**options)
        if not config.sets and not config.val_clicks:
            raise ValueError(
                "--clicks needs --val-clicks, or --sets with val photos: the best checkpoint is chosen on photos that are "
                "not trained on"
            )
        return config, run
    except ValueError as error:
        parser.error(str(error))


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _paper_options() -> str:
    return " ".join(f"{name.replace('_', '-')} {_shown(value)}" for name, value in PAPER.items() if name != "pixels")
