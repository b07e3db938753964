"""Every answer is signed over what its cache is made of, and the client can put together what was signed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from petals.peer.base.identity import verify
from petals.peer.client.audit.signatures import Answer
from petals.peer.client.hops.hop import Hop, StepOutput
from petals.peer.client.model_client import ClientOptions
from tests.swarm.conftest import Swarm, Truth

MakeSwarm = Callable[..., Swarm]


@pytest.mark.parametrize(
    ("options", "serve"),
    [
        ({"use_server_to_server": True}, {}),
        ({"use_server_to_server": False, "compression": "int8"}, {}),
        ({"use_server_to_server": True, "compression": "float16"}, {"dtype": "bfloat16"}),
        ({"use_server_to_server": True, "exact_recovery": False}, {"compression": "float16"}),
    ],
    ids=["pushed", "int8", "bfloat16", "fast"],
)
async def test_whatever_happens_in_a_session_its_signatures_hold(
    make_swarm: MakeSwarm, tiny_truth: Truth, options: dict[str, Any], serve: dict[str, Any]
) -> None:
    """Prompts in pieces, masks, deep prompts, reordered rows, roll-backs, servers lost in between."""
    swarm = make_swarm(tiny_truth.directory)
    for blocks in (range(2), range(2, 4)) * 2:
        await swarm.add(blocks, **serve)
    client = await (await swarm.add()).client()
    await client.ready()
    answers: list[Answer] = []
    dice, generator = random.Random(5), torch.Generator().manual_seed(5)
    session = await client.open_session(client.blocks, 3, 64, ClientOptions(**options))
    session.recovery.on_answer = lambda hop, output: answers.append(Answer.of(hop, output))
    session._piece_tokens = 3 * 4 if options["use_server_to_server"] else 0
    for hop in session.hops:
        hop.on_answer = session.recovery.on_answer
    token = torch.randn(3, 1, client.checkpoint.hidden_size, generator=generator)
    for order in (None, [1, 2, 0], [1, 0, 2]):
        await session.step(token, hypo_ids=None if order is None else torch.tensor(order))
    session.rollback(2)  # twice before the servers learn of it: the orders must be joined as they were made
    session.rollback(1)
    await session.step(token)
    for index in range(24):
        if dice.random() < 0.3:
            session.rollback(dice.randint(0, session.position))
        if dice.random() < 0.15:
            session.rollback(dice.randint(0, session.position))
        if index in (9, 16):
            await session.hops[index % 2].messages.reset()
        tokens = dice.choice((1, 1, 2, 9))
        if session.position + tokens > 64:
            session.rollback(0)
        hidden = torch.randn(3, tokens, client.checkpoint.hidden_size, generator=generator)
        settings: dict[str, Any] = {}
        if dice.random() < 0.5:
            settings["hypo_ids"] = torch.tensor(dice.choices(range(3), k=3))
        if session.position == 0 and dice.random() < 0.5:
            settings["prompts"] = torch.randn(4, 3, 1, client.checkpoint.hidden_size, generator=generator)
        if dice.random() < 0.3:
            settings["attention_mask"] = torch.ones(3, session.position + tokens, dtype=torch.bool)
        await session.step(hidden, **settings)
    assert session.failures >= 2
    await session.close()
    assert len(answers) >= 48
    for answer in answers:
        signed = await answer.signed()
        assert signed.is_genuine(verify)
        other = replace(signed.statement, output=bytes(32))
        assert not replace(signed, statement=other).is_genuine(verify)


async def test_two_servers_that_were_told_the_same_sign_the_same_inputs(
    make_swarm: MakeSwarm, tiny_truth: Truth
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    servers = [await swarm.add(range(4)) for _ in range(2)]
    client = await (await swarm.add()).client()
    await client.ready()
    statements = []
    for server in servers:
        only = ClientOptions(allowed_servers=frozenset({server.peer_id}))
        session = await client.open_session(client.blocks, 1, 8, only)
        answers: list[Answer] = []

        def note(hop: Hop, output: StepOutput, answers: list[Answer] = answers) -> None:
            answers.append(Answer.of(hop, output))

        session.hops[0].on_answer = note
        for tokens in (3, 1):
            await session.step(torch.full((1, tokens, client.checkpoint.hidden_size), 0.5))
        statements.append((await answers[-1].signed()).statement)
        await session.close()
    first, second = statements
    assert first.session_id != second.session_id
    assert (first.inputs, first.output, first.blocks) == (second.inputs, second.output, range(4))
