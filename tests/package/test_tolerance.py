"""The tolerance of the tests: accepts results of any correct CPU and rejects planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import build, exact_run, run
from tolerance import FLOOR, Change, assert_agrees, assert_is_between, assert_same_in_double, shake
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HARD = torch.tensor([1.0, 3e-7, -1.0])  # a sum that cancels
EASY = torch.tensor([1.0, 3e-7, 1.0])


def total(numbers: Tensor, change: Change) -> Tensor:
    return change(numbers).sum().view(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_well_conditioned_result_may_err_by_the_floor(dtype: torch.dtype) -> None:
    theirs = torch.ones(3, dtype=dtype)
    floor = FLOOR[dtype]
    assert_agrees(theirs * (1 + floor), theirs, lambda change: change(theirs))
    with pytest.raises(AssertionError, match=r"error .*, allowed "):
        assert_agrees(theirs * (1 + 2 * floor), theirs, lambda change: change(theirs))


def test_ill_conditioned_result_may_err_as_much_as_its_truth_moves() -> None:
    """Torch happens to be exact here. With another order of summation it would not be."""
    for numbers, passes in ((HARD, True), (EASY, False)):

        def exact(change: Change, numbers: Tensor = numbers) -> Tensor:
            return total(numbers, change)

        lucky = total(numbers, Tensor.double).float()
        other = lucky + 4e-6 * lucky if numbers is EASY else (HARD[0] + HARD[1] + HARD[2]).view(1)
        if passes:
            assert abs((other / lucky).item() - 1) > FLOOR[torch.float32]
            assert_agrees(other, lucky, exact)
        else:
            with pytest.raises(AssertionError, match="allowed"):
                assert_agrees(other, lucky, exact)


def test_wrong_ill_conditioned_result_fails() -> None:
    lucky = total(HARD, Tensor.double).float()
    with pytest.raises(AssertionError, match="allowed"):
        assert_agrees(2 * lucky + 1e-6, lucky, lambda change: total(HARD, change))


def test_truth_is_shaken_only_if_needed() -> None:
    calls: list[Change] = []

    def exact(change: Change) -> Tensor:
        calls.append(change)
        return change(EASY)

    assert_agrees(EASY, EASY, exact)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shake_moves_by_at_most_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    numbers = torch.randn(1000).to(dtype)
    moved = (shake(1)(numbers) / numbers.double() - 1)[numbers != 0]
    eps = torch.finfo(dtype).eps
    rounding = torch.finfo(torch.float64).eps  # error of the comparison itself
    assert 0.9 * eps < moved.abs().max() <= eps + rounding
    assert torch.equal(shake(1)(numbers), shake(1)(numbers))
    assert not torch.equal(shake(1)(numbers), shake(2)(numbers))


@pytest.mark.parametrize("where", ["ours", "theirs", "shaken"])
def test_nan_never_passes(where: str) -> None:
    """NaN of torch, or of a shaken truth, does not raise the allowed error."""
    nan = torch.full((3,), float("nan"))
    ones = torch.ones(3)

    def exact(change: Change) -> Tensor:
        truth = change(ones)
        return nan.double() if where == "shaken" and (truth != 1).any() else truth

    with pytest.raises(AssertionError):
        assert_agrees(
            nan if where == "ours" else 1.1 * ones, nan if where == "theirs" else ones, exact
        )


def test_different_shapes_types_or_names_fail() -> None:
    x = torch.ones(3)
    for wrong in (x[:2], x.double(), {"y": x}, [x, x], torch.ones(3, dtype=torch.int64)):
        with pytest.raises(AssertionError):
            assert_agrees(wrong, x, lambda change: change(x))


def test_assert_same_in_double_rejects_narrow_types() -> None:
    x = torch.ones(3, dtype=torch.float64)
    assert_same_in_double((x, [x]), (x + 1e-9, [x]))
    with pytest.raises(AssertionError):
        assert_same_in_double(x, x + 1e-6)
    for narrow in (x.float(), x.half(), x.to(torch.complex64)):
        with pytest.raises(AssertionError):
            assert_same_in_double(narrow, narrow)


def test_assert_is_between_accepts_only_tf32_errors() -> None:
    full = torch.randn(100)

    def check(bits: float) -> None:
        assert_is_between(full * (1 + bits), full, full.half(), lambda change: change(full), "y")

    check(2**-11)
    for wrong in (0.0, 2**-6):
        with pytest.raises(AssertionError):
            check(wrong)


# --- planted faults of a kernel, in layers of typical test sizes ----------------------------------


def planted(fault: str, cell: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Returns the results of a layer with a fault, those without the fault, and the truth."""
    module = build(cell, 5, 20, bidirectional=True)
    x = torch.randn(steps, 3, 5, requires_grad=True)
    wrong = build(cell, 5, 20, bidirectional=True)
    with torch.no_grad():
        if fault == "gate order":
            wrong.weight_hh_l0.copy_(module.weight_hh_l0.roll(20, 0))
        elif fault == "missing term":
            wrong.weight_hh_l0[3, 7] = 0
        elif fault == "float16":
            wrong.weight_hh_l0.copy_(module.weight_hh_l0.half())
        elif fault == "no bias":
            wrong.bias_hh_l0_reverse.zero_()
    found = run(wrong, x)
    if fault == "h_prev":  # the gradient of w_hh uses the state of the wrong step
        found["d_weight_hh_l0"] = run(wrong, x.roll(1, 0).detach().requires_grad_())[
            "d_weight_hh_l0"
        ]
    return found, run(module, x), exact_run(module, x)


FAULTS = ["gate order", "missing term", "float16", "no bias", "h_prev"]


@pytest.mark.parametrize("steps", [5, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "gru", "lstm"])
def test_planted_faults_fail(cell: str, fault: str, steps: int) -> None:
    if fault == "gate order" and cell.startswith("rnn"):
        pytest.skip("an RNN has only one gate")
    found, theirs, exact = planted(fault, cell, steps)
    with pytest.raises(AssertionError, match="allowed"):
        assert_agrees(found, theirs, exact)
    assert_agrees(theirs, theirs, exact)
