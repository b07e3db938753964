# %% [markdown]
# # Where in the model does it know?
#
# A linear probe on the hidden states after every block tells how early a model of the swarm knows whether a review is
# good. Researchers need what an API does not show: hidden states of every block.

# %%
import random
from contextlib import ExitStack

import torch
from common import STEPS, report, reviews, swarm

from petals import AutoDistributedModel, connect

SEED, BATCH = 0, 50
random.seed(SEED)
torch.manual_seed(SEED)

# %%
data = reviews()
random.shuffle(data)
rows = data[: 600 if not STEPS else 60]
held_out = len(rows) // 3

# %%
opened = ExitStack()
peer = opened.enter_context(connect(*opened.enter_context(swarm())))
model = AutoDistributedModel.from_pretrained(peer=peer)
tokenizer = peer.tokenizer()
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

# %% [markdown]
# One vector per sentence and layer: the mean over its tokens. `states` is (layers + 1, sentences, tokens, size).

# %%
features = []
for start in range(0, len(rows), BATCH):
    texts = [text for text, _ in rows[start : start + BATCH]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        states = torch.stack(
            model(**batch, output_hidden_states=True).hidden_states
        )  # (layers + 1, rows, tokens, size)
    mask = batch["attention_mask"][None, :, :, None]
    features.append((states * mask).sum(2) / mask.sum(2))
    print(f"{start + len(texts)} of {len(rows)} sentences", flush=True)
features = torch.cat(features, dim=1)
labels = torch.tensor([label for _, label in rows])


# %%
def probe(vectors):
    """Accuracy on held-out sentences of a logistic regression trained on the others."""
    vectors = (vectors - vectors[held_out:].mean(0)) / (vectors[held_out:].std(0) + 1e-6)
    line = torch.nn.Linear(vectors.shape[1], 2)
    optimizer = torch.optim.LBFGS(line.parameters(), max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(line(vectors[held_out:]), labels[held_out:])
        value = value + 1e-2 * line.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((line(vectors[:held_out]).argmax(-1) == labels[:held_out]).float().mean())


accuracy = [probe(layer) for layer in features]
majority = max(float((labels[:held_out] == label).float().mean()) for label in (0, 1))
best = max(range(len(accuracy)), key=accuracy.__getitem__)
print(f"best after block {best} of {len(accuracy) - 1}")

# %%
report(
    "hidden_state_probing",
    {"always the larger class": majority, "word embeddings": accuracy[0], "best layer": accuracy[best]},
    {"held-out accuracy": accuracy, "always the larger class": [majority] * len(accuracy)},
    "blocks passed",
    "accuracy",
)
opened.close()
