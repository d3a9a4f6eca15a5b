"""The program that test_parallel.py runs in several processes by torchrun.

Every rank trains a parallel model on its half of a batch, and a local copy on the whole batch.
Outputs, gradients and weights must agree after each step. Rank 0 prints one line per case.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastrnn

BATCH = 4


class Model(nn.Module):
    """Layers, a cell on their last two outputs, and a decoder."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = getattr(fastrnn, name)(3, 5, 2, dtype=torch.float64)
        # a single layer without gradients takes the fast path
        self.last = getattr(fastrnn, name)(5, 5, dtype=torch.float64)
        self.cell = getattr(fastrnn, f"{name}Cell")(5, 5, dtype=torch.float64)
        self.decoder = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.last(self.layers(x)[0])
        before = output[-2]
        is_lstm = isinstance(self.cell, fastrnn.LSTMCell)
        state = self.cell(output[-1], (before, before) if is_lstm else before)
        return self.decoder(state if isinstance(state, Tensor) else state[0])


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(parallel: nn.Module, alone: nn.Module, what: str) -> None:
    """Compares three training steps of both models, and a call without gradients after each.

    Raises:
        AssertionError: the models differ.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    generator = torch.Generator().manual_seed(3)
    optimizers: list[Any] = [
        torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (parallel, alone)
    ]
    named = dict(alone.named_parameters())
    for _ in range(3):
        x = torch.randn(6, BATCH, 3, dtype=torch.float64, generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        output, expected = parallel(x[:, own]), alone(x)
        assert_same_in_double(output, expected[own])
        output.square().mean().backward()
        expected.square().mean().backward()
        for name, parameter in parallel.named_parameters():
            assert parameter.grad is not None, name
            gradient = named[name.removeprefix("module.")].grad
            assert gradient is not None
            assert gradient.abs().max() > 0, name
            assert_same_in_double(whole(parameter.grad), gradient)
        for optimizer in optimizers:
            optimizer.step()
        for name, parameter in parallel.named_parameters():
            assert_same_in_double(whole(parameter), named[name.removeprefix("module.")])
        with torch.no_grad():
            assert_same_in_double(parallel(x), alone(x))
    if rank == 0:
        print(f"same: {what}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("RNN", "LSTM", "GRU"):
        torch.manual_seed(17)
        alone = Model(name)
        check(DistributedDataParallel(copy.deepcopy(alone)), copy.deepcopy(alone), f"ddp {name}")
        for reshard in (True, False):
            model = copy.deepcopy(alone)
            for module in (model.layers, model.last, model.cell, model):
                fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            check(model, copy.deepcopy(alone), f"fsdp {name} reshard_after_forward={reshard}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
