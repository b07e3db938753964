"""Prometheus' text format, by hand: two dozen numbers need no library. docs/gateway.md lists the names.

Names that begin with vllm: are those of vLLM, where they mean the same, so that boards made for it show a peer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from petals.gateway.histogram import FIRST_TOKEN_S, REQUEST_S, TOKEN_S, Histogram
from petals.gateway.writing import Choice
from petals.peer.node import Peer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, float]
"""Labels in braces, or a suffix of the name; and the value."""


class Line(Protocol):
    """Who is answered, and who waits."""

    running: int
    waiting: int


class OfModel:
    """What was answered with one model."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        """Computed for every answer: a prompt with n answers counts n times."""
        self.new_tokens = 0
        self.ended: Counter[str] = Counter()
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.per_token = Histogram(TOKEN_S)
        self.whole = Histogram(REQUEST_S)


class Meter:
    """What the door has seen since it opened."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._models: defaultdict[str, OfModel] = defaultdict(OfModel)
        self._queue = Histogram(REQUEST_S)
        self._reused_tokens = 0
        self._first_token_s = 0.0
        self._first_tokens = 0
        self._decode_s = 0.0
        self._failed_calls = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(model.prompt_tokens for model in self._models.values())

    @property
    def generated_tokens(self) -> int:
        return sum(model.new_tokens for model in self._models.values())

    def answered(self, path: str, status: int) -> None:
        """A request has got its status; `path` is one of our routes."""
        self._requests[path, status] += 1

    def waited(self, seconds: float) -> None:
        """A request has been admitted."""
        self._queue.add(seconds)

    def generated(self, name: str, choices: Sequence[Choice]) -> None:
        """The generations of a request have ended, one way or another."""
        model = self._models[name]
        for choice in choices:
            self._failed_calls += choice.parser.failed_calls
            stream = choice.stream
            if stream is None:
                continue
            model.prompt_tokens += len(stream.prompt_ids)
            model.new_tokens += len(stream.token_ids)
            model.ended[stream.finish_reason or "cut"] += 1
            self._reused_tokens += stream.reused_tokens
            self._decode_s += stream.seconds.decode
            if stream.token_ids:
                self._first_tokens += 1
                self._first_token_s += stream.seconds.first_token
                model.first_token.add(stream.seconds.first_token)
                model.whole.add(stream.seconds.first_token + stream.seconds.decode)
            if len(stream.token_ids) > 1:
                model.per_token.add(stream.seconds.decode / (len(stream.token_ids) - 1))

    def text(self, peer: Peer, line: Line) -> str:
        """Everything, as Prometheus reads it."""
        page = _Page()
        self._requests_of(page, line)
        self._tokens(page)
        _swarm(page, peer)
        for name, model in self._models.items():
            self._as_vllm(page, f'model_name="{_escaped(name)}"', model)
        page.tell("vllm:num_requests_running", "gauge", "Answers being generated.", [("", line.running)])
        page.tell("vllm:num_requests_waiting", "gauge", "Requests that wait for their turn.", [("", line.waiting)])
        page.tell("vllm:request_queue_time_seconds", "histogram", "How long requests waited.", self._queue.samples(""))
        return page.text()

    def _requests_of(self, page: _Page, line: Line) -> None:
        requests = [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(self._requests.items())]
        page.tell("petals_http_requests_total", "counter", "Requests answered, by route and status.", requests)
        page.tell(
            "petals_http_answers_active", "gauge", "Answers being generated for HTTP clients.", [("", line.running)]
        )
        page.tell("petals_http_requests_waiting", "gauge", "Requests that wait for their turn.", [("", line.waiting)])
        ended: Counter[str] = sum((model.ended for model in self._models.values()), Counter())
        answers = [(f'{{ended="{reason}"}}', n) for reason, n in sorted(ended.items())]
        page.tell("petals_answers_total", "counter", "Answers by how they ended; cut: hung up or failed.", answers)
        page.tell(
            "petals_tool_calls_failed_total",
            "counter",
            "What looked like tool calls, and was told as text.",
            [("", self._failed_calls)],
        )

    def _tokens(self, page: _Page) -> None:
        about = "Tokens of prompts, once for each answer."
        page.tell("petals_prompt_tokens_total", "counter", about, [("", self.prompt_tokens)])
        about = "Of them, those that servers had kept."
        page.tell("petals_reused_tokens_total", "counter", about, [("", self._reused_tokens)])
        page.tell("petals_generated_tokens_total", "counter", "Tokens of answers.", [("", self.generated_tokens)])
        first = [("_sum", self._first_token_s), ("_count", self._first_tokens)]
        about = "From the tokenised prompt to the first token."
        page.tell("petals_first_token_seconds", "summary", about, first)
        about = "Time spent on all tokens after the first."
        page.tell("petals_decode_seconds_total", "counter", about, [("", self._decode_s)])

    def _as_vllm(self, page: _Page, label: str, model: OfModel) -> None:
        braced = f"{{{label}}}"
        page.tell("vllm:prompt_tokens_total", "counter", "Tokens of prompts.", [(braced, model.prompt_tokens)])
        page.tell("vllm:generation_tokens_total", "counter", "Tokens of answers.", [(braced, model.new_tokens)])
        ended = [
            (f'{{{label},finished_reason="{reason if reason != "cut" else "abort"}"}}', n)
            for reason, n in sorted(model.ended.items())
        ]
        page.tell("vllm:request_success_total", "counter", "Answers by how they ended.", ended)
        for name, about, histogram in (
            ("time_to_first_token_seconds", "From the tokenised prompt to the first token.", model.first_token),
            ("time_per_output_token_seconds", "Per token after the first, on average.", model.per_token),
            ("inter_token_latency_seconds", "Per token after the first, on average.", model.per_token),
            ("e2e_request_latency_seconds", "From the tokenised prompt to the last token.", model.whole),
        ):
            page.tell(f"vllm:{name}", "histogram", about, histogram.samples(label))


