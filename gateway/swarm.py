"""What the swarm looks like from here: who holds what, where it is weakest, and how it is, in a word. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from petals.dht.health import health, weakest_stretch
from petals.dht.records import ServerState
from petals.peer.client.view import Offer, SwarmView
from petals.protocols.types import PeerId


def describe(view: SwarmView, num_blocks: int, link: Callable[[PeerId], str]) -> dict[str, Any]:
    """One model's swarm as JSON; `link` says how we are connected with a peer."""
    copies = [sum(block in offer.record.blocks for offer in view.offers) for block in range(num_blocks)]
    supply = [
        sum(offer.record.inference_rps / len(offer.record.blocks) for offer in view.offers if b in offer.record.blocks)
        for b in range(num_blocks)
    ]
    weakest = weakest_stretch(copies)
    state, words = health(copies)
    return {
        "model": view.model.name,
        "digest": view.model.digest,
        "num_blocks": num_blocks,
        "health": state,
        "words": words,
        "copies": copies,
        "blocks_per_s": supply,
        "weakest": [weakest.start, weakest.stop],
        "peers": [_peer(offer, link(offer.record.peer_id)) for offer in (*view.offers, *view.away)],
    }


def _peer(offer: Offer, link: str) -> dict[str, Any]:
    record = offer.record
    return {
        "peer_id": record.peer_id,
        "name": record.public_name,
        "state": ServerState(record.state).name.lower(),
        "blocks": [record.blocks.start, record.blocks.stop],
        "version": record.version,
        "dtype": record.dtype,
        "quant_type": record.quant_type,
        "adapters": list(record.adapters),
        "decode_blocks_per_s": record.inference_rps,
        "prefill_blocks_per_s": record.forward_rps,
        "queue_s": record.queue_s,
        "cache_tokens_left": record.cache_tokens_left,
        "round_trip_s": offer.round_trip_s,
        "round_trips_s": {str(peer): seconds for peer, seconds in record.round_trips_s.items()},
        "relayed": record.using_relay,
        "reachability": record.reachability,
        "link": link,
        "banned_s": offer.ban_left_s,
    }
