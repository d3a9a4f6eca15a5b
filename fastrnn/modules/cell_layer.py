"""The base class of layers whose cell ``torch.nn`` lacks: any states, parameters per unit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.engine.ragged import NO_MARKS, Marks
from fastrnn.engine.states import Recorder
from fastrnn.layer_call import SequenceTensors
from fastrnn.modules.base import Hidden, RecurrentBase
from fastrnn.spec import BY_MODE, UNIT, Weights


class CellLayer(RecurrentBase):
    """A stack of recurrent layers of any cell.

    ``hx`` and the final states are one tensor [L*D,B,H], or for a cell of S > 1 states a tuple of S
    of them. Below this class the cell states are side by side in one tensor [L*D,B,(S-1)*H].
    """

    #: the names of the states and of the parameters per unit
    state_names: ClassVar[tuple[str, ...]] = ("h",)
    unit_parameter_names: ClassVar[tuple[str, ...]] = ()
    #: how messages name the kind of cell
    _kind: ClassVar[str] = "this cell"

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        name, spec = type(self).__name__, BY_MODE[mode]
        for option in ("learn_initial_state", "batch_first_states"):
            if kwargs.get(option) and spec.states > 2:
                raise ValueError(
                    f"{name}: {option} must be False for a cell of {spec.states} states, got "
                    f"{kwargs[option]!r}."
                )
        if kwargs.get("proj_size") or (len(args) > 7 and isinstance(args[7], int) and args[7]):
            raise ValueError(f"{name}: proj_size must be 0, got a projection.")
        super().__init__(mode, *args, **kwargs)
        bound = self.hidden_size**-0.5
        for own in self._unit_names():
            parameter = nn.Parameter(self.weight_ih_l0.new_empty(self.hidden_size))  # type: ignore[operator]
            self.register_parameter(own, nn.init.uniform_(parameter, -bound, bound))  # type: ignore[arg-type]

    @property
    def _states_of_cell(self) -> int:
        return BY_MODE[self.mode].states

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script: a layer of {self._kind} cannot be scripted, got "
            f"{type(self).__name__}. Use torch.export or torch.compile."
        )

    def _suffixes(self) -> Iterator[str]:
        for layer in range(self.num_layers):
            for direction in ("", "_reverse") if self.bidirectional else ("",):
                yield f"_l{layer}{direction}"

    def _unit_names(self) -> list[str]:
        return [name + suffix for suffix in self._suffixes() for name in self.unit_parameter_names]

    def _unit_weights(self, suffix: str) -> Tensor:
        """Returns the parameters per unit [E*H] of one layer and direction."""
        own = [getattr(self, name + suffix) for name in self.unit_parameter_names]
        return own[0] if len(own) == 1 else torch.cat(own)

    def _weights(self, read: Weights | None = None) -> Weights:
        weights = super()._weights(read)
        if not BY_MODE[self.mode].parameters:
            return weights
        count = len(weights.flat) // (self.num_layers * (2 if self.bidirectional else 1))
        flat: list[Tensor] = []
        for index, suffix in enumerate(self._suffixes()):
            flat += weights.flat[index * count : (index + 1) * count]
            flat.append(self._unit_weights(suffix))
        return Weights(flat, weights.slots | UNIT)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raises unless input and all states have the sizes that the module expects."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        if self._states_of_cell == 1:
            self.check_hidden_size(hidden, expected)
            return
        for index, state in enumerate(hidden):
            message = f"Expected hidden[{index}] size {{}}, got {{}}"
            self.check_hidden_size(state, expected, message)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Returns the states with their sequences permuted; unchanged if the order is None."""
        if permutation is None:
            return hx
        if isinstance(hx, Tensor):
            return hx.index_select(1, permutation)
        return tuple([state.index_select(1, permutation) for state in hx])

    def _zero_states(self, input: Tensor, batch: int) -> Hidden:
        zeros = super()._zero_states(input, batch)
        return zeros if self._states_of_cell == 1 else (zeros,) * self._states_of_cell

    def _check_states(self, hx: Any, argument: str) -> None:
        states = self._states_of_cell
        if states > 1 and (not isinstance(hx, tuple | list) or len(hx) != states):
            got = f"{len(hx)} of them" if isinstance(hx, tuple | list) else type(hx).__name__
            raise TypeError(
                f"{type(self).__name__}: {argument} must be a tuple of {states} tensors, "
                f"{', '.join(self.state_names)}, got {got}."
            )

    def _add_batch(self, hx: Hidden, is_batched: bool) -> Hidden:
        if self._states_of_cell == 1:
            return super()._add_batch(hx, is_batched)
        return tuple([super(CellLayer, self)._add_batch(state, is_batched) for state in hx])

    def _states(self, hx: Hidden) -> tuple[Tensor, Tensor | None]:
        if self._states_of_cell == 1:
            return hx, None
        self._check_states(hx, "hx")
        return hx[0], hx[1] if len(hx) == 2 else torch.cat(tuple(hx[1:]), dim=-1)

    def _divided(self, hidden: Hidden) -> Hidden:
        """Returns the states one by one, of h and all cell states side by side."""
        if self._states_of_cell < 3:
            return hidden
        return (hidden[0], *hidden[1].chunk(self._states_of_cell - 1, dim=-1))

    def _compute(
        self,
        input: Tensor,
        hx: Hidden,
        sequence: SequenceTensors,
        weights: Weights,
        marks: Marks = NO_MARKS,
        recorder: Recorder | None = None,
    ) -> tuple[Tensor, Hidden]:
        output, hidden = super()._compute(input, hx, sequence, weights, marks, recorder)
        return output, self._divided(hidden)

    def _run_fast_path(
        self, input: Tensor, hx: Hidden, marks: Marks = NO_MARKS
    ) -> tuple[Tensor, Hidden] | None:
        if BY_MODE[self.mode].parameters:  # the fast path knows the weights of torch alone
            return None
        results = super()._run_fast_path(input, hx, marks)
        if results is None or self._states_of_cell < 3:
            return results
        return results[0], self._divided(results[1])

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
    ) -> Any:
        """Runs the network over ``input`` from the states ``hx``; see the class for the shapes."""
        if hx is not None:
            self._check_states(hx, "hx")
        if reset_state is not None:
            self._check_states(reset_state, "reset_state")
            if self._states_of_cell > 2:
                rest = torch.cat(tuple(reset_state[1:]), dim=-1)
                reset_state = (reset_state[0], rest)
        return self._run(input, hx, lengths, resets, reset_state, False, False)
