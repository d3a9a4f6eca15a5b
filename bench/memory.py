"""Peak memory of a training step, fastrnn compared with torch.nn, each in a separate process.

    python bench/memory.py [--json FILE] [--long | --recompute]        Linux only

A step is forward and backward; its gradients are kept. The result is the peak of the second step
minus the memory held before the first step, when the model and its input exist. Memory that a
library keeps for later calls is therefore included. A step on a small shape runs first, so that
code loaded on first use is not included.

The last lines are one sequence of a million steps, trained as a whole, as a whole with
``recompute="full"`` (which torch.nn does not have), and in chunks of `CHUNK` steps with
`fastrnn.tbptt`. ``--long`` measures these lines only. The result is the peak of the first step
there, because a second one would only take time. They use the LSTM, for which torch.nn needs the
least memory per step; its RNN and GRU need several gigabytes for a million steps.

``--recompute`` measures the time of a training step of fastrnn with ``recompute="full"`` relative
to one without. The calls are interleaved (`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

import fastrnn
from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import Library, installed_libraries
from fastrnn.tools.benchmark.shapes import CELLS, Shape, Task
from fastrnn.tools.benchmark.timing import interleaved

POINTS = (
    Shape("training", 100, 16, 128, 128),
    Shape("training", 100, 32, 256, 256),
    Shape("language", 35, 20, 650, 650, 2),
    Shape("deepbench", 25, 64, 512, 512),
    Shape("deep", 87, 16, 1, 128, 3, True),
    Shape("packed", 500, 16, 128, 128, 2, packed=True),
    Shape("long", 1000, 1, 128, 128),
)
LONG = Shape("long", 1_000_000, 1, 16, 16)
CHUNK = 1000
SMALL = Shape("training", 4, 2, 64, 64)

#: how each line of the table trains: a layer of the grid, or the long sequence
LAYER, WHOLE, RECOMPUTE, CHUNKS = "layer", "whole sequence", "recompute", f"tbptt {CHUNK}"

#: T, B and I = H of the layers whose time with recompute is measured
TIMED = ((100, 16, 128), (1000, 1, 128), (1000, 16, 128), (10_000, 1, 64), (500, 32, 512))


def resident(field: str) -> int:
    """Bytes that the process holds (VmRSS), or the largest number it has held (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(prepare: Callable[[Shape], Callable[[], object]], shape: Shape, steps: int) -> int:
    """Peak memory in bytes of the last of some steps. Call it once per process."""
    prepare(SMALL)()  # loads code, starts threads
    step = prepare(shape)
    before = resident("VmRSS")
    for _ in range(steps - 1):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step()
    return resident("VmHWM") - before


def layer_peak(library: Library, cell: str, shape: Shape) -> int:
    """Peak memory of a training step of one layer, with gradients of the input."""
    threads = torch.get_num_threads()
    return peak(lambda shape: library.prepare(Task(cell, "training", shape, threads)), shape, 2)


def sequence_peak(library: Library, cell: str, shape: Shape, kind: str) -> int:
    """Peak memory of a training step on a sequence, trained in this way."""

    def prepare(shape: Shape) -> Callable[[], object]:
        classes = {"fastrnn": fastrnn, "torch": nn}[library.name]
        layer = getattr(classes, cell.upper())(shape.input_size, shape.hidden_size)
        x = torch.randn(shape.steps, shape.batch, shape.input_size)
        y = torch.randn(shape.steps, shape.batch, shape.hidden_size)
        if kind == RECOMPUTE:
            layer.recompute = "full"  # an attribute without effect for torch.nn
        if kind == CHUNKS:
            return lambda: fastrnn.tbptt(layer, x, y, mse_loss, CHUNK)
        return lambda: mse_loss(layer(x)[0], y).backward()

    return peak(prepare, shape, 1)


def print_times() -> None:
    """Prints the time of a training step with recompute relative to one without."""
    for steps, batch, size in TIMED:
        for cell in CELLS:
            module = getattr(fastrnn, cell.upper())
            x = torch.randn(steps, batch, size, requires_grad=True)

            def step(layer: nn.Module, x: torch.Tensor = x) -> None:
                layer(x)[0].sum().backward()

            layers = {name: module(size, size, recompute=name) for name in ("none", "full")}
            calls = {name: functools.partial(step, layer) for name, layer in layers.items()}
            for call in calls.values():
                call()
            samples = interleaved(calls, 0.5)
            none, full = (statistics.median(samples[name]) for name in ("none", "full"))
            print(
                f"{cell:5}T={steps} B={batch} I=H={size:<12}{none * 1e3:9.2f} ms"
                f"{full * 1e3:9.2f} ms   {full / none:.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    parser.add_argument("--long", action="store_true", help="measures the long sequence only")
    parser.add_argument("--recompute", action="store_true", help="measures the time of recompute")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # library, cell, index of line
    options = parser.parse_args()
    lines = [(LAYER, point) for point in POINTS] + [
        (kind, LONG) for kind in (WHOLE, RECOMPUTE, CHUNKS)
    ]
    libraries = {library.name: library for library in installed_libraries()}
    if options.one is not None:
        name, cell, index = options.one
        kind, shape = lines[int(index)]
        if kind == LAYER:
            print(layer_peak(libraries[name], cell, shape))
        else:
            print(sequence_peak(libraries[name], cell, shape, kind))
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, fastrnn {fastrnn.__version__}, {threads} threads, float32")
    if options.recompute:
        print_times()
        return
    print(f"{'':44}{'fastrnn':>12}{'torch':>12}   fastrnn / torch")
    results = []
    for index, (kind, shape) in enumerate(lines):
        if options.long and kind == LAYER:
            continue
        label = shape.label if kind == LAYER else f"{shape.label} {kind}"
        for cell in CELLS if kind == LAYER else ("lstm",):
            megabytes = {}
            for name in ("fastrnn", "torch"):
                command = [sys.executable, __file__, "--one", name, cell, str(index)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                megabytes[name] = int(output.split()[-1]) / 2**20
            ratio = megabytes["fastrnn"] / megabytes["torch"]
            results.append({"cell": cell, "shape": label, "MB": megabytes, "ratio": ratio})
            print(
                f"{cell:5}{label:39}{megabytes['fastrnn']:9.1f} MB"
                f"{megabytes['torch']:9.1f} MB   {ratio:.2f}",
                flush=True,
            )
    if options.json is not None:
        document = {"machine": machine(threads, libraries.values()), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
