"""`fastrnn.diagnostics`: each measure on a case with a known result; the model does not change."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import run_python
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.diagnostics import Diagnosis, LayerDiagnosis, diagnose

T, B, IN, H = 4, 3, 2, 5
NAMES = ["RNN", "LSTM", "GRU"]
PACKAGES = [fastrnn, nn]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def make(name: str, *sizes: int, package: Any = fastrnn, **options: Any) -> nn.RNNBase:
    layer: nn.RNNBase = getattr(package, name)(*(sizes or (IN, H)), **options)
    return layer.double()


def batch(*sizes: int) -> Tensor:
    return torch.randn(*(sizes or (T, B, IN)), dtype=torch.float64)


def last_step(output: Any) -> Tensor:
    return output[0][-1].square().sum()


def only(report: Diagnosis) -> LayerDiagnosis:
    [layer] = report.layers.values()
    return layer


def loop(layer: nn.RNNBase, x: Tensor, loss: Callable[[Any], Tensor]) -> dict[str, list[Tensor]]:
    """Runs torch's cells in a loop; returns the norms of the gradients of "l0: h", "l0: c", ..."""
    states: dict[str, list[Tensor]] = {}
    y = [*x]
    for k in range(layer.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][: 1 + layer.bidirectional]:
            cell = getattr(nn, f"{type(layer).__name__}Cell")(y[0].shape[1], H).double()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(layer, f"{name}_l{k}{suffix}"))
            state, steps = None, []
            for row in reversed(y) if suffix else y:
                state = cell(row, state)
                steps.append(state if isinstance(state, tuple) else (state,))
            if suffix:
                steps.reverse()
            for number, letter in enumerate("hc"[: len(steps[0])]):
                states[f"l{k}{suffix}: {letter}"] = [step[number] for step in steps]
            outputs.append([step[0] for step in steps])
        y = [torch.cat(rows, -1) for rows in zip(*outputs, strict=True)]
    value = loss((torch.stack(y),))
    return {
        name: [
            torch.zeros(()).double() if g is None else g.norm()
            for g in torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        ]
        for name, tensors in states.items()
    }


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_gradients_are_those_of_a_plain_loop(
    name: str, package: Any, is_bidirectional: bool
) -> None:
    layer = make(name, IN, H, 2, bidirectional=is_bidirectional, package=package)
    x = batch()
    report = diagnose(layer, x, loss=last_step)
    expected = loop(layer, x, last_step)
    found = {f"{key}: h": found.hidden_gradient for key, found in report.layers.items()}
    for key, measured in report.layers.items():
        assert (measured.cell_gradient is not None) == (name == "LSTM")
        if measured.cell_gradient is not None:
            found[f"{key}: c"] = measured.cell_gradient
    assert found.keys() == expected.keys()
    for key, norms in expected.items():
        torch.testing.assert_close(found[key], torch.stack(norms), msg=key)
    assert math.isclose(report.loss, float(last_step(layer(x)).detach()))


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_add_up_to_single_ones(name: str) -> None:
    layer = make(name, IN, H, 2, bidirectional=True)
    sequences = [batch(steps, IN) for steps in (2, 4, 1)]
    together = diagnose(layer, pack_sequence(sequences, enforce_sorted=False))
    alone = [diagnose(layer, sequence) for sequence in sequences]
    assert math.isclose(together.loss, sum(report.loss for report in alone))
    for key, found in together.layers.items():
        squares = torch.zeros(4, dtype=torch.float64)
        for report in alone:
            norms = report.layers[key].hidden_gradient
            squares[: len(norms)] += norms.square()
        torch.testing.assert_close(found.hidden_gradient, squares.sqrt())
        for gate, fractions in found.saturation.items():
            counts = [
                r.layers[key].saturation[gate] * n for r, n in zip(alone, (2, 4, 1), strict=True)
            ]
            torch.testing.assert_close(fractions, sum(counts) / 7)


def test_batch_first_and_states() -> None:
    layer, first = make("GRU"), make("GRU", batch_first=True)
    first.load_state_dict(layer.state_dict())
    x, h = batch(), batch(1, B, H)
    expected = only(diagnose(layer, x, h)).hidden_gradient
    found = only(diagnose(first, x.transpose(0, 1), hx=h)).hidden_gradient
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, only(diagnose(layer, x)).hidden_gradient)


def test_steps_of_several_calls_follow_one_another() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(IN, H).double()

        def forward(self, x: Tensor) -> tuple[Tensor]:
            state, outputs = None, []
            for row in x:
                state = self.cell(row, state)
                outputs.append(state[0])
            return (torch.stack(outputs),)

    model, x = Decoder(), batch()
    layer = make("LSTM")
    for name, parameter in model.cell.named_parameters():
        getattr(layer, f"{name}_l0").data.copy_(parameter.data)
    found = diagnose(model, x, loss=last_step).layers["cell"]
    expected = diagnose(layer, x, loss=last_step).layers["l0"]
    torch.testing.assert_close(found.hidden_gradient, expected.hidden_gradient)
    torch.testing.assert_close(found.cell_gradient, expected.cell_gradient)
    torch.testing.assert_close(found.saturation, expected.saturation)


