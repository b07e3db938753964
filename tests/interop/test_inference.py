"""A client that shares no line with us: JavaScript, written from protocols/SPEC.md."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest
import torch
import trio

from petals.models.source.loading import load_span
from tests.interop.foreign import install_js
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.swarm.conftest import make_swarm as make_swarm  # fixtures
from tests.swarm.conftest import tiny_truth as tiny_truth
from tests.tolerance import assert_rounded

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]
LENGTHS = (5, 1, 1)


@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
async def test_a_client_written_from_the_specification_gets_the_right_numbers(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth
) -> None:
    script = install_js().with_name("inference.mjs")
    server = await make_swarm(tiny_truth.directory).add(range(4))
    dice = torch.Generator().manual_seed(0)
    size = tiny_truth.checkpoint.hidden_size
    steps = [torch.randn(1, length, size, generator=dice) for length in LENGTHS]
    span = load_span(tiny_truth.checkpoint, range(1, 4))
    cache = span.new_cache(range(1, 4), 1, sum(LENGTHS))
    asked = {
        "addr": server.addrs[0],
        "digest": tiny_truth.checkpoint.digest,
        "blocks": [1, 4],  # not all that is held
        "steps": [[step.shape[1], size, step.flatten().tolist()] for step in steps],
    }
    with trio.fail_after(60):
        command, stdin = ["node", str(script)], json.dumps(asked).encode()
        done = await trio.run_process(command, stdin=stdin, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    for step, answer in zip(steps, json.loads(done.stdout), strict=True):
        assert_rounded(torch.tensor(answer).view_as(step), span.step(step, cache))
    await all_leases_returned(server)
