"""Layers of Haste (github.com/lmnt-com/haste), the package ``haste_pytorch``.

============= ========== =======================================================================
LSTM          i, g, f, o kernel [I,4H], recurrent_kernel [H,4H], bias [4H]
GRU           z, r, n    kernel [I,3H], recurrent_kernel [H,3H], bias [3H], recurrent_bias [3H]
LayerNormLSTM i, g, f, o those of LSTM, gamma [2,4H] of x and of h, gamma_h and beta_h [H] of c
LayerNormGRU  z, r, n    those of GRU, gamma [2,3H] of x and of h
IndRNN                   kernel [I,H], recurrent_scale [H], bias [H]
============= ========== =======================================================================

The GRU applies r after the recurrent product, as fastrnn's does. Layer normalisation has fastrnn's
form: each product is normalised over all gates before biases are added, c' only where it becomes
h'. Zoneout mixes h alone, c of an LSTM is never kept; DropConnect is fastrnn's ``weight_dropout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastrnn.checks import describe
from fastrnn.interchange.weights import (
    as_tensor,
    build,
    check_recurrent,
    check_shape,
    from_order,
    kernel_shapes,
)
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.more_cells import IndRNN
from fastrnn.spec import DirectionWeights

_OWNER = "from_haste"

#: for each gate of Haste, its index in fastrnn
_GATES = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}


def from_haste(
    source: Any,
    *,
    zoneout: float | None = None,
    weight_dropout: float | None = None,
    batch_first: bool | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> RecurrentBase:
    """Returns a fastrnn module that computes what a layer of ``haste_pytorch`` computes.

        module = fastrnn.from_haste(haste_layer)
        module = fastrnn.from_haste(torch.load("lstm.pt"), zoneout=0.1)   # its state_dict

    The layer is an LSTM, GRU, LayerNormLSTM, LayerNormGRU or IndRNN (tanh). The weights are copied;
    ``b_hh`` of an LSTM is zero. Zoneout of Haste becomes ``zoneout`` of h, DropConnect
    (``dropout``) becomes ``weight_dropout``, and the module is in training mode if the layer is.

    Args:
        source: a layer of Haste, or its ``state_dict``.
        zoneout, weight_dropout: probabilities; by default those of the layer, 0 for a
            ``state_dict``, which has none.
        batch_first: of the module; by default that of the layer, False for a ``state_dict``.
        device, dtype: of the parameters; those of the weights by default.

    Raises:
        TypeError: an argument has another type.
        ValueError: a parameter is missing or has another shape, or a probability is wrong.
        NotImplementedError: the layer has parameters of another kind (LayerNormIndRNN).
    """
    is_mapping = isinstance(source, Mapping)
    if not is_mapping and not callable(getattr(source, "state_dict", None)):
        raise TypeError(
            f"{_OWNER}: source must be a layer of Haste or its state_dict, got {describe(source)}."
        )
    layer = None if is_mapping else source
    if zoneout is None:
        zoneout = getattr(layer, "zoneout", 0.0)
    if weight_dropout is None:
        weight_dropout = getattr(layer, "dropout", 0.0)
    if batch_first is None:
        batch_first = bool(getattr(layer, "batch_first", False))
    state = dict(source if is_mapping else source.state_dict())
    is_training = bool(getattr(layer, "training", True))
    if "recurrent_scale" in state:
        options = {"batch_first": batch_first, "zoneout": zoneout, "weight_dropout": weight_dropout}
        return _indrnn(state, options, device, dtype).train(is_training)
    cell = "gru" if "recurrent_bias" in state else "lstm"
    has_norm = not {"gamma", "gamma_h", "beta_h"}.isdisjoint(state)
    expected = {"kernel", "recurrent_kernel", "bias"}
    if cell == "gru":
        expected |= {"recurrent_bias"}
    if has_norm:
        expected |= {"gamma"} if cell == "gru" else {"gamma", "gamma_h", "beta_h"}
    _check_names(state, expected)
    weights = {name: as_tensor(_OWNER, name, value) for name, value in state.items()}
    order = _GATES[cell]
    gates = len(order)
    hidden = check_recurrent(_OWNER, "recurrent_kernel", weights["recurrent_kernel"], gates)
    matrix, vector = kernel_shapes(gates)
    kernel = weights["kernel"]
    inputs = kernel.shape[0] if kernel.dim() else 0
    check_shape(_OWNER, "kernel", kernel, (inputs, gates * hidden), matrix)
    for name, shape, meaning in (
        ("bias", (gates * hidden,), vector),
        ("recurrent_bias", (gates * hidden,), vector),
        ("gamma", (2, gates * hidden), f"[2, {gates}*H]"),
        ("gamma_h", (hidden,), "[H]"),
        ("beta_h", (hidden,), "[H]"),
    ):
        if name in weights:
            check_shape(_OWNER, name, weights[name], shape, meaning)
    bias = weights["bias"]
    own = DirectionWeights(
        from_order(kernel.t(), order),
        from_order(weights["recurrent_kernel"].t(), order),
        from_order(bias, order),
        from_order(weights.get("recurrent_bias", torch.zeros_like(bias)), order),
    )
    if has_norm:
        gain_ih, gain_hh = (from_order(gain, order) for gain in weights["gamma"])
        own = own._replace(gain_ih=gain_ih, gain_hh=gain_hh)
        own = own._replace(gain_c=weights.get("gamma_h"), bias_c=weights.get("beta_h"))
    module = build(
        _OWNER,
        cell,
        [[own]],
        batch_first=batch_first,
        device=device,
        dtype=dtype,
        zoneout=(0.0, zoneout) if cell == "lstm" else zoneout,
        weight_dropout=weight_dropout,
    )
    return module.train(is_training)


def _indrnn(
    state: Mapping[Any, Any], options: dict[str, Any], device: Any, dtype: torch.dtype | None
) -> IndRNN:
    """Returns the module for an IndRNN of Haste, whose activation is tanh."""
    _check_names(state, {"kernel", "recurrent_scale", "bias"})
    kernel, scale, bias = (
        as_tensor(_OWNER, name, state[name]) for name in ("kernel", "recurrent_scale", "bias")
    )
    inputs, hidden = (kernel.shape[0] if kernel.dim() else 0), scale.numel()
    check_shape(_OWNER, "kernel", kernel, (inputs, hidden), "[I, H]")
    check_shape(_OWNER, "recurrent_scale", scale, (hidden,), "[H]")
    check_shape(_OWNER, "bias", bias, (hidden,), "[H]")
    module = IndRNN(
        inputs,
        hidden,
        nonlinearity="tanh",
        device="meta",  # draws no random numbers
        dtype=kernel.dtype if dtype is None else dtype,
        **options,
    )
    module.to_empty(device=kernel.device if device is None else device)
    module.load_state_dict({"weight_ih_l0": kernel.t(), "bias_ih_l0": bias, "u_l0": scale})
    return module


def _check_names(state: Mapping[Any, Any], expected: set[str]) -> None:
    """Raises unless a state_dict has exactly the parameters of a layer."""
    unknown = sorted(map(str, set(state) - expected))
    if unknown:
        raise NotImplementedError(
            f"{_OWNER}: source must have only {', '.join(sorted(expected))}, got also "
            f"{', '.join(unknown)}."
        )
    missing = sorted(expected - set(state))
    if missing:
        raise ValueError(f"{_OWNER}: source must have {', '.join(missing)}, got none.")