def test_frozen_parameters_and_disabled_gradients_change_nothing() -> None:
    layer, x = make("LSTM", IN, H, 2), batch()
    expected = diagnose(layer, x)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        frozen = diagnose(layer, x)
    with torch.inference_mode():
        inference = diagnose(layer, x)
    for report in (frozen, inference):
        for key, found in report.layers.items():
            measured = expected.layers[key]
            torch.testing.assert_close(found.hidden_gradient, measured.hidden_gradient)
            torch.testing.assert_close(found.cell_gradient, measured.cell_gradient)


def test_layer_without_gradients_has_norms_of_zero() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = make("LSTM"), make("LSTM", H, H)

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                y, _ = self.encoder(x)
            return self.decoder(y)

    layers = diagnose(Frozen(), batch()).layers
    assert not layers["encoder.l0"].hidden_gradient.any()
    assert layers["decoder.l0"].hidden_gradient.all()


def test_gradients_are_float64_so_that_squares_do_not_overflow() -> None:
    layer = fastrnn.RNN(1, 1, nonlinearity="relu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1)
    found = only(diagnose(layer, torch.ones(1, 1, 1), loss=lambda output: 1e30 * output[0].sum()))
    assert math.isclose(float(found.hidden_gradient[0]), 1e30, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    seen = []

    def loss(output: Any) -> Tensor:
        seen.append(output[0].dtype)
        return last_step(output).float()

    layer, x = make("GRU", IN, H, 2), batch()
    half = only(diagnose(make("GRU").to(dtype), x.to(dtype)))
    assert half.hidden_gradient.isfinite().all()
    with torch.autocast("cpu", dtype):
        found = diagnose(layer.float(), x.float(), loss=loss)
        assert seen == [layer(x.float())[0].dtype]
    assert all(measured.hidden_gradient.isfinite().all() for measured in found.layers.values())


def test_compiled_and_checkpointed_models() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.rnn, x, use_reentrant=False)

    layer, x = make("LSTM"), batch()
    expected = only(diagnose(layer, x)).hidden_gradient
    found = diagnose(torch.compile(layer, backend="eager"), x).layers
    torch.testing.assert_close(found["_orig_mod.l0"].hidden_gradient, expected)
    found = diagnose(Checkpointed(), x).layers
    torch.testing.assert_close(found["rnn.l0"].hidden_gradient, expected)


def test_spectral_radius_per_gate() -> None:
    angle = 0.7
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()
    layer = make("GRU", 1, 2, 2)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.cat([0.2 * turn, 0.5 * turn, 1.5 * turn]))
        layer.weight_hh_l1.copy_(torch.tensor([[0.0, 7.0], [0.0, 0.0]]).repeat(3, 1))
    report = diagnose(layer, batch(2, 1, 1))
    radii = {gate: float(radius) for gate, radius in report.layers["l0"].spectral_radius.items()}
    assert radii == pytest.approx({"r": 0.2, "z": 0.5, "n": 1.5})
    # nilpotent: the norm is 7
    assert all(float(radius) == 0 for radius in report.layers["l1"].spectral_radius.values())


def test_spectral_radius_of_a_projection_and_of_nan() -> None:
    layer = make("LSTM", 1, 2, proj_size=1)
    with torch.no_grad():
        layer.weight_hr_l0.copy_(torch.tensor([[2.0, 3.0]]))
        layer.weight_hh_l0.copy_(torch.arange(8.0).unsqueeze(1))
    radii = only(diagnose(layer, batch(2, 1, 1))).spectral_radius
    expected = {"i": 2 * 0 + 3 * 1, "f": 2 * 2 + 3 * 3, "g": 2 * 4 + 3 * 5, "o": 2 * 6 + 3 * 7}
    assert {gate: float(radius) for gate, radius in radii.items()} == pytest.approx(expected)
    with torch.no_grad():
        layer.weight_hh_l0[0] = float("nan")
    found = diagnose(layer, batch(2, 1, 1))
    assert only(found).spectral_radius["i"].isnan()
    assert "not finite at 2 of 2 steps, from 0 to 1" in str(found)


