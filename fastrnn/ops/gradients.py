"""The gradients of a layer, from the operator that computed it.

The time loop of backward gives d_pre, the gradient at the pre-activations. All that is parallel
over time are a few large matrix products, on the CPU in the same operator, elsewhere torch's own:

    d_x    = d_pre[x side] @ w_ih            d_pre[h side] / d_pre[x side]: the columns of the
    d_w_ih = d_pre[x side]^T @ x             gradient of the pre-activations that belong to the
    d_w_hh = d_pre[h side]^T @ h_prev        hidden / the input side of the cell (`CellSpec`)
    d_b    = column sums of d_pre
    d_w_hr = d_h^T @ (o * tanh(c'))          only with an LSTM's projection
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn._torch_internals import are_transforms_active, forward_ad, is_batched
from fastrnn.layer_call import LayerCall
from fastrnn.ops.composite import composite_layer
from fastrnn.ops.operators import backward_op, decode, gradient_ops
from fastrnn.ops.sequence import is_traced, previous_packed
from fastrnn.spec import GRADIENT_OUTPUTS, PROJECTION, WEIGHT_SLOTS, Run, Weights, present

#: of x, h0, c0 and each weight; None where it is not needed
Gradients = tuple["Tensor | None", ...]

#: of y, h_n and c_n; None for zero
Outputs = tuple["Tensor | None", "Tensor | None", "Tensor | None"]

_D_X, _D_H0, _D_C0, _D_H_ALL, _FIRST_WEIGHT = range(5)
_PER_DIRECTION = len(GRADIENT_OUTPUTS) - _FIRST_WEIGHT
_W_HR = WEIGHT_SLOTS.index("w_hr")
_BEFORE_WEIGHTS = 3  # x, h0 and c0 in the needs


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func`` or ``is_grads_batched`` has put its wrappers around tensors."""
    if are_transforms_active():
        return True
    if not torch.compiler.is_compiling():
        for t in tensors:
            if t is not None and is_batched(t):
                return True
    return False


def gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, saved: Tensor
) -> Gradients:
    """Computes the gradients of a layer in the fastest way that supports them.

    Args:
        call: the layer.
        needs: whether the gradients of x, h0, c0 and each weight are needed.
        d_outputs: the gradients of y, h_n and c_n; None for zero.
        y, saved: results of ``recurrent_forward``.
    """
    transformed = _is_transformed(*d_outputs)
    if transformed or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        # vmap over the backward pass, create_graph=True, gradients with tangents
        return differentiable_gradients(call, needs, d_outputs, transformed)
    compute = cpu_gradients if call.x.is_cpu else gradients_by_torch
    return compute(call, needs, d_outputs, y, saved)


def cpu_gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, saved: Tensor
) -> Gradients:
    """The gradients by one operator of the CPU."""
    spec, x, batch_sizes, h0, c0, (weights, slots), _ = call
    directions = h0.shape[0] if h0.dim() == 3 else 1
    outputs, numbers = _results_for(slots, directions, needs)
    results = gradient_ops[directions](
        *d_outputs, x, h0, c0, weights, slots, batch_sizes, y, saved, spec.name, outputs
    )
    found = decode(results, numbers)
    if slots & PROJECTION:
        count = len(weights) // directions
        for direction in range(directions):
            w_hr = (direction + 1) * count - 1  # the last slot
            d_h_all = found[_BEFORE_WEIGHTS + w_hr]
            if d_h_all is not None:
                d_w_hr = _projection_gradient(d_h_all[direction], saved[direction])
                found[_BEFORE_WEIGHTS + w_hr] = _cast(d_w_hr, weights[w_hr])
    return tuple(found)


@functools.cache
def _results_for(
    slots: int, directions: int, needs: tuple[bool, ...]
) -> tuple[int, tuple[int | None, ...]]:
    """The results of the operator to ask for, and the one for each of x, h0, c0 and the weights."""
    numbers = [_D_X, _D_H0, _D_C0]
    for direction in range(directions):
        first = _FIRST_WEIGHT + direction * _PER_DIRECTION
        numbers += [_D_H_ALL if slot == _W_HR else first + slot for slot in present(slots)]
    wanted = [n if need else None for n, need in zip(numbers, needs, strict=True)]
    outputs = 0
    for number in wanted:
        if number is not None:
            outputs |= 1 << number
    return outputs, tuple(wanted)


