"""Layers of cells that ``torch.nn`` lacks: IndRNN, JANET, LiGRU, FastGRNN and sLSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import checks
from fastrnn.engine.ragged import NO_MARKS, Marks, check_lengths, run_marked
from fastrnn.engine.run import run
from fastrnn.engine.states import Recorder
from fastrnn.init import chrono_
from fastrnn.layer_call import DEFAULTS, LayerCall, Options, SequenceTensors
from fastrnn.modules.base import Hidden
from fastrnn.modules.cell_layer import CellLayer
from fastrnn.ops.recurrence import EPSILON
from fastrnn.ops.stacking import layer_input, layer_output
from fastrnn.spec import BIASES, BY_MODE, GAIN_IH, MATRICES, Weights
from fastrnn.tracing import size

__all__ = ["JANET", "SLSTM", "FastGRNN", "IndRNN", "LiGRU"]

_Device = torch.device | str | int | None


def _check_t_max(name: str, t_max: Any, bias: Any) -> None:
    if t_max is None:
        return
    is_number = isinstance(t_max, int | float) and not checks.is_bool(t_max)
    if not is_number or not (math.isfinite(t_max) and t_max >= 2):
        raise ValueError(
            f"{name}: t_max must be a number of steps of at least 2, or None, got "
            f"{checks.describe(t_max)}."
        )
    if not bias:
        raise ValueError(f"{name}: t_max needs biases, got bias=False.")


class IndRNN(CellLayer):
    r"""Independently recurrent network: a unit sees its own past only.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + u \odot h_{t-1})

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there is ``b_ih``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.
        nonlinearity: f, ``'relu'`` or ``'tanh'``. Default: ``'relu'``
        options: ``learn_initial_state``, ``recompute``, ``residual``, ``batch_first_states`` of
            `fastrnn.GRU`.

    Inputs:
        input, hx, lengths, resets, reset_state: as in `fastrnn.GRU`.

    Outputs:
        output, h_n: as in `fastrnn.GRU`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.GRU``, with its messages.

    Parameters: ``weight_ih_l{k}`` [H,I] and ``bias_ih_l{k}`` [H], drawn as in ``torch.nn.RNN``, and
    ``u_l{k}`` [H], drawn from the uniform distribution on [0, 1]; with ``_reverse`` for the second
    direction. docs/cells.md shows how to keep ``u`` below a bound.

    Source: S. Li, W. Li, C. Cook, C. Zhu, Y. Gao, Independently Recurrent Neural Network (IndRNN):
    Building A Longer and Deeper RNN (2018).
    """

    unit_parameter_names = ("u",)
    _wrong_input_message = "IndRNN: Expected input to be 2D or 3D, got {}D instead"

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
        nonlinearity: str = "relu",
        **options: Any,
    ) -> None:
        modes = {"relu": "INDRNN", "tanh": "INDRNN_TANH"}
        given: Any = nonlinearity
        if not isinstance(given, str) or given not in modes:
            raise ValueError(
                "IndRNN: nonlinearity must be 'relu' or 'tanh', got "
                f"{checks.describe(nonlinearity)}."
            )
        super().__init__(
            modes[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )
        self._draw_recurrent_weights()

    def reset_parameters(self) -> None:
        """Draws all parameters as at the beginning."""
        super().reset_parameters()
        self._draw_recurrent_weights()

    def _draw_recurrent_weights(self) -> None:
        for name in self._unit_names():
            if name in self._parameters:  # not yet while the base class is constructed
                nn.init.uniform_(getattr(self, name))

    def extra_repr(self) -> str:
        """Returns what the base class returns, and ``nonlinearity`` if it is not the default."""
        text = super().extra_repr()
        return text if self.mode == "INDRNN" else f"{text}, nonlinearity='tanh'"


class SLSTM(CellLayer):
    r"""sLSTM of xLSTM with one head: an LSTM with an exponential input gate and a normaliser.

    .. math::
        \begin{aligned}
        (\tilde i_t, \tilde f_t, \tilde z_t, \tilde o_t)
            &= W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        m_t &= \max(\log \sigma(\tilde f_t) + m_{t-1}, \tilde i_t) \\
        i_t &= \exp(\tilde i_t - m_t), \quad
            f_t = \exp(\log \sigma(\tilde f_t) + m_{t-1} - m_t) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(\tilde z_t) \\
        n_t &= f_t \odot n_{t-1} + i_t \\
        h_t &= \sigma(\tilde o_t) \odot c_t / n_t
        \end{aligned}

    The forget gate is the sigmoid. The stabiliser m keeps both exponents at most 0; it does not
    change h.

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of each state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.
        options: ``recompute``, ``residual``, ``weight_dropout`` of `fastrnn.LSTM`.

    Inputs:
        input: [T,B,I], unbatched [T,I], or a `PackedSequence`.
        hx: a tuple of h_0, c_0, n_0 and m_0 [L*D,B,H] or unbatched [L*D,H]; zeros if omitted.
        lengths, resets, reset_state: as in `fastrnn.LSTM`; ``reset_state`` is shaped like ``hx``.

    Outputs:
        output: [T,B,D*H], [T,D*H] or a `PackedSequence`, h of the last layer at each step.
        (h_n, c_n, n_n, m_n): the states after the last step of each sequence, shaped like ``hx``.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.LSTM``, with its messages.

    Parameters have the names, sizes and initial values of ``torch.nn.LSTM``'s, with the gates i, f,
    z, o.

    Source: M. Beck et al., xLSTM: Extended Long Short-Term Memory (2024).
    """

    state_names = ("h", "c", "n", "m")
    _wrong_input_message = "SLSTM: Expected input to be 2D or 3D, got {}D instead"

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
        **options: Any,
    ) -> None:
        super().__init__(
            "SLSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )


class JANET(CellLayer):
    r"""Just another network: an LSTM that is left with its forget gate.

    .. math::
        \begin{aligned}
        s_t &= W_{is} x_t + b_{is} + W_{hs} h_{t-1} + b_{hs} \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        h_t &= \sigma(s_t) \odot h_{t-1} + (1 - \sigma(s_t - \beta)) \odot g_t
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
        beta: lets more of the candidate in than the forget gate makes room for. Default: 1
        t_max: the longest dependency in steps: b_s is drawn as `fastrnn.init.chrono_` does, and b_g
            is 0, as in the source; by default all are drawn like torch's. Default: ``None``
        options: ``learn_initial_state``, ``recompute``, ``residual``, ``batch_first_states``,
            ``weight_dropout`` of `fastrnn.GRU`.

    Inputs:
        input, hx, lengths, resets, reset_state: as in `fastrnn.GRU`.

    Outputs:
        output, h_n: as in `fastrnn.GRU`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.GRU``, with its messages.

    Parameters have the names of ``torch.nn.GRU``'s, with the gates s, g.

    Source: J. van der Westhuizen, J. Lasenby, The unreasonable effectiveness of the forget gate
    (2018).
    """

    _wrong_input_message = "JANET: Expected input to be 2D or 3D, got {}D instead"

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
        beta: float = 1.0,
        t_max: float | None = None,
        **options: Any,
    ) -> None:
        given: Any = beta
        if not isinstance(given, int | float) or checks.is_bool(given) or not math.isfinite(given):
            raise ValueError(f"JANET: beta must be a finite number, got {checks.describe(beta)}.")
        _check_t_max("JANET", t_max, bias)
        # before super().__init__, which calls reset_parameters
        self.beta = float(beta)
        self.t_max = t_max
        super().__init__(
            "JANET",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )

    def reset_parameters(self) -> None:
        """Draws all parameters as ``torch.nn`` does, and then the biases for ``t_max``."""
        super().reset_parameters()
        # the base class calls this once before it has the gates of the cell
        if self.t_max is not None and self.mode == "JANET":
            for name, parameter in self.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(parameter)
            chrono_(self, self.t_max)

    def _unit_weights(self, suffix: str) -> Tensor:
        like: Any = getattr(self, f"weight_ih{suffix}")
        return like.new_full((self.hidden_size,), self.beta)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Returns what the base class returns, and ``beta`` and ``t_max`` if they are set."""
        text = super().extra_repr()
        if self.beta != 1:
            text += f", beta={self.beta}"
        return text if self.t_max is None else f"{text}, t_max={self.t_max}"


