"""`fastrnn.tbptt`: truncated backpropagation through time."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from support import pack
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn
from fastrnn import TbpttProgress, tbptt

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, INPUT, H = 11, 3, 4, 5
LIBRARIES = [fastrnn, nn]
LAYERS = [
    pytest.param(library, name, id=f"{library.__name__}.{name}")
    for library in LIBRARIES
    for name in ("RNN", "LSTM", "GRU")
]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns an input and targets for H outputs."""
    return torch.randn(T, B, INPUT, dtype=dtype), torch.randn(T, B, H, dtype=dtype)


def gradients(module: nn.Module) -> list[Tensor]:
    """Returns the gradients of all parameters and sets them to None."""
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return [gradient for gradient in found if gradient is not None]


def detached(hx: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, hx)


def joined(module: Any, x: Tensor, chunk_length: int, hx: Any = None) -> tuple[Tensor, Any]:
    """Returns the output and states of a sequence whose gradients are cut off between chunks."""
    outputs = []
    for chunk in x.split(chunk_length):
        output, hx = module(chunk, detached(hx))
        outputs.append(output)
    return torch.cat(outputs), detached(hx)


# -- one chunk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_length", [T, T + 3, 10**30])
@pytest.mark.parametrize(("library", "name"), LAYERS)
def test_one_chunk_is_the_whole_sequence(library: Any, name: str, chunk_length: int) -> None:
    layer = getattr(library, name)(INPUT, H, num_layers=2)
    x, y = data(torch.float32)
    state = [torch.randn(2, B, H, requires_grad=True) for _ in range(2 if name == "LSTM" else 1)]
    hx = tuple(state) if name == "LSTM" else state[0]
    output, h_n = layer(x, hx)
    expected = mse_loss(output, y)
    expected.backward()
    d_state = [leaf.grad for leaf in state]
    for leaf in state:
        leaf.grad = None
    expected_gradients = gradients(layer)

    loss, found = tbptt(layer, x, y, mse_loss, chunk_length, hx)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    torch.testing.assert_close(found, detached(h_n), rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in tree_leaves(found))
    torch.testing.assert_close(gradients(layer), expected_gradients, rtol=0, atol=0)
    torch.testing.assert_close([leaf.grad for leaf in state], d_state, rtol=0, atol=0)


# -- several chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_length", [1, 4, 10])
@pytest.mark.parametrize(("library", "name"), LAYERS)
def test_chunks_match_a_loop(library: Any, name: str, chunk_length: int) -> None:
    layer = getattr(library, name)(INPUT, H)
    x, y = data(torch.float32)
    hx, total = None, torch.zeros(())
    for chunk, target in zip(x.split(chunk_length), y.split(chunk_length), strict=True):
        output, hx = layer(chunk, hx)
        part = mse_loss(output, target) * (len(chunk) / T)
        part.backward()
        total += part.detach()
        hx = detached(hx)
    expected = gradients(layer)
    loss, found = tbptt(layer, x, y, mse_loss, chunk_length)
    assert torch.equal(loss, total)
    torch.testing.assert_close(found, hx, rtol=0, atol=0)
    torch.testing.assert_close(gradients(layer), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("library", "name"), LAYERS)
def test_losses_of_chunks_add_up_to_the_loss_of_the_sequence(
    library: Any, name: str, reduction: str
) -> None:
    layer = getattr(library, name)(INPUT, H, dtype=torch.float64)
    x, y = data()
    loss_function = nn.MSELoss(reduction=reduction)
    output, h_n = joined(layer, x, 4)
    expected = loss_function(output, y)
    expected.backward()
    expected_gradients = gradients(layer)
    loss, found = tbptt(layer, x, y, loss_function, 4)
    assert_same_in_double(loss, expected.detach())
    assert_same_in_double(found, h_n)
    assert_same_in_double(gradients(layer), expected_gradients)


def test_states_continue_in_the_next_call() -> None:
    layer = fastrnn.LSTM(INPUT, H, dtype=torch.float64)
    x, y = data()
    loss_function = nn.MSELoss(reduction="sum")
    expected = tbptt(layer, x, y, loss_function, 4)
    expected_gradients = gradients(layer)
    first, hx = tbptt(layer, x[:8], y[:8], loss_function, 4)
    second, hx = tbptt(layer, x[8:], y[8:], loss_function, 4, hx)
    assert_same_in_double((first + second, hx), expected)
    assert_same_in_double(gradients(layer), expected_gradients)


