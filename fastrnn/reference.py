"""The recurrences in plain torch operations, one step at a time, as a textbook writes them.

This text has two uses. In float64 it is the oracle that every kernel is tested against. And since
it is made of ordinary differentiable operations without any in-place write, it serves where the
kernels do not: double backward, forward-mode differentiation, ``torch.func``, complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropout_function
from torch.nn.functional import linear

from fastrnn.spec import CellSpec, split_weights
from fastrnn.tracing import size

# (gates_x [B,G*H], gates_h [B,G*H], h [B,R], c [B,H] or None) -> (h' before projection, c' or None)
Step = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]

# (x, h0, c0, weights, batch_sizes, spec) -> (y, h_n, c_n): one layer, see `layer`
Layer = Callable[
    [Tensor, Tensor, "Tensor | None", Sequence[Tensor], "Tensor | None", CellSpec],
    "tuple[Tensor, Tensor, Tensor | None]",
]


def rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    """Elman's network: h' = f(W_x x + b_x + W_h h + b_h)."""

    def step(
        gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return activation(gates_x + gates_h), None

    return step


def lstm_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Long short-term memory: c' = f*c + i*g, h' = o*tanh(c')."""
    assert c is not None
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), c


def gru_step(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gated recurrent unit: n = tanh(xn + r*hn), h' = (1-z)*n + z*h."""
    xr, xz, xn = gates_x.chunk(3, dim=-1)
    hr, hz, hn = gates_h.chunk(3, dim=-1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return (1 - z) * n + z * h, None


STEPS: dict[str, Step] = {
    "rnn_tanh": rnn_step(torch.tanh),
    "rnn_relu": rnn_step(torch.relu),
    "rnn_sigmoid": rnn_step(torch.sigmoid),
    "lstm": lstm_step,
    "gru": gru_step,
}


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one layer in one or two directions; direction 1 walks backwards in time.

    Args:
        x: [T,B,I], or packed rows [N,I] together with ``batch_sizes``.
        h0: [D,B,R] initial hidden state, R = P with a projection and H without.
        c0: [D,B,H] initial cell state of an LSTM, else None.
        weights: for each direction w_ih, w_hh, [b_ih, b_hh], [w_hr].
        batch_sizes: [T] rows that are active at each step, descending; None when all are.
        spec: the cell.

    Returns:
        y [T,B,D*R] or [N,D*R]; h_n [D,B,R]; c_n [D,B,H] or None.
    """
    directions, batch = h0.shape[0], h0.shape[1]
    step = STEPS[spec.name]
    sizes = [batch] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    outputs, h_n, c_n = [], [], []
    for direction, w in enumerate(split_weights(weights, directions)):
        gates_x = linear(x, w.w_ih, w.b_ih)
        step_gates_x = gates_x.unbind(0) if batch_sizes is None else torch.split(gates_x, sizes)
        h = h0[direction]
        c = None if c0 is None else c0[direction]
        h_steps = []
        steps = range(len(sizes))
        for t in steps if direction == 0 else reversed(steps):
            active = sizes[t]
            h_active = h[:active]
            c_active = None if c is None else c[:active]
            gates_h = linear(h_active, w.w_hh, w.b_hh)
            h_next, c_next = step(step_gates_x[t], gates_h, h_active, c_active)
            if w.w_hr is not None:
                h_next = linear(h_next, w.w_hr)
            h_steps.append(h_next)
            # rows that are not active keep their state: finished, or (backwards) not begun yet
            h = torch.cat([h_next, h[active:]]) if active < batch else h_next
            if c is not None and c_next is not None:
                c = torch.cat([c_next, c[active:]]) if active < batch else c_next
        if direction == 1:
            h_steps.reverse()
        outputs.append(torch.stack(h_steps) if batch_sizes is None else torch.cat(h_steps))
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    y = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    return y, torch.stack(h_n), torch.stack(c_n) if c_n else None


def cell(
    x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor], spec: CellSpec
) -> tuple[Tensor, Tensor | None]:
    """One step of one direction: x [B,I], h [B,R] and c [B,H] or None give the next h and c."""
    c0 = None if c is None else c.unsqueeze(0)
    _, h_n, c_n = layer(x.unsqueeze(0), h.unsqueeze(0), c0, weights, None, spec)
    return h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
    num_layers: int,
    dropout: float = 0.0,
    run: Layer = layer,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stacks layers: each one reads the output of the layer below, thinned by dropout.

    Args:
        x: [T,B,I], or packed rows [N,I] together with ``batch_sizes``.
        h0: [L*D,B,R] initial hidden states, layer by layer.
        c0: [L*D,B,H] initial cell states of an LSTM, else None.
        weights: the flat weights of all layers, layer by layer.
        batch_sizes: as in `layer`.
        spec: the cell.
        num_layers: L.
        dropout: probability of zeroing an output between two layers; 0 for none.
        run: what computes one layer.

    Returns:
        y [T,B,D*R] or [N,D*R]; h_n [L*D,B,R]; c_n [L*D,B,H] or None.
    """
    if num_layers == 1:
        return run(x, h0, c0, weights, batch_sizes, spec)
    count = len(weights) // num_layers
    directions = size(h0, 0) // num_layers
    h_n, c_n = [], []
    for index in range(num_layers):
        if index > 0 and dropout > 0:
            x = dropout_function(x, dropout, training=True)
        states = slice(index * directions, (index + 1) * directions)
        x, h, c = run(
            x,
            h0[states],
            None if c0 is None else c0[states],
            weights[index * count : (index + 1) * count],
            batch_sizes,
            spec,
        )
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n) if c_n else None
