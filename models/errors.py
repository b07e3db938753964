"""What can go wrong between a checkpoint and a hidden state. Its root is PetalsError, as all others'.

    ModelError
    ├─ CheckpointError      MODEL cannot be found, read or trusted       fix the argument or the files
    │  └─ SourceUnreachable the hub or index does not give it            later, or ask the swarm
    ├─ DocumentError        what a stranger says of weights is nonsense  ask another
    ├─ UnsupportedModel     unknown architecture, or a failed self-test  another family; docs/custom-model.md
    ├─ UnsupportedLibrary   the installed transformers fails the check  another version of it, or of petals
    ├─ BlockRangeError      blocks that the model or the span has not    ask for others
    └─ StepError            a tensor that does not fit the span          the message names the limit
       └─ CacheFull         more tokens than the session has room for    open a longer session

Every message is one line that says what to do.
"""

from __future__ import annotations

from petals.errors import PetalsError


class ModelError(PetalsError):
    """Root of everything `petals.models` raises on purpose."""


class CheckpointError(ModelError):
    """MODEL cannot be found, fetched, read or trusted."""


class SourceUnreachable(CheckpointError):
    """MODEL may be right, but whoever publishes it can not be reached, or does not give it to us."""


class DocumentError(ModelError):
    """What another peer said about a checkpoint is no such thing, or not what the digest vouches for."""


class UnsupportedModel(ModelError):
    """The blocks of this architecture cannot be served exactly."""


class UnsupportedLibrary(ModelError):
    """The installed `transformers` does not do what this version of petals was written for."""

    def __init__(self, version: str, failed: str) -> None:
        super().__init__(
            f"transformers {version} generates other tokens than this version of petals expects (checked: {failed}); "
            f"install transformers<{version} or a newer petals"
        )


class BlockRangeError(ModelError):
    """A range of blocks which the model, or the loaded span, does not have."""


class StepError(ModelError, ValueError):
    """A tensor handed to a span, or an argument of a model, does not fit; nothing was computed, no cache changed."""


class CacheFull(StepError):
    """More tokens than the cache has room for; it is unchanged."""
