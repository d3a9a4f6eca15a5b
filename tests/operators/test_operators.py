"""Wrong calls of the operators and of `fastrnn._C` raise one sentence and never crash."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PACKED, run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn import _C, functional
from fastrnn.spec import BUILT_IN, CELLS, slots_of

T, B, I, H = 3, 2, 4, 5  # noqa: E741 - the sizes' names
FLOATS = [torch.float32, torch.float64, torch.bfloat16]


def arguments(
    cell: str = "lstm",
    steps: int = T,
    batch: int = B,
    inputs: int = I,
    hidden: int = H,
    proj: int | None = None,
    directions: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Returns random arguments of `recurrent_layer`; proj 0 is a projection to size 0."""
    gates = CELLS[cell].gates * hidden
    size = hidden if proj is None else proj
    shapes: list[tuple[int, ...]] = [(gates, inputs), (gates, size)]
    shapes += [(gates,)] * 2 if bias else []
    shapes += [] if proj is None else [(proj, hidden)]
    new: dict[str, Any] = {"dtype": dtype, "device": device}
    has_c0, cells = CELLS[cell].has_cell_state, CELLS[cell].cell_states * hidden
    return {
        "x": torch.randn(steps, batch, inputs, **new),
        "h0": torch.randn(directions, batch, size, **new),
        "c0": torch.randn(directions, batch, cells, **new) if has_c0 else None,
        "weights": [torch.randn(shape, **new) for _ in range(directions) for shape in shapes],
        "slots": slots_of(bias, proj is not None),
        "sequence": None,
        "cell": cell,
    }


def packed(batch_sizes: Tensor) -> dict[str, Any]:
    """The arguments for packed rows of a layer with biases."""
    return {"slots": 0b1111 | PACKED, "sequence": [batch_sizes]}


def forward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = torch.ops.fastrnn.recurrent_forward(**given, outputs=-1)
    return outputs


def gradients(given: dict[str, Any], **changed: Any) -> tuple[Tensor, ...]:
    """Computes all gradients by the CPU operator, after changing some of its arguments."""
    y, h_n, c_n, saved = forward(given)
    c_n = None if given["c0"] is None else c_n
    directions = given["h0"].shape[0]
    operators = torch.ops.fastrnn
    call = operators.recurrent_gradients
    if directions == 2:
        call = operators.recurrent_bidirectional_gradients
    own = {"d_y": y, "d_h_n": h_n, "d_c_n": c_n, "y": y, "saved": saved, "outputs": -1}
    results: tuple[Tensor, ...] = call(**{**given, **own, **changed})
    return results


# --- sizes of zero -------------------------------------------------------------------------------

ZEROS = [sizes for sizes in itertools.product((0, T), (0, B), (0, I), (0, H)) if 0 in sizes]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_sizes_of_zero_return_written_results(cell: str, dtype: torch.dtype) -> None:
    """Every operator runs with zero steps, rows, inputs or units and writes all its results."""
    for sizes, directions, bias in itertools.product(ZEROS, (1, 2), (False, True)):
        given = arguments(cell, *sizes, None, directions, bias, dtype)
        steps, batch, _, hidden = sizes
        y, h_n, *_ = outputs = forward(given)
        assert y.shape == (steps, batch, directions * hidden)
        assert h_n.shape == given["h0"].shape
        if steps == 0:
            assert torch.equal(h_n, given["h0"])
        for found, expected in zip(
            torch.ops.fastrnn.recurrent_layer(**given), outputs, strict=False
        ):
            assert torch.equal(found, expected)
        results = [*outputs, *gradients(given)]
        assert not any(t.isnan().any() for t in results)
        if sizes[:2] != (T, B):  # without rows the gradient of every weight is zero
            assert not any(t.any() for t in results[8:])


