"""The options of a cell that the modules of layers have: constructor arguments and parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import dropout

from fastrnn import checks
from fastrnn.layer_call import CellOptions
from fastrnn.spec import (
    NORM,
    NORM_CELL,
    NORM_CELL_BIAS,
    CellSpec,
    Weights,
    variant_of,
)

#: the activations of gates
GATE_ACTIVATIONS = ("sigmoid", "hard_sigmoid")


class ModuleOptions(NamedTuple):
    """The checked constructor arguments; ``zoneout`` of c, or of h without a cell state, and of h.

    The names are those of the arguments.
    """

    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    cell_clip: float | None = None
    proj_clip: float | None = None
    gate_activation: str = "sigmoid"
    reset_after: bool = True
    heads: int = 1
    #: whether no other schedule than the time loops with options runs the module's cell
    loops_only: bool = False

    def changes_the_cell(self, training: bool) -> bool:
        """Whether the time loop is not that of a plain layer."""
        return (
            self.layer_norm
            or any(self.zoneout)
            or (training and self.recurrent_dropout > 0)
            or self.clips
            or self.gate_activation != "sigmoid"
            or not self.reset_after
            or self.loops_only
        )

    @property
    def clips(self) -> bool:
        """Whether a state has a bound."""
        return self.cell_clip is not None or self.proj_clip is not None

    def of_call(self, training: bool) -> CellOptions | None:
        """Returns the options of a call; None if there are none besides weights and the cell."""
        is_random = training and self.recurrent_dropout > 0
        if not (any(self.zoneout) or is_random or self.clips):
            return None
        zoneout_c, zoneout_h = self.zoneout
        dropout = self.recurrent_dropout
        clips = self.cell_clip, self.proj_clip
        return CellOptions(zoneout_h, zoneout_c, dropout, training, *clips)

    def cell(self, plain: str) -> str:
        """Returns the cell that runs, for the name of the cell without options."""
        return variant_of(plain, self.gate_activation != "sigmoid", self.reset_after)

    def describe(self) -> str:
        """Returns the options that are set as arguments, or what else makes the cell special."""
        return self.as_arguments() or "a cell that only the kernels of options run"

    def as_arguments(self) -> str:
        """Returns the options that are set, as in a call; "" if there are none."""
        defaults = ModuleOptions()._arguments()
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._arguments().items()
            if value != defaults[name]
        )

    def _arguments(self) -> dict[str, Any]:
        zoneout: Any = self.zoneout[0] if self.zoneout[0] == self.zoneout[1] else self.zoneout
        arguments = {**self._asdict(), "zoneout": zoneout}
        del arguments["loops_only"]
        return arguments


def _probability(name: str, option: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not checks.is_bool(value)
    if not is_number or not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(
            f"{name}: {option} must be a number from 0 to 1, got {checks.describe(value)}."
        )
    return float(value)


def _clip(name: str, option: str, value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not checks.is_bool(value)
    if not is_number or not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{name}: {option} must be a positive number or None, got {checks.describe(value)}."
        )
    return float(value)


def _check_cell(name: str, spec: CellSpec, option: str, value: Any, cells: tuple[str, ...]) -> None:
    """Raises if an option that is set is not one of the module's cell."""
    if spec.name not in cells:
        owners = " or ".join(cell.upper() for cell in cells)
        raise ValueError(
            f"{name}: {option} is an option of {owners} only, got {checks.describe(value)}."
        )


def _heads(name: str, heads: Any, hidden_size: int) -> int:
    if not isinstance(heads, int) or checks.is_bool(heads) or heads < 1 or hidden_size % heads:
        raise ValueError(
            f"{name}: heads must be a positive divisor of hidden_size {hidden_size}, "
            f"got {checks.describe(heads)}."
        )
    return heads


