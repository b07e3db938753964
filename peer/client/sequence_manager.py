"""Who computes which blocks now, to be looked at: `model.transformer.h.sequence_manager`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from petals.dht.records import ServerRecord, ServerState
from petals.protocols.errors import UserError
from petals.protocols.types import PeerId

if TYPE_CHECKING:
    from petals.peer.client.model_client import ClientOptions, ModelClient

Mode = Literal["min_latency", "max_throughput"]


@dataclass(frozen=True, slots=True)
class RemoteSpanInfo:
    """Blocks in a row that one server computes; `end` is behind the last one."""

    peer_id: PeerId
    start: int
    end: int
    server_info: ServerRecord | None
    """None: blocks that are computed here."""

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def state(self) -> ServerState:
        return ServerState.ONLINE if self.server_info is None else self.server_info.state

    @property
    def throughput(self) -> float:
        """Blocks passed per second; 0 for blocks that are computed here."""
        return 0.0 if self.server_info is None else self.server_info.inference_rps


class RemoteSequenceManager:
    """A view of the servers; what it is asked changes nothing for the model it came from.

    Args:
        options: what the model wants of the swarm now.
        blocks: absolute indices, half-open.
    """

    def __init__(self, client: ModelClient, options: Callable[[], ClientOptions], blocks: range) -> None:
        self.blocks = blocks
        self._client = client
        self._options = options

    @property
    def config(self) -> ClientOptions:
        """What the model wants of the swarm."""
        return self._options()

    @property
    def block_uids(self) -> tuple[str, ...]:
        """The model's digest and a block's index each: "DIGEST.7"."""
        return tuple(f"{self._client.model.digest}.{block}" for block in self.blocks)

    @property
    def rpc_info(self) -> dict[str, Any]:
        """What servers say of the blocks: the least cache left on any holder, in tokens, and their dtypes."""
        records = [offer.record for offer in self._client.watcher.view.offers]
        return {
            "cache_tokens_available": min((record.cache_tokens_left for record in records), default=0),
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
            MissingBlocks: nobody holds some of them. UserError: an unknown mode.
        """
        if mode not in ("min_latency", "max_throughput"):
            raise UserError(f"unknown mode {mode!r}: choose min_latency or max_throughput")
        route = self._client.route(
            self.blocks[start_index : len(self.blocks) if end_index is None else end_index],
            self._options(),
            mode="latency" if mode == "min_latency" else "throughput",
            max_length=cache_tokens_needed,
        )
        records = {offer.record.peer_id: offer.record for offer in self._client.watcher.view.offers}
        return [
            RemoteSpanInfo(hop.peer_id, hop.blocks.start, hop.blocks.stop, records.get(hop.peer_id))
            for hop in route.hops
        ]

    def shutdown(self) -> None:
        """Nothing runs that is this view's own."""

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int | slice) -> RemoteSequenceManager:
        picked: Sequence[int] = self.blocks[index] if isinstance(index, slice) else [self.blocks[index]]
        if not picked or (picked != range(picked[0], picked[-1] + 1) and isinstance(picked, range)):
            raise UserError(f"{index} picks no consecutive blocks out of {len(self)}")
        return RemoteSequenceManager(self._client, self._options, range(picked[0], picked[-1] + 1))
