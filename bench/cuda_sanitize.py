"""Runs the CUDA kernels under compute-sanitizer: memory, races in shared memory, barriers.

    python bench/cuda_sanitize.py [--tools memcheck racecheck synccheck]
           [--schedules stepwise persistent] [--limit 300] [--log DIR] [--sanitizer PATH]

Each tool and schedule runs in a separate process with a few small layers, forward and backward:
both kinds of product, several row tiles and groups, 8 and 16 units per block, both directions, rows
of different lengths, projections. Only fastrnn's own kernels are checked. Each tensor gets its own
memory from CUDA, so that an overrun does not end in another tensor of torch's pool.

Prints a table, and each finding with the layer that ran. The exit code is 1 if a tool found
anything, if a process failed, or if it took more than --limit seconds; else 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import _library

TOOLS = ("memcheck", "racecheck", "synccheck")
SCHEDULES = ("stepwise", "persistent")
MODULES = {"rnn": fastrnn.RNN, "gru": fastrnn.GRU, "lstm": fastrnn.LSTM}
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CELLS = [
    ("lstm", "float32"),
    ("lstm", "tf32"),
    ("lstm", "float16"),
    ("lstm", "bfloat16"),
    ("gru", "float32"),
    ("gru", "float16"),
    ("rnn", "tf32"),
    ("rnn", "float16"),
]
FOUND = 86  # exit code that the tool is told to use for findings
DONE = "all layers ran"
STARTED = "layer: "


@dataclass(frozen=True)
class Shape:
    """I, H and directions of a layer, the lengths of its sequences, and an LSTM's projection."""

    name: str
    input_size: int
    hidden_size: int
    bidirectional: bool
    lengths: tuple[int, ...]
    proj_size: int = 0


SHAPES = (
    Shape("few rows", 5, 17, True, (4, 4, 4)),
    Shape("two row tiles", 8, 40, False, (3,) * 20),
    Shape("lengths", 3, 24, True, (5, 1, 4, 4, 2, 3, 5, 1) * 4 + (2, 5)),
    Shape("16 units per block", 8, 600, True, (2,) * 20),
    Shape("projected, few rows", 5, 40, True, (4, 3, 2), 17),
    Shape("projected", 8, 600, True, (3,) * 17 + (2, 1), 100),
)
LAYERS = [
    (shape, cell, dtype)
    for shape, (cell, dtype) in product(SHAPES, CELLS)
    if cell == "lstm" or shape.proj_size == 0
]


def run_layers(device: str) -> None:
    """Runs all layers by the schedule that FASTRNN_SCHEDULE selects; the sanitizer watches this."""
    for shape, cell, dtype in LAYERS:
        print(f"{STARTED}{cell} {dtype} {shape.name}", flush=True)
        allowed = dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        torch.manual_seed(0)
        module: nn.Module = MODULES[cell](
            shape.input_size,
            shape.hidden_size,
            bidirectional=shape.bidirectional,
            device=device,
            dtype=DTYPES[dtype],
            **({"proj_size": shape.proj_size} if shape.proj_size > 0 else {}),
        )
        rows = torch.randn(
            sum(shape.lengths), shape.input_size, device=device, dtype=DTYPES[dtype]
        ).requires_grad_()
        x = pack_sequence(list(rows.split(list(shape.lengths))), enforce_sorted=False)
        output = module(x)[0].data
        gradients = torch.autograd.grad(output.float().sum(), [rows, *module.parameters()])
        if not all(bool(t.isfinite().all()) for t in (output, *gradients)):
            raise SystemExit(f"{cell} {dtype} {shape.name}: not all results are finite")
    print(DONE, flush=True)


@dataclass
class Outcome:
    """Result of one process under one tool.

    Args:
        verdict: ``clean``, or a description of the problem.
        layers: number of layers that were started.
        findings: for each finding, the layer that ran and the tool's first line.
        count: number of findings that the tool reported.
    """

    verdict: str
    layers: int = 0
    findings: list[str] = field(default_factory=list)
    count: int = 0


_SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
_FINDING = re.compile(r"^=+ (?! )(?!COMPUTE-SANITIZER)(?!.*SUMMARY)(\S.*)")


