"""Which photos to label next: those come first of which the weights are least sure (paper 3.2).

On the one campaign that was tried, adapting to the first five taught less than adapting to five random photos that show the
defect (docs/loop.md). So look at the list, and leave out photos that show little.

Every photo is reduced to half a megapixel. The networks see it twice, as it is and mirrored, without climbing, and give every
pixel a probability of the defect. Means are taken over windows of 64 px around every 32nd pixel. Of each photo the highest tenth
of the windows counts, and the defect with the highest sum.

uncertainty    the mean entropy of a window's pixels: 1 bit where all have 0.5, 0 where the network is sure.
disagreement   between photo and mirror image: the difference of a window's mean probabilities, 0 to 1.
diversity      the distance d to the nearest photo higher up the list, by the encoder's features (their mean and deviation over
               the photo), as d / (d + the median distance from the mean): 0 for a copy, 1 for the first photo.

The score is the mean of uncertainty and disagreement, times diversity. The next photo of the list is always the one that then
has the largest score (farthest-first), so ten photos of one wall do not fill its top.

Example:
    defectcam next-images photos --out out/next
    defectcam next-images list.txt --top 40 --cvat-task "pier 3, first look" --url http://localhost:8080 --out out/next
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from defectcam.command_line import command_parser, count
from defectcam.cvat.client import CvatError, add_server_options
from defectcam.cvat_labels import labels_with, task_labels
from defectcam.encoders import normalised
from defectcam.evaluation.pages import at_width, page, write_ranking
from defectcam.feedback.cvat import server_of
from defectcam.image import PHOTO_SUFFIXES, ImageError, decode_image, pixel_limit
from defectcam.paths import not_read, photo_files, tell_not_read
from defectcam.predict import Predictor, open_weights
from defectcam.proposals import probability
from defectcam.pyramid import Pyramid
from defectcam.settings import RequestError
from defectcam.text import read_lines
from defectcam.torch_engine import TorchEngine
from defectcam.weights import WeightsError, add_weights_option

LARGEST_PHOTO_PX = 500_000  # larger photos are reduced to it
WINDOW_PX, SPACING_PX = 64, 32
HIGHEST_SHARE = 0.1  # of a photo's windows that count: a small defect is not lost, and one window does not decide
FEATURES_PX = 256  # longer side of the small copy that the encoder's features are taken of
PICTURE_PX = 320
COLUMNS = ("rank", "path", "score", "uncertainty", "disagreement", "diversity", "nearest", "defect")


@dataclass(frozen=True, eq=False)
class AcquisitionStats:
    """What the weights say of one photo.

    Attributes:
        path: of the photo.
        defect: the one that the figures are of.
        uncertainty: bits, 0..1.
        disagreement: 0..1.
        features: (D,) float64.
        entropies: mean entropy of the windows, (rows, columns) float32, bits.
    """

    path: Path
    defect: str
    uncertainty: float
    disagreement: float
    features: np.ndarray
    entropies: np.ndarray

    @property
    def information(self) -> float:
        """What a label of this photo alone would teach, 0..1."""
        return (self.uncertainty + self.disagreement) / 2


@dataclass(frozen=True, eq=False)
class RankedPhoto:
    """A photo of the ordered list; `nearest` is the photo higher up that is most like it, None for the first."""

    stats: AcquisitionStats
    score: float
    diversity: float
    nearest: Path | None


def entropy_bits(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of yes and no at these probabilities, 0..1 bit."""
    p = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def mean_of_highest(values: np.ndarray) -> float:
    """Mean of the largest HIGHEST_SHARE of the values, one of them at least."""
    return float(np.sort(values, axis=None)[-math.ceil(HIGHEST_SHARE * values.size) :].mean())


def window_means(values: np.ndarray) -> np.ndarray:
    """Means of a map (H, W) float32 over the windows around every SPACING_PX-th row and column, its edge repeated."""
    means = cv2.blur(values, (WINDOW_PX, WINDOW_PX), borderType=cv2.BORDER_REPLICATE)
    return means[::SPACING_PX, ::SPACING_PX].copy()


def pixel_probabilities(predictor: Predictor, pyramid: Pyramid, defect: str) -> np.ndarray:
    """The probability of the defect at every pixel, (H, W) float32."""
    slope, intercept = predictor.weights.configs[defect].platt
    return probability(slope * predictor.maps(pyramid, defect).merged() + intercept)


