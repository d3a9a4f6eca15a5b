"""fastrnn's kernels with the weights that ``module.prepare()`` has packed, for inference."""

from __future__ import annotations

from operator import is_

import torch

from fastrnn._torch_internals import dispatch_modes, is_any_autocast_enabled
from fastrnn.backends import kernels
from fastrnn.layer_call import LayerCall, Results
from fastrnn.ops import records_gradient
from fastrnn.tracing import is_capturing

NAME = "prepared weights"
WHOLE_STACK = True


def unsupported(call: LayerCall) -> str:
    prepared = call.options.prepared
    if prepared is None:
        return "the weights are not prepared"
    if torch.compiler.is_compiling() or is_capturing():
        return "a graph is captured or compiled"
    if records_gradient(call):
        return "a gradient is recorded"
    x, flat = call.x, call.weights.flat
    if len(flat) != len(prepared.copied) or not all(map(is_, flat, prepared.copied)):
        return "other weights were prepared"
    if x.numel() == 0:
        return "the input is empty"
    if call.sequence.flat:
        return "the sequences are packed"
    if x.dtype != prepared.dtype or x.device.type != "cpu":
        return "the prepared weights have another dtype or device than the input"
    if is_any_autocast_enabled():
        return "autocast is enabled"
    if call.options.dropout:
        return "there is dropout between the layers"
    if call.options.weight_format:
        return "the prepared weights are in {dtype} only"
    if any(type(t) is not torch.Tensor for t in (x, call.h0, call.c0) if t is not None):
        return "a tensor has a class of its own"
    if dispatch_modes() > 0:
        return "a mode watches the operators"
    return kernels.unsupported(call)


def run(call: LayerCall) -> Results:
    return call.options.prepared.run(call.x, call.h0, call.c0)  # type: ignore[no-any-return]
