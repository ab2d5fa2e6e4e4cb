"""Proposals for a whole folder of photos as files, with CVAT's server asking for none of them: `defectcam propose`.

Into --out, for every photo below FOLDER, subfolders included; <photo> is its path there, extension and all, with %XX
for characters that not every file system takes:

<photo>.json             the function's own answer with the photo's size and what it was made with
overlays/<photo>.jpg     the shapes drawn onto the photo
cvat.xml, coco.json      all shapes, to be imported into CVAT as "CVAT 1.1" or "COCO 1.0" (docs/try.md has the clicks)
shapes.csv               a table: area, length, mean and largest width of every shape, in px and by --mm-per-px in mm
labels.json              the labels that CVAT's task must have, for the tab Raw of its label editor
summary.json             how many proposals there are, why photos were not processed, what was left out on others, and how
                         many files were not read because of their format

A photo larger than ADVCAM_MAX_MEGAPIXELS is processed in parts that overlap; a defect across parts becomes one shape.

The same command once more goes on where a run ended. It leaves out photos that have an answer, unless the photo's size
in bytes or time of change, the weights or a setting are others now; photos that could not be processed are tried again.

Every other setting is the function's own: its variables count (below), only the time limit is off unless
ADVCAM_TIME_LIMIT sets one. With --workers Ray starts so many processes, each with a GPU of its own where there
are GPUs, else with one CPU; on the machines of the cluster that RAY_ADDRESS names, otherwise on this one. All machines
need FOLDER and this repository under the same paths.

Exit status: 0 if all photos were processed, 1 if not, 2 for a wrong command, 130 if interrupted.

Example:
    defectcam propose photos --out out/propose --iterations 4 --mm-per-px 0.25
    RAY_ADDRESS=auto defectcam propose /mnt/photos --out out/propose --workers 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from defectcam import __version__
from defectcam.bulk.exports import region_of_answer, replacing, write_coco, write_cvat_xml, write_table
from defectcam.bulk.measures import shape_size
from defectcam.bulk.parts import propose_in_parts
from defectcam.command_line import command_parser
from defectcam.cvat import auto_annotation
from defectcam.cvat_labels import NOTICE, UNPROCESSED, task_labels
from defectcam.image import PHOTO_SUFFIXES, ImageError, decode_image, upright_size
from defectcam.memory import check_memory
from defectcam.overlay import draw_shapes
from defectcam.paths import not_read, photo_files, relative_path
from defectcam.request import Request
from defectcam.settings import ITERATIONS_MAX, SECRETS, RequestError, read_variable, variables_help
from defectcam.weights import WeightsError

LARGEST_PX = 4_000_000_000  # of a photo in parts
DECODED_BYTES_PER_PX = 20  # of a photo in parts: Pillow's pixels, ours, and three copies for the overlay
JPEG_SIDE_PX = 65_500  # the longest that JPEG allows
INTERRUPTED = 130  # what shells report for Ctrl-C
ROOT = Path(__file__).resolve().parents[2]  # where the package lies
LOG = logging.getLogger("defectcam.propose")


class ProposeError(RuntimeError):
    """Photos that cannot be proposed for; the message says why and what to do."""


@dataclass(frozen=True)
class Photo:
    """A file of the folder as it was when the run began.

    Attributes:
        name: path below the folder, with "/", as CVAT calls the frame.
        path: absolute.
        size_bytes, modified_ns: by which it is known again.
    """

    name: str
    path: str
    size_bytes: int
    modified_ns: int


class Proposer:
    """The function of `auto_annotation` for photos of a folder, one after another; every worker makes its own.

    Args:
        given: the parameters of `auto_annotation.create` that were chosen.

    Raises:
        RequestError, WeightsError: as `auto_annotation.create`.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        function = auto_annotation.create(**given)
        self.model = function.model
        self.labels = task_labels(function.labels.values())
        defects = self.model.settings.defects or self.model.defects
        self.made_with = {
            "version": __version__,
            "weights": self.model.weights.version,
            "manifest": hashlib.blake2s(repr(self.model.weights.configs).encode(), digest_size=16).hexdigest(),
            "settings": {defect: self.model.effective(defect, self.model.settings) for defect in defects},
        }

    def __call__(self, photo: dict) -> dict:
        """The record of one photo.

        Args:
            photo: the fields of a `Photo`.

        Returns:
            name; record, the text of its JSON file; overlay, a JPEG file, empty if the photo was not processed.
        """
        size, overlay, sizes = None, b"", [None]
        try:
            source = Path(photo["path"]).read_bytes()
            size = _size_px(source)
            if size and size[0] * size[1] > self.model.max_pixels:
                check_memory(size[1], size[0], DECODED_BYTES_PER_PX)
                image_rgb = decode_image(source, LARGEST_PX)
                shapes = propose_in_parts(self.model, image_rgb)
                if not _unprocessed(shapes):
                    self.model.log(image_rgb, self.model.settings, {}, shapes)
            else:
                shapes = self.model.answer(Request(source, self.model.settings, ()))
                if not _unprocessed(shapes):
                    image_rgb = decode_image(source, self.model.max_pixels)
            if not _unprocessed(shapes):
                size = image_rgb.shape[1::-1]
                overlay, sizes = _overlay(image_rgb, shapes), [_size_of(shape, *size) for shape in shapes]
        except (ImageError, MemoryError) as error:
            shapes = self.model.unprocessed(self.model.reason(error))
        except OSError as error:
            shapes = self.model.unprocessed(f"cannot be read: {error.strerror or error}")
        except Exception as error:  # one photo must never cost a run over thousands
            LOG.exception(photo["name"])
            shapes = self.model.unprocessed(f"internal error: {error!r}")
        width, height = size or (None, None)
        made = {"made_with": self.made_with, "shapes": shapes, "sizes": sizes}
        record = {**_without_path(photo), "width": width, "height": height, **made}
        return {"name": photo["name"], "record": json.dumps(record, separators=(",", ":")), "overlay": overlay}


