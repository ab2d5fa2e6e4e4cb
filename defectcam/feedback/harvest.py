"""Learn from CVAT what annotators did with the proposals, and keep it in a database (paper 3.2).

Reads the jobs that a person has completed, from a CVAT server or from an export ("CVAT for images 1.1"), and compares
their shapes with what was proposed: accepted, modified, rejected, or missed by the function. What was proposed is
known from the function's proposal log (ADVCAM_LOG_DIR there, --log here). Without a log, take a --snapshot right after
each automatic annotation, before anybody edits.

Jobs that are not completed are named and left alone, and so is the database where nothing has changed.
docs/feedback.md describes the tables.

Of each job it prints how many proposals were kept, edited and rejected, and how many shapes were missed; the minutes, where
CVAT keeps events; and, where there are enough proposals to tell, the `threshold` that would have cost the annotator least.

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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from tqdm import tqdm

from defectcam.command_line import command_parser
from defectcam.cvat.client import CvatError, add_server_options
from defectcam.feedback.costs import harvest_summary
from defectcam.feedback.cvat import UNTOUCHED, CvatExport, Frame, Job, JobEvents, LeftOut, Shape, proposal_name, server_of
from defectcam.feedback.match import Interaction, Proposal, match
from defectcam.feedback.shown import LoggedProposals, shown_proposals, with_model_labels
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
from defectcam.image import ImageError, decode_image, pixel_limit
from defectcam.proposal_log import image_hash, read_proposal_log
from defectcam.request import RequestError
from defectcam.training.labels import add_label_option
from defectcam.training.names import LabelNames, check_label_names

NOTHING_HARVESTED = 3
OUTCOMES = (ACCEPTED, MODIFIED, REJECTED, MISS)
T = TypeVar("T")


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

    def run(self) -> tuple[Counter, list[int], int]:
        """Harvest all completed jobs; the others become notes.

        Returns:
            Number of interactions per outcome; the ids of the jobs that were harvested; and the number of all jobs.

        Raises:
            CvatError: there are no jobs; nothing can be read; or a name of `label_names` is none of theirs.
        """
        outcomes, harvested, jobs = Counter(), [], self._jobs()
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
            of_job = self._skip_unreadable(self._job, job)
            if of_job is not None:
                outcomes += of_job
                harvested.append(job.id)
        return outcomes, harvested, len(jobs)

    def snapshot(self) -> tuple[int, int]:
        """Keep the proposals of all jobs that are not completed; returns the number of new snapshots, and of proposals."""
        jobs = self._jobs()
        waiting = [job for job in jobs if job.state != "completed"]
        if not waiting:
            self.notes.append(f"all {len(jobs)} jobs are completed: take a snapshot before the first edit")
        found = [self._skip_unreadable(self._job_snapshot, job) for job in waiting]
        taken = [proposals for proposals in found if proposals is not None]
        return len(taken), sum(taken)

    def _jobs(self) -> list[Job]:
        jobs = list(self.source.jobs())
        if not jobs:
            raise CvatError(f"{self.source.name} shows this user no annotation jobs: check --tasks, and whose token it is")
        return jobs

    def _skip_unreadable(self, work: Callable[[Job], T], job: Job) -> T | None:
        """What some work on a job returns. A job that cannot be read becomes a note and does not stop the others: None."""
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
            job, frames, snapshot, notes = with_model_labels(
                job, frames, snapshot, self.log, self.label_names, self.log.defects
            )
            self.notes += notes
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
            told = self._stored_interactions(session, job, unknown)
            unknown -= {row.frame for row in told}
            if unknown:
                self.notes.append(
                    f"job {job.id}: no answer to {len(unknown)} of {len(frames)} photos is known; what was drawn there "
                    "counts as missed, and what was rejected there cannot be told"
                )
            rows = told + self._interactions(job, frames, shown, events, told)
            self._store(session, job, frames, images, events, rows)
            return Counter(row.outcome for row in rows)

    def _stored_interactions(self, session: Session, job: Job, frames: set[int]) -> list[InteractionRow]:
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
                    images[frame.number] = image_hash(decode_image(photo, pixel_limit()))
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
    is_done = True  # for snapshots
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
            is_done = bool(harvested)
            print(*harvest_summary(engine, source.name, harvested), sep="\n", end="\n" * is_done)
            counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in OUTCOMES)
            print(f"{counts}, from {len(harvested)} of {jobs} jobs, in {place}")
        if args.csv:
            export_csv(engine, args.csv)
            print(f"tables: {args.csv.resolve()}")
    except (CvatError, StoreError) as error:
        sys.exit(str(error))
    for note in harvest.notes:
        print(note, file=sys.stderr)
    if harvest.failed:
        sys.exit(1)
    if not is_done:
        print("nothing was harvested; the lines above say why, job by job", file=sys.stderr)
        sys.exit(NOTHING_HARVESTED)
