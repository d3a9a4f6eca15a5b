"""The kernels as torch operators: shapes for tracing, and their place in autograd.

`layer` runs one layer. The kernels walk through time; everything that is parallel over time (the
gradients of the weights and of the input) are a few large matrix products, on the CPU in the same
operator as the walk back, elsewhere torch's own, here:

    d_x    = d_pre[x side] @ w_ih            d_pre[h side] / d_pre[x side]: the columns of the
    d_w_ih = d_pre[x side]^T @ x             gradient of the pre-activations that belong to the
    d_w_hh = d_pre[h side]^T @ h_prev        hidden / the input side of the cell (`CellSpec`)
    d_b    = column sums of d_pre
    d_w_hr = d_h^T @ (o * tanh(c'))          only with an LSTM's projection
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import _C, _library, autocast, reference
from fastrnn.spec import CELLS, CellSpec, Run, split_weights
from fastrnn.tracing import is_tracing

_library.load()


def raise_interruption(error: BaseException) -> None:
    """Raises what a signal's handler raised (Ctrl-C: KeyboardInterrupt), if that ended the call."""
    _C.raise_interruption(str(error))


def _interruptible(operator: Any) -> Any:
    """The operator, with the exception of a signal's handler in place of its own."""

    @functools.wraps(operator)
    def call(*args: Any) -> Any:
        try:
            return operator(*args)
        except RuntimeError as error:
            raise_interruption(error)
            raise

    return call


forward = torch.ops.fastrnn.layer_forward.default
_forward = _interruptible(forward)
_written = torch.ops.fastrnn.layer.default
_backward = torch.ops.fastrnn.layer_backward.default
_stack = _interruptible(torch.ops.fastrnn.stack_forward.default)
_cpu_gradients = {
    1: _interruptible(torch.ops.fastrnn.layer_gradients.default),
    2: _interruptible(torch.ops.fastrnn.bidirectional_gradients.default),
}

#: what the kernels compute with; "meta" stands for tensors that have shapes only
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
DEVICES = frozenset(
    {"meta"}
    | {
        key.lower()
        for key in ("CPU", "CUDA")
        if torch._C._dispatch_has_kernel_for_dispatch_key("fastrnn::layer_forward", key)
    }
)

HALF = frozenset({torch.float16, torch.bfloat16})

Gradients = tuple["Tensor | None", ...]


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def is_plain() -> bool:
    """Whether a call is values in, values out: without gradients, transforms, autocast, graphs."""
    return not (
        torch.is_grad_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or is_tracing()
    )


def _expect(condition: Any, message: str) -> None:
    """Checks something of a fake tensor; sizes without a value are checked when the graph runs."""
    torch._check(condition, lambda: f"fastrnn: {message}.")


def _expect_sizes(name: str, t: Tensor, sizes: Sequence[int]) -> None:
    def message() -> str:
        return f"fastrnn: {name} must have the shape {list(sizes)}, got {list(t.shape)}."

    torch._check(t.dim() == len(sizes), message)
    for size, expected in zip(t.shape, sizes, strict=True):
        torch._check(size == expected, message)


