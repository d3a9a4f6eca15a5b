"""Property tests: random constructor arguments and forms of input against torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CELLS, DTYPES, check, pack, random
from torch import Tensor, nn

import fastrnn

small = st.integers(1, 9)


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """Draws any layer that torch.nn supports, or one with the sigmoid nonlinearity."""
    cell = draw(st.sampled_from(list(CELLS)))
    name, own = CELLS[cell]
    hidden_size = draw(small)
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    if cell == "lstm":
        options["proj_size"] = draw(st.integers(0, hidden_size - 1))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module: nn.Module = getattr(fastrnn, name)(draw(small), hidden_size, **own, **options)
    return module.train(draw(st.booleans()))


def draw_strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draws normal numbers as a dense, transposed, strided or expanded tensor."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["dense", "transposed", "gaps", "expanded"]))
    if kind == "transposed":
        value = random(generator, *reversed(shape), dtype=dtype).permute(
            *reversed(range(len(shape)))
        )
    elif kind == "gaps":
        value = random(generator, *(2 * n for n in shape), dtype=dtype)[
            (slice(None, None, 2),) * len(shape)
        ]
    elif kind == "expanded":
        dim = draw(st.integers(0, len(shape) - 1))
        value = random(generator, *shape[:dim], 1, *shape[dim + 1 :], dtype=dtype).expand(shape)
    else:
        value = random(generator, *shape, dtype=dtype)
    return value.detach().requires_grad_(draw(st.booleans()))


def draw_states(
    draw: st.DrawFn, sizes: list[int], lead: tuple[int, ...], dtype: torch.dtype
) -> Any:
    if draw(st.booleans()):
        return None
    values = [draw_strided(draw, (*lead, size), dtype) for size in sizes]
    if len(values) == 1:
        return values[0]
    return draw(st.sampled_from([tuple, list]))(values)


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.Module, Any, Any]:
    """Draws a layer, an input in any form, and initial states or None."""
    module = draw(modules())
    dtype = module.weight_ih_l0.dtype
    form = draw(st.sampled_from(["padded", "unbatched", "packed"]))
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size]
    if isinstance(module, fastrnn.LSTM):
        sizes.append(module.hidden_size)
    if form == "packed":
        lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
        is_sorted = draw(st.booleans())
        if is_sorted:
            lengths.sort(reverse=True)
        rows = random(
            torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
            sum(lengths),
            module.input_size,
            dtype=dtype,
        )
        x: Any = pack(rows, lengths, is_sorted)
        x.data.requires_grad_(draw(st.booleans()))
        lead: tuple[int, ...] = (count, len(lengths))
    elif form == "unbatched":
        x = draw_strided(draw, (draw(small), module.input_size), dtype)
        lead = (count,)
    else:
        steps, batch = draw(small), draw(st.integers(0, 5))
        shape = (batch, steps) if module.batch_first else (steps, batch)
        x = draw_strided(draw, (*shape, module.input_size), dtype)
        lead = (count, batch)
    for parameter in module.parameters():
        parameter.requires_grad_(draw(st.sampled_from([True, True, True, False])))
    return module, x, draw_states(draw, sizes, lead, dtype)


def needs_a_gradient(module: nn.Module, *values: Any) -> bool:
    tensors = list(module.parameters())
    for value in values:
        if isinstance(value, nn.utils.rnn.PackedSequence):
            tensors.append(value.data)
        elif isinstance(value, Tensor):
            tensors.append(value)
        elif value is not None:
            tensors.extend(value)
    return any(t.requires_grad for t in tensors)


@settings(max_examples=150)
@given(calls())
def test_any_layer_matches_torch(call: tuple[nn.Module, Any, Any]) -> None:
    """Outputs and gradients are as close to float64 as those of torch.nn."""
    module, x, hx = call
    if not needs_a_gradient(module, x, hx):
        module.weight_ih_l0.requires_grad_()
    check(module, x, hx)


@st.composite
def steps(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Any]:
    """Draws a cell, an input, and states or None."""
    cell = draw(st.sampled_from(list(CELLS)))
    name, own = CELLS[cell]
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module = getattr(fastrnn, name + "Cell")(
        draw(small), draw(small), draw(st.booleans()), **own, dtype=dtype
    )
    lead = draw(st.sampled_from([(), (0,), (1,), (4,)]))
    x = draw_strided(draw, (*lead, module.input_size), dtype)
    sizes = [module.hidden_size] * (2 if cell == "lstm" else 1)
    return module, x, draw_states(draw, sizes, lead, dtype)


@settings(max_examples=100)
@given(steps())
def test_any_cell_matches_torch(call: tuple[nn.Module, Tensor, Any]) -> None:
    check(*call)


@settings(max_examples=50)
@given(calls(), st.integers(0, 2**31))
def test_dropout_matches_torch(call: tuple[nn.Module, Any, Any], seed: int) -> None:
    """Runs in float64, where rounding cannot hide a different dropout mask."""
    module, x, _ = call
    module = copy.deepcopy(module).double().train().requires_grad_()
    module.dropout = 0.5
    is_tensor = isinstance(x, Tensor)
    x = x.detach().double() if is_tensor else x._replace(data=x.data.detach().double())
    check(module, x, None, seed)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@settings(max_examples=100)
@given(
    st.sampled_from(["RNN", "LSTM", "GRU"]),
    st.fixed_dictionaries(
        {},
        optional={
            "input_size": st.sampled_from([-1, 0, 1, 3, 2.0, "3", None]),
            "hidden_size": st.sampled_from([-1, 0, 1, 4, 4.0, None]),
            "num_layers": st.sampled_from([-1, 0, 1, 2]),
            "bias": st.sampled_from([True, False, 0, None]),
            "batch_first": st.sampled_from([True, False, 1]),
            "dropout": st.sampled_from([0, 0.0, 0.5, 1, 1.0, 2, -1, True]),
            "bidirectional": st.booleans(),
            "proj_size": st.sampled_from([-1, 0, 1, 3, 4, 9]),
            "nonlinearity": st.sampled_from(["tanh", "relu"]),
        },
    ),
)
def test_constructors_give_the_modules_or_errors_of_torch(
    name: str, options: dict[str, Any]
) -> None:
    full = {"input_size": 3, "hidden_size": 4, **options}
    results = []
    for lib in (fastrnn, nn):
        torch.manual_seed(0)
        try:
            module = getattr(lib, name)(**full)
        except Exception as error:
            results.append((type(error), str(error).replace("RecurrentBase", "RNNBase")))
        else:
            shapes = {key: value.shape for key, value in module.state_dict().items()}
            results.append((repr(module), shapes))
    assert results[0] == results[1]
