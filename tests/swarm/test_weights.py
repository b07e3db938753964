"""A swarm that grows without a hub: what newcomers fetch from those who serve, and from whom not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from petals.models.source.checkpoint import INDEX, MANIFEST, Checkpoint, open_checkpoint
from petals.models.source.weights import FIRST_BLOCK, SharedWeights, seal
from petals.peer.base.config import ServeConfig
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.node import Peer
from petals.peer.weights.fetch import SwarmWeights
from petals.peer.weights.share import WeightSender
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import UserError
from petals.protocols.stream import MessageStream
from petals.protocols.types import ModelId
from petals.protocols.weights import WEIGHTS_V1, document_request, piece_request
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm

MakeSwarm = Callable[..., Swarm]
PROMPT = [5, 9, 17, 3]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model with tokenizer and model card, as somebody publishes it, and the same run by `transformers`."""
    directory = tmp_path_factory.mktemp("original")
    model = save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(199)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return directory, model


@pytest.fixture
def model(original: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of one's own."""
    return Path(shutil.copytree(original[0], tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST)))


@pytest.fixture(autouse=True)
def new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """From now on, peers fetch into a cache of their own."""

    def move(name: str) -> Path:
        monkeypatch.setenv("PETALS_CACHE", str(tmp_path / name))
        return tmp_path / name

    move("first")
    return move


def tampering(peer: Peer, directory: Path, change: Callable[[bytes], bytes], *, once: trio.Event | None = None) -> None:
    """`peer` sends something else than its pieces from now on; not before `once`."""

    class Tampering(WeightSender):
        async def _piece(self, section: int, sha256: bytes) -> bytes:
            if once is not None:
                await once.wait()
            return change(await super()._piece(section, sha256))

    peer.host.set_handler(WEIGHTS_V1, Tampering(open_checkpoint(directory), ServeConfig(), lambda _: True).answer)


async def weights_of(peer: Peer, directory: Path, lines: list[str] | None = None) -> SwarmWeights:
    model = ModelId("tiny", open_checkpoint(directory).digest)
    return SwarmWeights(peer.host, peer.directory, model, [].append if lines is None else lines.append)


def same_tensors(fetched: Checkpoint, directory: Path, blocks: range) -> None:
    """Compare with the original, tensor by tensor."""
    truth = open_checkpoint(directory)
    names = [name for block in blocks for name, _ in truth.block_tensors(block)]
    ours, theirs = fetched.read(names), truth.read(names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


async def test_a_swarm_grows_from_one_peer_that_has_the_model(
    make_swarm: MakeSwarm, model: Path, original: tuple[Path, Any], new_machine: Callable[[str], Path]
) -> None:
    swarm = make_swarm(model)
    first = await swarm.add(range(2))
    digest = open_checkpoint(model).digest
    swarm.model = f"swarm:{digest}"
    new_machine("client")
    asker = await swarm.add()
    client = await asker.client()
    assert client.model.digest == digest
    assert client.checkpoint.tokenizer()("w7 w3")["input_ids"] == [7, 3]
    cache = new_machine("second")
    second = await swarm.add(range(2, 4))
    held = sorted(path.name for path in (cache / "fetched" / digest).glob("*.safetensors"))
    assert held == [f"block-{block:05d}.safetensors" for block in (2, 3)]
    shutil.rmtree(model)  # the rest comes from those who have fetched it themselves
    first.host.remove_handler(WEIGHTS_V1)
    swarm.model = "swarm:" + digest[:10]
    new_machine("third")
    third = await swarm.add(range(2, 4))
    await swarm.stop(second)
    stream = await asker.generate(PROMPT, options=GenerationOptions(max_new_tokens=12))
    tokens = [token.id async for token in stream]
    truth = original[1].generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    assert tokens == truth
    assert [hop.peer_id for hop in stream.route] == [first.peer_id, third.peer_id]
    assert len(set(truth)) > 3, "a model that repeats itself proves nothing"
    same_tensors(await third.checkpoint(), original[0], range(2, 4))


async def test_one_sender_lies_and_one_dies(
    make_swarm: MakeSwarm, model: Path, new_machine: Callable[[str], Path]
) -> None:
    swarm = make_swarm(model)
    liar, dying, honest = [await swarm.add(range(4)) for _ in range(3)]
    asker = await swarm.add()
    lied, died = trio.Event(), trio.Event()

    def lie(piece: bytes) -> bytes:
        lied.set()
        return bytes([piece[0] ^ 1]) + piece[1:]

    def die(piece: bytes) -> bytes:
        swarm.scopes[dying.peer_id].cancel()
        died.set()
        return piece

    tampering(liar, model, lie)
    tampering(dying, model, die, once=lied)
    tampering(honest, model, bytes, once=died)
    new_machine("asker")
    lines: list[str] = []
    weights = await weights_of(asker, model, lines)
    await weights.open()
    await weights.fetch_blocks(range(4))
    same_tensors(await weights.open(), model, range(4))
    assert weights.banned == {liar.peer_id}
    assert any(liar.peer_id[-6:] in line and "not asked for weights any more" in line for line in lines)
    assert weights.received[liar.peer_id] < 40_000, "a liar is asked a few pieces at most"


async def test_what_was_verified_is_not_fetched_again(
    make_swarm: MakeSwarm, model: Path, new_machine: Callable[[str], Path]
) -> None:
    swarm = make_swarm(model)
    server, asker = await swarm.add(range(4)), await swarm.add()
    new_machine("asker")
    interrupted = await weights_of(asker, model)
    await interrupted.open()
    left, before = [20], interrupted.received.total()

    def interrupt(piece: bytes) -> bytes:
        left[0] -= 1
        if not left[0]:
            scope.cancel()
        return piece

    tampering(server, model, interrupt)
    with trio.CancelScope() as scope:
        await interrupted.fetch_blocks(range(4))
    assert scope.cancelled_caught
    truth = open_checkpoint(model)
    sizes = [truth.locate(name)[1].nbytes for block in range(4) for name, _ in truth.block_tensors(block)]
    total = sum(sizes)
    first_part = interrupted.received.total() - before
    assert 3 * max(sizes) < first_part < total
    resumed = await weights_of(asker, model)
    await resumed.fetch_blocks(range(4))
    again = first_part + resumed.received.total() - total
    # A piece that had come, but not been written yet when the cancellation arrived, comes twice: one a stream at most.
    assert again <= 3 * max(sizes)
    same_tensors(await resumed.open(), model, range(4))
    once_more = await weights_of(asker, model)
    await once_more.fetch_blocks(range(4))
    assert not once_more.received


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "block-00001.safetensors").write_bytes(b""),
        lambda place: os.truncate(place / "others.safetensors", (place / "others.safetensors").stat().st_size - 1),
        lambda place: (place / "config.json").write_bytes(b"{"),
        lambda place: (place / INDEX).write_bytes(b""),
        lambda place: (place / MANIFEST).write_bytes(b"[]"),
    ],
    ids=["empty block", "short head", "configuration", "index", "description"],
)
async def test_what_a_crash_left_in_pieces_is_fetched_again(
    make_swarm: MakeSwarm, model: Path, new_machine: Callable[[str], Path], damage: Callable[[Path], object]
) -> None:
    swarm = make_swarm(model)
    await swarm.add(range(4))
    asker = await swarm.add()
    cache = new_machine("asker")

    async def fetched() -> Checkpoint:
        weights = await weights_of(asker, model)
        checkpoint = await weights.open()
        await weights.fetch_blocks(range(4))
        await weights.fetch_others()
        return checkpoint

    (place,) = (await fetched()).directory.parent.iterdir()
    assert place.is_relative_to(cache)
    damage(place)
    checkpoint = await fetched()
    same_tensors(checkpoint, model, range(4))
    assert set(checkpoint.read(checkpoint.other_tensor_names())) == set(checkpoint.other_tensor_names())


