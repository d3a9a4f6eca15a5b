"""Measures one task with all libraries: checks that they agree, then times interleaved calls."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastrnn
from fastrnn import _C

from .agreement import Disagreement, Referee
from .machine_name import cpu_facts
from .peers import FASTRNN, Library
from .shapes import Task
from .timing import fma_peak, interleaved

_PLAN_CELLS = {"rnn": "rnn_tanh"}


@dataclass
class Measurement:
    """Results of one task. The dictionaries are keyed by the names of the libraries.

    Args:
        task: the task.
        samples: seconds of every timed call. Reports use the medians.
        errors: largest relative error against float64, of the libraries that agree.
        rejected: reason why a library was not timed.
        fma_peak: peak speed measured just before the task, float32 GFLOP/s (`timing.fma_peak`).
            Reports compare with the largest peak of a run.
    """

    task: Task
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    fma_peak: float = 0.0

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds per call."""
        return {name: statistics.median(values) for name, values in self.samples.items()}

    @property
    def ratio(self) -> float | None:
        """Time of the fastest other library / time of fastrnn; above 1 fastrnn is fastest."""
        times = self.medians
        own = times.pop(FASTRNN.name, None)
        return min(times.values()) / own if own and times else None


def measure(task: Task, libraries: Iterable[Library], seconds: float) -> Measurement:
    """Checks and times a task, with the task's number of threads, which torch keeps afterwards.

    Args:
        task: the task.
        libraries: the libraries to measure. Skips those that do not support the task.
        seconds: time to spend per library.
    """
    torch.set_num_threads(task.threads)
    found = Measurement(task, fma_peak=fma_peak(task.threads))
    referee, calls = Referee(task), {}
    for library in libraries:
        if not library.supports(task):
            continue
        call = library.prepare(task)
        try:
            found.errors[library.name] = referee.judge(library.title, call.results())
        except Disagreement as difference:
            found.rejected[library.name] = str(difference)
        else:
            calls[library.name] = call
    if calls:
        found.samples = interleaved(calls, seconds)
    return found


def plan(task: Task) -> dict[str, Any]:
    """Returns ``fastrnn._C.plan`` of the first layer, of the backward pass in training."""
    shape = task.shape
    return dict(
        _C.plan(
            _PLAN_CELLS.get(task.cell, task.cell),
            shape.steps,
            shape.batch,
            shape.input_size,
            shape.hidden_size,
            dtype=task.dtype,
            threads=task.threads,
            training=task.mode == "training",
            directions=2 if shape.bidirectional else 1,
            layers=shape.layers,
        )
    )


def machine(threads: int, libraries: Iterable[Library], dtype: str = "float32") -> dict[str, Any]:
    """Returns the CPU, the number of threads, the dtype and the versions behind a measurement."""
    return {
        "cpu": cpu_facts().get("model name") or platform.processor() or platform.machine(),
        "isa": _C.cpu_capability(),
        "threads": threads,
        "dtype": dtype,
        "python": platform.python_version(),
        "fastrnn": fastrnn.__version__,
        "torch": torch.__version__,
        **{library.packages[0]: library.version for library in libraries if library.installed},
    }
