"""A chat in a real terminal (a pty), asking a server in another process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_commands import ENVIRONMENT, PETALS, ROOT, serving
from tests.swarm.conftest import Truth


class Terminal:
    """A person in front of a program; the program's own process group is the pty's foreground, so keys are signals."""

    def __init__(self, *words: str) -> None:
        self.keys, other = os.openpty()
        attach = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", attach, *PETALS, *words], stdin=other, cwd=ROOT, env=ENVIRONMENT | {"TERM": "dumb"}
        )
        os.close(other)
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def read_until(self, end: str, timeout: float = 200) -> str:
        """All up to `end`; what came after it in the same breath is for the next call."""
        deadline = time.monotonic() + timeout
        while end.encode() not in self._unread:
            ready, _, _ = select.select([self.keys], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {end!r}, saw {self._unread.decode()!r}"
            self._unread += os.read(self.keys, 4096)
        seen, _, self._unread = self._unread.partition(end.encode())
        return (seen + end.encode()).decode().replace("\r\n", "\n")


@pytest.mark.swarm
def test_a_conversation(smollm: Truth, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with serving("peer", "--serve", "0:30", "--throughput", "100") as server:
        words = ("--max_new_tokens", "300", "--system", "Answer briefly.", "--initial_peers", server["addrs"][0])
        terminal = Terminal("peer", "--chat", *words)
        try:
            terminal.read_until(">>> ")
            terminal.type("What is the capital of France?\r")
            answer = terminal.read_until(">>> ")
            terminal.type("/route\r")
            assert "route 0:30 via" in terminal.read_until(">>> ")
            terminal.type("Write a very long story about\\\r")
            terminal.read_until("... ")
            terminal.type("a cat.\r")
            terminal.read_until("cat.")
            terminal.read_until(" the ")
            terminal.type("\x03")
            assert "[stopped]" in terminal.read_until(">>> ")
            terminal.type(f"/save {saved}\r")
            terminal.read_until("saved 5 messages")
            terminal.read_until(">>> ")
            terminal.type("/reset\r")
            terminal.read_until(">>> ")
            terminal.type("half a")
            terminal.read_until("half a")
            terminal.type("\x03")
            terminal.read_until("leaves)")
            terminal.read_until(">>> half a")  # what is still being edited is shown again
            assert terminal.process.poll() is None
            terminal.type("\x15\x04")
            assert terminal.process.wait(timeout=60) == 0
        finally:
            terminal.process.send_signal(signal.SIGKILL)
            terminal.process.wait()
            os.close(terminal.keys)
    messages = json.loads(saved.read_text())
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    tokenizer = smollm.tokenizer
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    expected = smollm.model.generate(**inputs, max_new_tokens=300, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert messages[2]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert messages[2]["content"] in answer
    assert messages[3]["content"] == "Write a very long story about\na cat."