class _Page:
    """Metrics of one name stand together, under one head."""

    def __init__(self) -> None:
        self._heads: dict[str, tuple[str, str]] = {}
        self._lines: defaultdict[str, list[str]] = defaultdict(list)

    def tell(self, name: str, kind: str, about: str, samples: Iterable[Sample]) -> None:
        self._heads[name] = (kind, about)
        self._lines[name] += [f"{name}{labels} {value!r}" for labels, value in samples]

    def text(self) -> str:
        lines: list[str] = []
        for name, (kind, about) in self._heads.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *self._lines[name]]
        return "\n".join(lines) + "\n"


def _swarm(page: _Page, peer: Peer) -> None:
    dropped = [(f'{{why="{why}"}}', n) for why, n in sorted(peer.directory.dropped_records.items())]
    about = "Server records that were not believed."
    page.tell("petals_directory_dropped_records_total", "counter", about, dropped)
    ledger = peer.ledger
    page.tell("petals_given_block_tokens_total", "counter", "Work for other peers.", [("", ledger.given)])
    page.tell("petals_taken_block_tokens_total", "counter", "Work of other peers for this one.", [("", ledger.taken)])
    page.tell("petals_receipts_total", "counter", "Receipts that both ends signed.", [("", ledger.receipts)])
    about = "Receipts that did not pass a check."
    page.tell("petals_receipts_rejected_total", "counter", about, [("", ledger.rejected)])
    server = peer.server
    if server is not None:
        budget, blocks = server.budget, server.span.blocks
        page.tell("petals_server_blocks", "gauge", "Blocks this peer holds.", [("", len(blocks))])
        page.tell("petals_server_sessions", "gauge", "Sessions open at this peer.", [("", server.inbound.sessions)])
        page.tell("petals_server_cache_bytes", "gauge", "KV-cache budget of this peer.", [("", budget.total_bytes)])
        page.tell("petals_server_cache_free_bytes", "gauge", "What of it is free.", [("", budget.left_bytes)])


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
