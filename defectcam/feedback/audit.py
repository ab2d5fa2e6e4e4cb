"""Find doubtful ground truth of old campaigns: shapes that the model strongly disagrees with (paper, conclusion).

Every shape is judged by the model's confidence in it and by how well the proposals on it agree with its outline; every
proposal that lies on no shape is taken for a shape that may be missing. `disagreement` (0..1) ranks them all:

no defect   1 - confidence: the model sees nothing where the shape is.
outline     confidence * (1 - F1 at 2 px of shape and proposals): there is a defect, but outlined otherwise.
missing     the proposal's confidence: the model is sure of what has no outline.

Old labels come as sets with masks (<data>/<set>/masks/<defect>/<stem>.png) or label files, or as an export from CVAT ("CVAT
for images 1.1") and the folder of its photos. Weights that were trained on the very same labels agree too readily: audit
with weights from other photos where you can.

Example:
    defectcam audit --data ../shared/data --sets steelbridge440 --split val --out out/audit
    defectcam audit --export task7.zip --photos photos --defects crack --out out/audit
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.evaluation.measures import f1_2px
from defectcam.feedback.cvat import CvatError, CvatExport
from defectcam.feedback.labels import PhotoError, PhotoFolder, set_and_stem, size_on_disk
from defectcam.feedback.regions import common_px
from defectcam.image import ImageError
from defectcam.paths import write_image
from defectcam.predict import Predictor, device_and_engine, proposals_for
from defectcam.proposals import Component, component_confidence, component_features, find_components
from defectcam.pyramid import Pyramid
from defectcam.regions import AREA_TYPES, merged, on_one_crop, region_of, resized
from defectcam.training.clicks import split_stems
from defectcam.training.finished import Box
from defectcam.training.labels import LabelledSet, add_label_option, photo_size, read_photo_rgb
from defectcam.training.names import LabelNames, check_label_names
from defectcam.weights import WeightsError, load_weights

F1_MARGIN_PX = 3
PICTURE_PX = 480
PICTURE_MARGIN = 0.5  # of the shape's longer side around it
LEAST_PICTURED_PX = 160
TRUTH_RGB, PROPOSED_RGB = (0, 220, 60), (255, 40, 40)


@dataclass(frozen=True, eq=False)
class OldPhoto:
    """A photo of an old campaign with its shapes of one defect.

    Attributes:
        set_name, stem: its names.
        path: of the photo.
        shapes: as they were labelled.
        finished: boxes x0, y0, x1, y1, px, x1 and y1 exclusive, beyond which nothing is known; None = the whole photo is.
    """

    set_name: str
    stem: str
    path: Path
    shapes: list[Component]
    finished: list[Box] | None = None

    def is_known(self, region: Component) -> bool:
        """Whether half of a region or more is in finished parts."""
        if self.finished is None:
            return True
        known = np.zeros(region.mask.shape, bool)
        for x0, y0, x1, y1 in self.finished:
            top, left = max(y0 - region.top, 0), max(x0 - region.left, 0)
            known[top : max(y1 - region.top, 0), left : max(x1 - region.left, 0)] = True
        return 2 * np.count_nonzero(known & region.mask) >= region.area_px


@dataclass(frozen=True, eq=False)
class Doubt:
    """A shape, or the lack of one, that the model disagrees with; for the figures see the top of this module."""

    photo: OldPhoto
    defect: str
    kind: str
    disagreement: float
    confidence: float
    f1_2px: float
    region: Component
    proposals: list[Component]


class Notes:
    """What is left out, each said once on standard error; false as long as nothing is."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._said)

    def add(self, what: object) -> None:
        """Say it, unless it was said."""
        if str(what) not in self._said:
            self._said.add(str(what))
            tqdm.write(f"left out: {what}", file=sys.stderr)


def photos_of_sets(
    data: Path,
    sets: Sequence[str],
    splits: Sequence[str],
    defect: str,
    labels: Mapping[str, str] | None = None,
    notes: Notes | None = None,
) -> Iterator[OldPhoto]:
    """The photos of data sets that have labels of the defect, an empty mask included.

    A photo that is missing or cannot be read is left out, with a note.

    Args:
        labels: as `LabelledSet` takes them.

    Raises:
        ValueError, FileNotFoundError: as of `LabelledSet`.
    """
    notes = Notes() if notes is None else notes
    for set_name in sets:
        files = LabelledSet(data, set_name, defect, labels)
        for stem in [stem for split in splits for stem in split_stems(data, set_name, split)]:
            try:
                path = files.photo(stem)
                size = photo_size(path)
            except (FileNotFoundError, ImageError) as error:
                notes.add(error)
                continue
            if files.mask(stem):
                shapes = find_components(files.read_mask(stem, *size))
                yield OldPhoto(set_name, stem, path, shapes, files.finished_boxes(stem))


