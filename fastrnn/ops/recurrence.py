"""Layers whose cell has options, such as layer normalisation or two products per step.

    pre_x = W_ih x, or with layer normalisation gain_ih * LN(W_ih x) + b_ih     for all steps
    y, h_n, c_n = recurrence(pre_x, ...)    the time loop (csrc/problem/recurrence.h)

The product and the time loop are operators; layer normalisation of the product is torch's.

All random numbers are drawn before the operator runs, by torch's generator, so that the same seed
gives the same results in every way of computing. In an eager call autocast is disabled here; the
code of the dispatch key "Autocast" is for graphs that were captured without autocast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm, linear

from fastrnn import autocast
from fastrnn._torch_internals import (
    AutoDispatchBelowAutograd,
    ExcludeDispatchKeyGuard,
    forward_ad,
    tree_leaves,
    tree_map,
)
from fastrnn.layer_call import PADDED, CellOptions, LayerCall, Results, SequenceMembers
from fastrnn.ops.autograd import AUTOCAST_KEYS, implementations
from fastrnn.ops.composite import as_kernels
from fastrnn.ops.gradients import differentiable_gradients, is_transformed
from fastrnn.ops.operators import interruptible
from fastrnn.ops.sequence import previous_states
from fastrnn.reference import Parts, reference_recurrence
from fastrnn.spec import RECURRENCE_CELLS, CellSpec, DirectionWeights, Weights
from fastrnn.tracing import is_capturing, is_tracing

_recurrence_op = torch.ops.fastrnn.recurrence.default
_interruptible_recurrence = interruptible(_recurrence_op)
_interruptible_gradients = interruptible(torch.ops.fastrnn.recurrence_gradients.default)
_product_op = torch.ops.fastrnn.recurrence_product.default
_interruptible_product = interruptible(_product_op)
_product_gradients = interruptible(torch.ops.fastrnn.recurrence_product_gradients.default)

#: of layer normalisation, as in ``torch.nn.LayerNorm``
EPSILON = 1e-5

# x [*,I], w [G*H,I] -> x w^T
_Product = Callable[[Tensor, Tensor], Tensor]
# cell, pre_x, h0, c0, parts, batch_sizes, reverse, epsilon -> y, h_n, c_n or None
_Run = Callable[
    [str, Tensor, Tensor, Any, Parts, Any, bool, float], "tuple[Tensor, Tensor, Tensor | None]"
]


def recurrence_layer(call: LayerCall) -> Results:
    """Runs one layer by the kernels."""
    return _run_layer(call, product, run_recurrence)


def composite_recurrence_layer(call: LayerCall) -> Results:
    """Runs one layer by differentiable operations."""
    return _run_layer(call, linear, reference_recurrence)


def _run_layer(call: LayerCall, multiply: _Product, run: _Run) -> Results:
    results: Results = as_kernels(lambda own: _run_directions(own, multiply, run), call)
    return results


def _run_directions(call: LayerCall, multiply: _Product, run: _Run) -> Results:
    """Runs one layer in one or two directions, with a way to run the product and the time loop."""
    spec, x, sequence, h0, c0, weights, options = call
    outputs, h_n, c_n = [], [], []
    for direction, w in enumerate(weights.directions()):
        assert w.w_hh is not None, "the cell has a recurrent product"
        pre_x = multiply(x, w.w_ih)
        if w.gain_ih is not None:
            pre_x = layer_norm(pre_x, pre_x.shape[-1:], w.gain_ih, w.b_ih, EPSILON)
        h = h0[direction]
        c = None if c0 is None else c0[direction]
        parts = _parts(w, options.cell, h, c, math.prod(x.shape[:-1]))
        reverse = direction == 1
        y, h, c = run(spec.name, pre_x, h, c, parts, sequence.named().batch_sizes, reverse, EPSILON)
        outputs.append(y)
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return y, torch.stack(h_n), torch.stack(c_n) if c_n else None


def _parts(
    w: DirectionWeights, options: CellOptions | None, h: Tensor, c: Tensor | None, rows: int
) -> Parts:
    """Returns the parts of one direction. Draws its random numbers: of mask, zone_h, zone_c."""
    assert w.w_hh is not None
    b_x = w.b_ih if w.gain_ih is None else None
    parts = Parts(w.w_hh, w.b_hh, w.gain_hh, w.gain_c, w.bias_c, b_x=b_x)
    if options is None:
        return parts
    units = h.shape[-1]
    mask = None
    if options.training and options.recurrent_dropout > 0:
        mask = dropout(torch.ones_like(h), options.recurrent_dropout)

    def zone(probability: float) -> Tensor | None:
        if probability == 0:
            return None
        if not options.training:
            return h.new_full((1, units), probability)
        return _draw_zone(probability, rows, units, h)

    zone_h = zone(options.zoneout_h)
    zone_c = None if c is None else zone(options.zoneout_c)
    clip_c = None if options.cell_clip is None else h.new_full((1,), options.cell_clip)
    return parts._replace(mask_h=mask, zone_h=zone_h, zone_c=zone_c, clip_c=clip_c)


def _draw_zone(probability: float, rows: int, units: int, like: Tensor) -> Tensor:
    """Returns [rows,units] of 1 with this probability, else 0.

    Four values share a number of 64 random bits, because ``Tensor.bernoulli_`` takes five times as
    long. This rounds the probability to a multiple of 2^-16. Where that could change the frequency
    of 0 or of 1 by 1%, each value has 53 bits.
    """
    if probability == 1:
        return like.new_ones(rows, units)
    if not _SHORTEST <= probability <= 1 - _SHORTEST:
        numbers = torch.rand(rows, units, dtype=torch.float64, device=like.device)
        return numbers.lt(probability).to(like.dtype)
    count = rows * units
    bits = torch.randint(-(2**63), 2**63 - 1, ((count + 3) // 4,), device=like.device)
    if is_tracing():  # torch.jit.trace cannot record a view of another dtype
        shorts = torch.stack([bits << shift >> 48 for shift in (48, 32, 16, 0)], -1).flatten()
    else:
        shorts = bits.view(torch.int16)
    # a comparison in place avoids a tensor of bool, which takes four times as long
    is_kept = shorts[:count].to(torch.float32).lt_(round(probability * 2**16) - 2**15)
    return is_kept.to(like.dtype).view(rows, units)


#: the least probability that 16 bits represent with an error of less than 1%
_SHORTEST = 2**-10


def _pack(parts: Parts) -> tuple[list[Tensor], int]:
    """Returns the parts that are there, and the mask of their slots."""
    slots = 0
    tensors = []
    for index, part in enumerate(parts):
        if part is not None:
            slots |= 1 << index
            tensors.append(part)
    return tensors, slots


def _unpack(tensors: Sequence[Any], slots: int) -> Parts:
    rest = iter(tensors)
    parts: list[Any] = [next(rest) if slots >> i & 1 else None for i in range(len(Parts._fields))]
    return Parts(*parts)


def run_recurrence(
    cell: str,
    pre_x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parts: Parts,
    batch_sizes: Tensor | None,
    reverse: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs the time loop by the operator; arguments as in `fastrnn.reference`. Differentiable."""
    tensors, slots = _pack(parts)
    arguments = (pre_x, h0, c0, tensors, slots, batch_sizes, reverse, cell, epsilon)
    # torch.jit.trace would record the Function as a call of Python, which cannot be saved
    if torch.compiler.is_compiling() or is_capturing():
        y, h_n, c_n, _ = _recurrence_op(*arguments, False)
    elif _records(*arguments[:4]):
        y, h_n, c_n, _ = _apply(*arguments)
    else:
        y, h_n, c_n, _ = _interruptible_recurrence(*arguments, False)
    return y, h_n, None if c0 is None else c_n


