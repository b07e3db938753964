"""`petals peer --chat`: a conversation in the terminal. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import trio

from petals.cli.base.terminal import hush, say
from petals.cli.conversation import Composer, Conversation, printable
from petals.cli.peer import summary
from petals.models.progress import counting_seconds
from petals.protocols.errors import SwarmError, UserError

if TYPE_CHECKING:
    from petals.peer.client.generation.generation import TokenStream
    from petals.peer.client.generation.generation_options import GenerationOptions
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.node import Peer

HELP = """\
/reset      forget the conversation (the system prompt stays)
/route      who computed the last answer, and how fast
/save FILE  write the conversation as JSON
/help       this
/quit       leave; Ctrl-D does too
A line that ends in \\ goes on in the next one; a line of three quotes (\"\"\") begins and ends a longer message.
Ctrl-C stops the answer; what has come of it stays in the conversation."""


async def chat(peer: Peer, options: GenerationOptions, client: ClientOptions, *, system: str | None) -> None:
    """Talk until the user leaves.

    Raises:
        MissingBlocks: names the blocks nobody holds. UserError: a model that was not made for chats.
    """
    asked = await peer.client()
    await asked.ready(client)
    _, tokenizer = await asked.language_model(client.head_quant)
    if tokenizer.chat_template is None:
        raise UserError(f'{asked.checkpoint.name} has no chat template: use --generate "..." with it')
    talk = _Chat(peer, options, client, Conversation(system))
    talk.say(f"{asked.checkpoint.name}; /help says what can be typed, Ctrl-D leaves")
    with trio.open_signal_receiver(signal.SIGINT) as interrupts, _terminal_put_back():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk.stop_answers, interrupts)
            await talk.run()
            nursery.cancel_scope.cancel()


class _Chat:
    def __init__(
        self,
        peer: Peer,
        options: GenerationOptions,
        client: ClientOptions,
        conversation: Conversation,
    ) -> None:
        self._peer = peer
        self._options = options
        self._client = client
        self._conversation = conversation
        self._composer = Composer()
        self._answering: trio.CancelScope | None = None
        self._last: TokenStream | None = None

    async def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then has a history and can be edited
        while True:
            try:  # given up, not waited for, when the program is told to end: nobody may ever type again
                line = await trio.to_thread.run_sync(
                    input,
                    "... " if self._composer.waiting else ">>> ",
                    abandon_on_cancel=True,  # type: ignore[call-arg]  # trio_typing knows its old name
                )
            except EOFError:
                print(flush=True)
                return
            fresh = not self._composer.waiting
            message = self._composer.add(line)
            if not message:
                continue
            if fresh and message.startswith("/"):
                if not await self._command(message):
                    return
            else:
                await self._answer(message)

    async def stop_answers(self, interrupts: AsyncIterator[int]) -> None:
        """What Ctrl-C does."""
        async for _ in interrupts:
            if self._answering is not None:
                self._answering.cancel()
            else:
                self._composer.clear()
                print("\n(Ctrl-D or /quit leaves)", file=sys.stderr, flush=True)
                print(f">>> {_typed()}", end="", flush=True)  # input() goes on where it was

    async def _command(self, message: str) -> bool:
        """Whether the chat goes on."""
        word, _, rest = message.partition(" ")
        match word:
            case "/quit" | "/exit":
                return False
            case "/help":
                print(HELP, flush=True)
            case "/reset":
                self._conversation.reset()
                self._last = None
                self.say("a new conversation")
            case "/route":
                self.say("nobody has answered yet" if self._last is None else summary(self._last))
            case "/save":
                await self._save(rest.strip())
            case _:
                self.say(f"no command {word}; /help lists them")
        return True

    async def _save(self, name: str) -> None:
        if not name:
            self.say("say where to: /save FILE")
            return
        text = json.dumps(self._conversation.messages, indent=1, ensure_ascii=False) + "\n"
        try:
            await (await trio.Path(name).expanduser()).write_text(text, encoding="utf-8")
        except (OSError, RuntimeError, ValueError) as error:  # no such home, a NUL in the name
            self.say(f"not saved: {error}")
        else:
            self.say(f"saved {len(self._conversation.messages)} messages to {name}")

    async def _answer(self, question: str) -> None:
        self._conversation.ask(question)
        text = ""
        with ExitStack() as waiting, trio.CancelScope() as self._answering:
            try:
                stream = self._last = await self._ask()
                async with stream:
                    waiting.enter_context(counting_seconds(say, f"computing {len(stream.prompt_ids)} tokens of prompt"))
                    async for token in stream:
                        waiting.close()
                        hush()
                        text += token.text
                        print(printable(token.text), end="", flush=True)
            except SwarmError as error:
                self.say(" ".join(str(error).split()))
        hush()
        stopped, self._answering = self._answering.cancelled_caught, None
        self._conversation.answered(text)
        print(" [stopped]" if stopped else "", flush=True)

    async def _ask(self) -> TokenStream:
        """Let the model go on with the newest part of the conversation that it can look back on.

        Raises:
            UserError: the last question alone is too long, or the model's template refuses the conversation.
        """
        from petals.peer.client.generation.prompts import Chat, PromptTooLong

        forgotten = 0
        while True:
            prompt = Chat(self._conversation.messages)
            try:
                stream = await self._peer.generate(prompt, options=self._options, client=self._client)
            except PromptTooLong:
                if not self._conversation.forget():
                    raise
                forgotten += 1
                continue
            if forgotten:
                self.say(f"the conversation has grown too long; its oldest {forgotten} questions are forgotten")
            return stream

    def say(self, line: str) -> None:
        say(line)


def _typed() -> str:
    """What stands in the line that is being edited."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline is not None and sys.stdin.isatty() else ""


@contextmanager
def _terminal_put_back() -> Iterator[None]:
    """An input() given up in the middle leaves the terminal without echo: put it back as it was."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import termios
    except ImportError:  # not a Unix
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
