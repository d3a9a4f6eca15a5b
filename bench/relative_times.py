"""The command line of the scripts that print times relative to the first of several calls."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import FASTRNN
from fastrnn.tools.benchmark.timing import interleaved


class Task(NamedTuple):
    """Calls to compare.

    Attributes:
        cell, mode, shape: what they compute.
        calls: the calls by their titles; times are relative to that of the first.
    """

    cell: str
    mode: str
    shape: str
    calls: Mapping[str, Callable[[], object]]


def print_times(
    description: str, tasks: Iterable[Task], seconds: float, packages: Sequence[str] = ()
) -> None:
    """Reads the command line, and measures and prints each task.

    Args:
        description: the script's docstring.
        tasks: the tasks, made one after the other.
        seconds: default of the time per call and shape.
        packages: whose versions to report, besides those of fastrnn and torch.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="time per call and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {**machine(options.threads, [FASTRNN]), **{name: version(name) for name in packages}}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for cell, mode, shape, calls in tasks:
        samples = interleaved(calls, options.seconds)
        times = {title: statistics.median(own) for title, own in samples.items()}
        results.append({"cell": cell, "mode": mode, "shape": shape, "seconds": times})
        first = next(iter(times.values()))
        ratios = ", ".join(f"{title} {t / first:.2f}" for title, t in times.items())
        print(f"{cell:5}{mode:10}{shape:17}{first * 1e3:9.2f} ms: {ratios}", flush=True)
    if options.json is not None:
        document = {"machine": about, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