def parse(
    name: str,
    spec: CellSpec,
    layer_norm: Any,
    zoneout: Any,
    recurrent_dropout: Any,
    weight_dropout: Any,
    hidden_size: int = 1,
    cell_clip: Any = None,
    proj_clip: Any = None,
    gate_activation: Any = "sigmoid",
    reset_after: Any = True,
    heads: Any = 1,
) -> ModuleOptions | None:
    """Checks the arguments of a module. Returns None if all are the defaults.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if not checks.is_bool(layer_norm):
        raise TypeError(f"{name}: layer_norm must be a bool, got {checks.describe(layer_norm)}.")
    if isinstance(zoneout, tuple | list):
        if not spec.has_cell_state or len(zoneout) != 2:
            expected = "one number or two, of c and of h" if spec.has_cell_state else "one number"
            raise ValueError(f"{name}: zoneout must be {expected}, got {checks.describe(zoneout)}.")
        zone_c, zone_h = (_probability(name, "zoneout", value) for value in zoneout)
    else:
        zone_c = zone_h = _probability(name, "zoneout", zoneout)
    for option, value in (("cell_clip", cell_clip), ("proj_clip", proj_clip)):
        if value is not None:
            _check_cell(name, spec, option, value, ("lstm",))
    if not isinstance(gate_activation, str) or gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(
            f"{name}: gate_activation must be one of "
            f"{', '.join(map(repr, GATE_ACTIVATIONS))}, got {checks.describe(gate_activation)}."
        )
    if gate_activation != "sigmoid":
        _check_cell(name, spec, "gate_activation", gate_activation, ("lstm", "gru"))
    if not checks.is_bool(reset_after):
        raise TypeError(f"{name}: reset_after must be a bool, got {checks.describe(reset_after)}.")
    if not reset_after:
        _check_cell(name, spec, "reset_after", reset_after, ("gru",))
    options = ModuleOptions(
        bool(layer_norm),
        (zone_c, zone_h),
        _probability(name, "recurrent_dropout", recurrent_dropout),
        _probability(name, "weight_dropout", weight_dropout),
        _clip(name, "cell_clip", cell_clip),
        _clip(name, "proj_clip", proj_clip),
        gate_activation,
        bool(reset_after),
        _heads(name, heads, hidden_size),
        spec.loops_only,
    )
    return None if options == ModuleOptions() else options


def check_together(module: nn.RNNBase, options: ModuleOptions, recompute: Any) -> None:
    """Raises if the module has another option that excludes these."""
    name = type(module).__name__
    # no text is made unless there is an error: compiled code cannot make that of a float
    if options.proj_clip is not None and module.proj_size == 0:
        raise ValueError(
            f"{name}: proj_size must be positive with proj_clip={options.proj_clip}, got 0."
        )
    if options.heads > 1 and options.layer_norm:
        raise ValueError(f"{name}: heads must be 1 with layer_norm=True, got {options.heads}.")
    is_regularised = options.layer_norm or any(options.zoneout) or options.recurrent_dropout > 0
    for applies, other, value, expected in (
        (options.heads > 1 or is_regularised, "proj_size", module.proj_size, 0),
        (options.changes_the_cell(training=True), "recompute", recompute, "none"),
    ):
        if applies and value != expected:
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
    if options is None:
        return
    if options.heads > 1:
        raise ValueError(f"{owner}: the layer must have heads=1, got {options.heads}.")
    if options.changes_the_cell(training):
        names = "neither layer_norm nor zoneout nor another option of the cell"
        if training:
            names = (
                "no layer_norm, no zoneout, no other option of the cell and, in training mode, "
                "no recurrent_dropout"
            )
        raise ValueError(f"{owner}: the layer must have {names}, got {options.describe()}.")


def divide_recurrent_weights(module: nn.RNNBase, heads: int) -> None:
    """Replaces each weight_hh [G*H,H] by one that has the columns of one head, [G*H,H/heads]."""
    for suffix in _suffixes(module):
        name = f"weight_hh_{suffix}"
        columns = getattr(module, name).detach()[:, : module.hidden_size // heads]
        module._parameters[name] = nn.Parameter(columns.clone())
    module._init_flat_weights()


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
        like: Any = getattr(module, f"weight_hh_{suffix}")
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


def with_options(
    module: nn.RNNBase, options: ModuleOptions, has_cell_state: bool, weights: Weights
) -> Weights:
    """Returns the weights to compute with: w_hh after dropout, and those of layer normalisation."""
    suffixes = _suffixes(module)
    count = len(weights.flat) // len(suffixes)
    slots = weights.slots
    if options.layer_norm:
        slots |= NORM
        if has_cell_state:
            slots |= NORM_CELL | (NORM_CELL_BIAS if module.bias else 0)
    flat: list[Tensor] = []
    for index, suffix in enumerate(suffixes):
        own = list(weights.flat[index * count : (index + 1) * count])
        if options.weight_dropout > 0 and module.training:
            own[1] = dropout(own[1], options.weight_dropout)
        if options.layer_norm:
            own += [getattr(module, name) for name in _norm_names(module, has_cell_state, suffix)]
        flat += own
    return Weights(flat, slots)
