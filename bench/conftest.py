"""Options of ``pytest bench``, and one test per shape, cell, mode and library.

pytest bench [--points short|all|BLOCK] [--cells rnn gru lstm] [--modes forward training]
             [--threads 2] [--seconds 0.5]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grid import chosen_points

from fastrnn.tools.benchmark.measure import Measurement, measure
from fastrnn.tools.benchmark.peers import installed_libraries
from fastrnn.tools.benchmark.shapes import CELLS, MODES, Task


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastrnn")
    group.addoption("--points", default="short", help="short, all, or a block of shapes")
    group.addoption("--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL")
    group.addoption("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    group.addoption("--seconds", type=float, default=0.5, help="time per library and task")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("threads", "seconds"):
        if not config.getoption(name) > 0:
            raise pytest.UsageError(f"--{name} must be above 0, got {config.getoption(name)}")
    try:
        chosen_points(config.getoption("points"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    torch.set_num_threads(config.getoption("threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    tasks = [
        Task(cell, mode, point, option("threads"))
        for point in chosen_points(option("points"))
        for cell in option("cells")
        for mode in option("modes")
    ]
    metafunc.parametrize(
        ("task", "library"),
        [
            pytest.param(task, library, id=f"{task.label}-{library.name}".replace(" ", "-"))
            for task in tasks
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
