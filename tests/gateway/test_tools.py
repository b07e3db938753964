"""Tools over every door: each family's way to write calls, grammars where calls are required, histories, streams."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
import trio

from petals.gateway.config import HttpConfig
from petals.gateway.output import HarmonyParser, MarkedParser, Parser, Thought, Words
from petals.gateway.server import open_gateway
from petals.gateway.tool_formats import GENERIC, HERMES, LLAMA, ToolFormat
from petals.gateway.tools import Tool, ToolCall, ToolUse
from tests.gateway.conftest import Door
from tests.gateway.scripted import follow, save_scripted
from tests.swarm.conftest import Swarm

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
ASKED = [{"role": "user", "content": "What is the weather in Rome?"}]
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, OVER, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "qwen_xml": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
    "llama": '{"name": "weather", "parameters": {"city": "Rome"}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]',
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}',
    "deepseek": f'{BEGIN}{ONE}function{SEP}weather\n```json\n{{"city": "Rome"}}\n```{OVER}{END}',
    "deepseek_31": f'{BEGIN}{ONE}weather{SEP}{{"city": "Rome"}}{OVER}{END}',
    "harmony": "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}',
    "json": '{"name": "weather", "arguments": {"city": "Rome"}}',
}

OpenScripted = Callable[..., Any]


@pytest.fixture
def open_scripted(make_swarm: Callable[..., Swarm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenScripted:
    @asynccontextmanager
    async def opened(script: Any, form: str = "hermes", *, thinks: bool = False, tools: bool = True, **settings: Any):  # type: ignore[no-untyped-def]
        """A door at a peer whose model says what a script says; the prompts it saw are `door.prompts`."""
        swarm = make_swarm(save_scripted(tmp_path / "scripted", form, thinks=thinks, tools=tools))
        server = await swarm.add(range(2))
        asker = await swarm.add()
        said = script if callable(script) else lambda prompt: script
        prompts = follow(monkeypatch, said)
        async with open_gateway(asker, HttpConfig(bind="127.0.0.1:0", **settings)) as url:
            door = Door(url, server, asker)
            door.prompts = prompts
            door.model = await _name(url)
            yield door
            await trio.to_thread.run_sync(door.client.close)

    return opened


async def _name(url: str) -> str:
    async with httpx.AsyncClient() as client:
        return str((await client.get(f"{url}/v1/models")).json()["data"][0]["id"])


async def called(door: Door, **asked: Any) -> Any:
    request = {"model": door.model, "messages": ASKED, "tools": [WEATHER, TIME], **asked}
    return await trio.to_thread.run_sync(partial(door.client.chat.completions.create, **request))


@pytest.mark.parametrize("form", CALLS)
async def test_each_familys_calls_are_read_and_can_be_forced(open_scripted: OpenScripted, form: str) -> None:
    async with open_scripted(CALLS[form], form) as door:
        for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
            answer = (await called(door, tool_choice=choice)).choices[0]
            assert answer.finish_reason == "tool_calls", (choice, answer)
            call = answer.message.tool_calls[0]
            assert call.function.name == "weather"
            assert json.loads(call.function.arguments) == {"city": "Rome"}
            assert answer.message.content in (None, "")
            assert call.id
        assert '"weather"' in door.prompts[0], "the template shows tools"
        chunks = await trio.to_thread.run_sync(
            lambda: list(
                door.client.chat.completions.create(
                    model=door.model, messages=ASKED, tools=[WEATHER, TIME], stream=True
                )
            )
        )
        deltas = [each.choices[0].delta for each in chunks if each.choices]
        streamed = [call for delta in deltas for call in delta.tool_calls or []]
        assert streamed[0].function.name == "weather"
        assert json.loads("".join(each.function.arguments for each in streamed)) == {"city": "Rome"}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        if form == "harmony":
            assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "I look."


@pytest.mark.parametrize("form", CALLS)
async def test_what_must_be_a_call_is_one_whatever_the_model_says(open_scripted: OpenScripted, form: str) -> None:
    async with open_scripted("I would rather talk about something else, and for a long time", form) as door:
        answer = (await called(door, tool_choice="required", max_tokens=200, parallel_tool_calls=False)).choices[0]
        if answer.finish_reason == "length":  # the model fills a string with chatter: it still is inside of a call
            return
        assert answer.finish_reason == "tool_calls", answer
        arguments = json.loads(answer.message.tool_calls[0].function.arguments)
        if answer.message.tool_calls[0].function.name == "weather":
            assert isinstance(arguments["city"], str)


async def test_text_before_calls_and_several_of_them(open_scripted: OpenScripted) -> None:
    second = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    async with open_scripted(f"I look.\n{CALLS['hermes']}\n{second}") as door:
        message = (await called(door)).choices[0].message
        assert message.content == "I look."
        assert [each.function.name for each in message.tool_calls] == ["weather", "time"]
        alone = (await called(door, parallel_tool_calls=False)).choices[0].message
        assert [each.function.name for each in alone.tool_calls] == ["weather"]
        none = (await called(door, tool_choice="none")).choices[0]
        assert none.message.tool_calls is None
        assert "weather" not in door.prompts[-1].split("What is")[0]


async def test_what_is_no_call_is_text_and_counted(open_scripted: OpenScripted) -> None:
    broken = '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'
    async with open_scripted(broken) as door:
        answer = (await called(door)).choices[0]
        assert answer.message.content == broken
        assert answer.finish_reason == "stop"
        assert "petals_tool_calls_failed_total 1\n" in (await door.get("/metrics")).text


async def test_strict_arguments_are_right_even_when_calls_are_free(open_scripted: OpenScripted) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}  # type: ignore[operator]
    said = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'
    async with open_scripted(said) as door:
        free = (await called(door)).choices[0].message
        assert json.loads(free.tool_calls[0].function.arguments) == {"town": "Rome"}
        message = (await called(door, tools=[strict], max_tokens=60)).choices[0].message
        assert "town" not in (message.content or "") + str(message.tool_calls)
    async with open_scripted("Just words.") as door:
        assert (await called(door, tools=[strict])).choices[0].message.content == "Just words."


async def test_a_template_without_tools_is_refused_by_name(open_scripted: OpenScripted) -> None:
    async with open_scripted("hello", tools=False) as door:
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            await called(door)


async def test_a_tool_loop_goes_to_its_end(open_scripted: OpenScripted) -> None:
    """Over OpenAI's chats and responses, Anthropic's messages and Ollama's chats, with the packages of each."""

    def script(prompt: str) -> str:
        return "It is 30 degrees." if "thirty" in prompt else CALLS["hermes"]

    async with open_scripted(script) as door:
        call = (await called(door)).choices[0].message
        result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "thirty"}
        history = [*ASKED, call.model_dump(exclude_none=True), result]
        assert (await called(door, messages=history)).choices[0].message.content == "It is 30 degrees."
        assert '"city": "Rome"' in door.prompts[-1], "the call stands in the history"
        await trio.to_thread.run_sync(_responses_loop, door)
        await trio.to_thread.run_sync(_messages_loop, door)
        await trio.to_thread.run_sync(_ollama_loop, door)


