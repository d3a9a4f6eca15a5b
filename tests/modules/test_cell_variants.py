"""The options reset_after, gate_activation, cell_clip and heads, and the minimal gated unit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, layer_norm, linear
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C
from fastrnn.backends import composite, kernels, recurrence
from fastrnn.diagnostics import diagnose
from fastrnn.engine import choose
from fastrnn.reference import LOOP_STEPS, LSTM_GATES, TWO_PRODUCTS
from fastrnn.spec import CELLS, LOOP_CELLS
from tests.support import raised
from tests.tolerance import assert_agrees, assert_same_in_double

I, H = 5, 7  # noqa: E741
#: a class and the arguments that select a variant of its cell
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gru_reset_before": (fastrnn.GRU, {"reset_after": False}),
    "gru_hard_sigmoid": (fastrnn.GRU, {"gate_activation": "hard_sigmoid"}),
    "gru_reset_before_hard_sigmoid": (
        fastrnn.GRU,
        {"reset_after": False, "gate_activation": "hard_sigmoid"},
    ),
    "lstm_hard_sigmoid": (fastrnn.LSTM, {"gate_activation": "hard_sigmoid"}),
    "mgu": (fastrnn.MGU, {}),
    "clipped": (fastrnn.LSTM, {"cell_clip": 0.3}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "all": {
        "layer_norm": True,
        "zoneout": 0.2,
        "recurrent_dropout": 0.3,
        "weight_dropout": 0.2,
    },
}


def build(variant: str, options: str = "alone", *args: Any, **kwargs: Any) -> Any:
    """Returns a layer whose parameters are all random, with many gates beyond the hard bounds."""
    cls, own = VARIANTS[variant]
    torch.manual_seed(1)
    layer = cls(I, kwargs.pop("hidden", H), *args, **own, **OPTIONS[options], **kwargs)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.startswith("gain") else 0.0, 0.8)
    return layer


def seeded(layer: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return layer(*args, **kwargs)


def by_composite(layer: Any, *args: Any, **kwargs: Any) -> Any:
    with choose.override(composite):
        return seeded(layer, *args, **kwargs)


def everything(run: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    """Returns the results of a call and the gradients of a function of them."""
    results = [t for t in tree_leaves(run()) if isinstance(t, Tensor) and t.is_floating_point()]
    loss = torch.stack([(t * t.cos()).sum() for t in results]).sum()
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [*results, *gradients]


def textbook(layer: Any, x: Tensor) -> Tensor:
    """Returns the output of one layer, as docs/cell_options.md has it."""
    w = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()}
    options = layer._cell_options
    gate = hardsigmoid if options.gate_activation == "hard_sigmoid" else torch.sigmoid
    units = layer.hidden_size
    h = c = x.new_zeros(x.shape[1], units)

    def of_h(state: Tensor, first: int, end: int) -> Tensor:
        rows = slice(first * units, end * units)
        product, bias = linear(state, w["weight_hh"][rows]), w["bias_hh"][rows]
        if "gain_hh" in w:
            return layer_norm(product, product.shape[-1:], w["gain_hh"][rows], bias)
        return product + bias

    outputs = []
    for step in x:
        of_x = linear(step, w["weight_ih"])
        if "gain_ih" in w:
            of_x = layer_norm(of_x, of_x.shape[-1:], w["gain_ih"], w["bias_ih"])
        else:
            of_x = of_x + w["bias_ih"]
        if isinstance(layer, fastrnn.LSTM):
            i, f, g, o = (of_x + of_h(h, 0, 4)).chunk(4, -1)
            c = gate(f) * c + gate(i) * g.tanh()
            if options.cell_clip is not None:
                c = c.clamp(-options.cell_clip, options.cell_clip)
            normal = c
            if "gain_c" in w:
                normal = layer_norm(c, (units,), w["gain_c"], w["bias_c"])
            h = gate(o) * normal.tanh()
        elif isinstance(layer, fastrnn.MGU):
            xf, xn = of_x.chunk(2, -1)
            f = gate(xf + of_h(h, 0, 1))
            h = (1 - f) * h + f * (xn + of_h(f * h, 1, 2)).tanh()
        elif options.reset_after:
            xr, xz, xn = of_x.chunk(3, -1)
            hr, hz, hn = of_h(h, 0, 3).chunk(3, -1)
            z = gate(xz + hz)
            h = (1 - z) * (xn + gate(xr + hr) * hn).tanh() + z * h
        else:
            xr, xz, xn = of_x.chunk(3, -1)
            hr, hz = of_h(h, 0, 2).chunk(2, -1)
            r, z = gate(xr + hr), gate(xz + hz)
            h = (1 - z) * (xn + of_h(r * h, 2, 3)).tanh() + z * h
        outputs.append(h)
    return torch.stack(outputs)


def test_every_cell_of_the_loops_has_a_definition() -> None:
    assert set(LOOP_CELLS) == {*LOOP_STEPS, *TWO_PRODUCTS, *LSTM_GATES} - set(CELLS)
    assert set(LOOP_CELLS) <= set(VARIANTS)
    assert {name for name, spec in LOOP_CELLS.items() if spec.second_gates} == set(TWO_PRODUCTS)


@pytest.mark.parametrize("options", ["alone", "layer_norm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_as_documented(variant: str, options: str) -> None:
    layer = build(variant, options).double()
    x = torch.randn(6, 3, I, dtype=torch.float64, requires_grad=True)
    assert fastrnn.explain(layer, x).backend == recurrence.NAME
    leaves = [x, *layer.parameters()]
    ours = everything(lambda: layer(x)[0], leaves)
    assert_same_in_double(ours, everything(lambda: textbook(layer, x), leaves))


def ragged(packed: bool, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    if not packed:
        return torch.randn(5, 4, I, dtype=dtype, requires_grad=True)
    rows = [torch.randn(n, I, dtype=dtype) for n in (2, 5, 3, 3)]
    return pack_sequence(rows, enforce_sorted=False)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_agree_with_the_composite(variant: str, options: str, packed: bool) -> None:
    layer = build(variant, options, 2, bidirectional=True, bias=options != "zoneout").double()
    x = ragged(packed)
    leaves = list(layer.parameters()) + ([] if packed else [x])
    for mode in (True, False):
        layer.train(mode)
        ours = everything(lambda: seeded(layer, x), leaves)
        assert_same_in_double(ours, everything(lambda: by_composite(layer, x), leaves))
        with torch.no_grad():  # nothing is saved
            results = [t for t in tree_leaves(seeded(layer, x)) if t.is_floating_point()]
        assert_same_in_double(results, ours[: len(results)])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 1, 40), (6, 9, 65), (4, 33, 16), (0, 3, 8), (1, 2, 1)])
@pytest.mark.parametrize("variant", ["gru_reset_before", "mgu", "clipped"])
def test_shapes_and_threads(variant: str, shape: tuple[int, int, int], threads: int) -> None:
    steps, batch, hidden = shape
    layer = build(variant, "all", hidden=hidden, bias=steps != 4).double()
    x = torch.randn(max(steps, 1), batch, I, dtype=torch.float64)
    if steps == 0:
        x = x[:, :0]
        batch = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = list(layer.parameters())
        ours = everything(lambda: seeded(layer, x), leaves)
    finally:
        torch.set_num_threads(before)
    assert_same_in_double(ours, everything(lambda: by_composite(layer, x), leaves))


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_on_every_instruction_set(variant: str, isa: str) -> None:
    layer = build(variant, "layer_norm", hidden=33)
    x = torch.randn(12, 5, I)

    def composite_run(module: Any, rows: Tensor) -> list[Tensor]:
        return everything(lambda: by_composite(module, rows)[0], list(module.parameters()))

    def exact(change: Any) -> list[Tensor]:
        module = copy.deepcopy(layer)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(change(parameter)))
        return composite_run(module, change(x))

    _C.set_isa(isa)
    try:
        ours = everything(lambda: layer(x)[0], list(layer.parameters()))
    finally:
        _C.set_isa("")
    assert_agrees(ours, composite_run(layer, x), exact)


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_types_are_computed_in_float32(variant: str) -> None:
    layer = build(variant).bfloat16()
    x = torch.randn(4, 3, I).bfloat16()
    y = layer(x)[0]
    wide = copy.deepcopy(layer).float()
    assert torch.equal(y, wide(x.float())[0].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.float())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives(variant: str) -> None:
    layer = build(variant, hidden=3).double()
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda t: layer(t)[0], (x,))
    tangent = torch.randn_like(x)
    _, change = torch.func.jvp(lambda t: layer(t)[0], (x.detach(),), (tangent,))
    step = 1e-6 * tangent
    expected = (layer(x + step)[0] - layer(x - step)[0]) / 2e-6
    torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def own_graphs() -> Iterator[None]:
    """Forgets compiled code before and after a test: Dynamo limits the graphs of a function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("own_graphs")
