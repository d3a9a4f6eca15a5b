"""Builds a recurrent module in fastrnn, torch.nn and float64, and compares their results."""

from __future__ import annotations

import copy
import itertools
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
from fastrnn.engine import choose
from fastrnn.engine.run import run as run_layers
from fastrnn.layer_call import LayerCall, Options, Results, SequenceMembers
from fastrnn.modules.rnn import LAYERS
from fastrnn.ops import kernel_layer
from fastrnn.reference import reference_layer, reference_step
from fastrnn.spec import CELLS as SPECS
from fastrnn.spec import (
    FIRST_SEQUENCE_SLOT,
    WEIGHT_SLOTS,
    CellSpec,
    Weights,
    present,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# name -> (class, keyword arguments that make it this cell)
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    cell: (layer.__name__, options) for cell, (layer, options) in LAYERS.items()
}
TORCH_CELLS = [name for name in CELLS if SPECS[name].torch.torch_function is not None]


def build(cell: str, *args: Any, **options: Any) -> nn.Module:
    """Returns a fastrnn layer with fixed random weights; options are those of the constructor."""
    name, own = CELLS[cell]
    torch.manual_seed(17)
    module: nn.Module = getattr(fastrnn, name)(*args, **own, **options)
    return module


def make_step(cell: str, *args: Any, **options: Any) -> nn.Module:
    """Returns the fastrnn module that computes a single step of the cell."""
    name, own = CELLS[cell]
    if not hasattr(fastrnn, name + "Cell"):
        pytest.skip(f"fastrnn has no {name}Cell")
    module: nn.Module = getattr(fastrnn, name + "Cell")(*args, **own, **options)
    return module


