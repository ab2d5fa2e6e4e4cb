"""The proposals that were shown on the photos of a job, from the function's proposal log, a snapshot, and CVAT's events.

The log has all answers of the function, also those that CVAT threw away. The shapes that are left in CVAT tell which answers
were shown. CVAT keeps no trace of a proposal that was deleted.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from defectcam.feedback.jobs import UNTOUCHED, Frame, Job, JobEvents, proposal_name
from defectcam.feedback.match import Proposal
from defectcam.feedback.store import SnapshotRow
from defectcam.proposal_log import read_proposal_log
from defectcam.training.names import meaning

MAPPED_SHARE = 0.75  # of a label's untouched shapes: annotators relabel some
SnapshotFrames = dict[str, list[dict]]  # see `store.SnapshotRow.frames`


def add_log_option(parser: argparse.ArgumentParser) -> None:
    """`--log`, folders of proposal logs as often as needed; `LoggedProposals.read` takes its value."""

    def log_folder(text: str) -> Path:
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"{text} is no folder; give what the function has as ADVCAM_LOG_DIR")
        return Path(text)

    parser.add_argument(
        "--log", type=log_folder, action="append", default=[],
        help="the function's ADVCAM_LOG_DIR: what was proposed, and so what was rejected; may be given several times",
    )  # fmt: skip


class LoggedProposals:
    """A proposal log by photo and by proposal.

    Args:
        records: answers of the function in any order. Equal ones (photo, weights, settings, proposals) become one, with all
            of its "times".

    Attributes:
        by_image, by_name: hash of a photo's pixels, and name of a proposal -> the answers that have it.
        label_of: name of a proposal -> the defect.
        defects: all that were asked for or proposed.
        replaced: (job, proposal) of all proposals that second runs have replaced, see `defectcam cvat annotate`.
        earlier: (job, photo) -> names of the proposals from before second runs.
        second_runs: (job, photo) -> record of the last second run.
    """

    def __init__(self, records: Iterable[dict]) -> None:
        self.replaced: set[tuple[int, str]] = set()
        self.earlier: dict[tuple[int, str], set[str]] = defaultdict(set)
        self.second_runs: dict[tuple[int, str], dict] = {}
        answers: dict[tuple, dict] = {}
        for record in records:
            if second := record.get("second_run"):
                key = second["job"], record["image"]
                self.replaced |= {(second["job"], name) for name in second["replaced"]}
                self.earlier[key] |= {*second["replaced"], *second["rejected"]}
                if key not in self.second_runs or parse_time(record["time"]) > parse_time(self.second_runs[key]["time"]):
                    self.second_runs[key] = record
                if not record["shapes"]:
                    continue
            same = record["image"], record.get("weights"), repr(record.get("settings")), frozenset(names_in(record))
            answers.setdefault(same, {**record, "times": []})["times"].append(record["time"])
        self.by_image: dict[str, list[dict]] = defaultdict(list)
        self.by_name: dict[str, list[dict]] = defaultdict(list)
        self.label_of: dict[str, str] = {}
        for record in answers.values():
            self.by_image[record["image"]].append(record)
            self.label_of |= {proposal.name: proposal.label for proposal in proposals_of_record(record)}
            for name in names_in(record):
                self.by_name[name].append(record)
        self.defects = {*defects_of(*answers.values()), *self.label_of.values()}

    @classmethod
    def read(cls, folders: Iterable[Path]) -> LoggedProposals:
        """The proposals of all logs in some folders."""
        return cls(record for folder in folders for record in read_proposal_log(folder))

    def without_replaced(self, frames: Sequence[Frame], images: dict[int, str], snapshot: SnapshotRow) -> SnapshotFrames:
        """A snapshot's frames, but for those on which the function was run anew after the snapshot.

        Args:
            frames: of the job, with the shapes that they have now.
            images: frame number -> hash of its pixels, where known.
        """
        kept = dict(snapshot.frames)
        for frame in frames:
            named = [record for shape in frame.shapes for record in self.by_name.get(shape.proposal, ())]
            named = [record for record in named if images.get(frame.number, record["image"]) == record["image"]]
            if any(min(map(parse_time, record["times"])) > parse_time(snapshot.taken) for record in named):
                kept.pop(str(frame.number), None)
        return kept

    def label_mapping(self, job: Job, frames: Sequence[Frame], snapshot: SnapshotFrames) -> dict[str, str]:
        """What the job's labels mean to which the run mapped the function's: {"Riss": "crack"}.

        Of a defect that the job has no label for, it is the label that most untouched proposals of the defect have. Nearly all
        untouched shapes of that label must be proposals of the defect. A job that has the defect's own label is never renamed.
        """
        untouched = {(shape.proposal, shape.label) for frame in frames for shape in frame.shapes if shape.source in UNTOUCHED}
        untouched |= {(proposal_name(shape["attributes"]), shape["label"]) for shapes in snapshot.values() for shape in shapes}
        pairs = Counter((label, self.label_of[name]) for name, label in untouched if name in self.label_of)
        shapes_of_label = Counter(label for name, label in untouched if name in self.label_of)
        label_of_defect: dict[str, str] = {}
        for (label, defect), _ in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0])):
            if defect not in job.labels and label not in self.defects:
                label_of_defect.setdefault(defect, label)
        return {
            label: defect
            for defect, label in label_of_defect.items()
            if pairs[label, defect] >= MAPPED_SHARE * shapes_of_label[label]
        }

    def of_unseen_photos(
        self, names_of: dict[int, set[str]], sizes: dict[int, tuple[int, int]], seen: set[str]
    ) -> dict[int, list[dict]]:
        """The answers shown on photos whose pixels cannot be had, by the names of the proposals that were found there.

        A propagated shape has the name of another photo's proposal. So every photo of the log is taken for one frame alone: the
        one that has most of its names, then one of its size, then the first.

        Args:
            names_of: frame number -> names of proposals.
            sizes: frame number -> width and height, px.
            seen: hashes of the photos that belong to other frames.
        """
        pairs = []
        for frame, names in names_of.items():
            images = Counter(image for name in names for image in {r["image"] for r in self.by_name.get(name, ())})
            for image, count in images.items():
                record = self.by_image[image][0]
                other_size = (record["width"], record["height"]) != sizes[frame]
                pairs.append((-count, other_size, parse_time(record["time"]), frame, image))
        found: dict[int, list[dict]] = {}
        taken = set(seen)
        for _, _, _, frame, image in sorted(pairs):
            if frame not in found and image not in taken:
                taken.add(image)
                found[frame] = [record for record in self.by_image[image] if names_of[frame] & names_in(record)]
        return found


def last_during(job: Job, records: Iterable[dict], after: str = "") -> list[dict]:
    """The last answer that was given between the job's creation, or `after`, and its last change; [] without one."""
    first, last = max(parse_time(job.created), parse_time(after)), parse_time(job.updated)
    given = [(parse_time(time), record) for record in records for time in record["times"]]
    during = [(time, record) for time, record in given if first <= time <= last]
    return [max(during, key=lambda pair: pair[0])[1]] if during else []


