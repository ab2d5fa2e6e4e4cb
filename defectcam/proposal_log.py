"""The proposal log: what the function answered, so that what annotators did with it can be told later (paper 3.2).

CVAT keeps no trace of a proposal that an annotator deleted, nor of an outline before it was edited. So the function
writes every answer to a folder, one JSON object a line:

    {"time": "2026-11-23T08:15:30.123456+00:00", "image": "<hash of the decoded pixels>", "width": px, "height": px,
     "weights": "<version>", "settings": {defect: {"iterations": ...}}, "shapes": [...]}

The shapes are those of the answer; a mask is run lengths and box, the way CVAT stores it. `defectcam cvat annotate` adds
"second_run", see `ProposalLog.append`. Every process writes files of its own and never touches them again once they are
full, so there is nothing to lock, on network volumes either, and a process that is killed leaves at worst half a line
at the end of its last file. Files may be moved away or deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

MAX_FILE_BYTES = 64 << 20
RUNS = re.compile(rb"\x00+|\x01+")


class ProposalLog:
    """Appends answers to files of this process in a folder; safe with several threads and processes.

    Args:
        folder: made if it is missing.
        logger: with `error`, as Nuclio's.
        max_file_bytes: a file that has reached it is left, and a new one begun.

    Raises:
        OSError: the folder cannot be made or written to; better at the start than at every answer.
    """

    def __init__(self, folder: Path, logger, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder = Path(folder)
        self.logger = logger
        self.max_file_bytes = max_file_bytes
        self._lock = threading.Lock()
        self._file, self._owner, self._written = -1, 0, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".probe-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()

    def append(
        self,
        image: str,
        width: int,
        height: int,
        weights: str,
        settings: Mapping[str, Mapping],
        shapes: Sequence[Mapping],
        second_run: Mapping | None = None,
    ) -> None:
        """Log one answer. A full or vanished disk costs a line in the function's log, never the answer.

        Args:
            image: the decoded photo's `image_hash`.
            width, height: of the photo, px.
            weights: their version.
            settings: those in force, defect -> {name: value}.
            shapes: the answer, as CVAT gets it; not changed.
            second_run: of `defectcam cvat annotate`: {"job": CVAT's id, "replaced": names of the proposals that the shapes
                replace and that were not rejected, "rejected": names of those that were rejected before}.
        """
        record = {
            "time": datetime.now(timezone.utc).isoformat(),
            "image": image,
            "width": width,
            "height": height,
            "weights": weights,
            "settings": settings,
            "shapes": [_stored(shape) for shape in shapes],
        } | ({"second_run": second_run} if second_run else {})
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                if self._owner != os.getpid():  # the first answer, or a child that must not share our file
                    self._open()
                self._write(line)
                if self._written >= self.max_file_bytes:
                    self._close()
            except OSError as error:
                self._close()  # half a line may be there: go on in another file
                self.logger.error(f"proposal log: cannot write to {self.folder}: {error}; this answer is not logged")

    def _write(self, line: bytes) -> None:
        while line:
            count = os.write(self._file, line)
            self._written += count
            line = line[count:]

    def _open(self) -> None:
        name = f"proposals-{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(4)}.jsonl"
        self._file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._owner, self._written = os.getpid(), 0

    def _close(self) -> None:
        if self._owner == os.getpid():
            self._owner = 0
            try:
                os.close(self._file)
            except OSError as error:  # network volumes tell only now what they could not write
                self.logger.error(f"proposal log: {self.folder}: {error}; the last answers may not be logged")


def image_hash(image_rgb: memoryview) -> str:
    """Names a photo by its decoded pixels: 32 hex digits.

    Args:
        image_rgb: (height, width, 3) uint8, C-contiguous; a numpy array is one.
    """
    pixels = memoryview(image_rgb)
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels)
    return digest.hexdigest()


def read_proposal_log(folder: Path) -> Iterator[dict]:
    """All answers in a log's folder, file by file in the order in which the files were begun.

    A line that a kill cut off is left out; any other that is no answer too, with a warning that names file and line.
    """
    for path in sorted(Path(folder).glob("proposals-*.jsonl")):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    continue
                try:
                    record = json.loads(line)
                    record["time"], record["image"], record["width"], record["height"], record["shapes"]
                except (ValueError, TypeError, KeyError) as error:
                    warnings.warn(f"{path} line {number} is no answer and left out: {error!r}", stacklevel=2)
                    continue
                yield record


def _stored(shape: Mapping) -> dict:
    """The shape with its mask as run lengths, the first counting zeros, and box."""
    if "mask" not in shape:
        return dict(shape)
    pixels, box = bytes(shape["mask"][:-4]), shape["mask"][-4:]
    runs = [len(run) for run in RUNS.findall(pixels)]
    return {**shape, "mask": [0] * pixels.startswith(b"\x01") + runs + list(box)}