def _responses_loop(door: Door) -> None:
    tool = {"type": "function", "strict": False, **WEATHER["function"]}  # type: ignore[dict-item]
    first = door.client.responses.create(model=door.model, input="What is the weather in Rome?", tools=[tool])
    call = first.output[0]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Rome"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "thirty"}
    items = [{"role": "user", "content": "What is the weather in Rome?"}, call, output]
    second = door.client.responses.create(model=door.model, input=items, tools=[tool])
    assert second.output_text == "It is 30 degrees."
    assert second.status == "completed"
    with door.client.responses.stream(model=door.model, input="What is the weather?", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output[0].name == "weather"
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    with door.client.responses.stream(model=door.model, input="thirty", max_output_tokens=50) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "It is 30 degrees."
    with pytest.raises(openai.BadRequestError, match="keeps no conversations"):
        door.client.responses.create(model=door.model, input="x", previous_response_id="resp_1")


def _messages_loop(door: Door) -> None:
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    with anthropic.Anthropic(base_url=door.url, api_key="none", max_retries=0) as client:
        ask = {"model": door.model, "max_tokens": 100, "tools": [tool]}
        first = client.messages.create(messages=ASKED, system=[{"type": "text", "text": "Be kind."}], **ask)
        assert first.stop_reason == "tool_use"
        call = first.content[0]
        assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "thirty"}]}
        history = [
            *ASKED,
            {"role": "assistant", "content": [each.model_dump(exclude_none=True) for each in first.content]},
            {"role": "user", "content": [result]},
        ]
        second = client.messages.create(messages=history, **ask)
        assert second.content[0].text == "It is 30 degrees."
        assert second.stop_reason == "end_turn"
        assert second.usage.input_tokens + second.usage.cache_read_input_tokens > 10
        with client.messages.stream(messages=ASKED, tool_choice={"type": "any"}, **ask) as stream:
            final = stream.get_final_message()
        assert final.content[0].input == {"city": "Rome"}
        with client.messages.stream(messages=history, **ask) as stream:
            assert "".join(stream.text_stream) == "It is 30 degrees."
        stopped = client.messages.create(messages=history, stop_sequences=["30"], **ask)
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "30")
        assert client.messages.count_tokens(messages=ASKED, model=door.model).input_tokens > 5
        with pytest.raises(anthropic.NotFoundError, match="no model"):
            client.messages.create(**(ask | {"model": "claude", "messages": ASKED}))
        image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
        with pytest.raises(anthropic.BadRequestError, match="neither see nor hear"):
            client.messages.create(messages=[{"role": "user", "content": [image]}], **ask)


