"""Lengths and resets whose values the host does not read: the paths of CUDA, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.engine import ragged

LAYERS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "sigmoid"}),
    ("GRU", {}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
]
LENGTHS = [9, 1, 0, 4, 9, 7]


def run(module: Any, x: Tensor, hx: Any, lengths: Tensor) -> list[Tensor]:
    """Returns the results of a call and the gradients of its inputs and weights."""
    states = hx if isinstance(hx, tuple) else (hx,)
    output, final = module(x, hx, lengths=lengths)
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    loss = sum((t * torch.linspace(0, 1, t.numel()).view_as(t)).sum() for t in results)
    inputs = [x, *states, *module.parameters()]
    return [*results, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "options"), LAYERS, ids=str)
def test_results_are_those_of_read_lengths(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    bidirectional: bool,
    batch_first: bool,
) -> None:
    module = getattr(fastrnn, name)(
        5,
        7,
        2,
        bidirectional=bidirectional,
        batch_first=batch_first,
        dtype=torch.float64,
        **options,
    )
    steps, batch = max(LENGTHS), len(LENGTHS)
    shape = (batch, steps, 5) if batch_first else (steps, batch, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    count = 4 if bidirectional else 2
    sizes = [module.proj_size or 7] + ([7] if name == "LSTM" else [])
    states = [torch.randn(count, batch, n, dtype=torch.float64, requires_grad=True) for n in sizes]
    hx = tuple(states) if name == "LSTM" else states[0]
    lengths = torch.tensor(LENGTHS)
    expected = run(module, x, hx, lengths)
    padding = torch.arange(steps) >= lengths.unsqueeze(1)  # [B,T]
    with torch.no_grad():
        x[padding if batch_first else padding.t()] = torch.nan
    monkeypatch.setattr(ragged, "_stays_on_device", lambda call, marks: True)
    for found, wanted in zip(run(module, x, hx, lengths), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_lengths_beyond_the_batch_count_as_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_stays_on_device", lambda call, marks: True)
    module, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    found = module(x, lengths=torch.tensor([-2, 9]))
    expected = module(x, lengths=torch.tensor([0, 5]))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_cells_that_may_overflow_read_the_lengths() -> None:
    for name, expected in (("rnn_relu", False), ("indrnn", False), ("lstm", True)):
        spec = fastrnn.spec.CELLS[name]
        call = fastrnn.layer_call.LayerCall(
            spec, torch.empty(0), fastrnn.layer_call.PADDED, torch.empty(0), None, None
        )
        assert ragged.can_run(call) == expected


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "options"), [*LAYERS, ("RNN", {"nonlinearity": "relu"})], ids=str)
def test_stacked_layers_run_by_operators(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """The path of CUDA calls an operator per layer, here that of the CPU."""
    options = {**options, "bidirectional": bidirectional, "batch_first": batch_first}
    module = getattr(fastrnn, name)(5, 7, 2, dtype=torch.float64, **options)
    steps, batch = max(LENGTHS), len(LENGTHS)
    sizes = (batch, steps) if batch_first else (steps, batch)
    x = torch.randn(*sizes, 5, dtype=torch.float64, requires_grad=True)
    count = 4 if bidirectional else 2
    widths = [module.proj_size or 7] + ([7] if name == "LSTM" else [])
    learned = [torch.randn(count, 1, n, dtype=torch.float64, requires_grad=True) for n in widths]
    marks = {
        "lengths": torch.tensor(LENGTHS),
        "resets": torch.rand(sizes) < 0.3,
        "reset_state": tuple(learned) if name == "LSTM" else learned[0],
    }

    def results() -> list[Tensor]:
        output, final = module(x, **marks)
        found = [output, *(final if isinstance(final, tuple) else (final,))]
        loss = sum((t * torch.linspace(0, 1, t.numel()).view_as(t)).sum() for t in found)
        return [*found, *torch.autograd.grad(loss, [x, *learned, *module.parameters()])]

    expected = results()
    monkeypatch.setattr(ragged, "_runs_on_device", lambda call: True)
    monkeypatch.setattr(ragged, "run_composed", None)
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
