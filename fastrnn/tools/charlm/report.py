"""Progress output: plain lines for files and pipes, a live bar for terminals."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS: Final = 10.0  # between two progress lines without a terminal
BAR_SECONDS: Final = 0.25  # between two updates of the bar


class Reporter(Protocol):
    """Shows the progress of a training. The training code itself never prints."""

    def line(self, text: str) -> None:
        """Shows a line of plain text."""

    def progress(self, step: int, steps: int, status: str) -> None:
        """Shows the progress. May be called often; limits the rate of the output."""

    def sample(self, step: int, text: str) -> None:
        """Shows text that the model generated at a step."""

    def close(self) -> None:
        """Restores the terminal. May be called twice."""


class PlainReporter:
    """Writes lines of text, for files and pipes.

    Args:
        stream: the output, flushed after each line.
        clock: returns seconds; replaced in tests.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown = clock()

    def line(self, text: str) -> None:
        """Writes a line."""
        self._shown = self._clock()
        self._stream.write(text + "\n")
        self._stream.flush()

    def progress(self, step: int, steps: int, status: str) -> None:
        """Writes a line if the last line is at least `PLAIN_SECONDS` old."""
        if self._clock() - self._shown >= PLAIN_SECONDS:
            self.line(f"step {step:>6,}/{steps:,}: {status}")

    def sample(self, step: int, text: str) -> None:
        """Writes the sample, each line with a marker."""
        self.line(f"at step {step:,} the model writes:")
        for row in text.strip("\n").split("\n"):
            self.line(f"    | {row}".rstrip())

    def close(self) -> None:
        """Does nothing."""


class RichReporter:
    """Shows a live bar below the lines.

    The training loop draws the bar a few times per second. A drawing thread would compete with the
    training for the interpreter.

    Args:
        console: a rich console.
        clock: returns seconds; replaced in tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._clock = clock
        self._drawn = -BAR_SECONDS
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=None, status="", visible=False)
        self._running = False

    def line(self, text: str) -> None:
        """Writes a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, step: int, steps: int, status: str) -> None:
        """Draws the bar if the last update is at least `BAR_SECONDS` old."""
        now = self._clock()
        if now - self._drawn < BAR_SECONDS and step < steps:
            return
        self._drawn = now
        if not self._running:
            self._bar.start()
            self._running = True
        self._bar.update(self._task, completed=step, total=steps, status=status, visible=True)
        self._bar.refresh()

    def sample(self, step: int, text: str) -> None:
        """Writes the sample in a box above the bar."""
        from rich.panel import Panel
        from rich.text import Text

        self._console.print(
            Panel(Text(text.strip("\n")), title=f"step {step:,}", title_align="left")
        )

    def close(self) -> None:
        """Removes the bar."""
        if self._running:
            self._bar.stop()
            self._running = False


def reporter_for(stream: TextIO) -> Reporter:
    """Returns a live bar if the stream is a terminal, plain lines otherwise."""
    if not stream.isatty():
        return PlainReporter(stream)
    from rich.console import Console

    return RichReporter(Console(file=stream))
