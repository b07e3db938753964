"""What a model's `generation_config.json` may ask for. Somebody wrote it; nothing in it may load code, or end a client.

Settings that `transformers` honours are honoured, settings that would fetch or run something are left out, and so is
whatever has the wrong type. A file that is no JSON is left out as a whole, as `transformers` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig

from petals.models.client.decoding import UNSUPPORTED, processors_of
from petals.models.source.loading import quiet_library

FILE = "generation_config.json"
MAX_FILE_BYTES = 1 << 20

_NOT_OURS = frozenset(
    {
        "cache_implementation", "cache_config", "use_cache", "compile_config", "disable_compile", "custom_generate",
        "assistant_ensemble", "continuous_batching_config", "is_assistant", "return_dict_in_generate", "output_scores",
        "output_logits", "output_attentions", "output_hidden_states", "prefill_chunk_size", "low_memory",
    }
)  # fmt: skip
"""Settings of the process rather than of the text: where the cache is, what is returned. The swarm decides on these."""

_FILE_FACTS = frozenset({"_from_model_config", "transformers_version"})

_NUMBERS = frozenset(
    {
        "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
        "encoder_repetition_penalty", "length_penalty", "penalty_alpha", "guidance_scale", "diversity_penalty",
        "max_time",
    }
)  # fmt: skip
_COUNTS = frozenset(
    {
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_beam_groups", "top_k",
        "num_return_sequences", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prompt_lookup_num_tokens",
        "num_assistant_tokens", "bos_token_id", "decoder_start_token_id",
    }
)  # fmt: skip
_SWITCHES = frozenset({"do_sample", "renormalize_logits", "remove_invalid_values", "token_healing", "use_mtp"})
_TOKENS = frozenset({"eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"})
_TOKEN_LISTS = frozenset({"suppress_tokens", "begin_suppress_tokens"})


def read_settings(directory: Path, default: GenerationConfig, vocabulary: int) -> tuple[GenerationConfig, list[str]]:
    """The settings beside a checkpoint.

    Args:
        directory: of the checkpoint.
        default: what the model's configuration says, where there is no usable file.
        vocabulary: tokens that the model knows.

    Returns: the settings; and a sentence for each thing in the file that is left out.
    """
    path = directory / FILE
    if not path.is_file():
        return default, []
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError):
        return default, [f"{FILE} is no JSON object"]
    with quiet_library():
        return _followed(content, default, vocabulary)


def _followed(
    content: Mapping[str, Any], default: GenerationConfig, vocabulary: int
) -> tuple[GenerationConfig, list[str]]:
    kept, left_out = _filtered(content, vocabulary)
    for attempt in (kept, {name: value for name, value in kept.items() if name not in UNSUPPORTED}):
        try:
            config = GenerationConfig.from_dict(attempt)
            _try(config, vocabulary)
            return config, left_out
        except Exception as error:  # the library's own checks: settings that contradict each other
            reason = " ".join(str(error).split())[:200]
            left_out = [*left_out, *(f"{name}={attempt[name]!r}" for name in UNSUPPORTED if name in attempt)]
    return default, [f"{FILE}: {reason}"]


def _filtered(content: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    kept: dict[str, Any] = {}
    left_out = []
    for name, value in content.items():
        if name in _FILE_FACTS or value is None:
            continue
        if name in _NOT_OURS:
            continue  # what they ask for changes no token
        if not _is_plausible(name, value) or not _works(name, value, vocabulary):
            left_out.append(f"{name[:60]}={str(value)[:60]!r}")
        else:
            kept[name] = value
    return kept, left_out


def _is_plausible(name: str, value: Any) -> bool:
    if name in _SWITCHES:
        return isinstance(value, bool)
    if name in _NUMBERS:
        return _is_number(value)
    if name in _COUNTS:
        return _is_count(value)
    if name in _TOKENS:
        return _is_count(value) or _is_count_list(value)
    if name in _TOKEN_LISTS:
        return _is_count_list(value)
    if name == "stop_strings":
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    return True


def _works(name: str, value: Any, vocabulary: int) -> bool:
    """Whether a setting can be followed by itself: the library's processors refuse numbers and tokens out of range."""
    if name in UNSUPPORTED:
        return True  # not followed here
    try:
        _try(GenerationConfig.from_dict({name: value, "do_sample": True}), vocabulary)
    except Exception:
        return False
    return True


def _try(config: GenerationConfig, vocabulary: int) -> None:
    """Three steps of a generation with these settings. Raises what the library raises."""
    ends = config.eos_token_id
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if any(not 0 <= token < vocabulary for token in listed):
        raise ValueError("an end that is no token of the model")
    processors = processors_of(config, prompt_length=1, max_length=4, ends=listed)
    for length in (1, 2, 3):
        text = torch.zeros(1, length, dtype=torch.int64)
        scores = processors(cast("torch.LongTensor", text), cast("torch.FloatTensor", torch.zeros(1, vocabulary)))
        if scores.shape != (1, vocabulary):
            raise ValueError("scores of another shape")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))
