"""``quantize_dynamic`` converts fastrnn's modules like torch's, or a warning names them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic
from torch.nn.utils import parametrizations

import fastrnn

LAYERS = ["LSTM", "GRU"]
STEPS = ["RNNCell", "LSTMCell", "GRUCell"]
DTYPES = [torch.qint8, torch.float16]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor.*:UserWarning"),
]


class Model(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.decoder = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.recurrent(x)
        return self.decoder(output[0] if isinstance(output, tuple) else output)


def quantize(model: nn.Module, spec: Any, **options: Any) -> Any:
    """Runs `quantize_dynamic`; a warning is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "quantize_dynamic leaves")
        return torch.ao.quantization.quantize_dynamic(model, spec, **options)


def quantize_with_one_warning(model: nn.Module, spec: Any, **options: Any) -> tuple[nn.Module, str]:
    """Returns the result of `quantize_dynamic` after checking its one warning from this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = torch.ao.quantization.quantize_dynamic(model, spec, **options)
    own = [entry for entry in caught if "leaves" in str(entry.message)]
    assert len(own) == 1
    assert own[0].category is UserWarning
    assert own[0].filename == __file__
    return result, str(own[0].message)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LAYERS, *STEPS])
class TestMapping:
    def pair(self, name: str, *args: Any, **options: Any) -> tuple[Model, Model]:
        ours = Model(getattr(fastrnn, name)(4, 8, *args, **options))
        theirs = Model(getattr(nn, name)(4, 8, *args, **options))
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    def compare(self, name: str, dtype: torch.dtype, pair: tuple[Model, Model], x: Tensor) -> None:
        ours = quantize(
            pair[0],
            {getattr(fastrnn, name), nn.Linear},
            dtype=dtype,
            mapping=fastrnn.quantization_mapping(),
        )
        theirs = quantize(pair[1], {getattr(nn, name), nn.Linear}, dtype=dtype)
        assert type(ours.recurrent) is type(theirs.recurrent) is getattr(dynamic, name)
        assert type(ours.decoder) is dynamic.Linear
        assert repr(ours) == repr(theirs)
        assert torch.equal(ours(x), theirs(x))
        assert not ours.recurrent.training
        restored = copy.deepcopy(ours)
        restored.load_state_dict(theirs.state_dict())
        assert torch.equal(restored(x), theirs(x))

    def test_quantized_module_matches_torchs(self, name: str, dtype: torch.dtype) -> None:
        shape = (2, 4) if name in STEPS else (5, 2, 4)
        self.compare(name, dtype, self.pair(name), torch.randn(shape))

    def test_options(self, name: str, dtype: torch.dtype) -> None:
        if name == "RNNCell":
            self.compare(name, dtype, self.pair(name, True, "relu"), torch.randn(2, 4))
        elif name in LAYERS:
            pair = self.pair(name, 2, batch_first=True, dropout=0.5)
            self.compare(name, dtype, pair, torch.randn(2, 5, 4))
            pair = self.pair(name, 2, bidirectional=True)
            pair[0].decoder = pair[1].decoder = nn.Linear(16, 3)
            self.compare(name, dtype, pair, torch.randn(5, 2, 4))


class TestComputedWeights:
    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_parametrized(self, name: str) -> None:
        """Checks only the values, because torch cannot quantize its own module here."""
        module = getattr(fastrnn, name)(4, 8)
        plain = copy.deepcopy(module)
        weight = next(n for n, _ in module.named_parameters() if n.startswith("weight_hh"))
        parametrizations.weight_norm(module, weight)
        with torch.no_grad():
            getattr(module.parametrizations, weight).original0.mul_(2)
            getattr(plain, weight).copy_(getattr(module, weight))
        spec, mapping = {getattr(fastrnn, name)}, fastrnn.quantization_mapping()
        ours = quantize(Model(module), spec, mapping=mapping)
        other = quantize(Model(plain), spec, mapping=mapping)
        x = torch.randn((2, 4) if name in STEPS else (5, 2, 4))
        result, expected = ours.recurrent(x), other.recurrent(x)
        if isinstance(result, tuple):
            result, expected = result[0], expected[0]
        assert torch.equal(result, expected)

    def test_hooks_are_kept(self) -> None:
        model = Model(fastrnn.LSTM(4, 8))
        calls = []
        model.recurrent.register_forward_hook(lambda *_: calls.append(1))
        quantized = quantize(model, {fastrnn.LSTM}, mapping=fastrnn.quantization_mapping())
        quantized(torch.randn(5, 2, 4))
        assert calls == [1]

    def test_under_patch(self) -> None:
        with fastrnn.patch():
            model = Model(nn.LSTM(4, 8))
            quantized = quantize(model, {nn.LSTM}, mapping=fastrnn.quantization_mapping())
        assert type(model.recurrent) is fastrnn.LSTM
        assert type(quantized.recurrent) is dynamic.LSTM


class TestUnsupportedOptions:
    @pytest.mark.parametrize(
        ("module", "lacking"),
        [
            (fastrnn.LSTM(4, 8, proj_size=3), "proj_size"),
            (fastrnn.GRU(4, 8, bias=False), "bias=False"),
            (fastrnn.LSTMCell(4, 8, bias=False), "bias=False"),
            (fastrnn.RNNCell(4, 8, nonlinearity="sigmoid"), "nonlinearity='sigmoid'"),
        ],
    )
    def test_options_without_a_quantized_form_raise(self, module: nn.Module, lacking: str) -> None:
        with pytest.raises(NotImplementedError, match=f"{lacking} cannot be quantized"):
            quantize(Model(module), {type(module)}, mapping=fastrnn.quantization_mapping())


class TestWarnings:
    @pytest.mark.parametrize("name", [*LAYERS, *STEPS])
    def test_without_the_mapping(self, name: str) -> None:
        own, twin = getattr(fastrnn, name), getattr(nn, name)
        for spec in ({twin, nn.Linear}, {own}, {"recurrent"}, None):
            quantized, message = quantize_with_one_warning(Model(own(4, 8)), spec)
            assert type(quantized.recurrent) is own
            assert message == (
                f"quantize_dynamic leaves a fastrnn.{name} in floating point: torch looks for its "
                f"own classes. Name fastrnn.{name} in qconfig_spec and pass "
                "mapping=fastrnn.quantization_mapping()"
            )

    def test_mapping_with_torchs_class(self) -> None:
        mapping = fastrnn.quantization_mapping()
        _, message = quantize_with_one_warning(
            Model(fastrnn.LSTM(4, 8)), {nn.LSTM}, mapping=mapping
        )
        assert "Name fastrnn.LSTM" in message

    @pytest.mark.parametrize("spec", [{nn.RNN}, {fastrnn.RNN}])
    def test_rnn(self, spec: Any) -> None:
        mapping = fastrnn.quantization_mapping()
        _, message = quantize_with_one_warning(Model(fastrnn.RNN(4, 8)), spec, mapping=mapping)
        assert message.endswith("fastrnn.RNN in floating point: torch has no quantized RNN")

    def test_subclass(self) -> None:
        class Mine(fastrnn.GRU):
            pass

        mapping = fastrnn.quantization_mapping()
        for spec in ({fastrnn.GRU, "recurrent"}, {Mine}, {nn.GRU}):
            _, message = quantize_with_one_warning(Model(Mine(4, 8)), spec, mapping=mapping)
            assert message.endswith("a Mine in floating point: torch does not look for subclasses")

    def test_model_that_is_a_layer(self) -> None:
        mapping = fastrnn.quantization_mapping()
        quantized, message = quantize_with_one_warning(
            fastrnn.LSTM(4, 8), {fastrnn.LSTM}, mapping=mapping
        )
        assert type(quantized) is fastrnn.LSTM
        assert "not the model itself" in message

    def test_no_warning_without_a_request(self) -> None:
        quantized = quantize(Model(fastrnn.LSTM(4, 8)), {nn.Linear, nn.GRU})
        assert type(quantized.recurrent) is fastrnn.LSTM
        assert type(quantized.decoder) is dynamic.Linear
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastrnn.LSTM(4, 8).qconfig = None
            fastrnn.LSTMCell(4, 8).qconfig = torch.ao.quantization.default_dynamic_qconfig


class TestStatic:
    """`prepare` and `convert` have no quantized form for fastrnn's modules."""

    class Model(nn.Module):
        def __init__(self, recurrent: nn.Module, around: bool) -> None:
            super().__init__()
            self.quant, self.dequant = (
                torch.ao.quantization.QuantStub(),
                torch.ao.quantization.DeQuantStub(),
            )
            self.encoder, self.recurrent, self.decoder = nn.Linear(4, 4), recurrent, nn.Linear(8, 2)
            self.before = torch.ao.quantization.DeQuantStub() if around else nn.Identity()
            self.behind = torch.ao.quantization.QuantStub() if around else nn.Identity()
            self.qconfig = torch.ao.quantization.get_default_qconfig("x86")

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(self.encoder(self.quant(x)))
            result = self.recurrent(x)
            h = result if isinstance(result, Tensor) else result[0]
            return self.dequant(self.decoder(self.behind(h)))  # type: ignore[no-any-return]

    @pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
    @pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell", "GRUCell"])
    def test_a_module_that_stays_float_is_named(self, name: str) -> None:
        model = self.Model(getattr(fastrnn, name)(4, 8), around=False).eval()
        x = torch.randn(3, 4) if name.endswith("Cell") else torch.randn(5, 3, 4)
        expected = f"prepare leaves a fastrnn.{name} in floating point: torch looks for its own"
        with pytest.warns(UserWarning, match=expected) as caught:
            prepared = torch.ao.quantization.prepare(model)
        assert any(entry.filename == __file__ for entry in caught)
        prepared(x)
        quantized = torch.ao.quantization.convert(prepared)
        assert type(quantized.recurrent) is getattr(fastrnn, name)
        with pytest.raises(RuntimeError, match="dense tensor, got a quantized one"):
            quantized(x)

    @pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
    def test_prepare_qat_warns_once(self) -> None:
        model = self.Model(fastrnn.GRU(4, 8), around=False).train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.ao.quantization.prepare_qat(model)
        messages = [str(entry.message) for entry in caught if entry.filename == __file__]
        assert [m.partition(":")[0] for m in messages if "leaves" in m] == [
            "prepare_qat leaves a fastrnn.GRU in floating point"
        ]

    @pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
    def test_no_warning_if_the_caller_replaces_the_class(self) -> None:
        class Observed(nn.Module):
            @classmethod
            def from_float(cls, module: Any) -> Observed:
                observed = cls()
                observed.qconfig = module.qconfig
                return observed

        model = self.Model(fastrnn.GRU(4, 8), around=False).eval()
        config = {"float_to_observed_custom_module_class": {fastrnn.GRU: Observed}}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*in floating point")
            prepared = torch.ao.quantization.prepare(model, prepare_custom_config_dict=config)
        assert type(prepared.recurrent) is Observed

    @pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
    def test_remedy_in_the_warning_works(self) -> None:
        model = self.Model(fastrnn.LSTM(4, 8), around=True).eval()
        model.recurrent.qconfig = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepared = torch.ao.quantization.prepare(model)
        assert not any("floating point" in str(entry.message) for entry in caught)
        x = torch.randn(5, 3, 4)
        expected = prepared(x)
        quantized = torch.ao.quantization.convert(prepared)
        assert type(quantized.decoder) is not nn.Linear
        assert (quantized(x) - expected).abs().max() < 0.1
