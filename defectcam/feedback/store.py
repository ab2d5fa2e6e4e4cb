"""The database of interactions: four tables, in SQLite or any other database that SQLAlchemy knows.

`docs/database.md` describes them for other tools. Times are ISO 8601 text; shapes, settings and lists are JSON. No row says when
it was written, so harvesting the same thing twice changes nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
from pathlib import Path

from sqlalchemy import JSON, URL, Engine, ForeignKeyConstraint, Text, create_engine, inspect, make_url, select
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from defectcam.settings import DATABASE, read_variable

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
    frames: Mapped[list[FrameRow]] = relationship(order_by="FrameRow.frame", cascade="all, delete-orphan")


class FrameRow(Table):
    """A photo of a completed job with all outlines that its annotator left on it. Pixels without an outline have no defect.

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
    interactions: Mapped[list[InteractionRow]] = relationship(
        order_by="InteractionRow.id", cascade="all, delete-orphan", lazy="selectin"
    )
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
        proposal: its name; "" for a miss.
        proposed: {"type", "points"} of the proposal in px of the frame; null for a miss, or if that is unknown.
        shape_keys: keys of the frame's shapes that it became; of joined proposals the largest has the keys.
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
    """The unchanged proposals of a job that is not completed; the newest snapshot of a job counts, the others stay.

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


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """`--db`, which takes no password, since others see what is on the command line; `open_store` takes its value."""

    class DatabaseAction(argparse.Action):
        def __call__(self, parser, namespace, place: str, *_) -> None:
            try:
                url = database_url(place)
            except StoreError as error:
                parser.error(str(error))
            if url.password is not None or url.query:  # options such as ?password= may hold one as well
                parser.error(
                    "others can see what is on the command line: give a database's address that has a password, or "
                    "options behind a ?, as ADVCAM_DB, not by --db"
                )
            namespace.db = place

    parser.add_argument(
        "--db", action=DatabaseAction, default=read_variable(os.environ, "ADVCAM_DB") or DATABASE,
        help=f"SQLite file, or SQLAlchemy URL without a password (default: $ADVCAM_DB, else {DATABASE}); a URL with a "
        "password is taken from $ADVCAM_DB alone",
    )  # fmt: skip


def database_url(place: str) -> URL:
    """The address of a database: a URL, or the path of an SQLite file.

    Raises:
        StoreError: it cannot be read. The message does not show it, since it cannot be told where a password ends.
    """
    if "://" not in place and not re.search(r":.*@|password=", place):
        return URL.create("sqlite", database=place)
    try:
        if place.count("@") > 1:  # SQLAlchemy would take the rest of the password for the host
            raise ValueError
        return make_url(place)
    except (ArgumentError, ValueError):
        raise StoreError(
            "the database's address cannot be read; it must be like postgresql+psycopg://user:password@host/name, with "
            "%40 for an @ in the password, %2F for a / and %3A for a :"
        ) from None


def without_secrets(url: URL) -> str:
    """A database's address for messages, without its secrets."""
    return url.database if url.drivername == "sqlite" else url.set(query={}).render_as_string(hide_password=True)


def open_store(place: str, make: bool = True) -> Engine:
    """A database, its tables made where they are missing.

    Args:
        place: path of an SQLite file, or a URL of SQLAlchemy's such as postgresql+psycopg://user@host/name.
        make: False for one that must exist already.

    Raises:
        StoreError: naming the place, but for its password.
    """
    url = database_url(place)
    name = without_secrets(url)
    try:
        if url.drivername == "sqlite" and url.database and not url.query:
            if not make and not Path(url.database).exists():
                raise StoreError(f"there is no database {name}; make one with defectcam harvest --db {name}")
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url)
        if not make and not inspect(engine).has_table(JobRow.__tablename__):
            raise StoreError(f"{name} has no table {JobRow.__tablename__}: it was not made by defectcam harvest")
        Table.metadata.create_all(engine)
    except StoreError:
        raise
    except Exception as error:  # of any kind, by the driver
        reason = str(error)
        for secret in filter(None, [url.password, *url.normalized_query.values()]):  # options may hold one as well
            for text in [secret] if isinstance(secret, str) else secret:
                reason = reason.replace(text, "...")
        raise StoreError(f"cannot open the database {name}: {reason}") from None
    return engine


def export_csv(engine: Engine, folder: Path) -> None:
    """Write every table to <folder>/<table>.csv, one row a line, ordered by its key; JSON columns as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with engine.connect() as connection:
        for table in Table.metadata.sorted_tables:
            with open(folder / f"{table.name}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(table.columns.keys())
                for row in connection.execute(select(table).order_by(*table.primary_key.columns)):
                    writer.writerow(json.dumps(v) if isinstance(v, (dict, list)) else v for v in row)
