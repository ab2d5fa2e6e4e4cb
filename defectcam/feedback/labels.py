"""Weak labels and outlines for training from the interactions that were harvested (paper 3.2 and beyond it).

Per defect, into --out:

clicks/<defect>.csv               for `defectcam train --clicks`. Accepted and modified proposals and misses give a
                                  click inside every part of the final shape. A rejected proposal, or one that was
                                  relabelled, gives a none-click inside the proposed region, if there is a patch
                                  around it without that defect. Weights go from 1 (accepted as it was) to 2 (all of
                                  the outline edited, rejected, or missed): the harder a case, the more it counts.
masks/<defect>/<set>/<stem>.png   for `defectcam train --masks`. The finished outlines of
                                  all photos of completed jobs, photos without the defect included; photos
                                  that were not looked at have none.

In file names, <defect> is the label's name, with %XX for what cannot stand in one (a label "a/b": clicks/a%2Fb.csv).

Photos are looked for below --photos by their name in CVAT; <set> is the folder a photo lies in (that of images/).

Example:
    defectcam weak-labels --photos ../shared/data --out out/feedback
    defectcam train --defect crack --clicks out/feedback/clicks/crack.csv --val-clicks val.csv --out out/train/crack
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.feedback.regions import innermost_xy
from defectcam.feedback.store import FrameRow, InteractionRow, JobRow, StoreError, add_store_option, open_store
from defectcam.image import ImageError, decode_image, pixel_limit
from defectcam.paths import file_name, inside, write_image
from defectcam.proposal_log import image_hash
from defectcam.proposals import Component, find_components
from defectcam.regions import AREA_TYPES, region_of, resized
from defectcam.training.clicks import Click, patch_bounds, write_clicks
from defectcam.training.labels import add_label_option, read_photo_rgb
from defectcam.training.names import check_label_names, meaning

PATCH_PX = 320  # paper 4.1
NEGATIVE_TRIES = 500  # pixels of a rejected region tried as a none-click, the innermost first


class PhotoError(RuntimeError):
    """A photo that cannot be used; the message says which and what to do."""


class PhotoFolder:
    """Photos below a folder, found by the names they have in CVAT."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "masks" not in path.relative_to(folder).parts:
                self._by_name[path.name].append(path)

    def find(self, name: str, image: str = "") -> Path:
        """The photo that CVAT calls `name`.

        Args:
            image: hash of its pixels, to choose by between photos of one name; "" if unknown.

        Raises:
            PhotoError: there is none, or several; or the name leads out of the folder.
        """
        try:
            exact = inside(self.folder, name)  # also where it lies behind a link, which the index does not follow
        except ValueError as error:
            raise PhotoError(f"a photo in CVAT: {error}") from None
        found = [path for path in self._by_name[Path(name).name] if path.as_posix().endswith(f"/{name}")]
        found = found or self._by_name[Path(name).name]
        if os.path.isfile(exact) and exact not in found:  # Path.is_file raises where a name is too long
            found = [exact, *found]
        if len(found) > 1 and image:  # cameras use a name again
            found = [path for path in found if _pixels_hash(path) == image] or found
        if exact in found:
            return exact
        if len(found) != 1:
            what = "no photo" if not found else f"{len(found)} photos"
            raise PhotoError(f"{what} {name} below {self.folder}; give --photos the folder that was uploaded to CVAT")
        return found[0]


def _pixels_hash(photo: Path) -> str:
    """A photo's `image_hash`, "" if it cannot be read."""
    try:
        return image_hash(decode_image(photo.read_bytes(), pixel_limit()))
    except ImageError:
        return ""


def set_and_stem(photo: Path) -> tuple[str, str]:
    """Names under which training knows a photo: its folder (the one above images/) and its file's stem."""
    parent = photo.absolute().parent  # of "images/a.png" the set's name is above
    return (parent.parent if parent.name == "images" else parent).name, photo.stem


