"""The one place that chooses a backend: the first in a list that has no reason against a call.

Two shortcuts go past the list, because asking costs more than a small layer: the quick paths of the
modules, which take the kernels where `may_run_quickly`. A watcher closes them.
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
    stacked_kernels,
    torch_builtin,
    torch_step,
)
from fastrnn.layer_call import LayerCall

#: best first
PRIORITY: tuple[Backend, ...] = (
    torch_step,
    stacked_kernels,
    kernels,
    captured,
    onnx_node,
    torch_builtin,
    composite,
)
#: the same for single steps, without the backends that have none
STEPS: tuple[Backend, ...] = (torch_step, kernels, captured, composite)
#: the backends whose tensors must have one dtype: autocast casts them first
AFTER_AUTOCAST, STEPS_AFTER_AUTOCAST = PRIORITY[1:], STEPS[1:]

#: (call, backends) -> the backend to use
Watcher = Callable[[LayerCall, Sequence[Backend]], Backend]


def is_plain() -> bool:
    """Whether tensors go in and come out without gradients, transforms, autocast and graphs."""
    return not (
        torch.is_grad_enabled()
        or is_any_autocast_enabled()
        or are_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or get_tracing_state() is not None
    )


_watcher: Watcher | None = None
#: whether a module may take a quick path
may_run_quickly: Callable[[], bool] = is_plain


def choose(call: LayerCall, backends: Sequence[Backend] = PRIORITY) -> Backend:
    """Returns the first backend that serves a call.

    Raises:
        RuntimeError: none does; the message is the reason of the last.
    """
    if _watcher is not None:
        return _watcher(call, backends)
    for backend in backends:
        if not backend.unsupported(call):
            return backend
    raise RuntimeError(reason_against(backends[-1], call))


def choose_unwatched(call: LayerCall, backends: Sequence[Backend]) -> Backend:
    """`choose` for a watcher."""
    with watched(None):
        return choose(call, backends)


def reason_against(backend: Backend, call: LayerCall) -> str:
    """The reason why a backend does not serve a call, for people; "" if it does."""
    return backend.unsupported(call).format(
        cell=call.spec.name, dtype=str(call.x.dtype).removeprefix("torch."), device=call.x.device
    )


@contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Inside, the watcher chooses, and no call takes a quick path."""
    global _watcher, may_run_quickly
    before = _watcher, may_run_quickly
    _watcher, may_run_quickly = watcher, _never
    try:
        yield
    finally:
        _watcher, may_run_quickly = before


def override(backend: Backend) -> Any:
    """Returns a context manager: inside, every call uses this backend, whatever the reasons."""
    return watched(lambda call, backends: backend)


def is_watched() -> bool:
    """Whether every call must ask `choose`."""
    return _watcher is not None


def _never() -> bool:
    return False


def describe(call: LayerCall) -> str:
    """A call in a few words: cell, shape, dtype and device."""
    x = call.x
    kind = "step" if call.is_step else f"{call.options.num_layers} layer(s)"
    dtype = str(x.dtype).removeprefix("torch.")
    packed = "packed " if call.batch_sizes is not None else ""
    return f"{call.spec.name}, {kind} on {packed}{list(x.shape)} {dtype} {x.device}"


def _report(call: LayerCall, backends: Sequence[Backend]) -> Backend:
    """Chooses and prints the choice."""
    chosen = choose_unwatched(call, backends)
    if not torch.compiler.is_compiling():
        skipped = [
            f"{backend.NAME}: {reason_against(backend, call)}"
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
    _watcher, may_run_quickly = _report, _never
