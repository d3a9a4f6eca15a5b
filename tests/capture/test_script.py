"""TorchScript: models with fastrnn's modules, scripted or traced, then saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CELLS, build, exact_call, make_step, run_python
from tolerance import assert_agrees
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
}
LAYERS = [(cell, options) for cell in CELLS for options in OPTIONS.values()]
LAYERS.append(("lstm", {"proj_size": 2, "num_layers": 2, "bidirectional": True}))
every_layer = pytest.mark.parametrize(("cell", "options"), LAYERS)
every_cell = pytest.mark.parametrize("cell", CELLS)


class Everything(nn.Module):
    """Calls a layer in every way: padded, with states, packed, and without a batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer(torch.zeros(1, 1, 3))[0].shape[-1], 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, state = self.layer(x)
        second, _ = self.layer(x, state)
        packed = pack_padded_sequence(
            x, lengths, batch_first=self.layer.batch_first, enforce_sorted=False
        )
        output, _ = self.layer(packed, state)
        third, _ = pad_packed_sequence(output)
        fourth, _ = self.layer(x[0])
        return self.head(first + second), third, fourth


class Padded(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x)


class Packed(Padded):
    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        batch_first = self.layer.batch_first
        packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        output, state = self.layer(packed)
        return pad_packed_sequence(output, batch_first)[0], state


class Steps(nn.Module):
    """Two batched steps of a cell, and one step without a batch."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> tuple[Any, Any]:
        state = self.step(x)
        return self.step(x, state), self.step(x[0])


def inputs(options: dict[str, Any], steps: int = 4, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Returns an input [T,B,3] or [B,T,3] and its lengths; the longest is not the first."""
    shape = (batch, steps, 3) if options.get("batch_first") else (steps, batch, 3)
    lengths = torch.tensor([1 + (steps - 1 + index) % steps for index in range(1, batch)] + [steps])
    return torch.randn(shape), lengths


