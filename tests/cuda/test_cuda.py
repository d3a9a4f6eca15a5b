"""CUDA kernels on a GPU: every dtype against float64, streams and CUDA graphs.

All tests need a GPU. `test_cuda_host.py` runs the schedules without one. The slow test draws random
layers for FASTRNN_SOAK_SECONDS (default 20; use 600 before a release).
"""

from __future__ import annotations

import itertools
import os
import random as python_random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cuda_shapes import HIDDEN_SIZES, MANY_LENGTHS, PERSISTENT_SHAPES, Shape
from marks import KINDS as MARKS
from marks import arguments as marked_arguments
from marks import composed, composed_exactly, with_gradients
from support import (
    CELLS,
    DTYPES,
    build,
    by_kernels,
    by_reference,
    check,
    exact_call,
    exact_run,
    pack,
    random,
    reference_math,
    run,
    slots_by_count,
    torch_twin,
)
from tolerance import Change, assert_agrees, assert_is_between, assert_same_in_double, error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _library
from fastrnn.spec import CELLS as SPECS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _library.cuda_kernels, reason="fastrnn has no CUDA kernels here"),
]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Turns TF32 off in fastrnn and torch unless a test turns it on."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn


SCHEDULES = ("stepwise", "persistent")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Requests each schedule. A layer that does not fit the persistent one runs stepwise."""
    name: str = request.param
    monkeypatch.setenv("FASTRNN_SCHEDULE", name)
    return name


both_schedules = pytest.mark.usefixtures("schedule")
only_persistent = pytest.mark.parametrize("schedule", ["persistent"], indirect=True)


def require_fit(
    shape: Shape, cell: str, dtype: torch.dtype, tf32: bool = False, proj_size: int = 0
) -> None:
    """Skips a test of the persistent schedule if this GPU cannot hold the layer."""
    about = torch.cuda.get_device_properties()
    shared = getattr(about, "shared_memory_per_block_optin", 232448)
    for training in (False, True):
        plan = shape.plan_on(
            cell,
            dtype,
            training,
            proj_size=proj_size,
            tf32=tf32,
            capability=about.major,
            multiprocessors=about.multi_processor_count,
            shared_bytes=shared,
        )
        if plan["schedule"] != "persistent":
            pytest.skip(f"does not fit on {about.name}")


def finish(*streams: torch.cuda.Stream, seconds: float = 60.0) -> None:
    """Waits for streams. Exits the test run on a deadlock, which would block the GPU for good."""
    events = [stream.record_event() for stream in streams]
    end = time.monotonic() + seconds
    while not all(event.query() for event in events):
        if time.monotonic() > end:
            pytest.exit(f"kernels did not end within {seconds:g} seconds: a deadlock?", 1)
        time.sleep(0.001)


def make(*shape: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random(generator, *shape, dtype=dtype).cuda().requires_grad_()


def make_states(module: nn.Module, batch: int, dtype: torch.dtype) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = make(count, batch, module.proj_size or module.hidden_size, dtype=dtype, seed=6)
    if module.mode != "LSTM":
        return h
    return h, make(count, batch, module.hidden_size, dtype=dtype, seed=7)


def arguments(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    inputs: int | None = None,
) -> tuple[Any, ...]:
    """Returns x, h0, c0, weights, batch_sizes, spec of a layer in one direction; default I = H."""
    spec = SPECS[cell]
    gates = spec.gates * hidden
    inputs = hidden if inputs is None else inputs
    weights = [
        make(*size, dtype=dtype, seed=seed).detach().mul_(hidden**-0.5).requires_grad_()
        for seed, size in enumerate([(gates, inputs), (gates, hidden), (gates,), (gates,)])
    ]
    c0 = make(1, batch, hidden, dtype=dtype, seed=8) if spec.has_cell_state else None
    x = make(steps, batch, inputs, dtype=dtype)
    return x, make(1, batch, hidden, dtype=dtype, seed=7), c0, weights, None, spec


HALF = (torch.float16, torch.bfloat16)
# The gradient of relu jumps at 0, and rounding to half types decides on which side a sum near 0
# lands, so gradients are not comparable. `test_relu_in_half_types_matches_torch` compares outputs.
CASES = [(c, d) for c in CELLS for d in DTYPES if c != "rnn_relu" or d not in HALF]
PERSISTENT_CASES = [(c, d) for c, d in CASES if d != torch.float64]

#          T, B, I, H
SHAPES = [(1, 1, 1, 1), (7, 3, 5, 17), (5, 16, 64, 128), (3, 2, 300, 260), (4, 0, 3, 5)]


@both_schedules
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("cell", "dtype"), CASES, ids=str)
def test_padded_input_matches_torch(
    cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    steps, batch, inputs, hidden = shape
    module = build(cell, inputs, hidden, bidirectional=True, dtype=dtype).cuda()
    check(module, make(steps, batch, inputs, dtype=dtype), make_states(module, batch, dtype))


@both_schedules
@pytest.mark.parametrize("lengths", [[4], [5, 5, 3, 1], [1, 6, 2, 6, 3]], ids=str)
@pytest.mark.parametrize(("cell", "dtype"), CASES, ids=str)
def test_packed_input_matches_torch(cell: str, lengths: list[int], dtype: torch.dtype) -> None:
    module = build(cell, 3, 33, bidirectional=True, num_layers=2, dtype=dtype).cuda()
    x = pack(make(sum(lengths), 3, dtype=dtype), lengths, enforce_sorted=False)
    check(module, x, make_states(module, len(lengths), dtype))


@both_schedules
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_relu_in_half_types_matches_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    steps, batch, inputs, hidden = shape
    module = build("rnn_relu", inputs, hidden, bidirectional=True, dtype=dtype).cuda()
    x = make(steps, batch, inputs, dtype=dtype)
    with torch.no_grad():
        assert_agrees(module(x), torch_twin(module)(x), exact_call(module, x))


@both_schedules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_projection_matches_torch(packed: bool, dtype: torch.dtype) -> None:
    module = build("lstm", 4, 40, proj_size=9, bidirectional=True, dtype=dtype).cuda()
    lengths = [5, 3, 3, 1]
    x: Any = make(6, 4, 4, dtype=dtype)
    if packed:
        x = pack(make(sum(lengths), 4, dtype=dtype), lengths, enforce_sorted=True)
    check(module, x, make_states(module, 4, dtype))


LONG = [[70_000], [70_000, 69_998, 3]]


def long_layer(cell: str, lengths: list[int]) -> tuple[Any, ...]:
    """Returns a layer over one sequence or packed ones, whose states stay bounded."""
    _, h0, c0, weights, _, spec = arguments(cell, 1, len(lengths), 4)
    weights[1].detach().mul_(0.5)
    rows = make(sum(lengths), 4, dtype=torch.float32, seed=9)
    if len(lengths) == 1:
        return rows.detach().unsqueeze(1).requires_grad_(), h0, c0, weights, None, spec
    packed = pack(rows.detach(), lengths, enforce_sorted=True)
    return packed.data.requires_grad_(), h0, c0, weights, packed.batch_sizes, spec


@both_schedules
@pytest.mark.parametrize("lengths", LONG, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_more_steps_than_grid_rows_give_finite_results(cell: str, lengths: list[int]) -> None:
    results = gradients(long_layer(cell, lengths))
    assert all(result.isfinite().all() for result in results)
    y, h_n, *_ = results
    assert torch.equal(y.view(-1, 4)[-1], h_n[0, 0])


@pytest.mark.parametrize("lengths", LONG, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_schedules_agree_on_many_steps(
    cell: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, h0, c0, weights, sizes, spec = long_layer(cell, lengths)
    found = {}
    with torch.no_grad():
        for name in SCHEDULES:
            monkeypatch.setenv("FASTRNN_SCHEDULE", name)
            found[name], *_ = by_kernels(x, h0, c0, weights, sizes, spec)

        def exact(change: Change) -> Tensor:
            wide = [t if t is None else change(t) for t in (x, h0, c0)]
            return by_kernels(*wide, [change(w) for w in weights], sizes, spec)[0]

        assert_agrees(found["persistent"], found["stepwise"], exact)


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def gradients(args: tuple[Any, ...]) -> list[Tensor]:
    x, h0, c0, weights, *_ = args
    y, h_n, c_n = by_kernels(*args)
    outputs = [y, h_n] if c_n is None else [y, h_n, c_n]
    leaves = [x, h0, *([] if c0 is None else [c0]), *weights]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]


@both_schedules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_bitwise_reproducible(cell: str, dtype: torch.dtype) -> None:
    args = arguments(cell, 12, 8, 64, dtype)
    first = gradients(args)
    for _ in range(3):
        again = gradients(args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def packed_arguments(cell: str, lengths: list[int], hidden: int) -> tuple[Any, ...]:
    """Returns the same as `arguments`, for packed rows."""
    _, h0, c0, weights, _, spec = arguments(cell, 1, len(lengths), hidden)
    packed = pack(torch.zeros(sum(lengths), 1), lengths, enforce_sorted=True)
    return (
        make(sum(lengths), hidden, dtype=torch.float32),
        h0,
        c0,
        weights,
        packed.batch_sizes,
        spec,
    )


@both_schedules
@pytest.mark.parametrize("lengths", [None, [6, 6, 3, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_calls_do_not_synchronise_the_host(cell: str, lengths: list[int] | None) -> None:
    args = packed_arguments(cell, lengths, 16) if lengths else arguments(cell, 6, 4, 16)
    gradients(args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("cell", SPECS)
def test_marks_match_the_cpu_without_synchronising(
    cell: str, projected: bool, directions: int, kind: str
) -> None:
    if projected and not SPECS[cell].projects:
        pytest.skip("has no projection")
    given = marked_arguments(cell, kind, projected, directions)
    expected = with_gradients(composed(given), given)
    own = {name: on_gpu(value) for name, value in given.items()}

    def results() -> list[Tensor]:
        y, h_n, c_n = torch.ops.fastrnn.ragged_layer(*own.values())
        return with_gradients([y, h_n] if own["c0"] is None else [y, h_n, c_n], own)

    results()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_in_double([t.cpu() for t in found], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(5, 4, 3, 4, 2), (5, 40, 3, 130, 40)], ids=str)
@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize(
    ("cell", "projected"), [("rnn_tanh", False), ("gru", False), ("lstm", False), ("lstm", True)]
)
@both_schedules
def test_marks_match_the_reference(
    cell: str, projected: bool, kind: str, sizes: Any, dtype: torch.dtype
) -> None:
    given = marked_arguments(cell, kind, projected, 2, dtype, sizes)
    with reference_math():
        expected = with_gradients(composed(given), given)
    own = {name: on_gpu(value) for name, value in given.items()}
    y, h_n, c_n = torch.ops.fastrnn.ragged_layer(*own.values())
    found = with_gradients([y, h_n] if own["c0"] is None else [y, h_n, c_n], own)
    assert_agrees(
        tuple(t.cpu() for t in found),
        tuple(expected),
        lambda change: composed_exactly(change, given),
    )


def on_gpu(value: Any) -> Any:
    """Returns a leaf on the GPU for each tensor."""
    if isinstance(value, list):
        return [on_gpu(t) for t in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().cuda().requires_grad_(value.is_floating_point())


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@both_schedules
def test_graph_with_marks_replays_with_other_marks(cell: str) -> None:
    module = getattr(fastrnn, cell)(5, 16, 2, bidirectional=True, device="cuda")
    x = make(9, 4, 5, dtype=torch.float32)
    lengths, resets = torch.tensor([9, 4, 0, 7]).cuda(), torch.rand(9, 4).cuda() < 0.3

    def results() -> list[Tensor]:
        y, _ = module(x, lengths=lengths, resets=resets)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    lengths.copy_(torch.tensor([1, 9, 5, 0]))
    resets.copy_(torch.rand(9, 4) < 0.3)
    graph.replay()
    for found, expected in zip(captured, results(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("returned", [{}, {"return_all_states": True, "return_gates": True}])
@pytest.mark.parametrize("recompute", ["none", 4])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_options_with_marks_match_the_cpu_without_synchronising(
    cell: str, recompute: Any, returned: dict[str, bool]
) -> None:
    module = getattr(fastrnn, cell)(
        5, 16, 2, bidirectional=True, recompute=recompute, dtype=torch.float64
    )
    x = make(9, 4, 5, dtype=torch.float64).detach().cpu()
    marks = {"lengths": torch.tensor([9, 4, 0, 7]), "resets": torch.rand(9, 4) < 0.3}

    def results(device: str) -> list[Tensor]:
        own = x.to(device).requires_grad_()
        found = tree_leaves(module(own, **marks, **returned))
        outputs = [t for t in found if t is not None and t.requires_grad]
        (first,) = torch.autograd.grad([t.sum() for t in outputs], own, create_graph=True)
        parameters = list(module.parameters())
        second = torch.autograd.grad(first.sum(), parameters, materialize_grads=True)
        given = torch.autograd.grad(module(own, **marks)[0].sum(), parameters)
        return [*(t for t in found if t is not None), first, *second, *given]

    expected = results("cpu")
    module.cuda()
    marks = {name: mark.cuda() for name, mark in marks.items()}
    x = x.cuda()
    results("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_in_double([t.cpu() for t in found], expected)


@both_schedules
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_run_on_the_current_stream(cell: str) -> None:
    args = arguments(cell, 30, 8, 128)
    expected = gradients(args)
    stream = torch.cuda.Stream()
    x = args[0]
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream reads zeros
        late.copy_(x.detach())
        found = gradients((late.requires_grad_(), *args[1:]))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both_schedules
@pytest.mark.parametrize("cell", CELLS)
def test_graph_of_forward_replays_with_new_input(cell: str) -> None:
    args = arguments(cell, 9, 4, 32)
    static = args[0].detach().clone()
    with torch.no_grad():
        by_kernels(static, *args[1:])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = by_kernels(static, *args[1:])
        for seed in (21, 22):
            x = make(*static.shape, dtype=static.dtype, seed=seed).detach()
            static.copy_(x)
            graph.replay()
            expected = by_kernels(x, *args[1:])
            for a, b in zip(captured, expected, strict=True):
                assert a is b is None or torch.equal(a, b)


@both_schedules
@pytest.mark.parametrize("lengths", [None, [9, 9, 3, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_graph_of_a_training_step_replays_with_new_input(
    cell: str, lengths: list[int] | None
) -> None:
    args = packed_arguments(cell, lengths, 32) if lengths else arguments(cell, 9, 4, 32)
    static = args[0].detach().clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients((static, *args[1:]))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients((static, *args[1:]))
    x = make(*static.shape, dtype=static.dtype, seed=23)
    with torch.no_grad():
        static.copy_(x)
    graph.replay()
    expected = gradients((x, *args[1:]))
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@both_schedules
def test_graph_with_dropout_draws_new_masks() -> None:
    """Every replay draws other masks. The same seed gives the same masks."""
    module = build("lstm", 8, 32, num_layers=2, dropout=0.5).cuda()
    x = make(5, 4, 8, dtype=torch.float32).detach()
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = module(x)

        def replayed(seed: int | None) -> Tensor:
            if seed is not None:
                torch.manual_seed(seed)
            graph.replay()
            return captured.clone()

        first, second, again = replayed(3), replayed(None), replayed(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# -- the persistent schedule ----------------------------------------------------------------------


@only_persistent
@pytest.mark.parametrize("name", PERSISTENT_SHAPES)
@pytest.mark.parametrize(("cell", "dtype"), PERSISTENT_CASES, ids=str)
def test_persistent_matches_torch(cell: str, dtype: torch.dtype, name: str, schedule: str) -> None:
    shape = PERSISTENT_SHAPES[name]
    require_fit(shape, cell, dtype)
    module = build(
        cell,
        shape.input_size,
        shape.hidden_size,
        bidirectional=shape.directions == 2,
        dtype=dtype,
    ).cuda()
    x = make(shape.steps, shape.batch, shape.input_size, dtype=dtype)
    check(module, x, make_states(module, shape.batch, dtype))


@only_persistent
@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize(("cell", "dtype"), PERSISTENT_CASES, ids=str)
def test_persistent_matches_torch_for_hidden_sizes(
    cell: str, dtype: torch.dtype, hidden_size: int, batch: int, schedule: str
) -> None:
    require_fit(Shape(4, batch, 8, hidden_size, 1, {}), cell, dtype)
    module = build(cell, 8, hidden_size, dtype=dtype).cuda()
    x = make(4, batch, 8, dtype=dtype)
    check(module, x, make_states(module, batch, dtype))


@both_schedules
@pytest.mark.parametrize(("cell", "dtype"), CASES, ids=str)
def test_many_lengths_match_torch(cell: str, dtype: torch.dtype) -> None:
    module = build(cell, 3, 33, bidirectional=True, dtype=dtype).cuda()
    x = pack(make(sum(MANY_LENGTHS), 3, dtype=dtype), MANY_LENGTHS, enforce_sorted=False)
    check(module, x, make_states(module, len(MANY_LENGTHS), dtype))


@pytest.mark.parametrize(("cell", "dtype"), PERSISTENT_CASES, ids=str)
def test_schedules_agree(cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs more steps than the comparisons with torch."""
    require_fit(Shape(60, 20, 256, 256, 1, {}), cell, dtype)
    module = build(cell, 256, 256, dtype=dtype).cuda()
    x, hx = make(60, 20, 256, dtype=dtype), make_states(module, 20, dtype)
    found = {}
    for name in SCHEDULES:
        monkeypatch.setenv("FASTRNN_SCHEDULE", name)
        found[name] = run(module, x, hx)
    assert_agrees(found["persistent"], found["stepwise"], exact_run(module, x, hx))


