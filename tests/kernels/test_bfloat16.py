"""Layers in bfloat16 as they are stored: the CPU's kernels with pairs of weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import (
    CELLS,
    build,
    check,
    exact_call,
    is_in_torch,
    pack,
    random,
    run_python,
    torch_twin,
)
from tolerance import assert_agrees
from torch import Tensor, nn

import fastrnn
from fastrnn import _C

BF16 = torch.bfloat16


def _kernels() -> list[tuple[str, str]]:
    """Returns the bfloat16 kernels that this machine can run, with their instruction sets."""
    found = []
    for isa in _C.available_isas():
        _C.set_isa(isa)
        found += [(isa, name) for name in _C._testing.available_bfloat16_kernels()]
    _C.set_isa(None)
    return found


KERNELS = _kernels()
pytestmark = pytest.mark.skipif(not KERNELS, reason="the CPU has neither AVX2 nor AVX-512")


@pytest.fixture(params=KERNELS, ids=[name for _, name in KERNELS])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the kernels for all shapes; the rule would use some for small batches only."""
    isa, name = request.param
    _C.set_isa(isa)
    _C._testing.set_bfloat16_kernels(name)
    yield name
    _C._testing.set_bfloat16_kernels(None)
    _C.set_isa(None)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def outputs(module: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Returns the results of a module by name, computed without gradients."""
    with torch.no_grad():
        y, hidden = module(*inputs)
    states = (hidden,) if isinstance(hidden, Tensor) else hidden
    y = y if isinstance(y, Tensor) else y.data
    return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}


def states(module: nn.Module, batch: int) -> Any:
    """Returns random initial states for a module."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    generator = torch.Generator().manual_seed(5)
    size = module.proj_size or module.hidden_size
    h0 = random(generator, count, batch, size, dtype=BF16)
    if not isinstance(module, fastrnn.LSTM):
        return h0
    return h0, random(generator, count, batch, module.hidden_size, dtype=BF16)


# --- results -------------------------------------------------------------------------------------

# T, B, I, H: odd and even sizes, less and more than a vector, pieces of K, one row up to many
SIZES = [
    (1, 1, 1, 1),
    (7, 1, 5, 37),
    (9, 2, 8, 64),
    (5, 3, 33, 17),
    (6, 4, 16, 50),
    (4, 5, 3, 100),
    (3, 16, 21, 31),
    (3, 17, 40, 48),
    (2, 64, 7, 33),
    (2, 39, 65, 80),
    (3, 2, 300, 261),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_and_gradients_agree(
    kernels: str, threads: int, cell: str, sizes: tuple[int, ...]
) -> None:
    steps, batch, inputs, hidden = sizes
    module = build(cell, inputs, hidden, dtype=BF16)
    x = torch.randn(steps, batch, inputs, dtype=BF16, requires_grad=True)
    check(module, x, states(module, batch))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((cell, {"bidirectional": True, "num_layers": 2}) for cell in CELLS),
    *((cell, {"bias": False}) for cell in ("rnn_tanh", "gru", "lstm")),
    ("lstm", {"proj_size": 13, "bidirectional": True}),
]


@pytest.mark.parametrize("batch", [1, 3, 18])
@pytest.mark.parametrize(("cell", "options"), OPTIONS, ids=str)
def test_options_agree(
    kernels: str, threads: int, cell: str, options: dict[str, Any], batch: int
) -> None:
    module = build(cell, 9, 35, dtype=BF16, **options)
    x = torch.randn(6, batch, 9, dtype=BF16, requires_grad=True)
    check(module, x, states(module, batch))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_agree(kernels: str, cell: str, bidirectional: bool) -> None:
    module = build(cell, 9, 35, dtype=BF16, bidirectional=bidirectional)
    lengths = [3, 9, 1, 9, 2]
    x = pack(torch.randn(sum(lengths), 9, dtype=BF16), lengths, False)
    check(module, x, states(module, len(lengths)))


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_gradients_over_many_rows_and_columns_agree(kernels: str, threads: int, cell: str) -> None:
    """The products after backward add blocks of rows, of columns and of the depth."""
    module = build(cell, 270, 125, dtype=BF16)
    x = torch.randn(33, 17, 270, dtype=BF16, requires_grad=True)
    check(module, x, states(module, 17))


def test_nan_in_a_gradient_spreads(kernels: str) -> None:
    module = build("gru", 7, 35, dtype=BF16)
    x = torch.randn(6, 4, 7, dtype=BF16, requires_grad=True)
    d_y = torch.ones(6, 4, 35, dtype=BF16)
    d_y[3, 1, 2] = math.nan
    module(x)[0].backward(d_y)
    assert x.grad is not None
    assert x.grad[:4, 1].isnan().all()
    assert not x.grad[:, [0, 2, 3]].isnan().any()
    assert not x.grad[4:].isnan().any()
    for weight in module.parameters():
        assert weight.grad is not None
        assert weight.grad.isnan().any()


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_large_layers_agree(kernels: str, threads: int, cell: str) -> None:
    """Blocks are shared, rows are split, and the input is projected ahead."""
    for steps, batch, size in ((4, 40, 300), (4, 15, 520), (3, 2, 520)):
        module = build(cell, size, size, dtype=BF16)
        x = torch.randn(steps, batch, size, dtype=BF16)
        ours = outputs(module, x)
        exact = exact_call(module, x, call=outputs)
        assert_agrees(ours, outputs(torch_twin(module), x), exact)


def test_strided_input_and_weights_agree(kernels: str) -> None:
    module = build("lstm", 7, 35, dtype=BF16)
    x = torch.randn(5, 3, 15, dtype=BF16)[..., 1:8]
    assert x.stride(1) == 15
    expected = outputs(module, x.contiguous())
    with torch.no_grad():
        for name, weight in list(module.named_parameters()):
            if weight.dim() == 2:
                wide = torch.empty(weight.shape[0], weight.shape[1] + 3, dtype=BF16)
                wide[:, : weight.shape[1]] = weight
                setattr(module, name, nn.Parameter(wide[:, : weight.shape[1]]))
    found = outputs(module, x)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_threads_or_other_rows(kernels: str, cell: str) -> None:
    module = build(cell, 40, 150, dtype=BF16)
    x = torch.randn(20, 9, 40, dtype=BF16)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found.append(outputs(module, x))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


# --- extreme values ------------------------------------------------------------------------------


def same_kind(ours: Tensor, theirs: Tensor) -> bool:
    """Whether both are NaN, and infinite, at the same places."""
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_special_values_spread_as_in_torch(kernels: str, cell: str, value: float) -> None:
    """Odd sizes: the last pair of a row has one value, and nothing beyond it may take part."""
    for hidden in (35, 36):
        module = build(cell, 7, hidden, dtype=BF16)
        x = torch.randn(6, 4, 7, dtype=BF16)
        x[2, 1, 6] = value
        ours = outputs(module, x)
        others = [0, 2, 3]
        clean = outputs(module, x.nan_to_num(0, 0, 0))
        assert torch.equal(ours["y"][:, others], clean["y"][:, others])
        if is_in_torch(module) and math.isnan(value):
            assert same_kind(ours["y"], outputs(torch_twin(module), x)["y"])
        assert not ours["y"][:2].isnan().any()


def test_values_beyond_the_rows_are_not_read(kernels: str) -> None:
    x = torch.full((4, 3, 8), math.nan, dtype=BF16)
    x[..., :7] = torch.randn(4, 3, 7)
    module = build("gru", 7, 33, dtype=BF16)
    found = outputs(module, x[..., :7])
    expected = outputs(module, x[..., :7].contiguous())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not found["y"].isnan().any()


def test_denormal_numbers_and_large_values(kernels: str) -> None:
    for scale in (1e-39, 1e-30, 1e4):
        module = build("lstm", 7, 35, dtype=BF16)
        x = (torch.randn(6, 3, 7) * scale).to(BF16)
        ours = outputs(module, x)
        assert_agrees(ours, outputs(torch_twin(module), x), exact_call(module, x, call=outputs))


def test_outputs_are_rounded_to_the_nearest(kernels: str) -> None:
    """A ReLU without recurrence returns its pre-activation, here the bias, in bfloat16."""
    module = build("rnn_relu", 2, 64, dtype=BF16)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-15, 1.0])
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        first = ties.to(BF16)
        module.bias_ih_l0[:4] = first
        module.bias_hh_l0[:4] = (ties - first.float()).to(BF16)
        total = (module.bias_ih_l0.float() + module.bias_hh_l0.float())[:4]
        y = module(torch.zeros(1, 1, 2, dtype=BF16))[0]
    assert torch.equal(y[0, 0, :4], total.to(BF16))


