"""Layers of cells that torch.nn lacks, and the LSTM with peepholes and coupled gates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import batch_norm, layer_norm, logsigmoid
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import init
from fastrnn.backends import composite, kernels, recurrence
from fastrnn.engine import choose

F64 = torch.float64
T, B, IN, H = 6, 3, 4, 5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "IndRNN": ("IndRNN", {}),
    "IndRNN tanh": ("IndRNN", {"nonlinearity": "tanh"}),
    "SLSTM": ("SLSTM", {}),
    "JANET": ("JANET", {"beta": 0.5}),
    "LiGRU": ("LiGRU", {"normalization": None}),
    "LiGRU layernorm": ("LiGRU", {"normalization": "layernorm"}),
    "LiGRU batchnorm": ("LiGRU", {}),
    "FastGRNN": ("FastGRNN", {}),
    "FastGRNN ranks": ("FastGRNN", {"w_rank": 2, "u_rank": 3}),
    "peephole": ("LSTM", {"peephole": True}),
    "coupled": ("LSTM", {"coupled_gates": True}),
    "both": ("LSTM", {"coupled_gates": True, "peephole": True}),
    "projected": ("LSTM", {"coupled_gates": True, "proj_size": 2}),
}
#: the backend of each case that does not run by the plain kernels
BACKENDS = {"LiGRU layernorm": recurrence.NAME}
every_case = pytest.mark.parametrize("case", CASES)
#: cases with code of their own in Python; the others are slow
FAST = ["SLSTM", "LiGRU batchnorm", "FastGRNN ranks", "both"]
mostly_slow = pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)


def build(case: str, *sizes: int, dtype: torch.dtype = F64, **options: Any) -> Any:
    name, own = CASES[case]
    torch.manual_seed(17)
    layer = getattr(fastrnn, name)(*(sizes or (IN, H)), dtype=dtype, **own, **options)
    with torch.no_grad():
        for parameter in layer.parameters():  # none is at a special value
            parameter.add_(0.3 * torch.rand_like(parameter))
        for buffer in layer.buffers():
            buffer.add_(0.3 * torch.rand_like(buffer))
    return layer


def states_of(layer: Any) -> int:
    return {"SLSTM": 4, "LSTM": 2}.get(type(layer).__name__, 1)


def make_states(layer: Any, batch: int = B, steps: int | None = None) -> Any:
    """Random states; the normaliser of an sLSTM is positive."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_dtype or next(layer.parameters()).dtype
    lead = () if steps is None else (steps,)
    sizes = [layer.proj_size or layer.hidden_size, *[layer.hidden_size] * (states_of(layer) - 1)]
    found = [torch.rand(*lead, count, batch, size, dtype=dtype) + 0.1 for size in sizes]
    return tuple(found) if len(found) > 1 else found[0]


def input_side(layer: Any, x: Tensor, of: Callable[[str], Tensor], inside: Tensor) -> Tensor:
    """Returns W x + b, normalised for a LiGRU, of all steps; ``inside``: the rows that count."""
    if isinstance(layer, fastrnn.FastGRNN):
        if layer.w_rank is None:
            return x @ of("weight_ih").t()
        return x @ of("weight_ih_right").t() @ of("weight_ih_left").t()
    product = x @ of("weight_ih").t()
    kind = getattr(layer, "normalization", None)
    if kind == "layernorm":
        return layer_norm(product, product.shape[-1:], of("gain_ih"), of("bias_ih"))
    if kind == "batchnorm":
        gain, bias = of("gain_ih"), of("bias_ih")
        if not layer.training:
            mean, variance = of("running_mean"), of("running_var")
            return batch_norm(product.flatten(0, 1), mean, variance, gain, bias).view_as(product)
        rows = product[inside]
        mean, variance = rows.mean(0), rows.var(0, correction=0)
        return (product - mean) / (variance + 1e-5).sqrt() * gain + bias
    return product + of("bias_ih")


