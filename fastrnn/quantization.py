"""int8 inference: by fastrnn's own kernels, and by torch's quantized modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.cell_options import reject, reject_other_weights
from fastrnn.modules.quantized import QuantizedRecurrent

__all__ = ["QuantizedRecurrent", "quantization_mapping", "quantize"]

_LAYERS = (RNN, LSTM, GRU)

_CLASSES = (LSTM, GRU, LSTMCell, GRUCell, RNNCell)


def quantize(module: nn.Module) -> nn.Module:
    """Returns a copy of a module whose fastrnn layers have int8 weights, for inference on the CPU.

        quantized = fastrnn.quantize(model)
        with torch.inference_mode():
            output, hidden = quantized(input)

    Replaces every `fastrnn.RNN`, `LSTM` and `GRU` in the module, or the module itself, by a
    `QuantizedRecurrent`, which is called in the same way. All other modules are copied. Nothing is
    calibrated. docs/int8.md describes the rounding, its error and its speed.

    The copy is in eval mode and cannot be trained. A weight that a parametrization or pruning
    computes is quantized with its current value. Hooks of the layers are not copied. A UserWarning
    names subclasses of fastrnn's layers, which keep their class and their float weights.

    To load a stored copy, quantize a module with the same options and load its ``state_dict``.

    Args:
        module: any module with fastrnn layers on the CPU. `fastrnn.convert` turns torch's layers
            into fastrnn's.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: it holds no fastrnn layer, or a weight is not finite.
        NotImplementedError: a layer has a projection.
        RuntimeError: a weight is not on the CPU.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"quantize: module must be a torch.nn.Module, got {type(module).__name__}.")
    replacements: dict[int, QuantizedRecurrent] = {}
    for name, part in module.named_modules():
        if not isinstance(part, RecurrentBase):
            continue
        if _is_plain(part):
            replacements[id(part)] = QuantizedRecurrent(part)
        else:
            warnings.warn(
                f"fastrnn.quantize: {name or '(the module itself)'} keeps its float weights: its "
                f"class {type(part).__name__} is a subclass and may rely on them",
                stacklevel=2,
            )
    if not replacements:
        raise ValueError(
            "quantize: module must hold a fastrnn.RNN, LSTM or GRU, got none. fastrnn.convert "
            "turns torch's layers into fastrnn's."
        )
    # deepcopy takes the copies of these layers from its memo
    memo: dict[int, Any] = dict(replacements)
    result: nn.Module = copy.deepcopy(module, memo)
    return result.eval()


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer's class is fastrnn's own, perhaps with parametrized weights."""
    cls = type(layer)
    if parametrize.is_parametrized(layer) and len(cls.__bases__) == 1:
        cls = cls.__bases__[0]
    return cls in _LAYERS


def quantization_mapping() -> dict[Callable[..., Any], Any]:
    """Returns torch's mapping for ``quantize_dynamic`` with fastrnn's classes added.

        torch.ao.quantization.quantize_dynamic(
            model, {nn.Linear, fastrnn.LSTM}, mapping=fastrnn.quantization_mapping()
        )

    ``quantize_dynamic`` replaces modules whose exact class it finds in ``qconfig_spec`` and in
    ``mapping``, and leaves all others in floating point. With this mapping it replaces a fastrnn
    LSTM, GRU or cell by the same module as it does for ``torch.nn``: one of
    ``torch.ao.nn.quantized.dynamic``, which runs torch's kernels. Both dtypes, ``torch.qint8`` and
    ``torch.float16``, work. A weight that a parametrization or pruning computes is quantized with
    its current value.

    A UserWarning names every fastrnn module that was requested and is left in floating point:
    without this mapping, with ``{nn.LSTM}`` instead of ``{fastrnn.LSTM}``, for an RNN (torch has no
    quantized RNN), for subclasses, and for a model that is itself a recurrent module.

    Returns:
        A new dictionary from classes to objects that create their quantized modules.

    Raises:
        NotImplementedError: raised later, by ``quantize_dynamic``, for options that torch's
            quantized modules do not have: ``bias=False``, ``proj_size``,
            ``nonlinearity="sigmoid"``.
    """
    # imported here because torch.ao takes long to import and may be missing
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import get_default_dynamic_quant_module_mappings

    mapping: dict[Callable[..., Any], Any] = dict(get_default_dynamic_quant_module_mappings())
    for own in _CLASSES:
        mapping[own] = _QuantizedClass(own.__name__, getattr(dynamic, own.__name__))
    return mapping


@dataclass(frozen=True)
class _QuantizedClass:
    """The entry of a mapping for one class. torch calls only its `from_float`."""

    name: str
    quantized: Any

    def from_float(self, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> nn.Module:
        """Returns the quantized module with the weights of ``mod``."""
        for lacking, is_used in (
            ("bias=False", not mod.bias),
            ("proj_size", getattr(mod, "proj_size", 0) != 0),
            ("nonlinearity='sigmoid'", getattr(mod, "nonlinearity", "") == "sigmoid"),
        ):
            if is_used:
                raise NotImplementedError(
                    f"fastrnn.{self.name} with {lacking} cannot be quantized: "
                    f"torch's quantized {self.name} does not support it"
                )
        quantized: nn.Module = self.quantized.from_float(
            self._as_torch_module(mod), use_precomputed_fake_quant=use_precomputed_fake_quant
        )
        return quantized.train(mod.training)

    def _as_torch_module(self, mod: nn.Module) -> Any:
        """Returns ``mod`` as an instance of the class that ``torch.nn`` now has by its name.

        torch's `from_float` accepts no other class; `fastrnn.patch` changes which class it is.
        """
        options: dict[str, Any] = {"device": "meta"}
        if isinstance(mod, nn.RNNBase):
            if getattr(mod, "_learns_initial_state", False):
                raise NotImplementedError(
                    f"{self.name}: torch quantizes no learned initial state, got "
                    "learn_initial_state=True."
                )
            reject(self.name, mod)
            reject_other_weights(self.name, mod)
            for option in ("residual", "batch_first_states"):
                if getattr(mod, option, False):
                    raise NotImplementedError(
                        f"{self.name}: {option} must be False for torch's quantization, got True."
                    )
            options |= {
                "num_layers": mod.num_layers,
                "batch_first": mod.batch_first,
                "bidirectional": mod.bidirectional,
            }
        elif isinstance(mod, RNNCell):
            options["nonlinearity"] = mod.nonlinearity
        torch_module = getattr(nn, self.name)(mod.input_size, mod.hidden_size, **options)
        if isinstance(mod, nn.RNNBase):
            torch_module.dropout = mod.dropout  # the constructor would warn for a single layer
        for name in list(torch_module._parameters):
            weight: Tensor = getattr(mod, name)
            setattr(torch_module, name, nn.Parameter(weight.detach(), requires_grad=False))
        torch_module.qconfig = mod.qconfig
        return torch_module