class Results:
    """The folder that `defectcam propose` writes to; a file of it is complete or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, made: dict) -> None:
        """Write what a `Proposer` made of a photo; its record comes last and tells that the photo is done."""
        overlay = self.folder / "overlays" / relative_path(made["name"], ".jpg")
        overlay.unlink(missing_ok=True)
        if made["overlay"]:
            with replacing(overlay) as file:
                file.write(made["overlay"])
        with replacing(self._record(made["name"])) as file:
            file.write(made["record"].encode())

    def read(self, name: str) -> dict:
        """The record of a photo.

        Raises:
            OSError, ValueError: there is none, or it is not one.
        """
        return json.loads(self._record(name).read_bytes())

    def is_done(self, photo: Photo, made_with: dict) -> bool:
        """Whether the photo, as it is now, has been processed with these weights and settings."""
        try:
            record = self.read(photo.name)
            wanted = {**_without_path(vars(photo)), "made_with": made_with}
            known = "sizes" in record and all(record[key] == value for key, value in wanted.items())
            return known and not _unprocessed(record["shapes"])
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def assemble(
        self, photos: Sequence[Photo], labels: Sequence[dict], others: Sequence[Path] = (), mm_per_px: float | None = None
    ) -> dict:
        """Write the files of all photos together; returns the summary.

        Args:
            others: files that are not read.
            mm_per_px: for the table's columns in mm.
        """

        def records() -> Iterator[dict]:
            return (self.read(photo.name) for photo in photos)

        write_cvat_xml(self.folder / "cvat.xml", labels, records())
        write_coco(self.folder / "coco.json", labels, records)
        write_table(self.folder / "shapes.csv", records(), mm_per_px)
        proposals, reasons = Counter(), {UNPROCESSED: {}, NOTICE: {}}
        for record in records():
            for shape in record["shapes"]:
                if shape["type"] == "tag":
                    reasons[shape["label"]][record["name"]] = shape["attributes"][0]["value"]
                else:
                    proposals[shape["label"]] += 1
        counts = {label["name"]: proposals[label["name"]] for label in labels if label["type"] != "tag"}
        formats = Counter(path.suffix.lower() for path in others)
        summary = {"photos": len(photos), "proposals": counts, **reasons, "not read": dict(sorted(formats.items()))}
        for name, content in (("labels.json", labels), ("summary.json", summary)):
            with replacing(self.folder / name) as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")
        return summary

    def _record(self, name: str) -> Path:
        return self.folder / relative_path(name, ".json")


def find_photos(folder: Path, out: Path) -> tuple[list[Photo], list[Path]]:
    """The photos below a folder, sorted by name, and files that are not read; hidden files and what lies in `out` are none.

    Raises:
        ProposeError: no folder, no photo in it, an `out` that would hold the photos themselves, or a name that CVAT's
            files cannot hold.
    """
    if not folder.is_dir():
        raise ProposeError(f"{folder} is no folder; give the folder of the photos")
    folder, out = folder.resolve(), out.resolve()
    if folder.is_relative_to(out):
        raise ProposeError(f"--out {out} is or holds the folder of the photos; give a folder of its own")
    photos = []
    found, others = ([path for path in paths if not path.is_relative_to(out)] for paths in photo_files(folder))
    for path in found:
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if not name.isprintable():
            raise ProposeError(f"the photo's name {name!r} has characters that CVAT's files cannot hold; rename it")
        status = path.stat()
        photos.append(Photo(name, str(path), status.st_size, status.st_mtime_ns))
    if not photos:
        also = f" (not read: {not_read(others)})" if others else ""
        raise ProposeError(f"no photo below {folder}{also}; photos end in {', '.join(PHOTO_SUFFIXES)}")
    return sorted(photos, key=lambda photo: photo.name), others


def made_by_ray(photos: Sequence[Photo], given: Mapping[str, str], workers: int) -> Iterator[dict]:
    """What `Proposer` makes of the photos, in the order in which so many processes of Ray finish them.

    Raises:
        ProposeError: Ray is not installed, has not so many GPUs or CPUs, or gives up: a machine without the weights,
            processes that die again and again.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ProposeError("--workers needs Ray: pip install -c constraints.txt -e '.[bulk]', or leave it out") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
    for name in SECRETS:  # Ray shows and logs what its processes are given, and they need none
        os.environ.pop(name, None)
    settings = {name: value for name, value in os.environ.items() if name.startswith("ADVCAM_")}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    try:
        ray.init(logging_level=logging.ERROR, runtime_env={"env_vars": {**settings, "PYTHONPATH": paths}})
    except Exception as error:  # of all kinds, the plain one among them
        raise ProposeError(f"Ray does not start, or RAY_ADDRESS cannot be reached: {error}") from error
    try:
        resources = resources_of_worker(ray.cluster_resources(), workers, read_variable(os.environ, "ADVCAM_DEVICE"))
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # A block for each photo: it is stored when it is done, not when a hundred others are.
        rows = ray.data.from_items([vars(photo) for photo in photos], override_num_blocks=len(photos))
        pool = ray.data.ActorPoolStrategy(size=workers)
        yield from rows.map(Proposer, fn_constructor_args=(given,), compute=pool, **resources).iter_rows()
    except ray.exceptions.RayError as error:
        raise ProposeError(f"Ray gave up, the same command goes on from here: {error}") from error
    finally:
        ray.shutdown()


