"""The gradients of a layer.

The time loop of the backward pass computes d_pre, the gradient at the pre-activations. A few large
matrix products over all steps follow. On the CPU the same operator computes them, on CUDA torch:

    d_x    = d_pre[x side] @ w_ih
    d_w_ih = d_pre[x side]^T @ x
    d_w_hh = d_pre[h side]^T @ h_prev
    d_b    = column sums of d_pre
    d_w_hr = d_h^T @ (h' before the projection)      only with a projection
    d_w_unit = column sums of d_pre[parameters]      only for cells with parameters

d_pre[x side] and d_pre[h side] are the columns that belong to the input side and the hidden side of
the cell (`CellSpec`); h_prev is the hidden state before each row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn._torch_internals import are_transforms_active, forward_ad, is_batched
from fastrnn.layer_call import LayerCall, SequenceTensors
from fastrnn.ops.composite import composite_layer, composite_states
from fastrnn.ops.operators import backward_op, decode, gradient_ops, states_backward_op
from fastrnn.ops.sequence import is_traced, previous_states
from fastrnn.spec import (
    GRADIENT_OUTPUTS,
    PROJECTION,
    UNIT,
    WEIGHT_SLOTS,
    CellSpec,
    ColumnRange,
    Weights,
    present,
)

#: the gradients of x, h0, c0 and each weight; None if not needed
Gradients = tuple["Tensor | None", ...]

#: the gradients of y, h_n and c_n, None for zero; then that of c_steps, if there is one
Outputs = (
    tuple["Tensor | None", "Tensor | None", "Tensor | None"]
    | tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
)

_D_X, _D_H0, _D_C0, _D_H_ALL, _FIRST_WEIGHT = range(5)
_PER_DIRECTION = len(GRADIENT_OUTPUTS) - _FIRST_WEIGHT
_W_HR = WEIGHT_SLOTS.index("w_hr")
_BEFORE_WEIGHTS = 3  # x, h0 and c0 come before the weights


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` is active or ``is_grads_batched`` wraps a tensor."""
    if are_transforms_active():
        return True
    if not torch.compiler.is_compiling():
        for t in tensors:
            if t is not None and is_batched(t):
                return True
    return False


def is_differentiated(d_outputs: Outputs) -> tuple[bool, bool]:
    """Whether a transform is active in backward, and whether its gradients are differentiated.

    They are under vmap over the backward pass, create_graph=True, or with tangents.
    """
    transformed = is_transformed(*d_outputs)
    return transformed, transformed or torch.is_grad_enabled() or forward_ad._current_level >= 0


def gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, saved: Tensor
) -> Gradients:
    """Computes the gradients of a layer by the fastest method that supports the call.

    Args:
        call: the layer.
        needs: whether the gradients of x, h0, c0 and each weight are needed.
        d_outputs: the gradients of the results, see `Outputs`.
        y, saved: results of ``recurrent_forward``.
    """
    transformed, differentiated = is_differentiated(d_outputs)
    if differentiated:
        return composite_gradients(call, needs, d_outputs, transformed)
    is_one_operator = call.x.is_cpu and not call.weights.has(UNIT) and len(d_outputs) == 3
    compute = cpu_gradients if is_one_operator else gradients_by_torch
    return compute(call, needs, d_outputs, y, saved)


def cpu_gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, saved: Tensor
) -> Gradients:
    """Computes the gradients by one operator of the CPU."""
    spec, x, (sequence, bits), h0, c0, (weights, slots), _ = call
    directions = h0.shape[0] if h0.dim() == 3 else 1
    outputs, indices = select_results(slots, directions, needs)
    results = gradient_ops[directions](
        *d_outputs, x, h0, c0, weights, slots | bits, sequence, y, saved, spec.name, outputs
    )
    return decode_gradients(call, results, indices, saved)


