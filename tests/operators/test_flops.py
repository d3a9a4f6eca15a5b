"""``torch.utils.flop_counter`` counts the operators' products as it counts torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, TORCH_CELLS, build, make_step, pack, torch_twin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastrnn

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "deep": {"num_layers": 2, "bidirectional": True},
}
# torch counts nothing in oneDNN's LSTM on the CPU
DEVICES = [("cpu", cell) for cell in TORCH_CELLS if cell != "lstm"] + [
    ("meta", cell) for cell in TORCH_CELLS
]


def count(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "cell"), DEVICES)
def test_forward_of_layers(device: str, cell: str, options: dict[str, Any]) -> None:
    module = build(cell, 5, 7, device=device, **options)
    x = torch.randn(6, 3, 5, device=device)
    expected = count(lambda: torch_twin(module)(x))
    assert expected > 0
    for with_grad in (True, False):
        with torch.set_grad_enabled(with_grad):
            assert count(lambda: module(x)) == expected


@pytest.mark.parametrize(("device", "cell"), DEVICES)
def test_forward_of_steps(device: str, cell: str) -> None:
    step = make_step(cell, 5, 7, device=device)
    x = torch.randn(3, 5, device=device)
    assert count(lambda: step(x)) == count(lambda: torch_twin(step)(x)) > 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_backward(cell: str, options: dict[str, Any]) -> None:
    """Requests all gradients. The kernels always compute that of the initial state."""
    module = build(cell, 5, 7, **options)
    x = torch.randn(6, 3, 5, requires_grad=True)
    states = 4 if "num_layers" in options else 1
    h0 = torch.randn(states, 3, 7, requires_grad=True)
    expected = count(lambda: torch_twin(module)(x, h0)[0].sum().backward())
    assert count(lambda: module(x, h0)[0].sum().backward()) == expected


def test_backward_counts_only_requested_gradients() -> None:
    module = build("gru", 5, 7)
    rows, gates = 6 * 3, 3 * 7
    of_x, of_h = 2 * rows * gates * 5, 2 * rows * gates * 7
    x = torch.randn(6, 3, 5)
    forward = count(lambda: module(x))
    assert forward == of_x + of_h
    all_weights = count(lambda: module(x)[0].sum().backward())
    assert all_weights == forward + of_h + of_x + of_h  # back in time, w_ih, w_hh
    module.weight_ih_l0.requires_grad_(False)
    assert count(lambda: module(x)[0].sum().backward()) == all_weights - of_x
    x.requires_grad_()
    assert count(lambda: module(x)[0].sum().backward()) == all_weights


@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_are_counted(cell: str) -> None:
    module = build(cell, 5, 7)
    packed = pack(torch.randn(9, 5), [4, 2, 3], False)
    gates = module.weight_hh_l0.shape[0]
    assert count(lambda: module(packed)) == 2 * 9 * gates * (5 + 7)


def test_projection_and_stack() -> None:
    module = fastrnn.LSTM(5, 7, 2, proj_size=3)
    rows, gates = 6 * 4, 4 * 7
    x = torch.randn(6, 4, 5)
    expected = 2 * rows * (gates * (5 + 3) + 7 * 3 + gates * (3 + 3) + 7 * 3)
    with torch.no_grad():
        assert count(lambda: module(x)) == expected
    assert count(lambda: module(x)) == expected
    backward = count(lambda: module(x)[0].sum().backward()) - expected
    back_in_time = 2 * rows * (gates * 3 + 7 * 3) * 2
    of_weights = 2 * rows * (gates * (5 + 3) + 7 * 3 + gates * (3 + 3) + 7 * 3)
    of_x = 2 * rows * gates * 3  # of the second layer's
    assert backward == back_in_time + of_weights + of_x


def test_captured_graphs_count_once() -> None:
    module = nn.Sequential(fastrnn.GRU(5, 7))
    x = torch.randn(6, 3, 5)
    expected = count(lambda: module(x))
    exported = torch.export.export(module, (x,)).module()
    assert count(lambda: exported(x)) == expected
    with torch.no_grad():
        assert count(lambda: exported(x)) == expected


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"zoneout": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_options_of_the_cell(name: str, options: dict[str, Any]) -> None:
    """The products are those of a plain layer."""
    plain, module = (getattr(fastrnn, name)(5, 7, 2, **own) for own in ({}, options))
    x = torch.randn(6, 3, 5, requires_grad=True)
    assert count(lambda: module(x)) == count(lambda: plain(x)) > 0
    backward, expected = (
        count(lambda own=own: own(x)[0].sum().backward()) for own in (module, plain)
    )
    assert backward == expected


def test_layers_that_are_linear_in_time() -> None:
    """The scan counts as elementwise operations do; the product of the input as torch's."""
    x = torch.randn(6, 3, 5)
    product = 2 * 6 * 3 * 5 * 2 * 7
    module = fastrnn.MinGRU(5, 7)
    assert count(lambda: module(x)) == product
    assert count(lambda: module(x)[0].sum().backward()) == 2 * product  # and that of w_ih
    a = torch.ones(6, 3)
    assert count(lambda: fastrnn.functional.linear_scan(a, a)) == 0
