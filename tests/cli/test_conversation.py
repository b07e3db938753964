"""What a chat remembers, and how typed lines become messages."""

from __future__ import annotations

from petals.cli.conversation import BLOCK, MAX_MESSAGE_CHARS, Composer, Conversation, Message, printable


def one_token_a_message(messages: list[Message]) -> list[int]:
    return list(range(len(messages)))


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
    ids, dropped = talk.fit(4, one_token_a_message)
    assert (len(ids), dropped) == (4, 2)
    assert [each["content"] for each in talk.messages] == ["be kind", "question 2", "answer 2", "last"]
    assert talk.fit(1, one_token_a_message) == ([0, 1], 1), "the last question stays though it does not fit"
    talk.answered("")
    assert talk.messages == [{"role": "system", "content": "be kind"}], "a question without an answer is taken back"


def test_a_terminal_obeys_no_model() -> None:
    assert printable("a\x1b[2J\x9b1m\x07\r\tb\n") == "a[2J1m\tb\n"