def step(layer: Any, x: Tensor, states: list[Tensor], of: Callable[[str], Tensor]) -> list[Tensor]:
    """One step as in the papers, from the input side [B,G*H]."""
    h, sigmoid, tanh = states[0], torch.sigmoid, torch.tanh
    name = type(layer).__name__
    if name == "IndRNN":
        activation = tanh if layer.mode == "INDRNN_TANH" else torch.relu
        return [activation(x + of("u") * h)]
    if name == "FastGRNN":
        if layer.u_rank is None:
            a = x + h @ of("weight_hh").t()
        else:
            a = x + h @ of("weight_hh_right").t() @ of("weight_hh_left").t()
        z, g = sigmoid(a + of("bias_z")), tanh(a + of("bias_h"))
        return [(sigmoid(of("zeta")) * (1 - z) + sigmoid(of("nu"))) * g + z * h]
    gates = x + h @ of("weight_hh").t() + of("bias_hh")
    if name == "JANET":
        s, g = gates.chunk(2, -1)
        return [sigmoid(s) * h + (1 - sigmoid(s - layer.beta)) * tanh(g)]
    if name == "LiGRU":  # as in SpeechBrain
        a, z = gates.chunk(2, -1)
        z = sigmoid(z)
        return [z * h + (1 - z) * torch.relu(a)]
    c = states[1]
    if name == "SLSTM":
        i, f, z, o = gates.chunk(4, -1)
        n, m = states[2:]
        m_next = torch.maximum(logsigmoid(f) + m, i)
        i, f = torch.exp(i - m_next), torch.exp(logsigmoid(f) + m - m_next)
        c, n = f * c + i * tanh(z), f * n + i
        return [sigmoid(o) * c / n, c, n, m_next]
    options = layer._cell_options
    if options.coupled_gates:
        f, g, o = gates.chunk(3, -1)
        f = sigmoid(f + (of("w_cf") * c if options.peephole else 0))
        i = 1 - f
    else:
        i, f, g, o = gates.chunk(4, -1)
        i, f = sigmoid(i + of("w_ci") * c), sigmoid(f + of("w_cf") * c)
    c = f * c + i * tanh(g)
    h = sigmoid(o + (of("w_co") * c if options.peephole else 0)) * tanh(c)
    return [h @ of("weight_hr").t() if layer.proj_size else h, c]


