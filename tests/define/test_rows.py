"""Cells of `fastrnn.define_cell` whose step reduces over the units of a row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from define_support import (
    assert_same,
    assert_same_as_composite,
    build,
    by_composite,
    gradients,
    needs_compiler,
    states,
)
from defined_cells import GAINS, EveryRow, MyNormLSTM, MyNormRNN
from tolerance import Change, assert_agrees, assert_same_in_double
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C
from fastrnn.backends import composite, kernels


@needs_compiler
class TestEveryRow:
    """One cell that uses every reduction: the one that the fast tests compile."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("batch", "hidden"), [(1, 17), (3, 40)])
    def test_results_and_gradients(self, dtype: torch.dtype, batch: int, hidden: int) -> None:
        module = build(EveryRow, 4, hidden, 2, bidirectional=True, dtype=dtype)
        x = torch.randn(5, batch, 4, dtype=dtype)
        hx = states(EveryRow, 4, batch, hidden, dtype=dtype)

        def exact(change: Change) -> Any:
            double = copy.deepcopy(module).double()
            with torch.no_grad():
                for own, other in zip(double.parameters(), module.parameters(), strict=True):
                    own.copy_(change(other))
            moved = tuple([change(state) for state in hx])
            return by_composite(lambda: gradients(double, change(x), moved))

        ours = gradients(module, x, hx)
        theirs = by_composite(lambda: gradients(module, x, hx))
        assert_agrees(ours, theirs, exact)
        with torch.no_grad():
            assert torch.equal(module(x, hx)[0], ours["output"])

    def test_gradcheck(self) -> None:
        module = build(EveryRow, 2, 16, dtype=torch.float64)
        names, parameters = zip(*module.named_parameters(), strict=True)
        x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
        hx = [state.requires_grad_() for state in states(EveryRow, 1, 2, 16, dtype=torch.float64)]

        def call(x: Tensor, *values: Tensor) -> Any:
            named = dict(zip(names, values[3:], strict=True))
            return tree_leaves(torch.func.functional_call(module, named, (x, values[:3])))

        assert fastrnn.explain(module, x).backend == kernels.NAME
        assert torch.autograd.gradcheck(call, (x, *hx, *parameters), fast_mode=True)

    def test_second_derivative(self) -> None:
        module = build(EveryRow, 1, 16, dtype=torch.float64)
        x = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,), fast_mode=True)

    @pytest.mark.parametrize(("batch", "hidden", "groups"), [(3, 160, (1, 2)), (64, 48, (2, 1))])
    def test_threads(self, batch: int, hidden: int, groups: tuple[int, int]) -> None:
        plan = _C.plan(EveryRow._spec.name, 4, batch, 16, hidden, dtype="float64", threads=2)
        assert (plan["row_groups"], plan["unit_groups"]) == groups
        module = build(EveryRow, 16, hidden, dtype=torch.float64)
        x, threads = torch.randn(4, batch, 16, dtype=torch.float64), torch.get_num_threads()
        lengths = torch.randint(1, 5, (batch,))
        try:
            torch.set_num_threads(2)
            for options in ({}, {"lengths": lengths}):
                ours = gradients(module, x, **options)
                theirs = by_composite(lambda o=options: gradients(module, x, **o))
                assert_same_in_double(ours, theirs)
        finally:
            torch.set_num_threads(threads)

    def test_ways_to_call(self) -> None:
        double = torch.float64
        module = build(EveryRow, 4, 18, 2, bidirectional=True, batch_first=True, dtype=double)
        x, hx = torch.randn(3, 5, 4, dtype=double), states(EveryRow, 4, 3, 18, dtype=double)
        lengths, resets = torch.tensor([5, 2, 3]), torch.rand(3, 5) > 0.6
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        calls: list[Callable[[], Any]] = [
            lambda: module(x, hx),
            lambda: module(x[0]),
            lambda: module(x[:, :1], hx),
            lambda: gradients(module, x, hx, lengths=lengths),
            lambda: gradients(module, x, hx, resets=resets, reset_state=hx),
            lambda: module(packed, hx),
        ]
        for call in calls:
            assert_same_as_composite(call)
        expected = gradients(module, x, hx)
        module.recompute = 2
        assert_same(gradients(module, x, hx), expected)

    def test_graphs(self) -> None:
        module = build(EveryRow, 4, 18, 2, bidirectional=True)
        x = torch.randn(5, 2, 4)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        expected = gradients(module, x)
        for name, value in gradients(compiled, x).items():
            assert_same(value, expected[name.removeprefix("_orig_mod.")])
        exported = torch.export.export(module.eval(), (x,)).module()
        assert_same(exported(x), module(x))

    def test_few_units_run_as_torch_operations(self) -> None:
        least = EveryRow._spec.least_hidden
        assert least > 2
        for hidden in (2, least - 1, least):
            module = build(EveryRow, 3, hidden)
            x = torch.randn(3, 2, 3)
            name = kernels.NAME if hidden == least else composite.NAME
            assert fastrnn.explain(module, x).backend == name
            module(x)[0].sum().backward()
        module = build(EveryRow, 3, 2).eval()
        with torch.no_grad():
            module(torch.randn(3, 2, 3), lengths=torch.tensor([3, 1]))
        with pytest.raises(ValueError, match=f"needs at least {least} units"):
            _C.plan(EveryRow._spec.name, 3, 2, 3, 2)

    def test_initial_values(self) -> None:
        module = build(EveryRow, 3, 12, bidirectional=True)
        for _ in range(2):
            assert torch.equal(module.gain_l0_reverse, torch.ones(12))
            assert torch.equal(module.shift_l0, torch.zeros(12))
            nn.init.normal_(module.gain_l0_reverse)
            nn.init.normal_(module.shift_l0)
            module.reset_parameters()


