"""Layers whose recurrence is linear in the state: one product for all steps, then a scan."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastrnn import autocast
from fastrnn.checks import (
    LARGEST_SIZE,
    check_num_layers,
    describe,
    different_devices_message,
    explain_linear_layer,
    is_bool,
    is_probability,
)
from fastrnn.engine.ragged import (
    Marks,
    check_lengths,
    check_reset_state,
    check_resets,
    check_values,
)
from fastrnn.ops import ScanCall, ScanInputs, scan_layer
from fastrnn.ops.segments import Ragged
from fastrnn.tracing import size, without_tracing

__all__ = ["SRU", "MinGRU", "MinLSTM"]

_Layer = TypeVar("_Layer", bound="LinearTime")


class LinearTime(nn.Module):
    """Stacked layers with the state h_t = a_t * h_{t-1} + b_t; a and b depend on the input only.

    One product W_ih x serves all steps of a direction; `fastrnn.ops.scan_layer` does the rest.
    """

    _cell: ClassVar[str]  # its name for `scan_layer`
    _gates: ClassVar[int]  # G, rows of w_ih divided by H
    positive = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for argument, value in sizes.items():
            try:
                is_positive = operator.index(value) > 0 and not is_bool(value)
            except TypeError:
                is_positive = False
            if not is_positive:
                raise ValueError(
                    f"{name}: {argument} must be a positive int, got {describe(value)}."
                )
            if value > LARGEST_SIZE:
                raise ValueError(
                    f"{name}: {argument} must be at most {LARGEST_SIZE}, got {describe(value)}."
                )
        check_num_layers(name, num_layers)
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        for argument, value in flags.items():
            if not is_bool(value):
                raise TypeError(f"{name}: {argument} must be a bool, got {describe(value)}.")
        given: Any = dropout
        if is_bool(given) or not is_probability(given):
            raise ValueError(
                f"{name}: dropout must be a number from 0 to 1, got {describe(dropout)}."
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout = float(dropout)
        for layer in range(num_layers):
            columns = input_size if layer == 0 else hidden_size * self._directions
            rows = self._rows(columns)
            for suffix in self._suffixes(layer):
                weight = torch.empty(rows, columns, device=device, dtype=dtype)
                self.register_parameter(f"weight_ih_{suffix}", nn.Parameter(weight))
                if bias:
                    own = torch.empty(rows, device=device, dtype=dtype)
                    self.register_parameter(f"bias_ih_{suffix}", nn.Parameter(own))
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, layer: int) -> list[str]:
        return [f"l{layer}", f"l{layer}_reverse"][: self._directions]

    def _rows(self, columns: int) -> int:
        """Returns the rows of w_ih of a layer with so many input features."""
        return self._gates * self.hidden_size

    def reset_parameters(self) -> None:
        """Draws all parameters uniformly from -1/sqrt(H) to 1/sqrt(H), as ``torch.nn.GRU``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """Returns the constructor's arguments, those that are not the default by name."""
        text = f"{self.input_size}, {self.hidden_size}"
        defaults: dict[str, Any] = {"num_layers": 1, "bias": True, "batch_first": False}
        defaults |= {"dropout": 0.0, "bidirectional": False}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers. See the class for arguments and results."""
        try:
            return self._run_any(input, hx, Marks(lengths, resets, reset_state))
        except Exception:
            explain_linear_layer(self, input, hx)
            raise

    def _run_any(
        self, input: Tensor | PackedSequence, hx: Tensor | None, marks: Marks
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(input, PackedSequence):
            marks.check_absent("a PackedSequence")
            return self._run_packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor, got {describe(input)}."
            )
        if input.dim() not in (2, 3) or size(input, -1) != self.input_size:
            raise RuntimeError(
                f"{type(self).__name__}: input must be 2-D or 3-D with {self.input_size} features, "
                f"got {describe(input)}."
            )
        if input.dim() == 3:
            return self._run(input, hx, marks)
        marks.check_absent("an input without a batch dimension")
        batch = 0 if self.batch_first else 1
        state = hx.unsqueeze(1) if isinstance(hx, Tensor) and hx.dim() == 2 else hx
        output, h_n = self._run(input.unsqueeze(batch), state, marks)
        return output.squeeze(batch), h_n.squeeze(1)

    def _run_packed(
        self, packed: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        padded, lengths = pad_packed_sequence(packed, self.batch_first)
        output, h_n = self._run(padded, hx, Marks(lengths))
        order = packed.sorted_indices
        if order is not None:  # the same order, so that the results agree with the input
            output = output.index_select(0 if self.batch_first else 1, order)
            lengths = lengths[order.to(lengths.device)]
        rows = pack_padded_sequence(output, lengths, self.batch_first)
        return PackedSequence(rows.data, packed.batch_sizes, order, packed.unsorted_indices), h_n

    def _run(self, input: Tensor, hx: Tensor | None, marks: Marks) -> tuple[Tensor, Tensor]:
        """Runs a padded batch [T,B,I], or [B,T,I] with ``batch_first``."""
        weight: Any = self.weight_ih_l0
        if input.device != weight.device:  # torch computes with meta tensors among others
            name, devices = type(self).__name__, (weight.device, input.device)
            raise RuntimeError("{}: input must be on {}, got one on {}.".format(name, *devices))
        x = input.transpose(0, 1) if self.batch_first else input
        steps, batch, _ = x.shape
        if hx is not None or any(mark is not None for mark in marks):
            like = x.new_empty(self.num_layers * self._directions, batch, self.hidden_size)
            if hx is not None:
                without_tracing(self._check_state, hx, like)
            without_tracing(self._check_marks, x, like, marks)
        lengths, resets, reset_state = marks
        if lengths is not None:
            lengths = lengths.to(x.device, torch.int64)
            ends = torch.arange(steps, device=x.device).unsqueeze(1) >= lengths
            x = x.masked_fill(ends.unsqueeze(-1), 0)  # a NaN would reach the gradients as 0 * NaN
        if resets is not None:
            resets = resets.squeeze(-1) if resets.dim() == 3 else resets
            resets = (resets.transpose(0, 1) if self.batch_first else resets).to(x.device) != 0
        h_n = []
        for layer in range(self.num_layers):
            if layer > 0 and self.training and self.dropout != 0:  # torch raises for a wrong number
                x = F.dropout(x, self.dropout)
            outputs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                index = layer * self._directions + direction
                new = None if reset_state is None else reset_state[..., index, :, :]
                call = ScanCall(self._cell, self.positive, direction == 1, lengths, resets)
                h0 = None if hx is None else hx[index]
                output, h = self._run_direction(x, suffix, call, h0, new)
                outputs.append(output)
                h_n.append(h)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        final = h_n[0].unsqueeze(0) if len(h_n) == 1 else torch.stack(h_n)
        return x.transpose(0, 1) if self.batch_first else x, final

    def _check_state(self, hx: Any, like: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(hx, Tensor):
            raise TypeError(f"{name}: hx must be a tensor, got {describe(hx)}.")
        if hx.shape != like.shape:
            raise RuntimeError(
                f"{name}: hx must have the shape {list(like.shape)}, got {list(hx.shape)}."
            )
        if hx.device != like.device:
            raise RuntimeError(different_devices_message(like, hx, "hidden"))
        if hx.dtype != like.dtype and not autocast.acts_on(like):
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, found input tensor with "
                f"{like.dtype} and hidden tensor with {hx.dtype}"
            )

    def _check_marks(self, x: Tensor, like: Tensor, marks: Marks) -> None:
        """Checks the marks of a batch x [T,B,I]; ``like`` is an initial state."""
        steps, batch, _ = x.shape
        lengths, resets, state = marks
        if lengths is not None:
            check_lengths(lengths, batch)
        if resets is not None:
            check_resets(resets, steps, batch, self.batch_first)
        if not torch.compiler.is_compiling():
            check_values(Ragged(lengths, resets), steps)
        if state is None:
            return
        if resets is None:
            raise ValueError("reset_state must be given together with resets, got it alone")
        check_reset_state(state, like, steps, "reset_state")
        if state.dtype != like.dtype and not autocast.acts_on(like):
            raise RuntimeError(
                f"{type(self).__name__}: reset_state must have the dtype {like.dtype}, "
                f"got {state.dtype}."
            )

    def _run_direction(
        self,
        x: Tensor,
        suffix: str,
        call: ScanCall,
        h0: Tensor | None,
        reset_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Runs one direction of one layer.

        Args:
            reset_state: [1 or B,H] or [T,1 or B,H], the states after resets; None: zeros.
        """
        pre = F.linear(x, getattr(self, f"weight_ih_{suffix}"))
        bias = getattr(self, f"bias_ih_{suffix}").to(pre.dtype) if self.bias else None
        is_mixed_in = self._cell == "sru" and size(x, -1) == self.hidden_size
        if h0 is not None:
            h0 = h0.to(pre.dtype)
        if reset_state is not None:
            new = reset_state if reset_state.dim() == 3 else reset_state.unsqueeze(0)
            reset_state = new.expand(-1, x.shape[1], -1).to(pre.dtype)
        own = ScanInputs(pre, bias, x if is_mixed_in else None, h0, reset_state)
        return self._scan(call, own)

    def _scan(self, call: ScanCall, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        return scan_layer(call, inputs)


_ARGUMENTS = """
    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there is ``b_ih``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states never are.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: [L*D,B,H] or unbatched [L*D,H]; zeros if omitted.
        lengths, resets, reset_state: keyword only, as in `fastrnn.GRU`. Where torch's operations
            compute the layer (`fastrnn.explain` reports it), a reset multiplies the state by 0,
            which does not remove NaN or infinity from it.

    Outputs:
        output: [T,B,D*H], [T,D*H] or a `PackedSequence`.
        h_n: [L*D,B,H] or [L*D,H], the final states, which continue a sequence as ``hx``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit; the message names it.

    Parameters: ``weight_ih_l[k]`` [G*H,I] and ``bias_ih_l[k]`` [G*H], with ``_reverse`` for the
    second direction, uniform from -1/sqrt(H) to 1/sqrt(H). There is no ``weight_hh``: one product
    serves all steps, and one operator computes the gates, the recurrence and the output.
"""


def _documented(source: str) -> Callable[[type[_Layer]], type[_Layer]]:
    """Returns a decorator that adds what all layers share to the docstring of a class."""

    def decorate(cls: type[_Layer]) -> type[_Layer]:
        if cls.__doc__:  # None under python -OO
            cls.__doc__ += f"{_ARGUMENTS}\n    Source: {source}\n    "
        return cls

    return decorate


class _Minimal(LinearTime):
    """The two layers of Feng et al."""

    def __init__(self, *args: Any, positive: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not is_bool(positive):
            name = type(self).__name__
            raise TypeError(f"{name}: positive must be a bool, got {describe(positive)}.")
        self.positive = positive

    def extra_repr(self) -> str:
        """Returns the constructor's arguments."""
        return super().extra_repr() + (", positive=True" if self.positive else "")


@_documented("L. Feng et al., Were RNNs All We Needed? (2024), without and with g.")
class MinGRU(_Minimal):
    """A GRU whose gates depend on the input only (G = 2: z, then the candidate).

        z = sigmoid(W_z x + b_z)
        c = W_c x + b_c                     with ``positive``: g(W_c x + b_c)
        h' = (1-z)*h + z*c

    ``positive`` is keyword only: g(x) = x + 0.5 for x >= 0, else sigmoid(x). The paper needs it to
    compute in log space; the scan here needs no logarithms. Default: ``False``
    """

    _cell = "min_gru"
    _gates = 2


@_documented("L. Feng et al., Were RNNs All We Needed? (2024), the normalised form.")
class MinLSTM(_Minimal):
    """An LSTM whose gates depend on the input only (G = 3: f, i, then the candidate).

        f = sigmoid(W_f x + b_f)    i = sigmoid(W_i x + b_i)
        c = W_c x + b_c                     with ``positive``: g(W_c x + b_c)
        h' = (f*h + i*c) / (f + i)

    ``positive`` is keyword only, as in `MinGRU`. Default: ``False``
    """

    _cell = "min_lstm"
    _gates = 3


@_documented("T. Lei et al., Training RNNs as Fast as CNNs (2017).")
class SRU(LinearTime):
    """The simple recurrent unit without recurrent vectors (G = 3: candidate, f, r).

        c = W_c x + b_c    f = sigmoid(W_f x + b_f)    r = sigmoid(W_r x + b_r)
        s' = f*s + (1-f)*c                  the state; h_n holds it
        y = r*s' + (1-r)*x                  the output

    If x does not have H features, W_ih has H more rows (G = 4), whose product takes the place of x
    in y. The later version of the paper (2018) adds v*s to the pre-activations of f and r; that
    recurrence is not linear in s, so no scan computes it, and this layer does not have v.
    """

    _cell = "sru"
    _gates = 3

    def _rows(self, columns: int) -> int:
        return (3 if columns == self.hidden_size else 4) * self.hidden_size
