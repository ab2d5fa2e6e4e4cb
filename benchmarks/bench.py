"""How fast the function is on this machine: ratios measured side by side, as JSON and as a picture.

Ratios are of medians over alternating repetitions (A, B, A, B, ...) in one run, so that a machine that gets slower
meanwhile, or that others use too, hardly changes them. Photos are docs/sample.jpg, mirrored to the size wanted; the
weights are the deployed ones, and so is the engine that runs ours. The plain port and pytorch-grad-cam run the network
in PyTorch as it was trained, ours is the same network folded for use. All three read the photo at its own scale alone, in
the same tiles.

    climb_speedup            plain_climb.py over ours, T = 2, where one tile in ten is climbed
    climb_speedup_all_tiles  the same where every tile is climbed
    grad_cam_speedup         pytorch-grad-cam over ours for the plain map, T = 0
    openvino_forward_speedup, openvino_step_speedup
                             PyTorch with the network as it was trained over OpenVINO, for the map of one tile as large
                             as the function's, and for its map and gradient
    floor_share              the least a climb can take, over what the plain map and the climb of every tile take,
                             with tiles as large as the function's. The least: the operations of T + 1 forward and T
                             backward passes to the input of the network as it was trained, at the speed of this
                             machine's fastest large convolution
    floor_share_folded       the same for the operations that are left to the deployed network (`fold_upsampling`)
    outside_network_share    of the function's time for 4 megapixels, the share not spent in the engine
    log_share                what writing an answer to the proposal log takes, over the time for 1 megapixel
    growth_25mp              time for 25 megapixels over that for 1, the defects as dense
    peak_host_mb, peak_gpu_mb  of a process that answers 25 megapixels
    seconds_1mp_t0, seconds_1mp, seconds_25mp_gpu  the function with all deployed defects at T = 0; at T = 2
    seconds_click            one click

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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.answers import SAMPLE, Function, clock
from benchmarks.plain_climb import network_input, plain_climbed_map
from defectcam.climb import PaperClimb
from defectcam.network import ScoreNet
from defectcam.proposal_log import ProposalLog, image_hash
from defectcam.pyramid import NEAR_TILE_PX, PhotoMaps, Pyramid, Reading, level_tiles
from defectcam.request import RequestError, Settings
from defectcam.tiling import LARGEST_TILE_PX, Tile
from defectcam.torch_engine import TorchEngine
from model_handler import WEIGHTS_DIR, ModelHandler

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).parents[1]

STEPS = 2  # the paper's T
PLAIN = PaperClimb(xi=0.1, penalty_weight=1.0, salient_share=0.5)  # their values change no time
SIDE_PX = 1000  # of the photo of 1 megapixel
LARGE = 5  # times the side of the small photo: 25 megapixels
TILES_XY = 5, 2
SMALL_TILES = {"near": [(0, 0)], "near_px": 10**6}  # all of a photo, in tiles as small as those around clicks
FLOOR_TILES_XY = 2, 1  # of the function's own size, with which the plain port would take minutes on a CPU
# Channels and side of the convolutions whose fastest is the machine's peak; all have the same number of operations.
CONVOLUTIONS = (64, 512), (128, 256), (256, 128)
# What is wanted, and whether it is the least or the most.
AIMS = {
    "openvino_forward_speedup": (3.5, "at least"),
    "openvino_step_speedup": (2.8, "at least"),
    "climb_speedup": (4, "at least"),
    "climb_speedup_all_tiles": (2, "at least"),
    "floor_share": (0.6, "at least"),
    "outside_network_share": (0.1, "at most"),
    "log_share": (0.05, "at most"),
    "growth_25mp": (27, "at most"),
    "peak_host_mb": (2500, "at most"),
    "seconds_1mp": (20, "at most"),
    "seconds_click": (3, "at most"),
}


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


def sample_photo(height: int, width: int, times: int = 1) -> np.ndarray:
    """The sample photo cut or enlarged to (height, width, 3) uint8, and all of that `times` x `times`.

    Enlarged by mirroring, so that no seam looks like a defect and larger photos have the same defects.
    """
    image_rgb = np.asarray(Image.open(SAMPLE).convert("RGB"))[:height, :width]
    for sizes in ((height, width), (times * height, times * width)):
        rest = [(0, size - length) for size, length in zip(sizes, image_rgb.shape)]
        image_rgb = np.pad(image_rgb, (*rest, (0, 0)), mode="symmetric")
    return image_rgb


def compare_networks(model: ModelHandler, repetitions: int) -> dict:
    """The ratios of maps alone, without photo files and outlines: the first deployed defect, at the photo's scale."""
    defect = model.defects[0]
    engine, reading = model.predictor.engines[defect], model.weights.facts[defect].reading
    one_level = Reading(1.0, 1, reading.sharpness, (reading.climb(1.0),))

    def photo_of(tiles_xy: tuple[int, int], tile_px: int) -> np.ndarray:
        columns, rows = (count * (tile_px - 2 * engine.halo_px) for count in tiles_xy)
        return sample_photo(rows, columns)

    def ours(image_rgb: np.ndarray, climbed: np.ndarray | None, **near) -> np.ndarray:
        """The merged map, climbed in the tiles of the pixels `climbed`."""
        maps = PhotoMaps(engine, one_level, Pyramid(image_rgb), model.predictor.batch, **near)
        if climbed is None:
            return maps.merged()
        maps.climb([STEPS], climbed, 1)
        return maps.merged(STEPS)

    photo, large = photo_of(TILES_XY, NEAR_TILE_PX), photo_of(FLOOR_TILES_XY, LARGEST_TILE_PX)
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
    fact = model.weights.facts[defect]
    network = fact.build_network().eval()
    network.load_state_dict(load_file(Path(os.environ.get("ADVCAM_WEIGHTS") or WEIGHTS_DIR) / fact.file))
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


