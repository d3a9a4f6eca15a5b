"""Shapes to measure on the CPU (`GRID`, block by block, and `SHORT`, the short list), and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from fastrnn.tools.benchmark.peers import FASTRNN
from fastrnn.tools.benchmark.shapes import Shape, Task


def _points() -> Iterator[Shape]:
    for steps, hidden in product((1, 15, 100), (64, 128, 256, 512, 1024)):
        yield Shape("latency", steps, 1, hidden, hidden)
    for steps in (1, 15, 100):
        yield Shape("latency", steps, 1, 250, 200)
    yield Shape("long", 1000, 1, 128, 128)
    for steps, batch, hidden in product((50, 100), (8, 16, 32), (64, 128, 256)):
        yield Shape("training", steps, batch, hidden, hidden)
    for steps, batch, hidden, layers in product((35, 50), (20, 64), (200, 500, 650, 1500), (1, 2)):
        yield Shape("language", steps, batch, hidden, hidden, layers)
    for batch, hidden in product((16, 64), (512, 1024)):
        yield Shape("deepbench", 25, batch, hidden, hidden)
    for batch in (1, 4):
        yield Shape("deepbench", 150, batch, 256, 256)
    for steps in (87, 113):
        yield Shape("deep", steps, 16, 1, 128, 3, True)
    for steps in (100, 500):
        yield Shape("packed", steps, 16, 128, 128, 2, packed=True)
    yield Shape("overhead", 1, 1, 8, 8)  # almost no arithmetic: the cost of a call
    for batch, hidden in ((1, 8), (1, 256), (64, 256)):
        yield Shape("overhead", 1, batch, hidden, hidden, single=True)


GRID = tuple(_points())
#: one shape per kind of workload, measured in a few minutes
SHORT = (
    Shape("latency", 100, 1, 64, 64),
    Shape("latency", 100, 1, 256, 256),
    Shape("long", 1000, 1, 128, 128),
    Shape("training", 100, 16, 128, 128),
    Shape("training", 100, 32, 256, 256),
    Shape("language", 35, 20, 650, 650),
    Shape("deepbench", 25, 64, 512, 512),
    Shape("deep", 87, 16, 1, 128, 3, True),
    Shape("packed", 100, 16, 128, 128, 2, packed=True),
    Shape("overhead", 1, 1, 8, 8),
    Shape("overhead", 1, 1, 8, 8, single=True),
)


def chosen_points(name: str) -> tuple[Shape, ...]:
    """Returns the shapes that ``--points`` selects.

    Args:
        name: ``short``, ``all`` or the name of a block.

    Raises:
        ValueError: no block has this name.
    """
    if name == "short":
        return SHORT
    points = tuple(point for point in GRID if name in ("all", point.block))
    if not points:
        blocks = ", ".join(dict.fromkeys(point.block for point in GRID))
        raise ValueError(
            f"--points must be short, all or a block of shapes ({blocks}), got {name!r}"
        )
    return points


def tasks(
    points: Sequence[Shape],
    cells: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    threads: Sequence[int],
) -> list[Task]:
    """Returns the tasks of all combinations that fastrnn supports, without repetitions.

    The number of threads changes least often, because every change starts or ends threads.
    """
    combinations = product(threads, dtypes, points, cells, modes)
    found = [
        Task(cell, mode, point, count, dtype) for count, dtype, point, cell, mode in combinations
    ]
    return [task for task in dict.fromkeys(found) if FASTRNN.supports(task)]
