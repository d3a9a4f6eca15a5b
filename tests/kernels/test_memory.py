"""Memory of the CPU kernels: storages of results, the buffer cache, and stack size."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from support import CELLS, build, run_python
from torch import nn

from fastrnn import _C


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_can_be_resized(cell: str, options: dict[str, Any]) -> None:
    """Sharding and offloading code frees gradients of weights, input and states this way."""
    module = build(cell, 256, 256, **options)
    directions = 2 if options else 1
    x = torch.randn(20, 16, 256, requires_grad=True)
    h0 = torch.randn(directions, 200, 256)[:, :16].contiguous().requires_grad_()
    hx = (h0, torch.zeros_like(h0).requires_grad_()) if cell == "lstm" else h0
    saved: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = module(x, hx)
    y.sum().backward()
    leaves = [*module.parameters(), x, h0]
    given = {t.untyped_storage().data_ptr() for t in leaves}
    gradients = [t.grad for t in leaves]
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is not None
        assert gradient.shape == leaf.shape
    made = [t for t in saved if t.untyped_storage().data_ptr() not in given]
    for t in (*gradients, *made, y.detach()):
        t.untyped_storage().resize_(0)
        assert t.untyped_storage().nbytes() == 0


def test_call_works_on_a_small_stack() -> None:
    """Threads with 128 KiB of stack run forward and backward."""
    code = """
import threading
import torch, fastrnn
threading.stack_size(128 * 1024)
module = fastrnn.LSTM(64, 64, bidirectional=True)
x = torch.randn(20, 16, 64)
results = []
def call():
    with torch.no_grad():
        results.append(module(x)[0])
thread = threading.Thread(target=call)
thread.start()
thread.join()
assert torch.equal(results[0], module(x)[0])
"""
    run_python(code)


SETTLED = 64  # acquisitions after which an unused buffer is freed: kPatience of buffer_cache.cpp
LEAST_KEPT = 16 << 20  # bytes that may always be kept: kLeastKept of buffer_cache.cpp


def train(module: nn.Module, steps: int, batch: int) -> None:
    x = torch.ones(steps, batch, module.input_size, requires_grad=True)
    module(x)[0].sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_loop_of_one_shape_keeps_its_buffers(cell: str) -> None:
    """Holds for buffers larger than `LEAST_KEPT` too."""
    module = build(cell, 512, 512, num_layers=2)
    _C.release_cached_buffers()
    for _ in range(2):
        train(module, 40, 64)
    fresh, kept = _C._testing.fresh_buffers(), _C.cached_bytes()
    assert kept > 0
    for _ in range(4):
        train(module, 40, 64)
        assert _C.cached_bytes() == kept
    assert _C._testing.fresh_buffers() == fresh


def test_buffers_of_other_shapes_are_freed() -> None:
    """The cache frees them after 64 acquisitions of buffers of one shape."""
    small, large = build("lstm", 64, 64), build("lstm", 512, 512)
    _C.release_cached_buffers()
    for _ in range(SETTLED):
        train(small, 20, 8)
    alone = _C.cached_bytes()
    assert 0 < alone < LEAST_KEPT // 2
    for batch in range(8, 72, 8):
        train(large, 30, batch)
    assert _C.cached_bytes() > LEAST_KEPT
    for _ in range(SETTLED // 2):  # each acquires a buffer in the forward and one in the backward
        train(small, 20, 8)
    assert _C.cached_bytes() == alone


def test_kept_buffers_of_many_shapes_are_bounded() -> None:
    """The bound is 16 MiB if no call uses a third of that at once."""
    small, module = build("lstm", 64, 64), build("lstm", 256, 256)
    for _ in range(SETTLED):  # frees the buffers of earlier tests
        train(small, 20, 8)
    largest = 0
    for steps, batch in itertools.product((3, 5, 7, 9, 11), range(1, 81, 8)):
        train(module, steps, batch)
        largest = max(largest, _C.cached_bytes())
    assert LEAST_KEPT // 2 < largest <= LEAST_KEPT


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_in_use_does_not_grow() -> None:
    """Measures 300 calls of random shapes, with and without gradients, after 50 warm-up calls."""
    code = """
import ctypes, gc, random
import torch, fastrnn
from fastrnn import _C

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

def used():
    gc.collect()
    _C.release_cached_buffers()
    info = mallinfo2()
    return info.uordblks + info.hblkhd

def call():
    name = rng.choice(["RNN", "LSTM", "GRU"])
    # No single steps: in a half type torch computes them, and oneDNN caches its compiled code.
    steps, batch, width, hidden = (rng.randint(2, n) for n in (30, 60, 128, 200))
    options = {"num_layers": rng.randint(1, 2), "bidirectional": rng.random() < 0.3}
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    module = getattr(fastrnn, name)(width, hidden, dtype=dtype, **options)
    x = torch.randn(steps, batch, width, dtype=dtype)
    if rng.random() < 0.3:
        lengths = torch.tensor([rng.randint(1, steps) for _ in range(batch)])
        x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    with torch.set_grad_enabled(rng.random() < 0.5):
        y = module(x)[0]
        y = y if torch.is_tensor(y) else y.data
        if y.requires_grad:
            y.sum().backward()

rng = random.Random(0)
for _ in range(50):
    call()
before = used()
for _ in range(300):
    call()
growth = used() - before
assert growth < 4 << 20, growth
"""
    run_python(code)
