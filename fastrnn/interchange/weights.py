"""Arrays as tensors, gates in fastrnn's order, and layers from weights.

A gate order has, for each gate of the other format, its index in fastrnn: i, f, g, o for an LSTM
and r, z, n for a GRU. `fastrnn.spec.TorchFacts.onnx_gates` is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.checks import describe
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.rnn import LAYERS
from fastrnn.spec import CELLS, DirectionWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_tensor(owner: str, name: str, value: Any) -> Tensor:
    """Returns an array, or an object that converts itself to one, as a tensor of its own.

    Raises:
        TypeError: ``value`` is no dense array of floating-point numbers.
    """
    tensor = value
    if not isinstance(value, Tensor) and hasattr(value, "__array__"):
        array = value.__array__()
        try:
            array = array.astype(array.dtype.newbyteorder("="))  # a copy in this machine's order
            if array.dtype.name == "bfloat16":  # numpy does not have this type, ml_dtypes adds it
                tensor = torch.from_numpy(array.view("int16")).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(array)
        except (TypeError, ValueError):
            _raise_wrong_dtype(owner, name, array.dtype)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{owner}: {name} must be an array or a tensor, got {describe(value)}.")
    if tensor.dtype not in DTYPES:
        _raise_wrong_dtype(owner, name, tensor.dtype)
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"{owner}: {name} must be a dense tensor, got another layout.")
    return tensor.detach()


def _raise_wrong_dtype(owner: str, name: str, dtype: Any) -> None:
    raise TypeError(
        f"{owner}: {name} must be float16, bfloat16, float32 or float64, "
        f"got {str(dtype).removeprefix('torch.')}."
    )


def check_shape(owner: str, name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raises unless a tensor has a shape; ``meaning`` is the shape in letters.

    Raises:
        ValueError: the shape is different.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{owner}: {name} must be of shape {meaning} = {list(shape)}, got {list(tensor.shape)}."
        )


def check_recurrent(owner: str, name: str, tensor: Tensor, gates: int) -> int:
    """Returns H of a recurrent matrix [H,G*H].

    Raises:
        ValueError: the matrix has another shape.
    """
    columns = "H" if gates == 1 else f"{gates}*H"
    is_right = tensor.dim() == 2 and tensor.shape[0] > 0
    if not is_right or tensor.shape[1] != gates * tensor.shape[0]:
        raise ValueError(
            f"{owner}: {name} must be of shape [H, {columns}], got {list(tensor.shape)}."
        )
    return tensor.shape[0]


def kernel_shapes(gates: int) -> tuple[str, str]:
    """Returns the shapes of a kernel [I,G*H] and of a bias [G*H] in letters."""
    columns = "H" if gates == 1 else f"{gates}*H"
    return f"[I, {columns}]", f"[{columns}]"


def from_order(weight: Tensor, order: Sequence[int]) -> Tensor:
    """Returns a weight [G*H,...] with its gates in fastrnn's order."""
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[order.index(gate)] for gate in range(len(order))])


def to_order(weight: Tensor, order: Sequence[int]) -> Tensor:
    """Returns a weight [G*H,...] of fastrnn with its gates in another order."""
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[gate] for gate in order])


def build(
    owner: str,
    cell: str,
    layers: Sequence[Sequence[DirectionWeights]],
    *,
    batch_first: bool,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **cell_options: Any,
) -> RecurrentBase:
    """Returns a fastrnn module with copies of the weights of each layer and direction.

    Args:
        owner: the function that the caller has called, for messages.
        cell: name of the cell.
        layers: weights of consistent sizes per direction, with both biases or none.
        batch_first: of the module.
        device, dtype: of the parameters; those of the weights if None.
        cell_options: ``zoneout``, arguments that select a variant of the cell. Weights with gains
            have layer normalisation.

    Raises:
        ValueError: layers or directions do not fit each other.
    """
    first = layers[0][0]
    directions, hidden = len(layers[0]), first.w_ih.shape[0] // CELLS[cell].gates
    has_biases = first.b_ih is not None
    state: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        width = first.w_ih.shape[1] if index == 0 else directions * hidden
        if len(layer) != directions:
            raise ValueError(
                f"{owner}: every layer must have as many directions as the first, {directions}, "
                f"got {len(layer)} in layer {index}."
            )
        for direction, own in enumerate(layer):
            place = f"layer {index}" + (", backward" if direction else "")
            rows, columns = own.w_ih.shape
            sizes, expected = (columns, rows // CELLS[cell].gates), (width, hidden)
            if sizes != expected:
                raise ValueError(
                    f"{owner}: {place} must have I and H = {list(expected)}, got {list(sizes)}."
                )
            if (own.b_ih is not None) != has_biases:
                raise ValueError(f"{owner}: all layers or none must have biases, see {place}.")
            suffix = f"l{index}" + ("_reverse" if direction else "")
            names = {"weight_ih": own.w_ih, "weight_hh": own.w_hh}
            names |= {"bias_ih": own.b_ih, "bias_hh": own.b_hh} if has_biases else {}
            gains = {"gain_ih": own.gain_ih, "gain_hh": own.gain_hh}
            gains |= {"gain_c": own.gain_c, "bias_c": own.bias_c}
            names |= {name: gain for name, gain in gains.items() if gain is not None}
            for name, weight in names.items():
                assert weight is not None
                if weight.dtype != first.w_ih.dtype or weight.device != first.w_ih.device:
                    raise ValueError(
                        f"{owner}: all weights must be {first.w_ih.dtype} on {first.w_ih.device}, "
                        f"got {weight.dtype} on {weight.device} in {place}."
                    )
                state[f"{name}_{suffix}"] = weight
    cls, options = LAYERS[cell]
    make: Any = cls  # its overloads are for callers with fixed arguments
    module: RecurrentBase = make(
        first.w_ih.shape[1],
        hidden,
        len(layers),
        bias=has_biases,
        batch_first=batch_first,
        bidirectional=directions == 2,
        device="meta",  # draws no random numbers
        dtype=first.w_ih.dtype if dtype is None else dtype,
        layer_norm=first.gain_ih is not None,
        **options,
        **cell_options,
    )
    module.to_empty(device=first.w_ih.device if device is None else device)
    module.load_state_dict(state)
    return module
