"""The linear recurrence over time as an operator, with all its derivatives.

    h_t = a_t * h_{t-1} + b_t

The gradient is a scan in the other direction (csrc/cells/linear_scan.h), which one operator
computes. Where the gradient itself is differentiated, it is composed of ``linear_scan`` and
elementwise operations, so derivatives of every order run by the kernels. So does forward mode:

    dh_t = a_t * dh_{t-1} + (da_t * h_{t-1} + db_t)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import _library
from fastrnn._torch_internals import AutoDispatchBelowAutograd, are_transforms_active, forward_ad
from fastrnn.ops.autograd import implementations
from fastrnn.ops.gradients import is_transformed
from fastrnn.ops.operators import DTYPES
from fastrnn.tracing import is_capturing

_scan_op = torch.ops.fastrnn.linear_scan.default
_gradients_op = torch.ops.fastrnn.linear_scan_gradients.default

_Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None", None]


def shift(h: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """Returns the state before each step: ``first`` (None: zeros) and all states but the last."""
    if first is None:
        first = torch.zeros_like(h[0]) if h.shape[0] else h.new_zeros(h.shape[1:])
    if h.shape[0] == 0:
        return h
    parts = [h[1:], first.unsqueeze(0)] if reverse else [first.unsqueeze(0), h[:-1]]
    return torch.cat(parts)


def composite_gradients(
    d_h: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d_a, d_b and d_h0 by operations that can be differentiated."""
    if a.shape[0] == 0:
        return torch.zeros_like(a), torch.zeros_like(a), d_h.new_zeros(d_h.shape[1:])
    # d_b_t = d_h_t + a_{t+1} * d_b_{t+1}: the factors are those of the next step
    factors = shift(a, None, not reverse)
    d_b = scan(factors, d_h, None, not reverse)
    first = -1 if reverse else 0
    return d_b * shift(h, h0, reverse), d_b, a[first] * d_b[first]


