"""The commands ``fastrnn charlm`` (train, compare, resume), ``... sample`` and ``... inspect``."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from . import checkpoint, page, side_by_side
from .activations import record
from .config import BACKENDS, CELLS, NONLINEARITIES, SCHEDULES, Config, option_name
from .data import Corpus, Text, prepare, read_files, read_standard_library, split
from .errors import CharlmError, CheckpointError, DataError, TrainingError
from .fit import Outcome, fit
from .interrupt import Interrupts
from .model import CharRNN, build_model, check_device, parameter_count
from .plot import plot_training
from .report import Reporter, reporter_for
from .sample import generate
from .train import Trainer, load_weights

DEFAULT_OUTPUT: Final = "charlm-run"
DEFAULT_CHARACTERS: Final = 2000  # of a page of `inspect`: about 30 lines of a book
LEAST_CHARACTERS: Final = 2  # the second character is the first that the model can predict
MOST_CHARACTERS: Final = 20_000  # each is an element of the page, and more make it slow
SIGNAL_EXIT: Final = 128  # plus the number of the signal, as shells do: 130 for Ctrl-C

MakeParser = Callable[..., argparse.ArgumentParser]

# Options that a resumed run may change. The checkpoint fixes all others.
_CHANGEABLE: Final = ("steps", "eval_every", "sample_every", "patience", "threads", "device")

_HELP: Final = {
    "cell": "the recurrent layer: " + ", ".join(CELLS),
    "nonlinearity": "nonlinearity of --cell rnn: " + ", ".join(NONLINEARITIES),
    "layers": "number of recurrent layers",
    "hidden": "size of the hidden state",
    "embedding": "size of the embedding of a character (0: same as --hidden)",
    "seq_length": "characters per chunk; gradients stop at the start of a chunk",
    "batch_size": "parallel streams of text",
    "steps": "training steps",
    "learning_rate": "learning rate of Adam",
    "schedule": "schedule of the learning rate: " + ", ".join(SCHEDULES),
    "warmup": "steps over which the learning rate rises",
    "clip": "largest norm of the gradients (0: no clipping)",
    "dropout": "dropout between layers and before the decoder",
    "patience": "stop after N evaluations without a new best (0: never)",
    "eval_every": "steps between two evaluations",
    "sample_every": "steps between two samples (0: no samples)",
    "seed": "seed of weights, dropout and samples",
    "backend": "implementation of the recurrent layers: " + ", ".join(BACKENDS),
    "device": "cpu, cuda or cuda:N",
    "threads": "CPU threads (0: torch's choice)",
}


def main(arguments: Sequence[str], make_parser: MakeParser) -> int:
    """Runs ``fastrnn charlm`` and returns the exit code.

    Args:
        arguments: the arguments after ``charlm``.
        make_parser: creates an argument parser that exits with code 2 on an error.
    """
    try:
        if arguments[:1] == ["sample"]:
            return write_sample(_sample_parser(make_parser).parse_args(arguments[1:]), sys.stdout)
        if arguments[:1] == ["inspect"]:
            return write_page(_inspect_parser(make_parser).parse_args(arguments[1:]), sys.stdout)
        return train(_train_parser(make_parser).parse_args(arguments), sys.stdout)
    except CharlmError as error:
        print(f"fastrnn charlm: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            "fastrnn charlm: out of memory; try a smaller --hidden, --batch-size, --seq-length "
            "or --text",
            file=sys.stderr,
        )
        return TrainingError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


# -- training -------------------------------------------------------------------------------------


def _train_parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn charlm",
        allow_abbrev=False,
        description="Trains a character-level language model. "
        "`fastrnn charlm sample` generates text with a trained model, and "
        "`fastrnn charlm inspect` shows what its units follow.",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text to train on (default: the Python source of the standard library)",
    )
    parser.add_argument("--encoding", help="encoding of the files (default: utf-8)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for checkpoints and the loss curve "
        f"(default: {DEFAULT_OUTPUT}, or {DEFAULT_OUTPUT}-2 and so on if it exists)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in the --output folder"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="CHECKPOINT", help="continue a run: its folder or .json"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also train with torch.nn, and compare"
    )
    for field in fields(Config):
        default: Any = field.default
        # argparse converts the types; Config checks all values in one place.
        parser.add_argument(
            option_name(field.name),
            dest=field.name,
            type=type(default),
            metavar={int: "N", float: "X", str: "NAME"}[type(default)],
            help=f"{_HELP[field.name]} (default: {default})",
        )
    return parser


def train(options: argparse.Namespace, stream: TextIO) -> int:
    """Runs the requested training and returns the exit code.

    Raises:
        CharlmError: an option, a text or a checkpoint is invalid, or training failed.
    """
    given = {
        field.name: getattr(options, field.name)
        for field in fields(Config)
        if getattr(options, field.name) is not None
    }
    if options.compare and options.resume:
        raise CharlmError("--compare starts from new weights and cannot be used with --resume")
    if options.compare and "backend" in given:
        raise CharlmError("--compare trains with both backends and cannot be used with --backend")
    saved = _load_for_resuming(options.resume, given) if options.resume else None
    config = saved.config.changed(given) if saved else Config(**given)
    if options.compare:
        config.changed({"backend": "torch"})  # the checks of this backend must pass as well
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
            f"continue with: fastrnn charlm --resume {folder}",
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
    reporter.line(_folder_summary(folder, "loss.png"))
    return outcome


def _compare(
    reporter: Reporter, config: Config, corpus: Corpus, folder: Path, interrupted: Interrupts
) -> Outcome:
    pair = side_by_side.Pair.start(config, corpus)
    _introduce(reporter, pair.fastrnn, folder)
    truth: list[float] = []
    if config.dropout == 0:  # in float64, dropout would drop other units
        first = min(side_by_side.FIRST_STEPS, config.steps)
        reporter.line(f"the first {first} steps in float64, as a referee ...")
        truth = side_by_side.float64_losses(pair, first, interrupted)
    outcome = fit(pair, reporter, _saver(folder), interrupted)
    if pair.fastrnn.losses:
        comparison = side_by_side.compare(pair, truth)
        for line in comparison.lines():
            reporter.line(line)
        side_by_side.save_comparison(folder, pair, comparison)
    reporter.line(_folder_summary(folder, "loss.png, compare.json"))
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


def _folder_summary(folder: Path, others: str) -> str:
    name = shlex.quote(str(folder))
    return (
        f"{folder}/ holds latest.json and best.json (checkpoints), {others}; "
        f'to read more: fastrnn charlm sample {name} --prime "def "'
    )


def _load_for_resuming(path: Path, given: dict[str, Any]) -> checkpoint.Checkpoint:
    """Loads the checkpoint to resume and checks that the given options do not contradict it.

    Raises:
        CharlmError: the checkpoint is unusable, finished, or has other options.
    """
    saved = checkpoint.load(checkpoint.find(path, (checkpoint.LATEST,)))
    old = saved.config.to_json()
    fixed = [name for name in given if name not in _CHANGEABLE and given[name] != old[name]]
    if fixed:
        name = fixed[0]
        raise CharlmError(
            f"{option_name(name)} cannot be changed with --resume ({saved.path} has {old[name]}); "
            "changeable options: " + ", ".join(option_name(name) for name in _CHANGEABLE)
        )
    steps = given.get("steps", saved.config.steps)
    if saved.step >= steps:
        raise CharlmError(
            f"{saved.path}: is already at step {saved.step:,}; pass more --steps than {steps:,}"
        )
    return saved


def _read_text(options: argparse.Namespace, saved: checkpoint.Checkpoint | None) -> Text:
    """Reads the text of the options or of the resumed run.

    Raises:
        CheckpointError: the text differs from the one that the run was trained on.
    """
    files = options.text
    encoding = "utf-8" if options.encoding is None else options.encoding
    if saved and not files:
        files = saved.text["files"]
        if options.encoding is None:
            encoding = saved.text["encoding"]
    elif options.encoding is not None and not files:
        raise CharlmError("--encoding needs --text FILE")
    text = read_files(files, encoding) if files else read_standard_library()
    if saved and text.digest != saved.text["sha256"]:
        raise CheckpointError(
            f"{saved.path}: was trained on another text than the current {text.description}; "
            "pass the original text with --text FILE"
        )
    return text


def _output_folder(options: argparse.Namespace, saved: checkpoint.Checkpoint | None) -> Path:
    """Creates the folder of this run. Replaces another run only with ``--overwrite``.

    Raises:
        CharlmError: the folder holds another run, or cannot be created or written to.
    """
    folder: Path = options.output or (saved.path.parent if saved else _free_folder())
    runs = [folder / f"{name}.json" for name in (checkpoint.LATEST, checkpoint.BEST)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CharlmError(f"--output {folder}: cannot be written to")
        # A resumed run continues in its own folder.
        other = not saved or not folder.samefile(saved.path.parent)
        if other and any(run.exists() for run in runs):
            if not options.overwrite:
                raise CharlmError(
                    f"--output {folder}: already holds a run; continue it with --resume {folder} "
                    "or replace it with --overwrite"
                )
            for run in runs:
                run.unlink(missing_ok=True)
    except OSError as error:
        raise CharlmError(f"--output {folder}: cannot be created ({error.strerror})") from error
    return folder


def _free_folder() -> Path:
    names = (DEFAULT_OUTPUT, *(f"{DEFAULT_OUTPUT}-{number}" for number in range(2, 10_000)))
    return next((Path(name) for name in names if not os.path.lexists(name)), Path(names[-1]))


# -- sampling -------------------------------------------------------------------------------------


def _sample_parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn charlm sample",
        allow_abbrev=False,
        description="Generates text with a trained model.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a run, or a .json in it"
    )
    parser.add_argument("--prime", default="", metavar="TEXT", help="beginning of the text")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="below 1 more predictable, above 1 more random, 0 always the likeliest character "
        "(default: 0.8)",
    )
    parser.add_argument(
        "--length", type=int, default=500, metavar="N", help="characters to generate (default: 500)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random draws (default: 0)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="draw from the N likeliest characters (default: 0, from all)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help=f"{_HELP['device']} (default: cpu)"
    )
    return parser


def write_sample(options: argparse.Namespace, stream: TextIO) -> int:
    """Writes the prime and the generated text, character by character.

    Raises:
        CharlmError: an option or the checkpoint is invalid.
    """
    for name, least in (("length", 1), ("seed", 0), ("top_k", 0)):
        _check_whole(name, getattr(options, name), least)
    if not 0 <= options.temperature < float("inf"):
        raise CharlmError(f"--temperature must be a number from 0 up, got {options.temperature}")
    saved = checkpoint.load(
        checkpoint.find(options.checkpoint, (checkpoint.BEST, checkpoint.LATEST))
    )
    model = _load_model(saved, options.device)
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


def _load_model(saved: checkpoint.Checkpoint, device: str) -> CharRNN:
    """Returns the model of a checkpoint.

    Raises:
        CharlmError: the device does not exist, or the weights do not fit the options.
    """
    config = saved.config.changed({"device": device})
    check_device(config.device)
    model = build_model(len(saved.vocabulary), config)
    try:
        load_weights(model, saved.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{saved.path}: {error}") from error
    return model


def _check_whole(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    if not least <= value <= most:
        wanted = f"from {least} up" if most == 2**31 - 1 else f"from {least} to {most:,}"
        option = "--" + name.replace("_", "-")
        raise CharlmError(f"{option} must be a whole number {wanted}, got {value}")


# -- inspecting -----------------------------------------------------------------------------------


def _inspect_parser(make_parser: MakeParser) -> argparse.ArgumentParser:
    parser = make_parser(
        prog="fastrnn charlm inspect",
        allow_abbrev=False,
        description="Writes a page that shows the states and gates of a trained model, character "
        "by character.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a run, or a .json in it"
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="text to show (default: the part of the run's text that it was not trained on)",
    )
    parser.add_argument("--encoding", help="encoding of the file (default: utf-8)")
    parser.add_argument(
        "--characters",
        type=int,
        default=DEFAULT_CHARACTERS,
        metavar="N",
        help=f"show the first N characters, at most {MOST_CHARACTERS:,} "
        f"(default: {DEFAULT_CHARACTERS:,})",
    )
    parser.add_argument(
        "--units",
        type=int,
        metavar="N",
        help="units per layer in the page, those that follow the text most clearly "
        "(default: as many as keep the page below about 6 MB)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: inspect.html in the run)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help=f"{_HELP['device']} (default: cpu)"
    )
    return parser


def write_page(options: argparse.Namespace, stream: TextIO) -> int:
    """Writes the page of a model and a text.

    Raises:
        CharlmError: an option, the checkpoint or the text is invalid, or the page cannot be
            written.
    """
    _check_whole("characters", options.characters, LEAST_CHARACTERS, MOST_CHARACTERS)
    if options.units is not None:
        _check_whole("units", options.units, 1)
    saved = checkpoint.load(
        checkpoint.find(options.checkpoint, (checkpoint.BEST, checkpoint.LATEST))
    )
    out: Path = options.out or saved.path.parent / "inspect.html"
    if out.is_dir():
        raise CharlmError(f"--out {out}: is a folder, not a file")
    text, description = _text_to_inspect(options, saved)
    model = _load_model(saved, options.device)
    numbers = saved.vocabulary.encode(text)
    activations = record(model, numbers)
    nats = -activations.log_probabilities[:-1].gather(1, numbers[1:].long().unsqueeze(1))
    kind = saved.config.cell.upper()
    if saved.config.cell == "rnn":
        kind += f" ({saved.config.nonlinearity})"
    facts = [
        f"{kind}, {saved.config.layers} x {saved.config.hidden} units",
        f"step {saved.step:,}",
        f"{len(text):,} characters of {description}",
        f"{nats.mean().item() / math.log(2):.2f} bits per character",
    ]
    written = page.build(
        {"title": f"{saved.path.parent.resolve().name}: what the units follow", "facts": facts},
        text,
        saved.vocabulary,
        activations,
        options.units,
        is_sigmoid=saved.config.cell == "rnn" and saved.config.nonlinearity == "sigmoid",
    ).encode()
    checkpoint.write_atomically(out, written)
    stream.write(
        f"{out}: {len(text):,} characters, {len(written) / 1e6:.1f} MB; open it in a browser\n"
    )
    return 0


def _text_to_inspect(options: argparse.Namespace, saved: checkpoint.Checkpoint) -> tuple[str, str]:
    """Returns the text and its description.

    Raises:
        DataError: the text is unreadable, too short, or has characters that the model does not
            know.
        CheckpointError: the text of the run has changed.
    """
    if options.text is None:
        if options.encoding is not None:
            raise CharlmError("--encoding needs --text FILE")
        whole = _read_text(options, saved)
        _, tested = split(whole, saved.config.batch_size, saved.config.seq_length)
        # rare characters of the run's text are unknown to the model
        symbols = saved.vocabulary.encode(tested[: options.characters]).tolist()
        return saved.vocabulary.decode(symbols), "validation text"
    encoding = "utf-8" if options.encoding is None else options.encoding
    text = read_files([options.text], encoding).content[: options.characters]
    if len(text) < LEAST_CHARACTERS:
        raise DataError(f"{options.text}: must have at least {LEAST_CHARACTERS} characters")
    unknown = sorted(set(text) - set(saved.vocabulary.characters))
    if unknown:
        shown = ", ".join(map(ascii, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"{options.text}: has characters that the model does not know ({shown}); "
            "replace them, or pass a text that resembles the text of the run"
        )
    return text, Path(options.text).name
