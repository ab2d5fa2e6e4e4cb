"""Learn from CVAT what annotators did with the proposals, and keep it in a database (paper 3.2).

Reads the jobs that a person has completed, from a CVAT server or from an export ("CVAT for images 1.1"), and compares
their shapes with what was proposed: accepted, modified, rejected, or missed by the function. What was proposed is
known from the function's proposal log (ADVCAM_LOG_DIR there, --log here). Without a log, take a --snapshot right after
each automatic annotation, before anybody edits.

Jobs that are not completed are named and left alone, and so is the database where nothing has changed.
docs/feedback.md describes the tables.

Exit status: 0 if a job was harvested, 3 if none was, 1 or 2 if something was wrong.

Example:
    export ADVCAM_CVAT_URL=http://localhost:8080 ADVCAM_CVAT_TOKEN=...
    defectcam harvest --snapshot --tasks 7          # without a log: after "Automatic annotation"
    defectcam harvest --tasks 7 --log /data/proposals --csv out/feedback/csv
    defectcam harvest --export task7.zip --completed 7,8 --log /data/proposals --label Riss=crack
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.cvat.client import CvatError, add_server_options
from defectcam.feedback.cvat import (
    UNTOUCHED,
    CvatExport,
    Frame,
    Job,
    JobEvents,
    LeftOut,
    Shape,
    proposal_name,
    server_of,
)
from defectcam.feedback.match import Interaction, Proposal, match
from defectcam.feedback.store import (
    ACCEPTED,
    MISS,
    MODIFIED,
    REJECTED,
    FrameRow,
    InteractionRow,
    JobRow,
    SnapshotRow,
    StoreError,
    add_store_option,
    export_csv,
    open_store,
    without_secrets,
)
from defectcam.proposal_log import image_hash, read_proposal_log
from defectcam.request import ImageError, RequestError, decode_image
from defectcam.training.labels import add_label_option
from defectcam.training.names import LabelNames, check_label_names, meaning

NOTHING_HARVESTED = 3
OUTCOMES = (ACCEPTED, MODIFIED, REJECTED, MISS)
MAPPED_SHARE = 0.75  # of a label's untouched shapes: annotators relabel some
T = TypeVar("T")


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
                if key not in self.second_runs or at(record["time"]) > at(self.second_runs[key]["time"]):
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
            if any(min(map(at, record["times"])) > at(snapshot.taken) for record in named):
                kept.pop(str(frame.number), None)
        return kept

    def meanings(self, job: Job, frames: Sequence[Frame], snapshot: dict[str, list[dict]]) -> dict[str, str]:
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
                pairs.append((-count, other_size, at(record["time"]), frame, image))
        found: dict[int, list[dict]] = {}
        taken = set(seen)
        for _, _, _, frame, image in sorted(pairs):
            if frame not in found and image not in taken:
                taken.add(image)
                found[frame] = [r for r in self.by_image[image] if names_of[frame] & names_in(r)]
        return found


def last_during(job: Job, records: Iterable[dict], after: str = "") -> list[dict]:
    """The last of some answers that was given between the job's creation, or `after`, and its last change; else []."""
    given = [(at(time), record) for record in records for time in record["times"]]
    during = [(time, record) for time, record in given if max(at(job.created), at(after)) <= time <= at(job.updated)]
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
    youngest = max(at(time) for record in known for time in record["times"])
    others = [
        record
        for record in records
        if (own := defects_of(record))
        and not own & defects
        and (own in alive or max(map(at, record["times"])) > youngest)
    ]
    return last_during(job, others)


def defects_of(*records: dict) -> frozenset[str]:
    """What some answers were asked for; empty of those whose settings are not known."""
    return frozenset(defect for record in records for defect in record.get("settings", ()))


def newest(records: Sequence[dict]) -> list[dict]:
    """The last of some answers, [] of none."""
    return sorted(records, key=lambda record: max(map(at, record["times"])))[-1:]


def names_in(record: dict) -> set[str]:
    """Names of the proposals of a logged answer."""
    return {name for shape in record["shapes"] if (name := proposal_name(attributes_of(shape)))}