# cell, H, P, B and dtype: small layers, and layers that need more shared memory than CUDA's default
REQUESTED = [
    ("lstm", 64, 0, 20, torch.float32),
    ("lstm", 1024, 0, 3, torch.float32),
    ("lstm", 1024, 0, 20, torch.float16),
    ("gru", 1024, 0, 20, torch.bfloat16),
    ("gru", 1024, 0, 3, torch.float32),
    ("rnn_tanh", 1024, 0, 20, torch.float16),
    ("lstm", 1024, 512, 3, torch.float32),
    ("lstm", 1024, 512, 20, torch.float16),
    ("lstm", 600, 300, 20, torch.bfloat16),
]


@pytest.mark.parametrize("tf32", [False, True], ids=["", "tf32"])
@pytest.mark.parametrize(("cell", "hidden", "proj", "batch", "dtype"), REQUESTED, ids=str)
def test_requested_schedule_runs(
    cell: str, hidden: int, proj: int, batch: int, dtype: torch.dtype, tf32: bool, schedule: str
) -> None:
    """Counts the kernels, because a layer that cannot be resident silently runs stepwise."""
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 applies to float32 only")
    if schedule == "persistent":
        require_fit(Shape(4, batch, 16, hidden, 1, {}), cell, dtype, tf32, proj)
    options = {"proj_size": proj} if proj > 0 else {}
    module = build(cell, 16, hidden, dtype=dtype, **options).cuda()
    x, hx = make(4, batch, 16, dtype=dtype), make_states(module, batch, dtype)
    torch.backends.cudnn.allow_tf32 = tf32
    if not tf32:
        check(module, x, hx)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(module, x, hx)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or []]
    if not any("fastrnn" in name for name in names):
        pytest.skip("the profiler records no kernels here")
    launches = sum("walk_kernel" in name for name in names)
    assert launches == (2 if schedule == "persistent" else 0)  # forward and backward


