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
    """torch's mapping for ``quantize_dynamic`` with fastrnn's classes added.

        torch.ao.quantization.quantize_dynamic(
            model, {nn.Linear, fastrnn.LSTM}, mapping=fastrnn.quantization_mapping()
        )

    ``quantize_dynamic`` replaces modules whose exact class it finds in ``qconfig_spec`` and in
    ``mapping``; others it leaves in floating point. With this mapping a fastrnn LSTM, GRU or cell
    becomes what ``torch.nn``'s module with the same weights would become, a module of
    ``torch.ao.nn.quantized.dynamic``, which runs torch's kernels. Both dtypes, ``torch.qint8`` and
    ``torch.float16``, are served. Weights that a parametrization or pruning computes are taken as
    they are.

    Where a fastrnn module is asked for and left in floating point, a UserWarning says so: without
    this mapping, with ``{nn.LSTM}`` instead of ``{fastrnn.LSTM}``, for an RNN (torch has no
    quantized one), for subclasses, and for a model that is a single recurrent module.

    Returns:
        A new dictionary from classes to what makes their quantized modules.

    Raises:
        NotImplementedError: later, by ``quantize_dynamic``, for what torch's quantized modules
            lack: ``bias=False``, ``proj_size`` and ``nonlinearity="sigmoid"``.
    """
    # torch.ao takes its time to import, and not every torch has to have it
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import get_default_dynamic_quant_module_mappings

    mapping: dict[Callable[..., Any], Any] = dict(get_default_dynamic_quant_module_mappings())
    for own in _CLASSES:
        mapping[own] = _Swap(own.__name__, getattr(dynamic, own.__name__))
    return mapping


@dataclass(frozen=True)
class _Swap:
    """Stands in a mapping for a quantized class: all that torch asks of one is `from_float`."""

    name: str
    quantized: Any

    def from_float(self, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> nn.Module:
        """The quantized module with the weights of ``mod``."""
        for lacking, is_used in (
            ("bias=False", not mod.bias),
            ("proj_size", getattr(mod, "proj_size", 0) != 0),
            ("nonlinearity='sigmoid'", getattr(mod, "nonlinearity", "") == "sigmoid"),
        ):
            if is_used:
                raise NotImplementedError(
                    f"fastrnn.{self.name} with {lacking} cannot be quantized: "
                    f"torch's quantized {self.name} has no such thing"
                )
        quantized: nn.Module = self.quantized.from_float(
            self._as_twin(mod), use_precomputed_fake_quant=use_precomputed_fake_quant
        )
        return quantized.train(mod.training)

    def _as_twin(self, mod: nn.Module) -> Any:
        """``mod`` as what ``torch.nn`` has by this name now (`fastrnn.patch` changes that).

        torch's `from_float` accepts nothing else.
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
        twin = getattr(nn, self.name)(mod.input_size, mod.hidden_size, **options)
        if isinstance(mod, nn.RNNBase):
            twin.dropout = mod.dropout  # the constructor warns where it has no effect
        for name in list(twin._parameters):
            weight: Tensor = getattr(mod, name)
            setattr(twin, name, nn.Parameter(weight.detach(), requires_grad=False))
        twin.qconfig = mod.qconfig
        return twin
