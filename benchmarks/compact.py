"""Compact traces against full ones: bytes, the speed of recording, and that of reading.

    python benchmarks/compact.py --json benchmarks/results/compact.json

Full and compact take turns for several rounds. The figures are medians, and so are the ratios, of those of each round.
On a machine that others use, compare CPU seconds. Each recording is a process of its own. Traces are read from a warm
page cache into one buffer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import bhfast
from bhfast.ops import extension

KEYFRAMES = 256
FORMS = {"full": 0, "compact": KEYFRAMES}
TENSORS = ("embeddings", "momentum", "variance")
VOCAB, LARGE = 128, 10_000  # tokens
CHUNK = 256  # records read at once


# ---------------------------------------------------------------------------------------------------------------------
# Recording


def run(form: str, storage: str, steps: int, vocab: int, folder: Path) -> dict[str, float]:
    """Return steps per second of a run, without and with its start and end, and per CPU second; and bytes per step."""
    out = folder / f"{storage}-{vocab}-{form}.safetensors"
    config = bhfast.TrainConfig(
        steps=steps,
        vocab_size=vocab,
        keyframes=FORMS[form],
        storage=storage,
        out=str(out),
        device="cpu",
        overwrite=True,
        quiet=True,
    )
    begun, cpu_begun = time.perf_counter(), time.process_time()
    result = bhfast.train(config)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
    return {
        "per second": result.steps_per_second,
        "in all": steps / seconds,
        "per CPU second": steps / cpu_seconds,
        "bytes": out.stat().st_size / steps,
    }


def sweep(form: str, steps: int, folder: Path) -> dict[str, float]:
    """Return the same of a sweep over four seeds."""
    flags = ["--steps", str(steps), "--device", "cpu", "--keyframes", str(FORMS[form]), "--seed", "1", "2", "3", "4"]
    begun, cpu_begun = time.perf_counter(), cpu_seconds_of_children()
    subprocess.run(
        [sys.executable, "-m", "bhfast.sweep", *flags, "--out-dir", str(folder / f"sweep-{form}")],
        check=True,
        capture_output=True,
    )
    seconds, cpu_seconds = time.perf_counter() - begun, cpu_seconds_of_children() - cpu_begun
    size = sum(path.stat().st_size for path in (folder / f"sweep-{form}").rglob("*.safetensors"))
    return {"in all": 4 * steps / seconds, "per CPU second": 4 * steps / cpu_seconds, "bytes": size / steps / 4}


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def in_chunks(trace: bhfast.Trace) -> None:
    buffer = torch.zeros_like(trace["grads"][:CHUNK])
    for first in range(0, len(trace.steps), CHUNK):
        for name in TENSORS:
            read = trace[name][first : first + CHUNK]
            buffer[: len(read)].copy_(read)


def one_by_one(trace: bhfast.Trace) -> None:
    buffer = torch.zeros_like(trace["grads"][0])
    for record in range(len(trace.steps)):
        for name in TENSORS:
            buffer.copy_(trace[name][record])


def at_random(trace: bhfast.Trace) -> None:
    buffer = torch.zeros_like(trace["grads"][0])
    for record in random.Random(0).sample(range(len(trace.steps)), 100):
        buffer.copy_(trace["embeddings"][record])


READERS: dict[str, Callable[[bhfast.Trace], None]] = {
    f"all records of 3 tensors, {CHUNK} at a time": in_chunks,
    "all records of 3 tensors, one by one": one_by_one,
    "100 random records of the embeddings": at_random,
}


def seconds_to_read(form: str, reader: str, folder: Path) -> dict[str, float]:
    path = folder / f"memory-{VOCAB}-{form}.safetensors"
    path.read_bytes()  # so that it is in the page cache
    trace = bhfast.open_trace(path)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    READERS[reader](trace)
    return {"seconds": time.perf_counter() - begun, "CPU seconds": time.process_time() - cpu_begun}


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def apart(work: str, *arguments: object) -> dict[str, float]:
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "--only", json.dumps([work, *map(str, arguments)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def race(name: str, rounds: int, work: Callable[[str], dict[str, float]]) -> dict[str, object]:
    """Let the two forms take turns; return medians, and those of the ratios compact / full of each round."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for number in range(rounds):
        for form in list(FORMS)[:: 1 if number % 2 else -1]:
            found[form].append(work(form))
            os.sync()
    result: dict[str, object] = {}
    for key in found["full"][0]:
        values = {form: [own[key] for own in found[form]] for form in FORMS}
        ratios = [compact / full for full, compact in zip(*values.values(), strict=True)]
        result[key] = {**{form: statistics.median(own) for form, own in values.items()}, "ratios": ratios}
        result[key] |= {"ratio": statistics.median(ratios)}
        print(f"{name:<48} {key:<10} {' '.join(f'{k} {v:,.4g}' for k, v in result[key].items() if k != 'ratios')}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000, help="of the reference run")
    parser.add_argument("--large-steps", type=int, default=120, help="of the network with 10,000 tokens")
    parser.add_argument("--folder", help="on the disk to measure; default: that for temporary files")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        work, form, *rest = json.loads(args.only)
        own = {"run": run, "read": seconds_to_read}
        converted = [int(x) if x.isdigit() else x for x in rest[:-1]]
        print(json.dumps(own[work](form, *converted, Path(rest[-1]))))
        return
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        runs = {
            "reference run, in memory": lambda form: apart("run", form, "memory", args.steps, VOCAB, folder),
            "reference run, streamed": lambda form: apart("run", form, "stream", args.steps, VOCAB, folder),
            "10,000 x 64, streamed": lambda form: apart("run", form, "stream", args.large_steps, LARGE, folder),
            "sweep of 4 seeds": lambda form: sweep(form, args.steps // 4, Path(tempfile.mkdtemp(dir=folder))),
            **{name: lambda form, name=name: apart("read", form, name, folder) for name in READERS},
        }
        for name, work in runs.items():
            results[name] = race(name, args.rounds, work)
    machine = {
        "cpu": next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "operations": " ".join(extension.backend(torch.device("cpu"))),
        "keyframes": KEYFRAMES,
        "steps": args.steps,
        "load at the end": os.getloadavg(),
    }
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
