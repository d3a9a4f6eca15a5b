"""``torch.compile``: whole graphs, equal to eager code, compiled once for every T and B."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import CELLS, build, exact_call, exact_run, make_step, pack, run
from tolerance import assert_agrees
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch.func import functional_call, grad, jacfwd, jacrev, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C

pytestmark = pytest.mark.usefixtures("one_thread")

STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{cell: (cell, {}) for cell in CELLS},
    "gru, stacked": ("gru", STACKED),
    "lstm, stacked": ("lstm", STACKED),
    "lstm, projected": ("lstm", {"proj_size": 2, "num_layers": 2}),
    "rnn_tanh, no bias": ("rnn_tanh", {"bias": False}),
    "lstm, dropout": ("lstm", {"dropout": 0.5, "num_layers": 3}),
}
SIZES = ((5, 3), (6, 4), (9, 2), (2, 7), (30, 5))  # T and B
# different from T and B: torch treats sizes that are equal at compilation as one size
SIZE = 8


def layers(*names: str) -> pytest.MarkDecorator:
    """Returns a decorator that parametrises a test by some of `LAYERS`."""
    return pytest.mark.parametrize(("cell", "options"), [LAYERS[n] for n in names], ids=names)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Count:
    """The backend ``aot_eager`` with a count of the compiled graphs.

    With ``dynamic=True`` Dynamo restarts inside the backend when Python reads a float (dropout, as
    in nn.Dropout). Such an attempt does not count.
    """

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = lookup_backend("aot_eager")(graph, inputs)
        self.graphs += 1
        self.graph = graph
        return compiled


def compiled(module: nn.Module, backend: Any = "aot_eager", **options: Any) -> nn.Module:
    """Returns a compiled copy with the same parameter names."""
    twin = copy.deepcopy(module)
    twin.compile(backend=backend, **{"fullgraph": True, **options})
    return twin


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def sequence(*sizes: int) -> Tensor:
    return torch.randn(*sizes, requires_grad=True)


def states(module: nn.Module, batch: int) -> Any:
    """Returns initial states for all layers and directions of the module."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = sequence(count, batch, module.proj_size or module.hidden_size)
    return (h, sequence(count, batch, module.hidden_size)) if module.mode == "LSTM" else h


# --- results of one graph


@layers(*LAYERS)
def test_training_matches_eager(cell: str, options: dict[str, Any]) -> None:
    module = build(cell, 3, 4, **options)
    x = sequence(5, 2, 3)
    hx = states(module, 5 if module.batch_first else 2)
    assert_equal(run(compiled(module), x, hx), run(module, x, hx))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@layers("gru", "lstm", "gru, stacked", "lstm, dropout")
def test_inference_matches_eager(
    cell: str, options: dict[str, Any], mode: Callable[[], Any]
) -> None:
    module = build(cell, 3, 4, **options).eval()
    x = torch.randn(5, 2, 3)
    with mode():
        output, hidden = compiled(module)(x)
        expected_output, expected_hidden = module(x)
    assert torch.equal(output, expected_output)
    assert not output.requires_grad
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_unbatched_input_without_states_matches_eager(cell: str) -> None:
    module = build(cell, 3, 4, batch_first=True)
    x = sequence(5, 3)
    assert_equal(run(compiled(module), x), run(module, x))


