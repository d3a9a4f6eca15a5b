"""Records the operations of a step, which is called once with symbols instead of tensors."""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NoReturn

import torch

from fastrnn.define.graph import Graph, Node, reachable

_OWN_FOLDER = os.path.dirname(__file__)
_TORCH_FOLDER = os.path.dirname(torch.__file__)


class Kind(IntEnum):
    """The meaning of a symbol: the number of units, a tensor [..., 1], or a tensor [..., H]."""

    NUMBER = 0
    ROW = 1
    UNITS = 2


class Symbol:
    """Stands for a tensor, for a comparison of two, or for H, while a step is recorded."""

    graph: Graph
    node: Node
    kind: Kind
    #: the operation that selects by it, and its operands
    comparison: tuple[str, Node, Node] | None

    def __init__(
        self,
        graph: Graph,
        node: Node,
        kind: Kind = Kind.UNITS,
        comparison: tuple[str, Node, Node] | None = None,
    ):
        self.__dict__.update(graph=graph, node=node, kind=kind, comparison=comparison)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        operation = OPERATIONS.get(name)
        if operation is None:
            reject_operation(f"torch's {name}")
        return _call(name, operation, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "shape":
            return _Shape(self)
        if name == "size":
            return lambda dim=None: _Shape(self)[dim]
        if name in ("dtype", "device", "dim", "ndim"):
            reject(f"step must not read the {name} of a tensor, which the kernels do not know")
        operation = OPERATIONS.get(name)
        if operation is None:
            reject_operation(f"the method {name}")
        return lambda *args, **kwargs: _call(name, operation, (self, *args), kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        reject(f"step must not change a tensor, got an assignment to .{name}")

    def __bool__(self) -> NoReturn:
        reject("a branch must not depend on the values of a tensor; use torch.where")

    def __float__(self) -> NoReturn:
        reject("a Python number must not depend on the values of a tensor")

    __int__ = __index__ = __float__

    def __getitem__(self, index: Any) -> NoReturn:
        reject("an operation must act on all units, got an index into a tensor")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        reject("step must not change a tensor, got an assignment to a part of one")

    def __iter__(self) -> NoReturn:
        reject("an operation must act on all units, got an iteration over a tensor")

    def __matmul__(self, other: Any) -> NoReturn:
        reject_operation("@")

    __rmatmul__ = __matmul__
    __len__ = __iter__

    def __add__(self, other: Any) -> Any:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _div(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return apply("div", other, self)

    def __pow__(self, other: Any) -> Any:
        return _pow(self, other)

    def __rpow__(self, other: Any) -> NoReturn:
        reject("an exponent must be a number, got a tensor; use torch.exp")

    def _in_place(self, _: Any) -> NoReturn:
        reject("step must not change a tensor in place; write a = a + b instead of a += b")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = _in_place

    def __neg__(self) -> Any:
        return apply("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return apply("absolute", self)

    def __eq__(self, other: object) -> Any:
        reject("tensors must be compared with > >= < or <=, got == or !=")

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __gt__(self, other: Any) -> Any:
        return OPERATIONS["gt"](self, other)

    def __ge__(self, other: Any) -> Any:
        return OPERATIONS["ge"](self, other)

    def __lt__(self, other: Any) -> Any:
        return OPERATIONS["lt"](self, other)

    def __le__(self, other: Any) -> Any:
        return OPERATIONS["le"](self, other)


class _Shape:
    """The shape of a tensor, of which a step may read the last size."""

    def __init__(self, owner: Symbol) -> None:
        self._owner = owner

    def __getitem__(self, index: Any) -> Any:
        is_last = not isinstance(index, Symbol) and index in (-1, slice(-1, None))
        if self._owner.kind is not Kind.UNITS or not is_last:
            reject("of the shape of a tensor, step may read shape[-1] and shape[-1:] of [B,H] only")
        graph = self._owner.graph
        units = Symbol(graph, graph.leaf("units", 0), Kind.NUMBER)
        return units if index == -1 else (units,)

    def _reject(self) -> NoReturn:
        reject("of the shape of a tensor, step may read shape[-1] and shape[-1:] only")

    def __iter__(self) -> NoReturn:
        self._reject()

    def __len__(self) -> NoReturn:
        self._reject()


def _is_user(file: str) -> bool:
    return not file.startswith((_OWN_FOLDER, _TORCH_FOLDER))


def _user_line() -> tuple[str, int]:
    """Returns file and line of the innermost frame that is neither torch's nor of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if _is_user(frame.f_code.co_filename):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def reject(reason: str) -> NoReturn:
    """Raises an error about the line of the step that is being recorded."""
    file, line = _user_line()
    raise TypeError(f"define_cell: {file}, line {line}: {reason}.")


def reject_operation(name: str) -> NoReturn:
    reject(
        f"{name} cannot be fused; step may use + - * / and comparisons, and of torch "
        f"{', '.join(SHOWN)}"
    )


def _call(name: str, operation: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        bound = inspect.signature(operation).bind(*args, **kwargs)
    except TypeError as error:
        reject(f"{name} cannot be fused with these arguments ({error})")
    if bound.arguments.get("inplace"):
        reject(f"step must not change a tensor, got inplace=True for {name}")
    symbols = [value for value in bound.arguments.values() if isinstance(value, Symbol)]
    if symbols and _kind(*symbols) is Kind.NUMBER:
        reject(f"{name} must have a tensor, got a number")
    return operation(*args, **kwargs)


def _graph(*values: Any) -> Graph:
    for value in values:
        if isinstance(value, Symbol):
            return value.graph
    reject("an operation needs a tensor, got numbers alone")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_number(name: str, value: Any) -> None:
    if not _is_number(value):
        reject(f"{name} must be a number, got {_shown(value)}")


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Symbol) else repr(value)


def _node(graph: Graph, value: Any) -> Node:
    if isinstance(value, Symbol):
        if value.comparison is not None:
            reject("the result of a comparison can be used in torch.where only")
        return value.node
    if _is_number(value):
        try:
            constant = float(value)
        except OverflowError:
            reject("a constant must be finite, got an integer that no float can hold")
        if not math.isfinite(constant):
            reject(f"a constant must be finite, got {value}")
        return graph.constant(constant)
    kind = type(value).__name__
    reject(f"an operand must be an argument of step, computed from one, or a number, got a {kind}")


def _kind(*values: Any) -> Kind:
    return max((v.kind for v in values if isinstance(v, Symbol)), default=Kind.NUMBER)


def apply(op: str, *values: Any) -> Symbol:
    """Returns the symbol of an operation of the graph."""
    graph = _graph(*values)
    node = graph.apply(op, *[_node(graph, value) for value in values])
    return Symbol(graph, node, _kind(*values))


def _compare(op: str) -> Callable[[Any, Any], Symbol]:
    def compare(input: Any, other: Any) -> Symbol:
        graph = _graph(input, other)
        a, b = _node(graph, input), _node(graph, other)
        if op in ("lt", "le"):
            a, b = b, a
        select = "select_gt" if op in ("gt", "lt") else "select_ge"
        return Symbol(graph, a, _kind(input, other), (select, a, b))

    return compare


def _add(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    _check_number("alpha of add", alpha)
    return apply("add", input, other if alpha == 1 else apply("mul", other, alpha))


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    _check_number("alpha of sub", alpha)
    return apply("sub", input, other if alpha == 1 else apply("mul", other, alpha))


def _where(condition: Any, input: Any, other: Any) -> Symbol:
    if not isinstance(condition, Symbol) or condition.comparison is None:
        reject("the condition of torch.where must be a comparison with > >= < or <=")
    select, a, b = condition.comparison
    graph = condition.graph
    node = graph.apply(select, a, b, _node(graph, input), _node(graph, other))
    return Symbol(graph, node, _kind(condition, input, other))


def _pow(input: Any, exponent: Any) -> Symbol:
    if isinstance(exponent, float) and exponent in (0.5, -0.5):
        return apply("sqrt" if exponent > 0 else "rsqrt", input)
    if not isinstance(exponent, int) or not 1 <= exponent <= 8:
        reject(f"an exponent must be 0.5, -0.5 or an integer from 1 to 8, got {_shown(exponent)}")
    result: Symbol = input
    for _ in range(exponent - 1):
        result = apply("mul", result, input)
    return result


def _clamp(input: Any, min: Any = None, max: Any = None) -> Symbol:
    for bound in (min, max):
        if bound is not None and not _is_number(bound):
            reject("the bounds of clamp must be numbers; use torch.maximum and torch.minimum")
    if min is None or max is None:
        if min is None and max is None:
            reject("clamp needs min or max")
        if min is not None:
            return _where(_compare("lt")(input, min), min, input)
        return _where(_compare("gt")(input, max), max, input)
    if min > max:
        reject(f"the bounds of clamp must not be in the wrong order, got {min} and {max}")
    return apply("clamp", input, min, max)


def _larger(op: str) -> Callable[..., Symbol]:
    def larger(input: Any, other: Any = None) -> Symbol:
        for value in (input, other):
            if not isinstance(value, Symbol) or value.kind is Kind.NUMBER:
                reject(f"{op} must have two tensors, got {_shown(value)}; use clamp for a number")
        return apply(op, input, other)

    return larger


def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Symbol:
    _check_number("negative_slope of leaky_relu", negative_slope)
    return _where(_compare("gt")(input, 0), input, apply("mul", input, negative_slope))


def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Symbol:
    _check_number("alpha of elu", alpha)
    is_positive = _compare("gt")(input, 0)
    bounded = _where(is_positive, 0, input)  # so that exp does not overflow
    negative = apply("mul", apply("sub", apply("exp", bounded), 1), alpha)
    return _where(is_positive, input, negative)


def _hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Symbol:
    _check_number("min_val of hardtanh", min_val)
    _check_number("max_val of hardtanh", max_val)
    # torch's derivative is 0 at the bounds
    x = _where(_compare("le")(input, min_val), min_val, input)
    return _where(_compare("ge")(x, max_val), max_val, x)


def _hardsigmoid(input: Any, inplace: bool = False) -> Symbol:
    return apply("div", _hardtanh(apply("add", input, 3), 0, 6), 6)


_THRESHOLD = 20


def _softplus(input: Any, beta: float = 1, threshold: float = _THRESHOLD) -> Symbol:
    _check_number("beta of softplus", beta)
    if beta != 1:
        reject(f"beta of softplus must be 1, got {beta!r}")
    _check_number("threshold of softplus", threshold)
    result = apply("neg", apply("log_sigmoid", apply("neg", input)))
    # Beyond torch's own threshold the function is the identity but for e^-20.
    if threshold == _THRESHOLD:
        return result
    return _where(_compare("gt")(input, threshold), input, result)


def _lerp(input: Any, end: Any, weight: Any) -> Symbol:
    return apply("add", input, apply("mul", weight, apply("sub", end, input)))


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Symbol:
    _check_number("value of addcmul", value)
    product = apply("mul", tensor1, tensor2)
    return apply("add", input, product if value == 1 else apply("mul", product, value))


def _unary(op: str) -> Callable[..., Symbol]:
    return lambda input: apply(op, input)


def _binary(op: str) -> Callable[..., Symbol]:
    return lambda input, other: apply(op, input, other)


def _div(input: Any, other: Any) -> Symbol:
    if _is_number(other) and other == 0:
        reject("a divisor must not be 0")
    return apply("div", input, other)


def _filled(value: float) -> Callable[..., Symbol]:
    def filled(input: Any) -> Symbol:
        graph = _graph(input)
        return Symbol(graph, graph.constant(value), input.kind)

    return filled


def _reduce(op: str, input: Any) -> Symbol:
    """Returns a reduction over the units [..., 1]."""
    if not isinstance(input, Symbol) or input.kind is not Kind.UNITS:
        reject("a reduction over the units must have a tensor [B,H]")
    graph = input.graph
    return Symbol(graph, graph.apply(op, _node(graph, input)), Kind.ROW)


def _check_dim(name: str, dim: Any, keepdim: Any = True) -> None:
    if isinstance(dim, Symbol) or dim not in (-1, (-1,), [-1]) or keepdim is not True:
        reject(
            f"{name} must have dim=-1 and keepdim=True, got dim={_shown(dim)} and "
            f"keepdim={_shown(keepdim)}"
        )


def _units(input: Symbol) -> Symbol:
    return Symbol(input.graph, input.graph.leaf("units", 0), Kind.NUMBER)


def _mean_of(input: Any) -> Symbol:
    return apply("div", _reduce("row_sum", input), _units(input))


def _variance_of(input: Any, correction: int) -> Symbol:
    centred = apply("sub", input, _mean_of(input))
    squares = _reduce("row_sum", apply("mul", centred, centred))
    return apply("div", squares, apply("sub", _units(input), correction))


def _sum(input: Any, dim: Any = None, keepdim: bool = False) -> Symbol:
    _check_dim("sum", dim, keepdim)
    return _reduce("row_sum", input)


def _mean(input: Any, dim: Any = None, keepdim: bool = False) -> Symbol:
    _check_dim("mean", dim, keepdim)
    return _mean_of(input)


def _var(
    input: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: int | None = None,
) -> Symbol:
    _check_dim("var", dim, keepdim)
    if correction is None:
        correction = 1 if unbiased else 0
    if not _is_number(correction) or correction not in (0, 1):
        reject(f"correction of var must be 0 or 1, got {_shown(correction)}")
    return _variance_of(input, int(correction))


def _std(input: Any, *args: Any, **kwargs: Any) -> Symbol:
    return apply("sqrt", _call("std", _var, (input, *args), kwargs))


def _softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Symbol:
    _check_dim("softmax", dim)
    if dtype is not None:
        reject(f"dtype of softmax must be None, got {dtype}")
    powers = apply("exp", apply("sub", input, _reduce("row_max", input)))
    return apply("div", powers, _reduce("row_sum", powers))


def _check_normalised(
    name: str, input: Any, normalized_shape: Any, eps: Any, **parameters: Any
) -> None:
    sizes = normalized_shape if isinstance(normalized_shape, tuple | list) else ()
    if len(sizes) != 1 or not isinstance(sizes[0], Symbol) or sizes[0].node.op != "units":
        reject(f"normalized_shape of {name} must be x.shape[-1:]")
    _check_number(f"eps of {name}", eps)
    for own, value in parameters.items():
        if value is None:
            continue
        leaves = {n.op for n in reachable([_node(_graph(input), value)]) if n.is_leaf}
        if _kind(value) is not Kind.UNITS or not leaves <= {"parameter", "constant", "units"}:
            reject(f"{own} of {name} must be a parameter [H] or computed from parameters")


def _scaled(value: Symbol, weight: Any, bias: Any) -> Symbol:
    value = value if weight is None else apply("mul", value, weight)
    return value if bias is None else apply("add", value, bias)


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Symbol:
    _check_normalised("layer_norm", input, normalized_shape, eps, weight=weight, bias=bias)
    centred = apply("sub", input, _mean_of(input))
    squares = apply("div", _reduce("row_sum", apply("mul", centred, centred)), _units(input))
    scale = apply("rsqrt", apply("add", squares, eps))
    return _scaled(apply("mul", centred, scale), weight, bias)


def _rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Symbol:
    _check_normalised("rms_norm", input, normalized_shape, eps, weight=weight)
    scale = apply("rsqrt", apply("add", _mean_of(apply("mul", input, input)), eps))
    return _scaled(apply("mul", input, scale), weight, None)


#: what a step may call, by the name of torch's functions and methods
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "mul": _binary("mul"),
    "div": _div,
    "neg": _unary("neg"),
    "positive": lambda input: input,
    "sigmoid": _unary("sigmoid"),
    "tanh": _unary("tanh"),
    "relu": lambda input, inplace=False: apply("relu", input),
    "exp": _unary("exp"),
    "logsigmoid": _unary("log_sigmoid"),
    "softplus": _softplus,
    "silu": lambda input, inplace=False: apply("mul", input, apply("sigmoid", input)),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "hardtanh": _hardtanh,
    "relu6": lambda input, inplace=False: _hardtanh(input, 0, 6),
    "hardsigmoid": _hardsigmoid,
    "softsign": lambda input: apply("div", input, apply("add", apply("absolute", input), 1)),
    "abs": _unary("absolute"),
    "square": lambda input: apply("mul", input, input),
    "reciprocal": lambda input: apply("div", 1, input),
    "pow": _pow,
    "sqrt": _unary("sqrt"),
    "rsqrt": _unary("rsqrt"),
    "maximum": _larger("maximum"),
    "minimum": _larger("minimum"),
    "clamp": _clamp,
    "where": _where,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "gt": _compare("gt"),
    "ge": _compare("ge"),
    "lt": _compare("lt"),
    "le": _compare("le"),
    "zeros_like": _filled(0.0),
    "ones_like": _filled(1.0),
    "sum": _sum,
    "mean": _mean,
    "var": _var,
    "std": _std,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}
#: those of an error message
SHOWN = [name for name in OPERATIONS if name not in ("positive", "gt", "ge", "lt", "le")]
for _alias, _name in {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "expit": "sigmoid",
    "log_sigmoid": "logsigmoid",
    "absolute": "abs",
    "clip": "clamp",
    "max": "maximum",
    "min": "minimum",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
}.items():
    OPERATIONS[_alias] = OPERATIONS[_name]


def where_defined(step: Callable[..., Any]) -> str:
    """Returns the file and line of a function, for errors about all of it."""
    code = getattr(step, "__code__", None)
    return "" if code is None else f"{code.co_filename}, line {code.co_firstlineno}: "


def trace(
    step: Callable[..., Any], gates: int, states: tuple[str, ...], parameters: tuple[str, ...]
) -> tuple[Graph, list[Node], dict[Node, str]]:
    """Records a step.

    Returns:
        the graph, the states after the step, and the names that the step's variables give nodes.
    """
    graph = Graph()

    def symbols(op: str, count: int) -> tuple[Symbol, ...]:
        return tuple([Symbol(graph, graph.leaf(op, number)) for number in range(count)])

    args = (symbols("gate_x", gates), symbols("gate_h", gates), *symbols("state", len(states)))
    kwargs = dict(zip(parameters, symbols("parameter", len(parameters)), strict=True))
    place = where_defined(step)
    try:
        inspect.signature(step).bind(*args, **kwargs)
    except TypeError as error:
        expected = ", ".join(("gates_x", "gates_h", *states, *[f"{p}=" for p in parameters]))
        raise TypeError(
            f"define_cell: {place}step must take ({expected}), got an error: {error}."
        ) from None
    variables: dict[str, Any] = {}
    try:
        result = _call_and_watch(step, args, kwargs, variables)
    except TypeError as error:
        text = str(error)
        if text.startswith("define_cell: ") or not re.search(
            r"\b(Symbol|_Shape)\b|\(\): argument ", text
        ):
            raise
        # torch's own check of an argument, which must be a number or a tensor
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_user(f.filename)]
        file, line = (frames[-1].filename, frames[-1].lineno) if frames else ("", 0)
        raise TypeError(f"define_cell: {file}, line {line}: torch rejects it ({text}).") from None
    results = result if isinstance(result, tuple | list) else (result,)
    if len(results) != len(states):
        raise TypeError(
            f"define_cell: {place}step must return the next {', '.join(states)}, got "
            f"{len(results)} value(s)."
        )
    for name, value in zip(states, results, strict=True):
        if (
            not isinstance(value, Symbol)
            or value.comparison is not None
            or value.kind is Kind.NUMBER
        ):
            raise TypeError(
                f"define_cell: {place}step must return tensors computed from its arguments, got "
                f"{type(value).__name__} for {name}."
            )
    names: dict[Node, str] = {}
    for name, value in variables.items():
        if isinstance(value, Symbol) and value.comparison is None and name not in kwargs:
            names.setdefault(value.node, name)
    return graph, [value.node for value in results], names


def _call_and_watch(
    step: Callable[..., Any], args: Any, kwargs: Any, variables: dict[str, Any]
) -> Any:
    """Calls a step and stores the variables that it has at its end."""
    code = getattr(step, "__code__", None)
    before = sys.getprofile()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is code:
            variables.update(frame.f_locals)

    sys.setprofile(watch)
    try:
        return step(*args, **kwargs)
    finally:
        sys.setprofile(before)
