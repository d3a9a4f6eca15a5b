"""RNNCell, LSTMCell and GRUCell: single steps, drop-in replacements for ``torch.nn``'s cells."""

from __future__ import annotations

from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrnn import checks
from fastrnn._torch_internals import is_scripting
from fastrnn.backends import torch_step
from fastrnn.engine import choose
from fastrnn.engine.run import run_step, run_step_unchecked, run_torch_step
from fastrnn.modules.quantization_warning import warn_if_left_float
from fastrnn.modules.scripted import script_slots
from fastrnn.ops import HALF, raise_unless_rejected
from fastrnn.spec import CELLS, MATRICES, CellSpec, Weights, slots_of
from fastrnn.tracing import check_scriptable, leaf_call

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_Device = torch.device | str | int | None

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_ALL = slots_of(has_biases=True, has_projection=False)


class CellBase(nn.RNNCellBase):
    """Base class of the cells. ``nn.RNNCellBase`` provides the parameters and their names."""

    _label: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except Exception:
            checks.explain_constructor(
                self._label, ("input_size", "hidden_size", "bias"), args, kwargs
            )
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            warn_if_left_float(self, value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        """Returns the module that ``torch.jit.script`` compiles: itself, after a check."""
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        check_scriptable(self, names)
        return self

    def _weights(self) -> Weights:
        """Returns the weights to compute with."""
        parameters = self._parameters
        weights = []
        for name in _NAMES:
            # The dictionary is faster; weights of parametrizations and pruning are not in it.
            weight = parameters[name] if name in parameters else getattr(self, name)
            if weight is not None:
                weights.append(weight)
        if len(weights) == len(_NAMES):
            return Weights(weights, _ALL)
        return self._without_none()

    def _without_none(self) -> Weights:
        """Replaces a bias that is None by zeros, or drops both if both are None."""
        w_ih, w_hh, b_ih, b_hh = [getattr(self, name) for name in _NAMES]
        for name, weight in (("weight_ih", w_ih), ("weight_hh", w_hh)):
            if weight is None:
                raise RuntimeError(f"{self._label}: {name} must be a tensor, got None.")
        if b_ih is None and b_hh is None:
            return Weights([w_ih, w_hh], MATRICES)
        zeros = w_hh.new_zeros(w_hh.shape[0])
        biases = [zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh]
        return Weights([w_ih, w_hh, *biases], _ALL)

    def _run_fast_path(
        self, spec: CellSpec, input: Tensor, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Fast path: runs a batched step without the general checks. None if it does not apply.

        Here only the operator, or torch's step, checks the arguments. If the operator rejects them,
        the general path supports them or raises an error in torch's words. An LSTM passes both
        states or none.
        """
        parameters = self._parameters
        if not (
            choose.may_use_fast_path()  # first, so that compiled code does not guard on the rest
            and type(input) is Tensor
            and input.dim() == 2
            and (h is None or (type(h) is Tensor and h.dim() == 2))
            and (c is None or type(c) is Tensor)
            and tuple(parameters) == _NAMES  # neither parametrized nor pruned
        ):
            return None
        flat: Any = list(parameters.values())
        slots = _ALL
        if flat[2] is None and flat[3] is None:
            flat, slots = flat[:2], MATRICES
        if NoneType in map(type, flat) or flat[0].is_meta or flat[1].is_meta or input.is_meta:
            return None
        if input.dtype in HALF:
            return None
        if h is None:
            h = self._zeros(input)
            c = h if spec.has_cell_state else None
        elif spec.has_cell_state != (c is not None):
            return None
        if (
            spec.gates == 1
            and spec.torch.torch_step is not None
            and input.is_cpu
            and (
                (torch.is_grad_enabled() and flat[0].requires_grad)
                or torch_step.is_small_rnn_step(input, flat)
            )
        ):
            return run_torch_step(spec, input, h, Weights(flat, slots)), None
        try:
            return run_step_unchecked(spec, input, h, c, flat, slots)
        except Exception as error:
            raise_unless_rejected(error)
        return None

    def _check_dims(self, input: Tensor) -> bool:
        """Whether the input is batched; raises unless it is 1-D or 2-D."""
        dim = input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{self._label}: Expected input to be 1D or 2D, got {dim}D instead")
        return dim == 2

    def _zeros(self, input: Tensor) -> Tensor:
        return input.new_zeros(input.shape[0], self.hidden_size)

    def _check_meta(self, input: Tensor, *matrices: Tensor) -> None:
        """Raises if only a weight is on the device "meta", which torch's step does not check."""
        for weight in matrices:
            if weight.is_meta and not input.is_meta:
                raise RuntimeError(checks.different_devices_message(input, weight, "parameter"))

    def _script_step(
        self, cell: str, input: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs a step for ``torch.jit.script``: x [B,I], h and c [B,H]; empty c' without c."""
        weights = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights.extend([self.bias_ih, self.bias_hh])
        slots = script_slots(self.bias, False)
        _, h_n, c_n = torch.ops.fastrnn.recurrent_layer(input, h, c, weights, slots, None, cell)
        return h_n, c_n

    def _script_one_state(self, cell: str, input: Tensor, hx: Tensor | None) -> Tensor:
        if input.dim() != 1 and input.dim() != 2:
            raise ValueError(f"Expected input to be 1D or 2D, got {input.dim()}D instead")
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            h = torch.zeros([x.size(0), self.hidden_size], dtype=input.dtype, device=input.device)
        else:
            h = hx if input.dim() == 2 else hx.unsqueeze(0)
        h_n, _ = self._script_step(cell, x, h, None)
        return h_n if input.dim() == 2 else h_n.squeeze(0)

    def _one_state(self, spec: CellSpec, input: Tensor, hx: Tensor | None) -> Tensor:
        try:
            quick = self._run_fast_path(spec, input, hx, None)
            if quick is not None:
                return quick[0]
            node = leaf_call(self, input, hx)
            if node is not None:
                return node  # type: ignore[no-any-return]
            is_batched = self._check_dims(input)
            if hx is not None and hx.dim() != input.dim():
                raise checks.wrong_dims_error(self._label, "hx", "hidden", hx, input.dim())
            if not is_batched:
                input = input.unsqueeze(0)
            if hx is None:
                hx = self._zeros(input)
            elif not is_batched:
                hx = hx.unsqueeze(0)
            weights = self._weights()
            w_ih, w_hh, *_ = weights.flat
            if w_ih.is_meta or w_hh.is_meta:
                self._check_meta(input, w_ih, w_hh)
            h, _ = run_step(spec, input, hx, None, weights)
            return h if is_batched else h.squeeze(0)
        except Exception:
            checks.explain_cell(self, input, hx)
            raise


class RNNCell(CellBase):
    r"""One step of Elman's network.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        nonlinearity: f, one of ``'tanh'``, ``'relu'``, ``'sigmoid'``. Default: ``'tanh'``
        device, dtype: of the parameters.

    Inputs:
        input: [B,I] or [I].
        hx: [B,H] or [H]; zeros if omitted.

    Outputs:
        h': [B,H] or [H], the next state.

    Raises:
        ValueError, RuntimeError: as in ``torch.nn.RNNCell``, with its messages.

    Unlike ``torch.nn.RNNCell`` it supports ``'sigmoid'``. On the CPU, steps with tanh or ReLU in
    float32 or float64 run torch's own step if a gradient is needed or the step is small, because
    that is faster.

    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """

    __constants__ = [*nn.RNNCellBase.__constants__, "nonlinearity"]  # noqa: RUF012 - as torch
    nonlinearity: str
    _label = "RNNCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after ``input``; see the class for the shapes."""
        if is_scripting():
            return self._script_one_state(f"rnn_{self.nonlinearity}", input, hx)
        else:  # noqa: RET505 - without the else TorchScript would compile this
            spec = CELLS.get(f"rnn_{self.nonlinearity}")
            if spec is None:
                given = " ".join(str(self.nonlinearity).split())
                raise RuntimeError(f"Unknown nonlinearity: {given}")
            return self._one_state(spec, input, hx)


class LSTMCell(CellBase):
    r"""One step of a long short-term memory.

    .. math::
        \begin{aligned}
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')
        \end{aligned}

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the states.
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        device, dtype: of the parameters.

    Inputs:
        input: [B,I] or [I].
        hx: tuple or list of h and c, each [B,H] or [H]; zeros if omitted.

    Outputs:
        (h', c'): each [B,H] or [H], the next states.

    Raises:
        ValueError, RuntimeError: as in ``torch.nn.LSTMCell``, with its messages.

    Source: S. Hochreiter, J. Schmidhuber, Long Short-Term Memory (1997); F. A. Gers,
    J. Schmidhuber, F. Cummins, Learning to Forget (2000).
    """

    _label = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states after ``input``; see the class for the shapes."""
        if is_scripting():
            return self._script_two_states(input, hx)
        else:  # noqa: RET505 - without the else TorchScript would compile this
            return self._two_states(input, hx)

    def _script_two_states(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if input.dim() != 1 and input.dim() != 2:
            raise ValueError(f"Expected input to be 1D or 2D, got {input.dim()}D instead")
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            h = torch.zeros([x.size(0), self.hidden_size], dtype=input.dtype, device=input.device)
            c = h
        else:
            h = hx[0] if input.dim() == 2 else hx[0].unsqueeze(0)
            c = hx[1] if input.dim() == 2 else hx[1].unsqueeze(0)
        h_n, c_n = self._script_step("lstm", x, h, c)
        if input.dim() == 2:
            return h_n, c_n
        return h_n.squeeze(0), c_n.squeeze(0)

    def _two_states(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        try:
            states: Any = (None, None) if hx is None else hx
            if hx is None or (
                type(states) in (tuple, list) and len(states) == 2 and states[0] is not None
            ):
                h, c = states
                quick = self._run_fast_path(CELLS["lstm"], input, h, c)
                if quick is not None:
                    return quick  # type: ignore[return-value]
            node = leaf_call(self, input, hx)
            if node is not None:
                return node  # type: ignore[no-any-return]
            is_batched = self._check_dims(input)
            if hx is not None:
                if not isinstance(hx, (tuple, list)):
                    raise TypeError("LSTMCell: hx must be a tuple of two tensors, h and c")
                for index, state in enumerate(hx):
                    if state.dim() != input.dim():
                        name = f"hx[{index}]"
                        raise checks.wrong_dims_error("LSTMCell", name, name, state, input.dim())
                if len(hx) != 2:
                    raise RuntimeError("lstm_cell expects two hidden states")
            x = input if is_batched else input.unsqueeze(0)
            if hx is None:
                h = c = self._zeros(x)
            elif is_batched:
                h, c = hx
            else:
                h, c = hx[0].unsqueeze(0), hx[1].unsqueeze(0)
            h, c_next = run_step(CELLS["lstm"], x, h, c, self._weights())
            assert c_next is not None
            return (h, c_next) if is_batched else (h.squeeze(0), c_next.squeeze(0))
        except Exception:
            checks.explain_cell(self, input, hx)
            raise


class GRUCell(CellBase):
    r"""One step of a gated recurrent unit.

    .. math::
        \begin{aligned}
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h
        \end{aligned}

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        device, dtype: of the parameters.

    Inputs:
        input: [B,I] or [I].
        hx: [B,H] or [H]; zeros if omitted.

    Outputs:
        h': [B,H] or [H], the next state.

    Raises:
        ValueError, RuntimeError: as in ``torch.nn.GRUCell``, with its messages.

    Source: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014).
    """

    _label = "GRUCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after ``input``; see the class for the shapes."""
        if is_scripting():
            return self._script_one_state("gru", input, hx)
        else:  # noqa: RET505 - without the else TorchScript would compile this
            return self._one_state(CELLS["gru"], input, hx)
