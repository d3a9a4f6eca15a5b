"""The composite: a layer as torch operations, for calls that the kernels do not support."""

from __future__ import annotations

import torch

from fastrnn import autocast
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops.operators import HALF
from fastrnn.reference import reference_layer, reference_step


def composite_layer(call: LayerCall) -> Results:
    """Runs one layer or one step by differentiable operations.

    As in the kernels, half types are computed in float32 and rounded only at the end. Autocast is
    disabled, because the arguments have been cast already.
    """
    x = call.x
    if autocast.acts_on(x):
        with torch.autocast(x.device.type, enabled=False):
            return composite_layer(call)
    if x.dtype in HALF:
        y, h_n, c_n = composite_layer(
            call._replace(
                x=x.float(),
                h0=call.h0.float(),
                c0=None if call.c0 is None else call.c0.float(),
                weights=call.weights._replace(flat=[w.float() for w in call.weights.flat]),
            )
        )
        return y.to(x.dtype), h_n.to(x.dtype), None if c_n is None else c_n.to(x.dtype)
    return reference_step(call) if call.is_step else reference_layer(call)
