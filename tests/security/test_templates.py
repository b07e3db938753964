"""A chat template is a program of a stranger: it may loop, explode and lie, and ends nobody but its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from petals.models.source import templates
from petals.models.source.templates import TemplateRefused, Templates
from petals.peer.client.generation.prompts import Chat, write_chat
from petals.protocols.errors import UserError

HELLO = [{"role": "user", "content": "hello  "}]
CHATML = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}"
    "{% continue %}{% endif %}<|{{ m['role'] }}|>{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}{{ mood | default('') }}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


class Own(PreTrainedTokenizerBase):  # type: ignore[misc]
    """The library's own way, in this process."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return SPECIAL


@pytest.fixture(scope="module")
def renderer() -> Iterator[Templates]:
    made = Templates()
    yield made
    made.close()


@pytest.mark.parametrize(
    "arguments",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "mood": "gay", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"continue_final_message": True},
    ],
    ids=str,
)
def test_it_is_written_as_the_library_writes_it(renderer: Templates, arguments: dict[str, Any]) -> None:
    messages = [
        *HELLO,
        {"role": "nobody", "content": "é\n😀"},
        {"role": "assistant", "content": "Once upon", "x": None},
    ]
    expected = Own(CHATML).apply_chat_template(messages, tokenize=False, **arguments)
    assert renderer.render(CHATML, SPECIAL, messages, arguments) == expected


BOMBS = {
    "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "one long multiplication": "{{ 7 ** (9 ** 12) }}",
    "all memory": "{{ 'a' * 10 ** 11 }}",
    "all memory, bit by bit": "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "a long answer": "{% for a in range(20000) %}{{ 'a' * 1000 }}{% endfor %}",
    "depth": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_costs_its_conversation(renderer: Templates, bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_S", 1.0)
    before = psutil.Process().memory_info().rss
    with pytest.raises(TemplateRefused):
        renderer.render(bomb, SPECIAL, HELLO, {})
    assert psutil.Process().memory_info().rss - before < 100 << 20
    monkeypatch.undo()
    assert renderer.render("{{ messages[0].content }}", SPECIAL, HELLO, {}) == "hello  ", "the next one is served"


def test_no_secrets_and_no_files(renderer: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper gets no token of ours, and the library's sandbox keeps a template from what is not its own."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fresh = Templates()
    assert fresh.render("x", SPECIAL, HELLO, {}) == "x"
    assert fresh._helper is not None
    assert "HF_TOKEN" not in psutil.Process(fresh._helper._process.pid).environ()
    fresh.close()
    climb, reach, read = "''.__class__.__mro__", "cycler.__init__.__globals__.os.environ", "{% include '/etc/passwd' %}"
    for attack in (f"{{{{ {climb} }}}}", f"{{{{ {reach} }}}}", read):
        with suppress(TemplateRefused):
            assert renderer.render(attack, SPECIAL, HELLO, {}) in ("", "None"), attack


def test_a_person_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_S", 1.0)
    tokenizer: Any = SimpleNamespace(
        chat_template=BOMBS["loops for ever"], special_tokens_map={}, apply_chat_template=Own.apply_chat_template
    )
    with pytest.raises(UserError, match="the chat template of tiny refuses this conversation: it takes more than 1 s"):
        write_chat(tokenizer, Chat(HELLO), "tiny")


def test_the_helper_ends_by_itself_when_its_peer_is_gone() -> None:
    """Even in the middle of a loop."""
    program = "\n".join(
        [
            "from petals.models.source import templates",
            "templates.RENDER_S = 2.0",
            "one = templates.Templates()",
            f"one.render('x', {{}}, {HELLO!r}, {{}})",
            "print(one._helper._process.pid, flush=True)",
            f"one.render({BOMBS['loops for ever']!r}, {{}}, {HELLO!r}, {{}})",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        helper = psutil.Process(int(peer.stdout.readline()))
        os.kill(peer.pid, signal.SIGKILL)
    helper.wait(timeout=20)
    assert not helper.is_running()
