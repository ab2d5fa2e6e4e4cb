"""How fast the function is on this machine: ratios measured side by side, as JSON and as a picture.

Ratios are of medians over alternating repetitions (A, B, A, B, ...) in one run, so that a machine that gets slower
meanwhile, or that others use too, hardly changes them. The photos are generated, the weights the deployed ones. The
plain port and pytorch-grad-cam run the network as it was trained, ours the same network folded for use.

    climb_speedup            plain_climb.py over ours, T = 2, where one tile in ten shows a defect
    climb_speedup_all_tiles  the same where every tile is climbed
    grad_cam_speedup         pytorch-grad-cam over ours for the plain map, T = 0
    floor_share              the least a climb can take, over what the plain map and the climb of every tile take,
                             with tiles as large as the function's. The least: the operations of T + 1 forward and T
                             backward passes to the input of the network as it was trained, at the speed of this
                             machine's fastest large convolution
    floor_share_folded       the same for the operations that are left to the deployed network (`fold_upsampling`)
    outside_network_share    of the function's time for 4 megapixels, the share not spent in forward and backward passes
    log_share                what writing an answer to the proposal log takes, over the time for 1 megapixel
    growth_25mp              time for 25 megapixels over that for 1, the defects as dense
    peak_host_mb, peak_gpu_mb  of a process that answers 25 megapixels
    seconds_1mp, seconds_click, seconds_25mp_gpu  the function with all deployed defects at T = 2; one click

Example:
    .venv/bin/python -m benchmarks.bench --quick
"""

from __future__ import annotations

import argparse
import bisect
import copy
import json
import os
import platform
import runpy
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

from benchmarks.answers import Function, clock
from benchmarks.plain_climb import network_input, plain_climbed_map
from defectcam.cam import score_sums
from defectcam.network import DefectNet
from defectcam.proposal_log import ProposalLog, image_hash
from defectcam.request import RequestError, Settings
from defectcam.tiling import CLIMBED_CORE_PX, Tile, climbed_map, stitched_score_map, tile_grid, tiles_to_climb
from defectcam.weights import OUTLINE_PREFIX
from model_handler import WEIGHTS_DIR, ModelHandler

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).parents[1]
make_sample = runpy.run_path(str(ROOT / "docs" / "make_sample.py"))["make_sample"]

STEPS = 2  # the paper's T
SIDE_PX = 1000  # of the photo of 1 megapixel
LARGE = 5  # times the side of the small photo: 25 megapixels
TILES_XY = 5, 2
FLOOR_TILES_XY = 2, 1  # of the function's own size
CPU_CORE_PX = 128  # with the function's own tiles the plain port would take several minutes for each repetition
# Channels and side of the convolutions whose fastest is the machine's peak; all have the same number of operations.
CONVOLUTIONS = (64, 512), (128, 256), (256, 128)
# What is wanted, and whether it is the least or the most.
AIMS = {
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


def compare_networks(model: ModelHandler, repetitions: int) -> dict:
    """The ratios of maps alone, without photo files and outlines: the first deployed defect, on ten tiles."""
    defect = model.defects[0]
    network, fact = model.weights.networks[defect], model.weights.facts[defect]
    core_px = CPU_CORE_PX if model.device == "cpu" else CLIMBED_CORE_PX
    image_rgb, _ = make_sample(*(count * core_px for count in TILES_XY))
    tiles = tile_grid(*image_rgb.shape[:2], network.climb_halo_px, network.stride_px, core_px)
    plain_tiles = tile_grid(*image_rgb.shape[:2], network.halo_px, network.stride_px, core_px)
    large_rgb, _ = make_sample(*(count * CLIMBED_CORE_PX for count in FLOOR_TILES_XY))
    large_tiles = tile_grid(*large_rgb.shape[:2], network.climb_halo_px, network.stride_px, CLIMBED_CORE_PX)

    def ours(steps: int, gate: float, image_rgb: np.ndarray = image_rgb, core_px: int = core_px) -> np.ndarray:
        score = stitched_score_map(network, image_rgb, model.batch, core_px)
        return climbed_map(
            network, image_rgb, score, steps, fact.climb_parameters, fact.cam_max, fact.cam_threshold, fact.window_px,
            gate, model.batch, core_px,
        )  # fmt: skip

    with model.networks_on_device:
        score = stitched_score_map(network, image_rgb, model.batch, core_px)
        gate = gate_for(len(tiles) // 10, tiles, network, score, fact.window_px)
        plain = as_trained(model, defect)
        calls = {
            "plain port": partial(plain_climbed_map, plain, image_rgb, STEPS, fact.climb_parameters, core_px),
            "ours, one tile in ten": partial(ours, STEPS, gate),
            "ours, every tile": partial(ours, STEPS, 0.0),
            "pytorch-grad-cam": partial(grad_cam_maps, plain, image_rgb, plain_tiles),
            "ours, T = 0": partial(ours, 0, 0.0),
            "ours, large tiles": partial(ours, STEPS, 0.0, large_rgb, CLIMBED_CORE_PX),
        }
        for channels, side_px in CONVOLUTIONS:
            calls[f"convolution of {channels} channels"] = convolution(channels, side_px, model.device)
        timed = alternate({name: partial(seconds_of, call) for name, call in calls.items()}, repetitions, "maps")
        seconds = {name: median(values) for name, values in timed.items()}
        peak_flops = max(flops_of(calls[name]) / seconds[name] for name in calls if name.startswith("convolution"))
    floor_seconds = climb_flops(plain, large_tiles) / peak_flops
    folded_seconds = climb_flops(network, large_tiles) / peak_flops
    return {
        "climb_speedup": seconds["plain port"] / seconds["ours, one tile in ten"],
        "climb_speedup_all_tiles": seconds["plain port"] / seconds["ours, every tile"],
        "grad_cam_speedup": seconds["pytorch-grad-cam"] / seconds["ours, T = 0"],
        "floor_share": floor_seconds / seconds["ours, large tiles"],
        "floor_share_folded": folded_seconds / seconds["ours, large tiles"],
        "convolution_peak_gflops": peak_flops / 1e9,
        "seconds_of_maps": seconds,
    }


def as_trained(model: ModelHandler, defect: str) -> DefectNet:
    """A defect's classifier with nothing folded, its parameters with gradients."""
    fact = model.weights.facts[defect]
    tensors = load_file(Path(os.environ.get("ADVCAM_WEIGHTS") or WEIGHTS_DIR) / fact.file)
    network = fact.build_network().eval()
    network.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(OUTLINE_PREFIX)})
    return network.to(model.device, memory_format=torch.channels_last)


