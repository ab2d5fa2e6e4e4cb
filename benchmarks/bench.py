"""How fast the function is on this machine: ratios measured side by side, as JSON and as a picture.

Ratios are of medians over alternating repetitions (A, B, A, B, ...) in one run, so that a machine that gets slower
meanwhile, or that others use too, hardly changes them. Photos are made of docs/sample.jpg; the weights are the deployed
ones, and so is the engine that runs ours. The plain port and pytorch-grad-cam run the network in PyTorch as it was
trained, ours is the same network folded for use. All three read the photo at its own scale alone, in the same tiles.

    climb_speedup            plain_climb.py over ours, T = 2, where one tile in ten is climbed
    climb_speedup_all_tiles  the same where every tile is climbed
    grad_cam_speedup         pytorch-grad-cam over ours for the plain map, T = 0
    openvino_forward_speedup, openvino_step_speedup
                             PyTorch with the network as it was trained over OpenVINO, for the map of one tile as large
                             as the function's largest, and for its map and gradient
    floor_share              the least a climb can take, over what the plain map and the climb of every tile take,
                             in the function's largest tiles. The least: the operations of T + 1 forward and T
                             backward passes to the input of the network as it was trained, at the speed of this
                             machine's fastest large convolution
    floor_share_folded       the same for the operations that are left to the deployed network (`fold_upsampling`)

Whole answers of the function are with all deployed defects. Their photos are laid out in squares of 1 megapixel: 1,
2 x 2, 3 x 4 and 5 x 5. Those up to 4 megapixels, and clicks, are answered three times in this process, and count with
their median. Those of 12 and 25 megapixels are answered once, each in a process of its own; on a CPU without T = 8, which
would take many minutes.

    answer_s                 megapixels -> T -> seconds, where a third of the squares are the sample photo, the others
                             sound concrete. The photo of 1 megapixel is one square: the sample
    answer_all_tiles_s       the same where every square is the sample photo
    click_s                  seconds of one click
    start_s                  seconds from the start of a new process until the function can answer: imports, weights,
                             engines
    first_answer_s           the same until it has answered docs/sample.jpg at T = 0
    outside_network_share    of the answer to 4 megapixels at T = 2, every square the sample photo, the share of the time
                             that is not spent in the engines
    log_share                what writing an answer to the proposal log takes, over the time for 1 megapixel at T = 2
    growth_25mp              time for 25 megapixels over that for 1, T = 2, every square the sample photo
    peak_host_mb_25mp, peak_gpu_mb
                             largest memory of a process that has answered 25 megapixels at T = 2, a third of the squares
                             the sample photo: resident, and of the GPU
    cpu_install_mb           the files of all distributions that the extra `runtime-cpu` needs, those that they need in
                             turn included, but not Python itself and not the function's own code and weights

Example:
    .venv/bin/python -m benchmarks.bench --quick
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from pytorch_grad_cam import GradCAM
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.answers import SAMPLE, Function, clock
from benchmarks.picture import AIMS, DEFECTS, draw
from benchmarks.plain_climb import network_input, plain_climbed_map
from defectcam.climb import PaperClimb
from defectcam.handler import ModelHandler
from defectcam.network import ScoreNet
from defectcam.proposal_log import ProposalLog, image_hash
from defectcam.pyramid import SMALL_TILE_PX, PhotoMaps, Pyramid, Reading, level_tiles
from defectcam.settings import RequestError, Settings
from defectcam.tiling import EDGE_PX, LARGEST_TILE_PX, Tile
from defectcam.torch_engine import TorchEngine
from defectcam.weights import weights_folder

ROOT = Path(__file__).parents[1]

STEPS = 2  # the paper's T, and that of all ratios
ITERATIONS = 0, STEPS, 8  # of whole answers
LARGE_ITERATIONS = {"cpu": (0, STEPS), "cuda": ITERATIONS}  # of large photos
REPETITIONS = 3
PLAIN = PaperClimb(xi=0.1, penalty_weight=1.0, salient_share=0.5)  # their values change no time
SIDE_PX = 1000  # of a square: 1 megapixel
SQUARES = {1: (1, 1), 4: (2, 2), 12: (3, 4), 25: (5, 5)}  # megapixels -> rows and columns of squares
SMALL_MP, LARGE_MP = (1, 4), (12, 25)
SOUND_XY, SOUND_RADIUS_PX = (168, 168), 150  # the square around a pixel of the sample that has no defect
TILES_XY = 5, 2
SMALL_TILES = {"near": [(0, 0)], "near_px": 10**6}  # all of a photo, in tiles as small as those around clicks
FLOOR_TILES_XY = 2, 1  # of the function's own size, with which the plain port would take minutes on a CPU
# Channels and side of the convolutions whose fastest is the machine's peak; all have the same number of operations.
CONVOLUTIONS = (64, 512), (128, 256), (256, 128)


def alternate(calls: dict[str, Callable[[], object]], repetitions: int, description: str) -> dict[str, list]:
    """What the calls return, each `repetitions` times: all of them once, all of them again, and so on."""
    results: dict[str, list] = {name: [] for name in calls}
    with tqdm([*calls] * repetitions, desc=description) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            results[name].append(calls[name]())
    return results


def seconds_of(call: Callable, *args) -> float:
    """How long a call takes."""
    started = clock()
    call(*args)
    return clock() - started


def mirrored(image_rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) cut to a height and width, or enlarged by mirroring: no seam looks like a defect."""
    image_rgb = image_rgb[:height, :width]
    rest = [(0, size - length) for size, length in zip((height, width), image_rgb.shape)]
    return np.pad(image_rgb, (*rest, (0, 0)), mode="symmetric")


