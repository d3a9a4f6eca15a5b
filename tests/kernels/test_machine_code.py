"""Machine code of the microkernels: .ci/check_kernels.py counts instructions and finds faults."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "check_kernels.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="source archives have no .ci")

AVX512 = """
0000000000000000 <void fastrnn::cpu::avx512::tile<float, 2, 4>(long, float const*, long)>:
   0:	push   %rbp
   1:	vmovups (%rsi),%zmm26
   5:	nopw   0x0(%rax,%rax,1)
  2d8:	vmovups (%rdx),%zmm3
  2de:	vbroadcastss (%rax),%zmm4
  2e4:	add    $0x4,%rax
  2e8:	vmovups 0x40(%rdx),%zmm2
  2ef:	vmovups 0x80(%rdx),%zmm1
  2fd:	vfmadd231ps %zmm4,%zmm3,%zmm28
  303:	add    %r10,%rdx
  306:	vfmadd231ps %zmm4,%zmm2,%zmm27
  30c:	vfmadd231ps %zmm4,%zmm1,%zmm26
  312:	vfmadd231ps 0xc0(%rbp),%zmm4,%zmm25
  318:	vbroadcastss -0x4(%rax,%r11,1),%zmm4
  320:	vfmadd231ps %zmm4,%zmm3,%zmm24
  326:	vfmadd231ps %zmm4,%zmm2,%zmm23
  32c:	vfmadd231ps %zmm4,%zmm1,%zmm22
  332:	vfmadd231ps 0xc0(%rbp),%zmm4,%zmm21
  3b8:	cmp    %r15,%rax
  3bb:	jne    2d8 <void fastrnn::cpu::avx512::tile<float, 2, 4>(long, float const*, long)+0x2d8>
  3c1:	vmovdqa64 %zmm28,-0x38(%rsp)
  3c7:	ret
  3c8:	xor    %edx,%edx
  3ca:	jmp    1 <void fastrnn::cpu::avx512::tile<float, 2, 4>(long, float const*, long)+0x1>
"""
SSE2 = """
0000000000000000 <void fastrnn::cpu::baseline::dot<double, 2>(long, double const*, long)>:
 148:	movupd (%rdx),%xmm13
 14d:	movsd  (%rax),%xmm14
 15f:	unpcklpd %xmm14,%xmm14
 164:	movapd %xmm13,%xmm15
 169:	mulpd  %xmm14,%xmm15
 173:	addpd  %xmm15,%xmm11
 178:	mulpd  0x10(%rdx),%xmm14
 17d:	addpd  %xmm14,%xmm10
 231:	cmp    %rbx,%rax
 234:	jne    148 <void fastrnn::cpu::baseline::dot<double, 2>(long, double const*, long)+0x148>
