"""What a harvest says at once: counts and minutes of each job, and the threshold that would have cost the annotator least.

The threshold is the least confidence of a proposal. Costs are clicks, counted as the simulated annotator behind Eq. 3 of the
paper counts them (`defectcam.evaluation.measures`). Drawing an outline costs its vertices, as simplified at 2 px.

| proposal | cost if it is shown | cost if the threshold hides it |
|---|---|---|
| accepted or modified | 1 to look, and vertices x (1 - share of clicks saved) | vertices: it has to be drawn |
| rejected | 1 to look and 1 to delete | 0 |

A missed shape costs its vertices at every threshold, so it does not count. Nothing is known of proposals that were not shown:
only thresholds from the one that ran upwards can be judged.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from defectcam.evaluation.measures import bootstrap_sums, interval_95
from defectcam.feedback.store import ACCEPTED, MISS, MODIFIED, REJECTED, InteractionRow, JobRow

LOOK_CLICKS, DELETE_CLICKS = 1, 1
LEAST_PROPOSALS, LEAST_PHOTOS = 20, 5  # fewer tell nothing of a threshold
OF_PRESETS = r"[A-Za-z0-9=.,+-]{1,17}"  # names of defects that a line of deploy.sh --presets can have, after "AdvCAM "


@dataclass(frozen=True)
class JudgedProposal:
    """A proposal that somebody judged.

    Attributes:
        photo: key of its photo.
        kept: whether it was accepted or modified.
        percent: its confidence as CVAT shows it, 0..100.
        shown_clicks, hidden_clicks: what it cost, and what it would have cost if it had not been shown.
    """

    photo: tuple
    kept: bool
    percent: int
    shown_clicks: float
    hidden_clicks: float


@dataclass(frozen=True)
class ThresholdChoice:
    """The threshold that would have cost least.

    Attributes:
        threshold: 0..1; as CVAT shows confidences in percent, it lies half a percent below one of them.
        clicks, clicks_as_run: cost of all proposals with it, and with the threshold that ran.
        hidden_kept, hidden_rejected: how many of each kind it hides.
        is_clear: whether a threshold that is chosen on the other photos saves clicks on a photo, with 95 % confidence; False if
            the threshold that ran cost least.
    """

    threshold: float
    clicks: float
    clicks_as_run: float
    hidden_kept: int
    hidden_rejected: int
    is_clear: bool


def judged_of(row: InteractionRow) -> JudgedProposal | None:
    """A row as a proposal with its costs; None for a miss, and where confidence or cost is unknown."""
    is_piece = row.outcome == MODIFIED and not row.shape_keys  # of joined proposals the largest one has the whole shape
    if row.outcome == MISS or is_piece or not row.confidence.isdecimal():
        return None
    photo, percent = (row.server, row.job, row.frame), int(row.confidence)
    if row.outcome == REJECTED:
        return JudgedProposal(photo, False, percent, LOOK_CLICKS + DELETE_CLICKS, 0)
    if row.saved is None:
        return None
    return JudgedProposal(photo, True, percent, LOOK_CLICKS + row.vertices * (1 - row.saved), row.vertices)


def best_threshold(proposals: Sequence[JudgedProposal], as_run: float = 0.0) -> ThresholdChoice | None:
    """The threshold of least cost; None where there are too few proposals or photos to tell.

    Args:
        proposals: of one defect.
        as_run: the threshold that ran, the largest one where there were several, 0..1.
    """
    photos = {photo: number for number, photo in enumerate(sorted({proposal.photo for proposal in proposals}))}
    if len(proposals) < LEAST_PROPOSALS or len(photos) < LEAST_PHOTOS:
        return None
    percents = {proposal.percent for proposal in proposals}
    least = np.array(sorted(percent for percent in percents if percent >= round(100 * as_run)) + [max(percents) + 1])
    costs = np.zeros((len(photos), len(least)))  # of every photo, for every least percent; the last one shows nothing
    for proposal in proposals:
        costs[photos[proposal.photo]] += np.where(proposal.percent >= least, proposal.shown_clicks, proposal.hidden_clicks)
    total = costs.sum(axis=0)
    best = int(total.argmin())
    # The threshold that is best on all photos always looks good on them. So each photo is judged by one chosen on the others.
    chosen = (total - costs).argmin(axis=1)
    gains = costs[:, 0] - costs[np.arange(len(photos)), chosen]
    lowest_gain = interval_95(bootstrap_sums(gains[:, None]).ravel())[0]
    hidden = Counter(proposal.kept for proposal in proposals if least[0] <= proposal.percent < least[best])
    threshold = min((least[best] - 0.5) / 100, 1.0)
    return ThresholdChoice(threshold, total[best], total[0], hidden[True], hidden[False], best > 0 and lowest_gain > 0)


def harvest_summary(engine: Engine, server: str, jobs: Collection[int]) -> list[str]:
    """Lines for the user: of each job what became of its proposals, then of each annotator and defect the threshold.

    Args:
        server, jobs: keys of jobs in the database.
    """
    lines = []
    groups: dict[tuple[str, str, str], list[tuple[InteractionRow, JobRow]]] = defaultdict(list)
    with Session(engine) as session:
        of_server = select(JobRow).where(JobRow.server == server, JobRow.job.in_(jobs))
        for job in session.scalars(of_server.order_by(JobRow.job)).all():
            of_job = select(InteractionRow).filter_by(server=server, job=job.job)
            rows = session.scalars(of_job.order_by(InteractionRow.id)).all()
            outcomes = Counter(row.outcome for row in rows)
            kept, edited, rejected, missed = (outcomes[outcome] for outcome in (ACCEPTED, MODIFIED, REJECTED, MISS))
            time = "" if job.working_time_s is None else f", {job.working_time_s / 60:.0f} minutes"
            who = f" ({job.annotator})" if job.annotator else ""
            lines.append(f"job {job.job}{who}: {kept} kept, {edited} edited, {rejected} rejected, {missed} missed{time}")
            for row in rows:
                if row.outcome != MISS:
                    groups[row.defect, job.annotator, row.weights].append((row, job))
        for (defect, annotator, weights), group in sorted(groups.items()):
            found, *to_paste = _threshold_lines(defect, group)
            where = ", ".join(filter(None, (defect, annotator, weights and f"weights {weights}")))
            lines += [f"{where}: {found}", *(f"  {line}" for line in to_paste)]
    return lines


def _threshold_lines(defect: str, group: Sequence[tuple[InteractionRow, JobRow]]) -> list[str]:
    """What is known of a threshold for these proposals, and where there is one, lines to paste."""
    proposals = [proposal for row, _ in group if (proposal := judged_of(row))]
    photos = len({proposal.photo for proposal in proposals})
    choice = best_threshold(proposals, max((row.settings or {}).get("threshold") or 0.0 for row, _ in group))
    if choice is None:
        return [
            f"{len(proposals)} proposals on {photos} photos are too few to choose a threshold ({LEAST_PROPOSALS} on "
            f"{LEAST_PHOTOS} are needed)"
        ]
    if not choice.is_clear:
        return [f"no other threshold is clearly better: {len(proposals)} proposals cost {choice.clicks_as_run:.0f} clicks"]
    lines = [
        f"threshold {choice.threshold:.3f} would have cost {choice.clicks:.0f} clicks in place of {choice.clicks_as_run:.0f}; it "
        f"hides {choice.hidden_rejected} rejected proposals and {choice.hidden_kept} that were kept"
    ]
    if re.fullmatch(OF_PRESETS, defect):
        lines.append(f"line for deploy.sh --presets: AdvCAM {defect} | defects={defect} threshold={choice.threshold:.3f}")
    tasks = sorted({job.task for _, job in group} - {0})
    if tasks:
        steps = Counter(row.iterations for row, _ in group).most_common(1)[0][0] or "2"
        lines.append(
            f"for jobs that are not completed: defectcam cvat annotate {tasks[-1]} --iterations {steps} --defects "
            f"{shlex.quote(defect)} --threshold {choice.threshold:.3f}"
        )
    return lines
