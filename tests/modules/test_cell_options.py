"""The constructor options layer_norm, zoneout, recurrent_dropout and weight_dropout."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C
from fastrnn.backends import composite, recurrence
from fastrnn.diagnostics import diagnose
from fastrnn.engine import choose
from fastrnn.ops.recurrence import _draw_zone, saved_width
from fastrnn.reference import Parts
from fastrnn.spec import CELLS
from tests.support import raised
from tests.tolerance import assert_agrees, assert_same_in_double

I, H = 5, 7  # noqa: E741
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (fastrnn.LSTM, {}),
    "gru": (fastrnn.GRU, {}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "rnn_sigmoid": (fastrnn.RNN, {"nonlinearity": "sigmoid"}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.4},
    "all": {
        "layer_norm": True,
        "zoneout": 0.2,
        "recurrent_dropout": 0.3,
        "weight_dropout": 0.2,
    },
}
#: with kernels of their own
KERNEL_OPTIONS = [name for name in OPTIONS if name != "weight_dropout"]


def build(kind: str, options: str = "all", *args: Any, **kwargs: Any) -> Any:
    """Returns a layer whose parameters are all random."""
    cls, own = KINDS[kind]
    torch.manual_seed(1)
    layer = cls(I, kwargs.pop("hidden", H), *args, **own, **OPTIONS[options], **kwargs)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.startswith("gain") else 0.0, 0.4)
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
    """Returns the output of one layer with layer normalisation, as its documentation has it."""
    w = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()}
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    outputs = []
    for step in x:
        gates = (w["weight_ih"].shape[0],)
        of_x = layer_norm(linear(step, w["weight_ih"]), gates, w["gain_ih"], w["bias_ih"])
        of_h = layer_norm(linear(h, w["weight_hh"]), gates, w["gain_hh"], w["bias_hh"])
        if isinstance(layer, fastrnn.LSTM):
            i, f, g, o = (of_x + of_h).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            normal = layer_norm(c, (layer.hidden_size,), w["gain_c"], w["bias_c"])
            h = o.sigmoid() * normal.tanh()
        elif isinstance(layer, fastrnn.GRU):
            xr, xz, xn = of_x.chunk(3, -1)
            hr, hz, hn = of_h.chunk(3, -1)
            z = (xz + hz).sigmoid()
            h = (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h
        else:
            function = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}
            h = function[layer.nonlinearity](of_x + of_h)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm_is_as_documented(kind: str) -> None:
    layer = build(kind, "layer_norm").double()
    x = torch.randn(4, 3, I, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    ours = everything(lambda: layer(x)[0], leaves)
    assert_same_in_double(ours, everything(lambda: textbook(layer, x), leaves))


def test_the_names_of_the_parts() -> None:
    assert list(Parts._fields) == _C.recurrence_parts()


def ragged(packed: bool, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    if not packed:
        return torch.randn(5, 4, I, dtype=dtype, requires_grad=True)
    rows = [torch.randn(n, I, dtype=dtype) for n in (2, 5, 3, 3)]
    return pack_sequence(rows, enforce_sorted=False)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_agree_with_the_composite(kind: str, options: str, packed: bool) -> None:
    """Every schedule draws the same masks from the same seed."""
    layer = build(kind, options, 2, bidirectional=True).double()
    x = ragged(packed)
    leaves = list(layer.parameters()) + ([] if packed else [x])
    for mode in (True, False):
        layer.train(mode)
        ours = everything(lambda: seeded(layer, x), leaves)
        assert_same_in_double(ours, everything(lambda: by_composite(layer, x), leaves))


@pytest.mark.parametrize("options", KERNEL_OPTIONS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_the_kernels_run(kind: str, options: str) -> None:
    layer = build(kind, options)
    explanation = fastrnn.explain(layer, torch.zeros(3, 2, I))
    assert explanation.backend == recurrence.NAME
    if options == "recurrent_dropout":
        assert fastrnn.explain(layer.eval(), torch.zeros(3, 2, I)).backend == "kernels"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 1, 40), (6, 9, 65), (4, 33, 16), (0, 3, 8), (1, 2, 1)])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_relu"])
def test_shapes_and_threads(kind: str, shape: tuple[int, int, int], threads: int) -> None:
    steps, batch, hidden = shape
    layer = build(kind, "all", hidden=hidden, bias=steps != 4).double()
    x = torch.randn(max(steps, 1), batch, I, dtype=torch.float64)
    if steps == 0:
        x = x[:, :0]
        batch = 0
    before = torch.get_num_threads(), _C.max_threads()
    torch.set_num_threads(threads)
    try:
        leaves = list(layer.parameters())
        ours = everything(lambda: seeded(layer, x), leaves)
    finally:
        torch.set_num_threads(before[0])
    assert_same_in_double(ours, everything(lambda: by_composite(layer, x), leaves))


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("options", ["layer_norm", "zoneout"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_float32_on_every_instruction_set(kind: str, options: str, isa: str) -> None:
    layer = build(kind, options, hidden=33)
    x = torch.randn(12, 5, I)

    def run(module: Any, rows: Tensor) -> list[Tensor]:
        return everything(lambda: seeded(module, rows)[0], list(module.parameters()))

    def composite_run(module: Any, rows: Tensor) -> list[Tensor]:
        return everything(lambda: by_composite(module, rows)[0], list(module.parameters()))

    def exact(change: Any) -> list[Tensor]:
        module = copy.deepcopy(layer)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(change(parameter)))
        module.eval()  # the masks of another dtype would differ
        return composite_run(module, change(x))

    layer.eval()
    _C.set_isa(isa)
    try:
        ours = run(layer, x)
    finally:
        _C.set_isa("")
    assert_agrees(ours, composite_run(layer, x), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    layer = build("lstm", "layer_norm").to(dtype)
    x = torch.randn(4, 3, I).to(dtype)
    y, (h_n, c_n) = layer(x)
    assert y.dtype == h_n.dtype == c_n.dtype == dtype
    wide = copy.deepcopy(layer).float()
    assert torch.equal(y, wide(x.float())[0].to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.float())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_second_derivatives(kind: str) -> None:
    layer = build(kind, "layer_norm", hidden=3).double()
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda t: layer(t)[0], (x,))


def test_func_transforms() -> None:
    layer = build("gru", "layer_norm").double()
    x = torch.randn(3, 2, I, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, change = torch.func.jvp(lambda t: layer(t)[0], (x,), (tangent,))
    step = 1e-6 * tangent
    expected = (layer(x + step)[0] - layer(x - step)[0]) / 2e-6
    torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_compiled(kind: str, packed: bool) -> None:
    layer = build(kind, "layer_norm", 2, bidirectional=True).double()
    x = ragged(packed)
    leaves = list(layer.parameters())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same_in_double(
        everything(lambda: compiled(x), leaves), everything(lambda: layer(x), leaves)
    )


def test_compiled_masks_are_drawn_at_each_call() -> None:
    layer = build("lstm", "all")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, I)
    torch.testing.assert_close(seeded(compiled, x), seeded(layer, x))
    assert not torch.equal(compiled(x)[0], compiled(x)[0])


def test_exported() -> None:
    layer = build("lstm", "layer_norm").eval()
    x = torch.randn(4, 3, I)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_lengths_and_resets(kind: str) -> None:
    layer = build(kind, "layer_norm", 2, bidirectional=True, batch_first=True).double()
    x = torch.randn(3, 6, I, dtype=torch.float64)
    lengths = torch.tensor([4, 6, 1])
    y, hidden = layer(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        own, state = layer(x[b : b + 1, :length])
        torch.testing.assert_close(y[b : b + 1, :length], own)
        for ours, theirs in zip(tree_leaves(hidden), tree_leaves(state), strict=True):
            torch.testing.assert_close(ours[:, b], theirs[:, 0])
    assert not y[0, 4:].any()
    single = build(kind, "layer_norm").double()
    steps = torch.randn(6, 2, I, dtype=torch.float64)
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3] = True
    both = torch.cat([single(steps[:3])[0], single(steps[3:])[0]])
    torch.testing.assert_close(single(steps, resets=resets)[0], both)


def test_parameters_and_their_initial_values() -> None:
    layer = fastrnn.LSTM(I, H, 2, bidirectional=True, layer_norm=True)
    own = {n: p for n, p in layer.named_parameters() if n.startswith(("gain", "bias_c"))}
    assert len(own) == 4 * 4
    assert own["gain_ih_l1_reverse"].shape == own["gain_hh_l0"].shape == (4 * H,)
    assert own["gain_c_l0"].shape == own["bias_c_l1"].shape == (H,)
    for _ in range(2):
        for name, parameter in own.items():
            assert torch.equal(parameter, torch.full_like(parameter, name.startswith("gain")))
            nn.init.normal_(parameter)
        layer.reset_parameters()
    assert not [n for n, _ in fastrnn.GRU(I, H, layer_norm=True).named_parameters() if "_c_" in n]
    without = fastrnn.LSTM(I, H, bias=False, layer_norm=True)
    assert not [name for name, _ in without.named_parameters() if "bias" in name]
    assert (
        dict(fastrnn.LSTM(I, H, zoneout=0.5).named_parameters()).keys()
        == dict(nn.LSTM(I, H).named_parameters()).keys()
    )


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_copies_and_checkpoints(kind: str) -> None:
    layer = build(kind, "all", 2).eval()
    x = torch.randn(4, 3, I)
    expected = layer(x)[0]
    fresh = KINDS[kind][0](I, H, 2, **OPTIONS["all"]).eval()
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x)[0], expected)
        assert other.extra_repr() == layer.extra_repr()
    assert "layer_norm=True, zoneout=0.2, recurrent_dropout=0.3" in repr(layer)
    assert "layer_norm" not in repr(KINDS[kind][0](I, H))
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.gain_hh_l1.mul_(2)
    assert not torch.equal(copied(x)[0], expected)


def test_a_learned_initial_state_and_residual_layers() -> None:
    layer = build("lstm", "layer_norm", 2, learn_initial_state=True, residual=True).double()
    hidden = layer.h_0.detach(), layer.c_0.detach()
    x = torch.randn(4, 1, I, dtype=torch.float64)
    y, _ = layer(x)
    torch.testing.assert_close(y, layer(x, hidden)[0])
    y.sum().backward()
    assert layer.h_0.grad.abs().sum() > 0


def test_zoneout_keeps_units() -> None:
    layer = build("gru", "zoneout", hidden=64)
    x = torch.randn(30, 8, I)
    y = layer(x)[0]
    kept = (y[1:] == y[:-1]).double().mean().item()
    assert 0.25 < kept < 0.35  # of 15000 draws with probability 0.3
    layer = fastrnn.LSTM(I, 64, zoneout=(0.0, 1.0))
    y, (h_n, c_n) = layer(x)
    assert not y.any()
    assert not h_n.any()
    assert c_n.abs().sum() > 0
    layer = fastrnn.LSTM(I, 64, zoneout=(1.0, 0.0))
    assert not layer(x)[1][1].any()


def test_eval_mode_has_no_randomness() -> None:
    layer = build("lstm", "all").eval()
    x = torch.randn(4, 3, I)
    state = torch.get_rng_state()
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(torch.get_rng_state(), state)
    plain = fastrnn.LSTM(I, H)
    dropped = fastrnn.LSTM(I, H, recurrent_dropout=0.5, weight_dropout=0.5).eval()
    dropped.load_state_dict(plain.state_dict())
    assert torch.equal(dropped(x)[0], plain(x)[0])


def test_weight_dropout_draws_one_mask_per_call() -> None:
    layer = fastrnn.LSTM(I, H, weight_dropout=0.5)
    x = torch.randn(4, 3, I)
    y = seeded(layer, x)[0]
    torch.manual_seed(7)
    plain = nn.LSTM(I, H)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(7)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(nn.functional.dropout(layer.weight_hh_l0, 0.5))
    torch.testing.assert_close(y, plain(x)[0])
    with torch.no_grad():
        layer.weight_hh_l0.zero_()  # no stale weight
    assert not torch.equal(seeded(layer, x)[0], y)


@pytest.mark.parametrize(
    ("build_wrong", "message"),
    [
        (lambda: fastrnn.GRU(2, 3, layer_norm=1), "GRU: layer_norm must be a bool"),
        (lambda: fastrnn.GRU(2, 3, zoneout=1.5), "GRU: zoneout must be a number from 0 to 1"),
        (lambda: fastrnn.GRU(2, 3, zoneout=(0.1, 0.1)), "GRU: zoneout must be one number"),
        (lambda: fastrnn.LSTM(2, 3, zoneout=(0.1,)), "LSTM: zoneout must be one number or two"),
        (lambda: fastrnn.LSTM(2, 3, zoneout="x"), "LSTM: zoneout must be a number"),
        (lambda: fastrnn.RNN(2, 3, recurrent_dropout=-1), "RNN: recurrent_dropout must be"),
        (lambda: fastrnn.RNN(2, 3, weight_dropout=float("nan")), "RNN: weight_dropout must be"),
        (
            lambda: fastrnn.LSTM(2, 3, proj_size=1, layer_norm=True),
            "LSTM: proj_size must be 0 with layer_norm=True, got 1.",
        ),
        (
            lambda: fastrnn.LSTM(2, 3, recompute=4, zoneout=0.1),
            "LSTM: recompute must be 'none' with zoneout=0.1, got 4.",
        ),
        (lambda: fastrnn.LSTM(2, 3, layer_norm=True).eval().prepare(), "LSTM.prepare: the layer"),
        (lambda: fastrnn.LSTM(2, 3, layer_norm=True).stream(), "Session: layer must have neither"),
        (lambda: fastrnn.quantize(fastrnn.LSTM(2, 3, zoneout=0.1)), "fastrnn.quantize: the layer"),
        (lambda: torch.jit.script(fastrnn.LSTM(2, 3, zoneout=0.1)), "torch.jit.script: the layer"),
        (
            lambda: fastrnn.LSTM(2, 3, layer_norm=True)(
                torch.zeros(2, 2, 2), return_all_states=True
            ),
            "with return_all_states or return_gates",
        ),
        (
            lambda: fastrnn.GRU(2, 3, recurrent_dropout=0.5)(
                torch.zeros(2, 2, 2), return_gates=True
            ),
            "in training mode, no recurrent_dropout, got recurrent_dropout=0.5.",
        ),
    ],
)
def test_wrong_options_raise(build_wrong: Callable[[], Any], message: str) -> None:
    assert message in str(raised(build_wrong))


def test_states_of_layers_with_dropout() -> None:
    layer = build("gru", "recurrent_dropout", 2).eval()
    x = torch.randn(4, 3, I)
    y, _, extras = layer(x, return_all_states=True)
    assert torch.equal(y, layer(x)[0])
    torch.testing.assert_close(extras.states[:, 1], y)
    layer = build("gru", "weight_dropout")
    y, _, extras = seeded(layer, x, return_all_states=True)
    torch.testing.assert_close(y, seeded(layer, x)[0])
    torch.testing.assert_close(extras.states[:, 0], y)


def test_diagnose_rejects_the_options() -> None:
    for options in KERNEL_OPTIONS:
        error = raised(lambda own=options: diagnose(build("gru", own), torch.zeros(3, 2, I)))
        assert "must have no layer_norm, zoneout or recurrent_dropout" in str(error)
    layer = build("gru", "recurrent_dropout").eval()
    assert list(diagnose(layer, torch.ones(3, 2, I)).layers)


def _operator_arguments() -> dict[str, Any]:
    h = torch.zeros(2, 3)
    return {
        "pre_x": torch.zeros(4, 2, 12),
        "h0": h,
        "c0": h.clone(),
        "parts": [torch.zeros(12, 3)],
        "slots": 1,
        "batch_sizes": None,
        "reverse": False,
        "cell": "lstm",
        "epsilon": 1e-5,
        "saves": True,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"pre_x": torch.zeros(4, 2, 11)},
        {"pre_x": torch.zeros(4, 3, 12)},
        {"pre_x": torch.zeros(4, 2, 12).double()},
        {"pre_x": torch.zeros(8, 12)},
        {"h0": torch.zeros(2, 3).half()},
        {"h0": torch.zeros(2, 0)},
        {"h0": torch.zeros(1, 2, 3)},
        {"c0": None},
        {"c0": torch.zeros(2, 4)},
        {"parts": []},
        {"parts": [torch.zeros(12, 4)]},
        {"parts": [torch.zeros(12)], "slots": 2},
        {"slots": 0},
        {"slots": 1 << 20},
        {"slots": -1},
        {"slots": 1 << 4 | 1, "parts": [torch.zeros(12, 3), torch.zeros(3)]},
        {"slots": 1 << 6 | 1, "parts": [torch.zeros(12, 3), torch.zeros(7, 3)]},
        {"slots": 1 << 5 | 1, "parts": [torch.zeros(12, 3), torch.zeros(3, 3)]},
        {"batch_sizes": torch.tensor([2, 3])},
        {"batch_sizes": torch.tensor([2, 1]), "pre_x": torch.zeros(4, 12)},
        {"cell": "slstm"},
        {"cell": "x"},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"pre_x": torch.zeros(1 << 40, 2, 0)},
        {"pre_x": torch.zeros(1 << 40, 0), "batch_sizes": torch.tensor([2])},
        {"h0": torch.zeros(2, 3).to_sparse()},
        {"batch_sizes": torch.tensor([2.0]), "pre_x": torch.zeros(2, 12)},
    ],
    ids=str,
)
def test_the_operator_rejects_wrong_arguments(change: dict[str, Any]) -> None:
    operator = torch.ops.fastrnn.recurrence.default
    operator(**_operator_arguments())
    _assert_rejects(operator, {**_operator_arguments(), **change})


def _assert_rejects(operator: Any, arguments: dict[str, Any]) -> None:
    error = raised(lambda: operator(**arguments))
    if isinstance(error, NotImplementedError):  # of the dispatcher, for tensors of another kind
        return
    assert str(error).startswith("fastrnn: ")
    assert "the call failed" not in str(error)
    assert str(error).endswith(".")


def _gradient_arguments(cell: str = "lstm") -> dict[str, Any]:
    spec = CELLS[cell]
    own = _operator_arguments() | {"cell": cell, "pre_x": torch.zeros(4, 2, 3 * spec.gates)}
    own["parts"] = [torch.zeros(3 * spec.gates, 3)]
    if not spec.has_cell_state:
        own["c0"] = None
    y, _, _, saved = torch.ops.fastrnn.recurrence.default(**own)
    del own["pre_x"], own["saves"]
    gradients = {"d_y": torch.ones(4, 2, 3), "d_h_n": None, "d_c_n": None}
    return gradients | own | {"y": y, "saved": saved}


def _without_memory(*shape: int) -> Tensor:
    """Returns a tensor whose storage has been freed."""
    t = torch.zeros(shape)
    t.untyped_storage().resize_(0)
    return t


def _wrong(shape: tuple[int, ...]) -> list[Tensor]:
    """Returns tensors that must not stand for one of this shape."""
    longer = (*shape[:-1], shape[-1] + 1)
    return [
        torch.zeros(longer),
        torch.zeros(*shape, 1),
        torch.zeros(shape[1:]),
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(1 << 40, *shape[1:-1], 0),
        torch.zeros(shape, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.bfloat16),
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(shape, dtype=torch.complex64),
        torch.zeros(shape).to_sparse(),
        _without_memory(*shape),
    ]


@pytest.mark.parametrize("name", ["d_y", "d_h_n", "d_c_n", "h0", "c0", "y", "saved", "parts"])
def test_the_gradient_operator_rejects_wrong_tensors(name: str) -> None:
    operator = torch.ops.fastrnn.recurrence_gradients.default
    arguments = _gradient_arguments()
    value = arguments[name]
    if name == "parts":
        shape = tuple(value[0].shape)
    else:
        shape = (2, 3) if value is None else tuple(value.shape)
    for wrong in _wrong(shape):
        _assert_rejects(operator, {**arguments, name: [wrong] if name == "parts" else wrong})


@pytest.mark.parametrize(
    "change",
    [
        {"c0": None},
        {"parts": []},
        {"parts": [torch.zeros(12, 3)] * 2},
        {"slots": 0},
        {"slots": 1 << 40},
        {"slots": -1},
        # the width of saved depends on the parts
        {"slots": 1 << 2 | 1, "parts": [torch.zeros(12, 3), torch.ones(12)]},
        {"slots": 1 << 7 | 1, "parts": [torch.zeros(12, 3), torch.ones(1, 3)]},
        {"batch_sizes": torch.tensor([2, 2, 2, 2])},
        {"batch_sizes": torch.tensor([2, 1]), "y": torch.zeros(4, 3)},
        {"batch_sizes": torch.tensor([1, 2]), "y": torch.zeros(3, 3)},
        {"batch_sizes": torch.tensor([2, -1]), "y": torch.zeros(1, 3)},
        {"cell": "gru"},
        {"cell": "indrnn_tanh"},
        {"cell": ""},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
    ],
    ids=str,
)
def test_the_gradient_operator_rejects_wrong_arguments(change: dict[str, Any]) -> None:
    operator = torch.ops.fastrnn.recurrence_gradients.default
    _assert_rejects(operator, {**_gradient_arguments(), **change})


def test_the_gradient_operator_takes_gradients_that_are_absent_or_strided() -> None:
    operator = torch.ops.fastrnn.recurrence_gradients.default
    for cell in ("lstm", "gru", "rnn_tanh"):
        arguments = _gradient_arguments(cell)
        expected = operator(**arguments)
        strided = arguments["saved"].t().contiguous().t()
        expanded = torch.ones(()).expand(4, 2, 3)
        ours = operator(**{**arguments, "d_y": expanded, "saved": strided})
        assert all(map(torch.equal, ours, expected))
        for result in operator(**{**arguments, "d_y": None}):
            assert not result.any()
    _assert_rejects(operator, {**arguments, "d_c_n": torch.zeros(2, 3)})


def test_the_products_reject_wrong_tensors() -> None:
    product = torch.ops.fastrnn.recurrence_product.default
    gradients = torch.ops.fastrnn.recurrence_product_gradients.default
    d, x, w = torch.ones(4, 3), torch.ones(4, 5), torch.ones(3, 5)
    arguments = {"d": d, "x": x, "w": w}
    for name, value in arguments.items():
        for wrong in [*_wrong(tuple(value.shape)), value.t()]:
            _assert_rejects(gradients, {**arguments, name: wrong})
            if name != "d":
                _assert_rejects(product, {"x": x, "w": w, name: wrong})
    _assert_rejects(gradients, {"d": d, "x": None, "w": None})
    for half in (torch.float16, torch.bfloat16):
        _assert_rejects(product, {"x": x.to(half), "w": w.to(half)})
        _assert_rejects(gradients, {name: t.to(half) for name, t in arguments.items()})
    # the bytes of these results would be 4 MiB modulo 2^64
    many, most = 1 << 20, (1 << 42) + 1
    _assert_rejects(product, {"x": torch.zeros(many, 0), "w": torch.zeros(most, 0)})
    _assert_rejects(gradients, {"d": torch.zeros(0, many), "x": torch.zeros(0, most), "w": None})
    _assert_rejects(gradients, {"d": torch.zeros(many, 0), "x": None, "w": torch.zeros(0, most)})


@pytest.mark.parametrize(
    "sizes", [(3, 0, 2), (3, 2, 0), (0, 2, 3), (0, 0, 0), (1, 1, 1), (9, 4, 5)]
)
def test_products_of_any_size(sizes: tuple[int, int, int]) -> None:
    rows, units, columns = sizes
    d, x = torch.randn(rows, units).double(), torch.randn(rows, columns).double()
    w = torch.randn(units, columns).double()
    product = torch.ops.fastrnn.recurrence_product.default
    torch.testing.assert_close(product(x, w), x @ w.t())
    torch.testing.assert_close(product(x.t().contiguous().t(), w), x @ w.t())
    d_x, d_w, sums = torch.ops.fastrnn.recurrence_product_gradients.default(d, x, w)
    torch.testing.assert_close((d_x, d_w, sums), (d @ w, d.t() @ x, d.sum(0)))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_the_width_of_saved(kind: str) -> None:
    spec = CELLS[kind]
    arguments = _operator_arguments()
    arguments |= {"pre_x": torch.zeros(4, 2, spec.gates * 3), "cell": kind}
    if not spec.has_cell_state:
        arguments["c0"] = None
    every = Parts(
        torch.zeros(spec.gates * 3, 3),
        gain_h=torch.ones(spec.gates * 3),
        zone_h=torch.ones(1, 3),
        zone_c=torch.ones(1, 3) if spec.has_cell_state else None,
    )
    arguments["parts"] = [part for part in every if part is not None]
    arguments["slots"] = sum(1 << i for i, part in enumerate(every) if part is not None)
    saved = torch.ops.fastrnn.recurrence.default(**arguments)[3]
    assert saved.shape == (8, saved_width(spec, 3, arguments["slots"]))


def test_packed_rows_that_end_early_keep_their_state() -> None:
    layer = build("lstm", "zoneout").double()
    packed: PackedSequence = ragged(True)
    y, (h_n, _) = layer.eval()(packed)
    assert torch.equal(y.data[packed.batch_sizes.sum() - 1], h_n[0, 1])


GRADIENT_OPTIONS: list[dict[str, Any]] = [
    {"layer_norm": True},
    {"zoneout": 0.3},
    {"recurrent_dropout": 0.4},
]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", GRADIENT_OPTIONS, ids=str)
def test_create_graph_does_not_change_gradients_of_a_carried_state(
    cell: str, options: dict[str, Any]
) -> None:
    layer = getattr(fastrnn, cell)(3, 4, **options).double()
    x = torch.randn(2, 3, 2, 3, dtype=torch.double, requires_grad=True)

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        _, state = layer(x[0])
        y, _ = layer(x[1], state)
        loss = y.square().sum()
        return torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=create_graph)

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_vjp_and_jacrev_match_autograd(cell: str, is_frozen: bool) -> None:
    layer = getattr(fastrnn, cell)(3, 4, layer_norm=True).double().requires_grad_(not is_frozen)
    x = torch.randn(3, 2, 3, dtype=torch.double)

    def run(t: Tensor) -> Tensor:
        result: Tensor = layer(t)[0]
        return result

    expected = torch.autograd.functional.jacobian(run, x)
    torch.testing.assert_close(torch.func.jacrev(run)(x), expected)
    y, pull_back = torch.func.vjp(run, x)
    v = torch.randn_like(y)
    torch.testing.assert_close(pull_back(v)[0], torch.tensordot(v, expected, dims=3))


def test_second_derivatives_inside_autocast_keep_their_precision() -> None:
    layer = fastrnn.GRU(3, 4, layer_norm=True)
    x = torch.randn(3, 2, 3, requires_grad=True)
    y = layer(x)[0]
    (expected,) = torch.autograd.grad(y.sum(), [x], create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y.sum(), [x], create_graph=True)
    torch.testing.assert_close(found, expected)


def test_exported_with_dynamic_sizes() -> None:
    layer = fastrnn.LSTM(3, 4, layer_norm=True)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    program = torch.export.export(
        layer, (torch.randn(5, 3, 3),), dynamic_shapes=({0: steps, 1: batch},)
    )
    x = torch.randn(7, 2, 3)
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


def test_copies_for_inference_have_all_weights() -> None:
    layer = fastrnn.LSTM(3, 4, weight_dropout=0.5)
    assert layer.training
    x = torch.randn(5, 1, 3)
    with torch.no_grad():
        expected = copy.deepcopy(layer).eval()(x)[0]
        session = layer.stream()
        torch.testing.assert_close(session.run(x), expected)
        session.close()
        quantized = fastrnn.quantize(layer)(x)[0]
    assert (quantized - expected).abs().max() < 0.02


class Projected(nn.Module):
    """A layer whose input autocast rounds to bfloat16."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(I, I)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.linear(x))[0]
        return output


