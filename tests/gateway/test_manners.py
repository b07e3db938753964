"""What clients of other servers expect: scoring, vectors, tokens, continuation, harmless fields, names, headers."""

from __future__ import annotations

import json
import socket
from functools import partial
from typing import Any

import openai
import pytest
import torch
import trio

from tests.gateway.conftest import COLOURS, NAME, Door, OpenDoor
from tests.swarm.conftest import Truth, all_leases_returned

TEXT = "A cat sat on the mat, and the dog"


def logprobs_of(truth: Truth, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return truth.model(torch.tensor([ids])).logits[0].log_softmax(-1)


async def complete(door: Door, **asked: Any) -> Any:
    return await trio.to_thread.run_sync(partial(door.client.completions.create, model=NAME, **asked))


async def test_a_prompt_is_scored_as_transformers_does(open_door: OpenDoor, smollm: Truth) -> None:
    ids = smollm.tokenizer(TEXT)["input_ids"]
    truth = logprobs_of(smollm, ids)
    async with open_door() as door:
        for prompt in (TEXT, ids):
            answer = await complete(door, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
            choice = answer.choices[0]
            assert choice.text == TEXT
            assert choice.logprobs.token_logprobs[0] is None
            found = torch.tensor(choice.logprobs.token_logprobs[1:])
            wanted = torch.tensor([float(truth[at, token]) for at, token in enumerate(ids[1:])])
            assert torch.allclose(found, wanted, atol=1e-3)
            assert choice.logprobs.tokens == [smollm.tokenizer.decode([each]) for each in ids]
            likeliest = [smollm.tokenizer.decode([int(row.argmax())]) for row in truth[:-1]]
            assert [max(top, key=lambda text: top[text]) for top in choice.logprobs.top_logprobs[1:]] == likeliest
            assert answer.usage.completion_tokens == 0
        longer = (await complete(door, prompt=ids, max_tokens=3, echo=True, logprobs=1)).choices[0]
        assert len(longer.logprobs.token_logprobs) == len(ids) + 3
        assert longer.text.startswith(TEXT)
        asked = partial(complete, door, prompt=[TEXT, "Two"], max_tokens=2, echo=True, logprobs=0)
        both = await asked()
        assert [each.text[:3] for each in both.choices] == ["A c", "Two"]
        assert all(len(each) == 1 for each in both.choices[1].logprobs.top_logprobs[1:]), "0: the chosen token"
        with pytest.raises(openai.BadRequestError, match="goes with echo"):
            await complete(door, prompt=TEXT, max_tokens=0)
        await all_leases_returned(door.server)


async def test_a_vector_is_the_mean_of_the_last_hidden_states(open_door: OpenDoor, smollm: Truth) -> None:
    ids = smollm.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        hidden = smollm.model.model(torch.tensor([ids])).last_hidden_state[0]
    async with open_door() as door:
        answer = await trio.to_thread.run_sync(
            partial(door.client.embeddings.create, model=NAME, input=[TEXT, "x"])  # base64 by default
        )
        found = torch.tensor(answer.data[0].embedding)
        assert torch.allclose(found, torch.nn.functional.normalize(hidden.mean(0), dim=0), atol=1e-4)
        assert answer.usage.prompt_tokens == len(ids) + 1
        last = await door.post("/v1/embeddings", {"model": NAME, "input": TEXT, "pooling": "last"})
        vector = torch.tensor(last.json()["data"][0]["embedding"])
        assert torch.allclose(vector, torch.nn.functional.normalize(hidden[-1], dim=0), atol=1e-4)
        for change, param in (
            ({"input": []}, "input"),
            ({"dimensions": 3}, "dimensions"),
            ({"pooling": "x"}, "pooling"),
        ):
            error = await door.post("/v1/embeddings", {"model": NAME, "input": "x", **change})
            assert (error.status_code, error.json()["error"]["param"]) == (400, param)
        await all_leases_returned(door.server)


async def test_tokens_and_back(open_door: OpenDoor, smollm: Truth) -> None:
    ids = smollm.tokenizer(TEXT)["input_ids"]
    async with open_door() as door:
        for body in ({"model": NAME, "prompt": TEXT}, {"content": TEXT}):
            told = (await door.post("/tokenize", body)).json()
            assert (told["tokens"], told["count"], told["max_model_len"]) == (ids, len(ids), 8192)
        chat = (await door.post("/tokenize", {"model": NAME, "messages": COLOURS})).json()
        wanted = smollm.tokenizer.apply_chat_template(COLOURS, add_generation_prompt=True)["input_ids"]
        assert chat["tokens"] == wanted
        assert (await door.post("/detokenize", {"model": NAME, "tokens": ids})).json()["prompt"] == TEXT
        assert (await door.post("/detokenize", {"tokens": [-1]})).status_code == 400
        listed = (await door.get("/v1/models")).json()["data"][0]
        assert (listed["id"], listed["max_model_len"]) == (NAME, 8192)
        assert (await door.get("/version")).json()["version"]
        assert (await door.get("/ready")).status_code == 200
    async with open_door(range(10)) as door:
        ready = await door.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["missing_blocks"] == {NAME: list(range(10, 30))}
        assert (await door.get("/health")).status_code == 200


async def test_a_last_message_of_the_assistant_is_continued(open_door: OpenDoor, smollm: Truth) -> None:
    history = [*COLOURS, {"role": "assistant", "content": "Sure: red,"}]
    prompt = smollm.tokenizer.apply_chat_template(
        history, continue_final_message=True, add_generation_prompt=False, return_tensors="pt"
    )
    output = smollm.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    wanted = smollm.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    async with open_door() as door:

        async def ask(**change: Any) -> Any:
            return await door.post(
                "/v1/chat/completions", {"model": NAME, "messages": history, "max_tokens": 8, **change}
            )

        for change in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
            answer = (await ask(**change)).json()
            assert answer["choices"][0]["message"]["content"] == wanted
        anew = (await ask(continue_final_message=False)).json()
        assert anew["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]
        assert (await ask(continue_final_message=True, add_generation_prompt=True)).status_code == 400


async def test_harmless_fields_and_running_usage(open_door: OpenDoor) -> None:
    harmless = {
        "keep_alive": "5m", "cache_prompt": True, "user": "x", "store": False, "priority": 1, "id_slot": -1,
        "timings_per_token": False, "skip_special_tokens": True, "n_probs": 0, "verbosity": "low",
    }  # fmt: skip
    stream = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    async with open_door() as door:
        body = {"model": NAME, "messages": COLOURS, "max_tokens": 3, **harmless, **stream}
        answer = await door.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        counts = [each["usage"]["completion_tokens"] for each in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 3


async def test_every_answer_has_an_id_and_hosts_are_checked(open_door: OpenDoor) -> None:
    async with open_door() as door:
        assert (await door.get("/health", **{"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
        made = [(await door.get("/health", **{"x-request-id": "a b"})).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        for path, shape in (
            ("/v1/messages", {"type", "error"}),
            ("/api/chat", {"error"}),
            ("/v1/responses", {"error"}),
        ):
            refused = await door.post(path, {"model": 1})
            assert refused.status_code == 400
            assert set(refused.json()) == shape
            assert refused.headers["x-request-id"]
        port = int(door.url.rpartition(":")[2])
        request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
            b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        )
        with trio.fail_after(20):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                await stream.send_all(request)
                answer = b"".join([part async for part in stream])
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1") == 1, "the connection ended: what followed is not taken for a request"


@pytest.mark.parametrize(
    ("hosts", "host", "status"),
    [
        ((), "evil.example", 403),
        ((), "192.168.1.7:8000", 200),
        ((), socket.gethostname(), 200),
        (("my.example",), "my.example", 200),
        (("*",), "evil.example", 200),
    ],
)
async def test_beyond_this_machine_names_of_strangers_are_refused(
    open_door: OpenDoor, hosts: tuple[str, ...], host: str, status: int
) -> None:
    async with open_door(bind="0.0.0.0:0", hosts=hosts) as door:
        url = door.url.replace("0.0.0.0", "127.0.0.1")
        door.url = url
        assert (await door.get("/health", host=host)).status_code == status