@dataclass(frozen=True, eq=False)
class LabelledFrame:
    """A photo of a completed job as it lies on disk, with what was done on it, in px of the photo on disk.

    Attributes:
        path: of the photo.
        width, height: px.
        labels: what its annotator could have outlined.
        shapes: (key, label, region) of all shapes the annotator left.
        interactions: of the photo.
        scale_xy: from CVAT's px.
    """

    path: Path
    width: int
    height: int
    labels: tuple[str, ...]
    shapes: list[tuple[str, str, Component]]
    interactions: list[InteractionRow]
    scale_xy: tuple[float, float]

    def mask(self, label: str) -> np.ndarray:
        """All pixels of a label, (height, width) bool."""
        mask = np.zeros((self.height, self.width), bool)
        for _, own, region in self.shapes:
            if own == label:
                x0, y0, x1, y1 = region.box_xyxy
                mask[y0 : y1 + 1, x0 : x1 + 1] |= region.mask
        return mask

    def on_disk(self, region: Component | None) -> Component | None:
        """A region of CVAT's photo on the photo on disk."""
        if region is None or self.scale_xy == (1.0, 1.0):
            return region
        return resized(region, *self.scale_xy, self.width, self.height)


def labelled_frames(
    engine: Engine, photos: PhotoFolder, label_names: Mapping[str, str] | None = None
) -> Iterator[LabelledFrame]:
    """All photos of the database, those of the jobs completed last at the end.

    A photo that is missing or cannot be read, or was cropped or turned since, is named and left out.

    Args:
        label_names: what labels mean, such as {"Riss": "crack"}.

    Raises:
        PhotoError, FileNotFoundError, ImageError: no photo is left.
        ValueError: neither a label of `label_names` nor what it means is in the database.
    """

    def meant(label: str | None) -> str | None:
        return label and meaning(label, label_names or {})

    left_out, found = None, False
    with Session(engine, autoflush=False) as session:  # what labels mean is not for the database
        jobs = session.scalars(select(JobRow).order_by(JobRow.completed, JobRow.server, JobRow.job)).all()
        there = {label for job in jobs for label in job.labels}
        new = {label: defect for label, defect in (label_names or {}).items() if defect not in there}
        check_label_names(new, there, "the database", ())
        for job in tqdm(jobs, desc="jobs", unit="job", disable=None):
            of_job = (FrameRow.server == job.server, FrameRow.job == job.job)
            rows = defaultdict(list)
            interactions = select(InteractionRow).where(
                InteractionRow.server == job.server, InteractionRow.job == job.job
            )
            for row in session.scalars(interactions.order_by(InteractionRow.id)):
                row.defect, row.final_defect = meant(row.defect), meant(row.final_defect)
                rows[row.frame].append(row)
            for frame in session.scalars(select(FrameRow).where(*of_job).order_by(FrameRow.frame)):
                try:
                    labels = tuple(dict.fromkeys(map(meant, job.labels)))
                    frame.shapes = [{**shape, "label": meant(shape["label"])} for shape in frame.shapes]
                    labelled = _labelled_frame(frame, labels, rows[frame.frame], photos)
                except (PhotoError, FileNotFoundError, ImageError) as error:
                    left_out = error
                    tqdm.write(f"left out: {error}", file=sys.stderr)
                    continue
                found = True
                yield labelled
    if left_out and not found:
        raise left_out


def size_on_disk(path: Path, name: str, cvat_width: int, cvat_height: int) -> tuple[int, int]:
    """Width and height of a photo, px, which may be another size than CVAT's.

    Raises:
        PhotoError: its proportions are others than in CVAT.
        FileNotFoundError, ImageError: it cannot be read.
    """
    height, width = read_photo_rgb(path).shape[:2]
    stretched = (width / cvat_width) / (height / cvat_height)
    if abs(stretched - 1) > 2 / min(width, height, cvat_width, cvat_height):
        raise PhotoError(
            f"{path} is {width} x {height} px, but CVAT's {name} {cvat_width} x {cvat_height}: not the same "
            "photo, or cropped or turned since; give --photos the folder that was uploaded to CVAT"
        )
    return width, height


