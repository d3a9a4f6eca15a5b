"""Code of the recurrent modules for ``torch.jit.script``, in the subset of Python that it compiles.

Called from Python, `forward` of a module runs `RecurrentBase._run`. Compiled, it runs
``_script_padded`` or ``_script_packed`` below, in which every value has one static type. Compiled
code calls the operators ``fastrnn::recurrent_layer`` and ``fastrnn::ragged_layer``, which use the
same kernels and decide at run time whether a gradient is recorded. ``weight_dtype`` has no effect
in compiled code.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn.modules.base import RecurrentBase


def script_slots(has_biases: bool, has_projection: bool) -> int:
    """Returns the same as `fastrnn.spec.slots_of`, whose constants the compiler cannot read."""
    return 3 + (12 if has_biases else 0) + (16 if has_projection else 0)


#: lengths, resets [T,B], and the states after a reset: h and c
ScriptMarks = tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]  # noqa: UP045 - TorchScript reads it


def script_slice(state: Tensor | None, first: int, end: int) -> Tensor | None:
    """Returns a state after a reset, [L*D,B,*] or [T,L*D,B,*], of some layers and directions."""
    if state is None:
        return None
    return state[:, first:end] if state.dim() == 4 else state[first:end]


def script_reset_state(state: Tensor | None, like: Tensor) -> Tensor | None:
    """Returns a state after a reset, whose batch may be 1, for all rows of an initial state."""
    if state is None:
        return None
    if state.dim() != 3 and state.dim() != 4:
        raise ValueError(f"reset_state must have 3 or 4 dimensions, got {state.dim()}")
    if state.size(-2) != 1:
        return state
    sizes = list(state.size())
    sizes[-2] = like.size(1)
    return state.expand(sizes)


def run_layers(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    slots: int,
    cell: str,
    num_layers: int,
    dropout: float,
    residual: bool,
    marks: ScriptMarks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs stacked layers like `fastrnn.engine.run.run_stack`; c_n is empty if there is none."""
    lengths, resets, reset_h, reset_c = marks
    sequence: list[Tensor] | None = None
    if batch_sizes is not None:
        sequence = [batch_sizes]
        slots |= 1 << 16
    count = len(weights) // num_layers
    directions = h0.size(0) // num_layers
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for index in range(num_layers):
        below = x
        if index > 0 and dropout != 0.0:
            x = torch.dropout(x, dropout, True)
        first, end = index * directions, (index + 1) * directions
        h_own = h0[first:end]
        c_own = None if c0 is None else c0[first:end]
        own = weights[index * count : (index + 1) * count]
        if lengths is None and resets is None:
            x, h, c = torch.ops.fastrnn.recurrent_layer(x, h_own, c_own, own, slots, sequence, cell)
        else:
            x, h, c = torch.ops.fastrnn.ragged_layer(
                x,
                h_own,
                c_own,
                own,
                slots,
                lengths,
                resets,
                script_slice(reset_h, first, end),
                script_slice(reset_c, first, end),
                cell,
            )
        if index > 0 and residual:
            x = x + below
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)


