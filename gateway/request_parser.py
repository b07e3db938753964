"""OpenAI's requests -> what the peer is asked for. Pure: bytes have been read, nothing has been started."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from petals.gateway.errors import ApiError
from petals.gateway.fields import Fields
from petals.peer.client.generation.generation import MAX_STOP_CHARACTERS, Chat, GenerationOptions, Prompt

MAX_CHOICES = 16
MAX_MESSAGES = 4096
MAX_STOPS = 4
MAX_TOKENS = 1 << 20
MAX_TOP_CHAT = 20
MAX_TOP_TEXT = 5
MAX_SEED = (1 << 63) - 1
TEXT_NEW_TOKENS = 16
"""What /v1/completions gives when it is not told: OpenAI's own default."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request, understood."""

    model: str
    chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    """Answers to each prompt."""
    options: GenerationOptions
    stream: bool
    include_usage: bool
    include_route: bool
    """Ours: tell the route, and each change of it, while the answer comes."""
    echo: bool = False
    """Every answer begins with its prompt, which is a text then."""

    def echoed(self, index: int) -> str:
        """What answer `index` begins with before anything is generated."""
        return str(self.prompts[index // self.n]) if self.echo else ""

    def choices(self) -> list[tuple[Prompt, GenerationOptions]]:
        """One generation each. Those that sample have seeds of their own: with one seed given they differ, and are the
        same when asked for again."""
        seed = self.options.seed if self.options.seed is not None else secrets.randbits(62)
        made = []
        for prompt in self.prompts:
            for index in range(self.n):
                options = (
                    replace(self.options, seed=(seed + index) & MAX_SEED) if self.options.samples else self.options
                )
                made.append((prompt, options))
        return made


def read_chat(body: object, *, default_new_tokens: int) -> Wanted:
    """POST /v1/chat/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    prompt = Chat(_messages(fields))
    limit = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    old_limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    limit = old_limit if limit is None else limit
    logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP_CHAT)
    if top is not None and not logprobs:
        fields.refuse("top_logprobs", "needs logprobs to be true")
    fields.nothing("tools", "is not supported: models here have no tools", [])
    fields.nothing("tool_choice", "is not supported: models here have no tools", "none", "auto")
    fields.nothing("functions", "is not supported: models here have no tools", [])
    fields.nothing("function_call", "is not supported: models here have no tools", "none", "auto")
    fields.nothing("response_format", "is not supported: answers are text", {"type": "text"})
    fields.nothing("modalities", "is not supported: answers are text", ["text"])
    fields.nothing("audio", "is not supported: answers are text")
    fields.nothing("prediction", "is not supported")
    fields.nothing("web_search_options", "is not supported")
    fields.ignore(("parallel_tool_calls", "reasoning_effort", "verbosity"))
    return _finish(
        fields,
        chat=True,
        prompts=(prompt,),
        limit=limit,
        default_limit=default_new_tokens,
        logprobs=(top or 0) if logprobs else None,
    )


def read_completion(body: object) -> Wanted:
    """POST /v1/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    prompts = _prompts(fields)
    limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    logprobs = fields.integer("logprobs", 0, MAX_TOP_TEXT)
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        fields.refuse("echo", "does not go with logprobs: the prompt has none here", code="unsupported_parameter")
    if echo and not all(isinstance(each, str) for each in prompts):
        fields.refuse("echo", "is for prompts that are texts, not token ids", code="unsupported_parameter")
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    fields.nothing("suffix", "is not supported: models here only go on", "")
    wanted = _finish(fields, chat=False, prompts=prompts, limit=limit, default_limit=TEXT_NEW_TOKENS, logprobs=logprobs)
    if best_of is not None and best_of != wanted.n:
        fields.refuse("best_of", "is not supported, but as n; ask for n and choose", code="unsupported_parameter")
    return replace(wanted, echo=echo)


def _finish(
    fields: Fields,
    *,
    chat: bool,
    prompts: tuple[Prompt, ...],
    limit: int | None,
    default_limit: int,
    logprobs: int | None,
) -> Wanted:
    model = fields.text("model")
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if n * len(prompts) > MAX_CHOICES:
        fields.refuse("n", f"times prompts must be at most {MAX_CHOICES}")
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1)
    top_k = fields.integer("top_k", 0, 1 << 30)
    seed = fields.integer("seed", -MAX_SEED - 1, MAX_SEED)
    stream = fields.flag("stream")
    include_usage = include_route = False
    told = fields.take("stream_options")
    if told is not None:
        if not stream:
            fields.refuse("stream_options", "needs stream to be true")
        about = Fields(told, "stream_options")
        include_usage, include_route = about.flag("include_usage"), about.flag("include_route")
        about.ignore(("include_obfuscation",))
        about.finish()
    stop = _stop(fields)
    presence = fields.number("presence_penalty", -2, 2)
    frequency = fields.number("frequency_penalty", -2, 2)
    fields.nothing("logit_bias", "is not supported", {})
    fields.ignore(IGNORED)
    fields.finish()
    if temperature == 0 or top_p == 0 or (n == 1 and temperature is top_p is top_k is seed is None):
        temperature = top_p = top_k = seed = None  # the likeliest token wins
    elif n > 1 and temperature is None:
        temperature = 1.0  # n times the same words would be of no use
    options = GenerationOptions(
        max_new_tokens=limit or default_limit,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        fit=limit is None,
        stop=stop,
        presence_penalty=presence or 0.0,
        frequency_penalty=frequency or 0.0,
        logprobs=logprobs,
    )
    return Wanted(
        model=model,
        chat=chat,
        prompts=prompts,
        n=n,
        options=options,
        stream=stream,
        include_usage=include_usage,
        include_route=include_route,
    )


def _messages(fields: Fields) -> list[dict[str, str]]:
    value = fields.take("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        fields.refuse("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def _message(value: object, where: str) -> dict[str, str]:
    fields = Fields(value, where)
    role = fields.take("role")
    if not isinstance(role, str) or role not in ROLES:
        fields.refuse("role", "must be system, developer, user or assistant")
    content = fields.take("content")
    if content is None and role == "assistant":
        content = ""
    for gone in ("tool_calls", "function_call", "audio"):
        fields.nothing(gone, "is not supported: models here have no tools", [])
    fields.ignore(("name", "refusal", "annotations"))
    fields.finish()
    return {"role": ROLES[role], "content": _content(fields, content, where)}


def _content(fields: Fields, content: object, where: str) -> str:
    if isinstance(content, str):
        return fields.proper("content", content)
    if not isinstance(content, list) or len(content) > MAX_MESSAGES:
        fields.refuse("content", "must be a string, or a list of parts")
    parts = []
    for index, each in enumerate(content):
        part = Fields(each, f"{where}.content[{index}]")
        if part.take("type") != "text":
            part.refuse("type", "must be text: models here neither see nor hear", code="unsupported_parameter")
        parts.append(part.text("text"))
    return "\n".join(parts)


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.take("prompt")
    if isinstance(value, list) and value and not _is_ids(value):
        if len(value) > MAX_CHOICES:
            fields.refuse("prompt", f"must be at most {MAX_CHOICES} prompts")
        return tuple(_prompt(fields, each) for each in value)
    return (_prompt(fields, value),)


def _prompt(fields: Fields, value: object) -> Prompt:
    if isinstance(value, str) and value:
        return fields.proper("prompt", value)
    if _is_ids(value):
        return tuple(value)  # type: ignore[arg-type]
    fields.refuse("prompt", "must be a text or a list of token ids, or a list of such, and not empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOPS:
        fields.refuse("stop", f"must be a string or a list of at most {MAX_STOPS}")
    if not all(isinstance(each, str) and each for each in strings):
        fields.refuse("stop", "must hold strings that are not empty")
    if sum(map(len, strings)) > MAX_STOP_CHARACTERS:
        fields.refuse("stop", f"must be at most {MAX_STOP_CHARACTERS} characters together")
    return tuple(fields.proper("stop", each) for each in strings)


def check_model(wanted: Wanted, offered: list[str]) -> None:
    """Raises ApiError: 404, naming those that are there."""
    if wanted.model not in offered:
        raise unknown_model(wanted.model, offered)


def unknown_model(name: str, offered: list[str]) -> ApiError:
    shown = name.encode(errors="replace").decode()[:200]
    return ApiError(
        404, f"no model {shown!r} here; there is {', '.join(offered)}", code="model_not_found", param="model"
    )
