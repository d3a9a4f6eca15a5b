"""Training in less memory: backward computes the saved values again, in chunks of steps.

Forward keeps the states before each chunk instead of the values that it saves for backward.
Backward goes through the chunks in reverse order. For each it runs forward again, which saves the
values of this chunk only, and then backward:

    forward    states[0] | chunk 0 | states[1] | chunk 1 | ...
    backward   for each chunk, from the last one:  forward from states[i], backward of the chunk

On the CPU one operator does this, and all results have the same bits as without chunks. Other
devices and layers with weights that this operator does not know (w_hr, w_unit) run chunk by chunk
through the operators of ordinary layers; their results differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn._torch_internals import (
    are_transforms_active,
    is_any_autocast_enabled,
    lazy_clone,
    unbound_apply,
)
from fastrnn.layer_call import (
    FULL,
    PADDED,
    LayerCall,
    Options,
    Results,
    SequenceMembers,
    SequenceTensors,
)
from fastrnn.ops.autograd import saved_tensors
from fastrnn.ops.gradients import (
    Gradients,
    Outputs,
    composite_gradients,
    cpu_gradients,
    gradients_by_torch,
    is_differentiated,
    select_results,
)
from fastrnn.ops.operators import (
    accumulate_dtype,
    chunked_forward_op,
    chunked_gradients_op,
    decode,
    decode_layer,
    interruptible_forward,
    records_gradient,
)
from fastrnn.ops.sequence import is_traced
from fastrnn.spec import PROJECTION, UNIT, CellSpec, Weights

#: least length of a chosen chunk: packing the weights again then costs little
_LEAST_CHUNK = 16


def chunk_length(recompute: int, steps: int) -> int:
    """Returns the number of steps of a chunk: about the square root of all steps for `FULL`."""
    return max(math.isqrt(steps), _LEAST_CHUNK) if recompute == FULL else recompute


def recomputes(call: LayerCall) -> bool:
    """Whether backward of a call computes the saved values again. Graphs ignore the option."""
    return (
        call.options.recompute != 0
        and records_gradient(call)
        and not call.is_step
        and call.x.numel() > 0
        and not call.x.is_meta
        and not is_traced(call.x)
        and not are_transforms_active()
    )


def _is_one_operator(call: LayerCall) -> bool:
    return call.x.is_cpu and not call.weights.has(UNIT | PROJECTION)


class _RecomputedLayer(torch.autograd.Function):
    r"""One layer with its gradient; inputs: chunk, spec, slots, sequence, x, h0, c0, \*weights."""

    @staticmethod
    def forward(
        ctx: Any,
        chunk: int,
        spec: CellSpec,
        slots: int,
        sequence: SequenceTensors,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        options = Options(recompute=chunk)
        call = LayerCall(spec, x, sequence, h0, c0, Weights(weights, slots), options)
        compute = _forward_by_operator if _is_one_operator(call) else _forward_by_chunks
        y, h_n, c_n, kept = compute(call)
        optional = () if c0 is None else (c0,)
        flat = sequence.flat or ()
        ctx.save_for_backward(x, h0, y, *optional, *flat, *weights, *kept)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.spec, ctx.slots, ctx.sequence_slots = options, spec, slots, sequence.slots
        ctx.has_c0, ctx.weights = c0 is not None, len(weights)
        if y.is_cpu:
            y = lazy_clone(y)  # the caller may change y in place, and backward reads it
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None
    ) -> Gradients:
        needs = ctx.needs_input_grad
        if d_y is None and d_h_n is None and d_c_n is None:
            return (None,) * len(needs)
        x, h0, y, *rest = saved_tensors(ctx)
        c0 = rest.pop(0) if ctx.has_c0 else None
        count = ctx.sequence_slots.bit_count()
        sequence = SequenceTensors(rest[:count], ctx.sequence_slots) if count else PADDED
        weights, kept = rest[count : count + ctx.weights], tuple(rest[count + ctx.weights :])
        call = LayerCall(ctx.spec, x, sequence, h0, c0, Weights(weights, ctx.slots), ctx.options)
        before_x = len(needs) - 3 - ctx.weights
        own, d_outputs = needs[before_x:], (d_y, d_h_n, d_c_n)
        if is_any_autocast_enabled() and autocast.acts_on(x):  # forward has cast the tensors
            with torch.autocast(x.device.type, enabled=False):
                found = _gradients(call, own, d_outputs, y, kept)
        else:
            found = _gradients(call, own, d_outputs, y, kept)
        return (*(None,) * before_x, *found)


_apply: Any = unbound_apply(_RecomputedLayer)


def recomputed_layer(call: LayerCall) -> Results:
    """Runs one layer, recorded, if `recomputes`."""
    spec, x, sequence, h0, c0, (weights, slots), options = call
    sizes = call.batch_sizes
    chunk = chunk_length(options.recompute, x.shape[0] if sizes is None else len(sizes))
    y, h_n, *c_n = _apply(chunk, spec, slots, sequence, x, h0, c0, *weights)
    return y, h_n, c_n[0] if c_n else None


#: the tensors that forward keeps, besides its arguments and y
Kept = tuple[Tensor, ...]


def _forward_by_operator(call: LayerCall) -> tuple[Tensor, Tensor, Tensor | None, Kept]:
    spec, x, (sequence, bits), h0, c0, (weights, slots), options = call
    y, h_n, c_n, states = chunked_forward_op(
        x, h0, c0, weights, slots | bits, sequence, spec.name, options.recompute
    )
    return *decode_layer(call, y, h_n, c_n), (states,)


def _gradients(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, kept: Kept
) -> Gradients:
    """Returns the gradients of x, h0, c0 and each weight; see `fastrnn.ops.gradients.gradients`."""
    transformed, differentiated = is_differentiated(d_outputs)
    if differentiated:
        return composite_gradients(call, needs, d_outputs, transformed)
    if not _is_one_operator(call):
        return _gradients_by_chunks(call, needs, d_outputs, y, kept)
    spec, x, (sequence, bits), h0, c0, (weights, slots), options = call
    outputs, indices = select_results(slots, h0.shape[0], needs)
    results = chunked_gradients_op(
        *d_outputs,
        *(x, h0, c0, weights, slots | bits, sequence, y, *kept, spec.name, outputs),
        options.recompute,
    )
    return tuple(decode(results, indices))


class _Chunk(NamedTuple):
    """Some steps of a batch: their rows of [N,*], their sequences, and the number of these."""

    rows: slice
    sequence: SequenceTensors
    batch: int


def _chunks(call: LayerCall) -> Iterator[_Chunk]:
    """Yields the chunks of a layer in the order of time."""
    length, sizes, batch = call.options.recompute, call.batch_sizes, call.h0.shape[1]
    steps = call.x.shape[0] if sizes is None else len(sizes)
    row = 0
    for first in range(0, steps, length):
        if sizes is None:
            count, own, sequence = min(length, steps - first) * batch, batch, PADDED
        else:
            part = sizes[first : first + length]
            count, own, sequence = int(part.sum()), int(part[0]), SequenceMembers(part).pack()
        yield _Chunk(slice(row, row + count), sequence, own)
        row += count


def _reversal(call: LayerCall) -> Tensor:
    """Returns the row [N] that each row becomes if every sequence runs backwards in time."""
    sizes, batch = call.batch_sizes, call.h0.shape[1]
    if sizes is None:
        sizes = torch.full((call.x.shape[0],), batch)
    lengths = (sizes > torch.arange(batch).unsqueeze(1)).sum(1)
    offsets = sizes.cumsum(0) - sizes
    rows = int(sizes.sum())
    step = torch.repeat_interleave(sizes, output_size=rows)
    sequence = torch.arange(rows) - offsets[step]
    return (offsets[lengths[sequence] - 1 - step] + sequence).to(call.x.device)


class _Direction(NamedTuple):
    """One direction of a layer as a layer that runs forwards in time, with rows [N,*]."""

    call: LayerCall
    order: Tensor | None  # the row of the layer for each row of this direction; None: the same

    def own(self, rows: Tensor) -> Tensor:
        """Returns rows of the layer in the order of this direction, and the inverse."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def part(self, chunk: _Chunk, x: Tensor, h: Tensor, c: Tensor | None) -> LayerCall:
        """Returns a chunk as a call; x and the states are those of the direction."""
        rows = x[chunk.rows]
        return self.call._replace(
            x=rows if chunk.sequence.flat else rows.unflatten(0, (-1, chunk.batch)),
            sequence=chunk.sequence,
            h0=h[:, : chunk.batch],
            c0=None if c is None else c[:, : chunk.batch],
        )


