"""Where the time of every step went, in a file for Perfetto and chrome://tracing (Trace Event Format, JSON array).

A row for each session, a slice for each server's part of a step, and in it what it was made of: serialising here,
encrypting here (both directions, everything that shares the connection), waiting for the server's compute thread,
computing, and the rest, which is the network, the other end's share of the first two, and both ends' event loops.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from petals.protocols.errors import UserError

if TYPE_CHECKING:
    from petals.peer.client.session.session import StepTrace

PARTS = ("serialise", "encrypt", "network", "queue", "compute")


@dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    start_s: float
    seconds: float


class TraceFile:
    """Writes steps as they are noted; leaving its context completes the file.

    Raises:
        UserError: the file can not be written.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._sessions: dict[int, int] = {}
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--trace {path}: {error.strerror}") from None
        self._between = "[\n"

    def note(self, step: StepTrace) -> None:
        """One step of one session is done."""
        row = self._sessions.setdefault(step.session, len(self._sessions) + 1)
        for hop in step.hops:
            name = f"{hop.blocks.start}:{hop.blocks.stop} …{hop.peer_id[-6:]}"
            details = {"position": step.position, "tokens": step.tokens, "peer_id": hop.peer_id}
            self._write(_Slice(name, hop.sent_at, hop.round_trip_s), row, details)
            parts = hop.parts()
            if step.tokens == 1:
                for part in PARTS:
                    self._seconds[part].append(parts[part])
            way = parts["network"] / 2
            at = hop.sent_at
            for part, seconds in (
                ("serialise", parts["serialise"]), ("encrypt", parts["encrypt"]), ("network", way),
                ("queue", parts["queue"]), ("compute", parts["compute"]), ("network", way),
            ):  # fmt: skip
                self._write(_Slice(part, at, seconds), row, {})
                at += seconds

    def _write(self, piece: _Slice, row: int, details: dict[str, object]) -> None:
        event = {
            "name": piece.name, "ph": "X", "pid": row, "tid": 1,
            "ts": round(piece.start_s * 1e6, 1), "dur": round(piece.seconds * 1e6, 1), "args": details,
        }  # fmt: skip
        self._file.write(self._between + json.dumps(event, ensure_ascii=False))
        self._between = ",\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.write("[]\n" if self._between == "[\n" else "\n]\n")
        self._file.close()
        if self._seconds:
            medians = ", ".join(f"{part} {1e3 * statistics.median(self._seconds[part]):.2f}" for part in PARTS)
            self._say(f"one token at one server, median ms: {medians} ({len(self._seconds['compute'])} samples)")
        self._say(f"trace of {len(self._sessions)} sessions in {self._path}; open it at ui.perfetto.dev")
