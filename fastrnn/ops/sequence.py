"""The state before each row of a packed sequence batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def is_traced(t: Tensor) -> bool:
    """Whether a tensor has no fixed values, because a compiler traces with it."""
    return torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter)


def previous_states(y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool) -> Tensor:
    """Returns the state before each packed row [N,R]: y of its sequence one step earlier, or h0."""
    if is_traced(batch_sizes):  # its values are unknown
        return previous_states_by_index(y, h0, batch_sizes, backwards)
    return torch.cat(list(_previous_states_by_slices(y, h0, batch_sizes, backwards)))


def _previous_states_by_slices(
    y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool
) -> Iterator[Tensor]:
    """Yields `previous_states` in slices of y and h0, so that no index is copied to the device.

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
    """Computes `previous_states` by operations whose number does not depend on batch_sizes.

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