@pytest.mark.parametrize("name", ["fast", "Persistent", " stepwise"])
def test_unknown_schedule_is_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("gru", 3, 2, 4)
    expected = gradients(args)
    monkeypatch.setenv("FASTRNN_SCHEDULE", name)
    message = "fastrnn: FASTRNN_SCHEDULE must be auto, persistent or stepwise, got"
    with pytest.raises(RuntimeError, match=rf"^{message} '{name}'\.$"):
        by_kernels(*args)
    monkeypatch.setenv("FASTRNN_SCHEDULE", "auto")
    assert all(torch.equal(a, b) for a, b in zip(gradients(args), expected, strict=True))


# H of two layers. At 1024 the blocks of a layer fill an H100 except for four multiprocessors.
PAIRS = [(64, 64), (1024, 64), (1024, 1024)]


@only_persistent
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", PAIRS, ids=str)
def test_two_streams_run_without_deadlock(
    sizes: tuple[int, int], threads: int, schedule: str
) -> None:
    """Blocks of a layer wait for each other, so all of them must become resident."""
    layers = [
        arguments(cell, 40, 20, hidden, torch.float16)
        for cell, hidden in zip(("lstm", "gru"), sizes, strict=True)
    ]
    expected = [gradients(args) for args in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    found: list[list[list[Tensor]]] = [[] for _ in layers]
    torch.cuda.synchronize()

    def launch(*numbers: int) -> None:
        for _ in range(10):
            for number in numbers:
                with torch.cuda.stream(streams[number]):
                    found[number].append(gradients(layers[number]))

    if threads == 1:
        launch(0, 1)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(launch, number) for number in range(threads)]:
                done.result(timeout=60)
    finish(*streams)
    for results, truth in zip(found, expected, strict=True):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, truth, strict=True))


