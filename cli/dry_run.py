"""`petals peer --dry_run`: what the command would do without it. No weights are read, nobody is asked to compute."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from petals.protocols.errors import MissingBlocks, describe_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from petals.peer.base.config import PeerConfig
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.client.routing.routing import RouteChoice
    from petals.peer.node import Peer
    from petals.peer.server.serving_plan import ServingPlan


async def show_plan(
    config: PeerConfig, client: ClientOptions | None, tokens: int, say: Callable[[str], None], *, as_json: bool
) -> None:
    """Print what would be held (`config.serve`) and who would be asked (`client`; None: nobody).

    Joins the swarm under a name of its own, listening on loopback only: a peer with the same key or port may be
    running, or be about to.

    Args:
        tokens: room that each server must have for the session.
    Raises:
        UserError, MissingBlocks: as without --dry_run.
    """
    from petals.peer.base.config import NatConfig, PeerConfig
    from petals.peer.node import open_peer

    looking = replace(config, serve=None, identity=None, listen=PeerConfig().listen, announce=(), nat=NatConfig())
    async with open_peer(looking, progress=say) as peer:
        plan = None if config.serve is None else await peer.plan(config.serve)
        route = None if client is None else await _route(peer, client, tokens, plan)
    found: dict[str, Any] = {}
    lines = []
    if plan is not None:
        found["serve"] = plan.as_json()
        lines.append(plan.describe())
    if route is not None:
        found["ask"] = route.as_json()
        lines.append(route.describe())
    print(json.dumps(found) if as_json else "\n".join(lines), flush=True)


async def _route(peer: Peer, options: ClientOptions, tokens: int, plan: ServingPlan | None) -> _Asking:
    client = await peer.client()
    if plan is None:
        await client.ready()
    try:
        return _Asking(client.expected_route(tokens, options), (), ())
    except MissingBlocks as missing:
        if plan is None:
            raise
        brought = [block for block in missing.blocks if block in plan.place.blocks]
        return _Asking(None, tuple(brought), tuple(block for block in missing.blocks if block not in brought))


@dataclass(frozen=True, slots=True)
class _Asking:
    choice: RouteChoice | None
    """As if this peer served nothing itself; None: then there is no route."""
    brought: tuple[int, ...]
    """Blocks that nobody else holds, and this peer would."""
    missing: tuple[int, ...]
    """Blocks that nobody would hold."""

    def describe(self) -> str:
        """For people."""
        if self.choice is None:
            lines = [f"would compute {describe_blocks(self.brought)} by itself: nobody else holds them"] * bool(
                self.brought
            )
            lines += [f"would find nobody for {describe_blocks(self.missing)}"] * bool(self.missing)
            return "\n".join(lines)
        route = self.choice.route
        asked = f"would ask {route.describe()}; {1e3 * route.expected_s:.1f} ms a token expected"
        return "\n".join([asked, *(f"  not {each.describe()}" for each in self.choice.skipped)])

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        known = {"expected_route": None, "skipped": []} if self.choice is None else self.choice.as_json()
        return {**known, "brought": list(self.brought), "missing": list(self.missing)}
