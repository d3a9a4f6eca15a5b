"""Truncated backpropagation through time: trains on long sequences in the memory of a chunk.

    for each chunk c:  output_c, hx_{c+1} = module(input_c, detach(hx_c));  backward(loss_c)

The states continue from chunk to chunk. Gradients stop at the first step of a chunk.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn._torch_internals import tree_leaves, tree_map
from fastrnn.checks import describe, is_bool

__all__ = ["TbpttProgress", "tbptt"]

_TENSORS = "a padded tensor, or several in tuples, lists or dicts"
_STATES = "tensors in tuples, lists, dicts or named tuples"


@dataclass(frozen=True)
class TbpttProgress:
    """Position of `tbptt` in the sequence, as passed to ``update``.

    Attributes:
        steps: number of completed steps.
        total_steps: T, the number of all steps.
        loss: loss of the steps since the last update, detached. Its gradients are in ``.grad``.
        hx: states after the last completed step, detached.
    """

    steps: int
    total_steps: int
    loss: Tensor
    hx: Any


def tbptt(
    module: Callable[..., Any],
    input: Any,
    targets: Any,
    loss: Callable[[Any, Any], Tensor],
    chunk_length: int,
    hx: Any = None,
    *,
    update: Callable[[TbpttProgress], object] | None = None,
    chunks_per_update: int = 1,
    batch_first: bool | None = None,
    reduction: str | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> tuple[Tensor, Any]:
    """Computes the loss of a long sequence and its truncated gradients, chunk by chunk.

    Cuts the sequence into chunks of ``chunk_length`` steps; the last chunk has the remaining steps.
    Runs forward and backward for one chunk after the other, so only one chunk's activations exist
    at a time. The gradients are added to ``.grad``, as ``backward()`` does.

    The loss of a chunk is weighted so that the losses of all chunks add up to the loss of the whole
    sequence. With ``chunk_length >= T`` the gradients are those of the whole sequence. With
    ``update`` the weights are relative to the steps between two updates instead, so the gradients
    of an update do not depend on T.

    Under ``torch.no_grad()`` only the loss and the states are computed, for example to validate.

        def update(progress):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        loss, hx = fastrnn.tbptt(model, x, y, nn.MSELoss(), 100, update=update)

    Args:
        module: a layer of fastrnn or ``torch.nn``, or any callable ``(input, hx) -> (output, hx)``
            whose states are tensors, nested in tuples, lists, dicts or named tuples.
        input: a tensor [T,B,...], or [B,T,...] with ``batch_first``, or several such tensors in
            tuples, lists or dicts. It may require gradients only if it is a leaf: a module that
            computes it belongs into ``module``.
        targets: like ``input``, with the same T.
        loss: called with the output and the targets of a chunk. Returns a scalar, the mean or the
            sum over the chunk.
        chunk_length: number of steps after which gradients are cut off.
        hx: the states before the first step, passed to ``module`` unchanged, so a learned initial
            state gets a gradient.
        update: called with a `TbpttProgress` after every ``chunks_per_update`` chunks and after the
            last one, to clip gradients, make an optimizer step, set gradients to zero and log.
        chunks_per_update: number of chunks between two calls of ``update``.
        batch_first: whether dimension 1 of ``input`` and ``targets`` is the time. By default it is
            ``module.batch_first``, or False if there is no such attribute.
        reduction: ``"mean"`` if ``loss`` averages over the steps of a chunk, ``"sum"`` if it adds.
            By default it is ``loss.reduction``, or ``"mean"`` if there is no such attribute.
        backward: called with the weighted loss of each chunk instead of ``Tensor.backward``, for
            example ``lambda loss: scaler.scale(loss).backward()``.

    Returns:
        the loss of the whole sequence (float32 if ``loss`` returns a half type), and the states
        after the last step, both detached. Pass the states as ``hx`` to continue with the next
        part of the sequence.

    Raises:
        TypeError, ValueError: an argument, or a result of ``module`` or ``loss``, is wrong.
    """
    _check_callables(module=module, loss=loss, backward=backward)
    chunk_length = _positive("chunk_length", chunk_length)
    chunks_per_update = _positive("chunks_per_update", chunks_per_update)
    if update is not None:
        _check_callables(update=update)
    elif chunks_per_update != 1:
        _wrong(ValueError, "chunks_per_update", "1 without update", chunks_per_update)
    if getattr(module, "bidirectional", False):
        raise ValueError(
            "tbptt: module must not be bidirectional, because the second direction starts at the "
            "end of the whole sequence."
        )
    time = _time_dimension(module, input, batch_first)
    steps = _steps(input, targets, time)
    averages = _averages(loss, reduction)

    def weighted(value: Tensor, part: int, whole: int) -> Tensor:
        return value * (part / whole) if averages and part != whole else value

    def run_chunk(start: int, stop: int, whole: int, hx: Any) -> tuple[Tensor, Any]:
        """Returns weighted loss and states of a chunk, detached. Its activations are freed."""

        def cut(t: Tensor) -> Tensor:
            return t.narrow(time, start, stop - start)

        output, hx = _checked_result(module(tree_map(cut, input), hx))
        value = _checked_loss(loss(output, tree_map(cut, targets)))
        value = weighted(value, stop - start, whole)
        if torch.is_grad_enabled():
            backward(value)
        return value.detach(), tree_map(_detached, hx)

    span = chunk_length * chunks_per_update if update is not None else steps  # between two updates
    total = _zero()
    for first in range(0, steps, span):
        last = min(first + span, steps)
        recent = _zero()
        for start in range(first, last, chunk_length):
            value, hx = run_chunk(start, min(start + chunk_length, last), last - first, hx)
            recent = recent + value
        if update is not None:
            update(TbpttProgress(last, steps, recent, hx))
        total = total + weighted(recent, last - first, steps)
    return total, hx


def _zero() -> Tensor:
    """Returns the start of a sum of losses: float32, in which half types are added up."""
    return torch.zeros((), dtype=torch.float32)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


# --- arguments


def _wrong(cls: type[Exception], argument: str, expected: str, actual: Any) -> NoReturn:
    raise cls(f"tbptt: {argument} must be {expected}, got {describe(actual)}.")


def _check_callables(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not callable(value):
            _wrong(TypeError, name, "callable", value)


def _positive(argument: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        _wrong(ValueError, argument, "a positive int", value)
    return number


def _time_dimension(module: Any, input: Any, batch_first: Any) -> int:
    """Returns the dimension of input and targets that is the time."""
    own = getattr(module, "batch_first", None)
    if batch_first is None:
        batch_first = own
    elif isinstance(module, nn.RNNBase) and batch_first != own:
        _wrong(ValueError, "batch_first", f"{own} like that of module", batch_first)
    children = module.modules() if batch_first is None and isinstance(module, nn.Module) else ()
    if any(getattr(child, "batch_first", False) for child in children):
        # The module may pass its input on as it is, or transpose it first.
        expected = "True or False for a module that contains batch-first layers"
        _wrong(ValueError, "batch_first", expected, None)
    if batch_first is not None and not is_bool(batch_first):
        _wrong(TypeError, "batch_first", "True, False or None", batch_first)
    # a 2-D input of a layer is one sequence [T,I], for which torch ignores batch_first
    is_unbatched = isinstance(module, nn.RNNBase) and isinstance(input, Tensor) and input.dim() == 2
    return 1 if batch_first and not is_unbatched else 0


def _steps(input: Any, targets: Any, time: int) -> int:
    """Returns T, the common number of steps of all tensors of input and targets."""
    steps: int | None = None
    for name, tree in (("input", input), ("targets", targets)):
        leaves = tree_leaves(tree, is_leaf=lambda node: isinstance(node, PackedSequence))
        if not leaves:
            _wrong(TypeError, name, _TENSORS, tree)
        for leaf in leaves:
            if isinstance(leaf, PackedSequence):
                _wrong(TypeError, name, f"{_TENSORS} (see pad_packed_sequence)", leaf)
            if not isinstance(leaf, Tensor) or leaf.is_nested:
                _wrong(TypeError, name, _TENSORS, leaf)
            if leaf.dim() <= time or leaf.shape[time] == 0:
                _wrong(ValueError, name, f"at least one step long in dimension {time}", leaf)
            if steps is None:
                steps = leaf.shape[time]
            if leaf.shape[time] != steps:
                _wrong(ValueError, name, f"{steps} steps long in dimension {time}", leaf)
            if torch.is_grad_enabled() and leaf.requires_grad and not leaf.is_leaf:
                raise ValueError(
                    f"tbptt: {name} must not be computed with gradients, because each chunk would "
                    "need that computation again; do it inside module, or detach the tensor."
                )
    assert steps is not None
    return steps


def _averages(loss: Any, reduction: Any) -> bool:
    """Returns whether the loss is a mean over steps, not a sum."""
    found = reduction
    if found is None and isinstance(loss, functools.partial):
        found = loss.keywords.get("reduction", "mean")
    if found is None:
        found = getattr(loss, "reduction", "mean")
    if found not in ("mean", "sum"):
        expected = "'mean' or 'sum', and equal to what loss computes"
        _wrong(ValueError, "reduction", expected, found)
    return bool(found == "mean")


# --- results of the module and of the loss


def _checked_result(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"tbptt: module must return (output, hx), got {describe(result)}.")
    output, hx = result
    leaves = tree_leaves(hx)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"tbptt: module must return its states as {_STATES}, got {describe(hx)}.")
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, int, float, complex, str, type(None))):
            raise TypeError(
                f"tbptt: module must return its states as {_STATES}, got {describe(leaf)} in them."
            )
    return output, hx


def _checked_loss(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise TypeError(f"tbptt: loss must return a scalar tensor, got {describe(value)}.")
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(
            "tbptt: loss must return a tensor that requires gradients, got one that does not (use "
            "torch.no_grad() to compute the loss only)."
        )
    return value
