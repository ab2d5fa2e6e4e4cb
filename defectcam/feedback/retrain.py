"""New weights from the running ones and from what annotators did: the loop closes (paper, Fig. 1).

1. Training: the network of every defect with new clicks starts from the running weights. It learns from old and new clicks
   together, or with --outlines from the finished outlines of the photos with clicks. What the running weights learnt of the
   sets is learnt again beside them.
2. Calibration on the val photos, as in `defectcam calibrate`.
3. Comparison: running and new weights answer the same val photos.
4. Promotion, unless one of two figures of a defect is worse by more than --margin. `mean_saved` is the share of clicks that a
   simulated annotator saves, the mean over all instances: Eq. 3 of the paper without its steps. `iou` is that of all pixels,
   photos without the defect included, so false proposals count.

Clicks on val photos are left out. Defects without new clicks keep the running weights bit for bit. Nothing is overwritten: OUT
must not exist, or hold a run of the same command that was cut off, which then goes on.

OUT/manifest.json, *.safetensors, *.onnx    promoted weights, for `deploy.sh weights OUT`
OUT/report.html, pictures/          both versions' figures, and the photos on which they differ most
OUT/rejected/                       all of this instead, where the new weights were not promoted
OUT/clicks/<defect>.csv             old and new clicks: --old-clicks of the next time
work, in OUT                        checkpoints and masks; may be deleted afterwards

The exit status is 0 if the new weights were promoted, 3 if not, and 1 or 2 where something was wrong.

Example:
    defectcam weak-labels --photos photos --patch-px 64 --out out/feedback
    defectcam retrain --data ../shared/data --out out/weights-2 && ./deploy.sh weights out/weights-2
    defectcam retrain --data ../shared/data --weights out/weights-2 --old-clicks out/weights-2/clicks --out out/weights-3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from defectcam.command_line import command_parser, count
from defectcam.evaluation.photos import labelled_photos
from defectcam.feedback.compare import changes_of, compare, figures_of, no_worse, report, write_pictures
from defectcam.feedback.versions import NOT_PROMOTED, assemble, parent_of, publish
from defectcam.licences import read_licences
from defectcam.paths import file_name, inside
from defectcam.predict import device_and_engine, open_weights
from defectcam.settings import RequestError
from defectcam.text import read_text
from defectcam.training import train
from defectcam.training.calibrate import calibrate, say
from defectcam.training.clicks import Click, photo_path, read_clicks, split_stems, write_clicks
from defectcam.training.config import TrainConfig, architecture_of, labels_of, names
from defectcam.training.dataset import PhotoLabels
from defectcam.training.labels import read_own_mask, read_photo_rgb
from defectcam.weights import DefectConfig, WeightsError, add_weights_option, load_weights, read_manifest, sha256_of, write_whole

STEPS = 400
# The paper's rate, and for the head ten times as much, as the shipped weights were trained.
LR, HEAD_LR = 1e-4, 1e-3
MARGIN = 0.02  # two clicks in a hundred: less than annotators notice
SETS = ("sets", "none_sets", "val_sets", "healthy_sets")


@dataclass(frozen=True)
class Plan:
    """What one defect is retrained from.

    Attributes:
        defect: its name.
        defect_config: the running weights' manifest entry.
        sets: "sets" and "none_sets", whose train photos are learnt from, with the defect and without it; "val_sets" and
            "healthy_sets", whose val photos judge, with the defect and without it.
        clicks: old and new ones of people.
        new: how many of them are not among the old ones.
        on_val: how many clicks were left out, since they are on val photos.
    """

    defect: str
    defect_config: DefectConfig
    sets: dict[str, list[str]]
    clicks: list[Click]
    new: int
    on_val: int

    def identity(self) -> dict:
        """What defines the run, for its record."""
        counts = {"clicks": len(self.clicks), "new_clicks": self.new, "on_val": self.on_val}
        return {**self.sets, **counts, "clicks_sha256": hashlib.sha256(repr(self.clicks).encode()).hexdigest()}


def merged_clicks(old: Sequence[Click], new: Sequence[Click], harvested: Set[str] = frozenset()) -> list[Click]:
    """Old clicks, then new ones. What a later harvest says of an interaction replaces what an earlier one said.

    Args:
        harvested: photo groups of the later harvest: interactions on them that it does not know are gone.
    """
    known = {click.interaction for click in new} - {""}
    kept = [click for click in old if click.interaction not in known]
    return [click for click in kept if not (click.interaction and click.photo_group in harvested)] + list(new)


def harvested_groups(folder: Path) -> set[str]:
    """The photo groups that have a mask in a folder of one defect's masks, as weak-labels writes them."""
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png")}


