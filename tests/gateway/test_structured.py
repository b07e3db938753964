"""Answers that must match: schemas, grammars and choices over a real model, as OpenAI's client asks for them."""

from __future__ import annotations

import json
import re
import threading
from functools import partial
from typing import Any

import openai
import pytest
import torch
import trio
from pydantic import BaseModel

from petals.peer.client import constraints
from petals.peer.client.constraints import MAX_SOURCE, Constraint, ConstraintError, MaskEngine
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.protocols.errors import UserError
from tests.gateway.conftest import COLOURS, NAME, Door, OpenDoor
from tests.swarm.conftest import Truth, all_leases_returned

END = 2


class City(BaseModel):
    name: str
    inhabitants: int


async def ask(door: Door, **asked: Any) -> Any:
    request = {"model": NAME, "messages": COLOURS, "max_tokens": 40, **asked}
    return await trio.to_thread.run_sync(partial(door.client.chat.completions.create, **request))


async def test_openais_client_parses_what_it_asked_for(open_door: OpenDoor) -> None:
    async with open_door() as door:
        parse = partial(
            door.client.chat.completions.parse,
            model=NAME,
            messages=[{"role": "user", "content": "Name a city as JSON."}],
            response_format=City,
            max_tokens=120,
            temperature=0.7,
            seed=1,
        )
        answer = (await trio.to_thread.run_sync(parse)).choices[0]
        assert answer.finish_reason == "stop"
        assert isinstance(answer.message.parsed, City)
        respond = partial(door.client.responses.parse, model=NAME, input="Name a city.", text_format=City)
        assert isinstance((await trio.to_thread.run_sync(respond)).output_parsed, City)
        await all_leases_returned(door.server)


async def test_what_comes_out_matches(open_door: OpenDoor) -> None:
    async with open_door() as door:
        anything = await ask(door, response_format={"type": "json_object"}, max_tokens=200)
        if anything.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(anything.choices[0].message.content), dict)
        chosen = await ask(door, extra_body={"choice": ["crimson", "azure"]}, temperature=1.5, seed=3)
        assert chosen.choices[0].message.content in ("crimson", "azure")
        matched = await ask(door, extra_body={"structured_outputs": {"regex": "#[0-9a-f]{6}"}})
        assert re.fullmatch("#[0-9a-f]{6}", matched.choices[0].message.content)
        gbnf = await ask(door, extra_body={"grammar": 'root ::= "red" | "blue" " " [0-9]+'}, max_tokens=4)
        assert re.match("red$|blue [0-9]*", gbnf.choices[0].message.content)
        lark = await ask(door, extra_body={"grammar": 'start: "a" "b"~3'})
        assert lark.choices[0].message.content == "abbb"
        assert lark.choices[0].finish_reason == "stop"
        many = await ask(door, extra_body={"choice": ["one", "two"]}, n=3, temperature=2, seed=1, logprobs=True)
        assert {each.message.content for each in many.choices} <= {"one", "two"}
        assert all(each.logprob < 0 for each in many.choices[0].logprobs.content), "of the model's own logits"


