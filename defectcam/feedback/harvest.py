"""Learn from CVAT what annotators did with the proposals, and keep it in a database (paper 3.2).

Reads the jobs that a person has completed, from a CVAT server or from an export ("CVAT for images 1.1"), and compares their
shapes with the proposals: accepted, modified, rejected, or missed by the function. The proposals are known from the function's
log (ADVCAM_LOG_DIR there, --log here). Without a log, take a --snapshot right after each automatic annotation, before the first
edit.

Jobs that are not completed are named and left alone. docs/database.md describes the tables.

Of each job it prints how many proposals were kept, edited and rejected, how many shapes were missed, and the minutes, where CVAT
keeps events. Where there are enough proposals, it prints the `threshold` that would have cost the annotator least.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from tqdm import tqdm

from defectcam.command_line import command_parser, numbers
from defectcam.cvat.client import CvatError, add_server_options
from defectcam.feedback.costs import harvest_summary
from defectcam.feedback.cvat import server_of
from defectcam.feedback.cvat_export import CvatExport
from defectcam.feedback.jobs import UNTOUCHED, Frame, Job, JobEvents, LeftOut, Shape, proposal_name
from defectcam.feedback.match import NO_PROPOSAL, Interaction, Proposal, match
from defectcam.feedback.shown import LoggedProposals, add_log_option, shown_proposals, with_model_labels
from defectcam.feedback.store import ACCEPTED, MISS, MODIFIED, REJECTED, FrameRow, InteractionRow, JobRow, SnapshotRow
from defectcam.feedback.store import StoreError, add_store_option, export_csv, open_store, without_secrets
from defectcam.image import ImageError, decode_image, pixel_limit
from defectcam.proposal_log import image_hash
from defectcam.settings import RequestError
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

    def __init__(self, source, engine: Engine, log: LoggedProposals, label_names: Mapping[str, str]) -> None:
        self.source, self.engine, self.log, self.label_names = source, engine, log, label_names
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
            labels = {label for job in jobs for label in job.labels}
            check_label_names(self.label_names, labels, self.source.name, self.log.defects)
        except ValueError as error:
            raise CvatError(str(error)) from None
        for job in tqdm(jobs, desc="jobs", unit="job", disable=None):
            if job.state != "completed":
                reason, remedy = (
                    (f"not completed (state: {job.state})", "set its state to completed in CVAT once it is annotated")
                    if job.state
                    else ("not among --completed", "add it there if CVAT has it as completed")
                )
                self.notes.append(f"job {job.id} is {reason} and was left alone: {remedy}")
                continue
            job_outcomes = self._skip_unreadable(self._harvest_job, job)
            if job_outcomes is not None:
                outcomes += job_outcomes
                harvested.append(job.id)
        return outcomes, harvested, len(jobs)

    def snapshot(self) -> tuple[int, int]:
        """Keep the proposals of all jobs that are not completed; returns the numbers of new snapshots and of their proposals."""
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
        """What `work` returns for a job; None for a job that cannot be read, which becomes a note."""
        try:
            return work(job)
        except LeftOut as reason:
            self.notes.append(f"job {job.id} is left out: {reason}")
        except Exception as error:
            self.notes.append(f"job {job.id}: {error if isinstance(error, CvatError) else repr(error)}")
            self.failed = True
        return None

    def _job_snapshot(self, job: Job) -> int | None:
        """Take a snapshot; returns its number of proposals, or None where the last snapshot has them all."""
        if job.state != "new":
            self.notes.append(f"job {job.id} is {job.state}: proposals deleted in it already are not in the snapshot")
        shapes = [(frame, shape) for frame in self.source.frames(job) for shape in frame.shapes]
        untouched = [(frame, shape) for frame, shape in shapes if shape.source in UNTOUCHED]
        frames: dict[str, list[dict]] = {}
        for frame, shape in untouched:
            if shape.proposal:
                frames.setdefault(str(frame.number), []).append(snapshot_shape(shape, frame))
        nameless = sum(shape.source == "auto" and not shape.proposal for _, shape in untouched)
        if nameless:
            self.notes.append(
                f"job {job.id}: {nameless} automatic shapes are not kept, since their attribute `proposal` is empty or "
                "missing: they are another model's, or the task's labels are not those of the function"
            )
        with Session(self.engine) as session, session.begin():
            # Undoing a deletion and propagating give a shape another id, but leave it its name.
            last = self._last_snapshot(session, job)
            if last and proposal_names(frames) <= proposal_names(last.frames):
                return None  # people have only edited since: the earlier snapshot knows more
            taken = datetime.now(timezone.utc).isoformat()
            session.add(SnapshotRow(server=self.source.name, job=job.id, taken=taken, frames=frames))
        return sum(map(len, frames.values()))

    def _harvest_job(self, job: Job) -> Counter:
        """Bring the database up to date with a completed job; returns its number of interactions per outcome."""
        frames, events = self.source.frames(job), self.source.events(job)
        with Session(self.engine) as session, session.begin():
            stored = session.get(JobRow, (self.source.name, job.id))
            stored_frames = stored.frames if stored else []
            if stored and events.working_time_s is None and not events.annotator:  # the event log is down, or was emptied
                events = replace(events, working_time_s=stored.working_time_s, annotator=stored.annotator)
            images, last = self._images(job, frames, stored_frames), self._last_snapshot(session, job)
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
            shown, unknown = shown_proposals(frames, images, job, events, self.log, snapshot, last.taken if last else "")
            if len(unknown) == len(frames):
                raise LeftOut(
                    "no proposal of it is known; give the function's log (--log), or take a --snapshot right after the "
                    "automatic annotation"
                )
            # Logs may be deleted once they are harvested: then what was harvested stays.
            kept = {
                frame.frame: frame.interactions
                for frame in stored_frames
                if frame.frame in unknown and any(row.outcome != MISS for row in frame.interactions)
            }
            if unknown - kept.keys():
                self.notes.append(
                    f"job {job.id}: no answer to {len(unknown - kept.keys())} of {len(frames)} photos is known; what was drawn "
                    "there counts as missed, and what was rejected there cannot be told"
                )
            interactions = kept | self._interactions(job, frames, shown, events, kept)
            session.merge(self._job_row(job, frames, images, events, interactions))
            return Counter(row.outcome for rows in interactions.values() for row in rows)

    def _last_snapshot(self, session: Session, job: Job) -> SnapshotRow | None:
        rows = select(SnapshotRow).filter_by(server=self.source.name, job=job.id)
        return session.scalars(rows.order_by(SnapshotRow.taken.desc()).limit(1)).first()

    def _images(self, job: Job, frames: Sequence[Frame], stored_frames: Sequence[FrameRow]) -> dict[int, str]:
        """Frame number -> hash of the photo's pixels, where it can be had; photos seen before are not asked for again."""
        names = {frame.number: frame.name for frame in frames}  # frames may be deleted since, or be other photos
        images = {row.frame: row.image for row in stored_frames if row.image and names.get(row.frame) == row.photo}
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
        kept: dict[int, list[InteractionRow]],
    ) -> dict[int, list[InteractionRow]]:
        """The interactions of all frames but those whose interactions are kept, by frame number.

        Args:
            shown: frame number -> the proposals that its annotator saw.
            kept: frame number -> what was harvested before and stays.
        """
        kept_rows = [row for rows in kept.values() for row in rows]
        all_proposals = [proposal for proposals in shown.values() for proposal in proposals]
        names = {proposal.name for proposal in all_proposals} | {row.proposal for row in kept_rows} - {""}
        found: list[tuple[Frame, Interaction]] = []
        unknown_shapes: list[Shape] = []
        for frame in frames:
            if frame.number in kept:
                continue
            elsewhere = frozenset(names - {proposal.name for proposal in shown[frame.number]})
            interactions, unknown = match(shown[frame.number], frame.shapes, frame.width, frame.height, elsewhere)
            found += [(frame, interaction) for interaction in interactions]
            unknown_shapes += unknown
        if unknown_shapes:
            self.notes.append(
                f"job {job.id}: {len(unknown_shapes)} automatic shapes are of a run that neither log nor snapshot knows, or of "
                "another model; they are left out"
            )
        seconds_left = (events.working_time_s or 0) - sum(row.working_time_s or 0 for row in kept_rows)
        seconds_per_click = max(seconds_left, 0) / max(sum(interaction.clicks for _, interaction in found), 1)
        rows: dict[int, list[InteractionRow]] = defaultdict(list)
        for frame, interaction in found:
            seconds = None if events.working_time_s is None else round(seconds_per_click * interaction.clicks, 2)
            # A miss is laid to the weights that most of the photo's proposals are from.
            weights = weights_of(shown[frame.number]) or weights_of(all_proposals)
            rows[frame.number].append(self._interaction_row(job, frame, interaction, seconds, weights))
        return rows

    def _interaction_row(
        self, job: Job, frame: Frame, interaction: Interaction, working_time_s: float | None, weights_of_misses: str
    ) -> InteractionRow:
        """What the database keeps of an interaction."""
        proposal = interaction.proposal or NO_PROPOSAL
        what = proposal.name if interaction.proposal else f"shape {interaction.shapes[0].key}"
        key = repr((self.source.name, job.id, frame.number, what))
        return InteractionRow(
            id=hashlib.blake2s(key.encode(), digest_size=6).hexdigest(),
            server=self.source.name,
            job=job.id,
            frame=frame.number,
            outcome=interaction.outcome,
            change=interaction.change,
            defect=interaction.defect,
            final_defect=interaction.final_defect,
            proposal=proposal.name,
            proposed=interaction.proposed,
            shape_keys=[shape.key for shape in interaction.shapes],
            iou=rounded(interaction.iou),
            edited_share=rounded(interaction.edited_share),
            saved=rounded(interaction.saved),
            vertices=interaction.vertices,
            working_time_s=working_time_s,
            confidence=proposal.confidence,
            iterations=proposal.iterations,
            weights=proposal.weights if interaction.proposal else weights_of_misses,
            settings=proposal.settings,
        )

    def _job_row(
        self,
        job: Job,
        frames: Sequence[Frame],
        images: dict[int, str],
        events: JobEvents,
        interactions: dict[int, list[InteractionRow]],
    ) -> JobRow:
        """What the database keeps of a job, its frames and interactions included."""
        return JobRow(
            server=self.source.name,
            job=job.id,
            task=job.task_id,
            annotator=events.annotator or job.annotator,
            completed=job.updated,
            labels=list(job.labels),
            working_time_s=events.working_time_s,
            frames=[
                FrameRow(
                    server=self.source.name,
                    job=job.id,
                    frame=frame.number,
                    photo=frame.name,
                    width=frame.width,
                    height=frame.height,
                    image=images.get(frame.number, ""),
                    shapes=[stored_shape(shape) for shape in frame.shapes],
                    interactions=interactions.get(frame.number, []),
                )
                for frame in frames
            ],
        )


