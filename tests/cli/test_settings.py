"""Flags from the command line, the environment and a file: every flag of every verb, who wins, what mistakes say."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petals.cli.main import parse, parsers
from petals.cli.peer import EVERYWHERE
from petals.cli.settings import Flag, flags_of

ROOT = Path(__file__).parents[2]
SAMPLES = ["0:12", "3", "0.5", "127.0.0.1:9", "abc"]
"""One of them is a value of each flag that has no choices."""


def given(flag: Flag) -> tuple[list[str], str, Any]:
    """The same for the command line, the environment and a file."""
    name = f"--{flag.names[0]}"
    if flag.action.nargs == 0:
        return [name], "true", True
    kind = flag.action.type or str
    assert callable(kind)
    for sample in map(str, flag.action.choices or SAMPLES):
        try:
            kind(sample)
        except (ValueError, argparse.ArgumentTypeError):
            continue
        words = [sample] if not flag.action.option_strings else [name, sample]
        return words, sample, int(sample) if sample.isdigit() else sample
    raise AssertionError(f"no sample for {name}")


def required(verb: str) -> list[str]:
    """What the verb does not start without."""
    words = []
    for action in parsers()[1][verb]._actions:
        if action.required:
            words += [*action.option_strings[:1], "x"]
    return words


ALL = [
    pytest.param(verb, flag.names[0], id=f"{verb} {flag.names[0]}")
    for verb, parser in parsers()[1].items()
    for flag in flags_of(parser)
    if flag.names[0] != "config"
]


@pytest.fixture(autouse=True)
def _a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, parser in parsers()[1].items():
        for flag in flags_of(parser):
            for variable in flag.variables:
                monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "petals.toml").write_text(text)
        return str(tmp_path / "petals.toml")

    return write


@pytest.mark.parametrize(("verb", "name"), ALL)
def test_every_flag_may_stand_on_the_command_line_in_the_environment_and_in_a_file(
    verb: str, name: str, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = next(each for each in flags_of(parsers()[1][verb]) if each.names[0] == name)
    others = [word for word in required(verb) if word not in flag.action.option_strings]
    others = others if len(others) == len(required(verb)) else []
    words, text, value = given(flag)
    wanted = vars(parse([verb, *others, *words]))
    if flag.action.option_strings:
        assert wanted[flag.action.dest] != flag.action.default or flag.action.choices
    for where in (f"{name} = {json.dumps(value)}", f"[{verb}]\n{name.replace('_', '-')} = {json.dumps(value)}"):
        got = vars(parse([verb, *others, "--config", file(where)]))
        assert got | {"config": None} == wanted
    monkeypatch.setenv(flag.variables[0], text)
    assert vars(parse([verb, *others])) == wanted


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = file('cache_mb = 1\ninitial_peers = ["a", "b"]\njson = true\n[peer]\ncache_mb = 2\n[status]\ninterval = 9')
    options = parse(["peer", "--config", config])
    assert (options.cache_mb, options.initial_peers, options.json) == (2, ["a", "b"], True)
    assert parse(["status", "--config", config]).interval == 9
    monkeypatch.setenv("PETALS_CONFIG", config)
    monkeypatch.setenv("PETALS_CACHE_MB", "3")
    monkeypatch.setenv("PETALS_INITIAL_PEERS", "c  d,e")
    monkeypatch.setenv("PETALS_JSON", "0")
    monkeypatch.setenv("PETALS_LISTEN", "")
    options = parse(["peer"])
    assert (options.cache_mb, options.initial_peers, options.json) == (3, ["c", "d", "e"], False)
    assert options.listen == [EVERYWHERE]
    options = parse(["peer", "--cache_mb", "4", "--initial-peers", "f"])
    assert (options.cache_mb, options.initial_peers) == (4, ["f"])


def test_a_flag_that_may_go_without_its_value_is_a_switch_as_well(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = file('serve = true\nhttp = "127.0.0.1:9"')
    options = parse(["peer", "--config", config])
    assert (options.serve, options.http) == (range(0), "127.0.0.1:9")
    monkeypatch.setenv("PETALS_SERVE", "0:3")
    monkeypatch.setenv("PETALS_HTTP", "0")
    options = parse(["peer", "--config", config])
    assert (options.serve, options.http) == (range(3), None)


def test_a_programs_own_defaults_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["peer"], {"serve": range(0)}).serve == range(0)
    monkeypatch.setenv("PETALS_SERVE", "0:3")
    assert parse(["peer"], {"serve": range(0)}).serve == range(3)


MISTAKES = [
    ("PETALS_CACHE_MB", "x", "PETALS_CACHE_MB: expected a number above 0, not 'x'"),
    ("PETALS_SERVE", "12", "PETALS_SERVE: '12' is no block range; write START:END"),
    ("PETALS_QUANT_TYPE", "int3", "PETALS_QUANT_TYPE: invalid choice: 'int3' (choose from 'none', 'int8', 'nf4')"),
    ("PETALS_CHAT", "maybe", "PETALS_CHAT: expected true or false (or 1 or 0), not 'maybe'"),
    ("PETALS_CONFIG", "/no/such.toml", "--config /no/such.toml: No such file"),
    (None, "cach_mb = 3", "petals.toml: no flag is called cach_mb; did you mean cache_mb?"),
    (None, "[pear]\nserve = '0:3'", "petals.toml: no verb is called [pear]; did you mean [peer]?"),
    (None, "[status]\ncache_mb = 3", "petals.toml: [status]: no flag is called cache_mb; did you mean watch?"),
    (None, "[status]\nintervall = 3", "petals.toml: [status]: no flag is called intervall; did you mean interval?"),
    (None, "config = 'other.toml'", "petals.toml: no flag is called config"),
    (None, "[peer]\ncache_mb = 'x'", "petals.toml: [peer] cache_mb: expected a number above 0, not 'x'"),
    (None, "listen = []", "petals.toml: listen: expected at least one value"),
    (None, "listen = [true]", "petals.toml: listen: expected strings, not True"),
    (None, "generate = ['a', 'b']", "petals.toml: generate: expected one value, not ['a', 'b']"),
    (None, "cache_mb = true", "petals.toml: cache_mb: expected one value, not True"),
    (None, "cache_mb = ", "petals.toml: Invalid value (at end of document)"),
]


@pytest.mark.parametrize(("variable", "text", "complaint"), MISTAKES, ids=[each[1] for each in MISTAKES])
def test_a_mistake_names_where_it_stands(
    variable: str | None,
    text: str,
    complaint: str,
    file: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if variable is None:
        variable, text = "PETALS_CONFIG", file(text)
    monkeypatch.setenv(variable, text)
    with pytest.raises(SystemExit) as ended:
        parse(["peer", "--serve"] if variable != "PETALS_SERVE" else ["peer"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("petals: ")
    assert complaint in said
    assert said.count("\n") == 1
    assert parsers()[1]["peer"].format_help()  # and --help never minds
    with pytest.raises(SystemExit) as ended:
        parse(["peer", "--help"])
    assert ended.value.code == 0


def test_a_variable_that_is_nearly_a_flag_is_mentioned_and_others_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("PETALS_LISTN", "PETALS_HOME", "PETALS_CACHE", "PETALS_INTEROP_CACHE", "PETALS_TEST"):
        monkeypatch.setenv(variable, "x")
    assert parse(["peer"]).listen == [EVERYWHERE]
    assert capsys.readouterr().err == "petals: PETALS_LISTN names no flag; did you mean PETALS_LISTEN?\n"


def test_help_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in parsers()[1]:
        with pytest.raises(SystemExit):
            parse([verb, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "--config FILE" in said
        assert "PETALS_INITIAL_PEERS" in said
        assert f"in a table such as [{verb}]" in said


def test_the_documentation_lists_what_the_parsers_take() -> None:
    """After a change of flags: python scripts/cli_reference.py"""
    command = [sys.executable, "scripts/cli_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "cli.md").read_text()
    for verb, parser in parsers()[1].items():
        section = page.partition(f"## petals {verb}\n")[2].partition("\n## ")[0]
        for flag in flags_of(parser):
            assert flag.names == ("config",) or not flag.action.option_strings or f"`--{flag.names[0]}`" in section