async def test_a_licence_that_is_not_known_to_allow_it(
    make_swarm: MakeSwarm, model: Path, new_machine: Callable[[str], Path]
) -> None:
    (model / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    swarm = make_swarm(model)
    await swarm.add(range(2))
    asker = await swarm.add()
    new_machine("asker")
    weights = await weights_of(asker, model)
    with pytest.raises(UserError, match=r"nobody gives .*its licence is llama3\.1.*--share_weights") as refused:
        await weights.open()
    assert "\n" not in str(refused.value)
    await swarm.add(range(2, 4), share_weights=True)
    await weights.open()
    await weights.fetch_blocks(range(4))  # whoever shares gives all it has on its disk
    same_tensors(await weights.open(), model, range(4))


async def test_a_name_is_asked_of_the_swarm_when_the_hub_can_not_be_reached(
    make_swarm: MakeSwarm, model: Path, new_machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    swarm = make_swarm(model)
    await swarm.add(range(4))
    asker = await swarm.add()
    new_machine("asker")
    assert (await asker.checkpoint("model")).digest == open_checkpoint(model).digest
    with pytest.raises(UserError, match=r"nobody in the swarm serves other/model; there is model \(swarm:"):
        await asker.checkpoint("other/model")


async def test_of_a_sealed_model_a_majority_of_liars_is_worth_nothing(
    make_swarm: MakeSwarm, model: Path, tmp_path: Path, new_machine: Callable[[str], Path]
) -> None:
    """They change a byte that no sample looks at, and say so consistently."""
    digest = seal(open_checkpoint(model))
    assert open_checkpoint(model).digest == digest
    false = Path(shutil.copytree(model, tmp_path / "false"))
    path, entry = open_checkpoint(false).locate("lm_head.weight")
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"lie!")
    swarm = make_swarm(model)
    honest = await swarm.add(range(4))
    swarm.model = str(false)
    liars = {(await swarm.add(range(4))).peer_id for _ in range(2)}
    asker = await swarm.add()
    new_machine("asker")
    weights = await weights_of(asker, model)
    assert weights.model.digest == digest
    await weights.open()
    before = weights.received.copy()
    await weights.fetch_others()
    assert set(weights.received - before) == {honest.peer_id}
    assert weights.banned == liars
    name = "lm_head.weight"
    assert torch.equal((await weights.open()).read([name])[name], open_checkpoint(model).read([name])[name])


async def test_holders_that_do_not_agree_are_not_believed(
    make_swarm: MakeSwarm, model: Path, tmp_path: Path, new_machine: Callable[[str], Path]
) -> None:
    """The digest of an unsealed model, here a hub's, can not tell who is right; neither can the asker."""
    (model / MANIFEST).write_text(json.dumps({"version": 1, "identity": "hub:somebody/model@1234"}))
    false = Path(shutil.copytree(model, tmp_path / "false"))
    path, entry = open_checkpoint(false).locate("model.layers.2.mlp.up_proj.weight")
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"lie!")
    swarm = make_swarm(model)
    await swarm.add(range(4))
    swarm.model = str(false)
    await swarm.add(range(4))
    asker = await swarm.add()
    new_machine("asker")
    weights = await weights_of(asker, model)
    await weights.open()
    with pytest.raises(UserError, match=r"do not agree about block 2.*petals seal"):
        await weights.fetch_blocks(range(4))
    swarm.model = str(model)
    await swarm.add(range(4))
    await weights.fetch_blocks(range(4))
    same_tensors(await weights.open(), model, range(4))