@torch.no_grad()
def pooled_features(engine: TorchEngine, image_rgb: np.ndarray) -> np.ndarray:
    """Mean and deviation of the encoder's deepest features over a small copy of a photo (H, W, 3) uint8: (2 C,)."""
    network, (height, width) = engine.network, image_rgb.shape[:2]
    scale = min(1.0, FEATURES_PX / max(height, width))
    size = [max(1, round(scale * length / engine.stride_px)) * engine.stride_px for length in (width, height)]
    small = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA)
    images = engine.tensor(normalised(small.transpose(2, 0, 1)[None]))
    deepest = network.encoder(images * network.scale_rgb + network.shift_rgb)[-1][0].flatten(1).double()
    return torch.cat([deepest.mean(1), deepest.std(1, correction=0)]).cpu().numpy()


def acquisition_stats(predictor: Predictor, path: Path, image_rgb: np.ndarray) -> AcquisitionStats:
    """What the order needs of a photo (H, W, 3) uint8."""
    scale = min(1.0, math.sqrt(LARGEST_PHOTO_PX / (image_rgb.shape[0] * image_rgb.shape[1])))
    size = [max(1, round(scale * length)) for length in image_rgb.shape[1::-1]]
    image_rgb = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA) if scale < 1 else image_rgb
    pyramids = Pyramid(image_rgb), Pyramid(np.ascontiguousarray(image_rgb[:, ::-1]))

    def figures(defect: str) -> tuple[float, float, np.ndarray]:
        here, mirrored = (pixel_probabilities(predictor, pyramid, defect) for pyramid in pyramids)
        there = np.ascontiguousarray(mirrored[:, ::-1])
        entropies = window_means(entropy_bits(here))
        return mean_of_highest(entropies), mean_of_highest(np.abs(window_means(here) - window_means(there))), entropies

    found = {defect: figures(defect) for defect in predictor.defects}
    defect = max(found, key=lambda name: found[name][0] + found[name][1])
    features = np.concatenate([pooled_features(predictor.torch_engine(name), image_rgb) for name in found])
    return AcquisitionStats(path, defect, *found[defect][:2], features, found[defect][2])