@pytest.mark.parametrize("sizes", ZEROS, ids=str)
def test_stack_with_sizes_of_zero_matches_layers(sizes: tuple[int, ...]) -> None:
    steps, batch, _, hidden = sizes
    first = arguments("lstm", *sizes)
    second = arguments("lstm", steps, batch, hidden, hidden)
    y, h_n, c_n = torch.ops.fastrnn.recurrent_stack(
        first["x"],
        [first["h0"], second["h0"]],
        [first["c0"], second["c0"]],
        [*first["weights"], *second["weights"]],
        first["slots"],
        None,
        "lstm",
    )
    lower = forward(first)
    upper = forward({**second, "x": lower[0]})
    whole = (upper[0], lower[1], upper[1], lower[2], upper[2])
    for found, expected in zip([y, *h_n, *c_n], whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("steps", [0, T])
@pytest.mark.parametrize("bias", [False, True])
def test_projection_to_size_0_raises(directions: int, steps: int, bias: bool) -> None:
    """Without a projection there is no w_hr; a w_hr of size 0 is an error."""
    given = arguments("lstm", steps, proj=0, directions=directions, bias=bias)
    sentence = "h0 must have a size of 1 or more with a projection, got 0"
    for call in (forward, lambda given: torch.ops.fastrnn.recurrent_layer(**given)):
        with pytest.raises(RuntimeError, match=sentence):
            call(given)
    y = torch.randn(steps, B, 0)
    saved = torch.randn(directions, steps * B, 5 * H)
    call = torch.ops.fastrnn.recurrent_gradients
    if directions == 2:
        call = torch.ops.fastrnn.recurrent_bidirectional_gradients
    with pytest.raises(RuntimeError, match=sentence):
        call(d_y=y, d_h_n=None, d_c_n=None, y=y, saved=saved, outputs=-1, **given)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_functional_with_a_projection_to_size_0_raises(with_gradient: bool) -> None:
    given = arguments("lstm", proj=0)
    weights = [w.requires_grad_(with_gradient) for w in given["weights"]]
    with pytest.raises(RuntimeError):
        functional.lstm(
            given["x"], (given["h0"], given["c0"]), weights, True, 1, 0.0, True, False, False
        )


# --- tensors that the kernels cannot read --------------------------------------------------------


def shrunk(t: Tensor, size: int = 0) -> Tensor:
    """Returns a copy whose storage has been resized."""
    t = t.clone()
    t.untyped_storage().resize_(size)
    return t


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to_mkldnn(),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    ],
    ids=["sparse", "mkldnn", "quantized", "nested", "jagged"],
)
@pytest.mark.parametrize("name", ["x", "h0", "weights"])
def test_tensors_that_are_not_dense_raise(name: str, change: Callable[[Tensor], Tensor]) -> None:
    given = arguments()
    value = given[name]
    given[name] = [change(value[0]), *value[1:]] if name == "weights" else change(value)
    with pytest.raises(RuntimeError, match="tensors must be dense"):
        forward(given)
    with pytest.raises(RuntimeError, match="tensors must be dense"):
        torch.ops.fastrnn.recurrent_layer(**given)
    del given["slots"], given["sequence"]
    with pytest.raises(RuntimeError, match="tensors must be dense"):
        torch.ops.fastrnn.layer(**given, batch_sizes=None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.complex32],
    ids=str,
)
def test_dtypes_without_kernels_raise(dtype: torch.dtype) -> None:
    given = arguments()
    wrong = torch.zeros(T, B, I).to(dtype)
    with pytest.raises(RuntimeError, match="x must be float16, bfloat16, float32 or float64, got"):
        forward({**given, "x": wrong})
    for name in ("h0", "c0"):
        wrong = torch.zeros(given[name].shape).to(dtype)
        with pytest.raises(RuntimeError, match=f"{name} must have the dtype Float of the input"):
            forward({**given, name: wrong})


@pytest.mark.parametrize("name", ["x", "h0", "c0", "weights"])
def test_shrunk_storage_raises(name: str) -> None:
    given = arguments()
    value = given[name]
    for size in (0, 8):
        gone = [value[0], shrunk(value[1], size), *value[2:]] if name == "weights" else None
        with pytest.raises(RuntimeError, match=f"{name} must have memory for all of its"):
            forward({**given, name: gone or shrunk(value, size)})


def test_gradients_of_shrunk_storage_raise() -> None:
    given = arguments()
    y, h_n, c_n, saved = forward(given)
    for name, t in {"y": y, "d_y": y, "d_h_n": h_n, "d_c_n": c_n, "saved": saved}.items():
        with pytest.raises(RuntimeError, match=f"{name} must have memory for all of its"):
            gradients(given, **{name: shrunk(t, 4)})


