"""Every module in every dtype and shape: outputs and gradients against torch.nn and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import (
    CELLS,
    DTYPES,
    TORCH_CELLS,
    build,
    check,
    make_step,
    pack,
    random,
    run,
    torch_twin,
)
from tolerance import assert_same_in_double
from torch import Tensor, nn

import fastrnn

# steps, batch, input size and hidden size
SHAPES = [
    (1, 1, 1, 1),
    (1, 4, 3, 5),
    (5, 1, 3, 8),
    (7, 3, 5, 17),
    (3, 2, 4, 1),
    (11, 5, 13, 7),
    (4, 0, 3, 5),
    (2, 9, 31, 33),
    (120, 2, 3, 4),
]

OPTIONS: list[dict[str, Any]] = [
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"batch_first": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False, "bidirectional": True},
]

PROJECTIONS: list[dict[str, Any]] = [
    {"proj_size": 3},
    {"proj_size": 1, "bias": False},
    {"proj_size": 4, "num_layers": 2, "bidirectional": True, "batch_first": True},
]


def make_input(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 5
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random(generator, *shape, dtype=dtype).to(device).requires_grad_()


def make_states(
    module: nn.Module, batch: int | None, dtype: torch.dtype, device: str = "cpu"
) -> Any:
    """Returns random initial states of this module, without a batch dimension if batch is None."""
    generator = torch.Generator().manual_seed(6)
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size]
    if isinstance(module, fastrnn.LSTM):
        sizes.append(module.hidden_size)
    shape = (count,) if batch is None else (count, batch)
    states = [
        random(generator, *shape, size, dtype=dtype).to(device).requires_grad_() for size in sizes
    ]
    return tuple(states) if len(states) == 2 else states[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_shape_and_dtype_matches_torch(
    cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    steps, batch, input_size, hidden_size = shape
    module = build(cell, input_size, hidden_size, dtype=dtype, device=device)
    x = make_input((steps, batch, input_size), dtype, device)
    check(module, x)
    check(module, x, make_states(module, batch, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_constructor_options_match_torch(
    cell: str, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    check_every_form(build(cell, 5, 6, dtype=dtype, device=device, **options), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", PROJECTIONS, ids=str)
def test_projection_matches_torch(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    check_every_form(build("lstm", 5, 6, dtype=dtype, device=device, **options), dtype, device)


def check_every_form(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Checks padded, unbatched and packed input, with and without initial states."""
    shape = (3, 7, 5) if module.batch_first else (7, 3, 5)
    check(module, make_input(shape, dtype, device))
    check(module, make_input(shape, dtype, device), make_states(module, 3, dtype, device))
    check(module, make_input((7, 5), dtype, device))
    check(module, make_input((7, 5), dtype, device), make_states(module, None, dtype, device))
    for lengths, is_sorted in (([6, 4, 4, 1], True), ([2, 5, 1, 3], False), ([3, 3], True)):
        rows = make_input((sum(lengths), 5), dtype, device).detach()
        packed = pack(rows, lengths, is_sorted)
        packed.data.requires_grad_()
        check(module, packed)
        check(module, packed, make_states(module, len(lengths), dtype, device))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_more_rows_than_gate_rows_match_torch(cell: str, bidirectional: bool, device: str) -> None:
    """With more rows than gate rows, the gradient of w_hh is computed by another method."""
    module = build(cell, 2, 2, bidirectional=bidirectional, device=device)
    check(
        module,
        make_input((13, 3, 2), torch.float32, device),
        make_states(module, 3, torch.float32, device),
    )


@pytest.mark.parametrize("cell", CELLS)
def test_strided_inputs_match_their_copies(cell: str, device: str) -> None:
    """Covers views that are not contiguous, including expanded ones."""
    module = build(cell, 4, 6, device=device)
    base = make_input((3, 9, 8), torch.float32, device).detach()
    for view in (
        base.transpose(0, 1)[..., :4],
        base.transpose(0, 1)[::2, :, 1:5],
        base[..., ::2],
        base[:, :1, :4].expand(3, 5, 4),
        base[:1, :, :4].expand(6, 9, 4),
        base[..., :1].expand(3, 9, 4),
        base.permute(1, 2, 0)[:, :, :1].expand(9, 8, 4),
    ):
        check(module, view.detach().requires_grad_())


