"""`diagnose`: runs a model once under a recorder and measures what it recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastrnn._torch_internals import tree_leaves
from fastrnn.convert import fastrnn_class
from fastrnn.diagnostics import measures
from fastrnn.diagnostics.recording import Record, Recorder, watched_modules
from fastrnn.diagnostics.report import Diagnosis, LayerDiagnosis
from fastrnn.engine import choose
from fastrnn.modules.base import RecurrentBase
from fastrnn.modules.cells import CellBase


def sum_of_squares(output: Any) -> Tensor:
    """Returns the sum of the squares of all floating-point values in a model's output.

    Args:
        output: a tensor, a `PackedSequence`, or tuples, lists and dictionaries of these.

    Raises:
        TypeError: there is no floating-point tensor.
    """
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise TypeError(
            "diagnose: the model's output must contain a floating-point tensor, got "
            f"{type(output).__name__}. Pass a function of this output as loss."
        )
    return torch.stack([t.square().sum() for t in tensors]).sum()


def diagnose(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] = sum_of_squares, **keywords: Any
) -> Diagnosis:
    """Measures the recurrent layers of a model on one batch.

        report = diagnose(model, batch, loss=lambda output: criterion(output, target))
        print(report)

    Runs ``model(*inputs, **keywords)`` once, in the mode in which the model is, with every RNN,
    LSTM, GRU and cell of fastrnn or ``torch.nn`` computed step by step (`fastrnn.reference`), then
    ``loss``, and the gradient of the loss with respect to the states after every step. This takes
    many times longer than a training step with the kernels: use one batch and short sequences.

    Leaves parameters, ``.grad``, buffers, training mode, hooks and torch's random state unchanged.
    Other attributes that the forward of the model sets itself keep their new value. The model's own
    forward hooks run.

    The steps of several calls of one layer follow one another: a cell that the model calls in a
    loop has one step per call. Not recorded are calls of `fastrnn.functional` and of a module's
    ``forward`` instead of the module.

    Args:
        model: any module that contains recurrent layers or cells, or is one.
        inputs, keywords: the arguments of its forward, of any kind that the layers support, packed
            sequences included.
        loss: function of the model's output that returns a scalar tensor. The default,
            `sum_of_squares`, depends on the outputs of all steps. A loss that depends on the last
            step only shows how far gradients reach back.

    Returns:
        A `Diagnosis`: ``layers`` by name, such as ``encoder.l0_reverse``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``; contains a subclass of a layer of
            ``torch.nn``; ``loss`` does not return a tensor.
        ValueError: the model has no recurrent layer or calls none; the loss is not a scalar or
            does not depend on a layer; a layer gets an empty input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"diagnose: model must be a torch.nn.Module, got {type(model).__name__}.")
    if not callable(loss):
        raise TypeError(f"diagnose: loss must be a function, got {type(loss).__name__}.")
    modules = dict(watched_modules(model))
    _check(model, modules)
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_unchanged_random_state(model, inputs, keywords))
        if "torch._dynamo" in sys.modules:  # compiled modules run uncompiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in modules.items():
            stack.enter_context(_recorded(recorder, module, name))
        stack.enter_context(choose.watched(recorder.choose))
        # a forward may change buffers, so it gets copies
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        value = loss(functional_call(model, buffers, inputs, keywords))
        _check_loss(value)
        if not recorder.records:
            raise ValueError(
                f"diagnose: model must call one of its recurrent layers ({', '.join(modules)})."
            )
        gradients = _gradients(value, list(recorder.records.values()))
    layers = {
        name: _measure(name, record, *gradient)
        for (name, record), gradient in zip(recorder.records.items(), gradients, strict=True)
    }
    return Diagnosis(float(value.detach()), layers)


def _check(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    if not modules:
        raise ValueError(
            "diagnose: model must contain an RNN, LSTM, GRU or cell of fastrnn or torch.nn, got "
            f"{type(model).__name__} without one."
        )
    for name, module in modules.items():
        where = f"diagnose: {name or 'model'}"
        if not isinstance(module, RecurrentBase | CellBase) and fastrnn_class(module) is None:
            cls = type(module)
            raise TypeError(
                f"{where} must be a layer of fastrnn or torch.nn, got {cls.__module__}."
                f"{cls.__qualname__}, a subclass that may rely on how torch computes. Define the "
                "class under fastrnn.patch()."
            )
        if any(p.is_complex() for p in module.parameters()):
            raise TypeError(f"{where} must have real parameters, got complex ones.")


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"diagnose: loss must return a tensor, got {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(f"diagnose: loss must return a scalar, got the shape {[*value.shape]}.")
    if not value.requires_grad:
        raise ValueError(
            "diagnose: loss must depend on a recurrent layer, got a tensor without a gradient."
        )


@contextmanager
def _unchanged_random_state(model: nn.Module, *arguments: Any) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(arguments)]
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


@contextmanager
def _recorded(recorder: Recorder, module: nn.Module, name: str) -> Iterator[None]:
    """Within this context the module is one of fastrnn and its calls are recorded."""
    cls, attributes = type(module), dict(vars(module))
    if not isinstance(module, RecurrentBase | CellBase):
        replacement = fastrnn_class(module)
        assert replacement is not None
        module.__class__ = replacement
    remove = recorder.watch(module, name)
    try:
        yield
    finally:
        remove()
        module.__class__ = cls
        # A module stores the weights that a parametrization or an old weight norm computed.
        vars(module).clear()
        vars(module).update(attributes)


def _gradients(value: Tensor, records: list[Record]) -> list[tuple[Tensor, Tensor | None]]:
    """Returns for each record the norms [T] of the gradients of h, and of c if there is one."""
    # copies, because activation checkpointing calls layers again during the backward pass
    groups = [([*record.hidden], [*record.cell]) for record in records]
    states = [state for hidden, cell in groups for state in (*hidden, *cell)]
    rest = iter(torch.autograd.grad(value.sum(), states, materialize_grads=True))
    results = []
    for hidden, cell in groups:
        hidden_gradient = measures.norms([next(rest) for _ in hidden])
        cell_gradient = measures.norms([next(rest) for _ in cell]) if cell else None
        results.append((hidden_gradient, cell_gradient))
    return results


def _measure(
    name: str, record: Record, hidden_gradient: Tensor, cell_gradient: Tensor | None
) -> LayerDiagnosis:
    weights, low, high = record.weights, record.low, record.high
    assert weights is not None
    assert low is not None
    assert high is not None
    units = record.rows * (weights.w_ih.shape[0] // record.spec.gates)
    dead = (low == high) & (record.rows > 1)
    if record.spec.name == "rnn_relu":
        dead |= high <= 0
    radii = measures.spectral_radii(weights, record.spec.gates)
    names = measures.gate_names(record.spec.name, record.spec.gates)
    return LayerDiagnosis(
        name=name,
        cell=record.spec.name,
        hidden_gradient=hidden_gradient,
        cell_gradient=cell_gradient,
        spectral_radius=dict(zip(names, radii, strict=False)),
        saturation={g: count.double() / units for g, count in record.saturated.items()},
        dead=dead.cpu(),
    )