def clicks_of(folder: Path | None, defect: str) -> list[Click]:
    """The clicks of <folder>/<defect>.csv, none where there is no such file.

    Raises:
        ValueError: a click is of another defect, or as `read_clicks`.
        FileNotFoundError: a photo is not there.
    """
    path = folder / file_name(defect, ".csv") if folder else None
    if path is None or not path.exists():
        return []
    clicks = read_clicks(path, with_photos=True)
    for click in clicks:
        if click.defect not in (defect, "none"):
            raise ValueError(f"{path} has a click on {click.defect!r}; a defect's file holds its own clicks and negative clicks")
    return clicks


def sets_of(defect: str, defect_config: DefectConfig, args: argparse.Namespace) -> dict[str, list[str]]:
    """The sets to learn from and to judge by: those of the options, else those of the running weights.

    Raises:
        ValueError: they are not known, or not in the data folder.
    """
    remedy = "name sets of yours with --sets and --none-sets"
    if args.sets:
        found = (args.sets, args.none_sets, args.sets, args.none_sets)
    elif not defect_config.training.get("sets"):
        raise ValueError(f"{args.weights} does not say from which sets its {defect} weights were made: {remedy}")
    else:
        val, healthy = defect_config.training["sets"], defect_config.training["healthy_sets"]
        run = defect_config.training.get("network", {})
        found = (run.get("sets", val), run.get("none_sets", healthy), val, healthy)
    splits = json.loads(read_text(args.data / "splits.json"))
    for name in sum(found, []):
        if name not in splits:
            raise ValueError(f"{args.data / 'splits.json'} has no set {name!r} for {defect}: {remedy}")
    return dict(zip(SETS, found))


def make_plans(args: argparse.Namespace, configs: dict[str, DefectConfig]) -> list[Plan]:
    """Plans of the defects that have new clicks beside the val photos.

    Raises:
        ValueError, FileNotFoundError: as `clicks_of` and `sets_of`.
    """
    new_dir = args.new / "clicks"
    sets = {defect: sets_of(defect, configs[defect], args) for defect in args.defects or configs if clicks_of(new_dir, defect)}
    judging = {name for of_defect in sets.values() for name in of_defect["val_sets"] + of_defect["healthy_sets"]}
    stems = [(name, stem) for name in sorted(judging) for stem in split_stems(args.data, name, "val")]
    val = {sha256_of(photo_path(args.data / name, stem)) for name, stem in tqdm(stems, desc="val photos", unit="photo")}
    plans = []
    for defect, of_defect in sets.items():
        new, old = clicks_of(new_dir, defect), clicks_of(args.old_clicks, defect)
        digests = {image: sha256_of(Path(image)) for image in {click.image for click in [*old, *new]}}
        merged = merged_clicks(old, new, harvested_groups(args.new / "masks" / file_name(defect)))
        kept = [click for click in merged if digests[click.image] not in val]
        added, on_val = sum(click not in old for click in kept), len(merged) - len(kept)
        say(f"{defect}: {len(kept)} clicks, {added} of them new; left out, being on val photos: {on_val}")
        if added:
            plans.append(Plan(defect, configs[defect], of_defect, kept, added, on_val))
    return plans


def begin(out: Path, identity: dict) -> dict:
    """Start or go on with a run; returns its state so far.

    Raises:
        ValueError: the folder holds something else.
    """
    record = out / "retrain.json"
    if record.exists():
        state = json.loads(record.read_text())
        changed = sorted(name for name in identity if identity[name] != state.get("identity", {}).get(name))
        if changed:
            raise ValueError(f"{out} holds a run with other {', '.join(changed)}: choose another --out")
        say(f"going on with the run in {out}")
        return state
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no run of defectcam retrain: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    state = {"command": "defectcam " + shlex.join(sys.argv[1:]), "identity": identity}
    save_state(out, state)
    return state


def save_state(out: Path, state: dict) -> None:
    """Keep what is known of a run, so that it can go on when it is cut off."""
    write_whole(out / "retrain.json", f"{json.dumps(state, indent=1)}\n".encode())


