"""Record all parameters of a Lightning module, and prove the recording by a replay.

    python examples/lightning_module.py --steps 50

Needs bhfast[lightning].
"""

import argparse

import lightning as L
import torch
from torch import Tensor, nn

from bhfast import open_trace
from bhfast.lightning import RecorderCallback
from bhfast.verify import verify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="lightning_module.safetensors")
args = parser.parse_args()


class Regression(L.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net(batch)[:, 0], batch.sum(dim=1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


torch.manual_seed(0)
trainer = L.Trainer(
    max_steps=args.steps,
    gradient_clip_val=1.0,
    accelerator="cpu",
    callbacks=[RecorderCallback("*", path=args.out)],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Regression().bfloat16(), torch.utils.data.DataLoader(torch.randn(1024, 8).bfloat16(), batch_size=16))

trace = open_trace(args.out)
losses, coefs = trace["losses"].tolist(), trace["clip_coefs"].tolist()
print(f"loss {losses[1]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses) - 1}")
print(f"{sum(coef < 1 for coef in coefs)} steps were clipped; {verify(args.out).replayed} steps replayed")
