# %% [markdown]
# # Getting started
#
# Install, join a swarm, write text, look inside of the model, teach it something. Runs top to bottom on any machine, a
# notebook service too: no GPU is needed, and nothing of the model's blocks is loaded here if a swarm holds them.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("petals") is None:
    source = os.environ.get("PETALS_SOURCE", "petals-libp2p")  # or the path of a clone
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% [markdown]
# ## Join
#
# Whoever runs a server sees addresses when it starts: put one or more of them here, or into `PETALS_INITIAL_PEERS`.
# With none, this notebook serves all blocks of a small model itself: a swarm of one.

# %%
import torch

from petals import AutoDistributedModelForCausalLM, ServeConfig, connect

INITIAL_PEERS = os.environ.get("PETALS_INITIAL_PEERS", "").split()
peer = connect(*INITIAL_PEERS, serve=None if INITIAL_PEERS else ServeConfig(), progress=print)
peer.__enter__()  # open until the last cell; a program would say `with connect(...) as peer:`

# %% [markdown]
# ## Write
#
# Tokens come as servers compute them.

# %%
for token in peer.generate("A cat sat on", max_new_tokens=12):
    print(token.text, end="", flush=True)
print()

# %% [markdown]
# The same as a PyTorch model: embeddings and head are here, the blocks are in the swarm. `generate` is that of
# `transformers`, with its sampling, beams and penalties.

# %%
model = AutoDistributedModelForCausalLM.from_pretrained(peer=peer, tuning_mode="ptune", pre_seq_len=4)
tokenizer = peer.tokenizer()


def ids(text):
    return tokenizer(text, return_tensors="pt")["input_ids"]


print(tokenizer.decode(model.generate(ids("The best thing about"), max_new_tokens=10, num_beams=2)[0]))

# %% [markdown]
# A session keeps what the servers have computed, so that only new tokens are sent. Everything inside of the `with`
# continues it: `generate`, the model, its blocks.

# %%
with model.inference_session(max_length=64) as session:
    for question in ("A cat is", " and a dog is"):
        model.generate(ids(question), max_new_tokens=5)
    print(session.position, "tokens:", tokenizer.decode(session.output_ids[0]))

# %% [markdown]
# ## Look inside
#
# Hidden states of every block, and any path through the blocks.

# %%
with torch.no_grad():
    states = model(ids("Hello there"), output_hidden_states=True).hidden_states
    print(len(states), "states of", tuple(states[0].shape))
    h = model.transformer.h
    hidden = model.transformer.word_embeddings(ids("Hello there"))
    print(len(h), "blocks; through the first three:", tuple(h[:3](hidden).shape))

# %% [markdown]
# ## Teach
#
# Four trainable vectors in front of the text learn one sentence. Forward and backward run through the swarm; servers
# never change, and never see the optimizer.

# %%
steps = int(os.environ.get("STEPS", "0")) or 30
sentence = ids("A cat sat on the moon and sang to the stars.")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)
losses = []
for _ in range(steps):
    loss = model(sentence, labels=sentence).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print(tokenizer.decode(model.generate(ids("A cat sat on"), max_new_tokens=8, do_sample=False)[0]))

# %%
peer.__exit__(None, None, None)
