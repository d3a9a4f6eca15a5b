"""The compared libraries, each set up for a task in its fastest way.

All libraries get the same weights and input, rounded to bfloat16 for tasks in bfloat16. ONNX
Runtime and OpenVINO support inference only. Setup that a user does once (building the model,
rounding its weights to int8, binding buffers) is not timed.

``torch.nn`` has no int8 weights. It runs int8 tasks in float32: every cell then has a peer, and
runs at different times can be compared.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

from .onnx_model import onnx_model
from .shapes import CELLS, DTYPES, MODES, Task

_CLASSES: Final = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


class Call(ABC):
    """A library, set up for one task."""

    @abstractmethod
    def __call__(self) -> object:
        """Runs the task once. This call is timed."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """Runs the task; returns the valid rows of ``output`` and, in training, the gradients."""


def _dtype(task: Task) -> torch.dtype:
    """Returns the dtype of the weights and the input that all libraries get."""
    return torch.bfloat16 if task.dtype == "bfloat16" else torch.float32


def torch_layer(task: Task) -> nn.Module:
    """Returns the ``torch.nn`` layer whose weights all libraries get. The weights are fixed."""
    return _layer(nn, task).to(_dtype(task))


def _layer(classes: Any, task: Task) -> nn.Module:
    shape, name = task.shape, _CLASSES[task.cell]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if shape.single:
            cell: nn.Module = getattr(classes, f"{name}Cell")(shape.input_size, shape.hidden_size)
            return cell
        layer: nn.Module = getattr(classes, name)(
            shape.input_size,
            shape.hidden_size,
            shape.layers,
            bidirectional=shape.bidirectional,
            **({"proj_size": shape.proj_size} if shape.proj_size > 0 else {}),
        )
        return layer


def padded_input(task: Task) -> Tensor:
    """Returns x [T,B,I], or [B,I] for a cell. The values are fixed."""
    shape = task.shape
    leading = (shape.batch,) if shape.single else (shape.steps, shape.batch)
    values = torch.Generator().manual_seed(1)
    return torch.randn(*leading, shape.input_size, generator=values).to(_dtype(task))


def _valid_rows(output: Tensor, task: Task) -> Tensor:
    """Returns the rows of ``output`` [T,B,D*H] within the lengths, in packed order."""
    packed = task.shape.packed
    return pack_padded_sequence(output, task.shape.lengths).data if packed else output


class ModuleCall(Call):
    """A module with the interface of ``torch.nn``.

    Args:
        classes: the namespace of RNN, LSTM, GRU and their cells: ``torch.nn`` or ``fastrnn``.
        task: the task.
        dtype: dtype of weights, input and arithmetic. By default it is that of the task's input.
        quantize: returns a layer with int8 weights.
    """

    def __init__(
        self,
        classes: Any,
        task: Task,
        dtype: torch.dtype | None = None,
        quantize: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self._task = task
        dtype = dtype or _dtype(task)
        self._layer = _layer(classes, task).to(dtype)
        self._layer.load_state_dict(torch_layer(task).state_dict())
        if quantize is not None:
            self._layer = quantize(self._layer)
        x = padded_input(task).to(dtype)
        self._x = pack_padded_sequence(x, task.shape.lengths) if task.shape.packed else x
        self._leaf = self._x.data if isinstance(self._x, PackedSequence) else self._x
        self._arguments: tuple[Any, ...] = (self._x,)
        if task.shape.single:  # a loop over steps always passes a state
            ones = torch.ones(task.shape.batch, task.shape.hidden_size)
            h = torch.tanh(ones).to(_dtype(task)).to(dtype)
            self._arguments += ((h, h) if task.cell == "lstm" else h,)
        self._d_output: Tensor | None = None
        if task.mode == "training":
            self._leaf.requires_grad_()
            values = torch.Generator().manual_seed(2)
            shape = (*self._leaf.shape[:-1], task.shape.output_size)
            self._d_output = torch.randn(shape, generator=values).to(_dtype(task)).to(dtype)

    def _output(self) -> Tensor:
        output = self._layer(*self._arguments)
        if isinstance(output, tuple):  # (output, h_n) of a layer, (h, c) of an LSTMCell
            output = output[0]
        rows: Tensor = output.data if isinstance(output, PackedSequence) else output
        return rows

    def __call__(self) -> object:
        if self._d_output is None:
            with torch.no_grad():
                return self._layer(*self._arguments)
        self._layer.zero_grad()
        self._leaf.grad = None
        output = self._output()
        output.backward(self._d_output)
        return output

    def results(self) -> dict[str, Tensor]:
        if self._d_output is None:
            with torch.no_grad():
                return {"output": self._output()}
        self()
        gradients = {f"d_{name}": weight.grad for name, weight in self._layer.named_parameters()}
        gradients["d_x"] = self._leaf.grad
        found = {name: value.clone() for name, value in gradients.items() if value is not None}
        return {"output": self._output().detach(), **found}


def _fastrnn(task: Task) -> Call:
    return ModuleCall(fastrnn, task, quantize=fastrnn.quantize if task.dtype == "int8" else None)


def _quantize_dynamic(layer: nn.Module) -> nn.Module:
    """Returns torch's own int8 copy of a layer of ``torch.nn``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls all of its int8 modules deprecated
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(nn.Sequential(layer), {nn.LSTM, nn.GRU}, torch.qint8)
    copy: nn.Module = model[0]
    return copy


