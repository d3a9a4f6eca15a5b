"""The recurrences in plain torch operations, one step at a time, as in a textbook.

In float64 this code is the oracle that every kernel is tested against. Its operations are
differentiable and never write in place. `fastrnn.ops.composite` therefore uses it for calls that
the kernels do not support: double backward, forward-mode differentiation, ``torch.func``, complex
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid, relu6

from fastrnn.layer_call import CellOptions, LayerCall, Results

# gates_x [B,G*H], gates_h [B,G*H] (None without a recurrent product), h [B,R], c [B,C*H] or None,
# w_unit [E*H] or None -> h' before projection, c' or None
Step = Callable[[Tensor, Any, Tensor, Any, Any], "tuple[Tensor, Tensor | None]"]
# the activation of the gates
Gate = Callable[[Tensor], Tensor]


def rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    """Elman's network: h' = f(W_x x + b_x + W_h h + b_h)."""

    def step(
        gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, w_unit: None
    ) -> tuple[Tensor, None]:
        return activation(gates_x + gates_h), None

    return step


def lstm_gates(gates_x: Tensor, gates_h: Tensor, gate: Gate = torch.sigmoid) -> tuple[Tensor, ...]:
    """Returns the activations i, f, g, o of an LSTM."""
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    return gate(i), gate(f), torch.tanh(g), gate(o)


def lstm_step(
    gates_x: Tensor,
    gates_h: Tensor,
    h: Tensor,
    c: Tensor,
    w_unit: None,
    gate: Gate = torch.sigmoid,
    cell_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Long short-term memory: c' = f*c + i*g, h' = o*tanh(c')."""
    i, f, g, o = lstm_gates(gates_x, gates_h, gate)
    c = f * c + i * g
    if cell_clip is not None:
        c = c.clamp(-cell_clip, cell_clip)
    return o * torch.tanh(c), c


def gru_gates(gates_x: Tensor, gates_h: Tensor, gate: Gate = torch.sigmoid) -> tuple[Tensor, ...]:
    """Returns the activations r, z, n of a GRU."""
    xr, xz, xn = gates_x.chunk(3, dim=-1)
    hr, hz, hn = gates_h.chunk(3, dim=-1)
    r, z = gate(xr + hr), gate(xz + hz)
    return r, z, torch.tanh(xn + r * hn)


def gru_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, w_unit: None
) -> tuple[Tensor, None]:
    """Gated recurrent unit: n = tanh(xn + r*hn), h' = (1-z)*n + z*h."""
    _, z, n = gru_gates(gates_x, gates_h)
    return (1 - z) * n + z * h, None


def indrnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    """Independently recurrent network: h' = f(W_x x + b_x + u*h)."""

    def step(
        gates_x: Tensor, gates_h: None, h: Tensor, c: None, w_unit: Tensor
    ) -> tuple[Tensor, None]:
        return activation(gates_x + w_unit * h), None

    return step


def ligru_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, w_unit: None
) -> tuple[Tensor, None]:
    """Light GRU: h' = z*h + (1-z)*relu(a)."""
    a, z = (gates_x + gates_h).chunk(2, dim=-1)
    z = torch.sigmoid(z)
    return z * h + (1 - z) * torch.relu(a), None


def janet_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, w_unit: Tensor
) -> tuple[Tensor, None]:
    """JANET: h' = sigmoid(s)*h + (1-sigmoid(s-beta))*g; 1-sigmoid(s-beta) = sigmoid(beta-s)."""
    s, g = (gates_x + gates_h).chunk(2, dim=-1)
    return torch.sigmoid(s) * h + torch.sigmoid(w_unit - s) * torch.tanh(g), None


def fastgrnn_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, w_unit: Tensor
) -> tuple[Tensor, None]:
    """FastGRNN: h' = (zeta*(1-z)+nu)*tanh(a) + z*h, with z = sigmoid(a+b)."""
    a = gates_x + gates_h
    b, zeta, nu = w_unit.chunk(3)
    z = torch.sigmoid(a + b)
    return (zeta * (1 - z) + nu) * torch.tanh(a) + z * h, None


def peephole_lstm_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor, w_unit: Tensor
) -> tuple[Tensor, Tensor]:
    """LSTM whose gates i and f also see c, and o sees c'."""
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    p_i, p_f, p_o = w_unit.chunk(3)
    i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


