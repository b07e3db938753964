"""Wrong clocks and keys that are used twice: nothing works, and whoever looks reads why."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import trio

from petals.dht.keys import swarm_key
from petals.dht.records import RecordError, ServerRecord
from petals.dht.troubles import KEPT_S, MAX_KEPT, NAMESAKE_S, Namesake, Refusals
from petals.peer.base.identity import create_identity
from petals.peer.membership.clocks import ClockWatch
from petals.protocols.types import PeerId
from tests.dht.conftest import MODEL, Net, make_record


def ahead(seconds: float) -> Callable[[], float]:
    return lambda: time.time() + seconds


def late(seconds: float) -> RecordError:
    return RecordError("server record: wrong date", "time", seconds)


# -- sentences, with a clock of our own ------------------------------------------------------------------------------


def test_refusals_are_counted_by_reason_and_forgotten() -> None:
    now = 1000.0
    refusals = Refusals(lambda: now)
    assert refusals.sentences() == []
    for number, seconds in enumerate((119.0, 120.0, 400.0)):
        refusals.note(PeerId(f"ahead{number}"), late(seconds), fresh=True)
    refusals.note(PeerId("behind"), late(-300.0), fresh=True)
    refusals.note(
        PeerId("forger"), RecordError("server record: not signed by the peer it names", "signature"), fresh=True
    )
    assert [sentence.partition(";")[0] for sentence in refusals.sentences()] == [
        "3 server records were refused: their clock is 120 s ahead of this machine's",
        "1 server record was refused: its clock is 300 s behind this machine's",
        "1 server record was refused: server record: not signed by the peer it names",
    ]
    refusals.forgive(PeerId("behind"))
    assert "behind" not in " ".join(refusals.sentences())
    now += KEPT_S + 1
    assert refusals.sentences() == []


def test_an_old_record_kept_by_others_is_no_trouble() -> None:
    refusals = Refusals(lambda: 0.0)
    refusals.note(PeerId("gone"), late(-300.0), fresh=False)
    assert refusals.sentences() == []
    refusals.note(PeerId("ahead"), late(300.0), fresh=False)  # nobody is from the future
    assert len(refusals.sentences()) == 1


def test_a_flood_of_refusals_is_bounded() -> None:
    refusals = Refusals(lambda: 0.0)
    for number in range(10 * MAX_KEPT):
        refusals.note(PeerId(str(number)), late(100.0), fresh=True)
    assert refusals.sentences()[0].startswith(f"{MAX_KEPT} server records")


@pytest.mark.parametrize("grows", [True, False])
def test_only_a_living_process_is_a_namesake(grows: bool) -> None:
    now = 1000.0
    said: list[str] = []
    namesake = Namesake(b"ours", lambda: now)
    namesake.say = said.append

    def note(sequence: int, *, instance: bytes = b"other", issued_at: float = 1001.0) -> None:
        record = make_record(PeerId("me"), sequence=sequence, instance=instance, issued_at=issued_at)
        namesake.note(record)

    note(1, issued_at=999.0)  # a predecessor
    note(2, issued_at=999.0)
    note(3, instance=b"ours")
    note(4, instance=b"")  # an earlier version
    note(5)
    note(6 if grows else 5)
    assert (namesake.found is not None) is grows
    assert len(said) == grows
    assert "another process uses this peer's key and holds blocks 0:4" in "".join(said) or not grows
    now += NAMESAKE_S + 1
    assert namesake.found is None
    assert namesake.sentences() == []


# -- on real hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "how"), [(120.0, "120 s ahead of"), (-300.0, "300 s behind")])
async def test_a_reader_says_whose_clock_is_wrong(net: Net, seconds: float, how: str) -> None:
    reader, server = await net.add(), await net.add(clock=ahead(seconds))
    now = server.directory._clock()
    server.served[:] = [make_record(server.peer_id, issued_at=now, expires_at=now + 90)]
    with trio.fail_after(20):
        while not reader.directory.warnings():
            await server.directory.provide(swarm_key(MODEL))
            assert await reader.directory.lookup(MODEL) == ()
    (sentence,) = reader.directory.warnings()
    assert sentence.startswith(f"1 server record was refused: its clock is {how} this machine's")


async def test_a_peer_with_a_wrong_clock_learns_it_from_the_others(net: Net) -> None:
    me, *_ = [await net.add() for _ in range(3)]
    said: list[str] = []
    watch = ClockWatch(me.host, said.append, clock=ahead(-120.0))
    assert await watch.compare()
    assert await watch.compare()
    assert said == watch.sentences()
    assert said[0].startswith("this machine's clock is 120 s behind the clocks of 2 peers")
    right = ClockWatch(me.host, said.append)
    assert await right.compare()
    assert right.sentences() == []


async def test_two_processes_with_one_key_both_learn_of_it(net: Net) -> None:
    await net.add()
    identity = create_identity()
    first, second = [await net.add(identity=identity) for _ in range(2)]
    sequences = itertools.count(int(1000 * time.time()))

    async def announce() -> ServerRecord:
        await first.announce(sequence=next(sequences), issued_at=time.time())
        return await second.announce(sequence=next(sequences), issued_at=time.time(), blocks=range(4, 8))

    with trio.fail_after(20):
        while first.directory.namesake.found is None or second.directory.namesake.found is None:
            await announce()
    assert "holds blocks 4:8" in first.directory.warnings()[0]
    assert "holds blocks 0:4" in second.directory.warnings()[0]


async def test_who_asks_with_the_key_of_a_server_is_told_why_it_sees_none(net: Net) -> None:
    await net.add()
    identity = create_identity()
    server, client = await net.add(identity=identity), await net.add(identity=identity)
    assert await client.directory.look_for_namesake(MODEL) == []
    found: list[str] = []
    with trio.fail_after(20):
        while not found:
            await server.announce()
            assert await client.directory.lookup(MODEL) == ()
            found = await client.directory.look_for_namesake(MODEL)
    (sentence,) = found
    assert sentence.startswith("a server with this peer's own key announced blocks 0:4")
