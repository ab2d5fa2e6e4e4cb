"""The function for cvat-cli: T and every other setting per run, against any CVAT that cvat-sdk can talk to.

    pip install --constraint constraints.txt '.[runtime,cvat]' cvat-cli  # without a GPU: '.[runtime-cpu,cvat]'
    cvat-cli task auto-annotate 7 --function-file cvat_function.py -p iterations=int:4

The same handler as Nuclio's, on this machine; labels and attributes are those of function.yaml, so a task made
"From model" fits. A task without the label of a defect or `unprocessed` needs --allow-unmatched-labels. What the tag `notice`
says in CVAT is printed here, so no task needs that label.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import cvat_sdk.auto_annotation as cvataa
import cvat_sdk.models as models
import numpy as np
import PIL.Image
import yaml
from cvat_sdk.attributes import attribute_vals_from_dict
from cvat_sdk.masks import encode_mask

# cvat-cli loads this file by its path, which makes nothing beside it importable, and model_handler is installed nowhere.
sys.path.append(str(Path(__file__).resolve().parent))

from defectcam.request import Request, RequestError  # noqa: E402
from model_handler import ModelHandler  # noqa: E402

FUNCTION_YAML = Path(__file__).parent / "function.yaml"
NOTICE = "notice"  # the tag beside proposals; the last label of function.yaml
NO_TIME_LIMIT_S = "86400"  # nobody waits for a frame as CVAT waits for Nuclio


def create(
    *,
    iterations: int | None = None,
    threshold: float | None = None,
    cam_threshold: float | None = None,
    defects: str | None = None,
    shape: str | None = None,
    tolerance_px: float | None = None,
    hole_share: float | None = None,
    max_proposals: int | None = None,
    weights: str | None = None,
    device: str | None = None,
) -> DefectFunction:
    """A detection function for cvat-sdk; cvat-cli calls it with the values of its option -p.

    Args:
        iterations: climbing steps T, 0 to 50. One that the select of function.yaml does not have must
            be added to the values of the task's labels, or the driver refuses the run.
        defects: comma separated, of those with weights; all by default.
        shape: "polygon" or "mask"; masks need labels of type mask (or any) in the task.
        weights: folder with manifest.json.
        device: "cuda" or "cpu".
        threshold, cam_threshold, tolerance_px, hole_share, max_proposals: as in the README's table of settings. What is
            not given here is taken from the environment's ADVCAM_* variables, then from the manifest.

    Raises:
        RequestError: a value that is not allowed; names its ADVCAM_* variable, value and what is allowed.
        WeightsError: weights that must not be used.
    """
    given = {key: str(value) for key, value in locals().items() if value is not None}
    environ = {"ADVCAM_TIME_LIMIT": NO_TIME_LIMIT_S, **os.environ}
    environ |= {f"ADVCAM_{key.upper()}": value for key, value in given.items()}
    environ |= {"ADVCAM_CVAT_URL": "", "ADVCAM_CVAT_TOKEN": ""}  # whoever runs this sets T himself
    return DefectFunction(ModelHandler.from_env(environ, logging.getLogger("defectcam")))


class DefectFunction:
    """cvat-sdk's `DetectionFunction` around a ModelHandler."""

    def __init__(self, model: ModelHandler) -> None:
        self.model = model
        self.labels = {label["name"]: label for label in _labels(model)}
        labels = []
        for number, label in enumerate(self.labels.values()):
            if label["name"] == NOTICE:
                continue
            specs = enumerate(label["attributes"])
            attributes = [cvataa.attribute_spec(a["name"], i, a["input_type"], a["values"]) for i, a in specs]
            labels.append(cvataa.label_spec(label["name"], number, type=label["type"], attributes=attributes))
        self._spec = cvataa.DetectionFunctionSpec(labels=labels)

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels that `detect` may answer."""
        return self._spec

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> list[models.LabeledShapeRequest | models.LabeledImageRequest]:
        """Proposals for a frame, or the tag `unprocessed` with the reason; what was left out is printed.

        Args:
            context: its `conf_threshold` comes before any other threshold, also where it is 0; with
                `conv_mask_to_poly` every shape is a polygon.
            image: of any mode.
        """
        changes = {"shape": "polygon"} if context.conv_mask_to_poly else {}
        if context.conf_threshold is not None:
            changes["threshold"] = float(context.conf_threshold)
        settings = replace(self.model.settings, **changes)
        answer = self.model.answer(Request(image, settings, ()))
        for element in answer:
            if element["label"] == NOTICE:
                print(f"{context.frame_name}: {element['attributes'][0]['value']}", file=sys.stderr)
        return [self._annotation(element) for element in answer if element["label"] != NOTICE]

    def _annotation(self, element: dict) -> models.LabeledShapeRequest | models.LabeledImageRequest:
        """One element of the handler's answer as cvat-sdk wants it."""
        names = list(self.labels)
        label_id, attributes = names.index(element["label"]), self.labels[element["label"]]["attributes"]
        ids = {attribute["name"]: number for number, attribute in enumerate(attributes)}
        values = attribute_vals_from_dict({ids[entry["name"]]: entry["value"] for entry in element["attributes"]})
        if element["type"] == "tag":
            return cvataa.tag(label_id, attributes=values)
        if element["type"] == "polygon":
            return cvataa.polygon(label_id, element["points"], attributes=values)
        *pixels, left, top, right, bottom = element["mask"]
        crop = np.array(pixels, bool).reshape(bottom - top + 1, right - left + 1)
        runs = encode_mask(crop, (0, 0, *crop.shape[::-1]))[:-4]
        return cvataa.mask(label_id, [*runs, left, top, right, bottom], attributes=values)


def _labels(model: ModelHandler) -> list[dict]:
    """function.yaml's labels for what this model may answer: name, type, attributes."""
    metadata = yaml.safe_load(FUNCTION_YAML.read_text())["metadata"]
    known = {label["name"]: label for label in json.loads(metadata["annotations"]["spec"])}
    labels = []
    for defect in model.settings.defects or model.defects:
        if defect not in known:
            raise RequestError(f"{FUNCTION_YAML} has no label for the defect {defect} of the weights: add it there")
        label = known[defect]
        if model.settings.shape == "mask":  # the driver takes nothing else than the label's type
            label["type"] = "mask"
        values = next(attribute["values"] for attribute in label["attributes"] if attribute["name"] == "iterations")
        steps = str(model.effective(defect, model.settings)["iterations"])
        if steps not in values:  # then the task's select must have it too: better refused than another T shown
            values.append(steps)
        labels.append(label)
    return [*labels, *(label for label in known.values() if label["type"] == "tag")]