def photos_of_export(
    export: CvatExport,
    photos: PhotoFolder,
    defect: str,
    labels: Mapping[str, str] | None = None,
    notes: Notes | None = None,
) -> Iterator[OldPhoto]:
    """The photos of an export whose labels include the defect, each once, also where jobs overlap.

    A photo that is missing or cannot be read, or was cropped or turned since, is left out, with a note.

    Args:
        labels: as for `photos_of_sets`.

    Raises:
        CvatError: something in the export cannot be read.
    """
    seen, names, notes = set(), LabelNames(defect, labels or {}), Notes() if notes is None else notes
    for job in export.jobs():
        if not any(map(names.is_defect, job.labels)):
            continue
        for frame in export.frames(job):
            if (job.task_id, frame.number) in seen:
                continue
            seen.add((job.task_id, frame.number))
            regions = [
                region_of(shape.kind, shape.points, frame.width, frame.height, shape.rotation)
                for shape in frame.shapes
                if names.is_defect(shape.label) and shape.kind in AREA_TYPES
            ]
            for shape in frame.shapes:
                if names.is_defect(shape.label) and shape.kind not in AREA_TYPES:
                    notes.add(f"a {shape.kind} on {frame.name}, {shape.label!r}, which is no region: draw it as a polygon")
            try:
                path = photos.find(frame.name)
                size = size_on_disk(path, frame.name, frame.width, frame.height)
            except (PhotoError, FileNotFoundError, ImageError) as error:
                notes.add(error)
                continue
            scale_xy = size[0] / frame.width, size[1] / frame.height
            if scale_xy != (1.0, 1.0):
                regions = [resized(region, *scale_xy, *size) for region in regions if region is not None]
            yield OldPhoto(*set_and_stem(path), path, [region for region in regions if region is not None])


def doubts_on_photo(predictor: Predictor, photo: OldPhoto, defect: str) -> list[Doubt]:
    """All shapes of a photo and all proposals beside them, with how much the model disagrees; in finished parts alone.

    Raises:
        ValueError: the labels were made on a photo of another size.
    """
    image_rgb = read_photo_rgb(photo.path)
    height, width = image_rgb.shape[:2]
    for shape in photo.shapes:
        if shape.box_xyxy[2] >= width or shape.box_xyxy[3] >= height:
            raise ValueError(f"{photo.path} is {width} x {height} px, its labels reach {shape.box_xyxy[2:]}: other photo?")
    fact = predictor.weights.facts[defect]
    maps = predictor.maps(Pyramid(image_rgb), defect)
    proposals = proposals_for(maps, fact, [fact.iterations])[fact.iterations]
    logits = maps.merged()
    found, on_shapes = [], set()
    for shape in photo.shapes:
        touching = [i for i, proposal in enumerate(proposals) if common_px(proposal.component, shape)]
        on_shapes |= set(touching)
        if not photo.is_known(shape):
            continue
        confidence = component_confidence(component_features(shape, logits, maps.levels), fact.confidence_weights)
        own = [proposals[i].component for i in touching]
        agreement = 0.0
        if own:
            (proposed, truth), _, _ = on_one_crop([merged(own), shape], F1_MARGIN_PX)
            agreement = f1_2px(proposed, truth)
        by_kind = {"no defect": 1 - confidence, "outline": confidence * (1 - agreement)}
        kind = max(by_kind, key=by_kind.get)
        found.append(Doubt(photo, defect, kind, by_kind[kind], confidence, agreement, shape, own))
    for index, proposal in enumerate(proposals):
        if index not in on_shapes and photo.is_known(proposal.component):
            sure, region = proposal.confidence, proposal.component
            found.append(Doubt(photo, defect, "missing", sure, sure, 0.0, region, [region]))
    return found


