"""Steps of a session, from Python and from C, compared with other libraries.

    python bench/session.py [--cells lstm gru] [--sizes 8 64 96 256 512] [--seconds 1] [--json FILE]

One thread, float32, T = B = 1, I = H. From Python: medians in us of interleaved calls
(`fastrnn.tools.benchmark.timing`), and the time divided by that of ONNX Runtime, whose session has
bound buffers and, unlike ours, keeps no state. From C (`bench/session_step.c`, compiled with cc):
the least time per step, and the part of the speed at which the same core reads as many bytes as the
weights have, measured interleaved in the same program.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastrnn
from fastrnn import c_interface
from fastrnn.tools.benchmark.measure import machine
from fastrnn.tools.benchmark.peers import LIBRARIES, torch_layer
from fastrnn.tools.benchmark.shapes import Shape, Task
from fastrnn.tools.benchmark.timing import interleaved

SOURCE = Path(__file__).with_name("session_step.c")
#: layers of `torch.nn` have cells for single steps; the others run a layer with T = 1
SINGLE = ("torch",)
PEERS = ("torch", "onnxruntime", "openvino")


def layer_of(cell: str, size: int) -> nn.Module:
    """Returns the layer with the weights that all libraries get."""
    theirs = torch_layer(Task(cell, "forward", Shape("session", 1, 1, size, size), 1))
    ours: nn.Module = getattr(fastrnn, type(theirs).__name__)(size, size)
    ours.load_state_dict(theirs.state_dict())
    return ours


def calls_of(cell: str, size: int) -> dict[str, Any]:
    """Returns the step of each library by its name."""
    shape = Shape("session", 1, 1, size, size)
    session, x = layer_of(cell, size).stream(), torch.randn(1, size)
    calls: dict[str, Any] = {"session": lambda: session.step(x)}
    for library in LIBRARIES:
        if library.name in PEERS and library.installed:
            own = replace(shape, single=library.name in SINGLE)
            calls[library.name] = library.prepare(Task(cell, "forward", own, 1))
    return calls


def compile_program(folder: Path) -> Path | None:
    """Returns the compiled session_step.c, or None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    program = folder / "session_step"
    paths = [*c_interface.compile_flags(), str(SOURCE), *c_interface.link_flags()]
    flags = ["-O3", "-march=native", "-ffast-math"]
    subprocess.run([compiler, *flags, *paths, "-o", str(program)], check=True)
    return program


def steps_in_c(program: Path, folder: Path, cell: str, size: int) -> dict[str, float]:
    """Returns us per step, us per read of the same bytes, and GB/s of both."""
    layer = layer_of(cell, size)
    model = folder / "model.safetensors"
    layer.stream().export(model)
    weights = sum(w.numel() for name, w in layer.state_dict().items() if name.startswith("weight"))
    steps = max(20, 20_000_000 // weights)
    command = [program, model, 4 * weights, steps, 60]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    step, read = map(float, done.stdout.split())
    return {
        "step us": step / 1e3,
        "read us": read / 1e3,
        "step GB/s": 4 * weights / step,
        "read GB/s": 4 * weights / read,
        "of limit": read / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells", nargs="+", default=["lstm", "gru"], choices=["rnn", "lstm", "gru"]
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 64, 96, 256, 512])
    parser.add_argument("--seconds", type=float, default=1.0, help="per library and shape")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = compile_program(folder)
        print(
            "| cell, H | " + " | ".join(["session", *PEERS, "/ ORT", "C step", "of limit"]) + " |"
        )
        print("|---" * (len(PEERS) + 5) + "|")
        for cell in options.cells:
            for size in options.sizes:
                with torch.inference_mode():
                    samples = interleaved(calls_of(cell, size), options.seconds)
                times = {key: 1e6 * statistics.median(values) for key, values in samples.items()}
                in_c = steps_in_c(program, folder, cell, size) if program else {}
                found.append({"cell": cell, "H": size, "python us": times, "c": in_c})
                ratio = times["session"] / times.get("onnxruntime", float("nan"))
                columns = [
                    f"{times[key]:.2f}" if key in times else "" for key in ("session", *PEERS)
                ]
                columns += [f"{ratio:.2f}"]
                columns += (
                    [f"{in_c['step us']:.2f}", f"{in_c['of limit']:.0%}"] if in_c else ["", ""]
                )
                print(f"| {cell} {size} | " + " | ".join(columns) + " |", flush=True)
    about = machine(1, LIBRARIES)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
