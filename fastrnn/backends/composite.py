"""torch operations, for all calls that no other backend supports."""

from __future__ import annotations

from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops import composite_layer
from fastrnn.ops.recurrence import composite_recurrence_layer
from fastrnn.spec import PROJECTION
from fastrnn.tracing import is_in_onnx_export, is_tracing

NAME = "composite"
WHOLE_STACK = False


def unsupported(call: LayerCall) -> str:
    if not call.is_step and is_in_onnx_export() and is_tracing():
        return "torch.onnx.export: {cell} needs dynamo=True, because torch does not have this cell"
    return ""


def run(call: LayerCall) -> Results:
    if call.has_plain_cell or call.weights.has(PROJECTION):
        return composite_layer(call)
    return composite_recurrence_layer(call)
