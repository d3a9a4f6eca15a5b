"""Resets in reinforcement learning: fastrnn beside TorchRL's modules and sb3-contrib's loop.

    pip install torchrl hoptorch sb3-contrib
    python bench/reinforcement.py [--seconds 2] [--threads 2] [--json FILE]

A recurrent policy is trained on rows of experience in which episodes end: [B,T,H] features and a
reset before 3% of the steps. Compared, after a check that outputs and gradients agree:

- fastrnn: one call of the layer with ``resets``;
- TorchRL pad, TorchRL scan: `torchrl.modules.GRUModule` and `LSTMModule` in recurrent mode with
  these backends, as users call them (a TensorDict in, a TensorDict out);
- sb3-contrib: `RecurrentActorCriticPolicy._process_sequence`, which is for an LSTM.

Each figure is a time divided by that of fastrnn. Calls are interleaved
(`fastrnn.tools.benchmark.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from relative_times import Task, print_times
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

import fastrnn

#          B    T    H = I; the last two are the shapes of TorchRL's own benchmark
SHAPES = [(8, 128, 64), (128, 128, 256), (4096, 32, 256)]
CELLS = ("GRU", "LSTM")
RESETS = 0.03
OURS = "fastrnn"
PACKAGES = ("torchrl", "hoptorch", "sb3-contrib")

Run = Callable[[Tensor], Tensor]  # x [B,T,H] -> output [B,T,H]


def torchrl_run(cell: str, size: int, backend: str, resets: Tensor) -> tuple[nn.Module, Run]:
    """Returns TorchRL's layer with its weights, and how it is run."""
    states = ["h"] if cell == "GRU" else ["h", "c"]
    module: Any = (GRUModule if cell == "GRU" else LSTMModule)(
        size,
        size,
        recurrent_backend=backend,
        in_keys=["x", *states],
        out_keys=["y", *[("next", state) for state in states]],
    )
    batch, steps = resets.shape
    zeros = {state: torch.zeros(batch, steps, 1, size) for state in states}
    rest = TensorDict({**zeros, "is_init": resets.unsqueeze(-1)}, [batch, steps])

    def run(x: Tensor) -> Tensor:
        with set_recurrent_mode(True):
            y: Tensor = module(rest.clone(recurse=False).set("x", x))["y"]
            return y

    return (module.gru if cell == "GRU" else module.lstm), run


def sb3_run(size: int, resets: Tensor) -> tuple[nn.Module, Run]:
    """Returns an LSTM and how sb3-contrib's policies run it."""
    layer = nn.LSTM(size, size)
    batch = resets.shape[0]
    starts = resets.float().flatten()

    def run(x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, batch, size)
        output, _ = RecurrentActorCriticPolicy._process_sequence(
            x.flatten(0, 1), (zeros, zeros), starts, layer
        )
        result: Tensor = output.view_as(x)
        return result

    return layer, run


def runs_of(cell: str, batch: int, steps: int, size: int) -> tuple[Tensor, dict[str, Run]]:
    """Returns an input and the runs to compare by their titles, all with the same weights."""
    torch.manual_seed(0)
    x = torch.randn(batch, steps, size, requires_grad=True)
    resets = torch.rand(batch, steps) < RESETS
    ours = getattr(fastrnn, cell)(size, size, batch_first=True)
    peers = {f"TorchRL {name}": torchrl_run(cell, size, name, resets) for name in ("pad", "scan")}
    if cell == "LSTM":
        peers["sb3-contrib"] = sb3_run(size, resets)
    runs: dict[str, Run] = {OURS: lambda x: ours(x, resets=resets)[0]}
    for title, (layer, run) in peers.items():
        layer.load_state_dict(ours.state_dict())
        runs[title] = run
    return x, runs


def check_alike(x: Tensor, runs: dict[str, Run]) -> None:
    """Raises unless all runs have the same outputs and input gradients."""
    results = {}
    for title, run in runs.items():
        y = run(x)
        results[title] = (y, *torch.autograd.grad(y.square().sum(), [x]))
    for title, result in results.items():
        for ours, theirs in zip(results[OURS], result, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=title)


def inference(run: Run, x: Tensor) -> None:
    """One call without gradients."""
    with torch.no_grad():
        run(x)


def training(run: Run, x: Tensor) -> None:
    """One call with its backward pass."""
    run(x).sum().backward()


def tasks() -> Iterator[Task]:
    """Yields what is compared, after a check that the results agree."""
    for cell in CELLS:
        for batch, steps, size in SHAPES:
            x, runs = runs_of(cell, batch, steps, size)
            check_alike(x, runs)
            for mode, call in (("inference", inference), ("training", training)):
                calls = {title: partial(call, own, x) for title, own in runs.items()}
                yield Task(cell, mode, f"B{batch} T{steps} H{size}", calls)


if __name__ == "__main__":
    print_times(__doc__, tasks(), seconds=2.0, packages=PACKAGES)
