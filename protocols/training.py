"""Forward and backward of a span without a cache: one request, one answer, one stream."""

from __future__ import annotations

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteProtocolError
from petals.protocols.inference import MAX_BATCH_SIZE, MAX_LENGTH, check_model
from petals.protocols.lora import lora_payload
from petals.protocols.tensors import BOOL, FLOATS, check_header

FORWARD_V1 = "/petals/forward/1.0.0"
BACKWARD_V1 = "/petals/backward/1.0.0"


def request_payload(
    request: pb.TrainingRequest, hidden_size: int, *, backward: bool
) -> list[tuple[str, pb.Tensor, int]]:
    """The tensors behind a request, as (name, header, bytes on the wire), checked.

    Raises:
        ProtocolViolation, RemoteProtocolError: a dtype, shape or size that does not fit.
    """
    check_model(request.model_digest, request.start_block, request.end_block)
    plan = [("hidden", request.hidden, check_header(request.hidden, name="hidden", shape=(None, None, hidden_size)))]
    batch, tokens = request.hidden.shape[:2]
    if batch > MAX_BATCH_SIZE or tokens > MAX_LENGTH:
        raise RemoteProtocolError(f"{batch} x {tokens} tokens, allowed are {MAX_BATCH_SIZE} x {MAX_LENGTH}")
    if request.HasField("attention_mask"):
        size = check_header(request.attention_mask, name="attention_mask", shape=(batch, tokens), dtypes=BOOL)
        plan.append(("attention_mask", request.attention_mask, size))
    if request.HasField("prompts"):
        shape = (request.end_block - request.start_block, batch, None, hidden_size)
        size = check_header(request.prompts, name="prompts", shape=shape, dtypes=FLOATS)
        if request.prompts.shape[2] > tokens:
            raise RemoteProtocolError("prompts: longer than the sequence")
        plan.append(("prompts", request.prompts, size))
    if backward != request.HasField("grad_output"):
        raise RemoteProtocolError("grad_output belongs to backward, and only there")
    if backward:
        size = check_header(request.grad_output, name="grad_output", shape=(batch, tokens, hidden_size))
        plan.append(("grad_output", request.grad_output, size))
    return plan + lora_payload(request.lora, range(request.start_block, request.end_block))
