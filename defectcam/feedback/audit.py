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

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.evaluation.measures import f1_2px
from defectcam.evaluation.pages import page, write_ranking
from defectcam.cvat.client import CvatError
from defectcam.feedback.cvat_export import CvatExport
from defectcam.feedback.photos import PhotoError, PhotoFolder, set_and_stem
from defectcam.feedback.regions import common_px
from defectcam.image import ImageError
from defectcam.predict import Predictor, open_weights, proposals_for
from defectcam.proposals import Component, component_confidence, component_features, find_components
from defectcam.pyramid import Pyramid
from defectcam.regions import AREA_TYPES, merged, on_one_crop
from defectcam.training.clicks import split_stems
from defectcam.training.config import names
from defectcam.training.finished import Box
from defectcam.training.labels import LabelledSet, add_label_option, photo_size, read_photo_rgb
from defectcam.training.names import LabelNames, check_label_names
from defectcam.weights import WeightsError, add_weights_option

F1_MARGIN_PX = 3
PICTURE_PX = 480
PICTURE_MARGIN = 0.5  # of the shape's longer side around it
LEAST_PICTURED_PX = 160
TRUTH_RGB, PROPOSED_RGB = (0, 220, 60), (255, 40, 40)


@dataclass(frozen=True, eq=False)
class AuditedPhoto:
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
        """Whether at least half of a region is in finished parts."""
        if self.finished is None:
            return True
        ys, xs = np.nonzero(region.mask) + np.array([[region.top], [region.left]])
        known = [(x0 <= xs) & (xs < x1) & (y0 <= ys) & (ys < y1) for x0, y0, x1, y1 in self.finished]
        return 2 * np.count_nonzero(np.any(known, axis=0)) >= region.area_px


@dataclass(frozen=True, eq=False)
class LabelIssue:
    """A shape, or the lack of one, that the model disagrees with; for the figures see the top of this module."""

    photo: AuditedPhoto
    defect: str
    kind: str
    disagreement: float
    confidence: float
    f1_2px: float
    region: Component
    proposals: list[Component]


def leave_out(what: object, left_out: set[str]) -> None:
    """Say once on standard error what is left out."""
    if str(what) not in left_out:
        left_out.add(str(what))
        tqdm.write(f"left out: {what}", file=sys.stderr)


def photos_of_sets(
    data: Path,
    sets: Sequence[str],
    splits: Sequence[str],
    defect: str,
    label_names: Mapping[str, str] | None = None,
    left_out: set[str] | None = None,
) -> Iterator[AuditedPhoto]:
    """The photos of data sets that have labels of the defect, an empty mask included.

    Args:
        label_names: as `LabelledSet` takes them.
        left_out: gets what was said of photos that are missing or cannot be read.

    Raises:
        ValueError, FileNotFoundError: as of `LabelledSet`.
    """
    left_out = set() if left_out is None else left_out
    for set_name in sets:
        files = LabelledSet(data, set_name, defect, label_names)
        for stem in [stem for split in splits for stem in split_stems(data, set_name, split)]:
            try:
                path = files.photo(stem)
                size = photo_size(path)
            except (FileNotFoundError, ImageError) as error:
                leave_out(error, left_out)
                continue
            if files.mask(stem):
                shapes = find_components(files.read_mask(stem, *size))
                yield AuditedPhoto(set_name, stem, path, shapes, files.finished_boxes(stem))


def photos_of_export(
    export: CvatExport,
    photos: PhotoFolder,
    defect: str,
    label_names: Mapping[str, str] | None = None,
    left_out: set[str] | None = None,
) -> Iterator[AuditedPhoto]:
    """The photos of an export whose labels include the defect, each once, also where jobs overlap.

    Args:
        label_names: as for `photos_of_sets`.
        left_out: gets what was said of shapes without area, and of photos that are missing, cannot be read, or were cropped
            or turned since.

    Raises:
        CvatError: something in the export cannot be read.
    """
    left_out = set() if left_out is None else left_out
    names, seen = LabelNames(defect, label_names or {}), set()
    for job in export.jobs():
        if not any(map(names.is_defect, job.labels)):
            continue
        for frame in export.frames(job):
            if (job.task_id, frame.number) in seen:
                continue
            seen.add((job.task_id, frame.number))
            shapes = [shape for shape in frame.shapes if names.is_defect(shape.label)]
            for shape in shapes:
                if shape.kind not in AREA_TYPES:
                    what = f"a {shape.kind} on {frame.name}, {shape.label!r}, which is no region: draw it as a polygon"
                    leave_out(what, left_out)
            try:
                photo = photos.find(frame.name, frame.width, frame.height)
            except (PhotoError, FileNotFoundError, ImageError) as error:
                leave_out(error, left_out)
                continue
            regions = [photo.region(shape.kind, shape.points, shape.rotation) for shape in shapes]
            yield AuditedPhoto(*set_and_stem(photo.path), photo.path, [region for region in regions if region is not None])


