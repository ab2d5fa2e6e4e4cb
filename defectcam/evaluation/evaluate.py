"""Judge weights on val photos: one table of all measures, and a page with the worst and the best cases of every defect and
a plot of precision against recall over T.

For every defect and set, on the same photos: what the function proposes for T = 0, 1, 2, 4, 8, or the T of `--steps`; the plain
class activation map (T = 0) and the paper's setting (T = 2), both of the whole photo at one scale, with theta 0.1 of the
photo's maximum, closing and minimum area. Further folders of weights stand in the same table by `--compare`: a network
trained on the masks, or the paper's. In place of the table: `--dial`, what T does; `--scale`, photos enlarged and reduced;
`--mosaics`, false proposals on photos of 5000 x 5000 px.

Example:
    defectcam evaluate --weights weights --data ../shared/data --compare clicks=out/weights-clicks --out out
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from defectcam.climb import PaperClimb
from defectcam.command_line import command_parser, count, step_counts
from defectcam.evaluation.dial import counts_at_lower_theta, dial_lines, measure_dial
from defectcam.evaluation.figures import PhotoFigures, painted, photo_figures, set_figures
from defectcam.evaluation.kept import ArrayFile, KeptPhoto
from defectcam.evaluation.measures import match_instances, reliability
from defectcam.evaluation.mosaics import MOSAICS, measure_mosaics, mosaics_lines
from defectcam.evaluation.photos import LabelledPhoto, labelled_photos
from defectcam.evaluation.report import draw_case, evaluation_page, good_and_bad, precision_recall_plot, table_lines
from defectcam.evaluation.scale import measure_scale, scale_lines
from defectcam.paths import file_name, write_rgb
from defectcam.postprocess import Cleaning, regions
from defectcam.predict import STEPS, Predictor, find_cores, open_weights, proposals_for
from defectcam.proposals import Component, find_components
from defectcam.pyramid import PhotoMaps, Pyramid, Reading
from defectcam.settings import ITERATIONS_MAX
from defectcam.training.config import names
from defectcam.training.labels import add_label_option
from defectcam.weights import WeightsError, add_weights_option

PAPER_STEPS = 2
PAPER_THETA = 0.1  # of the map's maximum
PAPER_READING = Reading(1.0, 1, 1.0, (PaperClimb(0.08, 7.0, 0.5),))  # the photo as it is; xi, lambda, tau


def answers(
    predictor: Predictor, maps: PhotoMaps, defect: str, wanted: Sequence[int]
) -> Iterator[tuple[str, int, list[Component]]]:
    """(method, T, proposals) of every method, for a photo of which the plain maps are known."""
    config = predictor.weights.configs[defect]
    for steps, proposals in proposals_for(maps, config, wanted).items():
        yield "ours", steps, [one.component for one in proposals]
    paper = PhotoMaps(predictor.torch_engine(defect), PAPER_READING, maps.pyramid, predictor.batch)
    paper.climb([PAPER_STEPS], np.ones((1, 1), bool), max(paper.height, paper.width))
    cleaning = Cleaning(config.closing_radius_px, 0, config.min_area_px)
    for method, steps in (("plain CAM", 0), ("paper's setting", PAPER_STEPS)):
        activation = paper.merged(steps)
        yield method, steps, find_components(regions(activation, PAPER_THETA * activation.max(), cleaning))


def judged_confidences(
    predictor: Predictor, maps: PhotoMaps, photo: LabelledPhoto, defect: str
) -> list[tuple[float, bool]]:
    """Confidence of every region of T = 0, and whether it is right."""
    found = find_cores(maps, predictor.weights.configs[defect])
    truth = np.zeros(photo.image_rgb.shape[:2], bool) if photo.truth is None else photo.truth
    right = match_instances([core.component for core in found], truth, defect).right.tolist()
    return [(core.confidence, one) for core, one in zip(found, right, strict=True)]


def evaluate(args: argparse.Namespace) -> list[dict]:
    """Rows of the table, defect by defect; writes evaluate.json, evaluate.html and the pictures to `args.out`."""
    predictors = {name: open_weights(folder) for name, folder in [("", args.weights), *args.compare]}
    pictures = args.out / "evaluate"
    rows, confidence, cases, plots = [], [], [], {}
    for defect in args.defects or predictors[""].defects:
        sets, healthy_sets = sets_of(args, predictors[""], defect)
        of_rows: dict[tuple[str, str, int], list[PhotoFigures]] = {}
        of_confidence: dict[str, list[tuple[float, bool]]] = {}
        of_theta: dict[tuple[str, str], list[list[list[int]]]] = {}
        for photo in labelled_photos(args.data, sets, healthy_sets, "val", defect, args.photos, args.label_names):
            for name, predictor in predictors.items():
                if defect not in predictor.defects:
                    continue
                config = predictor.weights.configs[defect]
                maps = predictor.maps(Pyramid(photo.image_rgb), defect)
                of_confidence.setdefault(name, []).extend(judged_confidences(predictor, maps, photo, defect))
                if photo.set_name in sets:
                    truth = np.zeros(photo.image_rgb.shape[:2], bool) if photo.truth is None else photo.truth
                    counts = counts_at_lower_theta(maps, config, proposals_for(maps, config, [0])[0], truth)
                    of_theta.setdefault((photo.set_name, method_name(name, "ours")), []).append(counts)
                wanted = args.steps or sorted({*STEPS, config.iterations})
                drawn_steps = config.iterations if config.iterations in wanted else max(wanted)
                for method, steps, proposals in answers(predictor, maps, defect, wanted):
                    found = photo_figures(defect, photo, proposals, config.hole_share)
                    of_rows.setdefault((photo.set_name, method_name(name, method), steps), []).append(found)
                    if not name and method == "ours" and steps == drawn_steps:
                        mask = painted(proposals, photo.image_rgb.shape[:2])
                        cases.append(draw_case(photo, mask, defect, found.mean_saved, pictures))
        defaults = {
            method_name(name, "ours"): predictor.weights.configs[defect].iterations
            for name, predictor in predictors.items()
            if defect in predictor.defects
        }
        of_defect = [
            {"defect": defect, "set": set_name, "method": method, "T": steps,
             "is_default": defaults.get(method) == steps, **set_figures(photos)}
            for (set_name, method, steps), photos in of_rows.items()
        ]  # fmt: skip
        rows += of_defect
        plot = precision_recall_plot(defect, of_defect, {key: np.sum(counts, axis=0) for key, counts in of_theta.items()})
        if plot:
            plots[defect] = f"{pictures.name}/{file_name(f'precision_recall_{defect}', '.svg')}"
            (args.out / plots[defect]).write_text(plot, encoding="utf-8")
        for name, pairs in of_confidence.items():
            if pairs:
                bins, error = reliability(*zip(*pairs))
                confidence.append({"defect": defect, "method": method_name(name, "ours"), "bins": bins, "error": error})
        drawn = [case for case in cases if case.defect == defect]
        if any(case.thumbnail is not None for case in drawn):
            write_rgb(pictures / file_name(f"cases_{defect}", ".png"), good_and_bad(drawn))
    write_json(args.out / "evaluate.json", {"rows": rows, "confidence": confidence})
    (args.out / "evaluate.html").write_text(evaluation_page(rows, confidence, cases, plots), encoding="utf-8")
    return rows


def method_name(name: str, method: str) -> str:
    """The table's name of a method with the weights of `--compare` NAME, or of `--weights`, which has no name."""
    return f"{name}: {method}" if name else method


