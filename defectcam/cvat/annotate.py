"""Annotate a task of CVAT again, say with another number of climbing steps T, and keep what people did.

The weights run in this process, over the frames of all jobs of the task that are not completed. Frame by frame the new
proposals are stored, and only then the old ones deleted. The rules:

- Only untouched proposals of this run's defects are replaced. A proposal is touched if a person moved or relabelled it, put it
  into a group, copied it to another photo, or gave it a value of an attribute of your own.
- All other shapes are kept, and nothing is proposed that overlaps one of the same label: by half of the smaller region.
- A completed job is left alone.
- A proposal that an annotator deleted is not proposed again. CVAT does not know of it, but the function's proposal log does:
  give that folder as --log-dir. This run is added to the log.

The same command goes on where a run ended: frames that have proposals of this run are not computed again. Annotators should
reload the job afterwards; what they save from a page opened before comes on top.

Labels of type mask get masks, all others polygons, unless ADVCAM_SHAPE names one shape for all. Every other setting is the
function's own: its variables count (below), only the time limit is off unless ADVCAM_TIME_LIMIT sets one.

Exit status: 0 if all photos were processed, 1 if not, 2 for a wrong command, 130 if interrupted.

Example:
    export ADVCAM_CVAT_URL=http://localhost:8080 ADVCAM_CVAT_TOKEN=...
    defectcam cvat annotate 7 --iterations 4
    defectcam cvat annotate 7 --iterations 4 --threshold 0.4 --defects crack --log-dir /data/proposals
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from defectcam import cvat_answers
from defectcam.bulk.exports import region_of_answer
from defectcam.command_line import command_parser
from defectcam.cvat.client import CvatError, add_server_options, client_of
from defectcam.cvat.set_iterations import steps_of
from defectcam.cvat.shapes import (
    OURS,
    PhotoNames,
    StoredShape,
    element_of,
    is_untouched,
    kind_of,
    overlaps,
    rejected_proposals,
    shape_for_cvat,
    stored_shapes,
)
from defectcam.cvat.target import task_id
from defectcam.cvat_labels import NOTICE, UNPROCESSED
from defectcam.cvat_runs import ATTRIBUTE, MASK
from defectcam.feedback.cvat import CvatServer
from defectcam.feedback.jobs import UNTOUCHED, Frame, Job, LeftOut, proposal_name
from defectcam.feedback.shown import LoggedProposals
from defectcam.handler import ModelHandler
from defectcam.image import ImageError, decode_image
from defectcam.proposal_log import ProposalLog, image_hash, read_proposal_log
from defectcam.request import Request
from defectcam.settings import ITERATIONS_MAX, NOT_OF_COMMANDS, RequestError, function_environ, variables_help
from defectcam.weights import WeightsError, add_weights_option

INTERRUPTED = 130  # what shells report for Ctrl-C
LABEL_TYPES = ("polygon", MASK, "any")
LOG = logging.getLogger("defectcam.cvat")


class SecondRun:
    """New proposals for a task.

    Args:
        server: CVAT, of which the task is read and changed.
        task: its id.
        model: with the settings of the run.
        log: what is known of earlier runs.
        proposal_log: where this run is written to.

    Attributes:
        counts: frames "annotated", "there" (had proposals of this run) and "failed"; shapes "new", "replaced", "kept",
            "left out" (overlapping kept ones), "rejected" (not proposed again).
        notes: what was left alone, and why.
    """

    def __init__(
        self, server: CvatServer, task: int, model: ModelHandler, log: LoggedProposals, proposal_log: ProposalLog | None
    ) -> None:
        self.server, self.task, self.model, self.log, self.proposal_log = server, task, model, log, proposal_log
        self.in_force: dict[str, dict] = {}  # settings of every defect, once the task's labels are known
        self.counts: Counter = Counter()
        self.notes: list[str] = []

    def run(self) -> None:
        """Annotate all jobs that are not completed.

        Raises:
            CvatError: CVAT cannot be read or changed, or the task's labels do not fit. What is stored by then stays.
        """
        jobs = list(self.server.jobs())
        if not jobs:
            raise CvatError(f"task {self.task} has no job that this user may see: check its id, --org and whose token it is")
        self.check_labels()
        work: list[tuple[Job, Frame]] = []
        for job in jobs:
            try:
                if job.state == "completed":
                    raise LeftOut("it is completed")
                work += [(job, photo) for photo in self.server.photos(job)]
            except LeftOut as reason:
                self.notes.append(f"job {job.id} is left alone: {reason}")
        before: dict[int, list[dict]] = {}
        for job, photo in tqdm(work, desc="photos", unit="photo", disable=None):
            try:
                if job.id not in before:
                    before = {job.id: self.server.shapes(job)}
                told = self._frame(job, photo, before[job.id])
            except LeftOut as reason:
                told = f"left alone: {reason}"
            except ImageError as error:
                self.counts["failed"] += 1
                told = f"not processed, its shapes are left as they are: {error}"
            tqdm.write(f"job {job.id}, frame {photo.number}, {photo.name}: {told}")

    def check_labels(self) -> None:
        """Learn the types of the task's labels; refuse one that cannot hold the proposals, before anything is done.

        Raises:
            CvatError: names label, attribute and remedy.
        """
        model, labels = self.model, {label.name: label for label in self.server.labels(self.task).values()}
        model.masks = frozenset(name for name, label in labels.items() if label.type == MASK)
        wanted = model.settings.defects or model.defects
        self.in_force = {defect: model.effective(defect, model.settings) for defect in wanted}
        for defect, effective in self.in_force.items():
            remedy = f"run defectcam cvat setup task:{self.task}"
            label = labels.get(defect)
            if label is None:
                raise CvatError(f"task {self.task} has no label {defect!r}: {remedy}, or leave it out of --defects")
            if label.type not in LABEL_TYPES:
                raise CvatError(f"label {defect!r} has the type {label.type}, which holds no polygons: {remedy}")
            attributes = {attribute.name: attribute for attribute in label.attributes}
            lacking = next((name for name in OURS if name not in attributes), None)
            if lacking:
                raise CvatError(f"label {defect!r} of task {self.task} has no attribute {lacking!r}: {remedy}")
            own, steps = attributes[ATTRIBUTE], str(effective["iterations"])
            if own.input_type == "select" and steps not in own.values:
                remedy = f"run defectcam cvat set-iterations task:{self.task} {steps}"
                raise CvatError(f"{ATTRIBUTE} of label {defect!r} of task {self.task} has no value {steps}: {remedy}")

    def _frame(self, job: Job, photo: Frame, before: Sequence[dict]) -> str:
        """Annotate one photo of a job; says what was done.

        Args:
            before: the job's shapes as CVAT sent them when the job was begun.
        """
        file = self.server.photo_bytes(job, photo)
        if file is None:
            raise ImageError("CVAT does not give the photo away")
        image_rgb = np.ascontiguousarray(decode_image(file, self.model.max_pixels))
        height, width = image_rgb.shape[:2]
        if (height, width) != (photo.height, photo.width):
            raise ImageError(f"it has {width} x {height} px, but {photo.width} x {photo.height} in CVAT")
        names, image = PhotoNames(self.model, image_rgb, self.in_force), image_hash(image_rgb)
        labels = self.server.labels(job.task_id)
        here = stored_shapes(of_frame(before, photo), labels, width, height)
        due = self._due(job, image, names, here)
        answer = []
        if due:
            answer = self.model.answer(Request(file, replace(self.model.settings, defects=due), ()))
            if reasons := texts_of(answer, UNPROCESSED):
                raise ImageError("; ".join(reasons))
        # People may have gone on meanwhile: what counts is what is there now.
        if self.server.client.json(f"/api/jobs/{job.id}", cvat_answers.Job).state == "completed":
            raise LeftOut("its job was completed meanwhile")
        now = self.server.shapes(job)
        if any(raw["label_id"] not in labels for raw in now):
            raise CvatError("a label was added meanwhile; run this again")
        here = stored_shapes(of_frame(now, photo), labels, width, height)
        named = self._named(job, before) | self._named(job, now)
        return self._replace(job, photo, image, names, here, named, due, answer)

    def _due(self, job: Job, image: str, names: PhotoNames, here: Sequence[StoredShape]) -> tuple[str, ...]:
        """The defects that a photo has no proposals of this run for, and of which it is not known that there are none."""
        last = self.log.second_runs.get((job.id, image), {})
        due = []
        for defect, effective in self.in_force.items():
            proposals = {one.shape.proposal for one in here if one.shape.label == defect and one.shape.source in UNTOUCHED}
            is_known = last.get("weights") == self.model.weights.version and last["settings"].get(defect) == effective
            if not (has_any(here, names.of_defect[defect]) or is_known and not proposals - {""}):
                due.append(defect)
        return tuple(due)

    def _replace(
        self,
        job: Job,
        photo: Frame,
        image: str,
        names: PhotoNames,
        here: Sequence[StoredShape],
        named: set[tuple[int, str]],
        due: Sequence[str],
        answer: Sequence[dict],
    ) -> str:
        """Store new proposals of a photo, then delete the old ones; says what was done.

        Args:
            image: hash of the photo's pixels.
            here: the photo's shapes.
            named: (frame, name) of all proposals of the job, those included that this run has replaced.
            due: the defects of the answer; another process may have stored some of them by now.
            answer: of the function.
        """
        there = {defect for defect, own in names.of_defect.items() if has_any(here, own)}
        kept, mine, old = self._sorted(photo, image, names, here, named, there | set(due))
        rejected = rejected_proposals(self.log, image, here, job.id, self._kinds(job, named), photo.width, photo.height)
        new, counts = [], Counter(replaced=len(old), kept=sum(one.shape.label in self.in_force for one, _ in kept))
        for element in (element for element in answer if element["type"] != "tag" and element["label"] not in there):
            label, region = element["label"], region_of_answer(element, photo.width, photo.height)
            of_label = [one.region for one, proposed_as in kept if label in (one.shape.label, proposed_as) and one.region]
            if any(overlaps(other, region) for other in of_label):
                counts["left out"] += 1
            elif any(label == own and overlaps(gone, region) for own, _, gone in rejected):
                counts["rejected"] += 1
            else:
                new.append(element)
        counts["new"] = len(new)
        self._change(job, "create", self._for_cvat(job, photo, new))
        # A line of the log before its proposals are in CVAT would look as if all of them had been rejected.
        unlogged = any(one.shape.proposal not in self.log.by_name for one in mine)
        if self.proposal_log and (due or old or unlogged):
            replaced = {one.shape.proposal for one in old} - {one.shape.proposal for one in mine}
            replaced -= {one.shape.proposal for one, _ in kept}
            second = {"job": job.id, "replaced": sorted(replaced), "rejected": sorted({name for _, name, _ in rejected})}
            elements, weights = [*new, *map(element_of, mine)], self.model.weights.version
            self.proposal_log.append(image, photo.width, photo.height, weights, self.in_force, elements, second)
        self._change(job, "delete", [one.raw for one in old])
        counts["annotated" if due else "there"] += 1
        self.counts += counts
        told = told_of(counts) if due else f"has proposals of this run; {told_of(counts)}"
        return "; ".join([told, *texts_of(answer, NOTICE)])

    def _sorted(
        self,
        photo: Frame,
        image: str,
        names: PhotoNames,
        here: Sequence[StoredShape],
        named: set[tuple[int, str]],
        defects: set[str],
    ) -> tuple[list[tuple[StoredShape, str | None]], list[StoredShape], list[StoredShape]]:
        """The shapes of a photo, sorted; arguments as of `_replace`.

        Args:
            defects: those whose old proposals may go.

        Returns:
            What stays as it is, with the defect that it was proposed as, where that is known; proposals of this run; and
            those to be deleted.
        """
        elsewhere = {name for frame, name in named if frame != photo.number}
        # Beside proposals whose settings are known, one of the same label and T with another name came from another photo.
        known = {(one.shape.label, one.shape.attributes[ATTRIBUTE]) for one in here if names.defect_of(one.shape)}
        kept, untouched = [], []
        for one in sorted(here, key=lambda one: one.raw["id"]):
            made_as = one.shape.label, one.shape.attributes.get(ATTRIBUTE)
            alone = one.shape.proposal not in elsewhere and made_as not in known
            is_ours = one.shape.label in defects
            if is_ours and is_untouched(one, names, self.log, image, photo.width, photo.height, alone):
                untouched.append(one)
            else:
                kept.append((one, names.defect_of(one.shape)))
        mine, old, stays = [], [], {one.shape.proposal for one, _ in kept}
        for one in untouched:
            if one.shape.proposal in names.of_run and one.shape.proposal not in stays:  # repetitions go
                mine.append(one)
                stays.add(one.shape.proposal)
            else:
                old.append(one)
        return kept, mine, old

    def _for_cvat(self, job: Job, photo: Frame, elements: Sequence[dict]) -> list[dict]:
        labels = {label.name: label for label in self.server.labels(job.task_id).values()}
        return [shape_for_cvat(one, labels[one["label"]], photo.number, photo.width, photo.height) for one in elements]

    def _change(self, job: Job, action: str, shapes: Sequence[dict]) -> None:
        """Create or delete shapes of a photo in one request, which CVAT does as a whole or not at all."""
        if shapes:
            body = {"version": 0, "tags": [], "shapes": list(shapes), "tracks": []}
            self.server.client.patch(f"/api/jobs/{job.id}/annotations?action={action}", body)

    def _kinds(self, job: Job, named: set[tuple[int, str]]) -> set[tuple]:
        """Kinds of the answers that reached this job. The log also has answers of failed runs, which CVAT threw away."""
        earlier = [own for (number, _), own in self.log.earlier.items() if number == job.id]
        names = {name for _, name in named}.union(*earlier)
        return {kind_of(record) for name in names for record in self.log.by_name.get(name, ())}

    def _named(self, job: Job, job_shapes: Sequence[dict]) -> set[tuple[int, str]]:
        """(frame, name) of all shapes of the job that have the name of a proposal."""
        specs = {
            spec.id: spec.name for label in self.server.labels(job.task_id).values() for spec in label.attributes
        }
        found = set()
        for raw in job_shapes:
            values = {specs[a["spec_id"]]: a["value"] for a in raw["attributes"] if a["spec_id"] in specs}
            if name := proposal_name(values):
                found.add((raw["frame"], name))
        return found


def of_frame(shapes: Sequence[dict], photo: Frame) -> list[dict]:
    """The shapes of one photo."""
    return [shape for shape in shapes if shape["frame"] == photo.number]


def has_any(shapes: Sequence[StoredShape], names: set[str]) -> bool:
    """Whether one of some shapes has one of some names of proposals."""
    return any(one.shape.proposal in names for one in shapes)


def texts_of(answer: Sequence[dict], label: str) -> list[str]:
    """What the tags of a label in the function's answer say."""
    return [element["attributes"][0]["value"] for element in answer if element["label"] == label]