def twins(*sizes: int, **options: Any) -> tuple[Any, nn.Module]:
    """Returns a layer of `MyNormLSTM`, and `fastrnn.LSTM` with the same weights."""
    torch.manual_seed(5)
    module = MyNormLSTM(*sizes, bias=False, **options)
    twin = fastrnn.LSTM(*sizes, layer_norm=True, **options)
    with torch.no_grad():
        for suffix in module._suffixes():
            own = {name: getattr(module, name + suffix) for name in module.unit_parameter_names}
            values = {
                "weight_ih": getattr(module, "weight_ih" + suffix),
                "weight_hh": getattr(module, "weight_hh" + suffix),
                "bias_ih": torch.tensor(0),
                "bias_hh": torch.tensor(0),
                "gain_ih": torch.cat([own[name] for name in GAINS[:4]]),
                "gain_hh": torch.cat([own[name] for name in GAINS[4:]]),
                "gain_c": own["gain_c"],
                "bias_c": own["bias_c"],
            }
            for name, value in values.items():
                getattr(twin, name + suffix).copy_(value)
    return module, twin


def assert_twins_agree() -> None:
    module, twin = twins(4, 24, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    ours, theirs = gradients(module, x), gradients(twin, x)
    for name, value in ours.items():
        if name in theirs:
            assert_same_in_double(value, theirs[name])
    gains = torch.cat([ours[f"{name}_l1_reverse"] for name in GAINS[4:]])
    assert_same_in_double(gains, theirs["gain_hh_l1_reverse"])
    assert_same_in_double(ours["bias_c_l0"], theirs["bias_c_l0"])


def test_formula_of_the_normalised_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MyNormLSTM, "_load", lambda _: None)
    by_composite(assert_twins_agree)


@needs_compiler
@pytest.mark.slow
def test_is_the_normalised_lstm_of_fastrnn() -> None:
    module, _ = twins(4, 24)
    assert fastrnn.explain(module, torch.randn(2, 1, 4)).backend == kernels.NAME
    assert_twins_agree()


@needs_compiler
@pytest.mark.slow
def test_without_parameters() -> None:
    module = build(MyNormRNN, 4, 20, 2, dtype=torch.float64)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    assert_same_in_double(gradients(module, x), by_composite(lambda: gradients(module, x)))
    prepared = copy.deepcopy(module).eval().prepare()
    assert_same_in_double(prepared(x)[0], module(x)[0])
    stream = copy.deepcopy(module).eval().stream(batch_size=3)
    steps = torch.stack([stream.step(step).clone() for step in x])
    assert_same_in_double(steps, module(x)[0])


@needs_compiler
@pytest.mark.slow
def test_every_instruction_set() -> None:
    before = _C.cpu_capability()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    try:
        for isa in _C.available_isas():
            _C.set_isa(isa)
            module = build(EveryRow, 4, 19, dtype=torch.float64)
            ours = gradients(module, x)
            theirs = by_composite(lambda module=module: gradients(module, x))
            assert_same_in_double(ours, theirs)
    finally:
        _C.set_isa(before)
