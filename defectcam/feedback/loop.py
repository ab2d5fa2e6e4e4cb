"""What a few finished photos of a campaign bring: the proof of `defectcam adapt`.

A campaign is a set that the weights never saw. Its val photos judge, and finished photos are drawn from its train photos.
A set without train photos gives every second val photo to be drawn.

1. before         the weights as they are.
2. outlines, k    adapted with k finished photos, for every draw. A draw's fewer photos are among its more.
3. clicks, k      adapted with the same photos, of which only clicks are known: one on each defect, and some beside it.
4. proposed, k    adapted with the k photos that `defectcam next-images` puts first.
5. all            other weights, which trained on all train photos of the campaign, where --all-weights names some.

All are judged at T = 0 on photos that are spread evenly over val, of the campaign and of the sets that the weights knew
before. Of those the loss matters. It is the mean over photos of the difference to the weights before, with the 95 % interval
of a bootstrap over photos.

OUT/DEFECT-SET.json, loop.md, loop.png    what came out; the page shows all campaigns of the folder. OUT/work may be deleted
afterwards. A run that was cut off goes on when the same command is given again.

Example:
    defectcam loop --defect crack --weights out/weights-before --data ../shared/data --campaign uav_kaggle315 \\
        --old-sets deepcrack,uav75 --all-weights weights --out out/loop
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from defectcam.command_line import command_parser, count, numbers
from defectcam.evaluation.figures import PhotoFigures, photo_figures, set_figures
from defectcam.evaluation.measures import bootstrap_sums, interval_95
from defectcam.evaluation.photos import labelled_photos
from defectcam.feedback.adapt import adapt
from defectcam.feedback.next_images import acquisition_stats_of, ranked
from defectcam.predict import open_weights
from defectcam.training.calibrate import say, spread
from defectcam.training.clicks import photo_path, split_stems
from defectcam.training.config import TrainConfig, names
from defectcam.training.labels import LabelledSet, photo_size
from defectcam.weights import WeightsError, load_weights

SHOWN = {"iou": "IoU", "f1_2px": "F1 at 2 px", "found_recall": "found instances", "eq3": "Eq. 3"}
KINDS = {"outlines": "o-", "clicks": "s", "proposed": "^"}  # and how they are drawn


def campaign_photos(data: Path, set_name: str, defect: str, judged: int) -> tuple[list[str], list[str]]:
    """Names of the photos that may be drawn, which all show the defect, and of those that judge."""
    pool, val = split_stems(data, set_name, "train"), split_stems(data, set_name, "val")
    if not pool:
        pool, val = val[::2], val[1::2]
    files = LabelledSet(data, set_name, defect)
    masks = ((stem, files.read_mask(stem, *photo_size(files.photo(stem)))) for stem in pool)
    return [stem for stem, mask in masks if mask is not None and mask.any()], spread(val, judged)


def view_of(data: Path, folder: Path, sets: dict[str, dict[str, list[str]]]) -> Path:
    """A data folder that has some photos of some sets; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sets:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to((data / name).resolve())
    (folder / "splits.json").write_text(json.dumps(sets))
    return folder


