"""torch's own single steps, where they are faster than the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import _C, autocast
from fastrnn._torch_internals import are_transforms_active, is_any_autocast_enabled
from fastrnn.layer_call import PADDED, LayerCall, Results
from fastrnn.ops import HALF, records_gradient
from fastrnn.spec import CellSpec, Weights
from fastrnn.tracing import is_capturing

NAME = "torch's step"
WHOLE_STACK = False

# Bounds on the work of a step: B times the number of values in w_ih and w_hh. Measured on an AMD
# EPYC (Zen 5); MKL's products are faster on an Intel Xeon (Emerald Rapids).
# torch's step up to here, for an RNN in float32 or float64; no bound if a gradient is recorded
_SMALL_RNN_STEP = 1 << (20 if _C.cpu_vendor() == "intel" else 15)
_SMALL_AUTOCAST_STEP = 1 << 15  # torch's step up to here, for an RNN in a half type or autocast
_SMALL_HALF_STEP = 1 << 11  # torch's step up to here, for a GRU or LSTM in a half type
_LARGE_HALF_STEP = 1 << 18  # torch's step above, for every cell in a half type or under autocast

_FASTER = "the kernels are faster for a step of this size"
_FOR_OTHERS = "it is for half types, autocast and an RNN's single steps"


def unsupported(call: LayerCall) -> str:
    x = call.x
    is_special = x.dtype in HALF or is_any_autocast_enabled()
    if not is_special and call.spec.gates != 1:
        return _FOR_OTHERS
    if not call.has_plain_cell:
        return "torch's step has no layer normalisation, zoneout or recurrent dropout"
    if call.is_step:
        return unsupported_step(call.spec, x, call.h0, call.weights)
    if x.dtype not in HALF and not (is_special and autocast.acts_on(x)):
        return _FOR_OTHERS
    if torch.compiler.is_compiling() or is_capturing():
        return "a graph is captured or compiled"
    if call.sequence.flat or x.shape[0] != 1:
        return "there is more than one step"
    if x.device.type != "cpu":
        return "it is for the CPU"
    if call.c0 is not None and call.c0.shape != call.h0.shape:
        return "torch's step has no projection"
    if are_transforms_active():
        return "a transform of torch.func is active"
    if not is_faster_in_half(call.spec, x.shape[1], call.weights.flat):
        return _FASTER
    return ""


def is_faster_in_half(spec: CellSpec, batch: int, weights: Sequence[Tensor | None]) -> bool:
    """Whether torch computes one step on the CPU faster, in a half type or under autocast.

    torch multiplies half types directly and caches cast weights until autocast ends. The kernels
    would convert half types to float32 at each step.
    """
    if spec.torch.torch_step is None:
        return False
    w_ih: Any = weights[0]
    w_hh: Any = weights[1]
    work = batch * (w_ih.numel() + w_hh.numel())
    if work > _LARGE_HALF_STEP:
        return True
    if spec.gates == 1:
        return bool(work <= _SMALL_AUTOCAST_STEP)
    return w_ih.dtype in HALF and work <= _SMALL_HALF_STEP


def is_small_rnn_step(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether torch computes an RNN's step on the CPU faster, in float32 or float64."""
    return x.shape[0] * (weights[0].numel() + weights[1].numel()) <= _SMALL_RNN_STEP


def unsupported_step(spec: CellSpec, x: Tensor, h: Tensor, weights: Weights) -> str:
    """Returns the reason not to use torch's step for one step of one direction, "" if none.

    - Half type or autocast on the CPU: `is_faster_in_half` decides.
    - Autocast on other devices: torch's step computes every step.
    - Otherwise torch's step is used only for an RNN on the CPU, if the step is small or a gradient
      is recorded: torch differentiates it in C++, while a kernel's gradient enters Python twice.
    """
    if spec.gates != 1 and x.dtype not in HALF and not is_any_autocast_enabled():
        return _FOR_OTHERS
    if spec.torch.torch_step is None:
        return "torch has no {cell} step"
    flat = weights.flat
    if are_transforms_active() or is_capturing():
        return "a transform of torch.func is active or a graph is captured"
    if is_any_autocast_enabled() and autocast.acts_on(x):
        return "" if not x.is_cpu or is_faster_in_half(spec, x.shape[0], flat) else _FASTER
    if not x.is_cpu:
        return "it is for the CPU"
    if x.dtype in HALF:
        return "" if is_faster_in_half(spec, x.shape[0], flat) else _FASTER
    if spec.gates != 1:
        return _FOR_OTHERS
    if is_small_rnn_step(x, flat):
        return ""
    return "" if records_gradient(LayerCall(spec, x, PADDED, h, None, weights)) else _FASTER


def run(call: LayerCall) -> Results:
    """Computes a single step, or a layer of a single step."""
    step: Any = call.spec.torch.torch_step
    x, h0, c0 = call.x, call.h0, call.c0
    if call.is_step:
        if c0 is None:
            h = step(x, h0, *call.weights.flat)
            return h, h, None
        h, c = step(x, (h0, c0), *call.weights.flat)
        return h, h, c
    steps: list[Any] = []
    for direction, w in enumerate(call.weights.directions()):
        h = h0[direction]
        state = h if c0 is None else (h, c0[direction])
        steps.append(step(x[0], state, w.w_ih, w.w_hh, w.b_ih, w.b_hh))
    h_n, c_n = (steps, None) if c0 is None else zip(*steps, strict=True)
    y = h_n[0] if len(steps) == 1 else torch.cat(h_n, -1)
    return y.unsqueeze(0), torch.stack(h_n), None if c_n is None else torch.stack(c_n)
