"""FLOPs of the operators for ``torch.utils.flop_counter``: those of their matrix products.

A product of [M,K] and [K,N] counts as 2*M*K*N, as torch counts ``mm``. For N rows (all sequences at
all steps), each layer and direction has

    forward     x w_ih^T: 2*N*G*H*I    h w_hh^T: 2*N*G*H*R    with a projection: 2*N*R*H
    backward    gradient of h: the same as h w_hh^T and the projection; gradients of x, w_ih and
                w_hh, if needed: the same as the forward products of x and h

With ``recompute``, backward includes the forward products of cells that save values. A linear scan
(`fastrnn.functional.linear_scan`) has no product, so it counts as 0, as elementwise operations of
torch do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrnn import _library
from fastrnn.ops.sequence import is_traced
from fastrnn.spec import CELLS, GRADIENT_OUTPUTS, WEIGHT_SLOTS, present

_library.load()

Shape = Sequence[int]

_W_IH, _W_HH, _W_HR = (WEIGHT_SLOTS.index(name) for name in ("w_ih", "w_hh", "w_hr"))
_FIRST_WEIGHT = GRADIENT_OUTPUTS.index("d_w_ih")
_PART_W_HH = 0  # the place of w_hh among the parts of the operator recurrence
_PER_DIRECTION = len(GRADIENT_OUTPUTS) - _FIRST_WEIGHT


class _Products(NamedTuple):
    """FLOPs of each product over all rows of one direction."""

    x: int
    h: int
    projection: int


def _products(rows: int, weights: Sequence[Shape], slots: int) -> list[_Products]:
    """Returns the FLOPs of each layer and direction."""
    own = present(slots)
    products = []
    for first in range(0, len(weights), len(own)):
        shapes = dict(zip(own, weights[first : first + len(own)], strict=True))
        matrices = [shapes.get(slot, (0, 0)) for slot in (_W_IH, _W_HH, _W_HR)]
        products.append(_Products(*(2 * rows * math.prod(w) for w in matrices)))
    return products


def _forward_flops(
    x: Shape, h0: Any, c0: Any, weights: Sequence[Shape], slots: int, *_: Any, **__: Any
) -> int:
    """Counts recurrent_layer, recurrent_forward, recurrent_states and recurrent_stack."""
    return sum(map(sum, _products(math.prod(x[:-1]), weights, slots)))


def _backward_flops(
    d_y: Shape | None,
    d_h_n: Shape | None,
    d_c_n: Shape | None,
    h0: Shape,
    c0: Shape | None,
    weights: Sequence[Shape],
    slots: int,
    sequence: Sequence[Shape] | None,
    y: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Counts recurrent_backward: the gradients of h."""
    products = _products(math.prod(y[:-1]), weights, slots)
    return sum(p.h + p.projection for p in products)


def _states_backward_flops(
    d_y: Shape | None, d_h_n: Shape | None, d_c_n: Shape | None, d_c_steps: Shape, *rest: Any
) -> int:
    """Counts recurrent_states_backward like recurrent_backward."""
    return _backward_flops(d_y, d_h_n, d_c_n, *rest)


def _gradients_flops(
    d_y: Shape | None,
    d_h_n: Shape | None,
    d_c_n: Shape | None,
    x: Shape,
    h0: Shape,
    c0: Shape | None,
    weights: Sequence[Shape],
    slots: int,
    sequence: Sequence[Shape] | None,
    y: Shape,
    saved: Shape,
    cell: str,
    outputs: int,
    **_: Any,
) -> int:
    """Counts recurrent_gradients and recurrent_bidirectional_gradients: the requested results."""
    return _gradients_of_rows(math.prod(x[:-1]), weights, slots, outputs)


def _gradients_of_rows(rows: int, weights: Sequence[Shape], slots: int, outputs: int) -> int:
    total = 0
    for direction, p in enumerate(_products(rows, weights, slots)):
        d_w_ih = _FIRST_WEIGHT + direction * _PER_DIRECTION
        total += p.h + p.projection
        total += p.x * ((outputs & 1) + (outputs >> d_w_ih & 1)) + p.h * (
            outputs >> (d_w_ih + 1) & 1
        )
    return total


