"""OpenAI's requests -> what the peer is asked for. Pure: bytes have been read, nothing has been started.

What all requests have in common, and those that go on with a text; chats are in chat_requests.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from petals.gateway.errors import ApiError
from petals.gateway.fields import Fields
from petals.gateway.tools import ToolUse
from petals.peer.client.constraints import Constraint
from petals.peer.client.generation.generation_options import MAX_STOP_CHARACTERS, GenerationOptions
from petals.peer.client.generation.prompts import Prompt
from petals.protocols.errors import UserError

MAX_CHOICES = 16
MAX_STOPS = 64
MAX_BIASES = 1024
MAX_TOKENS = 1 << 20
MAX_TOP_TEXT = 5
MAX_SEED = (1 << 63) - 1
TEXT_NEW_TOKENS = 16
"""What /v1/completions gives when it is not told: OpenAI's own default."""

IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "moderation",
    # of other servers: how they keep caches, and what is the same here whatever they say
    "keep_alive",
    "cache_prompt",
    "cache_salt",
    "id_slot",
    "priority",
    "request_id",
    "slot_id",
    "timings_per_token",
    "return_progress",
    "guided_decoding_backend",
)
NEUTRAL: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("skip_special_tokens", (True,)),
    ("spaces_between_special_tokens", (True, False)),
    ("include_stop_str_in_output", (False,)),
    ("return_token_ids", (False,)),
    ("return_tokens_as_token_ids", (False,)),
    ("use_beam_search", (False,)),
    ("length_penalty", (1, 1.0)),
    ("n_probs", (0,)),
    ("mirostat", (0,)),
)
"""Fields of other servers that mean something we do not do, and the values that ask for nothing."""


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
    running_usage: bool = False
    """Usage so far in every chunk."""
    echo: bool = False
    """Every answer begins with its prompt."""
    score: int | None = None
    """With `echo`: probabilities of the prompt's tokens, with so many others at each place."""
    generates: bool = True
    """False: only the prompt is wanted."""
    tools: ToolUse = field(default_factory=ToolUse)
    constraint_field: str = "response_format"
    """What a grammar that can not be followed is blamed on."""

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