class LiGRU(CellLayer):
    r"""Light gated recurrent unit, in SpeechBrain's form: one gate, a ReLU, and batch norm of W x.

    .. math::
        \begin{aligned}
        a_t &= W_{ia} x_t, \quad z'_t = W_{iz} x_t
            \quad \text{(both normalised, or with biases)} \\
        g_t &= \text{relu}(a_t + W_{ha} h_{t-1}), \quad
            z_t = \sigma(z'_t + W_{hz} h_{t-1}) \\
        h_t &= z_t \odot h_{t-1} + (1 - z_t) \odot g_t
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
        normalization: of W_ih x [2*H]. ``"batchnorm"``: by mean and variance over all steps and
            rows in training, by running ones in eval mode; ``"layernorm"``: over the 2*H values of
            a row; ``None``. Default: ``"batchnorm"``
        options: ``learn_initial_state``, ``recompute``, ``residual``, ``batch_first_states``,
            ``layer_norm``, ``zoneout``, ``recurrent_dropout``, ``weight_dropout`` of `fastrnn.GRU`.

    Inputs:
        input, hx, lengths, resets, reset_state: as in `fastrnn.GRU`.

    Outputs:
        output, h_n: as in `fastrnn.GRU`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.GRU``, with its messages.

    Parameters have the names of ``torch.nn.GRU``'s, with the gates a, z. With ``normalization``
    there are ``gain_ih_l{k}`` [2*H], 1 at first, and the biases, which are added after it, are 0 at
    first; with ``"batchnorm"`` also the buffers ``running_mean_l{k}`` and ``running_var_l{k}``
    [2*H], which follow the statistics with a momentum of 0.05.

    Source: M. Ravanelli, P. Brakel, M. Omologo, Y. Bengio, Light Gated Recurrent Units for Speech
    Recognition (2018); M. Ravanelli et al., SpeechBrain (2021), whose directions share their
    weights.
    """

    normalization: str | None
    _wrong_input_message = "LiGRU: Expected input to be 2D or 3D, got {}D instead"

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
        normalization: str | None = "batchnorm",
        **options: Any,
    ) -> None:
        if normalization not in ("batchnorm", "layernorm", None):
            raise ValueError(
                "LiGRU: normalization must be 'batchnorm', 'layernorm' or None, got "
                f"{checks.describe(normalization)}."
            )
        if normalization is not None and options.get("layer_norm"):
            raise ValueError(
                f"LiGRU: normalization must be None with layer_norm=True, got {normalization!r}."
            )
        # before super().__init__, which calls reset_parameters
        self.normalization = normalization
        super().__init__(
            "LIGRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )
        if normalization is not None:
            if normalization == "layernorm" and self._recompute != "none":
                raise ValueError(
                    "LiGRU: recompute must be 'none' with normalization='layernorm', got "
                    f"{self._recompute!r}."
                )
            like: Any = self.weight_ih_l0
            for suffix in self._suffixes():
                gain = nn.Parameter(like.detach().new_empty(2 * hidden_size))
                self.register_parameter(f"gain_ih{suffix}", gain)
                if normalization == "batchnorm":
                    for name in ("running_mean", "running_var"):
                        self.register_buffer(name + suffix, torch.empty_like(gain.detach()))
            self._reset_normalization()

    def reset_parameters(self) -> None:
        """Draws all parameters as at the beginning, and resets the running statistics."""
        super().reset_parameters()
        if self.normalization is not None and "gain_ih_l0" in self._parameters:
            self._reset_normalization()

    @torch.no_grad()
    def _reset_normalization(self) -> None:
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith(("gain_ih", "running_var")):
                own.fill_(1)
            elif name.startswith(("bias", "running_mean")):
                own.zero_()

    def extra_repr(self) -> str:
        """Returns what the base class returns, and ``normalization``."""
        return f"{super().extra_repr()}, normalization={self.normalization!r}"

    def _check_packable(self, method: str) -> None:
        super()._check_packable(method)
        owner = f"{type(self).__name__}.{method}"
        allowed = (None, "batchnorm") if method == "stream" else (None,)
        if self.normalization not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise RuntimeError(
                f"{owner}: normalization must be {expected}, got {self.normalization!r}."
            )
        if self.normalization is not None and self.training:
            raise RuntimeError(f"{owner}: the layer must be in eval mode, got training mode.")

    def _run_fast_path(
        self, input: Tensor, hx: Hidden, marks: Marks = NO_MARKS
    ) -> tuple[Tensor, Hidden] | None:
        return None if self.normalization is not None else super()._run_fast_path(input, hx, marks)

    def _torch_weights(self) -> Weights:
        """Returns the weights, in eval mode with the running statistics in them."""
        weights = super()._torch_weights()
        if self.normalization is None or (self.normalization == "batchnorm" and self.training):
            return weights
        suffixes = list(self._suffixes())
        count = len(weights.flat) // len(suffixes)
        flat: list[Tensor] = []
        for index, suffix in enumerate(suffixes):
            own = list(weights.flat[index * count : (index + 1) * count])
            if self.normalization == "layernorm":
                flat += [*own, getattr(self, f"gain_ih{suffix}")]
            else:
                mean, variance = (
                    getattr(self, f"running_{name}{suffix}") for name in ("mean", "var")
                )
                flat += self._normalized(own, suffix, mean, variance)
        if self.normalization == "layernorm":
            return Weights(flat, weights.slots | GAIN_IH)
        return Weights(flat, weights.slots | BIASES)

    def _normalized(
        self, own: list[Tensor], suffix: str, mean: Tensor, variance: Tensor
    ) -> list[Tensor]:
        """Returns weights with which a plain layer computes batch normalisation of W_ih x.

        gain (W x - mean) / sqrt(variance + epsilon) + b is affine in x.
        """
        w_ih, w_hh = own[:2]
        scale = getattr(self, f"gain_ih{suffix}") * torch.rsqrt(variance + EPSILON)
        shift = -mean * scale
        b_ih = shift if len(own) < 3 else own[2] + shift
        b_hh = torch.zeros_like(b_ih) if len(own) < 4 else own[3]
        return [w_ih * scale.unsqueeze(1), w_hh, b_ih.to(w_ih.dtype), b_hh]

    def _compute(
        self,
        input: Tensor,
        hx: Hidden,
        sequence: SequenceTensors,
        weights: Weights,
        marks: Marks = NO_MARKS,
        recorder: Recorder | None = None,
    ) -> tuple[Tensor, Hidden]:
        if self.normalization != "batchnorm" or not self.training:
            return super()._compute(input, hx, sequence, weights, marks, recorder)
        # layer by layer, because the weights depend on the statistics of the layer's input
        stack = Options(self.num_layers, self.dropout, residual=self._residual)
        own_options = DEFAULTS._replace(recompute=checks.check_recompute(self._recompute))
        if self._cell_options is not None:
            own_options = own_options._replace(
                cell=self._cell_options.of_call(True), heads=self._cell_options.heads
            )
        if own_options == DEFAULTS:
            own_options = DEFAULTS  # `run` compares by identity
        directions = 2 if self.bidirectional else 1
        swapped = self.batch_first and sequence.named().batch_sizes is None
        x, h_n = input, []
        for index in range(self.num_layers):
            below = x
            x = layer_input(below, index, stack)
            states = slice(index * directions, (index + 1) * directions)
            own = self._weights_for(x, index, weights, marks.lengths)
            call = LayerCall(BY_MODE[self.mode], x, sequence, hx[states], None, own, own_options)
            if marks is NO_MARKS:
                y, h, _ = run(call, swapped)
            else:
                state = marks.reset_state
                if isinstance(state, Tensor) and state.dim() >= 3:
                    state = state[..., states, :, :]
                y, h, _ = run_marked(call, marks._replace(reset_state=state), swapped)
            x = layer_output(y, below, index, stack)
            h_n.append(h)
        return x, torch.cat(h_n)

    def _weights_for(self, x: Tensor, index: int, weights: Weights, lengths: Any) -> Weights:
        """Returns a layer's weights for the statistics of its input; updates the running ones.

        W x has the mean W mean(x) and the variance diag(W cov(x) W^T).
        """
        directions = 2 if self.bidirectional else 1
        count = len(weights.flat) // (self.num_layers * directions)
        flat: list[Tensor] = []
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            total: Any = rows.shape[0]
            if lengths is None:
                if total <= 1:
                    raise ValueError(
                        "LiGRU: batch normalisation in training needs more than 1 row (steps times "
                        f"batch), got {total}."
                    )
                others = total - 1
                mean_x = rows.mean(0)
                centred = rows - mean_x
                covariance = centred.t() @ centred / total
            else:
                is_inside = self._rows_inside(x, lengths)
                # all lengths may be 0 or 1; reading them here would wait for a GPU
                total = is_inside.sum().clamp(min=1)
                others = (total - 1).clamp(min=1)
                mean_x = torch.where(is_inside, rows, 0).sum(0) / total
                centred = torch.where(is_inside, rows - mean_x, 0)
                covariance = centred.t() @ centred / total
            for direction in range(directions):
                first = (index * directions + direction) * count
                own = list(weights.flat[first : first + count])
                suffix = f"_l{index}" + ("_reverse" if direction == 1 else "")
                w_ih = own[0].to(dtype)
                mean = w_ih @ mean_x
                variance = ((w_ih @ covariance) * w_ih).sum(1)
                flat += self._normalized(own, suffix, mean, variance)
                self._update_statistics(suffix, mean, variance * (total / others))
        return Weights([w.to(own[0].dtype) for w in flat], weights.slots | BIASES)

    def _rows_inside(self, x: Tensor, lengths: Any) -> Tensor:
        """Returns whether each row of x is within the length of its sequence, [T*B,1]."""
        steps, batch = (1, 0) if self.batch_first else (0, 1)
        check_lengths(lengths, size(x, batch))
        numbers = torch.arange(x.shape[steps], device=x.device)
        is_inside: Tensor = numbers.unsqueeze(1) < lengths.to(x.device)
        return (is_inside.t() if self.batch_first else is_inside).reshape(-1, 1)

    @torch.no_grad()
    def _update_statistics(self, suffix: str, mean: Tensor, variance: Tensor) -> None:
        for name, value in (("running_mean", mean), ("running_var", variance)):
            running: Any = getattr(self, name + suffix)
            running.lerp_(value.detach().to(running.dtype), _MOMENTUM)


#: of the running statistics, as in SpeechBrain
_MOMENTUM = 0.05


class FastGRNN(CellLayer):
    r"""FastGRNN: the gate and the candidate share their products.

    .. math::
        \begin{aligned}
        a_t &= W x_t + U h_{t-1} \\
        z_t &= \sigma(a_t + b_z), \quad g_t = \tanh(a_t + b_h) \\
        h_t &= (\sigma(\zeta) (1 - z_t) + \sigma(\nu)) \odot g_t + z_t \odot h_{t-1}
        \end{aligned}

    Args:
        input_size: I, features of each input step.
        hidden_size: H, features of the hidden state.
        num_layers: L, number of stacked layers. Default: 1
        bias: whether there are ``b_z`` and ``b_h``. Default: ``True``
        batch_first: input and output are [B,T,*] instead of [T,B,*]; the states are not.
        dropout: probability that an output between two layers is zeroed in training. Default: 0
        bidirectional: whether a second direction runs backwards in time: D = 2 instead of 1.
        device, dtype: of the parameters.
        w_rank: the rank of W, which is then the product of two parameters, or None. Default:
            ``None``
        u_rank: the same for U. Default: ``None``
        options: ``learn_initial_state``, ``recompute``, ``residual``, ``batch_first_states``,
            ``weight_dropout`` of `fastrnn.GRU`.

    Inputs:
        input, hx, lengths, resets, reset_state: as in `fastrnn.GRU`.

    Outputs:
        output, h_n: as in `fastrnn.GRU`.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``torch.nn.GRU``, with its messages.

    Parameters: W is ``weight_ih_l{k}`` [H,I], or with ``w_rank`` r the product of
    ``weight_ih_left_l{k}`` [H,r] and ``weight_ih_right_l{k}`` [r,I]; U is ``weight_hh_l{k}`` [H,H]
    in the same way. ``bias_z_l{k}`` and ``bias_h_l{k}`` [H] are 1 at first, ``zeta_l{k}`` and
    ``nu_l{k}`` [1] are 1 and -4, as in the authors' code. A low rank saves parameters; the kernels
    multiply by the product, which is computed once per call.

    Source: A. Kusupati et al., FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated
    Recurrent Neural Network (2018).
    """

    _wrong_input_message = "FastGRNN: Expected input to be 2D or 3D, got {}D instead"

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
        w_rank: int | None = None,
        u_rank: int | None = None,
        **options: Any,
    ) -> None:
        for option, rank in (("w_rank", w_rank), ("u_rank", u_rank)):
            is_int = isinstance(rank, int) and not checks.is_bool(rank)
            if rank is not None and not (is_int and rank > 0):
                raise ValueError(
                    f"FastGRNN: {option} must be a positive integer or None, got "
                    f"{checks.describe(rank)}."
                )
        if not checks.is_bool(bias):
            raise TypeError(f"FastGRNN: bias must be a bool, got {checks.describe(bias)}.")
        # before super().__init__, which calls reset_parameters
        self.w_rank, self.u_rank = w_rank, u_rank
        super().__init__(
            "FASTGRNN",
            input_size,
            hidden_size,
            num_layers,
            False,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )
        self.bias = bias
        for suffix in self._suffixes():
            for kind, rank in (("ih", w_rank), ("hh", u_rank)):
                if rank is not None:
                    self._factorize(f"weight_{kind}", suffix, rank)
            sizes = {"bias_z": hidden_size, "bias_h": hidden_size} if bias else {}
            for name, length in {**sizes, "zeta": 1, "nu": 1}.items():
                like: Any = next(self.parameters())
                own = nn.Parameter(like.detach().new_empty(length))
                self.register_parameter(name + suffix, own)
        self._reset_vectors()

    def _factorize(self, name: str, suffix: str, rank: int) -> None:
        """Replaces a parameter by two whose product it is."""
        whole: Any = self._parameters.pop(name + suffix)
        rows, columns = whole.shape
        for part, sizes in (("left", (rows, rank)), ("right", (rank, columns))):
            own = nn.Parameter(whole.detach().new_empty(sizes))
            # drawn so that the values of the product have about the variance of the whole
            bound = (3.0 / rank) ** 0.5 if part == "left" else self.hidden_size**-0.5
            self.register_parameter(f"{name}_{part}{suffix}", nn.init.uniform_(own, -bound, bound))  # type: ignore[arg-type]
        self._all_weights = [
            [f"{name}_left{suffix}" if own == name + suffix else own for own in names]
            for names in self._all_weights
        ]
        self._flat_weights_names = [own for names in self._all_weights for own in names]
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draws the matrices as at the beginning, and sets biases, zeta and nu."""
        super().reset_parameters()
        self._reset_vectors()

    @torch.no_grad()
    def _reset_vectors(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith(("bias", "zeta")):
                parameter.fill_(1)
            elif name.startswith("nu"):
                parameter.fill_(-4)
            elif "_left" in name:
                bound = (3.0 / parameter.shape[1]) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)

    def _torch_weights(self) -> Weights:
        """Returns the weights of the kernels: W, U, b_h, and zeros for its second part."""
        flat: list[Tensor] = []
        for suffix in self._suffixes():
            own = [
                getattr(self, f"weight_{kind}{suffix}")
                if rank is None
                else getattr(self, f"weight_{kind}_left{suffix}")
                @ getattr(self, f"weight_{kind}_right{suffix}")
                for kind, rank in (("ih", self.w_rank), ("hh", self.u_rank))
            ]
            if self.bias:
                bias = getattr(self, f"bias_h{suffix}")
                own += [bias, torch.zeros_like(bias)]
            flat += own
        return Weights(flat, MATRICES | BIASES if self.bias else MATRICES)

    def _unit_weights(self, suffix: str) -> Tensor:
        """Returns b_z - b_h, sigmoid(zeta) and sigmoid(nu) of each unit."""
        zeta, nu = (
            torch.sigmoid(getattr(self, name + suffix)).expand(self.hidden_size)
            for name in ("zeta", "nu")
        )
        if not self.bias:
            return torch.cat([torch.zeros_like(zeta), zeta, nu])
        shift = getattr(self, f"bias_z{suffix}") - getattr(self, f"bias_h{suffix}")
        return torch.cat([shift, zeta, nu])

    def extra_repr(self) -> str:
        """Returns what the base class returns, and the ranks if they are set."""
        text = super().extra_repr()
        for option in ("w_rank", "u_rank"):
            if getattr(self, option) is not None:
                text += f", {option}={getattr(self, option)}"
        return text
