"""The operators under autograd, autocast and tensors that have no plain memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn._torch_internals import (
    AutoDispatchBelowAutograd,
    DispatchKey,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
    are_transforms_active,
    is_any_autocast_enabled,
    lazy_clone,
    unbound_apply,
)
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops.gradients import Gradients, gradients
from fastrnn.ops.operators import (
    OPERATORS,
    captured_layer,
    decode_layer,
    infer_layer,
    interruptible_forward,
    layer_op,
    records,
)
from fastrnn.spec import CELLS, CellSpec, Weights

#: the results of ``recurrent_layer``
_Tensors = tuple[Tensor, Tensor, Tensor]


class LayerFunction(torch.autograd.Function):
    r"""One layer with its gradient; inputs: spec, slots, batch_sizes, x, h0, c0, \*weights."""

    @staticmethod
    def forward(
        spec: CellSpec,
        slots: int,
        batch_sizes: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = interruptible_forward(
            x, h0, c0, weights, slots, batch_sizes, spec.name, spec.training_outputs
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, slots, batch_sizes, x, h0, c0, *weights = inputs
        y, _, c_n, saved = output
        _keep(ctx, x, h0, c0, batch_sizes, spec, slots, weights, y, saved)
        ctx.mark_non_differentiable(*([c_n, saved] if c0 is None else [saved]))

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, _: None
    ) -> Gradients:
        # compiled code passes zeros for outputs without a gradient
        return _backward_of(ctx, d_y, d_h_n, d_c_n if ctx.has_c0 else None)


class EagerLayerFunction(torch.autograd.Function):
    """`LayerFunction` outside of transforms and compilers: y may be changed in place.

    It has fewer outputs, too. The backward pass reads y. The caller gets a lazy clone of it, which
    shares its memory until one of the two is written to: an in-place ReLU, dropout or mask copies
    first. One step of one direction returns its state alone, which backward does not read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: CellSpec,
        slots: int,
        batch_sizes: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        y, h_n, c_n, saved = interruptible_forward(
            x, h0, c0, weights, slots, batch_sizes, spec.name, spec.training_outputs
        )
        _keep(ctx, x, h0, c0, batch_sizes, spec, slots, weights, y, saved)
        y = None if h0.dim() == 2 else lazy_clone(y)
        return (y, h_n) if c0 is None else (y, h_n, c_n)

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None
    ) -> Gradients:
        return _backward_of(ctx, d_y, d_h_n, d_c_n)


def _keep(
    ctx: Any,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    spec: CellSpec,
    slots: int,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
) -> None:
    """Keeps what `_backward_of` reads; tensors only, as tools that draw graphs expect."""
    if batch_sizes is None:
        if c0 is None:
            ctx.save_for_backward(x, h0, y, saved, *weights)
        else:
            ctx.save_for_backward(x, h0, y, saved, c0, *weights)
    elif c0 is None:
        ctx.save_for_backward(x, h0, y, saved, batch_sizes, *weights)
    else:
        ctx.save_for_backward(x, h0, y, saved, c0, batch_sizes, *weights)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.slots = spec, slots
    ctx.has_c0, ctx.is_packed = c0 is not None, batch_sizes is not None


def _kept(ctx: Any) -> Sequence[Tensor]:
    """The tensors of `_keep`, unless one of them has been changed in place since."""
    try:
        saved: Sequence[Tensor] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{ctx.spec.mode}: the input, the states, the weights and the output must not be "
            "modified by an inplace operation before backward, got one that was. Use the operation "
            "that returns a new tensor, or change a copy (output = output.clone())."
        ) from error
    return saved


#: the inputs before x: the cell, the slots and batch_sizes
_BEFORE_X = 3


def _backward_of(
    ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None
) -> Gradients:
    """The gradients of all inputs of `LayerFunction` and `EagerLayerFunction`."""
    if d_y is None and d_h_n is None and d_c_n is None:
        return (None,) * len(ctx.needs_input_grad)
    x, h0, y, saved, *rest = _kept(ctx)
    c0 = rest.pop(0) if ctx.has_c0 else None
    batch_sizes = rest.pop(0) if ctx.is_packed else None
    call = LayerCall(ctx.spec, x, batch_sizes, h0, c0, Weights(rest, ctx.slots))
    needs = ctx.needs_input_grad[_BEFORE_X:]
    d_outputs = (d_y, d_h_n, d_c_n)
    if is_any_autocast_enabled() and autocast.acts_on(x):  # it has chosen the types in forward
        with torch.autocast(x.device.type, enabled=False):
            found = gradients(call, needs, d_outputs, y, saved)
    else:
        found = gradients(call, needs, d_outputs, y, saved)
    return None, None, None, *found


