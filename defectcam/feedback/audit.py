"""Find doubtful ground truth of old campaigns: shapes that the model strongly disagrees with (paper, conclusion).

Every shape is judged by the model's confidence in it and by how well the proposals on it agree with its outline; every
proposal that lies on no shape is taken for a shape that may be missing. `disagreement` (0..1) ranks them all:

no defect   1 - confidence: the model sees nothing where the shape is.
outline     confidence * (1 - F1 at 2 px of shape and proposals): there is a defect, but outlined otherwise.
missing     the proposal's confidence: the model is sure of what has no outline.

Old labels come as folders of masks (<data>/<set>/masks/<defect>/<stem>.png) or as an export from CVAT ("CVAT for
images 1.1") and the folder of its photos. Weights that were trained on the very same labels agree too readily: audit
with weights from other photos where you can.

Example:
    defectcam audit --data ../shared/data --sets steelbridge440 --split val --out out/audit
    defectcam audit --export task7.zip --photos photos --defects crack --out out/audit
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from tqdm import tqdm

from defectcam.evaluation.measures import f1_2px
from defectcam.feedback.cvat import CvatError, CvatExport
from defectcam.feedback.labels import PhotoError, PhotoFolder, set_and_stem, size_on_disk
from defectcam.feedback.regions import AREA_TYPES, common_px, merged, on_one_crop, region_of, resized
from defectcam.paths import write_image
from defectcam.predict import Predictor, device_and_engine, proposals_for
from defectcam.proposals import Component, component_confidence, component_features, find_components
from defectcam.pyramid import Pyramid
from defectcam.training.clicks import split_stems
from defectcam.training.crops import read_photo_rgb
from defectcam.training.labels import LabelledSet, photo_size
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
    """

    set_name: str
    stem: str
    path: Path
    shapes: list[Component]


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


def photos_of_sets(data: Path, sets: Sequence[str], splits: Sequence[str], defect: str) -> Iterator[OldPhoto]:
    """The photos of data sets that have a mask of the defect, an empty one included."""
    for set_name in sets:
        files = LabelledSet(data, set_name, defect)
        stems = [stem for split in splits for stem in split_stems(data, set_name, split)]
        for stem in filter(files.mask, stems):
            path = files.photo(stem)
            yield OldPhoto(set_name, stem, path, find_components(files.read_mask(stem, *photo_size(path))))


def photos_of_export(export: CvatExport, photos: PhotoFolder, defect: str) -> Iterator[OldPhoto]:
    """The photos of an export whose labels include the defect, each once, also where jobs overlap."""
    seen = set()
    for job in export.jobs():
        if defect not in job.labels:
            continue
        for frame in export.frames(job):
            if (job.task_id, frame.number) in seen:
                continue
            seen.add((job.task_id, frame.number))
            regions = [
                region_of(shape.kind, shape.points, frame.width, frame.height, shape.rotation)
                for shape in frame.shapes
                if shape.label == defect and shape.kind in AREA_TYPES
            ]
            path = photos.find(frame.name)
            size = size_on_disk(path, frame.name, frame.width, frame.height)
            scale_xy = size[0] / frame.width, size[1] / frame.height
            if scale_xy != (1.0, 1.0):
                regions = [resized(region, *scale_xy, *size) for region in regions if region is not None]
            yield OldPhoto(*set_and_stem(path), path, [region for region in regions if region is not None])


def doubts_on_photo(predictor: Predictor, photo: OldPhoto, defect: str) -> list[Doubt]:
    """All shapes of a photo and all proposals beside them, with how much the model disagrees.

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
        confidence = component_confidence(component_features(shape, logits, maps.levels), fact.confidence_weights)
        touching = [i for i, proposal in enumerate(proposals) if common_px(proposal.component, shape)]
        on_shapes |= set(touching)
        own = [proposals[i].component for i in touching]
        agreement = 0.0
        if own:
            (proposed, truth), _, _ = on_one_crop([merged(own), shape], F1_MARGIN_PX)
            agreement = f1_2px(proposed, truth)
        by_kind = {"no defect": 1 - confidence, "outline": confidence * (1 - agreement)}
        kind = max(by_kind, key=by_kind.get)
        found.append(Doubt(photo, defect, kind, by_kind[kind], confidence, agreement, shape, own))
    for index, proposal in enumerate(proposals):
        if index not in on_shapes:
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
    parser = argparse.ArgumentParser(
        prog="defectcam audit",
        description=__doc__.split("\n\nExample")[0],
        epilog="Example" + __doc__.split("Example")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=lambda text: text.split(","), help="with --data: sets to audit, a,b")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all", help="with --data (default: all)")
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
        doubts, photos = [], 0
        for defect in args.defects or predictor.defects:
            if export:
                found = photos_of_export(export, folder, defect)
            else:
                found = photos_of_sets(args.data, args.sets, splits, defect)
            for photo in tqdm(list(found), desc=defect, unit="photo", disable=None):
                doubts += doubts_on_photo(predictor, photo, defect)
                photos += 1
        if not photos:
            sys.exit("nothing to audit: no photo has labels of the defects there are weights for")
        write_audit(doubts, photos, predictor.weights.version, args.top, args.out)
    except (CvatError, PhotoError, WeightsError, FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"{error}")
    print(f"{len(doubts)} shapes and proposals on {photos} photos ranked: {(args.out / 'index.html').resolve()}")
