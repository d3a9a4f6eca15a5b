"""torch.export, ONNX and AOTInductor: exported models with dynamic lengths and batches."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CELLS, TORCH_CELLS, build, exact_call, layer_call, make_step, run_python
from tolerance import assert_agrees
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from fastrnn.backends import onnx_node
from fastrnn.spec import CELLS as CELL_SPECS

LAYERS = [
    *((cell, options) for cell in CELLS for options in ({}, {"bias": False, "num_layers": 2})),
    *((cell, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for cell in CELLS),
]
# An ONNX export takes two seconds, so ONNX uses the first cases, which cover all cells and options.
CASES = [
    *((cell, {}, True) for cell in CELLS),
    *((cell, options, False) for cell, options in LAYERS if options and cell in ("lstm", "gru")),
]
CASES += [
    pytest.param(cell, options, states, marks=pytest.mark.slow)
    for cell, options in LAYERS
    for states in (False, True)
    if (cell, options, states) not in CASES
]
PROJECTED = ("lstm", {"proj_size": 2, "bidirectional": True})
SIZES = ((4, 3), (7, 5), (1, 1), (2, 9))  # T and B
T, B = Dim("T", min=1, max=4096), Dim("B", min=1, max=4096)


class Model(nn.Module):
    """A layer with a head, with or without initial states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        directions = 2 if layer.bidirectional else 1
        self.head = nn.Linear(directions * (layer.proj_size or layer.hidden_size), 2)

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        hx = None if not states else states[0] if len(states) == 1 else states
        output, hx = self.layer(x, hx)
        return (self.head(output), *tree_leaves(hx))


class Steps(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Any:
        return self.step(x, self.step(x))


def leaves(module: nn.Module, *args: Tensor) -> list[Tensor]:
    """Returns every output, in the order of ONNX Runtime."""
    return tree_leaves(module(*args))


def inputs(layer: nn.Module, steps: int, batch: int, states: bool) -> tuple[Tensor, ...]:
    """Returns x [T,B,3] or [B,T,3] and, on request, matching states."""
    x = torch.randn((batch, steps, 3) if layer.batch_first else (steps, batch, 3))
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size]
    if layer.mode == "LSTM":
        sizes.append(layer.hidden_size)
    return x, *(torch.randn(count, batch, size) for size in sizes if states)


