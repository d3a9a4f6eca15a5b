"""Padded batches with lengths and resets by masks, one direction after the other.

`fastrnn.ops.ragged_on_device` runs a layer on a GPU by one operator. This module is for the calls
on a GPU that need more: what every step leaves, training in chunks of steps, derivatives of
derivatives, transforms. The host does not read the marks here either. Each direction becomes a
layer that runs forwards in time and ends with the last step of every row:

    lengths 4, 2     direction 0   x00 x01 x02 x03     direction 1   x03 x02 x01 x00
                                    0   0  x10 x11                    0   0  x11 x10

A mask says before which steps the state of a row is replaced: before a reset by the state after it,
before a row's first step and in the padding by the initial state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn._torch_internals import is_any_autocast_enabled
from fastrnn.layer_call import PADDED, LayerCall, Options, Results
from fastrnn.ops.autograd import saved_tensors
from fastrnn.ops.composite import as_kernels
from fastrnn.ops.gradients import (
    Gradients,
    differentiable_gradients,
    gradients_of_loop,
    is_differentiated,
)
from fastrnn.ops.operators import accumulate_dtype, reset_backward, reset_forward
from fastrnn.ops.ragged_on_device import Marks, marks_of, states_before, where
from fastrnn.ops.recompute import chunk_length
from fastrnn.ops.segments import Ragged, slice_states, take
from fastrnn.ops.states import Steps, gates_by_torch, gates_of_output
from fastrnn.reference import GATES, reference_states
from fastrnn.spec import CellSpec, Weights


class Masked(NamedTuple):
    """Where the states of a direction are replaced.

    Attributes:
        mask: bool [T,B], whether the state is replaced before the step.
        h: [1 or T,1,B,R] the state that replaces it, of all steps or of each; None for zeros.
        c: the same for the cell state.
    """

    mask: Tensor
    h: Tensor | None
    c: Tensor | None

    def part(self, steps: slice) -> Masked:
        """Returns that of some steps."""
        h, c = (
            state if state is None or len(state) == 1 else state[steps]
            for state in (self.h, self.c)
        )
        return Masked(self.mask[steps], h, c)


class _Order:
    """The order in which a direction computes the steps of each row."""

    def __init__(self, marks: Marks, steps: int, batch: int, device: torch.device, backwards: bool):
        self._index: tuple[Tensor, Tensor] | None = None
        self._flips = backwards
        if marks.lengths is not None and not backwards:
            t = torch.arange(steps, device=device).unsqueeze(1)
            rows = torch.arange(batch, device=device)
            there, back = (t + marks.lengths) % steps, (t - marks.lengths) % steps
            self._index = (there * batch + rows).flatten(), (back * batch + rows).flatten()

    def own(self, t: Tensor) -> Tensor:
        """Returns [T,B,*] in the order of computation."""
        return self._ordered(t, 0)

    def back(self, t: Tensor) -> Tensor:
        """Returns [T,B,*] in the order of time."""
        return self._ordered(t, 1)

    def _ordered(self, t: Tensor, which: int) -> Tensor:
        if self._flips:
            return t.flip(0)
        if self._index is None:
            return t
        return take(t.flatten(0, 1), 0, self._index[which]).view_as(t)


def masked_layer(
    call: LayerCall,
    ragged: Ragged,
    by_kernels: bool,
    wants_c: bool = False,
    wants_gates: bool = False,
) -> Steps:
    """Runs one layer over a padded batch with lengths and resets. Differentiable.

    Args:
        call: the layer; x [T,B,I]. ``recompute`` in its options has an effect on the kernels unless
            values of each step are wanted.
        ragged: lengths int64 and resets bool or float64, with unchecked values.
        by_kernels: whether the kernels compute, or torch operations.
        wants_c, wants_gates: which values of each step to return; zeros beyond a row's end.
    """
    spec, x, _, h0, c0, (flat, slots), options = call
    steps, batch, _ = x.shape
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    marks = marks_of(call, ragged)
    x = where(marks.exists, x)  # padding may hold anything, such as NaN
    wants_c = wants_c and spec.has_cell_state
    chunk = 0
    if options.recompute != 0 and not (wants_c or wants_gates):
        chunk = min(chunk_length(options.recompute, steps), steps)
    directions = h0.shape[0]
    count = len(flat) // directions
    outputs, h_n, c_n, c_steps = [], [], [], []
    gates: list[dict[str, Tensor]] = []
    for d in range(directions):
        order = _Order(marks, steps, batch, x.device, d == 1)
        states = slice(d, d + 1)
        own = LayerCall(
            spec,
            order.own(x),
            PADDED,
            h0[states],
            None if c0 is None else c0[states],
            Weights(flat[d * count : (d + 1) * count], slots),
            Options(recompute=chunk),
        )
        masked = _masked(marks, order, own, slice_states(ragged, states))
        run = _by_kernels if by_kernels else _by_torch
        y, h, c, own_c_steps, saved = run(own, masked)

        def placed(rows: Tensor, order: _Order = order) -> Tensor:
            """Returns values of each step [T,B,*] in the order of time, zero in the padding."""
            return where(marks.exists, order.back(rows))

        if wants_gates:
            rows = _gates(own, masked, y, saved)
            gates.append({name: placed(t.view(steps, batch, -1)) for name, t in rows.items()})
        if wants_c:
            c_steps.append(placed(own_c_steps.view(steps, batch, -1)))
        outputs.append(placed(y))
        h_n.append(_final(marks, h, own.h0))
        if own.c0 is not None:
            c_n.append(_final(marks, c, own.c0))
    y = torch.cat(outputs, -1) if directions > 1 else outputs[0]
    results: Results = y, torch.cat(h_n), torch.cat(c_n) if c_n else None

    def stacked(parts: list[Tensor]) -> Tensor:
        return torch.stack([t.flatten(0, 1) for t in parts], 1)

    return Steps(
        results,
        stacked(c_steps) if c_steps else None,
        {name: stacked([own[name] for own in gates]) for name in gates[0]} if gates else None,
    )


def _final(marks: Marks, final: Tensor, initial: Tensor) -> Tensor:
    """Returns the states after the last steps of the rows; the initial ones of rows without."""
    if marks.lengths is None:
        return final
    return torch.where((marks.lengths == 0).unsqueeze(-1), initial, final)


def _masked(marks: Marks, order: _Order, call: LayerCall, ragged: Ragged) -> Masked:
    """Returns where the states of a direction, in its order, are replaced."""
    steps, batch, _ = call.x.shape
    resets = None if marks.resets is None else order.own(marks.resets)
    exists = from_initial = None
    mask = resets
    if marks.lengths is not None:
        first = steps - marks.lengths
        t = torch.arange(steps, device=call.x.device).unsqueeze(1)
        exists, from_initial = t >= first, t <= first
        mask = from_initial
        if resets is not None:
            from_initial = ~exists | (from_initial & ~resets)
            mask = from_initial | resets
    if mask is None:
        mask = torch.zeros(steps, batch, dtype=torch.bool, device=call.x.device)

    def state(initial: Tensor | None, reset: Tensor | None) -> Tensor | None:
        if initial is None:
            return None
        if resets is None:
            return None if from_initial is None else initial.unsqueeze(0)
        if reset is not None:
            reset = reset.unsqueeze(0) if reset.dim() == 3 else _steps_first(order, reset)
        if exists is None or from_initial is None:
            return reset
        if reset is not None and len(reset) == steps:  # padding may hold anything, such as NaN
            reset = torch.where(exists[:, None, :, None], reset, 0)
        other: Any = 0 if reset is None else reset
        return torch.where(from_initial[:, None, :, None], initial, other)

    return Masked(mask, state(call.h0, ragged.reset_h), state(call.c0, ragged.reset_c))


def _steps_first(order: _Order, reset: Tensor) -> Tensor:
    """Returns states after a reset [T,1,B,*] in the order of a direction."""
    return order.own(reset.squeeze(1)).unsqueeze(1)


def _gates(call: LayerCall, masked: Masked, y: Tensor, saved: Tensor | None) -> dict[str, Tensor]:
    """Returns for each gate [T*B,1,H] its activations, detached."""
    spec = call.spec
    if spec.name not in GATES:
        return gates_of_output(call, y)
    if saved is None:
        return gates_by_torch(call, y, states_before(call, y, masked.mask[None], masked.h))
    values = saved.detach()[0].unflatten(1, (spec.saved, -1)).unbind(1)
    names = GATES[spec.name].names
    return {name: t.unsqueeze(1) for name, t in zip(names, values, strict=False)}


# --- one direction, by torch operations


def _by_torch(call: LayerCall, masked: Masked) -> tuple[Any, ...]:
    """Returns y, h_n, c_n, c_steps [T*B,C*H], and None for the saved values."""
    return *as_kernels(lambda own: _loop(own, masked), call), None


def _loop(call: LayerCall, masked: Masked) -> tuple[Tensor | None, ...]:
    h, c = call.h0, call.c0
    outputs, c_steps = [], []

    def before(state: Tensor, other: Tensor | None, t: int) -> Tensor:
        replaced: Any = 0
        if other is not None:
            replaced = other[t if len(other) > 1 else 0].to(state.dtype)
        return torch.where(masked.mask[t].unsqueeze(-1), replaced, state)

    for t in range(len(call.x)):
        h = before(h, masked.h, t)
        c = None if c is None else before(c, masked.c, t)
        y, h, c, _ = reference_states(call._replace(x=call.x[t : t + 1], h0=h, c0=c))
        outputs.append(y)
        if c is not None:
            c_steps.append(c.squeeze(0))
    return torch.cat(outputs), h, c, torch.cat(c_steps) if c_steps else None


# --- one direction, by the kernels


def _by_kernels(call: LayerCall, masked: Masked) -> tuple[Any, ...]:
    """Returns y, h_n, c_n, c_steps [T*B,C*H] and the saved values; the last two without chunks."""
    spec, x, _, h0, c0, (weights, slots), options = call
    apply: Any = _DirectionFunction.apply
    chunk = options.recompute
    return tuple(apply(spec, slots, chunk, masked.mask, x, h0, c0, *masked[1:], *weights))


class _DirectionFunction(torch.autograd.Function):
    r"""One direction by the kernels with its gradient.

    Inputs: spec, slots, chunk, mask, x, h0, c0, h and c of `Masked`, \*weights. With a chunk, a
    number of steps, backward computes the saved values of so many steps at a time again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: CellSpec,
        slots: int,
        chunk: int,
        mask: Tensor,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        state_h: Tensor | None,
        state_c: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        call = LayerCall(spec, x, PADDED, h0, c0, Weights(weights, slots))
        masked = Masked(mask, state_h, state_c)
        h, c = h0, c0
        outputs, kept = [], []
        saved = x.new_empty(0)
        for steps in _chunks(len(x), chunk):
            kept += [h] if c is None else [h, c]
            y, h, c, saved = _forward(call, masked, steps, h, c, chunk == 0)
            outputs.append(y)
        y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        c_steps = _cell_states(spec, saved, x) if chunk == 0 and c is not None else x.new_empty(0)
        optional = (c0, state_h, state_c)
        ctx.has = [t is not None for t in optional]
        ctx.weights, ctx.spec, ctx.slots, ctx.chunk = len(weights), spec, slots, chunk
        given = (t for t in optional if t is not None)
        ctx.save_for_backward(mask, x, h0, *given, *weights, y, saved, *kept)
        ctx.set_materialize_grads(False)
        c_n = x.new_empty(0) if c is None else c
        constant = [saved, *([c_steps] if chunk or c0 is None else [])]
        ctx.mark_non_differentiable(*constant, *([c_n] if c0 is None else []))
        return y, h, c_n, c_steps, saved

    @staticmethod
    def backward(
        ctx: Any,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        d_c_steps: Tensor | None,
        _: None,
    ) -> Gradients:
        needs = ctx.needs_input_grad[_BEFORE_X:]
        before = (None,) * _BEFORE_X
        if d_y is None and d_h_n is None and d_c_n is None and d_c_steps is None:
            return (*before, *(None,) * len(needs))
        mask, x, h0, *rest = saved_tensors(ctx)
        c0, state_h, state_c = [rest.pop(0) if has else None for has in ctx.has]
        weights, (y, saved, *kept) = rest[: ctx.weights], rest[ctx.weights :]
        call = LayerCall(ctx.spec, x, PADDED, h0, c0, Weights(weights, ctx.slots))
        masked = Masked(mask, state_h, state_c)
        d_outputs = (d_y, d_h_n, d_c_n, d_c_steps)
        arguments = (call, masked, needs, d_outputs, ctx.chunk, y, saved, kept)
        if is_any_autocast_enabled() and autocast.acts_on(x):  # forward has cast the tensors
            with torch.autocast(x.device.type, enabled=False):
                return (*before, *_gradients(*arguments))
        return (*before, *_gradients(*arguments))


