"""`fastrnn.from_keras` and `to_keras_weights` against Keras, with its torch backend."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from tolerance import Change, assert_agrees
from torch import Tensor, nn
from torch.func import functional_call

import fastrnn

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("KERAS_HOME", "/nonexistent")  # reads no settings of the user
keras = pytest.importorskip("keras")

SIZES = [(1, 1), (3, 5), (17, 33)]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str, inputs: int, hidden: int, *, both: bool = False, **options: Any) -> Any:
    """Returns a built layer that returns all steps and states, with random weights."""
    layer = getattr(keras.layers, name)(
        hidden, return_sequences=True, return_state=True, dtype="float32", **options
    )
    if both:
        layer = keras.layers.Bidirectional(layer, dtype="float32")
    layer.build((None, None, inputs))
    layer.set_weights([(torch.randn(w.shape) / 2).numpy() for w in layer.get_weights()])
    return layer


def results(module: Any, x: Tensor) -> list[Tensor]:
    """Returns output and final states in the order and layout of Keras."""
    with torch.no_grad():
        output, states = module(x)
    states = states if isinstance(states, tuple) else (states,)
    return [output, *(state[d] for d in range(states[0].shape[0]) for state in states)]


def assert_same(
    theirs: Any, module: nn.Module, x: Tensor, select: Any = lambda r: r, **options: Any
) -> None:
    """Asserts that Keras agrees with the module in float64 about as well as the module itself.

    Args:
        theirs: results of Keras.
        module: the layer from Keras.
        x: its input.
        select: picks the same results from `results`.
        options: further arguments of the call.
    """
    double = copy.deepcopy(module).double()

    def exact(change: Change) -> Any:
        weights = {name: change(p) for name, p in module.named_parameters()}
        return select(results(lambda x: functional_call(double, weights, (x,), options), change(x)))

    assert_agrees(theirs, select(results(lambda x: module(x, **options), x)), exact)


def detached(tensors: Any) -> list[Tensor]:
    return [t.detach() for t in tensors]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("name", ["SimpleRNN", "GRU", "LSTM"])
def test_layer_computes_what_keras_computes(
    name: str, both: bool, bias: bool, sizes: tuple[int, int]
) -> None:
    layer = make(name, *sizes, both=both, use_bias=bias)
    module = fastrnn.from_keras(layer)
    assert (module.bias, module.bidirectional, module.batch_first) == (bias, both, True)
    x = torch.randn(2, 7, sizes[0])
    assert_same(detached(layer(x)), module, x)


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
def test_activation_of_a_simple_rnn(activation: str) -> None:
    layer = make("SimpleRNN", 3, 4, activation=activation)
    x = torch.randn(2, 5, 3)
    module = fastrnn.from_keras(layer)
    assert module.nonlinearity == activation
    assert_same(detached(layer(x)), module, x)


@pytest.mark.parametrize("both", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("name", ["SimpleRNN", "GRU", "LSTM"])
def test_layers_become_a_stack(name: str, both: bool) -> None:
    layers = [make(name, 3, 5, both=both), make(name, 10 if both else 5, 5, both=both)]
    x = torch.randn(2, 7, 3)
    module = fastrnn.from_keras(layers)
    assert module.num_layers == 2
    assert_same(detached(layers[1](layers[0](x)[0]))[0], module, x, lambda r: r[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", ["SimpleRNN", "GRU", "LSTM"])
def test_weights_go_back_to_keras(name: str, bias: bool) -> None:
    cls = {"SimpleRNN": "RNN"}.get(name, name)
    module = getattr(fastrnn, cls)(3, 5, 2, bias=bias, batch_first=True, bidirectional=True)
    layers = [make(name, width, 5, both=True, use_bias=bias) for width in (3, 10)]
    for layer, weights in zip(layers, fastrnn.to_keras_weights(module), strict=True):
        layer.set_weights(weights)
    x = torch.randn(2, 7, 3)
    assert_same(detached(layers[1](layers[0](x)[0]))[0], module, x, lambda r: r[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GRU", {"reset_after": False}),
        ("GRU", {"reset_after": False, "recurrent_activation": "hard_sigmoid"}),
        ("GRU", {"recurrent_activation": "hard_sigmoid"}),
        ("LSTM", {"recurrent_activation": "hard_sigmoid"}),
    ],
    ids=str,
)
def test_variants_of_the_cells(name: str, options: dict[str, Any], bias: bool) -> None:
    layers = [make(name, width, 5, both=True, use_bias=bias, **options) for width in (3, 10)]
    x = 2 * torch.randn(2, 7, 3)
    module = fastrnn.from_keras(layers)
    before = detached(layers[1](layers[0](x)[0]))[0]
    assert_same(before, module, x, lambda r: r[0])
    for layer in layers:
        layer.set_weights([0 * w for w in layer.get_weights()])
    for layer, weights in zip(layers, fastrnn.to_keras_weights(module), strict=True):
        layer.set_weights(weights)
    after = detached(layers[1](layers[0](x)[0]))[0]
    torch.testing.assert_close(after, before)
    if bias and name == "GRU" and not options.get("reset_after", True):
        arrays = layers[0].get_weights()
        by_arrays = fastrnn.from_keras(arrays, cell="gru", bidirectional=True)
        assert "reset_after=False" in repr(by_arrays)
    with pytest.raises(ValueError, match="stacked layers must have the same options"):
        fastrnn.from_keras([layers[0], make(name, 10, 5, both=True, use_bias=bias)])


def test_masked_steps_are_lengths() -> None:
    layer = make("LSTM", 3, 5, both=True, zero_output_for_mask=True)
    x, lengths = torch.randn(3, 7, 3), torch.tensor([7, 2, 4])
    mask = torch.arange(7) < lengths.unsqueeze(1)
    module = fastrnn.from_keras(layer)
    theirs = detached(layer(x, mask=mask))[0]
    assert_same(theirs, module, x, lambda r: r[0], lengths=lengths)


def test_backwards_layer_by_its_arrays() -> None:
    """Follows the advice of the error for ``go_backwards=True``."""
    layer = make("GRU", 3, 5, go_backwards=True)
    with pytest.raises(NotImplementedError, match=r"GRU 'gru.*' must have go_backwards=False"):
        fastrnn.from_keras(layer)
    module = fastrnn.from_keras(layer.get_weights(), cell="gru")
    x = torch.randn(2, 7, 3)
    assert_same(detached(layer(x)), module, x.flip(1))


def test_summed_directions_by_their_arrays() -> None:
    """Follows the advice of the error for another ``merge_mode``."""
    layer = keras.layers.Bidirectional(
        keras.layers.LSTM(5, return_sequences=True, dtype="float32"),
        merge_mode="sum",
        dtype="float32",
    )
    layer.build((None, None, 3))
    with pytest.raises(NotImplementedError, match="must have merge_mode='concat', got 'sum'"):
        fastrnn.from_keras(layer)
    module = fastrnn.from_keras(layer.get_weights(), cell="lstm", bidirectional=True)
    x = torch.randn(2, 7, 3)
    assert_same(layer(x).detach(), module, x, lambda r: sum(r[0].chunk(2, -1)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("GRU", {"activation": "relu"}, "activation of GRU 'gru.*' must be 'tanh', got 'relu'"),
        (
            "LSTM",
            {"recurrent_activation": "relu"},
            "must be 'sigmoid' or 'hard_sigmoid', got 'relu'",
        ),
        ("LSTM", {"activation": None}, "activation of LSTM 'lstm.*' must be 'tanh', got 'linear'"),
        ("SimpleRNN", {"activation": "softsign"}, "must be 'tanh', 'relu', 'sigmoid', got 'softs"),
    ],
)
def test_other_recurrences_are_rejected(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        fastrnn.from_keras(make(name, 3, 4, **options))


def test_layers_without_weights_and_other_layers_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"LSTM 'lstm.*' must have weights, got none\. Build"):
        fastrnn.from_keras(keras.layers.LSTM(3))
    with pytest.raises(TypeError, match="one of Keras' SimpleRNN, GRU, LSTM, Bidirectional, got D"):
        fastrnn.from_keras(keras.layers.Dense(3))
    with pytest.raises(TypeError, match="cell and bidirectional must be omitted for a layer"):
        fastrnn.from_keras(make("LSTM", 3, 4), cell="lstm")
    with pytest.raises(ValueError, match=r"must have one cell, got \['gru', 'lstm'\]"):
        fastrnn.from_keras([make("LSTM", 3, 4), make("GRU", 4, 4)])
