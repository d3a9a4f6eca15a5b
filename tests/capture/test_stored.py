"""Graphs that an earlier version of fastrnn stored still load, run, and can be trained.

See tests/capture/stored/README.md for how the files were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn

STORED = Path(__file__).parent / "stored"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    "lstm_plain": ("LSTM", {}),
    "gru": ("GRU", {"bias": False, "batch_first": True}),
    "rnn": ("RNN", {"nonlinearity": "relu"}),
}


def load(name: str, kind: str) -> Any:
    if kind == "exported":
        return torch.export.load(STORED / f"{name}.pt2").module()
    return torch.jit.load(STORED / f"{name}_{kind}.pt")


def twin_of(name: str, parameters: dict[str, Tensor]) -> nn.Module:
    """Returns the eager module with the stored parameters."""
    cell, options = MODELS[name]
    module: nn.Module = getattr(fastrnn, cell)(3, 4, **options)
    module.load_state_dict({key[len("rnn.") :]: t for key, t in parameters.items()})
    return module


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for result in results for t in flat(result)]


@pytest.mark.parametrize("kind", ["exported", "scripted", "traced"])
@pytest.mark.parametrize("name", MODELS)
def test_stored_graph_gives_the_same_results(name: str, kind: str) -> None:
    stored = load(name, kind)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        found, expected = flat(stored(x)), flat(twin_of(name, stored.state_dict())(x))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["exported", "scripted", "traced"])
@pytest.mark.parametrize("name", MODELS)
def test_stored_graph_can_be_trained(name: str, kind: str) -> None:
    stored = load(name, kind)
    twin = twin_of(name, stored.state_dict())
    x = torch.randn(5, 2, 3)
    gradients = []
    for model in (stored, twin):
        own = x.clone().requires_grad_()
        sum(t.square().sum() for t in flat(model(own))).backward()
        gradients.append([own.grad, *(p.grad for _, p in sorted(model.named_parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["lstm_plain", "gru", "rnn"])  # no layer reads a rounded output
def test_autocast_acts_on_stored_graphs(name: str) -> None:
    stored = load(name, "traced")
    x = torch.randn(5, 2, 3)
    with torch.no_grad(), torch.autocast("cpu"):
        found, expected = flat(stored(x)), flat(twin_of(name, stored.state_dict())(x))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert name == "gru" or found[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, expected))


def test_stored_graph_raises_the_operators_errors() -> None:
    stored = load("gru", "traced")
    with pytest.raises(RuntimeError) as info:
        stored(torch.randn(2, 5, 7))
    assert "fastrnn: x must have the input size 3 of w_ih, got 7." in str(info.value)
    weights = [torch.randn(12, 3), torch.randn(12, 4)]
    given = (torch.randn(5, 2, 7), torch.zeros(1, 2, 4), None)
    for wrong, message in (
        (weights, "x must have the input size 3 of w_ih, got 7."),
        (weights[:1], "weights must hold 2 to 5 tensors per direction, got 1."),
    ):
        with pytest.raises(RuntimeError) as info:
            torch.ops.fastrnn.layer(*given, wrong, None, "gru")
        assert torch.__version__ < "2.13" or str(info.value) == f"fastrnn: {message}"


@pytest.mark.parametrize("with_gradient", [False, True])
def test_stored_graph_is_compiled_for_all_sizes(with_gradient: bool) -> None:
    """The alias of the operator reads no size, because sizes are symbols here."""
    layer = torch.ops.fastrnn.layer
    weights = [p.detach() for p in fastrnn.LSTM(3, 4).parameters()]

    def call(x: Tensor, h: Tensor) -> Tensor:
        y: Tensor = layer(x, h, h, weights, None, "lstm")[0]
        return y

    compiled = torch.compile(call, backend="aot_eager", dynamic=True, fullgraph=True)
    for steps, batch in ((5, 2), (7, 3)):
        x = torch.randn(steps, batch, 3, requires_grad=with_gradient)
        h = torch.zeros(1, batch, 4)
        found, expected = compiled(x, h), call(x, h)
        assert torch.equal(found, expected)
        if with_gradient:
            gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
            assert torch.equal(*gradients)


def test_stored_graph_contains_the_old_operator() -> None:
    """Otherwise the tests above would prove nothing."""
    program = torch.export.load(STORED / "lstm.pt2")
    assert str(program.graph).count("torch.ops.fastrnn.layer.default") == 2
    archive = torch.jit.load(STORED / "lstm_traced.pt")
    assert str(archive.rnn.inlined_graph).count("fastrnn::layer(") == 2


@pytest.mark.slow
def test_stored_program_is_compiled_by_aot_inductor(tmp_path: Path) -> None:
    program = torch.export.load(STORED / "lstm.pt2")
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "lstm_aot.pt2")
    )
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        found = flat(torch._inductor.aoti_load_package(path)(x))
        expected = flat(twin_of("lstm", program.state_dict)(x))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
