"""How long a server waits for who asks it: one scope for a whole conversation, whose deadline moves."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petals.peer.engine.stream_rules import Asker, Refused
from petals.peer.net.wire.loopback import WINDOW, LoopbackStream, loopback_pair
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable
from petals.protocols.stream import MessageStream
from petals.protocols.types import PeerId


def pair() -> tuple[Asker, LoopbackStream]:
    near, far = loopback_pair(PeerId("client"), PeerId("server"))
    return Asker(far), near


async def test_only_waits_are_counted_and_each_from_its_beginning(autojump_clock: MockClock) -> None:
    asker, client = pair()
    messages = MessageStream(client, max_message_bytes=100)

    async def serve() -> None:
        with asker.served():
            for _ in range(3):
                await messages.write_message(b"step")
                with asker.within(30):
                    await trio.sleep(20)
                    assert await asker.read_message() == b"step"
                await trio.sleep(1000)  # computing
            with asker.within(30):
                await asker.read_message()

    with pytest.raises(Refused, match="nothing came for 30 s") as refused:
        await serve()
    assert refused.value.code == pb.OUT_OF_ORDER
    assert trio.current_time() == pytest.approx(3 * 1020 + 30)


async def test_an_answer_that_is_not_taken_costs_the_stream(autojump_clock: MockClock) -> None:
    asker, _ = pair()
    with pytest.raises(Refused), asker.served(), asker.within(5):
        await asker.write_message(b"answer", bytes(2 * WINDOW))
    with pytest.raises(PeerUnreachable):
        await asker.write_message(b"sorry")


@pytest.mark.parametrize("waiting", [True, False])
async def test_who_is_cut_short_is_told_that_we_leave(nursery: trio.Nursery, *, waiting: bool) -> None:
    asker, _ = pair()
    codes: list[int] = []

    async def serve() -> None:
        try:
            with asker.served():
                if waiting:
                    with asker.within(30):
                        await asker.read_message()
                await trio.sleep_forever()
        except Refused as refusal:
            codes.append(refusal.code)

    nursery.start_soon(serve)
    await wait_all_tasks_blocked()
    asker.cut()
    await wait_all_tasks_blocked()
    assert codes == [pb.LEAVING]
