"""Conditions that several backends share: each returns why the kernels cannot run, or ""."""

from __future__ import annotations

import torch

from fastrnn._torch_internals import (
    TransformType,
    are_transforms_active,
    forward_ad,
    interpreter_stack,
)
from fastrnn.layer_call import LayerCall
from fastrnn.ops import DEVICES, DTYPES
from fastrnn.spec import COMPILED
from fastrnn.tracing import size


def unsupported_transform() -> str:
    """Checks transforms: the kernels support neither tangents nor tensors batched by ``vmap``."""
    if are_transforms_active():
        # Dynamo does not see that a tensor inside a transform requires a gradient
        if torch.compiler.is_compiling():
            return "a transform of torch.func is compiled"
        if not _only_reverse_mode():
            return "the kernels support only the transforms grad, vjp and jacrev of torch.func"
    elif forward_ad._current_level >= 0:
        return "the kernels have no forward-mode derivative"
    return ""


def unsupported_tensors(call: LayerCall) -> str:
    """Checks the cell, the device and the dtype."""
    if not call.has_plain_cell:
        return "the cell has options, such as layer normalisation or zoneout"
    return unsupported_placement(call)


def unsupported_placement(call: LayerCall) -> str:
    """Checks the device and the dtype."""
    x = call.x
    if not x.is_cpu and x.device.type not in DEVICES:
        return "there are no kernels for {device}"
    if x.dtype not in DTYPES:
        return "there are no kernels for {dtype}"
    if call.spec.defined:
        if not x.is_cpu:
            return "a cell of fastrnn.define_cell has no kernels for {device}"
        if call.spec.name not in COMPILED:
            return "{cell} has not been compiled"
        if size(call.h0, -1) < call.spec.least_hidden:
            return f"the cell has no kernels for fewer than {call.spec.least_hidden} units"
    return ""


def _only_reverse_mode() -> bool:
    stack = interpreter_stack() or []
    return all(interpreter.key() == TransformType.Grad for interpreter in stack)