@pytest.mark.parametrize(
    ("variant", "packed"),
    [("gru_reset_before", True), ("clipped", False)],
    ids=["packed", "padded"],
)
def test_compiled(variant: str, packed: bool) -> None:
    layer = build(variant, "layer_norm", bidirectional=True).double()
    x = ragged(packed)
    leaves = list(layer.parameters())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same_in_double(
        everything(lambda: compiled(x), leaves), everything(lambda: layer(x), leaves)
    )


@pytest.mark.parametrize("variant", ["gru_reset_before", "lstm_hard_sigmoid", "clipped", "mgu"])
def test_exported(variant: str) -> None:
    layer = build(variant).eval()
    x = torch.randn(4, 3, I)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: steps, 1: batch},))
    x = torch.randn(7, 2, I)
    torch.testing.assert_close(program.module()(x), layer(x))


def assert_rows_are_sequences(layer: Any) -> None:
    """Checks lengths of a layer with batch_first, and resets of a layer of one direction."""
    x = torch.randn(3, 6, I, dtype=torch.float64)
    lengths = torch.tensor([4, 6, 1])
    y, hidden = layer(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        own, state = layer(x[b : b + 1, :length])
        torch.testing.assert_close(y[b : b + 1, :length], own)
        for ours, theirs in zip(tree_leaves(hidden), tree_leaves(state), strict=True):
            torch.testing.assert_close(ours[:, b], theirs[:, 0])
    assert not y[0, 4:].any()
    if layer.bidirectional:
        return
    resets = torch.zeros(3, 6, dtype=torch.bool)
    resets[:, 3] = True
    state = tuple(torch.randn_like(t) for t in tree_leaves(hidden))
    state = state if isinstance(hidden, tuple) else state[0]
    both = torch.cat([layer(x[:, :3])[0], layer(x[:, 3:], state)[0]], 1)
    torch.testing.assert_close(layer(x, resets=resets, reset_state=state)[0], both)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("variant", ["gru_reset_before", "clipped", "mgu"])
def test_lengths_and_resets(variant: str, bidirectional: bool) -> None:
    layers = 2 if bidirectional else 1
    layer = build(variant, "alone", layers, bidirectional=bidirectional, batch_first=True)
    assert_rows_are_sequences(layer.double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_checkpoints(variant: str) -> None:
    layer = build(variant, "all", 2).eval()
    x = torch.randn(4, 3, I)
    expected = layer(x)[0]
    cls, own = VARIANTS[variant]
    fresh = cls(I, H, 2, **own, **OPTIONS["all"]).eval()
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x)[0], expected)
        assert other.extra_repr() == layer.extra_repr()
    for name, value in own.items():
        assert f"{name}={value!r}" in repr(layer)
        assert name not in repr(cls(I, H))


