"""What T changes on your own photos: one picture per photo with the proposals for T = 0, 1, 2, 4 and 8 side by side.

PHOTOS are photos or folders; of a folder all photos in it and below it. Into --out, for every photo, <photo>.jpg: five times
the photo, reduced, with the proposals of the function at that T. Below each stand the number of proposals, the area of each
defect in px of the photo, and the seconds up to this T. <photo> is the photo's name, extension and all. Photos from several
folders have their folder before the name, so photos of the same name stay apart.

One climb gives the proposals of every T. The seconds are those of the networks on this machine: reading the photo, and
climbing up to this T. Decoding, outlining and drawing are not counted. The first photo of a size may take longer, since
networks are prepared for it.

Settings other than T are the function's own: its variables count (below).

Exit status: 0 if all photos were processed, 1 if not, 2 for a wrong command.

Example:
    defectcam sweep docs/sample.jpg --out out/sweep
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from defectcam.climb import Climb
from defectcam.command_line import command_parser
from defectcam.engine import Engine
from defectcam.handler import ModelHandler, photo_key
from defectcam.image import PHOTO_SUFFIXES, decode_image, image_size
from defectcam.memory import LEAST_BYTES_PER_PX, check_memory
from defectcam.overlay import COLOURS_RGB, OTHER_RGB, draw_shapes
from defectcam.paths import not_read, photo_files, relative_path, tell_not_read, write_image
from defectcam.predict import STEPS, proposals_for
from defectcam.pyramid import Pyramid
from defectcam.settings import RequestError, function_environ, variables_help
from defectcam.weights import WeightsError, add_weights_option

PANEL_PX, GAP_PX = 640, 16  # sides of the square that a photo is fitted into, and the space around it
HEADING_PX, TEXT_PX, LINE_PX = 30, 21, 30  # letters of "T = 2", of the other lines, and the height of a line
BYTES_PER_PX = LEAST_BYTES_PER_PX + 4 * len(STEPS)  # of a photo, with a map for every T


class TimedClimb:
    """A climb that adds the seconds of every step of every batch to `step_seconds`, which begins with that of T = 0."""

    def __init__(self, climb: Climb, step_seconds: list[float]) -> None:
        self.climb, self.step_seconds = climb, step_seconds

    def maps(self, engine: Engine, images: np.ndarray, steps: int) -> Iterator[np.ndarray]:
        """As the climb gives them."""
        maps = self.climb.maps(engine, images, steps)
        for step in range(steps + 1):
            started = time.monotonic()
            values = next(maps)
            self.step_seconds[step] += time.monotonic() - started
            yield values


@dataclass(frozen=True)
class AnswerAtT:
    """The function's answer to a photo at one T.

    Attributes:
        shapes: as CVAT gets them, tags included.
        proposals: number of proposals, those included that a tag `notice` says are left out.
        areas_px: defect -> pixels of these together.
        seconds: of the networks up to this T.
    """

    steps: int
    shapes: list[dict]
    proposals: int
    areas_px: dict[str, int]
    seconds: float


def answers_of_all_steps(model: ModelHandler, image_rgb: np.ndarray) -> list[AnswerAtT]:
    """The answers to a photo, (H, W, 3) uint8, at every T of STEPS, from one climb per defect."""
    found, seconds, pyramid = {steps: {} for steps in STEPS}, dict.fromkeys(STEPS, 0.0), Pyramid(image_rgb)
    defects = model.settings.defects or model.defects
    for defect in defects:
        config, own, step_seconds = model.weights.configs[defect], model.effective(defect, model.settings), [0.0] * (STEPS[-1] + 1)
        started = time.monotonic()
        plain = model.predictor.maps(pyramid, defect)
        plain.merged()  # reads the enlarged level, where the defect has one
        read_s = time.monotonic() - started
        climbs = tuple(climb and TimedClimb(climb, step_seconds) for climb in config.reading.climbs)
        maps = plain.read_as(replace(config.reading, climbs=climbs))
        for steps, some in proposals_for(maps, config, STEPS, own["threshold"], own["cam_threshold"]).items():
            found[steps][defect] = some
            seconds[steps] += read_s + (sum(step_seconds[: steps + 1]) if steps else 0.0)
    key, answers = photo_key(image_rgb), []
    for steps in STEPS:
        in_force = {defect: model.effective(defect, replace(model.settings, iterations=steps)) for defect in defects}
        shapes = model.shapes(found[steps], in_force, key, image_rgb.shape[:2])
        areas_px = {defect: sum(one.component.area_px for one in some) for defect, some in found[steps].items()}
        answers.append(AnswerAtT(steps, shapes, sum(map(len, found[steps].values())), areas_px, seconds[steps]))
    return answers


def contact_sheet(image_rgb: np.ndarray, answers: Sequence[AnswerAtT]) -> np.ndarray:
    """The photo, (H, W, 3) uint8, side by side with the proposals of each answer, and their figures; (h, w, 3) uint8."""
    scale = PANEL_PX / max(image_rgb.shape)
    size = [max(1, round(scale * length)) for length in image_rgb.shape[1::-1]]
    small = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    column_px, caption_px = PANEL_PX + GAP_PX, HEADING_PX + GAP_PX + LINE_PX * len(answers[0].areas_px)
    sheet = Image.new("RGB", (len(answers) * column_px + GAP_PX, size[1] + caption_px + 3 * GAP_PX), "white")
    draw, heading, text = ImageDraw.Draw(sheet), *map(ImageFont.load_default, (HEADING_PX, TEXT_PX))
    for number, answer in enumerate(answers):
        left, top = GAP_PX + number * column_px, GAP_PX
        shapes = [one | {"points": scale * np.array(one["points"])} if "points" in one else one for one in answer.shapes]
        sheet.paste(Image.fromarray(draw_shapes(small, shapes)), (left + (PANEL_PX - size[0]) // 2, top))
        top += size[1] + GAP_PX + HEADING_PX
        draw.text((left, top), f"T = {answer.steps}", "black", heading, anchor="ls")
        words = f"{answer.proposals} proposal{'s' * (answer.proposals != 1)}, {answer.seconds:.1f} s up to this T"
        draw.text((left + PANEL_PX, top), words, "black", text, anchor="rs")
        top += GAP_PX
        for defect, area_px in answer.areas_px.items():
            draw.rectangle((left, top, left + TEXT_PX, top + TEXT_PX), COLOURS_RGB.get(defect, OTHER_RGB))
            draw.text((left + LINE_PX, top), defect, "black", text)
            draw.text((left + PANEL_PX, top), f"{area_px:,} px", "black", text, anchor="ra")
            top += LINE_PX
    return np.asarray(sheet)


def find_photos(given: Sequence[Path], out: Path) -> dict[str, Path]:
    """Name -> photo, of photos and folders; below the folder that holds all of them. What lies in `out` is left out.

    Raises:
        ValueError: a folder has no photo.
    """
    photos = []
    for path in given:
        if not path.is_dir():
            photos.append(path)
            continue
        found, others = photo_files(path)
        tell_not_read(path, not_read(others))
        found = [photo for photo in found if not photo.resolve().is_relative_to(out.resolve())]
        if not found:
            raise ValueError(f"no photo in {path} outside of --out {out}; photos end in {', '.join(PHOTO_SUFFIXES)}")
        photos += found
    absolute = [Path(os.path.abspath(photo)) for photo in photos]
    folder = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in given])
    return {path.relative_to(folder).as_posix(): photo for path, photo in zip(absolute, photos, strict=True)}


def line_of(name: str, answers: Sequence[AnswerAtT]) -> str:
    """The figures of a photo as text."""
    areas = {defect: ", ".join(str(answer.areas_px[defect]) for answer in answers) for defect in answers[0].areas_px}
    seconds = ", ".join(f"{answer.seconds:.1f}" for answer in answers)
    return "; ".join([f"{name}: {seconds} s", *(f"{defect} {some} px" for defect, some in areas.items())])


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam sweep`."""
    parser = command_parser("sweep", __doc__, variables_help())
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTOS", help="photos, or folders of photos")
    add_weights_option(parser)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/sweep"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        photos = find_photos(args.photos, args.out)
        environ = function_environ(os.environ, weights=args.weights)
        model = ModelHandler.from_env(environ, logging.getLogger("defectcam"))
    except (ValueError, RequestError, WeightsError) as error:
        parser.error(str(error))
    print(f"{len(photos)} photos; figures are for T = {', '.join(map(str, STEPS))}")
    failed = 0
    for name, path in tqdm(photos.items(), unit="photo", disable=None):
        try:
            source = path.read_bytes()
            check_memory(*image_size(source, model.max_pixels), BYTES_PER_PX)
            image_rgb = np.ascontiguousarray(decode_image(source, model.max_pixels))
            answers = model.within_memory(lambda: answers_of_all_steps(model, image_rgb))  # noqa: B023
        except Exception as error:
            reason = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else model.reason(error)
            if reason is None:
                raise
            failed += 1
            tqdm.write(f"not processed: {name}: {reason}", file=sys.stderr)
            continue
        sheet = cv2.cvtColor(contact_sheet(image_rgb, answers), cv2.COLOR_RGB2BGR)
        try:
            write_image(args.out / relative_path(name, ".jpg"), sheet)
        except OSError as error:
            sys.exit(f"cannot write to {args.out}: {error}; make room or give another --out")
        tqdm.write(line_of(name, answers), file=sys.stdout)
    if failed < len(photos):
        print(f"pictures: {args.out.resolve()}")
    sys.exit(1 if failed else 0)