@both_schedules
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_unaffected_by_work_on_another_stream(cell: str) -> None:
    """Another stream keeps the GPU busy before, during and after the calls."""
    args = arguments(cell, 30, 20, 1024, torch.float16)
    busy = torch.ones(4096, 4096, dtype=torch.float16, device="cuda")
    expected = gradients(args)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()

    def occupy() -> None:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            for _ in range(20):
                torch.mm(busy, busy)

    found = []
    for _ in range(3):
        occupy()
        found.append(gradients(args))
    occupy()
    finish(side, torch.cuda.current_stream())
    for result in found:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


# -- TF32 -----------------------------------------------------------------------------------------


needs_tf32 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="needs tensor cores with TF32",
)


def both_passes(cell: str, args: tuple[Any, ...], change: Change) -> dict[str, Tensor]:
    """Returns the results of both operators. The outputs serve as their own gradients."""
    x, h0, c0 = (None if t is None else change(t.detach()) for t in args[:3])
    weights = [change(w.detach()) for w in args[3]]
    given = (h0, c0, weights, slots_by_count(len(weights)), None)
    y, h_n, c_n, saved = torch.ops.fastrnn.recurrent_forward(x, *given, cell, -1)
    d_pre, _, d_h0, _ = torch.ops.fastrnn.recurrent_backward(
        y, h_n, None if c0 is None else c_n, *given, y, saved, cell
    )
    return {"y": y, "h_n": h_n, "d_pre": d_pre, "d_h0": d_h0}


