"""Inference of stacked layers on the CPU, two layers of which may run at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import CELLS, PACKED, build, exact_call, layer_call, reference_math
from tolerance import assert_agrees, assert_same_in_double
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _C
from fastrnn.backends import stacked_kernels
from fastrnn.engine.run import run
from fastrnn.spec import CELLS as SPECS


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def without_stack(module: torch.nn.Module, *inputs: Any) -> Any:
    """Returns the result of one operator per layer, which calls with gradients use."""
    y, state = module(*inputs)
    assert y.requires_grad if isinstance(y, Tensor) else y.data.requires_grad
    return y, state


def assert_stacked(module: torch.nn.Module, expected: Any, *inputs: Any) -> None:
    with torch.no_grad():
        assert_agrees(module(*inputs), expected, exact_call(module, *inputs))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("sizes", [(1, 1), (40, 1), (203, 1), (50, 2), (30, 9)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_stack_matches_single_layers(
    threads: int, cell: str, sizes: tuple[int, int], layers: int
) -> None:
    steps, batch = sizes
    module = build(cell, 24, 72, layers, dropout=0.5).eval()
    x = torch.randn(steps, batch, 24)
    expected = without_stack(module, x)
    for _ in range(3):  # the timing of the threads differs each time
        assert_stacked(module, expected, x)


@pytest.mark.parametrize("cell", CELLS)
def test_stack_of_packed_sequences_matches_single_layers(threads: int, cell: str) -> None:
    module = build(cell, 24, 72, 2)
    x = pack_padded_sequence(torch.randn(60, 3, 24), [60, 33, 2])
    expected = without_stack(module, x)
    assert_stacked(module, expected, x)


def test_stack_accepts_states_and_batch_first(threads: int) -> None:
    module = build("lstm", 24, 72, 2, batch_first=True)
    x, hx = torch.randn(1, 60, 24), (torch.randn(2, 1, 72), torch.randn(2, 1, 72))
    expected = without_stack(module, x, hx)
    assert_stacked(module, expected, x, hx)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_stack_of_strided_input_matches_single_layers(cell: str, batch_first: bool) -> None:
    """The kernels read a contiguous copy, which must live until they finish."""
    module = build(cell, 5, 7, 3, batch_first=batch_first)
    x = torch.randn(6, 4, 5)
    strided = torch.stack([x, x + 1], dim=-1)[..., 0]
    expected = without_stack(module, x)
    for same in (strided, x):
        assert_stacked(module, expected, same)


def test_stack_runs_eager_inference_of_several_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    stack = stacked_kernels.run
    monkeypatch.setattr(stacked_kernels, "run", lambda call: calls.append("stack") or stack(call))
    x = torch.randn(40, 1, 8)

    def is_stack(module: torch.nn.Module, x: Tensor = x) -> bool:
        calls.clear()
        module(x)
        return bool(calls)

    assert not is_stack(fastrnn.GRU(8, 16, 2))
    with torch.no_grad():
        assert is_stack(fastrnn.GRU(8, 16, 2))
        assert is_stack(fastrnn.LSTM(8, 16, 3).double(), x.double())
        assert is_stack(fastrnn.LSTM(8, 16, 2, proj_size=4))
        assert not is_stack(fastrnn.GRU(8, 16))
        assert not is_stack(fastrnn.GRU(8, 16, 2, bidirectional=True))
        assert not is_stack(fastrnn.GRU(8, 16, 2, dropout=0.5))
        assert is_stack(fastrnn.GRU(8, 16, 2, dropout=0.5).eval())
        assert not is_stack(fastrnn.GRU(8, 16, 2).bfloat16(), x.bfloat16())
    frozen = fastrnn.GRU(8, 16, 2).requires_grad_(False)
    assert is_stack(frozen)
    assert not is_stack(frozen, x.clone().requires_grad_())


def test_projected_stack_matches_single_layers(threads: int) -> None:
    module = build("lstm", 24, 72, 3, proj_size=40)
    x = torch.randn(60, 1, 24)
    expected = without_stack(module, x)
    assert_stacked(module, expected, x)


def test_stack_operator_rejects_wrong_tensors() -> None:
    x, h = torch.randn(5, 2, 3), [torch.randn(1, 2, 4) for _ in range(2)]
    w = [torch.randn(12, 3), torch.randn(12, 4), torch.randn(12, 4), torch.randn(12, 4)]
    stack = torch.ops.fastrnn.recurrent_stack

    def call(**changed: Any) -> Any:
        given = {"x": x, "h0": h, "c0": [], "weights": w, "slots": 3, "sequence": None}
        return stack(**{**given, "cell": "gru", **changed})

    y, h_n, c_n = call()
    assert y.shape == (5, 2, 4)
    assert len(h_n) == 2
    assert not c_n
    for changed in (
        {"h0": []},
        {"h0": h[:1]},
        {"h0": [torch.randn(2, 2, 4)] * 2},
        {"h0": [h[0], torch.randn(1, 3, 4)]},
        {"c0": h},
        {"c0": h[:1]},
        {"weights": w[:3]},
        {"slots": 15},
        {"weights": [w[1], w[0], w[2], w[3]]},
        {"weights": [*w[:2], torch.randn(12, 5), w[3]]},
        {"x": x.half(), "h0": [s.half() for s in h], "weights": [v.half() for v in w]},
        {"x": x[:, :, :2]},
        {"cell": "lstm"},
        {"slots": 3 | PACKED, "sequence": [torch.tensor([2, 2])]},
    ):
        with pytest.raises(RuntimeError):
            call(**changed)
    torch.library.opcheck(
        torch.ops.fastrnn.recurrent_stack.default,
        (x, h, [], w, 3, None, "gru"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_stack_matches_reference() -> None:
    spec = SPECS["lstm"]
    module = build("lstm", 5, 70, 2).double()
    x, h0, c0 = torch.randn(40, 1, 5).double(), *torch.randn(2, 2, 1, 70).double().unbind()
    weights = [w.detach() for w in module.parameters()]
    call = layer_call(x, h0, c0, weights, None, spec, num_layers=2)
    ours = stacked_kernels.run(call)
    with reference_math():
        theirs = run(call)
    for own, other in zip(ours, theirs, strict=True):
        assert_same_in_double(own, other)
    assert run(call)[0].equal(ours[0])


def test_plan_runs_two_layers_together_if_their_weights_are_small() -> None:
    def stacked(hidden: int, steps: int = 100, **options: Any) -> bool:
        options = {"threads": 2, "layers": 2, **options}
        return bool(_C.plan("gru", steps, 1, hidden, hidden, **options)["stacked"])

    assert stacked(64)
    assert stacked(64, layers=3)
    assert not stacked(256)  # weights exceed kStackedBytes
    assert not stacked(64, steps=15)  # too few steps for the upper layer to follow
    assert not stacked(64, threads=1)
    assert not stacked(64, layers=1)
    assert not stacked(64, directions=2)
    assert not stacked(64, training=True)
    assert not stacked(64, weight_format="float16")
    assert not stacked(64, dtype="bfloat16")
