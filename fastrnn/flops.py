"""What ``torch.utils.flop_counter`` counts for the operators: their matrix products.

A product [M,K] by [K,N] counts 2*M*K*N, as torch counts ``mm``. With N rows, that is steps times
sequences, a layer has for each direction

    forward     x w_ih^T: 2*N*G*H*I    h w_hh^T: 2*N*G*H*R    with a projection: 2*N*R*H
    backward    the gradients of h: as h w_hh^T and the projection; of x, w_ih and w_hh: as their
                products, where they are wanted
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from fastrnn import _library

_library.load()

Shape = Sequence[int]


class _Products(NamedTuple):
    """FLOPs of each product over all rows of one direction."""

    x: int
    h: int
    projection: int


def _products(rows: int, weights: Sequence[Shape], directions: int) -> list[_Products]:
    count = len(weights) // directions
    products = []
    for first in range(0, count * directions, count):
        w_ih, w_hh = weights[first], weights[first + 1]
        w_hr = weights[first + count - 1] if count in (3, 5) else (0, 0)
        products.append(_Products(*(2 * rows * math.prod(shape) for shape in (w_ih, w_hh, w_hr))))
    return products


def _directions(h0: Shape) -> int:
    return h0[0] if len(h0) == 3 else 1


def _forward_flops(
    x: Shape, h0: Shape, c0: Shape | None, weights: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Of layer and layer_forward."""
    return sum(map(sum, _products(math.prod(x[:-1]), weights, _directions(h0))))


def _stack_flops(
    x: Shape, h0: Sequence[Shape], c0: Sequence[Shape], weights: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Of stack_forward: layers of one direction."""
    return sum(map(sum, _products(math.prod(x[:-1]), weights, len(h0))))


def _walk_flops(
    d_y: Shape | None,
    d_h_n: Shape | None,
    d_c_n: Shape | None,
    h0: Shape,
    c0: Shape | None,
    weights: Sequence[Shape],
    batch_sizes: Shape | None,
    y: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """Of layer_backward: what goes back from step to step."""
    products = _products(math.prod(y[:-1]), weights, _directions(h0))
    return sum(p.h + p.projection for p in products)


def _gradients_flops(
    d_y: Shape | None,
    d_h_n: Shape | None,
    d_c_n: Shape | None,
    x: Shape,
    h0: Shape,
    c0: Shape | None,
    weights: Sequence[Shape],
    batch_sizes: Shape | None,
    y: Shape,
    saved: Shape,
    cell: str,
    needs: int,
    **_: Any,
) -> int:
    """Of layer_gradients and bidirectional_gradients: what goes back, and what is wanted."""
    directions = _directions(h0)
    count = len(weights) // directions
    total = 0
    for direction, p in enumerate(_products(math.prod(x[:-1]), weights, directions)):
        first = 1 + direction * count
        total += p.h + p.projection
        total += p.x * ((needs & 1) + (needs >> first & 1)) + p.h * (needs >> (first + 1) & 1)
    return total


register_flop_formula([torch.ops.fastrnn.layer, torch.ops.fastrnn.layer_forward])(_forward_flops)
register_flop_formula(torch.ops.fastrnn.stack_forward)(_stack_flops)
register_flop_formula(torch.ops.fastrnn.layer_backward)(_walk_flops)
register_flop_formula(
    [torch.ops.fastrnn.layer_gradients, torch.ops.fastrnn.bidirectional_gradients]
)(_gradients_flops)
