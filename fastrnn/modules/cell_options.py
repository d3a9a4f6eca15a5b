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
    BY_MODE,
    MATRICES,
    NORM,
    NORM_CELL,
    NORM_CELL_BIAS,
    PEEPHOLE,
    UNIT,
    CellSpec,
    Weights,
    present,
    torch_facts,
    variant_of,
)

#: the activations of gates
GATE_ACTIVATIONS = ("sigmoid", "hard_sigmoid")
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
    cell_clip: float | None = None
    proj_clip: float | None = None
    gate_activation: str = "sigmoid"
    reset_after: bool = True
    heads: int = 1
    #: whether no other schedule than the time loops with options runs the module's cell
    loops_only: bool = False

    @property
    def has_other_weights(self) -> bool:
        """Whether the weights are not those of a plain layer."""
        return self.layer_norm or self.peephole or self.coupled_gates or self.heads > 1

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

    def mode(self, plain: CellSpec) -> str:
        """Returns the mode of a module with these options, for the cell without them."""
        if self.peephole:
            return torch_facts(PEEPHOLE + plain.name).mode
        if self.gate_activation == "sigmoid" and self.reset_after:
            return plain.mode
        variant = variant_of(plain.name, self.gate_activation != "sigmoid", self.reset_after)
        return torch_facts(variant).mode

    def describe(self) -> str:
        """Returns the options that are set as arguments, or what else makes the cell special."""
        return self.as_arguments() or "a cell that only the kernels of options run"

    def as_arguments(self) -> str:
        """Returns the options that are set, as in a call; "" if there are none."""
        defaults = ModuleOptions().arguments()
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.arguments().items()
            if value != defaults[name]
        )

    def arguments(self) -> dict[str, Any]:
        zoneout: Any = self.zoneout[0] if self.zoneout[0] == self.zoneout[1] else self.zoneout
        arguments = {**self._asdict(), "zoneout": zoneout}
        del arguments["loops_only"]
        return arguments


def _probability(name: str, option: str, value: Any) -> float:
    if checks.is_bool(value) or not checks.is_probability(value):
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
    peephole: Any = False,
    coupled_gates: Any = False,
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
        bool(peephole),
        bool(coupled_gates),
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
    spec = BY_MODE[module.mode]
    changes = options.changes_the_cell(training=True)
    if options.peephole and module.proj_size:
        raise ValueError(f"{name}: proj_size must be 0 with peephole=True, got {module.proj_size}.")
    if options.peephole and changes:
        raise ValueError(
            f"{name}: peephole must be False with another option of the cell, got "
            f"{options.describe()}."
        )
    if changes and not spec.has_options:
        kind = getattr(module, "_kind", "this cell")
        raise ValueError(
            f"{name}: {kind} must have no layer_norm, no zoneout and no recurrent_dropout, got "
            f"{options.describe()}."
        )
    # no text is made unless there is an error: compiled code cannot make that of a float
    without_matrix, heads = "a cell that has no recurrent matrix", f"heads={options.heads}"
    keeps_size = options.layer_norm or any(options.zoneout) or options.recurrent_dropout > 0
    for applies, other, value, expected, option in (
        (not spec.dense, "weight_dropout", options.weight_dropout, 0, without_matrix),
        (not spec.dense, "heads", options.heads, 1, without_matrix),
        (options.layer_norm, "coupled_gates", options.coupled_gates, False, "layer_norm=True"),
        (options.layer_norm, "heads", options.heads, 1, "layer_norm=True"),
        (options.heads > 1, "proj_size", module.proj_size, 0, heads),
        (keeps_size, "proj_size", module.proj_size, 0, ""),
        (changes, "recompute", recompute, "none", ""),
    ):
        if applies and value != expected:
            option = option or options.describe()
            raise ValueError(f"{name}: {other} must be {expected!r} with {option}, got {value!r}.")
    if options.proj_clip is not None and module.proj_size == 0:
        raise ValueError(
            f"{name}: proj_size must be positive with proj_clip={options.proj_clip}, got 0."
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


def reject_other_weights(owner: str, module: Any) -> None:
    """Raises for a module with other weights than a plain layer, for what reads these."""
    options: ModuleOptions | None = getattr(module, "_cell_options", None)
    if options is not None and options.has_other_weights:
        raise ValueError(
            f"{owner}: the layer must have no layer_norm, no peephole, no coupled_gates and no "
            f"heads, got {options.describe()}."
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
