"""The names that Petals' users know, over real servers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

import petals
from petals import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedSpeculativeModel,
    LoraSettings,
)
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.client.tuning import Tuning
from petals.models.errors import StepError
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.node import Peer
from petals.protocols.errors import MissingBlocks, RemoteError, RemoteProtocolError, UserError
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.tolerance import assert_rounded

MakeSwarm = Callable[..., Swarm]
IDS = torch.tensor([[5, 17, 99, 3], [8, 2, 45, 101]])


async def asked(make_swarm: MakeSwarm, truth: Truth, **serve: Any) -> tuple[Swarm, Peer]:
    """Two servers and a peer that asks."""
    swarm = make_swarm(truth.directory)
    await swarm.add(range(3), **serve)
    await swarm.add(range(3, 4), **serve)
    return swarm, await swarm.add()


async def open_in_thread(peer: Peer, cls: Any, *args: Any, **kwargs: Any) -> Any:
    return await peer.portal.run_sync(partial(cls.from_pretrained, *args, peer=peer, **kwargs))


async def test_a_model_is_opened_by_its_familys_name_or_by_any(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    _, peer = await asked(make_swarm, tiny_truth)
    family, other = ("Llama", "Bloom") if tiny_truth.model.config.model_type == "llama" else ("Bloom", "Llama")
    mine, not_mine = (getattr(petals, f"Distributed{name}ForCausalLM") for name in (family, other))
    model = await open_in_thread(peer, mine, str(tiny_truth.directory), dtype="float32", show_route=True)
    assert isinstance(model, mine)
    assert isinstance(model, AutoDistributedModelForCausalLM)
    assert not isinstance(model, (not_mine, AutoDistributedModel))
    assert type(model).__name__ == type(tiny_truth.model).__name__
    said = await model.agenerate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(said, tiny_truth.model.generate(IDS, max_new_tokens=8, do_sample=False))
    with pytest.raises(UserError, match="open it with AutoDistributedModelForCausalLM"):
        await not_mine.afrom_pretrained(peer=peer)
    config = getattr(petals, f"Distributed{family}Config").from_pretrained(tiny_truth.directory)
    assert config.num_hidden_layers == model.config.num_hidden_layers == 4
    with pytest.raises(UserError, match="which swarm"):
        mine.from_pretrained(str(tiny_truth.directory))
    with pytest.raises(UserError, match="opened with from_pretrained"):
        mine()
    with pytest.raises(AttributeError, match="DistributedNothing"):
        petals.DistributedNothing  # noqa: B018


async def test_a_model_is_opened_while_somebody_is_banned(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Models are loaded in a thread, where nobody may ask trio what time it is: found by benchmarks/soak.py."""
    swarm, peer = await asked(make_swarm, tiny_truth)
    client = await peer.client()
    offender = swarm.peers[0].peer_id
    client.watcher.report(offender, RemoteProtocolError("nonsense", offender))
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer)
    said = await model.agenerate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(said, tiny_truth.model.generate(IDS, max_new_tokens=4, do_sample=False))


