"""Signs what a session is answered (protocols/evidence.py says what a signature is over)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import trio
from torch import Tensor

from petals.dht.directory import Signer
from petals.models.blocks.block import BlockSpan
from petals.peer.engine.lora_codec import digest_lora
from petals.peer.engine.stream_rules import Adapter
from petals.protocols import messages_pb2 as pb
from petals.protocols.evidence import History, Statement, Told
from petals.protocols.prefixes import PREFIX_TOKENS
from petals.protocols.tensors import digest_tensor, travelled

T = TypeVar("T")

INLINE_BYTES = 256 << 10
"""More than this is digested in a worker thread: a gigabyte a second is a long time for everybody else."""


class Notary:
    """Keeps the history of one session, and signs."""

    def __init__(self, signer: Signer, span: BlockSpan, opening: pb.Open, adapter: Adapter, opened: pb.Opened) -> None:
        blocks = range(opening.start_block, opening.end_block)
        known = opened.prefix_tokens // PREFIX_TOKENS
        lora = None if isinstance(adapter, str) else adapter
        self._history = History(opening.prefixes[known - 1] if known else b"", digest_lora(lora, blocks))
        self._signer = signer
        self._opening = opening
        self._blocks = blocks
        self._dtype = str(span.dtype).removeprefix("torch.")
        self._quant_type = span.quant_type
        opened.public_key, opened.quant_type = signer.public_key, span.quant_type

    async def note(self, position: int, tensors: Mapping[str, Tensor]) -> None:
        """A step is about to be computed; `tensors` as they arrived."""
        self._history.add(await digested(list(tensors.values()), partial(told, position, tensors)))

    async def sign(self, step_id: int, output: Tensor, encoding: pb.Encoding) -> bytes:
        """The signature of the answer to the step that was noted last, which travels with this encoding."""
        statement = Statement(
            session_id=self._opening.session_id,
            step_id=step_id,
            model_digest=self._opening.model_digest,
            blocks=self._blocks,
            adapter=self._opening.adapter,
            dtype=self._dtype,
            quant_type=self._quant_type,
            inputs=self._history.digest,
            output=await digested([output], lambda: digest_tensor(travelled(output, encoding))),
        )
        return self._signer.sign(statement.to_bytes())


def told(position: int, tensors: Mapping[str, Tensor]) -> Told:
    """A step as it enters the history; `tensors` by the names of the fields of `Step`."""
    order, mask, prompts = (tensors.get(name) for name in ("hypo_ids", "attention_mask", "prompts"))
    return Told(
        position=position,
        hidden=digest_tensor(tensors["hidden"]),
        attention_mask=None if mask is None else digest_tensor(mask),
        prompts=None if prompts is None else digest_tensor(prompts),
        order=None if order is None else tuple(order.tolist()),
    )


async def digested(tensors: Sequence[Tensor], work: Callable[[], T]) -> T:
    """`work()`, which digests these tensors, where it holds nobody up."""
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= INLINE_BYTES:
        return work()
    return await trio.to_thread.run_sync(work)
