"""The private names of torch that fastrnn uses, in one place.

Each is the same object as in torch: Dynamo and TorchScript recognise some of these functions by
their identity. "Seen" lists the releases of torch that were checked to have the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Marks the overloads of a method for TorchScript; whether TorchScript compiles the caller. Seen in
# 2.13, 2.14.
from torch._jit_internal import _overload_method as overload_method
from torch._jit_internal import is_scripting

# The module, not its variable: `forward_ad._current_level` is -1 unless a dual level is open. Seen
# in 2.13, 2.14.
from torch.autograd import forward_ad

__all__ = [
    "VF",
    "AutoDispatchBelowAutograd",
    "DispatchKey",
    "DispatchKeySet",
    "ExcludeDispatchKeyGuard",
    "TransformType",
    "are_transforms_active",
    "forward_ad",
    "get_tracing_state",
    "has_kernel",
    "interpreter_stack",
    "is_any_autocast_enabled",
    "is_batched",
    "is_scripting",
    "lazy_clone",
    "overload_method",
    "set_tracing_state",
    "unbound_apply",
]

_C: Any = torch._C

# torch's recurrent functions (lstm, gru, ...) and steps (lstm_cell, ...), which torch.nn calls.
# Seen in 2.13, 2.14.
VF: Any = torch._VF

# Whether autocast is enabled for any device: one question where the public one asks per device.
# Seen in 2.13, 2.14.
is_any_autocast_enabled: Callable[[], bool] = _C._is_any_autocast_enabled

# Whether a transform of torch.func runs. Seen in 2.13, 2.14.
are_transforms_active: Callable[[], bool] = _C._are_functorch_transforms_active

# The transforms of torch.func that run, outermost first, and their kinds. Seen in 2.13, 2.14.
interpreter_stack: Callable[[], Any] = _C._functorch.get_interpreter_stack
TransformType: Any = _C._functorch.TransformType

# Whether is_grads_batched has put its wrapper around a tensor. Seen in 2.13, 2.14.
is_batched: Callable[[torch.Tensor], bool] = _C._functorch.is_legacy_batchedtensor

# Whether an operator has a kernel for a device. Seen in 2.13, 2.14.
has_kernel: Callable[[str, str], bool] = _C._dispatch_has_kernel_for_dispatch_key

# Calls an operator below the autograd, or without the autocast, that fastrnn gives it. Seen in
# 2.13, 2.14.
AutoDispatchBelowAutograd: Any = _C._AutoDispatchBelowAutograd
ExcludeDispatchKeyGuard: Any = _C._ExcludeDispatchKeyGuard
DispatchKey: Any = _C.DispatchKey
DispatchKeySet: Any = _C.DispatchKeySet

# The state of torch.jit.trace: None unless it records; None suspends it. torch.jit.is_tracing takes
# five times as long to answer, and each call asks several times. Seen in 2.13, 2.14.
get_tracing_state: Callable[[], Any] = _C._get_tracing_state
set_tracing_state: Callable[[Any], None] = _C._set_tracing_state

# A copy that shares memory until one of the two is written to. Seen in 2.13, 2.14.
lazy_clone: Callable[[torch.Tensor], torch.Tensor] = torch._lazy_clone


def unbound_apply(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without binding the arguments to the signature of its ``forward``.

    Binding takes twice as long as the rest of apply. The function must have no defaults. Seen in
    2.13, 2.14.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
