"""`Session`: inference of sequences that arrive step by step, on the CPU."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastrnn.checks import describe
from fastrnn.ops import HALF
from fastrnn.ops.operators import raise_interruption
from fastrnn.ops.packed import StackShape, create, find_dtype, has_memory, pack
from fastrnn.spec import BY_MODE, Weights

__all__ = ["Session"]

# Versions of the files that `Session.export` writes: without and with residual connections.
# csrc/c/model_file.cpp reads them.
_FILE_VERSION = "1"
_RESIDUAL_FILE_VERSION = "2"

# Names of the tensors in a file, by slot.
_FILE_NAMES = {
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
    "w_hr": "weight_hr",
}


class Session:
    """Runs sequences step by step, with packed weights and the states inside. CPU, inference only.

        session = layer.stream()
        for x in stream:                # [1,I]
            y = session.step(x)         # [1,R]

    The weights are a copy: later changes of the layer's weights have no effect until `refresh`.
    Each step continues from the states that the step before left. There is no dropout.

    With one thread, a step allocates nothing and takes no lock. In float16 and bfloat16 the
    arithmetic and the states are float32: weights and x are widened, y is rounded.

    A session is for one thread at a time: a call during the call of another thread raises a
    RuntimeError. It cannot be copied or pickled. docs/session.md describes its use and speed.

    Args:
        layer: an RNN, LSTM or GRU of fastrnn in float32, float64, float16 or bfloat16 on the CPU,
            with any number of layers and one direction. Its class may not override ``forward``. For
            a layer on CUDA, ``layer.stream()`` returns a `fastrnn.cuda_session.CudaSession`.
        batch_size: B, number of sequences that run at the same time. Default: 1
        threads: largest number of threads per call. With more than one, large steps use torch's
            threads, and calls acquire memory. Default: 1

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described.
    """

    def __init__(self, layer: nn.Module, batch_size: int = 1, threads: int = 1) -> None:
        weights = self._describe(layer, batch_size, threads)
        shape = self._shape
        self._kernel_dtype = torch.float32 if self._dtype in HALF else self._dtype
        sizes = (shape.num_layers, *shape[2:])
        self._kernel = create(
            "Session", self._kernel_dtype, self._spec.name, *sizes, batch_size, threads
        )
        self._step = self._kernel.step
        self._item = self._dtype.itemsize
        self._x_bytes = self._x_shape.numel() * self._item
        self._y_bytes = self._y_shape.numel() * self._item
        # A tensor over other memory than torch's: its user cannot resize or free the memory.
        self._memory = bytearray(self._y_bytes)
        with torch.inference_mode(False):
            flat = torch.frombuffer(self._memory, dtype=self._dtype)
            self._y = flat.view(self._y_shape)
        self._y_address = self._y.data_ptr()
        # For half types: y again, and x and y of the kernel.
        self._widened: tuple[Tensor, Tensor, Tensor] | None = None
        if self._kernel_dtype != self._dtype:
            with torch.inference_mode(False):
                own = flat.view(self._y_shape)
                self._widened = own, self._new(*self._x_shape), self._new(*self._y_shape)
        self._pack(weights)
        self.reset()

    def _describe(self, layer: nn.Module, batch_size: int, threads: int) -> Weights:
        """Checks the arguments and keeps what they say. Returns the layer's weights."""
        _check_layer(layer)
        _check_count("batch_size", batch_size)
        _check_count("threads", threads)
        source: Any = layer
        self._layer = source
        self._spec = BY_MODE[source.mode]
        self._batch_first = source.batch_first
        self._batch = batch_size
        self._shape = StackShape(
            source.num_layers,
            1,
            source.input_size,
            source.hidden_size,
            source.proj_size,
            source.residual,
        )
        self._x_shape = torch.Size((batch_size, self._shape.input_size))
        self._y_shape = torch.Size((batch_size, self._shape.output_size))
        self._device = torch.device("cpu")
        with torch.no_grad():
            weights, self._dtype = self._weights_to_pack()
        return weights

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Runs one step.

        Args:
            x: [B,I] in the dtype of the weights, on the CPU.
            out: a contiguous tensor [B,R] of the same dtype on the CPU, which receives y. It may
                be ``x``. Default: a tensor of the session.

        Returns:
            y [B,R], the h of the last layer; R is P with a projection and H without. Without
            ``out`` it is the same tensor each time, and the next step overwrites it: clone it to
            keep it, or pass ``out``. It may be the ``x`` of the next step.

        Raises:
            TypeError, RuntimeError: ``x`` or ``out`` is not as described, or needs a gradient, or
                another thread uses the session, or it is closed.
        """
        try:
            is_ready = (
                type(x) is Tensor
                and x.dtype is self._dtype
                and x.shape == self._x_shape
                and x.is_cpu
                and x.is_contiguous()
                and not x.is_neg()
                and not (x.requires_grad and torch.is_grad_enabled())
                and x.storage_offset() * self._item + self._x_bytes <= x.untyped_storage().nbytes()
            )
        except Exception:  # sparse and nested tensors do not have all of these
            is_ready = False
        if not is_ready:
            x = self._accept("step", "x", x, self._x_shape)
        if out is not None:
            self._check_out(out)
        if self._widened is not None:
            self._step_widened(x, out, *self._widened)
        else:
            self._step(x.data_ptr(), self._y_address if out is None else out.data_ptr())
        return self._y if out is None else out

    def run(self, x: Any) -> Tensor:
        """Runs several steps, faster than `step` for each.

        Args:
            x: [T,B,I], or [B,T,I] if the layer is ``batch_first``.

        Returns:
            y [T,B,R] or [B,T,R], a new tensor.

        Raises:
            TypeError, RuntimeError: as in `step`.
        """
        self._check_open("run")
        if not isinstance(x, Tensor) or x.dim() != 3:
            self._fail("run", "x", "a tensor with 3 dimensions", describe(x))
        time = 1 if self._batch_first else 0
        steps = x.shape[time]
        if steps == 0:
            self._fail("run", "x", "at least one step long", "none")
        if self._batch_first:
            expected = (self._batch, steps, self._shape.input_size)
            x = self._accept("run", "x", x, expected).transpose(0, 1)
        else:
            x = self._accept("run", "x", x, (steps, *self._x_shape))
        x = x.to(self._kernel_dtype).contiguous()
        y = self._new(steps, *self._y_shape)
        try:
            self._kernel.run(x.data_ptr(), steps, y.data_ptr())
        except RuntimeError as error:
            raise_interruption(error)
            raise
        y = y.to(self._dtype)
        return y.transpose(0, 1) if self._batch_first else y

    def reset(self, rows: Any = None) -> None:
        """Sets the states to zero, or to the layer's learned initial state.

        Args:
            rows: the sequences of the batch to reset: an int, a list of ints, an int tensor, or a
                bool tensor [B] that is True for them. Default: all

        Raises:
            TypeError, IndexError, RuntimeError: ``rows`` is not as described, or the session is
                closed.
        """
        self._check_open("reset")
        numbers = None if rows is None else self._row_numbers(rows)
        if self._layer._learns_initial_state:
            self._reset_to_learned(numbers)
        else:
            self._clear(numbers)

    def _clear(self, rows: list[int] | None) -> None:
        """Sets the states of some sequences, or of all, to zero."""
        if rows is None:
            self._kernel.write_states(0, 0)
        else:
            for row in rows:
                self._kernel.clear_row(row)

    def _reset_to_learned(self, rows: list[int] | None) -> None:
        with torch.no_grad():
            learned = self._layer._learned_states(self._batch)
            initial = list(learned) if self._spec.has_cell_state else [learned]
            units = (self._shape.output_size, self._shape.hidden_size)
            initial = [
                self._accept("reset", name, state, self._state_shape(size))
                .to(self._kernel_dtype)
                .contiguous()
                for name, state, size in zip(("h_0", "c_0"), initial, units, strict=False)
            ]
            if rows is not None:
                current = self._read_states()
                for state, new in zip(current, initial, strict=True):
                    state[:, rows] = new[:, rows]
                initial = current
        self._write_states(initial)

    @property
    def state(self) -> Any:
        """A copy of the states: h [L,B,R], or for an LSTM the pair of h and c [L,B,H].

        With ``batch_first_states`` they are [B,L,*].

        It is what the layer returns as its final state, and what it takes as ``hx``. In float16
        and bfloat16 it is rounded.
        """
        self._check_open("state")
        states = tuple([state.to(self._dtype) for state in self._read_states()])
        if self._layer.batch_first_states:
            states = tuple([state.transpose(0, 1) for state in states])
        return states if self._spec.has_cell_state else states[0]

    def _read_states(self) -> list[Tensor]:
        """Returns copies of h and, if the cell has it, c, in the kernel's dtype."""
        h = self._new(*self._state_shape(self._shape.output_size))
        if not self._spec.has_cell_state:
            self._kernel.read_states(h.data_ptr(), 0)
            return [h]
        c = self._new(*self._state_shape(self._shape.hidden_size))
        self._kernel.read_states(h.data_ptr(), c.data_ptr())
        return [h, c]

    def _write_states(self, states: list[Tensor]) -> None:
        self._kernel.write_states(states[0].data_ptr(), states[1].data_ptr() if states[1:] else 0)

    def load_state(self, state: Any) -> None:
        """Replaces the states by a copy of ``state``, which has the form of `state`.

        Raises:
            TypeError, RuntimeError: ``state`` has another form, dtype, size or device, or the
                session is closed.
        """
        self._check_open("load_state")
        expected = [self._state_shape(self._shape.output_size)]
        given, names = [state], ["state"]
        if self._spec.has_cell_state:
            if not isinstance(state, tuple | list) or len(state) != 2:
                message = "a tuple of two tensors, h and c"
                self._fail("load_state", "state", message, describe(state))
            expected.append(self._state_shape(self._shape.hidden_size))
            given, names = list(state), ["state[0]", "state[1]"]
        swaps = self._layer.batch_first_states
        kept = []
        for name, value, (layers, batch, units) in zip(names, given, expected, strict=True):
            shape = (batch, layers, units) if swaps else (layers, batch, units)
            accepted = self._accept("load_state", name, value, shape).to(self._kernel_dtype)
            kept.append((accepted.transpose(0, 1) if swaps else accepted).contiguous())
        self._write_states(kept)

    @property
    def is_stale(self) -> bool:
        """Whether the layer's weights have changed since the session copied them.

        Then `refresh` makes the session use the new ones. No step checks this. Changes through
        ``.data`` or NumPy, which autograd cannot see either, do not show.
        """
        try:
            return fingerprint(self._layer) != self._copied
        except Exception:  # the weights are no longer plain tensors
            return True

    def refresh(self) -> None:
        """Copies the current weights of the layer. The states stay as they are.

        Raises:
            RuntimeError: the weights have another dtype, device or size than before, or the
                session is closed.
        """
        self._check_open("refresh")
        with torch.no_grad():
            weights, dtype = self._weights_to_pack()
            if dtype != self._dtype:
                raise RuntimeError(f"Session: the weights must be {self._dtype}, got {dtype}.")
            self._pack(weights)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights to a file for the C interface, in safetensors format.

        The tensors are float32 and have torch's names. ``__metadata__`` has the cell and the sizes.
        A learned initial state is in it as ``h_0`` and ``c_0``. docs/c_interface.md describes how
        to use the file.

        Raises:
            RuntimeError: the weights are float64, or have changed since the session copied them,
                or the session is closed.
            OSError: the file cannot be written.
        """
        self._check_open("export")
        if self._dtype == torch.float64:
            raise RuntimeError(
                "Session.export: the weights must be float32, float16 or bfloat16, got float64. "
                "Convert the layer with layer.float()."
            )
        if self.is_stale:
            raise RuntimeError(
                "Session.export: the layer's weights have changed since the session copied them. "
                "Call refresh() first."
            )
        if self._spec.defined:
            raise TypeError(
                "Session.export: the layer's cell must be one of fastrnn, which the C interface "
                f"knows, got {self._spec.name} of fastrnn.define_cell."
            )
        with torch.no_grad():
            weights, _ = self._weights_to_pack()
            tensors = {
                f"{_FILE_NAMES[slot]}_l{index}": weight.detach().resolve_neg().contiguous()
                for index, direction in enumerate(weights.directions())
                for slot, weight in direction._asdict().items()
                if weight is not None
            }
        tensors.update(self._learned_tensors())
        metadata = {
            "format": "pt",
            "fastrnn": _RESIDUAL_FILE_VERSION if self._shape.residual else _FILE_VERSION,
            "cell": self._spec.name,
            "input_size": str(self._shape.input_size),
            "hidden_size": str(self._shape.hidden_size),
            "num_layers": str(self._shape.num_layers),
            "proj_size": str(self._shape.proj_size),
            "bias": "true" if "bias_ih_l0" in tensors else "false",
        }
        if self._shape.residual:
            metadata["residual"] = "true"
        _write_safetensors(path, metadata, tensors)

    def _learned_tensors(self) -> dict[str, Tensor]:
        """Returns the learned initial states in float32, by their names in a file: [L,1,*]."""
        if not self._layer._learns_initial_state:
            return {}
        learned = self._layer._learned_states(1)
        states = learned if self._spec.has_cell_state else [learned]
        units = (self._shape.output_size, self._shape.hidden_size)
        return {
            name: self._accept("export", name, state.detach(), (self._shape.num_layers, 1, size))
            .float()
            .contiguous()
            for name, state, size in zip(("h_0", "c_0"), states, units, strict=False)
        }

    def close(self) -> None:
        """Frees the weights and the memory. Every later call but this one raises a RuntimeError."""
        self._kernel = None
        self._step = _raise_closed

    def __repr__(self) -> str:
        """Returns the layer's description, the batch size, and whether it is stale or closed."""
        note = ", closed" if self._kernel is None else ", stale" if self.is_stale else ""
        return f"Session({self._layer!r}, batch_size={self._batch}{note})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raises: a session cannot be copied or pickled."""
        raise TypeError(
            "Session: a session cannot be copied or pickled. Create a new one from the layer, "
            "and pass `state` of this one to its `load_state`."
        )

    def _weights_to_pack(self) -> tuple[Weights, torch.dtype]:
        """Returns the layer's weights in the kernel's dtype, and the layer's own dtype."""
        weights: Weights = self._layer._weights_to_pack()
        dtype = weights.flat[0].dtype
        if dtype not in HALF:
            return weights, find_dtype("Session", weights)
        for weight in weights.flat:
            if weight.dtype != dtype:
                raise RuntimeError(f"Session: all weights must be {dtype}, got {weight.dtype}.")
        widened = Weights([weight.detach().float() for weight in weights.flat], weights.slots)
        find_dtype("Session", widened)
        return widened, dtype

    def _pack(self, weights: Weights) -> None:
        self._copied = fingerprint(self._layer)
        pack(self._kernel, "Session", self._spec, self._shape, weights)

    def _step_widened(
        self, x: Tensor, out: Tensor | None, y: Tensor, wide_x: Tensor, wide_y: Tensor
    ) -> None:
        """Runs one step of a half type."""
        wide_x.copy_(x)
        self._step(wide_x.data_ptr(), wide_y.data_ptr())
        (y if out is None else out).copy_(wide_y)

    def _check_open(self, method: str) -> None:
        if self._kernel is None:
            raise RuntimeError(f"Session.{method}: the session is closed.")

    def _check_out(self, out: Any) -> None:
        """Raises unless the kernel can write y to this tensor."""
        if type(out) is not Tensor:
            self._fail("step", "out", "a tensor", describe(out), TypeError)
        if out.dtype != self._dtype:
            self._fail("step", "out", str(self._dtype), str(out.dtype))
        self._check_place("step", "out", out)
        if out.shape != self._y_shape:
            self._fail("step", "out", f"of size {list(self._y_shape)}", str(list(out.shape)))
        if not out.is_contiguous() or out.is_neg():
            self._fail("step", "out", "contiguous", f"strides {out.stride()}")
        if out.requires_grad:
            self._fail("step", "out", "without a gradient", "requires_grad=True")
        if not has_memory(out):
            message = "a tensor whose storage holds all its values"
            self._fail("step", "out", message, "a smaller one")

    def _row_numbers(self, rows: Any) -> list[int]:
        """Returns the sequences that the argument of `reset` names."""
        if isinstance(rows, int) and not isinstance(rows, bool):
            rows = [rows]
        if isinstance(rows, Tensor):
            if rows.dtype == torch.bool:
                if tuple(rows.shape) != (self._batch,):
                    size = f"of size {[self._batch]}"
                    self._fail("reset", "rows", f"a bool tensor {size}", str(list(rows.shape)))
                rows = rows.nonzero().flatten()
            if rows.dim() > 1 or rows.is_floating_point() or rows.is_complex():
                expected = "an int tensor with one dimension"
                self._fail("reset", "rows", expected, describe(rows), TypeError)
            rows = rows.reshape(-1).tolist()
        is_list = isinstance(rows, list | tuple | range)
        if not is_list or any(not isinstance(row, int) or isinstance(row, bool) for row in rows):
            expected = "an int, a list of ints, or an int or bool tensor"
            self._fail("reset", "rows", expected, describe(rows), TypeError)
        for row in rows:
            if not 0 <= row < self._batch:
                self._fail("reset", "rows", f"from 0 to {self._batch - 1}", str(row), IndexError)
        return list(rows)

    def _new(self, *sizes: int) -> Tensor:
        """Returns a tensor whose memory the kernel can write."""
        t = torch.empty(sizes, dtype=self._kernel_dtype, device="cpu")
        if type(t) is not Tensor:  # FakeTensorMode and the like return tensors without memory
            raise RuntimeError(
                f"Session: new tensors must be plain, got a {type(t).__name__}, which a torch "
                "mode makes."
            )
        return t

    def _state_shape(self, units: int) -> tuple[int, ...]:
        return self._shape.num_layers, self._batch, units

    def _accept(self, method: str, name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor whose memory the kernel can read: x itself or a contiguous copy."""
        if type(x) is not Tensor and not isinstance(x, nn.Parameter):
            self._fail(method, name, "a tensor", describe(x), TypeError)
        if x.dtype != self._dtype:
            self._fail(method, name, str(self._dtype), str(x.dtype))
        self._check_place(method, name, x)
        if tuple(x.shape) != tuple(shape):
            self._fail(method, name, f"of size {list(shape)}", str(list(x.shape)))
        if x.requires_grad and torch.is_grad_enabled():
            self._fail(
                method, name, "without a gradient", "requires_grad=True. Use torch.no_grad()"
            )
        readable: Tensor = x.detach().resolve_neg().contiguous()
        if not has_memory(readable):
            self._fail(method, name, "a tensor whose storage holds all its values", "a smaller one")
        return readable

    def _check_place(self, method: str, name: str, x: Tensor) -> None:
        """Raises unless a tensor is dense and on the session's device."""
        if x.device != self._device or x.layout != torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else str(x.layout)
            place = "the CPU" if self._device.type == "cpu" else str(self._device)
            self._fail(method, name, f"a dense tensor on {place}", f"{kind} on {x.device}")

    def _fail(
        self,
        method: str,
        name: str,
        expected: str,
        actual: str,
        kind: type[Exception] = RuntimeError,
    ) -> NoReturn:
        raise kind(f"Session.{method}: {name} must be {expected}, got {actual}.")


def _raise_closed(*arguments: int) -> NoReturn:
    """Takes the place of a closed session's step."""
    raise RuntimeError("Session.step: the session is closed.")


def fingerprint(layer: nn.Module) -> list[Any]:
    """Returns what changes when the weights of a layer do: identities, versions and addresses.

    A weight that a parametrization computes is new at each access, so the parameters that it is
    computed from count.
    """
    return [
        (id(p), None if p.is_inference() else p._version, p.data_ptr()) for p in layer.parameters()
    ]


def _write_safetensors(
    path: str | os.PathLike[str], metadata: dict[str, str], tensors: dict[str, Tensor]
) -> None:
    """Writes contiguous float32 tensors in safetensors format.

    The format is: the size of the header in 8 bytes, the header in JSON, the values.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers may map the values, which must be aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            # NumPy, which torch does not require, would be needed for tensor.numpy().
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def _check_layer(layer: Any) -> None:
    cls = type(layer)
    # Not isinstance: the modules are a layer of the package above this one.
    if not hasattr(layer, "_weights") or getattr(layer, "mode", None) not in BY_MODE:
        raise TypeError(
            "Session: layer must be an RNN, LSTM or GRU of fastrnn, got "
            f"{cls.__module__}.{cls.__name__}. fastrnn.convert turns torch's into fastrnn's."
        )
    if not cls.forward.__module__.startswith("fastrnn."):
        raise TypeError(
            f"Session: layer must have the forward of fastrnn, got {cls.__name__}, which "
            "overrides it."
        )
    layer._check_packable("stream")
    options = layer._cell_options
    if options is not None and (options.heads > 1 or options.changes_the_cell(training=False)):
        raise ValueError(
            "Session: layer must have neither layer_norm nor zoneout nor another option of the "
            f"cell, got {options.describe()}."
        )
    if layer.bidirectional:
        raise ValueError(
            "Session: layer must have one direction, got a bidirectional layer, whose second "
            "direction begins with the last step."
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Session: {name} must be an int, got {describe(value)}.")
    if value < 1:
        raise ValueError(f"Session: {name} must be at least 1, got {describe(value)}.")
    if value >= 2**31:
        raise ValueError(f"Session: {name} must be at most {2**31 - 1}, got {describe(value)}.")
