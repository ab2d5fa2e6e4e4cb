"""Train the classifier of one defect from clicks (paper 4.1, 4.2).

AdamW, binary cross-entropy on balanced crops, the best checkpoint by F-measure on val. Everything a run draws
comes from its seed, and a run that was killed goes on from its last checkpoint (written every minute).

Example:
    defectcam train --defect crack --data ../shared/data --sets deepcrack,uav75 --crop-px 96 --batch 16 \\
        --lr 1e-3 --head-lr 1e-2 --steps 800 --out out/train/crack
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from defectcam.network import DefectNet
from defectcam.training.clicks import Click, simulate_clicks
from defectcam.training.crops import CropDataset

CHECKPOINT_SECONDS = 60
VAL_CROPS = 400


def gather_clicks(args: argparse.Namespace, split: str) -> list[Click]:
    """Clicks of the sets with the defect, and none-clicks alone of the sets without it."""
    clicks: list[Click] = []
    for set_name in args.sets:
        clicks += simulate_clicks(
            args.data, set_name, split, args.defect, args.crop_px, args.none_per_photo, args.seed
        )
    for set_name in args.none_sets:
        found = simulate_clicks(args.data, set_name, split, args.defect, args.crop_px, 1, args.seed)
        clicks += [click for click in found if click.defect == "none"]
    return clicks


def f_measure(scores: np.ndarray, labels: np.ndarray) -> float:
    """F1 of `scores` > 0 (logits) against 0/1 labels; 0 where nothing is found."""
    found = scores > 0
    hits = float((found & (labels > 0)).sum())
    return 2 * hits / max(float(found.sum() + (labels > 0).sum()), 1.0)


@torch.no_grad()
def val_scores(network: DefectNet, dataset: CropDataset, batch: int, device: str) -> tuple[float, float]:
    """F-measure and loss over the first VAL_CROPS draws of a val set."""
    network.eval()
    logits, labels = [], []
    for images, targets in DataLoader(dataset, batch, sampler=range(VAL_CROPS)):
        logits.append(network(network.normalise(images.to(device))).float().cpu())
        labels.append(targets.float())
    logit, label = torch.cat(logits), torch.cat(labels)
    loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
    return f_measure(logit.numpy(), label.numpy()), float(loss)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of steps, then a cosine down to 1 % of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def save_checkpoint(path: Path, network: DefectNet, optimiser: torch.optim.AdamW, state: dict) -> None:
    """Weights, AdamW moments and the run's state in one safetensors file, replaced in one move."""
    tensors = {f"model.{name}": value.contiguous() for name, value in network.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"adamw.{index}.{name}": value.contiguous() for name, value in moments.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    temporary.replace(path)


def load_checkpoint(path: Path, network: DefectNet, optimiser: torch.optim.AdamW) -> dict:
    """Undo `save_checkpoint`; returns the run's state."""
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    tensors = load_file(path)
    network.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    moments: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("adamw."):
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return state


def train(args: argparse.Namespace) -> dict:
    """Train as the arguments say; returns and writes the record of the run (record.json)."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    train_clicks, val_clicks = gather_clicks(args, "train"), gather_clicks(args, "val")
    crops = CropDataset(train_clicks, args.crop_px, args.seed, augment=True)
    val_crops = CropDataset(val_clicks, args.crop_px, 1, augment=False)

    network = DefectNet(args.decoder, args.downsamplings, encoder_weights=args.encoder_weights)
    if args.init:
        network.load_state_dict(load_file(args.init))
    network = network.to(device, memory_format=torch.channels_last)
    # A crack covers 3 % of a crop, so its scores must be large before their mean moves the logit: a head trained
    # from scratch needs longer strides than the convolutions.
    head_lr_factor = (args.head_lr or args.lr) / args.lr
    body = [parameter for name, parameter in network.named_parameters() if not name.startswith("head.")]
    optimiser = torch.optim.AdamW(
        [{"params": body, "factor": 1.0}, {"params": network.head.parameters(), "factor": head_lr_factor}],
        lr=args.lr,
        weight_decay=1e-2,
    )
    facts = run_facts(args, train_clicks)
    state = {"facts": facts, "step": 0, "best_f": -1.0, "seconds": 0.0, "history": []}
    checkpoint = args.out / "last.safetensors"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, network, optimiser)
        if state["facts"] != facts:
            changed = sorted(name for name in facts if facts[name] != state["facts"].get(name))
            sys.exit(f"{args.out} holds a run with other {', '.join(changed)}: choose another --out, or remove it")
        print(f"going on from step {state['step']} of {checkpoint}", file=sys.stderr)

    draws = range(state["step"] * args.batch, args.steps * args.batch)
    loader = DataLoader(crops, args.batch, sampler=draws, num_workers=args.workers)
    earlier, started, saved = state["seconds"], time.monotonic(), time.monotonic()
    bar = tqdm(loader, initial=state["step"], total=args.steps, desc=args.defect, unit="step")
    losses = []
    for images, targets in bar:
        network.train()
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * learning_rate(state["step"], args.steps, args.lr)
        loss = nn.functional.binary_cross_entropy_with_logits(
            network(network.normalise(images.to(device))), targets.to(device, torch.float32)
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        state["step"] += 1
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", best_f=f"{state['best_f']:.3f}")
        if state["step"] % args.val_every == 0 or state["step"] == args.steps:
            f, val_loss = val_scores(network, val_crops, args.batch, device)
            state["history"].append(
                {"step": state["step"], "loss": float(np.mean(losses[-50:])), "val_loss": val_loss, "val_f": f}
            )
            tqdm.write(f"step {state['step']}: loss {np.mean(losses[-50:]):.3f}, val {val_loss:.3f}, F {f:.3f}")
            if f >= state["best_f"]:
                state["best_f"] = f
                save_file(
                    {name: value.contiguous() for name, value in network.state_dict().items()},
                    args.out / "best.safetensors",
                )
        if time.monotonic() - saved > CHECKPOINT_SECONDS or state["step"] == args.steps:
            saved = time.monotonic()
            state["seconds"] = earlier + saved - started
            save_checkpoint(checkpoint, network, optimiser, state)
    record = {
        "command": "defectcam train " + shlex.join(sys.argv[2:]),
        **facts,
        "positive_clicks": len(crops.positives),
        "none_clicks": len(crops.negatives),
        "minutes": round(state["seconds"] / 60, 1),
        "best_val_f": state["best_f"],
        "history": state["history"],
    }
    (args.out / "record.json").write_text(json.dumps(record, indent=1))
    return record


def run_facts(args: argparse.Namespace, clicks: list[Click]) -> dict:
    """What a run is defined by; a checkpoint of another run is never gone on from."""
    labels = [(click.photo_group, click.x, click.y, click.defect) for click in clicks]
    return {
        "defect": args.defect,
        "sets": args.sets,
        "none_sets": args.none_sets,
        "clicks_sha256": hashlib.sha256(repr(labels).encode()).hexdigest(),
        "init_sha256": hashlib.sha256(args.init.read_bytes()).hexdigest() if args.init else None,
        "encoder_weights": args.encoder_weights,
        "decoder": list(args.decoder),
        "downsamplings": args.downsamplings,
        "crop_px": args.crop_px,
        "batch": args.batch,
        "lr": args.lr,
        "head_lr": args.head_lr,
        "steps": args.steps,
        "seed": args.seed,
    }


def names(text: str) -> list[str]:
    """"a,b" -> ["a", "b"]."""
    return [name for name in text.split(",") if name]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="defectcam train",
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[-1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--defect", required=True, help="crack, spalling, rust, or your own")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, required=True, help="sets in which the defect is labelled")
    parser.add_argument("--none-sets", type=names, default=[], help="sets that give none-clicks alone")
    parser.add_argument("--none-per-photo", type=int, default=6, help="none-clicks per photo (default 6)")
    parser.add_argument("--crop-px", type=int, default=320, help="side of a crop (default 320, the paper's)")
    parser.add_argument("--batch", type=int, default=32, help="crops per step (default 32, the paper's)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4, the paper's)")
    parser.add_argument("--head-lr", type=float, help="peak learning rate of the head (default: --lr)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--val-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--decoder", type=lambda s: tuple(map(int, s.split(","))), default=(64, 32, 16))
    parser.add_argument("--downsamplings", type=int, default=2, choices=(1, 2, 3), help="paper Fig. 4")
    parser.add_argument("--encoder-weights", choices=("imagenet",), help="start from published encoder weights")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors)")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare crops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the record")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam train`."""
    done = train(parse_args(argv))
    print(f"best F-measure on val {done['best_val_f']:.3f} after {done['minutes']} minutes")
