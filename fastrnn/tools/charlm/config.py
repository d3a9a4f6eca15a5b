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
    """The options of a run; what is saved with a checkpoint and compared when one is resumed.

    Raises:
        CharlmError: a value is out of range; the sentence names the command line's option.
    """

    cell: str = "rnn"
    nonlinearity: str = "tanh"
    layers: int = 1
    hidden: int = 256
    embedding: int = 0  # 0: as wide as the hidden layer, as in the textbook
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
    threads: int = 0  # 0: what torch decides

    def __post_init__(self) -> None:
        for field in fields(self):
            option, check, wanted = _CHECKS[field.name]
            value = getattr(self, field.name)
            if not check(value):
                raise CharlmError(f"{option} must be {wanted}, got {value!r}")
        if self.cell != "rnn" and self.nonlinearity != "tanh":
            raise CharlmError(
                f"--nonlinearity {self.nonlinearity} needs --cell rnn, "
                f"the gates of --cell {self.cell} are fixed"
            )
        if self.backend == "torch" and self.nonlinearity == "sigmoid":
            raise CharlmError(
                "--nonlinearity sigmoid needs --backend fastrnn, "
                "torch.nn.RNN knows only tanh and relu"
            )

    @property
    def embedding_size(self) -> int:
        """Width of a character's embedding."""
        return self.embedding or self.hidden

    @property
    def characters_per_step(self) -> int:
        """Characters that one training step sees, T * B."""
        return self.seq_length * self.batch_size

    def to_json(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """The inverse of `to_json`.

        Raises:
            CharlmError: an option is unknown, missing or out of range.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            odd = ", ".join(sorted(set(data) ^ names))
            raise CharlmError(f"the options differ from those this version knows ({odd})")
        return cls(**data)

    def changed(self, given: Mapping[str, Any]) -> Config:
        """This configuration with the given options set."""
        return replace(self, **given)


def option_name(field: str) -> str:
    """The command line's name of a field, e.g. ``--lr`` for ``learning_rate``."""
    return _CHECKS[field][0]


_DEVICE: Final = r"cpu|cuda(:(0|[1-9][0-9]?))?"

_Check = tuple[str, Callable[[Any], bool], str]


def is_number(value: object) -> bool:
    """Whether this is an int or a float that a float64 can hold: no bool, NaN or infinity."""
    # The comparison is false for NaN, and exact for an int of any size.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _whole(option: str, least: int, most: int | None = None) -> _Check:
    def check(value: Any) -> bool:
        # 2**31 keeps every product of two options inside 64 bits.
        return type(value) is int and least <= value <= (2**31 - 1 if most is None else most)

    wanted = f"a whole number from {least} " + ("up" if most is None else f"to {most}")
    return option, check, wanted


def _real(option: str, allowed: Callable[[float], bool], wanted: str) -> _Check:
    def check(value: Any) -> bool:
        return is_number(value) and allowed(value)

    return option, check, wanted


def _choice(option: str, choices: tuple[str, ...]) -> _Check:
    return option, lambda value: value in choices, "one of " + ", ".join(choices)


_CHECKS: Final[dict[str, _Check]] = {
    "cell": _choice("--cell", CELLS),
    "nonlinearity": _choice("--nonlinearity", NONLINEARITIES),
    "layers": _whole("--layers", 1),
    "hidden": _whole("--hidden", 1),
    "embedding": _whole("--embedding", 0),
    "seq_length": _whole("--seq-length", 1),
    "batch_size": _whole("--batch-size", 1),
    "steps": _whole("--steps", 1),
    "learning_rate": _real(
        "--lr", lambda value: 0 < value <= 1000, "a number above 0 and at most 1000"
    ),
    "schedule": _choice("--schedule", SCHEDULES),
    "warmup": _whole("--warmup", 0),
    "clip": _real("--clip", lambda value: value >= 0, "a number from 0 up (0: no clipping)"),
    "dropout": _real("--dropout", lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    "patience": _whole("--patience", 0),
    "eval_every": _whole("--eval-every", 1),
    "sample_every": _whole("--sample-every", 0),
    "seed": _whole("--seed", 0),
    "backend": _choice("--backend", BACKENDS),
    "device": (
        "--device",
        lambda value: isinstance(value, str) and re.fullmatch(_DEVICE, value) is not None,
        "cpu, cuda or cuda:N",
    ),
    "threads": _whole("--threads", 0, 1024),
}
