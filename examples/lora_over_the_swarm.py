# %% [markdown]
# # LoRA on blocks that others hold
#
# Low-rank updates of the attention of every block are trained here, while the blocks stay with the servers: the factors
# travel with each request, their gradients come back. What comes out is an ordinary PEFT adapter.

# %%
import random
from contextlib import ExitStack

import torch
from common import RESULTS, STEPS, report, reviews, swarm

from petals import AutoDistributedModelForCausalLM, LoraSettings, connect

SEED, BATCH = 0, 12
steps = STEPS or 60
random.seed(SEED)
torch.manual_seed(SEED)

# %%
data = [text for text, _ in reviews()]
random.shuffle(data)
held_out, training = data[: 100 if not STEPS else 8], data[100:]
print(f"{len(training)} to train on, {len(held_out)} held out, for example: {training[0]}")

# %%
opened = ExitStack()
peer = opened.enter_context(connect(*opened.enter_context(swarm())))
model = AutoDistributedModelForCausalLM.from_pretrained(
    peer=peer, tuning_mode="lora", lora_config=LoraSettings(rank=4, alpha=16, targets=("q_proj", "v_proj"))
)
tokenizer = peer.tokenizer()
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(rows):
    texts = [f"Film review: {text}{tokenizer.eos_token}" for text in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@torch.no_grad()
def held_out_loss():
    return float(model(**encode(held_out)).loss)


# %%
untuned = held_out_loss()  # the update begins at zero: this is the model as it is
optimizer = torch.optim.AdamW(model.transformer.lora.parameters(), lr=3e-3, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
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
tuned = held_out_loss()
inputs = tokenizer("Film review:", return_tensors="pt")
said = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(said[0], skip_special_tokens=True))
model.save_pretrained(RESULTS / "reviewer")  # `petals peer --serve 0:15 --adapters results/reviewer` hosts it
report(
    "lora_over_the_swarm",
    {"held-out loss untuned": untuned, "held-out loss tuned": tuned},
    {"training loss": losses},
    "step",
    "cross entropy per token",
)
opened.close()
