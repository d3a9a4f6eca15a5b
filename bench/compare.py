"""fastrnn beside torch.nn: interleaved medians and their ratio, one line a point.

    python bench/compare.py [--points short|all|BLOCK] [--cells rnn gru lstm] [--threads 2]
                            [--seconds 1.0] [--json FILE] [--markdown]

The libraries take turns in random order, in rounds: a pause (so that the other's spinning threads
go to sleep), one untimed call, a few timed ones. The median over all rounds counts. A ratio above
1 means that fastrnn is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grid import CELLS, GRID, MODES, SHORT, Point
from workloads import LIBRARIES, workload

import fastrnn
from fastrnn import _C


def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds a call of each, measured in turns for about `seconds` each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, timed = 12, {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        timed[name] = max(1, min(50, round(seconds / rounds / once)))
        if once * rounds > 3 * seconds:
            rounds = max(4, round(3 * seconds / once))
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            time.sleep(0.015)
            calls[name]()
            for _ in range(timed[name]):
                start = time.perf_counter()
                calls[name]()
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def chosen_points(name: str) -> list[Point]:
    if name == "short":
        return list(SHORT)
    points = [p for p in GRID if name in ("all", p.block)]
    if not points:
        blocks = ", ".join(dict.fromkeys(p.block for p in GRID))
        raise SystemExit(
            f"--points: there is no block {name!r}; choose short, all or one of {blocks}"
        )
    return points


def measure(point: Point, cell: str, mode: str, seconds: float) -> dict[str, Any]:
    calls = {name: workload(name, cell, mode, point) for name in LIBRARIES}
    medians = interleaved(calls, seconds)
    return {
        "block": point.block,
        "point": point.label,
        "cell": cell,
        "mode": mode,
        "torch_ms": medians["torch"] * 1e3,
        "fastrnn_ms": medians["fastrnn"] * 1e3,
        "ratio": medians["torch"] / medians["fastrnn"],
        "gflops": point.flops(cell, mode) / medians["fastrnn"] * 1e-9,
    }


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "isa": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", default="short", help="short, all, or a block of the grid")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time to spend a library and line"
    )
    parser.add_argument("--json", type=Path, help="write the measurements there as well")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    columns = ("cell", "mode", "point", "torch ms", "fastrnn ms", "ratio", "GFLOP/s")
    layout = (
        "| {} | {} | {} | {} | {} | {} | {} |"
        if options.markdown
        else ("{:5} {:9} {:30} {:>10} {:>10} {:>7} {:>8}")
    )
    print(layout.format(*columns))
    if options.markdown:
        print("|---|---|---|--:|--:|--:|--:|")
    results = []
    for point in chosen_points(options.points):
        for cell in options.cells:
            for mode in options.modes:
                line = measure(point, cell, mode, options.seconds)
                results.append(line)
                print(
                    layout.format(
                        cell,
                        mode,
                        point.label,
                        f"{line['torch_ms']:.3f}",
                        f"{line['fastrnn_ms']:.3f}",
                        f"{line['ratio']:.2f}",
                        f"{line['gflops']:.1f}",
                    ),
                    flush=True,
                )
    for cell in options.cells:
        for mode in options.modes:
            ratios = [r["ratio"] for r in results if r["cell"] == cell and r["mode"] == mode]
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"{cell:5} {mode:9} lowest {min(ratios):.2f}  geometric mean {mean:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
