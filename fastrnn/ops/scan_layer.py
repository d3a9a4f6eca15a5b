"""One direction of a layer that is linear in its state, after its product, as an operator.

The kernels compute the gates, the recurrence and the output from the product in one pass over the
steps (csrc/cells/scan_registry.h), and backward computes the gates again: only the states are
saved. `composite_scan_layer` does the same by torch's operations and ``linear_scan``. It is what
derivatives of higher order, forward mode, ``torch.func`` and devices without kernels use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrnn import _library
from fastrnn._torch_internals import AutoDispatchBelowAutograd, are_transforms_active, forward_ad
from fastrnn.ops.autograd import implementations
from fastrnn.ops.gradients import differentiable_gradients, is_transformed
from fastrnn.ops.scan import scan
from fastrnn.tracing import is_capturing

_layer_op = torch.ops.fastrnn.scan_layer.default
_gradients_op = torch.ops.fastrnn.scan_layer_gradients.default


class ScanInputs(NamedTuple):
    """The tensors of `scan_layer` that can have gradients.

    Attributes:
        pre: [T,B,G*H], the product of the input.
        bias: [G*H], which is added to it; None: zeros.
        x: [T,B,H], the input that an SRU mixes into its output; None: the last H columns of
            ``pre``, or not needed.
        h0: [B,H], the state before the first step; None: zeros.
        reset_h: [1 or T,B,H], the state after a reset; None: zeros.
    """

    pre: Tensor
    bias: Tensor | None
    x: Tensor | None
    h0: Tensor | None
    reset_h: Tensor | None


class ScanCall(NamedTuple):
    """The other arguments of `scan_layer`.

    Attributes:
        cell: "min_gru", "min_lstm" or "sru".
        positive: whether the candidate is positive (`fastrnn.MinGRU`).
        reverse: from the last step to the first.
        lengths: int64 [B], the steps of each sequence; None: T.
        resets: bool [T,B], the steps before which the state is replaced; None: none.
    """

    cell: str
    positive: bool
    reverse: bool
    lengths: Tensor | None
    resets: Tensor | None


def scan_layer(call: ScanCall, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Returns the output [T,B,H] and the final state [B,H]. Differentiable.

    The output is zero beyond the length of a sequence.
    """
    # torch.jit.trace would record the Function as a call of Python, which cannot be saved
    if torch.compiler.is_compiling() or is_capturing():
        if inputs.x is not None and inputs.x.dtype != inputs.pre.dtype:
            return composite_scan_layer(call, inputs)[:2]
        return _run(call, inputs, saves=False)[:2]
    if reason_against_kernels(call, inputs):
        return composite_scan_layer(call, inputs)[:2]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _apply(call, inputs)[:2]
    return _run(call, inputs, saves=False)[:2]


def reason_against_kernels(call: ScanCall, inputs: ScanInputs) -> str:
    """Returns why torch's operations compute a call, "" if the kernels do."""
    pre = inputs.pre
    if forward_ad._current_level >= 0:
        return "forward mode is active"
    if are_transforms_active():
        return "a transform of torch.func is active"
    if not _has_kernel(pre):
        why = f" ({_library.why_no_cuda})" if pre.is_cuda else ""
        return f"there are no kernels for tensors on {pre.device.type}{why}"
    if inputs.x is not None and inputs.x.dtype != pre.dtype:  # the output has the type of x
        return "autocast changes the type of the product, but not of the input that is mixed in"
    return ""


def _has_kernel(pre: Tensor) -> bool:
    return pre.is_cpu or pre.is_meta or (pre.is_cuda and _library.cuda_kernels)


def _run(call: ScanCall, inputs: ScanInputs, saves: bool) -> tuple[Tensor, Tensor, Tensor]:
    pre, bias, x, h0, reset_h = inputs
    cell, positive, reverse, lengths, resets = call
    return _layer_op(  # type: ignore[no-any-return]
        pre, bias, x, h0, lengths, resets, reset_h, cell, positive, reverse, saves
    )


