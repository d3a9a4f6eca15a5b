"""The derived backward step of every operation, against torch's, without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from defined_cells import Everything, MyGRU, MyLSTM, MySLSTM
from torch import Tensor
from torch.nn import functional

import fastrnn
from fastrnn.define.derive import Derived, derive
from fastrnn.define.graph import COST, FUNCTIONS, Node, reachable
from fastrnn.define.source import write
from fastrnn.define.trace import OPERATIONS, trace
from fastrnn.spec import CELLS

H = 12
GATES, STATES, PARAMETERS = 2, ("h", "c"), ("p",)
STEPS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda a, b: (a + 2 * b - a * b) / (3 + b * b) - (-a) + 1 / (2 + a * a),
    "sigmoid": lambda a, b: torch.sigmoid(a) + b.sigmoid(),
    "tanh": lambda a, b: torch.tanh(a * b),
    "relu": lambda a, b: torch.relu(a) * functional.relu(b),
    "exp": lambda a, b: torch.exp(a) + (b - a).exp(),
    "logsigmoid": lambda a, b: functional.logsigmoid(a) * b,
    "softplus": lambda a, b: functional.softplus(a) * b,
    "silu": lambda a, b: functional.silu(a) * b,
    "leaky_relu": lambda a, b: functional.leaky_relu(a) * functional.leaky_relu(b, 0.3),
    "elu": lambda a, b: functional.elu(a) * functional.elu(b, 0.5),
    "hardtanh": lambda a, b: functional.hardtanh(a) * functional.hardtanh(b, -0.5, 2),
    "relu6": lambda a, b: functional.relu6(4 * a) * b,
    "hardsigmoid": lambda a, b: functional.hardsigmoid(3 * a) * b,
    "softsign": lambda a, b: functional.softsign(a) * b,
    "abs": lambda a, b: torch.abs(a) * abs(b),
    "square": lambda a, b: torch.square(a) - b.square(),
    "reciprocal": lambda a, b: torch.reciprocal(a + 9) * b,
    "pow": lambda a, b: a**3 * torch.pow(b, 2),
    "maximum": lambda a, b: torch.maximum(a, b) * torch.max(a, 0 * b),
    "minimum": lambda a, b: torch.minimum(a, b) * b.min(a * a),
    "clamp": lambda a, b: a.clamp(-1, 1) * torch.clamp(b, min=0) * torch.clip(a, max=1),
    "where": lambda a, b: torch.where(a > b, a, 2.0) + torch.where(b <= 0.5, a, b),
    "comparisons": lambda a, b: torch.where(a < 0, a, b) * torch.where(b.ge(a), a * b, 1 - b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3) + torch.lerp(a, b, torch.sigmoid(a)),
    "addcmul": lambda a, b: torch.addcmul(a, a, b) + torch.addcmul(b, a, b, value=0.5),
    "alpha": lambda a, b: torch.add(a, b, alpha=2) * torch.sub(a, b, alpha=3),
    "filled": lambda a, b: torch.ones_like(a) - a + torch.zeros_like(b),
    "positive": lambda a, b: +a - b.subtract(a) + a.negative(),
}


def make_step(function: Callable[..., Any]) -> Callable[..., Any]:
    def step(gates_x: Any, gates_h: Any, h: Any, c: Any, *, p: Any) -> Any:
        first = function(gates_x[0] + gates_h[0], c)
        second = function(gates_h[1] * p, first) + gates_x[1]
        return function(first, h) - second, first * second

    return step


def evaluate(roots: Iterable[Node], values: dict[Node, Tensor]) -> dict[Node, Tensor]:
    """Computes nodes as the functions of csrc/cells/math.h and more_math.h define them."""
    known = dict(values)

    def larger(a: Tensor, b: Tensor) -> Tensor:
        return (a > b) + 0.5 * (a == b)

    functions: dict[str, Callable[..., Tensor]] = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "neg": torch.neg,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "exp": torch.exp,
        "log_sigmoid": functional.logsigmoid,
        "relu": torch.relu,
        "absolute": torch.abs,
        "sign": torch.sign,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "larger": larger,
        "clamp": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
        "within": lambda x, low, high: ((x >= low) & (x <= high)).to(x.dtype),
        "select_gt": lambda a, b, x, y: torch.where(a > b, x, y),
        "select_ge": lambda a, b, x, y: torch.where(a >= b, x, y),
    }
    assert functions.keys() == COST.keys()
    for node in reachable(roots, frozenset(known)):
        if node not in known:
            if node.is_constant:
                known[node] = torch.tensor(node.value, dtype=torch.float64)
            else:
                assert node.args, f"{node.op} is not known here"
                known[node] = functions[node.op](*[known[arg] for arg in node.args])
    return known


def run_derived(
    graph: Any, derived: Derived, inputs: dict[str, Tensor], d_next: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Runs forward, then backward from the saved values alone, as the kernels do."""
    leaves: dict[Node, Tensor] = {}
    for gate, column in enumerate(derived.pre_x):
        leaves[graph.leaf("pre", gate)] = inputs["h"][gate]
        sides = inputs["x"][gate] + (inputs["h"][gate] if column == gate else 0)
        leaves[graph.leaf("pre", column)] = sides
    always = {graph.leaf("state", k): inputs["states"][k] for k in range(len(STATES))}
    always[graph.leaf("parameter", 0)] = inputs["p"]
    after = evaluate([*derived.next_states, *derived.saved], {**leaves, **always})
    kept = {node: after[node] for node in derived.saved}
    if derived.reads_next_h:
        kept[derived.next_states[0]] = after[derived.next_states[0]]
    for number, gradient in enumerate(d_next):
        kept[graph.leaf("d_next_state", number)] = gradient
    found = evaluate(derived.gradients, {**kept, **always})
    zero = torch.zeros(H, dtype=torch.float64)

    def values(nodes: Iterable[Node | None]) -> list[Tensor]:
        return [zero if node is None else found[node].expand(H) for node in nodes]

    d_pre = values(derived.d_pre)
    gradients = {
        "x": torch.stack([d_pre[column] for column in derived.pre_x]),
        "h": torch.stack(d_pre[: derived.gates]),
        "states": torch.stack(values(derived.d_states)),
        "p": values(derived.d_parameters)[0],
    }
    return [after[node] for node in derived.next_states], gradients


