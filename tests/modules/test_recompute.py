"""`recompute`: training in less memory, on the CPU with the same bits."""

from __future__ import annotations

import copy
import io
import pickle
import time
from typing import Any

import pytest
import torch
from support import CELLS, DTYPES, CellLayer, build, check, pack, run
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import functional
from fastrnn.layer_call import FULL
from fastrnn.ops.recompute import chunk_length

pytestmark = pytest.mark.usefixtures("one_thread")

INPUT = 5


def states(module: Any, batch: int) -> Any:
    """Returns random initial states that require a gradient."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    dtype = module.weight_ih_l0.dtype

    def state(size: int) -> Tensor:
        return torch.randn(count, batch, size, dtype=dtype, requires_grad=True)

    h = state(module.proj_size or module.hidden_size)
    return (h, state(module.hidden_size)) if module.mode == "LSTM" else h


def packed_input(lengths: list[int], dtype: torch.dtype) -> PackedSequence:
    rows = torch.randn(sum(lengths), INPUT, dtype=dtype)
    packed = pack(rows, lengths, False)
    return packed._replace(data=packed.data.requires_grad_())


def with_recompute(module: nn.Module, recompute: Any) -> nn.Module:
    """Returns a module that shares the parameters."""
    twin = copy.copy(module)
    twin.recompute = recompute
    return twin


_ATTEMPTS = 8


def assert_same_bits(module: nn.Module, x: Any, hx: Any, recompute: Any) -> None:
    # On a busy machine one of the two calls may run on fewer threads, which changes bits. After a
    # call that has lost its CPUs, calls run on one thread for up to 0.512 s.
    for attempt in range(_ATTEMPTS):
        if attempt > 0:
            time.sleep(0.6)
        expected = run(module, x, hx)
        found = run(with_recompute(module, recompute), x, hx)
        assert found.keys() == expected.keys()
        names = [name for name in expected if not is_product_in_bfloat16(name, expected[name])]
        different = [name for name in names if not torch.equal(found[name], expected[name])]
        if not different:
            return
    assert not different, different


def is_product_in_bfloat16(name: str, result: Tensor) -> bool:
    """Whether backward may compute a result from stored bfloat16, and chunks from float32."""
    return result.dtype == torch.bfloat16 and not name.startswith("out")


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Returns the bytes that the graph of a call holds, without parameters and input."""
    sizes: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        output, _ = module(x)
    assert output.requires_grad
    return sum(sizes.values())


# -- the results ----------------------------------------------------------------------------------

