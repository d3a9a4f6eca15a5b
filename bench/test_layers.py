"""pytest-benchmark tables, fastrnn beside torch.nn in each group.

pytest bench/test_layers.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

import pytest
from grid import CELLS, MODES, SHORT, Point
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import LIBRARIES, workload


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("point", SHORT, ids=lambda p: p.label.replace(" ", "-"))
def test_layer(
    benchmark: BenchmarkFixture, point: Point, cell: str, mode: str, library: str
) -> None:
    benchmark.group = f"{cell} {mode} {point.label}"
    call = workload(library, cell, mode, point)
    call()
    benchmark(call)
