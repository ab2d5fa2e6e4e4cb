"""Photos through the function that Nuclio calls, with the time of the whole and of its networks alone.

As a command, a process of its own that prints JSON. Its start and its memory are the function's: PyTorch is imported
only where the function imports it. The function does so to run a network, and to look for a GPU where ADVCAM_DEVICE is
not set.

    start_s          from the start of the process until the function can answer
    answers          of every photo and T, in this order:
      photo, iterations
      seconds          of the handler
      network_seconds  of them in the engines
      peak_host_mb, peak_gpu_mb  largest memory of the process until then; the GPU's where one is used

Example:
    ADVCAM_DEVICE=cpu .venv/bin/python -m benchmarks.answers docs/sample.jpg --iterations 0,2,8
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import nuclio_sdk
from tqdm import tqdm

from defectcam.command_line import step_counts
from defectcam.engine import Engine
from defectcam.function import handler, init_context
from defectcam.handler import ModelHandler
from defectcam.settings import NO_TIME_LIMIT_S, RequestError

SAMPLE = Path(__file__).parents[1] / "docs" / "sample.jpg"
START_FIELD = 22  # of /proc/self/stat: when the process was created, in clock ticks since the machine's start


def clock() -> float:
    """Seconds, once the GPU has done what it was told."""
    torch = sys.modules.get("torch")  # who has not imported it has told the GPU nothing
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def engine_calls(engines: set[type[Engine]], description: str) -> Iterator[list[float]]:
    """The seconds that each call of engines of these classes takes inside `with`, with a bar that counts them."""
    seconds: list[float] = []

    def timed(call: Callable) -> Callable:
        def run(*args, **kwargs):
            started = clock()
            result = call(*args, **kwargs)
            seconds.append(clock() - started)
            bar.update()
            return result

        return run

    with tqdm(desc=description, unit="tile", leave=False) as bar, ExitStack() as patches:
        for engine in engines:
            for name in ("score", "score_and_gradient"):
                patches.enter_context(patch.object(engine, name, timed(getattr(engine, name))))
        yield seconds


class Function:
    """The function as it is deployed here, by the ADVCAM_* variables, but without its time limit.

    Raises:
        RequestError, RuntimeError: as `ModelHandler.from_env`.
    """

    def __init__(self) -> None:
        self.context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.WARNING))
        with patch.dict(os.environ, ADVCAM_TIME_LIMIT=str(NO_TIME_LIMIT_S)):
            init_context(self.context)
        self.model: ModelHandler = self.context.user_data.model

    def answer(self, photo: Path, settings: dict, description: str = "answer") -> dict:
        """Answer a photo.

        Args:
            settings: of the request, beside its image.
            description: for the progress bar.

        Returns:
            seconds of the handler, and network_seconds of them.

        Raises:
            RuntimeError: no proposals, but an error or the tag `unprocessed`.
        """
        body = {"image": base64.b64encode(photo.read_bytes()).decode(), **settings}
        event = nuclio_sdk.Event(body=body, content_type="application/json", method="POST")
        del body  # the handler gives the photo's memory back
        engines = {type(engine) for engine in self.model.predictor.engines.values()}
        with engine_calls(engines, description) as network_seconds:
            started = clock()
            response = handler(self.context, event)
            seconds = clock() - started
        answer = json.loads(response.body)
        detected = isinstance(answer, list)
        if response.status_code != 200 or detected and any(shape["label"] == "unprocessed" for shape in answer):
            raise RuntimeError(f"the function did not process {photo} with {settings}: {response.body}")
        return {"seconds": seconds, "network_seconds": sum(network_seconds)}


def seconds_since_start() -> float:
    """Seconds since this process was created, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third on: names have spaces
    created = int(fields[START_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - created


def peak_memory(device: str) -> dict[str, float]:
    """Largest resident memory of this process so far, MB, and what PyTorch had of the GPU where that is the device.

    Not ru_maxrss: that is never less than what the process that started this one had.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = {"peak_host_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6}
    if device == "cuda":
        import torch  # the function has imported it, too

        peak["peak_gpu_mb"] = torch.cuda.max_memory_reserved() / 1e6
    return peak


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, nargs="+", help="the photos: JPEG, PNG, TIFF, BMP or WebP")
    parser.add_argument("--iterations", type=step_counts, required=True, help="climbing steps, 0 to 50; several as 0,2,8")
    args = parser.parse_args(argv)
    answers = []
    try:
        function = Function()
        start_s = seconds_since_start()
        for photo, steps in tqdm([(photo, steps) for photo in args.photos for steps in args.iterations], desc="answers"):
            answer = function.answer(photo, {"iterations": steps}, f"{photo.name}, T = {steps}")
            answers.append({"photo": str(photo), "iterations": steps} | answer | peak_memory(function.model.device))
    except (OSError, RuntimeError, RequestError) as error:
        sys.exit(str(error))
    print(json.dumps({"start_s": start_s, "answers": answers}))


if __name__ == "__main__":
    main()
