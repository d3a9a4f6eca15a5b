"""What is timed: one call of a module, or one call with its backward pass, on either library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from grid import Point
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

LIBRARIES = ("torch", "fastrnn")


def module(library: str, cell: str, point: Point) -> nn.Module:
    """The layer of a library; the same seed gives both the same weights."""
    torch.manual_seed(0)
    classes = nn if library == "torch" else fastrnn
    layer: nn.Module = getattr(classes, {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}[cell])(
        point.input_size,
        point.hidden_size,
        point.layers,
        bidirectional=point.bidirectional,
    )
    return layer


def inputs(point: Point) -> torch.Tensor | PackedSequence:
    torch.manual_seed(1)
    x = torch.randn(point.steps, point.batch, point.input_size)
    return pack_padded_sequence(x, point.lengths) if point.packed else x


def workload(library: str, cell: str, mode: str, point: Point) -> Callable[[], object]:
    """A call to time. Training takes gradients of the weights and of the input."""
    layer, x = module(library, cell, point), inputs(point)
    if mode == "forward":
        layer.eval()

        def forward() -> object:
            with torch.no_grad():
                return layer(x)

        return forward

    leaf = x.data if isinstance(x, PackedSequence) else x
    leaf.requires_grad_()
    packed = x

    def output() -> torch.Tensor:
        y, _ = layer(packed)
        return y.data if isinstance(y, PackedSequence) else y

    with torch.no_grad():
        d_y = torch.randn_like(output())

    def training() -> object:
        layer.zero_grad()
        leaf.grad = None
        output().backward(d_y)
        return leaf.grad

    return training
