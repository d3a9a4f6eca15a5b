"""Lengths and resets in captured graphs: torch.compile, torch.export, TorchScript and traces."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from support import CELLS, build
from tolerance import assert_same_in_double
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
]

F64 = torch.float64
I, H = 3, 4  # noqa: E741 - the sizes' names
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
PROJECTED = {"proj_size": 2, "bidirectional": True}
LAYERS = [(cell, OPTIONS["plain"]) for cell in CELLS]
LAYERS += [(cell, OPTIONS["stacked"]) for cell in ("lstm", "gru")]
LAYERS += [("lstm", PROJECTED), ("rnn_tanh", OPTIONS["batch first"])]
every_layer = pytest.mark.parametrize(("cell", "options"), LAYERS, ids=str)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class OneState(nn.Module):
    """Calls a layer with marks. TorchScript calls an overloaded forward only from outside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        lengths: Optional[Tensor] = None,  # noqa: UP045 - TorchScript reads it
        resets: Optional[Tensor] = None,  # noqa: UP045
        reset_h: Optional[Tensor] = None,  # noqa: UP045
    ) -> tuple[Tensor, Tensor]:
        return self.layer(x, None, lengths, resets, reset_h)


class TwoStates(OneState):
    def forward(
        self,
        x: Tensor,
        lengths: Optional[Tensor] = None,  # noqa: UP045
        resets: Optional[Tensor] = None,  # noqa: UP045
        reset_h: Optional[Tensor] = None,  # noqa: UP045
        reset_c: Optional[Tensor] = None,  # noqa: UP045
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if reset_h is None or reset_c is None:
            return self.layer(x, None, lengths, resets)
        return self.layer(x, None, lengths, resets, (reset_h, reset_c))


def model_of(cell: str, options: dict[str, Any]) -> nn.Module:
    layer = build(cell, I, H, dtype=F64, **options)
    return TwoStates(layer) if cell == "lstm" else OneState(layer)


def arguments(model: nn.Module, steps: int = 6, batch: int = 5, each: bool = False) -> Any:
    """Returns x, lengths, resets and the states after a reset."""
    generator = torch.Generator().manual_seed(steps * batch)
    layer = model.layer
    sizes = (batch, steps) if layer.batch_first else (steps, batch)
    states = layer.num_layers * (2 if layer.bidirectional else 1)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).requires_grad_()

    lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
    resets = torch.rand(sizes, generator=generator) < 0.3
    before = (steps,) if each else ()
    # a batch of 1 serves all rows
    reset_h = new(*before, states, batch if each else 1, layer.proj_size or H)
    state = [reset_h, new(*before, states, batch, H)] if layer.mode == "LSTM" else [reset_h]
    return new(*sizes, I), lengths, resets, *state


def results(model: Callable[..., Any], args: Any, parameters: Any) -> list[Tensor]:
    """Returns outputs, and the gradients of the float arguments and the parameters."""
    outputs = tree_leaves(model(*args))
    loss = sum((o * torch.linspace(0.5, 1, o.numel(), dtype=F64).view_as(o)).sum() for o in outputs)
    wanted = [a for a in args if a is not None and a.requires_grad] + list(parameters)
    return [*outputs, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def compare(captured: Callable[..., Any], model: nn.Module, args: Any) -> None:
    parameters = list(model.parameters())
    own = list(getattr(captured, "parameters", model.parameters)()) or parameters
    assert_same_in_double(results(captured, args, own), results(model, args, parameters))
    with torch.no_grad():
        assert_same_in_double(tree_leaves(captured(*args)), tree_leaves(model(*args)))


class TestCompile:
    @every_layer
    def test_one_graph(self, cell: str, options: dict[str, Any]) -> None:
        model = model_of(cell, options)
        captured = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        compare(captured, model, arguments(model))

    @pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["lengths", "resets"])
    def test_one_mark_and_dynamic_shapes(self, given: tuple[bool, bool]) -> None:
        model = model_of("lstm", OPTIONS["stacked"])
        captured = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for steps, batch in ((6, 5), (7, 3), (9, 10)):
            x, lengths, resets, *_ = arguments(model, steps, batch)
            compare(
                captured, model, (x, lengths if given[0] else None, resets if given[1] else None)
            )

    def test_states_of_each_step_and_float_resets(self) -> None:
        model = model_of("gru", OPTIONS["batch first"])
        x, lengths, resets, reset_h = arguments(model, each=True)
        captured = torch.compile(model, backend="aot_eager", fullgraph=True)
        compare(captured, model, (x, lengths.int(), resets.float().unsqueeze(-1), reset_h))

    @pytest.mark.slow
    def test_inductor(self) -> None:
        model = model_of("lstm", OPTIONS["stacked"])
        compare(torch.compile(model, fullgraph=True), model, arguments(model))

    def test_autocast(self) -> None:
        layer = build("gru", I, H)
        x, lengths = torch.randn(6, 5, I), torch.tensor([1, 6, 0, 3, 3])
        captured = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found, expected = captured(x, lengths=lengths), layer(x, lengths=lengths)
        for own, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert own.dtype == other.dtype
            torch.testing.assert_close(own, other, atol=0, rtol=0)

    def test_wrong_values_raise(self) -> None:
        model = model_of("gru", {})
        captured = torch.compile(model, backend="aot_eager", fullgraph=True)
        check_wrong_values(captured, *arguments(model)[:3])


