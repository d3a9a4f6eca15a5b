"""Cost of returning the states of every step, beside the plain call and what users write today.

    python bench/states.py [--seconds 0.5] [--threads 2] [--json FILE]

Each figure is a time divided by that of the plain call of fastrnn, of the same shape and mode: the
call with ``return_all_states``, with ``return_gates``, and with both; then a loop over the steps
with an `nn` cell that collects the states. In training the loss is the sum of all states, or of the
output where no states are returned. Calls are interleaved (`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import FASTRNN
from fastrnn.tools.benchmark.timing import interleaved

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time per call and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(options.threads, [FASTRNN])
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for training in (False, True):
        for cell in CELLS:
            for steps, batch, size in SHAPES:
                samples = interleaved(calls_of(cell, steps, batch, size, training), options.seconds)
                times = {title: statistics.median(own) for title, own in samples.items()}
                mode = "training" if training else "inference"
                shape = f"T{steps} B{batch} H{size}"
                results.append({"cell": cell, "mode": mode, "shape": shape, "seconds": times})
                plain = times["plain"]
                ratios = ", ".join(f"{title} {t / plain:.2f}" for title, t in times.items())
                print(f"{cell:5}{mode:10}{shape:16}{plain * 1e3:8.2f} ms: {ratios}", flush=True)
    if options.json is not None:
        document = {"machine": about, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
