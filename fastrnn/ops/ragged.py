"""Padded batches with lengths and resets as one operator per layer, with its gradient.

The operators do what `fastrnn.ops.segments` composes. On the CPU they are written in C++
(csrc/torch/ops_ragged.cpp), except for the gradients of cells with parameters per unit
(`gradients_by_parts`). On CUDA they are the functions of `fastrnn.ops.ragged_on_device`.
Derivatives of derivatives are composed, on CUDA with masks (`fastrnn.ops.masked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn._torch_internals import (
    AutoDispatchBelowAutograd,
    ExcludeDispatchKeyGuard,
    forward_ad,
    is_any_autocast_enabled,
    lazy_clone,
    unbound_apply,
)
from fastrnn.layer_call import PADDED, LayerCall, Results, SequenceMembers
from fastrnn.ops.autograd import AUTOCAST_KEYS, implementations, saved_tensors
from fastrnn.ops.composite import composite_layer
from fastrnn.ops.gradients import (
    Gradients,
    Outputs,
    decode_gradients,
    differentiable_gradients,
    gradients,
    is_transformed,
    select_results,
)
from fastrnn.ops.masked import masked_layer
from fastrnn.ops.operators import (
    decode_layer,
    ragged_forward,
    ragged_gradients,
    ragged_layer_op,
    records_gradient,
)
from fastrnn.ops.ragged_arguments import gradient_arguments
from fastrnn.ops.ragged_on_device import (
    forward_on_device,
    gradients_on_device,
    keeps_marks,
    layer_on_device,
)
from fastrnn.ops.segments import (
    Ragged,
    Segments,
    cut,
    initial_states,
    run_composed,
    slice_states,
    state_slice,
)
from fastrnn.spec import CELLS, FORWARD_OUTPUTS, GRADIENT_OUTPUTS, UNIT, CellSpec, Weights
from fastrnn.tracing import is_capturing

_SAVED = 1 << FORWARD_OUTPUTS.index("saved")
#: the result d_reset_h of ragged_gradients, after the weights of two directions; then d_reset_c
_D_RESET_H = 2 * len(GRADIENT_OUTPUTS) - GRADIENT_OUTPUTS.index("d_w_ih")


def ragged_layer(call: LayerCall, ragged: Ragged) -> Results:
    """Runs one layer over a padded batch by the operators. The caller has checked that they can.

    Args:
        call: the layer; x [T,B,I].
        ragged: lengths int64 and resets bool or float64, on the CPU or the GPU of x, with unchecked
            values.
    """
    spec, x, _, h0, c0, (weights, slots), _ = call
    if torch.compiler.is_compiling() or is_capturing():
        y, h_n, c_n = ragged_layer_op(x, h0, c0, weights, slots, *ragged, spec.name)
        return decode_layer(call, y, h_n, c_n)
    if _records_gradient(call, ragged):
        results = _apply(spec, slots, ragged[:2], True, x, h0, c0, *ragged[2:], *weights)
        return (*results, None) if c0 is None else results
    outputs = spec.inference_outputs
    y, h_n, c_n, _ = ragged_forward(x, h0, c0, weights, slots, *ragged, spec.name, outputs)
    return decode_layer(call, y, h_n, c_n)


def _records_gradient(call: LayerCall, ragged: Ragged) -> bool:
    return records_gradient(call) or (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (ragged.reset_h, ragged.reset_c))
    )


class RaggedFunction(torch.autograd.Function):
    r"""One layer over a padded batch with its gradient.

    Inputs: spec, slots, (lengths, resets), is_eager, x, h0, c0, reset_h, reset_c, \*weights. In
    eager code on the CPU the caller gets a lazy clone of y, as from
    `fastrnn.ops.autograd.EagerLayerFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: CellSpec,
        slots: int,
        marks: tuple[Tensor | None, Tensor | None],
        is_eager: bool,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, saved = ragged_forward(
            x,
            h0,
            c0,
            weights,
            slots,
            *marks,
            reset_h,
            reset_c,
            spec.name,
            spec.training_outputs,
        )
        lengths, resets = marks
        if is_eager:  # the caller may change its lengths and resets before backward
            lengths = None if lengths is None else lengths.clone()
            resets = None if resets is None else resets.clone()
        optional = (c0, lengths, resets, reset_h, reset_c)
        ctx.has = [t is not None for t in optional]
        ctx.save_for_backward(x, h0, y, saved, *(t for t in optional if t is not None), *weights)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.slots = spec, slots
        if is_eager and x.is_cpu:
            y = lazy_clone(y)
        return (y, h_n) if c0 is None else (y, h_n, c_n)

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None
    ) -> Gradients:
        if d_y is None and d_h_n is None and d_c_n is None:
            return (None,) * len(ctx.needs_input_grad)
        x, h0, y, saved, *rest = saved_tensors(ctx)
        c0, *marks = [rest.pop(0) if has else None for has in ctx.has]
        call = LayerCall(ctx.spec, x, PADDED, h0, c0, Weights(rest, ctx.slots))
        arguments = (call, Ragged(*marks), ctx.needs_input_grad[_BEFORE_X:])
        d_outputs = (d_y, d_h_n, d_c_n)
        if is_any_autocast_enabled() and autocast.acts_on(x):  # forward has already cast
            with torch.autocast(x.device.type, enabled=False):
                found = _gradients(*arguments, d_outputs, y, saved)
        else:
            found = _gradients(*arguments, d_outputs, y, saved)
        return None, None, None, None, *found


_BEFORE_X = 4  # the inputs before x
_apply: Any = unbound_apply(RaggedFunction)


def _gradients(
    call: LayerCall,
    ragged: Ragged,
    needs: tuple[bool, ...],
    d_outputs: Outputs,
    y: Tensor,
    saved: Tensor,
) -> Gradients:
    """Computes the gradients of x, h0, c0, reset_h, reset_c and each weight."""
    spec, x, _, h0, c0, (weights, slots), _ = call
    transformed = is_transformed(*d_outputs)
    if transformed or torch.is_grad_enabled() or forward_ad._current_level >= 0:

        def run(
            x: Tensor,
            h0: Tensor,
            c0: Tensor | None,
            reset_h: Tensor | None,
            reset_c: Tensor | None,
            *flat: Tensor,
        ) -> Results:
            own = call._replace(x=x, h0=h0, c0=c0, weights=Weights(flat, slots))
            marks = ragged._replace(reset_h=reset_h, reset_c=reset_c)
            if keeps_marks(x):
                return masked_layer(own, marks, by_kernels=False).results
            return run_composed(own, marks, composite_layer)

        inputs = (x, h0, c0, *ragged[2:], *weights)
        return differentiable_gradients(run, inputs, needs, d_outputs, transformed)
    if x.is_cpu and not slots & UNIT:
        states, resets, of_weights = needs[:3], needs[3:5], needs[5:]
        outputs, indices = select_results(slots, h0.shape[0], (*states, *of_weights))
        for index, need in enumerate(resets):
            outputs |= need << (_D_RESET_H + index)
        results = ragged_gradients(
            *d_outputs, x, h0, c0, weights, slots, *ragged, y, saved, spec.name, outputs
        )
        d_resets = [
            results[_D_RESET_H + index] if need else None for index, need in enumerate(resets)
        ]
        found = decode_gradients(call, results, indices, saved)
        return *found[:3], *d_resets, *found[3:]
    found = iter(
        _by_parts_op(
            *d_outputs, x, h0, c0, weights, slots, *ragged, y, saved, spec.name, list(needs)
        )
    )
    return tuple(next(found) if need else None for need in needs)


class _Part(NamedTuple):
    """Directions that are cut alike, as a layer of packed rows."""

    directions: slice
    columns: slice
    segments: Segments
    call: LayerCall


def _parts(call: LayerCall, ragged: Ragged) -> list[_Part]:
    spec, x, _, h0, c0, (flat, slots), _ = call
    steps, batch, _ = x.shape
    directions, _, size = h0.shape
    count = len(flat) // directions
    is_split = ragged.resets is not None and directions == 2
    parts = []
    for first in range(directions if is_split else 1):
        own = slice(first, first + 1 if is_split else directions)
        segments = cut(steps, batch, ragged.lengths, ragged.resets, first == 1)
        marks = slice_states(ragged, own)
        packed = LayerCall(
            spec,
            x.flatten(0, 1).index_select(0, segments.rows.to(x.device)),
            SequenceMembers(segments.batch_sizes).pack(),
            initial_states(h0[own], marks.reset_h, segments),
            None if c0 is None else initial_states(c0[own], marks.reset_c, segments),
            Weights(flat[own.start * count : own.stop * count], slots),
        )
        columns = slice(own.start * size, own.stop * size)
        parts.append(_Part(own, columns, segments, packed))
    return parts


@torch.no_grad()
def gradients_by_parts(*args: Any) -> list[Tensor]:
    """Runs ``ragged_gradients_by_parts`` for any cell on the CPU: the gradients that are needed."""
    gradient_call = gradient_arguments(*args)
    call, ragged, (d_y, d_h_n, d_c_n), y, saved, needs = gradient_call
    _, x, _, h0, c0, (weights, _), _ = call
    reset_h, reset_c = ragged.reset_h, ragged.reset_c
    if ragged.resets is not None and not bool(ragged.resets.any()):
        ragged = ragged._replace(resets=None)  # as forward, which has cut directions alike
    need_weights = gradient_call.weight_needs
    d_x = x.new_zeros(x.shape)  # dense: the rows of a transposed one would be a copy
    d_states = [None if t is None else torch.zeros_like(t) for t in (h0, c0)]
    d_resets = [None if t is None else t.new_zeros(t.shape) for t in (reset_h, reset_c)]
    d_weights: list[Tensor | None] = []
    count = len(weights) // h0.shape[0]
    for directions, columns, segments, own in _parts(call, ragged):
        rows = segments.rows.to(x.device)
        own_needs = need_weights[directions.start * count : directions.stop * count]
        d_h, d_c = (None if d is None else d[directions] for d in (d_h_n, d_c_n))
        d_initials: Sequence[Tensor | None] = (None, None)
        if len(rows) == 0:
            d_weights += [torch.zeros_like(w) for w in own.weights.flat]
        else:
            found = gradients(
                own,
                (needs[0], True, c0 is not None, *own_needs),
                (
                    None if d_y is None else _packed(d_y, columns, rows),
                    None if d_h is None else _final_gradient(d_h, segments),
                    None if d_c is None else _final_gradient(d_c, segments),
                ),
                _packed(y, columns, rows),
                saved[directions, : len(rows)].contiguous() if saved.dim() == 3 else saved,
            )
            own_d_x, *d_initials = found[:3]
            d_weights += found[3:]
            if own_d_x is not None:
                d_x.flatten(0, 1).index_add_(0, rows, own_d_x)
        for d_initial, d_final, d_state, d_reset in zip(
            d_initials, (d_h, d_c), d_states, d_resets, strict=True
        ):
            if d_state is not None:
                of_reset = None if d_reset is None else state_slice(d_reset, directions)
                _add_to_states(d_initial, d_final, segments, d_state[directions], of_reset)
    all_gradients = (d_x, *d_states, *d_resets, *d_weights)
    return [t for t, need in zip(all_gradients, needs, strict=True) if need and t is not None]


def _packed(t: Tensor, columns: slice, rows: Tensor) -> Tensor:
    """Returns columns of t [T,B,*] in packed order."""
    return t.flatten(0, 1)[:, columns].index_select(0, rows)


def _final_gradient(gradient: Tensor, segments: Segments) -> Tensor:
    """Returns the gradients of the segments' final states [D,A,*] from those of the rows."""
    directions, _, size = gradient.shape
    count = len(segments.initial)
    has_steps = segments.final < count
    packed = gradient.new_zeros(directions, count, size)
    last = segments.final[has_steps].to(packed.device)
    return packed.index_copy_(1, last, gradient[:, has_steps.to(packed.device)])


def _add_to_states(
    d_initial: Tensor | None,
    d_final: Tensor | None,
    segments: Segments,
    d_state: Tensor,
    d_reset: Tensor | None,
) -> None:
    """Adds the gradients of the segments' initial states [D,A,*] to those of the states.

    The final state of a row without steps is its initial one.
    """
    device, batch, index = d_state.device, d_state.shape[1], segments.initial
    if d_final is not None:
        is_empty = (segments.final >= len(index)).to(device)
        d_state[:, is_empty] += d_final[:, is_empty]
    if d_initial is None:
        return
    after_reset = index >= batch
    first = ~after_reset
    d_state.index_add_(1, index[first].to(device), d_initial[:, first.to(device)])
    if d_reset is None:
        return
    where = (index[after_reset] - batch).to(device)
    d_rows = d_initial[:, after_reset.to(device)]
    if d_reset.dim() == 3:
        d_reset.index_add_(1, where % batch, d_rows)
    else:
        d_reset[where // batch, :, where % batch] = d_rows.transpose(0, 1)


def _layer_autograd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    cell: str,
) -> tuple[Tensor, ...]:
    """Runs ``ragged_layer`` under autograd: the code of the dispatch key "Autograd"."""
    spec = CELLS.get(cell)  # the kernel raises for an unknown cell
    if spec is not None:
        call = LayerCall(spec, x, PADDED, h0, c0, Weights(weights, slots))
        if _records_gradient(call, Ragged(lengths, resets, reset_h, reset_c)):
            apply: Any = RaggedFunction.apply
            marks = (lengths, resets)
            results = apply(spec, slots, marks, False, x, h0, c0, reset_h, reset_c, *weights)
            return results if c0 is not None else (*results, x.new_empty(0))
    with AutoDispatchBelowAutograd():
        return ragged_layer_op(  # type: ignore[no-any-return]
            x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell
        )


def _layer_autocast(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    cell: str,
) -> tuple[Tensor, ...]:
    """Runs ``ragged_layer`` under autocast, with the types of `fastrnn.autocast`."""
    spec = CELLS.get(cell)  # the kernel raises for an unknown cell
    marks = Ragged(lengths, resets, reset_h, reset_c)
    with ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
        if spec is None or not autocast.acts_on(x):
            return ragged_layer_op(  # type: ignore[no-any-return]
                x, h0, c0, weights, slots, *marks, cell
            )
        call = LayerCall(spec, x, PADDED, h0, c0, Weights(weights, slots))
        cast = autocast.cast_call(call)
        marks = cast_states(marks, cast.x.dtype)
        y, h_n, c_n = ragged_layer_op(
            cast.x, cast.h0, cast.c0, cast.weights.flat, slots, *marks, cell
        )
        y, h_n, c_cast = autocast.cast_results(call, decode_layer(call, y, h_n, c_n))
        return y, h_n, c_n if c_cast is None else c_cast


def cast_states(ragged: Ragged, dtype: torch.dtype) -> Ragged:
    """Casts the states after a reset."""
    reset_h, reset_c = ragged[2:]
    return ragged._replace(
        reset_h=None if reset_h is None else reset_h.to(dtype),
        reset_c=None if reset_c is None else reset_c.to(dtype),
    )


def _by_parts_fake(*args: Any) -> list[Tensor]:
    *_, x, h0, c0, weights, _, _, _, reset_h, reset_c, _, _, _, needs = args
    return [
        t.new_empty(t.shape)
        for t, need in zip((x, h0, c0, reset_h, reset_c, *weights), needs, strict=True)
        if need and t is not None
    ]


_fragment = torch.library.Library("fastrnn", "FRAGMENT")
_fragment.define(
    "ragged_gradients_by_parts(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor h0, "
    "Tensor? c0, Tensor[] weights, int slots, Tensor? lengths, Tensor? resets, Tensor? reset_h, "
    "Tensor? reset_c, Tensor y, Tensor saved, str cell, bool[] needs) -> Tensor[]"
)
_fragment.impl("ragged_gradients_by_parts", gradients_by_parts, "CompositeExplicitAutograd")
_fragment.impl("ragged_gradients_by_parts", gradients_on_device, "CUDA")
torch.library.register_fake("fastrnn::ragged_gradients_by_parts", _by_parts_fake)
_by_parts_op = torch.ops.fastrnn.ragged_gradients_by_parts.default
implementations.impl("ragged_forward", forward_on_device, "CUDA")
implementations.impl("ragged_layer", layer_on_device, "CUDA")
implementations.impl("ragged_layer", _layer_autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    implementations.impl("ragged_layer", _layer_autocast, _key)
