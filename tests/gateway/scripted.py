"""A model that says what a test wants: real peers, real blocks, real sampling; only its logits are written by hand.

A tiny checkpoint has SmolLM2's tokenizer and one family's chat template. In front of the logits processors of every
generation stands one that makes the next token of a script by far the likeliest: a script is a function from the text
of a prompt to what the model answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from petals.models.source.checkpoint import open_checkpoint
from petals.peer.client.generation.generation import _Work

Script = Callable[[str], str]

SHOWN_TOOLS = """\
{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor -%}
{{ 'Answer with HOW' }}{{ '<|im_end|>\\n' }}{% endif -%}
"""
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif -%}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor -%}
{{ '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if THINKS and enable_thinking is not defined %}
{{- '<think>\\n' }}{% endif %}{% endif -%}"""

HOW = {
    "hermes": "<tool_call>",
    "qwen_xml": "<tool_call><function=",
    "llama": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "mistral_args": "[TOOL_CALLS] [ARGS]",
    "deepseek": "<｜tool▁calls▁begin｜> ```json",
    "deepseek_31": "<｜tool▁calls▁begin｜>",
    "harmony": "<|channel|>",
    "json": "JSON",
}
"""What of a family's template its format is known by."""
SPECIAL = {
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]"),
    "deepseek": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    "harmony": ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
}
SPECIAL["deepseek_31"] = SPECIAL["deepseek"]


def save_scripted(directory: Path, form: str = "hermes", *, thinks: bool = False, tools: bool = True) -> Path:
    """A tiny checkpoint whose template is one family's."""
    tokenizer = AutoTokenizer.from_pretrained(str(open_checkpoint().directory))
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL.get(form, ()))})
    template = (SHOWN_TOOLS.replace("HOW", HOW[form]) if tools else "") + CHATML
    template = template.replace("THINKS", "true" if thinks else "false")
    if not thinks:
        template = template.replace("<think>", "").replace("</think>", "")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8,  # padded, as real heads are
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=65536,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


_PROCESSORS = _Work._processors


class _Scripted(LogitsProcessor):
    def __init__(self, ids: Sequence[int], prompt_length: int) -> None:
        self._ids = ids
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self._prompt_length
        scores = torch.zeros_like(scores)
        scores[:, self._ids[min(at, len(self._ids) - 1)]] = 50.0
        return scores


def follow(monkeypatch: pytest.MonkeyPatch, script: Script) -> list[str]:
    """Let every generation say what `script` says; returns the prompts, as they come."""
    prompts: list[str] = []

    def scripted(work: Any) -> list[LogitsProcessor]:
        tokenizer = work._tokenizer
        prompt = str(tokenizer.decode(work._prompt_ids))
        prompts.append(prompt)
        ids = tokenizer(script(prompt), add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
        return [_Scripted([*ids, end], len(work._prompt_ids)), *_PROCESSORS(work)]

    monkeypatch.setattr(_Work, "_processors", scripted)
    return prompts
