"""States and gates of every step together with lengths and resets, for graphs.

``ragged_states`` is the operator of a layer. It runs what eager code composes
(`fastrnn.ops.segments`, on CUDA `fastrnn.ops.masked`), so a graph depends on no value of the marks.
Its backward pass, ``ragged_states_gradients``, runs the forward pass of the layer again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrnn._torch_internals import AutoDispatchBelowAutograd
from fastrnn.engine.run import run
from fastrnn.engine.states import Recorder
from fastrnn.layer_call import DEFAULTS, LayerCall, Results
from fastrnn.ops.autograd import implementations, saved_tensors
from fastrnn.ops.fakes import expect_ragged
from fastrnn.ops.gradients import Gradients
from fastrnn.ops.masked import masked_layer
from fastrnn.ops.operators import decode_layer
from fastrnn.ops.ragged_arguments import ragged_arguments
from fastrnn.ops.ragged_on_device import keeps_marks
from fastrnn.ops.segments import Ragged, run_composed
from fastrnn.ops.states import gate_names, output_rows
from fastrnn.reference import GATES
from fastrnn.spec import CELLS, CellSpec
from fastrnn.tracing import without_tracing

_ARGUMENTS = (
    "Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int slots, Tensor? lengths, "
    "Tensor? resets, Tensor? reset_h, Tensor? reset_c, str cell"
)
_fragment = torch.library.Library("fastrnn", "FRAGMENT")
_fragment.define(
    f"ragged_states({_ARGUMENTS}, bool wants_gates) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor c_steps, Tensor gates)"
)
_fragment.define(
    "ragged_states_gradients(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_c_steps, "
    f"{_ARGUMENTS}, bool[] needs) -> Tensor[]"
)
_states_op = torch.ops.fastrnn.ragged_states.default
_gradients_op = torch.ops.fastrnn.ragged_states_gradients.default

#: y, h_n, c_n, c_steps [T*B,D,C*H], gates [T*B,D,A,H]; an empty tensor for each that there is not
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def recorded_layer(call: LayerCall, ragged: Ragged, recorder: Recorder) -> Results:
    """Runs one layer by the operator, and adds what its steps leave to a recorder.

    Args:
        call: the layer; x [T,B,I].
        ragged: lengths int64 and resets bool or float64, with unchecked values.
        recorder: the recorder of the call.
    """
    spec = call.spec
    y, h_n, c_n, c_steps, values = _states_op(
        call.x,
        call.h0,
        call.c0,
        call.weights.flat,
        call.weights.slots,
        *ragged,
        spec.name,
        recorder.returns_gates and spec.name in GATES,
    )
    gates = None
    if recorder.returns_gates:
        gates = {"h": output_rows(call, y).detach()}
        if spec.name in GATES:
            gates = dict(zip(gate_names(spec), values.detach().unbind(2), strict=True))
    recorder.collect(call, y, None if call.c0 is None else c_steps, gates)
    return decode_layer(call, y, h_n, c_n)


def run_masked(call: LayerCall, ragged: Ragged, recorder: Recorder, by_kernels: bool) -> Results:
    """Runs one layer without reading the marks, and adds what its steps leave to a recorder."""
    wanted = (recorder.returns_states, recorder.returns_gates)
    results, c, gates = masked_layer(call, ragged, by_kernels, *wanted)
    recorder.collect(call, results[0], c, gates)
    return results


def _compose(call: LayerCall, ragged: Ragged, wants_gates: bool) -> tuple[Results, Recorder]:
    """Runs a layer and records c and the gates of its steps."""
    recorder = Recorder(True, wants_gates)
    options = DEFAULTS._replace(recorder=recorder)
    with torch.autocast(call.x.device.type, enabled=False):  # the caller has cast
        if keeps_marks(call.x):
            return run_masked(call, ragged, recorder, by_kernels=True), recorder
        return run_composed(call._replace(options=options), ragged, run), recorder


def _forward(*args: Any) -> _Tensors:
    """Runs ``ragged_states`` on any device."""
    return without_tracing(_forward_untraced, *args)


@torch.no_grad()
def _forward_untraced(*args: Any) -> _Tensors:
    *arguments, wants_gates = args
    call, ragged = ragged_arguments(*arguments)
    x = call.x
    (y, h_n, c_n), recorder = _compose(call, ragged, wants_gates)
    c, gates = recorder.rows()
    nothing = x.new_empty(0)
    return (
        y,
        h_n,
        nothing if c_n is None else c_n,
        x.new_empty(0) if c is None else c.to(x.dtype),
        torch.stack([*gates.values()], 2).to(x.dtype) if gates else x.new_empty(0),
    )


def _gradients(*args: Any) -> list[Tensor]:
    """Runs ``ragged_states_gradients``: the gradients of the inputs that need one."""
    d_y, d_h_n, d_c_n, d_c_steps, x, h0, c0, weights, slots, *marks, cell, needs = args
    lengths, resets, reset_h, reset_c = marks
    inputs: list[Any] = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip((x, h0, c0, reset_h, reset_c, *weights), needs, strict=True)
    ]
    x, h0, c0, reset_h, reset_c, *weights = inputs
    with torch.enable_grad():
        call, ragged = ragged_arguments(
            x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell
        )
        (y, h_n, c_n), recorder = _compose(call, ragged, False)
        c_steps, _ = recorder.rows()
        pairs = [
            (output, gradient.to(output.dtype))
            for output, gradient in zip(
                (y, h_n, c_n, c_steps), (d_y, d_h_n, d_c_n, d_c_steps), strict=True
            )
            if gradient is not None and output is not None and output.requires_grad
        ]
        needed = [t for t in inputs if t is not None and t.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in needed]
        outputs, gradients = zip(*pairs, strict=True)
        found: Any = torch.autograd.grad(outputs, needed, gradients, allow_unused=True)
    return [
        torch.zeros_like(t) if own is None else own for t, own in zip(needed, found, strict=True)
    ]


def _forward_fake(*args: Any) -> _Tensors:
    x, h0, c0, weights, *_, cell, wants_gates = args
    expect_ragged(*args[:-1])
    spec = CELLS[cell]
    steps, batch, _ = x.shape
    directions, _, size = h0.shape
    rows = steps * batch
    gates = (rows, directions, len(gate_names(spec)), weights[0].shape[0] // spec.gates)
    return (
        x.new_empty(steps, batch, directions * size),
        h0.new_empty(h0.shape),
        x.new_empty(0) if c0 is None else c0.new_empty(c0.shape),
        x.new_empty(0) if c0 is None else x.new_empty(rows, directions, c0.shape[2]),
        x.new_empty(gates) if wants_gates else x.new_empty(0),
    )


def _gradients_fake(*args: Any) -> list[Tensor]:
    *_, x, h0, c0, weights, _, _, _, reset_h, reset_c, _, needs = args
    return [
        t.new_empty(t.shape)
        for t, need in zip((x, h0, c0, reset_h, reset_c, *weights), needs, strict=True)
        if need and t is not None
    ]


class _Function(torch.autograd.Function):
    r"""``ragged_states`` with its gradient.

    Inputs: spec, slots, lengths, resets, wants_gates, x, h0, c0, reset_h, reset_c, \*weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: CellSpec,
        slots: int,
        lengths: Tensor | None,
        resets: Tensor | None,
        wants_gates: bool,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        *weights: Tensor,
    ) -> _Tensors:
        marks = (lengths, resets, reset_h, reset_c)
        with AutoDispatchBelowAutograd():
            results: _Tensors = _states_op(
                x, h0, c0, weights, slots, *marks, spec.name, wants_gates
            )
        optional = (c0, *marks)
        ctx.has = [t is not None for t in optional]
        ctx.save_for_backward(x, h0, *(t for t in optional if t is not None), *weights)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.slots = spec, slots
        ctx.mark_non_differentiable(*(results[2:] if c0 is None else results[4:]))
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        d_c_steps: Tensor | None,
        _: None,
    ) -> Gradients:
        x, h0, *rest = saved_tensors(ctx)
        c0, *marks = [rest.pop(0) if has else None for has in ctx.has]
        needs = list(ctx.needs_input_grad[_BEFORE_X:])
        if c0 is None:
            d_c_n = d_c_steps = None
        d_outputs = (d_y, d_h_n, d_c_n, d_c_steps)
        found = iter(
            _gradients_op(*d_outputs, x, h0, c0, rest, ctx.slots, *marks, ctx.spec.name, needs)
        )
        return (None,) * _BEFORE_X + tuple(next(found) if need else None for need in needs)


_BEFORE_X = 5  # the inputs before x


def _autograd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    cell: str,
    wants_gates: bool,
) -> _Tensors:
    """Runs ``ragged_states`` under autograd: the code of the dispatch key "Autograd"."""
    spec = CELLS.get(cell)  # the operator raises for an unknown cell
    states = (x, h0, c0, reset_h, reset_c, *weights)
    needs_gradient = any(t is not None and t.requires_grad for t in states)
    if spec is not None and torch.is_grad_enabled() and needs_gradient:
        apply: Any = _Function.apply
        own: _Tensors = apply(
            spec, slots, lengths, resets, wants_gates, x, h0, c0, reset_h, reset_c, *weights
        )
        return own
    with AutoDispatchBelowAutograd():
        results: _Tensors = _states_op(
            x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell, wants_gates
        )
    return results


_fragment.impl("ragged_states", _forward, "CompositeExplicitAutograd")
_fragment.impl("ragged_states_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("fastrnn::ragged_states", _forward_fake)
torch.library.register_fake("fastrnn::ragged_states_gradients", _gradients_fake)
implementations.impl("ragged_states", _autograd, "Autograd")