def sample_photo(height: int, width: int) -> np.ndarray:
    """The sample photo cut or enlarged to (height, width, 3) uint8."""
    return mirrored(np.asarray(Image.open(SAMPLE).convert("RGB")), height, width)


def sound_concrete(height: int, width: int) -> np.ndarray:
    """A part of the sample photo without defects, cut or enlarged to (height, width, 3) uint8."""
    rows, columns = (slice(middle - SOUND_RADIUS_PX, middle + SOUND_RADIUS_PX) for middle in reversed(SOUND_XY))
    return mirrored(np.asarray(Image.open(SAMPLE).convert("RGB"))[rows, columns], height, width)


def photo_of_squares(rows: int, columns: int, everywhere: bool) -> np.ndarray:
    """A photo of so many squares of SIDE_PX, uint8 RGB: the sample photo in each of them, or in a third."""
    sample = sample_photo(SIDE_PX, SIDE_PX)
    if everywhere:
        return mirrored(sample, rows * SIDE_PX, columns * SIDE_PX)
    sound = sound_concrete(SIDE_PX, SIDE_PX)
    squares = sample, sound, sound
    return np.vstack([np.hstack([squares[(row + column) % 3] for column in range(columns)]) for row in range(rows)])


def photo_of_tiles(tiles_xy: tuple[int, int], tile_px: int, halo_px: int) -> np.ndarray:
    """A photo that `tile_grid` cuts into so many tiles, all of that side."""
    beyond_px = 2 * (halo_px - min(halo_px, EDGE_PX))  # the outermost tiles have less halo beyond the photo's edge
    columns, rows = (count * (tile_px - 2 * halo_px) + beyond_px for count in tiles_xy)
    return sample_photo(rows, columns)


