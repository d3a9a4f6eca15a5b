"""Autocast: the types that a recurrent layer computes in, and the types of its results.

The CPU kernels accumulate half types in float32. Tensors on the CPU are cast down to bfloat16 only
where that makes the call faster: an instruction multiplies pairs of bfloat16, and the call has
enough rows to pay for the copies of the weights (`_C.casts_to_bfloat16`). Otherwise, and while a
graph is captured or compiled, only the results change their type. On other devices tensors are cast
as for cuDNN's layers.

The types of the results are those of ``torch.nn``. A stands for autocast's type:

    RNN, LSTM, RNNCell        A
    GRU, GRUCell, LSTMCell    CPU: the wider of A and the state's type, so that a float32 state
                              stays float32; other devices: A
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import _C
from fastrnn._torch_internals import are_transforms_active, is_any_autocast_enabled
from fastrnn.layer_call import LayerCall, Results
from fastrnn.spec import PROJECTION
from fastrnn.tracing import is_capturing

_CAST_TO_BFLOAT16 = {torch.float32, torch.bfloat16}


def acts_on(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of this tensor."""
    if not is_any_autocast_enabled():
        return False
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_call(call: LayerCall) -> LayerCall:
    """Casts the arguments of a layer or of one step. Autocast must be active for ``x``."""
    x, h0, c0, weights = call.x, call.h0, call.c0, call.weights
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.device.type == "cpu":
        dtypes = {t.dtype for t in (x, h0, c0, *weights.flat) if t is not None}
        is_bfloat16 = dtype == torch.bfloat16 and dtypes <= _CAST_TO_BFLOAT16
        if not (is_bfloat16 and _is_faster_in_bfloat16(call)):
            dtype = torch.float32
        if len(dtypes) == 1 and (dtype == torch.float32 or dtype in dtypes):
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


def _is_faster_in_bfloat16(call: LayerCall) -> bool:
    """Whether bfloat16 copies of tensors on the CPU make the call faster."""
    if torch.compiler.is_compiling() or is_capturing() or are_transforms_active():
        return False
    if call.options.weight_format != 0 or call.spec.defined:
        return False
    x, h0, flat = call.x, call.h0, call.weights.flat
    batch = h0.shape[-2]
    rows = x.shape[:-1].numel()
    hidden = flat[0].shape[0] // call.spec.gates
    proj = h0.shape[-1] if call.weights.slots & PROJECTION else 0
    if batch == 0 or rows == 0:
        return False
    steps = -(-rows // batch)
    return _C.casts_to_bfloat16(call.spec.name, steps, batch, x.shape[-1], hidden, proj)


def _is_cast(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts floating-point tensors except float64, as autocast does."""
    return t.to(dtype) if _is_cast(t) else t
