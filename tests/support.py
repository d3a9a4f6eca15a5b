"""Builds the same recurrent module in fastrnn, torch and float64, and runs all three alike."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tolerance import assert_all_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn
from fastrnn import functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# name -> (class, keyword arguments that make it this cell)
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("RNN", {"nonlinearity": "sigmoid"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
TORCH_CELLS = [name for name in CELLS if name != "rnn_sigmoid"]


def build(cell: str, *args: Any, **options: Any) -> nn.Module:
    """A fastrnn module with parameters from a fixed seed; options as for the constructor."""
    name, own = CELLS[cell]
    torch.manual_seed(17)
    module: nn.Module = getattr(fastrnn, name)(*args, **own, **options)
    return module


def torch_twin(module: nn.Module) -> nn.Module:
    """The torch.nn module with the same options and copies of the same parameters."""
    twin = copy.deepcopy(module)
    twin.__class__ = getattr(nn, type(module).__name__)
    return twin


@contextmanager
def reference_math() -> Iterator[None]:
    """Inside, fastrnn computes with `fastrnn.reference`, whatever the dtype and the device."""
    route = functional._route
    functional._route = lambda x: reference.layer
    try:
        yield
    finally:
        functional._route = route


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that are the same, but for rounding, in every dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def pack(rows: Tensor, lengths: Sequence[int], enforce_sorted: bool) -> PackedSequence:
    """Packs sequences of these lengths, cut from ``rows`` [sum of lengths, I]."""
    return pack_sequence(list(rows.split(list(lengths))), enforce_sorted=enforce_sorted)


def run(module: nn.Module, x: Any, hx: Any = None, seed: int = 0) -> dict[str, Tensor]:
    """Forward and backward through ``module``: every output and every gradient by name.

    Args:
        module: a recurrent module or cell.
        x: its input; a leaf that requires a gradient gets one.
        hx: its initial state or states, or None.
        seed: of the weights that the outputs get in the loss, and of dropout.
    """
    torch.manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    _flatten(module(x, hx), "out", outputs)
    generator = torch.Generator().manual_seed(seed)
    # of one sign, lest the sums over steps and rows cancel and show nothing but rounding
    weights = [
        (random(generator, *o.shape, dtype=torch.float64).abs() + 0.5).to(o.device, o.dtype)
        for o in outputs.values()
    ]
    leaves: dict[str, Tensor] = dict(module.named_parameters())
    _flatten(x, "x", leaves)
    _flatten(hx, "hx", leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(
        list(outputs.values()), list(wanted.values()), weights, allow_unused=True
    )
    result = {name: output.detach() for name, output in outputs.items()}
    for name, gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            result[f"d_{name}"] = gradient
    return result


def _flatten(value: Any, name: str, into: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        into[name] = value
    elif isinstance(value, PackedSequence):
        into[name] = value.data
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            _flatten(item, f"{name}{index}", into)


def check(
    module: nn.Module, x: Any, hx: Any = None, seed: int = 0, shakes: int = 0
) -> dict[str, Tensor]:
    """Runs ``module``, torch's twin and the float64 truth, and compares all that comes out.

    Where torch has no such cell, the composite of torch operations in the same dtype stands in.
    ``shakes`` is how many more truths, from slightly different inputs, show the conditioning.
    """
    ours = run(module, x, hx, seed)
    if isinstance(module, fastrnn.RNN | fastrnn.RNNCell) and module.nonlinearity == "sigmoid":
        with reference_math():
            theirs = run(module, x, hx, seed)
    else:
        theirs = run(torch_twin(module), x, hx, seed)
    with reference_math():
        truth = run(copy.deepcopy(module).double(), to_double(x), to_double(hx), seed)
        shaken = [_run_shaken(module, x, hx, seed) for _ in range(shakes)]
    assert_all_close(ours, theirs, truth, shaken)
    return ours


def _run_shaken(module: nn.Module, x: Any, hx: Any, seed: int) -> dict[str, Tensor]:
    eps = torch.finfo(next(module.parameters()).dtype).eps

    def shake(value: Tensor) -> Tensor:
        return value * (1 + eps * (2 * torch.rand_like(value) - 1))

    wide = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(shake(parameter))
    return run(wide, to_double(x, shake), to_double(hx, shake), seed)


def to_double(value: Any, change: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
    """The same values in float64, perhaps with a ``change``, as new leaves."""
    if isinstance(value, Tensor):
        return change(value.detach().double()).requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return PackedSequence(to_double(value.data, change), *value[1:])
    if isinstance(value, tuple | list):
        return type(value)(to_double(item, change) for item in value)
    return value


def run_python(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter and returns what it prints.

    Away from this folder: the package in it may be the source without its libraries.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tempfile.gettempdir(),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