class OnnxRuntimeCall(Call):
    """ONNX Runtime on buffers that are bound once, so that a call copies nothing.

    Its threads spin between calls, the default. Without spinning (``allow_spinning`` 0) calls below
    a millisecond take up to 40% longer; longer calls take the same time.
    """

    def __init__(self, task: Task) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task.threads
        options.inter_op_num_threads = 1
        weights = torch_layer(task).state_dict()
        model = onnx_model(task.cell, task.shape, weights, int8=task.dtype == "int8")
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._task = task
        self._binding = self._session.io_binding()
        self._inputs = _onnx_inputs(task)  # keeps the buffers alive: the binding does not own them
        self._output = torch.empty(task.shape.steps, task.shape.batch, task.shape.output_size)
        wrap = onnxruntime.OrtValue.ortvalue_from_numpy
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, wrap(value.numpy()))
        self._binding.bind_ortvalue_output("output", wrap(self._output.numpy()))

    def __call__(self) -> object:
        return self._session.run_with_iobinding(self._binding)

    def results(self) -> dict[str, Tensor]:
        self()
        return {"output": _valid_rows(self._output.clone(), self._task)}


class OpenVinoCall(Call):
    """OpenVINO's CPU plugin in float32, on tensors that share memory with torch's.

    Pinned threads and the throughput hint made no difference.
    """

    def __init__(self, task: Task) -> None:
        import openvino

        model = onnx_model(task.cell, task.shape, torch_layer(task).state_dict())
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": task.threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # default: bfloat16 on CPUs that support it
            },
        )
        self._task = task
        self._request = compiled.create_infer_request()
        self._inputs = _onnx_inputs(task)  # keeps the memory alive: the tensors do not own it
        for name, value in self._inputs.items():
            self._request.set_tensor(name, openvino.Tensor(value.numpy(), shared_memory=True))

    def __call__(self) -> object:
        return self._request.infer()

    def results(self) -> dict[str, Tensor]:
        self()
        output = torch.from_numpy(self._request.get_output_tensor().data.copy())
        return {"output": _valid_rows(output, self._task)}


def _onnx_inputs(task: Task) -> dict[str, Tensor]:
    inputs = {"x": padded_input(task)}
    if task.shape.packed:
        inputs["lengths"] = torch.tensor(task.shape.lengths, dtype=torch.int32)
    return inputs


#: every cell in every dtype
ALL_CELLS: Final = dict.fromkeys(DTYPES, CELLS)


@dataclass(frozen=True)
class Library:
    """A library to measure.

    Args:
        name: identifier in files.
        title: name in tables.
        prepare: sets the library up for a task.
        packages: required packages. The first one gives the version.
        modes: supported modes.
        cells: supported cells, by dtype.
        single: whether the library has single-step cells.
    """

    name: str
    title: str
    prepare: Callable[[Task], Call]
    packages: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    cells: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ALL_CELLS, hash=False)
    single: bool = True

    @property
    def installed(self) -> bool:
        """Whether all required packages can be imported."""
        return all(importlib.util.find_spec(package) for package in self.packages)

    @property
    def version(self) -> str:
        """Version of the library."""
        # torch.__version__ also names the build (2.13.0+cpu); the package's version may not.
        own = {"fastrnn": fastrnn.__version__, "torch": torch.__version__}
        name = self.packages[0]
        return own[name] if name in own else importlib.metadata.version(name)

    def supports(self, task: Task) -> bool:
        """Whether the library can run this task. No library has int8 training or int8 cells."""
        return (
            task.mode in self.modes
            and task.cell in self.cells.get(task.dtype, ())
            and (self.single or not task.shape.single)
            and (task.dtype != "int8" or (task.mode == "forward" and not task.shape.single))
        )


FASTRNN = Library("fastrnn", "fastrnn", _fastrnn, ("fastrnn",))
TORCH = Library("torch", "torch.nn", lambda task: ModuleCall(nn, task), ("torch",))
LIBRARIES: Final = (
    FASTRNN,
    TORCH,
    Library(
        "torch_int8",
        "torch int8",
        lambda task: ModuleCall(nn, task, quantize=_quantize_dynamic),
        ("torch",),
        modes=("forward",),
        cells={"int8": ("gru", "lstm")},
        single=False,
    ),
    Library(
        "onnxruntime",
        "ONNX Runtime",
        OnnxRuntimeCall,
        ("onnxruntime", "onnx"),
        modes=("forward",),
        cells={"float32": CELLS, "int8": ("lstm",)},
        single=False,
    ),
    Library(
        "openvino",
        "OpenVINO",
        OpenVinoCall,
        ("openvino", "onnx"),
        modes=("forward",),
        cells={"float32": CELLS},
        single=False,
    ),
)


def installed_libraries() -> tuple[Library, ...]:
    """Returns the libraries that are installed, fastrnn first."""
    return tuple(library for library in LIBRARIES if library.installed)
