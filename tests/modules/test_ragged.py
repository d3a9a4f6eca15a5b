"""Lengths and resets of a padded batch, against a loop over rows and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import CELLS, DTYPES, build, make_step, pack, raised, random, reference_math, run
from tolerance import assert_agrees, assert_same_in_double, widen
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.ops.segments import cut
from fastrnn.reference import STEPS
from fastrnn.spec import BY_MODE, Weights, slots_of_names

F64 = torch.float64
T, B, I, H = 7, 5, 3, 4  # noqa: E741 - the sizes' names


def loop(
    module: nn.Module,
    x: Tensor,
    hx: Any,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> tuple[Tensor, Any]:
    """The definition: one row after the other, step by step. Time-major; arguments of a module."""
    spec = BY_MODE[module.mode]
    slots = slots_of_names(module._flat_weights_names)
    directions = 2 if module.bidirectional else 1
    states = list(hx) if spec.has_cell_state else [hx]
    after = [None] * len(states)
    if reset_state is not None:
        after = list(reset_state) if spec.has_cell_state else [reset_state]
    final: list[list[Tensor]] = [[] for _ in states]
    outputs: list[Tensor] = []
    for index, w in enumerate(Weights(module._flat_weights, slots).directions()):
        if index % directions == 0:
            inputs = torch.cat(outputs, -1) if outputs else x
            outputs = []
        size = states[0].shape[-1]
        y = [[x.new_zeros(size) for _ in range(x.shape[1])] for _ in range(x.shape[0])]
        ends = []
        for b in range(x.shape[1]):
            own = [state[index, b] for state in states]
            steps = range(x.shape[0] if lengths is None else int(lengths[b]))
            for t in steps if index % directions == 0 else reversed(steps):
                if resets is not None and resets[t, b]:
                    own = [
                        torch.zeros_like(state)
                        if new is None
                        else (new[index] if new.dim() == 3 else new[t, index])[b]
                        for state, new in zip(own, after, strict=True)
                    ]
                h, c = STEPS[spec.name](
                    linear(inputs[t, b], w.w_ih, w.b_ih),
                    linear(own[0], w.w_hh, w.b_hh),
                    own[0],
                    own[1] if len(own) > 1 else None,
                    None,
                )
                h = h if w.w_hr is None else linear(h, w.w_hr)
                own = [h] if c is None else [h, c]
                y[t][b] = h
            ends.append(own)
        outputs.append(torch.stack([torch.stack(row) for row in y]))
        for position, states_of in enumerate(final):
            states_of.append(torch.stack([end[position] for end in ends]))
    results = [torch.stack(states_of) for states_of in final]
    return torch.cat(outputs, -1), tuple(results) if spec.has_cell_state else results[0]


def make(*shape: int, dtype: torch.dtype = F64, seed: int = 5) -> Tensor:
    return random(torch.Generator().manual_seed(seed), *shape, dtype=dtype).requires_grad_()


def make_states(module: nn.Module, *before: int, batch: int = B, seed: int = 6) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    dtype = next(module.parameters()).dtype
    h = make(*before, count, batch, module.proj_size or H, dtype=dtype, seed=seed)
    if module.mode != "LSTM":
        return h
    return h, make(*before, count, batch, H, dtype=dtype, seed=seed + 1)


def marks_of(module: nn.Module, kind: str) -> dict[str, Any]:
    """The marks of a case by its name."""
    marks: dict[str, Any] = {}
    if "lengths" in kind:
        marks["lengths"] = torch.tensor([7, 0, 3, 5, 3])
    if "resets" in kind:
        marks["resets"] = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3
        marks["resets"][0, 0] = True
    if "state" in kind:
        marks["reset_state"] = make_states(module, *([T] if "each" in kind else []), seed=8)
    return marks


KINDS = ["lengths", "resets", "lengths, resets", "resets to a state", "resets to a state each step"]
KINDS += ["lengths, resets to a state"]


def compare(module: nn.Module, kind: str) -> None:
    """Compares outputs and gradients of everything."""
    x, hx, marks = make(T, B, I), make_states(module), marks_of(module, kind)

    def results(call: Any) -> list[Tensor]:
        outputs = leaves(call(x, hx, **marks))
        weights = [make(*o.shape, seed=9 + i).detach() for i, o in enumerate(outputs)]
        wanted = [x, *leaves(hx), *leaves(marks.get("reset_state", [])), *module.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, wanted, weights, materialize_grads=True)]

    assert_same_in_double(
        results(module), results(lambda *args, **marks: loop(module, *args, **marks))
    )


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in leaves(v)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_the_loop(cell: str, options: dict[str, Any], kind: str) -> None:
    compare(build(cell, I, H, dtype=F64, **options), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"proj_size": 2, "bidirectional": True}, {"bias": False}])
def test_projection_and_no_biases_match_the_loop(options: dict[str, Any], kind: str) -> None:
    compare(build("lstm", I, H, dtype=F64, **options), kind)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != F64], ids=str)
@pytest.mark.parametrize("kind", ["lengths", "lengths, resets"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_other_dtypes(cell: str, kind: str, dtype: torch.dtype) -> None:
    module = build(cell, I, 20, bidirectional=True, dtype=dtype)
    x, marks = make(T, B, I, dtype=dtype).detach(), marks_of(module, kind)

    def ours() -> Any:
        return module(x, **marks)

    with reference_math():
        theirs = ours()

    def exact(change: Any) -> Any:
        with reference_math():
            double = build(cell, I, 20, bidirectional=True, dtype=F64)
            for own, weight in zip(double.parameters(), module.parameters(), strict=True):
                own.data = change(weight)
            return double(change(x), **marks)

    assert_agrees(ours(), theirs, exact)


def test_batch_first_and_forms_of_resets() -> None:
    """Stable-Baselines' episode_starts are floats, TorchRL's is_init has a trailing 1."""
    module = build("gru", I, H, batch_first=True, dtype=F64)
    x, marks = make(T, B, I), marks_of(module, "lengths, resets")
    expected, h_n = loop(module, x, x.new_zeros(1, B, H), **marks)
    resets = marks["resets"].t()
    for form in (resets, resets.float(), resets.unsqueeze(-1), resets.int().unsqueeze(-1)):
        y, h = module(x.transpose(0, 1), lengths=marks["lengths"].int(), resets=form)
        assert_same_in_double((y.transpose(0, 1), h), (expected, h_n))


def test_a_reset_state_for_all_rows_can_be_learned() -> None:
    module = build("lstm", I, H, dtype=F64)
    x, hx, marks = make(T, B, I), make_states(module), marks_of(module, "resets")
    state = make_states(module, batch=1, seed=8)
    outputs = leaves(module(x, hx, **marks, reset_state=state))
    found = torch.autograd.grad(sum(o.sum() for o in outputs), state)
    wide = tuple(s.expand(1, B, H) for s in state)
    outputs = leaves(loop(module, x, hx, **marks, reset_state=wide))
    assert_same_in_double(found, torch.autograd.grad(sum(o.sum() for o in outputs), state))


def test_equal_lengths_run_the_padded_batch() -> None:
    module = build("lstm", I, H, bidirectional=True)
    x = make(T, B, I, dtype=torch.float32)
    for ours, theirs in zip(
        leaves(module(x, lengths=torch.full((B,), T))), leaves(module(x)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_marks_may_be_changed_before_backward() -> None:
    """As buffers for the episode starts of the next rollout."""
    module = build("lstm", I, H, dtype=F64)
    x, marks = make(T, B, I), marks_of(module, "lengths, resets")
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x, **marks)[0].sum(), wanted)
    loss = module(x, **marks)[0].sum()
    marks["lengths"].zero_()
    marks["resets"].logical_not_()
    assert_same_in_double(torch.autograd.grad(loss, wanted), expected)


def test_output_may_be_changed_before_backward() -> None:
    module = build("gru", I, H, dtype=F64)
    x, marks = make(T, B, I), marks_of(module, "lengths, resets")
    found = torch.autograd.grad(module(x, **marks)[0].relu_().sum(), x)
    assert_same_in_double(found, torch.autograd.grad(module(x, **marks)[0].relu().sum(), x))


def test_lengths_match_a_packed_sequence() -> None:
    module = build("lstm", I, H, num_layers=2, bidirectional=True)
    x, lengths = make(T, B, I, dtype=torch.float32), torch.tensor([2, 7, 1, 4, 4])
    packed, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected, _ = pad_packed_sequence(packed, total_length=T)
    output, own = module(x, lengths=lengths)
    assert torch.equal(output, expected)
    for ours, theirs in zip(own, states, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_jagged_tensors_go_in_and_come_out(batch_first: bool) -> None:
    module = build("lstm", I, H, bidirectional=True, batch_first=batch_first, dtype=F64)
    sequences = [make(length, I, seed=length) for length in (3, 1, 6)]
    jagged = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    output, states = module(jagged)
    assert output.layout is torch.jagged
    loss = output.values().sum() + sum(state.sum() for state in states)
    found = torch.autograd.grad(loss, sequences)
    expected, outputs = [], []
    for index, sequence in enumerate(sequences):
        y, own = module(sequence)
        outputs.append(y)
        for state, whole in zip(own, states, strict=True):
            assert_same_in_double(whole[:, index], state)
        expected += torch.autograd.grad(y.sum() + sum(s.sum() for s in own), sequence)
    assert_same_in_double(output.values(), torch.cat(outputs))
    assert_same_in_double(list(found), expected)


def test_other_nested_tensors_raise() -> None:
    module = build("gru", I, H)
    strided = torch.nested.nested_tensor([torch.randn(2, I), torch.randn(3, I)])
    with pytest.raises(RuntimeError, match="input must be a dense tensor, got a nested one"):
        module(strided)
    jagged = torch.nested.nested_tensor([torch.randn(2, I)], layout=torch.jagged)
    with pytest.raises(ValueError, match="lengths must not be given with a nested tensor"):
        module(jagged, lengths=torch.tensor([2]))


def test_no_steps_in_any_row() -> None:
    module = build("lstm", I, H, num_layers=2, dtype=F64)
    x, hx = make(T, B, I), make_states(module)
    y, states = module(x, hx, lengths=torch.zeros(B, dtype=torch.int64))
    assert not y.any()
    for state, initial in zip(states, hx, strict=True):
        assert torch.equal(state, initial)


def test_second_derivatives_and_transforms() -> None:
    module = build("gru", I, H, bidirectional=True, dtype=F64)
    marks = marks_of(module, "lengths, resets to a state")
    x, hx = make(T, B, I), make_states(module)
    state = marks.pop("reset_state")

    def call(x: Tensor, hx: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x, hx, **marks, reset_state=state))

    assert torch.autograd.gradcheck(call, (x, hx, state))
    assert torch.autograd.gradgradcheck(call, (x, hx, state))
    plain = (x.detach(), hx.detach(), state.detach())
    tangents = tuple(torch.randn_like(t) for t in plain)
    _, (found, _) = torch.func.jvp(call, plain, tangents)
    _, pullback = torch.func.vjp(call, *plain)
    weights = torch.randn_like(found)
    pulled = pullback((weights, torch.zeros_like(hx)))
    assert_same_in_double(
        (found * weights).sum(), sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    )
    batched = torch.func.vmap(call, in_dims=(0, None, None))(
        x.detach().expand(2, T, B, I), *plain[1:]
    )
    assert_same_in_double(batched[0][1], call(*plain)[0])


@given(st.integers(0, 6), st.integers(0, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_segments_name_every_step_once(
    steps: int, batch: int, has_resets: bool, backwards: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
    resets = torch.rand(steps, batch, generator=generator) < 0.4 if has_resets else None
    found = cut(steps, batch, lengths, resets, backwards)
    active = torch.arange(steps).unsqueeze(1) < lengths
    assert torch.equal(found.rows.sort().values, active.flatten().nonzero().squeeze(1))
    assert found.batch_sizes.sum() == len(found.rows)
    assert (found.batch_sizes[1:] <= found.batch_sizes[:-1]).all()
    resets_in = 0 if resets is None else int((resets & active).sum())
    assert int((found.initial >= batch).sum()) == resets_in


class TestFunctional:
    def test_keywords(self) -> None:
        module = build("gru", I, H, dtype=F64)
        x, hx, marks = make(T, B, I), make_states(module), marks_of(module, KINDS[-1])
        rest = (list(module.parameters()), True, 1, 0.0, False, False, False)
        found = fastrnn.functional.gru(x, hx, *rest, **marks)
        assert_same_in_double(found, loop(module, x, hx, **marks))

    def test_packed_rows_have_no_marks(self) -> None:
        module = build("gru", I, H)
        rest = (list(module.parameters()), True, 1, 0.0, False, False)
        with pytest.raises(ValueError, match="lengths must not be given with packed data"):
            fastrnn.functional.gru(
                torch.randn(2, I),
                torch.tensor([2]),
                torch.zeros(1, 2, H),
                *rest,
                lengths=torch.tensor([1, 1]),
            )


RESETS = torch.zeros(T, B, dtype=torch.bool)


@pytest.mark.parametrize(
    ("marks", "error", "message"),
    [
        ({"lengths": [1] * B}, TypeError, "lengths must be a tensor of integers, got list"),
        ({"lengths": torch.ones(B)}, TypeError, "integers, got torch.float32"),
        ({"lengths": torch.ones(B) > 0}, TypeError, "integers, got torch.bool"),
        ({"lengths": torch.ones(B, 1).int()}, ValueError, r"shape \[5\], got \[5, 1\]"),
        ({"lengths": torch.tensor([1, 2, 3, 4, 8])}, ValueError, "from 0 to the 7 steps.*got 8"),
        ({"lengths": torch.tensor([1, 2, 3, -4, 7])}, ValueError, "from 0 to the 7 steps.*got -4"),
        ({"resets": [[0]]}, TypeError, "resets must be a tensor of bool or of 0 and 1, got list"),
        ({"resets": RESETS.t()}, ValueError, r"resets must have the shape \[7, 5\], got \[5, 7\]"),
        ({"resets": RESETS + 0.5}, ValueError, "resets must hold only 0 and 1"),
        ({"reset_state": torch.zeros(1, B, H)}, ValueError, "together with resets"),
        (
            {"resets": RESETS, "reset_state": torch.zeros(1, B, H + 1)},
            ValueError,
            r"reset_state must have the shape \[1, 5, 4\].*got \[1, 5, 5\]",
        ),
        ({"resets": RESETS, "reset_state": 0.0}, TypeError, "reset_state must be a tensor"),
    ],
    ids=str,
)
def test_wrong_marks_raise(marks: dict[str, Any], error: type[Exception], message: str) -> None:
    module = build("gru", I, H)
    with pytest.raises(error, match=message):
        module(torch.randn(T, B, I), **marks)


def test_marks_need_a_padded_batch() -> None:
    module = build("lstm", I, H)
    packed = pack(torch.randn(3, I), [2, 1], enforce_sorted=True)
    message = "lengths must not be given with a PackedSequence"
    with pytest.raises(ValueError, match=message):
        module(packed, lengths=torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="input without a batch dimension"):
        module(torch.randn(T, I), resets=torch.zeros(T, 1))
    state = torch.zeros(1, B, H)
    error = raised(lambda: module(torch.randn(T, B, I), resets=RESETS, reset_state=state))
    assert "reset_state must be a pair of tensors" in str(error)


def test_resets_match_a_loop_of_cells() -> None:
    """Compares with a cell and a mask times the state before each step, as users write it today."""
    module, cell = build("gru", I, H, dtype=F64), make_step("gru", I, H, dtype=F64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data = getattr(module, f"{name}_l0").data
    x, resets = make(T, B, I), marks_of(module, "resets")["resets"]
    h, outputs = torch.zeros(B, H, dtype=F64), []
    for t in range(T):
        h = cell(x[t], h * (~resets[t]).unsqueeze(1))
        outputs.append(h)
    assert_same_in_double(module(x, resets=resets)[0], torch.stack(outputs))
    with reference_math():
        assert_same_in_double(module(x, resets=resets)[0], torch.stack(outputs))


def test_run_with_marks_is_deterministic() -> None:
    module = build("lstm", I, H, bidirectional=True)
    x, marks = make(T, B, I, dtype=torch.float32), marks_of(module, "lengths, resets")

    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor, hx: Any) -> Any:
            return self.layer(x, hx, **marks)

    first, second = run(Marked(), x), run(Marked(), x)
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert widen(first["out0"]).isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "resets", "steps", "message"),
    [
        (torch.tensor([1, 4]), None, 3, "lengths must be from 0 to the 3 steps, got 4"),
        (torch.tensor([1, -1]), None, 3, "lengths must be from 0 to the 3 steps, got -1"),
        (torch.tensor([1.0]), None, 3, "lengths must be 1-D int64 on the CPU"),
        (torch.tensor([[1]]), None, 3, "lengths must be 1-D int64 on the CPU"),
        (torch.tensor([1]), torch.zeros(3, 1), 3, "resets must be 2-D bool on the CPU"),
        (torch.tensor([1]), torch.zeros(2, 1) > 0, 3, r"resets must have the shape \[3, 1\]"),
        (torch.tensor([0]), None, -1, "steps must not be negative, got -1"),
    ],
    ids=str,
)
def test_operator_rejects_wrong_arguments(
    lengths: Tensor, resets: Tensor | None, steps: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastrnn.cut_segments(lengths, resets, steps, False)
