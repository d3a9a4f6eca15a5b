"""convert() and patch(): existing programs use fastrnn and give the same results."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

PAIRS = {
    nn.RNN: fastrnn.RNN,
    nn.LSTM: fastrnn.LSTM,
    nn.GRU: fastrnn.GRU,
    nn.RNNCell: fastrnn.RNNCell,
    nn.LSTMCell: fastrnn.LSTMCell,
    nn.GRUCell: fastrnn.GRUCell,
}


class Custom(nn.LSTM):
    pass


class Model(nn.Module):
    """A GRU with two names, an RNN in a list, a cell, and weights tied across modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.first = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)
        self.stack = nn.ModuleList([nn.RNN(4, 4, nonlinearity="relu", batch_first=True)])
        self.shared = nn.GRU(4, 4, batch_first=True)
        self.alias = self.shared
        self.cell = nn.GRUCell(4, 4)
        self.cell.weight_hh = self.shared.weight_hh_l0
        self.head = nn.Linear(4, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x, _ = self.first(x)
        x, _ = self.stack[0](x)
        x, _ = self.shared(x)
        x, h = self.alias(x)
        return self.head(x + self.cell(x[:, -1], h[0]).unsqueeze(1))


@pytest.fixture(autouse=True)
def restored_classes() -> Iterator[None]:
    yield
    fastrnn.unpatch()
    for cls in PAIRS:
        for namespace in (nn, nn.modules, nn.modules.rnn):
            assert getattr(namespace, cls.__name__) is cls


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(11, (3, 7), generator=generator)
        loss = nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_class_is_replaced() -> None:
    for before, after in PAIRS.items():
        assert type(fastrnn.convert(before(3, 4))) is after


def test_training_continues_with_the_same_optimizer() -> None:
    """Adam's state, tied weights, shared modules and hooks survive a conversion."""
    model = Model().double()
    twin = copy.deepcopy(model)
    calls: list[str] = []
    model.shared.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01)
    assert train(model, optimizer) == train(twin, reference)
    parameters, calls[:] = dict(model.named_parameters()), []

    converted, report = fastrnn.convert(model, return_report=True)

    assert converted is model
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.shared is model.alias
    assert model.cell.weight_hh is model.shared.weight_hh_l0
    assert train(model, optimizer) == pytest.approx(train(twin, reference), rel=1e-10)
    assert calls.count("forward") == 6
    assert calls.count("backward") == 3
    assert sorted(entry.names for entry in report.replaced) == [
        ("cell",),
        ("first",),
        ("shared", "alias"),
        ("stack.0",),
    ]
    assert report.skipped == []
    model.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(model.state_dict(), strict=True)


def test_training_mode_and_requires_grad_survive() -> None:
    model = Model()
    model.first.eval()
    model.shared.weight_ih_l0.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    fastrnn.convert(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert needs == {name: p.requires_grad for name, p in model.named_parameters()}


def test_report_lists_replaced_and_skipped_modules(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Custom(4, 4), nn.GRU(4, 4))
    with (
        caplog.at_level(logging.INFO, logger="fastrnn"),
        pytest.warns(UserWarning, match="fastrnn.convert: 1: .*Custom left unchanged"),
    ):
        _, report = fastrnn.convert(model, return_report=True)
    lines = str(report).splitlines()
    assert lines[0] == "fastrnn: 1 replaced, 1 left unchanged"
    assert lines[1] == "  2: torch.nn.GRU -> fastrnn.GRU"
    assert lines[2].startswith("  1: ")
    assert lines[2].endswith("left unchanged, as a subclass it may rely on how torch computes")
    assert str(report) in caplog.text
    assert type(model[1]) is Custom


def test_model_that_is_a_layer_is_converted() -> None:
    module = nn.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = module(x)[0]
    converted, report = fastrnn.convert(module, return_report=True)
    assert converted is module
    assert "(the model itself): torch.nn.LSTM -> fastrnn.LSTM" in str(report)
    assert_same_in_double(module(x)[0], expected)


def test_second_conversion_replaces_nothing() -> None:
    model = fastrnn.convert(Model())
    _, report = fastrnn.convert(model, return_report=True)
    assert report.replaced == report.skipped == []


def test_other_objects_than_modules_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"convert\(\) takes a torch.nn.Module, got type"):
        fastrnn.convert(nn.LSTM)  # type: ignore[type-var]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["parametrized", "weight_norm", "pruned", "several"])
