"""`layer.stream()`: results, states, snapshot of the weights, errors, threads, processes."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from support import CELLS, build, exact_call, run_python
from tolerance import assert_agrees
from torch import Tensor, nn

import fastrnn
from fastrnn import _C


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Any:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(None)


def assert_same_as_module(module: nn.Module, session: Any, batch: int) -> None:
    """Compares steps and runs that follow one another with one call of the module."""
    dtype = next(module.parameters()).dtype
    x = torch.randn(9, batch, module.input_size, dtype=dtype)
    with torch.no_grad():
        parts = [session.step(row.contiguous()).clone().unsqueeze(0) for row in x[:2]]
        parts.append(session.run(x[2:6]))
        parts += [session.step(x[6]).clone().unsqueeze(0), session.run(x[7:])]
        ours = (torch.cat(parts), session.state)
        assert_agrees(ours, module(x), exact_call(module, x))


SHAPES = [
    {"input_size": 5, "hidden_size": 7},
    {"input_size": 33, "hidden_size": 70, "num_layers": 2},
    {"input_size": 16, "hidden_size": 48, "num_layers": 3, "bias": False},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_runs_agree_with_the_module(
    isa: str, cell: str, shape: dict[str, Any], batch: int, dtype: torch.dtype
) -> None:
    module = build(cell, **shape, dtype=dtype).eval()
    assert_same_as_module(module, fastrnn.Session(module, batch), batch)


def test_projection_agrees_with_the_module(isa: str) -> None:
    module = build("lstm", 20, 50, num_layers=2, proj_size=30).eval()
    assert_same_as_module(module, fastrnn.Session(module, 2), 2)


@pytest.mark.parametrize("cell", CELLS)
def test_large_layers_agree_with_the_module(cell: str) -> None:
    """The weights are large enough for steps with several threads."""
    module = build(cell, 300, 600).eval()
    assert_same_as_module(module, module.stream(), 1)
    assert_same_as_module(module, module.stream(threads=torch.get_num_threads()), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_half_types_agree_with_the_module(cell: str, dtype: torch.dtype) -> None:
    module = build(cell, 20, 30, num_layers=2, dtype=dtype).eval()
    assert_same_as_module(module, module.stream(2), 2)


def test_long_runs_agree_with_the_module() -> None:
    """A run is longer than what the session computes at once."""
    module = build("lstm", 5, 7, num_layers=3).eval()
    x = torch.randn(333, 2, 5)
    with torch.no_grad():
        session = module.stream(2)
        ours = session.run(x), session.state
        assert_agrees(ours, module(x), exact_call(module, x))


def test_batch_first_runs_take_and_return_the_batch_first() -> None:
    module = build("gru", 5, 7, batch_first=True).eval()
    session = fastrnn.Session(module, 3)
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        assert_agrees(session.run(x), module(x)[0], lambda f: exact_call(module, x)(f)[0])


def test_states_can_be_read_set_and_reset() -> None:
    module = build("lstm", 5, 7, num_layers=2).eval()
    session, x = fastrnn.Session(module), torch.randn(6, 1, 5)
    first = session.run(x)
    middle = session.state
    second = session.run(x)
    assert not torch.equal(first, second)
    session.load_state(middle)
    assert torch.equal(session.run(x), second)
    session.reset()
    assert all(not state.any() for state in session.state)
    assert torch.equal(session.run(x), first)
    session.load_state([state.clone() for state in middle])
    assert all(map(torch.equal, session.state, middle))
    gru = build("gru", 5, 7).eval()
    one = fastrnn.Session(gru)
    one.load_state(torch.ones(1, 1, 7))
    assert torch.equal(one.state, torch.ones(1, 1, 7))


def test_output_can_be_the_next_input() -> None:
    module = build("gru", 40, 40, num_layers=2).eval()
    session, x = fastrnn.Session(module), torch.randn(1, 40)
    plain = fastrnn.Session(module)
    y, expected = session.step(x), plain.step(x).clone()
    for _ in range(3):
        y, expected = session.step(y), plain.step(expected).clone()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_receives_the_output(dtype: torch.dtype) -> None:
    module = build("gru", 6, 6, dtype=dtype).eval()
    session, plain = module.stream(2), module.stream(2)
    x = torch.randn(2, 6, dtype=dtype)
    out = torch.empty(2, 6, dtype=dtype)
    assert session.step(x, out) is out
    assert torch.equal(out, plain.step(x))
    expected = plain.step(out).clone()
    assert session.step(out, out=out) is out
    assert torch.equal(out, expected)
    rows = torch.zeros(5, 6, dtype=dtype)
    session.reset()
    plain.reset()
    for row in (0, 3):
        session.step(x, rows[row : row + 2])
    assert torch.equal(rows[:2], plain.step(x))
    assert torch.equal(rows[3:], plain.step(x))
    assert not rows[2].any()


WRONG_OUTPUTS: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "out must be a tensor, got 3"),
    (torch.zeros(1, 7).double(), RuntimeError, "out must be torch.float32, got torch.float64"),
    (torch.zeros(7), RuntimeError, r"out must be of size \[1, 7\], got \[7\]"),
    (torch.zeros(1, 14)[:, ::2], RuntimeError, r"out must be contiguous, got strides \(14, 2\)"),
    (torch.zeros(1, 7, device="meta"), RuntimeError, "out must be a dense tensor on the CPU"),
    (torch.zeros(1, 7).to_sparse(), RuntimeError, "out must be a dense tensor on the CPU"),
    (torch.zeros(1, 7).requires_grad_(), RuntimeError, "out must be without a gradient"),
]


@pytest.mark.parametrize(("out", "kind", "message"), WRONG_OUTPUTS, ids=lambda v: str(v)[:40])
def test_wrong_out_is_rejected(out: Any, kind: type[Exception], message: str) -> None:
    session = build("gru", 5, 7).eval().stream()
    with pytest.raises(kind, match=f"^Session.step: {message}"):
        session.step(torch.ones(1, 5), out)
    assert not session.state.any()


def test_out_without_memory_is_rejected() -> None:
    session, out = build("gru", 5, 7).eval().stream(), torch.zeros(1, 7)
    out.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match="storage holds all its values"):
        session.step(torch.ones(1, 5), out)


@pytest.mark.parametrize(
    "rows",
    [1, [1], (1,), torch.tensor(1), torch.tensor([1, 1]), torch.tensor([False, True, False])],
    ids=str,
)
def test_reset_clears_the_rows(rows: Any) -> None:
    session = build("lstm", 5, 7, num_layers=2).eval().stream(3)
    session.run(torch.randn(4, 3, 5))
    before = session.state
    session.reset(rows)
    for old, new in zip(before, session.state, strict=True):
        assert not new[:, 1].any()
        assert torch.equal(new[:, ::2], old[:, ::2])
        assert old.all()


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (3, IndexError, "from 0 to 2, got 3"),
        ([0, -1], IndexError, "from 0 to 2, got -1"),
        ("1", TypeError, "an int, a list of ints, or an int or bool tensor, got '1'"),
        ([1.0], TypeError, "an int, a list of ints"),
        (True, TypeError, "an int, a list of ints"),
        (torch.tensor([1.0]), TypeError, "an int tensor with one dimension"),
        (torch.tensor([[1]]), TypeError, "an int tensor with one dimension"),
        (torch.tensor([True]), RuntimeError, r"a bool tensor of size \[3\], got \[1\]"),
    ],
    ids=str,
)
def test_wrong_rows_are_rejected(rows: Any, kind: type[Exception], message: str) -> None:
    session = build("gru", 5, 7).eval().stream(3)
    session.run(torch.randn(4, 3, 5))
    before = session.state
    with pytest.raises(kind, match=f"^Session.reset: rows must be {message}"):
        session.reset(rows)
    assert torch.equal(session.state, before)


def test_a_session_shows_that_it_is_stale() -> None:
    module = build("gru", 5, 7).eval()
    session = module.stream()
    assert not session.is_stale

    def in_place() -> None:
        with torch.no_grad():
            module.bias_hh_l0.add_(1)

    def replaced() -> None:
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.clone())

    def loaded() -> None:
        module.load_state_dict({name: 2 * w for name, w in module.state_dict().items()})

    for change in (in_place, replaced, loaded):
        change()
        assert session.is_stale
        assert ", stale)" in repr(session)
        session.refresh()
        assert not session.is_stale
    module.double()
    assert session.is_stale
    module.float()
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    session = module.stream()
    assert not session.is_stale
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
    assert session.is_stale


def test_a_closed_session_raises() -> None:
    session = build("lstm", 5, 7).eval().stream()
    y, state = session.step(torch.ones(1, 5)), session.state
    session.close()
    session.close()
    assert y.shape == (1, 7)
    assert repr(session).endswith(", closed)")
    for name, call in {
        "step": lambda: session.step(torch.ones(1, 5)),
        "run": lambda: session.run(torch.ones(1, 1, 5)),
        "reset": session.reset,
        "state": lambda: session.state,
        "load_state": lambda: session.load_state(state),
        "refresh": session.refresh,
        "export": lambda: session.export("unused"),
    }.items():
        with pytest.raises(RuntimeError, match=f"^Session.{name}: the session is closed"):
            call()


@pytest.mark.parametrize("method", ["step", "run"])
def test_calls_of_one_thread_acquire_no_buffers(method: str) -> None:
    """The kernels have all their memory from the start. (tests/c counts all allocations.)"""
    module = build("lstm", 300, 300, num_layers=3).eval()
    session, x = module.stream(2), torch.randn(100, 2, 300)
    _C.release_cached_buffers()
    before = _C._testing.fresh_buffers()
    if method == "step":
        session.step(x[0])
    else:
        session.run(x)
    assert _C._testing.fresh_buffers() == before
    module.stream(2)
    assert _C._testing.fresh_buffers() > before


def test_the_output_is_one_tensor_of_its_own_memory() -> None:
    session = fastrnn.Session(build("lstm", 3, 4).eval())
    y = session.step(torch.randn(1, 3))
    kept = y.clone()
    assert session.step(torch.randn(1, 3)) is y
    assert not torch.equal(kept, y)
    with pytest.raises(RuntimeError, match="resiz"):
        y.resize_(1 << 20)
    y.set_(torch.zeros(1))
    session.step(torch.randn(1, 3))
    del session
    assert y.shape == (1,)


def test_weights_are_a_copy_until_refresh() -> None:
    module = build("gru", 5, 7).eval()
    session, x = fastrnn.Session(module), torch.randn(4, 1, 5)
    before = session.run(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
        module.bias_ih_l0.zero_()
    session.reset()
    assert torch.equal(session.run(x), before)
    session.reset()
    session.refresh()
    with torch.no_grad():
        assert_agrees(session.run(x), module(x)[0], lambda f: exact_call(module, x)(f)[0])
    module.weight_ih_l0 = nn.Parameter(torch.randn(21, 6))
    with pytest.raises(
        RuntimeError, match=r"Session: w_ih must be of size \[21, 5\], got \[21, 6\]"
    ):
        session.refresh()
    module.double()
    with pytest.raises(RuntimeError, match=r"must be torch.float32, got torch.float64"):
        session.refresh()


def test_session_outlives_the_name_of_its_module() -> None:
    module = build("lstm", 5, 7).eval()
    x = torch.randn(1, 5)
    expected = fastrnn.Session(module).step(x).clone()
    session = fastrnn.Session(module)
    del module
    assert torch.equal(session.step(x), expected)
    session.refresh()


def test_threads_do_not_change_the_results() -> None:
    module = build("lstm", 300, 300, num_layers=2).eval()
    x = torch.randn(3, 1, 300)
    one, two = module.stream(), module.stream(threads=2)
    assert torch.equal(one.run(x), two.run(x))
    assert torch.equal(one.step(x[0]), two.step(x[0]))
    assert all(map(torch.equal, one.state, two.state))
    y = x[0].clone()
    assert torch.equal(two.step(y, out=y), one.step(x[0]))


ONE = torch.zeros(1, 5)
WRONG_INPUTS: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "x must be a tensor, got None"),
    (torch.zeros(5), RuntimeError, r"x must be of size \[1, 5\], got \[5\]"),
    (torch.zeros(2, 5), RuntimeError, r"x must be of size \[1, 5\], got \[2, 5\]"),
    (ONE.double(), RuntimeError, "x must be torch.float32, got torch.float64"),
    (ONE.long(), RuntimeError, "x must be torch.float32, got torch.int64"),
    (ONE.to("meta"), RuntimeError, "x must be a dense tensor on the CPU, got .* on meta"),
    (ONE.to_sparse(), RuntimeError, "x must be a dense tensor on the CPU, got torch.sparse_coo"),
    (ONE.clone().requires_grad_(), RuntimeError, "x must be without a gradient"),
]


@pytest.mark.parametrize(("x", "kind", "message"), WRONG_INPUTS, ids=lambda value: str(value)[:40])
def test_wrong_input_is_rejected(x: Any, kind: type[Exception], message: str) -> None:
    session = fastrnn.Session(build("gru", 5, 7).eval())
    before = session.state
    with pytest.raises(kind, match=f"^Session.step: {message}"):
        session.step(x)
    assert torch.equal(session.state, before)


def test_wrong_runs_and_states_are_rejected() -> None:
    session = fastrnn.Session(build("lstm", 5, 7).eval())
    for x, message in (
        (torch.zeros(1, 5), "x must be a tensor with 3 dimensions, got a tensor of shape"),
        (torch.zeros(0, 1, 5), "x must be at least one step long, got none"),
        (torch.zeros(4, 2, 5), r"x must be of size \[4, 1, 5\], got \[4, 2, 5\]"),
        (torch.zeros(4, 1, 5).half(), "x must be torch.float32, got torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=f"^Session.run: {message}"):
            session.run(x)
    h = torch.zeros(1, 1, 7)
    for state, message in (
        (h, "state must be a tuple of two tensors, h and c, got a tensor of shape"),
        ((h,), "state must be a tuple of two tensors, h and c, got a tuple of 1"),
        ((h, h[0]), r"state\[1\] must be of size \[1, 1, 7\], got \[1, 7\]"),
        ((h.double(), h), r"state\[0\] must be torch.float32, got torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=f"^Session.load_state: {message}"):
            session.load_state(state)


def test_tensors_without_memory_are_rejected() -> None:
    session = fastrnn.Session(build("gru", 5, 7).eval())
    x = torch.zeros(3, 5)
    last = x[2:]
    last.untyped_storage().resize_(12 * 4)
    with pytest.raises(RuntimeError, match="storage holds all its values"):
        session.step(last)
    last.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage holds all its values"):
        session.step(last)


def test_inputs_of_any_layout_have_the_same_result() -> None:
    module = build("gru", 5, 7).eval()
    session, x = fastrnn.Session(module, 3), torch.randn(3, 5)
    expected = session.step(x).clone()
    parameter = nn.Parameter(x)
    for other in (x.T.contiguous().T, torch._neg_view(-x), parameter.detach(), parameter):
        session.reset()
        with torch.no_grad():
            assert torch.equal(session.step(other), expected)


def test_wrong_arguments_are_rejected() -> None:
    module = build("gru", 5, 7).eval()

    class Own(fastrnn.GRU):
        def forward(self, *args: Any) -> Any:
            return None

    for arguments, kind, message in (
        ((nn.GRU(5, 7),), TypeError, "layer must be an RNN, LSTM or GRU of fastrnn, got torch"),
        ((None,), TypeError, "layer must be an RNN, LSTM or GRU of fastrnn"),
        ((Own(5, 7),), TypeError, "layer must have the forward of fastrnn, got Own"),
        ((build("gru", 5, 7, bidirectional=True),), ValueError, "layer must have one direction"),
        (
            (build("gru", 5, 7, device="meta"),),
            RuntimeError,
            "the weights must be on the CPU",
        ),
        ((module, 0), ValueError, "batch_size must be at least 1, got 0"),
        ((module, 1.0), TypeError, "batch_size must be an int, got 1.0"),
        ((module, True), TypeError, "batch_size must be an int, got True"),
        ((module, 1, 0), ValueError, "threads must be at least 1, got 0"),
    ):
        with pytest.raises(kind, match=f"^Session: {message}"):
            fastrnn.Session(*arguments)


def test_copies_and_pickles_are_rejected() -> None:
    session = fastrnn.Session(build("gru", 5, 7).eval())
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^Session: a session cannot be copied or pickled"):
            make(session)
    assert repr(session) == "Session(GRU(5, 7), batch_size=1)"


def test_calls_of_two_threads_never_mix() -> None:
    """A call raises while another one runs; those that return are the session's only calls."""
    module = build("lstm", 64, 64).eval()
    session, x = fastrnn.Session(module, threads=1), torch.randn(400, 1, 64)
    done: list[Tensor] = []
    rejected: list[str] = []

    def work() -> None:
        for _ in range(30):
            try:
                done.append(session.run(x))
            except RuntimeError as error:
                rejected.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(done) + len(rejected) == 120
    assert all("only one call at a time" in message for message in rejected)
    expected = fastrnn.Session(module, threads=1)
    for _ in done:
        expected.run(x)
    assert all(map(torch.equal, session.state, expected.state))


def test_sessions_run_in_forked_processes() -> None:
    code = """
import os, torch, fastrnn
torch.manual_seed(0)
module = fastrnn.LSTM(300, 300).eval()
session, x = fastrnn.Session(module), torch.randn(4, 1, 300)
expected = session.run(x)
session.reset()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(session.run(x), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(session.run(x), expected)
"""
    assert run_python(code) == ""


def test_a_signal_ends_a_long_run_and_leaves_the_states() -> None:
    code = """
import os, signal, threading, torch, fastrnn
module = fastrnn.LSTM(256, 256).eval()
session, x = fastrnn.Session(module), torch.randn(100000, 1, 256)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    session.run(x)
except KeyboardInterrupt:
    assert not session.state[0].any()
    session.step(x[0])
    print("ended")
"""
    assert run_python(code) == "ended"


def test_a_session_in_inference_mode_serves_other_modes() -> None:
    module = build("gru", 5, 7).eval()
    with torch.inference_mode():
        session = fastrnn.Session(module)
        session.step(torch.zeros(1, 5))
    head = nn.Linear(7, 2)
    head(session.step(torch.zeros(1, 5)).clone()).sum().backward()
    assert head.weight.grad is not None
