"""Explains failed calls with one clear sentence that names the argument.

A small call takes only 12 us, so the code that leads to the kernels checks only what keeps the
kernels safe. If a call fails there, an ``explain_*`` function below checks its arguments one by one
and raises an error for the first wrong one:

    <module or function>: <argument> must be <expected>, got <actual>.

It returns if it finds no wrong argument, or if the original error already names the mistake in the
words of torch.nn. The caller then raises the original error again.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fastrnn.layer_call import FULL
from fastrnn.spec import BY_MODE, WEIGHT_FORMATS, CellSpec

#: dtypes that a layer can compute with, by the kernels or by torch
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)


#: of input and hidden size: the kernels count with 32 bits
LARGEST_SIZE = 2**31 - 1
# far more than memory holds: torch would fill it, layer by layer
_MOST_LAYERS = 2**20


class _Explained(Exception):
    """Carries the error that explains a call."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class _AlreadyClear(Exception):
    """Ends a search: the original error already names the mistake."""


def explain_layer(module: Any, input: Any, hx: Any) -> None:
    """Raises a clear error for a failed call of RNN, LSTM or GRU, or returns."""
    _explain(_search_layer, module, input, hx)


def explain_cell(module: Any, input: Any, hx: Any) -> None:
    """Raises a clear error for a failed call of RNNCell, LSTMCell or GRUCell, or returns."""
    _explain(_search_cell, module, input, hx)


def explain_function(spec: CellSpec, values: dict[str, Any]) -> None:
    """Raises a clear error for a failed call of a function of `fastrnn.functional`, or returns."""
    _explain(_search_function, spec, values)


def explain_linear_layer(module: Any, input: Any, hx: Any) -> None:
    """Raises a clear error for a failed call of MinGRU, MinLSTM or SRU, or returns."""
    _explain(_search_linear_layer, module, input, hx)


def check_num_layers(name: str, num_layers: Any) -> None:
    """Raises if a constructor would make so many layers that it never ended."""
    if isinstance(num_layers, int) and num_layers > _MOST_LAYERS:
        raise ValueError(
            f"{name}: num_layers must be at most {_MOST_LAYERS}, got {describe(num_layers)}."
        )


def explain_constructor(name: str, names: Sequence[str], args: Any, kwargs: Any) -> None:
    """Raises a clear error for a failed call of a module's constructor, or returns.

    Args:
        name: the name of the class.
        names: the names of the positional arguments.
        args, kwargs: the arguments of the constructor.
    """
    message = str(sys.exc_info()[1])
    is_clear = message.partition(" ")[0] in names or "unexpected keyword" in message
    if not is_clear:  # torch's message does not name the argument
        _explain(_search_constructor, name, names, args, kwargs)


def _explain(search: Callable[..., None], *arguments: Any) -> None:
    if any(isinstance(argument, Proxy) for argument in arguments):
        return  # torch.fx is tracing and explains its own errors
    try:
        search(*arguments)
    except _Explained as found:
        error = found.error
    except Exception:  # the original error is clearer than an error of the search
        return
    else:
        return
    original = sys.exc_info()[1]
    raise error from None if original is None else original.__cause__


def _wrong(cls: type[Exception], owner: str, argument: str, expected: str, actual: str) -> NoReturn:
    raise _Explained(cls(f"{owner}: {argument} must be {expected}, got {actual}."))


