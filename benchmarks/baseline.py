"""What people do today: the same experiment on the Hugging Face Trainer, every step cloned into Python lists.

The network, data, optimizer and precision are the reference run's; the recorder appends clones to lists in memory,
stacks them at the end, and saves with ``safetensors.torch.save_file``. Needs the ``bench`` extra.

python benchmarks/baseline.py --steps 10000 --out trace.safetensors
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from bhfast.tokens import load_corpus


@dataclass(frozen=True)
class BaselineResult:
    steps_per_second: float
    seconds: float  # training, stacking and saving
    losses: Tensor | None  # [R] bfloat16, if recorded


class Windows(Dataset):
    """All windows: inputs, and labels one byte later, which the model shifts once more."""

    def __init__(self, corpus: Tensor, context: int) -> None:
        self.corpus = corpus.long()
        self.context = context

    def __len__(self) -> int:
        return len(self.corpus) - self.context

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        window = self.corpus[start : start + self.context + 1]
        return {"input_ids": window[:-1], "labels": window[1:]}


class ListRecorder:
    """One Python list per quantity, to which each step appends a clone."""

    KEYS = ("embeddings", "grads", "momentum", "variance", "logits", "losses")

    def __init__(self, embedding: torch.nn.Parameter) -> None:
        self.embedding = embedding
        self.lists: dict[str, list[Tensor]] = {key: [] for key in self.KEYS}
        self.before: dict[str, Tensor] = {}

    def before_step(self, loss: Tensor, logits: Tensor) -> None:
        self.before = {
            "grads": self.embedding.grad.clone().cpu(),
            "logits": logits[0, -1].detach().cpu().bfloat16(),
            "losses": torch.tensor(loss.item(), dtype=torch.bfloat16),
        }

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.state[self.embedding]
        record = {
            **self.before,
            "embeddings": self.embedding.detach().clone().cpu(),
            "momentum": state["exp_avg"].clone().cpu(),
            "variance": state["exp_avg_sq"].clone().cpu(),
        }
        for key, value in record.items():
            self.lists[key].append(value)

    def save(self, path: Path) -> Tensor:
        data = {key: torch.stack(values) for key, values in self.lists.items()}
        save_file(data, str(path))
        return data["losses"]


class RecordingTrainer(Trainer):
    """Calls the recorder around each optimizer step."""

    recorder: ListRecorder

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.logits = outputs.logits
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.recorder.before_step(loss, self.logits)
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.recorder.after_step(self.optimizer)
        return super()._maybe_log_save_evaluate(*args, **kwargs)


class AfterStep(TrainerCallback):
    """Calls a function after each optimizer step."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_step_end(self, *args, **kwargs) -> None:
        self.call()


def run_baseline(
    corpus: Tensor,
    *,
    steps: int,
    device: str,
    seed: int = 42,
    out: Path | None = None,
    recording: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> BaselineResult:
    """Train ``steps`` steps at sigma 0 on ``corpus`` (uint8) and record them; the file goes to ``out`` or nowhere."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=128, n_positions=128, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).bfloat16()
    embedding = model.transformer.wte.weight
    with torch.no_grad():
        embedding.copy_((torch.randn(64) * 0.02).bfloat16().expand_as(embedding))
    with tempfile.TemporaryDirectory() as folder:
        trainer = (RecordingTrainer if recording else Trainer)(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=1,
                learning_rate=1e-3,
                weight_decay=0.0,
                optim="adamw_torch",
                bf16=True,
                logging_steps=1000,
                save_strategy="no",
                dataloader_pin_memory=False,
                seed=seed,
                report_to="none",
                disable_tqdm=True,
                use_cpu=device == "cpu",
            ),
            train_dataset=Windows(corpus, 128),
            callbacks=[AfterStep(after_step)],
        )
        if recording:
            trainer.recorder = ListRecorder(embedding)
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        losses = trainer.recorder.save(out or Path(folder) / "trace.safetensors") if recording else None
        return BaselineResult(steps / (trained - start), time.perf_counter() - start, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description="The reference run on the Hugging Face Trainer.")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--corpus", help="as that of bhfast train")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    corpus = load_corpus(args.corpus, vocab_size=128, window=129)
    result = run_baseline(corpus.data, steps=args.steps, device=args.device, out=args.out)
    print(
        f"{args.steps:,} steps: {result.steps_per_second:.1f} steps/s, {result.seconds:.1f} s with stacking and saving"
    )


if __name__ == "__main__":
    main()
