"""Padded batches with lengths and resets on a GPU, whose values the host does not read.

The kernels run all T steps of all rows. A mask says before which steps the state of a row is
replaced, by the state after a reset; the steps beyond a row's end are computed too, from x = 0 and
a state of their own, and their results are masked:

    row of 3 steps, T = 5, a reset before step 1

    direction 0   x0 | x1  x2 | 0 | 0     from the reset state, then from zeros
    direction 1   x0   x1 | x2 | 0 | 0    from the reset state at x1, from h0 at x2 and beyond

Everything is queued on the stream, so a call can be part of a CUDA graph. The time is that of the
padded batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.layer_call import PADDED, LayerCall
from fastrnn.ops.gradients import gradients_of_loop
from fastrnn.ops.operators import forward_op, reset_backward, reset_forward
from fastrnn.ops.ragged_arguments import gradient_arguments, ragged_arguments
from fastrnn.ops.segments import Ragged
from fastrnn.ops.sequence import previous_states
from fastrnn.spec import FORWARD_OUTPUTS

_SAVED = 1 << FORWARD_OUTPUTS.index("saved")


def keeps_marks(x: Tensor) -> bool:
    """Whether the marks of a batch stay on its device: their values are not read."""
    return x.is_cuda


class Marks(NamedTuple):
    """The marks of a batch on its device.

    Attributes:
        lengths: int64 [B], from 0 to T, or None if all are T.
        exists: bool [T,B] whether a row has the step, or None if all have all.
        is_last: bool [T,B] whether the step is the last one of its row, or None as `exists`.
        resets: bool [T,B], or None.
    """

    lengths: Tensor | None
    exists: Tensor | None
    is_last: Tensor | None
    resets: Tensor | None


def marks_of(call: LayerCall, ragged: Ragged) -> Marks:
    """Returns the marks of a layer on the device of its input."""
    steps, device = call.x.shape[0], call.x.device
    lengths, resets = ragged.lengths, ragged.resets
    if resets is not None:
        resets = resets.to(device) != 0
    if lengths is None:
        return Marks(None, None, None, resets)
    lengths = lengths.to(device).clamp(0, steps)
    t = torch.arange(steps, device=device).unsqueeze(1)
    return Marks(lengths, t < lengths, t == lengths - 1, resets)


def _masks(marks: Marks, call: LayerCall) -> Tensor:
    """Returns for each direction before which steps the state is replaced: bool [D,T,B]."""
    steps, batch, _ = call.x.shape
    _, exists, is_last, resets = marks
    masks = []
    for direction in range(call.h0.shape[0]):
        mask = torch.zeros(steps, batch, dtype=torch.bool, device=call.x.device)
        if resets is not None:
            mask = mask | resets
        if exists is not None and is_last is not None:
            mask = mask | ~exists
            if direction == 1:
                mask = mask | is_last
        masks.append(mask)
    return torch.stack(masks)


def _from_initial(marks: Marks) -> Tensor | None:
    """Returns where direction 1 starts from its initial state at a row's end: bool [T,B,1]."""
    _, exists, is_last, resets = marks
    if exists is None or is_last is None:
        return None
    starts = is_last if resets is None else is_last & ~resets
    return (starts | ~exists).unsqueeze(-1)


def _states(marks: Marks, initial: Tensor, reset: Tensor | None) -> Tensor | None:
    """Returns the states that replace others: [1 or T,D,B,*], or None for zeros.

    Args:
        marks: the marks.
        initial: [D,B,*] h0 or c0.
        reset: [D,B,*] or [T,D,B,*] the states after a reset, or None for zeros.
    """
    if marks.resets is None:
        reset = None  # nothing reads it
    if reset is not None:
        if reset.dim() == 3:
            reset = reset.unsqueeze(0)
        elif marks.exists is not None:  # padding may hold anything, such as NaN
            reset = torch.where(marks.exists[:, None, :, None], reset, 0)
    from_initial = _from_initial(marks)
    if from_initial is None or initial.shape[0] == 1:
        return reset
    first = initial.new_zeros(1, 1, *initial.shape[1:]) if reset is None else reset[:, :1]
    if marks.resets is None:
        return torch.cat([first, initial[None, 1:]], 1)
    second = 0 if reset is None else reset[:, 1]
    second = torch.where(from_initial, initial[1], second).unsqueeze(1)
    return torch.cat([first.expand(len(second), -1, -1, -1), second], 1)


