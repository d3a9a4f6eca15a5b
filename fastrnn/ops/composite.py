"""The composite: a layer as torch operations, for calls that the kernels do not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrnn import autocast
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops.operators import HALF
from fastrnn.reference import StateResults, reference_layer, reference_states, reference_step


def composite_layer(call: LayerCall) -> Results:
    """Runs one layer or one step by differentiable operations."""
    results: Results = as_kernels(reference_step if call.is_step else reference_layer, call)
    return results


def composite_states(call: LayerCall) -> StateResults:
    """Runs one layer by differentiable operations; also returns the cell states of each step."""
    results: StateResults = as_kernels(reference_states, call)
    return results


def as_kernels(function: Callable[[LayerCall], Any], call: LayerCall) -> Any:
    """Calls a function of `fastrnn.reference` with the types that the kernels compute in.

    As in the kernels, half types are computed in float32 and rounded only at the end. Autocast is
    disabled, because the arguments have been cast already.
    """
    x = call.x
    if autocast.acts_on(x):
        with torch.autocast(x.device.type, enabled=False):
            return as_kernels(function, call)
    if x.dtype not in HALF:
        return function(call)
    results = function(
        call._replace(
            x=x.float(),
            h0=call.h0.float(),
            c0=None if call.c0 is None else call.c0.float(),
            weights=call.weights._replace(flat=[w.float() for w in call.weights.flat]),
        )
    )
    return tuple([None if t is None else t.to(x.dtype) for t in results])
