"""Judge weights on val photos: one table of all measures, and a page of overlays with the worst cases first.

For every defect and set, on the same photos: the plain map and the paper's setting (T = 2, theta 0.1, closing, area),
what the function answers for T = 0, 1, 2, 4, 8 and "auto", and the outline network by itself, without the map's
say (of weights whose outlines were learnt from masks that is the supervised upper bound). Further folders of weights
(the other arm, other numbers of down-samplings) stand in the same table by `--compare`.

Example:
    defectcam evaluate --weights weights --data ../shared/data --compare clicks=out/weights-clicks --out out
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import jinja2
import numpy as np

from defectcam.evaluation.measures import relative_time_saving_of_groups, saved_per_component
from defectcam.evaluation.survey import LabelledPhoto, SurveyedPhoto, figures, labelled_photos, survey
from defectcam.paths import file_name, relative_path, write_image
from defectcam.request import Settings
from defectcam.training.train import names
from model_handler import ModelHandler, confident_components, defect_mask

STEPS = (0, 1, 2, 4, 8, "auto")
PAPER_THETA = 0.1
PAPER_STEPS = 2
# The counts of the paper's Table 2: instances, and how many of them are in the groups of 95, 75 and 50 percent.
TABLE_2 = {
    "crack": (111, (19, 40, 30)),
    "spalling": (65, (17, 19, 14)),
    "rust": (89, (22, 14, 9)),
    "all defects": (265, (58, 73, 53)),
}
COLUMNS = ("photos", "iou", "iou_photo_mean", "f1_2px", "f1_2px_all", "false_components", "instances", "eq3", "mean_saved",
           "eq3_found", "healthy_photos", "quiet_share")  # fmt: skip
OVERLAY_PX = 480
THUMBNAIL_PX = 200
CASES_SHOWN = 5


class Judge:
    """One folder of weights, and the masks each method proposes with them."""

    def __init__(self, name: str, folder: Path, steps: Sequence[int | str] = STEPS) -> None:
        self.name, self.steps = name, steps
        self.handler = ModelHandler(folder, "cpu", Settings(), logging.getLogger("evaluate"))

    def survey(self, photo: LabelledPhoto, defect: str) -> SurveyedPhoto:
        """Everything the networks say of a photo."""
        weights, fact = self.handler.weights, self.handler.weights.facts[defect]
        return survey(
            photo, weights.networks[defect], weights.outlines.get(defect), fact.working_scale, self.steps,
            fact.climb_parameters, fact.cam_max, fact.cam_threshold, fact.window_px, fact.gate,
        )  # fmt: skip

    def masks(self, photo: SurveyedPhoto, defect: str) -> Iterator[tuple[str, int | str, np.ndarray]]:
        """(method, T, mask at photo scale) of every method."""
        fact = self.handler.weights.facts[defect]
        plain = dataclasses.replace(fact, snap=None)
        if 0 in photo.maps:
            yield f"{self.name}: CAM", 0, self._answer(photo, defect, plain, 0, fact.cam_threshold)
            yield f"{self.name}: CAM, theta 0.1", 0, self._answer(photo, defect, plain, 0, PAPER_THETA)
        if PAPER_STEPS in photo.maps:
            yield f"{self.name}: paper", PAPER_STEPS, self._answer(photo, defect, plain, PAPER_STEPS, PAPER_THETA)
        for steps in photo.maps:
            yield f"{self.name}: ours", steps, self._answer(photo, defect, fact, steps, fact.cam_threshold, fact.threshold)
        if photo.outline is not None:
            everywhere = np.ones(photo.score.shape, bool)
            mask = photo.outline_logits(everywhere) > 0
            yield f"{self.name}: outline network alone", "-", photo.at_photo_scale(mask)

    def _answer(
        self, photo: SurveyedPhoto, defect: str, fact, steps: int | str, theta: float, threshold: float = 0.0
    ) -> np.ndarray:
        effective = {"cam_threshold": theta}
        mask = defect_mask(photo.working_image, photo.maps[steps], fact, effective, photo.outline_logits)
        logits = photo.outline_logits(mask) if photo.outline and mask.any() else None
        mask = photo.at_photo_scale(mask)
        if not threshold:
            return mask
        kept = np.zeros_like(mask)
        bias = self.handler.weights.networks[defect].head.bias.item()
        for component, _ in confident_components(mask, photo.score, bias, fact, threshold, logits):
            x0, y0, x1, y1 = component.box_xyxy
            kept[y0 : y1 + 1, x0 : x1 + 1] |= component.mask
        return kept


def evaluate(args: argparse.Namespace) -> list[dict]:
    """Rows of the table; overlays of the main weights' default answer go to `args.out`/evaluate."""
    folders = [("weights", args.weights), *args.compare]
    judges = [Judge(name, folder, args.steps) for name, folder in folders]
    rows, cases = [], []
    for defect in args.defects or judges[0].handler.defects:
        training = judges[0].handler.weights.facts[defect].training
        sets = training["sets"] if args.sets is None else args.sets
        healthy_sets = training["healthy_sets"] if args.healthy_sets is None else args.healthy_sets
        judged: dict[tuple[str, str, str], list[tuple[LabelledPhoto, np.ndarray]]] = {}
        for photo in labelled_photos(args.data, sets, healthy_sets, "val", defect, args.photos):
            for judge in judges:
                if defect not in judge.handler.defects:
                    continue
                for method, steps, mask in judge.masks(judge.survey(photo, defect), defect):
                    judged.setdefault((photo.set_name, method, str(steps)), []).append((photo, mask))
                    default = judge.handler.weights.facts[defect].iterations
                    if judge is judges[0] and method.endswith(": ours") and steps == default:
                        cases.append(picture(photo, mask, defect, args.out / "evaluate"))
        rows += [
            {"defect": defect, "set": set_name, "method": method, "T": steps, **figures(defect, of_set)}
            for (set_name, method, steps), of_set in judged.items()
        ]
    rows.sort(key=lambda row: (row["defect"], row["set"]))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "evaluate.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "evaluate.html").write_text(page(rows, cases), encoding="utf-8")
    for defect in dict.fromkeys(case["defect"] for case in cases if case["thumbnail"] is not None):
        drawn = good_and_bad([case for case in cases if case["defect"] == defect])
        path = args.out / "evaluate" / file_name(f"cases_{defect}", ".png")
        write_image(path, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    return rows


def picture(photo: LabelledPhoto, mask: np.ndarray, defect: str, folder: Path) -> dict:
    """Write a photo beside its overlay (truth green, proposal red, both yellow); returns what the page needs."""
    truth = np.zeros_like(mask) if photo.truth is None else photo.truth
    both = np.hstack([photo.image_rgb, compared(photo.image_rgb, mask, truth)])
    scale = 2 * OVERLAY_PX / both.shape[1]
    both = cv2.resize(both, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    path = folder / file_name(defect) / relative_path(f"{photo.set_name}/{photo.stem}", ".jpg")
    write_image(path, cv2.cvtColor(both, cv2.COLOR_RGB2BGR))
    saved = saved_per_component(mask, truth, defect) if photo.truth is not None else []
    worth = float(np.mean(saved)) if saved else float(not mask.any())
    height, width = mask.shape
    thumbnail = compared(np.full((height, width, 3), 255, np.uint8), mask, truth, opacity=1.0)
    thumbnail = cv2.resize(thumbnail, (THUMBNAIL_PX, THUMBNAIL_PX * height // width), interpolation=cv2.INTER_AREA)
    return {
        "file": path.relative_to(folder.parent).as_posix(),
        "worth": worth,
        "defect": defect,
        "set": photo.set_name,
        "stem": photo.stem,
        "thumbnail": thumbnail if photo.truth is not None else None,
    }


def compared(ground_rgb: np.ndarray, mask: np.ndarray, truth: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """What was missed in green, too much in red, right in yellow on a picture (H, W, 3) uint8."""
    drawn = ground_rgb.copy()
    for region, colour in ((truth & ~mask, (0, 170, 0)), (mask & ~truth, (230, 0, 0)), (mask & truth, (240, 190, 0))):
        drawn[region] = ((1 - opacity) * drawn[region] + opacity * np.array(colour)).astype(np.uint8)
    return drawn


def good_and_bad(cases: list[dict]) -> np.ndarray:
    """Masks alone, no photos (theirs is another licence), of the photos with the defect: good ones above, bad below.

    Returns:
        (H, W, 3) uint8: the quarter points of the better and of the worse half, so that no row is a selection.
    """
    cases = sorted((case for case in cases if case["thumbnail"] is not None), key=lambda case: -case["worth"])
    rows = []
    for half in (cases[: (len(cases) + 1) // 2], cases[len(cases) // 2 :]):
        some = [half[index] for index in np.linspace(0, len(half) - 1, CASES_SHOWN).astype(int)]
        tiles = []
        for case in some:
            tile = np.full((THUMBNAIL_PX + 8, THUMBNAIL_PX + 8, 3), 200, np.uint8)
            thumbnail = case["thumbnail"][:THUMBNAIL_PX]
            tile[4 : 4 + len(thumbnail), 4:-4] = thumbnail
            tiles.append(tile)
        rows.append(np.hstack(tiles))
    return np.vstack(rows)


PAGE = jinja2.Template(
    """<!doctype html>
<meta charset="utf-8"><title>Evaluation on val photos</title>
<style>
 body { font: 14px sans-serif; margin: 2em } table { border-collapse: collapse } td, th { padding: 2px 9px }
 td { text-align: right } td:nth-child(-n+3) { text-align: left } tr:nth-child(even) { background: #f3f3f3 }
 figure { display: inline-block; margin: 6px } img { display: block; max-width: 720px }
</style>
<h1>Evaluation on val photos</h1>
<p>Chosen on these photos, so on new ones expect less. Eq. 3 of the paper's Table 2 from its counts:
 {{ table_2 }}.</p>
{% for defect, rows in tables %}<h2>{{ defect }}</h2>
<table><tr><th>set<th>method<th>T{% for column in columns %}<th>{{ column }}{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.set }}<td>{{ row.method }}<td>{{ row.T }}
 {%- for column in columns %}<td>{{ row[column] if column in row else "" }}{% endfor %}</tr>
{% endfor %}</table>
<h3>Worst cases first: photo, and overlay (missed green, too much red, right yellow)</h3>
{% for case in cases[defect] %}<figure><img src="{{ case.file|urlencode }}" alt="{{ case.stem }}" loading="lazy">
 <figcaption>{{ case.set }} {{ case.stem }}: {{ "%.2f"|format(case.worth) }} saved</figcaption></figure>
{% endfor %}{% endfor %}
""",
    autoescape=True,
)

def page(rows: list[dict], cases: list[dict]) -> str:
    """The HTML page of a table's rows and the pictures' cases."""
    defects = list(dict.fromkeys(row["defect"] for row in rows))
    return PAGE.render(
        tables=[(defect, [row for row in rows if row["defect"] == defect]) for defect in defects],
        columns=COLUMNS,
        cases={
            defect: sorted((case for case in cases if case["defect"] == defect), key=lambda case: case["worth"])
            for defect in defects
        },
        table_2=table_2(),
    )


def table_2() -> str:
    """Eq. 3 of the paper's own counts, in words."""
    return ", ".join(
        f"{name} {100 * relative_time_saving_of_groups(instances, groups):.0f} %"
        for name, (instances, groups) in TABLE_2.items()
    )


def print_table(rows: list[dict]) -> None:
    """The table on the terminal."""
    print(f"{'set':18} {'method':34} {'T':>4} " + " ".join(f"{column[:9]:>9}" for column in COLUMNS))
    for row in rows:
        cells = " ".join(f"{row.get(column, ''):>9}" for column in COLUMNS)
        print(f"{row['set'][:18]:18} {row['method'][:34]:34} {row['T']:>4} {cells}")
    print(f"Eq. 3 from the counts of the paper's Table 2: {table_2()}")


def main(argv: list[str] | None = None) -> None:
    """The command `defectcam evaluate`."""

    def named_folder(text: str) -> tuple[str, Path]:
        name, _, folder = text.partition("=")
        if not folder:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
        return name, Path(folder)

    def steps_of(text: str) -> list[int | str]:
        return [part if part == "auto" else int(part) for part in names(text)]

    parser = argparse.ArgumentParser(
        prog="defectcam evaluate",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder to judge (default: weights)")
    parser.add_argument("--compare", type=named_folder, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--defects", type=names, help="of these alone (default: all in the weights)")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, help="judge on these sets with the defect (default: the weights' own)")
    parser.add_argument("--healthy-sets", type=names, help="and on these without it")
    parser.add_argument("--steps", type=steps_of, default=STEPS, help="T to judge (default: 0,1,2,4,8,auto)")
    parser.add_argument("--photos", type=int, help="photos of each set at most (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of evaluate.json and .html (default: out)")
    args = parser.parse_args(argv)
    if not (args.data / "splits.json").exists():
        sys.exit(f"no splits.json in {args.data}: name the folder of photo sets with --data")
    try:
        print_table(evaluate(args))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"written: {args.out / 'evaluate.json'} and {args.out / 'evaluate.html'}")
