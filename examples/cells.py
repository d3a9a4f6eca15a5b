"""Cells of papers as fused kernels, with `fastrnn.define_cell`.

    python examples/cells.py

Compiles each cell once (about 10 seconds), checks it against its own function, which runs step by
step, and prints how many times faster the kernels are.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional

import fastrnn
from fastrnn.backends import composite
from fastrnn.engine import choose


def normalised(gates, gains):
    """Layer normalisation over all gates of a product (Ba et al., 2016)."""
    mean = sum(gate.mean(-1, keepdim=True) for gate in gates) / len(gates)
    gates = [gate - mean for gate in gates]
    variance = sum((gate * gate).mean(-1, keepdim=True) for gate in gates) / len(gates)
    scale = torch.rsqrt(variance + 1e-5)
    return [gate * scale * gain for gate, gain in zip(gates, gains, strict=True)]


GAINS = {f"{side}_{gate}": 1.0 for side in ("x", "h") for gate in "ifgo"}
SHIFTS = {f"b_{gate}": 0.0 for gate in "ifgoc"}


@fastrnn.define_cell(gates=4, states=("h", "c"), parameters={**GAINS, **SHIFTS, "c_gain": 1.0})
def LayerNormLSTM(gates_x, gates_h, h, c, *, b_c, c_gain, **own):
    """`fastrnn.LSTM` with layer_norm=True. Use it with bias=False: the biases are b_i, b_f, ..."""
    of_x = normalised(gates_x, [own["x_" + gate] for gate in "ifgo"])
    of_h = normalised(gates_h, [own["h_" + gate] for gate in "ifgo"])
    i, f, g, o = (x + h + own["b_" + k] for x, h, k in zip(of_x, of_h, "ifgo", strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    normal = functional.layer_norm(c, c.shape[-1:], c_gain, b_c)
    return torch.sigmoid(o) * torch.tanh(normal), c


@fastrnn.define_cell(gates=4, states=("h", "c"), parameters=("w_ci", "w_cf", "w_co"))
def PeepholeLSTM(gates_x, gates_h, h, c, *, w_ci, w_cf, w_co):
    """LSTM whose gates see the cell state (Gers & Schmidhuber, 2000)."""
    i, f, g, o = (x + h for x, h in zip(gates_x, gates_h, strict=True))
    i = torch.sigmoid(i + w_ci * c)
    f = torch.sigmoid(f + w_cf * c)
    c = f * c + i * torch.tanh(g)
    o = torch.sigmoid(o + w_co * c)
    return o * torch.tanh(c), c


@fastrnn.define_cell(gates=2)
def LiGRU(gates_x, gates_h, h):
    """Light GRU (Ravanelli et al., 2018), in SpeechBrain's order of gates, without batch norm."""
    a, z = (x + h for x, h in zip(gates_x, gates_h, strict=True))
    z = torch.sigmoid(z)
    return z * h + (1 - z) * torch.relu(a)


@fastrnn.define_cell(gates=1)
def ATR(gates_x, gates_h, h):
    """Addition-subtraction twin gates (Zhang et al., 2018). Use it with bias=False."""
    i = torch.sigmoid(gates_x[0] + gates_h[0])
    f = torch.sigmoid(gates_x[0] - gates_h[0])
    return i * gates_x[0] + f * h


@fastrnn.define_cell(gates=2, states=("h", "c"))
def JANET(gates_x, gates_h, h, c):
    """LSTM with a forget gate alone (van der Westhuizen & Lasenby, 2018), with beta = 1."""
    s, g = (x + h for x, h in zip(gates_x, gates_h, strict=True))
    c = torch.sigmoid(s) * c + (1 - torch.sigmoid(s - 1)) * torch.tanh(g)
    return c, c


@fastrnn.define_cell(gates=1, parameters=("b_z", "b_h", "zeta", "nu"))
def FastGRNN(gates_x, gates_h, h, *, b_z, b_h, zeta, nu):
    """Gate and candidate share their weights (Kusupati et al., 2018). Use it with bias=False."""
    gate = gates_x[0] + gates_h[0]
    z = torch.sigmoid(gate + b_z)
    candidate = torch.tanh(gate + b_h)
    return (torch.sigmoid(zeta) * (1 - z) + torch.sigmoid(nu)) * candidate + z * h


def seconds(layer, x):
    """Returns the time of one training step, the best of several."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        layer.zero_grad()
        layer(x)[0].sum().backward()
        times.append(time.perf_counter() - begin)
    return min(times)


def main():
    """Checks and times each cell."""
    x = torch.randn(100, 16, 128)
    for cls in (LayerNormLSTM, PeepholeLSTM, LiGRU, ATR, JANET, FastGRNN):
        layer = cls(128, 128, bias=cls not in (LayerNormLSTM, ATR, FastGRNN))
        # layer normalisation amplifies rounding from step to step, so the check is in float64
        layer.double()
        output = layer(x.double())[0]
        with choose.override(composite):
            torch.testing.assert_close(layer(x.double())[0], output)
        layer.float()
        own = seconds(layer, x)
        with choose.override(composite):
            step_by_step = seconds(layer, x)
        print(f"{cls.__name__}: {step_by_step / own:.1f} times as fast as its function in a loop")


if __name__ == "__main__":
    main()