def describe(value: Any) -> str:
    """Returns a short description of a value, on one line."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, complex, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else "a long str"
    if isinstance(value, (tuple, list, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    cls = type(value)
    module = "" if cls.__module__ == "builtins" else f"{cls.__module__}."
    return f"{module}{cls.__name__}"


def wrong_dims_error(
    label: str, argument: str, torch_name: str, state: Tensor, dim: int
) -> Exception:
    """Returns the error for a state whose dimensions differ from ``dim``, those of the input."""
    if state.dim() not in (1, 2):
        return ValueError(
            f"{label}: Expected {torch_name} to be 1D or 2D, got {state.dim()}D instead"
        )
    return RuntimeError(f"{label}: {argument} must be {dim}-D like the input, got {state.dim()}-D.")


# --- searches; each one raises _Explained or _AlreadyClear, or returns


def _check_tensor(owner: str, argument: str, value: Any, expected: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        _wrong(TypeError, owner, argument, expected, describe(value))


def _check_dense(owner: str, argument: str, t: Tensor) -> None:
    """Raises unless a tensor is dense: not nested, quantized, sparse or mkldnn."""
    if t.is_nested:
        _wrong(RuntimeError, owner, argument, "a dense tensor", "a nested one")
    if t.is_quantized:
        _wrong(RuntimeError, owner, argument, "a dense tensor", "a quantized one")
    if t.layout != torch.strided:
        layout = str(t.layout).removeprefix("torch.").removeprefix("_")
        _wrong(RuntimeError, owner, argument, "a dense tensor", f"one of layout {layout}")


def _check_dtype(owner: str, argument: str, t: Tensor) -> None:
    if t.dtype not in _DTYPES:
        expected = "of float16, bfloat16, float32, float64 or a complex dtype"
        _wrong(RuntimeError, owner, argument, expected, str(t.dtype))


def _check_one_state(owner: str, hx: Any) -> list[tuple[str, Tensor]]:
    _check_tensor(owner, "hx", hx)
    return [("hx", hx)]


def _check_two_states(owner: str, hx: Any, function: str) -> list[tuple[str, Tensor]]:
    if not isinstance(hx, (tuple, list)) or isinstance(hx, PackedSequence):
        _wrong(TypeError, owner, "hx", "a tuple of two tensors, h and c", describe(hx))
    if len(hx) != 2:
        raise _Explained(RuntimeError(f"{function} expects two hidden states"))
    for index, state in enumerate(hx):
        _check_tensor(owner, f"hx[{index}]", state)
    return [("hx[0]", hx[0]), ("hx[1]", hx[1])]


def _check_same_device(owner: str, argument: str, t: Tensor, x: Tensor) -> None:
    if t.is_meta != x.is_meta:
        role = "parameter" if argument.startswith(("weight", "bias", "params")) else "hidden"
        raise _Explained(RuntimeError(different_devices_message(x, t, role)))


def different_devices_message(x: Tensor, other: Tensor, role: str) -> str:
    """Returns torch's message for tensors on different devices."""
    return (
        f"Input and {role} tensors are not at the same device, found input tensor at "
        f"{x.device} and {role} tensor at {other.device}"
    )


def _check_shape(owner: str, argument: str, t: Tensor, expected: Sequence[int]) -> None:
    if list(t.shape) != list(expected):
        _wrong(RuntimeError, owner, argument, f"of shape {list(expected)}", f"{list(t.shape)}")


def _check_batch_sizes(owner: str, batch_sizes: Any, rows: int) -> None:
    """Raises unless these are valid batch sizes for this number of packed rows."""
    expected = "an int64 vector on the CPU"
    _check_tensor(owner, "batch_sizes", batch_sizes, expected)
    _check_dense(owner, "batch_sizes", batch_sizes)
    is_vector = batch_sizes.dim() == 1 and batch_sizes.dtype == torch.int64
    if not is_vector or batch_sizes.device.type != "cpu":
        actual = f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        _wrong(RuntimeError, owner, "batch_sizes", expected, actual)
    sizes = batch_sizes.tolist()
    if not sizes:
        raise _Explained(RuntimeError("Expected sequence length to be larger than 0 in RNN"))
    if sum(sizes) != rows or sizes != sorted(sizes, reverse=True) or sizes[-1] <= 0:
        first = f"{sizes[:8]}" if len(sizes) <= 8 else f"{sizes[:8]} and {len(sizes) - 8} more"
        expected = f"positive, descend and add up to the {rows} rows of data"
        _wrong(RuntimeError, owner, "batch_sizes", expected, first)


