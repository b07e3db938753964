"""A peer's door asked from outside: what its swarm page shows. For `petals status --url`; starts without torch."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import trio

from petals.protocols.errors import UserError

PATH = "/api/swarm"
PAGES = (PATH, "/swarm", "/v1", "/metrics", "/health")
"""What people copy: each of them leads to the same door."""
ANSWER_S = 10.0
MAX_ANSWER_BYTES = 32 << 20
PRINTS = "give the address that `petals peer --http` prints, such as http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class DoorAddress:
    """Where a peer answers HTTP."""

    host: str
    port: int
    encrypted: bool
    prefix: str
    """In front of its paths, where a reverse proxy put them; else empty."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.encrypted}://{host}:{self.port}{self.prefix}"


def read_address(url: str) -> DoorAddress:
    """A URL as people write it: a page of the door will do, and http:// may be left out.

    Raises:
        UserError: it is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port, encrypted = parts.hostname, parts.port, parts.scheme == "https"
    except ValueError:  # a port or an IPv6 address that is none
        host = None
    if url.startswith("/") or not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise UserError(f"{url!r} is no URL of a peer: {PRINTS}")
    path = parts.path.rstrip("/")
    page = next((each for each in PAGES if path.endswith(each)), "")
    return DoorAddress(host, port or (443 if encrypted else 80), encrypted, path.removesuffix(page))


async def ask_swarm(door: DoorAddress, api_key: str | None = None) -> dict[str, Any]:
    """What the peer behind that door sees of the swarm, the routes it asks and its throughput, as /api/swarm has them.

    Raises:
        UserError: nobody answers there, somebody else does, or a key is wanted.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise UserError("that API key can not be one: `petals keygen --api FILE` prints them like petals-...")
    with trio.move_on_after(ANSWER_S) as scope:
        # Given up, not waited for: it only reads.
        status, body = await trio.to_thread.run_sync(
            partial(_get, door, api_key),
            abandon_on_cancel=True,  # type: ignore[call-arg]  # trio_typing knows its old name
        )
    if scope.cancelled_caught:
        raise UserError(f"{door} does not answer within {ANSWER_S:.0f} s: the peer is frozen, or a firewall in between")
    return _understood(door, status, body)


def _get(door: DoorAddress, api_key: str | None) -> tuple[int, bytes]:
    """In a worker thread."""
    kind = http.client.HTTPSConnection if door.encrypted else http.client.HTTPConnection
    connection = kind(door.host, door.port, timeout=ANSWER_S)
    headers = {"accept": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        connection.request("GET", door.prefix + PATH, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(MAX_ANSWER_BYTES + 1)
    except ConnectionRefusedError:
        raise UserError(f"nobody listens at {door}: start the peer with --http, or {PRINTS}") from None
    except socket.gaierror:
        raise UserError(f"the name {door.host} can not be resolved: check its spelling") from None
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"{door} has a certificate that is not trusted here: {error.verify_message}") from None
    except ssl.SSLError:
        raise UserError(f"{door} does not speak TLS: a peer's own door is http://, not https://") from None
    except TimeoutError:
        raise UserError(f"{door} can not be reached within {ANSWER_S:.0f} s: check the address and firewalls") from None
    except (http.client.HTTPException, ValueError, ConnectionResetError, BrokenPipeError):
        raise UserError(f"{door} does not speak HTTP: {PRINTS}, not one for --initial_peers") from None
    except OSError as error:
        raise UserError(f"{door} can not be reached: {error.strerror or error}") from None
    finally:
        connection.close()


def _understood(door: DoorAddress, status: int, body: bytes) -> dict[str, Any]:
    """
    Raises:
        UserError: it is an error's, or not a peer's.
    """
    try:
        told = json.loads(body) if len(body) <= MAX_ANSWER_BYTES else None
    except ValueError:
        told = None
    if status == 200 and isinstance(told, dict) and isinstance(told.get("models"), list):
        return told
    error = told.get("error") if isinstance(told, dict) else None
    if not isinstance(error, dict) or status == 404:
        raise UserError(f"{door} is no Petals peer (it answered {status}): {PRINTS}")
    if error.get("code") == "missing_api_key":
        raise UserError(f"the peer at {door} wants an API key: give --api_key KEY, @FILE, or PETALS_API_KEY")
    if error.get("code") == "invalid_api_key":
        raise UserError(f"the peer at {door} does not know that API key: its owner makes one with petals keygen --api")
    said = "".join(char for char in str(error.get("message"))[:300] if char.isprintable())
    raise UserError(f"the peer at {door} refused: {said}")
