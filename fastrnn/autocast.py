"""Autocast: the types that a recurrent layer computes in, and the types of its results.

The CPU kernels accumulate half types in float32. Casting float32 weights down on every call would
cost time, memory and precision and gain nothing, so on the CPU tensors are not cast down and only
the results change their type. On other devices tensors are cast as for cuDNN's layers.

The types of the results are those of ``torch.nn``. A stands for autocast's type:

    RNN, LSTM, RNNCell        A
    GRU, GRUCell, LSTMCell    CPU: the wider of A and the state's type, so that a float32 state
                              stays float32; other devices: A
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn._torch_internals import is_any_autocast_enabled
from fastrnn.layer_call import LayerCall, Results


def acts_on(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of this tensor."""
    if not is_any_autocast_enabled():
        return False
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_call(call: LayerCall) -> LayerCall:
    """Casts the arguments of a layer or of one step. Autocast must be active for ``x``."""
    x, h0, c0, weights = call.x, call.h0, call.c0, call.weights
    if x.device.type != "cpu":
        dtype = torch.get_autocast_dtype(x.device.type)
    elif any(t is not None and t.dtype != x.dtype for t in (h0, c0, *weights.flat)):
        dtype = torch.float32
    else:
        return call
    return call._replace(
        x=_cast(x, dtype),
        h0=_cast(h0, dtype),
        c0=None if c0 is None else _cast(c0, dtype),
        weights=weights._replace(flat=[_cast(w, dtype) for w in weights.flat]),
    )


def cast_results(call: LayerCall, results: Results) -> Results:
    """Casts the results of a layer; ``call`` holds its arguments before `cast_call`.

    y and h_n have the same type, because for a single step they may be the same tensor.
    """
    x, h0, c0 = call.x, call.h0, call.c0
    y, h_n, c_n = results
    if not _is_cast(x):
        return results
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type)
    if device_type == "cpu":
        if call.spec.torch.keeps_state_dtype:
            dtype = torch.promote_types(dtype, h0.dtype)
        elif c0 is not None and h0.dim() == 2:
            dtype = torch.promote_types(dtype, c0.dtype)
    if y.dtype == dtype and (c_n is None or c_n.dtype == dtype):
        return results
    return y.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype)


def _is_cast(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts floating-point tensors except float64, as autocast does."""
    return t.to(dtype) if _is_cast(t) else t
