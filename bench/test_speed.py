"""Tables of fastrnn and its peers by pytest-benchmark, one group per task.

A test fails if its library's results differ too much from float64. The libraries of a group are
measured interleaved. pytest-benchmark times one test after the other, so the first test of a group
measures all libraries, and a replaying clock then gives each test its own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastrnn.tools.benchmark.machine_name import machine_name
from fastrnn.tools.benchmark.measure import Measurement, machine, plan
from fastrnn.tools.benchmark.peers import Library, installed_libraries
from fastrnn.tools.benchmark.shapes import Task


class ReplayClock:
    """Clock that replays recorded times (seconds): each pair of readings differs by one of them."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        self._readings = (reading for sample in samples for reading in (0.0, sample))

    def __call__(self) -> float:
        return next(self._readings)


clock = ReplayClock()


@pytest.mark.benchmark(timer=clock)
def test_speed(
    benchmark: BenchmarkFixture,
    measured: Callable[[Task], Measurement],
    task: Task,
    library: Library,
) -> None:
    found = measured(task)
    if library.name in found.rejected:
        pytest.fail(found.rejected[library.name], pytrace=False)
    benchmark.group = task.name
    benchmark.extra_info |= {
        "library": library.name,
        "cell": task.cell,
        "mode": task.mode,
        "label": task.shape.label,
        "dtype": task.dtype,
        "threads": task.threads,
        "point": asdict(task.shape),
        "flops": task.flops,
        "intensity": task.shape.intensity(task.cell, task.dtype),
        "error": found.errors[library.name],
        "plan": plan(task),
        "fma_peak": found.fma_peak,
        "machine": machine(task.threads, installed_libraries(), task.dtype),
        "machine_name": machine_name(),
    }
    samples = found.samples[library.name]
    clock.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))
