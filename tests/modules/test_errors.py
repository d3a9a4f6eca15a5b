"""Wrong calls raise one clear sentence, and calls that torch.nn accepts give the same results.

A call is a module or function with its arguments; a mistake replaces one argument by a bad value.
The tests make every single mistake of the tables below, and random pairs of mistakes, and compare
the outcome with that of torch.nn for the same call.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn

LAYERS = ["RNN", "LSTM", "GRU"]
STEPS = ["RNNCell", "LSTMCell", "GRUCell"]
FUNCTIONS = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "gru", "lstm"]

STEP_COUNT, BATCH, INPUT, HIDDEN = 5, 2, 3, 4

# words of unforeseen errors, which no message may contain
OPAQUE = re.compile(
    "object has no attribute|index out of range|(?<!got: )NoneType|dispatch|INTERNAL ASSERT"
    "|not enough values to unpack|too many values to unpack|not subscriptable|not iterable"
    "|unsupported operand|has no len|Could not run|not implemented for|unhashable"
    r"|cannot be interpreted|\n",
    re.IGNORECASE,
)


@dataclass
class Call:
    """A call of a module, or of a function if ``build`` is None.

    Attributes:
        name: name of the module or function.
        build: arguments of the constructor.
        parameters: attributes that are set afterwards.
        packed: the fields of a packed input, which then replaces the argument ``input``.
        arguments: arguments of the call.
    """

    name: str
    build: dict[str, Any] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self, is_ours: bool) -> tuple[Tensor, ...]:
        """Returns the tensors that fastrnn or torch.nn returns."""
        arguments = dict(self.arguments)
        function: Any
        if self.build is None:
            function = getattr(fastrnn.functional if is_ours else torch._VF, self.name)
            if is_ours:
                return tuple(function(**arguments))
            return tuple(function(*arguments.values()))
        torch.manual_seed(3)
        function = getattr(fastrnn if is_ours else nn, self.name)(**self.build)
        for name, value in self.parameters.items():
            setattr(function, name, value)
        if self.packed:
            arguments = {"input": PackedSequence(*self.packed.values()), **arguments}
        result = function(*arguments.values())
        return tuple(flatten(result))


def flatten(result: Any) -> Iterator[Tensor]:
    if isinstance(result, PackedSequence):
        yield result.data
    elif isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from flatten(part)


def tensor(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def layer_call(name: str, packed: bool = False, batched: bool = True, **build: Any) -> Call:
    call = Call(name, {"input_size": INPUT, "hidden_size": HIDDEN, **build})
    layers = build.get("num_layers", 1) * (2 if build.get("bidirectional") else 1)
    if packed:
        call.packed = {
            "data": tensor(6, INPUT),
            "batch_sizes": torch.tensor([2, 2, 1, 1]),
            "sorted_indices": torch.tensor([1, 0]),
            "unsorted_indices": torch.tensor([1, 0]),
        }
    else:
        call.arguments["input"] = tensor(STEP_COUNT, *[BATCH] * batched, INPUT)
    state = tensor(layers, *[BATCH] * batched, HIDDEN)
    call.arguments["hx"] = (state, state + 1) if name == "LSTM" else state
    return call


def cell_call(name: str, batched: bool = True, **build: Any) -> Call:
    call = Call(name, {"input_size": INPUT, "hidden_size": HIDDEN, **build})
    state = tensor(*[BATCH] * batched, HIDDEN)
    call.arguments["input"] = tensor(*[BATCH] * batched, INPUT)
    call.arguments["hx"] = (state, state + 1) if name == "LSTMCell" else state
    return call


def function_call(name: str, packed: bool = False) -> Call:
    gates = {"lstm": 4, "gru": 3}.get(name, 1) * HIDDEN
    state = tensor(1, BATCH, HIDDEN)
    if packed:
        first = {"data": tensor(6, INPUT), "batch_sizes": torch.tensor([2, 2, 1, 1])}
    else:
        first = {"input": tensor(STEP_COUNT, BATCH, INPUT)}
    arguments = {
        **first,
        "hx": (state, state + 1) if name == "lstm" else state,
        "params": [tensor(gates, INPUT), tensor(gates, HIDDEN), tensor(gates), tensor(gates)],
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
    }
    if not packed:
        arguments["batch_first"] = False
    return Call(name, arguments=arguments)


# values that are no tensors
ODD: dict[str, Any] = {
    "None": None,
    "str": "text",
    "two letters": "ab",
    "empty str": "",
    "int": 3,
    "zero": 0,
    "negative": -1,
    "float": 2.5,
    "nan": float("nan"),
    "complex": 1j,
    "bool": True,
    "list": [1.0, 2.0],
    "empty list": [],
    "dict": {0: 1, 1: 2},
    "set": {1, 2},
    "array": numpy.zeros((2, 3), numpy.float32),
    "object": object(),
    "type": float,
    "bytes": b"ab",
    "function": len,
}

# tensors made of the right one
TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "0-D": lambda t: t.sum(),
    "one dimension less": lambda t: t[0],
    "one dimension more": lambda t: t.unsqueeze(0),
    "two dimensions more": lambda t: t[None, None],
    "last size": lambda t: torch.cat([t, t], -1),
    "last size 1": lambda t: t[..., :1],
    "no columns": lambda t: t[..., :0],
    "no rows": lambda t: t[:0],
    "first size": lambda t: torch.cat([t, t]),
    "second size": lambda t: torch.cat([t, t], 1) if t.dim() > 1 else t.repeat(2),
    "second size 1": lambda t: t[:, :1] if t.dim() > 1 else t[:1],
    "second size 0": lambda t: t[:, :0] if t.dim() > 1 else t[:0],
    "transposed": lambda t: t.transpose(0, -1),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.abs().byte(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t.unsqueeze(0))),
    "jagged": lambda t: torch.nested.nested_tensor(
        list(t if t.dim() > 1 else t[None]), layout=torch.jagged
    ),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "needs grad": lambda t: t.detach().requires_grad_() if t.is_floating_point() else t,
}

# states of an LSTM made of the right pair
PAIRS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "a tensor": lambda p: p[0],
    "stacked": torch.stack,
    "one": lambda p: p[:1],
    "three": lambda p: (*p, p[0]),
    "none": lambda p: (),
    "nested": lambda p: (p, p),
    "twice": lambda p: (p[0], p[0]),
    "a dict": lambda p: {0: p[0], 1: p[1]},
    "a named dict": lambda p: {"h": p[0], "c": p[1]},
    "an iterator": iter,
    "a set": set,
    "arrays": lambda p: tuple(t.numpy() for t in p),
    "lists": lambda p: tuple(t.tolist() for t in p),
    "packed": lambda p: PackedSequence(p[0], torch.tensor([1])),
}

SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda t: t[:0],
    "ascending": lambda t: t.flip(0),
    "sum larger": lambda t: t + 1,
    "sum smaller": lambda t: t[:-1],
    "batch larger": lambda t: torch.tensor([3, 2, 1]),
    "negative": lambda t: torch.tensor([2, 2, 3, -1]),
    "zero": lambda t: torch.tensor([3, 3, 0]),
    "first zero": lambda t: torch.tensor([0, 2, 2, 2]),
    "expanded": lambda t: torch.tensor([2]).expand(3),
    "strided": lambda t: torch.stack([t, t * 0], 1)[:, 0],
    "huge": lambda t: torch.tensor([2**62, 2]),
    "overflow": lambda t: torch.tensor([2**63 - 1, 2**63 - 1, 8]),
    "huge first": lambda t: torch.tensor([2**31 + 6]),
    "int32": lambda t: t.int(),
    "float": lambda t: t.float(),
    "bool": lambda t: t > 0,
    "2-D": lambda t: t[None],
    "0-D": lambda t: t[0],
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
}

INDICES: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "same": lambda t: t * 0,
    "out of range": lambda t: t + 1,
    "far": lambda t: t + 2**40,
    "negative": lambda t: t - 1,
    "shorter": lambda t: t[:1],
    "empty": lambda t: t[:0],
    "longer": lambda t: torch.cat([t, t]),
    "int32": lambda t: t.int(),
    "int16": lambda t: t.short(),
    "float": lambda t: t.float(),
    "bool": lambda t: t > 0,
    "2-D": lambda t: t[None],
    "0-D": lambda t: t[0],
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "str": lambda t: "text",
    "int": lambda t: 1,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "num_layers": {"2": 2, "many": 3, **ODD, "2.0": 2.0, "array": numpy.int64(1)},
    "dropout": {"1": 1, "above 1": 1.5, "below": -0.1, "infinite": float("inf"), **ODD},
    "batch_first": {"True": True, **ODD},
    "bidirectional": {"True": True, **ODD},
    "bias": {"False": False, **ODD},
    "input_size": {"1": 1, "2.0": 2.0, **ODD},
    "hidden_size": {"1": 1, "2.0": 2.0, **ODD},
    "proj_size": {"2": 2, "too large": 4, "2.0": 2.0, **ODD, "bool": False},
    "nonlinearity": {"relu": "relu", "sigmoid": "sigmoid", **ODD},
    "weight_dtype": {"float16": torch.float16, "bfloat16": torch.bfloat16, **ODD},
    "dtype": {"float64": torch.float64, "int64": torch.int64, "bool": torch.bool, **ODD},
    "device": {"meta": "meta", "unknown": "abacus", **ODD},
    "has_biases": {"False": False, **ODD},
    "train": {"True": True, **ODD},
}

PARAMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "tuple": tuple,
    "iterator": iter,
    "one less": lambda p: p[:-1],
    "one more": lambda p: [*p, p[0]],
    "twice": lambda p: [*p, *p],
    "None inside": lambda p: [p[0], None, p[2], p[3]],
    "None bias": lambda p: [p[0], p[1], None, p[3]],
    "str inside": lambda p: [p[0], "text", p[2], p[3]],
    "array inside": lambda p: [p[0].numpy(), *p[1:]],
    "lists": lambda p: [t.tolist() for t in p],
    "nested list": lambda p: [p],
    "dict": lambda p: dict(enumerate(p)),
    "reversed": lambda p: p[::-1],
}


@dataclass(frozen=True)
class Mistake:
    """Replaces the value of ``argument`` in ``part``, a field of `Call`."""

    part: str
    argument: str
    label: str
    change: Callable[[Any], Any]
    element: int | None = None

    def apply(self, call: Call) -> None:
        held = getattr(call, self.part)
        if self.element is None:
            held[self.argument] = self.change(held.get(self.argument))
            return
        parts = list(held[self.argument])
        parts[self.element] = self.change(parts[self.element])
        held[self.argument] = tuple(parts)

    def __str__(self) -> str:
        element = "" if self.element is None else f"[{self.element}]"
        return f"{self.argument}{element}: {self.label}"


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def tensor_mistakes(part: str, argument: str, element: int | None = None) -> Iterator[Mistake]:
    for label, value in ODD.items():
        yield Mistake(part, argument, label, constant(value), element)
    for label, change in TENSORS.items():
        yield Mistake(part, argument, f"tensor {label}", change, element)


def mistakes(call: Call) -> Iterator[Mistake]:
    """Yields every mistake that can be made in this call."""
    for argument, value in call.arguments.items():
        if argument in OPTIONS:
            for label, odd in OPTIONS[argument].items():
                yield Mistake("arguments", argument, label, constant(odd))
        elif argument == "batch_sizes":
            for label, odd in ODD.items():
                yield Mistake("arguments", argument, label, constant(odd))
            for label, change in SIZES.items():
                yield Mistake("arguments", argument, label, change)
        elif argument == "params":
            for label, odd in ODD.items():
                yield Mistake("arguments", argument, label, constant(odd))
            for label, change in PARAMS.items():
                yield Mistake("arguments", argument, label, change)
            for element in (0, 3):
                yield from tensor_mistakes("arguments", argument, element)
        elif isinstance(value, tuple):
            for label, odd in ODD.items():
                yield Mistake("arguments", argument, label, constant(odd))
            for label, change in PAIRS.items():
                yield Mistake("arguments", argument, label, change)
            for element in (0, 1):
                yield from tensor_mistakes("arguments", argument, element)
        else:
            yield from tensor_mistakes("arguments", argument)
            yield Mistake("arguments", argument, "pair", lambda t: (t, t))
            yield Mistake("arguments", argument, "one in a tuple", lambda t: (t,))
    for argument in call.packed:
        if argument == "data":
            yield from tensor_mistakes("packed", argument)
        else:
            table = SIZES if argument == "batch_sizes" else INDICES
            for label, change in table.items():
                if argument != "batch_sizes" or label not in ("list", "array"):  # torch's own error
                    yield Mistake("packed", argument, label, change)
    if call.build is not None:
        yield from module_mistakes(call)


ATTRIBUTES: dict[str, list[Any]] = {
    "num_layers": [0, 2, -1, "x", None],
    "hidden_size": [5, "x"],
    "input_size": [5],
    "dropout": [2.0, "x"],
    "mode": ["x"],
    "bidirectional": [True, None],
    "batch_first": [True],
    "bias": [False],
    "proj_size": [2, None],
    "nonlinearity": ["x", None],
}
OF_CELLS = {"hidden_size", "input_size", "nonlinearity", "bias"}


def module_mistakes(call: Call) -> Iterator[Mistake]:
    """Yields wrong arguments of the constructor, wrong parameters and wrong attributes."""
    assert call.build is not None
    module = getattr(nn, call.name)(**call.build)
    names = ["input_size", "hidden_size", "bias", "device", "dtype"]
    if call.name in LAYERS:
        names += ["num_layers", "batch_first", "dropout", "bidirectional", "weight_dtype"]
    if call.name in ("RNN", "RNNCell"):
        names += ["nonlinearity"]
    if call.name == "LSTM":
        names += ["proj_size"]
    for argument in names:
        for label, odd in OPTIONS[argument].items():
            yield Mistake("build", argument, label, constant(odd))
    for argument, parameter in module.named_parameters():
        for label, change in TENSORS.items():
            yield Mistake("parameters", argument, label, made(parameter.detach(), change))
        yield Mistake("parameters", argument, "str", constant("text"))
        if argument.startswith("weight"):
            yield Mistake("parameters", argument, "None", constant(None))
    for argument, values in ATTRIBUTES.items():
        if call.name in LAYERS or argument in OF_CELLS:
            for value in values:
                yield Mistake("parameters", argument, f"set to {value!r}", constant(value))


def made(good: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def parameter(_: Any) -> nn.Parameter:
        value = change(good)
        return nn.Parameter(
            value, requires_grad=value.is_floating_point() and not value.is_quantized
        )

    return parameter


def calls() -> dict[str, Call]:
    """Returns correct calls, by name."""
    result = {}
    for name in LAYERS:
        result[name] = layer_call(name)
        result[f"{name} unbatched"] = layer_call(name, batched=False)
        result[f"{name} packed"] = layer_call(name, packed=True)
        result[f"{name} deep"] = layer_call(name, num_layers=2, bidirectional=True)
    for name in STEPS:
        result[name] = cell_call(name)
        result[f"{name} unbatched"] = cell_call(name, batched=False)
    for name in FUNCTIONS:
        result[name] = function_call(name)
        result[f"{name} packed"] = function_call(name, packed=True)
    return result


CALLS = calls()


# --- outcomes

# accepted messages that do not name the argument; most are torch's
KNOWN = re.compile(
    r"^Input and (parameter|hidden) tensors are not (at the same device|the same dtype), found"
    r"|^RNN input dtype \(\S+\) does not match weight dtype"
    r"|^input must have \d dimensions, got|^packed data must have 2 dimensions, got"
    r"|^input.size\(-1\) must be equal to input_size\. Expected|^input has inconsistent input_size"
    r"|^Expected sequence length to be larger than 0 in RNN"
    r"|^(\w+: )?Expected (input|hidden|hx\[\d\])(\[\d\])? (size|to be) "
    r"|^For (un)?batched \d-D input, hx (and cx )?should also be"
    r"|^hidden\d has inconsistent hidden_size|^Input batch size \d+ doesn't match hidden\d"
    r"|^(hidden|cell) state must be of size|^Expected params\[\d+\] of size"
    r"|^Expected \d+ parameter tensors, got|^lstm(_cell)? expects two hidden states$"
    r"|^dropout probability has to be between 0 and 1"
    r"|^Unknown nonlinearity|: batch_sizes must be positive, descend and add up to"
)


def outcome(call: Call, is_ours: bool) -> tuple[Tensor, ...] | Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call.run(is_ours)
        except Exception as error:
            return error


def is_clear(error: Exception, names: list[str], theirs: object) -> bool:
    message = str(error)
    if type(error) not in (TypeError, ValueError, RuntimeError) or OPAQUE.search(message):
        return False
    return (
        any(name in message for name in names)
        or KNOWN.search(message) is not None
        or (isinstance(theirs, Exception) and message == str(theirs))
    )


def is_safe_in_torch(call: Call, made: list[Mistake]) -> bool:
    """Whether torch can be called: it neither crashes nor returns uninitialised memory.

    torch reads expanded batch sizes as if they were contiguous and meta tensors as if they had
    memory. Its LSTM does not check parameters, and its function `lstm` checks no sizes.
    """
    if call.name in ("rnn_sigmoid", "lstm"):
        return False
    if call.name == "LSTM" and any(m.part != "build" and m.argument != "input" for m in made):
        return False
    return not any(m.label in ("meta", "tensor meta", "expanded") for m in made)


def may_accept(call: Call, mistake: Mistake) -> bool:
    """Whether fastrnn deliberately accepts a call that torch may reject."""
    argument, label = mistake.argument, mistake.label
    return (
        argument == "weight_dtype"
        or (argument == "nonlinearity" and label == "sigmoid")
        or (argument in ("batch_sizes", "params") and label in ("expanded", "strided", "iterator"))
        or (argument == "num_layers" and label == "bool")  # a bool is an int
        or (argument == "bias" and label == "set to False")  # the existing parameters decide
        or argument == "dropout"  # unused with a single layer
        or (mistake.part == "parameters" and argument in ATTRIBUTES)  # not all of them are read
    )


def may_reject(call: Call, mistake: Mistake) -> bool:
    """Whether fastrnn deliberately rejects a call that torch may accept."""
    part, argument, label = mistake.part, mistake.argument, mistake.label
    return (
        call.build is None  # torch's functions do not check: its modules do
        or any(word in label for word in ("sparse", "compressed", "meta"))
        or (part == "parameters" and call.name == "LSTM")  # torch does not check them
        or (part == "parameters" and argument.startswith("bias"))  # torch repeats a single value
        or (part == "parameters" and argument in ATTRIBUTES)
        or (call.name.startswith("LSTM") and argument == "hx")  # torch does not check c
        or argument in ("batch_sizes", "data")  # torch ignores surplus rows
    )


def check(name: str, made: list[Mistake]) -> None:
    call = CALLS[name]
    outcomes = []
    for is_recorded in (True, False):
        with torch.set_grad_enabled(is_recorded):
            outcomes.append(outcome(applied(name, made), True))
    calls_torch = not made or is_safe_in_torch(call, made)
    calls_torch = calls_torch and call.name != "rnn_sigmoid"
    theirs = outcome(applied(name, made), False) if calls_torch else None
    names = [mistake.argument for mistake in made] + ["input"] * ("data" in call.arguments)
    for ours in outcomes:
        if isinstance(ours, Exception):
            assert is_clear(ours, names, theirs), f"{type(ours).__name__}: {ours}"
            if isinstance(theirs, tuple):
                assert any(may_reject(call, m) for m in made), f"torch accepts it: {ours}"
        elif isinstance(theirs, tuple):
            for got, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
        elif theirs is not None:
            assert any(may_accept(call, m) for m in made), f"torch rejects it: {theirs}"
    if any(m.part == "parameters" and m.argument in ATTRIBUTES for m in made):
        return  # the fast path without gradients does not read all attributes
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], Exception) and "jagged" not in str(made):
        assert str(outcomes[0]) == str(outcomes[1])


def applied(name: str, made: list[Mistake]) -> Call:
    """Returns the call with these mistakes."""
    call = copy.deepcopy(CALLS[name])
    for mistake in made:
        mistake.apply(call)
    return call


def check_all(name: str, choices: Iterable[list[Mistake]]) -> None:
    failures = []
    for made in choices:
        try:
            applied(name, made)
        except Exception:  # this tensor cannot be created
            continue
        try:
            check(name, made)
        except AssertionError as error:
            failures.append(f"{', '.join(map(str, made))} -> {error}")
    assert not failures, "\n".join([f"{len(failures)} calls", *failures[:40]])


@pytest.mark.parametrize("name", CALLS)
def test_each_mistake_raises_a_clear_error_or_matches_torch(name: str) -> None:
    chosen = list(mistakes(CALLS[name]))
    if CALLS[name].build is not None and " " in name:  # another call tests the same module
        chosen = [m for m in chosen if m.part != "build"]
        if name.endswith("deep"):
            last = ("l1", "l1_reverse")
            chosen = [m for m in chosen if m.argument.endswith(last) or m.argument in ATTRIBUTES]
            chosen = chosen[::4]
        else:
            chosen = [m for m in chosen if m.part != "parameters"]
    check_all(name, ([mistake] for mistake in chosen))


def test_two_mistakes_raise_a_clear_error_or_match_torch() -> None:
    generator = random.Random(5)
    for name, call in CALLS.items():
        every = list(mistakes(call))
        pairs = []
        while len(pairs) < 20:
            pair = generator.sample(every, 2)
            names = {mistake.argument for mistake in pair}
            one_bias = "bias" in names and names & {"bias_ih", "bias_hh"}  # one mistake, not two
            if len(names) == 2 and not one_bias:
                pairs.append(pair)
        check_all(name, pairs)


def test_correct_calls_match_torch() -> None:
    for name in CALLS:
        assert isinstance(outcome(applied(name, []), True), tuple)
        check(name, [])


def message(call: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as info:
        call()
    assert info.value.__suppress_context__ or info.value.__context__ is None
    return str(info.value)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_messages_name_argument_expected_and_actual(is_recorded: bool) -> None:
    zeros = torch.zeros
    gru = fastrnn.GRU(5, 3, num_layers=2)
    gru.num_layers = 0
    projected = fastrnn.LSTM(5, 3, proj_size=2)
    projected.weight_hr_l0 = nn.Parameter(zeros(3))
    cell = fastrnn.GRUCell(5, 3)
    cell.weight_hh = nn.Parameter(zeros(9))
    packed = PackedSequence(zeros(4, 5), torch.tensor([1, 3]))
    expected = {
        "LSTMCell: hx[0] must be 1-D like the input, got 2-D.": lambda: fastrnn.LSTMCell(5, 3)(
            zeros(5), (zeros(3, 3), zeros(3, 3))
        ),
        "RNNCell: hx must be 1-D like the input, got 2-D.": lambda: fastrnn.RNNCell(5, 3)(
            zeros(5), zeros(3, 3)
        ),
        "GRUCell: hx must be 2-D like the input, got 1-D.": lambda: fastrnn.GRUCell(5, 3)(
            zeros(2, 5), zeros(3)
        ),
        "LSTMCell: hx must be a tuple of two tensors, h and c, got a tensor of shape [3, 3, 3].": (
            lambda: fastrnn.LSTMCell(3, 3)(zeros(3, 3), zeros(3, 3, 3))
        ),
        "LSTM: hx[1] must be a tensor, got None.": lambda: fastrnn.LSTM(5, 3)(
            zeros(4, 2, 5), (zeros(1, 2, 3), None)
        ),
        "GRU: num_layers must be 2 like the layers of the parameters, got 0.": lambda: gru(
            zeros(4, 2, 5)
        ),
        "LSTM: weight_hr_l0 must be of shape [2, 3], got [3].": lambda: projected(zeros(4, 2, 5)),
        "GRUCell: weight_hh must be of shape [9, 3], got [9].": lambda: cell(zeros(2, 5)),
        "GRU: batch_sizes must be positive, descend and add up to the 4 rows of data, "
        "got [1, 3].": (lambda: fastrnn.GRU(5, 3)(packed)),
        "gru: params must be a list or tuple of tensors, got None.": lambda: fastrnn.functional.gru(
            zeros(4, 2, 5), zeros(1, 2, 3), None, True, 1, 0.0, False, False, False
        ),
    }
    with torch.set_grad_enabled(is_recorded):
        assert [message(call) for call in expected.values()] == list(expected)


def test_errors_of_subclasses_are_unchanged() -> None:
    """The error of a subclass keeps its message and traceback."""

    class Broken(fastrnn.GRU):
        def check_forward_args(self, *args: Any) -> None:
            raise KeyError("mine")

    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient), pytest.raises(KeyError, match="mine"):
            Broken(3, 4)(torch.zeros(5, 2, 3))


def test_compiled_calls_raise_the_eager_message() -> None:
    """Dynamo falls back to Python for a wrong call, and Python raises the same message."""
    torch._dynamo.reset()
    for module, x, hx in (
        (fastrnn.GRUCell(5, 3), torch.zeros(2, 5), torch.zeros(3)),
        (fastrnn.LSTM(5, 3), torch.zeros(4, 2, 5), (torch.zeros(1, 2, 3), None)),
        (fastrnn.RNN(5, 3), torch.zeros(4, 2, 5), "text"),
    ):
        compiled = torch.compile(module, backend="eager")
        assert message(lambda: compiled(x, hx)) == message(lambda: module(x, hx))  # noqa: B023
