"""Cost of returning the states of every step, beside the plain call and what users write today.

    python bench/states.py [--seconds 0.5] [--threads 2] [--json FILE]

Each figure is a time divided by that of the plain call of fastrnn, of the same shape and mode: the
call with ``return_all_states``, with ``return_gates``, and with both; then a loop over the steps
with an `nn` cell that collects the states. In training the loss is the sum of all states, or of the
output where no states are returned. Calls are interleaved (`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from relative_times import Task, print_times
from torch import Tensor, nn

import fastrnn

#         T    B    H = I
SHAPES = [(50, 16, 64), (100, 32, 128), (50, 64, 256)]
CELLS = ("GRU", "LSTM")


def calls_of(cell: str, steps: int, batch: int, size: int, training: bool) -> dict[str, Any]:
    """Returns the calls to compare by their titles, the plain call first."""
    torch.manual_seed(0)
    layer, step = getattr(fastrnn, cell)(size, size), getattr(nn, f"{cell}Cell")(size, size)
    x = torch.randn(steps, batch, size, requires_grad=training)

    def states(**options: bool) -> list[Tensor]:
        output, _, extras = layer(x, **options)
        if extras.states is None:
            return [output]
        return [extras.states] if cell == "GRU" else list(extras.states)

    def loop() -> list[Tensor]:
        h = c = x.new_zeros(batch, size)
        all_h, all_c = [], []
        for t in range(steps):
            if cell == "GRU":
                h = step(x[t], h)
            else:
                h, c = step(x[t], (h, c))
                all_c.append(c)
            all_h.append(h)
        return [torch.stack(own) for own in (all_h, all_c) if own]

    runs: dict[str, Callable[[], list[Tensor]]] = {
        "plain": lambda: [layer(x)[0]],
        "states": lambda: states(return_all_states=True),
        "gates": lambda: states(return_gates=True),
        "both": lambda: states(return_all_states=True, return_gates=True),
        f"torch: loop of {cell}Cell": loop,
    }

    def timed(run: Callable[[], list[Tensor]]) -> Callable[[], None]:
        def call() -> None:
            if training:
                torch.stack([t.sum() for t in run()]).sum().backward()
            else:
                with torch.no_grad():
                    run()

        return call

    return {title: timed(run) for title, run in runs.items()}


def tasks() -> Iterator[Task]:
    """Yields what is compared."""
    for mode in ("inference", "training"):
        for cell in CELLS:
            for steps, batch, size in SHAPES:
                calls = calls_of(cell, steps, batch, size, mode == "training")
                yield Task(cell, mode, f"T{steps} B{batch} H{size}", calls)


if __name__ == "__main__":
    print_times(__doc__, tasks(), seconds=0.5)
