"""Liars are caught, honest servers are not, and what comes after a lie is as if it had not been told."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from petals import AutoDistributedModelForCausalLM
from petals.peer.client.audit.audit import SessionAudit
from petals.peer.client.audit.verdicts import Trust, Verdict, judge
from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.session.session import RemoteSession
from petals.peer.node import Peer
from petals.protocols.errors import MissingBlocks
from petals.protocols.types import PeerId
from tests.fakes.liars import KINDS, inbound_of, lazy, lies_about, plant
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

MakeSwarm = Callable[..., Swarm]
LLAMA = pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
SLOW = 1.0
"""Announced by servers that are not to be the first choice: seconds more, whatever the machine is doing."""
IDS = torch.tensor([[5, 17, 99, 3], [8, 2, 45, 101]])


async def until(state: Callable[[], object]) -> None:
    """Wait for a state; the test's own deadline is the bound."""
    with trio.fail_after(20):
        while not state():  # noqa: ASYNC110
            await trio.sleep(0.001)  # a poll of the state waited for


def steps_for(client: ModelClient, sizes: tuple[int, ...] = (5, 1, 3, 1, 1, 1, 1, 1)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, size, client.checkpoint.hidden_size, generator=generator) for size in sizes]


async def run(session: RemoteSession, steps: list[torch.Tensor], begin: int = 0) -> list[torch.Tensor]:
    """Steps from index `begin` on; one reorders its rows, before another two tokens are taken back, before a third
    the reordered one as well."""
    outputs = []
    for index, hidden in enumerate(steps[begin:], begin):
        if index in (4, 6):
            session.rollback(session.position - 2 + (index == 4))
        order = torch.tensor([1, 0]) if index in (2, 5) else None
        outputs.append(await session.step(hidden, hypo_ids=order))
    return outputs


@pytest.fixture
async def two_stages(make_swarm: MakeSwarm, tiny_truth: Truth) -> tuple[Swarm, Peer]:
    """Three honest servers of each half, and who asks."""
    swarm = make_swarm(tiny_truth.directory)
    for blocks in (range(2), range(2, 4)) * 3:
        await swarm.add(blocks)
    return swarm, await swarm.add()


@LLAMA
@pytest.mark.parametrize(("kind", "first"), [(kind, index % 2 == 0) for index, kind in enumerate(KINDS)])
async def test_a_liar_is_caught_and_what_follows_is_exact(
    make_swarm: MakeSwarm, tiny_truth: Truth, kind: str, first: bool
) -> None:
    """The caches behind the liar hold nothing of its lies; others hear of it, and nobody else is blamed."""
    swarm = make_swarm(tiny_truth.directory)
    lied_about = range(2) if first else range(2, 4)
    same: dict[str, Any] = {"deterministic": True}
    quant_type = "int8" if kind == "int8" else "none"
    liar = await swarm.add(lied_about, throughput=10_000.0, quant_type=quant_type, **same)
    plant(liar, kind)
    same["throughput"] = SLOW
    honest = [await swarm.add(blocks, **same) for blocks in (range(2), range(2, 4), range(2), range(2, 4))]
    asker = await swarm.add()
    client = await asker.client()
    await client.ready()
    steps = steps_for(client)
    other = await (await swarm.add()).client()  # who remembers how long the honest servers took, and not `client`
    await other.ready()
    true = await other.open_session(client.blocks, 2, 16, ClientOptions(blocked_servers=frozenset({liar.peer_id})))
    expected = await run(true, steps)
    await true.close()
    session = await client.open_session(client.blocks, 2, 16, ClientOptions(audit=1.0))
    assert liar.peer_id in [hop.peer_id for hop in session.hops]
    lies = await run(session, steps[:6])
    assert max(float((lie - right).abs().max()) for lie, right in zip(lies, expected, strict=False)) > 1e-3
    await until(lambda: client.watcher.liars)
    for got, wanted in zip(await run(session, steps, 6), expected[6:], strict=True):
        assert torch.equal(got, wanted)
    assert liar.peer_id not in [hop.peer_id for hop in session.hops]
    await session.close()
    trust = await client.audited()
    assert client.watcher.liars == {liar.peer_id}
    assert {(each.peer_id, each.verdict) for each in trust.findings} == {(liar.peer_id, Verdict.LIED)}
    assert "answered wrongly about blocks" in trust.findings[0].describe()
    for peer in honest:
        await until(lambda peer=peer: peer.complaints.accusers(liar.peer_id) == 1)  # type: ignore[misc]
        await all_leases_returned(peer)
    assert client.trust.rate(0.1, liar.peer_id) == 0.1, "one's own complaint is nobody else's"