def test_initial_values_are_those_of_the_plain_layer() -> None:
    for variant, (cls, own) in VARIANTS.items():
        if variant == "mgu":
            continue
        torch.manual_seed(2)
        layer = cls(I, H, **own)
        torch.manual_seed(2)
        for ours, plain in zip(layer.parameters(), cls(I, H).parameters(), strict=True):
            assert torch.equal(ours, plain)
    biased = fastrnn.LSTM(I, H, forget_bias=1.0, gate_activation="hard_sigmoid")
    biased.reset_parameters()
    total = biased.bias_ih_l0 + biased.bias_hh_l0
    assert torch.equal(total[H : 2 * H], torch.ones(H))


def test_a_gate_that_is_saturated_or_nan() -> None:
    layer = fastrnn.GRU(1, 1, bias=False, gate_activation="hard_sigmoid").double()
    for weight in layer.parameters():
        nn.init.ones_(weight)
    x = torch.tensor([[[4.0], [-4.0], [float("nan")]]], dtype=torch.float64, requires_grad=True)
    h = torch.full((1, 3, 1), 0.5, dtype=torch.float64)
    y, _ = layer(x, h)
    assert y[0, 0, 0] == 0.5  # z = 1
    assert y[0, 1, 0] == torch.tanh(x[0, 1, 0])  # z = 0 and r = 0
    assert y[0, 2, 0].isnan()
    (ours,) = torch.autograd.grad(y.sum(), x)
    with choose.override(composite):
        (theirs,) = torch.autograd.grad(layer(x, h)[0].sum(), x)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_the_cell_state_is_clipped() -> None:
    layer = fastrnn.LSTM(I, 40, cell_clip=0.05)
    y, (_, c_n) = layer(torch.randn(20, 4, I))
    assert c_n.abs().max() == 0.05
    assert (c_n.abs() == 0.05).any()
    assert y.abs().max() <= torch.tensor(0.05).tanh()
    wide = fastrnn.LSTM(I, 40, cell_clip=1e6)
    plain = fastrnn.LSTM(I, 40)
    wide.load_state_dict(plain.state_dict())
    x = torch.randn(6, 3, I)
    torch.testing.assert_close(wide(x), plain(x))


