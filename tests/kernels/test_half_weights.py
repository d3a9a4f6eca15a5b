"""weight_dtype=torch.float16: recurrent weights in float16, for one sequence on the CPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import CELLS, build, by_kernels, exact_call, run_python
from tolerance import assert_agrees
from torch import Tensor, nn

import fastrnn
from fastrnn import _C, functional
from fastrnn import spec as specs

HALF = torch.float16
WIDENING = [name for name in _C.available_isas() if name != "baseline"]
# the smallest H for which the plan of an RNN uses float16 weights
STEPS, HIDDEN = 30, 128

pytestmark = pytest.mark.usefixtures("one_thread")
needs_widening = pytest.mark.skipif(not WIDENING, reason="needs float16 conversion instructions")


@pytest.fixture(params=WIDENING)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(None)


def outputs(module: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Returns the results of a module by name, computed without gradients."""
    with torch.no_grad():
        y, hidden = module(*inputs)
    states = (hidden,) if isinstance(hidden, Tensor) else hidden
    return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}


def rounded(w_hh: Tensor) -> Tensor:
    return w_hh.clamp(-65504, 65504).to(HALF).to(w_hh.dtype)


def with_rounded_weights(module: nn.Module) -> nn.Module:
    """Returns a float32 copy whose recurrent weights are rounded to float16 numbers."""
    twin = copy.deepcopy(module)
    twin.weight_dtype = None
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "weight_hh" in name:
                parameter.copy_(rounded(parameter))
    return twin


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --- results -------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((cell, {}) for cell in CELLS),
    *((cell, {"num_layers": 2, "bidirectional": True}) for cell in ("rnn_tanh", "gru", "lstm")),
    ("lstm", {"proj_size": 75, "bidirectional": True}),
    ("gru", {"bias": False}),
]


@pytest.mark.parametrize("hidden", [HIDDEN, 131, 150])
@pytest.mark.parametrize(("cell", "options"), OPTIONS, ids=str)
def test_results_match_rounded_weights(
    isa: str, cell: str, options: dict[str, Any], hidden: int
) -> None:
    module = build(cell, 5, hidden, weight_dtype=HALF, **options)
    twin = with_rounded_weights(module)
    x = torch.randn(STEPS, 1, 5)
    ours, theirs = outputs(module, x), outputs(twin, x)
    assert_agrees(ours, theirs, exact_call(twin, x, call=outputs))
    module.weight_dtype = None
    assert not torch.equal(ours["y"], outputs(module, x)["y"])


def test_results_match_the_float32_kernel(isa: str) -> None:
    for cell in CELLS:
        module = build(cell, 5, 150, weight_dtype=HALF)
        x = torch.randn(STEPS, 1, 5)
        twin = with_rounded_weights(module)
        # A last block with fewer vectors may sum in another order.
        assert_agrees(outputs(module, x), outputs(twin, x), exact_call(twin, x, call=outputs))


@pytest.mark.skipif("avx512" not in WIDENING, reason="needs AVX-512")
def test_both_conversion_widths_give_equal_results() -> None:
    code = """
import torch, fastrnn
torch.manual_seed(5)
torch.set_num_threads(1)
for name in ("RNN", "GRU", "LSTM"):  # tiles of 4, 2 or 1, of 3, and of 4 vectors
    for hidden in (256, 131, 160):
        module = getattr(fastrnn, name)(4, hidden, weight_dtype=torch.float16)
        with torch.no_grad():
            print(module(torch.randn(30, 1, 4))[0].view(torch.int32).sum().item())
"""
    narrow, wide = (run_python(code, FASTRNN_WIDEN_BYTES=size) for size in ("32", "64"))
    assert narrow == wide


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_several_threads_match_one_thread(isa: str, threads: int, bidirectional: bool) -> None:
    module = build("lstm", 5, 150, weight_dtype=HALF, bidirectional=bidirectional)
    x = torch.randn(STEPS, 1, 5)
    alone = outputs(module, x)
    torch.set_num_threads(threads)
    assert (
        _C.plan("lstm", STEPS, 1, 5, 150, threads=threads, weight_format="float16")["threads"] > 1
    )
    together = outputs(module, x)
    twin = with_rounded_weights(module)
    assert_agrees(together, alone, exact_call(twin, x, call=outputs))


def test_packed_sequence_matches_padded_input(isa: str) -> None:
    module = build("gru", 5, HIDDEN, weight_dtype=HALF)
    x = torch.randn(STEPS, 1, 5)
    packed = nn.utils.rnn.pack_padded_sequence(x, [STEPS])
    with torch.no_grad():
        y, h_n = module(packed)
    padded = outputs(module, x)
    assert torch.equal(y.data, padded["y"].squeeze(1))
    assert torch.equal(h_n, padded["h_n"])


# --- accuracy ------------------------------------------------------------------------------------