def decode_gradients(
    call: LayerCall, results: Sequence[Tensor], indices: tuple[int | None, ...], saved: Tensor
) -> Gradients:
    """Returns the gradients from the results of a gradient operator of the CPU.

    Args:
        call: the layer.
        results: the operator's results; that of ``w_hr`` is computed here.
        indices: of `select_results`.
        saved: the values that forward has saved.
    """
    found = decode(results, indices)
    weights, slots = call.weights
    if slots & PROJECTION:
        directions = call.h0.shape[0] if call.h0.dim() == 3 else 1
        count = len(weights) // directions
        for direction in range(directions):
            w_hr = (direction + 1) * count - 1  # the last slot
            d_h_all = found[_BEFORE_WEIGHTS + w_hr]
            if d_h_all is not None:
                d_w_hr = _projection_gradient(call.spec, d_h_all[direction], saved[direction])
                found[_BEFORE_WEIGHTS + w_hr] = _cast(d_w_hr, weights[w_hr])
    return tuple(found)


@functools.cache
def select_results(
    slots: int, directions: int, needs: tuple[bool, ...]
) -> tuple[int, tuple[int | None, ...]]:
    """Selects results of the gradient operator.

    Returns:
        The operator's argument ``outputs``, and the index of the result for each of x, h0, c0 and
        the weights (None if not needed).
    """
    indices = [_D_X, _D_H0, _D_C0]
    for direction in range(directions):
        first = _FIRST_WEIGHT + direction * _PER_DIRECTION
        indices += [_D_H_ALL if slot == _W_HR else first + slot for slot in present(slots)]
    needed = [index if need else None for index, need in zip(indices, needs, strict=True)]
    outputs = 0
    for index in needed:
        if index is not None:
            outputs |= 1 << index
    return outputs, tuple(needed)


class DirectionNeeds(NamedTuple):
    """Whether the gradient of each weight slot of one direction is needed."""

    w_ih: bool
    w_hh: bool
    b_ih: bool
    b_hh: bool
    w_hr: bool
    w_unit: bool
    gain_ih: bool = False
    gain_hh: bool = False
    gain_c: bool = False
    bias_c: bool = False


def gradients_by_torch(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, saved: Tensor
) -> Gradients:
    """Computes the gradients by the operator of the time loop and torch's matrix products."""
    spec, _, sequence, h0, c0, (flat, slots), _ = call
    loop = backward_op if len(d_outputs) == 3 else states_backward_op
    found = loop(
        *d_outputs, h0, c0, flat, slots | sequence.slots, sequence.flat, y, saved, spec.name
    )
    return gradients_of_loop(call, needs, found, y, saved)