def measure(args: argparse.Namespace) -> None:
    """What `--dial`, `--scale` or `--mosaics` asks for: printed defect by defect, and written as JSON."""
    predictor, results = open_weights(args.weights), []
    for defect in args.defects or predictor.defects:
        sets, healthy_sets = sets_of(args, predictor, defect)
        if args.measure == "mosaics":
            file = ArrayFile(args.out)
            every = labelled_photos(args.data, [], [*sets, *healthy_sets], "val", defect, labels=args.label_names)
            photos = [KeptPhoto(photo, file) for photo in every]
            count = min(args.photos or MOSAICS, MOSAICS)
            results.append(measure_mosaics(predictor, defect, photos, count, args.out / "mosaics"))
            lines = mosaics_lines(results[-1])
        else:
            photos = labelled_photos(args.data, sets, [], "val", defect, args.photos, args.label_names)
            how, as_lines = {"dial": (measure_dial, dial_lines), "scale": (measure_scale, scale_lines)}[args.measure]
            results.append(how(predictor, defect, photos))
            lines = as_lines(results[-1])
        print("\n".join([*lines, ""]), flush=True)
        write_json(args.out / f"{args.measure}.json", results)


def sets_of(args: argparse.Namespace, predictor: Predictor, defect: str) -> tuple[list[str], list[str]]:
    """Sets with the defect and sets that give photos without it: as asked for, else those the weights were chosen on.

    Raises:
        ValueError: neither names any, or there are no weights for the defect.
    """
    if defect not in predictor.defects:
        raise ValueError(f"no weights for {defect!r} in {args.weights}; there are {', '.join(predictor.defects)}")
    record = predictor.weights.configs[defect].training
    given = {"sets": args.sets, "healthy_sets": args.healthy_sets}
    for name, value in given.items():
        if value is None and name not in record:
            raise ValueError(f"the weights of {defect} do not say which {name} they were chosen on: name them with "
                             f"--{name.replace('_', '-')}")  # fmt: skip
    return tuple(record[name] if value is None else value for name, value in given.items())


