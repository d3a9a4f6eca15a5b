"""One task by all libraries: first whether they agree, then how long they take, in turns."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastrnn
from fastrnn import _C

from .agreement import Disagreement, Referee
from .peers import FASTRNN, Library
from .shapes import Task
from .timing import fma_peak, interleaved

_PLAN_CELLS = {"rnn": "rnn_tanh"}


@dataclass
class Measurement:
    """What came out, by the libraries' names.

    Args:
        task: what they did.
        samples: seconds of every call; medians count.
        errors: the largest one against float64, of those that agree.
        refused: why a library was not timed.
        fma_peak: what the machine reached just before, float32 GFLOP/s (`timing.fma_peak`); the
            largest of a run is the one to compare with.
    """

    task: Task
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fma_peak: float = 0.0

    @property
    def medians(self) -> dict[str, float]:
        """Seconds a call."""
        return {name: statistics.median(values) for name, values in self.samples.items()}

    @property
    def ratio(self) -> float | None:
        """The best peer's time over fastrnn's: above 1 fastrnn is the fastest."""
        times = self.medians
        own = times.pop(FASTRNN.name, None)
        return min(times.values()) / own if own and times else None


def measure(task: Task, libraries: Iterable[Library], seconds: float) -> Measurement:
    """Checks and times a task.

    Args:
        task: what to do.
        libraries: by whom; those that do no such tasks are left out.
        seconds: to spend on each.
    """
    found = Measurement(task, fma_peak=fma_peak(task.threads))
    referee, calls = Referee(task), {}
    for library in libraries:
        if not library.does(task):
            continue
        call = library.prepare(task)
        try:
            found.errors[library.name] = referee.judge(library.title, call.results())
        except Disagreement as difference:
            found.refused[library.name] = str(difference)
        else:
            calls[library.name] = call
    if calls:
        found.samples = interleaved(calls, seconds)
    return found


def plan(task: Task) -> dict[str, Any]:
    """How fastrnn walks the first layer: ``fastrnn._C.plan`` (of the backward pass in training)."""
    point = task.point
    return dict(
        _C.plan(
            _PLAN_CELLS.get(task.cell, task.cell),
            point.steps,
            point.batch,
            point.input_size,
            point.hidden_size,
            threads=task.threads,
            training=task.mode == "training",
            directions=2 if point.bidirectional else 1,
            layers=point.layers,
        )
    )


def machine(threads: int, libraries: Iterable[Library]) -> dict[str, Any]:
    """Where and with what it is measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "isa": _C.cpu_capability(),
        "threads": threads,
        "dtype": "float32",
        "python": platform.python_version(),
        "fastrnn": fastrnn.__version__,
        "torch": torch.__version__,
        **{library.name: library.version for library in libraries if library.installed},
    }
