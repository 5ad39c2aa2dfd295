"""A vocabulary of 10,000 tokens: the native engine against the torch engine, and what recording costs.

    python benchmarks/large_vocabulary.py --json benchmarks/results/large_vocabulary.json

The tokens are drawn at random, with Zipf's law, from 6,300 of the 10,000; the others are dead. Every run streams, and
is a process of its own. What is compared takes turns for several rounds; figures are medians, ratios those of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import bhfast
from bhfast.ops import extension

VOCAB, LIVE = 10_000, 6_300
RECORDED = {
    "nothing": {"record_every": 0},
    "rows of the dead": {"rows": "dead"},
    "everything": {},
    "everything, compact": {"keyframes": 64},
}
STEPS = {8: 100, 128: 8}  # by batch size
TORCH_STEPS = {8: 12, 128: 3}


def write_corpus(path: Path) -> None:
    """Write 400,000 tokens of which all of the first ``LIVE``, and no others, occur."""
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, LIVE + 1)
    tokens = generator.choice(LIVE, 400_000, p=shares / shares.sum())
    tokens[:LIVE] = np.arange(LIVE)
    np.save(path, tokens.astype(np.uint16))


def run(engine: str, batch: int, recorded: str, folder: Path) -> dict[str, float]:
    """Return steps per second, bytes per step, and the largest resident memory of a run."""
    steps = (TORCH_STEPS if engine == "torch" else STEPS)[batch]
    out = folder / "run.safetensors"
    config = bhfast.TrainConfig(
        steps=steps,
        corpus=str(folder / "tokens.npy"),
        vocab_size=VOCAB,
        batch_size=batch,
        target_offset=1,
        engine=engine,
        storage="stream",
        out=str(out),
        device="cpu",
        overwrite=True,
        quiet=True,
        **RECORDED[recorded],
    )
    result = bhfast.train(config)
    size = out.stat().st_size if result.path else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"steps per second": result.steps_per_second, "bytes per step": size / steps, "memory": peak}


def apart(*arguments: object) -> dict[str, float]:
    """Call :func:`run` in a process of its own."""
    command = [sys.executable, __file__, "--only", json.dumps([*map(str, arguments)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    os.sync()
    return json.loads(done.stdout.splitlines()[-1])


def race(cells: list[tuple[str, int, str]], rounds: int, folder: Path) -> list[dict[str, object]]:
    """Run all cells in turn; return medians, and the ratios of steps per second to those of the first cell."""
    found = [[apart(*cell, folder) for cell in cells] for _ in range(rounds)]
    results = []
    for i, (engine, batch, recorded) in enumerate(cells):
        own: dict[str, object] = {"engine": engine, "batch": batch, "recorded": recorded}
        for key in found[0][i]:
            own[key] = statistics.median(cells_of_round[i][key] for cells_of_round in found)
        own["ratios"] = [x[i]["steps per second"] / x[0]["steps per second"] for x in found]
        own["ratio"] = statistics.median(own["ratios"])  # type: ignore[arg-type]
        results.append(own)
        print(" ".join(f"{key}={value:,.4g}" if isinstance(value, float) else str(value) for key, value in own.items()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        engine, batch, recorded, folder = json.loads(args.only)
        print(json.dumps(run(engine, int(batch), recorded, Path(folder))))
        return
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "instruction_set": extension.native_instruction_sets()[0],
        "races": {},
    }
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        write_corpus(folder / "tokens.npy")
        for batch in STEPS:
            first = [("torch", batch, "rows of the dead"), ("native", batch, "rows of the dead")]
            results["races"][f"engines, batch {batch}"] = race(first, args.rounds, folder)
            cells = [("native", batch, recorded) for recorded in RECORDED]
            results["races"][f"recording, batch {batch}"] = race(cells, args.rounds, folder)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
