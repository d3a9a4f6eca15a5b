"""Calls that become part of a graph which others run: ``torch.export`` and ``torch.jit.trace``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.jit._trace import is_tracing as _is_tracing

_R = TypeVar("_R")

#: whether ``torch.jit.trace`` records
is_tracing: Callable[[], bool] = _is_tracing


def is_written_down() -> bool:
    """Whether what is called now is written into a graph."""
    return torch.compiler.is_exporting() or is_tracing()


def unrecorded(function: Callable[..., _R], *arguments: object) -> _R:
    """Calls a function in such a way that ``torch.jit.trace`` does not see it.

    While it records, sizes are tensors that may differ in the next call, and to compare one or to
    count with it draws a warning. In here they are numbers.
    """
    if not is_tracing():
        return function(*arguments)
    state = torch._C._get_tracing_state()
    set_state: Callable[[object], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        return function(*arguments)
    finally:
        set_state(state)


def size(t: Tensor, dim: int) -> int:
    """``t.shape[dim]`` as a number."""
    return unrecorded(lambda: t.shape[dim])