@pytest.mark.parametrize("library", LIBRARIES)
def test_batch_first_is_read_from_the_module(library: Any) -> None:
    layer = library.GRU(INPUT, H, dtype=torch.float64)
    x, y = data()
    expected = tbptt(layer, x, y, mse_loss, 4)
    expected_gradients = gradients(layer)
    layer.batch_first = True
    found = tbptt(layer, x.transpose(0, 1), y.transpose(0, 1), mse_loss, 4)
    assert_same_in_double(found, expected)
    assert_same_in_double(gradients(layer), expected_gradients)


def test_one_sequence_without_a_batch_ignores_batch_first() -> None:
    layer = fastrnn.LSTM(INPUT, H, batch_first=True, dtype=torch.float64)
    x, y = (t[:, 0] for t in data())
    loss, hx = tbptt(layer, x, y, mse_loss, 4)
    assert_same_in_double(loss, mse_loss(layer(x)[0], y).detach())
    assert hx[0].shape == (1, H)


def test_batch_first_of_a_module_around_layers_is_an_argument() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.GRU(INPUT, H, batch_first=True, dtype=torch.float64)

        def forward(self, x: Tensor, hx: Any) -> Any:
            return self.layer(x, hx)

    model, (x, y) = Model(), (t.transpose(0, 1) for t in data())
    with pytest.raises(ValueError, match=r"batch_first must be True or False .*, got None\."):
        tbptt(model, x, y, mse_loss, 4)
    found = tbptt(model, x, y, mse_loss, 4, batch_first=True)
    assert_same_in_double(found, tbptt(model.layer, x, y, mse_loss, 4))


def test_input_that_is_a_leaf_gets_a_gradient() -> None:
    layer = fastrnn.GRU(INPUT, H, dtype=torch.float64)
    x, y = data()
    x.requires_grad_()
    mse_loss(joined(layer, x, 4)[0], y).backward()
    expected, x.grad = x.grad, None
    tbptt(layer, x, y, mse_loss, 4)
    assert_same_in_double(x.grad, expected)


def test_activations_of_a_chunk_are_freed_before_the_next() -> None:
    layer, alive = nn.GRU(INPUT, H), []

    def module(x: Tensor, hx: Any) -> Any:
        assert not any(output() is not None for output in alive)
        output, hx = layer(x, hx)
        output = output * 2
        alive.append(weakref.ref(output))
        return output, hx

    tbptt(module, *data(torch.float32), mse_loss, 2)
    assert len(alive) == 6


# -- states, inputs and targets of any structure --------------------------------------------------


class Memory(NamedTuple):
    h: Tensor
    steps: int


