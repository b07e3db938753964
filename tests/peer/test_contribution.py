"""Who is served first when it is crowded: whole swarms of real lanes and ledgers on a clock that jumps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import outcome
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from petals.peer.accounting.ledger import (
    HALF_LIFE_S,
    MAX_PEERS,
    MOST,
    Ledger,
    ledger_path,
    open_references,
    read_ledger,
    weight,
    write_ledger,
)
from petals.peer.base.identity import Identity, create_identity, verify
from petals.peer.engine.scheduler import Lane, Priority, SharedWork, all_alike
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import UserError
from petals.protocols.receipts import CLIENT_DOMAIN, SERVER_DOMAIN, Work
from petals.protocols.types import PeerId

ME, DIGEST = PeerId("me"), "ab" * 32
BLOCKS = 30
STEP_S = 0.02


@dataclass
class Clock:
    """Unix seconds that a test turns by hand."""

    seconds: float = 1.7e9

    def __call__(self) -> float:
        return self.seconds


class OneStep(SharedWork):
    """A decode step of one row."""

    rows = 1

    def __call__(self) -> int:
        return 1

    @classmethod
    def together(cls, works: Any) -> Any:
        return [outcome.Value(1) for _ in works]


@dataclass
class FakeThread:
    """Takes `STEP_S` of the test's clock for a pass, however many share it."""

    nursery: trio.Nursery

    def start(self, function: Callable[[], Any], then: Callable[[outcome.Outcome[Any]], None]) -> None:
        async def run() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(STEP_S)
            then(outcome.capture(function))

        self.nursery.start_soon(run)


@dataclass
class Member:
    """A peer of the simulated swarm: its ledger, and its lane if it serves."""

    peer_id: PeerId
    ledger: Ledger
    lane: Lane | None = None
    steps: int = 0
    """That others did for it."""
    longest_s: float = 0.0
    """That it waited for one."""


@dataclass
class Town:
    """Members who ask each other."""

    nursery: trio.Nursery
    priority: str
    pass_rows: int = 1
    members: list[Member] = field(default_factory=list)

    def add(self, name: str, *, serves: bool = False) -> Member:
        ledger = Ledger(PeerId(name), lambda: 1.7e9 + trio.current_time())
        member = Member(PeerId(name), ledger)
        if serves:
            weigh = ledger.weight if self.priority == "reciprocal" else all_alike
            thread = FakeThread(self.nursery)
            member.lane = Lane(pass_rows=self.pass_rows, thread=thread, weigh=weigh)  # type: ignore[arg-type]
            self.nursery.start_soon(member.lane.run)
        self.members.append(member)
        return member

    async def ask(self, asker: Member, server: Member, pause_s: float = 0.001) -> None:
        """A session that decodes for ever."""
        assert server.lane is not None
        while True:
            asked_at = trio.current_time()
            await server.lane.submit(Priority.DECODE, OneStep(), peer_id=asker.peer_id)
            asker.longest_s = max(asker.longest_s, trio.current_time() - asked_at)
            asker.steps += 1
            server.ledger.gave(asker.peer_id, BLOCKS)
            asker.ledger.took(server.peer_id, BLOCKS)
            await trio.sleep(pause_s)


HISTORY = 200_000
"""Block-tokens that the two servers have given each other before."""


async def crowd(
    priority: str, *, riders: int, seconds: float = 10, pass_rows: int = 1, pause_s: float = 0.001
) -> dict[str, Member]:
    """Two servers that ask each other, free riders who ask both, and a newcomer who asks one."""
    async with trio.open_nursery() as nursery:
        town = Town(nursery, priority, pass_rows)
        left, right = town.add("left", serves=True), town.add("right", serves=True)
        for one, other in ((left, right), (right, left)):
            one.ledger.gave(other.peer_id, HISTORY)
            other.ledger.took(one.peer_id, HISTORY)
        pairs = [(left, right), (right, left), (town.add("newcomer"), left)]
        for number in range(riders):
            rider = town.add(f"rider {number}")
            pairs += [(rider, left), (rider, right)]
        for asker, server in pairs:
            nursery.start_soon(town.ask, asker, server, pause_s)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()
    return {member.peer_id: member for member in town.members}


@pytest.mark.parametrize(("riders", "pass_rows"), [(8, 1), (16, 4)])
async def test_free_riders_slow_down_when_it_is_crowded(riders: int, pass_rows: int, autojump_clock: MockClock) -> None:
    fair = await crowd("fair", riders=riders, pass_rows=pass_rows)
    crowded = await crowd("reciprocal", riders=riders, pass_rows=pass_rows)
    for name in ("left", "right"):
        assert crowded[name].steps > 1.5 * fair[name].steps
    for name in (f"rider {number}" for number in range(riders)):
        assert 0.4 * fair[name].steps < crowded[name].steps < fair[name].steps


