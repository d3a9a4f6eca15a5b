"""Options of ``pytest bench``, and one test per shape, cell, mode, dtype, threads and library.

pytest bench [--points short|all|BLOCK] [--cells rnn gru lstm] [--modes forward training]
             [--dtypes float32 bfloat16 int8] [--threads 1 2] [--seconds 0.5]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grid import chosen_points, tasks

from fastrnn.tools.benchmark.measure import Measurement, measure
from fastrnn.tools.benchmark.peers import installed_libraries
from fastrnn.tools.benchmark.shapes import CELLS, DTYPES, MODES, Task


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastrnn")
    group.addoption("--points", default="short", help="short, all, or a block of shapes")
    group.addoption("--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL")
    group.addoption("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    group.addoption("--dtypes", nargs="+", default=["float32"], choices=DTYPES, metavar="DTYPE")
    group.addoption(
        "--threads",
        nargs="+",
        type=int,
        default=[torch.get_num_threads()],
        metavar="N",
        help="CPU threads",
    )
    group.addoption("--seconds", type=float, default=0.5, help="time per library and task")


def pytest_configure(config: pytest.Config) -> None:
    for name, values in (
        ("threads", config.getoption("threads")),
        ("seconds", [config.getoption("seconds")]),
    ):
        for value in values:
            if not value > 0:
                raise pytest.UsageError(f"--{name} must be above 0, got {value}")
    try:
        chosen_points(config.getoption("points"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    axes = [option(name) for name in ("cells", "modes", "dtypes", "threads")]
    metafunc.parametrize(
        ("task", "library"),
        [
            pytest.param(task, library, id=f"{task.name}-{library.name}".replace(" ", "-"))
            for task in tasks(chosen_points(option("points")), *axes)
            for library in installed_libraries()
            if library.supports(task)
        ],
    )


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Task], Measurement]:
    """Measures a task with all libraries, interleaved, at its first test, and caches the result."""
    seconds = request.config.getoption("seconds")
    known: dict[Task, Measurement] = {}

    def measured(task: Task) -> Measurement:
        if task not in known:
            known[task] = measure(task, installed_libraries(), seconds)
        return known[task]

    return measured
