"""The constructor option ``batch_first_states``: states are [B,L*D,*]."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn

CLASSES = ["RNN", "LSTM", "GRU"]


def build(name: str, **options: Any) -> tuple[Any, Any]:
    """Returns a layer with the option, and one without with the same weights."""
    options = {"num_layers": 2, **options}
    layer = getattr(fastrnn, name)(3, 4, batch_first_states=True, **options)
    plain = getattr(fastrnn, name)(3, 4, **options)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def swap(states: Any) -> Any:
    return tree_map(lambda state: state.transpose(0, 1), states)


def initial(layer: Any, batch: int) -> Any:
    """Returns initial states [L*D,B,*]."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, batch, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(count, batch, 4)) if isinstance(layer, fastrnn.LSTM) else h


def assert_same(ours: Any, theirs: Any) -> None:
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True, "bidirectional": True}, {"num_layers": 1}, {"proj_size": 2}],
    ids=str,
)
@pytest.mark.parametrize("name", CLASSES)
def test_results_are_views_of_those_without_the_option(name: str, options: dict[str, Any]) -> None:
    if "proj_size" in options and name != "LSTM":
        pytest.skip("only an LSTM has projections")
    layer, plain = build(name, **options)
    x = torch.randn(5, 5, 3)
    hx = initial(layer, 5)
    for own, theirs in ((None, None), (swap(hx), hx)):
        output, hidden = layer(x, own)
        expected, states = plain(x, theirs)
        assert_same((output, swap(hidden)), (expected, states))
        assert all(state.transpose(0, 1).is_contiguous() for state in tree_leaves(hidden))
    again, _ = layer(x, hidden)
    assert torch.equal(again, plain(x, states)[0])
    contiguous = tree_map(lambda state: state.contiguous(), hidden)
    assert torch.equal(layer(x, contiguous)[0], again)
    single = tree_map(lambda state: state[:, 0], hx)  # no batch: [L*D,*] in any case
    assert_same(layer(x[0], single), plain(x[0], single))


@pytest.mark.parametrize("name", CLASSES)
def test_packed_jagged_and_marked_input(name: str) -> None:
    layer, plain = build(name, batch_first=True)
    hx = initial(layer, 3)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 4, 3)], enforce_sorted=False)
    ours, theirs = layer(packed, swap(hx)), plain(packed, hx)
    assert_same((ours[0].data, swap(ours[1])), (theirs[0].data, theirs[1]))
    rows = [torch.randn(n, 3) for n in (2, 4, 3)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert_same(swap(layer(jagged, swap(hx))[1]), plain(jagged, hx)[1])
    x, lengths = torch.randn(3, 5, 3), torch.tensor([5, 0, 2])
    resets = torch.rand(3, 5) < 0.4
    for reset_state in (
        initial(layer, 3),
        tree_map(lambda state: state[:, :1], initial(layer, 1)),
        tree_map(lambda state: torch.stack([state] * 5), initial(layer, 3)),
    ):
        marks = {"lengths": lengths, "resets": resets}
        own = tree_map(lambda state: state.transpose(-3, -2), reset_state)
        ours = layer(x, swap(hx), **marks, reset_state=own)
        theirs = plain(x, hx, **marks, reset_state=reset_state)
        assert_same((ours[0], swap(ours[1])), theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_states_of_every_step_continue_a_call(name: str) -> None:
    layer, _ = build(name, batch_first=True)
    x = torch.randn(2, 6, 3)
    output, _, extras = layer(x, return_all_states=True)
    middle = tree_map(lambda state: state[:, 2], extras.states)
    torch.testing.assert_close(layer(x[:, 3:], middle)[0], output[:, 3:])


@pytest.mark.parametrize("name", CLASSES)
def test_a_batch_can_be_split_and_joined(name: str) -> None:
    # as DataParallel does: every tensor along its first dimension
    layer, _ = build(name, batch_first=True)
    x, hx = torch.randn(4, 5, 3), swap(initial(layer, 4))
    parts = [
        layer(x[part], tree_map(lambda state, part=part: state[part], hx))
        for part in (slice(0, 1), slice(1, 4))
    ]
    joined = [torch.cat(pair) for pair in zip(*map(tree_leaves, parts), strict=True)]
    torch.testing.assert_close(joined, tree_leaves(layer(x, hx)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_captured_code(name: str) -> None:
    layer, _ = build(name)
    layer.eval()
    x, hx = torch.randn(5, 3, 3), swap(initial(layer, 3))
    with torch.no_grad():
        expected = layer(x, hx)
        for code in (
            torch.compile(layer, backend="eager", fullgraph=True),
            torch.export.export(layer, (x, hx)).module(),
            torch.jit.trace(layer, (x, hx)),
        ):
            assert_same(code(x, hx), expected)

        class Caller(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, hx: Any) -> Any:
                return self.layer(x, hx)

        assert_same(torch.fx.symbolic_trace(Caller())(x, hx), expected)
    with pytest.raises(RuntimeError, match="batch_first_states must be False, got True"):
        torch.jit.script(layer)


@pytest.mark.parametrize("name", CLASSES)
def test_sessions_tbptt_and_learned_states(name: str) -> None:
    layer, _ = build(name, learn_initial_state=True)
    with torch.no_grad():
        for key in layer._initial_state_names():
            getattr(layer, key).normal_()
        x = torch.randn(6, 3, 3)
        output, hidden = layer(x)
    session = layer.eval().stream(batch_size=3)
    torch.testing.assert_close(session.run(x), output)
    torch.testing.assert_close(session.state, hidden)
    session.reset()
    session.load_state(tree_map(lambda state: state.contiguous(), hidden))
    torch.testing.assert_close(session.run(x), layer(x, hidden)[0].detach())
    with pytest.raises(RuntimeError, match=r"Session.load_state: state.* must be of size"):
        session.load_state(swap(hidden))
    _, carried = fastrnn.tbptt(layer, x, torch.zeros(6, 3, 4), nn.MSELoss(), 2)
    torch.testing.assert_close(carried, hidden)


def test_wrong_sizes_are_rejected_in_the_callers_layout() -> None:
    layer, _ = build("LSTM", batch_first=True)
    x, (h, c) = torch.randn(3, 5, 3), swap(initial(layer, 3))
    for hx, message in (
        (
            (h, c[:2]),
            r"hx\[1\] must be of size \[3, 2, 4\] with batch_first_states, got \[2, 2, 4\]",
        ),
        ((swap(h), swap(c)), r"hx\[0\] must be of size \[3, 2, 4\] .* got \[2, 3, 4\]"),
        ((h[..., :3], c), r"hx\[0\] must be of size \[3, 2, 4\] .* got \[3, 2, 3\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer(x, hx)
    with pytest.raises((RuntimeError, TypeError), match="hx"):
        layer(x, h)
    with pytest.raises(RuntimeError, match="hx"):
        layer(x, (h[0], c[0]))
    with pytest.raises(RuntimeError, match=r"reset_state\[0\] must be of size"):
        layer(x, resets=torch.zeros(3, 5), reset_state=(swap(h), swap(c)))


def test_copies_and_the_description_keep_the_option() -> None:
    layer, plain = build("GRU")
    x = torch.randn(5, 3, 3)
    assert layer.batch_first_states
    assert "batch_first_states=True" in repr(layer)
    assert "batch_first_states" not in repr(plain)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fastrnn.convert(layer)):
        assert_same(other(x), layer(x))