def test_clipped_projections() -> None:
    options: dict[str, Any] = {"cell_clip": 0.4, "gate_activation": "hard_sigmoid"}
    layer = fastrnn.LSTM(I, H, proj_size=3, proj_clip=0.1, **options).double()
    w = {name.removesuffix("_l0"): 3 * p.detach() for name, p in layer.named_parameters()}
    layer.load_state_dict({f"{name}_l0": p for name, p in w.items()})
    x = torch.randn(6, 2, I, dtype=torch.float64)
    assert fastrnn.explain(layer, x).backend == composite.NAME
    h, c = x.new_zeros(2, 3), x.new_zeros(2, H)
    outputs = []
    for step in x:
        of_x = linear(step, w["weight_ih"], w["bias_ih"])
        i, f, g, o = (of_x + linear(h, w["weight_hh"], w["bias_hh"])).chunk(4, -1)
        c = (hardsigmoid(f) * c + hardsigmoid(i) * g.tanh()).clamp(-0.4, 0.4)
        h = linear(hardsigmoid(o) * c.tanh(), w["weight_hr"]).clamp(-0.1, 0.1)
        outputs.append(h)
    y, (h_n, c_n) = layer(x)
    assert (y.abs() == 0.1).any()
    assert_same_in_double([y, h_n[0], c_n[0]], [torch.stack(outputs), h, c])
    lengths = torch.tensor([6, 3])
    torch.testing.assert_close(layer(x, lengths=lengths)[0][:3], y[:3])