def loop(
    layer: Any,
    x: Tensor,
    hx: Any,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> tuple[Tensor, Any]:
    """Runs all layers of a time-major batch step by step; the states of ended rows stay."""
    directions = 2 if layer.bidirectional else 1
    initial = [hx] if isinstance(hx, Tensor) else list(hx)
    after_reset = [torch.zeros_like(s) for s in initial]
    if reset_state is not None:
        after_reset = [reset_state] if isinstance(reset_state, Tensor) else list(reset_state)
    steps = torch.arange(len(x)).unsqueeze(1)
    inside = steps < (torch.full((x.shape[1],), len(x)) if lengths is None else lengths)
    final: list[list[Tensor]] = []
    for k in range(layer.num_layers):
        outputs = []
        for d in range(directions):
            index = k * directions + d

            def of(name: str, k: int = k, d: int = d) -> Tensor:
                return getattr(layer, f"{name}_l{k}" + ("_reverse" if d else ""))

            pre = input_side(layer, x, of, inside)
            states = [s[index] for s in initial]
            rows: list[Any] = [None] * len(x)
            for t in reversed(range(len(x))) if d else range(len(x)):
                here = inside[t].unsqueeze(1)
                if resets is not None:
                    mask = resets[t].unsqueeze(1) & here
                    own = [(s if s.dim() == 3 else s[t])[index] for s in after_reset]
                    states = [torch.where(mask, r, s) for r, s in zip(own, states, strict=True)]
                after = step(layer, pre[t], states, of)
                states = [torch.where(here, a, s) for a, s in zip(after, states, strict=True)]
                rows[t] = torch.where(here, states[0], torch.zeros_like(states[0]))
            outputs.append(torch.stack(rows))
            final.append(states)
        x = torch.cat(outputs, -1)
    last = tuple(torch.stack(own) for own in zip(*final, strict=True))
    return x, last if len(last) > 1 else last[0]


def with_gradients(layer: Any, call: Callable[..., Any], x: Tensor, hx: Any) -> list[Tensor]:
    leaves = [x, *tree_leaves(hx), *layer.parameters()]
    results = tree_leaves(call())
    loss = sum(((1 + t) * t.sin()).sum() for t in results)
    return [*results, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


def inputs(layer: Any) -> tuple[Tensor, Any]:
    x = torch.randn(T, B, IN, dtype=F64, requires_grad=True)
    hx = make_states(layer)
    for state in tree_leaves(hx):
        state.requires_grad_()
    return x, hx


class TestLoop:
    """The results and all gradients are those of a loop over the steps."""

    @every_case
    @pytest.mark.parametrize("marks", ["none", "lengths", "resets", "both"])
    def test_padded(self, case: str, marks: str) -> None:
        layer = build(case, num_layers=2, bidirectional=True)
        x, hx = inputs(layer)
        given: dict[str, Any] = {}
        if marks in ("lengths", "both"):
            given["lengths"] = torch.tensor([4, T, 2])
        if marks in ("resets", "both"):
            given["resets"] = torch.rand(T, B) > 0.6
            given["reset_state"] = make_states(layer, steps=T if marks == "both" else None)
        ours = with_gradients(layer, lambda: layer(x, hx, **given), x, hx)
        theirs = with_gradients(layer, lambda: loop(layer, x, hx, **given), x, hx)
        assert_same_in_double(ours, theirs)

    @every_case
    def test_one_layer_in_eval_mode(self, case: str) -> None:
        layer = build(case, batch_first=True).eval()
        x, hx = inputs(layer)
        ours = with_gradients(layer, lambda: layer(x.transpose(0, 1), hx)[0], x, hx)
        theirs = with_gradients(layer, lambda: loop(layer, x, hx)[0].transpose(0, 1), x, hx)
        assert_same_in_double(ours, theirs)

    @every_case
    def test_packed_and_unbatched(self, case: str) -> None:
        layer = build(case, bidirectional=True).eval()
        x, hx = torch.randn(T, B, IN, dtype=F64), make_states(layer)
        lengths = torch.tensor([2, T, 5])
        packed, hidden = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        output, expected = loop(layer, x, hx, lengths)
        data = pack_padded_sequence(output, lengths, enforce_sorted=False).data
        assert_same_in_double((packed.data, hidden), (data, expected))
        output, hidden = layer(x[:, 0])
        zeros = [torch.zeros_like(state[:, :1]) for state in tree_leaves(hx)]
        expected_output, expected = loop(layer, x[:, :1], zeros if len(zeros) > 1 else zeros[0])
        assert_same_in_double(output, expected_output.squeeze(1))

    @every_case
    def test_residual_dropout_and_recompute(self, case: str) -> None:
        layer = build(case, num_layers=3, dropout=0.5, residual=True)
        x = torch.randn(T, B, IN, dtype=F64)
        torch.manual_seed(1)
        expected = layer(x)
        with choose.override(composite):
            torch.manual_seed(1)
            if case not in BACKENDS:
                assert_same_in_double(layer(x), expected)
        if case in BACKENDS:
            return
        layer.recompute = 2
        torch.manual_seed(1)
        assert_same_in_double(layer(x), expected)


@mostly_slow
def test_derivatives(case: str) -> None:
    layer = build(case, 2, 3)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Any:
        named = dict(zip(names, values, strict=True))
        named |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return tree_leaves(functional_call(layer, named, (x,)))

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x: call(x, *parameters)[0], (x,))


@every_case
def test_explain_names_the_cell(case: str) -> None:
    layer = build(case, dtype=torch.float32)
    found = fastrnn.explain(layer, torch.randn(T, B, IN))
    assert found.backend == BACKENDS.get(case, kernels.NAME)
    cell = {"LSTM": "peephole_lstm" if layer.mode.startswith("PEEP") else "lstm"}
    name = cell.get(type(layer).__name__, layer.mode.lower())
    assert str(found).startswith(f"{name}, 1 layer(s)")


@every_case
def test_copies(case: str) -> None:
    layer = build(case, num_layers=2).eval()
    x = torch.randn(T, B, IN, dtype=F64)
    expected = layer(x)[0]
    other = copy.deepcopy(layer)
    other.reset_parameters()
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(same(x)[0], expected)
        assert repr(same) == repr(layer)


@mostly_slow
def test_graphs(case: str) -> None:
    torch.compiler.reset()  # all cases share the code of forward
    layer = build(case, num_layers=2, bidirectional=True)
    twin = copy.deepcopy(layer)
    x = torch.randn(T, B, IN, dtype=F64)
    expected = layer(x)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    assert_same_in_double(compiled, expected)
    assert_same_in_double(dict(twin.named_buffers()), dict(layer.named_buffers()))
    for found in (compiled, expected):
        found[0].sum().backward()
    for own, other in zip(twin.parameters(), layer.parameters(), strict=True):
        assert_same_in_double(own.grad, other.grad)
    layer.eval()
    exported = torch.export.export(layer, (x,)).module()
    assert_same_in_double(exported(x), layer(x))


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_computed_in_float32(case: str, dtype: torch.dtype) -> None:
    layer = build(case, dtype=dtype).eval()
    x = torch.randn(T, B, IN, dtype=dtype)
    output = layer(x)[0]
    assert output.dtype == dtype
    if case in ("peephole", "IndRNN", "IndRNN tanh", "SLSTM", "JANET") or case == "LiGRU":
        wide = copy.deepcopy(layer).float()
        assert torch.equal(output, wide(x.float())[0].to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        wide = copy.deepcopy(layer).float()
        assert wide(x.float())[0].dtype == torch.bfloat16
        wide.train()(x.float())[0].float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in wide.parameters())


class TestBatchNorm:
    """``LiGRU(normalization="batchnorm")`` against ``torch.nn.BatchNorm1d`` of the product."""

    def norm(self, layer: Any) -> nn.BatchNorm1d:
        norm = nn.BatchNorm1d(2 * H, momentum=0.05, dtype=F64)
        values = {"weight": layer.gain_ih_l0, "bias": layer.bias_ih_l0}
        values |= {"running_mean": layer.running_mean_l0, "running_var": layer.running_var_l0}
        with torch.no_grad():
            for name, value in values.items():
                getattr(norm, name).copy_(value)
        return norm

    @pytest.mark.parametrize("bias", [False, True])
    def test_statistics_follow(self, bias: bool) -> None:
        torch.manual_seed(3)
        layer = fastrnn.LiGRU(IN, H, bias=bias, dtype=F64)
        norm = nn.BatchNorm1d(2 * H, momentum=0.05, affine=bias, dtype=F64)
        plain = fastrnn.LiGRU(2 * H, H, normalization=None, dtype=F64)
        with torch.no_grad():
            plain.weight_ih_l0.copy_(torch.eye(2 * H))
            plain.weight_hh_l0.copy_(layer.weight_hh_l0)
            plain.bias_ih_l0.zero_()
            plain.bias_hh_l0.zero_()
        for training in (True, True, False):
            layer.train(training)
            norm.train(training)
            x = 3 * torch.randn(T, B, IN, dtype=F64) + 1
            product = x @ layer.weight_ih_l0.t()
            normal = norm(product.flatten(0, 1)).view_as(product)
            assert_same_in_double(layer(x), plain(normal))
            statistics = layer.running_mean_l0, layer.running_var_l0
            assert_same_in_double(statistics, (norm.running_mean, norm.running_var))

    def test_rows_beyond_the_lengths_do_not_count(self) -> None:
        layer = build("LiGRU batchnorm", num_layers=2, bidirectional=True)
        x, lengths = torch.randn(T, B, IN, dtype=F64), torch.tensor([2, T, 3])
        other = x.clone()
        other[3:, 0] = 100
        other[4:, 2] = float("nan")
        twin = copy.deepcopy(layer)
        assert_same_in_double(layer(x, lengths=lengths), twin(other, lengths=lengths))
        assert_same_in_double(dict(layer.named_buffers()), dict(twin.named_buffers()))
        layer(x, lengths=torch.zeros(B, dtype=torch.int64))
        assert all(buffer.isfinite().all() for buffer in layer.buffers())
        with pytest.raises(ValueError, match=r"lengths must have the shape \[3\], got \[2\]"):
            layer(x, lengths=lengths[:2])

    def test_one_row_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"needs more than 1 row .* got 1"):
            build("LiGRU batchnorm")(torch.randn(1, 1, IN, dtype=F64))

    def test_session_has_the_running_statistics(self) -> None:
        layer = build("LiGRU batchnorm", num_layers=2, dtype=torch.float32).eval()
        assert_streams(layer)
        with pytest.raises(RuntimeError, match=r"LiGRU\.stream: the layer must be in eval mode"):
            layer.train().stream()


