"""Deep prompts: what is added to the first positions of every block's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petals.models.blocks.adapters import Applied


class PromptHook:
    """Adds this thread's prompt, if any, to the first positions of one block's input."""

    def __init__(self, applied: Applied, block: int) -> None:
        self._applied = applied
        self._block = block

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._applied.prompts is None:
            return None
        prompt = self._applied.prompts[self._block]
        if args:
            return (_add_prefix(args[0], prompt), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _add_prefix(kwargs["hidden_states"], prompt)}


def _add_prefix(hidden: Tensor, prompt: Tensor) -> Tensor:
    """hidden (batch, tokens, size) + prompt (batch, prefix, size) on its first `prefix` positions, out of place."""
    prefix = prompt.shape[1]
    return torch.cat([hidden[:, :prefix] + prompt, hidden[:, prefix:]], dim=1)
