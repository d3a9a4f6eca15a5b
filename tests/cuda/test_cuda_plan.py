"""The table that picks a GPU's schedule, asked where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest

from fastrnn import _C

H100 = 132  # multiprocessors


def plan(cell: str, batch: int, hidden: int, steps: int = 100, **options: Any) -> Any:
    return _C.cuda_plan(cell, steps, batch, hidden, hidden, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_persistent_where_the_weights_fit(cell: str, dtype: str) -> None:
    for hidden in (1, 17, 128, 768, 1024):
        for training in (False, True):
            chosen = plan(cell, 16, hidden, dtype=dtype, training=training)
            assert chosen["schedule"] == "persistent"
            assert chosen["blocks"] <= H100
            assert chosen["unit_blocks"] * chosen["units"] >= hidden
            assert chosen["shared_bytes"] <= 232448
    assert plan(cell, 16, 2113, dtype=dtype)["schedule"] == "stepwise"  # more than 132 x 16 units


def test_shared_memory_bounds_the_size() -> None:
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


def test_what_is_never_persistent() -> None:
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


def test_projection() -> None:
    for training in (False, True):
        chosen = plan("lstm", 16, 1024, proj_size=256, dtype="float16", training=training)
        assert chosen["schedule"] == "persistent"
        assert chosen["unit_blocks"] == 128
        assert chosen["output_blocks"] == 32
    # two products' weights, of which the second is the smaller
    plain = plan("lstm", 16, 256, dtype="float16")["shared_bytes"]
    assert plan("lstm", 16, 256, proj_size=255, dtype="float16")["shared_bytes"] > 1.2 * plain


def test_what_is_too_little_or_too_much_unless_asked_for() -> None:
    for batch, steps in ((16, 3), (2 * 4 * 16 + 1, 100)):  # 2 groups of blocks, 4 tiles of rows
        assert plan("lstm", batch, 1024, steps, dtype="float16")["schedule"] == "stepwise"
        forced = plan("lstm", batch, 1024, steps, dtype="float16", schedule="persistent")
        assert forced["schedule"] == "persistent"
    assert plan("lstm", 16, 1024, 4, dtype="float16")["schedule"] == "persistent"
    assert plan("lstm", 2 * 4 * 16, 1024, dtype="float16")["schedule"] == "persistent"


def test_tensor_cores() -> None:
    def has(dtype: str, batch: int, **options: Any) -> bool:
        return bool(plan("gru", batch, 256, dtype=dtype, **options)["tensor_cores"])

    assert has("float16", 5)
    assert has("bfloat16", 64)
    assert has("float32", 5, tf32=True)
    assert not has("float16", 4)  # a tile of 16 rows would mostly idle
    assert not has("float32", 64)  # exact


def test_blocks_share_out_rows() -> None:
    chosen = plan("lstm", 64, 256, dtype="float16")
    assert chosen["unit_blocks"] == 32
    assert chosen["row_tiles"] == chosen["row_groups"] == 4
    assert chosen["blocks"] == 128
    assert chosen["units"] == 8
    # with 8 units each of 64 blocks would walk two tiles
    both = plan("lstm", 64, 256, dtype="float16", directions=2)
    assert both["units"] == 16
    assert both["row_groups"] == 4
    assert both["blocks"] == 128
    # 5 tiles, 4 groups of blocks: some walk two tiles, so 3 groups are as fast
    assert plan("lstm", 80, 256, dtype="float16", multiprocessors=64)["row_groups"] == 3
    assert plan("lstm", 64, 1024, dtype="float16", directions=2)["units"] == 16
    assert plan("lstm", 64, 1100, dtype="float16", directions=2)["schedule"] == "stepwise"


def test_a_group_of_blocks_never_lacks_one() -> None:
    """Blocks wait for one another, so all of them must be there, whatever the GPU."""
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


def test_memory_for_the_inputs_products_is_bounded() -> None:
    for schedule, most in (("stepwise", 24 << 20), ("persistent", 256 << 20)):
        rows = {
            plan("lstm", 16, 512, steps, schedule=schedule)["chunk_rows"]
            for steps in (1000, 100_000)
        }
        assert len(rows) == 1
        assert rows.pop() * 4 * 512 * 4 <= most


def test_schedule_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_SCHEDULE", "stepwise")
    assert plan("lstm", 16, 128)["schedule"] == "stepwise"
    assert plan("lstm", 16, 128, schedule="auto")["schedule"] == "persistent"
    monkeypatch.setenv("FASTRNN_SCHEDULE", "")
    assert plan("lstm", 16, 128)["schedule"] == "persistent"
    monkeypatch.setenv("FASTRNN_SCHEDULE", "fast")
    sentence = "FASTRNN_SCHEDULE must be auto, persistent or stepwise, got 'fast'"
    with pytest.raises(ValueError, match=sentence):
        plan("lstm", 16, 128)


def test_refuses_what_no_layer_has() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of rnn_tanh, .*, got 'elman'"):
        plan("elman", 1, 1)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        plan("gru", 1, 0)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        plan("gru", 1, 1, dtype="int8")
