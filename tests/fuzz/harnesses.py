"""All decoders that a stranger's bytes reach, and where valid inputs for them come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from petals.peer.net.wire.multistream import proposal
from petals.protocols import messages_pb2 as pb
from petals.protocols.framing import encode_frame
from tests.fuzz import bodies, files, sessions, swarm, ways, wire
from tests.fuzz.mutate import Grammar

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Harness:
    """One decoder. `one_input` returns, or raises when it has found a bug."""

    one_input: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    """Real messages, from the code that makes them."""
    grammar: Grammar = "bytes"
    ci_inputs: int = 60


def _yamux_seeds() -> list[bytes]:
    from petals.peer.net.wire.yamux import YamuxSession

    session = YamuxSession(is_client=True)
    stream, other = session.open_stream(), session.open_stream()
    session.write(stream, memoryview(b"hello" * 100))
    session.ping(7)
    session.close_write(stream)
    session.reset(other)
    said = b"".join(session.take_output())
    session.go_away()
    return [bytes([manner]) + said for manner in (0, 14, 62, 120)] + [b"\0" + b"".join(session.take_output())]


def _tensor_seeds() -> list[bytes]:
    headers = [
        pb.Tensor(dtype=dtype, shape=shape, encoding=encoding).SerializeToString()
        for dtype, shape, encoding in (
            (pb.FLOAT32, (1, 2, 32), pb.RAW), (pb.BFLOAT16, (1, 1, 32), pb.BLOCKWISE_INT8), (pb.BOOL, (2, 3), pb.RAW),
            (pb.INT64, (3,), pb.RAW), (pb.FLOAT16, (2, 2, 2), pb.AS_FLOAT16),
        )
    ]  # fmt: skip
    return [bytes([len(header)]) + header + bytes(range(200)) for header in headers]


HARNESSES: Mapping[str, Harness] = {
    "frames": Harness(wire.frames, lambda: [encode_frame(b"one") + encode_frame(bytes(300)) + encode_frame(b"")]),
    "multistream": Harness(
        wire.multistream, lambda: [proposal("/ipfs/ping/1.0.0"), proposal("/petals/info/1.0.0"), proposal("/no")]
    ),
    "noise": Harness(wire.noise, lambda: [bytes(range(100)), b"\0\x10" + bytes(16)]),
    "handshake": Harness(wire.handshake, wire.handshake_seeds, "proto", ci_inputs=20),
    "yamux": Harness(wire.yamux, _yamux_seeds, ci_inputs=200),
    "tensors": Harness(wire.tensors, _tensor_seeds, ci_inputs=200),
    "info": Harness(wire.info, sessions.info_seeds, "frames"),
    "inference": Harness(sessions.inference, sessions.inference_seeds, "frames", ci_inputs=100),
    "training": Harness(sessions.training, sessions.training_seeds, "frames"),
    "push": Harness(sessions.push, sessions.push_seeds, "frames"),
    "replies": Harness(sessions.replies, sessions.replies_seeds, "frames"),
    "records": Harness(swarm.records, swarm.records_seeds, "proto"),
    "kademlia": Harness(swarm.kademlia, swarm.kademlia_seeds, "frames"),
    "peers": Harness(swarm.peers, swarm.peers_seeds),
    "keys": Harness(files.keys, files.keys_seeds, "proto", ci_inputs=30),
    "api_keys": Harness(files.api_keys, files.api_keys_seeds),
    "config": Harness(files.config, files.config_seeds, "json", ci_inputs=30),
    "generation_settings": Harness(files.generation_settings, files.generation_settings_seeds, "json", ci_inputs=30),
    "index": Harness(files.index, files.index_seeds, "json", ci_inputs=30),
    "manifest": Harness(files.manifest, files.manifest_seeds, "json", ci_inputs=30),
    "safetensors": Harness(files.safetensors, files.safetensors_seeds, "json"),
    "adapter": Harness(files.adapter, files.adapter_seeds, "json"),
    "gguf": Harness(files.gguf_file, files.gguf_file_seeds),
    "chat": Harness(bodies.chat, bodies.chat_seeds, "json"),
    "completion": Harness(bodies.completion, bodies.completion_seeds, "json"),
    "messages": Harness(bodies.messages, bodies.messages_seeds, "json"),
    "response": Harness(bodies.response, bodies.response_seeds, "json"),
    "ollama": Harness(bodies.ollama, bodies.ollama_seeds, "json"),
    "swarm_key": Harness(ways.swarm_key, ways.swarm_key_seeds, ci_inputs=20),
    "invitations": Harness(ways.invitations, ways.invitations_seeds, "frames", ci_inputs=20),
    "lan": Harness(ways.lan, ways.lan_seeds),
    "relayed": Harness(ways.relayed, ways.relayed_seeds, "frames", ci_inputs=20),
    "punching": Harness(ways.punching, ways.punching_seeds, "frames", ci_inputs=20),
    "evidence": Harness(ways.evidence, ways.evidence_seeds, "proto", ci_inputs=20),
    "receipts": Harness(ways.receipts, ways.receipts_seeds, "proto", ci_inputs=20),
    "weights": Harness(ways.weights, ways.weights_seeds, "json", ci_inputs=30),
}


def corpus_of(name: str) -> list[bytes]:
    """Committed inputs: seeds, and every input that once found a bug."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
