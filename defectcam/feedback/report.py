"""What the proposals were worth: one HTML page for the person who pays (paper 3.2, 4.3).

Shares of accepted, modified and rejected proposals, time per shape, and time saved by Eq. 3 of the paper, per defect,
annotator and version of the weights, and over time (the week in which CVAT's job was completed). The plots are part
of the page, so it can be sent around as one file.

Example:
    defectcam report --db out/feedback/feedback.db --out out/report.html
"""

from __future__ import annotations

import io
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import markupsafe
import matplotlib
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from defectcam.command_line import command_parser
from defectcam.evaluation.measures import relative_time_saving
from defectcam.feedback.store import (
    ACCEPTED,
    MISS,
    MODIFIED,
    REJECTED,
    FrameRow,
    InteractionRow,
    JobRow,
    StoreError,
    add_store_option,
    open_store,
    without_secrets,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

# Names are anything people type: no formulas, and letters that the browser's fonts have, not those of the plots'.
pyplot.rcParams.update({"text.parse_math": False, "svg.fonttype": "none"})
NAME_LENGTH = 32  # in plots; tables have the whole name
COLOURS = {ACCEPTED: "#2a7f3f", MODIFIED: "#e0a100", REJECTED: "#b8312f"}


@dataclass(frozen=True)
class Event:
    """One interaction with what the report groups by: the final defect (of rejected ones the proposed one)."""

    outcome: str
    defect: str
    annotator: str
    weights: str
    week: str
    saved: float | None
    is_instance: bool
    seconds: float | None


@dataclass(frozen=True)
class Figures:
    """Figures of some interactions; None where there is nothing to tell them from.

    Attributes:
        proposals: their number; accepted, modified, rejected: shares of it, 0..1.
        missed: shapes that had to be drawn.
        seconds_per_shape: working time by shape left in the end, from CVAT's events.
        saved: Eq. 3 over the shapes that were proposed, as the paper counts, 0..1.
        saved_of_all: Eq. 3 over all shapes; missed ones save nothing.
        hours, hours_saved: worked; and the time that drawing everything would have taken beyond it, by saved_of_all.
    """

    proposals: int
    accepted: float | None
    modified: float | None
    rejected: float | None
    missed: int
    seconds_per_shape: float | None
    saved: float | None
    saved_of_all: float | None
    hours: float | None
    hours_saved: float | None


def read_events(engine: Engine) -> list[Event]:
    """All interactions of a database, oldest job first; of a task's jobs that overlap on a frame those of the last."""
    joined = select(InteractionRow, JobRow).join(
        JobRow, (JobRow.server == InteractionRow.server) & (JobRow.job == InteractionRow.job)
    )
    with Session(engine) as session:
        looked_at = select(FrameRow.server, JobRow.task, FrameRow.frame, JobRow.job).join(
            JobRow, (JobRow.server == FrameRow.server) & (JobRow.job == FrameRow.job)
        )
        last = {
            (server, task or f"job {job}", frame): job
            for server, task, frame, job in session.execute(looked_at.order_by(JobRow.completed, JobRow.job))
        }
        return [
            Event(
                outcome=row.outcome,
                defect=row.final_defect or row.defect,
                annotator=job.annotator or "unknown",
                weights=row.weights or "unknown",
                week=week_of(job.completed),
                saved=row.saved,
                is_instance=bool(row.shape_keys),
                seconds=row.working_time_s,
            )
            for row, job in session.execute(joined.order_by(JobRow.completed, InteractionRow.id))
            if last[row.server, job.task or f"job {job.job}", row.frame] == row.job
        ]


def week_of(time: str) -> str:
    """ISO week of a time, as in 2026-W47."""
    return f"{datetime.fromisoformat(time):%G-W%V}" if time else "unknown"


def figures(events: Sequence[Event]) -> Figures:
    """The figures of some interactions."""
    count = {outcome: sum(event.outcome == outcome for event in events) for outcome in (*COLOURS, MISS)}
    proposals = sum(count[outcome] for outcome in COLOURS)
    instances = [event for event in events if event.is_instance]
    saved = [e.saved for e in instances if e.saved is not None and e.outcome != MISS]
    saved_of_all = [e.saved for e in instances if e.saved is not None]
    timed = [event for event in events if event.seconds is not None]
    seconds = sum(event.seconds for event in timed)
    timed_shapes = sum(event.is_instance for event in timed)
    share_of_all = relative_time_saving(saved_of_all) if saved_of_all else None
    return Figures(
        proposals=proposals,
        **{outcome: count[outcome] / proposals if proposals else None for outcome in COLOURS},
        missed=count[MISS],
        seconds_per_shape=seconds / timed_shapes if timed_shapes else None,
        saved=relative_time_saving(saved) if saved else None,
        saved_of_all=share_of_all,
        hours=seconds / 3600 if timed else None,
        hours_saved=seconds / 3600 * share_of_all / (1 - share_of_all) if timed and share_of_all is not None else None,
    )


def grouped(events: Sequence[Event], key: Callable[[Event], str]) -> dict[str, Figures]:
    """Figures of the interactions by `key`, in the order of the keys."""
    groups = defaultdict(list)
    for event in events:
        groups[key(event)].append(event)
    return {name: figures(groups[name]) for name in sorted(groups)}


def short(name: str) -> str:
    """A name as plots show it: on one line, and no longer than they have room for."""
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def shares_plot(groups: dict[str, Figures], title: str) -> str:
    """Stacked bars of accepted, modified and rejected, as SVG."""
    figure, axis = pyplot.subplots(figsize=(1.6 + 1.1 * len(groups), 3.2), layout="constrained")
    bottoms = [0.0] * len(groups)
    for outcome, colour in COLOURS.items():
        shares = [100 * (getattr(of, outcome) or 0) for of in groups.values()]
        axis.bar(range(len(groups)), shares, bottom=bottoms, label=outcome, color=colour, width=0.6)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares)]
    axis.set(title=title, ylabel="% of proposals", ylim=(0, 100))
    axis.set_xticks(range(len(groups)), [short(name) for name in groups], rotation=30)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def course_plot(
    events: Sequence[Event],
    key: Callable[[Event], str],
    value: Callable[[Figures], float | None],
    title: str,
    unit: str,
) -> str:
    """One line per group over the weeks, as SVG."""
    weeks = sorted({event.week for event in events})
    figure, axis = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    names = []
    for name in sorted({key(event) for event in events}):
        own = grouped([event for event in events if key(event) == name], lambda event: event.week)
        points = [(weeks.index(week), value(of)) for week, of in own.items() if value(of) is not None]
        if points:
            axis.plot(*zip(*points), marker="o")
            names.append(short(name))
    axis.set(title=title, ylabel=unit)
    axis.set_xticks(range(len(weeks)), weeks, rotation=30)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if names:  # given here, since a line's own label does not show if it begins with "_"
        axis.legend(axis.lines, names, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def svg_of(figure) -> str:
    """A figure as markup to be put into a page; closes it."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has it
        figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :])


PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What the proposals were worth</title>
<style>
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .5em 0 2em; } th, td { padding: .25em .8em; text-align: right; }
th { border-bottom: 2px solid #888; font-weight: 600; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; }
.lead { font-size: 1.25em; } .note { color: #666; font-size: .9em; }
</style>
{% macro percent(share) %}{% if share is none %}&ndash;{% else %}{{ "%.0f"|format(100 * share) }} %{% endif %}{% endmacro %}
{% macro number(value, digits) %}{% if value is none %}&ndash;{% else %}{{ ("%." ~ digits ~ "f")|format(value) }}{% endif %}{% endmacro %}
<h1>What the proposals were worth</h1>
<p class="lead">{{ total.proposals }} proposals: {{ percent(total.accepted) }} accepted, {{ percent(total.modified) }} modified,
{{ percent(total.rejected) }} rejected. {{ total.missed }} shapes were missed and drawn by hand.
Time saved (Eq. 3): <b>{{ percent(total.saved) }}</b> on what was proposed, <b>{{ percent(total.saved_of_all) }}</b> with the missed shapes.</p>
{% for title, groups in tables %}
<h2>By {{ title }}</h2>
<table><tr><th>{{ title }}</th><th>proposals</th><th>accepted</th><th>modified</th><th>rejected</th><th>missed</th>
<th>s per shape</th><th>saved, proposed</th><th>saved, all</th><th>hours worked</th><th>hours saved</th></tr>
{% for name, of in groups.items() %}<tr><td>{{ name }}</td><td>{{ of.proposals }}</td><td>{{ percent(of.accepted) }}</td>
<td>{{ percent(of.modified) }}</td><td>{{ percent(of.rejected) }}</td><td>{{ of.missed }}</td><td>{{ number(of.seconds_per_shape, 1) }}</td>
<td>{{ percent(of.saved) }}</td><td>{{ percent(of.saved_of_all) }}</td><td>{{ number(of.hours, 2) }}</td><td>{{ number(of.hours_saved, 2) }}</td></tr>
{% endfor %}</table>
{% endfor %}
<h2>Plots</h2>
{% for plot in plots %}{{ plot }}
{% endfor %}
<h2>How to read this</h2>
<ul class="note">
<li>Accepted: nothing was changed. Modified: outline or label were. Rejected: deleted. Missed: drawn without a proposal.</li>
<li>Saved, by Eq. 3: a shape of which the proposal saved at least 95, 75 or 50 % of the clicks counts 0.95, 0.75 or 0.5, any
other nothing; the mean over shapes. A lower bound, as in the paper; the paper leaves missed shapes out.</li>
<li>Time is CVAT's working time of a job, shared out among its shapes by the clicks they needed; a dash where CVAT keeps no
events. Hours saved: what drawing everything by hand would have taken beyond the hours worked, if Eq. 3 holds.</li>
<li>Relabelled shapes count as modified, under their new label. Misses count under the weights that ran on their photo.</li>
</ul></html>
""",
    autoescape=True,
)
GROUPINGS: dict[str, Callable[[Event], str]] = {
    "defect": lambda event: event.defect,
    "annotator": lambda event: event.annotator,
    "weights": lambda event: event.weights,
    "week": lambda event: event.week,
}


def page(events: Sequence[Event]) -> str:
    """The report as HTML."""
    tables = {title: grouped(events, key) for title, key in GROUPINGS.items()}
    plots = [shares_plot(groups, f"By {title}") for title, groups in tables.items()]
    for title in ("defect", "annotator", "weights"):
        key = GROUPINGS[title]
        plots.append(course_plot(events, key, lambda of: of.saved_of_all and 100 * of.saved_of_all,
                                 f"Time saved by {title}, Eq. 3 with missed shapes", "%"))  # fmt: skip
        plots.append(course_plot(events, key, lambda of: of.seconds_per_shape, f"Time per shape by {title}", "s"))
    return PAGE.render(total=figures(events), tables=list(tables.items()), plots=plots)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam report`."""
    parser = command_parser("report", __doc__)
    add_store_option(parser)
    parser.add_argument("--out", type=Path, default=Path("out/report.html"), help="the page (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        engine = open_store(args.db, make=False)
        events = read_events(engine)
    except StoreError as error:
        sys.exit(str(error))
    if not events:
        sys.exit(f"{without_secrets(engine.url)} has no interactions yet: run defectcam harvest once jobs are completed")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(events), encoding="utf-8")
    print(f"report: {args.out.resolve()}")