class DirectionNeeds(NamedTuple):
    """Whether the gradient of each weight slot of one direction is needed."""

    w_ih: bool
    w_hh: bool
    b_ih: bool
    b_hh: bool
    w_hr: bool


def gradients_by_torch(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, saved: Tensor
) -> Gradients:
    """The gradients by CUDA's time loop and torch's matrix products."""
    spec, x, batch_sizes, h0, c0, weights, _ = call
    need_x, need_h0, need_c0, *need_weights = needs
    flat, slots = weights
    d_pre, d_h_all, d_h0, d_c0 = backward_op(
        *d_outputs, h0, c0, flat, slots, batch_sizes, y, saved, spec.name
    )
    rows, width = d_pre.shape[1:]
    hidden = width // spec.pre
    size = h0.shape[-1]
    if h0.dim() == 2:
        h0 = h0.unsqueeze(0)
    is_bidirectional = h0.shape[0] > 1
    own = present(slots)
    need_weight = iter(need_weights)
    d_x = x_rows = y_rows = None
    d_weights: list[Tensor | None] = []
    for direction, w in enumerate(weights.directions()):
        need = DirectionNeeds(*(next(need_weight) if t is not None else False for t in w))
        pre = d_pre[direction]
        side_x = _side(pre, spec.runs_x, hidden)
        d_w_ih = d_w_hh = d_b_ih = d_b_hh = d_w_hr = None
        if need_x:
            w_ih = _cast(w.w_ih, pre)
            for part, gates in side_x:
                w_part = w_ih if gates is None else w_ih[gates]
                d_x = torch.mm(part, w_part) if d_x is None else _add_product(d_x, part, w_part)
        if need.w_ih:
            if x_rows is None:
                x_rows = _cast(x.reshape(rows, x.shape[-1]), pre)
            d_w_ih = _cast(_weight_gradient(side_x, x_rows), w.w_ih)
        if need.w_hh:
            if y_rows is None:
                y_rows = _cast(y if y.dim() == 2 else y.flatten(0, 1), pre)
            y_own = y_rows
            if is_bidirectional:
                y_own = y_rows[:, direction * size : (direction + 1) * size]
            d_w_hh = _recurrent_gradient(
                _side(pre, spec.runs_h, hidden),
                y_own,
                _cast(h0[direction], pre),
                batch_sizes,
                direction == 1,
            )
            d_w_hh = _cast(d_w_hh, w.w_hh)
        if need.b_ih or need.b_hh:
            sums = pre.sum(0)  # one pass serves both sides
            if need.b_ih:
                d_b_ih = _cast(_bias_gradient(sums, spec.runs_x, hidden), w.w_ih)
            if need.b_hh:
                d_b_hh = _cast(_bias_gradient(sums, spec.runs_h, hidden), w.w_hh)
                if need.b_ih and spec.runs_x == spec.runs_h:
                    # two parameters must not end up with one memory as their gradient
                    d_b_hh = d_b_hh.clone()
        if need.w_hr and w.w_hr is not None:
            d_w_hr = _cast(_projection_gradient(d_h_all[direction], saved[direction]), w.w_hr)
        by_slot = (d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr)
        d_weights += [by_slot[slot] for slot in own]
    return (
        None if d_x is None else _cast(d_x, x).view(x.shape),
        d_h0 if need_h0 else None,
        d_c0 if need_c0 else None,
        *d_weights,
    )


def _cast(t: Tensor, like: Tensor) -> Tensor:
    return t if t.dtype == like.dtype else t.to(like.dtype)


# the columns of d_pre that belong to one side of the cell, in as few pieces as they come:
# [N,k*H] each, and the rows of the weight that it belongs to (None for all of them)
Side = list[tuple[Tensor, "slice | None"]]


def _side(pre: Tensor, runs: Sequence[Run], hidden: int) -> Side:
    if len(runs) == 1:
        run = runs[0]
        is_all = run.width * hidden == pre.shape[1]
        return [(pre if is_all else pre[:, run.columns(hidden)], None)]
    return [(pre[:, run.columns(hidden)], run.gate_rows(hidden)) for run in runs]


