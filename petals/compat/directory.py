"""Petals' helpers for its directory, over ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from petals.compat.data import RemoteModuleInfo, ServerInfo, parse_uid
from petals.peer.node import Peer
from petals.peer.pretrained import RemoteSequential
from petals.peer.sync import SyncPeer
from petals.protocols.types import ModelId


def get_remote_module_infos(dht: SyncPeer | Peer, uids: Sequence[str], **_: Any) -> list[RemoteModuleInfo]:
    """Who holds each of these blocks now.

    Args:
        dht: a peer of the swarm (`petals.connect`).
        uids: "NAME.7" with a model's name or digest, all of one model.
    Raises:
        ValueError: a uid that names no block, or blocks of several models.
    """
    peer = dht.peer if isinstance(dht, SyncPeer) else dht
    named = [parse_uid(uid) for uid in uids]
    prefixes = {prefix for prefix, _ in named}
    if len(prefixes) != 1:
        raise ValueError(f"expected blocks of one model, got those of {len(prefixes)}")
    prefix = prefixes.pop()
    digest = prefix if re.fullmatch("[0-9a-f]{64}", prefix) else peer.portal.run(peer.checkpoint, prefix).digest
    records = peer.portal.run(peer.directory.lookup, ModelId(prefix, digest))
    return [
        RemoteModuleInfo(uid, {str(each.peer_id): ServerInfo.of(each) for each in records if block in each.blocks})
        for uid, (_, block) in zip(uids, named, strict=True)
    ]


def get_remote_sequence(dht: Any, start: int, stop: int, config: Any, **_: Any) -> RemoteSequential:
    """Blocks `start` to `stop` (half-open) of the model of `config`."""
    return RemoteSequential(config, dht=dht, start_block=start, end_block=stop)


def get_remote_module(dht: Any, uid: str, config: Any, **_: Any) -> RemoteSequential:
    """The one block that `uid` names."""
    block = parse_uid(uid)[1]
    return RemoteSequential(config, dht=dht, start_block=block, end_block=block + 1)
