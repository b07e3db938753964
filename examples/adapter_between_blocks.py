# %% [markdown]
# # A layer of your own between blocks
#
# The blocks of a swarm are layers like any other: slice them, put a module of your own in between, train it. The
# servers hold the blocks and compute the gradients; the module and the head stay here.

# %%
import copy
import random
from contextlib import ExitStack

import torch
from common import STEPS, report, reviews, swarm
from torch import nn

from petals import AutoDistributedModel, connect

SEED, BATCH = 0, 16
steps = STEPS or 40
random.seed(SEED)
torch.manual_seed(SEED)

# %%
data = reviews()
random.shuffle(data)
held_out, training = data[: 200 if not STEPS else 16], data[200:]

# %%
opened = ExitStack()
peer = opened.enter_context(connect(*opened.enter_context(swarm())))
base = AutoDistributedModel.from_pretrained(peer=peer)
tokenizer = peer.tokenizer()
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"


class Spliced(nn.Module):
    """Lower blocks, a bottleneck that starts as nothing, upper blocks, a head on the mean of the states."""

    def __init__(self, base, at, width=32):
        super().__init__()
        size = base.config.hidden_size
        self.lower, self.upper = base.h[:at], base.h[at:]
        self.down, self.up = nn.Linear(size, width), nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2))

    def forward(self, embedded, mask):
        hidden = self.lower(embedded, attention_mask=mask)
        hidden = hidden + self.up(torch.tanh(self.down(hidden)))
        hidden = self.upper(hidden, attention_mask=mask)
        weights = mask[:, :, None].to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


model = Spliced(base, at=len(base.h) // 2)


# %%
def run(model, rows):
    batch = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        embedded = base.word_embeddings(batch["input_ids"])
    return model(embedded, batch["attention_mask"]), torch.tensor([label for _, label in rows])


@torch.no_grad()
def accuracy(model, rows):
    right = 0
    for start in range(0, len(rows), 50):
        logits, labels = run(model, rows[start : start + 50])
        right += int((logits.argmax(-1) == labels).sum())
    return right / len(rows)


# %% [markdown]
# A copy shares the swarm's blocks and has layers of its own: the untrained one is kept to compare with.

# %%
untrained = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
losses = []
for step in range(steps):
    logits, labels = run(model, random.sample(training, BATCH))
    loss = nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
    if step % 10 == 0:
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)

# %%
report(
    "adapter_between_blocks",
    {"accuracy before": accuracy(untrained, held_out), "accuracy after": accuracy(model, held_out)},
    {"training loss": losses},
    "step",
    "cross entropy",
)
opened.close()
