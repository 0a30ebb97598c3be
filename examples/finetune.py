"""Fine-tune a language model on your text within a memory budget, then quantize and save it.

python examples/finetune.py --model FOLDER --text PATH --out FOLDER [--budget 8GB] [--steps 100]
"""

import argparse
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_tune as mt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--text", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--budget", default=None, help="such as 8GB; by default what this machine has free")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=512)
args = parser.parse_args()

# A model, adapters with dropout, and rows of real text, some of them held out.
mx.random.seed(0)
model, tokenizer, config, folder = mt.lm.load(args.model)
model.freeze()
linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.05})
rows = mt.lm.token_batches(tokenizer, args.text, batch_size=1, length=args.length, seed=0)
held_out, rows = rows[:8], rows[8:]

optimizer = optim.AdamW(learning_rate=1e-4)
optimizer.init(model.trainable_parameters())
state = [model.state, optimizer.state, mx.random.state]


def loss_of(model, tokens):
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


loss_and_gradients = nn.value_and_grad(model, loss_of)


@partial(mx.compile, inputs=state, outputs=state)
def step(tokens):
    loss, gradients = loss_and_gradients(model, tokens)
    optimizer.update(model, gradients)
    return loss


def make_batch(n, start=0):
    return mx.concatenate([rows[(start + i) % len(rows)] for i in range(n)])


# The largest batch that fits, with every block recomputed in the backward pass.
mt.checkpoint_blocks(model)
found = mt.autobatch(step, make_batch, budget=args.budget, max_batch=min(64, len(rows)), state=(model, optimizer))
print(found)

model.train()
with found.applied(), mt.wired_limit(model), mt.track_memory() as memory:
    for i in range(args.steps):
        loss = step(make_batch(found.batch_size, i * found.batch_size))
        mx.eval(loss, state)
        if i % 10 == 0 or i == args.steps - 1:
            print(f"step {i}: loss {loss.item():.3f}")
print(memory)

# Adapters into the weights, fewer bits, and what that costs on text that was held out.
mt.uncheckpoint(model)
model.update_modules(tree_unflatten([(k, m.fuse()) for k, m in model.named_modules() if hasattr(m, "fuse")]))
model.eval()
print(mt.quantize_model(model, bits=4, group_size=64, evaluation=held_out))
print("saved", mt.lm.save_quantized(args.out, model, tokenizer, config, source=folder))
