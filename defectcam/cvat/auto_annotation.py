"""The function for cvat-sdk: T and every other setting per run, against any CVAT that cvat-sdk can talk to.

cvat-cli loads it by the repository's cvat_function.py, which has the commands. `defectcam propose` calls it directly.

The same handler as Nuclio's, on this machine; labels and attributes are those of function.yaml, so a task made
"From model" fits. A defect of the weights that the file lacks has a label of the same kind. Where a task calls the defects
otherwise, say so by -p labels=str:Riss=crack,Abplatzung=spalling. A task without the label of a defect or `unprocessed`
needs --allow-unmatched-labels. What the tag `notice` says in CVAT is printed here, so no task needs
that label. A task's select may have more values than ours, such as an `iterations` of 16. Labels of type mask get masks,
labels of type polygon or any get polygons.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import cvat_sdk.auto_annotation as cvataa
import cvat_sdk.models as models
import numpy as np
import PIL.Image
from cvat_sdk.attributes import attribute_vals_from_dict
from cvat_sdk.auto_annotation import driver
from cvat_sdk.masks import encode_mask

from defectcam.cvat_labels import NOTICE, labels_with
from defectcam.cvat_runs import MASK
from defectcam.handler import ModelHandler
from defectcam.request import Request
from defectcam.settings import RequestError, function_environ
from defectcam.training.names import meaning, suggestion


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
    labels: str | None = None,
) -> DefectFunction:
    """A detection function for cvat-sdk; cvat-cli calls it with the values of its option -p.

    Args:
        iterations: climbing steps T, 0 to 50. One that the select of function.yaml does not have must
            be added to the values of the task's labels, or the driver refuses the run.
        defects: comma separated, of those with weights; all by default.
        shape: "polygon" or "mask" for all labels of the task, which must be of that type or any. Without it, see above.
        weights: folder with manifest.json.
        device: "cuda" or "cpu".
        labels: what the task calls the defects, "Riss=crack,Abplatzung=spalling"; the others have their own names.
        threshold, cam_threshold, tolerance_px, hole_share, max_proposals: as in the README's table of settings. What is
            not given here is taken from the environment's ADVCAM_* variables, then from the manifest.

    Raises:
        RequestError: a value that is not allowed; names its ADVCAM_* variable, value and what is allowed.
        WeightsError: weights that must not be used.
    """
    given = {key: value for key, value in locals().items() if key != "labels"}
    model = ModelHandler.from_env(function_environ(os.environ, **given), logging.getLogger("defectcam"))
    return DefectFunction(model, _label_of_defect(labels or "", model))


class FittingLabels(list):
    """A function's labels, of which those of defects take the type mask from the task's label of the same name.

    Masks are what the task's labels of type mask hold; labels of any other type are left to polygons.
    """

    def fit(self, task_labels: Sequence[models.ILabel]) -> None:
        """Set the types for one task."""
        masks = {label.name for label in task_labels if label.type == MASK}
        for label in self:
            if label.type != "tag":
                label.type = MASK if label.name in masks else "polygon"


class DefectFunction:
    """cvat-sdk's `DetectionFunction` around a ModelHandler.

    Args:
        label_of: what the task calls a defect, {"crack": "Riss"}; the others have their own names.
    """

    def __init__(self, model: ModelHandler, label_of: Mapping[str, str] | None = None) -> None:
        self.model, label_of = model, label_of or {}
        self.labels = {label["name"]: label for label in _labels(model)}
        labels = FittingLabels() if model.settings.shape is None else []
        for number, label in enumerate(self.labels.values()):
            if label["name"] == NOTICE:
                continue
            specs, name = enumerate(label["attributes"]), label_of.get(label["name"], label["name"])
            attributes = [cvataa.attribute_spec(a["name"], i, a["input_type"], a["values"]) for i, a in specs]
            labels.append(cvataa.label_spec(name, number, type=label["type"], attributes=attributes))
        self._spec = cvataa.DetectionFunctionSpec(labels=labels)

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels that `detect` may answer. Where no shape is given, the driver's look at a task sets their types."""
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
        types = {label.id: label.type for label in self.spec.labels}
        self.model.masks = frozenset(name for number, name in enumerate(self.labels) if types.get(number) == MASK)
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


def _label_of_defect(text: str, model: ModelHandler) -> dict[str, str]:
    """{"crack": "Riss"} of "Riss=crack".

    Raises:
        RequestError: naming what is not LABEL=DEFECT, a defect without weights, or a name that is there twice.
    """
    found: dict[str, str] = {}
    for pair in filter(str.strip, text.split(",")):
        label, _, defect = (part.strip() for part in pair.partition("="))
        if not label or not defect:
            raise RequestError(f"labels has {pair.strip()!r}, which is not LABEL=DEFECT, such as Riss=crack")
        defect = meaning(defect, {}, model.defects)
        if defect not in model.defects:
            near = suggestion(defect, model.defects)
            there = f"no weights for {defect!r}{near}, only for {model.defects}"
            raise RequestError(f"labels has {pair.strip()!r}, but there are {there}")
        if defect in found:
            raise RequestError(f"labels names {defect!r} twice: a task has one label for a defect")
        found[defect] = label
    names = [found.get(label["name"], label["name"]) for label in _labels(model)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"labels gives two labels the name {twice!r}: every defect and tag needs a name of its own")
    return found


def _labels(model: ModelHandler) -> list[dict]:
    """The labels for what this model may answer: name, type, attributes."""
    wanted = model.settings.defects or model.defects
    labels = [label for label in labels_with(wanted) if label["type"] == "tag" or label["name"] in wanted]
    for label in labels:
        if label["type"] == "tag":
            continue
        if model.settings.shape == MASK:  # the driver takes nothing else than the label's type
            label["type"] = MASK
        values = next(attribute["values"] for attribute in label["attributes"] if attribute["name"] == "iterations")
        steps = str(model.effective(label["name"], model.settings)["iterations"])
        if steps not in values:  # then the task's select must have it too: better refused than another T shown
            values.append(steps)
    return labels


def _fit_to_tasks() -> None:
    """Let cvat-sdk's driver take a task whose select has all values of the function's and more, and fit types of labels.

    The driver wants both equal and tells a function nothing of the task, so its checks are wrapped. A version of it that
    checks in another way goes on doing so.
    """
    mapper = getattr(driver, "_AnnotationMapper", None)
    check_attribute = getattr(mapper, "_build_attribute_id_mapping", None)
    check_labels = getattr(mapper, "_build_spec_id_mapping", None)
    if check_attribute:

        @functools.wraps(check_attribute)
        def attribute_checked(self, fun_attr, ds_attr, *more):
            kinds = {str(attribute.input_type) for attribute in (fun_attr, ds_attr)}
            if kinds == {"select"} and set(fun_attr.values) < set(ds_attr.values):
                fun_attr = cvataa.attribute_spec(fun_attr.name, fun_attr.id, "select", list(ds_attr.values))
            return check_attribute(self, fun_attr, ds_attr, *more)

        mapper._build_attribute_id_mapping = attribute_checked
    if check_labels:

        @functools.wraps(check_labels)
        def labels_checked(self, fun_labels, ds_labels, *more, **options):
            if isinstance(fun_labels, FittingLabels):
                fun_labels.fit(ds_labels)
            return check_labels(self, fun_labels, ds_labels, *more, **options)

        mapper._build_spec_id_mapping = labels_checked


_fit_to_tasks()
