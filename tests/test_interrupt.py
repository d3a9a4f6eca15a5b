"""A signal ends a long call on the CPU, whatever its handler raises; the next call is right."""

from __future__ import annotations

import pytest
from support import run_python

# The calls below take a minute or more to their end. The signal is sent by a thread of the process
# once the interpreter is inside the kernel for some time: a signal before that ends the test, too.
PREAMBLE = """
import os, signal, threading, time
import torch, fastrnn
from fastrnn import _C

def send(number=signal.SIGINT):
    threading.Timer(0.5, lambda: os.kill(os.getpid(), number)).start()

def expect(exception, call):
    send()
    begin = time.monotonic()
    try:
        call()
    except exception as error:
        assert type(error) is exception, error
    else:
        raise AssertionError("not interrupted")
    assert time.monotonic() - begin < 20

small = fastrnn.GRU(9, 40)
x = torch.randn(30, 3, 9)
want = torch.nn.GRU.forward(small, x)[0]

def check():
    assert torch.allclose(small(x)[0], want, atol=1e-5)
    assert _C.kept_bytes() < 1 << 30
    small(x)[0].sum().backward()
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("LSTM(64, 256)", (60_000, 16)),
        ("GRU(64, 256, bidirectional=True)", (60_000, 16)),
        ("LSTM(64, 256, proj_size=64)", (60_000, 16)),
        ("RNN(64, 64, num_layers=2)", (1_500_000, 1)),
    ],
    ids=str,
)
def test_forward(module: str, shape: tuple[int, int], threads: int) -> None:
    code = f"""
torch.set_num_threads({threads})
module = fastrnn.{module}
long = torch.zeros(1, 1, 64).expand({shape[0]}, {shape[1]}, 64)
with torch.no_grad():
    expect(KeyboardInterrupt, lambda: [module(long) for _ in range(50)])
check()
"""
    run_python(PREAMBLE + code)


def test_packed() -> None:
    code = """
module = fastrnn.LSTM(64, 256)
packed = torch.nn.utils.rnn.PackedSequence(
    torch.zeros(400_000, 64), torch.tensor([16] * 25_000)
)
with torch.no_grad():
    expect(KeyboardInterrupt, lambda: [module(packed) for _ in range(50)])
check()
"""
    run_python(PREAMBLE + code)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("part", ["backward", "gradients"])
def test_backward(part: str, threads: int) -> None:
    """The walk back, or (of a wide input) mostly the products after it, repeated for long."""
    inputs, hidden = (8, 256) if part == "backward" else (4096, 32)
    code = f"""
torch.set_num_threads({threads})
module = fastrnn.GRU({inputs}, {hidden})
y = module(torch.randn(500, 16, {inputs}, requires_grad=True))[0].sum()
def call():
    for _ in range(100_000):
        y.backward(retain_graph=True)
expect(KeyboardInterrupt, call)
check()
"""
    run_python(PREAMBLE + code)


def test_a_handler_may_raise_anything_or_return() -> None:
    """Its own exception arrives, even a RuntimeError; a handler that returns changes no bit."""
    code = """
class Mine(RuntimeError):
    pass

def handler(*_):
    raise Mine
signal.signal(signal.SIGINT, handler)
module = fastrnn.LSTM(64, 256)
long = torch.zeros(1, 1, 64).expand(60_000, 16, 64)
with torch.no_grad():
    expect(Mine, lambda: [module(long) for _ in range(50)])
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
