"""What comes out of the try-out page: downloads of what was kept, and the reviewed photos in --log-dir.

LOG_DIR/proposals-*.jsonl      what was proposed on reviewed photos: the log that `defectcam harvest --log LOG_DIR` reads
LOG_DIR/reviewed/images/       the photos that were reviewed to the end
LOG_DIR/reviewed/cvat.xml      their kept and added shapes, as an export of one completed job of CVAT, number 1

So `defectcam adapt --data LOG_DIR --sets reviewed` learns from it, and `defectcam harvest --export
LOG_DIR/reviewed/cvat.xml --log LOG_DIR` tells what was kept, rejected and added.
"""

from __future__ import annotations

import functools
import io
import json
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from PIL import Image

from defectcam.bulk.exports import FIRST_IMAGE_ID, region_of_answer, replacing, write_coco, write_cvat_xml
from defectcam.bulk.measures import ShapeSize, shape_size
from defectcam.cvat_labels import labels_with, task_labels
from defectcam.handler import ModelHandler
from defectcam.overlay import draw_shapes
from defectcam.paths import file_name
from defectcam.proposals import Component
from defectcam.serve.photos import Photo
from defectcam.settings import RequestError, Settings
from defectcam.training.names import stem_of

KINDS = ("cvat", "coco", "labelme", "masks", "overlay")
FIELDS = ("label", "type", "points", "source", "attributes")  # of a shape, beside what the page shows of it
JOB = 1  # of the exports, which are one job


def measures(
    shape: Mapping, height: int, width: int, surest_pixel: Callable[[Component], tuple[int, int]] | None = None
) -> dict:
    """What the page shows of a shape: area_px, length_px, width_px, and with `surest_pixel` the key that it is known by."""
    region = region_of_answer(shape, width, height)
    size = _size_of(region.mask.tobytes(), region.mask.shape)
    found = {"area_px": size.area_px, "length_px": round(size.length_px), "width_px": round(size.mean_width_px, 1)}
    if surest_pixel:
        x, y = surest_pixel(region)
        found["key"] = f"{shape['label']} {x},{y}"
    return found


@functools.lru_cache(1000)
def _size_of(pixels: bytes, mask_shape: tuple[int, int]) -> ShapeSize:
    """`shape_size` of a mask: sliders ask for the same ones again and again."""
    return shape_size(Component(np.frombuffer(pixels, bool).reshape(mask_shape), 0, 0))


def download(
    kind: str, records: Sequence[dict], defects: Sequence[str], pictures: Mapping[str, np.ndarray]
) -> tuple[str, bytes, str]:
    """A file of kept shapes: its name, content and media type.

    Args:
        kind: one of KINDS.
        records: {"id", "name", "width", "height", "shapes"} of each photo.
        pictures: id -> photo (H, W, 3) uint8 RGB, for overlays.

    Raises:
        RequestError: there is no photo.
    """
    if not records:
        raise RequestError("nothing is kept yet: keep a proposal, or add a shape by a click")
    if kind in ("cvat", "coco"):
        name = {"cvat": "cvat.xml", "coco": "coco.json"}[kind]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            if kind == "coco":
                write_coco(path, _labels(defects), lambda: records)
            else:
                now = datetime.now(timezone.utc).isoformat()
                path.write_bytes(_as_export(_root(records, defects), created=now))
            return name, path.read_bytes(), "application/xml" if kind == "cvat" else "application/json"
    files = {}
    for record in records:
        stem = file_name(stem_of(record["name"]) or record["name"])
        if kind == "labelme":
            files[f"{stem}.json"] = json.dumps(_labelme(record), indent=1).encode()
        elif kind == "overlay":
            files[f"{stem}.jpg"] = encoded(".jpg", draw_shapes(pictures[record["id"]], record["shapes"])[:, :, ::-1])
        else:
            for defect in defects:
                files[f"masks/{file_name(defect)}/{stem}.png"] = encoded(".png", _mask(record, defect))
    if len(files) == 1 and kind != "masks":
        name, content = files.popitem()
        return name, content, "image/jpeg" if kind == "overlay" else "application/json"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"{kind}.zip", packed.getvalue(), "application/zip"


