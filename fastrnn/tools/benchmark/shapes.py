"""What is measured, as data: a cell, a mode and a shape. T steps, B batch, I input, H hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: the cells and their gates
GATES: Final = {"rnn": 1, "gru": 3, "lstm": 4}
CELLS: Final = tuple(GATES)
#: forward without gradients; training is forward and backward, to the weights and the input
MODES: Final = ("forward", "training")


@dataclass(frozen=True)
class Point:
    """One shape.

    Args:
        block: the part of the grid that it belongs to.
        steps: T.
        batch: B.
        input_size: I.
        hidden_size: H.
        layers: how many are stacked.
        bidirectional: both directions.
        packed: the sequences' lengths are T/B, 2T/B ... T, instead of T.
        single: one step through a cell (``nn.LSTMCell``) instead of a layer (``nn.LSTM``).
        proj_size: P of an LSTM with a projection, 0 without.
    """

    block: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    single: bool = False
    proj_size: int = 0

    @property
    def label(self) -> str:
        """Such as ``T87 B16 I1 H128 x3 bi``."""
        sizes = f"B{self.batch} I{self.input_size} H{self.hidden_size}"
        if self.single:
            return f"cell {sizes}"
        text = f"T{self.steps} {sizes}" + (f" x{self.layers}" if self.layers > 1 else "")
        text += f" P{self.proj_size}" if self.proj_size > 0 else ""
        return text + (" bi" if self.bidirectional else "") + (" packed" if self.packed else "")

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """D*R."""
        return self.directions * (self.proj_size or self.hidden_size)

    @property
    def lengths(self) -> list[int]:
        """How long each sequence is, longest first."""
        if not self.packed:
            return [self.steps] * self.batch
        return [
            max(1, round(self.steps * (self.batch - b) / self.batch)) for b in range(self.batch)
        ]

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        return sum(self.lengths)

    def weights(self, cell: str) -> int:
        """Elements of all weight matrices."""
        total = 0
        for layer in range(self.layers):
            inputs = self.input_size if layer == 0 else self.output_size
            recurrent = self.proj_size or self.hidden_size
            one = GATES[cell] * (inputs + recurrent) + self.proj_size
            total += one * self.hidden_size * self.directions
        return total

    def flops(self, cell: str, mode: str) -> float:
        """Of the matrix products; training does them three times (forward, d_input, d_weight)."""
        return 2.0 * self.weights(cell) * self.rows * (3 if mode == "training" else 1)

    def intensity(self, cell: str) -> float:
        """FLOP per byte of a forward step that reads its float32 weights, x and h, and writes h."""
        vectors = self.input_size + 2 * self.output_size * self.layers
        return self.flops(cell, "forward") / (
            4.0 * (self.weights(cell) * self.steps + vectors * self.rows)
        )


@dataclass(frozen=True)
class Task:
    """What a library is asked to do.

    Args:
        cell: one of `CELLS`.
        mode: one of `MODES`.
        point: the shape.
        threads: of the CPU.
    """

    cell: str
    mode: str
    point: Point
    threads: int

    @property
    def label(self) -> str:
        """Such as ``lstm forward T100 B1 I64 H64``."""
        return f"{self.cell} {self.mode} {self.point.label}"

    @property
    def flops(self) -> float:
        """Operations of one call."""
        return self.point.flops(self.cell, self.mode)