def proposal_names(frames: dict[str, list[dict]]) -> set[str]:
    """Names of the proposals of a snapshot, see `SnapshotRow.frames`."""
    return {proposal_name(shape["attributes"]) for shapes in frames.values() for shape in shapes}


def snapshot_shape(shape: Shape, frame: Frame) -> dict:
    """A shape as snapshots keep it: with its attributes and the size of the photo, which may change."""
    stored = stored_shape(shape)
    del stored["source"]
    return stored | {"attributes": dict(sorted(shape.attributes.items())), "width": frame.width, "height": frame.height}


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


def weights_of(proposals: Sequence[Proposal]) -> str:
    """The version of the weights that most of the proposals are from, "" if that is unknown."""
    versions = Counter(proposal.weights for proposal in proposals if proposal.weights)
    return versions.most_common(1)[0][0] if versions else ""


def rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def job_ids(text: str) -> list[int] | None:
    """"7,8" -> [7, 8], "all" -> None."""
    try:
        return None if text == "all" else numbers(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither job ids (7,8) nor all") from None


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam harvest`."""
    parser = command_parser("harvest", __doc__)
    add_server_options(parser)
    parser.add_argument("--tasks", type=numbers, default=[], help="task ids: 7,8 (default: all the user may see)")
    parser.add_argument("--export", type=Path, help='instead of a server: an export as "CVAT for images 1.1"')
    parser.add_argument(
        "--completed", type=job_ids, default=[], help="with --export: ids of its completed jobs, or all; exports do not say"
    )
    add_log_option(parser)
    add_label_option(parser)
    parser.add_argument("--snapshot", action="store_true", help="only keep the proposals of jobs not completed")
    add_store_option(parser)
    parser.add_argument("--csv", type=Path, help="also write all tables as CSV to this folder")
    args = parser.parse_args(argv)
    if args.export and args.completed == []:
        parser.error("an export does not say which jobs are completed: give --completed 7,8 or --completed all")
    if args.export and args.snapshot:
        parser.error("--snapshot needs the server: an export is a snapshot of nothing that can be told later")
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
        harvest = Harvest(source, engine, LoggedProposals.read(args.log), args.label_names)
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
