"""The option ``batch_first_states``: the layout of states that a caller gives and gets.

Below the modules states are [L*D,B,*], as in torch. With the option a caller's are [B,L*D,*]: both
are views of the same memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrnn.tracing import without_tracing


def layers_first(name: str, states: Any, expected: list[tuple[int | None, int, int]]) -> Any:
    """Returns states in torch's layout. What has no batch is left to torch's checks.

    Args:
        name: the name of the argument.
        states: [B,L*D,*], or [T,B,L*D,*] for the states after a reset; a pair of them for h and c.
        expected: for each state B (None if it is unknown), L*D and the number of units.

    Raises:
        RuntimeError: a state has another size.
    """
    if isinstance(states, tuple | list) and len(states) == len(expected) == 2:
        pairs = enumerate(zip(states, expected, strict=True))
        return tuple([_swapped(f"{name}[{i}]", own, sizes) for i, (own, sizes) in pairs])
    return _swapped(name, states, expected[0]) if len(expected) == 1 else states


def batch_first(states: Any) -> Any:
    """Returns views [B,L*D,*] of states [L*D,B,*]."""
    if isinstance(states, Tensor):
        return states.transpose(0, 1)
    return tuple([state.transpose(0, 1) for state in states])


def _swapped(name: str, state: Any, expected: tuple[int | None, int, int]) -> Any:
    if not isinstance(state, Tensor) or state.dim() < 3:
        return state
    without_tracing(_check, name, state, expected)
    return state.transpose(-3, -2)


def _check(name: str, state: Tensor, expected: tuple[int | None, int, int]) -> None:
    batch, *rest = expected
    own_batch, *own = state.shape[-3:]
    # a batch of 1 serves all rows of a state after a reset
    fits = batch is None or own_batch == batch or (name.startswith("reset") and own_batch == 1)
    if not fits or own != rest:
        sizes = ", ".join(str(size) for size in ("B" if batch is None else batch, *rest))
        raise RuntimeError(
            f"{name} must be of size [{sizes}] with batch_first_states, got {list(state.shape)}"
        )