def label_issues_of(predictor: Predictor, photo: AuditedPhoto, defect: str) -> list[LabelIssue]:
    """All shapes of a photo and all proposals beside them, with how much the model disagrees; in finished parts alone.

    Raises:
        ValueError: the labels were made on a photo of another size.
    """
    image_rgb = read_photo_rgb(photo.path)
    height, width = image_rgb.shape[:2]
    for shape in photo.shapes:
        if shape.box_xyxy[2] >= width or shape.box_xyxy[3] >= height:
            raise ValueError(f"{photo.path} is {width} x {height} px, its labels reach {shape.box_xyxy[2:]}: other photo?")
    config = predictor.weights.configs[defect]
    maps = predictor.maps(Pyramid(image_rgb), defect)
    proposals = proposals_for(maps, config, [config.iterations])[config.iterations]
    logits = maps.merged()
    found, on_shapes = [], set()
    for shape in photo.shapes:
        touching = [index for index, proposal in enumerate(proposals) if common_px(proposal.component, shape)]
        on_shapes |= set(touching)
        if not photo.is_known(shape):
            continue
        confidence = component_confidence(component_features(shape, logits, maps.levels), config.confidence_weights)
        on_shape = [proposals[index].component for index in touching]
        agreement = 0.0
        if on_shape:
            (proposed, truth), _, _ = on_one_crop([merged(on_shape), shape], F1_MARGIN_PX)
            agreement = f1_2px(proposed, truth)
        by_kind = {"no defect": 1 - confidence, "outline": confidence * (1 - agreement)}
        kind = max(by_kind, key=by_kind.get)
        found.append(LabelIssue(photo, defect, kind, by_kind[kind], confidence, agreement, shape, on_shape))
    for index, proposal in enumerate(proposals):
        if index not in on_shapes and photo.is_known(proposal.component):
            sure, region = proposal.confidence, proposal.component
            found.append(LabelIssue(photo, defect, "missing", sure, sure, 0.0, region, [region]))
    return found