def attributes_of(shape: dict) -> dict[str, str]:
    return {attribute["name"]: attribute["value"] for attribute in shape.get("attributes", ())}


def at(time: str) -> datetime:
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
    names_of, told_by_events = {}, set()
    for frame in frames:
        names = {shape.proposal for shape in frame.shapes}
        names |= {proposal_name(shape["attributes"]) for shape in taken[frame.number]}
        names = {name for name in names if name in log.by_name}
        if not names:  # all were rejected; events also have those that a later run has cleaned away
            names = {name for number, name in events.shown if number == frame.number and name in log.by_name}
            told_by_events.add(frame.number)
        names_of[frame.number] = names | log.earlier.get((job.id, images.get(frame.number, "")), set())
    named = [record for names in names_of.values() for name in names for record in log.by_name[name]]
    alive = {defects_of(record) for record in named}
    seen = {number: image for number, image in images.items() if image in log.by_image}
    unseen = {number: names for number, names in names_of.items() if number not in seen}
    sizes = {frame.number: (frame.width, frame.height) for frame in frames}
    records = log.of_unseen_photos(unseen, sizes, set(seen.values()))
    for number, image in seen.items():
        # Names of other photos' proposals, which came with propagated shapes, are no evidence.
        records[number] = [r for r in log.by_image[image] if names_of[number] & names_in(r)]
        if not records[number] and not taken[number]:
            records[number] = last_during(job, log.by_image[image], snapshot_taken)
        elif records[number]:
            records[number] += of_other_functions(job, log.by_image[image], records[number], alive)
    for number in told_by_events & records.keys():
        records[number] = last_during(job, records[number]) or newest(records[number])
    unknown = set() if snapshot is not None else {n for n in names_of if not records.get(n)}
    # CVAT drops proposals of labels that the run did not map to one of the job's: nobody saw them.
    arrived = {log.label_of[name] for names in names_of.values() for name in names} | set(job.labels)
    shown = {}
    for frame in frames:
        logged = [p for record in records.get(frame.number, ()) for p in proposals_of_record(record)]
        logged = [proposal for proposal in logged if proposal.label in arrived]
        by_name = {proposal.name: proposal for proposal in logged}
        for proposal in proposals_of_snapshot(taken[frame.number], frame):
            # A shape propagated before the snapshot is no proposal of this frame where the log knows better.
            if not logged or proposal.name not in log.by_name:
                by_name.setdefault(proposal.name, proposal)
        present = {shape.proposal for shape in frame.shapes}
        shown[frame.number] = [p for name, p in by_name.items() if name in present or (job.id, name) not in log.replaced]
    return shown, unknown


