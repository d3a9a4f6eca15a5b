"""Cost of a larger shape relative to a smaller one, both run by fastrnn.

    python bench/relative_cost.py [--seconds 0.3] [--threads 2] [--json FILE]

Compares packed sequences (half the rows) with padded ones, two directions with one, stacked layers
with one, and ten times the steps with the steps. The ratio divides the larger shape's time by the
expected multiple of the smaller shape's time; above 1, it costs more than expected. Calls are
interleaved (`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import FASTRNN
from fastrnn.tools.benchmark.shapes import CELLS, MODES, Shape, Task
from fastrnn.tools.benchmark.timing import interleaved

Comparison = tuple[str, Shape, Shape, int]  # title, smaller shape, larger shape, expected multiple
LONGEST_TRAINING = 100_000  # steps; every step saves values for the backward pass


def comparisons() -> Iterator[Comparison]:
    """Yields all comparisons."""
    for steps, batch, size in ((100, 16, 128), (100, 1, 128), (50, 32, 256)):
        one = Shape("relative cost", steps, batch, size, size)
        if batch > 1:
            yield "packed", one, replace(one, packed=True), 1
        yield "both directions", one, replace(one, bidirectional=True), 2
        for layers in (2, 4):
            yield f"{layers} layers", one, replace(one, layers=layers), layers
    for steps in (1_000, 10_000, 100_000):
        one = Shape("relative cost", steps, 1, 64, 64)
        yield "10 times the steps", one, replace(one, steps=10 * steps), 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="time per shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(options.threads, [FASTRNN])
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':58}{'ms':>10}{'larger ms':>12}   of the expected cost")
    results = []
    for title, smaller, larger, times in comparisons():
        for mode in MODES:
            if mode == "training" and larger.steps > LONGEST_TRAINING:
                continue
            for cell in CELLS:
                calls = {
                    point.label: FASTRNN.prepare(Task(cell, mode, point, options.threads))
                    for point in (smaller, larger)
                }
                samples = interleaved(calls, options.seconds)
                small_time, large_time = (
                    statistics.median(samples[p.label]) for p in (smaller, larger)
                )
                ratio = large_time / (times * small_time)
                results.append(
                    {
                        "comparison": title,
                        "cell": cell,
                        "mode": mode,
                        "shape": smaller.label,
                        "larger": larger.label,
                        "ms": small_time * 1e3,
                        "larger_ms": large_time * 1e3,
                        "times": times,
                        "ratio": ratio,
                    }
                )
                print(
                    f"{title:20}{cell:5}{mode:9}{larger.label:24}{small_time * 1e3:10.3f}"
                    f"{large_time * 1e3:12.3f}   {ratio:.2f}",
                    flush=True,
                )
    if options.json is not None:
        document = {"machine": about, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
