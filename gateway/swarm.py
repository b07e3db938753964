"""What the swarm looks like from here: who holds what, where it is weakest, and how it is, in a word. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from petals.dht import health
from petals.peer.client.routing.view import Offer, SwarmView
from petals.protocols.types import PeerId


def describe(view: SwarmView, num_blocks: int, link: Callable[[PeerId], str]) -> dict[str, Any]:
    """One model's swarm as JSON; `link` says how we are connected with a peer."""
    copies = [sum(block in offer.record.blocks for offer in view.offers) for block in range(num_blocks)]
    supply = [
        sum(offer.record.inference_rps / len(offer.record.blocks) for offer in view.offers if b in offer.record.blocks)
        for b in range(num_blocks)
    ]
    return {
        **health.describe(view.model, copies),
        "blocks_per_s": supply,
        "peers": [_peer(offer, link(offer.record.peer_id)) for offer in (*view.offers, *view.away)],
    }


def _peer(offer: Offer, link: str) -> dict[str, Any]:
    return {
        **offer.record.as_json(),
        "round_trip_s": offer.round_trip_s,
        "link": link,
        "banned_s": offer.ban_left_s,
    }
