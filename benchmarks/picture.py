"""The picture of a benchmark, and what is wanted of its figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure, SubFigure

DEFECTS = {"answer_s": "in a third", "answer_all_tiles_s": "everywhere"}  # key -> the squares that are the sample
# What is wanted, and whether it is the least or the most.
AIMS = {
    "openvino_forward_speedup": (3.5, "at least"),
    "openvino_step_speedup": (2.8, "at least"),
    "climb_speedup": (15, "at least"),
    "climb_speedup_all_tiles": (6, "at least"),
    "floor_share": (0.6, "at least"),
    "outside_network_share": (0.12, "at most"),
    "log_share": (0.05, "at most"),
    "growth_25mp": (27, "at most"),
    "peak_host_mb_25mp": (1800, "at most"),
    "click_s": (0.3, "at most"),
    "first_answer_s": (5, "at most"),
    "cpu_install_mb": (900, "at most"),
}


def draw(results: dict, path: Path, steps: int) -> None:
    """Write the picture: ratios and single figures with their aims, seconds against megapixels.

    Args:
        results: what bench.json holds; what is not there is not drawn.
        steps: T of the ratios.
    """
    figure = Figure(figsize=(17, 10), layout="constrained")
    bars, lines = figure.subfigures(2, 1)
    draw_bars(results, bars)
    if "answer_s" in results:
        draw_answers(results, lines)
    machine = results["machine"]
    figure.suptitle(
        f"{', '.join(results['defects'])}; {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"ours by {' and '.join(sorted({*results['engines'].values()}))}; ratios at T = {steps}; red: the aim"
    )
    figure.savefig(path, dpi=110)


def draw_bars(results: dict, figure: SubFigure) -> None:
    """A bar for each single figure, by unit."""
    groups = {
        "times as fast": [
            "openvino_forward_speedup", "openvino_step_speedup", "climb_speedup", "climb_speedup_all_tiles", "grad_cam_speedup",
        ],
        "share of time": ["floor_share", "outside_network_share", "log_share"],
        "times as long": ["growth_25mp"],
        "seconds": ["click_s", "start_s", "first_answer_s"],
        "MB": ["cpu_install_mb", "peak_host_mb_25mp", "peak_gpu_mb"],
    }
    groups = {unit: [key for key in keys if key in results] for unit, keys in groups.items()}
    groups = {unit: keys for unit, keys in groups.items() if keys}
    all_axes = figure.subplots(1, len(groups), squeeze=False, width_ratios=[len(keys) + 1 for keys in groups.values()])[0]
    for axes, (unit, keys) in zip(all_axes, groups.items()):
        labels = []
        for place, key in enumerate(keys):
            label = key.replace("_", "\n")
            if key in AIMS:
                aim, sense = AIMS[key]
                axes.hlines(aim, place - 0.45, place + 0.45, color="tab:red", linewidth=2)
                label += f"\n({sense} {aim:g})"
            labels.append(label)
        drawn = axes.bar(range(len(keys)), [results[key] for key in keys], color="lightsteelblue")
        axes.bar_label(drawn, fmt="{:.3g}", label_type="center")
        axes.set_xticks(range(len(keys)), labels)
        axes.set_title(unit)
        axes.margins(y=0.15)
        axes.tick_params(axis="x", labelsize=8)


def draw_answers(results: dict, figure: SubFigure) -> None:
    """Seconds against megapixels, a line for each T."""
    for axes, (key, where) in zip(figure.subplots(1, 2, sharey=True), DEFECTS.items()):
        for steps in dict.fromkeys(steps for seconds in results[key].values() for steps in seconds):
            points = [(int(size), seconds[steps]) for size, seconds in results[key].items() if steps in seconds]
            axes.plot(*zip(*points), marker="o", label=f"T = {steps}")
            for point in points:
                axes.annotate(f"{point[1]:.3g}", point, xytext=(0, 5), textcoords="offset points", ha="center")
        axes.set(xscale="log", yscale="log", xlabel="megapixels", ylabel="seconds")
        axes.set_title(f"whole answers, defects {where}")
        axes.set_xticks([*map(int, results[key])], [*results[key]])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(0.08, 0.15)
        axes.grid(alpha=0.3)
        axes.legend()
