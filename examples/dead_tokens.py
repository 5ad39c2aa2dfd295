"""When did the dead tokens freeze? From a run to the answer, and a picture of it.

    python examples/dead_tokens.py --steps 2000

Writes dead_tokens.safetensors and dead_tokens.png. Needs bhfast[report]. Takes the corpus that ``bhfast train`` takes.
"""

import argparse

import matplotlib
from matplotlib.figure import Figure

import bhfast
from bhfast import lattice

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000)
args = parser.parse_args()

result = bhfast.train(bhfast.TrainConfig(sigma=1e-3, steps=args.steps, out="dead_tokens.safetensors", overwrite=True))
trace = bhfast.open_trace(result.path)
dead = trace["token_counts"] == 0
life = lattice.life(trace["embeddings"][:, dead], trace.steps)
frozen = life.frozen(args.steps)
print(f"{frozen.sum()} of {dead.sum()} dead tokens froze, the last one in step {life.last_late_step.max()}")

phases = life.phase(trace.steps)
names = ("early", "midlife", "late", "frozen")
colors = [*matplotlib.colormaps["inferno"]([0.85, 0.65, 0.35]), "steelblue"]
figure = Figure(figsize=(8, 3), layout="constrained")
ax = figure.add_subplot(title="How the dead tokens freeze", xlabel="step", ylabel="dead tokens", xscale="log")
ax.stackplot(trace.steps[1:], [(phases == i).sum(1)[1:] for i in range(4)], colors=colors, labels=names)
ax.legend(loc="center left")
ax.margins(0)
figure.savefig("dead_tokens.png", dpi=200)
