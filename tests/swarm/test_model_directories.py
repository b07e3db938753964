"""Model directories that people really have: each answers as transformers does, or one line says what is ignored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from petals.models.client.generation_settings import read_settings
from petals.models.source.checkpoint import open_checkpoint
from petals.peer.base.config import PeerConfig, ServeConfig
from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.generation.prompts import Chat
from petals.peer.node import open_peer
from petals.protocols.errors import UserError

PROMPT = "A cat sat on the mat and"
NEW = 12
SETTINGS = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four Llama blocks whose greedy tokens vary, with the default model's tokenizer."""
    where = tmp_path_factory.mktemp("directories") / "plain"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SETTINGS)).save_pretrained(where)
    for file in open_checkpoint().directory.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, where)
    return where


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A copy to be edited."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


def theirs(model: Path, prompt: str = PROMPT) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = whole.generate(**inputs, max_new_tokens=NEW, do_sample=False, tokenizer=tokenizer)
    return list(text[0, inputs["input_ids"].shape[1] :].tolist())


async def ours(model: Path, prompt: str | Chat = PROMPT) -> tuple[TokenStream, list[str]]:
    """The answer of a peer that serves the model to itself, and what it said meanwhile."""
    said: list[str] = []
    serve = ServeConfig(blocks=range(4), throughput=100.0, cache_bytes=64 << 20)
    async with open_peer(PeerConfig(model=str(model), serve=serve), progress=said.append) as peer:
        stream = await peer.generate(prompt, options=GenerationOptions(max_new_tokens=NEW))
        async for _ in stream:
            pass
        return stream, said


def ignored(said: list[str]) -> str:
    return "\n".join(line for line in said if line.startswith("generation_config.json"))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"temperature": "hot", "eos_token_id": "</s>"}, "eos_token_id='</s>', temperature='hot'"),
        ({"use_cache": False, "cache_implementation": "static"}, ""),
        ({"custom_generate": "somebody/code", "assistant_ensemble": "other"}, ""),
        ({"do_sample": True, "temperature": 0.7}, ""),
    ],
    ids=lambda case: ",".join(case) if isinstance(case, dict) else "",
)
async def test_settings_that_change_no_greedy_token(plain: Path, model: Path, asked: dict[str, Any], line: str) -> None:
    edit(model / "generation_config.json", **asked)
    stream, said = await ours(model)
    assert stream.token_ids == theirs(plain)
    assert line in ignored(said)
    assert bool(ignored(said)) is bool(line)


async def test_stop_strings_end_the_answer_as_they_end_that_of_transformers(plain: Path, model: Path) -> None:
    whole = theirs(plain)
    word = AutoTokenizer.from_pretrained(plain).decode(whole[5]).strip()
    edit(model / "generation_config.json", stop_strings=[word])
    stream, said = await ours(model)
    assert stream.token_ids == theirs(model)
    assert len(stream.token_ids) < len(whole)
    assert stream.finish_reason == "stop"
    assert not ignored(said)


@pytest.mark.parametrize("content", ["{not json", "[]", "[" * 100_000, '"text"'])
async def test_a_file_that_is_no_json_is_ignored_as_a_whole(plain: Path, model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    stream, said = await ours(model)
    assert stream.token_ids == theirs(plain)
    assert "is no JSON object" in ignored(said)


async def test_a_token_without_an_embedding_is_one_line(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(model)
    prompt = PROMPT + "<|extra|> yes"
    for asked in (prompt, Chat([{"role": "user", "content": prompt}])):
        with pytest.raises(UserError, match=r"makes '<\|extra\|>' token 49152, for which the model has no embedding"):
            await ours(model, asked)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
async def test_the_longest_context_counts_rotary_scaling(model: Path, scaling: dict[str, Any]) -> None:
    edit(model / "config.json", max_position_embeddings=32, rope_scaling=scaling, rope_parameters=scaling)
    prompt = PROMPT * 10  # 70 tokens
    stream, _ = await ours(model, prompt)
    assert stream.token_ids == theirs(model, prompt)
    with pytest.raises(UserError, match="are more than the 128 that model can look back on"):
        await ours(model, PROMPT * 20)


async def test_a_single_file_beside_an_index_is_the_model(plain: Path, model: Path) -> None:
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(**SETTINGS)).save_pretrained(model / "other", max_shard_size="10MB")
    for file in (model / "other").glob("model*"):
        file.rename(model / file.name)
    assert (model / "model.safetensors.index.json").exists()
    stream, _ = await ours(model)
    assert stream.token_ids == theirs(model) == theirs(plain)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
async def test_broken_json_beside_a_model_is_one_line(model: Path, file: str) -> None:
    if file == "model.safetensors.index.json":
        (model / "model.safetensors").unlink()
    (model / file).write_text("{not json")
    with pytest.raises(Exception) as caught:  # its kind is looked at below
        await ours(model)
    assert type(caught.value).__module__ in ("petals.models.errors", "petals.protocols.errors")
    assert "\n" not in str(caught.value)


async def test_a_template_that_raises_is_one_line(model: Path) -> None:
    broken: list[Callable[[], str]] = [
        lambda: "{{ raise_exception('no system message, please') }}",
        lambda: "{{ 1 / 0 }}",
        lambda: "{{ messages[99].content.x.y }}",
        lambda: "{% for",
        lambda: "{{ 'a' + 1 }}",
    ]
    for template in broken:
        (model / "chat_template.jinja").write_text(template())
        with pytest.raises(UserError, match="the chat template of model"):
            await ours(model, Chat([{"role": "user", "content": "hello"}]))


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"suppress_tokens": ["some"]}, "suppress_tokens"),
        ({"bad_words_ids": "all of them"}, "bad_words_ids"),
        ({"eos_token_id": 10**6}, "eos_token_id"),
        ({"sequence_bias": {"not": "a bias"}}, "sequence_bias"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_settings_that_can_not_be_followed_are_left_out(tmp_path: Path, asked: dict[str, Any], left: str) -> None:
    edit(tmp_path / "generation_config.json", top_k=7, **asked)
    config, left_out = read_settings(tmp_path, GenerationConfig(), vocabulary=199)
    assert config.top_k == 7
    assert [line.partition("=")[0] for line in left_out] == [left]