def test_dropout_is_read_at_each_call() -> None:
    module = build("gru", 3, 4, num_layers=2, dropout=0.5)
    twin = compiled(module)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        assert not torch.equal(twin(x)[0], twin(x)[0])
        for dropout in (0.0, 1.0):
            module.dropout = twin.dropout = dropout
            assert torch.equal(twin(x)[0], module(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_cells_match_eager(cell: str) -> None:
    module = make_step(cell, 3, 4)
    x, h = sequence(2, 3), sequence(2, 4)
    hx = (h, sequence(2, 4)) if cell == "lstm" else h
    twin = compiled(module)
    assert_equal(run(twin, x, hx), run(module, x, hx))
    with torch.inference_mode():
        torch.testing.assert_close(twin(x, hx), module(x, hx), rtol=0, atol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_unbatched_cells_without_states_match_eager(cell: str) -> None:
    module = make_step(cell, 3, 4)
    x = sequence(3)
    assert_equal(run(compiled(module), x), run(module, x))


class Unrolled(nn.Module):
    """A Python loop of a cell over the steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, hx: Any) -> Any:
        outputs = []
        for step in x:
            hx = self.cell(step, hx)
            outputs.append(hx if isinstance(hx, Tensor) else hx[0])
        return torch.stack(outputs), hx


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_loop_of_a_cell_matches_eager(cell: str) -> None:
    module = Unrolled(make_step(cell, 3, 4))
    count = Count()
    x = sequence(4, 2, 3)
    assert_equal(run(compiled(module, count), x), run(module, x))
    assert count.graphs == 1


class Translator(nn.Module):
    """Several recurrent layers, some of the same class; one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = fastrnn.GRU(3, 4, bidirectional=True)
        self.middle = fastrnn.GRU(8, 4)
        self.writer = fastrnn.LSTM(4, 4)

    def forward(self, x: Tensor, hx: None = None) -> Tensor:
        y, _ = self.reader(x)
        y, h = self.middle(y)
        y, hidden = self.writer(y, (h, h))
        output: Tensor = self.writer(y, hidden)[0]
        return output


def test_several_layers_compile_to_one_graph() -> None:
    module = Translator()
    count = Count()
    x = sequence(5, 2, 3)
    assert_equal(run(compiled(module, count), x), run(module, x))
    assert count.graphs == 1


def test_layers_of_the_same_shape_share_compiled_code() -> None:
    count = Count()
    call = torch.compile(lambda module, x: module(x)[0], backend=count, fullgraph=True)
    x = torch.randn(5, 2, 3)
    for _ in range(3):
        module = fastrnn.GRU(3, 4)
        assert torch.equal(call(module, x), module(x)[0])
    assert count.graphs == 1


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_autocast_matches_eager(cell: str, outside: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = build(cell, 3, 4, num_layers=2)

        def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, Any]:
            if outside:
                return self.recurrent(x)  # type: ignore[no-any-return]
            with torch.autocast("cpu", torch.bfloat16):
                return self.recurrent(x)  # type: ignore[no-any-return]

    module = Model()
    x = sequence(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        got = run(compiled(module), x)
        expected = run(module, x)
    assert got["out0"].dtype == (torch.float32 if cell == "gru" else torch.bfloat16)
    assert_equal(got, expected)


def pairs_multiply(monkeypatch: pytest.MonkeyPatch, *batches: int) -> None:
    """Makes autocast cast from 64 rows on, as where an instruction multiplies pairs of bfloat16."""
    monkeypatch.setattr(_C, "bfloat16_copies", lambda cell, hidden, proj: (64, batches or (1,)))


def layer_dtypes(graph: torch.fx.GraphModule) -> list[torch.dtype]:
    """Returns the dtype that each layer of a graph computes in."""
    return [
        node.args[0].meta["example_value"].dtype
        for node in graph.graph.nodes
        if node.op == "call_function" and "fastrnn" in str(node.target)
    ]


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class UnderAutocast(nn.Module):
    """Runs a module's forward pass under autocast, and not its backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        with torch.autocast("cpu", BFLOAT16):
            return self.module(*args)


@layers("rnn_tanh", "gru, stacked", "lstm, stacked", "lstm, projected")
def test_autocast_trains_in_bfloat16(
    cell: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass of compiled code does not run under autocast."""
    pairs_multiply(monkeypatch)
    module, count = build(cell, 3, 4, **options), Count()
    twin = compiled(module, count)
    x = sequence(11, 7, 3)
    found = [run(UnderAutocast(called), x) for called in (twin, module)]
    assert_equal(*found)
    assert layer_dtypes(count.graph) == [BFLOAT16] * module.num_layers
    assert {value.dtype for name, value in found[0].items() if name.startswith("d_")} == {FLOAT32}


@pytest.mark.parametrize("way", ["dynamic", "marked", "automatic"])
def test_autocast_compiles_once_for_many_rows_and_once_for_few(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs_multiply(monkeypatch)
    module, count = build("lstm", SIZE, 4), Count()
    twin = compiled(module, count, dynamic=True if way == "dynamic" else None)
    for steps, batch in [*SIZES, (16, 4), (21, 3), (7, 9)]:
        x = torch.randn(steps, batch, SIZE)
        if way == "marked":
            torch._dynamo.mark_dynamic(x, (0, 1))
        assert_equal(run(UnderAutocast(twin), x), run(UnderAutocast(module), x))
    assert count.graphs == (3 if way == "automatic" else 2)


def test_autocast_compiles_once_per_range_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs_multiply(monkeypatch, 1, 5, 8)
    module, count = build("gru", SIZE, 4), Count()
    twin = compiled(module, count, dynamic=True)
    for batch, graphs in [(2, 1), (6, 2), (9, 3), (3, 3), (7, 3), (20, 3)]:
        x = torch.randn(40, batch, SIZE)
        with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
            assert torch.equal(twin(x)[0], module(x)[0])
        assert count.graphs == graphs


def test_autocast_without_the_instruction_compares_no_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "bfloat16_copies", lambda cell, hidden, proj: (64, ()))
    module, count = build("gru", SIZE, 4), Count()
    twin = compiled(module, count, dynamic=True)
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, SIZE)
        with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
            assert torch.equal(twin(x)[0], module(x)[0])
    assert count.graphs == 1


@pytest.mark.parametrize(("least", "dtype"), [(3, FLOAT32), (8, BFLOAT16)])
def test_autocast_divides_no_range_that_the_user_has_given(
    least: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises for a graph that serves only a part of the range."""
    pairs_multiply(monkeypatch)
    module, count = build("gru", SIZE, 4), Count()
    twin = compiled(module, count)
    for steps in (least, 30, 9):
        x = torch.randn(steps, 10, SIZE)
        torch._dynamo.mark_dynamic(x, 0, min=least, max=50)
        with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
            twin(x)
    assert count.graphs == 1
    assert layer_dtypes(count.graph) == [dtype]


def test_autocast_keeps_float32_if_the_size_of_a_weight_is_a_symbol(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs_multiply(monkeypatch)
    count = Count()
    call = torch.compile(
        lambda *args: fastrnn.functional.gru(*args, False, 1, 0.0, False, False, False),
        backend=count,
        fullgraph=True,
        dynamic=True,
    )
    for hidden in (4, 5, 7):
        weights = [torch.randn(3 * hidden, SIZE), torch.randn(3 * hidden, hidden)]
        with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
            call(torch.randn(20, 9, SIZE), torch.zeros(1, 9, hidden), weights)
    assert count.graphs == 1
    assert layer_dtypes(count.graph) == [FLOAT32]


def test_autocast_compiles_exported_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator of the program casts its own arguments, also while sizes are symbols."""
    pairs_multiply(monkeypatch)
    module, count = build("lstm", SIZE, 4), Count()
    any_size = torch.export.Dim.AUTO
    program = torch.export.export(
        module, (torch.randn(20, 9, SIZE),), dynamic_shapes=((any_size, any_size, None),)
    )
    call = torch.compile(program.module(), backend=count, dynamic=True)
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, SIZE)
        with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
            assert torch.equal(call(x)[0], module(x)[0])
    assert count.graphs == 2


@pytest.mark.parametrize("steps", [20, 5])
def test_autocast_of_lengths_and_states_matches_eager(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs_multiply(monkeypatch)
    module, count = build("lstm", SIZE, 4, num_layers=2), Count()
    twin = compiled(module, count, dynamic=True)
    x, lengths = torch.randn(steps, 4, SIZE), torch.tensor([steps, steps - 1, 5, steps])
    extras = {"return_all_states": True, "return_gates": True}
    with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
        for options in ({"lengths": lengths}, extras, {"lengths": lengths, **extras}):
            got, expected = (tree_leaves(m(x, **options)) for m in (twin, module))
            for value, wanted in zip(got, expected, strict=True):
                assert value.dtype == wanted.dtype
                assert torch.equal(value, wanted)
            assert set(layer_dtypes(count.graph)) == {BFLOAT16 if steps == 20 else FLOAT32}


# --- derivatives


def penalty(
    module: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Returns the gradient of the result of ``function``, and the gradients of its penalty."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    assert first.requires_grad
    return first, *torch.autograd.grad(first.square().sum(), list(module.parameters()))


MAKERS = {"layer": build, "step": make_step}


@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_penalty_matches_eager(cell: str, make: str, options: dict[str, Any]) -> None:
    """Double backward works with the backend that runs the captured graph unchanged."""
    if options and (cell != "lstm" or make == "step"):
        return
    module = MAKERS[make](cell, 3, 4, **options)
    x = sequence(2, 3) if make == "step" else sequence(5, 2, 3)

    def critic(x: Tensor) -> Tensor:
        result = module(x)
        return (result if isinstance(result, Tensor) else result[0]).square().sum()

    got = penalty(module, x, torch.compile(critic, backend="eager", fullgraph=True))
    for value, truth in zip(got, penalty(module, x, critic), strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradient_penalty_raises_if_the_backend_compiles_backward(cell: str, make: str) -> None:
    module = MAKERS[make](cell, 3, 4)
    x = sequence(2, 3) if make == "step" else sequence(5, 2, 3)

    def critic(x: Tensor) -> Tensor:
        result = module(x)
        return (result if isinstance(result, Tensor) else result[0]).square().sum()

    with pytest.raises(RuntimeError, match="double backward"):
        penalty(module, x, torch.compile(critic, backend="aot_eager"))


FUNCTIONS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: grad(lambda p, x: f(p, x).square().sum()),
    "grad of x": lambda f: grad(lambda p, x: f(p, x).square().sum(), argnums=1),
    "vjp": lambda f: lambda p, x: vjp(lambda x: f(p, x), x)[1](x.new_ones(*x.shape[:-1], 4)),
    "jacrev": lambda f: lambda p, x: jacrev(lambda x: f(p, x))(x),
    "jacfwd": lambda f: lambda p, x: jacfwd(lambda x: f(p, x))(x),
    "vmap of grad": lambda f: (
        lambda p, x: vmap(grad(lambda p, x: f(p, x).square().sum(), argnums=1), in_dims=(None, 0))(
            p, torch.stack([x, 2 * x])
        )
    ),
    "grad of grad": lambda f: (
        lambda p, x: grad(lambda x: grad(lambda x: f(p, x).square().sum())(x).square().sum())(x)
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("cell", "make", "backend"),
    [
        ("rnn_relu", "layer", "eager"),
        ("gru", "layer", "eager"),
        ("lstm", "step", "eager"),
        ("lstm", "layer", "aot_eager"),
    ],
)
def test_transforms_match_eager(cell: str, make: str, function: str, backend: str) -> None:
    """``torch.func`` inside compiled code, in one graph."""
    module = MAKERS[make](cell, 3, 4)
    x = sequence(2, 3) if make == "step" else sequence(3, 2, 3)
    parameters = dict(module.named_parameters())

    def call(p: dict[str, Tensor], x: Tensor) -> Tensor:
        result = functional_call(module, p, (x,))
        return result if isinstance(result, Tensor) else result[0]  # type: ignore[no-any-return]

    transformed = FUNCTIONS[function](call)
    expected = transformed(parameters, x)
    got = torch.compile(transformed, backend=backend, fullgraph=True)(parameters, x)
    torch.testing.assert_close(got, expected)


# --- packed sequences


@pytest.mark.parametrize("is_sorted", [True, False])
@layers("gru, stacked", "rnn_tanh, no bias", "lstm, projected")
def test_packed_input_and_output_are_in_one_graph(
    cell: str, options: dict[str, Any], is_sorted: bool
) -> None:
    """torch.nn does not support this."""
    module = build(cell, 3, 4, **options)
    lengths = [4, 2, 1] if is_sorted else [2, 4, 1]
    x = pack(sequence(7, 3), lengths, is_sorted)
    x = x._replace(data=x.data.detach().requires_grad_())
    twin = compiled(module)
    assert_equal(run(twin, x), run(module, x))
    hx = states(module, 3)
    assert_equal(run(twin, x, hx), run(module, x, hx))
    with torch.inference_mode():
        got, expected = twin.eval()(x), module.eval()(x)
    assert isinstance(got[0], PackedSequence)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_packed_input_compiles_once() -> None:
    module = build("lstm", SIZE, 4)
    count = Count()
    twin = compiled(module, count, dynamic=True)
    for lengths in ([2, 4, 5], [3, 5], [9, 2, 3, 4, 7], [2, 30]):
        x = pack(torch.randn(sum(lengths), SIZE), lengths, enforce_sorted=False)
        assert_equal(run(twin, x), run(module, x))
    assert count.graphs == 1


def test_wrong_states_of_packed_input_raise() -> None:
    """Wrong shapes raise while compiling; wrong batch_sizes raise at the call."""
    module = compiled(build("gru", 3, 4), fullgraph=False)
    x = pack(torch.randn(6, 3), [3, 2, 1], enforce_sorted=True)
    with pytest.raises(RuntimeError, match="batch_sizes must start with the batch size 2"):
        module(x, torch.zeros(1, 2, 4))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 3, 4\), got \[1, 3, 5\]"):
        module(x, torch.zeros(1, 3, 5))


class Packs(nn.Module):
    """A model that packs its padded input."""

    def __init__(self, recurrent: nn.Module, is_sorted: bool) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.is_sorted = is_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=self.is_sorted)
        output: Tensor = pad_packed_sequence(self.recurrent(packed)[0])[0]
        return output


@pytest.mark.parametrize("is_sorted", [True, False])
def test_layer_in_a_model_that_packs_is_one_graph(is_sorted: bool) -> None:
    """The graph contains the layer, but not the packing.

    Dynamo does not trace ``pack_padded_sequence`` and ``pad_packed_sequence`` (torch lists them as
    skipped, because their sizes depend on values), so ``fullgraph=True`` rejects such a model with
    any layer. Pack outside and pass the PackedSequence instead. The batch size of a sorted
    PackedSequence is only in the values of batch_sizes. Without an initial state, Dynamo must be
    allowed to read a number from it (``fullgraph`` or ``capture_scalar_outputs``), or the graph
    breaks there.
    """
    module = Packs(build("lstm", 3, 4, num_layers=2), is_sorted)
    count = Count()
    twin = compiled(module, count, fullgraph=False)
    x = sequence(4, 3, 3)
    lengths = torch.tensor([4, 2, 1] if is_sorted else [2, 4, 1])
    with torch._dynamo.config.patch(capture_scalar_outputs=is_sorted):
        assert_equal(run(twin, x, lengths), run(module, x, lengths))
    assert count.graphs == 1
    torch._dynamo.reset()
    assert_equal(run(twin, x, lengths), run(module, x, lengths))


# --- number of compilations


@pytest.mark.parametrize("way", ["dynamic", "marked", "automatic"])
@pytest.mark.parametrize(
    ("cell", "options", "is_training"),
    [("gru", {}, True), ("lstm", {}, False), ("lstm", {"num_layers": 2, "proj_size": 2}, True)],
)
def test_any_length_and_batch_runs_the_same_code(
    cell: str, options: dict[str, Any], is_training: bool, way: str
) -> None:
    module = build(cell, SIZE, 4, **options)
    count = Count()
    twin = compiled(module, count, dynamic=True if way == "dynamic" else None)
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, SIZE)
        if way == "marked":
            torch._dynamo.mark_dynamic(x, (0, 1))
        if is_training:
            assert_equal(run(twin, x), run(module, x))
        else:
            with torch.no_grad():
                assert torch.equal(twin(x)[0], module(x)[0])
    # without dynamic=True torch first compiles constant sizes
    assert count.graphs == (2 if way == "automatic" else 1)


def test_size_1_is_compiled_separately() -> None:
    """torch compiles size 1 separately, once, for any model."""
    module = build("lstm", SIZE, 4)
    count = Count()
    twin = compiled(module, count, dynamic=True)
    for graphs, sizes in enumerate(
        [[(5, 3), (4, 2)], [(5, 1), (7, 1)], [(1, 4), (1, 3)], [(1, 1)]]
    ):
        for steps, batch in sizes:
            x = sequence(steps, batch, SIZE)
            assert_equal(run(twin, x), run(module, x))
        assert count.graphs == graphs + 1


def test_any_batch_of_a_cell_runs_the_same_code() -> None:
    module = make_step("gru", SIZE, 4)
    count = Count()
    twin = compiled(module, count, dynamic=True)
    for batch in (3, 2, 9):
        x = sequence(batch, SIZE)
        assert_equal(run(twin, x), run(module, x))
    assert count.graphs == 1


def nodes(module: nn.Module, x: Tensor) -> list[int]:
    """Returns the number of nodes in the graphs of the forward and the backward pass."""
    counts = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    run(compiled(module, aot_autograd(fw_compiler=count, bw_compiler=count)), x)
    return counts


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_graphs_do_not_grow_with_steps(cell: str) -> None:
    """A layer is one node, so compile time does not depend on the number of steps."""
    module = build(cell, 3, 4, num_layers=2)
    few = nodes(module, sequence(3, 2, 3))
    assert len(few) == 2
    assert few == nodes(module, sequence(100, 2, 3))
    assert sum(few) < 80


# --- training, checkpoints, other types


def test_training_steps_do_not_recompile() -> None:
    module = build("lstm", 3, 4, num_layers=2)
    count = Count()
    twin = compiled(module, count)
    x = torch.randn(5, 2, 3)
    for model in (module, twin):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x)[0].square().sum().backward()
            optimizer.step()
    assert count.graphs == 1
    assert_equal(dict(twin.named_parameters()), dict(module.named_parameters()))


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_does_not_recompile(assign: bool) -> None:
    """Loads before and after compiling."""
    count = Count()
    others = [fastrnn.LSTM(3, 4, 2) for _ in range(3)]
    module = fastrnn.LSTM(3, 4, 2)
    module.load_state_dict(others[0].state_dict())
    wrapped = torch.compile(module, backend=count, fullgraph=True)
    x = torch.randn(5, 2, 3)
    assert torch.equal(wrapped(x)[0], others[0](x)[0])
    module.load_state_dict(others[1].state_dict(), assign=assign)
    assert torch.equal(wrapped(x)[0], others[1](x)[0])
    assert not assign or module._flat_weights[0] is module.weight_ih_l0
    prefixed = {f"_orig_mod.{name}": value for name, value in others[2].state_dict().items()}
    wrapped.load_state_dict(prefixed)
    assert torch.equal(wrapped(x)[0], others[2](x)[0])
    assert count.graphs == 1


def test_other_dtype_recompiles_and_matches_eager() -> None:
    module = build("gru", 3, 4, num_layers=2)
    count = Count()
    twin = compiled(module, count)
    x = sequence(5, 2, 3)
    before = run(twin, x)
    for dtype in (torch.float64, torch.bfloat16):
        wide = x.detach().to(dtype).requires_grad_()
        got = run(twin.to(dtype), wide)
        assert got["out0"].dtype == dtype
        assert_equal(got, run(copy.deepcopy(module).to(dtype), wide))
        module.to(dtype)
    assert count.graphs == 3
    assert before["out0"].dtype == torch.float32


@pytest.mark.parametrize(("options", "graphs"), [({"num_layers": 2, "dropout": 0.5}, 2), ({}, 1)])
def test_training_and_evaluation_share_code_without_dropout(
    options: dict[str, Any], graphs: int
) -> None:
    """With dropout there is one graph for each mode."""
    module = build("gru", 3, 4, **options)
    count = Count()
    twin = compiled(module, count)
    x = sequence(5, 2, 3)
    for _ in range(2):
        assert_equal(run(twin.train(), x), run(module.train(), x))
        assert_equal(run(twin.eval(), x), run(module.eval(), x))
    assert count.graphs == graphs


def test_parametrized_weight_gets_gradients() -> None:
    """Gradients reach the original Parameter, and the module keeps no traced tensor."""
    module = build("gru", 3, 4)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    twin = compiled(module)
    x = sequence(5, 2, 3)
    run(module, x)
    kept = list(twin._flat_weights)
    got = run(twin, x)
    assert_equal(got, run(module, x))
    assert "d_parametrizations.weight_hh_l0.original0" in got
    assert all(new is old for new, old in zip(twin._flat_weights, kept, strict=True))


def test_functional_call_matches_eager() -> None:
    module = build("lstm", 3, 4)
    x = torch.randn(5, 2, 3)
    weights = {name: torch.randn_like(p) for name, p in module.named_parameters()}

    def call(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, weights, (x,))[0]
        return output

    got = torch.compile(call, backend="aot_eager", fullgraph=True)(weights, x)
    assert torch.equal(got, call(weights, x))


# --- inductor, which compiles the graph to C++


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, STACKED], ids=["one layer", "stacked"])
@pytest.mark.parametrize("cell", CELLS)
def test_inductor_matches_eager(cell: str, options: dict[str, Any]) -> None:
    module = build(cell, 3, 4, **options)
    x = sequence(5, 2, 3)
    twin = compiled(module, "inductor")
    assert_agrees(run(twin, x), run(module, x), exact_run(module, x))
    with torch.no_grad():
        assert_agrees(twin(x), module(x), exact_call(module, x))


@pytest.mark.slow
@pytest.mark.parametrize("is_sorted", [True, False])
def test_inductor_with_packed_input_matches_eager(is_sorted: bool) -> None:
    module = build("lstm", SIZE, 4, num_layers=2)
    twin = compiled(module, "inductor", dynamic=True)
    for lengths in ([4, 2, 1], [9, 5]):
        x = pack(torch.randn(sum(lengths), SIZE), lengths[:: 1 if is_sorted else -1], is_sorted)
        with torch._dynamo.config.patch(error_on_recompile=lengths[0] == 9):
            got = run(twin, x)
        assert_agrees(got, run(module, x), exact_run(module, x))


@pytest.mark.slow
def test_inductor_code_runs_any_length() -> None:
    module = build("lstm", SIZE, 4, num_layers=2)
    twin = compiled(module, "inductor", dynamic=True)
    for steps, batch in SIZES:
        x = sequence(steps, batch, SIZE)
        with torch._dynamo.config.patch(error_on_recompile=steps != SIZES[0][0]):
            got = run(twin, x)
        assert_agrees(got, run(module, x), exact_run(module, x))
