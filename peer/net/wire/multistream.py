"""multistream-select: two ends agree on a protocol by name. Does no I/O.

The wire (libp2p specs, connections/README.md "Protocol Negotiation") is lines, each with an unsigned varint in front
that counts the name and its newline. Both ends say "/multistream/1.0.0"; then the dialler names protocols until the
listener repeats one instead of saying "na". Nothing forbids a dialler to say its first two lines in one breath, which
saves a round trip; one that knows the answer may even go on speaking at once and check it later.
"""

from __future__ import annotations

from collections.abc import Container

from petals.protocols.errors import ProtocolViolation
from petals.protocols.framing import FrameDecoder, encode_frame

MULTISTREAM = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
MAX_LINE_BYTES = 1024
_MAX_PROPOSALS = 16
"""Names a dialler may try on one stream; each costs us an answer."""


def encode_line(line: str) -> bytes:
    return encode_frame(line.encode() + b"\n")


def proposal(protocol: str) -> bytes:
    """The dialler's two lines in one breath. The listener's answer to them, if it agrees, is the same bytes."""
    return encode_line(MULTISTREAM) + encode_line(protocol)


class _Lines:
    def __init__(self) -> None:
        self._decoder = FrameDecoder(MAX_LINE_BYTES)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        self._decoder.receive_data(data)

    def wanted(self) -> int:
        """How many bytes may be read without taking any that belong to what comes after the negotiation."""
        return self._decoder.wanted()

    def rest(self) -> bytes:
        """What arrived after the agreement, for those who could not read exactly `wanted()`."""
        return self._decoder.take_rest(1 << 30)

    def _next_line(self) -> str | None:
        frame = self._decoder.next_frame()
        if frame is None:
            return None
        if frame[-1:] != b"\n":
            raise ProtocolViolation("multistream line without a newline")
        try:
            return frame[:-1].decode()
        except UnicodeDecodeError:
            raise ProtocolViolation("multistream line is not text") from None


class Dialler(_Lines):
    """Proposes one protocol. Send `proposal(protocol)`, feed the answers, ask `agreed` until it is not None."""

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol
        self._greeted = False

    def agreed(self) -> bool | None:
        """True: the listener speaks it; False: it does not; None: not said yet.

        Raises:
            ProtocolViolation: the answer is none.
        """
        while (line := self._next_line()) is not None:
            if not self._greeted:
                if line != MULTISTREAM:
                    raise ProtocolViolation(f"peer speaks {line[:80]!r}, not {MULTISTREAM}")
                self._greeted = True
            elif line == self.protocol:
                return True
            elif line == NOT_AVAILABLE:
                return False
            else:
                raise ProtocolViolation(f"peer answers {line[:80]!r} to the proposal of {self.protocol!r}")
        return None


class Listener(_Lines):
    """Answers proposals from `protocols`. Feed it, send `take_output()`, ask `chosen` until it is not None."""

    def __init__(self, protocols: Container[str]) -> None:
        super().__init__()
        self._protocols = protocols
        self._greeted = False
        self._n_proposals = 0
        self._output = b""

    def take_output(self) -> bytes:
        output, self._output = self._output, b""
        return output

    def chosen(self) -> str | None:
        """The protocol both ends speak; None: nothing agreed yet.

        Raises:
            ProtocolViolation: nonsense, or too many proposals.
        """
        while (line := self._next_line()) is not None:
            if not self._greeted:
                if line != MULTISTREAM:
                    raise ProtocolViolation(f"peer speaks {line[:80]!r}, not {MULTISTREAM}")
                self._greeted = True
                self._output += encode_line(MULTISTREAM)
            elif line in self._protocols:
                self._output += encode_line(line)
                return line
            else:
                self._n_proposals += 1
                if self._n_proposals > _MAX_PROPOSALS:
                    raise ProtocolViolation(f"more than {_MAX_PROPOSALS} protocols proposed")
                self._output += encode_line(NOT_AVAILABLE)
        return None
