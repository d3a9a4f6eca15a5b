"""Errors a user can cause or meet: each is one sentence that names what is wrong."""

from __future__ import annotations


class CharlmError(Exception):
    """Something the user gave cannot be used; the text is one sentence.

    ``exit_code`` is what the command line exits with: 2, as for any wrong argument.
    """

    exit_code = 2


class DataError(CharlmError):
    """A text that cannot be read or is too short to train on."""


class CheckpointError(CharlmError):
    """A checkpoint that is missing, damaged, foreign, or does not fit."""


class TrainingError(CharlmError):
    """Training that went wrong although every argument was fine (a loss of NaN, a full disk)."""

    exit_code = 1
