"""Tasks to measure on a GPU, ordered so that every block of shapes comes early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Final

from fastrnn.tools.benchmark.shapes import CELLS, MODES, Shape

#: float32 without TF32, float32 with it, and the half types
DTYPES: Final = ("bfloat16", "float32", "float16", "tf32")


@dataclass(frozen=True)
class GpuPoint:
    """A shape on a GPU.

    Args:
        point: T, B, I, H, layers, directions.
        cells: cells that are measured with this shape.
        graph: whether the call is captured in a CUDA graph and replayed.
    """

    point: Shape
    cells: tuple[str, ...] = CELLS
    graph: bool = False

    @property
    def label(self) -> str:
        """Label such as ``T128 B1 I512 H256 bi graph``."""
        return self.point.label + (" graph" if self.graph else "")


@dataclass(frozen=True)
class GpuTask:
    """One measurement: a shape, a cell, a dtype and a mode."""

    at: GpuPoint
    cell: str
    dtype: str
    mode: str

    @property
    def label(self) -> str:
        """Unique label such as ``lstm forward float16 T1024 B16 I768 H768``."""
        return f"{self.cell} {self.mode} {self.dtype} {self.at.label}"


def _points() -> Iterator[GpuPoint]:
    def square(block: str, steps: int, batch: int, hidden: int, layers: int = 1) -> Shape:
        return Shape(block, steps, batch, hidden, hidden, layers)

    for steps in (1024, 256, 512, 2048):
        yield GpuPoint(square("flashrnn", steps, 16, 768))
    for batch in (64, 2, 256, 8, 128, 32):
        yield GpuPoint(square("flashrnn", 1024, batch, 768))
    cliffs = list(product((20, 1, 64, 8, 136), (1000, 192, 512, 128, 1024, 160, 2048, 256, 1536)))
    for index in range(len(cliffs)):  # both B and H change often
        batch, hidden = cliffs[index * 11 % len(cliffs)]
        yield GpuPoint(square("cliffs", 512, batch, hidden))
    yield GpuPoint(Shape("small-h", 2058, 62, 16, 168))
    yield GpuPoint(Shape("small-h", 1125, 44, 40, 160))
    yield GpuPoint(square("fastrnns", 100, 64, 512))
    yield GpuPoint(square("deepbench", 25, 64, 1024))
    yield GpuPoint(square("deepbench", 50, 32, 1536), ("lstm",))
    for hidden in (1024, 2816):
        yield GpuPoint(square("deepbench", 1500, 32, hidden), ("gru",))
    for batch, hidden in product((16, 64, 128), (512, 1024, 2048)):
        if (batch, hidden) != (64, 1024):
            yield GpuPoint(square("deepbench", 25, batch, hidden))
    stack = square("stacks", 512, 32, 512, 2)
    for point in (stack, replace(stack, layers=4), replace(stack, layers=1, bidirectional=True)):
        yield GpuPoint(point)
    yield GpuPoint(replace(square("stacks", 512, 32, 1024), proj_size=512), ("lstm",))
    yield GpuPoint(square("stacks", 1600, 64, 384, 5))
    yield GpuPoint(replace(square("packed", 2000, 16, 256, 2), packed=True))
    for graph in (False, True):
        yield GpuPoint(Shape("batch-1", 128, 1, 512, 256, bidirectional=True), graph=graph)


POINTS: Final = tuple(_points())
BLOCKS: Final = tuple(dict.fromkeys(at.point.block for at in POINTS))


def tiny(at: GpuPoint) -> GpuPoint:
    """Smallest shape of the same kind, to test everything except the timing."""
    point = at.point
    small = replace(
        point,
        steps=min(point.steps, 3),
        batch=min(point.batch, 2),
        input_size=min(point.input_size, 4),
        hidden_size=min(point.hidden_size, 5),
        proj_size=min(point.proj_size, 3),
    )
    return replace(at, point=small)


def tasks(
    points: Sequence[GpuPoint],
    cells: Sequence[str] = CELLS,
    dtypes: Sequence[str] = DTYPES,
    modes: Sequence[str] = MODES,
) -> list[GpuTask]:
    """All tasks, in waves: the first shape of every block, then every second shape, and so on.

    A run that is stopped early therefore contains every block.
    """
    blocks: dict[str, list[GpuPoint]] = {}
    for at in dict.fromkeys(points):
        blocks.setdefault(at.point.block, []).append(at)
    found = []
    for wave in zip_longest(*blocks.values()):
        for dtype, mode, cell in product(dtypes, modes, cells):
            found += [
                GpuTask(at, cell, dtype, mode) for at in wave if at is not None and cell in at.cells
            ]
    return found
