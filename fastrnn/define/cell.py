"""`define_cell`: from a function for one step to a class of layers."""

from __future__ import annotations

import hashlib
import inspect
import keyword
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.define.derive import Derived, derive
from fastrnn.define.graph import Node, reachable
from fastrnn.define.layer import DefinedLayer
from fastrnn.define.source import write
from fastrnn.define.trace import trace, where_defined
from fastrnn.spec import BY_MODE, CELLS, CellSpec, torch_facts

_MOST_STATES = 4
_MOST_GATES = 16
_TAKEN = {"weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh", "h_0", "c_0"}


def define_cell(
    step: Callable[..., Any] | None = None,
    *,
    gates: int,
    states: Sequence[str] = ("h",),
    parameters: Sequence[str] | Mapping[str, float] = (),
    name: str | None = None,
) -> Any:
    r"""Makes a class of recurrent layers from a function that computes one step of a cell.

        @fastrnn.define_cell(gates=4, states=("h", "c"), parameters=("w_i", "w_f", "w_o"))
        def PeepholeLSTM(gates_x, gates_h, h, c, *, w_i, w_f, w_o):
            i, f, g, o = (x + h for x, h in zip(gates_x, gates_h))
            i, f = torch.sigmoid(i + w_i * c), torch.sigmoid(f + w_f * c)
            c = f * c + i * torch.tanh(g)
            return torch.sigmoid(o + w_o * c) * torch.tanh(c), c

        layer = PeepholeLSTM(input_size, hidden_size, num_layers=2, bidirectional=True)

    A step may also reduce over the units of a row, as layer normalisation does.

    The function is called once with symbols. fastrnn derives the step of backward, writes both as a
    C++ header (``PeepholeLSTM.source()``), and compiles it when the first layer is made, for the
    CPU's fused kernels. Calls that these do not support (other devices, double backward, a machine
    without a C++ compiler) run the function itself, step by step. docs/define_cell.md describes
    both, and the operations that a step may use.

    Args:
        step: the function ``step(gates_x, gates_h, *states, **parameters)``. ``gates_x`` and
            ``gates_h`` are tuples of G tensors [B,H]: :math:`W_{ih} x_t + b_{ih}` and
            :math:`W_{hh} h_{t-1} + b_{hh}`. It returns the next states; the first one is the
            output. If it is omitted, the result is a decorator.
        gates: G, the number of gates.
        states: names of the states [B,H], at most 4; the first one is what :math:`W_{hh}`
            multiplies. Default: ``("h",)``
        parameters: names of the parameters per unit [H], which the step takes as keywords. A layer
            has them as ``<name>_l{k}`` and ``<name>_l{k}_reverse``. A dict of names and numbers
            gives their initial values, such as ``{"gain": 1, "shift": 0}``; otherwise they are
            drawn as the weights.
        name: of the class. Default: the name of the function. Instances can be pickled if the class
            has this name in the module of the function.

    Returns:
        a subclass of `fastrnn.DefinedLayer`.

    Raises:
        TypeError, ValueError: an argument is wrong, or the function does something that the kernels
            cannot do; the message names its file and line.
    """
    if step is None:
        return lambda function: define_cell(
            function, gates=gates, states=states, parameters=parameters, name=name
        )
    initial_values = _initial_values(parameters)
    states, parameters = _checked(step, gates, states, tuple(parameters))
    name = str(name or getattr(step, "__name__", "cell"))
    if not name.isidentifier():
        raise ValueError(f"define_cell: name must be an identifier, got {name!r}.")
    graph, results, names = trace(step, gates, states, parameters)
    _check_all_used(step, results, gates, parameters)
    derived, names = derive(graph, results, names, gates, len(parameters))
    source = write(derived, names)
    spec = _spec(name, source, derived)
    CELLS[spec.name] = BY_MODE[spec.mode] = spec
    reference.STEPS[spec.name] = _as_step(step, spec, parameters)
    attributes = {
        "__module__": getattr(step, "__module__", __name__),
        "__qualname__": name,
        "__doc__": step.__doc__ or f"A layer of the cell {name}, made by `fastrnn.define_cell`.",
        "step": staticmethod(step),
        "state_names": states,
        "unit_parameter_names": parameters,
        "initial_values": initial_values,
        "_spec": spec,
        "_code": source,
        "_comment": _comment(name, step, "row_contract" if derived.computes_rows else "contract"),
        "_wrong_input_message": f"{name}: Expected input to be 2D or 3D, got {{}}D instead",
    }
    return type(name, (DefinedLayer,), attributes)


