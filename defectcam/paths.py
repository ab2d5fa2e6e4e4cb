"""Files named after something from outside: labels and photos of CVAT, defects of a manifest, sets of a data folder.

Such a name may be anything: `../../x`, `a/b`, `CON`, 300 bytes, nothing. Where a file is made, `file_name` or
`relative_path` turn it into one that every file system takes and that stays inside its folder: what is not allowed is
written as %XX, as in URLs, so no two names share a file. Where a file is there already, `inside` takes its name as it
is and refuses one that leads out of the folder.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import cv2
import numpy as np

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


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a picture, (H, W) or (H, W, 3) uint8 BGR, in the format of the path's ending; folders are made.

    Raises:
        OSError: it cannot be written; OpenCV by itself goes on without it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"cannot write the picture {path}: is the disk full, or the name too long?")


def _escaped(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in _bytes(char))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
