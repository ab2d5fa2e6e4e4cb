"""The shapes of one defect on the photos of a data set, from the set's label files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from defectcam.training.label_files import LABELME, ONE_FILE_A_PHOTO, YOLO, LabelFile, PhotoShapes, label_files
from defectcam.training.names import LabelNames, PhotoNames

NAMES_SHOWN = 3


class DefectShapes:
    """Which shapes are the defect's, and on which photos; false where no label file has such a label.

    Args:
        set_dir: folder of the set.
        names: which labels are the defect.
        photo_names: the set's photos.

    Raises:
        ValueError: a label file cannot be read; files of two formats have labels of the defect; a file names photos of
            which none is there, or one that may be either of two.
    """

    def __init__(self, set_dir: Path, names: LabelNames, photo_names: PhotoNames) -> None:
        self._set_dir, self._names = set_dir, names
        self._all = label_files(set_dir)
        kinds: dict[str, LabelFile] = {}
        for file in self._all:
            if any(map(names.is_defect, file.labels)):
                kinds.setdefault(file.kind, file)
        if len(kinds) > 1:
            (kind, file), (other_kind, other), *_ = kinds.items()
            raise ValueError(
                f"{file.path} ({kind}) and {other.path} ({other_kind}) both have labels of {names.defect}: which count? "
                f"Move one out of {set_dir}"
            )
        self._kind, self.source = next(((kind, file.path) for kind, file in kinds.items()), ("", None))
        nearly = names.nearly({label for file in self._all if file.kind == self._kind for label in file.labels})
        if nearly:
            print(f"{self.source}: the label {nearly[0]!r} does not count as {names.defect}; if it is, say so by --label "
                  f"{nearly[0]}={names.defect}", file=sys.stderr)  # fmt: skip
        self._photos: dict[str, list[PhotoShapes]] = {}
        self._match(photo_names)

    def __bool__(self) -> bool:
        return bool(self._kind)

    def check_labels(self) -> None:
        """ValueError where the set has label files, but none with the defect."""
        if self._all and not self._kind:
            labels = sorted({label for file in self._all for label in file.labels})
            path = self._all[0].path if len(self._all) == 1 or self._all[0].kind not in ONE_FILE_A_PHOTO else (
                f"the set {self._set_dir} ({self._all[0].kind})"
            )  # fmt: skip
            raise ValueError(
                f"{path} {self._names.lacking(labels)}. If the set has no {self._names.defect}, name it with --none-sets or "
                "--healthy-sets, or ask for other --defects"
            )

    def path(self, stem: str) -> Path:
        """Path of the label file that has a photo.

        Raises:
            ValueError: none has it, or two have shapes of the defect on it.
        """
        return self._photo(stem).path

    def mask(self, stem: str, photo: Path, height: int, width: int) -> np.ndarray:
        """Where a photo shows the defect, (H, W) bool.

        Args:
            photo: path of it, for messages.

        Raises:
            ValueError: as `path`; the file was made for another size; a shape is no region, or lies outside of the photo.
        """
        found = self._photo(stem)
        own = found.width or width, found.height or height
        if own != (width, height):
            turned = " (was it labelled without its turn by EXIF?)" if own == (height, width) else ""
            raise ValueError(
                f"{found.path} was made for a photo {found.name} of {own[0]} x {own[1]} px, but {photo} has {width} x "
                f"{height} px{turned}: both must be the same"
            )
        mask = np.zeros((height, width), bool)
        for shape in found.shapes:
            if not self._names.is_defect(shape.label):
                continue
            where = f"{found.path}: {shape.where} of the photo {found.name}, {shape.label!r},"
            try:
                region = shape.region(width, height)
            except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
                raise ValueError(f"{where} {error if isinstance(error, ValueError) else repr(error)}") from None
            if region is None:
                raise ValueError(f"{where} has no pixel in the photo of {width} x {height} px: remove or mend it")
            x0, y0, x1, y1 = region.box_xyxy
            mask[y0 : y1 + 1, x0 : x1 + 1] |= region.mask
        return mask

    def _photo(self, stem: str) -> PhotoShapes:
        found = self._photos.get(stem)
        if not found:
            raise ValueError(
                f"the labels of the photo {stem} are unknown: {self._remedy(stem)}, or take it out of splits.json"
            )
        # Tasks of several defects may share a photo; two that both have this one are two opinions.
        with_defect = [one for one in found if any(self._names.is_defect(shape.label) for shape in one.shapes)]
        if len(with_defect) > 1:
            one, other = with_defect[:2]
            places = f"{one.path} and {other.path}" if one.path != other.path else f"two entries of {one.path}"
            raise ValueError(f"{places} both have {self._names.defect} on the photo {stem}: which counts? Remove one")
        return (with_defect or found)[0]

    def _remedy(self, stem: str) -> str:
        if self._kind == YOLO:
            return (
                f"there is no {self._set_dir / 'labels' / stem}.txt; if it shows no defect, an empty file of that name says "
                "so: write it"
            )
        if self._kind == LABELME:
            return "no JSON file of LabelMe names it; if it shows no defect, save one without shapes"
        return f"{self.source} does not list it; export it together with the others"

    def _match(self, photo_names: PhotoNames) -> None:
        """Find the photos that the files name, and say which are not there."""
        gone: list[PhotoShapes] = []
        for file in self._all:
            has_defect = any(map(self._names.is_defect, file.labels))
            if file.kind != self._kind or not has_defect and file.kind not in ONE_FILE_A_PHOTO:
                continue  # a file that does not have the label says nothing of the defect
            for photo in file.photos:
                try:
                    stem = photo_names.find(photo.name)
                except ValueError as error:
                    raise ValueError(f"{photo.path}: {error}") from None
                if stem is None:
                    gone.append(photo)
                else:
                    self._photos.setdefault(stem, []).append(photo)
            for label, track in file.tracks:
                if self._names.is_defect(label):
                    what = f"left out: {track} of {file.path}, {label!r}: draw shapes instead (Shape, not Track)"
                    print(what, file=sys.stderr)
        if gone:
            more = f" and {len(gone) - NAMES_SHOWN} more" if len(gone) > NAMES_SHOWN else ""
            shown = ", ".join(photo.name for photo in gone[:NAMES_SHOWN]) + more
            what = f"{gone[0].path} has labels of photos that are not in {self._set_dir / 'images'}: {shown}"
            if not self._photos:
                raise ValueError(
                    f"{what}: photos are found by their path below images/, or by a file name that is theirs alone"
                )
            print(f"left out: {what}", file=sys.stderr)