def of_other_functions(job: Job, records: Iterable[dict], known: Sequence[dict], present: set[frozenset[str]]) -> list[dict]:
    """The last answer about other defects than those of the `known` answers: all of its proposals were rejected.

    It must be younger than they are, or the job must still have proposals of its kind. Otherwise the later run may have deleted
    its proposals.

    Args:
        present: the defects of every kind of answer of which the job has a proposal.
    """
    known_defects, youngest = defects_of(*known), max(map(last_time, known))

    def may_be_shown(record: dict) -> bool:
        defects = defects_of(record)
        return bool(defects) and not defects & known_defects and (defects in present or last_time(record) > youngest)

    return last_during(job, filter(may_be_shown, records))


def defects_of(*records: dict) -> frozenset[str]:
    """The defects that some answers were asked for; none of answers whose settings are not known."""
    return frozenset(defect for record in records for defect in record.get("settings", ()))


def names_in(record: dict) -> set[str]:
    """Names of the proposals of a logged answer."""
    return {name for shape in record["shapes"] if (name := proposal_name(attributes_of(shape)))}


def attributes_of(shape: dict) -> dict[str, str]:
    """Name -> value of the attributes of a shape of an answer."""
    return {attribute["name"]: attribute["value"] for attribute in shape.get("attributes", ())}