class _FakeLayer:
    """The sizes of a layer that is traced, checked as csrc/torch/arguments.h checks them."""

    def __init__(
        self,
        name: str,
        sequence: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        cell: str,
    ) -> None:
        _expect(cell in CELLS, f"cell must be one of {', '.join(CELLS)}, got '{cell}'")
        self.spec = spec = CELLS[cell]
        self.sequence = sequence
        self.accumulate = _accumulate_dtype(sequence.dtype)
        _expect(
            sequence.dtype in DTYPES,
            f"{name} must be float16, bfloat16, float32 or float64, got {sequence.dtype}",
        )
        packed = batch_sizes is not None
        single = not packed and h0.dim() == 2
        _expect(single or h0.dim() == 3, f"h0 must be [D, B, R], got {h0.dim()} dimensions")
        dims = 2 if packed or single else 3
        _expect(sequence.dim() == dims, f"{name} must have {dims} dimensions, got {sequence.dim()}")
        self.directions = 1 if single else h0.shape[0]
        _expect(self.directions in (1, 2), f"h0 must have 1 or 2 directions, got {self.directions}")
        *_, batch, size = h0.shape
        count = len(weights) // self.directions
        _expect(
            2 <= count <= 5 and count * self.directions == len(weights),
            f"weights must hold 2 to 5 tensors a direction, got {len(weights)} for "
            f"{self.directions} direction(s)",
        )
        self.is_projected = count in (3, 5)
        _expect(
            spec.has_cell_state or not self.is_projected,
            f"weights must hold a projection for lstm only, got one for {cell}",
        )
        for w in weights:
            self.expect_like("weights", w)
        self.expect_like("h0", h0)
        _expect(weights[0].dim() == 2, f"w_ih must be 2-D, got {weights[0].dim()} dimension(s)")
        self.input_size, self.hidden = weights[0].shape[1], weights[0].shape[0] // spec.gates
        self.size = size
        if self.is_projected:
            _expect(size > 0, "h0 must have a size of 1 or more with a projection, got 0")
        else:
            _expect_sizes("h0", h0, (*h0.shape[:-1], self.hidden))
        _expect(
            (c0 is not None) == spec.has_cell_state,
            f"c0 must {'' if spec.has_cell_state else 'not '}be given for {cell}",
        )
        self.states = tuple(h0.shape[:-1])
        if c0 is not None:
            self.expect_like("c0", c0)
            _expect_sizes("c0", c0, (*self.states, self.hidden))
        rows = spec.gates * self.hidden
        for own in split_weights(weights, self.directions):
            _expect_sizes("w_ih", own.w_ih, (rows, self.input_size))
            _expect_sizes("w_hh", own.w_hh, (rows, size))
            if own.b_ih is not None and own.b_hh is not None:
                _expect_sizes("b_ih", own.b_ih, (rows,))
                _expect_sizes("b_hh", own.b_hh, (rows,))
            if own.w_hr is not None:
                _expect_sizes("w_hr", own.w_hr, (size, self.hidden))
        if batch_sizes is None:
            _expect(
                sequence.shape[-2] == batch,
                f"{name} must have the batch {batch} of h0, got {sequence.shape[-2]}",
            )
        else:
            _expect(
                batch_sizes.dim() == 1
                and batch_sizes.device.type == "cpu"
                and batch_sizes.dtype == torch.int64,
                "batch_sizes must be a 1-D int64 tensor on the CPU, got another",
            )
        self.rows = tuple(sequence.shape[:-1])
        self.outputs = (*self.rows, self.directions * size)

    def expect_like(self, name: str, t: Tensor) -> None:
        _expect(
            t.device == self.sequence.device,
            f"{name} must be on the device of the input, got another",
        )
        _expect(
            t.dtype == self.sequence.dtype,
            f"{name} must have the dtype {self.sequence.dtype} of the input, got {t.dtype}",
        )

    def expect_input(self, x: Tensor) -> None:
        _expect(
            x.shape[-1] == self.input_size,
            f"x must have the input size {self.input_size} of w_ih, got {x.shape[-1]}",
        )

    def saved_sizes(self, rows: Sequence[int]) -> tuple[int, int, int]:
        return self.directions, math.prod(rows), self.spec.saved * self.hidden

    def expect_backward(
        self,
        d_y: Tensor | None,
        d_h_n: Tensor | None,
        d_c_n: Tensor | None,
        c0: Tensor | None,
        y: Tensor,
        saved: Tensor,
    ) -> None:
        self.expect_like("y", y)
        _expect_sizes("y", y, self.outputs)
        if self.spec.saved > 0:
            _expect_sizes("saved", saved, self.saved_sizes(self.rows))
            _expect(
                saved.dtype == self.accumulate and saved.device == self.sequence.device,
                "saved must be what layer_forward returned, got another tensor",
            )
        _expect(
            d_c_n is None or c0 is not None,
            f"d_c_n must not be given for {self.spec.name}, got a tensor",
        )
        for name, t, sizes in (
            ("d_y", d_y, self.outputs),
            ("d_h_n", d_h_n, (*self.states, self.size)),
            ("d_c_n", d_c_n, (*self.states, self.hidden)),
        ):
            if t is not None:
                self.expect_like(name, t)
                _expect_sizes(name, t, sizes)


def _forward_fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
    save: bool,
    half_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = _FakeLayer("x", x, h0, c0, weights, batch_sizes, cell)
    layer.expect_input(x)
    _expect(
        x.device.type != "cuda" or not half_weights,
        "half_weights is for the CPU, got tensors on a CUDA device",
    )
    y = x.new_empty(layer.outputs)
    h_n = x.new_empty(h0.shape)
    c_n = x.new_empty(0 if c0 is None else c0.shape)
    is_saved = save and layer.spec.saved > 0
    saved = x.new_empty(layer.saved_sizes(layer.rows) if is_saved else 0, dtype=layer.accumulate)
    return y, h_n, c_n, saved


