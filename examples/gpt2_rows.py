"""Follow single tokens through the training of a network of GPT-2's size: a few rows of its embedding, at every step.

    python examples/gpt2_rows.py --steps 5

The weights are random, and so is the text. Needs bhfast[hf].
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bhfast import Recorder, open_trace

EMBEDDING = "transformer.wte.weight"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--tokens", type=int, nargs="+", default=[0, 464, 50256], help="rows of the embedding")
parser.add_argument("--out", default="gpt2_rows.safetensors")
args = parser.parse_args()

torch.manual_seed(0)
config = GPT2Config()
model = GPT2LMHeadModel(config).bfloat16()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

rows = {EMBEDDING: args.tokens}
with Recorder(
    optimizer, EMBEDDING, model=model, rows=rows, steps=args.steps, storage="stream", path=args.out
) as recorder:
    for _ in range(args.steps):
        tokens = torch.randint(config.vocab_size, (1, 32))
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        recorder.log(losses=loss)

trace = open_trace(args.out)
print(trace)
for token, path in zip(args.tokens, trace[EMBEDDING].float().unbind(1), strict=True):
    print(f"token {token} has moved by {(path[-1] - path[0]).norm():.4f}")
