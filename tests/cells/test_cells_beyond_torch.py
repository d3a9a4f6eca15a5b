"""Cells that torch.nn lacks: per-unit parameters, several cell states, no recurrent product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import CELLS, DTYPES, CellLayer, check, exact_call, pack, random, reference_math
from tolerance import assert_agrees, assert_same_in_double
from torch import Tensor

from fastrnn import _C
from fastrnn.layer_call import PADDED, LayerCall
from fastrnn.ops import kernel_layer
from fastrnn.reference import reference_step
from fastrnn.spec import BUILT_IN, WEIGHT_SLOTS, Weights
from fastrnn.spec import CELLS as SPECS

NAMES = [name for name in BUILT_IN if name not in CELLS]
F64 = torch.float64
every_cell = pytest.mark.parametrize("cell", NAMES)


def make_input(*shape: int, dtype: torch.dtype = F64, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random(generator, *shape, dtype=dtype).requires_grad_()


def make_states(layer: CellLayer, batch: int, dtype: torch.dtype = F64) -> Any:
    """Random states; the normaliser of an sLSTM is positive."""
    spec, hidden = layer.spec, layer.hidden_size
    count = layer.num_layers * layer.directions
    h = make_input(count, batch, hidden, dtype=dtype, seed=6)
    if not spec.has_cell_state:
        return h
    c = make_input(count, batch, spec.cell_states * hidden, dtype=dtype, seed=7).detach()
    if spec.name == "slstm":
        c[..., hidden : 2 * hidden] = c[..., hidden : 2 * hidden].abs() + 0.5
    return h, c.requires_grad_()


def test_cells_have_what_torch_cells_lack() -> None:
    """Checks that the cells here exercise each freedom of the contract."""
    specs = [SPECS[name] for name in NAMES]
    assert any(spec.parameters > 0 for spec in specs)
    assert any(spec.states > 2 for spec in specs)
    assert any(not spec.dense for spec in specs)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (6, 3, 4, 17), (5, 9, 2, 40)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_padded_input(
    cell: str, dtype: torch.dtype, shape: tuple[int, int, int, int], bias: bool
) -> None:
    steps, batch, inputs, hidden = shape
    layer = CellLayer(cell, inputs, hidden, bias=bias, bidirectional=True, dtype=dtype)
    check(layer, make_input(steps, batch, inputs, dtype=dtype), make_states(layer, batch, dtype))


@every_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[5], [6, 6, 4, 1]], ids=str)
def test_packed_input(cell: str, dtype: torch.dtype, lengths: list[int]) -> None:
    layer = CellLayer(cell, 3, 11, bidirectional=True, dtype=dtype)
    x = pack(make_input(sum(lengths), 3, dtype=dtype), lengths, enforce_sorted=True)
    check(layer, x, make_states(layer, len(lengths), dtype))


@every_cell
@pytest.mark.parametrize("bidirectional", [False, True])
def test_stacked_layers_without_gradient(cell: str, bidirectional: bool) -> None:
    layer = CellLayer(cell, 3, 8, num_layers=3, bidirectional=bidirectional)
    x, hx = make_input(20, 4, 3, dtype=torch.float32), make_states(layer, 4, torch.float32)
    with torch.no_grad():
        ours = layer(x, hx)
        with reference_math():
            theirs = layer(x, hx)
    assert_agrees(ours, theirs, exact_call(layer, x, hx))


@every_cell
def test_no_steps(cell: str) -> None:
    layer = CellLayer(cell, 3, 5, dtype=F64)
    hx = make_states(layer, 2)
    _, *states = kernel_layer(layer.call(torch.zeros(0, 2, 3, dtype=F64), hx))
    for after, before in zip(states, leaves(hx), strict=False):
        assert after is not None
        assert torch.equal(after, before)
        (gradient,) = torch.autograd.grad(after.sum(), before, retain_graph=True)
        assert torch.equal(gradient, torch.ones_like(before))


def leaves(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


@every_cell
def test_single_step_matches_the_reference(cell: str) -> None:
    layer = CellLayer(cell, 3, 6, dtype=F64)
    spec = layer.spec
    x = make_input(4, 3)
    h, *cells = [state[0] for state in leaves(make_states(layer, 4))]
    weights = Weights(list(layer.parameters()), layer.slots)
    call = LayerCall(spec, x, PADDED, h, cells[0] if cells else None, weights)
    wanted = [x, h, *cells, *weights.flat]

    def run(compute: Callable[[LayerCall], Any]) -> list[Tensor]:
        outputs = [t for t in compute(call) if t is not None]
        return [*outputs, *torch.autograd.grad(sum(t.sum() for t in outputs), wanted)]

    assert_same_in_double(run(kernel_layer), run(reference_step))


@every_cell
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree_with_differences(cell: str, packed: bool) -> None:
    layer = CellLayer(cell, 2, 3, bidirectional=True, dtype=F64)
    hx = leaves(make_states(layer, 2))
    data = make_input(5 if packed else 6, 2)
    parameters = list(layer.parameters())

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(hx)], rest[len(hx) :]
        with torch.no_grad():
            inputs: Any = pack(x, [3, 2], enforce_sorted=True) if packed else x.view(3, 2, 2)
        call = layer.call(inputs, states if len(hx) > 1 else states[0])
        call = call._replace(x=x if packed else x.view(3, 2, 2))
        call = call._replace(weights=Weights(list(weights), layer.slots))
        return tuple(t for t in kernel_layer(call) if t is not None)

    assert torch.autograd.gradcheck(run, (data, *hx, *parameters))
    assert torch.autograd.gradgradcheck(run, (data, *hx, *parameters))


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set of this CPU."""
    _C.set_isa(request.param)
    yield
    _C.set_isa(None)