_BEFORE_X = 4  # the inputs before x

#: the gradients of y, h_n, c_n and c_steps, None for zero
_DOutputs = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


def _chunks(steps: int, chunk: int) -> list[slice]:
    length = chunk or steps
    return [slice(first, min(first + length, steps)) for first in range(0, steps, length)]


def _forward(
    call: LayerCall, masked: Masked, steps: slice, h: Tensor, c: Tensor | None, saves: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Runs some steps from the states before them."""
    spec, (weights, slots) = call.spec, call.weights
    outputs = spec.training_outputs if saves else spec.inference_outputs
    mask, state_h, state_c = masked.part(steps)
    y, h_n, c_n, saved = reset_forward(
        call.x[steps], h, c, weights, slots, mask[None], state_h, state_c, spec.name, outputs
    )
    return y, h_n, None if c is None else c_n, saved


def _cell_states(spec: CellSpec, saved: Tensor, like: Tensor) -> Tensor:
    """Returns the cell states [T*B,C*H] among the saved values."""
    values: Tensor = saved[0].unflatten(1, (spec.saved, -1))[:, spec.saved - spec.cell_states :]
    return values.flatten(1).to(like.dtype)


def _gradients(
    call: LayerCall,
    masked: Masked,
    needs: tuple[bool, ...],
    d_outputs: _DOutputs,
    chunk: int,
    y: Tensor,
    saved: Tensor,
    kept: list[Tensor],
) -> Gradients:
    """Returns the gradients of x, h0, c0, both states of `Masked` and each weight."""
    transformed, differentiated = is_differentiated(d_outputs)
    if differentiated:

        def run(
            x: Tensor, h0: Tensor, c0: Any, state_h: Any, state_c: Any, *flat: Tensor
        ) -> tuple[Any, ...]:
            own = call._replace(x=x, h0=h0, c0=c0, weights=Weights(flat, call.weights.slots))
            return _by_torch(own, Masked(masked.mask, state_h, state_c))[:4]

        inputs = (call.x, call.h0, call.c0, *masked[1:], *call.weights.flat)
        return differentiable_gradients(run, inputs, needs, d_outputs, transformed)
    return _gradients_by_kernels(call, masked, needs, d_outputs, chunk, y, saved, kept)


def _gradients_by_kernels(
    call: LayerCall,
    masked: Masked,
    needs: tuple[bool, ...],
    d_outputs: _DOutputs,
    chunk: int,
    y: Tensor,
    saved: Tensor,
    kept: list[Tensor],
) -> Gradients:
    spec, x, _, _, c0, (weights, slots), _ = call
    need_x, _, _, need_state_h, need_state_c, *need_weights = needs
    d_y, d_h, d_c, d_c_steps = d_outputs
    has_c = c0 is not None
    batch = x.shape[1]
    d_x: list[Tensor] = []
    d_states: tuple[list[Tensor], list[Tensor]] = ([], [])
    d_weights: list[Tensor | None] = [None] * len(weights)
    per_chunk = 2 if has_c else 1
    for index, steps in reversed(list(enumerate(_chunks(len(x), chunk)))):
        h, *cells = kept[index * per_chunk : (index + 1) * per_chunk]
        c = cells[0] if has_c else None
        own_y, own_saved = y, saved
        if chunk:
            own_y, _, _, own_saved = _forward(call, masked, steps, h, c, True)
        part = masked.part(steps)
        rows = slice(steps.start * batch, steps.stop * batch)
        *found, d_state_h, d_state_c = reset_backward(
            None if d_y is None else d_y[steps],
            d_h,
            d_c,
            None if d_c_steps is None else d_c_steps[None, rows],
            h,
            c,
            weights,
            slots,
            part.mask[None],
            part.h,
            part.c,
            own_y,
            own_saved,
            spec.name,
        )
        own = call._replace(x=x[steps], h0=h, c0=c)
        own_d_x, d_h, d_c, *own_d_weights = gradients_of_loop(
            own,
            (need_x, True, has_c, *need_weights),
            tuple(found),
            own_y,
            own_saved,
            states_before(own, own_y, part.mask[None], part.h),
        )
        if own_d_x is not None:
            d_x.insert(0, own_d_x)
        d_states[0].insert(0, d_state_h)
        d_states[1].insert(0, d_state_c)
        d_weights = [_sum(total, t) for total, t in zip(d_weights, own_d_weights, strict=True)]
    return (
        torch.cat(d_x) if d_x else None,
        d_h,
        d_c,
        _of_state(d_states[0], masked.h) if need_state_h else None,
        _of_state(d_states[1], masked.c) if need_state_c else None,
        *[None if t is None else t.to(w.dtype) for t, w in zip(d_weights, weights, strict=True)],
    )


def _of_state(parts: list[Tensor], state: Tensor | None) -> Tensor | None:
    """Returns the gradient of a state of `Masked` from those of the chunks."""
    if state is None:
        return None
    total = torch.stack(parts).sum(0) if len(state) == 1 else torch.cat(parts)
    return total.to(state.dtype)


def _sum(total: Tensor | None, t: Tensor | None) -> Tensor | None:
    """Adds a chunk's gradient in the dtype in which the kernels accumulate."""
    if t is None:
        return None
    t = t.to(accumulate_dtype(t.dtype))
    return t if total is None else total.add_(t)
