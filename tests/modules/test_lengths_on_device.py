"""Lengths and resets whose values the host does not read: the paths of CUDA, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.engine import ragged, ragged_states
from fastrnn.layer_call import LayerCall, Options
from fastrnn.ops import masked, ragged_arguments, ragged_on_device
from fastrnn.ops import ragged as ops_ragged
from fastrnn.ops.operators import backward_op, forward_op
from fastrnn.ops.segments import Ragged

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


# --- tensors without values, of which every read by the host raises


def fake_reset_forward(*args: Any) -> Any:
    """Returns the sizes of the results of the operator that CUDA has."""
    x, h0, c0, weights, slots, *_, cell, outputs = args
    return forward_op(x, h0, c0, weights, slots, None, cell, outputs)


def fake_reset_backward(*args: Any) -> Any:
    d_y, d_h_n, d_c_n, _, h0, c0, weights, slots, _, reset_h, reset_c, y, saved, cell = args
    found = backward_op(d_y, d_h_n, d_c_n, h0, c0, weights, slots, None, y, saved, cell)
    return (*found, *[y.new_empty(0) if t is None else t.clone() for t in (reset_h, reset_c)])


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a tensor is copied to the CPU")


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Runs calls as on a GPU, with tensors that have no values."""
    for module in (ragged, ops_ragged, ragged_states):
        monkeypatch.setattr(module, "keeps_marks", lambda x: True)
    for module in (masked, ragged_on_device):
        monkeypatch.setattr(module, "reset_forward", fake_reset_forward)
        monkeypatch.setattr(module, "reset_backward", fake_reset_backward)
    # marks on the CPU would be checked
    monkeypatch.setattr(ragged, "check_values", lambda ragged, steps: ragged)

    def unchecked(*args: Any) -> tuple[LayerCall, Ragged]:
        x, h0, c0, weights, slots, *marks, cell = args
        spec = fastrnn.spec.CELLS[cell]
        own = fastrnn.spec.Weights(weights, slots)
        call = LayerCall(spec, x, fastrnn.layer_call.PADDED, h0, c0, own)
        return call, Ragged(*marks)

    for module in (ragged_arguments, ragged_on_device, ragged_states):
        monkeypatch.setattr(module, "ragged_arguments", unchecked)
    monkeypatch.setattr(ops_ragged, "ragged_forward", ragged_on_device.forward_on_device)
    monkeypatch.setattr(ops_ragged, "_by_parts_op", ragged_on_device.gradients_on_device)
    for name in ("cpu", "item", "tolist", "numpy", "nonzero"):
        monkeypatch.setattr(Tensor, name, forbidden)
    return FakeTensorMode()


MARKS = [{"lengths"}, {"resets"}, {"lengths", "resets", "reset_state"}]


def fake_module(cell: str, **options: Any) -> nn.Module:
    """Returns a module whose weights have no values. Call it within the mode."""
    size = {"proj_size": 2} if cell == "projected" else {}
    name = "lstm" if cell == "projected" else cell
    module = build(name, 3, 4, bidirectional=True, **options, **size)
    for key, weight in list(module.named_parameters()):
        setattr(module, key, nn.Parameter(torch.empty(weight.shape)))
    return module


def fake_marks(cell: str, names: set[str]) -> dict[str, Any]:
    states = torch.empty(2, 1, 2 if cell == "projected" else 4), torch.empty(2, 1, 4)
    marks: dict[str, Any] = {
        "lengths": torch.empty(6, dtype=torch.int64),
        "resets": torch.empty(9, 6, dtype=torch.bool),
        "reset_state": states if cell in ("lstm", "projected") else states[0],
    }
    return {name: marks[name] for name in names}


