"""Options for sequences together: cells x dtypes x directions x layers x batch_first x compiled.

Every case has resets, a state after a reset, residual connections and learned initial states; half
of them have lengths. Some recompute, some return the states and gates of every step. The reference
is fastrnn.reference, in float64 and in the dtype of the case.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import DTYPES, build, changed, random, reference_math
from tolerance import Change, assert_agrees
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H, P = 6, 3, 3, 4, 2  # noqa: E741 - the sizes' names
CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm", "projected"]
WANTED: dict[str, dict[str, bool]] = {
    "results": {},
    "recompute": {},
    "states": {"return_all_states": True, "return_gates": True},
}
SHAPES = list(itertools.product([1, 2], [False, True], [False, True]))
#: two shapes, in which every option has both values
TWO_SHAPES = [(1, True, True), (2, False, False)]


def make(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random(torch.Generator().manual_seed(seed), *shape, dtype=dtype)


def make_module(
    cell: str, layers: int, bidirectional: bool, batch_first: bool, wanted: str, dtype: torch.dtype
) -> nn.Module:
    module = build(
        "lstm" if cell == "projected" else cell,
        I,
        H,
        layers,
        bidirectional=bidirectional,
        batch_first=batch_first,
        batch_first_states=batch_first,
        residual=True,
        learn_initial_state=True,
        recompute=2 if wanted == "recompute" else "none",
        dtype=dtype,
        **({"proj_size": P} if cell == "projected" else {}),
    )
    for index, weight in enumerate(module.parameters()):
        weight.data = 0.5 * make(*weight.shape, dtype=dtype, seed=index)
    return module


def arguments(module: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Returns an input and the marks of a call."""
    dtype = next(module.parameters()).dtype
    sizes = (B, T) if module.batch_first else (T, B)
    count = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H] + ([H] if module.mode == "LSTM" else [])
    learned = [make(count, 1, n, dtype=dtype, seed=40 + n).requires_grad_() for n in widths]
    if module.batch_first:
        learned = [t.detach().transpose(0, 1).requires_grad_() for t in learned]
    marks: dict[str, Any] = {
        "resets": torch.rand(sizes, generator=torch.Generator().manual_seed(3)) < 0.4,
        "reset_state": tuple(learned) if module.mode == "LSTM" else learned[0],
    }
    if not module.batch_first:
        marks["lengths"] = torch.tensor([6, 0, 4])
    return make(*sizes, I, dtype=dtype, seed=50).requires_grad_(), marks


def results(
    call: Any, module: nn.Module, x: Tensor, marks: dict[str, Any], wanted: str
) -> tuple[Tensor, ...]:
    """Returns all results of a call and the gradients of everything."""
    found = [t for t in tree_leaves(call(x, **marks, **WANTED[wanted])) if t is not None]
    losses = [
        (t * torch.linspace(0.5, 1, t.numel(), dtype=t.dtype).view_as(t)).sum()
        for t in found
        if t.requires_grad
    ]
    inputs = [x, *tree_leaves(marks["reset_state"]), *module.parameters()]
    return (*found, *torch.autograd.grad(sum(losses), inputs, materialize_grads=True))


def check(call: Any, module: nn.Module, wanted: str) -> None:
    x, marks = arguments(module)

    def exact(change: Change) -> tuple[Tensor, ...]:
        double = changed(module, change)

        def leaf(t: Tensor) -> Tensor:
            return change(t.detach()).requires_grad_()

        own = {**marks, "reset_state": tree_map(leaf, marks["reset_state"])}
        with reference_math():
            return results(double, double, leaf(x), own, wanted)

    with reference_math():
        theirs = results(module, module, x, marks, wanted)
    assert_agrees(results(call, module, x, marks, wanted), theirs, exact)


def mark_slow(wanted: str, shape: tuple[int, bool, bool]) -> Any:
    is_fast = wanted == "results" or shape in TWO_SHAPES
    return pytest.param(wanted, shape, marks=[] if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("wanted", "shape"), [mark_slow(wanted, shape) for wanted in WANTED for shape in SHAPES]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_modules_match_the_reference(
    cell: str, dtype: torch.dtype, wanted: str, shape: tuple[int, bool, bool]
) -> None:
    module = make_module(cell, *shape, wanted, dtype)
    check(module, module, wanted)


def check_compiled(cell: str, shape: tuple[int, bool, bool], dtype: torch.dtype) -> None:
    torch.compiler.reset()
    for wanted in WANTED:
        module = make_module(cell, *shape, wanted, dtype)
        check(torch.compile(module, backend="aot_eager", fullgraph=True), module, wanted)


@pytest.mark.parametrize(
    ("cell", "shape"), zip(["gru", "projected"], TWO_SHAPES, strict=True), ids=str
)
def test_compiled_modules_match_the_reference(cell: str, shape: tuple[int, bool, bool]) -> None:
    check_compiled(cell, shape, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_compiled_module_matches_the_reference(
    cell: str, shape: tuple[int, bool, bool], dtype: torch.dtype
) -> None:
    check_compiled(cell, shape, dtype)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("shape", TWO_SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str, shape: tuple[int, bool, bool], wanted: str) -> None:
    module = make_module(cell, *shape, wanted, torch.float64)
    x, marks = arguments(module)
    inputs = (x, *tree_leaves(marks["reset_state"]))

    def call(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        own = {**marks, "reset_state": state if module.mode == "LSTM" else state[0]}
        found = tree_leaves(module(x, **own, **WANTED[wanted]))
        return tuple(t for t in found if t is not None and t.requires_grad)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
