"""Weights that are packed once and serve many calls of inference on the CPU.

The kernels here take addresses: this module and its callers check what is at them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrnn import _C
from fastrnn.layer_call import Results
from fastrnn.ops.operators import raise_interruption
from fastrnn.spec import CellSpec, DirectionWeights, Weights

#: dtypes of packed weights
PACKED_DTYPES = (torch.float32, torch.float64)


class StackShape(NamedTuple):
    """Sizes of stacked layers, L, D, I, H and P, and whether each but the first adds its input."""

    num_layers: int
    directions: int
    input_size: int
    hidden_size: int
    proj_size: int
    residual: bool = False

    @property
    def output_size(self) -> int:
        """R: P with a projection and H without."""
        return self.proj_size or self.hidden_size

    def expected_weights(self, spec: CellSpec, index: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the weights of the index-th of all layers and directions."""
        rows = spec.gates * self.hidden_size
        below = self.directions * self.output_size
        width = self.input_size if index < self.directions else below
        return {
            "w_ih": (rows, width),
            "w_hh": (rows, self.output_size),
            "b_ih": (rows,),
            "b_hh": (rows,),
            "w_hr": (self.proj_size, self.hidden_size),
        }


def has_memory(t: Tensor) -> bool:
    """Whether the storage of a contiguous tensor holds all of its values.

    It may have been resized after the tensor was made.
    """
    size = t.element_size()
    held: int = t.untyped_storage().nbytes()
    return t.storage_offset() * size + t.numel() * size <= held


def find_dtype(owner: str, weights: Weights) -> torch.dtype:
    """Returns the dtype of the weights.

    Raises:
        RuntimeError: the weights cannot be packed.
    """
    dtype = weights.flat[0].dtype
    if dtype not in PACKED_DTYPES:
        raise RuntimeError(f"{owner}: the weights must be float32 or float64, got {dtype}.")
    for weight in weights.flat:
        if type(weight) not in (Tensor, nn.Parameter):
            kind = type(weight).__name__
            raise RuntimeError(f"{owner}: the weights must be plain tensors, got a {kind}.")
        if weight.device.type != "cpu":
            raise RuntimeError(f"{owner}: the weights must be on the CPU, got {weight.device}.")
        if weight.dtype != dtype:
            raise RuntimeError(f"{owner}: all weights must be {dtype}, got {weight.dtype}.")
    return dtype


def create(kind: str, dtype: torch.dtype, *args: Any) -> Any:
    """Returns a new ``_C._packed.<kind>_<dtype>``."""
    return getattr(_C._packed, f"{kind}_{str(dtype).removeprefix('torch.')}")(*args)


def pack(packed: Any, owner: str, spec: CellSpec, shape: StackShape, weights: Weights) -> None:
    """Copies weights, which `find_dtype` has checked, into a `create`d object.

    Raises:
        RuntimeError: the weights do not have the sizes of ``shape``.
    """
    kept: list[DirectionWeights] = []
    for index, direction in enumerate(weights.directions()):
        expected = shape.expected_weights(spec, index)
        own: dict[str, Any] = {}
        for name, weight in direction._asdict().items():
            if weight is None:
                own[name] = None
                continue
            if tuple(weight.shape) != expected[name]:
                raise RuntimeError(
                    f"{owner}: {name} must be of size {list(expected[name])}, "
                    f"got {list(weight.shape)}."
                )
            own[name] = weight.detach().resolve_neg().contiguous()
            if not has_memory(own[name]):
                raise RuntimeError(f"{owner}: the storage of {name} must hold all its values.")
        kept.append(DirectionWeights(**own))
    packed.pack([[0 if w is None else w.data_ptr() for w in direction] for direction in kept])


@torch.jit.unused  # else torch.jit compiles the class, because modules have an attribute of it
class PreparedWeights:
    """A copy of the weights of stacked layers, packed for the kernels.

    Attributes:
        dtype: dtype of the weights.
        copied: the weights that were copied. Whether a module has others now shows by identity; a
            change in place does not show.
    """

    def __init__(self, owner: str, spec: CellSpec, shape: StackShape, weights: Weights) -> None:
        self.dtype = find_dtype(owner, weights)
        self.copied = list(weights.flat)
        self._output_size = shape.directions * shape.output_size
        self._packed = create("PackedStack", self.dtype, spec.name, *shape)
        pack(self._packed, owner, spec, shape, weights)

    def run(self, x: Tensor, h0: Tensor, c0: Tensor | None) -> Results:
        """Runs the layers over x [T,B,I] from h0 [L*D,B,R] and c0 [L*D,B,H].

        The caller has checked the sizes, the dtype and the device.
        """
        steps, batch, _ = x.shape
        x, h0 = _readable("input", x), _readable("hx", h0)
        y, h_n = x.new_empty(steps, batch, self._output_size), h0.new_empty(h0.shape)
        states = [h0.data_ptr(), 0, y.data_ptr(), h_n.data_ptr(), 0]
        c_n = None
        if c0 is not None:
            c0 = _readable("hx", c0)
            c_n = c0.new_empty(c0.shape)
            states[1], states[4] = c0.data_ptr(), c_n.data_ptr()
        try:
            self._packed.forward(steps, batch, x.data_ptr(), *states)
        except RuntimeError as error:
            raise_interruption(error)
            raise
        return y, h_n, c_n


def _readable(name: str, t: Tensor) -> Tensor:
    """Returns the tensor, or a copy, in contiguous memory."""
    t = t.resolve_neg().contiguous()
    if not has_memory(t):
        raise RuntimeError(f"fastrnn: the storage of {name} must hold all its values.")
    return t
