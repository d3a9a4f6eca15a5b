"""Pieces of C++ text that both writers, `source` and `row_source`, share."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastrnn.define.derive import Derived
from fastrnn.define.graph import FUNCTIONS, Node

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

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_ATOM = 4
_WIDTH = 100


def free_name(wanted: str | None, taken: set[str]) -> str:
    """Returns a name for a variable that C++ allows and that is not taken, and takes it."""
    if wanted is None or not re.fullmatch(r"(?!FASTRNN)[A-Za-z][A-Za-z0-9_]*", wanted):
        wanted = "t"
    wanted = re.sub("__+", "_", wanted)
    name = wanted if wanted != "t" else "t1"
    number = 1
    while name in taken or name in _RESERVED:
        number += 1
        stem = re.sub(r"(?<=[A-Za-z])1$", "", wanted)
        name = f"{stem}{number}" if stem[-1:].isalpha() else f"{stem}_{number}"
    taken.add(name)
    return name


class Expressions:
    """Writes values as expressions.

    Args:
        known: the text of values that are there already.
        leaves: for each kind of leaf, the text before and after its number.
    """

    def __init__(self, known: Mapping[Node, str], leaves: Mapping[str, tuple[str, str]]) -> None:
        self.known = known
        self._leaves = leaves

    def text(self, node: Node) -> tuple[str, int]:
        """Returns an expression and its precedence."""
        if node in self.known:
            return self.known[node], _ATOM
        if node.is_constant:
            return f"number<A>({node.value!r})", _ATOM
        if node.is_leaf:
            before, after = self._leaves[node.op]
            return f"{before}{int(node.value) if after else ''}{after}", _ATOM
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


def wrapped(line: str, indent: int = 4) -> str:
    """Indents a line, and breaks a long one at operators and commas."""
    start = " " * indent
    parts: list[str] = []
    rest = start + line
    while len(rest) > _WIDTH:
        place = max(
            rest.rfind(mark, len(start) + 4, _WIDTH) for mark in (" + ", " - ", " * ", ", ")
        )
        if place < 0:
            break
        place += 2 if rest[place] == "," else 3
        parts.append(rest[:place].rstrip())
        rest = start + "    " + rest[place:]
    return "\n".join([*parts, rest])


def traits(
    derived: Derived, *, forward_reads_h: bool, backward_reads_h: bool, has_direct_path: bool
) -> list[str]:
    """Returns the lines of the traits that every cell has."""
    pre_x = ", ".join(map(str, derived.pre_x))
    pre_h = ", ".join(map(str, range(derived.gates)))
    values = [
        ("int kGates", derived.gates),
        ("int kPre", derived.pre),
        ("int kSaved", derived.saved_columns),
        ("int kStates", len(derived.next_states)),
        ("int kSavedState", derived.saved_state),
        ("int kPreX[]", f"{{{pre_x}}}"),
        ("int kPreH[]", f"{{{pre_h}}}"),
        ("bool kDenseRecurrence", "true"),
        ("int kParameters", len(derived.d_parameters)),
        ("bool kForwardReadsH", _flag(forward_reads_h)),
        ("bool kBackwardReadsH", _flag(backward_reads_h)),
        ("bool kBackwardReadsNextH", _flag(derived.reads_next_h)),
        ("bool kDirectPath", _flag(has_direct_path)),
        ("bool kBoundedState", "false"),
        ("bool kProjects", "false"),
    ]
    return [f"  static constexpr {name} = {value};" for name, value in values]


def _flag(value: bool) -> str:
    return "true" if value else "false"