def slstm_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor, w_unit: None
) -> tuple[Tensor, Tensor]:
    """sLSTM: c' = f*c + i*z, n' = f*n + i, h' = o*c'/n', with exponential i, scaled by e^-m'."""
    i, f, z, o = (gates_x + gates_h).chunk(4, dim=-1)
    c, n, m = c.chunk(3, dim=-1)
    log_f = logsigmoid(f) + m
    m = torch.maximum(log_f, i)
    i, f = torch.exp(i - m), torch.exp(log_f - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, torch.cat([c, n, m], dim=-1)


STEPS: dict[str, Step] = {
    "rnn_tanh": rnn_step(torch.tanh),
    "rnn_relu": rnn_step(torch.relu),
    "rnn_sigmoid": rnn_step(torch.sigmoid),
    "lstm": lstm_step,
    "gru": gru_step,
    "indrnn": indrnn_step(torch.relu),
    "peephole_lstm": peephole_lstm_step,
    "slstm": slstm_step,
    "indrnn_tanh": indrnn_step(torch.tanh),
    "ligru": ligru_step,
    "janet": janet_step,
    "fastgrnn": fastgrnn_step,
}


def hard_sigmoid(x: Tensor) -> Tensor:
    """Returns the same as torch's ``hardsigmoid``, which has no second derivatives."""
    return relu6(x + 3) / 6


def _hard_gru_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, w_unit: None
) -> tuple[Tensor, None]:
    _, z, n = gru_gates(gates_x, gates_h, hard_sigmoid)
    return (1 - z) * n + z * h, None


#: the cells of csrc/cells/loop_cells.h with one product and without a cell state
LOOP_STEPS: dict[str, Step] = {"gru_hard_sigmoid": _hard_gru_step}

#: the activation of the gates of each LSTM
LSTM_GATES: dict[str, Gate] = {"lstm": torch.sigmoid, "lstm_hard_sigmoid": hard_sigmoid}


class TwoProducts(NamedTuple):
    """A cell with two products per step: the second one multiplies h times the first gate.

    Attributes:
        gate: the activation of the first gates.
        output: the first gates, the candidate n, h -> h'.
    """

    gate: Gate
    output: Callable[[tuple[Tensor, ...], Tensor, Tensor], Tensor]


def _interpolate(gates: tuple[Tensor, ...], n: Tensor, h: Tensor) -> Tensor:
    """Returns h' of a GRU from the gates r, z."""
    _, z = gates
    return (1 - z) * n + z * h


def _update_minimally(gates: tuple[Tensor, ...], n: Tensor, h: Tensor) -> Tensor:
    """Returns h' of a minimal gated unit from its gate f."""
    (f,) = gates
    return (1 - f) * h + f * n


#: the cells of csrc/cells/two_products.h; the last gate is the candidate
TWO_PRODUCTS: dict[str, TwoProducts] = {
    "gru_reset_before": TwoProducts(torch.sigmoid, _interpolate),
    "gru_reset_before_hard_sigmoid": TwoProducts(hard_sigmoid, _interpolate),
    "mgu": TwoProducts(torch.sigmoid, _update_minimally),
}


class NamedGates(NamedTuple):
    """The gates of a cell.

    Attributes:
        names: in the order in which the kernels save their activations, before all else.
        function: gates_x [*,G*H], gates_h [*,G*H] -> the activation [*,H] of each.
    """

    names: tuple[str, ...]
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]


#: the gates of each cell that has more than its output
GATES: dict[str, NamedGates] = {
    "lstm": NamedGates(("i", "f", "g", "o"), lstm_gates),
    "gru": NamedGates(("r", "z", "n"), gru_gates),
}


class Parts(NamedTuple):
    """The parts of a time loop, by slot in the order of csrc/torch/slots.h.

    ``w_hh`` [G*H,H], ``b_hh`` and ``gain_h`` [G*H], ``gain_c`` and ``bias_c`` [H], ``mask_h``
    [B,H]; ``zone_h`` and ``zone_c`` [N,H], or [1,H] for all rows; ``b_x`` [G*H]; ``clip_c`` [1].
    None if they are absent.
    """

    w_hh: Tensor
    b_hh: Tensor | None = None
    gain_h: Tensor | None = None
    gain_c: Tensor | None = None
    bias_c: Tensor | None = None
    mask_h: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    b_x: Tensor | None = None
    clip_c: Tensor | None = None

    def of_rows(self, begin: int | None, end: int | None) -> Parts:
        """Returns what a product with these rows of ``w_hh`` needs."""
        rows = slice(begin, end)
        b_hh = None if self.b_hh is None else self.b_hh[rows]
        gain_h = None if self.gain_h is None else self.gain_h[rows]
        return self._replace(w_hh=self.w_hh[rows], b_hh=b_hh, gain_h=gain_h)