def judge(output: str, exit_code: int | None) -> Outcome:
    """Interprets the output of a tool and of the program that it ran.

    Args:
        output: lines of both, in the order in which they were printed.
        exit_code: None if the process was stopped at the time limit.
    """
    outcome, layer, summaries = Outcome("clean"), "before any layer", 0
    for line in output.splitlines():
        if line.startswith(STARTED):
            layer = line.removeprefix(STARTED)
            outcome.layers += 1
        elif summary := _SUMMARY.match(line):
            summaries += 1
            outcome.count += int(summary[1] or summary[2])
        elif finding := _FINDING.match(line):
            outcome.findings.append(f"{layer}: {finding[1]}")
    if exit_code is None:
        outcome.verdict = "took too long"
    elif outcome.count > 0 or exit_code == FOUND:
        outcome.verdict = "FOUND"
    elif exit_code != 0 or DONE not in output.splitlines():
        outcome.verdict = f"failed (exit code {exit_code})"
    elif summaries == 0:
        outcome.verdict = "no summary"
    return outcome


def watch(
    sanitizer: str, tool: str, schedule: str, device: str, limit: float
) -> tuple[str, int | None]:
    """Runs the layers under a tool. Returns the output and the exit code (None: time limit)."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += ["--report-api-errors", "no", "--kernel-regex", "kns=fastrnn"]
    command += [sys.executable, __file__, "--run-layers", "--device", device]
    environment = {
        **os.environ,
        "FASTRNN_SCHEDULE": schedule,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONUNBUFFERED": "1",
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        return (expired.stdout or b"").decode(errors="replace"), None
    return done.stdout.decode(errors="replace"), done.returncode


def find_sanitizer(given: str | None) -> str:
    """Path of compute-sanitizer.

    Raises:
        SystemExit: no such program exists.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    candidates = [given] if given else ["compute-sanitizer", *map(str, places)]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    where = f"{given} is not a program" if given else "not in PATH, CUDA_HOME or /usr/local/cuda"
    raise SystemExit(
        f"cuda_sanitize.py needs compute-sanitizer, a part of the CUDA toolkit: {where}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, known in (("tools", TOOLS), ("schedules", SCHEDULES)):
        parser.add_argument(f"--{name}", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument(
        "--limit", type=float, default=300, help="time limit per process, in seconds"
    )
    parser.add_argument("--log", type=Path, metavar="DIR", help="folder for the full output")
    parser.add_argument("--sanitizer", metavar="PATH", help="path of compute-sanitizer")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--run-layers", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run_layers:
        run_layers(options.device)
        return 0
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("cuda_sanitize.py needs a CUDA device; torch found none.")
        if not _library.cuda_kernels:
            raise SystemExit(
                f"cuda_sanitize.py needs fastrnn's CUDA kernels: {_library.why_no_cuda}."
            )
    sanitizer = find_sanitizer(options.sanitizer)
    if options.log is not None:
        options.log.mkdir(parents=True, exist_ok=True)

    total = len(LAYERS)
    print(f"{'tool':<12}{'schedule':<12}{'layers':>8}{'found':>7}{'seconds':>9}   verdict")
    status = 0
    for tool, schedule in product(options.tools, options.schedules):
        begin = time.monotonic()
        output, exit_code = watch(sanitizer, tool, schedule, options.device, options.limit)
        outcome = judge(output, exit_code)
        layers = f"{outcome.layers}/{total}"
        seconds = time.monotonic() - begin
        print(
            f"{tool:<12}{schedule:<12}{layers:>8}{outcome.count:>7}{seconds:>9.1f}   "
            f"{outcome.verdict}",
            flush=True,
        )
        for finding in outcome.findings[:20]:
            print(f"    {finding}", flush=True)
        if options.log is not None:
            (options.log / f"{tool}-{schedule}.log").write_text(output, encoding="utf-8")
        if outcome.verdict != "clean":
            status = 1
            if not outcome.findings:
                print("".join(f"    | {line}\n" for line in output.splitlines()[-8:]), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
