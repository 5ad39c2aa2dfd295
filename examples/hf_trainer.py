"""Record all parameters of a small GPT-2 while the Hugging Face Trainer trains it, and prove the recording by a replay.

    python examples/hf_trainer.py --steps 50

Needs bhfast[hf].
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from bhfast import open_trace
from bhfast.hf import RecorderCallback
from bhfast.verify import verify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="hf_trainer.safetensors")
args = parser.parse_args()

text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 50), dtype=torch.uint8).long()
windows = [{"input_ids": window, "labels": window} for window in text.unfold(0, 32, 1)]

torch.manual_seed(0)
config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
with RecorderCallback("*", path=args.out) as callback:
    trainer = Trainer(
        model=GPT2LMHeadModel(config).bfloat16(),
        args=TrainingArguments(
            output_dir="hf_trainer",
            max_steps=args.steps,
            learning_rate=1e-3,
            optim="adamw_torch",  # whose arithmetic is known to the bit on a CPU
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=windows,
        callbacks=[callback],
    )
    trainer.train()

trace = open_trace(args.out)
losses, coefs = trace["losses"].tolist(), trace["clip_coefs"].tolist()
print(f"loss {losses[1]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses) - 1}")
print(f"{sum(coef < 1 for coef in coefs)} steps were clipped; {verify(args.out).replayed} steps replayed")
