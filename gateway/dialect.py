"""What a model's chat template says about how its answers are to be read. Pure, but for the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from petals.gateway.output import THINK, THOUGHT, HarmonyParser, MarkedParser, Parser, PlainParser
from petals.gateway.request_parser import Wanted
from petals.gateway.tool_formats import HARMONY, ToolFormat, format_of
from petals.gateway.tools import Tool
from petals.peer.client.constraints import Constraint
from petals.peer.client.generation.prompts import chat_template

_PROMPT_TAIL = 16
HARMONY_FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model writes thoughts and calls."""

    form: ToolFormat
    thinks: bool
    """Thoughts stand between <think> and </think>."""
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Dialect:
        """As its template teaches."""
        templates = [chat_template(tokenizer, tools=tools) or "" for tools in (False, True)]
        text = "\n".join(templates)
        return cls(format_of(text), THOUGHT in text and "<|channel|>" not in text, tokenizer)

    def prepared(self, wanted: Wanted) -> Wanted:
        """The request with what the model's way to write asks of its generation: grammars for calls, and special tokens
        in the text where they mean something."""
        if not wanted.chat:
            return wanted
        use, constraint, blamed = wanted.tools, wanted.options.constraint, wanted.constraint_field
        if use.callable and use.mode == "required":
            constraint, blamed = self.form.constraint(use.callable, parallel=use.parallel), "tools"
        elif use.callable and constraint is None and any(tool.strict for tool in use.callable):
            constraint, blamed = self._free(use.callable, parallel=use.parallel), "tools"
        if constraint is not None:
            after, opened = self._after(calls=use.mode == "required")
            constraint = replace(constraint, after=after, opened=opened)
        special = self.form is HARMONY or (bool(use.callable) and self._is_special(self.form.opens))
        options = replace(wanted.options, constraint=constraint, special_tokens=special)
        return replace(wanted, options=options, constraint_field=blamed)

    def _free(self, tools: tuple[Tool, ...], *, parallel: bool) -> Constraint | None:
        """What is called may be wrong only where a tool is not strict."""
        loose = [tool if tool.strict else replace(tool, parameters={"type": "object"}) for tool in tools]
        return self.form.constraint(loose, parallel=parallel, free=True)

    def _after(self, *, calls: bool) -> tuple[str, str]:
        """From where on a grammar holds: behind the thoughts, if the prompt has opened them."""
        if self.form is HARMONY:
            return ("", "") if calls else (HARMONY_FINAL, "")
        return (THOUGHT, THINK) if self.thinks else ("", "")

    def parser(self, wanted: Wanted, prompt_ids: list[int]) -> Parser:
        """For one answer to a prompt."""
        if not wanted.chat:
            return PlainParser()
        if self.form is HARMONY:
            return HarmonyParser(wanted.tools)
        thinking = False
        if self.thinks:
            tail = str(self.tokenizer.decode(prompt_ids[-_PROMPT_TAIL:]))
            thinking = tail.rstrip().endswith(THINK)
        if not self.thinks and not wanted.tools.callable:
            return PlainParser()
        return MarkedParser(wanted.tools, self.form, thinks=self.thinks, thinking=thinking)

    def _is_special(self, marker: str) -> bool:
        return marker in self.tokenizer.all_special_tokens or (not marker and self.form.name == "llama")
