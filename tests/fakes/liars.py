"""Real servers with a planted fault: everything is theirs but some numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from petals.models.blocks.adapters import linear_features
from petals.peer.engine.endpoint import Inbound
from petals.peer.engine.scheduler import Timed
from petals.peer.node import Peer

KINDS = ("noise", "int8", "stale", "replay", "lazy")


def inbound_of(peer: Peer) -> Inbound:
    """What answers at a serving peer."""
    assert peer.server is not None
    return peer.server.inbound


def noisy_layer(peer: Peer, scale: float = 0.02) -> None:
    """One weight matrix of one block is not what the checkpoint says."""
    span = inbound_of(peer).span
    span.drop_lean_path()  # which has copies of its own
    generator = torch.Generator().manual_seed(1)
    layer = span.layers()[0]
    path = next(iter(linear_features(layer)))
    weight: Tensor = layer.get_submodule(path).weight.detach().clone()  # type: ignore[operator, union-attr]
    wrong = nn.Linear(*reversed(weight.shape), bias=False)
    wrong.weight.data = weight + scale * float(weight.std()) * torch.randn(weight.shape, generator=generator)
    wrong.bias = layer.get_submodule(path).bias  # type: ignore[assignment]
    owner, _, name = path.rpartition(".")
    setattr(layer.get_submodule(owner), name, wrong.requires_grad_(False))


def claims_no_quantisation(peer: Peer) -> None:
    """Serves int8 and says "none"; started with `quant_type="int8"`."""
    service: Any = peer._service
    inbound_of(peer).span.quant_type = "none"
    service._config = replace(service._config, quant_type="none")


def lies_about(
    peer: Peer, lie: Callable[[Tensor, list[Tensor]], Tensor], dice: Callable[[], bool] = lambda: True
) -> None:
    """Answers `lie(right answer, all earlier right answers of that shape)` instead, whenever `dice` say so."""
    inbound: Any = inbound_of(peer)
    compute, seen = inbound._compute, list[Tensor]()

    async def lying(*args: Any) -> Timed[Tensor]:
        done: Timed[Tensor] = await compute(*args)
        known = [each for each in seen if each.shape == done.value.shape]
        seen.append(done.value.clone())
        return Timed(lie(done.value, known), done.queue_s, done.compute_s) if dice() else done

    inbound._compute = lying


def stale(right: Tensor, known: list[Tensor]) -> Tensor:
    """The answer before this one, if there is any."""
    return known[-1] if known else right


def replayed(right: Tensor, known: list[Tensor]) -> Tensor:
    """Some answer to something else."""
    return random.Random(len(known)).choice(known) if known else right


def lazy(right: Tensor, known: list[Tensor]) -> Tensor:
    """Hardly any work: about what went in."""
    return right * 0.99


def plant(peer: Peer, kind: str) -> None:
    """Make a server lie from now on. `int8` must have been started so."""
    if kind == "noise":
        noisy_layer(peer)
    elif kind == "int8":
        claims_no_quantisation(peer)
    else:
        lies_about(peer, {"stale": stale, "replay": replayed, "lazy": lazy}[kind])
