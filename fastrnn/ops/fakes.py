"""The operators on fake and meta tensors: their checks, and the shapes of their results."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.layer_call import SequenceMembers
from fastrnn.ops.operators import DTYPES, HALF, accumulate_dtype
from fastrnn.ops.sequence import check_sequence, is_packed
from fastrnn.spec import (
    BIASES,
    CELLS,
    FIRST_SEQUENCE_SLOT,
    FORWARD_OUTPUTS,
    GRADIENT_OUTPUTS,
    MATRICES,
    PROJECTION,
    UNIT,
    WEIGHT_SLOTS,
    Weights,
    present,
)

_KNOWN_SLOTS = (1 << WEIGHT_SLOTS.index("gain_ih")) - 1
_KNOWN_SLOTS |= ((1 << len(SequenceMembers._fields)) - 1) << FIRST_SEQUENCE_SLOT
_SAVED = 1 << FORWARD_OUTPUTS.index("saved")
_FIRST_WEIGHT = GRADIENT_OUTPUTS.index("d_w_ih")
_PER_DIRECTION = len(GRADIENT_OUTPUTS) - _FIRST_WEIGHT


def _expect(condition: Any, message: str) -> None:
    """Raises unless a condition holds. A symbolic size is checked when the graph runs."""
    torch._check(condition, lambda: f"fastrnn: {message}.")


def _expect_sizes(name: str, t: Tensor, sizes: Sequence[int]) -> None:
    def message() -> str:
        return f"fastrnn: {name} must have the shape {list(sizes)}, got {list(t.shape)}."

    torch._check(t.dim() == len(sizes), message)
    for size, expected in zip(t.shape, sizes, strict=True):
        torch._check(size == expected, message)


class _FakeArguments:
    """The sizes of a traced layer, with the same checks as in csrc/torch/arguments.cpp."""

    def __init__(
        self,
        name: str,
        data: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        slots: int,
        sequence: Sequence[Tensor] | None,
        cell: str,
    ) -> None:
        _expect(cell in CELLS, f"cell must be one of {', '.join(CELLS)}, got '{cell}'")
        self.spec = spec = CELLS[cell]
        self.data = data
        self.accumulate = accumulate_dtype(data.dtype)
        _expect(
            data.dtype in DTYPES,
            f"{name} must be float16, bfloat16, float32 or float64, got {data.dtype}",
        )
        packed = is_packed(slots)
        single = not packed and h0.dim() == 2
        _expect(single or h0.dim() == 3, f"h0 must be [D, B, R], got {h0.dim()} dimensions")
        dims = 2 if packed or single else 3
        _expect(data.dim() == dims, f"{name} must have {dims} dimensions, got {data.dim()}")
        self.directions = 1 if single else h0.shape[0]
        _expect(self.directions in (1, 2), f"h0 must have 1 or 2 directions, got {self.directions}")
        *_, batch, size = h0.shape
        _expect(
            slots & ~_KNOWN_SLOTS == 0 and slots & MATRICES == spec.slots(False) & MATRICES,
            f"slots must hold w_ih{' and w_hh' if spec.dense else ' without w_hh'} and no bit of "
            f"an unknown slot, got {slots}",
        )
        biases = spec.slots(True) & BIASES
        _expect(slots & BIASES in (0, biases), f"slots must hold both biases or none, got {slots}")
        _expect(
            (slots & UNIT != 0) == (spec.parameters > 0),
            f"slots must {'' if spec.parameters else 'not '}hold w_unit for {cell}, got {slots}",
        )
        names = [WEIGHT_SLOTS[slot] for slot in present(slots)]
        _expect(
            len(names) * self.directions == len(weights),
            f"weights must hold {len(names)} tensors per direction ({', '.join(names)}), got "
            f"{len(weights)} for {self.directions} direction(s)",
        )
        self.is_projected = slots & PROJECTION != 0
        _expect(
            spec.projects or not self.is_projected,
            f"weights must hold a projection for lstm only, got one for {cell}",
        )
        for w in weights:
            self.expect_like("weights", w)
        self.expect_like("h0", h0)
        _expect(weights[0].dim() == 2, f"w_ih must be 2-D, got {weights[0].dim()} dimension(s)")
        self.input_size, self.hidden = weights[0].shape[1], weights[0].shape[0] // spec.gates
        self.size = size
        if self.is_projected:
            _expect(size > 0, "h0 must have a size of 1 or more with a projection, got 0")
        else:
            _expect_sizes("h0", h0, (*h0.shape[:-1], self.hidden))
        _expect(
            (c0 is not None) == spec.has_cell_state,
            f"c0 must {'' if spec.has_cell_state else 'not '}be given for {cell}",
        )
        self.states = tuple(h0.shape[:-1])
        if c0 is not None:
            self.expect_like("c0", c0)
            _expect_sizes("c0", c0, (*self.states, spec.cell_states * self.hidden))
        rows = spec.gates * self.hidden
        for own in Weights(weights, slots).directions():
            _expect_sizes("w_ih", own.w_ih, (rows, self.input_size))
            for name, sizes in (
                ("w_hh", (rows, size)),
                ("b_ih", (rows,)),
                ("b_hh", (rows,)),
                ("w_hr", (size, self.hidden)),
                ("w_unit", (spec.parameters * self.hidden,)),
            ):
                weight = getattr(own, name)
                if weight is not None:
                    _expect_sizes(name, weight, sizes)
        check_sequence(name, data, batch, sequence, slots)
        self.rows = tuple(data.shape[:-1])
        self.outputs = (*self.rows, self.directions * size)

    def expect_like(self, name: str, t: Tensor) -> None:
        _expect(
            t.device == self.data.device,
            f"{name} must be on the device of the input, got another",
        )
        _expect(
            t.dtype == self.data.dtype,
            f"{name} must have the dtype {self.data.dtype} of the input, got {t.dtype}",
        )

    def expect_input(self, x: Tensor) -> None:
        _expect(
            x.shape[-1] == self.input_size,
            f"x must have the input size {self.input_size} of w_ih, got {x.shape[-1]}",
        )

    def saved_sizes(self, rows: Sequence[int]) -> tuple[int, int, int]:
        return self.directions, math.prod(rows), self.spec.saved * self.hidden

    def step_sizes(self) -> tuple[int, int, int]:
        """Returns the sizes of c_steps."""
        return self.directions, math.prod(self.rows), self.spec.cell_states * self.hidden

    def expect_backward(
        self,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        c0: Tensor | None,
        y: Tensor,
        saved: Tensor,
        d_c_steps: Tensor | None = None,
    ) -> None:
        self.expect_like("y", y)
        _expect_sizes("y", y, self.outputs)
        if self.spec.saved > 0:
            _expect_sizes("saved", saved, self.saved_sizes(self.rows))
            _expect(
                saved.dtype == self.accumulate and saved.device == self.data.device,
                "saved must be the result of recurrent_forward, got another tensor",
            )
        _expect(
            d_c_n is None or c0 is not None,
            f"d_c_n must not be given for {self.spec.name}, got a tensor",
        )
        _expect(
            d_c_steps is None or c0 is not None,
            f"d_c_steps must not be given for {self.spec.name}, got a tensor",
        )
        for name, t, sizes in (
            ("d_y", d_y, self.outputs),
            ("d_h_n", d_h_n, (*self.states, self.size)),
            ("d_c_n", d_c_n, (*self.states, self.spec.cell_states * self.hidden)),
            ("d_c_steps", d_c_steps, self.step_sizes()),
        ):
            if t is not None:
                self.expect_like(name, t)
                _expect_sizes(name, t, sizes)


def _forward_fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
    outputs: int,
    weight_format: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = _FakeArguments("x", x, h0, c0, weights, slots, sequence, cell)
    layer.expect_input(x)
    _expect(
        x.device.type != "cuda" or weight_format == 0,
        "weight_format is for the CPU, got tensors on a CUDA device",
    )
    y = x.new_empty(layer.outputs)
    h_n = x.new_empty(h0.shape)
    c_n = x.new_empty(0 if c0 is None else c0.shape)
    is_saved = outputs & _SAVED and layer.spec.saved > 0
    saved = x.new_empty(layer.saved_sizes(layer.rows) if is_saved else 0, dtype=layer.accumulate)
    return y, h_n, c_n, saved


def _backward_results(
    layer: _FakeArguments, h0: Tensor, c0: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(layer.rows)
    dtype = y.dtype if y.device.type == "cuda" else layer.accumulate
    width = layer.spec.gradient_columns * layer.hidden
    d_pre = y.new_empty(layer.directions, rows, width, dtype=dtype)
    d_h_all = y.new_empty(
        (layer.directions, rows, layer.size) if layer.is_projected else (0,), dtype=dtype
    )
    d_h0 = y.new_empty(h0.shape)
    d_c0 = y.new_empty(0 if c0 is None else c0.shape)
    return d_pre, d_h_all, d_h0, d_c0


def _backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    y: Tensor,
    saved: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = _FakeArguments("y", y, h0, c0, weights, slots, sequence, cell)
    layer.expect_backward(d_y, d_h_n, d_c_n, c0, y, saved)
    return _backward_results(layer, h0, c0, y)


def _states_backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_c_steps: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    y: Tensor,
    saved: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = _FakeArguments("y", y, h0, c0, weights, slots, sequence, cell)
    layer.expect_backward(d_y, d_h_n, d_c_n, c0, y, saved, d_c_steps)
    return _backward_results(layer, h0, c0, y)


def _gradients_fake(
    directions: int,
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    y: Tensor,
    saved: Tensor,
    cell: str,
    outputs: int,
) -> tuple[Tensor, ...]:
    layer = _FakeArguments("x", x, h0, c0, weights, slots, sequence, cell)
    _expect(
        layer.directions == directions,
        f"h0 must hold the states of {directions} direction(s), got {layer.directions}",
    )
    _expect(layer.spec.parameters == 0, f"cell must be one without w_unit, got '{cell}'")
    layer.expect_input(x)
    layer.expect_backward(d_y, d_h_n, d_c_n, c0, y, saved)
    _, d_h_all, d_h0, d_c0 = _backward_results(layer, h0, c0, y)
    d_weights = []
    for direction, own in enumerate(Weights(weights, slots).directions()):
        first = _FIRST_WEIGHT + direction * _PER_DIRECTION
        for slot, weight in enumerate(own[:_PER_DIRECTION]):
            shape = () if weight is None else weight.shape
            is_needed = weight is not None and outputs >> (first + slot) & 1
            d_weights.append(x.new_empty(shape if is_needed else 0))
    return x.new_empty(x.shape if outputs & 1 else 0), d_h0, d_c0, d_h_all, *d_weights


def _stack_fake(
    x: Tensor,
    h0: list[Tensor],
    c0: list[Tensor],
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = len(h0)
    _expect(layers > 0, "h0 must hold a tensor for each layer, got none")
    _expect(
        len(c0) in (0, layers),
        f"c0 must hold as many tensors as h0, {layers}, or none, got {len(c0)}",
    )
    _expect(
        len(weights) % layers == 0,
        f"weights must hold as many tensors for each of the {layers} layers, got {len(weights)}",
    )
    _expect(x.dtype not in HALF, f"x must be float32 or float64, got {x.dtype}")
    each = len(weights) // layers
    y, h_n, c_n = x, [], []
    for i in range(layers):
        own = weights[i * each : (i + 1) * each]
        _expect(
            h0[i].dim() == 2 or h0[i].shape[0] == 1, "h0 must hold states of one direction, got 2"
        )
        c = c0[i] if c0 else None
        y, h, c_next, _ = _forward_fake(y, h0[i], c, own, slots, sequence, cell, 0)
        h_n.append(h)
        if c0:
            c_n.append(c_next)
    return y, h_n, c_n


def _layer_fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h_n, c_n, _ = _forward_fake(x, h0, c0, weights, slots, sequence, cell, 0)
    return y, h_n, c_n


def _states_fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    sequence: list[Tensor] | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, h_n, c_n, saved = _forward_fake(x, h0, c0, weights, slots, sequence, cell, _SAVED)
    layer = _FakeArguments("x", x, h0, c0, weights, slots, sequence, cell)
    return y, h_n, c_n, x.new_empty(0 if c0 is None else layer.step_sizes()), saved


def expect_ragged(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    slots: int,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    cell: str,
) -> None:
    """Checks a layer with marks as csrc/torch/ops_ragged.cpp, but not the values of the marks."""
    _expect(h0.dim() == 3, f"h0 must be [D, B, R], got {h0.dim()} dimensions")
    _FakeArguments("x", x, h0, c0, weights, slots, None, cell).expect_input(x)
    steps, batch, _ = x.shape
    for name, t, sizes, dtypes in (
        ("lengths", lengths, (batch,), (torch.int64,)),
        ("resets", resets, (steps, batch), (torch.bool, torch.float64)),
    ):
        if t is not None:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            is_near = t.device.type == "cpu" or (x.device.type == "cuda" and t.device == x.device)
            place = "on the CPU" + " or the device of the input" * (x.device.type == "cuda")
            _expect(
                is_near and t.dtype in dtypes,
                f"{name} must be {len(sizes)}-D {kinds} {place}, got another tensor",
            )
            _expect_sizes(name, t, sizes)
    _expect(reset_c is None or c0 is not None, "reset_c must not be given without c0, got a tensor")
    for name, t, like in (("reset_h", reset_h, h0), ("reset_c", reset_c, c0)):
        if t is not None and like is not None:
            _expect(t.dtype == x.dtype, f"{name} must have the dtype {x.dtype} of the input")
            _expect_sizes(name, t, (*([steps] if t.dim() == 4 else []), *like.shape))


def _ragged_forward_fake(
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
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expect_ragged(x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell)
    return _forward_fake(x, h0, c0, weights, slots, None, cell, outputs)


def _ragged_layer_fake(*args: Any) -> tuple[Tensor, ...]:
    outputs = 0
    return _ragged_forward_fake(*(*args, outputs))[:3]


def _ragged_gradients_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    y: Tensor,
    saved: Tensor,
    cell: str,
    outputs: int,
) -> tuple[Tensor, ...]:
    expect_ragged(x, h0, c0, weights, slots, lengths, resets, reset_h, reset_c, cell)
    found = _gradients_fake(
        h0.shape[0],
        *(d_y, d_h_n, d_c_n, x, h0, c0, weights, slots, None, y, saved, cell, outputs),
    )
    first = _FIRST_WEIGHT + 2 * _PER_DIRECTION
    d_resets = [
        x.new_empty(t.shape if t is not None and outputs >> (first + index) & 1 else 0)
        for index, t in enumerate((reset_h, reset_c))
    ]
    return *found, *(x.new_empty(0) for _ in range(first - len(found))), *d_resets


torch.library.register_fake("fastrnn::ragged_forward", _ragged_forward_fake)
torch.library.register_fake("fastrnn::ragged_layer", _ragged_layer_fake)
torch.library.register_fake("fastrnn::ragged_gradients", _ragged_gradients_fake)
torch.library.register_fake("fastrnn::recurrent_forward", _forward_fake)
torch.library.register_fake("fastrnn::recurrent_states", _states_fake)
torch.library.register_fake("fastrnn::recurrent_states_backward", _states_backward_fake)
torch.library.register_fake("fastrnn::recurrent_layer", _layer_fake)
torch.library.register_fake("fastrnn::recurrent_stack", _stack_fake)
torch.library.register_fake("fastrnn::recurrent_backward", _backward_fake)
torch.library.register_fake("fastrnn::recurrent_gradients", functools.partial(_gradients_fake, 1))
torch.library.register_fake(
    "fastrnn::recurrent_bidirectional_gradients", functools.partial(_gradients_fake, 2)
)
