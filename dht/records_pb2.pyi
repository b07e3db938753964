from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ServerRecord(_message.Message):
    __slots__ = ("model_name", "model_digest", "peer_id", "start_block", "end_block", "state", "addrs", "version", "public_name", "dtype", "quant_type", "adapters", "inference_rps", "forward_rps", "queue_s", "cache_tokens_left", "using_relay", "round_trips_s", "sequence", "issued_at", "expires_at", "num_blocks", "reachability", "instance", "key_elsewhere")
    class RoundTripsSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    START_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANT_TYPE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_RPS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_RPS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    USING_RELAY_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIPS_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REACHABILITY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KEY_ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_digest: str
    peer_id: str
    start_block: int
    end_block: int
    state: int
    addrs: _containers.RepeatedScalarFieldContainer[str]
    version: str
    public_name: str
    dtype: str
    quant_type: str
    adapters: _containers.RepeatedScalarFieldContainer[str]
    inference_rps: float
    forward_rps: float
    queue_s: float
    cache_tokens_left: int
    using_relay: bool
    round_trips_s: _containers.ScalarMap[str, float]
    sequence: int
    issued_at: float
    expires_at: float
    num_blocks: int
    reachability: str
    instance: bytes
    key_elsewhere: bool
    def __init__(self, model_name: _Optional[str] = ..., model_digest: _Optional[str] = ..., peer_id: _Optional[str] = ..., start_block: _Optional[int] = ..., end_block: _Optional[int] = ..., state: _Optional[int] = ..., addrs: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., public_name: _Optional[str] = ..., dtype: _Optional[str] = ..., quant_type: _Optional[str] = ..., adapters: _Optional[_Iterable[str]] = ..., inference_rps: _Optional[float] = ..., forward_rps: _Optional[float] = ..., queue_s: _Optional[float] = ..., cache_tokens_left: _Optional[int] = ..., using_relay: _Optional[bool] = ..., round_trips_s: _Optional[_Mapping[str, float]] = ..., sequence: _Optional[int] = ..., issued_at: _Optional[float] = ..., expires_at: _Optional[float] = ..., num_blocks: _Optional[int] = ..., reachability: _Optional[str] = ..., instance: _Optional[bytes] = ..., key_elsewhere: _Optional[bool] = ...) -> None: ...

class SignedRecord(_message.Message):
    __slots__ = ("public_key", "record", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    record: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., record: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...
