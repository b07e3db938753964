"""`petals bench` on a tiny model: every form is measured, and told to people and machines."""

from __future__ import annotations

import json

import pytest

from petals.cli.bench import describe
from petals.peer.engine.throughput import Throughput
from petals.peer.server.measure import BlockSpeed, Machine, Transport, as_json, run_bench
from petals.protocols.errors import UserError
from tests.swarm.conftest import Truth


async def test_every_form_is_measured(tiny_truth: Truth) -> None:
    said: list[str] = []
    found = await run_bench(tiny_truth.checkpoint, 2, ["float32", "bfloat16"], ["none", "int8"], said.append)
    assert json.loads(json.dumps(found)) == found
    assert [line.partition(":")[0] for line in said] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    forms = [(each["dtype"], each["quant_type"]) for each in found["blocks"] if each["path"] == "transformers"]
    assert forms == [("float32", "none"), ("bfloat16", "none"), ("float32", "int8")]
    assert {"lean"} <= {each["path"] for each in found["blocks"]}
    assert found["blocks"][0]["decode_ratio"] == found["blocks"][0]["prefill_ratio"] == 1
    for each in found["blocks"]:
        assert each["decode_blocks_per_s"] > 0
        assert each["prefill_blocks_per_s"] > 0
    assert found["transport"]["mb_s"] > 0
    assert found["transport"]["round_trip_s"] > 0
    assert found["measured_blocks"] == 2
    assert "1 threads" not in found["device"]
    table = describe(found)
    assert "float32 int8" in table
    rows = table.splitlines()[5 : 5 + len(found["blocks"])]
    assert all(row.startswith(("float32", "bfloat16")) for row in rows)


@pytest.mark.parametrize(("times_memory", "share"), [(1.0, 0.25), (3.0, None)])
def test_what_caches_hold_is_no_share_of_memory(times_memory: float, share: float | None) -> None:
    """A block or two are read out of the processor's caches, again and again, faster than memory gives."""
    machine = Machine(device="cpu", threads=1, memory_read_gb_s=10, gigaflops=1)
    speed = BlockSpeed(
        dtype="float32",
        quant_type="none",
        path="lean",
        weight_bytes=10_000_000,
        read_gb_s=10 * times_memory,
        speed=Throughput(250, 1),
        prefill_tokens=128,
    )
    found = as_json(machine, [speed], Transport(mb_s=1, round_trip_s=1))
    assert found["blocks"][0]["of_memory_bound"] == share
    table = describe({"model": "m", "num_blocks": 2, "measured_blocks": 1, **found})
    assert ("caches hold them" in table) == (share is None)
    assert ("cached" if share is None else "25%") in table.splitlines()[5]


async def test_mistakes_are_the_users(tiny_truth: Truth) -> None:
    with pytest.raises(UserError, match="5 is not a number of them"):
        await run_bench(tiny_truth.checkpoint, 5, ["float32"], ["none"], print)
    with pytest.raises(UserError, match="float33"):
        await run_bench(tiny_truth.checkpoint, 1, ["float33"], ["none"], print)
