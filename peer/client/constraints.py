"""Answers that must match a JSON schema, a regular expression, one of some texts, or a grammar: token masks.

The engine is llguidance (MIT, one wheel for every Python on Linux, macOS and Windows): it walks a grammar and the
tokenizer's trie side by side, and says after each token which tokens may follow. A mask takes 5 to 1,000 microseconds
and is computed in a thread of its own, without the interpreter's lock, while servers compute the step that it is for.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import trio
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petals.protocols.errors import UserError

Kind = Literal["json_schema", "regex", "choice", "grammar"]

MAX_SOURCE = 256 << 10
"""Characters of one schema or grammar."""
MAX_CHOICES = 1024
INSTALL = "structured output needs the package llguidance: pip install 'petals-libp2p[structured]'"

# Between JSON's tokens: a blank, or a new line with its indentation. Without a bound a small model may write blanks
# until its tokens are used up.
_JSON_OPTIONS = {"whitespace_pattern": r"[ ]|\n[ \t]{0,32}"}
_MARKER_TAIL = 16
"""Tokens at the end of what was generated in which the text of `Constraint.after` is looked for."""


class ConstraintError(UserError):
    """A schema or grammar that can not be followed; the message names the part."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text of an answer must match.

    `grammar` is GBNF (with "::=") or Lark as llguidance reads it. `literals` are further rules of a Lark grammar, each
    one text: special tokens of the model inside it are matched as those tokens. A rule until_... is any text up to and
    with the literal.
    """

    kind: Kind
    source: str
    """A JSON schema; a regular expression; a JSON list of texts; a grammar."""
    literals: tuple[tuple[str, str], ...] = ()
    after: str = ""
    """Anything is allowed until this text has been generated: the end of the model's thoughts ..."""
    opened: str = ""
    """... where the prompt ends with this."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ConstraintError(f"{self.kind} must not be empty")
        if len(self.source) > MAX_SOURCE:
            raise ConstraintError(f"{self.kind} may have {MAX_SOURCE:,} characters, and has {len(self.source):,}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """JSON that a schema accepts; {} or True: any JSON."""
        if not isinstance(schema, str):
            return cls("json_schema", json.dumps(schema))
        try:
            found = json.loads(schema)
        except ValueError as error:
            raise ConstraintError(f"json_schema is not JSON: {error}") from None
        if not isinstance(found, dict | bool):
            raise ConstraintError("json_schema must be a JSON object")
        return cls("json_schema", json.dumps(found))

    @classmethod
    def any_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """The whole answer matches; no look-around, no back-references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """The answer is one of these."""
        if not 0 < len(texts) <= MAX_CHOICES or not all(isinstance(each, str) and each for each in texts):
            raise ConstraintError(f"choice must be 1 to {MAX_CHOICES} texts that are not empty")
        return cls("choice", json.dumps(list(texts)))

    @classmethod
    def grammar(cls, source: str) -> Constraint:
        """GBNF or Lark."""
        return cls("grammar", source)


