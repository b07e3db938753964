"""The exception family. Each member is a decision: who is to blame, and what the caller does next.

PetalsError                  petals/errors.py
└─ SwarmError
   ├─ UserError                 the user's mistake: one line, exit code 2
   │  └─ ConfigError            a setting with a wrong value: carries .config, .field, .value, .allowed
   ├─ ProtocolViolation         a broken rule, whose fault is known to the end that catches it
   ├─ LocalProtocolError        a bug at home                       never retried
   ├─ RouteError
   │  └─ MissingBlocks          nobody holds .blocks                wait for the next refresh
   └─ RemoteError               carries .peer_id
      ├─ PeerUnreachable        silence, a cut link, a frozen peer  another peer; short ban
      ├─ PeerBusy               no room, and it said so             another peer; no ban
      ├─ RequestRefused         it cannot serve what we asked       another peer; no ban
      │  ├─ Forbidden           it serves others, not us            another peer; long ban
      │  └─ NeverFits           more than it ever gives anybody     another peer; never asked again for as much
      ├─ RemoteProtocolError    nonsense on the wire                another peer; long ban
      └─ WrongAnswer            others compute something else       another peer, and not this one for a day
"""

from __future__ import annotations

from collections.abc import Sequence

from petals.errors import PetalsError
from petals.protocols.types import PeerId


class SwarmError(PetalsError):
    """Root of everything this package raises on purpose about the swarm."""


class UserError(SwarmError):
    """Something the user asked for cannot be; the message says what was wrong and what to do."""


class ConfigError(UserError):
    """A field of a configuration has a value that it can not have. Raised when the configuration is made.

    Attributes:
        config: name of the class, such as "ServeConfig".
        field: name of the field.
        value: what it was, as text; hidden where the field is secret.
        allowed: what it may be, as text.
    """

    def __init__(self, config: str, field: str, value: str, allowed: str) -> None:
        self.config, self.field, self.value, self.allowed = config, field, value, allowed
        super().__init__(f"{config}.{field} is {value}; allowed: {allowed}")


class ProtocolViolation(SwarmError):
    """A message that the protocol does not allow. The state machines raise it; the two ends name the culprit.

    Attributes:
        out_of_order: the message may be right, its time is not.
    """

    def __init__(self, message: str, *, out_of_order: bool = False) -> None:
        self.out_of_order = out_of_order
        super().__init__(message)


class LocalProtocolError(SwarmError):
    """We were about to break the protocol ourselves."""


class RouteError(SwarmError):
    """No way through the model could be found."""


class MissingBlocks(RouteError):
    """Nobody holds some blocks.

    Attributes:
        blocks: the indices nobody holds, ascending.
    """

    def __init__(self, blocks: Sequence[int], message: str | None = None) -> None:
        self.blocks = tuple(blocks)
        super().__init__(message or f"no peer of the swarm holds {describe_blocks(self.blocks)}")


class RemoteError(SwarmError):
    """Another peer is the cause; `peer_id` says which (None where it is not known yet)."""

    def __init__(self, message: str, peer_id: PeerId | None = None) -> None:
        self.peer_id = peer_id
        super().__init__(message)


class PeerUnreachable(RemoteError):
    """Silence: refused, cut, reset, frozen or too slow."""


class PeerBusy(RemoteError):
    """The peer has no room now. `retry_after_s` is its own estimate, None if it gave none."""

    def __init__(self, message: str, peer_id: PeerId | None = None, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, peer_id)


class RequestRefused(RemoteError):
    """The peer understood and cannot serve this (other blocks, another dtype, too long ...)."""


class Forbidden(RequestRefused):
    """The peer serves others, not us; asking again is of no use before its operator has changed that."""


class NeverFits(RequestRefused):
    """More than the peer ever gives to one session; waiting is of no use, asking for less is."""


class RemoteProtocolError(RemoteError):
    """The peer sent something the protocol does not allow."""


class WrongAnswer(RemoteError):
    """The peer's numbers are not those of its blocks: others, or we, have computed them again."""


def describe_blocks(blocks: Sequence[int]) -> str:
    """Ascending indices as people read them: (4, 5, 6, 9) -> "blocks 4:7 and 9:10"."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1][1] = block + 1
        else:
            spans.append([block, block + 1])
    parts = [f"{start}:{end}" for start, end in spans]
    return "blocks " + (" and ".join(parts) if len(parts) < 3 else ", ".join(parts[:-1]) + " and " + parts[-1])
