"""Names that people give: of photos, as label files repeat them, and of labels."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping

from defectcam.image import PHOTO_SUFFIXES

NEAR = 0.85  # difflib's ratio: "cracks" for crack, but not "scaling" for spalling


def stem_of(name: str) -> str | None:
    """A file's name without its suffix; None where it is no image's."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PHOTO_SUFFIXES else None


def near_name(wanted: str, names: Iterable[str], least_ratio: float = 0.6) -> str | None:
    """Of some names the one that is nearest to another; None where none is near. Capital letters do not count."""
    by_case = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(wanted.casefold(), by_case, 1, least_ratio)
    return by_case[near[0]] if near else None


def suggestion(wanted: str, names: Iterable[str]) -> str:
    """The part of a message that says which of some names may have been meant; "" where none is near."""
    near = near_name(wanted, names)
    return f" (did you mean {near!r}?)" if near else ""


def meaning(label: str, labels: Mapping[str, str], defects: Iterable[str] = ()) -> str:
    """What a label of a file or of CVAT is called here; capital letters do not count.

    Args:
        labels: what some labels are called, such as {"Riss": "crack"}; others keep their names.
        defects: names of defects, as they are to be written.
    """
    found = {one.strip().casefold(): defect for one, defect in labels.items()}.get(label.strip().casefold(), label)
    return {defect.casefold(): defect for defect in defects}.get(found.strip().casefold(), found)


def check_label_names(labels: Mapping[str, str], there: Iterable[str], where: str, defects: Iterable[str]) -> None:
    """Check what --label says.

    Args:
        labels: label -> defect, as given.
        there: the labels that there are.
        where: these are, in the words of a message.
        defects: those that are known.

    Raises:
        ValueError: a label that is not there, or a defect that is called nearly as a known one.
    """
    there, defects = sorted(there), sorted(defects)
    for label, defect in labels.items():
        if label.strip().casefold() not in {one.strip().casefold() for one in there}:
            raise ValueError(
                f"--label {label}={defect}: {where} has no label {label!r}{suggestion(label, there)}; its labels are {there}"
            )
        near = near_name(defect, defects, NEAR)
        if near and near.casefold() != defect.casefold():
            raise ValueError(f"--label {label}={defect}: there is no defect {defect!r} (did you mean {near!r}?), but {defects}")


class PhotoNames:
    """Finds the photo that a label file means by a name.

    Args:
        stems: the photos' paths below images/, without their suffixes, with / between folders.
    """

    def __init__(self, stems: Iterable[str]) -> None:
        self._stems = set(stems)
        self._by_file_name: dict[str, list[str]] = {}
        for stem in sorted(self._stems):
            self._by_file_name.setdefault(stem.rpartition("/")[2], []).append(stem)

    def find(self, name: str) -> str | None:
        """The stem of a photo by its path, of any system and from any folder, with any suffix of images or none.

        The path below images/ comes first, then as much of the path's end as fits, then the file name alone.

        Raises:
            ValueError: several photos have that file name.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts:
            return None
        wanted = [*parts[:-1], stem_of(parts[-1]) or parts[-1]]
        if (whole := "/".join(wanted)) in self._stems:
            return whole
        for start in range(1, len(wanted)):
            is_path = start < len(wanted) - 1 or wanted[start - 1] == "images"
            if is_path and (end := "/".join(wanted[start:])) in self._stems:
                return end
        found = self._by_file_name.get(wanted[-1], [])
        if len(found) > 1:
            raise ValueError(
                f"the photo {name!r} may be {found[0]!r} or {found[1]!r} of images/: write the path below images/"
            )
        return found[0] if found else None


class LabelNames:
    """Tells which labels of a file are a defect; capital letters do not count.

    Args:
        labels: what labels of files are called here, such as {"Riss": "crack"}; others keep their names.
    """

    def __init__(self, defect: str, labels: Mapping[str, str]) -> None:
        self.defect = defect
        self._labels = labels
        self._given = {label.strip().casefold() for label in labels}

    def is_defect(self, label: str) -> bool:
        """Whether a label of a file is the defect."""
        return meaning(label, self._labels).strip().casefold() == self.defect.casefold()

    def nearly(self, labels: Iterable[str]) -> list[str]:
        """Labels of a file that are not the defect but called nearly so, and of which nothing else was said."""
        others = [label for label in labels if not self.is_defect(label) and label.strip().casefold() not in self._given]
        return sorted(label for label in others if near_name(self.defect, [label.strip()], NEAR))

    def lacking(self, labels: Iterable[str]) -> str:
        """The part of a message that says that none of a file's labels is the defect, and what to do."""
        near = near_name(self.defect, labels) or next(iter(sorted(labels)), "Riss")
        return (
            f"has no label {self.defect!r}{suggestion(self.defect, labels)}; its labels are {sorted(labels)}: if one of "
            f"them is {self.defect}, say so by --label, such as --label {near}={self.defect}"
        )