class MaskEngine:
    """The grammar engine of one tokenizer; made once per tokenizer, in a thread: it takes a third of a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Raises:
            ConstraintError: the engine is not installed, or can not read this tokenizer.
        """
        try:
            self._library: Any = importlib.import_module("llguidance")
            reader: Any = importlib.import_module("llguidance.hf")
        except ImportError:
            raise ConstraintError(INSTALL) from None
        try:
            self._reader = reader
            self._tokens: dict[tuple[int, ...], Any] = {(): reader.from_tokenizer(tokenizer)}
        except (ValueError, TypeError) as error:
            raise ConstraintError(f"structured output does not know this model's tokenizer: {error}") from None
        self._tokenizer = tokenizer
        # One thread: a mask of one generation takes microseconds; a client that asks for a heavy one gets it alone.
        self._threads = ThreadPoolExecutor(1, "petals-mask")

    def compile(self, constraint: Constraint, ends: Sequence[int], prompt_ids: Sequence[int] = ()) -> TokenMask:
        """Ready to say what the first token may be. For a thread: it may take a second (the engine bounds it).

        Args:
            ends: tokens that end an answer; allowed once the text matches.
        Raises:
            ConstraintError: what the engine can not follow; names the part.
        """
        key = tuple(ends)
        if key not in self._tokens:
            self._tokens[key] = self._reader.from_tokenizer(self._tokenizer, eos_token=list(key))
        tokens = self._tokens[key]
        matcher = self._library.LLMatcher(tokens, self._source(constraint), log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"{constraint.kind}: {_in_words(matcher.get_error())}")
        if warnings := matcher.get_grammar_warnings():
            raise ConstraintError(f"{constraint.kind}: {_in_words(warnings[0])}")
        after = constraint.after
        if after and constraint.opened:
            tail = str(self._tokenizer.decode(list(prompt_ids[-_MARKER_TAIL:])))
            after = after if tail.rstrip().endswith(constraint.opened) else ""
        return TokenMask(matcher, self._threads, after, self._tokenizer, self._blanks() if after else frozenset())

    def _blanks(self) -> frozenset[int]:
        """Tokens that are line breaks, which models write between their thoughts and the answer."""
        found = (self._tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n\n"))
        return frozenset(ids[0] for ids in found if len(ids) == 1)

    def _source(self, constraint: Constraint) -> str:
        matcher = self._library.LLMatcher
        try:
            match constraint.kind:
                case "json_schema":
                    return str(matcher.grammar_from_json_schema(constraint.source, overrides=_JSON_OPTIONS))
                case "regex":
                    return str(matcher.grammar_from_regex(constraint.source))
                case "choice":
                    return str(self._library.grammar_from("choice", constraint.source))
                case "grammar" if "::=" in constraint.source:
                    return str(self._library.grammar_from("gbnf", constraint.source))
                case "grammar":
                    rules = [self._rule(name, text) for name, text in constraint.literals]
                    return str(matcher.grammar_from_lark("\n".join([constraint.source, *rules, ""])))
        except (ValueError, RecursionError) as error:
            raise ConstraintError(f"{constraint.kind}: {_in_words(str(error))}") from None

    def _rule(self, name: str, text: str) -> str:
        """One literal as a Lark rule: a special token of the model is that token, whatever its spelling."""
        literal = self._literal(text)
        if not name.startswith("until_"):
            return f"{name}: {literal}"
        if literal.startswith("<["):  # text can not hold the token itself
            return f"{name}: {name}_text {literal}\n{name}_text: /(.|\\n)*/"
        pattern = re.escape(text).replace("/", r"\/")
        return f"{name}[lazy]: /(.|\\n)*{pattern}/"

    def _literal(self, text: str) -> str:
        special = {
            str(token): number
            for number, token in self._tokenizer.added_tokens_decoder.items()
            if self._tokens[()].is_special_token(number)
        }
        pattern = "|".join(re.escape(each) for each in sorted(special, key=len, reverse=True))
        pieces = re.split(f"({pattern})", text) if pattern else [text]
        return " ".join(f"<[{special[each]}]>" if each in special else json.dumps(each) for each in pieces if each)


class TokenMask:
    """Which tokens may come next, for one generation.

    `begin` starts to compute the next mask, beside whatever the caller does; `apply` waits for it; `advance` says which
    token was taken.
    """

    def __init__(
        self,
        matcher: Any,
        threads: ThreadPoolExecutor,
        after: str,
        tokenizer: PreTrainedTokenizerBase,
        blanks: frozenset[int],
    ) -> None:
        """
        Args:
            blanks: tokens that may stand between `after` and what the grammar says.
        """
        self._matcher = matcher
        self._threads = threads
        self._after = after
        self._tokenizer = tokenizer
        self._blanks = blanks
        self._ids: list[int] = []
        self._next: Future[Tensor] | None = None
        self.begin()

    def begin(self) -> None:
        """Start to compute the mask of the next token."""
        if not self._after and self._next is None:
            self._next = self._threads.submit(self._banned)

    def apply(self, scores: Tensor) -> Tensor:
        """Scores (..., vocabulary) with minus infinity where a token can not follow.

        Raises:
            ConstraintError: the grammar grew beyond the engine's limits.
        """
        if self._after:
            return scores
        self.begin()
        assert self._next is not None
        banned = self._next.result().to(scores.device)
        width = scores.shape[-1]
        if len(banned) < width:  # heads are padded beyond what the tokenizer has
            banned = torch.nn.functional.pad(banned, (0, width - len(banned)), value=True)
        if self._blanks:
            banned = banned.clone()
            banned[sorted(self._blanks)] = False
        masked = scores.masked_fill(banned[:width], -torch.inf)
        if bool(torch.isinf(masked).all()):  # min_new_tokens forbids the end where the grammar knows nothing else
            return torch.zeros_like(scores).masked_fill(banned[:width], -torch.inf)
        return masked

    def advance(self, token: int) -> None:
        """`token` was taken; the next mask begins.

        Raises:
            ConstraintError: it can not follow.
        """
        if not self._after and token in self._blanks:
            self._blanks = frozenset()  # once
            return
        if self._after:
            self._ids = [*self._ids[1 - _MARKER_TAIL :], token]
            if self._after in str(self._tokenizer.decode(self._ids)):
                self._after = ""
        else:
            self._blanks = frozenset()
            if self._next is not None:
                self._next.result()  # the engine is not for two threads at once
                self._next = None
            if not self._matcher.consume_token(token):
                raise ConstraintError(f"the grammar can not go on: {_in_words(self._matcher.get_error())}")
        self.begin()

    def _banned(self) -> Tensor:
        """(tokens of the tokenizer,) bool."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar can not go on: {_in_words(self._matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(packed, bitorder="little")) == 0


class MaskMaker:
    """One model's engine, made when it is first needed."""

    def __init__(self) -> None:
        self._engine: MaskEngine | None = None
        self._making = threading.Lock()

    async def make(
        self, constraint: Constraint, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], prompt_ids: Sequence[int]
    ) -> TokenMask:
        """Compile a grammar, in a thread that is not waited for once nobody wants it: the engine bounds its work.

        Raises:
            ConstraintError: as `MaskEngine.compile`.
        """

        def compiled() -> TokenMask:
            with self._making:
                if self._engine is None:
                    self._engine = MaskEngine(tokenizer)
            return self._engine.compile(constraint, ends, prompt_ids)

        return await trio.to_thread.run_sync(
            compiled,
            abandon_on_cancel=True,  # type: ignore[call-arg]  # trio_typing knows its old name
        )


def _in_words(error: str) -> str:
    """The engine's message on one line, without the source that some of its messages repeat."""
    words = " ".join(error.split("\nparser state", 1)[0].split())
    return words[:300]