def _records(pre_x: Tensor, h0: Tensor, c0: Tensor | None, parts: Sequence[Tensor]) -> bool:
    """Whether autograd records the operator."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (pre_x, h0, c0, *parts))


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context for gradients of tensors that forward has already cast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


class ProductFunction(torch.autograd.Function):
    """The product x w^T of matrices with its gradient."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        with AutoDispatchBelowAutograd():
            result: Tensor = _interruptible_product(x, w)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        with _no_autocast(x):
            return ProductFunction._gradients(d, x, w, needs_x, needs_w)

    @staticmethod
    def _gradients(
        d: Tensor, x: Tensor, w: Tensor, needs_x: bool, needs_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_transformed(d):
            return d.mm(w) if needs_x else None, d.t().mm(x) if needs_w else None
        d_x, d_w, _ = _product_gradients(d, x if needs_w else None, w if needs_x else None)
        return d_x if needs_x else None, d_w if needs_w else None


def product(x: Tensor, w: Tensor) -> Tensor:
    """Returns x w^T [*,G*H] from x [*,I] and w [G*H,I], by the kernels; differentiable."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or is_capturing():
        result = _product_op(rows, w)
    elif torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        result = ProductFunction.apply(rows, w)  # type: ignore[no-untyped-call]
    else:
        result = _interruptible_product(rows, w)
    return result.view(*x.shape[:-1], w.shape[0])  # type: ignore[no-any-return]


def _product_autograd(x: Tensor, w: Tensor) -> Tensor:
    """Runs ``recurrence_product`` under autograd: the code of the dispatch key "Autograd"."""
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return ProductFunction.apply(x, w)  # type: ignore[no-any-return, no-untyped-call]
    with AutoDispatchBelowAutograd():
        return _product_op(x, w)  # type: ignore[no-any-return]


class RecurrenceFunction(torch.autograd.Function):
    r"""The time loop with its gradient.

    Inputs: cell, slots, batch_sizes, reverse, epsilon, pre_x, h0, c0, \*parts.
    """

    @staticmethod
    def forward(
        cell: str,
        slots: int,
        batch_sizes: Tensor | None,
        reverse: bool,
        epsilon: float,
        pre_x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        with AutoDispatchBelowAutograd():  # else the operator would call this Function again
            results: tuple[Tensor, ...] = _interruptible_recurrence(
                pre_x, h0, c0, parts, slots, batch_sizes, reverse, cell, epsilon, True
            )
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.cell, ctx.slots, batch_sizes, ctx.reverse, ctx.epsilon, pre_x, h0, c0, *parts = inputs
        y, _, c_n, saved = output
        ctx.mark_non_differentiable(*((saved,) if c0 is not None else (saved, c_n)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pre_x, h0, c0, batch_sizes, y, saved, *parts)

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, _: Any
    ) -> tuple[Any, ...]:
        pre_x, h0, c0, batch_sizes, y, saved, *parts = ctx.saved_tensors
        gradients = (d_y, d_h_n, d_c_n if c0 is not None else None)
        if all(t is None for t in gradients):
            return (None,) * len(ctx.needs_input_grad)
        fixed = (ctx.cell, ctx.slots, batch_sizes, ctx.reverse, ctx.epsilon)
        is_differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if is_differentiated or any(t is not None and is_transformed(t) for t in gradients):
            inputs = (pre_x, h0, c0, *parts)
            with _no_autocast(h0):
                return (None,) * 5 + _composite_gradients(
                    fixed, inputs, gradients, ctx.needs_input_grad[5:]
                )
        return (None,) * 5 + _kernel_gradients(
            fixed, h0, c0, parts, y, saved, gradients, ctx.needs_input_grad[8:]
        )


def _kernel_gradients(
    fixed: tuple[Any, ...],
    h0: Tensor,
    c0: Tensor | None,
    tensors: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    gradients: tuple[Tensor | None, ...],
    needs_parts: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of pre_x, h0, c0 and the parts."""
    cell, slots, batch_sizes, reverse, epsilon = fixed
    d_pre_x, d_a, d_h0, d_c0, d_vectors = _interruptible_gradients(
        *gradients, h0, c0, tensors, slots, batch_sizes, reverse, cell, epsilon, y, saved
    )
    if d_a.numel() == 0:
        d_a = d_pre_x
    spec, hidden = RECURRENCE_CELLS[cell], h0.shape[1]
    width = spec.gates * hidden
    parts, needs = _unpack(tensors, slots), _unpack(needs_parts, slots)
    d_b_hh, d_gain_h, d_gain_c, d_bias_c = d_vectors.split((width, width, hidden, hidden))
    d_w_hh = None
    if needs.w_hh:
        h_prev = previous_states(
            y.reshape(-1, hidden), h0, SequenceMembers(batch_sizes).pack(), reverse
        )
        if parts.mask_h is not None:
            h_prev = h_prev * _of_rows(parts.mask_h, batch_sizes, h_prev.shape[0])
        d_a = d_a.reshape(-1, width)
        first = width - spec.second_gates * hidden
        d_w_hh = _product_gradients(d_a[:, :first], h_prev, None)[1]
        if spec.second_gates:  # that product has multiplied h times the first gate
            operand = h_prev * saved[:, :hidden]
            d_second = _product_gradients(d_a[:, first:], operand, None)[1]
            d_w_hh = torch.cat([d_w_hh, d_second])
    d_b_x = None
    if needs.b_x:  # both sides of a GRU differ
        is_same = spec.pre == spec.gates and parts.b_hh is not None
        d_b_x = d_b_hh.clone() if is_same else d_pre_x.reshape(-1, width).sum(0)
    d_parts = (d_w_hh, d_b_hh, d_gain_h, d_gain_c, d_bias_c, None, None, None, d_b_x, None)
    present = [d for i, d in enumerate(d_parts) if slots >> i & 1]
    return d_pre_x, d_h0, None if c0 is None else d_c0, *present


def _of_rows(values: Tensor, batch_sizes: Tensor | None, rows: int) -> Tensor:
    """Returns the values [B,H] of each sequence for all of its rows [N,H]."""
    if batch_sizes is None:
        return values.repeat(rows // values.shape[0], 1) if values.shape[0] else values
    first = batch_sizes.cumsum(0) - batch_sizes
    index = torch.arange(rows) - first.repeat_interleave(batch_sizes, output_size=rows)
    return values.index_select(0, index.to(values.device))


def _composite_gradients(
    fixed: tuple[Any, ...],
    inputs: tuple[Any, ...],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the inputs by operations that can be differentiated."""
    cell, slots, batch_sizes, reverse, epsilon = fixed

    def run(pre_x: Tensor, h0: Tensor, c0: Tensor | None, *parts: Tensor) -> Any:
        own = _unpack(parts, slots)
        return reference_recurrence(cell, pre_x, h0, c0, own, batch_sizes, reverse, epsilon)

    transformed = any(d is not None and is_transformed(d) for d in gradients)
    return differentiable_gradients(run, inputs, tuple(needs), gradients, transformed)


def _apply(
    pre_x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parts: Sequence[Tensor],
    slots: int,
    batch_sizes: Tensor | None,
    reverse: bool,
    cell: str,
    epsilon: float,
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = RecurrenceFunction.apply(  # type: ignore[no-untyped-call]
        cell, slots, batch_sizes, reverse, epsilon, pre_x, h0, c0, *parts
    )
    return results


def _autograd(*arguments: Any) -> tuple[Tensor, ...]:
    """Runs ``recurrence`` under autograd: the code of the dispatch key "Autograd"."""
    *own, saves = arguments
    if not saves and _records(*own[:4]):
        y, h_n, c_n, saved = _apply(*own)
        return y, h_n, c_n, saved.new_empty(0)
    with AutoDispatchBelowAutograd():
        return _recurrence_op(*arguments)  # type: ignore[no-any-return]


def _under_autocast(operator: Any) -> Callable[..., Any]:
    """Returns an operator for graphs under autocast: it casts to the widest type of its tensors."""

    def run(*arguments: Any) -> Any:
        leaves = [t for t in tree_leaves(arguments) if _is_number(t)]
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in leaves], torch.float32)
        with ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return operator(*tree_map(lambda t: t.to(dtype) if _is_number(t) else t, arguments))

    return run


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _recurrence_autocast(*arguments: Any) -> tuple[Tensor, ...]:
    """Runs ``recurrence`` of a graph under autocast, with the types of `fastrnn.autocast`."""
    y, h_n, c_n, saved = _under_autocast(_recurrence_op)(*arguments)
    pre_x, h0, c0, *_, cell, _, saves = arguments
    spec = RECURRENCE_CELLS[cell]
    if not saves and autocast.acts_on(pre_x):  # gradients need y in the type of ``saved``
        call = LayerCall(spec, pre_x, PADDED, h0.unsqueeze(0), c0, Weights([], 0))
        y, h_n, cast_c = autocast.cast_results(call, (y, h_n, None if c0 is None else c_n))
        c_n = c_n if cast_c is None else cast_c
    return y, h_n, c_n, saved


def saved_width(spec: CellSpec, hidden: int, slots: int) -> int:
    """Returns the columns of a row of ``saved``, as csrc/problem/recurrence.h has it."""
    has = _unpack([True] * slots.bit_count(), slots)
    columns = spec.saved + (spec.gates if has.gain_h else 0) + (1 if has.zone_c else 0)
    if has.zone_h and spec.saved == 0:
        columns += 1
    if has.clip_c:
        columns += 1
    return columns * hidden + 3


def _check(pre_x: Tensor, h0: Tensor, c0: Tensor | None, cell: str) -> CellSpec:
    spec = RECURRENCE_CELLS[cell]
    torch._check(h0.dim() == 2, lambda: f"fastrnn: h0 must be [B, H], got {h0.dim()} dimensions.")
    width = spec.gates * h0.shape[1]
    torch._check(
        pre_x.shape[-1] == width,
        lambda: f"fastrnn: pre_x must have {width} columns, got {pre_x.shape[-1]}.",
    )
    return spec


def _check_one_device(
    first: Tensor, others: Sequence[Tensor | None], batch_sizes: Tensor | None
) -> None:
    """Raises if meta tensors are among others: the results would be uninitialised memory."""
    torch._check(
        all(t is None or t.device == first.device for t in others),
        lambda: "fastrnn: all tensors must be on one device, got several.",
    )
    torch._check(
        batch_sizes is None or batch_sizes.device.type == "cpu",
        lambda: "fastrnn: batch_sizes must be on the CPU, got another device.",
    )


def _fake(
    pre_x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parts: Sequence[Tensor],
    slots: int,
    batch_sizes: Tensor | None,
    reverse: bool,
    cell: str,
    epsilon: float,
    saves: bool,
) -> tuple[Tensor, ...]:
    _check_one_device(pre_x, (h0, c0, *parts), batch_sizes)
    spec = _check(pre_x, h0, c0, cell)
    hidden = h0.shape[1]
    rows = math.prod(pre_x.shape[:-1])
    saved = h0.new_empty(rows, saved_width(spec, hidden, slots)) if saves else h0.new_empty(0)
    c_n = h0.new_empty(0 if c0 is None else h0.shape)
    return h0.new_empty(*pre_x.shape[:-1], hidden), h0.new_empty(h0.shape), c_n, saved


def _gradients_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    parts: Sequence[Tensor],
    slots: int,
    batch_sizes: Tensor | None,
    reverse: bool,
    cell: str,
    epsilon: float,
    y: Tensor,
    saved: Tensor,
) -> tuple[Tensor, ...]:
    _check_one_device(y, (d_y, d_h_n, d_c_n, h0, c0, *parts, saved), batch_sizes)
    spec, hidden = RECURRENCE_CELLS[cell], h0.shape[1]
    width = spec.gates * hidden
    is_same = spec.pre == spec.gates and _unpack(parts, slots).gain_h is None
    d_a = h0.new_empty(0) if is_same else h0.new_empty(math.prod(y.shape[:-1]), width)
    d_c0 = h0.new_empty(0 if c0 is None else h0.shape)
    d_pre_x = h0.new_empty(*y.shape[:-1], width)
    return d_pre_x, d_a, h0.new_empty(h0.shape), d_c0, h0.new_empty(2 * (width + hidden))


def _product_fake(x: Tensor, w: Tensor) -> Tensor:
    _check_one_device(x, (w,), None)
    return x.new_empty(x.shape[0], w.shape[0])


def _product_gradients_fake(
    d: Tensor, x: Tensor | None, w: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_one_device(d, (x, w), None)
    d_x = d.new_empty(0) if w is None else d.new_empty(d.shape[0], w.shape[1])
    d_w = d.new_empty(0) if x is None else d.new_empty(d.shape[1], x.shape[1])
    return d_x, d_w, d.new_empty(0) if x is None else d.new_empty(d.shape[1])


torch.library.register_fake("fastrnn::recurrence_product", _product_fake)
torch.library.register_fake("fastrnn::recurrence_product_gradients", _product_gradients_fake)
implementations.impl("recurrence_product", _product_autograd, "Autograd")
torch.library.register_fake("fastrnn::recurrence", _fake)
torch.library.register_fake("fastrnn::recurrence_gradients", _gradients_fake)
implementations.impl("recurrence", _autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    implementations.impl("recurrence", _recurrence_autocast, _key)
    for _name in ("recurrence_gradients", "recurrence_product", "recurrence_product_gradients"):
        _operator = getattr(torch.ops.fastrnn, _name).default
        implementations.impl(_name, _under_autocast(_operator), _key)