async def test_free_riders_are_as_fast_as_anybody_while_there_is_time(autojump_clock: MockClock) -> None:
    fair = await crowd("fair", riders=2, pause_s=0.3)
    quiet = await crowd("reciprocal", riders=2, pause_s=0.3)
    for name in ("newcomer", "rider 0", "rider 1"):
        assert quiet[name].steps >= 0.9 * fair[name].steps


async def test_a_newcomer_waits_for_a_bounded_number_of_steps(autojump_clock: MockClock) -> None:
    crowded = await crowd("reciprocal", riders=8)
    # In the time of one step of weight 1, others of weight 1 have one each and the other server at most MOST.
    assert crowded["newcomer"].longest_s <= (8 + MOST + 2) * STEP_S
    rider = min(crowded[f"rider {number}"].steps for number in range(8))
    assert crowded["newcomer"].steps >= 0.9 * rider / 2, "riders ask two servers"


def test_a_second_name_is_worth_a_newcomers_share() -> None:
    """What a debtor loses by its debts is nothing that a new name would bring back."""
    ledger = Ledger(ME, Clock())
    ledger.gave(PeerId("debtor"), 10**9)
    assert ledger.weight(PeerId("debtor")) == ledger.weight(PeerId("its new name")) == 1


COUNTS = st.integers(0, 10**9)


@given(COUNTS, COUNTS, COUNTS)
def test_a_weight_grows_with_what_was_given_and_has_bounds(given_us: int, given_them: int, more: int) -> None:
    assert 1 <= weight(given_us, given_them) <= MOST
    assert weight(0, given_them) == 1
    assert weight(given_us, given_them) <= weight(given_us + more, given_them) + 1e-9
    assert weight(given_us, given_them + more) <= weight(given_us, given_them) + 1e-9


def test_half_is_forgotten_every_day() -> None:
    clock = Clock()
    ledger = Ledger(ME, clock)
    ledger.took(PeerId("a"), 1000)
    clock.seconds += HALF_LIFE_S
    assert ledger.balance(PeerId("a")) == pytest.approx(500)
    ledger.gave(PeerId("a"), 700)
    assert ledger.balance(PeerId("a")) == pytest.approx(-200)
    assert (ledger.accounts[PeerId("a")].taken, ledger.given, ledger.taken) == (1000, 700, 1000)
    clock.seconds -= 5000  # somebody sets the clock back
    assert ledger.balance(PeerId("a")) == pytest.approx(-200)


def test_the_least_work_is_forgotten_first_when_there_are_too_many_peers() -> None:
    clock = Clock()
    ledger = Ledger(ME, clock)
    ledger.took(PeerId("friend"), 10**6)
    for number in range(2 * MAX_PEERS):
        ledger.gave(PeerId(f"sybil {number}"), 1)
    assert len(ledger.accounts) <= MAX_PEERS
    assert len(ledger.unsigned) <= MAX_PEERS
    assert ledger.weight(PeerId("friend")) > 4


def signed(server: Identity, client: Identity, amount: int, now: float, **changes: Any) -> bytes:
    """A receipt as both would have made it."""
    settings = {
        "server": server.peer_id,
        "client": client.peer_id,
        "receipt_id": random.randbytes(16),
        "model_digest": DIGEST,
        "blocks": range(4),
        "steps": 1,
        "block_tokens": amount,
        "recent_block_tokens": amount,
        "started_at": now,
        "ended_at": now,
    }
    if "claimed" in changes:
        settings["server"] = changes.pop("claimed")
    work = Work(**{**settings, **changes}).encode()
    return pb.Receipt(
        work=work,
        server_key=server.public_key,
        server_signature=server.sign(SERVER_DOMAIN + work),
        client_key=client.public_key,
        client_signature=client.sign(CLIENT_DOMAIN + work),
    ).SerializeToString()


@pytest.fixture(scope="module")
def people() -> list[Identity]:
    return [create_identity() for _ in range(6)]


def hear(ledger: Ledger, peer_id: PeerId, receipts: list[bytes]) -> None:
    """As peer/accounting/receipts.py does, without the thread."""
    works, refused = open_references(peer_id, ledger.worth_reading(receipts), now=ledger.now(), verify=verify)
    ledger.rejected += refused
    ledger.hear(peer_id, works)


def test_strangers_words_weigh_nothing(people: list[Identity]) -> None:
    liar, *sybils = people
    clock = Clock()
    ledger = Ledger(ME, clock)
    ledger.gave(sybils[0].peer_id, 10**6)  # one that we served, and owe nothing
    hear(ledger, liar.peer_id, [signed(liar, sybil, 10**12, clock()) for sybil in sybils])
    assert ledger.weight(liar.peer_id) == 1
    assert ledger.rejected == 0, "they are not even looked at"


