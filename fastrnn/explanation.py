"""`explain`: which backend would run a call, and why the preferred ones cannot."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _C, autocast
from fastrnn.backends import Backend, captured, composite, kernels, stacked_kernels, torch_step
from fastrnn.engine import choose
from fastrnn.layer_call import LayerCall
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.cells import CellBase
from fastrnn.modules.linear_time import LinearTime
from fastrnn.modules.quantized import QuantizedRecurrent
from fastrnn.ops import ScanCall, ScanInputs, reason_against_kernels, records_gradient
from fastrnn.spec import BY_MODE, PROJECTION


@dataclass(frozen=True)
class Explanation:
    """How a call would run. ``print`` shows it.

    Attributes:
        call: a short description of the call.
        backend: the name of the backend that would run each layer, or the step.
        skipped: for each preferred backend, the reason why it cannot run the call.
        autocast: under autocast on the CPU the type that the kernels compute in, and the reason;
            otherwise "".
        plans: for the kernels, the plan of each layer, from `fastrnn._C.plan` or ``cuda_plan``.
    """

    call: str
    backend: str
    skipped: Mapping[str, str]
    autocast: str = ""
    plans: Sequence[Mapping[str, Any]] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.backend}"]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        if self.autocast:
            lines.append(f"  autocast: {self.autocast}")
        for index, plan in enumerate(self.plans):
            facts = ", ".join(f"{key}={value}" for key, value in plan.items())
            lines.append(f"  plan of layer {index}: {facts}")
        return "\n".join(lines)


class _Chosen(BaseException):
    """Ends a call after the choice. Not an Exception, because the modules would handle it."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__()
        self.explanation = explanation


def explain(module: nn.Module, input: torch.Tensor | PackedSequence, hx: Any = None) -> Explanation:
    """Returns how a call of a module would run, without running it.

        print(fastrnn.explain(module, input))

    The result depends on the current state of gradients, autocast, ``torch.func`` and the number of
    threads. A weight that a parametrization computes is computed once.

    Args:
        module: an RNN, LSTM, GRU or cell of fastrnn, a MinGRU, MinLSTM or SRU, or a layer of a
            quantized copy.
        input, hx: the arguments of its ``forward``.

    Raises:
        TypeError: ``module`` is not a recurrent module of fastrnn.
        Exception: any error that ``module(input, hx)`` raises before its computation begins.
    """
    if isinstance(module, QuantizedRecurrent):
        return _explain_quantized(module, input, hx)
    if isinstance(module, LinearTime):
        return _explain_linear_time(module, input, hx)
    if not isinstance(module, RecurrentBase | CellBase):
        raise TypeError(
            "explain: module must be an RNN, LSTM, GRU or a cell of fastrnn, got "
            f"{type(module).__module__}.{type(module).__name__}."
        )
    skipped: dict[str, str] = {}
    casts = ""

    def watch(call: LayerCall, backends: Sequence[Backend]) -> Backend:
        nonlocal casts
        chosen = choose.choose_without_watcher(call, backends)
        for backend in backends[: backends.index(chosen)]:
            skipped[backend.NAME] = choose.skip_reason(backend, call)
        if (
            chosen is not torch_step
            and backends in (choose.PRIORITY, choose.STEPS)
            and autocast.acts_on(call.x)
        ):
            if call.x.is_cpu and call.weights.flat[0].dtype == torch.float32:
                reason = autocast.float32_reason(call)
                casts = f"float32: {reason}" if reason else "bfloat16: copies make it faster"
            return chosen  # autocast casts the tensors, then the choice is made again
        plans = _plans(call) if chosen in (kernels, stacked_kernels, captured) else []
        raise _Chosen(Explanation(choose.describe(call), chosen.NAME, dict(skipped), casts, plans))

    data: Any = input.data if isinstance(input, PackedSequence) else input
    devices = [data.device] if isinstance(data, torch.Tensor) and data.is_cuda else []
    try:
        # the call may draw a mask of weight dropout before the choice
        with choose.watched(watch), torch.random.fork_rng(devices):
            module.forward(input, hx)
    except _Chosen as chosen:
        return chosen.explanation
    raise AssertionError("the call made no choice")


#: the name of the kernels of layers that are linear in time
SCAN_KERNELS = "scan kernels"


