"""A job of CVAT with its photos and shapes, as a server or an export has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from defectcam.cvat.client import CvatError

PROPOSAL = "proposal"  # the attribute that names a proposal
UNTOUCHED = ("auto", "file")  # sources of unchanged proposals: of a run, or imported from a file


def proposal_name(attributes: Mapping[str, str]) -> str:
    """The name of the proposal that a shape was made from, "" if it has none: then it is no proposal.

    Nothing else tells: shapes drawn by hand, or with other models, have the label's default of `iterations` and a
    `confidence` of 0.
    """
    return (attributes.get(PROPOSAL) or "").strip()


class LeftOut(CvatError):
    """A job that is not harvested for what it is; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A shape of a frame.

    Attributes:
        key: CVAT's id, which edits keep; in exports, which have none, a hash of the shape.
        label: name of its label.
        kind: polygon, mask, rectangle, ellipse, ...
        points: as CVAT stores them, see `defectcam.regions.region_of`.
        source: auto, semi-auto, manual or file; only CVAT's own page keeps it, which makes semi-auto of an auto shape
            that was edited, and manual of one from a file.
        attributes: name -> value.
        rotation: degrees.
    """

    key: str
    label: str
    kind: str
    points: tuple[float, ...]
    source: str = "manual"
    attributes: dict[str, str] = field(default_factory=dict)
    rotation: float = 0.0

    @property
    def proposal(self) -> str:
        """Name of the proposal it was made from, "" if it has none."""
        return proposal_name(self.attributes)


@dataclass(frozen=True)
class Frame:
    """A photo of a job with the shapes on it.

    Attributes:
        number: CVAT's, counted within the task.
        name: of the photo in CVAT, maybe with folders.
        width, height: px.
    """

    number: int
    name: str
    width: int
    height: int
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Job:
    """A job as CVAT lists it: frames first_frame..last_frame of its task; times are ISO 8601, "" where unknown."""

    id: int
    task_id: int
    first_frame: int
    last_frame: int
    state: str
    annotator: str
    created: str
    updated: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class JobEvents:
    """What the event log tells of a job.

    Attributes:
        working_time_s: time somebody worked on it, None where no event says so.
        annotator: who worked on it longest, else who changed shapes; "" if unknown.
        shown: (frame, proposal) of all shapes that were ever created with such an attribute.
    """

    working_time_s: float | None = None
    annotator: str = ""
    shown: frozenset[tuple[int, str]] = frozenset()
