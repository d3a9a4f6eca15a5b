"""Layers that return what every step leaves: the cell states and the activations of the gates.

The forward pass saves the activations and the cell states for backward. ``recurrent_states`` is the
operator of a layer that also returns them; its backward pass takes gradients of the cell states of
every step, besides those of y and of the final states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrnn import autocast
from fastrnn._torch_internals import (
    AutoDispatchBelowAutograd,
    ExcludeDispatchKeyGuard,
    are_transforms_active,
    lazy_clone,
)
from fastrnn.layer_call import LayerCall, Results, SequenceTensors
from fastrnn.ops.autograd import (
    AUTOCAST_KEYS,
    backward_of,
    call_of,
    implementations,
    kernel_layer,
    save_for_backward,
)
from fastrnn.ops.composite import composite_layer, composite_states
from fastrnn.ops.gradients import Gradients
from fastrnn.ops.operators import (
    decode_layer,
    interruptible_states,
    records_gradient,
    states_op,
)
from fastrnn.ops.sequence import previous_states
from fastrnn.reference import GATES
from fastrnn.spec import CELLS, CellSpec
from fastrnn.tracing import is_capturing

#: y, h_n, c_n, c_steps, saved
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Steps(NamedTuple):
    """One layer with what every step leaves; N rows, those of a padded batch step by step.

    Attributes:
        results: y, h_n and c_n of the layer.
        c: [N,D,C*H] cell states after each step; None if the cell has none or they are not wanted.
        gates: for each gate [N,D,H] its activations, detached; None if they are not wanted.
    """

    results: Results
    c: Tensor | None
    gates: dict[str, Tensor] | None


class StatesFunction(torch.autograd.Function):
    r"""``recurrent_states`` with its gradient; inputs as those of `LayerFunction`."""

    @staticmethod
    def forward(
        spec: CellSpec,
        slots: int,
        sequence: SequenceTensors,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> _Tensors:
        result: _Tensors = interruptible_states(
            x, h0, c0, weights, slots | sequence.slots, sequence.flat, spec.name
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
        spec, slots, sequence, x, h0, c0, *weights = inputs
        y, _, c_n, c_steps, saved = output
        save_for_backward(ctx, x, h0, c0, sequence, spec, slots, weights, y, saved)
        ctx.mark_non_differentiable(*([c_n, c_steps, saved] if c0 is None else [saved]))

    @staticmethod
    def backward(
        ctx: Any,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        d_c_steps: Tensor | None,
        _: None,
    ) -> Gradients:
        # compiled code passes zeros for outputs without a gradient
        if not ctx.has_c0:
            return backward_of(ctx, d_y, d_h_n, None)
        return backward_of(ctx, d_y, d_h_n, d_c_n, d_c_steps)


def kernel_steps(call: LayerCall, wants_c: bool, wants_gates: bool) -> Steps:
    """Runs one layer by the kernels. Differentiable if a gradient is recorded.

    Args:
        call: the layer.
        wants_c, wants_gates: which values of each step to return.
    """
    spec = call.spec
    wants_c = wants_c and spec.has_cell_state
    if not wants_c and not (wants_gates and spec.name in GATES):  # y has all that is wanted
        results = kernel_layer(call)
        return Steps(results, None, gates_of_output(call, results[0]) if wants_gates else None)
    x, h0, c0, (weights, slots) = call.x, call.h0, call.c0, call.weights
    if are_transforms_active():
        apply: Any = StatesFunction.apply
        y, h_n, c_n, c_steps, saved = apply(spec, slots, call.sequence, x, h0, c0, *weights)
    else:
        is_captured = torch.compiler.is_compiling() or is_capturing()
        run = states_op if is_captured else interruptible_states
        y, h_n, c_n, c_steps, saved = run(
            x, h0, c0, weights, slots | call.sequence.slots, call.sequence.flat, spec.name
        )
        if x.is_cpu and y.requires_grad and not is_captured:
            y = lazy_clone(y)  # backward reads y, and the caller may change it in place
    gates = None
    if wants_gates:
        values = saved.detach().unflatten(2, (spec.saved, -1)).unbind(2)
        gates = {
            name: value.transpose(0, 1)
            for name, value in zip(GATES[spec.name].names, values, strict=False)
        }
    c = c_steps.transpose(0, 1) if wants_c else None
    return Steps(decode_layer(call, y, h_n, c_n), c, gates)


def composite_steps(call: LayerCall, wants_c: bool, wants_gates: bool) -> Steps:
    """Does the same as `kernel_steps` by differentiable operations."""
    c = None
    if wants_c and call.spec.has_cell_state:
        y, h_n, c_n, c_steps = composite_states(call)
        c = None if c_steps is None else c_steps.transpose(0, 1)
    else:
        y, h_n, c_n = composite_layer(call)
    gates = None
    if wants_gates:
        is_named = call.spec.name in GATES
        gates = gates_by_torch(call, y) if is_named else gates_of_output(call, y)
    return Steps((y, h_n, c_n), c, gates)


def gate_names(spec: CellSpec) -> tuple[str, ...]:
    """Returns the names of a cell's gates. The only activation of an Elman network is h."""
    return GATES[spec.name].names if spec.name in GATES else ("h",)


