"""Crash-safe checkpoints.

A checkpoint is a pair of files:

    latest.json                               options, vocabulary, step, losses, and the name and
                                              SHA-256 of the tensor file
    latest-00001200-1f2e3d4c.safetensors      weights, optimizer, hidden state, random numbers

The tensor file is written first. Its name contains a hash of its content. The json is written last.
Each file is written under a temporary name, synced to the disk and then renamed. The json therefore
always names a complete tensor file that belongs to it, whenever the process dies. The next save
removes tensor files that no json names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .config import Config, is_number
from .data import Vocabulary
from .errors import CharlmError, CheckpointError, TrainingError
from .files import read_regular_file
from .train import Evaluation, Trainer

FORMAT: Final = "fastrnn-charlm"
VERSION: Final = 1
LATEST: Final = "latest"
BEST: Final = "best"
_TEMPORARY: Final = ".tmp"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk."""

    path: Path  # the json file
    config: Config
    vocabulary: Vocabulary
    step: int
    text: dict[str, Any]
    evaluations: list[Evaluation]
    seconds: float
    tensors: dict[str, Tensor]

    def restore(self, trainer: Trainer) -> None:
        """Restores the saved state into a trainer with the same options and text.

        Raises:
            CheckpointError: the tensors do not fit.
        """
        try:
            trainer.restore(self.tensors, self.evaluations, self.seconds)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        if trainer.step != self.step:
            raise CheckpointError(f"{self.path}: is damaged (step {self.step} of {trainer.step})")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it holds either the complete old or the complete new content.

    Raises:
        TrainingError: the file cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(f"{path}: cannot be written ({error.strerror})") from error


