"""The running and the new weights on the same val photos, and the page that shows where they differ."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defectcam.evaluation.figures import COLUMNS, figures, painted
from defectcam.evaluation.measures import iou
from defectcam.evaluation.pages import at_width, compared, page
from defectcam.evaluation.photos import LabelledPhoto
from defectcam.paths import file_name, relative_path, write_image, write_rgb
from defectcam.predict import Predictor
from defectcam.training.labels import read_own_mask

VERSIONS = ("running", "candidate")
JUDGED_BY = ("mean_saved", "iou")
PICTURES = 12
PICTURE_PX = 360


@dataclass(frozen=True, eq=False)
class ComparedPhoto:
    """A val photo with the masks that both versions propose, (H, W) bool at photo scale."""

    photo: LabelledPhoto
    running: np.ndarray
    candidate: np.ndarray


def compare(
    photos: Iterable[LabelledPhoto], defect: str, predictors: dict[str, Predictor], folder: Path
) -> list[ComparedPhoto]:
    """The answers of both versions.

    Args:
        predictors: of VERSIONS.
        folder: keeps the answers, so that a run that was cut off goes on.
    """
    return [
        ComparedPhoto(photo, *(_proposed_mask(predictors[name], photo, defect, folder / name) for name in VERSIONS))
        for photo in photos
    ]


def _proposed_mask(predictor: Predictor, photo: LabelledPhoto, defect: str, folder: Path) -> np.ndarray:
    """All pixels that are proposed for a photo, (H, W) bool; kept in `folder` and read from there."""
    path = folder / file_name(defect) / relative_path(f"{photo.set_name}/{photo.stem}", ".png")
    size = photo.image_rgb.shape[:2]
    if path.exists():
        with contextlib.suppress(ValueError):  # cut off while it was written
            return read_own_mask(path, *size) > 0
    mask = painted([proposal.component for proposal in predictor.propose(photo.image_rgb, defect)], size)
    write_image(path, mask.astype(np.uint8) * 255)
    return mask


def figures_of(defect: str, photos: Sequence[ComparedPhoto]) -> dict[str, dict[str, dict[str, float]]]:
    """Measures per set, and of all photos together as "all", of both versions: set -> version -> figures.

    What is proposed on a photo without the defect lowers `iou` of the set that has it, and of "all".
    """
    groups: dict[str, list[ComparedPhoto]] = defaultdict(list)
    for compared_photo in photos:
        groups[compared_photo.photo.set_name].append(compared_photo)
    return {
        set_name: {version: figures(defect, [(one.photo, getattr(one, version)) for one in group]) for version in VERSIONS}
        for set_name, group in [*groups.items(), ("all", photos)]
    }


def changes_of(of_all: dict[str, dict[str, float]]) -> dict[str, float]:
    """By how much the new weights are better in what they are judged by; below 0: worse."""
    return {name: round(of_all["candidate"][name] - of_all["running"][name], 4) for name in JUDGED_BY}


def no_worse(changes: dict[str, float], margin: float) -> bool:
    """Whether nothing is worse by more than the margin."""
    return all(change >= -margin for change in changes.values())


def most_different(photos: Sequence[ComparedPhoto]) -> list[ComparedPhoto]:
    """The photos on which the two versions agree least; those with the same answers are left out."""
    differing = [one for one in photos if (one.running != one.candidate).any()]
    return sorted(differing, key=lambda one: iou(one.running, one.candidate))[:PICTURES]


def picture_of(one: ComparedPhoto) -> np.ndarray:
    """The photo, the running weights' answer and the new ones' (h, w, 3) uint8 RGB, from left to right."""
    image_rgb, truth = one.photo.image_rgb, one.photo.truth
    truth = np.zeros_like(one.running) if truth is None else truth
    views = [image_rgb, *(compared(image_rgb, mask, truth) for mask in (one.running, one.candidate))]
    return np.hstack([at_width(view, PICTURE_PX) for view in views])


BODY = """
<p>{% if promoted %}<b>Promoted.</b>{% else %}<b class="worse">Not promoted.</b>{% endif %} A defect may be worse by
 {{ margin }} in <code>mean_saved</code> (share of clicks saved, mean over instances) and in <code>iou</code> (all pixels, photos
 without the defect included). Thresholds of both were chosen on these photos, so expect less on new ones.
 {% if kept %}As they were: {{ kept|join(", ") }}.{% endif %}</p>
{% for defect in defects %}<h2>{{ defect.name }}: {{ defect.new }} new clicks of {{ defect.clicks }} by people</h2>
<p>{% for name, change in defect.changes.items() %}{{ name }} {{ "%+.4f"|format(change) }}
 {%- if change < -margin %} <b class="worse">worse by more than {{ margin }}</b>{% endif %}
 {{- ", " if not loop.last }}{% endfor %}.
 {%- if defect.on_val %} {{ defect.on_val }} clicks on val photos were left out.{% endif %}</p>
<table><tr><th>set<th>weights{% for column in columns %}<th>{{ column }}{% endfor %}</tr>
{% for set_name, versions in defect.figures.items() %}{% for version, figures in versions.items() -%}
<tr><td>{{ set_name }}<td class="text">{{ "running" if version == "running" else "new" }}
 {%- for column in columns %}<td>{{ figures[column] if column in figures }}{% endfor %}</tr>
{% endfor %}{% endfor %}</table>
{% if defect.pictures %}<h3>Where they differ most: photo, running, new (missed green, too much red, right yellow)</h3>
{% for file, name in defect.pictures %}<figure><img src="{{ file|urlencode }}" alt="{{ name }}" loading="lazy">
 <figcaption>{{ name }}</figcaption></figure>
{% endfor %}{% else %}<p>Both answer the same on all photos.</p>{% endif %}
{% endfor %}"""


def write_pictures(defect: str, photos: Sequence[ComparedPhoto], folder: Path) -> list[tuple[str, str]]:
    """Write the pictures of a defect; returns their paths within `folder` and what they show."""
    shown = []
    for one in most_different(photos):
        set_name, stem = one.photo.set_name, one.photo.stem
        file = "pictures" / Path(file_name(defect)) / relative_path(f"{set_name}/{stem}", ".jpg")
        write_rgb(folder / file, picture_of(one))
        shown.append((file.as_posix(), f"{set_name} {stem}"))
    return shown


def report(version: str, parent: str, **values) -> str:
    """The page.

    Args:
        version, parent: of the new and of the running weights.
        values: promoted (bool), margin, kept (names of the defects that were not retrained), and defects: a list of {"name",
            "new", "clicks", "on_val", "figures", "changes", "pictures"}.
    """
    columns = dict.fromkeys([*JUDGED_BY, *COLUMNS])
    return page(f"Weights {version} against the running ones, {parent}", BODY, columns=columns, **values)
