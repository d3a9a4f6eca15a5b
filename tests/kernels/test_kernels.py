"""CPU kernels of every instruction set against the float64 reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import PACKED, by_kernels, by_reference, layer_call, run_python, slots_by_count
from tolerance import Change, Exact, assert_agrees
from torch import Tensor

from fastrnn import _C
from fastrnn.layer_call import SequenceMembers
from fastrnn.ops.gradients import cpu_gradients
from fastrnn.ops.sequence import previous_states, previous_states_by_index
from fastrnn.spec import BUILT_IN, CELLS, CellSpec, present

ISAS = _C.available_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(None)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """Random arguments of one layer, and its outputs and gradients."""

    def __init__(
        self,
        spec: CellSpec,
        steps: int,
        batch: int,
        inputs: int,
        hidden: int,
        proj: int = 0,
        directions: int = 1,
        bias: bool = True,
        packed: bool = False,
    ) -> None:
        out = proj or hidden
        scale = hidden**-0.5
        self.spec = spec
        self.slots = spec.slots(bias, proj > 0)
        rows = spec.gates * hidden
        units = (spec.parameters * hidden,)
        sizes = ((rows, inputs), (rows, out), (rows,), (rows,), (proj, hidden), units)
        self.weights = [
            torch.randn(sizes[slot]) * scale
            for _ in range(directions)
            for slot in present(self.slots)
        ]
        self.batch_sizes: Tensor | None = None
        if packed:
            lengths = torch.randint(1, steps + 1, (batch,))
            lengths[0] = steps
            self.batch_sizes = (lengths > torch.arange(steps).unsqueeze(1)).sum(1)
            self.x = torch.randn(int(lengths.sum()), inputs)
        else:
            self.x = torch.randn(steps, batch, inputs)
        self.h0 = torch.randn(directions, batch, out)
        self.c0: Tensor | None = None
        if spec.has_cell_state:
            self.c0 = torch.randn(directions, batch, spec.cell_states * hidden)
        if spec.name == "slstm":  # its normaliser is positive
            self.c0 = self.c0.abs() + 0.5

    def run(self, layer: Any, change: Change) -> dict[str, Tensor]:
        """Returns all outputs and gradients. Applies ``change`` to every input first."""
        leaves = {"x": self.x, "h0": self.h0}
        if self.c0 is not None:
            leaves["c0"] = self.c0
        leaves |= {f"w{index}": w for index, w in enumerate(self.weights)}
        leaves = {name: change(leaf).requires_grad_() for name, leaf in leaves.items()}
        y, h_n, c_n = layer(
            leaves["x"],
            leaves["h0"],
            leaves.get("c0"),
            [leaf for name, leaf in leaves.items() if name.startswith("w")],
            self.batch_sizes,
            self.spec,
        )
        outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n} if c_n is not None else {})
        generator = torch.Generator().manual_seed(3)
        d_outputs = [change(torch.randn(o.shape, generator=generator)) for o in outputs.values()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), d_outputs)
        result = {name: output.detach() for name, output in outputs.items()}
        return result | {f"d_{n}": g for n, g in zip(leaves, gradients, strict=True)}

    def compute(self, layer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.run(layer, lambda value: value.to(dtype, copy=True))

    def exact(self, dtype: torch.dtype) -> Exact:
        """Returns the exact results for the inputs, rounded to ``dtype``."""
        return lambda change: self.run(by_reference, lambda value: change(value.to(dtype)))

    def check(self, dtype: torch.dtype) -> None:
        ours, theirs = (self.compute(layer, dtype) for layer in (by_kernels, by_reference))
        assert_agrees(ours, theirs, self.exact(dtype))


def packed(sizes: list[Any]) -> dict[str, Any]:
    """The arguments of an operator for packed rows."""
    return {"slots": ALL | PACKED, "sequence": [torch.tensor(sizes)]}


#: all weight slots but w_hr; all results of recurrent_forward
ALL, SAVE = slots_by_count(4), 0b1111

#: cells with a recurrent product; cells whose gradients are one operator
DENSE = [name for name in BUILT_IN if CELLS[name].dense]
WITHOUT_PARAMETERS = [name for name in BUILT_IN if not CELLS[name].parameters]

#           T   B   I   H   options
SHAPES: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (1, 1, 1, 1, {}),
    (2, 1, 5, 17, {"directions": 2}),
    (3, 2, 4, 16, {"bias": False}),
    (5, 7, 3, 31, {"packed": True, "directions": 2}),
    (7, 13, 17, 64, {}),
    (4, 37, 8, 8, {"directions": 2}),
    (2, 3, 0, 5, {}),
    (3, 0, 4, 6, {}),
    (6, 24, 40, 100, {"packed": True}),
    (1, 50, 9, 65, {"directions": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", BUILT_IN)
def test_layer_matches_reference(
    isa: str, threads: int, cell: str, shape: tuple[Any, ...], dtype: torch.dtype
) -> None:
    *sizes, options = shape
    Case(CELLS[cell], *sizes, **options).check(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 1, 1, 2, 1), {}),
        ((4, 5, 7, 33, 19), {"directions": 2}),
        ((6, 9, 3, 20, 3), {"packed": True, "directions": 2, "bias": False}),
        ((3, 26, 5, 64, 48), {}),
        ((1, 64, 5, 64, 17), {}),
        ((2, 3, 5, 70, 33), {}),
    ],
    ids=str,
)
def test_projection_matches_reference(
    isa: str, threads: int, sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    Case(CELLS["lstm"], *sizes, **options).check(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", BUILT_IN)
def test_half_types_accumulate_in_float32(isa: str, cell: str, dtype: torch.dtype) -> None:
    Case(CELLS[cell], 9, 3, 5, 21, directions=2).check(dtype)


@pytest.mark.parametrize("cell", BUILT_IN)
def test_long_sequences_are_projected_in_chunks(isa: str, cell: str) -> None:
    plan = _C.plan(cell, 600, 1, 3, 20)
    assert plan["input"] == "ahead"
    assert plan["chunk_rows"] < 600
    Case(CELLS[cell], 600, 1, 3, 20, directions=2).check(torch.float32)


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_unpacked_weights_match_reference(isa: str, threads: int, cell: str, batch: int) -> None:
    """Covers every tile height, and sizes that do and do not fill vectors and tiles."""
    sizes = (3, batch, 64 + batch, 107 + batch)
    assert not _C.plan(cell, *sizes)["packed"]
    case = Case(CELLS[cell], *sizes)
    case.check(torch.float32)
    case.check(torch.float64)


def test_input_is_projected_ahead_if_weights_exceed_the_shared_cache() -> None:
    assert _C.plan("lstm", 2, 6, 1100, 1100, threads=2)["input"] == "ahead"
    Case(CELLS["lstm"], 2, 6, 1100, 1100).check(torch.float32)


@pytest.mark.parametrize("cell", DENSE)
def test_shared_blocks_match_reference(isa: str, threads: int, cell: str) -> None:
    gates = CELLS[cell].gates
    hidden = {1: 520, 2: 390, 3: 300, 4: 260}[gates]
    plan = _C.plan(cell, 18, 15, hidden, hidden, threads=threads)
    assert plan["shared"] == (threads > 1)
    Case(CELLS[cell], 18, 15, hidden, hidden).check(torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float64"}, {"weight_format": "float16"}], ids=str
)
@pytest.mark.parametrize("sizes", [(30, 1, 5, 150), (12, 16, 33, 70)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cell", BUILT_IN)
def test_panels_serve_calls_after_the_weights_changed(
    isa: str, cell: str, threads: int, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    plan = _C.plan(cell, *sizes, threads=threads, **options)
    assert plan["packed"]
    has_half = CELLS[cell].reduced and sizes[1] == 1 and isa != "baseline"
    is_half = "weight_format" in options and has_half
    assert (plan["recurrent_format"] == "float16") == is_half
    assert _C._testing.panels_outlive_calls(cell, *sizes, threads=threads, **options)
    if CELLS[cell].projects:
        sizes += (30,)
        assert _C._testing.panels_outlive_calls(cell, *sizes, threads=threads, **options)


# --- plans for a slow L3 -------------------------------------------------------------------------


@pytest.fixture
def l2_kb() -> Iterator[Callable[[int | None], None]]:
    yield _C._testing.set_l2_kb
    _C._testing.set_l2_kb(None)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((5, 50, 70, 129), {}),
        ((7, 13, 300, 150), {"directions": 2}),
        ((6, 26, 40, 300), {"packed": True}),
        ((4, 9, 33, 64), {"bias": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", DENSE)
def test_plans_for_a_slow_l3_match_reference(
    isa: str,
    threads: int,
    cell: str,
    sizes: tuple[int, ...],
    options: dict[str, Any],
    l2_kb: Callable[[int | None], None],
) -> None:
    l2_kb(4)
    assert _C.plan(cell, *sizes, threads=threads)["prefetch"]
    Case(CELLS[cell], *sizes, **options).check(torch.float32)


@pytest.mark.parametrize("cell", BUILT_IN)
def test_plans_for_a_slow_l3_change_no_bits_of_wide_layers(
    isa: str, cell: str, l2_kb: Callable[[int | None], None]
) -> None:
    case = Case(CELLS[cell], 3, 48, 320, 320)
    l2_kb(0)
    expected = case.compute(by_kernels, torch.float32)
    for kilobytes in (16, 2048):
        l2_kb(kilobytes)
        found = case.compute(by_kernels, torch.float32)
        for name in expected.keys() & {"y", "h_n", "c_n", "d_h0", "d_c0"}:
            assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize("kilobytes", [16, 2048])
def test_projection_with_plans_for_a_slow_l3_matches_reference(
    isa: str, kilobytes: int, l2_kb: Callable[[int | None], None]
) -> None:
    l2_kb(kilobytes)
    Case(CELLS["lstm"], 8, 14, 60, 130, proj=70).check(torch.float32)


def test_gradients_of_many_rows_in_deep_blocks_match_reference(
    l2_kb: Callable[[int | None], None],
) -> None:
    l2_kb(1024)  # the weights exceed it
    Case(CELLS["gru"], 25, 28, 100, 260).check(torch.float32)


def test_plan_for_a_slow_l3_splits_units_and_prefetches(
    l2_kb: Callable[[int | None], None],
) -> None:
    def plan(*sizes: int, **options: Any) -> dict[str, Any]:
        return _C.plan("lstm", *sizes, threads=2, **options)

    l2_kb(0)
    fast = plan(25, 64, 1024, 1024)
    assert (fast["row_groups"], fast["input"], fast["prefetch"]) == (2, "fused", False)
    l2_kb(2048)
    large = plan(25, 64, 1024, 1024)
    assert (large["unit_groups"], large["input"], large["prefetch"]) == (2, "ahead", True)
    assert large["chunk_rows"] == 96
    middle = plan(25, 64, 500, 500)
    assert (middle["unit_groups"], middle["input"], middle["prefetch"]) == (2, "fused", True)
    small = plan(25, 64, 128, 128)
    assert (small["row_groups"], small["input"], small["prefetch"]) == (2, "fused", False)
    backward = plan(25, 64, 1024, 1024, training=True)
    assert (backward["row_groups"], backward["prefetch"]) == (2, True)


# --- gradient products after the backward time loop ----------------------------------------------


def gradients_of(case: Case, needs: list[bool]) -> list[Tensor | None]:
    """Returns d_x and d_weights by the operator, None where they are not needed."""
    call = layer_call(case.x, case.h0, case.c0, case.weights, case.batch_sizes, case.spec)
    y, h_n, c_n, saved = torch.ops.fastrnn.recurrent_forward(
        case.x,
        case.h0,
        case.c0,
        case.weights,
        call.weights.slots | call.sequence.slots,
        call.sequence.flat,
        case.spec.name,
        case.spec.training_outputs,
    )
    d_outputs = (y.cos(), h_n, c_n if case.spec.has_cell_state else None)
    wanted = (needs[0], True, case.spec.has_cell_state, *needs[1:])
    d_x, _, _, *d_weights = cpu_gradients(call, wanted, d_outputs, y, saved)
    return [d_x, *d_weights]


@pytest.mark.parametrize(
    "options",
    [{}, {"directions": 2}, {"packed": True, "directions": 2}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(1, 3, 5, 7), (3, 40, 6, 9), (40, 3, 6, 9)], ids=str)
@pytest.mark.parametrize("cell", BUILT_IN)
def test_gradient_products_match_torch(cell: str, sizes: tuple[int, ...], options: Any) -> None:
    steps, batch, inputs, hidden = sizes
    Case(CELLS[cell], steps, batch, inputs, hidden, **options).check(torch.float32)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sizes", [[1], [3], [2, 2], [4, 1], [5, 5, 5, 3, 3, 2, 1, 1], [3, 2, 1]])
def test_previous_states_of_packed_rows_match_a_loop(sizes: list[int], backwards: bool) -> None:
    """Slices (eager code) and indices (compiled code) give the states of a loop over the rows."""
    y, h0 = torch.randn(sum(sizes), 3), torch.randn(sizes[0], 3)
    rows = list(zip(y.split(sizes), sizes, strict=True))
    states, expected = h0, []
    for step, size in reversed(rows) if backwards else rows:
        expected.append(states[:size])
        states = torch.cat([step, states[size:]])
    truth = torch.cat(expected[::-1] if backwards else expected)
    batch_sizes = torch.tensor(sizes)
    sequence = SequenceMembers(batch_sizes).pack()
    assert torch.equal(previous_states(y, h0, sequence, backwards), truth)
    assert torch.equal(previous_states_by_index(y, h0, batch_sizes, backwards), truth)


@pytest.mark.parametrize("cell", BUILT_IN)
def test_gradients_of_several_blocks_and_a_remainder_match_reference(
    isa: str, threads: int, cell: str
) -> None:
    Case(CELLS[cell], 9, 33, 270, 90, directions=2).check(torch.float32)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_only_needed_gradients_are_computed(cell: str) -> None:
    proj = 3 if cell == "lstm" else 0
    case = Case(CELLS[cell], 4, 3, 5, 7, proj, directions=2)
    count = 1 + len(case.weights)
    everything = gradients_of(case, [True] * count)
    for index in range(count):
        needs = [i == index for i in range(count)]
        found = gradients_of(case, needs)
        assert [g is not None for g in found] == needs
        assert torch.equal(found[index], everything[index])


def test_gradients_do_not_share_memory() -> None:
    case = Case(CELLS["lstm"], 4, 3, 5, 7)
    gradients = gradients_of(case, [True] * 5)
    assert len({g.untyped_storage().data_ptr() for g in gradients if g is not None}) == 5


def test_gradient_operator_rejects_wrong_tensors() -> None:
    case = Case(CELLS["gru"], 3, 2, 4, 5)
    given = (case.h0, None, case.weights, ALL, None)
    y, h_n, _, saved = torch.ops.fastrnn.recurrent_forward(case.x, *given, "gru", SAVE)

    def call(
        saved: Tensor = saved,
        x: Tensor = case.x,
        y: Tensor = y,
        d_y: Tensor | None = y,
        d_h_n: Tensor | None = h_n,
    ) -> Any:
        gradients = torch.ops.fastrnn.recurrent_gradients
        return gradients(d_y, d_h_n, None, x, *given, y, saved, "gru", 31)

    call()
    call(d_y=None, d_h_n=None)
    for changed in (
        {"d_y": y[:2]},
        {"d_y": y.double()},
        {"saved": saved[:, :2]},
        {"saved": saved.double()},
        {"saved": torch.empty(0)},
        {"d_h_n": h_n[:, :1]},
        {"x": case.x[:, :, :3]},
        {"x": case.x.double()},
        {"y": y[:2]},
        {"y": y.double()},
    ):
        with pytest.raises(RuntimeError):
            call(**changed)


# --- plans ---------------------------------------------------------------------------------------


def test_plan_uses_threads_only_for_enough_work() -> None:
    assert _C.plan("rnn_tanh", 100, 1, 8, 8, threads=8)["threads"] == 1
    assert (
        _C.plan("lstm", 1, 1, 64, 64, threads=8)["threads"] == 1
    )  # one step does not pay for waking threads
    assert _C.plan("lstm", 100, 1, 128, 128, threads=2)["threads"] == 2
    assert _C.plan("lstm", 100, 32, 256, 256, threads=8)["threads"] == 8


def test_plan_groups_multiply_to_threads() -> None:
    for batch in (1, 5, 16, 40, 200):
        for hidden in (1, 16, 17, 64, 300):
            for training in (False, True):
                plan = _C.plan("gru", 50, batch, 20, hidden, threads=3, training=training)
                assert plan["row_groups"] * plan["unit_groups"] == plan["threads"]


def test_plan_splits_rows_if_there_are_too_few_units() -> None:
    plan = _C.plan("rnn_tanh", 100, 500, 300, 4, threads=4)
    assert plan["row_groups"] == plan["threads"] > 1


def test_plan_balances_blocks_of_units() -> None:
    lanes = _C.plan("rnn_tanh", 9, 9, 9, 9)["vector_lanes"]
    assert _C.plan("rnn_tanh", 100, 6, 300, 8 * lanes, threads=2)["unit_vectors"] == 4
    assert _C.plan("rnn_tanh", 100, 6, 300, 2 * lanes, threads=2)["unit_vectors"] == 1
    assert _C.plan("lstm", 100, 6, 300, 8 * lanes, threads=2)["unit_vectors"] == 1


def test_plan_packs_weights_from_a_number_of_rows_on() -> None:
    def packed(steps: int, batch: int, hidden: int, proj: int = 0, training: bool = False) -> bool:
        plan = _C.plan("lstm", steps, batch, 64, hidden, proj_size=proj, training=training)
        return bool(plan["packed"])

    # Packing in forward needs R / 5 rows (R up to 512), R / 2 from 8 sequences on, and R for a
    # single step, where R is the size of h.
    assert (packed(12, 1, 64), packed(13, 1, 64)) == (False, True)
    assert (packed(3, 8, 64), packed(4, 8, 64)) == (False, True)
    assert (packed(1, 63, 64), packed(1, 64, 64)) == (False, True)
    assert (packed(12, 1, 640, proj=64), packed(13, 1, 640, proj=64)) == (False, True)
    # One sequence of an LSTM or GRU on an Intel CPU needs R^2 / 750 steps as well.
    least = 350 if _C.cpu_vendor() == "intel" else 103
    assert (packed(least - 1, 1, 2000), packed(least, 1, 2000)) == (False, True)
    assert _C.plan("rnn_tanh", 103, 1, 64, 2000)["packed"]
    assert packed(52, 2, 512)
    assert not packed(1, 64, 64, training=True)
    assert packed(15, 1, 64, training=True)


def test_plan_runs_directions_together_if_that_saves_barriers() -> None:
    def together(hidden: int, batch: int, threads: int, directions: int = 2) -> int:
        plan = _C.plan("gru", 100, batch, 64, hidden, threads=threads, directions=directions)
        assert plan["threads"] * plan["together"] <= threads
        return plan["together"]

    assert together(64, 1, threads=2) == 2
    assert together(64, 1, threads=4) == 2
    assert together(64, 1, threads=1) == 1  # no second thread
    assert together(64, 1, threads=2, directions=1) == 1
    assert together(64, 64, threads=2) == 1  # split by rows, which needs no barriers
    assert together(2048, 1, threads=2) == 1  # weights exceed the cache of a core


def test_plan_rejects_impossible_arguments() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of rnn_tanh, .*, got 'elman'"):
        _C.plan("elman", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        _C.plan("gru", 1, 1, 1, 0)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, int8, got 'int4'"):
        _C.plan("gru", 1, 1, 1, 1, dtype="int4")
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        _C.plan("gru", 1, 1, 1, 1, directions=0)


def test_set_isa_forces_and_restores_the_instruction_set() -> None:
    best = _C.cpu_capability()
    for name in ISAS:
        _C.set_isa(name)
        assert _C.cpu_capability() == name
        assert _C.plan("gru", 1, 1, 1, 1)["isa"] == name
    _C.set_isa(None)
    assert _C.cpu_capability() == best
    with pytest.raises(ValueError, match=r"isa must be None or one of .*, got 'mmx'"):
        _C.set_isa("mmx")


def test_environment_variables_set_isa_and_threads() -> None:
    code = "from fastrnn import _C; print(_C.cpu_capability(), _C.max_threads())"
    assert run_python(code, FASTRNN_ISA="baseline", FASTRNN_THREADS="3") == "baseline 3"
    assert run_python(code, FASTRNN_ISA="", FASTRNN_THREADS="") == f"{ISAS[-1]} 0"


# --- activation functions ------------------------------------------------------------------------


def activation(cell: str, x: Tensor) -> Tensor:
    """Returns f(x), computed by a layer with one unit and an input weight of 1."""
    one = torch.ones(1, 1, dtype=x.dtype)
    zero = torch.zeros(1, x.numel(), 1, dtype=x.dtype)
    y, _, _ = by_kernels(x.view(1, -1, 1), zero, None, [one, 0 * one], None, CELLS[cell])
    return y.view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_have_a_relative_error_of_3_eps(isa: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.logspace(-30, 0, 500)]).to(dtype)
    x = torch.cat([x, -x])
    # The float64 reference itself errs by half a unit (libm), which the bound includes.
    for cell, truth in (
        ("rnn_tanh", torch.tanh(x.double())),
        ("rnn_sigmoid", torch.sigmoid(x.double())),
    ):
        found = activation(cell, x).double()
        error = ((found - truth).abs() / truth.abs().clamp_min(1e-300)).max().item()
        assert error <= 3 * eps, cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_of_infinity_nan_and_zero_match_torch(isa: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e30, -1e30], dtype=dtype)
    for cell, function in (
        ("rnn_tanh", torch.tanh),
        ("rnn_sigmoid", torch.sigmoid),
        ("rnn_relu", torch.relu),
    ):
        torch.testing.assert_close(activation(cell, x), function(x), equal_nan=True)


# --- threads and processes -----------------------------------------------------------------------


@pytest.mark.parametrize("cell", BUILT_IN)
def test_results_are_bitwise_reproducible(threads: int, cell: str) -> None:
    case = Case(CELLS[cell], 20, 9, 12, 70, directions=2)
    first, second = (case.compute(by_kernels, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_calls_from_many_python_threads_match_reference() -> None:
    cases = [Case(CELLS[cell], 15, 8, 16, 64) for cell in BUILT_IN for _ in range(2)]
    expected = [case.compute(by_kernels, torch.float32) for case in cases]
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(5):
            found = cases[index].compute(by_kernels, torch.float32)
            try:
                assert_agrees(found, expected[index], cases[index].exact(torch.float32))
            except AssertionError as failure:
                wrong.append(str(failure))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert wrong == []


SMALL_RUN = """
import torch, fastrnn
torch.manual_seed(0)
layer, x = fastrnn.LSTM(64, 128), torch.randn(30, 16, 64)
def total(): return layer(x)[0].double().sum().item()
"""


def test_call_completes_if_openmp_grants_fewer_threads() -> None:
    """With OpenMP's thread limit only the calling thread runs, and must not wait for others."""
    code = SMALL_RUN + "torch.set_num_threads(4); print(torch.get_num_threads(), total())"
    promised, alone = run_python(code, OMP_THREAD_LIMIT="1").split()
    _, together = run_python(code).split()
    assert promised == "4"
    assert float(alone) == pytest.approx(float(together), rel=1e-5)


