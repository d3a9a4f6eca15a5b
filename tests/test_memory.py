"""Whose memory results lie in, how much is kept, and how little stack a call needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import CELLS, build, run_python


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_can_be_resized(cell: str, options: dict[str, Any]) -> None:
    """Of weights, input and states: sharding and offloading code frees them so."""
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


def test_call_on_a_small_stack() -> None:
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
