"""Fails if the K loop of a CPU microkernel spills registers or has unexpected instructions.

    check_kernels.py OBJECT...     objects of csrc/cpu/isa/*.cpp, for x86-64 or aarch64

The K loop is found in the disassembly: it ends with a backward jump, and contains multiply-adds and
no other jump. It must hold a whole number of steps along K and almost only multiply-adds and loads,
and must not use vectors on the stack. tile_shape.h determines which tiles must exist.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of the ELF header


@dataclass(frozen=True)
class Microkernel:
    """The instances name<types, M, N> that must exist: tiles of M rows and N vectors."""

    types: tuple[str, ...] = ()  # () if no instance is required: only the existing ones are checked
    rows: str = ""  # function in tile_shape.h: largest number of rows for n vectors
    chains: str = "1"  # function in tile_shape.h: number of chains for m rows and n vectors
    exists: str = "true"  # condition in tile_shape.h: m rows and n vectors make a tile
    table: str = "cpu/kernels/table.h"  # header whose inclusion in isa/*.cpp creates the instances
    depth: int = 1  # steps along K per multiply-add
    widens: bool = False  # the loop also widens its values: once per row, vector and step along K


# An instance name<types, M> has one vector; further arguments do not matter. M and N of an AMX tile
# count tile registers.
MICROKERNELS = {
    "tile": Microkernel(("float", "double"), rows="tile_rows", chains="tile_chains"),
    "prefetching_tile": Microkernel(),
    "dot": Microkernel(),
    "half_tile": Microkernel(),
    "pair_tile": Microkernel(
        ("",),
        rows="pair_rows",
        chains="pair_chains",
        table="cpu/kernels/bfloat16/table.h",
        depth=2,
        widens=True,
    ),
    "amx_tile": Microkernel(
        ("",),
        rows="amx_row_tiles",
        table="cpu/kernels/bfloat16/table.h",
    ),
    "int8_amx_tile": Microkernel(
        ("",),
        rows="amx_row_tiles",
        exists="has_int8_amx_tile(m, n)",
        table="cpu/kernels/int8/table.h",
    ),
}

# Integers that a loop may load from the stack (or from a vector register) per step along K: x86 has
# too few integer registers for the offsets of 12 rows.
INTEGER_RELOADS = 2
# Vector instructions other than multiply-adds and loads are allowed only on SSE2. SSE2 has no FMA,
# its product overwrites a factor (at most one move per product), and a broadcast is a load and a
# shuffle (one shuffle per row and step).
# A loop that widens may keep a pair of values: at most one move per widening.
NO_FMA = {("baseline", "x86_64")}

HEADER = re.compile(r"^[0-9a-f]+ <(?P<name>.+)>:$")
INSTRUCTION = re.compile(r"^ *(?P<at>[0-9a-f]+):\t(?P<code>[a-z][\w.]*) *\t?(?P<operands>.*)$")
COMMENT = re.compile(r"\s*(<.*|//.*|# .*)$")
MICROKERNEL = re.compile(
    r"\bfastrnn::cpu::(?P<isa>\w+)::(?P<kernel>\w+)<(?:(?P<type>[^()\d][^()]*?), )?"
    r"(?P<m>\d+)(?:, (?P<n>\d+))?(?:, [^()]*)?>\("
)
JUMP = re.compile(r"j\w+|b(\..+)?|cbn?z|tbn?z")
RETURN = re.compile(r"ret\w*|call\w*|bl|blr|br")
MULTIPLY_ADD = re.compile(r"vfn?m(add|sub)\w+|fml[as]|vdpbf16ps|tdpbf16ps|tdpbusd")
WIDENING = re.compile(r"vpslld|vpandd?|vandps")
PRODUCT = re.compile(r"v?mulp[sd]|fmul")
SUM = re.compile(r"v?addp[sd]|fadd")
MOVE = re.compile(r"v?mov[^i]\w*|mov|fmov")
VECTOR = re.compile(r"%[xyzt]mm\d+|\b[vqdshb]\d+\b")
INTEGER = re.compile(r"%r\w+|%e\w\w|\b[wx]\d+\b")
MEMORY = re.compile(r"\(|(?<!\.[bhsd])\[")  # but not the lane v0.s[1]
STACK = {"x86_64": r"\(%rsp", "aarch64": r"\[sp"}
FRAME = {"x86_64": (r"mov %rsp,%rbp", r"\(%rbp"), "aarch64": (r"mov x29, sp", r"\[x29")}


@dataclass(frozen=True)
class Instruction:
    at: int
    code: str
    operands: str

    @property
    def target(self) -> int | None:
        """Target of a jump, if its operands contain an address."""
        last = self.operands.rpartition(",")[2].strip()
        if JUMP.fullmatch(self.code) and re.fullmatch("[0-9a-f]+", last):
            return int(last, 16)
        return None


@dataclass
class Function:
    """A microkernel's code."""

    name: str
    machine: str
    isa: str
    kernel: str
    type: str
    shape: tuple[int, int]  # rows, vectors
    body: list[Instruction] = field(default_factory=list)

    @property
    def on_stack(self) -> re.Pattern[str]:
        """Pattern of an operand on the stack. rbp and x29 point to it only if there is a frame."""
        begin, frame = FRAME[self.machine]
        has_frame = any(f"{i.code} {i.operands}" == begin for i in self.body)
        return re.compile(STACK[self.machine] + (f"|{frame}" if has_frame else ""))