async def test_the_other_ways_to_choose_tokens(open_door: OpenDoor, smollm: Truth) -> None:
    tokenizer = smollm.tokenizer
    async with open_door() as door:
        plain = (await ask(door, max_tokens=12, logprobs=True)).choices[0]
        first, second = (each.token for each in plain.logprobs.content[:2])
        ids = tokenizer(plain.message.content)["input_ids"]
        away = (await ask(door, logit_bias={str(ids[0]): -100}, max_tokens=12, logprobs=True)).choices[0]
        assert away.logprobs.content[0].token != first
        ended = (await ask(door, extra_body={"stop_token_ids": [ids[1]]})).choices[0]
        assert ended.finish_reason == "stop"
        assert ended.message.content.startswith(first)
        assert second in ended.message.content, "the token itself is said, as with other servers"
        longer = await ask(door, extra_body={"choice": ["a"], "min_tokens": 5})
        assert longer.choices[0].message.content == "a", "a grammar says where its text ends"
        endless = await ask(door, extra_body={"ignore_eos": True}, max_tokens=60)
        assert endless.usage.completion_tokens == 60
        least = await ask(door, extra_body={"min_tokens": 30, "logit_bias": {str(END): 100}}, max_tokens=40)
        assert 30 <= least.usage.completion_tokens < 40
        narrow = await ask(door, temperature=2, seed=9, extra_body={"min_p": 1.0}, max_tokens=12)
        assert narrow.choices[0].message.content == plain.message.content, "only the likeliest is left"
        for field in ({"typical_p": 0.5}, {"repetition_penalty": 1.5}, {"top_k": -1}):
            await ask(door, temperature=1, seed=9, extra_body=field, max_tokens=4)
        inputs = tokenizer.apply_chat_template(COLOURS, add_generation_prompt=True, return_tensors="pt")
        repeated = smollm.model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.5)
        wanted = tokenizer.decode(repeated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found = await ask(door, extra_body={"repetition_penalty": 1.5}, max_tokens=12)
        assert found.choices[0].message.content == wanted
        with pytest.raises(openai.BadRequestError, match="has tokens 0 to"):
            await ask(door, logit_bias={"99999": 1})


async def test_a_part_that_can_not_be_followed_is_named(open_door: OpenDoor) -> None:
    async with open_door() as door:
        for schema, part in (
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"type": "object", "properties": {"a": {"type": "string", "format": "iban"}}}, "iban"),
            ({"type": "what"}, "what"),
            ({"$ref": "#/$defs/Nowhere"}, "Nowhere"),
        ):
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            with pytest.raises(openai.BadRequestError, match=part) as caught:
                await ask(door, response_format=form)
            assert caught.value.param == "response_format"


async def test_python_takes_the_same(open_door: OpenDoor) -> None:
    async with open_door() as door:
        schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
        stream = await door.asker.generate("Some JSON:", json_schema=schema)
        async for _ in stream:
            pass
        assert json.loads(stream.text) == {"a": 7}
        with pytest.raises(UserError, match="give one of"):
            await door.asker.generate("x", regex="a", choice=("b",))
        with pytest.raises(TypeError, match="not both"):
            await door.asker.generate("x", options=GenerationOptions(), regex="a")


def test_a_mask_is_exact_and_pads(smollm: Truth) -> None:
    engine = MaskEngine(smollm.tokenizer)
    mask = engine.compile(Constraint.choice(["red"]), [END])
    wide = torch.zeros(1, len(smollm.tokenizer) + 16)
    scores = mask.apply(wide)
    allowed = {smollm.tokenizer.decode([each]) for each in (scores[0] == 0).nonzero()[:, 0].tolist()}
    assert allowed == {"red"}, "what a text begins with is written as its tokenizer would"
    assert bool((wide == 0).all()), "what came in is not changed"
    mask.advance(smollm.tokenizer("red")["input_ids"][0])
    assert (mask.apply(wide)[0] == 0).nonzero()[:, 0].tolist() == [END]
    with pytest.raises(ConstraintError, match="can not go on"):
        mask.advance(smollm.tokenizer("x")["input_ids"][0])


def test_without_the_engine_the_error_names_it(smollm: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(constraints.importlib, "import_module", missing)
    with pytest.raises(ConstraintError, match=r"pip install 'petals-libp2p\[structured\]'"):
        MaskEngine(smollm.tokenizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constraint.json_schema("[1"),
        lambda: Constraint.json_schema("[1]"),
        lambda: Constraint.regex(" "),
        lambda: Constraint.regex("a" * (MAX_SOURCE + 1)),
        lambda: Constraint.choice([""]),
        lambda: Constraint.choice(["a"] * 2000),
    ],
)
def test_what_is_no_constraint_is_said_at_once(make: Any) -> None:
    with pytest.raises(ConstraintError):
        make()


async def test_a_client_that_leaves_while_its_grammar_is_compiled_frees_its_place(
    open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    compiled = MaskEngine.compile

    def slow(engine: MaskEngine, *rest: Any) -> Any:
        began.set()
        assert go_on.wait(60)
        return compiled(engine, *rest)

    monkeypatch.setattr(MaskEngine, "compile", slow)
    body = {"model": NAME, "messages": COLOURS, "max_tokens": 4, "choice": ["a"]}
    async with open_door(max_answers=1) as door:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(door.post, "/v1/chat/completions", body)
                assert await trio.to_thread.run_sync(began.wait, 60)
                nursery.cancel_scope.cancel()
            with trio.fail_after(30):
                answer = await door.post("/v1/chat/completions", {**body, "choice": None})
            assert answer.status_code == 200, "its place is free, though the engine still works"
        finally:
            go_on.set()
        await all_leases_returned(door.server)
