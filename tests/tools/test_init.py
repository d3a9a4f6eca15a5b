"""`fastrnn.init`: the values that each function sets, the values it keeps, and its errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastrnn
from fastrnn import init

IN, H = 3, 8
NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
PACKAGES = [fastrnn, nn]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def make(name: str, package: Any = fastrnn, **options: Any) -> nn.Module:
    stacked = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    module: nn.Module = getattr(package, name)(IN, H, **stacked, **options)
    return module.double()


def named(module: nn.Module, prefix: str) -> list[Tensor]:
    return [p.detach() for name, p in module.named_parameters() if name.startswith(prefix)]


def biases(module: nn.Module, gate: int) -> tuple[Tensor, Tensor]:
    """Returns the values that ``b_ih`` and ``b_hh`` of all layers have for a gate."""
    b_ih, b_hh = (
        torch.cat([b.unflatten(0, (-1, H))[gate] for b in named(module, prefix)])
        for prefix in ("bias_ih", "bias_hh")
    )
    return b_ih, b_hh


def other_gates(module: nn.Module, *gates: int) -> list[Tensor]:
    found = named(module, "weight")
    for bias in named(module, "bias"):
        blocks = bias.unflatten(0, (-1, H))
        found += [block.clone() for g, block in enumerate(blocks) if g not in gates]
    return [t.clone() for t in found]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_orthogonal_blocks(name: str, package: Any) -> None:
    module = make(name, package)
    before = copy.deepcopy(module)
    assert init.orthogonal_(module, 0.5) is module
    blocks = [b for w in named(module, "weight_hh") for b in w.unflatten(0, (-1, H))]
    for block in blocks:
        torch.testing.assert_close(block.T @ block, 0.25 * torch.eye(H, dtype=torch.float64))
    assert not any(torch.equal(blocks[0], other) for other in blocks[1:])
    for prefix in ("weight_ih", "bias"):
        assert all(map(torch.equal, named(module, prefix), named(before, prefix)))


def test_orthogonal_with_a_projection_and_in_a_half_type() -> None:
    module = init.orthogonal_(fastrnn.LSTM(IN, H, proj_size=2).double())
    for block in module.weight_hh_l0.detach().unflatten(0, (4, H)):
        torch.testing.assert_close(block.T @ block, torch.eye(2, dtype=torch.float64))
    module = init.orthogonal_(fastrnn.GRU(IN, H, dtype=torch.bfloat16))
    block = module.weight_hh_l0.detach()[:H].float()
    assert (block.T @ block - torch.eye(H)).abs().max() < H * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_chrono_of_an_lstm(name: str, package: Any) -> None:
    module = make(name, package)
    before = other_gates(module, 0, 1)
    assert init.chrono_(module, t_max=40) is module
    (i_ih, i_hh), (f_ih, f_hh) = biases(module, 0), biases(module, 1)
    assert torch.equal(f_ih, -i_ih)
    assert not i_hh.any()
    assert not f_hh.any()
    assert len(f_ih.unique()) == len(f_ih)
    assert f_ih.min() >= 0
    assert f_ih.max() <= math.log(39)
    assert all(map(torch.equal, other_gates(module, 0, 1), before))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_chrono_of_a_gru(name: str, package: Any) -> None:
    module = make(name, package)
    before = other_gates(module, 1)
    init.chrono_(module, t_max=40)
    z_ih, z_hh = biases(module, 1)
    assert not z_hh.any()
    assert z_ih.min() >= 0
    assert z_ih.max() <= math.log(39)
    assert all(map(torch.equal, other_gates(module, 1), before))


def test_chrono_draws_times_uniformly() -> None:
    module = init.chrono_(fastrnn.LSTM(1, 4000).double(), t_max=101)
    times = module.bias_ih_l0.detach()[4000:8000].exp()
    # uniform on [1, 100]: the standard deviation of the mean of 4000 is 0.45
    assert abs(float(times.mean()) - 50.5) < 5 * 0.45
    # a constant gate with this bias keeps the state for 1 + u steps
    keep = torch.sigmoid(module.bias_ih_l0.detach()[4000:8000])
    torch.testing.assert_close(1 / (1 - keep), 1 + times)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_forget_bias(name: str, package: Any) -> None:
    module = make(name, package)
    before = other_gates(module, 1)
    assert init.forget_bias_(module) is module
    b_ih, b_hh = biases(module, 1)
    assert (b_ih + b_hh == 1).all()
    assert not b_hh.any()
    assert all(map(torch.equal, other_gates(module, 1), before))
    init.forget_bias_(module, 2.5)
    assert (sum(biases(module, 1)) == 2.5).all()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_identity(name: str, package: Any, has_bias: bool) -> None:
    module = make(name, package, nonlinearity="relu", bias=has_bias)
    inputs = [w.clone() for w in named(module, "weight_ih")]
    assert init.identity_(module, 0.5) is module
    for w_hh in named(module, "weight_hh"):
        assert torch.equal(w_hh, 0.5 * torch.eye(H, dtype=torch.float64))
    assert not any(b.any() for b in named(module, "bias"))
    assert all(map(torch.equal, named(module, "weight_ih"), inputs))


@pytest.mark.parametrize(
    "initialise", [init.orthogonal_, lambda m, **o: init.chrono_(m, 9, **o)], ids=["orth", "chrono"]
)
def test_generator(initialise: Callable[..., nn.Module]) -> None:
    module = nn.LSTM(IN, H)
    state = torch.get_rng_state()
    results = []
    for _ in range(2):
        initialise(module, generator=torch.Generator().manual_seed(7))
        results.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *results))
    assert torch.equal(torch.get_rng_state(), state)
    initialise(module)
    assert not torch.equal(torch.get_rng_state(), state)


def test_parameters_stay_the_same_leaves() -> None:
    module = fastrnn.LSTM(IN, H)
    before = {name: id(p) for name, p in module.named_parameters()}
    init.chrono_(init.forget_bias_(init.orthogonal_(module)), 9)
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("module", [fastrnn.GRU(IN, H), fastrnn.LSTM(IN, H), nn.LSTMCell(IN, H)])
def test_parametrized_class_is_recognised(module: nn.Module) -> None:
    suffix = "" if isinstance(module, nn.LSTMCell) else "_l0"
    parametrizations.weight_norm(module, f"weight_ih{suffix}")
    init.chrono_(init.orthogonal_(module), 9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: init.orthogonal_(nn.Linear(IN, H)), TypeError, "orthogonal_: .* got Linear"),
        (lambda: init.orthogonal_(torch.eye(3)), TypeError, "got Tensor"),
        (lambda: init.orthogonal_(nn.GRU(IN, H), math.nan), ValueError, "gain must be .*, got nan"),
        (lambda: init.chrono_(nn.RNN(IN, H), 9), TypeError, "chrono_: .* got RNN with .*='tanh'"),
        (lambda: init.chrono_(nn.LSTM(IN, H), 1.5), ValueError, "t_max must .* least 2, got 1.5"),
        (lambda: init.chrono_(nn.LSTM(IN, H), math.inf), ValueError, "got inf"),
        (lambda: init.chrono_(nn.LSTM(IN, H, bias=False), 9), ValueError, "got bias=False"),
        (lambda: init.forget_bias_(fastrnn.GRU(IN, H)), TypeError, "an LSTM or LSTMCell, got GRU"),
        (lambda: init.forget_bias_(nn.LSTMCell(IN, H), math.inf), ValueError, "value must be"),
        (lambda: init.identity_(fastrnn.RNNCell(IN, H)), TypeError, "got RNNCell with .*='tanh'"),
        (
            lambda: init.identity_(nn.RNN(IN, H, nonlinearity="relu"), math.inf),
            ValueError,
            "scale must be a finite number, got inf",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_computed_and_missing_parameters() -> None:
    module = parametrizations.spectral_norm(fastrnn.GRU(IN, H), "weight_hh_l0")
    with pytest.raises(RuntimeError, match="weight_hh_l0 must be a Parameter, got a weight that"):
        init.orthogonal_(module)
    module = fastrnn.LSTM(IN, H)
    module.bias_hh_l0 = None
    before = module.bias_ih_l0.clone()
    with pytest.raises(ValueError, match="module must have bias_hh_l0, got None"):
        init.forget_bias_(module)
    assert torch.equal(module.bias_ih_l0, before)
