"""The constructor option ``residual``: each layer but the first adds its input to its output."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn

CLASSES = ["RNN", "LSTM", "GRU"]


def build(name: str, layers: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fastrnn, name)(3, 4, layers, residual=True, **options)


def single_layers(layer: Any, **options: Any) -> list[Any]:
    """Returns the layers of a stack as modules of their own, which share its weights."""
    singles = []
    directions = 2 if layer.bidirectional else 1
    for index in range(layer.num_layers):
        width = 3 if index == 0 else directions * (layer.proj_size or layer.hidden_size)
        if layer.proj_size:
            options["proj_size"] = layer.proj_size
        single = type(layer)(
            width, 4, bidirectional=layer.bidirectional, batch_first=layer.batch_first, **options
        )
        for key in list(single._parameters):
            setattr(single, key, getattr(layer, key.replace("_l0", f"_l{index}")))
        singles.append(single)
    return singles


def by_hand(layer: Any, x: Tensor, **marks: Any) -> tuple[Tensor, list[Tensor]]:
    """Returns the output and h_n of all layers, from calls of single layers."""
    states = []
    z = x
    for index, single in enumerate(single_layers(layer)):
        y, hidden = single(z, **marks)
        z = y if index == 0 else y + z
        states.append(hidden if isinstance(hidden, Tensor) else hidden[0])
    return z, states


def h_of(hidden: Any) -> Tensor:
    return hidden if isinstance(hidden, Tensor) else hidden[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True, "batch_first": True},
        {"proj_size": 2},
        {"bidirectional": True, "proj_size": 2},
        {"recompute": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CLASSES)
def test_the_sum_of_single_layers(name: str, options: dict[str, Any]) -> None:
    if "proj_size" in options and name != "LSTM":
        pytest.skip("only an LSTM has projections")
    layer = build(name, **options)
    x = torch.randn(5, 6, 3, requires_grad=True)
    expected, states = by_hand(layer, x)
    output, hidden = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_of(hidden), torch.cat(states))
    parameters = [x, *layer.parameters()]
    ours = torch.autograd.grad(output.cos().sum(), parameters)
    theirs = torch.autograd.grad(expected.cos().sum(), parameters)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)
        torch.testing.assert_close(layer(x[:, 0] if not layer.batch_first else x[0])[0].dim(), 2)


@pytest.mark.parametrize("is_bidirectional", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_packed_rows_lengths_and_resets(name: str, is_bidirectional: bool) -> None:
    layer = build(name, bidirectional=is_bidirectional)
    x = torch.randn(5, 3, 3)
    resets = torch.rand(5, 3) < 0.3
    lengths = torch.tensor([5, 2, 0])
    for marks in ({"lengths": lengths}, {"resets": resets}, {"lengths": lengths, "resets": resets}):
        torch.testing.assert_close(layer(x, **marks)[0], by_hand(layer, x, **marks)[0])
    rows = [torch.randn(n, 3) for n in (4, 2, 3)]
    output, _ = layer(pack_sequence(rows, enforce_sorted=False))
    for row, own in zip(rows, nn.utils.rnn.unpack_sequence(output), strict=True):
        torch.testing.assert_close(own, layer(row)[0])


def test_dropout_acts_on_the_input_of_a_layer_and_not_on_the_sum() -> None:
    layer = build("GRU", dropout=0.5)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    output, _ = layer(x)
    z = x
    singles = single_layers(layer)
    torch.manual_seed(1)
    for index, single in enumerate(singles):
        y, _ = single(nn.functional.dropout(z, 0.5) if index > 0 else z)
        z = y if index == 0 else y + z
    torch.testing.assert_close(output, z)


@pytest.mark.parametrize("name", CLASSES)
def test_states_and_gates_are_those_of_the_layers(name: str) -> None:
    layer = build(name)
    x = torch.randn(5, 2, 3)
    output, hidden, extras = layer(x, return_all_states=True, return_gates=True)
    z = x
    for index, single in enumerate(single_layers(layer)):
        y, _, own = single(z, return_all_states=True, return_gates=True)
        z = y if index == 0 else y + z
        torch.testing.assert_close(h_of(extras.states)[:, index], h_of(own.states)[:, 0])
        for gate, values in own.gates.items():
            torch.testing.assert_close(extras.gates[gate][:, index], values[:, 0])
    torch.testing.assert_close(output, z)
    assert torch.equal(h_of(extras.states)[-1], h_of(hidden))


@pytest.mark.parametrize("is_bidirectional", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_prepared_weights_and_sessions(name: str, is_bidirectional: bool) -> None:
    layer = build(name, layers=4, bidirectional=is_bidirectional).eval()
    x = torch.randn(40, 2, 3)
    with torch.no_grad():
        expected, hidden = layer(x)
        layer.prepare()
        assert "prepared" in str(fastrnn.explain(layer, x))
        output, own = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_of(own), h_of(hidden))
    if is_bidirectional:
        return
    for threads in (1, 2):
        session = layer.stream(batch_size=2, threads=threads)
        steps = torch.stack([session.step(row).clone() for row in x])
        torch.testing.assert_close(steps, expected)
        torch.testing.assert_close(h_of(session.state), h_of(hidden))
        session.reset()
        torch.testing.assert_close(session.run(x), expected)


class Model(nn.Module):
    """Calls a layer, for TorchScript."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Optional[Tensor]) -> Tensor:  # noqa: UP045
        return self.layer(x, lengths=lengths)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_captured_code(name: str) -> None:
    layer = build(name, bidirectional=True).eval()
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 3])
    with torch.no_grad():
        expected = layer(x)[0]
        scripted = torch.jit.script(Model(layer))
        exported = torch.export.export(layer, (x,)).module()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for code in (exported, compiled, torch.jit.trace(layer, x)):
            torch.testing.assert_close(code(x)[0], expected)
        torch.testing.assert_close(compiled(x, lengths=lengths)[0], layer(x, lengths=lengths)[0])
        torch.testing.assert_close(scripted(x, None), expected)
        torch.testing.assert_close(scripted(x, lengths), layer(x, lengths=lengths)[0])


