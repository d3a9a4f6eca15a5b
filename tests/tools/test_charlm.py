"""The character model: data, training, checkpoints, samples, comparison and plots."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from charlm_support import SMALL, corpus_for, trainer_for
from support import changed, exact_call
from tolerance import Change, assert_agrees, widen

from fastrnn.tools.charlm import checkpoint, plot, schedule, side_by_side
from fastrnn.tools.charlm import fit as fit_module
from fastrnn.tools.charlm.config import Config
from fastrnn.tools.charlm.data import (
    Corpus,
    Streams,
    Text,
    Vocabulary,
    prepare,
    read_files,
    read_standard_library,
)
from fastrnn.tools.charlm.errors import CharlmError, CheckpointError, DataError, TrainingError
from fastrnn.tools.charlm.fit import Outcome, fit
from fastrnn.tools.charlm.interrupt import Interrupts
from fastrnn.tools.charlm.model import CharRNN, build_model
from fastrnn.tools.charlm.report import PlainReporter, RichReporter, reporter_for
from fastrnn.tools.charlm.sample import draw, generate
from fastrnn.tools.charlm.train import Trainer, evaluate

CELLS = ["rnn", "lstm", "gru"]
BACKENDS = ["fastrnn", "torch"]
# Adam changes no float32 weight at this rate, so training only computes losses.
FROZEN = {"learning_rate": 1e-30, "clip": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


class Lines:
    """A reporter that records lines and samples."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.samples: list[tuple[int, str]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, step: int, steps: int, status: str) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))

    def close(self) -> None:
        pass


def no_save(trainer: Trainer, best: bool) -> None:
    pass


# -- text -----------------------------------------------------------------------------------------