async def test_honest_servers_are_never_blamed(two_stages: tuple[Swarm, Peer], tiny_truth: Truth) -> None:
    """Beams, padded batches, drafts rolled back, server to server: every answer is audited, the tokens are right."""
    swarm, asker = two_stages
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=asker, audit=1.0)
    client = await asker.client()
    settings = {"max_new_tokens": 6, "do_sample": False}
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, padded):
        expected = tiny_truth.model.generate(IDS, **settings, **more)
        assert torch.equal(await model.agenerate(IDS, **settings, **more), expected)
    session = await client.open_session(client.blocks, 2, 40, ClientOptions(audit=1.0, compression="float16"))
    dice = random.Random(3)
    for hidden in steps_for(client, (5, 1, 2, 9, 1, 1, 2, 1)):
        session.rollback(dice.randint(max(0, session.position - 2), session.position))
        await session.step(hidden, hypo_ids=torch.tensor([1, 0]) if dice.random() < 0.3 else None)
    await session.close()
    trust = await client.audited()
    assert trust.findings == []
    assert trust.unchecked == 0
    assert trust.audited >= 3 * 2 * 6 + 2 * 8
    for peer in swarm.peers[:-1]:
        assert peer.server is not None
        await all_leases_returned(peer)


@LLAMA
async def test_of_two_that_disagree_nobody_is_banned_until_we_compute_ourselves(
    make_swarm: MakeSwarm, tiny_truth: Truth
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    liar, honest = await swarm.add(range(4), throughput=10_000.0), await swarm.add(range(4), throughput=SLOW)
    plant(liar, "lazy")
    client = await (await swarm.add()).client()
    await client.ready()
    steps = steps_for(client)

    async def ask(options: ClientOptions) -> None:
        session = await client.open_session(client.blocks, 2, 16, options)
        await run(session, steps[:2])
        await session.close()
        await client.audited()

    await ask(ClientOptions(audit=1.0))
    suspects = {each.peer_id for each in client.trust.findings}
    assert {each.verdict for each in client.trust.findings} == {Verdict.SUSPECT}
    assert suspects == {liar.peer_id, honest.peer_id}
    assert client.watcher.liars == frozenset()
    assert client.trust.rate(0.1, honest.peer_id) >= 0.2  # either is watched more closely
    only = ClientOptions(audit=1.0, audit_at_home=True, allowed_servers=frozenset({liar.peer_id}))
    await ask(only)
    assert client.watcher.liars == {liar.peer_id}
    with pytest.raises(MissingBlocks):  # rather nobody than a liar
        client._latency_route(only, 2, 16, client.blocks, frozenset())


@LLAMA
async def test_a_lying_auditor_is_the_one_who_is_banned(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    audited = await swarm.add(range(4), throughput=10_000.0)
    liar = await swarm.add(range(4), throughput=SLOW)
    third = await swarm.add(range(4), throughput=SLOW / 1e6)  # asked last
    plant(liar, "lazy")
    client = await (await swarm.add()).client()
    client._random = random.Random(2).random
    await client.ready()
    session = await client.open_session(client.blocks, 2, 16, ClientOptions(audit=1.0))
    assert session.hops[0].peer_id == audited.peer_id
    await run(session, steps_for(client)[:3])
    await session.close()
    trust = await client.audited()
    assert {(each.peer_id, each.verdict) for each in trust.findings} == {(liar.peer_id, Verdict.LIED)}
    assert client.watcher.liars == {liar.peer_id}
    await until(lambda: third.complaints.accusers(liar.peer_id) == 1)
    assert third.complaints.accusers(audited.peer_id) == 0


@LLAMA
async def test_nobody_to_ask_is_counted(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Another one computes in another precision: it says nothing about this one."""
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(4), throughput=10_000.0)
    await swarm.add(range(4), dtype="bfloat16", throughput=SLOW)
    client = await (await swarm.add()).client()
    await client.ready()
    session = await client.open_session(client.blocks, 2, 16, ClientOptions(audit=1.0))
    await run(session, steps_for(client)[:3])
    await session.close()
    trust = await client.audited()
    assert (trust.audited, trust.unchecked, trust.findings) == (0, 3, [])


@LLAMA
@pytest.mark.parametrize("fault", ["signs garbage", "says int8 to clients alone"])
async def test_promises_that_are_broken_are_nonsense(make_swarm: MakeSwarm, tiny_truth: Truth, fault: str) -> None:
    """Its numbers may be right: it is banned as one is who breaks the protocol, and nobody complains."""
    swarm = make_swarm(tiny_truth.directory)
    wrong = await swarm.add(range(4), throughput=10_000.0)
    await swarm.add(range(4), throughput=SLOW)
    if fault == "signs garbage":
        inbound: Any = inbound_of(wrong)
        inbound._signer = SimpleNamespace(public_key=inbound._signer.public_key, sign=lambda data: bytes(64))
    else:
        inbound_of(wrong).span.quant_type = "int8"
    client = await (await swarm.add()).client()
    await client.ready()
    session = await client.open_session(client.blocks, 2, 16, ClientOptions(audit=1.0))
    await run(session, steps_for(client)[:2])
    await session.close()
    await client.audited()
    (offer,) = (offer for offer in client.watcher.view.offers if offer.record.peer_id == wrong.peer_id)
    assert offer.ban_left_s > 500
    assert client.watcher.liars == frozenset()
    assert client.trust.findings == []


@pytest.mark.parametrize("auditor", [True, False])
@pytest.mark.parametrize("third", [True, False, None])
@pytest.mark.parametrize("third_auditor", [True, False])
def test_only_who_stands_alone_has_lied(auditor: bool, third: bool | None, third_auditor: bool) -> None:
    mine, yours = judge(auditor=auditor, third=third, third_auditor=None if third is None else third_auditor)
    if mine is Verdict.LIED:
        assert not auditor and not third and third_auditor  # noqa: PT018
    if yours is Verdict.LIED:
        assert not auditor and third and not third_auditor  # noqa: PT018
    assert (mine is None) or not auditor
    assert mine is not Verdict.LIED or yours is not Verdict.LIED
    if third is None:
        assert Verdict.LIED not in (mine, yours)


class Picked:
    """Throws the dice of a real session's audit over answers that need not exist."""

    def __init__(self, rate: float, seed: int) -> None:
        office: Any = SimpleNamespace(trust=Trust(), dice=random.Random(seed).random)
        self._audit = SessionAudit(office, rate, _never, None, lambda _: None)
        self._hop: Any = SimpleNamespace(peer_id=PeerId("liar"), history=[None])
        self._output: Any = SimpleNamespace(hidden=torch.zeros(1), step_id=0, signature=b"", encoding=0)

    def any_of(self, answers: int) -> bool:
        for _ in range(answers):
            self._audit.note(self._hop, self._output)
        picked = bool(self._audit._waiting)
        self._audit._waiting.clear()
        return picked


def _never(*_: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize(("rate", "lies"), [(0.05, 1), (0.05, 20), (0.2, 5), (0.01, 100)])
def test_the_chance_to_be_caught_is_as_the_formula_says(rate: float, lies: int) -> None:
    """1 - (1 - p)^n, within four standard deviations of 3,000 seeded trials."""
    trials, picked = 3000, Picked(rate, seed=7)
    caught = sum(picked.any_of(lies) for _ in range(trials)) / trials
    expected = 1 - (1 - rate) ** lies
    assert abs(caught - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


@LLAMA
async def test_lies_are_caught_exactly_when_they_are_picked(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Real servers; a liar lies in three answers of four in each session, now and then. Every session is a trial."""
    swarm = make_swarm(tiny_truth.directory)
    liar = await swarm.add(range(4), throughput=10_000.0)
    for _ in range(2):
        await swarm.add(range(4), throughput=SLOW)
    client = await (await swarm.add()).client()
    await client.ready()
    steps = steps_for(client, (3, 1, 1, 1))
    honest: Iterator[bool] = iter(())
    lies_about(liar, lazy, lambda: not next(honest, False))
    rate, seen = 0.2, Counter[bool]()
    for seed in range(24):
        throws = random.Random(seed)
        client._random = lambda throws=throws: throws.random()  # type: ignore[misc]
        thrown: list[float] = []
        dice = client._random
        honest = iter([True])  # the first answer of each session, which may end early for a liar who is caught
        session = await client.open_session(client.blocks, 2, 16, ClientOptions(audit=rate))
        assert session.audit is not None

        def noted(dice: Callable[[], float] = dice, thrown: list[float] = thrown) -> float:
            thrown.append(dice())
            return thrown[-1]

        session.audit._office = replace(session.audit._office, dice=noted)
        await run(session, steps)
        await session.close()
        await client.audited()
        caught = client.watcher.liars == {liar.peer_id}
        assert caught == any(throw < rate for throw in thrown[1:])
        seen[caught] += 1
        client.watcher._bans._liars.clear()
        client.watcher._bans._bans.clear()
        client.trust._suspicions.clear()
        client._complaints._kept.clear()
    assert seen[True] >= 6
    assert seen[False] >= 6
