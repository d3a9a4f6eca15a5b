"""Searches for sizes that are slow: fastrnn's time per operation over every H, B or I.

    python bench/sweep.py [--axis H] [--cell lstm] [--mode forward] [--every 1] [--T 50] [--B 16]
                          [--H 128] [--passes 5] [--threads 2] [--out DIR]

H runs over 1 ... 300 and then 2^k - 1, 2^k, 2^k + 1 up to 1025 (with I = H), B over 1 ... 40, I
over 1 ... H. All sizes are measured in several passes, each in another order, and the fastest call
counts, so that a busy moment of the machine does not look like a slow size. Prints the sizes whose
time is more than 15% above the median of their neighbours, five on each side. Writes a picture and
the figures to --out: sweep-AXIS-CELL-MODE.png and .json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import FASTRNN
from fastrnn.tools.benchmark.shapes import CELLS, MODES, Shape, Task

AXES = ("H", "B", "I")
SPIKE = 1.15
NEIGHBOURS = 5  # on each side; fewer near the ends
CALLS = 3  # timed calls per pass


def sizes(axis: str, hidden: int, every: int) -> list[int]:
    """Sizes along an axis, every ``every``-th one."""
    if axis == "H":
        return [
            *range(1, 301, every),
            *(2**k + offset for k in (9, 10) for offset in (-1, 0, 1)),
        ]
    return list(range(1, (40 if axis == "B" else hidden) + 1, every))


def point(axis: str, size: int, steps: int, batch: int, hidden: int) -> Shape:
    """Shape with ``size`` on the axis."""
    if axis == "H":
        return Shape("sweep", steps, batch, size, size)
    if axis == "B":
        return Shape("sweep", steps, size, hidden, hidden)
    return Shape("sweep", steps, batch, size, hidden)


def fastest(tasks: Sequence[Task], passes: int) -> list[float]:
    """Seconds of each task's fastest call."""
    calls = [FASTRNN.prepare(task) for task in tasks]
    best = [float("inf")] * len(calls)
    for _ in range(passes):
        for index in random.sample(range(len(calls)), len(calls)):
            calls[index]()  # untimed
            for _ in range(CALLS):
                start = time.perf_counter()
                calls[index]()
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def spikes(values: Sequence[float]) -> dict[int, float]:
    """Indices of slow sizes, with their value divided by the median of their neighbours."""
    found = {}
    for place in range(1, len(values) - 1):
        reach = min(NEIGHBOURS, place, len(values) - 1 - place)
        around = [*values[place - reach : place], *values[place + 1 : place + 1 + reach]]
        over = values[place] / statistics.median(around)
        if over > SPIKE:
            found[place] = over
    return found


def draw(path: Path, document: dict[str, Any]) -> None:
    """Plots the time per operation over the sizes, slow sizes in red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = document["results"]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, chosen in (("tab:blue", results), ("tab:red", [r for r in results if r["over"]])):
        axes.plot(
            [result["size"] for result in chosen],
            [result["ns_per_kflop"] for result in chosen],
            "." if color == "tab:red" else ".-",
            color=color,
            linewidth=0.7,
        )
    axes.set_yscale("log")
    axes.set_xscale("log" if document["axis"] == "H" else "linear")
    axes.set_xlabel(document["axis"])
    axes.set_ylabel("ns per 1000 operations")
    axes.set_title(document["title"])
    axes.grid(alpha=0.3, which="both")
    about = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    figure.supxlabel(about, fontsize=6)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=AXES, default="H")
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--mode", choices=MODES, default="forward")
    parser.add_argument("--every", type=int, default=1, help="measure only every N-th size")
    parser.add_argument("--T", type=int, default=50, help="steps")
    parser.add_argument("--B", type=int, default=16, help="batch, unless B is the axis")
    parser.add_argument("--H", type=int, default=128, help="hidden size, unless H is the axis")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder (default: the current one)"
    )
    options = parser.parse_args()
    for name in ("every", "T", "B", "H", "passes", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)

    axis, cell, mode = options.axis, options.cell, options.mode
    chosen = sizes(axis, options.H, options.every)
    tasks = [
        Task(cell, mode, point(axis, size, options.T, options.B, options.H), options.threads)
        for size in chosen
    ]
    seconds = fastest(tasks, options.passes)
    per_kflop = [s / task.flops * 1e12 for s, task in zip(seconds, tasks, strict=True)]
    found = spikes(per_kflop)
    title = f"{cell} {mode}, T = {options.T}"
    title += "".join(f", {name} = {getattr(options, name)}" for name in "BH" if name != axis)
    document = {
        "title": title,
        "axis": axis,
        "machine": machine(options.threads, (FASTRNN,)),
        "results": [
            {"size": size, "ms": s * 1e3, "ns_per_kflop": value, "over": found.get(place)}
            for place, (size, s, value) in enumerate(zip(chosen, seconds, per_kflop, strict=True))
        ],
    }
    for place, over in found.items():
        print(f"{axis} = {chosen[place]:<5} {over - 1:+.0%} above its neighbours")
    print(f"{title}: {len(found)} of {len(chosen)} sizes are slow")
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"sweep-{axis}-{cell}-{mode}"
    (options.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(options.out / f"{name}.png", document)


if __name__ == "__main__":
    main()