_apply: Any = unbound_apply(LayerFunction)
_apply_eagerly: Any = unbound_apply(EagerLayerFunction)


def kernel_layer(call: LayerCall) -> Results:
    """Runs one layer, or one step, by the kernels; differentiable where autograd records."""
    is_recorded = records(call)
    if torch.compiler.is_compiling() and (is_recorded or not call.options.half_weights):
        # a Function that Dynamo traces loses what its backward pass records for create_graph=True
        return captured_layer(call)
    if not is_recorded:
        return infer_layer(call)
    spec, x, batch_sizes, h0, c0, (weights, slots), _ = call
    if are_transforms_active():
        apply: Any = LayerFunction.apply
    elif x.is_cpu:
        return _eager_layer(call)
    else:
        apply = _apply
    y, h_n, c_n, _ = apply(spec, slots, batch_sizes, x, h0, c0, *weights)
    return decode_layer(call, y, h_n, c_n)


def _eager_layer(call: LayerCall) -> Results:
    """`kernel_layer` by `EagerLayerFunction`."""
    spec, x, batch_sizes, h0, c0, (weights, slots), _ = call
    if c0 is None:
        y, h_n = _apply_eagerly(spec, slots, batch_sizes, x, h0, None, *weights)
        c_n = None
    else:
        y, h_n, c_n = _apply_eagerly(spec, slots, batch_sizes, x, h0, c0, *weights)
    return h_n if y is None else y, h_n, c_n


def _layer_autograd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    batch_sizes: Tensor | None,
    cell: str,
) -> _Tensors:
    """Runs ``recurrent_layer`` of a graph under autograd."""
    spec = CELLS.get(cell)  # the kernel rejects an unknown one
    if spec is not None and records(
        LayerCall(spec, x, batch_sizes, h0, c0, Weights(weights, slots))
    ):
        apply: Any = LayerFunction.apply
        y, h_n, c_n, _ = apply(spec, slots, batch_sizes, x, h0, c0, *weights)
    else:
        with AutoDispatchBelowAutograd():
            y, h_n, c_n = layer_op(x, h0, c0, weights, slots, batch_sizes, cell)
    return y, h_n, c_n


def _layer_autocast(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    batch_sizes: Tensor | None,
    cell: str,
) -> _Tensors:
    """Runs ``recurrent_layer`` of a graph under autocast, with the types of `fastrnn.autocast`."""
    spec = CELLS.get(cell)  # the kernel rejects an unknown one
    is_cast = autocast.acts_on(x)  # not where x is on another device than the weights
    with ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        if spec is None or not is_cast:
            return layer_op(x, h0, c0, weights, slots, batch_sizes, cell)  # type: ignore[no-any-return]
        call = LayerCall(spec, x, batch_sizes, h0, c0, Weights(weights, slots))
        own = autocast.cast_call(call)
        y, h_n, c_n = layer_op(own.x, own.h0, own.c0, own.weights.flat, slots, batch_sizes, cell)
        y, h_n, c_cast = autocast.cast_results(call, decode_layer(call, y, h_n, c_n))
        return y, h_n, c_n if c_cast is None else c_cast


def _reject_layout(*args: Any, **kwargs: Any) -> Any:
    """Replaces a kernel for tensors that are no plain arrays; dispatch looks at all arguments."""
    raise RuntimeError(
        "fastrnn: tensors must be dense, got a sparse, mkldnn, nested or quantized one. "
        "Convert with input.to_dense()."
    )


_AUTOCAST_KEYS = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
_implementations = torch.library.Library("fastrnn", "IMPL")
_implementations.impl("recurrent_layer", _layer_autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _implementations.impl("recurrent_layer", _layer_autocast, _key)
for _operator in OPERATORS:
    for _key in ("Sparse", "SparseCsr", "NestedTensor", "Quantized"):
        for _device in ("CPU", "CUDA"):
            _implementations.impl(_operator, _reject_layout, _key + _device)
    for _key in ("MkldnnCPU", "AutogradNestedTensor"):
        _implementations.impl(_operator, _reject_layout, _key)
