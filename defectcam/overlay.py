"""Proposals drawn onto their photo, for people to look at."""

from __future__ import annotations

import cv2
import numpy as np

COLOURS_RGB = {"crack": (255, 40, 40), "spalling": (40, 120, 255), "rust": (255, 190, 0)}
OTHER_RGB = (0, 220, 120)


def draw_shapes(image_rgb: np.ndarray, shapes: list[dict]) -> np.ndarray:
    """The photo with every proposal outlined, lightly filled and marked with its confidence.

    Args:
        image_rgb: (H, W, 3) uint8.
        shapes: the function's answer; tags are written into the upper left corner.

    Returns:
        (H, W, 3) uint8.
    """
    drawn = image_rgb.copy()
    filled = image_rgb.copy()
    thickness = max(1, round(max(image_rgb.shape) / 1200))
    polygons = [shape for shape in shapes if "points" in shape]
    for shape in polygons:
        cv2.fillPoly(filled, [_points(shape)], COLOURS_RGB.get(shape["label"], OTHER_RGB))
    drawn = cv2.addWeighted(drawn, 0.65, filled, 0.35, 0)
    for shape in polygons:
        colour = COLOURS_RGB.get(shape["label"], OTHER_RGB)
        cv2.polylines(drawn, [_points(shape)], True, colour, thickness, cv2.LINE_AA)
        x, y = _points(shape).min(axis=0)
        values = {attribute["name"]: attribute["value"] for attribute in shape["attributes"]}
        _write(drawn, f"{shape['label']} {values['confidence']}", int(x), max(int(y) - 4, 12), colour, thickness)
    for row, shape in enumerate(shape for shape in shapes if shape["type"] == "tag"):
        reason = "; ".join(attribute["value"] for attribute in shape["attributes"])
        _write(drawn, f"{shape['label']}: {reason}", 8, 24 * (row + 1), OTHER_RGB, thickness)
    return drawn


def _points(shape: dict) -> np.ndarray:
    return np.round(np.reshape(shape["points"], (-1, 2))).astype(np.int32)


def _write(image: np.ndarray, text: str, x: int, y: int, colour: tuple, thickness: int) -> None:
    rim = [(dx, dy, (0, 0, 0)) for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1))]  # reads on any ground
    for dx, dy, shade in [*rim, (0, 0, colour)]:  # not by a thicker stroke: that makes the letters wider, too
        place = x + dx * thickness, y + dy * thickness
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45 * thickness, shade, thickness, cv2.LINE_AA)