def _ollama_loop(door: Door) -> None:
    with ollama.Client(host=door.url) as client:
        _ollama_chat(door, client)


def _ollama_chat(door: Door, client: ollama.Client) -> None:
    assert client.list().models[0].model == door.model
    shown = client.show(door.model)
    assert "tools" in (shown.capabilities or [])
    first = client.chat(door.model, messages=ASKED, tools=[WEATHER])
    calls = first.message.tool_calls or []
    assert (calls[0].function.name, calls[0].function.arguments) == ("weather", {"city": "Rome"})
    history = [*ASKED, first.message, {"role": "tool", "tool_name": "weather", "content": "thirty"}]
    second = client.chat(door.model, messages=history, tools=[WEATHER], options={"num_ctx": 4096, "num_predict": 50})
    assert second.message.content == "It is 30 degrees."
    assert second.done_reason == "stop"
    assert second.eval_count
    parts = list(client.chat(f"{door.model}:latest", messages=history, stream=True, keep_alive="5m"))
    assert "".join(each.message.content or "" for each in parts) == "It is 30 degrees."
    assert parts[-1].done
    said = client.generate(door.model, prompt="thirty", system="Be kind.")
    assert said.response == "It is 30 degrees."
    assert len(client.embed(door.model, input=["a", "b"]).embeddings) == 2
    with pytest.raises(ollama.ResponseError, match="no model"):
        client.chat("llama3", messages=ASKED)


