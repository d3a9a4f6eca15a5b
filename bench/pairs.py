"""Two shapes of fastrnn side by side, of which one is to cost no more than so many of the other.

    python bench/pairs.py [--seconds 0.3] [--threads 2] [--json FILE]

Packed sequences of which half would be padding against padded ones, both directions against one,
stacked layers against one (each for as many times the cost), and ten times the steps against the
steps. Both are interleaved (`fastrnn.tools.benchmark.timing`); above 1 the larger shape costs more
per step.
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

Pair = tuple[str, Shape, Shape, int]  # what is asked, the shape, the dearer one, how many times
LONGEST_TRAINING = 100_000  # steps, of which each keeps what backward needs


def pairs() -> Iterator[Pair]:
    """All of them."""
    for steps, batch, size in ((100, 16, 128), (100, 1, 128), (50, 32, 256)):
        one = Shape("pairs", steps, batch, size, size)
        if batch > 1:
            yield "packed", one, replace(one, packed=True), 1
        yield "both directions", one, replace(one, bidirectional=True), 2
        for layers in (2, 4):
            yield f"{layers} layers", one, replace(one, layers=layers), layers
    for steps in (1_000, 10_000, 100_000):
        one = Shape("pairs", steps, 1, 64, 64)
        yield "10 times the steps", one, replace(one, steps=10 * steps), 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the measurements there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(options.threads, [FASTRNN])
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':58}{'ms':>10}{'dearer ms':>12}   of the cost allowed")
    results = []
    for what, one, dearer, times in pairs():
        for mode in MODES:
            if mode == "training" and dearer.steps > LONGEST_TRAINING:
                continue
            for cell in CELLS:
                calls = {
                    point.label: FASTRNN.prepare(Task(cell, mode, point, options.threads))
                    for point in (one, dearer)
                }
                samples = interleaved(calls, options.seconds)
                small, large = (statistics.median(samples[p.label]) for p in (one, dearer))
                ratio = large / (times * small)
                results.append(
                    {
                        "what": what,
                        "cell": cell,
                        "mode": mode,
                        "shape": one.label,
                        "dearer": dearer.label,
                        "ms": small * 1e3,
                        "dearer_ms": large * 1e3,
                        "times": times,
                        "ratio": ratio,
                    }
                )
                print(
                    f"{what:20}{cell:5}{mode:9}{dearer.label:24}{small * 1e3:10.3f}"
                    f"{large * 1e3:12.3f}   {ratio:.2f}",
                    flush=True,
                )
    if options.json is not None:
        document = {"machine": about, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