def _backward_results(
    layer: _FakeLayer, h0: Tensor, c0: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(layer.rows)
    dtype = y.dtype if y.device.type == "cuda" else layer.accumulate
    d_pre = y.new_empty(layer.directions, rows, layer.spec.pre * layer.hidden, dtype=dtype)
    d_h_all = y.new_empty(
        (layer.directions, rows, layer.size) if layer.is_projected else (0,), dtype=dtype
    )
    d_h0 = y.new_empty(h0.shape)
    d_c0 = y.new_empty(0 if c0 is None else c0.shape)
    return d_pre, d_h_all, d_h0, d_c0


def _backward_fake(
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = _FakeLayer("y", y, h0, c0, weights, batch_sizes, cell)
    layer.expect_backward(d_y, d_h_n, d_c_n, c0, y, saved)
    return _backward_results(layer, h0, c0, y)


def _gradients_fake(
    directions: int,
    d_y: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    cell: str,
    needs: int,
) -> tuple[Tensor, ...]:
    layer = _FakeLayer("x", x, h0, c0, weights, batch_sizes, cell)
    _expect(
        layer.directions == directions,
        f"h0 must hold the states of {directions} direction(s), got {layer.directions}",
    )
    layer.expect_input(x)
    layer.expect_backward(d_y, d_h_n, d_c_n, c0, y, saved)
    _, d_h_all, d_h0, d_c0 = _backward_results(layer, h0, c0, y)
    count = len(weights) // directions
    d_weights = []
    for direction in range(directions):
        for i in range(4):
            index = direction * count + i
            is_needed = i < (4 if count >= 4 else 2) and needs >> (1 + index) & 1
            d_weights.append(x.new_empty(weights[index].shape if is_needed else 0))
    return x.new_empty(x.shape if needs & 1 else 0), d_h0, d_c0, d_h_all, *d_weights


def _stack_fake(
    x: Tensor,
    h0: list[Tensor],
    c0: list[Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = len(h0)
    _expect(layers > 0, "h0 must hold a tensor for each layer, got none")
    _expect(
        len(c0) in (0, layers),
        f"c0 must hold as many tensors as h0, {layers}, or none, got {len(c0)}",
    )
    _expect(
        len(weights) % layers == 0,
        f"weights must hold as many tensors for each of the {layers} layers, got {len(weights)}",
    )
    _expect(x.dtype not in HALF, f"x must be float32 or float64, got {x.dtype}")
    each = len(weights) // layers
    y, h_n, c_n = x, [], []
    for i in range(layers):
        own = weights[i * each : (i + 1) * each]
        _expect(
            h0[i].dim() == 2 or h0[i].shape[0] == 1, "h0 must hold states of one direction, got 2"
        )
        c = c0[i] if c0 else None
        y, h, c_next, _ = _forward_fake(y, h0[i], c, own, batch_sizes, cell, False)
        h_n.append(h)
        if c0:
            c_n.append(c_next)
    return y, h_n, c_n


def _layer_fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, h_n, c_n, _ = _forward_fake(x, h0, c0, weights, batch_sizes, cell, False)
    return y, h_n, c_n


torch.library.register_fake("fastrnn::layer_forward", _forward_fake)
torch.library.register_fake("fastrnn::layer", _layer_fake)
torch.library.register_fake("fastrnn::stack_forward", _stack_fake)
torch.library.register_fake("fastrnn::layer_backward", _backward_fake)
torch.library.register_fake("fastrnn::layer_gradients", functools.partial(_gradients_fake, 1))
torch.library.register_fake(
    "fastrnn::bidirectional_gradients", functools.partial(_gradients_fake, 2)
)


class Layer(torch.autograd.Function):
    """One layer with its gradient. ``inputs`` are x, h0, c0, batch_sizes, spec, \\*weights."""

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        spec: CellSpec,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _forward(x, h0, c0, weights, batch_sizes, spec.name, True)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, h0, c0, batch_sizes, spec, *weights = inputs
        y, _, c_n, saved = output
        _keep(ctx, x, h0, c0, batch_sizes, spec, weights, y, saved)
        ctx.mark_non_differentiable(*([c_n, saved] if c0 is None else [saved]))

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, _: None
    ) -> Gradients:
        # compiled code passes zeros for outputs without a gradient
        return _backward_of(ctx, d_y, d_h_n, d_c_n if ctx.has_c0 else None)


class EagerLayer(torch.autograd.Function):
    """`Layer` outside of transforms and compilers: fewer outputs, and y may be changed in place.

    The backward pass reads y. The caller gets a lazy clone of it, which shares its memory until one
    of the two is written to: an in-place ReLU, dropout or mask copies first. One step of one
    direction returns its state alone, which backward does not read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        spec: CellSpec,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        y, h_n, c_n, saved = _forward(x, h0, c0, weights, batch_sizes, spec.name, True)
        _keep(ctx, x, h0, c0, batch_sizes, spec, weights, y, saved)
        y = None if h0.dim() == 2 else torch._lazy_clone(y)
        return (y, h_n) if c0 is None else (y, h_n, c_n)

    @staticmethod
    def backward(
        ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None
    ) -> Gradients:
        return _backward_of(ctx, d_y, d_h_n, d_c_n)


def _keep(
    ctx: Any,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    spec: CellSpec,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
) -> None:
    """Keeps what `_backward_of` reads; tensors only, as tools that draw graphs expect."""
    if batch_sizes is None:
        if c0 is None:
            ctx.save_for_backward(x, h0, y, saved, *weights)
        else:
            ctx.save_for_backward(x, h0, y, saved, c0, *weights)
    elif c0 is None:
        ctx.save_for_backward(x, h0, y, saved, batch_sizes, *weights)
    else:
        ctx.save_for_backward(x, h0, y, saved, c0, batch_sizes, *weights)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.has_c0, ctx.is_packed = spec, c0 is not None, batch_sizes is not None


def _kept(ctx: Any) -> Sequence[Tensor]:
    """The tensors of `_keep`, unless one of them has been changed in place since."""
    try:
        saved: Sequence[Tensor] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{ctx.spec.mode}: the input, the states, the weights and the output must not be "
            "modified by an inplace operation before backward, got one that was. Use the operation "
            "that returns a new tensor, or change a copy (output = output.clone())."
        ) from error
    return saved


def _backward_of(
    ctx: Any, d_y: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None
) -> Gradients:
    """The gradients of all inputs of `Layer` and `EagerLayer`."""
    if d_y is None and d_h_n is None and d_c_n is None:
        return (None,) * len(ctx.needs_input_grad)
    x, h0, y, saved, *rest = _kept(ctx)
    c0 = rest.pop(0) if ctx.has_c0 else None
    batch_sizes = rest.pop(0) if ctx.is_packed else None
    need_x, need_h0, need_c0, _, _, *need_weights = ctx.needs_input_grad
    needs = (need_x, need_h0, need_c0, *need_weights)
    given = (needs, (d_y, d_h_n, d_c_n), x, h0, c0, rest, batch_sizes, y, saved, ctx.spec)
    if autocast.acts_on(x):  # it has chosen the types in forward
        with torch.autocast(x.device.type, enabled=False):
            gradients = _gradients(*given)
    else:
        gradients = _gradients(*given)
    d_x, d_h0, d_c0, *d_weights = gradients
    return d_x, d_h0, d_c0, None, None, *d_weights


# Function.apply first binds the arguments to the signature of `forward`, which takes twice as long
# as all the rest. Nothing here has defaults or keywords to bind.
_apply: Any = super(torch.autograd.Function, Layer).apply
_apply_eagerly: Any = super(torch.autograd.Function, EagerLayer).apply


def records(x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether autograd is to record what is made of these."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or h0.requires_grad
        or (c0 is not None and c0.requires_grad)
        or True in [w.requires_grad for w in weights]
    )


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
    half_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one layer through the kernels, differentiable when a gradient is asked for.

    Arguments and results are those of `fastrnn.reference.layer`, or without batch_sizes and with
    h0 and c0 [B,*] those of one step: x, y and the states have neither T nor D then. The caller
    has checked them.
    ``half_weights`` lets the CPU's kernels round w_hh to float16 where no gradient is asked for.
    """
    is_recorded = records(x, h0, c0, weights)
    if torch.compiler.is_compiling() and (is_recorded or not half_weights):
        # a Function that Dynamo traces loses what its backward pass records for create_graph=True
        return written_layer(x, h0, c0, weights, batch_sizes, spec)
    if is_recorded:
        if torch._C._are_functorch_transforms_active():
            apply: Any = Layer.apply
            y, h_n, c_n, _ = apply(x, h0, c0, batch_sizes, spec, *weights)
        elif x.is_cpu:
            return _apply_eagerly_to(x, h0, c0, weights, batch_sizes, spec)
        else:
            y, h_n, c_n, _ = _apply(x, h0, c0, batch_sizes, spec, *weights)
    elif half_weights and x.device.type == "cpu":
        run = forward if torch.compiler.is_compiling() else _forward
        y, h_n, c_n, _ = run(x, h0, c0, weights, batch_sizes, spec.name, False, True)
    else:
        y, h_n, c_n, _ = _forward(x, h0, c0, weights, batch_sizes, spec.name, False)
    return y, h_n, None if c0 is None else c_n


def _apply_eagerly_to(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`layer` by `EagerLayer`."""
    if c0 is None:
        y, h_n = _apply_eagerly(x, h0, None, batch_sizes, spec, *weights)
        c_n = None
    else:
        y, h_n, c_n = _apply_eagerly(x, h0, c0, batch_sizes, spec, *weights)
    return h_n if y is None else y, h_n, c_n


def written_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `layer`, one operator in the graph, which decides when it runs whether to save."""
    y, h_n, c_n = _written(x, h0, c0, weights, batch_sizes, spec.name)
    return y, h_n, None if c0 is None else c_n


def _written_autograd(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd does when the operator in a graph is run."""
    spec = CELLS.get(cell)  # the kernel refuses an unknown one
    if spec is not None and records(x, h0, c0, weights):
        apply: Any = Layer.apply
        y, h_n, c_n, _ = apply(x, h0, c0, batch_sizes, spec, *weights)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y, h_n, c_n = _written(x, h0, c0, weights, batch_sizes, cell)
    return y, h_n, c_n


def _written_autocast(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does when the operator in a graph is run: the types of `fastrnn.autocast`."""
    spec = CELLS.get(cell)  # the kernel refuses an unknown one
    is_cast = autocast.acts_on(x)  # not where x is on another device than the weights
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        if spec is None or not is_cast:
            return _written(x, h0, c0, weights, batch_sizes, cell)  # type: ignore[no-any-return]
        alike = autocast.cast_arguments(x, h0, c0, weights)
        y, h_n, c_n = _written(alike.x, alike.h0, alike.c0, alike.weights, batch_sizes, cell)
        y, h_n, c_cast = autocast.cast_results(spec, x, h0, c0, y, h_n, None if c0 is None else c_n)
        return y, h_n, c_n if c_cast is None else c_cast


def _refuse_layout(*args: Any, **kwargs: Any) -> Any:
    """Stands where a tensor is not a plain array in memory; dispatch looks at all arguments."""
    raise RuntimeError(
        "fastrnn: tensors must be dense, got a sparse, mkldnn, nested or quantized one. "
        "Convert with input.to_dense()."
    )


_AUTOCAST_KEYS = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
_implementations = torch.library.Library("fastrnn", "IMPL")
_implementations.impl("layer", _written_autograd, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _implementations.impl("layer", _written_autocast, _key)
for _operator in (
    "layer",
    "layer_forward",
    "layer_backward",
    "layer_gradients",
    "bidirectional_gradients",
    "stack_forward",
):
    for _key in ("Sparse", "SparseCsr", "NestedTensor", "Quantized"):
        for _device in ("CPU", "CUDA"):
            _implementations.impl(_operator, _refuse_layout, _key + _device)
    for _key in ("MkldnnCPU", "AutogradNestedTensor"):
        _implementations.impl(_operator, _refuse_layout, _key)


def can_stack(x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether `stack` takes these: values without gradients, on the CPU, of a type of its own."""
    return (
        x.device.type == "cpu"
        and x.dtype not in HALF
        and not torch.compiler.is_compiling()
        and not records(x, h0, c0, weights)
    )


def stack(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs layers of one direction upon one another, two at a time side by side where that pays.

    Args:
        x: [T,B,I], or [N,I] packed.
        h0: [L,B,R], one state a layer.
        c0: [L,B,H] or None.
        weights: those of layer 0, then of layer 1, ...
        batch_sizes: [T] of packed rows, or None.
        spec: the cell.

    Returns:
        y [T,B,R] or [N,R] of the last layer, h_n [L,B,R] and c_n [L,B,H] or None.
    """
    c0s = [] if c0 is None else list(c0.split(1))
    y, h_n, c_n = _stack(x, list(h0.split(1)), c0s, weights, batch_sizes, spec.name)
    return y, torch.cat(h_n), None if c0 is None else torch.cat(c_n)


#: `layer` with ``half_weights``
half_weights_layer = functools.partial(layer, half_weights=True)


def composite(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    spec: CellSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one layer as torch operations, for all that the kernels cannot be asked for.

    Arguments and results are those of `layer`. As in the kernels half types are rounded at the end
    only, and autocast, which has chosen the types of the arguments, changes nothing in between.
    """
    if autocast.acts_on(x):
        with torch.autocast(x.device.type, enabled=False):
            return composite(x, h0, c0, weights, batch_sizes, spec)
    if x.dtype in HALF:
        results = composite(
            x.float(),
            h0.float(),
            None if c0 is None else c0.float(),
            [w.float() for w in weights],
            batch_sizes,
            spec,
        )
        y, h_n, c_n = (None if t is None else t.to(x.dtype) for t in results)
        assert y is not None
        assert h_n is not None
        return y, h_n, c_n
    if h0.dim() == 2:
        h_n, c_n = reference.cell(x, h0, c0, weights, spec)
        return h_n, h_n, c_n
    return reference.layer(x, h0, c0, weights, batch_sizes, spec)


def _is_traced(t: Tensor) -> bool:
    """Whether a tensor stands for those of later calls, as those that compilers trace with do."""
    return torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter)


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func`` or ``is_grads_batched`` has put its wrappers around tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and any(
        t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors
    )


def _gradients(
    needs: Sequence[bool],
    d_outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    spec: CellSpec,
) -> Gradients:
    """As `_gradients_on_cpu`, by the way that can serve what is asked for."""
    transformed = _is_transformed(*d_outputs)
    if transformed or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        # vmap over the backward pass, create_graph=True, gradients with tangents
        inputs = (x, h0, c0, *weights)
        return _differentiable_gradients(needs, d_outputs, inputs, batch_sizes, spec, transformed)
    way = _gradients_on_cpu if x.is_cpu else _gradients_by_torch
    return way(needs, d_outputs, x, h0, c0, weights, batch_sizes, y, saved, spec)


def _gradients_on_cpu(
    needs: Sequence[bool],
    d_outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    spec: CellSpec,
) -> Gradients:
    """The gradients of x, h0, c0 and each weight, None where ``needs`` says so."""
    need_x, need_h0, need_c0, *need_weights = needs
    asked = int(need_x)
    for i, need in enumerate(need_weights):
        asked |= need << (1 + i)
    directions = h0.shape[0] if h0.dim() == 3 else 1
    d_x, d_h0, d_c0, d_h_all, *made = _cpu_gradients[directions](
        *d_outputs, x, h0, c0, weights, batch_sizes, y, saved, spec.name, asked
    )
    count = len(weights) // directions
    if count in (3, 5):  # a projection, whose gradient is not among them
        d_weights: list[Tensor | None] = []
        for direction in range(directions):
            d_weights += made[4 * direction : 4 * direction + count - 1]
            d_w_hr = None
            if need_weights[len(d_weights)]:
                d_w_hr = _projection_gradient(d_h_all[direction], saved[direction])
                d_w_hr = _cast(d_w_hr, weights[len(d_weights)])
            d_weights.append(d_w_hr)
    elif count == 4:
        d_weights = made
    else:
        d_weights = [made[4 * direction + i] for direction in range(directions) for i in range(2)]
    return (
        d_x if need_x else None,
        d_h0 if need_h0 else None,
        d_c0 if need_c0 else None,
        *[d_w if need else None for d_w, need in zip(d_weights, need_weights, strict=True)],
    )


def _gradients_by_torch(
    needs: Sequence[bool],
    d_outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    spec: CellSpec,
) -> Gradients:
    """As `_gradients_on_cpu`, with the products by torch."""
    need_x, need_h0, need_c0, *need_weights = needs
    d_pre, d_h_all, d_h0, d_c0 = _backward(
        *d_outputs, h0, c0, weights, batch_sizes, y, saved, spec.name
    )
    directions, rows, width = d_pre.shape
    hidden = width // spec.pre
    size = h0.shape[-1]
    if h0.dim() == 2:
        h0 = h0.unsqueeze(0)
    count = len(weights) // directions
    has_bias = count >= 4
    d_x = x_rows = y_rows = None
    d_weights: list[Tensor | None] = []
    for direction, w in enumerate(split_weights(weights, directions)):
        need = need_weights[direction * count : (direction + 1) * count]
        d_weight: list[Tensor | None] = [None] * count
        pre = d_pre[direction]
        side_x = _side(pre, spec.runs_x, hidden)
        if need_x:
            w_ih = _cast(w.w_ih, pre)
            for part, gates in side_x:
                w_part = w_ih if gates is None else w_ih[gates]
                d_x = torch.mm(part, w_part) if d_x is None else _add_product(d_x, part, w_part)
        if need[0]:
            if x_rows is None:
                x_rows = _cast(x.reshape(rows, x.shape[-1]), pre)
            d_weight[0] = _cast(_weight_gradient(side_x, x_rows), w.w_ih)
        if need[1]:
            if y_rows is None:
                y_rows = _cast(y if y.dim() == 2 else y.flatten(0, 1), pre)
            y_own = y_rows
            if directions > 1:
                y_own = y_rows[:, direction * size : (direction + 1) * size]
            d_w_hh = _recurrent_gradient(
                _side(pre, spec.runs_h, hidden),
                y_own,
                _cast(h0[direction], pre),
                batch_sizes,
                direction == 1,
            )
            d_weight[1] = _cast(d_w_hh, w.w_hh)
        if has_bias and (need[2] or need[3]):
            sums = pre.sum(0)  # one pass serves both sides
            if need[2]:
                d_weight[2] = _cast(_bias_gradient(sums, spec.runs_x, hidden), w.w_ih)
            if need[3]:
                d_b_hh = _cast(_bias_gradient(sums, spec.runs_h, hidden), w.w_hh)
                # two parameters must not end up with one memory as their gradient
                d_weight[3] = d_b_hh.clone() if need[2] and spec.runs_x == spec.runs_h else d_b_hh
        if w.w_hr is not None and need[-1]:
            d_weight[-1] = _cast(_projection_gradient(d_h_all[direction], saved[direction]), w.w_hr)
        d_weights += d_weight
    return (
        None if d_x is None else _cast(d_x, x).view(x.shape),
        d_h0 if need_h0 else None,
        d_c0 if need_c0 else None,
        *d_weights,
    )


def _cast(t: Tensor, like: Tensor) -> Tensor:
    return t if t.dtype == like.dtype else t.to(like.dtype)


# the columns of d_pre that belong to one side of the cell, in as few pieces as they come:
# [N,k*H] each, and the rows of the weight that it belongs to (None for all of them)
Side = list[tuple[Tensor, "slice | None"]]


def _side(pre: Tensor, runs: Sequence[Run], hidden: int) -> Side:
    if len(runs) == 1:
        run = runs[0]
        is_all = run.width * hidden == pre.shape[1]
        return [(pre if is_all else pre[:, run.columns(hidden)], None)]
    return [(pre[:, run.columns(hidden)], run.gate_rows(hidden)) for run in runs]


def _bias_gradient(sums: Tensor, runs: Sequence[Run], hidden: int) -> Tensor:
    """One side's part [G*H] of the column sums [Q*H]."""
    if len(runs) == 1:
        return sums if runs[0].width * hidden == sums.shape[0] else sums[runs[0].columns(hidden)]
    return torch.cat([sums[run.columns(hidden)] for run in runs])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, by an operator whose products ``torch.utils.flop_counter`` counts."""
    return torch.addmm(total, a, b, out=total)


def _weight_gradient(side: Side, inputs: Tensor) -> Tensor:
    """d_w [G*H,K] = side^T [G*H,N] @ inputs [N,K]."""
    if len(side) == 1:
        return torch.mm(side[0][0].t(), inputs)
    d_w = inputs.new_empty(sum(part.shape[1] for part, _ in side), inputs.shape[1])
    for part, gates in side:
        torch.mm(part.t(), inputs, out=d_w[gates])
    return d_w


def _recurrent_gradient(
    side: Side, y: Tensor, h0: Tensor, batch_sizes: Tensor | None, backwards: bool
) -> Tensor:
    """d_w_hh [G*H,R]: like `_weight_gradient`, where each row's input is the state before it.

    Args:
        side: the hidden side of the gradient of the pre-activations.
        y: [N,R] outputs of this direction.
        h0: [B,R] initial state.
        batch_sizes: [T] of packed rows, or None.
        backwards: whether this direction walks backwards in time.
    """
    batch = h0.shape[0]
    later = y.shape[0] - batch
    if batch_sizes is not None:
        return _weight_gradient(side, _previous_packed(y, h0, batch_sizes, backwards))
    if later == 0:
        return _weight_gradient(side, h0)
    gate_rows = sum(part.shape[1] for part, _ in side)
    if later <= gate_rows or _is_traced(y):
        # moving y costs less than a second pass over d_w; compiled code should not depend on T*B
        h_prev = torch.cat([y[batch:], h0] if backwards else [h0, y[:later]])
        return _weight_gradient(side, h_prev)
    if backwards:
        rows_later, rows_first, h_later = slice(0, later), slice(later, None), y[batch:]
    else:
        rows_later, rows_first, h_later = slice(batch, None), slice(0, batch), y[:later]
    d_w = _weight_gradient([(part[rows_later], gates) for part, gates in side], h_later)
    for part, gates in side:
        _add_product(d_w if gates is None else d_w[gates], part[rows_first].t(), h0)
    return d_w


def _previous_packed(y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool) -> Tensor:
    """[N,R] the state before each packed row: its sequence's row one step earlier, or h0's."""
    if _is_traced(batch_sizes):  # its values may change
        return _previous_by_index(y, h0, batch_sizes, backwards)
    return torch.cat(list(_previous_in_pieces(y, h0, batch_sizes, backwards)))


def _previous_in_pieces(
    y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool
) -> Iterator[Tensor]:
    """`_previous_packed` in slices of y and h0: no index has to reach the device.

    Steps of one size have their rows, and those of the step before each, side by side.
    """
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    runs = list(zip(sizes.tolist(), counts.tolist(), strict=True))
    begin, before = 0, h0  # the rows of the run's first step; what stands before them
    for index, (size, count) in enumerate(runs):
        end = begin + size * count
        if backwards:
            after = runs[index + 1][0] if index + 1 < len(runs) else 0
            yield y[begin + size : end + after]
            yield h0[after:size]
        else:
            yield before[:size]
            yield y[begin : end - size]
            before = y[end - size : end]
        begin = end


def _previous_by_index(y: Tensor, h0: Tensor, batch_sizes: Tensor, backwards: bool) -> Tensor:
    """`_previous_packed` with operations whose number does not depend on batch_sizes.

    With offset[t] the first row of step t, row offset[t] + b stands right after row
    offset[t-1] + b = (offset[t] + b) - batch_sizes[t-1] of its sequence b.
    """
    rows, batch = y.shape[0], h0.shape[0]
    later = torch.arange(batch, rows)
    earlier = later - batch_sizes[:-1].repeat_interleave(batch_sizes[1:], output_size=rows - batch)
    if not backwards:
        return torch.cat([h0, y.index_select(0, earlier.to(y.device))])
    sequences = torch.arange(batch)
    last_step = (batch_sizes > sequences.unsqueeze(1)).sum(1) - 1
    last_row = (batch_sizes.cumsum(0) - batch_sizes)[last_step] + sequences
    h_prev = y.new_empty(rows, h0.shape[1])
    h_prev.index_copy_(0, earlier.to(y.device), y[batch:])
    h_prev.index_copy_(0, last_row.to(y.device), h0)
    return h_prev


def _projection_gradient(d_h: Tensor, saved: Tensor) -> Tensor:
    """d_w_hr [P,H] = d_h [N,P]^T @ (o * tanh(c')) [N,H]; ``saved`` holds i,f,g,o,c'."""
    _, _, _, o, c = saved.chunk(5, dim=1)
    return torch.mm(d_h.t(), _cast(o * torch.tanh(c), d_h))


def _differentiable_gradients(
    needs: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
    inputs: tuple[Any, ...],
    batch_sizes: Tensor | None,
    spec: CellSpec,
    transformed: bool,
) -> Gradients:
    """`_gradients_on_cpu` as ordinary operations that can be differentiated again."""

    def forward(*wanted: Tensor) -> tuple[Tensor, ...]:
        variables = iter(wanted)
        x, h0, c0, *weights = [
            next(variables) if need else t for t, need in zip(inputs, needs, strict=True)
        ]
        outputs = composite(x, h0, c0, weights, batch_sizes, spec)
        return tuple(
            output
            for output, d_output in zip(outputs, d_outputs, strict=True)
            if output is not None and d_output is not None
        )

    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    given = tuple(d for d in d_outputs if d is not None)
    if transformed:
        gradients = iter(torch.func.vjp(forward, *wanted)[1](given))
    else:
        with torch.enable_grad():
            # aliases: inputs that depend on one another must not be followed beyond this layer;
            # those of a transform that is over (as in vjp) have lost their place in any graph
            aliases = [t.view_as(t) for t in wanted]
            aliases = [t if t.requires_grad else t.requires_grad_() for t in aliases]
            gradients = iter(
                torch.autograd.grad(
                    forward(*aliases), aliases, given, create_graph=True, allow_unused=True
                )
            )
    return tuple(next(gradients) if need else None for need in needs)
