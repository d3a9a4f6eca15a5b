"""Chooses the backend of a call: the first one in a list that supports the call.

The modules of layers and of cells also have a fast path, because trying the list takes longer than
a small layer. It runs the kernels directly if `may_use_fast_path`. A watcher disables it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastrnn._torch_internals import (
    are_transforms_active,
    forward_ad,
    get_tracing_state,
    is_any_autocast_enabled,
)
from fastrnn.backends import (
    Backend,
    captured,
    composite,
    kernels,
    onnx_node,
    prepared,
    recurrence,
    stacked_kernels,
    torch_builtin,
    torch_step,
)
from fastrnn.layer_call import LayerCall

#: all backends, the preferred one first
PRIORITY: tuple[Backend, ...] = (
    torch_step,
    prepared,
    stacked_kernels,
    kernels,
    captured,
    onnx_node,
    torch_builtin,
    recurrence,
    composite,
)
#: the backends that support single steps, in the same order
STEPS: tuple[Backend, ...] = (torch_step, kernels, captured, composite)
#: the backends that need tensors of one dtype, so that autocast must cast first
AFTER_AUTOCAST, STEPS_AFTER_AUTOCAST = PRIORITY[1:], STEPS[1:]

#: (call, backends) -> the backend to use; replaces the choice
Watcher = Callable[[LayerCall, Sequence[Backend]], Backend]


def is_plain() -> bool:
    """Whether autocast, transforms, tangents and graph capture are all off."""
    return not (
        is_any_autocast_enabled()
        or are_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or get_tracing_state() is not None
    )


_watcher: Watcher | None = None
#: whether a module may take its fast path
may_use_fast_path: Callable[[], bool] = is_plain


def choose(call: LayerCall, backends: Sequence[Backend] = PRIORITY) -> Backend:
    """Returns the first backend that supports a call.

    Raises:
        RuntimeError: no backend does; the message is the reason of the last one.
    """
    if call.options.recorder is not None:  # it chooses for each layer
        recorder: Backend = call.options.recorder
        return recorder
    if _watcher is not None:
        return _watcher(call, backends)
    for backend in backends:
        if not backend.unsupported(call):
            return backend
    raise RuntimeError(skip_reason(backends[-1], call))


def choose_without_watcher(call: LayerCall, backends: Sequence[Backend]) -> Backend:
    """Chooses as if there were no watcher; called by watchers."""
    with watched(None):
        return choose(call, backends)


def skip_reason(backend: Backend, call: LayerCall) -> str:
    """Returns the readable reason why a backend cannot compute a call, "" if it can."""
    return backend.unsupported(call).format(
        cell=call.spec.name, dtype=str(call.x.dtype).removeprefix("torch."), device=call.x.device
    )


@contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Within this context the watcher chooses, and no call takes a fast path."""
    global _watcher, may_use_fast_path
    before = _watcher, may_use_fast_path
    _watcher, may_use_fast_path = watcher, _never
    try:
        yield
    finally:
        _watcher, may_use_fast_path = before


def override(backend: Backend) -> Any:
    """Returns a context manager in which every call uses this backend, even if unsupported."""
    return watched(lambda call, backends: backend)


def is_watched() -> bool:
    """Whether there is a watcher, so that every call must use `choose`."""
    return _watcher is not None


def _never() -> bool:
    return False


def describe(call: LayerCall) -> str:
    """Returns a short description of a call: cell, shape, dtype and device."""
    x = call.x
    kind = "step" if call.is_step else f"{call.options.num_layers} layer(s)"
    dtype = str(x.dtype).removeprefix("torch.")
    packed = "packed " if call.batch_sizes is not None else ""
    return f"{call.spec.name}, {kind} on {packed}{list(x.shape)} {dtype} {x.device}"


def _report(call: LayerCall, backends: Sequence[Backend]) -> Backend:
    """Chooses and prints the choice."""
    chosen = choose_without_watcher(call, backends)
    if not torch.compiler.is_compiling():
        skipped = [
            f"{backend.NAME}: {skip_reason(backend, call)}"
            for backend in backends[: backends.index(chosen)]
        ]
        lines = f"fastrnn: {describe(call)}: {chosen.NAME}\n"
        if skipped:
            lines += f"fastrnn:   skipped {'; '.join(skipped)}\n"
        sys.stderr.write(lines)
    return chosen


def _is_verbose() -> bool:
    value = os.environ.get("FASTRNN_VERBOSE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"fastrnn: FASTRNN_VERBOSE must be 0 or 1, got '{value}'.")
    return value == "1"


if _is_verbose():
    _watcher, may_use_fast_path = _report, _never