@pytest.mark.parametrize(("steps", "batch", "size"), [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_empty_calls(kernels: str, steps: int, batch: int, size: int) -> None:
    spec = fastrnn.spec.CELLS["lstm"]
    weights = [torch.randn(20, size, dtype=BF16), torch.randn(20, 5, dtype=BF16)]
    x = torch.randn(steps, batch, size, dtype=BF16)
    h0, c0 = torch.randn(2, 1, batch, 5, dtype=BF16)
    y, h_n, c_n, _ = torch.ops.fastrnn.recurrent_forward(
        x, h0, c0, weights, 3, None, spec.name, spec.inference_outputs
    )
    assert (y.shape, h_n.shape, c_n.shape) == ((steps, batch, 5), h0.shape, c0.shape)
    if steps == 0:
        assert torch.equal(h_n, h0)
        assert torch.equal(c_n, c0)


# --- the choice ----------------------------------------------------------------------------------


def plan(batch: int, **options: Any) -> Any:
    return _C.plan("lstm", 20, batch, 64, 64, dtype="bfloat16", **options)


def test_rule_chooses_by_instruction_set_and_batch() -> None:
    for isa, names in itertools.groupby(KERNELS, lambda pair: pair[0]):
        _C.set_isa(isa)
        try:
            available = {name for _, name in names}
            has_dot = "avx512_bf16" in available
            owner = "avx512_bf16" if has_dot else isa
            most = 2 if isa == "avx2" else 4
            if has_dot and _C.cpu_vendor() == "amd":
                most = 64
            for batch in (1, 2, 3, 4, 5, 64):
                chosen = plan(batch)
                if "amx_bf16" in available and batch >= 8:
                    assert chosen["bfloat16"].startswith("amx_bf16: ")
                    continue
                is_stored = batch <= most
                assert chosen["recurrent_format"] == ("bfloat16" if is_stored else "native")
                assert chosen["bfloat16"].startswith(
                    f"{owner}: " if is_stored else "float32 copies: "
                )
        finally:
            _C.set_isa(None)


@pytest.mark.skipif("avx512" not in _C.available_isas(), reason="the emulation needs AVX-512")
def test_amx_is_chosen_for_batches() -> None:
    """Under the emulation, which stands for a CPU with AMX."""
    code = """
import torch, fastrnn
from fastrnn import _C
for batch, hidden in ((7, 64), (8, 63), (8, 64), (64, 512)):
    chosen = _C.plan("lstm", 20, batch, 64, hidden, dtype="bfloat16", threads=2)
    print(chosen["bfloat16"].startswith("amx_bf16"), chosen["row_groups"])
    print(chosen["recurrent_format"])
module = fastrnn.GRU(40, 70).bfloat16()
with torch.inference_mode():
    call = str(fastrnn.explain(module, torch.zeros(3, 9, 40).bfloat16()))
print("an instruction multiplies tiles of pairs" in call)
"""
    printed = run_python(code, FASTRNN_EMULATE_AMX="1").splitlines()
    assert printed[0].startswith("False")
    assert printed[2].startswith("False")
    assert printed[4:] == ["True 1", "bfloat16_tiles", "True 2", "bfloat16_tiles", "True"]


def test_one_sequence_of_a_small_layer_uses_float32_copies() -> None:
    def chosen(cell: str, steps: int, batch: int, hidden: int) -> str:
        sizes = (steps, batch, hidden, hidden)
        found: str = _C.plan(cell, *sizes, dtype="bfloat16")["recurrent_format"]
        return found

    assert chosen("gru", 24, 1, 73) == "native"
    for larger in (("gru", 23, 1, 73), ("gru", 24, 2, 73), ("gru", 24, 1, 74)):
        assert chosen(*larger) == "bfloat16"


def test_baseline_converts_to_float32() -> None:
    _C.set_isa("baseline")
    try:
        assert plan(1)["recurrent_format"] == "native"
        assert "float32 copies" in plan(1)["bfloat16"]
        module = build("gru", 5, 20, dtype=BF16)
        check(module, torch.randn(3, 2, 5, dtype=BF16))
    finally:
        _C.set_isa(None)


def test_backward_needs_an_instruction_for_the_product() -> None:
    for isa, names in itertools.groupby(KERNELS, lambda pair: pair[0]):
        _C.set_isa(isa)
        try:
            available = {name for _, name in names}
            is_stored = "amx_bf16" in available
            is_stored |= "avx512_bf16" in available and _C.cpu_vendor() == "amd"
            for batch, stored in ((64, is_stored), (1, False)):
                chosen = plan(batch, training=True)
                assert (chosen["recurrent_format"] != "native") == stored
                assert chosen["bfloat16"].startswith("float32 copies: ") != stored
        finally:
            _C.set_isa(None)


def test_autocast_keeps_a_bfloat16_module_as_it_is(kernels: str) -> None:
    """Its results have the bits of a call without autocast, which float32 copies have not."""
    module = build("lstm", 40, 64, dtype=BF16)
    found = []
    for enabled in (False, True):
        x = torch.randn(
            20, 9, 40, dtype=BF16, requires_grad=True, generator=torch.Generator().manual_seed(3)
        )
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = module(x)[0]
        y.float().square().sum().backward()
        found.append([y, x.grad, *(weight.grad for weight in module.parameters())])
    for plain, cast in zip(*found, strict=True):
        assert plain.dtype == BF16
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("rnn_relu", {}),
        ("gru", {"bidirectional": True}),
        ("lstm", {"num_layers": 2, "batch_first": True}),
        ("lstm", {"proj_size": 12}),
    ],
    ids=str,
)
def test_autocast_computes_in_bfloat16(
    kernels: str, cell: str, options: dict[str, Any], mixed: bool
) -> None:
    """The results are those of a bfloat16 module, the gradients those of float32 tensors."""
    module = build(cell, 40, 33, **options)
    twin = copy.deepcopy(module).to(BF16)
    start = torch.randn(20, 9, 40, generator=torch.Generator().manual_seed(3)).to(BF16)
    found = []
    for layer, x in ((module, start if mixed else start.float()), (twin, start)):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=layer is module):
            y, states = layer(x)
        results = [y, *(states if isinstance(states, tuple) else [states])]
        sum(t.float().square().sum() for t in results).backward()
        found.append([*results, x.grad, *(weight.grad for weight in layer.parameters())])
    assert all(weight.grad.dtype == torch.float32 for weight in module.parameters())
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got.float(), expected.float())