def _chunked_gradients_flops(*arguments: Any, **_: Any) -> int:
    """Counts recurrent_chunked_gradients, which runs forward again if the cell saves values."""
    cell: str = arguments[-3]
    again = _forward_flops(*arguments[3:8]) if CELLS[cell].saved else 0
    return again + _gradients_flops(*arguments[:-1])


def _marked_rows(x: Tensor, lengths: Tensor | None) -> int:
    """Returns the rows that exist, or all rows of a graph, in which the lengths are unknown."""
    if lengths is None or is_traced(lengths):
        return x.shape[0] * x.shape[1]
    return int(lengths.sum())


def _ragged_flops(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    slots: int,
    lengths: Tensor | None,
    *_: Any,
    **__: Any,
) -> int:
    """Counts ragged_layer and ragged_forward."""
    return sum(map(sum, _products(_marked_rows(x, lengths), [w.shape for w in weights], slots)))


def _ragged_gradients_flops(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    slots: int,
    lengths: Tensor | None,
    *rest: Any,
    **_: Any,
) -> int:
    """Counts ragged_gradients."""
    rows = _marked_rows(x, lengths)
    shapes = [w.shape for w in weights]
    return _gradients_of_rows(rows, shapes, slots, rest[-1])


def _recurrence_flops(
    pre_x: Shape, h0: Shape, c0: Shape | None, parts: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Counts recurrence, the time loop of layers with options of the cell: h w_hh^T."""
    return 2 * math.prod(pre_x[:-1]) * math.prod(parts[_PART_W_HH])


def _recurrence_gradients_flops(
    d_y: Shape | None,
    d_h_n: Shape | None,
    d_c_n: Shape | None,
    h0: Shape,
    c0: Shape | None,
    parts: Sequence[Shape],
    slots: int,
    batch_sizes: Shape | None,
    reverse: bool,
    cell: str,
    epsilon: float,
    y: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Counts recurrence_gradients: the gradients of h."""
    return 2 * math.prod(y[:-1]) * math.prod(parts[_PART_W_HH])


def _recurrence_product_flops(x: Shape, w: Shape, *_: Any, **__: Any) -> int:
    """Counts recurrence_product."""
    return 2 * x[0] * math.prod(w)


def _recurrence_product_gradients_flops(
    d: Shape, x: Shape | None, w: Shape | None, *_: Any, **__: Any
) -> int:
    """Counts recurrence_product_gradients: the requested results."""
    columns = sum(t[1] for t in (x, w) if t is not None)
    return 2 * math.prod(d) * columns


_operators = torch.ops.fastrnn
register_flop_formula(
    [
        _operators.recurrent_layer,
        _operators.recurrent_forward,
        _operators.recurrent_states,
        _operators.recurrent_stack,
        _operators.recurrent_chunked_forward,
    ]
)(_forward_flops)
register_flop_formula(_operators.recurrent_chunked_gradients)(_chunked_gradients_flops)
register_flop_formula(_operators.recurrent_backward)(_backward_flops)
register_flop_formula(_operators.recurrent_states_backward)(_states_backward_flops)
register_flop_formula(
    [_operators.recurrent_gradients, _operators.recurrent_bidirectional_gradients]
)(_gradients_flops)
register_flop_formula([_operators.ragged_layer, _operators.ragged_forward], get_raw=True)(
    _ragged_flops
)
register_flop_formula(_operators.ragged_gradients, get_raw=True)(_ragged_gradients_flops)
register_flop_formula(_operators.recurrence)(_recurrence_flops)
register_flop_formula(_operators.recurrence_gradients)(_recurrence_gradients_flops)
register_flop_formula(_operators.recurrence_product)(_recurrence_product_flops)
register_flop_formula(_operators.recurrence_product_gradients)(_recurrence_product_gradients_flops)
