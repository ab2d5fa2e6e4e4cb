"""One photo through the function that Nuclio calls, with the time of the whole and of its networks alone.

As a command, a process of its own whose peak memory is that of one answer; it prints JSON.

Example:
    .venv/bin/python -m benchmarks.answers docs/sample.jpg --iterations 2
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
import torch
from tqdm import tqdm

from defectcam.openvino_engine import OpenVinoEngine
from defectcam.request import RequestError
from defectcam.serve import load_main
from defectcam.torch_engine import TorchEngine

SAMPLE = Path(__file__).parents[1] / "docs" / "sample.jpg"


def clock() -> float:
    """Seconds, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def engine_calls(description: str) -> Iterator[list[float]]:
    """The seconds that each call of an engine takes inside `with`, with a bar that counts them."""
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
        for engine in (TorchEngine, OpenVinoEngine):
            for name in ("score", "score_and_gradient"):
                patches.enter_context(patch.object(engine, name, timed(getattr(engine, name))))
        yield seconds


class Function:
    """The function as it is deployed here, by the ADVCAM_* variables, but without its time limit.

    Raises:
        RequestError, RuntimeError: as `ModelHandler.from_env`.
    """

    def __init__(self) -> None:
        self.module = load_main()
        self.context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.WARNING))
        with patch.dict(os.environ, ADVCAM_TIME_LIMIT="86400"):
            self.module.init_context(self.context)

    def answer(self, photo: Path, settings: dict, description: str = "answer") -> dict:
        """Answer a photo.

        Args:
            settings: of the request, beside its image.
            description: for the progress bar.

        Returns:
            seconds of the handler, network_seconds of them, answer_bytes and proposals (an interactor's: None).

        Raises:
            RuntimeError: no proposals, but an error or the tag `unprocessed`.
        """
        body = {"image": base64.b64encode(photo.read_bytes()).decode(), **settings}
        event = nuclio_sdk.Event(body=body, content_type="application/json", method="POST")
        with engine_calls(description) as network_seconds:
            started = clock()
            response = self.module.handler(self.context, event)
            seconds = clock() - started
        answer = json.loads(response.body)
        detected = isinstance(answer, list)
        if response.status_code != 200 or detected and any(shape["label"] == "unprocessed" for shape in answer):
            raise RuntimeError(f"the function did not process {photo} with {settings}: {response.body}")
        return {
            "seconds": seconds,
            "network_seconds": sum(network_seconds),
            "answer_bytes": len(response.body.encode()),
            "proposals": len(answer) if detected else None,
        }

    def warm_up(self) -> None:
        """What only a process's first answer does: pages, threads, the GPU's context and kernels."""
        self.answer(SAMPLE, {"pos_points": [[100, 100]]}, "warm-up")


def peak_host_mb() -> float:
    """Largest resident memory of this process so far, MB.

    Not ru_maxrss: that is never less than what the process that started this one had.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers",
        description="Time one answer of the function in a process of its own.",
        epilog="example:\n  .venv/bin/python -m benchmarks.answers docs/sample.jpg --iterations 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photo", type=Path, help="the photo: JPEG, PNG, TIFF, BMP or WebP")
    parser.add_argument("--iterations", type=int, required=True, help="climbing steps, 0 to 50")
    args = parser.parse_args(argv)
    try:
        function = Function()
        function.warm_up()
        result = function.answer(args.photo, {"iterations": args.iterations})
    except (OSError, RuntimeError, RequestError) as error:
        sys.exit(str(error))
    result["peak_host_mb"] = peak_host_mb()
    if torch.cuda.is_available():
        result["peak_gpu_mb"] = torch.cuda.max_memory_reserved() / 1e6
    print(json.dumps(result))


if __name__ == "__main__":
    main()