def test_overlapping_memory_matches_a_copy() -> None:
    """The elements of an expanded tensor share memory, which is valid for reading."""
    given = arguments()
    overlapping = {
        "x": torch.randn(1, 1, I).expand(T, B, I),
        "h0": torch.randn(40).as_strided((1, B, H), (1, 2, 1)),
        "c0": torch.randn(1).expand(1, B, H),
        "weights": [
            torch.randn(80).as_strided((4 * H, I), (1, 1)),
            torch.randn(80).as_strided((4 * H, H), (2, 1)),
            torch.randn(1).expand(4 * H),
            torch.randn(4 * H).flip(0),
        ],
    }
    copies = {
        name: [w.clone() for w in value] if name == "weights" else value.clone()
        for name, value in overlapping.items()
    }
    y, *_ = forward(given)
    d_y = torch.randn(40).as_strided(y.shape, (2, 1, 1))
    pairs = zip(
        [*forward({**given, **overlapping}), *gradients({**given, **overlapping}, d_y=d_y)],
        [*forward({**given, **copies}), *gradients({**given, **copies}, d_y=d_y.clone())],
        strict=True,
    )
    for found, expected in pairs:
        assert torch.equal(found, expected)


def test_saved_must_be_what_forward_returned() -> None:
    given = arguments()
    saved = forward(given)[3]
    wrong: list[Any] = [
        None,
        saved.double(),
        saved.bfloat16(),
        saved[:, :-1],
        saved[..., :-1],
        saved[:, :1].expand(saved.shape),
        saved.transpose(1, 2).contiguous().transpose(1, 2),
        saved.to("meta"),
    ]
    for other in wrong:
        with pytest.raises(RuntimeError, match=r"^fastrnn: \w+ must "):
            gradients(given, saved=other)


def test_expanded_batch_sizes_match_a_copy() -> None:
    given = arguments()
    rows = {**given, "x": given["x"].flatten(0, 1)}
    found = forward({**rows, **packed(torch.tensor([B]).expand(T))})
    expected = forward({**rows, **packed(torch.tensor([B] * T))})
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "sizes",
    [
        [2, -2, 6],
        [2, 2, 2, 0],
        [1, 2, 3],
        [2, 1, 1],
        [2**62] * 3,
        [2, 2**63 - 1],
        [-(2**63)],
        [2] * 4,
    ],
    ids=str,
)
def test_invalid_batch_sizes_raise(sizes: list[int]) -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match=r"must start with the batch size|rows that batch_sizes"):
        forward({**given, "x": given["x"].flatten(0, 1), **packed(torch.tensor(sizes))})


def test_wrong_number_of_weights_raises() -> None:
    given = arguments()
    for count in (0, 1, 6, 9):
        weights = (given["weights"] * 3)[:count]
        with pytest.raises(
            RuntimeError, match=f"weights must hold 4 tensors per direction .*got {count}"
        ):
            forward({**given, "weights": weights})


# --- sizes beyond memory -------------------------------------------------------------------------

HUGE = 1 << 40


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(1, 1, 1).expand(HUGE, B, I)},
        {"x": torch.zeros(1, 1, 1).expand(1 << 60, 1, I)},
        {
            "x": torch.zeros(1).expand(T, HUGE, I),
            "h0": torch.zeros(1).expand(1, HUGE, H),
            "c0": torch.zeros(1).expand(1, HUGE, H),
        },
        {"x": torch.zeros(0, B, HUGE), "w_ih": torch.zeros(1).expand(4 * H, HUGE)},
        {
            "x": torch.zeros(0, 0, 0),
            "h0": torch.zeros(1, 0, 1 << 60),
            "c0": torch.zeros(1, 0, 1 << 60),
            "w_ih": torch.zeros(1 << 62, 0),
        },
        {
            "x": torch.zeros(HUGE, 1 << 20, 0),
            "h0": torch.zeros(1, 1 << 20, 0),
            "c0": torch.zeros(1, 1 << 20, 0),
            "w_ih": torch.zeros(0, 0),
        },
    ],
    ids=["steps", "steps beyond 2^59", "batch", "inputs", "units", "nothing"],
)
def test_sizes_beyond_memory_raise(changed: dict[str, Any]) -> None:
    """Expanded tensors can have such sizes. The required memory must not overflow an integer."""
    given = arguments()
    if "w_ih" in changed:
        given["weights"] = [changed["w_ih"], *given["weights"][1:]]
    for name in ("x", "h0", "c0"):
        given[name] = changed.get(name, given[name])
    with pytest.raises(RuntimeError, match=r"^fastrnn: ") as info:
        forward(given)
    assert "message above" not in str(info.value) or torch.__version__ < "2.13"
    assert "/" not in str(info.value)  # no path of the machine that compiled the library


