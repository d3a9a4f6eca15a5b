"""`CudaSession`: inference of sequences that arrive step by step, on CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastrnn.checks import describe
from fastrnn.engine.run import run
from fastrnn.layer_call import PADDED, LayerCall, Options, Results
from fastrnn.session import Session, fingerprint
from fastrnn.spec import Weights

__all__ = ["CudaSession"]


class CudaSession(Session):
    """A `fastrnn.Session` of a layer on CUDA: a step is a CUDA graph, captured once.

    A step copies x, replays the graph and returns; the host does not wait for the GPU. The states
    and the copy of the weights stay where the graph reads them. Half types are computed as the
    layer computes them, so h and c are rounded after each step. `export` raises.

    The graph is replayed on the current stream: use one stream at a time.

    Args:
        layer: as for `fastrnn.Session`, on a CUDA device.
        batch_size: B, number of sequences that run at the same time. Default: 1
        threads: must be 1.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described.
    """

    def __init__(self, layer: nn.Module, batch_size: int = 1, threads: int = 1) -> None:
        weights = self._describe(layer, batch_size, threads)
        if threads != 1:
            raise ValueError(f"Session: threads must be 1 on CUDA, got {threads}.")
        self._kernel_dtype = self._dtype
        self._options = Options(num_layers=self._shape.num_layers, residual=self._shape.residual)
        with torch.inference_mode(False), torch.no_grad():
            self._own = Weights([torch.empty_like(w) for w in weights.flat], weights.slots)
            self._pack(weights)
            self._x, self._y = self._new(*self._x_shape), self._new(*self._y_shape)
            units = [self._shape.output_size]
            if self._spec.has_cell_state:
                units.append(self._spec.cell_states * self._shape.hidden_size)
            self._states = [self._new(*self._state_shape(size)).zero_() for size in units]
            self._kernel: Any = self._x.zero_()  # not None: the session is open
            self._advance = capture(self._one_step, self._device)
        self.reset()

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Runs one step; see `fastrnn.Session.step`. The tensors are on the layer's device."""
        self._check_open("step")
        x = self._accept("step", "x", x, self._x_shape)
        if out is not None:
            self._check_out(out)
        with torch.no_grad():
            self._x.copy_(x)
            self._advance()
            return self._y if out is None else out.copy_(self._y)

    def run(self, x: Any) -> Tensor:
        """Runs several steps in one call of the kernels; see `fastrnn.Session.run`."""
        self._check_open("run")
        if not isinstance(x, Tensor) or x.dim() != 3:
            self._fail("run", "x", "a tensor with 3 dimensions", describe(x))
        time = 1 if self._batch_first else 0
        steps = x.shape[time]
        if steps == 0:
            self._fail("run", "x", "at least one step long", "none")
        expected = [steps, *self._x_shape]
        if self._batch_first:
            expected[:2] = expected[1::-1]
        x = self._accept("run", "x", x, tuple(expected))
        with torch.no_grad():
            y, *states = self._run_layers(x.transpose(0, 1) if self._batch_first else x)
            self._write_states([t for t in states if t is not None])
        return y.transpose(0, 1) if self._batch_first else y

    def export(self, path: str | os.PathLike[str]) -> NoReturn:
        """Raises: the C interface runs on the CPU."""
        raise RuntimeError(
            f"Session.export: the layer must be on the CPU, got {self._device}. Use "
            "layer.cpu().stream().export(path)."
        )

    def close(self) -> None:
        """Frees the graph and the memory. Every later call but this one raises a RuntimeError."""
        self._kernel = None
        self._advance = _nothing
        self._own = self._own._replace(flat=[])
        self._states = []

    def _one_step(self) -> None:
        y, *states = self._run_layers(self._x.unsqueeze(0))
        self._y.copy_(y.squeeze(0))
        self._write_states([t for t in states if t is not None])

    def _run_layers(self, x: Tensor) -> Results:
        h, *c = self._states
        call = LayerCall(self._spec, x, PADDED, h, c[0] if c else None, self._own, self._options)
        with torch.autocast(x.device.type, enabled=False):
            return run(call)

    def _weights_to_pack(self) -> tuple[Weights, torch.dtype]:
        weights: Weights = self._layer._torch_weights()
        first = weights.flat[0]
        self._device = first.device
        for weight in weights.flat:
            if weight.device != first.device or weight.dtype != first.dtype:
                raise RuntimeError(
                    f"Session: all weights must be {first.dtype} on {first.device}, got "
                    f"{weight.dtype} on {weight.device}."
                )
        return weights, first.dtype

    def refresh(self) -> None:
        """Copies the current weights of the layer; see `fastrnn.Session.refresh`."""
        device = self._device
        try:
            super().refresh()
        finally:
            self._device = device

    def _pack(self, weights: Weights) -> None:
        for own, weight in zip(self._own.flat, weights.flat, strict=True):
            if own.shape != weight.shape or own.device != weight.device:
                raise RuntimeError(
                    f"Session: a weight must be of size {list(own.shape)} on {own.device}, got "
                    f"{list(weight.shape)} on {weight.device}."
                )
        for own, weight in zip(self._own.flat, weights.flat, strict=True):
            own.copy_(weight)
        self._copied = fingerprint(self._layer)

    def _new(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=self._dtype, device=self._device)

    def _read_states(self) -> list[Tensor]:
        return [state.clone() for state in self._states]

    def _write_states(self, states: list[Tensor]) -> None:
        with torch.no_grad():
            for own, state in zip(self._states, states, strict=True):
                own.copy_(state)

    def _clear(self, rows: list[int] | None) -> None:
        with torch.no_grad():
            for state in self._states:
                if rows is None:
                    state.zero_()
                else:
                    state[:, rows] = 0


def _nothing() -> None:
    """Takes the place of a closed session's graph."""


def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures the work that a function queues on a GPU. Returns a function that replays it."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # kernels and the workspaces of libraries are loaded before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    replay: Callable[[], None] = graph.replay
    return replay
