"""torch's own layers, for devices and dtypes without kernels and for the older ONNX exporter."""

from __future__ import annotations

from typing import Any

from fastrnn.backends.conditions import unsupported_tensors, unsupported_transform
from fastrnn.backends.onnx_node import check_projection
from fastrnn.layer_call import LayerCall, Results
from fastrnn.spec import BIASES
from fastrnn.tracing import is_in_onnx_export, is_tracing, size

NAME = "torch's layers"
WHOLE_STACK = True


def unsupported(call: LayerCall) -> str:
    if call.is_step:
        return "this is a single step"
    if call.spec.torch.torch_function is None:
        return "torch has no {cell}"
    if not call.has_plain_cell:
        return unsupported_tensors(call)
    if is_in_onnx_export() and is_tracing():  # this exporter translates only torch's operators
        return ""
    reason = unsupported_transform()
    if reason:
        return reason
    return "" if unsupported_tensors(call) else "the kernels support this call"


def run(call: LayerCall) -> Results:
    spec, x, sequence, h0, c0, weights, (num_layers, dropout, *_) = call
    batch_sizes = sequence.named().batch_sizes
    if is_in_onnx_export():
        check_projection(call)
    is_bidirectional = size(h0, 0) // num_layers == 2
    hx = h0 if c0 is None else (h0, c0)
    options = (weights.has(BIASES), num_layers, dropout, dropout > 0, is_bidirectional)
    function: Any = spec.torch.torch_function
    if batch_sizes is None:
        result = function(x, hx, weights.flat, *options, False)
    else:
        result = function(x, batch_sizes, hx, weights.flat, *options)
    return result[0], result[1], None if c0 is None else result[2]
