"""The swarm in a terminal: what `petals status` is told, as text that fits the width there is. Pure.

It is told JSON, its own (peer/membership/observer.py) or that of a peer's swarm page (gateway/swarm.py), which has
more. Names, versions and models are strangers' words: whatever a terminal would obey is taken out of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from petals.cli.status.plots import bars, figure

Told = Mapping[str, Any]

PLOT_WIDTH = 72
"""Where no terminal says how wide it is."""
MAX_PLOT_WIDTH = 120
RATES = ("generated_per_s", "prompt_per_s")
"""Of the series, those that are drawn higher where there is room; the others are small counts."""
MAX_ROUND_TRIPS = 8
SHORT = 6
"""Characters at the end of a peer ID that tell peers apart."""
COLOURS = {"healthy": "\x1b[32m", "degraded": "\x1b[33m", "broken": "\x1b[31m"}
PLAIN = "\x1b[0m"
SERIES = (
    ("generated_per_s", "tokens generated per second"),
    ("prompt_per_s", "prompt tokens per second"),
    ("answers", "answers at once"),
    ("sessions", "sessions served to others and itself"),
)


def picture(told: Told, *, width: int | None = None, plot_height: int = 1, bright: bool = False) -> str:
    """All of it.

    Args:
        width: of the terminal; None: there is none, and lines may be as long as they like.
        plot_height: lines of a plot.
        bright: the terminal knows colours.
    """
    ourselves = told.get("peer_id")
    parts = [] if ourselves is None else [f"as peer {short(ourselves)} sees it"]
    parts += [describe(model, ourselves=ourselves, width=width, bright=bright) for model in told.get("models", ())]
    parts += [f"warning: {line}" for line in warnings(told)]
    if "history" in told:
        serves = any(peer["peer_id"] == told["peer_id"] for model in told["models"] for peer in model["peers"])
        parts.append(throughput(told["history"], serves=serves, width=width, height=plot_height))
    if "contribution" in told:
        parts.append(balance(told["contribution"]))
    return "\n\n".join(parts)


def warnings(told: Told) -> list[str]:
    """What people should hear of: what the asked peer says, and which servers' keys are used twice."""
    peers = [peer for model in told.get("models", ()) for peer in model["peers"]]
    doubles = {clean(peer["peer_id"]) for peer in peers if peer.get("key_elsewhere")}
    return [
        *("".join(char for char in str(line)[:500] if char.isprintable()) for line in told.get("warnings", ())),
        *(
            f"two processes announce with the key of peer {short(peer_id)}, and only one of them is seen: give each "
            "its own --identity"
            for peer_id in sorted(doubles)
        ),
    ]


def describe(model: Told, *, ourselves: str | None = None, width: int | None = None, bright: bool = False) -> str:
    """One model's swarm. `ourselves`: the peer that tells of it, where that is not us."""
    state = clean(model["health"])
    lines = folded([f"{clean(model['model'])}: {state},", *clean(model["words"]).split()], width, between=" ")
    if bright and state in COLOURS:  # after folding: colours take no room
        lines[0] = lines[0].replace(f": {state},", f": {COLOURS[state]}{state}{PLAIN},", 1)
    lines += _copies(model["copies"], width)
    peers = sorted(model["peers"], key=lambda peer: (peer["blocks"], peer["peer_id"]))
    lines += _table(peers, width)
    lines += _round_trips(peers, ourselves, width)
    if "sessions" in model:
        lines += _routes(model["sessions"], ourselves, width)
    return "\n".join(lines)


def throughput(history: Told, *, serves: bool, width: int | None = None, height: int = 1) -> str:
    """What the asked peer did over time; `serves`: for others, too."""
    samples, period_s = history["samples"], history["period_s"]
    if not samples:
        return f"throughput of this peer: not known yet, it is measured every {period_s:g} s"
    columns = max(1, PLOT_WIDTH if width is None else min(MAX_PLOT_WIDTH, width - 4))
    lines = [f"throughput of this peer over the last {_span(len(samples) * period_s)}, oldest on the left"]
    for name, title in SERIES:
        values = [float(each[name]) for each in samples]
        if name == "sessions" and not serves:
            continue
        if not any(values):
            lines.append(f"  {title}: none")
            continue
        lines.append(f"  {title}: now {figure(values[-1])}, at most {figure(max(values))}")
        lines += [f"  {line}".rstrip() for line in bars(values, columns, height if name in RATES else 1)]
    return "\n".join(lines)


def balance(contribution: Told) -> str:
    """What a peer gave and took."""
    lines = [f"given {contribution['given']:,} block-tokens, taken {contribution['taken']:,}"]
    if contribution["peers"]:
        lines.append(f"{'peer':<9} {'gave us':>15} {'got from us':>15} {'balance':>15} {'weight':>7}")
    lines += [
        f"{short(peer['peer_id']):<9} {peer['taken']:>15,} {peer['given']:>15,} {peer['balance']:>15,} "
        f"{peer['weight']:>7.1f}"
        for peer in contribution["peers"]
    ]
    return "\n".join(lines)


