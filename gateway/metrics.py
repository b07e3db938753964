"""Prometheus' text format, by hand: a dozen numbers need no library. docs/gateway.md lists the names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from petals.peer.client.generation.generation import TokenStream
from petals.peer.node import Peer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Meter:
    """What the door has seen since it opened."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = 0
        """Computed for every answer: a prompt with n answers counts n times."""
        self.generated_tokens = 0
        self._reused_tokens = 0
        self._answers: Counter[str] = Counter()
        self._first_token_s = 0.0
        self._first_tokens = 0
        self._decode_s = 0.0

    def answered(self, path: str, status: int) -> None:
        """A request has got its status; `path` is one of our routes."""
        self._requests[path, status] += 1

    def generated(self, streams: Sequence[TokenStream]) -> None:
        """The generations of a request have ended, one way or another."""
        for stream in streams:
            self.prompt_tokens += len(stream.prompt_ids)
            self._reused_tokens += stream.reused_tokens
            self._answers[stream.finish_reason or "cut"] += 1
            self.generated_tokens += len(stream.token_ids)
            self._decode_s += stream.seconds.decode
            if stream.token_ids:
                self._first_tokens += 1
                self._first_token_s += stream.seconds.first_token

    def text(self, peer: Peer, active: int) -> str:
        """Everything, as Prometheus reads it."""
        lines: list[str] = []

        def tell(name: str, kind: str, about: str, *values: tuple[str, float]) -> None:
            lines.extend([f"# HELP petals_{name} {about}", f"# TYPE petals_{name} {kind}"])
            lines.extend(f"petals_{name}{labels} {value!r}" for labels, value in values)

        requests = [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(self._requests.items())]
        tell("http_requests_total", "counter", "Requests answered, by route and status.", *requests)
        tell("http_answers_active", "gauge", "Answers being generated for HTTP clients.", ("", active))
        answers = [(f'{{ended="{reason}"}}', n) for reason, n in sorted(self._answers.items())]
        tell("answers_total", "counter", "Answers by how they ended; cut: hung up or failed.", *answers)
        tell("prompt_tokens_total", "counter", "Tokens of prompts, once for each answer.", ("", self.prompt_tokens))
        tell("reused_tokens_total", "counter", "Of them, those that servers had kept.", ("", self._reused_tokens))
        tell("generated_tokens_total", "counter", "Tokens of answers.", ("", self.generated_tokens))
        tell(
            "first_token_seconds",
            "summary",
            "From the tokenised prompt to the first token.",
            ("_sum", self._first_token_s),
            ("_count", self._first_tokens),
        )
        tell("decode_seconds_total", "counter", "Time spent on all tokens after the first.", ("", self._decode_s))
        dropped = [(f'{{why="{why}"}}', n) for why, n in sorted(peer.directory.dropped_records.items())]
        tell("directory_dropped_records_total", "counter", "Server records that were not believed.", *dropped)
        ledger = peer.ledger
        tell("given_block_tokens_total", "counter", "Work for other peers.", ("", ledger.given))
        tell("taken_block_tokens_total", "counter", "Work of other peers for this one.", ("", ledger.taken))
        tell("receipts_total", "counter", "Receipts that both ends signed.", ("", ledger.receipts))
        tell("receipts_rejected_total", "counter", "Receipts that did not pass a check.", ("", ledger.rejected))
        server = peer.server
        if server is not None:
            budget, blocks = server.budget, server.span.blocks
            tell("server_blocks", "gauge", "Blocks this peer holds.", ("", len(blocks)))
            tell("server_sessions", "gauge", "Sessions open at this peer.", ("", server.inbound.sessions))
            tell("server_cache_bytes", "gauge", "KV-cache budget of this peer.", ("", budget.total_bytes))
            tell("server_cache_free_bytes", "gauge", "What of it is free.", ("", budget.left_bytes))
        return "\n".join(lines) + "\n"
