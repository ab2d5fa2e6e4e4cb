"""Photos and maps in a file while a command runs, so that its memory does not grow with their number."""

from __future__ import annotations

import os
import tempfile
from collections import UserDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from defectcam.evaluation.photos import LabelledPhoto

ALIGNMENT_BYTES = 64


class ArrayFile(Sequence[np.ndarray]):
    """Arrays in a file without a name, which is gone when nothing refers to it any more, also after a kill.

    An array is mapped into memory whenever it is asked for, for as long as something refers to it. What is written to it
    is written to the file.

    Args:
        folder: the file lies on its disk; the folder need not be there yet.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
        self._file = tempfile.TemporaryFile(dir=there)
        self._places: list[tuple[np.dtype, int, tuple[int, ...]]] = []

    def append(self, array: np.ndarray) -> int:
        """Add an array of any shape and type, with an element at least; returns its index.

        Raises:
            OSError: the disk is full.
        """
        end = self._file.seek(0, os.SEEK_END)
        offset = self._file.seek(end + -end % ALIGNMENT_BYTES)
        self._file.write(np.ascontiguousarray(array).data)
        self._file.flush()
        self._places.append((array.dtype, offset, array.shape))
        return len(self._places) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        dtype, offset, shape = self._places[index]
        return np.asarray(np.memmap(self._file, dtype, "r+", offset, shape))

    def __len__(self) -> int:
        return len(self._places)


class KeptLevels(UserDict):
    """The `levels` of `PlainMaps`, in a file; a map is set once."""

    def __init__(self, file: ArrayFile) -> None:
        super().__init__()
        self._file = file

    def __setitem__(self, scale: float, level_map: np.ndarray) -> None:
        super().__setitem__(scale, self._file.append(level_map))

    def __getitem__(self, scale: float) -> np.ndarray:
        return self._file[super().__getitem__(scale)]


class KeptPhoto:
    """A `LabelledPhoto` whose pixels and mask lie in a file."""

    def __init__(self, photo: LabelledPhoto, file: ArrayFile) -> None:
        self.set_name, self.stem, self.patches_xyxy, self._file = photo.set_name, photo.stem, photo.patches_xyxy, file
        self._image = file.append(photo.image_rgb)
        self._truth = None if photo.truth is None else file.append(photo.truth)

    @property
    def image_rgb(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self._file[self._image]

    @property
    def truth(self) -> np.ndarray | None:
        """(H, W) bool; None where the photo is free of the defect."""
        return None if self._truth is None else self._file[self._truth]
