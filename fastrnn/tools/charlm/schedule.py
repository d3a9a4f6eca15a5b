"""Learning rate and early stopping, as pure functions of the step and the losses so far.

These functions keep no state, so a checkpoint has none to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from .config import Config

COSINE_END: Final = 0.1  # fraction of the learning rate at the end of the cosine
PLATEAU_PATIENCE: Final = 2  # evaluations without a new best before the rate is reduced
PLATEAU_FACTOR: Final = 0.5  # of each reduction


def learning_rate(config: Config, step: int, validation: Sequence[float]) -> float:
    """Returns the learning rate of a step.

    constant: lr.  cosine: from lr to 0.1 lr along half a cosine.  plateau: halved after every
    two evaluations without a new best.  Each starts with ``warmup`` steps of linear growth.

    Args:
        config: lr, schedule, warmup, steps.
        step: index of the next step, from 0.
        validation: validation losses so far, oldest first.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        wave = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return config.learning_rate * (COSINE_END + (1 - COSINE_END) * wave)
    if config.schedule == "plateau":
        return config.learning_rate * PLATEAU_FACTOR ** plateaus(validation)
    return config.learning_rate


def plateaus(validation: Sequence[float]) -> int:
    """Returns how often `PLATEAU_PATIENCE` consecutive evaluations brought no new best."""
    best, waited, count = math.inf, 0, 0
    for value in validation:
        waited = 0 if value < best else waited + 1
        best = min(best, value)
        if waited == PLATEAU_PATIENCE:
            waited, count = 0, count + 1
    return count


def evaluations_since_best(validation: Sequence[float]) -> int:
    """Returns the number of evaluations since the best one (0: the last one is the best)."""
    if not validation:
        return 0
    return len(validation) - 1 - validation.index(min(validation))
