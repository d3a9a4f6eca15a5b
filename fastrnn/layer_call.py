"""`LayerCall`: what a layer, a stack of layers or a single step is asked to compute, as one value.

A NamedTuple costs little and Dynamo sees through it. ``x``, ``batch_sizes`` and the states are
fields of the call itself, not of smaller tuples, because every call would pay for making those.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastrnn.spec import CellSpec, Weights

#: y [T,B,D*R] or [N,D*R]; h_n [L*D,B,R]; c_n [L*D,B,H] or None
Results = tuple[Tensor, Tensor, Tensor | None]


class Options(NamedTuple):
    """How a call is to be computed.

    Attributes:
        num_layers: L.
        dropout: probability of zeroing an output between two layers; 0 for none.
        half_weights: whether the CPU may round w_hh to float16 where no gradient is recorded.
    """

    num_layers: int = 1
    dropout: float = 0.0
    half_weights: bool = False


DEFAULTS = Options()


class LayerCall(NamedTuple):
    """One call of a layer. The caller has checked the shapes.

    Attributes:
        spec: the cell.
        x: [T,B,I], or packed rows [N,I] together with ``batch_sizes``; [B,I] of a single step.
        batch_sizes: [T] rows that are active at each step, descending; None when all are.
        h0: [L*D,B,R] initial hidden state, R = P with a projection and H without; [B,R] of a
            single step.
        c0: [L*D,B,H] initial cell state of an LSTM, else None; [B,H] of a single step.
        weights: of each layer and direction.
        options: the rest.
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
        """Whether this is a single step of one direction, without the dimensions T and D."""
        return self.h0.dim() == 2