def assert_streams(layer: Any) -> None:
    x = torch.randn(T, B, IN)
    session = layer.stream(B)
    with torch.no_grad():
        steps = torch.stack([session.step(row).clone() for row in x])
        torch.testing.assert_close(steps, layer(x)[0])


@pytest.mark.parametrize("case", ["LiGRU", "coupled", "projected"])
def test_sessions(case: str) -> None:
    assert_streams(build(case, num_layers=2, dtype=torch.float32).eval())


def test_prepared_weights() -> None:
    layer = build("LiGRU", dtype=torch.float32).eval()
    x = torch.randn(T, B, IN)
    with torch.no_grad():
        expected = layer(x)[0]
        assert fastrnn.explain(layer.prepare(), x).backend == "prepared weights"
        torch.testing.assert_close(layer(x)[0], expected)


class TestLSTM:
    def test_peepholes_of_zero_change_nothing(self) -> None:
        layer = build("peephole", num_layers=2, bidirectional=True)
        plain = fastrnn.LSTM(IN, H, 2, bidirectional=True, dtype=F64)
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "w_c" not in k})
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "w_c" in name:
                    parameter.zero_()
        x = torch.randn(T, B, IN, dtype=F64)
        assert_same_in_double(layer(x), plain(x))

    def test_coupled_gates_are_an_lstm_with_minus_the_rows(self) -> None:
        layer = build("coupled")
        plain = fastrnn.LSTM(IN, H, dtype=F64)
        assert layer.weight_ih_l0.shape == (3 * H, IN)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                own = getattr(layer, name)
                parameter.copy_(torch.cat([-own[:H], own]))
        x = torch.randn(T, B, IN, dtype=F64)
        output, _, extras = layer(x, return_all_states=True, return_gates=True)
        assert torch.equal(output, plain(x)[0])
        assert_same_in_double(extras.gates["i"], 1 - extras.gates["f"])

    def test_states_of_every_step(self) -> None:
        layer = build("peephole")
        x = torch.randn(T, B, IN, dtype=F64)
        output, (_, c_n), extras = layer(x, return_all_states=True)
        assert torch.equal(extras.states[0].squeeze(1), output)
        assert_same_in_double(extras.states[1][-1], c_n)
        message = "return_gates must be False with peephole=True"
        with pytest.raises(ValueError, match=message):
            layer(x, return_gates=True)

    def test_learned_states_and_forget_bias(self) -> None:
        for case in ("peephole", "coupled"):
            layer = build(case, learn_initial_state=True)
            init.forget_bias_(layer, 3.0)
            gate = 1 if case == "peephole" else 0
            total = (layer.bias_ih_l0 + layer.bias_hh_l0).unflatten(0, (-1, H))
            assert torch.equal(total[gate], torch.full((H,), 3.0, dtype=F64))
            assert not torch.equal(total[gate + 1], total[gate])
            layer(torch.randn(T, B, IN, dtype=F64))[0].sum().backward()
            assert layer.c_0.grad is not None

    def test_options_of_the_cell(self) -> None:
        """Zoneout and recurrent dropout of coupled gates are those of four gates."""
        options = {"zoneout": 0.3, "recurrent_dropout": 0.25}
        layer = build("coupled", **options)
        plain = fastrnn.LSTM(IN, H, dtype=F64, **options)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                own = getattr(layer, name)
                parameter.copy_(torch.cat([-own[:H], own]))
        x, results = torch.randn(T, B, IN, dtype=F64), []
        for module in (layer, plain):
            torch.manual_seed(2)
            results.append(module(x)[0])
        assert torch.equal(*results)
        layer = build("coupled", weight_dropout=0.5)
        _, _, extras = layer(x, return_gates=True)
        assert_same_in_double(extras.gates["i"], 1 - extras.gates["f"])


