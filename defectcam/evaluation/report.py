"""What `defectcam evaluate` shows: the table on the terminal, the HTML page, and pictures of good and bad cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from defectcam.evaluation.figures import COLUMNS, HEADLINES
from defectcam.evaluation.measures import relative_time_saving_of_groups
from defectcam.evaluation.pages import at_width, compared, page, svg_of
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.paths import file_name, write_rgb

# The counts of the paper's Table 2: instances, and how many of them are in the groups of 95, 75 and 50 percent.
TABLE_2 = {
    "crack": (111, (19, 40, 30)),
    "spalling": (65, (17, 19, 14)),
    "rust": (89, (22, 14, 9)),
    "all defects": (265, (58, 73, 53)),
}
# The terminal's columns; the page has all of COLUMNS.
SHORT = ("iou", "f1_2px", "cl_iou", "found_recall", "found_precision", "pieces", "eq3", "vertex_ratio", "false_per_mp",
         "specificity")  # fmt: skip
OF_CRACKS = ("f1_2px", "cl_iou")  # what other defects' outlines are not placed finely enough for
OVERLAY_PX = 480
THUMBNAIL_PX = 200
CASES_SHOWN = 5  # of the best, and of the worst
CASES_TITLES = "Worst cases", "Best cases", "All others, worst first"
PLOT_MARGIN = 0.04  # around the points of the plot, in precision and recall


@dataclass(frozen=True, eq=False)
class Case:
    """A photo with its picture on the page.

    Attributes:
        file: the overlay, relative to the page.
        saved: share of clicks saved, 0..1; pictures are ordered by it.
        thumbnail: masks without the photo, as PNG; None of a photo without the defect.
    """

    defect: str
    name: str
    file: str
    saved: float
    thumbnail: bytes | None


def draw_case(photo: LabelledPhoto, mask: np.ndarray, defect: str, saved: float, folder: Path) -> Case:
    """Write a photo beside its overlay to `folder`."""
    truth = np.zeros_like(mask) if photo.truth is None else photo.truth
    both = np.hstack([photo.image_rgb, compared(photo.image_rgb, mask, truth)])
    file = file_name(f"{defect}_{photo.set_name}_{photo.stem}", ".jpg")
    write_rgb(folder / file, at_width(both, 2 * OVERLAY_PX))
    thumbnail = None
    if photo.truth is not None:
        height, width = mask.shape
        drawn = compared(np.full((height, width, 3), 255, np.uint8), mask, truth, opacity=1.0)
        size = THUMBNAIL_PX, max(1, THUMBNAIL_PX * height // width)
        small = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)[:THUMBNAIL_PX]
        thumbnail = cv2.imencode(".png", small)[1].tobytes()
    return Case(defect, f"{photo.set_name} {photo.stem}", f"{folder.name}/{file}", saved, thumbnail)


def good_and_bad(cases: Sequence[Case]) -> np.ndarray:
    """Masks alone, no photos (theirs is another licence), of the photos with the defect: good ones above, bad below.

    Returns:
        (H, W, 3) uint8: the quarter points of the better and of the worse half, so that no row is a selection.
    """
    cases = sorted((case for case in cases if case.thumbnail is not None), key=lambda case: -case.saved)
    rows = []
    for half in (cases[: (len(cases) + 1) // 2], cases[len(cases) // 2 :]):
        some = [half[index] for index in np.linspace(0, len(half) - 1, CASES_SHOWN).astype(int)]
        tiles = []
        for case in some:
            tile = np.full((THUMBNAIL_PX + 8, THUMBNAIL_PX + 8, 3), 200, np.uint8)
            thumbnail = cv2.imdecode(np.frombuffer(case.thumbnail, np.uint8), cv2.IMREAD_COLOR)
            tile[4 : 4 + len(thumbnail), 4:-4] = thumbnail
            tiles.append(tile)
        rows.append(np.hstack(tiles))
    return np.vstack(rows)


def worst_and_best(cases: Sequence[Case]) -> tuple[list[Case], list[Case], list[Case]]:
    """A few of the worst and of the best cases of a defect, from both ends, and all others, the worst first.

    The best are photos with the defect: without it, most are perfect and show nothing.
    """
    cases = sorted(cases, key=lambda case: case.saved)
    with_defect = [case for case in cases if case.thumbnail is not None]
    best = with_defect[::-1][: min(CASES_SHOWN, len(with_defect) // 2)]
    worst = [case for case in cases if case.saved < 1 and case not in best][:CASES_SHOWN]
    return worst, best, [case for case in cases if case not in worst and case not in best]


def precision_recall_plot(
    defect: str, rows: Sequence[dict], lower_theta: Mapping[tuple[str, str], np.ndarray]
) -> str | None:
    """Precision against recall of pixels over T, beside a lower theta at T = 0, for every set and method; as SVG.

    Args:
        rows: of the table, of this defect.
        lower_theta: (set, method) -> per theta, from high to low, the pixels that are both, proposed, true; (n, 3).

    Returns:
        None where nothing was proposed.
    """
    points = {}
    for key in lower_theta:
        own = [row for row in rows if (row["set"], row["method"]) == key and "precision" in row and "recall" in row]
        if own:
            points[key] = [(row["recall"], row["precision"], row["T"]) for row in sorted(own, key=lambda row: row["T"])]
    if not points:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = []
    for key, some in points.items():
        recalls, precisions, steps = zip(*some)
        lines += axes.plot(recalls, precisions, "o-")
        for recall, precision, T in some:
            axes.annotate(f"{T}", (recall, precision), (4, 5), textcoords="offset points", fontsize="small")
        both, proposed, true = lower_theta[key].T
        axes.plot(both / np.maximum(true, 1), both / np.maximum(proposed, 1), "--", lw=1, color=lines[-1].get_color())
    of_all = np.array([point for some in points.values() for point in some])[:, :2]
    ends = np.clip((of_all.min(axis=0) - PLOT_MARGIN, of_all.max(axis=0) + PLOT_MARGIN), 0, 1.01)
    axes.set(xlim=ends[:, 0], ylim=ends[:, 1], xlabel="recall of pixels", ylabel="precision of pixels")
    axes.set_title(f"{defect}: T, and a lower theta (dashed)")
    axes.grid(alpha=0.3)
    names = [", ".join(key) for key in points]  # not the lines' own: those do not show if they begin with "_"
    axes.legend(lines, names, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


BODY = """
<p>Thresholds were chosen on these photos, so on new ones expect less. Bold: the default T. Small: 95 % bootstrap interval
 over photos. Eq. 3 of the paper's Table 2 from its counts: {{ table_2 }}.</p>
{% for defect, of_defect, shown, cases, tables, plot in defects %}<h2>{{ defect }}</h2>
<table><tr><th>set<th>method<th>T{% for column in shown %}<th title="{{ columns[column] }}">{{ column }}{% endfor %}</tr>
{% for row in of_defect %}<tr{% if row.is_default %} class="default"{% endif %}><td>{{ row.set }}<td class="text">{{ row.method }}<td>{{ row.T }}
 {%- for column in shown %}<td>{% if column in row %}{{ row[column] }}
 {%- if row[column ~ "_95"] %} <small>{{ row[column ~ "_95"]|join("-") }}</small>{% endif %}{% endif %}{% endfor %}</tr>
{% endfor %}</table>
{% if plot %}<h3>Precision and recall over T</h3>
<p>Of the pixels of all photos of a set; a number is T. Dashed: T = 0 with a lower theta, which extends the same proposals. Where
 the line lies above the dashed one, T is better than a lower theta of the same recall.</p>
