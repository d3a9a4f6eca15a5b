"""A captured model computes with its current weights, or scripting raises."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore")


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def parametrized(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Double())


WAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "parametrization": (parametrized, "remove_parametrizations"),
    "old_weight_norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "old_spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "pruning": (lambda m, name: prune.l1_unstructured(m, name, 0.5), r"prune\.remove"),
}
NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


class Net(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Any:
        return self.recurrent(x)


class Listed(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList([Net(recurrent)])

    def forward(self, x: Tensor) -> Any:
        return self.nets[0](x)


class Inherits(fastrnn.GRU):
    pass


def weight_of(name: str) -> str:
    return "weight_hh" if name.endswith("Cell") else "weight_hh_l0"


def build(name: str, way: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(4, 3)
    if way is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WAYS[way][0](module, weight_of(name))
    return module.eval()


def data(name: str) -> Tensor:
    return torch.randn(2, 4) if name.endswith("Cell") else torch.randn(5, 2, 4)


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def reload(module: Any, save: Any = torch.jit.save, load: Any = torch.jit.load) -> Any:
    file = io.BytesIO()
    save(module, file)
    file.seek(0)
    return load(file)


class TestScript:
    @pytest.mark.parametrize("wrap", [lambda m: m, Net, Listed], ids=["self", "nested", "listed"])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    def test_computed_weight_raises(
        self, name: str, way: str, wrap: Callable[..., nn.Module]
    ) -> None:
        weight = weight_of(name)
        pattern = rf"{weight} of {name} must be a Parameter.*{WAYS[way][1]}\(module, '{weight}'\)"
        with pytest.raises(RuntimeError, match=pattern):
            torch.jit.script(wrap(build(name, way)))

    def test_error_names_the_subclass(self) -> None:
        module = Inherits(4, 3)
        parametrizations.weight_norm(module, "weight_ih_l0")
        with pytest.raises(RuntimeError, match="weight_ih_l0 of Inherits must be a Parameter"):
            torch.jit.script(Net(module))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("way", ["weight_norm", "parametrization"])
    def test_remedy_in_the_message_works(self, name: str, way: str) -> None:
        module, x = build(name, way), data(name)
        expected = module(x)
        parametrize.remove_parametrizations(module, weight_of(name))
        same(torch.jit.script(Net(module))(x), expected)

    def test_remedies_for_older_utilities_work(self) -> None:
        x = data("GRU")
        for way, remove in (
            ("pruning", prune.remove),
            ("old_weight_norm", nn.utils.remove_weight_norm),
            ("old_spectral_norm", nn.utils.remove_spectral_norm),
        ):
            module = build("GRU", way)
            expected = module(x)
            remove(module, "weight_hh_l0")
            same(torch.jit.script(Net(module))(x), expected)

    @pytest.mark.parametrize("loaded", [False, True], ids=["scripted", "loaded"])
    @pytest.mark.parametrize("name", NAMES)
    def test_scripted_model_follows_its_weights(self, name: str, loaded: bool) -> None:
        module, other, x = build(name), getattr(fastrnn, name)(4, 3), data(name)
        scripted = torch.jit.script(Net(module))
        if loaded:
            scripted = reload(scripted)
        scripted.load_state_dict(Net(other).state_dict())
        same(scripted(x), other(x))
        with torch.no_grad():
            for ours, theirs in zip(other.parameters(), scripted.parameters(), strict=True):
                ours.mul_(2)
                theirs.mul_(2)
        same(scripted(x), other(x))
        scripted.to(torch.float64)
        same(scripted(x.double()), other.double()(x.double()))

    @pytest.mark.parametrize("name", NAMES)
    def test_frozen_model_matches_eager(self, name: str) -> None:
        module, x = build(name), data(name)
        scripted = torch.jit.script(Net(module).eval())
        same(torch.jit.freeze(scripted)(x), module(x))


@pytest.mark.parametrize("way", [*WAYS, None])
@pytest.mark.parametrize("name", NAMES)
class TestOtherCaptures:
    def test_trace(self, name: str, way: str | None) -> None:
        net, x = Net(build(name, way)).eval(), data(name)
        traced = torch.jit.trace(net, (x,))
        expected = net(data_like := torch.randn_like(x))
        same(traced(data_like), expected)
        same(reload(traced)(data_like), expected)

    def test_export(self, name: str, way: str | None) -> None:
        net, x = Net(build(name, way)).eval(), data(name)
        program = torch.export.export(net, (x,))
        same(reload(program, torch.export.save, torch.export.load).module()(x), net(x))

    def test_export_follows_the_state_dict(self, name: str, way: str | None) -> None:
        net, other, x = Net(build(name, way)).eval(), Net(build(name, way)).eval(), data(name)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        exported = torch.export.export(net, (x,)).module()
        state = {k: v for k, v in other.state_dict().items() if k in exported.state_dict()}
        assert {key for key, _ in net.named_parameters()} <= state.keys()
        exported.load_state_dict(state)
        same(exported(x), other(x))

    def test_state_dict(self, name: str, way: str | None) -> None:
        net, other, x = Net(build(name, way)), Net(build(name, way)), data(name)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.5)
        net.load_state_dict(other.state_dict())
        same(net.eval()(x), other.eval()(x))

    def test_pickle(self, name: str, way: str | None) -> None:
        net, x = Net(build(name, way)), data(name)
        if way in ("weight_norm", "spectral_norm", "parametrization"):
            with pytest.raises(RuntimeError, match="only supported through state_dict"):
                pickle.dumps(net)
            return
        net(x)
        same(pickle.loads(pickle.dumps(net))(x), net(x))
        same(reload(net, torch.save, lambda f: torch.load(f, weights_only=False))(x), net(x))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
class TestTiedWeights:
    def tied(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        a, b = getattr(fastrnn, name)(3, 3), getattr(fastrnn, name)(3, 3)
        b.weight_hh_l0 = a.weight_hh_l0  # shared by two layers
        a.weight_ih_l0 = a.weight_hh_l0  # shared by two names of one layer
        return Pair(a, b).eval()

    def test_tied_weights_stay_tied(self, name: str) -> None:
        net, x = self.tied(name), torch.randn(5, 2, 3)
        expected = net(x)
        same(reload(torch.jit.script(net))(x), expected)
        with pytest.raises(ValueError, match="don't support parameter sharing"):
            torch.jit.trace(net, (x,))  # raises for torch.nn as well
        program = torch.export.export(net, (x,))
        same(reload(program, torch.export.save, torch.export.load).module()(x), expected)
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            same(copied(x), expected)
            assert copied.a.weight_hh_l0 is copied.b.weight_hh_l0 is copied.a.weight_ih_l0
            with torch.no_grad():
                copied.b.weight_hh_l0.mul_(2)
            assert (copied(x) - expected).abs().max() > 1e-3
        scripted = torch.jit.script(net)
        with torch.no_grad():
            net.b.weight_hh_l0.mul_(2)
        same(scripted(x), net(x))


class Pair(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[0])[0]
