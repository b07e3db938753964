"""Petals' view of who computes which blocks, over our client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from petals.compat.data import CACHE_TOKENS_AVAILABLE, UID_DELIMITER, RemoteSpanInfo, ServerInfo
from petals.models.errors import BlockRangeError
from petals.peer.client.model_client import ClientOptions, ModelClient

Mode = Literal["min_latency", "max_throughput"]


class RemoteSequenceManager:
    """`model.transformer.h.sequence_manager`: looks only, chooses nothing for the model it came from.

    Args:
        blocks: absolute indices, half-open.
    """

    def __init__(self, client: ModelClient, options: ClientOptions, blocks: range) -> None:
        self.config = options
        self.blocks = blocks
        self._client = client

    @property
    def block_uids(self) -> tuple[str, ...]:
        """The model's digest and a block's index each, as `get_remote_module_infos` takes them."""
        return tuple(f"{self._client.model.digest}{UID_DELIMITER}{block}" for block in self.blocks)

    @property
    def rpc_info(self) -> dict[str, Any]:
        """What servers say of the blocks: the least cache left on any holder, in tokens, and their dtypes."""
        records = [offer.record for offer in self._client.watcher.view.offers]
        left = [record.cache_tokens_left for record in records]
        return {
            CACHE_TOKENS_AVAILABLE: min(left, default=0),
            "dtypes": sorted({record.dtype for record in records}),
        }

    def make_sequence(
        self,
        start_index: int = 0,
        end_index: int | None = None,
        *,
        mode: Mode = "min_latency",
        cache_tokens_needed: int = 1,
    ) -> list[RemoteSpanInfo]:
        """The servers that would compute blocks `start_index` to `end_index` of these now.

        Raises:
            MissingBlocks: nobody holds some of them. ValueError: an unknown mode.
        """
        if mode not in ("min_latency", "max_throughput"):
            raise ValueError(f"unknown mode {mode!r}: choose min_latency or max_throughput")
        blocks = self.blocks[start_index : len(self.blocks) if end_index is None else end_index]
        route = self._client.route(
            blocks,
            self.config,
            mode="latency" if mode == "min_latency" else "throughput",
            max_length=cache_tokens_needed,
        )
        records = {offer.record.peer_id: offer.record for offer in self._client.watcher.view.offers}
        return [
            RemoteSpanInfo(hop.peer_id, hop.blocks.start, hop.blocks.stop, ServerInfo.of(records[hop.peer_id]))
            for hop in route.hops
        ]

    def shutdown(self) -> None:
        """Nothing runs that is this view's own."""

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int | slice) -> RemoteSequenceManager:
        picked: Sequence[int] = self.blocks[index] if isinstance(index, slice) else [self.blocks[index]]
        blocks = range(picked[0], picked[-1] + 1) if picked else range(0)
        if len(blocks) != len(picked) or not picked:
            raise BlockRangeError(f"{index} picks no consecutive blocks out of {len(self)}")
        return RemoteSequenceManager(self._client, self.config, blocks)
