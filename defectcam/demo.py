"""`defectcam demo`: one photo through the handler that Nuclio calls, without Nuclio, Docker or CVAT."""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import nuclio_sdk
import nuclio_sdk.logger
import numpy as np

from defectcam import function
from defectcam.command_line import step_counts
from defectcam.image import ImageError, decode_image, pixel_limit
from defectcam.overlay import draw_shapes
from defectcam.paths import file_name, write_image
from defectcam.settings import ITERATIONS_MAX, NO_TIME_LIMIT_S, RequestError
from defectcam.weights import WeightsError


def start_function() -> Callable[[dict], tuple[int, object]]:
    """Start the function in this process; returns what sends it a request and gives status and answer."""
    os.environ["ADVCAM_TIME_LIMIT"] = os.environ.get("ADVCAM_TIME_LIMIT", "").strip() or str(NO_TIME_LIMIT_S)
    logger = nuclio_sdk.Logger(logging.INFO)
    logger.set_handler("default", sys.stderr, nuclio_sdk.logger.HumanReadableFormatter())
    context = nuclio_sdk.Context(logger)
    function.init_context(context)

    def call(envelope: dict) -> tuple[int, object]:
        event = nuclio_sdk.Event(body=envelope, content_type="application/json", method="POST")
        response = function.handler(context, event)
        return response.status_code, json.loads(response.body)

    return call


def main(argv: Sequence[str] | None = None) -> None:
    """The command `defectcam demo`."""
    parser = argparse.ArgumentParser(
        prog="defectcam demo",
        description="Proposals for one photo as CVAT JSON and as an overlay picture.",
        epilog="example:\n  defectcam demo bridge.jpg --iterations 0,2,8 --out out/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, help="the photo, in any format of docs/your-data.md")
    parser.add_argument(
        "--iterations",
        type=step_counts,
        default=[None],
        help=f"climbing steps, 0 to {ITERATIONS_MAX} (default: each defect's own); several as 0,2,8: overlays stand side by side",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        image_bytes = args.image.read_bytes()
    except OSError as error:
        sys.exit(f"cannot read the photo {args.image}: {error.strerror}")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        call, answers = start_function(), []
    except (RequestError, WeightsError) as error:
        sys.exit(str(error))
    for steps in args.iterations:
        given = {} if steps is None else {"iterations": steps}
        status, answer = call({"image": base64.b64encode(image_bytes).decode(), **given})
        if status != 200:
            sys.exit(f"the function refused: {answer['error']}")
        answers.append(answer)
        name = args.image.stem if len(args.iterations) == 1 else f"{args.image.stem} T={steps}"
        shapes_path = args.out / file_name(name, ".json")
        shapes_path.write_text(json.dumps(answer, indent=1) + "\n")
        count = sum(shape["type"] != "tag" for shape in answer)
        print(f"{count} proposals for {args.image}" + ("" if steps is None else f" at T = {steps}"))
        for tag in (shape for shape in answer if shape["type"] == "tag"):
            print(f"{tag['label']}: {tag['attributes'][0]['value']}")
        print(f"CVAT JSON: {shapes_path.resolve()}")
    try:
        image_rgb = decode_image(image_bytes, pixel_limit())
    except ImageError as error:
        sys.exit(f"no overlay: {error}")
    overlay_path = args.out / file_name(args.image.stem, ".png")
    overlays = np.hstack([draw_shapes(image_rgb, answer) for answer in answers])
    write_image(overlay_path, cv2.cvtColor(overlays, cv2.COLOR_RGB2BGR))
    print(f"overlay:   {overlay_path.resolve()}")
