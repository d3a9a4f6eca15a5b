"""Exceptions of the character model. Each message is one line that names the problem."""

from __future__ import annotations


class CharlmError(Exception):
    """An argument or a file is invalid. The message is one line.

    ``exit_code`` is the exit code of the command line: 2, as for any wrong argument.
    """

    exit_code = 2


class DataError(CharlmError):
    """A text cannot be read or is too short to train on."""


class CheckpointError(CharlmError):
    """A checkpoint is missing, damaged, of another program, or does not fit the options."""


class TrainingError(CharlmError):
    """Training failed although every argument was valid (a loss of NaN, a full disk)."""

    exit_code = 1
