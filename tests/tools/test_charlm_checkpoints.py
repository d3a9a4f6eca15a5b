"""Damaged checkpoints and invalid arguments of the character model give one-line errors."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import safetensors.torch
from charlm_support import SMALL, trainer_for

from fastrnn.tools.charlm import checkpoint
from fastrnn.tools.charlm.errors import CharlmError, CheckpointError
from fastrnn.tools.charlm.model import build_model
from fastrnn.tools.charlm.sample import draw
from fastrnn.tools.charlm.train import load_weights
from fastrnn.tools.cli import main

# tried at every place in the JSON
REPLACEMENTS: list[Any] = [{}, [], "", "x", 1.5, -1, None, True, 10**400, ["x"], {"x": 1}]
REMOVED = object()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a short training."""
    torch.manual_seed(0)
    trainer = trainer_for(SMALL)
    trainer.run(1)
    trainer.evaluate()
    return checkpoint.save(tmp_path_factory.mktemp("checkpoint"), "latest", trainer)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields each place in a JSON document, with one item per list."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(document)
    holder: Any = result
    for key in place[:-1]:
        holder = holder[key]
    if value is REMOVED:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return result


def load_and_use(path: Path) -> None:
    """Loads a checkpoint and its weights, like resuming and sampling do."""
    loaded = checkpoint.load(path)
    load_weights(build_model(len(loaded.vocabulary), loaded.config), loaded.tensors)


def test_wrong_json_values_are_one_line_errors(saved: Path) -> None:
    document = json.loads(saved.read_bytes())
    path = saved.with_name("damaged.json")
    accepted, messages = [], []
    for place in places(document):
        for value in (REMOVED, *REPLACEMENTS):
            path.write_text(json.dumps(changed(document, place, value)))
            try:
                load_and_use(path)
            except CharlmError as error:
                messages.append(str(error))
            else:
                accepted.append((place, value))
    assert all("\n" not in message for message in messages)
    assert len(messages) > len(accepted) > 0
    # accepted: options with a default, and values that another training could have written
    free = {"config", "evaluations", "seconds", "step", "vocabulary", "text"}
    assert {place[0] for place, _ in accepted} <= free
    wrongly_accepted = [
        (place, value)
        for place, value in accepted
        if value is REMOVED
        and place[0] != "config"
        and len(place) < 3
        and isinstance(place[-1], str)
        and (
            place[0] != "text" or place[1] in ("files", "encoding", "sha256")
        )  # the keys that load reads
    ]
    assert wrongly_accepted == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {}}, "files"),
        ({"text": {"files": [], "encoding": 1, "sha256": "x"}}, "'encoding' must be a string"),
        ({"evaluations": ["x"]}, "'evaluations' must be a list"),
        ({"evaluations": [{"step": 1}]}, "is missing"),
        ({"step": True}, "'step' must be a whole number"),
        ({"seconds": "1"}, "'seconds' must be a finite number"),
    ],
)
def test_error_names_the_value(saved: Path, change: dict[str, Any], message: str) -> None:
    document = {**json.loads(saved.read_bytes()), **change}
    path = saved.with_name("damaged.json")
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "missing"])
@pytest.mark.parametrize("which", ["json", "tensors"])
def test_only_regular_files_are_read(saved: Path, tmp_path: Path, which: str, kind: str) -> None:
    """Reading a pipe would block, and reading /dev/zero would never end."""
    document = json.loads(saved.read_bytes())
    path = tmp_path / "latest.json"
    odd = path if which == "json" else tmp_path / document["tensors"]["file"]
    if which == "tensors":
        path.write_text(json.dumps(document))
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "device":
        odd.symlink_to("/dev/zero")
    elif kind == "folder":
        odd.mkdir()
    with pytest.raises(CheckpointError, match=r"regular file|folder|No such file"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 100, -5])
def test_truncated_files_are_rejected(saved: Path, tmp_path: Path, keep: int) -> None:
    document = json.loads(saved.read_bytes())
    name = document["tensors"]["file"]
    for damaged in ("latest.json", name):
        for source in (saved, saved.with_name(name)):
            data = source.read_bytes()
            target = tmp_path / ("latest.json" if source is saved else name)
            target.write_bytes(data[:keep] if target.name == damaged else data)
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / "latest.json")


def replace_tensors(folder: Path, data: bytes) -> Path:
    """Replaces the tensor file of a checkpoint and updates the checksum."""
    path = folder / "latest.json"
    document = json.loads(path.read_text())
    document["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(document))
    (folder / document["tensors"]["file"]).write_bytes(data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"x",
        b"{}",
        b'{"a":3}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}',
    ],
)
def test_broken_header_with_the_right_checksum_is_rejected(
    saved: Path, tmp_path: Path, header: bytes
) -> None:
    shutil.copy(saved, tmp_path)
    path = replace_tensors(tmp_path, len(header).to_bytes(8, "little") + header + b"\0" * 3)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_missing_or_wrong_tensors_are_rejected(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved, tmp_path)
    file = saved.with_name(json.loads(saved.read_bytes())["tensors"]["file"])
    tensors = safetensors.torch.load(file.read_bytes())
    assert {name.partition(".")[0] for name in tensors} == {
        *("model", "optimizer", "state", "random", "losses")
    }
    changes: list[Callable[[Tensor], Tensor | None]] = [
        lambda tensor: None,
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.flatten()[:0],
        lambda tensor: tensor.to(torch.int16),
        lambda tensor: torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 255),
    ]
    trainer = trainer_for(SMALL)
    for name, tensor in tensors.items():
        for change in changes:
            value = change(tensor)
            others = {key: other for key, other in tensors.items() if key != name}
            data = safetensors.torch.save({**others, **({} if value is None else {name: value})})
            path = replace_tensors(tmp_path, data)
            with pytest.raises(CheckpointError):
                checkpoint.load(path).restore(trainer)


def test_undamaged_checkpoint_resumes(saved: Path) -> None:
    trainer = trainer_for(SMALL)
    checkpoint.load(saved).restore(trainer)
    assert trainer.step == 1
    trainer.run(2)


def test_tiny_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([9.0, 1.0, 3.0, 2.0])  # number 0 is the unknown symbol
    for temperature in (0.0, 5e-324, 1e-320, 1e-46, 1e-38):
        assert draw(logits, temperature, torch.Generator().manual_seed(0)) == 2


@pytest.mark.parametrize("temperature", ["1e-320", "5e-324", "0", "1e308"])
def test_extreme_temperatures_are_accepted(
    saved: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["charlm", "sample", str(saved), "--length", "5", "--temperature", temperature]
    assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1", "1e400", "warm"])
def test_invalid_temperatures_are_rejected(
    saved: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["charlm", "sample", str(saved), "--length", "5", "--temperature", temperature]
    try:
        status = main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    assert status != 0
    message = capsys.readouterr().err
    assert "temperature" in message
    assert "Traceback" not in message