def where(condition: Tensor | None, t: Tensor) -> Tensor:
    """Returns t [T,B,*] with zeros where the condition [T,B] does not hold."""
    return t if condition is None else torch.where(condition.unsqueeze(-1), t, 0)


@torch.no_grad()
def forward_on_device(*args: Any) -> tuple[Tensor, ...]:
    """Runs ``ragged_forward`` on a GPU. Its saved values are those of the padded batch."""
    *arguments, outputs = args
    call, ragged = ragged_arguments(*arguments)
    spec, x, _, h0, c0, (weights, slots), _ = call
    marks = marks_of(call, ragged)
    steps, batch, _ = x.shape
    if steps == 0 or (marks.lengths is None and marks.resets is None):
        return tuple(forward_op(x, h0, c0, weights, slots, None, spec.name, outputs))
    if marks.lengths is not None and c0 is not None:
        outputs |= _SAVED  # which holds the cell states of every step
    y, h_n, c_n, saved = reset_forward(
        where(marks.exists, x),
        h0,
        c0,
        weights,
        slots,
        _masks(marks, call),
        _states(marks, h0, ragged.reset_h),
        None if c0 is None else _states(marks, c0, ragged.reset_c),
        spec.name,
        outputs,
    )
    if marks.lengths is None:
        return y, h_n, c_n, saved
    last = (marks.lengths - 1).clamp(min=0), torch.arange(batch, device=x.device)
    is_empty = (marks.lengths == 0).unsqueeze(-1)
    size = h0.shape[2]
    # direction 1 ends at step 0 of every row
    h_n = torch.where(is_empty, h0, torch.cat([y[..., :size][last].unsqueeze(0), h_n[1:]]))
    if c0 is not None:
        columns = c0.shape[2] // spec.cell_states * (spec.saved - spec.cell_states)
        c = saved[0].view(steps, batch, -1)[..., columns:][last].to(c0.dtype)
        c_n = torch.where(is_empty, c0, torch.cat([c.unsqueeze(0), c_n[1:]]))
    return where(marks.exists, y), h_n, c_n, saved


def layer_on_device(*args: Any) -> tuple[Tensor, ...]:
    """Runs ``ragged_layer`` on a GPU."""
    outputs = 0
    return forward_on_device(*(*args, outputs))[:3]


