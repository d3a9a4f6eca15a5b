"""Padded batches with lengths and resets, composed of differentiable operations.

A row is cut into segments: at each reset and at its end. A segment is a sequence of its own, with
an initial state of its own, so the segments of all rows are one packed batch, which the kernels
compute in as many steps as the longest segment has:

    resets of row 0   0 0 1 0 0       segments   x00 x01          from h0
    resets of row 1   0 0 0 0 .                  x02 x03 x04      from the reset state
                                                 x10 x11 x12 x13  from h0

Direction 1 runs backwards in time, so its segments end where those of direction 0 begin: with
resets, the directions of a layer run one after the other. The indices are computed on the CPU from
the values of lengths and resets. On CUDA this would wait for the stream, so masks take the place of
segments there (`fastrnn.ops.ragged_on_device`, `fastrnn.ops.masked`).

`fastrnn.ops.ragged` has the operators that do the same in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn._torch_internals import are_transforms_active, forward_ad
from fastrnn.layer_call import LayerCall, Results, SequenceMembers
from fastrnn.ops.stacking import layer_input, layer_output
from fastrnn.spec import Weights

#: runs stacked layers over packed rows
Run = Callable[[LayerCall], Results]


class Ragged(NamedTuple):
    """Lengths and resets of a padded batch, checked. The values of those on a GPU are not.

    Attributes:
        lengths: int64 [B], from 0 to T; None if all are T.
        resets: bool [T,B]; None if there are none. In a graph and on a GPU also float64, whose
            values are not checked: every value except 0 is a reset.
        reset_h: state after a reset, [L*D,B,R], or [T,L*D,B,R] for one per step; None for zeros.
        reset_c: the same for the cell states.
    """

    lengths: Tensor | None
    resets: Tensor | None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None


class Segments(NamedTuple):
    """The segments of a padded batch as one packed batch of N rows and A segments.

    Attributes:
        batch_sizes: int64 [longest segment], rows of each step.
        rows: [N] for each packed row, its row t*B + b of the padded batch.
        initial: [A] for each segment b if it starts from h0, and B + t*B + b after a reset.
        final: [B] for each row its last segment, or A + b if it has no steps.
    """

    batch_sizes: Tensor
    rows: Tensor
    initial: Tensor
    final: Tensor


_cut = torch.ops.fastrnn.cut_segments.default


def cut(
    steps: int, batch: int, lengths: Tensor | None, resets: Tensor | None, backwards: bool
) -> Segments:
    """Cuts a padded batch into segments.

    Args:
        steps, batch: T and B.
        lengths, resets: as in `Ragged`; those on a GPU are read here.
        backwards: whether the direction runs backwards in time.
    """
    if lengths is None:
        lengths = torch.full((batch,), steps)
    elif not lengths.is_cpu:
        lengths = lengths.clamp(0, steps).cpu()
    if resets is not None and not resets.is_cpu:
        resets = (resets != 0).cpu()
    return Segments(*_cut(lengths, resets, steps, backwards))


class _Take(torch.autograd.Function):
    """index_select for an index that names nothing twice; its derivative then only copies."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.dim, ctx.index, ctx.size = dim, index, t.shape[dim]
        return t.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return put(gradient, ctx.dim, ctx.index, ctx.size), None, None


class _Put(torch.autograd.Function):
    """The inverse of `_Take`: the slices of t, at these places among zeros."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
        ctx.dim, ctx.index = dim, index
        shape = list(t.shape)
        shape[dim] = size
        return t.new_zeros(shape).index_copy_(dim, index, t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return take(gradient, ctx.dim, ctx.index), None, None, None


def _is_transformed() -> bool:
    return are_transforms_active() or forward_ad._current_level >= 0


def take(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """Returns the slices of t at an index that names nothing twice."""
    if _is_transformed():
        return t.index_select(dim, index)
    return _Take.apply(t, dim, index)  # type: ignore[no-untyped-call, no-any-return]


def put(t: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Returns zeros with the slices of t at an index that names nothing twice."""
    if _is_transformed():
        shape = list(t.shape)
        shape[dim] = size
        return t.new_zeros(shape).index_copy(dim, index, t)
    return _Put.apply(t, dim, index, size)  # type: ignore[no-untyped-call, no-any-return]


def initial_states(state: Tensor, reset: Tensor | None, segments: Segments) -> Tensor:
    """Returns the initial states of the segments [L*D,A,*].

    Args:
        state: [L*D,B,*] initial states of the rows.
        reset: [L*D,B,*] or [T,L*D,B,*] states after a reset; None for zeros.
        segments: the segments.
    """
    batch, index = state.shape[1], segments.initial
    after_reset = index >= batch
    if reset is None or not bool(after_reset.any()):
        first = (~after_reset).nonzero().squeeze(1)
        chosen = take(state, 1, index[first].to(state.device))
        return put(chosen, 1, first.to(state.device), len(index))
    if reset.dim() == 3:  # the same at every step
        index = torch.where(after_reset, batch + (index - batch) % batch, index)
        choices = reset
    else:
        choices = reset.transpose(0, 1).flatten(1, 2)
    return torch.cat([state, choices], 1).index_select(1, index.to(state.device))