def resources_of_worker(there: Mapping[str, float], workers: int, device: str | None) -> dict[str, int]:
    """What each worker asks Ray for: a GPU where there are any and `device` does not say "cpu", else a CPU.

    Args:
        there: what Ray has in all, as it says itself: {"GPU": ..., "CPU": ...}.

    Raises:
        ProposeError: it has not enough of them; Ray would wait for ever.
    """
    kind = "GPU" if there.get("GPU") and device != "cpu" else "CPU"
    if there.get(kind, 0) < workers:
        raise ProposeError(
            f"--workers is {workers}, but Ray has {there.get(kind, 0):g} {kind}s: give fewer, or add machines "
            "(ray start --address=...)"
        )
    return {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam propose`."""
    parser = command_parser("propose", __doc__, variables_help())
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the photos")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/propose"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--iterations", help=f"climbing steps, 0 to {ITERATIONS_MAX} (default: each defect's own)")
    parser.add_argument("--defects", help="comma separated, of those with weights (default: all)")
    parser.add_argument("--mm-per-px", type=_millimetres, metavar="MM",
                        help="how many mm of the structure a pixel shows: shapes.csv then has sizes in mm, too")  # fmt: skip
    parser.add_argument("--workers", type=_positive, metavar="N", help="processes of Ray (default: this one, without Ray)")
    args = parser.parse_args(argv)
    given = {key: getattr(args, key) for key in ("iterations", "defects") if getattr(args, key) is not None}
    try:
        photos, others = find_photos(args.folder, args.out)
        proposer = Proposer(given)
    except (ProposeError, RequestError, WeightsError) as error:
        parser.error(str(error))
    results = Results(args.out)
    todo = [photo for photo in photos if not results.is_done(photo, proposer.made_with)]
    left = len(todo)
    print(f"{len(photos)} photos, {len(photos) - left} of them done before")
    try:
        if args.workers and todo:
            made = made_by_ray(todo, given, args.workers)
        else:
            made = (proposer(vars(photo)) for photo in todo)
        for row in tqdm(made, total=len(todo), unit="photo", disable=None):
            results.store(row)
            left -= 1
        summary = results.assemble(photos, proposer.labels, others, args.mm_per_px)
    except KeyboardInterrupt:
        print(f"\ninterrupted with {left} of {len(photos)} photos left; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ProposeError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"cannot write to {args.out}: {error}; make room or give another --out, the same command goes on")
    report(summary, photos, args.out)
    if others:
        print(f"not read in {args.folder}: {not_read(others)}", file=sys.stderr)
    sys.exit(1 if summary[UNPROCESSED] else 0)


def report(summary: dict, photos: Sequence[Photo], out: Path) -> None:
    """Print what came out, what did not, and what CVAT will trip over."""
    counts = ", ".join(f"{count} {defect}" for defect, count in summary["proposals"].items())
    print(f"proposals: {counts}")
    print(f"for CVAT:  {(out / 'cvat.xml').resolve()}")
    print(f"           {(out / 'coco.json').resolve()}")
    print(f"table:     {(out / 'shapes.csv').resolve()}")
    print(f"pictures:  {(out / 'overlays').resolve()}")
    stems = Counter(str(Path(photo.name).with_suffix("")) for photo in photos)
    for stem in (stem for stem, count in stems.items() if count > 1):
        print(f"note: several photos are called {stem}.*, which CVAT's import cannot tell apart: rename them")
    for name, reason in summary[NOTICE].items():
        print(f"note: {name}: {reason}")
    for name, reason in summary[UNPROCESSED].items():
        print(f"not processed: {name}: {reason}", file=sys.stderr)


def _size_px(source: bytes) -> tuple[int, int] | None:
    """Width and height of the upright photo by its header alone, which broken photos have too; None without one.

    CVAT makes frames of the photos that have one, and refuses files that name any other.
    """
    try:
        height, width = upright_size(source, None)
    except ImageError:
        return None
    return width, height


def _size_of(shape: dict, width: int, height: int) -> tuple | None:
    """The fields of a shape's `ShapeSize`; None for a tag."""
    return None if shape["type"] == "tag" else astuple(shape_size(region_of_answer(shape, width, height)))


def _overlay(image_rgb: np.ndarray, shapes: Sequence[dict]) -> bytes:
    """The shapes drawn onto the photo, (H, W, 3) uint8, as a JPEG file; smaller where JPEG allows no such size."""
    drawn = cv2.cvtColor(draw_shapes(image_rgb, shapes), cv2.COLOR_RGB2BGR)
    factor = JPEG_SIDE_PX / max(drawn.shape)
    if factor < 1:
        drawn = cv2.resize(drawn, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", drawn)[1].tobytes()


def _unprocessed(shapes: Sequence[dict]) -> bool:
    return any(shape["label"] == UNPROCESSED for shape in shapes)


def _without_path(photo: Mapping) -> dict:
    """The fields by which a photo is known again, wherever its folder lies."""
    return {key: photo[key] for key in ("name", "size_bytes", "modified_ns")}


def _millimetres(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0: how many mm of the structure a pixel shows")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer from 1 on")
    return int(text)


if __name__ == "__main__":
    main()
