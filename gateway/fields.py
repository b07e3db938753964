"""One JSON object from outside, field by field: types and limits are checked as they are read, strangers refused."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NoReturn

from petals.gateway.errors import ApiError


class Fields:
    """Every field is asked for once; `finish` refuses those that nobody asked for."""

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            raise ApiError(400, f"{where or 'the body'} must be a JSON object", param=where or None)
        self._left: dict[str, Any] = dict(value)
        self._where = f"{where}." if where else ""

    def __contains__(self, name: str) -> bool:
        """Whether a field that was not yet asked for is there."""
        return name in self._left

    def take(self, name: str) -> Any:
        """Whatever it is; None where it is missing or null."""
        return self._left.pop(name, None)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
            self.refuse(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.take(name)
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        return self.proper(name, value)

    def proper(self, name: str, text: str) -> str:
        """`text`, unless it holds half a surrogate pair, which is no character and can not be encoded."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.refuse(name, "holds half a character")
        return text

    def nothing(self, name: str, why: str, *allowed: object) -> None:
        """A field of OpenAI's that means something we do not do: only its neutral values are let through."""
        value = self.take(name)
        if value is not None and not any(value == each and type(value) is type(each) for each in allowed):
            self.refuse(name, why, code="unsupported_parameter")

    def ignore(self, names: Collection[str]) -> None:
        """Fields that change nothing here."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        for name in self._left:
            shown = name.encode(errors="replace").decode()[:100]
            name = self._where + shown
            raise ApiError(400, f"unknown field {name}", code="unknown_parameter", param=name)

    def refuse(self, name: str, why: str, *, code: str | None = None) -> NoReturn:
        raise ApiError(400, f"{self._where}{name} {why}", param=self._where + name, code=code)


def parse_json(body: bytes) -> object:
    """Strictly: UTF-8, no NaN, no nesting that exhausts the stack."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}") from None
