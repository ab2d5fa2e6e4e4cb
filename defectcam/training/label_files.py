"""Files that hold the shapes of many labels: COCO, LabelMe, YOLO segmentation and CVAT's XML, all read to one form.

A shape's pixels are made when they are asked for: shapes of other labels than the wanted one may be of any kind, and
cost nothing. What is no region (a box of COCO, a line) is refused then, with the shape's place in its file.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from defectcam.cvat_xml import geometry_of, root_of
from defectcam.proposals import Component
from defectcam.regions import merged, region_of, tight_region
from defectcam.text import read_lines, read_text

COCO, LABELME, YOLO, CVAT = "COCO", "LabelMe", "YOLO", "CVAT XML"
ONE_FILE_A_PHOTO = (LABELME, YOLO)
LINES = ("line", "linestrip", "polyline", "point", "points", "skeleton", "cuboid")
YOLO_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "classes.txt", "obj.names")
BEYOND = 1e-3  # of a photo's side, by which rounding may lead a normalised coordinate out of it

Region = Callable[[int, int], Component | None]


class LabelFileError(ValueError):
    """A label file cannot be read right; the message names it and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class LabelledShape:
    """A shape of a label file.

    Attributes:
        label: as the file names it.
        where: its place in the file, such as "annotation 7".
        region: from the photo's width and height, px, to the shape's pixels; None where none lies in the photo.
            ValueError for a shape that is no region.
    """

    label: str
    where: str
    region: Region


@dataclass(frozen=True, eq=False)
class PhotoShapes:
    """A photo as a label file has it.

    Attributes:
        path: of the file.
        name: of the photo in the file.
        width, height: px, as declared there; None where the file says nothing.
        shapes: of all labels.
    """

    path: Path
    name: str
    width: int | None
    height: int | None
    shapes: list[LabelledShape]


@dataclass(frozen=True, eq=False)
class LabelFile:
    """What a label file says.

    Attributes:
        path: of the file; of YOLO, the one with the names of the labels.
        kind: COCO, LABELME, YOLO or CVAT.
        labels: names of all labels, whether a shape has them or not.
        photos: those it knows, also without shapes.
        tracks: (label, name for a message) of tracks, which have no photo of their own.
    """

    path: Path
    kind: str
    labels: set[str]
    photos: list[PhotoShapes]
    tracks: list[tuple[str, str]] = field(default_factory=list)


