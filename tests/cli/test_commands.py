"""The command as people run it: real processes, what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from petals.models.source.checkpoint import open_checkpoint
from tests.models.tiny import CASES, save_tiny

ROOT = Path(__file__).parents[2]
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT"
PROGRESS = tuple(f"petals: {verb}" for verb in ("starting", "joining", "loading", "reading", "serving", "ready"))
PROGRESS += ("petals: computing", "petals: newcomers", "--initial_peers")
PETALS = [sys.executable, "-m", "petals.cli.main"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PETALS, *words], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=ENVIRONMENT, check=False
    )


@contextmanager
def serving(*words: str, module: str = "petals.cli.main") -> Iterator[dict[str, Any]]:
    """A peer in a process; yields what it says of itself. It must end cleanly on SIGTERM."""
    command = [sys.executable, "-m", module, *words, "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line) | {"pid": process.pid}
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny-llama")
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    return str(directory)


def test_a_swarm_of_processes_writes_what_one_process_writes() -> None:
    with ExitStack() as stack:
        first = stack.enter_context(serving("peer", "--serve", "0:15", "--new-swarm", "--throughput", "100"))
        addr = first["addrs"][0]
        stack.enter_context(serving("peer", "--serve", "15:30", "--initial_peers", addr, "--throughput", "100"))
        asked = run("peer", "--generate", "A cat sat on", "--max_new_tokens", "12", "--initial_peers", addr, "--json")
        assert asked.returncode == 0, asked.stderr
        answer = json.loads(asked.stdout)
        assert [leg["blocks"] for leg in answer["route"]] == [[0, 15], [15, 30]]
        assert answer["route"][0]["peer_id"] == first["peer_id"]
        assert [leg["blocks"] for leg in answer["expected_route"]] == [[0, 15], [15, 30]]
        assert all(leg["network_s"] > 0 and leg["compute_s"] == 15 / 100 for leg in answer["expected_route"])
        assert answer["skipped"] == []
        assert set(answer["seconds"]) == {"start", "prepare", "first_token", "decode"}
        plain = run(
            "peer", "--generate", "A cat sat on", "--max-new-tokens=12", "--initial-peers", addr, "--show-route"
        )
        assert plain.stdout == "A cat sat on" + answer["text"] + "\n"
        assert "route 0:15 via …" in plain.stderr
        assert "Route found: 0:15 via …" in plain.stderr
        assert "+ 150.0 compute = " in plain.stderr
        assert "tokens/s" in plain.stderr
    alone = run("peer", "--serve", "0:30", "--generate", "A cat sat on", "--max_new_tokens", "12", "--json")
    assert json.loads(alone.stdout)["token_ids"] == answer["token_ids"]


def test_the_old_spellings_and_a_fixed_address(tiny_model: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    maddr = f"/ip4/127.0.0.1/tcp/{port}"
    words = [tiny_model, "--block_indices", "0:2", "--identity", "tests/test.id", "--host_maddrs", maddr]
    with serving(*words, "--new_swarm", module="petals.cli.run_server") as server:
        assert server["addrs"] == [f"{maddr}/p2p/12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT"]
        assert server["blocks"] == [0, 2]
        assert server["digest"] == open_checkpoint(tiny_model).digest


def test_the_server_lines_of_petals_own_checks_start(tiny_model: str) -> None:
    """A directory and four servers: one that moves, one that stays, one in chunks, one on two devices."""
    with ExitStack() as stack:
        words = ["--identity_path", "tests/test.id", "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
        directory = stack.enter_context(serving(*words, module="petals.cli.run_dht"))
        common = [tiny_model, "--device", "cpu", "--torch_dtype", "float32", "--initial_peers", *directory["addrs"]]
        lines = [
            "--adapters --num_blocks 2 --throughput 1 --mean_balance_check_period 10",
            "--adapters --block_indices 0:2 --throughput 1",
            "--adapters --num_blocks 3 --throughput auto --attn_cache_tokens 2048 --max_chunk_size_bytes 1024",
            "--tensor_parallel_devices cpu cpu --block_indices 0:2 --throughput auto",
        ]
        servers = [
            stack.enter_context(serving(*common, *line.split(), module="petals.cli.run_server")) for line in lines
        ]
        held = [range(*server["blocks"]) for server in servers]
        assert [len(blocks) for blocks in held] == [2, 2, 3, 2]
        assert held[1] == held[3] == range(2)
        told = run("status", "--initial_peers", *directory["addrs"], "--json")
        assert told.returncode == 0, told.stderr
        for server in servers:
            assert server["peer_id"] in told.stdout


def test_a_flag_that_is_refused_is_one_line(tiny_model: str) -> None:
    command = [sys.executable, "-m", "petals.cli.run_server", tiny_model, "--use_ipfs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--initial_peers" in done.stderr


def test_a_server_without_a_range_holds_what_fits(tiny_model: str) -> None:
    words = [tiny_model, "--new_swarm", "--throughput", "100", "--cache_mb", "1", "--mean_balance_check_period", "60"]
    with serving(*words, "--balance_quality", "0.75", module="petals.cli.run_server") as server:
        assert server["blocks"] == [0, 4]


def test_a_directory_peer_brings_others_together(tiny_model: str) -> None:
    with ExitStack() as stack:
        directory = stack.enter_context(serving("--identity", "identities/local-3.key", module="petals.cli.run_dht"))
        addr = directory["addrs"][0]
        stack.enter_context(serving("peer", tiny_model, "--serve", "0:2", "--initial_peers", addr))
        stack.enter_context(serving("peer", tiny_model, "--serve", "2:4", "--initial_peers", addr))
        asked = run("peer", tiny_model, "--generate", "x", "--initial_peers", addr, "--route_timeout", "5")
        assert asked.returncode == 2  # a random model has no tokenizer; but its blocks were found before that
        assert "tokenizer" in asked.stderr


def test_ctrl_c_ends_a_server_cleanly(tiny_model: str) -> None:
    process = subprocess.Popen(
        [*PETALS, "peer", tiny_model, "--serve", "0:4", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in errors) == (0, False)


MISTAKES = [
    (["peer"], "nothing to do"),
    (["peer", "--generate", "x"], "nobody to ask"),
    (["peer", "--serve", "12"], "is no block range"),
    (["peer", "--serve", "5:5"], "is no block range"),
    (["peer", "--serve", "0:31", "--new_swarm"], "has blocks 0:30"),
    (["peer", "--serve", "0:1", "--new_swarm", "--initial_peers", "/ip4/1.2.3.4"], "give one of them"),
    (["peer", "no/such/model/here", "--serve", "0:1"], "no/such/model/here"),
    (["peer", "--serve", "0:1", "--identity", "README.md"], "holds no Ed25519 or RSA private key"),
    (["peer", "--serve", "0:1", "--listen", "nonsense"], "nonsense"),
    (["peer", "--generate", "x", "--initial_peers", "/ip4/127.0.0.1/tcp/1"], "/ip4/127.0.0.1/tcp/1"),
    (["peer", "--generate", "x", "--initial_peers", NOBODY], "no initial peer answers"),
    (["peer", "--serve", "0:1", "--generate", "x", "--route_timeout", "2"], "blocks 1:30"),
    (["peer", "--serve", "0:1", "--colour"], "there is no --colour. (see petals peer --help)"),
    (["peer", "--tempreature", "1"], "there is no --tempreature, did you mean --temperature? (see petals peer --help)"),
    (["pear"], "there is no 'pear', did you mean peer? The verbs are peer, "),
    (["--vresion"], "there is no '--vresion', did you mean --version? The verbs are peer, "),
    (["peer", "--generate", "x", "--initial_peers", NOBODY, "--audit", "5"], "a number from 0 to 1, not '5'"),
    (["peer", "--serve", "0:1", "--device", "cuda:99"], "no device 'cuda:99' here"),
    (["peer", "--serve", "0:1", "--device", "abacus"], "unknown device 'abacus'"),
    (["peer", "--serve", "0:1", "--announce", "nonsense"], "--announce is ('nonsense',); allowed: multiaddrs"),
    (["peer", "--serve", "0:1", "--relays", "/ip4/127.0.0.1/tcp/1"], "--relays /ip4/127.0.0.1/tcp/1: not of the form"),
    (["peer", "--serve", "0:1", "--new_swarm", "--local_blocks", "0:1"], "--local_blocks and --audit are about"),
    (["keygen", "identities/local-1.key"], "exists already"),
    (["keygen", "--swarm", "--api", "x"], "give one of them"),
    (["invite", "--identity", "identities/local-1.key", "--initial_peers", "/ip4/1.2.3.4/tcp/5"], "/p2p/<peer id>"),
    (["serve", "0:30"], "there is no 'serve', did you mean petals peer --serve?"),
    (["--chat"], "there is no '--chat', did you mean petals peer --chat?"),
    (["invite", "--identity", "identities/local-1.key", "--peer", "nonsense"], "'nonsense' is no peer ID"),
    (["doctor", "--listen", "nonsense"], "not of the form /ip4/<ip>/tcp/<port>, such as /ip4/0.0.0.0/tcp/31337"),
    (["status"], "whose status?"),
    (["status", "--initial_peers", NOBODY, "--swarm_key", "README.md"], "README.md holds no swarm key"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "reason"), MISTAKES, ids=[" ".join(words)[:50] for words, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_code_2(words: list[str], reason: str) -> None:
    result = run(*words)
    said = [line for line in result.stderr.splitlines() if not line.startswith(PROGRESS)]
    assert result.returncode == 2, result.stderr
    assert len(said) == 1, result.stderr
    assert said[0].startswith("petals: ")
    assert reason in said[0]
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        result = run("peer", "--bootstrap", "--listen", addr)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert addr in result.stderr


def test_keygen_makes_a_private_file_that_serves_as_identity(tmp_path: Path) -> None:
    key = tmp_path / "my.key"
    result = run("keygen", str(key))
    assert result.returncode == 0
    assert key.stat().st_mode & 0o777 == 0o600
    with serving("peer", "--bootstrap", "--identity", str(key)) as peer:
        assert peer["peer_id"] == result.stdout.strip()


def test_help_teaches() -> None:
    for words in (["--help"], ["peer", "--help"], ["keygen", "--help"], ["seal", "--help"]):
        result = run(*words)
        assert result.returncode == 0
        assert "usage: petals" in result.stdout
    assert "--initial_peers ADDR" in run("peer", "--help").stdout
