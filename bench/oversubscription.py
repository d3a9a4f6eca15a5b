"""Time per call on a busy machine, fastrnn compared with torch.nn.

    python bench/oversubscription.py [--seconds 3] [--json FILE]

A call is timed alone, then with busy processes running, and with more threads than CPUs. With k
busy processes on C CPUs, the fair share of n threads is C n / (n + k) CPUs; `fair` is the slowdown
that follows from it. `cost` is the measured slowdown divided by `fair`. Times are means, so that
long waits count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastrnn
from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import FASTRNN

#        cell   T    B   I = H
SHAPES = [("LSTM", 100, 1, 128), ("GRU", 100, 16, 128), ("RNN", 1000, 1, 64), ("LSTM", 25, 64, 512)]


def burn() -> None:
    """Keeps a CPU busy for ever."""
    while True:
        sum(range(10**6))


def mean_ms(call: Callable[[], object], seconds: float) -> float:
    """Mean time per call, measured for about ``seconds`` seconds."""
    call()
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        call()
        count += 1
    return (time.perf_counter() - start) / count * 1e3


def forward(library: Any, cell: str, steps: int, batch: int, size: int) -> Callable[[], object]:
    torch.manual_seed(0)
    layer, x = getattr(library, cell)(size, size), torch.randn(steps, batch, size)

    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time per measurement")
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    options = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    print(f"{cpus} CPUs, torch {torch.__version__}, fastrnn {fastrnn.__version__}")
    print(
        f"{'library':8} {'shape':22} {'threads':>7} {'busy':>4} {'ms':>9} {'alone ms':>9} "
        f"{'slower':>7} {'fair':>5} {'cost':>5}"
    )
    results = []
    for cell, steps, batch, size in SHAPES:
        for name, library in (("torch", nn), ("fastrnn", fastrnn)):
            call = forward(library, cell, steps, batch, size)
            torch.set_num_threads(cpus)
            alone = mean_ms(call, options.seconds)
            for threads, busy in ((cpus, 1), (cpus, cpus), (2 * cpus, 0), (2 * cpus, 1)):
                torch.set_num_threads(threads)
                others = [multiprocessing.Process(target=burn, daemon=True) for _ in range(busy)]
                for other in others:
                    other.start()
                loaded = mean_ms(call, options.seconds)
                for other in others:
                    other.terminate()
                    other.join()
                fair = (cpus + busy) / cpus
                line = {
                    "library": name,
                    "shape": f"{cell} T{steps} B{batch} H{size}",
                    "threads": threads,
                    "busy": busy,
                    "ms": loaded,
                    "alone_ms": alone,
                    "fair": fair,
                    "cost": loaded / alone / fair,
                }
                results.append(line)
                print(
                    f"{name:8} {line['shape']:22} {threads:7} {busy:4} {loaded:9.3f} {alone:9.3f} "
                    f"{loaded / alone:7.2f} {fair:5.2f} {line['cost']:5.2f}",
                    flush=True,
                )
    if options.json:
        document = {"machine": machine(cpus, [FASTRNN]), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