def _directions(call: LayerCall) -> list[_Direction]:
    directions = call.h0.shape[0]
    flat, slots = call.weights
    count = len(flat) // directions
    return [
        _Direction(
            call._replace(
                h0=call.h0[d : d + 1],
                c0=None if call.c0 is None else call.c0[d : d + 1],
                weights=Weights(flat[d * count : (d + 1) * count], slots),
            ),
            _reversal(call) if d else None,
        )
        for d in range(directions)
    ]


def _forward(call: LayerCall, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, x, (sequence, bits), h0, c0, (weights, slots), _ = call
    results: tuple[Tensor, Tensor, Tensor, Tensor] = interruptible_forward(
        x, h0, c0, weights, slots | bits, sequence, spec.name, outputs
    )
    return results


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, 1)


def _forward_by_chunks(call: LayerCall) -> tuple[Tensor, Tensor, Tensor | None, Kept]:
    """Keeps for each direction and chunk h [1,B,R], and c [1,B,H] if the cell has it."""
    outputs, h_n, c_n, kept = [], [], [], []
    for direction in _directions(call):
        x = direction.own(_rows(call.x))
        h, c = direction.call.h0.clone(), direction.call.c0
        c = None if c is None else c.clone()
        parts = []
        for chunk in _chunks(call):
            kept.append(h.clone())
            if c is not None:
                kept.append(c.clone())
            part = direction.part(chunk, x, h, c)
            y, h_after, c_after, _ = _forward(part, call.spec.inference_outputs)
            parts.append(_rows(y))
            h[:, : chunk.batch] = h_after
            if c is not None:
                c[:, : chunk.batch] = c_after
        outputs.append(direction.own(torch.cat(parts)))
        h_n.append(h)
        c_n.append(c)
    y = torch.cat(outputs, 1)
    if not call.sequence.flat:
        y = y.unflatten(0, call.x.shape[:2])
    c_all = None if call.c0 is None else torch.cat(c_n)  # type: ignore[arg-type]
    return y, torch.cat(h_n), c_all, tuple(kept)


