"""Gradients: checked by finite differences, and with every feature of autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, Case, build, check, make_step, reference_math, run
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

F64 = torch.float64

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "batch_first": True},
    {"bidirectional": True},
]
CASES = [(cell, options) for cell in CELLS for options in OPTIONS] + [
    ("lstm", {"proj_size": 2}),
    ("lstm", {"proj_size": 1, "num_layers": 2, "bidirectional": True}),
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("cell", "options"), CASES, ids=str)
def test_gradients_pass_gradcheck(cell: str, options: dict[str, Any], packed: bool) -> None:
    case = Case(cell, options, packed)
    assert gradcheck(case, case.inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_pass_gradgradcheck(cell: str, packed: bool) -> None:
    case = Case(cell, {"bidirectional": True} if packed else {}, packed)
    assert gradgradcheck(case, case.inputs)


def test_second_derivatives_of_a_projection_pass_gradgradcheck() -> None:
    case = Case("lstm", {"proj_size": 2, "num_layers": 2}, False)
    assert gradgradcheck(case, case.inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_cells_pass_gradcheck(cell: str) -> None:
    case = Case(cell, step=True)
    assert gradcheck(case, case.inputs)
    assert gradgradcheck(case, case.inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative_counts_a_dependent_state_once(cell: str) -> None:
    """The initial state depends on x, and its part of the gradient of x must count only once."""
    module = build(cell, 3, 3, dtype=F64)

    def penalty(x: Tensor) -> Tensor:
        h = (x[:1] * 2).tanh()
        hx = (h, h) if cell == "lstm" else h
        (first,) = torch.autograd.grad(module(x, hx)[0].square().sum(), x, create_graph=True)
        return first.square().sum()

    x = torch.randn(4, 2, 3, dtype=F64, requires_grad=True)
    (ours,) = torch.autograd.grad(penalty(x), x)
    with reference_math():
        (expected,) = torch.autograd.grad(penalty(x), x)
    assert_same_in_double(ours, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_any_subset_of_inputs_gets_its_gradients(cell: str, packed: bool) -> None:
    """Each input alone gets the gradient that it gets when all inputs require one."""
    case = Case(cell, {"num_layers": 2, "bidirectional": True}, packed)
    weights = [torch.randn_like(output) for output in case(*case.inputs)]
    expected = torch.autograd.grad(case(*case.inputs), case.inputs, weights)
    for index, value in enumerate(expected):
        alone = [t.detach() for t in case.inputs]
        alone[index].requires_grad_()
        (got,) = torch.autograd.grad(case(*alone), alone[index], weights)
        assert_same_in_double(got, value)


@pytest.mark.parametrize(
    ("cell", "which"), [(cell, which) for cell in CELLS for which in (0, 1)] + [("lstm", 2)]
)
def test_loss_of_any_single_output_matches_reference(cell: str, which: int) -> None:
    """The loss depends only on the output, only on h_n or only on c_n."""
    case = Case(cell, {"bidirectional": True}, False)
    got = torch.autograd.grad(case(*case.inputs)[which].square().sum(), case.inputs)
    with reference_math():
        expected = torch.autograd.grad(case(*case.inputs)[which].square().sum(), case.inputs)
    for value, truth in zip(got, expected, strict=True):
        assert_same_in_double(value, truth)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_expanded_incoming_gradients_match_dense_ones(cell: str, batch_first: bool) -> None:
    """Sums, means and broadcasts create incoming gradients with stride 0."""
    module = build(cell, 3, 4, batch_first=batch_first, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    losses = (
        lambda y: y.sum(),
        lambda y: y.mean(0).square().sum(),
        lambda y: y[:, -1].sum(),
        lambda y: y[-1].sum(),
        lambda y: (y * torch.randn(4, dtype=F64, generator=torch.Generator().manual_seed(1))).sum(),
        lambda y: y.transpose(0, 1).square().flip(0)[..., ::2].sum(),
    )
    for loss in losses:
        got = torch.autograd.grad(loss(module(x)[0]), [x, *module.parameters()])
        with reference_math():
            expected = torch.autograd.grad(loss(module(x)[0]), [x, *module.parameters()])
        for value, truth in zip(got, expected, strict=True):
            assert_same_in_double(value, truth)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_works_in_eval_mode(cell: str) -> None:
    module = build(cell, 3, 4, num_layers=2, dropout=0.5).eval()
    check(module, torch.randn(5, 2, 3, requires_grad=True))


@pytest.mark.parametrize("cell", CELLS)
def test_graph_is_retained_or_freed_as_requested(cell: str) -> None:
    module = build(cell, 3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    loss = module(x)[0].sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("cell", CELLS)
def test_backward_frees_what_forward_saved(cell: str) -> None:
    saved: list[weakref.ref[Tensor]] = []

    def pack_hook(t: Tensor) -> Tensor:
        copy = t.clone()
        saved.append(weakref.ref(copy))
        return copy

    module = build(cell, 3, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        loss = module(torch.randn(5, 2, 3))[0].sum()
    assert any(ref() is not None for ref in saved)
    loss.backward()
    assert all(ref() is None for ref in saved)


def test_nothing_is_saved_without_gradients() -> None:
    seen: list[Tensor] = []
    module = build("lstm", 3, 4).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        output, _ = module(torch.randn(5, 2, 3))
        with torch.no_grad():
            build("lstm", 3, 4)(torch.randn(5, 2, 3))
    assert not output.requires_grad
    assert seen == []


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "dropout": lambda y: nn.functional.dropout(y, 0.5, inplace=True),
    "mask": lambda y: y.__setitem__((slice(3, None), 1), 0),
    "scale of a view": lambda y: y[1:].mul_(2),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("cell", CELLS)
def test_output_may_be_changed_in_place(
    cell: str, options: dict[str, Any], change: str, packed: bool
) -> None:
    """Gives the gradients of changing a copy: the backward pass reads the unchanged output."""
    module = build(cell, 3, 4, **options)
    x = torch.randn(5, 2, 3, requires_grad=True)
    inputs = [x, *module.parameters()]
    gradients = []
    for copy_first in (True, False):
        y, h_n = module(pack_padded_sequence(x, [5, 4]) if packed else x)
        y = y.data if packed else y
        y = y.clone() if copy_first else y
        torch.manual_seed(0)
        CHANGES[change](y)
        h = h_n if isinstance(h_n, Tensor) else h_n[0]
        gradients.append(torch.autograd.grad(y.square().sum() + h.sum(), inputs))
    for expected, got in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


def test_output_changed_in_place_through_data() -> None:
    """``.data`` and NumPy also write into the caller's copy."""
    module = build("gru", 3, 4)
    x = torch.randn(5, 2, 3)
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    y = module(x)[0]
    y.data.zero_()
    z = module(x)[0]
    z.detach().numpy()[:] = 0
    for output in (y, z):
        got = torch.autograd.grad(output.sum(), list(module.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_output_is_copied_only_when_it_is_changed() -> None:
    y, _ = build("gru", 3, 4)(torch.randn(5, 2, 3))
    loss = build("lstm", 4, 3)(y)[0].sum() + nn.functional.linear(y, torch.randn(2, 4)).sum()
    loss.backward()
    assert torch._C._is_cow_tensor(y)
    y.mul_(2)
    assert not torch._C._is_cow_tensor(y)


@pytest.mark.parametrize("make", [build, make_step])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_changed_saved_tensor_raises(cell: str, make: Callable[..., nn.Module]) -> None:
    """Changing a tensor that backward needs raises; the error names the remedy."""
    x = torch.randn(2, 3) if make is make_step else torch.randn(5, 2, 3)
    result = make(cell, 3, 4)(x)
    output = result if isinstance(result, Tensor) else result[0]
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"(?i)modified by an inplace operation.*clone\(\)"):
        output.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_saved_tensors_are_tensors(cell: str) -> None:
    """Tools that draw graphs read them."""
    for options in ({}, {"bias": False}, {"num_layers": 2, "bidirectional": True}):
        output, _ = build(cell, 3, 4, **options)(torch.randn(5, 2, 3))
        node = output.grad_fn
        assert all(isinstance(t, Tensor) for t in node.saved_tensors)
        assert any(t.shape == output.shape for t in node.saved_tensors)
    if cell in ("lstm", "gru"):
        state = make_step(cell, 3, 4)(torch.randn(2, 3))
        h = state if isinstance(state, Tensor) else state[0]
        assert all(isinstance(t, Tensor) for t in h.grad_fn.saved_tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_biases_do_not_share_their_gradient(cell: str) -> None:
    module = build(cell, 3, 4)
    module(torch.randn(5, 2, 3))[0].sum().backward()
    before = module.bias_hh_l0.grad.clone()
    module.bias_ih_l0.grad.zero_()
    assert torch.equal(module.bias_hh_l0.grad, before)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_and_checkpointing_match_plain_backward() -> None:
    module = build("gru", 3, 4, num_layers=2, dropout=0.5, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    expected = run(module, x, seed=3)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, hx: None) -> Any:
            return torch.utils.checkpoint.checkpoint(self.inner, x, hx, use_reentrant=False)

    with torch.autograd.detect_anomaly(check_nan=True):
        got = run(Checkpointed(), x, seed=3)
    for name, value in expected.items():
        key = name.replace("d_", "d_inner.") if name not in ("d_x",) else name
        assert_same_in_double(got[key], value)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_is_never_silently_zero(cell: str, packed: bool) -> None:
    """Compares jvp and dual tensors, with and without grad mode, with the Jacobian's product."""
    case = Case(cell, {}, packed)
    primals = [t.detach() for t in case.inputs]
    tangents = [torch.randn_like(t) for t in primals]
    jacobians = torch.autograd.functional.jacobian(case, tuple(primals))
    for output, jacobian in enumerate(jacobians):
        expected = sum(
            torch.einsum("of,f->o", block.flatten(-t.dim()).flatten(0, -2), t.flatten())
            for block, t in zip(jacobian, tangents, strict=True)
        )
        _, derivative = jvp(lambda *a: case(*a)[output], tuple(primals), tuple(tangents))  # noqa: B023
        assert_same_in_double(derivative.flatten(), expected)
        for enabled in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
                duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
                tangent = forward_ad.unpack_dual(case(*duals)[output]).tangent
            assert_same_in_double(tangent.flatten(), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_func_transforms_match_autograd(cell: str) -> None:
    """grad, vmap, vmap of grad, hessian and jacrev agree with plain autograd."""
    module = build(cell, 2, 3, dtype=F64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(4, 2, 2, dtype=F64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].square().sum()

    got = grad(loss)(parameters, x)
    expected = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    for value, truth in zip(got.values(), expected, strict=True):
        assert_same_in_double(value, truth)

    several = torch.randn(3, 4, 2, 2, dtype=F64)
    assert_same_in_double(
        vmap(lambda x: module(x)[0])(several), torch.stack([module(x)[0] for x in several])
    )
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, several)
    for index, sample in enumerate(several):
        for name, value in grad(loss)(parameters, sample).items():
            assert_same_in_double(per_sample[name][index], value)

    second = hessian(lambda x: loss(parameters, x))(x)
    assert_same_in_double(second, jacrev(jacrev(lambda x: loss(parameters, x)))(x))
    assert second.abs().max() > 0