def gradients_of_loop(
    call: LayerCall,
    needs: tuple[bool, ...],
    found: tuple[Tensor, ...],
    y: Tensor,
    saved: Tensor,
    before: Sequence[Tensor] | None = None,
) -> Gradients:
    """Computes the gradients of a layer from those that the time loop leaves.

    Args:
        call: the layer.
        needs: whether the gradients of x, h0, c0 and each weight are needed.
        found: d_pre, d_h_all, d_h0 and d_c0, the results of ``recurrent_backward``.
        y, saved: results of ``recurrent_forward``.
        before: for each direction the state before each row [N,R]; None for that of the sequence.
    """
    spec, x, sequence, h0, _, weights, _ = call
    need_x, need_h0, need_c0, *need_weights = needs
    d_pre, d_h_all, d_h0, d_c0 = found
    slots = weights.slots
    rows, width = d_pre.shape[1:]
    hidden = width // spec.gradient_columns
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
        side_x = _side(pre, spec.ranges_x, hidden)
        d_w_ih = d_w_hh = d_b_ih = d_b_hh = d_w_hr = d_w_unit = None
        if need_x:
            w_ih = _cast(w.w_ih, pre)
            for part, gates in side_x:
                w_part = w_ih if gates is None else w_ih[gates]
                d_x = torch.mm(part, w_part) if d_x is None else _add_product(d_x, part, w_part)
        if need.w_ih:
            if x_rows is None:
                x_rows = _cast(x.reshape(rows, x.shape[-1]), pre)
            d_w_ih = _cast(_weight_gradient(side_x, x_rows), w.w_ih)
        if need.w_hh and w.w_hh is not None:
            if y_rows is None:
                y_rows = _cast(y if y.dim() == 2 else y.flatten(0, 1), pre)
            y_own = y_rows
            if is_bidirectional:
                y_own = y_rows[:, direction * size : (direction + 1) * size]
            side_h = _side(pre, spec.ranges_h, hidden)
            if before is None:
                h = _cast(h0[direction], pre)
                d_w_hh = _recurrent_gradient(side_h, y_own, h, sequence, direction == 1)
            else:
                d_w_hh = _weight_gradient(side_h, _cast(before[direction], pre))
            d_w_hh = _cast(d_w_hh, w.w_hh)
        if need.b_ih or need.b_hh or need.w_unit:
            sums = pre.sum(0)  # one pass over d_pre for all vectors
            if need.b_ih:
                d_b_ih = _cast(_bias_gradient(sums, spec.ranges_x, hidden), w.w_ih)
            if need.b_hh:
                d_b_hh = _cast(_bias_gradient(sums, spec.ranges_h, hidden), w.w_ih)
                if need.b_ih and spec.ranges_x == spec.ranges_h:
                    # the gradients of two parameters must not share memory
                    d_b_hh = d_b_hh.clone()
            if need.w_unit:
                d_w_unit = _cast(sums[spec.pre * hidden :].clone(), w.w_ih)
        if need.w_hr and w.w_hr is not None:
            d_w_hr = _projection_gradient(spec, d_h_all[direction], saved[direction])
            d_w_hr = _cast(d_w_hr, w.w_hr)
        by_slot = (d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_w_unit)
        d_weights += [by_slot[slot] for slot in own]
    return (
        None if d_x is None else _cast(d_x, x).view(x.shape),
        d_h0 if need_h0 else None,
        d_c0 if need_c0 else None,
        *d_weights,
    )


def _cast(t: Tensor, like: Tensor) -> Tensor:
    return t if t.dtype == like.dtype else t.to(like.dtype)


# The columns of d_pre that belong to one side of the cell, in as few parts as possible. Each part
# is [N,k*H], with the rows of the weight that it belongs to (None for all rows).
Side = list[tuple[Tensor, "slice | None"]]


def _side(pre: Tensor, ranges: Sequence[ColumnRange], hidden: int) -> Side:
    if len(ranges) == 1:
        (only,) = ranges
        is_all = only.width * hidden == pre.shape[1]
        return [(pre if is_all else pre[:, only.columns(hidden)], None)]
    return [(pre[:, part.columns(hidden)], part.gate_rows(hidden)) for part in ranges]