def _check_permutation(owner: str, argument: str, indices: Any, batch: int, x: Tensor) -> None:
    expected = f"an int64 permutation of the {batch} sequences, or None"
    if indices is None:
        return
    _check_tensor(owner, argument, indices, expected)
    _check_dense(owner, argument, indices)
    if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
        _wrong(RuntimeError, owner, argument, expected, f"{indices.dim()}-D {indices.dtype}")
    if indices.device != x.device:
        _wrong(RuntimeError, owner, argument, f"on {x.device} like data", str(indices.device))
    values = indices.tolist()
    if sorted(values) != list(range(batch)):
        _wrong(RuntimeError, owner, argument, expected, f"{values[:8]}")


def _search_layer(module: Any, input: Any, hx: Any) -> None:
    owner = module._get_name()
    packed = isinstance(input, PackedSequence)
    x: Any = input.data if packed else input
    if packed:
        _check_tensor(owner, "data", x)
    else:
        _check_tensor(owner, "input", x, "a tensor or a PackedSequence")
        if x.is_nested and x.layout is torch.jagged:
            return  # the module takes it, and its errors are clear
    _check_dense(owner, "data" if packed else "input", x)
    spec = BY_MODE.get(module.mode)
    if spec is None:
        modes = ", ".join(mode for mode, spec in BY_MODE.items() if not spec.defined)
        _wrong(ValueError, owner, "mode", f"one of {modes}", describe(module.mode))
    if spec.cell_states > 1:
        raise _AlreadyClear  # a tuple of more than two states, which the module has checked
    states: list[tuple[str, Tensor]] = []
    if hx is not None:
        states = (
            _check_two_states(owner, hx, "lstm")
            if spec.has_cell_state
            else _check_one_state(owner, hx)
        )
    for argument, state in states:
        _check_dense(owner, argument, state)
    parameters = _named_parameters(owner, module)
    _check_layer_attributes(owner, module)
    if packed:
        _check_tensor(owner, "batch_sizes", input.batch_sizes)
        _check_by_torch(module, x, None, input.batch_sizes, raised_before=False)
        _check_batch_sizes(owner, input.batch_sizes, x.shape[0])
        batch = int(input.batch_sizes[0])
        if states and all(state.dim() == 3 and state.shape[1] == batch for _, state in states):
            _check_permutation(owner, "sorted_indices", input.sorted_indices, batch, x)
        _check_by_torch(module, x, hx, input.batch_sizes, raised_before=False)
        _check_permutation(owner, "unsorted_indices", input.unsorted_indices, batch, x)
    elif x.dim() not in (2, 3) or any(state.dim() != x.dim() for _, state in states):
        raise _AlreadyClear
    else:
        if x.dim() == 2:
            x = x.unsqueeze(0 if module.batch_first else 1)
            hx = [state.unsqueeze(1) for _, state in states]
            hx = None if not states else hx if spec.has_cell_state else hx[0]
        _check_by_torch(module, x, hx, None)
    _check_layer_shapes(owner, module, parameters)
    _check_dtype(owner, "data" if packed else "input", x)
    for name, parameter in parameters.items():
        _check_same_device(owner, name, parameter, x)


def _check_by_torch(
    module: Any, x: Tensor, hx: Any, batch_sizes: Tensor | None, raised_before: bool = True
) -> None:
    """Ends the search if torch's own checks reject the call."""
    try:
        if hx is None:
            module.check_input(x, batch_sizes)
        else:
            module.check_forward_args(x, hx, batch_sizes)
    except Exception as error:
        raise _AlreadyClear if raised_before else _Explained(error) from None


