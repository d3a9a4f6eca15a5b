"""Graph capture by ``torch.export``, ``torch.jit.trace`` and ``torch.fx``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

from fastrnn._torch_internals import get_tracing_state, set_tracing_state

_R = TypeVar("_R")


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording."""
    return get_tracing_state() is not None


def is_capturing() -> bool:
    """Whether the current call is captured in a graph that runs later."""
    return torch.compiler.is_exporting() or get_tracing_state() is not None


def is_in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is running."""
    return torch.onnx.is_in_onnx_export()


# Does the same as torch.compiler.assume_constant_result, which would import the compiler. Without
# it, Dynamo treats torch's function as False, and the exporter's second attempt, through Dynamo,
# would hide the errors of the first.
is_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_tracing(function: Callable[..., _R], *arguments: object) -> _R:
    """Calls a function with ``torch.jit.trace`` suspended.

    While torch.jit.trace is recording, sizes are tensors, and comparing them or converting them to
    numbers causes a warning. Inside the function they are numbers.
    """
    state = get_tracing_state()
    if state is None:
        return function(*arguments)
    set_tracing_state(None)
    try:
        return function(*arguments)
    finally:
        set_tracing_state(state)


def size(t: Tensor, dim: int) -> int:
    """Returns ``t.shape[dim]`` as a number."""
    if get_tracing_state() is None:
        return t.shape[dim]
    return without_tracing(lambda: t.shape[dim])


def is_fixed(size: int) -> bool:
    """Whether a size is a number, not a symbol of a graph that is being compiled."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports the compiler

    return has_static_value(size)


def may_compare(sizes: Iterable[int]) -> bool:
    """Whether a graph that is being compiled may depend on comparisons with these sizes.

    It may not if one of them is a symbol with a range of its own, as from
    ``mark_dynamic(x, 0, min=2, max=64)``: torch raises if the graph serves a part of it only.
    """
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports the compiler

    for size in sizes:
        if not is_fixed(size) and (
            statically_known_true(size > _LEAST_SYMBOL) or statically_known_true(size < _UNBOUNDED)
        ):
            return False
    return True


# A symbol without a range of its own stands for at least 2, because torch compiles 0 and 1
# separately, and for more than any real size.
_LEAST_SYMBOL, _UNBOUNDED = 2, 1 << 40


def is_at_least(size: int, minimum: int, may_compare: bool) -> bool:
    """Whether a size is known to be at least ``minimum``.

    While a graph is compiled, the size may be a symbol. With ``may_compare`` the graph then serves
    all sizes for which the comparison has the same result, or none is made if data decide the size.
    """
    if not torch.compiler.is_compiling():
        return size >= minimum
    # imports the compiler
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    return (guard_or_false if may_compare else statically_known_true)(size >= minimum)


def leaf_call(module: nn.Module, input: Any, hx: Any, options: dict[str, Any] | None = None) -> Any:
    """Records the call of a module as one node if ``torch.fx`` traces it, else returns None.

    torch.fx treats a module as a leaf if its class is defined in ``torch.nn``; the tracers of
    torchvision and of FX quantization have the same rule. A fastrnn module detects tracing by its
    arguments, which are proxies, and records itself under every tracer. A subclass with its own
    ``forward`` is not a leaf, as with ``torch.nn``: the node would call that ``forward`` again.

    Args:
        module: the module.
        input, hx: its first arguments.
        options: its other arguments by name; those that are None are left out.
    """
    proxy: Any = input
    if not isinstance(input, Proxy):
        if hx is None or type(hx) is Tensor:
            return None
        states = hx if isinstance(hx, tuple | list) else (hx,)
        proxy = next((state for state in states if isinstance(state, Proxy)), None)
        if proxy is None:
            return None
    if not type(module).forward.__module__.startswith("fastrnn."):
        return None
    name = proxy.tracer.path_of_module(module)
    return proxy.tracer.create_proxy(
        "call_module",
        name,
        (input, *([] if hx is None else [hx])),
        {key: value for key, value in (options or {}).items() if value is not None},
    )


def check_scriptable(module: nn.Module, names: Iterable[str]) -> None:
    """Raises unless the weights with these names are Parameters of the module.

    TorchScript stores the current values of weights. A weight that is computed, by a
    parametrization, pruning, weight norm or spectral norm, would no longer change after compiling.
    """
    for name in names:
        if module._parameters.get(name) is not None:
            continue
        if parametrize.is_parametrized(module, name):
            how = f"call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        elif f"{name}_mask" in module._buffers:
            how = f"call torch.nn.utils.prune.remove(module, {name!r})"
        elif f"{name}_g" in module._parameters:
            how = f"call torch.nn.utils.remove_weight_norm(module, {name!r})"
        elif f"{name}_u" in module._buffers:
            how = f"call torch.nn.utils.remove_spectral_norm(module, {name!r})"
        else:
            how = f"set module.{name} = torch.nn.Parameter(...)"
        found = "None" if getattr(module, name, None) is None else "a weight that is computed"
        cls = parametrize.type_before_parametrizations(module)
        raise RuntimeError(
            f"torch.jit.script: {name} of {cls.__name__} must be a Parameter, got {found}. First "
            f"{how}, or use torch.jit.trace or torch.export, which capture the computation."
        )
