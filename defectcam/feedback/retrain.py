"""New weights from the running ones and from what annotators did: the loop closes (paper, Fig. 1).

1. Training: the network of every defect with new clicks starts from the running weights and learns from old and new
   clicks together; with --outlines not from clicks but from the finished outlines of the photos that were clicked on. What
   the running weights learnt of the sets is learnt again beside them.
2. Calibration on the val photos, as in `defectcam calibrate`.
3. Comparison: running and new weights answer the same val photos.
4. Promotion: if for no defect one of two figures is worse by more than --margin. `mean_saved` is the share of clicks
   that a simulated annotator saves, the mean over all instances: what Eq. 3 of the paper counts in groups, but without
   its steps. `iou` is that of all pixels, photos without the defect included, so false proposals count.

Clicks on val photos are left out. Defects without new clicks keep the running weights bit for bit. Nothing is
overwritten: OUT must not exist, or hold a run of the same command that was cut off, which then goes on.

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
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import jinja2
import numpy as np
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.evaluation.figures import COLUMNS, figures, painted
from defectcam.evaluation.measures import iou
from defectcam.evaluation.photos import LabelledPhoto, labelled_photos
from defectcam.evaluation.report import compared
from defectcam.feedback.replay import FOLDER as REPLAY
from defectcam.paths import file_name, inside, relative_path, write_image
from defectcam.predict import Predictor, device_and_engine
from defectcam.request import RequestError
from defectcam.text import read_text
from defectcam.training import train
from defectcam.training.calibrate import calibrate, say
from defectcam.training.clicks import Click, photo_path, read_clicks, split_stems, write_clicks
from defectcam.training.labels import read_own_mask, read_photo_rgb
from defectcam.training.config import TrainConfig, labels_of, names
from defectcam.training.dataset import PhotoLabels
from defectcam.weights import DefectWeights, WeightsError, load_weights, read_manifest, sha256_of, write_manifest

NOT_PROMOTED = 3
STEPS = 400
# The paper's rate, and for the head ten times as much, as the shipped weights were trained.
LR, HEAD_LR = 1e-4, 1e-3
MARGIN = 0.02  # two clicks in a hundred: less than annotators notice
SETS = ("sets", "none_sets", "val_sets", "healthy_sets")
JUDGED_BY = ("mean_saved", "iou")
PICTURES = 12
PICTURE_PX = 360


@dataclass(frozen=True)
class Plan:
    """What one defect is retrained from.

    Attributes:
        defect: its name.
        fact: the running weights' manifest entry.
        sets, none_sets: whose train photos are learnt from, with the defect and without it.
        val_sets, healthy_sets: whose val photos judge, with the defect and without it.
        clicks: old and new ones of people.
        new: how many of them are not among the old ones.
        on_val: how many clicks were left out, since they are on val photos.
    """

    defect: str
    fact: DefectWeights
    sets: list[str]
    none_sets: list[str]
    val_sets: list[str]
    healthy_sets: list[str]
    clicks: list[Click]
    new: int
    on_val: int

    def facts(self) -> dict:
        """What defines the run, for its record."""
        clicks = hashlib.sha256(repr(self.clicks).encode()).hexdigest()
        sets = {name: getattr(self, name) for name in SETS}
        return {**sets, "clicks": len(self.clicks), "new_clicks": self.new, "on_val": self.on_val, "clicks_sha256": clicks}


@dataclass(frozen=True, eq=False)
class Judged:
    """A val photo with the masks that both versions propose, (H, W) bool at photo scale."""

    photo: LabelledPhoto
    running: np.ndarray
    candidate: np.ndarray


def merged_clicks(old: Sequence[Click], new: Sequence[Click], harvested: Set[str] = frozenset()) -> list[Click]:
    """Old clicks, then new ones. What a later harvest says of an interaction replaces what an earlier one said.

    Args:
        harvested: photo groups of the later harvest: interactions on them that it does not know are gone.
    """
    known = {click.interaction for click in new} - {""}
    kept = [click for click in old if click.interaction not in known]
    return [click for click in kept if not (click.interaction and click.photo_group in harvested)] + list(new)


def harvested_groups(folder: Path) -> set[str]:
    """The photo groups of which weak-labels wrote a mask to a folder of masks of one defect."""
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
            raise ValueError(f"{path} has a click on {click.defect!r}; a defect's file holds its own clicks and none-clicks")
    return clicks


def sets_of(defect: str, fact: DefectWeights, args: argparse.Namespace) -> dict[str, list[str]]:
    """The sets to learn from and to judge by: those of the options, else those of the running weights.

    Raises:
        ValueError: they are not known, or not in the data folder.
    """
    remedy = "name sets of yours with --sets and --none-sets"
    if args.sets:
        found = (args.sets, args.none_sets, args.sets, args.none_sets)
    elif not fact.training.get("sets"):
        raise ValueError(f"{args.weights} does not say from which sets its {defect} weights were made: {remedy}")
    else:
        val, healthy = fact.training["sets"], fact.training["healthy_sets"]
        run = fact.training.get("network", {})
        found = (run.get("sets", val), run.get("none_sets", healthy), val, healthy)
    there = json.loads(read_text(args.data / "splits.json"))
    for name in (name for group in found for name in group):
        if name not in there:
            raise ValueError(f"{args.data / 'splits.json'} has no set {name!r} for {defect}: {remedy}")
    return dict(zip(SETS, found))


def make_plans(args: argparse.Namespace, facts: dict[str, DefectWeights]) -> list[Plan]:
    """Plans of the defects that have new clicks beside the val photos.

    Raises:
        ValueError, FileNotFoundError: as `clicks_of` and `sets_of`.
    """
    new_dir = args.new / "clicks"
    sets = {defect: sets_of(defect, facts[defect], args) for defect in args.defects or facts if clicks_of(new_dir, defect)}
    judging = {name for own in sets.values() for group in ("val_sets", "healthy_sets") for name in own[group]}
    stems = [(name, stem) for name in sorted(judging) for stem in split_stems(args.data, name, "val")]
    val = {
        sha256_of(photo_path(args.data / name, stem)) for name, stem in tqdm(stems, desc="val photos", unit="photo")
    }
    plans = []
    for defect, own in sets.items():
        new, old = clicks_of(new_dir, defect), clicks_of(args.old_clicks, defect)
        digests = {image: sha256_of(Path(image)) for image in {click.image for click in [*old, *new]}}
        merged = merged_clicks(old, new, harvested_groups(args.new / "masks" / file_name(defect)))
        kept = [click for click in merged if digests[click.image] not in val]
        count = sum(click not in old for click in kept)
        on_val = len(merged) - len(kept)
        say(f"{defect}: {len(kept)} clicks, {count} of them new; left out, being on val photos: {on_val}")
        if count:
            plans.append(Plan(defect, facts[defect], **own, clicks=kept, new=count, on_val=on_val))
    return plans


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file in one move."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def begin(out: Path, facts: dict) -> dict:
    """Start or go on with a run; returns its state so far.

    Raises:
        ValueError: the folder holds something else.
    """
    record = out / "retrain.json"
    if record.exists():
        state = json.loads(record.read_text())
        changed = sorted(name for name in facts if facts[name] != state["facts"].get(name))
        if changed:
            raise ValueError(f"{out} holds a run with other {', '.join(changed)}: choose another --out")
        say(f"going on with the run in {out}")
        return state
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no run of defectcam retrain: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    state = {"command": "defectcam " + shlex.join(sys.argv[1:]), "facts": facts}
    write_json(record, state)
    return state


def train_network(args: argparse.Namespace, plan: Plan, out: Path) -> None:
    """Train from the running weights, on old and new clicks or on outlines; goes on where a run was cut off.

    Architecture, crops and what is learnt of the sets are those of the running weights.
    """
    fact, record = plan.fact, plan.fact.training.get("network", {})
    kept = ("crop_px", "batch", "scales", "none_regions", "negative_share")
    earlier = {name: record[name] for name in kept if name in record}
    config = TrainConfig(
        defect=plan.defect, data=args.data, sets=tuple(plan.sets), none_sets=tuple(plan.none_sets), labels=labels_of(record),
        clicks=None if args.outlines else args.out / "clicks" / file_name(plan.defect, ".csv"),
        encoder=fact.encoder, decoder=fact.decoder_channels, downsamplings=fact.downsamplings, pooling=fact.pooling,
        init=args.weights / fact.file, lr=LR, head_lr=HEAD_LR, steps=args.steps, val_every=min(100, args.steps),
        **{name: tuple(value) if isinstance(value, list) else value for name, value in earlier.items()},
    )  # fmt: skip
    train.train(config, out, more=finished_outlines(args, plan) if args.outlines else ())


def finished_outlines(args: argparse.Namespace, plan: Plan) -> list[PhotoLabels]:
    """The photos that were clicked on of which `weak-labels` wrote the finished outlines."""
    groups = {click.photo_group: click.image for click in plan.clicks}
    folder, found = args.new / "masks" / file_name(plan.defect), []
    for group, image in groups.items():
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
            defect=plan.defect, network=work / "network", data=args.data, sets=plan.val_sets,
            healthy_sets=plan.healthy_sets, photos=args.val_photos, iterations=plan.fact.iterations, out=out,
        )
    )  # fmt: skip
    return out


def assemble(weights: Path, new_dirs: dict[str, Path], parent: dict, folder: Path) -> Path:
    """Write the new version's weights to `folder`, all defects: the new ones, and the running weights for the others.

    The replay pack of the running weights goes along.
    """
    folder.mkdir(exist_ok=True)
    if (weights / REPLAY).is_dir():
        shutil.copytree(weights / REPLAY, folder / REPLAY, dirs_exist_ok=True)
    entries = json.loads((weights / "manifest.json").read_text())["defects"]
    for defect in entries:
        source = new_dirs.get(defect, weights)
        entries[defect] = json.loads((source / "manifest.json").read_text())["defects"][defect]
        for field, suffix in (("file", ".safetensors"), ("graph", ".onnx")):
            if not entries[defect].get(field):
                continue
            file = file_name(defect, suffix)  # the same name may stand for another defect's file in the other folder
            shutil.copyfile(source / entries[defect][field], folder / file)
            entries[defect][field] = file
    write_manifest(folder, entries, parent)
    return folder


def answered(predictor: Predictor, photo: LabelledPhoto, defect: str, folder: Path) -> np.ndarray:
    """All pixels that are proposed for a photo, (H, W) bool; kept in `folder` and read from there."""
    path = folder / file_name(defect) / relative_path(f"{photo.set_name}/{photo.stem}", ".png")
    size = photo.image_rgb.shape[:2]
    if path.exists():
        with contextlib.suppress(ValueError):  # cut off while it was written
            return read_own_mask(path, *size) > 0
    mask = painted([one.component for one in predictor.propose(photo.image_rgb, defect)], size)
    write_image(path, mask.astype(np.uint8) * 255)
    return mask


def compare(args: argparse.Namespace, plan: Plan, predictors: dict[str, Predictor]) -> list[Judged]:
    """The answers of both versions, "running" and "candidate", on the val photos."""
    photos = labelled_photos(args.data, plan.val_sets, plan.healthy_sets, "val", plan.defect, args.val_photos)
    masks = args.out / "work" / "masks"
    return [
        Judged(photo, **{name: answered(one, photo, plan.defect, masks / name) for name, one in predictors.items()})
        for photo in photos
    ]


def figures_of(defect: str, judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, float]]]:
    """Measures per set, and of all photos together as "all", of both versions: set -> version -> figures.

    What is proposed on a photo without the defect lowers `iou` of the set that has it, and of "all".
    """
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        groups.setdefault(one.photo.set_name, []).append(one)
    return {
        set_name: {
            version: figures(defect, [(one.photo, getattr(one, version)) for one in group])
            for version in ("running", "candidate")
        }
        for set_name, group in [*groups.items(), ("all", judged)]
    }


def changes_of(of_all: dict[str, dict[str, float]]) -> dict[str, float]:
    """By how much the new weights are better in what they are judged by; below 0: worse."""
    return {name: round(of_all["candidate"][name] - of_all["running"][name], 4) for name in JUDGED_BY}


def no_worse(changes: dict[str, float], margin: float) -> bool:
    """Whether nothing is worse by more than the margin."""
    return all(change >= -margin for change in changes.values())


def most_different(judged: Sequence[Judged]) -> list[Judged]:
    """The photos on which the two versions agree least; those with the same answers are left out."""
    differing = [one for one in judged if (one.running != one.candidate).any()]
    return sorted(differing, key=lambda one: iou(one.running, one.candidate))[:PICTURES]


def picture_of(one: Judged) -> np.ndarray:
    """The photo, the running weights' answer and the new ones' (h, w, 3) uint8 RGB, from left to right."""
    truth = np.zeros_like(one.running) if one.photo.truth is None else one.photo.truth
    views = [one.photo.image_rgb] + [compared(one.photo.image_rgb, mask, truth) for mask in (one.running, one.candidate)]
    height, width = one.running.shape
    size = (PICTURE_PX, max(1, round(PICTURE_PX * height / width)))
    how = cv2.INTER_AREA if width > PICTURE_PX else cv2.INTER_LINEAR
    return np.hstack([cv2.resize(view, size, interpolation=how) for view in views])


PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Weights {{ version }} against {{ parent }}</title>
<style>
 body { font: 14px/1.4 sans-serif; margin: 2em } table { border-collapse: collapse } td, th { padding: 2px 9px }
 td { text-align: right } td:nth-child(-n+2) { text-align: left } tr:nth-child(4n+2), tr:nth-child(4n+3) { background: #f3f3f3 }
 figure { margin: 1em 0 } img { display: block; max-width: 100% } .worse { color: #a00 }
</style>
<h1>Weights {{ version }} against the running ones, {{ parent }}</h1>
<p>{% if promoted %}<b>Promoted.</b>{% else %}<b class="worse">Not promoted.</b>{% endif %} A defect may be worse by
 {{ margin }} in <code>mean_saved</code> (share of clicks saved, mean over instances) and in <code>iou</code> (all pixels, photos
 without the defect included). Thresholds of both were chosen on these photos, so expect less on new ones.
 {% if kept %}As they were: {{ kept|join(", ") }}.{% endif %}</p>
{% for defect in defects %}<h2>{{ defect.name }}: {{ defect.new }} new clicks of {{ defect.clicks }} by people</h2>
<p>{% for name, change in defect.changes.items() %}{{ name }} {{ "%+.4f"|format(change) }}
 {%- if change < -margin %} <b class="worse">worse by more than {{ margin }}</b>{% endif %}{{ ", " if not loop.last }}{% endfor %}.
 {%- if defect.on_val %} {{ defect.on_val }} clicks on val photos were left out.{% endif %}</p>
<table><tr><th>set<th>weights{% for column in columns %}<th>{{ column }}{% endfor %}</tr>
{% for set_name, versions in defect.figures.items() %}{% for version, own in versions.items() -%}
<tr><td>{{ set_name }}<td>{{ "running" if version == "running" else "new" }}
 {%- for column in columns %}<td>{{ own[column] if column in own }}{% endfor %}</tr>
{% endfor %}{% endfor %}</table>
{% if defect.pictures %}<h3>Where they differ most: photo, running, new (missed green, too much red, right yellow)</h3>
{% for file, name in defect.pictures %}<figure><img src="{{ file|urlencode }}" alt="{{ name }}" loading="lazy">
 <figcaption>{{ name }}</figcaption></figure>
{% endfor %}{% else %}<p>Both answer the same on all photos.</p>{% endif %}
{% endfor %}</html>
""",
    autoescape=True,
)


