"""Cells of a user, for the tests of `fastrnn.define_cell`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

import fastrnn


@fastrnn.define_cell(gates=3, states=("h", "c"), parameters=("p", "q"))
def Everything(gates_x: Any, gates_h: Any, h: Any, c: Any, *, p: Any, q: Any) -> Any:
    """A cell that uses every function of the kernels, for no purpose."""
    i, f = gates_x[0] + gates_h[0], gates_x[1] + gates_h[1]
    a = torch.exp(-torch.abs(i)) * torch.sigmoid(f + p * c) * torch.rsqrt(1 + c * c)
    b = torch.maximum(torch.tanh(gates_x[2] * gates_h[2]), q * h)
    d = torch.minimum(functional.logsigmoid(f), torch.clamp(i, -0.5, 0.5))
    c = a * c + torch.where(f > p, torch.relu(b), d) + torch.where(q >= i, 0.1 * b, b / (2 + a))
    return torch.tanh(c) * torch.sigmoid(i - c) / torch.sqrt(1 + h * h), c


@fastrnn.define_cell(gates=3, states=("h", "c", "m"), parameters={"gain": 1.0, "shift": 0.0})
def EveryRow(gates_x: Any, gates_h: Any, h: Any, c: Any, m: Any, *, gain: Any, shift: Any) -> Any:
    """A cell that uses every reduction, for no purpose. Some variables have names of C macros."""
    units = h.shape[-1:]
    errno = functional.layer_norm(gates_x[0] + gates_h[0], units, gain, shift)
    NAN = functional.rms_norm(gates_h[1], units, gain, eps=1e-3) + gates_x[1]
    EOF = torch.softmax(gates_x[2] + gates_h[2], -1)
    FASTRNN_HD = (h * gain).sum(-1, keepdim=True) * units[0] ** -0.5
    c = torch.sigmoid(errno) * c + EOF * c.var(-1, keepdim=True) + 0.1 * (1 + FASTRNN_HD) * NAN
    m = torch.tanh(m + c.std(-1, keepdim=True, unbiased=False)).mean(-1, keepdim=True)
    return functional.layer_norm(c, units) * torch.sigmoid(NAN) + m, c, m


def gates_norm(gates: Any, gains: Any) -> Any:
    """Layer normalisation over all gates."""
    mean = sum(gate.mean(-1, keepdim=True) for gate in gates) / len(gates)
    gates = [gate - mean for gate in gates]
    variance = sum((gate * gate).mean(-1, keepdim=True) for gate in gates) / len(gates)
    scale = torch.rsqrt(variance + 1e-5)
    return [gate * scale * gain for gate, gain in zip(gates, gains, strict=True)]


GAINS = tuple(f"{side}_{gate}" for side in ("x", "h") for gate in "ifgo")


@fastrnn.define_cell(gates=4, states=("h", "c"), parameters=(*GAINS, "gain_c", "bias_c"))
def MyNormLSTM(
    gates_x: Any, gates_h: Any, h: Any, c: Any, *, gain_c: Any, bias_c: Any, **g: Any
) -> Any:
    of_x = gates_norm(gates_x, [g[name] for name in GAINS[:4]])
    of_h = gates_norm(gates_h, [g[name] for name in GAINS[4:]])
    i, f, g, o = (x + h for x, h in zip(of_x, of_h, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    normal = functional.layer_norm(c, c.shape[-1:], gain_c, bias_c)
    return torch.sigmoid(o) * torch.tanh(normal), c


@fastrnn.define_cell(gates=1)
def MyNormRNN(gates_x: Any, gates_h: Any, h: Any) -> Any:
    gate = gates_x[0] + gates_h[0]
    return torch.tanh(functional.layer_norm(gate, gate.shape[-1:]) + h.mean(-1, keepdim=True))


@fastrnn.define_cell(gates=4, states=("h", "c"))
def MyLSTM(gates_x: Any, gates_h: Any, h: Any, c: Any) -> Any:
    i, f, g, o = (x + h for x, h in zip(gates_x, gates_h, strict=True))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@fastrnn.define_cell(gates=3)
def MyGRU(gates_x: Any, gates_h: Any, h: Any) -> Any:
    r = torch.sigmoid(gates_x[0] + gates_h[0])
    z = torch.sigmoid(gates_x[1] + gates_h[1])
    n = torch.tanh(gates_x[2] + r * gates_h[2])
    return (1 - z) * n + z * h


@fastrnn.define_cell(gates=4, states=("h", "c", "n", "m"))
def MySLSTM(gates_x: Any, gates_h: Any, h: Any, c: Any, n: Any, m: Any) -> Any:
    i, f, z, o = (x + h for x, h in zip(gates_x, gates_h, strict=True))
    log_f = functional.logsigmoid(f) + m
    m = torch.maximum(log_f, i)
    i, f = torch.exp(i - m), torch.exp(log_f - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m
