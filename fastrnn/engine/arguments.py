"""Arguments of the functions in `fastrnn.functional`: parses both forms and checks the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastrnn import checks
from fastrnn.engine.ragged import NO_MARKS, Marks, run_marked
from fastrnn.engine.run import run
from fastrnn.engine.states import Extras, recorder_of
from fastrnn.layer_call import LayerCall, Options, Results, SequenceMembers
from fastrnn.spec import WEIGHT_FORMATS, CellSpec, Weights, slots_of

_PADDED = (
    "input",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "dropout",
    "train",
    "bidirectional",
    "batch_first",
)
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])
#: keyword arguments of both forms, and their defaults
_KEYWORDS = {
    "weight_dtype": None,
    "recompute": "none",
    "residual": False,
    **NO_MARKS._asdict(),
    "return_all_states": False,
    "return_gates": False,
}


def _arguments(spec: CellSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of either form by name. ``data`` is returned as "input"."""
    packed = False
    if len(args) > 2 and isinstance(args[1], Tensor):
        packed = (
            # batch_sizes are integers, a state never is
            (args[1].dim() == 1 and not (args[1].is_floating_point() or args[1].is_complex()))
            or (not spec.has_cell_state and isinstance(args[2], Tensor))
            or (spec.has_cell_state and isinstance(args[0], Tensor) and args[0].dim() == 2)
        )
    names = _PACKED if packed or "data" in kwargs or "batch_sizes" in kwargs else _PADDED
    if len(args) > len(names):
        raise TypeError(f"{spec.name}() takes {len(names)} arguments but {len(args)} were given")
    values = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names and name not in _KEYWORDS:
            raise TypeError(f"{spec.name}() got an unexpected argument '{name}'")
        if name in values:
            raise TypeError(f"{spec.name}() got several values for argument '{name}'")
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise TypeError(f"{spec.name}() is missing the arguments {', '.join(missing)}")
    if "data" in values:
        values["input"] = values.pop("data")
    return {"batch_sizes": None, "batch_first": False, **_KEYWORDS, **values}


def run_one_state(
    spec: CellSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Runs a function with one state, called in either form."""
    values = _arguments(spec, args, kwargs)
    try:
        (output, h_n, _), *extras = _checked_run(spec, None, values)
    except Exception:
        checks.explain_function(spec, values)
        raise
    return (output, h_n, *extras)  # type: ignore[return-value]


def run_two_states(
    spec: CellSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a function with the states h and c, called in either form."""
    values = _arguments(spec, args, kwargs)
    hx = values["hx"]
    try:
        if not isinstance(hx, (tuple, list)):
            raise TypeError("lstm: hx must be a tuple of two tensors, h and c")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h0, c0 = hx
        results, *extras = _checked_run(spec, c0, {**values, "hx": h0})
    except Exception:
        checks.explain_function(spec, values)
        raise
    return cast("tuple[Tensor, Tensor, Tensor]", (*results, *extras))


def _checked_run(
    spec: CellSpec, cx: Tensor | None, values: dict[str, Any]
) -> tuple[Results] | tuple[Results, Extras]:
    """Checks every shape (`run` does not) and runs the layers.

    Returns:
        The results; then the extras, if they are requested.
    """
    recorder = recorder_of(values["return_all_states"], values["return_gates"])
    checks.check_options(spec, values)
    x: Tensor = values["input"]
    hx: Tensor = values["hx"]
    params: Sequence[Tensor] = list(values["params"])
    batch_sizes: Tensor | None = values["batch_sizes"]
    num_layers: int = values["num_layers"]
    directions = 2 if values["bidirectional"] else 1
    weight_format = WEIGHT_FORMATS[checks.check_weight_dtype(values["weight_dtype"])]
    recompute = checks.check_recompute(values["recompute"])
    if not checks.is_bool(values["residual"]):
        raise TypeError(f"residual must be a bool, got {checks.describe(values['residual'])}")
    if batch_sizes is None:
        _check(x.dim() == 3, f"input must have 3 dimensions, got {x.dim()}")
        batch = x.shape[0] if values["batch_first"] else x.shape[1]
    else:
        _check(x.dim() == 2, f"packed data must have 2 dimensions, got {x.dim()}")
        _check(
            batch_sizes.dim() == 1
            and batch_sizes.dtype == torch.int64
            and batch_sizes.device.type == "cpu",
            "batch_sizes must be an int64 vector on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}",
        )
        sizes = batch_sizes.tolist()
        _check(len(sizes) > 0, "Expected sequence length to be larger than 0 in RNN")
        _check(
            sum(sizes) == x.shape[0] and sizes == sorted(sizes, reverse=True) and sizes[-1] > 0,
            f"batch_sizes must be positive, descend and add up to the {x.shape[0]} rows of data",
        )
        batch = sizes[0]
    states = num_layers * directions
    for name, state in (("hidden", hx), ("cell", cx)):
        _check(
            state is None
            or (state.dim() == 3 and state.shape[0] == states and state.shape[1] == batch),
            f"{name} state must be of size ({states}, {batch}, *), "
            f"got {None if state is None else list(state.shape)}",
        )
    size = hx.shape[2]
    hidden = size if cx is None else cx.shape[2]
    shapes: list[tuple[int, ...]] = []
    for index in range(states):
        width = x.shape[-1] if index < directions else size * directions
        shapes += [(spec.gates * hidden, width), (spec.gates * hidden, size)]
        if values["has_biases"]:
            shapes += [(spec.gates * hidden,)] * 2
        if size != hidden:
            shapes.append((size, hidden))
    _check(
        len(params) == len(shapes), f"Expected {len(shapes)} parameter tensors, got {len(params)}"
    )
    for index, (param, shape) in enumerate(zip(params, shapes, strict=True)):
        _check(
            tuple(param.shape) == shape,
            f"Expected params[{index}] of size {shape}, got {list(param.shape)}",
        )
    call = LayerCall(
        spec,
        x,
        SequenceMembers(batch_sizes).pack(),
        hx,
        cx,
        Weights(params, slots_of(values["has_biases"], size != hidden)),
        Options(
            num_layers,
            values["dropout"] if values["train"] else 0.0,
            weight_format,
            recorder=recorder,
            recompute=recompute,
            residual=bool(values["residual"]),
        ),
    )
    marks = Marks(*(values[name] for name in Marks._fields))
    batch_first: bool = values["batch_first"]
    if all(mark is None for mark in marks):
        results = run(call, batch_first)
    else:
        if batch_sizes is not None:
            marks.check_absent("packed data")
        results = run_marked(call, marks, batch_first)
    if recorder is None:
        return (results,)
    return results, recorder.extras(batch_first, results[0], results[2])


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
