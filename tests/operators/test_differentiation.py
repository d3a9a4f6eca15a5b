"""Every way in which torch differentiates or batches a function, for every cell, layer and step.

test_autograd checks first and second derivatives of layers. This file covers forward mode,
``torch.func``, batched derivatives, checkpointing, hooks on saved tensors, and mixed precision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import CELLS, Case, CountOps, build, make_step, pack, reference_math
from tolerance import Change, assert_agrees, assert_same_in_double, widen
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64

# arguments of Case besides the cell
FORMS: dict[str, dict[str, Any]] = {
    "step": {"step": True},
    "padded": {},
    "packed": {"packed": True},
    "bidirectional": {"options": {"bidirectional": True, "batch_first": True}},
    "layers": {"options": {"num_layers": 2, "bias": False}},
    "packed layers": {"options": {"num_layers": 2, "bidirectional": True}, "packed": True},
}
PROJECTED: dict[str, dict[str, Any]] = {
    "projected": {"options": {"proj_size": 2}},
    "projected packed": {"options": {"proj_size": 2, "bidirectional": True}, "packed": True},
}
SUBJECTS = [
    pytest.param(cell, form, id=f"{cell}-{name}")
    for cell in CELLS
    for name, form in {**FORMS, **(PROJECTED if cell == "lstm" else {})}.items()
]
every_subject = pytest.mark.parametrize(("cell", "form"), SUBJECTS)
every_cell = pytest.mark.parametrize("cell", CELLS)


def assert_all_close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Asserts that all values agree, and that not all of them are zero."""
    assert len(got) == len(expected) > 0
    for value, truth in zip(got, expected, strict=True):
        assert_same_in_double(value, truth)
    assert any(truth.abs().max() > 0 for truth in expected)


def is_torchs_step(cell: str, form: dict[str, Any]) -> bool:
    """Whether torch's own step computes and differentiates this case in float32 and float64."""
    return "step" in form and cell in ("rnn_tanh", "rnn_relu")


def directions_like(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(t) for t in tensors)