def ranked(photos: Sequence[AcquisitionStats]) -> list[RankedPhoto]:
    """The photos in the order to label them in; see the top of this module."""
    features = np.stack([photo.features for photo in photos])
    deviation = features.std(axis=0)
    features = (features - features.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    typical = float(np.median(np.linalg.norm(features, axis=1))) or 1.0
    information = np.array([photo.information for photo in photos])
    distance, diversity = np.full(len(photos), np.inf), np.ones(len(photos))
    nearest = np.full(len(photos), -1)
    order: list[RankedPhoto] = []
    waiting = np.ones(len(photos), bool)
    while waiting.any():
        scores = np.where(waiting, information * diversity, -1.0)
        pick = int(scores.argmax())
        like = photos[nearest[pick]].path if order else None
        order.append(RankedPhoto(photos[pick], float(scores[pick]), float(diversity[pick]), like))
        waiting[pick] = False
        to_pick = np.linalg.norm(features - features[pick], axis=1)
        nearest[to_pick < distance] = pick
        distance = np.minimum(distance, to_pick)
        diversity = distance / (distance + typical)
    return order


def photo_paths(source: Path) -> list[Path]:
    """The photos of a folder and those below it (masks/ left out), or those that a text file lists, one path a line.

    Raises:
        ValueError: there are none, or the file is no text.
    """
    if source.is_dir():
        photos, others = photo_files(source)
        tell_not_read(source, not_read(others))
        found = [path for path in photos if "masks" not in path.relative_to(source).parts]
        what = f"no photos ({', '.join(PHOTO_SUFFIXES)}) in {source}"
    else:
        try:
            lines = read_lines(source)
        except ValueError as error:
            raise ValueError(f"{error}; or give a folder. A list has the path of a photo on every line") from None
        found = [Path(line) for line in dict.fromkeys(lines) if line]
        what = f"{source} lists no photos"
    if not found:
        raise ValueError(what)
    return found


def acquisition_stats_of(predictor: Predictor, paths: Sequence[Path]) -> tuple[list[AcquisitionStats], dict[Path, str]]:
    """`acquisition_stats` of all photos; and path -> reason of those that cannot be read."""
    stats, skipped = [], {}
    for path in tqdm(paths, desc="photos", unit="photo"):
        try:
            image_rgb = decode_image(path.read_bytes(), pixel_limit())
        except (ImageError, OSError) as error:
            skipped[path] = getattr(error, "strerror", None) or str(error)
            tqdm.write(f"skipped {path}: {skipped[path]}", file=sys.stderr)
            continue
        stats.append(acquisition_stats(predictor, path, image_rgb))
    return stats, skipped


def picture_of(stats: AcquisitionStats) -> np.ndarray:
    """The photo beside itself with its uncertain windows in yellow, (h, w, 3) uint8 RGB."""
    small = at_width(decode_image(stats.path.read_bytes(), pixel_limit()), PICTURE_PX)
    share = 0.7 * cv2.resize(stats.entropies, small.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None] ** 2
    return np.hstack([small, np.rint((1 - share) * small + share * np.array([255, 220, 0])).astype(np.uint8)])


BODY = """
<p>The first {{ shown|length }} of {{ photos }}, by weights {{ version }}. On the right, yellow: where the network is in
doubt. All of them, with their figures, are in next_images.csv.</p>
{% for row in shown %}<figure><img src="{{ row.picture }}" alt="{{ row.path }}" loading="lazy">
<figcaption>{{ row.rank }}. <b>{{ row.path }}</b>: score {{ row.score }} ({{ row.defect }}: uncertainty {{ row.uncertainty }},
disagreement {{ row.disagreement }}; diversity {{ row.diversity }}
{%- if row.nearest %}, most like {{ row.nearest }}{% endif %})</figcaption></figure>
{% endfor %}
{% if skipped %}<h2>Skipped</h2>
<ul>{% for path, reason in skipped.items() %}<li>{{ path }}: {{ reason }}</li>{% endfor %}</ul>{% endif %}
"""


def write_order(order: Sequence[RankedPhoto], skipped: dict[Path, str], version: str, top: int, out: Path) -> None:
    """Write next_images.csv (all photos), pictures of the first `top`, and index.html that shows them."""
    rows = []
    for rank, photo in enumerate(order, start=1):
        stats = photo.stats
        scores = (round(value, 4) for value in (photo.score, stats.uncertainty, stats.disagreement, photo.diversity))
        rows.append((rank, stats.path, *scores, photo.nearest or "", stats.defect))
    shown = write_ranking(out / "next_images.csv", COLUMNS, rows, (picture_of(photo.stats) for photo in order[:top]))
    html = page("Photos to label next", BODY, shown=shown, photos=len(order), skipped=skipped, version=version)
    (out / "index.html").write_text(html, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam next-images`."""
    parser = command_parser("next-images", __doc__)
    parser.add_argument("photos", type=Path, help="folder of photos, or a text file with a path on every line")
    add_weights_option(parser)
    parser.add_argument("--top", type=count, default=50, help="how many are shown, and uploaded (default: %(default)s)")
    parser.add_argument("--cvat-task", metavar="NAME", help="make a task of this name in CVAT from the first --top photos")
    add_server_options(parser)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/next"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.photos.exists():
        parser.error(f"{args.photos} is not there: give a folder of photos, or a text file that lists them")
    try:
        server = server_of(args) if args.cvat_task else None
    except RequestError as error:
        parser.error(f"--cvat-task: {error}")
    try:
        paths = photo_paths(args.photos)
        predictor = open_weights(args.weights)
        stats, skipped = acquisition_stats_of(predictor, paths)
        if not stats:
            sys.exit(f"none of the {len(skipped)} photos can be read")
        order = ranked(stats)
        write_order(order, skipped, predictor.weights.version, args.top, args.out)
        print(f"{len(order)} photos ordered: {(args.out / 'index.html').resolve()}")
        if server:
            labels = task_labels(labels_with(predictor.defects))
            task = server.create_task(args.cvat_task, labels, [one.stats.path for one in order[: args.top]])
            print(f"task {task}: {server.name}/tasks/{task}")
    except (WeightsError, RequestError, CvatError, ValueError) as error:
        sys.exit(str(error))
