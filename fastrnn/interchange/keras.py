"""Layers of Keras. Keras itself is never imported: its layers describe themselves.

========== ============ ===========================================================
SimpleRNN               kernel [I,H], recurrent_kernel [H,H], bias [H]
LSTM       i, f, c, o   kernel [I,4H], recurrent_kernel [H,4H], bias [4H]
GRU        z, r, h      kernel [I,3H], recurrent_kernel [H,3H], bias [2,3H]: of x, of h;
                        [3H] with reset_after=False
========== ============ ===========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.checks import describe
from fastrnn.interchange.weights import (
    as_tensor,
    build,
    check_recurrent,
    check_shape,
    from_order,
    kernel_shapes,
    to_order,
)
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.cell_options import GATE_ACTIVATIONS
from fastrnn.modules.rnn import LAYERS
from fastrnn.spec import BY_MODE, DirectionWeights, without_variant

_OWNER = "from_keras"

#: for each gate of Keras, its index in fastrnn
_GATES: dict[str, tuple[int, ...]] = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}

_ELMAN = {"tanh": "rnn_tanh", "relu": "rnn_relu", "sigmoid": "rnn_sigmoid"}

_CLASSES = ("SimpleRNN", "GRU", "LSTM", "Bidirectional")


class _Layer(NamedTuple):
    """One layer: its cell, the arrays of each direction, and arguments of the fastrnn module."""

    cell: str
    directions: list[list[Any]]
    options: dict[str, Any]


def from_keras(
    source: Any,
    *,
    cell: str | None = None,
    bidirectional: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> RecurrentBase:
    """Returns a fastrnn module that computes what recurrent layers of Keras compute.

        module = fastrnn.from_keras(keras_layer)
        module = fastrnn.from_keras([first, second])                     # num_layers=2
        module = fastrnn.from_keras(keras_layer.get_weights(), cell="lstm")

    The module has ``batch_first=True``, as Keras has. Its output is the one of Keras with
    ``return_sequences=True``, and its final states are those of ``return_state=True``; it always
    returns both. The weights are copied. ``b_hh`` is zero where Keras has only one bias.

    Dropout, regularizers, ``stateful`` and masks are not taken over: they belong to training and
    to the call. Masked steps at the end of a row are the argument ``lengths`` of the module.

    Args:
        source: a SimpleRNN, GRU, LSTM or Bidirectional layer that has been built, with any backend
            of Keras; or the list of arrays that its ``get_weights()`` returns, together with
            ``cell``; or a list of such layers or lists, which become stacked layers. The layers of
            a stack have the same cell and H.
        cell: for arrays: "lstm", "gru", "rnn_tanh", "rnn_relu" or "rnn_sigmoid". The arrays of a
            GRU are those of ``reset_after=True``, unless their bias is [3*H].
        bidirectional: for arrays: whether the arrays of a backward direction follow.
        device, dtype: of the parameters; those of the arrays by default.

    Raises:
        TypeError: an argument has another type.
        ValueError: a shape is wrong, or the layer has no weights yet.
        NotImplementedError: the layer computes something that fastrnn does not: other activations,
            ``go_backwards=True`` or another ``merge_mode`` than "concat".
    """
    is_list = isinstance(source, (list, tuple))
    if is_list and len(source) == 0:
        raise ValueError(f"{_OWNER}: source must be a layer or a list with entries, got none.")
    is_stack = is_list and (_is_layer(source[0]) or isinstance(source[0], (list, tuple)))
    layers = [_read(part, cell, bidirectional) for part in (source if is_stack else [source])]
    cells = {layer.cell for layer in layers}
    if len(cells) > 1:
        raise ValueError(f"{_OWNER}: stacked layers must have one cell, got {sorted(cells)}.")
    options = layers[0].options
    for layer in layers:
        if layer.options != options:
            raise ValueError(
                f"{_OWNER}: stacked layers must have the same options, got {options} and "
                f"{layer.options}."
            )
    has_two_biases = layers[0].cell == "gru" and options.get("reset_after", True)
    weights = [
        [_convert(layer.cell, arrays, has_two_biases) for arrays in layer.directions]
        for layer in layers
    ]
    return build(
        _OWNER,
        layers[0].cell,
        weights,
        batch_first=True,
        device=device,
        dtype=dtype,
        **options,
    )


def to_keras_weights(module: RecurrentBase) -> list[list[Any]]:
    """Returns numpy arrays for ``set_weights`` of Keras, one list per stacked layer.

        for keras_layer, weights in zip(keras_layers, fastrnn.to_keras_weights(module)):
            keras_layer.set_weights(weights)

    The layer of Keras needs the ``reset_after`` of the module, and its ``gate_activation`` as
    ``recurrent_activation``. The list of a bidirectional layer has the arrays of both directions,
    as Keras' Bidirectional expects. bfloat16, which numpy does not have, becomes float32.

    Raises:
        TypeError: ``module`` is not a fastrnn layer.
        NotImplementedError: Keras does not have the cell; the layer has a projection, layer
            normalisation, zoneout, heads, a clipped cell state, residual connections or a learned
            initial state, which Keras does not have.
    """
    if not isinstance(module, RecurrentBase):
        raise TypeError(
            "to_keras_weights: module must be a fastrnn.RNN, LSTM or GRU, "
            f"got {type(module).__name__}."
        )
    spec = BY_MODE[module.mode]
    cell = spec.name if spec.parameters else without_variant(spec.name)
    if cell not in LAYERS:
        raise NotImplementedError(
            f"to_keras_weights: module must be an RNN, LSTM or GRU, got a {cell}."
        )
    if module.proj_size:
        raise NotImplementedError(
            f"to_keras_weights: module must have proj_size 0, got {module.proj_size}."
        )
    options = module._cell_options
    if options is not None and (options.heads > 1 or options.cell_clip is not None):
        raise NotImplementedError(
            "to_keras_weights: module must have heads=1 and cell_clip=None, got "
            f"heads={options.heads} and cell_clip={options.cell_clip}."
        )
    has_two_biases = cell == "gru" and (options is None or options.reset_after)
    for option, value, expected in (
        ("layer_norm", module.layer_norm, False),
        ("zoneout", module.zoneout, 0),
        ("coupled_gates", options is not None and options.coupled_gates, False),
        ("residual", module.residual, False),
        ("learn_initial_state", module._learns_initial_state, False),
    ):
        if value:
            raise NotImplementedError(
                f"to_keras_weights: {option} of module must be {expected}, got {value}."
            )
    order = _GATES.get(cell, (0,))
    per_direction = []
    for own in module._torch_weights().directions():
        assert own.w_hh is not None
        arrays = [to_order(own.w_ih, order).t(), to_order(own.w_hh, order).t()]
        if own.b_ih is not None and own.b_hh is not None:
            b_ih, b_hh = to_order(own.b_ih, order), to_order(own.b_hh, order)
            arrays.append(torch.stack((b_ih, b_hh)) if has_two_biases else b_ih + b_hh)
        if own.w_ih.dtype == torch.bfloat16:
            arrays = [a.float() for a in arrays]
        per_direction.append([a.detach().cpu().contiguous().numpy() for a in arrays])
    directions = 2 if module.bidirectional else 1
    return [
        list(chain.from_iterable(per_direction[first : first + directions]))
        for first in range(0, len(per_direction), directions)
    ]


def _is_layer(value: Any) -> bool:
    return callable(getattr(value, "get_config", None)) and callable(
        getattr(value, "get_weights", None)
    )


def _read(part: Any, cell: str | None, bidirectional: bool) -> _Layer:
    """Returns the cell and the arrays of a layer, or of a list of arrays."""
    if _is_layer(part):
        if cell is not None or bidirectional:
            raise TypeError(
                f"{_OWNER}: cell and bidirectional must be omitted for a layer, which knows both."
            )
        return _read_layer(part)
    if not isinstance(part, (list, tuple)):
        raise TypeError(
            f"{_OWNER}: source must be a Keras layer or a list of arrays, got {describe(part)}."
        )
    if not isinstance(cell, str) or cell not in LAYERS:
        raise ValueError(
            f"{_OWNER}: cell must be one of {', '.join(map(repr, LAYERS))} for arrays, "
            f"got {describe(cell)}."
        )
    if not isinstance(bidirectional, bool):
        raise TypeError(f"{_OWNER}: bidirectional must be a bool, got {describe(bidirectional)}.")
    directions = 2 if bidirectional else 1
    if len(part) not in (2 * directions, 3 * directions):
        raise ValueError(
            f"{_OWNER}: source must have {2 * directions} or {3 * directions} arrays (kernel, "
            f"recurrent_kernel and, unless use_bias=False, bias"
            f"{', of each direction' if bidirectional else ''}), got {len(part)}."
        )
    each = len(part) // directions
    arrays = [list(part[k * each : (k + 1) * each]) for k in range(directions)]
    has_one_bias = each == 3 and len(getattr(arrays[0][2], "shape", ())) == 1
    return _Layer(cell, arrays, {"reset_after": False} if cell == "gru" and has_one_bias else {})


def _read_layer(layer: Any) -> _Layer:
    name = type(layer).__name__
    if name != "Bidirectional":
        cell = _cell_of(layer)
        if layer.get_config().get("go_backwards"):
            raise NotImplementedError(
                f"{_OWNER}: {_called(layer)} must have go_backwards=False, got True. Convert its "
                f"get_weights() with cell={cell!r} and call the module with input.flip(1)."
            )
        return _Layer(cell, [_weights_of(layer)], _options_of(layer))
    forward, backward = layer.forward_layer, layer.backward_layer
    cell, other = _cell_of(forward), _cell_of(backward)
    options = _options_of(forward)
    if cell != other or options != _options_of(backward):
        raise NotImplementedError(
            f"{_OWNER}: both directions of {_called(layer)} must have one cell, "
            f"got {cell} and {other} with {options} and {_options_of(backward)}."
        )
    backwards = [bool(part.get_config().get("go_backwards")) for part in (forward, backward)]
    if backwards != [False, True]:
        raise NotImplementedError(
            f"{_OWNER}: {_called(layer)} must have go_backwards=False and True in its directions, "
            f"got {backwards[0]} and {backwards[1]}."
        )
    mode = layer.get_config().get("merge_mode")
    if mode != "concat":
        raise NotImplementedError(
            f"{_OWNER}: {_called(layer)} must have merge_mode='concat', got {mode!r}. Convert its "
            f"get_weights() with cell={cell!r} and bidirectional=True, and merge the halves of the "
            "output."
        )
    return _Layer(cell, [_weights_of(forward), _weights_of(backward)], options)


def _options_of(layer: Any) -> dict[str, Any]:
    """Returns the arguments of a fastrnn module that select the variant of the cell."""
    options: dict[str, Any] = {}
    config = layer.get_config()
    if type(layer).__name__ == "GRU" and not config.get("reset_after"):
        options["reset_after"] = False
    if config.get("recurrent_activation") == "hard_sigmoid":
        options["gate_activation"] = "hard_sigmoid"
    return options


def _called(layer: Any) -> str:
    return f"{type(layer).__name__} {getattr(layer, 'name', '')!r}"


def _weights_of(layer: Any) -> list[Any]:
    weights = list(layer.get_weights())
    if not weights:
        raise ValueError(
            f"{_OWNER}: {_called(layer)} must have weights, got none. Build the layer or call it."
        )
    return weights


def _cell_of(layer: Any) -> str:
    """Returns the cell of a layer, whose other options must be those of fastrnn."""
    name = type(layer).__name__
    if name not in _CLASSES[:3]:
        raise TypeError(
            f"{_OWNER}: source must be one of Keras' {', '.join(_CLASSES)}, got {name}."
        )
    config = layer.get_config()
    activation = config.get("activation")
    if name == "SimpleRNN":
        if activation not in _ELMAN:
            _raise_activation(layer, "activation", ", ".join(map(repr, _ELMAN)), activation)
        return _ELMAN[activation]
    if activation != "tanh":
        _raise_activation(layer, "activation", "'tanh'", activation)
    found = config.get("recurrent_activation")
    if found not in GATE_ACTIVATIONS:
        expected = " or ".join(map(repr, GATE_ACTIVATIONS))
        _raise_activation(layer, "recurrent_activation", expected, found)
    return name.lower()


def _raise_activation(layer: Any, argument: str, expected: str, actual: Any) -> None:
    raise NotImplementedError(
        f"{_OWNER}: {argument} of {_called(layer)} must be {expected}, got {describe(actual)}."
    )


def _convert(cell: str, arrays: Sequence[Any], has_two_biases: bool) -> DirectionWeights:
    """Returns one direction's kernel, recurrent_kernel and bias as fastrnn's weights."""
    names = ("kernel", "recurrent_kernel", "bias")
    tensors = [as_tensor(_OWNER, *pair) for pair in zip(names, arrays, strict=False)]
    order = _GATES.get(cell, (0,))
    gates = len(order)
    kernel, recurrent = tensors[:2]
    hidden = check_recurrent(_OWNER, "recurrent_kernel", recurrent, gates)
    matrix, vector = kernel_shapes(gates)
    inputs = kernel.shape[0] if kernel.dim() else 0
    check_shape(_OWNER, "kernel", kernel, (inputs, gates * hidden), matrix)
    w_ih, w_hh = from_order(kernel.t(), order), from_order(recurrent.t(), order)
    if len(tensors) == 2:
        return DirectionWeights(w_ih, w_hh)
    biases = _biases(has_two_biases, tensors[2], gates * hidden, vector)
    return DirectionWeights(w_ih, w_hh, *(from_order(bias, order) for bias in biases))


def _biases(has_two_biases: bool, bias: Tensor, rows: int, meaning: str) -> tuple[Tensor, Tensor]:
    """Returns the biases of x and of h."""
    if not has_two_biases:
        check_shape(_OWNER, "bias", bias, (rows,), meaning)
        return bias, torch.zeros_like(bias)
    check_shape(_OWNER, "bias", bias, (2, rows), "[2, 3*H]")
    return bias[0], bias[1]
