"""The constructor option ``learn_initial_state``."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn

CLASSES = ["RNN", "LSTM", "GRU"]


def layer_with_states(name: str, **options: Any) -> Any:
    """Returns a layer whose learned initial states are not zero."""
    layer = getattr(fastrnn, name)(3, 4, learn_initial_state=True, **options)
    with torch.no_grad():
        for key, state in layer.named_parameters():
            if key in ("h_0", "c_0"):
                state.normal_()
    return layer


def states_of(layer: Any, batch: int) -> Any:
    """Returns the learned states as a caller would pass them."""
    states = [layer.h_0, *([layer.c_0] if hasattr(layer, "c_0") else [])]
    states = [state.expand(-1, batch, -1).contiguous() for state in states]
    return tuple(states) if len(states) == 2 else states[0]


def results(layer: Any, call: Any) -> list[Tensor]:
    """Returns outputs, states and the gradients of all parameters."""
    layer.zero_grad()
    found = [t for t in tree_leaves(call()) if t.is_floating_point()]
    torch.stack([(t * t.cos()).sum() for t in found]).sum().backward()
    return found + [parameter.grad for parameter in layer.parameters()]


def assert_same(layer: Any, ours: Any, theirs: Any) -> None:
    pairs = zip(results(layer, ours), results(layer, theirs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_follow_those_of_torch_and_are_zero(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    theirs = getattr(nn, name)(3, 4, **options)
    torch.manual_seed(0)
    layer = getattr(fastrnn, name)(3, 4, learn_initial_state=True, **options)
    own = {"h_0", "c_0"} if name == "LSTM" else {"h_0"}
    names = list(layer.state_dict())
    assert names == [*theirs.state_dict(), *sorted(own, reverse=True)]
    for key, weight in theirs.state_dict().items():
        assert torch.equal(layer.state_dict()[key], weight)
    for key in own:
        assert torch.equal(getattr(layer, key), torch.zeros(4, 1, 4))
    nn.init.ones_(layer.h_0)
    layer.reset_parameters()
    assert not layer.h_0.any()
    assert "learn_initial_state=True" in repr(layer)


def test_without_the_option_the_state_dict_is_that_of_torch() -> None:
    for name in CLASSES:
        layer = getattr(fastrnn, name)(3, 4, learn_initial_state=False)
        assert list(layer.state_dict()) == list(getattr(nn, name)(3, 4).state_dict())
        assert "learn" not in repr(layer)


def test_projection_has_its_own_size() -> None:
    layer = fastrnn.LSTM(3, 4, 2, proj_size=2, learn_initial_state=True, dtype=torch.float64)
    assert (layer.h_0.shape, layer.c_0.shape) == ((2, 1, 2), (2, 1, 4))
    assert layer.h_0.dtype == layer.c_0.dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CLASSES)
def test_call_without_hx_equals_a_call_with_the_states(name: str, options: dict[str, Any]) -> None:
    layer = layer_with_states(name, **options)
    x = torch.randn(5, 5, 3)
    assert_same(layer, lambda: layer(x), lambda: layer(x, states_of(layer, 5)))
    assert all(parameter.grad.any() for parameter in layer.parameters())
    one = x[:, 0]  # without a batch dimension
    single = tree_map(lambda state: state.squeeze(1), states_of(layer, 1))
    assert_same(
        layer,
        lambda: layer(one),
        lambda: layer(one, tree_map(lambda state: state.squeeze(1), states_of(layer, 1))),
    )
    with torch.no_grad():
        assert torch.equal(layer(one)[0], layer(one, single)[0])
        assert torch.equal(layer(x[:1, :1])[0], layer(x[:1, :1], states_of(layer, 1))[0])


@pytest.mark.parametrize("name", CLASSES)
def test_packed_sequences_and_marks_begin_with_the_states(name: str) -> None:
    layer = layer_with_states(name, num_layers=2)
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 3, 2)])

    def data(result: Any) -> Any:
        return result[0].data, result[1]

    assert_same(
        layer, lambda: data(layer(packed)), lambda: data(layer(packed, states_of(layer, 3)))
    )
    unsorted = pack_sequence([torch.randn(n, 3) for n in (2, 4, 3)], enforce_sorted=False)
    with torch.no_grad():
        assert torch.equal(layer(unsorted)[0].data, layer(unsorted, states_of(layer, 3))[0].data)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([3, 5])
    assert_same(
        layer,
        lambda: layer(x, lengths=lengths),
        lambda: layer(x, states_of(layer, 2), lengths=lengths),
    )
    # a reset begins a sequence, too
    resets = torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]], dtype=torch.bool)
    states = states_of(layer, 2)
    assert_same(
        layer,
        lambda: layer(x, resets=resets),
        lambda: layer(x, states_of(layer, 2), resets=resets, reset_state=states_of(layer, 2)),
    )
    zeros = tree_map(torch.zeros_like, states)
    with torch.no_grad():
        other = layer(x, resets=resets, reset_state=zeros)[0]
        assert not torch.equal(layer(x, resets=resets)[0][4, 1], other[4, 1])


class Model(nn.Module):
    """Calls a layer with padded, unbatched and packed input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, packed: PackedSequence) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer(x)[0], self.layer(x[:, 0])[0], self.layer(packed)[0].data


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_scripted_code_uses_the_states(name: str, options: dict[str, Any]) -> None:
    model = Model(layer_with_states(name, **options))
    x = torch.randn(5, 2, 3)
    packed = pack_sequence([x[:, 0], x[:3, 1]])
    script = torch.jit.script(model)
    assert_same(model, lambda: script(x, packed), lambda: model(x, packed))
    with torch.no_grad():
        nn.init.zeros_(model.layer.h_0)  # the script has the module's own parameters
    assert_same(model, lambda: script(x, packed), lambda: model(x, packed))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_parametrized_state_is_not_scripted() -> None:
    layer = layer_with_states("GRU")
    nn.utils.parametrize.register_parametrization(layer, "h_0", nn.Tanh())
    x = torch.randn(5, 2, 3)
    assert torch.equal(layer(x)[0], layer(x, layer.h_0.expand(-1, 2, -1))[0])
    with pytest.raises(RuntimeError, match="h_0 of GRU must be a Parameter"):
        torch.jit.script(Model(layer))