def time_answers(function: Function, folder: Path, repetitions: int) -> dict:
    """The function on 1 and 4 megapixels and on one click."""
    small, medium = (write_photo(times, folder) for times in (1, 2))
    calls = {
        "1 megapixel": partial(function.answer, small, {"iterations": STEPS}, "1 megapixel"),
        "1 megapixel, T = 0": partial(function.answer, small, {"iterations": 0}, "1 megapixel, T = 0"),
        "4 megapixels": partial(function.answer, medium, {"iterations": STEPS}, "4 megapixels"),
        "click": partial(function.answer, small, {"pos_points": [[SIDE_PX / 2, SIDE_PX / 2]]}, "click"),
    }
    model: ModelHandler = function.context.user_data.model
    image_rgb = sample_photo(SIDE_PX, SIDE_PX)
    log, shapes = ProposalLog(folder / "log", function.context.logger), model.propose(image_rgb, Settings(iterations=STEPS))
    function.warm_up()
    answers = alternate(calls, repetitions, "answers")
    seconds = {name: median(answer["seconds"] for answer in of_call) for name, of_call in answers.items()}
    seconds_log = median(seconds_of(log_answer, log, image_rgb, model, shapes) for _ in range(repetitions))
    outside = [1 - answer["network_seconds"] / answer["seconds"] for answer in answers["4 megapixels"]]
    return {
        "outside_network_share": median(outside),
        "seconds_1mp_t0": seconds["1 megapixel, T = 0"],
        "seconds_1mp": seconds["1 megapixel"],
        "seconds_4mp": seconds["4 megapixels"],
        "seconds_click": seconds["click"],
        "log_share": seconds_log / seconds["1 megapixel"],
        "growth_4mp": seconds["4 megapixels"] / seconds["1 megapixel"],
        "proposals_1mp": answers["1 megapixel"][0]["proposals"],
        "answer_bytes_1mp": answers["1 megapixel"][0]["answer_bytes"],
        "answer_bytes_4mp": answers["4 megapixels"][0]["answer_bytes"],
    }


def log_answer(log: ProposalLog, image_rgb: np.ndarray, model: ModelHandler, shapes: list[dict]) -> None:
    """What the function does beside its answer where ADVCAM_LOG_DIR is set."""
    height, width = image_rgb.shape[:2]
    in_force = {defect: model.effective(defect, model.settings) for defect in model.defects}
    log.append(image_hash(image_rgb), width, height, model.weights.version, in_force, shapes)