class Scriptable(RecurrentBase):
    """A recurrent module that ``torch.jit.script`` can compile."""

    def _script_run(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        marks: ScriptMarks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        swapped = self.batch_first and batch_sizes is None
        y, h_n, c_n = run_layers(
            x.transpose(0, 1) if swapped else x,
            batch_sizes,
            h0,
            c0,
            self._flat_weights,  # type: ignore[arg-type]
            script_slots(self.bias, self.proj_size > 0),
            self.mode.lower(),
            self.num_layers,
            self.dropout if self.training else 0.0,
            hasattr(self, "_residual"),  # an instance has it only if it is True
            marks,
        )
        return y.transpose(0, 1) if swapped else y, h_n, c_n

    def _script_marks(
        self,
        input: Tensor,
        is_batched: bool,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
    ) -> ScriptMarks:
        """Returns the marks as the operator takes them, which checks them."""
        if not is_batched and (lengths is not None or resets is not None):
            raise ValueError("lengths and resets must be given with a batched input, got one")
        if resets is None and reset_h is not None:
            raise ValueError("reset_state must be given together with resets, got it alone")
        if lengths is not None:
            if lengths.is_floating_point() or lengths.dtype == torch.bool:
                raise TypeError(f"lengths must be a tensor of integers, got {lengths.dtype}")
            lengths = lengths.long() if input.is_cuda else lengths.cpu().long()
        if resets is not None:
            if not input.is_cuda:
                resets = resets.cpu()
            if resets.dim() == 3:
                resets = resets.squeeze(-1)
            if resets.dtype != torch.bool:
                resets = resets.double()
            if self.batch_first:
                resets = resets.transpose(0, 1)
        return lengths, resets, reset_h, reset_c

    def _script_batch(self, input: Tensor) -> Tensor:
        """Returns the input with a batch dimension."""
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(
                f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        if input.dim() == 3:
            return input
        return input.unsqueeze(0 if self.batch_first else 1)

    def _script_initial_h(self, input: Tensor, batch: int) -> Tensor:
        # the compiler skips the arm that does not apply only in an if with an else
        if hasattr(self, "h_0"):
            h: Tensor = self.h_0  # type: ignore[assignment]
            return h.expand(-1, batch, -1)
        else:  # noqa: RET505
            size = self.proj_size if self.proj_size > 0 else self.hidden_size
            return self._script_zeros(input, batch, size)

    def _script_zeros(self, input: Tensor, batch: int, size: int) -> Tensor:
        states = self.num_layers * (2 if self.bidirectional else 1)
        return torch.zeros([states, batch, size], dtype=input.dtype, device=input.device)


class OneState(Scriptable):
    """Base class of RNN and GRU."""

    def _script_padded(
        self,
        input: Tensor,
        hx: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x = self._script_batch(input)
        is_batched = input.dim() == 3
        if hx is None:
            h0 = self._script_initial_h(x, x.size(0 if self.batch_first else 1))
        elif hx.dim() == input.dim():
            h0 = hx if is_batched else hx.unsqueeze(1)
        else:
            raise RuntimeError(
                f"For {input.dim()}-D input, hx should also be {input.dim()}-D but got "
                f"{hx.dim()}-D tensor"
            )
        self.check_forward_args(x, h0, None)
        reset_h = script_reset_state(reset_state, h0)
        marks = self._script_marks(x, is_batched, lengths, resets, reset_h, None)
        y, h_n, _ = self._script_run(x, None, h0, None, marks)
        if is_batched:
            return y, h_n
        return y.squeeze(0 if self.batch_first else 1), h_n.squeeze(1)

    def _script_packed(
        self, packed: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is None:
            h0 = self._script_initial_h(data, int(batch_sizes[0]))
        else:
            h0 = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(data, h0, batch_sizes)
        y, h_n, _ = self._script_run(data, batch_sizes, h0, None, (None, None, None, None))
        result = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return result, self.permute_hidden(h_n, unsorted_indices)


class TwoStates(Scriptable):
    """Base class of LSTM."""

    def _script_padded(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_state: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self._script_batch(input)
        is_batched = input.dim() == 3
        if hx is None:
            h0, c0 = self._script_initial_states(x, x.size(0 if self.batch_first else 1))
        elif hx[0].dim() == input.dim() and hx[1].dim() == input.dim():
            h0 = hx[0] if is_batched else hx[0].unsqueeze(1)
            c0 = hx[1] if is_batched else hx[1].unsqueeze(1)
        else:
            raise RuntimeError(
                f"For {input.dim()}-D input, hx and cx should also be {input.dim()}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        self.check_forward_args(x, (h0, c0), None)  # type: ignore[arg-type]
        reset_h = script_reset_state(None if reset_state is None else reset_state[0], h0)
        reset_c = script_reset_state(None if reset_state is None else reset_state[1], c0)
        marks = self._script_marks(x, is_batched, lengths, resets, reset_h, reset_c)
        y, h_n, c_n = self._script_run(x, None, h0, c0, marks)
        if is_batched:
            return y, (h_n, c_n)
        return y.squeeze(0 if self.batch_first else 1), (h_n.squeeze(1), c_n.squeeze(1))

    def _script_packed(
        self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is None:
            states = self._script_initial_states(data, int(batch_sizes[0]))
        else:
            states = self.permute_hidden(hx, sorted_indices)  # type: ignore[arg-type]
        self.check_forward_args(data, states, batch_sizes)  # type: ignore[arg-type]
        y, h_n, c_n = self._script_run(
            data, batch_sizes, states[0], states[1], (None, None, None, None)
        )
        result = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return result, self.permute_hidden((h_n, c_n), unsorted_indices)  # type: ignore[arg-type]

    def _script_initial_states(self, input: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        h0 = self._script_initial_h(input, batch)
        if hasattr(self, "c_0"):
            c: Tensor = self.c_0  # type: ignore[assignment]
            return h0, c.expand(-1, batch, -1)
        else:  # noqa: RET505
            return h0, self._script_zeros(input, batch, self.hidden_size)
