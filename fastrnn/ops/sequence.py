"""The state before each row of a packed sequence batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def is_traced(t: Tensor) -> bool:
    """Whether a tensor stands for those of later calls, as those that compilers trace with do."""
    return torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter)


def previous_packed(y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool) -> Tensor:
    """[N,R] the state before each packed row: its sequence's row one step earlier, or h0's."""
    if is_traced(batch_sizes):  # its values may change
        return previous_by_index(y, h0, batch_sizes, backwards)
    return torch.cat(list(_previous_in_pieces(y, h0, batch_sizes, backwards)))


def _previous_in_pieces(
    y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool
) -> Iterator[Tensor]:
    """`previous_packed` in slices of y and h0: no index has to reach the device.

    Steps of one size have their rows, and those of the step before each, side by side.
    """
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    runs = list(zip(sizes.tolist(), counts.tolist(), strict=True))
    begin, before = 0, h0  # the rows of the run's first step; what stands before them
    for index, (size, count) in enumerate(runs):
        end = begin + size * count
        if backwards:
            after = runs[index + 1][0] if index + 1 < len(runs) else 0
            yield y[begin + size : end + after]
            yield h0[after:size]
        else:
            yield before[:size]
            yield y[begin : end - size]
            before = y[end - size : end]
        begin = end


def previous_by_index(y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool) -> Tensor:
    """`previous_packed` with operations whose number does not depend on batch_sizes.

    With offset[t] the first row of step t, row offset[t] + b stands right after row
    offset[t-1] + b = (offset[t] + b) - batch_sizes[t-1] of its sequence b.
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