def of_head(layer: Any, head: int) -> Any:
    """Returns one head of a single layer as a layer of its own."""
    units = layer.hidden_size // layer._cell_options.heads
    own = type(layer)(
        layer.input_size, units, bidirectional=layer.bidirectional, dtype=layer.weight_ih_l0.dtype
    )
    for name, weight in layer.named_parameters():
        gates = weight.shape[0] // layer.hidden_size
        rows = weight.detach().unflatten(0, (gates, -1, units))[:, head].flatten(0, 1)
        getattr(own, name).data.copy_(rows)
    return own


HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RNN": (fastrnn.RNN, {}),
    "LSTM": (fastrnn.LSTM, {}),
    "GRU": (fastrnn.GRU, {}),
    "MGU": (fastrnn.MGU, {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_independent_layers(name: str) -> None:
    cls, own = HEADS[name]
    layer = cls(I, 12, heads=3, bidirectional=True, **own).double()
    gates = layer.weight_ih_l0.shape[0] // 12
    assert layer.weight_hh_l0_reverse.shape == (gates * 12, 4)
    assert len(list(layer.parameters())) == 8
    x = torch.randn(5, 4, I, dtype=torch.float64)
    hx = tuple(torch.randn(2, 4, 12, dtype=torch.float64) for _ in range(2))
    hidden = hx if name == "LSTM" else hx[0]
    y, final = layer(x, hidden)
    for head in range(3):
        units = slice(4 * head, 4 * head + 4)
        states = tuple(t[..., units] for t in hx)
        expected, state = of_head(layer, head)(x, states if name == "LSTM" else states[0])
        torch.testing.assert_close(y.unflatten(-1, (2, 12))[..., units].flatten(2), expected)
        for ours, theirs in zip(tree_leaves(final), tree_leaves(state), strict=True):
            torch.testing.assert_close(ours[..., units], theirs)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_one_block_diagonal_product(name: str) -> None:
    cls, own = HEADS[name]
    layer = cls(I, 6, 2, heads=2, batch_first=True, residual=True, **own).double()
    dense = cls(I, 6, 2, batch_first=True, residual=True, **own).double()
    state = layer.state_dict()
    for key, weight in state.items():
        if key.startswith("weight_hh"):
            blocks = weight.unflatten(0, (-1, 2, 3))
            state[key] = torch.stack(
                [torch.block_diag(gate[0], gate[1]) for gate in blocks]
            ).flatten(0, 1)
    dense.load_state_dict(state)
    x = torch.randn(4, 5, I, dtype=torch.float64, requires_grad=True)
    ours = everything(lambda: layer(x), [x])
    assert_same_in_double(ours, everything(lambda: dense(x), [x]))
    packed = nn.utils.rnn.pack_padded_sequence(x.detach(), torch.tensor([5, 3, 2, 2]), True)
    assert_same_in_double([layer(packed)[0].data], [dense(packed)[0].data])


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.MGU])
def test_heads_with_lengths_and_resets(cls: Any) -> None:
    layer = cls(I, 6, 2, heads=3, batch_first=True).double()
    assert_rows_are_sequences(layer)


