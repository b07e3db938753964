"""OpenAI's own client, curl and bare HTTP against a door over a real model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import trio

from petals.gateway.errors import ApiError
from petals.gateway.history import SAMPLES, History, Reading
from petals.gateway.keys import Limits, create_key, load_keys
from petals.gateway.limits import Allowance
from petals.protocols.errors import UserError
from tests.gateway.conftest import COLOURS, NAME, Door, OpenDoor
from tests.swarm.conftest import Truth, all_leases_returned

LONG = {"model": NAME, "messages": COLOURS, "max_tokens": 800}


def expected_ids(truth: Truth, tokens: int, **settings: Any) -> list[int]:
    inputs = truth.tokenizer.apply_chat_template(COLOURS, add_generation_prompt=True, return_tensors="pt")
    output = truth.model.generate(**inputs, max_new_tokens=tokens, **{"do_sample": False, **settings})
    return output[0, inputs["input_ids"].shape[1] :].tolist()


async def test_the_official_client_reads_what_transformers_says(open_door: OpenDoor, smollm: Truth) -> None:
    ids = expected_ids(smollm, 24)
    text = smollm.tokenizer.decode(ids, skip_special_tokens=True)
    async with open_door() as door:

        def whole() -> Any:
            return door.client.chat.completions.create(
                model=NAME, messages=COLOURS, max_tokens=24, logprobs=True, top_logprobs=2
            )

        answer = await trio.to_thread.run_sync(whole)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 24
        assert answer.usage.prompt_tokens == len(
            smollm.tokenizer.apply_chat_template(COLOURS, add_generation_prompt=True)["input_ids"]
        )
        chances = answer.choices[0].logprobs.content
        assert [each.token for each in chances] == [smollm.tokenizer.decode([each]) for each in ids]
        assert all(each.logprob == each.top_logprobs[0].logprob <= 0 for each in chances), "greedy takes the likeliest"
        assert all(len(each.top_logprobs) == 2 for each in chances)

        def streamed() -> list[Any]:
            return list(
                door.client.chat.completions.create(
                    model=NAME,
                    messages=COLOURS,
                    max_completion_tokens=24,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )

        chunks = await trio.to_thread.run_sync(streamed)
        assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "length"
        assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
        listed = await trio.to_thread.run_sync(door.client.models.list)
        assert [each.id for each in listed.data] == [NAME]
        await all_leases_returned(door.server)


async def test_plain_completions(open_door: OpenDoor, smollm: Truth) -> None:
    prompt = "A cat sat on"
    ids = smollm.tokenizer(prompt)["input_ids"]
    told = smollm.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    async with open_door() as door:
        ask = partial(door.client.completions.create, model=NAME, prompt=[prompt, prompt], max_tokens=8, logprobs=1)
        answer = await trio.to_thread.run_sync(ask)
        assert [each.text for each in answer.choices] == [smollm.tokenizer.decode(told)] * 2
        assert answer.usage.prompt_tokens == 2 * len(ids)
        assert answer.usage.completion_tokens == 16
        offsets = answer.choices[0].logprobs.text_offset
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        asked = partial(door.client.completions.create, model=NAME, prompt=["A dog", prompt], max_tokens=8, echo=True)
        echoed = await trio.to_thread.run_sync(partial(asked, best_of=2, n=2, temperature=0))
        assert [each.text.startswith(("A dog", prompt)) for each in echoed.choices] == [True] * 4
        assert echoed.choices[2].text == prompt + answer.choices[0].text
        chunks = await trio.to_thread.run_sync(lambda: list(asked(stream=True)))
        text = "".join(each.choices[0].text for each in chunks if each.choices[0].index == 1)
        assert text == echoed.choices[2].text
        by_ids = await trio.to_thread.run_sync(
            partial(door.client.completions.create, model=NAME, prompt=ids, max_tokens=8)
        )
        assert by_ids.choices[0].text == answer.choices[0].text


async def test_sampling_stops_and_penalties(open_door: OpenDoor, smollm: Truth) -> None:
    text = smollm.tokenizer.decode(expected_ids(smollm, 24))
    async with open_door() as door:

        async def ask(**settings: Any) -> Any:
            asked = {"model": NAME, "messages": COLOURS, "max_tokens": 24, **settings}
            return await trio.to_thread.run_sync(partial(door.client.chat.completions.create, **asked))

        cut = text[9:16]  # over several tokens
        answer = await ask(stop=[cut, "never said"])
        assert answer.choices[0].message.content == text[: text.index(cut)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 24

        first, again = [await ask(temperature=1.2, seed=5, n=3) for _ in range(2)]
        texts = [each.message.content for each in first.choices]
        assert texts == [each.message.content for each in again.choices]
        assert len(set(texts)) == 3
        greedy = await ask(temperature=0, seed=5)
        assert greedy.choices[0].message.content == text

        penalised = await ask(frequency_penalty=2.0, presence_penalty=2.0, logprobs=True)
        tokens = [each.token for each in penalised.choices[0].logprobs.content]
        plain = [smollm.tokenizer.decode([each]) for each in expected_ids(smollm, 24)]
        assert len(set(tokens)) > len(set(plain)), "a penalty against repetition brings other words"


async def test_requests_share_the_swarm(open_door: OpenDoor, smollm: Truth) -> None:
    text = smollm.tokenizer.decode(expected_ids(smollm, 12))
    async with open_door() as door:
        answers: list[str] = []

        async def ask() -> None:
            answer = await door.post("/v1/chat/completions", {"model": NAME, "messages": COLOURS, "max_tokens": 12})
            answers.append(answer.json()["choices"][0]["message"]["content"])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert answers == [text] * 5


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_frees_the_caches(open_door: OpenDoor, stream: bool) -> None:
    async with open_door() as door:
        inbound = door.server.server.inbound
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:

                async def hang_up() -> None:
                    while not inbound.sessions:  # noqa: ASYNC110  # a poll of the state waited for
                        await trio.sleep(0.001)
                    scope.cancel()

                nursery.start_soon(hang_up)
                await door.post("/v1/chat/completions", {**LONG, "stream": stream})
        assert scope.cancelled_caught
        await all_leases_returned(door.server)
        with trio.fail_after(10):
            while "answers_active 0" not in (await door.get("/metrics")).text:
                pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl(open_door: OpenDoor) -> None:
    async with open_door() as door:
        body = json.dumps({"model": NAME, "messages": COLOURS, "max_tokens": 4, "stream": True})
        command = ["curl", "-sN", f"{door.url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body]
        result = await trio.run_process(command, capture_stdout=True)
        lines = [line for line in result.stdout.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk"


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}, "messages[0].content[0].y"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "messages[0].tool_calls[0].id"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"n": 17}, "n"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"seed": 1 << 64}, "seed"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"tools": [{}]}, "tools[0].type"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"regex": "a", "choice": ["b"]}, "choice"),
    ({"regex": "(?=a)b"}, "regex"),
    ({"choice": []}, "choice"),
    ({"grammar": "start: nowhere"}, "grammar"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema"),
    ({"structured_outputs": {"json": 1}}, "structured_outputs.json"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"surprise": 1}, "surprise"),
    ({"model": 7}, "model"),
]


async def test_bad_input_is_told_in_openais_words(open_door: OpenDoor) -> None:
    async with open_door(max_body_bytes=100_000) as door:
        path = "/v1/chat/completions"
        good = {"model": NAME, "messages": COLOURS, "max_tokens": 2}
        for change, param in WRONG:
            error = await refused(door, path, json.dumps(good | change).encode(), 400)
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param, error
        for broken in (b"", b"{", b"[]", b"[" * 50_000, b'{"model": NaN}', b"\xff", b"1" * 5000):
            await refused(door, path, broken, 400)
        assert (await refused(door, path, b" " * 100_001, 413))["code"] == "request_too_large"
        missing = await refused(door, path, json.dumps(good | {"model": "gpt-9"}).encode(), 404)
        assert missing["code"] == "model_not_found"
        too_long = await refused(door, path, json.dumps(good | {"max_tokens": 100_000}).encode(), 400)
        assert too_long["code"] == "context_length_exceeded"
        await refused(door, "/v1/completions", json.dumps({"model": NAME, "prompt": [-1]}).encode(), 400)
        plain = {"model": NAME, "prompt": "A cat", "max_tokens": 1}
        for change in ({"best_of": 3}, {"suffix": "x"}):
            error = await refused(door, "/v1/completions", json.dumps(plain | change).encode(), 400)
            assert error["code"] == "unsupported_parameter"
            assert error["param"] in change
        for path_of_others in ("/v1/nowhere", "/v1/audio/speech", "/v1/images/generations"):
            error = await refused(door, path_of_others, b"{}", 404)
            assert error["code"] == "unknown_url"
            assert "/v1/chat/completions" in error["message"]
        assert "ends in /v1" in (await refused(door, "/chat/completions", b"{}", 404))["message"]
        assert (await refused(door, "/v1/models", b"{}", 405))["code"] == "method_not_supported"
        form = await trio.to_thread.run_sync(lambda: httpx.post(door.url + path, data={"model": NAME}))
        assert form.status_code == 400
        assert (await door.post(path, good, host="evil.example")).status_code == 403
        with pytest.raises(openai.NotFoundError):
            await trio.to_thread.run_sync(partial(door.client.chat.completions.create, model="gpt-9", messages=COLOURS))
        assert (await door.post(path, good)).status_code == 200  # the door is none the worse


async def refused(door: Door, path: str, body: bytes, status: int) -> dict[str, Any]:
    response = await door.post(path, body)
    assert response.status_code == status, (body[:100], response.text)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def test_more_than_may_wait_is_told_to_come_back(open_door: OpenDoor) -> None:
    async with open_door(max_answers=2, max_waiting=0) as door:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(door.post, "/v1/chat/completions", LONG | {"n": 2})
            with trio.fail_after(30):
                while "answers_active 2" not in (await door.get("/metrics")).text:
                    pass
            response = await door.post("/v1/chat/completions", LONG)
            nursery.cancel_scope.cancel()
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        never = await door.post("/v1/chat/completions", LONG | {"n": 3})
        assert never.status_code == 400
        assert "at most 2" in never.json()["error"]["message"]


async def test_missing_blocks_are_a_503_that_names_them(open_door: OpenDoor) -> None:
    async with open_door(range(10)) as door:
        for stream in (True, False):
            response = await door.post("/v1/chat/completions", {"model": NAME, "messages": COLOURS, "stream": stream})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "missing_blocks"
            assert "10:30" in response.json()["error"]["message"]
        swarm = (await door.get("/api/swarm")).json()["models"][0]
        assert swarm["health"] == "broken"
        assert swarm["weakest"] == [10, 30]


async def test_keys(open_door: OpenDoor, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = create_key(file, "for a friend")
    create_key(file)
    assert key not in file.read_text()
    assert len(load_keys(file)) == 2
    async with open_door(api_keys=file) as door:
        good = {"model": NAME, "messages": COLOURS, "max_tokens": 2}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": key}):
            response = await door.post("/v1/chat/completions", good, **headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for path in ("/v1/models", "/metrics", "/api/swarm"):
            assert (await door.get(path)).status_code == 401
            assert (await door.get(path, authorization=f"Bearer {key}")).status_code == 200
        assert (await door.get("/")).status_code == 200
        authorised = await door.post("/v1/chat/completions", good, authorization=f"Bearer {key}")
        assert authorised.status_code == 200
    (tmp_path / "other").write_text("hunter2\n")
    with pytest.raises(UserError, match="line 1"):
        load_keys(tmp_path / "other")


async def test_a_key_may_ask_so_much_and_no_more(open_door: OpenDoor, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    often, much, free = [
        create_key(file, "a friend", limits) for limits in (Limits(requests_per_minute=2), Limits(answers=1), Limits())
    ]
    chat, good = "/v1/chat/completions", {"model": NAME, "messages": COLOURS, "max_tokens": 2}
    async with open_door(api_keys=file) as door:
        statuses = [(await door.get("/v1/models", authorization=f"Bearer {often}")).status_code for _ in range(2)]
        assert statuses == [200, 200]
        refused = await door.post(chat, good, authorization=f"Bearer {often}")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        looking = await door.get("/api/swarm", authorization=f"Bearer {often}")
        assert looking.status_code == 200, "the swarm page asks often, and is not counted"
        refused = await door.post(chat, good | {"n": 2}, authorization=f"Bearer {much}")
        assert refused.status_code == 400, "it could never be"
        assert "at most 1 " in refused.json()["error"]["message"]
        for key in (much, free):
            assert (await door.post(chat, good, authorization=f"Bearer {key}")).status_code == 200


def test_requests_grow_back() -> None:
    now = 0.0
    allowance = Allowance(Limits(requests_per_minute=3), lambda: now)
    for _ in range(3):
        allowance.take_request()
    with pytest.raises(ApiError) as caught:
        allowance.take_request()
    assert caught.value.retry_after_s == pytest.approx(20)
    now += 20
    allowance.take_request()
    now += 1e6
    for _ in range(3):
        allowance.take_request()
    with pytest.raises(ApiError):
        allowance.take_request()


def test_limits_stand_in_the_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    create_key(file, "a friend", Limits(requests_per_minute=60, answers=2))
    create_key(file, "another", Limits(answers=3))
    assert list(load_keys(file).values()) == [Limits(requests_per_minute=60, answers=2), Limits(answers=3)]
    assert "requests_per_minute=60 answers=2 a friend" in file.read_text()
    file.write_text(f"{'0' * 64} answers=0 a friend\n")
    with pytest.raises(UserError, match="line 1: answers must be at least 1"):
        load_keys(file)


async def test_what_servers_had_kept_is_told(open_door: OpenDoor) -> None:
    async with open_door() as door:
        body = {"model": NAME, "messages": [{"role": "user", "content": "Name three colours. " * 12}], "max_tokens": 2}
        first, again = [(await door.post("/v1/chat/completions", body)).json()["usage"] for _ in range(2)]
        assert first["prompt_tokens_details"] == {"cached_tokens": 0}
        kept = again["prompt_tokens_details"]["cached_tokens"]
        assert 0 < kept < again["prompt_tokens"]
        assert f"petals_reused_tokens_total {kept}\n" in (await door.get("/metrics")).text


def test_history_forgets_and_tells_rates() -> None:
    now, tokens = 0.0, 0
    history = History(lambda: Reading(tokens, 2 * tokens, 1, 3), lambda: now)
    for step in range(SAMPLES + 5):
        now, tokens = now + 2.0, tokens + step
        history.take()
    told = history.as_json()
    assert len(told["samples"]) == told["room"] == SAMPLES
    last = SAMPLES + 4
    assert told["samples"][-1] == {"generated_per_s": last, "prompt_per_s": last / 2, "answers": 1, "sessions": 3}


async def test_foreign_pages_are_let_in_only_when_named(open_door: OpenDoor) -> None:
    origin = "https://friend.example"
    async with open_door(cors=(origin,)) as door:
        assert (await door.get("/v1/models", origin=origin)).headers["access-control-allow-origin"] == origin
        assert (
            "access-control-allow-origin" not in (await door.get("/v1/models", origin="https://evil.example")).headers
        )
    async with open_door() as door:
        assert "access-control-allow-origin" not in (await door.get("/v1/models", origin=origin)).headers
        page = await door.get("/")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert (await door.get("/", **{"if-none-match": page.headers["etag"]})).status_code == 304
