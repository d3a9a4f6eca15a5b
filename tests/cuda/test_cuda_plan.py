"""The choice of a CUDA schedule, tested without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from fastrnn import _C

H100 = 132  # multiprocessors


def plan(cell: str, batch: int, hidden: int, steps: int = 100, **options: Any) -> Any:
    return _C.cuda_plan(cell, steps, batch, hidden, hidden, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_layers_that_fit_are_persistent(cell: str, dtype: str) -> None:
    for hidden in (1, 17, 128, 768, 1024):
        for training in (False, True):
            chosen = plan(cell, 16, hidden, dtype=dtype, training=training)
            assert chosen["schedule"] == "persistent"
            assert chosen["blocks"] <= H100
            assert chosen["unit_blocks"] * chosen["units"] >= hidden
            assert chosen["shared_bytes"] <= 232448
    assert plan(cell, 16, 2113, dtype=dtype)["schedule"] == "stepwise"  # more than 132 x 16 units


def test_shared_memory_bounds_the_persistent_size() -> None:
    largest = {
        dtype: max(
            hidden
            for hidden in range(16, 2113, 16)
            if plan("lstm", 16, hidden, dtype=dtype)["schedule"] == "persistent"
        )
        for dtype in ("float16", "float32")
    }
    assert largest == {"float16": 1536, "float32": 1056}
    small = {"multiprocessors": 108, "shared_bytes": 166912, "capability": 8}  # an A100
    assert plan("lstm", 16, 1024, dtype="float16", **small)["schedule"] == "persistent"
    assert plan("lstm", 16, 1024, dtype="float32", **small)["schedule"] == "stepwise"


def test_unsupported_calls_are_stepwise() -> None:
    for options in (
        {"dtype": "float64"},
        {"capability": 7},
        {"multiprocessors": 0},
        {"schedule": "stepwise"},
        {"batch": 0},
    ):
        arguments = {"batch": 16, **options}
        chosen = plan("lstm", hidden=128, **arguments)
        assert chosen.keys() == {"schedule", "chunk_rows"}
        assert chosen["schedule"] == "stepwise"


def test_projected_layers_are_persistent() -> None:
    for training in (False, True):
        chosen = plan("lstm", 16, 1024, proj_size=256, dtype="float16", training=training)
        assert chosen["schedule"] == "persistent"
        assert chosen["unit_blocks"] == 128
        assert chosen["output_blocks"] == 32
    # shared memory holds the weights of two products, the second of which is smaller
    plain = plan("lstm", 16, 256, dtype="float16")["shared_bytes"]
    assert plan("lstm", 16, 256, proj_size=255, dtype="float16")["shared_bytes"] > 1.2 * plain


def test_few_steps_or_many_rows_are_persistent_only_on_request() -> None:
    for batch, steps in ((16, 3), (2 * 4 * 16 + 1, 100)):  # 2 groups of blocks, 4 row tiles each
        assert plan("lstm", batch, 1024, steps, dtype="float16")["schedule"] == "stepwise"
        forced = plan("lstm", batch, 1024, steps, dtype="float16", schedule="persistent")
        assert forced["schedule"] == "persistent"
    assert plan("lstm", 16, 1024, 4, dtype="float16")["schedule"] == "persistent"
    assert plan("lstm", 2 * 4 * 16, 1024, dtype="float16")["schedule"] == "persistent"


def test_tensor_cores_need_more_than_4_rows_and_reduced_precision() -> None:
    def has(dtype: str, batch: int, **options: Any) -> bool:
        return bool(plan("gru", batch, 256, dtype=dtype, **options)["tensor_cores"])

    assert has("float16", 5)
    assert has("bfloat16", 64)
    assert has("float32", 5, tf32=True)
    assert not has("float16", 4)  # a tile of 16 rows would mostly idle
    assert not has("float32", 64)  # float32 without TF32 is exact


def test_row_tiles_are_divided_among_groups_of_blocks() -> None:
    chosen = plan("lstm", 64, 256, dtype="float16")
    assert chosen["unit_blocks"] == 32
    assert chosen["row_tiles"] == chosen["row_groups"] == 4
    assert chosen["blocks"] == 128
    assert chosen["units"] == 8
    # with 8 units per block, each of 64 blocks would run two tiles
    both = plan("lstm", 64, 256, dtype="float16", directions=2)
    assert both["units"] == 16
    assert both["row_groups"] == 4
    assert both["blocks"] == 128
    # 5 tiles on 4 groups of blocks: some groups run two tiles, so 3 groups are as fast
    assert plan("lstm", 80, 256, dtype="float16", multiprocessors=64)["row_groups"] == 3
    assert plan("lstm", 64, 1024, dtype="float16", directions=2)["units"] == 16
    assert plan("lstm", 64, 1100, dtype="float16", directions=2)["schedule"] == "stepwise"


def test_all_persistent_blocks_are_resident_on_every_gpu() -> None:
    """Blocks wait for each other, so each multiprocessor count must hold all of them."""
    for multiprocessors in (1, 2, 7, 14, 46, 108, 132):
        for hidden in (1, 8, 9, 16, 100, 500, 2000):
            for batch in (1, 16, 17, 100, 1000):
                for directions in (1, 2):
                    chosen = plan(
                        "gru",
                        batch,
                        hidden,
                        dtype="float16",
                        directions=directions,
                        multiprocessors=multiprocessors,
                        schedule="persistent",
                    )
                    if chosen["schedule"] == "persistent":
                        groups = chosen["row_groups"]
                        assert 1 <= groups <= chosen["row_tiles"]
                        assert chosen["blocks"] == chosen["unit_blocks"] * groups * directions
                        assert chosen["blocks"] <= multiprocessors


def test_workspace_of_the_input_product_is_bounded() -> None:
    for schedule, most in (("stepwise", 24 << 20), ("persistent", 256 << 20)):
        rows = {
            plan("lstm", 16, 512, steps, schedule=schedule)["chunk_rows"]
            for steps in (1000, 100_000)
        }
        assert len(rows) == 1
        assert rows.pop() * 4 * 512 * 4 <= most


def test_environment_variable_sets_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_SCHEDULE", "stepwise")
    assert plan("lstm", 16, 128)["schedule"] == "stepwise"
    assert plan("lstm", 16, 128, schedule="auto")["schedule"] == "persistent"
    monkeypatch.setenv("FASTRNN_SCHEDULE", "")
    assert plan("lstm", 16, 128)["schedule"] == "persistent"
    monkeypatch.setenv("FASTRNN_SCHEDULE", "fast")
    message = "FASTRNN_SCHEDULE must be auto, persistent or stepwise, got 'fast'"
    with pytest.raises(ValueError, match=message):
        plan("lstm", 16, 128)


def test_every_schedule_in_the_error_message_can_be_requested() -> None:
    with pytest.raises(ValueError, match="FASTRNN_SCHEDULE must be") as error:
        plan("lstm", 16, 128, schedule="fast")
    listed = str(error.value).partition("must be ")[2].partition(", got")[0]
    automatic, *names = listed.replace(" or ", ", ").split(", ")
    assert automatic == "auto"
    assert names
    for name in names:
        assert plan("lstm", 16, 128, schedule=name)["schedule"] == name


def test_plan_rejects_impossible_arguments() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of rnn_tanh, .*, got 'elman'"):
        plan("elman", 1, 1)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        plan("gru", 1, 0)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        plan("gru", 1, 1, dtype="int8")


@pytest.mark.parametrize("cell", ["indrnn", "indrnn_tanh", "ligru", "janet", "fastgrnn"])
def test_cells_without_persistent_kernels_run_stepwise(cell: str) -> None:
    for training in (False, True):
        plan = _C.cuda_plan(cell, 100, 8, 64, 64, dtype="float16", training=training)
        assert plan["schedule"] == "stepwise"


def test_resets_are_persistent_in_cells_with_such_kernels() -> None:
    for training in (False, True):
        for cell in ("rnn_tanh", "gru", "lstm"):
            chosen = plan(cell, 16, 256, dtype="float16", training=training, resets=True)
            assert chosen == plan(cell, 16, 256, dtype="float16", training=training)
            assert chosen["schedule"] == "persistent"
        projected = plan("lstm", 16, 256, proj_size=64, training=training, resets=True)
        assert projected["schedule"] == "persistent"
        for cell in ("rnn_relu", "rnn_sigmoid", "peephole_lstm", "slstm", "indrnn"):
            chosen = plan(cell, 16, 256, dtype="float16", training=training, resets=True)
            assert chosen["schedule"] == "stepwise"


def test_few_rows_with_resets_use_tensor_cores_in_half_types() -> None:
    for dtype, tensor_cores in (("float16", True), ("bfloat16", True), ("float32", False)):
        chosen = plan("gru", 2, 256, dtype=dtype, tf32=True, resets=True)
        assert chosen["tensor_cores"] is tensor_cores
