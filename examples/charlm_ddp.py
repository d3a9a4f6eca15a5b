"""Trains the character model of ``fastrnn charlm`` in several processes at once.

Each process (rank) holds the whole model and reads its own part of the streams of text.
DistributedDataParallel averages the gradients during the backward pass, so all ranks make the same
step. Two CPU processes on this machine, with gloo:

    torchrun --standalone --nproc-per-node 2 examples/charlm_ddp.py

One process per GPU, with nccl:

    torchrun --standalone --nproc-per-node gpu examples/charlm_ddp.py --device cuda

Several hosts: run the same command on each, with the address of one host that all can reach,

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id charlm \\
        --rdzv-endpoint host0.example:29400 examples/charlm_ddp.py --device cuda

or with explicit ranks: ``--node-rank 0`` on the first host, ``--node-rank 1`` on the second:

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 \\
        --master-addr host0.example --master-port 29400 examples/charlm_ddp.py --device cuda

All hosts must have the same text (with the default, the same release of Python). torchrun gives
each process one CPU thread unless OMP_NUM_THREADS is set: set it to the number of cores of a host
divided by the number of its processes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastrnn import tbptt
from fastrnn.tools.charlm import data
from fastrnn.tools.charlm.config import CELLS, Config
from fastrnn.tools.charlm.errors import CharlmError
from fastrnn.tools.charlm.model import build_model
from fastrnn.tools.charlm.train import NATS_TO_BITS, mean_loss


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Trains a character model on several processes.")
    parser.add_argument("--text", nargs="+", help="text files; default: Python's standard library")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="streams of text, over all ranks"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--report-every", type=int, default=100)
    return parser.parse_args()


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins the process group; yields this rank's device."""
    if device == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    else:
        own = torch.device("cpu")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """Trains with this rank's part of every batch.

    Raises:
        CharlmError: an option is out of range, or the text is too short.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if arguments.batch_size % ranks != 0:
        raise CharlmError(
            f"--batch-size must be a multiple of {ranks} (the number of ranks), "
            f"got {arguments.batch_size}."
        )
    config = Config(
        cell=arguments.cell,
        layers=arguments.layers,
        hidden=arguments.hidden,
        seq_length=arguments.seq_length,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        learning_rate=arguments.lr,
    )
    text = data.read_files(arguments.text) if arguments.text else data.read_standard_library()
    corpus = data.prepare(text, config.batch_size, config.seq_length, device)
    share = config.batch_size // ranks
    columns = slice(rank * share, (rank + 1) * share)  # this rank's columns of [T,B]

    model = build_model(len(corpus.vocabulary), config).to(device)
    parallel = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None
    )
    optimizer = torch.optim.Adam(parallel.parameters(), lr=config.learning_rate)
    if rank == 0:
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{ranks} ranks x {share} streams, {size:,} parameters", flush=True)

    started = time.perf_counter()
    for step in range(config.steps):
        index = step % corpus.training.chunks
        if index == 0:
            state = model.zero_state(share)
        x, y = corpus.training.chunk(index)
        optimizer.zero_grad()
        loss, state = tbptt(  # also averages the gradients over the ranks
            parallel, x[:, columns], y[:, columns], mean_loss, config.seq_length, state
        )
        nn.utils.clip_grad_norm_(parallel.parameters(), config.clip)
        optimizer.step()
        if step == 0 or (step + 1) % arguments.report_every == 0 or step + 1 == config.steps:
            dist.reduce(loss, dst=0)  # the ranks' parts are equal, so the mean of means is the mean
            if rank == 0:
                seconds = time.perf_counter() - started
                speed = (step + 1) * config.characters_per_step / seconds
                bits = loss.item() / ranks * NATS_TO_BITS
                print(f"step {step + 1:,}: {bits:.6f} bits/char, {speed:,.0f} chars/s", flush=True)


def main() -> None:
    """Trains as one of the processes that torchrun started."""
    if "RANK" not in os.environ:
        raise SystemExit(
            "charlm_ddp.py must be started by torchrun; its first lines show the commands."
        )
    arguments = parse_arguments()
    with process_group(arguments.device) as device:
        try:
            train(arguments, device)
        except CharlmError as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