def test_more_threads_than_cores_give_the_same_result() -> None:
    code = SMALL_RUN + "torch.set_num_threads(16); print(total())"
    assert float(run_python(code)) == pytest.approx(
        float(run_python(SMALL_RUN + "torch.set_num_threads(1); print(total())")), rel=1e-5
    )


# --- checks of the operators ---------------------------------------------------------------------


def test_forward_operator_rejects_wrong_tensors() -> None:
    spec = CELLS["lstm"]
    case = Case(spec, 3, 2, 4, 5)
    forward = torch.ops.fastrnn.recurrent_forward

    def call(**changed: Any) -> Any:
        arguments = {
            "x": case.x,
            "h0": case.h0,
            "c0": case.c0,
            "weights": case.weights,
            "slots": ALL,
            "sequence": None,
            "cell": "lstm",
            "outputs": SAVE,
        }
        return forward(**{**arguments, **changed})

    call()
    rejected: list[dict[str, Any]] = [
        {"x": case.x[0]},
        {"x": case.x[:, :, :3]},
        {"x": case.x.double()},
        {"x": case.x.int()},
        {"h0": case.h0[0]},
        {"h0": case.h0[:, :1]},
        {"h0": torch.randn(3, 2, 5)},
        {"c0": None},
        {"c0": torch.randn(1, 2, 4)},
        {"weights": case.weights[:1]},
        {"slots": 0b00011},
        {"slots": 0b11111},
        {"slots": 0b01110},
        {"slots": 0b00111},
        {"slots": 0b101111},
        {"slots": -1},
        {"weights": [w.double() for w in case.weights]},
        {"weights": [case.weights[0], case.weights[1][:, :4], *case.weights[2:]]},
        {"weights": [case.weights[0], case.weights[1], case.weights[2][:3], case.weights[3]]},
        {"cell": "elman"},
        {"cell": "gru"},
        {**packed([2, 2, 2])},
        {"x": case.x.flatten(0, 1), **packed([2, 1, 3])},
        {"x": case.x.flatten(0, 1), **packed([2, 2, 1])},
        {"x": case.x.flatten(0, 1), **packed([3, 3])},
        {"x": case.x.flatten(0, 1), **packed([2.0, 2.0, 2.0])},
        {"x": case.x.flatten(0, 1), **packed([2, 2, 2, 0])},
    ]
    for changed in rejected:
        with pytest.raises(RuntimeError):
            call(**changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", WITHOUT_PARAMETERS)
def test_single_step_operators_match_a_layer_of_one_step(cell: str, dtype: torch.dtype) -> None:
    case = Case(CELLS[cell], 1, 3, 4, 5)
    weights = [w.to(dtype) for w in case.weights]
    x, h0 = case.x.to(dtype), case.h0.to(dtype)
    c0 = None if case.c0 is None else case.c0.to(dtype)
    states = (h0, c0)
    step = (h0[0], None if c0 is None else c0[0])
    whole = torch.ops.fastrnn.recurrent_forward(x, *states, weights, ALL, None, cell, SAVE)
    own = torch.ops.fastrnn.recurrent_forward(x[0], *step, weights, ALL, None, cell, SAVE)
    assert own[0].shape == own[1].shape == step[0].shape
    for a, b in zip(own, whole, strict=True):
        assert torch.equal(a, b.view(a.shape))

    def backward(x: Tensor, states: Any, y: Tensor, h_n: Tensor, c_n: Tensor, saved: Tensor) -> Any:
        d_outputs = (y, h_n, None if c0 is None else c_n)
        return torch.ops.fastrnn.recurrent_gradients(
            *d_outputs, x, *states, weights, ALL, None, y, saved, cell, -1
        )

    for a, b in zip(backward(x[0], step, *own), backward(x, states, *whole), strict=True):
        assert torch.equal(a, b.view(a.shape))
    for wrong in (x[0, :2], x[0, 0], x):
        with pytest.raises(RuntimeError):
            torch.ops.fastrnn.recurrent_forward(wrong, *step, weights, ALL, None, cell, 0)
    torch.library.opcheck(
        torch.ops.fastrnn.recurrent_forward.default,
        (x[0], *step, weights, ALL, None, cell, SAVE),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("cell", WITHOUT_PARAMETERS)
def test_operators_pass_opcheck(cell: str) -> None:
    case = Case(CELLS[cell], 3, 2, 4, 5, directions=2)
    given = (case.h0, case.c0, case.weights, ALL, None)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastrnn.recurrent_forward.default,
        (case.x, *given, cell, SAVE),
        test_utils=checks,
    )
    y, h_n, c_n, saved = torch.ops.fastrnn.recurrent_forward(case.x, *given, cell, SAVE)
    d_outputs = (y, h_n, c_n if case.spec.has_cell_state else None)
    torch.library.opcheck(
        torch.ops.fastrnn.recurrent_bidirectional_gradients.default,
        (*d_outputs, case.x, *given, y, saved, cell, 0b10101),
        test_utils=checks,
    )
