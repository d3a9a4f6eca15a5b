"""Graphs with lengths or resets that also return the states and gates of every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrnn

CLASSES = ["RNN", "LSTM", "GRU"]
STATES = {"return_all_states": True, "return_gates": True}


class Model(nn.Module):
    def __init__(self, name: str, options: dict[str, Any], returned: dict[str, bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = getattr(fastrnn, name)(3, 4, **options)
        self.returned = returned

    def forward(self, x: Tensor, lengths: Any, resets: Any, reset_state: Any) -> Any:
        marks = {"lengths": lengths, "resets": resets, "reset_state": reset_state}
        output, hidden, extras = self.layer(x, **marks, **self.returned)
        return output, hidden, extras.states, extras.gates


def marks_of(model: Any, kind: str, seed: int = 0) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (3,), generator=generator)
    resets = torch.rand(5, 3, generator=generator) < 0.4
    layer = model.layer
    h = torch.randn(layer.num_layers * (2 if layer.bidirectional else 1), 1, 4)
    state = (h, h.cos()) if isinstance(layer, fastrnn.LSTM) else h
    return {
        "lengths": (lengths, None, None),
        "resets": (None, resets, None),
        "all": (lengths, resets, state),
    }[kind]


def loss(results: Any) -> Tensor:
    parts = [t.cos().mul(t).sum() for t in tree_leaves(results) if t.requires_grad]
    return torch.stack(parts).sum()


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(theirs))


@pytest.mark.parametrize("kind", ["lengths", "resets", "all"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_compiled_results_and_gradients(name: str, options: dict[str, Any], kind: str) -> None:
    model = Model(name, options, STATES)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):  # one graph serves other marks of the same shapes
        x = torch.randn(5, 3, 3, requires_grad=True)
        marks = marks_of(model, kind, seed)
        inputs = [x, *model.parameters()]
        expected = model(x, *marks)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            found = compiled(x, *marks)
        assert_close(found, expected)
        ours = torch.autograd.grad(loss(found), inputs)
        assert_close(ours, torch.autograd.grad(loss(expected), inputs))


@pytest.mark.parametrize("kind", ["lengths", "all"])
@pytest.mark.parametrize("returned", [{"return_all_states": True}, {"return_gates": True}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_exported_programs(name: str, returned: dict[str, bool], kind: str) -> None:
    model = Model(name, {"num_layers": 2}, returned)
    x = torch.randn(5, 3, 3)
    program = torch.export.export(model, (x, *marks_of(model, kind))).module()
    others = marks_of(model, kind, 1)
    y = torch.randn(5, 3, 3)
    assert_close(program(y, *others), model(y, *others))


def test_dynamic_shapes_and_traces() -> None:
    model = Model("LSTM", {"batch_first": True}, STATES)
    x, lengths = torch.randn(3, 5, 3), torch.tensor([5, 0, 2])
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    shapes = ({0: batch, 1: steps}, {0: batch}, None, None)
    program = torch.export.export(model, (x, lengths, None, None), dynamic_shapes=shapes).module()
    other, own = torch.randn(4, 7, 3), torch.tensor([7, 1, 0, 3])
    assert_close(program(other, own, None, None), model(other, own, None, None))


def test_autocast_in_a_graph() -> None:
    model = Model("GRU", {}, STATES)
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 0, 2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = tree_leaves(model(x, lengths, None, None))
        found = tree_leaves(compiled(x, lengths, None, None))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_wrong_values_are_rejected_when_the_graph_runs() -> None:
    model = Model("GRU", {}, STATES)
    x = torch.randn(5, 3, 3)
    program = torch.export.export(model, (x, torch.tensor([5, 0, 2]), None, None)).module()
    with pytest.raises(RuntimeError, match="lengths"):
        program(x, torch.tensor([6, 0, 2]), None, None)


def test_second_derivatives_of_a_graph_raise() -> None:
    model = Model("GRU", {}, STATES)
    x = torch.randn(5, 3, 3, requires_grad=True)
    marks = (torch.tensor([5, 0, 2]), None, None)
    program = torch.export.export(model, (x, *marks)).module()
    (first,) = torch.autograd.grad(loss(program(x, *marks)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