def label_files(set_dir: Path) -> list[LabelFile]:
    """All label files of a data set, in any of its folders but hidden ones; other JSON, XML and text files do not count.

    Raises:
        ValueError: a file is broken, or does not say what its format must.
    """
    found: list[LabelFile] = []
    for folder, inner, names in os.walk(set_dir, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in (".json", ".xml") and not name.startswith("."):
                path = Path(folder, name)
                file = _read(path, read_json if suffix == ".json" else read_cvat_xml)
                found += [file] if file else []
    for folder in sorted(set_dir.iterdir()) if set_dir.is_dir() else []:
        if folder.name.lower() == "labels" and folder.is_dir():
            file = read_yolo(folder)
            found += [file] if file else []
    return found


def _read(path: Path, reader: Callable[[Path], LabelFile | None]) -> LabelFile | None:
    """What a reader makes of a file; any other fault that its content leads to becomes a LabelFileError."""
    try:
        return reader(path)
    except LabelFileError:
        raise
    except OSError as error:
        raise LabelFileError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise LabelFileError(f"{path} cannot be read: {error!r:.200}; export it anew, or move it out of the set") from None


def _no_region(what: str, remedy: str = "draw it as a polygon, or remove it") -> Region:
    def region(width: int, height: int) -> None:
        raise ValueError(f"is {what}, which is no region: {remedy}")

    return region


def _painted(kind: str, points: Sequence[float], rotation: float = 0.0) -> Region:
    """A shape of `region_of`."""
    return lambda width, height: region_of(kind, points, width, height, rotation)


def _polygon(points: Sequence[float], what: str = "a polygon") -> Region:
    """A polygon of [x, y, ...], px."""
    values = np.asarray(points, float)
    if values.ndim != 1 or len(values) % 2 or len(values) < 6 or not np.isfinite(values).all():
        return _no_region(f"{what} of {values.size} numbers", "three points or more are needed, each x and y")
    return _painted("polygon", values)


def _size(value: object) -> int | None:
    """A declared width or height, px; None where none is."""
    if value is None or value == "":
        return None
    if not float(value).is_integer() or float(value) < 1:
        raise ValueError(f"the size {value!r} is no number of pixels")
    return int(float(value))


# ---- COCO and LabelMe ----


def read_json(path: Path) -> LabelFile | None:
    """A file of COCO instances, or of LabelMe; None for other JSON.

    Raises:
        ValueError: it is no JSON, or does not say what its format must.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LabelFileError(
            f"{path} cannot be read as JSON ({error}): export it anew, or move it out of the set"
        ) from None
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("shapes"), list) and "imagePath" in content:
        return _labelme(path, content)
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        if not isinstance(content.get("categories"), list):
            raise LabelFileError(f'{path} has "images" and "annotations" but no "categories": export COCO instances')
        return _coco(path, content)
    return None


def _coco(path: Path, content: dict) -> LabelFile:
    categories = {category["id"]: str(category["name"]) for category in content["categories"]}
    photos = {}
    for image in content["images"]:
        if image["id"] in photos:
            raise LabelFileError(f"{path} has two images of the id {image['id']!r}")
        size = _size(image.get("width")), _size(image.get("height"))
        photos[image["id"]] = PhotoShapes(path, str(image["file_name"]), *size, [])
    for number, one in enumerate(content["annotations"], start=1):
        where = f"annotation {one['id']}" if "id" in one else f"annotation number {number}"
        if one["image_id"] not in photos or one["category_id"] not in categories:
            raise LabelFileError(
                f"{path}: {where} names the image {one['image_id']!r} and the category {one['category_id']!r}, but "
                f"the file does not have {'that category' if one['image_id'] in photos else 'that image'}"
            )
        shape = LabelledShape(categories[one["category_id"]], where, _coco_region(one.get("segmentation")))
        photos[one["image_id"]].shapes.append(shape)
    return LabelFile(path, COCO, set(categories.values()), list(photos.values()))


def _coco_region(segmentation: object) -> Region:
    """Of a crowd too: it is several instances in one region, and instances are of no interest here."""
    if not segmentation:
        return _no_region("a box")
    if isinstance(segmentation, dict):
        return lambda width, height: _of_columns(segmentation, width, height)
    rings = [_polygon(ring, "a ring") for ring in segmentation]

    def region(width: int, height: int) -> Component | None:
        found = [one for one in (ring(width, height) for ring in rings) if one]
        return merged(found) if found else None

    return region


def _of_columns(encoded: dict, width: int, height: int) -> Component | None:
    """COCO's run lengths: column by column over the whole photo, the first counting zeros."""
    rows, columns = (int(side) for side in encoded["size"])
    if (rows, columns) != (height, width):
        raise ValueError(f"has run lengths for {columns} x {rows} px, but its photo has {width} x {height} px")
    counts = encoded["counts"]
    runs = np.array(_decoded(counts) if isinstance(counts, (str, bytes)) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != width * height:
        raise ValueError(f"has run lengths of {runs.sum()} px together, but its photo has {width * height} px")
    ends = np.cumsum(runs)
    filled = [index for index in range(1, len(runs), 2) if runs[index]]
    if not filled:
        return None
    left, right = int(ends[filled[0] - 1]) // height, (int(ends[filled[-1]]) - 1) // height
    flat = np.zeros((right - left + 1) * height, bool)  # only the columns that the region is in: photos are large
    for index in filled:
        flat[ends[index - 1] - left * height : ends[index] - left * height] = True
    return tight_region(flat.reshape(-1, height).T, left, 0, width, height)


def _decoded(text: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed form: 5 bits a character, lowest first, from the third on as a difference."""
    runs: list[int] = []
    value = shift = 0
    for char in text.encode("ascii") if isinstance(text, str) else text:
        bits = char - 48
        if not 0 <= bits < 64:
            raise ValueError(f"has compressed run lengths with the character {chr(char)!r}, which they cannot have")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("has compressed run lengths that end too early")
    return runs


def _labelme(path: Path, content: dict) -> LabelFile:
    # Names count from the file's folder, and by themselves where files and photos were moved apart.
    name = str(content["imagePath"]).replace("\\", "/")
    beside = os.path.normpath(os.path.join(path.parent, name))
    images = next((part for part in path.parents if (part / "images").is_dir()), None)
    if images and beside.startswith(f"{images / 'images'}{os.sep}"):
        name = os.path.relpath(beside, images / "images").replace(os.sep, "/")
    shapes = []
    for number, one in enumerate(content["shapes"], start=1):
        shapes.append(LabelledShape(str(one["label"]), f"shape {number}", _labelme_region(one)))
    size = _size(content.get("imageWidth")), _size(content.get("imageHeight"))
    photo = PhotoShapes(path, name, *size, shapes)
    return LabelFile(path, LABELME, {shape.label for shape in shapes}, [photo])


def _labelme_region(shape: dict) -> Region:
    kind, points_xy = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "polygon" or kind == "rectangle" and len(points_xy) == 4:  # of newer programs: it may be turned
        return _polygon([value for point in points_xy for value in point])
    if kind in ("rectangle", "circle", "mask") and len(points_xy) != 2:
        return _no_region(f"a {kind} of {len(points_xy)} points", "two are needed")
    if kind == "rectangle":
        return _painted("rectangle", [*points_xy[0], *points_xy[1]])
    if kind == "circle":
        (x, y), on_it = points_xy
        radius = math.dist((x, y), on_it)
        return _painted("ellipse", [x, y, x + radius, y - radius])
    if kind == "mask":
        return lambda width, height: _labelme_mask(shape, width, height)
    return _no_region(f"of the kind {kind}")


def _labelme_mask(shape: dict, width: int, height: int) -> Component | None:
    """A PNG in base64 that fills the box of two points, both inclusive."""
    (x0, y0), (x1, y1) = (map(int, point) for point in shape["points"])
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
            mask = np.asarray(image.convert("L")) > 0
    except (KeyError, TypeError, binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"is a mask whose picture cannot be read ({error!r:.100})") from None
    if mask.shape != (y1 - y0 + 1, x1 - x0 + 1):
        raise ValueError(f"is a mask of {mask.shape[1]} x {mask.shape[0]} px for a box of {x1 - x0 + 1} x {y1 - y0 + 1} px")
    return tight_region(mask, x0, y0, width, height)


# ---- CVAT ----


def read_cvat_xml(path: Path) -> LabelFile | None:
    """A file "CVAT for images 1.1" of a job, a task or a project; None for other XML.

    Frames are told by their names alone: their ids go on counting from task to task, or skip frames.

    Raises:
        ValueError: it is no XML, is a video's, or does not say what its format must.
    """
    try:
        root = root_of(path.read_bytes())
    except ValueError as error:
        raise LabelFileError(f"{path} is {error}: export it anew, or move it out of the set") from None
    if root.tag != "annotations":
        return None
    photos = []
    labels = {name for one in root.iterfind("meta//label") if one.findtext("type") != "tag" and (name := one.findtext("name"))}
    for image in root.iterfind("image"):
        name, shapes = image.get("name"), []
        if not name:
            raise LabelFileError(f'{path} has an image {image.get("id")} without a name: export "CVAT for images 1.1"')
        for number, element in enumerate(image, start=1):
            label = element.get("label")
            if label is None or element.tag == "tag":
                continue
            shapes.append(LabelledShape(label, f"{element.tag} {number}", _cvat_region(element)))
        outlined = {shape.label for shape in shapes}
        labels |= outlined
        for tag in image.iterfind("tag"):  # it says that the photo shows something, but not where
            if (label := tag.get("label") or "") not in outlined:
                shapes.append(LabelledShape(label, "a tag", _no_region("without an outline", "draw one, or remove the tag")))
        photos.append(PhotoShapes(path, name, _size(image.get("width")), _size(image.get("height")), shapes))
    tracks = [(track.get("label") or "", f"track {track.get('id')}") for track in root.iterfind("track")]
    if tracks and not photos:
        raise LabelFileError(f'{path} is a video\'s export: export a task of photos as "CVAT for images 1.1"')
    if not photos and root.find("meta") is None:
        return None
    return LabelFile(path, CVAT, labels | {label for label, _ in tracks}, photos, tracks)


def _cvat_region(element) -> Region:
    if element.tag in LINES:
        return _no_region(f"of the kind {element.tag}")
    try:
        geometry = geometry_of(element)
    except (TypeError, ValueError, AttributeError) as error:
        return _no_region(f"a {element.tag} with {error}", "export it anew")
    if geometry is None or element.tag not in ("polygon", "mask", "box", "rectangle", "ellipse"):
        return _no_region(f"of the kind {element.tag}")
    kind, points, rotation = geometry
    if kind == "mask":
        *runs, left, top, right, bottom = points
        if sum(runs) > (right - left + 1) * (bottom - top + 1):
            return _no_region(f"a mask of {sum(runs):g} px in a smaller box", "export it anew")
    return _polygon(points) if kind == "polygon" else _painted(kind, points, rotation)


# ---- YOLO ----


def read_yolo(folder: Path) -> LabelFile | None:
    """The texts of YOLO segmentation in a folder labels/, and the labels' names beside it or in it; None without texts.

    Raises:
        ValueError: there are no names, or two lists of them; a line is no outline's.
    """
    texts = [path for path in _texts(folder) if path.name.lower() not in YOLO_NAMES]
    if not texts:
        return None
    found = {path: _yolo_names(path) for path in _beside(folder)}
    if not found:
        if not any(_is_yolo(path) for path in texts):
            return None
        raise LabelFileError(
            f"{folder} has outlines of YOLO, but no names of labels: put data.yaml or classes.txt into {folder.parent}"
        )
    (path, names), *others = found.items()
    for other, own in others:
        if own != names:
            raise LabelFileError(f"{path} and {other} name other labels, or in another order: remove one")
    photos = [_read(text, lambda text: _yolo_photo(folder, text, names, path)) for text in texts]
    return LabelFile(path, YOLO, set(names.values()), photos)


def _texts(folder: Path) -> Iterator[Path]:
    for inner, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(".txt") and not name.startswith("."):
                yield Path(inner, name)


def _beside(folder: Path) -> list[Path]:
    """Files with names of labels, in the set's folder first."""
    inner = [path for where in (folder.parent, folder) for path in sorted(where.iterdir())]
    return [path for path in inner if path.name.lower() in YOLO_NAMES and path.is_file()]


def _yolo_names(path: Path) -> dict[int, str]:
    if path.suffix.lower() in (".yaml", ".yml"):
        import yaml  # sets in other formats do without it

        text = read_text(path)
        try:
            content = yaml.safe_load(text)
            names = content["names"]
            names = dict(enumerate(names)) if isinstance(names, list) else {int(key): name for key, name in names.items()}
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise LabelFileError(
                f'{path} has no names of labels that can be read ({error!r:.200}): it must hold "names: [crack, rust]"'
            ) from None
        return {number: str(name) for number, name in names.items()}
    return dict(enumerate(read_lines(path)))


def _is_yolo(path: Path) -> bool:
    """Whether the first line is numbers alone, as of a text of YOLO; notes are not."""
    try:
        numbers = [float(value) for value in read_lines(path)[0].split()]
    except ValueError:
        return False
    return len(numbers) >= 5


def _yolo_photo(folder: Path, path: Path, names: dict[int, str], named_in: Path) -> PhotoShapes:
    shapes = []
    try:
        lines = read_lines(path)
    except ValueError as error:
        raise LabelFileError(error) from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError:
            raise LabelFileError(
                f"{path} line {number} is {line!r:.60}, but must be a label's number and x y of each point, 0 to 1"
            ) from None
        if label not in names:
            raise LabelFileError(f"{path} line {number} has the label {label:g}, which {named_in} does not name")
        shapes.append(LabelledShape(names[int(label)], f"line {number}", _yolo_region(values)))
    name = path.relative_to(folder).as_posix()[: -len(".txt")]
    return PhotoShapes(path, name, None, None, shapes)


def _yolo_region(values: list[float]) -> Region:
    if len(values) == 4:
        return _no_region("a box", "an outline has three points or more; export YOLO segmentation")
    if len(values) < 6 or len(values) % 2:
        return _no_region(f"an outline of {len(values)} numbers", "three points or more are needed, each x and y")
    if not (min(values) >= -BEYOND and max(values) <= 1 + BEYOND):
        worst = max(values, key=abs)
        return _no_region(f"an outline with {worst:g}", "coordinates are shares of the photo's sides, 0 to 1")
    return lambda width, height: region_of("polygon", (np.reshape(values, (-1, 2)) * [width, height]).ravel(), width, height)