def test_torch_reports_how_much_memory_it_lacks() -> None:
    given = arguments()
    given["x"] = torch.zeros(1).expand(1, HUGE, 1)
    given["h0"] = given["c0"] = torch.zeros(1).expand(1, HUGE, H)
    given["weights"] = arguments(inputs=1)["weights"]
    with pytest.raises(RuntimeError) as info:
        forward(given)
    if torch.__version__ >= "2.13":  # torch's C interface must pass the message on
        assert f"you tried to allocate {HUGE * H * 4} bytes" in str(info.value)


def test_many_steps_without_rows_work() -> None:
    y, h_n, *_ = forward(arguments(steps=HUGE, batch=0))
    assert y.shape == (HUGE, 0, H)
    assert h_n.shape == (1, 0, H)


# --- shapes without values -----------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "x of two dimensions": {"x": torch.zeros(T, I)},
    "x of another batch": {"x": torch.zeros(T, B + 1, I)},
    "x of another input size": {"x": torch.zeros(T, B, I + 1)},
    "x of integers": {"x": torch.zeros(T, B, I, dtype=torch.int64)},
    "h0 of another size": {"h0": torch.zeros(1, B, H + 1)},
    "h0 of another dtype": {"h0": torch.zeros(1, B, H).double()},
    "h0 of no direction": {"h0": torch.zeros(0, B, H)},
    "h0 of three directions": {"h0": torch.zeros(3, B, H)},
    "h0 of four dimensions": {"h0": torch.zeros(1, 1, B, H)},
    "no c0": {"c0": None},
    "c0 of another size": {"c0": torch.zeros(1, B, H + 1)},
    "c0 of another batch": {"c0": torch.zeros(1, B + 1, H)},
    "no weights": {"weights": []},
    "too many weights": {"weights": [torch.zeros(4 * H, H)] * 6},
    "no slot of w_hh": {"slots": 0b01101},
    "one bias": {"slots": 0b10111},
    "an unknown slot": {"slots": 0b100011},
    "slots of fewer weights": {"slots": 0b00011},
    "w_ih of one dimension": {"weights": [torch.zeros(4 * H)] * 4},
    "b_ih of another size": {
        "weights": [torch.zeros(4 * H, I), torch.zeros(4 * H, H), torch.zeros(H), torch.zeros(H)]
    },
    "w_hr of another size": {
        "weights": [torch.zeros(4 * H, I), torch.zeros(4 * H, H), torch.zeros(H, H + 1)],
        "slots": 0b10011,
    },
    "an unknown cell": {"cell": "elman"},
    "another cell": {"cell": "gru"},
    "batch_sizes of two dimensions": {
        "x": torch.zeros(T * B, I),
        **packed(torch.zeros(1, 1, dtype=torch.int64)),
    },
    "batch_sizes of floats": {"x": torch.zeros(T * B, I), **packed(torch.zeros(T))},
    "batch_sizes of padded rows": packed(torch.zeros(T, dtype=torch.int64)),
    "a sequence slot without its tensor": {"x": torch.zeros(T * B, I), "slots": 0b1111 | PACKED},
    "a tensor without its sequence slot": {"sequence": [torch.full((T,), B)]},
    "an unknown sequence slot": {**packed(torch.full((T,), B)), "slots": 0b1111 | 1 << 40},
}