class CellLayer(nn.Module):
    """A layer of any cell of the registry, also of one that no public module offers.

    Args:
        cell: name of the cell.
        input_size, hidden_size, num_layers, bias, bidirectional: as for a public module.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        bidirectional: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec = SPECS[cell]
        self.num_layers, self.hidden_size = num_layers, hidden_size
        self.directions = 2 if bidirectional else 1
        self.slots = self.spec.slots(bias)
        rows = self.spec.gates * hidden_size
        generator = torch.Generator().manual_seed(17)
        names = [WEIGHT_SLOTS[slot] for slot in present(self.slots)]
        for index in range(num_layers * self.directions):
            inputs = input_size if index < self.directions else self.directions * hidden_size
            sizes = {"w_ih": (rows, inputs), "w_hh": (rows, hidden_size), "b_ih": (rows,)}
            sizes |= {"b_hh": (rows,), "w_unit": (self.spec.parameters * hidden_size,)}
            for name in names:
                value = 0.5 * random(generator, *sizes[name], dtype=torch.float64)
                self.register_parameter(f"{name}_{index}", nn.Parameter(value.to(dtype)))

    def call(self, x: Any, hx: Any = None) -> LayerCall:
        """The call of this layer; hx as of a public module, zeros if None."""
        packed = isinstance(x, PackedSequence)
        data, sizes = (x.data, x.batch_sizes) if packed else (x, None)
        batch = int(sizes[0]) if packed else x.shape[1]
        if hx is None:
            count = self.num_layers * self.directions
            h = data.new_zeros(count, batch, self.hidden_size)
            c = data.new_zeros(count, batch, self.spec.cell_states * self.hidden_size)
            hx = (h, c) if self.spec.has_cell_state else h
        h, c = hx if self.spec.has_cell_state else (hx, None)
        weights = Weights(list(self.parameters()), self.slots)
        sequence = SequenceMembers(sizes).pack()
        return LayerCall(self.spec, data, sequence, h, c, weights, Options(self.num_layers))

    def forward(self, x: Any, hx: Any = None) -> Any:
        y, h_n, c_n = run_layers(self.call(x, hx))
        output = x._replace(data=y) if isinstance(x, PackedSequence) else y
        return output, h_n if c_n is None else (h_n, c_n)


def is_in_torch(module: nn.Module) -> bool:
    """Whether torch.nn has a module for this cell."""
    is_sigmoid = getattr(module, "nonlinearity", "") == "sigmoid"
    return hasattr(nn, type(module).__name__) and not is_sigmoid


def torch_twin(module: nn.Module) -> nn.Module:
    """Returns the torch.nn module with the same options and copies of the parameters."""
    twin = copy.deepcopy(module)
    twin.__class__ = getattr(nn, type(module).__name__)
    return twin


@contextmanager
def reference_math() -> Iterator[None]:
    """A context in which fastrnn computes with `fastrnn.reference`, for any dtype and device."""
    with choose.override(_Reference()):
        yield


class _Reference:
    """`fastrnn.reference` as a backend."""

    NAME = "reference"
    WHOLE_STACK = False

    def unsupported(self, call: LayerCall, /) -> str:
        return ""

    def run(self, call: LayerCall, /) -> Results:
        return reference_step(call) if call.is_step else reference_layer(call)


#: the bit of batch_sizes in an operator's ``slots``
PACKED = 1 << FIRST_SEQUENCE_SLOT


def slots_by_count(count: int, spec: CellSpec = SPECS["lstm"]) -> int:
    """Returns the weight slots of a direction with this number of weights."""
    projections = (False, True) if spec.projects else (False,)
    choices = [spec.slots(*has) for has in itertools.product((False, True), projections)]
    (slots,) = [slots for slots in choices if slots.bit_count() == count]
    return slots


def layer_call(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
    num_layers: int = 1,
    weight_format: int = 0,
) -> LayerCall:
    """The call of a stack of layers, or of one step (h0 [B,R])."""
    states = h0.shape[0] if h0.dim() == 3 else 1
    named = Weights(weights, slots_by_count(len(weights) // states, spec))
    options = Options(num_layers, 0.0, weight_format)
    sequence = SequenceMembers(batch_sizes).pack()
    return LayerCall(spec, x, sequence, h0, c0, named, options)


def by_kernels(*args: Any, **options: Any) -> Results:
    """Runs one layer by the kernels; arguments of `layer_call`."""
    return kernel_layer(layer_call(*args, **options))


def by_reference(*args: Any) -> Results:
    """Runs one layer by the reference; arguments of `layer_call`."""
    return reference_layer(layer_call(*args))


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011 - the caller compares type and message
        call()
    return info.value


def states(name: str, *shape: int, **options: Any) -> Any:
    """Returns one state of this shape, or a pair of states for an LSTM."""
    state = torch.zeros(shape, **options)
    return (state, state) if name.startswith("LSTM") else state


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Returns normal numbers that differ between dtypes only by rounding."""
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
    """Runs forward and backward. Returns every output and gradient by name.

    Args:
        module: a recurrent module or cell.
        x: the input. The result contains its gradient if it is a leaf that requires one.
        hx: the initial state or states, or None.
        seed: seed of dropout and of the weights of the outputs in the loss.
        weigh: applied to the weights of the outputs, so that the exact run uses rounded ones.
    """
    torch.manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    _flatten(module(x, hx), "out", outputs)
    generator = torch.Generator().manual_seed(seed)
    # All weights are positive, so that sums over steps and rows do not cancel to rounding errors.
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
    """A small module as a function of its input, states and weights, for tests of derivatives.

    Args:
        cell: a key of `CELLS`.
        options: arguments of the constructor of a layer.
        packed: whether the layer gets packed, unsorted sequences of different lengths.
        step: uses the module of a single step instead of a layer.
        dtype, device: dtype and device of all tensors.
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
        """Returns output and states for x, states and weights; for packed input, its data."""
        hx: Any = rest[0] if self.states == 1 else rest[:2]
        weights = dict(zip(self.names, rest[self.states :], strict=True))
        argument = x if self.packed is None else self.packed._replace(data=x)
        outputs: dict[str, Tensor] = {}
        _flatten(functional_call(self.module, weights, (argument, hx)), "out", outputs)
        return tuple(outputs.values())

    def loss(self, *inputs: Tensor) -> Tensor:
        """Returns a scalar whose second derivatives with respect to the inputs are not zero."""
        return sum((output.square().sum() for output in self(*inputs)), torch.zeros(()))

    def plain(self) -> tuple[Tensor, ...]:
        """Returns the inputs without autograd history."""
        return tuple(t.detach() for t in self.inputs)


class CountOps(TorchDispatchMode):
    """A context that counts the operators that torch runs, by name, in ``counts``.

    Does not count views and allocations.
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
    """Runs ``module``, its torch.nn twin and the float64 reference, and compares all results.

    For a cell that torch lacks, a composite of torch operations in the same dtype replaces the
    twin.
    """
    ours = run(module, x, hx, seed)
    if is_in_torch(module):
        with _cudnn_if_it_can(module, hx):
            theirs = run(torch_twin(module), x, hx, seed)
    else:
        with reference_math():
            theirs = run(module, x, hx, seed)
    assert_agrees(ours, theirs, exact_run(module, x, hx, seed))
    return ours


def exact_run(module: nn.Module, x: Any, hx: Any = None, seed: int = 0) -> Exact:
    """Returns the exact function for `assert_agrees`: `run` in float64 with torch operations."""
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
    """Returns the exact function for `assert_agrees`: ``call`` in float64 with torch operations."""

    def exact(change: Change) -> Any:
        with reference_math():
            return call(changed(module, change), *(to_double(value, change) for value in inputs))

    return exact


def changed(module: nn.Module, change: Change) -> nn.Module:
    """Returns a float64 copy of the module with ``change`` applied to its parameters."""
    wide = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter, own in zip(wide.parameters(), module.parameters(), strict=True):
            parameter.copy_(change(own))
    return wide


@contextmanager
def _cudnn_if_it_can(module: nn.Module, hx: Any) -> Iterator[None]:
    """Turns cuDNN off for gradients in eval mode and for strided states, which it lacks."""
    given = hx if isinstance(hx, tuple | list) else (hx,)
    was = torch.backends.cudnn.enabled
    can = module.training and all(state is None or state.is_contiguous() for state in given)
    torch.backends.cudnn.enabled = was and can
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = was


def to_double(value: Any, change: Change = widen) -> Any:
    """Returns the values in float64, with ``change`` applied, as new leaves."""
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
    """Runs code in a fresh interpreter and returns its output.

    Runs it in another folder, because the source tree may hold the package without its libraries.
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
