"""Sessions of layers on CUDA. Without a GPU a plain call takes the place of the CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, build, exact_call
from tolerance import assert_agrees
from torch import nn

import fastrnn
from fastrnn import _library, cuda_session
from fastrnn.cuda_session import CudaSession

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _library.cuda_kernels, reason="fastrnn has no CUDA kernels here"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device for sessions. On the CPU a session calls what a graph would replay."""
    if request.param == "cpu":

        def direct(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
            function()  # the capture runs the step before
            return function

        monkeypatch.setattr(cuda_session, "capture", direct)
    return request.param  # type: ignore[no-any-return]


def check(module: nn.Module, batch: int) -> None:
    """Compares steps and runs that follow one another with one call of the module."""
    weight = next(module.parameters())
    session = CudaSession(module, batch)
    x = torch.randn(9, batch, module.input_size, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        parts = [session.step(row).clone().unsqueeze(0) for row in x[:2]]
        parts.append(session.run(x[2:6]))
        parts += [session.step(x[6]).clone().unsqueeze(0), session.run(x[7:])]
        ours = (torch.cat(parts), session.state)
        assert_agrees(ours, module(x), exact_call(module, x))


OPTIONS: list[dict[str, Any]] = [{}, {"num_layers": 2, "bias": False}, {"num_layers": 2}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_runs_agree_with_the_module(
    place: str, cell: str, options: dict[str, Any], batch: int, dtype: torch.dtype
) -> None:
    check(build(cell, 5, 7, dtype=dtype, device=place, **options).eval(), batch)


def test_projection_and_residual_agree_with_the_module(place: str) -> None:
    check(build("lstm", 5, 7, 2, proj_size=3, device=place).eval(), 2)
    check(build("gru", 7, 7, 3, residual=True, device=place).eval(), 2)


def test_states_are_read_loaded_and_reset(place: str) -> None:
    module = build("lstm", 5, 7, 2, device=place).eval()
    session = CudaSession(module, 3)
    x = torch.randn(4, 3, 5, device=place)
    assert all(not state.any() for state in session.state)
    session.run(x)
    saved = session.state
    after = session.step(x[0]).clone()
    session.load_state(saved)
    assert torch.equal(session.step(x[0]), after)
    before = session.state
    session.reset([0, 2])
    for state, old in zip(session.state, before, strict=True):
        assert not state[:, [0, 2]].any()
        assert torch.equal(state[:, 1], old[:, 1])
    session.reset()
    assert all(not state.any() for state in session.state)


def test_out_receives_the_output(place: str) -> None:
    session = CudaSession(build("gru", 5, 7, device=place).eval(), 2)
    x, out = torch.randn(2, 5, device=place), torch.empty(2, 7, device=place)
    assert session.step(x, out) is out
    session.reset()
    assert torch.equal(session.step(x), out)
    assert session.step(x) is session.step(x)


def test_batch_first_and_learned_states(place: str) -> None:
    options = {"batch_first": True, "batch_first_states": True, "learn_initial_state": True}
    module = fastrnn.LSTM(5, 7, 2, **options).to(place).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight))
    session = module.stream(3) if place == "cuda" else CudaSession(module, 3)
    x = torch.randn(3, 4, 5, device=place)
    with torch.no_grad():
        output, states = module(x)
    assert torch.allclose(session.run(x), output, atol=1e-5)
    for found, expected in zip(session.state, states, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    session.reset(1)
    with torch.no_grad():
        again, _ = module(x)
    assert torch.allclose(session.run(x)[1], again[1], atol=1e-5)


def test_refresh_copies_new_weights(place: str) -> None:
    module = build("gru", 5, 7, device=place).eval()
    session = CudaSession(module)
    x = torch.randn(1, 5, device=place)
    first = session.step(x).clone()
    with torch.no_grad():
        module.bias_ih_l0.add_(1)
    session.reset()
    assert torch.equal(session.step(x), first)
    assert session.is_stale
    session.refresh()
    assert not session.is_stale
    session.reset()
    assert not torch.equal(session.step(x), first)


def test_wrong_arguments_raise(place: str) -> None:
    module = build("gru", 5, 7, device=place)
    with pytest.raises(ValueError, match="threads must be 1 on CUDA, got 2"):
        CudaSession(module, 1, 2)
    session = CudaSession(module, 2)
    with pytest.raises(RuntimeError, match=r"x must be of size \[2, 5\], got \[3, 5\]"):
        session.step(torch.zeros(3, 5, device=place))
    with pytest.raises(RuntimeError, match=r"x must be torch.float32, got torch.float64"):
        session.step(torch.zeros(2, 5, device=place).double())
    with pytest.raises(RuntimeError, match=r"x must be of size \[4, 2, 5\], got \[4, 3, 5\]"):
        session.run(torch.zeros(4, 3, 5, device=place))
    with pytest.raises(RuntimeError, match=r"x must be a dense tensor on .*, got .* on meta"):
        session.step(torch.zeros(2, 5, device="meta"))
    with pytest.raises(RuntimeError, match="the layer must be on the CPU"):
        session.export("layer.safetensors")
    module.double()
    with pytest.raises(RuntimeError, match=r"weights must be torch\.float32, got torch\.float64"):
        session.refresh()
    session.close()
    for call in (session.step, session.run, session.load_state):
        with pytest.raises(RuntimeError, match="the session is closed"):
            call(torch.zeros(2, 5, device=place))


def test_layers_on_cuda_get_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("gru", 5, 7)
    assert type(module.stream()) is fastrnn.Session
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr(cuda_session, "capture", lambda function, device: function)
    assert type(module.stream()) is CudaSession


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    session = build("lstm", 5, 7, 2, device="cuda").stream(3)
    x = torch.randn(3, 5, device="cuda")
    session.step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
