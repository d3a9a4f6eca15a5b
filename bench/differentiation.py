"""Cost of derivatives that no kernel computes, relative to calls that kernels compute.

    python bench/differentiation.py [--seconds S] [--threads N]

Prints the table of docs/differentiation.md: one layer in float32, T=50 steps, medians of
interleaved calls. Both sides of a ratio are fastrnn.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastrnn
from fastrnn.tools.benchmark.timing import interleaved

T = 50
CELLS: dict[str, type[nn.Module]] = {"rnn": fastrnn.RNN, "lstm": fastrnn.LSTM, "gru": fastrnn.GRU}
#: B, H (= I), number of models, inputs or samples
SHAPES = ((16, 64, 8), (1, 16, 8), (1, 16, 512))
#: derivative -> the call that its time is divided by
RATIOS = {
    "double backward": "training step",
    "jvp": "forward",
    "vmap over inputs": "loop over inputs",
    "vmap over weights": "loop over weights",
    "per-sample gradients": "loop over samples",
}


def calls_of(cell: str, batch: int, size: int, count: int) -> dict[str, Callable[[], Any]]:
    """All calls by name, for ``count`` models (I = H = ``size``), inputs [T,B,I] or samples."""
    module = CELLS[cell](size, size)
    models = [copy.deepcopy(module) for _ in range(count)]
    weights = list(module.parameters())
    own = {name: p.detach() for name, p in module.named_parameters()}
    stacked = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    inputs = torch.randn(count, T, batch, size)
    x = inputs[0]
    leaf = x.clone().requires_grad_()

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(module, parameters, (x,))[0]
        return result

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return output(parameters, x).square().sum()

    def penalty() -> None:
        (d_x,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        torch.autograd.grad(d_x.square().sum(), weights)

    def gradients(x: Tensor, *wanted: Tensor) -> None:
        torch.autograd.grad(module(x)[0].square().sum(), [*wanted, *weights])

    return {
        "forward": torch.no_grad()(lambda: module(x)),
        "training step": lambda: gradients(leaf, leaf),
        "double backward": penalty,
        "jvp": torch.no_grad()(lambda: jvp(lambda x: module(x)[0], (x,), (x,))),
        "loop over inputs": torch.no_grad()(lambda: [module(x) for x in inputs]),
        "vmap over inputs": torch.no_grad()(lambda: vmap(lambda x: module(x)[0])(inputs)),
        "loop over weights": torch.no_grad()(lambda: [model(x) for model in models]),
        "vmap over weights": torch.no_grad()(lambda: vmap(output, (0, None))(stacked, x)),
        "loop over samples": lambda: [gradients(x) for x in inputs],
        "per-sample gradients": lambda: vmap(grad(loss), (None, 0))(own, inputs),
    }


def ratios(cell: str, batch: int, size: int, count: int, seconds: float) -> dict[str, float]:
    """Measured ratios, by the keys of `RATIOS`."""
    times = interleaved(calls_of(cell, batch, size, count), seconds)
    return {name: median(times[name]) / median(times[base]) for name, base in RATIOS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="time per call")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, "
        f"fastrnn {fastrnn.__version__}; T={T}, float32\n"
    )
    columns = [f"B={b} H={h} x{n}" for b, h, n in SHAPES]
    print("| | divided by | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    measured = [[ratios(cell, *shape, options.seconds) for cell in CELLS] for shape in SHAPES]
    for name, base in RATIOS.items():
        cells_of_row = []
        for cells in measured:
            values = sorted(result[name] for result in cells)
            cells_of_row.append(
                " to ".join(f"{v:.{1 if v < 10 else 0}f}" for v in (values[0], values[-1]))
            )
        print(f"| {name} | {base} | " + " | ".join(cells_of_row) + " |", flush=True)


if __name__ == "__main__":
    main()
