"""One operator for each layer or step in a graph that is captured and runs later."""

from __future__ import annotations

from fastrnn.backends.conditions import unsupported_tensors, unsupported_transform
from fastrnn.layer_call import LayerCall
from fastrnn.ops import captured_layer
from fastrnn.tracing import is_capturing, is_in_onnx_export, size

NAME = "captured operator"
WHOLE_STACK = False


def unsupported(call: LayerCall) -> str:
    if not is_capturing():
        return "no graph is captured"
    if is_in_onnx_export():
        return "ONNX does not have this operator"
    if call.is_step:
        if size(call.h0, 1) == 0:
            return "the hidden size is 0"
        return unsupported_transform() or unsupported_tensors(call)
    return unsupported_tensors(call)


run = captured_layer