def _labelled_frame(
    frame: FrameRow, labels: tuple[str, ...], interactions: list[InteractionRow], photos: PhotoFolder
) -> LabelledFrame:
    path = photos.find(frame.photo, frame.image)
    width, height = size_on_disk(path, frame.photo, frame.width, frame.height)
    scale_xy = (width / frame.width, height / frame.height)
    labelled = LabelledFrame(path, width, height, labels, [], interactions, scale_xy)
    for shape in frame.shapes:
        if shape["type"] in AREA_TYPES:
            region = region_of(shape["type"], shape["points"], frame.width, frame.height, shape["rotation"])
            region = labelled.on_disk(region)
            if region is not None:
                labelled.shapes.append((shape["key"], shape["label"], region))
    return labelled


def clicks_of_frame(frame: LabelledFrame, patch_px: int) -> list[Click]:
    """The weak labels of one photo.

    Args:
        patch_px: side of the patch around a none-click that must be free of the defect, as the crops of training.
    """
    regions = {key: (label, region) for key, label, region in frame.shapes}
    set_name, stem = set_and_stem(frame.path)
    found = []

    def click(row: InteractionRow, xy: tuple[int, int], defect: str, absent: str, effort: float) -> None:
        weight = round(1 + effort, 4)
        side_px = patch_px if defect == "none" else 0
        found.append(Click(str(frame.path), *xy, defect, absent, f"{set_name}/{stem}", weight, row.id, side_px))

    for row in frame.interactions:
        # Where the proposal's geometry is unknown, so is the effort: half.
        effort = 0.5 if row.edited_share is None else row.edited_share
        for key in row.shape_keys:
            if key in regions:
                label, region = regions[key]
                for part in find_components(region.mask):
                    x, y = innermost_xy(part)
                    click(row, (x + region.left, y + region.top), label, "", effort)
        if row.proposed and row.final_defect != row.defect:  # rejected or relabelled: not what was proposed
            region = region_of(row.proposed["type"], row.proposed["points"], *_cvat_size(frame))
            xy = free_pixel_xy(frame.on_disk(region), frame.mask(row.defect), patch_px)
            if xy:
                click(row, xy, "none", row.defect, 1.0)
    return found