def dynamic_shapes(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    x = {0: B, 1: T} if layer.batch_first else {0: T, 1: B}
    return (x, tuple({1: B} for _ in args[1:])) if len(args) > 1 else (x,)


def exported(model: Model, states: bool, **options: Any) -> ExportedProgram:
    """Exports with dynamic T and B, saves and loads. A warning is an error."""
    args = inputs(model.layer, *SIZES[0], states)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were assigned during export")
        shapes = dynamic_shapes(model.layer, args)
        program = torch.export.export(model, args, dynamic_shapes=shapes, **options)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def targets(program: ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


class TestExport:
    @pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
    @pytest.mark.parametrize(("cell", "options"), [*LAYERS, PROJECTED])
    def test_one_program_serves_all_lengths_and_batches(
        self, cell: str, options: dict[str, Any], states: bool
    ) -> None:
        model = Model(build(cell, 3, 4, **options))
        program = exported(model, states)
        assert targets(program)["fastrnn.recurrent_layer.default"] == model.layer.num_layers
        for steps, batch in SIZES:
            args = inputs(model.layer, steps, batch, states)
            assert_agrees(program.module()(*args), model(*args), exact_call(model, *args))

    @pytest.mark.parametrize("cell", ["lstm", "gru"])
    @pytest.mark.parametrize("grad", [True, False], ids=["gradients", "inference"])
    def test_strict(self, cell: str, grad: bool) -> None:
        """``strict=True`` captures by Dynamo instead of by running Python."""
        model = Model(build(cell, 3, 4, num_layers=2, bidirectional=True))
        with torch.set_grad_enabled(grad):
            program = exported(model, True, strict=True)
        for steps, batch in SIZES:
            args = inputs(model.layer, steps, batch, True)
            assert_agrees(program.module()(*args), model(*args), exact_call(model, *args))

    @pytest.mark.parametrize("cell", CELLS)
    def test_program_learns(self, cell: str) -> None:
        """Trains a graph that was captured without gradients, too."""
        model = Model(build(cell, 3, 4, num_layers=2))
        with torch.no_grad():
            program = exported(model, False)
        copied = program.module()
        args = inputs(model.layer, 6, 2, False)
        names = [name for name, _ in copied.named_parameters()]
        assert names == [name for name, _ in model.named_parameters()]

        def gradients(module: nn.Module, *args: Tensor) -> dict[str, Tensor]:
            module.zero_grad()
            sum(output.square().sum() for output in module(*args)).backward()
            return {name: module.get_parameter(name).grad for name in names}

        exact = exact_call(model, *args, call=gradients)
        assert_agrees(gradients(copied, *args), gradients(model, *args), exact)

    def test_decompositions_keep_the_kernel(self) -> None:
        with torch.no_grad():
            program = exported(Model(build("lstm", 3, 4)), False).run_decompositions()
        assert targets(program)["fastrnn.recurrent_layer.default"] == 1

    @pytest.mark.parametrize("cell", CELLS)
    def test_steps(self, cell: str) -> None:
        model = Steps(make_step(cell, 3, 4))
        program = torch.export.export(model, (torch.randn(3, 3),), dynamic_shapes=({0: B},))
        assert targets(program)["fastrnn.recurrent_layer.default"] == 2
        for batch in (1, 5):
            x = torch.randn(batch, 3)
            assert_agrees(program.module()(x), model(x), exact_call(model, x))

    def test_fresh_process(self, tmp_path: Path) -> None:
        model = Model(build("gru", 3, 4, num_layers=2))
        args = inputs(model.layer, 9, 2, True)
        torch.export.save(exported(model, True), tmp_path / "model.pt2")
        torch.save(args, tmp_path / "args.pt")
        code = f"""
import torch, fastrnn
args = torch.load({str(tmp_path / "args.pt")!r})
module = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
torch.save(module(*args), {str(tmp_path / "found.pt")!r})
"""
        run_python(code)
        found = torch.load(tmp_path / "found.pt")
        assert_agrees(found, model(*args), exact_call(model, *args))

    @pytest.mark.slow
    @pytest.mark.parametrize("grad", [True, False], ids=["gradients", "inference"])
    def test_aotinductor(self, tmp_path: Path, grad: bool) -> None:
        """Compiles ahead of time and runs in a process that has only imported fastrnn."""
        model = Model(build("lstm", 3, 4, num_layers=2, bidirectional=True))
        with torch.set_grad_enabled(grad):
            program = exported(model, False)
            path = str(tmp_path / "model.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=path)
        args = [inputs(model.layer, steps, batch, False) for steps, batch in SIZES]
        torch.save(args, tmp_path / "args.pt")
        code = f"""
import torch, fastrnn
model = torch._inductor.aoti_load_package({path!r})
args = torch.load({str(tmp_path / "args.pt")!r})
torch.save([tuple(model(*a)) for a in args], {str(tmp_path / "found.pt")!r})
"""
        run_python(code)
        for found, a in zip(torch.load(tmp_path / "found.pt"), args, strict=True):
            with torch.no_grad():
                assert_agrees(found, model(*a), exact_call(model, *a))


def onnx_outputs(model: nn.Module, args: tuple[Tensor, ...], dynamo: bool) -> Any:
    """Exports a model with dynamic T and B; returns its graph and a function that runs it."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of torch's own code
        if dynamo:
            pytest.importorskip("onnxscript")
            shapes = ({0: B},) if isinstance(model, Steps) else dynamic_shapes(model.layer, args)
            program = torch.onnx.export(
                model, args, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            program.save(file)
        else:
            names = [f"input{index}" for index in range(len(args))]
            axes = {names[0]: [0, 1], **{name: [1] for name in names[1:]}}
            torch.onnx.export(model, args, file, dynamo=False, input_names=names, dynamic_axes=axes)
    content = file.getvalue()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(*args: Tensor) -> list[Tensor]:
        names = [value.name for value in session.get_inputs()]
        feed = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return onnx.load_from_string(content).graph, run


def attributes(node: Any) -> dict[str, Any]:
    onnx = pytest.importorskip("onnx")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "older"])


class TestOnnx:
    @EXPORTERS
    @pytest.mark.parametrize(("cell", "options", "states"), CASES)
    def test_standard_nodes(
        self, cell: str, options: dict[str, Any], states: bool, dynamo: bool
    ) -> None:
        if CELL_SPECS[cell].torch.onnx_type is None:
            pytest.skip("ONNX has no node for it")
        if cell not in TORCH_CELLS and not dynamo:
            pytest.skip("see test_older_exporter_rejects_sigmoid")
        model = Model(build(cell, 3, 4, **options)).eval()
        args = inputs(model.layer, *SIZES[0], states)
        graph, run = onnx_outputs(model, args, dynamo)
        kind = cell.split("_")[0].upper()
        nodes = [node for node in graph.node if node.op_type == kind]
        assert len(nodes) == model.layer.num_layers
        for node in nodes:
            found = attributes(node)
            direction = b"bidirectional" if model.layer.bidirectional else b"forward"
            assert found.get("direction", b"forward") == direction
            assert found["hidden_size"] == 4
            if kind == "GRU":
                assert found["linear_before_reset"] == 1
        for steps, batch in SIZES:
            args = inputs(model.layer, steps, batch, states)
            with torch.no_grad():
                expected = leaves(model, *args)
            assert_agrees(run(*args), expected, exact_call(model, *args, call=leaves))

    @EXPORTERS
    def test_dropout_is_not_exported(self, dynamo: bool) -> None:
        model = Model(build("gru", 3, 4, num_layers=2, dropout=0.5)).eval()
        args = inputs(model.layer, 4, 3, False)
        _, run = onnx_outputs(model, args, dynamo)
        with torch.no_grad():
            assert_agrees(run(*args), leaves(model, *args), exact_call(model, *args, call=leaves))

    @EXPORTERS
    @pytest.mark.parametrize("cell", CELLS)
    def test_steps(self, cell: str, dynamo: bool) -> None:
        """ONNX has no cells, so a step is captured as elementary operations."""
        model = Steps(make_step(cell, 3, 4)).eval()
        _, run = onnx_outputs(model, (torch.randn(3, 3),), dynamo)
        x = torch.randn(5, 3)
        with torch.no_grad():
            expected = leaves(model, x)
        assert_agrees(run(x), expected, exact_call(model, x, call=leaves))

    def test_weights_are_constants_in_onnx_order(self) -> None:
        """The graph has no operations that would reorder gates in each call."""
        model = Model(build("lstm", 3, 4)).eval()
        graph, _ = onnx_outputs(model, inputs(model.layer, 4, 3, True), True)
        (node,) = [node for node in graph.node if node.op_type == "LSTM"]
        constants = {value.name: list(value.dims) for value in graph.initializer}
        assert [constants[name] for name in node.input[1:4]] == [[1, 16, 3], [1, 16, 4], [1, 32]]
        assert not {"Concat", "Slice", "Split"} & {
            n.op_type for n in graph.node if n.input[0] in constants
        }

    def test_older_exporter_rejects_sigmoid(self) -> None:
        model = Model(build("rnn_sigmoid", 3, 4)).eval()
        with pytest.raises(RuntimeError, match="rnn_sigmoid needs dynamo=True"):
            onnx_outputs(model, inputs(model.layer, 4, 3, False), False)

    @EXPORTERS
    def test_projection(self, dynamo: bool) -> None:
        """The exporter's error contains fastrnn's message and what to change."""
        model = Model(build(PROJECTED[0], 3, 4, **PROJECTED[1])).eval()
        message = "ONNX has no LSTM with a projection, expected proj_size 0, got"
        with pytest.raises(Exception, match=message):
            onnx_outputs(model, inputs(model.layer, 4, 3, False), dynamo)

    def test_older_exporter_accepts_packed_input(self) -> None:
        """The lengths are an input of the graph; T is fixed to the traced value."""

        class Packed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = build("gru", 3, 4)

            def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
                output, _ = self.layer(pack_padded_sequence(x, lengths))
                return pad_packed_sequence(output)[0]

        runtime = pytest.importorskip("onnxruntime")
        model, x = Packed().eval(), torch.randn(5, 2, 3)
        file = io.BytesIO()
        torch.onnx.export(model, (x, torch.tensor([5, 3])), file, dynamo=False)
        session = runtime.InferenceSession(file.getvalue())
        for lengths in ([5, 3], [5, 1], [5, 5]):
            values = (x, torch.tensor(lengths))
            names = [node.name for node in session.get_inputs()]
            feeds = {name: t.numpy() for name, t in zip(names, values, strict=True)}
            got = torch.from_numpy(session.run(None, feeds)[0])
            assert_agrees(got, model(*values), exact_call(model, x, lengths))

    @pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
    def test_older_exporter_accepts_a_bare_layer(self, cell: str) -> None:
        """The exporter passes the arguments' defaults, as tensors."""
        runtime = pytest.importorskip("onnxruntime")
        layer, x = build(cell, 3, 4), torch.randn(5, 2, 3)
        file = io.BytesIO()
        torch.onnx.export(layer, (x,), file, dynamo=False)
        session = runtime.InferenceSession(file.getvalue())
        feeds = {session.get_inputs()[0].name: x.numpy()}
        got = torch.from_numpy(session.run(None, feeds)[0])
        assert_agrees(got, layer(x)[0], lambda change: exact_call(layer, x)(change)[0])

    @pytest.mark.parametrize(
        ("options", "packed", "message"),
        [
            ({"proj_size": 2}, False, "ONNX has no LSTM with a projection"),
            ({}, True, "ONNX has no packed sequences"),
        ],
    )
    def test_calls_that_onnx_does_not_support_raise(
        self, options: dict[str, Any], packed: bool, message: str
    ) -> None:
        """The exporter's error includes this message among its causes."""
        layer = build("lstm", 3, 4, **options)
        x, h0, c0 = inputs(layer, 4, 3, True)
        batch_sizes = torch.tensor([2, 1, 1]) if packed else None
        with pytest.raises(RuntimeError, match=message):
            onnx_node.run(
                layer_call(x, h0, c0, layer._flat_weights, batch_sizes, CELL_SPECS["lstm"])
            )
