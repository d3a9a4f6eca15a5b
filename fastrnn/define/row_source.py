"""Writes the C++ header of a derived cell whose step reduces over the units of a row.

csrc/cells/row_contract.h describes what a cell provides then: forward and backward compute
a whole row. They are loops over its units, cut where a reduction must be complete. A value per
unit that a later loop needs is computed there again if that is cheap, else kept in a buffer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastrnn.define.derive import Derived
from fastrnn.define.graph import COST, REDUCTIONS, Node, reachable
from fastrnn.define.text import Expressions, free_name, traits, wrapped

# Cost of loading a value, and the cost up to which one is computed again instead of kept, both in
# multiplications.
_LOAD, _MOST_AGAIN = 2, 12

_LEAVES = {
    "pre": ("at.pre(", ")"),
    "state": ("at.state(", ")"),
    "parameter": ("at.parameter(", ")"),
    "d_next_state": ("at.d_next_state(", ")"),
    "units": ("row.units()", ""),
}
# What the last loop replaces, so it must load these before it stores anything.
_REPLACED = ("state", "d_next_state")
_TAKEN = ("row", "at", "units", "cell")


@dataclass
class _Target:
    """A result of a function.

    Attributes:
        name: what stores it, such as ``at.set_saved``.
        index: its number.
        node: its value; None for 0.
        load: what loads it in a later loop, or "" if nothing does; it is stored in the last loop.
    """

    name: str
    index: int
    node: Node | None
    load: str = ""


@dataclass
class _Loop:
    """A loop over the units.

    Attributes:
        roots: what it computes.
        reductions: those that it completes.
        targets: the results that it stores.
        kept: the values that it stores in buffers.
    """

    roots: list[Node] = field(default_factory=list)
    reductions: list[Node] = field(default_factory=list)
    targets: list[_Target] = field(default_factory=list)
    kept: list[Node] = field(default_factory=list)


class _Schedule:
    """Divides the values of a function between loops.

    Attributes:
        loops: the loops in order.
        level: for each value, the first loop that can compute it; for a value per row, the loop
            before which it is computed.
        loads: how a loop after that of a value loads it.
        buffers: the number of buffers.
    """

    def __init__(
        self, targets: Sequence[_Target], row_targets: Sequence[Node], known: frozenset[Node]
    ) -> None:
        roots = [target.node for target in targets if target.node is not None]
        self._known = known
        self.nodes = reachable([*roots, *row_targets], known)
        self.level: dict[Node, int] = {}
        for node in self.nodes:
            args = () if node in known else node.args
            after = int(node.op in REDUCTIONS and node not in known)
            self.level[node] = max((self.level[arg] for arg in args), default=0) + after
        count = 1 + max(self.level.values(), default=0)
        self.loops = [_Loop() for _ in range(count)]
        self.loads: dict[Node, str] = {}
        self.buffers = 0
        for target in targets:
            place = count - 1
            if target.load and target.node is not None and not target.node.is_row:
                place = self.level[target.node]
                if target.node.args and target.node not in known:
                    self.loads.setdefault(target.node, f"{target.load}({target.index})")
            self.loops[place].targets.append(target)
        for node in self.nodes:
            if node.op in REDUCTIONS and node not in known:
                self.loops[self.level[node] - 1].reductions.append(node)
        for place in reversed(range(count)):
            loop = self.loops[place]
            loop.roots = [node.args[0] for node in loop.reductions]
            loop.roots += [t.node for t in loop.targets if t.node is not None]
            loop.roots += loop.kept
            for root in loop.roots:
                self._visit(root, place)

    def is_loaded(self, node: Node, place: int) -> bool:
        """Whether a loop reads a value from memory or has it as a value per row."""
        return (
            node.is_row
            or node in self._known
            or not node.args
            or (node in self.loads and self.level[node] < place)
        )

    def _visit(self, node: Node, place: int) -> None:
        if self.is_loaded(node, place):
            return
        if self.level[node] < place and self._cost_again(node, place) > _MOST_AGAIN:
            self.loads[node] = f"at.buffer({self.buffers})"
            self.buffers += 1
            self.loops[self.level[node]].kept.append(node)
            return
        for arg in node.args:
            self._visit(arg, place)

    def _cost_again(self, node: Node, place: int) -> int:
        cost, seen, waiting = 0, set[Node](), [node]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.is_loaded(node, place):
                cost += 0 if node.is_row else _LOAD
            else:
                cost += COST[node.op]
                waiting += node.args
        return cost


class _Function:
    """Writes one function."""

    def __init__(
        self,
        schedule: _Schedule,
        row_targets: Sequence[Node],
        known: dict[Node, str],
        names: dict[Node, str],
    ) -> None:
        self._schedule = schedule
        self._known = known
        self._names = names
        self._rows: dict[Node, str] = {}  # the values per row that have a name
        self._taken = set(_TAKEN)
        self.lines: list[str] = []
        users = Counter(arg for n in schedule.nodes if n not in known for arg in n.args)
        users.update(row_targets)
        read_by_units = {
            arg
            for node in schedule.nodes
            if not node.is_row and node not in known
            for arg in node.args
        }
        for loop in schedule.loops:
            read_by_units.update(t.node for t in loop.targets if t.node is not None)
        for place in range(len(schedule.loops)):
            for node in schedule.nodes:
                is_own = node.is_row and schedule.level[node] == place
                if not is_own or node.op in ("constant", "units"):
                    continue
                if node in known or node in names or node in read_by_units or users[node] > 1:
                    text = self._row_text().text(node)[0]
                    self._rows[node] = free_name(names.get(node), self._taken)
                    self._line(f"const A {self._rows[node]} = {text};", 4)
            self._write_loop(place)
        for number, node in enumerate(row_targets):
            self._line(f"row.set_saved({number}, {self._row_text().text(node)[0]});", 4)

    def _line(self, text: str, indent: int) -> None:
        self.lines.append(wrapped(text, indent))

    def _row_text(self) -> Expressions:
        return Expressions({**self._known, **self._rows}, _LEAVES)

    def _write_loop(self, place: int) -> None:
        schedule, loop = self._schedule, self._schedule.loops[place]
        accumulators: list[tuple[str, str, Node]] = []
        for node in loop.reductions:
            is_sum = node.op == "row_sum"
            own = free_name("sum1" if is_sum else "largest1", self._taken)
            self._line(f"A {own} = {'number<A>(0.0)' if is_sum else 'row.lowest()'};", 4)
            accumulators.append((own, "add" if is_sum else "raise", node))
        self._line("row.for_units([&](const auto& at) FASTRNN_INLINED {", 4)
        known = {**self._known, **self._rows}
        nodes: set[Node] = set()
        users: Counter[Node] = Counter(loop.roots)

        def visit(node: Node) -> None:
            if node in nodes or node.is_row:
                return
            nodes.add(node)
            if not schedule.is_loaded(node, place):
                for arg in node.args:
                    visit(arg)
                users.update(node.args)

        for root in loop.roots:
            visit(root)
        taken = set(self._taken)
        for node in sorted(nodes, key=lambda node: node.index):
            is_loaded = schedule.is_loaded(node, place)
            name = self._names.get(node)
            is_replaced = node.op in _REPLACED and place == len(schedule.loops) - 1
            if name is None and not is_replaced and (users[node] < 2 or node.op == "neg"):
                if is_loaded and node in schedule.loads:
                    known[node] = schedule.loads[node]
                continue
            expressions = Expressions(known, _LEAVES)
            is_reloaded = is_loaded and node in schedule.loads
            text = schedule.loads[node] if is_reloaded else expressions.text(node)[0]
            known[node] = free_name(name, taken)
            self._line(f"const A {known[node]} = {text};", 6)
        text_of = Expressions(known, _LEAVES)
        for own, method, node in accumulators:
            self._line(f"at.{method}({own}, {text_of.text(node.args[0])[0]});", 6)
        for node in loop.kept:
            buffer = schedule.loads[node].replace("at.buffer(", "at.set_buffer(")
            self._line(f"{buffer[:-1]}, {text_of.text(node)[0]});", 6)
        for target in loop.targets:
            value = "number<A>(0.0)" if target.node is None else text_of.text(target.node)[0]
            self._line(f"{target.name}({target.index}, {value});", 6)
        self._line("});", 4)
        for own, method, node in accumulators:
            total = "total" if method == "add" else "largest"
            self._known = {**self._known, node: f"row.{total}({own})"}


def _written(
    targets: Sequence[_Target],
    row_targets: Sequence[Node],
    known: dict[Node, str],
    names: dict[Node, str],
) -> tuple[list[str], int]:
    """Returns the lines of a function and the number of its buffers."""
    schedule = _Schedule(targets, row_targets, frozenset(known))
    return _Function(schedule, row_targets, known, names).lines, schedule.buffers


def write_rows(derived: Derived, names: dict[Node, str]) -> str:
    """Returns the struct ``DefinedCell`` of a cell whose step computes whole rows."""
    saved, results = derived.saved, derived.next_states
    targets = [_Target("at.set_saved", k, node, "at.saved") for k, node in enumerate(saved)]
    targets += [_Target("at.set_next_state", k, node) for k, node in enumerate(results)]
    forward, forward_buffers = _written(targets, derived.saved_rows, {}, names)

    known = {
        node: f"at.saved({k})"
        for k, node in enumerate(saved)
        if not node.is_row and (node.args or node.op == "pre")
    }
    known |= {node: f"row.saved({k})" for k, node in enumerate(derived.saved_rows)}
    if derived.reads_next_h:
        known[results[0]] = "at.next_state(0)"
    gradients = [("d_pre", derived.d_pre), ("d_parameter", derived.d_parameters)]
    targets = [
        _Target(f"at.set_{name}", k, node, f"at.{name}")
        for name, nodes in gradients
        for k, node in enumerate(nodes)
    ]
    targets += [_Target("at.set_d_state", k, node) for k, node in enumerate(derived.d_states)]
    backward, backward_buffers = _written(targets, (), known, names)

    lines = [
        "namespace fastrnn::cells {",
        "",
        "struct DefinedCell {",
        *traits(
            derived,
            forward_reads_h="at.state(0)" in "\n".join(forward),
            backward_reads_h="at.state(0)" in "\n".join(backward),
            has_direct_path=True,
        ),
        f"  static constexpr int kSavedRows = {len(derived.saved_rows)};",
        f"  static constexpr int kForwardBuffers = {forward_buffers};",
        f"  static constexpr int kBackwardBuffers = {backward_buffers};",
        "",
        "  template <class Row>",
        "  static FASTRNN_HD void forward(const Row& row) {",
        "    using A = typename Row::Value;",
        *forward,
        "  }",
        "",
        "  template <class Row>",
        "  static FASTRNN_HD void backward(const Row& row) {",
        "    using A = typename Row::Value;",
        *backward,
        "  }",
        "};",
        "",
        "}  // namespace fastrnn::cells",
    ]
    return "\n".join(lines) + "\n"