def picture_of(doubt: Doubt) -> np.ndarray:
    """The surroundings of a doubt beside the same with outlines (label green, proposals red), (h, w, 3) uint8 RGB."""
    image = read_photo_rgb(doubt.photo.path)
    x0, y0, x1, y1 = doubt.region.box_xyxy
    margin = max(int(PICTURE_MARGIN * max(x1 - x0, y1 - y0)), (LEAST_PICTURED_PX - max(x1 - x0, y1 - y0)) // 2, 0)
    left, top = max(0, x0 - margin), max(0, y0 - margin)
    crop = image[top : y1 + margin + 1, left : x1 + margin + 1]
    factor = PICTURE_PX / max(crop.shape[:2])
    plain = cv2.resize(crop, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    drawn = plain.copy()
    truth = [] if doubt.kind == "missing" else [doubt.region]
    for regions, colour in ((truth, TRUTH_RGB), (doubt.proposals, PROPOSED_RGB)):
        for region in regions:
            lines, _ = cv2.findContours(region.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            for line in lines:
                line_xy = (line + 0.5 + np.array([region.left - left, region.top - top])) * factor
                cv2.polylines(drawn, [np.rint(line_xy).astype(np.int32)], True, colour, 1, cv2.LINE_AA)
    return np.hstack([plain, drawn])


PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Doubtful labels</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em; } figure { display: inline-block; margin: 0 1em 1.5em 0; }
img { display: block; max-width: 100%; } figcaption b { color: #a00; }
</style>
<h1>Doubtful labels</h1>
<p>{{ shapes }} shapes on {{ photos }} photos, judged by weights {{ version }}. Shown are the {{ doubts|length }} that
the model disagrees with most; the label is outlined in green, what the model proposes in red.</p>
{% for doubt in doubts %}<figure><img src="{{ doubt.picture }}" alt="{{ doubt.kind }}: {{ doubt.stem }}" loading="lazy">
<figcaption>{{ doubt.rank }}. <b>{{ doubt.kind }}</b> {{ doubt.defect }}, {{ doubt.set }}/{{ doubt.stem }} at x {{ doubt.x }}, y {{ doubt.y }}:
disagreement {{ doubt.disagreement }}, confidence {{ doubt.confidence }}, F1 {{ doubt.f1_2px }}</figcaption></figure>
{% endfor %}</html>
""",
    autoescape=True,
)
COLUMNS = ("rank", "disagreement", "kind", "defect", "set", "stem", "x", "y", "width", "height", "confidence", "f1_2px")


def write_audit(doubts: list[Doubt], photos: int, version: str, top: int, out: Path) -> None:
    """Write audit.csv (all, worst first), pictures of the `top` worst, and index.html that shows them."""
    doubts = sorted(doubts, key=lambda doubt: -doubt.disagreement)
    rows = []
    for rank, doubt in enumerate(doubts, start=1):
        x0, y0, x1, y1 = doubt.region.box_xyxy
        figures = (doubt.confidence, doubt.f1_2px)
        place = (doubt.photo.set_name, doubt.photo.stem, x0, y0, x1 - x0 + 1, y1 - y0 + 1)
        values = (rank, doubt.disagreement, doubt.kind, doubt.defect, *place, *figures)
        rows.append(dict(zip(COLUMNS, (round(v, 3) if isinstance(v, float) else v for v in values))))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "audit.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    shown = []
    for row, doubt in zip(rows[:top], doubts):
        picture = f"pictures/{row['rank']:04d}.jpg"
        write_image(out / picture, cv2.cvtColor(picture_of(doubt), cv2.COLOR_RGB2BGR))
        shown.append(row | {"picture": picture})
    shapes = sum(doubt.kind != "missing" for doubt in doubts)
    page = PAGE.render(doubts=shown, shapes=shapes, photos=photos, version=version)
    (out / "index.html").write_text(page, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam audit`."""
    parser = command_parser("audit", __doc__)
    parser.add_argument("--data", type=Path, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=lambda text: text.split(","), help="with --data: sets to audit, a,b")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all", help="with --data (default: all)")
    add_label_option(parser)
    parser.add_argument("--export", type=Path, help='an export from CVAT as "CVAT for images 1.1"')
    parser.add_argument("--photos", type=Path, help="with --export: folder of the photos, as uploaded to CVAT")
    parser.add_argument("--defects", type=lambda text: text.split(","), help="of those with weights (default: all)")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="weights folder (default: %(default)s)")
    parser.add_argument("--top", type=int, default=100, help="how many are shown as pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/audit"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.export) or bool(args.data) != bool(args.sets) or bool(args.export) != bool(args.photos):
        parser.error("give --data and --sets, or --export and --photos")
    try:
        predictor = Predictor(load_weights(args.weights), *device_and_engine(os.environ))
        unknown = set(args.defects or ()) - set(predictor.defects)
        if unknown:
            parser.error(f"--defects names {sorted(unknown)[0]}; {args.weights} has weights for {predictor.defects}")
        export = CvatExport(args.export, None) if args.export else None
        folder = PhotoFolder(args.photos) if args.export else None
        splits = ("train", "val") if args.split == "all" else (args.split,)
        doubts, photos, notes = [], 0, Notes()
        there = {label for job in export.jobs() for label in job.labels} if export else set()
        if export:
            check_label_names(args.label_names, there, str(args.export), predictor.defects)
            for note in export.notes:
                print(note, file=sys.stderr)
        lacking = []
        for defect in args.defects or predictor.defects:
            names = LabelNames(defect, args.label_names)
            if export:
                if not any(map(names.is_defect, there)):
                    lacking.append(f"{args.export} {names.lacking(there)}")
                for label in names.nearly(there):
                    notes.add(f"the label {label!r} of {args.export}; if it is {defect}, say so by --label {label}={defect}")
                found = photos_of_export(export, folder, defect, args.label_names, notes)
            else:
                found = photos_of_sets(args.data, args.sets, splits, defect, args.label_names, notes)
            for photo in tqdm(list(found), desc=defect, unit="photo", disable=None):
                try:
                    doubts += doubts_on_photo(predictor, photo, defect)
                except (FileNotFoundError, ImageError) as error:
                    notes.add(error)
                    continue
                photos += 1
        if not photos:
            why = "every photo is left out, the lines above say why" if notes else "no photo has labels of the defects"
            sys.exit("\n".join(lacking) or f"nothing to audit: {why}")
        for what in lacking:
            print(what, file=sys.stderr)
        write_audit(doubts, photos, predictor.weights.version, args.top, args.out)
    except (CvatError, PhotoError, WeightsError, FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"{error}")
    print(f"{len(doubts)} shapes and proposals on {photos} photos ranked: {(args.out / 'index.html').resolve()}")
