"""Draw docs/run.png: the path of every token in the reference run on The Great Gatsby.

    python -m bhfast.train --sigma 0 --out run.safetensors
    python docs/run.py run.safetensors docs/run.png

Needs bhfast[report].
"""

import io
import math
import sys

import matplotlib
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import bhfast
from bhfast import lattice

NIGHT, ICE, GREY = "#0d0d14", "#8fd3ff", "#a9a9b8"
matplotlib.rcParams.update({"font.size": 11, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY})

trace = bhfast.open_trace(sys.argv[1])
last = int(trace.steps[-1])
dead = trace["token_counts"].as_subclass(Tensor) == 0
escape = lattice.escape_steps(trace["embeddings"], trace.steps)
frozen = int(lattice.life(trace["embeddings"][:, dead], trace.steps).last_late_step.max())

records = torch.logspace(0, math.log10(len(trace.steps)), 500).round().long().unique() - 1
vectors = trace["embeddings"].as_subclass(Tensor)[records].double()  # [S, V, D]
away = vectors - vectors[:, dead].mean(1, keepdim=True)  # from the black hole, which the dead tokens never leave
trained = (~dead).nonzero()[:, 0]
trained = trained[escape[trained].argsort(descending=True)]
heat = 1 - 0.72 * escape[trained].double().log1p() / escape.max().double().log1p()
colors = matplotlib.colormaps["inferno"](heat.numpy())

figure = Figure(figsize=(10, 4.8), facecolor=NIGHT)
figure.text(
    0.03, 0.93, f"{len(trained)} tokens occur in the text. They boil off the black hole,", color="white", size=13
)
figure.text(
    0.03,
    0.87,
    f"the first in step 1 (yellow), the last in step {int(escape.max()):,} (purple).",
    color="white",
    size=13,
)

# Left: the paths on the first two principal axes of their ends.
plane = figure.add_axes((0.02, 0.02, 0.46, 0.8), facecolor=NIGHT)
axes = torch.linalg.svd(away[-1] - away[-1].mean(0), full_matrices=False).Vh[:2]
paths = (away @ axes.T).transpose(0, 1)  # [V, S, 2]
plane.add_collection(LineCollection(list(paths[trained].numpy()), colors=colors, lw=0.7, alpha=0.75))
plane.scatter(*paths[trained, -1].T, s=10, color=colors, lw=0, zorder=3)
for size, alpha in ((1000, 0.06), (400, 0.12), (120, 0.3), (28, 1)):
    plane.scatter([0], [0], s=size, color=ICE, alpha=alpha, lw=0, zorder=4)
text = f"{int(dead.sum())} never occur: the dead tokens.\nThey stay in the black hole, one vector."
plane.annotate(text, (0, 0), (-8, -92), textcoords="offset points", color=ICE)
plane.autoscale_view()
plane.set_aspect("equal", adjustable="datalim")
plane.axis("off")

# Right: the distance from the black hole, against the step.
time = figure.add_axes((0.57, 0.15, 0.40, 0.67), facecolor=NIGHT)
distance = away.norm(dim=-1).T  # [V, S]
curves = [torch.stack([trace.steps[records].double(), distance[token]], 1)[1:].numpy() for token in trained]
time.add_collection(LineCollection(curves, colors=colors, lw=0.8, alpha=0.85))
time.plot([1, frozen], [0, 0], color=ICE, lw=2, ls=(0, (1, 1.2)), zorder=4)
time.plot([frozen, last], [0, 0], "o-", markevery=[0], color=ICE, lw=3, ms=6, zorder=5)
top = distance.max().item()
time.text(1.1, -0.04 * top, "dead tokens", color=ICE, va="top")
time.text(frozen, -0.04 * top, f"frozen after step {frozen:,}", color=ICE, va="top", ha="center")
time.set(xscale="log", xlim=(1, last), ylim=(-0.16 * top, 1.03 * top))
time.set(xlabel="step", ylabel="distance from the black hole", yticks=[0, 0.4, 0.8, 1.2])
time.set_xticks([10**i for i in range(5)], [f"{10**i:,}" for i in range(5)])
time.minorticks_off()
time.tick_params(length=0)
time.spines[:].set_visible(False)

buffer = io.BytesIO()
figure.savefig(buffer, dpi=150, facecolor=NIGHT)
Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(sys.argv[2], optimize=True)
