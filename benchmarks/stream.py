"""The cost of streaming 3,699 rows of a vocabulary of 10,000, four fields, at every step, and of other ways to record.

    python benchmarks/stream.py --json benchmarks/results/stream.json

Each contestant trains the same network on the same random tokens in a process of its own, so that the peak memory is
its own. ``none`` and ``bhfast`` run in turn, several rounds, with the disk's own speed measured in each; then the
others, fewer steps, as they take longer. Times per step leave out the first ones.
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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import bhfast
from bhfast.model import GPTConfig, build_model, window_loss
from bhfast.start import Start

VOCAB, LIVE, DIM, CONTEXT = 10_000, 6_301, 64, 128
WARM_UP = 20  # steps
FIELDS = ("param", "grad", "exp_avg", "exp_avg_sq")
Save = Callable[[int, dict[str, Tensor]], None]


# ---------------------------------------------------------------------------------------------------------------------
# Contestants: each saves the chosen rows of all fields, as they are after a step


@contextmanager
def h5py_appends(folder: Path) -> Iterator[Save]:
    import h5py

    with h5py.File(folder / "run.h5", "w") as file:
        shape = (VOCAB - LIVE, DIM)
        sets = {
            name: file.create_dataset(name, (0, *shape), "uint16", maxshape=(None, *shape), chunks=(1, *shape))
            for name in FIELDS
        }

        def save(step: int, rows: dict[str, Tensor]) -> None:
            for name, value in rows.items():
                sets[name].resize(step, axis=0)
                sets[name][step - 1] = value.view(torch.uint16).numpy()

        yield save


@contextmanager
def zarr_appends(folder: Path) -> Iterator[Save]:
    import zarr

    group = zarr.open_group(str(folder / "run.zarr"), mode="w")
    shape = (VOCAB - LIVE, DIM)
    arrays = {
        name: group.create_array(name, shape=(0, *shape), dtype="uint16", chunks=(1, *shape), compressors=None)
        for name in FIELDS
    }

    def save(step: int, rows: dict[str, Tensor]) -> None:
        for name, value in rows.items():
            arrays[name].append(value.view(torch.uint16).numpy()[None])

    yield save


@contextmanager
def torch_save(folder: Path) -> Iterator[Save]:
    yield lambda step, rows: torch.save(rows, folder / f"{step}.pt")


@contextmanager
def dcp_async_save(folder: Path) -> Iterator[Save]:
    import torch.distributed.checkpoint as dcp

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    pending = None

    def save(step: int, rows: dict[str, Tensor]) -> None:
        nonlocal pending
        if pending is not None:
            pending.result()
        pending = dcp.async_save(rows, checkpoint_id=str(folder / str(step)))

    yield save
    if pending is not None:
        pending.result()
    torch.distributed.destroy_process_group()


OTHERS = {
    "h5py, appends of uint16": h5py_appends,
    "zarr, appends of uint16": zarr_appends,
    "torch.save per step": torch_save,
    "DCP async_save per step": dcp_async_save,
}
OURS = ("none", "bhfast", "bhfast, steps unknown")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run(contestant: str, steps: int, folder: Path) -> dict[str, float]:
    """Train; return the time per step, the total time, peak memory, and bytes on the disk."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=VOCAB, hidden_dim=DIM, layers=2, heads=2, context=CONTEXT)
    model, _ = build_model(config, Start(sigma=0.0), seed=42, device=torch.device("cpu"))
    optimizer = bhfast.FusedAdam(model.parameters(), lr=1e-3, weight_decay=0.0)
    wte = model.wte.weight
    dead = torch.arange(LIVE, VOCAB)
    tokens = torch.randint(0, LIVE, (256, 1, CONTEXT + 1))
    times, figures = [], {}

    def train(after_step: Save | None) -> None:
        for step in range(1, steps + 1):
            start = time.perf_counter()
            batch = tokens[step % len(tokens)]
            optimizer.zero_grad()
            window_loss(model(batch[:, :-1]), batch, 1).backward()
            optimizer.step()
            if after_step is not None:
                state = optimizer.state[wte]
                values = {"param": wte.detach(), "grad": wte.grad, **{k: state[k] for k in FIELDS[2:]}}
                after_step(step, {name: value[dead] for name, value in values.items()})
            times.append(time.perf_counter() - start)

    begun = time.perf_counter()
    if contestant in OTHERS:
        with OTHERS[contestant](folder) as save:
            train(save)
    elif contestant == "none":
        train(None)
    else:
        announced = None if contestant.endswith("unknown") else steps
        path = folder / "run.safetensors"
        with bhfast.Recorder(
            optimizer, {"wte": wte}, rows={"wte": dead}, steps=announced, path=path, storage="stream"
        ) as recorder:
            train(None)
        figures = {"waits": recorder.stats().waits}
    figures["seconds in all"] = time.perf_counter() - begun
    figures["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if contestant not in OTHERS and contestant != "none":
        trace = bhfast.open_trace(path)
        assert len(trace.steps) == steps + 1
        assert torch.equal(trace["wte"][-1], wte.detach()[dead])
    figures["GB on disk"] = sum(x.stat().st_blocks * 512 for x in folder.rglob("*") if x.is_file()) / 1e9
    settled = times[WARM_UP:]
    return {
        "ms per step, mean": statistics.fmean(settled) * 1e3,
        "ms per step, median": statistics.median(settled) * 1e3,
        **figures,
    }


def disk_ms_per_step(folder: Path, size: int) -> float:
    """Return how long the disk itself takes for the bytes of one step: 2 GB in pieces of 8 MB, and a sync."""
    piece, pieces = os.urandom(8 << 20), 256
    path = folder / "disk"
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(pieces):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds / (pieces * len(piece)) * size * 1e3


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def run_apart(contestant: str, steps: int, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        command = [sys.executable, __file__, "--only", contestant, "--steps", str(steps), "--folder", own]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{contestant}: {done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
    os.sync()
    print(f"{contestant:<26}" + "".join(f"{name} {value:,.3f}   " for name, value in result.items()), flush=True)
    return result


def cpu_name() -> str:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of the long run of none and bhfast")
    parser.add_argument("--round-steps", type=int, default=500, help="of the rounds that compare them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--baseline-steps", type=int, default=200, help="of the others")
    parser.add_argument("--folder", type=Path, help="for the data (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args.steps, args.folder)))
        return
    folder = args.folder or Path(tempfile.gettempdir())
    size = (VOCAB - LIVE) * DIM * 2 * len(FIELDS)
    disks = [disk_ms_per_step(folder, size)]
    rounds = []
    for _ in range(args.rounds):
        pair = {name: run_apart(name, args.round_steps, folder) for name in ("none", "bhfast")}
        rounds.append(pair)
        disks.append(disk_ms_per_step(folder, size))
    long = {name: run_apart(name, args.steps, folder) for name in OURS}
    disks.append(disk_ms_per_step(folder, size))
    others = {name: run_apart(name, args.baseline_steps, folder) for name in OTHERS}
    mean = "ms per step, mean"
    result = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "bytes per step": size,
        "disk, ms per step": disks,
        "rounds": rounds,
        "long": {"steps": args.steps, **long},
        "others": {"steps": args.baseline_steps, **others},
        "summary": {
            "median of ratios bhfast / none by round": statistics.median(
                pair["bhfast"][mean] / pair["none"][mean] for pair in rounds
            ),
            "long run, ms per step more than none": long["bhfast"][mean] - long["none"][mean],
            "long run, ms of the disk per step, median": statistics.median(disks),
            "long run, peak MB more than none": long["bhfast"]["peak MB"] - long["none"]["peak MB"],
        },
    }
    print(json.dumps(result["summary"], indent=1))
    print("disk, ms per step:", ", ".join(f"{ms:.2f}" for ms in disks))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
