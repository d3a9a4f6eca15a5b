"""C programs that use the interface: the example, and what happens inside a step."""

from __future__ import annotations

import re
import shlex
import shutil
import struct
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from support import build

import fastrnn
from fastrnn import c_interface

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c"
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def compile_program(source: Path, program: Path, *flags: str) -> Path:
    paths = [*c_interface.compile_flags(), str(source), *c_interface.link_flags()]
    subprocess.run(
        [str(COMPILER), "-O1", *WARNINGS, *flags, *paths, "-o", str(program)], check=True
    )
    return program


def output_of(*command: object, folder: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def inside_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    source = Path(__file__).with_name("inside_step.c")
    return compile_program(source, folder / "inside_step", "-std=c99", "-ldl")


MODELS = [
    ("lstm", {"input_size": 64, "hidden_size": 64}, 1),
    ("gru", {"input_size": 40, "hidden_size": 130, "num_layers": 3}, 3),
    ("lstm", {"input_size": 20, "hidden_size": 50, "num_layers": 2, "proj_size": 30}, 20),
]


@pytest.mark.parametrize(("cell", "shape", "batch"), MODELS, ids=str)
def test_a_step_allocates_nothing_and_makes_no_system_call(
    inside_step: Path, cell: str, shape: dict[str, int], batch: int, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    build(cell, **shape).stream().export(model)
    assert output_of(inside_step, model, batch, "count") == "0 3"
    if output_of(inside_step, model, batch, "control") == "unavailable":
        pytest.skip("the system has no seccomp")
    assert output_of(inside_step, model, batch, "control") == "killed"
    assert output_of(inside_step, model, batch, "seccomp") == "clean"


@pytest.mark.parametrize("language", [["-xc", "-std=c99"], ["-xc++", "-std=c++11"]], ids=str)
def test_header_compiles_alone(language: list[str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("#include <fastrnn.h>\nint main(void) { return fastrnn_version() == 0; }\n")
    flags = [*language, *WARNINGS, *c_interface.compile_flags(), str(source), "-fsyntax-only"]
    subprocess.run([str(COMPILER), *flags], check=True)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the source tree")
@pytest.mark.parametrize("channels", [1, 2])
def test_example_filters_as_the_module_does(channels: int, tmp_path: Path) -> None:
    """The commands are those of examples/c/README.md."""
    readme = (EXAMPLE / "README.md").read_text("utf-8")
    [block] = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    make_model, compile_example, _run = block.strip().splitlines()
    assert "fastrnn.LSTM(1, 16, proj_size=1)" in make_model
    module = build("lstm", 1, 16, proj_size=1).eval()
    module.stream().export(tmp_path / "model.safetensors")
    shutil.copy(EXAMPLE / "wav_filter.c", tmp_path)
    python = shlex.quote(sys.executable)
    command = compile_example.replace("$(python ", f"$({python} ").replace(
        "cc ", "cc -Wall -Werror "
    )
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)

    samples = (torch.randn(1000, channels) * 8000).clamp(-32768, 32767).to(torch.int16)
    with wave.open(str(tmp_path / "in.wav"), "wb") as file:
        file.setparams((channels, 2, 48000, 0, "NONE", ""))
        file.writeframes(struct.pack(f"<{samples.numel()}h", *samples.flatten().tolist()))
    program = [str(tmp_path / "wav_filter"), "model.safetensors", "in.wav", "out.wav"]
    subprocess.run(program, cwd=tmp_path, check=True)

    with wave.open(str(tmp_path / "out.wav"), "rb") as file:
        assert file.getnchannels() == channels
        frames = file.readframes(file.getnframes())
    found = torch.tensor(struct.unpack(f"<{samples.numel()}h", frames)).view(1000, channels)
    with torch.no_grad():
        expected = module(samples.float().unsqueeze(-1) / 32768)[0].squeeze(-1) * 32768
    assert len(found.unique()) > 100
    assert (found - expected).abs().max() <= 0.51  # half a unit of the file, and rounding


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the source tree")
def test_example_rejects_other_files(tmp_path: Path) -> None:
    program = compile_program(EXAMPLE / "wav_filter.c", tmp_path / "wav_filter")
    (tmp_path / "text").write_text("RIFF or not")
    command = [str(program), "missing", "text", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "wav_filter: the input must be a WAV file of 16-bit PCM\n"


def test_paths_exist(tmp_path: Path) -> None:
    assert (Path(fastrnn.get_include()) / "fastrnn.h").is_file()
    assert Path(fastrnn.get_library()).is_file()
    # python -m puts its folder on sys.path: a fastrnn/ without libraries must not lie in it
    info = [sys.executable, "-m", "fastrnn", "info"]
    printed = output_of(*info, "--cflags", "--libs", folder=tmp_path)
    assert shlex.split(printed) == [*c_interface.compile_flags(), *c_interface.link_flags()]
    printed = output_of(*info, "--cflags", folder=tmp_path)
    assert printed == f"-I{fastrnn.get_include()}"