def test_options_of_a_ligru() -> None:
    """The options of a cell that the LiGRU shares with the GRU."""
    options = {"zoneout": 0.3, "recurrent_dropout": 0.25, "weight_dropout": 0.1}
    for case in ("LiGRU", "LiGRU batchnorm", "LiGRU layernorm"):
        layer = build(case, num_layers=2, **options)
        x = torch.randn(T, B, IN, dtype=F64)
        results = []
        for backend in (recurrence, composite):
            twin = copy.deepcopy(layer)
            torch.manual_seed(2)
            with choose.override(backend):
                results.append(twin(x)[0])
        assert_same_in_double(*results)
    normal = fastrnn.LiGRU(IN, H, normalization=None, layer_norm=True)
    assert normal.gain_hh_l0.shape == (2 * H,)
    normal(torch.randn(T, B, IN))[0].sum().backward()


def test_initial_values() -> None:
    layer = fastrnn.JANET(IN, 1000, t_max=100)
    gate, candidate = layer.bias_ih_l0.chunk(2)
    assert 0 <= gate.min() < 0.5
    assert 4.4 < gate.max() <= torch.tensor(99.0).log()
    assert candidate.count_nonzero() == layer.bias_hh_l0.count_nonzero() == 0
    ligru = init.chrono_(fastrnn.LiGRU(IN, 1000), 100)
    assert ligru.bias_ih_l0[1000:].min() >= 0
    assert ligru.bias_ih_l0[:1000].count_nonzero() == 0
    u = fastrnn.IndRNN(IN, 1000).u_l0
    assert 0 <= u.min() < 0.1
    assert 0.9 < u.max() <= 1
    grnn = fastrnn.FastGRNN(IN, H)
    assert [p.tolist() for p in (grnn.zeta_l0, grnn.nu_l0)] == [[1.0], [-4.0]]
    low = fastrnn.FastGRNN(300, 300, w_rank=100)
    product = (low.weight_ih_left_l0 @ low.weight_ih_right_l0).detach()
    assert 0.8 < float(product.std() / fastrnn.FastGRNN(300, 300).weight_ih_l0.std()) < 1.2


