"""The operator for inference with int8 weights. csrc/problem/int8_layer.h describes the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.layer_call import Results
from fastrnn.ops.fakes import _expect, _expect_sizes
from fastrnn.ops.operators import interruptible
from fastrnn.spec import CELLS, CellSpec

#: hidden units per block of a panel, and values along K that lie next to each other
UNITS, DEPTH = 16, 4
#: the largest I and H, for which no sum of products overflows 32 bits
MOST_COLUMNS = 32768


class Int8Weights(NamedTuple):
    """The tensors of one layer and direction, in the order of the operator's ``weights``."""

    panels_ih: Tensor
    panels_hh: Tensor
    scales_ih: Tensor
    scales_hh: Tensor
    sums_ih: Tensor
    sums_hh: Tensor
    bias: Tensor


_operator = torch.ops.fastrnn.recurrent_int8.default
_interruptible_operator = interruptible(_operator)


def int8_layer(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> Results:
    """Runs one layer: x [T,B,I] or packed [N,I], h0 and c0 [D,B,H], all float32.

    Args:
        weights: the tensors of `Int8Weights` of each direction.
        batch_sizes: as in `SequenceMembers`.
    """
    run = _operator if torch.compiler.is_compiling() else _interruptible_operator
    y, h_n, c_n = run(x, h0, c0, weights, batch_sizes, spec.name)
    return y, h_n, None if c0 is None else c_n


def _fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _expect(cell in CELLS, f"cell must be one of {', '.join(CELLS)}, got '{cell}'")
    spec = CELLS[cell]
    _expect(h0.dim() == 3, f"h0 must be [D, B, H], got {h0.dim()} dimensions")
    directions, batch, hidden = h0.shape
    dims = 3 if batch_sizes is None else 2
    _expect(x.dim() == dims, f"x must have {dims} dimensions, got {x.dim()}")
    _expect(x.dtype == torch.float32, f"x must be float32, got {x.dtype}")
    _expect(h0.dtype == torch.float32, f"h0 must be float32, got {h0.dtype}")
    if batch_sizes is None:
        _expect(x.shape[1] == batch, f"x must have the batch {batch} of h0, got {x.shape[1]}")
    _expect(
        (c0 is not None) == spec.has_cell_state,
        f"c0 must {'' if spec.has_cell_state else 'not '}be given for {cell}",
    )
    if c0 is not None:
        _expect(c0.dtype == torch.float32, f"c0 must be float32, got {c0.dtype}")
        _expect_sizes("c0", c0, h0.shape)
    count = len(Int8Weights._fields)
    _expect(
        len(weights) == count * directions,
        f"weights must hold {count} tensors per direction, got {len(weights)} for {directions} "
        "direction(s)",
    )
    blocks = (hidden + UNITS - 1) // UNITS
    for first in range(0, len(weights), count):
        own = Int8Weights(*weights[first : first + count])
        for name, panels, columns in (
            ("panels_ih", own.panels_ih, x.shape[-1]),
            ("panels_hh", own.panels_hh, hidden),
        ):
            quads = (columns + DEPTH - 1) // DEPTH
            _expect_sizes(name, panels, (blocks, quads, spec.gates, UNITS, DEPTH))
        for name, values in zip(Int8Weights._fields[2:-1], own[2:-1], strict=True):
            _expect_sizes(name, values, (blocks, spec.gates, UNITS))
        _expect_sizes("bias", own.bias, (blocks, spec.pre, UNITS))
    y = x.new_empty(*x.shape[:-1], directions * hidden)
    return y, h0.new_empty(h0.shape), h0.new_empty(0 if c0 is None else c0.shape)


torch.library.register_fake("fastrnn::recurrent_int8", _fake)
