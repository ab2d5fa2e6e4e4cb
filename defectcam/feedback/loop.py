"""Does the loop teach anything? Two rounds with simulated annotators on photos with known outlines (paper, Fig. 1).

1. Of every set the first half of the train photos teaches round 1: clicks, then calibration on val.
2. Round 1's function proposes on photos of the other half, which it never saw. Simulated annotators treat the
   proposals (below); what they leave goes through `harvest`, its database and `weak-labels`, as from a real CVAT.
3. Round 2 goes on from round 1's network, every arm's with the same number of steps:
   same_clicks     round 1's clicks alone: what more steps are worth
   plain_clicks    and as many positive and none-clicks, given on the same photos without proposals
   loop            and the clicks from what annotators did: hard negatives where they rejected
   loop_outlines   and, instead of those clicks, the finished outlines, read per pixel
4. All arms are calibrated on the same val photos and compared.

Simulated annotators know the true outlines. A proposal on a defect that saves them 95 % of the clicks they accept, one
that saves anything they correct to the true outline, others they delete and draw the defect by hand; a proposal
away from all defects they reject. With the probability --error they overlook a defect that nothing was proposed for,
and accept a false proposal.

OUT/loop.md, loop.json, loop.png    what came out; the rest of OUT is the work, not needed once it is done. A run that
was cut off goes on when the same command is given again.

Example:
    defectcam loop --defect crack --data ../shared/data --sets deepcrack --none-sets phinet_labelled,cis_corrosion \\
        --out out/loop
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import jinja2
import matplotlib
import numpy as np
from tqdm import tqdm

from defectcam.bulk.exports import region_of_answer
from defectcam.command_line import command_parser
from defectcam.evaluation.figures import photo_figures, set_figures
from defectcam.evaluation.measures import SMALLEST_COMPONENT_PX, TOUCHING_PX, relative_time_saving
from defectcam.evaluation.photos import LabelledPhoto, labelled_photos
from defectcam.feedback.cvat import Frame, Job, JobEvents, Shape
from defectcam.feedback.harvest import Harvest, LoggedProposals, attributes_of
from defectcam.feedback.labels import PhotoFolder, write_weak_labels
from defectcam.feedback.regions import common_px, saved_share
from defectcam.feedback.store import InteractionRow, open_store
from defectcam.paths import file_name
from defectcam.predict import Predictor, device_and_engine
from defectcam.proposal_log import ProposalLog, read_proposal_log
from defectcam.proposals import Component, find_components
from defectcam.regions import merged, on_one_crop, run_lengths
from defectcam.request import Request, Settings
from defectcam.training import train
from defectcam.training.calibrate import calibrate, say
from defectcam.training.clicks import Click, photo_path, read_clicks, simulate_clicks, split_stems, write_clicks
from defectcam.training.config import TrainConfig, names
from defectcam.training.dataset import PhotoLabels
from defectcam.training.labels import read_own_mask, read_photo_rgb
from defectcam.weights import load_weights
from model_handler import ModelHandler

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from sqlalchemy import select  # noqa: E402
from sqlalchemy.orm import Session  # noqa: E402

ACCEPTED_FROM = 0.95  # share of clicks saved: Eq. 3's best group
ARMS = ("round_1", "same_clicks", "plain_clicks", "loop", "loop_outlines")
FIGURES = ("iou", "f1_2px", "mean_saved", "eq3", "false_components", "quiet_share")
LR, HEAD_LR = 5e-4, 5e-3
ITERATIONS = 2  # T of the function, the paper's
LOG = logging.getLogger("defectcam.loop")


@dataclass(frozen=True)
class Annotator:
    """A simulated annotator.

    Attributes:
        error: probability of overlooking what nothing was proposed for, and of accepting a false proposal.
        seed: fixes what is overlooked.
    """

    error: float
    seed: int

    def shapes(self, photo: LabelledPhoto, proposed: Sequence[dict], defect: str) -> list[Shape]:
        """The shapes left on a photo.

        Args:
            photo: with its truth, None without the defect.
            proposed: the function's answer, tags left out.
            defect: label of what is drawn by hand.
        """
        rng = np.random.default_rng((self.seed, *photo.stem.encode()))
        height, width = photo.image_rgb.shape[:2]
        truth = np.zeros((height, width), bool) if photo.truth is None else photo.truth
        proposals = [(shape, region_of_answer(shape, width, height)) for shape in proposed]
        left: dict[int, Shape] = {}  # by the proposal's index
        drawn = []
        touching_any: set[int] = set()
        components = [one for one in find_components(truth) if one.area_px >= SMALLEST_COMPONENT_PX]
        near = [_grown(one) for one in components]
        for component, around in zip(components, near):
            touching = [i for i, (_, region) in enumerate(proposals) if common_px(region, around)]
            touching_any |= set(touching)
            free = [i for i in touching if i not in left]
            if not touching:
                if rng.random() >= self.error:
                    drawn.append(component)
                continue
            before = merged([proposals[i][1] for i in touching])
            saved = saved_share(before, component, defect, width, height)
            if saved >= ACCEPTED_FROM:
                left |= {i: _kept(*proposals[i], defect) for i in free}
            elif saved > 0 and free:
                largest = max(free, key=lambda i: proposals[i][1].area_px)
                left[largest] = replace(_kept(*proposals[largest], defect), kind="mask", points=_points(component))
            else:
                drawn.append(component)
        for index, (shape, region) in enumerate(proposals):
            if index not in touching_any and rng.random() < self.error:
                left[index] = _kept(shape, region, defect)
        by_hand = [Shape(f"drawn {i}", defect, "mask", _points(one)) for i, one in enumerate(drawn)]
        return [*left.values(), *by_hand]


def _grown(component: Component) -> Component:
    """A component with all pixels from which a proposal counts as touching it."""
    (mask,), left, top = on_one_crop([component], TOUCHING_PX)
    return Component(cv2.dilate(mask.astype(np.uint8), np.ones((2 * TOUCHING_PX + 1,) * 2, np.uint8)) > 0, left, top)


def _points(region: Component) -> tuple[float, ...]:
    return tuple(map(float, run_lengths(region)))


def _kept(shape: dict, region: Component, defect: str) -> Shape:
    """A proposal as CVAT stores it."""
    name = attributes_of(shape)
    points = _points(region) if shape["type"] == "mask" else tuple(shape["points"])
    return Shape(f"auto {name['proposal']}", defect, shape["type"], points, "auto", name)


class Campaign:
    """A completed job of simulated annotators, read by `Harvest` as it reads CVAT.

    Args:
        handler: the function, with its proposal log.
        annotator: who treats its proposals.
        data: folder of sets.
        photos: of the job.
        defect: the job's only label.
    """

    name = "simulated"

    def __init__(
        self, handler: ModelHandler, annotator: Annotator, data: Path, photos: Sequence[LabelledPhoto], defect: str
    ) -> None:
        self.data, self.photos, self.defect = data, photos, defect
        self.left = []
        for photo in tqdm(photos, desc="campaign", unit="photo"):
            request = Request(self._path(photo).read_bytes(), Settings(defects=(defect,)), ())
            answer = [shape for shape in handler.answer(request) if shape["type"] != "tag"]
            self.left.append(tuple(annotator.shapes(photo, answer, defect)))

    def _path(self, photo: LabelledPhoto) -> Path:
        return photo_path(self.data / photo.set_name, photo.stem)

    def jobs(self) -> Iterator[Job]:
        """The one job."""
        yield Job(1, 1, 0, len(self.photos) - 1, "completed", "simulated", "2000-01-01", "2100-01-01", (self.defect,))

    def frames(self, job: Job) -> list[Frame]:
        """All photos with the shapes left on them."""
        return [
            Frame(number, str(self._path(photo).relative_to(self.data)), *photo.image_rgb.shape[1::-1], shapes)
            for number, (photo, shapes) in enumerate(zip(self.photos, self.left))
        ]

    def events(self, job: Job) -> JobEvents:
        """None: simulated annotators take no time."""
        return JobEvents()

    def photo_bytes(self, job: Job, frame: Frame) -> bytes:
        """The photo's file."""
        return (self.data / frame.name).read_bytes()


