"""The edge of the command line: bytes that are no text, streams without characters, pipes that close, bugs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from petals.cli import main as cli
from petals.cli.boundary import EXIT_BUG, EXIT_PIPE, report_bug, show_anything
from tests.cli.test_commands import ENVIRONMENT, PETALS, ROOT

NO_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("words", [["peer", "--generate", NO_UTF8], ["peer", NO_UTF8, "--serve", "0:1"]])
def test_bytes_that_are_no_text_are_one_line_before_anything_else(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(cli.parse([*words, "--new_swarm"])) == 2
    said = capsys.readouterr().err
    assert r"b'caf\xe9' is no UTF-8 text" in said
    assert said.count("\n") == 1


def test_a_path_may_have_any_bytes(tmp_path: Path) -> None:
    key = tmp_path / NO_UTF8
    assert cli.run(cli.parse(["keygen", str(key)])) == 0
    assert key.exists()


def test_an_ascii_terminal_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show_anything()
    print("a café", flush=True)
    assert raw.getvalue() == b"a caf\\xe9\n"


def _broken_verb(error: BaseException) -> Any:
    def verb(options: object) -> None:
        raise error

    options = cli.parse(["keygen", "--swarm", "unused"])
    options.run = verb
    return options


@pytest.mark.parametrize("error", [ZeroDivisionError("by none"), ExceptionGroup("x", [ZeroDivisionError("by none")])])
def test_a_bug_is_one_line_and_a_file(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(_broken_verb(error)) == EXIT_BUG
    said = capsys.readouterr().err
    assert said.startswith("petals: unexpected ZeroDivisionError: by none; please report it with ")
    assert said.count("\n") == 1
    path = Path(said.strip().rpartition(" ")[2])
    details = path.read_text()
    path.unlink()
    assert details.startswith("petals ")
    assert "Traceback" in details
    assert "ZeroDivisionError: by none" in details


def test_without_a_place_for_the_file_the_details_are_on_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    assert report_bug(ZeroDivisionError("by none")) == EXIT_BUG
    said = capsys.readouterr().err
    assert "ZeroDivisionError: by none" in said
    assert "lines above" in said


ENDLESS = """
import sys
from petals.cli.boundary import report_bug
try:
    while True:
        print("x" * 1000, flush=True)
except Exception as error:
    sys.exit(report_bug(error))
"""


def test_who_stops_reading_gets_no_traceback() -> None:
    script = '"$0" -c "$1" | head -n 1 > /dev/null; exit ${PIPESTATUS[0]}'
    command = ["bash", "-c", script, sys.executable, ENDLESS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_PIPE, "")


def test_stopping_a_peer_that_stays_is_no_failure() -> None:
    command = [*PETALS, "peer", "--bootstrap", "--json", "--no_mdns"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 0