@needs_tf32
@pytest.mark.parametrize("shape", [(6, 7, 17), (4, 33, 40), (20, 64, 512)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_tf32_error_is_between_float32_and_float16(
    cell: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands of recurrent products have 10 bits, like float16. The input product has K = 3."""
    steps, batch, hidden = shape
    require_fit(Shape(steps, batch, 3, hidden, 1, {}), cell, torch.float32, tf32=True)
    args = arguments(cell, steps, batch, hidden, inputs=3)
    monkeypatch.setenv("FASTRNN_SCHEDULE", "stepwise")
    full, halves = (both_passes(cell, args, change) for change in (Tensor.float, Tensor.half))
    monkeypatch.setenv("FASTRNN_SCHEDULE", "persistent")
    torch.backends.cudnn.allow_tf32 = True
    fast = both_passes(cell, args, Tensor.float)
    for name in ("y", "h_n", *([] if cell == "rnn_relu" else ["d_pre", "d_h0"])):

        def exact(change: Change, name: str = name) -> Tensor:
            return both_passes(cell, args, change)[name]

        assert_is_between(fast[name], full[name], halves[name], exact, name)


@both_schedules
@needs_tf32
def test_tf32_follows_the_cudnn_setting() -> None:
    """``nn.LSTM`` does the same. Later matrix products by torch are unaffected."""
    args = arguments("lstm", 3, 64, 512)
    truth_args = [
        [w.double() for w in a] if isinstance(a, list) else a.double() if a is not None else None
        for a in args[:4]
    ]
    with torch.no_grad():
        truth, *_ = by_reference(*truth_args, None, args[5])
        torch.backends.cuda.matmul.allow_tf32 = True
        exact, *_ = by_kernels(*args)
        torch.backends.cuda.matmul.allow_tf32 = False
        square = torch.randn(512, 512, device="cuda")
        product = square @ square
        torch.backends.cudnn.allow_tf32 = True
        fast, *_ = by_kernels(*args)
        assert torch.equal(square @ square, product)
    assert not torch.equal(fast, exact)
    assert error(fast, truth) > 8 * error(exact, truth)  # products have 13 bits fewer


# -- torch ----------------------------------------------------------------------------------------


@both_schedules
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_device_than_the_current_one_works() -> None:
    module = build("gru", 5, 8).to("cuda:1")
    x = torch.randn(4, 2, 5, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y, _ = module(x)
    assert y.device == x.device
    assert torch.cuda.current_device() == 0
    module, x = module.cpu(), x.cpu()
    assert_agrees(y.cpu(), module(x)[0], exact_call(module, x, call=first))


def test_tensors_on_two_devices_are_rejected() -> None:
    x, h0, c0, weights, _, _ = arguments("gru", 3, 2, 4)
    slots = slots_by_count(len(weights))
    with pytest.raises(RuntimeError, match="h0 must be on the device of the input"):
        torch.ops.fastrnn.recurrent_forward(x, h0.cpu(), c0, weights, slots, None, "gru", 0)
    with pytest.raises(RuntimeError, match="x must be on a CUDA device"):
        torch.ops.fastrnn.recurrent_forward(x.cpu(), h0, c0, weights, slots, None, "gru", 0)


@both_schedules
@pytest.mark.parametrize("cell", CELLS)
def test_operator_passes_opcheck(cell: str) -> None:
    x, h0, c0, weights, _, _ = arguments(cell, 3, 2, 4)
    weights = [w.detach() for w in weights]
    states = (h0.detach(), None if c0 is None else c0.detach())
    given = (x.detach(), *states, weights, slots_by_count(len(weights)), None, cell)
    torch.library.opcheck(torch.ops.fastrnn.recurrent_forward.default, (*given, -1))


def test_module_moved_to_the_gpu_matches_the_cpu() -> None:
    module = fastrnn.LSTM(3, 4, bidirectional=True)
    x = torch.randn(5, 2, 3)
    expected, _ = module(x)
    found, _ = module.cuda()(x.cuda())
    assert_agrees(found.cpu(), expected, exact_call(module.cpu(), x, call=first))


# -- random layers --------------------------------------------------------------------------------


class Soak:
    """A random layer, input and schedule, drawn with a seed."""

    def __init__(self, seed: int) -> None:
        draw = python_random.Random(seed)
        self.cell = draw.choice(list(CELLS))
        self.dtype = draw.choice([*DTYPES, *PERSISTENT_DTYPES])
        self.schedule = draw.choice(["auto", "persistent", "persistent", "stepwise"])
        largest = draw.choice([8, 40, 300, 1100])
        hidden = draw.randint(1, largest)
        self.options = {
            "input_size": draw.choice([1, 3, 16, 33, hidden]),
            "hidden_size": hidden,
            "num_layers": draw.choice([1, 1, 2]),
            "bias": draw.random() < 0.8,
            "bidirectional": draw.random() < 0.5,
        }
        if self.cell == "lstm" and hidden > 1 and draw.random() < 0.1:
            self.options["proj_size"] = draw.randint(1, hidden - 1)
        steps = draw.randint(1, draw.choice([4, 12, 40]))
        batch = draw.randint(1, draw.choice([4, 20, 140 if largest <= 300 else 40]))
        self.lengths = [steps] * batch
        self.packed = draw.random() < 0.4
        if self.packed:
            self.lengths = [draw.randint(1, steps) for _ in range(batch)]
        self.has_states = draw.random() < 0.7

    def __str__(self) -> str:
        form = f"lengths {self.lengths}" if self.packed else f"T{self.lengths[0]}"
        layer = f"{self.cell} {self.dtype} {self.schedule} {self.options}"
        return f"{layer} B{len(self.lengths)} {form}"

    def check(self) -> None:
        """Compares all results with float64 and torch."""
        module = build(self.cell, **self.options, dtype=self.dtype).cuda()
        inputs, batch = module.input_size, len(self.lengths)
        if self.packed:
            rows = make(sum(self.lengths), inputs, dtype=self.dtype)
            x: Any = pack(rows, self.lengths, enforce_sorted=False)
        else:
            x = make(self.lengths[0], batch, inputs, dtype=self.dtype)
        hx = make_states(module, batch, self.dtype) if self.has_states else None
        check(module, x, hx)


PERSISTENT_DTYPES = [d for d in DTYPES if d != torch.float64]


@pytest.mark.slow
def test_random_layers_match_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks layers of seeds 0, 1, 2, ... for as long as the time allows."""
    end = time.monotonic() + float(os.environ.get("FASTRNN_SOAK_SECONDS") or 20)
    for seed in itertools.count():
        case = Soak(seed)
        if (case.cell, case.dtype) not in CASES:
            continue
        monkeypatch.setenv("FASTRNN_SCHEDULE", case.schedule)
        try:
            case.check()
        except Exception as problem:
            raise AssertionError(f"Soak({seed}), {case}: {problem}") from problem
        if time.monotonic() > end:
            break
    print(f"{seed + 1} layers drawn")


@pytest.mark.parametrize("returned", ["return_all_states", "return_gates"])
def test_states_of_marked_rows_match_the_cpu(returned: str) -> None:
    module = build("lstm", 5, 7, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(9, 4, 5, dtype=torch.float64), torch.tensor([9, 0, 3, 5])
    resets = torch.rand(9, 4) < 0.3
    expected = module(x, lengths=lengths, resets=resets, **{returned: True})
    options = {"lengths": lengths.cuda(), "resets": resets.cuda(), returned: True}
    found = module.cuda()(x.cuda(), **options)
    torch.testing.assert_close(found[0].cpu(), expected[0])
    for got, own in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(got.cpu(), own)


def test_second_derivatives_with_marks_on_the_gpu() -> None:
    module = build("gru", 5, 7, dtype=torch.float64)
    start = torch.randn(9, 4, 5, dtype=torch.float64)
    resets = torch.rand(9, 4) < 0.3
    found = []
    for device in ("cpu", "cuda"):
        x = start.to(device).requires_grad_()
        y, _ = module.to(device)(x, resets=resets.to(device))
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append(second.cpu())
    torch.testing.assert_close(found[1], found[0])