class TestDoubleBackward:
    @every_subject
    def test_finite_differences(self, cell: str, form: dict[str, Any], device: str) -> None:
        case = Case(cell, **form, device=device)
        assert gradgradcheck(case, case.inputs, fast_mode=True)

    @every_cell
    def test_fifth_derivative(self, cell: str) -> None:
        """Differentiates along one line. The composite supports any order."""
        case = Case(cell)
        start, way = case.plain(), directions_like(case.inputs)

        def derivatives() -> list[Tensor]:
            s = torch.zeros((), dtype=F64, requires_grad=True)
            value = case.loss(*(a + s * b for a, b in zip(start, way, strict=True)))
            values = []
            for _ in range(5):
                (value,) = torch.autograd.grad(value, s, create_graph=True)
                values.append(value.detach())
            return values

        got = derivatives()
        with reference_math():
            assert_all_close(got, derivatives())

    @every_cell
    def test_gradient_penalty_reaches_the_weights(self, cell: str) -> None:
        """Calls backward() on a gradient, as in training, and checks .grad."""
        grads = []
        for _ in range(2):
            module = build(cell, 3, 4, dtype=F64)
            x = torch.ones(5, 2, 3, dtype=F64, requires_grad=True)
            (d_x,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
            d_x.square().sum().backward()
            grads.append([p.grad for p in module.parameters()])
            with reference_math():
                (d_x,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
                expected = torch.autograd.grad(d_x.square().sum(), list(module.parameters()))
            assert_all_close(grads[-1], expected)


class TestForwardMode:
    @every_subject
    def test_finite_differences(self, cell: str, form: dict[str, Any], device: str) -> None:
        """Checks dual tensors, with single and with batched tangents."""
        case = Case(cell, **form, device=device)
        assert gradcheck(
            case,
            case.inputs,
            check_forward_ad=True,
            check_backward_ad=False,
            check_batched_forward_grad=True,
        )

    @every_subject
    def test_forward_over_reverse(self, cell: str, form: dict[str, Any]) -> None:
        case = Case(cell, **form)
        assert gradgradcheck(
            case,
            case.inputs,
            check_fwd_over_rev=True,
            check_rev_over_rev=False,
            check_undefined_grad=False,
            fast_mode=True,
        )

    @every_subject
    def test_jvp_and_vjp_agree(self, cell: str, form: dict[str, Any]) -> None:
        """Checks w . (J v) = (w J) . v; the kernels compute the right side."""
        case = Case(cell, **form)
        primals = case.plain()
        tangents = directions_like(primals)
        outputs, d_outputs = jvp(case, primals, tangents)
        weights = directions_like(outputs)
        rows = torch.autograd.grad(case(*case.inputs), case.inputs, weights)
        left = sum((w * d).sum() for w, d in zip(weights, d_outputs, strict=True))
        right = sum((r * t).sum() for r, t in zip(rows, tangents, strict=True))
        assert_all_close([left], [right])
        assert_all_close(outputs, case(*primals))

    @every_cell
    def test_linearize(self, cell: str) -> None:
        """linearize traces, so it cannot read ``batch_sizes``, as for torch's own layers."""
        case = Case(cell, {"num_layers": 2, "bidirectional": True})
        primals = case.plain()
        tangents = directions_like(primals)
        outputs, push = linearize(case, *primals)
        assert_all_close(outputs, case(*primals))
        assert_all_close(push(*tangents), jvp(case, primals, tangents)[1])

    @every_subject
    def test_jacobians(self, cell: str, form: dict[str, Any]) -> None:
        """Computes columns by forward mode and rows by reverse mode, batched or one by one."""
        case = Case(cell, **form)
        (x, *rest) = case.plain()

        def function(x: Tensor) -> Tensor:
            return case(x, *rest)[0]

        rows = torch.autograd.functional.jacobian(function, x)
        batched = torch.autograd.functional.jacobian(function, x, vectorize=True)
        columns = torch.autograd.functional.jacobian(
            function, x, vectorize=True, strategy="forward-mode"
        )
        ways = [jacfwd(function)(x), jacrev(function)(x), jacrev(function, chunk_size=2)(x)]
        for jacobian in (batched, columns, *ways):
            assert_all_close([jacobian], [rows])

    @every_cell
    def test_dual_gradients(self, cell: str) -> None:
        """Only the incoming gradient has a tangent."""
        case = Case(cell)
        outputs = case(*case.inputs)
        primals, tangents = directions_like(outputs), directions_like(outputs)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
            got = torch.autograd.grad(outputs, case.inputs, duals, retain_graph=True)
            got = [forward_ad.unpack_dual(value).tangent for value in got]
        assert None not in got
        assert_all_close(got, torch.autograd.grad(outputs, case.inputs, tangents))

    @every_cell
    def test_single_precision(self, cell: str) -> None:
        """Checks float32, for which torch's LSTM has no forward mode."""
        case, wide = Case(cell, dtype=torch.float32), Case(cell)
        primals = case.plain()
        tangents = directions_like(primals)

        def exact(change: Change) -> Any:
            given = (tuple(change(t) for t in tensors) for tensors in (primals, tangents))
            return list(jvp(wide, *given)[1])

        got = list(jvp(case, primals, tangents)[1])
        assert_agrees(got, [value.float() for value in exact(widen)], exact)


class TestFunc:
    @every_subject
    def test_grad(self, cell: str, form: dict[str, Any]) -> None:
        case = Case(cell, **form)
        every = tuple(range(len(case.inputs)))
        expected = torch.autograd.grad(case.loss(*case.inputs), case.inputs)
        assert_all_close(grad(case.loss, argnums=every)(*case.plain()), expected)
        gradients, value = grad_and_value(case.loss, argnums=every)(*case.plain())
        assert_all_close([*gradients, value], [*expected, case.loss(*case.plain())])
        outputs, pull = vjp(case, *case.plain())
        weights = directions_like(outputs)
        assert_all_close(
            pull(weights), torch.autograd.grad(case(*case.inputs), case.inputs, weights)
        )

    @every_cell
    def test_kernels_compute_the_forward_pass(self, cell: str) -> None:
        """The kernels compute the gradient only if it cannot be differentiated again."""
        case = Case(cell)

        def kernels(call: Callable[[], Any]) -> tuple[int, int]:
            with CountOps() as counter:
                call()
            counts = counter.counts
            return counts["fastrnn.recurrent_forward"], counts["fastrnn.recurrent_gradients"]

        def pull_back() -> None:
            outputs, pull = vjp(case, *case.plain())
            pull(outputs)

        assert kernels(lambda: torch.autograd.grad(case.loss(*case.inputs), case.inputs)) == (1, 1)
        assert kernels(torch.no_grad()(pull_back)) == (1, 1)
        assert kernels(pull_back) == (1, 0)
        assert kernels(lambda: grad(case.loss)(*case.plain())) == (1, 0)
        assert kernels(lambda: jvp(case, case.plain(), case.plain())) == (0, 0)
        assert kernels(lambda: vmap(case)(*(t.expand(2, *t.shape) for t in case.plain()))) == (0, 0)

    @every_cell
    def test_hessians(self, cell: str) -> None:
        case = Case(cell)
        (x, *rest) = case.plain()

        def loss(x: Tensor) -> Tensor:
            return case.loss(x, *rest)

        expected = torch.autograd.functional.hessian(loss, x)
        ways = [
            hessian(loss)(x),
            *(outer(inner(loss))(x) for outer in (jacfwd, jacrev) for inner in (jacfwd, jacrev)),
            torch.autograd.functional.hessian(
                loss, x, vectorize=True, outer_jacobian_strategy="forward-mode"
            ),
        ]
        for way in ways:
            assert_all_close([way], [expected])
        _, product = jvp(grad(loss), (x,), (torch.ones_like(x),))
        assert_all_close([product], [expected.flatten(3).sum(-1)])

    @every_cell
    def test_functionalize(self, cell: str) -> None:
        case = Case(cell)
        assert_all_close(functionalize(case)(*case.plain()), case(*case.plain()))

    @every_cell
    def test_functional_call_with_some_weights_has_all_gradients(self, cell: str) -> None:
        """The other weights are the module's own. Each weight gets its gradient."""
        module = build(cell, 3, 4, num_layers=2)
        x = torch.randn(5, 2, 3)
        other = torch.randn_like(module.weight_hh_l1).requires_grad_()
        output, _ = functional_call(module, {"weight_hh_l1": other}, (x,))
        output.sum().backward()
        assert other.grad is not None
        assert module.weight_hh_l1.grad is None
        assert module.weight_ih_l1.grad is not None
        twin = copy.deepcopy(module)
        with torch.no_grad():
            twin.weight_hh_l1.copy_(other)
        assert torch.equal(twin(x)[0], output)


class TestVmap:
    @every_subject
    @pytest.mark.parametrize("over", ["input", "states", "weights", "all"])
    def test_matches_a_loop(self, cell: str, form: dict[str, Any], over: str) -> None:
        case = Case(cell, **form)
        own = case.plain()
        last_state = 1 + case.states
        ranges = {
            "input": range(1),
            "states": range(1, last_state),
            "weights": range(last_state, len(own)),
            "all": range(len(own)),
        }
        mapped = [index in ranges[over] for index in range(len(own))]
        # maps over another dimension than the first
        several = [
            torch.randn(*t.shape, 4, dtype=F64) if m else t
            for t, m in zip(own, mapped, strict=True)
        ]
        got = vmap(case, in_dims=tuple(-1 if m else None for m in mapped))(*several)
        loop = [
            case(*(t[..., i] if m else t for t, m in zip(several, mapped, strict=True)))
            for i in range(4)
        ]
        assert_all_close(got, [torch.stack(outputs) for outputs in zip(*loop, strict=True)])

    @every_cell
    def test_twice(self, cell: str) -> None:
        """Runs every input through every model."""
        case = Case(cell)
        x, *rest = case.plain()
        xs, scales = torch.randn(3, *x.shape, dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)

        def call(x: Tensor, scale: Tensor) -> Tensor:
            return case(x, *(t * scale for t in rest))[0]

        got = vmap(vmap(call, (None, 0)), (0, None))(xs, scales)
        assert_all_close([got[2, 1]], [call(xs[2], scales[1])])
        assert got.shape[:2] == (3, 2)

    @every_cell
    def test_in_chunks(self, cell: str) -> None:
        module = build(cell, 2, 3, dtype=F64)
        xs = torch.randn(5, 4, 2, 2, dtype=F64)
        got = vmap(lambda x: module(x)[0], chunk_size=2)(xs)
        assert_all_close([got], [torch.stack([module(x)[0] for x in xs])])

    @every_cell
    def test_dropout(self, cell: str) -> None:
        module = build(cell, 2, 3, num_layers=2, dropout=0.5, dtype=F64)
        xs = torch.randn(1, 4, 2, 2, dtype=F64).expand(3, 4, 2, 2)
        differing = vmap(lambda x: module(x)[0], randomness="different")(xs)
        same = vmap(lambda x: module(x)[0], randomness="same")(xs)
        assert not torch.equal(differing[0], differing[1])
        assert torch.equal(same[0], same[1])
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(lambda x: module(x)[0])(xs)

    @every_cell
    def test_half_types_are_rounded_once(self, cell: str) -> None:
        module = build(cell, 2, 3, dtype=torch.bfloat16)
        wide = copy.deepcopy(module).float()
        xs = torch.randn(3, 40, 2, 2, dtype=torch.bfloat16)
        got = vmap(lambda x: module(x)[0])(xs)
        expected = vmap(lambda x: wide(x)[0])(xs.float())
        assert torch.equal(got, expected.bfloat16())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_cell
    def test_under_autocast(self, cell: str, dtype: torch.dtype) -> None:
        """Results have autocast's dtype and the precision of the kernels."""
        module = build(cell, 2, 3)
        xs = torch.randn(3, 40, 2, 2)
        with torch.autocast("cpu", dtype=dtype):
            got = vmap(lambda x: module(x)[0])(xs)
        expected = vmap(lambda x: module(x)[0])(xs)
        assert got.dtype == (torch.float32 if cell == "gru" else dtype)
        assert torch.equal(got, expected.to(got.dtype))


def matrix_products(call: Callable[[], Any]) -> int:
    with CountOps() as counter:
        call()
    products = ("mm", "bmm", "addmm", "baddbmm", "linear", "mv", "addmv", "dot")
    return sum(counter.counts[f"aten.{name}"] for name in products)


class TestEnsembles:
    OPTIONS = ({}, {"num_layers": 2, "bidirectional": True})

    def models(self, cell: str, options: dict[str, Any], count: int) -> list[nn.Module]:
        models = [build(cell, 2, 3, dtype=F64, **options) for _ in range(count)]
        for seed, model in enumerate(models):
            torch.manual_seed(seed)
            model.reset_parameters()
        return models

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @every_cell
    def test_matches_a_loop(self, cell: str, options: dict[str, Any]) -> None:
        """Stacks parameters and uses a skeleton on "meta", as in torch's tutorial."""
        models = self.models(cell, options, 4)
        parameters, buffers = stack_module_state(models)
        skeleton = copy.deepcopy(models[0]).to("meta")

        def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
            return functional_call(skeleton, (parameters, buffers), (x,))[0]

        x = torch.randn(4, 5, 2, dtype=F64)
        xs = torch.randn(4, 4, 5, 2, dtype=F64)
        for argument, dim in ((x, None), (xs, 0)):
            got = vmap(call, (0, 0, dim))(parameters, buffers, argument)
            inputs = [x] * 4 if dim is None else list(xs)
            loop = torch.stack([m(i)[0] for m, i in zip(models, inputs, strict=True)])
            assert_all_close([got], [loop])
            wanted = list(parameters.values())
            gradients = torch.autograd.grad(got.square().sum(), wanted)
            each = [
                torch.autograd.grad(loop.square().sum(), list(m.parameters()), retain_graph=True)
                for m in models
            ]
            assert_all_close(gradients, [torch.stack(parts) for parts in zip(*each, strict=True)])

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @every_cell
    def test_products_are_grouped(self, cell: str, options: dict[str, Any]) -> None:
        """Eight models need as many matrix products, forward and backward, as two."""

        def counts(count: int) -> tuple[int, int]:
            parameters, _ = stack_module_state(self.models(cell, options, count))
            skeleton = copy.deepcopy(self.models(cell, options, 1)[0]).to("meta")
            x = torch.randn(4, 5, 2, dtype=F64)

            def loss(parameters: Any) -> Tensor:
                return functional_call(skeleton, parameters, (x,))[0].square().sum()

            return (
                matrix_products(lambda: vmap(loss)(parameters)),
                matrix_products(lambda: vmap(grad(loss))(parameters)),
            )

        steps = 4 * options.get("num_layers", 1) * (2 if options else 1)
        forward, both = counts(2)
        assert steps <= forward < both
        assert counts(8) == (forward, both)

    @every_cell
    def test_steps(self, cell: str) -> None:
        models = [make_step(cell, 2, 3, dtype=F64) for _ in range(4)]
        parameters, _ = stack_module_state(models)
        x = torch.randn(5, 2, dtype=F64)

        def call(parameters: Any) -> Tensor:
            result = functional_call(models[0], parameters, (x,))
            return result[0] if cell == "lstm" else result

        loop = [m(x)[0] if cell == "lstm" else m(x) for m in models]
        assert_all_close([vmap(call)(parameters)], [torch.stack(loop)])


class TestPerSampleGradients:
    @every_subject
    def test_match_a_loop(self, cell: str, form: dict[str, Any]) -> None:
        case = Case(cell, **form)
        x, *rest = case.plain()
        every = tuple(range(len(case.inputs)))
        xs = torch.randn(4, *x.shape, dtype=F64)
        got = vmap(grad(case.loss, argnums=every), (0, *[None] * len(rest)))(xs, *rest)
        loop = []
        for sample in xs:
            leaves = [t.clone().requires_grad_() for t in (sample, *rest)]
            loop.append(torch.autograd.grad(case.loss(*leaves), leaves))
        assert_all_close(got, [torch.stack(parts) for parts in zip(*loop, strict=True)])

    @every_cell
    def test_sum_to_the_gradient_of_the_batch(self, cell: str) -> None:
        """Each row of one batch is a sample."""
        module = build(cell, 2, 3, num_layers=2, dtype=F64)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        x = torch.randn(4, 5, 2, dtype=F64)

        def loss(parameters: Any, row: Tensor) -> Tensor:
            return functional_call(module, parameters, (row,))[0].square().sum()

        got = vmap(grad(loss), (None, 1))(parameters, x)
        expected = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
        assert_all_close([value.sum(0) for value in got.values()], expected)

    @every_subject
    def test_is_grads_batched(self, cell: str, form: dict[str, Any]) -> None:
        case = Case(cell, **form)
        outputs = case(*case.inputs)
        several = [torch.randn(3, *o.shape, dtype=F64) for o in outputs]
        got = torch.autograd.grad(
            outputs, case.inputs, several, retain_graph=True, is_grads_batched=True
        )
        loop = [
            torch.autograd.grad(outputs, case.inputs, [v[i] for v in several], retain_graph=True)
            for i in range(3)
        ]
        assert_all_close(got, [torch.stack(parts) for parts in zip(*loop, strict=True)])


class TestEngine:
    @every_cell
    def test_partial_inputs_of_a_step(self, cell: str) -> None:
        case = Case(cell, step=True)
        expected = torch.autograd.grad(case.loss(*case.inputs), case.inputs)
        for index, value in enumerate(expected):
            (got,) = torch.autograd.grad(case.loss(*case.inputs), case.inputs[index])
            assert torch.equal(got, value)
            alone = list(case.plain())
            alone[index].requires_grad_()
            (got,) = torch.autograd.grad(case.loss(*alone), alone[index])
            assert_same_in_double(got, value)

    @every_subject
    def test_retained_graph(self, cell: str, form: dict[str, Any]) -> None:
        """A second backward gives the same values, also after a derivative by the composite."""
        case = Case(cell, **form)
        loss = case.loss(*case.inputs)
        first = torch.autograd.grad(loss, case.inputs, retain_graph=True)
        composite = torch.autograd.grad(loss, case.inputs, create_graph=True)
        again = torch.autograd.grad(loss, case.inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert_all_close(composite, first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, case.inputs)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
    @pytest.mark.filterwarnings("ignore:Error detected in")
    @every_subject
    def test_anomaly_mode(self, cell: str, form: dict[str, Any]) -> None:
        """Anomaly mode accepts finite gradients and names the layer whose backward made a NaN."""
        case = Case(cell, **form)
        expected = torch.autograd.grad(case.loss(*case.inputs), case.inputs)
        with torch.autograd.detect_anomaly(check_nan=True):
            got = torch.autograd.grad(case.loss(*case.inputs), case.inputs)
            with torch.no_grad():
                case.inputs[0].view(-1)[0] = math.nan
            outputs = case(*case.inputs)
            name = "" if is_torchs_step(cell, form) else "LayerFunctionBackward' "
            with pytest.raises(RuntimeError, match=f"{name}returned nan values"):
                torch.autograd.grad(outputs, case.inputs, directions_like(outputs))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @every_subject
    def test_saved_tensor_hooks(self, cell: str, form: dict[str, Any]) -> None:
        """Hooks may replace saved tensors by other tensors, also for second derivatives."""
        case = Case(cell, **form)

        def derivatives() -> list[Tensor]:
            first = torch.autograd.grad(case.loss(*case.inputs), case.inputs)
            once = torch.autograd.grad(case.loss(*case.inputs), case.inputs, create_graph=True)
            penalty = sum((g.square().sum() for g in once), torch.zeros(()))
            return [*first, *torch.autograd.grad(penalty, case.inputs)]

        def to_array(t: Tensor) -> np.ndarray:
            return t.detach().numpy().copy()

        expected = derivatives()
        with torch.autograd.graph.save_on_cpu():
            got = derivatives()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        # arrays lose their strides, and products of other strides may sum in another order
        with torch.autograd.graph.saved_tensors_hooks(to_array, torch.from_numpy):
            assert_all_close(derivatives(), expected)

    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @every_subject
    def test_checkpoint(self, cell: str, form: dict[str, Any], use_reentrant: bool) -> None:
        case = Case(cell, **form)
        expected = case(*case.inputs)
        weights = directions_like(expected)
        gradients = torch.autograd.grad(expected, case.inputs, weights)
        got = checkpoint(case, *case.inputs, use_reentrant=use_reentrant)
        leaves = case.inputs
        torch.autograd.backward(got, weights)
        for pairs in (
            zip(got, expected, strict=True),
            zip((leaf.grad for leaf in leaves), gradients, strict=True),
        ):
            assert all(torch.equal(a, b) for a, b in pairs)

    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @every_cell
    def test_checkpoint_repeats_dropout(self, cell: str, use_reentrant: bool) -> None:
        module = build(cell, 2, 3, num_layers=3, dropout=0.5)
        results = []
        for is_checkpointed in (False, True):
            x = torch.ones(4, 2, 2, requires_grad=True)
            module.zero_grad()
            torch.manual_seed(3)
            if is_checkpointed:
                output, _ = checkpoint(module, x, use_reentrant=use_reentrant)
            else:
                output, _ = module(x)
            output.square().sum().backward()
            results.append([output, x.grad, *(p.grad.clone() for p in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @every_cell
    def test_checkpoint_saves_no_tensors_of_the_layer(self, cell: str) -> None:
        """The layer's saved tensors are freed between forward and backward."""
        module = build(cell, 2, 3)
        x = torch.randn(50, 2, 2, requires_grad=True)
        sizes: list[int] = []

        def note(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            checkpoint(lambda x: module(x)[0].sum(), x, use_reentrant=False)
        assert sum(sizes) <= x.numel()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            module(x)[0].sum()
        assert sum(sizes) > 2 * x.numel()

    @every_cell
    def test_hooks_on_tensors_and_gradients(self, cell: str) -> None:
        """A hook on the output changes the incoming gradient; one on a weight gets its gradient."""
        module = build(cell, 2, 3, dtype=F64)
        x = torch.randn(4, 2, 2, dtype=F64)
        expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
        seen: list[Tensor] = []
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        output, _ = module(x)
        output.register_hook(lambda d_y: 2 * d_y)
        output.sum().backward()
        assert len(seen) == len(expected)
        assert_all_close([p.grad for p in module.parameters()], [2 * g for g in expected])


class TestMixedPrecision:
    LOSS_FALLS = 0.5  # bound on last loss / first loss; every cell stays below it

    def train(
        self, module: nn.Module, step: Callable[[Tensor], Tensor], dtype: torch.dtype, rounds: int
    ) -> list[float]:
        """Learns to sum the inputs with mixed precision, as in torch's recipe."""
        torch.manual_seed(0)
        device = next(module.parameters()).device.type
        head = nn.Linear(8, 1, device=device)
        parameters = [*module.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, 2e-2)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        x = torch.randn(6, 16, 4).to(device)
        y = x.sum((0, 2)).div(4).tanh().unsqueeze(1)
        losses = []
        for _ in range(rounds):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=dtype):
                state = step(x)
                assert state.dtype in (dtype, torch.float32)
                loss = (head(state).float() - y).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 2.0**10  # no step was skipped
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
        return losses

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_cell
    def test_layer_learns(self, cell: str, dtype: torch.dtype, device: str) -> None:
        module = build(cell, 4, 8, device=device)
        losses = self.train(module, lambda x: module(x)[0][-1], dtype, 80)
        assert losses[-1] < self.LOSS_FALLS * losses[0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_cell
    def test_step_learns(self, cell: str, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(17)
        module = make_step(cell, 4, 8, device=device)

        def step(x: Tensor) -> Tensor:
            hx = None
            for x_t in x:
                hx = module(x_t, hx)
            return hx[0] if cell == "lstm" else hx

        losses = self.train(module, step, dtype, 80)
        assert losses[-1] < self.LOSS_FALLS * losses[0]

    @pytest.mark.parametrize("make", [build, make_step], ids=["layer", "step"])
    @every_cell
    def test_scaler_skips_a_step_that_overflowed(
        self, cell: str, make: Callable[..., nn.Module], device: str
    ) -> None:
        module = make(cell, 4, 8, device=device)
        before = copy.deepcopy(module.state_dict())
        optimizer = torch.optim.SGD(module.parameters(), 1.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**30)
        with torch.autocast(device, dtype=torch.float16):
            x = torch.ones(*((16, 4) if make is make_step else (5, 16, 4)), device=device)
            result = module(x)
            # a float32 state cannot overflow
            loss = (result if isinstance(result, Tensor) else result[0]).half().float().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**29
        assert all(torch.equal(a, before[name]) for name, a in module.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_subject
    def test_create_graph_inside_autocast(
        self, cell: str, form: dict[str, Any], dtype: torch.dtype
    ) -> None:
        """A gradient inside autocast keeps the precision of values computed outside."""
        case = Case(cell, **form, dtype=torch.float32)
        expected = torch.autograd.grad(case.loss(*case.inputs), case.inputs, create_graph=True)
        loss = case.loss(*case.inputs)
        with torch.autocast("cpu", dtype=dtype):
            got = torch.autograd.grad(loss, case.inputs, create_graph=True)
        if is_torchs_step(cell, form):  # autocast rounds the products of torch's step
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        else:
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @every_cell
    def test_double_backward_of_half_types(self, cell: str) -> None:
        """With create_graph=True the first derivative is still accumulated in float32."""
        module = build(cell, 2, 3, dtype=torch.bfloat16)
        x = torch.randn(40, 2, 2, dtype=torch.bfloat16, requires_grad=True)
        inputs = [x, *module.parameters()]
        loss = module(x)[0].sum()
        kernels = torch.autograd.grad(loss, inputs, retain_graph=True)
        composite = torch.autograd.grad(loss, inputs, create_graph=True)
        eps = torch.finfo(torch.bfloat16).eps
        for a, b in zip(composite, kernels, strict=True):
            assert (a - b).abs().max() <= 4 * eps * b.abs().max()
        second = torch.autograd.grad(composite[0].float().square().sum(), inputs)
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in second)

    @every_cell
    def test_packed_under_autocast(self, cell: str) -> None:
        module = build(cell, 2, 3, bidirectional=True)
        packed = pack(torch.randn(9, 2), [4, 2, 3], False)
        weights = list(module.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = module(packed)
        got = torch.autograd.grad(output.data.float().sum(), weights)
        exact, _ = module(packed)
        expected = torch.autograd.grad(exact.data.sum(), weights)
        assert output.data.dtype == (torch.float32 if cell == "gru" else torch.bfloat16)
        assert torch.equal(output.data, exact.data.to(output.data.dtype))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
