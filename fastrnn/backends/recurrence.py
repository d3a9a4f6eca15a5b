"""fastrnn's kernels for cells with options, on the CPU."""

from __future__ import annotations

from fastrnn.backends.conditions import unsupported_placement, unsupported_transform
from fastrnn.layer_call import LayerCall
from fastrnn.ops.recurrence import recurrence_layer
from fastrnn.spec import PROJECTION
from fastrnn.tracing import is_in_onnx_export, size

NAME = "recurrence kernels"
WHOLE_STACK = False


def unsupported(call: LayerCall) -> str:
    if call.has_plain_cell:
        return "the cell has no options"
    if call.weights.has(PROJECTION):
        return "the kernels of cells with options have no projection"
    if is_in_onnx_export():
        return "ONNX does not have this operator"
    if size(call.h0, -1) == 0:
        return "the hidden size is 0"
    if call.x.device.type not in ("cpu", "meta"):
        return "the kernels of cells with options are for the CPU"
    return unsupported_transform() or unsupported_placement(call)


run = recurrence_layer