def train_network(args: argparse.Namespace, plan: Plan, out: Path) -> None:
    """Train from the running weights on clicks or outlines; goes on where a run was cut off.

    Architecture, crops and what is learnt of the sets are those of the running weights.
    """
    defect_config, record = plan.defect_config, plan.defect_config.training.get("network", {})
    kept = ("crop_px", "batch", "scales", "none_regions", "negative_share")
    earlier = {name: record[name] for name in kept if name in record}
    config = TrainConfig(
        defect=plan.defect, data=args.data, sets=tuple(plan.sets["sets"]), none_sets=tuple(plan.sets["none_sets"]),
        labels=labels_of(record), clicks=None if args.outlines else args.out / "clicks" / file_name(plan.defect, ".csv"),
        init=args.weights / defect_config.file, lr=LR, head_lr=HEAD_LR, steps=args.steps, val_every=min(100, args.steps),
        **architecture_of(defect_config),
        **{name: tuple(value) if isinstance(value, list) else value for name, value in earlier.items()},
    )  # fmt: skip
    train.train(config, out, more=finished_outlines(args, plan) if args.outlines else ())


def finished_outlines(args: argparse.Namespace, plan: Plan) -> list[PhotoLabels]:
    """The photos with clicks that `weak-labels` wrote finished outlines of."""
    image_of_group = {click.photo_group: click.image for click in plan.clicks}
    folder, found = args.new / "masks" / file_name(plan.defect), []
    for group, image in image_of_group.items():
        mask = inside(folder, f"{group}.png")
        if mask.exists():
            image_rgb = read_photo_rgb(image)
            found.append(PhotoLabels(image_rgb, read_own_mask(mask, *image_rgb.shape[:2])))
    return found


def calibrated(args: argparse.Namespace, plan: Plan, work: Path) -> Path:
    """Calibrate the new network, unless that is done; returns the folder with the defect's weights."""
    out = work / "weights"
    try:
        read_manifest(out)
        return out
    except WeightsError:  # not there, or cut off
        shutil.rmtree(out, ignore_errors=True)
    calibrate(
        argparse.Namespace(
            defect=plan.defect, network=work / "network", data=args.data, sets=plan.sets["val_sets"],
            healthy_sets=plan.sets["healthy_sets"], photos=args.val_photos, iterations=plan.defect_config.iterations, out=out,
        ),
        read_licences(args.licences) if args.licences else None,
    )  # fmt: skip
    return out


def retrain(args: argparse.Namespace) -> bool:
    """Run all stages as the arguments say, or go on with them; returns whether the new weights were promoted.

    Raises:
        WeightsError, RequestError, ValueError, FileNotFoundError: bad input, named with the remedy.
    """
    configs = read_manifest(args.weights)[1]
    unknown = sorted(set(args.defects or ()) - set(configs))
    if unknown:
        raise ValueError(f"--defects names {unknown[0]}; {args.weights} has weights for {list(configs)}")
    known = {file_name(defect, ".csv") for defect in configs}
    for path in sorted((args.new / "clicks").glob("*.csv")):
        if path.name not in known:
            say(f"{path} is left aside: {args.weights} has no {path.stem} weights to start from; use defectcam train")
    plans = make_plans(args, configs)
    if not plans:
        raise ValueError(
            f"nothing to learn: no new clicks in {args.new / 'clicks'} for {args.defects or list(configs)}; harvest "
            "completed jobs and write their weak labels first"
        )
    identity = {
        "parent": parent_of(args.weights),
        "data": str(args.data.resolve()),
        "splits_sha256": sha256_of(args.data / "splits.json"),
        "defects": {plan.defect: plan.identity() for plan in plans},
        "outlines": args.outlines,
        "steps": args.steps,
        "val_photos": args.val_photos,
        "margin": args.margin,
        "licences": read_licences(args.licences) if args.licences else None,
    }
    state = begin(args.out, identity)
    if "promoted" not in state:
        load_weights(args.weights)  # what is altered or truncated shows here, and not after hours
        state |= run_stages(args, plans, [defect for defect in configs if defect not in identity["defects"]])
        save_state(args.out, state)
    for defect, changes in state["changes"].items():
        say(f"{defect}: " + ", ".join(f"{name} {change:+.4f}" for name, change in changes.items()))
    folder = args.out if state["promoted"] else args.out / "rejected"
    say(f"report: {(folder / 'report.html').resolve()}")
    if state["promoted"]:
        say(f"promoted: {folder}; deploy it with: ./deploy.sh weights {folder}")
    else:
        say(f"not promoted: worse by more than {args.margin}; the new weights are in {folder}, the running ones stay")
    return state["promoted"]