@pytest.mark.parametrize("cell", CELLS)
def test_strided_states_and_weights_match_their_copies(cell: str, device: str) -> None:
    module = build(cell, 4, 6, num_layers=2, device=device)
    x = make_input((3, 5, 4), torch.float32, device)
    dense = make_states(module, 5, torch.float32, device)
    with torch.no_grad():
        for parameter in module.parameters():
            wide = parameter.new_full((*parameter.shape[:-1], 2 * parameter.shape[-1]), 3.0)
            wide[..., ::2] = parameter
            parameter.set_(wide[..., ::2])
    strided = tuple(
        state.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
        for state in (dense if isinstance(dense, tuple) else (dense,))
    )
    assert module.weight_hh_l1.stride(-1) == 2
    check(module, x, strided if len(strided) == 2 else strided[0])


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
def test_dropout_matches_torch_for_the_same_seed(cell: str, options: dict[str, Any]) -> None:
    """The same outputs as in torch.nn are zeroed, and ``dropout`` is read at each call."""
    module = build(cell, 3, 8, num_layers=3, dropout=0.5, dtype=torch.float64, **options)
    x = make_input((5, 4, 3), torch.float64)
    with_dropout = check(module, x, seed=11)
    assert not torch.equal(with_dropout["out0"], run(module, x, seed=12)["out0"])
    assert torch.equal(with_dropout["out0"], run(module, x, seed=11)["out0"])
    module.dropout = 1.0
    check(module, x)
    module.dropout = 0.0
    without = check(module, x)
    module.dropout = 0.5
    module.eval()
    assert torch.equal(without["out0"], check(module, x)["out0"])


