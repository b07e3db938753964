"""What `petals doctor` looks at. Each check is a function that tells what it found, and what to do about a problem.

A new check is a function in `MACHINE` (needs nobody) or in `SWARM` (needs a host that has reached somebody). They are
imported as little as possible before they run: a package that is broken must not keep the others from being looked at.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from petals import __version__
from petals.protocols.errors import PeerUnreachable, RemoteError, SwarmError, UserError
from petals.protocols.types import ModelId, PeerId

if TYPE_CHECKING:
    from petals.dht.directory import Directory
    from petals.peer.net.host import Host
    from petals.protocols import messages_pb2 as pb

DISTRIBUTION = "petals-libp2p"
LEAST_MEMORY_BYTES = 1.5e9
"""The default cache and something to compute in."""
LEAST_DISK_BYTES = 1e9
"""The default model, fetched and converted."""
DISK_SAMPLE_BYTES = 64 << 20
SLOW_MEMORY_GB = 3.0
"""Below this even a small model crawls."""
ANY_MODEL = ModelId("", "")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    check: str
    state: Literal["ok", "note", "problem"]
    text: str
    advice: str = ""
    """What to do, where something should be done."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same for machines."""


Tell = Callable[[Finding], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined."""

    listen: tuple[str, ...]
    initial_peers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Member:
    """A place in the swarm to look from."""

    host: Host
    """Listens as a peer here would, where that is possible."""
    directory: Directory
    peers: tuple[PeerId, ...]
    """Initial peers that were reached."""


async def examine(subject: Subject, tell: Tell) -> None:
    """Run every check. Nothing a check meets ends the others."""
    for check in MACHINE:
        await _guarded(check.__name__, partial(check, subject, tell), tell)
    if subject.initial_peers:
        await _guarded("swarm", partial(_examine_swarm, subject, tell), tell)


async def _guarded(name: str, check: Callable[[], Awaitable[None]], tell: Tell) -> None:
    try:
        await check()
    except ImportError as error:
        tell(Finding(name, "problem", f"a package is broken: {error}", f"pip install --force-reinstall {DISTRIBUTION}"))
    except (SwarmError, OSError) as error:
        tell(Finding(name, "problem", " ".join(str(error).split())))


# -- this machine --------------------------------------------------------------------------------------------------


async def packages(subject: Subject, tell: Tell) -> None:
    """Python and everything we are built on, against the ranges we were tested with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    pythons, wanted = _requirements()
    version = platform.python_version()
    state: Literal["ok", "problem"] = "ok" if SpecifierSet(pythons).contains(version) else "problem"
    advice = "" if state == "ok" else f"install Python {pythons}"
    tell(Finding("python", state, f"{version} (wanted: {pythons}), petals {__version__}", advice, {"version": version}))
    found: dict[str, str | None] = {}
    wrong = 0
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found[requirement.name] = None
            text = f"{requirement.name} is missing"
        else:
            if requirement.specifier.contains(installed, prereleases=True):
                continue
            text = f"{requirement.name} is {installed}, wanted: {requirement.specifier}"
        wrong += 1
        tell(Finding("packages", "problem", text, f'pip install "{requirement.name}{requirement.specifier}"'))
    shown = ("torch", "transformers", "libp2p", "trio")
    text = ", ".join(f"{name} {found[name]}" for name in shown if found.get(name))
    text += f", and {max(0, len(found) - len(shown))} others"
    tell(Finding("packages", "note" if wrong else "ok", text, figures={"versions": found}))


def _requirements() -> tuple[str, list[str]]:
    """Range of Pythons, and requirements: of the installed package, else of the clone we run from."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
        return project["requires-python"], project["dependencies"]
    return metadata["Requires-Python"], importlib.metadata.requires(DISTRIBUTION) or []


async def device(subject: Subject, tell: Tell) -> None:
    """What computes, and how fast it reads weights."""
    text, cuda, read_gb_s = await trio.to_thread.run_sync(_measure_device)
    figures = {"device": text, "memory_read_gb_s": read_gb_s}
    if not cuda and shutil.which("nvidia-smi"):
        advice = "install a torch with CUDA: https://pytorch.org/get-started"
        tell(Finding("device", "problem", f"torch computes on {text}, though a GPU's driver is here", advice, figures))
    else:
        tell(Finding("device", "ok", f"torch computes on {text}", figures=figures))
    speed = f"weights are read from memory at {read_gb_s:.1f} GB/s; a token reads each of them once"
    if read_gb_s < SLOW_MEMORY_GB:
        advice = "look for other programs at work, for OMP_NUM_THREADS=1, for a power-saving mode"
        tell(Finding("memory speed", "note", speed, advice, figures))
    else:
        tell(Finding("memory speed", "ok", speed, figures=figures))


def _measure_device() -> tuple[str, bool, float]:
    from petals.models.kernels.machine import describe_device, gigabytes, has_gpu

    return describe_device(), has_gpu(), gigabytes(1024, total=256 << 20, rounds=4)


async def memory(subject: Subject, tell: Tell) -> None:
    """Whether there is room for a cache and blocks."""
    free, total = await trio.to_thread.run_sync(_measure_memory)
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
    figures = {"free_bytes": free, "total_bytes": total}
    if free < LEAST_MEMORY_BYTES:
        advice = "close other programs, or serve with a smaller --cache_mb and --num_blocks"
        tell(Finding("memory", "problem", text, advice, figures))
    else:
        tell(Finding("memory", "ok", text, figures=figures))


def _measure_memory() -> tuple[int, int]:
    import psutil

    from petals.peer.server.memory import free_host_bytes

    return free_host_bytes(), psutil.virtual_memory().total


async def disk(subject: Subject, tell: Tell) -> None:
    """Where converted models live: writable, room, speed."""
    from petals.models.source.disk import cache_directory

    directory = cache_directory()
    elsewhere = "choose another directory with PETALS_CACHE=DIR"
    try:
        free, write_mb_s, read_mb_s = await trio.to_thread.run_sync(_measure_disk, directory)
    except OSError as error:
        text = f"{directory} cannot be written: {error.strerror or error}"
        tell(Finding("disk", "problem", text, elsewhere, {"directory": str(directory)}))
        return
    speed = f"writes {write_mb_s:,.0f} MB/s" + (f", reads {read_mb_s:,.0f} MB/s" if read_mb_s else "")
    figures = {
        "directory": str(directory),
        "free_bytes": free,
        "write_mb_s": write_mb_s,
        "read_mb_s": read_mb_s,
    }
    text = f"{free / 1e9:.1f} GB are free in {directory}; it {speed}"
    if free < LEAST_DISK_BYTES:
        tell(Finding("disk", "problem", text, f"make room, or {elsewhere}", figures))
    else:
        tell(Finding("disk", "ok", text, figures=figures))


def _measure_disk(directory: Path) -> tuple[int, float, float | None]:
    """Free bytes, and MB/s of writing and of reading (None: the system would answer from its own cache)."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    piece = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(DISK_SAMPLE_BYTES // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
        written = time.perf_counter()
        if not hasattr(os, "posix_fadvise"):
            return free, DISK_SAMPLE_BYTES / (written - started) / 1e6, None
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(1 << 20):
            pass
        read_s = time.perf_counter() - began
    return free, DISK_SAMPLE_BYTES / (written - started) / 1e6, DISK_SAMPLE_BYTES / read_s / 1e6


async def listening(subject: Subject, tell: Tell) -> None:
    """Whether the ports are ours to open."""
    from petals.peer.base.identity import create_identity
    from petals.peer.net.host import HostConfig, open_host

    for addr in subject.listen:
        try:
            async with open_host(create_identity().key_pair, HostConfig(listen=(addr,))) as host:
                shown = ", ".join(each.partition("/p2p/")[0] for each in host.addrs)
        except UserError as error:
            advice = "choose another port with --listen, or end the program that has it"
            tell(Finding("listening", "problem", str(error), advice, {"addr": addr}))
        else:
            tell(Finding("listening", "ok", f"can listen on {shown}", figures={"addr": addr}))
    if all(addr.startswith(("/ip4/127.", "/ip6/::1/")) for addr in subject.listen):
        advice = "with --listen /ip4/0.0.0.0/tcp/31337 other machines can reach a peer here"
        tell(Finding("listening", "note", "only programs on this machine reach these addresses", advice))


MACHINE: tuple[Callable[[Subject, Tell], Awaitable[None]], ...] = (packages, device, memory, disk, listening)


# -- the swarm -----------------------------------------------------------------------------------------------------


async def _examine_swarm(subject: Subject, tell: Tell) -> None:
    from petals.dht.directory import open_directory
    from petals.peer.base.identity import create_identity, verify
    from petals.peer.membership.record_exchange import fetch_record
    from petals.peer.net.host import HostConfig, open_host

    identity = create_identity()
    async with AsyncExitStack() as stack:
        try:
            host = await stack.enter_async_context(open_host(identity.key_pair, HostConfig(listen=subject.listen)))
        except UserError:  # `listening` has said so
            host = await stack.enter_async_context(open_host(identity.key_pair, HostConfig(listen=())))
        reached = [peer for addr in subject.initial_peers if (peer := await _initial_peer(host, addr, tell))]
        if not reached:
            return
        fetch = partial(fetch_record, host)
        directory = await stack.enter_async_context(open_directory(host, identity, verify, fetch_direct=fetch))
        member = Member(host, directory, tuple(reached))
        for check in SWARM:
            await _guarded(check.__name__, partial(check, member, tell), tell)


async def _initial_peer(host: Host, addr: str, tell: Tell) -> PeerId | None:
    """One initial peer: name, connection, round trip, protocols, clock."""
    from petals.peer.membership.record_exchange import fetch_info

    parts = addr.split("/")
    if parts[1:2] and parts[1].startswith("dns") and len(parts) > 2:
        try:
            found = await trio.socket.getaddrinfo(parts[2], None, type=socket.SOCK_STREAM)
        except OSError as error:
            text = f"the name {parts[2]} cannot be resolved: {error.strerror or error}"
            tell(Finding("initial peer", "problem", text, "check its spelling and this machine's DNS", {"addr": addr}))
            return None
        ips = ", ".join(sorted({str(each[4][0]) for each in found}))
        tell(Finding("initial peer", "ok", f"{parts[2]} is {ips}", figures={"addr": addr}))
    try:
        peer_id = await host.connect(addr)
        round_trip_s = await host.ping(peer_id)
    except UserError as error:
        tell(Finding("initial peer", "problem", str(error), "copy the whole line that the peer prints", {"addr": addr}))
        return None
    except RemoteError as error:
        advice = _advice_for(str(error))
        tell(Finding("initial peer", "problem", str(error), advice, {"addr": addr}))
        return None
    figures: dict[str, Any] = {"addr": addr, "peer_id": peer_id, "round_trip_s": round_trip_s}
    name = f"…{peer_id[-6:]}"
    asked_at = time.time()
    try:
        reply = await fetch_info(host, peer_id, (), ANY_MODEL)
    except PeerUnreachable as error:
        tell(Finding("initial peer", "problem", str(error), "it may be busy or frozen: look at its own log", figures))
        return None
    except RemoteError as error:
        text = f"{addr} is a libp2p peer that does not speak our protocols: {error}"
        tell(Finding("initial peer", "problem", text, "give the address of a Petals peer", figures))
        return None
    answered_at = time.time()
    serves = "serves blocks" if reply.records else "keeps the directory"
    text = f"{addr} answers in {1e3 * round_trip_s:.1f} ms, {serves}, petals {printable(reply.version)}"
    if reply.version == __version__:
        tell(Finding("initial peer", "ok", text, figures={**figures, "version": reply.version}))
    else:
        text += f", here it is {__version__}"
        advice = "other versions work together as far as protocols/SPEC.md says; update the older one in doubt"
        tell(Finding("initial peer", "note", text, advice, {**figures, "version": reply.version}))
    _clock(name, reply, asked_at, answered_at, tell)
    return peer_id


def _advice_for(reason: str) -> str:
    if "refused" in reason:
        return "nothing listens on that port: start the peer, or check the port"
    if "handshake" in reason:
        return "somebody else answers there, or wants another swarm key: check the peer ID at the end of the address"
    return "check the address, that machine's firewall, and that the peer is running"


def _clock(name: str, reply: pb.InfoReply, asked_at: float, answered_at: float, tell: Tell) -> None:
    """The reply was dated between question and answer, by the peer's clock."""
    from petals.peer.membership.clocks import MAX_SKEW_S, skew_of

    skew = skew_of(reply, asked_at, answered_at)
    if skew is None:
        return
    figures = {"ahead_s": skew.ahead_s, "exact_s": skew.exact_s}
    how = "ahead of" if skew.ahead_s > 0 else "behind"
    text = f"the clock of {name} is {abs(skew.ahead_s):.2f} s {how} ours, give or take {skew.exact_s:.2f} s"
    if abs(skew.ahead_s) > MAX_SKEW_S + skew.exact_s:
        advice = "let both clocks follow NTP (timedatectl set-ntp true): records from the future are refused"
        tell(Finding("clock", "problem", text, advice, figures))
    else:
        tell(Finding("clock", "ok", text, figures=figures))


def printable(text: str, *, most: int = 100) -> str:
    """A stranger's words for somebody's terminal."""
    return "".join(char for char in text if char.isprintable())[:most]


async def models(member: Member, tell: Tell) -> None:
    """Whether somebody could ask: each model of the swarm."""
    from petals.peer.membership.observer import SwarmObserver

    observer = SwarmObserver(member.host, member.directory)
    try:
        found = await observer.look()
    except UserError as error:
        tell(Finding("model", "note", str(error), "start a server: petals peer MODEL --serve --initial_peers ..."))
        return
    for status in found:
        state, why = status.health
        weakest = status.weakest
        advice = f"start a server: petals peer {printable(status.model.name)} --serve {weakest.start}:{weakest.stop}"
        kind: Literal["ok", "note", "problem"] = (
            "ok" if state == "healthy" else "note" if state == "degraded" else "problem"
        )
        text = f"{printable(status.model.name)} is {state}: {why}"
        figures = {"model": status.model.name, "health": state}
        tell(Finding("model", kind, text, "" if kind == "ok" else advice, figures))
        for record in status.records:
            if record.key_elsewhere:
                text = (
                    f"two processes announce with the key of peer …{record.peer_id[-6:]}, and only one of them is seen"
                )
                tell(Finding("keys", "problem", text, "give each process its own --identity"))
    for warning in observer.warnings():
        tell(Finding("records", "problem", printable(warning, most=500)))


async def reachable(member: Member, tell: Tell) -> None:
    """Whether others can dial a peer that listens here, as one of them says who tried."""
    addrs = member.host.addrs
    for peer in member.peers if addrs else ():
        try:
            dialled = await member.host.traversal.ask_dial_back(peer, addrs)
        except SwarmError:  # it may not dial back
            continue
        if dialled:
            tell(Finding("reachable", "ok", f"peer …{peer[-6:]} could dial a peer that listens here"))
        else:
            advice = "nothing, as a rule: relays hand calls on (docs/nat.md); a port forwarded to --listen is faster"
            tell(Finding("reachable", "note", f"peer …{peer[-6:]} could not dial a peer that listens here", advice))
        return
    tell(Finding("reachable", "note", "no initial peer could say whether others can dial a peer that listens here"))


SWARM: tuple[Callable[[Member, Tell], Awaitable[None]], ...] = (reachable, models)
