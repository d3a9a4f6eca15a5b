"""fastrnn's kernels for inference of stacked layers: two layers run at the same time."""

from __future__ import annotations

import torch

from fastrnn.backends import kernels
from fastrnn.layer_call import LayerCall
from fastrnn.ops import HALF, infer_stack, records_gradient
from fastrnn.tracing import is_capturing

NAME = "stacked kernels"
WHOLE_STACK = True


def unsupported(call: LayerCall) -> str:
    num_layers, dropout, weight_format, *_ = call.options
    if num_layers == 1:
        return "there is a single layer"
    x = call.x
    if x.device.type != "cpu":
        return "the stacked kernels are for the CPU"
    if x.dtype in HALF:
        return "the stacked kernels compute in float32 and float64, not in {dtype}"
    if torch.compiler.is_compiling() or is_capturing():
        return "a graph is captured or compiled"
    if call.h0.shape[0] != num_layers:
        return "the layers are bidirectional"
    if call.options.residual:
        return "the layers have residual connections"
    if dropout != 0:
        return "there is dropout between the layers"
    if weight_format:
        return "the stacked kernels hold the weights in {dtype} only"
    if records_gradient(call):
        return "a gradient is recorded"
    return kernels.unsupported(call)


run = infer_stack
