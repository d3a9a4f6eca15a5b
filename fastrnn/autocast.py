"""Autocast: the types that a recurrent layer computes in, and the types of its results.

The CPU kernels accumulate half types in float32. Tensors on the CPU are cast down to bfloat16 only
where that makes the call faster: an instruction multiplies pairs of bfloat16, and the call has
enough rows to pay for the copies of the weights (`_C.bfloat16_copies`). Otherwise, and while a
graph is captured to run elsewhere, only the results change their type (`float32_reason`). On other
devices tensors are cast as for cuDNN's layers.

In compiled code the casts are part of the graph, so the backward pass, which does not run under
autocast, computes in the type of the forward pass.

The types of the results are those of ``torch.nn``. A stands for autocast's type:

    RNN, LSTM, RNNCell        A
    GRU, GRUCell, LSTMCell    CPU: the wider of A and the state's type, so that a float32 state
                              stays float32; other devices: A
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrnn import _C
from fastrnn._torch_internals import are_transforms_active, is_any_autocast_enabled
from fastrnn.layer_call import LayerCall, Results
from fastrnn.spec import PROJECTION
from fastrnn.tracing import is_at_least, is_capturing, is_fixed, may_compare

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
        dtypes = _dtypes(call)
        if float32_reason(call):
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


def float32_reason(call: LayerCall) -> str:
    """Returns why a call on the CPU computes in float32, "" if bfloat16 copies make it faster.

    See `is_at_least` for sizes that are symbols.
    """
    if torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast is not to bfloat16"
    if not _dtypes(call) <= _CAST_TO_BFLOAT16:
        return "the tensors are not all float32 or bfloat16"
    if is_capturing():
        return "a graph is captured"
    if are_transforms_active():
        return "a transform of torch.func is active"
    if call.options.weight_format != 0:
        return "weight_dtype is float16"
    if not call.has_plain_cell:
        return "the cell has options"
    if not call.spec.reduced:
        return "the cell has no bfloat16 kernels"
    x, h0, flat = call.x, call.h0, call.weights.flat
    hidden = flat[0].shape[0] // call.spec.gates
    proj = h0.shape[-1] if call.weights.slots & PROJECTION else 0
    if not (is_fixed(hidden) and is_fixed(proj)):
        return "the size of a weight is a symbol"
    min_rows, batches = _bfloat16_copies(call.spec.name, hidden, proj)
    if not batches:
        return "no instruction of this CPU multiplies pairs of bfloat16"
    dims, batch = x.shape[:-1], h0.shape[-2]
    free = may_compare((*dims, batch))  # asked once: a comparison gives a symbol a range
    if not is_at_least(math.prod(dims), min_rows, free):
        return f"it is faster below {min_rows} rows (steps times batch)"
    pays = False
    for first in batches:
        if is_at_least(batch, first, free):
            pays = not pays
    return "" if pays else "it is faster for this batch"


def _dtypes(call: LayerCall) -> set[torch.dtype]:
    return {t.dtype for t in (call.x, call.h0, call.c0, *call.weights.flat) if t is not None}


def _bfloat16_copies(cell: str, hidden: int, proj: int) -> tuple[int, tuple[int, ...]]:
    return _C.bfloat16_copies(cell, hidden, proj)


# Does the same as torch.compiler.assume_constant_result, which would import the compiler.
_bfloat16_copies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_cast(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts floating-point tensors except float64, as autocast does."""
    return t.to(dtype) if _is_cast(t) else t
