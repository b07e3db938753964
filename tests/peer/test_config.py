"""Configurations check their own values: one ConfigError that names the field, what it was, and what is allowed."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from petals.cli.base.config_flags import FLAGS, SAME, in_flags
from petals.cli.main import parsers, run
from petals.peer.base.config import LanConfig, NatConfig, PeerConfig, RelayLimits, ServeConfig, Timeouts
from petals.peer.client.model_client import ClientOptions
from petals.peer.client_config import WITHOUT_EFFECT, ClientConfig
from petals.protocols.errors import ConfigError

CONFIGS = (ServeConfig, PeerConfig, Timeouts, NatConfig, LanConfig, RelayLimits, ClientOptions, ClientConfig)
WRONG: list[tuple[type, str, Any, str]] = [
    (ServeConfig, "quant_type", "int9", "'none', 'int8' or 'nf4'"),
    (ServeConfig, "cache_bytes", -5, "a whole number, at least 1"),
    (ServeConfig, "cache_bytes", 2.5, "a whole number, at least 1"),
    (ServeConfig, "blocks", range(5, 2), "range(0, 12)"),
    (ServeConfig, "blocks", range(0, 8, 2), "range(0, 12)"),
    (ServeConfig, "blocks", (0, 12), "a range or None"),
    (ServeConfig, "announce_s", 0, "a number, above 0"),
    (ServeConfig, "announce_s", math.nan, "a number, above 0"),
    (ServeConfig, "announce_s", True, "a number, above 0"),
    (ServeConfig, "balance_quality", 1.0, "at least 0 and below 1"),
    (ServeConfig, "work_bytes", 1000, "at least 1,048,576"),
    (ServeConfig, "num_blocks", 0, "or None, at least 1"),
    (ServeConfig, "dtype", "float8", "'auto', 'float32'"),
    (ServeConfig, "favoured", "12D3", "a set of peer IDs"),
    (ServeConfig, "share_weights", "yes", "True or False or None"),
    (PeerConfig, "initial_peers", "/ip4/192.0.2.7/tcp/1", "a tuple of strings"),
    (PeerConfig, "initial_peers", ("192.0.2.7:1",), "multiaddrs, such as ('/ip4/192.0.2.7/tcp/31337',)"),
    (PeerConfig, "weights_from", "moon", "'auto', 'hub' or 'swarm'"),
    (PeerConfig, "serve", {"blocks": 3}, "a ServeConfig or None"),
    (PeerConfig, "update_s", 0, "above 0"),
    (NatConfig, "relays", ("somewhere",), "multiaddrs"),
    (RelayLimits, "slots", 0, "at least 1"),
    (LanConfig, "search_s", -1.0, "at least 0"),
    (Timeouts, "step_s", 0, "above 0"),
    (ClientOptions, "audit", 1.5, "at least 0 and at most 1"),
    (ClientOptions, "on_step", 3, "a function or None"),
    (ClientConfig, "compression", "zip", "'none', 'float16' or 'int8'"),
    (ClientConfig, "local_blocks", [range(2, 2)], "ranges of at least one block"),
    (ClientConfig, "allowed_servers", "12D3", "a set of peer IDs or None"),
    (ClientConfig, "connect_timeout", 0, "above 0"),
]


@pytest.mark.parametrize(("config", "field", "value", "allowed"), WRONG)
def test_a_wrong_field_is_named_with_what_it_was_and_what_is_allowed(
    config: type, field: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{field: value})
    error = caught.value
    assert (error.config, error.field) == (config.__name__, field)
    assert allowed in error.allowed
    assert str(error) == f"{error.config}.{field} is {error.value}; allowed: {error.allowed}"


def test_two_fields_that_contradict() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks is 3; allowed: None where blocks says which"):
        ServeConfig(blocks=range(2), num_blocks=3)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_every_configuration_is_checked(config: Callable[..., Any]) -> None:
    """Nothing is of a class that the test has made up: a field that takes it is not checked."""
    for each in dataclasses.fields(cast(Any, config)):
        if each.name == "show_route" or each.name in WITHOUT_EFFECT:  # anything is true or false; nothing is read
            continue
        with pytest.raises((ConfigError, TypeError)):
            config(**{each.name: _Nothing()})


class _Nothing:
    pass


def test_a_secret_is_not_shown() -> None:
    wrong: Any = 12345
    with pytest.raises(ConfigError) as caught:
        PeerConfig(token=wrong)
    assert "12345" not in str(caught.value)


def test_lists_and_paths_as_text_are_taken() -> None:
    asked: dict[str, Any] = {"initial_peers": ["/ip4/192.0.2.7/tcp/1"], "identity": "my.key"}
    config = PeerConfig(**asked)
    assert config.initial_peers == ("/ip4/192.0.2.7/tcp/1",)
    assert config.identity == Path("my.key")
    assert hash(config) is not None
    adapters: Any = ["a", Path("b")]
    assert ServeConfig(adapters=adapters).adapters == (Path("a"), Path("b"))


def flags() -> Iterator[str]:
    for action in parsers()[1]["peer"]._actions:
        yield from action.option_strings or (action.metavar,)  # type: ignore[misc]


def test_the_command_line_says_it_in_flags() -> None:
    known = set(flags())
    assert known >= {f"--{name}" for name in SAME} | set(FLAGS.values())
    fields = {each.name for config in CONFIGS for each in dataclasses.fields(cast(Any, config))}
    assert fields >= SAME | set(FLAGS)
    assert in_flags(ConfigError("ServeConfig", "max_peer_share", "3", "less")) == "--max_peer_share is 3; allowed: less"
    assert in_flags(ConfigError("ServeConfig", "cache_bytes", "0", "more")) == (
        "--cache_mb: cache_bytes is 0; allowed: more"
    )


def test_a_wrong_value_ends_the_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def verb(_: argparse.Namespace) -> None:
        ServeConfig(balance_quality=1.0)

    assert run(argparse.Namespace(verbose=False, synchronous=True, run=verb)) == 2
    assert capsys.readouterr().err == "petals: --balance_quality is 1.0; allowed: a number, at least 0 and below 1\n"
