"""Numbers on the command line: bounds are told in one line, before torch is imported for a command that can not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from petals.cli.main import parse
from petals.cli.peer import _wanted
from petals.protocols.errors import UserError

WRONG = [
    ("--cache_mb", "-5", "expected a number above 0, not '-5'"),
    ("--cache_mb", "nan", "expected a number above 0, not 'nan'"),
    ("--cache_mb", "inf", "expected a number above 0, not 'inf'"),
    ("--cache_mb", "much", "expected a number above 0, not 'much'"),
    ("--throughput", "0", "expected a number above 0, not '0'"),
    ("--relay_mb_s", "-1", "expected a number of at least 0, not '-1'"),
    ("--temperature", "-1", "expected a number of at least 0, not '-1'"),
    ("--top_p", "0", "expected a number above 0 and at most 1, not '0'"),
    ("--audit", "5", "expected a number from 0 to 1, not '5'"),
    ("--max_new_tokens", "0", "expected a whole number of at least 1, not '0'"),
    ("--max_new_tokens", "1.5", "expected a whole number of at least 1, not '1.5'"),
    ("--top_k", "-4", "expected a whole number of at least 0, not '-4'"),
    ("--seed", str(1 << 63), f"expected a whole number from {-1 << 63} to {(1 << 63) - 1}, not"),
]


@pytest.mark.parametrize(("flag", "value", "complaint"), WRONG, ids=[f"{flag} {value}" for flag, value, _ in WRONG])
def test_a_number_out_of_bounds_is_one_line(
    flag: str, value: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["peer", flag, value])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"petals: argument {flag}: {complaint}")
    assert said.count("\n") == 1


def test_what_is_within_bounds_is_taken() -> None:
    options = parse(["peer", "--cache_mb", "0.5", "--temperature", "0", "--top_p", "1", "--seed", "-7", "--audit", "1"])
    assert (options.cache_mb, options.temperature, options.top_p, options.seed, options.audit) == (0.5, 0, 1, -7, 1)


def test_temperature_0_takes_the_likeliest_whatever_else_is_said() -> None:
    options = parse(["peer", "--temperature", "0", "--top_p", "0.5", "--seed", "7", "--max_new_tokens", "3"])
    assert not _wanted(options, 64).samples
    assert _wanted(options, 64).max_new_tokens == 3
    assert _wanted(parse(["peer", "--seed", "7"]), 64).samples


@pytest.mark.parametrize(("verb", "flag"), [("status", "--interval"), ("bench", "--num_blocks")])
def test_other_verbs_have_bounds_too(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([verb, flag, "0"])
    assert "not '0'" in capsys.readouterr().err


def test_no_verb_at_all_is_shown_a_way_in(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "petals peer --serve 0:30 --http is a start" in said
    assert said.count("\n") == 1


def test_help_wraps_its_prose_and_leaves_examples_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb in ("peer", "status", "doctor", "keygen", "invite"):
        with pytest.raises(SystemExit):
            parse([verb, "--help"])
        usage, _, rest = capsys.readouterr().out.partition("\n\n")
        prose, _, examples = rest.partition("\nexamples:\n")
        assert usage.startswith(f"usage: petals {verb} ")
        assert usage.count("\n") < 5, "a wall of flags teaches nobody"
        assert max(map(len, prose.splitlines())) <= 80
        assert f"petals {verb}" in examples


def test_a_schema_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}')
    options = _wanted(parse(["peer", "--json_schema", str(file)]), 64)
    assert options.json_schema == '{"type": "object"}'
    file.write_text("[")
    for path, complaint in ((file, "is not JSON"), (tmp_path / "none", "cannot read")):
        with pytest.raises(UserError, match=complaint):
            _wanted(parse(["peer", "--json_schema", str(path)]), 64)
