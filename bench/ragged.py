"""Cost of lengths and resets, beside the padded batch and what users write without them.

    python bench/ragged.py [--seconds 0.5] [--threads 2] [--json FILE]

Each figure is a time divided by that of the padded batch without marks, of the same shape and mode:
equal lengths, lengths from 1 to T evenly, resets before 3% of the steps; then the same lengths
through torch's `pack_padded_sequence` and `nn` layer, and the same resets as a loop over the steps
with `nn` cells and a mask. Calls are interleaved (`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from relative_times import Task, print_times
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

#         T    B    H = I
SHAPES = [(50, 16, 64), (100, 32, 128), (50, 64, 256), (128, 128, 256)]
CELLS = ("GRU", "LSTM")


def calls_of(cell: str, steps: int, batch: int, size: int, training: bool) -> dict[str, Any]:
    """Returns the calls to compare by their titles, the padded batch first."""
    torch.manual_seed(0)
    ours, theirs = getattr(fastrnn, cell)(size, size), getattr(nn, cell)(size, size)
    step = getattr(nn, f"{cell}Cell")(size, size)
    x = torch.randn(steps, batch, size, requires_grad=training)
    lengths = torch.linspace(1, steps, batch).round().long()[torch.randperm(batch)]
    equal = torch.full((batch,), steps)
    resets = torch.rand(steps, batch) < 0.03

    def packed() -> Tensor:
        rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, _ = pad_packed_sequence(theirs(rows)[0], total_length=steps)
        return output

    def loop() -> Tensor:
        keep = (~resets).to(x.dtype).unsqueeze(-1)
        h = c = x.new_zeros(batch, size)
        outputs = []
        for t in range(steps):
            if cell == "GRU":
                h = step(x[t], h * keep[t])
            else:
                h, c = step(x[t], (h * keep[t], c * keep[t]))
            outputs.append(h)
        return torch.stack(outputs)

    runs: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: ours(x)[0],
        "equal lengths": lambda: ours(x, lengths=equal)[0],
        "lengths 1..T": lambda: ours(x, lengths=lengths)[0],
        "3% resets": lambda: ours(x, resets=resets)[0],
        "torch: packed 1..T": packed,
        "torch: loop with resets": loop,
    }

    def timed(run: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            if training:
                run().sum().backward()
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
