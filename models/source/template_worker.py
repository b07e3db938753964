"""Renders chat templates, alone in a process: the program of models/source/templates.py. Imports nothing of ours.

A line of JSON comes in for each conversation, one goes out. A template is a program of somebody else's: in an endless
loop, in `2 ** 10 ** 9` or with all of the memory this process ends by the alarm or the limit, and nobody else with it.
"""

import json
import signal
import sys

MEMORY_BYTES = 2 << 30
"""Of addresses; the library and a template with a conversation take less than a quarter of it."""


def main() -> None:
    """Answer until nothing comes any more."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not everywhere; then the alarm is the only bound
        pass
    from jinja2 import TemplateError
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    class Tokenizer(PreTrainedTokenizerBase):
        """As much of one as writes conversations down."""

        def __init__(self, template: str, special: dict[str, str]) -> None:
            self.chat_template, self._special = template, special

        @property
        def special_tokens_map(self) -> dict[str, str]:
            return self._special

    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, asked["seconds"])  # its default is the end of this process
        try:
            tokenizer = Tokenizer(asked["template"], asked["special"])
            text = str(tokenizer.apply_chat_template(asked["messages"], tokenize=False, **asked["arguments"]))
            answer = {"text": text} if len(text) <= asked["most"] else {"refused": f"{len(text)} characters come of it"}
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            # templates refuse what their model has not learned, such as two users in a row; others stumble over it
            answer = {"refused": str(error)[:1000]}
        except (MemoryError, RecursionError) as error:
            answer = {"refused": f"it takes too much memory ({type(error).__name__})"}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
