"""Wrong calls of every public layer, option and tool raise an exception that names the argument.

Each row of a table is a call and words that its message must have. Where ``torch.nn`` has the same
argument, its words for the mistake are right too: test_errors.py compares more calls with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
import fastrnn.init
from fastrnn import _C
from fastrnn.diagnostics import diagnose
from fastrnn.functional import linear_scan

I, H, T, B = 3, 4, 5, 2  # noqa: E741
NAN, INF, HUGE = float("nan"), float("inf"), 2**62
X = torch.zeros(T, B, I)


def tanh_step(gates_x: Any, gates_h: Any, h: Any) -> Any:
    return torch.tanh(gates_x[0] + gates_h[0])


Defined: Any = fastrnn.define_cell(tanh_step, gates=1, name="Defined")
Defined._load = classmethod(lambda cls: None)  # compiles nothing: the checks come before kernels

DENSE: dict[str, Any] = {"RNN": fastrnn.RNN, "LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU}
LINEAR: dict[str, Any] = {"MinGRU": fastrnn.MinGRU, "MinLSTM": fastrnn.MinLSTM, "SRU": fastrnn.SRU}
CELLS: dict[str, Any] = {
    "RNNCell": fastrnn.RNNCell,
    "LSTMCell": fastrnn.LSTMCell,
    "GRUCell": fastrnn.GRUCell,
}
LAYERS = {**DENSE, "Defined": Defined, **LINEAR}

NOT_INTS = [1.5, "3", None, NAN, [3], torch.zeros(2)]
NOT_BOOLS = [1, 0.0, "True", None, torch.tensor(True), [True]]
NOT_PROBABILITIES = [-0.1, 1.5, NAN, INF, "0.1", None, True, torch.tensor(0.1), [], 10**400]

#: for each argument of a constructor, wrong values
WRONG_ARGUMENTS: dict[str, list[Any]] = {
    "input_size": [-1, HUGE, *NOT_INTS],
    "hidden_size": [0, -1, HUGE, *NOT_INTS],
    "num_layers": [0, -1, HUGE, *NOT_INTS],
    "bias": NOT_BOOLS,
    "batch_first": NOT_BOOLS,
    "dropout": [v for v in NOT_PROBABILITIES if v != []],
    "bidirectional": NOT_BOOLS,
    "dtype": [torch.int32, "x", 3, torch.bool],
    "device": ["nowhere", 1.5, [0]],
}
WRONG_OPTIONS: dict[str, list[Any]] = {
    "layer_norm": NOT_BOOLS,
    "zoneout": [*NOT_PROBABILITIES, (0.1, 0.1, 0.1), (0.1,), {}],
    "recurrent_dropout": NOT_PROBABILITIES,
    "weight_dropout": NOT_PROBABILITIES,
    "residual": NOT_BOOLS,
    "learn_initial_state": NOT_BOOLS,
    "batch_first_states": NOT_BOOLS,
    "recompute": [0, -1, 1.5, "half", None, True, NAN, torch.zeros(2)],
    "weight_dtype": [torch.int8, torch.bfloat16, "float16", 16, torch.float64],
}

Row = tuple[str, str, Callable[[], Any]]


def short(value: Any) -> str:
    text = repr(value).replace(" ", "")
    return text if len(text) < 24 else type(value).__name__


def constructor_rows() -> Iterator[Row]:
    for name, cls in (LAYERS | CELLS).items():
        arguments = dict(WRONG_ARGUMENTS)
        if name in DENSE:
            arguments |= WRONG_OPTIONS
        if name == "Defined":
            arguments |= {k: v for k, v in WRONG_OPTIONS.items() if k != "recompute"}
        if name in DENSE:
            arguments["proj_size"] = [-1, H, H + 1, *NOT_INTS] if name == "LSTM" else [1]
        if name in CELLS:
            # torch.nn's cells accept bias=1 and hidden_size=0
            names = ("input_size", "hidden_size", "dtype", "device")
            arguments = {k: arguments[k] for k in names} | {"hidden_size": [-1, HUGE, *NOT_INTS]}
        if name in ("MinGRU", "MinLSTM"):
            arguments["positive"] = NOT_BOOLS
        if name == "RNN":
            arguments["nonlinearity"] = ["softplus", None, 3, ""]
        for argument, values in arguments.items():
            for value in values:
                keywords = {"input_size": I, "hidden_size": H, argument: value}
                yield (
                    f"{name}({argument}={short(value)})",
                    argument,
                    lambda c=cls, k=keywords: c(**k),
                )
        yield f"{name}(unknown=1)", "unknown", lambda c=cls: c(I, H, unknown=1)


def make(name: str, **options: Any) -> Any:
    return (LAYERS | CELLS)[name](I, H, **options).eval()


def state(name: str, *sizes: int, **options: Any) -> Any:
    h = torch.zeros(*sizes, **options)
    return (h, h.clone()) if name.startswith("LSTM") else h


def forward_rows() -> Iterator[Row]:
    def row(name: str, argument: str, value: Any, said: str = "", **options: Any) -> Row:
        keywords = {"input": X, argument: value}
        label = f"{name}.forward({argument}={short(value)}{''.join(f',{k}' for k in options)})"
        return label, said or argument, lambda: make(name, **options)(**keywords)

    for name in LAYERS:
        inputs: list[Any] = [None, 3, "x", [X], X.numpy(), X.long(), X.to_sparse(), X[0, 0]]
        inputs += [X.unsqueeze(0), X[..., :2], X.to(torch.complex64).to_sparse(), X.to("meta")]
        for value in inputs:
            yield row(name, "input", value, "nput|parameter|dtype")
        shapes = [(1, B, H + 1), (1, B + 1, H), (2, B, H), (B, H), (H,), (1, 1, B, H)]
        for shape in shapes:
            yield row(name, "hx", state(name, *shape), "hx|hidden")
        for value in ["x", 3, [X], (X,), (X, X, X), {}, X.long()]:
            yield row(name, "hx", value, "hx|hidden")
        yield row(name, "hx", state(name, 1, B, H, dtype=torch.float64), "hx|hidden|h0")
        yield row(name, "hx", state(name, 1, B, H, device="meta"), "hx|hidden|h0")
        for value in [
            3,
            [T, T],
            torch.tensor([T]),
            torch.tensor([T, T + 1]),
            torch.tensor([T, -1]),
        ]:
            yield row(name, "lengths", value)
        for value in [
            torch.tensor([T, 1.5]),
            torch.tensor([True, True]),
            "x",
            torch.zeros(2, 2).long(),
        ]:
            yield row(name, "lengths", value)
        for value in [
            "x",
            3,
            torch.zeros(T),
            torch.zeros(B, T),
            torch.full((T, B), 2),
            X.to(torch.complex64),
        ]:
            yield row(name, "resets", value)
        yield row(name, "resets", torch.full((T, B), NAN))
        yield row(name, "reset_state", state(name, 1, B, H))
        resets = torch.zeros(T, B, dtype=torch.bool)
        for value in ["x", 3, torch.zeros(2), torch.zeros(1, B, H + 1), (X, X, X)]:
            keywords = {"resets": resets, "reset_state": value}
            label = f"{name}.forward(reset_state={short(value)})"
            yield label, "reset_state", lambda n=name, k=keywords: make(n)(X, **k)
        if name in LINEAR:
            continue
        for argument in ("return_all_states", "return_gates"):
            for value in ["yes", 1, None, torch.ones(2)]:
                yield row(name, argument, value)
    for name in CELLS:
        x = X[0]
        for value in [None, 3, "x", [x], x.numpy(), x.long(), X, x[:, :2]]:
            yield (
                f"{name}.forward(input={short(value)})",
                "nput|dtype",
                lambda n=name, v=value: make(n)(v),
            )
        for value in [3, "x", [x], x, torch.zeros(B + 1, H), X, torch.zeros(B, H).long(), {}]:
            states = (value, value) if name == "LSTMCell" and isinstance(value, Tensor) else value
            yield (
                f"{name}.forward(hx={short(value)})",
                "hx|hidden|h0|state|dtype|type",
                lambda n=name, v=states, x=x: make(n)(x, v),
            )


def as_packed(*members: Any) -> PackedSequence:
    """Returns a packed sequence without the checks of its constructor."""
    return tuple.__new__(PackedSequence, members)  # type: ignore[type-var]


def packed_rows() -> Iterator[Row]:
    data, sizes = torch.zeros(3, I), torch.tensor([2, 1])
    order = torch.tensor([0, 1])
    bad_sizes = [None, [2, 1], torch.tensor([1, 2]), torch.tensor([2, 2]), torch.tensor([2.0, 1.0])]
    bad_sizes += [torch.tensor([HUGE, HUGE]), torch.tensor([4, -1]), torch.zeros(0).long()]
    bad_sizes += [torch.tensor([[2, 1]]), sizes.to("meta")]
    for name in LAYERS:
        # the loop of torch operations of a cell without kernels takes int32
        for value in bad_sizes if name == "Defined" else [*bad_sizes, sizes.int()]:
            packed = as_packed(data, value, None, None)
            yield (
                f"{name}.forward(batch_sizes={short(value)})",
                "batch_sizes|sequence length",
                lambda n=name, p=packed: make(n)(p),
            )
        for value in [torch.tensor([0, 2]), torch.tensor([0.0, 1.0]), order.to("meta")]:
            packed = as_packed(data, sizes, value, order)
            yield (
                f"{name}.forward(sorted_indices={short(value)})",
                "sorted_indices",
                lambda n=name, p=packed: make(n)(p, state(n, 1, 2, H)),
            )
            packed = as_packed(data, sizes, order, value)
            yield (
                f"{name}.forward(unsorted_indices={short(value)})",
                "sorted_indices",
                lambda n=name, p=packed: make(n)(p, state(n, 1, 2, H)),
            )
        for value in [None, X, data[:, :2], data.long(), data.to("meta")]:
            packed = as_packed(value, sizes, None, None)
            yield (
                f"{name}.forward(data={short(value)})",
                "data|nput",
                lambda n=name, p=packed: make(n)(p),
            )


def function_rows() -> Iterator[Row]:
    for name in ("rnn_tanh", "gru", "lstm"):
        cls = {"rnn_tanh": "RNN", "gru": "GRU", "lstm": "LSTM"}[name]
        layer = make(cls, num_layers=2)
        right = {
            "input": X,
            "hx": state(cls, 2, B, H),
            "params": list(layer.parameters()),
            "has_biases": True,
            "num_layers": 2,
            "dropout": 0.0,
            "train": True,
            "bidirectional": False,
            "batch_first": False,
        }
        wrong: dict[str, list[Any]] = {
            "input": [None, 3, X[0], X.long(), X[..., :2]],
            "hx": [None, 3, state(cls, 1, B, H), state(cls, 2, B, H).__class__(), "x"],
            "params": [None, 3, [], [X], right["params"][:-1], [None] * 8, "x"],
            "has_biases": [*NOT_BOOLS, False],
            "num_layers": [0, -1, 3, *NOT_INTS],
            "dropout": [v for v in NOT_PROBABILITIES if v is not True],
            "train": NOT_BOOLS,
            "bidirectional": [*NOT_BOOLS, True],
            "batch_first": NOT_BOOLS,
            "weight_dtype": WRONG_OPTIONS["weight_dtype"],
            "recompute": WRONG_OPTIONS["recompute"],
            "residual": NOT_BOOLS,
            "return_gates": NOT_BOOLS,
            "lengths": [3, torch.tensor([T, -1])],
        }
        said = {
            "hx": "hx|hidden",
            "has_biases": "has_biases|param",
            "params": "param",
            "bidirectional": "bidirectional|param|hidden",
            "num_layers": "num_layers|param|hidden",
            "input": "input|param",
        }
        for argument, values in wrong.items():
            for value in values:
                yield (
                    f"functional.{name}({argument}={short(value)})",
                    said.get(argument, argument),
                    lambda n=name, k={**right, argument: value}: getattr(fastrnn.functional, n)(
                        **k
                    ),
                )
        yield (
            f"functional.{name}(unknown=1)",
            "unknown",
            lambda n=name, k=right: getattr(fastrnn.functional, n)(**k, unknown=1),
        )
        yield f"functional.{name}()", "missing", lambda n=name: getattr(fastrnn.functional, n)()
    for argument, values in {
        "a": [
            None,
            3,
            "x",
            X.long(),
            X.to(torch.complex64),
            torch.tensor(1.0),
            X.to_sparse(),
            X.to("meta"),
        ],
        "b": [None, 3, X[1:], X.double(), X.to_sparse(), X.to("meta")],
        "h0": [3, "x", X, X[0, 0], X[0].double(), X[0].to("meta")],
        "reverse": NOT_BOOLS,
    }.items():
        for value in values:
            yield (
                f"linear_scan({argument}={short(value)})",
                argument,
                lambda k={"a": X, "b": X, argument: value}: linear_scan(**k),
            )


def attribute_rows() -> Iterator[Row]:
    """Attributes that are set to a wrong value after the constructor."""
    for name in ("RNN", "LSTM", "GRU"):
        values: dict[str, list[Any]] = {
            "dropout": NOT_PROBABILITIES[:4],
            "zoneout": NOT_PROBABILITIES,
            "recurrent_dropout": NOT_PROBABILITIES,
            "weight_dropout": NOT_PROBABILITIES,
            "recompute": WRONG_OPTIONS["recompute"],
            "weight_dtype": WRONG_OPTIONS["weight_dtype"],
            "num_layers": [1, 3, "x", None],
            "input_size": [I + 1, "x", None],
            "hidden_size": [H + 1, "x", None],
            "bidirectional": [True],
            "proj_size": [2, -1] if name == "LSTM" else [2],
            "mode": ["x", None, 3],
            "layer_norm": [True],
            "residual": [True],
            "batch_first_states": [True],
        }
        for argument, own in values.items():
            for value in own:

                def call(name: str = name, argument: str = argument, value: Any = value) -> None:
                    layer = make(name, num_layers=2).train()
                    setattr(layer, argument, value)
                    layer(X)

                said = {"input_size": "input|weight_ih", "hidden_size": "hidden_size|weight|hidden"}
                yield f"{name}.{argument}={short(value)}", said.get(argument, argument), call
        for parameter in ("weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "bias_hh_l1"):
            for shape in [(1,), (H, H, H), (0,), ()]:

                def call(name: str = name, parameter: str = parameter, shape: Any = shape) -> None:
                    layer = make(name, num_layers=2)
                    setattr(layer, parameter, nn.Parameter(torch.zeros(shape)))
                    layer(X)

                yield f"{name}.{parameter}={list(shape)}", parameter, call
    for name in LINEAR:
        for value in NOT_PROBABILITIES[:4]:

            def call(name: str = name, value: Any = value) -> None:
                layer = make(name, num_layers=2).train()
                layer.dropout = value
                layer(X)

            yield f"{name}.dropout={short(value)}", "dropout", call


def tool_rows() -> Iterator[Row]:
    """Sessions, copies with int8 weights, tbptt, diagnose, explain and define_cell."""

    def lstm(**options: Any) -> Any:
        return fastrnn.LSTM(I, H, **options).eval()

    for value in [0, -1, 1.5, "x", None, True, HUGE]:
        for argument in ("batch_size", "threads"):
            if value is HUGE and argument == "threads":
                continue
            yield (
                f"stream({argument}={short(value)})",
                argument,
                lambda k={argument: value}: lstm().stream(**k),
            )
    x = X[0, :1]
    for value in [
        None,
        3,
        "x",
        X,
        x[:, :2],
        x.double(),
        x.long(),
        x.to("meta"),
        x.to_sparse(),
        torch.zeros(1, I, requires_grad=True),
    ]:
        yield f"Session.step({short(value)})", "x", lambda v=value: lstm().stream().step(v)
    for value in [
        3,
        X,
        torch.zeros(1, H + 1),
        torch.zeros(1, H).double(),
        torch.zeros(H, 2).t()[:1],
        torch.zeros(1, H).to("meta"),
    ]:
        yield f"Session.step(out={short(value)})", "out", lambda v=value: lstm().stream().step(x, v)
    for value in [None, 3, x, X, X[:0, :1], X[:, :1, :2], X[:, :1].double()]:
        yield f"Session.run({short(value)})", "x", lambda v=value: lstm().stream().run(v)
    for value in [None, 3, X, (X, X), (X,), "x"]:
        yield (
            f"Session.load_state({short(value)})",
            "state",
            lambda v=value: lstm().stream().load_state(v),
        )
    for value in ["x", 1, -2, 1.5, [7], torch.zeros(3, dtype=torch.bool), torch.zeros(1), HUGE]:
        yield f"Session.reset({short(value)})", "rows", lambda v=value: lstm().stream().reset(v)
    for value in [
        None,
        nn.Linear(2, 2),
        nn.LSTM(2, 2),
        "x",
        fastrnn.LSTMCell(2, 2),
        fastrnn.MinGRU(2, 2),
    ]:
        yield f"Session({type(value).__name__})", "layer", lambda v=value: fastrnn.Session(v)
        yield f"quantize({type(value).__name__})", "module", lambda v=value: fastrnn.quantize(v)
        if not isinstance(value, fastrnn.MinGRU):
            yield (
                f"explain({type(value).__name__})",
                "module",
                lambda v=value: fastrnn.explain(3 if isinstance(v, nn.RNNCellBase) else v, X),
            )
    for option in [
        {"bidirectional": True},
        {"layer_norm": True},
        {"zoneout": 0.1},
        {"dtype": torch.complex64},
        {"device": "meta"},
    ]:
        word = next(iter(option))
        said = {"bidirectional": "direction", "dtype": "weight", "device": "weight"}.get(word, word)
        yield f"stream of {option}", said, lambda o=option: lstm(**o).stream()
    for option in [
        {"proj_size": 2},
        {"layer_norm": True},
        {"zoneout": 0.1},
        {"residual": True, "num_layers": 2},
        {"learn_initial_state": True},
        {"batch_first_states": True},
        {"device": "meta"},
    ]:
        word = next(iter(option))
        yield (
            f"quantize {option}",
            {"device": "weight|w_ih"}.get(word, word),
            lambda o=option: fastrnn.quantize(lstm(**o)),
        )
    for value in [
        None,
        3,
        X[0, 0],
        X[..., :2],
        X.long(),
        X.to("meta"),
        X.to_sparse(),
        torch.zeros(T, B, I, requires_grad=True),
    ]:
        yield (
            f"quantized(input={short(value)})",
            "nput",
            lambda v=value: fastrnn.quantize(lstm())(v),
        )
    for value in [3, X, (X, X), (X,), {}]:
        yield (
            f"quantized(hx={short(value)})",
            "hx|hidden",
            lambda v=value: fastrnn.quantize(lstm())(X, v),
        )
    yield "quantized.train()", "mode", lambda: fastrnn.quantize(lstm()).train()
    yield "quantized.weight()", "name", lambda: fastrnn.quantize(lstm()).weight("x")
    yield "prepare in training mode", "mode", lambda: fastrnn.LSTM(I, H).prepare()

    y = torch.zeros(T, B, H)
    right = {
        "module": fastrnn.LSTM(I, H),
        "input": X,
        "targets": y,
        "loss": nn.MSELoss(),
        "chunk_length": 2,
    }
    for argument, values in {
        "module": [None, 3, lambda i, h: i, fastrnn.LSTM(I, H, bidirectional=True)],
        "input": [None, 3, "x", torch.tensor(1.0), X[:0]],
        "targets": [3, "x", y[1:], torch.tensor(1.0)],
        "loss": [None, 3, lambda o, t: o, lambda o, t: 3, lambda o, t: torch.zeros(())],
        "chunk_length": [0, -1, *NOT_INTS, True],
        "update": [3, "x"],
        "chunks_per_update": [0, 2, *NOT_INTS],
        "batch_first": [1, "x", 0.0],
        "reduction": ["none", 3, True],
        "backward": [None, 3],
    }.items():
        for value in values:
            said = {"input": "input|step", "targets": "targets|step"}.get(argument, argument)
            yield (
                f"tbptt({argument}={short(value)})",
                said,
                lambda k={**right, argument: value}: fastrnn.tbptt(**k),
            )

    for value in [None, 3, nn.Linear(I, H), nn.Identity()]:
        yield f"diagnose(model={short(value)})", "model", lambda v=value: diagnose(v, X)
    for value in [None, 3, lambda o: 3, lambda o: o[0], lambda o: torch.zeros(())]:
        yield f"diagnose(loss={short(value)})", "loss", lambda v=value: diagnose(lstm(), X, loss=v)
    yield "diagnose of no steps", "nput|sequence", lambda: diagnose(lstm(), X[:0])
    yield "diagnose with zoneout", "zoneout", lambda: diagnose(fastrnn.LSTM(I, H, zoneout=0.1), X)

    for argument, values in {
        "step": [3, "x"],
        "gates": [0, 17, -1, 1.5, "x", None, True],
        "states": ["h", (), ("h",) * 5, ("h", "h"), (1,), ("1x",), ("weight_ih",), 3, None],
        "parameters": ["w", (1,), ("h",), ("gates_x",), ("class",), 3, None],
        "name": ["1x", "a b", "a-b"],
    }.items():
        for value in values:
            yield (
                f"define_cell({argument}={short(value)})",
                argument,
                lambda k={"step": tanh_step, "gates": 1, argument: value}: fastrnn.define_cell(**k),
            )

    for value in [None, 3, "x", nn.LSTM(I, H), lstm(bidirectional=True), fastrnn.MinGRU(I, H)]:
        yield f"Reversed({short(value)})", "layer", lambda v=value: fastrnn.Reversed(v)
    for value in [None, 3, "x"]:
        yield (
            f"Reversed.forward({short(value)})",
            "input",
            lambda v=value: fastrnn.Reversed(lstm())(v),
        )
    for value in [None, 3, "x", X]:
        yield f"convert({short(value)})", "Module", lambda v=value: fastrnn.convert(v)
        yield f"from_haste({short(value)})", "source", lambda v=value: fastrnn.from_haste(v)
        yield f"from_keras({short(value)})", "source", lambda v=value: fastrnn.from_keras(v)
        yield (
            f"to_keras_weights({short(value)})",
            "module",
            lambda v=value: fastrnn.to_keras_weights(v),
        )
    for options, said in [
        ({"zoneout": 0.1}, "zoneout of module must be 0, got 0.1"),
        ({"layer_norm": True}, "layer_norm of module must be False, got True"),
        ({"learn_initial_state": True}, "learn_initial_state of module must be False, got True"),
    ]:
        yield (
            f"to_keras_weights of {options}",
            said,
            lambda o=options: fastrnn.to_keras_weights(lstm(**o)),
        )
    for name, argument in [
        ("orthogonal_", "gain"),
        ("chrono_", "t_max"),
        ("forget_bias_", "value"),
        ("identity_", "scale"),
    ]:
        for value in [NAN, INF, "x", None, -INF]:
            layer = fastrnn.RNN if name == "identity_" else fastrnn.LSTM
            kind = {"nonlinearity": "relu"} if name == "identity_" else {}
            yield (
                f"init.{name}({argument}={short(value)})",
                argument,
                lambda n=name, v=value, c=layer, k=kind: getattr(fastrnn.init, n)(c(I, H, **k), v),
            )
        yield f"init.{name}(None)", "module", lambda n=name: getattr(fastrnn.init, n)(None, 2.0)


def operator_rows() -> Iterator[Row]:
    """Operators with a meta tensor among tensors of the CPU: nothing may be left uninitialised."""
    operators = torch.ops.fastrnn
    h, weights = torch.zeros(B, H), [torch.zeros(4 * H, H)]
    forward = {
        "pre_x": torch.zeros(T, B, 4 * H),
        "h0": h,
        "c0": h.clone(),
        "parts": weights,
        "slots": 1,
        "batch_sizes": None,
        "reverse": False,
        "cell": "lstm",
        "epsilon": 1e-5,
    }
    y, _, _, saved = operators.recurrence(**forward, saves=True)
    packed = forward | {"pre_x": torch.zeros(3, 4 * H), "batch_sizes": torch.tensor([2, 1])}
    backward = {"d_y": y, "d_h_n": h, "d_c_n": h, **forward, "y": y, "saved": saved}
    del backward["pre_x"]
    product = {"x": torch.zeros(T, I), "w": torch.zeros(H, I)}
    gradients = {"d": torch.zeros(T, H), **product}
    calls = [
        ("recurrence", forward | {"saves": True}),
        ("recurrence", packed | {"saves": True}),
        ("recurrence_gradients", backward),
        ("recurrence_product", product),
        ("recurrence_product_gradients", gradients),
    ]
    for name, right in calls:
        for argument, value in right.items():
            if not isinstance(value, Tensor | list):
                continue
            meta = value.to("meta") if isinstance(value, Tensor) else [t.to("meta") for t in value]
            yield (
                f"{name}({argument} on meta)",
                "device|CPU",
                lambda n=name, k={**right, argument: meta}: getattr(operators, n)(**k),
            )
    layer = fastrnn.LSTM(I, H)
    flat = {
        "h0": torch.zeros(1, B, H),
        "c0": torch.zeros(1, B, H),
        "weights": [w.detach() for w in layer.parameters()],
        "slots": 15,
        "sequence": None,
        "cell": "lstm",
    }
    y, h_n, c_n, saved = operators.recurrent_forward(X, **flat, outputs=-1)
    right = {"d_y": y, "d_h_n": h_n, "d_c_n": c_n, "x": X, **flat, "y": y, "saved": saved}
    for argument, value in right.items():
        if isinstance(value, Tensor):
            wrong = {**right, argument: value.to("meta")}
            yield (
                f"recurrent_gradients({argument} on meta)",
                f"{argument}|device",
                lambda k=wrong: operators.recurrent_gradients(**k, outputs=-1),
            )
    sizes = torch.tensor([2, 1], device="meta")
    rows = flat | {"slots": 15 | 1 << 16, "sequence": [sizes]}
    for name in ("recurrent_layer", "recurrent_states"):
        yield (
            f"{name}(batch_sizes on meta)",
            "batch_sizes",
            lambda n=name: getattr(operators, n)(torch.zeros(3, I), **rows),
        )


def plan_rows() -> Iterator[Row]:
    """Sizes whose products exceed 64 bits."""
    names = ["steps", "batch", "input_size", "hidden_size"]
    for index, name in enumerate(names):
        for value in (-1, 2**31, HUGE, 2**63 - 1):
            sizes = [1, 1, 1, 1]
            sizes[index] = value
            for dtype in ("float32", "bfloat16", "int8"):
                yield (
                    f"plan({name}={value}, {dtype})",
                    name,
                    lambda s=sizes, d=dtype: _C.plan("lstm", *s, dtype=d),
                )


TABLES: list[Callable[[], Iterator[Row]]] = [
    constructor_rows,
    forward_rows,
    packed_rows,
    function_rows,
    attribute_rows,
    tool_rows,
    operator_rows,
    plan_rows,
]


@pytest.mark.parametrize("table", TABLES)
def test_wrong_calls_raise_an_exception_that_names_the_argument(
    table: Callable[[], Iterator[Row]],
) -> None:
    wrong = []
    for label, words, call in table():
        try:
            call()
        except Exception as error:
            message = str(error)
            if not re.search(words, message) or "\n" in message or len(message) > 400:
                wrong.append(f"{label}: {type(error).__name__}: {message}")
        else:
            wrong.append(f"{label}: no exception")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", list(DENSE))
def test_gradients_that_a_layer_does_not_have_are_empty(name: str, bidirectional: bool) -> None:
    """Without a projection there is no w_hr: its gradient must not be uninitialised memory."""
    operators = torch.ops.fastrnn
    layer = DENSE[name](I, H, bidirectional=bidirectional)
    h = torch.zeros(2 if bidirectional else 1, B, H)
    call = {
        "h0": h,
        "c0": h if name == "LSTM" else None,
        "weights": [w.detach() for w in layer.parameters()],
        "slots": 15,
        "sequence": None,
        "cell": layer.mode.lower(),
    }
    y, _, _, saved = operators.recurrent_forward(X, **call, outputs=-1)
    gradients = operators.recurrent_gradients
    if bidirectional:
        gradients = operators.recurrent_bidirectional_gradients
    for outputs in (-1, 1 << 3, 1 << 40):
        results = gradients(y, None, None, X, **call, y=y, saved=saved, outputs=outputs)
        assert results[3].numel() == 0  # d_h_all, which stands for w_hr
        assert all(t.isfinite().all() for t in results)
    assert operators.recurrent_backward(y, None, None, **call, y=y, saved=saved)[1].numel() == 0