def half_data(data: Path, sets: Sequence[str], folder: Path, second: bool) -> Path:
    """A data folder with the first or second half of every set's train photos and all val photos."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name in sets:
        stems = split_stems(data, name, "train")
        half = len(stems) // 2
        splits[name] = {"train": stems[half:] if second else stems[:half], "val": split_stems(data, name, "val")}
        if not (folder / name).is_symlink():
            (folder / name).symlink_to((data / name).resolve())
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def as_many(clicks: Sequence[Click], wanted: Sequence[Click], seed: int) -> list[Click]:
    """Of the clicks as many positive and as many none-clicks as there are of `wanted`, at random, if there are."""
    rng, chosen = np.random.default_rng(seed), []
    for is_none in (False, True):
        own = [click for click in clicks if (click.defect == "none") == is_none]
        count = sum((click.defect == "none") == is_none for click in wanted)
        chosen += [own[index] for index in rng.permutation(len(own))[:count]]
    return chosen


class Experiment:
    """The arguments and the folders of one run; every stage that is done already is not done again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.out
        facts = {name: str(value) for name, value in vars(args).items() if name != "out"}
        written = self.work / "arguments.json"
        if written.exists() and json.loads(written.read_text()) != facts:
            sys.exit(f"{args.out} holds a run with other arguments, see {written}: choose another --out, or remove it")
        self.work.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(facts, indent=1))
        sets = [*args.sets, *args.none_sets]
        self.first = half_data(args.data, sets, self.work / "first", second=False)
        self.second = half_data(args.data, sets, self.work / "second", second=True)

    def train(self, arm: str, init: Path | None, clicks: Path | None, steps: int) -> Path:
        """Train a network on round 1's clicks and those of a file; returns the run's folder."""
        folder = self.work / arm / "network"
        if not (folder / "record.json").exists():
            train.train(self._config(init, steps, clicks), folder)
        return folder

    def train_outlines(self, arm: str, init: Path, masks: Path) -> Path:
        """Train a network on round 1's clicks and on finished outlines; returns the run's folder."""
        folder = self.work / arm / "network"
        if not (folder / "record.json").exists():
            photos = []
            for mask in sorted(masks.glob("*/*.png")):
                image_rgb = read_photo_rgb(photo_path(self.args.data / mask.parent.name, mask.stem))
                photos.append(PhotoLabels(image_rgb, read_own_mask(mask, *image_rgb.shape[:2])))
            train.train(self._config(init, self.args.steps, None), folder, more=photos)
        return folder

    def _config(self, init: Path | None, steps: int, clicks: Path | None) -> TrainConfig:
        args = self.args
        return TrainConfig(
            defect=args.defect, data=self.first, sets=tuple(args.sets), none_sets=tuple(args.none_sets), labels="clicks",
            clicks=clicks, init=init, lr=LR, head_lr=HEAD_LR, steps=steps, val_every=max(1, steps // 3),
            crop_px=args.crop_px, batch=args.batch, seed=args.seed, negative_share=0.5,
        )  # fmt: skip

    def calibrated(self, arm: str, network: Path) -> Path:
        """Weights of an arm, calibrated on val; returns their folder."""
        folder = self.work / arm / "weights"
        if not (folder / "manifest.json").exists():
            args = self.args
            calibrate(
                argparse.Namespace(
                    defect=args.defect, network=network, data=self.first, sets=args.sets, healthy_sets=args.none_sets,
                    photos=args.photos, iterations=ITERATIONS, out=folder,
                )
            )  # fmt: skip
        return folder

    def campaign(self, weights: Path) -> tuple[Counter, list[float]]:
        """Let annotators treat the proposals of some weights; returns outcomes and the share each defect saved."""
        args, feedback = self.args, self.work / "feedback"
        store = open_store(str(self.work / "feedback.db"))
        if not feedback.exists():
            log = ProposalLog(self.work / "proposals", LOG)
            device, engine = device_and_engine(os.environ)
            handler = ModelHandler(
                weights, device, Settings(), LOG, proposal_log=log, time_limit_s=math.inf, engine=engine
            )
            photos = list(labelled_photos(self.second, args.sets, args.none_sets, "train", args.defect, args.photos))
            source = Campaign(handler, Annotator(args.error, args.seed), self.second, photos, args.defect)
            harvest = Harvest(source, store, LoggedProposals(read_proposal_log(self.work / "proposals")))
            harvest.run()
            for note in harvest.notes:
                say(note)
            part = feedback.with_suffix(".part")
            write_weak_labels(store, PhotoFolder(self.second), args.crop_px, part)
            part.replace(feedback)
        with Session(store) as session:
            rows = session.scalars(select(InteractionRow)).all()
            return Counter(row.outcome for row in rows), [row.saved for row in rows if row.saved is not None]

    def run(self) -> dict:
        """All rounds and arms; returns what came out."""
        args = self.args
        one = self.train("round_1", args.init, None, args.first_steps)
        weights = {"round_1": self.calibrated("round_1", one)}
        outcomes, saved = self.campaign(weights["round_1"])
        say(f"annotators: {dict(outcomes)}")
        looped = self.work / "feedback" / "clicks" / file_name(args.defect, ".csv")
        if not looped.exists():
            sys.exit("nothing was proposed and every defect overlooked, so round 2 has nothing to learn: more --first-steps")
        new = read_clicks(looped)
        masks = self.work / "feedback" / "masks" / file_name(args.defect)
        given = [
            click
            for name in [*args.sets, *args.none_sets]
            for click in simulate_clicks(self.second, name, "train", args.defect, args.crop_px, 6, args.seed + 1)
            if (masks / f"{click.photo_group}.png").exists()
            and not (click.defect != "none" and name in args.none_sets)
        ]
        plain = as_many(given, new, args.seed)
        write_clicks(self.work / "plain.csv", plain)
        clicks = {"same_clicks": None, "plain_clicks": self.work / "plain.csv", "loop": looped}
        for arm, path in clicks.items():
            say(arm)
            folder = self.train(arm, one / "best.safetensors", path, args.steps)
            weights[arm] = self.calibrated(arm, folder)
        say("loop_outlines")
        folder = self.train_outlines("loop_outlines", one / "best.safetensors", masks)
        weights["loop_outlines"] = self.calibrated("loop_outlines", folder)
        return {
            "command": "defectcam " + shlex.join(sys.argv[1:]),
            "defect": args.defect,
            "error": args.error,
            "annotators": dict(sorted(outcomes.items())),
            "campaign_eq3": round(relative_time_saving(saved), 4),
            "clicks": {"loop": _kinds(new), "plain_clicks": _kinds(plain)},
            "arms": {arm: self._figures(folder) for arm, folder in weights.items()},
        }

    def _figures(self, weights: Path) -> dict:
        """Figures of an arm's weights on val, by set, and the minutes its network trained."""
        args, defect = self.args, self.args.defect
        predictor = Predictor(load_weights(weights), *device_and_engine(os.environ))
        by_set = {}
        for photo in labelled_photos(self.first, args.sets, args.none_sets, "val", defect, args.photos):
            proposals = [one.component for one in predictor.propose(photo.image_rgb, defect)]
            by_set.setdefault(photo.set_name, []).append(photo_figures(defect, photo, proposals))
        minutes = predictor.weights.facts[defect].training["network"]["minutes"]
        return {"minutes": minutes, "val": {name: set_figures(photos) for name, photos in by_set.items()}}


def _kinds(clicks: Sequence[Click]) -> dict[str, int]:
    none = sum(click.defect == "none" for click in clicks)
    return {"positive": len(clicks) - none, "none": none}


def draw(found: dict, path: Path) -> None:
    """The arms' figures as bars: fit and time saved on the sets with the defect, quiet on those without."""
    rows = table(found)
    shown = [name for name in ("iou", "f1_2px", "mean_saved", "eq3", "quiet_share") if any(name in row for row in rows)]
    _, axes = pyplot.subplots(1, len(shown), figsize=(3 * len(shown), 3.2), squeeze=False)
    for axis, name in zip(axes[0], shown):
        with_it = [row for row in rows if name in row]
        of_arm = {arm: np.mean([row[name] for row in with_it if row["arm"] == arm]) for arm in found["arms"]}
        axis.bar(range(len(of_arm)), of_arm.values(), color=["#888"] + ["#4477aa"] * (len(of_arm) - 1))
        axis.set_xticks(range(len(of_arm)), of_arm, rotation=35, ha="right", fontsize=8)
        axis.set_title(name)
        axis.grid(axis="y", alpha=0.3)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=90)
    pyplot.close()


