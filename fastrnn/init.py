"""Initial values of recurrent layers and cells, in the style of ``torch.nn.init``.

    from fastrnn import init

    lstm = init.chrono_(init.orthogonal_(fastrnn.LSTM(8, 64)), t_max=200)

Each function changes one RNN, LSTM, GRU or cell of fastrnn or ``torch.nn`` in place, in all layers
and directions, and returns it. Values that a function does not mention keep what they are.

The biases ``b_ih`` and ``b_hh`` of the gates that are set here add up. A function that sets a bias
writes the value to ``b_ih`` and zeros to ``b_hh``, so that their sum is the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrnn.spec import without_variant

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_"]

M = TypeVar("M", bound=nn.Module)

# index of a gate in the rows of a weight: i, f, g, o (LSTM) and r, z, n (GRU)
_LSTM_INPUT, _LSTM_FORGET = 0, 1
_GRU_UPDATE = 1
_JANET_GATE = 0


@torch.no_grad()
def orthogonal_(module: M, gain: float = 1.0, *, generator: torch.Generator | None = None) -> M:
    r"""Sets the recurrent weights of each gate to a random orthogonal matrix.

    .. math:: W_{hh}^{(k)\top} W_{hh}^{(k)} = \text{gain}^2 I \quad \text{for each gate } k

    The block [H,H] of every gate is drawn on its own: one orthogonal matrix [G*H,H] would have
    blocks that are not orthogonal. With a projection a block is [H,P], with orthogonal columns;
    ``w_hr`` does not change.

    Args:
        module: an RNN, LSTM, GRU or cell; ``w_hh`` is [G*H,R].
        gain: factor of the matrices, which is their spectral radius without a projection.
        generator: source of the random numbers, on the module's device. Default: torch's own.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a recurrent layer or cell.
        ValueError: ``gain`` is not a finite number.
        RuntimeError: a weight is not a Parameter but computed, for example by a parametrization.

    Source: A. M. Saxe, J. L. McClelland, S. Ganguli, Exact solutions to the nonlinear dynamics of
    learning in deep linear neural networks (2014); per gate as in T. Cooijmans et al., Recurrent
    Batch Normalization (2017).
    """
    function = "orthogonal_"
    _cell(function, module)
    _check_finite(function, "gain", gain)
    for weight in _parameters(function, module, "weight_hh"):
        for block in _gates(module, weight):
            # the QR decomposition does not support half types
            values = torch.empty_like(block, dtype=_at_least_float32(block.dtype))
            block.copy_(nn.init.orthogonal_(values, gain, generator))
    return module


@torch.no_grad()
def chrono_(module: M, t_max: float, *, generator: torch.Generator | None = None) -> M:
    r"""Sets the gates' biases so that units remember for random times of up to ``t_max`` steps.

    .. math::
        \begin{aligned}
        u &\sim \mathcal{U}(1, t_{max} - 1) \quad \text{for each unit} \\
        \text{LSTM: } b_f &= \log u, \quad b_i = -\log u \\
        \text{GRU, LiGRU: } b_z &= \log u \\
        \text{JANET: } b_s &= \log u
        \end{aligned}

    A unit whose forget gate is constant with the bias log u keeps its state for about 1 + u steps.
    The source derives the rule for the LSTM and for a gated network that multiplies the old state
    by 1 - g. With ``coupled_gates`` an LSTM has no b_i. In torch's GRU, z multiplies the old state,
    so its bias has the sign of b_f.

    Args:
        module: an LSTM, GRU, JANET, LiGRU or a cell, with biases [G*H].
        t_max: the longest dependency that the layer is expected to learn, in steps; at least 2.
        generator: source of the random numbers, on the module's device. Default: torch's own.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no LSTM, GRU, JANET or LiGRU and no cell of an LSTM or GRU.
        ValueError: ``t_max`` is less than 2 or not finite, or the module has no biases.
        RuntimeError: a bias is not a Parameter but computed, for example by a parametrization.

    Source: C. Tallec, Y. Ollivier, Can recurrent neural networks warp time? (2018).
    """
    function = "chrono_"
    cells = ("lstm", "gru", "janet", "ligru")
    cell = _cell(function, module, cells, "an LSTM, GRU, JANET, LiGRU, LSTMCell or GRUCell")
    if not (_is_finite(t_max) and t_max >= 2):
        raise ValueError(
            f"{function}: t_max must be a number of steps of at least 2, got {t_max!r}."
        )
    for b_ih, b_hh in _biases(function, module):
        dtype = _at_least_float32(b_ih.dtype)
        keep = torch.empty(_hidden_size(module), dtype=dtype, device=b_ih.device)
        keep.uniform_(1, t_max - 1, generator=generator).log_()
        gates = {_JANET_GATE if cell == "janet" else _GRU_UPDATE: keep}  # also LiGRU's z
        if cell == "lstm":
            gates = {_forget_gate(module): keep}
            if not _has_coupled_gates(module):
                gates[_LSTM_INPUT] = -keep
        for gate, value in gates.items():
            _gates(module, b_ih)[gate].copy_(value)
            _gates(module, b_hh)[gate].zero_()
    return module


@torch.no_grad()
def forget_bias_(module: M, value: float = 1.0) -> M:
    r"""Sets the bias of an LSTM's forget gate, by default to 1 (the "unit forget gate").

    .. math:: b_{if} = \text{value}, \quad b_{hf} = 0

    With 1, the forget gate begins near 0.73 instead of 0.5. With 0.5, a gradient at c halves at
    every step.

    Args:
        module: an LSTM or LSTMCell with biases [4*H].
        value: the sum of the two biases.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is neither an LSTM nor an LSTMCell.
        ValueError: ``value`` is not a finite number, or the module has no biases.
        RuntimeError: a bias is not a Parameter but computed, for example by a parametrization.

    Source: F. A. Gers, J. Schmidhuber, F. Cummins, Learning to Forget (2000); R. Jozefowicz,
    W. Zaremba, I. Sutskever, An Empirical Exploration of Recurrent Network Architectures (2015).
    """
    function = "forget_bias_"
    _cell(function, module, ("lstm",), "an LSTM or LSTMCell")
    _check_finite(function, "value", value)
    for b_ih, b_hh in _biases(function, module):
        _gates(module, b_ih)[_forget_gate(module)].fill_(value)
        _gates(module, b_hh)[_forget_gate(module)].zero_()
    return module


@torch.no_grad()
def identity_(module: M, scale: float = 1.0) -> M:
    r"""Sets the recurrent weights of an RNN with ReLU to the identity, and its biases to zero.

    .. math:: W_{hh} = \text{scale} \cdot I, \quad b_{ih} = b_{hh} = 0

    The network (IRNN) then begins as a sum over time: while a unit is active, it adds up its input,
    and a gradient keeps its norm from step to step. The source also draws ``w_ih`` from a normal
    distribution with the standard deviation 0.001; here ``w_ih`` does not change.

    Args:
        module: an RNN or RNNCell with ``nonlinearity="relu"``; ``w_hh`` is [H,H].
        scale: factor of the identity; less than 1 if the network should forget slowly.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not an RNN or RNNCell with ReLU.
        ValueError: ``scale`` is not a finite number.
        RuntimeError: a parameter is not a Parameter but computed, for example by a parametrization.

    Source: Q. V. Le, N. Jaitly, G. E. Hinton, A Simple Way to Initialize Recurrent Networks of
    Rectified Linear Units (2015).
    """
    function = "identity_"
    _cell(function, module, ("rnn_relu",), "an RNN or RNNCell with nonlinearity='relu'")
    _check_finite(function, "scale", scale)
    weights = _parameters(function, module, "weight_hh")
    biases = _biases(function, module) if module.bias else []
    for weight in weights:
        nn.init.eye_(weight).mul_(scale)
    for pair in biases:
        for bias in pair:
            bias.zero_()
    return module


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _check_finite(function: str, argument: str, value: Any) -> None:
    if not _is_finite(value):
        raise ValueError(f"{function}: {argument} must be a finite number, got {value!r}.")


def _cell(
    function: str,
    module: nn.Module,
    cells: tuple[str, ...] = (),
    expected: str = "an RNN, LSTM, GRU or one of their cells",
) -> str:
    """Returns the name of the module's cell. Raises TypeError unless it is one of ``cells``."""
    cell = ""
    if isinstance(module, nn.RNNBase):
        cell = without_variant(module.mode.lower())
    elif isinstance(module, nn.RNNCellBase):
        # fastrnn's cells do not derive from torch's, and a parametrized one has its own class
        names = [cls.__name__ for cls in type(module).__mro__]
        kinds = {"RNNCell": "rnn", "LSTMCell": "lstm", "GRUCell": "gru"}
        cell = next((kinds[name] for name in names if name in kinds), "")
        if cell == "rnn":
            cell = f"rnn_{module.nonlinearity}"
    if not cell or (cells and cell not in cells):
        name = type(module).__name__
        if cell.startswith("rnn_"):
            name += f" with nonlinearity='{cell.removeprefix('rnn_')}'"
        raise TypeError(f"{function}: module must be {expected}, got {name}.")
    return cell


