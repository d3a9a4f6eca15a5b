"""The same training twice: with `fastrnn` and with `torch.nn`, step by step.

Both trainings start from the same weights and see the same batches. They alternate in blocks of
steps, and the order within a pair of blocks alternates too, so that a temporary slowdown of the
machine affects both:

    fastrnn 1-10 | torch 1-10 | torch 11-20 | fastrnn 11-20 | fastrnn 21-30 | ...

The speed ratio is the median over blocks of the ratio of the two times. It counts training steps
only: no evaluation, no sampling, no start-up and no warm-up steps.

Rounding makes any two orders of summation drift apart, so a third run of the first steps, with
`torch.nn` in float64, is the reference. `fastrnn` agrees to rounding if its distance from the
reference is at most twice that of `torch.nn` in float32, or within `ERROR_FLOOR`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .checkpoint import write_atomically
from .config import Config
from .data import Corpus
from .model import build_model
from .plot import Curve, draw, training_curve, validation_curve
from .train import NATS_TO_BITS, Stop, Trainer, never_stop

FIRST_STEPS: Final = 20  # must agree to rounding
WARM_UP_STEPS: Final = 10  # not timed
ERROR_FLOOR: Final = 1e-5  # bits per character
NAMES: Final = ("fastrnn", "torch.nn")


@dataclass(frozen=True)
class Block:
    """Times of the same steps in both trainings, in seconds."""

    first_step: int
    steps: int
    fastrnn: float
    torch: float


@dataclass
class Pair:
    """Two trainings that alternate.

    Attributes:
        fastrnn: the training with the modules of `fastrnn`.
        torch: the training with the modules of `torch.nn`, from the same weights.
        blocks: the times so far.
    """

    fastrnn: Trainer
    torch: Trainer
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def start(cls, config: Config, corpus: Corpus) -> Pair:
        """Creates two trainings with the same weights."""
        fastrnn = Trainer(config.changed({"backend": "fastrnn"}), corpus)
        torch_config = config.changed({"backend": "torch"})
        model = build_model(len(corpus.vocabulary), torch_config)
        model.load_state_dict(fastrnn.model.state_dict(), strict=True)
        return cls(fastrnn, Trainer(torch_config, corpus, model))

    @property
    def main(self) -> Trainer:
        """The training that generates samples and is saved: that of `fastrnn`."""
        return self.fastrnn

    def run(self, steps: int, stop: Stop = never_stop) -> None:
        """Runs a block of steps with both trainings. ``stop`` ends both at the same step."""
        first, second = (self.fastrnn, self.torch)[:: -1 if len(self.blocks) % 2 else 1]
        start, before = first.step, (self.fastrnn.seconds, self.torch.seconds)
        first.run(steps, stop)
        done = first.step - start
        second.run(done)
        self.blocks.append(
            Block(
                first_step=start + 1,
                steps=done,
                fastrnn=self.fastrnn.seconds - before[0],
                torch=self.torch.seconds - before[1],
            )
        )

    def evaluate(self) -> str:
        """Measures both validation losses and returns them as one line of text."""
        self.fastrnn.evaluate()
        self.torch.evaluate()
        a, b = self.fastrnn.evaluations[-1], self.torch.evaluations[-1]
        return (
            f"training {a.training:.3f} (torch.nn {b.training:.3f}), "
            f"validation {a.validation:.3f} (torch.nn {b.validation:.3f}) bits/char, "
            f"{self.speeds()}"
        )

    def status(self) -> str:
        """Returns loss and speeds of the last steps as one line of text."""
        return f"{self.fastrnn.recent_bits():.3f} bits/char, {self.speeds()}"

    def speeds(self) -> str:
        """Returns both speeds as text."""
        return (
            f"{self.fastrnn.characters_per_second:,.0f} chars/s "
            f"(torch.nn {self.torch.characters_per_second:,.0f})"
        )


def float64_losses(pair: Pair, steps: int, stop: Stop = never_stop) -> list[float]:
    """Returns the losses (nats) of the first steps with `torch.nn` in float64.

    The run starts from the weights of the pair, which must be untrained.
    """
    model = build_model(len(pair.torch.corpus.vocabulary), pair.torch.config)
    model.load_state_dict(pair.torch.model.state_dict(), strict=True)
    trainer = Trainer(pair.torch.config, pair.torch.corpus, model.double())
    trainer.run(steps, stop)
    return trainer.losses


@dataclass(frozen=True)
class Comparison:
    """Results of two trainings. Losses and differences are in bits per character.

    Attributes:
        steps: number of steps that both trainings completed.
        first_steps: number of first steps, which must agree to rounding.
        first_difference: largest difference of the two losses in the first steps.
        largest_difference: largest difference of the two losses in all steps.
        fastrnn_error: largest error of `fastrnn` against float64 in the first steps, or None.
        torch_error: largest error of `torch.nn` against float64 in the first steps, or None.
        speed_ratio: time of `torch.nn` / time of `fastrnn`; None if too few steps were timed.
        fastrnn_speed: characters per second of `fastrnn` over the timed steps.
        torch_speed: characters per second of `torch.nn` over the timed steps.
        rows: (step, loss with `fastrnn`, loss with `torch.nn`) at some steps.
        validation: (step, loss with `fastrnn`, loss with `torch.nn`) at every evaluation.
    """

    steps: int
    first_steps: int
    first_difference: float
    largest_difference: float
    fastrnn_error: float | None
    torch_error: float | None
    speed_ratio: float | None
    fastrnn_speed: float
    torch_speed: float
    rows: list[tuple[int, float, float]]
    validation: list[tuple[int, float, float]]

    @property
    def agrees(self) -> bool | None:
        """Whether the first steps agree to rounding; None without a float64 run."""
        if self.fastrnn_error is None or self.torch_error is None:
            return None
        return self.fastrnn_error <= max(2 * self.torch_error, ERROR_FLOOR)

    def lines(self) -> list[str]:
        """Returns the comparison as lines of text."""
        lines = ["", "loss in bits per character, from the same weights on the same batches:"]
        lines.append(f"{'step':>10}  {'fastrnn':>10}  {'torch.nn':>10}  {'difference':>10}")
        for step, a, b in self.rows:
            lines.append(f"{step:>10,}  {a:>10.6f}  {b:>10.6f}  {abs(a - b):>10.1e}")
        lines.append(f"{'validation':>10}")
        for step, a, b in self.validation:
            lines.append(f"{step:>10,}  {a:>10.6f}  {b:>10.6f}  {abs(a - b):>10.1e}")
        lines.append(
            f"largest difference in the first {self.first_steps} steps: "
            f"{self.first_difference:.1e}, in all {self.steps:,} steps: "
            f"{self.largest_difference:.1e} bits/char"
        )
        if self.fastrnn_error is not None and self.torch_error is not None:
            verdict = (
                "they agree to float rounding"
                if self.agrees
                else "they DIFFER BY MORE than float rounding explains"
            )
            lines.append(
                f"against the same first steps in float64: fastrnn is off by at most "
                f"{self.fastrnn_error:.1e}, torch.nn by {self.torch_error:.1e}: {verdict}"
            )
        lines.append(
            f"training speed: fastrnn {self.fastrnn_speed:,.0f}, "
            f"torch.nn {self.torch_speed:,.0f} characters/s"
        )
        if self.speed_ratio is None:
            lines.append(f"too few steps to compare the speed (the first {WARM_UP_STEPS} warm up)")
        else:
            lines.append(
                f"fastrnn trains {self.speed_ratio:.2f} times as fast as torch.nn "
                "(median over alternating blocks of steps, training time only)"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as plain data."""
        return {**vars(self), "agrees": self.agrees}