def compare_networks(model: ModelHandler, repetitions: int) -> dict:
    """The ratios of maps alone, without photo files and outlines: the first deployed defect, at the photo's scale."""
    defect = model.defects[0]
    engine, reading = model.predictor.engines[defect], model.weights.configs[defect].reading
    one_level = Reading(1.0, 1, reading.sharpness, (reading.climb(1.0),))

    def ours(image_rgb: np.ndarray, climbed: np.ndarray | None, **near) -> np.ndarray:
        """The merged map, climbed in the tiles of the pixels `climbed`."""
        maps = PhotoMaps(engine, one_level, Pyramid(image_rgb), model.predictor.batch, **near)
        if climbed is None:
            return maps.merged()
        maps.climb([STEPS], climbed, 1)
        return maps.merged(STEPS)

    photo = photo_of_tiles(TILES_XY, SMALL_TILE_PX, engine.halo_px)
    large = photo_of_tiles(FLOOR_TILES_XY, LARGEST_TILE_PX, engine.halo_px)
    tiles = level_tiles(*photo.shape[:2], one_level, engine, **SMALL_TILES)[1.0]
    large_tiles = level_tiles(*large.shape[:2], one_level, engine)[1.0]
    everywhere = np.ones(photo.shape[:2], bool)
    in_one_tile = np.zeros_like(everywhere)
    in_one_tile[0, 0] = True
    plain = as_trained(model, defect)
    calls = {
        "plain port": partial(plain_climbed_map, plain, photo, tiles, STEPS, PLAIN),
        "ours, one tile in ten": partial(ours, photo, in_one_tile, **SMALL_TILES),
        "ours, every tile": partial(ours, photo, everywhere, **SMALL_TILES),
        "pytorch-grad-cam": partial(grad_cam_maps, plain, photo, tiles),
        "ours, T = 0": partial(ours, photo, None, **SMALL_TILES),
        "ours, large tiles": partial(ours, large, np.ones(large.shape[:2], bool)),
    }
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, LARGEST_TILE_PX, LARGEST_TILE_PX)).astype(np.float32)
    for name, one in (("PyTorch", TorchEngine(copy.deepcopy(plain), model.device)), ("ours", engine)):
        calls |= {f"forward, {name}": partial(one.score, image), f"step, {name}": partial(one.score_and_gradient, image)}
    for channels, side_px in CONVOLUTIONS:
        calls[f"convolution of {channels} channels"] = convolution(channels, side_px, model.device)
    timed = alternate({name: partial(seconds_of, call) for name, call in calls.items()}, repetitions, "maps")
    seconds = {name: median(values) for name, values in timed.items()}
    peak_flops = max(flops_of(calls[name]) / seconds[name] for name in calls if name.startswith("convolution"))
    floor_seconds = climb_flops(plain, large_tiles) / peak_flops
    folded_seconds = climb_flops(model.predictor.torch_engine(defect).network, large_tiles) / peak_flops
    engines = {
        f"openvino_{work}_speedup": seconds[f"{work}, PyTorch"] / seconds[f"{work}, ours"] for work in ("forward", "step")
    }
    return (engines if engine.name == "openvino" else {}) | {
        "climb_speedup": seconds["plain port"] / seconds["ours, one tile in ten"],
        "climb_speedup_all_tiles": seconds["plain port"] / seconds["ours, every tile"],
        "grad_cam_speedup": seconds["pytorch-grad-cam"] / seconds["ours, T = 0"],
        "floor_share": floor_seconds / seconds["ours, large tiles"],
        "floor_share_folded": folded_seconds / seconds["ours, large tiles"],
        "convolution_peak_gflops": peak_flops / 1e9,
        "seconds_of_maps": seconds,
    }


def as_trained(model: ModelHandler, defect: str) -> ScoreNet:
    """A defect's network with nothing folded, its parameters with gradients."""
    config = model.weights.configs[defect]
    network = config.build_network().eval()
    network.load_state_dict(load_file(weights_folder(os.environ) / config.file))
    return network.to(model.device, memory_format=torch.channels_last)


def grad_cam_maps(network: ScoreNet, image_rgb: np.ndarray, tiles: Iterable[Tile]) -> np.ndarray:
    """pytorch-grad-cam's map of a photo, tile by tile, (H, W) float32; it scales every tile to 0..1."""
    stitched = np.zeros(image_rgb.shape[:2], np.float32)
    with GradCAM(network, [network.decoder]) as grad_cam:
        for tile in tiles:
            y0, y1, x0, x1 = tile.core
            image = network_input(network, image_rgb, tile)
            stitched[y0:y1, x0:x1] = tile.core_of(grad_cam(image, targets=[lambda logit: logit])[0])
    return stitched


