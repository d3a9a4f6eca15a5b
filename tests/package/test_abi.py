"""Dependencies of the built libraries: one wheel works with every torch >= 2.11.

The tests read the ELF files that are installed.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastrnn
from fastrnn import _C, _library

PACKAGE = Path(fastrnn.__file__).parent
LIBRARIES = sorted((PACKAGE / "lib").glob("*.so"))
MODULE = Path(_C.__file__)

SYSTEM = {
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
NEEDS = {
    "libfastrnn_kernels.so": set(),
    "libfastrnn_torch.so": {"libfastrnn_kernels.so", "libtorch_cpu.so"},
    "libfastrnn_torch_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so"},
    MODULE.name: {"libfastrnn_kernels.so"},
}
# C++ symbols of torch, which change between releases. The stable ABI consists of C functions and of
# inline code in the two excluded namespaces.
UNSTABLE = re.compile(r"_Z\w*?(2at|3c10|5torch|6caffe2)(?!6stable|10headeronly)")


@dataclass
class Elf:
    """The dynamic section of a 64-bit little-endian shared library."""

    needed: list[str]
    soname: str | None
    runpath: str | None
    undefined: list[str]
    exported: list[str]

    @classmethod
    def read(cls, path: Path) -> Elf:
        data = path.read_bytes()
        assert data[:6] == b"\x7fELF\x02\x01"
        (table,) = struct.unpack_from("<Q", data, 0x28)
        entry_size, count = struct.unpack_from("<HH", data, 0x3A)
        sections = [  # type, offset, size, link
            tuple(
                struct.unpack_from(code, data, table + i * entry_size + at)[0]
                for code, at in (("<I", 4), ("<Q", 24), ("<Q", 32), ("<I", 40))
            )
            for i in range(count)
        ]

        def text(strings: int, at: int) -> str:
            start = sections[strings][1] + at
            return data[start : data.index(b"\0", start)].decode()

        tags: dict[int, list[str]] = {1: [], 14: [], 29: []}  # NEEDED, SONAME, RUNPATH
        undefined, exported = [], []
        for kind, offset, size, link in sections:
            if kind == 6:  # SHT_DYNAMIC
                for tag, value in struct.iter_unpack("<QQ", data[offset : offset + size]):
                    if tag in tags:
                        tags[tag].append(text(link, value))
            elif kind == 11:  # SHT_DYNSYM
                symbols = struct.iter_unpack("<IBBHQQ", data[offset : offset + size])
                for name, _info, _other, section, _value, _size in symbols:
                    if name:
                        (undefined if section == 0 else exported).append(text(link, name))
        first = {tag: values[0] if values else None for tag, values in tags.items()}
        return cls(tags[1], first[14], first[29], undefined, exported)


def test_libraries_have_fixed_names() -> None:
    names = {path.name for path in LIBRARIES}
    expected = {"libfastrnn_kernels.so", "libfastrnn_torch.so"}
    if _C.build_info()["cuda"]:
        expected.add("libfastrnn_torch_cuda.so")
    assert names == expected
    assert ".cpython-" in MODULE.name


@pytest.mark.parametrize("path", [*LIBRARIES, MODULE], ids=lambda path: path.name.split(".")[0])
class TestLibrary:
    def test_needs_only_allowed_libraries(self, path: Path) -> None:
        assert set(Elf.read(path).needed) - SYSTEM == NEEDS[path.name]

    def test_runpath_finds_the_kernels_library(self, path: Path) -> None:
        elf = Elf.read(path)
        assert path == MODULE or elf.soname == path.name
        if "libfastrnn_kernels.so" in elf.needed:
            assert elf.runpath is not None
            assert elf.runpath.split(":")[0] == ("$ORIGIN/lib" if path == MODULE else "$ORIGIN")

    def test_uses_only_the_stable_abi(self, path: Path) -> None:
        assert [name for name in Elf.read(path).undefined if UNSTABLE.match(name)] == []

    def test_uses_no_openmp_functions(self, path: Path) -> None:
        undefined = Elf.read(path).undefined
        assert not [name for name in undefined if name.startswith(("GOMP_", "omp_", "__kmpc_"))]

    def test_exports_only_the_api_of_the_kernels(self, path: Path) -> None:
        ours = [name for name in Elf.read(path).exported if "fastrnn" in name]
        if path.name != "libfastrnn_kernels.so":
            assert ours == []
        else:  # functions of csrc/cpu/api.h, but no code of a single instruction set
            assert ours
            leaked = re.compile(r"7fastrnn3cpu\d*(avx2|avx512|baseline)")
            assert not [name for name in ours if leaked.search(name)]


def test_unstable_pattern_matches_c10_but_not_the_stable_abi() -> None:
    for name in ("_ZN2at6detail10empty_cpuE", "_ZNK3c1010TensorImpl", "_ZN5torch8autogradE"):
        assert UNSTABLE.match(name)
    for name in ("_ZN5torch6stable6detailE", "_ZN5torch10headeronlyE", "aoti_torch_get_dim"):
        assert not UNSTABLE.match(name)


def test_kernels_library_is_loaded_once() -> None:
    """The module and the operators share one copy, so that a forced ISA applies to both."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len(set(re.findall(r"\S*libfastrnn_kernels\S*", maps))) == 1


def test_cuda_library_is_loaded_if_reported() -> None:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert ("libfastrnn_torch_cuda.so" in maps) == _library.cuda_kernels
    assert _library.cuda_kernels == (_library.why_no_cuda == "")
