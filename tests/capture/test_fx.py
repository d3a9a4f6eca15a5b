"""``torch.fx.symbolic_trace``: fastrnn's modules are leaves, as torch.nn's are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import CELLS, build, make_step
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

import fastrnn


class Model(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"recurrent": recurrent})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:
        result = self.inner["recurrent"](x, hx) if hx is not None else self.inner["recurrent"](x)
        if isinstance(self.inner["recurrent"], nn.RNNCellBase):
            h = result[0] if isinstance(self.inner["recurrent"], fastrnn.LSTMCell) else result
        else:
            h, _ = result
        return self.head(h)


def leaves(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("make", [build, make_step], ids=["layer", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_module_is_a_leaf(cell: str, make: Any) -> None:
    model = Model(make(cell, 3, 4))
    x = torch.randn(2, 3) if make is make_step else torch.randn(5, 2, 3)
    traced = fx.symbolic_trace(model, concrete_args={"hx": None})
    assert leaves(traced.graph) == ["inner.recurrent", "head"]
    assert torch.equal(traced(x, None), model(x))
    traced(x, None).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("make", [build, make_step], ids=["layer", "step"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_states_are_inputs_of_the_node(cell: str, make: Any) -> None:
    model = Model(make(cell, 3, 4))
    x = torch.randn(2, 3) if make is make_step else torch.randn(5, 2, 3)
    h = torch.randn(2, 4) if make is make_step else torch.randn(1, 2, 4)
    hx = (h, h) if cell == "lstm" else h
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x, hx), model(x, hx))
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(x, hx), model(x, hx))


def test_module_with_only_a_traced_state_is_a_leaf() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = fastrnn.LSTM(3, 4)
            self.start = nn.Buffer(torch.ones(1, 2, 3))

        def forward(self, h: Tensor, c: Tensor) -> Tensor:
            return self.recurrent(self.start, (h, c))[0]  # type: ignore[no-any-return]

    decoder, h = Decoder(), torch.randn(1, 2, 4)
    traced = fx.symbolic_trace(decoder)
    assert leaves(traced.graph) == ["recurrent"]
    assert torch.equal(traced(h, h), decoder(h, h))


def test_module_is_a_leaf_under_custom_tracers() -> None:
    """torchvision and FX quantization have tracers that repeat torch's rule for leaves."""

    class OwnTracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return m.__module__.startswith("torch.nn")

    model = Model(fastrnn.GRU(3, 4))
    graph = OwnTracer().trace(model, concrete_args={"hx": None})
    assert leaves(graph) == ["inner.recurrent", "head"]


def test_subclass_without_forward_is_a_leaf() -> None:
    class Initialised(fastrnn.GRU):
        def reset_parameters(self) -> None:
            for p in self.parameters():
                nn.init.constant_(p, 0.1)

    model, x = Model(Initialised(3, 4)), torch.randn(5, 2, 3)
    assert torch.equal(fx.symbolic_trace(model, {"hx": None})(x, None), model(x))


def test_subclass_with_its_own_forward_is_not_a_leaf() -> None:
    """The node would call that forward again. It fails as for subclasses of torch.nn."""

    class Residual(fastrnn.GRU):
        def forward(self, input: Any, hx: Any = None) -> Any:
            output, h_n = super().forward(input, hx)
            return input + output, h_n

    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(nn.Sequential(Residual(4, 4)))


def test_parametrized_layer_computes_its_weight_at_each_call() -> None:
    model, x = Model(weight_norm(fastrnn.GRU(3, 4), "weight_hh_l0")), torch.randn(5, 2, 3)
    traced = fx.symbolic_trace(model, {"hx": None})
    model.inner["recurrent"].parametrizations.weight_hh_l0.original0.data.mul_(3)
    assert torch.equal(traced(x, None), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fx_quantization_leaves_modules_in_floating_point() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.recurrent = nn.Linear(3, 3), fastrnn.LSTM(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            output, _ = self.recurrent(self.embed(x))
            return self.head(output)  # type: ignore[no-any-return]

    model, x = Tagger().eval(), torch.randn(5, 2, 3)
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantized = convert_fx(prepared)
    assert type(quantized.recurrent) is fastrnn.LSTM
    assert "quantized" in type(quantized.head).__module__
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.1)
