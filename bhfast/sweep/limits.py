"""How many runs the resident engine should have side by side on a GPU: what they need, and what there is.

The speed of a step is an estimate (docs/resident.md): nothing is measured on a GPU yet.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bhfast
from bhfast.errors import StorageError

PCIE = 55e9  # bytes per second to the host that PCIe 5.0 with 16 lanes carries: an assumption
USABLE = 0.9  # of all memory
PROBE_BYTES = 64 << 20  # to write, for the speed of the disk
PROCESS_BYTES = 16 << 20  # of the host's memory for a run besides its records: an assumption
SCALARS = 18  # bytes of a record: loss, learning rate, clip coefficient, norm
# Seconds for a step of the reference network, by the number of blocks that work on it: the most that
# benchmarks/resident_floor.py estimates for an H200.
REFERENCE_SECONDS = {1: 769e-6, 2: 391e-6, 4: 200e-6, 8: 119e-6}
REFERENCE_WORK = 116_480 * 128  # parameters times positions
LEAST = 0.25  # of these seconds, which are mostly latency, that the smallest network takes: an assumption


@dataclass(frozen=True)
class Machine:
    """What runs share that are side by side on a GPU.

    Attributes:
        multiprocessors: of the GPU; each can hold one block.
        most_blocks: of a cluster.
        gpu_bytes, host_bytes: memory.
        pcie, disk: bytes per second.
    """

    multiprocessors: int
    most_blocks: int
    gpu_bytes: float
    host_bytes: float
    pcie: float
    disk: float


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        gpu_bytes: ring, parameters, state and activations.
        host_bytes: records that wait for the disk, or all of them.
        record_bytes: per step, on the way to the host and to the disk.
        seconds: of a step, by the number of blocks that work on it.
    """

    gpu_bytes: float
    host_bytes: float
    record_bytes: float
    seconds: Mapping[int, float]


def limits(needs: Needs, machine: Machine, blocks: int) -> dict[str, int]:
    """Return how many runs each part of the machine allows side by side, at least one.

    A bus or a disk allows as many as keep it busy: more would wait for it.

    Args:
        blocks: that work on each run.
    """
    rate = needs.record_bytes / needs.seconds[blocks]
    return {
        "multiprocessors": max(1, machine.multiprocessors // blocks),
        "GPU memory": max(1, int(machine.gpu_bytes / needs.gpu_bytes)),
        "memory": max(1, int(machine.host_bytes / needs.host_bytes)),
        "PCIe": -int(-machine.pcie // rate),
        "disk": -int(-machine.disk // rate),
    }


def divide(needs: Needs, machine: Machine, runs: int, wanted: int | None = None) -> tuple[int, int, dict[str, int]]:
    """Return how many runs to have side by side, how many blocks each of them gets, and the limits.

    They are as many as all limits allow, with as many blocks as there are multiprocessors for.

    Args:
        runs: how many there are.
        wanted: how many are to be side by side, whatever the limits; None: as many as they allow.
    """
    for blocks in sorted(needs.seconds, reverse=True):
        found = limits(needs, machine, blocks)
        side_by_side = min(runs, wanted or min(count for what, count in found.items() if what != "multiprocessors"))
        if blocks == 1 or (blocks <= machine.most_blocks and side_by_side <= machine.multiprocessors // blocks):
            break
    return side_by_side if wanted else min(side_by_side, found["multiprocessors"]), blocks, found


def needs_of(config: bhfast.TrainConfig) -> Needs:
    """Return what a run needs on the resident engine, rather too much than too little: as if all rows were recorded."""
    from bhfast.engines.resident import PORTABLE, ROWS
    from bhfast.storage.stream import BUFFER
    from bhfast.transfer.ring import HALF_BYTES

    windows = config.batch_size * config.grad_accum
    rows = windows * -(-config.context // ROWS) * ROWS
    width, mlp = config.hidden_dim, config.model_config().mlp_width
    parameters = (config.vocab_size + config.context + 2) * width
    parameters += config.layers * ((4 * width + 2 * mlp + 9) * width + mlp)
    values = parameters if config.params else config.vocab_size * width
    tensors = 1 + 3 / config.keyframes if config.keyframes else 4
    record = 2 * values * tensors + 2 * config.vocab_size + SCALARS
    scores = 2 * config.heads * config.context
    activations = 2 * rows * (config.layers * (14 * width + scores + 3 * mlp) + 4 * width + config.vocab_size)
    records = config.steps // config.record_every + 1
    in_memory = record * records
    buffered = max(BUFFER, 4 * record)
    work = max(LEAST, parameters * windows * config.context / REFERENCE_WORK)
    return Needs(
        gpu_bytes=2 * max(HALF_BYTES, 2 * record) + 8 * parameters + activations,
        host_bytes=PROCESS_BYTES + (in_memory if config.storage == "memory" else min(buffered, in_memory)),
        record_bytes=record / config.record_every,
        seconds={
            blocks: seconds * work
            for blocks, seconds in REFERENCE_SECONDS.items()
            if blocks <= min(PORTABLE, rows // ROWS)
        },
    )


def this_machine(folder: str | os.PathLike[str], gpus: int) -> Machine:
    """Return what each of the GPUs and its share of this machine have.

    Args:
        folder: for the traces; it must exist. The speed of its disk is measured by writing to it.
        gpus: how many share memory and disk.
    """
    import torch

    from bhfast.engines.resident import PORTABLE
    from bhfast.machine import available_memory

    gpu = torch.cuda.get_device_properties(0)
    return Machine(
        multiprocessors=gpu.multi_processor_count,
        most_blocks=PORTABLE if gpu.major >= 9 else 1,
        gpu_bytes=USABLE * gpu.total_memory,
        host_bytes=USABLE * available_memory() / gpus,
        pcie=PCIE,
        disk=disk_speed(folder) / gpus,
    )


def disk_speed(folder: str | os.PathLike[str]) -> float:
    """Write to a file in a folder; return how many bytes arrive on its disk in a second.

    Raises:
        StorageError: the folder cannot be written to.
    """
    try:
        with tempfile.TemporaryFile(dir=Path(folder), buffering=0) as file:
            data = memoryview(os.urandom(PROBE_BYTES))
            begun = time.monotonic()
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
            return PROBE_BYTES / (time.monotonic() - begun)
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --out-dir"
        ) from None