def _named_parameters(owner: str, module: Any) -> dict[str, Tensor]:
    """Returns the parameters that exist, by name."""
    parameters: dict[str, Tensor] = {}
    for name in module._flat_weights_names:
        parameter = getattr(module, name, None)
        if parameter is None and name.startswith("bias"):
            continue  # counts as zeros
        if not isinstance(parameter, Tensor):
            _wrong(RuntimeError, owner, name, "a tensor", describe(parameter))
        _check_dense(owner, name, parameter)
        parameters[name] = parameter
    return parameters


def _check_layer_attributes(owner: str, module: Any) -> None:
    """Raises unless the attributes still describe the parameters that the constructor made."""
    names = [name for name in module._flat_weights_names if name.startswith("weight_ih")]
    directions = 2 if any(name.endswith("_reverse") for name in names) else 1
    layers = len(names) // directions
    if module.num_layers != layers:
        expected = f"{layers} like the layers of the parameters"
        _wrong(ValueError, owner, "num_layers", expected, describe(module.num_layers))
    if bool(module.bidirectional) != (directions == 2):
        expected = f"{directions == 2} like the directions of the parameters"
        _wrong(ValueError, owner, "bidirectional", expected, describe(module.bidirectional))
    for name in ("input_size", "hidden_size", "proj_size"):
        if not isinstance(getattr(module, name), int):
            _wrong(TypeError, owner, name, "an int", describe(getattr(module, name)))
    projected = any(name.startswith("weight_hr") for name in module._flat_weights_names)
    if projected != (module.proj_size > 0) or module.proj_size < 0:
        expected = "positive like the parameters" if projected else "0 like the parameters"
        _wrong(ValueError, owner, "proj_size", expected, describe(module.proj_size))
    dropout = module.dropout
    if not is_probability(dropout):
        _wrong(ValueError, owner, "dropout", "a number from 0 to 1", describe(dropout))


def _heads(module: Any) -> int:
    options = getattr(module, "_cell_options", None)
    return 1 if options is None else options.heads