class Harvest:
    """One run of the command.

    Args:
        source: CvatServer or CvatExport.
        engine: the database.
        log: the function's.
        label_names: what labels in CVAT mean, such as {"Riss": "crack"}.

    Attributes:
        notes: what its user must know.
        failed: whether a job could not be read.
    """

    def __init__(self, source, engine: Engine, log: LoggedProposals, label_names: Mapping[str, str] | None = None) -> None:
        self.source, self.engine, self.log = source, engine, log
        self.label_names = label_names or {}
        self.notes: list[str] = []
        self.failed = False

    def run(self) -> tuple[Counter, int, int]:
        """Harvest all completed jobs; the others become notes.

        Returns:
            Number of interactions per outcome; number of jobs that were harvested, and of all jobs.

        Raises:
            CvatError: there are no jobs; nothing can be read; or a name of `label_names` is none of theirs.
        """
        outcomes, harvested = Counter(), 0
        jobs = self._jobs()
        try:
            there = {label for job in jobs for label in job.labels}
            check_label_names(self.label_names, there, self.source.name, self.log.defects)
        except ValueError as error:
            raise CvatError(str(error)) from None
        for job in tqdm(jobs, desc="jobs", unit="job", disable=None):
            if job.state != "completed":
                self.notes.append(
                    f"job {job.id} is not completed (state: {job.state}) and was left alone: set its state to completed in "
                    "CVAT once it is annotated"
                    if job.state
                    else f"job {job.id} is not among --completed and was left alone: add it there if CVAT has it as completed"
                )
                continue
            of_job = self._unless_odd(self._job, job)
            if of_job is not None:
                outcomes, harvested = outcomes + of_job, harvested + 1
        return outcomes, harvested, len(jobs)

    def snapshot(self) -> tuple[int, int]:
        """Keep the proposals of all jobs that are not completed; returns the number of new snapshots, and of proposals."""
        jobs = self._jobs()
        waiting = [job for job in jobs if job.state != "completed"]
        if not waiting:
            self.notes.append(f"all {len(jobs)} jobs are completed: take a snapshot before the first edit")
        found = [self._unless_odd(self._job_snapshot, job) for job in waiting]
        taken = [proposals for proposals in found if proposals is not None]
        return len(taken), sum(taken)

    def _jobs(self) -> list[Job]:
        jobs = list(self.source.jobs())
        if not jobs:
            raise CvatError(f"{self.source.name} shows this user no annotation jobs: check --tasks, and whose token it is")
        return jobs

    def _unless_odd(self, work: Callable[[Job], T], job: Job) -> T | None:
        """Do some work on a job; whatever is odd about it becomes a note, for the other jobs are none the worse."""
        try:
            return work(job)
        except LeftOut as reason:
            self.notes.append(f"job {job.id} is left out: {reason}")
        except Exception as error:
            self.notes.append(f"job {job.id}: {error if isinstance(error, CvatError) else repr(error)}")
            self.failed = True
        return None

    def _job_snapshot(self, job: Job) -> int | None:
        """Take a snapshot; returns the number of its proposals, None where the last one is the better one."""
        if job.state != "new":
            self.notes.append(f"job {job.id} is {job.state}: proposals deleted in it already are not in the snapshot")
        shapes = [(frame, shape) for frame in self.source.frames(job) for shape in frame.shapes]
        untouched = [(frame, shape) for frame, shape in shapes if shape.source in UNTOUCHED]
        frames: dict[str, list[dict]] = {}
        for frame, shape in untouched:
            if shape.proposal:
                frames.setdefault(str(frame.number), []).append(snapshot_shape(shape, frame))
        now_there = [shape for shapes in frames.values() for shape in shapes]
        nameless = sum(shape.source == "auto" and not shape.proposal for _, shape in untouched)
        if nameless:
            self.notes.append(
                f"job {job.id}: {nameless} automatic shapes are not kept, since their attribute `proposal` is empty or "
                "missing: they are another model's, or the task's labels are not those of the function"
            )
        with Session(self.engine) as session, session.begin():
            last = self._snapshot(session, job)
            before = [shape for shapes in last.frames.values() for shape in shapes] if last else []
            # Undoing a deletion and propagating give a shape another id, but leave it its name.
            known = {proposal_name(shape["attributes"]) for shape in before}
            if last and all(proposal_name(shape["attributes"]) in known for shape in now_there):
                return None  # nothing but what people have left: the snapshot from before they edited is the better one
            now = datetime.now(timezone.utc).isoformat()
            session.add(SnapshotRow(server=self.source.name, job=job.id, taken=now, frames=frames))
        return len(now_there)

    def _job(self, job: Job) -> Counter:
        frames, events = self.source.frames(job), self.source.events(job)
        with Session(self.engine) as session, session.begin():
            events = remembered(events, session.get(JobRow, (self.source.name, job.id)))
            images, last = self._images(session, job, frames), self._snapshot(session, job)
            snapshot = self.log.without_replaced(frames, images, last) if last else None
            said = {label: meaning(label, self.label_names, self.log.defects) for label in job.labels}
            job, frames, snapshot = in_the_functions_words(said, job, frames, snapshot)
            meanings = self.log.meanings(job, frames, snapshot or {})
            if meanings:
                self.notes.append(f"job {job.id}: labels taken for the function's: {meanings}")
                job, frames, snapshot = in_the_functions_words(meanings, job, frames, snapshot)
            for defect in sorted(self.log.defects):
                for label in set(LabelNames(defect, self.label_names).nearly(job.labels)) - self.log.defects:
                    self.notes.append(
                        f"job {job.id}: the label {label!r} does not count as {defect}; if it is, say so by --label "
                        f"{label}={defect}"
                    )
            taken = last.taken if last else ""
            shown, unknown = shown_proposals(frames, images, job, events, self.log, snapshot, taken)
            if len(unknown) == len(frames):
                raise LeftOut(
                    "no proposal of it is known; give the function's log (--log), or take a --snapshot right after the "
                    "automatic annotation"
                )
            told = self._told_before(session, job, unknown)
            unknown -= {row.frame for row in told}
            if unknown:
                self.notes.append(
                    f"job {job.id}: no answer to {len(unknown)} of {len(frames)} photos is known; what was drawn there "
                    "counts as missed, and what was rejected there cannot be told"
                )
            rows = told + self._interactions(job, frames, shown, events, told)
            self._store(session, job, frames, images, events, rows)
            return Counter(row.outcome for row in rows)

    def _told_before(self, session: Session, job: Job, frames: set[int]) -> list[InteractionRow]:
        """What is known already of frames whose answer was known once: logs may be deleted once they are harvested."""
        own = (InteractionRow.server == self.source.name, InteractionRow.job == job.id)
        rows = session.scalars(select(InteractionRow).where(*own).order_by(InteractionRow.id)).all()
        judged = {row.frame for row in rows if row.outcome != MISS} & frames
        return [row for row in rows if row.frame in judged]

    def _snapshot(self, session: Session, job: Job) -> SnapshotRow | None:
        rows = select(SnapshotRow).where(SnapshotRow.server == self.source.name, SnapshotRow.job == job.id)
        return session.scalars(rows.order_by(SnapshotRow.taken.desc()).limit(1)).first()

    def _images(self, session: Session, job: Job, frames: Sequence[Frame]) -> dict[int, str]:
        """Hashes of the photos' pixels, as far as they can be had; photos seen before are not asked for again."""
        known = select(FrameRow).where(FrameRow.server == self.source.name, FrameRow.job == job.id)
        photos = {frame.number: frame.name for frame in frames}  # frames may be deleted since, or be other photos
        rows = [row for row in session.scalars(known) if photos.get(row.frame) == row.photo]
        images = {row.frame: row.image for row in rows if row.image}
        if not self.log.by_image:
            return images
        gone = []
        for frame in frames:
            if frame.number in images:
                continue
            photo = self.source.photo_bytes(job, frame)
            try:
                if not photo:
                    gone.append(frame.name)
                else:
                    images[frame.number] = image_hash(decode_image(photo, max_pixels=10**9))
            except ImageError as error:
                self.notes.append(f"job {job.id}: photo {frame.name}: {error}")
        if gone and images:
            self.notes.append(
                f"job {job.id}: no photo {', '.join(gone)} is in what CVAT gives: if all proposals on it were rejected, that "
                "cannot be told; export it anew with images"
            )
        return images

    def _interactions(
        self,
        job: Job,
        frames: Sequence[Frame],
        shown: dict[int, list[Proposal]],
        events: JobEvents,
        told: Sequence[InteractionRow],
    ) -> list[InteractionRow]:
        """The interactions of all frames but those that are told of already."""
        all_names = {p.name for proposals in shown.values() for p in proposals} | {row.proposal for row in told}
        all_names = frozenset(all_names - {""})  # of misses
        told_frames = {row.frame for row in told}
        found: list[tuple[Frame, Interaction]] = []
        strangers: list[Shape] = []
        for frame in frames:
            if frame.number in told_frames:
                continue
            elsewhere = all_names - {p.name for p in shown[frame.number]}
            interactions, unknown = match(shown[frame.number], frame.shapes, frame.width, frame.height, elsewhere)
            found += [(frame, interaction) for interaction in interactions]
            strangers += unknown
        if strangers:
            self.notes.append(
                f"job {job.id}: {len(strangers)} automatic shapes are of a run that neither log nor snapshot knows, or of "
                "another model; they are left out"
            )
        clicks = [1 + (interaction.edited_share or 0) * interaction.vertices for _, interaction in found]
        all_weights = weights_on([proposal for proposals in shown.values() for proposal in proposals])
        seconds_left = (events.working_time_s or 0) - sum(row.working_time_s or 0 for row in told)
        seconds = max(seconds_left, 0) / max(sum(clicks), 1)
        return [
            InteractionRow(
                id=self._id(job, frame, one),
                server=self.source.name,
                job=job.id,
                frame=frame.number,
                outcome=one.outcome,
                change=one.change,
                defect=one.defect,
                final_defect=one.final_defect,
                proposal=one.proposal.name if one.proposal else "",
                proposed=one.proposed,
                shape_keys=[shape.key for shape in one.shapes],
                iou=rounded(one.iou),
                edited_share=rounded(one.edited_share),
                saved=rounded(one.saved),
                vertices=one.vertices,
                working_time_s=None if events.working_time_s is None else round(seconds * own, 2),
                confidence=one.proposal.confidence if one.proposal else "",
                iterations=one.proposal.iterations if one.proposal else "",
                weights=one.proposal.weights if one.proposal else weights_on(shown[frame.number]) or all_weights,
                settings=one.proposal.settings if one.proposal else None,
            )
            for (frame, one), own in zip(found, clicks)
        ]

    def _id(self, job: Job, frame: Frame, one: Interaction) -> str:
        own = one.proposal.name if one.proposal else f"shape {one.shapes[0].key}"
        key = repr((self.source.name, job.id, frame.number, own))
        return hashlib.blake2s(key.encode(), digest_size=6).hexdigest()

    def _store(
        self,
        session: Session,
        job: Job,
        frames: Sequence[Frame],
        images: dict[int, str],
        events: JobEvents,
        rows: Sequence[InteractionRow],
    ) -> None:
        """Make the database say what CVAT says now; rows that are equal are not touched."""
        new: list = [
            JobRow(
                server=self.source.name,
                job=job.id,
                task=job.task_id,
                annotator=events.annotator or job.annotator,
                completed=job.updated,
                labels=list(job.labels),
                working_time_s=events.working_time_s,
            )
        ]
        new += [
            FrameRow(
                server=self.source.name,
                job=job.id,
                frame=frame.number,
                photo=frame.name,
                width=frame.width,
                height=frame.height,
                image=images.get(frame.number, ""),
                shapes=[stored_shape(shape) for shape in frame.shapes],
            )
            for frame in frames
        ]
        kept = {row.id for row in rows}, {frame.number for frame in frames}
        for table, keep, key in ((InteractionRow, kept[0], "id"), (FrameRow, kept[1], "frame")):
            old = select(table).where(table.server == self.source.name, table.job == job.id)
            for row in session.scalars(old).all():
                if getattr(row, key) not in keep:
                    session.delete(row)
            session.flush()  # interactions go before the frames that they point to
        for part in (new[:1], new[1:], rows):  # in the order of their foreign keys
            for row in part:
                session.merge(row)
            session.flush()


