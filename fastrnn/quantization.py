"""Dynamic quantization of fastrnn's modules by torch's own quantized modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastrnn.modules import GRU, LSTM, GRUCell, LSTMCell, RNNCell

__all__ = ["quantization_mapping"]

_CLASSES = (LSTM, GRU, LSTMCell, GRUCell, RNNCell)


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