def test_dropout_acts_on_a_sigmoid_rnn() -> None:
    module = build("rnn_sigmoid", 3, 4, num_layers=2, dropout=0.9, dtype=torch.float64)
    x = make_input((5, 4, 3), torch.float64)
    check(module, x, seed=11)
    assert not torch.equal(run(module, x, seed=11)["out0"], run(module, x, seed=12)["out0"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_match_torch(cell: str, bias: bool, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(3)
    module = make_step(cell, 5, 7, bias=bias, dtype=dtype, device=device)
    for shape in ((3, 5), (1, 5), (0, 5), (5,)):
        x = make_input(shape, dtype, device)
        check(module, x)
        states = [make_input((*shape[:-1], 7), dtype, device, seed) for seed in (1, 2)]
        check(module, x, tuple(states) if cell == "lstm" else states[0])
    if cell == "lstm":
        check(module, x, list(states))


@pytest.mark.parametrize("cell", CELLS)
def test_loop_of_cells_matches_the_layer(cell: str) -> None:
    layer = build(cell, 3, 4, dtype=torch.float64)
    step = make_step(cell, 3, 4, dtype=torch.float64)
    step.load_state_dict(
        {key.removesuffix("_l0"): value for key, value in layer.state_dict().items()}
    )
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    state = None
    outputs = []
    for x_t in x:
        state = step(x_t, state)
        outputs.append(state[0] if cell == "lstm" else state)
    assert_same_in_double(torch.stack(outputs), layer(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_long_sequence_has_gradients_and_a_final_state(cell: str, device: str) -> None:
    """Runs forward and backward over 2000 steps."""
    module = build(cell, 2, 3, device=device)
    check(module, make_input((2000, 1, 2), torch.float32, device))


@pytest.mark.parametrize("cell", CELLS)
def test_no_grad_and_inference_mode_give_the_same_results(cell: str) -> None:
    module = build(cell, 3, 4, num_layers=2, bidirectional=True)
    x = make_input((5, 2, 3), torch.float32)
    expected = module(x)[0]
    with torch.no_grad():
        quiet = module(x)[0]
    with torch.inference_mode():
        inference = module(x)[0]
    assert expected.requires_grad
    assert not quiet.requires_grad
    assert inference.is_inference()
    assert torch.equal(expected, quiet)
    assert torch.equal(expected, inference)


@pytest.mark.parametrize("cell", CELLS)
def test_meta_tensors_have_the_right_shapes(cell: str) -> None:
    for options in ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        real = build(cell, 3, 4, **options)
        expected = run(real, make_input((5, 2, 3), torch.float32))
        meta = build(cell, 3, 4, device="meta", **options)
        x = torch.empty(5, 2, 3, device="meta", requires_grad=True)
        got = run(meta, x)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            assert value.device.type == "meta"
            assert value.shape == expected[name].shape
            assert value.stride() == expected[name].stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_half_types_accumulate_in_float(cell: str, dtype: torch.dtype) -> None:
    """Over many steps the error stays at one rounding of the output and does not grow."""
    module = build(cell, 4, 64, dtype=dtype)
    x = make_input((50, 2, 4), dtype).detach()
    truth = build(cell, 4, 64, dtype=torch.float64)
    truth.load_state_dict(module.state_dict())
    output = module(x)[0].double()
    expected = truth(x.double())[0]
    worst = (output - expected).abs().max() / expected.abs().max()
    assert worst < 4 * torch.finfo(dtype).eps


def test_both_forms_of_every_function_match_torch() -> None:
    """Compares with torch._VF, with keyword and with positional arguments."""
    functions = fastrnn.functional
    for cell in CELLS:
        module = build(cell, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
        weights = module._flat_weights
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        packed = pack(torch.randn(6, 3, dtype=torch.float64), [4, 2], True)
        hx = make_states(module, 2, torch.float64)
        options = (True, 2, 0.0, True, True)
        padded_result = getattr(functions, cell)(x, hx, weights, *options, False)
        packed_result = getattr(functions, cell)(
            packed.data, packed.batch_sizes, hx, weights, *options
        )
        for result, argument in ((padded_result, x), (packed_result, packed)):
            output, hidden = module(argument, hx)
            expected = (getattr(output, "data", output), *_as_tuple(hidden))
            assert len(result) == len(expected)
            for got, value in zip(result, expected, strict=True):
                assert torch.equal(got, value)
        by_name = getattr(functions, cell)(
            input=x,
            hx=hx,
            params=weights,
            has_biases=True,
            num_layers=2,
            dropout=0.0,
            train=False,
            bidirectional=True,
            batch_first=False,
        )
        assert torch.equal(by_name[0], padded_result[0])
        if cell in TORCH_CELLS:
            theirs = getattr(torch._VF, cell)(x, hx, weights, *options, False)
            for got, value in zip(padded_result, theirs, strict=True):
                assert_same_in_double(got, value)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _lstm(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "input": torch.zeros(5, 2, 3),
        "hx": (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)),
        "params": [torch.zeros(s) for s in ((16, 3), (16, 4), 16, 16)],
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
        "batch_first": False,
        **changes,
    }
    return fastrnn.functional.lstm(**{k: v for k, v in values.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(5, 3)}, "input must have 3 dimensions, got 2"),
        ({"input": torch.zeros(0, 2, 3)}, "Expected sequence length to be larger than 0"),
        ({"input": torch.zeros(5, 2, 7)}, r"Expected params\[0\] of size \(16, 7\), got \[16, 3\]"),
        ({"hx": (torch.zeros(1, 2, 4),)}, "lstm expects two hidden states"),
        (
            {"hx": (torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))},
            r"hidden state must be of size \(1, 2, \*\), got \[1, 3, 4\]",
        ),
        (
            {"hx": (torch.zeros(1, 2, 4), torch.zeros(2, 2, 4))},
            r"cell state must be of size \(1, 2, \*\), got \[2, 2, 4\]",
        ),
        ({"params": [torch.zeros(16, 3)]}, "Expected 4 parameter tensors, got 1"),
        ({"has_biases": False}, "Expected 2 parameter tensors, got 4"),
        ({"input": torch.zeros(5, 2, 3).double()}, "not the same dtype"),
        (
            {"hx": (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double())},
            "Input and hidden tensors are not the same dtype",
        ),
        ({"input": torch.zeros(5, 2, 3, device="meta")}, "not at the same device"),
    ],
    ids=str,
)
def test_functional_names_the_wrong_shape(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _lstm(**changes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (torch.tensor([2, 3]), "descend and add up"),
        (torch.tensor([3, 1]), "descend and add up"),
        (torch.tensor([5, 0]), "must be positive"),
        (torch.tensor([], dtype=torch.int64), "larger than 0"),
        (torch.tensor([3, 2], dtype=torch.int32), "int64 vector on the CPU, got 1-D torch.int32"),
        (torch.tensor([[3, 2]]), "int64 vector on the CPU, got 2-D"),
    ],
    ids=str,
)
def test_functional_checks_batch_sizes(sizes: Tensor, message: str) -> None:
    changes = {"input": None, "batch_first": None, "data": torch.zeros(5, 3), "batch_sizes": sizes}
    with pytest.raises(RuntimeError, match=message):
        _lstm(**changes)


def test_functional_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match="is missing the arguments num_layers"):
        _lstm(num_layers=None)
    with pytest.raises(TypeError, match="unexpected argument 'speed'"):
        _lstm(speed=1)
    with pytest.raises(TypeError, match="takes 9 arguments but 10 were given"):
        fastrnn.functional.gru(*[None] * 10)
    with pytest.raises(TypeError, match="several values for argument 'input'"):
        fastrnn.functional.gru(torch.zeros(1, 1, 1), input=torch.zeros(1, 1, 1))


def test_complex_runs_through_a_composite() -> None:
    for cell in ("rnn_tanh", "rnn_sigmoid", "gru", "lstm"):
        module = build(cell, 3, 4, num_layers=2, bidirectional=True, dtype=torch.complex64)
        x = torch.randn(5, 2, 3, dtype=torch.complex64)
        output, _ = module(x)
        assert output.dtype == torch.complex64
        output.abs().sum().backward()
        assert module.weight_hh_l0.grad.dtype == torch.complex64
        if cell in TORCH_CELLS:
            assert torch.equal(output, torch_twin(module)(x)[0])


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_single_missing_bias_counts_as_zeros(cell: str, missing: str) -> None:
    """torch's cells accept a single bias that is None as well."""
    x = torch.randn(5, 2, 3)
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        module, expected = (build(cell, 3, 4, **options) for _ in range(2))
        setattr(module, f"{missing}_l0", None)
        with torch.no_grad():
            getattr(expected, f"{missing}_l0").zero_()
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                assert torch.equal(module(x)[0], expected(x)[0])
    step, twin = make_step(cell, 3, 4), make_step(cell, 3, 4)
    twin.load_state_dict(step.state_dict())
    setattr(step, missing, None)
    with torch.no_grad():
        getattr(twin, missing).zero_()
    h, expected_h = step(x[0]), twin(x[0])
    assert torch.equal(*((h, expected_h) if isinstance(h, Tensor) else (h[0], expected_h[0])))
    if cell in TORCH_CELLS:
        torch.testing.assert_close(torch_twin(step)(x[0]), h)


@pytest.mark.parametrize("cell", CELLS)
def test_biases_that_are_all_none_count_as_zeros(cell: str) -> None:
    module, expected = build(cell, 3, 4), build(cell, 3, 4, bias=False)
    module.bias_ih_l0 = module.bias_hh_l0 = None
    expected.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(module(x)[0], expected(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_error_names_a_weight_that_is_none(cell: str) -> None:
    module, step = build(cell, 3, 4), make_step(cell, 3, 4)
    module.weight_hh_l0 = None
    step.weight_hh = None
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must be a tensor, got None\."):
        module(torch.randn(5, 2, 3))
    with pytest.raises(RuntimeError, match=r"weight_hh must be a tensor, got None\."):
        step(torch.randn(2, 3))
