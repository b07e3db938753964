"""The stack of blocks as an `nn.Module`, wherever the blocks are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petals.models.blocks.adapters import Lora
from petals.models.client.active_sessions import ActiveSessions
from petals.models.client.blockwise import forward_blockwise
from petals.models.client.chain import BlockChain
from petals.models.client.generation import ChainCache, InferenceSession
from petals.models.client.step_inputs import checked_hidden, checked_prompts
from petals.models.errors import BlockRangeError, StepError


@dataclass(frozen=True, slots=True)
class Call:
    """What the base model around the blocks was called with."""

    attention_mask: Tensor | None = None
    cache: ChainCache | None = None
    prompts: Tensor | None = None
    """Of deep prompt tuning, (blocks, batch, prefix, hidden_size)."""
    lora: Lora | None = None
    outputs: list[Tensor] | None = None
    """Filled with what goes into the first block and what every block puts out, when that was asked for."""


class RemoteSequential(nn.Module):
    """Consecutive blocks of a model over a `BlockChain`: `len`, iteration, `h[5]`, `h[3:7](hidden)`; differentiable.

    In a family's own base model it stands where the list of blocks was. The base model's loop over its list must see
    one "block" that is all of them, so that a step is one round trip and not one per block: while the base model runs
    (`called_with`), iteration and slicing yield just that.
    """

    def __init__(self, chain: BlockChain | None = None, sessions: ActiveSessions | None = None) -> None:
        """`sessions`: of the stack that this is a slice of."""
        super().__init__()
        self._sessions = sessions or ActiveSessions()
        self.tuple_size = 0
        """What the family's own loop expects of a block: a tensor (0), or a tuple of so many that starts with it."""
        self._chain = chain
        self._like: dict[str, Any] = {}
        self._local = threading.local()

    @property
    def chain(self) -> BlockChain:
        """The blocks; set once the model around is loaded."""
        if self._chain is None:
            raise BlockRangeError("this model is not connected to any blocks")
        return self._chain

    def stand_for(self, blocks: nn.ModuleList) -> None:
        """Have the plain attributes of the first of these, which a family's loop may look at: what it chooses by them
        (masks, mostly) is made for a local block and not used."""
        plain = (str, int, float, bool, type(None))
        self._like = {name: value for name, value in vars(blocks[0]).items() if isinstance(value, plain)}

    def __getattr__(self, name: str) -> Any:
        like = self.__dict__.get("_like", {})
        return like[name] if name in like else super().__getattr__(name)

    def connect(self, chain: BlockChain) -> None:
        """Plug in the blocks."""
        self._chain = chain

    @property
    def start_block(self) -> int:
        return self.chain.blocks.start

    @property
    def end_block(self) -> int:
        return self.chain.blocks.stop

    @property
    def sessions(self) -> ActiveSessions:
        """Shared with all slices."""
        return self._sessions

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the innermost open `with` in this thread or task that holds these blocks."""
        return self._sessions.holding(self.chain.blocks)

    @property
    def position(self) -> int:
        """Tokens per row in the active session; 0 without one."""
        session = self.active_session
        return 0 if session is None else session.position

    @property
    def sequence_manager(self) -> Any:
        """Who computes these blocks now (peer/client/sequence_manager.py).

        Raises:
            BlockRangeError: they are computed here.
        """
        found = getattr(self.chain, "sequence_manager", None)
        if found is None:
            raise BlockRangeError("these blocks are computed here, by no server")
        return found

    def forward(self, hidden: Tensor, prompts: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (batch, tokens, hidden_size) through all blocks.

        Inside of `inference_session` or `use_session` this continues the session; else it is differentiable and
        without cache. Called by the base model around us, whatever it passes besides (masks, rotary embeddings) was
        made for a local block and is not needed.

        Args:
            prompts: as of `ChainSession.step`; those of one row are for all rows.
            kwargs: `attention_mask`, (batch, tokens); `hypo_ids` in a session; `lora` without one.
        Raises:
            StepError: a tensor that does not fit. TypeError: an argument that is not known.
        """
        call: Call | None = getattr(self._local, "call", None)
        if call is None:
            return self._alone(hidden, prompts, *args, **kwargs)
        output = hidden if self.pretends else self._run(hidden, call)
        return (output, *[None] * (self.tuple_size - 1)) if self.tuple_size else output

    def _alone(
        self,
        hidden: Tensor,
        prompts: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        hypo_ids: Tensor | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        session = self.active_session
        if session is not None:
            if lora is not None:
                raise StepError("lora holds for a whole session: open it with a model that trains one")
            return session.step(hidden, prompts, hypo_ids, attention_mask=attention_mask, blocks=self.chain.blocks)
        if hypo_ids is not None:
            raise StepError("hypo_ids reorder the rows of a session: call this inside of inference_session()")
        checked_hidden(hidden, self.chain.hidden_size)
        prompts = checked_prompts(prompts, hidden, len(self.chain.blocks))
        if not hidden.shape[1]:
            return hidden
        return self.chain.forward(hidden, attention_mask=attention_mask, prompts=prompts, lora=lora)

    def _run(self, hidden: Tensor, call: Call) -> Tensor:
        mask, prompts, lora = call.attention_mask, call.prompts, call.lora
        if call.outputs is not None:
            call.outputs.append(hidden)
        if call.cache is not None and not call.cache.begins_without_session(hidden, prompts):
            return call.cache.step(hidden, mask, prompts, call.outputs)
        if call.outputs is None:
            output = self.chain.forward(hidden, attention_mask=mask, prompts=prompts, lora=lora)
        else:
            call.outputs.extend(forward_blockwise(self.chain, hidden, attention_mask=mask, prompts=prompts, lora=lora))
            output = call.outputs[-1]
        if call.cache is not None:
            call.cache.remember(hidden, mask, prompts)
        return output

    def inference_session(self, *, max_length: int, batch_size: int | None = None) -> InferenceSession:
        """Room for `max_length` tokens per row on these blocks; opened with the first step, when the rows are known.

        Args:
            batch_size: rows, to reserve the room at once.
        """
        cache = ChainCache(self.chain, max_length)
        if batch_size is not None:
            cache.reserve(batch_size)
        return InferenceSession(cache, max_length, self._sessions)

    @contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Make `session` the active one for a while, without closing it; None: none is.

        Raises:
            StepError: it belongs to other blocks.
        """
        if session is not None and session.active is not self._sessions:
            raise StepError("this session belongs to the blocks of another model")
        with self._sessions.use(session):
            yield session

    def __len__(self) -> int:
        if self._chain is None:
            return 0  # while the library builds the model, it may look for blocks to fill
        return 1 if self._inside else len(self.chain.blocks)

    def __iter__(self) -> Iterator[RemoteSequential]:
        if self._inside:
            return iter([self])
        return iter([self[index] for index in range(len(self))])

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        if self._inside:
            return self
        blocks = self.chain.blocks[index]
        if isinstance(blocks, int):
            blocks = range(blocks, blocks + 1)
        if not len(blocks) or blocks.step != 1:
            raise BlockRangeError(f"{index} picks no consecutive blocks out of {len(self)}")
        return RemoteSequential(self.chain.slice(blocks), self._sessions)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSequential:
        """The same blocks in the same swarm, with the same sessions: nothing of them is here to be copied."""
        twin = RemoteSequential(self._chain, self._sessions)
        twin.tuple_size, twin._like = self.tuple_size, self._like
        memo[id(self)] = twin
        return twin

    @property
    def _inside(self) -> bool:
        return getattr(self._local, "call", None) is not None

    @contextmanager
    def called_with(self, call: Call) -> Iterator[None]:
        """While open, the base model around us runs its loop in this thread."""
        self._local.call = call
        try:
            yield
        finally:
            self._local.call = None

    @property
    def pretends(self) -> bool:
        """Whether blocks do nothing, in this thread."""
        return getattr(self._local, "pretending", False)

    @contextmanager
    def pretending(self) -> Iterator[None]:
        """Blocks that do nothing, in this thread."""
        self._local.pretending = True
        try:
            yield
        finally:
            self._local.pretending = False
