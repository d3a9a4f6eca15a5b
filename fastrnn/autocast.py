"""Autocast: the types that a recurrent layer computes in, and the types of its results.

The CPU's kernels add in float32 whatever the tensors hold. Casting float32 weights down on every
call would cost time, memory and precision and gain nothing, so on the CPU tensors stay as they are
and only the results get another type. On other devices tensors are cast as cuDNN's layers have it.

The types of the results are those of ``torch.nn``, with A for autocast's type:

    RNN, LSTM, RNNCell        A
    GRU, GRUCell, LSTMCell    CPU: the wider of A and the state's type, so that a float32 state
                              stays float32; other devices: A
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.spec import CellSpec


def acts_on(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of this tensor."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class Call(NamedTuple):
    """The arguments of a layer under autocast, and the types that its results get."""

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: Sequence[Tensor]
    h_dtype: torch.dtype
    c_dtype: torch.dtype

    def results(
        self, y: Tensor, h_n: Tensor, c_n: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The results in their types."""
        y, h_n = y.to(self.h_dtype), h_n.to(self.h_dtype)
        return y, h_n, None if c_n is None else c_n.to(self.c_dtype)


def call(
    spec: CellSpec, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor]
) -> Call:
    """What a layer, or one step of it (h0 [B,R]), computes with while autocast acts on ``x``."""
    if not _is_cast(x):
        return Call(x, h0, c0, weights, x.dtype, x.dtype)
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.device.type != "cpu":
        return Call(
            _cast(x, dtype),
            _cast(h0, dtype),
            None if c0 is None else _cast(c0, dtype),
            [_cast(w, dtype) for w in weights],
            dtype,
            dtype,
        )
    h_dtype = c_dtype = dtype
    if spec.name == "gru":
        h_dtype = torch.promote_types(dtype, h0.dtype)
    elif c0 is not None and h0.dim() == 2:
        h_dtype = c_dtype = torch.promote_types(dtype, c0.dtype)
    if any(t is not None and t.dtype != x.dtype for t in (h0, c0, *weights)):
        wide = torch.float32
        x, h0 = _cast(x, wide), _cast(h0, wide)
        c0 = None if c0 is None else _cast(c0, wide)
        weights = [_cast(w, wide) for w in weights]
    return Call(x, h0, c0, weights, h_dtype, c_dtype)


def _is_cast(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts what autocast would cast: floating-point tensors, but never float64."""
    return t.to(dtype) if _is_cast(t) else t