def parse_time(time: str) -> datetime:
    """A time in ISO 8601; "" lies before all others."""
    moment = datetime.fromisoformat(time) if time else datetime.min
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def last_time(record: dict) -> datetime:
    """When an answer was given last."""
    return max(map(parse_time, record["times"]))


def proposals_of_record(record: dict) -> list[Proposal]:
    """The proposals of a logged answer, without its tags."""
    found = []
    for shape in record["shapes"]:
        attributes, is_mask = attributes_of(shape), shape["type"] == "mask"
        if proposal_name(attributes):
            proposal = _proposal(
                shape,
                attributes,
                points=tuple(shape["mask"] if is_mask else shape["points"]),
                outline=tuple(shape.get("points", ())) if is_mask else (),
                width=record["width"],
                height=record["height"],
                weights=record.get("weights", ""),
                settings=record.get("settings", {}).get(shape["label"]),
            )
            found.append(proposal)
    return found


def proposals_of_snapshot(shapes: Sequence[dict], frame: Frame) -> list[Proposal]:
    """The proposals that a snapshot has on a frame; shapes of one name are one proposal."""
    found: dict[str, Proposal] = {}
    for shape in shapes:
        name = proposal_name(shape["attributes"])
        if name and name not in found:  # snapshots of earlier versions have shapes that are no proposals
            size = {"width": shape.get("width", frame.width), "height": shape.get("height", frame.height)}
            found[name] = _proposal(shape, shape["attributes"], points=tuple(shape["points"]), **size)
    return list(found.values())


def _proposal(shape: dict, attributes: dict[str, str], **fields) -> Proposal:
    return Proposal(
        name=proposal_name(attributes),
        label=shape["label"],
        kind=shape["type"],
        confidence=attributes.get("confidence", ""),
        iterations=attributes.get("iterations", ""),
        **fields,
    )


def with_model_labels(
    job: Job,
    frames: Sequence[Frame],
    snapshot: SnapshotFrames | None,
    log: LoggedProposals,
    label_names: Mapping[str, str],
    defects: Collection[str],
) -> tuple[Job, Sequence[Frame], SnapshotFrames | None, list[str]]:
    """Job, frames and snapshot with the defects' names in place of the labels that mean them; and notes for the user.

    Args:
        label_names: what labels mean, as the user says.
        defects: names of defects, as they are to be written.
    """
    by_user = {label: meaning(label, label_names, defects) for label in job.labels}
    job, frames, snapshot = _renamed(by_user, job, frames, snapshot)
    by_run = log.label_mapping(job, frames, snapshot or {})
    notes = [f"job {job.id}: labels taken for the function's: {by_run}"] if by_run else []
    return *_renamed(by_run, job, frames, snapshot), notes


def _renamed(
    names: dict[str, str], job: Job, frames: Sequence[Frame], snapshot: SnapshotFrames | None
) -> tuple[Job, list[Frame], SnapshotFrames | None]:
    """Job, frames and snapshot with other names of labels."""

    def new(label: str) -> str:
        return names.get(label, label)

    job = replace(job, labels=tuple(sorted({new(label) for label in job.labels})))
    frames = [
        replace(frame, shapes=tuple(replace(shape, label=new(shape.label)) for shape in frame.shapes)) for frame in frames
    ]
    if snapshot is not None:
        snapshot = {
            number: [{**shape, "label": new(shape["label"])} for shape in shapes] for number, shapes in snapshot.items()
        }
    return job, frames, snapshot


