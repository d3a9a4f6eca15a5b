"""The reference against torch.nn in float64, and the tables of cells and slots."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import (
    CELLS,
    TORCH_CELLS,
    build,
    by_reference,
    pack,
    random,
    reference_math,
    run,
    torch_twin,
)
from tolerance import assert_same_in_double

from fastrnn import _C
from fastrnn.layer_call import SequenceMembers
from fastrnn.modules.scripted import script_slots
from fastrnn.ops.gradients import BEFORE_PROJECTION
from fastrnn.spec import (
    BY_MODE,
    FIRST_SEQUENCE_SLOT,
    FORWARD_OUTPUTS,
    GRADIENT_OUTPUTS,
    WEIGHT_SLOTS,
    Weights,
    present,
    slots_of,
    slots_of_names,
)
from fastrnn.spec import CELLS as SPECS

F64 = torch.float64


def test_every_cell_of_the_kernels_has_its_facts() -> None:
    registered = [name for name, spec in SPECS.items() if not spec.defined]
    assert registered == list(_C.cells())
    assert set(CELLS) < set(registered)  # the others are in modules of their own
    assert {name for name, spec in SPECS.items() if spec.projects} == set(BEFORE_PROJECTION)


def test_slots_match_the_operators() -> None:
    assert list(WEIGHT_SLOTS) == _C.weight_slots()
    numbers = itertools.count(FIRST_SEQUENCE_SLOT)
    assert dict(zip(SequenceMembers._fields, numbers, strict=False)) == _C.sequence_slots()
    assert _C.output_slots() == {
        "recurrent_forward": list(FORWARD_OUTPUTS),
        "recurrent_gradients": list(GRADIENT_OUTPUTS),
    }
    for operator, names in _C.output_slots().items():
        schema = getattr(torch.ops.fastrnn, operator).default._schema
        assert [result.name for result in schema.returns] == names
    both = torch.ops.fastrnn.recurrent_bidirectional_gradients.default._schema.returns
    second = [f"{name}_reverse" for name in GRADIENT_OUTPUTS[4:]]
    assert [result.name for result in both] == [*GRADIENT_OUTPUTS, *second]


def test_modes_match_the_modules() -> None:
    for cell in CELLS:
        assert BY_MODE[build(cell, 2, 3).mode].name == cell


@pytest.mark.parametrize("slots", [0b00011, 0b10011, 0b01111, 0b11111])
def test_weights_have_their_names(slots: int) -> None:
    expected = [name for i, name in enumerate(WEIGHT_SLOTS) if slots >> i & 1]
    count = len(expected)
    weights = [torch.tensor(float(i)) for i in range(2 * count)]
    first, second = Weights(weights, slots).directions()
    for direction, start in ((first, 0), (second, count)):
        present = [(n, v) for n, v in direction._asdict().items() if v is not None]
        assert [name for name, _ in present] == expected
        assert [int(value) for _, value in present] == list(range(start, start + count))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_slots_of_modules_and_of_scripts(bias: bool, proj_size: int) -> None:
    module = build("lstm", 3, 4, 2, bias=bias, proj_size=proj_size, bidirectional=True)
    expected = slots_of(bias, proj_size > 0)
    assert slots_of_names(module._flat_weights_names) == expected
    assert script_slots(bias, proj_size > 0) == expected
    assert len(list(module.parameters())) == 4 * len(present(expected))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"num_layers": 3},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_reference_matches_torch(cell: str, options: dict[str, object]) -> None:
    compare_in_double(build(cell, 4, 5, dtype=F64, **options))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_reference_projection_matches_torch(bias: bool, bidirectional: bool) -> None:
    options = {"bias": bias, "bidirectional": bidirectional, "num_layers": 2, "proj_size": 3}
    compare_in_double(build("lstm", 4, 5, dtype=F64, **options))


def compare_in_double(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    padded = random(generator, 6, 3, 4, dtype=F64).requires_grad_()
    rows = random(generator, 11, 4, dtype=F64)
    packed = pack(rows, [2, 5, 4], enforce_sorted=False)
    packed.data.requires_grad_()
    for x in (padded, packed):
        with reference_math():
            ours = run(module, x)
        theirs = run(torch_twin(module), x)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same_in_double(ours[name], value)


def test_sigmoid_matches_a_hand_calculation() -> None:
    """Checks h' = 1 / (1 + exp(-(w x + u h + b + d))) with fixed numbers."""
    one = torch.ones((), dtype=F64)
    w, u, b, d, x, h = (one * v for v in (0.5, -2.0, 0.25, 0.5, 3.0, 0.75))
    y, h_n, c_n = by_reference(
        x.view(1, 1, 1),
        h.view(1, 1, 1),
        None,
        [w.view(1, 1), u.view(1, 1), b.view(1), d.view(1)],
        None,
        SPECS["rnn_sigmoid"],
    )
    expected = 1 / (1 + torch.exp(-(0.5 * 3.0 - 2.0 * 0.75 + 0.25 + 0.5) * one))
    assert_same_in_double(y.squeeze(), expected)
    assert_same_in_double(h_n.squeeze(), expected)
    assert c_n is None


def test_packed_sequences_match_single_sequences() -> None:
    """Runs each packed sequence on its own, in both directions."""
    for cell in CELLS:
        module = build(cell, 3, 4, bidirectional=True, dtype=F64)
        rows = torch.randn(9, 3, dtype=F64)
        lengths = [2, 4, 3]
        with reference_math():
            output, hidden = module(pack(rows, lengths, enforce_sorted=False))
            together, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
            for index, sequence in enumerate(rows.split(lengths)):
                alone, hidden_alone = module(sequence)
                assert_same_in_double(together[: len(sequence), index], alone)
                for h, h_alone in zip(states(hidden), states(hidden_alone), strict=True):
                    assert_same_in_double(h[:, index], h_alone)


def states(hidden: object) -> tuple[torch.Tensor, ...]:
    return hidden if isinstance(hidden, tuple) else (hidden,)
