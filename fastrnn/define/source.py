"""Writes the C++ header of a derived cell, as csrc/cells/contract.h describes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fastrnn.define.derive import Derived
from fastrnn.define.graph import FUNCTIONS, Node, reachable

_RESERVED = set(
    "A alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl "
    "concept const constexpr const_cast continue decltype default delete do double dynamic_cast "
    "else enum explicit export extern false float for friend goto if inline int long mutable "
    "namespace new noexcept not not_eq nullptr operator or or_eq private protected public register "
    "reinterpret_cast requires return short signed sizeof static static_cast struct switch "
    "template this thread_local throw true try typedef typename union unsigned using virtual void "
    "volatile wchar_t while xor xor_eq main "
    "inputs outputs pre state parameters saved next_state d_pre d_state d_parameters d_next_state "
    "number select clamp linux unix".split()
) | set(FUNCTIONS)

_ARRAYS = {
    "pre": "pre",
    "state": "state",
    "parameter": "parameters",
    "d_next_state": "d_next_state",
}
_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_ATOM = 4
_WIDTH = 100


class _Writer:
    """Writes the body of one function: a line per named or shared value, then the results."""

    def __init__(
        self, roots: Sequence[Node], known: dict[Node, str], names: dict[Node, str]
    ) -> None:
        self._known = dict(known)
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
            name = self._free_name(name, taken)
            text = known[node] if is_read else self.text(node)[0]
            self._lines.append(f"const A {name} = {text};")
            self._known[node] = name

    @staticmethod
    def _free_name(wanted: str | None, taken: set[str]) -> str:
        if wanted is None or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", wanted):
            wanted = "t"
        wanted = re.sub("__+", "_", wanted)
        name = wanted if wanted != "t" else "t1"
        number = 1
        while name in taken or name in _RESERVED:
            number += 1
            name = f"{wanted}{number}" if wanted[-1:].isalpha() else f"{wanted}_{number}"
        taken.add(name)
        return name

    def text(self, node: Node) -> tuple[str, int]:
        """Returns an expression and its precedence."""
        if node in self._known:
            return self._known[node], _ATOM
        if node.is_constant:
            return f"number<A>({node.value!r})", _ATOM
        if node.is_leaf:
            return f"{_ARRAYS[node.op]}[{int(node.value)}]", _ATOM
        if node.op in _INFIX:
            sign, rank = _INFIX[node.op]
            left, right = self._operand(node.args[0], rank), self._operand(node.args[1], rank + 1)
            return f"{left} {sign} {right}", rank
        if node.op == "neg":
            return f"-{self._operand(node.args[0], 3)}", 3
        args = [self.text(arg)[0] for arg in node.args]
        if node.op in ("select_gt", "select_ge"):
            sign = ">" if node.op == "select_gt" else ">="
            left, right = (self._operand(arg, 1) for arg in node.args[:2])
            return f"select({left} {sign} {right}, {args[2]}, {args[3]})", _ATOM
        return f"{node.op}({', '.join(args)})", _ATOM

    def _operand(self, node: Node, rank: int) -> str:
        text, own = self.text(node)
        return text if own >= rank else f"({text})"

    def lines(self, results: Sequence[tuple[str, Node | None]]) -> list[str]:
        written = [*self._lines]
        for target, node in results:
            written.append(
                f"{target} = {'number<A>(0.0)' if node is None else self.text(node)[0]};"
            )
        return [_wrapped(line) for line in written]


def _wrapped(line: str) -> str:
    """Breaks a long line at operators and commas."""
    indent = "    "
    parts: list[str] = []
    rest = indent + line
    while len(rest) > _WIDTH:
        place = max(
            rest.rfind(mark, len(indent) + 4, _WIDTH) for mark in (" + ", " - ", " * ", ", ")
        )
        if place < 0:
            break
        place += 2 if rest[place] == "," else 3
        parts.append(rest[:place].rstrip())
        rest = indent + "    " + rest[place:]
    return "\n".join([*parts, rest])


def _flag(value: bool) -> str:
    return "true" if value else "false"


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
        lines.append(_wrapped(f"const A {', '.join(read)};"))
    if written:
        lines.append(_wrapped(f"A {', '.join(written)};"))
    return [*lines, *body, "  }"]


def write(derived: Derived, names: dict[Node, str]) -> str:
    """Returns the struct ``DefinedCell`` of a cell."""
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

    pre_x = ", ".join(map(str, derived.pre_x))
    pre_h = ", ".join(map(str, range(derived.gates)))
    traits = [
        ("int kGates", derived.gates),
        ("int kPre", derived.pre),
        ("int kSaved", len(saved)),
        ("int kStates", len(results)),
        ("int kSavedState", derived.saved_state),
        ("int kPreX[]", f"{{{pre_x}}}"),
        ("int kPreH[]", f"{{{pre_h}}}"),
        ("bool kDenseRecurrence", "true"),
        ("int kParameters", len(derived.d_parameters)),
        ("bool kForwardReadsH", _flag(reads_h(forward_nodes))),
        ("bool kBackwardReadsH", _flag(reads_h(backward_nodes))),
        ("bool kBackwardReadsNextH", _flag(derived.reads_next_h)),
        ("bool kDirectPath", _flag(direct)),
        ("bool kBoundedState", "false"),
        ("bool kProjects", "false"),
    ]
    lines = [
        "namespace fastrnn::cells {",
        "",
        "struct DefinedCell {",
        *[f"  static constexpr {name} = {value};" for name, value in traits],
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
