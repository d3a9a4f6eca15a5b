"""``fastrnn info``: build, machine and execution plans."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastrnn import _C, _library

#: (cell, T, B, I, H) of the plans shown
SHAPES = (
    ("rnn_tanh", 100, 1, 64, 64),
    ("gru", 100, 16, 128, 128),
    ("lstm", 100, 16, 128, 128),
    ("lstm", 35, 64, 650, 650),
)
#: batches for which the computation of bfloat16 and int8 is shown
BATCHES = (1, 16)


def info() -> dict[str, Any]:
    """Returns versions, CPU, CUDA and plans as plain data.

    Returns:
        A dictionary with the keys ``versions``, ``cpu``, ``cuda`` and ``plans``. A plan holds a
        shape and the result of ``fastrnn._C.plan`` for its forward and backward pass.
    """
    _library.load()
    build = _C.build_info()
    threads = torch.get_num_threads()
    bound = _C.max_threads()
    return {
        "versions": {
            "fastrnn": build["version"],
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": build["compiler"],
            "torch built against": build["torch_built_against"],
        },
        "cpu": {
            "isa": _C.cpu_capability(),
            "available": _C.available_isas(),
            "compiled": build["isas"],
            "threads": min(threads, bound) if bound else threads,
            "bfloat16": {
                str(batch): _C.plan("lstm", 100, batch, 128, 128, dtype="bfloat16")["bfloat16"]
                for batch in BATCHES
            },
            "int8": {
                str(batch): _C.plan("lstm", 100, batch, 128, 128, dtype="int8")["int8"]
                for batch in BATCHES
            },
        },
        "cuda": {
            "kernels": _library.cuda_kernels,
            "why not": _library.why_no_cuda,
            "toolkit": build["cuda_version"],
            "archs": build["cuda_archs"],
            "devices": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
        "plans": [
            {
                "cell": cell,
                "T": steps,
                "B": batch,
                "I": inputs,
                "H": hidden,
                "forward": _C.plan(cell, steps, batch, inputs, hidden, threads=threads),
                "backward": _C.plan(
                    cell, steps, batch, inputs, hidden, threads=threads, training=True
                ),
            }
            for cell, steps, batch, inputs, hidden in SHAPES
        ],
    }


def lines() -> Iterator[str]:
    """Yields the lines of `info` in readable form."""
    facts = info()
    for name, value in facts["versions"].items():
        yield f"{name:<20} {value}"
    cpu = facts["cpu"]
    yield f"{'cpu':<20} {cpu['isa']} of {', '.join(cpu['available'])}; {cpu['threads']} threads"
    for dtype in ("bfloat16", "int8"):
        for batch, how in cpu[dtype].items():
            yield f"{dtype:<20} inference, batch {batch}: {how}"
    cuda = facts["cuda"]
    state = "kernels loaded" if cuda["kernels"] else f"no kernels: {cuda['why not']}"
    if cuda["archs"]:
        state += f" (built with CUDA {cuda['toolkit']} for {', '.join(cuda['archs'])})"
    yield f"{'cuda':<20} {state}"
    yield f"{'gpus':<20} {', '.join(cuda['devices']) or 'none'}"
    yield "execution plans on the CPU in float32:"
    for plan in facts["plans"]:
        yield f"  {plan['cell']} T={plan['T']} B={plan['B']} I={plan['I']} H={plan['H']}"
        for way in ("forward", "backward"):
            yield f"    {way:<9} {plan_text(plan[way], way == 'forward')}"


def plan_text(plan: Mapping[str, Any], forward: bool) -> str:
    """Returns a CPU plan of ``fastrnn._C.plan`` as one line.

    Args:
        plan: the plan.
        forward: whether it is the plan of a forward pass.
    """
    return (
        f"{plan['isa']}, {plan['threads']} threads: "
        f"{plan['row_groups']} row groups x {plan['unit_groups']} unit groups, "
        f"weights {'packed' if plan['packed'] else 'unpacked'}"
        + (f", input {plan['input']}" if forward else "")
        + (", directions together" if plan["together"] > 1 else "")
        + (", layers in pairs" if plan["stacked"] else "")
    )
