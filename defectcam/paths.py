"""Files named after something from outside: labels and photos of CVAT, defects of a manifest, sets of a data folder.

Such a name may be anything: `../../x`, `a/b`, `CON`, 300 bytes, nothing. Where a file is made, `file_name` or
`relative_path` turn it into one that every file system takes and that stays inside its folder: what is not allowed is
written as %XX, as in URLs, so no two names share a file. Where a file is there already, `inside` takes its name as it
is and refuses one that leads out of the folder. `photo_files` lists the photos of a folder. `repository_file` finds a file
of the repository that the commands read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from defectcam.image import HEIC_REMEDY, HEIC_SUFFIXES, OTHER_SUFFIXES, PHOTO_SUFFIXES, SAVE_ANEW

MOST_BYTES = 180  # of a name: file systems take 255, and endings such as .json.part come on top
NOT_IN_NAMES = frozenset('<>:"/\\|?*%')
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)  # devices of Windows


def file_name(name: str, ending: str = "") -> str:
    """The name of a file or folder that stands for `name`, and for no other name.

    Ordinary names stay as they are. Written as %XX are characters that a file system may refuse or that cannot be
    seen, a dot or blank at the end, and the first letter of a reserved name; an empty name becomes "%". Of a name of
    more than MOST_BYTES the beginning stays, and a checksum of the whole follows.

    Args:
        ending: put behind it as it is, such as ".csv".
    """
    text = "".join(char if char.isprintable() and char not in NOT_IN_NAMES else _escaped(char) for char in name) or "%"
    if text[-1] in ". ":
        text = text[:-1] + _escaped(text[-1])
    if RESERVED.fullmatch(text):
        text = _escaped(text[0]) + text[1:]
    if len(text.encode()) > MOST_BYTES:
        checksum = "%~" + hashlib.blake2s(_bytes(name), digest_size=8).hexdigest()
        text = text.encode()[: MOST_BYTES - len(checksum)].decode(errors="ignore") + checksum
    return text + ending


def relative_path(name: str, ending: str = "") -> Path:
    """The same for a name with folders, such as a photo's in CVAT: a/b.jpg."""
    *folders, last = name.split("/")
    return Path(*map(file_name, folders), file_name(last, ending))


def inside(folder: Path, name: str) -> Path:
    """The path of a file below `folder` that is called so already; the name may have folders.

    Raises:
        ValueError: it leads out of the folder, or can name no file.
    """
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"the name {name!r:.200} does not lead to a file below {folder}: rename it, without ..")
    return folder / name


def repository_file(name: str) -> Path:
    """A file of the repository: beside the package in a checkout, inside it where a wheel is installed (setup.py)."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_file() else package.parent / name


def photo_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The photos in a folder and below it, and the files that people take for photos but that are not read, both sorted.

    Endings count in any case of letters. Hidden files and folders are left out: phones and macOS put no photos there.
    """
    photos, others = [], []
    for inner, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(Path(inner, name))]
        paths = [Path(inner, name) for name in names if not name.startswith(".")]
        photos += [path for path in paths if path.suffix.lower() in PHOTO_SUFFIXES]
        others += [path for path in paths if path.suffix.lower() in OTHER_SUFFIXES]
    return sorted(photos), sorted(others)


def not_read(others: Sequence[Path]) -> str:
    """What a message says of files that `photo_files` takes for no photos: "3 DNG, 1 JP2: save them as JPEG, ..."; or ""."""
    counts = Counter(path.suffix.lower() for path in others)
    shown = ", ".join(f"{count} {suffix[1:].upper()}" for suffix, count in sorted(counts.items()))
    heic = f"; for HEIC {HEIC_REMEDY}" if counts.keys() & set(HEIC_SUFFIXES) else ""
    return f"{shown}: {SAVE_ANEW}{heic}" if shown else ""


@functools.cache
def tell_not_read(folder: Path, what: str) -> None:
    """Print on stderr, once for a folder, what `not_read` says of it."""
    if what:
        print(f"not read in {folder}: {what}", file=sys.stderr)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a picture, (H, W) or (H, W, 3) uint8 BGR, in the format of the path's ending; folders are made.

    Raises:
        OSError: it cannot be written; OpenCV by itself goes on without it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"cannot write the picture {path}: is the disk full, or the name too long?")


def write_rgb(path: Path, image_rgb: np.ndarray) -> None:
    """`write_image` of a picture (H, W, 3) uint8 RGB."""
    write_image(path, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _escaped(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in _bytes(char))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