def pictures_of(plan: Plan, judged: Sequence[Judged], folder: Path) -> list[tuple[str, str]]:
    """Write the pictures of a defect; returns their paths within `folder` and what they show."""
    shown = []
    for one in most_different(judged):
        file = "pictures" / Path(file_name(plan.defect)) / relative_path(f"{one.photo.set_name}/{one.photo.stem}", ".jpg")
        write_image(folder / file, cv2.cvtColor(picture_of(one), cv2.COLOR_RGB2BGR))
        shown.append((file.as_posix(), f"{one.photo.set_name} {one.photo.stem}"))
    return shown


def publish(candidate: Path, folder: Path) -> None:
    """Copy a weights folder, its manifest last and in one move, so a manifest is never there without its files."""
    for path in (*candidate.glob("*.safetensors"), *candidate.glob("*.onnx")):
        shutil.copyfile(path, folder / path.name)
    if (candidate / REPLAY).is_dir():
        shutil.copytree(candidate / REPLAY, folder / REPLAY, dirs_exist_ok=True)
    shutil.copyfile(candidate / "manifest.json", folder / "manifest.tmp")
    (folder / "manifest.tmp").replace(folder / "manifest.json")


def retrain(args: argparse.Namespace) -> bool:
    """Run all stages as the arguments say, or go on with them; returns whether the new weights were promoted.

    Raises:
        WeightsError, RequestError, ValueError, FileNotFoundError: bad input, named with the remedy.
    """
    running_version, running_facts = read_manifest(args.weights)
    unknown = sorted(set(args.defects or ()) - set(running_facts))
    if unknown:
        raise ValueError(f"--defects names {unknown[0]}; {args.weights} has weights for {list(running_facts)}")
    known = {file_name(defect, ".csv") for defect in running_facts}
    for path in sorted((args.new / "clicks").glob("*.csv")):
        if path.name not in known:
            say(f"{path} is left aside: {args.weights} has no {path.stem} weights to start from; use defectcam train")
    plans = make_plans(args, running_facts)
    if not plans:
        raise ValueError(
            f"nothing to learn: no new clicks in {args.new / 'clicks'} for {args.defects or list(running_facts)}; harvest "
            "completed jobs and write their weak labels first"
        )
    parent = {"version": running_version, "manifest_sha256": sha256_of(args.weights / "manifest.json")}
    facts = {
        "parent": parent,
        "data": str(args.data.resolve()),
        "splits_sha256": sha256_of(args.data / "splits.json"),
        "defects": {plan.defect: plan.facts() for plan in plans},
        "outlines": args.outlines,
        "steps": args.steps,
        "val_photos": args.val_photos,
        "margin": args.margin,
    }
    state = begin(args.out, facts)
    if "promoted" not in state:
        load_weights(args.weights)  # what is altered or truncated shows here, and not after hours
        state |= run_stages(args, plans, parent, [defect for defect in running_facts if defect not in facts["defects"]])
        write_json(args.out / "retrain.json", state)
    for defect, changes in state["changes"].items():
        say(f"{defect}: " + ", ".join(f"{name} {change:+.4f}" for name, change in changes.items()))
    folder = args.out if state["promoted"] else args.out / "rejected"
    say(f"report: {(folder / 'report.html').resolve()}")
    if state["promoted"]:
        say(f"promoted: {folder}; deploy it with: ./deploy.sh weights {folder}")
    else:
        say(f"not promoted: worse by more than {args.margin}; the new weights are in {folder}, the running ones stay")
    return state["promoted"]


