"""The options of a cell that the modules of layers have: constructor arguments and parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from fastrnn import checks
from fastrnn.layer_call import CellOptions
from fastrnn.spec import (
    BIASES,
    MATRICES,
    NORM,
    NORM_CELL,
    NORM_CELL_BIAS,
    UNIT,
    CellSpec,
    Weights,
    present,
)

#: the weight slots whose rows are those of the gates
_WITH_GATES = present(MATRICES | BIASES)


class ModuleOptions(NamedTuple):
    """The checked constructor arguments; ``zoneout`` of c, or of h without a cell state, and of h.

    The names are those of the arguments.
    """

    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    peephole: bool = False
    coupled_gates: bool = False

    @property
    def has_other_weights(self) -> bool:
        """Whether the weights are not those of a plain layer."""
        return self.layer_norm or self.peephole or self.coupled_gates

    def changes_the_cell(self, training: bool) -> bool:
        """Whether the time loop is not that of a plain layer."""
        return self.layer_norm or any(self.zoneout) or (training and self.recurrent_dropout > 0)

    def of_call(self, training: bool) -> CellOptions | None:
        """Returns the options of a call; None if there are none besides layer normalisation."""
        own = self._replace(layer_norm=False)
        if not own.changes_the_cell(training):
            return None
        zoneout_c, zoneout_h = self.zoneout
        return CellOptions(zoneout_h, zoneout_c, self.recurrent_dropout, training)

    def describe(self) -> str:
        """Returns the options that are set, as arguments."""
        return ", ".join(f"{name}={value}" for name, value in self.arguments().items() if value)

    def arguments(self) -> dict[str, Any]:
        zoneout: Any = self.zoneout[0] if self.zoneout[0] == self.zoneout[1] else self.zoneout
        return {**self._asdict(), "zoneout": zoneout}


def _probability(name: str, option: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not checks.is_bool(value)
    if not is_number or not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(
            f"{name}: {option} must be a number from 0 to 1, got {checks.describe(value)}."
        )
    return float(value)


def parse(
    name: str,
    spec: CellSpec,
    layer_norm: Any,
    zoneout: Any,
    recurrent_dropout: Any,
    weight_dropout: Any,
    peephole: Any = False,
    coupled_gates: Any = False,
) -> ModuleOptions | None:
    """Checks the arguments of a module. Returns None if all are the defaults.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    for option, value in (
        ("layer_norm", layer_norm),
        ("peephole", peephole),
        ("coupled_gates", coupled_gates),
    ):
        if not checks.is_bool(value):
            raise TypeError(f"{name}: {option} must be a bool, got {checks.describe(value)}.")
        if value and option != "layer_norm" and spec.name != "lstm":
            raise ValueError(f"{name}: {option} must be False for a cell that is not an LSTM.")
    if isinstance(zoneout, tuple | list):
        if not spec.has_cell_state or len(zoneout) != 2:
            expected = "one number or two, of c and of h" if spec.has_cell_state else "one number"
            raise ValueError(f"{name}: zoneout must be {expected}, got {checks.describe(zoneout)}.")
        zone_c, zone_h = (_probability(name, "zoneout", value) for value in zoneout)
    else:
        zone_c = zone_h = _probability(name, "zoneout", zoneout)
    options = ModuleOptions(
        bool(layer_norm),
        (zone_c, zone_h),
        _probability(name, "recurrent_dropout", recurrent_dropout),
        _probability(name, "weight_dropout", weight_dropout),
        bool(peephole),
        bool(coupled_gates),
    )
    return None if options == ModuleOptions() else options


def check_together(module: nn.RNNBase, options: ModuleOptions, recompute: Any) -> None:
    """Raises if the module has another option that excludes these."""
    name = type(module).__name__
    if options.peephole and module.proj_size:
        raise ValueError(f"{name}: proj_size must be 0 with peephole=True, got {module.proj_size}.")
    if options.peephole and options.changes_the_cell(training=True):
        raise ValueError(
            f"{name}: peephole must be False with layer_norm, zoneout or recurrent_dropout, got "
            f"{options.describe()}."
        )
    if options.coupled_gates and options.layer_norm:
        raise ValueError(f"{name}: coupled_gates must be False with layer_norm=True, got True.")
    if not options.changes_the_cell(training=True):
        return
    for other, value, expected in (
        ("proj_size", module.proj_size, 0),
        ("recompute", recompute, "none"),
    ):
        if value != expected:
            raise ValueError(
                f"{name}: {other} must be {expected!r} with {options.describe()}, got {value!r}."
            )


def reject(owner: str, module: Any, training: bool = False) -> None:
    """Raises for a module whose cell is not plain, for what plain layers alone can do.

    Args:
        owner: what rejects the module, for the message.
        module: any module.
        training: whether the module computes in training mode, where recurrent dropout acts too.
    """
    options: ModuleOptions | None = getattr(module, "_cell_options", None)
    if options is not None and options.changes_the_cell(training):
        names = "neither layer_norm nor zoneout"
        if training:
            names = "no layer_norm, no zoneout and, in training mode, no recurrent_dropout"
        raise ValueError(f"{owner}: the layer must have {names}, got {options.describe()}.")