def convolution(channels: int, side_px: int, device: str) -> Callable[[], object]:
    """A large convolution, laid out as the network's are."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)

    image, weight = random(1, channels, side_px, side_px), random(channels, channels, 3, 3)
    return partial(torch.conv2d, image, weight, padding=1)


def flops_of(call: Callable) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def climb_flops(network: ScoreNet, tiles: Iterable[Tile]) -> int:
    """Operations of T + 1 forward passes and T backward passes to the input over all tiles, with their halo."""
    network = copy.deepcopy(network).to("meta")  # counts without calculating

    def forward(image: torch.Tensor) -> torch.Tensor:
        return network.score_map(image + 0)  # the counter's hooks refuse the gradient of what modules get as it is

    def forward_and_backward(image: torch.Tensor) -> None:
        torch.autograd.grad(forward(image).sum(), image)

    total = 0
    for tile in tiles:
        image = torch.empty(1, 3, *tile.size, device="meta", requires_grad=True)
        total += flops_of(partial(forward, image)) + STEPS * flops_of(partial(forward_and_backward, image))
    return total


def wording(megapixels: int, steps: int | str, key: str) -> str:
    """An answer in words; of one square there is only one photo."""
    where = f", defects {DEFECTS[key]}" if megapixels > 1 else ""
    return f"{megapixels} MP, T = {steps}{where}"


def time_answers(function: Function, folder: Path, repetitions: int) -> dict:
    """The function on small photos and on one click."""
    calls = {}
    for megapixels, key in product(SMALL_MP, DEFECTS):
        photo = write_photo(megapixels, key, folder)
        for steps in ITERATIONS:
            name = wording(megapixels, steps, key)
            calls[name] = partial(function.answer, photo, {"iterations": steps}, name)
    square = write_photo(1, "answer_s", folder)
    calls["click"] = partial(function.answer, square, {"pos_points": [[SIDE_PX / 2, SIDE_PX / 2]]}, "click")
    model, image_rgb = function.model, sample_photo(SIDE_PX, SIDE_PX)
    log, shapes = ProposalLog(folder / "log", function.context.logger), model.propose(image_rgb, Settings(iterations=STEPS))
    # What only a process's first answer does: pages, threads, the GPU's context and kernels.
    function.answer(SAMPLE, {"pos_points": [[100, 100]]}, "warm-up")
    answers = alternate(calls, repetitions, "answers")
    seconds = {name: median(answer["seconds"] for answer in of_call) for name, of_call in answers.items()}
    seconds_log = median(seconds_of(log_answer, log, image_rgb, model, shapes) for _ in range(repetitions))
    everywhere = answers[wording(4, STEPS, "answer_all_tiles_s")]
    nested = {
        key: {str(size): {str(steps): seconds[wording(size, steps, key)] for steps in ITERATIONS} for size in SMALL_MP}
        for key in DEFECTS
    }
    return nested | {
        "click_s": seconds["click"],
        "outside_network_share": median(1 - answer["network_seconds"] / answer["seconds"] for answer in everywhere),
        "log_share": seconds_log / nested["answer_s"]["1"][str(STEPS)],
    }


def log_answer(log: ProposalLog, image_rgb: np.ndarray, model: ModelHandler, shapes: list[dict]) -> None:
    """What the function does beside its answer where ADVCAM_LOG_DIR is set."""
    height, width = image_rgb.shape[:2]
    in_force = {defect: model.effective(defect, model.settings) for defect in model.defects}
    log.append(image_hash(image_rgb), width, height, model.weights.version, in_force, shapes)


def answers_of_process(photos: Sequence[Path], iterations: Sequence[int], device: str) -> dict:
    """What `benchmarks.answers` prints of these photos and T, in a new process."""
    step_counts = ",".join(map(str, iterations))
    command = [sys.executable, "-m", "benchmarks.answers", *map(str, photos), "--iterations", step_counts]
    # With its device the function need not import PyTorch to look for a GPU: the CPU's image has no PyTorch.
    environ = {**os.environ, "ADVCAM_DEVICE": device}
    process = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"the process that answers {photos[-1].name} failed, see above")
    return json.loads(process.stdout)


def time_start(device: str, repetitions: int) -> dict:
    """Processes that answer the sample photo and end."""
    starts = [answers_of_process([SAMPLE], [0], device) for _ in tqdm(range(repetitions), desc="starts")]
    return {
        "start_s": median(start["start_s"] for start in starts),
        "first_answer_s": median(start["start_s"] + start["answers"][0]["seconds"] for start in starts),
    }


def time_large_answers(megapixels: int, key: str, folder: Path, device: str) -> dict:
    """The function on one large photo, in a process of its own, which answers the sample photo before, to warm up."""
    photo = write_photo(megapixels, key, folder)
    answers = answers_of_process([SAMPLE, photo], LARGE_ITERATIONS[device], device)["answers"]
    large = {answer["iterations"]: answer for answer in answers if answer["photo"] == str(photo)}
    results = {key: {str(megapixels): {str(steps): answer["seconds"] for steps, answer in large.items()}}}
    if (megapixels, key) == (25, "answer_s"):
        results["peak_host_mb_25mp"] = large[STEPS]["peak_host_mb"]
        if device == "cuda":
            results["peak_gpu_mb"] = large[STEPS]["peak_gpu_mb"]
    return results


def write_photo(megapixels: int, key: str, folder: Path) -> Path:
    """The JPEG file of a photo of squares."""
    path = folder / f"{key.removesuffix('_s')}_{megapixels}mp.jpg"
    Image.fromarray(photo_of_squares(*SQUARES[megapixels], key == "answer_all_tiles_s")).save(path, quality=90)
    return path


def install_mb(name: str, extra: str) -> float:
    """MB of the files of all distributions that an extra of an installed distribution needs, directly or in turn.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    due, needed = [(name, extra)], set()
    while due:
        name, extra = due.pop()
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            found = {(canonicalize_name(requirement.name), own_extra) for own_extra in ("", *requirement.extras)} - needed
            needed |= found
            due += found
    paths = {file.locate() for needed_name, _ in needed for file in metadata.files(needed_name) or []}
    return sum(path.stat().st_size for path in paths if path.exists()) / 1e6


