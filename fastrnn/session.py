"""`Session`: inference of sequences that arrive step by step, on the CPU."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastrnn.checks import describe
from fastrnn.modules.base import Hidden, RecurrentBase
from fastrnn.ops.operators import raise_interruption
from fastrnn.ops.packed import StackShape, create, find_dtype, has_memory, pack
from fastrnn.spec import BY_MODE

__all__ = ["Session"]


class Session:
    """Runs sequences step by step, with packed weights and the states inside. CPU, inference only.

        session = fastrnn.Session(module)
        for x in stream:                # [1,I]
            y = session.step(x)         # [1,R]

    The weights are a copy: later changes of the module's weights have no effect until `update`.
    Each step continues from the states that the step before left. There is no dropout.

    A session is for one thread at a time: a call during the call of another thread raises a
    RuntimeError. It cannot be copied or pickled. docs/session.md describes its use and speed.

    Args:
        module: an RNN, LSTM or GRU of fastrnn in float32 or float64 on the CPU, with any number of
            layers and one direction. Its class may not override ``forward``.
        batch_size: B, number of sequences that run at the same time. Default: 1
        threads: largest number of threads per call. A small step uses one thread in any case.
            Default: ``torch.get_num_threads()`` at each call.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described.
    """

    def __init__(self, module: nn.Module, batch_size: int = 1, threads: int | None = None) -> None:
        _check_module(module)
        _check_count("batch_size", batch_size)
        if threads is not None:
            _check_count("threads", threads)
        layer: RecurrentBase = module  # type: ignore[assignment]
        self._module = layer
        self._spec = BY_MODE[layer.mode]
        self._batch_first = layer.batch_first
        self._batch = batch_size
        shape = StackShape(
            layer.num_layers, 1, layer.input_size, layer.hidden_size, layer.proj_size
        )
        self._shape = shape
        with torch.no_grad():
            weights = layer._weights()
        self._dtype = find_dtype("Session", weights)
        sizes = (shape.num_layers, shape.input_size, shape.hidden_size, shape.proj_size)
        self._kernel = create(
            "Session", self._dtype, self._spec.name, *sizes, batch_size, threads or 0
        )
        self._run = self._kernel.run
        self._x_shape = torch.Size((batch_size, shape.input_size))
        self._item = self._dtype.itemsize
        self._x_bytes = self._x_shape.numel() * self._item
        # A tensor over other memory than torch's: its user cannot resize or free the memory.
        self._memory = bytearray(batch_size * shape.output_size * self._item)
        with torch.inference_mode(False):
            flat = torch.frombuffer(self._memory, dtype=self._dtype)
            self._y = flat.view(batch_size, shape.output_size)
        self._y_address = self._y.data_ptr()
        self.update()
        self.reset()

    def step(self, x: Tensor) -> Tensor:
        """Runs one step.

        Args:
            x: [B,I] in the dtype of the weights, on the CPU.

        Returns:
            y [B,R], the h of the last layer; R is P with a projection and H without. It is the
            same tensor each time, and the next step overwrites it: clone it to keep it. It may be
            the ``x`` of the next step.

        Raises:
            TypeError, RuntimeError: ``x`` is not as described, or needs a gradient, or another
                thread uses the session.
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
        self._run(x.data_ptr(), 1, self._y_address)
        return self._y

    def run(self, x: Any) -> Tensor:
        """Runs several steps, faster than `step` for each.

        Args:
            x: [T,B,I], or [B,T,I] if the module is ``batch_first``.

        Returns:
            y [T,B,R] or [B,T,R], a new tensor.

        Raises:
            TypeError, RuntimeError: as in `step`.
        """
        if not isinstance(x, Tensor) or x.dim() != 3:
            self._fail("run", "x", "a tensor with 3 dimensions", describe(x))
        time = 1 if self._batch_first else 0
        steps = x.shape[time]
        if steps == 0:
            self._fail("run", "x", "at least one step long", "none")
        if self._batch_first:
            expected = (self._batch, steps, self._shape.input_size)
            x = self._accept("run", "x", x, expected).transpose(0, 1).contiguous()
        else:
            x = self._accept("run", "x", x, (steps, *self._x_shape))
        y = self._new(steps, self._batch, self._shape.output_size)
        try:
            self._run(x.data_ptr(), steps, y.data_ptr())
        except RuntimeError as error:
            raise_interruption(error)
            raise
        return y.transpose(0, 1) if self._batch_first else y

    def reset(self) -> None:
        """Sets the states to zero, or to the learned initial state of the module."""
        self._kernel.write_states(0, 0)
        if self._module._learns_initial_state:
            with torch.no_grad():
                self.set_state(self._module._learned_states(self._batch))

    @property
    def state(self) -> Hidden:
        """A copy of the states: h [L,B,R], or for an LSTM the pair of h and c [L,B,H].

        It is what the module returns as its final state, and what it takes as ``hx``.
        """
        h = self._new(*self._state_shape(self._shape.output_size))
        if not self._spec.has_cell_state:
            self._kernel.read_states(h.data_ptr(), 0)
            return h
        c = self._new(*self._state_shape(self._shape.hidden_size))
        self._kernel.read_states(h.data_ptr(), c.data_ptr())
        return h, c

    def set_state(self, hx: Hidden) -> None:
        """Replaces the states by a copy of ``hx``, which has the form of `state`.

        Raises:
            TypeError, RuntimeError: ``hx`` has another form, dtype, size or device.
        """
        h_shape = self._state_shape(self._shape.output_size)
        if not self._spec.has_cell_state:
            h = self._accept("set_state", "hx", hx, h_shape)
            self._kernel.write_states(h.data_ptr(), 0)
            return
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            self._fail("set_state", "hx", "a tuple of two tensors, h and c", describe(hx))
        h = self._accept("set_state", "hx[0]", hx[0], h_shape)
        c = self._accept("set_state", "hx[1]", hx[1], self._state_shape(self._shape.hidden_size))
        self._kernel.write_states(h.data_ptr(), c.data_ptr())

    def update(self) -> None:
        """Copies the current weights of the module. The states stay as they are.

        Raises:
            RuntimeError: the weights have another dtype, device or size than before.
        """
        with torch.no_grad():
            weights = self._module._weights()
            dtype = find_dtype("Session", weights)
            if dtype != self._dtype:
                raise RuntimeError(f"Session: the weights must be {self._dtype}, got {dtype}.")
            pack(self._kernel, "Session", self._spec, self._shape, weights)

    def __repr__(self) -> str:
        """Returns the module's description and the batch size."""
        return f"Session({self._module!r}, batch_size={self._batch})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raises: a session cannot be copied or pickled."""
        raise TypeError(
            "Session: a session cannot be copied or pickled. Create a new one from the module, "
            "and pass `state` of this one to its `set_state`."
        )

    def _new(self, *sizes: int) -> Tensor:
        """Returns a tensor whose memory the kernel can write."""
        t = torch.empty(sizes, dtype=self._dtype, device="cpu")
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
        if x.device.type != "cpu" or x.layout != torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else str(x.layout)
            self._fail(method, name, "a dense tensor on the CPU", f"{kind} on {x.device}")
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

    def _fail(
        self,
        method: str,
        name: str,
        expected: str,
        actual: str,
        kind: type[Exception] = RuntimeError,
    ) -> NoReturn:
        raise kind(f"Session.{method}: {name} must be {expected}, got {actual}.")


def _check_module(module: Any) -> None:
    cls = type(module)
    if not isinstance(module, RecurrentBase):
        raise TypeError(
            "Session: module must be an RNN, LSTM or GRU of fastrnn, got "
            f"{cls.__module__}.{cls.__name__}. fastrnn.convert turns torch's into fastrnn's."
        )
    if not cls.forward.__module__.startswith("fastrnn."):
        raise TypeError(
            f"Session: module must have the forward of fastrnn, got {cls.__name__}, which "
            "overrides it."
        )
    if module.bidirectional:
        raise ValueError(
            "Session: module must have one direction, got a bidirectional module, whose second "
            "direction begins with the last step."
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Session: {name} must be an int, got {describe(value)}.")
    if value < 1:
        raise ValueError(f"Session: {name} must be at least 1, got {value}.")