def _traced(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", (FutureWarning, DeprecationWarning, torch.jit.TracerWarning)
        )
        return torch.jit.trace(model, (x,), check_trace=False)


CAPTURES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "trace": _traced,
    "make_fx": lambda model, x: make_fx(model)(x),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("options", KERNEL_OPTIONS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_captured_graph_runs_under_autocast(kind: str, options: str, capture: str) -> None:
    """The graph draws the masks of the module, and backward runs."""
    model = Projected(build(kind, options, 2, bidirectional=True))
    x = torch.randn(4, 3, I)
    graph = CAPTURES[capture](model, x)
    torch.testing.assert_close(seeded(graph, x), seeded(model, x))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = seeded(graph, x), seeded(model, x)
    if capture != "make_fx":  # there the operator keeps values for gradients, in float32
        assert y.dtype == expected.dtype
        model.zero_grad()
        y.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert graph.linear.weight.grad.abs().sum() > 0
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02)


def test_a_training_step_captured_by_make_fx_runs_under_autocast() -> None:
    layer = build("lstm", "all")
    weights = dict(layer.named_parameters())

    def step(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y = torch.func.functional_call(layer, weights, (x,))[0]
        return torch.autograd.grad(y.square().sum(), list(weights.values()))

    x = torch.randn(4, 3, I)
    graph = make_fx(step)(x, weights)
    expected = seeded(step, x, weights)
    torch.testing.assert_close(seeded(graph, x, weights), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(seeded(graph, x, weights), expected)


@pytest.mark.parametrize("layout", ["padded", "batch first", "packed", "lengths", "jagged"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_masks_do_not_depend_on_the_layout(kind: str, layout: str) -> None:
    layer = build(kind, "all", 2, bidirectional=True)
    x = torch.randn(5, 3, I)
    torch.manual_seed(7)
    expected, state = layer(x)[0], torch.get_rng_state()
    torch.manual_seed(7)
    if layout == "packed":
        y = layer(pack_sequence([x[:, b] for b in range(3)]))[0].data.view(expected.shape)
    elif layout == "lengths":
        y = layer(x, lengths=torch.tensor([5, 5, 5]))[0]
    elif layout == "jagged":
        rows = torch.nested.nested_tensor([x[:, b] for b in range(3)], layout=torch.jagged)
        y = layer(rows)[0].values().view(3, 5, -1).transpose(0, 1)
    else:
        layer.batch_first = layout == "batch first"
        y = layer(x.transpose(0, 1))[0].transpose(0, 1) if layer.batch_first else layer(x)[0]
    torch.testing.assert_close(y, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_recompute_has_the_masks_of_other_schedules() -> None:
    layer = build("lstm", "weight_dropout")
    x = torch.randn(9, 3, I)
    leaves = list(layer.parameters())
    expected = everything(lambda: seeded(layer, x), leaves)
    layer.recompute = 2
    torch.testing.assert_close(everything(lambda: seeded(layer, x), leaves), expected)


def test_explain_and_rejected_calls_draw_nothing() -> None:
    layer = build("lstm", "all")
    dropped = build("lstm", "weight_dropout")
    state = torch.get_rng_state()
    x = torch.zeros(3, 2, I)
    for own in (layer, dropped):
        fastrnn.explain(own, x)
        fastrnn.explain(own, pack_sequence([x[:, 0]]))
        raised(lambda own=own: own(torch.zeros(3, 2, I + 1)))
    raised(dropped.prepare)
    dropped.stream().close()
    dropped.eval().prepare()(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [2.0**-18, 0.1, 0.7, 1 - 2.0**-18, 1.0])
def test_zoneout_draws_with_every_probability(p: float) -> None:
    torch.manual_seed(5)
    rows, units = 1 << 11, 1 << 11
    zone = _draw_zone(p, rows, units, torch.empty(0))
    assert torch.equal(zone, zone.bool().float())
    count = rows * units
    error = abs(zone.double().sum().item() - p * count)
    assert error <= 5 * (p * (1 - p) * count) ** 0.5 + 1e-5 * count * (0.001 < p < 0.999)
    assert 0 < zone.sum() < count or p == 1
    assert _draw_zone(0.3, 3, 7, torch.empty(0).double()).dtype == torch.float64


def test_options_can_be_changed_between_calls() -> None:
    x = torch.randn(4, 3, I)
    layer, plain = build("lstm", "zoneout").eval(), fastrnn.LSTM(I, H)
    plain.load_state_dict(layer.state_dict())
    plain.eval().prepare()
    plain.zoneout = 0.3
    assert torch.equal(plain(x)[0], layer(x)[0])
    plain.recurrent_dropout = plain.weight_dropout = 0.5
    assert "zoneout=0.3, recurrent_dropout=0.5, weight_dropout=0.5" in repr(plain)
    plain.zoneout = (0.0, 0.25)
    assert plain.zoneout == (0.0, 0.25)
    plain.zoneout = plain.recurrent_dropout = plain.weight_dropout = 0
    assert repr(plain) == repr(fastrnn.LSTM(I, H))
    assert fastrnn.explain(plain, x).backend == "kernels"
    assert "no setter" in str(raised(lambda: setattr(plain, "layer_norm", True)))
    projected = fastrnn.LSTM(I, H, proj_size=2)
    assert "proj_size must be 0" in str(raised(lambda: setattr(projected, "zoneout", 0.1)))
    assert not projected.zoneout
