"""States and gates of every step, against a loop over the steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Optional

import pytest
import torch
from support import CELLS, DTYPES, CellLayer, build, random, reference_math
from tolerance import assert_agrees, assert_same_in_double
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.ops.states import composite_steps, kernel_steps
from fastrnn.reference import STEPS
from fastrnn.spec import BY_MODE, Weights, slots_of_names

F64 = torch.float64
T, B, I, H = 6, 3, 3, 4  # noqa: E741 - the sizes' names
STACKS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
]
EXTRAS = {"return_all_states": True, "return_gates": True}


def activations(cell: str, gates_x: Tensor, gates_h: Tensor, h: Tensor) -> dict[str, Tensor]:
    """The gates by their formulas."""
    if cell == "lstm":
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        return {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
        r = (xr + hr).sigmoid()
        return {"r": r, "z": (xz + hz).sigmoid(), "n": (xn + r * hn).tanh()}
    return {"h": h}


def loop(
    module: nn.Module,
    x: Tensor,
    hx: Any,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> dict[str, Tensor]:
    """The definition, step by step. Time-major; the results by name."""
    spec = BY_MODE[module.mode]
    slots = slots_of_names(module._flat_weights_names)
    directions = 2 if module.bidirectional else 1
    before = list(hx) if spec.has_cell_state else [hx]
    exists = torch.ones(x.shape[:2], dtype=torch.bool)
    if lengths is not None:
        exists = torch.arange(x.shape[0]).unsqueeze(1) < lengths
    found: dict[str, list[Tensor]] = {}
    outputs: list[Tensor] = []
    for index, w in enumerate(Weights(module._flat_weights, slots).directions()):
        if index % directions == 0:
            inputs = torch.cat(outputs, -1) if outputs else x
            outputs = []
        own = [state[index] for state in before]
        steps: dict[str, list[Tensor]] = {}
        order = range(x.shape[0])
        for t in order if index % directions == 0 else reversed(order):
            if resets is not None:
                is_reset = (resets[t] & exists[t]).unsqueeze(1)
                own = [torch.where(is_reset, 0, state) for state in own]
            gates = linear(inputs[t], w.w_ih, w.b_ih), linear(own[0], w.w_hh, w.b_hh)
            h, c = STEPS[spec.name](*gates, own[0], own[1] if len(own) > 1 else None, None)
            values = activations(spec.name, *gates, h)
            h = h if w.w_hr is None else linear(h, w.w_hr)
            after = [h] if c is None else [h, c]
            kept = exists[t].unsqueeze(1)
            named = {"states of h": h, **({} if c is None else {"states of c": c})}
            for name, value in {**named, **values}.items():
                steps.setdefault(name, []).append(torch.where(kept, value, 0))
            own = [torch.where(kept, new, old) for new, old in zip(after, own, strict=True)]
        for name, own_steps in steps.items():
            ordered = own_steps if index % directions == 0 else own_steps[::-1]
            found.setdefault(name, []).append(torch.stack(ordered))
        outputs.append(found["states of h"][-1])
        for name, state in zip(("h_n", "c_n"), own, strict=False):
            found.setdefault(name, []).append(state)
    results = {name: torch.stack(own, 0 if "_n" in name else 1) for name, own in found.items()}
    return {"output": torch.cat(outputs, -1), **results}


def named(results: Any, batch_first: bool = False) -> dict[str, Tensor]:
    """The results of a call with both options by the names of `loop`, time-major."""
    output, hidden, (states, gates) = results

    def turned(t: Tensor) -> Tensor:  # from [B,T,L*D,*] or [T,L*D,B,*]
        return t.permute(1, 2, 0, 3) if batch_first else t

    found = {"output": output.transpose(0, 1) if batch_first else output}
    for name, state in zip(("h_n", "c_n"), tree_leaves(hidden), strict=False):
        found[name] = state
    for name, state in zip(("h", "c"), tree_leaves(states), strict=False):
        found[f"states of {name}"] = turned(state)
    assert not any(gate.requires_grad for gate in gates.values())
    return {**found, **{name: turned(gate) for name, gate in gates.items()}}


def make(*shape: int, dtype: torch.dtype = F64, seed: int = 5) -> Tensor:
    return random(torch.Generator().manual_seed(seed), *shape, dtype=dtype).requires_grad_()


def make_states(module: nn.Module, batch: int = B) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    dtype = next(module.parameters()).dtype
    h = make(count, batch, module.proj_size or module.hidden_size, dtype=dtype, seed=6)
    if module.mode != "LSTM":
        return h
    return h, make(count, batch, module.hidden_size, dtype=dtype, seed=7)


def marks_of(kind: str) -> dict[str, Tensor]:
    marks = {}
    if "lengths" in kind:
        marks["lengths"] = torch.tensor([4, 0, 6])
    if "resets" in kind:
        marks["resets"] = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.4
    return marks


def with_gradients(
    results: dict[str, Tensor], inputs: Sequence[Tensor], wanted: str = ""
) -> dict[str, Tensor]:
    """Adds the gradients of a weighted sum of all differentiable results, or of those of a name."""
    outputs = {
        name: t
        for name, t in sorted(results.items())
        if wanted in name and name not in ("i", "f", "g", "o", "r", "z", "n", "h")
    }
    weights = [
        make(*t.shape, seed=9 + index).detach().to(t.dtype)
        for index, t in enumerate(outputs.values())
    ]
    found = torch.autograd.grad(
        list(outputs.values()), list(inputs), weights, materialize_grads=True
    )
    return {**results, **{f"gradient {index}": t for index, t in enumerate(found)}}


def compare(module: nn.Module, kind: str = "", wanted: str = "") -> None:
    x, hx, marks = make(T, B, I), make_states(module), marks_of(kind)
    inputs = [x, *tree_leaves(hx), *module.parameters()]
    batch_first = module.batch_first
    given = dict(marks)
    if batch_first and "resets" in given:
        given["resets"] = given["resets"].t()
    ours = module(x.transpose(0, 1) if batch_first else x, hx, **given, **EXTRAS)
    assert isinstance(ours[2], fastrnn.Extras)
    assert_same_in_double(
        with_gradients(named(ours, batch_first), inputs, wanted),
        with_gradients(loop(module, x, hx, **marks), inputs, wanted),
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_the_loop(cell: str, stack: dict[str, Any], batch_first: bool) -> None:
    compare(build(cell, I, H, dtype=F64, batch_first=batch_first, **stack))


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_projection_matches_the_loop(stack: dict[str, Any]) -> None:
    compare(build("lstm", I, H, proj_size=2, dtype=F64, **stack))


@pytest.mark.parametrize("wanted", ["states of c", "states of h", "output", "c_n"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_gradient_of_one_result_matches_the_loop(wanted: str, proj_size: int) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size}
    compare(build("lstm", I, H, dtype=F64, **options), wanted=wanted)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "resets", "lengths, resets"])
@pytest.mark.parametrize("stack", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_marks_match_the_loop(
    cell: str, stack: dict[str, Any], kind: str, batch_first: bool
) -> None:
    compare(build(cell, I, H, dtype=F64, batch_first=batch_first, **stack), kind)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_rows_without_steps_return_zeros(cell: str) -> None:
    module = build(cell, I, H, num_layers=2, bidirectional=True, dtype=F64)
    hx, lengths = make_states(module), torch.zeros(B, dtype=torch.int64)
    found = named(module(make(T, B, I), hx, lengths=lengths, **EXTRAS))
    assert_same_in_double(found, loop(module, make(T, B, I), hx, lengths=lengths))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != F64], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_other_dtypes(cell: str, dtype: torch.dtype) -> None:
    module = build(cell, I, 20, num_layers=2, bidirectional=True, dtype=dtype)

    def call(module: nn.Module, x: Tensor, hx: Any) -> dict[str, Tensor]:
        inputs = [x, *tree_leaves(hx), *module.parameters()]
        return with_gradients(named(module(x, hx, **EXTRAS)), inputs)

    def exact(change: Any) -> dict[str, Tensor]:
        double = copy.deepcopy(module).double()
        for own, weight in zip(double.parameters(), module.parameters(), strict=True):
            own.data = change(weight)
        states = [change(t).requires_grad_() for t in tree_leaves(hx)]
        with reference_math():
            return call(
                double,
                change(x).requires_grad_(),
                tuple(states) if len(states) > 1 else states[0],
            )

    x, hx = make(T, B, I, dtype=dtype), make_states(module)
    with reference_math():
        theirs = call(module, x, hx)
    ours = call(module, x, hx)
    assert all(t.dtype == dtype for t in ours.values())
    assert_agrees(ours, theirs, exact)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_types_under_autocast_are_those_of_the_results(cell: str) -> None:
    module, x = build(cell, I, H, num_layers=2), make(T, B, I, dtype=torch.float32)
    for requires_grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(requires_grad):
            output, hidden, (states, gates) = module(x, **EXTRAS)
        types = [t.dtype for t in tree_leaves(hidden)]
        assert [t.dtype for t in tree_leaves(states)] == [output.dtype, *types[1:]]
        assert {t.dtype for t in gates.values()} == {output.dtype}
        if requires_grad:
            sum(t.float().sum() for t in tree_leaves(states)).backward()


class TestCells:
    """Cells that torch.nn lacks."""

    @pytest.mark.parametrize("cell", ["indrnn", "peephole_lstm", "slstm"])
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_cell_states_match_reference(self, cell: str, bidirectional: bool) -> None:
        call = CellLayer(cell, I, H, bidirectional=bidirectional, dtype=F64).call(make(T, B, I))
        inputs = [call.x, *call.weights.flat]
        found = []
        for function in (kernel_steps, composite_steps):
            results, c, gates = function(call, True, False)
            assert gates is None
            own = {"output": results[0]} if c is None else {"output": results[0], "c": c}
            found.append(with_gradients(own, inputs))
        assert_same_in_double(*found)


class TestDerivatives:
    def arguments(self, module: nn.Module) -> tuple[Any, list[Tensor]]:
        """A function of all inputs, which returns all differentiable results, and its arguments."""
        names = [name for name, _ in module.named_parameters()]
        states = tree_leaves(make_states(module, 2))

        def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            hx = rest[0] if len(states) == 1 else tuple(rest[: len(states)])
            weights = dict(zip(names, rest[len(states) :], strict=True))
            given = {"return_all_states": True}
            output, hidden, extras = functional_call(module, weights, (x, hx), given)
            return tuple(tree_leaves((output, hidden, extras.states)))

        weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
        return call, [make(3, 2, I), *states, *weights]

    @pytest.mark.parametrize(
        ("cell", "options"),
        [
            ("rnn_tanh", {}),
            ("gru", {"bidirectional": True}),
            ("lstm", {"num_layers": 2, "bidirectional": True}),
            ("lstm", {"proj_size": 2}),
        ],
        ids=str,
    )
    def test_gradcheck_through_all_results(self, cell: str, options: dict[str, Any]) -> None:
        call, inputs = self.arguments(build(cell, I, H, dtype=F64, **options))
        assert torch.autograd.gradcheck(call, inputs)

    def test_second_derivatives(self) -> None:
        call, inputs = self.arguments(build("lstm", 2, 2, dtype=F64))
        inputs[0] = make(3, 2, 2)
        assert torch.autograd.gradgradcheck(call, inputs)

    @pytest.mark.parametrize("cell", ["gru", "lstm"])
    def test_transforms(self, cell: str) -> None:
        module = build(cell, I, H, bidirectional=True, dtype=F64)
        call, inputs = self.arguments(module)
        plain = [t.detach() for t in inputs]
        tangents = [torch.randn_like(t) for t in plain]
        results, moved = torch.func.jvp(call, tuple(plain), tuple(tangents))
        weights = tuple(torch.randn_like(t) for t in results)
        pulled = torch.func.vjp(call, *plain)[1](weights)
        assert_same_in_double(
            sum((a * b).sum() for a, b in zip(moved, weights, strict=True)),
            sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True)),
        )
        rest = plain[1:]
        batched = torch.func.vmap(call, (0, *[None] * len(rest)))(
            torch.stack([plain[0]] * 2), *rest
        )
        assert_same_in_double([t[1] for t in batched], list(results))
        gates = torch.func.vmap(lambda x: module(x, return_gates=True)[2].gates)(
            torch.stack([plain[0]] * 2)
        )
        assert_same_in_double(
            {name: t[0] for name, t in gates.items()}, module(plain[0], return_gates=True)[2].gates
        )

    def test_output_may_be_changed_in_place(self) -> None:
        module, x = build("lstm", I, H, dtype=F64), make(T, B, I)
        output, _, extras = module(x, return_all_states=True)
        before = extras.states[0].detach().clone()
        output.relu_()
        assert torch.equal(extras.states[0].detach(), before)
        found = torch.autograd.grad(output.sum() + extras.states[1].sum(), x)
        output, _, extras = module(x, return_all_states=True)
        expected = torch.autograd.grad(output.relu().sum() + extras.states[1].sum(), x)
        assert torch.equal(found[0], expected[0])

    def test_without_a_gradient(self) -> None:
        module, x = build("lstm", I, H, num_layers=2, dtype=F64), make(T, B, I)
        expected = named(module(x, **EXTRAS))
        with torch.no_grad():
            found = named(module(x, **EXTRAS))
        assert not any(t.requires_grad for t in found.values())
        for name, t in found.items():
            assert torch.equal(t, expected[name])


class TestGraphs:
    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    @pytest.mark.parametrize("cell", ["gru", "lstm"])
    def test_compiled_module_matches_eager(self, cell: str, backend: str) -> None:
        torch.compiler.reset()
        module, x = build(cell, I, H, num_layers=2, dtype=F64), make(T, B, I)
        inputs = [x, *module.parameters()]
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        assert_same_in_double(
            with_gradients(named(compiled(x, **EXTRAS)), inputs),
            with_gradients(named(module(x, **EXTRAS)), inputs),
        )

    def test_exported_module_has_an_operator_per_layer(self) -> None:
        module, x = build("lstm", I, H, num_layers=2, dtype=F64), make(T, B, I).detach()
        program = torch.export.export(module, (x,), kwargs=EXTRAS)
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("fastrnn.recurrent_states.default") == 2
        found = program.module()(x, **EXTRAS)
        assert_same_in_double(named(found), named(module(x, **EXTRAS)))

    def test_script_raises(self) -> None:
        module, x = build("gru", I, H), torch.randn(T, B, I)

        class Outer(nn.Module):  # TorchScript calls an overloaded forward only from another module
            def __init__(self) -> None:
                super().__init__()
                self.layer = module

            def forward(self, x: Tensor, wanted: bool) -> Tensor:
                hx: Optional[Tensor] = None  # noqa: UP045
                return self.layer(x, hx, None, None, None, wanted, False)[0]

        scripted = torch.jit.script(Outer())
        assert torch.equal(scripted(x, False), module(x)[0])
        with pytest.raises(torch.jit.Error, match="must be False in TorchScript"):
            scripted(x, True)

    def test_fx_records_the_options(self) -> None:
        module, x = build("lstm", I, H), torch.randn(T, B, I)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = module

            def forward(self, x: Tensor) -> Any:
                return self.layer(x, return_gates=True)

        traced = torch.fx.symbolic_trace(Outer())
        [node] = [node for node in traced.graph.nodes if node.op == "call_module"]
        assert node.kwargs == {"return_gates": True}
        assert torch.equal(traced(x)[2].gates["f"], module(x, return_gates=True)[2].gates["f"])


class TestInputs:
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
    def test_without_a_batch_dimension(self, cell: str, batch_first: bool) -> None:
        module = build(cell, I, H, num_layers=2, batch_first=batch_first, dtype=F64)
        x = make(T, I)
        *_, extras = module(x, **EXTRAS)
        *_, wide = module(x.unsqueeze(0 if batch_first else 1), **EXTRAS)
        for own, other in zip(tree_leaves(extras), tree_leaves(wide), strict=True):
            assert own.shape == (T, 2, H)
            assert torch.equal(own, other.squeeze(0 if batch_first else 2))

    def test_packed_sequence_returns_rows(self) -> None:
        module = build("lstm", I, H, num_layers=2, bidirectional=True, dtype=F64)
        x, lengths = make(T, B, I), torch.tensor([4, 2, 6])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, _, extras = module(packed, **EXTRAS)
        *_, padded = module(x, lengths=lengths, **EXTRAS)
        last = torch.cat(extras.states[0][:, -2:].unbind(1), -1)
        assert torch.equal(last, output.data)
        for rows, whole in zip(tree_leaves(extras), tree_leaves(padded), strict=True):
            expected = pack_padded_sequence(
                whole.transpose(1, 2), lengths, enforce_sorted=False
            ).data
            assert_same_in_double(rows, expected)

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_jagged_tensors_come_out(self, batch_first: bool) -> None:
        module = build("lstm", I, H, num_layers=2, batch_first=batch_first, dtype=F64)
        sequences = [make(length, I, seed=length) for length in (3, 1, 5)]
        jagged = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        *_, extras = module(jagged, **EXTRAS)
        for index, sequence in enumerate(sequences):
            *_, own = module(sequence, **EXTRAS)
            for nested, expected in zip(tree_leaves(extras), tree_leaves(own), strict=True):
                assert_same_in_double(nested.unbind()[index], expected)

    def test_dropout_acts_between_layers_only(self) -> None:
        module = build("gru", I, H, num_layers=2, dropout=0.5, dtype=F64)
        x = make(T, B, I)
        torch.manual_seed(3)
        output, _, extras = module(x, return_all_states=True)
        torch.manual_seed(3)
        expected, _ = module(x)
        assert_same_in_double(output, expected)
        assert torch.equal(extras.states[:, 1], output)
        assert extras.states[:, 0].all()

    def test_prepared_weights_and_float16_weights_change_no_bit(self) -> None:
        module = build("lstm", I, H).eval()
        x = torch.randn(T, B, I)
        expected = named(module(x, **EXTRAS))
        module.prepare()
        module.weight_dtype = torch.float16
        for name, t in named(module(x, **EXTRAS)).items():
            assert torch.equal(t, expected[name])


class TestOptions:
    def test_each_option_alone(self) -> None:
        module, x = build("gru", I, H), torch.randn(T, B, I)
        assert len(module(x, return_all_states=False, return_gates=False)) == 2
        output, _, (states, gates) = module(x, return_all_states=True)
        assert gates is None
        assert torch.equal(states.squeeze(1), output)
        output, _, (states, gates) = module(x, return_gates=True)
        assert states is None
        assert list(gates) == ["r", "z", "n"]

    @pytest.mark.parametrize("name", EXTRAS)
    def test_other_types_raise(self, name: str) -> None:
        module = build("gru", I, H)
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            module(torch.randn(T, B, I), **{name: 1})

    def test_torch_raises_first(self) -> None:
        with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
            build("gru", I, H)(torch.randn(I), return_gates=True)

    @pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
    def test_functions(self, cell: str) -> None:
        module = build(cell, I, H, num_layers=2, dtype=F64)
        x, hx, lengths = make(T, B, I), make_states(module), torch.tensor([2, 6, 1])
        rest = (list(module.parameters()), True, 2, 0.0, False, False, False)
        function = getattr(fastrnn.functional, cell)
        output, *hidden, extras = function(x, hx, *rest, lengths=lengths, **EXTRAS)
        expected = module(x, hx, lengths=lengths, **EXTRAS)
        assert_same_in_double(tree_leaves((output, hidden, extras)), tree_leaves(expected))
        data = x[:, 0]
        *_, extras = function(data, torch.ones(T).long(), tree_map_one(hx), *rest[:-1], **EXTRAS)
        assert {t.shape for t in tree_leaves(extras)} == {(T, 2, H)}


def tree_map_one(hx: Any) -> Any:
    """The states of the first row."""
    return hx[:, :1] if isinstance(hx, Tensor) else tuple(state[:, :1] for state in hx)


class TestOperators:
    def given(self, cell: str = "lstm", **options: Any) -> dict[str, Any]:
        module = build(cell, I, H, **options)
        h0, *c0 = tree_leaves(make_states(module))
        return {
            "x": make(T, B, I, dtype=torch.float32).detach(),
            "h0": h0.detach(),
            "c0": c0[0].detach() if c0 else None,
            "weights": [p.detach() for p in module.parameters()],
            "slots": slots_of_names(module._flat_weights_names),
            "sequence": None,
            "cell": cell,
        }

    def backward(self, given: dict[str, Any], **changed: Any) -> Any:
        y, _, _, c_steps, saved = torch.ops.fastrnn.recurrent_states(**given)
        rest = {name: value for name, value in given.items() if name != "x"}
        arguments = {"d_y": y, "d_h_n": None, "d_c_n": None, "d_c_steps": c_steps}
        return torch.ops.fastrnn.recurrent_states_backward(
            **{**arguments, **rest, "y": y, "saved": saved, **changed}
        )

    @pytest.mark.parametrize(("cell", "options"), [("lstm", {"proj_size": 2}), ("gru", {})])
    def test_opcheck(self, cell: str, options: dict[str, Any]) -> None:
        given = self.given(cell, **options)
        torch.library.opcheck(torch.ops.fastrnn.recurrent_states.default, (), given)

    def test_opcheck_of_backward(self) -> None:
        given = self.given(bidirectional=True)
        y, _, _, c_steps, saved = torch.ops.fastrnn.recurrent_states(**given)
        x = given.pop("x")
        assert x.shape[0] == T
        given |= {"y": y, "saved": saved, "d_y": None, "d_h_n": None, "d_c_n": None}
        torch.library.opcheck(
            torch.ops.fastrnn.recurrent_states_backward.default,
            (),
            {**given, "d_c_steps": c_steps},
            test_utils=("test_schema", "test_faketensor"),
        )

    def test_gradients_without_steps_are_those_of_the_last(self) -> None:
        given = {**self.given(), "x": torch.randn(0, B, I)}
        _, _, d_h0, d_c0 = self.backward(given, d_c_n=given["c0"])
        assert torch.equal(d_c0, given["c0"])
        assert not d_h0.any()

    def test_wrong_gradients_raise(self) -> None:
        given = self.given()
        with pytest.raises(RuntimeError, match=r"d_c_steps must have the shape \[1, 18, 4\]"):
            self.backward(given, d_c_steps=torch.zeros(1, T * B, H + 1))
        with pytest.raises(RuntimeError, match="d_c_steps must have the dtype"):
            self.backward(given, d_c_steps=torch.zeros(1, T * B, H, dtype=F64))
        gone = torch.zeros(1, T * B, H)
        gone.untyped_storage().resize_(8)
        with pytest.raises(RuntimeError, match="d_c_steps must have memory"):
            self.backward(given, d_c_steps=gone)
        with pytest.raises(RuntimeError, match="d_c_steps must not be given for gru"):
            self.backward(self.given("gru"), d_c_steps=torch.zeros(1, T * B, 0))