def test_rounding_error_of_a_step_is_bounded(isa: str) -> None:
    for hidden in (HIDDEN, 300):
        module = build("rnn_tanh", 5, hidden, weight_dtype=HALF)
        x, h0 = torch.randn(STEPS, 1, 5), torch.randn(1, 1, hidden)
        half = outputs(module, x, h0)["y"][0, 0]
        module.weight_dtype = None
        full = outputs(module, x, h0)["y"][0, 0]
        terms = (module.weight_hh_l0 * h0[0, 0]).abs().sum(1)
        bound = 2**-11 * terms + 2**-25 * h0.abs().sum() + 1e-6
        assert ((half - full).abs() <= bound).all()


@pytest.mark.parametrize("steps", [24, 300])
@pytest.mark.parametrize("cell", CELLS)
def test_error_is_below_the_documented_bound(isa: str, cell: str, steps: int) -> None:
    for hidden in (HIDDEN, 256):
        module = build(cell, hidden, hidden, weight_dtype=HALF)
        x = torch.randn(steps, 1, hidden)
        half = outputs(module, x)["y"]
        module.weight_dtype = None
        full = outputs(module, x)["y"]
        error = (half - full).abs().max() / full.abs().max()
        assert 0 < error < 2**-10


def test_weights_beyond_float16_saturate(isa: str) -> None:
    module = build("rnn_relu", 1, HIDDEN, weight_dtype=HALF, bias=False)
    x = torch.zeros(STEPS, 1, 1)
    h0 = torch.zeros(1, 1, HIDDEN)
    h0[0, 0, 0] = 1
    values = [65504.0, 65519.0, 65520.0, 1e6, 3e38, 2049.0, 6e-8, 2e-8]
    expected = [65504.0, 65504.0, 65504.0, 65504.0, 65504.0, 2048.0, 2**-24, 0.0]
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l0[: len(values), 0] = torch.tensor(values)
        module.weight_ih_l0.zero_()
    assert outputs(module, x, h0)["y"][0, 0, : len(values)].tolist() == expected
    with torch.no_grad():
        module.weight_hh_l0.neg_()
    assert outputs(module, x, -h0)["y"][0, 0, : len(values)].tolist() == expected


def test_infinite_and_nan_weights_propagate(isa: str) -> None:
    for value in (float("inf"), float("nan")):
        module = build("rnn_relu", 1, HIDDEN, weight_dtype=HALF)
        with torch.no_grad():
            module.weight_hh_l0[3, 0] = value
        y = outputs(module, torch.zeros(STEPS, 1, 1), torch.ones(1, 1, HIDDEN))["y"]
        assert not y[0, 0, 3].isfinite()


# --- calls that use float16 weights --------------------------------------------------------------


def planned(*arguments: Any, **options: Any) -> bool:
    plan = _C.plan(*arguments, **{"weight_format": "float16", **options})
    return plan["recurrent_format"] == "float16"


def test_plan_uses_float16_weights_for_long_single_sequences(isa: str) -> None:
    assert planned("lstm", 100, 1, 256, 256)
    assert planned("lstm", 100, 1, 256, 256, threads=2, directions=2)
    assert not planned("lstm", 100, 1, 256, 256, weight_format="native")
    assert not planned("lstm", 100, 2, 256, 256)
    assert planned("lstm", 24, 1, 256, 256)
    assert not planned("lstm", 23, 1, 256, 256)
    assert not planned("lstm", 100, 1, 256, 256, training=True)
    for dtype in ("float64", "float16", "bfloat16"):
        assert not planned("lstm", 100, 1, 256, 256, dtype=dtype)
    assert planned("rnn_tanh", 100, 1, 256, 128)
    assert not planned("rnn_tanh", 100, 1, 256, 127)
    assert planned("lstm", 100, 1, 256, 64)
    assert not planned("lstm", 100, 1, 256, 64, proj_size=63)


def test_baseline_uses_float32_weights() -> None:
    _C.set_isa("baseline")
    try:
        assert not planned("lstm", 100, 1, 256, 256)
        module = build("lstm", 5, HIDDEN, weight_dtype=HALF)
        x = torch.randn(STEPS, 1, 5)
        half = outputs(module, x)
        module.weight_dtype = None
        assert same(half, outputs(module, x))
    finally:
        _C.set_isa(None)


