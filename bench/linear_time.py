"""Speed of the layers that are linear in time, compared with ``GRU`` and ``LSTM`` at equal sizes.

    python bench/linear_time.py [--seconds 0.3] [--threads 2] [--json FILE]

Each figure is a time divided by that of `fastrnn.GRU` with as many features and hidden units.
"loop" is a `MinGRU` that computes its states step by step, as users write it; "operations" computes
its gates by torch's operations and its states by `fastrnn.functional.linear_scan`. "limit" is what
a `MinGRU` cannot avoid in inference: the product, and a ``torch.add`` that reads as much as the
product wrote and writes the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from relative_times import Task, print_times
from torch import Tensor
from torch.nn import functional as F

import fastrnn
from fastrnn.functional import linear_scan

#          T    B    H = I
SHAPES = [
    *((1, 1, 128), (10, 1, 128), (100, 1, 128), (1000, 1, 128)),
    *((100, 1, 512), (100, 16, 64), (100, 64, 256), (1000, 16, 256)),
]


def loop(layer: Any, x: Tensor) -> Tensor:
    """Computes a `fastrnn.MinGRU` step by step."""
    z, candidate = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0).chunk(2, -1)
    z = z.sigmoid()
    h = torch.zeros_like(z[0])
    states = []
    for gate, new in zip(z.unbind(), candidate.unbind(), strict=True):
        h = h + gate * (new - h)
        states.append(h)
    return torch.stack(states)


def operations(layer: Any, x: Tensor) -> Tensor:
    """Computes a `fastrnn.MinGRU` by operations."""
    z, candidate = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0).chunk(2, -1)
    z = z.sigmoid()
    return linear_scan(1 - z, z * candidate)


def limit(layer: Any, x: Tensor) -> Tensor:
    """Reads and writes what a `fastrnn.MinGRU` must."""
    z, candidate = F.linear(x, layer.weight_ih_l0).chunk(2, -1)
    return z + candidate


def tasks() -> Iterator[Task]:
    """Yields what is compared."""
    for mode in ("inference", "training"):
        for steps, batch, size in SHAPES:
            torch.manual_seed(0)
            is_training = mode == "training"
            names = ("GRU", "LSTM", "MinGRU", "MinLSTM", "SRU")
            layers = {name: getattr(fastrnn, name)(size, size) for name in names}
            x = torch.randn(steps, batch, size, requires_grad=is_training)
            runs: dict[str, Callable[[], Tensor]] = {
                name: lambda layer=layer, x=x: layer(x)[0] for name, layer in layers.items()
            }
            ways = {"operations": operations, "loop": loop}
            if not is_training:
                ways["limit"] = limit
            for name, way in ways.items():
                runs[name] = lambda layer=layers["MinGRU"], x=x, way=way: way(layer, x)

            def timed(run: Callable[[], Tensor], is_training: bool) -> Callable[[], None]:
                def call() -> None:
                    if is_training:
                        run().sum().backward()
                    else:
                        with torch.no_grad():
                            run()

                return call

            calls = {name: timed(run, is_training) for name, run in runs.items()}
            yield Task("layers", mode, f"T{steps} B{batch} H{size}", calls)


if __name__ == "__main__":
    print_times(__doc__, tasks(), seconds=0.3)