class ScanFunction(torch.autograd.Function):
    """The scan with its derivatives; inputs: a, b, h0, reverse."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
        with AutoDispatchBelowAutograd():  # else the operator would call this Function again
            h: Tensor = _scan_op(a, b, h0, reverse)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, h0, ctx.reverse = inputs
        ctx.save_for_backward(a, output, h0)
        ctx.save_for_forward(a, output, h0)

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> _Gradients:
        a, h, h0 = ctx.saved_tensors
        needs_a, needs_b, needs_h0, _ = ctx.needs_input_grad
        is_differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if is_differentiated or is_transformed(d_h):
            d_a, d_b, d_h0 = composite_gradients(d_h, a, h, h0, ctx.reverse)
        else:
            d_a, d_b, d_h0 = _gradients_op(d_h, a, h, h0, ctx.reverse, needs_a)
        return d_a if needs_a else None, d_b if needs_b else None, d_h0 if needs_h0 else None, None

    @staticmethod
    def jvp(ctx: Any, d_a: Tensor | None, d_b: Tensor | None, d_h0: Tensor | None, _: None) -> Any:
        a, h, h0 = ctx.saved_tensors
        change = torch.zeros_like(h) if d_b is None else d_b
        if d_a is not None:
            change = change + d_a * shift(h, h0, ctx.reverse)
        return scan(a, change, d_h0, ctx.reverse)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        a: Tensor,
        b: Tensor,
        h0: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, int]:
        """Makes the mapped dimension the second one, that is further columns."""

        def mapped(t: Tensor, dim: int | None, to: int) -> Tensor:
            if dim is None:
                return t.unsqueeze(to).expand(*t.shape[:to], info.batch_size, *t.shape[to:])
            return t.movedim(dim, to)

        state = None if h0 is None else mapped(h0, in_dims[2], 0)
        return scan(mapped(a, in_dims[0], 1), mapped(b, in_dims[1], 1), state, reverse), 1


def _needs_function(a: Tensor, b: Tensor, h0: Tensor | None) -> bool:
    """Whether a gradient is recorded or tensors can have tangents."""
    needs = a.requires_grad or b.requires_grad or (h0 is not None and h0.requires_grad)
    return (needs and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """Runs the scan for checked arguments; differentiable."""
    # torch.jit.trace would record the Function as a call of Python, which cannot be saved
    if torch.compiler.is_compiling() or is_capturing():
        return _scan_op(a, b, h0, reverse)  # type: ignore[no-any-return]
    if _needs_function(a, b, h0) or are_transforms_active():
        return ScanFunction.apply(a, b, h0, reverse)  # type: ignore[no-any-return, no-untyped-call]
    return _scan_op(a, b, h0, reverse)  # type: ignore[no-any-return]


def _autograd(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """Runs ``linear_scan`` under autograd: the code of the dispatch key "Autograd"."""
    if _needs_function(a, b, h0):
        return ScanFunction.apply(a, b, h0, reverse)  # type: ignore[no-any-return, no-untyped-call]
    with AutoDispatchBelowAutograd():
        return _scan_op(a, b, h0, reverse)  # type: ignore[no-any-return]


def _expect(name: str, t: Tensor | None, a: Tensor, shape: torch.Size) -> None:
    if t is None:
        return
    torch._check(t.dtype == a.dtype, lambda: f"fastrnn: {name} must have the dtype of a.")
    torch._check(t.device == a.device, lambda: f"fastrnn: {name} must be on the device of a.")
    torch._check(
        t.shape == shape,
        lambda: f"fastrnn: {name} must have the shape {list(shape)}, got {list(t.shape)}.",
    )


def _expect_steps(a: Tensor) -> None:
    expected = "float16, bfloat16, float32 or float64"
    torch._check(a.dtype in DTYPES, lambda: f"fastrnn: a must be {expected}, got {a.dtype}.")
    torch._check(a.dim() > 0, lambda: "fastrnn: a must have one dimension or more, got none.")


def _check_scan(a: Tensor, b: Tensor, h0: Tensor | None) -> None:
    _expect_steps(a)
    _expect("b", b, a, a.shape)
    _expect("h0", h0, a, a.shape[1:])


def _check_gradients(d_h: Tensor, a: Tensor, h: Tensor, h0: Tensor | None) -> None:
    _expect_steps(a)
    _expect("d_h", d_h, a, a.shape)
    _expect("h", h, a, a.shape)
    _expect("h0", h0, a, a.shape[1:])


def scan_by_steps(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """Computes the scan step by step, on devices that have no kernel for it."""
    _check_scan(a, b, h0)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    wide = torch.promote_types(b.dtype, torch.float32)
    state = b.new_zeros(b.shape[1:], dtype=wide) if h0 is None else h0.to(wide)
    steps = range(a.shape[0])
    for t in reversed(steps) if reverse else steps:
        state = a[t] * state + b[t]
        h[t] = state
    return h


def _gradients_by_steps(
    d_h: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, needs_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradients(d_h, a, h, h0)
    d_a, d_b, d_h0 = composite_gradients(d_h, a, h, h0, reverse)
    return d_a if needs_a else a.new_empty(0), d_b, d_h0.contiguous()


def _fake(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    _check_scan(a, b, h0)
    return a.new_empty(a.shape)


def _gradients_fake(
    d_h: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, needs_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradients(d_h, a, h, h0)
    d_a = a.new_empty(a.shape if needs_a else 0)
    return d_a, a.new_empty(a.shape), a.new_empty(a.shape[1:])


torch.library.register_fake("fastrnn::linear_scan", _fake)
torch.library.register_fake("fastrnn::linear_scan_gradients", _gradients_fake)
implementations.impl("linear_scan", _autograd, "Autograd")
if not _library.cuda_kernels:
    implementations.impl("linear_scan", scan_by_steps, "CUDA")
    implementations.impl("linear_scan_gradients", _gradients_by_steps, "CUDA")
