"""Builds the same recurrent module in fastrnn, torch and float64, and runs all three alike."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tolerance import Change, Exact, assert_agrees, widen
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import functional, ops, reference

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


def make_step(cell: str, *args: Any, **options: Any) -> nn.Module:
    """The fastrnn module of one step of this cell."""
    name, own = CELLS[cell]
    module: nn.Module = getattr(fastrnn, name + "Cell")(*args, **own, **options)
    return module


def torch_twin(module: nn.Module) -> nn.Module:
    """The torch.nn module with the same options and copies of the same parameters."""
    twin = copy.deepcopy(module)
    twin.__class__ = getattr(nn, type(module).__name__)
    return twin


@contextmanager
def reference_math() -> Iterator[None]:
    """Inside, fastrnn computes with `fastrnn.reference`, whatever the dtype and the device."""
    route, is_plain = functional._route, ops.is_plain
    functional._route = lambda x: reference.layer
    ops.is_plain = lambda: False  # nor the shortest way, which asks nobody for the route
    try:
        yield
    finally:
        functional._route, ops.is_plain = route, is_plain


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011 - the caller compares type and message
        call()
    return info.value


def states(name: str, *shape: int, **options: Any) -> Any:
    """One state of this shape, or a pair of them for an LSTM."""
    state = torch.zeros(shape, **options)
    return (state, state) if name.startswith("LSTM") else state


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that are the same, but for rounding, in every dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def pack(rows: Tensor, lengths: Sequence[int], enforce_sorted: bool) -> PackedSequence:
    """Packs sequences of these lengths, cut from ``rows`` [sum of lengths, I]."""
    return pack_sequence(list(rows.split(list(lengths))), enforce_sorted=enforce_sorted)


def run(
    module: nn.Module,
    x: Any,
    hx: Any = None,
    seed: int = 0,
    weigh: Callable[[Tensor], Tensor] = Tensor.detach,
) -> dict[str, Tensor]:
    """Forward and backward through ``module``: every output and every gradient by name.

    Args:
        module: a recurrent module or cell.
        x: its input; a leaf that requires a gradient gets one.
        hx: its initial state or states, or None.
        seed: of the weights that the outputs get in the loss, and of dropout.
        weigh: changes these weights, so that those of the truth are the rounded ones.
    """
    torch.manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    _flatten(module(x, hx), "out", outputs)
    generator = torch.Generator().manual_seed(seed)
    # of one sign, lest the sums over steps and rows cancel and show nothing but rounding
    weights = [
        weigh(random(generator, *o.shape, dtype=torch.float64).abs() + 0.5).to(o.device, o.dtype)
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


class Case:
    """A module as a function of all that it can be differentiated by: a few rows and steps.

    Args:
        cell: a key of `CELLS`.
        options: for the constructor of a layer.
        packed: whether a layer gets packed sequences of different lengths, unsorted.
        step: whether this is the module of a single step.
        dtype, device: of all tensors.
    """

    def __init__(
        self,
        cell: str,
        options: dict[str, Any] | None = None,
        packed: bool = False,
        step: bool = False,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        new = {"dtype": dtype, "device": device}
        if step:
            torch.manual_seed(17)
            self.module, rows, states = make_step(cell, 2, 3, **new), (3,), ()
            projected = 3
        else:
            self.module, rows = build(cell, 2, 3, **(options or {}), **new), (3, 3)
            states = (self.module.num_layers * (2 if self.module.bidirectional else 1),)
            projected = self.module.proj_size or 3
        self.names = [name for name, _ in self.module.named_parameters()]
        x = torch.randn(*rows, 2, **new)
        self.packed = pack(torch.randn(6, 2, **new), [1, 3, 2], False) if packed else None
        hx = [torch.randn(*states, 3, projected, **new)]
        if cell == "lstm":
            hx.append(torch.randn(*states, 3, 3, **new))
        self.states = len(hx)
        weights = [parameter.detach().clone() for parameter in self.module.parameters()]
        x = x if self.packed is None else self.packed.data
        self.inputs = [t.requires_grad_() for t in (x, *hx, *weights)]

    def __call__(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """x, states and weights give the output and the states, the packed ones' data."""
        hx: Any = rest[0] if self.states == 1 else rest[:2]
        weights = dict(zip(self.names, rest[self.states :], strict=True))
        argument = x if self.packed is None else self.packed._replace(data=x)
        outputs: dict[str, Tensor] = {}
        _flatten(functional_call(self.module, weights, (argument, hx)), "out", outputs)
        return tuple(outputs.values())

    def loss(self, *inputs: Tensor) -> Tensor:
        """A number whose second derivatives by the inputs do not vanish."""
        return sum((output.square().sum() for output in self(*inputs)), torch.zeros(()))

    def plain(self) -> tuple[Tensor, ...]:
        """The inputs without a graph."""
        return tuple(t.detach() for t in self.inputs)


