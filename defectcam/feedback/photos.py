"""Photos on disk, found by the names and sizes that they have in CVAT."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from defectcam.image import ImageError, decode_image, pixel_limit
from defectcam.paths import inside
from defectcam.proposal_log import image_hash
from defectcam.proposals import Component
from defectcam.regions import AREA_TYPES, region_of, resized
from defectcam.training.labels import read_photo_rgb


class PhotoError(RuntimeError):
    """A photo that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class DiskPhoto:
    """A photo on disk, which may be larger or smaller than in CVAT; all sizes in px."""

    path: Path
    width: int
    height: int
    cvat_width: int
    cvat_height: int

    def region(self, kind: str, points: Sequence[float], rotation: float = 0.0) -> Component | None:
        """The pixels of a shape on the photo on disk; None if it has no area, or lies outside of the photo.

        Args:
            kind, points, rotation: as CVAT stores them, see `region_of`.
        """
        region = region_of(kind, points, self.cvat_width, self.cvat_height, rotation) if kind in AREA_TYPES else None
        if region is None or (self.width, self.height) == (self.cvat_width, self.cvat_height):
            return region
        return resized(region, self.width / self.cvat_width, self.height / self.cvat_height, self.width, self.height)


class PhotoFolder:
    """The photos below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "masks" not in path.relative_to(folder).parts:
                self._by_name[path.name].append(path)

    def find(self, name: str, cvat_width: int, cvat_height: int, image: str = "") -> DiskPhoto:
        """The photo that CVAT calls `name`.

        Args:
            cvat_width, cvat_height: its size in CVAT, px.
            image: hash of its pixels, to choose between photos of the same name; "" if unknown.

        Raises:
            PhotoError: there is none, or several; the name leads out of the folder; or the proportions differ from CVAT's.
            FileNotFoundError, ImageError: it cannot be read.
        """
        path = self._path(name, image)
        height, width = read_photo_rgb(path).shape[:2]
        stretched = (width / cvat_width) / (height / cvat_height)
        if abs(stretched - 1) > 2 / min(width, height, cvat_width, cvat_height):
            raise PhotoError(
                f"{path} is {width} x {height} px, but CVAT's {name} {cvat_width} x {cvat_height}: not the same "
                "photo, or cropped or turned since; give --photos the folder that was uploaded to CVAT"
            )
        return DiskPhoto(path, width, height, cvat_width, cvat_height)

    def _path(self, name: str, image: str) -> Path:
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
    """The names that training knows a photo by: its folder, or of <set>/images/a.png the one above, and the file's stem."""
    parent = photo.absolute().parent
    return (parent.parent if parent.name == "images" else parent).name, photo.stem
