"""CUDA schedules without a GPU: the source of the kernels, compiled for the host.

Cells, pointwise parts, the time loop and the work of each thread are the same C++ that nvcc
compiles. The harness replaces cuBLAS and pointwise launches by plain loops. It runs the threads of
the persistent kernels as fibers in random order, with barriers, shuffles, arrival flags and tensor
cores. cuBLAS itself, launches, memory fences and streams need a GPU: see `test_cuda.py`.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import KINDS as MARKS
from marks import arguments, call_of, composed, composed_exactly, weights_for, with_gradients
from support import (
    CELLS,
    DTYPES,
    CellLayer,
    build,
    by_kernels,
    by_reference,
    changed,
    check,
    pack,
    random,
    reference_math,
    slots_by_count,
)
from tolerance import Change, assert_agrees, assert_is_between, assert_same_in_double
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastrnn.backends import torch_step
from fastrnn.engine import ragged as engine_ragged
from fastrnn.engine import ragged_states
from fastrnn.layer_call import LayerCall, Options, SequenceMembers, SequenceTensors
from fastrnn.modules import base
from fastrnn.ops import (
    autograd,
    gradients,
    masked,
    operators,
    ragged_arguments,
    ragged_on_device,
    states,
)
from fastrnn.ops import ragged as ops_ragged
from fastrnn.ops.segments import Ragged
from fastrnn.spec import BUILT_IN, PROJECTION, Weights
from fastrnn.spec import CELLS as SPECS

ROOT = Path(__file__).resolve().parents[2]
# in the order of the enumeration in csrc/cuda/schedules/schedule.h; 2 is float32 in TF32
ARITHMETIC = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 3, torch.float64: 4}
TF32 = 2
AUTOMATIC, PERSISTENT, STEPWISE = range(3)  # then in the order of the table in csrc/cuda/plan.h
# synchronisations that the threads of the harness can skip
FORGET = ["sync of weights", "sync of products", "sync of arrival", "wait", "sync of a warp"]
KINDS = list(BUILT_IN)  # in the order of the registry of cells
H100 = {"multiprocessors": 132, "shared_bytes": 232448}


class Call(ctypes.Structure):
    """The struct `Call` of the harness."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("arithmetic", "cell", "reverse", "steps", "batch")]
        + [(name, ctypes.c_int64) for name in ("input_size", "hidden_size", "proj_size")]
        + [(name, ctypes.c_int64) for name in ("choice", "multiprocessors", "shared_bytes")]
        + [("resident", ctypes.c_int64)]
        + [(name, ctypes.c_int64) for name in ("chunk_rows", "descending", "seed", "forget")]
        + [(name, ctypes.c_void_p) for name in ("step_offset", "step_rows")]
        + [(name, ctypes.c_void_p) for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "w_unit")]
        + [(name, ctypes.c_int64) for name in ("w_ih_stride", "w_hh_stride", "w_hr_stride")]
        + [("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("h0", "c0", "y")]
        + [("y_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("h_n", "c_n", "saved", "d_y")]
        + [("d_y_stride", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("d_h_n", "d_c_n", "d_c_steps")]
        + [(name, ctypes.c_void_p) for name in ("d_pre", "d_h_all", "d_h0", "d_c0")]
        + [(name, ctypes.c_void_p) for name in ("resets", "reset_h", "reset_c")]
        + [(name, ctypes.c_int64) for name in ("reset_h_stride", "reset_c_stride")]
        + [(name, ctypes.c_void_p) for name in ("d_reset_h", "d_reset_c")]
    )


class Kernels:
    """The two operators of the CUDA library, run by the harness."""

    def __init__(self, library: ctypes.CDLL, choice: int = STEPWISE) -> None:
        self.library = library
        self.persistent: list[bool] = []  # whether the persistent schedule ran, per call
        self.choice = choice
        self.units = 0  # per block, on a GPU with just enough multiprocessors; 0: on an H100
        self.resident = 1  # blocks that a multiprocessor can hold
        self.tf32 = False
        self.chunk_rows = 0
        self.descending = False
        self.seed = 1
        self.forget = 0

    def run(self, name: str, calls: list[Call]) -> None:
        """Runs one call per direction, all at the same time."""
        result = getattr(self.library, name)((Call * len(calls))(*calls), len(calls))
        assert result >= 0, self.library.last_failure().decode()
        self.persistent.append(result == 1)

    def forward(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        slots: int,
        sequence: Sequence[Tensor] | None,
        cell: str,
        outputs: int,
        resets: Resets | None = None,
    ) -> tuple[Tensor, ...]:
        spec = SPECS[cell]
        directions, batch, out = h0.shape
        hidden = weights[0].shape[0] // spec.gates
        rows = x.shape[:-1]
        count = rows.numel()
        x_rows = spread(x.reshape(count, x.shape[-1]))
        y = margin(count, directions * out, x.dtype)
        h_n = poison(directions, batch, out, dtype=x.dtype)
        c_n = x.new_empty(0) if c0 is None else poison(*c0.shape, dtype=x.dtype)
        saved = poison(
            *(
                (directions, count, spec.saved * hidden)
                if outputs & 0b1000 and spec.saved
                else (0,)
            ),
            dtype=accumulate(x.dtype),
        )
        calls, kept = [], []
        for d in range(directions):
            call, tensors = self._call(
                spec.name, d, h0, c0, Weights(weights, slots), sequence, rows[0]
            )
            set_rows(call, "x", x_rows)
            set_rows(call, "y", y[:, d * out :])
            set_tensor(call, "h_n", h_n[d])
            if c0 is not None:
                set_tensor(call, "c_n", c_n[d])
            if saved.numel() > 0:
                set_tensor(call, "saved", saved[d])
            if resets is not None:
                resets.set(call, d)
            calls.append(call)
            kept.append(tensors)
        self.run("run_forward", calls)
        assert y[:, directions * out :].isnan().all(), "written beyond y"
        return y[:, : directions * out].reshape(*rows, directions * out), h_n, c_n, saved

    def backward(
        self,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        slots: int,
        sequence: Sequence[Tensor] | None,
        y: Tensor,
        saved: Tensor,
        cell: str,
        d_c_steps: Tensor | None = None,
        resets: Resets | None = None,
    ) -> tuple[Tensor, ...]:
        spec = SPECS[cell]
        directions, batch, out = h0.shape
        hidden = weights[0].shape[0] // spec.gates
        projected = slots & PROJECTION != 0
        count = y.shape[:-1].numel()
        y_rows = spread(y.reshape(count, -1) if count else y.new_empty(0, directions * out))
        d_y_rows = None if d_y is None else spread(d_y.reshape(y_rows.shape))
        d_pre = poison(directions, count, spec.gradient_columns * hidden, dtype=y.dtype)
        d_h_all = poison(*((directions, count, out) if projected else (0,)), dtype=y.dtype)
        d_h0 = poison(directions, batch, out, dtype=y.dtype)
        d_c0 = y.new_empty(0) if c0 is None else poison(*c0.shape, dtype=y.dtype)
        d_h_n = None if d_h_n is None else d_h_n.contiguous()
        d_c_n = None if d_c_n is None else d_c_n.contiguous()
        d_c_steps = None if d_c_steps is None else d_c_steps.contiguous()
        calls, kept = [], []
        for d in range(directions):
            call, tensors = self._call(
                spec.name, d, h0, c0, Weights(weights, slots), sequence, y.shape[0]
            )
            set_rows(call, "y", y_rows[:, d * out :])
            if saved.numel() > 0:
                set_tensor(call, "saved", saved[d])
            if d_y_rows is not None:
                set_rows(call, "d_y", d_y_rows[:, d * out :])
            for name, given in (("d_h_n", d_h_n), ("d_c_n", d_c_n), ("d_c_steps", d_c_steps)):
                if given is not None:
                    set_tensor(call, name, given[d])
            set_tensor(call, "d_pre", d_pre[d])
            if projected:
                set_tensor(call, "d_h_all", d_h_all[d])
            set_tensor(call, "d_h0", d_h0[d])
            if c0 is not None:
                set_tensor(call, "d_c0", d_c0[d])
            if resets is not None:
                resets.set(call, d)
            calls.append(call)
            kept.append(tensors)
        self.run("run_backward", calls)
        return d_pre, d_h_all, d_h0, d_c0

    def states(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        slots: int,
        sequence: Sequence[Tensor] | None,
        cell: str,
    ) -> tuple[Tensor, ...]:
        """Runs recurrent_states: with a gradient by fastrnn's code, without one by `forward`."""
        if torch.is_grad_enabled():
            return states._states_autograd(x, h0, c0, list(weights), slots, sequence, cell)  # type: ignore[arg-type]
        y, h_n, c_n, saved = self.forward(x, h0, c0, weights, slots, sequence, cell, -1)
        spec = SPECS[cell]
        values = saved.unflatten(2, (spec.saved, -1))[:, :, spec.saved - spec.cell_states :]
        return y, h_n, c_n, values.flatten(2).to(y.dtype), saved

    def states_backward(
        self, d_y: Any, d_h_n: Any, d_c_n: Any, d_c_steps: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        return self.backward(d_y, d_h_n, d_c_n, *rest, d_c_steps=d_c_steps)

    def reset_forward(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        slots: int,
        resets: Tensor,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        cell: str,
        outputs: int,
    ) -> tuple[Tensor, ...]:
        own = Resets(resets, reset_h, reset_c)
        return self.forward(x, h0, c0, weights, slots, None, cell, outputs, own)

    def reset_backward(
        self,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        d_c_steps: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        slots: int,
        resets: Tensor,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        y: Tensor,
        saved: Tensor,
        cell: str,
    ) -> tuple[Tensor, ...]:
        own = Resets(resets, reset_h, reset_c)
        given = (d_y, d_h_n, d_c_n, h0, c0, weights, slots, None, y, saved, cell)
        results = self.backward(*given, d_c_steps, own)
        return (*results, *[y.new_empty(0) if d is None else d for d in own.gradients])

    def _call(
        self,
        cell: str,
        direction: int,
        h0: Tensor,
        c0: Tensor | None,
        weights: Weights,
        sequence: Sequence[Tensor] | None,
        steps: int,
    ) -> tuple[Call, list[Tensor]]:
        """Returns the arguments of both passes, and tensors that must outlive the call."""
        directions, batch, out = h0.shape
        w = weights.directions()[direction]
        hidden = w.w_ih.shape[0] // SPECS[cell].gates
        batch_sizes = SequenceTensors(sequence, weights.slots).named().batch_sizes
        step_rows = torch.full((steps,), batch)
        if batch_sizes is not None:
            step_rows = batch_sizes.contiguous()
        step_offset = step_rows.cumsum(0) - step_rows
        call = Call(
            arithmetic=TF32 if self.tf32 else ARITHMETIC[h0.dtype],
            cell=KINDS.index(cell),
            reverse=direction,
            steps=len(step_rows),
            batch=batch,
            input_size=w.w_ih.shape[1],
            hidden_size=w.w_ih.shape[0] // SPECS[cell].gates,
            proj_size=0 if w.w_hr is None else out,
            choice=self.choice,
            **(H100 | self._small_gpu(hidden, directions)),
            resident=self.resident,
            chunk_rows=self.chunk_rows,
            descending=self.descending,
            seed=self.seed,
            forget=self.forget,
        )
        kept = [step_rows, step_offset, h0[direction].contiguous()]
        for name, tensor in zip(("step_rows", "step_offset", "h0"), kept, strict=True):
            set_tensor(call, name, tensor)
        if c0 is not None:
            kept.append(c0[direction].contiguous())
            set_tensor(call, "c0", kept[-1])
        for name in ("w_ih", "w_hh", "w_hr"):
            matrix = getattr(w, name)
            if matrix is not None:
                kept.append(spread(matrix.detach()))
                set_rows(call, name, kept[-1])
        for name in ("b_ih", "b_hh", "w_unit"):
            vector = getattr(w, name)
            if vector is not None:
                kept.append(vector.detach().contiguous())
                set_tensor(call, name, kept[-1])
        return call, kept

    def _small_gpu(self, hidden: int, directions: int) -> dict[str, int]:
        """Returns a GPU with one multiprocessor per block of units; a block runs all row tiles."""
        if self.units == 0:
            return {}
        return {"multiprocessors": directions * math.ceil(hidden / self.units)}


class Resets:
    """The resets of a call: a mask [D,T,B], and states [1 or T,D,B,*] or None."""

    def __init__(self, mask: Tensor, *states: Tensor | None) -> None:
        self.mask = mask.contiguous()
        self.states = [None if t is None else t.contiguous() for t in states]
        self.gradients = [
            None if t is None else t.new_zeros(t.shape, dtype=accumulate(t.dtype)) for t in states
        ]

    def set(self, call: Call, direction: int) -> None:
        set_tensor(call, "resets", self.mask[direction])
        steps = self.mask.shape[1]
        for name, state, gradient in zip("hc", self.states, self.gradients, strict=True):
            if state is None or gradient is None or len(state) == 0:
                continue
            setattr(call, f"reset_{name}", state[0, direction].data_ptr() or None)
            setattr(call, f"d_reset_{name}", gradient[0, direction].data_ptr() or None)
            stride = state.stride(0) if len(state) == steps else 0
            setattr(call, f"reset_{name}_stride", stride)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def margin(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix of NaN with 3 extra columns between its rows."""
    return poison(rows, columns + 3, dtype=dtype)


def spread(matrix: Tensor) -> Tensor:
    """Returns a copy of the matrix with NaN between its rows, which reveals reads beyond a row."""
    wide = margin(matrix.shape[0], matrix.shape[1], matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def set_tensor(call: Call, name: str, tensor: Tensor) -> None:
    assert tensor.is_contiguous()
    setattr(call, name, tensor.data_ptr() or None)


def set_rows(call: Call, name: str, matrix: Tensor) -> None:
    setattr(call, name, matrix.data_ptr() or None)
    setattr(call, f"{name}_stride", matrix.stride(0))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compiles the harness."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("cuda_host") / "harness.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "tests" / "cuda" / "host" / "harness.cpp"
    folders = ["-I", str(ROOT / "csrc"), "-I", str(source.parent)]
    subprocess.run([*compiler, *flags, *folders, str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.run_forward.restype = library.run_backward.restype = ctypes.c_int64
    library.last_failure.restype = ctypes.c_char_p
    library.partial_at.restype = ctypes.c_int64
    library.call_bytes.restype = ctypes.c_int64
    assert library.call_bytes() == ctypes.sizeof(Call)
    return library


@pytest.fixture
def kernels(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Replaces the operators for CPU tensors by the harness, and checks that it was used."""
    kernels = Kernels(library)
    monkeypatch.setattr(base, "forward_op", kernels.forward)
    monkeypatch.setattr(operators, "interruptible_forward", kernels.forward)
    monkeypatch.setattr(autograd, "interruptible_forward", kernels.forward)
    monkeypatch.setattr(torch_step, "is_faster_in_half", lambda *_: False)
    monkeypatch.setattr(gradients, "cpu_gradients", gradients.gradients_by_torch)
    monkeypatch.setattr(gradients, "backward_op", kernels.backward)
    monkeypatch.setattr(states, "interruptible_states", kernels.states)
    monkeypatch.setattr(gradients, "states_backward_op", kernels.states_backward)
    yield kernels
    persistent = kernels.choice == PERSISTENT
    assert kernels.persistent == [persistent] * max(len(kernels.persistent), 1)


def make_input(*shape: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random(generator, *shape, dtype=dtype).requires_grad_()


def make_states(module: nn.Module, batch: int, dtype: torch.dtype) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = make_input(count, batch, module.proj_size or module.hidden_size, dtype=dtype, seed=6)
    if module.mode != "LSTM":
        return h
    return h, make_input(count, batch, module.hidden_size, dtype=dtype, seed=7)


#          T, B, I, H
SHAPES = [(1, 1, 1, 1), (6, 3, 4, 17), (3, 5, 2, 8), (11, 2, 5, 3), (2, 3, 1, 130)]
# dot products for few rows; one, two and three row tiles; more groups of k than warps
PERSISTENT_SHAPES = [(1, 1, 1, 1), (6, 3, 4, 17), (5, 6, 2, 33), (4, 19, 3, 8), (3, 40, 3, 20)]
WIDE_SHAPES = [(3, 2, 2, 300), (3, 7, 2, 300)]
LENGTHS = [[4], [5, 5, 3, 1], [1, 6, 2, 6, 3]]
MANY_LENGTHS = [9, 8, 8, 8, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4]
MANY_LENGTHS += [3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1]
HALF_AND_FLOAT = [torch.float16, torch.bfloat16, torch.float32]

# units per block; 0: on an H100, where each row tile has its own blocks
persistent = pytest.mark.parametrize("units", [0, 8, 16])


def check_padded(cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    steps, batch, inputs, hidden = shape
    module = build(cell, inputs, hidden, bidirectional=True, dtype=dtype)
    check(module, make_input(steps, batch, inputs, dtype=dtype), make_states(module, batch, dtype))


def check_lengths(cell: str, lengths: list[int], hidden: int, dtype: torch.dtype) -> None:
    module = build(cell, 3, hidden, bidirectional=True, dtype=dtype)
    x = pack(make_input(sum(lengths), 3, dtype=dtype), lengths, enforce_sorted=False)
    check(module, x, make_states(module, len(lengths), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_stepwise_padded_input_matches_torch(
    kernels: Kernels, cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check_padded(cell, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_stepwise_packed_input_matches_torch(
    kernels: Kernels, cell: str, lengths: list[int], dtype: torch.dtype
) -> None:
    check_lengths(cell, lengths, 7, dtype)


@persistent
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", PERSISTENT_SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_padded_input_matches_torch(
    kernels: Kernels,
    cell: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    units: int,
) -> None:
    kernels.choice, kernels.units = PERSISTENT, units
    check_padded(cell, shape, dtype)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_matches_torch_for_wide_layers(
    kernels: Kernels, cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    kernels.choice = PERSISTENT
    check_padded(cell, shape, dtype)


@persistent
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS, MANY_LENGTHS], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_packed_input_matches_torch(
    kernels: Kernels, cell: str, lengths: list[int], dtype: torch.dtype, units: int
) -> None:
    kernels.choice, kernels.units = PERSISTENT, units
    check_lengths(cell, lengths, 12, dtype)


MARKED_CASES = [
    (cell, projected) for cell in BUILT_IN for projected in {False, SPECS[cell].projects}
]
every_marked_case = pytest.mark.parametrize(("cell", "projected"), MARKED_CASES)


def spoil_padding(given: dict[str, Any]) -> None:
    """Sets what lies beyond the rows' ends to NaN."""
    if given["lengths"] is None:
        return
    steps = torch.arange(len(given["x"])).unsqueeze(1)
    with torch.no_grad():
        given["x"][steps >= given["lengths"]] = torch.nan
        for name in ("reset_h", "reset_c"):
            state = given[name]
            if state is not None and state.dim() == 4:
                state.transpose(1, 2)[steps >= given["lengths"]] = torch.nan


def run_marked(kernels: Kernels, given: dict[str, Any]) -> list[Tensor]:
    """Returns the results and gradients of a layer with marks by the code of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_on_device, "reset_forward", kernels.reset_forward)
        patch.setattr(ragged_on_device, "reset_backward", kernels.reset_backward)
        patch.setattr(ragged_on_device, "forward_op", kernels.forward)
        results = ragged_on_device.forward_on_device(*given.values(), -1)
        y, h_n, c_n, saved = results
        outputs = [y, h_n] if given["c0"] is None else [y, h_n, c_n]
        d_outputs = [weights_for(o) for o in outputs]
        names = ("x", "h0", "c0", "reset_h", "reset_c")
        needs = [given[name] is not None for name in names] + [True] * len(given["weights"])
        *before, cell = given.values()
        found = ragged_on_device.gradients_on_device(
            *d_outputs, *[None] * (3 - len(outputs)), *before, y, saved, cell, needs
        )
    return [*outputs, *found]


def check_marked(kernels: Kernels, given: dict[str, Any]) -> None:
    with reference_math():
        expected = with_gradients(composed(given), given)

    spoilt = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()
    }
    spoil_padding(spoilt)
    found = tuple(run_marked(kernels, spoilt))
    assert_agrees(found, tuple(expected), lambda change: composed_exactly(change, given))


@pytest.mark.parametrize(
    ("dtype", "directions"), [(torch.float64, 1), *((dtype, 2) for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize("kind", MARKS)
@every_marked_case
def test_stepwise_marks_match_the_reference(
    library: ctypes.CDLL,
    cell: str,
    projected: bool,
    directions: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    given = arguments(cell, kind, projected, directions, dtype)
    check_marked(Kernels(library), given)


# cells whose persistent kernels have resets (csrc/cuda/schedules/persistent/plan.h)
RESET_CASES = [("rnn_tanh", False), ("gru", False), ("lstm", False), ("lstm", True)]
every_reset_case = pytest.mark.parametrize(("cell", "projected"), RESET_CASES)
# T, B, I, H, P: a tile of few rows, and two tiles
RESET_SIZES = [(5, 4, 3, 4, 2), (5, 19, 3, 20, 11)]


@pytest.mark.parametrize(
    ("dtype", "directions", "units"),
    [(torch.float32, 1, 8), (torch.float32, 2, 0), (torch.float16, 2, 0), (torch.bfloat16, 2, 16)],
    ids=str,
)
@pytest.mark.parametrize("sizes", RESET_SIZES, ids=str)
@pytest.mark.parametrize("kind", MARKS)
@every_reset_case
def test_persistent_marks_match_the_reference(
    library: ctypes.CDLL,
    cell: str,
    projected: bool,
    kind: str,
    sizes: Any,
    dtype: torch.dtype,
    directions: int,
    units: int,
) -> None:
    kernels = Kernels(library, PERSISTENT)
    kernels.units = units
    check_marked(kernels, arguments(cell, kind, projected, directions, dtype, sizes))
    # the kernel with a projection has no gradients at the cell states of the rows' last steps
    backward = not (projected and "lengths" in kind)
    assert kernels.persistent == [True, backward]


@pytest.mark.parametrize("cell", [cell for cell in BUILT_IN if (cell, False) not in RESET_CASES])
def test_resets_of_other_cells_run_stepwise(library: ctypes.CDLL, cell: str) -> None:
    kernels = Kernels(library, PERSISTENT)
    run_marked(kernels, arguments(cell, "resets", dtype=torch.float32))
    assert kernels.persistent == [False, False]


@pytest.mark.parametrize("kind", [kind for kind in MARKS if kind != "none"])
@pytest.mark.parametrize("choice", [STEPWISE, PERSISTENT], ids=["stepwise", "persistent"])
def test_missing_mask_is_found(library: ctypes.CDLL, choice: int, kind: str) -> None:
    kernels = Kernels(library, choice)
    forward = kernels.reset_forward

    def without_mask(*args: Any) -> tuple[Tensor, ...]:
        return forward(*(torch.zeros_like(t) if t is args[5] else t for t in args))

    kernels.reset_forward = without_mask  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        check_marked(kernels, arguments("gru", kind, False, 2, torch.float32))


def test_marks_without_steps_return_the_initial_state(library: ctypes.CDLL) -> None:
    given = arguments("lstm", "lengths, resets to a state", False, 2, sizes=(0, 4, 3, 4, 2))
    given["lengths"].zero_()
    check_marked(Kernels(library), given)


def test_lengths_beyond_the_batch_count_as_its_ends_without_reading_them(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels(library)
    given = arguments("lstm", "lengths", False, 2)
    with torch.no_grad():
        given["lengths"][:] = torch.tensor([5, 0, 5, 0])
        expected = run_marked(kernels, given)
        # marks on the device are not checked; on the CPU the operator raises
        given["lengths"][:] = torch.tensor([7, -1, 5, 0])
        with pytest.raises(RuntimeError, match="lengths must be from 0 to the 5 steps of x, got"):
            run_marked(kernels, given)

        def unchecked(*args: Any) -> tuple[LayerCall, Ragged]:
            return call_of(dict(zip(given, args, strict=True)))

        for module in (ragged_on_device, ragged_arguments):  # forward's name, and gradients'
            monkeypatch.setattr(module, "ragged_arguments", unchecked)
        for found, wanted in zip(run_marked(kernels, given), expected, strict=True):
            assert torch.equal(found, wanted)


def run_module(module: nn.Module, marks: dict[str, Any], returned: dict[str, bool]) -> list[Tensor]:
    """Returns all results of a call with marks, and the gradients of everything."""
    x = make_input(5, 4, module.input_size, dtype=torch.float64)
    hx = make_states(module, 4, torch.float64)
    output, final, *extras = module(x, hx, **marks, **returned)
    found = [t for t in tree_leaves([output, final, *extras]) if t is not None]
    loss = sum((t * weights_for(t)).sum() for t in found if t.requires_grad)
    learned = tree_leaves(marks.get("reset_state", []))
    inputs = [x, *tree_leaves(hx), *learned, *module.parameters()]
    return [*found, *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def module_marks(module: nn.Module, kind: str) -> dict[str, Any]:
    """Returns the marks of a call of a module."""
    marks: dict[str, Any] = {}
    if "lengths" in kind:
        marks["lengths"] = torch.tensor([5, 0, 2, 3])
    if "resets" in kind:
        marks["resets"] = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    if "state" in kind:
        before = (5,) if "each" in kind else ()
        state = make_states(module, 4, torch.float64)
        marks["reset_state"] = tree_map(
            lambda t: make_input(*before, *t.shape, dtype=torch.float64, seed=8), state
        )
    return marks


@pytest.fixture
def masks(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Computes calls with marks on the CPU as on a GPU, by the harness."""
    kernels = Kernels(library)
    monkeypatch.setattr(masked, "reset_forward", kernels.reset_forward)
    monkeypatch.setattr(masked, "reset_backward", kernels.reset_backward)
    for module in (ops_ragged, engine_ragged, ragged_states):
        monkeypatch.setattr(module, "keeps_marks", lambda x: True)
    return kernels


MASKED_KINDS = [*MARKS[1:], "lengths, resets to a state each step"]
WANTED: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "states": ({}, {"return_all_states": True}),
    "gates": ({}, {"return_gates": True}),
    "recompute": ({"recompute": 2}, {}),
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", MASKED_KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm", "projected"])
def test_marks_with_options_match_the_cpu(
    cell: str,
    options: dict[str, Any],
    kind: str,
    wanted: str,
    library: ctypes.CDLL,
    request: pytest.FixtureRequest,
) -> None:
    own, returned = WANTED[wanted]
    size = {"proj_size": 2} if cell == "projected" else {}
    name = "lstm" if cell == "projected" else cell
    module = build(name, 3, 4, dtype=torch.float64, **options, **size, **own)
    marks = module_marks(module, kind)
    expected = run_module(module, marks, returned)
    kernels = request.getfixturevalue("masks")
    assert_same_in_double(run_module(module, marks, returned), expected)
    if returned or "resets" in kind or name == "lstm":
        assert kernels.persistent  # the harness ran


@pytest.mark.parametrize("kind", ["lengths", "lengths, resets to a state"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recomputed_gradients_of_half_types_are_added_in_float32(
    cell: str, kind: str, masks: Kernels
) -> None:
    given = arguments(cell, kind, False, 2, torch.bfloat16, sizes=(40, 4, 3, 4, 2))
    call, marks = call_of(given)
    found = []
    for recompute in (0, 1):
        own = call._replace(options=Options(recompute=recompute))
        y, *_ = masked.masked_layer(own, marks, True).results
        found.append(torch.autograd.grad((y * weights_for(y)).sum(), given["weights"][1]))
    whole, chunks = (t[0].float() for t in found)
    error = (whole - chunks).abs().max() / whole.abs().max()
    assert error < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("returned", [{}, {"return_all_states": True}], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_second_derivatives_with_masks(
    cell: str, returned: dict[str, bool], masks: Kernels
) -> None:
    module = build(cell, 2, 2, bidirectional=True, dtype=torch.float64)
    marks = module_marks(module, "lengths, resets to a state")
    x = make_input(5, 4, 2, dtype=torch.float64)

    def call(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        own = {**marks, "reset_state": state if cell == "lstm" else state[0]}
        return tuple(t for t in tree_leaves(module(x, **own, **returned)) if t is not None)

    inputs = (x, *tree_leaves(marks["reset_state"]))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", MASKED_KINDS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_transforms_with_masks(
    cell: str, kind: str, library: ctypes.CDLL, request: pytest.FixtureRequest
) -> None:
    module = build(cell, 3, 4, bidirectional=True, dtype=torch.float64)
    marks = module_marks(module, kind)
    x = make_input(5, 4, 3, dtype=torch.float64).detach()

    def call(x: Tensor) -> Tensor:
        return module(x, **marks)[0]

    def results() -> list[Tensor]:
        weights = weights_for(call(x))
        return [
            torch.func.grad(lambda x: (call(x) * weights).sum())(x),
            torch.func.jvp(call, (x,), (torch.ones_like(x),))[1],
            torch.func.vmap(call)(torch.stack([x, x + 1])),
        ]

    expected = results()
    request.getfixturevalue("masks")
    assert_same_in_double(results(), expected)


# cells that torch.nn lacks: per-unit parameters, several cell states, no recurrent product
BEYOND_TORCH = [name for name in BUILT_IN if name not in CELLS]
PERSISTENT_BEYOND_TORCH = ["peephole_lstm", "slstm"]


def check_beyond_torch(cell: str, batch: int, hidden: int, dtype: torch.dtype) -> None:
    layer = CellLayer(cell, 3, hidden, bidirectional=True, dtype=dtype)
    h = make_input(2, batch, hidden, dtype=dtype, seed=6)
    c = make_input(2, batch, layer.spec.cell_states * hidden, dtype=dtype, seed=7)
    with torch.no_grad():  # the normaliser of an sLSTM is positive
        c.abs_().add_(0.5)
    hx: Any = (h, c) if layer.spec.has_cell_state else h
    check(layer, make_input(5, batch, 3, dtype=dtype), hx)
    lengths = [1 + index * 5 // batch for index in range(batch)][::-1]
    check(layer, pack(make_input(sum(lengths), 3, dtype=dtype), lengths, enforce_sorted=True), hx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", BEYOND_TORCH)
def test_stepwise_runs_cells_beyond_torch(kernels: Kernels, cell: str, dtype: torch.dtype) -> None:
    check_beyond_torch(cell, 4, 17, dtype)


@persistent
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("cell", PERSISTENT_BEYOND_TORCH)
def test_persistent_runs_cells_beyond_torch(
    kernels: Kernels, cell: str, batch: int, dtype: torch.dtype, units: int
) -> None:
    kernels.choice, kernels.units = PERSISTENT, units
    check_beyond_torch(cell, batch, 12, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_stepwise_projection_matches_torch(
    kernels: Kernels, packed: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    module = build("lstm", 4, 9, proj_size=5, dtype=dtype, **options)
    lengths = [5, 3, 3, 1]
    x: Any = make_input(6, 4, 4, dtype=dtype)
    if packed:
        x = pack(make_input(sum(lengths), 4, dtype=dtype), lengths, enforce_sorted=True)
    check(module, x, make_states(module, 4, dtype))


@persistent
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize(("hidden", "proj"), [(9, 5), (40, 33), (24, 1)])
@pytest.mark.parametrize("lengths", [None, [5, 3, 3, 1], MANY_LENGTHS], ids=["20 rows", "4", "29"])
def test_persistent_projection_matches_torch(
    kernels: Kernels,
    lengths: list[int] | None,
    hidden: int,
    proj: int,
    dtype: torch.dtype,
    units: int,
) -> None:
    kernels.choice, kernels.units = PERSISTENT, units
    module = build("lstm", 4, hidden, proj_size=proj, bidirectional=True, dtype=dtype)
    batch = 20 if lengths is None else len(lengths)
    x: Any = make_input(4, 20, 4, dtype=dtype)
    if lengths is not None:
        x = pack(make_input(sum(lengths), 4, dtype=dtype), lengths, enforce_sorted=True)
    check(module, x, make_states(module, batch, dtype))


@pytest.mark.parametrize("proj", [0, 5])
def test_layers_that_cannot_be_resident_run_stepwise(library: ctypes.CDLL, proj: int) -> None:
    kernels = Kernels(library, PERSISTENT)
    x, h0, c0, weights = random_layer("lstm", (4, 3), 3, 9, proj=proj)
    slots = slots_by_count(len(weights) // h0.shape[0])
    results = []
    for kernels.resident in (0, 1):
        results.append(kernels.forward(x, h0, c0, weights, slots, None, "lstm", -1))
        y, h_n, c_n, saved = results[-1]
        results[-1] += kernels.backward(y, h_n, c_n, h0, c0, weights, slots, None, y, saved, "lstm")
    assert kernels.persistent == [False, False, True, True]

    def exact(change: Change) -> tuple[Tensor, ...]:
        wide = (*(change(t) for t in (x, h0, c0)), [change(w) for w in weights])
        return tuple(both_passes(Kernels(library), "lstm", wide).values())

    assert_agrees(*results, exact)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch_matches_torch(kernels: Kernels, cell: str) -> None:
    module = build(cell, 3, 6, bidirectional=True, dtype=torch.float32)
    x = make_input(4, 0, 3, dtype=torch.float32)
    check(module, x, make_states(module, 0, torch.float32))


@pytest.mark.parametrize("cell", CELLS)
def test_input_size_0_matches_reference(kernels: Kernels, cell: str) -> None:
    spec = SPECS[cell]
    weights = [torch.randn(spec.gates * 4, size) for size in (0, 4)]
    h0 = torch.randn(1, 2, 4)
    c0 = torch.randn(1, 2, 4) if spec.has_cell_state else None
    x = torch.empty(5, 2, 0)
    ours = by_kernels(x, h0, c0, weights, None, spec)
    theirs = by_reference(x, h0, c0, weights, None, spec)

    def exact(change: Change) -> Any:
        given = (x.double(), change(h0), None if c0 is None else change(c0))
        return by_reference(*given, [change(w) for w in weights], None, spec)

    assert_agrees(ours, theirs, exact)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("proj", [0, 5])
@pytest.mark.parametrize("choice", [STEPWISE, PERSISTENT], ids=["stepwise", "persistent"])
def test_gradients_of_the_cell_states_of_every_step(
    kernels: Kernels, choice: int, proj: int, packed: bool, dtype: torch.dtype
) -> None:
    kernels.choice = choice
    module = build("lstm", 4, 20, proj_size=proj, bidirectional=True, dtype=dtype)
    lengths = [5, 3, 3, 1]
    rows = make_input(sum(lengths), 4, dtype=dtype)
    x = rows if packed else make_input(6, 4, 4, dtype=dtype)

    def call(module: nn.Module, x: Tensor, h0: Tensor, c0: Tensor) -> list[Tensor]:
        given: Any = pack(x, lengths, enforce_sorted=True) if packed else x
        output, (h_n, c_n), extras = module(given, (h0, c0), return_all_states=True)
        outputs = [output.data if packed else output, h_n, c_n, *extras.states]
        weights = [
            make_input(*t.shape, dtype=torch.float64, seed=index).detach().to(t.dtype)
            for index, t in enumerate(outputs)
        ]
        inputs = [x, h0, c0, *module.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]

    given = (x, *make_states(module, 4, dtype))
    with reference_math():
        theirs = call(module, *given)

    def exact(change: Any) -> list[Tensor]:
        wide = [change(t).requires_grad_() for t in given]
        with reference_math():
            return call(changed(module, change), *wide)

    assert_agrees(call(module, *given), theirs, exact)
    if choice == PERSISTENT and proj:  # that kernel has no such gradients
        assert kernels.persistent == [True, False]
        kernels.persistent.pop()


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_return_the_initial_state(library: ctypes.CDLL, cell: str) -> None:
    kernels = Kernels(library)
    gates = SPECS[cell].gates
    weights = [torch.randn(gates * 4, 3), torch.randn(gates * 4, 4)]
    h0 = torch.randn(1, 2, 4)
    c0 = torch.randn(1, 2, 4) if cell == "lstm" else None
    x = torch.empty(0, 2, 3)
    slots = slots_by_count(len(weights))
    y, h_n, c_n, saved = kernels.forward(x, h0, c0, weights, slots, None, cell, -1)
    given = (h0, c0, weights, slots, None, y, saved, cell)
    assert y.shape == (0, 2, 4)
    assert torch.equal(h_n, h0)
    d_h_n = torch.randn(1, 2, 4)
    d_c_n = torch.randn(1, 2, 4) if cell == "lstm" else None
    _, _, d_h0, d_c0 = kernels.backward(None, d_h_n, d_c_n, *given)
    assert torch.equal(d_h0, d_h_n)
    if c0 is not None:
        assert torch.equal(c_n, c0)
        assert torch.equal(d_c0, d_c_n)
    _, _, d_h0, d_c0 = kernels.backward(None, None, None, *given)
    assert not d_h0.any()
    assert not d_c0.any()


def random_layer(
    cell: str, rows: tuple[int, ...], batch: int, hidden: int, directions: int = 2, proj: int = 0
) -> tuple[Any, ...]:
    """Returns x (3 values per row), h0, c0, weights."""
    outputs = proj or hidden
    spec = SPECS[cell]
    generator = torch.Generator().manual_seed(3)
    gates = spec.gates * hidden
    weights = [
        torch.randn(size, generator=generator) / hidden**0.5
        for _ in range(directions)
        for size in (
            (gates, 3),
            (gates, outputs),
            (gates,),
            (gates,),
            *[(proj, hidden)] * (proj > 0),
        )
    ]
    x = torch.randn(*rows, 3, generator=generator)
    h0 = torch.randn(directions, batch, outputs, generator=generator)
    c0 = torch.randn(directions, batch, hidden, generator=generator)
    return x, h0, c0 if spec.has_cell_state else None, weights


def both_passes(
    kernels: Kernels,
    cell: str,
    layer: tuple[Any, ...],
    sizes: Tensor | None = None,
    resets: tuple[Tensor | None, ...] = (),
    d_outputs: list[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Returns the results of both passes. The gradients at the outputs are the outputs by default.

    Args:
        kernels, cell: the kernels and what they run.
        layer: x, h0, c0, weights.
        sizes: the batch sizes of a packed batch.
        resets: the arguments of `Resets`.
        d_outputs: the gradients at y, h_n and c_n.
    """
    x, h0, c0, weights = layer
    slots = slots_by_count(len(weights) // h0.shape[0])
    sequence, bits = SequenceMembers(sizes).pack()
    own = Resets(*resets) if resets else None
    y, h_n, c_n, saved = kernels.forward(x, h0, c0, weights, slots | bits, sequence, cell, -1, own)
    d_outputs = d_outputs or [y, h_n, c_n if c0 is not None else None]
    given = (h0, c0, weights, slots | bits, sequence, y, saved, cell)
    d_results = kernels.backward(*d_outputs, *given, resets=own)
    names = "y h_n c_n saved d_pre d_h_all d_h0 d_c0".split()
    results = dict(zip(names, [y, h_n, c_n, saved, *d_results], strict=True))
    for name, gradient in zip("hc", own.gradients if own else [], strict=False):
        if gradient is not None:
            results[f"d_reset_{name}"] = gradient
    return results


def random_resets(layer: tuple[Any, ...], share: float = 0.3) -> tuple[Tensor | None, ...]:
    """Returns a mask and states of every step for a padded layer."""
    x, h0, c0, _ = layer
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(len(h0), *x.shape[:2], generator=generator) < share
    return (
        mask,
        *(
            None if t is None else torch.randn(len(x), *t.shape, generator=generator)
            for t in (h0, c0)
        ),
    )


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


WAYS = [(STEPWISE, False), (PERSISTENT, False), (PERSISTENT, True)]


@pytest.mark.parametrize(
    ("choice", "tf32"), WAYS, ids=["stepwise", "persistent", "persistent, tensor cores"]
)
@pytest.mark.parametrize("batch_sizes", [None, [6, 6, 3, 1, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("cell", "proj"), [*((cell, 0) for cell in CELLS), ("lstm", 11)], ids=[*CELLS, "projected"]
)
def test_chunks_and_thread_order_change_no_bit(
    library: ctypes.CDLL,
    cell: str,
    proj: int,
    batch_sizes: list[int] | None,
    choice: int,
    tf32: bool,
) -> None:
    """Varies the number of rows per input product, and the order of the threads."""
    kernels = Kernels(library, choice)
    kernels.tf32 = tf32
    sizes = None if batch_sizes is None else torch.tensor(batch_sizes)
    rows = (5, 6) if sizes is None else (int(sizes.sum()),)
    layer = random_layer(cell, rows, 6, 20, proj=proj)
    expected = both_passes(kernels, cell, layer, sizes)
    assert not any(tensor.isnan().any() for tensor in expected.values())
    for kernels.chunk_rows in (1, 7, 12):
        assert_same(both_passes(kernels, cell, layer, sizes), expected)
    kernels.descending = True
    for kernels.seed in range(2, 7):
        assert_same(both_passes(kernels, cell, layer, sizes), expected)
    assert all(ran == (choice == PERSISTENT) for ran in kernels.persistent)


tf32_or_not = pytest.mark.parametrize("tf32", [False, True], ids=["dot products", "tensor cores"])


@tf32_or_not
@every_reset_case
def test_chunks_and_thread_order_change_no_bit_with_resets(
    library: ctypes.CDLL, cell: str, projected: bool, tf32: bool
) -> None:
    kernels = Kernels(library, PERSISTENT)
    kernels.tf32 = tf32
    layer = random_layer(cell, (5, 18), 18, 20, proj=11 * projected)
    resets = random_resets(layer)
    expected = both_passes(kernels, cell, layer, resets=resets)
    assert not any(tensor.isnan().any() for tensor in expected.values())
    for kernels.chunk_rows, kernels.units in ((18, 0), (36, 8)):
        assert_same(both_passes(kernels, cell, layer, resets=resets), expected)
    kernels.descending = True
    for kernels.seed in range(2, 5):
        assert_same(both_passes(kernels, cell, layer, resets=resets), expected)
    assert all(kernels.persistent)


@tf32_or_not
@every_reset_case
def test_reset_of_all_rows_gives_the_bits_of_two_calls(
    library: ctypes.CDLL, cell: str, projected: bool, tf32: bool
) -> None:
    """Cuts between steps 1 and 2: direction 0 is reset before step 2, direction 1 before step 1."""
    kernels = Kernels(library, PERSISTENT)
    kernels.tf32 = tf32
    layer = random_layer(cell, (5, 18), 18, 20, proj=11 * projected)
    x, h0, c0, weights = layer
    mask, *states = random_resets(layer)
    mask[:] = False
    mask[0, 2] = mask[1, 1] = True
    whole = both_passes(kernels, cell, layer, resets=(mask, *states))

    def at_cut(t: Tensor | None, state: Tensor | None, part: int) -> Tensor | None:
        """Returns the initial states of a part."""
        if t is None or state is None:
            return None
        return torch.stack([t[0], state[1, 1]] if part == 0 else [state[2, 0], t[1]])

    parts = []
    for part, rows in enumerate((slice(0, 2), slice(2, 5))):
        own = (x[rows], at_cut(h0, states[0], part), at_cut(c0, states[1], part), weights)
        ends = torch.tensor([0.0, 1.0] if part == 0 else [1.0, 0.0]).view(2, 1, 1)
        d_outputs = [whole["y"][rows], whole["h_n"] * ends, None]
        if c0 is not None:
            d_outputs[2] = whole["c_n"] * ends
        parts.append(both_passes(kernels, cell, own, d_outputs=d_outputs))
    assert torch.equal(whole["y"], torch.cat([part["y"] for part in parts]))
    for name in ("saved", "d_pre", "d_h_all"):
        if whole[name].numel() > 0:
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts], 1)), name
    for name in ("h", "c") if c0 is not None else ("h",):
        first, second = (part[f"{name}_n"] for part in parts)
        assert torch.equal(whole[f"{name}_n"], torch.stack([second[0], first[1]]))
        first, second = (part[f"d_{name}0"] for part in parts)
        assert torch.equal(whole[f"d_{name}0"], torch.stack([first[0], second[1]]))
        d_reset = torch.zeros_like(whole[f"d_reset_{name}"])
        d_reset[2, 0], d_reset[1, 1] = second[0], first[1]
        assert torch.equal(whole[f"d_reset_{name}"], d_reset)
    assert all(kernels.persistent)


@pytest.mark.parametrize("choice", [STEPWISE, PERSISTENT], ids=["stepwise", "persistent"])
@every_reset_case
def test_nan_does_not_pass_a_reset(
    library: ctypes.CDLL, cell: str, projected: bool, choice: int
) -> None:
    kernels = Kernels(library, choice)
    kernels.tf32 = choice == PERSISTENT
    x, *rest = random_layer(cell, (6, 18), 18, 20, 1, 11 * projected)
    mask, *states = random_resets((x, *rest))
    mask[:] = False
    mask[0, 3, 7] = True

    def run(x: Tensor, d_y: Tensor) -> dict[str, Tensor]:
        return both_passes(kernels, cell, (x, *rest), None, (mask, *states), [d_y, None, None])

    d_y = torch.ones(6, 18, rest[0].shape[2])
    clean = run(x, d_y)
    spoilt = x.clone()
    spoilt[1, 7] = torch.nan
    y = run(spoilt, d_y)["y"]
    assert y[1:3, 7].isnan().all()
    assert torch.equal(y[3:], clean["y"][3:])
    d_y[4, 7] = torch.nan
    d_pre = run(x, d_y)["d_pre"].view(6, 18, -1)
    assert d_pre[3:5, 7].isnan().any(-1).all()
    assert torch.equal(d_pre[:3], clean["d_pre"].view(6, 18, -1)[:3])


@pytest.mark.parametrize("cell", CELLS)
def test_row_tiles_per_block_change_no_bit(library: ctypes.CDLL, cell: str) -> None:
    kernels = Kernels(library, PERSISTENT)
    kernels.tf32 = True  # tensor cores
    sizes = torch.tensor([35, 33, 20, 3, 1])
    layer = random_layer(cell, (int(sizes.sum()),), 35, 20)
    expected = both_passes(kernels, cell, layer, sizes)
    kernels.units = 8
    assert_same(both_passes(kernels, cell, layer, sizes), expected)


@pytest.mark.parametrize(
    ("with_resets", "tf32"),
    [(False, False), (False, True), (True, True)],
    ids=["dot products", "tensor cores", "resets, tensor cores"],
)
@pytest.mark.parametrize("forget", range(1, 6), ids=FORGET)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("cell", "proj"), [("gru", 0), ("lstm", 33)], ids=["gru", "projected"])
def test_missing_barrier_is_found(
    library: ctypes.CDLL,
    cell: str,
    proj: int,
    with_resets: bool,
    backward: bool,
    forget: int,
    tf32: bool,
) -> None:
    """Shows that every barrier is needed and that random thread orders reveal a missing one."""
    if backward and proj == 0 and FORGET[forget - 1] == "sync of weights":
        pytest.skip("the first backward step has no product, and its arrival is a barrier too")
    kernels = Kernels(library, PERSISTENT)
    kernels.tf32 = tf32
    sizes = None if with_resets else torch.tensor([20, 18, 18, 5, 2])
    rows = (5, 18) if sizes is None else (int(sizes.sum()),)
    layer = random_layer(cell, rows, rows[-1] if sizes is None else 20, 70, proj=proj)
    x, h0, c0, weights = layer
    resets = Resets(*random_resets(layer)) if with_resets else None
    slots = slots_by_count(len(weights) // h0.shape[0])
    sequence, bits = SequenceMembers(sizes).pack()
    given = (x, h0, c0, weights, slots | bits, sequence, cell)
    y, h_n, c_n, saved = kernels.forward(*given, -1, resets)
    d_c_n = c_n if c0 is not None else None
    known = (h0, c0, weights, slots | bits, sequence, y, saved, cell)

    def result() -> Tensor:
        if not backward:
            return kernels.forward(*given, 0, resets)[0]
        return kernels.backward(y, h_n, d_c_n, *known, resets=resets)[0]

    expected = result()
    assert all(kernels.persistent)
    kernels.forget = forget
    for kernels.seed in range(1, 6):
        try:
            if not torch.equal(result(), expected):
                return
        except AssertionError:  # threads wait at different barriers
            return
    pytest.fail("no thread order reveals the missing synchronisation")


@pytest.mark.parametrize(("units", "gates"), [(8, 1), (8, 3), (8, 4), (16, 1), (16, 3), (16, 4)])
def test_partial_sums_have_no_bank_conflicts(library: ctypes.CDLL, units: int, gates: int) -> None:
    tiles = units // 8 * gates
    at = {
        (row, column): library.partial_at(*map(ctypes.c_int64, (tiles, row, column)))
        for row in range(16)
        for column in range(8 * tiles)
    }
    assert sorted(at.values()) == list(range(16 * 8 * tiles))

    def banks(positions: Iterable[tuple[int, int]]) -> set[int]:
        return {at[position] % 32 for position in positions}

    for tile in range(tiles):
        for first in range(0, 16, 4):  # half a warp writes 4 rows, a pair of values per lane
            rows = range(first, first + 4)
            written = [(row, 8 * tile + column) for row in rows for column in range(8)]
            assert len(banks(written)) == 32
    for gate in range(gates):
        for first in range(0, 16, 32 // units):  # each lane of a warp reads one row and unit
            rows = range(first, first + 32 // units)
            read = [(row, gate * units + unit) for row in rows for unit in range(units)]
            assert len(banks(read)) == 32


@persistent
@pytest.mark.parametrize("shape", [(6, 7, 17), (4, 33, 40)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_tf32_error_is_between_float32_and_float16(
    library: ctypes.CDLL, cell: str, shape: tuple[int, int, int], units: int
) -> None:
    """Operands of recurrent products have 10 bits, like float16. The input product is exact."""
    steps, batch, hidden = shape
    kernels = Kernels(library, PERSISTENT)
    kernels.tf32, kernels.units = True, units
    layer = random_layer(cell, (steps, batch), batch, hidden, directions=1)

    def run(change: Change) -> dict[str, Tensor]:
        x, h0, c0, weights = layer
        tensors = [None if t is None else change(t) for t in (x, h0, c0)]
        return both_passes(kernels, cell, (*tensors, [change(w) for w in weights]))

    fast = run(Tensor.float)
    kernels.tf32, kernels.choice = False, STEPWISE
    full, halves = run(Tensor.float), run(Tensor.half)
    for name in ("y", "h_n", *([] if cell == "rnn_relu" else ["d_pre", "d_h0"])):

        def exact(change: Change, name: str = name) -> Tensor:
            return run(change)[name]

        assert_is_between(fast[name], full[name], halves[name], exact, name)


def test_workspace_does_not_grow_with_steps(library: ctypes.CDLL) -> None:
    def plan(steps: int, batch: int, hidden: int) -> tuple[int, int]:
        rows = torch.full((steps,), batch)
        offset = rows.cumsum(0) - rows
        call = Call(
            cell=KINDS.index("lstm"),
            steps=steps,
            batch=batch,
            input_size=8,
            hidden_size=hidden,
            step_rows=rows.data_ptr(),
            step_offset=offset.data_ptr(),
        )
        chunk_rows, workspace = ctypes.c_int64(), ctypes.c_int64()
        library.plan_forward(ctypes.byref(call), ctypes.byref(chunk_rows), ctypes.byref(workspace))
        return chunk_rows.value, workspace.value

    rows, small = plan(1_000, 16, 512)
    assert rows == (24 << 20) // (4 * 512 * 4)
    assert plan(100_000, 16, 512) == (rows, plan(10_000, 16, 512)[1])
    assert small <= 32 << 20
    assert plan(10, 1, 8)[1] < 4096  # a small problem needs little
    assert plan(2, 4096, 512)[1] >= 2 * 4096 * 4 * 512 * 4  # but holds at least one step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_like_torch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    code = ARITHMETIC[dtype]
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = torch.empty(len(halves))
    library.widen_all(
        ctypes.c_int64(code),
        ctypes.c_void_p(halves.data_ptr()),
        ctypes.c_void_p(wide.data_ptr()),
        ctypes.c_int64(len(halves)),
    )
    assert torch.equal(wide.isnan(), halves.isnan())
    numbers = ~wide.isnan()
    assert torch.equal(wide[numbers].view(torch.int32), halves.float()[numbers].view(torch.int32))

    # Every half number, the midpoints between neighbours, and the floats adjacent to all of these.
    finite = halves[halves.isfinite()].float().unique()
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    largest = torch.tensor([65504.0, 65519.996, 65520.0, 1e5, 1e-9, 3e38, float("inf")])
    floats = torch.cat([finite, middles, largest, -largest, torch.tensor([-0.0])])
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    floats = torch.cat([floats, floats.nextafter(up), floats.nextafter(down)])
    floats = torch.cat([floats, torch.tensor([float("nan")])])
    narrowed = torch.empty(len(floats), dtype=dtype)
    library.narrow_all(
        ctypes.c_int64(code),
        ctypes.c_void_p(floats.data_ptr()),
        ctypes.c_void_p(narrowed.data_ptr()),
        ctypes.c_int64(len(floats)),
    )
    expected = floats.to(dtype)
    assert torch.equal(narrowed.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(narrowed.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
