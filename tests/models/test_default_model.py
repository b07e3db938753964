"""The real default model, in three spans, says what `transformers` says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from tests.tolerance import SMOLLM, assert_rounded

PROMPTS = ("The capital of France is", "Once upon a time, a cat", "def fibonacci(n):")


@torch.no_grad()
def test_smollm2_in_three_spans() -> None:
    checkpoint = open_checkpoint()
    assert (checkpoint.num_blocks, checkpoint.hidden_size, checkpoint.dtype) == (30, 576, torch.float16)
    tokenizer = checkpoint.tokenizer()
    full = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    chain = LocalChain(
        [load_span(checkpoint, part, dtype=torch.float32) for part in (range(11), range(11, 20), range(20, 30))]
    )
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = full.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        known, new = ids, ids
        with chain.open_session(batch_size=1, max_length=ids.shape[1] + 12) as session:
            for _ in range(12):
                hidden = session.step(full.model.embed_tokens(new))
                new = full.lm_head(full.model.norm(hidden[:, -1:])).argmax(-1)
                known = torch.cat([known, new], 1)
        assert known.tolist() == expected.tolist()
        logits = full.lm_head(full.model.norm(chain.forward(full.model.embed_tokens(ids))))
        assert_rounded(logits, full(ids).logits, terms=SMOLLM)


def test_threads_may_load_at_once() -> None:
    """A peer loads blocks while it loads embeddings, for several models; the library's loading is not made for it."""
    checkpoint = open_checkpoint()

    def load(index: int) -> int:
        if index % 2:
            chain = LocalChain(span)
            return sum(1 for _ in load_causal_lm(checkpoint, chain).parameters())
        return len(load_span(checkpoint, range(index, index + 2)).blocks)

    span = load_span(checkpoint, range(30))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load, range(16))) == [2, 2] * 8