def test_the_word_of_who_served_us_weighs_as_much_as_it_gave(people: list[Identity]) -> None:
    helper, referee, *others = people
    clock = Clock()
    ledger = Ledger(ME, clock)
    ledger.took(referee.peer_id, 100_000)
    hear(ledger, helper.peer_id, [signed(helper, referee, 40_000, clock())])
    assert ledger.vouched(helper.peer_id) == 40_000
    assert 1 < ledger.weight(helper.peer_id) == weight(10_000, 0)
    hear(ledger, helper.peer_id, [signed(helper, referee, 40_000, clock())])
    assert ledger.vouched(helper.peer_id) == 40_000, "a receipt shown again counts once"
    for other in others:  # the referee signs for all of its friends: together they have what it gave
        hear(ledger, other.peer_id, [signed(other, referee, 10**12, clock())])
    everybody = [helper, *others]
    assert sum(ledger.vouched(each.peer_id) for each in everybody) == pytest.approx(100_000, rel=1e-6)
    ledger.gave(referee.peer_id, 100_000)
    assert all(ledger.vouched(each.peer_id) == 0 for each in everybody), "we owe the referee nothing any more"


@pytest.mark.parametrize(
    "changes",
    [
        {"recent_block_tokens": 0},
        {"block_tokens": 0},
        {"recent_block_tokens": 1 << 60},
        {"ended_at": 1.8e9},
        {"ended_at": float("nan")},
        {"started_at": 1.69e9, "ended_at": 1.69e9},
        {"model_digest": "no digest"},
        {"blocks": range(4, 4)},
        {"receipt_id": b"short"},
        {"claimed": PeerId("somebody else")},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items())[:40],
)
def test_a_receipt_that_is_wrong_is_dropped_and_counted(people: list[Identity], changes: dict[str, Any]) -> None:
    helper, referee = people[:2]
    ledger = Ledger(ME, Clock())
    ledger.took(referee.peer_id, 100_000)
    hear(ledger, helper.peer_id, [signed(helper, referee, 5, ledger.now(), **changes)])
    assert (ledger.rejected, ledger.vouched(helper.peer_id)) == (1, 0)


def test_a_receipt_with_any_bit_turned_is_not_believed(people: list[Identity]) -> None:
    helper, referee = people[:2]
    ledger = Ledger(ME, Clock())
    ledger.took(referee.peer_id, 100_000)
    receipt = signed(helper, referee, 5, ledger.now())
    dice = random.Random(1)
    for _ in range(60):
        turned = bytearray(receipt)
        turned[dice.randrange(len(turned))] ^= 1 << dice.randrange(8)
        hear(ledger, helper.peer_id, [bytes(turned)])
        assert ledger.vouched(helper.peer_id) == 0
    hear(ledger, helper.peer_id, [receipt])
    assert ledger.vouched(helper.peer_id) == 5
    hear(ledger, people[3].peer_id, [receipt])
    assert ledger.vouched(people[3].peer_id) == 0, "somebody else's"


def test_a_client_signs_for_what_it_counted_and_no_more(people: list[Identity]) -> None:
    server, client = people[:2]
    clock = Clock()
    ledger = Ledger(client.peer_id, clock)
    ledger.took(server.peer_id, 100)
    theirs = Ledger(server.peer_id, clock)
    theirs.gave(client.peer_id, 130)
    claim = theirs.work_for(client.peer_id, DIGEST, range(4))
    assert claim is not None
    ours = ledger.would_sign(claim)
    assert (ours.block_tokens, ours.recent_block_tokens) == (100, 101)
    ledger.signed_as_client(ours)
    assert ledger.would_sign(claim).block_tokens == 0, "once"


def test_a_ledger_comes_back_from_its_file(people: list[Identity], tmp_path: Any) -> None:
    friend = people[0]
    clock = Clock()
    ledger = Ledger(ME, clock)
    ledger.took(friend.peer_id, 50_000)
    ledger.gave(friend.peer_id, 300)
    path = ledger_path(tmp_path / "my.key")
    write_ledger(path, ledger.dump())
    assert path.stat().st_mode & 0o777 == 0o600
    again = Ledger(ME, clock)
    assert read_ledger(path, again)
    assert again.accounts == ledger.accounts
    assert again.dump() == ledger.dump()
    assert again.unsigned == (friend.peer_id,)
    assert again.weight(friend.peer_id) == ledger.weight(friend.peer_id) > 1
    assert [each.name for each in tmp_path.iterdir()] == ["my.key.ledger"]
    assert not read_ledger(tmp_path / "nothing", again)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2, "accounts": {}}', '{"version": 1, "given": -1, "taken": 0, "accounts": {}}',
     '{"version": 1, "given": 0, "taken": 0, "accounts": {"a": {"given": 1}}}'],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_named(text: str, tmp_path: Any) -> None:
    path = tmp_path / "my.key.ledger"
    path.write_text(text)
    with pytest.raises(UserError, match=r"my\.key\.ledger holds no ledger"):
        read_ledger(path, Ledger(ME, Clock()))
