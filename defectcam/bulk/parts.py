"""Proposals for photos larger than the function takes: part by part, joined where the parts overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from defectcam.bulk.exports import region_of_answer
from defectcam.cvat_labels import UNPROCESSED
from defectcam.deadline import NO_DEADLINE
from defectcam.handler import ModelHandler, cvat_shape
from defectcam.proposals import Component, Proposal
from defectcam.regions import merged, on_one_crop
from defectcam.request import Request

OVERLAP_PX = 512  # a defect cut in two is seen whole in one of the parts, or joined; at most a quarter of a part's side

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Piece:
    """A proposal of one part, in the coordinates of the photo."""

    part: int
    shape: dict
    region: Component

    @property
    def confidence(self) -> int:
        """Of the proposal, 0 to 100."""
        return int(next(one["value"] for one in self.shape["attributes"] if one["name"] == "confidence"))


def parts_of(height: int, width: int, max_pixels: int) -> list[Box]:
    """Boxes (left, top, right, bottom), half open, of at most `max_pixels` that overlap and cover a photo; row by row."""
    side = math.isqrt(max_pixels)
    rows = min(height, max(side, max_pixels // width))
    columns = min(width, max_pixels // rows)

    def spans(length: int, part: int) -> list[tuple[int, int]]:
        overlap = min(OVERLAP_PX, part // 4)
        count = 1 + math.ceil((length - part) / (part - overlap))
        starts = (round(number * (length - part) / max(1, count - 1)) for number in range(count))
        return [(start, start + part) for start in starts]

    return [(x0, y0, x1, y1) for y0, y1 in spans(height, rows) for x0, x1 in spans(width, columns)]


def propose_in_parts(model: ModelHandler, image_rgb: np.ndarray) -> list[dict]:
    """The function's answer for a photo of any size, (H, W, 3) uint8, by the settings of `model`.

    Proposals of one defect that share pixels where two parts overlap become one, with the highest confidence of them and that
    one's name. If a part cannot be processed, the photo is not: its other parts would look free of defects.
    """
    height, width = image_rgb.shape[:2]
    boxes = parts_of(height, width, model.max_pixels)
    pieces, notices = [], []
    for number, (left, top, right, bottom) in enumerate(boxes):
        part = Image.fromarray(image_rgb[top:bottom, left:right])
        for shape in model.answer(Request(part, model.settings, ()), logged=False):
            if shape["type"] == "tag":
                reason = shape["attributes"][0]
                reason["value"] = f"part {number + 1} of {len(boxes)}: {reason['value']}"
                if shape["label"] == UNPROCESSED:
                    return [shape]
                notices.append(shape)
            else:
                moved = _moved(shape, left, top)
                pieces.append(Piece(number, moved, region_of_answer(moved, width, height)))
    groups = _touching(pieces)
    defects = list(model.settings.defects or model.defects)
    surest = [max(group, key=lambda piece: piece.confidence) for group in groups]
    order = sorted(range(len(groups)), key=lambda one: (defects.index(surest[one].shape["label"]), -surest[one].confidence))
    shapes = [_one_shape(model, groups[one], surest[one], height, width) for one in order]
    return [*shapes, *_one_notice(notices)]


def _moved(shape: dict, left: int, top: int) -> dict:
    """A shape of a part that begins at (left, top), in the coordinates of the photo."""
    points = [round(value + (left, top)[index % 2], 2) for index, value in enumerate(shape["points"])]
    moved = {**shape, "points": points}
    if "mask" in shape:
        *pixels, x0, y0, x1, y1 = shape["mask"]
        moved["mask"] = [*pixels, x0 + left, y0 + top, x1 + left, y1 + top]
    return moved


def _touching(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in groups: those of one label and different parts that share pixels, directly or through others."""
    group_of = list(range(len(pieces)))
    boxes = np.array([piece.region.box_xyxy for piece in pieces]).reshape(-1, 4)
    for second, piece in enumerate(pieces):
        left, top, right, bottom = boxes[second]
        before = boxes[:second]
        near = (before[:, :2] <= (right, bottom)).all(axis=1) & (before[:, 2:] >= (left, top)).all(axis=1)
        for first in np.flatnonzero(near).tolist():
            other = pieces[first]
            if group_of[first] == group_of[second] or other.part == piece.part or other.shape["label"] != piece.shape["label"]:
                continue
            (one, two), _, _ = on_one_crop([other.region, piece.region])
            if (one & two).any():
                joined, gone = group_of[first], group_of[second]
                group_of = [joined if group == gone else group for group in group_of]
    return [[piece for piece, one in zip(pieces, group_of) if one == group] for group in dict.fromkeys(group_of)]


def _one_shape(model: ModelHandler, group: Sequence[Piece], surest: Piece, height: int, width: int) -> dict:
    if len(group) == 1:
        return surest.shape
    defect = surest.shape["label"]
    values = {attribute["name"]: attribute["value"] for attribute in surest.shape["attributes"]}
    proposal = Proposal(merged([piece.region for piece in group]), surest.confidence / 100)
    in_force = model.effective(defect, model.settings)
    return cvat_shape(proposal, defect, values["proposal"], in_force, (height, width), NO_DEADLINE)


def _one_notice(notices: Sequence[dict]) -> list[dict]:
    if not notices:
        return []
    reason = {**notices[0]["attributes"][0], "value": ". ".join(tag["attributes"][0]["value"] for tag in notices)[:4096]}
    return [{**notices[0], "attributes": [reason]}]
