"""What to generate from: a text, token ids or a conversation; to token ids, and what ends an answer to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from petals.models.source.checkpoint import Checkpoint
from petals.models.source.templates import TEMPLATES, TemplateRefused
from petals.protocols.errors import UserError

MAX_TEMPLATE_CHARS = 256 << 10
"""Parsed here, to see what it reads; the longest ones of real models have 30,000."""


class PromptTooLong(UserError):
    """Prompt and answer are more than the model can look back on, or than the session was given room for."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, written down as the model's own chat template wants it, with the assistant to speak next."""

    messages: Sequence[Mapping[str, Any]]
    """Each with "role" (system, user, assistant, tool) and "content"; the assistant's may have "tool_calls" and
    "reasoning_content"."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, as templates read them: {"type": "function", "function": {...}}."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """For the template: `enable_thinking`, say."""
    continues: bool = False
    """The last message is the beginning of the answer."""


Prompt = str | Sequence[int] | Chat
"""Text, token ids, or a conversation."""


def chat_template(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> str | None:
    """The template for a conversation; some models have another one with tools. None: the model has none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("tool_use" if tools and "tool_use" in found else "default")
    return found if isinstance(found, str) and found else None


def knows_tools(template: str) -> bool:
    """Whether a template shows tools to its model.

    Raises:
        TemplateError: it is none.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"a template of {len(template)} characters, at most {MAX_TEMPLATE_CHARS}")
    try:
        return "tools" in meta.find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.replace("{% generation %}", ""))
        )
    except RecursionError:
        raise TemplateError("a template that is nested too deeply") from None


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, checkpoint: Checkpoint) -> list[int]:
    """For a worker thread: a long text takes its time.

    Raises:
        UserError: it is empty, not for this model, or refused by the model's template.
    """
    if isinstance(prompt, Chat):
        text = write_chat(tokenizer, prompt, checkpoint.name)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids, vocabulary = list(prompt), checkpoint.config.get_text_config().vocab_size
        if any(not 0 <= token < vocabulary for token in ids):
            raise UserError(f"{checkpoint.name} has tokens 0 to {vocabulary - 1}; the prompt names others")
    if not ids:
        raise UserError("the prompt is empty")
    if (beyond := max(ids)) >= checkpoint.config.get_text_config().vocab_size:
        word = tokenizer.convert_ids_to_tokens(beyond)
        raise UserError(
            f"the tokenizer of {checkpoint.name} makes {word!r} token {beyond}, for which the model has no embedding; "
            "leave it out of the prompt"
        )
    return ids


def write_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, model: str) -> str:
    """A conversation as the model's template writes it.

    Raises:
        UserError: there is no template, it knows no tools, or it refuses the conversation.
    """
    template = chat_template(tokenizer, tools=bool(chat.tools))
    if template is None:
        raise UserError(f"{model} has no chat template; ask it to go on with a plain text")
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if reserved := sorted(set(own) & set(chat.arguments)):
        raise UserError(f"{reserved[0]} is not for the chat template to read")
    try:
        if chat.tools and not knows_tools(template):
            raise UserError(f"the chat template of {model} knows no tools: it would not show them to the model")
        if "tool_calls" not in template and any(each.get("tool_calls") for each in chat.messages):
            raise UserError(f"the chat template of {model} knows no tool calls: the history has some")
        # Not by the tokenizer itself: a template is a program of whoever made the checkpoint.
        return TEMPLATES.render(
            template,
            tokenizer.special_tokens_map,
            [dict(message) for message in chat.messages],
            {
                "tools": [dict(tool) for tool in chat.tools] or None,
                "add_generation_prompt": not chat.continues,
                "continue_final_message": chat.continues,
                **chat.arguments,
            },
        )
    except UserError:
        raise
    except (TemplateError, TemplateRefused, ValueError) as error:
        raise UserError(f"the chat template of {model} refuses this conversation: {error}") from None


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """What ends an answer: the model's own ends, and in a conversation also the tokenizer's, which chat models name
    there when their base model's `generation_config.json` does not."""
    named = model.generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    if isinstance(prompt, Chat) and isinstance(tokenizer.eos_token_id, int):
        ends.add(tokenizer.eos_token_id)
    return sorted(ends)
