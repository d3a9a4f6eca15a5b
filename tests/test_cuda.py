"""The kernels on a GPU: every dtype against float64, and how they behave on streams and in graphs.

Skipped where there is no GPU. The parts that need none are in `test_cuda_host.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import CELLS, DTYPES, build, check, pack, random, reference_math, torch_twin
from tolerance import assert_close, error
from torch import Tensor, nn

import fastrnn
from fastrnn import _library, ops, reference
from fastrnn.spec import CELLS as SPECS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _library.cuda_kernels, reason="fastrnn has no CUDA kernels here"),
]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Neither fastrnn nor torch may use TF32 unless a test asks for it."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn


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
    cell: str, steps: int, batch: int, hidden: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """x, h0, c0, weights, batch_sizes, spec of a layer in one direction."""
    spec = SPECS[cell]
    gates = spec.gates * hidden
    weights = [
        make(*size, dtype=dtype, seed=seed).detach().mul_(hidden**-0.5).requires_grad_()
        for seed, size in enumerate([(gates, hidden), (gates, hidden), (gates,), (gates,)])
    ]
    c0 = make(1, batch, hidden, dtype=dtype, seed=8) if spec.has_cell_state else None
    x = make(steps, batch, hidden, dtype=dtype)
    return x, make(1, batch, hidden, dtype=dtype, seed=7), c0, weights, None, spec


HALF = (torch.float16, torch.bfloat16)
# The gradient of relu jumps at 0, and a sum near 0 of values rounded to half types may land on
# either side: a gradient test would find chance. `test_relu_in_half_types` compares the rest.
CASES = [(c, d) for c in CELLS for d in DTYPES if c != "rnn_relu" or d not in HALF]

#          T, B, I, H
SHAPES = [(1, 1, 1, 1), (7, 3, 5, 17), (5, 16, 64, 128), (3, 2, 300, 260), (4, 0, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("cell", "dtype"), CASES, ids=str)
def test_padded(cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    steps, batch, inputs, hidden = shape
    module = build(cell, inputs, hidden, bidirectional=True, dtype=dtype).cuda()
    check(module, make(steps, batch, inputs, dtype=dtype), make_states(module, batch, dtype))


@pytest.mark.parametrize("lengths", [[4], [5, 5, 3, 1], [1, 6, 2, 6, 3]], ids=str)
@pytest.mark.parametrize(("cell", "dtype"), CASES, ids=str)
def test_rows_of_different_lengths(cell: str, lengths: list[int], dtype: torch.dtype) -> None:
    module = build(cell, 3, 33, bidirectional=True, num_layers=2, dtype=dtype).cuda()
    x = pack(make(sum(lengths), 3, dtype=dtype), lengths, enforce_sorted=False)
    check(module, x, make_states(module, len(lengths), dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_relu_in_half_types(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    steps, batch, inputs, hidden = shape
    module = build("rnn_relu", inputs, hidden, bidirectional=True, dtype=dtype).cuda()
    x = make(steps, batch, inputs, dtype=dtype)
    with torch.no_grad():
        ours, theirs = module(x), torch_twin(module)(x)
        with reference_math():
            truth = copy.deepcopy(module).double()(x.double())
    for name, *values in zip(("y", "h_n"), ours, theirs, truth, strict=True):
        assert_close(*values, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_projection(packed: bool, dtype: torch.dtype) -> None:
    module = build("lstm", 4, 40, proj_size=9, bidirectional=True, dtype=dtype).cuda()
    lengths = [5, 3, 3, 1]
    x: Any = make(6, 4, 4, dtype=dtype)
    if packed:
        x = pack(make(sum(lengths), 4, dtype=dtype), lengths, enforce_sorted=True)
    check(module, x, make_states(module, 4, dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_more_steps_than_a_grid_has_rows(cell: str) -> None:
    args = arguments(cell, 70_000, 1, 4)
    with torch.no_grad():
        y, h_n, _ = ops.layer(*args)
    assert y.isfinite().all()
    assert torch.equal(y[-1], h_n[0])


def gradients(args: tuple[Any, ...]) -> list[Tensor]:
    x, h0, c0, weights, *_ = args
    y, h_n, c_n = ops.layer(*args)
    outputs = [y, h_n] if c_n is None else [y, h_n, c_n]
    leaves = [x, h0, *([] if c0 is None else [c0]), *weights]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_repeats_to_the_bit(cell: str, dtype: torch.dtype) -> None:
    args = arguments(cell, 12, 8, 64, dtype)
    first = gradients(args)
    for _ in range(3):
        again = gradients(args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_host_never_waits(cell: str) -> None:
    args = arguments(cell, 6, 4, 16)
    gradients(args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cell", CELLS)
def test_follows_the_current_stream(cell: str) -> None:
    args = arguments(cell, 30, 8, 128)
    expected = gradients(args)
    stream = torch.cuda.Stream()
    x = args[0]
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever reads on another stream reads zeros
        late.copy_(x.detach())
        found = gradients((late.requires_grad_(), *args[1:]))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_forward_in_a_graph(cell: str) -> None:
    args = arguments(cell, 9, 4, 32)
    static = args[0].detach().clone()
    with torch.no_grad():
        ops.layer(static, *args[1:])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.layer(static, *args[1:])
        for seed in (21, 22):
            x = make(*static.shape, dtype=static.dtype, seed=seed).detach()
            static.copy_(x)
            graph.replay()
            expected = ops.layer(x, *args[1:])
            for a, b in zip(captured, expected, strict=True):
                assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_training_step_in_a_graph(cell: str) -> None:
    args = arguments(cell, 9, 4, 32)
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


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="needs tensor cores that know TF32",
)
def test_tf32_follows_the_switch_of_matrix_products() -> None:
    args = arguments("lstm", 3, 64, 512)
    truth_args = [
        [w.double() for w in a] if isinstance(a, list) else a.double() if a is not None else None
        for a in args[:4]
    ]
    with torch.no_grad():
        truth, *_ = reference.layer(*truth_args, None, args[5])
        exact, *_ = ops.layer(*args)
        torch.backends.cuda.matmul.allow_tf32 = True
        fast, *_ = ops.layer(*args)
    assert not torch.equal(fast, exact)
    assert error(fast, truth) > 8 * error(exact, truth)  # 13 bits fewer in every product


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_the_current_one() -> None:
    module = build("gru", 5, 8).to("cuda:1")
    x = torch.randn(4, 2, 5, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y, _ = module(x)
    assert y.device == x.device
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), module.cpu()(x.cpu())[0])


def test_tensors_of_two_devices_are_refused() -> None:
    x, h0, c0, weights, _, _ = arguments("gru", 3, 2, 4)
    with pytest.raises(RuntimeError, match="h0 must be on the device of the input"):
        torch.ops.fastrnn.layer_forward(x, h0.cpu(), c0, weights, None, "gru", False)
    with pytest.raises(RuntimeError, match="x must be on a CUDA device"):
        torch.ops.fastrnn.layer_forward(x.cpu(), h0, c0, weights, None, "gru", False)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str) -> None:
    x, h0, c0, weights, _, _ = arguments(cell, 3, 2, 4)
    weights = [w.detach() for w in weights]
    given = (x.detach(), h0.detach(), None if c0 is None else c0.detach(), weights, None, cell)
    torch.library.opcheck(torch.ops.fastrnn.layer_forward.default, (*given, True))


def test_module_moves_with_its_state() -> None:
    module = fastrnn.LSTM(3, 4, bidirectional=True)
    x = torch.randn(5, 2, 3)
    expected, _ = module(x)
    found, _ = module.cuda()(x.cuda())
    torch.testing.assert_close(found.cpu(), expected)