def check_wrong_values(
    captured: Callable[..., Any], x: Tensor, lengths: Tensor, resets: Any
) -> None:
    """The operator checks the values, because the graph was captured without them."""
    captured(x, lengths, resets)
    for wrong in (7, -1):
        lengths = lengths.clone()
        lengths[1] = wrong
        with pytest.raises(
            RuntimeError, match=f"lengths must be from 0 to the 6 steps.*got {wrong}"
        ):
            captured(x, lengths, resets)
    lengths[1] = 0
    with pytest.raises(RuntimeError, match="resets must hold only 0 and 1, got another value"):
        captured(x, lengths, resets + 0.5)


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize(
        ("cell", "options"),
        [("lstm", OPTIONS["stacked"]), ("gru", {}), ("lstm", PROJECTED)],
        ids=str,
    )
    def test_saved_loaded_and_run(self, cell: str, options: dict[str, Any], strict: bool) -> None:
        model = model_of(cell, options)
        args = tuple(a.detach() for a in arguments(model))
        program = torch.export.export(model, args, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        other = [args[0].flip(0), args[1].flip(0), ~args[2], *args[3:]]
        for given in (args, other):
            assert_same_in_double(tree_leaves(loaded(*given)), tree_leaves(model(*given)))
        parameters = list(model.parameters())
        own = dict(loaded.named_parameters())
        found = results(loaded, args, [own[name] for name, _ in model.named_parameters()])
        assert_same_in_double(found, results(model, args, parameters))

    def test_dynamic_sizes(self) -> None:
        model = model_of("gru", OPTIONS["stacked"])
        steps, batch = Dim("T", min=1, max=512), Dim("B", min=1, max=512)
        shapes = ({0: batch, 1: steps}, {0: batch}, {0: batch, 1: steps})
        x, lengths, resets, _ = arguments(model)
        program = torch.export.export(model, (x, lengths, resets), dynamic_shapes=shapes)
        for sizes in ((3, 4), (9, 2)):
            args = arguments(model, *sizes)[:3]
            assert_same_in_double(tree_leaves(program.module()(*args)), tree_leaves(model(*args)))

    def test_wrong_values_raise(self) -> None:
        model = model_of("gru", {})
        x, lengths, resets, _ = arguments(model)
        float_resets = resets.double()
        program = torch.export.export(model, (x, lengths, float_resets)).module()
        check_wrong_values(program, x, lengths, float_resets)

    def test_wrong_shapes_raise_while_exporting(self) -> None:
        model = model_of("gru", {})
        x, lengths, *_ = arguments(model)
        with pytest.raises(ValueError, match=r"lengths must have the shape \[5\], got \[4\]"):
            torch.export.export(model, (x, lengths[:4]))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_onnx_has_no_such_operator(self) -> None:
        model = model_of("gru", {}).float()
        x, lengths, *_ = arguments(model)
        with pytest.raises(RuntimeError, match="lengths and resets cannot be in this graph: ONNX"):
            torch.onnx.export(model, (x.float(), lengths), io.BytesIO(), dynamo=False)


class TestScript:
    @every_layer
    @pytest.mark.parametrize("each", [False, True])
    def test_saved_and_loaded(self, cell: str, options: dict[str, Any], each: bool) -> None:
        model = model_of(cell, options)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        script = torch.jit.load(file)
        for sizes in ((6, 5), (3, 2)):
            args = arguments(model, *sizes, each)
            compare(script, model, args)
            compare(script, model, args[:2])
            compare(script, model, (args[0], None, args[2].float().unsqueeze(-1)))
        compare(script, model, args[:1])

    def test_wrong_values_raise(self) -> None:
        model = model_of("gru", {})
        check_wrong_values(torch.jit.script(model), *arguments(model)[:3])

    def test_wrong_kinds_raise(self) -> None:
        model = model_of("gru", {})
        script = torch.jit.script(model)
        x, lengths, resets, state = arguments(model)
        for args, message in (
            ((x, lengths.double()), "lengths must be a tensor of integers"),
            ((x, lengths[:4]), r"lengths must have the shape \[5\], got \[4\]"),
            ((x, None, resets[:3]), r"resets must have the shape \[6, 5\], got \[3, 5\]"),
            ((x, lengths, None, state), "together with resets"),
            ((x, lengths, resets, state[..., 1:]), r"reset_h must have the shape \[1, 5, 4\]"),
            ((x[:, 0], lengths), "with a batched input"),
        ):
            with pytest.raises((RuntimeError, torch.jit.Error), match=message):
                script(*args)

    @every_layer
    def test_traced(self, cell: str, options: dict[str, Any]) -> None:
        model = model_of(cell, options)
        trace = torch.jit.trace(model, arguments(model), check_trace=False)
        compare(trace, model, arguments(model, 4, 5))