def test_autocast_casts_where_copies_pay() -> None:
    for isa, name in KERNELS:
        _C.set_isa(isa)
        try:
            min_rows, batches = _C.bfloat16_copies("lstm", 256)
            small = _C.bfloat16_copies("gru", 64)[1]
            reason = _C.plan("lstm", 64, 4, 64, 256, dtype="bfloat16")["bfloat16"]
        finally:
            _C.set_isa(None)
        assert min_rows == 64
        if "multiplies" in reason:
            assert batches[0] == 1
            assert small[0] == 2  # one sequence of a small layer does not wait for weights
        else:
            assert batches == (), name  # the weights would be copied, then widened
    _C.set_isa("baseline")
    try:
        assert _C.bfloat16_copies("lstm", 256)[1] == ()
    finally:
        _C.set_isa(None)
    with pytest.raises(ValueError, match="proj_size must be 0 for gru"):
        _C.bfloat16_copies("gru", 4, 2)


def test_few_rows_under_autocast_compute_in_float32() -> None:
    module = build("lstm", 8, 16)
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        exact = module(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x)[0], exact.to(BF16))


def test_float16_weights_under_autocast_keep_float32(kernels: str) -> None:
    layer = fastrnn.GRU(40, 33, weight_dtype=torch.float16)
    x = torch.randn(20, 9, 40)
    expected = outputs(layer, x)["y"].to(BF16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0].to(BF16), expected)


