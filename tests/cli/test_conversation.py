"""What a chat remembers, and how typed lines become messages."""

from __future__ import annotations

from typing import cast

import pytest

from petals.cli.chat import _Chat
from petals.cli.conversation import BLOCK, MAX_MESSAGE_CHARS, Composer, Conversation, printable
from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.generation.prompts import Chat, PromptTooLong
from petals.peer.client.model_client import ClientOptions
from petals.peer.node import Peer


def test_lines_become_messages() -> None:
    composer = Composer()
    assert composer.add("one line") == "one line"
    assert composer.add("goes \\") is None
    assert composer.waiting
    assert composer.add("on") == "goes \non"
    assert [composer.add(line) for line in (BLOCK, "a\\", "", "/reset", BLOCK)] == [None] * 4 + ["a\\\n\n/reset"]
    assert not composer.waiting


def test_a_message_is_bounded() -> None:
    composer = Composer()
    composer.add(BLOCK)
    composer.add("x" * (MAX_MESSAGE_CHARS + 1))
    assert not composer.waiting


def test_the_oldest_questions_are_forgotten_and_the_system_prompt_stays() -> None:
    talk = Conversation("be kind")
    for number in range(3):
        talk.ask(f"question {number}")
        talk.answered(f"answer {number}")
    talk.ask("last")
    assert talk.forget()
    assert talk.forget()
    assert [each["content"] for each in talk.messages] == ["be kind", "question 2", "answer 2", "last"]
    assert talk.forget()
    assert not talk.forget(), "the last question stays"
    assert [each["content"] for each in talk.messages] == ["be kind", "last"]
    talk.answered("")
    assert talk.messages == [{"role": "system", "content": "be kind"}], "a question without an answer is taken back"


def test_a_terminal_obeys_no_model() -> None:
    assert printable("a\x1b[2J\x9b1m\x07\r\tb\n") == "a[2J1m\tb\n"


class Forgetful:
    """A peer whose model looks back on no more than `room` messages."""

    def __init__(self, room: int) -> None:
        self.room = room

    async def generate(self, prompt: Chat, **_: object) -> TokenStream:
        if len(prompt.messages) > self.room:
            raise PromptTooLong("too long")
        return TokenStream([])


async def test_a_conversation_too_long_for_the_model_loses_its_oldest_questions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk = Conversation("be kind")
    for number in range(3):
        talk.ask(f"question {number}")
        talk.answered(f"answer {number}")
    talk.ask("last")
    peer = Forgetful(4)
    chat = _Chat(cast(Peer, peer), GenerationOptions(), ClientOptions(), talk)
    (await chat._ask())._ended.set()  # nothing was begun
    assert [each["content"] for each in talk.messages] == ["be kind", "question 2", "answer 2", "last"]
    assert "its oldest 2 questions are forgotten" in capsys.readouterr().err
    peer.room = 1
    with pytest.raises(PromptTooLong):
        await chat._ask()
