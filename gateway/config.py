"""Settings of the HTTP door. Times are in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from petals.protocols.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Where to listen, for whom, and how much at once."""

    bind: str = "127.0.0.1:8000"
    """HOST:PORT or [IPV6]:PORT; port 0 takes a free one."""
    api_keys: Path | None = None
    """File of key hashes (keys.py); None: whoever reaches the port may ask."""
    cors: tuple[str, ...] = ()
    """Origins whose pages a browser lets read our answers, such as https://example.org; "*": all."""
    models: tuple[str, ...] = ()
    """Models to offer beside the peer's own."""
    hosts: tuple[str, ...] = ()
    """Names that a door without keys answers to, beside localhost and addresses; "*": all."""
    max_answers: int = 16
    """Answers generated at once, over all requests; further ones wait."""
    max_waiting: int = 128
    """Requests that wait; more are told to come back."""
    wait_s: float = 120.0
    """How long a request waits for its turn before it is told to come back."""
    max_body_bytes: int = 1 << 20
    body_s: float = 30.0
    """A request's body must have arrived by then."""
    stalled_s: float = 30.0
    """A client that takes nothing for this long has hung up (where the system can tell: Linux)."""
    default_new_tokens: int = 1024
    """What a chat may answer when it does not say; fewer where the model can not look back so far."""

    def __post_init__(self) -> None:
        self.address  # noqa: B018  # a bad one is refused here
        for origin in self.cors:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise UserError(f"{origin!r} is no origin; write it like https://example.org")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port.

        Raises:
            UserError: it is none.
        """
        host, colon, port = self.bind.rpartition(":")
        if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise UserError(f"{self.bind!r} is nothing to listen on; write HOST:PORT, like 127.0.0.1:8000")
        return host.removeprefix("[").removesuffix("]"), int(port)

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach it."""
        host = self.address[0]
        if host == "localhost":
            return True
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return False