# More rows than the products after backward sum up at once (256), and not a multiple; a single
# sequence, whose input product is computed ahead; steps that are too few to pack the weights.
SHAPES = [(131, 5, 9), (393, 1, 20), (7, 1, 40), (3, 2, 300)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both directions"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_the_same(cell: str, bidirectional: bool, dtype: torch.dtype) -> None:
    torch.set_num_threads(2 if bidirectional else 1)  # two directions run at the same time
    for steps, batch, hidden in SHAPES:
        module = build(cell, INPUT, hidden, bidirectional=bidirectional, dtype=dtype)
        x = torch.randn(steps, batch, INPUT, dtype=dtype, requires_grad=True)
        for recompute in (1, 3, 50, "full", 10**6):
            if recompute != 1 or steps < 100:
                assert_same_bits(module, x, states(module, batch), recompute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both directions"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_packed_sequences_are_the_same(
    cell: str, bidirectional: bool, dtype: torch.dtype
) -> None:
    torch.set_num_threads(2)
    module = build(cell, INPUT, 33, 2, bidirectional=bidirectional, dtype=dtype)
    lengths = [1, 90, 131, 64, 131, 2]
    x = packed_input(lengths, dtype)
    for recompute in (7, 64, "full"):
        assert_same_bits(module, x, states(module, len(lengths)), recompute)


@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_lengths_and_resets_are_the_same(cell: str) -> None:
    module = build(cell, INPUT, 9, 2, bidirectional=True)
    x = torch.randn(40, 3, INPUT)
    marks = {"lengths": torch.tensor([40, 0, 25]), "resets": torch.rand(40, 3) < 0.1}

    def gradients(module: nn.Module) -> list[Tensor]:
        output, _ = module(x, **marks)
        return [output, *torch.autograd.grad(output.sin().sum(), list(module.parameters()))]

    expected, found = gradients(module), gradients(with_recompute(module, 4))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_bits_of_stacked_layers_with_dropout(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    module = getattr(fastrnn, name)(INPUT, 64, 3, batch_first=True, dropout=0.3)
    x = torch.randn(8, 20, INPUT, requires_grad=True)
    assert_same_bits(module, x, states(module, 8), 6)


@pytest.mark.parametrize("changed", ["x", "w_ih", "w_hh", "b_hh", "h0"])
def test_only_what_needs_a_gradient_gets_one(changed: str) -> None:
    module: Any = fastrnn.GRU(INPUT, 9).requires_grad_(False)
    x, hx = torch.randn(30, 2, INPUT), torch.randn(1, 2, 9)
    tensors = {"x": x, "h0": hx, "w_ih": module.weight_ih_l0, "w_hh": module.weight_hh_l0}
    {**tensors, "b_hh": module.bias_hh_l0}[changed].requires_grad_()
    assert_same_bits(module, x, hx, 4)


@pytest.mark.parametrize("result", ["output", "h_n", "c_n"])
def test_only_one_result_has_a_gradient(result: str) -> None:
    module = fastrnn.LSTM(INPUT, 9, bidirectional=True)
    x = torch.randn(30, 2, INPUT)

    def gradients(module: nn.Module) -> tuple[Tensor, ...]:
        output, (h_n, c_n) = module(x)
        chosen = {"output": output, "h_n": h_n, "c_n": c_n}[result]
        return torch.autograd.grad(chosen.square().sum(), list(module.parameters()))

    expected, found = gradients(module), gradients(with_recompute(module, 4))
    assert all(map(torch.equal, found, expected))


def test_without_biases_and_without_sequences() -> None:
    module = fastrnn.LSTM(INPUT, 9, bias=False)
    assert_same_bits(module, torch.randn(30, 2, INPUT, requires_grad=True), None, 4)
    assert_same_bits(module, torch.randn(4, 0, INPUT, requires_grad=True), None, 4)


def test_the_output_may_be_changed_in_place() -> None:
    module = fastrnn.GRU(INPUT, 9)
    x = torch.randn(30, 2, INPUT)

    def gradients(module: nn.Module) -> tuple[Tensor, ...]:
        output = module(x)[0].relu_()
        return torch.autograd.grad(output.sum(), list(module.parameters()))

    assert all(map(torch.equal, gradients(with_recompute(module, 4)), gradients(module)))


def test_a_changed_input_is_reported() -> None:
    module = fastrnn.GRU(INPUT, 9, recompute=4)
    x = torch.randn(30, 2, INPUT)
    output, _ = module(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="must not be modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_autocast(cell: str) -> None:
    module = build(cell, INPUT, 9)
    x = torch.randn(30, 2, INPUT, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(module, x, None, 4)


# -- the other way, without an operator for it ----------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both directions"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_projections_differ_by_rounding(packed: bool, bidirectional: bool) -> None:
    options: dict[str, Any] = {"proj_size": 4, "bidirectional": bidirectional}
    module = build("lstm", INPUT, 9, 2, **options, dtype=torch.float64)
    lengths = [1, 30, 41, 2]
    x: Any = torch.randn(41, 4, INPUT, dtype=torch.float64, requires_grad=True)
    if packed:
        x = packed_input(lengths, torch.float64)
    hx = states(module, 4)
    for recompute in (1, 7, "full", 100):
        found = run(with_recompute(module, recompute), x, hx)
        assert_same_in_double(found, run(module, x, hx))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_bfloat16_is_as_accurate_as_torch(cell: str) -> None:
    module = build(cell, INPUT, 33, 2, dtype=torch.bfloat16, recompute=5)
    x = torch.randn(17, 6, INPUT, dtype=torch.bfloat16, requires_grad=True)
    check(module, x, states(module, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_are_as_accurate_as_torch(dtype: torch.dtype) -> None:
    module = build("lstm", INPUT, 9, proj_size=4, dtype=dtype, recompute=5)
    check(module, torch.randn(17, 3, INPUT, dtype=dtype, requires_grad=True), states(module, 3))


@pytest.mark.parametrize("cell", ["peephole_lstm", "slstm", "indrnn"])
def test_cells_beyond_torch(cell: str) -> None:
    module = CellLayer(cell, INPUT, 9, bidirectional=True, dtype=torch.float64)
    x = torch.randn(30, 2, INPUT, dtype=torch.float64)

    def gradients(recompute: int) -> list[Tensor]:
        call = module.call(x)
        y, h_n, c_n = fastrnn.engine.run.run(
            call._replace(options=call.options._replace(recompute=recompute))
        )
        loss = y.sin().sum() + h_n.sum() + (0 if c_n is None else c_n.square().sum())
        return [y, *torch.autograd.grad(loss, list(module.parameters()))]

    assert_same_in_double(gradients(7), gradients(0))


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_the_graph_holds_the_output_and_few_states(name: str) -> None:
    steps, batch, hidden, chunk = 400, 3, 16, 20
    module = getattr(fastrnn, name)(INPUT, hidden)
    x = torch.randn(steps, batch, INPUT)
    value = 4 * batch * hidden  # bytes of a value of all units
    states = 2 if name == "LSTM" else 1
    initial = states * value
    output = steps * value
    kept = steps // chunk * states * value
    plain = saved_bytes(module, x)
    module.recompute = chunk
    assert saved_bytes(module, x) <= output + kept + initial
    assert plain >= 4 * output


def test_full_is_about_the_square_root_of_the_steps() -> None:
    assert chunk_length(FULL, 1_000_000) == 1000
    assert chunk_length(FULL, 90) == 16
    assert chunk_length(7, 90) == 7


@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "frozen"])
def test_inference_is_the_same_call(enabled: bool) -> None:
    module = fastrnn.LSTM(INPUT, 9, 2, recompute=4).requires_grad_(False)
    x = torch.randn(30, 2, INPUT)
    with torch.set_grad_enabled(enabled):
        found, _ = module(x)
        expected, _ = with_recompute(module, "none")(x)
    assert torch.equal(found, expected)
    assert found.grad_fn is None


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_flops_of_the_second_forward_pass_are_counted(name: str) -> None:
    module = getattr(fastrnn, name)(INPUT, 9)
    x = torch.randn(30, 2, INPUT)

    def flops(recompute: Any) -> tuple[int, int]:
        module.recompute = recompute
        with FlopCounterMode(display=False) as forward:
            output, _ = module(x)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = flops("none")
    again = forward if name == "LSTM" else 0  # an RNN saves nothing but its output
    assert flops(4) == (forward, backward + again)


# -- graphs and derivatives -----------------------------------------------------------------------


class OutputOf(nn.Module):
    """Calls a layer in code that TorchScript compiles."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]  # type: ignore[no-any-return]


def test_second_derivatives() -> None:
    module = fastrnn.GRU(2, 3, dtype=torch.float64, recompute=2)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


def test_transforms_ignore_it() -> None:
    module = fastrnn.GRU(INPUT, 9)
    x = torch.randn(30, 2, INPUT)

    def gradient(module: nn.Module) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: module(x)[0].sin().sum())(x)
        return found

    assert torch.equal(gradient(with_recompute(module, 4)), gradient(module))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_compiled_code_has_the_same_results(name: str) -> None:
    module = getattr(fastrnn, name)(INPUT, 9, recompute=4)
    x = torch.randn(30, 2, INPUT, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, found = [
        torch.autograd.grad(call(x)[0].sin().sum(), [x, *module.parameters()])
        for call in (module, compiled)
    ]
    assert all(map(torch.equal, found, expected))


def test_exported_and_scripted_code_has_the_same_results() -> None:
    module = fastrnn.LSTM(INPUT, 9, recompute="full").eval()
    x = torch.randn(30, 2, INPUT)
    expected, _ = module(x)
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x)[0], expected)
    assert torch.equal(torch.jit.script(OutputOf(module))(x), expected)


# -- the argument ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        ("half", ValueError, "'half'"),
        (2.5, TypeError, "2.5"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
    ],
)
def test_wrong_value(value: Any, error: type[Exception], got: str) -> None:
    message = f"recompute must be 'none', 'full' or a number of steps from 1 on, got {got}"
    with pytest.raises(error) as raised:
        fastrnn.LSTM(2, 3, recompute=value)
    assert str(raised.value) == message
    module = fastrnn.GRU(2, 3, recompute=5)
    with pytest.raises(error) as raised:
        module.recompute = value
    assert module.recompute == 5
    x, hx, weights = torch.randn(4, 1, 2), torch.zeros(1, 1, 3), list(module.parameters())
    with pytest.raises(error) as raised:
        functional.gru(x, hx, weights, True, 1, 0.0, False, False, False, recompute=value)
    assert str(raised.value) == message


@pytest.mark.parametrize("recompute", ["none", "full", 7])
def test_the_argument_is_kept(recompute: Any) -> None:
    module = fastrnn.LSTM(2, 3, recompute=recompute)
    assert module.recompute == recompute
    assert (f"recompute={recompute!r}" in repr(module)) == (recompute != "none")
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert twin.recompute == recompute


def test_a_module_without_the_attribute() -> None:
    module = fastrnn.LSTM(2, 3)
    assert not any("recompute" in name for name in vars(module))
    assert module.recompute == "none"


def test_functional() -> None:
    module: Any = fastrnn.GRU(INPUT, 9)
    x, hx = torch.randn(30, 2, INPUT), torch.zeros(1, 2, 9)
    weights = list(module.parameters())

    def gradients(recompute: Any) -> tuple[Tensor, ...]:
        arguments: Any = (x, hx, weights, True, 1, 0.0, True, False, False)
        output, _ = functional.gru(*arguments, recompute=recompute)
        return torch.autograd.grad(output.sin().sum(), weights)

    assert all(map(torch.equal, gradients(4), gradients("none")))