def _hidden_side(h: Tensor, parts: Parts, epsilon: float) -> Tensor:
    """Returns W_hh h with its mask, layer normalisation and bias."""
    operand = h if parts.mask_h is None else h * parts.mask_h[: h.shape[0]]
    if parts.gain_h is None:
        return linear(operand, parts.w_hh, parts.b_hh)
    product = linear(operand, parts.w_hh)
    return layer_norm(product, product.shape[-1:], parts.gain_h, parts.b_hh, epsilon)


def _step_with_two_products(
    cell: TwoProducts, gates_x: Tensor, h: Tensor, parts: Parts, epsilon: float
) -> Tensor:
    first = parts.w_hh.shape[0] - h.shape[-1]
    pre = gates_x[..., :first] + _hidden_side(h, parts.of_rows(None, first), epsilon)
    gates = cell.gate(pre).chunk(first // h.shape[-1], dim=-1)
    second = _hidden_side(gates[0] * h, parts.of_rows(first, None), epsilon)
    return cell.output(gates, torch.tanh(gates_x[..., first:] + second), h)


def _step_with_parts(
    cell: str, gates_x: Tensor, h: Tensor, c: Tensor | None, parts: Parts, epsilon: float
) -> tuple[Tensor, Tensor | None]:
    """Runs a step before zoneout, with layer normalisation of W_hh h and of c'."""
    if cell in TWO_PRODUCTS:
        return _step_with_two_products(TWO_PRODUCTS[cell], gates_x, h, parts, epsilon), None
    gates_h = _hidden_side(h, parts, epsilon)
    if cell not in LSTM_GATES or c is None:
        step = LOOP_STEPS.get(cell) or STEPS[cell]
        return step(gates_x, gates_h, h, c, None)
    i, f, g, o = lstm_gates(gates_x, gates_h, LSTM_GATES[cell])
    c = f * c + i * g
    if parts.clip_c is not None:
        c = torch.clamp(c, -parts.clip_c, parts.clip_c)
    normal = c
    if parts.gain_c is not None:
        normal = layer_norm(c, c.shape[-1:], parts.gain_c, parts.bias_c, epsilon)
    return o * torch.tanh(normal), c


def reference_recurrence(
    cell: str,
    pre_x: Tensor,
    h: Tensor,
    c: Tensor | None,
    parts: Parts,
    batch_sizes: Tensor | None,
    reverse: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs the time loop of one direction with parts (csrc/problem/recurrence.h).

    Args:
        cell: its name.
        pre_x: [T,B,G*H] or packed [N,G*H], the input side of the pre-activations without ``b_x``.
        h: [B,H], the initial state.
        c: [B,H] or None.
        parts: the parts.
        batch_sizes: [T] of packed rows.
        reverse: whether the time loop runs from the last step to the first.
        epsilon: of layer normalisation.

    Returns:
        y [T,B,H] or [N,H]; h_n [B,H]; c_n [B,H] or None.
    """
    batch = h.shape[0]
    if parts.b_x is not None:
        pre_x = pre_x + parts.b_x
    if batch_sizes is None:
        sizes = [batch] * pre_x.shape[0]
        steps_x = pre_x.unbind(0)
    else:
        sizes = batch_sizes.tolist()
        steps_x = torch.split(pre_x, sizes)

    def of_steps(zone: Tensor | None) -> Any:
        if zone is None or zone.shape[0] == 1:
            return [zone] * len(sizes)
        return torch.split(zone, sizes)

    zones_h, zones_c = of_steps(parts.zone_h), of_steps(parts.zone_c)
    outputs: list[Tensor] = []
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        active = sizes[t]
        h_before = h[:active]
        c_before = None if c is None else c[:active]
        h_next, c_next = _step_with_parts(cell, steps_x[t], h_before, c_before, parts, epsilon)
        if zones_h[t] is not None:
            h_next = zones_h[t] * h_before + (1 - zones_h[t]) * h_next
        if zones_c[t] is not None and c_next is not None:
            c_next = zones_c[t] * c_before + (1 - zones_c[t]) * c_next
        outputs.append(h_next)
        h = torch.cat([h_next, h[active:]]) if active < batch else h_next
        if c is not None and c_next is not None:
            c = torch.cat([c_next, c[active:]]) if active < batch else c_next
    if reverse:
        outputs.reverse()
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), h, c


#: y, h_n and c_n of a layer, then [D,N,C*H] or None: the cell states after each step
StateResults = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


def reference_layer(call: LayerCall) -> Results:
    """Runs one layer in one or two directions; direction 1 runs backwards in time.

    Returns:
        y [T,B,D*R] or [N,D*R]; h_n [D,B,R]; c_n [D,B,C*H] or None.
    """
    y, h_n, c_n, _ = _run_layer(call, False)
    return y, h_n, c_n


def reference_states(call: LayerCall) -> StateResults:
    """Does the same as `reference_layer`, and returns the cell states after each step."""
    return _run_layer(call, True)


def _run_layer(call: LayerCall, keeps_c: bool) -> StateResults:
    x, batch_sizes, h0, c0 = call.x, call.batch_sizes, call.h0, call.c0
    batch = h0.shape[1]
    options = call.options.cell or CellOptions()
    cell = call.spec.name
    # of the cells with options, an LSTM with a projection alone comes here
    lstm: Any = partial(
        lstm_step, gate=LSTM_GATES.get(cell, torch.sigmoid), cell_clip=options.cell_clip
    )
    step: Step = STEPS[cell] if call.has_plain_cell else lstm
    proj_clip = options.proj_clip
    sizes = [batch] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    outputs, h_n, c_n, c_all = [], [], [], []
    for direction, w in enumerate(call.weights.directions()):
        gates_x = linear(x, w.w_ih, w.b_ih)
        step_gates_x = gates_x.unbind(0) if batch_sizes is None else torch.split(gates_x, sizes)
        h = h0[direction]
        c = None if c0 is None else c0[direction]
        h_steps, c_steps = [], []
        steps = range(len(sizes))
        for t in steps if direction == 0 else reversed(steps):
            active = sizes[t]
            h_active = h[:active]
            c_active = None if c is None else c[:active]
            gates_h = None if w.w_hh is None else linear(h_active, w.w_hh, w.b_hh)
            h_next, c_next = step(step_gates_x[t], gates_h, h_active, c_active, w.w_unit)
            if w.w_hr is not None:
                h_next = linear(h_next, w.w_hr)
                if proj_clip is not None:
                    h_next = h_next.clamp(-proj_clip, proj_clip)
            h_steps.append(h_next)
            if keeps_c and c_next is not None:
                c_steps.append(c_next)
            # Rows that are not active keep their state: their sequence has ended or, backwards, has
            # not begun.
            h = torch.cat([h_next, h[active:]]) if active < batch else h_next
            if c is not None and c_next is not None:
                c = torch.cat([c_next, c[active:]]) if active < batch else c_next
        if direction == 1:
            h_steps.reverse()
            c_steps.reverse()
        outputs.append(torch.stack(h_steps) if batch_sizes is None else torch.cat(h_steps))
        h_n.append(h)
        if c is not None:
            c_n.append(c)
        if c_steps:
            c_all.append(torch.cat(c_steps))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    c = torch.stack(c_n) if c_n else None
    return y, torch.stack(h_n), c, torch.stack(c_all) if c_all else None


def reference_step(call: LayerCall) -> Results:
    """Runs one step of one direction, from x [B,I], h0 [B,R] and c0 [B,C*H] or None.

    Returns:
        h' [B,R] as the output, h' again as the state, and c' [B,C*H] or None.
    """
    _, h_n, c_n = reference_layer(
        call._replace(
            x=call.x.unsqueeze(0),
            h0=call.h0.unsqueeze(0),
            c0=None if call.c0 is None else call.c0.unsqueeze(0),
        )
    )
    h = h_n.squeeze(0)
    return h, h, None if c_n is None else c_n.squeeze(0)