def picture_of(issue: LabelIssue) -> np.ndarray:
    """The surroundings of an issue beside the same with outlines (label green, proposals red), (h, w, 3) uint8 RGB."""
    image = read_photo_rgb(issue.photo.path)
    x0, y0, x1, y1 = issue.region.box_xyxy
    margin = max(int(PICTURE_MARGIN * max(x1 - x0, y1 - y0)), (LEAST_PICTURED_PX - max(x1 - x0, y1 - y0)) // 2, 0)
    left, top = max(0, x0 - margin), max(0, y0 - margin)
    crop = image[top : y1 + margin + 1, left : x1 + margin + 1]
    factor = PICTURE_PX / max(crop.shape[:2])
    plain = cv2.resize(crop, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    drawn = plain.copy()
    truth = [] if issue.kind == "missing" else [issue.region]
    for regions, colour in ((truth, TRUTH_RGB), (issue.proposals, PROPOSED_RGB)):
        for region in regions:
            lines, _ = cv2.findContours(region.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            for line in lines:
                line_xy = (line + 0.5 + np.array([region.left - left, region.top - top])) * factor
                cv2.polylines(drawn, [np.rint(line_xy).astype(np.int32)], True, colour, 1, cv2.LINE_AA)
    return np.hstack([plain, drawn])


BODY = """
<p>{{ shapes }} shapes on {{ photos }} photos, judged by weights {{ version }}. Shown are the {{ issues|length }} that
the model disagrees with most; the label is outlined in green, what the model proposes in red.</p>
{% for issue in issues %}<figure><img src="{{ issue.picture }}" alt="{{ issue.kind }}: {{ issue.stem }}" loading="lazy">
<figcaption>{{ issue.rank }}. <b>{{ issue.kind }}</b> {{ issue.defect }}, {{ issue.set }}/{{ issue.stem }}
at x {{ issue.x }}, y {{ issue.y }}:
disagreement {{ issue.disagreement }}, confidence {{ issue.confidence }}, F1 {{ issue.f1_2px }}</figcaption></figure>
{% endfor %}"""
COLUMNS = ("rank", "disagreement", "kind", "defect", "set", "stem", "x", "y", "width", "height", "confidence", "f1_2px")


def write_audit(issues: list[LabelIssue], photos: int, version: str, top: int, out: Path) -> None:
    """Write audit.csv (all issues, worst first), pictures of the `top` worst, and index.html that shows them."""
    issues = sorted(issues, key=lambda issue: -issue.disagreement)
    rows = []
    for rank, issue in enumerate(issues, start=1):
        x0, y0, x1, y1 = issue.region.box_xyxy
        place = (issue.photo.set_name, issue.photo.stem, x0, y0, x1 - x0 + 1, y1 - y0 + 1)
        measures = (round(issue.confidence, 3), round(issue.f1_2px, 3))
        rows.append((rank, round(issue.disagreement, 3), issue.kind, issue.defect, *place, *measures))
    shown = write_ranking(out / "audit.csv", COLUMNS, rows, map(picture_of, issues[:top]))
    shapes = sum(issue.kind != "missing" for issue in issues)
    html = page("Doubtful labels", BODY, issues=shown, shapes=shapes, photos=photos, version=version)
    (out / "index.html").write_text(html, encoding="utf-8")


def audit(args: argparse.Namespace, predictor: Predictor) -> None:
    """Audit the labels that the arguments name, and write what was found to their folder.

    Raises:
        CvatError, PhotoError, ValueError, FileNotFoundError: there is nothing to audit. The message says why.
    """
    export, folder, labels = None, None, set()
    if args.export:
        export, folder = CvatExport(args.export, None), PhotoFolder(args.photos)
        labels = {label for job in export.jobs() for label in job.labels}
        check_label_names(args.label_names, labels, str(args.export), predictor.defects)
        for note in export.notes:
            print(note, file=sys.stderr)
    splits = ("train", "val") if args.split == "all" else (args.split,)
    issues, photos, lacking, left_out = [], 0, [], set()
    for defect in args.defects or predictor.defects:
        if export:
            label_names = LabelNames(defect, args.label_names)
            if not any(map(label_names.is_defect, labels)):
                lacking.append(f"{args.export} {label_names.lacking(labels)}")
            for label in label_names.nearly(labels):
                what = f"the label {label!r} of {args.export}; if it is {defect}, say so by --label {label}={defect}"
                leave_out(what, left_out)
            found = photos_of_export(export, folder, defect, args.label_names, left_out)
        else:
            found = photos_of_sets(args.data, args.sets, splits, defect, args.label_names, left_out)
        for photo in tqdm(list(found), desc=defect, unit="photo", disable=None):
            try:
                issues += label_issues_of(predictor, photo, defect)
                photos += 1
            except (FileNotFoundError, ImageError) as error:
                leave_out(error, left_out)
    if not photos:
        why = "every photo is left out, the lines above say why" if left_out else "no photo has labels of the defects"
        raise ValueError("\n".join(lacking) or f"nothing to audit: {why}")
    for what in lacking:
        print(what, file=sys.stderr)
    write_audit(issues, photos, predictor.weights.version, args.top, args.out)
    print(f"{len(issues)} shapes and proposals on {photos} photos ranked: {(args.out / 'index.html').resolve()}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam audit`."""
    parser = command_parser("audit", __doc__)
    parser.add_argument("--data", type=Path, help="folder of sets with splits.json")
    parser.add_argument("--sets", type=names, help="with --data: sets to audit, a,b")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all", help="with --data (default: all)")
    add_label_option(parser)
    parser.add_argument("--export", type=Path, help='an export from CVAT as "CVAT for images 1.1"')
    parser.add_argument("--photos", type=Path, help="with --export: folder of the photos, as uploaded to CVAT")
    parser.add_argument("--defects", type=names, help="of those with weights (default: all)")
    add_weights_option(parser)
    parser.add_argument("--top", type=int, default=100, help="how many are shown as pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/audit"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.export) or bool(args.data) != bool(args.sets) or bool(args.export) != bool(args.photos):
        parser.error("give --data and --sets, or --export and --photos")
    try:
        predictor = open_weights(args.weights)
        unknown = set(args.defects or ()) - set(predictor.defects)
        if unknown:
            parser.error(f"--defects names {sorted(unknown)[0]}; {args.weights} has weights for {predictor.defects}")
        audit(args, predictor)
    except (CvatError, PhotoError, WeightsError, FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"{error}")