def composite_scan_layer(call: ScanCall, inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a layer by operations that can be differentiated; also returns the states."""
    pre, bias, x, h0, reset_h = inputs
    if bias is not None:
        pre = pre + bias
    a, b = _COEFFICIENTS[call.cell](pre, call.positive, x is not None)
    steps = pre.shape[0]
    ends = None
    if call.lengths is not None:
        ends = torch.arange(steps, device=pre.device).unsqueeze(1) >= call.lengths
        ends = ends.unsqueeze(-1)
    if call.resets is not None:
        starts = call.resets.unsqueeze(-1)
        if reset_h is not None:
            # zeros elsewhere: a NaN of another step would reach the gradients as 0 * NaN
            is_used = starts if ends is None else starts & ~ends
            b = b + a * torch.where(is_used, reset_h, 0)
        a = a.masked_fill(starts, 0)
    if ends is not None:
        a, b = a.masked_fill(ends, 1), b.masked_fill(ends, 0)
    states = scan(a, b, h0, call.reverse)
    y = _sru_output(states, pre, x) if call.cell == "sru" else states
    if ends is not None:
        y = y.masked_fill(ends, 0)
    if steps == 0:
        return y, y.new_zeros(y.shape[1:]) if h0 is None else h0, states
    return y, states[0] if call.reverse else states[-1], states


def positive_candidate(x: Tensor) -> Tensor:
    """Returns g of Feng et al.: x + 0.5 for x >= 0, else sigmoid(x)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def _min_gru(pre: Tensor, positive: bool, _: bool) -> tuple[Tensor, Tensor]:
    z, candidate = pre.chunk(2, -1)
    z = z.sigmoid()
    return 1 - z, z * (positive_candidate(candidate) if positive else candidate)


def _min_lstm(pre: Tensor, positive: bool, _: bool) -> tuple[Tensor, Tensor]:
    f, i, candidate = pre.chunk(3, -1)
    # f/(f+i) = sigmoid(log f - log i), which is no 0/0 where both gates are 0
    share = (F.softplus(-i) - F.softplus(-f)).sigmoid()
    return share, (1 - share) * (positive_candidate(candidate) if positive else candidate)


def _sru(pre: Tensor, _: bool, has_x: bool) -> tuple[Tensor, Tensor]:
    candidate, f = pre.chunk(3 if has_x else 4, -1)[:2]
    f = f.sigmoid()
    return f, (1 - f) * candidate


def _sru_output(state: Tensor, pre: Tensor, x: Tensor | None) -> Tensor:
    parts = pre.chunk(4 if x is None else 3, -1)
    r = parts[2].sigmoid()
    return r * state + (1 - r) * (parts[3] if x is None else x)


_COEFFICIENTS = {"min_gru": _min_gru, "min_lstm": _min_lstm, "sru": _sru}


class ScanLayerFunction(torch.autograd.Function):
    r"""The operator with its gradient; inputs: \*call, \*inputs."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with AutoDispatchBelowAutograd():  # else the operator would call this Function again
            return _run(ScanCall(*arguments[:5]), ScanInputs(*arguments[5:]), saves=True)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.cell, ctx.positive, ctx.reverse, lengths, resets, *tensors = inputs
        y, _, states = output
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        own = states if ctx.cell == "sru" else y
        ctx.save_for_backward(lengths, resets, own, *tensors)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, _: Any) -> tuple[Any, ...]:
        lengths, resets, states, *tensors = ctx.saved_tensors
        if d_y is None and d_h_n is None:
            return (None,) * 10
        call = ScanCall(ctx.cell, ctx.positive, ctx.reverse, lengths, resets)
        needs = ctx.needs_input_grad[5:]
        is_differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        transformed = is_transformed(d_y, d_h_n)
        if is_differentiated or transformed or not _has_kernel(states):

            def run(*own: Any) -> tuple[Tensor, Tensor, None]:
                return (*composite_scan_layer(call, ScanInputs(*own))[:2], None)

            gradients = differentiable_gradients(
                run, tuple(tensors), needs, (d_y, d_h_n, None), transformed
            )
            return (None,) * 5 + gradients
        return (None,) * 5 + _kernel_gradients(
            call, ScanInputs(*tensors), states, d_y, d_h_n, needs
        )


def _kernel_gradients(
    call: ScanCall,
    inputs: ScanInputs,
    states: Tensor,
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    pre, bias, x, h0, reset_h = inputs
    cell, positive, reverse, lengths, resets = call
    if d_y is None:
        d_y = torch.zeros_like(states)
    d_pre, d_x, d_h0, d_reset_h = _gradients_op(
        *(d_y, d_h_n, pre, bias, x, states, h0, lengths, resets, reset_h),
        *(cell, positive, reverse),
    )
    d_bias = d_pre.sum((0, 1)) if needs[1] else None
    gradients = (d_pre, d_bias, d_x, d_h0, d_reset_h.to(pre.dtype) if needs[4] else None)
    return tuple(d if need else None for d, need in zip(gradients, needs, strict=True))


def _apply(call: ScanCall, inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    return ScanLayerFunction.apply(*call, *inputs)  # type: ignore[no-any-return, no-untyped-call]


def _read(
    pre: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    cell: str,
    positive: bool,
    reverse: bool,
    saves: bool,
) -> tuple[ScanCall, ScanInputs]:
    """Returns the arguments of the operator scan_layer by their meaning."""
    call = ScanCall(cell, positive, reverse, lengths, resets)
    return call, ScanInputs(pre, bias, x, h0, reset_h)


def _autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Runs ``scan_layer`` under autograd: the code of the dispatch key "Autograd"."""
    call, inputs = _read(*arguments)
    saves: bool = arguments[-1]
    if forward_ad._current_level >= 0 and not saves:
        y, h_n, _ = composite_scan_layer(call, inputs)
        return y, h_n, y.new_empty(0)
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if records and not saves:
        y, h_n, states = _apply(call, inputs)
        return y, h_n, states.new_empty(0)
    with AutoDispatchBelowAutograd():
        return _layer_op(*arguments)  # type: ignore[no-any-return]


def _by_operations(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``scan_layer`` on devices that have no kernel for it."""
    call, inputs = _read(*arguments)
    y, h_n, states = composite_scan_layer(call, inputs)
    has_states = call.cell == "sru" and arguments[-1]
    return y, h_n.clone(), states if has_states else y.new_empty(0)


def _sizes(pre: Tensor, x: Tensor | None, cell: str) -> tuple[int, int, int]:
    """Returns the shape of the states, checked."""
    gates = {"min_gru": 2, "min_lstm": 3, "sru": 4 if x is None else 3}.get(cell)
    if gates is None:
        raise RuntimeError(f"fastrnn: cell must be one of min_gru, min_lstm, sru, got '{cell}'.")
    torch._check(pre.dim() == 3, lambda: f"fastrnn: pre must have 3 dimensions, got {pre.dim()}.")
    steps, batch, width = pre.shape
    torch._check(
        width % gates == 0,
        lambda: f"fastrnn: pre must have a multiple of {gates} columns, got {width}.",
    )
    return steps, batch, width // gates


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, (pre, _, x, _, _) = _read(*arguments)
    sizes = _sizes(pre, x, call.cell)
    has_states = call.cell == "sru" and arguments[-1]
    states = pre.new_empty(sizes if has_states else 0)
    return pre.new_empty(sizes), pre.new_empty(sizes[1:]), states


def _gradients_fake(
    d_y: Tensor,
    d_h_n: Tensor | None,
    pre: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    states: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    cell: str,
    positive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(pre, x, cell)
    wide = torch.promote_types(pre.dtype, torch.float32)
    d_reset_h = pre.new_empty(0 if reset_h is None else reset_h.shape, dtype=wide)
    d_x = pre.new_empty(0 if x is None else x.shape)
    return pre.new_empty(pre.shape), d_x, pre.new_empty(sizes[1:]), d_reset_h


torch.library.register_fake("fastrnn::scan_layer", _fake)
torch.library.register_fake("fastrnn::scan_layer_gradients", _gradients_fake)
implementations.impl("scan_layer", _autograd, "Autograd")
if not _library.cuda_kernels:
    implementations.impl("scan_layer", _by_operations, "CUDA")
