"""What was proposed on the photos of a job: by the function's proposal log, a snapshot, and the events of CVAT.

The shapes that are left in CVAT tell which of the logged answers were shown. CVAT keeps no trace of a proposal that was deleted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from defectcam.feedback.cvat import UNTOUCHED, Frame, Job, JobEvents, proposal_name
from defectcam.feedback.match import Proposal
from defectcam.feedback.store import SnapshotRow
from defectcam.training.names import meaning

MAPPED_SHARE = 0.75  # of a label's untouched shapes: annotators relabel some


class LoggedProposals:
    """A proposal log by photo and by proposal.

    Args:
        records: answers in any order; equal ones (photo, weights, settings, proposals) become one, with all its "times".
    """

    def __init__(self, records: Iterable[dict]) -> None:
        answers: dict[tuple, dict] = {}
        self.replaced: set[tuple[int, str]] = set()  # (job, proposal), by second runs: `defectcam cvat annotate`
        self.earlier: dict[tuple[int, str], set[str]] = defaultdict(set)  # (job, photo) -> proposals from before second runs
        self.second_runs: dict[tuple[int, str], dict] = {}  # (job, photo) -> record of the last one
        for record in records:
            if second := record.get("second_run"):
                key = second["job"], record["image"]
                self.replaced |= {(second["job"], name) for name in second["replaced"]}
                self.earlier[key] |= {*second["replaced"], *second["rejected"]}
                if key not in self.second_runs or parse_time(record["time"]) > parse_time(self.second_runs[key]["time"]):
                    self.second_runs[key] = record
                if not record["shapes"]:
                    continue
            settings, names = repr(record.get("settings")), frozenset(names_in(record))
            answer = answers.setdefault(
                (record["image"], record.get("weights"), settings, names), {**record, "times": []}
            )
            answer["times"].append(record["time"])
        self.by_image: dict[str, list[dict]] = defaultdict(list)
        self.by_name: dict[str, list[dict]] = defaultdict(list)
        self.label_of: dict[str, str] = {}
        self.defects: set[str] = set()
        for record in answers.values():
            self.by_image[record["image"]].append(record)
            self.defects |= {*record.get("settings", ()), *(proposal.label for proposal in proposals_of_record(record))}
            self.label_of |= {proposal.name: proposal.label for proposal in proposals_of_record(record)}
            for name in names_in(record):
                self.by_name[name].append(record)

    def without_replaced(
        self, frames: Sequence[Frame], images: dict[int, str], snapshot: SnapshotRow
    ) -> dict[str, list[dict]]:
        """A snapshot's frames but for those on which a shape names an answer that was first given after it."""
        kept = dict(snapshot.frames)
        for frame in frames:
            named = [record for shape in frame.shapes for record in self.by_name.get(shape.proposal, ())]
            named = [record for record in named if images.get(frame.number, record["image"]) == record["image"]]
            if any(min(map(parse_time, record["times"])) > parse_time(snapshot.taken) for record in named):
                kept.pop(str(frame.number), None)
        return kept

    def label_mapping(self, job: Job, frames: Sequence[Frame], snapshot: dict[str, list[dict]]) -> dict[str, str]:
        """What labels of the job mean to which the function's were mapped: {"Riss": "crack"}.

        A label means a defect if nearly all untouched shapes of it were proposed as that defect, which the job has no
        label for; it is the label that most of them have. So a job that has the defect's own label is never renamed.
        """
        untouched = {(shape.proposal, shape.label) for frame in frames for shape in frame.shapes if shape.source in UNTOUCHED}
        untouched |= {(proposal_name(shape["attributes"]), shape["label"]) for own in snapshot.values() for shape in own}
        pairs = Counter((label, self.label_of[name]) for name, label in untouched if name in self.label_of)
        label_of_defect: dict[str, str] = {}
        for (label, defect), _ in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0])):
            if defect not in job.labels and label not in self.defects:
                label_of_defect.setdefault(defect, label)
        of_label: Counter = Counter()
        for (label, _), count in pairs.items():
            of_label[label] += count
        return {
            label: defect
            for defect, label in label_of_defect.items()
            if pairs[label, defect] >= MAPPED_SHARE * of_label[label]
        }

    def of_unseen_photos(
        self, names_of: dict[int, set[str]], sizes: dict[int, tuple[int, int]], seen: set[str]
    ) -> dict[int, list[dict]]:
        """The answers shown on photos whose pixels cannot be had, by the names of the proposals found there.

        A propagated shape carries the name of another photo's proposal, so every photo of the log is taken for the
        frame that has most of its names (size and order deciding between equals), and for no other; the photos
        `seen` are taken already.
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
                found[frame] = [r for r in self.by_image[image] if names_of[frame] & names_in(r)]
        return found


def last_during(job: Job, records: Iterable[dict], after: str = "") -> list[dict]:
    """The last of some answers that was given between the job's creation, or `after`, and its last change; else []."""
    first, last = max(parse_time(job.created), parse_time(after)), parse_time(job.updated)
    given = [(parse_time(time), record) for record in records for time in record["times"]]
    during = [(time, record) for time, record in given if first <= time <= last]
    return [max(during, key=lambda pair: pair[0])[1]] if during else []