<img src="{{ plot|urlencode }}" alt="{{ defect }}: precision against recall over T" loading="lazy">
{% endif %}{% for table in tables %}<h3>Confidence, {{ table.method }}: is it the share of right proposals?</h3>
<p>All regions of T = 0 on all photos, those below the minimum confidence too. Expected calibration error
 {{ "%.3f"|format(table.error) }}.</p>
<table><tr><th>confidence<th>proposals<th>mean confidence<th>share of right ones</tr>
{% for bin in table.bins %}<tr><td>{{ bin.from }} - {{ bin.to }}<td>{{ bin.proposals }}<td>{{ "%.2f"|format(bin.confidence) }}
<td>{{ "%.2f"|format(bin.right) }}</tr>
{% endfor %}</table>
{% endfor %}<p>Cases: photo, and overlay at the default T (missed green, too much red, right yellow).</p>
{% for title, some in cases if some %}<h3>{{ title }}</h3>
{% for case in some %}<figure><img src="{{ case.file|urlencode }}" alt="{{ case.name }}" loading="lazy">
 <figcaption>{{ case.name }}: {{ "%.2f"|format(case.saved) }} saved</figcaption></figure>
{% endfor %}{% endfor %}{% endfor %}<h2>Columns</h2>
<ul>{% for column in columns %}<li><b>{{ column }}</b>: {{ columns[column] }}</li>{% endfor %}</ul>
"""


def evaluation_page(rows: Sequence[dict], confidence: Sequence[dict], cases: Sequence[Case], plots: Mapping[str, str]) -> str:
    """The HTML page.

    Args:
        rows: of the table, each with defect, set, method, T, is_default and figures.
        confidence: per defect and method {"defect", "method", "bins", "error"} of `reliability`.
        plots: defect -> its `precision_recall_plot`, relative to the page.
    """
    defects = []
    for defect in dict.fromkeys(row["defect"] for row in rows):
        own = [row for row in rows if row["defect"] == defect]
        shown_cases = worst_and_best([case for case in cases if case.defect == defect])
        titled = list(zip(CASES_TITLES, shown_cases, strict=True))
        tables = [table for table in confidence if table["defect"] == defect]
        defects.append((defect, own, shown_columns(COLUMNS, own), titled, tables, plots.get(defect)))
    return page("Evaluation on val photos", BODY, defects=defects, columns=COLUMNS, table_2=table_2())


def table_2() -> str:
    """Eq. 3 of the paper's own counts, in words."""
    return ", ".join(
        f"{name} {100 * relative_time_saving_of_groups(instances, groups):.0f} %"
        for name, (instances, groups) in TABLE_2.items()
    )


