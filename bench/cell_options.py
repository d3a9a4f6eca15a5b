"""Time of layers with options of the cell, compared with the plain layer and a loop.

    python bench/cell_options.py [--seconds 0.5] [--threads 2] [--json FILE]

First all options of an LSTM together, relative to the plain layer, with loops of cells in Python
as users write them, and a loop whose steps torch.compile compiles. The same for a GRU: its reset
gate before the product, hard gates, heads, and `fastrnn.MGU`. Then each option alone, relative to
the layer with the option: the plain layer and the loop. Calls are interleaved
(`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from relative_times import Task, print_times
from torch import Tensor, nn
from torch.nn.functional import linear

import fastrnn

#         T    B    H = I
SHAPES = [(100, 32, 256), (50, 64, 128), (100, 1, 128)]
OPTIONS: dict[str, dict[str, Any]] = {
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.1},
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "weight_dropout": {"weight_dropout": 0.5},
}


class LayerNormCell(nn.Module):
    """A cell with layer normalisation, written with modules of torch."""

    def __init__(self, cell: str, size: int) -> None:
        super().__init__()
        gates = {"LSTM": 4, "GRU": 3}[cell]
        self.weight_ih = nn.Parameter(torch.randn(gates * size, size) / size**0.5)
        self.weight_hh = nn.Parameter(torch.randn(gates * size, size) / size**0.5)
        self.norm_ih, self.norm_hh = nn.LayerNorm(gates * size), nn.LayerNorm(gates * size)
        self.norm_c = nn.LayerNorm(size)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        of_x = self.norm_ih(linear(x, self.weight_ih))
        of_h = self.norm_hh(linear(h, self.weight_hh))
        if of_x.shape[-1] == 3 * h.shape[-1]:
            xr, xz, xn = of_x.chunk(3, -1)
            hr, hz, hn = of_h.chunk(3, -1)
            z = torch.sigmoid(xz + hz)
            n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
            return n + z * (h - n), c
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], x.shape[2])
        outputs = []
        for step in x.unbind(0):
            h, c = self.step(step, h, c)
            outputs.append(h)
        return torch.stack(outputs)


class ResetBeforeCell(nn.Module):
    """A GRU whose reset gate acts before the product."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(3 * size, size) / size**0.5)
        self.weight_hh = nn.Parameter(torch.randn(3 * size, size) / size**0.5)
        self.bias = nn.Parameter(torch.randn(3 * size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2]
        h = x.new_zeros(x.shape[1], size)
        outputs = []
        for of_x in linear(x, self.weight_ih, self.bias).unbind(0):
            gates = of_x[:, : 2 * size] + linear(h, self.weight_hh[: 2 * size])
            r, z = torch.sigmoid(gates).chunk(2, -1)
            n = torch.tanh(of_x[:, 2 * size :] + linear(r * h, self.weight_hh[2 * size :]))
            h = n + z * (h - n)
            outputs.append(h)
        return torch.stack(outputs)


class ZoneoutCell(nn.Module):
    """A cell of torch with zoneout of h and c."""

    def __init__(self, cell: str, size: int) -> None:
        super().__init__()
        self.cell = getattr(nn, f"{cell}Cell")(size, size)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = x.new_zeros(x.shape[1], x.shape[2])
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, state)
        outputs = []
        for step in x.unbind(0):
            new = self.cell(step, state)
            if isinstance(new, tuple):
                state = tuple(
                    torch.where(torch.rand_like(n) < 0.1, s, n)
                    for s, n in zip(state, new, strict=True)
                )
            else:
                state = torch.where(torch.rand_like(new) < 0.1, state, new)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


LOOPS: dict[str, Callable[[str, int], nn.Module]] = {
    "layer_norm": LayerNormCell,
    "zoneout": ZoneoutCell,
}


def timed(layer: Callable[[Tensor], Any], x: Tensor) -> Callable[[], None]:
    """Returns one step of training."""

    def call() -> None:
        result = layer(x)
        (result[0] if isinstance(result, tuple) else result).sum().backward()

    return call


def task(cell: str, shape: tuple[int, int, int], layers: dict[str, Any]) -> Task:
    steps, batch, size = shape
    x = torch.randn(steps, batch, size, requires_grad=True)
    calls = {title: timed(layer, x) for title, layer in layers.items()}
    return Task(cell, "training", f"T{steps} B{batch} H{size}", calls)


def overview() -> Task:
    """Returns the task that compares all options of an LSTM."""
    size = SHAPES[0][2]
    layers: dict[str, Any] = {"plain": fastrnn.LSTM(size, size)}
    layers |= {option: fastrnn.LSTM(size, size, **own) for option, own in OPTIONS.items()}
    for option, loop in LOOPS.items():
        layers[f"{option} loop"] = loop("LSTM", size)
    compiled: Any = LayerNormCell("LSTM", size)
    compiled.step = torch.compile(compiled.step)  # the unrolled loop takes minutes to compile
    layers["layer_norm loop of compiled steps"] = compiled
    return task("LSTM", SHAPES[0], layers)


def variants() -> Task:
    """Returns the task that compares the variants of a GRU, and those of an LSTM's cell state."""
    size = SHAPES[0][2]
    layers = {
        "plain": fastrnn.GRU(size, size),
        "reset_after=False": fastrnn.GRU(size, size, reset_after=False),
        "reset_after=False loop": ResetBeforeCell(size),
        "hard_sigmoid": fastrnn.GRU(size, size, gate_activation="hard_sigmoid"),
        "heads=4": fastrnn.GRU(size, size, heads=4),
        "MGU": fastrnn.MGU(size, size),
        "LSTM": fastrnn.LSTM(size, size),
        "LSTM cell_clip": fastrnn.LSTM(size, size, cell_clip=3.0),
    }
    return task("GRU", SHAPES[0], layers)


def tasks() -> Iterator[Task]:
    """Yields what is compared."""
    torch.manual_seed(0)
    yield overview()
    yield variants()
    for cell in ("LSTM", "GRU"):
        for option, arguments in OPTIONS.items():
            for shape in SHAPES:
                size = shape[2]
                layers: dict[str, Any] = {
                    option: getattr(fastrnn, cell)(size, size, **arguments),
                    "plain": getattr(fastrnn, cell)(size, size),
                }
                if option in LOOPS:
                    layers["loop"] = LOOPS[option](cell, size)
                yield task(cell, shape, layers)


if __name__ == "__main__":
    print_times(__doc__, tasks(), seconds=0.5)