def reject_other_weights(owner: str, module: Any) -> None:
    """Raises for a module with other weights than a plain layer, for what reads these."""
    options: ModuleOptions | None = getattr(module, "_cell_options", None)
    if options is not None and options.has_other_weights:
        raise ValueError(
            f"{owner}: the layer must have no layer_norm, no peephole and no coupled_gates, got "
            f"{options.describe()}."
        )


def _suffixes(module: nn.RNNBase) -> list[str]:
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{end}" for layer in range(module.num_layers) for end in directions]


def _norm_names(module: nn.RNNBase, has_cell_state: bool, suffix: str) -> list[str]:
    names = [f"gain_ih_{suffix}", f"gain_hh_{suffix}"]
    if has_cell_state:
        names += [f"gain_c_{suffix}", f"bias_c_{suffix}"] if module.bias else [f"gain_c_{suffix}"]
    return names


def add_norm_parameters(module: nn.RNNBase, has_cell_state: bool) -> None:
    """Registers the parameters of layer normalisation."""
    for suffix in _suffixes(module):
        like: Any = getattr(module, f"weight_ih_{suffix}")
        for name in _norm_names(module, has_cell_state, suffix):
            size = module.hidden_size if "_c_" in name else like.shape[0]
            module.register_parameter(name, nn.Parameter(like.detach().new_empty(size)))
    reset_norm_parameters(module, has_cell_state)


def reset_norm_parameters(module: nn.RNNBase, has_cell_state: bool) -> None:
    """Sets gains to 1 and the bias of the cell state to 0."""
    for suffix in _suffixes(module):
        for name in _norm_names(module, has_cell_state, suffix):
            parameter = getattr(module, name)
            (nn.init.zeros_ if name.startswith("bias") else nn.init.ones_)(parameter)


def peephole_names(options: ModuleOptions) -> tuple[str, ...]:
    """Returns the names of the peepholes, by gate; coupled gates share one."""
    return ("w_cf", "w_co") if options.coupled_gates else ("w_ci", "w_cf", "w_co")


def add_peepholes(module: nn.RNNBase, options: ModuleOptions) -> None:
    """Registers the parameters of peepholes, drawn like the weights of ``torch.nn``."""
    bound = module.hidden_size**-0.5
    for suffix in _suffixes(module):
        like: Any = getattr(module, f"weight_ih_{suffix}")
        for name in peephole_names(options):
            own = nn.Parameter(like.detach().new_empty(module.hidden_size))
            module.register_parameter(f"{name}_{suffix}", nn.init.uniform_(own, -bound, bound))  # type: ignore[arg-type]


def _peepholes(module: nn.RNNBase, options: ModuleOptions, suffix: str) -> Tensor:
    """Returns the peepholes of the gates i, f and o [3*H]."""
    own = [getattr(module, f"{name}_{suffix}") for name in peephole_names(options)]
    return torch.cat([-own[0], *own] if options.coupled_gates else own)


def uncoupled(weight: Tensor, hidden: int) -> Tensor:
    """Returns the rows of the gates i, f, g, o from those of f, g, o.

    i = 1 - f = 1 - sigmoid(a_f) = sigmoid(-a_f), so the rows of i are minus those of f.
    """
    return torch.cat([-weight[:hidden], weight])


def with_options(
    module: nn.RNNBase, options: ModuleOptions, has_cell_state: bool, weights: Weights
) -> Weights:
    """Returns the weights to compute with.

    They are w_hh after dropout, four gates of coupled ones, peepholes, and the weights of layer
    normalisation.
    """
    suffixes = _suffixes(module)
    count = len(weights.flat) // len(suffixes)
    slots = weights.slots
    if options.peephole:
        slots |= UNIT
    if options.layer_norm:
        slots |= NORM
        if has_cell_state:
            slots |= NORM_CELL | (NORM_CELL_BIAS if module.bias else 0)
    flat: list[Tensor] = []
    for index, suffix in enumerate(suffixes):
        own = list(weights.flat[index * count : (index + 1) * count])
        if options.weight_dropout > 0 and module.training:
            own[1] = dropout(own[1], options.weight_dropout)
        if options.coupled_gates:
            own = [
                uncoupled(weight, module.hidden_size) if slot in _WITH_GATES else weight
                for slot, weight in zip(present(weights.slots), own, strict=True)
            ]
        if options.peephole:
            own.append(_peepholes(module, options, suffix))
        if options.layer_norm:
            own += [getattr(module, name) for name in _norm_names(module, has_cell_state, suffix)]
        flat += own
    return Weights(flat, slots)
