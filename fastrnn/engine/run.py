"""Runs stacked layers or one step with the backend that `fastrnn.engine.choose` selects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastrnn import autocast
from fastrnn._torch_internals import is_any_autocast_enabled
from fastrnn.backends import Backend, prepared, torch_step
from fastrnn.engine import choose
from fastrnn.engine.checks import check_alike, check_layers, check_step
from fastrnn.engine.heads import run_heads
from fastrnn.layer_call import DEFAULTS, PADDED, LayerCall, Results
from fastrnn.ops import HALF, forward_op, kernel_layer, raise_unless_rejected
from fastrnn.ops.stacking import layer_input, layer_output
from fastrnn.spec import CellSpec, Weights
from fastrnn.tracing import is_capturing, size, without_tracing


def run(call: LayerCall, batch_first: bool = False) -> Results:
    """Runs stacked layers with the best backend. The caller has checked the shapes.

    Args:
        call: the stacked layers.
        batch_first: whether x and y are [B,T,*].

    Raises:
        RuntimeError: dtypes or devices do not fit together.
    """
    if batch_first:
        y, h_n, c_n = run(call._replace(x=call.x.transpose(0, 1)))
        return y.transpose(0, 1), h_n, c_n
    if call.options.heads > 1:
        return run_heads(call, None, lambda own, _: run(own))
    backend = choose.choose(call)
    if not (is_any_autocast_enabled() and autocast.acts_on(call.x)):
        if backend is not torch_step:
            check_layers(call)
        return backend.run(call) if call.options is DEFAULTS else run_stack(call, backend)
    if backend is torch_step:
        # autocast stays enabled, because torch then caches the cast weights
        return autocast.cast_results(call, run_stack(call, backend))
    cast = autocast.cast_call(call)
    with without_autocast(cast):
        check_layers(cast)
        results = run_stack(cast, choose.choose(cast, choose.AFTER_AUTOCAST))
    return autocast.cast_results(call, results)


def run_stack(call: LayerCall, backend: Backend) -> Results:
    """Runs the layers in order; `fastrnn.ops.stacking` defines what each one reads."""
    num_layers = call.options.num_layers
    if num_layers == 1 or (
        backend.WHOLE_STACK and (backend is prepared or not call.options.residual)
    ):
        return backend.run(call)
    spec, x, sequence, h0, c0, (flat, slots), options = call
    layer_options = DEFAULTS._replace(
        weight_format=options.weight_format, recompute=options.recompute, cell=options.cell
    )
    count = len(flat) // num_layers
    directions = size(h0, 0) // num_layers
    h_n, c_n = [], []
    for index in range(num_layers):
        states = slice(index * directions, (index + 1) * directions)
        c = None if c0 is None else c0[states]
        weights = Weights(flat[index * count : (index + 1) * count], slots)
        below = x
        x = layer_input(below, index, options)
        y, h, c = backend.run(LayerCall(spec, x, sequence, h0[states], c, weights, layer_options))
        x = layer_output(y, below, index, options)
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n) if c_n else None


def run_step(
    spec: CellSpec, x: Tensor, h: Tensor, c: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """Runs one step of one direction: from x [B,I], h and c [B,H] to the next h and c.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit together. The messages are torch's.
    """
    if spec.gates == 1:
        if not choose.is_watched() and not torch_step.unsupported_step(spec, x, h, weights):
            return run_torch_step(spec, x, h, weights), None
        return _run_step_general_path(LayerCall(spec, x, PADDED, h, c, weights))
    rejection = None
    try:
        # the operator checks no sizes of meta tensors
        if (
            choose.may_use_fast_path()
            and type(x) is Tensor
            and not (x.is_meta or weights.flat[0].is_meta)
            and x.dtype not in HALF
        ):
            return run_step_unchecked(spec, x, h, c, weights.flat, weights.slots)
    except Exception as error:
        raise_unless_rejected(error)
        rejection = error
    try:
        return _run_step_general_path(LayerCall(spec, x, PADDED, h, c, weights))
    except Exception as error:
        if rejection is not None:
            error.__cause__ = rejection
        raise


def run_step_unchecked(
    spec: CellSpec, x: Tensor, h: Tensor, c: Tensor | None, flat: Sequence[Tensor], slots: int
) -> tuple[Tensor, Tensor | None]:
    """Runs one step by the kernels; only the operator checks the arguments.

    The caller has checked `choose.may_use_fast_path`, and that no tensor is a meta tensor.
    """
    if torch.is_grad_enabled():
        _, h_n, c_n = kernel_layer(LayerCall(spec, x, PADDED, h, c, Weights(flat, slots)))
        return h_n, c_n
    _, h_n, c_n, _ = forward_op(x, h, c, flat, slots, None, spec.name, spec.inference_outputs)
    return h_n, None if c is None else c_n


def run_torch_step(spec: CellSpec, x: Tensor, h: Tensor, weights: Weights) -> Tensor:
    """Runs torch's own step of an RNN. Explains its errors."""
    step: Any = spec.torch.torch_step
    try:
        return step(x, h, *weights.flat)  # type: ignore[no-any-return]
    except RuntimeError:
        _explain_step(LayerCall(spec, x, PADDED, h, None, weights))
        raise


def _run_step_general_path(call: LayerCall) -> tuple[Tensor, Tensor | None]:
    """Runs any step. `run_step` tries its fast paths first."""
    backend = choose.choose(call, choose.STEPS)
    if backend is torch_step:
        try:
            _, h_n, c_n = torch_step.run(call)
        except RuntimeError:
            _explain_step(call)
            raise
        return h_n, c_n
    without_tracing(check_step, call)
    if not (is_any_autocast_enabled() and autocast.acts_on(call.x)):
        check_alike(call)
        _, h_n, c_n = backend.run(call)
        return h_n, c_n
    cast = autocast.cast_call(call)
    with without_autocast(cast):
        check_alike(cast)
        results = choose.choose(cast, choose.STEPS_AFTER_AUTOCAST).run(cast)
    _, h_n, c_n = autocast.cast_results(call, results)
    return h_n, c_n


def _explain_step(call: LayerCall) -> None:
    """Raises a clear error for a step that torch's own step has rejected, or returns."""
    without_tracing(check_step, call)
    if not autocast.acts_on(call.x):
        check_alike(call)


def without_autocast(call: LayerCall) -> AbstractContextManager[object]:
    """Disables autocast for operators that would apply their own casts to the cast arguments.

    They are the operators of captured graphs, and the operator that returns the states of each
    step.
    """
    if torch.compiler.is_compiling() or is_capturing() or call.options.recorder is not None:
        return torch.autocast(call.x.device.type, enabled=False)
    return nullcontext()
