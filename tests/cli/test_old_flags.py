"""Command lines of Petals' `run_server` and `run_dht`: what each flag becomes, and that the page lists them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petals.cli import old_flags
from petals.cli.main import parse, parsers
from petals.cli.old_flags import new_command
from petals.cli.peer import lan_config
from petals.protocols.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
ADDR = "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT"

TRANSLATIONS = [
    ("M --block_indices 0:12 --identity F --host_maddrs A B", "M --serve 0:12 --identity F --listen A B"),
    ("M --announce_maddrs A --torch_dtype float32 --device cpu", "M --announce A --torch_dtype float32 --device cpu"),
    ("--converted_model_name_or_path M --num_blocks 3", "M --num_blocks 3"),
    ("--num_blocks 3 --revision R M", "--num_blocks 3 --revision R M"),
    ("M --port 31330", "M --listen /ip4/0.0.0.0/tcp/31330"),
    (
        "M --port 31330 --public-ip 1.2.3.4",
        "M --listen /ip4/0.0.0.0/tcp/31330 --announce /ip4/1.2.3.4/tcp/31330",
    ),
    ("M --initial_peers --adapters --num_blocks 2", "M --num_blocks 2"),
    ("M --initial_peers A B --adapters D", "M --initial_peers A B --adapters D"),
    ("M --attn_cache_size 16GB", "M --cache_mb 16000"),
    ("M --attn_cache_size 0.5GiB", "M --cache_mb 536.871"),
    ("M --throughput auto", "M"),
    ("M --throughput eval", "M"),
    ("M --throughput=7.5", "M --throughput 7.5"),
    ("M --compression NONE", "M --compression none"),
    ("M --compression FLOAT16", "M --compression float16"),
    ("M --compression BLOCKWISE_8BIT", "M --compression int8"),
    ("M --load_in_8bit", "M --quant_type int8"),
    ("M --load_in_8bit True", "M --quant_type int8"),
    ("M --load_in_8bit false", "M"),
    ("M --tensor_parallel_devices cpu cpu", "M --device cpu"),
    ("M --device cuda --tensor_parallel_devices cuda", "M --device cuda"),
    ("M --use_auth_token", "M"),
    ("M --use_auth_token hf_x", "M --token hf_x"),
    ("M --config peer.toml", "M --config peer.toml"),
    ("M --cache_mb 5 --json -v", "M --cache_mb 5 --json -v"),
    ("M --num_handlers 8 --no_auto_relay --dht_prefix p", "M"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), TRANSLATIONS, ids=[old for old, _ in TRANSLATIONS])
def test_an_old_command_line_in_the_new_spelling(old: str, new: str) -> None:
    assert new_command(old.split()).peer_words() == new.split()


def test_settings_without_a_flag_of_their_own() -> None:
    words = "M --attn_cache_tokens 2048 --expiration 90 --step_timeout 60 --max_batch_size 512 --alloc_timeout 5"
    assert new_command(words.split()).serve == {
        "cache_tokens": 2048,
        "announce_s": 30.0,
        "session_idle_s": 60.0,
        "max_batch_tokens": 512,
        "max_wait_s": 5.0,
    }
    assert new_command(["M", "--cache_dir", "/data"]).environment == {"HF_HUB_CACHE": "/data"}


def test_measuring_only() -> None:
    command = new_command(
        ["M", "--throughput", "dry_run", "--quant_type", "int8", "--torch_dtype", "float32", "--device", "cpu"]
    )
    assert command.measure_only
    assert command.bench_words() == ["M", "--quant_type", "int8", "--dtype", "float32"]
    parse(["bench", *command.bench_words()])


def test_what_needs_nothing_here_is_accepted_and_said() -> None:
    for flag, why in old_flags.NOT_NEEDED.items():
        assert new_command(["M", flag, "1"]).notes == [f"{flag} is not needed: {why}"]


REFUSALS = [
    ("--use_ipfs", "--initial_peers"),
    ("--custom_module_path x.py", "docs/custom-model.md"),
    ("--max_disk_space 50GB", "nothing is ever deleted"),
    ("--tensor_parallel_devices cuda:0 cuda:1", "one peer for each device"),
    ("--compression QUANTILE_8BIT", "choose NONE, FLOAT16, BLOCKWISE_8BIT"),
    ("--public_ip 1.2.3.4", "--port"),
    ("--port 1 --host_maddrs A", "give one kind of them"),
    ("--port 70000", "0 to 65535"),
    ("--attn_cache_tokens many", "a number above 0"),
    ("--attn_cache_size 16XB", "a size such as 16GB"),
    ("--load_in_8bit perhaps", "--quant_type int8"),
    ("--converted_model_name_or_path", "takes one value"),
    ("-c missing.yml", "No such file"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "hint"), REFUSALS, ids=[words for words, _ in REFUSALS])
def test_what_is_refused_says_the_new_way(words: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        new_command(["M", *words.split()])


def test_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(
        "model_name_or_path: M\nnum-blocks: 3\ninitial_peers: [A, B]\nadapters: []\nnew_swarm: false\n"
        "compression: FLOAT16\nskip_reachability_check: true\nexpiration: 30\n"
    )
    command = new_command(["-c", str(file), "--public_name", "me"])
    assert command.peer_words() == (
        ["M", "--num_blocks", "3", "--initial_peers", "A", "B", "--compression", "float16", "--public_name", "me"]
    )
    assert command.serve == {"announce_s": 10.0}
    file.write_text("- a\n- list\n")
    with pytest.raises(UserError, match="num_blocks: 12"):
        new_command(["-c", str(file)])
    file.write_text("a: [\n")
    with pytest.raises(UserError, match="no YAML"):
        new_command(["-c", str(file)])


def test_a_new_swarm_is_not_found_on_the_local_network() -> None:
    everywhere = ["peer", "--serve", "0:2", "--listen", "/ip4/0.0.0.0/tcp/0"]
    assert lan_config(parse(everywhere)) is not None
    assert lan_config(parse([*everywhere, "--new_swarm"])) is None


def rows() -> list[list[str]]:
    """The cells of the table of flags."""
    section = PAGE.split("## Server flags")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "`-" in line]


def test_the_page_lists_every_flag_as_the_parser_takes_it() -> None:
    kinds = {
        "as it is": set(old_flags.UNCHANGED),
        "renamed": set(old_flags.RENAMED),
        "translated": set(old_flags.TRANSLATED),
        "not needed": set(old_flags.NOT_NEEDED),
        "refused": set(old_flags.REFUSED),
    }
    assert len(old_flags.OLD_FLAGS) == len(set(old_flags.OLD_FLAGS)), "each flag is in one table"
    listed: dict[str, set[str]] = {kind: set() for kind in kinds}
    _, verbs = parsers()
    ours = {flag for action in verbs["peer"]._actions for flag in action.option_strings}
    for flags, kind, here in rows():
        listed[kind] |= set(re.findall(r"`(-[-a-z_0-9]+)", flags))
        for named in re.findall(r"`(--[a-z_]+)[^`]*`", here):
            assert named in ours, f"{flags}: {named} is no flag of petals peer"
    assert listed == kinds
    assert set(old_flags.UNCHANGED) <= ours
    assert set(old_flags.RENAMED.values()) <= ours


def test_examples_of_the_page_parse() -> None:
    """Each spelling in its first column is what the third one says, or is refused."""
    values = {"ADDR": ADDR, "NAME": "some/model", "IP": "1.2.3.4", "N": "5", "S": "5", "RPS": "5"}
    tried = 0
    for flags, kind, _ in rows():
        for example in re.findall(r"`(--[^`]*)`", flags):
            words = [values.get(word, word) for word in example.split()]
            if words[0] == "--config":
                continue  # a file that is not there
            if words[0] == "--public_ip":
                words += ["--port", "5"]
            if kind == "refused":
                with pytest.raises(UserError):
                    new_command(words)
            else:
                parse(["peer", *new_command(words).peer_words()])
            tried += 1
    assert tried > 50
