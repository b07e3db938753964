"""A small internet of network namespaces, made and unmade by the test: public machines, and homes behind routers.

                        the internet, 1.0.0.0/24
      +--------------+--------------+--------------+
      1.0.0.10       1.0.0.11       1.0.0.21       1.0.0.22
      relay a        relay b        router one     router two
                                    192.168.1.1    192.168.2.1
                                    home one       home two

Nothing of it is connected to the machine's own network. Needs root, `ip` and `nft`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

KINDS = {
    "port-restricted": "masquerade",
    "symmetric": "masquerade fully-random",
    "full-cone": "masquerade",
}
"""What a router does with packets that leave; the full cone also hands on whatever comes in for the peer's port."""
PEER_PORT = 4001


class NoLab(Exception):
    """Why there can be no namespaces here."""


def sh(*words: str, stdin: str | None = None) -> None:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        kind = NoLab if "not permitted" in done.stderr or "Permission denied" in done.stderr else RuntimeError
        raise kind(f"{' '.join(words)}: {done.stderr.strip()}")


class Lab:
    """Use as a context manager. `homes`: name of each home -> the kind of its router."""

    def __init__(self, homes: dict[str, str], public: tuple[str, ...]) -> None:
        self._tag = f"petals{os.getpid()}"
        self._homes, self._public = homes, public
        self._spaces: list[str] = []

    def __enter__(self) -> Lab:
        for tool in ("ip", "nft"):
            if shutil.which(tool) is None:
                raise NoLab(f"{tool} is not installed")
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def inside(self, name: str) -> list[str]:
        """What to put in front of a command that is to run on that machine."""
        return ["ip", "netns", "exec", self._space(name)]

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _add(self, name: str) -> None:
        sh("ip", "netns", "add", self._space(name))
        self._spaces.append(self._space(name))
        sh(*self.inside(name), "ip", "link", "set", "lo", "up")

    def _wire(self, one: str, end: str, other: str, other_end: str) -> None:
        sh("ip", "-n", self._space(one), "link", "add", end, "type", "veth",
           "peer", "name", other_end, "netns", self._space(other))  # fmt: skip
        for name, device in ((one, end), (other, other_end)):
            sh("ip", "-n", self._space(name), "link", "set", device, "up")

    def _build(self) -> None:
        self._add("internet")
        sh(*self.inside("internet"), "ip", "link", "add", "bridge", "type", "bridge")
        sh(*self.inside("internet"), "ip", "link", "set", "bridge", "up")
        for index, name in enumerate(self._public):
            self._connect(name, f"1.0.0.{10 + index}")
        for index, (name, kind) in enumerate(self._homes.items(), start=1):
            router = f"router-{name}"
            self._connect(router, f"1.0.0.{20 + index}")
            self._add(name)
            self._wire(name, "out", router, "in")
            net = f"192.168.{index}"
            sh(*self.inside(name), "ip", "addr", "add", f"{net}.2/24", "dev", "out")
            sh(*self.inside(router), "ip", "addr", "add", f"{net}.1/24", "dev", "in")
            sh(*self.inside(name), "ip", "route", "add", "default", "via", f"{net}.1")
            sh(*self.inside(router), "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
            sh(*self.inside(router), "nft", "-f", "-", stdin=_rules(kind, f"{net}.2"))

    def _connect(self, name: str, ip: str) -> None:
        self._add(name)
        port = f"to-{ip.rpartition('.')[2]}"
        self._wire(name, "out", "internet", port)
        sh(*self.inside("internet"), "ip", "link", "set", port, "master", "bridge")
        sh(*self.inside(name), "ip", "addr", "add", f"{ip}/24", "dev", "out")


def _rules(kind: str, home: str) -> str:
    forward = f'iifname "out" tcp dport {PEER_PORT} dnat to {home}:{PEER_PORT}' if kind == "full-cone" else ""
    allow = "ct status dnat accept" if kind == "full-cone" else ""
    return f"""
table ip home {{
    chain outgoing {{ type nat hook postrouting priority 100; oifname "out" {KINDS[kind]}; }}
    chain incoming {{ type nat hook prerouting priority -100
        {forward}
    }}
    chain through {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "in" accept
        {allow}
    }}
    chain itself {{ type filter hook input priority 0; iifname "out" ct state new drop; }}
}}
"""
