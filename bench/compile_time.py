"""Time that torch.compile takes for a language model, fastrnn compared with torch.nn.

    python bench/compile_time.py [--steps 20 35 100] [--repeat N] [--limit SECONDS] [--json FILE]

The model is Embedding -> LSTM of two layers -> Linear -> cross entropy, forward and backward, with
inductor on the CPU. Each measurement runs in a separate process without caches, and the fastest of
several counts (a measurement of more than a minute is not repeated). torch.nn.LSTM needs
`torch._dynamo.config.allow_rnn`. The columns:

    setup     compiling one addition: the cost of any first compilation in a process (imports, and
              detecting the compiler's vector instructions, which torch otherwise caches on disk)
    forward   the first forward pass after that, including compilation
    backward  the first backward pass
    seconds   forward + backward
    nodes     operators and other nodes in the compiled graphs

"neither" is the model without its LSTM; subtract its seconds to get those of the LSTM. torch.nn
cannot be measured with dynamic T: torch 2.13 raises an AssertionError.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import fastrnn
from fastrnn.tools.benchmark.measure import machine

VOCABULARY, SIZE, LAYERS, BATCH = 1000, 128, 2, 16
COLUMNS = ("setup", "forward", "backward", "seconds", "nodes")
LIBRARIES: dict[str, Any] = {"fastrnn": fastrnn, "torch": nn, "neither": None}


class Model(nn.Module):
    """Language model: words [T,B] and the words that follow them [T,B] give the loss."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, SIZE)
        chosen = LIBRARIES[library]
        self.recurrent = None if chosen is None else chosen.LSTM(SIZE, SIZE, LAYERS)
        self.decoder = nn.Linear(SIZE, VOCABULARY)

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        x = self.embedding(words)
        if self.recurrent is not None:
            x, _ = self.recurrent(x)
        scores = self.decoder(x).flatten(0, 1)
        return nn.functional.cross_entropy(scores, following.flatten())


def measure(library: str, steps: int, dynamic: bool) -> dict[str, float]:
    """Returns seconds and nodes. Call it once per process."""
    torch._dynamo.config.allow_rnn = True
    nodes: list[int] = []
    inductor_config.post_grad_custom_post_pass = lambda graph: nodes.append(len(graph.nodes))
    start = time.perf_counter()
    # like a real model: with a backward pass and more than one loop
    leaf = torch.zeros(64, 64, requires_grad=True)
    torch.compile(lambda t: (t.sin() + 1).sum())(leaf).backward()
    setup = time.perf_counter() - start
    nodes.clear()
    model = Model(library)
    words, following = torch.randint(VOCABULARY, (2, steps, BATCH))
    compiled = torch.compile(model, fullgraph=True, dynamic=True if dynamic else None)
    start = time.perf_counter()
    loss = compiled(words, following)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    return {
        "setup": setup,
        "forward": middle - start,
        "backward": end - middle,
        "seconds": end - start,
        "nodes": sum(nodes),
    }


def measure_apart(library: str, steps: int, dynamic: bool, limit: float) -> dict[str, float]:
    """Runs `measure` in a separate process, without caches on disk.

    Raises:
        subprocess.TimeoutExpired: the process takes more than ``limit`` seconds.
        RuntimeError: the process fails.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--one", library, str(steps), str(dynamic)],
        env={**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def fastest(
    library: str, steps: int, dynamic: bool, limit: float, repeat: int
) -> dict[str, float] | None:
    """Fastest of ``repeat`` measurements, None if one takes more than ``limit`` seconds."""
    best: dict[str, float] | None = None
    for _ in range(repeat):
        try:
            found = measure_apart(library, steps, dynamic, limit)
        except subprocess.TimeoutExpired:
            return None
        if best is None or found["seconds"] < best["seconds"]:
            best = found
        if found["seconds"] > 60:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 35, 100], help="values of T")
    parser.add_argument("--repeat", type=int, default=1, help="measurements; the fastest counts")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds per measurement")
    parser.add_argument("--json", type=Path, help="file that also gets the results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # library, T, whether dynamic
    options = parser.parse_args()
    if options.one is not None:
        library, steps, dynamic = options.one
        print(json.dumps(measure(library, int(steps), dynamic == "True")))
        return
    about = machine(torch.get_num_threads(), ())
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("".join(f"{name:>10}" for name in ("library", "T", *COLUMNS)))
    tasks = [("neither", options.steps[0], False)]
    tasks += [("fastrnn", steps, False) for steps in options.steps]
    tasks += [("fastrnn", options.steps[0], True)]
    tasks += [("torch", steps, False) for steps in options.steps]
    lines = []
    for library, steps, dynamic in tasks:
        found = fastest(library, steps, dynamic, options.limit, options.repeat)
        line: dict[str, Any] = {"library": library, "T": steps, "dynamic": dynamic}
        print(f"{library:>10}{f'{steps}, any' if dynamic else steps:>10}", end="")
        if found is None:
            line["more_than"] = options.limit
            print(f"   more than {options.limit:g} seconds", flush=True)
        else:
            line |= found
            times = "".join(f"{found[name]:10.2f}" for name in COLUMNS[:-1])
            print(f"{times}{found['nodes']:10}", flush=True)
        lines.append(line)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": about, "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