def write_json(path: Path, value: object) -> None:
    """Write a file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam evaluate`."""

    def named_folder(text: str) -> tuple[str, Path]:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
        return name, Path(folder)

    parser = command_parser("evaluate", __doc__)
    add_weights_option(parser, "folder to judge")
    parser.add_argument("--compare", type=named_folder, action="append", default=[], metavar="NAME=FOLDER",
                        help="another folder of weights in the same table; may be given several times")  # fmt: skip
    parser.add_argument("--defects", type=names, help="of these alone (default: all in the weights)")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, help="judge on these sets with the defect (default: the weights' own)")
    parser.add_argument("--healthy-sets", type=names, help="and on photos of these without it (default: the weights' own)")
    add_label_option(parser)
    parser.add_argument("--photos", type=count, help="photos of each set, or mosaics, at most (default: all)")
    parser.add_argument("--steps", type=step_counts, metavar="T", help="climbing steps of the table, such as 0,2")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default: out)")
    instead = parser.add_mutually_exclusive_group()
    for name, meaning in (
        ("dial", "what T does, with its controls, in place of the table"),
        ("scale", "the photos enlarged and reduced, in place of the table"),
        ("mosaics", f"false proposals on {MOSAICS} mosaics of 5000 x 5000 px, in place of the table"),
    ):
        instead.add_argument(f"--{name}", dest="measure", action="store_const", const=name, help=meaning)
    args = parser.parse_args(argv)
    if not (args.data / "splits.json").exists():
        sys.exit(f"no splits.json in {args.data}: name the folder of photo sets with --data")
    for option in ("compare", "steps"):
        if args.measure and getattr(args, option):
            parser.error(f"--{option} belongs to the table, not to --{args.measure}")
    if max(args.steps or [0]) > ITERATIONS_MAX:
        parser.error(f"--steps {max(args.steps)}: at most {ITERATIONS_MAX}")
    try:
        if args.measure:
            measure(args)
            print(f"written: {args.out / f'{args.measure}.json'}")
        else:
            print("\n".join(table_lines(evaluate(args))))
            print(f"written: {args.out / 'evaluate.json'} and {args.out / 'evaluate.html'}")
    except (ValueError, FileNotFoundError, WeightsError) as error:
        sys.exit(str(error))
