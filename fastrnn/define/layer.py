"""The base class of layers whose cell `define_cell` has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastrnn.define import library
from fastrnn.engine.ragged import NO_MARKS, Marks
from fastrnn.modules.base import Hidden
from fastrnn.modules.cell_layer import CellLayer
from fastrnn.spec import COMPILED, CellSpec


class DefinedLayer(CellLayer):
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

    #: the function
    step: ClassVar[Callable[..., Any]]
    _kind = "a cell of define_cell"
    #: of the parameters per unit that are not drawn
    initial_values: ClassVar[dict[str, float]]
    _spec: ClassVar[CellSpec]
    _code: ClassVar[str]
    _comment: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(type(self), "_spec"):
            raise TypeError("DefinedLayer: fastrnn.define_cell makes the classes to use, got none.")
        super().__init__(self._spec.mode, *args, **kwargs)
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

    def _check_packable(self, method: str) -> None:
        super()._check_packable(method)
        if self._spec.name not in COMPILED:
            raise RuntimeError(
                f"{type(self).__name__}.{method}: the cell must be compiled, got one that is not."
            )
        if self.hidden_size < self._spec.least_hidden:
            raise RuntimeError(
                f"{type(self).__name__}.{method}: hidden_size must be at least "
                f"{self._spec.least_hidden} for this cell, got {self.hidden_size}."
            )

    def _run_fast_path(
        self, input: Tensor, hx: Hidden, marks: Marks = NO_MARKS
    ) -> tuple[Tensor, Hidden] | None:
        if (
            self._spec.name not in COMPILED
            or self.hidden_size < self._spec.least_hidden
            or type(input) is not Tensor
            or not input.is_cpu
        ):
            return None
        return super()._run_fast_path(input, hx, marks)
