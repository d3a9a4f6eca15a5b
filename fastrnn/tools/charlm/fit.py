"""The training loop: train, show progress, evaluate, save and sample until training ends."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

import torch

from . import schedule
from .report import Reporter
from .sample import generate
from .train import Runner, Stop, Trainer, never_stop

SAMPLE_LENGTH: Final = 300
SAMPLE_TEMPERATURE: Final = 0.8
_RUN_SECONDS: Final = 0.25  # training time between two updates of the progress bar
_RUN_STEPS: Final = 50  # at most, between two updates

Save = Callable[[Trainer, bool], None]


class Outcome(Enum):
    """Reason why training ended."""

    FINISHED = "finished"
    EARLY = "stopped early"
    INTERRUPTED = "interrupted"


def fit(runner: Runner, reporter: Reporter, save: Save, stop: Stop = never_stop) -> Outcome:
    """Trains to the configured step, until validation stops improving, or until ``stop()``.

    Args:
        runner: the training to run.
        reporter: shows the progress.
        save: called with the trainer and whether it is the best so far, after every evaluation
            and, if something has changed since, at the end.
        stop: called between steps. A true result saves and ends the training.

    Returns:
        The reason why training ended.

    Raises:
        TrainingError: the loss is not finite (nothing is saved then), or saving failed.
    """
    trainer = runner.main
    config = trainer.config
    saved_at = sampled_at = trainer.step
    while True:
        if stop():
            outcome = Outcome.INTERRUPTED
            break
        if _evaluation_due(trainer):
            reporter.line(f"step {trainer.step:>6,}/{config.steps:,}: {runner.evaluate()}")
            waited = schedule.evaluations_since_best(trainer.validation_losses)
            save(trainer, waited == 0)
            saved_at = trainer.step
            if 0 < config.patience <= waited:
                outcome = Outcome.EARLY
                break
        finished = trainer.step >= config.steps
        due = config.sample_every and (finished or trainer.step % config.sample_every == 0)
        if due and trainer.step > sampled_at:
            reporter.sample(trainer.step, sample_now(trainer))
            sampled_at = trainer.step
        if finished:
            outcome = Outcome.FINISHED
            break
        runner.run(_steps_until_next_event(trainer), stop)
        reporter.progress(trainer.step, config.steps, runner.status())
    if saved_at != trainer.step or outcome is Outcome.INTERRUPTED:
        save(trainer, False)
    return outcome


def sample_now(trainer: Trainer, length: int = SAMPLE_LENGTH) -> str:
    """Returns a sample of the model. It depends only on the weights, the seed and the step."""
    vocabulary = trainer.corpus.vocabulary
    generator = torch.Generator().manual_seed(trainer.config.seed + trainer.step)
    return "".join(
        generate(
            trainer.model,
            vocabulary,
            prime="\n",
            length=length,
            temperature=SAMPLE_TEMPERATURE,
            generator=generator,
        )
    )


def _evaluation_due(trainer: Trainer) -> bool:
    step, config = trainer.step, trainer.config
    due = step > 0 and (step % config.eval_every == 0 or step == config.steps)
    return due and (not trainer.evaluations or trainer.evaluations[-1].step != step)


def _steps_until_next_event(trainer: Trainer) -> int:
    """Returns the steps of the next run: about a quarter of a second, up to the next event."""
    config, step = trainer.config, trainer.step
    speed = trainer.characters_per_second / config.characters_per_step
    steps = min(_RUN_STEPS, max(1, round(speed * _RUN_SECONDS)), config.steps - step)
    for period in (config.eval_every, config.sample_every):
        if period:
            steps = min(steps, period - step % period)
    return steps