async def test_several_models_share_one_peer_and_slices_compute(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    _, peer = await asked(make_swarm, tiny_truth)
    body = await AutoDistributedModel.afrom_pretrained(peer=peer)
    head = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer)
    assert head.portal is body.portal
    local = LocalChain(load_span(tiny_truth.checkpoint, range(4)))
    h = body.h
    hidden = torch.randn(1, 5, h.chain.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def compare() -> None:
        assert (len(h), len(h[1:3]), h[2].start_block, h[1:3].end_block) == (4, 2, 2, 3)
        ours, theirs = h[2:4](hidden), local.slice(range(2, 4)).forward(hidden)
        assert_rounded(ours, theirs)
        ours_grad, theirs_grad = (torch.autograd.grad(out.square().sum(), hidden)[0] for out in (ours, theirs))
        assert_rounded(ours_grad, theirs_grad)
        with torch.no_grad():
            one_by_one = hidden
            for block in h:
                one_by_one = block(one_by_one)
            assert_rounded(one_by_one, local.forward(hidden))
            with h[1:3].inference_session(max_length=5) as session:
                steps = torch.cat([session.step(hidden[:, :3]), session.step(hidden[:, 3:])], dim=1)
            assert_rounded(steps, local.slice(range(1, 3)).forward(hidden))
        with h.inference_session(max_length=5) as session, pytest.raises(UserError, match="carries no gradients"):
            session.step(hidden)
        ours_out, theirs_out = (model(IDS, output_hidden_states=True) for model in (head, tiny_truth.model))
        for mine, yours in zip(ours_out.hidden_states, theirs_out.hidden_states, strict=True):
            assert_rounded(mine, yours)

    await peer.portal.run_sync(compare)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune", "lora"])
async def test_training_over_the_swarm_is_training_at_home(
    make_swarm: MakeSwarm, tiny_truth: Truth, mode: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("petals.peer.client.training.MICRO_BATCH_TOKENS", 5)  # every row travels by itself
    swarm, peer = await asked(make_swarm, tiny_truth)
    settings = {"tuning_mode": mode, "pre_seq_len": 3, "lora_config": LoraSettings(rank=2)}
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, **settings)
    tuning = Tuning(mode=mode, pre_seq_len=3, lora=LoraSettings(rank=2))
    home = load_causal_lm(tiny_truth.checkpoint, LocalChain(load_span(tiny_truth.checkpoint, range(4))), tuning=tuning)

    def train(which: Any) -> list[float]:
        optimizer = torch.optim.SGD([p for p in which.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            loss = which(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def compare() -> None:
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path)
        home.load_trained(tmp_path)
        assert train(model) == pytest.approx(train(home), rel=1e-4)
        for mine, yours in zip(model.parameters(), home.parameters(), strict=True):
            torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-4)
        settings = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(IDS, **settings), home.generate(IDS, **settings))

    await model.run(compare)
    for server in swarm.peers[:2]:
        await all_leases_returned(server)


async def test_updates_over_the_quota_or_of_a_wrong_shape_are_refused(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    _, peer = await asked(make_swarm, tiny_truth, max_lora_bytes=2000)
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(
        peer=peer, tuning_mode="lora", lora_config=LoraSettings(rank=8), max_retries=1
    )
    for ask in (model.aforward, partial(model.agenerate, max_new_tokens=2)):
        with pytest.raises(RemoteError, match="bytes of low-rank updates, at most 2000"):
            await ask(IDS)
    small = await AutoDistributedModelForCausalLM.afrom_pretrained(
        peer=peer, tuning_mode="lora", lora_config=LoraSettings(rank=1, blocks=range(1)), max_retries=1
    )
    (place,) = list(small.transformer.lora.pairs())[:1]
    key = f"{place[0]}/{place[1].replace('.', '/')}"
    small.transformer.lora.factors[f"{key}/A"] = torch.nn.Parameter(torch.zeros(1, 7))
    with pytest.raises(RemoteError, match=r"factors \(1, 7\)"):
        await small.aforward(IDS)


async def test_a_classifier_learns_over_the_swarm(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    _, peer = await asked(make_swarm, tiny_truth)
    model = await AutoDistributedModelForSequenceClassification.afrom_pretrained(
        peer=peer, num_labels=2, pad_token_id=0, tuning_mode="ptune", pre_seq_len=2
    )
    labels = torch.tensor([0, 1])

    def train() -> tuple[float, float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        losses = []
        for _ in range(8):
            loss = model(IDS, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses[0], losses[-1]

    first, last = await model.run(train)
    assert last < 0.5 * first


async def collect(opening: Any) -> list[torch.Tensor]:
    async with opening as stream:
        return [token async for token in stream]


async def test_the_async_twins(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm, peer = await asked(make_swarm, tiny_truth)
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer)
    expected = tiny_truth.model.generate(IDS, max_new_tokens=6, do_sample=False)
    tokens = await collect(model.astream(IDS, max_new_tokens=6, do_sample=False))
    assert torch.equal(torch.stack(tokens, dim=1), expected[:, 4:])
    async with model.astream(IDS, max_new_tokens=60) as stream:
        async for _ in stream:
            break  # leaving ends the generation and gives the caches back
    short = model.astream(IDS, max_new_tokens=2, session=model.inference_session(max_length=4))
    with pytest.raises(StepError, match="do not fit"):
        await collect(short)
    async with model.ainference_session(max_length=10) as session:
        assert model.active_session is session
        parts = [await model.agenerate(IDS, max_new_tokens=3), await model.agenerate(max_new_tokens=3)]
        assert session.position == 9
    assert torch.equal(torch.cat(parts, dim=1), expected)
    assert model.active_session is None
    logits = (await model.aforward(IDS)).logits
    assert_rounded(logits, tiny_truth.model(IDS).logits)
    for server in swarm.peers[:2]:
        await all_leases_returned(server)


async def test_speculation_over_the_swarm(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    _, peer = await asked(make_swarm, tiny_truth)
    draft = AutoModelForCausalLM.from_pretrained(tiny_truth.directory).eval()
    model = await AutoDistributedSpeculativeModel.afrom_pretrained(peer=peer, small_model=draft)
    settings = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(await model.agenerate(IDS, **settings), tiny_truth.model.generate(IDS, **settings))
    assert model.speculation.tokens_per_step > 3
    with pytest.raises(UserError, match="needs small_model"):
        await AutoDistributedSpeculativeModel.afrom_pretrained(peer=peer)


async def test_a_client_never_reads_a_block(make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path) -> None:
    """Its copy of the checkpoint has no file left that holds nothing but blocks."""
    mine = tmp_path / "mine"
    shutil.copytree(tiny_truth.directory, mine)
    checkpoint = open_checkpoint(mine)
    assert (
        checkpoint.digest == tiny_truth.checkpoint.digest
    )  # written beside it, as the copy of a published model has it
    needed = {checkpoint._weight_map[name] for name in checkpoint.other_tensor_names()}
    shards = [shard for shard in mine.glob("*.safetensors") if shard.name not in needed]
    assert shards
    for shard in shards:
        shard.unlink()
    _, peer = await asked(make_swarm, tiny_truth)
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(mine, peer=peer)
    said = await model.agenerate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(said, tiny_truth.model.generate(IDS, max_new_tokens=8, do_sample=False))


async def test_lists_of_servers_are_kept_to(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm, peer = await asked(make_swarm, tiny_truth)
    rival = await swarm.add(range(4))
    allowed = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, allowed_servers=[rival.peer_id])
    async with allowed.ainference_session(max_length=8) as session:
        await allowed.agenerate(IDS, max_new_tokens=1)
        assert [hop.peer_id for hop in session.cache.session.remote.hops] == [rival.peer_id]
    blocked = await AutoDistributedModelForCausalLM.afrom_pretrained(
        peer=peer, blocked_servers=[rival.peer_id, swarm.peers[0].peer_id]
    )
    with trio.fail_after(30), pytest.raises(MissingBlocks, match="0:3"):
        await blocked.agenerate(IDS, max_new_tokens=1)


async def test_gradients_in_bfloat16(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Within 5 % of the norm of those of `transformers` in bfloat16 on one machine; float32 is compared elsewhere."""
    _, peer = await asked(make_swarm, tiny_truth, dtype="bfloat16")
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, tuning_mode="ptune", pre_seq_len=3)
    assert model.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(tiny_truth.directory, dtype=torch.bfloat16).eval()
    prompt = model.transformer.prompt_embeddings.weight

    def gradients() -> list[torch.Tensor]:
        embeds = whole.get_input_embeddings()(IDS)
        together = torch.cat([prompt.to(torch.bfloat16).expand(2, -1, -1), embeds], dim=1)
        logits = whole(inputs_embeds=together, use_cache=False).logits[:, 3:]
        losses = (model(IDS).logits.float().square().mean(), logits.float().square().mean())
        return [torch.autograd.grad(loss, prompt)[0] for loss in losses]

    ours, theirs = await model.run(gradients)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


async def test_a_timeout_of_ones_own_and_the_route_told(
    make_swarm: MakeSwarm, tiny_truth: Truth, caplog: pytest.LogCaptureFixture
) -> None:
    _, peer = await asked(make_swarm, tiny_truth)
    settings = {"request_timeout": 3.5, "show_route": "inference", "max_retries": 2, "head_quant": "int8"}
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, **settings)
    assert model.get_output_embeddings().weight.dtype == torch.int8
    with caplog.at_level("INFO"):
        async with model.ainference_session(max_length=8) as session:
            await model.agenerate(IDS, max_new_tokens=1)
            remote = session.cache.session.remote
            assert (remote.recovery._timeouts.step_s, remote.recovery._options.max_retries) == (3.5, 2)
    told = [record.message for record in caplog.records if record.message.startswith("Route found: 0:3 via …")]
    assert len(told) == 1
    assert "ms a token expected" in told[0]
    with pytest.raises(UserError, match="compression is 'zip'"):
        await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, compression="zip")
    with pytest.raises(UserError, match="head_quant is 'int3'"):
        await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, head_quant="int3")
