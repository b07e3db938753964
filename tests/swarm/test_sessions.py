"""All ways to step are one over real servers, too, with two models of two swarms side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petals import AutoDistributedModelForCausalLM
from petals.models.source.checkpoint import open_checkpoint
from petals.protocols.errors import UserError
from tests.models.test_sessions import PROMPT, TOKENS, WAYS, Way
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

MakeSwarm = Callable[..., Swarm]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Truth]:
    found = []
    for name in ("llama", "bloom"):
        directory: Path = tmp_path_factory.mktemp(name)
        model = save_tiny(next(case for case in CASES if case.id == name), directory)
        found.append(Truth(open_checkpoint(str(directory)), model))
    return found


def text(truth: Truth) -> torch.Tensor:
    prompt = torch.arange(3, 3 + 2 * PROMPT).reshape(2, PROMPT) * 7 % 100 + 3
    made: torch.Tensor = truth.model.generate(
        prompt, max_new_tokens=TOKENS - PROMPT, do_sample=False, eos_token_id=None
    )
    return made


@torch.no_grad()
def walk(way: Way, models: list[Any], truths: list[Truth], texts: list[torch.Tensor]) -> None:
    with ExitStack() as opened:
        walks = [way(model, ids, opened) for model, ids in zip(models, texts, strict=True)]
        for end, *steps in zip(range(PROMPT, TOKENS + 1), *walks, strict=True):
            for truth, ids, logits in zip(truths, texts, steps, strict=True):
                expected = truth.model(ids[:, :end]).logits
                torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-4)


async def test_every_way_to_step_is_the_whole_models(make_swarm: MakeSwarm, two: list[Truth]) -> None:
    models, servers = [], []
    for truth in two:
        swarm = make_swarm(truth.directory)
        servers += [await swarm.add(range(3)), await swarm.add(range(3, 4))]
        models.append(await AutoDistributedModelForCausalLM.afrom_pretrained(peer=await swarm.add()))
    texts = [text(truth) for truth in two]
    for way in WAYS:
        await models[0].portal.run_sync(partial(walk, way, models, two, texts))
    gc.collect()  # caches that were dropped, not closed
    with trio.fail_after(20):
        for server in servers:
            await all_leases_returned(server)


async def test_more_rows_than_the_session_has_are_no_servers_fault(make_swarm: MakeSwarm, two: list[Truth]) -> None:
    swarm = make_swarm(two[0].directory)
    server, peer = await swarm.add(range(4)), await swarm.add()
    client = await peer.client()
    await client.ready()
    session = await client.open_session(client.blocks, 1, 8)
    hidden = torch.randn(3, 1, two[0].checkpoint.hidden_size)
    with pytest.raises(UserError, match="3 rows, the session 1"):
        await session.step(hidden)
    assert (await session.step(hidden[:1])).shape == hidden[:1].shape, "the session is not broken by it"
    assert session.failures == 0
    await session.close()
    await all_leases_returned(server)
