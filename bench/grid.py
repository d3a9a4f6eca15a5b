"""The shapes that are measured, as data. Sizes are T steps, B batch, I input, H hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

CELLS = ("rnn", "gru", "lstm")
MODES = ("forward", "training")  # training: forward and backward


@dataclass(frozen=True)
class Point:
    """One shape of the grid."""

    block: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False  # lengths 1 ... T evenly, one a sequence

    @property
    def label(self) -> str:
        text = f"T{self.steps} B{self.batch} I{self.input_size} H{self.hidden_size}"
        text += f" x{self.layers}" if self.layers > 1 else ""
        return text + (" bi" if self.bidirectional else "") + (" packed" if self.packed else "")

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """How long each sequence is, longest first."""
        if not self.packed:
            return [self.steps] * self.batch
        return [
            max(1, round(self.steps * (self.batch - b) / self.batch)) for b in range(self.batch)
        ]

    def flops(self, cell: str, mode: str) -> float:
        """Of the matrix products; training does them three times (forward, d_input, d_weight)."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
        directions = 2 if self.bidirectional else 1
        total = 0
        for layer in range(self.layers):
            inputs = self.input_size if layer == 0 else self.hidden_size * directions
            total += gates * self.hidden_size * (inputs + self.hidden_size) * directions
        return 2.0 * total * self.rows * (3 if mode == "training" else 1)


def _points() -> Iterator[Point]:
    for steps, hidden in product((1, 15, 100), (64, 128, 256, 512, 1024)):
        yield Point("latency", steps, 1, hidden, hidden)
    for steps in (1, 15, 100):
        yield Point("latency", steps, 1, 250, 200)
    yield Point("long", 1000, 1, 128, 128)
    for steps, batch, hidden in product((50, 100), (8, 16, 32), (64, 128, 256)):
        yield Point("training", steps, batch, hidden, hidden)
    for steps, batch, hidden, layers in product((35, 50), (20, 64), (200, 500, 650, 1500), (1, 2)):
        yield Point("language", steps, batch, hidden, hidden, layers)
    for batch, hidden in product((16, 64), (512, 1024)):
        yield Point("deepbench", 25, batch, hidden, hidden)
    for batch in (1, 4):
        yield Point("deepbench", 150, batch, 256, 256)
    for steps in (87, 113):
        yield Point("deep", steps, 16, 1, 128, 3, True)
    for steps in (100, 500):
        yield Point("packed", steps, 16, 128, 128, 2, packed=True)


GRID = tuple(_points())
#: one point a block and regime, for a look in a few minutes
SHORT = (
    Point("latency", 100, 1, 64, 64),
    Point("latency", 100, 1, 256, 256),
    Point("long", 1000, 1, 128, 128),
    Point("training", 100, 16, 128, 128),
    Point("training", 100, 32, 256, 256),
    Point("language", 35, 20, 650, 650),
    Point("deepbench", 25, 64, 512, 512),
    Point("deep", 87, 16, 1, 128, 3, True),
    Point("packed", 100, 16, 128, 128, 2, packed=True),
)