@torch.no_grad()
def gradients_on_device(*args: Any) -> list[Tensor]:
    """Runs ``ragged_gradients_by_parts`` on a GPU: the gradients that are needed."""
    gradient_call = gradient_arguments(*args)
    call, ragged, (d_y, d_h_n, d_c_n), y, saved, needs = gradient_call
    spec, x, _, h0, c0, (weights, slots), _ = call
    reset_h, reset_c = ragged.reset_h, ragged.reset_c
    marks = marks_of(call, ragged)
    steps = len(x)
    masks = _masks(marks, call)
    states = [
        None if initial is None else _states(marks, initial, reset)
        for initial, reset in ((h0, reset_h), (c0, reset_c))
    ]
    d_finals: tuple[Tensor | None, Tensor | None] = (d_h_n, d_c_n)
    d_steps = None
    if marks.lengths is not None and marks.is_last is not None:
        # direction 0 ends at each row's last step, direction 1 at step 0
        d_y = None if d_y is None else where(marks.exists, d_y)
        if d_h_n is not None:
            own = where(marks.is_last, d_h_n[0])
            rest = y.shape[-1] - own.shape[-1]
            own = torch.nn.functional.pad(own, (0, rest))
            d_y = own if d_y is None else d_y + own
        if d_c_n is not None:
            d_steps = d_c_n.new_zeros(d_c_n.shape[0], steps, *d_c_n.shape[1:])
            d_steps[0] = where(marks.is_last, d_c_n[0])
            d_steps = d_steps.flatten(1, 2)
        d_finals = (_of_direction_1(d_h_n, marks), _of_direction_1(d_c_n, marks))
    *found, d_reset_h, d_reset_c = reset_backward(
        d_y, *d_finals, d_steps, h0, c0, weights, slots, masks, *states, y, saved, spec.name
    )
    call = call._replace(x=where(marks.exists, x))
    d_x, d_h0, d_c0, *d_weights = gradients_of_loop(
        call,
        (needs[0], True, c0 is not None, *gradient_call.weight_needs),
        tuple(found),
        y,
        saved,
        states_before(call, y, masks, states[0]) if steps > 0 else None,
    )
    results: list[Tensor | None] = [d_x]
    d_resets: list[Tensor | None] = []
    for initial, reset, d_initial, d_final, d_state in (
        (h0, reset_h, d_h0, d_h_n, d_reset_h),
        (c0, reset_c, d_c0, d_c_n, d_reset_c),
    ):
        if initial is None or d_initial is None:
            results.append(None)
            d_resets.append(None)
            continue
        if marks.lengths is not None and d_final is not None:
            d_initial = d_initial + where(marks.lengths == 0, d_final)
        d_initial, d_reset = _split(marks, d_initial, reset, d_state)
        results.append(d_initial)
        d_resets.append(d_reset)
    results += [*d_resets, *d_weights]
    return [t for t, need in zip(results, needs, strict=True) if need and t is not None]


def _of_direction_1(d_final: Tensor | None, marks: Marks) -> Tensor | None:
    """Returns the gradient at the final states that the kernels compute: those of direction 1."""
    if d_final is None or marks.lengths is None or len(d_final) == 1:
        return None
    own = where(marks.lengths > 0, d_final[1:])
    return torch.cat([torch.zeros_like(own), own])


def _split(
    marks: Marks, d_initial: Tensor, reset: Tensor | None, d_state: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients at an initial state and at the state after a reset, if there is one.

    Args:
        marks: the marks.
        d_initial: [D,B,*] the gradient at the rows that start with the batch.
        reset: as in `_states`.
        d_state: the gradient at the result of `_states`.
    """
    from_initial = _from_initial(marks)
    if from_initial is not None and len(d_initial) == 2:
        own = d_state[:, 1]
        if marks.resets is not None:
            d_state = d_state.clone()
            d_state[:, 1] = torch.where(from_initial, 0, own)
            own = torch.where(from_initial, own, 0)
        own = own.sum(0, True).to(d_initial.dtype)
        d_initial = torch.cat([d_initial[:1], d_initial[1:] + own])
    if reset is None:
        return d_initial, None
    if marks.resets is None:
        return d_initial, torch.zeros_like(reset)
    if marks.exists is not None and len(d_state) == len(marks.exists):
        d_state = torch.where(marks.exists[:, None, :, None], d_state, 0)
    if reset.dim() == 3:
        d_state = d_state.sum(0)
    return d_initial, d_state.to(reset.dtype)


def states_before(call: LayerCall, y: Tensor, masks: Tensor, states: Tensor | None) -> list[Tensor]:
    """Returns for each direction the state before each row, [T*B,R]."""
    size = call.h0.shape[2]
    rows = y.flatten(0, 1)
    found = []
    for direction, (mask, h0) in enumerate(zip(masks, call.h0, strict=True)):
        own = rows[:, direction * size : (direction + 1) * size]
        before = previous_states(own, h0, PADDED, direction == 1).view(*mask.shape, size)
        state = 0 if states is None else states[:, direction]
        found.append(torch.where(mask.unsqueeze(-1), state, before).flatten(0, 1))
    return found
