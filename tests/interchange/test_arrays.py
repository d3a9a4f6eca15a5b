"""Weights as arrays: of Keras without Keras, of Haste, for FlashRNN. Nothing has to be installed.

Haste and FlashRNN need CUDA to be installed. Their formulas, as their documentation states them,
are loops of numpy here, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_same_in_double
from torch import Tensor, nn

import fastrnn

np = pytest.importorskip("numpy")


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def random(*shape: int) -> Any:
    return torch.randn(shape).double().numpy()


def run(module: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return module(torch.from_numpy(x))[0]


def scan(step: Callable[..., Any], states: tuple[Any, ...], x: Any) -> Tensor:
    """Returns the first state after each step of x [T,...]; step(x_t, *states) returns states."""
    outputs = []
    for x_t in x:
        states = step(x_t, *states)
        outputs.append(states[0])
    return torch.from_numpy(np.stack(outputs))


# --- Haste


def haste_state(gates: int, inputs: int, hidden: int) -> dict[str, Any]:
    state = {
        "kernel": random(inputs, gates * hidden),
        "recurrent_kernel": random(hidden, gates * hidden),
        "bias": random(gates * hidden),
    }
    if gates == 3:
        state["recurrent_bias"] = random(gates * hidden)
    return state


def haste_lstm(state: dict[str, Any], x: Any) -> Tensor:
    def step(x_t: Any, h: Any, c: Any) -> tuple[Any, Any]:
        sums = x_t @ state["kernel"] + h @ state["recurrent_kernel"] + state["bias"]
        i, g, f, o = np.split(sums, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    zeros = np.zeros((x.shape[1], state["recurrent_kernel"].shape[0]))
    return scan(step, (zeros, zeros), x)


def haste_gru(state: dict[str, Any], x: Any) -> Tensor:
    def step(x_t: Any, h: Any) -> tuple[Any]:
        xz, xr, xn = np.split(x_t @ state["kernel"] + state["bias"], 3, axis=-1)
        hz, hr, hn = np.split(h @ state["recurrent_kernel"] + state["recurrent_bias"], 3, axis=-1)
        z = sigmoid(xz + hz)
        return (z * h + (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn),)

    return scan(step, (np.zeros((x.shape[1], state["recurrent_kernel"].shape[0])),), x)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (8, 17)], ids=str)
@pytest.mark.parametrize(("gates", "loop"), [(4, haste_lstm), (3, haste_gru)])
def test_haste(gates: int, loop: Callable[..., Tensor], sizes: tuple[int, int]) -> None:
    state = haste_state(gates, *sizes)
    x = random(6, 2, sizes[0])
    assert_same_in_double(run(fastrnn.from_haste(state), x), loop(state, x))


def test_haste_layer_knows_its_layout() -> None:
    state = {name: torch.from_numpy(w) for name, w in haste_state(4, 3, 5).items()}
    layer = SimpleNamespace(state_dict=lambda: state, zoneout=0.0, batch_first=True)
    assert fastrnn.from_haste(layer).batch_first
    assert not fastrnn.from_haste(layer, batch_first=False).batch_first
    assert fastrnn.from_haste(layer).training


def haste_norm(gain: Any, v: Any, shift: Any = 0.0) -> Any:
    centred = v - v.mean(-1, keepdims=True)
    return gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + shift


def haste_with_options(state: dict[str, Any], x: Any, zoneout: float) -> Tensor:
    """Runs a layer of Haste with zoneout in eval mode, and layer normalisation if it has gains."""

    def norm_x_h(index: int, v: Any) -> Any:
        return haste_norm(state["gamma"][index], v) if "gamma" in state else v

    def step(x_t: Any, h: Any, c: Any) -> tuple[Any, Any]:
        of_x = norm_x_h(0, x_t @ state["kernel"]) + state["bias"]
        of_h = norm_x_h(1, h @ state["recurrent_kernel"]) + state.get("recurrent_bias", 0.0)
        if "recurrent_bias" in state:
            (xz, xr, xn), (hz, hr, hn) = np.split(of_x, 3, -1), np.split(of_h, 3, -1)
            z = sigmoid(xz + hz)
            new = z * h + (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn)
        else:
            i, g, f, o = np.split(of_x + of_h, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            shown = haste_norm(state["gamma_h"], c, state["beta_h"]) if "gamma_h" in state else c
            new = sigmoid(o) * np.tanh(shown)
        return zoneout * h + (1 - zoneout) * new, c

    zeros = np.zeros((x.shape[1], state["recurrent_kernel"].shape[0]))
    return scan(step, (zeros, zeros), x)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("zoneout", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gates", [4, 3])
def test_haste_with_options(gates: int, zoneout: float, has_norm: bool) -> None:
    state = haste_state(gates, 3, 5)
    if has_norm:
        state["gamma"] = random(2, gates * 5)
    if has_norm and gates == 4:
        state |= {"gamma_h": random(5), "beta_h": random(5)}
    layer = SimpleNamespace(
        state_dict=lambda: {name: torch.from_numpy(w) for name, w in state.items()},
        zoneout=zoneout,
        dropout=0.5,
        training=False,
    )
    module = fastrnn.from_haste(layer)
    assert module.layer_norm == has_norm
    assert module.weight_dropout == 0.5
    x = random(6, 2, 3)
    expected = haste_with_options(state, x, zoneout)
    assert_same_in_double(run(module, x), expected)
    again = fastrnn.from_haste(state, zoneout=zoneout).eval()
    assert_same_in_double(run(again, x), expected)
    assert again.zoneout == ((0.0, zoneout) if gates == 4 and zoneout else zoneout)


def test_haste_keeps_units_of_h_but_none_of_c() -> None:
    layer = SimpleNamespace(
        state_dict=lambda: {n: torch.from_numpy(w) for n, w in haste_state(4, 3, 64).items()},
        zoneout=0.3,
    )
    module = fastrnn.from_haste(layer)
    y, (_, c_n) = module(torch.randn(40, 8, 3).double())
    kept = (y[1:] == y[:-1]).double().mean().item()
    assert 0.27 < kept < 0.33  # of 20000 draws
    module.zoneout = (0.0, 1.0)
    y, (_, c_n) = module(torch.randn(4, 8, 3).double())
    assert not y.any()
    assert c_n.all()


def test_the_options_of_haste_are_checked() -> None:
    state = haste_state(3, 2, 3)
    with pytest.raises(ValueError, match="GRU: zoneout must be a number from 0 to 1, got 2"):
        fastrnn.from_haste(state, zoneout=2)
    with pytest.raises(ValueError, match="GRU: weight_dropout must be a number from 0 to 1"):
        fastrnn.from_haste(state, weight_dropout=-1)
    with pytest.raises(NotImplementedError, match="got also gamma_h"):
        fastrnn.from_haste({**state, "gamma": random(2, 9), "gamma_h": random(3)})
    indrnn = {"kernel": random(2, 3), "recurrent_scale": random(3), "bias": random(3)}
    with pytest.raises(NotImplementedError, match="got also gamma"):  # LayerNormIndRNN
        fastrnn.from_haste({**indrnn, "gamma": random(3)})
    with pytest.raises(ValueError, match="source must have bias, got none"):
        fastrnn.from_haste({name: w for name, w in indrnn.items() if name != "bias"})
    with pytest.raises(ValueError, match="kernel"):
        fastrnn.from_haste({**indrnn, "recurrent_scale": random(4)})
    with pytest.raises(ValueError, match=r"IndRNN: .* no zoneout"):
        fastrnn.from_haste(indrnn, zoneout=0.1)


def test_indrnn_of_haste() -> None:
    kernel, scale, bias = random(3, 5), random(5), random(5)
    x = random(6, 2, 3)
    h, expected = np.zeros((2, 5)), []
    for step in x:
        h = np.tanh(step @ kernel + bias + scale * h)
        expected.append(h)
    state = {"kernel": kernel, "recurrent_scale": scale, "bias": bias}
    module = fastrnn.from_haste(state)
    assert type(module) is fastrnn.IndRNN
    output, h_n = module(torch.from_numpy(x))
    assert_same_in_double(output, torch.from_numpy(np.stack(expected)))
    assert_same_in_double(h_n[0], torch.from_numpy(expected[-1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 0.0, "beta_h": 0.0}, ValueError, "source must have gamma_h, got none"),
        (
            {"gamma": np.zeros(20), "gamma_h": np.zeros(5), "beta_h": np.zeros(5)},
            ValueError,
            r"gamma must be of shape \[2, 4\*H\] = \[2, 20\], got \[20\]",
        ),
        ({"kernel": None}, TypeError, "kernel must be an array or a tensor, got None"),
        ({"kernel": [[1.0]]}, TypeError, "kernel must be an array or a tensor, got a list of 1"),
        ({"kernel": np.zeros((20, 3))}, ValueError, r"kernel must be of shape \[I, 4\*H\]"),
        ({"bias": np.zeros(5)}, ValueError, r"bias must be of shape \[4\*H\] = \[20\], got \[5\]"),
        ({"bias": np.zeros(20, "int64")}, TypeError, "bias must be float16, .* got int64"),
        ({"bias": np.zeros(20, "float32")}, ValueError, "bias_ih|float64"),
        ({"recurrent_kernel": np.zeros((20, 5))}, ValueError, r"be of shape \[H, 4\*H\], got \[20"),
    ],
)
def test_wrong_parameters_of_haste(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"from_haste: .*({message})"):
        fastrnn.from_haste({**haste_state(4, 3, 5), **change})


def test_missing_parameters_of_haste() -> None:
    with pytest.raises(ValueError, match="source must have recurrent_kernel, got none"):
        fastrnn.from_haste({"kernel": random(3, 20), "bias": random(20)})
    with pytest.raises(TypeError, match="a layer of Haste or its state_dict, got 3"):
        fastrnn.from_haste(3)


# --- FlashRNN


def flash_loop(function: str, wx: Any, r: Any, b: Any) -> Tensor:
    """Runs Wx [B,T,G,N,D] with R [G,N,D,D] (unit, previous unit) and b; returns h [B,T,N*D]."""

    def elman(x: Any, h: Any) -> tuple[Any]:
        return (np.tanh(x[:, 0] + product(h)[0] + b[0]),)

    def lstm(x: Any, h: Any, c: Any) -> tuple[Any, Any]:
        i, f, z, o = (x[:, g] + product(h)[g] + b[g] for g in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
        return sigmoid(o) * np.tanh(c), c

    def gru(x: Any, h: Any) -> tuple[Any]:
        n_of_h, r_of_h, z_of_h = product(h)
        reset = sigmoid(x[:, 0] + r_of_h + b[1])
        update = sigmoid(x[:, 1] + z_of_h + b[2])
        new = np.tanh(x[:, 2] + b[3] + reset * (n_of_h + b[0]))
        return (update * h + (1 - update) * new,)

    def product(h: Any) -> Any:
        return np.einsum("gnij,bnj->gbni", r, h)

    zeros = np.zeros((wx.shape[0], *wx.shape[3:]))
    step = {"elman": elman, "lstm": lstm, "gru": gru}[function]
    states = (zeros, zeros) if function == "lstm" else (zeros,)
    return scan(step, states, wx.swapaxes(0, 1)).transpose(0, 1).flatten(2)


GATES = {"elman": (1, 1), "lstm": (4, 4), "gru": (3, 4)}


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("function", GATES)
def test_flashrnn(function: str, heads: int) -> None:
    gates, biases = GATES[function]
    linear = nn.Linear(5, gates * heads * 4, dtype=torch.float64)
    r, b, x = random(gates, heads, 4, 4), random(biases, heads, 4), random(2, 6, 5)
    module = fastrnn.from_flashrnn(linear.weight, r, b, function=function, input_bias=linear.bias)
    wx = linear(torch.from_numpy(x)).unflatten(-1, (gates, heads, 4)).detach().numpy()
    assert_same_in_double(run(module, x), flash_loop(function, wx, r, b))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"function": "slstm"}, ValueError, "must be one of .*'elman', got 'slstm'"),
        ({"function": 3}, ValueError, "function must be one of .*, got 3"),
        ({"recurrent_weight": np.zeros((2, 4, 8, 8))}, ValueError, r"\[4, N, D, D\], got \[2, 4"),
        ({"recurrent_weight": np.zeros((4, 64))}, ValueError, r"\[4, N, D, D\], got \[4, 64\]"),
        ({"bias": np.zeros((2, 4, 8))}, ValueError, r"bias must be of shape \[4, N, D\] = \[4, 2"),
        ({"input_weight": np.zeros((5, 64))}, ValueError, r"\[4\*N\*D, I\] = \[64, 64\], got"),
        ({"input_weight": "w"}, TypeError, "input_weight must be an array or a tensor, got 'w'"),
        ({"input_bias": np.zeros(3)}, ValueError, r"input_bias must be of shape \[4\*N\*D\] = \[6"),
    ],
)
def test_wrong_arguments_of_flashrnn(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {
        "input_weight": random(64, 5),
        "recurrent_weight": random(4, 2, 8, 8),
        "bias": random(4, 2, 8),
    }
    with pytest.raises(error, match=f"from_flashrnn: .*{message}"):
        fastrnn.from_flashrnn(**{**arguments, **change})


# --- Keras' arrays

CELLS = {"rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1, "lstm": 4, "gru": 3}


@given(
    cell=st.sampled_from(sorted(CELLS)),
    inputs=st.integers(1, 9),
    hidden=st.integers(1, 9),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    both=st.booleans(),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_arrays_survive_the_way_through_a_module(
    cell: str, inputs: int, hidden: int, layers: int, bias: bool, both: bool, dtype: str
) -> None:
    gates, directions = CELLS[cell], 2 if both else 1
    stack = []
    for width in [inputs] + [directions * hidden] * (layers - 1):
        shapes = [(width, gates * hidden), (hidden, gates * hidden)]
        if bias:
            shapes.append((2, 3 * hidden) if cell == "gru" else (gates * hidden,))
        stack.append([random(*shape).astype(dtype) for shape in shapes * directions])
    before = torch.get_rng_state()
    module = fastrnn.from_keras(stack, cell=cell, bidirectional=both)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.num_layers == layers
    again = fastrnn.to_keras_weights(module)
    for got, expected in zip(again, stack, strict=True):
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def lstm_arrays() -> list[Any]:
    return [random(3, 20), random(5, 20), random(20)]


def gru_arrays(*bias: int) -> list[Any]:
    return [random(3, 15), random(5, 15), random(*bias)]


def test_weights_are_copies() -> None:
    tensors = [torch.from_numpy(a) for a in lstm_arrays()]
    module = fastrnn.from_keras(tensors, cell="lstm")
    for tensor in tensors:
        tensor.fill_(7)
    assert not any((p == 7).any() for p in module.parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_dtype_and_byte_order() -> None:
    arrays = lstm_arrays()
    module = fastrnn.from_keras(arrays, cell="lstm", dtype=torch.float32)
    assert module.weight_ih_l0.dtype == torch.float32
    swapped = [a.astype(a.dtype.newbyteorder("S")) for a in arrays]
    for array in swapped:
        array.flags.writeable = False
    again = fastrnn.from_keras(swapped, cell="lstm", dtype=torch.float32)
    assert all(map(torch.equal, again.parameters(), module.parameters()))


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (3, {}, TypeError, "source must be a Keras layer or a list of arrays, got 3"),
        ([], {"cell": "lstm"}, ValueError, "must be a layer or a list with entries, got none"),
        (lstm_arrays(), {}, ValueError, "cell must be one of 'rnn_tanh', .* for arrays, got None"),
        (lstm_arrays(), {"cell": "LSTM"}, ValueError, "cell must be one of .*, got 'LSTM'"),
        (lstm_arrays(), {"cell": ["lstm"]}, ValueError, "cell must be one of .*, got a list of 1"),
        (lstm_arrays()[:1], {"cell": "lstm"}, ValueError, "source must have 2 or 3 arrays .*got 1"),
        (lstm_arrays(), {"cell": "lstm", "bidirectional": 1}, TypeError, "must be a bool, got 1"),
        (lstm_arrays(), {"cell": "lstm", "bidirectional": True}, ValueError, "4 or 6 arrays"),
        (lstm_arrays(), {"cell": "gru"}, ValueError, r"be of shape \[H, 3\*H\], got \[5, 20\]"),
        (
            [a.T for a in lstm_arrays()],
            {"cell": "lstm"},
            ValueError,
            r"recurrent_kernel must be of shape \[H, 4\*H\], got \[20, 5\]",
        ),
        (
            [*gru_arrays(15), *gru_arrays(2, 15)],
            {"cell": "gru", "bidirectional": True},
            ValueError,
            r"bias must be of shape \[3\*H\] = \[15\], got \[2, 15\]",
        ),
        (
            [random(3, 5), random(5, 5), random(2, 5)],
            {"cell": "rnn_tanh"},
            ValueError,
            r"bias must be of shape \[H\] = \[5\], got \[2, 5\]",
        ),
        (
            [lstm_arrays(), lstm_arrays()],
            {"cell": "lstm"},
            ValueError,
            r"layer 1 must have I and H = \[5, 5\], got \[3, 5\]",
        ),
        (
            [lstm_arrays(), [random(5, 20), random(5, 20)]],
            {"cell": "lstm"},
            ValueError,
            "all layers or none must have biases, see layer 1",
        ),
        (
            [random(3, 20), random(5, 20).astype("float32"), random(20)],
            {"cell": "lstm"},
            ValueError,
            r"all weights must be torch.float64 on cpu, got torch.float32",
        ),
        (
            [a.astype(object) for a in lstm_arrays()],
            {"cell": "lstm"},
            TypeError,
            "kernel must be float16, .*, got object",
        ),
    ],
)
def test_wrong_arrays_of_keras(
    source: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"from_keras: .*{message}"):
        fastrnn.from_keras(source, **options)


def test_modules_that_keras_does_not_have() -> None:
    with pytest.raises(NotImplementedError, match="must have proj_size 0, got 2"):
        fastrnn.to_keras_weights(fastrnn.LSTM(3, 4, proj_size=2))
    with pytest.raises(NotImplementedError, match="must be an RNN, LSTM or GRU, got a peephole_"):
        fastrnn.to_keras_weights(fastrnn.LSTM(3, 4, peephole=True))
    for option in ("residual", "learn_initial_state"):
        with pytest.raises(NotImplementedError, match=f"{option} of module must be False"):
            fastrnn.to_keras_weights(fastrnn.GRU(3, 4, **{option: True}))


def test_bfloat16_weights_become_float32_for_keras() -> None:
    layer = fastrnn.GRU(3, 4, dtype=torch.bfloat16)
    for own, wide in zip(
        fastrnn.to_keras_weights(layer)[0],
        fastrnn.to_keras_weights(copy.deepcopy(layer).float())[0],
        strict=True,
    ):
        assert own.dtype == wide.dtype == "float32"
        assert (own == wide).all()


# --- Reversed


@pytest.mark.parametrize("lengths", [None, [7, 2, 0]], ids=["full", "lengths"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_reversed_is_the_second_direction(batch_first: bool, lengths: list[int] | None) -> None:
    both = fastrnn.LSTM(3, 5, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    layer = fastrnn.LSTM(3, 5, batch_first=batch_first, dtype=torch.float64)
    names = dict(layer.named_parameters())
    layer.load_state_dict({name: getattr(both, f"{name}_reverse") for name in names})
    x = torch.randn(3, 7, 3).double() if batch_first else torch.randn(7, 3, 3).double()
    steps = None if lengths is None else torch.tensor(lengths)
    with torch.no_grad():
        output, (h, c) = fastrnn.Reversed(layer)(x, lengths=steps)
        expected, (h_n, c_n) = both(x, lengths=steps)
    assert_same_in_double([output, h, c], [expected[..., 5:], h_n[1:], c_n[1:]])


def test_reversed_accepts_unbatched_input() -> None:
    layer = fastrnn.GRU(3, 5, batch_first=True, dtype=torch.float64)
    x = torch.randn(7, 3).double()
    with torch.no_grad():
        output, _ = fastrnn.Reversed(layer)(x)
        assert_same_in_double(output, layer(x.flip(0))[0].flip(0))


def test_wrong_arguments_of_reversed() -> None:
    with pytest.raises(TypeError, match=r"layer must be a fastrnn\.RNN, LSTM or GRU, got Linear"):
        fastrnn.Reversed(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="must have one direction, got a bidirectional one"):
        fastrnn.Reversed(fastrnn.GRU(3, 4, bidirectional=True))
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        fastrnn.Reversed(fastrnn.GRU(3, 4))([1.0])
    layer, x = fastrnn.Reversed(fastrnn.GRU(3, 4)), torch.zeros(5, 2, 3)
    for lengths, error, message in (
        ([5, 2], TypeError, "lengths must be a tensor of integers, got list"),
        (torch.tensor([5.0, 2.0]), TypeError, r"tensor of integers, got torch\.float32"),
        (torch.tensor([5, 2, 1]), ValueError, r"lengths must have the shape \[2\], got \[3\]"),
        (torch.tensor([6, 2]), ValueError, "from 0 to the 5 steps of input, got 6"),
    ):
        with pytest.raises(error, match=message):
            layer(x, lengths=lengths)
    with pytest.raises(ValueError, match="lengths needs input with 3 dimensions, got 2"):
        layer(x[:, 0], lengths=torch.tensor([5]))


def test_small_unsigned_lengths_of_reversed() -> None:
    layer, x = fastrnn.Reversed(fastrnn.GRU(3, 4)), torch.randn(5, 3, 3)
    lengths = torch.tensor([5, 0, 2])
    expected = layer(x, lengths=lengths)
    for got, own in zip(layer(x, lengths=lengths.to(torch.uint8)), expected, strict=True):
        assert torch.equal(got, own)
