"""Weights for one campaign, in minutes: the running weights go on learning from a few finished photos (paper, Fig. 1).

A campaign is one bridge, one camera, one light. A few of its photos teach what general weights cannot know.

1. Training from the running weights on the labelled photos. BatchNorm statistics stay as they are. Where a defect covers much of
   the photos, crops are drawn anywhere, since crops around the defect would teach that everything is the defect.
2. Against forgetting, REPLAY_SHARE of the crops comes from the weights' replay pack, where they have one (`defectcam replay`),
   and the new weights are mixed with the running ones.
3. Two folds, from two outlined photos on: each half of the photos judges weights that learnt from the other half. They choose
   theta, as far as it costs the replay pack nothing, and give the verdict: better, same or worse. With fewer photos it is
   "unchecked". Training in a fold is half as long, so the weights that are written have learnt a little more than the figures say.

OUT/manifest.json, *.safetensors, *.onnx    the new weights, for `deploy.sh weights OUT`; other defects are as before
OUT/before_after.jpg                        photos that were not learnt from: photo, before, after
OUT/rejected/                               all of this instead, where the verdict is "worse"
work, in OUT                                checkpoints; may be deleted afterwards

Photos and labels come from tasks of CVAT (--cvat-task), or are laid out as for `defectcam train`; without splits.json all photos
of a set are taken. All photos of a completed job are finished. Of other jobs those photos count, in part, on which a person has
corrected something. With --log, the ADVCAM_LOG_DIR of the function, rejected proposals teach, too. Labels may be clicks alone:
then the running weights tell how far a clicked defect reaches, theta stays, and nothing can judge the new weights.

The exit status is 0 if the new weights may be deployed, 3 if they are worse, and 1 or 2 where something was wrong.

Example:
    export ADVCAM_CVAT_URL=http://localhost:8080 ADVCAM_CVAT_TOKEN=...
    defectcam adapt --defect crack --cvat-task 12 --log /data/proposals --out out/next && ./deploy.sh weights out/next
    defectcam adapt --defect crack --cvat-task 12 --cvat-task 13 --label Riss=crack --out out/next
    defectcam adapt --defect crack --data campaign --sets mine --out out/next
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from defectcam.command_line import command_parser, count
from defectcam.cvat.client import CvatError, add_server_options
from defectcam.cvat.target import task_id
from defectcam.evaluation.measures import f1_2px
from defectcam.evaluation.pages import at_width, compared
from defectcam.feedback.cvat import server_of
from defectcam.feedback.replay import read_pack
from defectcam.feedback.shown import LoggedProposals, add_log_option
from defectcam.feedback.task_labels import TaskLabels
from defectcam.feedback.versions import NOT_PROMOTED, assemble, publish
from defectcam.network import ScoreNet
from defectcam.paths import write_rgb
from defectcam.postprocess import regions
from defectcam.proposals import probability
from defectcam.training.calibrate import say
from defectcam.training.click_judge import CLICK_REACH_PX
from defectcam.training.clicks import patch_bounds, patch_xyxy
from defectcam.training.config import LABELS, TrainConfig, architecture_of, names
from defectcam.training.dataset import PhotoLabels, on_disk
from defectcam.training.export import ENCODERS_WITH_GRAPH, graph_of
from defectcam.training.hard_negatives import merged_map
from defectcam.training.labels import UNKNOWN, add_label_option
from defectcam.training.sources import check_kinds, gather, labels_sha256, read_all
from defectcam.training.train import crops_of, fit
from defectcam.weights import DefectConfig, Weights, WeightsError, add_weights_option, load_weights, write_defect

# Two and four minutes on two cores. Defects that cover much of the photos are learnt more slowly.
STEPS, STEPS_OF_COVERING = 200, 400
LR = 3e-4
CROP_PX, BATCH = 192, 8
SCALES = (0.7, 1.4)  # a campaign has one camera
MOST_COVERED = 0.03  # share of the pixels with the defect from which on crops are drawn anywhere
AROUND_CLICK_PX = 16  # nothing is known around a positive click, of a photo with clicks alone
SURE_LOGITS = 2.0  # so far below theta the running weights are sure that the defect is not there
REPLAY_SHARE = 0.4  # of the crops with the defect
# Share of the new weights in the mixture. With more, cracks gain little on the campaign and lose much on old sites. Defects that
# cover much of the photos are learnt more slowly. A replay pack keeps the old sites, so it allows the larger share.
SHARE, SHARE_OF_COVERING = 0.3, 0.5
# By which theta may rise, as logits of the merged map: photos full of a defect teach to see more of it. A lower theta would
# cost old sites, and so does a higher one that suits five photos alone.
SHIFTS = (0.5, 1.0, 1.5, 2.0)
NOISE_MARGIN = 0.01  # a smaller difference of overlaps is noise
WINDOW_PX = 1024  # side of the part of a photo that judges
PICTURE_PX = 420

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class JudgedPart:
    """A part of a photo with its outline, and the merged maps (h, w) of T = 0 of the weights before and of those after."""

    image_rgb: np.ndarray
    outline: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Choice:
    """What the folds chose.

    Attributes:
        shift: of theta, a logit of the merged map.
        overlap_before, overlap_after: on photos that were not learnt from, 0..1; None where nothing could judge.
    """

    shift: float
    overlap_before: float | None = None
    overlap_after: float | None = None

    @property
    def verdict(self) -> str:
        """better, same, worse or unchecked."""
        if self.overlap_before is None:
            return "unchecked"
        gain = self.overlap_after - self.overlap_before
        return "better" if gain >= NOISE_MARGIN else "worse" if gain <= -NOISE_MARGIN else "same"


def mixed(before: Tensors, after: Tensors, share: float) -> Tensors:
    """The mean of two networks' tensors, `share` of it the second's."""
    return {
        name: torch.lerp(value, after[name], share) if value.dtype.is_floating_point else value.clone()
        for name, value in before.items()
    }


def covered_share(photos: Sequence[PhotoLabels]) -> float:
    """Share of the pixels of outlined photos that is known to be the defect."""
    outlines = [photo.outline for photo in photos if photo.outline is not None]
    covered = sum(np.count_nonzero(outline == 255) for outline in outlines)
    return covered / max(sum(outline.size for outline in outlines), 1)


def outline_of_clicks(photo: PhotoLabels, found: np.ndarray, without: np.ndarray) -> np.ndarray:
    """`PhotoLabels.outline` of a photo of which only clicks are known.

    Clicks do not tell where a defect ends, so alone they would teach wide outlines.

    - The defect: proposals of the running weights that a person clicked on, and a disc at each positive click.
    - Not the defect: patches of negative clicks, and places without a positive click nearby where the running weights are sure.
    - Unknown: all else.

    Args:
        found: (H, W) bool, what the running weights propose.
        without: (H, W) bool, where the running weights are sure that there is no defect.
    """
    height, width = found.shape
    discs, around = np.zeros((2, height, width), np.uint8)
    for click in photo.positive:
        cv2.circle(discs, (click.x, click.y), CLICK_REACH_PX, 1, -1)
        cv2.circle(around, (click.x, click.y), AROUND_CLICK_PX, 1, -1)
    _, labels = cv2.connectedComponents(found.astype(np.uint8), connectivity=8)
    outline = np.where(without & (around == 0), np.uint8(0), np.uint8(UNKNOWN))
    outline[np.isin(labels, np.setdiff1d(labels[discs > 0], 0))] = 255
    for click in photo.negative:
        x0, y0, x1, y1 = patch_xyxy(click, CROP_PX, height, width)
        outline[y0:y1, x0:x1] = 0
    outline[discs > 0] = 255
    return outline


def overlap(defect: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Overlap of masks (h, w) bool with outlines (h, w) uint8: IoU of all known pixels; for cracks its mean with F1 at 2 px."""
    both = either = 0
    scores = []
    for mask, outline in pairs:
        known, truth = outline != UNKNOWN, outline == 255
        both += np.count_nonzero(mask & truth)
        either += np.count_nonzero((mask | truth) & known)
        if defect == "crack":
            scores.append(f1_2px(mask & known, truth))
    iou = both / either if either else 1.0
    return float(np.mean([iou, np.mean(scores)])) if scores else float(iou)


