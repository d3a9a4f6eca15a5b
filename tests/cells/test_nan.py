"""NaN, infinities and overflow propagate through every cell as in torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import CELLS, TORCH_CELLS, _flatten, build, make_step, pack, reference_math, torch_twin
from torch import Tensor, nn

from fastrnn import _C

VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e30}
STEPS, BATCH, INPUTS, HIDDEN = 4, 5, 3, 19
LENGTHS = [4, 1, 3, 2, 4]
POISONED_ROW = 2

LAYERS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {},
    "both directions": {"bidirectional": True},
    "projection": {"proj_size": 7},
}


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(None)


def tensors(module: Any, step: bool) -> dict[str, Tensor]:
    """Returns by name the input, states, weights and incoming gradients of a call."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, directions = HIDDEN, 1
    if not step:
        hidden = module.proj_size or HIDDEN
        directions = 2 if module.bidirectional else 1
    first = () if step else (directions,)
    rows = (BATCH,) if step else (STEPS, BATCH)
    result = {"x": random(*rows, INPUTS)}
    result["h0"] = random(*first, BATCH, hidden)
    if "LSTM" in type(module).__name__:
        result["c0"] = random(*first, BATCH, HIDDEN)
    result |= {name: p.detach().double() for name, p in module.named_parameters()}
    if not step:
        result["d_y"] = random(*rows, directions * hidden)
    result["d_h_n"] = random(*first, BATCH, hidden)
    if "c0" in result:
        result["d_c_n"] = random(*first, BATCH, HIDDEN)
    return result


def poison(values: dict[str, Tensor], place: str, value: float) -> dict[str, Tensor]:
    """Returns a copy with one value of ``place`` replaced, in row POISONED_ROW if it has rows."""
    result = dict(values)
    t = result[place] = values[place].clone()
    if place.startswith(("weight", "bias")):
        t.view(-1)[t.numel() // 2] = value
    elif place in ("x", "d_y") and t.dim() == 3:
        t[1, POISONED_ROW, 1] = value
    else:
        t[..., POISONED_ROW, 1] = value
    return result


def run(module: nn.Module, values: dict[str, Tensor], layout: str, dtype: Any) -> dict[str, Tensor]:
    """Runs forward and backward. Returns outputs and gradients by name."""
    values = {name: t.to(dtype) for name, t in values.items()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
    leaves = {n: values[n].requires_grad_() for n in ("x", "h0", "c0") if n in values}
    x: Any = leaves["x"]
    if layout == "packed":
        x = pack(torch.cat([x[:n, b] for b, n in enumerate(LENGTHS)]), LENGTHS, False)
    hx: Any = (leaves["h0"], leaves["c0"]) if "c0" in leaves else leaves["h0"]
    outputs: dict[str, Tensor] = {}
    _flatten(module(x, hx), "out", outputs)
    incoming = [values[n] for n in ("d_y", "d_h_n", "d_c_n") if n in values]
    if layout == "packed":
        packed = [incoming[0][:n, b] for b, n in enumerate(LENGTHS)]
        incoming[0] = pack(torch.cat(packed), LENGTHS, False).data
    leaves |= dict(module.named_parameters())
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), incoming)
    result = {name: output.detach() for name, output in outputs.items()}
    return result | {f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Returns one line per difference in NaN, infinities or finite values."""
    found = []
    for name, mine in ours.items():
        other = theirs[name]
        special = ~(mine.isfinite() & other.isfinite())
        wrong = special & (mine != other) & ~(mine.isnan() & other.isnan())
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            found.append(f"{name}{list(index)}: {mine[index]}, torch has {other[index]}")
        mine, other = mine.where(~special, 0), other.where(~special, 0)
        difference = (mine - other).abs().max().item()
        if difference > 64 * torch.finfo(mine.dtype).eps * other.abs().max().item():
            found.append(f"{name}: finite values differ by {difference:.2g}")
    return found


def cases() -> list[Any]:
    """Returns every cell in every layout, and a single step of every cell."""
    found = [pytest.param(cell, "step", True, id=f"{cell}-step") for cell in CELLS]
    for cell, layout in itertools.product(CELLS, LAYERS):
        if layout != "projection" or cell == "lstm":
            found.append(pytest.param(cell, layout, False, id=f"{cell}-{layout}"))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "layout", "step"), cases())
def test_special_values_propagate_as_in_torch(
    isa: str, cell: str, layout: str, step: bool, dtype: torch.dtype
) -> None:
    """Puts each special value into each tensor, and compares all rows of the batch."""
    if step:
        module = make_step(cell, INPUTS, HIDDEN, dtype=dtype)
    else:
        module = build(cell, INPUTS, HIDDEN, dtype=dtype, **LAYERS[layout])
    torch_lacks_it = cell not in TORCH_CELLS
    twin = module if torch_lacks_it else torch_twin(module)
    values = tensors(module, step)
    found = []
    for place, (kind, value) in itertools.product(values, VALUES.items()):
        given = poison(values, place, value)
        ours = run(module, given, layout, dtype)
        with reference_math() if torch_lacks_it else nullcontext():
            theirs = run(twin, given, layout, dtype)
        found += [f"{place}={kind}: {line}" for line in differences(ours, theirs)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_special_values_do_not_affect_other_sequences(
    isa: str, cell: str, threads: int, value: float
) -> None:
    """Changes no bit of the outputs and gradients of the other sequences."""
    module = build(cell, 8, 24)
    clean = torch.randn(6, 33, 8)
    odd = clean.clone()
    odd[2, 7] = value
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for x in (clean, odd):
            x.requires_grad_()
            y, _ = module(x)
            results.append((y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    finally:
        torch.set_num_threads(before)
    others = [row for row in range(33) if row != 7]
    for plain, poisoned in zip(*results, strict=True):
        assert torch.equal(plain[:, others], poisoned[:, others])


def test_relu_passes_the_gradient_at_nan_and_drops_it_at_zero() -> None:
    """Matches torch's threshold_backward: the gradient is 0 only if the output is at most 0."""
    module = build("rnn_relu", 1, 4, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1)
        module.weight_hh_l0.zero_()
    x = torch.tensor([2.0, float("nan"), -1.0]).view(1, 3, 1).requires_grad_()
    y, _ = module(x)
    d_y = torch.tensor([3.0, 5.0, float("inf")]).view(1, 3, 1).expand(1, 3, 4)
    (d_x,) = torch.autograd.grad(y, x, d_y.contiguous())
    assert d_x.flatten().tolist() == [12.0, 20.0, 0.0]
