"""RNN, LSTM and GRU over whole sequences, drop-in replacements for ``torch.nn``'s modules."""

import math
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn._torch_internals import is_scripting, overload_method
from fastrnn.init import forget_bias_
from fastrnn.modules.base import Hidden
from fastrnn.modules.scripted import OneState, Scriptable, TwoStates

__all__ = ["GRU", "LSTM", "RNN"]

_Device = torch.device | str | int | None

_NO_PROJECTION = "proj_size argument is only supported for LSTM, not RNN or GRU"


def without_projection(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the positional arguments for ``nn.RNNBase``, whose 8th after mode is ``proj_size``.

    For RNN and GRU, torch documents ``device`` at that position and reads ``proj_size``. Both are
    accepted: an int is a ``proj_size``, anything else a ``device``.
    """
    if "proj_size" in kwargs:
        raise ValueError(_NO_PROJECTION)
    if len(args) > 7:
        if not isinstance(args[7], int):
            return (*args[:7], 0, *args[7:])
        if args[7] != 0:
            raise ValueError(_NO_PROJECTION)
    return args


class RNN(OneState):
    r"""Elman's recurrent network with tanh, ReLU or the logistic sigmoid.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default: 1
        nonlinearity: f, one of ``'tanh'``, ``'relu'``, ``'sigmoid'``. Default: ``'tanh'``
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.
        weight_dtype: ``torch.float16`` lets inference of one sequence on the CPU round w_hh, for
            speed, see docs/float16_weights.md. Default: ``None``
        learn_initial_state: adds the parameter ``h_0`` [L*D,1,H], zero at first: the state of a
            call without ``hx``, and of a reset without ``reset_state``. Default: ``False``
        recompute: ``"full"``, or a number of steps k, saves memory in training: only the states
            before each k steps are kept, and backward computes the rest again, see docs/memory.md.
            Default: ``"none"``
        residual: whether the input of each layer but the first is added to its output. The output
            of the layers 0 to k is z_k = y_k + z_{k-1}, with y_k the states of layer k, which reads
            dropout(z_{k-1}). The states that are returned are the layers' own. Default: ``False``
        batch_first_states: whether ``hx``, ``reset_state`` and the final states are [B,L*D,*]
            instead of [L*D,B,*]; the final states are then views. Default: ``False``
        layer_norm: whether W_ih x and W_hh h are normalised, see docs/cell_options.md. Default:
            ``False``
        zoneout: probability that a unit keeps its state at a step. Default: 0
        recurrent_dropout: probability that a unit of h is zero in the product with W_hh; one mask
            for all steps of a sequence. Default: 0
        weight_dropout: probability that a value of W_hh is zero; one mask per call. Default: 0
        heads: number of independent parts of the units, a divisor of H: ``weight_hh`` is
            [G*H,H/heads]. Default: 1

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: [L*D,B,H] or unbatched [L*D,H]; zeros if omitted.
        lengths: integers [B], the number of steps of each row; not with a `PackedSequence`. The
            output is zero beyond, the final states are those of each row's last step, and the
            reverse direction starts there. A row of length 0 keeps its initial state.
        resets: bool (or 0 and 1) [T,B], [B,T] with ``batch_first``, or the same with a trailing 1:
            before such a step the row's state becomes ``reset_state``.
        reset_state: shaped like ``hx``; zeros if omitted.
            The batch may be 1, and a first dimension T gives a state for each step.
        return_all_states: whether the third result has ``states``, those of every step.
        return_gates: whether the third result has ``gates``, the activations of every step.

    Outputs:
        output: [T,B,D*H], [T,D*H] or a `PackedSequence`, the states of the last layer at each step.
        h_n: [L*D,B,H] or [L*D,H], the state after the last step of each sequence.
        extras: only with ``return_all_states`` or ``return_gates``: a `fastrnn.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.RNN``, with its messages.

    Parameters, their names, order and initialisation are those of ``torch.nn.RNN``: checkpoints
    load both ways. Unlike ``torch.nn.RNN`` it supports ``'sigmoid'``, and gradients in eval mode on
    CUDA.

    Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """

    _wrong_input_message = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dtype: torch.dtype | None = None,
        learn_initial_state: bool = False,
        recompute: int | str = "none",
        residual: bool = False,
        batch_first_states: bool = False,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        heads: int = 1,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        args = without_projection(args, kwargs)
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}
        if not isinstance(nonlinearity, str) or nonlinearity not in modes:
            given = " ".join(str(nonlinearity).split())
            raise ValueError(
                f"Unknown nonlinearity '{given}'. Select from 'tanh', 'relu' or 'sigmoid'."
            )
        # before super().__init__ so that an overridden reset_parameters can read it
        self.nonlinearity = nonlinearity
        super().__init__(modes[nonlinearity], *args, **kwargs)

    @overload
    @overload_method
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    @overload_method
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """Runs the network over ``input`` from the state ``hx``; see the class for the shapes."""
        if is_scripting():
            if return_all_states or return_gates:
                raise RuntimeError(
                    "return_all_states and return_gates must be False in TorchScript"
                )
            # the compiler skips the arm of the other type only in an if with an else
            if isinstance(input, PackedSequence):
                if lengths is not None or resets is not None or reset_state is not None:
                    raise ValueError("lengths and resets need a padded batch, got packed data")
                return self._script_packed(input, hx)
            else:  # noqa: RET505
                return self._script_padded(input, hx, lengths, resets, reset_state)
        else:
            return self._run(
                input, hx, lengths, resets, reset_state, return_all_states, return_gates
            )


class LSTM(TwoStates):
    r"""Long short-term memory, optionally with a projection of the hidden state.

    .. math::
        \begin{aligned}
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \text{ with a projection } W_{hr} (o_t \odot \tanh(c_t))
        \end{aligned}

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the cell state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        proj_size: P, features of the projected hidden state; 0 for no projection. Default: 0
        device, dtype: of the parameters.
        weight_dtype: ``torch.float16`` lets inference of one sequence on the CPU round w_hh, for
            speed, see docs/float16_weights.md. Default: ``None``
        learn_initial_state: adds the parameters ``h_0`` [L*D,1,R] and ``c_0`` [L*D,1,H], zero at
            first: the states of a call without ``hx``, and of a reset without ``reset_state``.
            Default: ``False``
        forget_bias: the initial sum of b_if and b_hf, as `fastrnn.init.forget_bias_` sets it; by
            default both are drawn like the other biases. Default: ``None``
        recompute: ``"full"``, or a number of steps k, saves memory in training: only the states
            before each k steps are kept, and backward computes the rest again, see docs/memory.md.
            Default: ``"none"``
        residual: whether the input of each layer but the first is added to its output. The output
            of the layers 0 to k is z_k = y_k + z_{k-1}, with y_k the states of layer k, which reads
            dropout(z_{k-1}). The states that are returned are the layers' own. Default: ``False``
        batch_first_states: whether ``hx``, ``reset_state`` and the final states are [B,L*D,*]
            instead of [L*D,B,*]; the final states are then views. Default: ``False``
        layer_norm: whether W_ih x, W_hh h and the cell state at the output are normalised, see
            docs/cell_options.md. Default: ``False``
        zoneout: probability that a unit keeps its state; a pair for c and for h. Default: 0
        recurrent_dropout: probability that a unit of h is zero in the product with W_hh; one mask
            for all steps of a sequence. Default: 0
        weight_dropout: probability that a value of W_hh is zero; one mask per call. Default: 0
        peephole: whether the gates see the cell state of their unit: i and f see c_{t-1}, o sees
            c_t, by the parameters ``w_ci_l{k}``, ``w_cf_l{k}`` and ``w_co_l{k}`` [H], see
            docs/cells.md. Default: ``False``
        coupled_gates: whether i = 1 - f. The gates are then f, g, o: weights and biases have 3*H
            rows, see docs/cells.md. Default: ``False``
        cell_clip: bound of the absolute value of c at every step. Default: ``None``
        proj_clip: bound of the absolute value of the projected h at every step; runs as torch
            operations. Default: ``None``
        gate_activation: ``"sigmoid"``, or ``"hard_sigmoid"``: relu6(a + 3) / 6 for i, f and o.
        heads: number of independent parts of the units, a divisor of H: ``weight_hh`` is
            [G*H,H/heads]. Default: 1

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: tuple or list of h_0 [L*D,B,R] and c_0 [L*D,B,H] (unbatched without B); zeros if
            omitted. R is P with a projection and H without.
        lengths: integers [B], the number of steps of each row; not with a `PackedSequence`. The
            output is zero beyond, the final states are those of each row's last step, and the
            reverse direction starts there. A row of length 0 keeps its initial state.
        resets: bool (or 0 and 1) [T,B], [B,T] with ``batch_first``, or the same with a trailing 1:
            before such a step the row's state becomes ``reset_state``.
        reset_state: shaped like ``hx``; zeros if omitted.
            The batch may be 1, and a first dimension T gives a state for each step.
        return_all_states: whether the third result has ``states``, those of every step.
        return_gates: whether the third result has ``gates``, the activations of every step.

    Outputs:
        output: [T,B,D*R], [T,D*R] or a `PackedSequence`, the states of the last layer at each step.
        (h_n, c_n): the states after the last step of each sequence, shaped like ``hx``.
        extras: only with ``return_all_states`` or ``return_gates``: a `fastrnn.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.LSTM``, with its messages.

    Parameters, their names, order and initialisation are those of ``torch.nn.LSTM``: checkpoints
    load both ways. Unlike ``torch.nn.LSTM`` it also checks the states of a `PackedSequence`, and
    supports gradients in eval mode on CUDA.

    Source: S. Hochreiter, J. Schmidhuber, Long Short-Term Memory (1997); F. A. Gers,
    J. Schmidhuber, F. Cummins, Learning to Forget (2000); projection: H. Sak, A. Senior,
    F. Beaufays, Long Short-Term Memory Based Recurrent Neural Network Architectures (2014);
    peepholes: F. A. Gers, J. Schmidhuber, Recurrent Nets that Time and Count (2000); coupled gates:
    K. Greff et al., LSTM: A Search Space Odyssey (2017).
    """

    # without an annotation, which TorchScript would read
    _forget_bias = cast("float | None", None)
    _wrong_input_message = "LSTM: Expected input to be 2D or 3D, got {}D instead"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dtype: torch.dtype | None = None,
        learn_initial_state: bool = False,
        forget_bias: float | None = None,
        recompute: int | str = "none",
        residual: bool = False,
        batch_first_states: bool = False,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        peephole: bool = False,
        coupled_gates: bool = False,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        gate_activation: str = "sigmoid",
        heads: int = 1,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, forget_bias: Any = None, **kwargs: Any) -> None:
        if forget_bias is not None:
            is_number = isinstance(forget_bias, int | float) and not isinstance(forget_bias, bool)
            if not is_number or not math.isfinite(forget_bias):
                raise ValueError(f"LSTM: forget_bias must be a finite number, got {forget_bias!r}.")
            # before super().__init__, which calls reset_parameters
            self._forget_bias = float(forget_bias)
        super().__init__("LSTM", *args, **kwargs)

    def reset_parameters(self) -> None:
        """Draws all parameters as ``torch.nn.LSTM`` does, and then sets ``forget_bias``."""
        super().reset_parameters()
        if self._forget_bias is not None:
            if not self.bias:
                raise ValueError("LSTM: forget_bias needs biases, got bias=False.")
            forget_bias_(self, self._forget_bias)

    def extra_repr(self) -> str:
        """Returns what the base class returns, and ``forget_bias`` if it is set."""
        text = super().extra_repr()
        return text if self._forget_bias is None else f"{text}, forget_bias={self._forget_bias}"

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Returns [L*D,B,H], the size of c_0 for this input."""
        states, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return states, batch, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raises unless input and both states have the sizes that the module expects."""
        self.check_input(input, batch_sizes)
        self.check_hidden_size(
            hidden[0],
            self.get_expected_hidden_size(input, batch_sizes),
            "Expected hidden[0] size {}, got {}",
        )
        self.check_hidden_size(
            hidden[1],
            self.get_expected_cell_size(input, batch_sizes),
            "Expected hidden[1] size {}, got {}",
        )

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns both states with their sequences permuted; unchanged if the order is None."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def _zero_states(self, input: Tensor, batch: int) -> Hidden:
        states = self.num_layers * (2 if self.bidirectional else 1)
        c = input.new_zeros(states, batch, self.hidden_size)
        if self.proj_size == 0:
            return c, c
        return c.new_zeros(states, batch, self.proj_size), c

    def _states(self, hx: Hidden) -> tuple[Tensor, Tensor | None]:
        if not isinstance(hx, (tuple, list)):
            raise TypeError("LSTM: hx must be a tuple of two tensors, h and c")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        return hx[0], hx[1]

    def _add_batch(self, hx: Hidden, is_batched: bool) -> Hidden:
        h, c = hx[0], hx[1]
        if is_batched:
            if h.dim() != 3 or c.dim() != 3:
                raise RuntimeError(
                    "For batched 3-D input, hx and cx should also be 3-D but got "
                    f"({h.dim()}-D, {c.dim()}-D) tensors"
                )
            return hx
        if h.dim() != 2 or c.dim() != 2:
            raise RuntimeError(
                "For unbatched 2-D input, hx and cx should also be 2-D but got "
                f"({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return h.unsqueeze(1), c.unsqueeze(1)

    @overload
    @overload_method
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    @overload_method
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """Runs the network over ``input`` from the states ``hx``; see the class for the shapes."""
        if is_scripting():
            if return_all_states or return_gates:
                raise RuntimeError(
                    "return_all_states and return_gates must be False in TorchScript"
                )
            # the compiler skips the arm of the other type only in an if with an else
            if isinstance(input, PackedSequence):
                if lengths is not None or resets is not None or reset_state is not None:
                    raise ValueError("lengths and resets need a padded batch, got packed data")
                return self._script_packed(input, hx)
            else:  # noqa: RET505
                return self._script_padded(input, hx, lengths, resets, reset_state)
        else:
            return self._run(
                input, hx, lengths, resets, reset_state, return_all_states, return_gates
            )


class GRU(OneState):
    r"""Gated recurrent unit, with the reset gate after the recurrent product as in torch and cuDNN.

    .. math::
        \begin{aligned}
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}
        \end{aligned}

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.
        weight_dtype: ``torch.float16`` lets inference of one sequence on the CPU round w_hh, for
            speed, see docs/float16_weights.md. Default: ``None``
        learn_initial_state: adds the parameter ``h_0`` [L*D,1,H], zero at first: the state of a
            call without ``hx``, and of a reset without ``reset_state``. Default: ``False``
        recompute: ``"full"``, or a number of steps k, saves memory in training: only the states
            before each k steps are kept, and backward computes the rest again, see docs/memory.md.
            Default: ``"none"``
        residual: whether the input of each layer but the first is added to its output. The output
            of the layers 0 to k is z_k = y_k + z_{k-1}, with y_k the states of layer k, which reads
            dropout(z_{k-1}). The states that are returned are the layers' own. Default: ``False``
        batch_first_states: whether ``hx``, ``reset_state`` and the final states are [B,L*D,*]
            instead of [L*D,B,*]; the final states are then views. Default: ``False``
        layer_norm: whether W_ih x and W_hh h are normalised, see docs/cell_options.md. Default:
            ``False``
        zoneout: probability that a unit keeps its state at a step. Default: 0
        recurrent_dropout: probability that a unit of h is zero in the product with W_hh; one mask
            for all steps of a sequence. Default: 0
        weight_dropout: probability that a value of W_hh is zero; one mask per call. Default: 0
        gate_activation: ``"sigmoid"``, or ``"hard_sigmoid"``: relu6(a + 3) / 6 for r and z.
        reset_after: whether r multiplies the product, as above; ``False``: it multiplies h before
            the product, n = tanh(W_in x + b_in + W_hn (r*h) + b_hn), as in the paper.
        heads: number of independent parts of the units, a divisor of H: ``weight_hh`` is
            [G*H,H/heads]. Default: 1

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: [L*D,B,H] or unbatched [L*D,H]; zeros if omitted.
        lengths: integers [B], the number of steps of each row; not with a `PackedSequence`. The
            output is zero beyond, the final states are those of each row's last step, and the
            reverse direction starts there. A row of length 0 keeps its initial state.
        resets: bool (or 0 and 1) [T,B], [B,T] with ``batch_first``, or the same with a trailing 1:
            before such a step the row's state becomes ``reset_state``.
        reset_state: shaped like ``hx``; zeros if omitted.
            The batch may be 1, and a first dimension T gives a state for each step.
        return_all_states: whether the third result has ``states``, those of every step.
        return_gates: whether the third result has ``gates``, the activations of every step.

    Outputs:
        output: [T,B,D*H], [T,D*H] or a `PackedSequence`, the states of the last layer at each step.
        h_n: [L*D,B,H] or [L*D,H], the state after the last step of each sequence.
        extras: only with ``return_all_states`` or ``return_gates``: a `fastrnn.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.GRU``, with its messages.

    Parameters, their names, order and initialisation are those of ``torch.nn.GRU``: checkpoints
    load both ways. Unlike ``torch.nn.GRU`` it rejects a positional ``proj_size`` in the
    constructor, and supports gradients in eval mode on CUDA.

    Source: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014).
    """

    _wrong_input_message = "GRU: Expected input to be 2D or 3D, got {}D instead"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dtype: torch.dtype | None = None,
        learn_initial_state: bool = False,
        recompute: int | str = "none",
        residual: bool = False,
        batch_first_states: bool = False,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        gate_activation: str = "sigmoid",
        reset_after: bool = True,
        heads: int = 1,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *without_projection(args, kwargs), **kwargs)

    @overload
    @overload_method
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    @overload_method
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """Runs the network over ``input`` from the state ``hx``; see the class for the shapes."""
        if is_scripting():
            if return_all_states or return_gates:
                raise RuntimeError(
                    "return_all_states and return_gates must be False in TorchScript"
                )
            # the compiler skips the arm of the other type only in an if with an else
            if isinstance(input, PackedSequence):
                if lengths is not None or resets is not None or reset_state is not None:
                    raise ValueError("lengths and resets need a padded batch, got packed data")
                return self._script_packed(input, hx)
            else:  # noqa: RET505
                return self._script_padded(input, hx, lengths, resets, reset_state)
        else:
            return self._run(
                input, hx, lengths, resets, reset_state, return_all_states, return_gates
            )


#: for each cell, its class and the constructor arguments that select it
LAYERS: dict[str, tuple[type[Scriptable], dict[str, Any]]] = {
    "rnn_tanh": (RNN, {}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
    "rnn_sigmoid": (RNN, {"nonlinearity": "sigmoid"}),
    "lstm": (LSTM, {}),
    "gru": (GRU, {}),
}
