"""fastrnn's kernels, one layer or step at a time, with their own gradients."""

from __future__ import annotations

from fastrnn._torch_internals import are_transforms_active, forward_ad
from fastrnn.backends.conditions import unsupported_tensors, unsupported_transform
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops import kernel_layer, recomputed_layer, recomputes
from fastrnn.tracing import is_capturing, size

NAME = "kernels"
WHOLE_STACK = False


def unsupported(call: LayerCall) -> str:
    if is_capturing():
        return "a graph is captured"
    if call.h0.dim() == 2 and size(call.h0, 1) == 0:  # a single step
        return "the hidden size is 0"
    if are_transforms_active() or forward_ad._current_level >= 0:
        reason = unsupported_transform()
        if reason:
            return reason
    return unsupported_tensors(call)


def run(call: LayerCall) -> Results:
    return recomputed_layer(call) if recomputes(call) else kernel_layer(call)
