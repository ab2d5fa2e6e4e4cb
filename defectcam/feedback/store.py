"""The database of interactions: four tables, in SQLite or any other database that SQLAlchemy knows.

`docs/feedback.md` describes them for whoever reads them with other tools. Times are ISO 8601 text; shapes, settings
and lists are JSON. Nothing depends on when a row was written, so harvesting the same thing twice changes nothing.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from sqlalchemy import JSON, Engine, ForeignKeyConstraint, Text, create_engine, inspect, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ACCEPTED, MODIFIED, REJECTED, MISS = "accepted", "modified", "rejected", "miss"


class Table(DeclarativeBase):
    """Base of the tables; text of any length."""

    type_annotation_map = {str: Text, dict: JSON(none_as_null=True), list: JSON}


class JobRow(Table):
    """A job that a person has completed.

    Attributes:
        server, job: CVAT's address and the job's id there.
        task: its task's id; 0 in exports of a single job.
        annotator: user name, "" if unknown.
        completed: when CVAT changed it last.
        labels: names of the labels that shapes of the job may have.
        working_time_s: from CVAT's events, null where it has none.
    """

    __tablename__ = "jobs"
    server: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[int]
    annotator: Mapped[str]
    completed: Mapped[str]
    labels: Mapped[list]
    working_time_s: Mapped[float | None]


class FrameRow(Table):
    """A photo of a completed job with all outlines its annotator left on it: what is not outlined has no defect.

    Attributes:
        frame: number within the task.
        photo: its name in CVAT.
        width, height: px.
        image: hash of the decoded pixels (`proposal_log.image_hash`), "" if they could not be had.
        shapes: [{"key", "label", "type", "points", "rotation", "source"}], as CVAT stores them.
    """

    __tablename__ = "frames"
    server: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(primary_key=True)
    frame: Mapped[int] = mapped_column(primary_key=True)
    photo: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    image: Mapped[str]
    shapes: Mapped[list]
    __table_args__ = (ForeignKeyConstraint(["server", "job"], ["jobs.server", "jobs.job"]),)


class InteractionRow(Table):
    """What an annotator did with one proposal, or one shape the annotator had to draw (paper 3.2).

    Attributes:
        id: 12 hex digits, the same whenever the same interaction is harvested.
        outcome: accepted, modified, rejected or miss.
        change: how it was modified or drawn: edited, relabelled, sliced, joined (several: with commas);
            copied, propagated or drawn for a miss; "" otherwise.
        defect: the label proposed; of a miss the label drawn.
        final_defect: the label in the end; null if rejected.
        proposal: its name; "" for a miss, or where CVAT had not kept it.
        proposed: {"type", "points"} of the proposal in px of the frame; null for a miss, or if that is unknown.
        shape_keys: keys of the frame's shapes it became; of proposals joined into one shape the first has the keys.
        iou: of proposal and final shape, 0..1; of joined and sliced ones of their unions.
        edited_share: of the contour, 0..1, see `regions.edited_share`; 1 for rejected ones and misses.
        saved: share of clicks saved (0..1), see `regions.saved_share`; null if rejected.
        vertices: of the final outline, simplified at 2 px; 0 without one.
        working_time_s: share of the job's working time by clicks: one to look, and those edited or drawn.
        confidence, iterations: the proposal's attributes as CVAT shows them, "" if unknown.
        weights: version, "" if unknown. settings: in force for the defect, null if unknown.
    """

    __tablename__ = "interactions"
    id: Mapped[str] = mapped_column(primary_key=True)
    server: Mapped[str]
    job: Mapped[int]
    frame: Mapped[int]
    outcome: Mapped[str]
    change: Mapped[str]
    defect: Mapped[str]
    final_defect: Mapped[str | None]
    proposal: Mapped[str]
    proposed: Mapped[dict | None]
    shape_keys: Mapped[list]
    iou: Mapped[float | None]
    edited_share: Mapped[float | None]
    saved: Mapped[float | None]
    vertices: Mapped[int]
    working_time_s: Mapped[float | None]
    confidence: Mapped[str]
    iterations: Mapped[str]
    weights: Mapped[str]
    settings: Mapped[dict | None]
    __table_args__ = (
        ForeignKeyConstraint(["server", "job", "frame"], ["frames.server", "frames.job", "frames.frame"]),
    )


class SnapshotRow(Table):
    """The automatic shapes of a job that nobody had edited yet; the newest of a job counts, the others stay.

    Attributes:
        taken: when.
        frames: {frame number: [{"key", "label", "type", "points", "rotation", "attributes"}]}; frames without
            shapes are left out.
    """

    __tablename__ = "snapshots"
    server: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[int] = mapped_column(primary_key=True)
    taken: Mapped[str] = mapped_column(primary_key=True)
    frames: Mapped[dict]


class StoreError(RuntimeError):
    """The database cannot be used; the message says why."""


def open_store(place: str, make: bool = True) -> Engine:
    """A database, its tables made where they are missing.

    Args:
        place: path of an SQLite file, or a URL of SQLAlchemy's such as postgresql+psycopg://user@host/name.
        make: False for one that must exist already.

    Raises:
        StoreError: naming the place.
    """
    try:
        if "://" not in place:
            if not make and not Path(place).exists():
                raise StoreError(f"there is no database {place}; make one with defectcam harvest --db {place}")
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            place = f"sqlite:///{place}"
        engine = create_engine(place)
        if not make and not inspect(engine).has_table(JobRow.__tablename__):
            raise StoreError(f"{place} has no table {JobRow.__tablename__}: it was not made by defectcam harvest")
        Table.metadata.create_all(engine)
    except (ArgumentError, SQLAlchemyError, OSError, ImportError) as error:
        raise StoreError(f"cannot open the database {place}: {error}") from error
    return engine


def export_csv(engine: Engine, folder: Path) -> None:
    """Write every table to <folder>/<table>.csv, one row a line, ordered by its key; JSON columns as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with engine.connect() as connection:
        for table in Table.metadata.sorted_tables:
            with open(folder / f"{table.name}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(table.columns.keys())
                for row in connection.execute(select(table).order_by(*table.primary_key.columns)):
                    writer.writerow(json.dumps(v) if isinstance(v, (dict, list)) else v for v in row)
