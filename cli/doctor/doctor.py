"""`petals doctor`: is this installation fine, and that swarm, and what to do where it is not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from petals.cli.base.help_format import Formatter

if TYPE_CHECKING:
    from petals.cli.doctor.checks import Finding

MARKS = {"ok": ("✓", "\x1b[32m"), "note": ("•", "\x1b[33m"), "problem": ("✗", "\x1b[31m")}
"""For terminals: a mark that says it without its colour, too."""
PLAIN_COLOUR = "\x1b[0m"
EXAMPLES = """
examples:
  petals doctor                                           this machine
  petals doctor --listen /ip4/0.0.0.0/tcp/31337           and whether that port is free
  petals doctor --initial_peers ADDR                      and whether that peer answers, and its swarm
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "doctor",
        help="check this installation and a swarm, and say what to do",
        description="Check versions, device, memory, disk and ports, and with --initial_peers each of those peers, the "
        "clocks and the models of their swarm. Says what to do about each problem; exit code 0: all is fine, 1: "
        "problems were found.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--initial_peers", metavar="ADDR", nargs="+", default=[], help="peers of the swarm to check")
    parser.add_argument("--listen", metavar="ADDR", nargs="+", default=["/ip4/127.0.0.1/tcp/0"],
                        help="multiaddrs a peer would listen on (default: /ip4/127.0.0.1/tcp/0)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, at the end")
    parser.add_argument("--verbose", "-v", action="store_true", help="logs of what happens, on stderr")
    parser.set_defaults(run=run, synchronous=False)


async def run(options: argparse.Namespace) -> int:
    """Examine, and say how many problems there are."""
    from petals.cli.base.addresses import check_listen
    from petals.cli.doctor.checks import Subject, examine

    check_listen(options.listen)
    findings: list[Finding] = []
    bright = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not options.json:
            print(describe(finding, bright=bright), flush=True)

    await examine(Subject(listen=tuple(options.listen), initial_peers=tuple(options.initial_peers)), tell)
    problems = sum(finding.state == "problem" for finding in findings)
    if options.json:
        print(json.dumps({"problems": problems, "findings": list(map(as_json, findings))}), flush=True)
    else:
        print("\nno problems" if not problems else f"\n{problems} problem{'s' * (problems > 1)}", flush=True)
    return 1 if problems else 0


def describe(finding: Finding, *, bright: bool) -> str:
    """For people; `bright`: on a terminal that knows colours."""
    mark, colour = MARKS[finding.state]
    shown = f"{colour}{mark}{PLAIN_COLOUR}" if bright else f"{finding.state:<7}"
    line = f"{shown} {finding.check}: {finding.text}"
    return f"{line}\n{' ' * (2 if bright else 8)}-> {finding.advice}" if finding.advice else line


def as_json(finding: Finding) -> dict[str, object]:
    """For machines."""
    return {name: value for name, value in dataclasses.asdict(finding).items() if value not in ("", {})}
