"""Chat templates of strangers, rendered in a process of their own, with time and memory limits.

A template is a program that comes with a checkpoint. The sandbox of the library keeps it from files and from Python,
not from looping for ever, nor from one operation that takes all memory or minutes of one processor core; a thread that
does so could not be stopped, and would keep the whole process from ending. One helper process serves this whole
process: it is started with the first conversation (0.7 s of a processor core, 70 MB), stays, and is replaced when it
had to be ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petals.models.errors import ModelError

RENDER_S = 10.0
"""One conversation, by the clock: milliseconds as a rule."""
START_S = 120.0
"""The helper imports the library; machines may be busy."""
MAX_CHARS = 16 << 20
"""Of what a template writes."""
_PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "SYSTEMROOT", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ",
)  # fmt: skip
"""Of the environment: no tokens."""


class TemplateRefused(ModelError):
    """A template did not write this conversation down; the message says why."""


class _Helper:
    """The process, and its pipes."""

    def __init__(self) -> None:
        # The program itself as an argument: neither the folder of a script nor the working directory is looked at for
        # modules, whoever has put which there.
        program = "import sys\nsys.path[:] = [each for each in sys.path if each]\n"
        program += (Path(__file__).parent / "template_worker.py").read_text()
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"PYTHONUTF8": "1"},
        )
        if self._line(START_S) != "ready\n":
            self.end()
            raise TemplateRefused("the process for chat templates does not start")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; None: it had to be ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._line(RENDER_S + 5)  # its own alarm comes first
        except (OSError, ValueError):
            line = ""
        if not line.endswith("\n"):
            self.end()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, within_s: float) -> str:
        assert self._process.stdout is not None
        timer = threading.Timer(within_s, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()

    def end(self) -> None:
        """Now."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class Templates:
    """Renders, one conversation at a time. Thread-safe."""

    def __init__(self) -> None:
        self._helper: _Helper | None = None
        self._one = threading.Lock()

    def render(
        self,
        template: str,
        special_tokens: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
    ) -> str:
        """What the library's `apply_chat_template(messages, tokenize=False, **arguments)` writes.

        Raises:
            TemplateRefused: it refuses, takes too long or too much memory.
        """
        request = {
            "template": template,
            "special": dict(special_tokens),
            "messages": list(messages),
            "arguments": dict(arguments),
            "seconds": RENDER_S,
            "most": MAX_CHARS,
        }
        try:
            json.dumps(request)
        except (TypeError, ValueError) as error:
            raise TemplateRefused(f"a conversation is made of texts, numbers and lists: {error}") from None
        with self._one:
            if self._helper is None or not self._helper.lives:
                self._helper = _Helper()
            answer = self._helper.ask(request)
        if answer is None:
            raise TemplateRefused(f"it takes more than {RENDER_S:.0f} s, or more memory than it may")
        if "text" not in answer:
            raise TemplateRefused(str(answer.get("refused")))
        return str(answer["text"])

    def close(self) -> None:
        """End the helper; the next conversation starts another one."""
        with self._one:
            if self._helper is not None:
                self._helper.end()
                self._helper = None


TEMPLATES = Templates()
"""Of this process. Its helper ends with it: its input ends then."""