def _check_layer_shapes(owner: str, module: Any, parameters: dict[str, Tensor]) -> None:
    rows = module._weight_rows()
    size = module.proj_size or module.hidden_size
    directions = 2 if module.bidirectional else 1
    for name, parameter in parameters.items():
        kind, _, place = name.rpartition("_l")
        if kind.endswith("_left"):  # a factor of a matrix
            continue
        width = module.input_size if place.split("_")[0] == "0" else size * directions
        shapes = {
            "weight_ih": [rows, width],
            "weight_hh": [rows, size // _heads(module)],
            "weight_hr": [size, module.hidden_size],
        }
        _check_shape(owner, name, parameter, shapes.get(kind, [rows]))


def _search_linear_layer(module: Any, input: Any, hx: Any) -> None:
    owner = type(module).__name__
    x, name = input, "input"
    if isinstance(input, PackedSequence):
        x, name = input.data, "data"
        _check_tensor(owner, name, x)
        _check_dense(owner, name, x)
        if x.dim() != 2 or x.shape[1] != module.input_size:
            expected = f"2-D with {module.input_size} features"
            _wrong(RuntimeError, owner, name, expected, describe(x))
        _check_batch_sizes(owner, input.batch_sizes, x.shape[0])
        for indices in ("sorted_indices", "unsorted_indices"):
            own = getattr(input, indices)
            _check_permutation(owner, indices, own, int(input.batch_sizes[0]), x)
    _check_dense(owner, name, x)
    _check_dtype(owner, name, x)
    for parameter, weight in module.named_parameters():
        _check_same_device(owner, parameter, weight, x)
    if isinstance(hx, Tensor):
        _check_dense(owner, "hx", hx)


def _search_cell(module: Any, input: Any, hx: Any) -> None:
    owner = module._label
    is_lstm = isinstance(module, nn.LSTMCell) or owner == "LSTMCell"
    _check_tensor(owner, "input", input)
    _check_dense(owner, "input", input)
    states: list[tuple[str, Tensor]] = []
    if hx is not None:
        states = (
            _check_two_states(owner, hx, "lstm_cell") if is_lstm else _check_one_state(owner, hx)
        )
    for argument, state in states:
        _check_dense(owner, argument, state)
    parameters: dict[str, Tensor] = {}
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        parameter = getattr(module, name, None)
        if parameter is None and name.startswith("bias"):
            continue  # counts as zeros
        if not isinstance(parameter, Tensor):
            _wrong(RuntimeError, owner, name, "a tensor", describe(parameter))
        _check_dense(owner, name, parameter)
        parameters[name] = parameter
    if input.dim() not in (1, 2) or any(state.dim() != input.dim() for _, state in states):
        raise _AlreadyClear
    gates = {"RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}[owner]
    w_ih, w_hh = parameters["weight_ih"], parameters["weight_hh"]
    biases = [b for name, b in parameters.items() if name.startswith("bias")]
    is_consistent = (
        w_ih.dim() == w_hh.dim() == 2
        and w_ih.shape[0] == w_hh.shape[0] == gates * w_hh.shape[1]
        and all(list(b.shape) == [w_hh.shape[0]] for b in biases)
    )
    if not is_consistent:
        for name in ("input_size", "hidden_size"):
            if not isinstance(getattr(module, name), int):
                _wrong(TypeError, owner, name, "an int", describe(getattr(module, name)))
        rows = gates * module.hidden_size
        shapes = {
            "weight_ih": [rows, module.input_size],
            "weight_hh": [rows, module.hidden_size],
        }
        for name, parameter in parameters.items():
            _check_shape(owner, name, parameter, shapes.get(name, [rows]))
    if hx is None and not isinstance(module.hidden_size, int):
        _wrong(TypeError, owner, "hidden_size", "an int", describe(module.hidden_size))
    if len({t.dtype for t in (input, *(s for _, s in states), *parameters.values())}) == 1:
        _check_dtype(owner, "input", input)


def _search_function(spec: CellSpec, values: dict[str, Any]) -> None:
    owner = spec.name
    x, hx, params = values["input"], values["hx"], values["params"]
    batch_sizes = values["batch_sizes"]
    first = "input" if batch_sizes is None else "data"
    _check_tensor(owner, first, x)
    _check_dense(owner, first, x)
    if batch_sizes is not None:
        _check_batch_sizes(owner, batch_sizes, x.shape[0] if x.dim() > 0 else 0)
    states = (
        _check_two_states(owner, hx, "lstm") if spec.has_cell_state else _check_one_state(owner, hx)
    )
    for argument, state in states:
        _check_dense(owner, argument, state)
    if not isinstance(params, (list, tuple)):
        _wrong(TypeError, owner, "params", "a list or tuple of tensors", describe(params))
    for index, parameter in enumerate(params):
        _check_tensor(owner, f"params[{index}]", parameter)
        _check_dense(owner, f"params[{index}]", parameter)
    _search_options(owner, values)
    if len({t.dtype for t in (x, *(s for _, s in states), *params)}) == 1:
        _check_dtype(owner, first, x)


def check_options(spec: CellSpec, values: dict[str, Any]) -> None:
    """Raises unless the options of a function are of the right types and in range."""
    if (
        type(values["has_biases"])
        is type(values["train"])
        is type(values["bidirectional"])
        is type(values["batch_first"])
        is bool
        and type(values["num_layers"]) is int
        and values["num_layers"] > 0
        and type(values["dropout"]) is float
        and 0 <= values["dropout"] <= 1
    ):
        return
    try:
        _search_options(spec.name, values)
    except _Explained as found:
        error = found.error
    else:
        return
    raise error


def check_weight_dtype(weight_dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns ``weight_dtype`` if it is None or a dtype in which the CPU can hold w_hh.

    Raises:
        ValueError: it is something else.
    """
    if any(weight_dtype is known for known in WEIGHT_FORMATS):
        return weight_dtype
    known = " or ".join(map(str, WEIGHT_FORMATS))
    raise ValueError(f"weight_dtype must be {known}, got {describe(weight_dtype)}")


def check_recompute(recompute: Any) -> int:
    """Returns ``recompute`` as in `fastrnn.layer_call.Options`.

    Raises:
        TypeError: it is neither a string nor an integer.
        ValueError: it is another string, or less than 1.
    """
    expected = "recompute must be 'none', 'full' or a number of steps from 1 on, got "
    if isinstance(recompute, str):
        if recompute not in ("none", "full"):
            raise ValueError(expected + repr(recompute))
        return FULL if recompute == "full" else 0
    try:
        steps = operator.index(recompute)
    except TypeError:
        raise TypeError(expected + describe(recompute)) from None
    if is_bool(recompute):
        raise TypeError(expected + describe(recompute))
    if steps < 1:
        raise ValueError(expected + str(steps))
    return steps


def is_probability(value: Any) -> bool:
    """Whether a value is a number from 0 to 1."""
    is_number = isinstance(value, numbers.Real)
    return is_number and bool(0 <= value <= 1)


def is_bool(value: Any) -> bool:
    """Whether torch's operators accept this as a bool."""
    cls = type(value)
    return isinstance(value, bool) or (cls.__module__ == "numpy" and cls.__name__[:4] == "bool")


def _search_options(owner: str, values: dict[str, Any]) -> None:
    for name in ("has_biases", "train", "bidirectional", "batch_first"):
        if not is_bool(values[name]):
            _wrong(TypeError, owner, name, "a bool", describe(values[name]))
    num_layers, dropout = values["num_layers"], values["dropout"]
    try:
        layers = operator.index(num_layers)
    except TypeError:
        layers = 0
    if layers <= 0:
        _wrong(ValueError, owner, "num_layers", "a positive int", describe(num_layers))
    if not isinstance(dropout, numbers.Real):
        _wrong(TypeError, owner, "dropout", "a number from 0 to 1", describe(dropout))
    if values["train"] and layers > 1 and not is_probability(dropout):
        _wrong(ValueError, owner, "dropout", "a number from 0 to 1", describe(dropout))


def _search_constructor(
    owner: str, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Checks the arguments of a constructor. Some messages are those of torch.nn."""
    values = dict(zip(names, args, strict=False)) | kwargs
    for name in ("bias", "batch_first", "bidirectional"):
        value = values.get(name, False)
        if not is_bool(value):
            raise _Explained(
                TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
            )
    for name in ("input_size", "hidden_size", "num_layers", "proj_size"):
        value = values.get(name, 1)
        try:
            operator.index(value)
        except TypeError:
            raise _Explained(
                TypeError(f"{name} should be of type int, got: {type(value).__name__}")
            ) from None
    for name in ("input_size", "hidden_size"):
        size = values.get(name, 1)
        if owner.endswith("Cell") and size < 0:  # for layers torch raises
            _wrong(ValueError, owner, name, "0 or more", describe(size))
        if size > LARGEST_SIZE:
            _wrong(ValueError, owner, name, f"at most {LARGEST_SIZE}", describe(size))
    dropout = values.get("dropout", 0.0)
    if not is_probability(dropout):
        raise _Explained(
            ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an "
                "element being zeroed"
            )
        )
    dtype, device = values.get("dtype"), values.get("device")
    is_dtype = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    if dtype is not None and dtype not in (float, complex) and not is_dtype:
        expected = "a floating-point or complex torch.dtype"
        _wrong(TypeError, owner, "dtype", expected, describe(dtype))
    if device is not None and not isinstance(device, (torch.device, str, int)):
        _wrong(TypeError, owner, "device", "a torch.device, str, int or None", describe(device))
