"""What the HTML pages of results share: frame and style sheet, pictures, plots, and a ranking with its pictures."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from defectcam.paths import write_rgb

# Names are anything people type: no formulas, and letters that the browser's fonts have, not those of the plots.
matplotlib.rcParams.update({"text.parse_math": False, "svg.fonttype": "none"})
MISSED_RGB, WRONG_RGB, RIGHT_RGB = (0, 170, 0), (230, 0, 0), (240, 190, 0)
FRAME = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em } tr:nth-child(even) { background: #f3f3f3 }
th, td { padding: 2px 9px } td { text-align: right; white-space: nowrap } td:first-child, .text { text-align: left }
figure { display: inline-block; margin: 0 1em 1.5em 0; max-width: 1100px } img { display: block; max-width: 100% }
figcaption { max-width: 640px; overflow-wrap: anywhere } svg { max-width: 100%; height: auto }
small { color: #666 } .lead { font-size: 1.25em } .default { font-weight: bold } .worse { color: #a00 }
</style>
<h1>{{ title }}</h1>
{{ body }}</html>
""",
    autoescape=True,
)


def page(title: str, body: str, **values) -> str:
    """An HTML page.

    Args:
        title: of the page, and its heading.
        body: a Jinja template of what follows the heading.
        values: what the template uses; text is escaped.
    """
    return FRAME.render(title=title, body=Markup(jinja2.Template(body, autoescape=True).render(**values)))


def compared(ground_rgb: np.ndarray, mask: np.ndarray, truth: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """A picture (H, W, 3) uint8 with what was missed in green, too much in red, and right in yellow."""
    drawn = ground_rgb.copy()
    for region, colour in ((truth & ~mask, MISSED_RGB), (mask & ~truth, WRONG_RGB), (mask & truth, RIGHT_RGB)):
        drawn[region] = ((1 - opacity) * drawn[region] + opacity * np.array(colour)).astype(np.uint8)
    return drawn


def at_width(image: np.ndarray, width_px: int) -> np.ndarray:
    """A picture enlarged or reduced to a width."""
    height, width = image.shape[:2]
    size = (width_px, max(1, round(width_px * height / width)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if width > width_px else cv2.INTER_LINEAR)


def svg_of(figure: Figure) -> Markup:
    """A plot as markup of a page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has it
        figure.savefig(file, format="svg")
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])


def write_ranking(path: Path, columns: Sequence[str], rows: Sequence[Sequence], pictures: Iterable[np.ndarray]) -> list[dict]:
    """Write a table, best first, and pictures of its first rows.

    Args:
        path: of the CSV file.
        rows: values of the columns.
        pictures: (h, w, 3) uint8 RGB of the first rows; those of the others are not shown.

    Returns:
        The rows with a picture, by column; "picture" is its file, from the table's folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    shown = []
    for number, (row, picture_rgb) in enumerate(zip(rows, pictures), start=1):
        picture = f"pictures/{number:04d}.jpg"
        write_rgb(path.parent / picture, picture_rgb)
        shown.append({**dict(zip(columns, row)), "picture": picture})
    return shown
