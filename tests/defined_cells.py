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
    a = torch.exp(-torch.abs(i)) * torch.sigmoid(f + p * c)
    b = torch.maximum(torch.tanh(gates_x[2] * gates_h[2]), q * h)
    d = torch.minimum(functional.logsigmoid(f), torch.clamp(i, -0.5, 0.5))
    c = a * c + torch.where(f > p, torch.relu(b), d) + torch.where(q >= i, 0.1 * b, b / (2 + a))
    return torch.tanh(c) * torch.sigmoid(i - c), c


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
