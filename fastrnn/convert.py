"""Makes programs written for ``torch.nn`` use fastrnn: `convert` a model, or `patch` the names."""

from __future__ import annotations

import logging
import threading
import warnings
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Literal, TypeVar, overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["ConversionReport", "Replacement", "convert", "patch", "unpatch"]

logger = logging.getLogger("fastrnn")

M = TypeVar("M", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}


@dataclass(frozen=True)
class Replacement:
    """One recurrent module of a model and what `convert` did with it.

    Attributes:
        names: the module's names in the model, several if it is shared; "" is the model itself.
        before: its original class, for example ``torch.nn.LSTM``.
        after: its new fastrnn class, or None if it was left unchanged.
        reason: why it was left unchanged.
    """

    names: tuple[str, ...]
    before: str
    after: str | None
    reason: str = ""

    def __str__(self) -> str:
        where = ", ".join(name or "(the model itself)" for name in self.names)
        if self.after is None:
            return f"{where}: {self.before} left unchanged, {self.reason}"
        return f"{where}: {self.before} -> {self.after}"


@dataclass
class ConversionReport:
    """Modules that `convert` replaced and left unchanged; ``str()`` gives a readable summary."""

    replaced: list[Replacement] = field(default_factory=list)
    skipped: list[Replacement] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fastrnn: {len(self.replaced)} replaced, {len(self.skipped)} left unchanged"]
        lines += [f"  {entry}" for entry in (*self.replaced, *self.skipped)]
        return "\n".join(lines)


@overload
def convert(model: M, *, return_report: Literal[False] = False) -> M: ...
@overload
def convert(model: M, *, return_report: Literal[True]) -> tuple[M, ConversionReport]: ...
def convert(model: M, *, return_report: bool = False) -> M | tuple[M, ConversionReport]:
    """Converts every ``torch.nn`` RNN, LSTM, GRU and cell in a model to fastrnn's, in place.

        model = fastrnn.convert(model)
        model, report = fastrnn.convert(model, return_report=True)

    Each module stays the same object and only changes its class, as with torch's own
    parametrizations. Therefore everything attached to it is kept: Parameters and the optimizers
    that hold them, tied weights, shared submodules, hooks, names, training mode, pruning, weight
    norm, parametrizations, and references to the module from elsewhere. The model itself may be an
    ``nn.LSTM``.

    ``isinstance(module, nn.LSTM)`` is False for a converted module, so a loop that initialises
    layers by their class skips it silently. Check for ``nn.RNNBase`` (cells: ``nn.RNNCellBase``) or
    for both classes, or run the loop inside `patch`.

    Subclasses of ``nn.LSTM``, ``nn.GRU`` and so on are left unchanged, because their ``forward``
    may rely on torch's implementation. A warning names them. Define such classes under `patch`
    instead.

    Args:
        model: any module.
        return_report: whether to return the report too. The report is always logged to the logger
            "fastrnn" at level INFO.

    Returns:
        ``model`` itself, or with ``return_report`` a tuple of ``model`` and a `ConversionReport`.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert() takes a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    report = ConversionReport()
    for module, places in names.items():
        if not isinstance(module, tuple(_REPLACEMENTS)):
            continue
        before = _class_name(type(module))
        replacement = fastrnn_class(module)
        if replacement is None:
            reason = "as a subclass it may rely on how torch computes"
            report.skipped.append(Replacement(tuple(places), before, None, reason))
        else:
            module.__class__ = replacement
            after = _class_name(replacement)
            report.replaced.append(Replacement(tuple(places), before, after))
    logger.info("%s", report)
    if report.skipped:
        warnings.warn(
            "; ".join(f"fastrnn.convert: {entry}" for entry in report.skipped), stacklevel=2
        )
    return (model, report) if return_report else model


def _class_name(cls: type) -> str:
    root = cls.__module__.partition(".")[0]
    package = {"torch": "torch.nn", "fastrnn": "fastrnn"}.get(root, cls.__module__)
    return f"{package}.{cls.__qualname__}"


def fastrnn_class(module: nn.Module) -> type[nn.Module] | None:
    """Returns the fastrnn class for ``module``, or None if it must keep its class."""
    cls = type(module)
    if cls in _REPLACEMENTS:
        return _REPLACEMENTS[cls]
    # torch.nn.utils.parametrize derives a class with a property per parametrized weight
    if parametrize.is_parametrized(module) and len(cls.__bases__) == 1:
        base = _REPLACEMENTS.get(cls.__bases__[0])
        if base is not None:
            own = {
                key: value
                for key, value in vars(cls).items()
                if key not in ("__dict__", "__weakref__", "__doc__", "__module__")
            }
            return type(cls.__name__, (base,), {**own, "__module__": base.__module__})
    return None


_NAMESPACES: tuple[ModuleType, ...] = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)


class patch:
    """Replaces the recurrent classes in ``torch.nn`` by fastrnn's, for code that builds them.

        with fastrnn.patch():
            model = TheirModel()          # builds torch.nn.LSTM: gets fastrnn.LSTM

        fastrnn.patch()                   # until fastrnn.unpatch()

    The names are replaced in ``torch.nn``, ``torch.nn.modules`` and ``torch.nn.modules.rnn``, for
    all threads. Patches nest: the original names return when the last patch ends, also by an
    exception. While the patch lasts, ``isinstance(module, torch.nn.LSTM)`` is True for modules that
    were built under it.

    The patch does not affect names that were imported earlier (``from torch.nn import LSTM``),
    classes that already derive from torch's, or existing modules; `convert` those modules. A whole
    module of torch's original class (not its state_dict) can be pickled only after the patch ends.
    """

    def __init__(self) -> None:
        self._begin()

    def __enter__(self) -> patch:
        self._begin()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            if self in _active:
                _active.remove(self)
            if not _active:
                _swap(dict(zip(_REPLACEMENTS.values(), _REPLACEMENTS.keys(), strict=True)))

    def _begin(self) -> None:
        with _lock:
            if self not in _active:
                _active.append(self)
            _swap(_REPLACEMENTS)


def unpatch() -> None:
    """Ends every active `patch`, whether called or entered. Does nothing if there is none."""
    with _lock:
        _active.clear()
        _swap(dict(zip(_REPLACEMENTS.values(), _REPLACEMENTS.keys(), strict=True)))


_lock = threading.Lock()
_active: list[patch] = []


def _swap(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Replaces the keys by the values where the name still holds the key."""
    for namespace in _NAMESPACES:
        for before, after in classes.items():
            if getattr(namespace, before.__name__, None) is before:
                setattr(namespace, before.__name__, after)
