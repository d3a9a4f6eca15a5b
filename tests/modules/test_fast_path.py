"""The fast path: rejected arguments take the general path, and a failure is not retried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import build, make_step, raised
from torch import nn
from torch.nn.utils import prune

from fastrnn.engine import run
from fastrnn.modules import base, cells
from fastrnn.spec import CELLS

X = (5, 2, 3)


@pytest.fixture(autouse=True, params=[False, True], ids=["inference", "training"])
def with_gradient(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled(request.param):
        yield


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any) -> Any:
        raise error

    for module in (base, run):
        monkeypatch.setattr(module, "forward_op", fail)
        monkeypatch.setattr(module, "kernel_layer", fail)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("fastrnn: the call failed: there is not enough memory."),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("a bug"),
        IndexError("a bug"),
        MemoryError(),
    ],
    ids=str,
)
def test_failure_is_not_retried(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    layer, step = build("gru", 3, 4), make_step("gru", 3, 4)
    monkeypatch.setattr(layer, "_run_general_path", lambda *_: pytest.fail("retried"))
    monkeypatch.setattr(run, "_run_step_general_path", lambda *_: pytest.fail("retried"))
    fail_with(monkeypatch, error)
    assert raised(lambda: layer(torch.randn(X))) is error
    assert raised(lambda: step(torch.randn(2, 3))) is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("fastrnn: x must be something else."),
        RuntimeError("fastrnn::recurrent_forward() Expected a value of type 'Tensor'"),
        NotImplementedError("Could not run 'fastrnn::recurrent_forward'"),
    ],
    ids=str,
)
def test_rejection_takes_the_general_path(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    layer, step, x = build("gru", 3, 4), make_step("gru", 3, 4), torch.randn(X)
    expected = layer(x)[0], step(x[0])
    fail_with(monkeypatch, error)
    assert torch.equal(layer(x)[0], expected[0])
    assert torch.equal(step(x[0]), expected[1])


def test_rejection_is_the_cause_of_the_error() -> None:
    module = build("lstm", 3, 4)
    for wrong in (torch.randn(5, 2, 7), torch.zeros(5, 2, 3, dtype=torch.int64)):
        error = raised(lambda wrong=wrong: module(wrong))
        assert not str(error).startswith("fastrnn: ")
        assert str(error.__cause__).startswith("fastrnn: x must ")


def test_rejection_of_a_step_is_the_cause_of_the_error() -> None:
    error = raised(lambda: make_step("lstm", 3, 4)(torch.randn(2, 7)))
    assert str(error).startswith("input has inconsistent input_size")
    assert str(error.__cause__).startswith("fastrnn: x must ")


def test_failure_of_torchs_step_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step("rnn_tanh", 3, 4)
    failure = RuntimeError("a bug")

    def fail(*args: Any) -> Any:
        raise failure

    facts = CELLS["rnn_tanh"].torch._replace(torch_step=fail)
    monkeypatch.setitem(CELLS, "rnn_tanh", replace(CELLS["rnn_tanh"], torch=facts))
    assert raised(lambda: step(torch.randn(2, 3))) is failure
    error = raised(lambda: step(torch.randn(2, 7)))
    assert str(error).startswith("input has inconsistent input_size")


def test_attributes_that_do_not_fit_take_the_general_path() -> None:
    """The operator rejects the attribute ``bias``; the general path reads the names of weights."""
    module, x = build("gru", 3, 4), torch.randn(X)
    expected, _ = module(x)
    module.bias = False
    assert torch.equal(module(x)[0], expected)
    without: nn.Module = build("lstm", 3, 4, bias=False)
    expected, _ = without(x)
    without.bias = True
    assert torch.equal(without(x)[0], expected)


def test_lack_of_memory_is_a_failure() -> None:
    """The operator's own message begins as `raise_unless_rejected` expects."""
    x = torch.zeros(1).expand(1, 1 << 40, 1)
    error = raised(lambda: build("gru", 1, 4)(x, torch.zeros(1).expand(1, 1 << 40, 4)))
    assert str(error).startswith("fastrnn: the call failed: ")
    assert error.__cause__ is None


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_sigmoid", "lstm", "gru"])
def test_step_of_plain_tensors_skips_the_general_path(
    monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    """Also without biases and without states; the result is that of the general path."""
    for bias in (True, False):
        step, x, state = make_step(cell, 3, 4, bias=bias), torch.randn(2, 3), torch.randn(2, 4)
        hx = (state, state) if cell == "lstm" else state
        with monkeypatch.context() as general:
            general.setattr(step, "_run_fast_path", lambda *_: None)
            expected = step(x, hx), step(x)
        with monkeypatch.context() as fast:
            fast.setattr(cells, "leaf_call", lambda *_: pytest.fail("general path"))
            found = step(x, hx), step(x)
        torch.testing.assert_close(found, expected)


def test_step_follows_a_weight_that_is_no_parameter() -> None:
    step, x = make_step("gru", 3, 4), torch.randn(2, 3)
    prune.random_unstructured(step, "weight_hh", 0.5)
    expected = nn.GRUCell.forward(step, x)  # type: ignore[arg-type]
    torch.testing.assert_close(step(x), expected)


def test_step_rejects_states_of_none() -> None:
    step, x, h = make_step("lstm", 3, 4), torch.randn(2, 3), torch.zeros(2, 4)
    for hx in ((None, None), (None, h), (h, None)):
        assert "hx[" in str(raised(lambda hx=hx: step(x, hx)))
