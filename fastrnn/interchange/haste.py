"""Layers of Haste (github.com/lmnt-com/haste), the package ``haste_pytorch``.

==== ========== ==========================================================================
LSTM i, g, f, o kernel [I,4H], recurrent_kernel [H,4H], bias [4H]
GRU  z, r, n    kernel [I,3H], recurrent_kernel [H,3H], bias [3H], recurrent_bias [3H]
==== ========== ==========================================================================

The GRU applies r after the recurrent product, as fastrnn's does.
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
from fastrnn.spec import DirectionWeights

_OWNER = "from_haste"

_LSTM = {"kernel", "recurrent_kernel", "bias"}
_GRU = {*_LSTM, "recurrent_bias"}

#: for each gate of Haste, its index in fastrnn
_GATES = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}


def from_haste(
    source: Any,
    *,
    batch_first: bool | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> RecurrentBase:
    """Returns a fastrnn module that computes what an LSTM or GRU of ``haste_pytorch`` computes.

        module = fastrnn.from_haste(haste_layer)
        module = fastrnn.from_haste(torch.load("lstm.pt"))        # its state_dict

    The weights are copied; ``b_hh`` of an LSTM is zero. DropConnect (``dropout``) is a method of
    training and is not taken over.

    Args:
        source: a layer of Haste, or its ``state_dict``.
        batch_first: of the module; by default that of the layer, False for a ``state_dict``.
        device, dtype: of the parameters; those of the weights by default.

    Raises:
        TypeError: an argument has another type.
        ValueError: a parameter is missing or has another shape.
        NotImplementedError: the layer has parameters of a kind that is not converted (layer
            normalization, IndRNN), or zoneout, which also changes inference.
    """
    is_mapping = isinstance(source, Mapping)
    if not is_mapping and not callable(getattr(source, "state_dict", None)):
        raise TypeError(
            f"{_OWNER}: source must be a layer of Haste or its state_dict, got {describe(source)}."
        )
    zoneout = 0 if is_mapping else getattr(source, "zoneout", 0)
    if zoneout:
        raise NotImplementedError(
            f"{_OWNER}: source must have zoneout=0, got {zoneout}; zoneout changes inference too."
        )
    if batch_first is None:
        batch_first = not is_mapping and bool(getattr(source, "batch_first", False))
    state = dict(source if is_mapping else source.state_dict())
    unknown = sorted(map(str, set(state) - _GRU))
    if unknown:
        raise NotImplementedError(
            f"{_OWNER}: source must have only {', '.join(sorted(_GRU))}, got also "
            f"{', '.join(unknown)}."
        )
    missing = sorted(_LSTM - set(state))
    if missing:
        raise ValueError(f"{_OWNER}: source must have {', '.join(missing)}, got none.")
    cell = "gru" if "recurrent_bias" in state else "lstm"
    weights = {name: as_tensor(_OWNER, name, value) for name, value in state.items()}
    order = _GATES[cell]
    gates = len(order)
    hidden = check_recurrent(_OWNER, "recurrent_kernel", weights["recurrent_kernel"], gates)
    matrix, vector = kernel_shapes(gates)
    kernel = weights["kernel"]
    inputs = kernel.shape[0] if kernel.dim() else 0
    check_shape(_OWNER, "kernel", kernel, (inputs, gates * hidden), matrix)
    for name in ("bias", "recurrent_bias"):
        if name in weights:
            check_shape(_OWNER, name, weights[name], (gates * hidden,), vector)
    bias = weights["bias"]
    own = DirectionWeights(
        from_order(kernel.t(), order),
        from_order(weights["recurrent_kernel"].t(), order),
        from_order(bias, order),
        from_order(weights.get("recurrent_bias", torch.zeros_like(bias)), order),
    )
    return build(_OWNER, cell, [[own]], batch_first=batch_first, device=device, dtype=dtype)
