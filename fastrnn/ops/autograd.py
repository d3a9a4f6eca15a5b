"""Autograd and autocast of the operators, and their error for tensors that are not dense."""

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
from fastrnn.layer_call import PADDED, LayerCall, Results, SequenceTensors
from fastrnn.ops.gradients import Gradients, gradients
from fastrnn.ops.operators import (
    OPERATORS,
    captured_layer,
    decode_layer,
    infer_layer,
    interruptible_forward,
    layer_op,
    records_gradient,
)
from fastrnn.spec import CELLS, WEIGHT_BITS, CellSpec, Weights

#: the results of ``recurrent_layer``: y, h_n, c_n
_Tensors = tuple[Tensor, Tensor, Tensor]


class LayerFunction(torch.autograd.Function):
    r"""One layer with its gradient; inputs: spec, slots, sequence, x, h0, c0, \*weights."""

    @staticmethod
    def forward(
        spec: CellSpec,
        slots: int,
        sequence: SequenceTensors,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = interruptible_forward(
            x,
            h0,
            c0,
            weights,
            slots | sequence.slots,
            sequence.flat,
            spec.name,
            spec.training_outputs,
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, slots, sequence, x, h0, c0, *weights = inputs
        y, _, c_n, saved = output
        _save_for_backward(ctx, x, h0, c0, sequence, spec, slots, weights, y, saved)
        ctx.mark_non_differentiable(*([c_n, saved] if c0 is None else [saved]))

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, _: None
    ) -> Gradients:
        # compiled code passes zeros for outputs without a gradient
        return _backward_of(ctx, d_y, d_h_n, d_c_n if ctx.has_c0 else None)


class EagerLayerFunction(torch.autograd.Function):
    """`LayerFunction` for eager code without transforms. y may be changed in place.

    The backward pass reads y, so the caller gets a lazy clone of it. The clone shares memory with y
    until one of them is written to: an in-place ReLU, dropout or mask copies first. One step of one
    direction returns only its state, which the backward pass does not read. The values that
    `LayerFunction` returns for its backward pass are not outputs here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: CellSpec,
        slots: int,
        sequence: SequenceTensors,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        y, h_n, c_n, saved = interruptible_forward(
            x,
            h0,
            c0,
            weights,
            slots | sequence.slots,
            sequence.flat,
            spec.name,
            spec.training_outputs,
        )
        _save_for_backward(ctx, x, h0, c0, sequence, spec, slots, weights, y, saved)
        y = None if h0.dim() == 2 else lazy_clone(y)
        return (y, h_n) if c0 is None else (y, h_n, c_n)

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None
    ) -> Gradients:
        return _backward_of(ctx, d_y, d_h_n, d_c_n)


def _save_for_backward(
    ctx: Any,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    sequence: SequenceTensors,
    spec: CellSpec,
    slots: int,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
) -> None:
    """Saves the values that `_backward_of` reads.

    Only tensors are passed to ``save_for_backward``, as tools that draw autograd graphs expect.
    """
    flat = sequence.flat or ()
    if c0 is None:
        ctx.save_for_backward(x, h0, y, saved, *flat, *weights)
    else:
        ctx.save_for_backward(x, h0, y, saved, c0, *flat, *weights)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.slots = spec, slots
    ctx.has_c0, ctx.sequence_slots = c0 is not None, sequence.slots


def saved_tensors(ctx: Any) -> Sequence[Tensor]:
    """Returns the saved tensors.

    Raises:
        RuntimeError: one of them has been changed in place.
    """
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


_BEFORE_X = 3  # the inputs before x: spec, slots and sequence


def _backward_of(
    ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None
) -> Gradients:
    """Returns the gradients of all inputs of `LayerFunction` or `EagerLayerFunction`."""
    if d_y is None and d_h_n is None and d_c_n is None:
        return (None,) * len(ctx.needs_input_grad)
    x, h0, y, saved, *rest = saved_tensors(ctx)
    c0 = rest.pop(0) if ctx.has_c0 else None
    sequence, sequence_slots = PADDED, ctx.sequence_slots
    if sequence_slots:
        count = sequence_slots.bit_count()
        sequence, rest = SequenceTensors(rest[:count], sequence_slots), rest[count:]
    call = LayerCall(ctx.spec, x, sequence, h0, c0, Weights(rest, ctx.slots))
    needs = ctx.needs_input_grad[_BEFORE_X:]
    d_outputs = (d_y, d_h_n, d_c_n)
    if is_any_autocast_enabled() and autocast.acts_on(x):  # forward has already cast the tensors
        with torch.autocast(x.device.type, enabled=False):
            found = gradients(call, needs, d_outputs, y, saved)
    else:
        found = gradients(call, needs, d_outputs, y, saved)
    return None, None, None, *found


_apply: Any = unbound_apply(LayerFunction)
_apply_eagerly: Any = unbound_apply(EagerLayerFunction)


def kernel_layer(call: LayerCall) -> Results:
    """Runs one layer or one step by the kernels. Differentiable if a gradient is recorded."""
    is_recorded = records_gradient(call)
    if torch.compiler.is_compiling() and (is_recorded or not call.options.weight_format):
        # If Dynamo traced the Function, create_graph=True would lose the graph of its backward.
        return captured_layer(call)
    if not is_recorded:
        return infer_layer(call)
    spec, x, sequence, h0, c0, (weights, slots), _ = call
    if are_transforms_active():
        apply: Any = LayerFunction.apply
    elif x.is_cpu:
        return _eager_layer(call)
    else:
        apply = _apply
    y, h_n, c_n, _ = apply(spec, slots, sequence, x, h0, c0, *weights)
    return decode_layer(call, y, h_n, c_n)


def _eager_layer(call: LayerCall) -> Results:
    """Runs one layer or one step by `EagerLayerFunction`."""
    spec, x, sequence, h0, c0, (weights, slots), _ = call
    if c0 is None:
        y, h_n = _apply_eagerly(spec, slots, sequence, x, h0, None, *weights)
        c_n = None
    else:
        y, h_n, c_n = _apply_eagerly(spec, slots, sequence, x, h0, c0, *weights)
    return h_n if y is None else y, h_n, c_n


def _call_of(
    spec: CellSpec,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
) -> LayerCall:
    """Returns the call that the arguments of ``recurrent_layer`` describe."""
    own = SequenceTensors(sequence, slots & ~WEIGHT_BITS)
    return LayerCall(spec, x, own, h0, c0, Weights(weights, slots & WEIGHT_BITS))


def _layer_autograd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> _Tensors:
    """Runs ``recurrent_layer`` under autograd: the code of the dispatch key "Autograd"."""
    spec = CELLS.get(cell)  # the kernel raises for an unknown cell
    if spec is not None:
        call = _call_of(spec, x, h0, c0, weights, slots, sequence)
        if records_gradient(call):
            apply: Any = LayerFunction.apply
            y, h_n, c_n, _ = apply(spec, call.weights.slots, call.sequence, x, h0, c0, *weights)
            return y, h_n, c_n
    with AutoDispatchBelowAutograd():
        y, h_n, c_n = layer_op(x, h0, c0, weights, slots, sequence, cell)
    return y, h_n, c_n


def _layer_autocast(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> _Tensors:
    """Runs ``recurrent_layer`` under autocast, with the types of `fastrnn.autocast`."""
    spec = CELLS.get(cell)  # the kernel raises for an unknown cell
    is_cast = autocast.acts_on(x)  # False if autocast is enabled only on the weights' device
    with ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        if spec is None or not is_cast:
            return layer_op(x, h0, c0, weights, slots, sequence, cell)  # type: ignore[no-any-return]
        call = _call_of(spec, x, h0, c0, weights, slots, sequence)
        cast = autocast.cast_call(call)
        y, h_n, c_n = layer_op(cast.x, cast.h0, cast.c0, cast.weights.flat, slots, sequence, cell)
        y, h_n, c_cast = autocast.cast_results(call, decode_layer(call, y, h_n, c_n))
        return y, h_n, c_n if c_cast is None else c_cast


def _reject_layout(*args: Any, **kwargs: Any) -> Any:
    """Raises for tensors that are not dense, in any argument: the code of their dispatch keys."""
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
