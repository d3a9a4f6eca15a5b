"""Autocast and half types: the types of the results, casts, memory, steps, graphs.

Gradients and transforms under autocast are in test_differentiation, compiled code in test_compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import build, make_step, torch_twin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = ["RNN", "LSTM", "GRU"]
STEPS = ["RNNCell", "LSTMCell", "GRUCell"]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# H of a step that the kernels compute, and of a step that torch's own operators compute
SMALL, LARGE = 3, 400


@pytest.fixture(autouse=True)
def _with_autocasts_cache() -> Iterator[None]:
    """Enables autocast's cache again, because a failed torch.onnx.export leaves it disabled."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    yield
    torch.set_autocast_cache_enabled(enabled)


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for result in results for t in flat(result)]


def make_state(name: str, hidden: int, dtype: torch.dtype, device: str = "cpu") -> Any:
    shape = (2, hidden) if name in STEPS else (1, 2, hidden)
    h = torch.linspace(-1, 1, 2 * hidden, device=device).view(shape).to(dtype)
    return (h, h.flip(-1)) if "LSTM" in name else h


def make_input(name: str, dtype: torch.dtype, steps: int = 5, device: str = "cpu") -> Tensor:
    shape = (2, 4) if name in STEPS else (steps, 2, 4)
    return torch.linspace(-2, 2, 8 * (1 if name in STEPS else steps)).view(shape).to(device, dtype)


def torch_runs(name: str, dtype: torch.dtype, device: str) -> bool:
    """Whether torch.nn supports this class under autocast to this type (oneDNN on the CPU)."""
    if device != "cpu" or name != "LSTM":
        return True
    return dtype == BFLOAT16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize("hidden", [SMALL, LARGE])