def _has_coupled_gates(module: nn.Module) -> bool:
    """Whether an LSTM has the gates f, g, o alone, with i = 1 - f."""
    options: Any = getattr(module, "_cell_options", None)
    return options is not None and bool(options.coupled_gates)


def _forget_gate(module: nn.Module) -> int:
    """Returns the index of an LSTM's forget gate."""
    return 0 if _has_coupled_gates(module) else _LSTM_FORGET


def _hidden_size(module: nn.Module) -> int:
    size: int = module.hidden_size  # type: ignore[assignment]
    return size


def _parameters(function: str, module: nn.Module, prefix: str) -> list[Tensor]:
    """Returns the parameters ``prefix`` of all layers and directions, after a check."""
    parameters: list[Tensor] = []
    for suffix in _suffixes(module):
        name = prefix + suffix
        parameter = module._parameters.get(name)
        if parameter is None:
            if getattr(module, name, None) is None:
                raise ValueError(f"{function}: module must have {name}, got None.")
            raise RuntimeError(
                f"{function}: {name} must be a Parameter, got a weight that is computed. "
                "Initialise the module before you parametrize or prune it."
            )
        parameters.append(parameter)
    return parameters


def _suffixes(module: nn.Module) -> Iterator[str]:
    if not isinstance(module, nn.RNNBase):
        yield ""
        return
    for layer in range(module.num_layers):
        yield f"_l{layer}"
        if module.bidirectional:
            yield f"_l{layer}_reverse"


def _biases(function: str, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Returns ``b_ih`` and ``b_hh`` of all layers and directions, after a check."""
    if not module.bias:
        raise ValueError(f"{function}: module must have biases, got bias=False.")
    b_ih, b_hh = (_parameters(function, module, prefix) for prefix in ("bias_ih", "bias_hh"))
    return list(zip(b_ih, b_hh, strict=True))


def _gates(module: nn.Module, parameter: Tensor) -> Tensor:
    """Returns a view [G,H,...] of a parameter [G*H,...]."""
    gates: Tensor = parameter.unflatten(0, (-1, _hidden_size(module)))
    return gates


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