def machine_facts(device: str) -> dict:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # others' share: above 0 the absolute times are too long
        "torch": torch.__version__,
    }


def printed(results: dict) -> list[str]:
    """Rows for the terminal: the figures with their aims, answers in words."""
    rows = []
    for key, value in results.items():
        if key in DEFECTS:
            for size, of_photo in value.items():
                rows += [f"seconds for {wording(int(size), steps, key):40} {s:12.4g}" for steps, s in of_photo.items()]
        elif isinstance(value, (int, float)):
            aim = " ".join(map(str, AIMS[key][::-1])) if key in AIMS else ""
            rows.append(f"{key:52} {value:12.4g}   {aim}")
    return list(dict.fromkeys(rows))  # the photo of one square is in both groups of answers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="everything once, and no photo above 4 megapixels")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for bench.json, bench.png (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = args.out / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        function = Function()
    except (RequestError, RuntimeError) as error:
        sys.exit(str(error))
    model, repetitions = function.model, 1 if args.quick else REPETITIONS
    results = {"machine": machine_facts(model.device), "defects": model.defects, "iterations": STEPS, "quick": args.quick}
    results["engines"] = {defect: engine.name for defect, engine in model.predictor.engines.items()}

    def keep(more: dict) -> None:
        """Write the JSON after every part: if one of the last, the longest, is interrupted, the others are kept."""
        for key, value in more.items():
            results[key] = results.get(key, {}) | value if key in DEFECTS else value
        (args.out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
        print(*printed(more), sep="\n", flush=True)

    keep(compare_networks(model, repetitions))
    try:
        keep(time_answers(function, folder, repetitions))
        keep(time_start(model.device, repetitions))
        with suppress(metadata.PackageNotFoundError):  # beside a GPU there may be no OpenVINO
            keep({"cpu_install_mb": install_mb("defectcam", "runtime-cpu")})
        if not args.quick:
            for megapixels, key in product(LARGE_MP, DEFECTS):
                keep(time_large_answers(megapixels, key, folder, model.device))
            of_photos = results["answer_all_tiles_s"]
            keep({"growth_25mp": of_photos["25"][str(STEPS)] / of_photos["1"][str(STEPS)]})
    finally:
        draw(results, args.out / "bench.png", STEPS)  # also of a run that is interrupted
    print(f"{args.out / 'bench.json'}, {args.out / 'bench.png'}")


if __name__ == "__main__":
    main()
