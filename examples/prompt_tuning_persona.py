# %% [markdown]
# # A chatbot with a persona
#
# A prompt of trainable vectors teaches a polite assistant to answer like the sarcastic machine of an old chatbot
# corpus. The model's weights stay with the swarm, unchanged; the persona is a file of a few kilobytes.

# %%
import random
from contextlib import ExitStack

import torch
from common import RESULTS, STEPS, dialogues, report, swarm

from petals import AutoDistributedModelForCausalLM, connect

SEED, BATCH = 0, 12
steps = STEPS or 80
random.seed(SEED)
torch.manual_seed(SEED)

# %%
data = [row for row in dialogues("ai", "botprofile", "emotion", "gossip", "psychology", "food") if len(row[1]) < 160]
random.shuffle(data)
held_out, training = data[:40], data[40:]
print(f"{len(training)} to train on, {len(held_out)} held out, for example: {training[0]}")

# %%
opened = ExitStack()
peer = opened.enter_context(connect(*opened.enter_context(swarm())))
model = AutoDistributedModelForCausalLM.from_pretrained(peer=peer, tuning_mode="ptune", pre_seq_len=16)
tokenizer = peer.tokenizer()
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(rows):
    """Question and answer in the model's own chat format; only the answer's tokens are learned."""
    texts, skipped = [], []
    for question, answer in rows:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        skipped.append(len(tokenizer(asked)["input_ids"]))
        texts.append(f"{asked}{answer}<|im_end|>\n")
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, count in zip(labels, skipped, strict=True):
        row[:count] = -100
    return {**batch, "labels": labels}


@torch.no_grad()
def held_out_loss():
    return float(model(**encode(held_out)).loss)


def answer(question):
    inputs = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# %%
# The untuned model, for comparison: the same one without a prompt of ours
plain = AutoDistributedModelForCausalLM.from_pretrained(peer=peer)
with torch.no_grad():
    untuned = float(plain(**encode(held_out)).loss)
optimizer = torch.optim.AdamW(model.transformer.prompt_embeddings.parameters(), lr=3e-2, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=steps)
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
for question in ("Are you a robot?", "Do you ever get angry?", "What do you like to eat?"):
    print(f"> {question}\n{answer(question)}")
model.save_pretrained(RESULTS / "persona")
report(
    "prompt_tuning_persona",
    {"held-out loss untuned": untuned, "held-out loss tuned": tuned},
    {"training loss": losses},
    "step",
    "cross entropy per token",
)
opened.close()