def saved_and_loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def outputs_and_gradients(module: nn.Module, args: Sequence[Tensor]) -> list[Tensor]:
    """Returns every output and the gradient of each parameter."""
    outputs = tree_leaves(module(*args))
    loss = sum((o * torch.linspace(0.5, 1, o.numel()).view_as(o)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return [*(o.detach() for o in outputs), *gradients]


def assert_same(script: nn.Module, module: nn.Module, *args: Tensor) -> None:
    """Compares with and without gradients. TorchScript's optimizer may change the order of sums."""
    assert_learns_alike(outputs_and_gradients(script, args), module, args)
    with torch.no_grad():
        results = tree_leaves(script(*args))
        expected = tree_leaves(module(*args))
    exact = exact_call(module, *args, call=lambda module, *args: tree_leaves(module(*args)))
    assert_agrees(results, expected, exact)


def assert_learns_alike(found: list[Tensor], module: nn.Module, args: Sequence[Tensor]) -> None:
    exact = exact_call(
        module, *args, call=lambda module, *args: outputs_and_gradients(module, args)
    )
    assert_agrees(found, outputs_and_gradients(module, args), exact)


@contextmanager
def no_tracer_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


class TestScript:
    @every_layer
    def test_layers(self, cell: str, options: dict[str, Any]) -> None:
        module = Everything(build(cell, 3, 4, **options))
        script = saved_and_loaded(torch.jit.script(module))
        assert list(script.state_dict()) == list(module.state_dict())
        for steps, batch in ((4, 3), (7, 5), (2, 2)):
            assert_same(script, module, *inputs(options, steps, batch))

    @every_cell
    def test_steps(self, cell: str) -> None:
        for bias in (True, False):
            module = Steps(make_step(cell, 3, 4, bias=bias))
            script = saved_and_loaded(torch.jit.script(module))
            assert_same(script, module, torch.randn(2, 3))
            assert_same(script, module, torch.randn(5, 3))

    def test_dropout_acts_in_training_and_depends_on_the_seed(self) -> None:
        module = Padded(build("gru", 3, 4, num_layers=2, dropout=0.5))
        args = inputs({})
        script = torch.jit.script(Everything(module.layer)).layer
        holder = torch.jit.script(_Training(module.layer))
        assert script.training
        torch.manual_seed(1)
        expected = module(*args)[0]
        torch.manual_seed(1)
        assert torch.equal(holder(args[0]), expected)
        assert not torch.equal(holder(args[0]), expected)
        holder.eval()
        module.eval()
        assert torch.equal(holder(args[0]), module(*args)[0])

    def test_casts_and_new_weights_change_the_results(self) -> None:
        module = Everything(build("lstm", 3, 4))
        script = saved_and_loaded(torch.jit.script(module)).double()
        x, lengths = inputs({})
        assert_same(script, copy.deepcopy(module).double(), x.double(), lengths)
        other = Everything(fastrnn.LSTM(3, 4)).double()
        script.load_state_dict(other.state_dict())
        assert_same(script, other, x.double(), lengths)

    def test_half_types(self) -> None:
        module = Everything(build("gru", 3, 4)).bfloat16()
        x, lengths = inputs({})
        assert_same(torch.jit.script(module), module, x.bfloat16(), lengths)

    def test_subclass_without_a_forward(self) -> None:
        """torch cannot script such a subclass. A view with fastrnn's class replaces the module."""
        model = Everything(Named(3, 4))
        before = model.layer
        args = inputs({})
        script = saved_and_loaded(torch.jit.script(model))
        assert_same(script, model, *args)
        assert isinstance(model.layer, Named)
        assert model.layer.weight_ih_l0 is before.weight_ih_l0
        assert model.layer.greeting() == before.greeting()
        assert repr(model) == repr(Everything(Named(3, 4)))
        assert type(copy.deepcopy(model.layer)) is Named
        again = pickle.loads(pickle.dumps(model.layer))
        assert type(again) is Named
        assert torch.equal(again(args[0])[0], before(args[0])[0])

    def test_subclass_with_a_forward(self) -> None:
        model = Padded(Doubled(3, 4))
        x, lengths = inputs({})
        assert torch.equal(torch.jit.script(model)(x, lengths), 2 * x)
        assert type(model.layer) is Doubled

    @pytest.mark.parametrize(
        ("shape", "state", "message"),
        [
            ((2, 3, 5), None, r"input.size\(-1\) must be equal to input_size. Expected 3, got 5"),
            ((3,), None, "Expected input to be 2D or 3D, got 1D"),
            ((4, 2, 3), (1, 2, 5), r"Expected hidden size \(1, 2, 4\), got \[1, 2, 5\]"),
            ((4, 2, 3), (2, 4), "hx should also be 3-D but got 2-D"),
        ],
    )
    def test_errors(
        self, shape: tuple[int, ...], state: tuple[int, ...] | None, message: str
    ) -> None:
        script = torch.jit.script(_WithState(build("gru", 3, 4)))
        with pytest.raises(Exception, match=message):
            script(torch.randn(shape), None if state is None else torch.randn(state))


class _Training(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(x)
        return output


class _WithState(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        output, _ = self.layer(x, state)
        return output


class Named(fastrnn.LSTM):
    def greeting(self) -> str:
        return f"I have {self.hidden_size} units"


class Doubled(fastrnn.GRU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class TestTrace:
    @pytest.mark.parametrize("form", [Padded, Packed])
    @pytest.mark.parametrize("grad", [True, False], ids=["gradients", "inference"])
    @every_layer
    def test_layers(
        self, cell: str, options: dict[str, Any], grad: bool, form: type[Padded]
    ) -> None:
        """A trace runs other lengths and batches, and learns even if traced without gradients."""
        module = form(build(cell, 3, 4, **options))
        with torch.set_grad_enabled(grad), no_tracer_warning():
            traced = torch.jit.trace(module, inputs(options))
        traced = saved_and_loaded(traced)
        for steps, batch in ((4, 3), (7, 5), (1, 1)):
            assert_same(traced, module, *inputs(options, steps, batch))

    @every_cell
    def test_steps(self, cell: str) -> None:
        module = Steps(make_step(cell, 3, 4))
        with no_tracer_warning():
            traced = torch.jit.trace(module, (torch.randn(2, 3),))
        assert_same(saved_and_loaded(traced), module, torch.randn(5, 3))

    def test_kernels_and_not_steps_are_recorded(self) -> None:
        module = Padded(build("lstm", 3, 4, num_layers=3))
        kinds = [
            [
                node.kind()
                for node in torch.jit.trace(module, inputs({}, steps)).inlined_graph.nodes()
            ]
            for steps in (4, 40)
        ]
        assert kinds[0] == kinds[1]
        assert kinds[0].count("fastrnn::recurrent_layer") == 3


def test_fresh_process(tmp_path: Path) -> None:
    """A new process loads the scripted and the traced model, computes with them and trains them."""
    module = Everything(build("lstm", 3, 4, num_layers=2, bidirectional=True))
    args = inputs({})
    torch.jit.save(torch.jit.script(module), str(tmp_path / "scripted.pt"))
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(module, args), str(tmp_path / "traced.pt"))
    torch.save(args, tmp_path / "args.pt")
    code = f"""
import torch, fastrnn
args = torch.load({str(tmp_path / "args.pt")!r})
for name in ("scripted", "traced"):
    module = torch.jit.load({str(tmp_path)!r} + f"/{{name}}.pt")
    outputs = module(*args)
    loss = sum((o * torch.linspace(0.5, 1, o.numel()).view_as(o)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    torch.save([*outputs, *gradients], {str(tmp_path)!r} + f"/{{name}}.found.pt")
"""
    run_python(code)
    for name in ("scripted", "traced"):
        found = torch.load(tmp_path / f"{name}.found.pt")
        assert_learns_alike([tensor.detach() for tensor in found], module, args)


def test_without_fastrnns_python(tmp_path: Path) -> None:
    """A program that loads only the operators, like a C++ program, can run inference."""
    module = Everything(build("gru", 3, 4))
    args = inputs({})
    torch.jit.save(torch.jit.script(module), str(tmp_path / "model.pt"))
    with torch.no_grad():
        torch.save((args, module(*args)), tmp_path / "expected.pt")
    library = Path(fastrnn.__file__).parent / "lib" / "libfastrnn_torch.so"
    code = f"""
import sys, torch
torch.ops.load_library({str(library)!r})
args, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    outputs = torch.jit.load({str(tmp_path / "model.pt")!r})(*args)
assert all(map(torch.equal, outputs, expected))
assert "fastrnn" not in sys.modules
print("same")
"""
    assert run_python(code).strip() == "same"
