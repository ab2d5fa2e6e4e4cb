"""The shapes of a photo in CVAT: which are untouched proposals, and which a person made or corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from defectcam.bulk.exports import region_of_answer
from defectcam.cvat_answers import Label
from defectcam.feedback.cvat import shape_of
from defectcam.feedback.jobs import UNTOUCHED, Shape
from defectcam.feedback.match import match
from defectcam.feedback.regions import common_px
from defectcam.feedback.shown import LoggedProposals, names_in, proposals_of_record
from defectcam.feedback.store import ACCEPTED, REJECTED
from defectcam.handler import ModelHandler, photo_key
from defectcam.polygons import mask_crop
from defectcam.proposals import Component, proposal_id
from defectcam.regions import AREA_TYPES, region_of, run_lengths
from defectcam.settings import SHAPES

OVERLAP = 0.5  # common pixels over those of the smaller region: from then on two regions are about the same thing
OURS = ("confidence", "iterations", "proposal")  # the attributes that a proposal comes with


@dataclass(frozen=True, eq=False)
class StoredShape:
    """A shape of a job in CVAT.

    Attributes:
        raw: as CVAT sends it, which is what deleting it takes.
        shape: the same with names in place of ids.
        region: its pixels, None if it has none.
        has_own_values: whether somebody set an attribute of the label that proposals do not set.
    """

    raw: dict
    shape: Shape
    region: Component | None
    has_own_values: bool


def stored_shapes(raw_shapes: Sequence[dict], labels: Mapping[int, Label], width: int, height: int) -> list[StoredShape]:
    """The shapes of one photo of width x height px.

    Args:
        raw_shapes: as CVAT sends them.
        labels: of the task by id; shapes of other labels are left out.
    """
    found = []
    for raw in raw_shapes:
        label = labels.get(raw["label_id"])
        if label is None:
            continue
        shape = shape_of(raw, label)
        region = None
        if shape.kind in AREA_TYPES:
            region = region_of(shape.kind, shape.points, width, height, shape.rotation)
        others = [spec for spec in label.attributes if spec.name not in OURS]
        defaults = {spec.name: spec.default_value or "" for spec in others}
        own = any(shape.attributes.get(name, default) != default for name, default in defaults.items())
        found.append(StoredShape(raw, shape, region, own))
    return found


class PhotoNames:
    """The names that the proposals of a photo have, without a look at it: they follow from pixels, weights and settings.

    Args:
        model: with its settings.
        image_rgb: (H, W, 3) uint8.
        in_force: defect -> settings in force of this run.
    """

    def __init__(self, model: ModelHandler, image_rgb: np.ndarray, in_force: Mapping[str, dict]) -> None:
        self._model, self._photo = model, photo_key(image_rgb)
        self._defects: dict[str, dict[str, str]] = {}  # iterations -> name -> defect
        self.of_defect = {defect: set(self._names(defect, effective)) for defect, effective in in_force.items()}
        self.of_run = set().union(*self.of_defect.values())

    def defect_of(self, shape: Shape) -> str | None:
        """What a shape was proposed as; None if its name is of other weights, settings or another photo."""
        steps = shape.attributes.get("iterations", "")
        if not steps.isdecimal():
            return None
        if steps not in self._defects:
            here = self._model.settings
            names: dict[str, str] = {}
            for defect, threshold, kind in product(self._model.defects, {here.threshold, None}, SHAPES):
                # This run's threshold, and that of a function without options; the label's shape, and that of a function
                # which cannot read the task.
                settings = replace(here, iterations=int(steps), threshold=threshold, shape=kind)
                names |= dict.fromkeys(self._names(defect, self._model.effective(defect, settings)), defect)
            self._defects[steps] = names
        return self._defects[steps].get(shape.proposal)

    def _names(self, defect: str, effective: dict) -> list[str]:
        digest = self._model.name_digest(self._photo, defect, effective)
        return [proposal_id(digest, defect, rank) for rank in range(effective["max_proposals"])]


def is_untouched(
    one: StoredShape, names: PhotoNames, log: LoggedProposals, image: str, width: int, height: int, alone: bool
) -> bool:
    """Whether a shape is an unchanged proposal for this photo. Then another may take its place.

    CVAT's page keeps the source of a proposal that was relabelled or propagated. So what it was proposed as is compared,
    by the log as harvest does it, or by its name. In doubt a shape counts as touched.

    Args:
        image: hash of the photo's pixels, by which the log knows it.
        width, height: of the photo, px.
        alone: whether nothing says that it came from another photo; counts where neither log nor name tell.
    """
    shape = one.shape
    if shape.source not in UNTOUCHED or not shape.proposal or one.region is None:
        return False
    if one.has_own_values or one.raw.get("group"):
        return False
    logged = [p for record in log.by_image.get(image, ()) for p in proposals_of_record(record) if p.name == shape.proposal]
    if logged:
        judged, _ = match(logged[:1], [shape], width, height)
        return [interaction.outcome for interaction in judged] == [ACCEPTED]
    defect = names.defect_of(shape)
    if defect is not None:
        return defect == shape.label
    return alone and shape.proposal not in log.by_name  # otherwise it is another photo's


def rejected_proposals(
    log: LoggedProposals, image: str, shapes: Sequence[StoredShape], job: int, kinds: set[tuple], width: int, height: int
) -> list[tuple[str, str, Component]]:
    """(label, name, pixels) of the proposals that were shown on a photo and that its annotator deleted.

    Args:
        image: hash of the photo's pixels.
        shapes: all that the photo has now.
        job: its id.
        kinds: of the answers that reached the job, see `kind_of`.
        width, height: of the photo, px.
    """
    present = {one.shape.proposal for one in shapes}
    shown = {}
    for record in log.by_image.get(image, ()):
        if names_in(record) & present or kind_of(record) in kinds:
            shown |= {p.name: p for p in proposals_of_record(record) if (job, p.name) not in log.replaced}
    judged, _ = match(list(shown.values()), [one.shape for one in shapes], width, height)
    gone = [one for one in judged if one.outcome == REJECTED and one.proposed is not None]
    found = [(one.defect, one.proposal.name, region_of("mask", one.proposed["points"], width, height)) for one in gone]
    # What another proposal of the label lies on was replaced rather than rejected.
    return [
        (label, name, region)
        for label, name, region in found
        if region is not None and not any(s.shape.label == label and s.region and overlaps(s.region, region) for s in shapes)
    ]


def kind_of(record: dict) -> tuple:
    """What tells the answers of one run from those of others: weights and settings."""
    return record.get("weights"), repr(record.get("settings"))


def overlaps(one: Component, other: Component) -> bool:
    """Whether two regions are about the same thing: one lies in the other with half of its pixels, or their IoU is 0.5."""
    return common_px(one, other) >= OVERLAP * min(one.area_px, other.area_px)


def shape_for_cvat(element: dict, label: Label, frame: int, width: int, height: int) -> dict:
    """An element of the function's answer as CVAT's API takes it.

    Args:
        element: polygon or mask.
        label: of the task; its other attributes get their defaults.
        frame: number within the task.
        width, height: of the photo, px.
    """
    points = element["points"]
    if element["type"] == "mask":
        points = run_lengths(region_of_answer(element, width, height))
    values = {attribute["name"]: attribute["value"] for attribute in element["attributes"]}
    return {
        "type": element["type"],
        "label_id": label.id,
        "frame": frame,
        "points": [float(value) for value in points],
        "source": "auto",
        "group": 0,
        "occluded": False,
        "outside": False,
        "z_order": 0,
        "rotation": 0,
        "attributes": [{"spec_id": s.id, "value": values.get(s.name, s.default_value or "")} for s in label.attributes],
        "elements": [],
    }


def element_of(one: StoredShape) -> dict:
    """A stored proposal as the function had answered it, for the log."""
    attributes = [{"name": name, "value": one.shape.attributes.get(name, "")} for name in OURS]
    element = {"label": one.shape.label, "type": one.shape.kind, "points": list(one.shape.points), "attributes": attributes}
    return {**element, "points": [], "mask": mask_crop(one.region)} if one.shape.kind == "mask" else element