def _explain_linear_time(module: LinearTime, input: Any, hx: Any) -> Explanation:
    """Runs the checks of a call and the product of the first layer, which all layers resemble."""

    def explained(call: ScanCall, inputs: ScanInputs) -> NoReturn:
        pre = inputs.pre
        dtype = str(pre.dtype).removeprefix("torch.")
        text = (
            f"{call.cell}, {module.num_layers} layer(s) of {list(pre.shape)} {dtype} "
            f"{pre.device} after the product"
        )
        reason = reason_against_kernels(call, inputs)
        if reason:
            raise _Chosen(Explanation(text, composite.NAME, {SCAN_KERNELS: reason}))
        raise _Chosen(Explanation(text, SCAN_KERNELS, {}))

    watched: Any = copy.copy(module)
    watched._scan = explained
    try:
        watched.forward(input, hx)
    except _Chosen as chosen:
        return chosen.explanation
    raise AssertionError("the call ran no layer")


def _explain_quantized(module: QuantizedRecurrent, input: Any, hx: Any) -> Explanation:
    """Runs the checks of a call. There is one way to compute it."""
    spec = BY_MODE[module.mode]

    def explained(
        x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor | None, batch_sizes: torch.Tensor | None
    ) -> NoReturn:
        packed = "" if batch_sizes is None else "packed "
        dtype = str(x.dtype).removeprefix("torch.")
        call = (
            f"{spec.name}, {module.num_layers} layer(s) of int8 weights on "
            f"{packed}{list(x.shape)} {dtype} {x.device}"
        )
        steps = x.shape[0] if batch_sizes is None else len(batch_sizes)
        directions = 2 if module.bidirectional else 1
        plans = [
            _C.plan(
                spec.name,
                steps,
                h0.shape[1],
                module.hidden_size * directions if layer else module.input_size,
                module.hidden_size,
                dtype="int8",
                threads=torch.get_num_threads(),
                directions=directions,
            )
            for layer in range(module.num_layers)
        ]
        raise _Chosen(Explanation(call, "int8 kernels", {}, plans=plans))

    watched: Any = copy.copy(module)
    watched._run = explained
    try:
        watched.forward(input, hx)
    except _Chosen as chosen:
        return chosen.explanation
    raise AssertionError("the call ran no layer")


def _plans(call: LayerCall) -> list[Mapping[str, Any]]:
    """Returns the kernels' plan of each layer; none for meta tensors."""
    device = call.x.device
    if device.type not in ("cpu", "cuda"):
        return []
    directions = 1 if call.is_step else call.h0.shape[0] // call.options.num_layers
    width = call.x.shape[-1]
    plans: list[Mapping[str, Any]] = []
    for index in range(call.options.num_layers):
        plans.append(_plan(call, index, width, directions))
        width = directions * call.h0.shape[-1]
    return plans


def _plan(call: LayerCall, index: int, width: int, directions: int) -> Mapping[str, Any]:
    x, batch_sizes, (flat, slots) = call.x, call.batch_sizes, call.weights
    if batch_sizes is not None:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    else:
        steps, batch = (1, x.shape[0]) if call.is_step else (x.shape[0], x.shape[1])
    hidden = flat[0].shape[0] // call.spec.gates
    sizes = (steps, batch, width, hidden, call.h0.shape[-1] if slots & PROJECTION else 0)
    options: dict[str, Any] = {
        "dtype": str(x.dtype).removeprefix("torch."),
        "training": records_gradient(call),
        "directions": directions,
    }
    if x.device.type == "cpu":
        remaining = call.options.num_layers - index
        return _C.plan(
            call.spec.name,
            *sizes,
            **options,
            threads=torch.get_num_threads(),
            weight_format=_C.weight_formats()[call.options.weight_format],
            layers=remaining,
        )
    about: Any = torch.cuda.get_device_properties(x.device)
    rnn: Any = torch.backends.cudnn.rnn
    return _C.cuda_plan(
        call.spec.name,
        *sizes,
        **options,
        tf32=rnn.fp32_precision == "tf32",
        capability=about.major,
        multiprocessors=about.multi_processor_count,
        shared_bytes=about.shared_memory_per_block_optin,
    )