def test_files_are_concatenated_and_normalised(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffä\r\nb\rc".encode())
    (tmp_path / "b").write_bytes(b"d\n")
    text = read_files([tmp_path / "a", tmp_path / "b"])
    assert text.content == "ä\nb\ncd\n"
    assert text.files == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_other_encodings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for encoding in ("latin-1", "utf-16", "utf-8"):
        path.write_bytes("grün\n".encode(encoding))
        assert read_files([path], encoding).content == "grün\n"


@pytest.mark.parametrize(
    ("content", "encoding", "reason"),
    [
        (b"", "utf-8", "is empty"),
        (b"abc\xff", "utf-8", r"is not utf-8 text \(byte 3\)"),
        (b"\x7fELF\0\xff", "utf-8", "binary"),
        (b"abc\0def", "utf-8", "binary"),
        ("abc".encode("utf-16"), "utf-8", "--encoding utf-16"),
        (b"abc", "utf-16", "is not utf-16 text"),
        (b"abc", "nonsense", "--encoding must be .*, got 'nonsense'"),
        (b"abc", "base64", "--encoding must be .*, got 'base64'"),
        (b"abc", "hex\0", "--encoding"),
        (b"abc", "", "--encoding must be .*, got ''"),
    ],
)
def test_other_files_than_text_are_one_line_errors(
    tmp_path: Path, content: bytes, encoding: str, reason: str
) -> None:
    path = tmp_path / "some file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_files([path], encoding)
    assert "\n" not in str(caught.value)
    if "encoding" not in reason or "utf-16" in reason:
        assert "some file" in str(caught.value)


def test_unreadable_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: cannot be read \(No such file"):
        read_files([tmp_path / "gone"])
    with pytest.raises(DataError, match="is a folder"):
        read_files([tmp_path])
    with pytest.raises(DataError, match="not a regular file"):
        read_files([os.devnull])
    with pytest.raises(DataError, match="cannot be read"):
        read_files(["nul\0name"])


def test_standard_library_text_is_reproducible() -> None:
    text = read_standard_library(limit=300_000)
    assert text.content == read_standard_library(limit=300_000).content
    assert 300_000 <= len(text.content) < 600_000
    assert "def " in text.content
    assert "300,000" in text.description
    assert text.files == ()


def test_standard_library_text_skips_tests_and_needs_source(tmp_path: Path) -> None:
    for name in ("good.py", "test/t.py", "site-packages/p.py", "encodings/e.py", "data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "latin.py").write_bytes(b"# \xff")
    assert read_standard_library(root=tmp_path).content == "# good.py\n"
    (tmp_path / "good.py").unlink()
    with pytest.raises(DataError, match="--text FILE"):
        read_standard_library(root=tmp_path)


def test_vocabulary_encodes_and_decodes() -> None:
    vocabulary = Vocabulary.of("hello wörld 𝄞")
    assert vocabulary.decode(vocabulary.encode("wörld 𝄞").tolist()) == "wörld 𝄞"
    assert vocabulary.encode("xh").tolist()[0] == Vocabulary.UNKNOWN
    assert vocabulary.decode([0]) == "\ufffd"
    assert len(vocabulary) == len(set("hello wörld 𝄞")) + 1
    assert vocabulary.encode("").shape == (0,)


def test_rare_characters_are_unknown() -> None:
    text = "ab" * 100_000 + "xyz"
    assert Vocabulary.of(text).characters == ("a", "b")
    with pytest.raises(DataError, match="none of"):
        Vocabulary.of("".join(chr(code) for code in range(0x10000, 0x10000 + 250_000)))


def test_vocabulary_rejects_other_things_than_distinct_characters() -> None:
    for characters in (["a", "a"], ["ab"], [""]):
        with pytest.raises(DataError):
            Vocabulary(characters)


def test_streams_are_consecutive_and_targets_are_one_later() -> None:
    streams = Streams(torch.arange(64, dtype=torch.int32), batch_size=3, seq_length=5)
    assert streams.chunks == 4  # with 21 characters per stream
    xs, ys = zip(*(streams.chunk(index) for index in range(4)), strict=True)
    expected = torch.stack([torch.arange(20) + start for start in (0, 21, 42)], dim=1)
    assert torch.equal(torch.cat(xs), expected)
    assert torch.equal(torch.cat(ys), expected + 1)
    assert xs[0].dtype == torch.int64


def test_shortest_possible_text_is_accepted() -> None:
    config = SMALL
    least = config.batch_size * config.seq_length + 1 + config.seq_length + 1
    corpus = corpus_for(config, least)
    assert (corpus.training.chunks, corpus.validation.chunks) == (1, 1)
    with pytest.raises(DataError, match=f"need at least {least}"):
        corpus_for(config, least - 1)


def test_end_of_the_text_is_held_out() -> None:
    text = Text("a" * 950 + "b" * 50, "text")
    corpus = prepare(text, 4, 8)
    assert corpus.vocabulary.characters == ("a",)
    for index in range(corpus.validation.chunks):
        assert not corpus.validation.chunk(index)[0].any()  # "b" is unknown
    assert all(corpus.training.chunk(k)[1].all() for k in range(corpus.training.chunks))


# -- options and schedules ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "cnn"}, "--cell must be one of rnn, lstm, gru"),
        ({"hidden": 0}, "--hidden must be a whole number from 1 up, got 0"),
        ({"hidden": True}, "--hidden"),
        ({"steps": 2**40}, "--steps"),
        ({"layers": 2**31 - 1}, "--layers must be a whole number from 1 to 1024"),
        ({"threads": 30000}, "--threads must be a whole number from 0 to 1024"),
        ({"threads": 2**31 - 1}, "--threads must be a whole number from 0 to 1024"),
        (
            {"learning_rate": float("nan")},
            "--lr must be a number above 0 and at most 1000, got nan",
        ),
        ({"learning_rate": 0}, "--lr"),
        ({"clip": -1.0}, "--clip"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and less than 1"),
        ({"device": "tpu"}, "--device must be cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "--device"),
        ({"cell": "gru", "nonlinearity": "relu"}, "needs --cell rnn"),
        ({"backend": "torch", "nonlinearity": "sigmoid"}, "needs --backend fastrnn"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CharlmError) as caught:
        Config(**options)
    assert message in str(caught.value)


def test_options_survive_json() -> None:
    assert Config.from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL
    with pytest.raises(CharlmError, match="surprise"):
        Config.from_json({**SMALL.to_json(), "surprise": 1})


def test_learning_rate_follows_the_schedule() -> None:
    def rates(**options: Any) -> list[float]:
        config = Config(steps=10, learning_rate=1.0, **options)
        return [schedule.learning_rate(config, step, []) for step in range(11)]

    assert rates() == [1.0] * 11
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = rates(schedule="cosine", warmup=2)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.55)
    assert cosine[10] == pytest.approx(0.1)
    plateau = Config(schedule="plateau", learning_rate=1.0)
    validation = [3.0, 2.0, 2.1, 2.0, 1.9, 1.9, 2.0, 2.0, 1.95]
    seen = [schedule.learning_rate(plateau, 0, validation[:n]) for n in range(10)]
    assert seen == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_evaluations_since_best_are_counted() -> None:
    assert schedule.evaluations_since_best([]) == 0
    assert schedule.evaluations_since_best([3.0, 2.0]) == 0
    assert schedule.evaluations_since_best([2.0, 2.0, 3.0]) == 2


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_losses_of_chunks_match_one_long_sequence(cell: str, backend: str) -> None:
    trainer = trainer_for(dataclasses.replace(SMALL, cell=cell, backend=backend, **FROZEN))
    streams = trainer.corpus.training
    trainer.run(streams.chunks + 1)
    xs, ys = zip(*(streams.chunk(index) for index in range(streams.chunks)), strict=True)

    def unrolled(model: CharRNN) -> torch.Tensor:
        with torch.no_grad():
            logits, _ = model(torch.cat(xs), model.zero_state(SMALL.batch_size))
        losses = functional.cross_entropy(
            logits.flatten(0, 1), torch.cat(ys).flatten(), reduction="none"
        )
        return losses.view(streams.chunks, -1).mean(1)

    exact = exact_call(trainer.model, call=unrolled)
    assert_agrees(torch.tensor(trainer.losses[:-1]), unrolled(trainer.model), exact)
    assert trainer.losses[-1] == trainer.losses[0]  # the text started again, from a state of zeros


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_stop_at_the_start_of_a_chunk(cell: str) -> None:
    trainer = trainer_for(dataclasses.replace(SMALL, cell=cell, **FROZEN))
    trainer.run(2)
    model, streams = trainer.model, trainer.corpus.training
    (x0, _), (x1, y1) = streams.chunk(0), streams.chunk(1)

    def gradients(model: CharRNN) -> tuple[torch.Tensor, ...]:
        _, state = model(x0, model.zero_state(SMALL.batch_size))
        logits, _ = model(x1, tree_map(torch.Tensor.detach, state))
        loss = functional.cross_entropy(logits.flatten(0, 1), y1.flatten())
        return torch.autograd.grad(loss, list(model.parameters()))

    found = tuple(parameter.grad for parameter in model.parameters())
    assert_agrees(found, gradients(model), exact_call(model, call=gradients))


def test_gradients_are_clipped() -> None:
    def gradient(clip: float) -> torch.Tensor:
        trainer = trainer_for(dataclasses.replace(SMALL, learning_rate=1e-30, clip=clip))
        trainer.run(1)
        found = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        return torch.cat(found)

    free, clipped = gradient(0.0), gradient(0.01)
    assert free.norm() > 0.1
    # torch divides by the norm plus 1e-6, to avoid a division by 0

    def exact(change: Change) -> torch.Tensor:
        return change(free) * (0.01 / (change(free).norm() + 1e-6))

    assert_agrees(clipped, free * (0.01 / (free.norm() + 1e-6)), exact)
    assert torch.equal(gradient(1e6), free)


@pytest.mark.parametrize("cell", CELLS)
def test_evaluation_carries_the_state_and_keeps_the_training_mode(cell: str) -> None:
    config = dataclasses.replace(SMALL, cell=cell, dropout=0.5)
    trainer = trainer_for(config)
    trainer.model.train()
    streams = trainer.corpus.validation
    loss = evaluate(trainer.model, streams)
    assert trainer.model.training
    xs, ys = zip(*(streams.chunk(index) for index in range(streams.chunks)), strict=True)
    trainer.model.eval()

    def whole(model: CharRNN) -> torch.Tensor:
        with torch.no_grad():
            logits, _ = model(torch.cat(xs), model.zero_state(streams.batch_size))
        return functional.cross_entropy(logits.flatten(0, 1), torch.cat(ys).flatten())

    exact = exact_call(trainer.model, call=whole)
    assert_agrees(torch.tensor(loss), whole(trainer.model), exact)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_determines_a_run_and_global_random_state_is_kept(backend: str, threads: int) -> None:
    torch.set_num_threads(threads)
    config = dataclasses.replace(SMALL, dropout=0.3, backend=backend)
    before = torch.get_rng_state()
    first, second = trainer_for(config), trainer_for(config)
    first.run(6)
    for steps in (1, 3, 2):  # the grouping of steps has no effect
        second.run(steps)
    other = trainer_for(dataclasses.replace(config, seed=1))
    other.run(6)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.losses == second.losses
    assert first.losses != other.losses


@pytest.mark.parametrize(
    ("cell", "nonlinearity"),
    [("rnn", "tanh"), ("rnn", "relu"), ("rnn", "sigmoid"), ("lstm", "tanh"), ("gru", "tanh")],
)
def test_model_learns(cell: str, nonlinearity: str) -> None:
    config = dataclasses.replace(
        SMALL,
        cell=cell,
        nonlinearity=nonlinearity,
        layers=1,
        hidden=24,
        learning_rate=0.01,
        steps=150,
    )
    trainer = trainer_for(config)
    trainer.run(150)
    assert sum(trainer.losses[-10:]) < 0.6 * sum(trainer.losses[:10])


def test_nan_loss_is_a_one_line_error() -> None:
    trainer = trainer_for(SMALL)
    trainer.run(3)
    nn.init.constant_(trainer.model.decoder.weight, math.nan)
    with pytest.raises(TrainingError, match="became nan at step 4: try a smaller --lr"):
        trainer.run(2)
    with pytest.raises(TrainingError, match="validation loss became nan"):
        trainer.evaluate()


def test_fit_evaluates_saves_and_samples_when_due() -> None:
    saves: list[tuple[int, bool]] = []
    config = dataclasses.replace(SMALL, sample_every=4)
    trainer, lines = trainer_for(config), Lines()
    outcome = fit(trainer, lines, lambda t, best: saves.append((t.step, best)))
    assert outcome is Outcome.FINISHED
    assert [evaluation.step for evaluation in trainer.evaluations] == [5, 10, 12]
    assert [step for step, _ in saves] == [5, 10, 12]
    assert saves[0] == (5, True)
    assert [step for step, _ in lines.samples] == [4, 8, 12]
    assert all(len(text) == 300 and "\ufffd" not in text for _, text in lines.samples)
    assert len(lines.lines) == 3


def test_samples_and_evaluations_do_not_affect_the_losses() -> None:
    config = dataclasses.replace(SMALL, dropout=0.3)
    plain, busy = trainer_for(config), trainer_for(config)
    plain.run(12)
    busy.config = dataclasses.replace(config, sample_every=1, eval_every=2)
    fit(busy, Lines(), no_save)
    assert busy.losses == plain.losses


def test_fit_stops_early() -> None:
    config = dataclasses.replace(SMALL, steps=500, eval_every=1, patience=3, **FROZEN)
    trainer = trainer_for(config)
    assert fit(trainer, Lines(), no_save) is Outcome.EARLY
    assert trainer.step == 4  # the first evaluation and three that are no better


def test_stop_ends_fit_between_steps_and_saves() -> None:
    trainer, saved = trainer_for(SMALL), []
    outcome = fit(
        trainer, Lines(), lambda t, best: saved.append(t.step), stop=lambda: trainer.step >= 1
    )
    assert outcome is Outcome.INTERRUPTED
    assert saved == [trainer.step]


# -- checkpoints ----------------------------------------------------------------------------------


def resumed(folder: Path, corpus: Corpus, name: str = checkpoint.LATEST) -> Trainer:
    saved = checkpoint.load(folder / f"{name}.json")
    trainer = Trainer(saved.config, corpus)
    saved.restore(trainer)
    return trainer


def assert_same(a: Trainer, b: Trainer) -> None:
    assert a.losses == b.losses
    assert a.validation_losses == b.validation_losses
    ours, theirs = a.tensors(), b.tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("stop_at", [0, 1, 5, 7])
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str, backend: str, stop_at: int
) -> None:
    config = dataclasses.replace(
        SMALL, cell=cell, backend=backend, dropout=0.2, schedule="plateau", warmup=3
    )
    corpus = corpus_for(config, 500)  # short enough that the text starts again within the run
    whole = Trainer(config, corpus)
    fit(whole, Lines(), no_save)

    def save(trainer: Trainer, best: bool) -> None:
        checkpoint.save(tmp_path, checkpoint.LATEST, trainer)

    first = Trainer(config, corpus)
    monkeypatch.setattr(fit_module, "_RUN_STEPS", 1)  # calls stop after each step
    outcome = fit(first, Lines(), save, stop=lambda: first.step >= stop_at)
    assert (outcome, first.step) == (Outcome.INTERRUPTED, stop_at)
    second = resumed(tmp_path, corpus)
    assert_same(first, second)
    fit(second, Lines(), save)
    assert_same(second, whole)
    assert_same(resumed(tmp_path, corpus), whole)


def test_save_removes_older_tensors_and_temporary_files(tmp_path: Path) -> None:
    trainer = trainer_for(SMALL)
    (tmp_path / ".latest.json.1.tmp").touch()  # left by a killed process
    for _ in range(3):
        trainer.run(1)
        checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
        checkpoint.save(tmp_path, checkpoint.BEST, trainer)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == [
        "best",
        "best.json",
        "latest",
        "latest.json",
    ]


class Killed(BaseException):
    """Simulates the death of the process. The code under test does not catch BaseException."""


@pytest.mark.parametrize("function", ["open", "fsync", "replace", "unlink"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_death_at_any_system_call_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    trainer = trainer_for(SMALL)
    trainer.run(2)
    checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    trainer.run(3)
    owner = Path if function == "unlink" else os
    real: Callable[..., Any] = getattr(owner, function)
    calls = 0

    def dies(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, dies)
        try:
            checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
        except Killed:
            assert calls == call
    found = resumed(tmp_path, trainer.corpus)
    assert found.step in (2, 5)
    assert found.losses == trainer.losses[: found.step]
    checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    assert resumed(tmp_path, trainer.corpus).step == 5
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("call", [1, 2])
def test_death_within_a_write_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    trainer = trainer_for(SMALL)
    trainer.run(2)
    checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    trainer.run(3)
    opened = 0

    def half(path: Path, mode: str) -> io.FileIO:
        nonlocal opened
        opened += 1
        if opened == call:
            with io.FileIO(path, "wb") as file:
                file.write(b'{"format"')
            raise Killed
        return io.FileIO(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", half)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    assert resumed(tmp_path, trainer.corpus).step == 2


def test_killed_process_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from charlm_support import SMALL, trainer_for
from fastrnn.tools.charlm import checkpoint
trainer = trainer_for(SMALL)
while True:
    trainer.run(1)
    checkpoint.save(Path({str(tmp_path)!r}), "latest", trainer)
    print(trainer.step, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path.parent, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.0137)
    process.kill()
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    found = resumed(tmp_path, corpus_for(SMALL))
    assert found.step >= (int(rest[-1]) if rest else 5)
    again = trainer_for(SMALL)
    again.run(found.step)
    assert again.losses == found.losses


def test_full_disk_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(SMALL)
    checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    trainer.run(1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match=r"cannot be written \(No space left"):
            checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    assert resumed(tmp_path, trainer.corpus).step == 0
    assert not list(tmp_path.glob(".*"))


def damage_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "latest.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return apply


def damage_tensors(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "latest.json").unlink(), "No such file"),
        (lambda folder: (folder / "latest.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "latest.json").write_bytes(b"\xff\0"), "not JSON"),
        (lambda folder: (folder / "latest.json").write_text("[" * 100_000), "not JSON"),
        (lambda folder: (folder / "latest.json").write_text("[1]"), "not a checkpoint of fastrnn"),
        (damage_json(lambda d: d.update(format="x")), "not a checkpoint of fastrnn"),
        (damage_json(lambda d: d.update(version=2)), "has version 2"),
        (damage_json(lambda d: d.pop("step")), "damaged"),
        (damage_json(lambda d: d.update(step=7)), "damaged"),
        (damage_json(lambda d: d.update(evaluations=[{}])), "damaged"),
        (damage_json(lambda d: d.update(text=3)), "damaged"),
        (damage_json(lambda d: d.update(vocabulary=["ab"])), "damaged"),
        (damage_json(lambda d: d["config"].update(hidden=-1)), "--hidden"),
        (damage_json(lambda d: d["config"].update(hidden=13)), "wrong shape"),
        (damage_json(lambda d: d["config"].update(cell="gru")), "wrong shape"),
        (damage_json(lambda d: d["config"].pop("cell")), "damaged"),
        (damage_json(lambda d: d["tensors"].update(file="../x")), "damaged"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "No such file"),
        (damage_tensors(lambda data: data[:-1]), "checksum"),
        (damage_tensors(lambda data: data[:99] + b"?" + data[100:]), "checksum"),
    ],
)
def test_damaged_checkpoint_is_a_one_line_error(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    trainer = trainer_for(SMALL)
    trainer.run(1)
    checkpoint.save(tmp_path, checkpoint.LATEST, trainer)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, trainer.corpus)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_find_prefers_the_first_name(tmp_path: Path) -> None:
    names = (checkpoint.BEST, checkpoint.LATEST)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find(tmp_path, names)
    for name in reversed(names):
        (tmp_path / f"{name}.json").touch()
        assert checkpoint.find(tmp_path, names) == tmp_path / f"{name}.json"
    assert checkpoint.find(tmp_path / "latest.json", names) == tmp_path / "latest.json"
    with pytest.raises(CheckpointError, match=r"pass the \.json"):
        checkpoint.find(tmp_path / "x.safetensors", names)


# -- signals --------------------------------------------------------------------------------------


def test_first_signal_sets_a_flag_and_second_raises(request: pytest.FixtureRequest) -> None:
    # a process started in the background may ignore the signal
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        assert interrupted.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with Interrupts():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -- sampling -------------------------------------------------------------------------------------


def sample_text(trainer: Trainer, **options: Any) -> str:
    arguments: dict[str, Any] = {"prime": "def ", "length": 60, "temperature": 0.8, "seed": 3}
    arguments |= options
    generator = torch.Generator().manual_seed(arguments.pop("seed"))
    pieces = generate(trainer.model, trainer.corpus.vocabulary, generator=generator, **arguments)
    return "".join(pieces)


@pytest.mark.parametrize("cell", CELLS)
def test_seed_determines_the_sample(cell: str) -> None:
    trainer = trainer_for(dataclasses.replace(SMALL, cell=cell, dropout=0.5))
    trainer.run(2)
    assert trainer.model.training
    text = sample_text(trainer)
    assert trainer.model.training
    assert len(text) == 60
    assert text == sample_text(trainer)
    assert text != sample_text(trainer, seed=4)
    assert sample_text(trainer, prime="") == sample_text(trainer, prime="\n")
    assert sample_text(trainer, temperature=0, seed=1) == sample_text(
        trainer, temperature=0, seed=2
    )
    assert sample_text(trainer, temperature=1e-30) == sample_text(trainer, temperature=0)
    assert sample_text(trainer, top_k=1, seed=1) == sample_text(trainer, temperature=0)
    assert len(sample_text(trainer, prime="unknown: €")) == 60


def test_unknown_symbol_is_never_drawn() -> None:
    logits = torch.tensor([100.0, 0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits, t, generator, k) for t in (0, 0.5, 5.0) for k in (0, 1, 3, 9)] * 20
    assert set(drawn) <= {1, 2, 3}
    top = {draw(logits, 100.0, generator, 2) for _ in range(200)}
    assert top == {2, 3}


@pytest.mark.parametrize("cell", CELLS)
def test_sample_feeds_each_character_back(cell: str) -> None:
    trainer = trainer_for(dataclasses.replace(SMALL, cell=cell))
    trainer.model.eval()
    vocabulary = trainer.corpus.vocabulary
    text = sample_text(trainer, temperature=0, length=8)
    whole = vocabulary.encode("def " + text).long().unsqueeze(1)
    with torch.no_grad():
        logits, _ = trainer.model(whole, trainer.model.zero_state(1))
    best = logits[3:-1, 0, 1:].argmax(-1) + 1
    assert vocabulary.decode(best.tolist()) == text


# -- comparison -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_both_backends_have_equal_losses(cell: str) -> None:
    config = dataclasses.replace(SMALL, cell=cell, steps=30, hidden=32)
    pair = side_by_side.Pair.start(config, corpus_for(config))
    truth = side_by_side.float64_losses(pair, side_by_side.FIRST_STEPS)
    assert pair.fastrnn.step == 0
    assert fit(pair, Lines(), no_save) is Outcome.FINISHED
    result = side_by_side.compare(pair, truth)
    assert result.agrees
    assert (result.steps, result.first_steps) == (30, 20)
    first = [torch.tensor(trainer.losses[:20]) for trainer in (pair.fastrnn, pair.torch)]

    def exact(change: Change) -> torch.Tensor:
        if change is widen:
            return torch.tensor(truth, dtype=torch.float64)
        fresh = side_by_side.Pair.start(config, corpus_for(config))
        with torch.no_grad():
            wide = changed(fresh.torch.model, change)
        trainer = Trainer(fresh.torch.config, fresh.torch.corpus, wide)
        trainer.run(side_by_side.FIRST_STEPS)
        return torch.tensor(trainer.losses, dtype=torch.float64)

    assert_agrees(*first, exact)
    assert result.first_difference <= result.largest_difference
    assert result.speed_ratio is not None
    assert result.speed_ratio > 0
    assert [row[0] for row in result.rows] == [1, 2, 5, 10, 20, 30]
    assert [row[0] for row in result.validation] == [5, 10, 15, 20, 25, 30]
    text = "\n".join(result.lines())
    assert "first 20 steps" in text
    assert "agree to float rounding" in text
    assert "times as fast" in text
    json.dumps(result.to_json())


def test_dropout_drops_the_same_units_in_both_backends() -> None:
    config = dataclasses.replace(SMALL, dropout=0.3)
    pair = side_by_side.Pair.start(config, corpus_for(config))
    pair.run(12)
    assert side_by_side.compare(pair).largest_difference <= side_by_side.ERROR_FLOOR


def test_different_weights_are_reported() -> None:
    pair = side_by_side.Pair.start(SMALL, corpus_for(SMALL))
    truth = side_by_side.float64_losses(pair, 12)
    with torch.no_grad():
        next(pair.fastrnn.model.recurrent.parameters()).mul_(1.001)
    pair.run(12)
    result = side_by_side.compare(pair, truth)
    assert result.agrees is False
    assert "DIFFER" in "\n".join(result.lines())


def test_backends_alternate_and_stop_together() -> None:
    pair = side_by_side.Pair.start(SMALL, corpus_for(SMALL))
    order: list[str] = []
    for name, trainer in (("fastrnn", pair.fastrnn), ("torch", pair.torch)):
        run = trainer.run

        def recorded(*args: Any, name: str = name, run: Any = run) -> None:
            order.append(name)
            run(*args)

        trainer.run = recorded  # type: ignore[method-assign]
    pair.run(3)
    pair.run(3)
    pair.run(3, lambda: True)
    assert order == ["fastrnn", "torch", "torch", "fastrnn", "fastrnn", "torch"]
    assert pair.fastrnn.step == pair.torch.step == 7
    assert [(block.first_step, block.steps) for block in pair.blocks] == [(1, 3), (4, 3), (7, 1)]


def test_speed_ratio_is_the_median_after_the_warm_up() -> None:
    pair = side_by_side.Pair.start(SMALL, corpus_for(SMALL))
    pair.blocks = [
        side_by_side.Block(1, 10, 1.0, 100.0),
        side_by_side.Block(11, 10, 1.0, 2.0),
        side_by_side.Block(21, 10, 1.0, 3.0),
        side_by_side.Block(31, 10, 1.0, 50.0),
    ]
    result = side_by_side.compare(pair)
    assert result.speed_ratio == 3.0
    assert result.fastrnn_speed == pytest.approx(30 * SMALL.characters_per_step / 3)
    assert side_by_side.compare(side_by_side.Pair(pair.fastrnn, pair.torch)).speed_ratio is None


def test_shown_steps_are_1_2_5_times_powers_of_10() -> None:
    assert side_by_side.shown_steps(0) == []
    assert side_by_side.shown_steps(1) == [1]
    assert side_by_side.shown_steps(150) == [1, 2, 5, 10, 20, 50, 100, 150]


# -- plots and reports ----------------------------------------------------------------------------


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_plots_are_png_files(tmp_path: Path) -> None:
    trainer = trainer_for(SMALL)
    fit(trainer, Lines(), no_save)
    plot.plot_training(tmp_path / "one.png", trainer)
    assert is_png(tmp_path / "one.png")
    pair = side_by_side.Pair.start(SMALL, trainer.corpus)
    fit(pair, Lines(), no_save)
    side_by_side.save_comparison(tmp_path, pair, side_by_side.compare(pair))
    assert is_png(tmp_path / "loss.png")
    assert json.loads((tmp_path / "compare.json").read_text())["steps"] == 12
    assert len(list(tmp_path.iterdir())) == 3


def test_long_curves_are_averaged() -> None:
    curve = plot.training_curve("x", [math.log(2)] * 1000)
    assert len(curve.x) == len(curve.y) <= 400
    assert curve.y == pytest.approx([1.0] * len(curve.y))
    assert curve.x[:2] == [2.0, 5.0]
    assert curve.x[-1] == 1000.0
    assert plot.training_curve("x", [0.0, 0.0]).x == [1.0, 2.0]


def test_plain_lines_are_written_without_a_terminal() -> None:
    stream, now = io.StringIO(), [0.0]
    reporter = reporter_for(stream)
    assert isinstance(reporter, PlainReporter)
    reporter = PlainReporter(stream, clock=lambda: now[0])
    reporter.line("hello [bold]x[/bold]")
    for now[0] in range(25):
        reporter.progress(3, 9, "2.5 bits/char")
    reporter.sample(3, "\na\n b\n")
    reporter.close()
    assert stream.getvalue() == (
        "hello [bold]x[/bold]\n"
        "step      3/9: 2.5 bits/char\n"
        "step      3/9: 2.5 bits/char\n"
        "at step 3 the model writes:\n"
        "    | a\n"
        "    |  b\n"
    )


def test_live_bar_limits_its_updates() -> None:
    from rich.console import Console

    stream, now = io.StringIO(), [0.0]
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    reporter = RichReporter(console, clock=lambda: now[0])
    reporter.line("before [1] the bar")
    for step in range(1000):
        now[0] = step / 1000
        reporter.progress(step, 1000, "status [x]")
    reporter.sample(1000, "def f(x): [return] 1")
    reporter.close()
    reporter.close()
    output = stream.getvalue()
    assert "before [1] the bar" in output
    assert "def f(x): [return] 1" in output
    assert 4 <= output.count("status [x]") <= 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_acts_with_any_number_of_layers(backend: str, layers: int) -> None:
    config = dataclasses.replace(SMALL, backend=backend, layers=layers, **FROZEN)
    plain, dropped = (
        trainer_for(dataclasses.replace(config, dropout=dropout)) for dropout in (0.0, 0.9)
    )
    plain.run(1)
    dropped.run(1)
    assert plain.losses != dropped.losses
    assert evaluate(plain.model, plain.corpus.validation) == evaluate(
        dropped.model, dropped.corpus.validation
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_do_not_depend_on_the_backend(backend: str) -> None:
    a = build_model(9, SMALL).state_dict()
    b = build_model(9, SMALL.changed({"backend": backend})).state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
