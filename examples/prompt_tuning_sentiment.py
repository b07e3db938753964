# %% [markdown]
# # Prompt tuning for sentiment
#
# The swarm holds a language model; you hold a prompt of trainable vectors and a small head, and teach them to tell good
# reviews from bad ones. The servers never see a label, and their weights do not change.

# %%
import random
from contextlib import ExitStack

import torch
from common import RESULTS, STEPS, report, reviews, swarm

from petals import AutoDistributedModelForSequenceClassification, connect

SEED, BATCH = 0, 16
steps = STEPS or 60
random.seed(SEED)
torch.manual_seed(SEED)

# %% [markdown]
# Sentences of film reviews with human ratings, split into what we train on and what we hold out.

# %%
data = reviews()
random.shuffle(data)
held_out, training = data[: 200 if not STEPS else 16], data[200:]
print(f"{len(training)} to train on, {len(held_out)} held out, for example: {training[0]}")

# %%
opened = ExitStack()
peer = opened.enter_context(connect(*opened.enter_context(swarm())))
model = AutoDistributedModelForSequenceClassification.from_pretrained(
    peer=peer, num_labels=2, tuning_mode="deep_ptune", pre_seq_len=8
)
tokenizer = peer.tokenizer()
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
model.config.pad_token_id = tokenizer.pad_token_id


def encode(rows):
    batch = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
    return {**batch, "labels": torch.tensor([label for _, label in rows])}


@torch.no_grad()
def accuracy(rows):
    right = 0
    for start in range(0, len(rows), 50):
        batch = encode(rows[start : start + 50])
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


# %% [markdown]
# Train: forward and backward run through the swarm, the optimizer runs here.

# %%
before = accuracy(held_out)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
losses = []
for step in range(steps):
    loss = model(**encode(random.sample(training, BATCH))).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(float(loss.detach()))
    if step % 10 == 0:
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)

# %%
after = accuracy(held_out)
model.save_pretrained(RESULTS / "sentiment-prompt")
report(
    "prompt_tuning_sentiment",
    {"accuracy before": before, "accuracy after": after},
    {"training loss": losses},
    "step",
    "cross entropy",
)
opened.close()