def remembered(events: JobEvents, known: JobRow | None) -> JobEvents:
    """The events, or what they said before where there are none now: the event log may be down, or emptied."""
    if known and events.working_time_s is None and not events.annotator:
        return replace(events, working_time_s=known.working_time_s, annotator=known.annotator)
    return events


def in_the_functions_words(
    meanings: dict[str, str], job: Job, frames: Sequence[Frame], snapshot: dict[str, list[dict]] | None
) -> tuple[Job, list[Frame], dict[str, list[dict]] | None]:
    """Job, frames and snapshot with the defects' names in place of the labels they were mapped to."""

    def meant(label: str) -> str:
        return meanings.get(label, label)

    job = replace(job, labels=tuple(sorted({meant(label) for label in job.labels})))
    frames = [
        replace(frame, shapes=tuple(replace(shape, label=meant(shape.label)) for shape in frame.shapes))
        for frame in frames
    ]
    if snapshot is not None:
        snapshot = {n: [{**own, "label": meant(own["label"])} for own in shapes] for n, shapes in snapshot.items()}
    return job, frames, snapshot


def snapshot_shape(shape: Shape, frame: Frame) -> dict:
    """A shape as snapshots keep it: with its attributes and the size of the photo, which may change."""
    own = stored_shape(shape)
    del own["source"]
    return own | {"attributes": dict(sorted(shape.attributes.items())), "width": frame.width, "height": frame.height}


