"""The base class of layers whose cell `define_cell` has made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.define import library
from fastrnn.engine.ragged import NO_MARKS, Marks
from fastrnn.engine.states import Recorder
from fastrnn.layer_call import SequenceTensors
from fastrnn.modules.base import Hidden, RecurrentBase
from fastrnn.session import Session
from fastrnn.spec import COMPILED, UNIT, CellSpec, Weights

_Layer = TypeVar("_Layer", bound="DefinedLayer")


class DefinedLayer(RecurrentBase):
    """A stack of recurrent layers of a cell that `fastrnn.define_cell` has made.

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of each state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: [L*D,B,H] or unbatched [L*D,H]; for a cell of S > 1 states a tuple of S of them; zeros
            if omitted.
        lengths, resets, reset_state: as in `fastrnn.LSTM`; ``reset_state`` is shaped like ``hx``.

    Outputs:
        output: [T,B,D*H], [T,D*H] or a `PackedSequence`, the first state of the last layer at each
            step.
        h_n: the states after the last step of each sequence, like ``hx``.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.LSTM``, with its messages.

    Parameters have the names of ``torch.nn.LSTM``'s, with G gates; a parameter per unit is
    ``<name>_l{k}`` [H]. All are drawn from the uniform distribution on ±1/sqrt(H), except
    parameters per unit for which ``define_cell`` got an initial value.
    """

    #: the function, and the names of its states and of its parameters per unit
    step: ClassVar[Callable[..., Any]]
    state_names: ClassVar[tuple[str, ...]]
    unit_parameter_names: ClassVar[tuple[str, ...]]
    #: of the parameters per unit that are not drawn
    initial_values: ClassVar[dict[str, float]]
    _spec: ClassVar[CellSpec]
    _code: ClassVar[str]
    _comment: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(type(self), "_spec"):
            raise TypeError("DefinedLayer: fastrnn.define_cell makes the classes to use, got none.")
        for option in ("learn_initial_state", "batch_first_states"):
            if kwargs.get(option) and self._spec.states > 2:
                raise ValueError(
                    f"{type(self).__name__}: {option} must be False for a cell of "
                    f"{self._spec.states} states, got {kwargs[option]!r}."
                )
        if kwargs.get("proj_size") or (len(args) > 7 and isinstance(args[7], int) and args[7]):
            raise ValueError(f"{type(self).__name__}: proj_size must be 0, got a projection.")
        super().__init__(self._spec.mode, *args, **kwargs)
        options = self._cell_options
        if options is not None and options.changes_the_cell(training=True):
            raise ValueError(
                f"{type(self).__name__}: a cell of define_cell must have no layer_norm, no zoneout "
                f"and no recurrent_dropout, got {options.describe()}."
            )
        bound = self.hidden_size**-0.5
        for name in self._unit_names():
            parameter = nn.Parameter(self.weight_ih_l0.new_empty(self.hidden_size))  # type: ignore[operator]
            self.register_parameter(name, nn.init.uniform_(parameter, -bound, bound))  # type: ignore[arg-type]
        self._fill_units()
        self._load()

    def reset_parameters(self) -> None:
        """Draws the weights again, and fills the parameters per unit that have an initial value."""
        super().reset_parameters()
        self._fill_units()

    def _fill_units(self) -> None:
        for suffix in self._suffixes():
            for name, value in self.initial_values.items():
                parameter = getattr(self, name + suffix, None)
                if parameter is not None:  # None: before __init__ has made it
                    nn.init.constant_(parameter, value)

    @classmethod
    def source(cls) -> str:
        """Returns the C++ header of the cell."""
        return cls._comment + cls._code

    @classmethod
    def _load(cls) -> None:
        """Makes the kernels available; without a compiler the step runs as torch operations."""
        if not library.load(cls._spec.name, cls._code):
            COMPILED.add(cls._spec.name)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.mode = self._spec.mode  # of a pickle that was made before the step was changed
        self._load()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script: a layer of fastrnn.define_cell cannot be scripted, got "
            f"{type(self).__name__}. Use torch.export or torch.compile."
        )

    def prepare(self: _Layer) -> _Layer:
        """Packs a copy of the weights, as in `fastrnn.LSTM`.

        Raises:
            RuntimeError: as in `fastrnn.LSTM`; the cell has parameters per unit or over two states.
        """
        self._check_packable("prepare")
        return super().prepare()

    def stream(self, batch_size: int = 1, threads: int = 1) -> Session:
        """Returns a session that runs sequences step by step, as in `fastrnn.LSTM`.

        Raises:
            RuntimeError: the cell has parameters per unit or over two states, or is not compiled.
        """
        self._check_packable("stream")
        return super().stream(batch_size, threads)

    def _check_packable(self, method: str) -> None:
        owner = f"{type(self).__name__}.{method}"
        if self.unit_parameter_names or self._spec.states > 2:
            raise RuntimeError(
                f"{owner}: the cell must have no parameters per unit and at most 2 states, got "
                f"{len(self.unit_parameter_names)} and {self._spec.states}."
            )
        if self._spec.name not in COMPILED:
            raise RuntimeError(f"{owner}: the cell must be compiled, got one that is not.")
        if self.hidden_size < self._spec.least_hidden:
            raise RuntimeError(
                f"{owner}: hidden_size must be at least {self._spec.least_hidden} for this cell, "
                f"got {self.hidden_size}."
            )

    def _suffixes(self) -> Iterator[str]:
        for layer in range(self.num_layers):
            for direction in ("", "_reverse") if self.bidirectional else ("",):
                yield f"_l{layer}{direction}"

    def _unit_names(self) -> list[str]:
        return [name + suffix for suffix in self._suffixes() for name in self.unit_parameter_names]

    def _weights(self) -> Weights:
        weights = super()._weights()
        if not self.unit_parameter_names:
            return weights
        count = len(weights.flat) // (self.num_layers * (2 if self.bidirectional else 1))
        flat: list[Tensor] = []
        for index, suffix in enumerate(self._suffixes()):
            flat += weights.flat[index * count : (index + 1) * count]
            own = [getattr(self, name + suffix) for name in self.unit_parameter_names]
            flat.append(own[0] if len(own) == 1 else torch.cat(own))
        return Weights(flat, weights.slots | UNIT)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raises unless input and all states have the sizes that the module expects."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        if self._spec.states == 1:
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
        return zeros if self._spec.states == 1 else (zeros,) * self._spec.states

    def _check_states(self, hx: Any, argument: str) -> None:
        states = self._spec.states
        if states > 1 and (not isinstance(hx, tuple | list) or len(hx) != states):
            got = f"{len(hx)} of them" if isinstance(hx, tuple | list) else type(hx).__name__
            raise TypeError(
                f"{type(self).__name__}: {argument} must be a tuple of {states} tensors, "
                f"{', '.join(self.state_names)}, got {got}."
            )

    def _add_batch(self, hx: Hidden, is_batched: bool) -> Hidden:
        if self._spec.states == 1:
            return super()._add_batch(hx, is_batched)
        return tuple([super(DefinedLayer, self)._add_batch(state, is_batched) for state in hx])

    def _states(self, hx: Hidden) -> tuple[Tensor, Tensor | None]:
        if self._spec.states == 1:
            return hx, None
        self._check_states(hx, "hx")
        return hx[0], hx[1] if len(hx) == 2 else torch.cat(tuple(hx[1:]), dim=-1)

    def _divided(self, hidden: Hidden) -> Hidden:
        """Returns the states one by one, of h and all cell states side by side."""
        if self._spec.states < 3:
            return hidden
        return (hidden[0], *hidden[1].chunk(self._spec.cell_states, dim=-1))

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
        if (
            self.unit_parameter_names
            or self._spec.name not in COMPILED
            or self.hidden_size < self._spec.least_hidden
            or type(input) is not Tensor
            or not input.is_cpu
        ):
            return None
        results = super()._run_fast_path(input, hx, marks)
        if results is None or self._spec.states < 3:
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
            if self._spec.states > 2:
                rest = torch.cat(tuple(reset_state[1:]), dim=-1)
                reset_state = (reset_state[0], rest)
        return self._run(input, hx, lengths, resets, reset_state, False, False)