def of_other_functions(
    job: Job, records: Iterable[dict], known: Sequence[dict], alive: set[frozenset[str]]
) -> list[dict]:
    """The last answer about defects that those `known` are not about: of it every proposal was rejected.

    It must be younger than they are, or proposals of its kind are still in the job: else the later run may have
    cleaned it away.

    Args:
        alive: the defects of every kind of answer of which the job has a proposal.
    """
    defects = defects_of(*known)
    youngest = max(parse_time(time) for record in known for time in record["times"])
    others = [
        record
        for record in records
        if (own := defects_of(record))
        and not own & defects
        and (own in alive or max(map(parse_time, record["times"])) > youngest)
    ]
    return last_during(job, others)


def defects_of(*records: dict) -> frozenset[str]:
    """What some answers were asked for; empty of those whose settings are not known."""
    return frozenset(defect for record in records for defect in record.get("settings", ()))


def latest(records: Sequence[dict]) -> list[dict]:
    """The last of some answers, [] of none."""
    return sorted(records, key=lambda record: max(map(parse_time, record["times"])))[-1:]


def names_in(record: dict) -> set[str]:
    """Names of the proposals of a logged answer."""
    return {name for shape in record["shapes"] if (name := proposal_name(attributes_of(shape)))}


def attributes_of(shape: dict) -> dict[str, str]:
    return {attribute["name"]: attribute["value"] for attribute in shape.get("attributes", ())}


def parse_time(time: str) -> datetime:
    """A time in ISO 8601; one that is unknown lies before all others."""
    moment = datetime.fromisoformat(time) if time else datetime.min
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def proposals_of_record(record: dict) -> list[Proposal]:
    """The proposals of a logged answer; tags are none."""
    found = []
    for shape in record["shapes"]:
        attributes = attributes_of(shape)
        if not (name := proposal_name(attributes)):
            continue
        is_mask = shape["type"] == "mask"
        found.append(
            Proposal(
                name=name,
                label=shape["label"],
                kind=shape["type"],
                points=tuple(shape["mask"] if is_mask else shape["points"]),
                outline=tuple(shape.get("points", ())) if is_mask else (),
                width=record["width"],
                height=record["height"],
                confidence=attributes.get("confidence", ""),
                iterations=attributes.get("iterations", ""),
                weights=record.get("weights", ""),
                settings=record.get("settings", {}).get(shape["label"]),
            )
        )
    return found


def proposals_of_snapshot(shapes: Sequence[dict], frame: Frame) -> list[Proposal]:
    """The proposals that a snapshot has on a frame; shapes of one name are one proposal."""
    found: dict[str, Proposal] = {}
    for shape in shapes:
        attributes = shape["attributes"]
        if not (name := proposal_name(attributes)):  # snapshots of earlier versions have shapes that are no proposals
            continue
        proposal = Proposal(
            name=name,
            label=shape["label"],
            kind=shape["type"],
            points=tuple(shape["points"]),
            width=shape.get("width", frame.width),
            height=shape.get("height", frame.height),
            confidence=attributes.get("confidence", ""),
            iterations=attributes.get("iterations", ""),
        )
        found.setdefault(name, proposal)
    return list(found.values())


def with_model_labels(
    job: Job,
    frames: Sequence[Frame],
    snapshot: dict[str, list[dict]] | None,
    log: LoggedProposals,
    label_names: Mapping[str, str],
    defects: Collection[str],
) -> tuple[Job, Sequence[Frame], dict[str, list[dict]] | None, list[str]]:
    """Job, frames and snapshot with the defects' names in place of the labels that mean them; and notes for the user.

    Args:
        label_names: what labels mean, as the user says.
        defects: names of defects, as they are to be written.
    """
    said = {label: meaning(label, label_names, defects) for label in job.labels}
    job, frames, snapshot = _renamed(said, job, frames, snapshot)
    mapping = log.label_mapping(job, frames, snapshot or {})
    if not mapping:
        return job, frames, snapshot, []
    note = f"job {job.id}: labels taken for the function's: {mapping}"
    return *_renamed(mapping, job, frames, snapshot), [note]