def final_states(state: Tensor, initial: Tensor, segments: Segments) -> Tensor:
    """Returns the final states of the rows [L*D,B,*] from those of the segments."""
    index = segments.final.to(state.device)
    if bool((segments.final >= state.shape[1]).any()):
        return take(torch.cat([state, initial], 1), 1, index)
    return take(state, 1, index)


def _run_segments(call: LayerCall, ragged: Ragged, segments: Segments, run: Run) -> Results:
    """Runs stacked layers of which every direction has these segments."""
    steps, batch, _ = call.x.shape
    recorder = call.options.recorder
    if len(segments.rows) == 0:
        if recorder is not None:
            recorder.skip(call)
        directions = call.h0.shape[0] // call.options.num_layers
        y = call.x.new_zeros(steps, batch, directions * call.h0.shape[-1])
        return y, call.h0.clone(), None if call.c0 is None else call.c0.clone()
    rows = segments.rows.to(call.x.device)
    recorded = 0 if recorder is None else recorder.count
    y, h_n, c_n = run(
        call._replace(
            x=take(call.x.flatten(0, 1), 0, rows),
            sequence=SequenceMembers(segments.batch_sizes).pack(),
            h0=initial_states(call.h0, ragged.reset_h, segments),
            c0=None if call.c0 is None else initial_states(call.c0, ragged.reset_c, segments),
        )
    )
    if recorder is not None:
        recorder.move(lambda t: put(t, 0, rows, steps * batch), recorded, (steps, batch))
    y = put(y, 0, rows, steps * batch).view(steps, batch, -1)
    h_n = final_states(h_n, call.h0, segments)
    return y, h_n, None if c_n is None or call.c0 is None else final_states(c_n, call.c0, segments)


def state_slice(state: Tensor, states: slice) -> Tensor:
    """Returns a reset state, [L*D,B,*] or [T,L*D,B,*], of some layers and directions."""
    return state[states] if state.dim() == 3 else state[:, states]


def slice_states(ragged: Ragged, states: slice) -> Ragged:
    """Returns the reset states of some layers and directions."""
    reset_h, reset_c = ragged.reset_h, ragged.reset_c
    return ragged._replace(
        reset_h=None if reset_h is None else state_slice(reset_h, states),
        reset_c=None if reset_c is None else state_slice(reset_c, states),
    )


def run_composed(call: LayerCall, ragged: Ragged, run: Run) -> Results:
    """Runs stacked layers over a padded batch with lengths and resets.

    Args:
        call: the layers; x [T,B,I].
        ragged: lengths and resets.
        run: runs the layers over packed rows.

    Returns:
        y [T,B,D*R], zero beyond a row's length; h_n [L*D,B,R] and c_n [L*D,B,C*H], the states after
        the last step of each row.
    """
    steps, batch, _ = call.x.shape
    lengths, resets = ragged.lengths, ragged.resets
    if resets is None and (lengths is None or bool((lengths == steps).all())):
        return run(call)
    layers = call.options.num_layers
    directions = call.h0.shape[0] // layers
    if resets is None or directions == 1:
        return _run_segments(call, ragged, cut(steps, batch, lengths, resets, False), run)
    return _run_directions(call, ragged, directions, run)


def _run_directions(call: LayerCall, ragged: Ragged, directions: int, run: Run) -> Results:
    """Runs bidirectional layers, each direction with segments of its own."""
    steps, batch, _ = call.x.shape
    segments = [cut(steps, batch, ragged.lengths, ragged.resets, back) for back in (False, True)]
    flat, slots = call.weights
    layers = call.options.num_layers
    count = len(flat) // (layers * directions)
    options = call.options._replace(num_layers=1, dropout=0.0, prepared=None)
    x = call.x
    h_n, c_n = [], []
    for layer in range(layers):
        below = x
        x = layer_input(below, layer, call.options)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            states = slice(index, index + 1)
            own = call._replace(
                x=x,
                h0=call.h0[states],
                c0=None if call.c0 is None else call.c0[states],
                weights=Weights(flat[index * count : (index + 1) * count], slots),
                options=options,
            )
            # the rows of direction 1 are in its order of computation, so it runs as direction 0
            y, h, c = _run_segments(own, slice_states(ragged, states), segments[direction], run)
            outputs.append(y)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
        x = layer_output(torch.cat(outputs, -1), below, layer, call.options)
    return x, torch.cat(h_n), torch.cat(c_n) if c_n else None