@every_cell
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("batch", [1, 30])
def test_every_instruction_set(cell: str, dtype: torch.dtype, batch: int) -> None:
    layer = CellLayer(cell, 5, 70, bidirectional=True, dtype=dtype)
    check(layer, make_input(7, batch, 5, dtype=dtype), make_states(layer, batch, dtype))


@every_cell
def test_threads_do_not_change_results(cell: str) -> None:
    layer = CellLayer(cell, 64, 128)
    for steps, batch in ((40, 2), (10, 64)):
        x, hx = make_input(steps, batch, 64, dtype=torch.float32), None
        with torch.no_grad():
            results = []
            for threads in (1, 2):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                results.append(layer(x, hx))
                torch.set_num_threads(before)
            with reference_math():
                theirs = layer(x, hx)
        for ours in results:
            assert_agrees(ours, theirs, exact_call(layer, x, hx))


@every_cell
@pytest.mark.slow
def test_compiled_layer(cell: str) -> None:
    layer = CellLayer(cell, 3, 6, dtype=F64)
    x = make_input(5, 2, 3)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True)(x)
    for ours, theirs in zip(leaves(compiled[1]), leaves(expected[1]), strict=True):
        assert_same_in_double(ours, theirs)
    found = torch.autograd.grad(compiled[0].sum(), list(layer.parameters()))
    assert_same_in_double(found, torch.autograd.grad(expected[0].sum(), list(layer.parameters())))