class Experiment:
    """One campaign: the arguments and the folder of the work. What is done already is not done again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = f"{args.defect}-{args.campaign}"
        self.work = args.out / "work" / self.name
        identity = {name: str(value) for name, value in vars(args).items() if name not in ("out", "draws")}
        written = self.work / "arguments.json"
        if written.exists() and json.loads(written.read_text()) != identity:
            raise ValueError(f"{self.work} holds a run with other arguments, see {written}: choose another --out, or remove it")
        self.work.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(identity, indent=1))
        self.pool, judged = campaign_photos(args.data, args.campaign, args.defect, args.judged)
        if max(args.photos) > len(self.pool):
            raise ValueError(f"--photos {max(args.photos)}: {args.campaign} has {len(self.pool)} photos to draw from")
        old = {name: {"val": spread(split_stems(args.data, name, "val"), args.judged)} for name in args.old_sets}
        self.judging = view_of(args.data, self.work / "judging", {args.campaign: {"val": judged}, **old})

    def run(self) -> dict:
        """All rows of the table ("arms"); what came out, as JSON has it."""
        args = self.args
        arms = [{"kind": "before", "k": 0, "draw": None, **self.once("before", lambda: self.judge(args.weights))}]
        if args.all_weights:
            arms.append({"kind": "all", "k": None, "draw": None, **self.once("all", lambda: self.judge(args.all_weights))})
        for kind, count, draw, stems in self.runs():
            name = f"{kind}-{count}" + ("" if draw is None else f"-{draw}")
            result = self.once(name, lambda: self.adapted(name, kind, stems))
            arms.append({"kind": kind, "k": count, "draw": draw, **result})
            shutil.rmtree(self.work / name, ignore_errors=True)
        return {"command": "defectcam " + shlex.join(sys.argv[1:]), "defect": args.defect, "campaign": args.campaign,
                "old_sets": args.old_sets, "draws": args.draws, "arms": arms}  # fmt: skip

    def runs(self) -> Iterator[tuple[str, int, int | None, list[str]]]:
        """Kind, number of photos, draw and photos of every adaptation; all of one draw, then the next."""
        args = self.args
        for draw in range(args.draws):
            order = np.random.default_rng((args.seed, draw)).permutation(len(self.pool))
            for count in args.photos:
                yield "outlines", count, draw, [self.pool[index] for index in order[:count]]
            for count in args.clicked:
                yield "clicks", count, draw, [self.pool[index] for index in order[:count]]
            if not draw and args.proposed:
                first = self.once("proposed", self.proposed)
                for count in args.proposed:
                    yield "proposed", count, None, first[:count]

    def proposed(self) -> list[str]:
        """The stems of the photos in the order of `next-images`."""
        stem_of = {photo_path(self.args.data / self.args.campaign, stem): stem for stem in self.pool}
        stats, _ = acquisition_stats_of(open_weights(self.args.weights), list(stem_of))
        return [stem_of[photo.stats.path] for photo in ranked(stats)]

    def once(self, name: str, work: Callable[[], object]):
        """What `work` returns, as JSON has it; done once, then read from a file of this name."""
        kept = self.work / f"{name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(work()))
        return json.loads(kept.read_text())

    def adapted(self, name: str, kind: str, stems: Sequence[str]) -> dict:
        """Adapt with some photos; the figures of the new weights, the verdict and the minutes of the weights and of all."""
        args, folder = self.args, self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        data = view_of(args.data, folder / "data", {args.campaign: {"train": list(stems)}})
        learnt = "clicks" if kind == "clicks" else "outlines"
        labels = TrainConfig(args.defect, data, sets=(args.campaign,), labels=learnt, seed=args.seed)
        say(f"{self.name}: {name}")
        choice = adapt(labels, args.weights, folder / "next", args.steps)
        # Weights that are worse are judged, too: the verdict must be right about them.
        weights = folder / "next" / ("rejected" if choice.verdict == "worse" else ".")
        record = load_weights(weights).configs[args.defect].training["adapted"][-1]
        return {key: record[key] for key in ("verdict", "minutes", "minutes_of_all")} | self.judge(weights)

    def judge(self, weights: Path) -> dict:
        """Figures of the campaign and of every old set, and IoU and F1 of every photo of the old sets."""
        args, predictor = self.args, open_weights(weights)
        by_set: dict[str, list[PhotoFigures]] = {}
        for photo in labelled_photos(self.judging, [args.campaign, *args.old_sets], [], "val", args.defect):
            proposals = predictor.propose(photo.image_rgb, args.defect, steps=0)
            figures = photo_figures(args.defect, photo, [proposal.component for proposal in proposals])
            by_set.setdefault(photo.set_name, []).append(figures)
        shown = {
            name: {key: value for key, value in set_figures(photos).items() if key in SHOWN} for name, photos in by_set.items()
        }
        old = [photo.counts for name in args.old_sets for photo in by_set[name]]
        return {"figures": shown, "old": [[counts.get("iou", 1.0), counts.get("f1", 1.0)] for counts in old]}


def loss_on_old(arms: Sequence[dict], before: dict, column: int) -> list[float]:
    """By how much the old photos' mean figure fell in some draws, and the ends of its 95 % interval over photos.

    Args:
        column: of `old`, 0 the IoU, 1 F1 at 2 px.
    """
    lost = np.array(before["old"])[:, column] - np.mean([np.array(arm["old"])[:, column] for arm in arms], axis=0)
    return [round(float(lost.mean()), 4), *interval_95(bootstrap_sums(lost[:, None])[:, 0] / len(lost))]


def table(found: dict) -> list[dict]:
    """One row for all draws of a kind and a number of photos: means, and the least and largest where there are several."""
    rows, before = [], found["arms"][0]
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for arm in found["arms"]:
        groups[arm["kind"], arm["k"]].append(arm)
    for (kind, count), arms in groups.items():
        row = {"arm": kind + (f", {count}" if count else ""), "draws": len(arms), "kind": kind, "k": count}
        for name in SHOWN:
            values = [arm["figures"][found["campaign"]].get(name) for arm in arms]
            if None not in values:
                row[name] = round(float(np.mean(values)), 3)
                row[f"{name}_ends"] = [round(min(values), 3), round(max(values), 3)]
        if found["old_sets"]:
            row["lost_iou"] = loss_on_old(arms, before, 0)
            row["lost_f1"] = loss_on_old(arms, before, 1)
        if "minutes" in arms[0]:
            row["minutes"] = round(float(np.mean([arm["minutes"] for arm in arms])), 1)
            row["minutes_of_all"] = round(float(np.mean([arm["minutes_of_all"] for arm in arms])), 1)
            row["verdicts"] = ", ".join(arm["verdict"] for arm in arms)
        rows.append(row)
    return rows


def draw(campaigns: Sequence[dict], path: Path) -> None:
    """A row of plots for each campaign: each figure over the number of finished photos."""
    figure = Figure(figsize=(3.2 * len(SHOWN), 2.6 * len(campaigns)))
    for axes, found in zip(figure.subplots(len(campaigns), len(SHOWN), squeeze=False), campaigns):
        of_kind: dict[str, list[dict]] = defaultdict(list)
        for row in table(found):
            of_kind[row["kind"]].append(row)
        for axis, (name, title) in zip(axes, SHOWN.items()):
            before = of_kind["before"][0]
            if name not in before:
                axis.set_axis_off()
                continue
            for kind, style in KINDS.items():
                if of_kind[kind]:
                    points = [before, *of_kind[kind]] if kind == "outlines" else of_kind[kind]
                    values = [row[name] for row in points]
                    below = [row[name] - row[f"{name}_ends"][0] for row in points]
                    above = [row[f"{name}_ends"][1] - row[name] for row in points]
                    counts, errors = [row["k"] for row in points], np.clip([below, above], 0, None)
                    axis.errorbar(counts, values, errors, fmt=style, capsize=3, label=kind)
            for row in of_kind["all"]:
                axis.axhline(row[name], color="#888", linestyle="--", label="all train photos")
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(left=-0.3)
            axis.set_xticks([0, *sorted({row["k"] for row in of_kind["outlines"]})])
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_title(f"{found['defect']}, {found['campaign']}: {title}", fontsize=8)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
        axes[0].set_xlabel("finished photos", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def plain(name: str) -> str:
    """A name in Markdown, on one line and without any markup."""
    return re.sub(r"[\\`*|<>$\[\]&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(name.split()))


PAGE = jinja2.Template(
    """# What a few finished photos bring

