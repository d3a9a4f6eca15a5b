"""Turns a recorded step into a cell: pre-activations, derivatives, and what forward saves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fastrnn.define.graph import COST, REDUCTIONS, Graph, Node, reachable

# Cost of a value in multiplications. To save one, forward writes it and backward reads it, and it
# takes memory until then; h and h' are in memory anyway. A tanh costs less than a saved value, as
# in csrc/cells/lstm.h. A value per row costs next to nothing; another reduction is another loop.
_SAVED, _READ = 16.0, 4.0
_SAVED_ROW, _REDUCTION = 0.25, 8.0
_PER_ROW = 1 / 32  # cost of an operation on a value per row, relative to one on a value per unit


@dataclass(frozen=True)
class Derived:
    """A cell as csrc/cells/contract.h describes it.

    Attributes:
        gates, pre, pre_x: the traits of these names.
        saved: what forward saves per unit; the cell states are the last ones.
        saved_rows: what forward saves per row.
        next_states: the states after the step.
        d_pre, d_states, d_parameters: the gradients; None for 0.
        reads_next_h: whether backward reads h'.
    """

    gates: int
    pre: int
    pre_x: tuple[int, ...]
    saved: tuple[Node, ...]
    saved_rows: tuple[Node, ...]
    next_states: tuple[Node, ...]
    d_pre: tuple[Node | None, ...]
    d_states: tuple[Node | None, ...]
    d_parameters: tuple[Node | None, ...]
    reads_next_h: bool

    @property
    def gradients(self) -> list[Node]:
        every = (*self.d_pre, *self.d_states, *self.d_parameters)
        return [node for node in every if node is not None]

    @property
    def computes_rows(self) -> bool:
        """Whether a step computes whole rows, because it reduces over the units of one."""
        nodes = reachable([*self.next_states, *self.saved, *self.gradients])
        return any(node.op in REDUCTIONS or node.op == "units" for node in nodes)

    @property
    def saved_columns(self) -> int:
        """Columns [H] of the saved values. Values per row share the last one."""
        return len(self.saved) + bool(self.saved_rows)

    @property
    def saved_state(self) -> int:
        """Index of the first cell state in ``saved``, or -1."""
        cells = len(self.next_states) - 1
        return len(self.saved) - cells if cells else -1


def derive(
    graph: Graph, results: list[Node], names: dict[Node, str], gates: int, parameters: int
) -> tuple[Derived, dict[Node, str]]:
    """Returns the cell of a recorded step, and the names of its nodes."""
    replaced, pre, pre_x = _place_gates(graph, results, gates)
    results = [replaced[node] for node in results]
    names = {replaced[node]: name for node, name in names.items() if node in replaced}
    forward = frozenset(reachable(results))
    adjoints = _differentiate(graph, results)

    def of(op: str, count: int) -> tuple[Node | None, ...]:
        return tuple([adjoints.get(graph.leaf(op, number)) for number in range(count)])

    d_pre, d_states = of("pre", pre), of("state", len(results))
    d_parameters = of("parameter", parameters)
    gradients = [n for n in (*d_pre, *d_states, *d_parameters) if n is not None]
    needed = {n for n in reachable(gradients, forward) if n in forward}
    needed = {n for n in needed if not _is_fixed(n)}
    chosen = _choose_saved(needed, results)
    ordered = sorted((n for n in chosen if _must_save(n)), key=lambda node: node.index)
    saved_rows = tuple([n for n in ordered if n.is_row])
    kept = [n for n in ordered if n not in results and not n.is_row]
    h = results[0]
    reads_next_h = h in ordered and h not in results[1:] and not h.is_row
    saved = (*kept, *results[1:])
    for node, name in list(names.items()):
        if node in adjoints:
            names.setdefault(adjoints[node], f"d_{name}")
    return (
        Derived(
            gates,
            pre,
            pre_x,
            saved,
            saved_rows,
            tuple(results),
            d_pre,
            d_states,
            d_parameters,
            reads_next_h,
        ),
        names,
    )


def _must_save(node: Node) -> bool:
    """Whether a value is neither a state before the step, nor a parameter, nor a constant."""
    return node.op not in ("state", "parameter") and not _is_fixed(node)


def _is_fixed(node: Node) -> bool:
    """Whether a value depends on constants and the number of units alone."""
    if node.is_leaf:
        return node.op in ("constant", "units")
    return node.is_row and node.op not in REDUCTIONS and all(map(_is_fixed, node.args))


def _place_gates(
    graph: Graph, results: list[Node], gates: int
) -> tuple[dict[Node, Node], int, tuple[int, ...]]:
    """Replaces the sides of the gates by pre-activations.

    The kernels add both sides of a gate if the step only uses their sum. From the first gate on of
    which it uses a side alone, they keep the sides apart: the contract wants ``kPreX`` to ascend.

    Returns:
        the new node of each old one, the number of pre-activations, ``kPreX``.
    """
    users = Counter(arg for node in reachable(results) for arg in set(node.args))
    users.update(results)
    sums: set[Node] = set()

    def terms(node: Node, is_root: bool) -> list[Node]:
        """Returns the terms of a sum, whose partial sums are used nowhere else."""
        if node.op == "add" and (is_root or users[node] == 1):
            return [term for arg in node.args for term in terms(arg, False)]
        return [node]

    replaced: dict[Node, Node] = {}
    for node in reachable(results):
        if node.op != "add":
            args = [replaced[arg] for arg in node.args]
            replaced[node] = graph.apply(node.op, *args) if args else node
            continue
        parts = terms(node, True)
        pairs = [
            (part, other)
            for part in parts
            if part.op == "gate_x"
            for other in parts
            if other.op == "gate_h" and other.value == part.value
        ]
        for x, h in pairs:
            if x in parts and h in parts:
                parts.remove(x)
                parts.remove(h)
                whole = graph.apply("add", x, h)
                sums.add(whole)
                parts.insert(0, whole)
        total: Node | None = None
        for part in parts:
            own = part if part in sums else replaced[part]
            total = own if total is None else graph.apply("add", total, own)
        assert total is not None
        replaced[node] = total
    # sides that are used outside of their sum
    roots = [replaced[node] for node in results]
    read = [arg for node in reachable(roots) if node not in sums for arg in node.args]
    alone = {int(node.value) for node in (*roots, *read) if node.op in ("gate_x", "gate_h")}
    first = min(alone, default=gates)
    pre_x = tuple(range(first)) + tuple(gates + number for number in range(gates - first))
    pre = 2 * gates - first
    final: dict[Node, Node] = {}
    for node in reachable(replaced.values()):
        gate = int(node.value) if node.op in ("gate_x", "gate_h") else 0
        if node.op == "gate_x":
            final[node] = graph.leaf("pre", pre_x[gate])
        elif node.op == "gate_h":
            final[node] = graph.leaf("pre", gate)
        elif node in sums and int(node.args[0].value) < first:
            final[node] = graph.leaf("pre", int(node.args[0].value))
        elif node.args:
            final[node] = graph.apply(node.op, *[final[arg] for arg in node.args])
        else:
            final[node] = node
    return {old: final[new] for old, new in replaced.items()}, pre, pre_x


def _differentiate(graph: Graph, results: list[Node]) -> dict[Node, Node]:
    """Returns the gradient at every node that results depend on."""
    forward = frozenset(reachable(results))
    adjoints: dict[Node, Node] = {}
    # Of values per row: the gradient at each unit, whose sum is added when the others are complete.
    of_units: dict[Node, Node] = {}

    def add(node: Node, gradient: Node, is_row: bool) -> None:
        found = adjoints if is_row or not node.is_row else of_units
        if node.op not in ("constant", "units"):
            before = found.get(node)
            found[node] = gradient if before is None else graph.apply("add", before, gradient)

    for number, node in enumerate(results):
        add(node, graph.leaf("d_next_state", number), False)
    for node in reversed(reachable(results)):
        if node in of_units:
            add(node, _sum_over_units(graph, of_units[node], forward), True)
        gradient = adjoints.get(node)
        if gradient is not None:
            for arg, own in zip(node.args, _derivatives(graph, node, gradient), strict=True):
                if own is not None:
                    add(arg, own, node.is_row)
    return adjoints


def _sum_over_units(graph: Graph, node: Node, forward: frozenset[Node]) -> Node:
    """Returns the sum of a gradient over the units, with the factors per row outside of the sum.

    A factor per row often comes from another sum. Outside, both sums can be computed in one loop:
    in layer normalisation, sum(a + r b) = sum(a) + r sum(b), where r contains the sum of d (x - m).
    """
    one = graph.constant(1)
    rests: dict[Node, Node] = {}  # by factor
    for is_negative, term in _terms(node, False, forward):
        factor, rest = _factor(graph, term)
        if factor.is_constant:
            factor, rest = one, term
        before = rests.get(factor)
        if before is None:
            rests[factor] = graph.apply("neg", rest) if is_negative else rest
        else:
            rests[factor] = graph.apply("sub" if is_negative else "add", before, rest)
    result = graph.constant(0)
    for factor, rest in rests.items():
        is_sum = factor is not one and rest.op in ("add", "sub", "neg") and rest not in forward
        own = _sum_over_units(graph, rest, forward) if is_sum else graph.apply("row_sum", rest)
        result = graph.apply("add", result, graph.apply("mul", factor, own))
    return result


def _terms(node: Node, is_negative: bool, forward: frozenset[Node]) -> list[tuple[bool, Node]]:
    """Returns the terms of a sum, and whether they are subtracted. Values of forward are whole."""
    if node in forward:
        return [(is_negative, node)]
    if node.op == "neg":
        return _terms(node.args[0], not is_negative, forward)
    if node.op in ("add", "sub"):
        a, b = node.args
        return [
            *_terms(a, is_negative, forward),
            *_terms(b, is_negative ^ (node.op == "sub"), forward),
        ]
    return [(is_negative, node)]


def _factor(graph: Graph, node: Node) -> tuple[Node, Node]:
    """Returns a value as a product of a value per row and the rest."""
    one = graph.constant(1)
    if node.is_row:
        return node, one
    if node.op == "neg":
        factor, rest = _factor(graph, node.args[0])
        return factor, graph.apply("neg", rest)
    if node.op == "mul":
        (fa, a), (fb, b) = (_factor(graph, arg) for arg in node.args)
        return graph.apply("mul", fa, fb), graph.apply("mul", a, b)
    if node.op == "div":
        factor, rest = _factor(graph, node.args[0])
        if node.args[1].is_row:
            return graph.apply("div", factor, node.args[1]), rest
        return factor, graph.apply("div", rest, node.args[1])
    return one, node


def _derivatives(graph: Graph, node: Node, d: Node) -> list[Node | None]:
    """Returns the gradients at the operands of a node from that at the node."""
    apply, constant, op = graph.apply, graph.constant, node.op
    zero, one = constant(0), constant(1)
    if not node.args:
        return []
    a, b = node.args[0], node.args[-1]
    if op == "add":
        return [d, d]
    if op == "sub":
        return [d, apply("neg", d)]
    if op == "neg":
        return [apply("neg", d)]
    if op == "mul":
        return [apply("mul", d, b), apply("mul", d, a)]
    if op == "div":
        d_a = apply("div", d, b)
        return [d_a, apply("neg", apply("mul", d_a, node))]
    if op == "sigmoid":
        return [apply("mul", apply("mul", d, node), apply("sub", one, node))]
    if op == "tanh":
        return [apply("mul", d, apply("sub", one, apply("mul", node, node)))]
    if op == "exp":
        return [apply("mul", d, node)]
    if op == "log_sigmoid":
        return [apply("mul", d, apply("sigmoid", apply("neg", a)))]
    if op == "sqrt":
        return [apply("div", d, apply("add", node, node))]
    if op == "rsqrt":
        return [apply("mul", apply("mul", d, constant(-0.5)), _cube(graph, node))]
    if op == "row_sum":
        return [d]
    if op == "row_max":
        return [None]  # softmax does not depend on what it subtracts
    if op == "relu":
        return [apply("select_ge", zero, node, zero, d)]
    if op == "absolute":
        return [apply("mul", d, apply("sign", a))]
    if op in ("maximum", "minimum"):
        share = apply("larger", a, b) if op == "maximum" else apply("larger", b, a)
        return [apply("mul", d, share), apply("mul", d, apply("sub", one, share))]
    if op == "clamp":
        return [apply("mul", d, apply("within", *node.args)), None, None]
    assert op in ("select_gt", "select_ge"), op
    a, b, _, _ = node.args
    return [None, None, apply(op, a, b, d, zero), apply(op, a, b, zero, d)]


def _cube(graph: Graph, node: Node) -> Node:
    return graph.apply("mul", node, graph.apply("mul", node, node))


def _choose_saved(needed: set[Node], results: list[Node]) -> frozenset[Node]:
    """Chooses the values from which backward computes those that it needs.

    A search for the cheapest choice: it starts with all that is needed, and computes one more value
    again, or saves the operands of one instead, as long as that costs less.
    """
    free = frozenset([node for node in results[1:] if not node.is_row])
    chosen = frozenset(n for n in needed if n.op in ("state", "parameter") or n not in free)
    best = _cost(chosen, free, needed, results[0])
    while True:
        candidates: list[frozenset[Node]] = []
        for node in chosen:
            candidates.append(chosen - {node})
            if node.args:
                operands = {arg for arg in node.args if not _is_fixed(arg)}
                candidates.append((chosen - {node}) | operands)
        costs = [(_cost(choice, free, needed, results[0]), choice) for choice in candidates]
        cost, choice = min(costs, key=lambda pair: pair[0], default=(math.inf, chosen))
        if cost >= best:
            return chosen
        best, chosen = cost, choice


def _cost(chosen: frozenset[Node], free: frozenset[Node], needed: Iterable[Node], h: Node) -> float:
    """Returns the cost of a choice; infinite if it does not suffice."""
    cost = 0.0
    for node in chosen - free:
        if node.is_row:
            cost += _SAVED_ROW
        elif node is h or (node.op == "state" and node.value == 0):
            cost += _READ
        elif _must_save(node):
            cost += _SAVED
    for node in reachable(needed, chosen | free):
        if node in chosen or node in free or node.op == "parameter" or _is_fixed(node):
            continue
        if node.op == "state":
            cost += _READ if node.value == 0 else 0.0
        elif node.is_leaf:
            return math.inf  # a pre-activation
        elif node.op in REDUCTIONS:
            cost += _REDUCTION
        else:
            cost += COST[node.op] * (_PER_ROW if node.is_row else 1)
    return cost