async def test_thoughts_are_told_apart(open_scripted: OpenScripted) -> None:
    async with open_scripted("I think of 7.</think>\n\nIt is 7.", thinks=True) as door:
        message = (await called(door, tools=[])).choices[0].message
        assert (message.reasoning_content, message.content) == ("I think of 7.", "It is 7.")
        assert door.prompts[-1].endswith("<think>\n")
        chunks = await trio.to_thread.run_sync(
            lambda: list(door.client.chat.completions.create(model=door.model, messages=ASKED, stream=True))
        )
        deltas = [each.choices[0].delta for each in chunks]
        assert "".join(getattr(each, "reasoning_content", None) or "" for each in deltas) == "I think of 7."
        assert "".join(each.content or "" for each in deltas) == "It is 7."
        answer = await trio.to_thread.run_sync(partial(door.client.responses.create, model=door.model, input="?"))
        assert [each.type for each in answer.output] == ["reasoning", "message"]
        assert answer.output_text == "It is 7."
        await called(door, tools=[], extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert not door.prompts[-1].endswith("<think>\n")
        await called(door, tools=[], reasoning_effort="none")
        assert not door.prompts[-1].endswith("<think>\n")
        with pytest.raises(openai.BadRequestError, match="not for the chat template"):
            await called(door, tools=[], extra_body={"chat_template_kwargs": {"tokenize": True}})
    async with open_scripted('I think {of}.</think>\n{"a": 7}', thinks=True) as door:
        answer = await called(door, tools=[], response_format={"type": "json_object"})
        assert json.loads(answer.choices[0].message.content) == {"a": 7}, "a grammar holds behind the thoughts"
        assert answer.choices[0].message.reasoning_content == "I think {of}."


TOOLS = ToolUse((Tool("weather", "", WEATHER["function"]["parameters"]), Tool("time", "", {"type": "object"})), "auto")  # type: ignore[index]


def _marked(form: ToolFormat, **settings: bool) -> Callable[[], Parser]:
    return lambda: MarkedParser(TOOLS, form, **({"thinks": False, "thinking": False} | settings))


CITY = ("call", '{"city": "Rome"}')
PARSED: list[tuple[Callable[[], Parser], str, list[tuple[str, str]]]] = [
    (_marked(HERMES), "Let me.\n" + CALLS["hermes"], [("words", "Let me."), ("call", '{"city": "Rome"}')]),
    (_marked(HERMES), "a < b <tool_call>no</tool_call> c", [("words", "a < b <tool_call>no</tool_call> c")]),
    (_marked(HERMES), CALLS["hermes"].removesuffix("</tool_call>"), [("call", '{"city": "Rome"}')]),
    (_marked(HERMES, thinks=True), "<think>\na\n</think>\n\nb", [("thought", "a"), ("words", "b")]),
    (_marked(HERMES, thinks=True), "  b", [("words", "  b")]),
    (_marked(HERMES, thinking=True), "a <b", [("thought", "a <b")]),
    (_marked(LLAMA), "<|python_tag|>" + CALLS["llama"], [("call", '{"city": "Rome"}')]),
    (_marked(LLAMA), CALLS["llama"] + '; {"name": "time", "parameters": {}}', [CITY, ("call", "{}")]),
    (_marked(GENERIC), f"```json\n{CALLS['json']}\n```", [("call", '{"city": "Rome"}')]),
    (_marked(GENERIC), "```py\nx\n```", [("words", "```py\nx\n```")]),
    (_marked(GENERIC), '{"a": 1}', [("words", '{"a": 1}')]),
    (lambda: HarmonyParser(TOOLS), CALLS["harmony"] + "<|call|>", [("thought", "I look."), CITY]),
    (lambda: HarmonyParser(TOOLS), "<|channel|>final<|message|>a <b", [("words", "a <b")]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(PARSED)))
def test_text_is_read_the_same_however_it_is_cut(case: int) -> None:
    make, text, expected = PARSED[case]
    for seed in range(50):
        dice, parser, at = random.Random(seed), make(), 0
        found: list[tuple[str, str]] = []
        while at < len(text):
            length = dice.choice([1, 2, 3, 7, len(text)])
            pieces = parser.add(text[at : at + length])
            at += length
            for piece in [*pieces, *(parser.end() if at >= len(text) else [])]:
                match piece:
                    case ToolCall():
                        found.append(("call", piece.arguments))
                    case Words(said) | Thought(said):
                        kind = "words" if isinstance(piece, Words) else "thought"
                        if found and found[-1][0] == kind:
                            found[-1] = (kind, found[-1][1] + said)
                        else:
                            found.append((kind, said))
        assert found == expected, seed
