"""Time of the cells beyond torch.nn, beside GRU or LSTM, a loop over the steps, and compiled steps.

    python bench/cells.py [--seconds 0.5] [--threads 2] [--json FILE]

Times are relative to the layer. The loop computes W_ih x for all steps at once, as the layer does,
and runs the step in torch; the last call runs the same loop with a step that torch.compile has
compiled. Calls are interleaved (`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from relative_times import Task, print_times
from torch import Tensor, nn
from torch.nn.functional import linear

import fastrnn
from fastrnn.reference import STEPS
from fastrnn.spec import BY_MODE

#         T    B    H = I
SHAPES = [(100, 32, 256), (100, 1, 128)]
#: name -> the class, its options, and the class of the cell to compare with
CELLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "peephole": ("LSTM", {"peephole": True}, "LSTM"),
    "coupled": ("LSTM", {"coupled_gates": True}, "LSTM"),
    "SLSTM": ("SLSTM", {}, "LSTM"),
    "JANET": ("JANET", {}, "GRU"),
    "LiGRU": ("LiGRU", {"normalization": None}, "GRU"),
    "LiGRU batchnorm": ("LiGRU", {}, "GRU"),
    "FastGRNN": ("FastGRNN", {}, "GRU"),
    "IndRNN": ("IndRNN", {}, "GRU"),
}


class Loop(nn.Module):
    """The cell of a layer as a loop over the steps of one direction."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.spec = BY_MODE[layer.mode]
        self.step = STEPS[self.spec.name]

    def forward(self, x: Tensor) -> Tensor:
        (w,) = self.layer._weights().directions()
        gates_x = linear(x, w.w_ih, w.b_ih)
        h = x.new_zeros(x.shape[1], self.layer.hidden_size)
        c = h.repeat(1, self.spec.cell_states) if self.spec.has_cell_state else None
        outputs = []
        for of_step in gates_x.unbind(0):
            gates_h = None if w.w_hh is None else linear(h, w.w_hh, w.b_hh)
            h, c = self.step(of_step, gates_h, h, c, w.w_unit)
            outputs.append(h)
        return torch.stack(outputs)


def timed(layer: Callable[[Tensor], Any], x: Tensor) -> Callable[[], None]:
    """Returns one step of training."""

    def call() -> None:
        result = layer(x)
        (result[0] if isinstance(result, tuple) else result).sum().backward()

    return call


def tasks() -> Iterator[Task]:
    """Yields what is compared."""
    torch.manual_seed(0)
    for title, (name, options, other) in CELLS.items():
        for steps, batch, size in SHAPES:
            layer = getattr(fastrnn, name)(size, size, **options)
            layers: dict[str, Any] = {title: layer, other: getattr(fastrnn, other)(size, size)}
            if title != "LiGRU batchnorm":
                layers["loop"] = Loop(layer)
                compiled = Loop(layer)
                compiled.step = torch.compile(compiled.step, dynamic=False)
                layers["compiled steps"] = compiled
            x = torch.randn(steps, batch, size, requires_grad=True)
            calls = {title: timed(layer, x) for title, layer in layers.items()}
            for call in calls.values():
                call()
            yield Task(title, "training", f"T{steps} B{batch} H{size}", calls)


if __name__ == "__main__":
    print_times(__doc__, tasks(), seconds=0.5)
