"""Signals during long CPU calls: the call ends with the handler's exception, the next one works."""

from __future__ import annotations

import pytest
from support import run_python

# A call without interruption support would complete, and Python's handler would run afterwards.
# Only the time of the call tells them apart. It is compared with that of a call of a twentieth of
# the length.
PREAMBLE = """
import os, signal, threading, time
import torch, fastrnn
from fastrnn import _C

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it

def expect(exception, call, short):
    short()
    begin = time.monotonic()
    short()
    part = time.monotonic() - begin
    timer = threading.Timer(2 * part, lambda: os.kill(os.getpid(), signal.SIGINT))
    begin = time.monotonic()
    timer.start()
    try:
        call()
    except exception as error:
        assert type(error) is exception, error
    else:
        raise AssertionError("not interrupted")
    took = time.monotonic() - begin
    assert took < 10 * part + 0.5, (took, part)

small = fastrnn.GRU(9, 40)
x = torch.randn(30, 3, 9)
want = torch.nn.GRU.forward(small, x)[0]

def check():
    assert torch.allclose(small(x)[0], want, atol=1e-5)
    assert _C.cached_bytes() < 1 << 30
    small(x)[0].sum().backward()
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("LSTM(64, 256)", (40_000, 16)),
        ("GRU(64, 256, bidirectional=True)", (40_000, 16)),
        ("LSTM(64, 256, proj_size=64)", (40_000, 16)),
        ("RNN(64, 64, num_layers=2)", (1_500_000, 1)),
    ],
    ids=str,
)
def test_signal_ends_forward(module: str, shape: tuple[int, int], threads: int) -> None:
    code = f"""
torch.set_num_threads({threads})
module = fastrnn.{module}
long = torch.zeros({shape[0]}, {shape[1]}, 64)
with torch.no_grad():
    expect(KeyboardInterrupt, lambda: module(long), lambda: module(long[: {shape[0]} // 20]))
check()
"""
    run_python(PREAMBLE + code)


def test_signal_ends_packed_forward() -> None:
    code = """
module = fastrnn.LSTM(64, 256)
def pack(steps):
    sizes = torch.tensor([16] * steps)
    return torch.nn.utils.rnn.PackedSequence(torch.zeros(16 * steps, 64), sizes)

short, long = pack(1_250), pack(25_000)
with torch.no_grad():
    expect(KeyboardInterrupt, lambda: module(long), lambda: module(short))
check()
"""
    run_python(PREAMBLE + code)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "hidden", "steps"), [(8, 1024, 6_000), (1024, 32, 60_000)])
def test_signal_ends_backward(inputs: int, hidden: int, steps: int, threads: int) -> None:
    """Interrupts the backward time loop or, for a wide input, the gradient products after it."""
    code = f"""
torch.set_num_threads({threads})
module = fastrnn.GRU({inputs}, {hidden})
def graph(steps):
    return module(torch.randn(steps, 2, {inputs}, requires_grad=True))[0].sum()
short, long = graph({steps} // 20), graph({steps})
expect(KeyboardInterrupt, long.backward, lambda: short.backward(retain_graph=True))
check()
"""
    run_python(PREAMBLE + code)


def test_signal_ends_backward_in_chunks() -> None:
    """No call of a chunk is long enough to ask for signals itself."""
    code = """
module = fastrnn.GRU(8, 32, recompute=96)
def graph(steps):
    return module(torch.randn(steps, 1, 8, requires_grad=True))[0].sum()
short, long = graph(60_000), graph(1_200_000)
expect(KeyboardInterrupt, long.backward, lambda: short.backward(retain_graph=True))
check()
"""
    run_python(PREAMBLE + code)


def test_handler_may_raise_or_return() -> None:
    """The handler's exception reaches the caller. A handler that returns changes no bit."""
    code = """
class Mine(RuntimeError):
    pass

def handler(*_):
    raise Mine
signal.signal(signal.SIGINT, handler)
module = fastrnn.LSTM(64, 256)
long = torch.zeros(40_000, 16, 64)
with torch.no_grad():
    expect(Mine, lambda: module(long), lambda: module(long[:2_000]))
    check_x = torch.randn(4000, 8, 64)
    plain = module(check_x)[0]
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    while not seen:
        assert torch.equal(module(check_x)[0], plain)
torch.set_grad_enabled(True)
check()
"""
    run_python(PREAMBLE + code)
