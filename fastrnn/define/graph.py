"""The formulas of a cell as a graph: what `trace` records, `derive` differentiates, and `source`
writes.

A graph keeps one node per formula, so that common subexpressions are shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

#: leaves: a pre-activation's input side and hidden side, their sum, a state, a parameter per unit,
#: the gradient at a state after the step, and H; ``value`` is their number
LEAVES = ("gate_x", "gate_h", "pre", "state", "parameter", "d_next_state", "units")
#: functions of csrc/cells/math.h and csrc/cells/more_math.h, and their cost in multiplications
FUNCTIONS = {
    "sigmoid": 12,
    "tanh": 14,
    "exp": 10,
    "log_sigmoid": 24,
    "relu": 1,
    "sqrt": 8,
    "rsqrt": 14,
    "absolute": 1,
    "sign": 2,
    "maximum": 3,
    "minimum": 3,
    "larger": 2,
    "clamp": 2,
    "within": 2,
    # a > b ? x : y, and a >= b ? x : y
    "select_gt": 2,
    "select_ge": 2,
}
_ARITHMETIC = {"add": 1, "sub": 1, "neg": 1, "mul": 1, "div": 6}
#: the sum and the maximum of a row's units, and their cost per unit
REDUCTIONS = {"row_sum": 1, "row_max": 2}
COST = {**FUNCTIONS, **_ARITHMETIC, **REDUCTIONS}


@dataclass(frozen=True, eq=False)
class Node:
    """A formula: an operation on other formulas, a leaf, or a constant.

    Attributes:
        op: one of `LEAVES`, `COST` or "constant".
        args: the operands.
        value: of a constant, or the number of a leaf.
        index: nodes have a larger index than their operands.
        is_row: whether the value is the same for all units of a row.
    """

    op: str
    args: tuple[Node, ...]
    value: float
    index: int
    is_row: bool

    @property
    def is_constant(self) -> bool:
        return self.op == "constant"

    @property
    def is_leaf(self) -> bool:
        return not self.args

    def is_number(self, value: float) -> bool:
        return self.is_constant and self.value == value


class Graph:
    """Makes nodes, each only once, and simplifies what costs nothing to simplify."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, tuple[int, ...], float], Node] = {}

    def constant(self, value: float) -> Node:
        return self._make("constant", (), float(value))

    def leaf(self, op: str, number: int) -> Node:
        return self._make(op, (), float(number))

    def apply(self, op: str, *args: Node) -> Node:
        """Returns the node of an operation."""
        if op in _ARITHMETIC:
            return self._arithmetic(op, args)
        if op in REDUCTIONS and args[0].is_row:
            units = self.leaf("units", 0)
            return args[0] if op == "row_max" else self.apply("mul", units, args[0])
        return self._make(op, args, 0.0)

    def _make(self, op: str, args: tuple[Node, ...], value: float) -> Node:
        key = (op, tuple(arg.index for arg in args), value)
        if key not in self._nodes:
            is_row = op in ("constant", "units", *REDUCTIONS) or (
                bool(args) and all(arg.is_row for arg in args)
            )
            self._nodes[key] = Node(op, args, value, len(self._nodes), is_row)
        return self._nodes[key]

    def _arithmetic(self, op: str, args: tuple[Node, ...]) -> Node:
        a, b = args[0], args[-1]
        if all(arg.is_constant for arg in args) and not (op == "div" and b.value == 0):
            folded = _fold(op, [arg.value for arg in args])
            if math.isfinite(folded):
                return self.constant(folded)
        if op == "neg":
            return a.args[0] if a.op == "neg" else self._make("neg", (a,), 0.0)
        if op == "add" and b.op == "neg":
            return self.apply("sub", a, b.args[0])
        if op == "add" and a.op == "neg":
            return self.apply("sub", b, a.args[0])
        if op == "sub" and b.op == "neg":
            return self.apply("add", a, b.args[0])
        if b.is_number(0 if op in ("add", "sub") else 1):
            return a
        if a.is_number(0) and op in ("add", "sub"):
            return b if op == "add" else self.apply("neg", b)
        if a.is_number(1) and op == "mul":
            return b
        if op in ("add", "sub") and a.is_row and a.op == b.op:
            if a.op == "row_sum":
                return self.apply("row_sum", self.apply(op, a.args[0], b.args[0]))
            if a.op == "div" and a.args[1] is b.args[1]:  # means
                return self.apply("div", self.apply(op, a.args[0], b.args[0]), a.args[1])
        if op in ("add", "mul") and a.index > b.index:  # in one order, so that they are shared
            a, b = b, a
        return self._make(op, (a, b), 0.0)


def _fold(op: str, values: list[float]) -> float:
    a, b = values[0], values[-1]
    if op == "neg":
        return -a
    if op == "add":
        return a + b
    if op == "sub":
        return a - b
    return a * b if op == "mul" else a / b


def reachable(roots: Iterable[Node], stop: frozenset[Node] = frozenset()) -> list[Node]:
    """Returns the nodes that roots consist of, operands first. Does not look below ``stop``."""
    found: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                waiting += node.args
    return sorted(found, key=lambda node: node.index)