def legs(route: Iterable[Told], ourselves: str | None = None) -> list[str]:
    """Each server on a route: its blocks, its name, the last step's round trip."""
    return [
        f"{hop['blocks'][0]}:{hop['blocks'][1]} "
        + ("by itself" if hop["peer_id"] == ourselves else f"via {short(hop['peer_id'])}")
        + f" ({1e3 * hop['round_trip_s']:.1f} ms)"
        for hop in route
    ]


def clean(text: object) -> str:
    """A stranger's words without what a terminal would obey."""
    return "".join(char for char in str(text)[:200] if char.isprintable())


def short(peer_id: object) -> str:
    return f"…{clean(peer_id)[-SHORT:]}"


def folded(words: Sequence[str], width: int | None, *, between: str, indent: str = "    ") -> list[str]:
    """The words as few lines as the width allows, each line after the first indented; no word is cut."""
    lines = [words[0]]
    for word in words[1:]:
        longer = lines[-1] + between + word
        if width is None or len(longer) <= width:
            lines[-1] = longer
        else:
            lines[-1] += between.rstrip()
            lines.append(indent + word)
    return lines


def _copies(copies: Sequence[int], width: int | None) -> list[str]:
    digits = "".join(str(min(each, 9)) for each in copies)
    head = f"blocks 0:{len(copies)}, copies of each:"
    if width is None or len(head) + 1 + len(digits) <= width:
        return [f"{head} {digits}"]
    tens = [digits[start : start + 10] for start in range(0, len(digits), 10)]
    row = max(1, (width - 6) // 11)
    return [head, *(f"{10 * at:>5} {' '.join(tens[at : at + row])}" for at in range(0, len(tens), row))]


def _table(peers: Sequence[Told], width: int | None) -> list[str]:
    """Columns are as wide as what stands in them; where the terminal is narrower still, names are cut."""
    told: dict[str, list[str]] = {
        "blocks": [f"{peer['blocks'][0]}:{peer['blocks'][1]}" for peer in peers],
        "peer": [short(peer["peer_id"]) for peer in peers],
        "state": ["avoided" if peer.get("banned_s", 0) > 0 else clean(peer["state"]) for peer in peers],
        "blocks/s": [f"{peer['decode_blocks_per_s']:,.0f}" for peer in peers],
        "queue ms": [f"{1e3 * peer['queue_s']:.1f}" for peer in peers],
        "cache": [_tokens(peer["cache_tokens_left"]) for peer in peers],
        "reach": [clean(peer["reachability"])[:8] for peer in peers],
        "link": [clean(peer["link"]) for peer in peers],
        "version": [clean(peer["version"])[:12] for peer in peers],
        "name": [clean(peer["name"]) for peer in peers],
    }
    told = {title: column for title, column in told.items() if any(column) or title in ("blocks", "peer")}
    right = {"blocks", "blocks/s", "queue ms", "cache"}
    rows = list(zip(*([title, *column] for title, column in told.items()), strict=True))
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if width is None or sum(sizes[:9]) + 2 * len(sizes) <= width else " "
    lines = [
        gap.join(
            cell.rjust(size) if title in right else cell.ljust(size)
            for title, cell, size in zip(told, row, sizes, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [line if width is None or len(line) <= width else line[: width - 1] + "…" for line in lines]


def _tokens(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1e3:,.0f}k"


def _round_trips(peers: Sequence[Told], ourselves: str | None, width: int | None) -> list[str]:
    """What we measured, where we are told, and servers to those that hold the blocks after theirs, nearest first; peers
    that are not shown are left out."""
    shown = {peer["peer_id"] for peer in peers}
    ours = {
        peer["peer_id"]: peer["round_trip_s"]
        for peer in peers
        if peer.get("round_trip_s") is not None and peer["peer_id"] != ourselves
    }
    rows = [("this peer", ours), *((short(peer["peer_id"]), peer["round_trips_s"]) for peer in peers)]
    lines = []
    for name, measured in rows:
        near = sorted(((to, seconds) for to, seconds in measured.items() if to in shown), key=lambda each: each[1])
        told = [f"{short(to)} {1e3 * seconds:.1f} ms" for to, seconds in near[:MAX_ROUND_TRIPS]]
        if told:
            lines += folded([f"round trips from {name} to {told[0]}", *told[1:]], width, between=", ")
    return lines


def _routes(sessions: Sequence[Told], ourselves: str | None, width: int | None) -> list[str]:
    if not sessions:
        return ["routes now: nobody asks through this peer"]
    lines = [f"routes now ({len(sessions)}):"]
    for session in sessions:
        said = f"  {session['tokens']} tokens, {session['tokens_per_s']:.1f} tokens/s"
        if not session["tokens"]:
            said = "  reads its prompt"
        hops = legs(session["route"], ourselves)
        lines += folded([f"{said}: {hops[0]}", *hops[1:]] if hops else [said], width, between=" => ")
    return lines


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