def _sync_folder(folder: Path) -> None:
    """Syncs a folder to the disk, so that a power cut cannot undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, name: str, trainer: Trainer) -> Path:
    """Saves a training as ``folder/name.json`` and a tensor file.

    Args:
        folder: an existing folder.
        name: `LATEST` or `BEST`.
        trainer: the training to save.

    Returns:
        The path of the json file.

    Raises:
        TrainingError: a file cannot be written.
    """
    data = safetensors.torch.save(trainer.tensors(), {"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    tensors = folder / f"{name}-{trainer.step:08d}-{digest[:8]}.safetensors"
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": trainer.step,
        "tensors": {"file": tensors.name, "sha256": digest},
        "config": trainer.config.to_json(),
        "seconds": trainer.seconds,
        "text": trainer.corpus.summary(),
        "evaluations": [evaluation.to_json() for evaluation in trainer.evaluations],
        "vocabulary": list(trainer.corpus.vocabulary.characters),
    }
    path = folder / f"{name}.json"
    write_atomically(tensors, data)
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    _remove_stale_files(folder, name, keep=tensors.name)
    return path


def _remove_stale_files(folder: Path, name: str, keep: str) -> None:
    """Removes older tensor files of this name and temporary files of killed processes."""
    for path in (*folder.glob(f"{name}-*.safetensors"), *folder.glob(f".{name}*{_TEMPORARY}")):
        if path.name != keep:
            path.unlink(missing_ok=True)


def find(path: Path, names: tuple[str, ...]) -> Path:
    """Returns the json file of a checkpoint.

    Args:
        path: the json file, or the folder of a run.
        names: names of checkpoints to look for in a folder, in order of preference.

    Raises:
        CheckpointError: the folder holds no checkpoint, or the path is a tensor file.
    """
    if path.is_dir():
        for name in names:
            if (path / f"{name}.json").is_file():
                return path / f"{name}.json"
        raise CheckpointError(f"{path}: holds no checkpoint ({names[0]}.json)")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: holds only the tensors; pass the .json file instead")
    return path


def load(path: Path) -> Checkpoint:
    """Reads and checks a checkpoint.

    Args:
        path: the json file.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of another version.
    """
    document = _read_document(path)
    try:
        file, digest = _tensors_file(document)
        vocabulary = Vocabulary(_list_of(str, document, "vocabulary"))
        if not vocabulary.characters:
            raise CheckpointError("'vocabulary' is empty")
        checkpoint = Checkpoint(
            path=path,
            config=Config.from_json(_value(dict, document, "config")),
            vocabulary=vocabulary,
            step=_value(int, document, "step"),
            text=_text(document),
            evaluations=[_evaluation(values) for values in _list_of(dict, document, "evaluations")],
            seconds=_number(document, "seconds"),
            tensors=_read_tensors(path.with_name(file), digest),
        )
        _check_sizes(checkpoint)
    except _UnreadableTensors:
        raise
    except CharlmError as error:
        raise CheckpointError(f"{path}: is damaged or of another version: {error}") from error
    return checkpoint


class _UnreadableTensors(CheckpointError):
    """The tensor file is unusable. The message names it."""


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_regular_file(path, CheckpointError))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint (not JSON)") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a checkpoint of fastrnn charlm")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{path}: has version {version!r}; this fastrnn reads version {VERSION}"
        )
    return document


# -- values of the JSON: any of them can be missing or of a wrong type ----------------------------

_Value = TypeVar("_Value")
_NAMES: Final = {dict: "an object", list: "a list", int: "a whole number", str: "a string"}


def _value(kind: type[_Value], values: Mapping[str, Any], name: str) -> _Value:
    """Returns one value of exactly this type (a bool is not an int).

    Raises:
        CheckpointError: the value is missing or of another type.
    """
    if name not in values:
        raise CheckpointError(f"{name!r} is missing")
    value = values[name]
    if type(value) is not kind:
        raise CheckpointError(f"{name!r} must be {_NAMES[kind]}, got {_shortened(value)}")
    return value


def _list_of(kind: type[_Value], values: Mapping[str, Any], name: str) -> list[_Value]:
    items = _value(list, values, name)
    for item in items:
        if type(item) is not kind:
            raise CheckpointError(
                f"{name!r} must be a list whose items are each {_NAMES[kind]}, "
                f"got the item {_shortened(item)}"
            )
    return items


def _number(values: Mapping[str, Any], name: str) -> float:
    if name not in values:
        raise CheckpointError(f"{name!r} is missing")
    if not is_number(values[name]):
        raise CheckpointError(f"{name!r} must be a finite number, got {_shortened(values[name])}")
    return float(values[name])


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _text(document: Mapping[str, Any]) -> dict[str, Any]:
    text = _value(dict, document, "text")
    return {
        "files": _list_of(str, text, "files"),
        "encoding": _value(str, text, "encoding"),
        "sha256": _value(str, text, "sha256"),
    }


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    names = [field.name for field in fields(Evaluation) if field.name != "step"]
    return Evaluation(
        step=_value(int, values, "step"), **{name: _number(values, name) for name in names}
    )


def _tensors_file(document: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the name and the SHA-256 of the tensor file.

    Raises:
        CheckpointError: the name points outside the folder of the checkpoint.
    """
    reference = _value(dict, document, "tensors")
    name = _value(str, reference, "file")
    if Path(name).name != name or name in ("", ".."):
        raise CheckpointError(f"'file' must be a file name without folder, got {_shortened(name)}")
    return name, _value(str, reference, "sha256")


# -- the tensors ----------------------------------------------------------------------------------


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    data = read_regular_file(path, _UnreadableTensors)
    if hashlib.sha256(data).hexdigest() != digest:
        raise _UnreadableTensors(f"{path}: is damaged (its checksum differs)")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise _UnreadableTensors(f"{path}: is damaged ({error})") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _UnreadableTensors(f"{path}: is damaged ({name!r} contains NaN or infinity)")
    return tensors


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Compares the sizes in the options with the tensors, before a model is built from them.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    config, symbols = checkpoint.config, len(checkpoint.vocabulary)
    last = f"model.recurrent.weight_hh_l{config.layers - 1}"
    shapes = {
        "model.embedding.weight": (symbols, config.embedding_size),
        "model.decoder.weight": (symbols, config.hidden),
        last: (None, config.hidden),
    }
    for name, shape in shapes.items():
        found = checkpoint.tensors[name].shape if name in checkpoint.tensors else ()
        if len(found) != 2 or any(a not in (None, b) for a, b in zip(shape, found, strict=True)):
            raise CheckpointError(f"{name!r} is missing or has the wrong shape")