def run_stages(args: argparse.Namespace, plans: Sequence[Plan], parent: dict, kept: list[str]) -> dict:
    """Everything from the clicks to the report; returns what the run's record keeps of it."""
    hardware = device_and_engine(os.environ)
    (args.out / "clicks").mkdir(exist_ok=True)
    calibrated_dirs = {}
    for plan in plans:
        write_clicks(args.out / "clicks" / file_name(plan.defect, ".csv"), plan.clicks)
        work = args.out / "work" / file_name(plan.defect)
        say(f"{plan.defect}: training")
        train_network(args, plan, work / "network")
        say(f"{plan.defect}: calibration")
        calibrated_dirs[plan.defect] = calibrated(args, plan, work)
    candidate = assemble(args.weights, calibrated_dirs, parent, args.out / "work" / "candidate")
    folders = {"running": args.weights, "candidate": candidate}
    predictors = {name: Predictor(load_weights(folder), *hardware) for name, folder in folders.items()}
    of_defects, judged = [], {}
    for plan in plans:
        say(f"{plan.defect}: comparison")
        judged[plan.defect] = compare(args, plan, predictors)
        found = figures_of(plan.defect, judged[plan.defect])
        of_defects.append(
            {"name": plan.defect, "new": plan.new, "clicks": len(plan.clicks), "on_val": plan.on_val,
             "figures": found, "changes": changes_of(found["all"])}
        )  # fmt: skip
    promoted = all(no_worse(own["changes"], args.margin) for own in of_defects)
    folder = args.out if promoted else args.out / "rejected"
    for plan, own in zip(plans, of_defects):
        own["pictures"] = pictures_of(plan, judged[plan.defect], folder)
    page = PAGE.render(
        version=predictors["candidate"].weights.version, parent=parent["version"], promoted=promoted, margin=args.margin,
        kept=kept, defects=of_defects, columns=dict.fromkeys([*JUDGED_BY, *COLUMNS]),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page, encoding="utf-8")
    publish(candidate, folder)
    return {
        "promoted": promoted,
        "changes": {own["name"]: own["changes"] for own in of_defects},
        "figures": {own["name"]: own["figures"] for own in of_defects},
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("retrain", __doc__)
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="the running weights (default: %(default)s)")
    parser.add_argument(
        "--new", type=Path, default=Path("out/feedback"), help="folder of defectcam weak-labels (default: %(default)s)"
    )
    parser.add_argument("--old-clicks", type=Path, help="folder of <defect>.csv: clicks that were learnt from before")
    parser.add_argument("--outlines", action="store_true", help="train on the finished outlines in --new instead of on clicks")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json: its val photos judge")
    parser.add_argument("--sets", type=names, default=[], help="sets with the defect (default: those of the running weights)")
    parser.add_argument("--none-sets", type=names, default=[], help="with --sets: sets without the defect")
    parser.add_argument("--defects", type=names, help="retrain these alone (default: all with new clicks)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every training (default: %(default)s)")
    parser.add_argument("--val-photos", type=int, help="val photos of each set at most (default: all)")
    parser.add_argument(
        "--margin", type=float, default=MARGIN,
        help="how much worse a figure may be, 0 to 1; below 0: how much better it must be (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the new version")
    args = parser.parse_args(argv)
    if not -1 <= args.margin <= 1:
        parser.error(f"--margin is {args.margin}; allowed is -1 to 1")
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; allowed is 1 or more")
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