def _bias_gradient(sums: Tensor, ranges: Sequence[ColumnRange], hidden: int) -> Tensor:
    """Returns one side's part [G*H] of the column sums [Q*H] of d_pre."""
    if len(ranges) == 1:
        (only,) = ranges
        return sums if only.width * hidden == sums.shape[0] else sums[only.columns(hidden)]
    return torch.cat([sums[part.columns(hidden)] for part in ranges])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes total += a @ b by an operator that ``torch.utils.flop_counter`` counts."""
    return torch.addmm(total, a, b, out=total)


def _weight_gradient(side: Side, inputs: Tensor) -> Tensor:
    """Returns d_w [G*H,K] = side^T [G*H,N] @ inputs [N,K]."""
    if len(side) == 1:
        return torch.mm(side[0][0].t(), inputs)
    d_w = inputs.new_empty(sum(part.shape[1] for part, _ in side), inputs.shape[1])
    for part, gates in side:
        torch.mm(part.t(), inputs, out=d_w[gates])
    return d_w


def _recurrent_gradient(
    side: Side, y: Tensor, h0: Tensor, sequence: SequenceTensors, backwards: bool
) -> Tensor:
    """Returns d_w_hh [G*H,R]: `_weight_gradient` whose inputs are the states before each row.

    Args:
        side: the hidden side of the gradient of the pre-activations.
        y: [N,R] outputs of this direction.
        h0: [B,R] initial state.
        sequence: the tensors that describe the sequences of the batch.
        backwards: whether this direction runs backwards in time.
    """
    batch = h0.shape[0]
    later = y.shape[0] - batch
    if sequence.flat:
        return _weight_gradient(side, previous_states(y, h0, sequence, backwards))
    if later <= 0:  # one step, or none
        return _weight_gradient(side, h0 if later == 0 else y)
    gate_rows = sum(part.shape[1] for part, _ in side)
    if is_traced(y) or later <= gate_rows:
        # Copying y costs less than a second pass over d_w. Compiled code always copies, so that it
        # does not depend on T*B.
        return _weight_gradient(side, previous_states(y, h0, sequence, backwards))
    if backwards:
        rows_later, rows_first, h_later = slice(0, later), slice(later, None), y[batch:]
    else:
        rows_later, rows_first, h_later = slice(batch, None), slice(0, batch), y[:later]
    d_w = _weight_gradient([(part[rows_later], gates) for part, gates in side], h_later)
    for part, gates in side:
        _add_product(d_w if gates is None else d_w[gates], part[rows_first].t(), h0)
    return d_w


def _lstm_before_projection(saved: Tensor) -> Tensor:
    """Returns o * tanh(c') [N,H]; ``saved`` holds i,f,g,o,c'."""
    _, _, _, o, c = saved.chunk(5, dim=1)
    return o * torch.tanh(c)


#: for each cell that may have a projection, h' before it from the values that forward saves
BEFORE_PROJECTION: dict[str, Callable[[Tensor], Tensor]] = {"lstm": _lstm_before_projection}


def _projection_gradient(spec: CellSpec, d_h: Tensor, saved: Tensor) -> Tensor:
    """Returns d_w_hr [P,H] = d_h [N,P]^T @ (h' before the projection) [N,H]."""
    return torch.mm(d_h.t(), _cast(BEFORE_PROJECTION[spec.name](saved), d_h))


def composite_gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, transformed: bool
) -> Gradients:
    """Computes the gradients of a layer by `differentiable_gradients`."""
    compute: Any = composite_layer if len(d_outputs) == 3 else composite_states

    def run(x: Tensor, h0: Tensor, c0: Tensor | None, *flat: Tensor) -> Any:
        weights = Weights(flat, call.weights.slots)
        return compute(call._replace(x=x, h0=h0, c0=c0, weights=weights))

    inputs = (call.x, call.h0, call.c0, *call.weights.flat)
    return differentiable_gradients(run, inputs, needs, d_outputs, transformed)


def differentiable_gradients(
    run: Callable[..., Any],
    inputs: tuple[Any, ...],
    needs: tuple[bool, ...],
    d_outputs: Outputs,
    transformed: bool,
) -> Gradients:
    """Computes the gradients by ordinary operations, which can be differentiated again.

    Args:
        run: runs the layer by differentiable operations, from ``inputs``.
        inputs: the tensors that may need a gradient, or None.
        needs: whether each of them does.
        d_outputs: the gradients of y, h_n and c_n; None for zero.
        transformed: whether a transform is active.
    """

    def forward(*wanted: Tensor) -> tuple[Tensor, ...]:
        variables = iter(wanted)
        outputs = run(
            *[next(variables) if need else t for t, need in zip(inputs, needs, strict=True)]
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
            # Aliases, so that autograd stops at this layer's inputs even if one input depends on
            # another. Inputs of a transform that has ended (as in vjp) belong to no graph.
            aliases = [t.view_as(t) for t in wanted]
            aliases = [t if t.requires_grad else t.requires_grad_() for t in aliases]
            gradients = iter(
                torch.autograd.grad(
                    forward(*aliases), aliases, given, create_graph=True, allow_unused=True
                )
            )
    return tuple(next(gradients) if need else None for need in needs)