def time_large_answer(folder: Path, device: str, seconds_1mp: float) -> dict:
    """The function on 25 megapixels, once, in a process of its own."""
    photo = write_photo(LARGE, folder)
    command = [sys.executable, "-m", "benchmarks.answers", str(photo), "--iterations", str(STEPS)]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit("the process that answers the largest photo failed, see above")
    answer = json.loads(process.stdout)
    results = {
        "growth_25mp": answer["seconds"] / seconds_1mp,
        "peak_host_mb": answer["peak_host_mb"],
        "seconds_25mp": answer["seconds"],
        "answer_bytes_25mp": answer["answer_bytes"],
    }
    if device == "cuda":
        results |= {"seconds_25mp_gpu": answer["seconds"], "peak_gpu_mb": answer["peak_gpu_mb"]}
    return results


def write_photo(times: int, folder: Path) -> Path:
    """A JPEG file of the photo of 1 megapixel laid out `times` x `times`."""
    path = folder / f"photo_{times * times}mp.jpg"
    Image.fromarray(sample_photo(SIDE_PX, SIDE_PX, times)).save(path, quality=90)
    return path


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


def draw(results: dict, path: Path) -> None:
    """The picture: ratios with their aims, seconds against megapixels."""
    groups = {
        "times as fast": [
            "openvino_forward_speedup", "openvino_step_speedup", "climb_speedup", "climb_speedup_all_tiles", "grad_cam_speedup",
        ],
        "share of time": ["floor_share", "outside_network_share", "log_share"],
        "times as long as for 1 MP": ["growth_4mp", "growth_25mp"],
        "seconds": ["seconds_1mp_t0", "seconds_1mp", "seconds_4mp", "seconds_25mp", "seconds_click"],
    }
    figure, all_axes = pyplot.subplots(1, len(groups), figsize=(16, 4.5), layout="constrained")
    for axes, (unit, keys) in zip(all_axes, groups.items()):
        keys = [key for key in keys if key in results]
        labels = []
        for place, key in enumerate(keys):
            label = key.replace("_", "\n")
            if key in AIMS:
                aim, sense = AIMS[key]
                axes.hlines(aim, place - 0.45, place + 0.45, color="tab:red", linewidth=2)
                label += f"\n({sense} {aim:g})"
            labels.append(label)
        bars = axes.bar(range(len(keys)), [results[key] for key in keys], color="lightsteelblue")
        axes.bar_label(bars, fmt="{:.3g}", label_type="center")
        axes.set_xticks(range(len(keys)), labels)
        axes.set_title(unit)
        axes.margins(y=0.15)
        axes.tick_params(axis="x", labelsize=8)
    machine = results["machine"]
    memory = f", peak host memory for 25 MP {results['peak_host_mb']:.0f} MB" if "peak_host_mb" in results else ""
    figure.suptitle(
        f"T = {STEPS}, {', '.join(results['defects'])}; {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, ours by {' and '.join(sorted({*results['engines'].values()}))}{memory}; red: the aim"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="everything once, and no photo of 25 megapixels")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for bench.json, bench.png (default: %(default)s)")
    args = parser.parse_args(argv)
    folder = args.out / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        function = Function()
    except (RequestError, RuntimeError) as error:
        sys.exit(str(error))
    model: ModelHandler = function.context.user_data.model
    repetitions = 1 if args.quick else 3
    results = {"machine": machine_facts(model.device), "defects": model.defects, "iterations": STEPS, "quick": args.quick}
    results["engines"] = {defect: engine.name for defect, engine in model.predictor.engines.items()}

    def keep(more: dict) -> None:
        """Write after every part: if the last one, the longest, is interrupted, the others are kept."""
        results.update(more)
        (args.out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, args.out / "bench.png")
        for key, value in more.items():
            if isinstance(value, (int, float)):
                aim = " ".join(map(str, AIMS[key][::-1])) if key in AIMS else ""
                print(f"{key:24} {value:12.4g}   {aim}", flush=True)

    keep(compare_networks(model, repetitions))
    keep(time_answers(function, folder, repetitions))
    if not args.quick:
        keep(time_large_answer(folder, model.device, results["seconds_1mp"]))
    print(f"{args.out / 'bench.json'}, {args.out / 'bench.png'}")


if __name__ == "__main__":
    main()