def compare(pair: Pair, truth: Sequence[float] = ()) -> Comparison:
    """Compares two trainings over the steps that both completed.

    Args:
        pair: the trainings.
        truth: result of `float64_losses`; empty with dropout, which drops other units in float64.
    """
    a = [loss * NATS_TO_BITS for loss in pair.fastrnn.losses]
    b = [loss * NATS_TO_BITS for loss in pair.torch.losses]
    steps = min(len(a), len(b))
    first = min(FIRST_STEPS, steps)
    exact = [loss * NATS_TO_BITS for loss in truth[:first]]
    timed = [block for block in pair.blocks if block.steps and block.first_step > WARM_UP_STEPS]
    characters = sum(block.steps for block in timed) * pair.fastrnn.config.characters_per_step
    return Comparison(
        steps=steps,
        first_steps=first,
        first_difference=largest_difference(a[:first], b[:first]),
        largest_difference=largest_difference(a, b),
        fastrnn_error=largest_difference(a, exact) if exact else None,
        torch_error=largest_difference(b, exact) if exact else None,
        speed_ratio=(
            statistics.median(block.torch / block.fastrnn for block in timed) if timed else None
        ),
        fastrnn_speed=characters / sum(block.fastrnn for block in timed) if timed else 0.0,
        torch_speed=characters / sum(block.torch for block in timed) if timed else 0.0,
        rows=[(step, a[step - 1], b[step - 1]) for step in shown_steps(steps)],
        validation=[
            (x.step, x.validation, y.validation)
            for x, y in zip(pair.fastrnn.evaluations, pair.torch.evaluations, strict=False)
        ],
    )


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the largest |a_i - b_i| over the common length; 0 if it is empty."""
    return max((abs(x - y) for x, y in zip(a, b, strict=False)), default=0.0)


def shown_steps(steps: int) -> list[int]:
    """Returns the steps shown in the table: 1, 2, 5, 10, 20, 50, ... and the last."""
    shown = [lead * 10**power for power in range(10) for lead in (1, 2, 5)]
    return [*(step for step in shown if step < steps), steps] if steps else []


def save_comparison(folder: Path, pair: Pair, comparison: Comparison) -> None:
    """Writes ``compare.json`` and the plot ``loss.png``.

    Raises:
        TrainingError: a file cannot be written.
    """
    data = json.dumps(comparison.to_json(), indent=1) + "\n"
    write_atomically(folder / "compare.json", data.encode())
    trainers = (pair.fastrnn, pair.torch)
    names = tuple(zip(NAMES, trainers, strict=True))
    draw(
        folder / "loss.png",
        f"fastrnn charlm --compare, {pair.fastrnn.config.cell}: the same training twice",
        [training_curve(f"training, {name}", trainer.losses) for name, trainer in names],
        [validation_curve(f"validation, {name}", trainer) for name, trainer in names],
        speed_curves(pair),
    )


def speed_curves(pair: Pair) -> list[Curve]:
    """Returns the characters per second of each timed block, for both trainings."""
    timed = [block for block in pair.blocks if block.steps and block.first_step > WARM_UP_STEPS]
    size = pair.fastrnn.config.characters_per_step
    x = [block.first_step + (block.steps - 1) / 2 for block in timed]
    return [
        Curve(NAMES[0], x, [block.steps * size / block.fastrnn for block in timed]),
        Curve(NAMES[1], x, [block.steps * size / block.torch for block in timed]),
    ]