def gate_for(count: int, tiles: list[Tile], network: DefectNet, score: np.ndarray, window_px: int) -> float:
    """The gate that `count` tiles pass: what is timed must not depend on how many the weights would let through."""
    sums, bias = score_sums(score), float(network.head.bias[0])
    gates = np.linspace(0, 1, 1_000_001)
    passing = partial(tiles_to_climb, tiles, sums, bias, window_px)
    gate = gates[bisect.bisect_left(gates, -count, key=lambda gate: -len(passing(gate)))]
    if len(passing(gate)) != count:
        sys.exit(f"no gate lets {count} of {len(tiles)} tiles through: the classifier is equally sure of several")
    return float(gate)


def grad_cam_maps(network: DefectNet, image_rgb: np.ndarray, tiles: Iterable[Tile]) -> np.ndarray:
    """pytorch-grad-cam's map of a photo, tile by tile, (H, W) float32; it scales every tile to 0..1."""
    stitched = np.zeros(image_rgb.shape[:2], np.float32)
    with GradCAM(network, [network.decoder]) as grad_cam:
        for tile in tiles:
            y0, y1, x0, x1 = tile.core
            image = network_input(network, image_rgb, tile.outer)
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


def climb_flops(network: DefectNet, tiles: Iterable[Tile]) -> int:
    """Operations of T + 1 forward passes and T backward passes to the input over all tiles, with their halo."""
    network = copy.deepcopy(network).to("meta")  # counts without calculating

    def forward(image: torch.Tensor) -> torch.Tensor:
        return network.score_map(image + 0)  # the counter's hooks refuse the gradient of what modules get as it is

    def forward_and_backward(image: torch.Tensor) -> None:
        torch.autograd.grad(forward(image).sum(), image)

    total = 0
    for top, bottom, left, right in (tile.outer for tile in tiles):
        image = torch.empty(1, 3, bottom - top, right - left, device="meta", requires_grad=True)
        total += flops_of(partial(forward, image)) + STEPS * flops_of(partial(forward_and_backward, image))
    return total


def time_answers(function: Function, folder: Path, repetitions: int) -> dict:
    """The function on 1 and 4 megapixels and on one click."""
    image_rgb, masks = make_sample(SIDE_PX, SIDE_PX)
    on_crack = np.argwhere(masks["crack"])
    y, x = on_crack[len(on_crack) // 2].tolist()
    small, medium = (write_photo(image_rgb, times, folder) for times in (1, 2))
    calls = {
        "1 megapixel": partial(function.answer, small, {"iterations": STEPS}, "1 megapixel"),
        "4 megapixels": partial(function.answer, medium, {"iterations": STEPS}, "4 megapixels"),
        "click": partial(function.answer, small, {"pos_points": [[x, y]]}, "click"),
    }
    model: ModelHandler = function.context.user_data.model
    log, shapes = ProposalLog(folder / "log", function.context.logger), model.propose(image_rgb, Settings(iterations=STEPS))
    function.warm_up()
    answers = alternate(calls, repetitions, "answers")
    seconds = {name: median(answer["seconds"] for answer in of_call) for name, of_call in answers.items()}
    seconds_log = median(seconds_of(log_answer, log, image_rgb, model, shapes) for _ in range(repetitions))
    outside = [1 - answer["network_seconds"] / answer["seconds"] for answer in answers["4 megapixels"]]
    return {
        "outside_network_share": median(outside),
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
    image_rgb, _ = make_sample(SIDE_PX, SIDE_PX)
    photo = write_photo(image_rgb, LARGE, folder)
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


def write_photo(image_rgb: np.ndarray, times: int, folder: Path) -> Path:
    """A JPEG file of the photo laid out `times` x `times`, mirrored so that no seam looks like a defect."""
    height, width = ((times - 1) * size for size in image_rgb.shape[:2])
    path = folder / f"photo_{times * times}mp.jpg"
    Image.fromarray(np.pad(image_rgb, ((0, height), (0, width), (0, 0)), mode="symmetric")).save(path, quality=90)
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
        "times as fast": ["climb_speedup", "climb_speedup_all_tiles", "grad_cam_speedup"],
        "share of time": ["floor_share", "outside_network_share", "log_share"],
        "times as long as for 1 MP": ["growth_4mp", "growth_25mp"],
        "seconds": ["seconds_1mp", "seconds_4mp", "seconds_25mp", "seconds_click"],
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
        f"torch {machine['torch']}{memory}; red: the aim"
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

    def keep(more: dict) -> None:
        """Written after every part: whoever interrupts the last one, the longest, keeps the others."""
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
