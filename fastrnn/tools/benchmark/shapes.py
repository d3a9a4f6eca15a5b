"""Tasks to measure: a cell, a mode, a dtype, a number of threads and a shape.

A shape has T steps, batch B, input size I and hidden size H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: number of gates per cell
GATES: Final = {"rnn": 1, "gru": 3, "lstm": 4}
CELLS: Final = tuple(GATES)
#: forward: inference without gradients; training: forward and backward, to weights and input
MODES: Final = ("forward", "training")
#: bytes of a weight, and of a value of x and h, per dtype. int8: int8 weights, float32 x and h
_BYTES: Final = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 4)}
DTYPES: Final = tuple(_BYTES)


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and its input.

    Args:
        block: part of the benchmark grid that the shape belongs to.
        steps: T.
        batch: B.
        input_size: I.
        hidden_size: H.
        layers: number of stacked layers.
        bidirectional: both directions.
        packed: the sequences have lengths T/B, 2T/B ... T, instead of T each.
        single: one step of a cell (``nn.LSTMCell``) instead of a layer (``nn.LSTM``).
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
        """Short name, such as ``T87 B16 I1 H128 x3 bi``."""
        sizes = f"B{self.batch} I{self.input_size} H{self.hidden_size}"
        if self.single:
            return f"cell {sizes}"
        text = f"T{self.steps} {sizes}" + (f" x{self.layers}" if self.layers > 1 else "")
        text += f" P{self.proj_size}" if self.proj_size > 0 else ""
        return text + (" bi" if self.bidirectional else "") + (" packed" if self.packed else "")

    @property
    def directions(self) -> int:
        """D, the number of directions."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """D*R, where R is P with a projection and H without."""
        return self.directions * (self.proj_size or self.hidden_size)

    @property
    def lengths(self) -> list[int]:
        """Length of each sequence in steps, longest first."""
        if not self.packed:
            return [self.steps] * self.batch
        return [
            max(1, round(self.steps * (self.batch - b) / self.batch)) for b in range(self.batch)
        ]

    @property
    def rows(self) -> int:
        """Total number of steps of all sequences."""
        return sum(self.lengths)

    def weights(self, cell: str) -> int:
        """Returns the number of elements of all weight matrices."""
        total = 0
        for layer in range(self.layers):
            inputs = self.input_size if layer == 0 else self.output_size
            recurrent = self.proj_size or self.hidden_size
            one = GATES[cell] * (inputs + recurrent) + self.proj_size
            total += one * self.hidden_size * self.directions
        return total

    def flops(self, cell: str, mode: str) -> float:
        """Returns the operations of the matrix products.

        Training has three times as many as inference: forward, d_input and d_weight.
        """
        return 2.0 * self.weights(cell) * self.rows * (3 if mode == "training" else 1)

    def intensity(self, cell: str, dtype: str = "float32") -> float:
        """Returns FLOP per byte of forward steps that read the weights, x, h and write h."""
        of_weight, of_value = _BYTES[dtype]
        values = (self.input_size + 2 * self.output_size * self.layers) * self.rows
        return self.flops(cell, "forward") / (
            of_weight * self.weights(cell) * self.steps + of_value * values
        )


def axes_label(dtype: str, threads: int) -> str:
    """Returns a dtype and a number of threads as text, such as ``int8 2 threads``."""
    return f"{dtype} {threads} thread{'s' if threads > 1 else ''}"


@dataclass(frozen=True)
class Task:
    """Work of one call.

    Args:
        cell: one of `CELLS`.
        mode: one of `MODES`.
        shape: sizes of the layer and its input.
        threads: number of CPU threads, of torch and of every other library.
        dtype: one of `DTYPES`. Weights, input and results have it, except in int8: there the
            weights of layers are int8 and the rest float32, in inference only.
    """

    cell: str
    mode: str
    shape: Shape
    threads: int
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """Short name, such as ``lstm forward T100 B1 I64 H64``."""
        return f"{self.cell} {self.mode} {self.shape.label}"

    @property
    def name(self) -> str:
        """Name in a run of several dtypes and numbers of threads: ``<label> int8 2 threads``."""
        return f"{self.label} {axes_label(self.dtype, self.threads)}"

    @property
    def flops(self) -> float:
        """Operations of the matrix products per call."""
        return self.shape.flops(self.cell, self.mode)