def _bias_gradient(sums: Tensor, runs: Sequence[Run], hidden: int) -> Tensor:
    """One side's part [G*H] of the column sums [Q*H]."""
    if len(runs) == 1:
        return sums if runs[0].width * hidden == sums.shape[0] else sums[runs[0].columns(hidden)]
    return torch.cat([sums[run.columns(hidden)] for run in runs])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, by an operator whose products ``torch.utils.flop_counter`` counts."""
    return torch.addmm(total, a, b, out=total)


def _weight_gradient(side: Side, inputs: Tensor) -> Tensor:
    """d_w [G*H,K] = side^T [G*H,N] @ inputs [N,K]."""
    if len(side) == 1:
        return torch.mm(side[0][0].t(), inputs)
    d_w = inputs.new_empty(sum(part.shape[1] for part, _ in side), inputs.shape[1])
    for part, gates in side:
        torch.mm(part.t(), inputs, out=d_w[gates])
    return d_w


def _recurrent_gradient(
    side: Side, y: Tensor, h0: Tensor, batch_sizes: Tensor | None, backwards: bool
) -> Tensor:
    """d_w_hh [G*H,R]: like `_weight_gradient`, where each row's input is the state before it.

    Args:
        side: the hidden side of the gradient of the pre-activations.
        y: [N,R] outputs of this direction.
        h0: [B,R] initial state.
        batch_sizes: [T] of packed rows, or None.
        backwards: whether this direction runs backwards in time.
    """
    batch = h0.shape[0]
    later = y.shape[0] - batch
    if batch_sizes is not None:
        return _weight_gradient(side, previous_packed(y, h0, batch_sizes, backwards))
    if later == 0:
        return _weight_gradient(side, h0)
    gate_rows = sum(part.shape[1] for part, _ in side)
    if later <= gate_rows or is_traced(y):
        # moving y costs less than a second pass over d_w; compiled code should not depend on T*B
        h_prev = torch.cat([y[batch:], h0] if backwards else [h0, y[:later]])
        return _weight_gradient(side, h_prev)
    if backwards:
        rows_later, rows_first, h_later = slice(0, later), slice(later, None), y[batch:]
    else:
        rows_later, rows_first, h_later = slice(batch, None), slice(0, batch), y[:later]
    d_w = _weight_gradient([(part[rows_later], gates) for part, gates in side], h_later)
    for part, gates in side:
        _add_product(d_w if gates is None else d_w[gates], part[rows_first].t(), h0)
    return d_w


def _projection_gradient(d_h: Tensor, saved: Tensor) -> Tensor:
    """d_w_hr [P,H] = d_h [N,P]^T @ (o * tanh(c')) [N,H]; ``saved`` holds i,f,g,o,c'."""
    _, _, _, o, c = saved.chunk(5, dim=1)
    return torch.mm(d_h.t(), _cast(o * torch.tanh(c), d_h))


def differentiable_gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, transformed: bool
) -> Gradients:
    """The gradients as ordinary operations that can be differentiated again."""
    inputs: tuple[Any, ...] = (call.x, call.h0, call.c0, *call.weights.flat)

    def forward(*wanted: Tensor) -> tuple[Tensor, ...]:
        variables = iter(wanted)
        x, h0, c0, *flat = [
            next(variables) if need else t for t, need in zip(inputs, needs, strict=True)
        ]
        outputs = composite_layer(
            call._replace(x=x, h0=h0, c0=c0, weights=Weights(flat, call.weights.slots))
        )
        return tuple(
            output
            for output, d_output in zip(outputs, d_outputs, strict=True)
            if output is not None and d_output is not None
        )

    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    given = tuple(d for d in d_outputs if d is not None)
    if transformed:
        gradients = iter(torch.func.vjp(forward, *wanted)[1](given))
    else:
        with torch.enable_grad():
            # aliases: inputs that depend on one another must not be followed beyond this layer;
            # those of a transform that is over (as in vjp) have lost their place in any graph
            aliases = [t.view_as(t) for t in wanted]
            aliases = [t if t.requires_grad else t.requires_grad_() for t in aliases]
            gradients = iter(
                torch.autograd.grad(
                    forward(*aliases), aliases, given, create_graph=True, allow_unused=True
                )
            )
    return tuple(next(gradients) if need else None for need in needs)