def run_stages(args: argparse.Namespace, plans: Sequence[Plan], kept: list[str]) -> dict:
    """Everything from the clicks to the report; returns what the run's record keeps of it.

    Args:
        kept: names of the defects whose weights stay as they are.
    """
    device_and_engine(os.environ)  # refuses bad settings before hours of training
    (args.out / "clicks").mkdir(exist_ok=True)
    calibrated_dirs, work = {}, args.out / "work"
    for plan in plans:
        write_clicks(args.out / "clicks" / file_name(plan.defect, ".csv"), plan.clicks)
        say(f"{plan.defect}: training")
        train_network(args, plan, work / file_name(plan.defect) / "network")
        say(f"{plan.defect}: calibration")
        calibrated_dirs[plan.defect] = calibrated(args, plan, work / file_name(plan.defect))
    candidate = assemble(args.weights, calibrated_dirs, work / "candidate")
    predictors = {"running": open_weights(args.weights), "candidate": open_weights(candidate)}
    defects, answers = [], {}
    for plan in plans:
        say(f"{plan.defect}: comparison")
        sets = plan.sets["val_sets"], plan.sets["healthy_sets"]
        photos = labelled_photos(args.data, *sets, "val", plan.defect, args.val_photos)
        answers[plan.defect] = compare(photos, plan.defect, predictors, work / "masks")
        figures = figures_of(plan.defect, answers[plan.defect])
        counts = {"new": plan.new, "clicks": len(plan.clicks), "on_val": plan.on_val}
        defects.append({"name": plan.defect, **counts, "figures": figures, "changes": changes_of(figures["all"])})
    promoted = all(no_worse(defect["changes"], args.margin) for defect in defects)
    folder = args.out if promoted else args.out / "rejected"
    folder.mkdir(parents=True, exist_ok=True)
    for defect in defects:
        defect["pictures"] = write_pictures(defect["name"], answers[defect["name"]], folder)
    running, new = (predictor.weights.version for predictor in predictors.values())
    html = report(new, running, promoted=promoted, margin=args.margin, kept=kept, defects=defects)
    (folder / "report.html").write_text(html, encoding="utf-8")
    publish(candidate, folder)
    return {"promoted": promoted, **{key: {one["name"]: one[key] for one in defects} for key in ("changes", "figures")}}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("retrain", __doc__)
    add_weights_option(parser, "the running weights")
    parser.add_argument(
        "--new", type=Path, default=Path("out/feedback"), help="folder of defectcam weak-labels (default: %(default)s)"
    )
    parser.add_argument("--old-clicks", type=Path, help="folder of <defect>.csv: clicks that were learnt from before")
    parser.add_argument("--outlines", action="store_true", help="train on the finished outlines in --new instead of on clicks")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json: its val photos judge")
    parser.add_argument("--sets", type=names, default=[], help="sets with the defect (default: those of the running weights)")
    parser.add_argument("--none-sets", type=names, default=[], help="with --sets: sets without the defect")
    parser.add_argument("--defects", type=names, help="retrain these alone (default: all with new clicks)")
    parser.add_argument("--steps", type=count, default=STEPS, help="of every training (default: %(default)s)")
    parser.add_argument("--licences", type=Path, help="JSON file with the licences of the sets (default: all are unknown)")
    parser.add_argument("--val-photos", type=int, help="val photos of each set at most (default: all)")
    parser.add_argument(
        "--margin", type=float, default=MARGIN,
        help="how much worse a figure may be, 0 to 1; below 0: how much better it must be (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the new version")
    args = parser.parse_args(argv)
    if not -1 <= args.margin <= 1:
        parser.error(f"--margin is {args.margin}; allowed is -1 to 1")
    if args.none_sets and not args.sets:
        parser.error("--none-sets goes with --sets")
    if not (args.data / "splits.json").exists():
        parser.error(f"no splits.json in {args.data}: name the folder of photo sets with --data")
    if not (args.new / "clicks").is_dir():
        parser.error(f"no clicks in {args.new}: name the folder that defectcam weak-labels wrote with --new")
    if args.old_clicks and not args.old_clicks.is_dir():
        parser.error(f"--old-clicks {args.old_clicks} is no folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam retrain`."""
    args = parse_args(argv)
    try:
        promoted = retrain(args)
    except (WeightsError, RequestError, ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    if not promoted:
        sys.exit(NOT_PROMOTED)
