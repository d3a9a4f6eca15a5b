"""`LayerCall`: all arguments of a layer, of stacked layers or of a single step, as one value.

A NamedTuple costs little and Dynamo can trace it. It is flat, because building nested tuples would
slow down every call.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastrnn.spec import CellSpec, Weights

#: y [T,B,D*R] or [N,D*R]; h_n [L*D,B,R]; c_n [L*D,B,H] or None
Results = tuple[Tensor, Tensor, Tensor | None]


class Options(NamedTuple):
    """Options of a call.

    Attributes:
        num_layers: L.
        dropout: probability that an output between two layers is zeroed; 0 for no dropout.
        weight_format: number of the format in which the CPU may hold w_hh if no gradient is
            recorded; 0 for the dtype of w_hh.
    """

    num_layers: int = 1
    dropout: float = 0.0
    weight_format: int = 0


DEFAULTS = Options()


class LayerCall(NamedTuple):
    """One call of a layer. The caller has checked the shapes.

    Attributes:
        spec: the cell.
        x: [T,B,I], or packed rows [N,I] together with ``batch_sizes``; [B,I] for a single step.
        batch_sizes: [T] number of active rows at each step, descending; None if padded.
        h0: [L*D,B,R] initial hidden state, R = P with a projection and H without; [B,R] for a
            single step.
        c0: [L*D,B,H] initial cell state of an LSTM, else None; [B,H] for a single step.
        weights: the weights of each layer and direction.
        options: number of layers, dropout and weight format.
    """

    spec: CellSpec
    x: Tensor
    batch_sizes: Tensor | None
    h0: Tensor
    c0: Tensor | None
    weights: Weights
    options: Options = DEFAULTS

    @property
    def is_step(self) -> bool:
        """Whether this is a single step of one direction: tensors without dimensions T and D."""
        return self.h0.dim() == 2
