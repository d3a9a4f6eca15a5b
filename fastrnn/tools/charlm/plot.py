"""The loss curve as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .checkpoint import write_atomically
from .train import NATS_TO_BITS, Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS: Final = 400  # per curve; more are not visible


@dataclass(frozen=True)
class Curve:
    """A curve of a plot: its name, x and y values."""

    name: str
    x: list[float]
    y: list[float]


def training_curve(name: str, losses: Sequence[float]) -> Curve:
    """Returns training losses (nats, one per step) in bits per character.

    Averages neighbouring steps so that the curve has at most `_POINTS` points.
    """
    width = max(1, -(-len(losses) // _POINTS))
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    return Curve(
        name,
        x=[index * width + (len(group) + 1) / 2 for index, group in enumerate(groups)],
        y=[sum(group) / len(group) * NATS_TO_BITS for group in groups],
    )


def validation_curve(name: str, trainer: Trainer) -> Curve:
    """Returns the validation losses of a training in bits per character."""
    return Curve(
        name,
        x=[float(evaluation.step) for evaluation in trainer.evaluations],
        y=[evaluation.validation for evaluation in trainer.evaluations],
    )


def plot_training(path: Path, trainer: Trainer) -> None:
    """Draws training and validation loss against steps.

    Raises:
        TrainingError: the file cannot be written.
    """
    training = training_curve("training", trainer.losses)
    validation = validation_curve("validation", trainer)
    draw(path, f"fastrnn charlm, {trainer.config.cell}", [training], [validation])


def draw(
    path: Path,
    title: str,
    training: Sequence[Curve],
    validation: Sequence[Curve],
    speed: Sequence[Curve] = (),
) -> None:
    """Draws bits per character against steps and, below, characters per second.

    Args:
        path: the PNG file to write.
        title: title of the plot.
        training: curves drawn as lines.
        validation: curves drawn as lines with markers.
        speed: curves of characters per second. The lower plot is omitted if there are none.

    Raises:
        TrainingError: the file cannot be written.
    """
    # The object interface with Agg opens no window and leaves the global state of pyplot alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7 if speed else 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    heights = [2, 1] if speed else [1]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    losses: Axes = axes[0, 0]
    # Equal curves would hide each other, so each further curve is thinner, dashed and on top.
    for index, curve in enumerate(training):
        losses.plot(
            curve.x,
            curve.y,
            label=curve.name,
            zorder=2 + index,
            linestyle="--" if index else "-",
            linewidth=1.2 if index else 2.5,
        )
    for index, curve in enumerate(validation):
        losses.plot(
            curve.x,
            curve.y,
            label=curve.name,
            marker="x" if index else "o",
            linestyle=":",
            zorder=4 + index,
        )
    losses.set_title(title)
    losses.set_ylabel("loss (bits per character)")
    losses.grid(alpha=0.3)
    losses.legend()
    if speed:
        speeds: Axes = axes[1, 0]
        for curve in speed:
            speeds.plot(curve.x, curve.y, label=curve.name)
        speeds.set_ylim(bottom=0)
        speeds.set_ylabel("characters per second")
        speeds.grid(alpha=0.3)
        speeds.legend()
    axes[-1, 0].set_xlabel("step")
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_atomically(path, picture.getvalue())
