"""Train the network of one defect from whatever labels there are: clicks, outlines, or both (paper 4.1, 4.2 and beyond).

Clicks say that there is the defect, or that there is none in a patch. Outlines say it of every pixel. Each kind of label has
its loss (`losses.py`), so one run learns from all of them. `--labels clicks` uses of the sets' masks only what clicks would
tell. `--paper` is the paper's classifier.

Everything a run draws comes from its seed. A run that was killed goes on from its last checkpoint, which is written every
minute. With more --steps a finished run goes on. `torchrun` in front of the command trains on several GPUs or machines; on a
GPU the network runs in mixed precision.

Example:
    defectcam train --defect crack --data ../shared/data --sets deepcrack,uav75 --none-sets cis_corrosion --out out/train/crack
    defectcam train --defect crack --clicks clicks.csv --val-clicks val.csv --out out/train/crack
    defectcam train --defect crack --like weights/manifest.json:crack --data ../shared/data --out out/train/again
    torchrun --nproc-per-node 4 -m defectcam train --defect crack --data ../shared/data --sets deepcrack --out out/train/crack
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from defectcam.encoders import normalised
from defectcam.network import ScoreNet
from defectcam.training.config import TrainConfig, parse_config
from defectcam.training.dataset import CropDataset, PhotoLabels, on_disk
from defectcam.training.hard_negatives import ALL_LEVELS, merged_map
from defectcam.training.labels import UNKNOWN
from defectcam.training.losses import PartialLabelLoss
from defectcam.training.sources import Source, check_kinds, gather, labels_sha256, read_all
from defectcam.training.start import start_network

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

CHECKPOINT_SECONDS = 50
VAL_CROPS = 400
VAL_SEED = 1
AVERAGE_DECAY = 0.995  # of the weights' running mean, per step
LARGEST_GRADIENT = 5.0  # norm; a rare batch far from the others must not undo hundreds of steps
WEIGHT_DECAY = 1e-2  # paper 4.2
VALIDATION_PATIENCE = timedelta(hours=24)  # other processes wait while the first one validates
OF_NO_WEIGHT = ("data", "clicks", "val_clicks", "masks", "init", "steps")  # names of files, and how far a run goes

Validate = Callable[[ScoreNet], dict[str, float]]


def fit(
    config: TrainConfig,
    out: Path,
    network: ScoreNet,
    crops: Dataset,
    validate: Validate | None,
    best_by: str,
    identity: dict,
    workers: int = 0,
) -> dict:
    """The training loop.

    Args:
        out: folder of best.safetensors, last.safetensors, record.json and curves.png.
        network: to start from; it is trained in place.
        crops: endless dataset; draw k is always the same.
        validate: figures of a network on val; the checkpoint with the largest `best_by` is kept. Without it the last is.
        identity: what else the run is defined by, beside `config`; a checkpoint of another run is never gone on from.

    Returns:
        The record of the run, which is also in record.json.

    Raises:
        ValueError: `out` holds another run, or a longer one; a batch that processes cannot share.
    """
    gpu = torch.cuda.is_available()
    precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if gpu else "no"
    accelerator = Accelerator(
        cpu=not gpu, mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=VALIDATION_PATIENCE)]
    )
    if config.batch % accelerator.num_processes:
        raise ValueError(f"--batch {config.batch} cannot be shared evenly by {accelerator.num_processes} processes")
    out.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(network)  # what is judged and kept
    # A crack covers 3 % of a crop, so its scores must be large before their mean moves the logit: a head trained
    # from scratch needs longer strides than the convolutions.
    head_lr_factor = (config.head_lr or config.lr) / config.lr
    body = [parameter for name, parameter in network.named_parameters() if not name.startswith("head.")]
    optimiser = torch.optim.AdamW(
        [{"params": body, "factor": 1.0}, {"params": network.head.parameters(), "factor": head_lr_factor}],
        lr=config.lr,
        weight_decay=WEIGHT_DECAY,
    )
    identity = {name: value for name, value in config.record().items() if name not in OF_NO_WEIGHT} | identity
    state = {"identity": identity, "step": 0, "steps": config.steps, "best": -1.0, "seconds": 0.0, "history": []}
    checkpoint = out / "last.safetensors"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, network, average, optimiser)
        check_same_run(out, state, identity, config.steps)
        state["steps"] = config.steps
        print(f"going on from step {state['step']} of {checkpoint}", file=sys.stderr)
    objective = PartialLabelLoss(network, config.pixels)
    objective.to(accelerator.device, memory_format=torch.channels_last)
    average.to(accelerator.device, memory_format=torch.channels_last)
    several_gpus = gpu and accelerator.num_processes > 1
    shared, optimiser = accelerator.prepare(
        nn.SyncBatchNorm.convert_sync_batchnorm(objective) if several_gpus else objective, optimiser
    )
    own = own_draws(state["step"], config.steps, config.batch, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(crops, batch_sampler=list(own), num_workers=workers)
    earlier, started, saved = state["seconds"], time.monotonic(), time.monotonic()
    main_process = accelerator.is_main_process
    bar = tqdm(loader, initial=state["step"], total=config.steps, desc=out.name, unit="step", disable=not main_process)
    losses: list[float] = []

    def save() -> None:
        state["seconds"] = earlier + time.monotonic() - started
        save_checkpoint(checkpoint, network, average, optimiser, state)

    def judge() -> None:
        with torch.no_grad():
            found = validate(average.eval()) if validate else {best_by: float(state["step"])}
        state["history"].append({"step": state["step"], "loss": float(np.mean(losses[-50:])) if losses else None, **found})
        tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in state["history"][-1].items() if value is not None))
        if found[best_by] >= state["best"]:
            state["best"] = found[best_by]
            save_weights(average, out / "best.safetensors")
        draw_curves(state["history"], out / "curves.png")
        save()

    def is_due() -> bool:
        return state["step"] % config.val_every == 0 or state["step"] == config.steps

    if main_process and state["step"] and is_due() and state["step"] not in [row["step"] for row in state["history"]]:
        judge()  # the run was killed while it did that
    for batch in bar:
        network.train()
        if config.frozen_batchnorm:
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * learning_rate(state["step"], config.steps, config.lr)
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
        **config.record(),
        **identity,
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "minutes": round(state["seconds"] / 60, 1),
        "best_by": best_by,
        "best_val": state["best"],
        "history": state["history"],
    }
    if main_process:
        (out / "record.json").write_text(json.dumps(record, indent=1))
    return record


def check_same_run(out: Path, state: dict, identity: dict, steps: int) -> None:
    """Whether a checkpoint is of the same run, and of no more steps.

    Raises:
        ValueError: naming what differs, and the remedy.
    """
    names_of_both = identity.keys() | state.get("identity", {}).keys()
    changed = sorted(name for name in names_of_both if identity.get(name) != state.get("identity", {}).get(name))
    if changed:
        raise ValueError(f"{out} holds a run with other {', '.join(changed)}: choose another --out, or remove it")
    if steps < state["step"]:
        raise ValueError(
            f"{out} holds a run of {state['step']} steps already, --steps is {steps}: give as many or more, or another --out"
        )


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


def f_measure(scores: np.ndarray, labels: np.ndarray) -> float:
    """F1 of `scores` > 0 (logits) against 0/1 labels; 0 where nothing is found."""
    found = scores > 0
    hits = float((found & (labels > 0)).sum())
    return 2 * hits / max(float(found.sum() + (labels > 0).sum()), 1.0)


def val_crop_figures(network: ScoreNet, crops: CropDataset, batch: int) -> dict[str, float]:
    """F-measure and loss of the pooled logit over the first VAL_CROPS draws of a val set (paper 4.2)."""
    device = network.head.weight.device
    logits, labels = [], []
    for images, *_, holds, _weights in DataLoader(crops, batch, sampler=range(VAL_CROPS)):
        logits.append(network(normalised(images.to(device))).float().cpu())
        labels.append(holds.float())
    logit, label = torch.cat(logits), torch.cat(labels)
    loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
    return {"val_loss": float(loss), "val_f": f_measure(logit.numpy(), label.numpy())}


def pixel_iou(network: ScoreNet, photos: Sequence[PhotoLabels]) -> float:
    """Intersection over union of all photos' known pixels together, at logit 0 of the merged map.

    What is found on photos without the defect counts as found in the wrong place.
    """
    both = either = 0
    for photo in photos:
        found, known = merged_map(network, photo.image_rgb, ALL_LEVELS) > 0, photo.outline != UNKNOWN
        wanted = photo.outline == 255
        both += int((found & wanted).sum())
        either += int(((found | wanted) & known).sum())
    return both / max(either, 1)


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


def validation(config: TrainConfig, sources: Sequence[Source], out: Path) -> tuple[Validate, str, dict]:
    """How a run is judged, by which figure, and what its record says of it.

    Args:
        sources: the val photos.

    By pixels where val photos are outlined, else by the classifier's F-measure on crops around clicks.
    """
    check_kinds(config, sources, "val")
    if not any(source.outline for source in sources):
        photos = on_disk(read_all(sources, "val photos"), out)
        crops = CropDataset(photos, config.crop_px, VAL_SEED, negative_share=0.5, augment=False)
        return lambda network: val_crop_figures(network, crops, config.batch), "val_f", {"val_sha256": labels_sha256(photos)}
    rng = np.random.default_rng(config.seed)
    kept: dict[bool, list[PhotoLabels]] = {True: [], False: []}
    wanted = {True: config.val_photos, False: config.val_photos // 2}
    for index in rng.permutation(len(sources)):  # one after the other: memory does not grow with the set
        source = sources[index]
        if source.outline and any(len(kept[shows]) < wanted[shows] for shows in kept):
            photo = source.read()
            if len(kept[photo.shows_defect]) < wanted[photo.shows_defect]:
                kept[photo.shows_defect].append(photo)
    photos = on_disk([*kept[True], *kept[False]], out)
    return lambda network: {"val_iou": pixel_iou(network, photos)}, "val_iou", {"val_sha256": labels_sha256(photos)}


def check_apart(sources: Sequence[Source], val_sources: Sequence[Source]) -> None:
    """ValueError where a photo is trained on and judged by."""
    both = {source.path for source in sources} & {source.path for source in val_sources}
    if both:
        raise ValueError(f"{min(both)} is among the photos to train on and those to judge by: leave it out of one")


def crops_of(config: TrainConfig, photos: Sequence[PhotoLabels]) -> CropDataset:
    """The crops that a training draws."""
    return CropDataset(
        photos, config.crop_px, config.seed, config.scales, config.negative_share, config.on_defect_share
    )


def train(config: TrainConfig, out: Path, workers: int = 0, more: Sequence[PhotoLabels] = ()) -> dict:
    """Train a network; returns and writes the record of the run.

    Args:
        more: labelled photos beside those that `config` names.

    Raises:
        ValueError, FileNotFoundError: bad input, named with the remedy.
    """
    sources, val_sources = gather(config, "train"), gather(config, "val")
    if not more:
        check_kinds(config, sources, "train")
    check_apart(sources, val_sources)
    network, published = start_network(config)
    out.mkdir(parents=True, exist_ok=True)
    validate, best_by, judged_by = validation(config, val_sources, out)
    photos = on_disk([*read_all(sources, "train photos"), *more], out)
    crops = crops_of(config, photos)
    clicks = [click.defect == "none" for photo in photos for click in photo.clicks]
    identity = {
        "encoder_weights": published,
        "init_sha256": hashlib.sha256(config.init.read_bytes()).hexdigest() if config.init else None,
        "photos": len(photos),
        "photos_without": len(crops.without),
        "positive_clicks": clicks.count(False),
        "negative_clicks": clicks.count(True),
        "labels_sha256": labels_sha256(photos),
        **judged_by,
    }
    return fit(config, out, network, crops, validate, best_by, identity, workers)


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam train`."""
    config, run = parse_config(__doc__, argv)
    try:
        done = train(config, run.out, run.workers)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    if done["history"]:  # of several processes one has judged
        print(f"best {done['best_by']} {done['best_val']:.3f} after {done['minutes']} minutes")
