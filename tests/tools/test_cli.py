"""The command line: output, files, and one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import fastrnn
from fastrnn.tools.charlm import checkpoint, command
from fastrnn.tools.charlm.config import Config
from fastrnn.tools.charlm.data import prepare, read_files
from fastrnn.tools.charlm.train import Trainer
from fastrnn.tools.cli import main

Run = Callable[..., tuple[int, str, str]]

TEXT = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(60))
TINY = [
    *("--hidden", "8"),
    *("--seq-length", "8"),
    *("--batch-size", "4"),
    *("--eval-every", "5"),
    *("--sample-every", "0"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in a temporary folder and returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(TEXT)

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # raised by argparse
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def train(run: Run, *arguments: Any) -> str:
    code, out, err = run("charlm", "--text", "text", *TINY, *arguments)
    assert (code, err) == (0, "")
    return out


def assert_one_line_error(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    found, _, err = result
    assert message in err
    assert found == code
    assert err.count("\n") == 1
    assert err.startswith("fastrnn")


# -- fastrnn, fastrnn info ------------------------------------------------------------------------


def test_version_and_help_are_printed(run: Run) -> None:
    assert run("--version") == (0, f"fastrnn {fastrnn.__version__}\n", "")
    for command_line in ("", "charlm", "charlm sample", "charlm inspect"):
        code, out, _ = run(*command_line.split(), "--help")
        assert code == 0
        assert "usage: fastrnn" in out
    for option in Config.__dataclass_fields__:
        assert command.option_name(option) in run("charlm", "--help")[1]


def test_info_lists_versions_and_plans(run: Run) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for word in (fastrnn.__version__, torch.__version__, "cpu", "cuda", "threads", "lstm"):
        assert word in out


def test_info_json_is_consistent(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "fastrnn", "info", "--json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    facts = json.loads(out)
    assert facts["versions"]["fastrnn"] == fastrnn.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["isa"] in facts["cpu"]["available"]
    assert set(facts["cpu"]["available"]) <= set(facts["cpu"]["compiled"])
    assert facts["cpu"]["threads"] >= 1
    for dtype in ("bfloat16", "int8"):
        assert all(": " in how for how in facts["cpu"][dtype].values())
    assert isinstance(facts["cuda"]["kernels"], bool)
    for plan in facts["plans"]:
        assert plan["cell"] in fastrnn._C.cells()
        assert plan["forward"]["schedule"]


# -- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "COMMAND"),
        ("dance", "dance"),
        ("info --yaml", "--yaml"),
        ("charlm text", "text"),
        ("charlm --hidden", "--hidden"),
        ("charlm --hidden many", "--hidden"),
        ("charlm --hidden 0", "--hidden must be a whole number from 1 up, got 0"),
        ("charlm --hid 5", "--hid"),
        ("charlm --lr nan", "--lr must be a number above 0"),
        ("charlm --dropout 1", "--dropout must be at least 0 and less than 1"),
        ("charlm --cell cnn", "--cell must be one of rnn, lstm, gru"),
        ("charlm --schedule x", "--schedule must be one of constant, cosine, plateau"),
        ("charlm --cell lstm --nonlinearity relu", "--nonlinearity relu needs --cell rnn"),
        ("charlm --backend torch --nonlinearity sigmoid", "needs --backend fastrnn"),
        ("charlm --compare --nonlinearity sigmoid", "torch.nn.RNN supports only tanh and relu"),
        ("charlm --compare --backend torch", "--compare trains with both backends"),
        ("charlm --compare --resume x", "--compare starts from new weights"),
        ("charlm --device tpu", "--device must be cpu, cuda or cuda:N"),
        ("charlm --text gone", "gone: cannot be read (No such file or directory)"),
        ("charlm --text .", ".: is a folder"),
        ("charlm --text empty", "empty: is empty"),
        ("charlm --text binary", "binary: is a binary file"),
        ("charlm --text latin", "latin: is not utf-8 text (byte 3); pass --encoding"),
        (
            "charlm --text latin --encoding x",
            "--encoding must be a text encoding that Python knows, got 'x'",
        ),
        ("charlm --encoding latin-1", "--text"),
        ("charlm --text short", "18 characters are too few"),
        ("charlm --text text --seq-length 8 --output text", "--output text: cannot be created"),
        ("charlm --text text --seq-length 8 --output text/x", "--output text/x: cannot be created"),
        ("charlm --resume gone", "gone: cannot be read"),
        ("charlm --resume .", ".: holds no checkpoint"),
        ("charlm --resume text", "text: is not a checkpoint"),
        ("charlm sample", "CHECKPOINT"),
        ("charlm sample gone", "gone: cannot be read"),
        ("charlm sample text", "text: is not a checkpoint"),
        ("charlm sample text --temperature -1", "--temperature must be a number from 0 up"),
        ("charlm sample text --temperature nan", "--temperature must be a number from 0 up"),
        ("charlm sample text --length 0", "--length must be a whole number from 1 up"),
        ("charlm sample text --top-k -1", "--top-k must be a whole number from 0 up"),
        ("charlm sample text --seed -1", "--seed must be a whole number from 0 up"),
    ],
)
def test_wrong_argument_is_a_one_line_error(
    run: Run, tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0\xff")
    (tmp_path / "latin").write_bytes(b"abc\xfc" * 900)
    (tmp_path / "short").write_text("eighteen character")
    assert_one_line_error(run(*arguments.split()), message)
    assert not (tmp_path / "charlm-run").exists()


def test_an_empty_encoding_is_a_one_line_error(run: Run) -> None:
    for arguments in (("--text", "text", "--encoding", ""), ("--encoding", "")):
        assert_one_line_error(run("charlm", *arguments), "--encoding")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_a_one_line_error(run: Run) -> None:
    assert_one_line_error(
        run("charlm", "--device", "cuda", "--text", "text"), "--device cuda: torch"
    )


@pytest.mark.parametrize("package", ["rich", "matplotlib", "safetensors"])
def test_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run("charlm", "--text", "text")
    assert_one_line_error(result, "pip install 'fastrnn[charlm]'")
    assert package in result[2]
    assert run("info")[0] == 0


def test_nan_loss_is_a_one_line_error(run: Run, tmp_path: Path) -> None:
    result = run("charlm", "--text", "text", *TINY, "--lr", 1000, "--nonlinearity", "relu")
    assert_one_line_error(result, "try a smaller --lr", code=1)
    assert not list((tmp_path / "charlm-run").glob("latest*"))


def test_out_of_memory_is_a_one_line_error(run: Run) -> None:
    # 2**48 bytes of weights: more than a process can address on any machine.
    result = run("charlm", "--text", "text", *TINY, "--embedding", 1, "--hidden", 2**23)
    assert_one_line_error(result, "out of memory; try a smaller --hidden", code=1)


# -- training -------------------------------------------------------------------------------------


def test_run_writes_checkpoints_samples_and_plot(run: Run, tmp_path: Path) -> None:
    out = train(run, "--steps", 20, "--sample-every", 10, "--output", "out", "--seed", 3)
    assert "1 file (text)" in out
    assert f"{len(TEXT):,} characters, a vocabulary of" in out
    assert re.search(r"hidden size 8: [\d,]+ parameters", out)
    assert re.search(r"step +20/20: training \d\.\d+, validation \d\.\d+ bits/char", out)
    assert "chars/s" in out
    assert out.count("the model writes:") == 2
    assert "\x1b" not in out  # no terminal here
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    names = {path.name.split("-")[0] for path in (tmp_path / "out").iterdir()}
    assert names == {"latest", "latest.json", "best", "best.json", "loss.png"}
    document = json.loads((tmp_path / "out/latest.json").read_text())
    assert document["step"] == 20
    assert document["config"]["seed"] == 3
    assert [evaluation["step"] for evaluation in document["evaluations"]] == [5, 10, 15, 20]


def test_default_text_and_default_folder_are_used(run: Run, tmp_path: Path) -> None:
    for folder in ("charlm-run", "charlm-run-2"):
        code, out, _ = run("charlm", *TINY, "--steps", 2)
        assert code == 0
        assert f"the Python {sys.version.split()[0]} standard library" in out
        assert (tmp_path / folder / "latest.json").exists()


def test_run_is_replaced_only_with_overwrite(run: Run, tmp_path: Path) -> None:
    train(run, "--steps", 10, "--output", "out")
    arguments = ("charlm", "--text", "text", *TINY, "--steps", 3, "--output", "out")
    assert_one_line_error(run(*arguments), "--output out: already holds a run")
    assert json.loads((tmp_path / "out/latest.json").read_text())["step"] == 10
    assert run(*arguments, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out/latest.json").read_text())["step"] == 3
    assert json.loads((tmp_path / "out/best.json").read_text())["step"] == 3
    # A run that fails before its first checkpoint leaves none, not even that of the replaced run.
    assert run(*arguments, "--overwrite", "--lr", 1000, "--nonlinearity", "relu")[0] == 1
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_resumed_run_equals_uninterrupted_run(run: Run, tmp_path: Path, cell: str) -> None:
    options = ("--cell", cell, "--layers", 2, "--dropout", 0.2, "--lr", 0.01)
    train(run, *options, "--steps", 12, "--output", "whole")
    train(run, *options, "--steps", 7, "--output", "part")
    train(run, *options, "--steps", 12, "--resume", "part")  # equal options may be repeated
    code, _, err = run("charlm", "--resume", "whole/latest.json", "--steps", 13, "--output", "new")
    assert (code, err) == (0, "")
    whole = checkpoint.load(tmp_path / "whole/latest.json").tensors
    part = checkpoint.load(tmp_path / "part/latest.json").tensors
    assert whole.keys() == part.keys()
    for name in whole:
        assert torch.equal(whole[name], part[name]), name
    new = checkpoint.load(tmp_path / "new/latest.json").tensors
    assert torch.equal(new["losses"][:12], whole["losses"])


def test_resume_rejects_changed_options_texts_and_damage(run: Run, tmp_path: Path) -> None:
    train(run, "--steps", 5, "--output", "out")
    out = ("charlm", "--resume", "out")
    assert_one_line_error(run(*out), "is already at step 5")
    message = "--hidden cannot be changed with --resume (out/latest.json has 8)"
    assert_one_line_error(run(*out, "--hidden", 9, "--steps", 6), message)
    (tmp_path / "text").write_text(TEXT + "#")
    assert_one_line_error(run(*out, "--steps", 6), "was trained on another text")
    (tmp_path / "copy").write_text(TEXT)
    assert run(*out, "--steps", 6, "--text", "copy")[0] == 0
    (tmp_path / "text").unlink()
    assert run(*out, "--steps", 7, "--text", "copy")[0] == 0
    (tmp_path / "copy").unlink()
    assert_one_line_error(run(*out, "--steps", 8), "copy: cannot be read")
    next((tmp_path / "out").glob("latest-*.safetensors")).write_bytes(b"")
    assert_one_line_error(run(*out, "--steps", 8), "is damaged")
    assert_one_line_error(run("charlm", "sample", "out/latest.json"), "is damaged")


def test_early_stopping_ends_the_run(run: Run) -> None:
    out = train(run, "--lr", 1e-30, "--steps", 1000, "--patience", 2, "--schedule", "cosine")
    assert "stopped early at step 15" in out


def test_compare_reports_agreement_and_speed(run: Run, tmp_path: Path) -> None:
    out = train(run, "--compare", "--steps", 30, "--output", "out", "--sample-every", 30)
    assert "largest difference in the first 20 steps" in out
    assert "they agree to float rounding" in out
    assert re.search(r"fastrnn trains \d+\.\d\d times as fast as torch.nn", out)
    assert re.search(r"\n +20 +\d\.\d{6} +\d\.\d{6} +\d\.\de[-+]\d\d\n", out)
    result = json.loads((tmp_path / "out/compare.json").read_text())
    assert result["agrees"] is True
    assert result["steps"] == 30
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert run("charlm", "sample", "out", "--length", 3)[0] == 0


# -- sampling -------------------------------------------------------------------------------------


def test_sample_depends_on_seed_temperature_and_prime(run: Run) -> None:
    train(run, "--steps", 10, "--output", "out")
    sample = ("charlm", "sample", "out", "--length", 40)
    code, out, err = run(*sample, "--prime", "def ")
    assert (code, err) == (0, "")
    assert out.startswith("def ")
    assert len(out) == 4 + 40 + 1
    assert set(out) <= set(TEXT)
    assert run(*sample, "--prime", "def ")[1] == out
    assert run(*sample, "--prime", "def ", "--seed", 1)[1] != out
    assert run(*sample, "--temperature", 0)[1] == run(*sample, "--top-k", 1)[1]
    assert run(*sample, "--prime", "€ \udcff")[0] == 0
    assert len(run(*sample)[1]) == 41


# -- processes ------------------------------------------------------------------------------------


def start(folder: Path, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastrnn", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore Ctrl-C, and their children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"ended without {word!r}: {process.communicate()}")


def test_ctrl_c_saves_a_run_that_can_be_resumed(run: Run, tmp_path: Path) -> None:
    options = ("--steps", 10**6, "--threads", 1, "--output", "out")
    process = start(tmp_path, "charlm", "--text", "text", *TINY, *options)
    wait_for(process, "step")
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == (
        "fastrnn charlm: interrupted, everything is saved; "
        "continue with: fastrnn charlm --resume out\n"
    )
    assert process.returncode == 130
    saved = checkpoint.load(tmp_path / "out/latest.json")
    assert (tmp_path / "out/loss.png").exists()
    assert saved.step == len(saved.tensors["losses"]) > 0
    code, _, err = run("charlm", "--resume", "out", "--steps", saved.step + 7)
    assert (code, err) == (0, "")
    corpus = prepare(read_files(["text"]), saved.config.batch_size, saved.config.seq_length)
    whole = Trainer(saved.config, corpus)
    whole.run(saved.step + 7)
    resumed = checkpoint.load(tmp_path / "out/latest.json")
    assert resumed.tensors["losses"].tolist() == whole.losses


def test_closed_pipe_and_ctrl_c_end_sampling(run: Run, tmp_path: Path) -> None:
    train(run, "--steps", 5, "--output", "out")
    process = start(tmp_path, "charlm", "sample", "out", "--length", 10**6)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()  # like `| head`
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()
    process = start(tmp_path, "charlm", "sample", "out", "--length", 10**6)
    assert process.stdout is not None
    process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "fastrnn: interrupted\n"
    assert process.returncode == 130


def test_ascii_output_replaces_other_characters(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("äöü€" * 300)
    train(run, "--steps", 5, "--output", "out")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start(tmp_path, "charlm", "sample", "out", "--length", 9, env=environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "?" * 9 + "\n", "")