def test_compiled_code_under_autocast_computes_in_bfloat16(kernels: str) -> None:
    layer = fastrnn.GRU(40, 33)
    twin = copy.deepcopy(layer).to(BF16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(20, 9, 40)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)[0]
        assert torch.equal(y, twin(x.to(BF16))[0].float())


def test_exported_program_under_autocast_computes_in_bfloat16(kernels: str) -> None:
    layer = fastrnn.GRU(40, 33)
    x = torch.randn(20, 9, 40)
    program = torch.export.export(layer, (x,)).module()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(program(x)[0], layer(x)[0])


def test_explain_names_the_format(kernels: str) -> None:
    module = build("gru", 5, 20, dtype=BF16)
    with torch.no_grad():
        text = str(fastrnn.explain(module, torch.randn(3, 2, 5, dtype=BF16)))
    assert "recurrent_format=bfloat16" in text
    assert f"bfloat16={kernels}: " in text


def test_float32_copies_can_be_forced() -> None:
    module = build("gru", 40, 64, dtype=BF16)
    x = torch.randn(30, 2, 40, dtype=BF16)
    stored = outputs(module, x)
    _C._testing.set_bfloat16_kernels("float32")
    try:
        assert plan(2)["recurrent_format"] == "native"
        copied = outputs(module, x)
        wide = outputs(copy.deepcopy(module).float(), x.float())
    finally:
        _C._testing.set_bfloat16_kernels(None)
    for name, value in wide.items():
        assert torch.equal(copied[name], value.to(BF16))
    assert not torch.equal(stored["y"], copied["y"])  # h is rounded between steps


def test_unknown_kernels_are_rejected() -> None:
    with pytest.raises(ValueError, match="name must be float32 or one of"):
        _C._testing.set_bfloat16_kernels("avx1024")
    with pytest.raises(ValueError, match="weight_format must be one of native, float16, got"):
        _C.plan("gru", 5, 1, 5, 5, weight_format="bfloat16")
