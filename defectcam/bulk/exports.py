"""Proposals of many photos as one file: "CVAT 1.1" (XML) and "COCO 1.0" (JSON), which CVAT imports, and a table (CSV).

In: the records that `defectcam propose` keeps for each photo, in the order of their names, read one by one and as
often as needed, since all of them may not fit into memory. Points and attributes are those of the function's answer.

Areas and boxes in the COCO file are those of the region that a polygon stands for, border included (see
`defectcam.proposals`). Readers that rasterise polygons by pixel centres, pycocotools among them, lose part of thin
cracks: with shape "mask" the file has exact run lengths instead. A polygon with holes has run lengths too: its bridges
make its ring invalid for shapely and others.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np
from shapely import Polygon

from defectcam.bulk.measures import ShapeSize
from defectcam.proposals import Component
from defectcam.regions import region_of, run_lengths

# CVAT finds a frame by its name, and where it knows no such name it takes the id for the frame's number and puts the
# shapes there. No task has so many frames, so that it refuses the file instead and says which name it misses.
FIRST_IMAGE_ID = 1_000_000


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path`, folders included, once it is complete, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        yield file
    os.replace(part, path)


def write_cvat_xml(path: Path, labels: Sequence[dict], records: Iterable[dict]) -> None:
    """Write "CVAT for images 1.1".

    Args:
        path: of the file.
        labels: of `defectcam.cvat_labels.task_labels`.
        records: {"name", "width", "height", "shapes"} of each photo; size in px, photos without one are left out.
    """
    with replacing(path) as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        file.write(_xml(_meta(labels)))
        for number, record in enumerate(record for record in records if record["width"]):
            file.write(_xml(_image(FIRST_IMAGE_ID + number, record)))
        file.write(b"</annotations>\n")


def write_coco(path: Path, labels: Sequence[dict], records: Callable[[], Iterable[dict]]) -> None:
    """Write COCO instances; tags, which COCO does not have, are left out.

    Args:
        path, labels: as for `write_cvat_xml`.
        records: called as often as the records must be read; for what it gives see `write_cvat_xml`.
    """
    categories = {label["name"]: number for number, label in enumerate(labels, start=1) if label["type"] != "tag"}
    images = [
        {"id": number, "file_name": record["name"], "width": record["width"], "height": record["height"]}
        for number, record in enumerate((record for record in records() if record["width"]), start=1)
    ]
    head = {
        "info": {"description": "proposals of defectcam"},
        "licenses": [],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in categories.items()],
        "images": images,
    }
    with replacing(path) as file:
        file.write(json.dumps(head).removesuffix("}").encode() + b', "annotations": [')
        annotations = _coco_annotations(records(), categories)
        for number, annotation in enumerate(annotations, start=1):
            file.write(b",\n" if number > 1 else b"\n")
            file.write(json.dumps({"id": number, **annotation}, separators=(",", ":")).encode())
        file.write(b"\n]}\n")


def write_table(path: Path, records: Iterable[dict], mm_per_px: float | None = None) -> None:
    """Write a CSV table with a line per shape: photo, defect, proposal, confidence, and what `ShapeSize` has.

    A photo that was not processed, or of which something was left out, has a line with that label and without sizes.

    Args:
        path: of the file; UTF-8 with a mark, so that spreadsheets show all names right.
        records: as for `write_cvat_xml`, with {"sizes"}: the fields of a `ShapeSize` for each shape, None for tags.
        mm_per_px: for four columns more, in mm² and mm.
    """
    header = ["photo", "defect", "proposal", "confidence", "area_px", "length_px", "mean_width_px", "largest_width_px"]
    if mm_per_px:
        header += ["area_mm2", "length_mm", "mean_width_mm", "largest_width_mm"]
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        table = csv.writer(text)
        table.writerow(header)
        for record in records:
            for shape, size in zip(record["shapes"], record["sizes"], strict=True):
                values = {attribute["name"]: attribute["value"] for attribute in shape["attributes"]}
                row = [record["name"], shape["label"], values.get("proposal"), values.get("confidence")]
                if size:
                    area, *lengths = size
                    row += [area, *(round(value, 1) for value in lengths)]
                    row += [round(value, 2) for value in ShapeSize(*size).in_mm(mm_per_px)] if mm_per_px else []
                table.writerow(row + [None] * (len(header) - len(row)))
        text.detach()


def region_of_answer(shape: dict, width: int, height: int) -> Component:
    """The pixels of a polygon or mask of the function's answer on a photo of width x height px."""
    if shape["type"] != "mask":
        return region_of(shape["type"], shape["points"], width, height)
    *pixels, left, top, right, bottom = shape["mask"]
    return Component(np.array(pixels, bool).reshape(bottom - top + 1, right - left + 1), left, top)


