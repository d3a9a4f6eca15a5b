"""`QuantizedRecurrent`: RNN, LSTM or GRU with int8 weights, for inference on the CPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.checks import describe
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.cell_options import reject, reject_other_weights
from fastrnn.ops import HALF
from fastrnn.ops.int8 import DEPTH, MOST_COLUMNS, UNITS, Int8Weights, int8_layer
from fastrnn.spec import BY_MODE, CellSpec, DirectionWeights

__all__ = ["QuantizedRecurrent"]

_State = Any  # a tensor, or for an LSTM a pair of tensors


class _Rows(NamedTuple):
    """A matrix of integers [G*H,K] and the scales [G*H] of its rows: w = scale * integer."""

    integers: Tensor
    scales: Tensor


class QuantizedRecurrent(nn.Module):
    """A stack of recurrent layers whose weights are int8. `fastrnn.quantize` creates it.

    It is called like the layer that it was made from: the same ``input`` (padded, unbatched or a
    `PackedSequence`), ``hx``, ``batch_first``, layers and directions, and the same results. It is
    for inference only, on the CPU. docs/int8.md describes how it rounds.

    Buffers, for each layer and direction, with the suffix of the parameters (``_l0``,
    ``_l0_reverse``, ...). Blocks hold 16 units; units beyond H and columns beyond K hold zeros:

        panels_ih, panels_hh    int8 [ceil(H/16), ceil(K/4), G, 16, 4], K = I or H
        scales_ih, scales_hh    float32 [ceil(H/16), G, 16], one for each row of the weights
        sums_ih, sums_hh        int32 [ceil(H/16), G, 16], sums of the integers of each row
        bias                    float32 [ceil(H/16), Q, 16], of each pre-activation

    `weight` returns the weights that they represent.
    """

    training: bool

    def __init__(self, layer: RecurrentBase) -> None:
        reject("fastrnn.quantize", layer)
        reject_other_weights("fastrnn.quantize", layer)
        super().__init__()
        spec = BY_MODE[layer.mode]
        name = type(layer).__name__
        if layer.proj_size:
            raise NotImplementedError(
                f"quantize: proj_size of {name} must be 0, got {layer.proj_size}."
            )
        if layer._learns_initial_state:
            raise NotImplementedError(
                f"quantize: {name} must not have a learned initial state, got "
                "learn_initial_state=True."
            )
        for option in ("residual", "batch_first_states"):
            if getattr(layer, option):
                raise NotImplementedError(f"quantize: {option} of {name} must be False, got True.")
        self.training = False
        self.mode = layer.mode
        self.input_size = layer.input_size
        self.hidden_size = layer.hidden_size
        self.num_layers = layer.num_layers
        self.bias = layer.bias
        self.batch_first = layer.batch_first
        self.bidirectional = layer.bidirectional
        self._names = [[key + suffix for key in Int8Weights._fields] for suffix in self._suffixes()]
        widest = max(self.input_size, self.hidden_size * self._directions)
        if widest > MOST_COLUMNS:
            raise ValueError(
                f"quantize: input_size and hidden_size of {name} must be at most {MOST_COLUMNS} "
                f"(per layer, both directions together), got {widest}."
            )
        with torch.no_grad():
            weights = layer._torch_weights().directions()
            for suffix, own in zip(self._suffixes(), weights, strict=True):
                for kind, weight in own._asdict().items():
                    if weight is not None:
                        _check_weight(f"{kind}{suffix}", weight)
                for key, buffer in _quantize_direction(spec, own)._asdict().items():
                    self.register_buffer(key + suffix, buffer)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self) -> list[str]:
        reverse = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{r}" for layer in range(self.num_layers) for r in reverse]

    def _get_name(self) -> str:
        return "Quantized" + self.mode.partition("_")[0]

    def extra_repr(self) -> str:
        """Returns the constructor's arguments of the layer as torch shows them."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.mode.startswith("RNN_"):
            parts.append(f"nonlinearity={self.mode.removeprefix('RNN_').lower()!r}")
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        parts += [f"{key}={value}" for key, value in (("bias", self.bias),) if not value]
        parts += [f"{key}=True" for key in ("batch_first", "bidirectional") if getattr(self, key)]
        return ", ".join(parts)

    def train(self, mode: bool = True) -> QuantizedRecurrent:
        """Raises unless ``mode`` is False: int8 weights have no gradient."""
        if mode:
            raise RuntimeError(
                f"{self._get_name()}: mode must be False, got True. A quantized layer is for "
                "inference only; train the original module and quantize it again."
            )
        super().train(False)
        return self

    def weight(self, name: str) -> Tensor:
        """Returns the float32 weights that a matrix represents.

        Args:
            name: as in the original layer, for example ``"weight_hh_l0"``.

        Returns:
            A new tensor [G*H,I] or [G*H,H].
        """
        kind, _, place = name.removeprefix("weight_").partition("_l")
        suffix = f"_l{place}"
        if kind not in ("ih", "hh") or suffix not in self._suffixes():
            raise ValueError(
                f"{self._get_name()}: name must be that of a weight matrix, such as "
                f"'weight_hh_l0', got {name!r}."
            )
        panels, scales = (
            getattr(self, f"panels_{kind}{suffix}"),
            getattr(self, f"scales_{kind}{suffix}"),
        )
        width = self.input_size if suffix.startswith("_l0") else self.hidden_size * self._directions
        columns = width if kind == "ih" else self.hidden_size
        blocks, quads, gates, _, _ = panels.shape
        integers = panels.permute(2, 0, 3, 1, 4).reshape(gates, blocks * UNITS, quads * DEPTH)
        by_gate = scales.permute(1, 0, 2).reshape(gates, blocks * UNITS, 1)
        rows = (integers.float() * by_gate)[:, : self.hidden_size, :columns]
        result: Tensor = rows.reshape(gates * self.hidden_size, columns)
        return result

    def forward(self, input: Any, hx: _State = None) -> Any:
        """Runs the layers over ``input`` from the state ``hx``, like the original layer.

        Raises:
            RuntimeError, TypeError, ValueError: an argument is wrong, or needs a gradient.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        self._check_tensor("input", input)
        if input.dim() not in (2, 3):
            self._raise("input", "2-D or 3-D", f"{input.dim()}-D")
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if is_batched else input.unsqueeze(batch_dim)
        if x.shape[1 - batch_dim] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        h0, c0 = self._states(x, hx, x.shape[batch_dim], is_batched)
        if self.batch_first:
            x = x.transpose(0, 1)
        y, h_n, c_n = self._run(x, h0, c0, None)
        if self.batch_first:
            y = y.transpose(0, 1)
        if not is_batched:
            y, h_n = y.squeeze(batch_dim), h_n.squeeze(1)
            c_n = None if c_n is None else c_n.squeeze(1)
        return y, h_n if c_n is None else (h_n, c_n)

    def _forward_packed(self, packed: PackedSequence, hx: _State) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self._check_tensor("data", data)
        if data.dim() != 2:
            self._raise("data", "2-D", f"{data.dim()}-D")
        if torch.compiler.is_compiling() and sorted_indices is not None:
            batch: Any = sorted_indices.shape[0]  # a shape, so no tensor value is read
        else:
            batch = int(batch_sizes[0])
        h0, c0 = self._states(data, hx, batch, True)
        if sorted_indices is not None and hx is not None:
            h0 = h0.index_select(1, sorted_indices)
            c0 = None if c0 is None else c0.index_select(1, sorted_indices)
        y, h_n, c_n = self._run(data, h0, c0, batch_sizes)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        result = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return result, h_n if c_n is None else (h_n, c_n)

    def _states(
        self, x: Tensor, hx: _State, batch: int, is_batched: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns h0 and c0 [L*D,B,H], checked; zeros without ``hx``."""
        has_cell_state = BY_MODE[self.mode].has_cell_state
        size = (self.num_layers * self._directions, batch, self.hidden_size)
        if hx is None:
            zeros = x.new_zeros(size)
            return zeros, zeros if has_cell_state else None
        if has_cell_state:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                self._raise("hx", "a tuple of two tensors, h and c", describe(hx), TypeError)
            names = ["hx[0]", "hx[1]"]
        else:
            names, hx = ["hx"], (hx,)
        states = []
        for name, state in zip(names, hx, strict=True):
            self._check_tensor(name, state, width=self.hidden_size, dtype=x.dtype)
            expected = size if is_batched else (size[0], size[2])
            if state.dim() != len(expected) or any(
                a != b for a, b in zip(state.shape, expected, strict=True)
            ):
                self._raise(name, f"of shape {list(expected)}", f"{list(state.shape)}")
            states.append(state if is_batched else state.unsqueeze(1))
        return states[0], states[1] if has_cell_state else None

    def _check_tensor(
        self, name: str, t: Any, width: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Raises unless a tensor can be computed with."""
        if (  # nearly always
            type(t) is Tensor
            and t.dtype == torch.float32
            and t.is_cpu
            and t.layout == torch.strided
            and not t.requires_grad
            and (dtype is None or dtype == torch.float32)
            and (width is not None or t.shape[-1:] == (self.input_size,))
            and not t.is_nested
        ):
            return
        if not isinstance(t, Tensor):
            expected = "a tensor or a PackedSequence" if name == "input" else "a tensor"
            self._raise(name, expected, describe(t), TypeError)
        if t.layout != torch.strided or t.is_nested or t.is_quantized:
            self._raise(name, "a dense tensor", "another")
        if t.device.type != "cpu":
            self._raise(name, "on the CPU", str(t.device))
        if dtype is not None and t.dtype != dtype:
            self._raise(name, f"of {dtype} like the input", str(t.dtype))
        if t.dtype != torch.float32 and t.dtype not in HALF:
            self._raise(name, "of float32, float16 or bfloat16", str(t.dtype))
        if torch.is_grad_enabled() and t.requires_grad:
            self._raise(
                name,
                "a tensor that needs no gradient, because a quantized layer has none (call it "
                f"under torch.no_grad(), or pass {name}.detach())",
                "one with requires_grad=True",
            )
        if width is None and t.dim() > 0 and t.shape[-1] != self.input_size:
            self._raise(name, f"of {self.input_size} features", f"{t.shape[-1]}")

    def _raise(
        self, name: str, expected: str, actual: str, kind: type[Exception] = RuntimeError
    ) -> NoReturn:
        raise kind(f"{self._get_name()}: {name} must be {expected}, got {actual}.")

    def _run(
        self, x: Tensor, h0: Tensor, c0: Tensor | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = x.dtype
        if dtype != torch.float32:
            y, h_n, c_n = self._run(
                x.float(), h0.float(), None if c0 is None else c0.float(), batch_sizes
            )
            return y.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype)
        directions, spec = self._directions, BY_MODE[self.mode]
        buffers: Any = self._buffers  # faster than nn.Module.__getattr__
        if self.num_layers == 1:
            weights = [buffers[name] for names in self._names for name in names]
            return int8_layer(spec, x, h0, c0, weights, batch_sizes)
        final_h: list[Tensor] = []
        final_c: list[Tensor] = []
        for layer in range(self.num_layers):
            states = slice(layer * directions, (layer + 1) * directions)
            weights = [buffers[name] for names in self._names[states] for name in names]
            c = None if c0 is None else c0[states]
            x, h, c = int8_layer(spec, x, h0[states], c, weights, batch_sizes)
            final_h.append(h)
            if c is not None:
                final_c.append(c)
        return x, torch.cat(final_h), torch.cat(final_c) if final_c else None


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise RuntimeError(f"quantize: {name} must be on the CPU, got {weight.device}.")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"quantize: {name} must be finite, got NaN or an infinity.")


def _quantize_rows(weight: Tensor) -> _Rows:
    """Rounds each row to integers from -127 to 127 times a scale."""
    rows = weight.detach().double()
    scales = (rows.abs().amax(1) / 127).float()
    divisors = torch.where(scales > 0, scales, 1).double().unsqueeze(1)
    return _Rows((rows / divisors).round().clamp(-127, 127).to(torch.int8), scales)


def _blocks(values: Tensor, columns: int, hidden: int) -> Tensor:
    """Returns values [columns*H] as [ceil(H/16), columns, 16]."""
    blocks = math.ceil(hidden / UNITS)
    padded = values.new_zeros(columns, blocks * UNITS)
    padded[:, :hidden] = values.view(columns, hidden)
    return padded.view(columns, blocks, UNITS).permute(1, 0, 2).contiguous()


def _panels(integers: Tensor, gates: int, hidden: int) -> Tensor:
    """Returns integers [G*H,K] as [ceil(H/16), ceil(K/4), G, 16, 4]."""
    columns = integers.shape[1]
    blocks, quads = math.ceil(hidden / UNITS), math.ceil(columns / DEPTH)
    padded = integers.new_zeros(gates, blocks * UNITS, quads * DEPTH)
    padded[:, :hidden, :columns] = integers.view(gates, hidden, columns)
    shaped = padded.view(gates, blocks, UNITS, quads, DEPTH)
    return shaped.permute(1, 3, 0, 2, 4).contiguous()


def _quantize_direction(spec: CellSpec, own: DirectionWeights) -> Int8Weights:
    assert own.w_hh is not None  # only such cells have int8 kernels
    hidden, gates = own.w_hh.shape[1], spec.gates
    rows_ih, rows_hh = _quantize_rows(own.w_ih), _quantize_rows(own.w_hh)
    bias = torch.zeros(spec.pre, hidden, dtype=torch.float64)
    for value, places in ((own.b_ih, spec.pre_x), (own.b_hh, spec.pre_h)):
        if value is not None:
            for gate, part in enumerate(value.detach().double().view(gates, hidden)):
                bias[places[gate]] += part
    return Int8Weights(
        _panels(rows_ih.integers, gates, hidden),
        _panels(rows_hh.integers, gates, hidden),
        _blocks(rows_ih.scales, gates, hidden),
        _blocks(rows_hh.scales, gates, hidden),
        _blocks(rows_ih.integers.sum(1, dtype=torch.int32), gates, hidden),
        _blocks(rows_hh.integers.sum(1, dtype=torch.int32), gates, hidden),
        _blocks(bias.float().flatten(), spec.pre, hidden),
    )