def shown_proposals(
    frames: Sequence[Frame],
    images: dict[int, str],
    job: Job,
    events: JobEvents,
    log: LoggedProposals,
    snapshot: SnapshotFrames | None,
    snapshot_taken: str = "",
) -> tuple[dict[int, list[Proposal]], set[int]]:
    """The proposals that were shown on every frame of a job, and the numbers of the frames without a known answer.

    Args:
        images: frame number -> hash of its pixels, where known.
        snapshot: of the job, None without one.
        snapshot_taken: when. What the snapshot lacks may have been proposed later.
    """
    snapshots = {frame.number: (snapshot or {}).get(str(frame.number), []) for frame in frames}
    names_of, from_events = {}, set()
    for frame in frames:
        image, shapes = images.get(frame.number, ""), snapshots[frame.number]
        names_of[frame.number], only_events = _logged_names(frame, image, shapes, job, events, log)
        if only_events:
            from_events.add(frame.number)
    records = _answers_of_frames(frames, images, job, log, names_of, snapshots, snapshot_taken)
    for number in from_events & records.keys():
        if records[number]:
            records[number] = last_during(job, records[number]) or [max(records[number], key=last_time)]
    unknown = set() if snapshot is not None else {number for number in names_of if not records.get(number)}
    # CVAT drops proposals of labels that the run did not map to one of the job's, so annotators did not see them.
    arrived = {log.label_of[name] for names in names_of.values() for name in names} | set(job.labels)
    shown = {}
    for frame in frames:
        logged = [p for record in records.get(frame.number, ()) for p in proposals_of_record(record) if p.label in arrived]
        by_name = {proposal.name: proposal for proposal in logged}
        for proposal in proposals_of_snapshot(snapshots[frame.number], frame):
            # A shape that the log has on another photo alone was propagated to this one before the snapshot.
            if not logged or proposal.name not in log.by_name:
                by_name.setdefault(proposal.name, proposal)
        present = {shape.proposal for shape in frame.shapes}
        shown[frame.number] = [p for name, p in by_name.items() if name in present or (job.id, name) not in log.replaced]
    return shown, unknown


def _logged_names(
    frame: Frame, image: str, snapshot_shapes: Sequence[dict], job: Job, events: JobEvents, log: LoggedProposals
) -> tuple[set[str], bool]:
    """Names of the logged proposals that were found on a frame, and whether only events tell them.

    Args:
        image: hash of the frame's pixels, "" if unknown.
        snapshot_shapes: of the frame.
    """
    names = {shape.proposal for shape in frame.shapes} | {proposal_name(shape["attributes"]) for shape in snapshot_shapes}
    only_events = not names & log.by_name.keys()
    if only_events:  # all were rejected; events also have those that a later run has deleted
        names = {name for number, name in events.shown if number == frame.number}
    return (names | log.earlier.get((job.id, image), set())) & log.by_name.keys(), only_events


def _answers_of_frames(
    frames: Sequence[Frame],
    images: dict[int, str],
    job: Job,
    log: LoggedProposals,
    names_of: dict[int, set[str]],
    snapshots: dict[int, list[dict]],
    snapshot_taken: str,
) -> dict[int, list[dict]]:
    """Frame number -> the logged answers that were shown there; for the other arguments see `shown_proposals`.

    Args:
        names_of: frame number -> names of the logged proposals that were found there.
        snapshots: frame number -> its shapes in the snapshot.
    """
    present = {defects_of(record) for names in names_of.values() for name in names for record in log.by_name[name]}
    seen = {number: image for number, image in images.items() if image in log.by_image}
    unseen = {number: names for number, names in names_of.items() if number not in seen}
    sizes = {frame.number: (frame.width, frame.height) for frame in frames}
    records = log.of_unseen_photos(unseen, sizes, set(seen.values()))
    for number, image in seen.items():
        # Names of other photos' proposals, which came with propagated shapes, are no evidence.
        records[number] = [record for record in log.by_image[image] if names_of[number] & names_in(record)]
        if records[number]:
            records[number] += of_other_functions(job, log.by_image[image], records[number], present)
        elif not snapshots[number]:
            records[number] = last_during(job, log.by_image[image], snapshot_taken)
    return records
