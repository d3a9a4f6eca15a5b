"""Brings fastrnn into programs written for ``torch.nn``: `convert` a model, `patch` the names."""

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
        names: where the module stands in the model, several names if it is shared; "" is the root.
        before: its class, with its module.
        after: the fastrnn class that it has now, or None if it was left alone.
        reason: why it was left alone.
    """

    names: tuple[str, ...]
    before: str
    after: str | None
    reason: str = ""

    def __str__(self) -> str:
        where = ", ".join(name or "(the model itself)" for name in self.names)
        if self.after is None:
            return f"{where}: {self.before} left alone, {self.reason}"
        return f"{where}: {self.before} -> {self.after}"


@dataclass
class ConversionReport:
    """Modules that `convert` replaced and left alone; ``str()`` gives a readable summary."""

    replaced: list[Replacement] = field(default_factory=list)
    skipped: list[Replacement] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fastrnn: {len(self.replaced)} replaced, {len(self.skipped)} left alone"]
        lines += [f"  {entry}" for entry in (*self.replaced, *self.skipped)]
        return "\n".join(lines)


@overload
def convert(model: M, *, return_report: Literal[False] = False) -> M: ...
@overload
def convert(model: M, *, return_report: Literal[True]) -> tuple[M, ConversionReport]: ...
def convert(model: M, *, return_report: bool = False) -> M | tuple[M, ConversionReport]:
    """Makes every ``torch.nn`` RNN, LSTM, GRU and cell in a model a fastrnn one, in place.

        model = fastrnn.convert(model)
        model, report = fastrnn.convert(model, return_report=True)

    The modules stay the objects they are and change their class, as torch's own parametrizations
    do it. So everything that hangs on them survives: Parameters and the optimizers that hold them,
    tied weights, shared submodules, hooks, names, training mode, pruning, weight norm,
    parametrizations, and references to a module from elsewhere. A model that is an ``nn.LSTM``
    itself works as well.

    ``isinstance(module, nn.LSTM)`` is False of a converted module, so a loop that initialises
    layers by their class skips it silently: look for ``nn.RNNBase`` (cells: ``nn.RNNCellBase``),
    for both classes, or run the loop inside `patch`.

    Subclasses of ``nn.LSTM`` and its like are left alone, since their own ``forward`` may rely on
    torch's; a warning names them. Define such classes under `patch` instead.

    Args:
        model: any module.
        return_report: whether to return the report too. It is always logged to the logger
            "fastrnn" at level INFO.

    Returns:
        ``model`` itself, or with ``return_report`` a tuple of it and a `ConversionReport`.

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
        replacement = _replacement(module)
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


def _replacement(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` should have, None if it had better keep its own."""
    cls = type(module)
    if cls in _REPLACEMENTS:
        return _REPLACEMENTS[cls]
    # torch.nn.utils.parametrize puts a class of its own over the module's, made of properties
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
    """Makes ``torch.nn.RNN``, ``LSTM``, ``GRU`` and the cells be fastrnn's, for code that builds
    them.

        with fastrnn.patch():
            model = TheirModel()          # builds torch.nn.LSTM: gets fastrnn.LSTM

        fastrnn.patch()                   # until fastrnn.unpatch()

    The names are swapped in ``torch.nn``, ``torch.nn.modules`` and ``torch.nn.modules.rnn``, for
    all threads. Patches nest; the names come back when the last one ends, by an exception too.
    ``isinstance(module, torch.nn.LSTM)`` is true of what was built under the patch, as long as it
    lasts. It does not reach names that were imported before (``from torch.nn import LSTM``), nor
    classes that already derive from torch's, nor modules that already exist: `convert` those. To
    pickle a whole module of torch's own (not its state_dict), wait until the patch ends.
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
    """Ends every `patch`, called or entered; without any it does nothing."""
    with _lock:
        _active.clear()
        _swap(dict(zip(_REPLACEMENTS.values(), _REPLACEMENTS.keys(), strict=True)))


_lock = threading.Lock()
_active: list[patch] = []


def _swap(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Puts the values in the place of the keys; a name that holds something else is left alone."""
    for namespace in _NAMESPACES:
        for before, after in classes.items():
            if getattr(namespace, before.__name__, None) is before:
                setattr(namespace, before.__name__, after)
