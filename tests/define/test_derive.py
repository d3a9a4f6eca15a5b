"""The derived backward step of every operation, against torch's, without a compiler."""

from __future__ import annotations

import re
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
    "sqrt": lambda a, b: torch.sqrt(1 + a * a) * (1 + b**2) ** 0.5,
    "rsqrt": lambda a, b: torch.rsqrt(1 + a * a) * (1 + b**2) ** -0.5,
    "threshold": lambda a, b: functional.softplus(a, threshold=0.5) * b,
    "sum": lambda a, b: a.sum(-1, keepdim=True) * b + torch.sum(a * b, -1, keepdim=True),
    "mean": lambda a, b: a.mean(-1, keepdim=True) * torch.mean(a * b, dim=-1, keepdim=True),
    "mean alone": lambda a, b: torch.tanh(a).mean(-1, keepdim=True),
    "units": lambda a, b: a * (2 * a.shape[-1] - 1) ** -0.5 + b.sum(-1, True) / b.size(-1),
    "ones": lambda a, b: torch.ones_like(a).sum(-1, keepdim=True) * b + a,
    "var": lambda a, b: a.var(-1, keepdim=True) + b * torch.var(a - b, -1, False, True),
    "correction": lambda a, b: b / (1 + a.var((-1,), correction=0, keepdim=True)),
    "std": lambda a, b: a / torch.std(b + 1e-3 * a * b, -1, keepdim=True),
    "softmax": lambda a, b: torch.softmax(a, -1) * functional.softmax(a * b, dim=-1),
    "layer_norm": lambda a, b: functional.layer_norm(a, a.shape[-1:]) * b,
    "rms_norm": lambda a, b: functional.rms_norm(a, (a.shape[-1],), eps=1e-3) * b,
    "nested": lambda a, b: functional.layer_norm(
        b * torch.sigmoid(functional.layer_norm(a + b, a.shape[-1:])), a.shape[-1:], eps=0.1
    ),
    "gates": lambda a, b: gates_norm([a, b, a * b])[1],
    "maximum of rows": lambda a, b: torch.maximum(a.mean(-1, True), b) * b.mean(-1, True).relu(),
}


def gates_norm(gates: list[Any]) -> list[Any]:
    mean = sum(gate.mean(-1, keepdim=True) for gate in gates) / len(gates)
    centred = [gate - mean for gate in gates]
    squares = sum((gate * gate).mean(-1, keepdim=True) for gate in centred)
    return [gate * torch.rsqrt(squares / len(gates) + 1e-5) for gate in centred]


def make_step(function: Callable[..., Any]) -> Callable[..., Any]:
    def step(gates_x: Any, gates_h: Any, h: Any, c: Any, *, p: Any) -> Any:
        first = function(gates_x[0] + gates_h[0], c) * torch.ones_like(c)
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
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "row_sum": lambda x: x.sum(-1, keepdim=True),
        "row_max": lambda x: x.amax(-1, keepdim=True),
    }
    assert functions.keys() == COST.keys()
    for node in reachable(roots, frozenset(known)):
        if node not in known:
            if node.is_constant:
                known[node] = torch.tensor(node.value, dtype=torch.float64)
            elif node.op == "units":
                known[node] = torch.tensor(H, dtype=torch.float64)
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
    saved = [*derived.saved, *derived.saved_rows]
    assert not any(node.is_row for node in derived.saved if node not in derived.next_states)
    assert all(node.is_row for node in derived.saved_rows)
    after = evaluate([*derived.next_states, *saved], {**leaves, **always})
    kept = {node: after[node] for node in saved}
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


def test_constants_that_overflow_are_no_constants() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any) -> Any:
        return torch.minimum(gates_x[0] + gates_h[0], torch.ones_like(h) * 1e308 * 10)

    graph, results, names = trace(step, 1, ("h",), ())
    source = write(*derive(graph, results, names, 1, 0))
    assert "number<A>(1e+308) * number<A>(10.0)" in source
    assert "inf" not in source


def test_source_of_rows_is_readable() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any, *, gain: Any) -> Any:
        gate = gates_x[0] + gates_h[0]
        mean = gate.mean(-1, keepdim=True)
        return torch.tanh(gain * (gate - mean)) + h

    graph, results, names = trace(step, 1, ("h",), ("gain",))
    source = write(*derive(graph, results, names, 1, 1))
    for line in (
        "    A sum1 = number<A>(0.0);",
        "    row.for_units([&](const auto& at) FASTRNN_INLINED {",
        "      at.add(sum1, gate);",
        "    const A mean = row.total(sum1) / row.units();",
    ):
        assert line + "\n" in source
    assert "static constexpr int kSavedRows = 0;" in source
    assert max(map(len, source.splitlines())) <= 120


def test_states_are_loaded_before_they_are_replaced() -> None:
    def step(gates_x: Any, gates_h: Any, *states: Any) -> Any:
        gate = (gates_x[0] + gates_h[0]).softmax(-1)
        return gate * states[0] + states[1], states[2], states[1]

    graph, results, names = trace(step, 1, ("h", "a", "b"), ())
    source = write(*derive(graph, results, names, 1, 0))
    stores = re.findall(r"at\.set_(?:next_state|d_state)\(.*", source)
    assert len(stores) == 6
    assert not [line for line in stores if "at.state(" in line or "at.d_next_state(" in line]


def test_sums_of_a_normalisation_share_loops() -> None:
    def step(gates_x: Any, gates_h: Any, h: Any) -> Any:
        gates = [x + h for x, h in zip(gates_x, gates_h, strict=True)]
        return torch.tanh(sum(gates_norm(gates)) + h)

    graph, results, names = trace(step, 4, ("h",), ())
    source = write(*derive(graph, results, names, 4, 0))
    forward, backward = source.split("void backward")
    assert (forward.count("for_units"), forward.count("row.total")) == (3, 2)
    assert (backward.count("for_units"), backward.count("row.total")) == (2, 3)


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