def told_of(counts: Mapping[str, int]) -> str:
    """What happened to how many shapes, in words."""
    out, rejected = counts["left out"], counts["rejected"]
    why = f"{out} overlap kept shapes, {rejected} were rejected before"
    return f"{counts['new']} new, {counts['replaced']} replaced, {counts['kept']} kept, {out + rejected} left out ({why})"


def model_of(args: argparse.Namespace) -> ModelHandler:
    """The handler with the settings of the command line, else of the ADVCAM_* variables.

    Raises:
        RequestError, WeightsError: as `ModelHandler.from_env`.
    """
    given = {"iterations": args.iterations, "threshold": args.threshold, "defects": args.defects, "weights": args.weights}
    # Of the answers only what is stored is logged.
    return ModelHandler.from_env(function_environ(os.environ, **given, log_dir=""), LOG)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam cvat annotate`."""
    parser = command_parser("cvat annotate", __doc__, variables_help([*NOT_OF_COMMANDS, "ADVCAM_LOG_DIR"]))
    parser.add_argument("task", type=task_id, metavar="TASK", help="its id, as in its address in CVAT")
    parser.add_argument("--iterations", type=steps_of, required=True, metavar="T", help=f"climbing steps, 0 to {ITERATIONS_MAX}")
    parser.add_argument("--threshold", metavar="P", help="minimum confidence of a proposal, 0 to 1 (default: the weights')")
    parser.add_argument("--defects", metavar="NAMES", help="comma separated (default: all of the weights)")
    add_weights_option(parser)
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="the function's ADVCAM_LOG_DIR: what was rejected")
    add_server_options(parser)
    args = parser.parse_args(argv)
    if args.log_dir and not args.log_dir.is_dir():
        parser.error(f"--log-dir {args.log_dir} is no folder; give what the function has as ADVCAM_LOG_DIR")
    try:
        server = CvatServer(client_of(args), [args.task])
        log = LoggedProposals(read_proposal_log(args.log_dir) if args.log_dir else ())
        proposal_log = ProposalLog(args.log_dir, LOG) if args.log_dir else None
        run = SecondRun(server, args.task, model_of(args), log, proposal_log)
    except RequestError as error:
        parser.error(str(error))
    except (WeightsError, OSError) as error:
        sys.exit(str(error))
    status: int | str = 0
    try:
        run.run()
    except CvatError as error:
        status = f"{error}\nwhat is stored stays; the same command goes on from here"
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        status = INTERRUPTED
    counts = run.counts
    for note in run.notes:
        print(note, file=sys.stderr)
    print(
        f"task {args.task}: {counts['annotated']} photos annotated, {counts['there']} had proposals of this run, "
        f"{counts['failed']} not processed"
    )
    print(f"shapes: {told_of(counts)}")
    if status or counts["failed"]:
        sys.exit(status or 1)
