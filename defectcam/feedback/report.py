"""What the proposals were worth: one HTML page for the person who pays (paper 3.2, 4.3).

Shares of accepted, modified and rejected proposals, time per shape, and time saved by Eq. 3 of the paper, per defect,
annotator and version of the weights, and over time (the week in which CVAT's job was completed). The plots are part
of the page, so it can be sent around as one file.

Example:
    defectcam report --db out/feedback/feedback.db --out out/report.html
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from defectcam.command_line import command_parser
from defectcam.evaluation.measures import relative_time_saving
from defectcam.evaluation.pages import page, svg_of
from defectcam.feedback.store import ACCEPTED, MISS, MODIFIED, REJECTED, FrameRow, InteractionRow, JobRow
from defectcam.feedback.store import StoreError, add_store_option, open_store, without_secrets

NAME_LENGTH = 32  # in plots; tables have the whole name
COLOURS = {ACCEPTED: "#2a7f3f", MODIFIED: "#e0a100", REJECTED: "#b8312f"}
GROUPINGS = ("defect", "annotator", "weights", "week")


@dataclass(frozen=True)
class ReportedInteraction:
    """One interaction with what the report groups by: the final defect (of rejected ones the proposed one)."""

    outcome: str
    defect: str
    annotator: str
    weights: str
    week: str
    saved: float | None
    is_instance: bool
    seconds: float | None


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

    def __init__(self, interactions: Sequence[ReportedInteraction]) -> None:
        count = Counter(one.outcome for one in interactions)
        self.proposals, self.missed = sum(count[outcome] for outcome in COLOURS), count[MISS]
        shares = {outcome: _ratio(count[outcome], self.proposals) for outcome in COLOURS}
        self.accepted, self.modified, self.rejected = shares[ACCEPTED], shares[MODIFIED], shares[REJECTED]
        shapes = [one for one in interactions if one.is_instance and one.saved is not None]
        self.saved = _eq_3([one.saved for one in shapes if one.outcome != MISS])
        self.saved_of_all = _eq_3([one.saved for one in shapes])
        timed = [one for one in interactions if one.seconds is not None]
        seconds = sum(one.seconds for one in timed)
        self.seconds_per_shape = _ratio(seconds, sum(one.is_instance for one in timed))
        self.hours, self.hours_saved = (seconds / 3600 if timed else None), None
        if timed and self.saved_of_all is not None:
            self.hours_saved = self.hours * self.saved_of_all / (1 - self.saved_of_all)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _eq_3(shares: Sequence[float]) -> float | None:
    return relative_time_saving(shares) if shares else None


def read_interactions(engine: Engine) -> list[ReportedInteraction]:
    """All interactions of a database, oldest job first; of a task's jobs that overlap on a frame those of the last."""
    with Session(engine) as session:
        frames = session.execute(
            select(FrameRow.server, FrameRow.frame, JobRow.job, JobRow.task)
            .select_from(JobRow)
            .join(JobRow.frames)
            .order_by(JobRow.completed, JobRow.job)
        )
        last = {(server, task or f"job {job}", frame): job for server, frame, job, task in frames}
        rows = session.execute(
            select(InteractionRow, JobRow)
            .select_from(JobRow)
            .join(JobRow.frames)
            .join(FrameRow.interactions)
            .order_by(JobRow.completed, InteractionRow.id)
        )
        return [
            ReportedInteraction(
                outcome=row.outcome,
                defect=row.final_defect or row.defect,
                annotator=job.annotator or "unknown",
                weights=row.weights or "unknown",
                week=week_of(job.completed),
                saved=row.saved,
                is_instance=bool(row.shape_keys),
                seconds=row.working_time_s,
            )
            for row, job in rows
            if last[row.server, job.task or f"job {job.job}", row.frame] == row.job
        ]


def week_of(time: str) -> str:
    """ISO week of a time, as in 2026-W47."""
    return f"{datetime.fromisoformat(time):%G-W%V}" if time else "unknown"


def grouped(interactions: Sequence[ReportedInteraction], by: str) -> dict[str, Figures]:
    """Figures of the interactions by one of GROUPINGS, in the order of its values."""
    groups = defaultdict(list)
    for one in interactions:
        groups[getattr(one, by)].append(one)
    return {name: Figures(groups[name]) for name in sorted(groups)}


