"""Weak labels and outlines for training from the interactions that were harvested (paper 3.2 and beyond it).

Per defect, into --out:

clicks/<defect>.csv               for `defectcam train --clicks`. Accepted and modified proposals and misses give a click
                                  inside every part of the final shape. A rejected or relabelled proposal gives a negative
                                  click inside the proposed region, if there is a patch around it without that defect.
                                  Weights go from 1 (accepted as it was) to 2 (outline all edited, rejected, or missed).
masks/<defect>/<set>/<stem>.png   for `defectcam train --masks`: the finished outlines of all photos of completed jobs, photos
                                  without the defect included.

In file names, <defect> is the label's name, with %XX for what cannot stand in one (a label "a/b": clicks/a%2Fb.csv).

Photos are looked for below --photos by their name in CVAT; <set> is the folder a photo lies in (that of images/).

Example:
    defectcam weak-labels --photos ../shared/data --out out/feedback
    defectcam train --defect crack --clicks out/feedback/clicks/crack.csv --val-clicks val.csv --out out/train/crack
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.evaluation.figures import painted
from defectcam.feedback.photos import DiskPhoto, PhotoError, PhotoFolder, set_and_stem
from defectcam.feedback.regions import depth_px, innermost_xy
from defectcam.feedback.store import FrameRow, InteractionRow, JobRow, StoreError, add_store_option, open_store
from defectcam.image import ImageError
from defectcam.paths import file_name, write_image
from defectcam.proposals import Component, find_components
from defectcam.training.clicks import Click, patch_is_free, write_clicks
from defectcam.training.labels import add_label_option
from defectcam.training.names import check_label_names, meaning

PATCH_PX = 320  # paper 4.1
NEGATIVE_TRIES = 500  # pixels of a rejected region tried as a negative click, the innermost first


@dataclass(frozen=True, eq=False)
class LabelledFrame:
    """A photo of a completed job as it lies on disk, with what was done on it.

    Attributes:
        photo: on disk.
        labels: what its annotator could have outlined.
        shapes: key -> label and region (px of the photo on disk) of all shapes that the annotator left.
        interactions: of the photo.
    """

    photo: DiskPhoto
    labels: tuple[str, ...]
    shapes: dict[str, tuple[str, Component]]
    interactions: list[InteractionRow]

    def mask(self, label: str) -> np.ndarray:
        """All pixels of a label, (height, width) bool."""
        regions = [region for shape_label, region in self.shapes.values() if shape_label == label]
        return painted(regions, (self.photo.height, self.photo.width))


def labelled_frames(engine: Engine, photos: PhotoFolder, label_names: Mapping[str, str]) -> Iterator[LabelledFrame]:
    """All photos of the database, those of the jobs completed last at the end.

    A photo that is missing or cannot be read, or was cropped or turned since, is named and left out.

    Args:
        label_names: what labels mean, such as {"Riss": "crack"}.

    Raises:
        PhotoError, FileNotFoundError, ImageError: no photo is left.
        ValueError: neither a label of `label_names` nor what it means is in the database.
    """

    def defect_of(label: str | None) -> str | None:
        return label and meaning(label, label_names)

    last_error, found = None, False
    with Session(engine, autoflush=False) as session:  # the database keeps the labels as they are in CVAT
        jobs = session.scalars(select(JobRow).order_by(JobRow.completed, JobRow.server, JobRow.job)).all()
        known_labels = {label for job in jobs for label in job.labels}
        new = {label: defect for label, defect in label_names.items() if defect not in known_labels}
        check_label_names(new, known_labels, "the database", ())
        for job in tqdm(jobs, desc="jobs", unit="job", disable=None):
            labels = tuple(dict.fromkeys(map(defect_of, job.labels)))
            for frame in job.frames:
                for row in frame.interactions:
                    row.defect, row.final_defect = defect_of(row.defect), defect_of(row.final_defect)
                try:
                    photo = photos.find(frame.photo, frame.width, frame.height, frame.image)
                except (PhotoError, FileNotFoundError, ImageError) as error:
                    last_error = error
                    tqdm.write(f"left out: {error}", file=sys.stderr)
                    continue
                found = True
                yield LabelledFrame(photo, labels, _shapes_on_disk(frame, photo, defect_of), frame.interactions)
    if last_error and not found:
        raise last_error


def _shapes_on_disk(frame: FrameRow, photo: DiskPhoto, defect_of: Callable[[str], str]) -> dict[str, tuple[str, Component]]:
    """`LabelledFrame.shapes` of a stored frame."""
    return {
        shape["key"]: (defect_of(shape["label"]), region)
        for shape in frame.shapes
        if (region := photo.region(shape["type"], shape["points"], shape["rotation"])) is not None
    }


def clicks_of_frame(frame: LabelledFrame, patch_px: int) -> list[Click]:
    """The weak labels of one photo.

    Args:
        patch_px: side of the patch around a negative click that must be free of the defect, as the crops of training.
    """
    path, group = str(frame.photo.path), "/".join(set_and_stem(frame.photo.path))
    found = []
    for row in frame.interactions:
        # Where the proposal's geometry is unknown, so is the effort: half.
        effort = 0.5 if row.edited_share is None else row.edited_share
        for label, region in (frame.shapes[key] for key in row.shape_keys if key in frame.shapes):
            for part in find_components(region.mask):
                x, y = innermost_xy(part)
                found.append(Click(path, x + region.left, y + region.top, label, "", group, round(1 + effort, 4), row.id))
        if row.proposed and row.final_defect != row.defect:  # rejected or relabelled: not what was proposed
            region = frame.photo.region(row.proposed["type"], row.proposed["points"])
            if region and (xy := free_pixel_xy(region, frame.mask(row.defect), patch_px)):
                found.append(Click(path, *xy, "none", row.defect, group, 2.0, row.id, patch_px))
    return found


def free_pixel_xy(region: Component, occupied: np.ndarray, patch_px: int) -> tuple[int, int] | None:
    """A pixel of a region, as far inside as can be, whose patch holds no occupied pixel; None if there is none.

    Args:
        occupied: (H, W) bool, where the defect is.
        patch_px: side of the patch, moved inside the photo at its edges.
    """
    summed = cv2.integral(occupied.astype(np.uint8))
    order = np.argsort(-depth_px(region)[region.mask], kind="stable")
    ys, xs = (axis[order] for axis in np.nonzero(region.mask))
    for index in range(0, len(xs), max(1, len(xs) // NEGATIVE_TRIES)):
        x, y = int(xs[index]) + region.left, int(ys[index]) + region.top
        if patch_is_free(summed, x, y, patch_px):
            return x, y
    return None


def write_weak_labels(
    engine: Engine, photos: PhotoFolder, patch_px: int, out: Path, label_names: Mapping[str, str]
) -> dict[str, Counter]:
    """Write clicks and masks of everything in a database, in place of those of the last time.

    Of a photo that several jobs looked at for a label, the job that was completed last counts.

    Args:
        label_names: as of `labelled_frames`.

    Returns:
        Per defect the number of positive clicks, negative clicks, masks, and of wrong proposals.

    Raises:
        PhotoError: before anything is written. Further errors are those of `labelled_frames`.
    """
    if (out / "images").exists():
        raise PhotoError(f"--out {out} is a set of photos, and its masks would be replaced: choose another folder")
    frames = list(labelled_frames(engine, photos, label_names))
    photos_by_name: dict[str, Path] = {}
    for path in (frame.photo.path for frame in frames):
        name = "/".join(set_and_stem(path))
        if (other := photos_by_name.setdefault(name, path)) != path:
            raise PhotoError(f"{other} and {path} would share the mask {name}.png: rename one of the photos' folders, here alone")
    part = out / "weak-labels.part"  # a killed run may have left one
    shutil.rmtree(part, ignore_errors=True)
    counts = _write_labels(frames, patch_px, part)
    for folder in (out / "clicks", out / "masks"):
        shutil.rmtree(folder, ignore_errors=True)
        if (part / folder.name).exists():
            (part / folder.name).replace(folder)
    shutil.rmtree(part, ignore_errors=True)
    return counts


def _write_labels(frames: Sequence[LabelledFrame], patch_px: int, folder: Path) -> dict[str, Counter]:
    """Write the clicks and masks of some photos; for the numbers see `write_weak_labels`."""
    last = {(frame.photo.path, label): frame for frame in frames for label in frame.labels}
    clicks: dict[str, list[Click]] = defaultdict(list)
    counts: dict[str, Counter] = defaultdict(Counter)
    for frame in tqdm(frames, desc="photos", unit="photo", disable=None):
        counting = {label for label in frame.labels if last[frame.photo.path, label] is frame}
        for click in clicks_of_frame(frame, patch_px):
            if (click.negative_for or click.defect) in counting:
                clicks[click.negative_for or click.defect].append(click)
        for label in counting:
            set_name, stem = set_and_stem(frame.photo.path)
            path = folder / "masks" / file_name(label) / set_name / f"{stem}.png"
            if path.exists():  # on file systems to which capital letters are the same as small ones
                raise PhotoError(f"two masks would share the file {path.relative_to(folder)}: rename a label or a photo")
            write_image(path, frame.mask(label).astype(np.uint8) * 255)
            counts[label]["masks"] += 1
        for row in frame.interactions:
            counts[row.defect]["wrong proposals"] += row.final_defect != row.defect and row.defect in counting
    for defect, of_defect in clicks.items():
        (folder / "clicks").mkdir(parents=True, exist_ok=True)
        write_clicks(folder / "clicks" / file_name(defect, ".csv"), of_defect)
        counts[defect]["positive"] = sum(click.defect != "none" for click in of_defect)
        counts[defect]["none"] = sum(click.defect == "none" for click in of_defect)
    return dict(counts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam weak-labels`."""
    parser = command_parser("weak-labels", __doc__)
    add_store_option(parser)
    parser.add_argument("--photos", type=Path, required=True, help="folder of the photos, as uploaded to CVAT")
    parser.add_argument("--patch-px", type=int, default=PATCH_PX, help="crop size of the training to come (default: %(default)s)")
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
    for defect, count in sorted(counts.items()):
        print(
            f"{file_name(defect)}: {count['positive']} positive clicks, {count['none']} negative clicks of "
            f"{count['wrong proposals']} wrong proposals, {count['masks']} masks"
        )
    print(f"written: {args.out.resolve()}")