def window_of(photo: PhotoLabels, seed: int) -> tuple[slice, slice]:
    """The part of an outlined photo that judges, around a pixel of the defect if there is one."""
    height, width = photo.outline.shape
    rng = np.random.default_rng(seed)
    pixels = np.flatnonzero(photo.outline == 255)
    y, x = divmod(int(rng.choice(pixels)) if len(pixels) else int(rng.integers(height * width)), width)
    return slice(*patch_bounds(y, WINDOW_PX, height)), slice(*patch_bounds(x, WINDOW_PX, width))


def network_of(defect_config: DefectConfig, tensors: Tensors) -> ScoreNet:
    """The network with some tensors."""
    network = defect_config.build_network()
    network.load_state_dict(tensors)
    return network


class Adaptation:
    """One defect's running weights, the labelled photos of a campaign, and the replay pack."""

    def __init__(
        self,
        defect_config: DefectConfig,
        before: Tensors,
        config: TrainConfig,
        photos: Sequence[PhotoLabels],
        work: Path,
        pack: Sequence[PhotoLabels] = (),
    ) -> None:
        self.defect_config, self.before, self.config = defect_config, before, config
        self.photos, self.work, self.pack = photos, work, pack
        self.share = SHARE_OF_COVERING if pack and config.on_defect_share == 0 else SHARE
        self.outlined = [index for index, photo in enumerate(photos) if photo.outline is not None]

    def trained(self, name: str, photos: Sequence[PhotoLabels], steps: int) -> Tensors:
        """The tensors after training on some photos."""
        out, network = self.work / name, network_of(self.defect_config, self.before)
        config = dataclasses.replace(self.config, steps=steps, val_every=steps)
        identity = {"labels_sha256": labels_sha256([*photos, *self.pack])}
        # Every photo or click with the defect is drawn as often as any other, so the campaign's are repeated.
        shown = sum(1 if photo.shows_defect else len(photo.positive) for photo in photos)
        times = max(1, round((1 / REPLAY_SHARE - 1) * len(self.pack) / max(shown, 1)))
        photos = [*photos] * times + [*self.pack]
        fit(config, out, network, crops_of(config, photos), None, "steps", identity)
        return load_file(out / "best.safetensors")

    def outline_clicked(self) -> None:
        """Give photos with clicks alone an outline, see `outline_of_clicks`."""
        least = self.defect_config.least_logit(self.defect_config.cam_threshold)

        def outlined(photo: PhotoLabels) -> PhotoLabels:
            logits = self.maps(self.before, photo.image_rgb)
            outline = outline_of_clicks(photo, regions(logits, least, self.defect_config.cleaning), logits < least - SURE_LOGITS)
            return dataclasses.replace(photo, outline=outline)

        self.photos = [photo if photo.outline is not None else outlined(photo) for photo in self.photos]

    def maps(self, tensors: Tensors, image_rgb: np.ndarray) -> np.ndarray:
        """The merged map of T = 0 of some weights, (H, W) float32."""
        network = network_of(self.defect_config, tensors).to("cuda" if torch.cuda.is_available() else "cpu")
        return merged_map(network, image_rgb, self.defect_config.reading)

    def folds(self) -> Iterator[tuple[list[int], list[int]]]:
        """Indices of photos to learn from and of outlined photos to judge by, twice; a half without the defect cannot teach."""
        order = np.random.default_rng(self.config.seed).permutation(len(self.photos)).tolist()
        with_defect = [index for index in order if self.photos[index].shows_defect or self.photos[index].positive]
        others = [index for index in order if index not in with_defect]
        halves = with_defect[::2] + others[1::2], with_defect[1::2] + others[::2]
        for learnt, judging in (halves, halves[::-1]):
            judging = [index for index in judging if index in self.outlined]
            if judging and any(index in with_defect for index in learnt):
                yield learnt, judging

    def judged(self) -> list[JudgedPart]:
        """A part of each photo, judged by weights that learnt from the other half of the photos."""
        found = []
        for number, (learnt, judging) in enumerate(self.folds()):
            say(f"fold {number + 1}: {len(learnt)} photos teach, {len(judging)} judge")
            teaching = [self.photos[index] for index in learnt]
            after = mixed(self.before, self.trained(f"fold{number}", teaching, max(1, self.config.steps // 2)), self.share)
            for index in judging:
                photo = self.photos[index]
                part = window_of(photo, index)
                image_rgb, outline = photo.image_rgb[part], photo.outline[part]
                found.append(JudgedPart(image_rgb, outline, self.maps(self.before, image_rgb), self.maps(after, image_rgb)))
        return found

    def masks(self, judged: Sequence[JudgedPart], choice: Choice | None) -> list[np.ndarray]:
        """The proposals of T = 0, (h, w) bool each; without a choice those of the weights before."""
        least = self.defect_config.least_logit(self.defect_config.cam_threshold)
        return [
            regions(one.after if choice else one.before, least + (choice.shift if choice else 0), self.defect_config.cleaning)
            for one in judged
        ]

    def choose(self, judged: Sequence[JudgedPart], tensors: Tensors) -> Choice:
        """The theta with the best overlap; the running one unless another is clearly better and harms no old site.

        Args:
            tensors: the new weights. With another theta they must not lose more than noise on the crops of the replay pack.
        """
        if len(judged) < 2:
            return Choice(0.0)
        running = self.defect_config.least_logit(self.defect_config.cam_threshold)

        def overlap_at(shift: float, maps: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
            masks = [(regions(logits, running + shift, self.defect_config.cleaning), outline) for logits, outline in maps]
            return overlap(self.config.defect, masks)

        campaign = [(one.after, one.outline) for one in judged]
        old = [(self.maps(tensors, crop.image_rgb), crop.outline) for crop in self.pack]
        best, most, least_of_old = 0.0, overlap_at(0.0, campaign), overlap_at(0.0, old) - NOISE_MARGIN
        for shift in SHIFTS:
            found = overlap_at(shift, campaign)
            if found > most + NOISE_MARGIN and overlap_at(shift, old) >= least_of_old:
                best, most = shift, found
        return Choice(best, overlap_at(0.0, [(one.before, one.outline) for one in judged]), most)


def picture_of(adaptation: Adaptation, judged: Sequence[JudgedPart], choice: Choice) -> np.ndarray:
    """Photo, before and after of every judged part, one below the other; (H, 3 * PICTURE_PX, 3) uint8 RGB."""
    rows = []
    for part, before, after in zip(judged, adaptation.masks(judged, None), adaptation.masks(judged, choice)):
        views = [part.image_rgb, *(compared(part.image_rgb, mask, part.outline == 255) for mask in (before, after))]
        rows.append(np.hstack([at_width(view, PICTURE_PX) for view in views]))
    return np.vstack(rows)


def campaign_config(config: TrainConfig, defect_config: DefectConfig, init: Path) -> TrainConfig:
    """The training of a campaign: labels and seed of `config`, everything else is fixed or that of the network."""
    return dataclasses.replace(
        config, **architecture_of(defect_config), encoder_weights=None, init=init, scales=SCALES, crop_px=CROP_PX,
        batch=BATCH, lr=LR, frozen_batchnorm=True,
    )  # fmt: skip


def running_weights(folder: Path, defect: str, out: Path) -> Weights:
    """The weights to start from. Called before any photo is read, so that bad input is refused early.

    Raises:
        WeightsError, ValueError: they cannot be loaded, or lack the defect; `out` is not empty.
    """
    weights = load_weights(folder)
    if defect not in weights.configs:
        raise ValueError(f"{folder} has no weights for {defect!r}, only for {list(weights.configs)}: use defectcam train")
    if out.is_file() or any(path.is_file() for path in out.rglob("*")):
        raise ValueError(f"{out} exists and is not empty: choose another --out, or remove it")
    return weights


def read_tasks(args: argparse.Namespace, folder: Path) -> None:
    """Write the labels of tasks of CVAT to a folder, and put them into the arguments as if they had been given.

    Raises:
        WeightsError, CvatError, ValueError: as `running_weights`, `TaskLabels.write` and `client_of`.
    """
    defects = running_weights(args.weights, args.defect, args.out).configs
    log, server = LoggedProposals.read(args.log), server_of(args, args.cvat_task)
    found = TaskLabels(server, args.defect, defects, log, args.label_names, folder).write()
    for note in found.notes:
        say(note)
    say(f"{', '.join(found.sets)}: {found.finished} finished photos, {found.unfinished} that are known in part")
    args.data, args.sets, args.masks, args.clicks = found.data, found.sets, found.masks, found.clicks


def adapt(labels: TrainConfig, weights_dir: Path, out: Path, steps: int | None = None) -> Choice:
    """New weights of one defect in `out`; see the top of this module.

    Args:
        labels: the defect, its labels and the seed; its other fields are not used.
        weights_dir: the running weights.
        out: an empty folder, or one that is not there yet.
        steps: of training; None for STEPS or STEPS_OF_COVERING.

    Raises:
        WeightsError, ValueError, FileNotFoundError: bad input, named with the remedy.
    """
    defect, weights = labels.defect, running_weights(weights_dir, labels.defect, out)
    defect_config, started = weights.configs[defect], time.monotonic()
    config, work = campaign_config(labels, defect_config, weights_dir / defect_config.file), out / "work"
    sources = gather(config, "train")
    check_kinds(config, sources, "train")
    work.mkdir(parents=True, exist_ok=True)
    photos = on_disk(read_all(sources, "photos"), work)
    covering = covered_share(photos) > MOST_COVERED
    config = dataclasses.replace(
        config, on_defect_share=0.0 if covering else 0.5, steps=steps or (STEPS_OF_COVERING if covering else STEPS)
    )
    crops_of(config, photos)  # refuses labels that teach nothing before any training
    pack = read_pack(weights_dir, defect)
    adaptation = Adaptation(defect_config, load_file(weights_dir / defect_config.file), config, photos, work, pack)
    adaptation.outline_clicked()
    photos = adaptation.photos
    say(f"{defect}: {len(photos)} photos, {len(pack)} crops of the replay pack, training of {config.steps} steps")
    after = adaptation.trained("all", photos, config.steps)
    minutes = (time.monotonic() - started) / 60
    judged = adaptation.judged() if len(adaptation.outlined) > 1 else []
    tensors = mixed(adaptation.before, after, adaptation.share)
    choice = adaptation.choose(judged, tensors)
    folder = out if choice.verdict != "worse" else out / "rejected"
    folder.mkdir(exist_ok=True)
    if judged:
        write_rgb(folder / "before_after.jpg", picture_of(adaptation, judged, choice))
    record = {
        "parent": weights.version, "command": "defectcam " + shlex.join(sys.argv[1:]), "photos": len(photos),
        "labels_sha256": labels_sha256(photos), "minutes": round(minutes, 1),
        "minutes_of_all": round((time.monotonic() - started) / 60, 1), "replay": len(pack), "share": adaptation.share,
        "shift": choice.shift, "overlap_before": choice.overlap_before, "overlap_after": choice.overlap_after,
        "verdict": choice.verdict, "config": config.record(),
    }  # fmt: skip
    running_entry = json.loads((weights_dir / "manifest.json").read_text())["defects"][defect]
    entry = entry_of(running_entry, defect_config, choice, record)
    write_defect(work / "weights", defect, entry, save(tensors), graph_for(defect_config, tensors))
    publish(assemble(weights_dir, {defect: work / "weights"}, work / "candidate"), folder)
    return choice


def entry_of(entry: dict, defect_config: DefectConfig, choice: Choice, record: dict) -> dict:
    """The manifest entry of the new weights: `entry` of the running ones, theta moved, with the record of this run."""
    entry = {name: value for name, value in entry.items() if name not in ("file", "sha256", "graph", "graph_sha256")}
    slope, intercept = defect_config.platt
    least = defect_config.least_logit(defect_config.cam_threshold) + choice.shift
    entry["cam_threshold"] = round(float(probability(slope * least + intercept)), 4)
    entry["training"] = {**entry["training"], "adapted": [*entry["training"].get("adapted", []), record]}
    return entry


def graph_for(defect_config: DefectConfig, tensors: Tensors) -> bytes | None:
    """The graph of a network with these tensors; None where its encoder has none."""
    if defect_config.encoder not in ENCODERS_WITH_GRAPH:
        return None
    return graph_of(network_of(defect_config, tensors).requires_grad_(False).eval())


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam adapt`."""
    parser = command_parser("adapt", __doc__)
    parser.add_argument("--defect", required=True)
    add_weights_option(parser, "the running weights")
    parser.add_argument(
        "--cvat-task", type=task_id, action="append", default=[], metavar="TASK",
        help="a task of CVAT, in place of --data; may be given several times",
    )  # fmt: skip
    add_log_option(parser)
    add_server_options(parser)
    parser.add_argument("--data", type=Path, help="folder of sets")
    parser.add_argument("--sets", type=names, default=[], help="sets of labelled photos of the campaign")
    parser.add_argument("--none-sets", type=names, default=[], help="sets without the defect")
    parser.add_argument("--labels", choices=LABELS, default="outlines", help="what of the masks is learnt (default: %(default)s)")
    add_label_option(parser)
    parser.add_argument("--clicks", type=Path, help="your own clicks: CSV or JSONL")
    parser.add_argument("--masks", type=Path, help="folder of <set>/<photo>.png from weak-labels, in place of the sets' masks")
    parser.add_argument(
        "--steps", type=count,
        help=f"of training (default: {STEPS}, two minutes on two cores; {STEPS_OF_COVERING} where the defect covers much of the photos)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the new weights")
    args = parser.parse_args(argv)
    given = [name for name in ("data", "sets", "none_sets", "clicks", "masks") if getattr(args, name)]
    given += ["labels clicks"] if args.labels == "clicks" else []
    if args.cvat_task and given:
        parser.error(f"--cvat-task gives photos and labels: leave out --{given[0].replace('_', '-')}")
    if args.masks and args.labels == "clicks":
        parser.error("--masks gives outlines: leave out --labels clicks, or --masks")
    if args.log and not args.cvat_task:
        parser.error("--log says what was rejected in tasks of CVAT: give --cvat-task too")
    if not (args.sets or args.clicks or args.cvat_task):
        parser.error("labels are missing: give --cvat-task, or --data and --sets, or --clicks")
    try:
        with ExitStack() as cleanup:
            if args.cvat_task:
                read_tasks(args, Path(cleanup.enter_context(TemporaryDirectory(prefix="defectcam-"))))
            labels = TrainConfig(
                defect=args.defect, data=args.data, sets=tuple(args.sets), none_sets=tuple(args.none_sets), labels=args.labels,
                clicks=args.clicks, masks=args.masks, label_names=args.label_names, seed=args.seed,
            )  # fmt: skip
            choice = adapt(labels, args.weights, args.out, args.steps)
    except (WeightsError, CvatError, ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    judged = choice.overlap_before is not None
    overlaps = f": overlap {choice.overlap_before:.3f} before, {choice.overlap_after:.3f} after" if judged else ""
    say(f"verdict: {choice.verdict}{overlaps} (theta moved by {choice.shift:+g})")
    if choice.verdict == "worse":
        say(f"the new weights are in {args.out / 'rejected'}, the running ones stay")
        sys.exit(NOT_PROMOTED)
    say(f"deploy them with: ./deploy.sh weights {args.out}")