def _initial_values(parameters: Any) -> dict[str, float]:
    if isinstance(parameters, str) or not isinstance(parameters, Iterable):
        raise TypeError(f"define_cell: parameters must be a tuple of names, got {parameters!r}.")
    if not isinstance(parameters, Mapping):
        return {}
    for name, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                f"define_cell: the initial value of {name!r} in parameters must be a number, got "
                f"{value!r}."
            )
    return {name: float(value) for name, value in parameters.items()}


def _checked(
    step: Any, gates: Any, states: Any, parameters: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not callable(step):
        raise TypeError(f"define_cell: step must be a function, got {type(step).__name__}.")
    if isinstance(gates, bool) or not isinstance(gates, int) or not 1 <= gates <= _MOST_GATES:
        raise ValueError(
            f"define_cell: gates must be an integer from 1 to {_MOST_GATES}, got {gates!r}."
        )
    for argument, names in (("states", states), ("parameters", parameters)):
        is_list = isinstance(names, Sequence) and not isinstance(names, str)
        if not is_list or not all(isinstance(n, str) for n in names):
            raise TypeError(f"define_cell: {argument} must be a tuple of names, got {names!r}.")
        for own in names:
            if not own.isidentifier() or keyword.iskeyword(own) or own in _TAKEN:
                raise ValueError(
                    f"define_cell: {argument} must be names that are free, got {own!r}."
                )
    states, parameters = tuple(states), tuple(parameters)
    if not 1 <= len(states) <= _MOST_STATES:
        raise ValueError(
            f"define_cell: states must be 1 to {_MOST_STATES} names, got {len(states)}."
        )
    everything = ("gates_x", "gates_h", *states, *parameters)
    if len(set(everything)) < len(everything):
        raise ValueError(
            f"define_cell: states and parameters must have different names, got {states} and "
            f"{parameters}."
        )
    return states, parameters


def _check_all_used(
    step: Any, results: list[Node], gates: int, parameters: tuple[str, ...]
) -> None:
    used = {(node.op, int(node.value)) for node in reachable(results) if node.is_leaf}
    for gate in range(gates):
        if ("gate_x", gate) not in used and ("gate_h", gate) not in used:
            raise ValueError(
                f"define_cell: {where_defined(step)}step must use every gate, got gates={gates} "
                f"and neither gates_x[{gate}] nor gates_h[{gate}] is used."
            )
    for number, name in enumerate(parameters):
        if ("parameter", number) not in used:
            raise ValueError(
                f"define_cell: {where_defined(step)}step must use every parameter, got {name!r}, "
                "which it does not use."
            )


def _spec(name: str, source: str, derived: Derived) -> CellSpec:
    # The name depends on the formulas, so that another cell with the name of the class is another
    # cell for the operators.
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    lower = re.sub(r"[^a-z0-9_]", "_", name.lower())[:40]
    cell = f"{lower}_{digest}"
    return CellSpec(
        name=cell,
        gates=derived.gates,
        saved=derived.saved_columns,
        pre=derived.pre,
        pre_x=derived.pre_x,
        pre_h=tuple(range(derived.gates)),
        states=len(derived.next_states),
        parameters=len(derived.d_parameters),
        dense=True,
        projects=False,
        reduced=False,
        torch=torch_facts(cell),
        defined=True,
        least_hidden=len(derived.saved_rows),
    )


def _as_step(
    step: Callable[..., Any], spec: CellSpec, parameters: tuple[str, ...]
) -> reference.Step:
    """Returns the function as `fastrnn.reference` calls it."""

    def run(
        gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Any, w_unit: Any
    ) -> tuple[Tensor, Tensor | None]:
        states = [h] if c is None else [h, *c.chunk(spec.cell_states, dim=-1)]
        units = () if w_unit is None else w_unit.chunk(len(parameters))
        own = dict(zip(parameters, units, strict=True))
        sides = [gates.chunk(spec.gates, dim=-1) for gates in (gates_x, gates_h)]
        result = step(*sides, *states, **own)
        # a state that is computed from parameters alone has no batch
        after = [t.expand_as(h) for t in ([result] if isinstance(result, Tensor) else result)]
        if c is None:
            return after[0], None
        return after[0], after[1] if len(after) == 2 else torch.cat(after[1:], dim=-1)

    return run


def _comment(name: str, step: Any, contract: str) -> str:
    """Returns the function's own source as a comment."""
    try:
        lines = textwrap.dedent(inspect.getsource(step)).rstrip().splitlines()
    except (OSError, TypeError):
        lines = []
    head = f"// {name}: written by fastrnn.define_cell as csrc/cells/{contract}.h describes."
    if not lines:
        return f"{head}\n\n"
    # a backslash at the end would continue the comment
    text = "\n".join(f"//     {line.rstrip(' ' + chr(92))}".rstrip() for line in lines)
    return f"{head} The step is\n//\n{text}\n\n"
