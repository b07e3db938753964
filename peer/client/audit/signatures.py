"""What a hop has signed, put together again from what it was told and what it answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio
from torch import Tensor

from petals.peer.client.hops.hop import Hop, StepInput, StepOutput
from petals.peer.engine.lora_codec import digest_lora
from petals.protocols import messages_pb2 as pb
from petals.protocols.evidence import History, SignedAnswer, Statement, Told
from petals.protocols.tensors import digest_tensor, travelled


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one server, and all it depends on."""

    hop: Hop
    history: tuple[StepInput, ...]
    """What the server had been told, the step that it answered last."""
    hidden: Tensor
    """(batch, new_tokens, hidden_size), as it came."""
    step_id: int
    signature: bytes
    encoding: pb.Encoding

    @classmethod
    def of(cls, hop: Hop, output: StepOutput) -> Answer:
        """The answer to the last step of the hop's history."""
        assert output.hidden is not None
        history = tuple(hop.history)
        return cls(hop, history, output.hidden, output.step_id, output.signature, output.encoding)

    @property
    def step(self) -> StepInput:
        return self.history[-1]

    @property
    def dtype(self) -> str:
        """What it was computed in, as records name it."""
        return str(self.hop.dtype).removeprefix("torch.")

    @property
    def rows(self) -> Tensor | None:
        """(batch, new_tokens) bool: which are no padding; None: all."""
        mask = self.step.attention_mask
        return None if mask is None else mask[:, -self.hidden.shape[1] :]

    def follows(self, other: Answer) -> bool:
        """Whether the same server was told all of `other`'s history on the way here."""
        known = len(other.history)
        return self.hop is other.hop and len(self.history) >= known and self.history[known - 1] is other.step

    async def signed(self) -> SignedAnswer:
        """With the statement that its signature must be over. In a worker thread: it digests the whole history."""
        return await trio.to_thread.run_sync(self._signed)

    def _signed(self) -> SignedAnswer:
        hop, spec = self.hop, self.hop.spec
        history = History(lora=digest_lora(spec.lora, hop.blocks))
        for step in self.history:
            history.add(told_as(step, spec.encoding))
        assert hop.conversation.opening is not None
        return SignedAnswer(
            peer_id=hop.peer_id,
            public_key=hop.public_key,
            signature=self.signature,
            statement=Statement(
                session_id=hop.session_id,
                step_id=self.step_id,
                model_digest=spec.model.digest,
                blocks=hop.blocks,
                adapter=spec.adapter,
                dtype=self.dtype,
                quant_type=hop.quant_type,
                inputs=history.digest,
                output=digest_tensor(self.hidden),
            ),
        )


def told_as(step: StepInput, encoding: pb.Encoding) -> Told:
    """A step as it enters a server's history that it travelled to with this encoding."""
    return Told(
        position=step.position,
        hidden=digest_tensor(travelled(step.hidden, encoding)),
        attention_mask=None if step.attention_mask is None else digest_tensor(step.attention_mask),
        prompts=None if step.prompts is None else digest_tensor(step.prompts),
        order=None if step.hypo_ids is None else tuple(step.hypo_ids.tolist()),
    )


def same_history(one: Sequence[StepInput], other: Sequence[StepInput]) -> int:
    """How many steps, from the first on, the two have in common."""
    count = 0
    for mine, yours in zip(one, other, strict=False):
        if mine is not yours:
            break
        count += 1
    return count