class ReviewedSet:
    """The photos that were reviewed to the end, in the folder of the function's proposal log.

    Args:
        model: with a proposal log.
    """

    def __init__(self, model: ModelHandler) -> None:
        self.model, self.log = model, model.proposal_log
        self.folder = self.log.folder / "reviewed"
        self._lock = threading.Lock()

    def add(self, photo: Photo, name: str, kept: Sequence[dict], rejected: Sequence[dict], settings: Settings) -> Path:
        """Keep a photo; what is not among `kept` is no defect there. One that is there already is replaced.

        Args:
            name: of its file.
            kept: proposals that were kept, and shapes that were added.
            rejected: proposals.
            settings: that were in force.

        Returns:
            The photo's file.

        Raises:
            OSError: the folder cannot be written to.
        """
        started = datetime.now(timezone.utc).isoformat()
        height, width = photo.size
        kept, rejected = ([{key: shape[key] for key in FIELDS if key in shape} for shape in some] for some in (kept, rejected))
        with self._lock:
            path = self._path(photo, name)
            with replacing(path) as file:
                file.write(photo.file_bytes)
            proposed = [shape for shape in kept if "source" not in shape] + rejected
            in_force = {defect: self.model.effective(defect, settings) for defect in settings.defects or self.model.defects}
            self.log.append(photo.id, width, height, self.model.weights.version, in_force, proposed)
            record = {"name": path.name, "width": width, "height": height, "shapes": kept}
            root, export = _root([record], self.model.defects), self.folder / "cvat.xml"
            if export.exists():
                before = ElementTree.parse(export).getroot()
                root.extend(image for image in before.iterfind("image") if image.get("name") != path.name)
                started = before.findtext("meta/task/created") or started
            with replacing(export) as file:
                file.write(_as_export(root, created=started))
        return path

    def _path(self, photo: Photo, name: str) -> Path:
        """Where the photo is kept: by its name, with its pixels' hash where another photo is called so."""
        if stem_of(name) is None:
            with Image.open(io.BytesIO(photo.file_bytes)) as image:
                name = f"{name}.{image.format.lower()}"
        images = self.folder / "images"
        path = images / file_name(name)
        others = [other for other in images.glob("*") if stem_of(other.name) == stem_of(path.name)]
        if any(other.name != path.name or other.read_bytes() != photo.file_bytes for other in others):
            return images / f"{path.stem}-{photo.id[:8]}{path.suffix}"
        return path


def _labels(defects: Sequence[str]) -> list[dict]:
    return task_labels(labels_with(defects))


def _root(records: Sequence[dict], defects: Sequence[str]) -> ElementTree.Element:
    """Records as `write_cvat_xml` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cvat.xml")
        write_cvat_xml(path, _labels(defects), records)
        return ElementTree.parse(path).getroot()


def _as_export(root: ElementTree.Element, created: str) -> bytes:
    """The same as an export of a completed task with one job, which `defectcam harvest` asks for."""
    images, task = root.findall("image"), root.find("meta/task")
    for number, image in enumerate(images):
        image.set("id", str(FIRST_IMAGE_ID + number))
    fields = {"id": JOB, "name": "defectcam", "size": len(images), "start_frame": FIRST_IMAGE_ID, "created": created}
    fields["updated"] = datetime.now(timezone.utc).isoformat()
    for number, (name, value) in enumerate(fields.items()):
        element = ElementTree.Element(name)
        element.text = str(value)
        task.insert(number, element)
    segment = ElementTree.SubElement(ElementTree.SubElement(task, "segments"), "segment")
    for name, value in {"id": JOB, "start": 0, "stop": len(images) - 1}.items():
        ElementTree.SubElement(segment, name).text = str(value)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _labelme(record: dict) -> dict:
    """A photo's shapes as LabelMe keeps them."""
    shapes = [
        {
            "label": shape["label"],
            "points": np.reshape(shape["points"], (-1, 2)).tolist(),
            "group_id": None,
            "description": ", ".join(f"{one['name']} {one['value']}" for one in shape["attributes"] if one["value"]),
            "shape_type": "polygon",
            "flags": {},
        }
        for shape in record["shapes"]
    ]
    size = {"imageHeight": record["height"], "imageWidth": record["width"]}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": record["name"], "imageData": None, **size}


def _mask(record: dict, defect: str) -> np.ndarray:
    """(H, W) uint8, 255 where the defect is, 0 elsewhere."""
    mask = np.zeros((record["height"], record["width"]), np.uint8)
    for shape in record["shapes"]:
        if shape["label"] == defect:
            region = region_of_answer(shape, record["width"], record["height"])
            x0, y0, x1, y1 = region.box_xyxy
            mask[y0 : y1 + 1, x0 : x1 + 1][region.mask] = 255
    return mask


def encoded(ending: str, image: np.ndarray) -> bytes:
    """A picture (H, W) or (H, W, 3) BGR or (H, W, 4) as the bytes of a file."""
    return cv2.imencode(ending, image)[1].tobytes()
