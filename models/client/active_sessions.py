"""Which session a stack of blocks continues: that of the innermost open `with`, for each stack by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petals.models.client.generation import InferenceSession


class ActiveSessions:
    """The open sessions of one stack of blocks and of its slices, which share this object.

    Theory. Two models may be used side by side, and two slices of one model: `with A.inference_session(),
    B.inference_session(): A(ids)`. So the active session belongs to the stack and not to the program, and a slice
    finds the innermost session that holds its blocks. The variable is a context variable: threads and tasks that
    begin inside of the `with` see the session, others do not.
    """

    def __init__(self) -> None:
        self._open: ContextVar[tuple[InferenceSession | None, ...]] = ContextVar("petals_sessions", default=())

    def holding(self, blocks: range) -> InferenceSession | None:
        """The innermost active session that holds all of `blocks`; None: there is none, or `use(None)` hides it."""
        for session in reversed(self._open.get()):
            if session is None:
                return None
            if session.blocks.start <= blocks.start and blocks.stop <= session.blocks.stop:
                return session
        return None

    @contextmanager
    def use(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Make `session` the innermost one for a while; None: no session, whatever is open outside."""
        token = self._open.set((*self._open.get(), session))
        try:
            yield session
        finally:
            self._open.reset(token)
