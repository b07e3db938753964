"""Real routers: peers in network namespaces that this test makes, behind NAT of several kinds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.nat.lab import Lab, NoLab, sh
from tests.swarm.conftest import Truth
from tests.swarm.conftest import smollm as smollm  # a fixture

ROOT = Path(__file__).parents[2]
CHILD = [sys.executable, "-m", "tests.nat.child"]
pytestmark = pytest.mark.swarm


class Machine:
    """A process on a machine of the lab, and what it has said."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.said: list[dict[str, Any]] = []
        self._more = trio.Event()

    async def listen(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        async for piece in self.process.stdout:
            *lines, rest = (rest + piece).split(b"\n")
            self.said += [json.loads(line) for line in lines]
            self._more.set()
            self._more = trio.Event()

    async def until(self, true_of: Callable[[dict[str, Any]], object], within_s: float = 60) -> dict[str, Any]:
        """The first line, old or new, of which it is true."""
        with trio.fail_after(within_s):
            while True:
                for line in self.said:
                    if true_of(line):
                        return line
                await self._more.wait()


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    homes: dict[str, str] = request.param
    try:
        with Lab(homes, ("relay-a", "relay-b", "relay-c", "relay-d")) as lab:
            yield lab
    except NoLab as error:
        if os.environ.get("PETALS_NAT") == "required":
            raise
        pytest.skip(f"no network namespaces here ({error}); tests/transport/test_traversal.py has the loopback's share")


@pytest.fixture
async def start(lab: Lab, nursery: trio.Nursery) -> AsyncIterator[Callable[..., Any]]:
    machines: list[Machine] = []

    async def run(where: str, *words: str) -> Machine:
        command = [*lab.inside(where), *CHILD, *words]
        run = partial(trio.run_process, command, stdout=subprocess.PIPE, cwd=ROOT, check=False)
        machine = Machine(await nursery.start(run))
        nursery.start_soon(machine.listen)
        machines.append(machine)
        return machine

    yield run
    for machine in machines:
        machine.process.kill()


def circuits(line: dict[str, Any]) -> list[str]:
    return [addr for addr in line.get("addrs", ()) if "p2p-circuit" in addr]


@pytest.mark.parametrize("lab", [{"one": "port-restricted", "two": "port-restricted"}], indirect=True)
async def test_two_homes_meet_over_a_relay_and_then_without(lab: Lab, start: Callable[..., Any]) -> None:
    relay = await start("relay-a", "relay")
    (entry,) = (await relay.until(lambda line: "addrs" in line))["addrs"]
    server = await start("one", "server", entry)
    ways = circuits(await server.until(circuits))
    client = await start("two", "client", entry, *ways)
    await client.until(lambda line: line.get("link") == "relayed")
    await client.until(lambda line: line.get("link") == "punched" and "answers" in line)
    relay.process.send_signal(signal.SIGKILL)  # whom they need no longer
    count = max(line.get("answers", 0) for line in client.said)
    await client.until(lambda line: line.get("answers", 0) > count + 5)
    assert not [line for line in client.said if "lost" in line]


@pytest.mark.parametrize("lab", [{"one": "symmetric", "two": "symmetric"}], indirect=True)
async def test_homes_that_can_not_meet_stay_with_the_relay_and_change_it_when_it_dies(
    lab: Lab, start: Callable[..., Any]
) -> None:
    first = await start("relay-a", "relay")
    (entry,) = (await first.until(lambda line: "addrs" in line))["addrs"]
    second = await start("relay-b", "relay", entry)
    (other,) = (await second.until(lambda line: "addrs" in line))["addrs"]
    server = await start("one", "server", entry, other)
    ways = circuits(await server.until(lambda line: len(circuits(line)) == 2))
    ways.sort(key=lambda way: entry not in way)
    client = await start("two", "client", other, *ways)
    await client.until(lambda line: line.get("answers", 0) >= 3)
    assert {line["link"] for line in client.said if line.get("link")} == {"relayed"}
    before = max(line.get("answers", 0) for line in client.said)
    first.process.send_signal(signal.SIGKILL)
    await client.until(lambda line: line.get("answers", 0) > before + 3)
    await server.until(lambda line: len(circuits(line)) == 1 and entry not in circuits(line)[0])
    assert "punched" not in {line.get("link") for line in client.said}


@pytest.mark.parametrize("lab", [{"one": "full-cone"}], indirect=True)
async def test_a_forwarded_port_is_found_and_announced(lab: Lab, start: Callable[..., Any]) -> None:
    relay = await start("relay-a", "relay")
    (entry,) = (await relay.until(lambda line: "addrs" in line))["addrs"]
    server = await start("one", "server", entry)
    found = await server.until(lambda line: line.get("reach") == "mapped")
    assert [addr for addr in found["addrs"] if addr.startswith("/ip4/1.0.0.21/tcp/4001/")]
    client = await start("relay-b", "client", entry, *[addr for addr in found["addrs"] if "1.0.0.21" in addr])
    await client.until(lambda line: "answers" in line and line["link"] == "direct")


TABLES = """
table inet filter {
    chain miniupnpd {}
    chain prerouting_miniupnpd {}
    chain postrouting_miniupnpd {}
    chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
    chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
}
add rule ip home through ct status dnat accept
"""
"""Where miniupnpd writes its rules; and a router lets in what it has redirected."""
ROUTERS = {
    "ours": lambda _: [sys.executable, "-m", "tests.nat.igd", "192.168.1.1", "1.0.0.21"],
    "miniupnpd": lambda folder: ["miniupnpd", "-d", "-f", str(_miniupnpd(folder)), "-P", str(folder / "pid")],
}


def _miniupnpd(folder: Path) -> Path:
    """What many routers run."""
    if shutil.which("miniupnpd") is None:
        pytest.skip("miniupnpd is not installed")
    path = folder / "miniupnpd.conf"
    path.write_text(
        "ext_ifname=out\next_ip=1.0.0.21\nlistening_ip=in\nenable_upnp=yes\nenable_natpmp=no\nsecure_mode=yes\n"
        "uuid=b239204f-314d-43de-ab43-0b94919bb453\nallow 1024-65535 0.0.0.0/0 1024-65535\n"
    )
    return path


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("lab", [{"one": "port-restricted"}], indirect=True)
async def test_a_router_opens_a_port_when_asked(
    lab: Lab, start: Callable[..., Any], nursery: trio.Nursery, kind: str, tmp_path: Path
) -> None:
    relay = await start("relay-a", "relay")
    (entry,) = (await relay.until(lambda line: "addrs" in line))["addrs"]
    command = [*lab.inside("router-one"), *ROUTERS[kind](tmp_path)]
    if kind == "miniupnpd":
        sh(*lab.inside("router-one"), "nft", "-f", "-", stdin=TABLES)
    run = partial(
        trio.run_process, command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, check=False
    )
    router: trio.Process = await nursery.start(run)
    server = await start("one", "upnp-server", entry)
    found = await server.until(lambda line: line.get("reach") == "mapped")
    (outside,) = [addr for addr in found["addrs"] if addr.startswith("/ip4/1.0.0.21/tcp/4001/")]
    client = await start("relay-b", "client", entry, outside)
    await client.until(lambda line: "answers" in line and line["link"] == "direct")
    router.kill()


def petals(lab: Lab, where: str, *words: str) -> list[str]:
    return [*lab.inside(where), sys.executable, "-m", "petals.cli.main", *words]


@pytest.mark.parametrize("lab", [{"one": "symmetric", "two": "symmetric"}], indirect=True)
async def test_a_private_server_serves_a_private_client_and_the_relay_dies_in_the_middle(
    lab: Lab, start: Callable[..., Any], nursery: trio.Nursery, smollm: Truth
) -> None:
    relays = {}
    entry: tuple[str, ...] = ()
    for where in ("relay-a", "relay-b"):
        relay = await start(where, "relay", *entry)
        addr = (await relay.until(lambda line: "addrs" in line))["addrs"][0]
        relays[addr.rpartition("/p2p/")[2]] = relay
        entry = entry or (addr,)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PETALS_LISTEN": "/ip4/0.0.0.0/tcp/4001"}
    serve = petals(lab, "one", "peer", "--serve", "0:30", "--throughput", "100", "--no_mdns", "--initial_peers", *entry)
    run = partial(trio.run_process, stdin=subprocess.DEVNULL, cwd=ROOT, check=False, env=environment)
    server: trio.Process = await nursery.start(partial(run, serve, stdout=subprocess.DEVNULL))
    look = petals(lab, "relay-a", "status", "--json", "--initial_peers", *entry)
    circuits: list[str] = []
    with trio.fail_after(90):
        while len(circuits) < 2:  # the server has its places once the record says so
            done = await run(look, capture_stdout=True, stderr=subprocess.DEVNULL)
            models = json.loads(done.stdout)["models"] if done.stdout else []
            circuits = [addr for model in models for addr in model["peers"][0]["addrs"] if "p2p-circuit" in addr]
    asking = petals(
        lab, "two", "peer", "--generate", "A cat sat on", "--max_new_tokens", "32", "--initial_peers", *entry
    )
    client: trio.Process = await nursery.start(partial(run, [*asking, "--no_mdns"], stdout=subprocess.PIPE))
    assert client.stdout is not None
    said = b""
    while piece := await client.stdout.receive_some():
        if not said:  # the first circuit in the list is tried first
            relays[circuits[0].partition("/p2p-circuit")[0].rpartition("/p2p/")[2]].process.send_signal(signal.SIGKILL)
        said += piece
    server.send_signal(signal.SIGKILL)
    inputs = smollm.tokenizer("A cat sat on", return_tensors="pt")
    expected = smollm.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert said.decode().strip() == smollm.tokenizer.decode(expected[0], skip_special_tokens=True).strip()


def as_on_the_page(lab: Lab, where: str, index: int) -> list[str]:
    page = (ROOT / "docs" / "nat.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("petals ")]
    return petals(lab, where, *shlex.split(lines[index])[1:])


@pytest.mark.parametrize("lab", [{}], indirect=True)
async def test_two_commands_without_an_address_make_a_swarm(lab: Lab, nursery: trio.Nursery, smollm: Truth) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PETALS_LISTEN": "", "PETALS_THROUGHPUT": "100"}
    run = partial(trio.run_process, stdin=subprocess.DEVNULL, cwd=ROOT, check=False, env=environment)
    serve = [*as_on_the_page(lab, "relay-a", 0), "--json"]
    server: trio.Process = await nursery.start(partial(run, serve, stdout=subprocess.PIPE))
    assert server.stdout is not None
    assert b"addrs" in await server.stdout.receive_some()  # it serves
    done = await run(as_on_the_page(lab, "relay-b", 1), capture_stdout=True)
    server.send_signal(signal.SIGKILL)
    inputs = smollm.tokenizer("A cat sat on", return_tensors="pt")
    expected = smollm.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert done.stdout.decode().strip() == smollm.tokenizer.decode(expected[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("lab", [{}], indirect=True)
async def test_neighbours_of_one_swarm_find_each_other_and_no_others(lab: Lab, start: Callable[..., Any]) -> None:
    other = await start("relay-c", "neighbour", "theirs")
    one = await start("relay-a", "neighbour", "ours")
    two = await start("relay-b", "neighbour", "ours")
    name = (await one.until(lambda line: "peer_id" in line))["peer_id"]
    await two.until(lambda line: line.get("neighbours") == [name])
    await other.until(lambda line: "peer_id" in line)
    third = await start(
        "relay-d", "neighbour", "theirs"
    )  # when these two have met, the strangers had their chance, too
    theirs = (await other.until(lambda line: "peer_id" in line))["peer_id"]
    await third.until(lambda line: line.get("neighbours") == [theirs])
    assert all(line.get("neighbours", [name]) == [name] for line in two.said)
