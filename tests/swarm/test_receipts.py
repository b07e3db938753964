"""Receipts between real peers: what both signed, what both count, what is dropped, and that it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
import trio

from petals.gateway.config import HttpConfig
from petals.gateway.server import open_gateway
from petals.peer.accounting import ledger, receipts
from petals.peer.accounting.ledger import Account, ledger_path
from petals.peer.base.identity import verify
from petals.peer.client.model_client import ClientOptions
from petals.peer.client.training import Companions
from petals.peer.node import Peer
from petals.protocols import messages_pb2 as pb
from petals.protocols.receipts import CLIENT_DOMAIN, MAX_MESSAGE_BYTES, RECEIPTS_V1, SERVER_DOMAIN, open_receipt
from petals.protocols.stream import ByteStream, MessageStream
from tests.swarm.conftest import Swarm, Truth

MakeSwarm = Callable[..., Swarm]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "LOOK_S", 0.02)
    monkeypatch.setattr(receipts, "QUIET_S", 0.1)
    monkeypatch.setattr(ledger, "WEIGHT_S", 0.0)


def account(peer: Peer, other: Peer) -> Account:
    return peer.ledger.accounts.get(other.peer_id, Account())


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.01)  # a poll of the state waited for


async def some_work(asker: Peer) -> None:
    """A prompt of twelve tokens, two rows, and three steps through all four blocks; one forward pass."""
    client = await asker.client()
    await client.ready()
    session = await client.open_session(client.blocks, 2, 20)
    size = client.checkpoint.hidden_size
    for tokens in (12, 1, 1, 1):
        await session.step(torch.randn(2, tokens, size))
    await session.close()
    trainer = client._trainer(ClientOptions())
    await trainer.forward(torch.randn(1, 4, size), Companions(blocks=client.blocks))


WORK = 2 * (8 + 1 + 1 + 1) + 4
"""Of `some_work`, for each block."""


async def test_two_servers_account_for_each_other(make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path) -> None:
    swarm = make_swarm(tiny_truth.directory)
    left = await swarm.add(range(2), identity=tmp_path / "left.key", priority="reciprocal")
    right = await swarm.add(range(2, 4), priority="reciprocal")
    for asker in (left, right):
        await some_work(asker)
    for one, other in ((left, right), (right, left)):
        await until(lambda one=one, other=other: account(one, other).signed_given == 2 * WORK)
    for one, other in ((left, right), (right, left)):
        mine, theirs = account(one, other), account(other, one)
        assert mine.given == theirs.taken == mine.signed_given == theirs.signed_taken == 2 * WORK
        work = open_receipt(mine.receipt, now=one.ledger.now(), verify=verify)
        assert (work.server, work.client) == (one.peer_id, other.peer_id)
        assert one.ledger.weight(other.peer_id) > 1
        assert one.ledger.rejected == 0
        assert one.peer_id not in one.ledger.accounts, "work for oneself is no gift"
    async with open_gateway(left, HttpConfig(bind="127.0.0.1:0")) as url, httpx.AsyncClient(base_url=url) as web:
        told = (await web.get("/api/swarm")).json()["contribution"]
        metrics = (await web.get("/metrics")).text
    (peer,) = told["peers"]
    assert (told["given"], told["taken"], told["receipts"] > 1) == (2 * WORK, 2 * WORK, True)
    assert (peer["peer_id"], peer["given"], peer["taken"]) == (right.peer_id, 2 * WORK, 2 * WORK)
    assert f"petals_given_block_tokens_total {2 * WORK}\n" in metrics
    await swarm.stop(left)
    kept = json.loads(ledger_path(tmp_path / "left.key").read_text())
    assert kept["accounts"][right.peer_id]["given"] == 2 * WORK


async def test_a_signature_that_is_none_is_dropped_and_counted(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    server, asker = await swarm.add(range(4)), await swarm.add()

    async def forge(stream: ByteStream) -> None:
        """Signs something else than what it was asked to."""
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        work = pb.ReceiptRequest.FromString(await messages.read_message() or b"").work
        signature = asker._identity.sign(CLIENT_DOMAIN + work + b"\0")
        reply = pb.ReceiptReply(public_key=asker._identity.public_key, signature=signature)
        await messages.write_message(reply.SerializeToString())

    asker.host.set_handler(RECEIPTS_V1, forge)
    await some_work(asker)
    await until(lambda: server.ledger.rejected == 1)
    assert account(server, asker).receipt == b""
    assert account(server, asker).given == account(asker, server).taken == 4 * WORK, "known at first hand"


async def test_a_server_that_claims_more_than_it_did_gets_what_was_counted(
    make_swarm: MakeSwarm, tiny_truth: Truth
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    server, asker = await swarm.add(range(4)), await swarm.add()
    server.ledger.gave(asker.peer_id, 10**9)  # its own word
    await some_work(asker)
    await until(lambda: account(server, asker).receipt != b"")
    work = open_receipt(account(server, asker).receipt, now=server.ledger.now(), verify=verify)
    assert work.block_tokens == account(asker, server).taken == 4 * WORK
    assert work.recent_block_tokens <= 4 * WORK + 1
    await until(lambda: not server.ledger.unsigned)  # nobody is asked for ever
    assert account(asker, server).signed_taken == 4 * WORK


async def test_who_served_our_friends_shows_their_receipts(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Three peers: `helper` serves `friend`, `friend` serves `judge`, so `judge` hears well of `helper`."""
    swarm = make_swarm(tiny_truth.directory)
    judge = await swarm.add(range(4), priority="reciprocal")
    friend, helper = await swarm.add(), await swarm.add()
    helper.ledger.gave(friend.peer_id, 50_000)
    friend.ledger.took(helper.peer_id, 50_000)
    judge.ledger.took(friend.peer_id, 80_000)
    work = helper.ledger.work_for(friend.peer_id, "ab" * 32, range(4))
    assert work is not None
    receipt = pb.Receipt(work=work.encode(), **_signatures(helper, friend, work.encode())).SerializeToString()
    helper.ledger.signed_as_server(work, receipt)
    assert judge.ledger.weight(helper.peer_id) == 1
    await some_work(helper)
    await until(lambda: judge.ledger.vouched(helper.peer_id) > 0)
    assert judge.ledger.vouched(helper.peer_id) == pytest.approx(50_000, rel=1e-3)
    await until(lambda: judge.ledger.weight(helper.peer_id) > 1)


def _signatures(server: Peer, client: Peer, work: bytes) -> dict[str, bytes]:
    return {
        "server_key": server._identity.public_key,
        "server_signature": server._identity.sign(SERVER_DOMAIN + work),
        "client_key": client._identity.public_key,
        "client_signature": client._identity.sign(CLIENT_DOMAIN + work),
    }