@pytest.mark.parametrize("of_state", [None, FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("of_input", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("of_weights", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *STEPS])
def test_result_dtypes_match_torch(
    name: str,
    dtype: torch.dtype,
    of_weights: torch.dtype,
    of_input: torch.dtype,
    of_state: torch.dtype | None,
    hidden: int,
    device: str,
) -> None:
    module = getattr(fastrnn, name)(4, hidden, device=device).to(of_weights)
    twin = torch_twin(module)
    for steps in (5, 1):
        x = make_input(name, of_input, steps, device)
        hx = None if of_state is None else make_state(name, hidden, of_state, device)
        for with_grad in (True, False):
            with torch.set_grad_enabled(with_grad), torch.autocast(device, dtype):
                got = flat(module(x, hx))
                if torch_runs(name, dtype, device):
                    expected = [t.dtype for t in flat(twin(x, hx))]
                else:
                    expected = [dtype] * 3
            assert [t.dtype for t in got] == expected
        if name in STEPS:
            break


@pytest.mark.parametrize("name", LAYERS)
def test_layer_computes_in_float32_and_rounds_its_results(name: str) -> None:
    module = getattr(fastrnn, name)(4, 3, 2, bidirectional=True)
    x = make_input(name, FLOAT32).requires_grad_()
    exact = flat(module(x))
    with torch.autocast("cpu", BFLOAT16):
        got = flat(module(x))
    inputs = [x, *module.parameters()]
    directions = [torch.ones_like(t) for t in got]
    for result, value in zip(got, exact, strict=True):
        assert torch.equal(result, value.to(result.dtype))
    wide = [d.float() for d in directions]
    gradients = torch.autograd.grad(got, inputs, directions)
    expected = torch.autograd.grad(exact, inputs, wide)
    for d_got, d_exact in zip(gradients, expected, strict=True):
        assert torch.equal(d_got, d_exact)


@pytest.mark.parametrize("name", LAYERS)
def test_float64_and_complex_are_not_cast(name: str) -> None:
    for dtype in (torch.float64, torch.complex64):
        module = getattr(fastrnn, name)(4, 3, dtype=dtype)
        x = torch.ones(5, 2, 4, dtype=dtype)
        with torch.autocast("cpu", BFLOAT16):
            assert module(x)[0].dtype == dtype
            assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_large_step_runs_torchs_step(name: str, dtype: torch.dtype) -> None:
    """Covers autocast, half types and gradients."""
    step = getattr(fastrnn, name)(4, LARGE)
    for module, x, under_autocast in (
        (step, make_input(name, FLOAT32), True),
        (copy.deepcopy(step).to(dtype), make_input(name, dtype), False),
    ):
        hx = make_state(name, LARGE, x.dtype)
        results = []
        for m in (module, torch_twin(module)):
            with torch.autocast("cpu", dtype, enabled=under_autocast):
                out = flat(m(x, hx))
            loss = sum((t.float().square().sum() for t in out), torch.zeros(()))
            results.append([*out, *torch.autograd.grad(loss, list(m.parameters()))])
        for got, expected in zip(*results, strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_large_single_step_of_a_layer_equals_torchs_cell(
    cell: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    module = build(cell, 4, LARGE, batch_first=True, dtype=dtype, **options)
    x = torch.linspace(-1, 1, 16, dtype=dtype).view(4, 1, 4)
    y, states = module(x)
    h_n = flat(states)[0]
    first = make_step(cell, 4, LARGE, dtype=dtype)
    names = zip(first._parameters, list(module._parameters)[:4], strict=True)
    for name, name_in_layer in names:
        setattr(first, name, module._parameters[name_in_layer])
    assert torch.equal(flat(first(x[:, 0]))[0], h_n[0])
    directions = 2 if module.bidirectional else 1
    last = torch.cat(list(h_n[-directions:]), -1)
    assert torch.equal(y, last.unsqueeze(1))
    # as exact as torch's own layer
    exact = flat(copy.deepcopy(module).double()(x.double()))
    error = (y.double() - exact[0]).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps
    sum((t.float().sum() for t in (y, h_n)), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in module.parameters())


class CountCasts(TorchDispatchMode):
    """Adds up the values that are cast from one type to another."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.values += result.numel()
        return result


def count_casts(module: nn.Module, hidden: int, steps: int) -> int:
    name = type(module).__name__
    x, state = make_input(name, FLOAT32, 1), make_state(name, hidden, FLOAT32)
    with CountCasts() as counter, torch.autocast("cpu", BFLOAT16):
        for _ in range(steps):
            result = module(x, state)
            state = result if name in STEPS else result[1]
    return counter.values


@pytest.mark.parametrize("hidden", [SMALL, LARGE])
@pytest.mark.parametrize("name", [*LAYERS, *STEPS])
def test_weights_are_cast_at_most_once(name: str, hidden: int) -> None:
    """Nine more steps cast only more inputs, states and results, but no weights."""
    module = getattr(fastrnn, name)(4, hidden)
    once, often = (count_casts(module, hidden, steps) for steps in (1, 11))
    assert (often - once) / 10 <= 2 * 4 + 8 * 2 * hidden


def saved_bytes(call: Callable[[], Any]) -> int:
    """Returns the bytes of all storages that a graph saves for its backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert flat(result)[0].grad_fn is not None
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", [*LAYERS, *STEPS])
def test_loop_of_steps_saves_no_more_than_torch(name: str) -> None:
    module = getattr(fastrnn, name)(LARGE, LARGE)
    x = torch.randn((8, LARGE) if name in STEPS else (1, 8, LARGE))

    def loop(m: nn.Module) -> Any:
        state = None
        with torch.autocast("cpu", BFLOAT16):
            for _ in range(10):
                result = m(x, state)
                state = result if name in STEPS else result[1]
        return state

    twin = torch_twin(module)
    if torch_runs(name, BFLOAT16, "cpu"):
        assert saved_bytes(lambda: loop(module)) <= 1.1 * saved_bytes(lambda: loop(twin))


def test_cell_state_stays_float32() -> None:
    """Counts to more than 256, where a bfloat16 state would stop."""
    cell = fastrnn.LSTMCell(1, 1)
    with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
        for p in cell.parameters():
            p.zero_()
        cell.bias_ih.fill_(20.0)  # every gate open, g = 1
        h = c = torch.zeros(1, 1)
        for _ in range(600):
            h, c = cell(torch.zeros(1, 1), (h, c))
    assert c.item() == 600


@pytest.mark.parametrize("hidden", [SMALL, LARGE])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "GRU"])
def test_state_fits_a_float32_buffer(name: str, hidden: int) -> None:
    buffer = torch.zeros(6, hidden)
    rows = torch.tensor([4, 1])
    module = getattr(fastrnn, name)(4, hidden)
    with torch.autocast("cpu", BFLOAT16):
        result = module(make_input(name, FLOAT32, 1))
        h = flat(result if name in STEPS else result[1])[0]
        buffer[rows] = h.view(2, hidden)
    assert torch.equal(buffer[rows], h.view(2, hidden))


class Model(nn.Module):
    """A linear layer, whose output is bfloat16 under autocast, before a recurrent layer."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.recurrent = getattr(fastrnn, name)(4, 3, **options)

    def forward(self, x: Tensor):
        return self.recurrent(self.linear(x))


CAPTURES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", [*LAYERS, *STEPS])
def test_captured_graph_under_autocast_matches_the_eager_model(
    name: str, capture: str, inside: bool
) -> None:
    """Captures the model outside or inside autocast, and runs the graph under autocast."""
    torch.manual_seed(0)
    model = Model(name)
    x = make_input(name, FLOAT32)
    # as for torch.nn, tracing does not work with autocast's cache
    with torch.autocast("cpu", BFLOAT16, enabled=inside, cache_enabled=False):
        graph = CAPTURES[capture](model, x)
    with torch.autocast("cpu", BFLOAT16):
        expected, got = flat(model(x)), flat(graph(x))
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for value, truth in zip(got, expected, strict=True):
        if name in STEPS:  # the eager one is torch's own
            torch.testing.assert_close(value, truth, rtol=0.01, atol=0.01)
        else:
            assert torch.equal(value, truth)
    sum((t.float().sum() for t in got), torch.zeros(())).backward()
    exact = flat(model(x))
    for value, truth in zip(flat(graph(x)) if not inside else got, exact, strict=True):
        torch.testing.assert_close(value.float(), truth, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_captured_stack_rounds_no_more_than_an_eager_one(name: str) -> None:
    model = Model(name, num_layers=2, bidirectional=True)
    x = make_input(name, FLOAT32)
    with torch.autocast("cpu", BFLOAT16):
        expected = flat(model(x))
        graph = torch.compile(model, backend="eager", fullgraph=True)
        for value, truth in zip(flat(graph(x)), expected, strict=True):
            assert value.dtype == truth.dtype
            assert torch.equal(value, truth)


def test_graph_with_input_on_another_device_raises_the_operators_error() -> None:
    x, h = torch.zeros(5, 2, 3, device="meta"), torch.zeros(1, 2, 4)
    weights = [torch.zeros(4, 3), torch.zeros(4, 4)]
    with torch.autocast("cpu", BFLOAT16), pytest.raises(RuntimeError, match="on the device of"):
        torch.ops.fastrnn.recurrent_layer(x, h, None, weights, 3, None, "rnn_tanh")