class CountOps(TorchDispatchMode):
    """Inside, counts what torch is asked to compute: ``counts`` of the operators' names.

    Views and allocations are no computation and left out.
    """

    _FREE = frozenset(
        "aten." + name
        for name in (
            "alias _unsafe_view as_strided chunk detach empty expand lift_fresh new_empty "
            "new_zeros permute select slice split split_with_sizes squeeze t transpose unbind "
            "unsqueeze view zeros"
        ).split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket)
        if name not in self._FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _flatten(value: Any, name: str, into: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        into[name] = value
    elif isinstance(value, PackedSequence):
        into[name] = value.data
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            _flatten(item, f"{name}{index}", into)


def check(module: nn.Module, x: Any, hx: Any = None, seed: int = 0) -> dict[str, Tensor]:
    """Runs ``module``, torch's twin and the float64 truth, and compares all that comes out.

    Where torch has no such cell, the composite of torch operations in the same dtype stands in.
    """
    ours = run(module, x, hx, seed)
    if isinstance(module, fastrnn.RNN | fastrnn.RNNCell) and module.nonlinearity == "sigmoid":
        with reference_math():
            theirs = run(module, x, hx, seed)
    else:
        with _cudnn_if_it_can(module, hx):
            theirs = run(torch_twin(module), x, hx, seed)
    assert_agrees(ours, theirs, exact_run(module, x, hx, seed))
    return ours


def exact_run(module: nn.Module, x: Any, hx: Any = None, seed: int = 0) -> Exact:
    """For `assert_agrees`: `run` in float64, with the composite of torch operations."""
    dtype = next(module.parameters()).dtype

    def exact(change: Change) -> dict[str, Tensor]:
        def weigh(weight: Tensor) -> Tensor:
            return change(weight.to(dtype))

        inputs = (to_double(x, change), to_double(hx, change))
        with reference_math():
            return run(changed(module, change), *inputs, seed, weigh)

    return exact


def exact_call(
    module: nn.Module, *inputs: Any, call: Callable[..., Any] = nn.Module.__call__
) -> Exact:
    """For `assert_agrees`: ``call(module, *inputs)`` in float64, by torch's operations."""

    def exact(change: Change) -> Any:
        with reference_math():
            return call(changed(module, change), *(to_double(value, change) for value in inputs))

    return exact


def changed(module: nn.Module, change: Change) -> nn.Module:
    """A copy of the module in float64 whose parameters have gone through ``change``."""
    wide = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter, own in zip(wide.parameters(), module.parameters(), strict=True):
            parameter.copy_(change(own))
    return wide


@contextmanager
def _cudnn_if_it_can(module: nn.Module, hx: Any) -> Iterator[None]:
    """cuDNN has no gradients in eval mode and takes no strided states; torch's own kernels do."""
    given = hx if isinstance(hx, tuple | list) else (hx,)
    was = torch.backends.cudnn.enabled
    can = module.training and all(state is None or state.is_contiguous() for state in given)
    torch.backends.cudnn.enabled = was and can
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = was


def to_double(value: Any, change: Change = widen) -> Any:
    """The same values in float64, perhaps changed a little, as new leaves."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return change(value).requires_grad_(value.requires_grad)
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
