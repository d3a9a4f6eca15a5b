"""Peak memory of a training step, fastrnn compared with torch.nn, each in a separate process.

    python bench/memory.py [--json FILE]        Linux only

A step is forward and backward; its gradients are kept. The result is the peak of the second step
minus the memory held before the first step, when the model and its input exist. Memory that a
library keeps for later calls is therefore included. A step on a small shape runs first, so that
code loaded on first use is not included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import fastrnn
from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import Library, installed_libraries
from fastrnn.tools.benchmark.shapes import CELLS, Shape, Task

POINTS = (
    Shape("training", 100, 16, 128, 128),
    Shape("training", 100, 32, 256, 256),
    Shape("language", 35, 20, 650, 650, 2),
    Shape("deepbench", 25, 64, 512, 512),
    Shape("deep", 87, 16, 1, 128, 3, True),
    Shape("packed", 500, 16, 128, 128, 2, packed=True),
    Shape("long", 1000, 1, 128, 128),
)
SMALL = Shape("training", 4, 2, 64, 64)


def resident(field: str) -> int:
    """Bytes that the process holds (VmRSS), or the largest number it has held (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(library: Library, task: Task) -> int:
    """Peak memory in bytes. Call it once per process."""
    library.prepare(Task(task.cell, task.mode, SMALL, task.threads))()  # loads code, starts threads
    call = library.prepare(task)
    before = resident("VmRSS")
    call()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # library, cell, index of point
    options = parser.parse_args()
    threads = torch.get_num_threads()
    libraries = {library.name: library for library in installed_libraries()}
    if options.one is not None:
        name, cell, index = options.one
        print(peak(libraries[name], Task(cell, "training", POINTS[int(index)], threads)))
        return
    print(f"torch {torch.__version__}, fastrnn {fastrnn.__version__}, {threads} threads, float32")
    print(f"{'':34}{'fastrnn':>12}{'torch':>12}   fastrnn / torch")
    lines = []
    for index, point in enumerate(POINTS):
        for cell in CELLS:
            megabytes = {}
            for name in ("fastrnn", "torch"):
                command = [sys.executable, __file__, "--one", name, cell, str(index)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                megabytes[name] = int(output.split()[-1]) / 2**20
            ratio = megabytes["fastrnn"] / megabytes["torch"]
            lines.append({"cell": cell, "shape": point.label, "MB": megabytes, "ratio": ratio})
            print(
                f"{cell:5}{point.label:29}{megabytes['fastrnn']:9.1f} MB"
                f"{megabytes['torch']:9.1f} MB   {ratio:.2f}",
                flush=True,
            )
    if options.json is not None:
        document = {"machine": machine(threads, libraries.values()), "results": lines}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