class Nested(nn.Module):
    """Two layers with states in a dictionary of a named tuple, a list and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fastrnn.GRU(INPUT, H, dtype=torch.float64)
        self.second = nn.LSTM(H, H, dtype=torch.float64)

    def forward(self, x: Any, hx: Any) -> Any:
        x = x["signal"] * x["scale"] if isinstance(x, dict) else x
        if hx is None:
            zeros = x.new_zeros(1, x.shape[1], H)
            hx = {"memory": Memory(zeros, 0), "lower": [None, (zeros, zeros)]}
        output, h = self.first(x, hx["memory"].h)
        output, lower = self.second(output, hx["lower"][1])
        memory = Memory(h, hx["memory"].steps + len(x))
        return output, {"memory": memory, "lower": [None, lower]}


def test_states_can_be_nested() -> None:
    model, (x, y) = Nested(), data()
    output, hx = joined(model, x, 4)
    expected = mse_loss(output, y)
    expected.backward()
    expected_gradients = gradients(model)
    loss, found = tbptt(model, x, y, mse_loss, 4)
    assert_same_in_double(loss, expected.detach())
    assert_same_in_double(gradients(model), expected_gradients)
    assert found["memory"].steps == T
    assert_same_in_double(found["memory"].h, hx["memory"].h)
    assert_same_in_double(found["lower"][1], hx["lower"][1])
    assert not any(getattr(leaf, "requires_grad", False) for leaf in tree_leaves(found))


def test_input_and_targets_can_be_nested() -> None:
    model, (x, y) = Nested(), data()
    scale, mask = torch.rand(T, 1, 1, dtype=torch.float64), torch.rand(T, B, 1).round().double()

    def masked(output: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return ((output - targets[0]) * targets[1]).square().mean()

    expected = tbptt(model, x * scale, y, lambda o, t: masked(o, (t, torch.ones(1))), T)[0]
    found = tbptt(model, {"signal": x, "scale": scale}, (y, torch.ones_like(mask)), masked, 4)[0]
    assert_same_in_double(found, expected)
    assert tbptt(model, x, (y, mask), masked, 4)[0] < expected


def test_initial_state_can_be_learned() -> None:
    layer = fastrnn.GRU(INPUT, H, dtype=torch.float64)
    x, y = data()
    start = nn.Parameter(torch.randn(1, 1, H, dtype=torch.float64))
    tbptt(layer, x, y, nn.MSELoss(reduction="sum"), 4, start.expand(1, B, H).contiguous())
    found, start.grad = start.grad, None
    output, _ = layer(x[:4], start.expand(1, B, H).contiguous())
    mse_loss(output, y[:4], reduction="sum").backward()
    assert_same_in_double(found, start.grad)


# -- reductions -----------------------------------------------------------------------------------


def test_reduction_is_that_of_the_loss() -> None:
    layer, (x, y) = fastrnn.RNN(INPUT, H, dtype=torch.float64), data()
    output, _ = layer(x)
    expected = mse_loss(output, y, reduction="sum").detach()
    summed = functools.partial(mse_loss, reduction="sum")
    found = [
        tbptt(layer, x, y, nn.MSELoss(reduction="sum"), 4)[0],
        tbptt(layer, x, y, summed, 4)[0],
        tbptt(layer, x, y, lambda output, y: summed(output, y), 4, reduction="sum")[0],
    ]
    for loss in found:
        assert_same_in_double(loss, expected)


def test_mean_over_some_steps_is_a_sum_divided_by_their_number() -> None:
    layer, (x, _) = fastrnn.GRU(INPUT, H, dtype=torch.float64), data()
    labels = torch.randint(H, (T, B))
    labels[6:, 1] = -100  # padding
    count = (labels != -100).sum()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum") / count

    found = tbptt(layer, x, labels, loss, 4, reduction="sum")[0]
    expected = cross_entropy(layer(x)[0].flatten(0, 1), labels.flatten())
    assert_same_in_double(found, expected.detach())


def test_many_losses_in_a_half_type_add_up() -> None:
    """A sum in bfloat16 would stay at 256."""
    weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    loss, _ = tbptt(lambda x, h: (x * weight, x), x, x, lambda o, y: o.sum(), 1, reduction="sum")
    assert loss.item() == 1000
    assert loss.dtype == torch.float32


# -- callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks_per_update", [1, 2, 100])
def test_updates_match_a_loop(chunks_per_update: int) -> None:
    def train(step: Any) -> list[Tensor]:
        torch.manual_seed(3)
        layer = fastrnn.LSTM(INPUT, H)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        x, y = data(torch.float32)
        step(layer, optimizer, x, y)
        return list(layer.parameters())

    def by_hand(layer: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
        span, hx = 2 * chunks_per_update, None
        for group, targets in zip(x.split(span), y.split(span), strict=True):
            for chunk, target in zip(group.split(2), targets.split(2), strict=True):
                output, hx = layer(chunk, hx)
                (mse_loss(output, target) * (len(chunk) / len(group))).backward()
                hx = detached(hx)
            optimizer.step()
            optimizer.zero_grad()

    seen: list[TbpttProgress] = []

    def by_tbptt(layer: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
        def update(progress: TbpttProgress) -> None:
            seen.append(progress)
            optimizer.step()
            optimizer.zero_grad()

        options = {"update": update, "chunks_per_update": chunks_per_update}
        loss, hx = tbptt(layer, x, y, mse_loss, 2, **options)
        ends = [*range(2 * chunks_per_update, T, 2 * chunks_per_update), T]
        assert [progress.steps for progress in seen] == ends
        assert {progress.total_steps for progress in seen} == {T}
        assert seen[-1].hx is hx
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        mean = sum(n * p.loss.double() for n, p in zip(lengths, seen, strict=True)) / T
        torch.testing.assert_close(loss.double(), mean)

    torch.testing.assert_close(train(by_tbptt), train(by_hand), rtol=0, atol=0)


def test_backward_can_be_replaced() -> None:
    layer, (x, y) = fastrnn.GRU(INPUT, H, dtype=torch.float64), data()
    expected_loss, _ = tbptt(layer, x, y, mse_loss, 4)
    expected = gradients(layer)
    loss, _ = tbptt(layer, x, y, mse_loss, 4, backward=lambda loss: (8 * loss).backward())
    assert_same_in_double(loss, expected_loss)
    assert_same_in_double(gradients(layer), [8 * gradient for gradient in expected])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_loss_alone_without_gradients(context: Any) -> None:
    layer, (x, y) = fastrnn.GRU(INPUT, H, dtype=torch.float64), data()
    with context():
        loss, _ = tbptt(layer, x, y, mse_loss, 4)
    assert_same_in_double(loss, mse_loss(layer(x)[0], y).detach())
    assert gradients(layer) == []


# -- errors ---------------------------------------------------------------------------------------

LAYER = fastrnn.GRU(INPUT, H)
X, Y = torch.zeros(T, B, INPUT), torch.zeros(T, B, H)
JAGGED = torch.nested.nested_tensor([torch.zeros(2, INPUT)], layout=torch.jagged)
PACKED = pack(torch.zeros(6, INPUT), [3, 2, 1], True)


def states(value: Any) -> Any:
    """Returns a module that returns this value as its states."""
    return lambda x, hx: (LAYER(x)[0], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": 3}, "module must be callable, got 3."),
        ({"loss": None}, "loss must be callable, got None."),
        ({"update": 1}, "update must be callable, got 1."),
        ({"backward": None}, "backward must be callable, got None."),
        ({"chunk_length": 0}, "chunk_length must be a positive int, got 0."),
        ({"chunk_length": 2.0}, "chunk_length must be a positive int, got 2.0."),
        ({"chunk_length": True}, "chunk_length must be a positive int, got True."),
        (
            {"update": print, "chunks_per_update": -1},
            "chunks_per_update must be a positive int, got -1.",
        ),
        ({"chunks_per_update": 2}, "chunks_per_update must be 1 without update, got 2."),
        (
            {"input": None},
            "input must be a padded tensor, or several in tuples, lists or dicts, got None.",
        ),
        ({"input": {}}, "lists or dicts, got a dict of 0."),
        ({"input": PACKED}, "lists or dicts (see pad_packed_sequence), got a PackedSequence of 4."),
        ({"input": JAGGED}, "lists or dicts, got a nested tensor."),
        ({"targets": [Y, 1]}, "lists or dicts, got 1."),
        (
            {"targets": Y[1:]},
            "targets must be 11 steps long in dimension 0, got a tensor of shape [10, 3, 5].",
        ),
        (
            {"input": X[:0]},
            "input must be at least one step long in dimension 0, got a tensor of shape [0, 3, 4].",
        ),
        (
            {"module": print, "targets": torch.zeros(B), "batch_first": True},
            "targets must be at least one step long in dimension 1, got a tensor of shape [3].",
        ),
        (
            {"input": nn.Linear(INPUT, INPUT)(X)},
            "input must not be computed with gradients",
        ),
        ({"batch_first": True}, "batch_first must be False like that of module, got True."),
        ({"module": print, "batch_first": "yes"}, "batch_first must be True, False or None, got"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum'"),
        ({"loss": nn.KLDivLoss(reduction="batchmean")}, "reduction must be 'mean' or 'sum'"),
        ({"module": fastrnn.GRU(INPUT, H, bidirectional=True)}, "module must not be bidirectional"),
        ({"module": nn.Linear(INPUT, H)}, "forward() takes 2 positional arguments"),
        (
            {"module": lambda x, hx: LAYER(x)[0]},
            "module must return (output, hx), got a tensor of shape [4, 3, 5].",
        ),
        ({"module": states(None)}, "module must return its states as tensors in tuples"),
        ({"module": states((Y, object()))}, "got object in them."),
        (
            {"loss": nn.MSELoss(reduction="none"), "reduction": "mean"},
            "loss must return a scalar tensor, got a tensor of shape [4, 3, 5].",
        ),
        ({"loss": lambda output, y: 0.5}, "loss must return a scalar tensor, got 0.5."),
        (
            {"loss": lambda output, y: output.detach().mean()},
            "loss must return a tensor that requires gradients",
        ),
    ],
)
def test_error_names_the_argument(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input": X, "targets": Y, "loss": mse_loss, "chunk_length": 4}
    with pytest.raises((TypeError, ValueError)) as caught:
        tbptt(**{"module": LAYER, **arguments, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
