"""Every option of a training run, with its default and its check."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from .errors import CharlmError

CELLS: Final = ("rnn", "lstm", "gru")
NONLINEARITIES: Final = ("tanh", "relu", "sigmoid")
BACKENDS: Final = ("fastrnn", "torch")
SCHEDULES: Final = ("constant", "cosine", "plateau")


@dataclass(frozen=True)
class Config:
    """The options of a run, as saved in a checkpoint.

    Raises:
        CharlmError: a value is out of range. The message names the command line option.
    """

    cell: str = "rnn"
    nonlinearity: str = "tanh"
    layers: int = 1
    hidden: int = 256
    embedding: int = 0  # 0: same as hidden, as in the textbook
    seq_length: int = 64
    batch_size: int = 32
    steps: int = 2000
    learning_rate: float = 2e-3
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 1.0  # 0: no clipping
    dropout: float = 0.0
    patience: int = 0  # 0: no early stopping
    eval_every: int = 200
    sample_every: int = 500  # 0: no samples
    seed: int = 0
    backend: str = "fastrnn"
    device: str = "cpu"
    threads: int = 0  # 0: torch's choice

    def __post_init__(self) -> None:
        for field in fields(self):
            option, check, wanted = _CHECKS[field.name]
            value = getattr(self, field.name)
            if not check(value):
                raise CharlmError(f"{option} must be {wanted}, got {value!r}")
        if self.cell != "rnn" and self.nonlinearity != "tanh":
            raise CharlmError(
                f"--nonlinearity {self.nonlinearity} needs --cell rnn; "
                f"the nonlinearities of --cell {self.cell} are fixed"
            )
        if self.backend == "torch" and self.nonlinearity == "sigmoid":
            raise CharlmError(
                "--nonlinearity sigmoid needs --backend fastrnn; "
                "torch.nn.RNN supports only tanh and relu"
            )

    @property
    def embedding_size(self) -> int:
        """Size of the embedding of a character."""
        return self.embedding or self.hidden

    @property
    def characters_per_step(self) -> int:
        """Characters per training step, T * B."""
        return self.seq_length * self.batch_size

    def to_json(self) -> dict[str, Any]:
        """Returns the options as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Returns the options from plain data, the inverse of `to_json`.

        Raises:
            CharlmError: an option is unknown, missing or out of range.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            different = ", ".join(sorted(set(data) ^ names))
            raise CharlmError(f"the options must be those of this version, different: {different}")
        return cls(**data)

    def changed(self, given: Mapping[str, Any]) -> Config:
        """Returns a copy with the given options set."""
        return replace(self, **given)


def option_name(field: str) -> str:
    """Returns the command line option of a field, e.g. ``--lr`` for ``learning_rate``."""
    return _CHECKS[field][0]


_DEVICE: Final = r"cpu|cuda(:(0|[1-9][0-9]?))?"

_Check = tuple[str, Callable[[Any], bool], str]


def is_number(value: object) -> bool:
    """Whether a value is an int or float within the range of float64: no bool, NaN or infinity."""
    # The comparison is false for NaN and exact for an int of any size.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _integer(option: str, least: int, most: int | None = None) -> _Check:
    def check(value: Any) -> bool:
        # The limit 2**31 keeps every product of two options within 64 bits.
        return type(value) is int and least <= value <= (2**31 - 1 if most is None else most)

    wanted = f"a whole number from {least} " + ("up" if most is None else f"to {most}")
    return option, check, wanted


def _number(option: str, allowed: Callable[[float], bool], wanted: str) -> _Check:
    def check(value: Any) -> bool:
        return is_number(value) and allowed(value)

    return option, check, wanted


def _choice(option: str, choices: tuple[str, ...]) -> _Check:
    return option, lambda value: value in choices, "one of " + ", ".join(choices)


_CHECKS: Final[dict[str, _Check]] = {
    "cell": _choice("--cell", CELLS),
    "nonlinearity": _choice("--nonlinearity", NONLINEARITIES),
    "layers": _integer("--layers", 1, 1024),
    "hidden": _integer("--hidden", 1),
    "embedding": _integer("--embedding", 0),
    "seq_length": _integer("--seq-length", 1),
    "batch_size": _integer("--batch-size", 1),
    "steps": _integer("--steps", 1),
    "learning_rate": _number(
        "--lr", lambda value: 0 < value <= 1000, "a number above 0 and at most 1000"
    ),
    "schedule": _choice("--schedule", SCHEDULES),
    "warmup": _integer("--warmup", 0),
    "clip": _number("--clip", lambda value: value >= 0, "a number from 0 up (0: no clipping)"),
    "dropout": _number("--dropout", lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    "patience": _integer("--patience", 0),
    "eval_every": _integer("--eval-every", 1),
    "sample_every": _integer("--sample-every", 0),
    "seed": _integer("--seed", 0),
    "backend": _choice("--backend", BACKENDS),
    "device": (
        "--device",
        lambda value: isinstance(value, str) and re.fullmatch(_DEVICE, value) is not None,
        "cpu, cuda or cuda:N",
    ),
    "threads": _integer("--threads", 0, 1024),
}
