"""``MinGRU``, ``MinLSTM`` and ``SRU`` against plain loops over steps and rows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import fastrnn

NAMES = ("MinGRU", "MinLSTM", "SRU")
T, B, IN, H = 6, 3, 4, 5


def step(name: str, pre: Tensor, x: Tensor, h: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """One step of one row: the output and the state."""
    parts = pre.split(H)

    def candidate(value: Tensor) -> Tensor:
        if not positive:
            return value
        return torch.stack([v + 0.5 if v >= 0 else v.sigmoid() for v in value])

    if name == "MinGRU":
        z = parts[0].sigmoid()
        h = (1 - z) * h + z * candidate(parts[1])
        return h, h
    if name == "MinLSTM":
        f, i = parts[0].sigmoid(), parts[1].sigmoid()
        h = (f * h + i * candidate(parts[2])) / (f + i)
        return h, h
    f, r = parts[1].sigmoid(), parts[2].sigmoid()
    h = f * h + (1 - f) * parts[0]
    return r * h + (1 - r) * (parts[3] if len(parts) == 4 else x), h


def loop(
    layer: Any,
    x: Tensor,
    hx: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs all layers of a time-major batch row by row."""
    name, directions = type(layer).__name__, 2 if layer.bidirectional else 1
    final: list[Tensor] = []
    for k in range(layer.num_layers):
        columns = []
        for d in range(directions):
            suffix, index = f"l{k}" + ("_reverse" if d else ""), k * directions + d
            weight = getattr(layer, f"weight_ih_{suffix}")
            bias = getattr(layer, f"bias_ih_{suffix}") if layer.bias else 0
            output, states = [[torch.zeros(H).double()] * x.shape[1] for _ in x], []
            for row in range(x.shape[1]):
                h = torch.zeros(H).double() if hx is None else hx[index, row]
                order = range(len(x) if lengths is None else int(lengths[row]))
                for t in reversed(order) if d else order:
                    if resets is not None and resets[t, row]:
                        h = torch.zeros(H).double()
                        if reset_state is not None:
                            own = reset_state if reset_state.dim() == 3 else reset_state[t]
                            h = own[index, row % own.shape[1]]
                    output[t][row], h = step(
                        name,
                        weight @ x[t, row] + bias,
                        x[t, row],
                        h,
                        getattr(layer, "positive", False),
                    )
                states.append(h)
            columns.append(torch.stack([torch.stack(rows) for rows in output]))
            final.append(torch.stack(states))
        x = torch.cat(columns, -1)
    return x, torch.stack(final)