@pytest.mark.parametrize("name", CLASSES)
def test_captured_code_uses_the_states(name: str) -> None:
    layer = layer_with_states(name).eval()
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        expected = layer(x)[0]
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(x)[0], expected)
        assert torch.equal(torch.compile(layer, backend="eager")(x)[0], expected)
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x)[0], expected)


@pytest.mark.parametrize("name", CLASSES)
def test_copies_pickles_and_checkpoints_keep_the_states(name: str) -> None:
    layer = layer_with_states(name)
    x = torch.randn(5, 2, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = getattr(fastrnn, name)(3, 4, learn_initial_state=True)
    loaded.load_state_dict(torch.load(file))
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x)[0], expected)
        assert fastrnn.convert(other) is other
    with pytest.raises(RuntimeError, match="h_0"):
        layer.load_state_dict(getattr(nn, name)(3, 4).state_dict())
    layer.load_state_dict(getattr(nn, name)(3, 4).state_dict(), strict=False)
    assert layer.double()(x.double())[0].dtype == torch.float64


@pytest.mark.parametrize("name", CLASSES)
def test_prepared_weights_and_sessions_begin_with_the_states(name: str) -> None:
    layer = layer_with_states(name, num_layers=2).eval()
    x = torch.randn(4, 1, 3)
    with torch.no_grad():
        expected = layer(x)[0]
        layer.prepare()
        torch.testing.assert_close(layer(x)[0], expected)
        assert "prepared" in str(fastrnn.explain(layer, x))
        layer.unprepare()
    session = fastrnn.Session(layer)
    for _ in range(2):
        torch.testing.assert_close(session.run(x), expected)
        session.reset()
    session = layer.stream(batch_size=2)
    session.run(x.expand(-1, 2, -1).contiguous())
    untouched = session.state
    session.reset(1)
    for before, after, initial in zip(
        *[
            state if isinstance(state, tuple) else (state,)
            for state in (untouched, session.state, states_of(layer, 2))
        ],
        strict=True,
    ):
        assert torch.equal(after[:, 0], before[:, 0])
        assert torch.equal(after[:, 1], initial[:, 1])


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantization_of_a_learned_state_is_rejected() -> None:
    with pytest.raises(NotImplementedError, match="learned initial state"):
        fastrnn.quantize(layer_with_states("LSTM").eval())
    model = nn.Sequential(layer_with_states("LSTM")).eval()
    with pytest.raises(NotImplementedError, match="learned initial state"):
        torch.ao.quantization.quantize_dynamic(
            model, {fastrnn.LSTM}, torch.qint8, mapping=fastrnn.quantization_mapping()
        )


def test_wrong_type_is_rejected() -> None:
    with pytest.raises(TypeError, match="learn_initial_state should be of type bool, got: str"):
        fastrnn.GRU(3, 4, learn_initial_state="yes")


def test_states_are_trained() -> None:
    layer = fastrnn.GRU(2, 4, learn_initial_state=True)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.randn(3, 2, 2))[0].sum().backward()
    optimizer.step()
    assert layer.h_0.all()