def short(name: str) -> str:
    """A name as plots show it: on one line, and no longer than they have room for."""
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def shares_plot(groups: dict[str, Figures], title: str) -> Markup:
    """Stacked bars of accepted, modified and rejected."""
    figure = Figure(figsize=(1.6 + 1.1 * len(groups), 3.2), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(groups)
    for outcome, colour in COLOURS.items():
        shares = [100 * (getattr(of_group, outcome) or 0) for of_group in groups.values()]
        axes.bar(range(len(groups)), shares, bottom=bottoms, label=outcome, color=colour, width=0.6)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares)]
    axes.set(title=title, ylabel="% of proposals", ylim=(0, 100))
    axes.set_xticks(range(len(groups)), [short(name) for name in groups], rotation=30)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


def weekly_plot(
    interactions: Sequence[ReportedInteraction], by: str, value: Callable[[Figures], float | None], title: str, unit: str
) -> Markup:
    """A figure over the weeks, one line per group."""
    weeks = sorted({one.week for one in interactions})
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = []
    for name in sorted({getattr(one, by) for one in interactions}):
        by_week = grouped([one for one in interactions if getattr(one, by) == name], "week")
        points = [(weeks.index(week), value(of_week)) for week, of_week in by_week.items() if value(of_week) is not None]
        if points:
            axes.plot(*zip(*points), marker="o")
            names.append(short(name))
    axes.set(title=title, ylabel=unit)
    axes.set_xticks(range(len(weeks)), weeks, rotation=30)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if names:  # given here, since a line's own label does not show if it begins with "_"
        axes.legend(axes.lines, names, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)


BODY = """
{% macro percent(share) %}{% if share is none %}&ndash;{% else %}{{ "%.0f"|format(100 * share) }} %{% endif %}{% endmacro %}
{% macro number(value, digits) %}{% if value is none %}&ndash;{% else %}{{ ("%." ~ digits ~ "f")|format(value) }}{% endif %}{% endmacro %}
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
<ul>
<li>Accepted: nothing was changed. Modified: outline or label were. Rejected: deleted. Missed: drawn without a proposal.</li>
<li>Saved, by Eq. 3: a shape of which the proposal saved at least 95, 75 or 50 % of the clicks counts 0.95, 0.75 or 0.5, any
other nothing; the mean over shapes. A lower bound, as in the paper; the paper leaves missed shapes out.</li>
<li>Time is CVAT's working time of a job, shared out among its shapes by the clicks they needed; a dash where CVAT keeps no
events. Hours saved: what drawing everything by hand would have taken beyond the hours worked, if Eq. 3 holds.</li>
<li>Relabelled shapes count as modified, under their new label. Misses count under the weights that ran on their photo.</li>
</ul>
"""


def report(interactions: Sequence[ReportedInteraction]) -> str:
    """The report as HTML."""
    tables = {by: grouped(interactions, by) for by in GROUPINGS}
    plots = [shares_plot(groups, f"By {by}") for by, groups in tables.items()]
    for by in ("defect", "annotator", "weights"):
        saved, seconds = f"Time saved by {by}, Eq. 3 with missed shapes", f"Time per shape by {by}"
        plots.append(weekly_plot(interactions, by, lambda of: of.saved_of_all and 100 * of.saved_of_all, saved, "%"))
        plots.append(weekly_plot(interactions, by, lambda of: of.seconds_per_shape, seconds, "s"))
    return page("What the proposals were worth", BODY, total=Figures(interactions), tables=tables.items(), plots=plots)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam report`."""
    parser = command_parser("report", __doc__)
    add_store_option(parser)
    parser.add_argument("--out", type=Path, default=Path("out/report.html"), help="the page (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        engine = open_store(args.db, make=False)
        interactions = read_interactions(engine)
    except StoreError as error:
        sys.exit(str(error))
    if not interactions:
        sys.exit(f"{without_secrets(engine.url)} has no interactions yet: run defectcam harvest once jobs are completed")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report(interactions), encoding="utf-8")
    print(f"report: {args.out.resolve()}")
