"""The chain of blocks at home: however it is cut, the answer is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from petals.models.client.chain import BlockChain, ChainSession
from petals.models.client.local import LocalChain
from petals.models.errors import BlockRangeError, StepError
from tests.models.conftest import Tiny
from tests.models.tiny import BLOCKS, HIDDEN
from tests.tolerance import assert_rounded


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_it_fits_the_socket(llama: Tiny) -> None:
    chain: BlockChain = LocalChain(llama.parts)
    assert (chain.blocks, chain.hidden_size, chain.dtype) == (range(BLOCKS), HIDDEN, torch.float32)
    with chain.open_session(batch_size=2, max_length=5) as session:
        plug: ChainSession = session
        assert (plug.blocks, plug.batch_size, plug.max_length, plug.position) == (range(BLOCKS), 2, 5, 0)


def test_cuts_make_no_difference(bloom: Tiny) -> None:
    hidden, prompts = noise(2, 6, HIDDEN), noise(BLOCKS, 2, 2, HIDDEN).flip(0)
    whole = LocalChain(bloom.whole).forward(hidden, prompts=prompts)
    assert_close(LocalChain(bloom.parts).forward(hidden, prompts=prompts), whole)
    with LocalChain(bloom.parts).open_session(batch_size=2, max_length=6) as session:
        steps = [session.step(hidden[:, :4], prompts=prompts), session.step(hidden[:, 4:])]
    assert_rounded(torch.cat(steps, 1), whole)


def test_slices_follow_one_another(llama: Tiny) -> None:
    hidden, chain = noise(1, 4, HIDDEN), LocalChain(llama.parts)
    end = chain.slice(range(3)).slice(range(2)).forward(hidden)
    assert_close(chain.slice(range(2, 4)).forward(end), chain.forward(hidden))
    assert chain.slice(range(1, 2)).blocks == range(1, 2)
    with pytest.raises(BlockRangeError, match="1:4 are not within 0:3"):
        chain.slice(range(3)).slice(range(1, 4))


def test_a_chain_has_no_gaps(llama: Tiny) -> None:
    with pytest.raises(BlockRangeError, match="at least one"):
        LocalChain([])
    with pytest.raises(BlockRangeError, match="ends at block 4, the next begins at 0"):
        LocalChain([llama.parts[1], llama.parts[0]])
    with pytest.raises(BlockRangeError, match="not within 0:4"):
        LocalChain(llama.parts, blocks=range(2, 5))


def test_a_closed_session(llama: Tiny) -> None:
    session = LocalChain(llama.whole).open_session(batch_size=1, max_length=4)
    session.close()
    session.close()
    for use in (lambda: session.step(noise(1, 1, HIDDEN)), lambda: session.position):
        with pytest.raises(StepError, match="closed"):
            use()


def test_too_few_prompts(llama: Tiny) -> None:
    with pytest.raises(StepError, match="one entry for each of 4 blocks, got 3"):
        LocalChain(llama.parts).forward(noise(1, 4, HIDDEN), prompts=noise(3, 1, 1, HIDDEN))


def test_the_answer_may_enter_autograd(llama: Tiny) -> None:
    """A trainable head may follow a session, though no gradient passes through it."""
    head = torch.nn.Linear(HIDDEN, 1)
    with LocalChain(llama.whole).open_session(batch_size=1, max_length=4) as session:
        out = session.step(noise(1, 4, HIDDEN).requires_grad_())
    assert not out.requires_grad
    head(out).sum().backward()
    assert head.weight.grad is not None