def output_rows(call: LayerCall, y: Tensor) -> Tensor:
    """Returns y as [N,D,R]."""
    rows = y if y.dim() == 2 else y.flatten(0, 1)
    split: Tensor = rows.unflatten(1, (call.h0.shape[0], call.h0.shape[2]))
    return split


def gates_of_output(call: LayerCall, y: Tensor) -> dict[str, Tensor]:
    """Returns the only activation of an Elman network: its output."""
    return {"h": output_rows(call, y).detach()}


def gates_by_torch(
    call: LayerCall, y: Tensor, before: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Computes the activations from the input and the states before each step.

    Args:
        call: the layer.
        y: its output.
        before: for each direction the state before each row [N,R]; None for that of the sequence.
    """
    if autocast.acts_on(y):
        with torch.autocast(y.device.type, enabled=False):
            return gates_by_torch(call, y, before)
    function = GATES[call.spec.name].function
    x = call.x if call.x.dim() == 2 else call.x.flatten(0, 1)
    rows = output_rows(call, y)
    found = []
    for direction, w in enumerate(call.weights.directions()):
        if before is not None:
            h = before[direction]
        else:
            h = previous_states(
                rows[:, direction], call.h0[direction], call.sequence, direction == 1
            )
        assert w.w_hh is not None
        found.append(function(linear(x, w.w_ih, w.b_ih), linear(h, w.w_hh, w.b_hh)))
    return {
        name: torch.stack([own[index] for own in found], 1).detach()
        for index, name in enumerate(GATES[call.spec.name].names)
    }


def _states_autograd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> _Tensors:
    """Runs ``recurrent_states`` under autograd: the code of the dispatch key "Autograd"."""
    spec = CELLS.get(cell)  # the kernel raises for an unknown cell
    if spec is not None:
        call = call_of(spec, x, h0, c0, weights, slots, sequence)
        if records_gradient(call):
            apply: Any = StatesFunction.apply
            own: _Tensors = apply(spec, call.weights.slots, call.sequence, x, h0, c0, *weights)
            return own
    with AutoDispatchBelowAutograd():
        results: _Tensors = states_op(x, h0, c0, weights, slots, sequence, cell)
    return results


def _states_autocast(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> _Tensors:
    """Runs ``recurrent_states`` under autocast, with the types of `fastrnn.autocast`."""
    spec = CELLS.get(cell)  # the kernel raises for an unknown cell
    is_cast = autocast.acts_on(x)  # False if autocast is enabled only on the weights' device
    with ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
        if spec is None or not is_cast:
            return states_op(x, h0, c0, weights, slots, sequence, cell)  # type: ignore[no-any-return]
        call = call_of(spec, x, h0, c0, weights, slots, sequence)
        cast = autocast.cast_call(call)
        y, h_n, c_n, c_steps, saved = states_op(
            cast.x, cast.h0, cast.c0, cast.weights.flat, slots, sequence, cell
        )
        y, h_n, c_cast = autocast.cast_results(call, decode_layer(call, y, h_n, c_n))
        if c_cast is None:
            return y, h_n, c_n, c_steps, saved
        return y, h_n, c_cast, c_steps.to(c_cast.dtype), saved


implementations.impl("recurrent_states", _states_autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    implementations.impl("recurrent_states", _states_autocast, _key)