def _renamed(
    names: dict[str, str], job: Job, frames: Sequence[Frame], snapshot: dict[str, list[dict]] | None
) -> tuple[Job, list[Frame], dict[str, list[dict]] | None]:
    """Job, frames and snapshot with other names of labels."""

    def new(label: str) -> str:
        return names.get(label, label)

    job = replace(job, labels=tuple(sorted({new(label) for label in job.labels})))
    frames = [
        replace(frame, shapes=tuple(replace(shape, label=new(shape.label)) for shape in frame.shapes)) for frame in frames
    ]
    if snapshot is not None:
        snapshot = {n: [{**own, "label": new(own["label"])} for own in shapes] for n, shapes in snapshot.items()}
    return job, frames, snapshot


def shown_proposals(
    frames: Sequence[Frame],
    images: dict[int, str],
    job: Job,
    events: JobEvents,
    log: LoggedProposals,
    snapshot: dict[str, list[dict]] | None,
    snapshot_taken: str = "",
) -> tuple[dict[int, list[Proposal]], set[int]]:
    """The proposals that were shown on every frame of a job, and the frames of which no answer is known.

    Args:
        images: frame number -> hash of its pixels, where known.
        snapshot: of the job, None without one.
        snapshot_taken: when. What is not in the snapshot was not there then, but may have been proposed since.
    """
    taken = {frame.number: (snapshot or {}).get(str(frame.number), []) for frame in frames}
    names_of, told_by_events = _names_of_frames(frames, images, job, events, log, taken)
    records = _answers_of_frames(frames, images, job, log, names_of, taken, snapshot_taken)
    for number in told_by_events & records.keys():
        records[number] = last_during(job, records[number]) or latest(records[number])
    unknown = set() if snapshot is not None else {number for number in names_of if not records.get(number)}
    # CVAT drops proposals of labels that the run did not map to one of the job's, so annotators did not see them.
    arrived = {log.label_of[name] for names in names_of.values() for name in names} | set(job.labels)
    shown = {}
    for frame in frames:
        logged = [p for record in records.get(frame.number, ()) for p in proposals_of_record(record) if p.label in arrived]
        by_name = {proposal.name: proposal for proposal in logged}
        for proposal in proposals_of_snapshot(taken[frame.number], frame):
            # A shape propagated before the snapshot is no proposal of this frame where the log knows better.
            if not logged or proposal.name not in log.by_name:
                by_name.setdefault(proposal.name, proposal)
        present = {shape.proposal for shape in frame.shapes}
        shown[frame.number] = [p for name, p in by_name.items() if name in present or (job.id, name) not in log.replaced]
    return shown, unknown


def _names_of_frames(
    frames: Sequence[Frame],
    images: dict[int, str],
    job: Job,
    events: JobEvents,
    log: LoggedProposals,
    taken: dict[int, list[dict]],
) -> tuple[dict[int, set[str]], set[int]]:
    """Names of the logged proposals that were found on each frame, and the frames of which only events tell them.

    Args:
        taken: frame number -> shapes of the snapshot.
    """
    names_of, told_by_events = {}, set()
    for frame in frames:
        names = {shape.proposal for shape in frame.shapes}
        names |= {proposal_name(shape["attributes"]) for shape in taken[frame.number]}
        if not names & log.by_name.keys():  # all were rejected; events also have those that a later run has cleaned away
            names = {name for number, name in events.shown if number == frame.number}
            told_by_events.add(frame.number)
        names |= log.earlier.get((job.id, images.get(frame.number, "")), set())
        names_of[frame.number] = names & log.by_name.keys()
    return names_of, told_by_events


def _answers_of_frames(
    frames: Sequence[Frame],
    images: dict[int, str],
    job: Job,
    log: LoggedProposals,
    names_of: dict[int, set[str]],
    taken: dict[int, list[dict]],
    snapshot_taken: str,
) -> dict[int, list[dict]]:
    """The logged answers that were shown on each frame; arguments as of `shown_proposals` and `_names_of_frames`."""
    alive = {defects_of(record) for names in names_of.values() for name in names for record in log.by_name[name]}
    seen = {number: image for number, image in images.items() if image in log.by_image}
    unseen = {number: names for number, names in names_of.items() if number not in seen}
    sizes = {frame.number: (frame.width, frame.height) for frame in frames}
    records = log.of_unseen_photos(unseen, sizes, set(seen.values()))
    for number, image in seen.items():
        # Names of other photos' proposals, which came with propagated shapes, are no evidence.
        records[number] = [record for record in log.by_image[image] if names_of[number] & names_in(record)]
        if records[number]:
            records[number] += of_other_functions(job, log.by_image[image], records[number], alive)
        elif not taken[number]:
            records[number] = last_during(job, log.by_image[image], snapshot_taken)
    return records
