"""The tensor side's own exceptions; it imports nobody at home.

    ModelError             a model that can not be opened, loaded or run as asked; the message says what to do
    ├─ UnsupportedModel    an architecture that can not be served
    ├─ BlockRangeError     blocks outside of what is there
    ├─ CacheFull           no room for more tokens in a session
    └─ StepError           a tensor that does not fit
"""

from __future__ import annotations


class ModelError(Exception):
    """A model that can not be opened, loaded or run as asked; the message says what to do."""


class UnsupportedModel(ModelError):
    """An architecture that can not be served."""


class BlockRangeError(ModelError):
    """Blocks outside of what is there."""


class CacheFull(ModelError):
    """No room for more tokens in a session."""


class StepError(ModelError):
    """A tensor that does not fit a step."""