def faked(mode: FakeTensorMode, given: dict[str, Any]) -> dict[str, Any]:
    def fake(value: Any) -> Any:
        if isinstance(value, list):
            return [fake(item) for item in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    return {name: fake(value) for name, value in given.items()}


@pytest.mark.parametrize("name", WRONG)
def test_fake_kernel_rejects_the_same_arguments(name: str) -> None:
    given = {**arguments(), **WRONG[name]}
    with pytest.raises(RuntimeError, match=r"^fastrnn: "):
        forward(given)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="fastrnn: "):
        forward(faked(mode, given))
    stack = (given["x"], [given["h0"]], [c for c in [given["c0"]] if c is not None])
    rest = (given["weights"], given["slots"], given["sequence"], given["cell"])
    with pytest.raises(RuntimeError, match=r"^fastrnn: "):
        torch.ops.fastrnn.recurrent_stack(*stack, *rest)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", [name for name in BUILT_IN if not CELLS[name].parameters])
@pytest.mark.parametrize("proj", [None, 3])
def test_fake_gradients_have_the_shapes_of_the_real_ones(
    cell: str, directions: int, proj: int | None
) -> None:
    if proj is not None and cell != "lstm":
        pytest.skip("a projection is for LSTM")
    for bias, asked in itertools.product((False, True), (0, 0b10110011, -1)):
        given = arguments(cell, directions=directions, proj=proj, bias=bias)
        real = gradients(given, outputs=asked)
        with FakeTensorMode() as mode:
            fake = gradients(faked(mode, given), outputs=asked)
        assert [t.shape for t in fake] == [t.shape for t in real]
        assert [t.dtype for t in fake] == [t.dtype for t in real]


@pytest.mark.parametrize(
    "changed",
    [
        {"saved": torch.zeros(1, T * B, 5 * H).double()},
        {"saved": torch.zeros(1, T * B, 5 * H + 1)},
        {"saved": torch.zeros(0)},
        {"y": torch.zeros(T, B, H + 1)},
        {"d_y": torch.zeros(T, B, H + 1)},
        {"d_y": torch.zeros(T, B, H).double()},
        {"d_h_n": torch.zeros(1, B + 1, H)},
        {"d_c_n": torch.zeros(1, B, H + 1)},
    ],
    ids=lambda changed: f"{next(iter(changed))}{list(next(iter(changed.values())).shape)}",
)
def test_fake_gradients_reject_the_same_arguments(changed: dict[str, Any]) -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match=r"^fastrnn: "):
        gradients(given, **changed)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="fastrnn: "):
        gradients(faked(mode, given), **faked(mode, changed))


def test_tensors_on_two_devices_raise() -> None:
    given = arguments()
    for name in ("x", "h0", "c0"):
        with pytest.raises(RuntimeError, match="must be on the device of the input, got another"):
            forward({**given, name: given[name].to("meta")})


def test_operators_check_the_number_of_directions() -> None:
    for directions, other in ((1, "recurrent_bidirectional_gradients"), (2, "recurrent_gradients")):
        given = arguments(directions=directions)
        y, h_n, c_n, saved = forward(given)
        with pytest.raises(RuntimeError, match="h0 must hold the states of"):
            getattr(torch.ops.fastrnn, other)(
                d_y=y, d_h_n=h_n, d_c_n=c_n, y=y, saved=saved, outputs=-1, **given
            )


# --- code compiled to C++ ------------------------------------------------------------------------


def check_cpp_wrapper(module: torch.nn.Module) -> None:
    x = torch.randn(T, B, I, requires_grad=True)
    wanted = [x, *module.parameters()]

    def loss(x: Tensor) -> Tensor:
        result: Tensor = module(x)[0].square().sum()
        return result

    expected = torch.autograd.grad(loss(x), wanted)
    torch._dynamo.reset()
    with torch._inductor.config.patch(cpp_wrapper=True):
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), wanted)
    torch.testing.assert_close(found, expected)


def test_training_compiled_to_cpp() -> None:
    check_cpp_wrapper(fastrnn.GRU(I, H))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"bidirectional": True, "proj_size": 3}),
        ("GRU", {"bidirectional": True, "bias": False}),
        ("RNN", {}),
        ("RNN", {"num_layers": 2, "bidirectional": True}),
    ],
    ids=str,
)
def test_training_of_every_cell_compiled_to_cpp(name: str, options: dict[str, Any]) -> None:
    check_cpp_wrapper(getattr(fastrnn, name)(I, H, **options))


