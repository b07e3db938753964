# %% [markdown]
# # Sessions, beams and speed
#
# One token per call, as chat programs and benchmarks do it; a beam search that goes on where it ended; a decoding loop
# of your own over `past_key_values`.

# %%
import time
from contextlib import ExitStack

import torch
from common import STEPS, report, swarm

from petals import AutoDistributedModelForCausalLM, connect

tokens = STEPS or 64

# %%
opened = ExitStack()
peer = opened.enter_context(connect(*opened.enter_context(swarm())))
model = AutoDistributedModelForCausalLM.from_pretrained(peer=peer)
tokenizer = peer.tokenizer()
prompt = tokenizer("A cat sat on", return_tensors="pt")["input_ids"]

# %% [markdown]
# The loop of Petals' `benchmark_inference.py`: a call of `generate` for every token of a session.

# %%
seconds = []
with model.inference_session(max_length=prompt.shape[1] + tokens) as session:
    model.generate(prompt, max_new_tokens=1, session=session, do_sample=False)  # the prompt is not counted
    for _ in range(tokens - 1):
        began = time.perf_counter()
        model.generate(max_new_tokens=1, session=session, do_sample=False)
        seconds.append(time.perf_counter() - began)
    by_session = session.output_ids
print(tokenizer.decode(by_session[0]))
print(f"{len(seconds) / sum(seconds):.1f} tokens/s")

# %% [markdown]
# The same tokens, step by step, with what the model returns.

# %%
text, past, own = prompt, None, []
with torch.no_grad():
    for _ in range(tokens):
        began = time.perf_counter()
        output = model(text if past is None else text[:, -1:], past_key_values=past, use_cache=True)
        past = output.past_key_values
        text = torch.cat([text, output.logits[:, -1:].argmax(-1)], dim=1)
        own.append(time.perf_counter() - began)
assert torch.equal(text, by_session)

# %% [markdown]
# Beams, and on from the best of them.

# %%
with model.inference_session(max_length=prompt.shape[1] + 2 * tokens) as session:
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, num_beams=3, do_sample=False)
    beams = (time.perf_counter() - began) / tokens
    model.generate(max_new_tokens=tokens, num_beams=3, do_sample=False)
    print(tokenizer.decode(session.output_ids[0]))

# %%
report(
    "sessions_and_speed",
    {"seconds a token": sum(seconds) / len(seconds), "seconds a token of three beams": beams},
    {"generate in a session": seconds, "past_key_values": own[1:]},
    "token",
    "seconds",
)
del past, output
opened.close()