async def test_a_lie_that_the_samples_find_is_thrown_away(
    make_swarm: MakeSwarm, model: Path, tmp_path: Path, new_machine: Callable[[str], Path]
) -> None:
    """The only sender gives another tensor, with hashes that fit it, under a digest that says otherwise."""
    false = Path(shutil.copytree(model, tmp_path / "false"))
    digest = open_checkpoint(model).digest
    said = open_checkpoint(model).preimage.decode()
    path, entry = open_checkpoint(false).locate("model.layers.2.mlp.up_proj.weight")
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"lie!")
    (false / MANIFEST).write_text(json.dumps({"version": 1, "identity": said}))
    swarm = make_swarm(false)
    liar = await swarm.add(range(4))
    asker = await swarm.add()
    cache = new_machine("asker")
    weights = await weights_of(asker, model)
    await weights.open()
    with pytest.raises(UserError, match="except those that sent what was not right"):
        await weights.fetch_blocks(range(2, 3))
    assert weights.banned == {liar.peer_id}
    assert not list((cache / "fetched" / digest).glob("block-*"))


async def test_hostile_requests_cost_their_stream_and_nothing_else(make_swarm: MakeSwarm, model: Path) -> None:
    swarm = make_swarm(model)
    server, stranger = await swarm.add(range(4)), await swarm.add()
    digest = open_checkpoint(model).digest
    right = SharedWeights(open_checkpoint(model))
    first = bytes.fromhex(json.loads(right.document(FIRST_BLOCK))[0][4][:64])

    async def ask(request: bytes) -> tuple[pb.WeightsReply, bytes]:
        stream = await stranger.host.open_stream(server.peer_id, WEIGHTS_V1, addrs=server.addrs)
        messages = MessageStream(stream, max_message_bytes=8192)
        with trio.fail_after(20):
            await messages.write_message(request)
            data = await messages.read_message()
            assert data is not None
            reply = pb.WeightsReply.FromString(data)
            payload = await messages.read_exactly(reply.part.nbytes)
        await messages.reset()
        return reply, payload

    for request, code in (
        (document_request(digest, FIRST_BLOCK + 4), pb.BLOCKS_NOT_HELD),
        (document_request(digest, 4100), pb.MALFORMED),
        (document_request(digest, 0, 1 << 40), pb.MALFORMED),
        (document_request("00" * 32, 0), pb.UNKNOWN_MODEL),
        (document_request("../../etc/passwd", 0), pb.MALFORMED),
        (piece_request(digest, FIRST_BLOCK, b"short"), pb.MALFORMED),
        (piece_request(digest, FIRST_BLOCK, bytes(32)), pb.MALFORMED),
        (piece_request(digest, FIRST_BLOCK + 1, first), pb.MALFORMED),
        (piece_request(digest, 0, bytes(32)), pb.MALFORMED),
        (b"\xff\xff", pb.MALFORMED),
        (pb.WeightsRequest(model_digest=digest).SerializeToString(), pb.MALFORMED),
    ):
        assert (await ask(request))[0].error.code == code, request
    streams = []
    for _ in range(9):
        stream = await stranger.host.open_stream(server.peer_id, WEIGHTS_V1, addrs=server.addrs)
        streams.append(MessageStream(stream, max_message_bytes=8192))
        await streams[-1].write_message(document_request(digest, 0))
    replies = [pb.WeightsReply.FromString(await stream.read_message() or b"") for stream in streams]
    assert [reply.error.code for reply in replies].count(pb.QUOTA) == 1
    for stream in streams:
        await stream.reset()
    with trio.fail_after(20):
        piece = b""
        while not piece:  # until the server has seen that the streams are gone
            piece = (await ask(piece_request(digest, FIRST_BLOCK, first)))[1]
    assert hashlib.sha256(piece).digest() == first