def free_pixel_xy(region: Component | None, occupied: np.ndarray, patch_px: int) -> tuple[int, int] | None:
    """A pixel of a region, as far inside as can be, whose patch holds no occupied pixel; None if there is none.

    Args:
        occupied: (H, W) bool, where the defect is.
        patch_px: side of the patch, moved inside the photo at its edges.
    """
    if region is None:
        return None
    summed = cv2.integral(occupied.astype(np.uint8))
    depth = cv2.distanceTransform(np.pad(region.mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    depth = depth[1:-1, 1:-1]
    order = np.argsort(-depth[region.mask], kind="stable")
    ys, xs = (axis[order] for axis in np.nonzero(region.mask))
    for index in range(0, len(xs), max(1, len(xs) // NEGATIVE_TRIES)):
        x, y = int(xs[index]) + region.left, int(ys[index]) + region.top
        x0, x1 = patch_bounds(x, patch_px, occupied.shape[1])
        y0, y1 = patch_bounds(y, patch_px, occupied.shape[0])
        if summed[y1, x1] - summed[y0, x1] - summed[y1, x0] + summed[y0, x0] == 0:
            return x, y
    return None


def write_weak_labels(
    engine: Engine, photos: PhotoFolder, patch_px: int, out: Path, label_names: Mapping[str, str] | None = None
) -> dict[str, Counter]:
    """Write clicks and masks of everything in a database, in place of those of the last time.

    Of a photo that several jobs looked at for a label, the one completed last counts.

    Returns:
        Per defect the number of positive clicks, none-clicks, masks, and of wrong proposals.

    `label_names` and further errors as of `labelled_frames`.

    Raises:
        PhotoError: before anything is written.
    """
    if (out / "images").exists():
        raise PhotoError(f"--out {out} is a set of photos, and its masks would be replaced: choose another folder")
    frames = list(labelled_frames(engine, photos, label_names))
    _check_names(frames)
    last = {(frame.path, label): frame for frame in frames for label in frame.labels}
    clicks: dict[str, list[Click]] = defaultdict(list)
    counts: dict[str, Counter] = defaultdict(Counter)
    part = out / "weak-labels.part"  # what a killed run leaves there is no one's
    shutil.rmtree(part, ignore_errors=True)
    for frame in tqdm(frames, desc="photos", unit="photo", disable=None):
        own_labels = {label for label in frame.labels if last[frame.path, label] is frame}
        for click in clicks_of_frame(frame, patch_px):
            if (click.absent or click.defect) in own_labels:
                clicks[click.absent or click.defect].append(click)
        for label in own_labels:
            set_name, stem = set_and_stem(frame.path)
            path = part / "masks" / file_name(label) / set_name / f"{stem}.png"
            if path.exists():  # on file systems to which capital letters are the same as small ones
                raise PhotoError(f"two masks would share the file {path.relative_to(part)}: rename a label or a photo")
            write_image(path, frame.mask(label).astype(np.uint8) * 255)
            counts[label]["masks"] += 1
        for row in frame.interactions:
            counts[row.defect]["wrong proposals"] += row.final_defect != row.defect and row.defect in own_labels
    for defect, own in clicks.items():
        (part / "clicks").mkdir(parents=True, exist_ok=True)
        write_clicks(part / "clicks" / file_name(defect, ".csv"), own)
        counts[defect]["positive"] = sum(click.defect != "none" for click in own)
        counts[defect]["none"] = sum(click.defect == "none" for click in own)
    for folder in (out / "clicks", out / "masks"):
        shutil.rmtree(folder, ignore_errors=True)
        if (part / folder.name).exists():
            (part / folder.name).replace(folder)
    shutil.rmtree(part, ignore_errors=True)
    return dict(counts)


def _check_names(frames: Sequence[LabelledFrame]) -> None:
    """PhotoError where two photos would share their masks' name."""
    photos: dict[tuple[str, str], Path] = {}
    for frame in frames:
        other = photos.setdefault(set_and_stem(frame.path), frame.path)
        if other != frame.path:
            raise PhotoError(
                f"{other} and {frame.path} would share the mask {'/'.join(set_and_stem(other))}.png: rename one of the "
                "photos' folders, here alone"
            )


def _cvat_size(frame: LabelledFrame) -> tuple[int, int]:
    return round(frame.width / frame.scale_xy[0]), round(frame.height / frame.scale_xy[1])


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam weak-labels`."""
    parser = command_parser("weak-labels", __doc__)
    add_store_option(parser)
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photos, as uploaded to CVAT")
    parser.add_argument(
        "--patch-px", type=int, default=PATCH_PX, help="crop size of the training to come (default: %(default)s)"
    )
    add_label_option(parser)
    parser.add_argument("--out", type=Path, default=Path("out/feedback"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.photos.is_dir():
        parser.error(f"--photos {args.photos} is no folder")
    try:
        engine, photos = open_store(args.db, make=False), PhotoFolder(args.photos)
        counts = write_weak_labels(engine, photos, args.patch_px, args.out, args.label_names)
    except (StoreError, PhotoError, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    for defect, of in sorted(counts.items()):
        print(
            f"{file_name(defect)}: {of['positive']} positive clicks, {of['none']} none-clicks of {of['wrong proposals']} wrong "
            f"proposals, {of['masks']} masks"
        )
    print(f"written: {args.out.resolve()}")
