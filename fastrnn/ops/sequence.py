"""The order of a batch of sequences: the state before each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastrnn.layer_call import SequenceTensors
from fastrnn.spec import FIRST_SEQUENCE_SLOT


def is_traced(t: Tensor) -> bool:
    """Whether a tensor has no fixed values, because a compiler traces with it."""
    return torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter)


def is_packed(slots: int) -> bool:
    """Whether an operator's ``slots`` contain the bit of ``batch_sizes``."""
    return slots >> FIRST_SEQUENCE_SLOT & 1 == 1


def check_sequence(
    name: str, data: Tensor, batch: int, sequence: Sequence[Tensor] | None, slots: int
) -> None:
    """Checks an operator's ``sequence`` like csrc/torch/arguments.cpp. Values may be unknown.

    Args:
        name, data: x or y.
        batch: B of the states.
        sequence, slots: arguments of the operator.
    """
    expected, count = (slots >> FIRST_SEQUENCE_SLOT).bit_count(), len(sequence or ())
    torch._check(
        count == expected,
        lambda: f"fastrnn: sequence must hold {expected} tensors, one per slot, got {count}.",
    )
    sizes = SequenceTensors(sequence, slots).named().batch_sizes
    if sizes is None:
        torch._check(
            data.shape[-2] == batch,
            lambda: f"fastrnn: {name} must have the batch {batch} of h0, got {data.shape[-2]}.",
        )
    else:
        torch._check(
            sizes.dim() == 1 and sizes.device.type == "cpu" and sizes.dtype == torch.int64,
            lambda: "fastrnn: batch_sizes must be a 1-D int64 tensor on the CPU, got another.",
        )


def previous_states(y: Tensor, h0: Tensor, sequence: SequenceTensors, backwards: bool) -> Tensor:
    """Returns the state before each row [N,R]: y of its sequence one step earlier, or h0."""
    batch_sizes = sequence.named().batch_sizes
    if batch_sizes is None:
        batch = h0.shape[0]
        return torch.cat([y[batch:], h0] if backwards else [h0, y[: y.shape[0] - batch]])
    if is_traced(batch_sizes):  # its values are unknown
        return previous_states_by_index(y, h0, batch_sizes, backwards)
    return torch.cat(list(_previous_states_by_slices(y, h0, batch_sizes, backwards)))


def _previous_states_by_slices(
    y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool
) -> Iterator[Tensor]:
    """Yields the states before packed rows in slices, so that no index is copied to the device.

    Consecutive steps of the same size form one period: the states before its rows are contiguous.
    """
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    periods = list(zip(sizes.tolist(), counts.tolist(), strict=True))
    begin, before = 0, h0  # first row of the period; states before its first step
    for index, (size, count) in enumerate(periods):
        end = begin + size * count
        if backwards:
            after = periods[index + 1][0] if index + 1 < len(periods) else 0
            yield y[begin + size : end + after]
            yield h0[after:size]
        else:
            yield before[:size]
            yield y[begin : end - size]
            before = y[end - size : end]
        begin = end


def previous_states_by_index(y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool) -> Tensor:
    """Computes the states before packed rows. The number of operations is always the same.

    Let offset[t] be the first row of step t. Then row offset[t] + b of sequence b follows its row
    offset[t-1] + b = (offset[t] + b) - batch_sizes[t-1].
    """
    rows, batch = y.shape[0], h0.shape[0]
    later = torch.arange(batch, rows)
    earlier = later - batch_sizes[:-1].repeat_interleave(batch_sizes[1:], output_size=rows - batch)
    if not backwards:
        return torch.cat([h0, y.index_select(0, earlier.to(y.device))])
    sequences = torch.arange(batch)
    last_step = (batch_sizes > sequences.unsqueeze(1)).sum(1) - 1
    last_row = (batch_sizes.cumsum(0) - batch_sizes)[last_step] + sequences
    h_prev = y.new_empty(rows, h0.shape[1])
    h_prev.index_copy_(0, earlier.to(y.device), y[batch:])
    h_prev.index_copy_(0, last_row.to(y.device), h0)
    return h_prev
