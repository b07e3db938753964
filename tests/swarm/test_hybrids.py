"""Models whose blocks keep recurrent states, over a swarm: a lost server and wrong drafts cost time, never a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from petals.models.client.drafts import DraftMode
from petals.models.source.checkpoint import open_checkpoint
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from tests.models.tiny import CASES, VOCABULARY, save_tiny
from tests.swarm.conftest import Swarm, Truth

MakeSwarm = Callable[..., Swarm]
PROMPT = [5, 9, 14, 3, 5, 9, 14, 3, 5, 9, 14, 3, 5, 9]
"""It repeats itself, so that something is drafted in every step."""
NEW = 12


@pytest.fixture(scope="module", params=["granite-hybrid", "qwen3-next", "lfm2"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    case = next(case for case in CASES if case.id == request.param)
    directory: Path = tmp_path_factory.mktemp(case.id)
    model = save_tiny(case, directory)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)
    return Truth(open_checkpoint(str(directory)), model.eval())


def expected(truth: Truth) -> list[int]:
    ids = torch.tensor([PROMPT])
    said = truth.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return list(said[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize("drafts", ["never", "always"])
@pytest.mark.parametrize("lose_after", [None, 1, 6])
async def test_the_words_are_those_of_the_whole_model(
    make_swarm: MakeSwarm, hybrid: Truth, drafts: DraftMode, lose_after: int | None
) -> None:
    swarm = make_swarm(hybrid.directory)
    asker = await swarm.add()
    for blocks in (range(2), range(2), range(2, 4), range(2, 4)):
        await swarm.add(blocks)
    options = GenerationOptions(max_new_tokens=NEW, drafts=drafts)
    wanted, said = ClientOptions(use_server_to_server=True), list[int]()
    with trio.fail_after(60):
        async with await asker.generate(PROMPT, options=options, client=wanted) as stream:
            async for token in stream:
                said.append(token.id)
                if len(said) == lose_after:
                    lost = stream.route[0].peer_id
                    await swarm.stop(next(peer for peer in swarm.peers if peer.peer_id == lost))
    assert said == expected(hybrid)
    assert (stream.drafts.drafted > 0) == (drafts == "always")
