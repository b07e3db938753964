"""Which models and adapters can be asked for, under which names."""

from __future__ import annotations

import time
from dataclasses import replace

from petals.gateway.config import HttpConfig
from petals.gateway.errors import ApiError
from petals.gateway.generations import Offered
from petals.models.source.context_length import longest_context
from petals.peer.node import Peer

LATEST = ":latest"
"""What Ollama's clients put behind a name."""


class Offers:
    """The models of a peer by the names that clients use; LoRA adapters that servers host are BASE:ADAPTER."""

    def __init__(self, peer: Peer, models: dict[str, Offered]) -> None:
        self.opened = int(time.time())
        self.models = models
        self._peer = peer

    async def find(self, name: str) -> Offered:
        """
        Raises:
            ApiError: 404, naming those that are there.
        """
        for spelled in (name, name.removesuffix(LATEST)):
            if spelled in self.models:
                return self.models[spelled]
            base, _, adapter = spelled.rpartition(":")
            if base in self.models and adapter in await self.adapters(self.models[base]):
                return replace(self.models[base], name=spelled, adapter=adapter)
        shown = name.encode(errors="replace").decode()[:200]
        names = [offered.name for offered in await self.all()]
        raise ApiError(
            404, f"no model {shown!r} here; there is {', '.join(names)}", code="model_not_found", param="model"
        )

    async def adapters(self, model: Offered) -> list[str]:
        """LoRA adapters of a model that servers announce."""
        client = await self._peer.client(model.argument)
        return sorted({name for offer in client.watcher.view.offers for name in offer.record.adapters})

    async def all(self) -> list[Offered]:
        """Every name: models, and each with each of its adapters."""
        found = []
        for model in self.models.values():
            found.append(model)
            for adapter in await self.adapters(model):
                found.append(replace(model, name=f"{model.name}:{adapter}", adapter=adapter))
        return found

    async def max_length(self, model: Offered) -> int | None:
        """Tokens that a model can look back on; None: as many as fit."""
        client = await self._peer.client(model.argument)
        limit = longest_context(client.checkpoint.config.get_text_config())
        return None if limit is None else int(limit)

    async def describe(self, model: Offered) -> dict[str, object]:
        """As /v1/models shows it."""
        described: dict[str, object] = {
            "id": model.name,
            "object": "model",
            "created": self.opened,
            "owned_by": "petals",
            "max_model_len": await self.max_length(model),
        }
        if model.adapter is not None:
            described |= {"root": model.name.rpartition(":")[0], "parent": model.name.rpartition(":")[0]}
        return described


async def open_models(peer: Peer, config: HttpConfig) -> dict[str, Offered]:
    """The peer's own model and the others it shall offer, by the names that clients use.

    Raises:
        ModelError: one of them can not be opened.
    """
    models = {}
    for argument in (None, *config.models):
        client = await peer.client(argument)
        models[client.model.name] = Offered(client.model.name, argument, client.model.digest)
    return models
