"""Limitations of torch.nn's recurrent modules that fastrnn does not have: one class each.

In this order: subclasses that break Dynamo's graph, loops of small operations, limits of cuDNN,
forward mode and vmap, export with any length, scripting of subclasses, dropout that is not
reproducible, missing checks. test_parity covers the behaviour that both libraries share;
test_compile, test_export and test_script have more tests of
compiling, exporting and scripting.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    CELLS,
    Case,
    CountOps,
    build,
    check,
    exact_call,
    raised,
    reference_math,
    states,
)
from tolerance import Change, assert_agrees, assert_same_in_double
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.gradcheck import gradgradcheck
from torch.export import Dim, export
from torch.func import functional_call, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

LAYERS = ["RNN", "LSTM", "GRU"]
every_cell = pytest.mark.parametrize("cell", CELLS)


class Derived(fastrnn.LSTM):
    """A subclass with features that torch cannot compile or script in one of ``torch.nn.LSTM``."""


class TestSubclassesThatDynamoBreaksOn:
    """torch breaks the graph at any subclass of its layers and recompiles for each length."""

    @pytest.mark.parametrize("make", [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU, Derived])
    def test_one_graph_forward_and_backward(self, make: type[nn.Module]) -> None:
        torch._dynamo.reset()
        module = make(3, 4)
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
        for steps, batch in [(5, 2), (9, 3), (4, 7)]:
            x = torch.randn(steps, batch, 3, requires_grad=True)
            leaves = [x, *module.parameters()]
            outputs = [function(x)[0] for function in (compiled, module)]
            assert torch.equal(*outputs)
            got, expected = (torch.autograd.grad(y.sum(), leaves) for y in outputs)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert graphs.frame_count == 1


class TestLoopsOfSmallOperations:
    """torch runs an RNN or GRU on the CPU, and any packed input, as operations for each step."""

    def counts(self, cell: str, steps: int, is_packed: bool, is_training: bool) -> Counter[str]:
        module = build(cell, 3, 4)
        x: Any = torch.randn(steps, 3, 3)
        if is_packed:
            x = pack_padded_sequence(x, [steps, steps - 1, 1])
        with torch.set_grad_enabled(is_training), CountOps() as counter:
            output, _ = module(x)
            if is_training:
                data = output.data if is_packed else output
                torch.autograd.grad(data, list(module.parameters()), torch.ones_like(data))
        return counter.counts

    @pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
    @every_cell
    def test_one_operator_runs_all_steps(
        self, cell: str, is_packed: bool, is_training: bool
    ) -> None:
        few, many = (self.counts(cell, steps, is_packed, is_training) for steps in (4, 40))
        assert few == many
        assert many["fastrnn.recurrent_forward"] == 1
        assert many["fastrnn.recurrent_gradients"] == int(is_training)
        with reference_math():  # the number of operators of a loop
            assert self.counts(cell, 40, is_packed, is_training).total() > 40

    @every_cell
    def test_only_packed_rows_are_computed(self, cell: str) -> None:
        """Padding is never computed: there are as many output rows as input rows."""
        module = build(cell, 3, 4)
        packed = pack_padded_sequence(torch.randn(9, 3, 3), [9, 2, 1])
        assert packed.data.shape[0] == 12
        output = check(module, packed)["out0"]
        assert output.shape[0] == 12


class TestLimitsOfCudnn:
    """No double backward, none in eval mode, T up to 65,535, contiguous states."""

    @every_cell
    def test_double_backward(self, cell: str, device: str) -> None:
        case = Case(cell, {"num_layers": 2}, device=device)
        assert gradgradcheck(case, case.inputs, fast_mode=True)

    @every_cell
    def test_backward_in_eval_mode(self, cell: str, device: str) -> None:
        module = build(cell, 3, 4, device=device).eval()
        check(module, torch.randn(5, 2, 3, device=device, requires_grad=True))

    @every_cell
    def test_many_steps(self, cell: str, device: str) -> None:
        """Runs more steps than 16 bits can count, and compares with two halves."""
        module = build(cell, 1, 2, dtype=torch.float64, device=device)
        x = torch.randn(70_000, 1, 1, dtype=torch.float64, device=device)
        with torch.no_grad():
            _, half = module(x[:35_000])
            second, expected = module(x[35_000:], half)
        output, end = module(x)
        assert_same_in_double(output[35_000:], second)
        assert_same_in_double(end, expected)
        output.sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())

    @every_cell
    def test_states_that_are_not_contiguous(self, cell: str, device: str) -> None:
        module = build(cell, 3, 4, num_layers=2, device=device)
        h = torch.randn(4, 3, 2, device=device).permute(2, 1, 0)
        assert not h.is_contiguous()
        x = torch.randn(5, 3, 3, device=device)
        hx, dense = ((h, h), (h.clone(), h.clone())) if cell == "lstm" else (h, h.contiguous())
        assert torch.equal(module(x, hx)[0], module(x, dense)[0])


class TestForwardModeAndVmap:
    """In torch, LSTM has no forward mode in float32 on the CPU, and no layer supports vmap."""

    @every_cell
    def test_jvp(self, cell: str) -> None:
        """Compares the derivative along the input with a difference quotient in float64."""
        module = build(cell, 3, 4)
        x = torch.randn(5, 2, 3)

        def derivative(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return jvp(lambda x: module(x)[0], (x,), (x,))[1]

        def quotient(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            ends = [module(x * (1 + step))[0] for step in (1e-6, -1e-6)]
            return (ends[0] - ends[1]) / 2e-6

        with reference_math():
            theirs = derivative(module, x)
        assert_agrees(derivative(module, x), theirs, exact_call(module, x, call=quotient))

    @pytest.mark.parametrize("over", ["input", "weights", "both"])
    @every_cell
    def test_vmap(self, cell: str, over: str) -> None:
        module = build(cell, 3, 4)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        many = {name: torch.stack([p, 2 * p, -p]) for name, p in parameters.items()}
        x, xs = torch.randn(5, 2, 3), torch.randn(3, 5, 2, 3)

        def call(parameters: Any, x: torch.Tensor) -> torch.Tensor:
            return functional_call(module, parameters, (x,))[0]

        p_dim, x_dim = {"input": (None, 0), "weights": (0, None), "both": (0, 0)}[over]
        got = vmap(call, (p_dim, x_dim))(
            many if p_dim == 0 else parameters, xs if x_dim == 0 else x
        )
        for index in range(3):
            own = {name: value[index] for name, value in many.items()} if p_dim == 0 else parameters
            one = xs[index] if x_dim == 0 else x

            def exact(change: Change, own: Any = own, one: torch.Tensor = one) -> torch.Tensor:
                with reference_math():
                    return call({name: change(p) for name, p in own.items()}, change(one))

            assert_agrees(got[index], call(own, one), exact)


class TestExportWithAnyLength:
    """torch cannot export a layer with a dynamic number of steps."""

    @pytest.mark.parametrize("name", LAYERS)
    def test_saved_and_loaded(self, name: str, tmp_path: Path) -> None:
        module = getattr(fastrnn, name)(3, 4)
        free = {0: Dim("T"), 1: Dim("B")}
        program = export(module, (torch.randn(5, 2, 3),), dynamic_shapes=(free,))
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        for steps, batch in [(5, 2), (8, 3)]:
            x = torch.randn(steps, batch, 3)
            assert torch.equal(loaded(x)[0], module(x)[0])


class TestScriptingOfSubclasses:
    """torch.jit does not find a ``forward`` that a subclass inherits."""

    @pytest.mark.parametrize("way", ["script", "trace"])
    def test_inside_a_model(self, way: str) -> None:
        model = nn.Sequential(Derived(3, 4))
        x = torch.randn(5, 2, 3)
        scripted = torch.jit.script(model) if way == "script" else torch.jit.trace(model, (x,))
        x = torch.randn(7, 3, 3)
        assert torch.equal(scripted(x)[0], model(x)[0])


class TestReproducibleDropout:
    """cuDNN's dropout does not use torch's generator."""

    @every_cell
    def test_same_seed_same_result(self, cell: str, device: str) -> None:
        module = build(cell, 3, 4, num_layers=3, dropout=0.5, device=device)
        x = torch.randn(5, 2, 3, device=device)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            output, _ = module(x)
            gradients = torch.autograd.grad(output.square().sum(), list(module.parameters()))
            results.append([output, *gradients])
        first, again, other = results
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])

    @every_cell
    def test_results_without_dropout_are_deterministic(self, cell: str, device: str) -> None:
        module = build(cell, 9, 33, bidirectional=True, device=device)
        x = torch.randn(20, 7, 9, device=device, requires_grad=True)
        results = []
        for _ in range(3):
            output, _ = module(x)
            gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
            results.append([output, *gradients])
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


class TestMissingChecks:
    """fastrnn raises one sentence that names the mistake before it computes anything."""

    @pytest.mark.parametrize("name", LAYERS)
    def test_packed_input_size(self, name: str) -> None:
        """torch checks the size for every module except LSTM."""
        packed = pack_padded_sequence(torch.zeros(5, 2, 7), [5, 3])
        error = raised(lambda: getattr(fastrnn, name)(3, 4)(packed))
        assert str(error) == str(raised(lambda: nn.GRU(3, 4)(packed)))

    @pytest.mark.parametrize("name", LAYERS)
    def test_packed_states(self, name: str) -> None:
        """torch checks the states for every module except LSTM."""
        packed = pack_padded_sequence(torch.zeros(5, 2, 3), [5, 3])
        error = raised(lambda: getattr(fastrnn, name)(3, 4)(packed, states(name, 1, 3, 4)))
        which = "[0]" if name == "LSTM" else ""
        assert str(error) == f"Expected hidden{which} size (1, 2, 4), got [1, 3, 4]"
        assert type(error) is RuntimeError

    @pytest.mark.parametrize("name", LAYERS)
    def test_dtype_of_states(self, name: str) -> None:
        """torch's messages name only mat1 and mat2."""
        hx = states(name, 1, 2, 4, dtype=torch.float64)
        with pytest.raises(
            RuntimeError,
            match="Input and hidden tensors are not the same dtype, found input tensor with "
            r"torch\.float32 and hidden tensor with torch\.float64",
        ):
            getattr(fastrnn, name)(3, 4)(torch.zeros(5, 2, 3), hx)

    @pytest.mark.parametrize("name", ["RNN", "GRU"])
    def test_positional_projection(self, name: str) -> None:
        """torch creates the module, and calling it fails."""
        start = [3, 4, 1, *(["tanh"] if name == "RNN" else []), True, False, 0.0, False]
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            getattr(fastrnn, name)(*start, 2)

    @pytest.mark.parametrize("name", LAYERS)
    def test_packed_states_of_a_dtype(self, name: str) -> None:
        packed = pack_padded_sequence(torch.zeros(5, 2, 3), [5, 3])
        error = raised(
            lambda: getattr(fastrnn, name)(3, 4)(packed, states(name, 1, 2, 4, dtype=torch.half))
        )
        assert "Input and hidden tensors are not the same dtype" in str(error)