@pytest.mark.parametrize(
    ("steps", "batch", "dtype"),
    [
        (STEPS, 2, torch.float32),
        (5, 1, torch.float32),
        (STEPS, 1, torch.float64),
        (STEPS, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_other_calls_ignore_weight_dtype(steps: int, batch: int, dtype: torch.dtype) -> None:
    module = build("gru", 5, HIDDEN, weight_dtype=HALF, dtype=dtype)
    x = torch.randn(steps, batch, 5, dtype=dtype)
    half = outputs(module, x)
    module.weight_dtype = None
    assert same(half, outputs(module, x))


def test_training_ignores_weight_dtype() -> None:
    module = build("lstm", 5, HIDDEN, weight_dtype=HALF)
    twin = copy.deepcopy(module)
    twin.weight_dtype = None
    x = torch.randn(STEPS, 1, 5)
    for one in (module, twin):
        one(x)[0].square().sum().backward()
    assert torch.equal(module(x)[0], twin(x)[0])
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad)


@needs_widening
def test_calls_without_gradients_use_float16_weights() -> None:
    module = build("gru", 5, HIDDEN, weight_dtype=HALF)
    x = torch.randn(STEPS, 1, 5)
    half = outputs(module, x)["y"]
    assert not torch.equal(module(x)[0], half)
    assert torch.equal(module.requires_grad_(False)(x)[0], half)
    x.requires_grad_()
    assert not torch.equal(module(x)[0], half)


# --- the argument weight_dtype -------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_copies_keep_weight_dtype(cell: str) -> None:
    module = build(cell, 5, HIDDEN, weight_dtype=HALF)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert other.weight_dtype is HALF
    assert fastrnn.convert(nn.Sequential(module))[0].weight_dtype is HALF
    assert (
        module.extra_repr() == build(cell, 5, HIDDEN).extra_repr() + ", weight_dtype=torch.float16"
    )


def test_modules_without_weight_dtype_have_the_attributes_of_torch() -> None:
    module = build("lstm", 5, 7)
    assert module.weight_dtype is None
    assert vars(module).keys() == vars(nn.LSTM(5, 7)).keys()
    module.weight_dtype = HALF
    module.weight_dtype = None
    assert vars(module).keys() == vars(nn.LSTM(5, 7)).keys()
    converted = fastrnn.convert(nn.LSTM(5, 7))
    converted.weight_dtype = HALF
    assert converted.extra_repr() == "5, 7, weight_dtype=torch.float16"


def test_patched_classes_accept_weight_dtype() -> None:
    with fastrnn.patch():
        module = nn.LSTM(5, 7, weight_dtype=HALF)
    assert module.weight_dtype is HALF


@pytest.mark.parametrize("wrong", [torch.bfloat16, torch.int8, torch.float32, "float16", 16])
def test_other_weight_dtypes_are_rejected(wrong: Any) -> None:
    message = f"weight_dtype must be None or torch.float16, got {wrong!r}"
    for name in ("RNN", "LSTM", "GRU"):
        with pytest.raises(ValueError, match=f"^{message}$"):
            getattr(fastrnn, name)(3, 4, weight_dtype=wrong)
    module = fastrnn.GRU(3, 4)
    with pytest.raises(ValueError, match=f"^{message}$"):
        module.weight_dtype = wrong
    with pytest.raises(ValueError, match=f"^{message}$"):
        call(module, torch.randn(5, 1, 3), weight_dtype=wrong)


def test_weight_dtype_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        fastrnn.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, HALF)


def call(module: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Returns the output of `functional.lstm` or `functional.gru` for a module of one layer."""
    h0 = torch.zeros(1, 1, module.hidden_size)
    is_lstm = isinstance(module, fastrnn.LSTM)
    function = functional.lstm if is_lstm else functional.gru
    hx = (h0, h0) if is_lstm else h0
    with torch.no_grad():
        return function(
            x, hx, list(module.parameters()), True, 1, 0.0, False, False, False, **options
        )[0]


def test_functions_accept_weight_dtype(isa: str) -> None:
    for cell in ("gru", "lstm"):
        module = build(cell, 5, HIDDEN, weight_dtype=HALF)
        x = torch.randn(STEPS, 1, 5)
        half = outputs(module, x)["y"]
        assert torch.equal(call(module, x, weight_dtype=HALF), half)
        assert not torch.equal(call(module, x), half)


def test_operator_with_float16_weights_passes_opcheck() -> None:
    number = _C.weight_formats().index("float16")
    spec = specs.CELLS["gru"]
    module = build("gru", 5, HIDDEN)
    weights = [w.detach() for w in module.parameters()]
    x, h0 = torch.randn(STEPS, 1, 5), torch.randn(1, 1, HIDDEN)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    arguments = (x, h0, None, weights, 15, None, spec.name, spec.inference_outputs)
    operator = torch.ops.fastrnn.recurrent_forward.default
    torch.library.opcheck(operator, (*arguments, number), test_utils=checks)
    y, _, _ = by_kernels(x, h0, None, weights, None, spec, weight_format=number)
    assert torch.equal(y, operator(*arguments, weight_format=number)[0])


def test_unknown_weight_formats_are_rejected() -> None:
    names = _C.weight_formats()
    x, h0 = torch.randn(STEPS, 1, 5), torch.randn(1, 1, HIDDEN)
    weights = [w.detach() for w in build("gru", 5, HIDDEN).parameters()]
    for number in (-1, len(names)):
        with pytest.raises(RuntimeError, match=f"weight_format must be .*, got {number}"):
            torch.ops.fastrnn.recurrent_forward(
                x, h0, None, weights, 15, None, "gru", 0, weight_format=number
            )
    with pytest.raises(ValueError, match=f"must be one of {', '.join(names)}, got 'int8'"):
        _C.plan("gru", STEPS, 1, 5, HIDDEN, weight_format="int8")


@needs_widening
def test_compiled_module_uses_float16_weights() -> None:
    module = build("gru", 5, HIDDEN, weight_dtype=HALF)
    x = torch.randn(STEPS, 1, 5)
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0]
    assert torch.equal(compiled, outputs(module, x)["y"])
