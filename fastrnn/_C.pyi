"""Types of the compiled module: build facts, CPU capability and plans. No tensors in here."""

from collections.abc import Sequence
from typing import Literal, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch_built_against: str
    isas: list[str]
    headers: str
    kernel_flags: str
    cuda: bool
    cuda_version: str | None
    cuda_archs: list[str]

class CellFacts(TypedDict):
    gates: int
    first_gates: int
    pre: int
    saved: int
    states: int
    parameters: int
    dense: bool
    projects: bool
    reduced: bool
    pre_x: list[int]
    pre_h: list[int]

class Plan(TypedDict, total=False):
    schedule: str
    isa: str
    vector_lanes: int
    threads: int
    row_groups: int
    unit_groups: int
    unit_vectors: int
    back_vectors: int
    packed: bool
    together: int
    shared: bool
    recurrent_format: str
    bfloat16: str
    int8: str
    input: Literal["fused", "ahead"]
    chunk_rows: int
    stacked: bool

class CudaPlan(TypedDict, total=False):
    """Plan of a GPU; only the persistent schedule has the keys after `chunk_rows`."""

    schedule: Literal["persistent", "stepwise"]
    chunk_rows: int
    tensor_cores: bool
    units: int
    unit_blocks: int
    output_blocks: int
    row_tiles: int
    row_groups: int
    blocks: int
    shared_bytes: int

def build_info() -> BuildInfo: ...
def available_isas() -> list[str]: ...
def cpu_capability() -> str: ...
def cpu_vendor() -> str: ...
def set_isa(name: str | None) -> None: ...
def max_threads() -> int: ...
def check_settings() -> None: ...
def set_max_threads(threads: int) -> None: ...
def cached_bytes() -> int: ...
def release_cached_buffers() -> None: ...
def plan(
    cell: str,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int = 0,
    dtype: str = "float32",
    threads: int = 1,
    training: bool = False,
    directions: int = 1,
    weight_format: str = "native",
    layers: int = 1,
) -> Plan: ...
def bfloat16_copies(
    cell: str, hidden_size: int, proj_size: int = 0
) -> tuple[int, tuple[int, ...]]: ...
def cuda_plan(
    cell: str,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int = 0,
    dtype: str = "float32",
    training: bool = False,
    directions: int = 1,
    tf32: bool = False,
    schedule: str | None = None,
    capability: int = 9,
    multiprocessors: int = 132,
    shared_bytes: int = 232448,
    resets: bool = False,
) -> CudaPlan: ...
def usable_cpus() -> int: ...
def fma_peak(threads: int, seconds: float) -> float: ...
def raise_interruption(message: str) -> None: ...
def add_defined_cell(path: str) -> None: ...
def has_defined_cell(name: str) -> bool: ...
def cells() -> dict[str, CellFacts]: ...
def loop_cells() -> dict[str, CellFacts]: ...
def recurrence_parts() -> list[str]: ...
def weight_slots() -> list[str]: ...
def weight_formats() -> list[str]: ...
def sequence_slots() -> dict[str, int]: ...
def output_slots() -> dict[str, list[str]]: ...

class _packed:
    """Packed weights; a module. Tensors are addresses, 0 for none."""

    class PackedStack_float32:
        def __init__(
            self,
            cell: str,
            layers: int,
            directions: int,
            input_size: int,
            hidden_size: int,
            proj_size: int,
            residual: bool,
        ) -> None: ...
        def pack(self, weights: Sequence[Sequence[int]]) -> None: ...
        def forward(
            self, steps: int, batch: int, x: int, h0: int, c0: int, y: int, h_n: int, c_n: int
        ) -> None: ...

    class Session_float32:
        def __init__(
            self,
            cell: str,
            layers: int,
            input_size: int,
            hidden_size: int,
            proj_size: int,
            residual: bool,
            batch: int,
            threads: int,
        ) -> None: ...
        def pack(self, weights: Sequence[Sequence[int]]) -> None: ...
        def step(self, x: int, y: int) -> None: ...
        def run(self, x: int, steps: int, y: int) -> None: ...
        def read_states(self, h: int, c: int) -> None: ...
        def write_states(self, h: int, c: int) -> None: ...
        def clear_row(self, row: int) -> None: ...

    class PackedStack_float64(PackedStack_float32): ...
    class Session_float64(Session_float32): ...

class _testing:
    """Hooks for the tests; a module."""

    @staticmethod
    def quota_cpus(membership: str = ..., root: str = ...) -> int: ...
    @staticmethod
    def peak_threads() -> int: ...
    @staticmethod
    def simulate_backoff(calls: Sequence[tuple[float, float]]) -> list[float]: ...
    @staticmethod
    def panels_outlive_calls(
        cell: str,
        steps: int,
        batch: int,
        input_size: int,
        hidden_size: int,
        proj_size: int = 0,
        dtype: str = "float32",
        threads: int = 1,
        weight_format: str = "native",
    ) -> bool: ...
    @staticmethod
    def set_l2_kb(kilobytes: int | None) -> None: ...
    @staticmethod
    def available_bfloat16_kernels() -> list[str]: ...
    @staticmethod
    def set_bfloat16_kernels(name: str | None) -> None: ...
    @staticmethod
    def available_int8_kernels() -> list[str]: ...
    @staticmethod
    def set_int8_kernels(name: str | None) -> None: ...
    @staticmethod
    def int8_sums(bytes: bytes, zero_points: Sequence[int], panel: bytes, gates: int) -> bytes: ...
    @staticmethod
    def fresh_buffers() -> int: ...