def build(name: str, input_size: int = IN, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(fastrnn, name)(input_size, H, dtype=torch.float64, **options)


def gradients(result: tuple[Tensor, Tensor], layer: nn.Module, *others: Tensor) -> list[Tensor]:
    output, h_n = result
    loss = (output * torch.linspace(1, 2, output.numel()).view_as(output)).sum()
    return list(torch.autograd.grad(loss + h_n.square().sum(), [*layer.parameters(), *others]))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("input_size", [IN, H])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_a_loop(name: str, input_size: int, options: dict[str, Any]) -> None:
    layer = build(name, input_size, **options)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(T, B, input_size, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(count, B, H, dtype=torch.float64, requires_grad=True)
    got, expected = layer(x, hx), loop(layer, x, hx)
    assert_same_in_double(got, expected)
    assert_same_in_double(gradients(got, layer, x, hx), gradients(expected, layer, x, hx))


@pytest.mark.parametrize("name", ["MinGRU", "MinLSTM"])
def test_positive_candidates(name: str) -> None:
    layer = build(name, positive=True)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    assert_same_in_double(layer(x), loop(layer, x))
    assert "positive=True" in repr(layer)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_and_resets(name: str, per_step: bool) -> None:
    layer = build(name, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    hx = torch.randn(4, B, H, dtype=torch.float64)
    lengths = torch.tensor([T, 0, 3])
    resets = torch.rand(T, B) < 0.4
    state = torch.randn(*([T] if per_step else []), 4, 1, H, dtype=torch.float64)
    got = layer(x, hx, lengths=lengths, resets=resets, reset_state=state)
    assert_same_in_double(got, loop(layer, x, hx, lengths, resets, state))
    got = layer(x, lengths=lengths, resets=resets.double().unsqueeze(-1))
    assert_same_in_double(got, loop(layer, x, None, lengths, resets))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_padding_has_no_effect(name: str, value: float) -> None:
    layer = build(name, num_layers=2, bidirectional=True)
    lengths, resets = torch.tensor([T, 0, 3]), torch.rand(T, B) < 0.4
    ends = torch.arange(T).view(T, 1, 1) >= lengths.view(B, 1)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    state = torch.randn(T, 4, B, H, dtype=torch.float64)

    def run(padding: float) -> list[Tensor]:
        own = x.masked_fill(ends, padding).requires_grad_()
        after = state.masked_fill(ends.unsqueeze(1), padding).requires_grad_()
        result = layer(own, lengths=lengths, resets=resets, reset_state=after)
        return [*result, *gradients(result, layer, own, after)]

    got = run(value)
    assert all(t.isfinite().all() for t in got)
    assert_same_in_double(got, run(0.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_a_step_without_a_reset_has_no_effect(name: str) -> None:
    layer = build(name)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.4
    state = torch.randn(T, 1, B, H, dtype=torch.float64)

    def run(value: float) -> list[Tensor]:
        own = state.masked_fill(~resets.view(T, 1, B, 1), value).requires_grad_()
        result = layer(x, resets=resets, reset_state=own)
        return [*result, *gradients(result, layer, own)]

    got = run(float("nan"))
    assert all(t.isfinite().all() for t in got)
    assert_same_in_double(got, run(0.0))


def test_a_reset_removes_nan() -> None:
    """The kernels replace a state, as those of a GRU; torch's operations multiply it by 0."""
    x = torch.randn(T, B, IN)
    x[1, 0] = float("nan")
    resets = torch.zeros(T, B)
    resets[3] = 1
    for layer in (fastrnn.MinGRU(IN, H), fastrnn.GRU(IN, H)):
        output, _ = layer(x, resets=resets)
        assert output[1:3, 0].isnan().all()
        assert output[3:].isfinite().all()
    layer = fastrnn.MinGRU(IN, H)
    parameters = dict(layer.named_parameters())
    run = torch.func.vmap(
        lambda own: torch.func.functional_call(layer, parameters, (own,), {"resets": resets})[0]
    )
    output = run(x.unsqueeze(0))[0]
    assert output[3:, 0].isnan().all()
    assert output[:, 1:].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    layer = getattr(fastrnn, name)(IN, H)
    x, hx, state = torch.randn(T, B, IN), torch.randn(1, B, H), torch.randn(1, B, H)
    resets = torch.rand(T, B) < 0.4
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = layer(x, hx, resets=resets, reset_state=state)
        empty, same = layer(x[:0], hx)
    assert output.isfinite().all()
    assert output.dtype == h_n.dtype == empty.dtype == same.dtype


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences(name: str, enforce_sorted: bool) -> None:
    layer = build(name, bidirectional=True)
    lengths = [6, 4, 2] if enforce_sorted else [4, 2, 6]
    rows = [torch.randn(n, IN, dtype=torch.float64) for n in lengths]
    hx = torch.randn(2, B, H, dtype=torch.float64)
    packed, h_n = layer(pack_sequence(rows, enforce_sorted), hx)
    for b, (output, row) in enumerate(zip(unpack_sequence(packed), rows, strict=True)):
        expected, final = loop(layer, row.unsqueeze(1), hx[:, b : b + 1])
        assert_same_in_double((output, h_n[:, b]), (expected[:, 0], final[:, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_forms_of_the_input(name: str) -> None:
    layer, swapped = build(name), build(name, batch_first=True)
    x, hx = torch.randn(T, B, IN).double(), torch.randn(1, B, H).double()
    output, h_n = layer(x, hx)
    other, final = swapped(x.transpose(0, 1), hx)
    assert_same_in_double((other.transpose(0, 1), final), (output, h_n))
    assert_same_in_double(layer(x[:, 0], hx[:, 0]), (output[:, 0], h_n[:, 0]))
    first, state = layer(x[:2], hx)
    second, state = layer(x[2:], state)
    assert_same_in_double((torch.cat([first, second]), state), (output, h_n))
    assert layer(x[:0], hx)[0].shape == (0, B, H)
    assert torch.equal(layer(x[:0], hx)[1], hx)


def test_closed_gates_of_the_lstm_are_no_nan() -> None:
    layer = build("MinLSTM")
    nn.init.constant_(layer.bias_ih_l0, -2000.0)  # sigmoid is 0 for both gates
    output, _ = layer(torch.randn(T, B, IN).double())
    assert output.isfinite().all()


def test_dropout_is_between_layers_in_training() -> None:
    layer = build("MinGRU", num_layers=2, dropout=1.0)
    x = torch.randn(T, B, IN).double()
    assert not torch.equal(layer(x)[0], layer.eval()(x)[0])
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_graphs(name: str) -> None:
    layer = build(name)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_in_double(other(x), expected)
    program = torch.export.export(layer, (x,))
    assert_same_in_double(program.module()(x), expected)


@pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning", "ignore:`torch.jit:FutureWarning"
)
@pytest.mark.parametrize("name", NAMES)
def test_traced_and_saved(name: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build(name, num_layers=2, bidirectional=True)

        def forward(self, x: Tensor, hx: Tensor, lengths: Tensor, resets: Tensor) -> Any:
            return self.layer(x, hx, lengths=lengths, resets=resets, reset_state=hx)

    def inputs(steps: int, lengths: list[int]) -> list[Tensor]:
        batch = len(lengths)
        x = torch.randn(steps, batch, IN, dtype=torch.float64)
        hx = torch.randn(4, batch, H, dtype=torch.float64)
        return [x, hx, torch.tensor(lengths), torch.rand(steps, batch) < 0.4]

    model = Model()
    path = str(tmp_path / "model.pt")
    torch.jit.trace(model, tuple(inputs(T, [T, 2, 3]))).save(path)
    loaded = torch.jit.load(path)
    other = inputs(T + 3, [T + 3, 0, 7, 1])
    got, expected = loaded(*other), model(*other)
    assert_same_in_double(got, expected)
    assert_same_in_double(
        list(torch.autograd.grad(got[0].square().sum(), list(loaded.parameters()))),
        list(torch.autograd.grad(expected[0].square().sum(), list(model.parameters()))),
    )


def test_compiled_with_marks() -> None:
    layer = build("MinGRU")
    x, lengths = torch.randn(T, B, IN).double(), torch.tensor([6, 2, 3])
    resets = torch.rand(T, B) < 0.3
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, expected = (f(x, lengths=lengths, resets=resets) for f in (compiled, layer))
    assert_same_in_double(got, expected)
    assert_same_in_double(gradients(got, layer), gradients(expected, layer))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("x",), {}, TypeError, "MinGRU: input must be a tensor, got 'x'."),
        ((torch.ones(2, 3, 9),), {}, RuntimeError, "input must be 2-D or 3-D with 4 features"),
        ((torch.ones(2, 3, 4), 1), {}, TypeError, "MinGRU: hx must be a tensor, got 1."),
        (
            (torch.ones(2, 3, 4), torch.ones(1, 2, 5)),
            {},
            RuntimeError,
            r"hx must have the shape \[1, 3, 5\], got \[1, 2, 5\].",
        ),
        (
            (torch.ones(2, 3, 4),),
            {"lengths": torch.tensor([1, 2, 3])},
            ValueError,
            "lengths must be from 0 to the 2 steps of input, got 3",
        ),
        (
            (torch.ones(2, 3, 4),),
            {"resets": torch.zeros(3, 3)},
            ValueError,
            r"resets must have the shape \[2, 3\]",
        ),
        (
            (torch.ones(2, 3, 4),),
            {"reset_state": torch.zeros(1, 3, 5)},
            ValueError,
            "reset_state must be given together with resets",
        ),
        (
            (pack_sequence([torch.ones(2, 4)]),),
            {"lengths": torch.tensor([2])},
            ValueError,
            "lengths must not be given with a PackedSequence",
        ),
        (
            (pack_sequence([torch.ones(2, 4)]),),
            {"reset_state": torch.zeros(1, 1, 5)},
            ValueError,
            "reset_state must not be given with a PackedSequence",
        ),
        (
            (torch.ones(2, 3, 4),),
            {"resets": torch.full((2, 3), 2)},
            ValueError,
            "resets must hold only 0 and 1, got another value",
        ),
        (
            (torch.ones(2, 3, 4), torch.ones(1, 3, 5).double()),
            {},
            RuntimeError,
            "found input tensor with torch.float32 and hidden tensor with torch.float64",
        ),
        (
            (torch.ones(2, 3, 4), torch.ones(1, 3, 5, device="meta")),
            {},
            RuntimeError,
            "found input tensor at cpu and hidden tensor at meta",
        ),
        (
            (torch.ones(2, 3, 4),),
            {"resets": torch.zeros(2, 3), "reset_state": torch.zeros(1, 3, 5).double()},
            RuntimeError,
            "MinGRU: reset_state must have the dtype torch.float32, got torch.float64.",
        ),
        (
            (torch.ones(2, 4),),
            {"resets": torch.zeros(2)},
            ValueError,
            "resets must not be given with an input without a batch dimension",
        ),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        fastrnn.MinGRU(IN, H)(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "MinGRU: hidden_size must be a positive int, got 0."),
        ({"bias": 1}, TypeError, "MinGRU: bias must be a bool, got 1."),
        ({"dropout": 2}, ValueError, "MinGRU: dropout must be a number from 0 to 1, got 2."),
        ({"positive": 1}, TypeError, "MinGRU: positive must be a bool, got 1."),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.MinGRU(**({"input_size": IN, "hidden_size": H} | options))
