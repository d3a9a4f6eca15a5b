"""`LayerCall`: all arguments of a layer, of stacked layers or of a single step, as one value.

A NamedTuple costs little and Dynamo can trace it. It is flat, because building nested tuples would
slow down every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastrnn.spec import FIRST_SEQUENCE_SLOT, NORM, CellSpec, Weights

#: y [T,B,D*R] or [N,D*R]; h_n [L*D,B,R]; c_n [L*D,B,H] or None
Results = tuple[Tensor, Tensor, Tensor | None]


#: the option ``recompute="full"``
FULL = -1


class CellOptions(NamedTuple):
    """Options of a cell; layer normalisation is in the weights, other gates are other cells.

    Attributes:
        zoneout_h, zoneout_c: probability that a unit keeps its state.
        recurrent_dropout: probability that a unit of h is zero in the recurrent product.
        training: whether zoneout draws at random; otherwise it takes the expectation.
        cell_clip, proj_clip: bounds of the absolute values of c and of the projected h, or None.
    """

    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    training: bool = True
    cell_clip: float | None = None
    proj_clip: float | None = None


class Options(NamedTuple):
    """Options of a call.

    Attributes:
        num_layers: L.
        dropout: probability that an output between two layers is zeroed; 0 for no dropout.
        weight_format: number of the format in which the CPU may hold w_hh if no gradient is
            recorded; 0 for the dtype of w_hh.
        prepared: the `fastrnn.ops.packed.PreparedWeights` of the module, or None.
        recorder: the `fastrnn.engine.states.Recorder` that runs the layers, or None.
        recompute: number of steps of a chunk whose saved values backward computes again, `FULL` to
            choose it, or 0 to save them.
        residual: whether each layer but the first adds its input to its output
            (`fastrnn.ops.stacking`).
        cell: options of the cell, or None.
        heads: number of independent parts of the units (`fastrnn.engine.heads`).
    """

    num_layers: int = 1
    dropout: float = 0.0
    weight_format: int = 0
    prepared: Any = None
    recorder: Any = None
    recompute: int = 0
    residual: bool = False
    cell: CellOptions | None = None
    heads: int = 1


DEFAULTS = Options()


class SequenceMembers(NamedTuple):
    """The tensors that describe the sequences of a batch, in the order of csrc/torch/slots.h.

    Attributes:
        batch_sizes: [T] number of active rows at each step, descending; None if padded.
    """

    batch_sizes: Tensor | None = None

    def pack(self) -> SequenceTensors:
        """Returns the members as an operator takes them."""
        slots = 0
        flat = []
        for index, member in enumerate(self):
            if member is not None:
                slots |= 1 << (FIRST_SEQUENCE_SLOT + index)
                flat.append(member)
        return SequenceTensors(tuple(flat), slots) if flat else PADDED


class SequenceTensors(NamedTuple):
    """The members of a `SequenceMembers` that are not None: ``flat`` holds those of ``slots``.

    ``flat`` is None if there are none, because an operator takes None faster than an empty list.
    """

    flat: Sequence[Tensor] | None
    slots: int

    def named(self) -> SequenceMembers:
        if self.flat is None:
            return _NO_MEMBERS
        rest = iter(self.flat)
        first = FIRST_SEQUENCE_SLOT
        return SequenceMembers(
            *[
                next(rest) if self.slots >> (first + index) & 1 else None
                for index in range(len(SequenceMembers._fields))
            ]
        )


_NO_MEMBERS = SequenceMembers()
#: a padded batch
PADDED = SequenceTensors(None, 0)


class LayerCall(NamedTuple):
    """One call of a layer. The caller has checked the shapes.

    Attributes:
        spec: the cell.
        x: [T,B,I], or packed rows [N,I] together with ``batch_sizes``; [B,I] for a single step.
        sequence: the tensors that describe the sequences of the batch.
        h0: [L*D,B,R] initial hidden state, R = P with a projection and H without; [B,R] for a
            single step.
        c0: [L*D,B,H] initial cell state of an LSTM, else None; [B,H] for a single step.
        weights: the weights of each layer and direction.
        options: number of layers, dropout and weight format.
    """

    spec: CellSpec
    x: Tensor
    sequence: SequenceTensors
    h0: Tensor
    c0: Tensor | None
    weights: Weights
    options: Options = DEFAULTS

    @property
    def batch_sizes(self) -> Tensor | None:
        """See `SequenceMembers`."""
        return self.sequence.named().batch_sizes

    @property
    def has_plain_cell(self) -> bool:
        """Whether the cell has no options, so that all schedules run it."""
        return (
            self.options.cell is None
            and self.weights.slots & NORM == 0
            and not self.spec.loops_only
        )

    @property
    def is_step(self) -> bool:
        """Whether this is a single step of one direction: tensors without dimensions T and D."""
        return self.h0.dim() == 2
