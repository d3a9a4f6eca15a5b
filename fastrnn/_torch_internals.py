"""The private names of torch that fastrnn uses, in one place.

Each name is bound to torch's own object, because Dynamo and TorchScript recognise some of these
functions by identity. "Seen" lists the releases of torch in which the name was found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# overload_method marks the overloads of a method for TorchScript. is_scripting is true in code that
# TorchScript compiles. Seen in 2.13, 2.14.
from torch._jit_internal import _overload_method as overload_method
from torch._jit_internal import is_scripting

# The module, because its variable changes: `forward_ad._current_level` is -1 unless a dual level is
# open. Seen in 2.13, 2.14.
from torch.autograd import forward_ad

# Functions over the tensors of nested tuples, lists, dictionaries and classes that a user has
# registered. Seen in 2.13, 2.14.
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "VF",
    "AutoDispatchBelowAutograd",
    "DispatchKey",
    "DispatchKeySet",
    "ExcludeDispatchKeyGuard",
    "TransformType",
    "are_transforms_active",
    "dispatch_modes",
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
    "tree_leaves",
    "tree_map",
    "unbound_apply",
]

_C: Any = torch._C

# torch's recurrent functions (lstm, gru, ...) and steps (lstm_cell, ...), which torch.nn calls.
# Seen in 2.13, 2.14.
VF: Any = torch._VF

# Whether autocast is enabled for any device. The public function must be called per device. Seen in
# 2.13, 2.14.
is_any_autocast_enabled: Callable[[], bool] = _C._is_any_autocast_enabled

# Whether a transform of torch.func is active. Seen in 2.13, 2.14.
are_transforms_active: Callable[[], bool] = _C._are_functorch_transforms_active

# The active transforms of torch.func, outermost first, and their kinds. Seen in 2.13, 2.14.
interpreter_stack: Callable[[], Any] = _C._functorch.get_interpreter_stack
TransformType: Any = _C._functorch.TransformType

# Whether a tensor is wrapped by is_grads_batched. Seen in 2.13, 2.14.
is_batched: Callable[[torch.Tensor], bool] = _C._functorch.is_legacy_batchedtensor

# Number of active TorchDispatchModes, such as FlopCounterMode. Seen in 2.13, 2.14.
dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack

# Whether an operator has a kernel for a device. Seen in 2.13, 2.14.
has_kernel: Callable[[str, str], bool] = _C._dispatch_has_kernel_for_dispatch_key

# Contexts in which an operator skips the autograd or autocast code that fastrnn registers for it.
# Seen in 2.13, 2.14.
AutoDispatchBelowAutograd: Any = _C._AutoDispatchBelowAutograd
ExcludeDispatchKeyGuard: Any = _C._ExcludeDispatchKeyGuard
DispatchKey: Any = _C.DispatchKey
DispatchKeySet: Any = _C.DispatchKeySet

# The state of torch.jit.trace: None unless it records; setting None suspends it. A call reads it
# several times, and torch.jit.is_tracing takes five times as long. Seen in 2.13, 2.14.
get_tracing_state: Callable[[], Any] = _C._get_tracing_state
set_tracing_state: Callable[[Any], None] = _C._set_tracing_state

# Returns a copy that shares memory until either tensor is written to. Seen in 2.13, 2.14.
lazy_clone: Callable[[torch.Tensor], torch.Tensor] = torch._lazy_clone


def unbound_apply(function: type[torch.autograd.Function]) -> Any:
    """Returns ``function.apply`` without binding arguments to the signature of ``forward``.

    Binding takes twice as long as the rest of apply. ``forward`` must have no default arguments.
    Seen in 2.13, 2.14.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