def test_results_of_autocast_and_of_half_types() -> None:
    layer = build("LSTM")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
    torch.testing.assert_close(output.float(), layer(x)[0], atol=0.1, rtol=0.1)
    half = copy.deepcopy(layer).bfloat16()
    output = half(x.bfloat16())[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x)[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_functions(name: str) -> None:
    layer = build(name.upper())
    x, h = torch.randn(5, 2, 3), torch.zeros(3, 2, 4)
    hx = (h, h) if name == "lstm" else h
    function = getattr(fastrnn.functional, name)
    arguments = (x, hx, list(layer.parameters()), True, 3, 0.0, False, False, False)
    assert torch.equal(function(*arguments, residual=True)[0], layer(x)[0])
    with pytest.raises(TypeError, match="residual must be a bool, got 'yes'"):
        function(*arguments, residual="yes")


def test_copies_and_the_description_keep_the_option() -> None:
    layer = build("GRU")
    x = torch.randn(5, 2, 3)
    assert layer.residual
    assert "residual=True" in repr(layer)
    assert list(layer.state_dict()) == list(nn.GRU(3, 4, 3).state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fastrnn.convert(layer)):
        assert torch.equal(other(x)[0], layer(x)[0])
    plain = fastrnn.GRU(3, 4, 3)
    assert not plain.residual
    assert "residual" not in repr(plain)
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(plain(x)[0], layer(x)[0])


def test_a_single_layer_has_no_sum() -> None:
    layer = build("LSTM", layers=1)
    plain = fastrnn.LSTM(3, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3)
    assert all(map(torch.equal, tree_leaves(layer(x)), tree_leaves(plain(x))))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("option", ["residual", "batch_first_states"])
def test_quantization_is_rejected(option: str) -> None:
    layer = fastrnn.LSTM(3, 4, 2, **{option: True}).eval()
    with pytest.raises(NotImplementedError, match=f"{option} of LSTM must be False"):
        fastrnn.quantize(layer)
    with pytest.raises(NotImplementedError, match=f"{option} must be False"):
        torch.ao.quantization.quantize_dynamic(
            nn.Sequential(layer),
            {fastrnn.LSTM},
            torch.qint8,
            mapping=fastrnn.quantization_mapping(),
        )


@pytest.mark.parametrize("option", ["residual", "batch_first_states"])
def test_wrong_type_is_rejected(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} should be of type bool, got: str"):
        fastrnn.GRU(3, 4, **{option: "yes"})