def _meta(labels: Sequence[dict]) -> ElementTree.Element:
    """The labels, where exports of CVAT have them."""
    meta = ElementTree.Element("meta")
    parent = ElementTree.SubElement(ElementTree.SubElement(meta, "task"), "labels")
    for label in labels:
        element = ElementTree.SubElement(parent, "label")
        for key in ("name", "type"):
            ElementTree.SubElement(element, key).text = label[key]
        attributes = ElementTree.SubElement(element, "attributes")
        for given in label["attributes"]:
            attribute = ElementTree.SubElement(attributes, "attribute")
            texts = given | {"mutable": str(given["mutable"]), "values": "\n".join(given["values"])}
            for key in ("name", "mutable", "input_type", "default_value", "values"):
                ElementTree.SubElement(attribute, key).text = texts[key]
    return meta


def _image(number: int, record: dict) -> ElementTree.Element:
    """A photo with its shapes and tags."""
    width, height = record["width"], record["height"]
    image = ElementTree.Element("image", id=str(number), name=record["name"], width=str(width), height=str(height))
    for shape in record["shapes"]:
        common = {"label": shape["label"], "source": shape.get("source", "auto")}
        if shape["type"] == "tag":
            element = ElementTree.SubElement(image, "tag", common)
        else:
            common |= {"occluded": "0", "z_order": "0", **_geometry(shape, width, height)}
            element = ElementTree.SubElement(image, shape["type"], common)
        for attribute in shape["attributes"]:
            ElementTree.SubElement(element, "attribute", name=attribute["name"]).text = attribute["value"]
    return image


def _geometry(shape: dict, width: int, height: int) -> dict[str, str]:
    if shape["type"] == "mask":
        *runs, left, top, right, bottom = run_lengths(region_of_answer(shape, width, height))
        box = {"left": left, "top": top, "width": right - left + 1, "height": bottom - top + 1}
        return {"rle": ", ".join(map(str, runs))} | {key: str(value) for key, value in box.items()}
    points = zip(shape["points"][::2], shape["points"][1::2])
    return {"points": ";".join(f"{x:.2f},{y:.2f}" for x, y in points)}


def _coco_annotations(records: Iterable[dict], categories: dict[str, int]) -> Iterator[dict]:
    for image_id, record in enumerate((record for record in records if record["width"]), start=1):
        for shape in record["shapes"]:
            if shape["type"] == "tag":
                continue
            region = region_of_answer(shape, record["width"], record["height"])
            left, top, right, bottom = region.box_xyxy
            exact = shape["type"] == "mask" or not Polygon(np.reshape(shape["points"], (-1, 2))).is_valid
            yield {
                "image_id": image_id,
                "category_id": categories[shape["label"]],
                "segmentation": _column_runs(region, record) if exact else [shape["points"]],
                "area": region.area_px,
                "bbox": [left, top, right - left + 1, bottom - top + 1],
                "iscrowd": 0,
                "attributes": {attribute["name"]: attribute["value"] for attribute in shape["attributes"]},
            }


def _column_runs(region: Component, record: dict) -> dict:
    """A region as COCO's run lengths: column by column over the whole photo, the first counting zeros."""
    left, top, right, bottom = region.box_xyxy
    columns = np.zeros((record["height"], right - left + 1), bool)
    columns[top : bottom + 1] = region.mask
    edges = np.flatnonzero(np.diff(columns.ravel(order="F"), prepend=False, append=False)) + left * record["height"]
    runs = np.diff(edges, prepend=0, append=record["height"] * record["width"])
    return {"size": [record["height"], record["width"]], "counts": runs.tolist()}


def _xml(element: ElementTree.Element) -> bytes:
    ElementTree.indent(element)
    return ElementTree.tostring(element) + b"\n"
