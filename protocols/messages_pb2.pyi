from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    INT64: _ClassVar[DType]
    BOOL: _ClassVar[DType]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RAW: _ClassVar[Encoding]
    AS_FLOAT16: _ClassVar[Encoding]
    BLOCKWISE_INT8: _ClassVar[Encoding]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_UNSPECIFIED: _ClassVar[ErrorCode]
    MALFORMED: _ClassVar[ErrorCode]
    OUT_OF_ORDER: _ClassVar[ErrorCode]
    UNKNOWN_MODEL: _ClassVar[ErrorCode]
    BLOCKS_NOT_HELD: _ClassVar[ErrorCode]
    TOO_LONG: _ClassVar[ErrorCode]
    BUSY: _ClassVar[ErrorCode]
    UNSUPPORTED: _ClassVar[ErrorCode]
    LEAVING: _ClassVar[ErrorCode]
    INTERNAL: _ClassVar[ErrorCode]
    QUOTA: _ClassVar[ErrorCode]
    FORBIDDEN: _ClassVar[ErrorCode]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
INT64: DType
BOOL: DType
RAW: Encoding
AS_FLOAT16: Encoding
BLOCKWISE_INT8: Encoding
ERROR_UNSPECIFIED: ErrorCode
MALFORMED: ErrorCode
OUT_OF_ORDER: ErrorCode
UNKNOWN_MODEL: ErrorCode
BLOCKS_NOT_HELD: ErrorCode
TOO_LONG: ErrorCode
BUSY: ErrorCode
UNSUPPORTED: ErrorCode
LEAVING: ErrorCode
INTERNAL: ErrorCode
QUOTA: ErrorCode
FORBIDDEN: ErrorCode

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "encoding")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    encoding: Encoding
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., encoding: _Optional[_Union[Encoding, str]] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("block", "path", "a", "b", "scaling")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    block: int
    path: str
    a: Tensor
    b: Tensor
    scaling: float
    def __init__(self, block: _Optional[int] = ..., path: _Optional[str] = ..., a: _Optional[_Union[Tensor, _Mapping]] = ..., b: _Optional[_Union[Tensor, _Mapping]] = ..., scaling: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session_id", "model_digest", "start_block", "end_block", "batch_size", "max_length", "wait_ms", "adapter", "reply_encoding", "lora", "prefixes", "sign")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REPLY_ENCODING_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    SIGN_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    model_digest: str
    start_block: int
    end_block: int
    batch_size: int
    max_length: int
    wait_ms: int
    adapter: str
    reply_encoding: Encoding
    lora: _containers.RepeatedCompositeFieldContainer[LowRank]
    prefixes: _containers.RepeatedScalarFieldContainer[bytes]
    sign: bool
    def __init__(self, session_id: _Optional[bytes] = ..., model_digest: _Optional[str] = ..., start_block: _Optional[int] = ..., end_block: _Optional[int] = ..., batch_size: _Optional[int] = ..., max_length: _Optional[int] = ..., wait_ms: _Optional[int] = ..., adapter: _Optional[str] = ..., reply_encoding: _Optional[_Union[Encoding, str]] = ..., lora: _Optional[_Iterable[_Union[LowRank, _Mapping]]] = ..., prefixes: _Optional[_Iterable[bytes]] = ..., sign: _Optional[bool] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("dtype", "cache_bytes", "prefix_tokens", "public_key", "quant_type")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    QUANT_TYPE_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    cache_bytes: int
    prefix_tokens: int
    public_key: bytes
    quant_type: str
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., cache_bytes: _Optional[int] = ..., prefix_tokens: _Optional[int] = ..., public_key: _Optional[bytes] = ..., quant_type: _Optional[str] = ...) -> None: ...

class PushTo(_message.Message):
    __slots__ = ("peer_id", "addrs", "session_id", "step_id")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRS_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    addrs: _containers.RepeatedScalarFieldContainer[str]
    session_id: bytes
    step_id: int
    def __init__(self, peer_id: _Optional[str] = ..., addrs: _Optional[_Iterable[str]] = ..., session_id: _Optional[bytes] = ..., step_id: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step_id", "position", "silent", "hidden", "attention_mask", "prompts", "hypo_ids", "pushed_by", "push_to")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    HYPO_IDS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BY_FIELD_NUMBER: _ClassVar[int]
    PUSH_TO_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    position: int
    silent: bool
    hidden: Tensor
    attention_mask: Tensor
    prompts: Tensor
    hypo_ids: Tensor
    pushed_by: str
    push_to: PushTo
    def __init__(self, step_id: _Optional[int] = ..., position: _Optional[int] = ..., silent: _Optional[bool] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[Tensor, _Mapping]] = ..., prompts: _Optional[_Union[Tensor, _Mapping]] = ..., hypo_ids: _Optional[_Union[Tensor, _Mapping]] = ..., pushed_by: _Optional[str] = ..., push_to: _Optional[_Union[PushTo, _Mapping]] = ...) -> None: ...

class Supply(_message.Message):
    __slots__ = ("step_id", "hidden")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    hidden: Tensor
    def __init__(self, step_id: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("step_id", "hidden", "queue_us", "compute_us", "supplied", "signature")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    SUPPLIED_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    hidden: Tensor
    queue_us: int
    compute_us: int
    supplied: bool
    signature: bytes
    def __init__(self, step_id: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., supplied: _Optional[bool] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("prefixes",)
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, prefixes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class InferenceRequest(_message.Message):
    __slots__ = ("open", "step", "close", "supply")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    SUPPLY_FIELD_NUMBER: _ClassVar[int]
    open: Open
    step: Step
    close: Close
    supply: Supply
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., supply: _Optional[_Union[Supply, _Mapping]] = ...) -> None: ...

class InferenceReply(_message.Message):
    __slots__ = ("opened", "step_done", "error")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STEP_DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    step_done: StepDone
    error: Error
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., step_done: _Optional[_Union[StepDone, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("session_id", "step_id", "hidden")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    step_id: int
    hidden: Tensor
    def __init__(self, session_id: _Optional[bytes] = ..., step_id: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class TrainingRequest(_message.Message):
    __slots__ = ("model_digest", "start_block", "end_block", "adapter", "reply_encoding", "hidden", "attention_mask", "prompts", "grad_output", "lora")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REPLY_ENCODING_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    GRAD_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    start_block: int
    end_block: int
    adapter: str
    reply_encoding: Encoding
    hidden: Tensor
    attention_mask: Tensor
    prompts: Tensor
    grad_output: Tensor
    lora: _containers.RepeatedCompositeFieldContainer[LowRank]
    def __init__(self, model_digest: _Optional[str] = ..., start_block: _Optional[int] = ..., end_block: _Optional[int] = ..., adapter: _Optional[str] = ..., reply_encoding: _Optional[_Union[Encoding, str]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[Tensor, _Mapping]] = ..., prompts: _Optional[_Union[Tensor, _Mapping]] = ..., grad_output: _Optional[_Union[Tensor, _Mapping]] = ..., lora: _Optional[_Iterable[_Union[LowRank, _Mapping]]] = ...) -> None: ...

class TrainingDone(_message.Message):
    __slots__ = ("hidden", "prompts", "queue_us", "compute_us", "lora")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    hidden: Tensor
    prompts: Tensor
    queue_us: int
    compute_us: int
    lora: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, hidden: _Optional[_Union[Tensor, _Mapping]] = ..., prompts: _Optional[_Union[Tensor, _Mapping]] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., lora: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class TrainingReply(_message.Message):
    __slots__ = ("done", "error")
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    done: TrainingDone
    error: Error
    def __init__(self, done: _Optional[_Union[TrainingDone, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("model_digest", "complaints")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMPLAINTS_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    complaints: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, model_digest: _Optional[str] = ..., complaints: _Optional[_Iterable[bytes]] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("records", "version", "unix_time", "complaints")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNIX_TIME_FIELD_NUMBER: _ClassVar[int]
    COMPLAINTS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedScalarFieldContainer[bytes]
    version: str
    unix_time: float
    complaints: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, records: _Optional[_Iterable[bytes]] = ..., version: _Optional[str] = ..., unix_time: _Optional[float] = ..., complaints: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SignedAnswer(_message.Message):
    __slots__ = ("peer_id", "public_key", "signature", "session_id", "step_id", "model_digest", "start_block", "end_block", "adapter", "dtype", "quant_type", "inputs", "output")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANT_TYPE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    public_key: bytes
    signature: bytes
    session_id: bytes
    step_id: int
    model_digest: str
    start_block: int
    end_block: int
    adapter: str
    dtype: str
    quant_type: str
    inputs: bytes
    output: bytes
    def __init__(self, peer_id: _Optional[str] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., session_id: _Optional[bytes] = ..., step_id: _Optional[int] = ..., model_digest: _Optional[str] = ..., start_block: _Optional[int] = ..., end_block: _Optional[int] = ..., adapter: _Optional[str] = ..., dtype: _Optional[str] = ..., quant_type: _Optional[str] = ..., inputs: _Optional[bytes] = ..., output: _Optional[bytes] = ...) -> None: ...

class Complaint(_message.Message):
    __slots__ = ("accuser", "answer", "others", "error", "tolerance", "issued_at", "expires_at")
    ACCUSER_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    accuser: str
    answer: SignedAnswer
    others: _containers.RepeatedCompositeFieldContainer[SignedAnswer]
    error: float
    tolerance: float
    issued_at: float
    expires_at: float
    def __init__(self, accuser: _Optional[str] = ..., answer: _Optional[_Union[SignedAnswer, _Mapping]] = ..., others: _Optional[_Iterable[_Union[SignedAnswer, _Mapping]]] = ..., error: _Optional[float] = ..., tolerance: _Optional[float] = ..., issued_at: _Optional[float] = ..., expires_at: _Optional[float] = ...) -> None: ...

class SignedComplaint(_message.Message):
    __slots__ = ("public_key", "complaint", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    COMPLAINT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    complaint: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., complaint: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Invitation(_message.Message):
    __slots__ = ("issuer", "nonce", "expires_at", "model_digest", "bearer", "uses", "addrs", "holder")
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BEARER_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    ADDRS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    issuer: bytes
    nonce: bytes
    expires_at: int
    model_digest: str
    bearer: str
    uses: int
    addrs: _containers.RepeatedScalarFieldContainer[str]
    holder: bytes
    def __init__(self, issuer: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., expires_at: _Optional[int] = ..., model_digest: _Optional[str] = ..., bearer: _Optional[str] = ..., uses: _Optional[int] = ..., addrs: _Optional[_Iterable[str]] = ..., holder: _Optional[bytes] = ...) -> None: ...

class SignedInvitation(_message.Message):
    __slots__ = ("invitation", "signature")
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    invitation: bytes
    signature: bytes
    def __init__(self, invitation: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class InvitationToken(_message.Message):
    __slots__ = ("signed", "swarm_key", "holder_key")
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    SWARM_KEY_FIELD_NUMBER: _ClassVar[int]
    HOLDER_KEY_FIELD_NUMBER: _ClassVar[int]
    signed: SignedInvitation
    swarm_key: bytes
    holder_key: bytes
    def __init__(self, signed: _Optional[_Union[SignedInvitation, _Mapping]] = ..., swarm_key: _Optional[bytes] = ..., holder_key: _Optional[bytes] = ...) -> None: ...

class AdmitRequest(_message.Message):
    __slots__ = ("invitation", "proof")
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    invitation: SignedInvitation
    proof: bytes
    def __init__(self, invitation: _Optional[_Union[SignedInvitation, _Mapping]] = ..., proof: _Optional[bytes] = ...) -> None: ...

class AdmitReply(_message.Message):
    __slots__ = ("error", "until")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    error: Error
    until: int
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ..., until: _Optional[int] = ...) -> None: ...

class DocumentRequest(_message.Message):
    __slots__ = ("document", "offset", "hash_only")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    HASH_ONLY_FIELD_NUMBER: _ClassVar[int]
    document: int
    offset: int
    hash_only: bool
    def __init__(self, document: _Optional[int] = ..., offset: _Optional[int] = ..., hash_only: _Optional[bool] = ...) -> None: ...

class PieceRequest(_message.Message):
    __slots__ = ("section", "sha256")
    SECTION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    section: int
    sha256: bytes
    def __init__(self, section: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class WeightsRequest(_message.Message):
    __slots__ = ("model_digest", "document", "piece")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    document: DocumentRequest
    piece: PieceRequest
    def __init__(self, model_digest: _Optional[str] = ..., document: _Optional[_Union[DocumentRequest, _Mapping]] = ..., piece: _Optional[_Union[PieceRequest, _Mapping]] = ...) -> None: ...

class WeightsPart(_message.Message):
    __slots__ = ("nbytes", "total", "sha256")
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    nbytes: int
    total: int
    sha256: bytes
    def __init__(self, nbytes: _Optional[int] = ..., total: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class WeightsReply(_message.Message):
    __slots__ = ("part", "error")
    PART_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    part: WeightsPart
    error: Error
    def __init__(self, part: _Optional[_Union[WeightsPart, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("server", "client", "receipt_id", "model_digest", "start_block", "end_block", "steps", "block_tokens", "recent_block_tokens", "started_at", "ended_at")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECENT_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    server: str
    client: str
    receipt_id: bytes
    model_digest: str
    start_block: int
    end_block: int
    steps: int
    block_tokens: int
    recent_block_tokens: int
    started_at: float
    ended_at: float
    def __init__(self, server: _Optional[str] = ..., client: _Optional[str] = ..., receipt_id: _Optional[bytes] = ..., model_digest: _Optional[str] = ..., start_block: _Optional[int] = ..., end_block: _Optional[int] = ..., steps: _Optional[int] = ..., block_tokens: _Optional[int] = ..., recent_block_tokens: _Optional[int] = ..., started_at: _Optional[float] = ..., ended_at: _Optional[float] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("work", "server_key", "server_signature", "client_key", "client_signature")
    WORK_FIELD_NUMBER: _ClassVar[int]
    SERVER_KEY_FIELD_NUMBER: _ClassVar[int]
    SERVER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    work: bytes
    server_key: bytes
    server_signature: bytes
    client_key: bytes
    client_signature: bytes
    def __init__(self, work: _Optional[bytes] = ..., server_key: _Optional[bytes] = ..., server_signature: _Optional[bytes] = ..., client_key: _Optional[bytes] = ..., client_signature: _Optional[bytes] = ...) -> None: ...

class ReceiptRequest(_message.Message):
    __slots__ = ("work", "public_key", "signature", "wants_references")
    WORK_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    WANTS_REFERENCES_FIELD_NUMBER: _ClassVar[int]
    work: bytes
    public_key: bytes
    signature: bytes
    wants_references: bool
    def __init__(self, work: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., wants_references: _Optional[bool] = ...) -> None: ...

class ReceiptReply(_message.Message):
    __slots__ = ("public_key", "signature", "block_tokens", "recent_block_tokens", "references")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECENT_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    signature: bytes
    block_tokens: int
    recent_block_tokens: int
    references: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., block_tokens: _Optional[int] = ..., recent_block_tokens: _Optional[int] = ..., references: _Optional[_Iterable[bytes]] = ...) -> None: ...