@every_cell
def test_operators_pass_opcheck(cell: str) -> None:
    layer = CellLayer(cell, 3, 6, bidirectional=True)
    spec, x, _, h0, c0, (weights, slots), _ = layer.call(make_input(4, 2, 3, dtype=torch.float32))
    x, weights = x.detach(), [w.detach() for w in weights]
    given = (x, h0, c0, weights, slots, None, spec.name)
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.fastrnn
    forward = operators.recurrent_forward.default
    torch.library.opcheck(forward, (*given, 0b1111), test_utils=checks)
    y, h_n, _, saved = forward(*given, 0b1111)
    backward = (torch.ones_like(y), h_n, None, h0, c0, weights, slots, None, y, saved, cell)
    torch.library.opcheck(operators.recurrent_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("size", [100.0, -100.0, 1e30], ids=str)
def test_slstm_does_not_overflow(size: float) -> None:
    layer = CellLayer("slstm", 2, 4)
    x = torch.full((30, 3, 2), size)
    y, (h_n, c_n) = layer(x)
    assert y.isfinite().all()
    assert h_n.abs().max() <= 1
    assert c_n.isfinite().all()


class TestErrors:
    """Bad arguments raise one sentence before any kernel runs, with real and with fake tensors."""

    def call(self, cell: str, **changes: Any) -> None:
        layer = CellLayer(cell, 3, 4)
        spec, x, _, h0, c0, (weights, slots), _ = layer.call(torch.zeros(2, 5, 3))
        given = {"x": x, "h0": h0, "c0": c0, "weights": list(weights), "slots": slots} | changes
        forward = torch.ops.fastrnn.recurrent_forward.default
        forward(*given.values(), None, spec.name, 0)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize(
        ("cell", "changes", "message"),
        [
            ("slstm", {"c0": torch.zeros(1, 5, 4)}, r"c0 must have the shape \[1, 5, 12\]"),
            ("slstm", {"c0": None}, "c0 must be given for slstm"),
            ("indrnn", {"c0": torch.zeros(1, 5, 4)}, "c0 must not be given for indrnn"),
            (
                "indrnn",
                {"weights": [torch.zeros(4, 3), torch.zeros(5)], "slots": 0b100001},
                r"w_unit must have the shape \[4\]",
            ),
            (
                "indrnn",
                {"weights": [torch.zeros(4, 3), torch.zeros(4, 4)], "slots": 0b000011},
                "slots must hold w_ih",
            ),
            (
                "peephole_lstm",
                {"weights": [torch.zeros(16, 3), torch.zeros(16, 4)], "slots": 0b000011},
                "slots must hold w_unit for peephole_lstm",
            ),
            (
                "slstm",
                {
                    "weights": [torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(4)],
                    "slots": 0b100011,
                },
                "slots must not hold w_unit for slstm",
            ),
        ],
    )
    def test_wrong_arguments(
        self, cell: str, changes: dict[str, Any], message: str, device: str
    ) -> None:
        if device == "cpu":
            with pytest.raises(RuntimeError, match=message):
                self.call(cell, **changes)
            return
        with torch.device("meta"), pytest.raises(RuntimeError, match=message.split(r" \[")[0]):
            self.call(cell, **{k: self.to_meta(v) for k, v in changes.items()})

    @staticmethod
    def to_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        return [v.to("meta") for v in value] if isinstance(value, list) else value

    def test_one_operator_has_no_gradient_of_parameters(self) -> None:
        layer = CellLayer("peephole_lstm", 3, 4)
        spec, x, _, h0, c0, (weights, slots), _ = layer.call(torch.zeros(2, 5, 3))
        given = (x, h0, c0, [w.detach() for w in weights], slots, None)
        y, _, _, saved = torch.ops.fastrnn.recurrent_forward(*given, spec.name, 0b1111)
        with pytest.raises(RuntimeError, match="cell must be one without w_unit"):
            torch.ops.fastrnn.recurrent_gradients(
                y, None, None, *given, y, saved, spec.name, 0b11111111
            )

    @every_cell
    def test_there_are_no_int8_kernels(self, cell: str) -> None:
        with pytest.raises(RuntimeError, match="cell must be one that has int8 kernels"):
            torch.ops.fastrnn.recurrent_int8(
                torch.zeros(2, 1, 3), torch.zeros(1, 1, 4), None, [], None, cell
            )


def test_masks_of_slots_name_each_slot() -> None:
    for name, has_biases in itertools.product(SPECS, (False, True)):
        spec = SPECS[name]
        names = {w for i, w in enumerate(WEIGHT_SLOTS) if spec.slots(has_biases) >> i & 1}
        expected = {"w_ih"} | ({"w_hh"} if spec.dense else set())
        if has_biases:
            expected |= {"b_ih"} | ({"b_hh"} if spec.dense else set())
        assert names == expected | ({"w_unit"} if spec.parameters else set())