def stored_shape(shape: Shape) -> dict:
    """A shape as frames keep it."""
    return {
        "key": shape.key,
        "label": shape.label,
        "type": shape.kind,
        "points": list(shape.points),
        "rotation": shape.rotation,
        "source": shape.source,
    }


def weights_on(proposals: Sequence[Proposal]) -> str:
    """The version of the weights most of the proposals are from, "" if that is unknown: misses are laid to it."""
    versions = Counter(proposal.weights for proposal in proposals if proposal.weights)
    return versions.most_common(1)[0][0] if versions else ""


def rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def job_ids(text: str) -> list[int] | None:
    """"7,8" -> [7, 8], "all" -> None."""
    try:
        return None if text == "all" else numbers(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither job ids (7,8) nor all") from None


def numbers(text: str) -> list[int]:
    """"7,8" -> [7, 8]."""
    return [int(number) for number in text.split(",") if number]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam harvest`."""
    parser = command_parser("harvest", __doc__)
    add_server_options(parser)
    parser.add_argument("--tasks", type=numbers, default=[], help="task ids: 7,8 (default: all the user may see)")
    parser.add_argument("--export", type=Path, help='instead of a server: an export as "CVAT for images 1.1"')
    parser.add_argument("--completed", type=job_ids, default=[], help="with --export: ids of its completed jobs, or all; exports do not say")
    parser.add_argument(
        "--log", type=Path, action="append", default=[], help="the function's ADVCAM_LOG_DIR; may be given several times"
    )
    add_label_option(parser)
    parser.add_argument("--snapshot", action="store_true", help="only keep the proposals of jobs not completed")
    add_store_option(parser)
    parser.add_argument("--csv", type=Path, help="also write all tables as CSV to this folder")
    args = parser.parse_args(argv)
    if args.export and args.completed == []:
        parser.error("an export does not say which jobs are completed: give --completed 7,8 or --completed all")
    if args.export and args.snapshot:
        parser.error("--snapshot needs the server: an export is a snapshot of nothing that can be told later")
    for folder in args.log:
        if not folder.is_dir():
            parser.error(f"--log {folder} is no folder; give what the function has as ADVCAM_LOG_DIR")
    try:
        source = CvatExport(args.export, args.completed) if args.export else server_of(args, args.tasks)
    except RequestError as error:
        parser.error(f"{error}; or give --export")
    except CvatError as error:
        sys.exit(str(error))
    harvested = 1  # snapshots are no harvest
    try:
        engine = open_store(args.db)
        place = without_secrets(engine.url)
        log = LoggedProposals(record for folder in args.log for record in read_proposal_log(folder))
        harvest = Harvest(source, engine, log, args.label_names)
        harvest.notes += source.notes if args.export else []
        if args.snapshot:
            snapshots, proposals = harvest.snapshot()
            print(f"{snapshots} new snapshots with {proposals} proposals in {place}")
        else:
            outcomes, harvested, jobs = harvest.run()
            counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in OUTCOMES)
            print(f"{counts}, from {harvested} of {jobs} jobs, in {place}")
        if args.csv:
            export_csv(engine, args.csv)
            print(f"tables: {args.csv.resolve()}")
    except (CvatError, StoreError) as error:
        sys.exit(str(error))
    for note in harvest.notes:
        print(note, file=sys.stderr)
    if harvest.failed:
        sys.exit(1)
    if not harvested:
        print("nothing was harvested; the lines above say why, job by job", file=sys.stderr)
        sys.exit(NOTHING_HARVESTED)
