"""CUDA kernels of linear recurrences without a GPU: their source, compiled for the host.

The harness replaces launches by plain loops. They have never run on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import Change, assert_agrees, assert_same_in_double
from torch import Tensor

from fastrnn.ops import ScanCall, ScanInputs, composite_scan_layer

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CELLS = ["linear", "min_gru", "min_lstm", "sru"]  # in the order of csrc/cells/scan_registry.h
GATES = {"min_gru": 2, "min_lstm": 3, "sru": 4}
MOST_INPUTS = 4


class Call(ctypes.Structure):
    """The struct `Call` of the harness."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("cell", "positive", "reverse", "steps", "batch")]
        + [(name, ctypes.c_int64) for name in ("units", "chunks", "descending")]
        + [(name, ctypes.c_void_p * MOST_INPUTS) for name in ("in_", "bias")]
        + [("stride", ctypes.c_int64 * MOST_INPUTS)]
        + [(name, ctypes.c_void_p) for name in ("h0", "lengths", "resets", "reset_h")]
        + [("reset_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("h", "y", "h_n", "d_y", "d_h_n")]
        + [("d_in", ctypes.c_void_p * MOST_INPUTS)]
        + [(name, ctypes.c_void_p) for name in ("d_h0", "d_reset_h")]
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compiles the harness."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("scan_host") / "harness.so"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "tests" / "cuda" / "host" / "scan_harness.cpp"
    command = [*compiler, *flags, "-I", str(ROOT / "csrc"), str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    library.call_bytes.restype = library.planned_chunks.restype = ctypes.c_int64
    assert library.call_bytes() == ctypes.sizeof(Call)
    return library


def at(t: Tensor | None, offset: int = 0) -> int | None:
    return None if t is None else t.data_ptr() + offset * t.element_size()


def poison(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.full(sizes, float("nan"), dtype=dtype)


def run_kernels(
    library: ctypes.CDLL, call: ScanCall, inputs: ScanInputs, chunks: int, descending: bool
) -> list[Tensor]:
    """Returns y, h_n, and the gradients for those of `outputs_of` by the kernels."""
    pre, bias, x, h0, reset_h = inputs
    dtype, (steps, batch, width) = pre.dtype, pre.shape
    gates = GATES[call.cell] - (x is not None)
    units = width // gates
    y, h_n = poison(steps, batch, units, dtype=dtype), poison(batch, units, dtype=dtype)
    states = torch.empty_like(y) if call.cell == "sru" else y
    own = Call(
        cell=CELLS.index(call.cell),
        positive=call.positive,
        reverse=call.reverse,
        steps=steps,
        batch=batch,
        units=units,
        chunks=chunks,
        descending=descending,
        h0=at(h0),
        lengths=at(call.lengths),
        resets=at(call.resets),
        reset_h=at(reset_h),
        reset_stride=0 if reset_h is None or reset_h.shape[0] == 1 else batch * units,
        h=at(states),
        y=at(y),
        h_n=at(h_n),
    )
    for i in range(gates):
        own.in_[i], own.bias[i], own.stride[i] = at(pre, i * units), at(bias, i * units), width
    if x is not None:
        own.in_[gates], own.stride[gates] = at(x), units
    number = DTYPES.index(dtype)
    library.run_forward(ctypes.byref(own), number)

    d_y, d_h_n = weights_of(y), weights_of(h_n)
    d_pre, d_h0 = poison(*pre.shape, dtype=dtype), poison(batch, units, dtype=dtype)
    d_x = None if x is None else poison(*x.shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # zeros, to which the kernels add
    d_reset_h = None if reset_h is None else torch.zeros(reset_h.shape, dtype=wide)
    own.d_y, own.d_h_n, own.d_h0, own.d_reset_h = at(d_y), at(d_h_n), at(d_h0), at(d_reset_h)
    for i in range(gates):
        own.d_in[i] = at(d_pre, i * units)
    if x is not None:
        own.d_in[gates] = at(d_x)
    own.chunks = chunks if reset_h is None else 1
    library.run_backward(ctypes.byref(own), number)
    gradients = [d_pre, d_x, d_h0, None if d_reset_h is None else d_reset_h.to(dtype)]
    return [y, h_n, *[d for d in gradients if d is not None]]


def weights_of(t: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).to(t.dtype).view_as(t)


def run_composite(call: ScanCall, inputs: ScanInputs) -> list[Tensor]:
    """Returns the same by torch's operations; half types compute in float32."""
    dtype = inputs.pre.dtype
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [None if t is None else t.to(wide).requires_grad_() for t in inputs]
    y, h_n, _ = composite_scan_layer(call, ScanInputs(*leaves))
    wanted = [t for i, t in enumerate(leaves) if t is not None and i != 1]  # not bias
    d_outputs = [weights_of(y.detach().to(dtype)).to(wide), weights_of(h_n.detach()).to(wide)]
    gradients = torch.autograd.grad((y, h_n), wanted, d_outputs)
    return [t.detach().to(dtype) for t in (y, h_n, *gradients)]


def make_inputs(
    cell: str, steps: int, batch: int, units: int, dtype: torch.dtype, marks: bool, x: bool
) -> tuple[ScanInputs, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(steps + units)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    width = (GATES[cell] - x) * units
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator) if marks else None
    resets = torch.rand(steps, batch, generator=generator) < 0.3 if marks else None
    per_step = steps if units % 2 else 1
    reset_h = draw(per_step, batch, units) if marks else None
    skipped = draw(steps, batch, units) if x else None
    own = ScanInputs(draw(steps, batch, width), draw(width), skipped, draw(batch, units), reset_h)
    return own, lengths, resets


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize(
    ("cell", "positive", "x"),
    [
        ("min_gru", False, False),
        ("min_gru", True, False),
        ("min_lstm", False, False),
        ("min_lstm", True, False),
        ("sru", False, False),
        ("sru", False, True),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_torch(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    cell: str,
    positive: bool,
    x: bool,
    marks: bool,
    chunks: int,
) -> None:
    for (steps, batch, units), reverse in (((11, 3, 5), False), ((7, 2, 34), True)):
        inputs, lengths, resets = make_inputs(cell, steps, batch, units, dtype, marks, x)
        call = ScanCall(cell, positive, reverse, lengths, resets)
        got = run_kernels(library, call, inputs, chunks, descending=reverse)

        def exact(
            change: Change, call: ScanCall = call, inputs: ScanInputs = inputs
        ) -> list[Tensor]:
            own = ScanInputs(*[None if t is None else change(t) for t in inputs])
            return run_composite(call, own)

        assert_agrees(got, run_composite(call, inputs), exact)


@pytest.mark.parametrize("factor", [0.9, 2.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scans(library: ctypes.CDLL, reverse: bool, factor: float) -> None:
    """With a factor of 2 the products of the chunks overflow; the states are zeros then."""
    steps, columns, chunks = 5000, 3, 4
    a = torch.full((steps, columns), factor, dtype=torch.float64)
    b = torch.randn(steps, columns, dtype=torch.float64) * (factor < 1)
    h, h_n = poison(steps, columns, dtype=a.dtype), poison(columns, dtype=a.dtype)
    own = Call(cell=0, reverse=reverse, steps=steps, batch=1, units=columns, chunks=chunks)
    own.in_[:2], own.stride[:2] = (at(a), at(b)), (columns, columns)
    own.h, own.h_n = at(h), at(h_n)
    library.run_forward(ctypes.byref(own), DTYPES.index(a.dtype))
    expected = torch.ops.fastrnn.linear_scan(a, b, None, reverse)
    assert_same_in_double(h, expected)
    assert_same_in_double(h_n, expected[0] if reverse else expected[-1])

    for needs_a in (True, False):
        d_h, d_h0 = b, poison(columns, dtype=a.dtype)
        d_a, d_b = (poison(steps, columns, dtype=a.dtype) for _ in range(2))
        own.d_y, own.d_h0 = at(d_h), at(d_h0)
        own.d_in[:2] = (at(d_a) if needs_a else None, at(d_b))
        library.run_backward(ctypes.byref(own), DTYPES.index(a.dtype))
        results: Any = torch.ops.fastrnn.linear_scan_gradients(d_h, a, h, None, reverse, True)
        assert_same_in_double((d_b, d_h0), tuple(results[1:]))
        if needs_a:
            assert_same_in_double(d_a, results[0])


def test_infinite_states_run_in_order(library: ctypes.CDLL) -> None:
    steps, columns = 5000, 2
    a = torch.full((steps, columns), 0.5, dtype=torch.float64)
    b, h0 = torch.ones_like(a), torch.tensor([float("inf"), 1.0], dtype=torch.float64)
    h = poison(steps, columns, dtype=a.dtype)
    own = Call(cell=0, steps=steps, batch=1, units=columns, chunks=4, h0=at(h0), h=at(h))
    own.in_[:2], own.stride[:2] = (at(a), at(b)), (columns, columns)
    library.run_forward(ctypes.byref(own), DTYPES.index(a.dtype))
    assert h[:, 0].isinf().all()
    assert_same_in_double(h[:, 1], torch.ops.fastrnn.linear_scan(a, b, h0, False)[:, 1])


def test_plans(library: ctypes.CDLL) -> None:
    """Few columns are divided into chunks of 64 steps or more, unless they share results."""
    assert library.planned_chunks(1000, 16384, 132, 0) > 1
    assert library.planned_chunks(1000, 132 * 1024, 132, 0) == 1
    assert library.planned_chunks(100, 64, 132, 0) == 1
    assert library.planned_chunks(10_000, 64, 132, 0) == 156
    assert library.planned_chunks(1_000_000, 64, 132, 0) == 256
    assert library.planned_chunks(10_000, 64, 132, 1) == 1
    assert library.planned_chunks(10_000, 0, 132, 0) == 1