def zeroed(name: str, **options: Any) -> nn.RNNBase:
    layer = make(name, 1, 2, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def saturation(layer: nn.RNNBase) -> dict[str, list[float]]:
    found = only(diagnose(layer, batch(3, 2, 1), loss=lambda output: output[0].sum()))
    return {gate: fractions.tolist() for gate, fractions in found.saturation.items()}


def test_saturated_gates() -> None:
    lstm = zeroed("LSTM")
    with torch.no_grad():
        #                                   i       f       g       o, two units each
        lstm.bias_ih_l0.copy_(torch.tensor([-5, -5, 5, 5, -5.0, 5, 0, 5]))
    assert saturation(lstm) == {"i": [1, 0], "f": [0, 1], "g": [0.5, 0.5], "o": [0, 0.5]}
    gru = zeroed("GRU")
    with torch.no_grad():
        gru.bias_ih_l0.copy_(torch.tensor([-5, 5, 0, 0, -5.0, 0]))
        gru.bias_hh_l0[5] = 5  # reaches n only times r, which is 1 for this unit
        gru.bias_hh_l0[4] = 50  # r is 0.0067 here: n = tanh(-5 + 0.33)
    assert saturation(gru) == {"r": [0.5, 0.5], "z": [0, 0], "n": [0.5, 0.5]}
    for nonlinearity, expected in {
        "tanh": {"h": [0.5, 0]},
        "sigmoid": {"h": [0.5, 0]},
        "relu": {},
    }.items():
        rnn = zeroed("RNN", nonlinearity=nonlinearity)
        with torch.no_grad():
            rnn.bias_ih_l0[0] = -5
        assert saturation(rnn) == expected


def test_gates_reproduce_the_states() -> None:
    """The activations that are counted are those that the layer computes with."""
    from fastrnn.diagnostics.measures import gate_activations
    from fastrnn.spec import DirectionWeights

    x, h = batch(B, IN), batch(B, H)
    layer = make("GRU")
    gates = gate_activations("gru", x, h, DirectionWeights(*layer.all_weights[0]))
    expected = (1 - gates["z"]) * gates["n"] + gates["z"] * h
    torch.testing.assert_close(layer(x.unsqueeze(0), h.unsqueeze(0))[1][0], expected)
    layer, c = make("LSTM"), batch(B, H)
    gates = gate_activations("lstm", x, h, DirectionWeights(*layer.all_weights[0]))
    expected = gates["o"] * torch.tanh(gates["f"] * c + gates["i"] * gates["g"])
    found = layer(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))[0][0]
    torch.testing.assert_close(found, expected)


def test_dead_units() -> None:
    relu = make("RNN", 1, 3, nonlinearity="relu")
    with torch.no_grad():
        relu.weight_hh_l0.zero_()
        relu.bias_hh_l0.zero_()
        # never active; always 2; follows its input
        relu.weight_ih_l0.copy_(torch.tensor([[1.0], [0.0], [1.0]]))
        relu.bias_ih_l0.copy_(torch.tensor([-100.0, 2.0, 0.0]))
    x = torch.tensor([-1.0, 1.0, 2.0]).double().reshape(3, 1, 1)
    assert only(diagnose(relu, x)).dead.tolist() == [True, True, False]
    # from one value it is unknown whether an output changes
    assert only(diagnose(relu, x[1:2])).dead.tolist() == [True, False, False]
    tanh = make("RNN", 1, 3)
    tanh.load_state_dict(relu.state_dict())
    assert only(diagnose(tanh, x)).dead.tolist() == [True, True, False]


