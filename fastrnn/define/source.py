"""Writes the C++ header of a derived cell, as csrc/cells/contract.h describes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fastrnn.define.derive import Derived
from fastrnn.define.graph import Node, reachable
from fastrnn.define.row_source import write_rows
from fastrnn.define.text import Expressions, free_name, traits, wrapped

_ARRAYS = {
    "pre": ("pre[", "]"),
    "state": ("state[", "]"),
    "parameter": ("parameters[", "]"),
    "d_next_state": ("d_next_state[", "]"),
}


class _Writer:
    """Writes the body of one function: a line per named or shared value, then the results."""

    def __init__(
        self, roots: Sequence[Node], known: dict[Node, str], names: dict[Node, str]
    ) -> None:
        own = dict(known)
        self._expressions = Expressions(own, _ARRAYS)
        self._lines: list[str] = []
        stop = frozenset(known)
        nodes = reachable(roots, stop)
        users = Counter(arg for node in nodes if node not in stop for arg in node.args)
        users.update(roots)
        taken: set[str] = set()
        for node in nodes:
            if node.is_constant or (node.is_leaf and node not in known):
                continue
            name = names.get(node)
            is_read = node in known
            if name is None and (is_read or users[node] < 2 or node.op == "neg"):
                continue
            name = free_name(name, taken)
            self._lines.append(f"const A {name} = {self._text(node)};")
            own[node] = name

    def _text(self, node: Node) -> str:
        return self._expressions.text(node)[0]

    def lines(self, results: Sequence[tuple[str, Node | None]]) -> list[str]:
        written = [*self._lines]
        for target, node in results:
            written.append(f"{target} = {'number<A>(0.0)' if node is None else self._text(node)};")
        return [wrapped(line) for line in written]


def _function(
    head: str, inputs: str, outputs: str, arrays: dict[str, str], body: Sequence[str]
) -> list[str]:
    text = "\n".join(body)
    used = [n for n in arrays if re.search(rf"(?<![\w.]){n}\[", text)]
    read = [f"*{name} = inputs.{name}" for name in used if arrays[name] == "in"]
    written = [f"*{name} = outputs.{name}" for name in used if arrays[name] == "out"]
    lines = [
        "  template <class A>",
        f"  static FASTRNN_HD void {head}(const {inputs}<A>& inputs,",
        f"  {' ' * len(f'static FASTRNN_HD void {head}(')}const {outputs}<A>& outputs) {{",
    ]
    if read:
        lines.append(wrapped(f"const A {', '.join(read)};"))
    if written:
        lines.append(wrapped(f"A {', '.join(written)};"))
    return [*lines, *body, "  }"]


def write(derived: Derived, names: dict[Node, str]) -> str:
    """Returns the struct ``DefinedCell`` of a cell."""
    if derived.computes_rows:
        return write_rows(derived, names)
    results, saved = derived.next_states, derived.saved
    forward_nodes = reachable([*results, *saved])
    known = {
        node: f"saved[{index}]" for index, node in enumerate(saved) if node.args or node.op == "pre"
    }
    if derived.reads_next_h:
        known[results[0]] = "next_state[0]"
    backward_nodes = reachable(derived.gradients, frozenset(known))

    def reads_h(nodes: Sequence[Node]) -> bool:
        return any(node.op == "state" and node.value == 0 for node in nodes)

    forward = _Writer([*saved, *results], {}, names).lines(
        [(f"saved[{index}]", node) for index, node in enumerate(saved)]
        + [(f"next_state[{index}]", node) for index, node in enumerate(results)]
    )
    targets = [(f"d_pre[{index}]", node) for index, node in enumerate(derived.d_pre)]
    direct = derived.d_states[0] is not None
    targets += [
        (f"d_state[{index}]", node)
        for index, node in enumerate(derived.d_states)
        if index > 0 or direct
    ]
    targets += [(f"d_parameters[{index}]", node) for index, node in enumerate(derived.d_parameters)]
    backward = _Writer(derived.gradients, known, names).lines(targets)

    lines = [
        "namespace fastrnn::cells {",
        "",
        "struct DefinedCell {",
        *traits(
            derived,
            forward_reads_h=reads_h(forward_nodes),
            backward_reads_h=reads_h(backward_nodes),
            has_direct_path=direct,
        ),
        "",
        *_function(
            "forward",
            "StepInputs",
            "StepOutputs",
            {"pre": "in", "state": "in", "parameters": "in", "saved": "out", "next_state": "out"},
            forward,
        ),
        "",
        *_function(
            "backward",
            "StepGradientInputs",
            "StepGradientOutputs",
            {
                "saved": "in",
                "state": "in",
                "next_state": "in",
                "d_next_state": "in",
                "parameters": "in",
                "d_pre": "out",
                "d_state": "out",
                "d_parameters": "out",
            },
            backward,
        ),
        "};",
        "",
        "}  // namespace fastrnn::cells",
    ]
    return "\n".join(lines) + "\n"