def read_completion(body: object) -> Wanted:
    """POST /v1/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    prompts = read_prompts(fields, "prompt", MAX_CHOICES)
    limit = fields.integer("max_tokens", 0, MAX_TOKENS)
    logprobs = fields.integer("logprobs", 0, MAX_TOP_TEXT)
    echo = fields.flag("echo")
    if limit == 0 and not echo:
        fields.refuse("max_tokens", "must be at least 1; 0 goes with echo")
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    fields.nothing("suffix", "is not supported: models here only go on", "")
    wanted = read_common(
        fields,
        Wanted(
            model="",
            chat=False,
            prompts=prompts,
            n=1,
            options=GenerationOptions(max_new_tokens=limit or TEXT_NEW_TOKENS, logprobs=logprobs),
            stream=False,
            include_usage=False,
            include_route=False,
            echo=echo,
            score=logprobs if echo else None,
            generates=limit != 0,
        ),
    )
    if best_of is not None and best_of != wanted.n:
        fields.refuse("best_of", "is not supported, but as n; ask for n and choose", code="unsupported_parameter")
    return wanted


def read_common(fields: Fields, wanted: Wanted) -> Wanted:
    """What chats and texts have in common; the object must have no further fields.

    Args:
        wanted: what was read before; its options are filled in.
    Raises:
        ApiError: 400, naming the field.
    """
    model = fields.text("model")
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if n * len(wanted.prompts) > MAX_CHOICES:
        fields.refuse("n", f"times prompts must be at most {MAX_CHOICES}")
    stream = fields.flag("stream")
    include_usage, running_usage, include_route = _stream_options(fields, stream=stream)
    sampling = read_sampling(fields, n)
    constraint, blamed = read_constraint(fields)
    fields.ignore(IGNORED)
    for name, neutral in NEUTRAL:
        fields.nothing(name, "is not supported", *neutral)
    fields.finish()
    options = replace(wanted.options, **sampling, constraint=constraint)
    return replace(
        wanted,
        model=model,
        n=n,
        options=options,
        stream=stream,
        include_usage=include_usage,
        running_usage=running_usage,
        include_route=include_route,
        constraint_field=blamed,
    )


def _stream_options(fields: Fields, *, stream: bool) -> tuple[bool, bool, bool]:
    value = fields.take("stream_options")
    if value is None:
        return False, False, False
    if not stream:
        fields.refuse("stream_options", "needs stream to be true")
    about = Fields(value, "stream_options")
    usage, running, route = (about.flag(f"{name}") for name in _STREAM_OPTIONS)
    about.ignore(("include_obfuscation",))
    about.finish()
    return usage or running, running, route


_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_route")


def read_sampling(fields: Fields, n: int = 1) -> dict[str, Any]:
    """How tokens are chosen and when they end, as fields of `GenerationOptions`."""
    temperature = fields.number("temperature", 0, 2)
    chosen: dict[str, Any] = {
        "temperature": temperature,
        "top_p": fields.number("top_p", 0, 1),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "typical_p": fields.number("typical_p", 0, 1),
        "seed": fields.integer("seed", -MAX_SEED - 1, MAX_SEED),
    }
    asked = [name for name, value in chosen.items() if value is not None]
    if temperature == 0 or chosen["top_p"] == 0 or (n == 1 and not asked):
        chosen = dict.fromkeys(chosen)  # the likeliest token wins
    elif n > 1 and temperature is None:
        chosen["temperature"] = 1.0  # n times the same words would be of no use
    for name in ("min_p", "typical_p"):
        chosen[name] = chosen[name] or None  # 0 narrows nothing
    repetition = fields.number("repetition_penalty", 0.01, 10)
    return chosen | {
        "stop": _stop(fields),
        "stop_token_ids": _token_ids(fields, "stop_token_ids"),
        "presence_penalty": fields.number("presence_penalty", -2, 2) or 0.0,
        "frequency_penalty": fields.number("frequency_penalty", -2, 2) or 0.0,
        "repetition_penalty": 1.0 if repetition is None else repetition,
        "min_new_tokens": fields.integer("min_tokens", 0, MAX_TOKENS) or 0,
        "ignore_eos": fields.flag("ignore_eos"),
        "logit_bias": _logit_bias(fields),
    }


def read_constraint(fields: Fields) -> tuple[Constraint | None, str]:
    """What the answer must match, and the field that says so: OpenAI's `response_format`, and vLLM's and llama.cpp's
    fields.

    Raises:
        ApiError: 400; there are two, or one is none.
    """
    found: list[tuple[Constraint, str]] = []

    def add(name: str, make: Callable[[], Constraint]) -> None:
        try:
            found.append((make(), name))
        except UserError as error:
            raise ApiError(400, str(error), param=name) from None

    _response_format(fields, add)
    outer = fields.take("structured_outputs")
    nested = None if outer is None else Fields(outer, "structured_outputs")
    for name, kind in _CONSTRAINTS:
        value = fields.take(name)
        if value is not None:
            add(name, partial(_constraint, name, kind, value))
    if nested is not None:
        for name, kind in (("json", "json_schema"), ("regex", "regex"), ("choice", "choice"), ("grammar", "grammar")):
            value = nested.take(name)
            if value is not None:
                add(f"structured_outputs.{name}", partial(_constraint, name, kind, value))
        if nested.flag("json_object"):
            add("structured_outputs.json_object", Constraint.any_object)
        nested.ignore(("disable_fallback", "disable_any_whitespace", "disable_additional_properties"))
        nested.finish()
    if len(found) > 1:
        fields.refuse(found[1][1], f"does not go with {found[0][1]}: an answer matches one grammar")
    return found[0] if found else (None, "response_format")


_CONSTRAINTS = (
    ("json_schema", "json_schema"),
    ("grammar", "grammar"),
    ("regex", "regex"),
    ("choice", "choice"),
    ("guided_json", "json_schema"),
    ("guided_grammar", "grammar"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
)


def _constraint(name: str, kind: str, value: object) -> Constraint:
    if kind == "json_schema" and isinstance(value, dict | bool | str):
        return Constraint.json_schema(value)
    if kind == "choice" and isinstance(value, list):
        return Constraint.choice(value)
    if kind == "regex" and isinstance(value, str):
        return Constraint.regex(value)
    if kind == "grammar" and isinstance(value, str):
        return Constraint.grammar(value)
    wanted = {"json_schema": "a JSON schema", "choice": "a list of texts"}.get(kind, "a string")
    raise UserError(f"{name} must be {wanted}")


def _response_format(fields: Fields, add: Callable[[str, Callable[[], Constraint]], None]) -> None:
    value = fields.take("response_format")
    if value is None:
        return
    about = Fields(value, "response_format")
    kind = about.take("type")
    if kind == "text":
        about.finish()
    elif kind == "json_object":
        schema = about.take("schema")  # llama.cpp's
        add("response_format", partial(Constraint.json_schema, schema) if schema else Constraint.any_object)
        about.finish()
    elif kind == "json_schema":
        inner = Fields(about.take("json_schema"), "response_format.json_schema")
        schema = inner.take("schema")
        if not isinstance(schema, dict | bool):
            inner.refuse("schema", "must be a JSON schema")
        add("response_format", partial(Constraint.json_schema, schema))
        inner.ignore(("name", "description", "strict"))
        inner.finish()
        about.finish()
    elif kind == "grammar":
        add("response_format.grammar", partial(_constraint, "grammar", "grammar", about.take("grammar")))
        about.finish()
    else:
        about.refuse("type", "must be text, json_object or json_schema")


def _top_k(fields: Fields) -> int | None:
    value = fields.integer("top_k", -1, 1 << 30)
    return 0 if value == -1 else value  # vLLM's way to say: among all


def _token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    value = fields.take(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_STOPS or not all(type(each) is int for each in value):
        fields.refuse(name, f"must be a list of at most {MAX_STOPS} token ids")
    return tuple(value)


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    value = fields.take("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        fields.refuse("logit_bias", f"must be an object of at most {MAX_BIASES} tokens")
    biases = []
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not (token.isascii() and token.isdigit() and len(token) < 10 and number):
            fields.refuse("logit_bias", "must give token ids a number from -100 to 100 each")
        biases.append((int(token), float(bias)))
    return tuple(biases)


def read_prompts(fields: Fields, name: str, most: int) -> tuple[Prompt, ...]:
    """One or several texts, or lists of token ids.

    Raises:
        ApiError: it is none, or there are more than `most`.
    """
    value = fields.take(name)
    if isinstance(value, list) and value and not _is_ids(value):
        if len(value) > most:
            fields.refuse(name, f"must be at most {most} of them")
        return tuple(_prompt(fields, name, each) for each in value)
    return (_prompt(fields, name, value),)


def _prompt(fields: Fields, name: str, value: object) -> Prompt:
    if isinstance(value, str) and value:
        return fields.proper(name, value)
    if _is_ids(value):
        return tuple(value)  # type: ignore[arg-type]
    fields.refuse(name, "must be a text or a list of token ids, or a list of such, and not empty")


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