def table_lines(rows: Sequence[dict]) -> list[str]:
    """The table as text, per defect and set only the columns that it has; * marks the default T."""
    lines = ["95 % intervals are of a bootstrap over photos; * marks the default T."]
    for defect, set_name in dict.fromkeys((row["defect"], row["set"]) for row in rows):
        some = [row for row in rows if (row["defect"], row["set"]) == (defect, set_name)]
        shown = shown_columns(SHORT, some)
        widths = [max(len(column), 15 if column in HEADLINES else 6) for column in shown]
        photos, healthy = some[0]["photos"], some[0].get("healthy_photos", 0)
        lines += ["", f"{defect}, {set_name}: {photos} photos with the defect, {healthy} without"]
        lines.append(f"{'method':24} {'T':>3} " + " ".join(f"{name:>{width}}" for name, width in zip(shown, widths)))
        for row in some:
            cells = " ".join(f"{_cell(row, column):>{width}}" for column, width in zip(shown, widths))
            lines.append(f"{row['method'][:24]:24} {row['T']:>2}{'*' if row['is_default'] else ' '} {cells}")
    return [*lines, "", f"Eq. 3 from the counts of the paper's Table 2: {table_2()}"]


def shown_columns(columns: Iterable[str], rows: Sequence[dict]) -> list[str]:
    """Those of the columns that some row of a defect has."""
    is_crack = rows[0]["defect"] == "crack"
    return [one for one in columns if any(one in row for row in rows) and (is_crack or one not in OF_CRACKS)]


def _cell(row: dict, column: str) -> str:
    value, interval = row.get(column, ""), row.get(f"{column}_95")
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"{text} {interval[0]:.2f}-{interval[1]:.2f}" if interval else text