class Tagger(nn.Module):
    """A model with everything that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.plain = nn.LSTM(4, 4, 2, dropout=0.5)
        self.normed = parametrizations.spectral_norm(nn.GRU(4, 4), "weight_hh_l0")
        self.pruned = fastrnn.RNN(4, 4)
        prune.l1_unstructured(self.pruned, "weight_hh_l0", 0.5)
        self.cell = parametrizations.weight_norm(nn.GRUCell(4, 4), "weight_ih")
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = self.pruned(self.normed(self.plain(x)[0])[0])[0]
        return self.drop(self.cell(x[-1]))


@pytest.mark.parametrize("is_training", [True, False])
def test_model_does_not_change(is_training: bool) -> None:
    model, tokens = Tagger().train(is_training), torch.randint(7, (T, B))
    model(tokens).sum().backward()
    model(tokens)  # the pruned weight has no graph that was freed
    calls = []
    model.plain.register_forward_hook(lambda *_: calls.append("hook"))

    def state() -> list[Any]:
        modules = [
            (
                type(m),
                m.training,
                set(vars(m)),
                [[*vars(m)[key].values()] for key in vars(m) if key.endswith("_hooks")],
            )
            for m in model.modules()
        ]
        identities = [id(t) for t in (*model.parameters(), *model.buffers())]
        return [modules, identities, [id(w) for w in model.plain._flat_weights]]

    def values() -> list[Tensor]:
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        tensors = [*model.state_dict().values(), *grads, torch.get_rng_state()]
        return [t.clone() for t in tensors]

    before, values_before = state(), values()
    report = diagnose(model, tokens)
    assert state() == before
    assert all(map(torch.equal, values(), values_before))
    assert list(report.layers) == ["plain.l0", "plain.l1", "normed.l0", "pruned.l0", "cell"]
    assert calls == ["hook"]
    with pytest.raises(ZeroDivisionError):
        diagnose(model, tokens, loss=lambda output: 1 // 0)
    assert state() == before
    assert all(map(torch.equal, values(), values_before))
    model(tokens).sum().backward()


def test_dropout_between_layers_is_applied() -> None:
    layer, x = make("GRU", IN, H, 2, dropout=0.5), batch()
    torch.manual_seed(1)
    first = diagnose(layer, x).loss
    assert first == diagnose(layer, x).loss  # the random state did not change
    torch.manual_seed(2)
    assert first != diagnose(layer, x).loss
    layer.eval()
    torch.manual_seed(1)
    assert first != diagnose(layer, x).loss


class Subclass(nn.LSTM):
    pass


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fastrnn.GRU(IN, H)
        self.linear = nn.Linear(IN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (torch.relu, {}, TypeError, r"model must be a torch.nn.Module, got builtin"),
        (nn.Linear(IN, 1), {}, ValueError, r"must contain an RNN, .* got Linear without one"),
        (Unused(), {}, ValueError, r"must call one of its recurrent layers \(rnn\)"),
        (nn.Sequential(Subclass(IN, H)), {}, TypeError, r"0 must be a layer of .*Subclass, a sub"),
        (fastrnn.GRU(IN, H, dtype=torch.complex64), {}, TypeError, "real parameters, got complex"),
        (fastrnn.GRU(IN, H), {"loss": lambda y: 3.0}, TypeError, "a tensor, got float"),
        (fastrnn.GRU(IN, H), {"loss": lambda y: y[1]}, ValueError, r"scalar, got the shape \[1, 3"),
        (fastrnn.GRU(IN, H), {"loss": lambda y: y[0].detach().sum()}, ValueError, "must depend on"),
    ],
)
def test_errors(model: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose(model, torch.randn(T, B, IN), **options)


def test_errors_of_inputs_and_outputs() -> None:
    with pytest.raises(RuntimeError, match="input"):
        diagnose(fastrnn.GRU(IN, H), torch.randn(T, B, IN + 1))
    with pytest.raises(ValueError, match="of l0 must have at least one step"):
        diagnose(fastrnn.GRU(IN, H), torch.randn(T, 0, IN))

    class Text(nn.Sequential):
        def forward(self, x: Tensor) -> str:
            return str(super().forward(x))

    with pytest.raises(TypeError, match="must contain a floating-point tensor, got str"):
        diagnose(Text(fastrnn.GRU(IN, H)), torch.randn(T, B, IN))


def test_text_and_table() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    report = diagnose(make("LSTM", IN, H, bidirectional=True), batch())
    text = str(report)
    for part in ("l0 (lstm)", "l0_reverse (lstm)", "gradient at c: ", "(step 3)", "dead units: 0"):
        assert part in text
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    shown = console.export_text()
    assert "spectral radius" in shown
    assert "l0_reverse" in shown


def test_plot_has_labels_and_every_curve() -> None:
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({"a": make("LSTM"), "b": make("RNN", H, H, nonlinearity="relu")})
    model.forward = lambda x: model["b"](model["a"](x)[0])  # type: ignore[method-assign]
    report = diagnose(model, batch(), loss=lambda output: output[0][0].sum())
    figure = report.plot()
    figure.canvas.draw()
    gradients, radii, gates = figure.axes
    assert [text.get_text() for text in gradients.get_legend().get_texts()] == [
        *("a.l0: h", "a.l0: c", "b.l0: h")
    ]
    assert gradients.get_yscale() == "log"
    assert (gradients.get_xlabel(), gradients.get_ylabel()) == (
        *("time step", "2-norm (loss per unit of state)"),
    )
    assert len(radii.patches) == 5
    assert len(gates.patches) == 8
    assert gates.get_ylabel() == "activations (%)"
    zero = diagnose(make("RNN"), batch(), loss=lambda output: 0 * output[0].sum()).plot()
    zero.canvas.draw()
    assert zero.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("method", "package"), [("table", "rich"), ("plot", "matplotlib")])
def test_missing_package_names_the_extra(
    method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf"Diagnosis.{method}: {package} must .* pip install 'fastrnn\[diagnostics\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        getattr(Diagnosis(0.0, {}), method)()


def test_imports_are_light() -> None:
    run_python(
        "import sys, fastrnn\n"
        "assert 'fastrnn.diagnostics' not in sys.modules\n"
        "import fastrnn.diagnostics, fastrnn.init\n"
        "assert not {'rich', 'matplotlib', 'torch._dynamo'} & sys.modules.keys()\n"
    )
