"""Arguments and objects that programs written for Petals pass, over real servers."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import petals
from petals import AutoDistributedConfig, AutoDistributedModelForCausalLM, ClientConfig, RemoteSequential
from petals.compat.data import ServerState, parse_uid
from petals.compat.directory import get_remote_module_infos, get_remote_sequence
from petals.models.client.local import LocalChain
from petals.models.errors import BlockRangeError
from petals.models.source.loading import load_span
from petals.peer.client.sequence_manager import RemoteSequenceManager
from petals.peer.client_config import WITHOUT_EFFECT
from petals.peer.node import Peer
from petals.protocols.errors import MissingBlocks, UserError
from tests.swarm.conftest import Swarm, Truth

MakeSwarm = Callable[..., Swarm]
IDS = torch.tensor([[5, 17, 99, 3], [8, 2, 45, 101]])


@pytest.fixture
async def peer(make_swarm: MakeSwarm, tiny_truth: Truth) -> Peer:
    """Two servers, and a peer that asks."""
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(3))
    await swarm.add(range(3, 4))
    return await swarm.add()


async def in_thread(runs: Peer, function: Any, *args: Any, **kwargs: Any) -> Any:
    return await runs.portal.run_sync(partial(function, *args, **kwargs))


async def test_a_configuration_carries_the_settings_of_the_swarm(peer: Peer, tiny_truth: Truth) -> None:
    config = AutoDistributedConfig.from_pretrained(
        tiny_truth.directory, initial_peers=peer.config.initial_peers, max_retries=3, blocked_servers=["nobody"]
    )
    assert config.initial_peers == peer.config.initial_peers
    assert config.hidden_size == tiny_truth.checkpoint.hidden_size
    config.use_cache = False
    model = await in_thread(peer, AutoDistributedModelForCausalLM.from_pretrained, config=config, peer=peer)
    assert model.config.use_cache is False
    local = LocalChain(load_span(tiny_truth.checkpoint, range(4)))
    hidden = torch.randn(2, 3, local.hidden_size, generator=torch.Generator().manual_seed(1))

    def use() -> None:
        middle = RemoteSequential(config, dht=peer, start_block=1, end_block=3)
        assert isinstance(middle, RemoteSequential)
        assert isinstance(model.transformer.h, RemoteSequential)
        assert (len(middle), middle.start_block, middle.end_block) == (2, 1, 3)
        expected = local.slice(range(1, 3)).forward(hidden)
        torch.testing.assert_close(middle(hidden), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(get_remote_sequence(peer, 1, 3, config)(hidden), expected, rtol=1e-5, atol=1e-5)
        assert len(RemoteSequential(config, peer=peer)) == 4
        with pytest.raises(BlockRangeError, match="3:9"):
            RemoteSequential(config, peer=peer, start_block=3, end_block=9)

    await in_thread(peer, use)


async def test_a_configuration_of_transformers(peer: Peer, tiny_truth: Truth) -> None:
    plain = AutoConfig.from_pretrained(tiny_truth.directory)
    open_model = AutoDistributedModelForCausalLM.from_pretrained
    model = await in_thread(peer, open_model, str(tiny_truth.directory), config=plain, dht=peer)
    assert torch.equal(
        await model.agenerate(IDS, max_new_tokens=4, do_sample=False),
        tiny_truth.model.generate(IDS, max_new_tokens=4, do_sample=False),
    )
    other = AutoConfig.for_model("gpt2")
    with pytest.raises(UserError, match="config is of a gpt2"):
        await in_thread(peer, open_model, str(tiny_truth.directory), config=other, dht=peer)


async def test_arguments_of_transformers_that_ask_for_nothing_here(peer: Peer) -> None:
    open_model = partial(AutoDistributedModelForCausalLM.from_pretrained, peer=peer)
    harmless = {"low_cpu_mem_usage": True, "device_map": None, "use_safetensors": True, "local_files_only": False}
    await in_thread(peer, open_model, **harmless, trust_remote_code=False, use_auth_token=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        await in_thread(peer, open_model, cache_dir="/x", attn_implementation="eager", ban_timeout=3, ping_timeout=1)
    texts = "\n".join(str(each.message) for each in said)
    for told in ("cache_dir has no effect: ", "attn_implementation has", "ban_timeout has", "ping_timeout has"):
        assert told in texts
    refused = {"device_map": "auto", "load_in_8bit": True, "local_files_only": True, "trust_remote_code": True}
    for name, value in refused.items():
        with pytest.raises(UserError, match=f"{name}={value!r} is not taken: "):
            await in_thread(peer, open_model, **{name: value})


async def test_who_computes_what(peer: Peer, tiny_truth: Truth) -> None:
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer)
    manager = model.transformer.h.sequence_manager
    assert isinstance(manager, RemoteSequenceManager)
    assert len(model.transformer.h[1:3].sequence_manager) == 2
    infos = await in_thread(peer, get_remote_module_infos, peer, manager.block_uids)
    holders = [list(info.servers) for info in infos]
    assert holders[0] == holders[2] != holders[3]
    assert [parse_uid(info.uid)[1] for info in infos] == [0, 1, 2, 3]
    server = infos[3].servers[holders[3][0]]
    assert (server.state, server.start_block, server.end_block) == (ServerState.ONLINE, 3, 4)
    by_name = await in_thread(peer, get_remote_module_infos, peer, [f"{tiny_truth.directory}.0"])
    assert by_name[0].servers.keys() == infos[0].servers.keys()
    for mode in ("min_latency", "max_throughput"):
        spans = manager.make_sequence(mode=mode)  # type: ignore[arg-type]
        assert [(span.start, span.end) for span in spans] == [(0, 3), (3, 4)]
        assert [[span.peer_id] for span in spans] == [holders[0], holders[3]]
    part = manager[1:3]
    assert (len(part), [(span.start, span.end) for span in part.make_sequence()]) == (2, [(1, 3)])
    assert manager.rpc_info["cache_tokens_available"] > 0
    manager.shutdown()
    with pytest.raises(UserError, match="min_latency or max_throughput"):
        manager.make_sequence(mode="any")  # type: ignore[arg-type]
    for wrong in (["x"], ["a.1", "b.2"], ["a.1 a.2"]):
        with pytest.raises(ValueError):
            await in_thread(peer, get_remote_module_infos, peer, wrong)


async def test_the_configuration_of_an_open_model(peer: Peer, tiny_truth: Truth) -> None:
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, blocked_servers=["nobody"])
    assert model.config.active_adapter is None
    model.config.active_adapter = "nobody hosts this"
    with pytest.raises(MissingBlocks):
        await model.agenerate(IDS, max_new_tokens=1)
    with pytest.raises(MissingBlocks):
        await model.aforward(IDS)
    model.config.active_adapter = None
    expected = tiny_truth.model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(await model.agenerate(IDS, max_new_tokens=3, do_sample=False), expected)
    model.config.max_retries = 2
    assert model.transformer.h.sequence_manager.config.max_retries == 2
    for name in ("initial_peers", "head_quant", "tuning_mode", "connect_timeout"):
        setattr(model.config, name, "something")
        with pytest.raises(UserError, match=f"model.config.{name} is read when a model is opened"):
            await model.aforward(IDS)
        delattr(model.config, name)


def test_a_block_at_home(tiny_truth: Truth) -> None:
    from petals.compat.blocks import load_pretrained_block

    block = load_pretrained_block(str(tiny_truth.directory), 2, torch_dtype=torch.float32)
    hidden = torch.randn(1, 5, tiny_truth.checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = LocalChain(load_span(tiny_truth.checkpoint, range(2, 3))).forward(hidden)
    torch.testing.assert_close(block(hidden), expected)


def test_every_field_of_petals_settings() -> None:
    names = split(
        "initial_peers dht_prefix daemon_startup_timeout show_route allowed_servers blocked_servers "
        "use_server_to_server connect_timeout request_timeout update_period max_retries min_backoff max_backoff "
        "ban_timeout active_adapter max_pinged ping_timeout tuning_mode pre_seq_len use_chunked_forward "
        "chunked_forward_step"
    )
    config = ClientConfig()
    assert all(hasattr(config, name) for name in names)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ClientConfig(
            **(dict.fromkeys(WITHOUT_EFFECT, 7) | {"dht_prefix": "x", "use_chunked_forward": False}),  # type: ignore[arg-type]
            initial_peers=["/ip4/1.2.3.4/tcp/5"],  # type: ignore[arg-type]
            max_retries=None,
        )
    assert {str(each.message).partition(" ")[0] for each in said} == set(WITHOUT_EFFECT)


def test_lists_are_taken_for_collections() -> None:
    config = ClientConfig(
        initial_peers=["a", "b"], allowed_servers=["x"], blocked_servers=None, local_blocks=[range(2)], show_route="yes"
    )  # type: ignore[arg-type]
    assert config.initial_peers == ("a", "b")
    assert config.allowed_servers == {"x"}
    assert config.blocked_servers == frozenset()
    assert config.local_blocks == (range(2),)
    assert config.show_route is True
    assert ClientConfig(initial_peers="a").initial_peers == ("a",)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a set of peer IDs"):
        ClientConfig(allowed_servers="x")  # type: ignore[arg-type]


def test_retries_without_end_and_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_MAX_RETRIES", raising=False)
    assert ClientConfig().max_retries == 10
    assert ClientConfig(max_retries=None).max_retries == math.inf
    monkeypatch.setenv("PETALS_MAX_RETRIES", "2")
    assert ClientConfig().max_retries == 2
    assert ClientConfig(max_retries=5).max_retries == 5
    monkeypatch.setenv("PETALS_MAX_RETRIES", "many")
    with pytest.raises(UserError, match="PETALS_MAX_RETRIES"):
        ClientConfig()


def test_names_of_checkpoints_that_were_converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from petals.models.source import hub

    opened: list[str] = []
    monkeypatch.setattr(hub, "_open_hub", lambda name, *_: opened.append(name))
    said: list[str] = []
    hub.open_model("bigscience/bloom-petals", None, None, said.append)
    hub.open_model("bigscience/bloom", None, None, said.append)
    assert opened == ["bigscience/bloom", "bigscience/bloom"]
    assert said == ["reading bigscience/bloom: a copy converted for Petals is not needed"]
    monkeypatch.chdir(tmp_path)
    os.mkdir("my-petals")
    with pytest.raises(Exception, match=r"my-petals is not a model"):
        hub.open_model("my-petals", None, None, said.append)
    assert petals.__version__