@pytest.mark.parametrize(
    "operator", ["recurrent_gradients", "recurrent_bidirectional_gradients", "recurrent_layer"]
)
def test_operators_return_a_fixed_number_of_tensors(operator: str) -> None:
    schema = getattr(torch.ops.fastrnn, operator).default._schema
    assert {str(result.type) for result in schema.returns} == {"Tensor"}


# --- the module _C -------------------------------------------------------------------------------

BEYOND = [-(2**63), -1, 2**31, 2**62, 2**63 - 1]


@pytest.mark.parametrize(
    "name",
    "steps batch input_size hidden_size proj_size threads directions layers".split(),
)
@pytest.mark.parametrize("value", BEYOND)
def test_plans_of_impossible_sizes_raise(name: str, value: int) -> None:
    sizes = {"steps": 9, "batch": 2, "input_size": 3, "hidden_size": 4, name: value}
    with pytest.raises(ValueError, match=rf"^{name} must be at (least|most) \d+, got {value}$"):
        _C.plan("lstm", **sizes)
    if name not in ("threads", "layers"):
        with pytest.raises(ValueError, match=f"{name} must be at"):
            _C.cuda_plan("lstm", **sizes)


def test_plans_of_the_largest_sizes_work() -> None:
    most = 2**31 - 1
    for steps, batch, inputs, hidden in itertools.product((1, most), repeat=4):
        for training, dtype in itertools.product((False, True), ("bfloat16", "float64")):
            sizes = (steps, batch, inputs, hidden)
            products = steps * batch * 3 * hidden * (2 * inputs + hidden + 1)
            for plan in (_C.plan, _C.cuda_plan):
                if products <= 2**60:
                    assert plan("gru", *sizes, dtype=dtype, training=training)["chunk_rows"] >= 1
                else:
                    with pytest.raises(ValueError, match="the number of multiply-adds must be"):
                        plan("gru", *sizes, dtype=dtype, training=training)


@pytest.mark.parametrize("name", ["capability", "multiprocessors", "shared_bytes"])
@pytest.mark.parametrize("value", BEYOND)
def test_plans_for_impossible_gpus_raise(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at"):
        _C.cuda_plan("lstm", 9, 2, 3, 4, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, 1e300])
def test_impossible_times_raise(value: float) -> None:
    with pytest.raises(ValueError, match=r"^seconds must be from 1e-06 to 60, got "):
        _C.fma_peak(1, value)
    for call in ((value, 1.0), (1.0, value)):
        with pytest.raises(ValueError, match=r"^the time that a \w+ \w+ must be from 0 to 1e\+09"):
            _C._testing.simulate_backoff([call])


@pytest.mark.parametrize("threads", [-1, 0, 4097, 10**6, 2**62])
def test_peak_of_impossible_threads_raises(threads: int) -> None:
    with pytest.raises(ValueError, match=r"^threads must be at (least 1|most 4096), got"):
        _C.fma_peak(threads, 0.01)


def test_peak_raises_if_the_system_grants_no_threads() -> None:
    code = """
import resource, fastrnn
from fastrnn import _C
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), -1))  # stacks of few threads
try:
    _C.fma_peak(500, 0.01)
except RuntimeError as error:
    print(error)
"""
    assert "of 500 threads" in run_python(code)


@pytest.mark.parametrize("threads", BEYOND)
def test_impossible_bounds_of_threads_raise(threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be at"):
        _C.set_max_threads(threads)
    assert _C.max_threads() == 0


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("1e300 1", 1 << 20), ("inf 1", 1 << 20), ("1 1e-300", 1 << 20), ("nan nan", 0), ("-5 3", 0)],
)
def test_extreme_quotas_are_clamped_or_ignored(tmp_path: Path, text: str, cpus: int) -> None:
    (tmp_path / "membership").write_text("0::/\n", encoding="utf-8")
    (tmp_path / "cpu.max").write_text(text, encoding="utf-8")
    assert _C._testing.quota_cpus(str(tmp_path / "membership"), str(tmp_path)) == cpus


@pytest.mark.parametrize("endless", ["/dev/zero", "/dev/urandom"])
def test_endless_quota_files_are_ignored(endless: str) -> None:
    assert _C._testing.quota_cpus(endless, "/nowhere") == 0