@pytest.mark.usefixtures("own_graphs")
def test_heads_with_everything_else() -> None:
    layer = fastrnn.GRU(
        I, 8, 2, heads=4, reset_after=False, zoneout=0.2, learn_initial_state=True, dropout=0.3
    )
    x = torch.randn(5, 3, I)
    assert torch.equal(seeded(layer, x)[0], seeded(layer, x)[0])
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.eval()
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], expected)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x)[0], expected)
    chunked = fastrnn.LSTM(I, 8, heads=2, recompute=2)
    plain = fastrnn.LSTM(I, 8, heads=2)
    plain.load_state_dict(chunked.state_dict())
    x.requires_grad_()
    torch.testing.assert_close(
        everything(lambda: chunked(x), [x]), everything(lambda: plain(x), [x])
    )
    assert fastrnn.explain(plain, x).backend == kernels.NAME
    half = fastrnn.LSTM(I, 8, heads=2).bfloat16()
    assert half(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build_wrong", "message"),
    [
        (lambda: fastrnn.LSTM(2, 3, cell_clip=0), "LSTM: cell_clip must be a positive number"),
        (lambda: fastrnn.LSTM(2, 3, cell_clip=True), "LSTM: cell_clip must be a positive number"),
        (
            lambda: fastrnn.LSTM(2, 3, cell_clip=float("inf")),
            "LSTM: cell_clip must be a positive number or None, got inf",
        ),
        (lambda: fastrnn.GRU(2, 3, cell_clip=1.0), "GRU: cell_clip is an option of LSTM only"),
        (
            lambda: fastrnn.GRU(2, 3, gate_activation="tanh"),
            "GRU: gate_activation must be one of 'sigmoid', 'hard_sigmoid', got 'tanh'",
        ),
        (
            lambda: fastrnn.RNN(2, 3, gate_activation="hard_sigmoid"),
            "RNN: gate_activation is an option of LSTM or GRU only",
        ),
        (lambda: fastrnn.GRU(2, 3, reset_after=0), "GRU: reset_after must be a bool, got 0"),
        (
            lambda: fastrnn.LSTM(2, 3, reset_after=False),
            "LSTM: reset_after is an option of GRU only, got False",
        ),
        (
            lambda: fastrnn.GRU(2, 10, heads=3),
            "GRU: heads must be a positive divisor of hidden_size 10, got 3",
        ),
        (lambda: fastrnn.GRU(2, 4, heads=True), "GRU: heads must be a positive divisor"),
        (lambda: fastrnn.GRU(2, 4, heads=0), "GRU: heads must be a positive divisor"),
        (
            lambda: fastrnn.LSTM(2, 4, heads=2, proj_size=2),
            "LSTM: proj_size must be 0 with heads=2, got 2",
        ),
        (
            lambda: fastrnn.LSTM(2, 4, heads=2, layer_norm=True),
            "LSTM: heads must be 1 with layer_norm=True, got 2",
        ),
        (
            lambda: fastrnn.GRU(2, 3, reset_after=False, recompute=4),
            "GRU: recompute must be 'none' with reset_after=False, got 4",
        ),
        (lambda: fastrnn.MGU(2, 3, recompute=4), "MGU: recompute must be 'none'"),
        (
            lambda: fastrnn.LSTM(2, 4, cell_clip=1.0, zoneout=0.5, proj_size=2),
            "LSTM: proj_size must be 0 with zoneout=0.5, cell_clip=1.0, got 2",
        ),
        (
            lambda: fastrnn.LSTM(2, 4, proj_clip=1.0),
            "LSTM: proj_size must be positive with proj_clip=1.0, got 0",
        ),
        (lambda: fastrnn.GRU(2, 4, proj_clip=1.0), "GRU: proj_clip is an option of LSTM only"),
    ],
)
def test_wrong_arguments(build_wrong: Callable[[], Any], message: str) -> None:
    assert str(raised(build_wrong)).startswith(message)


@pytest.mark.parametrize("name", ["mgu", "gru_reset_before", "heads"])
def test_what_plain_layers_alone_can_do(name: str) -> None:
    layer = fastrnn.LSTM(I, 8, heads=2) if name == "heads" else build(name)
    layer.eval()
    x = torch.randn(3, 2, I)
    calls: list[Callable[[], Any]] = [
        layer.prepare,
        layer.stream,
        lambda: fastrnn.quantize(layer),
        lambda: torch.jit.script(layer),
    ]
    if name != "mgu":
        calls.append(lambda: layer(x, return_all_states=True))
    calls.append(lambda: diagnose(layer, x))
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match=r"must have|must be|must hold"):
            call()