def _gradients_by_chunks(
    call: LayerCall, needs: tuple[bool, ...], d_outputs: Outputs, y: Tensor, kept: Kept
) -> Gradients:
    need_x, need_h0, need_c0, *need_weights = needs
    d_y, d_h_n, d_c_n = d_outputs[:3]
    chunks, directions = list(_chunks(call)), _directions(call)
    size, count = call.h0.shape[-1], len(need_weights) // len(directions)
    per_chunk = 1 if call.c0 is None else 2
    d_x: Tensor | None = None
    d_h0, d_c0, d_weights = [], [], []
    for d, direction in enumerate(directions):
        own_states = slice(d, d + 1)
        x = direction.own(_rows(call.x))
        own_d_y = None
        if d_y is not None:
            own_d_y = direction.own(_rows(d_y)[:, d * size : (d + 1) * size])
        d_h = _gradient_of_state(d_h_n, call.h0, own_states)
        d_c = None if call.c0 is None else _gradient_of_state(d_c_n, call.c0, own_states)
        own_d_x = torch.empty_like(x) if need_x else None
        totals: list[Tensor | None] = [None] * count
        for index in reversed(range(len(chunks))):
            chunk = chunks[index]
            first = (d * len(chunks) + index) * per_chunk
            part = direction.part(
                chunk, x, kept[first], kept[first + 1] if d_c is not None else None
            )
            part_y, _, _, saved = _forward(part, call.spec.training_outputs)
            batch = slice(chunk.batch)
            own = need_weights[d * count : (d + 1) * count]
            compute = (
                cpu_gradients if x.is_cpu and not call.weights.has(UNIT) else gradients_by_torch
            )
            found_x, found_h, found_c, *found = compute(
                part,
                (need_x, True, d_c is not None, *own),
                (
                    None if own_d_y is None else own_d_y[chunk.rows].view(part_y.shape),
                    d_h[:, batch],
                    None if d_c is None else d_c[:, batch],
                ),
                part_y,
                saved,
            )
            for total, rows, part_of_it in (
                (own_d_x, chunk.rows, None if found_x is None else _rows(found_x)),
                (d_h, (slice(None), batch), found_h),
                (d_c, (slice(None), batch), found_c),
            ):
                if total is not None and part_of_it is not None:
                    total[rows] = part_of_it
            totals = [_sum(total, t) for total, t in zip(totals, found, strict=True)]
        if own_d_x is not None:
            own_d_x = direction.own(own_d_x)
            d_x = own_d_x if d_x is None else d_x.add_(own_d_x)
        d_h0.append(d_h)
        d_c0.append(d_c)
        d_weights += [None if total is None else total.to(x.dtype) for total in totals]
    return (
        None if d_x is None else d_x.view(call.x.shape),
        torch.cat(d_h0) if need_h0 else None,
        torch.cat(d_c0) if need_c0 else None,  # type: ignore[arg-type]
        *d_weights,
    )


def _gradient_of_state(gradient: Tensor | None, state: Tensor, own: slice) -> Tensor:
    """Returns a gradient of final states [1,B,*] to change: at first of the last chunk."""
    return torch.zeros_like(state[own]) if gradient is None else gradient[own].clone()


def _sum(total: Tensor | None, t: Tensor | None) -> Tensor | None:
    """Adds a chunk's gradient in the dtype in which the kernels accumulate."""
    if t is None:
        return None
    t = t.to(accumulate_dtype(t.dtype))
    return t if total is None else total.add_(t)
