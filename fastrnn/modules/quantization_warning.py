"""Warns if ``torch.ao.quantization`` silently leaves a module in floating point.

``quantize_dynamic`` and ``prepare`` look up exact classes in a dictionary and skip all others. A
module only notices that its attribute ``qconfig`` is set. The requested classes are found in the
arguments of torch's function, on the call stack.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from torch import nn
from torch.nn.utils import parametrize


def warn_if_left_float(module: nn.Module, qconfig: object) -> None:
    """Warns if the call that sets ``qconfig`` leaves ``module`` in floating point.

    Args:
        module: a fastrnn module whose attribute ``qconfig`` is being set.
        qconfig: its new value; None if the caller named neither the module's class nor its name.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and not (_is_quantize_dynamic(frame) or _is_prepare(frame)):
        frame = frame.f_back
        level += 1
    if frame is None:
        return
    cls = parametrize.type_before_parametrizations(module)
    own = next((c for c in cls.__mro__ if c.__module__.startswith("fastrnn.")), cls)
    name = f"fastrnn.{cls.__name__}" if cls is own else cls.__name__
    if _is_prepare(frame):
        if qconfig is not None and not _is_handled(cls, frame):
            reason = (
                "torch looks for its own classes. Set its qconfig to None, and convert between the "
                "types around it (DeQuantStub before, QuantStub behind), or use quantize_dynamic "
                "with mapping=fastrnn.quantization_mapping()"
            )
            _warn(frame.f_code.co_name, name, reason, frame, level)
        return
    arguments = frame.f_locals
    is_requested = qconfig is not None or any(
        isinstance(key, type)
        and key.__module__.startswith("torch.nn.")
        and key.__name__ == own.__name__
        for key in arguments["qconfig_spec"]
    )
    is_known = qconfig is not None and cls in arguments["mapping"]
    if not is_requested or (is_known and module is not arguments["model"]):
        return
    if is_known:
        reason = "it replaces modules inside the model only, not the model itself"
    elif own.__name__ == "RNN":
        reason = "torch has no quantized RNN"
    elif cls is own:
        reason = (
            f"torch looks for its own classes. Name fastrnn.{own.__name__} in qconfig_spec and "
            "pass mapping=fastrnn.quantization_mapping()"
        )
    else:
        reason = "torch does not look for subclasses"
    _warn("quantize_dynamic", name, reason, frame, level)


def _warn(function: str, name: str, reason: str, frame: FrameType | None, level: int) -> None:
    """Warns at the line that called torch. ``frame``, ``level`` frames up, is torch's function."""
    while frame is not None and _is_torch_frame(frame):
        frame = frame.f_back
        level += 1
    message = f"{function} leaves a {name} in floating point: {reason}"
    warnings.warn(message, stacklevel=level + 1)


def _is_quantize_dynamic(frame: FrameType) -> bool:
    return (
        frame.f_code.co_name == "quantize_dynamic"
        and frame.f_globals.get("__name__") == "torch.ao.quantization.quantize"
        and {"model", "mapping", "qconfig_spec"} <= frame.f_locals.keys()
    )


def _is_prepare(frame: FrameType) -> bool:
    """Whether this frame is ``prepare`` or ``prepare_qat`` of static quantization."""
    return (
        frame.f_code.co_name in ("prepare", "prepare_qat")
        and frame.f_globals.get("__name__") == "torch.ao.quantization.quantize"
    )


def _is_handled(cls: type, prepare: FrameType) -> bool:
    """Whether the caller replaces this class, or ``prepare`` was called by ``prepare_qat``."""
    config = prepare.f_locals.get("prepare_custom_config_dict") or {}
    if cls in config.get("float_to_observed_custom_module_class", {}):
        return True
    outer = prepare.f_back
    while outer is not None and not _is_prepare(outer):
        outer = outer.f_back
    return outer is not None


def _is_torch_frame(frame: FrameType) -> bool:
    """Whether this frame is torch's, or the decorator's that marks its functions deprecated."""
    name = str(frame.f_globals.get("__name__"))
    return name in ("typing_extensions", "warnings") or name.startswith("torch.ao.")
