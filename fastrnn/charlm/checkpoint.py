"""Checkpoints that no moment of a crash can corrupt.

A checkpoint is a pair of files:

    latest.json                               options, vocabulary, step, losses, and the name and
                                              SHA-256 of
    latest-00001200-1f2e3d4c.safetensors      weights, optimizer, hidden state, random numbers

The tensors are written first, under a name that their content gives, the json last; each goes to
a temporary file that is synced to the disk and then renamed. Whenever the process dies, the json
that is there names tensors that are there, complete and its own. Tensors that no json names any
longer go away with the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .config import Config
from .data import Vocabulary
from .errors import CharlmError, CheckpointError, TrainingError
from .train import Evaluation, Trainer

FORMAT: Final = "fastrnn-charlm"
VERSION: Final = 1
LATEST: Final = "latest"
BEST: Final = "best"
_TEMPORARY: Final = ".tmp"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read."""

    path: Path  # of the json
    config: Config
    vocabulary: Vocabulary
    step: int
    text: dict[str, Any]
    evaluations: list[Evaluation]
    seconds: float
    tensors: dict[str, Tensor]

    def restore(self, trainer: Trainer) -> None:
        """Puts the state of the saved training into a trainer of the same options and text.

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
    """Writes a file so that at any moment either the old or the new content is there, whole.

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
    """Makes a rename last; without it a power cut could undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, name: str, trainer: Trainer) -> Path:
    """Saves a training as ``folder/name.json`` and the tensors it names.

    Args:
        folder: an existing folder.
        name: `LATEST` or `BEST`.
        trainer: what to save.

    Returns:
        The path of the json.

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
    _remove_left_overs(folder, name, keep=tensors.name)
    return path


def _remove_left_overs(folder: Path, name: str, keep: str) -> None:
    """Removes older tensors of this name and temporary files of processes that were killed."""
    for path in (*folder.glob(f"{name}-*.safetensors"), *folder.glob(f".{name}*{_TEMPORARY}")):
        if path.name != keep:
            path.unlink(missing_ok=True)


def find(path: Path, names: tuple[str, ...]) -> Path:
    """The json of a checkpoint, given itself or its folder.

    Args:
        path: a json, or the folder of a run.
        names: what to look for in a folder, best first.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_dir():
        for name in names:
            if (path / f"{name}.json").is_file():
                return path / f"{name}.json"
        raise CheckpointError(f"{path}: holds no checkpoint ({names[0]}.json)")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: holds only the tensors, give the .json that names it")
    return path


def load(path: Path) -> Checkpoint:
    """Reads and checks a checkpoint.

    Args:
        path: of its json.

    Raises:
        CheckpointError: it is missing, damaged, not a checkpoint, or of a newer version.
    """
    document = _read_document(path)
    try:
        reference = document["tensors"]
        file = path.with_name(_plain_name(reference["file"]))
        checkpoint = Checkpoint(
            path=path,
            config=Config.from_json(document["config"]),
            vocabulary=Vocabulary(document["vocabulary"]),
            step=int(document["step"]),
            text=dict(document["text"]),
            evaluations=[Evaluation(**values) for values in document["evaluations"]],
            seconds=float(document["seconds"]),
            tensors=_read_tensors(file, str(reference["sha256"])),
        )
    except CheckpointError:
        raise
    except CharlmError as error:
        raise CheckpointError(f"{path}: is damaged or of another version: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error!r})") from error
    return checkpoint


def _read_document(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint (not JSON)") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a checkpoint of fastrnn charlm")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has version {document.get('version')}, this fastrnn reads version {VERSION}"
        )
    return document


def _plain_name(name: str) -> str:
    """Refuses a name that leads out of the checkpoint's folder."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a file name")
    return name


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{path}: is damaged (its checksum differs)")
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from error