LSTM, GRU, LIGRU = fastrnn.LSTM, fastrnn.GRU, fastrnn.LiGRU


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (LSTM, {"peephole": True, "proj_size": 2}, "LSTM: proj_size must be 0 with peephole"),
        (LSTM, {"peephole": True, "layer_norm": True}, "LSTM: peephole must be False with another"),
        (LSTM, {"peephole": True, "zoneout": 0.1}, "LSTM: peephole must be False with another"),
        (LSTM, {"peephole": True, "recurrent_dropout": 0.1}, "LSTM: peephole must be False with"),
        (LSTM, {"coupled_gates": True, "layer_norm": True}, "LSTM: coupled_gates must be False"),
        (LSTM, {"peephole": 1.5}, "LSTM: peephole must be a bool, got"),
        (LSTM, {"coupled_gates": "yes"}, "LSTM: coupled_gates must be a bool, got"),
        (GRU, {"coupled_gates": True}, "GRU: coupled_gates must be False for a cell that is not"),
        (fastrnn.RNN, {"peephole": True}, "RNN: peephole must be False for a cell that is not"),
        (fastrnn.SLSTM, {"peephole": True}, "SLSTM: peephole must be False for a cell that is"),
        (fastrnn.IndRNN, {"nonlinearity": "gelu"}, "IndRNN: nonlinearity must be 'relu' or"),
        (fastrnn.IndRNN, {"layer_norm": True}, "IndRNN: this cell must have no layer_norm, no"),
        (fastrnn.IndRNN, {"zoneout": 0.1}, "IndRNN: this cell must have no layer_norm, no zone"),
        (fastrnn.IndRNN, {"weight_dropout": 0.1}, "IndRNN: weight_dropout must be 0 with a cell"),
        (fastrnn.IndRNN, {"proj_size": 2}, "IndRNN: proj_size must be 0, got a projection"),
        (fastrnn.SLSTM, {"learn_initial_state": True}, "SLSTM: learn_initial_state must be False"),
        (fastrnn.SLSTM, {"batch_first_states": True}, "SLSTM: batch_first_states must be False"),
        (fastrnn.JANET, {"beta": float("nan")}, "JANET: beta must be a finite number, got nan"),
        (fastrnn.JANET, {"t_max": 1}, "JANET: t_max must be a number of steps of at least 2"),
        (fastrnn.JANET, {"t_max": 9, "bias": False}, "JANET: t_max needs biases, got bias=False"),
        (fastrnn.JANET, {"layer_norm": True}, "JANET: this cell must have no layer_norm"),
        (LIGRU, {"normalization": "batch"}, "LiGRU: normalization must be 'batchnorm', 'layer"),
        (LIGRU, {"layer_norm": True}, "LiGRU: normalization must be None with layer_norm=True"),
        (
            LIGRU,
            {"normalization": "layernorm", "recompute": 2},
            "LiGRU: recompute must be 'none' with normalization='layernorm', got 2",
        ),
        (fastrnn.FastGRNN, {"w_rank": 0}, "FastGRNN: w_rank must be a positive integer or None"),
        (fastrnn.FastGRNN, {"u_rank": True}, "FastGRNN: u_rank must be a positive integer or"),
        (fastrnn.FastGRNN, {"bias": 2}, "FastGRNN: bias must be a bool, got"),
    ],
    ids=str,
)
def test_wrong_options(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        cls(IN, H, **options)


def test_wrong_inputs() -> None:
    x = torch.randn(T, B, IN)
    with pytest.raises(TypeError, match="SLSTM: hx must be a tuple of 4 tensors, h, c, n, m, got"):
        fastrnn.SLSTM(IN, H)(x, torch.zeros(1, B, H))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[2\] size \(1, 3, 5\), got"):
        fastrnn.SLSTM(IN, H)(x, (*[torch.zeros(1, B, H)] * 2, *[torch.zeros(1, B, 2)] * 2))
    for case in CASES:
        layer = build(case, dtype=torch.float32)
        with pytest.raises(RuntimeError, match="input_size"):
            layer(torch.randn(T, B, 3))
        with pytest.raises(ValueError, match="dtype"):
            layer(x.double())
        with pytest.raises((RuntimeError, TypeError)):
            layer(x, torch.zeros(1, B, 2))


@pytest.mark.parametrize(
    ("case", "methods"),
    [
        ("IndRNN", ("prepare", "stream")),
        ("SLSTM", ("prepare", "stream")),
        ("JANET", ("prepare", "stream")),
        ("FastGRNN", ("prepare", "stream")),
        ("peephole", ("prepare", "stream")),
        ("LiGRU layernorm", ("prepare", "stream")),
        ("LiGRU batchnorm", ("prepare",)),
        ("coupled", ("prepare",)),
    ],
)
def test_weights_that_cannot_be_packed(case: str, methods: tuple[str, ...]) -> None:
    layer = build(case, dtype=torch.float32).eval()
    name = type(layer).__name__
    for method in methods:
        with pytest.raises((RuntimeError, ValueError), match=rf"^{name}\.{method}: .* must "):
            getattr(layer, method)()
    if "stream" in methods:
        with pytest.raises((RuntimeError, ValueError), match=" must "):
            fastrnn.Session(layer)


@every_case
def test_scripts_and_int8_are_rejected(case: str) -> None:
    layer = build(case, dtype=torch.float32).eval()
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script: "):
        torch.jit.script(layer)
    if type(layer) is fastrnn.LSTM and not layer.proj_size:
        with pytest.raises(ValueError, match=r"^fastrnn\.quantize: the layer must have no layer_"):
            fastrnn.quantize(layer)
    if type(layer) is not fastrnn.LSTM:
        with (
            pytest.warns(UserWarning, match="keeps its float weights"),
            pytest.raises(ValueError, match="must hold a fastrnn"),
        ):
            fastrnn.quantize(layer)


def units_of_head(weight: Tensor, units: int, head: int) -> Tensor:
    """Returns the rows of one of two heads from rows of all units of each gate or parameter."""
    if weight.shape[0] % units:
        return weight  # not per unit, such as zeta of FastGRNN
    return weight.unflatten(0, (-1, 2, units // 2))[:, head].flatten(0, 1)


#: layers whose heads are layers of their own: all parameters have rows of units
SEPARATE = ["SLSTM", "JANET", "LiGRU", "LiGRU batchnorm", "FastGRNN", "peephole", "coupled", "both"]


@pytest.mark.parametrize("case", SEPARATE)
@pytest.mark.parametrize("training", [True, False])
def test_heads_are_independent_layers(case: str, training: bool) -> None:
    whole = build(case, IN, 6, heads=2).train(training)
    x = torch.randn(T, B, IN, dtype=F64)
    outputs = []
    for head in range(2):
        part = build(case, IN, 3).train(training)
        state = {k: units_of_head(v, 6, head) for k, v in whole.state_dict().items()}
        part.load_state_dict(state)
        outputs.append(part(x)[0])
    torch.testing.assert_close(whole(x)[0], torch.cat(outputs, -1))


def test_heads_with_factors_of_matrices() -> None:
    layer = build("FastGRNN ranks", IN, 6, heads=2)
    x = torch.randn(T, B, IN, dtype=F64)
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_heads_need_a_recurrent_matrix() -> None:
    with pytest.raises(ValueError, match="IndRNN: heads must be 1 with a cell that has no rec"):
        fastrnn.IndRNN(IN, 6, heads=2)


@pytest.mark.parametrize("mark", ["lengths", "resets"])
@pytest.mark.parametrize("case", ["peephole", "FastGRNN", "IndRNN"])
def test_input_gradients_of_marked_batches_with_batch_first(case: str, mark: str) -> None:
    """The rows of an input whose batch comes first are not dense."""
    layer = build(case, batch_first=True)
    mirror = build(case)
    mirror.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, IN, dtype=F64, requires_grad=True)
    marks = torch.tensor([T, 2, 4]) if mark == "lengths" else torch.rand(B, T) > 0.6
    own = marks if mark == "lengths" else marks.t()
    (d_x,) = torch.autograd.grad(layer(x, **{mark: marks})[0].square().sum(), x)
    other = x.detach().transpose(0, 1).contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(mirror(other, **{mark: own})[0].square().sum(), other)
    assert expected.any()
    torch.testing.assert_close(d_x, expected.transpose(0, 1))