@dataclass(frozen=True)
class Loop:
    """Number of instructions in a loop, by kind."""

    multiply_adds: int  # a product and a sum count as one
    loads: int  # loads of vectors, also as an operand of a multiply-add
    moves: int  # between vector registers
    widenings: int  # shifts and masks of vectors
    others: int  # all other instructions with vectors
    spills: int  # vectors stored to the stack or loaded from it
    reloads: int  # integers loaded from the stack or from a vector register
    integer: int  # instructions without vectors
    share: float  # multiply-adds divided by all instructions


def functions(disassembly: str, machine: str) -> Iterator[Function]:
    """Yields the microkernels in the output of `objdump -dC --no-show-raw-insn`."""
    function: Function | None = None
    for line in disassembly.splitlines():
        if header := HEADER.match(line):
            if function is not None:
                yield function
            function = None
            kernel = MICROKERNEL.search(header["name"])
            if kernel is not None and kernel["kernel"] in MICROKERNELS and "[" not in line:
                function = Function(
                    name=header["name"],
                    machine=machine,
                    isa=kernel["isa"],
                    kernel=kernel["kernel"],
                    type=kernel["type"] or "",
                    shape=(int(kernel["m"]), int(kernel["n"] or 1)),
                )
        elif function is not None and (found := INSTRUCTION.match(line)):
            operands = COMMENT.sub("", found["operands"])
            function.body.append(Instruction(int(found["at"], 16), found["code"], operands))
    if function is not None:
        yield function


def loops(function: Function) -> list[Loop]:
    """Returns the loops without inner jumps that have multiply-adds, most multiply-adds first."""
    found = []
    start = {instruction.at: i for i, instruction in enumerate(function.body)}
    for end, instruction in enumerate(function.body):
        begin = start.get(-1 if instruction.target is None else instruction.target, end + 1)
        body = function.body[begin : end + 1]
        if body and not any(JUMP.fullmatch(i.code) or RETURN.fullmatch(i.code) for i in body[:-1]):
            found.append(count(body, function.on_stack))
    found = [loop for loop in found if loop.multiply_adds]
    return sorted(found, key=lambda loop: -loop.multiply_adds)


def count(body: list[Instruction], on_stack: re.Pattern[str]) -> Loop:
    fused = products = sums = loads = spills = moves = others = integer = reloads = widenings = 0
    for i in body:
        stack = bool(on_stack.search(i.operands))
        memory = MEMORY.search(i.operands) is not None
        store = memory and is_store(i)
        vector = JUMP.fullmatch(i.code) is None and VECTOR.search(i.operands)
        if not vector:
            integer += 1
            reloads += stack
            continue
        spills += stack
        loads += memory and not store
        if MULTIPLY_ADD.fullmatch(i.code):
            fused += 1
        elif PRODUCT.fullmatch(i.code):
            products += 1
        elif SUM.fullmatch(i.code):
            sums += 1
        elif memory:
            others += store and not stack
        elif INTEGER.search(i.operands):
            reloads += 1
        elif MOVE.fullmatch(i.code):
            moves += 1
        elif WIDENING.fullmatch(i.code):
            widenings += 1
        else:
            others += 1
    pairs = min(products, sums)
    others += products + sums - 2 * pairs
    share = (fused + 2 * pairs) / len(body)
    return Loop(fused + pairs, loads, moves, widenings, others, spills, reloads, integer, share)


def is_store(instruction: Instruction) -> bool:
    """Whether this stores: on x86 (AT&T order) memory is the last operand; on aarch64, the name."""
    return re.match(r"st", instruction.code) is not None or instruction.operands.endswith(")")