# At a bound of clamp, torch's derivative is 1 up to version 2.13 and 0 from 2.14 on.
@pytest.mark.parametrize(
    ("name", "at_kinks"),
    [(name, kinks) for name in STEPS for kinks in (False, True) if not (kinks and name == "clamp")],
)
def test_derivative_is_that_of_torch(name: str, at_kinks: bool) -> None:
    step = make_step(STEPS[name])
    graph, results, names = trace(step, GATES, STATES, PARAMETERS)
    derived, _ = derive(graph, results, names, GATES, len(PARAMETERS))

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64)
        return x.round() if at_kinks else x

    inputs = {"x": random(GATES, H), "h": random(GATES, H), "states": random(2, H), "p": random(H)}
    d_next = [torch.randn(H, dtype=torch.float64) for _ in STATES]
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    expected = step(tuple(leaves["x"]), tuple(leaves["h"]), *leaves["states"], p=leaves["p"])
    torch.autograd.backward(list(expected), d_next)
    got, gradients = run_derived(graph, derived, inputs, d_next)
    torch.testing.assert_close(got, [value.detach() for value in expected])
    for key, value in gradients.items():
        grad = leaves[key].grad
        torch.testing.assert_close(value, torch.zeros_like(value) if grad is None else grad)


def test_every_operation_is_tested() -> None:
    read = {name for step in STEPS.values() for name in step.__code__.co_names}
    tested = (read | {"mul", "div", "neg", "gt", "le", "lt"}) & OPERATIONS.keys()
    functions = {OPERATIONS[name] for name in tested}
    untested = [name for name, function in OPERATIONS.items() if function not in functions]
    assert untested == ["positive"]  # unary +


@pytest.mark.parametrize(
    ("cell", "built_in"), [(MyLSTM, "lstm"), (MyGRU, "gru"), (MySLSTM, "slstm")]
)
def test_saves_no_more_than_a_cell_written_by_hand(cell: Any, built_in: str) -> None:
    own, theirs = cell._spec, CELLS[built_in]
    assert (own.pre, own.pre_x, own.states) == (theirs.pre, theirs.pre_x, theirs.states)
    assert own.saved <= theirs.saved


def test_everything_uses_every_function() -> None:
    missing = [name for name in FUNCTIONS if f"{name}(" not in Everything.source()]
    assert missing == ["select_gt", "select_ge"]
    assert Everything.source().count("select(") >= 2


def test_gates_whose_sides_are_apart_come_last() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any) -> Any:
        n, z = gates_x[0] * gates_h[0], torch.sigmoid(gates_x[1] + gates_h[1])
        return z * h + n

    graph, results, names = trace(step, 2, ("h",), ())
    derived, _ = derive(graph, results, names, 2, 0)
    assert (derived.pre, derived.pre_x) == (4, (2, 3))


def test_sides_are_added_first_wherever_they_are_in_a_sum() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any, *, p: Any) -> Any:
        return gates_x[0] + p * h + 1.5 + gates_h[0]

    graph, results, names = trace(step, 1, ("h",), ("p",))
    derived, _ = derive(graph, results, names, 1, 1)
    assert (derived.pre, derived.pre_x) == (1, (0,))


def test_source_is_readable_and_has_the_names_of_the_function() -> None:
    source = fastrnn.define_cell(MyLSTM.step, gates=4, states=("h", "c")).source()
    assert "//         c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)\n" in source
    assert "const A c = state[1] * " in source
    assert "static constexpr int kSaved = 5;" in source
    assert max(map(len, source.splitlines())) <= 120


def test_names_of_variables_are_those_of_cpp() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any) -> Any:
        double = torch.tanh(gates_x[0] + gates_h[0])
        σ = torch.sigmoid(gates_x[1] + gates_h[1])
        tanh = double * σ
        A = tanh * tanh + double
        return A + h

    graph, results, names = trace(step, 2, ("h",), ())
    source = write(*derive(graph, results, names, 2, 0))
    for name in ("double", "σ", "tanh", "A"):
        assert f"const A {name} =" not in source
    assert "const A double2 = tanh(pre[0]);" in source