`defectcam adapt` goes on training the running weights with k finished photos of a campaign, which no training saw.
`defectcam loop --help` says what the rows are. All figures are at T = 0, means over the draws (least to largest in brackets).
Lost: how much lower the old sets' photos are than before; minus is a gain. In brackets is the 95 % interval.
Minutes are of the weights, and with the folds that judge them, in this run, which may have shared the machine.

![the figures over the number of finished photos](loop.png)
{% for found, rows in campaigns %}
## {{ plain(found.defect) }}: {{ plain(found.campaign) }}

    {{ found.command|replace("\n", " ") }}

| weights | draws | {% for title in shown.values() %}{{ title }} | {% endfor %}old sets lost: IoU | F1 at 2 px | minutes | verdicts |
|---|---|{% for _ in shown %}---|{% endfor %}---|---|---|---|
{% for row in rows -%}
| {{ row.arm }} | {{ row.draws }} | {% for name in shown %}{% if name in row %}{{ "%.3f" | format(row[name]) }}
{%- if row.draws > 1 %} ({{ "%.3f to %.3f" | format(*row[name ~ "_ends"]) }}){% endif %}{% endif %} | {% endfor -%}
{% for name in ("lost_iou", "lost_f1") %}{% if row[name] and row.kind != "before" and (name == "lost_iou" or found.defect == "crack") -%}
{{ "%+.3f (%+.3f to %+.3f)" | format(*row[name]) }}{% endif %} | {% endfor -%}
{% if "minutes" in row %}{{ row.minutes }}, {{ row.minutes_of_all }}{% endif %} | {{ row.verdicts }} |
{% endfor %}{% endfor %}""",
    trim_blocks=False,
)


def write_page(out: Path) -> Path:
    """Write the page of all campaigns of a folder; returns it."""
    campaigns = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    draw(campaigns, out / "loop.png")
    page = out / "loop.md"
    page.write_text(PAGE.render(campaigns=[(one, table(one)) for one in campaigns], shown=SHOWN, plain=plain), encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam loop`."""
    parser = command_parser("loop", __doc__)
    parser.add_argument("--defect", required=True)
    parser.add_argument("--weights", type=Path, required=True, help="weights that never saw the campaign")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--campaign", required=True, metavar="SET", help="the set that the photos are drawn from")
    parser.add_argument("--old-sets", type=names, default=[], help="sets that the weights knew before")
    parser.add_argument("--all-weights", type=Path, help="weights that trained on all photos of the campaign")
    parser.add_argument("--photos", type=numbers, default=[1, 5, 20], help="finished photos (default: 1,5,20)")
    parser.add_argument("--clicked", type=numbers, default=[5], help="photos with clicks alone (default: 5)")
    parser.add_argument("--proposed", type=numbers, default=[5], help="photos that next-images proposes (default: 5)")
    parser.add_argument("--draws", type=count, default=3, help="of the photos (default: %(default)s)")
    parser.add_argument("--judged", type=count, default=20, help="val photos of each set that judge (default: %(default)s)")
    parser.add_argument("--steps", type=count, help="of every adaptation (default: as many as adapt takes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/loop"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.data / "splits.json").exists():
        parser.error(f"no splits.json in {args.data}: name the folder of photo sets with --data")
    try:
        experiment = Experiment(args)
        written = args.out / f"{experiment.name}.json"
        written.write_text(json.dumps(experiment.run(), indent=1) + "\n")
        say(f"written: {write_page(args.out).resolve()}")
    except (WeightsError, ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
