"""Which blocks a server is going to hold, how much memory, and why: what `serve` does, and what --dry_run only says."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import trio

from petals.dht.directory import Directory
from petals.dht.health import copies_of, health, weakest_stretch
from petals.dht.records import ServerRecord, ServerState
from petals.models.source.checkpoint import Checkpoint
from petals.peer.base.config import ServeConfig
from petals.peer.server.capacity import Memory, capacity_of, memory_of
from petals.peer.server.device import compute_dtype, device_of
from petals.peer.server.placement import choose_blocks
from petals.peer.server.service import check_blocks
from petals.protocols.errors import UserError, describe_blocks
from petals.protocols.types import ModelId


@dataclass(frozen=True, slots=True)
class Place:
    """Which blocks, and why; a line for each reason."""

    blocks: range
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """What serving would mean for this machine and for the swarm."""

    model: ModelId
    place: Place
    num_blocks: int
    """Of the whole model."""
    dtype: str
    quant_type: str
    device: str
    memory: Memory
    copies: tuple[int, ...]
    """Of each block, as the swarm is now."""

    @property
    def weight_bytes(self) -> int:
        """Of the blocks, as they will be kept."""
        return self.memory.weights(self.place.blocks)

    @property
    def fits(self) -> bool:
        return self.memory.holds(self.place.blocks)

    @property
    def copies_then(self) -> tuple[int, ...]:
        """Of each block, once these are served, too."""
        return tuple(count + (block in self.place.blocks) for block, count in enumerate(self.copies))

    def describe(self) -> str:
        """For people."""
        blocks, memory = self.place.blocks, self.memory
        kind = self.dtype if self.quant_type == "none" else self.quant_type
        lines = [
            f"would hold blocks {blocks.start}:{blocks.stop} of {self.model.name}, which has {self.num_blocks} "
            f"({kind}, on {self.device})",
            *(f"  why     {line}" for line in self.place.why),
            f"  memory  {_mb(self.weight_bytes)} of weights, {_mb(memory.cache)} of cache, {_mb(memory.workspace)} to "
            f"compute in; {_mb(memory.free)} are free"
            + ("" if self.fits else ": this does not fit; hold fewer, lower --cache_mb or choose --quant_type"),
            f"  swarm   now {': '.join(health(self.copies))}",
            f"          then {': '.join(health(self.copies_then))}",
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        blocks, memory = self.place.blocks, self.memory
        return {
            "model": self.model.name,
            "digest": self.model.digest,
            "blocks": [blocks.start, blocks.stop],
            "num_blocks": self.num_blocks,
            "why": list(self.place.why),
            "dtype": self.dtype,
            "quant_type": self.quant_type,
            "device": self.device,
            "memory_bytes": {
                "weights": self.weight_bytes,
                "cache": memory.cache,
                "workspace": memory.workspace,
                "free": memory.free,
            },
            "fits": self.fits,
            "health": {"now": health(self.copies)[0], "then": health(self.copies_then)[0]},
            "copies": {"now": list(self.copies), "then": list(self.copies_then)},
        }


async def choose_place(directory: Directory, checkpoint: Checkpoint, model: ModelId, config: ServeConfig) -> Place:
    """The blocks to hold: those asked for, or as many as wanted (or fit) where the swarm is weakest.

    Raises:
        UserError: a range or number that the model does not have, or not even one block fits.
    """
    if config.blocks is not None:
        return Place(check_blocks(config.blocks, checkpoint), ("these blocks were asked for",))
    if config.num_blocks is not None:
        capacity, how_many = config.num_blocks, f"{config.num_blocks} blocks were asked for"
    else:
        capacity, how_many = await trio.to_thread.run_sync(capacity_of, checkpoint, config)
    if not 0 < capacity <= checkpoint.num_blocks:
        raise UserError(f"{checkpoint.name} has {checkpoint.num_blocks} blocks; {capacity} is not a number of them")
    records = await _servers(directory, model)
    # Before anything is loaded nothing is measured: an average server of this swarm is assumed.
    speeds = [record.inference_rps for record in records if record.inference_rps > 0]
    blocks = choose_blocks(records, checkpoint.num_blocks, capacity, statistics.mean(speeds) if speeds else 1.0)
    return Place(blocks, (how_many, _where(blocks, copies_of(records, checkpoint.num_blocks))))


async def plan_serving(
    directory: Directory, checkpoint: Checkpoint, model: ModelId, config: ServeConfig
) -> ServingPlan:
    """What serving would mean. Reads configuration and records, no weights; raises as `choose_place`."""
    place = await choose_place(directory, checkpoint, model, config)
    return ServingPlan(
        model=model,
        place=place,
        num_blocks=checkpoint.num_blocks,
        dtype=str(compute_dtype(config, checkpoint)).removeprefix("torch."),
        quant_type=config.quant_type,
        device=str(device_of(config)),
        memory=await trio.to_thread.run_sync(memory_of, checkpoint, config),
        copies=tuple(copies_of(await _servers(directory, model), checkpoint.num_blocks)),
    )


async def _servers(directory: Directory, model: ModelId) -> list[ServerRecord]:
    return [record for record in await directory.lookup(model) if record.state is not ServerState.OFFLINE]


def _where(blocks: range, copies: list[int]) -> str:
    if len(blocks) == len(copies):
        return "that is the whole model"
    empty = [block for block, count in enumerate(copies) if count == 0]
    if empty:
        weak = f"nobody holds {describe_blocks(empty)}"
    else:
        weakest = weakest_stretch(copies)
        weak = f"only {copies[weakest.start]} hold blocks {weakest.start}:{weakest.stop}"
    return f"blocks {blocks.start}:{blocks.stop} are where one more helps most: {weak}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