def check(function: Function, chains: int) -> tuple[Loop | None, list[str]]:
    """Returns the K loop and its faults."""
    found = loops(function)
    if not found:
        return None, ["has no loop with multiply-adds and without inner jumps"]
    rows, vectors = function.shape
    loop = found[0]
    wrong = []
    each = rows * vectors * chains
    if loop.multiply_adds % each:
        wrong.append(
            f"has {loop.multiply_adds} multiply-adds in its K loop, not a multiple of {each}"
        )
    for rest in found[1:]:
        if rest.multiply_adds % (rows * vectors):
            wrong.append(f"has a loop of {rest.multiply_adds} multiply-adds, not {rows * vectors}")
    if spills := sum(one.spills for one in found):
        wrong.append(f"spills: its loops load or store vectors on the stack {spills} times")
    steps = max(1, loop.multiply_adds // (rows * vectors))
    no_fma = (function.isa, function.machine) in NO_FMA
    kernel = MICROKERNELS[function.kernel]
    widenings = (rows + vectors) * steps if kernel.widens else 0
    for what, number, limit in (
        ("moves between vector registers", loop.moves, loop.multiply_adds if no_fma else widenings),
        ("widenings", loop.widenings, widenings),
        ("other vector instructions", loop.others, rows * steps if no_fma else 0),
        ("reloads of integers", loop.reloads, INTEGER_RELOADS * steps * kernel.depth),
    ):
        if number > limit:
            wrong.append(f"has {number} {what} in its K loop, more than {limit}")
    return loop, wrong


def shapes(isa: str, machine: str, kernel: Microkernel) -> dict[tuple[int, int], int]:
    """Returns {(rows, vectors): chains} of the tiles that tile_shape.h defines for an ISA."""
    macros = (CSRC / "cpu" / "isa" / f"{isa}.cpp").read_text(encoding="utf-8")
    if not kernel.types or f'#include "{kernel.table}"' not in macros:
        return {}
    chains = kernel.chains if kernel.chains == "1" else f"{kernel.chains}(m, n)"
    program = [
        "#include <cstdint>",
        "#include <cstdio>",
        *(f"#undef __{name}__" for name in MACHINES.values()),
        f"#define __{machine}__ 1",
        re.sub(r'#include "cpu/kernels/.*', "", macros),
        "#define FASTRNN_KERNELS_BEGIN",
        "#define FASTRNN_KERNELS_END",
        '#include "cpu/kernels/product/tile_shape.h"',
        "int main() {",
        "  for (int n = 1; n <= kTileVectors; ++n)",
        f"    for (int m = 1; m <= {kernel.rows}(n); ++m)",
        f'      if ({kernel.exists}) std::printf("%d %d %d\\n", m, n, {chains});',
        "}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        probe = str(Path(folder) / "probe")
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, "-w", "-std=c++17", f"-I{CSRC}", "-x", "c++", "-", "-o", probe]
        subprocess.run(command, input="\n".join(program), text=True, check=True)
        output = subprocess.run([probe], capture_output=True, text=True, check=True).stdout
    lines = [[int(number) for number in line.split()] for line in output.splitlines()]
    return {(m, n): chains for m, n, chains in lines}


def machine_of(path: str) -> str:
    header = Path(path).read_bytes()[:20]
    machine = MACHINES.get(int.from_bytes(header[18:20], "little"))
    if header[:4] != b"\x7fELF" or machine is None:
        raise SystemExit(f"{path} is not an object for x86-64 or aarch64.")
    return machine


def disassemble(path: str, machine: str) -> str:
    here = platform.machine() == machine
    objdump = "objdump" if here else f"{machine.replace('_', '-')}-linux-gnu-objdump"
    command = [objdump, "-dC", "--no-show-raw-insn", path]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise SystemExit(f"'{objdump}' is missing; it comes with the compiler.") from None


def check_object(path: str) -> list[str]:
    """Prints a table of the object's microkernels; returns one sentence per fault."""
    machine = machine_of(path)
    found = list(functions(disassemble(path, machine), machine))
    if not found:
        return [f"{path} holds no microkernel."]
    isa = found[0].isa
    wrong = []
    rows: dict[tuple[str, tuple[int, int], str], list[str]] = {}  # row of the table -> its types
    for name, kernel in MICROKERNELS.items():
        expected = shapes(isa, machine, kernel)
        here = [function for function in found if function.kernel == name]
        for of_type in kernel.types:
            there = {function.shape for function in here if function.type == of_type}
            for m, n in sorted(expected.keys() - there):
                wrong.append(f"{path} has no {isa}::{name}<{of_type}, {m}, {n}>.")
        for function in sorted(here, key=lambda function: function.shape[::-1]):
            loop, faults = check(function, expected.get(function.shape, 1))
            wrong += [f"{function.name} {fault}." for fault in faults]
            if loop is not None:
                of_type = function.type.rpartition("::")[2]
                rows.setdefault((name, function.shape, line(loop)), []).append(of_type)
    print(f"{isa} on {machine}: {len(found)} microkernels, instructions per iteration of K")
    print(" " * 30 + "FMAs loads moves widens others spills integer  FMA share")
    for (name, (m, n), text), types in rows.items():
        print(f"  {name:9}{m:3} x {n}  {' '.join(sorted(types)):13}{text}")
    return wrong


def line(loop: Loop) -> str:
    return (
        f"{loop.multiply_adds:4}{loop.loads:6}{loop.moves:6}{loop.widenings:7}{loop.others:7}"
        f"{loop.spills:7}"
        f"{loop.integer:8}{loop.share:10.0%}"
    )


def main(paths: list[str]) -> int:
    if not paths:
        raise SystemExit("usage: check_kernels.py OBJECT...")
    wrong = [sentence for path in paths for sentence in check_object(path)]
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