@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.__name__)
def test_computed_weights_survive_conversion(cls: type[nn.Module], kind: str) -> None:
    """Parametrizations, weight norm and pruning still work and can be removed."""
    name = "weight_hh" if issubclass(cls, nn.RNNCellBase) else "weight_hh_l0"
    other = name.replace("hh", "ih")

    def prepared() -> nn.Module:
        torch.manual_seed(4)
        module = cls(3, 4).double()
        if kind in ("parametrized", "several"):
            parametrizations.weight_norm(module, name)
        if kind == "weight_norm":
            nn.utils.weight_norm(module, name)
        if kind in ("pruned", "several"):
            prune.l1_unstructured(module, other, 0.5)
        return module

    module, twin = prepared(), prepared()
    fastrnn.convert(module)
    assert isinstance(module, PAIRS[cls])
    assert type(module).__name__ == type(twin).__name__.replace(cls.__name__, PAIRS[cls].__name__)
    x = torch.randn(2, 3, dtype=torch.float64)

    def gradients(m: nn.Module) -> tuple[Tensor, ...]:
        output = m(x)
        first = output if isinstance(output, Tensor) else output[0]
        return first, *torch.autograd.grad(first.square().sum(), list(m.parameters()))

    for _ in range(2):
        for ours, theirs in zip(gradients(module), gradients(twin), strict=True):
            assert_same_in_double(ours, theirs)
        for m in (module, twin):
            with torch.no_grad():
                for parameter in m.parameters():
                    parameter.mul_(1.25)
    if kind == "parametrized":
        assert parametrize.type_before_parametrizations(module) is PAIRS[cls]
        parametrize.remove_parametrizations(module, name)
        assert type(module) is PAIRS[cls]
    if kind == "pruned":
        prune.remove(module, other)
    assert_same_in_double(gradients(module)[0], gradients(twin)[0])


def test_parametrized_subclass_is_left_unchanged() -> None:
    module = Custom(3, 4)
    parametrizations.weight_norm(module, "weight_hh_l0")
    with pytest.warns(UserWarning, match="left unchanged"):
        _, report = fastrnn.convert(module, return_report=True)
    assert len(report.skipped) == 1
    assert isinstance(module, Custom)


def build_everything() -> list[nn.Module]:
    return [
        torch.nn.RNN(3, 4),
        torch.nn.LSTM(3, 4),
        torch.nn.modules.GRU(3, 4),
        torch.nn.modules.rnn.RNNCell(3, 4),
        nn.LSTMCell(3, 4),
        nn.GRUCell(3, 4),
    ]


def is_patched() -> bool:
    kinds = {type(module) in PAIRS.values() for module in build_everything()}
    assert len(kinds) == 1, "some names are patched and some are not"
    return kinds.pop()


def test_patch_acts_inside_its_context() -> None:
    assert not is_patched()
    with fastrnn.patch():
        assert is_patched()
        model = Model()
        assert type(model.first) is fastrnn.LSTM
        assert isinstance(model.first, nn.LSTM)
        assert not isinstance(model.first, nn.GRU)
        assert issubclass(type(model.cell), nn.GRUCell)
    assert not is_patched()
    assert type(model.first) is fastrnn.LSTM
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_classes_can_derive_from_patched_names() -> None:
    with fastrnn.patch():

        class Mine(nn.LSTM):
            def forward(self, input: Tensor, hx: Any = None) -> Any:
                output, hidden = super().forward(input, hx)
                return -output, hidden

    module = Mine(3, 4)
    plain = fastrnn.LSTM(3, 4)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(module(x)[0], -plain(x)[0])


def test_called_patch_acts_until_unpatch() -> None:
    fastrnn.patch()
    assert is_patched()
    fastrnn.patch()
    fastrnn.unpatch()
    assert not is_patched()
    fastrnn.unpatch()
    assert not is_patched()


def test_patches_nest() -> None:
    with fastrnn.patch():
        with fastrnn.patch():
            assert is_patched()
        assert is_patched()
    assert not is_patched()
    fastrnn.patch()
    with fastrnn.patch():
        pass
    assert is_patched()
    with fastrnn.patch():
        fastrnn.unpatch()
        assert not is_patched()
    assert not is_patched()


def test_one_patch_can_be_entered_again() -> None:
    patch = fastrnn.patch()
    for _ in range(2):
        with patch:
            assert is_patched()
        assert not is_patched()


def test_patch_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), fastrnn.patch():
        _ = 1 / 0
    assert not is_patched()


def test_patch_leaves_classes_of_other_patches() -> None:
    class Theirs(nn.LSTM):
        pass

    original = nn.LSTM
    with fastrnn.patch():
        nn.LSTM = Theirs  # type: ignore[misc]
        try:
            with fastrnn.patch():
                assert nn.LSTM is Theirs
        finally:
            nn.LSTM = fastrnn.LSTM  # type: ignore[misc]
    assert nn.LSTM is original


def test_patch_is_thread_safe() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                with fastrnn.patch():
                    assert is_patched()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not is_patched()


def test_convert_works_under_patch() -> None:
    model = Model()
    with fastrnn.patch():
        fastrnn.convert(model)
    assert type(model.first) is fastrnn.LSTM
    assert type(model.cell) is fastrnn.GRUCell


def test_training_under_patch_gives_the_same_losses() -> None:
    def losses() -> list[float]:
        torch.manual_seed(3)
        model = Model().double()
        return train(model, torch.optim.Adam(model.parameters(), lr=0.01), steps=5)

    plain = losses()
    with fastrnn.patch():
        assert losses() == pytest.approx(plain, rel=1e-10)