@pytest.mark.parametrize("marks", MARKS, ids=lambda names: ", ".join(sorted(names)))
@pytest.mark.parametrize("returned", [{}, {"return_all_states": True, "return_gates": True}])
@pytest.mark.parametrize("cell", ["gru", "projected"])
def test_no_call_reads_a_value(
    cell: str, returned: dict[str, bool], marks: set[str], without_values: FakeTensorMode
) -> None:
    with without_values:
        module = fake_module(cell)
        x = torch.empty(9, 6, 3, requires_grad=True)
        found = tree_leaves(module(x, **fake_marks(cell, marks), **returned))
        outputs = [t for t in found if t is not None and t.requires_grad]
        first = torch.autograd.grad([t.sum() for t in outputs], x, create_graph=True)[0]
        assert first.shape == x.shape
        second = torch.autograd.grad(first.sum(), list(module.parameters()), allow_unused=True)
        assert any(t is not None for t in second)


@pytest.mark.parametrize("marks", MARKS, ids=lambda names: ", ".join(sorted(names)))
@pytest.mark.parametrize("cell", ["gru", "projected"])
def test_recomputation_reads_no_value(
    cell: str, marks: set[str], without_values: FakeTensorMode
) -> None:
    with without_values:
        module = fake_module(cell)
        x = torch.empty(9, 6, 3, requires_grad=True)
        given = fake_marks(cell, marks)
        states = tree_leaves(fake_marks(cell, {"reset_state"}))
        h0, *c0 = [t.expand(2, 6, -1) for t in states]
        resets = [t.expand(2, 6, -1) for t in states] if "reset_state" in marks else []
        call = LayerCall(
            fastrnn.spec.BY_MODE[module.mode],
            x,
            fastrnn.layer_call.PADDED,
            h0,
            c0[0] if c0 else None,
            module._torch_weights(),
            Options(recompute=4),
        )
        own = Ragged(given.get("lengths"), given.get("resets"), *resets)
        y = masked.masked_layer(call, own, by_kernels=True).results[0]
        gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
        assert [t.shape for t in gradients[1:]] == [w.shape for w in module.parameters()]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_transforms_read_no_value(cell: str, without_values: FakeTensorMode) -> None:
    with without_values:
        module, x = fake_module(cell), torch.empty(9, 6, 3)
        marks = fake_marks(cell, {"lengths", "resets"})

        def call(x: Tensor) -> Tensor:
            return module(x, **marks)[0]

        assert torch.func.grad(lambda x: call(x).sum())(x).shape == x.shape
        assert torch.func.jvp(call, (x,), (x,))[1].shape == (9, 6, 8)
        assert torch.func.vmap(call)(x.expand(2, -1, -1, -1)).shape == (2, 9, 6, 8)


def test_graphs_with_states_read_no_value(without_values: FakeTensorMode) -> None:
    """The operator of graphs, called as a graph calls it."""
    with without_values:
        module, x = fake_module("lstm"), torch.empty(9, 6, 3, requires_grad=True)
        marks = fake_marks("lstm", {"lengths", "resets"})
        given = (marks["lengths"], marks["resets"], None, None)
        h = torch.empty(2, 6, 4)
        own = module._torch_weights()
        found = ragged_states._forward_untraced(x, h, h, own.flat, own.slots, *given, "lstm", True)
        assert [t.shape[0] for t in found] == [9, 2, 2, 54, 54]
        needs = [True, True, True, False, False, *[True] * len(own.flat)]
        gradients = ragged_states._gradients(
            *found[:4],
            *(x, h, h, own.flat, own.slots, *given, "lstm", needs),
        )
        assert gradients[0].shape == x.shape


def test_the_path_of_the_cpu_reads_values(
    without_values: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above would find a read."""
    monkeypatch.setattr(ragged, "keeps_marks", lambda x: False)
    with without_values:
        module, x = fake_module("gru"), torch.empty(9, 6, 3)
        marks = fake_marks("gru", {"lengths"})
        for returned in ({}, {"return_all_states": True}):
            with pytest.raises((AssertionError, DataDependentOutputException)):
                module(x, **marks, **returned)
