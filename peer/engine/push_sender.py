"""Sends the output of a step on to the server that has the next blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import SwarmError
from petals.protocols.inference import MAX_MESSAGE_BYTES
from petals.protocols.push import PUSH_V1
from petals.protocols.stream import MessageStream
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

PUSH_S = 3.0
"""How long a push may take. The client notices much earlier that none has come, and supplies the input itself."""
MAX_ADDRS = 16


class Pusher:
    """Pushes; what goes wrong is nobody's failure, since the client has the same output."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def push(
        self, to: pb.PushTo, hidden: pb.Tensor, payload: Sequence[memoryview], *, asker: PeerId | None = None
    ) -> None:
        """Send `hidden` to the session that `to` names; `asker` is who named its addresses."""
        push = pb.Push(session_id=to.session_id, step_id=to.step_id, hidden=hidden)
        addrs = tuple(to.addrs[:MAX_ADDRS])
        if asker is not None:
            addrs = self._host.plausible(asker, addrs)
        with trio.move_on_after(PUSH_S):
            try:
                stream = await self._host.open_stream(PeerId(to.peer_id), PUSH_V1, addrs=addrs)
                messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
                try:
                    await messages.write_message(push.SerializeToString(), *payload)
                    await messages.close()
                except BaseException:
                    await messages.reset()
                    raise
            except SwarmError as error:
                log.info("no push to …%s: %s", to.peer_id[-6:], error)