def table(found: dict) -> list[dict]:
    """One row for each arm and set."""
    return [
        {"arm": arm, "set": set_name, **figures}
        for arm, of in found["arms"].items()
        for set_name, figures in of["val"].items()
    ]


def plain(name: str) -> str:
    """A name in Markdown, on one line and without any markup."""
    return re.sub(r"[\\`*|<>$\[\]&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(name.split()))


PAGE = jinja2.Template(
    """# Does the loop teach anything?

Two rounds with simulated annotators, defect {{ plain(found.defect) }}; what the arms are and how the annotators decide, says
`defectcam loop --help`. Made by

    {{ found.command|replace("\n", " ") }}

Annotators who err in {{ "%g" | format(100 * found.error) }} % of cases treated the proposals of round 1:
{% for outcome, count in found.annotators.items() %}{{ count }} {{ outcome }}{{ ", " if not loop.last }}{% endfor -%}
. Eq. 3 over all that was not rejected, with 0 for what was missed: {{ found.campaign_eq3 }}. From that came {{ found.clicks.loop.positive }} positive and
{{ found.clicks.loop.none }} none-clicks; the arm without the loop got {{ found.clicks.plain_clicks.positive }} and
{{ found.clicks.plain_clicks.none }} on the same photos.

| arm | set | {% for name in figures %}{{ name }} | {% endfor %}minutes |
|---|---|{% for _ in figures %}---|{% endfor %}---|
{% for row in rows -%}
| {{ row.arm }} | {{ plain(row.set) }} | {% for name in figures %}{{ row[name] if name in row }} | {% endfor -%}
{{ found.arms[row.arm].minutes }} |
{% endfor %}
![the arms' figures, the mean over sets](loop.png)

Every arm's thresholds were chosen on the same val photos that judge it here, so all are somewhat flattered, all alike.
One seed: differences of a few hundredths are chance. Of a series of photos of one wall some may lie in either half.
""",
    trim_blocks=False,
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam loop`."""
    parser = command_parser("loop", __doc__)
    parser.add_argument("--defect", default="crack")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, required=True, help="sets with the defect's masks")
    parser.add_argument("--none-sets", type=names, required=True, help="sets without the defect")
    parser.add_argument("--photos", type=int, default=40, help="of each set: in the campaign, and of val (default: %(default)s)")
    parser.add_argument("--error", type=float, default=0.05, help="of the annotators, 0 to 1 (default: %(default)s)")
    parser.add_argument("--init", type=Path, help="round 1 starts from these weights (safetensors); else from ImageNet's")
    parser.add_argument("--first-steps", type=int, default=900, help="of round 1 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of every arm of round 2 (default: %(default)s)")
    parser.add_argument("--crop-px", type=int, default=64, help="side of the crops around clicks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="crops per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/loop"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.error <= 1:
        parser.error(f"--error is {args.error}; allowed is 0 to 1")
    if not (args.data / "splits.json").exists():
        parser.error(f"no splits.json in {args.data}: name the folder of photo sets with --data")
    try:
        found = Experiment(args).run()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    (args.out / "loop.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.out / "loop.png")
    page = PAGE.render(found=found, rows=table(found), figures=FIGURES, plain=plain)
    (args.out / "loop.md").write_text(page, encoding="utf-8")
    say(f"written: {(args.out / 'loop.md').resolve()}")