"""
NEON = """
0000000000000000 <void fastrnn::cpu::baseline::tile<float, 2, 2>(long, float const*, long)>:
   0:	stp	x29, x30, [sp, #-432]!
   4:	mov	x29, sp
 228:	ldp	q3, q2, [x3]
 22c:	ldr	s16, [x1, x24]
 240:	ld1r	{v17.4s}, [x1]
 244:	add	x1, x1, #0x4
 250:	fmla	v14.4s, v2.4s, v17.4s
 254:	fmla	v10.4s, v2.4s, v16.s[0]
 258:	fmla	v30.4s, v3.4s, v17.4s
 25c:	fmla	v26.4s, v3.4s, v16.s[0]
 2bc:	cmp	x0, x1
 2c0:	b.ne	228 <void fastrnn::cpu::baseline::tile<float, 2, 2>(long)+0x228>  // b.any
"""
AMX = """
0000000000000000 <void fastrnn::cpu::amx_bf16::amx_tile<2, 1>(long, float*)>:
   0:	tileloadd (%rax,%r9,1),%tmm0
  40:	tileloadd (%rax,%rdx,1),%tmm4
  46:	tileloadd (%rcx,%rdx,1),%tmm5
  4c:	tileloadd (%rsi,%r8,1),%tmm6
  52:	tdpbf16ps %tmm6,%tmm4,%tmm0
  57:	tdpbf16ps %tmm6,%tmm5,%tmm1
  5c:	add    $0x40,%rax
  60:	dec    %rdi
  63:	jne    40 <void fastrnn::cpu::amx_bf16::amx_tile<2, 1>(long)+0x40>
  65:	tilestored %tmm0,(%rax,%r9,1)
"""


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("check_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def only_function(kernels: ModuleType, text: str, machine: str = "x86_64") -> Any:
    (function,) = kernels.functions(text, machine)
    return function


def faults(kernels: ModuleType, text: str, machine: str = "x86_64", chains: int = 1) -> list[str]:
    """Returns the faults of the only function of a disassembly."""
    _, wrong = kernels.check(only_function(kernels, text, machine), chains)
    return [str(fault) for fault in wrong]


def test_clean_loop_has_no_faults(kernels: ModuleType) -> None:
    function = only_function(kernels, AVX512)
    assert (function.isa, function.kernel, function.type) == ("avx512", "tile", "float")
    assert function.shape == (2, 4)
    # The jump from below `ret` back to the exit of the loop is not a loop. rbp is not a frame
    # pointer here.
    (loop,) = kernels.loops(function)
    assert (loop.multiply_adds, loop.loads, loop.integer) == (8, 7, 4)
    assert loop.moves == loop.others == loop.spills == loop.reloads == 0
    assert loop.share == pytest.approx(8 / 17)
    assert faults(kernels, AVX512) == []


def test_product_and_sum_without_fma_count_as_one_multiply_add(kernels: ModuleType) -> None:
    (loop,) = kernels.loops(only_function(kernels, SSE2))
    assert (loop.multiply_adds, loop.loads, loop.moves, loop.others) == (2, 3, 1, 1)
    assert loop.share == pytest.approx(4 / 10)
    assert faults(kernels, SSE2) == []
    with_fma = SSE2.replace("baseline", "avx2")
    assert [text.partition(" in ")[0] for text in faults(kernels, with_fma)] == [
        "has 1 moves between vector registers",
        "has 1 other vector instructions",
    ]


@pytest.mark.parametrize(
    "text",
    [AMX, AMX.replace("amx_bf16::amx", "amx_int8::int8_amx").replace("tdpbf16ps", "tdpbusd")],
    ids=["bfloat16", "int8"],
)
def test_tile_registers_count_as_vectors(kernels: ModuleType, text: str) -> None:
    (loop,) = kernels.loops(only_function(kernels, text))
    assert (loop.multiply_adds, loop.loads, loop.integer) == (2, 3, 3)
    assert loop.moves == loop.others == loop.spills == 0
    assert faults(kernels, text) == []
    stored = text.replace("add    $0x40,%rax", "tilestored %tmm0,(%rax,%r9,1)")
    assert faults(kernels, stored) == ["has 1 other vector instructions in its K loop, more than 0"]


def test_vector_lanes_do_not_count_as_loads(kernels: ModuleType) -> None:
    (loop,) = kernels.loops(only_function(kernels, NEON, "aarch64"))
    assert (loop.multiply_adds, loop.loads, loop.integer) == (4, 3, 3)
    assert loop.moves == loop.others == loop.spills == 0
    assert faults(kernels, NEON, "aarch64") == []


@pytest.mark.parametrize(
    ("machine", "text", "old", "new", "times"),
    [
        ("x86_64", AVX512, "vbroadcastss (%rax)", "vbroadcastss 0x68(%rsp)", 1),
        ("x86_64", AVX512, "cmp    %r15,%rax", "vmovaps %zmm0,0x68(%rsp)", 1),
        ("x86_64", AVX512, "push   %rbp", "mov    %rsp,%rbp", 2),
        ("x86_64", SSE2, "addpd  %xmm15,%xmm11", "addpd  -0x78(%rsp),%xmm15", 1),
        ("aarch64", NEON, "ldr\ts16, [x1, x24]", "ldr\tq16, [sp, #160]", 1),
        ("aarch64", NEON, "cmp\tx0, x1", "stp\tq2, q1, [x29, #160]", 1),
    ],
    ids=["load", "store", "frame", "sum", "aarch64 load", "aarch64 store"],
)
def test_planted_spill_is_found(
    kernels: ModuleType, machine: str, text: str, old: str, new: str, times: int
) -> None:
    assert old in text
    assert faults(kernels, text.replace(old, new), machine) == [
        f"spills: its loops load or store vectors on the stack {times} times"
    ]


def test_other_faults_are_found(kernels: ModuleType) -> None:
    assert faults(kernels, AVX512, chains=3) == [
        "has 8 multiply-adds in its K loop, not a multiple of 24"
    ]
    jump = AVX512.replace("cmp    %r15,%rax", "jne    3c1 <tile+0x3c1>")
    assert faults(kernels, jump) == ["has no loop with multiply-adds and without inner jumps"]
    move = AVX512.replace("cmp    %r15,%rax", "vmovaps %zmm0,%zmm1")
    assert faults(kernels, move) == [
        "has 1 moves between vector registers in its K loop, more than 0"
    ]
    reload = AVX512.replace("add    ", "mov    0x8(%rsp),%rcx\n 2f6:	add    ")
    assert faults(kernels, reload) == []  # two reloads are allowed
    reload = reload.replace("cmp    %r15,%rax", "vmovq  %xmm1,%rcx")
    assert faults(kernels, reload) == ["has 3 reloads of integers in its K loop, more than 2"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fastrnn::cpu::avx2::tile<double, 6, 2>(long)", ("double", (6, 2))),
        ("fastrnn::cpu::avx2::tile<float, ns::Half, 3, 4>(long)", ("float, ns::Half", (3, 4))),
        ("fastrnn::cpu::avx2::tile<3, 4, true>(long)", ("", (3, 4))),
        ("fastrnn::cpu::avx2::tile<double, 6, 2>(long) [clone .cold]", None),
        ("fastrnn::cpu::avx2::tile_of_another_name<double, 6, 2>(long)", None),
        ("fastrnn::cpu::avx2::Walk<float, fastrnn::cells::Gru>::run(int)", None),
    ],
)
def test_function_names_are_parsed(
    kernels: ModuleType, name: str, found: tuple[str, tuple[int, int]] | None
) -> None:
    functions = list(kernels.functions(f"0000000000000000 <void {name}>:\n   0:\tret\n", "x86_64"))
    assert [(function.type, function.shape) for function in functions] == ([found] if found else [])


def test_other_files_are_rejected(kernels: ModuleType) -> None:
    with pytest.raises(SystemExit, match="is not an object for x86-64 or aarch64"):
        kernels.main([str(SCRIPT)])
    with pytest.raises(SystemExit, match="usage"):
        kernels.main([])


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_int8_tiles_are_those_of_the_cells(kernels: ModuleType) -> None:
    kernel = kernels.MICROKERNELS["int8_amx_tile"]
    expected = {(1, 1): 1, (2, 1): 1, (2, 2): 1, (1, 3): 1, (1, 4): 1}
    assert kernels.shapes("amx_int8", "x86_64", kernel) == expected
    assert kernels.shapes("avx512_vnni", "x86_64", kernel) == {}


def compile_kernels(source: Path, target: Path) -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_under_test")
    flags = [*setup["CXX_FLAGS"], *setup["KERNEL_FLAGS"], "-fPIC", "-DNDEBUG"]
    folders = ["-I", str(ROOT / "csrc")]
    command = ["g++", *flags, *folders, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("objdump")), reason="needs g++ and objdump"
)
def test_compiled_kernels_pass_and_excess_tile_heights_spill(
    kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("setuptools")
    compile_kernels(ROOT / "csrc" / "cpu" / "isa" / "avx512.cpp", tmp_path / "avx512.o")
    if kernels.machine_of(str(tmp_path / "avx512.o")) != "x86_64":
        pytest.skip("AVX-512 needs x86-64")
    assert kernels.main([str(tmp_path / "avx512.o")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tile", "6", "x", "4", "double", "float", "24"] in [row[:7] for row in rows]

    # The tile heights of AVX-512 spill with AVX2, which has half as many registers.
    text = (ROOT / "csrc" / "cpu" / "isa" / "avx2.cpp").read_text(encoding="utf-8")
    source = tmp_path / "avx2.cpp"
    include = '#include "cpu/isa/avx2_target.h"\n'
    assert include in text
    more = "#undef FASTRNN_REGISTERS\n#define FASTRNN_REGISTERS 32\n"
    source.write_text(text.replace(include, include + more))
    compile_kernels(source, tmp_path / "avx2.o")
    assert kernels.main([str(tmp_path / "avx2.o")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert any("avx2::tile<float, 6, 4>" in line and "spills: " in line for line in errors)
    assert not any("avx2::tile<float, 6, 2>" in line for line in errors)
