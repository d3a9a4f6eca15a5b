"""What ``fastrnn charlm`` does: train, compare, resume; and ``fastrnn charlm sample``: write."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from . import checkpoint, compare
from .config import BACKENDS, CELLS, NONLINEARITIES, SCHEDULES, Config, option_name
from .data import Corpus, Text, prepare, read_files, read_standard_library
from .errors import CharlmError, CheckpointError, TrainingError
from .fit import Outcome, fit
from .interrupt import Interrupts
from .model import build_model, check_device, parameter_count
from .plot import plot_training
from .report import Reporter, reporter_for
from .sample import generate
from .train import Trainer, load_weights

DEFAULT_OUTPUT: Final = "charlm-run"
SIGNAL_EXIT: Final = 128  # plus the signal's number, as shells have it: 130 for Ctrl-C

MakeParser = Callable[..., argparse.ArgumentParser]

# Options that a resumed run may change; the others belong to what was saved.
_CHANGEABLE: Final = ("steps", "eval_every", "sample_every", "patience", "threads", "device")

_HELP: Final = {
    "cell": "the recurrent layer: " + ", ".join(CELLS),
    "nonlinearity": "of --cell rnn: " + ", ".join(NONLINEARITIES),
    "layers": "recurrent layers",
    "hidden": "size of the hidden state",
    "embedding": "size of a character's embedding (0: as --hidden)",
    "seq_length": "characters of a chunk: gradients reach so far back",
    "batch_size": "parallel streams of text",
    "steps": "training steps",
    "learning_rate": "Adam's learning rate",
    "schedule": "of the learning rate: " + ", ".join(SCHEDULES),
    "warmup": "steps over which the learning rate rises",
    "clip": "largest norm of the gradients (0: no clipping)",
    "dropout": "between layers and before the decoder",
    "patience": "stop after so many evaluations without a better one (0: never)",
    "eval_every": "steps between two validations",
    "sample_every": "steps between two samples (0: none)",
    "seed": "of weights, dropout and samples",
    "backend": "whose recurrent layer: " + ", ".join(BACKENDS),
    "device": "cpu, cuda or cuda:N",
    "threads": "of the CPU (0: as torch decides)",
}


def main(arguments: Sequence[str], make_parser: MakeParser) -> int:
    """Runs ``fastrnn charlm`` with these arguments and returns the exit code.

    Args:
        arguments: what follows ``charlm``.
        make_parser: makes an argument parser, whose errors exit with 2.
    """
    try:
        if arguments[:1] == ["sample"]:
            return write(_sample_parser(make_parser).parse_args(arguments[1:]), sys.stdout)
        return train(_train_parser(make_parser).parse_args(arguments), sys.stdout)
    except CharlmError as error:
        print(f"fastrnn charlm: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            "fastrnn charlm: out of memory: try a smaller --hidden, --batch-size, --seq-length "
            "or --text",
            file=sys.stderr,
        )
        return TrainingError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    # The CPU's allocator has no exception of its own.
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


# -- training -------------------------------------------------------------------------------------


def _train_parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn charlm",
        allow_abbrev=False,
        description="Trains a character-level language model. "
        "`fastrnn charlm sample --help` tells how it writes.",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="what to train on (default: the Python source of the standard library)",
    )
    parser.add_argument("--encoding", help="of the files (default: utf-8)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for checkpoints and the loss curve "
        f"(default: {DEFAULT_OUTPUT}, or {DEFAULT_OUTPUT}-2 and so on where there is one)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that --output holds already"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="CHECKPOINT", help="go on with a run: its folder or .json"
    )
    parser.add_argument(
        "--compare", action="store_true", help="train with torch.nn too, and compare"
    )
    for field in fields(Config):
        default: Any = field.default
        # Values keep their type here and are checked in one place, Config.
        parser.add_argument(
            option_name(field.name),
            dest=field.name,
            type=type(default),
            metavar={int: "N", float: "X", str: "NAME"}[type(default)],
            help=f"{_HELP[field.name]} (default: {default})",
        )
    return parser


def train(options: argparse.Namespace, stream: TextIO) -> int:
    """Trains as the options say and returns the exit code.

    Raises:
        CharlmError: an option, a text or a checkpoint cannot be used, or training failed.
    """
    given = {
        field.name: getattr(options, field.name)
        for field in fields(Config)
        if getattr(options, field.name) is not None
    }
    if options.compare and options.resume:
        raise CharlmError("--compare starts from new weights, it cannot be used with --resume")
    if options.compare and "backend" in given:
        raise CharlmError("--compare trains with both backends, it cannot be used with --backend")
    saved = _load_for_resuming(options.resume, given) if options.resume else None
    config = saved.config.changed(given) if saved else Config(**given)
    if options.compare:
        config.changed({"backend": "torch"})  # whose own checks must pass as well
    check_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    text = _read_text(options, saved)
    corpus = prepare(
        text,
        config.batch_size,
        config.seq_length,
        config.device,
        saved.vocabulary if saved else None,
    )
    folder = _output_folder(options, saved)
    reporter = reporter_for(stream)
    try:
        with Interrupts() as interrupted:
            if options.compare:
                outcome = _compare(reporter, config, corpus, folder, interrupted)
            else:
                outcome = _train(reporter, config, corpus, folder, saved, interrupted)
    finally:
        reporter.close()
    if outcome is Outcome.INTERRUPTED:
        print(
            f"fastrnn charlm: interrupted, everything is saved; "
            f"fastrnn charlm --resume {folder} goes on",
            file=sys.stderr,
        )
        return SIGNAL_EXIT + (interrupted.signal or 0)
    return 0


def _train(
    reporter: Reporter,
    config: Config,
    corpus: Corpus,
    folder: Path,
    saved: checkpoint.Checkpoint | None,
    interrupted: Interrupts,
) -> Outcome:
    trainer = Trainer(config, corpus)
    if saved:
        saved.restore(trainer)
    _introduce(reporter, trainer, folder)
    if saved:
        reporter.line(f"resumes at step {trainer.step:,} of {config.steps:,}")
    outcome = fit(trainer, reporter, _saver(folder), interrupted)
    if trainer.losses:
        plot_training(folder / "loss.png", trainer)
    reporter.line(
        f"{outcome.value} at step {trainer.step:,}: {trainer.recent_bits():.3f} bits/char, "
        f"{trainer.seconds:,.1f} s of training"
    )
    reporter.line(_what_is_in(folder, "loss.png"))
    return outcome


def _compare(
    reporter: Reporter, config: Config, corpus: Corpus, folder: Path, interrupted: Interrupts
) -> Outcome:
    pair = compare.Pair.start(config, corpus)
    _introduce(reporter, pair.fastrnn, folder)
    referee: list[float] = []
    if config.dropout == 0:  # in float64 other units would be dropped
        first = min(compare.FIRST_STEPS, config.steps)
        reporter.line(f"the first {first} steps in float64, as a referee ...")
        referee = compare.referee_losses(pair, first, interrupted)
    outcome = fit(pair, reporter, _saver(folder), interrupted)
    if pair.fastrnn.losses:
        comparison = compare.compare(pair, referee)
        for line in comparison.lines():
            reporter.line(line)
        compare.save_comparison(folder, pair, comparison)
    reporter.line(_what_is_in(folder, "loss.png, compare.json"))
    return outcome


def _saver(folder: Path) -> Callable[[Trainer, bool], None]:
    def save(trainer: Trainer, best: bool) -> None:
        checkpoint.save(folder, checkpoint.LATEST, trainer)
        if best:
            checkpoint.save(folder, checkpoint.BEST, trainer)

    return save


def _introduce(reporter: Reporter, trainer: Trainer, folder: Path) -> None:
    config, corpus = trainer.config, trainer.corpus
    reporter.line(f"text     {corpus.text.description}")
    reporter.line(
        f"         {len(corpus.text.content):,} characters, "
        f"a vocabulary of {len(corpus.vocabulary)}"
    )
    kind = config.cell.upper() + (f" ({config.nonlinearity})" if config.cell == "rnn" else "")
    reporter.line(
        f"model    {config.layers} x {kind}, hidden size {config.hidden}: "
        f"{parameter_count(trainer.model):,} parameters"
    )
    reporter.line(
        f"training {config.steps:,} steps of {config.batch_size} x {config.seq_length} characters "
        f"on {config.device} ({torch.get_num_threads()} threads), output in {folder}/"
    )


def _what_is_in(folder: Path, others: str) -> str:
    name = shlex.quote(str(folder))
    return (
        f"{folder}/ holds latest.json and best.json (checkpoints), {others}; "
        f'to read more: fastrnn charlm sample {name} --prime "def "'
    )


def _load_for_resuming(path: Path, given: dict[str, Any]) -> checkpoint.Checkpoint:
    """The checkpoint to go on from, whose options the given ones do not contradict.

    Raises:
        CharlmError: the checkpoint cannot be used, is finished, or has other options.
    """
    saved = checkpoint.load(checkpoint.find(path, (checkpoint.LATEST,)))
    old = saved.config.to_json()
    fixed = [name for name in given if name not in _CHANGEABLE and given[name] != old[name]]
    if fixed:
        name = fixed[0]
        raise CharlmError(
            f"{option_name(name)} cannot be changed with --resume ({saved.path} has {old[name]}); "
            "what can: " + ", ".join(option_name(name) for name in _CHANGEABLE)
        )
    steps = given.get("steps", saved.config.steps)
    if saved.step >= steps:
        raise CharlmError(
            f"{saved.path}: is at step {saved.step:,} already, give more --steps than {steps:,}"
        )
    return saved


def _read_text(options: argparse.Namespace, saved: checkpoint.Checkpoint | None) -> Text:
    """The text of the options, or of the run that goes on.

    Raises:
        CheckpointError: it is not the text that the run was trained on.
    """
    files = options.text
    encoding = options.encoding or "utf-8"
    if saved and not files:
        files = saved.text["files"]
        encoding = options.encoding or saved.text["encoding"]
    elif options.encoding and not files:
        raise CharlmError("--encoding is of the files of --text, which is not given")
    text = read_files(files, encoding) if files else read_standard_library()
    if saved and text.digest != saved.text["sha256"]:
        raise CheckpointError(
            f"{saved.path}: was trained on another text than {text.description} is now, "
            "give the same one with --text FILE"
        )
    return text


def _output_folder(options: argparse.Namespace, saved: checkpoint.Checkpoint | None) -> Path:
    """Makes the folder of this run; only on request in the place of another run.

    Raises:
        CharlmError: it holds a run, or cannot be made or written to.
    """
    folder: Path = options.output or (saved.path.parent if saved else _free_folder())
    runs = [folder / f"{name}.json" for name in (checkpoint.LATEST, checkpoint.BEST)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CharlmError(f"--output {folder}: cannot be written to")
        # A run that is resumed goes on in its own folder.
        other = not saved or not folder.samefile(saved.path.parent)
        if other and any(run.exists() for run in runs):
            if not options.overwrite:
                raise CharlmError(
                    f"--output {folder}: holds a run already; --resume {folder} goes on with it, "
                    "--overwrite replaces it"
                )
            for run in runs:
                run.unlink(missing_ok=True)
    except OSError as error:
        raise CharlmError(f"--output {folder}: cannot be made ({error.strerror})") from error
    return folder


def _free_folder() -> Path:
    names = (DEFAULT_OUTPUT, *(f"{DEFAULT_OUTPUT}-{number}" for number in range(2, 10_000)))
    return next((Path(name) for name in names if not os.path.lexists(name)), Path(names[-1]))


# -- sampling -------------------------------------------------------------------------------------


def _sample_parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn charlm sample",
        allow_abbrev=False,
        description="Lets a trained model write.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, or a .json in it"
    )
    parser.add_argument("--prime", default="", metavar="TEXT", help="what to begin with")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="below 1 likelier, above 1 bolder, 0 always the likeliest (default: 0.8)",
    )
    parser.add_argument("--length", type=int, default=500, metavar="N", help="characters (500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="among the N likeliest (0: among all)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help=f"{_HELP['device']} (cpu)")
    return parser


def write(options: argparse.Namespace, stream: TextIO) -> int:
    """Writes the prime and what the model makes of it, character by character.

    Raises:
        CharlmError: an option or the checkpoint cannot be used.
    """
    for name, least in (("length", 1), ("seed", 0), ("top_k", 0)):
        value = getattr(options, name)
        if not least <= value < 2**31:
            raise CharlmError(
                f"--{name.replace('_', '-')} must be a whole number from {least} up, got {value}"
            )
    if not 0 <= options.temperature < float("inf"):
        raise CharlmError(f"--temperature must be a number from 0 up, got {options.temperature}")
    saved = checkpoint.load(
        checkpoint.find(options.checkpoint, (checkpoint.BEST, checkpoint.LATEST))
    )
    config = saved.config.changed({"device": options.device})
    check_device(config.device)
    model = build_model(len(saved.vocabulary), config)
    try:
        load_weights(model, saved.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{saved.path}: {error}") from error
    stream.write(options.prime)
    for character in generate(
        model,
        saved.vocabulary,
        options.prime,
        options.length,
        options.temperature,
        torch.Generator().manual_seed(options.seed),
        options.top_k,
    ):
        stream.write(character)
        stream.flush()
    stream.write("\n")
    return 0
